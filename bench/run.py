"""Every row of the speed table: what must be reached, what was measured, PASS or short. README.md says how to read it.

The exit status tells about results only: 1 if one was wrong, 0 otherwise, however slow.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import cases
import encode
import kinds
import layers
import numpy as np
from lines import NONE, PASS, SHORT, WRONG, Line, at_least, at_most, not_measured, wrong

import fastattn as fa
from fastattn import _runtime, bench
from fastattn.demos import sentences as demo

HERE = Path(__file__).parent


class Run:
    """The settings of a run, and every record it measured."""

    def __init__(self, args, contenders):
        self.threads, self.budget, self.short, self.build = args.threads, args.budget, args.short, args.build
        self.contenders = contenders
        self.records = []

    def measure(self, row, *only):
        """Records by contender, for ``only`` those named (all where none is). Printed as they are measured."""
        names = [name for name in self.contenders if not only or name in only]
        records = bench.measure(row, names, self.threads, self.budget, note=bench.say)
        for record in records:
            bench.say(bench.table_line(record))
        self.records += records
        return {record["contender"]: record for record in records}

    def wrong(self, records):
        return [wrong(f"{r['row']}, {r['contender']}", r["worst"]) for r in records.values() if not r["ok"]]


def share_line(what, limit, record):
    """The line of a record's share of the FMA peak."""
    if record["share"] is None:
        return not_measured(what, f"≥ {limit:.0%} of the FMA peak", f"{record['gflops']:.4g} GFLOP/s, no peak measured")
    return at_least(what, 100 * limit, 100 * record["share"], " %", f" of {record['peak']:.0f} GFLOP/s")


def against_peers(records):
    """The records of fastattn and of the fastest peer; None where fastattn is wrong or no peer is right."""
    mine = records.get("fastattn")
    peers = [r for name, r in records.items() if name != "fastattn" and r["ok"]]
    if mine is None or not mine["ok"] or not peers:
        return None
    return mine, max(peers, key=lambda r: r["gflops"])


# The checks. Each yields lines.


def grid(run):
    """fastattn against the best peer."""
    for row in bench.progress(cases.GRID):
        records = run.measure(row)
        yield from run.wrong(records)
        pair = against_peers(records)
        if pair is None:
            continue
        mine, best = pair
        limit = cases.OVER_BEST_PEER * best["gflops"]
        must = f"{cases.OVER_BEST_PEER} × {best['contender']}"
        if mine["peak"] and cases.SHARE_INSTEAD * mine["peak"] < limit:
            limit = cases.SHARE_INSTEAD * mine["peak"]
            must = f"{cases.SHARE_INSTEAD:.0%} of the peak"
        ratio = f" ({mine['gflops'] / best['gflops']:.2f} × {best['contender']}"
        share = f", {mine['share']:.0%} of the peak)" if mine["share"] else ")"
        line = at_least(f"{row} against the best peer", limit, mine["gflops"], " GFLOP/s", ratio + share)
        line.must += f" ({must})"
        yield line


def long(run):
    """Long float32 sequences: share of the FMA peak."""
    for row in bench.progress(cases.LONG):
        yield from share(run, row, cases.LONG_SHARE[row.D, row.causal])


def float64(run):
    yield from share(run, cases.FLOAT64, cases.FLOAT64_SHARE, "numpy", "torch")


def share(run, row, limit, *beside):
    records = run.measure(row, "fastattn", *beside)
    yield from run.wrong(records)
    if records["fastattn"]["ok"]:
        yield share_line(f"{row}, share of the {row.dtype} FMA peak", limit, records["fastattn"])


def options(run):
    """Calls with options, timed beside the same call without."""
    for option in bench.progress(cases.OPTIONS):
        option = cases.shortened(option) if run.short else option
        row = option.row
        what = f"{row}, {option.name}"
        inputs = row.inputs()
        keywords, mask, bias = option.make(row, np.random.default_rng(1))
        calls = {name: partial(fa.attention, *inputs, **chosen)
                 for name, chosen in (("without", option.without), ("with", keywords))}
        rows = bench.checked_rows(row.L)
        expected = bench.exact(*inputs, rows, mask=mask, bias=bias, softcap=keywords.get("softcap"))
        _, worst = bench.errors(calls["with"](), expected, rows, inputs[2])
        if not worst <= bench.tolerance("fastattn", row.dtype):
            yield wrong(what, worst)
            continue
        stats = bench.interleave(calls, run.budget)
        share = option.share(row)
        ratio = stats["with"].median / stats["without"].median / share
        note = f" ({stats['with'].median * 1e3:.4g} ms; without {stats['without'].median * 1e3:.4g} ms)"
        times = "× the time without" if share == 1 else f"× {share:.2%} of the time without"
        yield at_most(what, option.limit, ratio, " " + times, note)


def window_peers(run):
    """A window against torch: with its mask, and as compiled flex_attention where that runs."""
    row = cases.WINDOW_ROW
    inputs = row.inputs()
    calls = {"fastattn": partial(fa.attention, *inputs, window=cases.WINDOW)}
    what = f"{row}, window ±{cases.WINDOW}"
    try:
        import torch
    except ImportError as error:
        yield not_measured(f"{what}, against torch with a mask", f"≥ {cases.WINDOW_OVER_TORCH} ×", str(error))
        return
    torch.set_num_threads(run.threads)
    torch.set_grad_enabled(False)
    tensors = [torch.from_numpy(x) for x in inputs]
    band = torch.from_numpy(fa.masks.window(cases.WINDOW).to_dense(row.L, row.L))
    calls["torch"] = partial(torch.nn.functional.scaled_dot_product_attention, *tensors, attn_mask=band)
    expected = calls["fastattn"]()
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def near(b, h, i, j):
            return (i - j).abs() <= cases.WINDOW

        blocks = create_block_mask(near, None, None, row.L, row.L, device="cpu")
        flex = partial(torch.compile(flex_attention), *tensors, block_mask=blocks)
        if np.abs(flex().numpy() - expected).max() < 1e-5:
            calls["flex_attention"] = flex
    except Exception as error:  # noqa: BLE001  it needs a compiler, and a CPU that it knows
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:60]
        yield not_measured(f"{what}, against flex_attention", "> 1 ×", reason)
    stats = bench.interleave(calls, run.budget)
    for peer, limit in (("torch", cases.WINDOW_OVER_TORCH), ("flex_attention", 1)):
        if peer in stats:
            note = f" ({stats['fastattn'].median * 1e3:.4g} against {stats[peer].median * 1e3:.4g} ms)"
            yield at_least(f"{what}, against {peer}", limit, stats[peer].median / stats["fastattn"].median, " ×", note)


def packed(run):
    """Packed sequences against the sum of separate calls, by lengths and as a mask of documents."""
    row = cases.PACKED
    lengths = cases.packed_lengths(row, np.random.default_rng(3))
    ends = np.cumsum(np.concatenate(([0], lengths)))
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((row.L, row.H, row.D), dtype=row.dtype) for _ in range(3)]
    whole = [np.ascontiguousarray(x.swapaxes(0, 1)) for x in inputs]
    alone = [[np.ascontiguousarray(x[:, a:b]) for x in whole] for a, b in zip(ends, ends[1:], strict=False)]
    plan = fa.masks.documents(np.repeat(np.arange(row.B), lengths)).compile(row.L, row.L)
    calls = {
        "separate": lambda: [fa.attention(*x) for x in alone],
        "varlen_attention": partial(fa.varlen_attention, *inputs, ends, ends),
        "mask=documents(...)": partial(fa.attention, *whole, mask=plan),
    }
    expected = np.concatenate(calls["separate"](), axis=1)
    for name, out in (("varlen_attention", calls["varlen_attention"]().swapaxes(0, 1)),
                      ("mask=documents(...)", calls["mask=documents(...)"]())):
        if not np.abs(out - expected).max() <= 1e-5:
            yield wrong(f"packed documents, {name}", float(np.abs(out - expected).max()))
    stats = bench.interleave(calls, run.budget)
    for name in list(calls)[1:]:
        note = f" ({stats[name].median * 1e3:.4g} against {stats['separate'].median * 1e3:.4g} ms)"
        what = f"{row.B} packed documents of {row.L} rows, {name} against separate calls"
        yield at_most(what, cases.PACKED_OVER_SEPARATE, stats[name].median / stats["separate"].median, " ×", note)


def compiling(run):
    """Compiling a mask, and the memory of a long windowed call."""
    mask, length = cases.COMPILED
    seconds = []
    for _ in range(9):
        mask._plans.clear()
        begin = time.perf_counter()
        plan = mask.compile(length, length)
        seconds.append(time.perf_counter() - begin)
    what = f"{mask!r} at S = {length}"
    yield at_most(f"{what}, compile", cases.COMPILE_S * 1e3, statistics.median(seconds) * 1e3, " ms",
                  f" ({len(plan.block)} tiles, {plan.nbytes / 1e3:.0f} kB)")
    length, window = cases.LONG_WINDOW
    # VmHWM is the most that was ever resident: a process of its own, whose arrays are resident before.
    code = f"""
import re, numpy, fastattn
def most():
    return 1024*int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
q, k, v, out = (numpy.ones((1, {length}, 64), numpy.float32) for _ in range(4))
before = most()
fastattn.attention(q, k, v, mask=fastattn.masks.window({window}), out=out)
print(most() - before)
"""
    what = f"S = {length}, one head, masks.window({window}): memory beyond inputs and output"
    with tempfile.TemporaryDirectory() as folder:
        done = python(["-c", code], folder)
    if done.returncode:
        yield not_measured(what, f"≤ {cases.LONG_WINDOW_BYTES / 1e6:g} MB", done.stderr.strip().splitlines()[-1])
    else:
        yield at_most(what, cases.LONG_WINDOW_BYTES / 1e6, int(done.stdout) / 1e6, " MB")


def weights(run):
    """The weights reduced over the queries, against a forward."""
    row = cases.WEIGHTS
    query, key, value = row.inputs()
    calls = {"forward": partial(fa.attention, query, key, value)}
    calls["sum"] = partial(fa.attention_weights, query, key, reduce="sum")
    total = calls["sum"]().sum(axis=-1)
    if not np.abs(total / row.L - 1).max() <= 1e-5:
        yield wrong(f"{row}, weights summed over the queries", float(np.abs(total / row.L - 1).max()))
    stats = bench.interleave(calls, run.budget)
    yield at_most(f"{row}, weights summed over the queries", cases.WEIGHTS_OVER_FORWARD,
                  stats["sum"].median / stats["forward"].median, " × a forward")


def stored(kind):
    """The NumPy dtype of a kind of storage; None where bfloat16 is not at hand."""
    if kind != "bfloat16":
        return np.dtype(kind)
    try:
        import ml_dtypes
    except ImportError:
        return None
    return np.dtype(ml_dtypes.bfloat16)


def repeated(shape, dtype, rng):
    """Normal numbers; the same ones for every head, so that large arrays are made in time."""
    rows = rng.standard_normal(shape[-2:], dtype=np.float32)
    out = np.empty(shape, dtype)
    out[...] = rows
    return out


def largest_error(out, query, key, value):
    """Against float64, over the largest value; one batch, one query."""
    exact = fa.reference.attention(*(x.astype(np.float64) for x in (query, key, value)))
    return float(np.abs(out.astype(np.float64) - exact).max() / np.abs(value.astype(np.float64)).max())


def loads(arrays, threads):
    for array in arrays:
        _runtime.read_once(array, threads)


def decode(run):
    """One query over a long cache, against plain loads of the same bytes by the same threads."""
    rng = np.random.default_rng(4)
    for kind in bench.progress(cases.DECODE_KINDS):
        for D in cases.DECODE_SIZES:
            heads = cases.DECODE_HEADS
            size = 1 if kind == "int8" else 4 if kind == "float32" else 2
            S = max(cases.DECODE_BYTES // (2 * heads * D * size), 1) if not run.short else 300
            cache, dtype = None, None
            if kind == "int8":
                cache = fa.KVCache(-(-S // 64), 64, heads, D, dtype="int8")
                rows = repeated((1, heads, S, D), np.float32, rng)
                cache.append(0, rows, rows)
                memory = cache._pools.key, cache._pools.value
            else:
                dtype = stored(kind)
                if dtype is None:
                    yield not_measured(f"decode {kind}, D = {D}", "bytes at the speed of loads", "no ml_dtypes")
                    continue
                key, value = memory = [repeated((1, heads, S, D), dtype, rng) for _ in range(2)]
            for group in cases.DECODE_GROUPS:
                query = rng.standard_normal((1, heads * group, 1, D), dtype=np.float32)
                out = np.empty_like(query)
                what = f"decode {kind}, S = {S}, D = {D}, {group} query heads a key head"
                if cache is not None:
                    call = partial(cache.attend, query, [0], out=out)
                else:
                    call = partial(fa.attention, query, key, value, out=out)
                    head = [call()[:, :group], query[:, :group], key[:, :1], value[:, :1]]
                    worst = largest_error(*head) if run.short else 0
                    if not worst <= 1e-5:
                        yield wrong(what, worst)
                        continue
                if _runtime.read_once is None or run.short:
                    continue
                calls = {"attention": call, "loads": partial(loads, memory, run.threads)}
                stats = bench.interleave(calls, run.budget)
                limit = (cases.DECODE_RATIO_INT8 if kind == "int8" else cases.DECODE_RATIO)[group]
                speed = sum(x.nbytes for x in memory) / stats["attention"].median * 1e-9
                yield at_least(what, limit, stats["loads"].median / stats["attention"].median, " of the time of loads",
                               f" ({speed:.3g} GB/s)")


def small_decode(run):
    """One query over a short cache against every peer."""
    for B, H, S, D in cases.SMALL_DECODE:
        rng = np.random.default_rng(5)
        query = rng.standard_normal((B, H, 1, D), dtype=np.float32)
        key, value = rng.standard_normal((2, B, H, S, D), dtype=np.float32)
        scale = np.float32(D**-0.5)

        def written_out(query=query, key=key, value=value, scale=scale):
            scores = np.matmul(query * scale, key.swapaxes(-1, -2))
            scores -= scores.max(-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(-1, keepdims=True)
            return scores @ value

        calls = {"fastattn": partial(fa.attention, query, key, value), "numpy": written_out}
        try:
            import torch
            torch.set_num_threads(run.threads)
            tensors = [torch.from_numpy(x) for x in (query, key, value)]
            calls["torch"] = partial(torch.nn.functional.scaled_dot_product_attention, *tensors)
        except ImportError:
            pass
        what = f"one query, (B, H, S, D) = {B, H, S, D}"
        worst = float(np.abs(calls["fastattn"]() - written_out()).max())
        if not worst <= 1e-5:
            yield wrong(what, worst)
            continue
        stats = bench.interleave(calls, run.budget)
        best = min((name for name in stats if name != "fastattn"), key=lambda name: stats[name].median)
        yield at_least(f"{what} against the best peer", cases.SMALL_OVER_BEST,
                       stats[best].median / stats["fastattn"].median, f" × {best}",
                       f" ({stats['fastattn'].median * 1e6:.3g} µs)")


def paged(run):
    """A paged cache, its pages in random order, against the same rows in one array."""
    rng = np.random.default_rng(6)
    heads = cases.DECODE_HEADS
    for kind, D in (("float32", 64), ("float32", 128), ("float16", 64), ("float16", 128)):
        S = cases.DECODE_BYTES // (2 * heads * D * np.dtype(kind).itemsize)
        key, value = (repeated((1, heads, S, D), np.float32, rng) for _ in range(2))
        rows = [x.astype(kind) for x in (key, value)]
        for page in cases.PAGE_SIZES:
            cache = fa.KVCache(-(-S // page), page, heads, D, dtype=kind)
            cache._free[:] = rng.permutation(cache.num_pages)
            cache.append(0, key, value)
            for group in (1, 4):
                query = rng.standard_normal((1, heads * group, 1, D), dtype=np.float32)
                calls = {"paged": partial(cache.attend, query, [0]), "one array": partial(fa.attention, query, *rows)}
                what = f"{kind}, D = {D}, pages of {page}, {group} query heads a key head"
                if not (calls["paged"]() == calls["one array"]()).all():
                    yield wrong(what, 1)
                    continue
                stats = bench.interleave(calls, run.budget)
                yield at_most(f"{what} against one array", cases.PAGED_OVER_CONTIGUOUS,
                              stats["paged"].median / stats["one array"].median, " ×")


def latent(run):
    """One query over a latent cache, the value a view of the key: memory is read once."""
    rng = np.random.default_rng(9)
    S = cases.DECODE_BYTES // 2 // (4 * cases.LATENT_D)
    key = repeated((1, 1, S, cases.LATENT_D), np.float32, rng)
    query = rng.standard_normal((1, 1, 1, cases.LATENT_D), dtype=np.float32)
    view = key[..., : cases.LATENT_DV]
    calls = {"view": partial(fa.attention, query, key, view), "copy": partial(fa.attention, query, key, view.copy())}
    what = f"a latent cache, S = {S}, D = {cases.LATENT_D}, the value a view of {cases.LATENT_DV} columns"
    if not (calls["view"]() == calls["copy"]()).all():
        yield wrong(what, 1)
        return
    stats = bench.interleave(calls, run.budget)
    ratio = stats["view"].median / stats["copy"].median
    yield at_most(f"{what}, over a copy", cases.LATENT_OVER_COPY, ratio, " × the time")


def half_grid(run):
    """bfloat16 against the best peer."""
    if stored("bfloat16") is None:
        yield not_measured("the grid in bfloat16", f"{cases.HALF_OVER_BEST_PEER} × the best peer", "no ml_dtypes")
        return
    for row in bench.progress(cases.HALF_GRID):
        records = run.measure(row)
        yield from run.wrong(records)
        pair = against_peers(records)
        if pair is None:
            continue
        mine, best = pair
        share = f", {mine['share']:.0%} of the peak" if mine["share"] else ""
        yield at_least(f"{row} against the best peer", cases.HALF_OVER_BEST_PEER, mine["gflops"] / best["gflops"],
                       f" × {best['contender']}", f" ({mine['gflops']:.4g} GFLOP/s{share})")


def half(run):
    """bfloat16 and float16: share of the peak of their products, the float32 speed, the peers."""
    for D in (128, 64):
        inputs = bench.Row(1, 8, 2048, D).inputs()
        what = f"1,8,2048,{D}"
        calls = {"float32": partial(fa.attention, *inputs)}
        for kind in ("bfloat16", "float16"):
            if stored(kind) is not None:
                calls[kind] = partial(fa.attention, *(x.astype(stored(kind)) for x in inputs))
        peers = {}
        try:
            import torch
            torch.set_num_threads(run.threads)
            tensors = [torch.from_numpy(x).bfloat16() for x in inputs]
            peers["torch"] = partial(torch.nn.functional.scaled_dot_product_attention, *tensors)

            def written_out(q=tensors[0], k=tensors[1], v=tensors[2], scale=D**-0.5):
                return torch.softmax((q @ k.mT) * scale, -1) @ v

            peers["torch, written out"] = written_out
        except ImportError:
            pass
        stats = bench.interleave(calls | peers, run.budget)
        flop = bench.Row(1, 8, 2048, D).flop
        peak = _runtime.measure_peak("bfloat16", run.threads) if _runtime.measure_peak else 0
        if peak and "bfloat16" in calls:
            peak = statistics.median(_runtime.measure_peak("bfloat16", run.threads) for _ in range(5))
            yield at_least(f"{what} bfloat16, share of the peak of bfloat16 pairs", 100 * cases.PAIRS_SHARE[D],
                           100 * flop / stats["bfloat16"].median * 1e-9 / peak, " %", f" of {peak:.0f} GFLOP/s")
        widened = [kind for kind in ("float16", "bfloat16") if kind in calls and not (peak and kind == "bfloat16")]
        for kind in widened:
            yield at_least(f"{what} {kind} against float32", cases.WIDENED_OVER_FLOAT32,
                           stats["float32"].median / stats[kind].median, " of the speed")
        for peer in peers:
            if "bfloat16" in calls:
                yield at_least(f"{what} bfloat16 against {peer}", cases.HALF_OVER_BEST_PEER,
                               stats[peer].median / stats["bfloat16"].median, " ×")


def cliff(run):
    """From 1 to 64 rows over a long cache: no row may cost much more than the one before."""
    for B, H, S, D in cases.CLIFF:
        rng = np.random.default_rng(7)
        key, value = rng.standard_normal((2, B, H, S, D), dtype=np.float32)
        query = rng.standard_normal((B, H, max(cases.CLIFF_ROWS), D), dtype=np.float32)
        calls = {L: partial(fa.attention, query[:, :, :L], key, value) for L in cases.CLIFF_ROWS}
        stats = bench.interleave(calls, run.budget * 4)
        steps = {L: stats[L].median / stats[L - 1].median for L in cases.CLIFF_ROWS if L - 1 in stats}
        worst = max(steps, key=steps.get)
        over = sorted(L for L in steps if steps[L] > cases.CLIFF_STEP)
        yield at_most(f"S = {S}, D = {D}, from L to L + 1 rows, the largest step", cases.CLIFF_STEP, steps[worst],
                      " × the time", f" (to L = {worst}; past the limit: {over})")


def append(run):
    """One token for each of many sequences."""
    B, H, D = cases.APPEND
    rng = np.random.default_rng(8)
    key, value = rng.standard_normal((2, B, H, 1, D), dtype=np.float32)
    cache = fa.KVCache(B * 64, 16, H, D)
    ids = list(range(B))
    seconds = []
    for _ in range(1000):
        begin = time.perf_counter()
        cache.append(ids, key, value)
        seconds.append(time.perf_counter() - begin)
    yield at_most(f"append of one token, {B} sequences, {H} heads, D = {D}, float32", cases.APPEND_S * 1e6,
                  statistics.median(seconds) * 1e6, " µs", f" (best {min(seconds) * 1e6:.3g})")


def tiny(run):
    """One call on almost nothing: what the door costs."""
    records = run.measure(cases.TINY)
    yield from run.wrong(records)
    mine, torch = records["fastattn"], records.get("torch")
    if not mine["ok"]:
        return
    what = f"{cases.TINY}, one call"
    yield at_most(what, cases.TINY_S * 1e6, mine["median"] * 1e6, " µs")
    if torch and torch["ok"]:
        yield at_most(f"{what}, over torch's time", 1, mine["median"] / torch["median"])
    else:
        yield not_measured(f"{what}, over torch's time", "< 1", "no torch")


def forced(run):
    """The avx2 build on this machine, in a process of its own, against its own 256-bit peak."""
    rows = f"^({'|'.join(map(str, cases.FORCED_ROWS))})$"
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder, "forced.json")
        command = ["-m", "fastattn", "bench", "--contenders", "fastattn", "--rows", rows, "--json", str(saved)]
        command += ["--threads", str(run.threads), "--budget", str(run.budget)]
        done = python(command, folder, FASTATTN_ISA=cases.FORCED_ISA)
        what = f"FASTATTN_ISA={cases.FORCED_ISA}"
        if not saved.exists():
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            yield not_measured(what, f"≥ {cases.FORCED_SHARE:.0%} of its peak", reason)
            return
        for record in json.loads(saved.read_text())["records"]:
            record["row"] += f" {cases.FORCED_ISA}"
            bench.say(bench.table_line(record))
            run.records.append(record)
            if record["ok"]:
                yield share_line(f"{record['row']}, share of its own FMA peak", cases.FORCED_SHARE, record)
            else:
                yield wrong(record["row"], record["worst"])


def threads(run):
    """Two threads against one."""
    what = f"{cases.SCALING}, 2 threads against 1"
    if len(os.sched_getaffinity(0)) < 2 if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1) < 2:
        yield not_measured(what, f"≥ {cases.TWO_OVER_ONE} ×", "one CPU")
        return
    inputs = cases.SCALING.inputs()
    calls = {n: partial(fa.attention, *inputs, num_threads=n) for n in (1, 2)}
    stats = bench.interleave(calls, run.budget)
    note = f" ({stats[1].median * 1e3:.4g} and {stats[2].median * 1e3:.4g} ms)"
    yield at_least(what, cases.TWO_OVER_ONE, stats[1].median / stats[2].median, " ×", note)


def after_matmul(run):
    """One call right after each NumPy matmul, whose threads still spin; only the call is timed."""
    row = cases.AFTER_MATMUL
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((2, cases.MATMUL, cases.MATMUL), dtype=np.float32)
    product = np.empty_like(a)
    calls, before = {}, {}
    for name in ("fastattn", "torch", "onnxruntime"):
        if name in run.contenders:
            call, _ = bench.CONTENDERS[name].build(row, *row.inputs(), run.threads)
            calls |= {name: call, f"{name} after": call}
            before[f"{name} after"] = partial(np.matmul, a, b, out=product)
    stats = bench.interleave(calls, run.budget, before)
    for name in before:
        quiet, after = stats[name.removesuffix(" after")].median, stats[name].median
        line = at_most(
            f"{row}, {name} a {cases.MATMUL}×{cases.MATMUL} NumPy matmul", cases.AFTER_OVER_QUIET, after / quiet,
            " × the quiet time", f" ({quiet * 1e3:.4g} → {after * 1e3:.4g} ms)")
        if not name.startswith("fastattn"):
            line.verdict, line.must = "peer", ""
        yield line


def scratch(run):
    """Scratch a thread: it has no L and no S to depend on."""
    if getattr(_runtime, "scratch_bytes", None) is None:
        yield not_measured("scratch a thread", f"≤ {cases.SCRATCH_BYTES} bytes", "no kernel is bound")
        return
    for dtype in ("float32", "float64"):
        most, shape = max((np.max(_runtime.scratch_bytes(*s, dtype)), s) for s in cases.SCRATCH_SHAPES)
        what = f"scratch a thread, {dtype}"
        yield at_most(what, cases.SCRATCH_BYTES / 1024, most / 1024, " KiB", " (D, Dv = {}, {})".format(*shape))


def imports(run):
    """Import time beyond NumPy's; the first process only writes the byte code."""
    code = "import time, numpy; t = time.perf_counter(); import fastattn; print(time.perf_counter() - t)"
    with tempfile.TemporaryDirectory() as folder:
        seconds = [float(python(["-c", code], folder).stdout) for _ in range(8)][1:]
    note = f" ({min(seconds) * 1e3:.1f} to {max(seconds) * 1e3:.1f})"
    yield at_most("import beyond NumPy's", cases.IMPORT_S * 1e3, statistics.median(seconds) * 1e3, " ms", note)


def wheel(run):
    """Size of the wheel and time to build it (with --build)."""
    if not run.build:
        yield not_measured("wheel size and build time", "≤ 4 MB, ≤ 4 minutes", "only with --build")
        return
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "pip", "wheel", str(HERE.parent), "--no-deps", "--no-build-isolation", "-w", folder]
        begin = time.perf_counter()
        done = python(command, folder)
        seconds = time.perf_counter() - begin
        built = list(Path(folder).glob("*.whl"))
        if not built:
            reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
            yield not_measured("wheel size and build time", "≤ 4 MB, ≤ 4 minutes", reason)
            return
        yield at_most("wheel size", cases.WHEEL_BYTES / 1e6, built[0].stat().st_size / 1e6, " MB")
        yield at_most(f"build on {os.cpu_count()} CPUs", cases.BUILD_S, seconds, " s")


def differentiable(row, **options):
    """Arrays of a row, and what a backward pass is given: (grad_out, query, key, value, out, lse)."""
    arrays = row.inputs()
    out, lse = fa.attention(*arrays, causal=row.causal, return_lse=True, **options)
    return (np.random.default_rng(7).standard_normal(out.shape).astype(out.dtype), *arrays, out, lse)


def torch_backward(row, saved, threads, **options):
    """torch's backward pass over one graph, again and again; None without torch."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(threads)
    grad_out, *inputs = (torch.from_numpy(x) for x in saved[:4])
    inputs = [x.clone().requires_grad_() for x in inputs]
    attend = torch.nn.functional.scaled_dot_product_attention
    if options:
        return lambda: torch.autograd.grad(attend(*inputs, is_causal=row.causal, **options), inputs, grad_out)
    out = attend(*inputs, is_causal=row.causal)
    return lambda: torch.autograd.grad(out, inputs, grad_out, retain_graph=True)


def jax_both(row, saved):
    """JAX's forward and backward pass in one compiled function; None without JAX."""
    try:
        import jax
    except ImportError:
        return None
    grad_out, *inputs = (jax.numpy.asarray(x.swapaxes(1, 2)) for x in saved[:4])

    @jax.jit
    def both(grad_out, *inputs):
        out, backward = jax.vjp(partial(jax.nn.dot_product_attention, is_causal=row.causal), *inputs)
        return out, backward(grad_out)

    return lambda: jax.block_until_ready(both(grad_out, *inputs))


def gradient_grid(run):
    """The backward pass against torch's, forward and backward against JAX's, and its share of the FMA peak."""
    rows = [replace(row, L=min(row.L, 200)) for row in cases.GRID[:4]] if run.short else cases.GRID
    for row in bench.progress(rows):
        saved = differentiable(row)
        what = f"backward, {row}"
        mine = partial(fa.attention_backward, *saved, causal=row.causal)

        def both(row=row, saved=saved, mine=mine):
            fa.attention(*saved[1:4], causal=row.causal, return_lse=True)
            mine()

        calls = {"fastattn": mine, "both": both}
        peers = {"torch": torch_backward(row, saved, run.threads), "jax": jax_both(row, saved)}
        calls |= {name: call for name, call in peers.items() if call is not None}
        right = None
        if "torch" in calls:
            right = [x.numpy() for x in calls["torch"]()]
        elif run.short:
            right = fa.reference.attention_backward(*saved, causal=row.causal)[:3]
        if right is not None:
            worst = max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in zip(mine(), right))
            if not worst <= 1e-4:
                yield wrong(what, worst)
                continue
        if run.short:
            continue
        stats = {name: s.median for name, s in bench.interleave(calls, run.budget).items()}
        flops = 10 * row.B * row.H * row.L**2 * row.D * (0.5 if row.causal else 1)
        speed = f" ({flops / stats['fastattn'] * 1e-9:.0f} GFLOP/s)"
        if "torch" in stats:
            ratio = stats["torch"] / stats["fastattn"]
            yield at_least(f"{what} against torch", cases.GRADIENT_OVER_TORCH, ratio, " × torch", speed)
        if "jax" in stats:
            ratio = stats["jax"] / stats["both"]
            yield at_least(f"forward and {what} against JAX", cases.BOTH_OVER_JAX, ratio, " × JAX")
        limit = None if row.causal else cases.GRADIENT_SHARE.get((row.B, row.H, row.L, row.D))
        if limit and _runtime.measure_peak:
            peak = statistics.median(bench.fma_peak(run.threads) for _ in range(5))
            yield at_least(f"{what}, share of the FMA peak", 100 * limit, flops / stats["fastattn"] * 1e-7 / peak, " %",
                           f" of {peak:.0f} GFLOP/s")


def resident_peak():
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def print_backward_memory():
    saved = differentiable(cases.GRADIENT_MEMORY)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak of memory starts again
    before = resident_peak()
    grads = fa.attention_backward(*saved)
    print(resident_peak() - before - sum(x.nbytes for x in grads[:3]))


def gradient_options(run):
    """The backward pass with options against the one without; two threads on one head; memory."""
    row = cases.GRADIENT_SCALING
    saved = differentiable(row)
    stats = bench.interleave({n: partial(fa.attention_backward, *saved, num_threads=n) for n in (1, 2)}, run.budget)
    yield at_least(f"backward, {row}, two threads", cases.GRADIENT_TWO_OVER_ONE, stats[1].median / stats[2].median,
                   " × one")

    row, options = cases.GRADIENT_ROW, {"dropout_p": cases.DROPOUT_P, "seed": 1}
    saved, dropped = differentiable(row), differentiable(row, **options)

    def both(saved, **options):
        fa.attention(*saved[1:4], return_lse=True, **options)
        fa.attention_backward(*saved, **options)

    calls = {"without": partial(both, saved), "with": partial(both, dropped, **options)}
    torch = torch_backward(row, saved, run.threads, dropout_p=cases.DROPOUT_P)
    if torch:
        calls["torch"] = torch
    stats = {name: s.median for name, s in bench.interleave(calls, run.budget).items()}
    what = f"dropout {cases.DROPOUT_P}, forward and backward, {row}"
    yield at_most(f"{what} against none", cases.DROPOUT_OVER_NONE, stats["with"] / stats["without"], " ×")
    if torch:
        yield at_least(f"{what} against torch", cases.DROPOUT_OVER_TORCH, stats["torch"] / stats["with"], " × torch")

    row = cases.GRADIENT_BATCH
    bias = np.random.default_rng(8).standard_normal((row.H, row.L, row.L), dtype=np.float32)
    plain, biased = differentiable(row), differentiable(row, bias=bias)
    calls = {"without": partial(fa.attention_backward, *plain),
             "with": partial(fa.attention_backward, *biased, bias=bias)}
    stats = {name: s.median for name, s in bench.interleave(calls, run.budget).items()}
    yield at_most(f"backward, {row}, gradient of a bias shared by the batches", cases.BIAS_OVER_NONE,
                  stats["with"] / stats["without"], " ×")

    row, width = cases.GRADIENT_WINDOW
    full, narrow = differentiable(row), differentiable(row, window=width)
    calls = {"full": partial(fa.attention_backward, *full),
             "window": partial(fa.attention_backward, *narrow, window=width)}
    stats = {name: s.median for name, s in bench.interleave(calls, run.budget).items()}
    i, j = np.arange(row.L)[:, None], np.arange(row.L)
    share = float((abs(i - j) <= width).mean())
    yield at_most(f"backward, {row}, window of {width} on each side", cases.WINDOW_OVER_SHARE,
                  stats["window"] / stats["full"] / share, " × the visible share")

    row = cases.GRADIENT_MEMORY
    what = f"backward, {row}, memory beyond inputs and gradients"
    command = f"import sys; sys.path.insert(0, {str(HERE)!r}); import run; run.print_backward_memory()"
    result = python(["-c", command], HERE)
    if result.returncode:
        yield not_measured(what, f"≤ {cases.GRADIENT_BYTES >> 20} MiB", result.stderr.strip().splitlines()[-1])
    else:
        yield at_most(what, cases.GRADIENT_BYTES / 2**20, int(result.stdout) / 2**20, " MiB")


def training(run):
    """A GPT of 10 M parameters trained by fastattn's attention and by torch's: losses, and time."""
    what = "GPT, 4 layers, 4 x 512 words, 50 steps"
    try:
        import models
        import torch

        from fastattn.integrations import torch as ours
    except ImportError as missing:
        yield not_measured(what, f"≥ {cases.TRAINING_OVER_TORCH:.4g} × torch", str(missing))
        return
    torch.set_num_threads(run.threads)
    attends = {"fastattn": ours.scaled_dot_product_attention, "torch": torch.nn.functional.scaled_dot_product_attention}
    parameters, losses, attention, whole = models.train(attends)
    mine, theirs = (np.array(losses[name]) for name in ("fastattn", "torch"))
    worst = float(np.abs(mine / theirs - 1).max())
    what += f", {parameters * 1e-6:.1f} M parameters"
    yield at_most(f"{what}, losses against torch's ({mine[0]:.2f} to {mine[-1]:.2f})", cases.LOSS_TOLERANCE, worst)
    yield at_least(f"{what}, time in attention against torch's", cases.TRAINING_OVER_TORCH,
                   attention["torch"] / attention["fastattn"], " × torch",
                   f" ({attention['fastattn'] / whole['fastattn']:.0%} of {whole['fastattn']:.1f} s, "
                   f"torch {attention['torch'] / whole['torch']:.0%} of {whole['torch']:.1f} s)")


def pretrained(run):
    """Models of transformers by attn_implementation "fastattn" and by "sdpa", from end to end."""
    try:
        import models
        import torch

        import fastattn.integrations.transformers  # noqa: F401
    except ImportError as missing:
        yield not_measured("models of transformers", "faster than sdpa", str(missing))
        return
    torch.set_num_threads(run.threads)
    for S in cases.MODEL_LENGTHS:
        for name, model, inputs in bench.progress(list(models.pretrained(S))):
            model.eval()

            def by(implementation, model=model, inputs=inputs):
                models.attend_by(model, implementation)
                model(**inputs)

            with torch.no_grad():
                worst = models.largest_error(model, inputs, "fastattn")
                if not worst <= cases.MODEL_TOLERANCE:
                    yield wrong(f"{name}, {S}", worst)
                    continue
                calls = {kind: partial(by, kind) for kind in ("fastattn", "sdpa", "eager")}
                stats = {kind: s.median for kind, s in bench.interleave(calls, run.budget).items()}
            mine = stats["fastattn"]
            yield at_least(f"{name} of transformers, S = {S}, from end to end", 1.0, stats["sdpa"] / mine, " × sdpa",
                           f" ({1e3 * mine:.0f} ms, {stats['eager'] / mine:.2f} × eager)")


def sentences(run):
    """MiniLM's embeddings of sentences of uneven lengths, packed, against padded batches of peers."""
    n = cases.SENTENCES
    what = f"MiniLM, {n} sentences"
    if absent := demo.missing_packages():
        for name, least in cases.SENTENCES_OVER_PEER.items():
            yield not_measured(what, f"≥ {least:.4g} × {name}", f"{', '.join(absent)} missing")
        return
    encoder = demo.Encoder()
    tokens = encoder.tokenize(encode.texts(n))
    lengths = sorted(map(len, tokens))
    what += f" of {lengths[0]} to {lengths[-1]} tokens, median {lengths[n // 2]}"
    calls, missing = encode.calls(tokens, run.threads)
    vectors = encoder.embed_tokens(tokens)
    for (name, batch), call in calls.items():
        worst = 1 - float((call() * vectors).sum(axis=1).min())
        if not worst <= cases.COSINE_TOLERANCE:
            yield Line(f"{what}, {name} in batches of {batch}", "a cosine of 1", f"1 - {worst:.2g}", WRONG)
    with fa.threads(run.threads):
        stats = bench.interleave({"fastattn": lambda: encoder.embed_tokens(tokens), **calls}, run.budget)
    mine = stats["fastattn"].median
    for name, least in cases.SENTENCES_OVER_PEER.items():
        if name in missing:
            yield not_measured(what, f"≥ {least:.4g} × {name}", missing[name])
            continue
        best, batch = min((stats[name, batch].median, batch) for batch in encode.PEER_BATCHES)
        yield at_least(f"{what}, packed, against {name}", least, best / mine, f" × {name}",
                       f" ({1e3 * mine:.0f} ms; {name} in batches of {batch})")


def short(run):
    """Small problems, results only; and the comparator refuses results that are wrong by little."""
    row = cases.Row(1, 2, 64, 64)
    inputs, rows = row.inputs(), bench.checked_rows(row.L)
    out = bench.exact(*inputs, rows, causal=True)
    for name, bad in (("scaled", out * 1.0001), ("one row late", np.roll(out, 1, -2)), ("NaN", out + np.nan)):
        if bench.errors(bad, out, rows, inputs[2])[1] <= bench.tolerance("fastattn", row.dtype):
            yield Line(f"comparator, {name}", "refuse a wrong result", "accepted", WRONG)
    right = 0
    for row in bench.progress(cases.SHORT_GRID):
        bad = run.wrong(run.measure(row, "fastattn", "numpy"))
        right += not bad
        yield from bad
    yield at_least("small problems with right results", len(cases.SHORT_GRID), right)


CHECKS = [grid, long, options, window_peers, packed, compiling, weights, float64, decode, small_decode, paged, latent,
          half_grid, half, cliff, append, gradient_grid, gradient_options, training, pretrained, sentences, kinds.graph,
          kinds.linear, kinds.normalizers, kinds.additive, kinds.changed, layers.layers_linear, layers.layers_norm,
          layers.layers_encoder, tiny, forced, threads, after_matmul, scratch, imports, wheel]
SHORT_CHECKS = [short, options, decode, gradient_grid, kinds.graph, kinds.linear, kinds.normalizers, kinds.additive,
                layers.layers_linear, layers.layers_norm, layers.layers_encoder, scratch, imports]


def python(command, folder, **environment):
    """Run this interpreter in ``folder``, so that it imports the installed package and not a source tree."""
    flags = ["-P"] if command[0] == "-m" else []
    return subprocess.run(
        [sys.executable, *flags, *command], cwd=folder, env=os.environ | environment, capture_output=True, text=True,
        check=False)


def lines_table(lines):
    head = ("what", "must reach", "measured", "")
    cells = [(line.what, line.must, line.measured, line.verdict) for line in lines]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    rows = [head, tuple("-" * width for width in widths), *cells]
    return ["| " + " | ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) + " |" for row in rows]


def save(name, info, records, lines):
    """bench/results/NAME.md and NAME.json."""
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    text = [f"# {name}", "", *(line + "  " for line in bench.header(info)), "", *lines_table(lines), ""]
    text += [*bench.table_head(), *map(bench.table_line, records), ""]
    (folder / f"{name}.md").write_text("\n".join(text), encoding="utf-8")
    data = {"machine": info, "lines": [asdict(line) for line in lines], "records": records}
    (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--short", action="store_true", help="small problems, for CI; needs no peer")
    parser.add_argument("--only", metavar="REGEX", default="", help=f"of {' '.join(c.__name__ for c in CHECKS)}")
    parser.add_argument("--threads", type=int, default=fa.get_num_threads(), help="of every contender [%(default)s]")
    parser.add_argument("--budget", type=float, metavar="S", help="seconds of timing a row, at least [4; short: 0.02]")
    parser.add_argument("--build", action="store_true", help="also build the wheel (minutes)")
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.md and NAME.json")
    args = parser.parse_args(argv)
    if args.budget is None:
        args.budget = 0.02 if args.short else 4.0
    return args


def main(argv):
    args = parse(argv)
    status = bench.relaunch([__file__, *argv, "--threads", str(args.threads)], args.threads)
    if status is not None:
        return status
    fa.set_num_threads(args.threads)
    contenders, missing = bench.available(["fastattn", "numpy"] if args.short else bench.CONTENDERS)
    info = bench.machine(args.threads, contenders)
    print(*bench.header(info), sep="\n")
    for name, reason in missing.items():
        print(f"{name} left out: {reason}")
    print("", *bench.table_head(), sep="\n", flush=True)
    run, lines = Run(args, contenders), []
    for check in SHORT_CHECKS if args.short else CHECKS:
        if re.search(args.only, check.__name__):
            for line in check(run):
                lines.append(line)
                bench.say(f"{line.verdict}: {line.what}: {line.measured}" + f"; must be {line.must}" * bool(line.must))
    print("", *lines_table(lines), sep="\n")
    if args.save:
        save(args.save, info, run.records, lines)
    counts = {v: sum(line.verdict == v for line in lines) for v in (PASS, SHORT, WRONG, NONE)}
    print("\n" + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()))
    return 1 if counts[WRONG] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
