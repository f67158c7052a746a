"""A GPT of characters: trained in torch on Python's own manual, then writing in NumPy from a cache.

The text is that of `help("for")` and its likes, in the standard library (pydoc_data.topics, 0.6 MB). Training goes
through `fastattn.integrations.torch`; generation needs no torch: each new character asks `fastattn.KVCache` for the
keys and values of those before it, and gives the same logits as the whole text at once. Positions are rotary,
`fastattn.positions.rotary` in both.

    python examples/character_gpt.py --prompt "The import statement"
"""

import argparse
from time import perf_counter

import numpy as np
import torch
from torch import nn

import fastattn as fa
from fastattn import positions
from fastattn.integrations import torch as fastattn_torch

HEADS = 4
PAGE = 16       # characters a page of the cache


def text():
    from pydoc_data.topics import topics

    joined = "\n\n".join(topics[name] for name in sorted(topics))
    return "".join(c for c in joined if c == "\n" or 32 <= ord(c) < 127)


def turned(x, cos, sin):
    """`positions.apply_rotary` for tensors (..., L, D), with gradients."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, cos, sin):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)     # (B, H, L, D)
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        mixed = fastattn_torch.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, letters, context=128, width=128, layers=4):
        super().__init__()
        self.letters, self.context = letters, context
        self.embedding = nn.Embedding(len(letters), width)
        for name, table in zip(("cos", "sin"), positions.rotary(context, width // HEADS)):
            self.register_buffer(name, torch.from_numpy(table), persistent=False)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, len(letters))

    def forward(self, ids):
        x, L = self.embedding(ids), ids.shape[1]
        for block in self.blocks:
            x = block(x, self.cos[:L], self.sin[:L])
        return self.out(self.norm(x))


def train(text, steps, batch=8, rate=4e-3, seed=0, report=0, **sizes):
    """A trained GPT; the mean loss of the last steps, each of a new batch, is printed every `report` steps."""
    torch.manual_seed(seed)
    model = GPT(sorted(set(text)), **sizes)
    ids = torch.tensor([model.letters.index(c) for c in text])
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    losses = []
    for step in range(steps):
        first = torch.randint(len(ids) - model.context, (batch, 1))
        rows = ids[first + torch.arange(model.context + 1)]
        loss = nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item() / np.log(2))
        if report and (step + 1) % report == 0:
            print(f"step {step + 1:5}: {np.mean(losses[-report:]):.2f} bits a character", flush=True)
    return model


class Writer:
    """The same model in NumPy, with a cache in which sequence n belongs to layer n."""

    def __init__(self, model):
        self.w = {name: x.detach().numpy() for name, x in model.state_dict().items()}
        self.letters, self.context, self.layers = model.letters, model.context, len(model.blocks)
        pages, size = self.layers * -(-self.context // PAGE), self.w["embedding.weight"].shape[1] // HEADS
        self.cache, self.table = fa.KVCache(pages, PAGE, HEADS, size), positions.rotary(self.context, size)

    def linear(self, x, name):
        return x @ self.w[name + ".weight"].T + self.w[name + ".bias"]

    def norm(self, x, name):
        x = x - x.mean(axis=-1, keepdims=True)
        x /= np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + np.float32(1e-5))
        return x * self.w[name + ".weight"] + self.w[name + ".bias"]

    def logits(self, ids):
        """Logits (len(ids), letters) after each of the characters that follow those before."""
        past = self.cache.lengths([0])[0] if 0 in self.cache else 0
        x = self.w["embedding.weight"][ids]
        for n in range(self.layers):
            qkv = self.linear(self.norm(x, f"blocks.{n}.norm1"), f"blocks.{n}.qkv")
            q, k, v = qkv.reshape(len(ids), 3, HEADS, -1).transpose(1, 2, 0, 3)[:, None]           # (1, H, L, D)
            q, k = (positions.apply_rotary(array, self.table, past) for array in (q, k))
            self.cache.append([n], k, v)
            mixed = self.cache.attend(q, [n], causal=True)
            x = x + self.linear(mixed[0].swapaxes(0, 1).reshape(len(ids), -1), f"blocks.{n}.out")
            inner = np.maximum(self.linear(self.norm(x, f"blocks.{n}.norm2"), f"blocks.{n}.up"), 0)
            x = x + self.linear(inner, f"blocks.{n}.down")
        return self.linear(self.norm(x, "norm"), "out")

    def forget(self):
        self.cache.free([n for n in range(self.layers) if n in self.cache])

    def write(self, prompt, temperature=0.7, seed=0):
        """The prompt and what follows it, up to the context's length."""
        rng = np.random.default_rng(seed)
        self.forget()
        ids = new = [self.letters.index(c) for c in prompt]
        while len(ids) < self.context:
            scores = self.logits(new)[-1].astype(float) / temperature
            chances = np.exp(scores - scores.max())
            new = [int(rng.choice(len(chances), p=chances / chances.sum()))]
            ids = ids + new
        return "".join(self.letters[i] for i in ids)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a smaller model, fewer steps")
    parser.add_argument("--prompt", default="The import statement")
    args = parser.parse_args(argv)
    steps, sizes = (30, {"context": 64, "width": 64, "layers": 2}) if args.small else (1500, {"context": 256})
    model = train(text(), steps, report=steps // 10, **sizes)
    writer = Writer(model)
    start = perf_counter()
    written = writer.write(args.prompt)
    seconds = perf_counter() - start
    print(written)
    print(f"[{(len(written) - len(args.prompt)) / seconds:.0f} characters a second]")
    ids = [model.letters.index(c) for c in written]
    with torch.no_grad():
        whole = model(torch.tensor([ids]))[0].numpy()
    writer.forget()
    one_by_one = np.concatenate([writer.logits([i]) for i in ids])
    print(f"[logits from the cache are within {abs(one_by_one - whole).max():.0e} of those of the whole text at once]")


if __name__ == "__main__":
    main()
