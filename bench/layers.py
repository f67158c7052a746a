"""The rows of layers: products by packed weights, norms, and a whole encoder, against NumPy and torch.

Each is a check of `run.py`.
"""

import statistics
from functools import partial

import cases
import numpy as np
from kinds import largest_error
from lines import at_least, not_measured, wrong

import fastattn as fa
from fastattn import bench, nn


def torch_of(run):
    """The torch module, set up for this run, and None; or None and the reason why it is missing."""
    if run.short:
        return None, "results only"
    try:
        import torch
    except ImportError as missing:
        return None, str(missing)
    torch.set_num_threads(run.threads)
    torch.set_grad_enabled(False)
    return torch, None


def layers_linear(run):
    """Linear layers: share of the FMA peak; against NumPy's matmul and torch's linear; bfloat16 weights beside."""
    torch, missing = torch_of(run)
    right = 0
    rows = cases.SHORT_LINEAR_LAYERS if run.short else cases.LINEAR_LAYERS
    for M, K, N in bench.progress(rows):
        rng = np.random.default_rng(12)
        x, bias = rng.standard_normal((M, K), np.float32), rng.standard_normal(N, np.float32)
        weight = rng.standard_normal((N, K), np.float32) / np.float32(K**0.5)
        calls = {name: partial(fa.linear, x, fa.pack_weight(weight, name), bias) for name in ("float32", "bfloat16")}
        exact = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
        what = f"linear, (M, K, N) = {M, K, N}"
        errors = {name: largest_error(call(), exact) for name, call in calls.items()}
        bad = [wrong(f"{what}, {name} weights", error) for name, error in errors.items()
               if not error <= cases.LAYER_TOLERANCE[name]]
        yield from bad
        right += not bad
        if bad or run.short:
            continue
        calls["NumPy"] = lambda x=x, weight=weight, bias=bias: x @ weight.T + bias
        if torch:
            calls["torch"] = partial(torch.nn.functional.linear, *map(torch.from_numpy, (x, weight, bias)))
        peaks = []
        times = {name: s.median for name, s in bench.interleave(
            calls, run.budget, each_round=lambda peaks=peaks: peaks.append(bench.fma_peak(run.threads))).items()}
        speeds = {name: 2e-9 * M * K * N / seconds for name, seconds in times.items()}
        mine = speeds["float32"]
        if M >= cases.LINEAR_LAYER_ROWS:
            must, of_peak = 100 * cases.LINEAR_LAYER_SHARE, f"{what}, share of the FMA peak"
            if None in peaks:
                yield not_measured(of_peak, f"≥ {must:.4g} %", f"{mine:.4g} GFLOP/s, no peak measured")
            else:
                peak = statistics.median(peaks)
                yield at_least(of_peak, must, 100 * mine / peak, " %", f" of {peak:.0f} GFLOP/s")
        must = cases.LINEAR_LAYER_OVER_PEER if M > 1 else 1.0
        note = f" ({times['float32'] * 1e6:.4g} µs, {mine:.4g} GFLOP/s; bfloat16 weights {speeds['bfloat16']:.4g})"
        for peer in "NumPy", "torch":
            if peer in times:
                yield at_least(f"{what}, against {peer}", must, times[peer] / times["float32"], f" × {peer}", note)
            else:
                yield not_measured(f"{what}, against {peer}", f"≥ {must:.4g} × {peer}", missing)
    if run.short:
        yield at_least("small linear layers with right results", len(rows), right)


def layers_norm(run):
    """LayerNorm and RMSNorm, and LayerNorm of a sum, against NumPy written out and torch."""
    torch, missing = torch_of(run)
    M, N = cases.SHORT_NORM if run.short else cases.NORM
    rng = np.random.default_rng(13)
    x, y = rng.standard_normal((2, M, N), np.float32)
    layer, rms = nn.LayerNorm(N), nn.RMSNorm(N)
    weight, bias = rng.standard_normal((2, N), np.float32)
    layer.weight, layer.bias, rms.weight = weight, bias, weight

    def layer_norm(x):
        d = x - x.mean(-1, keepdims=True)
        d /= np.sqrt(np.square(d).mean(-1, keepdims=True) + layer.eps)
        d *= weight
        d += bias
        return d

    def rms_norm(x):
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + np.finfo(np.float32).eps) * weight

    calls = {"LayerNorm": (partial(layer, x), partial(layer_norm, x)),
             "LayerNorm of a sum": (partial(layer.of_sum, x, y), lambda: layer_norm(x + y)),
             "RMSNorm": (partial(rms, x), partial(rms_norm, x))}
    wide, other = x.astype(np.float64), y.astype(np.float64)
    exact = dict(zip(calls, (layer_norm(wide), layer_norm(wide + other), rms_norm(wide))))
    peers = {}
    if torch:
        a, b, w, c = map(torch.from_numpy, (x, y, weight, bias))
        normalise = torch.nn.functional.layer_norm
        peers = {"LayerNorm": partial(normalise, a, (N,), w, c),
                 "LayerNorm of a sum": lambda: normalise(a + b, (N,), w, c),
                 "RMSNorm": partial(torch.nn.functional.rms_norm, a, (N,), w)}
    right = 0
    for name, (mine, numpy) in calls.items():
        what = f"{name}, {M} rows of {N}"
        out = mine()
        worst = largest_error(out[0] if isinstance(out, tuple) else out, exact[name])
        if not worst <= cases.LAYER_TOLERANCE["float32"]:
            yield wrong(what, worst)
            continue
        right += 1
        if run.short:
            continue
        of = {"mine": mine, "NumPy": numpy} | ({"torch": peers[name]} if peers else {})
        times = {which: s.median for which, s in bench.interleave(of, run.budget).items()}
        moved = x.nbytes * (4 if name == "LayerNorm of a sum" else 2)
        note = f" ({times['mine'] * 1e3:.3g} ms, {moved / times['mine'] * 1e-9:.3g} GB/s)"
        for peer in "NumPy", "torch":
            if peer in times:
                yield at_least(f"{what}, against {peer}", 1.0, times[peer] / times["mine"], f" × {peer}", note)
            else:
                yield not_measured(f"{what}, against {peer}", f"≥ 1 × {peer}", missing)
    if run.short:
        yield at_least("small norms with right results", len(calls), right)


def drawn_weights(model, rng):
    """A state for a model: matrices that keep the size of what they multiply, and vectors near to those it has."""
    state = {}
    for name, old in model.state_dict().items():
        drawn = rng.standard_normal(old.shape, np.float32)
        state[name] = drawn / np.float32(old.shape[-1] ** 0.5) if old.ndim > 1 else old + np.float32(0.1) * drawn
    return state


def layers_encoder(run):
    """A TransformerEncoder against torch's, with and without its fast path, in inference mode; bfloat16 weights."""
    torch, missing = torch_of(run)
    B, S, width, heads, inner, depth = size = cases.SHORT_ENCODER if run.short else cases.ENCODER

    def encoder(dtype="float32"):
        layer = nn.TransformerEncoderLayer(width, heads, inner, batch_first=True, dtype=dtype)
        return nn.TransformerEncoder(layer, depth)

    rng = np.random.default_rng(14)
    x = rng.standard_normal((B, S, width), np.float32)
    state = drawn_weights(encoder(), rng)
    models = {"float32": encoder(), "bfloat16": encoder().pack("bfloat16"), "float64": encoder("float64")}
    for model in models.values():
        model.load_state_dict(state)
    what = f"encoder, (B, S, width, heads, ffn, layers) = {size}"
    exact = models.pop("float64")(x.astype(np.float64))
    calls = {name: partial(model, x) for name, model in models.items()}
    if torch:
        layer = torch.nn.TransformerEncoderLayer(width, heads, inner, batch_first=True)
        theirs = torch.nn.TransformerEncoder(layer, depth).eval()
        theirs.load_state_dict({name: torch.from_numpy(w) for name, w in state.items()})
        tensor = torch.from_numpy(x)

        def of_torch(fast):
            torch.backends.mha.set_fastpath_enabled(fast)
            with torch.inference_mode():
                return theirs(tensor).numpy()

        calls |= {"torch": partial(of_torch, True), "torch, no fast path": partial(of_torch, False)}
    errors = {name: largest_error(call(), exact) for name, call in calls.items()}
    bad = [wrong(f"{what}, {name}", error) for name, error in errors.items()
           if not error <= cases.ENCODER_TOLERANCE["bfloat16" if name == "bfloat16" else "float32"]]
    yield from bad
    if run.short:
        yield at_least("small encoders with right results", len(calls), len(calls) - len(bad))
    if run.short or bad:
        return
    if not torch:
        for name, limit in cases.ENCODER_OVER_TORCH.items():
            yield not_measured(f"{what}, {name} weights", f"≥ {limit:.4g} × torch", missing)
        return
    times = {name: s.median for name, s in bench.interleave(calls, run.budget).items()}
    torch.backends.mha.set_fastpath_enabled(True)
    best = min((name for name in times if name.startswith("torch")), key=times.get)
    flops = 2 * depth * B * S * width * (4 * width + 2 * inner + 2 * S)
    for name, limit in cases.ENCODER_OVER_TORCH.items():
        note = (f" ({times[name] * 1e3:.4g} against {times[best] * 1e3:.4g} ms of its "
                f"{'fast' if best == 'torch' else 'usual'} path, {flops / times[name] * 1e-9:.4g} GFLOP/s, "
                f"error {errors[name]:.1g})")
        yield at_least(f"{what}, {name} weights", limit, times[best] / times[name], " × torch", note)
