"""Inputs, the a-priori error bound, THE table of tolerances, and the comparator that every test goes through."""

import copy
import zlib
from typing import NamedTuple

import numpy as np

import fastattn as fa
from fastattn import additive, checks, gradient, reference

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


def few_rows(D, *dtypes, scale=1.0):
    """Rows of a sequence up to which they go the way of few, as in the kernels: `few_rows` of few_tiles.pxi.

    dtypes: of query, key and value, where they differ. Scales that are not positive keep bfloat16 from going in pairs.
    """
    names, isa = {np.dtype(dtype).name for dtype in dtypes}, fa.isa()
    n = 24 if D >= 64 else 12 if D >= 32 else 8
    if not isa.startswith("avx512"):
        n = (12 if isa in ("avx2", "neon") else 32) if D in (64, 128) else 4
    pairs = isa == PAIRS_ISA and names == {"bfloat16"} and D % 2 == 0 and 1e-30 < scale < 1e30
    return n // 2 if pairs or "float64" in names else n


def takes_pairs(problem, batch):
    """Whether the rows of this batch are multiplied in pairs of bfloat16."""
    D = problem.query.shape[-1]
    if fa.isa() != PAIRS_ISA or problem.reduce or problem.dropout or D % 2 or not 1e-30 < problem.scale < 1e30:
        return False
    if problem.normalizer != checks.SOFTMAX or problem.additive is not None or problem.score_mod is not None:
        return False
    rows = problem.L if problem.query_lengths is None else min(problem.L, problem.query_lengths[batch])
    names = {array.dtype.name for array in (problem.query, problem.key, problem.value)}
    return names == {"bfloat16"} and (rows > few_rows(D, *names) or problem.one_path)


class Bound(NamedTuple):
    """For each element of out, in the caller's shape, and of lse: how far it may be from exact; and sum_k p_k |v_k|."""

    out: np.ndarray
    lse: np.ndarray
    magnitude: np.ndarray


def tanh_errors(problem, head, q, k, u):
    """For a query row at a time: tanh(q + k + b) of all keys (S, D), how far it may be off, and its slope.

        |t' - t| <= 2 ulp + |x' - x| slope          x = (q + b) + k,  |x' - x| <= u (|q + b| + |x|)

    The slope 1 - t^2 <= 4 exp(-2 |x|) is taken at the nearest place to 0 that x' may have; no tanh is off by more
    than 2.
    """
    bias = 0 if problem.additive[1] is None else problem.additive[1][head[-1]].astype(np.float64)
    for row in q:
        x = row + bias + k
        off = u * (abs(x) + (0 if problem.additive[1] is None else abs(row + bias)))
        off = np.where(np.isinf(x), 0, off)
        steep = np.minimum(1, 4 * np.exp(np.minimum(2 * (off - abs(x)), 0)))
        t = np.tanh(x)
        yield t, 4 * u * abs(t) + np.minimum(2, off * steep), (1 - t) * (1 + t)


def score_errors(problem, head, kv_head, u):
    """How far raw scores (L, S) of a head may be off, in arithmetic of roundoff u.

    Of products, gamma_{D+2} |scale| sum |q||k|: the sum, the scale and its rounding. Additive ones add the errors of
    each tanh, times |w|, to the rounding gamma_{D+2} sum |w||t| of their sum, which may lose D denormal numbers.
    """
    q, k = problem.query[head].astype(np.float64), problem.key[kv_head].astype(np.float64)
    D = q.shape[-1]
    gamma = (D + 2) * u / (1 - (D + 2) * u)
    if problem.additive is None:
        products = abs(problem.scale) * (abs(q) @ abs(k).T)
        if problem.softcap:
            products[np.isinf(products)] = 0  # a score of exactly +-softcap
        return gamma * products
    w = abs(problem.additive[0][head[-1]].astype(np.float64))
    rows = [(off + gamma * abs(t)) @ w for t, off, _ in tanh_errors(problem, head, q, k, u)]
    return np.reshape(rows, (len(q), len(k))) + D * 2.0**-149


def threshold_error(above, errors, visible):
    """How far the threshold of sparsemax or entmax may move if scores do, by `errors` (L, S): (L,).

    A threshold rises with every score, and by no more than all of them do together. So it moves by at most E if E is
    no less than the errors of the keys that may be in the support: those with above > -error - E, above being how far
    a score is above the exact threshold.
    """
    most = np.zeros(len(above))
    for _ in range(above.shape[1] + 1):
        near = visible & (above > -errors - most[:, None])
        more = errors.max(axis=1, initial=0, where=near)
        if not (more > most).any():
            break
        most = np.maximum(most, more)
    return most


def weight_errors(problem, batch, head, scores, visible, delta, u, level=None):
    """Weights that are no softmax, their slopes, and how far these and lse may be off: p, g, e_p, e_g (L, S) and (L,).

    delta: the errors of the scores. Behind them come the subtraction of a reference, the rounding of a constant and the
    product with it, 3 u of the result:

        sigmoid    x = s + shift off by d = delta + 3 u (|x| + |shift|): e^x relatively by e^d - 1, p by p (1 - p) times
                   that, or as far as p(x - d) and p(x + d), and e_p = that + (3 E + 3) u p(x + d); e_g = e_p + 3 u p
        relu       x = s / n off by d = (delta + 3 u |s|) / n where s > -delta; e_p = d,  e_g = 1 / n where |s| <= delta
        sparsemax  x = s - t off by d = delta + 3 u |s - r| + T + u p where x > -d; e_p = d, e_g = 1 where |x| <= d
        entmax1.5  x = s / 2 - t likewise, with delta / 2: e_p = 2 x d + d^2 + 2 u (x + d)^2,  e_g = d

    r is what is subtracted: the maximum; of a threshold that is given, in gradients, that. T is how far t is off: by
    `threshold_error`, and by N where Newton's method ended. A step is off by the error of the sums, c u, times the mean
    of the terms, none of which is above 1; of squares twice. It ends where a step is less than a spacing; the slope
    there, the sum of the terms, is at least 1 and that of squares still changes by S (4 c + 16) u at most. So N is
    (c + 4) u, of squares (2 c + 8) u (1 + S (4 c + 16) u). c: a block, and three roundings for each.
    """
    n = max(scores.shape[1] if problem.kv_lengths is None else int(problem.kv_lengths[batch]), 1)
    S = scores.shape[1]
    given = level is not None
    if not given:
        level = reference.normalise(problem, batch, head, scores, visible)[1]
    lse_error = np.zeros(len(scores))
    shown = np.where(level == -np.inf, 0, level)
    p, g = reference.slopes(problem.normalizer, problem.shift, reference.keys(problem, batch), scores, visible, shown)
    if problem.normalizer == checks.SIGMOID:
        shift = -np.log(n) if np.isnan(problem.shift) else problem.shift
        off = delta + 3 * u * (abs(scores + shift) + abs(shift))
        other, low, high = (1 / (1 + np.exp(x)) for x in (scores + shift, off - scores - shift, -off - scores - shift))
        e_p = np.where(off < 1, p * other * np.expm1(np.minimum(off, 1)), np.maximum(high - p, p - low))
        e_p += (3 * EXP_ULP + 3) * u * high
        e_g = e_p + 3 * u * p
    elif problem.normalizer == checks.RELU:
        off = (delta + 3 * u * abs(scores)) / n
        e_p = np.where(scores > -delta, off, 0)
        e_g = np.where(abs(scores) <= delta, 1 / n, 0) + 2 * u * g
    else:
        squared = problem.normalizer == checks.ENTMAX15
        x = (scores / 2 if squared else scores) - shown[:, None]
        m = scores.max(axis=1, initial=-np.inf, where=visible) / (2 if squared else 1)
        reference_of = shown if given else m
        off = delta / (2 if squared else 1) + 3 * u * abs(x + shown[:, None] - reference_of[:, None])
        if not given:
            c = KEY_BLOCK + 3 * -(-S // KEY_BLOCK) + 4
            newton = (2 * c + 8) * u * (1 + S * (4 * c + 16) * u) if squared else (c + 4) * u
            moved = threshold_error(x, off, visible) + newton
            off = off + moved[:, None]
            lse_error = moved + u * abs(shown)
        off = off + u * np.maximum(x, 0)
        near = x > -off
        most = np.maximum(x, 0) + off
        e_p = np.where(near, 2 * np.maximum(x, 0) * off + off**2 + 2 * u * most**2 if squared else off, 0)
        e_g = np.where(near, off, 0) if squared else np.where(abs(x) <= off, 1, 0)
    known = visible & ~np.isinf(scores)  # else p is exactly 0 or 1, infinite or NaN
    return p, g, np.where(known, e_p, 0), np.where(known, e_g, 0), lse_error


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

    Of additive scores delta_k is that of `score_errors`, and 3 u |s_k - m|, as no product is larger. Of other weights
    than softmax's, with the errors e_k of `weight_errors`:

        |out - exact| <= sum_k e_k |v_k| + (2 + c) u sum_k (p_k + e_k) |v_k|
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
            raw = score_errors(problem, head, kv_head, u)
            pairs = takes_pairs(problem, batch)
            denormal = PAIRS_TINY if pairs else float(np.finfo(inside).smallest_subnormal)

            delta = raw + gamma * abs(bias)
            if problem.softcap:
                delta += 4 * u * abs(scores - bias)
            tiny = problem.keep * denormal
            tiny = tiny * (reference.weighted_sum(visible.astype(float), visible, v) + visible.sum(axis=1)[:, None])
            if problem.normalizer != checks.SOFTMAX:
                weights, _, errors, _, lse[head] = weight_errors(problem, batch, head, scores, visible, delta, u)
                if problem.dropout:
                    stay = reference.dropout(problem, batch, head)
                    weights, errors = weights * stay, errors * stay
                magnitude[head] = reference.weighted_sum(weights, visible, v)
                off = reference.weighted_sum(errors, visible, v)
                out[head] = off + (magnitude[head] + off) * sums + tiny
                _round_once(problem, out[head], reference.weighted_sum(weights, visible, values))
                continue
            delta += (u if problem.additive is None else 3 * u) * abs(scores - m[:, None])
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
            out[head] = magnitude[head] * (2 * worst + sums)[:, None] + tiny
            if pairs:
                out[head] += magnitude[head] * PAIRS_ROUNDOFF * (1 + 2 * worst + sums)[:, None]
                out[head] += reference.weighted_sum(weights, visible, np.where(v < PAIRS_TINY, v, 0))
            _round_once(problem, out[head], reference.weighted_sum(weights, visible, values))
            lse[head] = worst + sums + 4 * u * (abs(m) + abs(np.log(total)))
    shape = problem.returned.shape
    return Bound(out.reshape(shape), lse.reshape(shape[:-1]), magnitude.reshape(shape))


def _round_once(problem, error, exact):
    """The error of what is close to `exact` and then rounded to 16 bits, in place."""
    if problem.out.dtype.name not in DIGITS:
        return
    # Past a power of two the spacing doubles, but what lies just past it is rounded back to it.
    size = abs(exact)
    below, above = (ulp(np.where(np.isfinite(x), x, 0), problem.out.dtype) / 2 for x in (size, size + error))
    error += np.maximum(below, np.minimum(above, error))


def widened(*arrays, **options):
    """The same numbers in float64."""
    wide = {name: x.astype(np.float64) if name in ("bias", "sinks", "grad_lse") and isinstance(x, np.ndarray) else x
            for name, x in options.items()}
    return [x.astype(np.float64) for x in arrays], wide


def exact_gradients(*saved, backward=reference.attention_backward, **options):
    """The `fa.Gradients` of saved results by the reference, in float64 and not rounded."""
    arrays, options = widened(*saved[:6], **options)
    return backward(*arrays, *saved[6:], **options)


def additive_gradient_bound(*saved, weight, bias=None, **options):
    """`gradient_bound` of additive scores, with those of weight and bias: an `AdditiveGradients`.

    weight's is a sum over batches and rows, and bias' is what the queries' add up to, in float64 and rounded once more.
    """
    u = UNIT_ROUNDOFF[checks.compute_dtype(np.asarray(saved[1]).dtype)] * (2 if saved[1].dtype == np.float64 else 1)
    arrays, options = widened(*saved, **options)
    weight, bias = (None if x is None else x.astype(np.float64) for x in (weight, bias))
    p = checks.gradient_problem(*arrays, scale=1.0, additive=(weight, bias), **options)
    for array in (*(p.returned[name] for name in ("query", "key", "value")), p.grad_w):
        array[...] = 0
    _add_gradient_bounds(p, u)
    return additive._gradients(p, *arrays[1:4], weight, bias, None)


def gradient_bound(*saved, packed=None, **options):
    """How far each element of the gradients of query, key, value and of a bias that is an array may be from exact.

    With the saved out and lse as they are, and the delta_k of `bound`, computed in arithmetic of roundoff u:

        |p - exact|  <= p e_p                          e_p = delta_k + 3 u |lse| + (2 E + 2) u
        |dz - exact| <= p (|grad_out| |v| + |delta|) (e_p + gamma_{Dv+4})
        |ds - exact| <= that + |dz| (2 delta_k / softcap + 12 u)                              with a softcap

    where |delta| is sum |grad_out| |out| + |grad_lse|. A sum of n such terms x adds n u sum |x|, where n is the depth
    of the sum: LANES or KEY_BLOCK at once and a term for each block, every term of a bias' gradient. float64 counts
    twice, for what it is compared with.

    Other weights than softmax's have the errors e_p and slopes g with e_g of `weight_errors`, at the saved threshold:

        |dz - exact| <= e_g (|grad_out| |v| + |delta|) + (g + e_g) (e_delta + gamma_{Dv+6} (|grad_out| |v| + |delta|))

    with delta and e_delta of `_mean_errors`; what follows from dz is as above, for additive scores as
    `_add_additive_bounds` has it.
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
            stay = reference.dropout(p, batch, head) if p.dropout else 1
            bias = 0 if p.bias is None else p.bias_of(head)
            delta = score_errors(p, head, kv_head, u) + (D + 2) * u * abs(bias)
            if p.softcap:
                delta += 4 * u * abs(scores - bias)
            dp = stay * (g @ v.T)
            if p.normalizer == checks.SOFTMAX:
                weight = np.where(visible, np.exp(scores - lse), 0)
                error_p = delta + (1 if p.additive is None else 3) * u * abs(scores - lse)
                error_p = error_p + 3 * u * abs(lse) + (2 * EXP_ULP + 2) * u
                of_row = (g * out).sum(axis=1) + (0 if p.grad_lse is None else abs(p.grad_lse[head]))
                dp = dp + of_row[:, None]
                dz = np.where(visible, weight * dp, 0)
                error = np.where(visible, dz * (error_p + (Dv + 6) * u) + SMALLEST * dp, 0)
                error_p = weight * error_p
            else:
                weight, slope, error_p, error_g, _ = weight_errors(p, batch, head, scores, visible, delta, u,
                                                                   p.lse[head])
                dp = np.where(visible, dp, 0)
                of_row, error_of_row = _mean_errors(p, slope, error_g, dp, u)
                dp = np.where(visible, dp + of_row, 0)
                dz = slope * dp
                error = error_g * (dp + error_of_row) + slope * error_of_row
                error = np.where(visible, error + (slope + error_g) * dp * (Dv + 6) * u + SMALLEST * dp, 0)
            reference._add_bias_gradient(p, head, error + dz * terms * u)
            if p.softcap:
                error = error + np.where(visible, dz * (2 * delta / p.softcap + 12 * u), 0)
            along = (LANES + blocks_q * group + 4) * u
            # a denormal scale or result is rounded by up to SMALLEST
            across = (KEY_BLOCK + blocks_k + 4) * u
            if p.additive is not None:
                _add_additive_bounds(p, head, kv_head, visible, dz, error, along, across, u)
            else:
                p.grad_query[head] += (abs(p.scale) * (error + dz * across) + SMALLEST * dz) @ k + SMALLEST
                p.grad_key[kv_head] += (abs(p.scale) * (error + dz * along) + SMALLEST * dz).T @ q + SMALLEST
            error_p = np.where(visible, stay * (error_p + weight * along + SMALLEST), 0)
            p.grad_value[kv_head] += error_p.T @ g + SMALLEST


def _mean_errors(p, slope, error, dp, u):
    """Of a row's delta where weights have a threshold: its size and how far it may be off, (L, 1); else 0 and 0.

    With slopes g' for g, delta' - delta = (sum (g' - g) (dp' - delta) + sum g (dp' - dp)) / sum g', because
    sum g (dp - delta) = 0. It comes of mean values, two sums over the keys, and a product of length Dv. Where the
    slopes may be anything it is still a mean of dp.
    """
    if p.normalizer not in (checks.SPARSEMAX, checks.ENTMAX15):
        return np.zeros((len(slope), 1)), np.zeros((len(slope), 1))
    Dv, depth = p.value.shape[-1], KEY_BLOCK + -(-p.S // KEY_BLOCK) + 4
    total, sum_ = slope.sum(axis=1), (slope * dp).sum(axis=1)
    mean = np.where(total > 0, sum_ / np.where(total > 0, total, 1), 0)
    least = total - error.sum(axis=1)
    moved = ((error * (dp + mean[:, None])).sum(axis=1) + (Dv + 6) * u * sum_) / np.maximum(least, 0.5)
    off = np.where(least < 0.5, dp.max(axis=1, initial=0) + mean, moved)
    return mean[:, None], (off + (mean + off) * (2 * depth + Dv + 6) * u)[:, None]


def _add_additive_bounds(p, head, kv_head, visible, dz, error, along, across, u):
    """Of the gradients of additive scores. 1 - t^2 is off by e (2 + e) + 5 u (1 - t^2) where t is by e.

    The sum of the gradient of w runs over the keys of a block and vectors of rows, of two lanes at least; a block may
    be cut into 13 parts, which are 2 keys and the 6 behind them that are worth skipping.
    """
    q, k, w = p.query[head], p.key[kv_head], abs(p.additive[0][head[-1]])
    blocks = -(-p.S // KEY_BLOCK)
    across = across + 13 * blocks * u
    depth = (KEY_BLOCK * LANES // 2 + 13 * blocks + LANES) * u
    for i, (t, off, slope) in enumerate(tanh_errors(p, head, q, k, u)):
        seen = visible[i]
        t, off, slope, d, e = abs(t[seen]), off[seen], slope[seen], dz[i, seen, None], error[i, seen, None]
        error_slope = off * (2 + off) + 5 * u * slope
        moved = e * (slope + error_slope) + d * error_slope + SMALLEST
        p.grad_query[head][i] += w * (moved + d * slope * across).sum(axis=0) + SMALLEST
        p.grad_key[kv_head][seen] += w * (moved + d * slope * along)
        p.grad_w[(*head, 0)] += (e * (t + off) + d * off + d * t * depth + SMALLEST).sum(axis=0)
    p.grad_key[kv_head] += SMALLEST


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
