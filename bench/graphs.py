"""Graphs to attend along, and the layers of PyTorch Geometric on the same arrays.

Needs scipy; the layers need torch and torch_geometric. `run.py` skips their rows with a reason where they are absent.
"""

from functools import partial

import numpy as np
import scipy.sparse

import fastattn as fa


def drawn(kind, nodes, edges, rng):
    """A graph (targets, sources) whose ends are drawn evenly, or by a power law: 100,000 nodes have a hub of 2 %."""
    odds = np.arange(1, nodes + 1) ** (-0.8 if kind == "power law" else 0.0)
    ends = [rng.permutation(nodes)[rng.choice(nodes, edges, p=odds / odds.sum())] for _ in range(2)]
    targets, sources = ends[0][order := np.argsort(ends[0], kind="stable")], ends[1][order]
    first = np.searchsorted(targets, np.arange(nodes + 1)).astype(np.int32)
    return scipy.sparse.csr_array((np.ones(edges, np.float32), sources.astype(np.int32), first), shape=(nodes, nodes))


class Layer:
    """One kind of attention on arrays: fastattn's functions, and the layer of PyTorch Geometric without its weights."""

    def __init__(self, kind, matrix, heads, size, rng):
        nodes = matrix.shape[0]
        self.kind, self.graph, self.heads, self.size = kind, fa.Graph(matrix), heads, size

        def some(*shape):
            return rng.standard_normal(shape, dtype=np.float32)

        query, key, value = some(nodes, heads, size), some(nodes, heads, size), some(nodes, heads, size)
        # in the order of the functions' arguments; and what their gradients are called
        self.arrays, self.names = {
            "dot products": ((query, key, value), ("query", "key", "value")),
            "GAT": ((some(nodes, heads), some(nodes, heads), value), ("source", "target", "value")),
            "GATv2": ((key, query, some(heads, size)), ("source", "target", "weight")),
        }[kind]
        self.grad_out = some(nodes, heads, size)
        name = {"dot products": "graph_attention", "GAT": "gat_attention", "GATv2": "gatv2_attention"}[kind]
        self.attend, self.backward = name, name + "_backward"
        self.graph.transposed()         # made once for a graph, as its sorted edges are

    def forward(self, module=fa):
        return getattr(module, self.attend)(*self.arrays, self.graph)

    def both(self, module=fa):
        """(gradients of the arrays in their order)."""
        out, lse = getattr(module, self.attend)(*self.arrays, self.graph, return_lse=True)
        of = getattr(module, self.backward)(self.grad_out, *self.arrays, out, lse, self.graph)
        return [getattr(of, name) for name in self.names]

    def peer(self):
        """(forward, forward and backward) of PyTorch Geometric; ImportError without it."""
        import torch
        from torch_geometric import nn

        ends = np.stack([self.graph.sources(), self.graph.targets()]).astype(np.int64)
        edges, grad_out = torch.from_numpy(ends), torch.from_numpy(self.grad_out)
        tensors = [torch.from_numpy(x).requires_grad_() for x in self.arrays]
        nodes = self.graph.shape[0]
        # What the layers' own forward() does behind the projections of its input.
        if self.kind == "dot products":
            layer = nn.TransformerConv(1, self.size, self.heads)

            def forward():
                query, key, value = tensors
                return layer.propagate(edges, query=query, key=key, value=value, edge_attr=None, size=(nodes, nodes))
        elif self.kind == "GAT":
            layer = nn.GATConv(1, self.size, self.heads, add_self_loops=False)

            def forward():
                source, target, value = tensors
                weights = layer.edge_updater(edges, alpha=(source, target), edge_attr=None, size=(nodes, nodes))
                return layer.propagate(edges, x=(value, value), alpha=weights, size=(nodes, nodes))
        else:
            layer = nn.GATv2Conv(1, self.size, self.heads, add_self_loops=False)
            del layer.att

            def forward():
                source, target, weight = tensors
                layer.att = weight[None]
                weights = layer.edge_updater(edges, x=(source, target), edge_attr=None)
                return layer.propagate(edges, x=(source, target), alpha=weights, size=(nodes, nodes))

        def without_graph():
            with torch.no_grad():
                return forward()

        return without_graph, lambda: torch.autograd.grad(forward(), tensors, grad_out)


def full(length, heads, size, rng):
    """Calls of attention along all edges of a full graph, and of `attention` on the same rows, heads first."""
    rows = [rng.standard_normal((length, heads, size), dtype=np.float32) for _ in range(3)]
    graph = fa.Graph(scipy.sparse.csr_array(np.ones((length, length), np.float32)))
    dense = [np.ascontiguousarray(x.swapaxes(0, 1)) for x in rows]
    return {"graph": partial(fa.graph_attention, *rows, graph), "dense": partial(fa.attention, *dense)}
