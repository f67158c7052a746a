"""Nothing outside the arrays is read or written; scratch and results are all the memory a call takes.

Arrays lie flush against pages that may not be touched, in a process of its own: a stray access ends that process, and
the failure's message names its last case.
"""

import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastattn as fa

needs_mprotect = pytest.mark.skipif(not (sys.platform.startswith("linux") or sys.platform == "darwin"),
                                    reason="guard pages are made with mprotect")
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")

# Runs in the child: `flush(name, array)` moves an array, `case(...)` notes what is about to happen.
HARNESS = """
import ctypes, itertools, mmap, os, sys
import numpy as np
import fastattn as fa
from fastattn import _runtime, checks

PAGE, GUARD = mmap.PAGESIZE, 16 * mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
note = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 0)
seed, side = int(sys.argv[2]), sys.argv[3]
dtype = np.dtype(sys.argv[4])
rng = np.random.default_rng(seed)


def case(**what):
    what = {name: value.shape if isinstance(value, np.ndarray) else value for name, value in what.items()}
    text = repr(what).encode()
    note[:len(text) + 1] = text + bytes(1)


class Arena:
    # Pages of memory between guards that can be neither read nor written.

    def __init__(self, size):
        self.size = -(-size // PAGE) * PAGE
        self.pages = mmap.mmap(-1, self.size + 2 * GUARD)
        self.begin = ctypes.addressof(ctypes.c_char.from_buffer(self.pages)) + GUARD
        for guard in self.begin - GUARD, self.begin + self.size:
            if libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(GUARD), 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        self.bytes = np.frombuffer(self.pages, np.uint8, self.size, GUARD)

    def take(self, n_bytes):
        # n bytes that begin at the arena's first byte or end at its last
        return self.bytes[:n_bytes] if side == "begin" else self.bytes[self.size - n_bytes:]


arenas = {}

def place(name, shape, dtype, order="C"):
    dtype = np.dtype(dtype)
    n_bytes = int(np.prod(shape)) * dtype.itemsize
    if name not in arenas or arenas[name].size < n_bytes:
        arenas[name] = Arena(max(n_bytes, 64 * PAGE))
    memory = arenas[name].take(n_bytes).view(dtype)
    if order == "C":
        return memory.reshape(shape)
    axes = (*range(len(shape) - 2), len(shape) - 1, len(shape) - 2)     # the last two axes swapped in memory
    return memory.reshape([shape[axis] for axis in axes]).transpose(axes)


def flush(name, array, order="C"):
    there = place(name, array.shape, array.dtype, order)
    there[...] = array
    return there


# lse, gradients, and out where it is not given, come from here.
results = itertools.count()
checks.aligned_empty = lambda shape, dtype: place(("result", next(results) % 8), shape, dtype)

POOL = rng.standard_normal(1 << 16).astype(dtype)
BOOLS = rng.random(1 << 16) < 0.6

def some(*shape, pool=POOL):
    n = int(np.prod(shape))
    at = int(rng.integers(len(pool) - n))
    return pool[at:at + n].reshape(shape)
"""

# Every S and D with some L, of either path: a plain call, and one with all options; unit strides, and the last two
# axes swapped.
EVERY_S_AND_D = """
LS = [1, 4, 8, 17, 66]
for S, D in itertools.product(range(1, 71), range(1, 71)):
    for order in "CF":
        L = LS[(S + D + (order == "F")) % 5]
        case(L=L, S=S, D=D, order=order)
        q = flush("query", some(L, D), order)
        k = flush("key", some(S, D), order)
        v = flush("value", some(S, D), order)
        out = place("out", (L, D), dtype, order)
        fa.attention(q, k, v, out=out)
        L_form, S_form = [(L, S), (L, 1), (1, S), (L, S)][(S + 3 * D) % 4]
        options = dict(
            mask=flush("mask", some(L_form, S_form, pool=BOOLS), order), bias=flush("bias", some(L, S), order),
            sinks=flush("sinks", some(1)), causal=S % 2 == 0, window=(S // 2, 5) if D % 3 == 0 else None,
            softcap=4.0 if D % 2 else None, kv_lengths=S - S // 3 if S % 5 == 0 else None,
            query_lengths=L - L // 3 if D % 5 == 0 else None)
        case(L=L, S=S, D=D, order=order, **options)
        result, lse = fa.attention(q, k, v, out=out, return_lse=True, **options)
        fa.attention(q, k, v, mask=options["mask"])
        fa.attention(q, k, v, bias=options["bias"], causal=True, return_lse=True)
"""

# Every L with a few S and D; more heads and batches, so that the flush ones are the first and the last of several.
EVERY_L = """
for L, S, D in itertools.product(range(1, 131), [1, 2, 5, 17, 100], [1, 4, 19, 64]):
    if D == 64 and L > 33:
        continue  # up to there L may take the path of few
    Dv = D + L % 3
    for order in "CF":
        case(L=L, S=S, D=D, Dv=Dv, order=order)
        q = flush("query", some(2, 2, L, D), order)
        k = flush("key", some(2, 1, S, D), order)
        v = flush("value", some(2, 1, S, Dv), order)
        mask = flush("mask", some(2, 1, L, S, pool=BOOLS), order)
        bias = flush("bias", some(2, L, S), order)
        out = place("out", (2, 2, L, Dv), dtype, order)
        fa.attention(q, k, v, out=out, num_threads=1)
        fa.attention(q, k, v, out=out, mask=mask, return_lse=True, query_lengths=[L, L // 2])
        fa.attention(q, k, v, out=out, bias=bias, causal=True, return_lse=True, sinks=flush("sinks", some(2)))
        fa.attention(q, k, v, out=out, window=3, kv_lengths=[S // 2, S])
"""

# Steps and reversals: the flush element is the first or the last that the view reaches.
STEPS = """
for L, S, D in itertools.product([1, 4, 12, 70], [1, 7, 16, 97, 200], [1, 3, 8, 17, 40, 64]):
    for step in 2, -1, -3:
        def stepped(name, array):
            wide = place(name, [(n - 1) * abs(step) + 1 for n in array.shape], array.dtype)
            view = wide[::step, ::step]
            view[...] = array
            return view
        case(L=L, S=S, D=D, step=step)
        q, k, v = (stepped(n, some(m, D)) for n, m in [("query", L), ("key", S), ("value", S)])
        out = stepped("out", np.zeros((L, D), dtype))
        fa.attention(q, k, v, out=out)
        fa.attention(q, k, v, out=out, bias=stepped("bias", some(L, S)), mask=stepped("mask", some(L, S, pool=BOOLS)),
                     causal=True, return_lse=True, softcap=3.0)
"""

# NaN and infinities take paths of their own; so does a maximum that rises from block to block.
RARE_PATHS = """
for L, S, D in itertools.product([1, 4, 12, 66], [1, 40, 96, 97, 200], [1, 3, 19, 33, 64]):
    for order in "CF":
        case(L=L, S=S, D=D, order=order)
        q = flush("query", some(L, D), order)
        k = flush("key", some(S, D) * np.arange(S)[:, None].astype(dtype), order)
        v = flush("value", some(S, D), order)
        mask = flush("mask", some(L, S, pool=BOOLS), order)
        out = place("out", (L, D), dtype, order)
        fa.attention(q, k, v, out=out, scale=3.0)
        for row in {0, S // 2, S - 1}:
            v[row, D // 2] = np.nan
            k[row, 0] = np.inf
            fa.attention(q, k, v, out=out, causal=True, return_lse=True)
            fa.attention(q, k, v, out=out, mask=mask)
            fa.attention(q, k, v, out=out, window=9, query_offset=-5)
"""

# Gradients: what they read of the saved results, and where they write.
BACKWARD = """
for L, S, D in itertools.product([1, 17, 64, 66, 130], [1, 5, 96, 97, 200], [1, 3, 8, 16, 17, 40]):
    Dv = D + S % 3
    for order in "CF":
        case(L=L, S=S, D=D, Dv=Dv, order=order)
        q = flush("query", some(2, 2, L, D), order)
        k = flush("key", some(2, 1, S, D), order)
        v = flush("value", some(2, 1, S, Dv), order)
        form = [(L, S), (2, L, S), (1, S), (L, 1)][(L + S + D) % 4]
        options = [{}, {"causal": True, "softcap": 3.0}, {"dropout_p": 0.3, "seed": 1, "window": 9},
                   {"mask": flush("mask", some(L, S, pool=BOOLS), order), "kv_lengths": [S // 2, S]},
                   {"bias": flush("bias", some(*form), order), "query_lengths": [L, L // 2]},
                   {"bias": fa.ALiBi(np.ones(2)), "sinks": flush("sinks", some(2))}]
        for number, more in enumerate(options):
            case(L=L, S=S, D=D, Dv=Dv, order=order, number=number)
            out, lse = (x.copy() for x in fa.attention(q, k, v, return_lse=True, **more))
            g = flush("grad_out", some(2, 2, L, Dv), order)
            out, lse = flush("saved", out, order), flush("lse", lse)
            fa.attention_backward(g, q, k, v, out, lse, grad_lse=flush("grad_lse", lse), **more)
        k[0, 0, S // 2, 0] = v[1, 0, S - 1, 0] = q[0, 1, L // 2, 0] = np.nan
        out, lse = (x.copy() for x in fa.attention(q, k, v, return_lse=True, **options[3]))
        fa.attention_backward(g, q, k, v, flush("saved", out, order), flush("lse", lse), **options[3])
"""

# Along the edges of graphs whose own arrays are flush too; the last of each size is full, so that its targets go
# together. Every other time rows are cut into parts.
GRAPHS = """
import scipy.sparse
from fastattn import graph

for T, N, D, E in itertools.product([1, 3, 9], [1, 5, 70], [1, 3, 8, 16, 17, 33, 64], [0, 1, 16, 65, 150, None]):
    Dv = D + N % 3
    graph.PART = 16384 if D % 2 else 40
    for order in "CF":
        case(T=T, N=N, D=D, E=E, order=order)
        if E is None:
            csr = scipy.sparse.csr_array(np.ones((T, N)))
        else:
            first = np.searchsorted(np.sort(rng.integers(T, size=E)), np.arange(T + 1))
            csr = scipy.sparse.csr_array((np.ones(E), rng.integers(N, size=E), first), shape=(T, N))
        edges = fa.Graph(csr)
        back = edges.transposed()
        n = edges.edges
        for which, one in (("", edges), ("back", back)):
            for name in ("begin", "end", "source"):
                setattr(one, name, flush(which + name, getattr(one, name)))
        back.order = flush("order", back.order)
        q = flush("query", some(T, 2, D), order)
        k = flush("key", some(N, 1, D), order)
        v = flush("value", some(N, 1, Dv), order)
        g = flush("grad_out", some(T, 2, Dv), order)
        bias = flush("bias", np.where(some(n, 2, pool=BOOLS), some(n, 2), -np.inf).astype(dtype), order)
        for number, more in enumerate([
                {}, {"edge_bias": bias, "softcap": 3.0, "sinks": flush("sinks", some(2))},
                {"dropout_p": 0.3, "seed": 1},
                {"edge_key": flush("edge_key", some(n, 1, D), order), "edge_value": flush("edge_value", some(n, Dv))},
                {"normalizer": "sigmoid"}, {"normalizer": "relu", "edge_bias": bias},
                {"normalizer": "sparsemax", "dropout_p": 0.3, "seed": 1},
                {"normalizer": "entmax15", "edge_bias": bias}]):
            case(T=T, N=N, D=D, E=E, order=order, number=number)
            out, lse = (x.copy() for x in fa.graph_attention(q, k, v, edges, return_lse=True, **more))
            out, lse = flush("saved", out, order), flush("lse", lse)
            fa.graph_attention_backward(g, q, k, v, out, lse, edges, **more)
        k = flush("keys", some(N, 2, D), order)
        weight = flush("weight", some(2, D), order)
        v = flush("values", some(N, 2, Dv), order)
        for number, normalizer in enumerate(["softmax", "entmax15"]):
            case(T=T, N=N, D=D, E=E, order=order, gat=number)
            out, lse = (x.copy() for x in fa.gat_attention(
                k[..., 0], q[..., 0], v, edges, edge_logits=bias, normalizer=normalizer, return_lse=True))
            out, lse = flush("saved", out, order), flush("lse", lse)
            fa.gat_attention_backward(g, k[..., 0], q[..., 0], v, out, lse, edges, edge_logits=bias,
                                      normalizer=normalizer)
            out, lse = (x.copy() for x in fa.gatv2_attention(
                k, q, weight, edges, value=v, normalizer=normalizer, return_lse=True))
            out, lse = flush("saved", out, order), flush("lse", lse)
            fa.gatv2_attention_backward(g, k, q, weight, out, lse, edges, value=v, normalizer=normalizer)
"""

# Weights that are no softmax, and additive scores: forward, backward, and the weights themselves.
NORMALIZERS = """
for L, S, D in itertools.product([1, 17, 66, 130], [1, 5, 97, 200], [1, 8, 17]):
    Dv = D + S % 3
    for number, order in enumerate("CF"):
        q = flush("query", some(2, 2, L, D), order)
        k = flush("key", some(2, 1, S, D), order)
        v = flush("value", some(2, 1, S, Dv), order)
        g = flush("grad_out", some(2, 2, L, Dv), order)
        w, b = flush("w", some(D)), flush("b", some(2, D))
        options = [{}, {"causal": True, "softcap": 3.0}, {"dropout_p": 0.3, "seed": 1, "scale": 0.01},
                   {"mask": flush("mask", some(L, S, pool=BOOLS), order), "kv_lengths": [S // 2, S]},
                   {"bias": flush("bias", some(L, S), order), "query_lengths": [L, L // 2]}]
        for name, more in itertools.product(["sigmoid", "sparsemax", "entmax15"], options):
            case(L=L, S=S, D=D, Dv=Dv, order=order, normalizer=name, options=list(more))
            out, lse = (x.copy() for x in fa.attention(q, k, v, normalizer=name, return_lse=True, **more))
            out, lse = flush("saved", out, order), flush("lse", lse)
            fa.attention_backward(g, q, k, v, out, lse, normalizer=name, **more)
            if "dropout_p" not in more:
                fa.attention_weights(q, k, normalizer=name, **more)
                fa.attention_weights(q, k, normalizer=name, reduce=["sum", "entropy", ("top_k", 1)][L % 3], **more)
        for more in options:
            more = {name: option for name, option in more.items() if name not in ("scale", "bias")}
            case(L=L, S=S, D=D, Dv=Dv, order=order, additive=True, options=list(more))
            out, lse = (x.copy() for x in fa.additive_attention(q, k, v, w, bias=b, return_lse=True, **more))
            out, lse = flush("saved", out, order), flush("lse", lse)
            fa.additive_attention_backward(g, q, k, v, w, out, lse, bias=b, **more)
"""

# Linear layers. Their panels are flush too, as they are allocated like results. Rows that are read in place and rows
# that are packed, 16 bits among them; outputs that fill no vector, no block, or one more.
LAYERS = """
SIZES = [1, 2, 5, 17, 96, 97, 130], [1, 3, 16, 17, 63, 64, 65, 130], [0, 1, 2, 7, 16, 17, 257]
for M, N, K in itertools.product(*SIZES):
    for order in "CF":
        x = flush("x", some(M, K), order)
        weight = flush("weight", some(N, K), order)
        bias = flush("bias", some(N))
        out = place("out", (M, N), dtype, order)
        for kept in ["float32", "bfloat16"] if dtype == np.float32 else ["float64"]:
            case(M=M, N=N, K=K, order=order, kept=kept)
            packed = fa.pack_weight(weight, kept)
            fa.linear(x, packed, out=out)
            fa.linear(x, packed, bias, ["relu", "gelu", "gelu_tanh", "silu"][(M + N + K) % 4], out=out)
            fa.linear(x[:, None], packed, bias)
            if dtype == np.float32:
                half = flush("half", x.astype(np.float16), order)
                fa.linear(half, packed, bias, out=place("half out", (M, N), np.float16, order))
    for step in 2, -1, -3:
        def stepped(name, array):
            wide = place(name, [(n - 1) * abs(step) + 1 if n else 0 for n in array.shape], array.dtype)
            view = wide[::step, ::step]
            view[...] = array
            return view
        case(M=M, N=N, K=K, step=step)
        packed = fa.pack_weight(stepped("weight", some(N, K)))
        fa.linear(stepped("x", some(M, K)), packed, flush("bias", some(N)), out=stepped("out", np.zeros((M, N), dtype)))
"""

# Norms: rows that fill no vector and no task, or one more; what is added and its sum; other steps and 16 bits.
NORMS = """
for M, N in itertools.product([1, 15, 16, 17, 64, 65], [*range(1, 71), 511, 512, 513, 1000]):
    weight, bias = flush("weight", some(N)), flush("bias", some(N))
    for order in "CF":
        x, add = flush("x", some(M, N), order), flush("add", some(M, N), order)
        out, total = (place(name, (M, N), dtype, order) for name in ("out", "total"))
        for centre in True, False:
            case(M=M, N=N, order=order, centre=centre)
            _runtime.norm(x, None, None, None, None, 1e-5, centre, out, 1)
            _runtime.norm(x, add, total, weight, bias, 1e-5, centre, out, 1)
            _runtime.norm(x, add, None, weight, None, 1e-5, centre, out, 1)
            if dtype == np.float32:
                half = [flush("half " + name, a.astype(np.float16), order) for name, a in (("x", x), ("add", add))]
                results = [place("half " + name, (M, N), np.float16, order) for name in ("out", "total")]
                _runtime.norm(*half, results[1], weight, bias, 1e-5, centre, results[0], 1)
    for step in 2, -1, -3:
        def stepped(name, array):
            wide = place(name, [(n - 1) * abs(step) + 1 for n in array.shape], array.dtype)
            view = wide[::step, ::step]
            view[...] = array
            return view
        case(M=M, N=N, step=step)
        x, add, out, total = (stepped(name, some(M, N)) for name in ("x", "add", "out", "total"))
        _runtime.norm(x, add, total, weight, bias, 1e-5, True, out, 1)
"""


def run(tmp_path, body, *arguments):
    """(return code, last case, errors) of a child that runs HARNESS and `body`."""
    note, program = tmp_path / "case", tmp_path / "program.py"
    note.write_bytes(bytes(mmap.PAGESIZE))
    program.write_text(HARNESS + body)
    child = subprocess.run([sys.executable, program, note, *map(str, arguments)], cwd=tmp_path, capture_output=True,
                           text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", "FASTATTN_ISA": fa.isa()})
    return child.returncode, note.read_bytes().split(b"\0")[0].decode(), child.stderr


def assert_survives(tmp_path, body, seed, side, dtype):
    code, case, errors = run(tmp_path, body, seed, side, dtype)
    what = "touched memory outside an array" if code in (-signal.SIGSEGV, -signal.SIGBUS) else f"ended with {code}"
    assert code == 0, (f"isa={fa.isa()}, dtype={dtype}, arrays flush at their {side}, seed={seed}: {what} at {case}\n"
                       f"{errors}")


@needs_mprotect
@pytest.mark.compiled
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("side", ["begin", "end"])
def test_graphs_touch_nothing_outside_the_arrays(side, dtype, tmp_path, seed):
    pytest.importorskip("scipy.sparse", reason="scipy is not installed")
    assert_survives(tmp_path, GRAPHS, seed, side, dtype)


@needs_mprotect
@pytest.mark.compiled
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("side", ["begin", "end"])
@pytest.mark.parametrize("body", [EVERY_S_AND_D, EVERY_L, STEPS, RARE_PATHS, BACKWARD, NORMALIZERS, LAYERS, NORMS],
                         ids=["every S and D", "every L", "steps", "rare paths", "backward", "normalizers", "layers",
                              "norms"])
def test_nothing_outside_the_arrays_is_touched(body, side, dtype, tmp_path, seed):
    assert_survives(tmp_path, body, seed, side, dtype)


# Each touches one element outside an array of 5 rows and 3 columns that is flush on the side given; from "key" on it is
# the kernel that does so, through a view that claims a row too many.
STRAY = {
    "read after": ("end", "over(a)[5, 0].item()"),
    "read before": ("begin", "as_strided(a, (6, 3), (-12, 4))[1, 0].item()"),
    "write after": ("end", "over(a)[5, 0] = 1"),
    "write before": ("begin", "as_strided(a, (6, 3), (-12, 4))[1, 0] = 1"),
    "swapped axes": ("end", "over(flush('f', some(5, 3), 'F'))[5, 2].item()"),
    "bytes": ("end", "as_strided(flush('m', some(5, 3, pool=BOOLS)), (16,), (1,))[15].item()"),
    "key": ("end", "fa.attention(some(2, 3), over(a), some(6, 3))"),
    "value": ("end", "fa.attention(some(2, 3), some(6, 3), over(a))"),
    "query": ("end", "fa.attention(over(a), some(4, 3), some(4, 3))"),
    "bias": ("end", "fa.attention(some(6, 2), some(3, 2), some(3, 2), bias=over(a))"),
    "mask": ("end", "fa.attention(some(6, 2), some(3, 2), some(3, 2), mask=over(flush('m', some(5, 3, pool=BOOLS))))"),
    "out": ("end", "fa.attention(some(6, 3), some(4, 3), some(4, 3), out=over(a))"),
    "key of a graph": ("end", "fa.graph_attention(some(1, 1, 3), over(a)[:, None], some(6, 1, 3), edges)"),
    "value of a graph": ("end", "fa.graph_attention(some(1, 1, 3), some(6, 1, 3), over(a)[:, None], edges)"),
    "source": ("end", "edges.source = flush('source', edges.source); edges.end = edges.end + 1; "
                      "fa.graph_attention(some(1, 1, 3), some(6, 1, 3), some(6, 1, 3), edges)"),
    "x of a layer": ("end", "fa.linear(over(a), some(2, 3))"),
    "weight of a layer": ("end", "fa.pack_weight(over(a))"),
    "panels of a layer": ("end", "w = fa.pack_weight(some(1, 3)); w.shape = (1, 4); fa.linear(some(2, 4), w)"),
    "bias of a layer": ("end", "fa.linear(some(2, 3), some(2, 3), as_strided(flush('b', some(1)), (2,), (4,)))"),
    "out of a layer": ("end", "fa.linear(some(6, 3), some(3, 3), out=over(a))"),
    "x of a norm": ("end", "norm(over(a), None, None, None, None, some(6, 3))"),
    "x of a norm, before": ("begin", "norm(as_strided(a, (6, 3), (-12, 4)), None, None, None, None, some(6, 3))"),
    "add of a norm": ("end", "norm(some(6, 3), over(a), None, None, None, some(6, 3))"),
    "sum of a norm": ("end", "norm(some(6, 3), some(6, 3), over(a), None, None, some(6, 3))"),
    "weight of a norm": ("end", "norm(some(6, 3), None, None, as_strided(flush('w', some(2)), (3,), (4,)), None, "
                                "some(6, 3))"),
    "bias of a norm": ("end", "norm(some(6, 3), None, None, None, as_strided(flush('b', some(2)), (3,), (4,)), "
                              "some(6, 3))"),
    "out of a norm": ("end", "norm(some(6, 3), None, None, None, None, over(a))"),
    "lse": ("end", "p = checks.problem(some(6, 3), some(4, 3), some(4, 3), return_lse=True); "
                   "p.lse = over(place('lse', (1, 5), dtype).T).T; _runtime.forward(p)"),
}


@needs_mprotect
@pytest.mark.compiled
@pytest.mark.parametrize("how", STRAY)
def test_harness_sees_one_stray_element(how, tmp_path, seed):
    side, body = STRAY[how]
    start = """
from numpy.lib.stride_tricks import as_strided
over = lambda array: as_strided(array, (array.shape[0] + 1, array.shape[1]), array.strides)
norm = lambda x, add, total, weight, bias, out: _runtime.norm(x, add, total, weight, bias, 1e-5, True, out, 1)
a = flush("a", some(5, 3))
"""
    if "edges" in body:
        pytest.importorskip("scipy.sparse", reason="scipy is not installed")
        start += "import scipy.sparse\nedges = fa.Graph(scipy.sparse.csr_array(np.ones((1, 6))))\n"
    start += "case(here='before')\n"
    code, case, errors = run(tmp_path, start + body + "\ncase(here='after')\n", seed, side, "float32")
    assert code in (-signal.SIGSEGV, -signal.SIGBUS) and case == "{'here': 'before'}", (how, code, case, errors)


# --- how much memory ---

@pytest.mark.compiled
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_scratch_is_at_most_a_mebibyte_a_thread(dtype):
    sizes = [*range(0, 512, 31), 511, 512]
    largest = max((max(fa._runtime.scratch_bytes(D, Dv, dtype)), D, Dv) for D in sizes for Dv in sizes)
    assert largest[0] <= 2**20, f"isa={fa.isa()}, dtype={dtype}: {largest[0]} bytes for D, Dv = {largest[1:]}"


PEAK = """
import sys
import numpy as np
import fastattn as fa

def peak():
    # Of this process alone: what getrusage reports includes the parent's peak until exec.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024

L = S = 8192
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((1, 1, S, 64), np.float32) for _ in range(3))
row = rng.standard_normal((1, S), np.float32)
fa.attention(q[:, :, :100], k[:, :, :100], v[:, :, :100])
before = peak()
{call}
print(peak() - before)
"""
CALLS = {
    "plain": "fa.attention(q, k, v)",
    "options": "fa.attention(q, k, v, mask=row < 1, bias=row, causal=True, softcap=5.0, sinks=row[0, :1], "
               "return_lse=True)",
    "swapped axes": "q, k, v = (a.swapaxes(2, 3).copy().swapaxes(2, 3) for a in (q, k, v)); fa.attention(q, k, v)",
    "heads of 8": "q, k, v = (a.reshape(1, 8, S, 8) for a in (q, k, v)); fa.attention(q, k, v, window=500)",
    "written out": "q @ k.swapaxes(2, 3)",
}


@needs_proc
@pytest.mark.compiled
@pytest.mark.parametrize("call", CALLS)
def test_peak_memory_is_far_below_the_scores(call, tmp_path):
    child = subprocess.run([sys.executable, "-c", PEAK.format(call=CALLS[call])], cwd=tmp_path, capture_output=True,
                           text=True, timeout=300, env={**os.environ, "FASTATTN_ISA": fa.isa()})
    assert child.returncode == 0, child.stderr
    grown, scores = int(child.stdout), 8192 * 8192 * 4
    if call == "written out":
        assert grown >= scores, f"the measure misses memory: {grown} bytes"
    else:
        # The result is 2 MiB, the scratch 1 MiB a thread, the copies of "swapped axes" 6 MiB.
        assert grown <= scores / 16, f"isa={fa.isa()}: {call} takes {grown} bytes; L x S scores are {scores}"


# Edges x heads x head size, in bytes, against what a call takes beyond its arguments.
GRAPH_PEAK = PEAK[:PEAK.index("L = S")] + """
import scipy.sparse
E, nodes, H, D = 200_000, 1000, 2, 128
rng = np.random.default_rng(0)
row, col = np.sort(rng.integers(nodes, size=E)), rng.integers(nodes, size=E)
edges = fa.Graph(scipy.sparse.csr_array((np.ones(E), col, np.searchsorted(row, np.arange(nodes + 1))),
                                        shape=(nodes, nodes)))
edges.transposed()
q, k, v = (rng.standard_normal((nodes, H, D), np.float32) for _ in range(3))
s, w = q[..., 0].copy(), q[0].copy()
fa.graph_attention(q[:1], k, v, scipy.sparse.csr_array(np.ones((1, nodes))))
before = peak()
{call}
print(peak() - before)
"""
ALONG_EDGES = {
    **{name: f"o, l = fa.graph_attention(q, k, v, edges, return_lse=True, normalizer={name!r}); "
             f"fa.graph_attention_backward(o, q, k, v, o, l, edges, normalizer={name!r})"
       for name in ("softmax", "sigmoid", "entmax15")},
    "gat": "o, l = fa.gat_attention(s, s, v, edges, return_lse=True); "
           "fa.gat_attention_backward(o, s, s, v, o, l, edges)",
    "gatv2": "o, l = fa.gatv2_attention(k, q, w, edges, return_lse=True); "
             "fa.gatv2_attention_backward(o, k, q, w, o, l, edges)",
    "written out": "(q[row] * k[col]).sum(axis=-1)",
}


@needs_proc
@pytest.mark.compiled
@pytest.mark.parametrize("call", ALONG_EDGES)
def test_graphs_take_far_less_than_a_row_for_each_edge(call, tmp_path):
    pytest.importorskip("scipy.sparse", reason="scipy is not installed")
    child = subprocess.run([sys.executable, "-c", GRAPH_PEAK.format(call=ALONG_EDGES[call])], cwd=tmp_path,
                           capture_output=True, text=True, timeout=300, env={**os.environ, "FASTATTN_ISA": fa.isa()})
    assert child.returncode == 0, child.stderr
    grown, rows = int(child.stdout), 200_000 * 2 * 128 * 4
    if call == "written out":
        assert grown >= rows, f"the measure misses memory: {grown} bytes"
    else:
        # Three numbers for each edge and head are 5 MB, results and what they are summed in 10 MB.
        assert grown <= rows / 8, f"isa={fa.isa()}: {call} takes {grown} bytes; a row for each edge and head is {rows}"


def test_results_are_aligned():
    q = np.ones((1, 3, 5, 7), np.float32)
    for _ in range(20):
        for options in {}, {"causal": True}, {"return_lse": True}, {"softcap": 2.0}:
            results = fa.attention(q, q, q, **options)
            for result in results if isinstance(results, tuple) else (results,):
                assert result.ctypes.data % 64 == 0 and result.flags.c_contiguous
