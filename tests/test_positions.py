"""Rotary embeddings against their definition: the table in long double, the turn as a product of complex numbers."""

import doctest
import re

import numpy as np
import pytest
from cases import assert_close
from layouts import BROADCASTS, LAYOUTS, assert_same_bits

import fastattn as fa
from fastattn import positions
from fastattn.positions import Rotary, apply_rotary, rotary

F32, F64 = np.float32, np.float64
NAN, INF = np.nan, np.inf

both_dtypes = pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
both_orders = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
needs_long_double = pytest.mark.skipif(np.finfo(np.longdouble).nmant <= 52, reason="long double is no wider")


def turned(x, table, position):
    """The pairs of x (..., D) as complex numbers times exp(i angle), in float64; a position for each row."""
    n = table.cos.shape[1]
    pairs = [(2 * i, 2 * i + 1) if table.interleaved else (i, i + n) for i in range(n)]
    out = x.astype(F64)
    for i, (a, b) in enumerate(pairs):
        turn = table.cos[position, i].astype(F64) + 1j * table.sin[position, i].astype(F64)
        z = (out[..., a] + 1j * out[..., b]) * turn
        out[..., a], out[..., b] = z.real, z.imag
    return out


def allowed(x, table, dtype):
    """3 roundings of parts that are at most |a| + |b|; denormal products have an absolute error."""
    n = table.cos.shape[1]
    u = 2.0**-24 if dtype == F32 else 2.0**-53
    size = abs(x.astype(F64))
    if table.interleaved:
        size[..., : 2 * n] = np.repeat(size[..., 0 : 2 * n : 2] + size[..., 1 : 2 * n : 2], 2, axis=-1)
    else:
        size[..., : 2 * n] = np.tile(size[..., :n] + size[..., n : 2 * n], 2)
    size[..., 2 * n :] = 0
    return 3 * u * size + 2 * float(np.finfo(dtype).smallest_subnormal)


# --- the table ---

@needs_long_double
@pytest.mark.parametrize("base, scaling", [(10000.0, 1.0), (500000.0, 1.0), (10.0, 1.0), (10000.0, 8.0), (1.0, 0.3)])
@pytest.mark.parametrize("dim", [2, 6, 64, 128])
def test_table(dim, base, scaling):
    length = 3 * (positions.ANGLES // dim) + 1
    table = rotary(length, dim, base=base, scaling=scaling)
    wide = np.longdouble
    frequencies = wide(base) ** (-2 * np.arange(dim // 2).astype(wide) / dim)
    angles = (np.arange(length).astype(wide) / wide(scaling))[:, None] * frequencies
    error = 2.0**-25 + 4 * 2.0**-52 * angles.astype(F64) + 2.0**-52  # the last rounding; of the angle; of cos and sin
    for array, exact in (table.cos, np.cos(angles)), (table.sin, np.sin(angles)):
        assert array.dtype == F32 and array.shape == (length, dim // 2) and array.ctypes.data % 64 == 0
        assert_close(array, exact, error, {"dim": dim, "base": base, "scaling": scaling})
    assert table.interleaved is False and rotary(1, dim, interleaved=True).interleaved is True


@needs_long_double
def test_large_positions():
    """Angles of millions: float32 angles would be off by 0.1."""
    table = rotary(2_000_001, 4)
    p = np.arange(1_999_000, 2_000_001).astype(np.longdouble)
    exact = np.stack((p, p / 100), axis=1)
    assert_close(table.cos[1_999_000:], np.cos(exact), 2.0**-24, {})
    assert_close(table.sin[1_999_000:], np.sin(exact), 2.0**-24, {})


def test_rows_do_not_depend_on_the_length():
    whole = rotary(5000, 96)
    for length in 0, 1, 682, 683, 4999:
        part = rotary(length, 96)
        assert_same_bits(part.cos, whole.cos[:length], {"length": length})
        assert_same_bits(part.sin, whole.sin[:length], {"length": length})


def test_special_sizes():
    assert rotary(0, 8).cos.shape == (0, 4) and rotary(7, 0).sin.shape == (7, 0)
    table = rotary(np.int64(3), np.int32(4), base=np.float32(100), interleaved=np.True_, scaling=2)
    assert table.interleaved is True
    np.testing.assert_allclose(table.cos[2], np.cos([1, 0.1]), rtol=1e-7)
    cos, sin, interleaved = table
    assert cos is table.cos and sin is table.sin and interleaved is True


# --- the turn ---

@both_dtypes
@both_orders
@pytest.mark.parametrize("D, dim", [(2, 2), (8, 8), (9, 8), (64, 64), (80, 32), (5, 0), (0, 0), (130, 128)])
def test_definition(D, dim, interleaved, dtype, seed):
    rng = np.random.default_rng([seed, D, dim])
    table = rotary(50, dim, interleaved=interleaved)
    for lead, L in [((), 1), ((), 50), ((3,), 7), ((2, 3), 1), ((2, 3), 33), ((2, 1, 4), 5), ((0, 3), 4), ((2, 3), 0)]:
        x = (rng.standard_normal((*lead, L, D)) * rng.choice([1e-30, 1, 1e30], (*lead, L, D))).astype(dtype)
        for shape in {(), lead, tuple(n if axis else 1 for axis, n in enumerate(lead)), lead[-1:], (*lead[:-1], 1)}:
            if len(shape) > len(lead):
                continue
            offset = rng.integers(0, 51 - L, shape)
            before = x.copy()
            out = apply_rotary(x, table, offset)
            assert out.dtype == dtype and out.flags.c_contiguous and out.ctypes.data % 64 == 0
            assert_same_bits(x, before, {"input": "modified"})
            context = {"shape": x.shape, "dim": dim, "offset": offset.tolist(), "seed": seed}
            position = np.broadcast_to(offset[..., None] + np.arange(L), (*lead, L))
            assert_close(out, turned(x, table, position), allowed(x, table, dtype), context)
            assert_same_bits(out[..., dim:], x[..., dim:], context)
            if offset.size:
                assert_same_bits(apply_rotary(x, table, offset.tolist()), out, context)


@both_dtypes
@both_orders
def test_layouts(interleaved, dtype, seed):
    x = np.random.default_rng(seed).standard_normal((2, 3, 6, 10)).astype(dtype)
    table = rotary(9, 8, interleaved=interleaved)
    expected = apply_rotary(x, table, 3)
    for name, layout in LAYOUTS.items():
        assert_same_bits(apply_rotary(layout(x), table, 3), expected, {"layout": name})
    for name, layout in BROADCASTS.items():
        assert_same_bits(apply_rotary(layout(x), table, 3), apply_rotary(layout(x).copy(), table, 3), {"layout": name})
    strided = Rotary(*(LAYOUTS["step 2"](array) for array in table[:2]), interleaved)
    assert_same_bits(apply_rotary(x, strided, 3), expected, {"table": "strided"})


@both_dtypes
def test_scores_depend_on_distance(dtype, seed):
    """The property that rotary embeddings are made for, with every position of the table."""
    q, k = np.random.default_rng(seed).standard_normal((2, 1, 1, 64)).astype(dtype)
    for interleaved in False, True:
        table = rotary(300, 64, interleaved=interleaved)
        turned_q, turned_k = (apply_rotary(np.repeat(x, 300, axis=1), table)[0].astype(F64) for x in (q, k))
        scores = turned_q @ turned_k.T
        size = float(np.linalg.norm(q.astype(F64)) * np.linalg.norm(k.astype(F64)))
        for distance in (0, 1, 7, 100, 299):
            diagonal = np.diagonal(scores, -distance)
            assert np.ptp(diagonal) <= 8 * 2.0**-22 * size, (interleaved, distance)


def test_bits_of_a_row_depend_on_its_position_only(seed):
    x = np.random.default_rng(seed).standard_normal((3, 2, 20, 16), F32)
    table = rotary(40, 16)
    for b, offset in enumerate([0, 13, 20]):
        whole = apply_rotary(x, table, [[0], [13], [20]])
        for i in range(20):
            assert_same_bits(apply_rotary(x[b, 1, i : i + 1], table, offset + i), whole[b, 1, i : i + 1], {"row": i})


def test_nan_and_inf():
    """They stay in their pair; no warnings."""
    for bad in NAN, INF, -INF:
        for interleaved in False, True:
            x = np.ones((3, 8), F32)
            x[1, 0] = bad
            with np.errstate(all="raise"):
                out = apply_rotary(x, rotary(3, 6, interleaved=interleaved))
            partner = 1 if interleaved else 3
            wrong = ~np.isfinite(out)
            assert wrong[1, 0] and wrong[1, partner] and wrong.sum() == 2


def test_other_arrays():
    class Exporter:
        def __init__(self, array):
            self.array = array

        def __dlpack__(self, **options):
            return self.array.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    x = np.arange(8.0).reshape(2, 4)
    expected = apply_rotary(x, rotary(2, 4))
    assert_same_bits(apply_rotary(Exporter(x), rotary(2, 4)), expected, {})
    assert_same_bits(apply_rotary(x.tolist(), rotary(2, 4)), expected, {})
    assert_same_bits(apply_rotary(x, rotary(2, 4), np.uint8(0)), expected, {})


# --- bad arguments ---

T, V = TypeError, ValueError
TABLE = rotary(10, 4)
X = np.zeros((2, 3, 5, 6), F32)


@pytest.mark.parametrize("call, error, message", [
    (lambda: rotary(2.0, 4), T, "length must be an integer, got float"),
    (lambda: rotary(-1, 4), V, "length must be at least 0, got -1"),
    (lambda: rotary(True, 4), T, "length must be an integer, got bool"),
    (lambda: rotary(2, -2), V, "dim must be at least 0, got -2"),
    (lambda: rotary(2, 3), V, "dim must be even, got 3"),
    (lambda: rotary(2, 4, base="1"), T, "base must be a real number, got str"),
    (lambda: rotary(2, 4, base=0), V, "base must be positive and finite, got 0"),
    (lambda: rotary(2, 4, base=INF), V, "base must be positive and finite, got inf"),
    (lambda: rotary(2, 4, base=NAN), V, "base must be positive and finite, got nan"),
    (lambda: rotary(2, 4, scaling=-1.0), V, "scaling must be positive and finite, got -1.0"),
    (lambda: rotary(2, 4, scaling=None), T, "scaling must be a real number, got NoneType"),
    (lambda: rotary(2, 4, interleaved=1), T, "interleaved must be a bool, got int"),
    (lambda: rotary(2**60, 64), MemoryError, r"no memory for a result of shape \(.*\) and dtype float32"),
    (lambda: apply_rotary(None, TABLE), T, "x must be an array, got NoneType"),
    (lambda: apply_rotary(X.astype(int), TABLE), T, "x must be float32 or float64 in native byte order, got int64"),
    (lambda: apply_rotary(X.astype(">f4"), TABLE), T, "x must be float32 or float64 in native byte order, got >f4"),
    (lambda: apply_rotary(X.astype(np.float16), TABLE), T,
     "x must be float32 or float64 in native byte order, got float16"),
    (lambda: apply_rotary(np.ma.masked_array(X), TABLE), T,
     "x must be an array without a mask of its own, got a masked array"),
    (lambda: apply_rotary(X[0, 0, 0], TABLE), V, r"x must have axes \(..., L, D\), got shape \(6,\)"),
    (lambda: apply_rotary(X[..., :3], TABLE), V, "x must have at least the 4 features that table turns, got 3"),
    (lambda: apply_rotary(X, TABLE[:2]), T, "table must be a Rotary, got tuple"),
    (lambda: apply_rotary(X, TABLE._replace(cos=TABLE.cos.astype(F64))), T,
     "table.cos must be a float32 array, got float64"),
    (lambda: apply_rotary(X, TABLE._replace(sin=[[0.0]])), T, "table.sin must be a float32 array, got list"),
    (lambda: apply_rotary(X, TABLE._replace(cos=TABLE.cos[0])), V,
     r"table.cos must have two axes \(length, n\), got shape \(2,\)"),
    (lambda: apply_rotary(X, TABLE._replace(sin=TABLE.sin[1:])), V,
     r"table.sin must have cos's shape \(10, 2\), got \(9, 2\)"),
    (lambda: apply_rotary(X, TABLE._replace(interleaved=None)), T, "table.interleaved must be a bool, got NoneType"),
    (lambda: apply_rotary(np.zeros((11, 4)), TABLE), V, "table must have at least the 11 rows of x, got 10"),
    (lambda: apply_rotary(X, TABLE, 6), V, r"offset must lie in \[0, 5\], got 6"),
    (lambda: apply_rotary(X, TABLE, -1), V, r"offset must lie in \[0, 5\], got -1"),
    (lambda: apply_rotary(X, TABLE, [[0], [6]]), V, r"offset must lie in \[0, 5\], got 6 at index \(1, 0\)"),
    (lambda: apply_rotary(X, TABLE, np.array([[0], [2**64 - 1]], np.uint64)), V,
     rf"offset must lie in \[0, 5\], got {2**64 - 1} at index \(1, 0\)"),
    (lambda: apply_rotary(X, TABLE, [0, 1]), V,
     r"offset must broadcast to the leading axes \(2, 3\), got shape \(2,\)"),
    (lambda: apply_rotary(X[0, 0], TABLE, [0, 1]), V,
     r"offset must broadcast to the leading axes \(1,\), got shape \(2,\)"),
    (lambda: apply_rotary(X, TABLE, 1.0), T, "offset must be integers, got float64"),
    (lambda: apply_rotary(X, TABLE, True), T, "offset must be integers, got bool"),
    (lambda: apply_rotary(X, TABLE, None), T, "offset must be an array, got NoneType"),
])
def test_bad_argument(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert caught.type is error and re.fullmatch(message, str(caught.value)), str(caught.value)


# --- sines and cosines of positions ---

@needs_long_double
@pytest.mark.parametrize("length, dim, base", [(0, 4, 10.0), (1, 2, 10000.0), (50, 6, 10000.0), (3000, 512, 500000.0)])
def test_sinusoidal(length, dim, base):
    out = positions.sinusoidal(length, dim, base=base)
    wide = np.longdouble
    angles = np.arange(length).astype(wide)[:, None] * wide(base) ** (-2 * np.arange(dim // 2).astype(wide) / dim)
    error = 2.0**-25 + 4 * 2.0**-52 * angles.astype(F64) + 2.0**-52  # as of a table of rotary
    assert out.dtype == F32 and out.shape == (length, dim)
    assert (abs(out[:, ::2] - np.sin(angles)) <= error).all() and (abs(out[:, 1::2] - np.cos(angles)) <= error).all()
    double = positions.sinusoidal(length, dim, base=base, dtype="float64")
    assert double.dtype == F64
    np.testing.assert_array_equal(double.astype(F32), out)
    error -= 2.0**-25 - 2.0**-54
    assert (abs(double[:, ::2] - np.sin(angles)) <= error).all()


@pytest.mark.parametrize("normalize", [True, False])
def test_sinusoidal_2d(normalize):
    """Each pixel's features by DETR's formulas."""
    H, W, dim, base = 5, 3, 8, 10000.0
    out = positions.sinusoidal_2d(H, W, dim, base=base, normalize=normalize)
    double = positions.sinusoidal_2d(H, W, dim, base=base, normalize=normalize, dtype=F64)
    assert out.dtype == F32 and double.dtype == F64 and out.shape == double.shape == (H, W, dim)
    for y in range(H):
        for x in range(W):
            of = (y + 1, H), (x + 1, W)
            row, column = (p / (n + 1e-6) * 2 * np.pi if normalize else p for p, n in of)
            expected = [f(p / base ** (2 * (i // 2) / (dim // 2)))
                        for p in (row, column) for i, f in enumerate((np.sin, np.cos) * (dim // 4))]
            np.testing.assert_allclose(out[y, x], expected, rtol=0, atol=2.0**-25 + 2.0**-47)
            np.testing.assert_allclose(double[y, x], expected, rtol=0, atol=2.0**-47)
    assert positions.sinusoidal_2d(0, 3, 4).shape == (0, 3, 4)


@pytest.mark.parametrize("call, error, message", [
    (lambda: positions.sinusoidal(3, 5), ValueError, "dim must be a multiple of 2, got 5"),
    (lambda: positions.sinusoidal(-1, 4), ValueError, "length must be at least 0, got -1"),
    (lambda: positions.sinusoidal(3, 4, base=0), ValueError, "base must be positive and finite, got 0"),
    (lambda: positions.sinusoidal(3, 4, dtype=int), TypeError, "dtype must be float32 or float64, got int64"),
    (lambda: positions.sinusoidal_2d(3, 3, 6), ValueError, "dim must be a multiple of 4, got 6"),
    (lambda: positions.sinusoidal_2d(3, 2.0, 8), TypeError, "width must be an integer, got float"),
    (lambda: positions.sinusoidal_2d(3, 3, 8, normalize=1), TypeError, "normalize must be a bool, got int"),
])
def test_bad_sizes(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert caught.type is error and re.fullmatch(message, str(caught.value)), str(caught.value)


def test_docstrings():
    failed, attempted = doctest.testmod(positions)
    assert attempted and not failed


# --- the checks above can fail ---

@pytest.mark.parametrize("spoil", [
    lambda table: table._replace(interleaved=not table.interleaved),
    lambda table: table._replace(sin=-table.sin),
    lambda table: Rotary(table.cos[1:], table.sin[1:], table.interleaved),
])
def test_the_comparison_sees_a_wrong_turn(spoil, seed):
    x = np.random.default_rng(seed).standard_normal((2, 5, 8), F32)
    table = fa.positions.rotary(9, 8)
    position = np.arange(5)
    with pytest.raises(AssertionError, match="elements are wrong"):
        assert_close(apply_rotary(x, spoil(table), 0), turned(x, table, position), allowed(x, table, F32), {})
