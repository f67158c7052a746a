"""What layers share: weights as attributes, state dicts, packed weights."""

import json
import math
import os
from typing import NamedTuple

import numpy as np

from .. import checks
from ..checks import float_dtype
from ..layer import ACTIVATIONS, linear, pack_weight

SAFETENSORS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}  # the dtypes of weights


class Keys(NamedTuple):
    """What `Module.load_state_dict` returns: names that were looked for in vain, and names that nobody looked for."""

    missing_keys: list
    unexpected_keys: list


class Module:
    """A layer. Its arrays are weights, under torch's names; its modules, and lists of modules, are parts.

    A weight is changed by putting another array in its place. What is derived from it, packed weights, is then made
    anew at the next call; writing into an array does not show.
    """

    def __init__(self):
        self._derived = {}
        self._kept_as = None

    def __getstate__(self):
        return vars(self) | {"_derived": {}}  # copies and pickles derive their own

    def children(self):
        """(name, module) of the parts, in order."""
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, list):
                yield from ((f"{name}.{i}", part) for i, part in enumerate(value) if isinstance(part, Module))

    def modules(self):
        """This module and all parts of parts, each once."""
        seen, stack = {}, [self]
        while stack:
            module = stack.pop()
            if id(module) not in seen:
                seen[id(module)] = module
                stack += [part for _, part in module.children()]
        return list(seen.values())

    def _weights(self, prefix=""):
        """(full name, module, attribute) of all weights."""
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray) and not name.startswith("_"):
                yield prefix + name, self, name
        for name, part in self.children():
            yield from part._weights(f"{prefix}{name}.")

    def state_dict(self):
        """The weights by name, as a dict. The arrays are the module's own."""
        return {name: getattr(module, attribute) for name, module, attribute in self._weights()}

    def load_state_dict(self, state, strict=True, *, prefix=""):
        """Put weights in the place of the module's.

        Parameters
        ----------
        state : dict of arrays or tensors, torch module, or path of a .safetensors file
            Floats of any size; they are converted to the dtype of the weight they replace. The arrays are copied.
        strict : bool
            Whether names that are missing or unexpected are errors.
        prefix : str
            Only names that begin with it count, without it: the part of a larger model.

        Returns
        -------
        Keys
            missing_keys and unexpected_keys, empty if strict.

        Raises
        ------
        TypeError
            Something else than a state, or weights that are not floats.
        ValueError
            Names that are missing or unexpected, if strict, or weights of other shapes: all of them in one message.
            The module is then as before.
        """
        given = {name.removeprefix(prefix): value for name, value in _read(state).items() if name.startswith(prefix)}
        own = {name: (module, attribute) for name, module, attribute in self._weights()}
        keys = Keys([name for name in own if name not in given], [name for name in given if name not in own])
        wrong, loaded = [], []
        for name, (module, attribute) in own.items():
            if name in given:
                array, old = _float_array(name, given[name]), getattr(module, attribute)
                if array.shape != old.shape:
                    wrong.append(f"{name} must have shape {old.shape}, got {array.shape}")
                loaded.append((module, attribute, array, old.dtype))
        if strict:
            wrong[:0] = [f"{what} {', '.join(names)}" for what, names in zip(("missing", "unexpected"), keys) if names]
        if wrong:
            raise ValueError(f"state must fit {type(self).__name__}: {'; '.join(wrong)}")
        for module, attribute, array, dtype in loaded:
            setattr(module, attribute, np.array(array, dtype, order="C"))
        return keys

    def pack(self, dtype=None):
        """Say how products keep the weights: None, as they are, or "bfloat16", as in `pack_weight`. Returns self."""
        if dtype not in (None, "bfloat16"):
            raise ValueError(f"dtype must be None or 'bfloat16', got {dtype!r}")
        for module in self.modules():
            module._kept_as, module._derived = dtype, {}
        return self

    def _derive(self, key, sources, make):
        """What make() returned when the ``sources`` were what they are now."""
        kept = self._derived.get(key)
        if kept is None or any(a is not b for a, b in zip(kept[0], sources)):
            kept = self._derived[key] = sources, make()
        return kept[1]

    def _packed(self, key, *weights, rows=slice(None)):
        """Rows of a weight (N, ...), or of several one below the other, packed as (N, K)."""
        def make():
            flat = [w.reshape(len(w), math.prod(w.shape[1:])) for w in weights]
            return pack_weight((np.concatenate(flat) if len(flat) > 1 else flat[0])[rows], self._kept_as)

        return self._derive((key, rows.start, rows.stop), weights, make)

    def _project(self, x, *names):
        """The results of parts that are `Linear` layers of the same input, by one product."""
        layers = [getattr(self, name) for name in names]
        weight = self._packed(names, *(layer.weight for layer in layers))
        biases = tuple(layer.bias for layer in layers)
        bias = None
        if any(b is not None for b in biases):
            bias = self._derive((names, "bias"), biases, lambda: np.concatenate(
                [np.zeros(len(layer.weight), layer.weight.dtype) if layer.bias is None else layer.bias
                 for layer in layers]))
        ends = np.cumsum([len(layer.weight) for layer in layers])
        return np.split(linear(x, weight, bias), ends[:-1], axis=-1)


def _read(state):
    """The names and values of a state."""
    if isinstance(state, (str, os.PathLike)):
        return read_safetensors(state)
    if not isinstance(state, dict) and hasattr(state, "state_dict"):
        state = state.state_dict()
    if not hasattr(state, "items"):
        raise TypeError(f"state must be a dict, a module or a path, got {type(state).__name__}")
    return dict(state.items())


def _float_array(name, value):
    if hasattr(value, "detach"):  # a tensor
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            value = value.float()
        value = value.numpy()
    array = np.asarray(value)
    if array.dtype.kind != "f" and not checks.is_half(array.dtype):
        raise TypeError(f"{name} must be of floats, got {array.dtype}")
    return array


def read_safetensors(path):
    """The arrays of floats in a .safetensors file, by name; bfloat16 as float32.

    The file is mapped: nothing is read before it is used.

    Raises
    ------
    OSError, ValueError
        No such file, or one of another kind.
    """
    data = np.memmap(path, np.uint8, "r")
    size = int(data[:8].view("<u8")[0]) if len(data) >= 8 else len(data)
    if size > len(data) - 8:
        raise ValueError(f"{os.fspath(path)} must be a .safetensors file, got a header of {size} bytes in "
                         f"{len(data)}")
    arrays = {}
    for name, about in json.loads(data[8 : 8 + size].tobytes()).items():
        if about.get("dtype") in SAFETENSORS:  # else integers, which are no weights, or the file's notes
            begin, end = about["data_offsets"]
            array = np.frombuffer(data[8 + size + begin : 8 + size + end].data, SAFETENSORS[about["dtype"]])
            if about["dtype"] == "BF16":
                array = (array.astype(np.uint32) << 16).view(np.float32)
            arrays[name] = array.reshape(about["shape"])
    return arrays


def generator(seed):
    """The generator that weights are drawn from; a generator is itself, so that parts go on where others ended."""
    return np.random.default_rng(seed)


def uniform(rng, shape, limit, dtype):
    """Weights between -limit and limit."""
    return rng.uniform(-limit, limit, shape).astype(float_dtype(dtype))


def check_features(name, x, size):
    """x as an array (..., size)."""
    x = checks._array(name, x)
    if x.ndim == 0 or x.shape[-1] != size:
        raise ValueError(f"{name} must have shape (..., {size}), got {x.shape}")
    return x


def check_indices(name, indices, n):
    """Raise unless integers are in [0, n)."""
    indices = np.asarray(indices)
    if indices.size and (indices.min() < 0 or indices.max() >= n):
        raise ValueError(f"{name} must be in [0, {n}), got {indices.min()} to {indices.max()}")


def check_activation(activation):
    """Raise unless activation is a name that `linear` takes, or a function."""
    if not callable(activation) and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be a function or one of {tuple(ACTIVATIONS)}, got {activation!r}")
    return activation


def divided(name, size, heads):
    """The size of a head."""
    size, heads = checks._integer(name, size, 1), checks._integer("num_heads", heads, 1)
    if size % heads:
        raise ValueError(f"{name} must be a multiple of num_heads {heads}, got {size}")
    return size // heads
