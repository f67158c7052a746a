"""Attention along the edges of a graph: dot products, and the additive scores of GAT and GATv2."""

from contextvars import ContextVar
from typing import NamedTuple

import numpy as np

from . import _runtime, checks, gradient
from .checks import ENTMAX15, RELU, SIGMOID, SOFTMAX, SPARSEMAX

OUTPUT, GRADIENT, SUM, SCORES, LEVELS, DELTA = range(6)             # modes of a call, as in fastattn.h
DOT, LEAKY = range(2)               # scores
TASK = 4096                         # edges of a task; a row counts for ROW more
ROW = 8
PART = 16384                        # most edges of a row that are summed at once: longer ones are merged from parts


kernel = ContextVar("kernel", default=_runtime.graph)      # the reference puts its own in this place


class Graph:
    """A graph as the kernels read it: for each target its edges. Made once where a graph is used again.

    Parameters
    ----------
    graph : scipy.sparse array or matrix (targets, sources), of any format
        Its stored elements are the edges, whatever their values, explicit zeros and duplicates included. What belongs
        to edges (bias, features) lies in the order of its ``data``; in that of ``tocoo()`` for formats other than csr,
        csc and coo.

    Raises
    ------
    TypeError, ValueError
        For something else; for indices that are out of range.

    Examples
    --------
    >>> import scipy.sparse, fastattn as fa
    >>> fa.Graph(scipy.sparse.csc_array([[1, 1, 0], [0, 0, 1]])).shape
    (2, 3)
    """

    def __init__(self, graph):
        if not hasattr(graph, "tocoo") or not hasattr(graph, "format"):
            raise TypeError(f"graph must be a scipy.sparse array, got {type(graph).__name__}")
        if len(graph.shape) != 2:
            raise ValueError(f"graph must have shape (targets, sources), got {graph.shape}")
        self.shape = T, N = tuple(map(int, graph.shape))
        if graph.format not in ("csr", "csc", "coo"):
            graph = graph.tocoo()
        if graph.format == "coo":
            targets, sources = (_indices(name, x, n) for name, x, n in zip(("row", "col"), graph.coords, self.shape))
            if len(targets) != len(sources):
                raise ValueError(f"graph must have a row for each of {len(sources)} columns, got {len(targets)}")
        else:
            rows = graph.format == "csr"
            first = _first(graph.indptr, T if rows else N, len(graph.indices))
            indices = _indices("indices", graph.indices, N if rows else T)
            indices = indices[: first[-1]]
            self.begin, self.end, self.order, self.source = first[:-1], first[1:], None, indices
            if not rows:
                targets, sources = indices, np.repeat(np.arange(N), np.diff(first))
        if graph.format != "csr":
            self.begin, self.end, self.order, self.source = _by_rows(targets, sources, T)
        self._transposed = None

    @property
    def edges(self):
        """How many edges there are."""
        return len(self.source)

    def targets(self):
        """The target of each edge, in the order of ``data``."""
        return self._by_edge(np.repeat(np.arange(self.shape[0]), self.end - self.begin))

    def sources(self):
        """The source of each edge, in the order of ``data``."""
        return self._by_edge(self.source)

    def _by_edge(self, rows):
        if self.order is None:
            return rows
        result = np.empty_like(rows)
        result[self.order] = rows
        return result

    def transposed(self):
        """The same edges by source, for gradients; made at the first call."""
        if self._transposed is None:
            other = object.__new__(Graph)
            targets = np.repeat(np.arange(self.shape[0]), self.end - self.begin)
            other.shape = self.shape[::-1]
            other.begin, other.end, order, other.source = _by_rows(self.source, targets, self.shape[1])
            other.order = order if self.order is None else self.order[order]
            other._transposed = self
            self._transposed = other
        return self._transposed


def _indices(name, array, n):
    """A copy, so that what has been checked is what a kernel reads."""
    array = np.array(array, np.int64 if n > 2**31 else np.int32) if array.size == 0 else np.array(array)
    if array.dtype not in (np.int32, np.int64):
        raise TypeError(f"graph must have int32 or int64 indices, got {array.dtype} in {name}")
    if array.size and not (array.min() >= 0 and array.max() < n):
        raise ValueError(f"graph must have indices in [0, {n}), got {array.min()} to {array.max()} in {name}")
    return array


def _first(indptr, n, n_edges):
    first = np.array(indptr, np.int64)
    if len(first) != n + 1 or first[0] != 0 or first[-1] > n_edges or (np.diff(first) < 0).any():
        raise ValueError(f"graph must have an ascending indptr of {n + 1} elements from 0 to at most {n_edges}")
    return first


def _by_rows(targets, sources, n):
    """(begin, end, order, sources) of edges sorted by target; those of one target keep their order."""
    order = np.argsort(targets, kind="stable")
    first = np.zeros(n + 1, np.int64)
    np.cumsum(np.bincount(targets, minlength=n), out=first[1:])
    return first[:-1], first[1:], order.astype(np.int64, copy=False), np.ascontiguousarray(sources[order])


class Call:
    """One call of the kernel: what fastattn_graph in fastattn.h has, arrays (n, H, columns) and (n, H)."""

    __slots__ = ("mode", "score", "normalizer", "offset", "bits", "H", "Hkv", "D", "Dv", "query", "key", "value", "out",
                 "edge_bias", "edge_key", "edge_value", "lse", "delta", "grad_out", "grad_query", "w", "begin", "end",
                 "rows", "order", "cuts", "source", "sinks", "weights", "grad_scores", "grad_bias", "grad_w",
                 "longest", "counts", "scores", "first_score", "pairs", "scale", "softcap", "slope", "keep", "seed",
                 "dropout", "num_threads")

    def __init__(self, **values):
        for name in self.__slots__:
            setattr(self, name, values.get(name))

    def but(self, **values):
        """A copy with other values."""
        return Call(**{name: getattr(self, name) for name in self.__slots__} | values)


def _cuts(begin, end):
    """Rows at which tasks of about TASK edges begin, and their number: the same for every number of threads."""
    work = np.cumsum(end - begin + ROW)
    if not len(work):
        return np.zeros(1, np.int64)
    inner = np.searchsorted(work, np.arange(TASK, work[-1], TASK))
    return np.unique(np.concatenate([[0], inner, [len(work)]])).astype(np.int64)


def _parts(graph):
    """Rows of more than PART edges: (their numbers, (begin, end, row) of their parts)."""
    long = np.flatnonzero(graph.end - graph.begin > PART)
    begins = [np.arange(graph.begin[i], graph.end[i], PART) for i in long]
    rows = np.repeat(long, list(map(len, begins)))
    begin = np.concatenate(begins) if len(long) else np.zeros(0, np.int64)
    return long, begin.astype(np.int64), np.minimum(begin + PART, graph.end[rows]).astype(np.int64), rows


def run(call, graph, results, merge):
    """Run a call over the rows of a graph. `results`: names of arrays with a row for each target. Parts of long rows go
    to arrays of their own, which merge(row, arrays) joins. Returns the gradient of `w`, if it is wanted."""
    whole, starts = graph.end.copy(), np.ascontiguousarray(graph.begin)
    call.order, call.source = graph.order, graph.source
    if kernel.get() is not _runtime.graph or _runtime.plain is None:        # the reference: rows are whole
        return _run(call, begin=starts, end=whole, cuts=np.array([0, len(starts)]))
    long, begin, end, rows = _parts(graph)
    whole[long] = starts[long]
    of_w = _run(call, begin=starts, end=whole, cuts=_cuts(starts, whole))
    if not len(long):
        return of_w
    dtype = checks.compute_dtype(call.query.dtype)
    pieces = {name: np.zeros((len(rows), *getattr(call, name).shape[1:]), dtype) for name in results}
    parts = call.but(begin=begin, end=end, rows=rows.astype(np.int64), cuts=np.arange(len(rows) + 1), sinks=None)
    if call.mode != SUM and call.normalizer in (SIGMOID, RELU):
        parts.counts = _counts(call, graph, long)[np.searchsorted(long, rows)]
    elif call.mode != SUM and call.normalizer in (SPARSEMAX, ENTMAX15):
        (_find_levels if call.mode == OUTPUT else _find_deltas)(parts, long, dtype)
    more = _run(parts, **pieces)
    for row in long:
        at = rows == row
        merge(row, {name: array[at] for name, array in pieces.items()})
    return None if of_w is None else of_w + more


def _counts(call, graph, long):
    """How many edges of long rows count, (rows, H)."""
    counts = np.empty((len(long), call.H))
    for n, row in zip(counts, long):
        at = slice(graph.begin[row], graph.end[row])
        n[...] = at.stop - at.start
        if call.edge_bias is not None:
            n -= (call.edge_bias[at if graph.order is None else graph.order[at]] == -np.inf).sum(axis=0)
    return counts


def _find_levels(parts, long, dtype):
    """Give the parts of long rows their scores and thresholds."""
    ends = np.cumsum(parts.end - parts.begin)
    parts.first_score = ends - (parts.end - parts.begin)
    parts.scores = np.empty((parts.H, ends[-1]), dtype)
    _run(parts, mode=SCORES)
    rows = np.searchsorted(parts.rows, long), np.searchsorted(parts.rows, long, "right") - 1
    levels = np.empty((len(long), parts.H, 2))
    _run(parts, mode=LEVELS, begin=parts.first_score[rows[0]], end=ends[rows[1]], pairs=levels,
         cuts=np.arange(len(long) * parts.H + 1))
    parts.pairs = levels[np.searchsorted(long, parts.rows)]


def _find_deltas(parts, long, dtype):
    """Write the long rows' delta."""
    sums = np.empty((len(parts.rows), parts.H, 2))
    _run(parts, mode=DELTA, pairs=sums)
    for row in long:
        of_dp, of_g = sums[parts.rows == row].sum(axis=0).T
        with np.errstate(all="ignore"):
            parts.delta[row] = np.where(of_g == 0, 0, of_dp / of_g)


def _run(call, **values):
    call = call.but(**values)
    call.longest = int((call.end - call.begin).max(initial=0))
    if call.mode == GRADIENT and call.score == LEAKY:
        dtype = checks.compute_dtype(call.query.dtype)
        call.grad_w = np.zeros((max(1, len(call.cuts) - 1), call.H, -(-call.D // 16) * 16), dtype)
    kernel.get()(call)
    return None if call.grad_w is None else call.grad_w.sum(axis=0, dtype=np.float64)[:, : call.D]


def _merge_softmax(out, lse, sinks, normalizer):
    def merge(row, parts):
        if normalizer != SOFTMAX:
            out[row], lse[row] = parts["out"].sum(axis=0, dtype=np.float64), parts["lse"].max(axis=0)
            return
        outs, lses = parts["out"].astype(np.float64), parts["lse"].astype(np.float64)
        if sinks is not None:
            outs = np.concatenate([outs, np.zeros_like(outs[:1])])
            lses = np.concatenate([lses, sinks[None].astype(np.float64)])
        m = lses.max(axis=0)
        with np.errstate(all="ignore"):
            weights = np.where(lses == -np.inf, 0, np.exp(lses - np.where(np.isfinite(m), m, 0)))
            total = weights.sum(axis=0)
            outs[lses == -np.inf] = 0
            out[row] = np.where(total[:, None] > 0, (outs * weights[..., None]).sum(axis=0) / total[:, None], 0)
            lse[row] = np.where(total > 0, np.where(np.isfinite(m), m, 0) + np.log(total), -np.inf)
    return merge


def _edge_array(name, array, shape, dtype, inside):
    """An array of edges as (E, H) or (E, H, columns); heads may be missing or 1."""
    array = checks._array(name, array)
    if array.dtype not in (dtype, inside):
        raise TypeError(f"{name} must have query's dtype {checks._or(dtype, inside)}, got {array.dtype}")
    checks._check_layout(name, array)
    if array.ndim == len(shape) - 1:
        array = array[:, None]
    if array.ndim != len(shape) or array.shape[0] != shape[0] or array.shape[2:] != shape[2:] \
            or array.shape[1] not in (1, shape[1]):
        raise ValueError(f"{name} must have shape {shape}, with one axis of heads or without, got {array.shape}")
    return np.broadcast_to(array, shape)


def _call(query, key, value, graph, *, edge_bias, edge_key, edge_value, w=None, slope=0.0, saved=None,
          normalizer="softmax", **options):
    """(Graph, Call, checked problem) of a forward or, with saved = (grad_out, out, lse), a backward pass."""
    normalizer, offset, has_sink = checks.parse_normalizer(normalizer, options.get("sinks"))
    if normalizer != SOFTMAX and options.get("grad_lse") is not None:
        raise ValueError("grad_lse must be None where the normalizer is no softmax, got an array")
    graph = graph if isinstance(graph, Graph) else Graph(graph)
    query, key, value = (checks._array(name, x) for name, x in (("query", query), ("key", key), ("value", value)))
    packed = [0, len(query) if query.ndim else 0], [0, len(key) if key.ndim else 0]
    if saved is None:
        p = checks.problem(query, key, value, packed=packed, return_lse=True, **options)
    else:
        p = checks.gradient_problem(saved[0], query, key, value, *saved[1:], packed=packed, **options)
    if graph.shape != (query.shape[0], key.shape[0]):
        raise ValueError(f"graph must have shape {(query.shape[0], key.shape[0])}, targets of query and sources of "
                         f"key, got {graph.shape}")
    dtype, inside = query.dtype, checks.compute_dtype(query.dtype)
    H, Hkv, E = query.shape[1], key.shape[1], graph.edges
    call = Call(mode=OUTPUT, score=DOT if w is None else LEAKY, bits=64 if dtype == np.float64 else 32, H=H, Hkv=Hkv,
                D=query.shape[2], Dv=value.shape[2], query=query, key=key, value=value, scale=p.scale, slope=slope,
                softcap=p.softcap, keep=p.keep, seed=p.seed, dropout=p.dropout, sinks=p.sinks,
                num_threads=p.num_threads, w=None if w is None else w[None], normalizer=normalizer, offset=offset)
    if has_sink:
        call.sinks = np.zeros(H, inside)
    if edge_bias is not None:
        call.edge_bias = _edge_array("edge_bias", edge_bias, (E, H), dtype, inside)
    for name, array, columns in (("edge_key", edge_key, call.D), ("edge_value", edge_value, call.Dv)):
        if array is not None:
            setattr(call, name, _edge_array(name, array, (E, Hkv, columns), dtype, inside))
    return graph, call, p


def _forward(*arrays, return_lse=False, **options):
    return_lse = checks._boolean("return_lse", return_lse)
    graph, call, p = _call(*arrays, **options)
    call.out, call.lse = p.returned, p.returned_lse
    run(call, graph, ("out", "lse"), _merge_softmax(call.out, call.lse, call.sinks, call.normalizer))
    return (call.out, call.lse) if return_lse else call.out


def graph_attention(query, key, value, graph, *, edge_bias=None, edge_key=None, edge_value=None, scale=None,
                    softcap=None, sinks=None, normalizer="softmax", dropout_p=0.0, seed=None, out=None,
                    return_lse=False, num_threads=None):
    """Scaled dot-product attention of each target to the sources of its edges.

    For an edge e from source j to target i, in each head::

        s_e   = scale * query[i] . (key[j] + edge_key[e]) + edge_bias[e]
        out_i = sum_e softmax(s)_e (value[j] + edge_value[e])

    in one pass: no array of edges x head size is made.

    Parameters
    ----------
    query : array (targets, H, D), float32, float64, float16 or bfloat16
    key, value : arrays (sources, Hkv, D) and (sources, Hkv, Dv)
        Of query's dtype; with float32 queries also float16 or bfloat16. H is a multiple of Hkv.
    graph : scipy.sparse array (targets, sources), or `Graph`
        Stored elements are edges, whatever their values; duplicates are edges of their own.
    edge_bias : array (E,) or (E, H), optional
        In the order of the graph's ``data``. -inf leaves the edge out.
    edge_key, edge_value : arrays (E, Hkv, D) and (E, Hkv, Dv), or with 1 or no axis of heads, optional
        Features of the edges.
    normalizer : str, or ("sigmoid", b)
        What makes weights p of the scores s of a target's n edges (but those whose bias is -inf):

        - "softmax"; "softmax1" has one more score of 0 in the denominator, a sink without a value
        - "sigmoid": p = 1 / (1 + exp(-(s + b))), b = -log n unless given
        - "relu": p = max(s, 0) / n
        - "sparsemax": p = max(s - tau, 0) and "entmax15": p = max(s / 2 - tau, 0)^2, with the tau for which their sum
          is 1: many weights are exactly 0
    scale, softcap, sinks, dropout_p, seed, out, return_lse, num_threads : optional
        As in `attention`. Dropout counts edges in the order of ``data``. Sinks are for "softmax".

    Returns
    -------
    array (targets, H, Dv) of query's dtype; with `return_lse` also (targets, H), float64 for float64, else float32
        0 and -inf for targets without edges. In the place of the log-sum-exp, "sparsemax" and "entmax15" have tau,
        "sigmoid" and "relu" 0.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `attention`; for a graph of another shape or with indices out of range, edge arrays that do not fit, sinks
        with a normalizer that has no place for them.

    Notes
    -----
    2 E H (D + Dv) floating-point operations. Targets with more than 16384 edges are done in parts, so that they too are
    shared between threads; the bits of a row depend on its own edges and their order alone. For tau the scores of a
    target are kept, of all heads, in the scratch of a thread or, where it is done in parts, in an array of their own.

    References
    ----------
    Velickovic et al., "Graph Attention Networks", 2018; Shi et al., "Masked Label Prediction" (TransformerConv), 2021.
    Martins and Astudillo, "From Softmax to Sparsemax", 2016; Peters, Niculae and Martins, "Sparse Sequence-to-Sequence
    Models" (entmax), 2019; Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention", 2024.

    Examples
    --------
    >>> import numpy as np, scipy.sparse
    >>> import fastattn as fa
    >>> query, key, value = np.zeros((2, 1, 4)), np.zeros((3, 1, 4)), np.array([[[1.0]], [[3.0]], [[5.0]]])
    >>> graph = fa.Graph(scipy.sparse.csr_array([[1, 1, 0], [0, 0, 0]]))
    >>> fa.graph_attention(query, key, value, graph)[:, 0]
    array([[2.],
           [0.]])

    Scores 0 and 0.5, and weights 1/4 and 3/4:

    >>> fa.graph_attention(query, key, value, graph, edge_bias=np.array([0.0, 0.5]), normalizer="sparsemax")[0, 0]
    array([2.5])
    """
    return _forward(query, key, value, graph, edge_bias=edge_bias, edge_key=edge_key, edge_value=edge_value,
                    scale=scale, softcap=softcap, sinks=sinks, normalizer=normalizer, dropout_p=dropout_p, seed=seed,
                    out=out, return_lse=return_lse, num_threads=num_threads)


def gat_attention(source, target, value, graph, *, negative_slope=0.2, edge_logits=None, normalizer="softmax",
                  dropout_p=0.0, seed=None, out=None, return_lse=False, num_threads=None):
    """Attention with the scores of GAT, LeakyReLU(source[j] + target[i] + edge_logits[e]).

    Parameters
    ----------
    source, target : arrays (sources, H) and (targets, H), float32, float64, float16 or bfloat16
        The halves of the score, a^T W x of each node.
    value : array (sources, H, Dv) of their dtype
    graph : scipy.sparse array (targets, sources), or `Graph`
    negative_slope : float
        Of the LeakyReLU, at least 0.
    edge_logits : array (E,) or (E, H), optional
        In the order of the graph's ``data``.
    normalizer, dropout_p, seed, out, return_lse, num_threads : optional
        As in `graph_attention`.

    Returns, Raises
    ---------------
    As `graph_attention`.

    References
    ----------
    Velickovic et al., "Graph Attention Networks", 2018.

    Examples
    --------
    >>> import numpy as np, scipy.sparse
    >>> import fastattn as fa
    >>> value = np.array([[[1.0]], [[3.0]]])
    >>> fa.gat_attention(np.zeros((2, 1)), np.zeros((1, 1)), value, scipy.sparse.csr_array([[1, 1]]))
    array([[[2.]]])
    """
    query, key, options = _gat(source, target, negative_slope, edge_logits)
    return _forward(query, key, value, graph, normalizer=normalizer, dropout_p=dropout_p, seed=seed, out=out,
                    return_lse=return_lse, num_threads=num_threads, **options)


def gatv2_attention(source, target, weight, graph, *, value=None, negative_slope=0.2, edge_features=None,
                    normalizer="softmax", dropout_p=0.0, seed=None, out=None, return_lse=False, num_threads=None):
    """Attention with the scores of GATv2, weight . LeakyReLU(source[j] + target[i] + edge_features[e]).

    Parameters
    ----------
    source, target : arrays (sources, H, D) and (targets, H, D), float32, float64, float16 or bfloat16
        W x of each node.
    weight : array (H, D) of their dtype
    graph : scipy.sparse array (targets, sources), or `Graph`
    value : array (sources, H, Dv), optional
        Default: source, as in the paper.
    negative_slope : float
        Of the LeakyReLU, at least 0.
    edge_features : array (E, H, D), or with 1 or no axis of heads, optional
        In the order of the graph's ``data``.
    normalizer, dropout_p, seed, out, return_lse, num_threads : optional
        As in `graph_attention`.

    Returns, Raises
    ---------------
    As `graph_attention`.

    References
    ----------
    Brody, Alon and Yahav, "How Attentive are Graph Attention Networks?", 2022.

    Examples
    --------
    >>> import numpy as np, scipy.sparse
    >>> import fastattn as fa
    >>> source, target = np.array([[[1.0]], [[3.0]]]), np.zeros((1, 1, 1))
    >>> fa.gatv2_attention(source, target, np.zeros((1, 1)), scipy.sparse.csr_array([[1, 1]]))
    array([[[2.]]])
    """
    query, key, options = _additive(target, source, weight, negative_slope, edge_features)
    return _forward(query, key, key if value is None else value, graph, normalizer=normalizer, dropout_p=dropout_p,
                    seed=seed, out=out, return_lse=return_lse, num_threads=num_threads, **options)


class GraphGradients(NamedTuple):
    """What `graph_attention_backward` returns: arrays of the shape and dtype of their argument, or None."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    edge_bias: np.ndarray | None
    edge_key: np.ndarray | None
    edge_value: np.ndarray | None
    sinks: np.ndarray | None


class GATGradients(NamedTuple):
    """What `gat_attention_backward` returns."""

    source: np.ndarray
    target: np.ndarray
    value: np.ndarray
    edge_logits: np.ndarray | None


class GATv2Gradients(NamedTuple):
    """What `gatv2_attention_backward` returns; value is None where it was source, which then has both gradients."""

    source: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    value: np.ndarray | None
    edge_features: np.ndarray | None


def _add_parts(array):
    def merge(row, parts):
        (part,) = parts.values()
        array[row] = part.sum(axis=0, dtype=np.float64)
    return merge


def _backward(grad_out, query, key, value, out, lse, graph, *, edge_bias, edge_key, edge_value, sinks=None, **options):
    """(gradients of query, key, value and sinks, of w, edge_bias, edge_key and edge_value)."""
    graph, call, p = _call(query, key, value, graph, edge_bias=edge_bias, edge_key=edge_key, edge_value=edge_value,
                           sinks=sinks, saved=(grad_out, out, lse), **options)
    inside, E = checks.compute_dtype(call.query.dtype), graph.edges
    call.mode, call.grad_out = GRADIENT, checks._array("grad_out", grad_out)
    call.lse, call.grad_query = checks._array("lse", lse), p.returned["query"]
    out = checks._array("out", out)
    call.delta = p.returned["delta"]        # minus grad_lse so far; 0 for sigmoid and relu, and the thresholds' to come
    if call.normalizer == SOFTMAX:
        call.delta += np.einsum("thd,thd->th", call.grad_out, out, dtype=inside)
    call.weights, call.grad_scores, call.grad_bias = np.zeros((3, E, call.H), inside)
    of_w = run(call, graph, ("grad_query",), _add_parts(call.grad_query))

    back = graph.transposed()
    common = {"mode": SUM, "edge_bias": None, "edge_key": None, "edge_value": None, "lse": None}
    for_value = call.but(**common, score=DOT, value=call.grad_out, out=p.returned["value"])
    run(for_value, back, ("out",), _add_parts(for_value.out))
    for_key = call.but(**common | {"edge_value": call.edge_key}, value=call.query, query=call.key, Dv=call.D,
                       weights=call.grad_scores, out=p.returned["key"])
    if call.score == DOT:
        for_key.edge_value = None
    run(for_key, back, ("out",), _add_parts(for_key.out))

    of_edges = {"edge_bias": None if edge_bias is None else _of_edges(call.grad_bias, edge_bias),
                "edge_key": None, "edge_value": None}
    if edge_value is not None:
        rows = _outer(call, call.weights, call.grad_out[graph.targets()])
        of_edges["edge_value"] = _of_edges(rows, edge_value)
    if edge_key is not None:
        at = graph.targets()
        if call.score == DOT:
            rows = _outer(call, call.grad_scores, call.query[at])
        else:
            inner = call.query[at] + call.key[graph.sources()] + call.edge_key
            rows = call.grad_scores[..., None] * call.w[0] * np.where(inner > 0, 1, inner.dtype.type(call.slope))
        of_edges["edge_key"] = _of_edges(rows, edge_key)
    return gradient.gradients(p, query, key, value, None, sinks), of_w, of_edges


def _outer(call, weights, rows):
    """weights (E, H) times rows (E, H, columns), summed over the query heads of each key head."""
    full = weights[..., None] * rows
    return full.reshape(len(full), call.Hkv, call.H // max(1, call.Hkv), full.shape[-1]).sum(axis=2)


def _of_edges(full, given):
    """Summed over an axis of heads that was missing or 1."""
    given = np.asarray(given)
    if given.ndim < full.ndim:
        full = full.sum(axis=1)
    elif given.shape[1] == 1 and full.shape[1] != 1:
        full = full.sum(axis=1, keepdims=True)
    return full.astype(given.dtype, copy=False)


def graph_attention_backward(grad_out, query, key, value, out, lse, graph, *, grad_lse=None, edge_bias=None,
                             edge_key=None, edge_value=None, scale=None, softcap=None, sinks=None, normalizer="softmax",
                             dropout_p=0.0, seed=None, num_threads=None):
    """Gradients of `graph_attention`: what each input changes in sum(grad_out * out) + sum(grad_lse * lse).

    Parameters
    ----------
    grad_out : array (targets, H, Dv) of query's dtype
    query, key, value, graph : as they were given to `graph_attention`, like all options
        A `Graph` keeps what the gradients need of it between calls.
    out, lse : arrays
        What ``graph_attention(..., return_lse=True)`` returned.
    grad_lse : array (targets, H) of lse's dtype, optional
        For normalizers "softmax" and "softmax1" only.

    Returns
    -------
    GraphGradients
        Of query, key, value, edge_bias, edge_key, edge_value and sinks, None for what was not given.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `graph_attention`, and for grad_out, out, lse or grad_lse of another dtype or shape; for grad_lse with a
        normalizer that has no log-sum-exp.

    Notes
    -----
    Three numbers are kept for each edge and head; nothing of edges x head size but the gradients of edge_key and
    edge_value. Every sum has one order, whatever the number of threads. Where a weight is 0 at the edge of its support,
    or a score of "relu" is 0, the derivative is that from the side of 0.

    Examples
    --------
    >>> import numpy as np, scipy.sparse
    >>> import fastattn as fa
    >>> query, key, value = np.zeros((1, 1, 4)), np.zeros((2, 1, 4)), np.array([[[1.0]], [[3.0]]])
    >>> graph = fa.Graph(scipy.sparse.csr_array([[1, 1]]))
    >>> out, lse = fa.graph_attention(query, key, value, graph, return_lse=True)
    >>> fa.graph_attention_backward(np.ones((1, 1, 1)), query, key, value, out, lse, graph).value[:, 0, 0]
    array([0.5, 0.5])
    """
    of, _, of_edges = _backward(
        grad_out, query, key, value, out, lse, graph, grad_lse=grad_lse, edge_bias=edge_bias, edge_key=edge_key,
        edge_value=edge_value, scale=scale, softcap=softcap, sinks=sinks, normalizer=normalizer, dropout_p=dropout_p,
        seed=seed, num_threads=num_threads)
    return GraphGradients(of.query, of.key, of.value, **of_edges, sinks=of.sinks)


def _additive(target, source, weight, negative_slope, edge_key):
    """(query, key, what `_call` takes besides) for the scores of GATv2."""
    slope = checks._real("negative_slope", negative_slope)
    if not 0 <= slope < np.inf:
        raise ValueError(f"negative_slope must be finite and at least 0, got {negative_slope}")
    target, source = checks._array("target", target), checks._array("source", source)
    for name, array in (("target", target), ("source", source)):
        if array.ndim != 3:
            raise ValueError(f"{name} must have shape (nodes, H, D), got {array.shape}")
    if source.shape[1:] != target.shape[1:]:
        raise ValueError(f"source must have target's heads and size {target.shape[1:]}, got {source.shape[1:]}")
    shape = target.shape[1:]
    weight = np.ones(shape, target.dtype) if weight is None else checks._array("weight", weight)
    if weight.dtype not in (target.dtype, checks.compute_dtype(target.dtype)):
        raise TypeError(f"weight must have target's dtype {target.dtype}, got {weight.dtype}")
    if weight.shape != shape:
        raise ValueError(f"weight must have shape {shape}, heads and size of target, got {weight.shape}")
    return target, source, {"edge_bias": None, "edge_key": edge_key, "edge_value": None, "w": weight, "slope": slope,
                            "scale": 1.0}


def _gat(source, target, negative_slope, edge_logits):
    """As `_additive`, for scores of one number a node."""
    source, target = checks._array("source", source), checks._array("target", target)
    for name, array in (("source", source), ("target", target)):
        if array.ndim != 2:
            raise ValueError(f"{name} must have shape (nodes, H), got {array.shape}")
    logits = None if edge_logits is None else checks._array("edge_logits", edge_logits)[..., None]
    return _additive(target[..., None], source[..., None], None, negative_slope, logits)


def gat_attention_backward(grad_out, source, target, value, out, lse, graph, *, grad_lse=None, negative_slope=0.2,
                           edge_logits=None, normalizer="softmax", dropout_p=0.0, seed=None, num_threads=None):
    """Gradients of `gat_attention`, as `graph_attention_backward` has those of `graph_attention`.

    Parameters
    ----------
    grad_out, out : arrays (targets, H, Dv) of value's dtype
    source, target, value, graph : as they were given to `gat_attention`, like all options
    lse, grad_lse : arrays (targets, H); grad_lse is optional

    Returns
    -------
    GATGradients
        Of source, target, value and edge_logits.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `gat_attention` and `graph_attention_backward`.

    Examples
    --------
    >>> import numpy as np, scipy.sparse
    >>> import fastattn as fa
    >>> source, target, value = np.zeros((2, 1)), np.ones((1, 1)), np.array([[[1.0]], [[3.0]]])
    >>> graph = fa.Graph(scipy.sparse.csr_array([[1, 1]]))
    >>> out, lse = fa.gat_attention(source, target, value, graph, return_lse=True)
    >>> fa.gat_attention_backward(np.ones((1, 1, 1)), source, target, value, out, lse, graph).source[:, 0]
    array([-0.5,  0.5])
    """
    query, key, options = _gat(source, target, negative_slope, edge_logits)
    of, _, of_edges = _backward(
        grad_out, query, key, value, out, lse, graph, grad_lse=grad_lse, normalizer=normalizer, dropout_p=dropout_p,
        seed=seed, num_threads=num_threads, **options)
    logits = of_edges["edge_key"]
    return GATGradients(of.key[..., 0], of.query[..., 0], of.value, None if logits is None else logits[..., 0])


def gatv2_attention_backward(grad_out, source, target, weight, out, lse, graph, *, grad_lse=None, value=None,
                             negative_slope=0.2, edge_features=None, normalizer="softmax", dropout_p=0.0, seed=None,
                             num_threads=None):
    """Gradients of `gatv2_attention`, as `graph_attention_backward` has those of `graph_attention`.

    Parameters
    ----------
    grad_out, out : arrays (targets, H, Dv) of source's dtype
    source, target, weight, graph, value : as they were given to `gatv2_attention`, like all options
    lse, grad_lse : arrays (targets, H); grad_lse is optional

    Returns
    -------
    GATv2Gradients
        Of source, target, weight, value and edge_features. Without a value, source has the gradient as value too.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `gatv2_attention` and `graph_attention_backward`.

    Examples
    --------
    >>> import numpy as np, scipy.sparse
    >>> import fastattn as fa
    >>> source, target, weight = np.array([[[1.0]], [[3.0]]]), np.zeros((1, 1, 1)), np.zeros((1, 1))
    >>> graph = fa.Graph(scipy.sparse.csr_array([[1, 1]]))
    >>> out, lse = fa.gatv2_attention(source, target, weight, graph, return_lse=True)
    >>> fa.gatv2_attention_backward(np.ones((1, 1, 1)), source, target, weight, out, lse, graph).weight
    array([[1.]])
    """
    query, key, options = _additive(target, source, weight, negative_slope, edge_features)
    of, of_w, of_edges = _backward(
        grad_out, query, key, key if value is None else value, out, lse, graph, grad_lse=grad_lse,
        normalizer=normalizer, dropout_p=dropout_p, seed=seed, num_threads=num_threads, **options)
    of_w = of_w.astype(options["w"].dtype, copy=False)
    of_source, of_value = (of.key + of.value, None) if value is None else (of.key, of.value)
    return GATv2Gradients(of_source, of.query, of_w, of_value, of_edges["edge_key"])
