"""The rows of the other kinds of attention: along edges, linear, other normalizers and scores.

Each check yields lines, as those of run.py.
"""

import ctypes
import shutil
import statistics
import subprocess
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import cases
import numpy as np
from lines import WRONG, Line, at_least, at_most, not_measured, wrong

import fastattn as fa
from fastattn import bench


def largest_error(out, exact):
    return float(np.abs(np.asarray(out, np.float64) - exact).max() / np.abs(exact).max())


def entmax_calls(row, inputs, threads):
    """{normalizer: a call} of the entmax package on torch, which writes the scores out; none where it is missing."""
    try:
        import entmax
        import torch
    except ImportError as missing:
        return {}, str(missing)
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    query, key, value = (torch.from_numpy(x) for x in inputs)
    hidden = torch.ones(row.L, row.L, dtype=torch.bool).triu(1) if row.causal else None

    def call(function):
        scores = query @ key.mT * row.D**-0.5
        if hidden is not None:
            scores.masked_fill_(hidden, -torch.inf)
        return function(scores, dim=-1) @ value

    return {"sparsemax": partial(call, entmax.sparsemax), "entmax15": partial(call, entmax.entmax15)}, None


def normalizers(run):
    """Attention and its gradients by each normalizer against softmax; the sparse ones against the entmax package."""
    for row in cases.NORMALIZER_ROWS:
        row = replace(row, L=min(row.L, 200)) if run.short else row
        inputs = row.inputs()
        head = [x[:1, :1].astype(np.float64) for x in inputs]
        calls, backward = {}, {}
        for name in ("softmax", *cases.NORMALIZER_OVER_SOFTMAX):
            options = {"normalizer": name, "causal": row.causal}
            calls[name] = partial(fa.attention, *inputs, **options)
            out, lse = fa.attention(*inputs, return_lse=True, **options)
            backward[name] = partial(fa.attention_backward, out, *inputs, out, lse, **options)
            worst = largest_error(out[:1, :1], fa.reference.attention(*head, **options))
            if not worst <= 1e-5:
                yield wrong(f"{row}, {name}", worst)
        if run.short:
            continue
        peers, missing = entmax_calls(row, inputs, run.threads)
        for name, call in peers.items():
            worst = largest_error(call().numpy(), calls[name]().astype(np.float64))
            if not worst <= 1e-4:
                yield wrong(f"{row}, {name} of the entmax package", worst)
        stats = bench.interleave(calls | {f"entmax {name}": call for name, call in peers.items()}, run.budget)
        times = {name: s.median for name, s in stats.items()}
        back = {name: s.median for name, s in bench.interleave(backward, run.budget).items()}
        for name, limit in cases.NORMALIZER_OVER_SOFTMAX.items():
            yield at_most(f"{row}, {name}", limit, times[name] / times["softmax"], " × softmax",
                          f" ({times[name] * 1e3:.3g} ms)")
            yield at_most(f"{row}, backward, {name}", limit, back[name] / back["softmax"], " × softmax",
                          f" ({back[name] * 1e3:.3g} ms)")
        for name in ("sparsemax", "entmax15"):
            what = f"{row}, {name} against the entmax package"
            if name in peers:
                yield at_least(what, cases.SPARSE_OVER_ENTMAX, times[f"entmax {name}"] / times[name], " ×")
            else:
                yield not_measured(what, f"≥ {cases.SPARSE_OVER_ENTMAX:.4g} ×", missing)


def additive(run):
    """Additive scores against torch, which writes the tanh of all pairs out."""
    rng = np.random.default_rng(10)
    for B, L, S, D in cases.ADDITIVE:
        B, L, S = (1, 30, 100) if run.short else (B, L, S)
        query, key, value = (rng.standard_normal((B, 1, n, D), dtype=np.float32) for n in (L, S, S))
        weight = rng.standard_normal(D, dtype=np.float32)
        mine = partial(fa.additive_attention, query, key, value, weight)
        what = f"additive scores, (B, L, S, D) = {B, L, S, D}"
        few = fa.reference.additive_attention(*(x.astype(np.float64) for x in (query[:1, :, :9], key[:1], value[:1])),
                                              weight.astype(np.float64))
        worst = largest_error(mine()[:1, :, :9], few)
        if not worst <= 1e-4:
            yield wrong(what, worst)
            continue
        if run.short:
            continue
        try:
            import torch
        except ImportError as missing:
            yield not_measured(what, f"≥ {cases.ADDITIVE_OVER_PEER:.4g} × torch", str(missing))
            continue
        torch.set_num_threads(run.threads)
        tensors = [torch.from_numpy(x).requires_grad_() for x in (query, key, value, weight)]
        grad_out = rng.standard_normal(query.shape, dtype=np.float32)

        def theirs(query, key, value, weight):
            scores = torch.tanh(query[..., :, None, :] + key[..., None, :, :]) @ weight
            return torch.softmax(scores, -1) @ value

        def forward(theirs=theirs, tensors=tensors):
            with torch.no_grad():
                return theirs(*tensors)

        def both(theirs=theirs, tensors=tensors, grad_out=grad_out):
            with torch.enable_grad():
                return torch.autograd.grad(theirs(*tensors), tensors, torch.from_numpy(grad_out))

        def mine_both(arrays=(query, key, value, weight), grad_out=grad_out):
            out, lse = fa.additive_attention(*arrays, return_lse=True)
            return fa.additive_attention_backward(grad_out, *arrays, out, lse)

        calls = {"mine": mine, "torch": forward, "mine both": mine_both, "torch both": both}
        stats = {name: s.median for name, s in bench.interleave(calls, run.budget).items()}
        speed = f" ({stats['mine'] * 1e3:.3g} ms, {B * L * S * D / stats['mine'] * 1e-9:.3g} G tanh/s)"
        yield at_least(what, cases.ADDITIVE_OVER_PEER, stats["torch"] / stats["mine"], " × torch written out", speed)
        yield at_least(f"{what}, forward and backward", cases.ADDITIVE_OVER_PEER,
                       stats["torch both"] / stats["mine both"], " × torch written out")


CHANGE = """
#include <stdint.h>
void change(float *scores, int64_t batch, int64_t head, int64_t query, int64_t key, int64_t n_queries, int64_t n_keys,
            int64_t stride, void *data) {
    for (int64_t j = 0; j < n_keys; j++)
        for (int64_t i = 0; i < n_queries; i++) scores[j * stride + i] -= 0.01f * (float)(query + i - key - j);
}
"""


def changed(run):
    """A compiled function that changes the scores, against plain attention: its cost is documented, not bounded."""
    row = cases.CHANGED
    what = f"{row}, score_mod of a multiplication and an addition"
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        yield not_measured(what, "", "no C compiler")
        return
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "change.c", Path(folder) / "change.so"
        source.write_text(CHANGE, encoding="ascii")
        subprocess.run([compiler, "-O3", "-march=native", "-shared", "-fPIC", "-o", library, source], check=True)
        change = ctypes.CDLL(str(library)).change
        change.restype = None
        change.argtypes = [ctypes.POINTER(ctypes.c_float), *[ctypes.c_int64] * 7, ctypes.c_void_p]
        inputs = row.inputs()
        calls = {"without": partial(fa.attention, *inputs), "with": partial(fa.attention, *inputs, score_mod=change)}
        i = np.arange(row.L)
        bias = (-0.01 * (i[:, None] - i)).astype(np.float32)
        worst = largest_error(calls["with"](), fa.attention(*inputs, bias=bias).astype(np.float64))
        if not worst <= 1e-4:
            yield wrong(what, worst)
            return
        stats = {name: s.median for name, s in bench.interleave(calls, run.budget).items()}
    yield at_most(what, 2.0, stats["with"] / stats["without"], " × without", f" ({stats['with'] * 1e3:.3g} ms)")


def off(results, right):
    """The largest error of arrays over the largest value of each."""
    pairs = [(np.asarray(x), np.asarray(y)) for x, y in zip(results, right, strict=True)]
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in pairs)


def graph(run):
    """Attention along the edges of a graph against PyTorch Geometric's layers; a full graph against dense attention."""
    peer_name, right = "PyTorch Geometric", 0
    try:
        import graphs
    except ImportError as missing:
        yield not_measured("attention along edges", f"≥ {cases.GRAPH_OVER_PEER[0]:.4g} × {peer_name}", str(missing))
        return
    nodes, edges, heads, size = cases.SHORT_GRAPH if run.short else cases.GRAPH
    rng = np.random.default_rng(11)
    for kind in cases.GRAPH_KINDS:
        matrix = graphs.drawn(kind, nodes, edges, rng)
        for name in bench.progress(cases.GRAPH_LAYERS):
            layer = graphs.Layer(name, matrix, heads, size, rng)
            what = f"{name} along {edges} edges, {kind}, {nodes} nodes, {heads} heads of {size}"
            peer, reason = None, "results only"
            try:
                if not run.short:
                    import torch

                    torch.set_num_threads(run.threads)
                    peer = layer.peer()
            except ImportError as missing:
                reason = str(missing)
            out = layer.forward(fa.reference) if peer is None else peer[0]().numpy()
            of = layer.both(fa.reference) if peer is None else [x.numpy() for x in peer[1]()]
            worst = max(off([layer.forward()], [out]), off(layer.both(), of))
            if not worst <= (cases.FULL_TOLERANCE if peer is None else cases.GRAPH_TOLERANCE):
                yield wrong(what, worst)
                continue
            right += 1
            if run.short:
                continue
            for n, passes in enumerate(("forward", "forward and backward")):
                limit = cases.GRAPH_OVER_PEER[n]
                if peer is None:
                    yield not_measured(f"{what}, {passes}", f"≥ {limit:.4g} × {peer_name}", reason)
                    continue
                stats = bench.interleave({"mine": (layer.forward, layer.both)[n], "peer": peer[n]}, run.budget)
                seconds = stats["mine"].median
                yield at_least(f"{what}, {passes}", limit, stats["peer"].median / seconds, f" × {peer_name}",
                               f" ({seconds * 1e3:.4g} ms)")
    for length, heads, size in cases.FULL_GRAPHS:
        length = 60 if run.short else length
        calls = graphs.full(length, heads, size, rng)
        what = f"all edges between {length} rows, {heads} heads of {size}, against dense attention"
        worst = off([calls["graph"]().swapaxes(0, 1)], [calls["dense"]()])
        if not worst <= cases.FULL_TOLERANCE:
            yield wrong(what, worst)
            continue
        right += 1
        if not run.short:
            stats = bench.interleave(calls, run.budget)
            yield at_most(what, cases.FULL_OVER_DENSE, stats["graph"].median / stats["dense"].median, " × the time",
                          f" ({stats['graph'].median * 1e3:.3g} ms)")
    if run.short:
        many = len(cases.GRAPH_KINDS) * len(cases.GRAPH_LAYERS) + len(cases.FULL_GRAPHS)
        yield at_least("small graphs with right results", many, right)


def torch_linear(query, key, value, chunk):
    """Causal linear attention (elu + 1) in torch, (H, L, D): in chunks; with chunk 0, all outer products at once."""
    import torch

    q, k = (torch.nn.functional.elu(x) + 1 for x in (query, key))
    v = torch.nn.functional.pad(value, (0, 1), value=1.0)
    H, L, D = q.shape
    if chunk == 0:
        out = torch.einsum("hld,hlde->hle", q, torch.einsum("hld,hle->hlde", k, v).cumsum(dim=1))
    else:
        q, k, v = (x.reshape(H, -1, chunk, x.shape[-1]) for x in (q, k, v))
        sums = (k.transpose(-1, -2) @ v).cumsum(dim=1)
        before = torch.nn.functional.pad(sums[:, :-1], (0, 0, 0, 0, 1, 0))
        out = (torch.tril(q @ k.transpose(-1, -2)) @ v + q @ before).reshape(H, L, -1)
    return out[..., :-1] / out[..., -1:]


def linear(run):
    """Causal linear attention: share of the FMA peak, growth with the length, against torch written out."""
    D, lengths = cases.LINEAR_D, (300, 600, 900) if run.short else cases.LINEAR_LENGTHS
    rng = np.random.default_rng(9)
    for H in cases.LINEAR_HEADS:
        arrays = {S: [rng.standard_normal((H, S, D), dtype=np.float32) for _ in range(3)] for S in lengths}
        few = [x[:, :256] for x in arrays[lengths[0]]]
        worst = np.abs(fa.linear_attention(*few, causal=True) - fa.reference.linear_attention(*few, causal=True)).max()
        what = f"linear attention, causal, H = {H}, D = {D}"
        if not worst <= 1e-5:
            yield wrong(what, float(worst))
        if run.short:
            continue
        calls = {S: partial(fa.linear_attention, *x, causal=True, out=np.empty_like(x[0])) for S, x in arrays.items()}
        S = lengths[-1]
        saved = fa.linear_attention(*arrays[S], causal=True, return_normalizer=True)
        calls["backward"] = partial(fa.linear_attention_backward, saved[0], *arrays[S], *saved, causal=True)
        peaks = []
        times = {name: s.median for name, s in bench.interleave(
            calls, run.budget, each_round=lambda peaks=peaks: peaks.append(bench.fma_peak(run.threads))).items()}
        for n in lengths[1:]:
            yield at_most(f"{what}, time a row at S = {n} against S = {lengths[0]}", cases.LINEAR_GROWTH,
                          times[n] / n / (times[lengths[0]] / lengths[0]), " ×")
        if None not in peaks:
            speed, peak = 8 * H * S * D**2 / times[S] * 1e-9, statistics.median(peaks)
            yield at_least(f"{what}, S = {S}, share of the FMA peak", 100 * cases.LINEAR_SHARE, 100 * speed / peak,
                           " %", f" of {peak:.0f} GFLOP/s")
        yield at_most(f"{what}, S = {S}, backward", cases.LINEAR_BACKWARD, times["backward"] / times[S], " × forward")
        try:
            import torch
        except ImportError as missing:
            yield not_measured(f"{what}, against torch", f"≥ {cases.LINEAR_OVER_TORCH} ×", str(missing))
            continue
        torch.set_num_threads(run.threads)
        for name, chunks, n in (("chunks", cases.LINEAR_CHUNKS, S), ("outer products", (0,), cases.LINEAR_OUTER)):
            if name == "outer products" and H > 1:
                continue
            tensors = [torch.from_numpy(x) for x in arrays[n]]
            peers = {chunk: partial(torch_linear, *tensors, chunk) for chunk in chunks}
            if not np.abs(peers[chunks[0]]().numpy() - calls[n]()).max() <= 1e-4:
                yield Line(f"{what}, torch, {name}", "the same result", "another", WRONG)
            stats = {key: s.median for key, s in bench.interleave({"fastattn": calls[n]} | peers, run.budget).items()}
            best = min(chunks, key=stats.get)
            note = f" ({stats['fastattn'] * 1e3:.4g} against {stats[best] * 1e3:.4g} ms" + f", chunks of {best})" * (
                best > 0) + ")" * (best == 0)
            yield at_least(f"{what}, S = {n}, against torch's {name}", cases.LINEAR_OVER_TORCH,
                           stats[best] / stats["fastattn"], " × torch", note)
