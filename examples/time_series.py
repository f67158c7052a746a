"""What is in a time series, and where: classification by a query for each class, beside the nearest neighbour.

Convolutions describe what is around each moment. The learnt query of a class attends to the moments, and what it reads
says how likely the class is: attention is the pooling, for series of any length, and its weights show what was looked
at (Lin et al., "A Structured Self-attentive Sentence Embedding", 2017; here with a query for each class). Two of aeon's
data sets: whether someone draws a gun or only points, 150 moments of the hand's height ("GunPoint"); and which of nine
men says a vowel, 12 channels of 7 to 29 moments ("JapaneseVowels").

    pip install --no-deps aeon                  the data; nothing else of it is used
    python examples/time_series.py              needs torch; draws series.png if matplotlib is there
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import nn

import fastattn as fa
from fastattn.integrations import torch as fastattn_torch

HEADS = 4
SETS = "GunPoint", "JapaneseVowels"


def read(name, part):
    """(series [(channels, T)], labels (n,)) of aeon's data set; part is "TRAIN" or "TEST"."""
    package = find_spec("aeon")
    if package is None:
        sys.exit("the series are missing: pip install --no-deps aeon")
    file = Path(package.origin).parent / "datasets" / "data" / name / f"{name}_{part}.ts"
    head, _, body = file.read_text("utf-8").partition("@data\n")
    lines = [line.split(":") for line in body.split()]
    classes = next(line for line in head.splitlines() if line.startswith("@classLabel true")).split()[2:]
    series = [np.array([c.split(",") for c in channels], np.float32) for *channels, _ in lines]
    return series, np.array([classes.index(label) for *_, label in lines])


def pad(series):
    """(x (n, channels, longest), lengths (n,)) as tensors, 0 past the end."""
    lengths = torch.tensor([one.shape[1] for one in series])
    x = torch.zeros(len(series), len(series[0]), int(lengths.max()))
    for row, one in zip(x, series):
        row[:, : one.shape[1]] = torch.from_numpy(one)
    return x, lengths


class Classifier(nn.Module):
    def __init__(self, channels, classes, width=32):
        super().__init__()
        # 57 moments wide, in three steps
        self.convolutions = nn.ModuleList(nn.Conv1d(n, width, 9, padding=4 * d, dilation=d)
                                          for n, d in ((channels, 1), (width, 2), (width, 4)))
        self.queries = nn.Parameter(torch.randn(HEADS, classes, width // HEADS))
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Parameter(torch.randn(classes, width) / width**0.5)

    def heads(self, x, lengths):
        """Queries (1, HEADS, classes, D), keys and values (n, HEADS, T, D), and what is there (n, 1, 1, T)."""
        there = torch.arange(x.shape[2]) < lengths[:, None, None]
        for convolution in self.convolutions:
            x = nn.functional.gelu(convolution(x * there))      # what is padded stays 0
        key, value = (linear(x.mT).unflatten(-1, (HEADS, -1)).transpose(1, 2) for linear in (self.key, self.value))
        return self.queries[None], key, value, there[:, None]

    def forward(self, x, lengths):
        query, key, value, there = self.heads(x, lengths)
        read = nn.functional.scaled_dot_product_attention(query.expand(len(x), -1, -1, -1), key, value, attn_mask=there)
        return (read.transpose(1, 2).flatten(2) * self.out).sum(-1)

    @torch.no_grad()
    def attended(self, x, lengths):
        """What the query of each class attends to, a mean over heads: (n, classes, T)."""
        query, key, _, _ = self.heads(x, lengths)
        query = query.expand(len(x), -1, -1, -1)
        return fa.attention_weights(query.numpy(), key.numpy(), kv_lengths=lengths.numpy()).mean(axis=1)


def train(series, labels, steps, batch=32, rate=5e-3, seed=0):
    """A trained classifier."""
    torch.manual_seed(seed)
    x, lengths = pad(series)
    y = torch.from_numpy(labels)
    model = Classifier(x.shape[1], int(y.max()) + 1)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    with fastattn_torch.patch():
        for _ in range(steps):
            rows = torch.randint(len(x), (batch,))
            rough = x[rows] + 0.1 * torch.randn(batch, *x.shape[1:])
            loss = nn.functional.cross_entropy(model(rough, lengths[rows]), y[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model


@torch.no_grad()
def accuracy(model, series, labels):
    with fastattn_torch.patch():
        return float((model(*pad(series)).argmax(1).numpy() == labels).mean())


def nearest(known, labels, series):
    """The label of the nearest known series, for each; those of other lengths are stretched to the longest."""
    longest = max(one.shape[1] for one in [*known, *series])

    def stretched(one):
        at = np.linspace(0, one.shape[1] - 1, longest)
        return np.concatenate([np.interp(at, np.arange(one.shape[1]), channel) for channel in one])

    known, series = (np.array([stretched(one) for one in some]) for some in (known, series))
    return labels[np.square(series[:, None] - known).sum(axis=2).argmin(axis=1)]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="few steps")
    parser.add_argument("--picture", default="series.png", help="where the attention is drawn")
    args = parser.parse_args(argv)
    steps, models = 20 if args.small else 300, {}
    for name in SETS:
        (known, labels), (new, wanted) = read(name, "TRAIN"), read(name, "TEST")
        start = perf_counter()
        models[name] = model = train(known, labels, steps)
        seconds = perf_counter() - start
        print(f"{name}: {len(known)} known series, {len(new)} new ones; {accuracy(model, new, wanted):.1%} right after "
              f"{seconds:.0f} s of training, {(nearest(known, labels, new) == wanted).mean():.1%} by the nearest "
              f"neighbour", flush=True)
    try:
        from matplotlib import pyplot
    except ImportError as error:
        print(error)
        return
    new, labels = read("GunPoint", "TEST")
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 5), sharex=True, sharey=True, layout="constrained")
    for row, label, title in zip(axes, (0, 1), ("draws a gun", "points")):
        chosen = np.flatnonzero(labels == label)[:3]
        x, lengths = pad([new[n] for n in chosen])
        for ax, (series,), weights in zip(row, x.numpy(), models["GunPoint"].attended(x, lengths)[:, label]):
            ax.imshow(weights[None], cmap="Oranges", vmin=0, aspect="auto", extent=(-0.5, len(series) - 0.5, -2.5, 2.5))
            ax.plot(series, color="black")
            ax.set_title(title)
    figure.savefig(args.picture)
    print("drew", args.picture)


if __name__ == "__main__":
    main()
