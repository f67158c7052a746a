"""Object queries: a small DETR finds handwritten digits on photographs, and its decoder shows where each query looks.

Up to three of scikit-learn's digits are written over 40 x 40 pixels of a photograph: of a flower to learn from, of a
Chinese temple to be tested with. Six learnt queries look at the 100 patches; each answers with a digit, or nothing, and
a place. The answers have no order, so a matching pairs them with the digits there (Carion et al., "End-to-End Object
Detection with Transformers", 2020). The model is plain torch; `fastattn.integrations.torch.patch` does its attention,
`fastattn.positions.sinusoidal_2d` tells it where a patch is, `fastattn.attention_weights` gives the maps.

    python examples/object_queries.py           needs torch, scikit-learn, pillow, scipy; draws queries.png
"""

import argparse
from time import perf_counter

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn import functional as F

import fastattn as fa
from fastattn import positions
from fastattn.integrations import torch as fastattn_torch

SIDE, PATCH, HEADS, QUERIES, NOTHING = 40, 4, 4, 6, 10
GRID = SIDE // PATCH


def digits():
    """(pictures (n, 8, 8) in [0, 1], digits (n,)): the first 1500 to train on, the others to test with."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pictures, labels = (data.images / 16).astype(np.float32), data.target
    return (pictures[:1500], labels[:1500]), (pictures[1500:], labels[1500:])


def photographs(name, shrunk=(2, 4, 8, 10)):
    """Grey pictures (height, width) in [0, 1] of one of scikit-learn's photographs, 1 / n of its size for each n."""
    from sklearn.datasets import load_sample_image

    grey, pictures = load_sample_image(name).mean(axis=2, dtype=np.float32) / 255, []
    for n in shrunk:
        height, width = (length // n for length in grey.shape)
        pictures.append(grey[: height * n, : width * n].reshape(height, n, width, n).mean(axis=(1, 3)))
    return pictures


def scenes(source, n, seed, most=3, behind=None):
    """(pictures (n, SIDE, SIDE), [(digits (k,), centres (k, 2) in [0, 1])]) with 1 to `most` digits apart.

    `behind` has the photographs that they are written on, dimmed; without them it is black.
    """
    pictures, labels = source
    rng = np.random.default_rng(seed)
    canvas, targets = np.zeros((n, SIDE, SIDE), np.float32), []
    for picture in canvas:
        if behind is not None:
            photograph = behind[rng.integers(len(behind))]
            i, j = (rng.integers(length - SIDE + 1) for length in photograph.shape)
            picture[...] = rng.uniform(0.2, 0.6) * photograph[i : i + SIDE, j : j + SIDE][:, :: rng.choice([-1, 1])]
        places = []
        wanted = rng.integers(1, most + 1)
        while len(places) < wanted:
            place = rng.integers(0, SIDE - 7, 2)
            if all(abs(place - other).max() >= 8 for other in places):
                places.append(place)
        chosen = rng.integers(len(labels), size=len(places))
        for (i, j), c in zip(places, chosen):
            part = picture[i : i + 8, j : j + 8]
            part[...] = pictures[c] + (1 - pictures[c]) * part
        targets.append((torch.from_numpy(labels[chosen]), torch.tensor(np.array(places) + 4.0).float() / SIDE))
    return torch.from_numpy(canvas), targets


class Attention(nn.Module):
    """Multi-head attention of x to y; positions are added to what is compared, not to what is read, as in DETR."""

    def __init__(self, width):
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def heads(self, x, of):
        return of(x).unflatten(-1, (HEADS, -1)).transpose(-3, -2)

    def forward(self, x, y, of_x, of_y):
        query, key = self.heads(x + of_x, self.query), self.heads(y + of_y, self.key)
        mixed = F.scaled_dot_product_attention(query, key, self.heads(y, self.value))
        return self.out(mixed.transpose(-3, -2).flatten(-2))


class Layer(nn.Module):
    """An encoder layer, or with `cross` one of the decoder."""

    def __init__(self, width, cross):
        super().__init__()
        self.own, self.cross = Attention(width), Attention(width) if cross else None
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 + cross))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, x, of_x, memory=None, of_memory=None):
        x = self.norms[0](x + self.own(x, x, of_x, of_x))
        if self.cross is not None:
            x = self.norms[2](x + self.cross(x, memory, of_x, of_memory))
        return self.norms[1](x + self.mlp(x))


class Detector(nn.Module):
    def __init__(self, width=64, encoder=1, decoder=2):
        super().__init__()
        self.embed = nn.Sequential(nn.Conv2d(1, width, 5, padding=2), nn.ReLU(), nn.Conv2d(width, width, PATCH, PATCH))
        # The base of DETR is for hundreds of patches: of 10, its slower waves would tell little.
        places = positions.sinusoidal_2d(GRID, GRID, width, base=20.0, normalize=False)
        self.register_buffer("places", torch.from_numpy(places).flatten(0, 1))
        self.queries = nn.Parameter(torch.randn(QUERIES, width))
        self.encoder = nn.ModuleList(Layer(width, False) for _ in range(encoder))
        self.decoder = nn.ModuleList(Layer(width, True) for _ in range(decoder))
        self.kind, self.place = nn.Linear(width, NOTHING + 1), nn.Linear(width, 2)

    def forward(self, pictures, before_last=False):
        """Logits (n, QUERIES, 11) and centres (n, QUERIES, 2); `before_last`: what the last cross-attention gets."""
        memory = self.embed(pictures[:, None]).flatten(2).mT
        for layer in self.encoder:
            memory = layer(memory, self.places)
        x = torch.zeros(len(pictures), *self.queries.shape)
        for layer in self.decoder:
            last = layer.norms[0](x + layer.own(x, x, self.queries, self.queries))
            x = layer(x, self.queries, memory, self.places)
        return (last, memory) if before_last else (self.kind(x), self.place(x).sigmoid())

    @torch.no_grad()
    def maps(self, pictures):
        """What each query attends to in the last layer, a mean over heads: (n, QUERIES, GRID, GRID)."""
        x, memory = self(pictures, before_last=True)
        cross = self.decoder[-1].cross
        query = cross.heads(x + self.queries, cross.query)
        key = cross.heads(memory + self.places, cross.key)
        return fa.attention_weights(query.numpy(), key.numpy()).mean(axis=1).reshape(-1, QUERIES, GRID, GRID)


def matched(chances, centres, kinds, places):
    """(queries, objects) of the pairs with the least cost: far, or thought to be another digit."""
    cost = 5 * torch.cdist(centres, places, 1) - chances[:, kinds]
    return map(torch.from_numpy, linear_sum_assignment(cost.numpy()))


def loss_of(logits, centres, targets):
    chances, wanted, far = logits.detach().softmax(-1), torch.full(logits.shape[:2], NOTHING), []
    for n, (kinds, places) in enumerate(targets):
        query, item = matched(chances[n], centres[n].detach(), kinds, places)
        wanted[n, query] = kinds[item]
        far.append((centres[n, query] - places[item]).abs().sum(-1))
    weight = torch.ones(NOTHING + 1)
    weight[NOTHING] = 0.2       # most queries find nothing
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weight) + 5 * torch.cat(far).mean()


def train(source, steps, batch=32, rate=1e-3, seed=0, report=0, most=3, behind=None, **sizes):
    """A trained detector; the loss is printed every `report` steps."""
    torch.manual_seed(seed)
    model = Detector(**sizes)
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    with fastattn_torch.patch():
        for step in range(steps):
            pictures, targets = scenes(source, batch, [seed, step], most, behind)
            loss = loss_of(*model(pictures), targets)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            if report and (step + 1) % report == 0:
                print(f"step {step + 1:5}: loss {loss.item():.3f}", flush=True)
    return model


@torch.no_grad()
def score(model, pictures, targets):
    """(share of digits found at their place, within 3 pixels; share of these that are named rightly)."""
    with fastattn_torch.patch():
        logits, centres = model(pictures)
    found, right, total = 0, 0, 0
    for chances, centre, (kinds, places) in zip(logits.softmax(-1), centres, targets):
        query, item = matched(chances, centre, kinds, places)
        near = ((centre[query] - places[item]).abs().amax(-1) * SIDE <= 3) & (chances[query].argmax(-1) != NOTHING)
        found, total = found + near.sum().item(), total + len(kinds)
        right += (near & (chances[query].argmax(-1) == kinds[item])).sum().item()
    return found / total, right / max(1, found)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="few steps")
    parser.add_argument("--picture", default="queries.png", help="where the maps are drawn")
    args = parser.parse_args(argv)
    known, new = digits()
    steps = 10 if args.small else 3000
    start = perf_counter()
    model = train(known, steps, report=steps // 10, behind=photographs("flower.jpg"))
    seconds = perf_counter() - start
    pictures, targets = scenes(new, 200, 10**6, behind=photographs("china.jpg"))
    found, right = score(model, pictures, targets)
    print(f"{found:.1%} of the digits on another photograph found, {right:.1%} of these named rightly, after "
          f"{seconds:.0f} s of training")
    try:
        from matplotlib import pyplot
    except ImportError as error:
        print(error)
        return
    n = 4
    pictures, _ = scenes(new, n, 10**6 + 1, behind=photographs("china.jpg", (10,)))     # as much of it as fits
    with torch.no_grad():
        logits, centres = model(pictures)
    figure, axes = pyplot.subplots(n, QUERIES + 1, figsize=(14, 2.2 * n), layout="constrained")
    drawn = zip(axes, pictures.numpy(), model.maps(pictures), logits.argmax(-1).tolist(), (centres * SIDE).tolist())
    for row, picture, maps, names, at in drawn:
        row[0].imshow(picture, cmap="gray", vmin=0, vmax=1)
        for ax, attended, name, (y, x) in zip(row[1:], maps, names, at):
            ax.imshow(picture, cmap="gray", vmin=0, vmax=2)
            ax.imshow(attended, cmap="Oranges", vmin=0, alpha=0.6, extent=(-0.5, SIDE - 0.5, SIDE - 0.5, -0.5))
            ax.set_title("nothing" if name == NOTHING else f"a {name}", fontsize=10)
            if name != NOTHING:
                row[0].add_patch(pyplot.Circle((x - 0.5, y - 0.5), 5.5, fill=False, color="tab:orange"))
                row[0].text(min(x + 5, SIDE - 4), max(y - 5, 3), str(name), color="tab:orange", fontsize=10)
    for ax in axes.flat:
        ax.set_axis_off()
    figure.savefig(args.picture)
    print("drew", args.picture)


if __name__ == "__main__":
    main()
