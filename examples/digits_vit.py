"""Handwritten digits by a vision transformer, trained on the CPU.

scikit-learn's 1797 pictures of 8 x 8 pixels are cut into 16 patches of 2 x 2; a class token attends to them through
four layers. The attention of all of it, gradients included, is fastattn's, by `fastattn.integrations.torch.patch`:
the model itself is plain torch. The class token's last attention is drawn over some digits.

    python examples/digits_vit.py               needs torch, scikit-learn; draws digits.png if matplotlib is there
"""

import argparse
from time import perf_counter

import numpy as np
import torch
from torch import nn

import fastattn as fa
from fastattn.integrations import torch as fastattn_torch

HEADS = 4


def data():
    """(pictures (n, 8, 8) in [-1, 1], digits (n,)) to train on and to test with: a fifth, drawn once."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pictures = (digits.images / 8 - 1).astype(np.float32)
    split = train_test_split(pictures, digits.target, test_size=0.2, random_state=0, stratify=digits.target)
    x_train, x_test, y_train, y_test = map(torch.from_numpy, split)
    return x_train, y_train, x_test, y_test


def patches(pictures):
    """(n, 16, 4): the patches of 2 x 2 pixels."""
    return pictures.unfold(1, 2, 2).unfold(2, 2, 2).flatten(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(),
                                 nn.Linear(2 * width, width))

    def heads(self, x):
        """Queries, keys and values (n, HEADS, tokens, size)."""
        return self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x):
        mixed = nn.functional.scaled_dot_product_attention(*self.heads(x))
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class ViT(nn.Module):
    def __init__(self, width=64, layers=4):
        super().__init__()
        self.embed, self.out = nn.Linear(4, width), nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))
        self.token = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(0.1 * torch.randn(17, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))

    def tokens(self, pictures):
        x = self.embed(patches(pictures))
        return torch.cat([self.token.expand(len(x), 1, -1), x], dim=1) + self.positions

    def forward(self, pictures):
        x = self.tokens(pictures)
        for block in self.blocks:
            x = block(x)
        return self.out(x[:, 0])

    @torch.no_grad()
    def class_attention(self, pictures):
        """What the class token attends to in the last layer, a mean over heads: (n, 4, 4)."""
        x = self.tokens(pictures)
        for block in self.blocks[:-1]:
            x = block(x)
        query, key, _ = self.blocks[-1].heads(x)
        weights = fa.attention_weights(query.numpy(), key.numpy(), rows=[0])
        return weights.mean(axis=1)[:, 0, 1:].reshape(-1, 4, 4)


def shifted(pictures):
    """Each picture moved by -1, 0 or 1 pixel along each axis: what a small training set lacks."""
    padded = nn.functional.pad(pictures, (1, 1, 1, 1), value=-1)
    down, right = torch.randint(3, (2, len(pictures), 1, 1))
    n, i, j = torch.arange(len(pictures))[:, None, None], torch.arange(8)[:, None], torch.arange(8)
    return padded[n, i + down, j + right]


def train(x, y, epochs, width=64, layers=4, batch=64, rate=2e-3, seed=0, report=0):
    """A trained model; the loss is printed every `report` epochs."""
    torch.manual_seed(seed)
    model = ViT(width, layers)
    steps = -(-len(x) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps)
    with fastattn_torch.patch():
        for epoch in range(epochs):
            for rows in torch.randperm(len(x)).split(batch):
                loss = nn.functional.cross_entropy(model(shifted(x[rows])), y[rows], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            if report and (epoch + 1) % report == 0:
                print(f"epoch {epoch + 1:3}: loss {loss.item():.3f}", flush=True)
    return model


@torch.no_grad()
def accuracy(model, x, y):
    with fastattn_torch.patch():
        return (model(x).argmax(dim=1) == y).float().mean().item()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a smaller model, fewer epochs")
    parser.add_argument("--picture", default="digits.png", help="where the attention is drawn")
    args = parser.parse_args(argv)
    x_train, y_train, x_test, y_test = data()
    epochs, sizes = (2, {"width": 32, "layers": 2}) if args.small else (80, {})
    start = perf_counter()
    model = train(x_train, y_train, epochs, report=max(1, epochs // 10), **sizes)
    seconds = perf_counter() - start
    print(f"{accuracy(model, x_test, y_test):.1%} of {len(y_test)} test digits right after {seconds:.0f} s of training")
    try:
        from matplotlib import pyplot
    except ImportError as error:
        print(error)
        return
    shown = x_test[:8]
    with torch.no_grad():
        named = model(shown).argmax(dim=1)
    figure, axes = pyplot.subplots(2, len(shown), figsize=(12, 3.4), layout="constrained")
    for (above, below), picture, attended, name in zip(axes.T, shown.numpy(), model.class_attention(shown), named):
        above.imshow(picture, cmap="gray")
        above.set_title(f"a {name}", fontsize=10)
        below.imshow(picture, cmap="gray", vmax=3)
        below.imshow(attended, cmap="Oranges", vmin=0, alpha=0.6, extent=(-0.5, 7.5, 7.5, -0.5))
    for ax in axes.flat:
        ax.set_axis_off()
    figure.savefig(args.picture)
    print("drew", args.picture)


if __name__ == "__main__":
    main()
