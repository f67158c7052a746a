"""jax: `dot_product_attention` by fastattn, under jit, vmap and grad, on XLA's own buffers without a copy.

    from fastattn.integrations import jax as fastattn_jax

    out = fastattn_jax.dot_product_attention(query, key, value, is_causal=True)

XLA calls two functions of this module, handlers of its foreign function interface, and tells them where the buffers
lie. The interface is one of C structs (xla/ffi/api/c_api.h, version 0.x), which ctypes reads: nothing is compiled.
"""

import ctypes
import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from .. import attention, checks, gradient

# --- the foreign function interface ---

# numbers of XLA_FFI_DataType
_DTYPES = {1: np.bool_, 4: np.int32, 5: np.int64, 10: np.float16, 11: np.float32, 12: np.float64,
           16: ml_dtypes.bfloat16}
_METADATA = 1
_INVALID_ARGUMENT, _RESOURCE_EXHAUSTED, _INTERNAL = 3, 8, 13


class _Struct(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("extension", ctypes.c_void_p)]


class _Extension(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("type", ctypes.c_int), ("next", ctypes.c_void_p),
                ("metadata", ctypes.c_void_p)]


class _Version(_Struct):
    _fields_ = [("major", ctypes.c_int), ("minor", ctypes.c_int)]


class _Metadata(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("version", _Version)]


class _Api(_Struct):
    _fields_ = [("version", _Version), ("internal", ctypes.c_void_p), ("new_error", ctypes.c_void_p)]


class _ErrorArguments(_Struct):
    _fields_ = [("message", ctypes.c_char_p), ("code", ctypes.c_int)]


class _Buffer(_Struct):
    _fields_ = [("dtype", ctypes.c_int), ("data", ctypes.c_void_p), ("rank", ctypes.c_int64),
                ("dims", ctypes.POINTER(ctypes.c_int64))]


class _Buffers(_Struct):
    _fields_ = [("size", ctypes.c_int64), ("types", ctypes.c_void_p),
                ("items", ctypes.POINTER(ctypes.POINTER(_Buffer)))]


class _Bytes(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("size", ctypes.c_size_t)]


class _Attributes(_Struct):
    _fields_ = [("size", ctypes.c_int64), ("types", ctypes.POINTER(ctypes.c_int)), ("names", ctypes.c_void_p),
                ("items", ctypes.POINTER(ctypes.POINTER(_Bytes)))]


class _Frame(_Struct):
    _fields_ = [("api", ctypes.POINTER(_Api)), ("context", ctypes.c_void_p), ("stage", ctypes.c_int),
                ("arguments", _Buffers), ("results", _Buffers), ("attributes", _Attributes)]


def _array(buffer):
    shape, dtype = tuple(buffer.dims[: buffer.rank]), np.dtype(_DTYPES[buffer.dtype])
    size = int(np.prod(shape)) * dtype.itemsize
    if size == 0:
        return np.empty(shape, dtype)
    memory = (ctypes.c_uint8 * size).from_address(buffer.data)
    return np.frombuffer(memory, np.uint8).view(dtype).reshape(shape)


def _target(name, run):
    """Register run(arguments, results, options): dictionaries of arrays, results to be filled, options from JSON."""
    def handle(frame):
        frame = frame.contents
        try:
            if frame.extension:             # asks what the handler was built for, before any call
                extension = _Extension.from_address(frame.extension)
                if extension.type == _METADATA:
                    _Metadata.from_address(extension.metadata).version.major = 0
                    _Metadata.from_address(extension.metadata).version.minor = frame.api.contents.version.minor
                    return None
            text = frame.attributes.items[0].contents
            call = json.loads(ctypes.string_at(text.data, text.size))
            arguments, results = ([_array(buffers.items[i].contents) for i in range(buffers.size)]
                                  for buffers in (frame.arguments, frame.results))
            run(dict(zip(call["arguments"], arguments)), dict(zip(call["results"], results)), call["options"])
        except BaseException as error:      # XLA takes no exception; it raises one of its own with these words
            code = (_INVALID_ARGUMENT if isinstance(error, (TypeError, ValueError)) else
                    _RESOURCE_EXHAUSTED if isinstance(error, MemoryError) else _INTERNAL)
            message = _ErrorArguments(ctypes.sizeof(_ErrorArguments), None, f"{name}: {error}".encode(), code)
            create = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(frame.api.contents.new_error)
            return create(ctypes.addressof(message))
        return None

    handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Frame))(handle)
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
    return handler      # which must outlive the process's last call


def _call(name, arguments, results, options):
    """The results (shapes and dtypes by name) of a target for arrays by name, None being left out."""
    arguments = {key: array for key, array in arguments.items() if array is not None}
    call = {"arguments": list(arguments), "results": list(results), "options": options}
    values = jax.ffi.ffi_call(name, tuple(results.values()), vmap_method="expand_dims")(
        *arguments.values(), call=json.dumps(call))
    return dict(zip(results, values))


# --- what the targets do: shapes (..., B, T, N, H) of jax, where ... are axes of vmap ---

def _problem(arguments, lead, options):
    """Positional arguments and options of `attention`, for what XLA passed."""
    query, key, value = (_heads(np.broadcast_to(arguments[name], lead + arguments[name].shape[-3:]))
                         for name in ("query", "key", "value"))
    L, S = query.shape[-2], key.shape[-2]
    options = {"mask": arguments.get("mask"), "bias": arguments.get("bias"), "scale": options["scale"],
               "causal": options["is_causal"], "query_offset": 0,
               "window": options["window"] and tuple(options["window"])}
    for name, most in (("query_lengths", L), ("kv_lengths", S)):
        if name in arguments:
            options[name] = np.broadcast_to(np.clip(arguments[name], 0, most), lead)
    return (query, key, value), options


def _heads(array):
    return array.swapaxes(-3, -2)


def _run_forward(arguments, results, options):
    out = results["out"]
    arrays, options = _problem(arguments, out.shape[:-3], options)
    _, results["lse"][...] = attention(*arrays, out=_heads(out), return_lse=True, **options)


def _run_backward(arguments, results, options):
    lead = results["query"].shape[:-3]
    if "bias" in results:       # with the axes of vmap, over which it is not summed
        arguments["bias"] = np.broadcast_to(arguments["bias"], results["bias"].shape)
    arrays, options = _problem(arguments, lead, options)
    grad_out, out, lse = (np.broadcast_to(arguments[name], lead + arguments[name].shape[-own:])
                          for name, own in (("grad_out", 3), ("out", 3), ("lse", 2)))
    gradients = gradient.backward(None, _heads(grad_out), *arrays, _heads(out), lse, sinks=None,
                                  of_bias="bias" in results,
                                  into=[_heads(results[name]) for name in ("query", "key", "value")], **options)
    if "bias" in results:
        results["bias"][...] = gradients.bias


_targets = [_target("fastattn_attention", _run_forward), _target("fastattn_attention_backward", _run_backward)]


# --- what is differentiated ---

def _arguments(query, key, value, bias, mask, query_lengths, kv_lengths):
    return {"query": query, "key": key, "value": value, "bias": bias, "mask": mask, "query_lengths": query_lengths,
            "kv_lengths": kv_lengths}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, *arrays):
    query, value = arrays[0], arrays[2]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    results = {"out": jax.ShapeDtypeStruct((*query.shape[:-1], value.shape[-1]), query.dtype),
               "lse": jax.ShapeDtypeStruct(_heads(query[..., 0:1]).shape[:-1], wide)}
    of = _call("fastattn_attention", _arguments(*arrays), results, dict(options))
    return of["out"], of["lse"]


def _attend_and_save(options, *arrays):
    results = _attend(options, *arrays)
    return results, (*arrays, *results)


def _attend_backward(options, saved, grads):
    return *_gradients(options, grads[0], *saved), None, None, None


_attend.defvjp(_attend_and_save, _attend_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients(options, grad_out, *saved):
    *arrays, out, lse = saved
    arguments = _arguments(*arrays)
    results = {name: jax.ShapeDtypeStruct(arguments[name].shape, arguments[name].dtype)
               for name in ("query", "key", "value", "bias") if arguments[name] is not None}
    of = _call("fastattn_attention_backward", arguments | {"grad_out": grad_out, "out": out, "lse": lse}, results,
               dict(options))
    return of["query"], of["key"], of["value"], of.get("bias")


def _gradients_and_save(options, grad_out, *saved):
    return _gradients(options, grad_out, *saved), (grad_out, *saved[:-2])


def _second_derivative(options, saved, grads):
    """By jax, of its own formula, written out in T x S."""
    options = dict(options)
    grad_out, query, key, value, bias, mask, query_lengths, kv_lengths = saved

    def gradients(grad_out, *inputs):
        def theirs(query, key, value, bias):
            return jax.nn.dot_product_attention(
                query, key, value, bias, mask, scale=options["scale"], is_causal=options["is_causal"],
                query_seq_lengths=query_lengths, key_value_seq_lengths=kv_lengths,
                local_window_size=options["window"])
        return jax.vjp(theirs, *inputs)[1](grad_out)

    of = jax.vjp(gradients, grad_out, query, key, value, bias)[1](grads)
    return *of, None, None, None, None, None


_gradients.defvjp(_gradients_and_save, _second_derivative)


@functools.partial(jax.jit, static_argnames="options")
def _attention(options, *arrays):
    return _attend(options, *arrays)


def dot_product_attention(query, key, value, bias=None, mask=None, *, scale=None, is_causal=False,
                          query_seq_lengths=None, key_value_seq_lengths=None, local_window_size=None,
                          implementation=None, return_residual=False):
    """`jax.nn.dot_product_attention` with its arguments and meanings, by fastattn.

    Parameters
    ----------
    query : array (B, T, N, H) or (T, N, H), float32, float64, float16 or bfloat16
    key, value : arrays (B, S, K, H) or (S, K, H) of query's dtype
        N is a multiple of K. value may have another size of heads than key.
    bias : array that broadcasts to (B, N, T, S), optional
        Added to the scores; its gradient is summed over the axes along which it was broadcast.
    mask : bool array that broadcasts to (B, N, T, S), optional
        True = attend.
    scale : float, optional
        Default ``1 / sqrt(H)``.
    is_causal : bool
        Query i sees keys j <= i.
    query_seq_lengths, key_value_seq_lengths : int32 arrays (B,), optional
        Rows past the one are 0, keys past the other are not seen.
    local_window_size : int or (int, int), optional
        Query i sees keys i - left <= j <= i + right; an int stands for both.
    implementation : None
        Is there for the signature: this is one.
    return_residual : bool
        Also return the log-sum-exp.

    Returns
    -------
    array (B, T, N, H) or (T, N, H), and with `return_residual` an array (B, T, N) or (T, N), both of query's dtype
        Rows that see no key are 0, and their residual is -inf. The residual has no derivative, as in jax.

    Raises
    ------
    TypeError, ValueError
        As `fastattn.attention`, for what is wrong with dtypes and shapes.

    Notes
    -----
    Works under `jax.jit`, `jax.vmap` and `jax.grad`; the second derivative is jax's own, of the weights written out.
    There is no forward-mode derivative. On other platforms than the CPU, XLA has no such function and refuses to
    compile.
    """
    if implementation is not None:
        raise ValueError(f"implementation must be None, got {implementation!r}")
    shape = jnp.shape(query)

    def four(array):
        return None if array is None else jnp.expand_dims(array, tuple(range(4 - jnp.ndim(array))))

    def integers(array):
        return None if array is None else jnp.asarray(array, jnp.int32)

    query, key, value, bias, mask = map(four, (query, key, value, bias, mask))
    query_lengths, kv_lengths = map(integers, (query_seq_lengths, key_value_seq_lengths))
    if bias is not None and bias.dtype != query.dtype:
        bias = bias.astype(jnp.promote_types(query.dtype, jnp.float32))
    if isinstance(local_window_size, int):
        local_window_size = local_window_size, local_window_size
    options = {"scale": None if scale is None else float(scale), "is_causal": bool(is_causal),
               "window": local_window_size and tuple(local_window_size)}
    _check(_arguments(query, key, value, bias, mask, query_lengths, kv_lengths), options)
    out, lse = _attention(tuple(options.items()), query, key, value, bias, mask, query_lengths, kv_lengths)
    out = out.reshape((*shape[:-1], value.shape[-1]))
    if not return_residual:
        return out
    return out, jax.lax.stop_gradient(_heads(lse[..., None])).reshape(shape[:-1]).astype(out.dtype)


def _check(arguments, options):
    """Shapes and dtypes by fastattn's own checks, which need no values, before anything is traced further."""
    arguments = {name: np.broadcast_to(np.zeros((), array.dtype), array.shape)
                 for name, array in arguments.items() if array is not None}
    arrays, options = _problem(arguments, arguments["query"].shape[:1], options)
    checks.problem(*arrays, results=False, **options)
