"""Six kinds of attention on ListOps, in accuracy, time and memory.

"[MAX 2 9 [MIN 4 7 ] 0 ]" is 9: the task of Nangia and Bowman (2018) that Long Range Arena (2021) made long. The same
small transformer is trained with full attention; the patterns of Longformer and BigBird; a hierarchy, near keys as they
are and far ones as means of more and more (after H-Transformer-1D, Zhu and Soricut, 2021); Linformer; and linear
attention. Sequences are generated, of up to 256 tokens nested 6 deep, where Long Range Arena has 500 to 2000 nested 10
deep and a larger model. Time and memory are those of one layer's attention, forward and backward, at 2048 tokens and at
16,384.

    python examples/listops.py                  needs torch
    python examples/listops.py --length 512 --steps 4000
"""

import argparse
import functools
import tracemalloc
from time import perf_counter

import numpy as np
import torch
from torch import nn

import fastattn as fa
from fastattn import masks

TOKENS = ["<pad>", "<class>", *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]"]
KINDS = ("full", "longformer", "bigbird", "hierarchical", "linformer", "linear")
HEADS, BLOCK, RANK = 4, 16, 32
WORK = {"[MIN": min, "[MAX": max, "[MED": lambda x: int(np.median(x)), "[SM": lambda x: sum(x) % 10}


def expression(rng, depth, most):
    """(tokens, value) of a random expression nested at most `depth` deep, with 2 to `most` arguments each."""
    if depth == 0 or rng.random() < 0.5:
        digit = int(rng.integers(10))
        return [str(digit)], digit
    return operation(rng, depth, most)


def operation(rng, depth, most):
    name = str(rng.choice(list(WORK)))
    parts = [expression(rng, depth - 1, most) for _ in range(rng.integers(2, most + 1))]
    return [name, *(token for part, _ in parts for token in part), "]"], WORK[name]([value for _, value in parts])


def batch(n, length, depth, most, seed):
    """(ids (n, length), true lengths (n,), values (n,)); each begins with the class token, and is no longer."""
    rng = np.random.default_rng(seed)
    ids, lengths, values = np.zeros((n, length), np.int64), np.zeros(n, np.int64), np.zeros(n, np.int64)
    row = 0
    while row < n:
        tokens, value = operation(rng, depth, most)
        if len(tokens) < length:
            lengths[row], values[row] = len(tokens) + 1, value
            ids[row, : lengths[row]] = [TOKENS.index(token) for token in ["<class>", *tokens]]
            row += 1
    return torch.from_numpy(ids), torch.from_numpy(lengths), torch.from_numpy(values)


class Exact(torch.autograd.Function):
    """`fastattn.attention` with any of its options that have no gradients."""

    @staticmethod
    def forward(ctx, query, key, value, options):
        arrays = [x.detach().numpy() for x in (query, key, value)]
        ctx.saved, ctx.options = (*arrays, *fa.attention(*arrays, return_lse=True, **options)), options
        return torch.from_numpy(ctx.saved[3])

    @staticmethod
    def backward(ctx, grad):
        g = fa.attention_backward(grad.numpy(), *ctx.saved, **ctx.options)
        return *map(torch.from_numpy, (g.query, g.key, g.value)), None


class Linear(torch.autograd.Function):
    """`fastattn.linear_attention`."""

    @staticmethod
    def forward(ctx, query, key, value, lengths):
        arrays = [x.detach().numpy() for x in (query, key, value)]
        ctx.saved = *arrays, *fa.linear_attention(*arrays, kv_lengths=lengths, return_normalizer=True)
        ctx.lengths = lengths
        return torch.from_numpy(ctx.saved[3])

    @staticmethod
    def backward(ctx, grad):
        g = fa.linear_attention_backward(grad.numpy(), *ctx.saved, kv_lengths=ctx.lengths)
        return *map(torch.from_numpy, (g.query, g.key, g.value)), None


class Merged(torch.autograd.Function):
    """Attention to parts (key, value, mask, lengths, n), where a key stands for n alike, as if to all at once.

    `fastattn.merge_states` puts the parts' results together; `fastattn.attention_backward` of a part with the whole's
    result has the whole's gradients. n alike add log n to the part's lse.
    """

    @staticmethod
    def forward(ctx, query, parts, *keys_and_values):
        arrays = [x.detach().numpy() for x in (query, *keys_and_values)]
        states = [fa.attention(arrays[0], *arrays[2 * p + 1 : 2 * p + 3], return_lse=True, **options)
                  for p, (options, _) in enumerate(parts)]
        whole = fa.merge_states([out for out, _ in states],
                                [lse + lse.dtype.type(np.log(n)) for (_, lse), (_, n) in zip(states, parts)])
        ctx.saved = arrays, parts, whole
        return torch.from_numpy(whole[0])

    @staticmethod
    def backward(ctx, grad):
        (query, *arrays), parts, (out, lse) = ctx.saved
        of_query, rest = 0, []
        for p, (options, n) in enumerate(parts):
            part = query, *arrays[2 * p : 2 * p + 2], out, lse - lse.dtype.type(np.log(n))
            g = fa.attention_backward(grad.numpy(), *part, **options)
            of_query = of_query + g.query
            rest += [g.key, g.value]
        return torch.from_numpy(of_query), None, *map(torch.from_numpy, rest)


@functools.cache
def ladder(length):
    """[(mask, n)]: who sees which means of n keys, from n = 1 up.

    A query sees the keys of its block of BLOCK and of its neighbours; of what lies further away the means, of twice as
    many for each doubling of the distance. The keys of a level are those near in blocks of the next but not in its own.
    """
    count = length // BLOCK
    apart = abs(np.subtract.outer(*[np.arange(count)] * 2))
    levels, n = [(masks.blocks(apart <= 1, BLOCK), 1)], 2
    while count > 2:
        parent = np.arange(count) // 2
        far = (abs(np.subtract.outer(parent, parent)) <= 1) & (apart[:count, :count] > 1)
        levels.append((masks.blocks(far, (length // count, BLOCK // 2)), n))
        count, n = count // 2, 2 * n
    return levels


@functools.cache     # an expression keeps the plans of its lengths
def pattern(kind):
    """The mask of a kind, or None; the class token is global."""
    return {"longformer": masks.longformer(2 * BLOCK, 1), "bigbird": masks.bigbird(BLOCK, random=2)}.get(kind)


def attend(kind, query, key, value, lengths, projection=None):
    """Attention of a kind to the first lengths[b] keys, (B, H, L, D); projection (RANK, L) is Linformer's."""
    if kind == "linear":
        return Linear.apply(query, key, value, lengths.numpy())
    if kind == "linformer":
        there = (torch.arange(key.shape[-2]) < lengths[:, None, None])[:, None].to(key.dtype)      # (B, 1, 1, L)
        combine = projection * there
        return Exact.apply(query, combine @ key, combine @ value, {})
    if kind == "hierarchical":
        there = (torch.arange(key.shape[-2]) < lengths[:, None])[:, None, :, None]
        parts, means = [], []
        for mask, n in ladder(key.shape[-2]):       # the last mean may be of fewer than n; it counts as n
            share = there.unflatten(2, (-1, n)).sum(3).clamp(min=1)
            means += [(x * there).unflatten(2, (-1, n)).sum(3) / share for x in (key, value)]
            parts.append(({"mask": mask, "kv_lengths": -(-lengths.numpy() // n)}, n))
        return Merged.apply(query, parts, *means)
    return Exact.apply(query, key, value, {"mask": pattern(kind), "kv_lengths": lengths.numpy()})


class Layer(nn.Module):
    def __init__(self, kind, width, length):
        super().__init__()
        self.kind = kind
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(),
                                 nn.Linear(2 * width, width))
        if kind == "linformer":
            self.projection = nn.Parameter(torch.randn(RANK, length) / length**0.5)

    def forward(self, x, lengths):
        heads = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = attend(self.kind, *heads, lengths, getattr(self, "projection", None))
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Classifier(nn.Module):
    def __init__(self, kind, length, width=64, layers=2):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(len(TOKENS), width), nn.Embedding(length, width)
        self.layers = nn.ModuleList(Layer(kind, width, length) for _ in range(layers))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, ids, lengths):
        x = self.tokens(ids) + self.positions.weight
        for layer in self.layers:
            x = layer(x, lengths)
        return self.out(x[:, 0])


def train(kind, steps, length, depth, most, rows=32, rate=2e-3, seed=0):
    torch.manual_seed(seed)
    model = Classifier(kind, length)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step in range(steps):
        ids, lengths, values = batch(rows, length, depth, most, [seed, step])
        loss = nn.functional.cross_entropy(model(ids, lengths), values)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def accuracy(model, length, depth, most, rows=1000):
    ids, lengths, values = batch(rows, length, depth, most, 10**6)
    found = [model(*part).argmax(dim=1) for part in zip(ids.split(100), lengths.split(100))]
    return (torch.cat(found) == values).float().mean().item()


def cost(kind, length, size=64, rounds=3):
    """(best seconds, MB of arrays) of attention and its gradients; those that NumPy makes, kept ones included."""
    torch.manual_seed(0)
    heads = [torch.randn(1, HEADS, length, size, requires_grad=True) for _ in range(3)]
    projection = torch.randn(RANK, length) / length**0.5
    lengths, best, peak = torch.tensor([length]), np.inf, 0
    for n in range(rounds + 1):
        if n == 0:          # the first round compiles the mask, and counts bytes
            tracemalloc.start()
        start = perf_counter()
        attend(kind, *heads, lengths, projection).sum().backward()
        if n == 0:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        else:
            best = min(best, perf_counter() - start)
    return best, peak / 1e6


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="short sequences, few steps")
    parser.add_argument("--length", type=int, default=256, help="longest sequence: 16 times a power of two")
    parser.add_argument("--steps", type=int, default=600, help="of training, for each kind")
    args = parser.parse_args(argv)
    if args.length % BLOCK or (args.length // BLOCK).bit_count() != 1:
        parser.error(f"--length must be {BLOCK} times a power of two, got {args.length}")
    task, longs = ((args.length, 6, 5), (2048, 16_384)) if not args.small else ((64, 2, 4), (512,))
    steps = 10 if args.small else args.steps
    _, _, values = batch(1000, *task, 10**6)
    print(f"always the commonest value: {values.bincount().max() / len(values):.1%}")
    print(f"{'attention':>12} {'accuracy':>9} {'training':>9}", *(f"  {f'L = {n}':>11} {'arrays':>9}" for n in longs))
    for kind in KINDS:
        start = perf_counter()
        model = train(kind, steps, *task)
        seconds = perf_counter() - start
        costs = (f"  {1e3 * took:8.2f} ms {megabytes:6.1f} MB" for took, megabytes in (cost(kind, n) for n in longs))
        print(f"{kind:>12} {accuracy(model, *task):9.1%} {seconds:7.1f} s", *costs, flush=True)
    print(f"(weights written out would take {4 * HEADS * longs[-1]**2 / 1e6:.0f} MB, twice with their gradients)")


if __name__ == "__main__":
    main()
