"""Graph attention layers, under the names of torch_geometric."""

import math

import numpy as np

from .. import checks
from ..graph import Graph, gat_attention, gatv2_attention
from ._module import Module, check_features, check_indices, float_dtype, generator, uniform
from .layers import Linear

REDUCTIONS = {"add": np.add, "sum": np.add, "mean": np.add, "mul": np.multiply, "min": np.minimum, "max": np.maximum}


class _GraphLayer(Module):
    """What both layers share: options, edges, and what follows attention."""

    def __init__(self, in_channels, out_channels, heads, concat, negative_slope, dropout, add_self_loops, edge_dim,
                 fill_value, residual):
        super().__init__()
        self.in_channels = (in_channels,) * 2 if checks._is_integer(in_channels) else tuple(in_channels)
        self.out_channels = checks._integer("out_channels", out_channels, 1)
        self.heads, self.concat = checks._integer("heads", heads, 1), checks._boolean("concat", concat)
        self.negative_slope, self.dropout = checks._real("negative_slope", negative_slope), dropout
        self.add_self_loops, self.edge_dim = checks._boolean("add_self_loops", add_self_loops), edge_dim
        if isinstance(fill_value, str) and fill_value not in REDUCTIONS:
            raise ValueError(f"fill_value must be a number or one of {tuple(REDUCTIONS)}, got {fill_value!r}")
        self.fill_value = fill_value if isinstance(fill_value, str) else checks._real("fill_value", fill_value)
        self.residual = checks._boolean("residual", residual)

    def _end(self, bias, dtype, rng):
        size = self.out_channels * (self.heads if self.concat else 1)
        self.res = Linear(self.in_channels[1], size, False, dtype, seed=rng) if self.residual else None
        self.bias = np.zeros(size, float_dtype(dtype)) if bias else None

    def _by_head(self, rows):
        return rows.reshape(len(rows), self.heads, self.out_channels)

    def _nodes(self, x):
        """Features of sources and targets: one array twice, or two."""
        pair = x if isinstance(x, (tuple, list)) else (x, x)
        if len(pair) != 2:
            raise ValueError(f"x must be an array or two, got {len(pair)}")
        checked = []
        for name, part, size in zip(("x of sources", "x of targets"), pair, self.in_channels):
            part = None if part is None else check_features(name, part, size)
            if part is not None and part.ndim != 2:
                raise ValueError(f"{name} must have shape (nodes, {size}), got {part.shape}")
            checked.append(part)
        if checked[0] is None:
            raise ValueError("x of sources must be an array, got None")
        return checked

    def _edges(self, edge_index, edge_attr, size):
        """(edge_index, edge_attr, `Graph`, the edges in the order of its data), with self-loops if they are wanted."""
        edge_index = np.asarray(edge_index)
        if edge_index.dtype.kind not in "iu" or edge_index.ndim != 2 or len(edge_index) != 2:
            raise ValueError("edge_index must be integers (2, E), sources and targets, got "
                             f"{edge_index.dtype} of shape {edge_index.shape}")
        for name, row, n in zip(("sources", "targets"), edge_index, size):
            check_indices(f"{name} of edge_index", row, n)
        if edge_attr is not None:
            if self.edge_dim is None:
                raise ValueError("edge_attr must be None for a layer without edge_dim, got an array")
            edge_attr = checks._array("edge_attr", edge_attr)
            edge_attr = edge_attr[:, None] if edge_attr.ndim == 1 else edge_attr
            if edge_attr.shape != (edge_index.shape[1], self.edge_dim):
                raise ValueError(f"edge_attr must have shape {(edge_index.shape[1], self.edge_dim)}, got "
                                 f"{edge_attr.shape}")
        if self.add_self_loops:
            keep, n = edge_index[0] != edge_index[1], min(size)
            edge_index = edge_index[:, keep]
            if edge_attr is not None:
                edge_attr = edge_attr[keep]
                edge_attr = np.concatenate([edge_attr, self._of_loops(edge_attr, edge_index[1], n)])
            edge_index = np.concatenate([edge_index, np.broadcast_to(np.arange(n), (2, n))], axis=1)

        from scipy.sparse import csr_array

        sources, targets = edge_index
        order = np.argsort(targets, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(targets, minlength=size[1]))])
        graph = Graph(csr_array((np.ones(len(order), np.int8), sources[order], starts), shape=(size[1], size[0])))
        return edge_index, edge_attr, graph, order

    def _of_loops(self, attr, targets, n):
        """Features of the self-loops of n nodes, from those of the edges to them."""
        if not isinstance(self.fill_value, str):
            return np.broadcast_to(np.asarray(self.fill_value, attr.dtype), (n, attr.shape[1]))
        inside = targets < n
        attr, targets = attr[inside], targets[inside]
        reduce = REDUCTIONS[self.fill_value]
        identity = {np.multiply: 1, np.minimum: np.inf, np.maximum: -np.inf}.get(reduce, 0)
        result = np.full((n, attr.shape[1]), identity, attr.dtype)
        reduce.at(result, targets, attr)
        counts = np.bincount(targets, minlength=n)[:, None]
        if self.fill_value == "mean":
            result /= np.maximum(counts, 1).astype(attr.dtype)
        elif self.fill_value in ("min", "max"):
            result[counts[:, 0] == 0] = 0
        return result

    def _finish(self, out, targets):
        """Heads side by side or their mean, the residual, the bias."""
        out = out.reshape(len(out), self.heads * self.out_channels) if self.concat else out.mean(axis=1)
        if self.res is not None and targets is not None:
            out += self.res(targets)
        if self.bias is not None:
            out += self.bias
        return out


class GATConv(_GraphLayer):
    """torch_geometric.nn.GATConv in eval mode: scores LeakyReLU(att_src . x_j + att_dst . x_i + att_edge . e).

    Parameters
    ----------
    in_channels : int or (sources', targets')
        Two numbers make two products, lin_src and lin_dst, in the place of lin.
    out_channels, heads : int
    concat : bool
        Whether heads are put side by side, or averaged.
    negative_slope : float
    dropout : float
        Without effect.
    add_self_loops : bool
        Whether each node that is source and target has one edge to itself, in the place of those it has.
    edge_dim : int, optional
        Features of edges.
    fill_value : number, or "mean", "add", "sum", "min", "max", "mul"
        The features of those self-loops: a number, or from the edges to the node.
    bias, residual : bool
    dtype : float32 or float64
    seed : int or Generator, optional

    Attributes
    ----------
    lin, or lin_src and lin_dst : Linear
    att_src, att_dst : arrays (1, heads, out_channels)
    lin_edge : Linear, att_edge : array
        With edge_dim.
    res : Linear, or None
    bias : array, or None

    References
    ----------
    Velickovic et al., "Graph Attention Networks", 2018.
    """

    def __init__(self, in_channels, out_channels, heads=1, concat=True, negative_slope=0.2, dropout=0.0,
                 add_self_loops=True, edge_dim=None, fill_value="mean", bias=True, residual=False, dtype="float32", *,
                 seed=None):
        super().__init__(in_channels, out_channels, heads, concat, negative_slope, dropout, add_self_loops, edge_dim,
                         fill_value, residual)
        rng, size = generator(seed), heads * out_channels
        if checks._is_integer(in_channels):
            self.lin = Linear(in_channels, size, False, dtype, seed=rng)
        else:
            self.lin_src = Linear(self.in_channels[0], size, False, dtype, seed=rng)
            self.lin_dst = Linear(self.in_channels[1], size, False, dtype, seed=rng)
        if edge_dim is not None:
            self.lin_edge = Linear(edge_dim, size, False, dtype, seed=rng)
        for name in ("att_src", "att_dst") + (("att_edge",) if edge_dim is not None else ()):
            setattr(self, name, uniform(rng, (1, heads, out_channels), math.sqrt(6 / (heads + out_channels)), dtype))
        self._end(bias, dtype, rng)

    def __call__(self, x, edge_index, edge_attr=None, size=None, return_attention_weights=False):
        """The features (targets, heads out_channels) of the targets.

        Parameters
        ----------
        x : array (nodes, channels), or (of sources, of targets)
            Those of the targets may be None: their share of the scores is then 0, and ``size`` says how many they are.
        edge_index : integers (2, E)
            Sources, then targets; an edge may occur several times.
        edge_attr : array (E, edge_dim) or (E,), optional
        size : (sources, targets), optional
        return_attention_weights : bool
            Whether (out, (edge_index, weights (E, heads))) is returned, of the edges that were used.
        """
        sources, targets = self._nodes(x)
        bipartite = not hasattr(self, "lin")
        value = self._by_head((self.lin_src if bipartite else self.lin)(sources))
        of_source, of_target = (value * self.att_src).sum(axis=-1), None
        if targets is not None:
            rows = value if targets is sources and not bipartite else \
                self._by_head((self.lin_dst if bipartite else self.lin)(targets))
            of_target = (rows * self.att_dst).sum(axis=-1)
        elif size is None:
            raise ValueError("size must be (sources, targets) where x of targets is None, got None")
        size = (len(sources), len(targets)) if targets is not None else tuple(size)
        if of_target is None:
            of_target = np.zeros((size[1], self.heads), value.dtype)
        edge_index, edge_attr, graph, order = self._edges(edge_index, edge_attr, size)
        logits = None
        if edge_attr is not None:
            logits = (self._by_head(self.lin_edge(edge_attr)) * self.att_edge).sum(axis=-1)
        out, lse = gat_attention(of_source, of_target, value, graph, negative_slope=self.negative_slope,
                                 edge_logits=None if logits is None else logits[order], return_lse=True)
        out = self._finish(out, targets)
        if not return_attention_weights:
            return out
        scores = of_source[edge_index[0]] + of_target[edge_index[1]] + (0 if logits is None else logits)
        return out, (edge_index, np.exp(_leaky(scores, self.negative_slope) - lse[edge_index[1]]))


class GATv2Conv(_GraphLayer):
    """torch_geometric.nn.GATv2Conv in eval mode: scores att . LeakyReLU(lin_l x_j + lin_r x_i + lin_edge e).

    Parameters are those of `GATConv`, and

    share_weights : bool
        Whether lin_r is lin_l.

    Attributes
    ----------
    lin_l, lin_r : Linear
        Of sources and of targets.
    att : array (1, heads, out_channels)
    lin_edge, res : Linear
        Where they are asked for.
    bias : array, or None

    References
    ----------
    Brody, Alon and Yahav, "How Attentive are Graph Attention Networks?", 2022.
    """

    def __init__(self, in_channels, out_channels, heads=1, concat=True, negative_slope=0.2, dropout=0.0,
                 add_self_loops=True, edge_dim=None, fill_value="mean", bias=True, share_weights=False, residual=False,
                 dtype="float32", *, seed=None):
        super().__init__(in_channels, out_channels, heads, concat, negative_slope, dropout, add_self_loops, edge_dim,
                         fill_value, residual)
        rng, width = generator(seed), heads * out_channels
        self.share_weights = checks._boolean("share_weights", share_weights)
        self.lin_l = Linear(self.in_channels[0], width, bias, dtype, seed=rng)
        self.lin_r = self.lin_l if share_weights else Linear(self.in_channels[1], width, bias, dtype, seed=rng)
        if edge_dim is not None:
            self.lin_edge = Linear(edge_dim, width, False, dtype, seed=rng)
        self.att = uniform(rng, (1, heads, out_channels), math.sqrt(6 / (heads + out_channels)), dtype)
        self._end(bias, dtype, rng)

    def __call__(self, x, edge_index, edge_attr=None, return_attention_weights=False):
        """As `GATConv`; x of targets must be there."""
        sources, targets = self._nodes(x)
        if targets is None:
            raise ValueError("x of targets must be an array, got None")
        if sources is targets and not self.share_weights:
            of_source, of_target = (self._by_head(rows) for rows in self._project(sources, "lin_l", "lin_r"))
        else:
            of_source = self._by_head(self.lin_l(sources))
            of_target = of_source if sources is targets else self._by_head(self.lin_r(targets))
        edge_index, edge_attr, graph, order = self._edges(edge_index, edge_attr, (len(sources), len(targets)))
        features = None if edge_attr is None else self._by_head(self.lin_edge(edge_attr))
        out, lse = gatv2_attention(of_source, of_target, self.att[0], graph, negative_slope=self.negative_slope,
                                   edge_features=None if features is None else features[order], return_lse=True)
        out = self._finish(out, targets)
        if not return_attention_weights:
            return out
        sums = of_source[edge_index[0]] + of_target[edge_index[1]]
        scores = (_leaky(sums if features is None else sums + features, self.negative_slope) * self.att[0]).sum(axis=-1)
        return out, (edge_index, np.exp(scores - lse[edge_index[1]]))


def _leaky(x, slope):
    return np.where(x > 0, x, np.asarray(slope, x.dtype) * x)
