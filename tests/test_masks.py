"""Expressions against definitions written out here pair by pair; attention under every form that a mask can take.

`to_dense` is tested first. From there on the tests of attention may take it for the truth.
"""

import copy
import itertools
import math
import os
import pickle
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from cases import assert_close, bound, exact, generator, inputs
from hypothesis import given
from hypothesis import strategies as st
from layouts import assert_same_bits

import fastattn as fa
from fastattn import masks

NAN, INF = np.nan, np.inf
F32, F64 = np.float32, np.float64

# 1, primes, and the neighbours of 64 rows and 96 keys
SQUARE = [1, 2, 3, 31, 63, 64, 65, 95, 96, 97, 127, 191, 192, 193]
OBLONG = [(1, 2), (1, 193), (3, 64), (63, 65), (64, 97), (65, 191), (96, 127), (97, 192)]
SIZES = [(n, n) for n in SQUARE] + OBLONG + [(S, L) for L, S in OBLONG]
EMPTY_SIZES = [(0, 0), (0, 5), (5, 0), (70, 0), (0, 200)]

both_dtypes = pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])


# --- what a plan says, read as its documentation has it ---

def read(plan):
    """bool (*lead, L, S) of a plan, which must be as small as promised: no tile that nobody sees, no word twice."""
    n_lists, groups = math.prod(plan.lead), -(-plan.L // 64)
    dense = np.zeros((n_lists, plan.L, plan.S), bool)
    assert plan.first.shape == (n_lists * groups + 1,) and plan.first[0] == 0
    assert plan.first[-1] == len(plan.block) == len(plan.word)
    for n, g in itertools.product(range(n_lists), range(groups)):
        rows = range(64 * g, min(64 * g + 64, plan.L))
        tiles = range(plan.first[n * groups + g], plan.first[n * groups + g + 1])
        blocks = [int(plan.block[t]) for t in tiles]
        assert blocks == sorted(set(blocks)), "tiles of a group ascend"
        for t, block in zip(tiles, blocks):
            keys = range(96 * block, min(96 * block + 96, plan.S))
            tile = np.ones((len(rows), len(keys)), bool)
            if plan.word[t] >= 0:
                words = plan.words[plan.word[t]].tolist()
                for r, c in itertools.product(range(len(rows)), range(len(keys))):
                    tile[r, c] = words[c] >> r & 1
                assert tile.any(), "a tile that nobody sees"
                assert not tile.all(), "a tile that all see, with words"
            dense[n, rows.start : rows.stop, keys.start : keys.stop] = tile
    assert len(np.unique(plan.words, axis=0)) == len(plan.words), "equal tiles share their words"
    assert set(plan.word[plan.word >= 0].tolist()) == set(range(len(plan.words))), "words that no tile has"
    return dense.reshape(*plan.lead, plan.L, plan.S)


def told(mask, expected, got):
    """Where two masks differ."""
    where = np.argwhere(expected != got)
    return f"{mask!r} for {expected.shape[-2:]}: {len(where)} of {expected.size} pairs differ, first {where[0]}"


def check(mask, expected, slow=True):
    """The mask is `expected` by its definition and as a plan; `slow`: the plan read bit by bit too."""
    *lead, L, S = expected.shape
    dense = mask.to_dense(L, S)
    assert dense.dtype == bool and dense.shape == (*mask.lead, L, S) == expected.shape
    assert dense.flags.writeable and dense.flags.c_contiguous
    assert (dense == expected).all(), told(mask, expected, dense)
    start, end = mask._runs(L, S)
    assert (start < end).all() and (end[:-1] < start[1:]).all(), f"runs of {mask!r} are empty, overlap or touch"
    plan = mask.compile(L, S)
    compiled = plan.to_dense()
    assert compiled.dtype == bool and compiled.shape == expected.shape
    assert (compiled == expected).all(), "plan of " + told(mask, expected, compiled)
    if slow:
        assert (read(plan) == expected).all(), "tiles of " + told(mask, expected, read(plan))
    assert (plan.L, plan.S, plan.lead, plan.mask) == (L, S, tuple(lead), mask)
    assert plan.visible == expected.sum() and plan.share == expected.sum() / max(1, expected.size)
    assert plan.nbytes == sum(a.nbytes for a in (plan.first, plan.block, plan.word, plan.words))
    assert f"{plan.share:.3%} visible" in repr(plan) and repr(mask) in repr(plan)


def pairs(sees, L, S):
    """bool (L, S) of a function of one query and one key."""
    return np.array([[sees(i, j) for j in range(S)] for i in range(L)], bool).reshape(L, S)


# --- every function ---

def forms(L, S):
    """(mask, its definition) for L queries and S keys."""
    d = S - L  # the last query stands at the last key
    yield masks.causal(), lambda i, j: j <= i + d
    yield masks.causal(0), lambda i, j: j <= i
    yield masks.causal(offset=-2), lambda i, j: j <= i - 2
    yield masks.causal(70), lambda i, j: j <= i + 70
    yield masks.causal(2**60 - 1), lambda i, j: True
    yield masks.causal(1 - 2**60), lambda i, j: False
    yield masks.window(0), lambda i, j: j == i + d
    yield masks.window(5), lambda i, j: i + d - 5 <= j <= i + d + 5
    yield masks.window(70, 3), lambda i, j: i + d - 70 <= j <= i + d + 3
    yield masks.window(None, 2), lambda i, j: j <= i + d + 2
    yield masks.window(2, None), lambda i, j: i + d - 2 <= j
    yield masks.window(None), lambda i, j: True
    yield masks.window(2**70, 2**62), lambda i, j: True
    yield masks.window(2**70, 0, offset=2**60 - 1), lambda i, j: True
    yield masks.window(4, 9, offset=-3), lambda i, j: i - 7 <= j <= i + 6
    yield masks.dilated(2), lambda i, j: j - i - d in (-4, -2, 0, 2, 4)
    yield masks.dilated(30, 1, dilation=5, offset=1), lambda i, j: j - i - 1 in range(-150, 6, 5)
    yield masks.dilated(3, 0, dilation=1), lambda i, j: j - i - d in (-3, -2, -1, 0)
    yield masks.dilated(0, 40, dilation=3), lambda i, j: j - i - d in range(0, 121, 3)
    yield masks.dilated(2**62, dilation=2), lambda i, j: (j - i - d) % 2 == 0
    yield masks.dilated(9, dilation=2**62), lambda i, j: j == i + d
    yield masks.dilated(9, offset=2**60 - 1), lambda i, j: False
    for n in {0, S // 2, S}:
        yield masks.prefix(n), lambda i, j, n=n: j < n
        yield masks.lengths(n), lambda i, j, n=n: j < n
        yield masks.lengths(n, L // 3), lambda i, j, n=n: j < n and i < L // 3
    mine, theirs = [i * i // 40 % 7 for i in range(L)], [j // 20 % 9 for j in range(S)]
    yield masks.documents(mine, theirs), lambda i, j: mine[i] == theirs[j]
    yield masks.documents(np.full(L, -(2**62)), np.full(S, 2**62)), lambda i, j: False
    if L == S:
        yield masks.documents(np.array(theirs, np.uint8)), lambda i, j: theirs[i] == theirs[j]
        yield masks.documents([i % 3 for i in range(L)]), lambda i, j: i % 3 == j % 3
    if S > 2:
        chosen = {0, S // 2, S - 2}
        yield masks.global_tokens(2), lambda i, j: j < 2 or 0 <= i + d < 2
        yield masks.global_tokens(S), lambda i, j: True
        yield masks.global_tokens([S - 2, 0, S // 2, 0]), lambda i, j: j in chosen or i + d in chosen
        yield masks.longformer(8, 1), lambda i, j: abs(j - i - d) <= 4 or j == 0 or i + d == 0
        yield masks.longformer(7, [S // 2]), lambda i, j: abs(j - i - d) <= 3 or S // 2 in (j, i + d)
    yield masks.global_tokens(0), lambda i, j: False
    yield masks.global_tokens(np.zeros(0, int)), lambda i, j: False
    yield masks.blocks(np.ones((L, S), bool), 1), lambda i, j: True
    yield ~masks.causal(), lambda i, j: j > i + d
    yield masks.causal() & masks.window(7), lambda i, j: i + d - 7 <= j <= i + d
    yield masks.prefix(S // 3) | masks.causal(), lambda i, j: j < S // 3 or j <= i + d


@pytest.mark.parametrize("L, S", SIZES + EMPTY_SIZES)
def test_every_function(L, S):
    for mask, sees in forms(L, S):
        check(mask, pairs(sees, L, S), slow=L * S < 7000 or L == S == 193)


def test_lists_of_leading_axes():
    L, S = 70, 100
    kv, q = np.array([[0, 40, 100], [97, 96, 1]]), np.array([70, 0, 64])
    expected = np.array([[[pairs(lambda i, j, n=n, m=m: j < n and i < m, L, S)] for n, m in zip(row, q)] for row in kv])
    check(masks.lengths(kv, q), expected)
    check(masks.lengths(5, q), np.array([[pairs(lambda i, j, m=m: j < 5 and i < m, L, S)] for m in q]))
    check(masks.prefix(kv[:, :1]), np.array([[[pairs(lambda i, j, n=n: j < n, L, S)]] for n in kv[:, 0]]))
    ids, key_ids = np.arange(3 * L).reshape(3, L) // 33, np.arange(S) // 33
    expected = np.array([[pairs(lambda i, j, of=of: of[i] == key_ids[j], L, S)] for of in ids])
    check(masks.documents(ids, key_ids), expected)
    many = np.array([[key_ids], [key_ids + 1]])
    expected = np.array([[[pairs(lambda i, j, of=of, to=to: of[i] == to[j], L, S)] for of in ids] for to in many[:, 0]])
    check(masks.documents(ids, many), expected)
    check(masks.documents(np.zeros((0, L), int), key_ids), np.zeros((0, 1, L, S), bool))
    check(masks.lengths(np.zeros(0, int)), np.zeros((0, 1, L, S), bool))


@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3), (2, 1), (0,)], ids=str)
@pytest.mark.parametrize("size, L, S", [
    (1, 7, 5), ((1, 7), 65, 98), (16, 96, 192), ((5, 3), 65, 192), (64, 192, 64), ((64, 96), 128, 192),
    ((96, 64), 96, 192), (31, 93, 62), ((200, 2), 200, 100), ((2, 200), 100, 200), (5, 0, 10), (5, 10, 0)], ids=str)
def test_blocks(size, L, S, lead, seed):
    rng = generator(seed, size, lead)
    r, c = (size, size) if isinstance(size, int) else size
    for density in 0, 0.4, 1:
        layout = rng.random((*lead, L // r, S // c)) < density
        expected = layout.repeat(r, axis=-2).repeat(c, axis=-1)
        mask = masks.blocks(layout, size)
        layout[...] = ~layout  # the mask has a copy
        check(mask, expected)


@pytest.mark.parametrize("size, keep, L, S", [
    (1, 3, 50, 60), ((16, 8), 0.5, 64, 192), (10, 0, 30, 20), ((5, 2), 1.0, 60, 40), (64, 1, 640, 640),
    ((3, 97), 0.34, 30, 291), (7, 2, 0, 14)], ids=str)
def test_random_blocks(size, keep, L, S):
    """Whole blocks, as many in every band of queries; the seed and nothing else decides which."""
    r, c = (size, size) if isinstance(size, int) else size
    count = keep if isinstance(keep, int) else round(keep * (S // c))
    mask = masks.random_blocks(size, keep, seed=3)
    dense = mask.to_dense(L, S)
    layout = dense[::r, ::c]
    check(mask, layout.repeat(r, axis=0).repeat(c, axis=1))
    assert (layout.sum(axis=1) == count).all()
    assert (masks.random_blocks(size, keep, seed=3).to_dense(L, S) == dense).all()
    if 0 < count < S // c and L // r > 3:
        assert (masks.random_blocks(size, keep, seed=4).to_dense(L, S) != dense).any()
        assert (layout != layout[0]).any()


def test_random_blocks_are_uniform():
    layout = masks.random_blocks(1, 10, seed=1).to_dense(4000, 40)
    share, pair = 10 / 40, 10 / 40 * 9 / 39  # of one key, of two neighbours; 5 standard deviations of 4000 draws
    assert abs(layout.mean(axis=0) - share).max() < 5 * math.sqrt(share * (1 - share) / 4000)
    together = (layout[:, :-1] & layout[:, 1:]).mean(axis=0)
    assert abs(together - pair).max() < 5 * math.sqrt(pair * (1 - pair) / 4000)


def nearest(n, size, dilation):
    """For every coordinate of an axis the set that it sees.

    `size` of its own rest modulo the dilation, itself as near to the middle as the border allows; an even size has one
    more on the left.
    """
    sets = []
    for x in range(n):
        alike = list(range(x % dilation, n, dilation))
        begins = range(len(alike) - size + 1)
        best = min(begins, key=lambda b: abs(b + size // 2 - alike.index(x)))
        sets.append(set(alike[best : best + size]))
    return sets


@pytest.mark.parametrize("shape, size, dilation", [
    (1, 1, 1), (7, 3, 1), (7, 7, 1), (7, 4, 1), (64, 9, 1), (65, 65, 1), (97, 7, 3), (97, 6, 4), (193, 13, 1),
    (193, 3, 64), (23, 2, 11), ((5, 7), 3, 1), ((5, 7), (1, 7), 1), ((8, 12), (5, 3), (1, 3)),
    ((12, 8), (2, 4), (6, 2)), ((1, 9), (1, 3), 1), ((13, 15), 7, 1), ((16, 12), 3, (5, 1)), ((3, 4, 5), 3, 1),
    ((2, 7, 7), (1, 3, 2), (2, 2, 3)), ((4, 6, 8), (3, 3, 5), 1), ((1, 1, 1), 1, 1)], ids=str)
def test_neighborhood(shape, size, dilation):
    grid = shape if isinstance(shape, tuple) else (shape,)
    sizes, dilations = (x if isinstance(x, tuple) else (x,) * len(grid) for x in (size, dilation))
    near = [nearest(*axis) for axis in zip(grid, sizes, dilations)]
    places = list(itertools.product(*map(range, grid)))
    expected = np.array([[all(y in of[x] for of, x, y in zip(near, here, there)) for there in places]
                         for here in places])
    mask = masks.neighborhood(shape, size, dilation)
    check(mask, expected)
    assert (expected.sum(axis=1) == math.prod(sizes)).all() and expected.diagonal().all()


def test_neighborhood_as_in_natten():
    """First key of each token of a line: its own border rules, worked out by hand."""
    def first(*options):
        return masks.neighborhood(*options).to_dense(options[0], options[0]).argmax(axis=1).tolist()

    assert first(8, 3) == [0, 0, 1, 2, 3, 4, 5, 5]
    assert first(8, 5) == [0, 0, 0, 1, 2, 3, 3, 3]
    assert first(8, 4) == [0, 0, 0, 1, 2, 3, 4, 4]
    assert first(9, 3, 2) == [0, 1, 0, 1, 2, 3, 4, 3, 4]
    assert first(10, 3, 3) == [0, 1, 2, 0, 1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize("L, S", [(40, 40), (40, 100), (100, 40), (200, 200), (5, 5)])
def test_bigbird(L, S):
    for random, width, blocks, seed in [(0, 1, 0, 0), (1, 3, 1, 0), (1, 5, 1, 7), (0, 2, 0, 0), (0, 3, 1, 0)]:
        def sees(i, j, near=width // 2, first=range(5 * blocks)):
            return abs(i // 5 + (S - L) // 5 - j // 5) <= near or j in first or i + S - L in first

        expected = pairs(sees, L, S) | masks.random_blocks(5, random, seed).to_dense(L, S)
        check(masks.bigbird(5, random=random, width=width, blocks=blocks, seed=seed), expected)
    assert masks.bigbird().to_dense(640, 640)[300].sum() in range(64 * 4, 64 * 7 + 1, 64)


def test_tiles_are_as_few_as_can_be():
    for mask, tiles, words in [
        (masks.window(None), 3 * 2, 0), (~masks.window(None), 0, 0), (masks.causal(), 1 + 2 + 2, 4),
        (masks.prefix(96), 3, 0), (masks.prefix(97), 6, 1), (masks.lengths(192, 64), 2, 0),
        (masks.lengths(192, 65), 4, 1), (masks.documents(np.arange(192) // 64), 1 + 2 + 1, 4),
        (masks.documents(np.arange(192) // 96), 4, 2), (masks.window(0), 4, 4),
    ]:
        plan = mask.compile(192, 192)
        assert (len(plan.block), len(plan.words)) == (tiles, words), plan
    plan = masks.window(1).compile(192 * 50, 192 * 50)
    assert len(plan.words) <= 16, "tiles repeat along the diagonal"


def test_tiles_of_equal_hash(seed):
    """Two that the sum of products in `_distinct` takes for one, beside many equal ones."""
    rng = generator(seed)
    factor = np.cumprod(np.full(96, 0x9E3779B97F4A7C15, np.uint64))
    mixed = rng.integers(0, 2**64, 96, np.uint64)
    other = mixed.copy()
    other[:2] += factor[1::-1] * np.array([1, 2**64 - 1], np.uint64)  # f1 and -f0
    assert (mixed * factor).sum() == (other * factor).sum()
    tiles = [np.unpackbits((m ^ m >> np.uint64(32)).view(np.uint8).reshape(96, 8), axis=1, bitorder="little").T
             for m in (mixed, other)]
    rows = np.concatenate([tiles[n] for n in (0, 1, 0, 0, 1)]).astype(bool)
    dense = np.concatenate([rows, rows], axis=1)
    check(masks.blocks(dense, 1), dense)
    assert len(masks.blocks(dense, 1).compile(*dense.shape).words) == 2
    # Rows 31 and 63 alone: products of their bits with odd numbers share the low bits.
    for row in 31, 63:
        dense = np.zeros((6400, 96), bool)
        dense[row::64] = rng.random((100, 96)) < 0.5
        assert len(masks.blocks(dense, 1).compile(6400, 96).words) == 100


# --- trees of expressions ---

LEAVES = {
    "causal": lambda rng, L, S: [int(rng.integers(-L - 2, S + 2))],
    "window": lambda rng, L, S: [int(n) for n in (*rng.integers(0, S + 2, 2), rng.integers(-L, S + 1))],
    "dilated": lambda rng, L, S: [int(rng.integers(0, 9)), int(rng.integers(0, 9)), int(rng.integers(1, 40))],
    "prefix": lambda rng, L, S: [rng.integers(0, S + 1, (2,) * int(rng.integers(0, 2)))],
    "lengths": lambda rng, L, S: [rng.integers(0, S + 1, 2), int(rng.integers(0, L + 1))],
    "documents": lambda rng, L, S: [np.sort(rng.integers(0, 5, L)), rng.integers(0, 5, S)],
    "documents of batches": lambda rng, L, S: [rng.integers(0, 3, (2, L)), np.sort(rng.integers(0, 3, S))],
    "global tokens": lambda rng, L, S: [rng.integers(0, S, 3)],
    "blocks": lambda rng, L, S: [rng.random((L, S)) < rng.choice([0.02, 0.5, 0.98])],
    "blocks of heads": lambda rng, L, S: [rng.random((3, L, 1)) < 0.5],
    "blocks of batches": lambda rng, L, S: [rng.random((2, 1, 1, S)) < 0.5],
    "blocks of all": lambda rng, L, S: [rng.random((2, 3, L, S)) < 0.1],
}


def leaf(name, number, L, S):
    """(mask, bool array that broadcasts to its (*lead, L, S)), by whole arrays."""
    values = LEAVES[name](np.random.default_rng(number), L, S)
    i, j = np.arange(L)[:, None], np.arange(S)
    if name == "causal":
        return masks.causal(*values), j - i <= values[0]
    if name == "window":
        left, right, offset = values
        return masks.window(left, right, offset=offset), (j - i - offset >= -left) & (j - i - offset <= right)
    if name == "dilated":
        left, right, dilation = values
        steps = dilation * np.arange(-left, right + 1)
        return masks.dilated(left, right, dilation=dilation), np.isin(j - i - S + L, steps)
    if name == "prefix":
        n = values[0]
        return masks.prefix(n), (j < n[..., None, None, None] if n.ndim else np.tile(j < n, (L, 1)))
    if name == "lengths":
        return masks.lengths(*values), (j < values[0][:, None, None, None]) & (i < values[1])
    if name == "documents":
        return masks.documents(*values), values[0][:, None] == values[1]
    if name == "documents of batches":
        return masks.documents(*values), values[0][:, None, :, None] == values[1]
    if name == "global tokens":
        return masks.global_tokens(*values), np.isin(j, values[0]) | np.isin(i + S - L, values[0])
    layout, = values
    return masks.blocks(layout, (L // layout.shape[-2], S // layout.shape[-1])), layout


@st.composite
def expressions(draw, sizes=tuple(SQUARE), leaves=8):
    """(L, S, a tree): ("causal", number) or ("~", tree) or ("&", tree, tree)"""
    tree = st.recursive(st.tuples(st.sampled_from(list(LEAVES)), st.integers(0, 2**32 - 1)), lambda part: st.one_of(
        st.tuples(st.just("~"), part), st.tuples(st.sampled_from("&|"), part, part)), max_leaves=leaves)
    return draw(st.sampled_from(sizes)), draw(st.sampled_from(sizes)), draw(tree)


def build(tree, L, S):
    """(mask, bool array) of a tree."""
    if tree[0] in LEAVES:
        return leaf(*tree, L, S)
    (mask, dense), *other = (build(part, L, S) for part in tree[1:])
    if not other:
        return ~mask, ~dense
    (mask_2, dense_2), = other
    return (mask & mask_2, dense & dense_2) if tree[0] == "&" else (mask | mask_2, dense | dense_2)


@given(expressions())
def test_trees(case):
    L, S, tree = case
    mask, dense = build(tree, L, S)
    check(mask, np.broadcast_to(dense, (*mask.lead, L, S)).copy(), slow=L * S < 3000)
    if not re.search("blocks|documents", str(tree)):
        assert (eval(repr(mask), dict(vars(masks))).to_dense(L, S) == mask.to_dense(L, S)).all()


# --- text ---

def test_text_is_the_expression():
    for text in [
        "causal()", "causal(offset=3)", "window(5)", "window(5, None)", "window(None, 0, offset=-1)",
        "dilated(3, 3, dilation=2)", "dilated(3, 0, dilation=5, offset=7)", "prefix(4)", "prefix([4, 5])", "lengths(3)",
        "lengths([3, 1], 4)", "lengths([[3, 1]], [4, 5])", "documents([0, 0, 1, 1, 1, 2, 2, 3])",
        "documents([0, 0, 1, 1, 1, 2, 2, 3], [1, 2, 3])",
        "global_tokens(3)", "global_tokens([0, 2, 7])", "random_blocks(4, 2)", "random_blocks((4, 2), 0.5, seed=3)",
        "neighborhood(8, 3)", "neighborhood((2, 4), (1, 3))", "neighborhood((2, 2, 2), 2)",
        "neighborhood((2, 4), 1, dilation=(2, 3))", "longformer(4, 1)", "longformer(4, [3, 5])",
        "bigbird(2, random=1, width=3, blocks=1)", "bigbird(2, random=0, width=1, blocks=0, seed=4)",
        # precedence: ~ before & before |, and all of them from the left
        "~causal()", "~~causal()", "causal() & prefix(4) | window(1)", "causal() | prefix(4) & window(1)",
        "(causal() | prefix(4)) & window(1)", "causal() & (prefix(4) | window(1))", "~(causal() & prefix(4))",
        "~causal() & prefix(4)", "causal() & ~(prefix(4) | window(1))", "causal() | (prefix(4) | window(1))",
        "causal() | prefix(4) | window(1)", "causal() & (prefix(4) & window(1))", "causal() & prefix(4) & window(1)",
        "~longformer(4, 1) & bigbird(2, random=1, width=1, blocks=0)", "~(~causal() | ~(prefix(4) & ~window(1)))",
    ]:
        mask = eval(text, dict(vars(masks)))
        assert repr(mask) == text
        if not mask.lead and "documents" not in text:
            assert (eval(repr(mask), dict(vars(masks))).to_dense(8, 8) == mask.to_dense(8, 8)).all()
    for mask, text in [
        (masks.window(np.int64(3), np.int8(2), offset=np.int32(1)), "window(3, 2, offset=1)"),
        (masks.random_blocks(np.int64(4), np.float64(0.5)), "random_blocks(4, 0.5)"),
        (masks.causal(np.uint8(3)), "causal(offset=3)"), (masks.global_tokens(np.int64(3)), "global_tokens(3)"),
        (masks.bigbird(2, random=np.int64(1), seed=np.int64(4)), "bigbird(2, random=1, width=3, blocks=1, seed=4)"),
        (masks.blocks([[True, False]], 4), "blocks([[ True, False]], 4)"),
        (masks.documents(np.arange(100)), "documents([ 0,  1,  2, ..., 97, 98, 99])"),
    ]:
        assert repr(mask) == text
    assert len(repr(masks.blocks(np.ones((50, 50), bool), 4))) < 400
    assert repr(masks.prefix(0).compile(3, 4)) == "<Plan prefix(0), L=3, S=4: 0 tiles, 0.000% visible>"


def test_drawings_of_the_documentation():
    text = (Path(__file__).parent.parent / "docs" / "masks.md").read_text()
    drawn = 0
    for header, *rows in (block.splitlines() for block in re.findall(r"(?:^    .+\n)+", text, re.MULTILINE)):
        if set(rows[0]) - set("01 "):
            continue
        columns = zip(*(re.split(" {2,}", row.strip()) for row in rows), strict=True)
        for expression, column in zip(re.split(" {2,}", header.strip()), columns, strict=True):
            drawing = np.array([row.split() for row in column]) == "1"
            mask = eval(expression, dict(vars(masks)))
            if "random_blocks" not in expression:  # NumPy does not promise the same numbers in every version
                assert (mask.to_dense(*drawing.shape) == drawing).all(), expression
            drawn += 1
    assert drawn >= 25


# --- arguments that do not fit ---

T, V = TypeError, ValueError
LAYOUT = np.ones((2, 3), bool)

BAD = [
    (lambda: masks.causal(1.5), T, "offset must be an integer, got float"),
    (lambda: masks.causal(True), T, "offset must be an integer, got bool"),
    (lambda: masks.causal(2**60), V, rf"offset must lie in \[-{2**60 - 1}, {2**60 - 1}\], got {2**60}"),
    (lambda: masks.window(1, offset=-(2**70)), V, rf"offset must lie in \[.*\], got -{2**70}"),
    (lambda: masks.window(-1), V, "left must be at least 0, got -1"),
    (lambda: masks.window(3, -2), V, "right must be at least 0, got -2"),
    (lambda: masks.window("a"), T, "left must be an integer, got str"),
    (lambda: masks.window((3, 2)), T, "left must be an integer, got tuple"),
    (lambda: masks.window(1, 2.0), T, "right must be an integer, got float"),
    (lambda: masks.window(np.True_), T, "left must be an integer, got bool.*"),
    (lambda: masks.dilated(None), T, "left must be an integer, got NoneType"),
    (lambda: masks.dilated(-1), V, "left must be at least 0, got -1"),
    (lambda: masks.dilated(1, -5), V, "right must be at least 0, got -5"),
    (lambda: masks.dilated(1, dilation=0), V, "dilation must be at least 1, got 0"),
    (lambda: masks.dilated(1, dilation=2.0), T, "dilation must be an integer, got float"),
    (lambda: masks.prefix(2.0), T, "n must be integers, got float64"),
    (lambda: masks.prefix([True]), T, "n must be integers, got bool"),
    (lambda: masks.prefix(8).compile(5, 7), V, r"n of prefix\(8\) must lie in \[0, 7\], got 8"),
    (lambda: masks.prefix(-1).to_dense(5, 7), V, r"n of prefix\(-1\) must lie in \[0, 7\], got -1"),
    (lambda: masks.lengths("3"), T, "kv_lengths must be integers, got <U1"),
    (lambda: masks.lengths(3, [0.5]), T, "query_lengths must be integers, got float64"),
    (lambda: masks.lengths([1, 2], [1, 2, 3]), V,
     r"query_lengths must have leading axes that broadcast with those of kv_lengths, \(2,\), got \(3,\)"),
    (lambda: masks.lengths([3, 9]).compile(5, 7), V, r"kv_lengths of lengths\(\[3, 9\]\) must lie in \[0, 7\], got 9"),
    (lambda: masks.lengths([3, -9]).to_dense(5, 7), V, r"kv_lengths of lengths\(\[3, -9\]\) must lie in .*, got -9"),
    (lambda: masks.lengths(3, 6).compile(5, 7), V, r"query_lengths of lengths\(3, 6\) must lie in \[0, 5\], got 6"),
    (lambda: masks.documents([0.0, 1.0]), T, "ids must be integers, got float64"),
    (lambda: masks.documents([0], [True]), T, "key_ids must be integers, got bool"),
    (lambda: masks.documents(3), V, r"ids must have an axis of positions, got shape \(\)"),
    (lambda: masks.documents([3], 3), V, r"key_ids must have an axis of positions, got shape \(\)"),
    (lambda: masks.documents(np.zeros((2, 5), int), np.zeros((3, 5), int)), V,
     r"key_ids must have leading axes that broadcast with those of ids, \(2,\), got \(3,\)"),
    (lambda: masks.documents([0, 1]).compile(3, 3), V, "ids of documents must have one id .* 3 positions, got 2"),
    (lambda: masks.documents([0, 1]).compile(2, 5), V, "ids of documents must have one id .* 5 positions, got 2"),
    (lambda: masks.documents([0, 1], [1, 2, 3]).to_dense(2, 5), V,
     "key_ids of documents must have one id for each of 5 positions, got 3"),
    (lambda: masks.documents([0, 1], [1, 2, 3]).to_dense(3, 3), V,
     "ids of documents must have one id for each of 3 positions, got 2"),
    (lambda: masks.global_tokens(-1), V, "tokens must be at least 0, got -1"),
    (lambda: masks.global_tokens(2.5), T, "tokens must be integers, got float64"),
    (lambda: masks.global_tokens(None), T, "tokens must be integers, got object"),
    (lambda: masks.global_tokens([True, False]), T, "tokens must be integers, got bool"),
    (lambda: masks.global_tokens([[1]]), V, r"tokens must be a number .* one axis of indices, got shape \(1, 1\)"),
    (lambda: masks.global_tokens([3, -2]), V, "tokens must be indices of at least 0, got -2"),
    (lambda: masks.global_tokens([7]).compile(7, 7), V,
     r"tokens of global_tokens\(\[7\]\) must lie below the 7 keys, got 7"),
    (lambda: masks.longformer(4, 9).to_dense(7, 7), V, r"tokens of global_tokens\(9\) must .* the 7 keys, got 8"),
    (lambda: masks.longformer(-1, 1), V, "width must be at least 0, got -1"),
    (lambda: masks.blocks(np.ones((2, 3)), 4), T, "layout must be boolean, got float64"),
    (lambda: masks.blocks([True], 4), V, r"layout must have at least 2 axes, got shape \(1,\)"),
    (lambda: masks.blocks(LAYOUT, 0), V, "size must be at least 1, got 0"),
    (lambda: masks.blocks(LAYOUT, (2, 2.0)), T, "size must be an integer, got float"),
    (lambda: masks.blocks(LAYOUT, (1, 2, 3)), V, r"size must be an integer or a pair \(queries, keys\), got 3 values"),
    (lambda: masks.blocks(LAYOUT, 4).compile(8, 13), V,
     r"L and S must be multiples of the blocks of 4 x 4 of blocks\(.*\), got L = 8 and S = 13"),
    (lambda: masks.blocks(LAYOUT, (3, 4)).to_dense(8, 12), V,
     r"L and S must be multiples of the blocks of 3 x 4 of blocks\(.*\), got L = 8 and S = 12"),
    (lambda: masks.blocks(LAYOUT, 4).compile(8, 16), V,
     r"layout of blocks\(.*, 4\) must have 2 x 4 blocks for L = 8 and S = 16, got 2 x 3"),
    (lambda: masks.random_blocks(4, "2"), T, "keep must be a number, got str"),
    (lambda: masks.random_blocks(4, True), T, "keep must be a number, got bool"),
    (lambda: masks.random_blocks(4, -1), V, r"keep must be a number of blocks or a share in \[0, 1\], got -1"),
    (lambda: masks.random_blocks(4, 1.5), V, r"keep must be a number of blocks or a share in \[0, 1\], got 1.5"),
    (lambda: masks.random_blocks(4, NAN), V, r"keep must be a number of blocks or a share in \[0, 1\], got nan"),
    (lambda: masks.random_blocks(4, 2, seed=-1), V, "seed must be at least 0, got -1"),
    (lambda: masks.random_blocks(4, 2, seed=None), T, "seed must be an integer, got NoneType"),
    (lambda: masks.random_blocks(4, 4).compile(8, 12), V, r"keep of .* must be at most the 3 blocks of keys, got 4"),
    (lambda: masks.random_blocks(4, 4).compile(9, 12), V, r"L and S must be multiples of .*, got L = 9 and S = 12"),
    (lambda: masks.bigbird(4, random=4).compile(8, 8), V, r"keep of .* must be at most the 2 blocks of keys, got 4"),
    (lambda: masks.bigbird(4, random=1).compile(6, 8), V, r"L and S must be multiples of .*, got L = 6 and S = 8"),
    (lambda: masks.bigbird(4, random=0.5), T, "random must be an integer, got float"),
    (lambda: masks.bigbird(4, blocks=-1), V, "blocks must be at least 0, got -1"),
    (lambda: masks.neighborhood(8, 9), V, r"size \* dilation must fit into the axis of 8, got 9 \* 1"),
    (lambda: masks.neighborhood((8, 4), 3, 2), V, r"size \* dilation must fit into the axis of 4, got 3 \* 2"),
    (lambda: masks.neighborhood((8, 4), (3, 1, 1)), V, "size must have one number for each of 2 axes, got 3"),
    (lambda: masks.neighborhood((8, 4), 3, (1,)), V, "dilation must have one number for each of 2 axes, got 1"),
    (lambda: masks.neighborhood((1, 2, 3, 4), 1), V, "shape must have 1 to 3 axes, got 4"),
    (lambda: masks.neighborhood((), 1), V, "shape must have 1 to 3 axes, got 0"),
    (lambda: masks.neighborhood(0, 1), V, "shape must be at least 1, got 0"),
    (lambda: masks.neighborhood(8.0, 1), T, "shape must be an integer, got float"),
    (lambda: masks.neighborhood(8, 0), V, "size must be at least 1, got 0"),
    (lambda: masks.neighborhood((4, 4), 3).compile(16, 20), V,
     r"L and S must be the 16 tokens of neighborhood\(\(4, 4\), 3\), got L = 16 and S = 20"),
    (lambda: masks.causal().compile(-1, 3), V, "L must be at least 0, got -1"),
    (lambda: masks.causal().compile(3, 2.0), T, "S must be an integer, got float"),
    (lambda: masks.causal().to_dense("3", 2), T, "L must be an integer, got str"),
    (lambda: masks.lengths([1, 2]) & masks.documents(np.zeros((3, 5), int)), V,
     r"masks must have leading axes that broadcast, got \(2, 1\) of lengths\(\[1, 2\]\) and \(3, 1\) of docum.*"),
    (lambda: masks.causal() & np.ones((3, 3), bool), T, "a mask combines by & with masks, got ndarray; .*"),
    (lambda: np.ones((3, 3), bool) | masks.causal(), T, r"a mask combines by \| with masks, got ndarray; .*"),
    (lambda: np.zeros(0, bool) & masks.causal(), T, "a mask combines by & with masks, got ndarray; .*"),
    (lambda: masks.causal() | True, T, r"a mask combines by \| with masks, got bool; .*"),
    (lambda: None & masks.causal(), T, "a mask combines by & with masks, got NoneType; .*"),
    (lambda: masks.causal() and masks.prefix(3), T, r"a mask has no truth value: combine masks with & \| ~, .*"),
    (lambda: not masks.causal(), T, "a mask has no truth value: .*"),
]


@pytest.mark.parametrize("make, error, message", BAD, ids=[case[2][:50] for case in BAD])
def test_bad_argument(make, error, message):
    with pytest.raises(error) as raised:
        make()
    assert type(raised.value) is error
    assert re.fullmatch(message, str(raised.value)), str(raised.value)


def csr(dense):
    return pytest.importorskip("scipy.sparse").csr_array(dense)


@pytest.mark.parametrize("function", [fa.attention, fa.reference.attention], ids=["attention", "reference"])
@pytest.mark.parametrize("mask, message", [
    (lambda: masks.causal().compile(5, 8), "mask must be a plan for L = 5 and S = 7, got one for L = 5 and S = 8"),
    (lambda: masks.causal().compile(7, 5), "mask must be a plan for L = 5 and S = 7, got one for L = 7 and S = 5"),
    (lambda: csr(np.ones((7, 5))), r"mask must have shape \(5, 7\) as a sparse array, got \(7, 5\)"),
    (lambda: csr(np.ones((1, 7))), r"mask must have shape \(5, 7\) as a sparse array, got \(1, 7\)"),
    (lambda: masks.lengths([1, 2, 3]), r"mask must have leading axes that .* \(..., H\) = \(2, 4\), got \(3, 1\)"),
    (lambda: masks.blocks(np.ones((3, 5, 7), bool), 1), r"mask must have leading axes .* = \(2, 4\), got \(3,\)"),
    (lambda: masks.blocks(np.ones((2, 5, 7), bool), 1).compile(5, 7), r"mask must .* = \(2, 4\), got \(2,\)"),
    (lambda: masks.blocks(np.ones((1, 2, 4, 5, 7), bool), 1), r"mask must .* = \(2, 4\), got \(1, 2, 4\)"),
    (lambda: masks.documents(np.zeros((2, 6), int)), "ids of documents must have one id .* 5 positions, got 6"),
    (lambda: masks.blocks(LAYOUT, 2), "L and S must be multiples .* got L = 5 and S = 7"),
    (lambda: masks.lengths(8), r"kv_lengths of lengths\(8\) must lie in \[0, 7\], got 8"),
    (lambda: masks.neighborhood(5, 3), "L and S must be the 5 tokens of .*, got L = 5 and S = 7"),
], ids=range(12))
def test_mask_that_does_not_fit_the_arrays(mask, message, function):
    q, k, v = inputs(np.random.default_rng(0), (2,), 4, 2, 5, 7, 8, 6)
    with pytest.raises(ValueError, match="^" + message):
        function(q, k, v, mask=mask())


# --- attention: the same bits from every form of a mask ---

B, H, Hkv = 2, 4, 2


def kinds(rng, L, S):
    """Masks by name, for 2 batches and 4 heads."""
    half = np.sort(rng.integers(0, 4, L)), np.sort(rng.integers(0, 4, S))
    some = {
        "causal": masks.causal(),
        "window": masks.window(100, 20),
        "narrow window": masks.window(3, 2),
        "dilated": masks.dilated(20, 7, dilation=5),
        "prefix LM": masks.prefix(S // 3) | masks.causal(),
        "prefix of batches": masks.prefix([S // 3, 0]),
        "documents": masks.documents(*half),
        "documents of batches": masks.documents(rng.integers(0, 3, (2, L)), np.sort(rng.integers(0, 3, (2, S)))),
        "lengths": masks.lengths([S, S // 3], [L - L // 7, L]),
        "global tokens": masks.global_tokens([0, S // 2, S - 1]),
        "blocks of single pairs": masks.blocks(rng.random((L, S)) < 0.3, 1),
        "blocks of heads": masks.blocks(rng.random((4, L // 2, S // 3)) < 0.4, (2, 3)),
        "blocks of batches": masks.blocks(rng.random((2, 1, L // 2, S // 3)) < 0.4, (2, 3)),
        "blocks of all": masks.blocks(rng.random((2, 4, L, S)) < 0.02, 1),
        "random blocks": masks.random_blocks((2, 3), 0.3),
        "longformer": masks.longformer(S // 5, 2),
        "bigbird": masks.bigbird(2, random=2),
        "expression": ~masks.window(5) & (masks.causal() | masks.documents(*half)),
        "lists of both": masks.lengths([S // 2, S]) & ~masks.blocks(rng.random((4, 1, S)) < 0.2, (L, 1)),
        "full": masks.window(None),
        "empty": ~masks.window(None),
    }
    if L == S == 150:
        some["neighborhood"] = masks.neighborhood((10, 15), (5, 4))
        some["dilated neighborhood"] = masks.neighborhood((5, 6, 5), (3, 2, 5), (1, 3, 1))
    return some


def names_of_kinds(L, S):
    return list(kinds(np.random.default_rng(0), L, S))


each_kind = pytest.mark.parametrize("kind", names_of_kinds(150, 150))


def kind_of(seed, kind, L, S):
    return kinds(generator(seed, L, S), L, S)[kind]


def arrays_of(rng, dtype, L, S):
    """Ordinary queries among some whose scores are large: rows of a tile whose running maximum rises at other keys."""
    q, k, v = inputs(rng, (B,), H, Hkv, L, S, 12, 10, dtype)
    q[..., ::7, :] *= 30
    k[..., S // 2 :, :] *= 2
    return q, k, v


def options_with(rng, dtype, L, S):
    bias = rng.standard_normal((B, H, L, S)).astype(dtype)
    bias[rng.random(bias.shape) < 0.2] = -INF
    sinks = rng.standard_normal(H).astype(dtype)
    offset = np.array([S - L, (S - L) // 2])
    return {
        "none": {},
        "causal": {"causal": True, "query_offset": offset},
        "window": {"window": (60, 20), "query_offset": offset},
        "lengths": {"kv_lengths": [S, S // 2], "query_lengths": [L // 2, L]},
        "softcap": {"softcap": 4.0},
        "bias": {"bias": bias},
        "sinks": {"sinks": sinks},
        "all": {"bias": bias, "causal": True, "window": 90, "query_offset": offset, "kv_lengths": [S - S // 4, S],
                "softcap": 20.0, "sinks": sinks, "scale": 0.4},
    }


def assert_same(result, expected, context):
    for name, got, wanted in zip(("out", "lse"), result, expected):
        assert_same_bits(got, wanted, {**context, "result": name})


@both_dtypes
@pytest.mark.parametrize("L, S, kind", [
    (L, S, kind) for L, S in [(150, 150), (150, 300), (64, 192), (130, 42), (18, 102), (2, 300)]
    for kind in names_of_kinds(L, S)])
def test_every_form_of_a_mask_gives_the_same_bits(kind, L, S, dtype, seed):
    mask = kind_of(seed, kind, L, S)
    rng = generator(seed, kind, L, S)
    arrays = arrays_of(rng, dtype, L, S)
    dense = mask.to_dense(L, S)
    plan = mask.compile(L, S)
    # A plan without its definition: the reference reads the tiles too.
    bare = copy.copy(plan)
    bare.mask = None
    forms = [("expression", mask, 1), ("expression", mask, 2), ("plan", plan, None), ("bare plan", bare, None)]
    if not mask.lead:
        forms.append(("sparse", csr(dense), None))
    options = options_with(rng, dtype, L, S)
    if fa.isa() == "reference":
        forms, options = forms[1:], {"all": options["all"]}
    elif (L, S) != (150, 300):
        options = {name: options[name] for name in ("none", "all")}
    for name, more in options.items():
        expected = fa.attention(*arrays, mask=dense, return_lse=True, **more)
        assert not np.isnan(expected[0]).any()
        for form, given_mask, threads in forms:
            result = fa.attention(*arrays, mask=given_mask, return_lse=True, num_threads=threads, **more)
            assert_same(result, expected, {"mask": mask, "form": form, "threads": threads, "options": name,
                                           "dtype": np.dtype(dtype), "L, S": (L, S), "seed": seed})


def test_the_comparison_of_forms_sees_one_pair(seed):
    """A pair more or less in the plan shows in its row."""
    L, S = 150, 300
    arrays = arrays_of(generator(seed), F32, L, S)
    mask = masks.window(60, 20)
    dense = mask.to_dense(L, S)
    for i, j in [(1, 150), (62, 200), (148, 299)]:
        wrong = dense.copy()
        wrong[i, j] ^= True
        rows = fa.attention(*arrays, mask=mask) != fa.attention(*arrays, mask=csr(wrong))
        assert rows[:, :, i].any() and not np.delete(rows, i, axis=2).any()


@both_dtypes
@pytest.mark.parametrize("mask, options", [
    (lambda L, S: masks.causal(), {"causal": True}),
    (lambda L, S: masks.causal(5), {"causal": True, "query_offset": 5}),
    (lambda L, S: masks.window(50, 7), {"window": (50, 7)}),
    (lambda L, S: masks.window(None, 3, offset=4), {"window": (None, 3), "query_offset": 4}),
    (lambda L, S: masks.causal() & masks.window(9), {"causal": True, "window": 9}),
    (lambda L, S: masks.lengths([S, 97]), {"kv_lengths": [300, 97]}),
    (lambda L, S: masks.lengths(S, [L, 17]), {"query_lengths": [150, 17]}),
    (lambda L, S: masks.causal() & masks.lengths([S, 170]),
     {"causal": True, "kv_lengths": [300, 170], "query_offset": 150}),
], ids=range(8))
def test_expression_or_option(mask, options, dtype, seed):
    L, S = 150, 300
    arrays = arrays_of(generator(seed), dtype, L, S)
    mask = mask(L, S)
    path = {"deterministic": "row"} if "query_lengths" in options else {}  # a mask leaves the number of rows as it is
    expected = fa.attention(*arrays, return_lse=True, **options, **path)
    assert_same(fa.attention(*arrays, mask=mask, return_lse=True), expected, {"mask": mask, "options": options})
    both = fa.attention(*arrays, mask=mask, return_lse=True, **options, **path)
    assert_same(both, expected, {"mask": mask, "both": options})


@pytest.mark.filterwarnings("ignore:Constructing a DIA matrix")
def test_sparse_arrays_of_every_format(seed):
    """Nonzero entries are visible, whatever the format and dtype; entries that are stored and 0 are not."""
    sparse = pytest.importorskip("scipy.sparse")
    L, S = 70, 130
    rng = generator(seed)
    arrays = arrays_of(rng, F32, L, S)
    dense = rng.random((L, S)) < 0.1
    expected = fa.attention(*arrays, mask=dense, return_lse=True)
    rows, keys = np.nonzero(dense)
    order = rng.permutation(len(rows))
    rows, keys = rows[order], keys[order]
    unsorted = sparse.csr_array(dense.astype(float))
    unsorted.indices[:] = np.concatenate([row[::-1] for row in np.split(unsorted.indices, unsorted.indptr[1:-1])])
    unsorted.has_sorted_indices = unsorted.has_canonical_format = False
    twice = sparse.coo_array((np.ones(2 * len(rows)), (np.tile(rows, 2), np.tile(keys, 2))), (L, S))
    csr_twice = sparse.csr_array((np.ones(2 * dense.sum()), np.repeat(np.nonzero(dense)[1], 2),
                                  np.append(0, 2 * dense.sum(axis=1).cumsum())), (L, S))
    cancelled = sparse.csr_array((np.tile([1, -1], len(rows)), csr_twice.indices, csr_twice.indptr), (L, S))
    assert masks.plan_of_sparse(cancelled).visible == 0
    every = np.arange(L * S)
    stored_zeros = sparse.coo_array((dense.ravel().astype(np.int8), (every // S, every % S)), (L, S))
    nans = sparse.csr_array(np.where(dense, NAN, 0))
    for name, array in {
        **{f: sparse.csr_array(dense).asformat(f) for f in ("csr", "csc", "lil", "dok", "dia", "bsr")},
        "coordinates": sparse.coo_array(dense),
        **{str(np.dtype(t)): sparse.csr_array(dense.astype(t)) for t in (np.int8, np.uint64, F32, np.complex128)},
        "matrix": sparse.csr_matrix(dense), "unsorted": unsorted, "twice": twice, "twice in csr": csr_twice,
        "stored zeros": stored_zeros,
        "NaN": nans,
    }.items():
        before = copy.deepcopy(array)
        assert_same(fa.attention(*arrays, mask=array, return_lse=True), expected, {"sparse": name, "seed": seed})
        assert (masks.plan_of_sparse(array).to_dense() == dense).all(), name
        assert array.nnz == before.nnz and array.format == before.format, "the mask was modified"
        if array.format == "csr":
            assert (array.indices == before.indices).all()
    for shape in (0, S), (L, 0), (0, 0):
        empty = masks.plan_of_sparse(sparse.csr_array(shape, dtype=bool))
        assert empty.visible == 0 and empty.to_dense().shape == shape


@pytest.mark.parametrize("L, S", EMPTY_SIZES)
def test_sizes_of_zero(L, S):
    q, k, v = inputs(np.random.default_rng(0), (2,), 4, 2, L, S, 3, 5)
    for mask in (masks.causal(), ~masks.causal(), masks.window(3), masks.lengths([S, 0]), masks.global_tokens(0),
                 masks.documents(np.zeros((2, L), int), np.zeros(S, int)), masks.blocks(np.ones((4, L, S), bool), 1)):
        for form in mask, mask.compile(L, S), mask.to_dense(L, S):
            out, lse = fa.attention(q, k, v, mask=form, return_lse=True)
            assert out.shape == (2, 4, L, 5) and (out == 0).all() and lse.shape == (2, 4, L) and (lse == -INF).all()
    nobody = np.zeros((0, 4, L, 3), F32), np.zeros((0, 2, S, 3), F32), np.zeros((0, 2, S, 5), F32)
    assert fa.attention(*nobody, mask=masks.lengths(np.zeros(0, int))).shape == (0, 4, L, 5)


def test_leading_axes(seed):
    """Lists lie on the last axes; those of 1 and those that are missing are for all."""
    lead, L, S = (2, 3), 65, 100
    rng = generator(seed)
    q, k, v = inputs(rng, lead, 4, 2, L, S, 4, 3)
    for axes in [(), (4,), (1,), (3, 1), (3, 4), (1, 4), (2, 3, 4), (2, 1, 1), (2, 1, 4), (1, 3, 1), (2, 3, 1),
                 (1, 1, 1)]:
        layout = rng.random((*axes, L, S)) < 0.3
        expected = fa.attention(q, k, v, mask=layout, return_lse=True)
        mask = masks.blocks(layout, 1)
        for form in mask, mask.compile(L, S), mask & masks.window(None):
            assert_same(fa.attention(q, k, v, mask=form, return_lse=True), expected, {"lead": axes, "seed": seed})
            part = fa.reference.attention(q, k, v, mask=form)
            assert_close(part, expected[0], bound(q, k, v, mask=layout).out * 2, {"lead": axes, "seed": seed})
    for form in masks.lengths(rng.integers(0, S + 1, (2, 3))), masks.documents(rng.integers(0, 3, (3, L)),
                                                                               rng.integers(0, 3, (2, 1, S))):
        expected = fa.attention(q, k, v, mask=form.to_dense(L, S), return_lse=True)
        assert_same(fa.attention(q, k, v, mask=form, return_lse=True), expected, {"mask": form, "seed": seed})
    # Axes of query that are 1, and arrays without batch or heads.
    mask = masks.blocks(rng.random((2, 1, L, S)) < 0.3, 1)
    for arrays in [(q[:1, 0], k[:, 0], v[:, 0]), (q[:, 0], k[:1, 0], v[:1, 0])]:
        expected = fa.attention(*arrays, mask=mask.to_dense(L, S), return_lse=True)
        assert_same(fa.attention(*arrays, mask=mask, return_lse=True), expected, {"mask": mask, "seed": seed})
    mask = masks.blocks(rng.random((4, L, S)) < 0.3, 1)
    expected = fa.attention(q[0, 0], k[0, 0], v[0, 0], mask=mask.to_dense(L, S))
    assert_same_bits(fa.attention(q[0, 0], k[0, 0], v[0, 0], mask=mask), expected, {"axes": 3})
    mask = masks.causal()
    expected = fa.attention(q[0, 0, 0], k[0, 0, 0], v[0, 0, 0], causal=True)
    assert_same_bits(fa.attention(q[0, 0, 0], k[0, 0, 0], v[0, 0, 0], mask=mask), expected, {"axes": 2})


# --- attention against the exact result ---

@given(expressions((1, 2, 7, 16, 33, 63, 64, 65, 97, 130), leaves=4), st.data())
def test_attention_is_within_its_bound(case, data):
    L, S, tree = case
    mask, dense = build(tree, L, S)
    dense = np.broadcast_to(dense, (*mask.lead, L, S))
    dtype = data.draw(st.sampled_from([F32, F64]))
    Hkv = data.draw(st.sampled_from([1, 3]))
    D, Dv = data.draw(st.sampled_from([(1, 1), (8, 8), (17, 3)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    arrays = inputs(rng, (2,), 3, Hkv, L, S, D, Dv, dtype)
    choices = {
        "causal": True, "window": (S // 2, 3), "query_offset": int(rng.integers(-L, S + 1)),
        "kv_lengths": rng.integers(0, S + 1, 2), "query_lengths": rng.integers(0, L + 1, 2),
        "softcap": 3.0, "scale": 2.0,
        "bias": np.where(rng.random((3, L, S)) < 0.2, -INF, rng.standard_normal((3, L, S))).astype(dtype),
        "sinks": rng.standard_normal(3).astype(dtype),
    }
    names = data.draw(st.lists(st.sampled_from(sorted(choices)), unique=True, max_size=4))
    options = {name: choices[name] for name in names}
    form = data.draw(st.sampled_from([mask, mask.compile(L, S)]))
    threads = data.draw(st.sampled_from([1, 2]))
    out, lse = fa.attention(*arrays, mask=form, return_lse=True, num_threads=threads, **options)
    true, true_lse = exact(*arrays, mask=dense, **options)
    allowed = bound(*arrays, mask=dense, **options)
    context = {"mask": mask, "options": options, "dtype": np.dtype(dtype), "shapes": [a.shape for a in arrays]}
    assert_close(out, true, allowed.out, context)
    assert_close(lse, true_lse, allowed.lse, {**context, "result": "lse"})


# --- rows that see no key ---

EMPTY_ROWS = [[0], [7], [15], [16], [31, 32], [63], [64], [127], [128], [149], [0, 75, 149], range(16), range(16, 32),
              range(60, 70), range(64), range(64, 128), range(128, 150), range(1, 149), range(150)]


def only_rows(rows, L, S):
    """A mask that shows these rows all keys, and the others none."""
    ids = np.zeros(L, int)
    ids[list(rows)] = 1
    return masks.documents(ids, np.ones(S, int))


@both_dtypes
@each_kind
def test_empty_rows(kind, dtype, seed):
    """At every place of a tile: out 0, lse -inf or the sink; the other rows keep their bits."""
    L = S = 150
    mask = kind_of(seed, kind, L, S)
    rng = generator(seed, kind)
    q, k, v = arrays_of(rng, dtype, L, S)
    sinks = rng.standard_normal(H).astype(dtype)
    clean = {with_sinks: fa.attention(q, k, v, mask=mask, return_lse=True, **({"sinks": sinks} if with_sinks else {}))
             for with_sinks in (False, True)}
    for rows in EMPTY_ROWS:
        emptied = mask & ~only_rows(rows, L, S)
        dense = np.broadcast_to(emptied.to_dense(L, S), (B, H, L, S))
        empty = ~dense.any(axis=-1)
        assert empty[..., list(rows)].all()
        poisoned = q.copy()
        poisoned[empty] = NAN
        kept = np.delete(np.arange(L), list(rows))
        for with_sinks in (False, True):
            options = {"sinks": sinks} if with_sinks else {}
            context = {"mask": emptied, "rows": rows, "sinks": with_sinks, "dtype": np.dtype(dtype), "seed": seed}
            out, lse = fa.attention(poisoned, k, v, mask=emptied, return_lse=True, **options)
            assert (out[empty] == 0).all(), context
            assert (lse == np.where(empty, sinks[:, None] if with_sinks else -INF, lse)).all(), context
            assert np.isfinite(out[~empty]).all() and np.isfinite(lse[~empty]).all(), context
            assert_same((out[:, :, kept], lse[:, :, kept]), [x[:, :, kept] for x in clean[with_sinks]], context)


@both_dtypes
@pytest.mark.parametrize("make, empty", [
    (lambda n, L, S: masks.causal(-n), range),
    (lambda n, L, S: masks.window(None, 0, offset=-n), range),
    (lambda n, L, S: masks.window(0, offset=-n), range),
    (lambda n, L, S: masks.dilated(0, 3, dilation=1, offset=-n - 3), range),
    (lambda n, L, S: masks.window(3, None, offset=S - L + n + 3), lambda n, L: range(L - n, L)),
    (lambda n, L, S: masks.lengths(S, L - n), lambda n, L: range(L - n, L)),
    (lambda n, L, S: masks.lengths(0, L - n), lambda n, L: range(L)),
    (lambda n, L, S: masks.prefix(0), lambda n, L: range(L)),
    (lambda n, L, S: ~masks.causal(S - n), lambda n, L: range(n - 1, L)),
    (lambda n, L, S: masks.documents((np.arange(L) < n).astype(int), np.zeros(S, int)), range),
    (lambda n, L, S: masks.blocks((np.arange(L) >= n)[:, None], (1, S)), range),
    (lambda n, L, S: csr((np.arange(L) >= n)[:, None] & (np.arange(S) % 3 == 0)), range),
    (lambda n, L, S: ~masks.random_blocks((L, S), 1), lambda n, L: range(L)),
    (lambda n, L, S: ~masks.global_tokens(S), lambda n, L: range(L)),
], ids=range(14))
def test_empty_rows_of_the_masks_themselves(make, empty, dtype, seed):
    L, S = 150, 160
    q, k, v = inputs(generator(seed), (), 2, 1, L, S, 5, 4, dtype)
    for n in 1, 8, 15, 16, 17, 33, 63, 64, 65, 127, 128, 149, 150:
        mask = make(n, L, S)
        rows = np.zeros(L, bool)
        rows[list(empty(n) if empty is range else empty(n, L))] = True
        poisoned = q.copy()
        poisoned[:, rows] = NAN
        out, lse = fa.attention(poisoned, k, v, mask=mask, return_lse=True)
        assert (out[:, rows] == 0).all() and (lse[:, rows] == -INF).all(), (n, mask)
        out, lse = out[:, ~rows], lse[:, ~rows]
        assert (out != 0).all() and np.isfinite(out).all() and np.isfinite(lse).all(), (n, mask)


# --- NaN and Inf ---

@both_dtypes
@each_kind
def test_hidden_nan_and_inf_change_no_bit(kind, dtype, seed):
    """In keys and values, each key in turn: rows that do not see it keep their bits, the others show it."""
    L = S = 150
    mask = kind_of(seed, kind, L, S)
    q, k, v = arrays_of(generator(seed, kind), dtype, L, S)
    dense = np.broadcast_to(mask.to_dense(L, S), (B, H, L, S))
    clean = fa.attention(q, k, v, mask=mask, return_lse=True)
    for j in [0, 15, 16, 63, 64, 95, 96, 148, 149]:
        seen = dense[..., j]
        for name, bad in itertools.product(("key", "value"), (NAN, INF)):
            key, value = k.copy(), v.copy()
            {"key": key, "value": value}[name][:, :, j] = bad
            out, lse = fa.attention(q, key, value, mask=mask, return_lse=True)
            context = {"mask": mask, "in": name, "key": j, "poison": bad, "dtype": np.dtype(dtype), "seed": seed}
            assert_same((out[~seen], lse[~seen]), (clean[0][~seen], clean[1][~seen]), context)
            if name == "key" and np.isnan(bad):
                assert np.isnan(out[seen]).all() and np.isnan(lse[seen]).all(), context
            if name == "value":
                assert not np.isfinite(out[seen]).any(), context
                assert_same_bits(lse, clean[1], context)


@both_dtypes
@each_kind
def test_hidden_nan_and_inf_in_bias_and_query_change_no_bit(kind, dtype, seed):
    L = S = 150
    mask = kind_of(seed, kind, L, S)
    rng = generator(seed, kind)
    q, k, v = arrays_of(rng, dtype, L, S)
    bias = rng.standard_normal((B, H, L, S)).astype(dtype)
    dense = np.broadcast_to(mask.to_dense(L, S), (B, H, L, S))
    clean = fa.attention(q, k, v, mask=mask, bias=bias, return_lse=True)
    for bad in NAN, INF, -INF:
        context = {"mask": mask, "poison": bad, "dtype": np.dtype(dtype), "seed": seed}
        poisoned, query = bias.copy(), q.copy()
        poisoned[~dense] = bad
        query[~dense.any(axis=-1)] = bad
        assert_same(fa.attention(query, k, v, mask=mask, bias=poisoned, return_lse=True), clean, context)
        if dense.any() and bad != -INF:
            at = tuple(rng.choice(np.argwhere(dense)))
            poisoned = bias.copy()
            poisoned[at] = bad
            out, lse = fa.attention(q, k, v, mask=mask, bias=poisoned, return_lse=True)
            assert np.isnan(out[at[:3]]).all() and not np.isfinite(lse[at[:3]]), {**context, "seen at": at}
            others = np.ones((B, H, L), bool)
            others[at[:3]] = False
            assert_same((out[others], lse[others]), (clean[0][others], clean[1][others]), context)


# --- bits of a row ---

@pytest.mark.compiled  # NumPy's matrix product makes no such promise
@both_dtypes
@each_kind
def test_other_rows_change_no_bit(kind, dtype, seed):
    """Every fifth row keeps its mask and its bits, whatever the others see; and alone."""
    L = S = 150
    mask = kind_of(seed, kind, L, S)
    rng = generator(seed, kind)
    q, k, v = arrays_of(rng, dtype, L, S)
    out, lse = fa.attention(q, k, v, mask=mask, return_lse=True)
    kept = np.arange(2, L, 5)
    ours = only_rows(kept, L, S)
    for others in [masks.window(None), ~masks.window(None), ~mask, masks.causal(0),
                   masks.blocks(rng.random((L, S)) < 0.5, 1)]:
        result = fa.attention(q, k, v, mask=mask & ours | others & ~ours, return_lse=True)
        assert_same([x[:, :, kept] for x in result], (out[:, :, kept], lse[:, :, kept]),
                    {"mask": mask, "others": others, "dtype": np.dtype(dtype), "seed": seed})
    dense = np.broadcast_to(mask.to_dense(L, S), (B, H, L, S))
    for i in 0, 31, 63, 64, 149:
        row = masks.blocks(dense[:, :, i : i + 1], 1)
        result = fa.attention(q[:, :, i : i + 1], k, v, mask=row, deterministic="row", return_lse=True)
        assert_same(result, (out[:, :, i : i + 1], lse[:, :, i : i + 1]), {"mask": mask, "row": i, "seed": seed})


def padded(L, S, n):
    """(mask for S keys, the same for n keys more)"""
    rng = np.random.default_rng(S)
    d, ids, key_ids = S - L, rng.integers(0, 3, L), rng.integers(0, 3, S)
    layout = rng.random((4, L, S)) < 0.3
    shorter = masks.lengths(S)
    yield masks.causal(), masks.causal(d) & shorter
    yield masks.window(40, 9), masks.window(40, 9, offset=d) & shorter
    yield masks.dilated(30, 4, dilation=3), masks.dilated(30, 4, dilation=3, offset=d) & shorter
    yield masks.window(None), shorter
    yield masks.prefix(100), masks.prefix(100)
    yield masks.lengths([S, 70]), masks.lengths([S, 70])
    yield masks.documents(ids, key_ids), masks.documents(ids, np.append(key_ids, np.full(n, -1)))
    yield masks.blocks(layout, 1), masks.blocks(np.append(layout, np.zeros((4, L, n), bool), axis=2), 1)
    yield ~masks.window(3), ~masks.window(3, offset=d) & shorter
    yield csr(layout[0]), csr(np.append(layout[0], np.zeros((L, n), bool), axis=1))


@pytest.mark.compiled
@both_dtypes
@pytest.mark.parametrize("filling", [0, NAN])
def test_masked_padding_changes_no_bit(filling, dtype, seed):
    L, S = 150, 180
    q, k, v = arrays_of(generator(seed), dtype, L, S)
    for n in 1, 12, 95, 96, 97, 200:
        rest = np.full((B, Hkv, n, 12), filling, dtype)
        longer = np.append(k, rest, axis=2), np.append(v, rest[..., :10], axis=2)
        for mask, mask_padded in padded(L, S, n):
            expected = fa.attention(q, k, v, mask=mask, return_lse=True)
            result = fa.attention(q, *longer, mask=mask_padded, return_lse=True)
            context = {"mask": mask, "n": n, "filling": filling, "dtype": np.dtype(dtype), "seed": seed}
            assert_same(result, expected, context)


# --- plans ---

def test_rows_and_heads_of_a_plan(seed):
    """`take` keeps their order, from the definition and from the tiles."""
    L, S = 150, 180
    for name, mask in kinds(generator(seed), L, S).items():
        plan, dense = mask.compile(L, S), mask.to_dense(L, S)
        bare = copy.copy(plan)
        bare.mask = None
        for rows, heads in [(None, None), (np.array([3, 149, 64, 63, 64]), None), (None, np.array([2, 0])),
                            (np.arange(70), np.array([3, 3, 1])), (np.zeros(0, int), np.array([0]))]:
            expected = dense if rows is None else dense[..., rows, :]
            if heads is not None and mask.lead and mask.lead[-1] != 1:
                expected = expected[..., heads, :, :]
            for source in plan, bare:
                part = source.take(rows, heads)
                assert (*part.lead, part.L, part.S) == expected.shape, name
                assert (part.to_dense() == expected).all() and part.visible == expected.sum(), name


def test_stacked_plans(seed):
    """Of packed sequences: a list each, as long as the longest."""
    mask = masks.window(20, 3) | masks.prefix(1)
    sizes = [(150, 100), (0, 5), (64, 192), (1, 1), (70, 97)]
    stacked = masks.Plan.stack([mask.compile(L, S) for L, S in sizes], mask)
    assert (stacked.L, stacked.S, stacked.lead) == (150, 192, (5, 1))
    assert stacked.visible == sum(mask.compile(L, S).visible for L, S in sizes)
    for n, (L, S) in enumerate(sizes):
        one, groups = mask.compile(L, S), -(-150 // 64)
        first = stacked.first[n * groups : (n + 1) * groups + 1]
        assert (np.diff(first)[: -(-L // 64)] == np.diff(one.first)).all() and first[-1] - first[0] == len(one.block)
        tiles = slice(first[0], first[-1])
        assert (stacked.block[tiles] == one.block).all()
        full = stacked.word[tiles] < 0
        assert (full == (one.word < 0)).all()
        assert (stacked.words[stacked.word[tiles][~full]] == one.words[one.word[~full]]).all()
    with pytest.raises(ValueError, match=r"mask must have no leading axes for packed sequences, got \(2, 1\)"):
        masks.Plan.stack([masks.lengths([1, 2]).compile(3, 3)])


def test_plans_are_kept():
    mask = masks.causal() & masks.window(5)
    plan = mask.compile(70, 100)
    assert mask.compile(np.int64(70), 100) is plan and mask.compile(100, 70) is not plan
    for n in range(masks.KEPT_PLANS - 2):
        mask.compile(1, n)
    assert mask.compile(70, 100) is plan, "the last few plans are kept"
    mask.compile(2, 2)
    assert mask.compile(70, 100) is not plan, "the oldest plan goes"
    for name in "first", "block", "word", "words":
        with pytest.raises(ValueError, match="read-only"):
            getattr(plan, name)[...] = 0


def test_masks_do_not_change_with_the_callers_arrays():
    ids, lengths, layout, tokens = np.zeros(5, int), np.array([3, 4]), np.ones((5, 5), bool), np.array([1, 2])
    made = [masks.documents(ids), masks.documents(ids, ids), masks.lengths(lengths), masks.prefix(lengths),
            masks.blocks(layout, 1), masks.global_tokens(tokens)]
    before = [mask.to_dense(5, 5) for mask in made]
    ids[2:], lengths[:], layout[0], tokens[:] = 1, 0, False, 0
    for mask, dense in zip(made, before):
        assert (mask.to_dense(5, 5) == dense).all() and (mask.compile(5, 5).to_dense() == dense).all()
        dense[...] = False
        assert mask.to_dense(5, 5).any()


def test_copies_and_pickles():
    for mask in [masks.causal(), ~masks.lengths([1, 2]) | masks.neighborhood((2, 3), 2), masks.bigbird(2, random=1)]:
        plan = mask.compile(6, 6)
        for twin in copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask)):
            assert repr(twin) == repr(mask) and twin.lead == mask.lead
            assert (twin.to_dense(6, 6) == mask.to_dense(6, 6)).all() and (twin.compile(6, 6).words == plan.words).all()
        twin = pickle.loads(pickle.dumps(plan))
        assert (twin.to_dense() == plan.to_dense()).all() and repr(twin) == repr(plan)
        q = np.ones((2, 1, 6, 3))
        assert_same_bits(fa.attention(q, q, q, mask=twin), fa.attention(q, q, q, mask=plan), {"mask": mask})


def test_many_threads_share_a_mask(seed):
    """One expression, more sizes than it keeps plans of, from several threads."""
    sizes = [(20 + n, 90 + 3 * n) for n in range(masks.KEPT_PLANS + 4)]
    mask = masks.window(30, 4) | masks.global_tokens(3)
    arrays = {(L, S): inputs(generator(seed, L), (), 1, 1, L, S, 4, 4) for L, S in sizes}
    expected = {(L, S): fa.attention(*arrays[L, S], mask=mask.to_dense(L, S)) for L, S in sizes}
    start = threading.Barrier(4)

    def work(first):
        start.wait()
        for n in range(60):
            L, S = sizes[(first + n) % len(sizes)]
            assert_same_bits(fa.attention(*arrays[L, S], mask=mask), expected[L, S], {"L, S": (L, S)})
            assert (mask.compile(L, S).L, mask.compile(L, S).S) == (L, S)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, first) for first in range(4)]:
            done.result()
    assert len(mask._plans) <= masks.KEPT_PLANS


def test_long_plans_are_small():
    """65,536 positions: a few tiles for each group of 64 rows, the same words along the diagonal."""
    S = 65536
    for mask, most, global_rows in [(masks.longformer(512, 4), 9.5, 1), (masks.window(256), 8, 0),
                                    (masks.documents(np.arange(S) // 500), 9, 0), (masks.bigbird(64), 8, 1)]:
        plan = mask.compile(S, S)
        assert len(plan.block) <= most * S / 64 + global_rows * -(-S // 96), plan
        assert plan.nbytes < 4e6 and len(plan.words) < 250, (plan, plan.nbytes, len(plan.words))
    plan = masks.longformer(512, 4).compile(S, S)
    assert plan.nbytes < 1e5
    # Half the size takes half the tiles.
    half = masks.longformer(512, 4).compile(S // 2, S // 2)
    assert 1.9 < len(plan.block) / len(half.block) < 2.1
    # 4 global rows and columns, and 513 keys of a window that the ends cut.
    in_window = sum(min(i + 256, S - 1) - max(i - 256, 0) + 1 for i in range(S))
    both = sum(min(i + 256, S - 1) + 1 for i in range(4)) + sum(max(0, 4 - max(0, i - 256)) for i in range(4, S))
    assert plan.visible == in_window + 4 * S + 4 * (S - 4) - both


PEAK = """
import sys
import numpy as np
import fastattn as fa

def peak():
    # Of this process alone: what getrusage reports includes the parent's peak until exec.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024

S = 65536
q, k, v = np.random.default_rng(0).standard_normal((3, 1, S, 8), np.float32)
out = np.empty_like(q)
out[...] = 0
fa.attention(q[:, :100], k[:, :100], v[:, :100], mask=fa.masks.window(5))
before = peak()
fa.attention(q, k, v, mask=fa.masks.{mask}, out=out)
print(peak() - before)
"""


@pytest.mark.compiled
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("mask", ["window(512)", "longformer(512, 4)"])
def test_peak_memory_of_a_long_call(mask, tmp_path):
    child = subprocess.run([sys.executable, "-c", PEAK.format(mask=mask)], cwd=tmp_path, capture_output=True, text=True,
                           timeout=120, env={**os.environ, "FASTATTN_ISA": fa.isa()})
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) < 50e6, f"isa={fa.isa()}: {mask} takes {child.stdout} bytes; a dense mask is 4 GiB"


def test_plot():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed").use("Agg")
    from matplotlib import pyplot

    mask = masks.longformer(8, 2) & masks.lengths([20, 5])
    ax = mask.plot(20, 20)
    assert (np.asarray(ax.images[0].get_array()) == mask.to_dense(20, 20)[0, 0]).all()
    assert repr(mask) in ax.get_title() and ax.get_ylabel() == "query" and ax.yaxis_inverted()
    ax.figure.canvas.draw()
    mine = pyplot.figure().subplots()
    assert masks.causal().plot(5, 9, ax=mine) is mine and mine.images
    pyplot.close("all")
