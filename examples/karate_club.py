"""Which club will each member join? A graph attention network that knows two answers of 34.

Zachary's karate club split into two after a quarrel between its instructor (node 0) and its president (node 33). A
two-layer GAT learns from these two nodes and the friendships alone where the others went. Its gradients are those of
`fastattn.gat_attention_backward`, the steps plain gradient descent; the rest is NumPy.

    python examples/karate_club.py              the graph is networkx's; without it one of 2 groups is drawn
"""

import argparse

import numpy as np
import scipy.sparse

import fastattn as fa

HEADS, SIZE = 4, 4      # of the first layer; the second has one head of 2, the logits


def club():
    """(graph with loops (N, N), label of each node, the two nodes whose labels are known)."""
    try:
        import networkx
    except ImportError:
        rng = np.random.default_rng(0)
        labels = np.repeat([0, 1], 17)
        friends = rng.random((34, 34)) < np.where(labels[:, None] == labels, 0.3, 0.02)
        dense = np.triu(friends, 1)
        return scipy.sparse.csr_array((dense | dense.T | np.eye(34, dtype=bool)).astype(float)), labels, [0, 33]
    karate = networkx.karate_club_graph()
    labels = np.array([karate.nodes[n]["club"] == "Officer" for n in karate]).astype(int)
    dense = networkx.to_numpy_array(karate, weight=None) + np.eye(len(labels))
    return scipy.sparse.csr_array(dense), labels, [0, 33]


def parameters(N, seed=0):
    rng = np.random.default_rng(seed)

    def draw(inputs, *shape):
        return rng.standard_normal((inputs, *shape)) / np.sqrt(inputs)

    return {"w1": draw(N, HEADS, SIZE), "source1": draw(SIZE, HEADS).T, "target1": draw(SIZE, HEADS).T,
            "w2": draw(HEADS * SIZE, 1, 2), "source2": draw(2, 1).T, "target2": draw(2, 1).T}


def layer(x, w, a_source, a_target, graph):
    """(out (N, H, F), what its gradient needs) of a GAT layer of nodes x (N, K) and weights w (K, H, F)."""
    value = np.tensordot(x, w, 1)
    source, target = ((value * a).sum(axis=-1) for a in (a_source, a_target))
    out, lse = fa.gat_attention(source, target, value, graph, return_lse=True)
    return out, (x, w, a_source, a_target, source, target, value, out, lse)


def layer_backward(grad_out, saved, graph):
    """Gradients of x, w, a_source and a_target."""
    x, w, a_source, a_target, source, target, value, out, lse = saved
    g = fa.gat_attention_backward(grad_out, source, target, value, out, lse, graph)
    of_value = g.value + g.source[..., None] * a_source + g.target[..., None] * a_target
    return (np.tensordot(of_value, w, ((1, 2), (1, 2))), np.tensordot(x, of_value, (0, 0)),
            (g.source[..., None] * value).sum(axis=0), (g.target[..., None] * value).sum(axis=0))


def loss_and_gradients(p, graph, labels, known):
    """(cross entropy of the known nodes, its gradients, logits (N, 2) of all nodes). Each node is its own feature."""
    x = np.eye(len(labels))
    hidden, saved1 = layer(x, p["w1"], p["source1"], p["target1"], graph)
    active = np.tanh(hidden)
    out, saved2 = layer(active.reshape(len(x), -1), p["w2"], p["source2"], p["target2"], graph)
    logits = out[:, 0]
    chances = np.exp(logits - logits.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    loss = -np.log(chances[known, labels[known]]).mean()

    grad = np.zeros_like(out)
    grad[known, 0] = (chances[known] - np.eye(2)[labels[known]]) / len(known)
    g = {}
    of_active, g["w2"], g["source2"], g["target2"] = layer_backward(grad, saved2, graph)
    of_hidden = of_active.reshape(hidden.shape) * (1 - active**2)
    _, g["w1"], g["source1"], g["target1"] = layer_backward(of_hidden, saved1, graph)
    return loss, g, logits


def train(graph, labels, known, steps=200, rate=0.2, seed=0):
    """(parameters, losses, logits) after gradient descent."""
    graph = fa.Graph(graph)         # sorted and transposed once, for all steps
    p, losses = parameters(len(labels), seed), []
    for _ in range(steps):
        loss, g, logits = loss_and_gradients(p, graph, labels, known)
        losses.append(loss)
        for name in p:
            p[name] -= rate * g[name]
    return p, losses, logits


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="fewer steps")
    args = parser.parse_args(argv)
    graph, labels, known = club()
    _, losses, logits = train(graph, labels, known, steps=60 if args.small else 200)
    found = logits.argmax(axis=1)
    sure = abs(logits[:, 1] - logits[:, 0])
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.4f}; known: {known}")
    for group, name in enumerate(("instructor", "president")):
        members = np.flatnonzero(found == group)
        print(f"with the {name}:", *(f"{n}" if labels[n] == group else f"({n})" for n in members))
    print(f"{(found == labels).sum()} of {len(labels)} right; wrong ones in brackets; least sure: node {sure.argmin()}")


if __name__ == "__main__":
    main()
