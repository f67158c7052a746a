"""The definition of attention, executable: plain NumPy, one head at a time, in float64.

It is the oracle of the tests and the fallback where no compiled kernel runs. For each query row i of a head:

    s[j] = scale * q[i] . k[j]                 score of key j
    s[j] = softcap * tanh(s[j] / softcap)      if softcap is given
    s[j] = s[j] + bias[i, j]                   if bias is given
    m    = max s[j]                            over the visible keys, and the sink
    l    = sum exp(s[j] - m)                   over the visible keys, and the sink
    out  = sum exp(s[j] - m) / l * v[j]        over the visible keys
    lse  = m + log(l)

A key is visible if no restriction hides it; a bias of -inf hides too. A hidden key takes no part, whatever its K, V and
bias hold. A row that sees no key has out = 0 and lse = -inf, or lse = the sink if there is one; a row past
`query_lengths` has out = 0 and lse = -inf in any case. Everything else follows IEEE arithmetic: NaN and Inf that are
seen propagate, and a row whose visible scores are all -inf is NaN, not empty.
"""

import functools
import math

import numpy as np

from . import additive, checks, gradient, graph, layer, merge, score
from . import linear_attention as kernelized
from .bias import ALiBi


def attention(query, key, value, *, mask=None, bias=None, causal=False, window=None, query_offset=None,
              query_lengths=None, kv_lengths=None, scale=None, softcap=None, score_mod=None, sinks=None,
              normalizer="softmax", dropout_p=0.0, seed=None, out=None, return_lse=False, deterministic=None,
              num_threads=None):
    """`fastattn.attention` in plain NumPy: the same arguments, checks and results, in float64 inside.

    It stores the L x S scores of one head at a time and ignores `num_threads`.

    >>> import numpy as np
    >>> attention(np.zeros((1, 4)), np.zeros((2, 4)), np.array([[1.0], [3.0]]))
    array([[2.]])
    """
    problem = checks.problem(
        query, key, value, mask=mask, bias=bias, causal=causal, window=window, query_offset=query_offset,
        query_lengths=query_lengths, kv_lengths=kv_lengths, scale=scale, softcap=softcap, score_mod=score_mod,
        sinks=sinks, normalizer=normalizer, dropout_p=dropout_p, seed=seed, out=out, return_lse=return_lse,
        deterministic=deterministic, num_threads=num_threads)
    forward(problem)
    return problem.result()


def varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, *, mask=None, bias=None, causal=False, window=None,
                     query_offset=None, query_lengths=None, kv_lengths=None, scale=None, softcap=None, score_mod=None,
                     sinks=None, normalizer="softmax", dropout_p=0.0, seed=None, out=None, return_lse=False,
                     deterministic=None, num_threads=None):
    """`fastattn.varlen_attention` in plain NumPy: each sequence by itself, in float64 inside."""
    problem = checks.problem(
        query, key, value, mask=mask, bias=bias, causal=causal, window=window, query_offset=query_offset,
        query_lengths=query_lengths, kv_lengths=kv_lengths, scale=scale, softcap=softcap, score_mod=score_mod,
        sinks=sinks, normalizer=normalizer, dropout_p=dropout_p, seed=seed, out=out, return_lse=return_lse,
        deterministic=deterministic, num_threads=num_threads, packed=(cu_seqlens_q, cu_seqlens_k))
    forward(problem)
    return problem.result()


def attention_weights(query, key, *, rows=None, heads=None, reduce=None, mask=None, bias=None, causal=False,
                      window=None, query_offset=None, query_lengths=None, kv_lengths=None, scale=None, softcap=None,
                      score_mod=None, sinks=None, normalizer="softmax", deterministic=None, num_threads=None):
    """`fastattn.attention_weights` in plain NumPy, from the weights of all chosen rows at once, in float64 inside."""
    problem = checks.weights_problem(
        query, key, rows=rows, heads=heads, reduce=reduce, mask=mask, bias=bias, causal=causal, window=window,
        query_offset=query_offset, query_lengths=query_lengths, kv_lengths=kv_lengths, scale=scale, softcap=softcap,
        score_mod=score_mod, sinks=sinks, normalizer=normalizer, deterministic=deterministic, num_threads=num_threads)
    forward_weights(problem)
    return checks.weights_result(problem)


def forward_weights(problem):
    """Fill `problem.weights` and `problem.indices`."""
    reduce = problem.returned[0]
    with np.errstate(all="ignore"):
        for batch, head, kv_head in heads(problem):
            scores, visible = logits(problem, batch, head, kv_head, np.float64)
            p = np.where(visible, normalise(problem, batch, head, scores, visible)[0], 0)
            if reduce is None:
                problem.weights[head] = p
            elif reduce == "sum":
                problem.weights[(*head, 0)] = p.sum(axis=0)
            elif reduce == "max":
                problem.weights[(*head, 0)] = p.max(axis=0, initial=0)
            elif reduce == "entropy":
                problem.weights[(*head, ..., 0)] = 0 - np.where(p == 0, 0, p * np.log(p)).sum(axis=1)  # not -0
            else:
                order = np.argsort(np.where(visible, -scores, np.inf), axis=1, kind="stable")[:, : problem.k]
                problem.weights[head] = np.take_along_axis(p, order, 1)
                seen = np.take_along_axis(visible & (scores > -np.inf), order, 1)
                problem.indices[head] = np.where(seen, order, -1)
                lost = np.isnan(p).any(axis=1)  # no order
                problem.weights[head][lost], problem.indices[head][lost] = np.nan, -1


def merge_states(outs, lses):
    """`fastattn.merge_states` in plain NumPy, in float64 inside. Over the parts n with lses[n] != -inf:

        m    = max lses[n]                         0 where that is infinite
        l    = sum exp(lses[n] - m)
        out  = sum exp(lses[n] - m) / l * outs[n]
        lse  = m + log(l)

    >>> merge_states([[[1.0]], [[3.0]]], [[0.0], [0.0]])
    (array([[2.]]), array([0.69314718]))
    """
    outs, lses = merge.parts(outs, lses)
    dtype, lse_dtype = outs[0].dtype, lses[0].dtype
    outs, lses = np.array(outs, np.float64), np.array(lses, np.float64)
    with np.errstate(all="ignore"):
        m = lses.max(axis=0)
        m = np.where(np.isinf(m), 0, m)
        weights = np.exp(lses - m)
        total = weights.sum(axis=0)
        out = np.where(lses[..., None] == -np.inf, 0, (weights / total)[..., None] * outs).sum(axis=0)
        return out.astype(dtype), (m + np.log(total)).astype(lse_dtype)


def bias(bias, H, L, S, query_offset=None):
    """The numbers that a bias object stands for: float64 (H, L, S), for an offset that is one integer (default S - L).

    >>> from fastattn import ALiBi
    >>> bias(ALiBi([0.5]), 1, 2, 3)
    array([[[-0.5,  0. ,  0.5],
            [-1. , -0.5,  0. ]]])
    """
    bias.check(H, L, S)
    i, j = np.arange(L)[:, None], np.arange(S)
    distance = j - (i + (S - L if query_offset is None else query_offset))
    with np.errstate(all="ignore"):
        if isinstance(bias, ALiBi):
            slopes = bias.slopes.astype(np.float64)[:, None, None]
            return -slopes * abs(distance) if bias.symmetric else slopes * distance
        table = bias.table.astype(np.float64)
        if bias.shape is not None:
            h, w = bias.shape
            return table[:, i // w - j // w + h - 1, i % w - j % w + w - 1]
        return np.broadcast_to(table[..., np.clip(distance - bias.first, 0, table.shape[-1] - 1)], (H, L, S))


def forward(problem, dtype=None):
    """Fill `problem.out` and `problem.lse`, computing in `dtype` (float64 unless given, whatever the inputs are)."""
    if problem.pages is not None:
        from . import cache
        problem = cache.dense(problem)
    if problem.cu_q is not None:
        for sequence in problem.sequences():
            forward(sequence, dtype)
        return
    dtype = np.dtype(dtype or np.float64).type
    with np.errstate(all="ignore"):
        for batch, head, kv_head in heads(problem):
            scores, visible = logits(problem, batch, head, kv_head, dtype)
            weights, lse = normalise(problem, batch, head, scores, visible)
            if problem.query_lengths is not None:
                lse[problem.query_lengths[batch]:] = -np.inf
            if problem.dropout:
                weights = weights * dropout(problem, batch, head)
            problem.out[head] = weighted_sum(weights, visible, problem.value[kv_head].astype(dtype))
            if problem.lse is not None:
                problem.lse[head] = lse


def attention_backward(grad_out, query, key, value, out, lse, *, grad_lse=None, mask=None, bias=None, causal=False,
                       window=None, query_offset=None, query_lengths=None, kv_lengths=None, scale=None, softcap=None,
                       score_mod=None, sinks=None, normalizer="softmax", dropout_p=0.0, seed=None, deterministic=None,
                       num_threads=None):
    """`fastattn.attention_backward` in plain NumPy, in float64 inside. For each query row of a head, over its keys:

        p[j]   = exp(s[j] - lse)
        dz[j]  = p[j] (grad_out . v[j] - delta)            delta = grad_out . out - grad_lse: the bias' gradient
        ds[j]  = dz[j] (1 - (y[j] / softcap)^2)            y: the scores behind the softcap, if there is one
        dq     = scale * sum ds[j] k[j]
        dk[j] += scale * ds[j] q,  dv[j] += p[j] grad_out
        dsink -= exp(sink - lse) delta
    """
    return _backward(
        None, grad_out, query, key, value, out, lse, grad_lse=grad_lse, mask=mask, bias=bias, causal=causal,
        window=window, query_offset=query_offset, query_lengths=query_lengths, kv_lengths=kv_lengths, scale=scale,
        softcap=softcap, score_mod=score_mod, sinks=sinks, normalizer=normalizer, dropout_p=dropout_p, seed=seed,
        deterministic=deterministic, num_threads=num_threads)


def varlen_attention_backward(grad_out, query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k, *, grad_lse=None,
                              mask=None, bias=None, causal=False, window=None, query_offset=None, query_lengths=None,
                              kv_lengths=None, scale=None, softcap=None, score_mod=None, sinks=None,
                              normalizer="softmax", dropout_p=0.0, seed=None, deterministic=None, num_threads=None):
    """`fastattn.varlen_attention_backward` in plain NumPy: each sequence by itself, in float64 inside."""
    return _backward(
        (cu_seqlens_q, cu_seqlens_k), grad_out, query, key, value, out, lse, grad_lse=grad_lse, mask=mask, bias=bias,
        causal=causal, window=window, query_offset=query_offset, query_lengths=query_lengths, kv_lengths=kv_lengths,
        scale=scale, softcap=softcap, score_mod=score_mod, sinks=sinks, normalizer=normalizer, dropout_p=dropout_p,
        seed=seed, deterministic=deterministic, num_threads=num_threads)


def _backward(packed, grad_out, query, key, value, out, lse, *, bias, sinks, **options):
    problem = checks.gradient_problem(grad_out, query, key, value, out, lse, bias=bias, sinks=sinks, packed=packed,
                                      **options)
    backward(problem)
    return gradient.gradients(problem, query, key, value, bias, sinks)


def backward(problem, dtype=None):
    """Fill the gradients of the problem, computing in `dtype` (float64 unless given)."""
    for array in (problem.grad_query, problem.grad_key, problem.grad_value):
        array[...] = 0
    if problem.fresh:
        problem.grad_bias[...] = 0
        problem.fresh = False
    if problem.cu_q is not None:
        for sequence in problem.sequences():
            backward(sequence, dtype)
        return
    dtype = np.dtype(dtype or np.float64).type
    with np.errstate(all="ignore"):
        for batch, head, kv_head in heads(problem):
            scores, visible = logits(problem, batch, head, kv_head, dtype)
            q, k, v = (x.astype(dtype) for x in (problem.query[head], problem.key[kv_head], problem.value[kv_head]))
            g, lse = problem.grad_out[head].astype(dtype), problem.lse[head].astype(dtype)
            p, slope = slopes(problem.normalizer, problem.shift, keys(problem, batch), scores, visible, lse)
            delta = (g * problem.out[head].astype(dtype)).sum(axis=1)
            if problem.grad_lse is not None:
                delta -= problem.grad_lse[head]
            some = visible.any(axis=1)
            problem.delta[head][some] = delta[some]
            dp = g @ v.T
            stay = 1
            if problem.dropout:
                stay = dropout(problem, batch, head)
                dp = np.where(stay > 0, stay * dp, 0)
            if problem.normalizer != checks.SOFTMAX:
                delta = np.zeros(len(p), dtype)
            if problem.normalizer in (checks.SPARSEMAX, checks.ENTMAX15):
                total = slope.sum(axis=1)
                delta = np.where(slope > 0, slope * dp, 0).sum(axis=1) / np.where(total == 0, 1, total)
            dz = np.where(visible, slope * (dp - delta[:, None]), 0)
            _add_bias_gradient(problem, head, dz)
            raw = raw_scores(problem, head, q, k)
            changed = raw
            if problem.score_mod is not None:
                changed = score.apply(problem.score_mod, raw, problem.batch + batch, head[-1], range(len(q)))
            if problem.softcap:
                dz = np.where(visible, dz * (1 - np.tanh(changed / problem.softcap) ** 2), 0)
            if problem.score_mod is not None:
                dz = score.apply(problem.score_mod, raw, problem.batch + batch, head[-1], range(len(q)), dz)
                dz = np.where(visible, dz, 0)
            if problem.additive is not None:
                _add_additive_gradients(problem, head, kv_head, q, k, dz)
            else:
                problem.grad_query[head] += problem.scale * weighted_sum(dz, visible, k)
                problem.grad_key[kv_head] += problem.scale * weighted_sum(dz.T, visible.T, q)
            problem.grad_value[kv_head] += weighted_sum((p * stay).T, visible.T, g)


def _add_additive_gradients(problem, head, kv_head, q, k, dz):
    w, b = (None if x is None else x[head[-1]].astype(q.dtype) for x in problem.additive)
    for i, row in enumerate(q if b is None else q + b):
        seen = dz[i] != 0  # NaN included; what is not seen may hold NaN
        t = np.tanh(row + k[seen])
        u = dz[i, seen, None] * w * (1 - t) * (1 + t)
        problem.grad_query[head][i] += u.sum(axis=0)
        problem.grad_key[kv_head][seen] += u
        problem.grad_w[(*head, 0)] += dz[i, seen] @ t


def _add_bias_gradient(problem, head, dz):
    if problem.row_grad is not None:
        problem.row_grad[head] += dz.sum(axis=1)
    if problem.grad_bias is None:
        return
    if problem.grad_index is not None:
        rows, keys = problem.grad_index
        np.add.at(problem.grad_bias[(0, *head, 0)], rows[:, None] + keys, dz)
        return
    to = problem.grad_bias[head]
    if to.strides[0] == 0 and len(to) > 1:  # one row for all queries
        to[0] += dz.sum(axis=0)
    else:
        to += dz


def dropout(problem, batch, head):
    """The factors (L, S) of a head's weights: 1 / (1 - dropout_p), or 0 for numbers less than dropout_p * 2**32."""
    L, S = problem.L, problem.S
    i, j = np.arange(L, dtype=np.uint64)[:, None], np.arange(-(-S // 4), dtype=np.uint64)
    numbers = philox((j, i, np.uint64(head[-1]), np.uint64(problem.batch + batch)), problem.seed)
    return np.where(np.stack(numbers, axis=-1).reshape(L, -1)[:, :S] >= problem.dropout, problem.keep, 0)


def _in_numpy(function, variable, mine):
    """The function, with what computes its results replaced."""
    @functools.wraps(function)
    def call(*args, **options):
        token = variable.set(mine())
        try:
            return function(*args, **options)
        finally:
            variable.reset(token)
    return call


graph_attention, graph_attention_backward, gat_attention, gat_attention_backward, gatv2_attention, \
    gatv2_attention_backward = (_in_numpy(function, graph.kernel, lambda: run_graph) for function in (
        graph.graph_attention, graph.graph_attention_backward, graph.gat_attention, graph.gat_attention_backward,
        graph.gatv2_attention, graph.gatv2_attention_backward))
additive_attention, additive_attention_backward = (
    _in_numpy(function, additive.kernels, lambda: (forward, backward))
    for function in (additive.additive_attention, additive.additive_attention_backward))
linear_attention, linear_attention_backward = (
    _in_numpy(function, kernelized.kernel, lambda: run_linear)
    for function in (kernelized.linear_attention, kernelized.linear_attention_backward))
linear, pack_weight = (
    _in_numpy(function, layer.in_numpy, lambda: True) for function in (layer.linear, layer.pack_weight))


def run_graph(call, dtype=None):
    """Fill the results of a call of graph.py, computing in `dtype` (float64 unless given). Its rows are whole."""
    dtype = np.dtype(dtype or np.float64).type
    n = call.end - call.begin
    row = np.repeat(np.arange(len(n)), n)
    e = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n) + call.begin[row]
    of, source = e if call.order is None else call.order[e], call.source[e]
    target = row if call.rows is None else call.rows[row]
    group = call.H // call.Hkv if call.Hkv else 1

    def features(array, of_edges, h):
        x = array[source, h].astype(dtype)
        return x if of_edges is None else x + of_edges[of, h].astype(dtype)

    def total(x):
        result = np.zeros((len(n), *x.shape[1:]), dtype)
        np.add.at(result, row, x)
        return result

    def leaky(x):
        return np.where(x < 0, call.slope * x, x)

    with np.errstate(all="ignore"):
        if call.mode == graph.SUM:
            for h_kv in range(call.Hkv):
                out = 0
                for h in range(h_kv * group, (h_kv + 1) * group):
                    x = call.weights[of, h][:, None].astype(dtype)
                    inside = features(call.value, call.edge_value, h)
                    if call.score == graph.DOT:
                        x = x * inside
                    else:
                        inside = inside + call.query[target, h_kv].astype(dtype)
                        x = x * call.w[0, h].astype(dtype) * np.where(inside > 0, 1, call.slope)
                    out = out + total(x)
                call.out[:, h_kv] = out
            return
        for h in range(call.H):
            k, v = features(call.key, call.edge_key, h // group), features(call.value, call.edge_value, h // group)
            q = call.query[target, h].astype(dtype)
            w = None if call.score == graph.DOT else call.w[0, h].astype(dtype)
            s = dtype(call.scale) * ((q * k) if w is None else w * leaky(q + k)).sum(axis=1)
            slope = 1
            if call.softcap:
                s = call.softcap * np.tanh(s / call.softcap)
                slope = (1 - s / call.softcap) * (1 + s / call.softcap)
            if call.edge_bias is not None:
                s = s + call.edge_bias[of, h].astype(dtype)
                s[call.edge_bias[of, h] == -np.inf] = -np.inf
            counts = np.ones(len(s), np.bool_) if call.edge_bias is None else call.edge_bias[of, h] != -np.inf
            seen = s != -np.inf
            v, k = np.where(seen[:, None], v, 0), np.where(seen[:, None], k, 0)
            stay = 1
            if call.dropout:
                numbers = philox((of // 4, np.uint64(0), np.uint64(h), np.uint64(0)), call.seed)
                numbers = np.choose(of % 4, numbers)
                stay = np.where(numbers >= call.dropout, call.keep, 0)
            if call.normalizer != checks.SOFTMAX:
                p, slope_of_p, tau = _alone(call, s, counts, row, len(n))
            if call.mode == graph.GRADIENT:
                dp = stay * (call.grad_out[target, h].astype(dtype) * v).sum(axis=1)
                delta = call.delta[target, h]
                if call.normalizer == checks.SOFTMAX:
                    p = slope_of_p = np.where(seen, np.exp(s - call.lse[target, h]), 0)
                elif call.normalizer in (checks.SPARSEMAX, checks.ENTMAX15):
                    sums = total(slope_of_p)
                    delta = np.where(sums == 0, 0, total(slope_of_p * dp) / sums)[row]
                dz = np.where(seen, slope_of_p * (dp - delta), 0)
                ds = dz * slope * call.scale
                call.weights[of, h], call.grad_bias[of, h], call.grad_scores[of, h] = p * stay, dz, ds
                if w is None:
                    call.grad_query[:, h] = total(ds[:, None] * k)
                else:
                    call.grad_query[:, h] = total(ds[:, None] * w * np.where(q + k > 0, 1, call.slope))
                    if call.grad_w is not None:
                        call.grad_w[0, h, : call.D] = (ds[:, None] * leaky(q + k)).sum(axis=0)
                continue
            if call.normalizer != checks.SOFTMAX:
                call.out[:, h] = total((p * stay)[:, None] * v)
                if call.lse is not None:
                    call.lse[:, h] = tau
                continue
            m = np.full(len(n), -np.inf)
            np.fmax.at(m, row, s)
            if call.sinks is not None:
                m = np.fmax(m, call.sinks[h])
            p = np.where(seen, np.exp(s - np.where(m == -np.inf, 0, m)[row]), 0)
            sums = total(p)
            if call.sinks is not None:
                sums = sums + np.exp(call.sinks[h].astype(dtype) - m)
            call.out[:, h] = np.where(sums[:, None] == 0, 0, total((p * stay)[:, None] * v) / sums[:, None])
            if call.lse is not None:
                call.lse[:, h] = np.where(sums == 0, -np.inf, m + np.log(sums))


def _alone(call, s, counts, row, n_rows):
    """Weights of the scores of edges by a normalizer that is no softmax, their slopes, and what is lse of each row."""
    p, slope, lse = np.zeros_like(s), np.zeros_like(s), np.full(n_rows, -np.inf)
    at = np.flatnonzero(counts)
    ends = np.cumsum(np.bincount(row[at], minlength=n_rows))
    for i, mine in enumerate(np.split(at, ends[:-1])):
        if len(mine):
            scores, visible = s[None, mine], s[None, mine] != -np.inf
            top, level, lse[i, None] = levels(call.normalizer, scores, visible)
            (p[mine],), (slope[mine],) = slopes(call.normalizer, call.offset, len(mine), scores, visible, level, top)
    return p, slope, lse


def run_linear(call, dtype=None):
    """Fill the results of a call of linear_attention.py, computing in `dtype` (float64 unless given).

    With the weights w[i, j] = features(q[i]) . features(k[j]) of one head at a time, all L x S of them.
    """
    dtype = np.dtype(dtype or np.float64).type
    if call.mode == kernelized.KEY:  # the heads of a key head are added before they are rounded
        of_key, of_value = (np.zeros(x.shape, dtype) for x in (call.grad_key, call.grad_value))
    with np.errstate(all="ignore"):
        for batch, head, kv_head in heads(call):
            n = call.S if call.kv_lengths is None else call.kv_lengths[batch]
            q, k, v = call.query[head].astype(dtype), call.key[kv_head][:n].astype(dtype), call.value[kv_head][:n]
            v = np.concatenate([v.astype(dtype), np.ones((n, 1), dtype)], axis=1)
            visible = np.ones((call.L, n), np.bool_)
            if call.causal:
                visible = np.tri(call.L, n, dtype=np.bool_)
            of_q, of_k = linear_features(call, q, True), linear_features(call, k, False)
            weights = np.where(visible, of_q @ of_k.T, 0)
            if call.mode == kernelized.OUTPUT:
                sums = weighted_sum(weights, visible, v)
                if call.begin is not None:
                    sums += of_q @ call.begin[kv_head][:, : call.Dv + 1].astype(dtype)
                z = sums[:, -1:]
                call.out[head] = np.where(z == 0, 0, sums[:, :-1] / z)
                if call.normalizer is not None:
                    call.normalizer[head] = z[:, 0]
                if call.end is not None and head[-1] % (call.H // call.Hkv) == 0:
                    call.end[kv_head] = 0 if call.begin is None else call.begin[kv_head]
                    call.end[kv_head][:, : call.Dv + 1] += of_k.T @ v
                continue
            z = call.normalizer[head].astype(dtype)[:, None]
            g = np.where(z == 0, 0, call.grad_out[head].astype(dtype) / z)
            g = np.concatenate([g, -(g * call.out[head].astype(dtype)).sum(axis=1, keepdims=True)], axis=1)
            of_weights = np.where(visible, g @ v.T, 0)
            if call.mode == kernelized.QUERY:
                grad = weighted_sum(of_weights, visible, of_k)
                call.grad_query[head] = _through_features(call, grad, of_q, q, True)
            else:
                grad = weighted_sum(of_weights.T, visible.T, of_q)
                of_key[kv_head][:n] += _through_features(call, grad, of_k, k, False)
                of_value[kv_head][:n] += weighted_sum(weights.T, visible.T, g)[:, :-1]
    if call.mode == kernelized.KEY:
        call.grad_key[...], call.grad_value[...] = of_key, of_value


def linear_features(call, x, of_query):
    """The features (rows, F) of queries or keys (rows, D)."""
    if call.map == kernelized.MAPS["elu"]:
        return np.where(x > 0, x + 1, np.exp(x))
    if call.map == kernelized.MAPS["relu"]:
        return np.maximum(x, 0)
    exponent = x @ call.projection.T.astype(x.dtype)
    if not of_query:
        return np.exp2(exponent - call.half * (x**2).sum(axis=1, keepdims=True) - call.shift)
    exponent = exponent + call.shift
    return np.exp2(exponent - exponent.max(axis=1, keepdims=True))


def _through_features(call, grad, features, x, of_query):
    if call.map == kernelized.MAPS["elu"]:
        return grad * np.where(features > 1, 1, features)
    if call.map == kernelized.MAPS["relu"]:
        return np.where(features > 0, grad, features * 0)
    grad = grad * features * np.log(2.0)
    of_x = grad @ call.projection.astype(x.dtype)
    return of_x if of_query else of_x - 2 * call.half * x * grad.sum(axis=1, keepdims=True)


def run_layer(x, weight, bias, activation, out, dtype=None):
    """Fill out with activation(x W^T + bias), computing in `dtype` (float64 unless given)."""
    dtype = np.dtype(dtype or np.float64).type
    with np.errstate(all="ignore"):
        y = x.astype(dtype) @ weight.unpack().astype(dtype).T
        y = y if bias is None else y + bias
        if activation == "relu":
            y = np.maximum(y, 0)
        elif activation == "gelu":
            y = y * 0.5 * np.vectorize(math.erfc, otypes=[dtype])(-y / math.sqrt(2))
        elif activation == "gelu_tanh":
            y = 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        elif activation == "silu":
            e = np.exp(-abs(y))  # of y itself it would overflow where the result has not underflowed
            y = y * np.where(y < 0, e, 1) / (1 + e)
        out[...] = y


def run_norm(x, add, total, weight, bias, eps, centre, out, dtype=None):
    """Fill out with the rows of x + add normalised, and total with x + add, computing in `dtype` (else float64)."""
    dtype = np.dtype(dtype or np.float64).type
    with np.errstate(all="ignore"):
        y = x.astype(dtype)
        if add is not None:
            y += add.astype(dtype)
            total[...] = y
        if centre:
            y -= y.mean(axis=1, keepdims=True)
        y /= np.sqrt(np.square(y).mean(axis=1, keepdims=True) + dtype(eps))
        y = y if weight is None else y * weight
        out[...] = y if bias is None else y + bias


def philox(counter, seed):
    """The four numbers of 32 bits that Philox 4x32-10 makes of counters, four uint64 arrays, and the 64 bits of a seed.

    >>> [hex(x) for x in philox([np.uint64(0)] * 4, 0)]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x = np.broadcast_arrays(*(np.asarray(c, np.uint64) & low for c in counter))
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0, p1 = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        x = (p1 >> half) ^ x[1] ^ np.uint64(k0), p1 & low, (p0 >> half) ^ x[3] ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return x


def heads(problem):
    """For every head: the number of its batch, its index (*lead, h), and its key head's (*lead, h // (H / Hkv))."""
    *lead, H = problem.query.shape[:-2]
    Hkv = problem.key.shape[-3]
    for batch, index in enumerate(np.ndindex(*lead)):
        for head in range(H):
            yield batch, (*index, head), (*index, head // (H // Hkv))


def sink(problem, head, dtype):
    """The head's sink logit, or None."""
    return None if problem.sinks is None else problem.sinks[head[-1]].astype(dtype)


def raw_scores(problem, head, q, k):
    """scale * q . k, or w . tanh(q + k + b) if they are additive."""
    if problem.additive is None:
        return q.dtype.type(problem.scale) * (q @ k.T)
    w, b = (None if x is None else x[head[-1]].astype(q.dtype) for x in problem.additive)
    q = q if b is None else q + b
    return np.array([np.tanh(row + k) @ w for row in q], q.dtype).reshape(len(q), len(k))


def logits(problem, batch, head, kv_head, dtype):
    """The final scores s[L, S] of one head, and which of them are visible."""
    q, k = problem.query[head].astype(dtype), problem.key[kv_head].astype(dtype)
    L, S = len(q), len(k)
    visible = np.ones((L, S), np.bool_)

    i = np.arange(L) if problem.rows is None else problem.rows
    scores = raw_scores(problem, head, q, k)
    if problem.score_mod is not None:
        scores = score.apply(problem.score_mod, scores, problem.batch + batch, head[-1], i)
    if problem.softcap:
        scores = problem.softcap * np.tanh(scores / problem.softcap)
    if problem.bias is not None:
        bias = problem.bias_of(head).astype(dtype)
        scores = scores + bias
        visible &= bias != -np.inf

    if problem.mask is not None:
        visible &= problem.mask[head]
    if problem.plan is not None:
        lead = problem.plan.lead
        visible &= problem.plan.definition(tuple(i if n > 1 else 0 for n, i in zip(lead, head[len(head) - len(lead):])))
    j = np.arange(S)
    if problem.query_offset is not None:
        position = i[:, None] + problem.query_offset[batch]
        visible &= (position - problem.left <= j) & (j <= position + problem.right)
    if problem.kv_lengths is not None:
        visible &= j < problem.kv_lengths[batch]
    if problem.query_lengths is not None:
        visible[i >= problem.query_lengths[batch]] = False
    return scores, visible


def normalise(problem, batch, head, scores, visible):
    """(weights[L, S], 0 where not visible; lse[L], or what takes its place) of final scores."""
    if problem.normalizer == checks.SOFTMAX:
        weights, m, total = softmax(scores, visible, sink(problem, head, scores.dtype))
        return weights, m + np.log(total)
    top, level, lse = levels(problem.normalizer, scores, visible)
    return slopes(problem.normalizer, problem.shift, keys(problem, batch), scores, visible, level, top)[0], lse


def keys(problem, batch):
    """How many keys the sequence of a batch has."""
    return problem.S if problem.kv_lengths is None else int(problem.kv_lengths[batch])


def levels(normalizer, scores, visible):
    """(top, level, lse), each [L], by a normalizer that is no softmax.

    The threshold of sparsemax is top + level, that of entmax15 top / 2 + level: with the row's maximum, level is not
    lost where scores are large. lse is their sum, 0 for sigmoid and relu, -inf for rows that see nothing.
    """
    top = level = lse = np.zeros(len(scores), scores.dtype)
    if normalizer == checks.SPARSEMAX:
        top, level = sparsemax_level(scores, visible)
        lse = top + level
    elif normalizer == checks.ENTMAX15:
        top, level = entmax15_level(scores, visible)
        lse = top / 2 + level
    return top, level, np.where(visible.any(axis=1), lse, -np.inf)


def sparsemax_level(scores, visible):
    """(m[L], t[L]) with sum max(s - m - t, 0) = 1, m the maximum: if k terms count, t = (their sum - 1) / k."""
    z, k, top = _descending(scores, visible)
    sums = np.cumsum(z, axis=1)
    n = np.count_nonzero(1 + k * z > sums, axis=1)[:, None]
    return top, (np.take_along_axis(sums, np.maximum(n - 1, 0), 1) - 1)[:, 0] / np.maximum(n[:, 0], 1)


def entmax15_level(scores, visible):
    """(m[L], t[L]) with sum max((s - m) / 2 - t, 0)^2 = 1, m the maximum (Peters, Niculae, Martins 2019, algorithm 2).

    Of the k largest z = (s - m) / 2, t = mean - sqrt((1 - sum of the squared distances from it) / k), for the largest k
    whose t is at most the k-th z.
    """
    z, k, top = _descending(scores, visible)
    z = z / 2
    seen = np.where(z == -np.inf, 0, z)  # they are last
    mean, squares = np.cumsum(seen, axis=1) / k, np.cumsum(seen**2, axis=1)
    of_k = mean - np.sqrt(np.maximum(1 - (squares - k * mean**2), 0) / k)
    n = np.count_nonzero(of_k <= z, axis=1)[:, None]
    return top, np.take_along_axis(of_k, np.maximum(n - 1, 0), 1)[:, 0]


def _descending(scores, visible):
    """(the visible scores of each row less their maximum, in descending order, -inf behind; 1, 2, ...; the maxima)."""
    z = np.sort(np.where(visible, -scores, np.inf), axis=1)
    z = -z if z.shape[1] else np.full((len(z), 1), -np.inf, z.dtype)
    top = z[:, :1]
    top = np.where(np.isnan(z).any(axis=1, keepdims=True), np.nan, top)
    with np.errstate(invalid="ignore"):  # of rows that see nothing
        return z - top, np.arange(1, z.shape[1] + 1), top[:, 0]


def slopes(normalizer, shift, n, scores, visible, level, top=0.0):
    """Weights and their slopes g, both [L, S], 0 where not visible, from final scores of n keys and the saved lse[L].

    Without a saved one, top and level are those of `levels`.
    The gradient of a score is g (dp - delta), where delta is a constant of the row, 0 for sigmoid and relu.
    """
    level, n = np.where(level == -np.inf, 0, level)[:, None], max(n, 1)
    if normalizer in (checks.SPARSEMAX, checks.ENTMAX15):
        scores = scores - np.broadcast_to(top, len(scores))[:, None]
    if normalizer == checks.SOFTMAX:
        p = slope = np.exp(scores - level)
    elif normalizer == checks.SIGMOID:
        p = 1 / (1 + np.exp(-(scores + (-np.log(n) if np.isnan(shift) else shift))))
        slope = p * (1 - p)
    elif normalizer == checks.RELU:
        p = np.maximum(scores, 0) / n
        slope = np.where(p > 0, 1 / n, p)  # NaN stays
    elif normalizer == checks.SPARSEMAX:
        p = np.maximum(scores - level, 0)
        slope = np.where(p > 0, 1, p)
    else:
        slope = np.maximum(scores / 2 - level, 0)
        p = slope**2
    return np.where(visible, p, 0), np.where(visible, slope, 0)


def softmax(scores, visible, sink=None):
    """exp(s - m) / l as weights[L, S], zero where not visible; m[L]; l[L]."""
    m = scores.max(axis=1, initial=-np.inf, where=visible)
    if sink is not None:
        m = np.maximum(m, sink)
    weights = np.where(visible, np.exp(scores - m[:, None]), 0)
    total = weights.sum(axis=1)
    if sink is not None:
        total += np.exp(sink - m)
    total = np.where(visible.any(axis=1), total, 1)  # an empty row: weights 0 and lse = m
    return weights / total[:, None], m, total


def weighted_sum(weights, visible, v):
    """weights[L, S] . v[S, Dv] over the visible keys only: 0 * NaN of a hidden key must not appear."""
    finite = np.isfinite(v).all(axis=1)
    out = weights[:, finite] @ v[finite]
    for j in np.flatnonzero(~finite):
        out += np.where(visible[:, j, None], weights[:, j, None] * v[j], 0)
    return out
