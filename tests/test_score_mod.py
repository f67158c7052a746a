"""score_mod: compiled functions that change scores, compared with a bias of the same numbers and with differences."""

import ctypes
import itertools
import re
import shutil
import subprocess

import numpy as np
import pytest
import test_backward
from cases import assert_close, bound, exact, exact_gradients, generator, gradient_bound, inputs
from layouts import LAYOUTS, assert_same_bits
from test_attention import both_dtypes

import fastattn as fa
from fastattn import reference

F32, F64 = np.float32, np.float64
NORMALIZERS = ["softmax", "softmax1", "sigmoid", "relu", "sparsemax", "entmax15"]

# Each for float and for double: `real`, and a name with that type at its end.
SOURCE = """
#include <math.h>
#include <stdint.h>

#define NAME2(name, type) name##_##type
#define NAME1(name, type) NAME2(name, type)
#define NAME(name) NAME1(name, real)
#define ALL int64_t batch, int64_t head, int64_t query, int64_t key, \\
            int64_t n_queries, int64_t n_keys, int64_t stride, void *data
#define EACH for (int64_t j = 0; j < n_keys; j++) for (int64_t i = 0; i < n_queries; i++)
#define AT [j*stride + i]

/* an integer in [-8, 8] of the place alone, in eighths: exact, whatever it is added to in whichever type */
static double place(int64_t b, int64_t h, int64_t i, int64_t j) {
    return (double)((7*b + 5*h + 3*i + 11*j + i*j) % 17 - 8)/8;
}

void NAME(add)(real *s, ALL) { EACH s AT += (real)place(batch, head, query + i, key + j); }
void NAME(add_gradient)(real *g, const real *s, ALL) { (void)g; (void)s; }

/* data: a table of (keys) numbers */
void NAME(table)(real *s, ALL) { EACH s AT += ((const real *)data)[key + j]; }

/* smooth, and different in each place: s + a sin(s + place) */
void NAME(wave)(real *s, ALL) { EACH s AT += (real)(0.5*sin(s AT + place(batch, head, query + i, key + j))); }
void NAME(wave_gradient)(real *g, const real *s, ALL) {
    EACH g AT *= (real)(1 + 0.5*cos(s AT + place(batch, head, query + i, key + j)));
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: cc is not on PATH")
    where = tmp_path_factory.mktemp("score_mod")
    (where / "functions.c").write_text("#define real float\n" + SOURCE + "\n")
    (where / "double.c").write_text("#define real double\n" + SOURCE + "\n")
    subprocess.run([compiler, "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-o", where / "functions.so",
                    where / "functions.c", where / "double.c", "-lm"], check=True)
    return ctypes.CDLL(str(where / "functions.so"))


def function(library, name, dtype, arrays=1):
    """The ctypes function for scores of the dtype."""
    real = {"float32": ctypes.c_float, "float64": ctypes.c_double}[np.dtype(dtype).name]
    found = getattr(library, f"{name}_{'float' if real is ctypes.c_float else 'double'}")
    found.restype = None
    found.argtypes = [ctypes.POINTER(real)] * arrays + [ctypes.c_int64] * 7 + [ctypes.c_void_p]
    return found


def mod(library, name, dtype, data=None):
    gradient = None if name == "table" else function(library, name + "_gradient", dtype, 2)
    return fa.ScoreMod(function(library, name, dtype), gradient, data)


def places(B, H, L, S):
    """What `add` adds, as a bias (B, H, L, S)."""
    b, h, i, j = np.ogrid[:B, :H, :L, :S]
    return ((7 * b + 5 * h + 3 * i + 11 * j + i * j) % 17 - 8) / 8


# --- each position is called with its own numbers ---

@both_dtypes
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("L, S", [(1, 1), (3, 130), (64, 96), (65, 97), (130, 300)])
def test_places(L, S, normalizer, dtype, seed, library):
    """As a bias that is a function of batch, head, query and key; its sum is the same rounding that a bias' has."""
    rng = generator(seed, L, S)
    arrays = inputs(rng, (2,), 4, 2, L, S, 8, 9, dtype)
    change, bias = mod(library, "add", dtype), places(2, 4, L, S).astype(dtype)
    for more in [{}, {"causal": True}, {"mask": rng.random((L, S)) < 0.5}, {"window": (40, 3), "query_offset": 5},
                 {"kv_lengths": [S, S // 2]}, {"query_lengths": [L, L // 2]}, {"scale": -0.7},
                 {"dropout_p": 0.3, "seed": 1}]:
        options = {**more, "normalizer": normalizer}
        context = {"dtype": dtype, "L": L, "S": S, "options": list(more), "normalizer": normalizer, "seed": seed}
        out, lse = fa.attention(*arrays, score_mod=change, return_lse=True, **options)
        true, true_lse = exact(*arrays, bias=bias, **options)
        allowed = bound(*arrays, bias=bias, **options)
        assert_close(out, true, allowed.out, context)
        assert_close(lse, true_lse, allowed.lse, context)
        grad_out = rng.standard_normal(out.shape).astype(dtype)
        arguments = grad_out, *arrays, out, lse
        got = fa.attention_backward(*arguments, score_mod=change, **options)
        right = exact_gradients(*arguments, bias=bias, **options)
        errors = gradient_bound(*arguments, bias=bias, **options)
        for name in "query", "key", "value":
            assert_close(getattr(got, name), getattr(right, name), getattr(errors, name), {**context, "gradient": name})


@both_dtypes
def test_beside_bias_and_softcap(dtype, seed, library):
    rng = generator(seed)
    arrays = inputs(rng, (2,), 4, 2, 70, 200, 8, 9, dtype)
    bias = (rng.integers(-16, 17, (70, 200)) / 8).astype(dtype)  # its sum with the other is exact
    bias[:, 7] = -np.inf
    change, more = mod(library, "add", dtype), places(2, 4, 70, 200).astype(dtype)
    both = bias + more
    out, lse = fa.attention(*arrays, score_mod=change, bias=bias, return_lse=True)
    # one sum more than with one bias: u |s + more|, u of the largest score for out twice
    u, largest = np.finfo(dtype).eps / 2, 20
    allowed = bound(*arrays, bias=both)
    true, true_lse = exact(*arrays, bias=both)
    assert abs(true_lse).max() < largest
    assert_close(out, true, allowed.out + 2 * u * largest * allowed.magnitude, {"dtype": dtype})
    assert_close(lse, true_lse, allowed.lse + u * largest, {"dtype": dtype})
    # softcap comes behind it: that of a score of 0 is of `places` alone
    q, k, v = (np.zeros_like(arrays[0]), *arrays[1:])
    capped = (2 * np.tanh(more.astype(F64) / 2)).astype(dtype)
    out = fa.attention(q, k, v, score_mod=change, softcap=2.0)
    allowed = bound(q, k, v, bias=capped)
    assert_close(out, exact(q, k, v, bias=capped)[0], allowed.out + 12 * u * 2 * allowed.magnitude, {"dtype": dtype})


@both_dtypes
@pytest.mark.compiled
def test_chosen_rows_of_weights(dtype, seed, library):
    rng = generator(seed)
    query, key, _ = inputs(rng, (2,), 4, 2, 130, 200, 8, 9, dtype)
    change = mod(library, "wave", dtype)
    for options in {}, {"causal": True}, {"normalizer": "sparsemax"}:
        full = fa.attention_weights(query, key, score_mod=change, **options)
        for rows in [[3, 129, 64, 65, 0], [7], range(60, 70)]:
            got = fa.attention_weights(query, key, rows=rows, score_mod=change, **options)
            assert_same_bits(got, full[:, :, list(rows)], {"rows": rows, "options": options})
        unit = np.broadcast_to(np.eye(200, dtype=dtype), (2, 2, 200, 200))
        whole = fa.attention(query, key, unit, score_mod=change, **options)
        assert_close(full, whole, 1e-12 + 4 * np.finfo(dtype).eps * abs(whole), {"options": options})


def test_chosen_heads_are_refused(library):
    q = np.zeros((2, 3, 4), F32)
    for module in fa, reference:
        with pytest.raises(ValueError, match="heads must be None with a score_mod, which gets the numbers of all"):
            module.attention_weights(q, q, heads=[0], score_mod=mod(library, "add", F32))


@both_dtypes
def test_packed_sequences(dtype, seed, library):
    """batch is the number of the sequence; query and key count from its begin."""
    rng = generator(seed)
    lengths = [(3, 5), (0, 4), (70, 100), (5, 0), (64, 97)]
    cu_q, cu_k = (np.concatenate(([0], np.cumsum(n))) for n in zip(*lengths))
    q, k, v = (rng.standard_normal((n, h, 8)).astype(dtype) for n, h in ((cu_q[-1], 4), (cu_k[-1], 2), (cu_k[-1], 2)))
    change, bias = mod(library, "add", dtype), places(5, 4, 70, 100).astype(dtype)
    out = fa.varlen_attention(q, k, v, cu_q, cu_k, score_mod=change, causal=True)
    for b in range(5):
        rows, keys = slice(*cu_q[b : b + 2]), slice(*cu_k[b : b + 2])
        one = [x.swapaxes(0, 1) for x in (q[rows], k[keys], v[keys])]
        options = {"causal": True, "bias": bias[b, :, : lengths[b][0], : lengths[b][1]]}
        assert_close(out[rows].swapaxes(0, 1), exact(*one, **options)[0], bound(*one, **options).out, {"sequence": b})


# --- gradients ---

@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])  # without kinks
def test_gradients_against_differences(normalizer, seed, library):
    for number in range(40):
        rng = generator(seed, number)
        L, S, D = (int(n) for n in rng.integers(1, 9, 3))
        arrays = [rng.standard_normal(n) for n in ((2, 2, L, D), (2, 1, S, D), (2, 1, S, 3))]
        options = {"softcap": 1.5, "causal": True, "bias": rng.standard_normal((L, S)), "dropout_p": 0.4}
        options = {name: option for name, option in options.items() if rng.random() < 0.4}
        options |= {"seed": 7, "normalizer": normalizer, "score_mod": mod(library, "wave", F64)}
        for module in fa, reference:
            check_differences(rng, module, arrays, options, number)


def check_differences(rng, module, arrays, options, number):
    step = [rng.standard_normal(x.shape) for x in arrays]
    out, lse = module.attention(*arrays, return_lse=True, **options)
    grad_out = rng.standard_normal(out.shape)

    def value(t):
        return (module.attention(*(x + t * d for x, d in zip(arrays, step)), **options) * grad_out).sum()

    got = module.attention_backward(grad_out, *arrays, out, lse, **options)
    parts = [(g * d).sum() for g, d in zip(got[:3], step)]
    numeric = test_backward.differences(value)
    assert abs(numeric - sum(parts)) <= 1e-7 * (1 + np.abs(parts).sum()), (number, module.__name__, options)


def test_missing_gradient(library):
    q = np.zeros((2, 3, 4), F32)
    change = function(library, "add", F32)
    out, lse = fa.attention(q, q, q, score_mod=change, return_lse=True)
    for module, given in itertools.product([fa, reference], [change, fa.ScoreMod(change)]):
        with pytest.raises(ValueError, match="gradient"):
            module.attention_backward(out, q, q, q, out, lse, score_mod=given)


# --- bits ---

@pytest.mark.compiled
@both_dtypes
@pytest.mark.parametrize("name", ["add", "wave"])
def test_bits(name, dtype, seed, library):
    rng = generator(seed)
    q, k, v = inputs(rng, (2,), 4, 2, 150, 300, 12, 10, dtype)
    grad_out = rng.standard_normal((2, 4, 150, 10)).astype(dtype)
    change = mod(library, name, dtype)

    def results(arrays, grad_out, **more):
        more |= {"causal": True, "query_offset": 150, "score_mod": change}
        out, lse = fa.attention(*arrays, return_lse=True, **more)
        return [out, lse, *fa.attention_backward(grad_out, *arrays, out, lse, **more)[:3],
                fa.attention_weights(*arrays[:2], **more)]

    whole = results((q, k, v), grad_out)
    for n in 1, 2, 3, 5:
        for got, expected in zip(results((q, k, v), grad_out, num_threads=n), whole):
            assert_same_bits(got, expected, {"threads": n})
    for layout in LAYOUTS:
        moved = [LAYOUTS[layout](x) for x in (q, k, v)]
        for got, expected in zip(results(moved, LAYOUTS[layout](grad_out)), whole):
            assert_same_bits(got, expected, {"layout": layout})


# --- what is hidden ---

@both_dtypes
def test_hidden_nan_is_harmless(dtype, seed, library):
    rng = generator(seed)
    q, k, v = inputs(rng, (), 2, 1, 70, 200, 8, 9, dtype)
    mask = rng.random((70, 200)) < 0.6
    mask[:, [5, 100]] = False
    grad_out = rng.standard_normal((2, 70, 9)).astype(dtype)
    options = {"mask": mask, "score_mod": mod(library, "wave", dtype)}
    results = []
    for filling in 0, np.nan, np.inf:
        k[:, [5, 100]] = v[:, [5, 100]] = filling
        out, lse = fa.attention(q, k, v, return_lse=True, **options)
        results.append([out, lse, *fa.attention_backward(grad_out, q, k, v, out, lse, **options)[:3]])
    for before, *after in zip(*results):
        for other in after:
            allowed = 0 if fa.isa() != "reference" else 200 * np.finfo(dtype).eps * (1 + abs(before))
            assert np.isfinite(before).all() and (abs(before - other) <= allowed).all()


# --- ways to give a function ---

@both_dtypes
def test_data(dtype, seed, library):
    rng = generator(seed)
    arrays = inputs(rng, (), 2, 1, 20, 130, 8, 9, dtype)
    table = rng.standard_normal(130).astype(dtype)
    plain = function(library, "table", dtype)
    expected, allowed = exact(*arrays, bias=table)[0], bound(*arrays, bias=table).out
    for data in table, table.ctypes.data:
        assert_close(fa.attention(*arrays, score_mod=fa.ScoreMod(plain, data=data)), expected, allowed, {"data": data})
    scipy = pytest.importorskip("scipy")
    address = ctypes.c_void_p(table.ctypes.data)
    for given in scipy.LowLevelCallable(plain, address), fa.ScoreMod(scipy.LowLevelCallable(plain, address)):
        assert_close(fa.attention(*arrays, score_mod=given), expected, allowed, {"data": "user_data"})
    other = fa.ScoreMod(scipy.LowLevelCallable(plain, ctypes.c_void_p(0)), data=table)
    assert_close(fa.attention(*arrays, score_mod=other), expected, allowed, {"data": "instead of user_data"})


def test_scipy_low_level_callable(seed, library):
    scipy = pytest.importorskip("scipy")
    q, k, v = inputs(generator(seed), (), 2, 1, 20, 130, 8, 9)
    plain, gradient = function(library, "wave", F32), function(library, "wave_gradient", F32, 2)
    one = fa.ScoreMod(plain, gradient)
    other = fa.ScoreMod(scipy.LowLevelCallable(plain), scipy.LowLevelCallable(gradient))
    results = [fa.attention(q, k, v, score_mod=given, return_lse=True) for given in (one, other)]
    for a, b in zip(*results):
        assert_same_bits(a, b, {})
    for a, b in zip(*(fa.attention_backward(v.repeat(2, 0)[:, :20], q, k, v, *results[0], score_mod=given)[:3]
                      for given in (one, other))):
        assert_same_bits(a, b, {})


def test_numba(seed):
    numba = pytest.importorskip("numba")
    kinds = [numba.types.CPointer(numba.float32), *[numba.int64] * 7, numba.types.voidptr]

    @numba.cfunc(numba.void(*kinds))
    def distance(scores, batch, head, query, key, n_queries, n_keys, stride, data):
        for j in range(n_keys):
            for i in range(n_queries):
                scores[j * stride + i] -= abs(query + i - key - j)

    arrays = inputs(generator(seed), (), 2, 1, 70, 130, 8, 9)
    bias = -abs(np.arange(70)[:, None] - np.arange(130)).astype(F32)
    assert_close(fa.attention(*arrays, score_mod=distance), exact(*arrays, bias=bias)[0], bound(*arrays, bias=bias).out,
                 {"seed": seed})


def callback(kind, arrays=1, integers=7):
    """A decorator for functions in Python."""
    return ctypes.CFUNCTYPE(None, *[ctypes.POINTER(kind)] * arrays, *[ctypes.c_int64] * integers, ctypes.c_void_p)


def test_python_callback(seed):
    """Called from several threads, each with the GIL; what it is told covers each place once, and no more."""
    calls = []

    @callback(ctypes.c_float)
    def change(scores, *numbers):
        calls.append(numbers[:-1])
        batch, head, query, key, n_queries, n_keys, stride = numbers[:-1]
        for j, i in itertools.product(range(n_keys), range(n_queries)):
            scores[j * stride + i] += (query + i) % 3 - (key + j) % 5

    arrays = inputs(generator(seed), (2,), 2, 1, 70, 130, 4, 3)
    bias = (np.arange(70)[:, None] % 3 - np.arange(130) % 5).astype(F32)
    out = fa.attention(*arrays, score_mod=change, num_threads=3)
    assert_close(out, exact(*arrays, bias=bias)[0], bound(*arrays, bias=bias).out, {"seed": seed})
    count = np.zeros((2, 2, 70, 130), int)
    for batch, head, query, key, n_queries, n_keys, stride in calls:
        assert 0 < n_queries <= stride and query + n_queries <= 70 and n_keys > 0 and key + n_keys <= 130
        count[batch, head, query : query + n_queries, key : key + n_keys] += 1
    # a softmax may weigh a block again whose scores outgrew the reference
    assert (count >= 1).all()


# --- bad functions ---

def test_bad_signatures(library):
    q32, q64 = np.zeros((2, 3, 4), F32), np.zeros((2, 3, 4), F64)
    without = ctypes.CDLL(library._name).add_float
    without.argtypes = None
    wanted = r"score_mod must have the signature 'void \({0} \*, int64_t, .*void \*\)' with {1} queries, got "
    wanted32, wanted64 = wanted.format("float", "float32"), wanted.format("double", "float64")
    nothing = [lambda *_: None]
    returns = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_float), *[ctypes.c_int64] * 7, ctypes.c_void_p)
    cases = [
        (q32, function(library, "add", F64), wanted32 + r"'void \(double \*.*"),
        (q64, function(library, "add", F32), wanted64 + r"'void \(float \*.*"),
        (q32.astype(np.float16), function(library, "add", F64), wanted32 + ".*"),
        (q32, callback(ctypes.c_float, integers=6)(*nothing), wanted32 + ".*"),
        (q32, callback(ctypes.c_float, arrays=2)(*nothing), wanted32 + ".*"),
        (q32, returns(*nothing), wanted32 + r"'c_int \(.*"),
        (q32, ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_float), *[ctypes.c_int32] * 7, ctypes.c_void_p)(*nothing),
         wanted32 + ".*"),
        (q32, without, wanted32 + "a ctypes function without argtypes"),
        (q32, lambda *_: None, "score_mod must be a scipy.LowLevelCallable, .* got function"),
        (q32, 5, "score_mod must be .*, got int"),
        (q32, np.zeros(3), "score_mod must be .*, got ndarray"),
    ]
    for number, (q, given, message) in enumerate(cases):
        for module in fa, reference:
            for call, arrays in (module.attention, (q, q, q)), (module.attention_weights, (q, q)):
                with pytest.raises(TypeError) as caught:
                    call(*arrays, score_mod=given)
                assert re.fullmatch(message, str(caught.value)), (number, str(caught.value))


def test_bad_parts(library):
    q = np.zeros((2, 3, 4), F32)
    plain = function(library, "add", F32)
    with pytest.raises(TypeError, match="gradient must be a scipy.LowLevelCallable, .* got str"):
        fa.ScoreMod(plain, "gradient")
    with pytest.raises(TypeError, match="data must be an array or an address, got str"):
        fa.ScoreMod(plain, data="data")
    with pytest.raises(TypeError, match=r"gradient must have the signature 'void \(float \*, float \*, int64_t, .*"):
        fa.attention(q, q, q, score_mod=fa.ScoreMod(plain, plain))
