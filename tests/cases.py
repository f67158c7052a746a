"""Inputs, the a-priori error bound, THE table of tolerances, and the comparator that every test goes through."""

import copy
import zlib
from typing import NamedTuple

import numpy as np

import fastattn as fa
from fastattn import checks, gradient, reference

# --- tolerances: nothing here is tuned; a test that fails shows an error in the code or in the analysis ---

UNIT_ROUNDOFF = {np.dtype(np.float32): 2.0**-24, np.dtype(np.float64): 2.0**-53}
EXACT_IN = {np.dtype(np.float32): np.float64, np.dtype(np.float64): np.longdouble}  # arithmetic that counts as exact
EXP_ULP = 1  # E: largest error of exp
KEY_BLOCK = 96  # keys summed from zero before they join the running sum
SPLIT = 2112  # keys of few rows that are summed apart and then merged
FLOAT64_STANDARD = 5e-16  # float64 on the standard shapes: error relative to sum p|v|
DIGITS = {"float16": (11, -14), "bfloat16": (8, -126)}  # bits of precision and exponent of the smallest normal number

LANES = 64  # rows of a block, whose contributions to the gradient of a key are summed from zero
SMALLEST = 2.0**-149  # what a weight may lose where it is denormal

FEW, FEW_FLOAT64 = 40, 32  # the largest number of rows that go the way of few

# Products of bfloat16 pairs, for many rows: weights are rounded to bfloat16; a denormal operand or sum counts as 0.
PAIRS_ISA = "avx512_bf16"
PAIRS_ROUNDOFF, PAIRS_TINY = 2.0**-8, 2.0**-126


def generator(seed, *case):
    """A generator of its own for every case."""
    return np.random.default_rng([seed, zlib.crc32(repr(case).encode())])


def inputs(rng, lead, H, Hkv, L, S, D, Dv, dtype=np.float32):
    """Standard normal query (*lead, H, L, D), key (*lead, Hkv, S, D) and value (*lead, Hkv, S, Dv)."""
    shapes = (*lead, H, L, D), (*lead, Hkv, S, D), (*lead, Hkv, S, Dv)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def ulp(x, dtype):
    """The spacing of a 16-bit dtype's numbers at |x|, that of its denormal numbers included."""
    digits, smallest = DIGITS[np.dtype(dtype).name]
    _, exponent = np.frexp(np.maximum(np.abs(np.asarray(x, np.float64)), 2.0**smallest))
    return np.ldexp(1.0, exponent - digits)


def takes_pairs(problem, batch):
    """Whether the rows of this batch are multiplied in pairs of bfloat16."""
    if fa.isa() != PAIRS_ISA or problem.reduce or problem.query.shape[-1] % 2 or not 1e-30 < problem.scale < 1e30:
        return False
    rows = problem.L if problem.query_lengths is None else min(problem.L, problem.query_lengths[batch])
    names = {array.dtype.name for array in (problem.query, problem.key, problem.value)}
    return names == {"bfloat16"} and (rows > FEW or problem.one_path)


class Bound(NamedTuple):
    """For each element of out, in the caller's shape, and of lse: how far it may be from exact; and sum_k p_k |v_k|."""

    out: np.ndarray
    lse: np.ndarray
    magnitude: np.ndarray


def exact(query, key, value, **options):
    """(out, lse) by the reference in wider arithmetic, not rounded to query's dtype."""
    problem = copy.copy(checks.problem(query, key, value, **options))
    wide = EXACT_IN[checks.compute_dtype(problem.query.dtype)]
    problem.out = np.full(problem.out.shape, np.nan, wide)
    problem.lse = np.full(problem.out.shape[:-1], np.nan, wide)
    reference.forward(problem, wide)
    shape = problem.returned.shape
    return problem.out.reshape(shape), problem.lse.reshape(shape[:-1])


def bound(query, key, value, **options):
    """The a-priori `Bound` of these arguments, computed in float64 for float64 queries, else float32, of roundoff u:

        |out - exact| <= sum_k p_k |v_k| (2 max_k delta_k + (2 E + 2 + c) u)
        |lse - exact| <= max_k delta_k + (2 E + 2 + c) u + 4 u (|m| + |log l|)
        delta_k = gamma_{D+2} (|scale| sum |q||k| + |bias|) + 4 u |softcapped score| + u |s_k - m|

    over the visible keys and the sink. delta_k is the error of s_k - m: of the dot product, the scale and the sum with
    the bias; of the few operations of the softcap, whose derivative is at most 1; of the subtraction. c is the depth of
    the sum: a block of keys, then a term for each block; where few rows have their keys split, a weight and a sum more
    for each split. Denormal weights and products have an absolute error.

    Inputs of 16 bits count as they are: they are widened exactly. What is written in 16 bits is rounded once more, by
    half an ulp of its dtype at the computed number; no mean of values rounds past the largest of them. Products of
    bfloat16 pairs take weights rounded to bfloat16, which adds 2^-8 sum_k p_k |v_k|, and lose what is denormal.
    """
    problem = checks.problem(query, key, value, **options)
    inside = checks.compute_dtype(problem.query.dtype)
    u = UNIT_ROUNDOFF[inside]
    S, D = problem.key.shape[-2:]
    gamma = (D + 2) * u / (1 - (D + 2) * u)
    sums = (2 * EXP_ULP + 2 + KEY_BLOCK + -(-S // KEY_BLOCK)) * u
    if problem.dropout:
        sums += 2 * u  # its factor, rounded and multiplied
    if S > SPLIT:
        sums += (2 * EXP_ULP + 2 + -(-S // SPLIT)) * u

    magnitude = np.empty(problem.out.shape)
    out, lse = np.empty(magnitude.shape), np.empty(magnitude.shape[:-1])
    with np.errstate(all="ignore"):
        for batch, head, kv_head in reference.heads(problem):
            scores, visible = reference.logits(problem, batch, head, kv_head, np.float64)
            sink = reference.sink(problem, head, np.float64)
            weights, m, total = reference.softmax(scores, visible, sink)
            if problem.dropout:
                weights = weights * reference.dropout(problem, batch, head)
            q, k = abs(problem.query[head].astype(np.float64)), abs(problem.key[kv_head].astype(np.float64))
            values = problem.value[kv_head].astype(np.float64)
            v = abs(values)
            bias = 0 if problem.bias is None else problem.bias_of(head).astype(np.float64)
            pairs = takes_pairs(problem, batch)
            denormal = PAIRS_TINY if pairs else float(np.finfo(inside).smallest_subnormal)

            products = abs(problem.scale) * (q @ k.T)
            if problem.softcap:
                products[np.isinf(products)] = 0  # a score of exactly +-softcap
            delta = gamma * (products + abs(bias)) + u * abs(scores - m[:, None])
            if problem.softcap:
                delta += 4 * u * abs(scores - bias)
            if pairs:
                lost_q, lost_k = (np.where(x < PAIRS_TINY, x, 0) for x in (q, k))
                lost = D * PAIRS_TINY
                if lost_q.any() or lost_k.any():
                    lost = lost + lost_q @ k.T + q @ lost_k.T
                delta += abs(problem.scale) * lost
            # A logit of -inf weighs exactly 0.
            worst = delta.max(axis=1, initial=0, where=visible & (scores != -np.inf))
            if sink is not None and sink != -np.inf:
                worst = np.maximum(worst, u * abs(sink - m))
            magnitude[head] = reference.weighted_sum(weights, visible, v)
            tiny = problem.keep * denormal
            tiny = tiny * (reference.weighted_sum(visible.astype(float), visible, v) + visible.sum(axis=1)[:, None])
            out[head] = magnitude[head] * (2 * worst + sums)[:, None] + tiny
            if pairs:
                out[head] += magnitude[head] * PAIRS_ROUNDOFF * (1 + 2 * worst + sums)[:, None]
                out[head] += reference.weighted_sum(weights, visible, np.where(v < PAIRS_TINY, v, 0))
            if problem.out.dtype.name in DIGITS:
                # Past a power of two the spacing doubles, but what lies just past it is rounded back to it.
                size, error = abs(reference.weighted_sum(weights, visible, values)), out[head]
                below, above = (ulp(np.where(np.isfinite(x), x, 0), problem.out.dtype) / 2
                                for x in (size, size + error))
                out[head] = error + np.maximum(below, np.minimum(above, error))
            lse[head] = worst + sums + 4 * u * (abs(m) + abs(np.log(total)))
    shape = problem.returned.shape
    return Bound(out.reshape(shape), lse.reshape(shape[:-1]), magnitude.reshape(shape))


def widened(*arrays, **options):
    """The same numbers in float64."""
    wide = {name: x.astype(np.float64) if name in ("bias", "sinks", "grad_lse") and isinstance(x, np.ndarray) else x
            for name, x in options.items()}
    return [x.astype(np.float64) for x in arrays], wide


def exact_gradients(*saved, backward=reference.attention_backward, **options):
    """The `fa.Gradients` of saved results by the reference, in float64 and not rounded."""
    arrays, options = widened(*saved[:6], **options)
    return backward(*arrays, *saved[6:], **options)


def gradient_bound(*saved, packed=None, **options):
    """How far each element of the gradients of query, key, value and of a bias that is an array may be from exact.

    With the saved out and lse as they are, and the delta_k of `bound`, computed in arithmetic of roundoff u:

        |p - exact|  <= p e_p                          e_p = delta_k + 3 u |lse| + (2 E + 2) u
        |dz - exact| <= p (|grad_out| |v| + |delta|) (e_p + gamma_{Dv+4})
        |ds - exact| <= that + |dz| (2 delta_k / softcap + 12 u)                              with a softcap

    where |delta| is sum |grad_out| |out| + |grad_lse|. A sum of n such terms x adds n u sum |x|, where n is the depth
    of the sum: LANES or KEY_BLOCK at once and a term for each block, every term of a bias' gradient. float64 counts
    twice, for what it is compared with.
    """
    u = UNIT_ROUNDOFF[checks.compute_dtype(np.asarray(saved[1]).dtype)] * (2 if saved[1].dtype == np.float64 else 1)
    arrays, options = widened(*saved, **options)
    p = checks.gradient_problem(*arrays, packed=packed, **options)
    for name in p.returned.keys() & {"query", "key", "value", "bias"}:
        p.returned[name][...] = 0
    for one in [p] if packed is None else p.sequences():
        _add_gradient_bounds(one, u)
    return gradient.gradients(p, *arrays[1:4], options.get("bias"), None)


def _add_gradient_bounds(p, u):
    L, S, D, Dv = p.L, p.S, p.query.shape[-1], p.value.shape[-1]
    group = p.query.shape[-3] // max(1, p.key.shape[-3])
    blocks_q, blocks_k = -(-L // LANES), -(-S // KEY_BLOCK)
    terms = max(1, p.query.shape[-3] * int(np.prod(p.query.shape[:-3])) * (L + S))
    for batch, head, kv_head in reference.heads(p):
        with np.errstate(all="ignore"):
            scores, visible = reference.logits(p, batch, head, kv_head, np.float64)
            q, g, out = (abs(x[head]) for x in (p.query, p.grad_out, p.out))
            k, v = (abs(x[kv_head]) for x in (p.key, p.value))
            lse = p.lse[head][:, None]
            weight = np.where(visible, np.exp(scores - lse), 0)
            stay = reference.dropout(p, batch, head) if p.dropout else 1
            products = abs(p.scale) * (q @ k.T)
            bias = 0 if p.bias is None else p.bias_of(head)
            delta = (D + 2) * u * (products + abs(bias)) + u * abs(scores - lse)
            if p.softcap:
                delta += 4 * u * abs(scores - bias)
            error_p = delta + 3 * u * abs(lse) + (2 * EXP_ULP + 2) * u
            of_row = (g * out).sum(axis=1) + (0 if p.grad_lse is None else abs(p.grad_lse[head]))
            dp = stay * (g @ v.T) + of_row[:, None]
            dz = np.where(visible, weight * dp, 0)
            error = np.where(visible, dz * (error_p + (Dv + 6) * u) + SMALLEST * dp, 0)
            reference._add_bias_gradient(p, head, error + dz * terms * u)
            if p.softcap:
                error = error + np.where(visible, dz * (2 * delta / p.softcap + 12 * u), 0)
            along = (LANES + blocks_q * group + 4) * u
            # a denormal scale or result is rounded by up to SMALLEST
            across = (KEY_BLOCK + blocks_k + 4) * u
            p.grad_query[head] += (abs(p.scale) * (error + dz * across) + SMALLEST * dz) @ k + SMALLEST
            p.grad_key[kv_head] += (abs(p.scale) * (error + dz * along) + SMALLEST * dz).T @ q + SMALLEST
            error_p = np.where(visible, stay * (weight * (error_p + along) + SMALLEST), 0)
            p.grad_value[kv_head] += error_p.T @ g + SMALLEST


def assert_gradients(actual, exact, bound, context):
    """Fail unless the gradients of query, key, value and of a bias that is an array are within the bound."""
    for name in ("query", "key", "value", "bias"):
        part, right, allowed = (getattr(x, name) for x in (actual, exact, bound))
        if part is None:
            continue
        if part.dtype.name in DIGITS:
            allowed = allowed + ulp(abs(right) + allowed, part.dtype) / 2
        assert_close(part, right, allowed, {**context, "gradient": name})


def assert_close(actual, exact, bound, context):
    """Fail unless |actual - exact| <= bound everywhere, NaN is where NaN is due, and Inf where that Inf is.

    `context` (a mapping: the case, its seed, ...) is printed with the ISA and the worst element.
    """
    context = {"isa": fa.isa(), **context}
    where = ", ".join(f"{name}={value}" for name, value in context.items())
    actual, exact = np.asarray(actual), np.asarray(exact)
    if actual.dtype.name in DIGITS:
        actual = actual.astype(np.float64)
    assert actual.shape == exact.shape, f"{where}: shape {actual.shape}, exact {exact.shape}"
    bound = np.broadcast_to(bound, exact.shape)
    with np.errstate(all="ignore"):
        error = abs(actual - exact)
        same = (actual == exact) | (np.isnan(actual) & np.isnan(exact))
        ratio = np.where(same, 0, np.where(np.isfinite(error) & np.isfinite(bound), error / bound, np.inf))
    if not (ratio <= 1).all():
        worst = tuple(int(i) for i in np.unravel_index(ratio.argmax(), ratio.shape))
        raise AssertionError(
            f"{where}: {int((ratio > 1).sum())} of {ratio.size} elements are wrong; worst at {worst}: "
            f"actual {actual[worst]}, exact {exact[worst]}, bound {bound[worst]:.3g}, error/bound {ratio[worst]:.3g}")
