"""``python -m fastattn bench``: this machine's attention, by fastattn and by every peer that is installed.

Every contender is built once, outside the timing, with inputs in the layout it likes best; its result is compared with
float64; then all are timed in turn, round by round, in one run. Work counted is useful work: 4·D operations for each
visible (query, key) pair, so causal counts about half. Rows that fastattn loses are printed like the others.
"""

import argparse
import gc
import importlib
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata

import numpy as np

import fastattn as fa
from fastattn import _runtime, reference

# (B, H, L=S, D): encoders and decoders from a long sequence of few heads to many short ones, head sizes from 32 to 256
SHAPES = (
    (1, 8, 512, 64), (1, 8, 2048, 64), (1, 8, 2048, 128), (32, 12, 128, 64), (64, 8, 50, 64),
    (16, 12, 197, 64), (8, 16, 77, 80), (4, 8, 300, 32), (1, 16, 4096, 40), (2, 4, 1000, 256),
)
QUICK_SHAPES = ((1, 1, 8, 16), (64, 8, 50, 64), (8, 16, 77, 80), (1, 8, 512, 64))

SAMPLE_S = 200e-6  # a sample is at least this long, so that the clock's resolution and call (~50 ns) are lost in it
WARM_S = 0.15  # of warm-up, at least one call: XLA's first dozen calls are slow
TURN_S = 20e-3  # a contender's turn in a round: as many samples as fit, at least one
MIN_ROUNDS = 3
CHECKED_ROWS = 64  # query rows of every head that are compared with float64

# largest |out - exact| / max|value| that passes; a wrong mask or scale is off by 1e-2 and more
TOLERANCE = {
    "fastattn": {"float32": 2e-6, "float64": 1e-14, "bfloat16": 4e-3},
    "peer": {"float32": 1e-4, "float64": 1e-12, "bfloat16": 2e-2},
}


@dataclass(frozen=True)
class Row:
    """One problem: query, key and value of shape (B, H, L, D)."""

    B: int
    H: int
    L: int
    D: int
    causal: bool = False
    dtype: str = "float32"

    def __str__(self):
        extra = " causal" * self.causal + f" {self.dtype}" * (self.dtype != "float32")
        return f"{self.B},{self.H},{self.L},{self.D}{extra}"

    @property
    def flop(self):
        pairs = self.L * (self.L + 1) // 2 if self.causal else self.L * self.L
        return 4 * self.B * self.H * pairs * self.D

    def inputs(self):
        rng = np.random.default_rng(0)
        shape = self.B, self.H, self.L, self.D
        if self.dtype == "bfloat16":
            import ml_dtypes

            return [rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16) for _ in range(3)]
        return [rng.standard_normal(shape, dtype=self.dtype) for _ in range(3)]


# Contenders. A builder takes (row, query, key, value, threads) and returns the call to time, which takes no argument,
# and a function that makes the call's result a NumPy array (B, H, L, D).


def _fastattn(row, query, key, value, threads):
    fa.set_num_threads(threads)
    return partial(fa.attention, query, key, value, causal=row.causal), np.asarray


def _numpy(row, query, key, value, threads):
    """Matmul, softmax in place, matmul; the scores' memory is kept between calls. Threads: see `relaunch`."""
    scores = np.empty((row.B, row.H, row.L, row.L), row.dtype)
    key_t = key.swapaxes(-1, -2)
    scale = query.dtype.type(row.D**-0.5)
    bias = np.triu(np.full((row.L, row.L), -np.inf, row.dtype), 1) if row.causal else None

    def call():
        np.matmul(query * scale, key_t, out=scores)
        if bias is not None:
            np.add(scores, bias, out=scores)
        np.subtract(scores, scores.max(-1, keepdims=True), out=scores)
        np.exp(scores, out=scores)
        total = scores.sum(-1, keepdims=True)
        out = scores @ value
        out /= total
        return out

    return call, np.asarray


def _tensors(*arrays):
    import torch

    return [torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16) if x.dtype == "bfloat16" else torch.from_numpy(x)
            for x in arrays]


def _array(tensor):
    import torch

    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _torch(row, query, key, value, threads):
    """The fused kernel."""
    import torch

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    tensors = _tensors(query, key, value)
    return partial(torch.nn.functional.scaled_dot_product_attention, *tensors, is_causal=row.causal), _array


def _torch_written_out(row, query, key, value, threads):
    """Three operators, as models that need the weights write it."""
    import torch

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    q, k, v = (x.flatten(0, 1) for x in _tensors(query, key, value))
    k_t = k.mT
    if row.causal:
        bias, beta = torch.full((row.L, row.L), -torch.inf, dtype=q.dtype).triu(1), 1
    else:
        bias, beta = torch.zeros((), dtype=q.dtype), 0

    def call():
        scores = torch.baddbmm(bias, q, k_t, beta=beta, alpha=row.D**-0.5)
        return torch.bmm(torch.softmax(scores, -1), v)

    return call, lambda out: _array(out).reshape(query.shape)


def _onnxruntime(row, query, key, value, threads):
    """The contrib operator MultiHeadAttention, inputs and output bound: (B, L, H·D)."""
    import onnxruntime as ort
    from onnx import TensorProto, helper

    flat = [np.ascontiguousarray(x.swapaxes(1, 2)).reshape(row.B, row.L, row.H * row.D) for x in (query, key, value)]
    names = ["query", "key", "value"]
    node = helper.make_node(
        "MultiHeadAttention", names, ["out"], domain="com.microsoft", num_heads=row.H, unidirectional=int(row.causal)
    )
    info = {n: helper.make_tensor_value_info(n, TensorProto.FLOAT, flat[0].shape) for n in (*names, "out")}
    graph = helper.make_graph([node], "attention", [info[n] for n in names], [info["out"]])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, x in zip(names, flat, strict=True):
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(x))
    out = ort.OrtValue.ortvalue_from_numpy(np.zeros_like(flat[0]))
    binding.bind_ortvalue_output("out", out)
    heads = (row.B, row.L, row.H, row.D)
    return partial(session.run_with_iobinding, binding), lambda _: out.numpy().reshape(heads).swapaxes(1, 2)


def _openvino(row, query, key, value, threads):
    import openvino as ov
    from openvino import opset13

    half = row.dtype == "bfloat16"
    element = ov.Type.bf16 if half else ov.Type.f32
    parameters = [opset13.parameter(x.shape, element) for x in (query, key, value)]
    attention = opset13.scaled_dot_product_attention(*parameters, causal=row.causal)
    config = {
        "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }
    request = ov.Core().compile_model(ov.Model([attention], parameters), "CPU", config).create_infer_request()
    for i, x in enumerate((query, key, value)):
        tensor = ov.Tensor(x.view(np.uint16), x.shape, element) if half else ov.Tensor(x, shared_memory=True)
        request.set_input_tensor(i, tensor)
    return partial(request.infer, share_outputs=True), lambda out: np.array(out[0]).view(query.dtype)


def _jax(row, query, key, value, threads):
    """Compiled by XLA; layout (B, L, H, D). Threads: see `relaunch`."""
    import jax

    attention = jax.jit(partial(jax.nn.dot_product_attention, is_causal=row.causal))
    arrays = [jax.device_put(np.ascontiguousarray(x.swapaxes(1, 2))) for x in (query, key, value)]
    return lambda: attention(*arrays).block_until_ready(), lambda out: np.asarray(out).swapaxes(1, 2)


@dataclass(frozen=True)
class Contender:
    packages: tuple
    build: Callable
    dtypes: tuple = ("float32",)


CONTENDERS = {
    "fastattn": Contender(("fastattn",), _fastattn, ("float32", "float64", "bfloat16")),
    "numpy": Contender(("numpy",), _numpy, ("float32", "float64")),
    "torch": Contender(("torch",), _torch, ("float32", "float64", "bfloat16")),
    "torch-written-out": Contender(("torch",), _torch_written_out, ("float32", "float64", "bfloat16")),
    "onnxruntime": Contender(("onnxruntime", "onnx"), _onnxruntime),
    "openvino": Contender(("openvino",), _openvino, ("float32", "bfloat16")),
    "jax": Contender(("jax",), _jax),
}


def available(names=CONTENDERS):
    """Split ``names`` into those whose package imports, and {name: reason} for the others."""
    found, missing = [], {}
    for name in names:
        try:
            for package in CONTENDERS[name].packages:
                importlib.import_module(package)
            found.append(name)
        except Exception as error:  # noqa: BLE001  a peer that is installed but broken is absent too
            missing[name] = f"{type(error).__name__}: {error}"
    return found, missing


def thread_environment(threads):
    """What sets the threads of NumPy's BLAS and of XLA: both read it once, when they are loaded."""
    counts = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "NPROC")
    return dict.fromkeys(counts, str(threads)) | {"JAX_PLATFORMS": "cpu"}


def relaunch(command, threads):
    """Run ``command`` under this interpreter with `thread_environment`; its status, or None if that is set already."""
    wanted = thread_environment(threads)
    if all(os.environ.get(name) == value for name, value in wanted.items()):
        return None
    flags = ["-P"] if sys.flags.safe_path else []
    try:
        return subprocess.call([sys.executable, *flags, *command], env=os.environ | wanted)
    except KeyboardInterrupt:
        return 130


# The limits of the machine, measured by the bound kernel's own module.


def fma_peak(threads, dtype="float32"):
    """GFLOP/s of independent FMAs on ``threads`` threads; None where no kernel is bound.

    The best of five: the first has to wake the threads, and a limit is never measured too high.
    """
    measure = getattr(_runtime, "measure_peak", None)
    peaks = [measure(dtype, threads) for _ in range(5)] if measure else [None]
    return None if None in peaks else max(peaks)


def read_bandwidth(threads):
    """GB/s read from memory on ``threads`` threads; None where it can't be measured."""
    measure = getattr(_runtime, "measure_bandwidth", None)
    return measure(threads) if measure else None


# Correctness


def exact(query, key, value, rows, *, causal=False, mask=None, bias=None, softcap=None):
    """The float64 result for the query rows ``rows`` of every head. ``mask`` and ``bias`` end in axes (L, S)."""
    if mask is not None:
        mask = mask[..., rows, :]
    if causal:
        below = np.arange(key.shape[-2]) <= rows[:, None]
        mask = below if mask is None else mask & below
    if bias is not None:
        bias = bias[..., rows, :].astype(np.float64)
    query, key, value = (x.astype(np.float64) for x in (query[..., rows, :], key, value))
    return reference.attention(query, key, value, mask=mask, bias=bias, softcap=softcap)


def checked_rows(length):
    return np.unique(np.linspace(0, length - 1, min(length, CHECKED_ROWS)).astype(int))


def errors(out, expected, rows, value):
    """(RMS error over ``rows``, largest error over max|value|); both inf where shape or non-finite values are wrong."""
    if out.shape[:-2] != expected.shape[:-2] or not np.isfinite(out).all():
        return np.inf, np.inf
    difference = out[..., rows, :].astype(np.float64) - expected
    return float(np.sqrt(np.mean(difference**2))), float(np.abs(difference).max() / np.abs(value).max())


def tolerance(contender, dtype):
    return TOLERANCE["fastattn" if contender == "fastattn" else "peer"][dtype]


# Timing


@dataclass(frozen=True)
class Stats:
    """Seconds a call, over all samples of one contender."""

    best: float
    median: float
    p10: float
    p90: float
    samples: int

    @classmethod
    def of(cls, samples):
        p10, median, p90 = np.percentile(samples, [10, 50, 90])
        return cls(float(min(samples)), float(median), float(p10), float(p90), len(samples))

    @property
    def spread(self):
        return self.p90 / self.p10


def settle(limit_s=0.1):
    """Sleep until no thread of this process is busy: OpenBLAS's and others' spin for up to 30 ms after a call, on the
    cores that the next contender needs."""
    end = time.perf_counter() + limit_s
    while time.perf_counter() < end:
        busy = time.process_time()
        time.sleep(0.004)
        if time.process_time() - busy < 0.001:
            return


def _sample(call, number):
    repeat = itertools.repeat(None, number)
    begin = time.perf_counter()
    for _ in repeat:
        call()
    return (time.perf_counter() - begin) / number


def _warm_up(call, seconds):
    """Call for ``seconds`` (at least once); how many calls make a sample."""
    end = time.perf_counter() + seconds
    call()
    while time.perf_counter() < end:
        call()
    number = 1
    while (seconds := _sample(call, number)) * number < SAMPLE_S:
        number = max(2 * number, int(1.2 * SAMPLE_S / max(seconds, 1e-9)))
    return number


def _turn(call, number, before):
    """The samples of one turn. ``before`` runs, untimed, ahead of each of them."""
    call()  # threads and caches were somebody else's
    samples, end = [], time.perf_counter() + TURN_S
    while not samples or time.perf_counter() < end:
        if before is not None:
            before()
        samples.append(_sample(call, number))
    return samples


def interleave(calls, budget_s, before=None, each_round=None):
    """Time ``calls`` in turn, round by round, for about ``budget_s`` seconds and at least `MIN_ROUNDS` rounds.

    Parameters
    ----------
    calls : dict of str to callable without arguments
    budget_s : float
    before : dict of str to callable, optional
        What runs, untimed, ahead of every sample of that contender.
    each_round : callable, optional
        Called at the start of every round (to measure the machine's peak under the same conditions).

    Returns
    -------
    dict of str to Stats
    """
    before = before or {}
    names = list(calls)
    number = {}
    for name in names:
        settle()
        number[name] = _warm_up(calls[name], min(WARM_S, budget_s))
    samples = {name: [] for name in names}
    end = time.perf_counter() + budget_s
    collect = gc.isenabled()
    gc.disable()
    try:
        for n in itertools.count():
            if n >= MIN_ROUNDS and time.perf_counter() >= end:
                break
            if each_round is not None:
                settle()
                each_round()
            for name in names[n % len(names) :] + names[: n % len(names)]:
                settle()
                samples[name] += _turn(calls[name], number[name], before.get(name))
    finally:
        if collect:
            gc.enable()
    return {name: Stats.of(values) for name, values in samples.items()}


def measure(row, contenders, threads, budget_s, note=print):
    """Build, check and time ``contenders`` on ``row``; a list of records (dicts), fastest first, wrong ones last.

    ``note`` takes a line of text about a contender that could not be built.
    """
    inputs = row.inputs()
    rows = checked_rows(row.L)
    expected = exact(*inputs, rows, causal=row.causal)
    calls, records = {}, {}
    for name in contenders:
        if row.dtype not in CONTENDERS[name].dtypes:
            continue
        try:
            call, to_array = CONTENDERS[name].build(row, *inputs, threads)
            rms, worst = errors(to_array(call()), expected, rows, inputs[2])
        except Exception as error:  # noqa: BLE001  whatever a peer raises, the others go on
            note(f"{row}: {name} left out: {type(error).__name__}: {error}")
            if name != "fastattn":
                continue
            rms = worst = np.inf
        ok = worst <= tolerance(name, row.dtype)
        records[name] = {"row": str(row), "contender": name, "ok": ok, "rms": rms, "worst": worst}
        if ok:
            calls[name] = call
        else:
            limit = tolerance(name, row.dtype)
            note(f"{row}: {name} is WRONG: largest error {worst:.2g} of the largest value, allowed {limit:.0e}")
    peaks = []
    stats = interleave(calls, budget_s, each_round=lambda: peaks.append(fma_peak(threads, row.dtype))) if calls else {}
    peak = float(np.median(peaks)) if peaks and peaks[0] else None
    for name, s in stats.items():
        gflops = row.flop / s.median / 1e9
        records[name] |= vars(s) | {"gflops": gflops, "peak": peak, "share": gflops / peak if peak else None}
    for record in records.values():
        if "fastattn" in stats and "median" in record:
            record["over_fastattn"] = record["median"] / stats["fastattn"].median
        if "torch" in records and records["torch"]["rms"] > 0:
            record["rms_over_torch"] = record["rms"] / records["torch"]["rms"]
    return sorted(records.values(), key=lambda r: r.get("median", np.inf))


# Output


def machine(threads, contenders=CONTENDERS):
    """What a result means nothing without: processor, ISA, threads, versions, load, date."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), cpu)
    except OSError:
        pass
    versions = {"python": platform.python_version()}
    for package in dict.fromkeys(("fastattn", "numpy", *(p for name in contenders for p in CONTENDERS[name].packages))):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = getattr(sys.modules.get(package), "__version__", "unknown")
    return {
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "isa": fa.isa(),
        "threads": threads,
        "fma_peak_float32": fma_peak(threads),
        "read_bandwidth": read_bandwidth(threads),
        "system": platform.platform(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "versions": versions,
    }


def header(info):
    """`machine` as lines of text."""
    limits = [f"{info['isa']}", f"{info['threads']} thread" + "s" * (info["threads"] != 1)]
    if info["fma_peak_float32"]:
        limits.append(f"FMA peak {info['fma_peak_float32']:.0f} GFLOP/s (float32)")
    if info["read_bandwidth"]:
        limits.append(f"memory read at {info['read_bandwidth']:.1f} GB/s")
    return [
        f"{info['cpu']}, {info['cpus']} CPUs, {info['system']}, load {info['load']}, {info['date']}",
        ", ".join(limits),
        ", ".join(f"{name} {version}" for name, version in info["versions"].items()),
    ]


COLUMNS = (
    ("B,H,L=S,D", 26), ("contender", 17), ("best ms", 9), ("median ms", 9), ("p90/p10", 7), ("GFLOP/s", 7),
    ("of peak", 7), ("over fastattn", 13), ("RMS error", 9), ("over torch's", 12),
)


def _line(cells):
    return "| " + " | ".join(f"{cell:<{width}}" for cell, (_, width) in zip(cells, COLUMNS, strict=True)) + " |"


def table_head():
    return [_line([name for name, _ in COLUMNS]), _line(["-" * width for _, width in COLUMNS])]


def table_line(record):
    def cell(name, pattern, factor=1):
        value = record.get(name)
        return "" if value is None else format(value * factor, pattern)

    spread = f"{record['p90'] / record['p10']:.2f}" if "p10" in record else ""
    return _line([
        record["row"], record["contender"], cell("best", ".4g", 1e3) if record["ok"] else "WRONG",
        cell("median", ".4g", 1e3), spread, cell("gflops", ".4g"), cell("share", ".0%"), cell("over_fastattn", ".2f"),
        cell("rms", ".2e"), cell("rms_over_torch", ".2f"),
    ])


def plot(records, path):
    """Bars of the share of the FMA peak (GFLOP/s where there is no peak), one group a row."""
    from matplotlib.figure import Figure

    records = [r for r in records if "median" in r]
    labels = list(dict.fromkeys(r["row"] for r in records))
    names = [name for name in CONTENDERS if any(r["contender"] == name for r in records)]
    share = all(r["share"] for r in records)
    figure = Figure(figsize=(8, 1 + 0.13 * len(labels) * (len(names) + 1)), layout="constrained")
    axes = figure.subplots()
    height = 1 / (len(names) + 1)
    for i, name in enumerate(names):
        mine = [r for r in records if r["contender"] == name]
        places = [labels.index(r["row"]) + i * height for r in mine]
        axes.barh(places, [100 * r["share"] if share else r["gflops"] for r in mine], height, align="edge", label=name)
    axes.set_yticks([i + 0.5 * (1 - height) for i in range(len(labels))], labels)
    axes.invert_yaxis()
    axes.set_xlabel("% of the FMA peak" if share else "GFLOP/s")
    axes.set_title("Attention, (B, H, L=S, D); useful work only")
    axes.legend()
    figure.savefig(path, dpi=150)


def progress(rows, write=sys.stderr.write):
    """``rows`` behind a tqdm bar, or behind plain lines where tqdm is not installed."""
    rows = list(rows)
    try:
        from tqdm import tqdm
    except ImportError:
        for i, row in enumerate(rows, 1):
            write(f"[{i}/{len(rows)}] {row}\n")
            yield row
        return
    with tqdm(rows, file=sys.stderr, leave=False, disable=None) as bar:
        for row in bar:
            bar.set_description(str(row))
            yield row


def say(text):
    """Print a line without breaking a tqdm bar on the same terminal."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is None:
        print(text, flush=True)
    else:
        tqdm.tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m fastattn bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few small rows, about 20 seconds")
    parser.add_argument("--threads", type=int, default=fa.get_num_threads(), help="of every contender [%(default)s]")
    parser.add_argument("--rows", type=re.compile, metavar="REGEX", help="only rows that match: '2048,64( causal)?$'")
    parser.add_argument("--contenders", metavar="A,B", help=f"of {','.join(CONTENDERS)}")
    parser.add_argument("--budget", type=float, metavar="S", help="seconds of timing a row, at least [4; quick: 0.6]")
    parser.add_argument("--json", metavar="FILE", help="save every figure")
    parser.add_argument("--plot", metavar="FILE", help="save a bar chart (needs matplotlib)")
    args = parser.parse_args(argv)
    args.contenders = args.contenders.split(",") if args.contenders else list(CONTENDERS)
    if unknown := set(args.contenders) - set(CONTENDERS):
        parser.error(f"--contenders must be of {','.join(CONTENDERS)}, got {','.join(sorted(unknown))}")
    if args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    shapes = QUICK_SHAPES if args.quick else SHAPES
    rows = [Row(*shape, causal) for shape in shapes for causal in (False, True)]
    args.rows = [row for row in rows if args.rows is None or args.rows.search(str(row))]
    if not args.rows:
        parser.error("--rows must match one of " + "; ".join(map(str, rows)))
    if args.budget is None:
        args.budget = 0.6 if args.quick else 4.0
    return args


def main(argv=None):
    """Run the bench; 1 if any result was wrong, else 0."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse(argv)
    status = relaunch(["-m", "fastattn", "bench", *argv, "--threads", str(args.threads)], args.threads)
    if status is not None:
        return status
    contenders, missing = available(args.contenders)
    info = machine(args.threads, contenders)
    print(*header(info), sep="\n")
    for name, reason in missing.items():
        print(f"{name} left out: {reason}")
    print("", *table_head(), sep="\n", flush=True)
    records = []
    for row in progress(args.rows):
        new = measure(row, contenders, args.threads, args.budget, note=say)
        for record in new:
            say(table_line(record))
        records += new
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"machine": info, "records": records}, file, indent=1)
    if args.plot:
        try:
            plot(records, args.plot)
        except ImportError as error:
            print(f"no plot: {error}")
    wrong = [r for r in records if not r["ok"]]
    print(f"\n{len(records)} results, each compared with float64: {len(wrong)} wrong")
    return 1 if wrong else 0
