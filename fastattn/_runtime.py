"""What is bound at import: the instruction set, its kernels, the number of threads.

`forward(problem)` and `plain(...)` are the compiled functions, or the NumPy reference where no kernel was built.
"""
import contextlib
import importlib
import operator
import os
import sys
import threading

import numpy as np

try:
    from . import _build
except ImportError:     # a source tree on the path, and no build of it installed
    _build = None  # type: ignore[assignment]


def _positive(value, name):
    try:
        n = operator.index(None if isinstance(value, bool) else value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if n < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")
    return min(n, 2**31 - 1)


# --- instruction set -------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def _brief_spinning():
    """libgomp reads its environment once, when it is loaded: let its waiting threads spin for about 10 µs.

    Longer spinning takes the processor from the next NumPy call; none at all makes every back-to-back call wake them.
    """
    ours = "GOMP_SPINCOUNT" not in os.environ and "OMP_WAIT_POLICY" not in os.environ
    if ours:
        os.environ["GOMP_SPINCOUNT"] = "10000"
    try:
        yield
    finally:
        if ours:
            del os.environ["GOMP_SPINCOUNT"]


def _load_dispatch():
    if _build is None:
        return None
    with _brief_spinning():
        from . import _dispatch
    return _dispatch


def _choose():
    """Names of the usable instruction sets, best first, and the one to bind."""
    usable = [isa for isa in _build.isas if _dispatch.supports(isa)] if _dispatch else []
    usable.append("reference")
    wanted = os.environ.get("FASTATTN_ISA")
    if not wanted:
        return usable, usable[0]
    if wanted not in usable:
        raise ImportError(f"FASTATTN_ISA must be one of {', '.join(usable)} on this machine, got {wanted!r}")
    return usable, wanted


_dispatch = _load_dispatch()
available, _isa = _choose()
plain = None
measure_peak = None
read_once = None
store = None
pack = layer = plain_layer = lanes = norm = None
has_pairs = False

if _isa == "reference":
    def forward(problem):
        from . import reference
        (reference.forward_weights if problem.reduce else reference.forward)(problem)

    def backward(problem):
        from . import reference
        reference.backward(problem)

    def graph(call):
        from . import reference
        reference.run_graph(call)

    def linear(call):
        from . import reference
        reference.run_linear(call)
else:
    def _table(isa, bits):
        return importlib.import_module(f"{__package__}._kernel_{isa}_f{bits}").table

    # bfloat16 products come on top of the instruction set they extend
    _pairs = _table(_isa, 16) if _isa.endswith("_bf16") else None
    _dispatch.bind(*(_table(_isa.removesuffix("_bf16"), bits) for bits in (32, 64)), _pairs)
    _dispatch.set_process(threading.main_thread().ident, os.cpu_count() or 1)
    os.register_at_fork(after_in_child=_dispatch.after_fork)
    plain = _dispatch.plain
    forward = _dispatch.forward
    backward = _dispatch.backward
    graph = _dispatch.graph
    linear = _dispatch.linear
    store = _dispatch.store
    pack, layer, plain_layer, norm = _dispatch.pack, _dispatch.layer, _dispatch.plain_layer, _dispatch.norm
    lanes, has_pairs = _dispatch.lanes, _pairs is not None
    measure_peak = _dispatch.measure_peak
    read_once = _dispatch.read_once

    def scratch_bytes(D, Dv, dtype="float32"):
        """Bytes of scratch a thread, with unit-stride and with strided keys."""
        return _dispatch.scratch_bytes(D, Dv, 32 if dtype == "float32" else 64)


def isa():
    """Name of the instruction set in use; "reference" is NumPy."""
    return _isa


# --- threads ---------------------------------------------------------------------------------------------------------

def _cgroup_cpus():
    """CPUs that the control group's quota pays for, or None."""
    for quota_file, period_file in (("/sys/fs/cgroup/cpu.max", None),
                                    ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us")):
        try:
            with open(quota_file) as file:
                words = file.read().split()
            if period_file:
                with open(period_file) as file:
                    words += file.read().split()
            quota, period = int(words[0]), int(words[1])
        except (OSError, ValueError, IndexError):   # no such group, or "max"
            continue
        if quota > 0 and period > 0:
            return max(1, -(-quota // period))
    return None


def _allowed_threads():
    """FASTATTN_NUM_THREADS, else what OMP_NUM_THREADS, the affinity mask and the control group allow."""
    wanted = os.environ.get("FASTATTN_NUM_THREADS")
    if wanted:
        try:
            return _positive(int(wanted), "FASTATTN_NUM_THREADS")
        except ValueError:
            raise ImportError(f"FASTATTN_NUM_THREADS must be a positive integer, got {wanted!r}") from None
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [cpus, _cgroup_cpus()]
    with contextlib.suppress(ValueError):
        limits.append(int(os.environ.get("OMP_NUM_THREADS", "").split(",")[0]))
    return max(1, min(n for n in limits if n is not None))


def get_num_threads():
    """Threads that a call uses unless it says otherwise. No result depends on it."""
    return _threads


def set_num_threads(n):
    """Set the number of threads for all later calls, from every Python thread.

    Raises TypeError unless n is an integer, ValueError unless it is at least 1.
    """
    global _threads
    _threads = _positive(n, "n")
    if _dispatch:
        _dispatch.set_threads(_threads)


@contextlib.contextmanager
def threads(n):
    """Use n threads inside a ``with`` block, for every Python thread; the old number returns at its end."""
    before = get_num_threads()
    set_num_threads(n)
    try:
        yield
    finally:
        set_num_threads(before)


_threads = 1
set_num_threads(_allowed_threads())


# --- report ----------------------------------------------------------------------------------------------------------

def config():
    """What was built and what was chosen, as a dict of strings."""
    info = {"fastattn": _build.version if _build else "source tree, not built", "isa": _isa,
            "usable": ", ".join(available)}
    if _build:
        info |= {"built": ", ".join(_build.isas), "compiler": _build.compiler, "cython": _build.cython,
                 "openmp": "yes" if _build.openmp else "no: calls run on one thread"}
    if _isa == "reference":
        info["note"] = ("no compiled kernel is in use: this is the NumPy reference, exact and slow. " +
                        ("FASTATTN_ISA asks for it." if os.environ.get("FASTATTN_ISA") else
                         "Install with a C compiler to get the kernels."))
    info |= {"threads": str(_threads), "numpy": np.__version__, "python": sys.version.split()[0]}
    return info


def show_config():
    """Print what was built and what is in use: version, instruction set, compiler, threads."""
    for key, value in config().items():
        print(f"{key + ':':10} {value}")


def get_include():
    """Directory of fastattn.h."""
    # Of the installed package, where a checkout on the path shadows it.
    folders = [os.path.join(os.path.abspath(folder), "include") for folder in sys.modules[__package__].__path__]
    return next((folder for folder in folders if os.path.isdir(folder)), folders[0])
