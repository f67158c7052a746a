"""What a type checker makes of the public functions. tools/lint runs mypy over this file; pytest runs it too."""

from typing import Any, assert_type

import numpy as np
import pytest
from numpy.typing import NDArray

import fastattn as fa

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


def test_results_have_querys_dtype() -> None:
    x: F32 = np.ones((1, 2, 4), np.float32)
    y: F64 = np.ones((1, 2, 4))
    assert_type(fa.attention(x, x, x), F32)
    assert_type(fa.attention(y, y, y, causal=True, kv_lengths=[2], window=(1, None)), F64)
    assert_type(fa.attention(x, x, x, out=np.empty_like(x)), F32)
    assert_type(fa.reference.attention(x, x, x, mask=np.ones((2, 2), np.bool_), softcap=1), F32)
    assert_type(fa.attention([[1.0]], [[1.0]], [[1.0]]), NDArray[Any])


def test_return_lse_returns_a_pair() -> None:
    x: F32 = np.ones((1, 2, 4), np.float32)
    assert_type(fa.attention(x, x, x, return_lse=False), F32)
    assert_type(fa.attention(x, x, x, return_lse=True), tuple[F32, F32])
    assert_type(fa.reference.attention(x, x, x, return_lse=True), tuple[F32, F32])
    out, lse = fa.attention(x, x, x, return_lse=True)
    assert_type(lse, F32)
    assert out.shape == x.shape and lse.shape == x.shape[:-1]
    either = fa.attention(x, x, x, return_lse=bool(len(x)))
    assert_type(either, NDArray[Any] | tuple[NDArray[Any], NDArray[Any]])


def test_linear_attention_returns_what_is_asked_for() -> None:
    x: F32 = np.ones((1, 2, 4), np.float32)
    assert_type(fa.linear_attention(x, x, x, causal=True), NDArray[Any])
    out, state = fa.linear_attention(x, x, x, return_state=True)
    assert_type(state, fa.LinearState)
    assert_type(fa.linear_attention(x, x, x, state=state, return_normalizer=True), tuple[NDArray[Any], NDArray[Any]])
    assert_type(fa.nystrom_attention(x, x, x, 1), NDArray[Any])
    with pytest.raises(ValueError):
        fa.linear_attention(x, x, x, feature_map="exp")  # type: ignore[call-overload]


def test_linear_returns_the_dtype_of_x() -> None:
    x: F32 = np.ones((1, 2, 4), np.float32)
    packed = fa.pack_weight(np.ones((3, 4), np.float32), "bfloat16")
    assert_type(packed, fa.PackedWeight)
    assert_type(packed.shape, tuple[int, int])
    assert_type(fa.linear(x, packed, activation="gelu_tanh"), F32)
    assert_type(fa.reference.linear(x, fa.reference.pack_weight(x[0]), out=np.empty((1, 2, 2), np.float32)), F32)
    assert_type(fa.linear([[1.0]], [[1.0]], num_threads=np.int64(1)), NDArray[Any])
    with pytest.raises(ValueError):
        fa.linear(x, packed, activation="tanh")  # type: ignore[call-overload]
    with pytest.raises(ValueError):
        fa.pack_weight(x[0], "int8")  # type: ignore[arg-type]


def test_layers() -> None:
    x: F32 = np.ones((1, 2, 4), np.float32)
    layer = fa.nn.MultiheadAttention(4, 2, batch_first=True, seed=0)
    assert_type(layer(x, x, x), tuple[NDArray[Any], NDArray[Any] | None])
    assert_type(layer.load_state_dict(layer.state_dict()), fa.nn.Keys)
    assert_type(layer.pack("bfloat16"), fa.nn.MultiheadAttention)
    stack = fa.nn.TransformerEncoder(fa.nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2)
    assert_type(stack(x, cache=stack.new_cache(1, 2)), NDArray[Any])
    with pytest.raises(ValueError):
        layer.pack("int8")  # type: ignore[arg-type]
    assert_type(layer(x, x, x, scale=1.0, window=2), tuple[NDArray[Any], NDArray[Any] | None])
    found = fa.nn.DETR(2, 3, 2, 4, 2, 1, 1, 8)(np.ones((1, 2, 3, 3), np.float32), return_weights=True)
    assert_type(found, fa.nn.Detections)
    assert_type(found.boxes, NDArray[Any])
    translator = fa.nn.RecurrentEncoderDecoder(5, 6, 4, "general")
    assert_type(translator.encode([[1, 2]]), fa.nn.RecurrentState)
    assert_type(translator.step([1], translator.encode([[1, 2]]))[0], NDArray[Any])
    with pytest.raises(ValueError):
        fa.nn.RecurrentEncoderDecoder(5, 6, 4, "product")  # type: ignore[arg-type]
    assert_type(fa.nn.quick_gelu(x), NDArray[Any])


def test_masks() -> None:
    x: F32 = np.ones((1, 4, 4), np.float32)
    mask = fa.masks.causal() & ~fa.masks.window(2, None) | fa.masks.documents([0, 0, 1, 1])
    assert_type(mask, fa.masks.Mask)
    assert_type(mask.compile(4, np.int64(4)), fa.masks.Plan)
    assert_type(mask.to_dense(4, 4), NDArray[np.bool_])
    assert_type(fa.attention(x, x, x, mask=mask), F32)
    assert_type(fa.attention(x, x, x, mask=mask.compile(4, 4), return_lse=True), tuple[F32, F32])
    assert_type(fa.reference.attention(x, x, x, mask=fa.masks.bigbird(1, random=0)), F32)
    sparse = pytest.importorskip("scipy.sparse").csr_array(mask.to_dense(4, 4))
    assert_type(fa.attention(x, x, x, mask=sparse), F32)
    assert_type(fa.masks.plan_of_sparse(sparse).share, float)
    for shape in 4, (2, 2), [2, 2]:
        assert_type(fa.masks.neighborhood(shape, 2), fa.masks.Mask)


def test_wrong_arguments_are_refused() -> None:
    # mypy reports an `ignore` that ignores nothing, so each line also tests that the stub refuses what is wrong.
    x: F32 = np.ones((1, 2, 4), np.float32)
    with pytest.raises(TypeError):
        fa.attention(x, x, x, None)  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        fa.attention(x, x, x, scale="1")  # type: ignore[call-overload]
    with pytest.raises(ValueError):
        fa.attention(x, x, x, normalizer="softmin")  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        fa.set_num_threads(1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        fa.masks.causal() & np.ones((2, 2), np.bool_)  # type: ignore[operator]
    with pytest.raises(TypeError):
        fa.masks.window(1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        fa.attention(x, x, x, mask=fa.masks.causal)  # type: ignore[call-overload]


def test_thread_control() -> None:
    with fa.threads(np.int64(2)):
        assert_type(fa.get_num_threads(), int)
    assert_type(fa.isa(), str)
    assert_type(fa.get_include(), str)
    assert_type(fa.__version__, str)
