"""`fastattn.nn` beside torch.nn and torch_geometric.nn with the same weights.

In float64, where what is not rounding stands out: results may differ by the rounding of sums. An element of a result is
behind sums of ``depth`` terms in all, whose order the two choose each for themselves, so they differ by at most
2 depth u times the magnitude of what is summed; the inputs are normal numbers and the weights those of the layers, so
that magnitude is that of the largest element of the result, times ROOM for what cancels on the way.
"""

import itertools

import numpy as np
import pytest

from fastattn import nn

torch = pytest.importorskip("torch", reason="torch is not installed: nothing to compare with")

ROOM = 32


def assert_same(actual, expected, depth, context="", dtype=np.float64):
    expected = expected.detach().numpy()
    assert actual.shape == expected.shape, context
    assert actual.dtype == dtype
    bound = 2 * depth * np.finfo(dtype).eps / 2 * ROOM * max(np.abs(expected).max(initial=0), 1)
    worst = np.abs(actual - expected).max(initial=0)
    assert worst <= bound, f"{context}: {worst:.3g} apart, bound {bound:.3g}"


def same_state(theirs, mine):
    """`mine` with the weights of `theirs`, drawn so that no bias is 0, after a look at the names."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=rng, dtype=p.dtype))
    theirs.eval()
    assert mine.load_state_dict(theirs.state_dict()) == ([], [])
    for name, weight in theirs.state_dict().items():
        np.testing.assert_array_equal(mine.state_dict()[name], weight.numpy())
    theirs.load_state_dict({name: torch.from_numpy(w.copy()) for name, w in mine.state_dict().items()})
    return mine


def drawn(rng, *shape):
    return rng.standard_normal(shape)


def tensors(*arrays):
    return [torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in arrays]


CONSTRUCTORS = list(itertools.product(*[[False, True]] * 4, [(None, None), (6, None), (None, 10), (8, 8)]))
L, S, E, H, B = 5, 7, 8, 2, 3


@pytest.mark.parametrize("bias, add_bias_kv, add_zero_attn, batch_first, sizes", CONSTRUCTORS)
def test_multihead_attention(bias, add_bias_kv, add_zero_attn, batch_first, sizes):
    """Every call option with every constructor's, batched and not, of one, two and three inputs."""
    options = dict(bias=bias, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn, kdim=sizes[0], vdim=sizes[1],
                   batch_first=batch_first)
    theirs = torch.nn.MultiheadAttention(E, H, dropout=0.3, dtype=torch.float64, **options)
    mine = same_state(theirs, nn.MultiheadAttention(E, H, 0.3, dtype="float64", **options))
    own = sizes in ((None, None), (8, 8))
    number = 0
    for batched, padding, mask, need_weights, average in itertools.product(
            (True, False), (None, "bool", "ends", "float"), (None, "bool", "float", "bool heads", "float heads"),
            (True, False), (True, False)):
        if average and not need_weights:
            continue
        number += 1
        rng = np.random.default_rng(number)
        inputs = number % 3 if own else 2
        if inputs == 0:
            q = k = v = drawn(rng, B, S, E)
        else:
            q = drawn(rng, B, L, E)
            k = v = drawn(rng, B, S, E)
            if inputs == 2:
                k, v = (drawn(rng, B, S, n or E) for n in sizes)
        rows, batches = q.shape[1], B if batched else 1
        seen = {id(x): (x if batch_first else x.swapaxes(0, 1).copy()) if batched else x[0] for x in (q, k, v)}
        q, k, v = (seen[id(x)] for x in (q, k, v))
        keys = {None: None, "bool": rng.random((batches, S)) < 0.3,
                "ends": np.arange(S) >= rng.integers(1, S + 1, (batches, 1)), "float": drawn(rng, batches, S)}[padding]
        if keys is not None:
            if keys.dtype == bool:
                keys[:, 0] = False  # every row sees a key: torch's are NaN otherwise
            keys = keys if batched else keys[0]
        lead = (batches * H,) if mask and mask.endswith("heads") else ()
        weights = None
        if mask:
            weights = drawn(rng, *lead, rows, S)
            if mask.startswith("bool"):
                weights = weights > 0.5
                weights[..., 0] = False
            else:
                weights[..., 1:][weights[..., 1:] > 1] = -np.inf
        call = dict(key_padding_mask=keys, need_weights=need_weights, attn_mask=weights, average_attn_weights=average)
        context = f"batched={batched}, inputs={inputs}, padding={padding}, mask={mask}, weights={need_weights, average}"
        out, alignment = mine(q, k, v, **call)
        of = {id(x): torch.from_numpy(x) for x in (q, k, v)}
        if keys is not None and weights is not None and (keys.dtype == bool) != (weights.dtype == bool):
            # What torch warns of as deprecated: masks of two kinds.
            call["key_padding_mask"] = np.where(keys, -np.inf, 0.0) if keys.dtype == bool else keys
            call["attn_mask"] = np.where(weights, -np.inf, 0.0) if weights.dtype == bool else weights
        call |= dict(zip(("key_padding_mask", "attn_mask"), tensors(call["key_padding_mask"], call["attn_mask"])))
        with torch.no_grad():
            expected, aligned = theirs(*(of[id(x)] for x in (q, k, v)), **call)
        assert_same(out, expected, 3 * 10 + E + S, context)
        if need_weights:
            assert_same(alignment, aligned, 2 * 10 + 4, context)
        else:
            assert alignment is None


@pytest.mark.parametrize("add_bias_kv, add_zero_attn, batch_first, need_weights, padded, rows",
                         list(itertools.product(*[[False, True]] * 5, [L, S])))
def test_is_causal_is_a_hint(add_bias_kv, add_zero_attn, batch_first, need_weights, padded, rows):
    options = dict(add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn, batch_first=batch_first)
    theirs = torch.nn.MultiheadAttention(E, H, dtype=torch.float64, **options)
    mine = same_state(theirs, nn.MultiheadAttention(E, H, dtype="float64", **options))
    rng = np.random.default_rng(0)
    q, k = drawn(rng, B, rows, E), drawn(rng, B, S, E)
    if not batch_first:
        q, k = q.swapaxes(0, 1).copy(), k.swapaxes(0, 1).copy()
    mask, keys = np.triu(np.ones((rows, S), bool), 1), np.zeros((B, S), bool) if padded else None
    expected, aligned = theirs(*tensors(q, k, k), *tensors(keys, need_weights, mask), is_causal=True)
    out, alignment = mine(q, k, k, keys, need_weights, mask, is_causal=True)
    assert_same(out, expected, 3 * 10 + E + S)
    if need_weights:
        assert_same(alignment, aligned, 2 * 10 + 4)
    # Without a mask, which torch refuses, it is the mask.
    with torch.no_grad():
        expected = theirs(*tensors(q, k, k), *tensors(keys, True, mask))[0]
    assert_same(mine(q, k, k, keys, need_weights, is_causal=True)[0], expected, 3 * 10 + E + S)


F = 12  # dim_feedforward
DEPTH = 3 * (E + S + E + F + E)  # of a layer, with its norms
LAYERS = list(itertools.product([False, True], ["relu", "gelu"], [False, True], [False, True]))


def masks_of(rng, n, m):
    """Masks (n, m) as torch's layers are given them, with every row seeing a key."""
    allowed = rng.random((n, m)) < 0.6
    allowed[:, 0] = True
    return ~allowed, np.where(allowed, drawn(rng, n, m), -np.inf)


@pytest.mark.parametrize("norm_first, activation, batch_first, bias",
                         LAYERS)
@pytest.mark.parametrize("batched", [True, False])
def test_encoder(norm_first, activation, batch_first, bias, batched):
    options = dict(dim_feedforward=F, activation=activation, layer_norm_eps=1e-3, batch_first=batch_first,
                   norm_first=norm_first, bias=bias)
    theirs = torch.nn.TransformerEncoderLayer(E, H, dtype=torch.float64, **options)
    mine = nn.TransformerEncoderLayer(E, H, dtype="float64", **options)
    norm = [torch.nn.LayerNorm(E, dtype=torch.float64), nn.LayerNorm(E, dtype="float64")]
    theirs = torch.nn.TransformerEncoder(theirs, 3, norm[0], enable_nested_tensor=False)
    mine = same_state(theirs, nn.TransformerEncoder(mine, 3, norm[1]))
    rng = np.random.default_rng(0)
    x = drawn(rng, B, S, E) if batched else drawn(rng, S, E)
    if batched and not batch_first:
        x = x.swapaxes(0, 1).copy()
    padding = np.arange(S) >= np.array([[S], [3], [5]])
    padding = padding if batched else padding[1]
    for mask in (None, *masks_of(rng, S, S)):
        for keys in None, padding, np.where(padding, -np.inf, 0):
            if keys is not None and mask is not None and keys.dtype != mask.dtype:
                continue  # torch's warns
            expected = theirs(*tensors(x, mask, keys))
            assert_same(mine(x, mask, keys), expected, 3 * DEPTH)
            assert_same(mine.layers[0](x, mask, keys), theirs.layers[0](*tensors(x, mask, keys)), DEPTH)
    causal = torch.nn.Transformer.generate_square_subsequent_mask(S, dtype=torch.float64)
    expected = theirs(torch.from_numpy(x), causal)
    for call in (dict(mask=causal.numpy()), dict(mask=causal.numpy(), is_causal=True), dict(is_causal=True)):
        assert_same(mine(x, **call), expected, 3 * DEPTH)


@pytest.mark.parametrize("norm_first, activation, batch_first, bias",
                         LAYERS)
@pytest.mark.parametrize("batched", [True, False])
def test_transformer(norm_first, activation, batch_first, bias, batched):
    options = dict(num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=F, activation=activation,
                   batch_first=batch_first, norm_first=norm_first, bias=bias)
    theirs = torch.nn.Transformer(E, H, dtype=torch.float64, **options)
    mine = same_state(theirs, nn.Transformer(E, H, dtype="float64", **options))
    rng = np.random.default_rng(0)
    src, tgt = drawn(rng, B, S, E), drawn(rng, B, L, E)
    if not batched:
        src, tgt = src[0], tgt[0]
    elif not batch_first:
        src, tgt = src.swapaxes(0, 1).copy(), tgt.swapaxes(0, 1).copy()
    of_src, of_tgt = np.arange(S) >= np.array([[S], [3], [5]]), np.arange(L) >= np.array([[L], [2], [4]])
    if not batched:
        of_src, of_tgt = of_src[1], of_tgt[1]
    assert_same(mine(src, tgt), theirs(*tensors(src, tgt)), 4 * DEPTH)
    for i in range(2):
        own, between, across = masks_of(rng, S, S)[i], masks_of(rng, L, L)[i], masks_of(rng, L, S)[i]
        given = (src, tgt, own, between, across) + ((of_src, of_tgt, of_src) if i == 0 else ())
        assert_same(mine(*given), theirs(*tensors(*given)), 4 * DEPTH)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    np.testing.assert_array_equal(nn.Transformer.generate_square_subsequent_mask(L, "float64"), mask.numpy())
    expected = theirs(*tensors(src, tgt), tgt_mask=mask)
    assert_same(mine(src, tgt, tgt_is_causal=True), expected, 4 * DEPTH)
    assert_same(mine(src, tgt, tgt_mask=mask.numpy(), tgt_is_causal=True), expected, 4 * DEPTH)


def test_float32_is_as_near_to_float64_as_torch():
    theirs = torch.nn.Transformer(64, 4, 2, 2, 128, batch_first=True)
    mine = same_state(theirs, nn.Transformer(64, 4, 2, 2, 128, batch_first=True))
    rng = np.random.default_rng(0)
    src, tgt = drawn(rng, 4, 50, 64).astype(np.float32), drawn(rng, 4, 40, 64).astype(np.float32)
    with torch.no_grad():
        single = theirs(*tensors(src, tgt)).numpy()
        exact = theirs.double()(*tensors(src.astype(np.float64), tgt.astype(np.float64))).numpy()

    def rms(x):
        return np.sqrt(np.mean(np.square(x - exact)))

    assert rms(mine(src, tgt)) <= 2 * rms(single)


def test_layers():
    rng = np.random.default_rng(0)
    x = drawn(rng, 2, 6, 10, 12)
    for bias in True, False:
        theirs = torch.nn.Linear(12, 7, bias, dtype=torch.float64)
        mine = same_state(theirs, nn.Linear(12, 7, bias, "float64"))
        assert_same(mine(x), theirs(torch.from_numpy(x)), 12)
        assert_same(mine(x, "gelu_tanh"), torch.nn.GELU("tanh")(theirs(torch.from_numpy(x))), 12 + 8)
        for shape in 12, (10, 12):
            theirs = torch.nn.LayerNorm(shape, 1e-3, bias=bias, dtype=torch.float64)
            mine = same_state(theirs, nn.LayerNorm(shape, 1e-3, bias=bias, dtype="float64"))
            assert_same(mine(x), theirs(torch.from_numpy(x)), 3 * 120)
        for stride, padding in ((3, 4), 0), (2, (1, 2)):
            theirs = torch.nn.Conv2d(6, 5, (3, 4), stride, padding, bias=bias, dtype=torch.float64)
            mine = same_state(theirs, nn.Conv2d(6, 5, (3, 4), stride, padding, bias, "float64"))
            assert_same(mine(x), theirs(torch.from_numpy(x)), 6 * 12)
        theirs = torch.nn.GRU(12, 5, bias=bias, batch_first=True, dtype=torch.float64)
        mine = same_state(theirs, nn.GRU(12, 5, bias, "float64"))
        first = drawn(rng, 6, 5)
        for mine_out, their_out in ((mine(x[0]), theirs(torch.from_numpy(x[0]))),
                                    (mine(x[0], first), theirs(*tensors(x[0], first[None])))):
            assert_same(mine_out[0], their_out[0], 10 * (12 + 5))
            assert_same(mine_out[1], their_out[1][0], 10 * (12 + 5))
        theirs = torch.nn.GRU(12, 5, bias=bias, batch_first=True, bidirectional=True, dtype=torch.float64)
        mine = same_state(theirs, nn.GRU(12, 5, bias, "float64", bidirectional=True))
        lengths = [10, 3, 1, 7, 10, 4]
        packed = torch.nn.utils.rnn.pack_padded_sequence(torch.from_numpy(x[0]), lengths, True, enforce_sorted=False)
        states, last = theirs(packed)
        states = torch.nn.utils.rnn.pad_packed_sequence(states, batch_first=True)[0]
        for mine_out, expected in zip(mine(x[0], None, lengths), (states, last)):
            assert_same(mine_out, expected, 10 * (12 + 5))
        for mine_out, expected in zip(mine(x[0]), theirs(torch.from_numpy(x[0]))):
            assert_same(mine_out, expected, 10 * (12 + 5))
    for eps in None, 1e-3:
        theirs = torch.nn.RMSNorm((10, 12), eps, dtype=torch.float64)
        mine = same_state(theirs, nn.RMSNorm((10, 12), eps, dtype="float64"))
        assert_same(mine(x), theirs(torch.from_numpy(x)), 3 * 120)
    theirs = torch.nn.Sequential(torch.nn.Linear(12, 7), torch.nn.ReLU(), torch.nn.Linear(7, 2)).double()
    first, last = nn.Linear(12, 7, dtype="float64"), nn.Linear(7, 2, dtype="float64")
    mine = nn.Sequential(first, lambda y: np.maximum(y, 0), last)
    assert_same(same_state(theirs, mine)(x), theirs(torch.from_numpy(x)), 12 + 7)
    ids = np.array([[3, 0], [1, 1]])
    theirs = torch.nn.Embedding(4, 6, padding_idx=1, dtype=torch.float64)
    mine = same_state(theirs, nn.Embedding(4, 6, 1, "float64"))
    assert_same(mine(ids), theirs(torch.from_numpy(ids)), 0)


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("mean", [0, 1, 100, 1e4])
@pytest.mark.parametrize("N", [1, 16, 33, 384, 512, 5000])
def test_norms_are_as_accurate_as_torchs(kind, N, mean):
    """In float32: the RMS error is at most twice torch's, whose sums have another order."""
    theirs = getattr(torch.nn, kind)(N)
    mine = same_state(theirs, getattr(nn, kind)(N))
    x = (drawn(np.random.default_rng(0), 200, N) + mean).astype(np.float32)
    wide = getattr(nn, kind)(N, theirs.eps or float(np.finfo(np.float32).eps), dtype="float64")
    wide.load_state_dict(theirs.state_dict())
    exact = wide(x.astype(np.float64))
    with torch.inference_mode():
        errors = [np.sqrt(np.mean(np.square(y - exact))) for y in (mine(x), theirs(torch.from_numpy(x)).numpy())]
    assert errors[0] <= 2 * errors[1], f"{errors[0]:.3g} against torch's {errors[1]:.3g}"


@pytest.mark.compiled
def test_norms_of_special_rows():
    """Of squares past the largest float32, of no variance without eps, of NaN and Inf: torch's zeros, NaN, numbers.

    The reference has float64, whose squares stay finite.
    """
    x = drawn(np.random.default_rng(0), 20, 512).astype(np.float32)
    x[3] *= 1e18
    x[5], x[6], x[7] = 0, 3, np.float32(0.1)
    x[8, 2], x[9, 2], x[10, 2] = np.nan, np.inf, -np.inf
    for kind, eps in itertools.product(["LayerNorm", "RMSNorm"], [1e-5, 0.0]):
        theirs, mine = getattr(torch.nn, kind)(512, eps), getattr(nn, kind)(512, eps)
        # A rounded mean of 0.1 leaves a variance of 0, or of its error.
        rows = np.delete(x, 7, 0) if kind == "LayerNorm" and not eps else x
        with torch.inference_mode():
            expected = theirs(torch.from_numpy(rows))
        out = mine(rows)
        np.testing.assert_array_equal(np.isnan(out), np.isnan(expected.numpy()), err_msg=f"{kind}, {eps}")
        assert_same(np.nan_to_num(out), expected.nan_to_num(), 3 * 512, f"{kind}, {eps}", np.float32)
        assert (out[3] == 0).all()


def test_safetensors(tmp_path):
    save = pytest.importorskip("safetensors.torch").save_file
    theirs = torch.nn.TransformerEncoderLayer(E, H, F)
    for dtype in torch.float32, torch.bfloat16, torch.float16, torch.float64:
        state = {f"model.{name}": w.to(dtype) for name, w in theirs.state_dict().items()}
        save(state | {"model.steps": torch.arange(3)}, tmp_path / "weights.safetensors", {"format": "pt"})
        mine = nn.TransformerEncoderLayer(E, H, F)
        assert mine.load_state_dict(tmp_path / "weights.safetensors", prefix="model.") == ([], [])
        for name, weight in mine.state_dict().items():
            assert weight.dtype == np.float32 and weight.flags.writeable
            np.testing.assert_array_equal(weight, state[f"model.{name}"].float().numpy())
    assert mine.load_state_dict(theirs) == ([], [])
    assert mine.load_state_dict(theirs.bfloat16().state_dict()) == ([], [])


GRAPH = dict(concat=[True, False], add_self_loops=[True, False], bias=[True, False], residual=[True, False],
             edge=[None, "mean", "add", "mul", "min", "max", 0.5])


@pytest.mark.parametrize("name", ["GATConv", "GATv2Conv", "GATv2Conv shared"])
@pytest.mark.parametrize("bipartite", [False, True])
def test_graph_layers(name, bipartite):
    geometric = pytest.importorskip("torch_geometric.nn")
    name, _, shared = name.partition(" ")
    for number, values in enumerate(itertools.product(*GRAPH.values())):
        options = dict(zip(GRAPH, values))
        rng = np.random.default_rng(number)
        edge = options.pop("edge")
        if edge is not None:
            options |= dict(edge_dim=3, fill_value=edge)
        if shared:
            options["share_weights"] = True
        channels = (6, 4 + 2 * bool(shared)) if bipartite else 6
        theirs = getattr(geometric, name)(channels, 5, heads=2, negative_slope=0.3, **options).double()
        mine = same_state(theirs, getattr(nn, name)(channels, 5, 2, negative_slope=0.3, dtype="float64", **options))
        n, m = (9, 7) if bipartite else (9, 9)
        edges = np.stack([rng.integers(0, n, 40), rng.integers(0, m - 1, 40)])  # target m - 1 has none
        x = (drawn(rng, n, 6), drawn(rng, m, channels[1])) if bipartite else drawn(rng, n, 6)
        attr = drawn(rng, 40, 3) if edge is not None else None
        their_x = tuple(tensors(*x)) if bipartite else torch.from_numpy(x)
        expected, (their_edges, weights) = theirs(their_x, *tensors(edges, attr), return_attention_weights=True)
        out, (my_edges, mine_weights) = mine(x, edges, attr, return_attention_weights=True)
        context = f"{name}, {options}"
        np.testing.assert_array_equal(my_edges, their_edges.numpy())
        assert_same(out, expected, 3 * 6 + 5 + 40, context)
        assert_same(mine_weights, weights, 3 * 6 + 5 + 40, context)
        assert_same(mine(x, edges, attr), expected, 3 * 6 + 5 + 40, context)
        if bipartite and name == "GATConv" and not options["residual"]:
            expected = theirs((their_x[0], None), *tensors(edges, attr), size=(n, m))
            assert_same(mine((x[0], None), edges, attr, size=(n, m)), expected, 3 * 6 + 5 + 40, context)
