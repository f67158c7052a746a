"""Dates into ISO form by a recurrent encoder-decoder with Bahdanau's attention, and its alignment as a heat map.

"tuesday 3 march 1998" becomes "1998-03-03": the year is last in one and first in the other, so the decoder must look
for what it writes next. A bidirectional GRU annotates the characters, a GRU runs over what was written, and
`fastattn.additive_attention`, made differentiable with its backward function, reads the annotations.

    python examples/date_translation.py         needs torch; draws alignment.png if matplotlib is there
"""

import argparse
import datetime

import numpy as np
import torch
from torch import nn

import fastattn as fa
from fastattn import plot

LETTERS = "_ abcdefghijklmnopqrstuvwxyz0123456789,"      # place 0: padding
DIGITS = "^-0123456789"                                 # place 0: the start
LENGTH = 10                                             # of an ISO date
FORMS = ("%A %d %B %Y", "%d %b %Y", "%B %d, %Y", "%A, %b %d %Y")


def dates(n, seed=0):
    """n pairs (a date in words, in ISO form)."""
    rng = np.random.default_rng(seed)
    days = [datetime.date.fromordinal(int(d)) for d in rng.integers(690_000, 750_000, n)]      # 1890 to 2054
    words = [d.strftime(FORMS[form]).lower() for d, form in zip(days, rng.integers(len(FORMS), size=n))]
    return [(text.replace(" 0", " ").lstrip("0"), d.isoformat()) for text, d in zip(words, days)]


def encode(pairs):
    """(characters (n, S), their number (n,), digits (n, LENGTH)) as tensors."""
    lengths = torch.tensor([len(words) for words, _ in pairs])
    words = torch.zeros(len(pairs), int(lengths.max()), dtype=torch.long)
    for row, (text, _) in zip(words, pairs):
        row[: len(text)] = torch.tensor([LETTERS.index(c) for c in text])
    return words, lengths, torch.tensor([[DIGITS.index(c) for c in iso] for _, iso in pairs])


class AdditiveAttention(torch.autograd.Function):
    """`fastattn.additive_attention` of one head, with its gradients, for tensors (B, L or S, D)."""

    @staticmethod
    def forward(ctx, query, key, value, weight, lengths):
        arrays = [x.detach().numpy() for x in (query, key, value)]
        arrays = [x[:, None] for x in arrays] + [weight.detach().numpy()]
        ctx.saved = arrays, lengths.numpy(), fa.additive_attention(*arrays, kv_lengths=lengths.numpy(), return_lse=True)
        return torch.from_numpy(ctx.saved[2][0][:, 0])

    @staticmethod
    def backward(ctx, grad):
        arrays, lengths, (out, lse) = ctx.saved
        g = fa.additive_attention_backward(grad.numpy()[:, None], *arrays, out, lse, kv_lengths=lengths)
        return *(torch.from_numpy(x[:, 0]) for x in (g.query, g.key, g.value)), torch.from_numpy(g.weight), None


class Translator(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.letters, self.digits = nn.Embedding(len(LETTERS), width), nn.Embedding(len(DIGITS), width)
        self.encoder = nn.GRU(width, width // 2, batch_first=True, bidirectional=True)
        self.decoder = nn.GRU(width, width, batch_first=True)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.weight = nn.Parameter(torch.randn(width) / width**0.5)
        self.out = nn.Sequential(nn.Linear(2 * width, width), nn.Tanh(), nn.Linear(width, len(DIGITS)))

    def annotate(self, words, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(self.letters(words), lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.encoder(packed)[0], batch_first=True)[0]

    def forward(self, words, lengths, written):
        """Logits (B, L, digits) of what follows each of the written ones, and queries and keys."""
        annotations = self.annotate(words, lengths)
        states, _ = self.decoder(self.digits(written))
        query, key = self.query(states), self.key(annotations)
        context = AdditiveAttention.apply(query, key, annotations, self.weight, lengths)
        return self.out(torch.cat([states, context], dim=-1)), query, key

    @torch.no_grad()
    def translate(self, words, lengths):
        """(the digits (B, LENGTH), weights (B, LENGTH, S) with which each was written)."""
        written = torch.zeros(len(words), 1, dtype=torch.long)
        for _ in range(LENGTH):
            logits, query, key = self(words, lengths, written)
            written = torch.cat([written, logits[:, -1:].argmax(-1)], dim=1)
        # additive attention to unit vectors is its weights
        S = words.shape[1]
        unit = np.broadcast_to(np.eye(S, dtype=np.float32), (len(words), 1, S, S))
        query, key = query.numpy()[:, None], key.numpy()[:, None]
        weights = fa.additive_attention(query, key, unit, self.weight.detach().numpy(), kv_lengths=lengths.numpy())
        return written[:, 1:], weights[:, 0]


def train(steps, batch=64, width=64, rate=4e-3, seed=0, report=0):
    """A trained model; the loss is printed every ``report`` steps."""
    torch.manual_seed(seed)
    model = Translator(width)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step in range(steps):
        words, lengths, digits = encode(dates(batch, seed=[seed, step]))
        written = torch.cat([torch.zeros(batch, 1, dtype=torch.long), digits[:, :-1]], dim=1)
        logits, _, _ = model(words, lengths, written)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), digits.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if report and (step + 1) % report == 0:
            print(f"step {step + 1:5}: loss {loss.item():.3f}", flush=True)
    return model


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="fewer steps")
    parser.add_argument("--picture", default="alignment.png", help="where the alignment is drawn")
    args = parser.parse_args(argv)
    steps = 30 if args.small else 500
    model = train(steps, report=steps // 10)
    pairs = dates(500, seed=1_000_000)
    words, lengths, digits = encode(pairs)
    found, weights = model.translate(words, lengths)
    for n in range(4):
        print(f"{pairs[n][0]:>28} -> {''.join(DIGITS[d] for d in found[n])}  (is {pairs[n][1]})")
    print(f"{(found == digits).all(1).float().mean():.1%} of {len(pairs)} new dates right")
    try:
        from matplotlib import pyplot
    except ImportError as error:
        print(error)
        return
    # The first date of each form: they are told by their commas and their first letter.
    forms = {(words.count(","), words[0].isdigit(), words.split()[0].endswith(",")): n
             for n, (words, _) in reversed(list(enumerate(pairs)))}
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 8), layout="constrained")
    for ax, n in zip(axes.flat, sorted(forms.values())):
        words = [c.replace(" ", "\N{OPEN BOX}") for c in pairs[n][0]]
        plot.heatmap(weights[n, :, : lengths[n]], [DIGITS[d] for d in found[n]], words, ax=ax, vmax=1, colorbar=False)
        ax.set(xlabel="", ylabel="", title=pairs[n][0])
    figure.savefig(args.picture)
    print("drew", args.picture)


if __name__ == "__main__":
    main()
