"""fastattn in company: other Python threads, forks, signals, the environment, the interpreter it is loaded into.

What would disturb the process of pytest runs in a child process with a time-out, so that a hang is a failure.
"""

import builtins
import contextlib
import ctypes
import ctypes.util
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from cases import assert_close, bound, exact, inputs

import fastattn as fa
from fastattn import __main__ as command_line
from fastattn import _runtime

HERE = Path(__file__).parent
HANG = 60  # seconds that nothing here takes
REACTION = 0.2  # seconds from a signal to its exception
CONTROLS = ("FASTATTN_NUM_THREADS", "OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "OMP_DYNAMIC", "OMP_WAIT_POLICY",
            "GOMP_SPINCOUNT", "PYTHONSAFEPATH")

needs_kernel = pytest.mark.compiled
needs_openmp = pytest.mark.skipif(fa.isa() == "reference" or not _runtime._build.openmp, reason="built without OpenMP")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
needs_signals = pytest.mark.skipif(os.name != "posix", reason="no POSIX signals")
needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks")
needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc")


def start(command, flags=("-P",), cwd=None, **environment):
    """A Python process with the environment of this one, but for CONTROLS; one of its own group."""
    env = {name: value for name, value in os.environ.items() if name not in CONTROLS}
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, [env.get("PYTHONPATH"), str(HERE)])), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, *flags, *command], cwd=cwd, env=env | environment, text=True,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            start_new_session=True)


@contextlib.contextmanager
def ended(process):
    """The process and all that it started are gone at the end, however it goes."""
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def run(*command, **options):
    """(exit status, stdout, stderr) of a Python process."""
    with ended(start(command, **options)) as process:
        try:
            out, err = process.communicate(timeout=HANG)
        except subprocess.TimeoutExpired:
            pytest.fail(f"isa={fa.isa()}: the process hangs: {command}")
    return process.returncode, out, err


def script(code, *arguments, **options):
    """stdout of Python code that must succeed."""
    status, out, err = run("-c", code, *map(str, arguments), **options)
    assert status == 0, f"isa={fa.isa()}, {arguments}, {options}: exit status {status}\n{out}\n{err}"
    return out.strip()


# --- Python threads --------------------------------------------------------------------------------------------------

def jobs(seed):
    """Calls of mixed shapes, dtypes, options and thread counts; some pay for several threads."""
    rng = np.random.default_rng(seed)
    shapes = [((), 1, 1, 1, 1, 1, 1), ((2,), 4, 2, 33, 70, 40, 24), ((), 3, 1, 200, 301, 64, 64),
              ((1,), 8, 8, 256, 256, 64, 64), ((2, 3), 2, 2, 17, 5, 8, 16), ((), 2, 2, 128, 1000, 96, 33)]
    for shape in shapes:
        for dtype in (np.float32, np.float64):
            arrays = inputs(rng, *shape, dtype)
            lead, H, L, S = shape[0], shape[1], shape[3], shape[4]
            mask = rng.random((L, S)) < 0.7
            bias = rng.standard_normal((H, L, S)).astype(dtype)
            for n in (None, 1, 2, 3):
                yield arrays, {"num_threads": n}
                yield arrays, {"num_threads": n, "causal": True, "return_lse": True}
                yield arrays, {"num_threads": n, "mask": mask, "kv_lengths": S // 2}
                yield arrays, {"num_threads": n, "bias": bias, "softcap": 9.0, "window": (40, 7)}
                yield arrays, {"num_threads": n, "out": np.empty((*lead, H, L, shape[-1]), dtype)}


def bits(result):
    return b"".join(x.tobytes() for x in result) if isinstance(result, tuple) else result.tobytes()


@needs_kernel
def test_calls_from_many_threads_give_the_bits_of_serial_calls(seed):
    todo = [(i, arrays, options, bits(fa.attention(*arrays, **options)))
            for i, (arrays, options) in enumerate(jobs(seed))]
    todo *= 3
    random.Random(seed).shuffle(todo)

    def call(job):
        i, arrays, options, expected = job
        if "out" in options:  # one array a call
            options = options | {"out": np.full_like(options["out"], np.nan)}
        same = bits(fa.attention(*arrays, **options)) == expected
        return None if same else (i, [x.shape for x in arrays], arrays[0].dtype.name, list(options))

    with ThreadPoolExecutor(8) as pool:
        wrong = [case for case in pool.map(call, todo) if case]
    assert not wrong, f"isa={fa.isa()}, seed={seed}: {len(wrong)} of {len(todo)} differ from serial calls: {wrong[:5]}"


@needs_kernel
@pytest.mark.parametrize("options", [{}, {"softcap": 30.0}], ids=["plain", "options"])
def test_other_threads_run_during_a_call(options):
    q, k, v = inputs(np.random.default_rng(2), (), 1, 1, 2048, 20_000, 64, 64)  # 1e10 operations: tens of ms
    ticks, done = [], threading.Event()

    def tick():
        while not done.wait(0.001):
            ticks.append(time.perf_counter())

    other = threading.Thread(target=tick)
    other.start()
    begin = time.perf_counter()
    fa.attention(q, k, v, num_threads=1, **options)
    end = time.perf_counter()
    done.set()
    other.join()
    during = sum(begin < t < end for t in ticks)
    assert during >= 5, f"isa={fa.isa()}: another thread ran {during} times in {end - begin:.3f} s"


@needs_openmp
@needs_proc
def test_threads_that_end_take_their_workers_along():
    code = """
import os, threading, time
import numpy as np
import fastattn as fa
x = np.ones((1, 8, 256, 64), np.float32)
during = []
def tasks():
    return len(os.listdir("/proc/self/task"))
def call():
    fa.attention(x, x, x, num_threads=3)
    during.append(tasks())
before = tasks()
for _ in range(30):
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
deadline = time.monotonic() + 5
while tasks() > before and time.monotonic() < deadline:
    time.sleep(0.01)
print(max(during) >= before + 3, tasks() - before)
"""
    started, left = script(code).split()
    assert started == "True", f"isa={fa.isa()}: num_threads=3 started no threads"
    assert left == "0", f"isa={fa.isa()}: {left} threads are left of 30 Python threads that have ended"


# --- processes -------------------------------------------------------------------------------------------------------

FORK = """
import multiprocessing, os, signal, sys, threading, time
import numpy as np
import fastattn as fa
from cases import inputs

arrays = inputs(np.random.default_rng(4), (1,), 8, 8, 256, 256, 64, 64)
long = inputs(np.random.default_rng(4), (), 1, 1, 4096, 60_000, 64, 64)

def answer():
    return fa.attention(*arrays, num_threads=2).tobytes()

def forked(work):
    # Exit status of a forked child that does work(): 0 if that returned the bits; or that it hangs.
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if work() == expected else 3)
        finally:
            os._exit(4)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "none: it hangs"

def in_a_thread(work):
    results = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]

how = sys.argv[1]
expected = fa.attention(*arrays, num_threads=1).tobytes()
if how == "before a parallel call":
    print(forked(answer))
    sys.exit()
assert answer() == expected
if how == "after a call":
    print(forked(answer))
elif how == "a child of the child":
    print(forked(lambda: expected if forked(answer) == 0 else None))
elif how == "from another thread":
    print(in_a_thread(lambda: forked(answer)))
elif how == "after a call in another thread":
    in_a_thread(answer)
    print(forked(lambda: in_a_thread(answer)))
elif how == "during a call":
    thread = threading.Thread(target=fa.attention, args=long, kwargs={"num_threads": 2})
    thread.start()
    time.sleep(0.05)
    status = forked(answer)
    assert thread.is_alive(), "the call must outlast the child"
    thread.join()
    print(status)
elif how == "multiprocessing":
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        results = [pool.apply_async(answer) for _ in range(6)]
        print(0 if all(result.get(timeout=20) == expected for result in results) else 3)
assert answer() == expected, "the parent"
"""


@needs_kernel
@needs_fork
@pytest.mark.parametrize("how", ["before a parallel call", "after a call", "a child of the child",
                                 "from another thread", "after a call in another thread", "during a call",
                                 "multiprocessing"])
def test_a_forked_child_answers_with_the_same_bits(how):
    status = script(FORK, how)
    assert status == "0", f"isa={fa.isa()}, fork {how}: the child's exit status is {status}"


# --- signals ---------------------------------------------------------------------------------------------------------

# Seconds of work on arrays that take no memory: zero strides. Names of cases -> arguments.
LONG = """
import signal, sys, threading, time
import numpy as np

def long(case, n_threads):
    row = np.ones(64, np.float32)
    def array(*shape):
        return np.broadcast_to(row[:shape[-1]], shape)
    options = {"num_threads": n_threads}
    if case == "many keys":
        return (array(1, 1, 128, 64), *[array(1, 1, 40_000_000, 64)]*2), options
    if case == "many short heads":  # each of few blocks of keys
        return (*[array(2000, 16, 512, 64)]*2, array(2000, 16, 512, 1)), options
    if case in ("the first task outlasts the other", "the last task outlasts the other"):
        options["kv_lengths"] = [80_000_000, 1_500_000] if "first" in case else [1_500_000, 80_000_000]
        return (array(2, 1, 64, 64), *[array(2, 1, 80_000_000, 64)]*2), options
    if case == "a large head":
        wide = np.broadcast_to(np.float32(1), (1, 1, 800_000, 4096))
        return (wide[:, :, :128], wide, wide[..., :64]), options
"""

INTERRUPT = LONG + """
def arrays():
    from cases import inputs
    return inputs(np.random.default_rng(5), (1,), 8, 8, 256, 256, 64, 64)

# The children of a shell's background job ignore SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
case, n_threads, imported = sys.argv[1], int(sys.argv[2]), sys.argv[3]
def import_it():
    global fa
    import fastattn as fa
if imported == "in a thread":
    thread = threading.Thread(target=import_it)
    thread.start()
    thread.join()
else:
    import_it()
before = [fa.attention(*arrays(), num_threads=n).tobytes() for n in (1, 2)]
long_arrays, options = long(case, n_threads)
begin = time.monotonic()
try:
    print("ready")
    fa.attention(*long_arrays, **options)
    print("finished after", time.monotonic() - begin, "s")
except KeyboardInterrupt:
    print(time.monotonic())
after = [fa.attention(*arrays(), num_threads=n).tobytes() for n in (1, 2)]
print(after == before)
"""


def interrupted(case, n_threads, imported):
    where = f"isa={fa.isa()}, {case}, {n_threads} threads, imported {imported}"
    with ended(start(["-c", INTERRUPT, case, str(n_threads), imported])) as process:
        watchdog = threading.Timer(HANG, process.kill)
        watchdog.start()
        try:
            assert process.stdout.readline() == "ready\n", f"{where}: {process.stderr.read()}"
            time.sleep(0.3)
            sent = time.monotonic()  # of one clock for all processes
            process.send_signal(signal.SIGINT)
            raised, same = process.stdout.readline().strip(), process.stdout.readline().strip()
        finally:
            watchdog.cancel()
    assert raised and not raised.startswith("finished"), f"{where}: no KeyboardInterrupt; {raised or 'hangs'}"
    seconds = float(raised) - sent
    assert seconds <= REACTION, f"{where}: KeyboardInterrupt {seconds:.3f} s after the signal"
    assert same == "True", f"{where}: after the interrupt a call fails or gives other bits"


@needs_kernel
@needs_signals
@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("case", ["many keys", "many short heads", "the first task outlasts the other",
                                  "the last task outlasts the other", "a large head"])
def test_sigint_ends_a_long_call(case, n_threads):
    interrupted(case, n_threads, "by the main thread")


@needs_kernel
@needs_signals
def test_sigint_ends_a_long_call_wherever_fastattn_was_imported():
    interrupted("many keys", 2, "in a thread")


@needs_kernel
@needs_signals
def test_a_handler_runs_during_a_call_and_changes_nothing():
    code = LONG + """
import fastattn as fa
q, k, v = (np.random.default_rng(6).standard_normal((1, 2, n, 64), np.float32) for n in (2048, 50_000, 50_000))
expected = fa.attention(q, k, v, num_threads=2).tobytes()
times = []
signal.signal(signal.SIGALRM, lambda *_: times.append(time.perf_counter()))
signal.setitimer(signal.ITIMER_REAL, 0.02)
begin = time.perf_counter()
same = fa.attention(q, k, v, num_threads=2).tobytes() == expected
end = time.perf_counter()
print(len(times), times[0] - begin < 0.02 + 0.2 or end - begin, end - begin > 0.05, same)
"""
    assert script(code) == "1 True True True", f"isa={fa.isa()}"


@needs_kernel
@needs_signals
def test_an_exception_of_a_handler_is_the_calls():
    code = LONG + """
import fastattn as fa
class Late(Exception):
    pass
def late(*_):
    raise Late
signal.signal(signal.SIGALRM, late)
arrays, options = long("many keys", 2)
signal.setitimer(signal.ITIMER_REAL, 0.2)
begin = time.perf_counter()
try:
    fa.attention(*arrays, **options)
    print("finished")
except Late:
    print(time.perf_counter() - begin < 0.2 + 0.2)
"""
    assert script(code) == "True", f"isa={fa.isa()}"


@needs_kernel
@needs_signals
def test_sigint_leaves_the_call_of_another_thread_alone():
    code = LONG + """
import os
import fastattn as fa
signal.signal(signal.SIGINT, signal.default_int_handler)
q, k, v = (np.random.default_rng(7).standard_normal((1, 2, n, 64), np.float32) for n in (2048, 50_000, 50_000))
expected = fa.attention(q, k, v, num_threads=2).tobytes()
results = []
def call():
    results.append(fa.attention(q, k, v, num_threads=2).tobytes())
thread = threading.Thread(target=call)
try:
    thread.start()
    os.kill(os.getpid(), signal.SIGINT)
    while thread.is_alive():
        time.sleep(0.001)
    print("no KeyboardInterrupt")
except KeyboardInterrupt:
    print("during the call" if thread.is_alive() else "after the call")
thread.join()
print(results == [expected])
"""
    assert script(code) == "during the call\nTrue", f"isa={fa.isa()}"


# --- FASTATTN_ISA ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("isa", _runtime.available)
def test_fastattn_isa_binds(isa):
    code = """
import sys
import numpy as np
import fastattn as fa
from cases import assert_close, bound, exact, inputs
from fastattn import _runtime
assert fa.isa() == sys.argv[1], fa.isa()
assert (_runtime.plain is None) == (sys.argv[1] == "reference")
for dtype in (np.float32, np.float64):
    for options in ({}, {"causal": True, "softcap": 5.0}):
        arrays = inputs(np.random.default_rng(8), (2,), 4, 2, 37, 101, 24, 20, dtype)
        out, lse = fa.attention(*arrays, return_lse=True, **options)
        allowed, (exact_out, exact_lse) = bound(*arrays, **options), exact(*arrays, **options)
        context = {"dtype": dtype.__name__, "options": options, "seed": 8}
        assert_close(out, exact_out, allowed.out, context)
        assert_close(lse, exact_lse, allowed.lse, context)
        assert_close(fa.attention(*arrays, **options), exact_out, allowed.out, context)
"""
    script(code, isa, FASTATTN_ISA=isa)


def test_reference_uses_numpy_only():
    code = """
import sys
import fastattn as fa
fa.attention([[1.0]], [[1.0]], [[1.0]])
print([name for name in sys.modules if "_kernel_" in name])
"""
    assert script(code, FASTATTN_ISA="reference") == "[]"


@pytest.mark.parametrize("name", ["avx1024", "AVX2", "sse4", "neon" if "neon" not in _runtime.available else "avx2"])
def test_an_unusable_fastattn_isa_is_an_import_error_that_lists_the_usable(name):
    status, _, err = run("-c", "import fastattn", FASTATTN_ISA=name)
    usable = ", ".join(_runtime.available)
    assert status == 1
    assert err.strip().splitlines()[-1] == (
        f"ImportError: FASTATTN_ISA must be one of {usable} on this machine, got {name!r}")


def test_no_fastattn_isa_means_the_best():
    best = _runtime.available[0]
    assert script("import fastattn; print(fastattn.isa())", FASTATTN_ISA="") == best


@pytest.mark.skipif(len(_runtime.available) < 2, reason="no kernel was built")
def test_what_the_processor_lacks_is_not_bound(monkeypatch):
    lacking, *rest = _runtime.available

    class Dispatch:
        @staticmethod
        def supports(isa):
            return isa in rest

    monkeypatch.setattr(_runtime, "_dispatch", Dispatch)
    monkeypatch.delenv("FASTATTN_ISA", raising=False)
    assert _runtime._choose() == (rest, rest[0])
    monkeypatch.setenv("FASTATTN_ISA", lacking)
    with pytest.raises(ImportError, match=f"must be one of {', '.join(rest)} on this machine, got '{lacking}'"):
        _runtime._choose()


# --- number of threads -----------------------------------------------------------------------------------------------

THREADS = """
import os, sys
{first}
import numpy as np
import fastattn as fa
{then}
print(fa.get_num_threads())
"""
DEFAULT_THREADS = int(script(THREADS.format(first="", then="")))


@pytest.mark.parametrize("environment, expected", [
    ({"FASTATTN_NUM_THREADS": "1"}, 1),
    ({"FASTATTN_NUM_THREADS": "3"}, 3),
    ({"FASTATTN_NUM_THREADS": " 7 "}, 7),
    ({"FASTATTN_NUM_THREADS": ""}, DEFAULT_THREADS),
    ({"OMP_NUM_THREADS": "1"}, 1),
    ({"OMP_NUM_THREADS": "1,4"}, 1),
    ({"OMP_NUM_THREADS": "100000"}, DEFAULT_THREADS),
    ({"OMP_NUM_THREADS": "many"}, DEFAULT_THREADS),
    ({"OMP_NUM_THREADS": "1", "FASTATTN_NUM_THREADS": "2"}, 2),
], ids=str)
def test_the_environment_sets_the_number_of_threads(environment, expected):
    assert int(script(THREADS.format(first="", then=""), **environment)) == expected


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "1,2"])
def test_a_wrong_fastattn_num_threads_is_an_import_error(value):
    status, _, err = run("-c", "import fastattn", FASTATTN_NUM_THREADS=value)
    assert status == 1
    assert err.strip().splitlines()[-1] == (
        f"ImportError: FASTATTN_NUM_THREADS must be a positive integer, got {value!r}")


@needs_affinity
def test_the_affinity_mask_limits_the_number_of_threads():
    cpus = sorted(os.sched_getaffinity(0))
    for n in {1, len(cpus)}:
        first = f"os.sched_setaffinity(0, {cpus[:n]})"
        assert int(script(THREADS.format(first=first, then=""))) == min(n, DEFAULT_THREADS), f"{n} of {len(cpus)} CPUs"


@pytest.mark.parametrize("files, expected", [
    ({"/sys/fs/cgroup/cpu.max": "150000 100000"}, 2),
    ({"/sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
    ({"/sys/fs/cgroup/cpu.max": "400000 100000"}, 4),
    ({"/sys/fs/cgroup/cpu.max": "max 100000"}, None),
    ({"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 3),
    ({"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, None),
    ({"/sys/fs/cgroup/cpu.max": ""}, None),
    ({}, None),
], ids=str)
def test_the_control_group_limits_the_number_of_threads(files, expected, monkeypatch):
    def fake_open(path, *args, **kwargs):
        if path not in files:
            raise FileNotFoundError(path)
        return io.StringIO(files[path] + "\n")

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", fake_open)
        assert _runtime._cgroup_cpus() == expected


@needs_openmp
@needs_proc
@pytest.mark.parametrize("then, expected", [
    ("run()", 3),
    ("fa.set_num_threads(1); run()", 1),
    ("fa.set_num_threads(4); run()", 4),
    ("run(num_threads=2)", 2),
    ("run(num_threads=1)", 1),
    ("exec('with fa.threads(2): run()')", 2),
    ("exec('with fa.threads(5): pass'); run()", 3),
])
def test_calls_run_on_that_many_threads(then, expected):
    # OpenBLAS is told to start none, so the threads of the process are those of the call.
    first = """
def run(**options):
    x = np.ones((1, 64, 128, 64), np.float32)
    fa.attention(x, x, x, **options)
"""
    then += "\nprint(len(os.listdir('/proc/self/task')))"
    out = script(THREADS.format(first=first, then=then), FASTATTN_NUM_THREADS="3", OPENBLAS_NUM_THREADS="1")
    assert int(out.split()[0]) == expected, f"isa={fa.isa()}"


@needs_kernel
@pytest.mark.parametrize("environment", [{"OMP_THREAD_LIMIT": "1"}, {"OMP_THREAD_LIMIT": "2"}, {"OMP_DYNAMIC": "true"},
                                         {"OMP_WAIT_POLICY": "passive"}], ids=str)
def test_fewer_threads_than_asked_for_do_all_the_work(environment):
    code = """
import numpy as np
import fastattn as fa
from cases import inputs
arrays = inputs(np.random.default_rng(9), (), 8, 8, 256, 256, 64, 64)
print(fa.attention(*arrays, num_threads=1).tobytes() == fa.attention(*arrays, num_threads=4).tobytes())
"""
    assert script(code, **environment) == "True", f"isa={fa.isa()}"


@needs_kernel
@needs_signals
def test_any_number_of_threads_may_be_asked_for():
    # 8 GiB of address space hold about a thousand stacks: one thread for each of the tasks would end the process.
    code = """
import resource
import numpy as np
import fastattn as fa
x = np.broadcast_to(np.random.default_rng(10).standard_normal((64, 64), np.float32), (64, 64, 64, 64))
expected = fa.attention(x, x, x, num_threads=1)
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
for n in (1000, 100_000, 2**31 - 1, 2**40):
    assert (fa.attention(x, x, x, num_threads=n) == expected).all(), n
"""
    script(code)


@pytest.fixture
def same_threads():
    before = fa.get_num_threads()
    yield before
    fa.set_num_threads(before)


def test_set_num_threads(same_threads):
    for n in (1, 5, np.int64(3)):
        fa.set_num_threads(n)
        assert fa.get_num_threads() == n and type(fa.get_num_threads()) is int
    seen = []
    thread = threading.Thread(target=lambda: seen.append(fa.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [3], "one number for all threads"


@pytest.mark.parametrize("value, error", [
    (0, ValueError), (-1, ValueError), (True, TypeError), (2.0, TypeError), ("2", TypeError), (None, TypeError),
    (np.float32(2), TypeError), ([2], TypeError),
], ids=repr)
def test_a_wrong_number_of_threads_changes_nothing(value, error, same_threads):
    with pytest.raises(error, match="n must be"):
        fa.set_num_threads(value)
    with pytest.raises(error, match="n must be"), fa.threads(value):
        pytest.fail("the block must not run")
    assert fa.get_num_threads() == same_threads


def test_threads_restores_the_number(same_threads):
    with fa.threads(4):
        assert fa.get_num_threads() == 4
        with fa.threads(7):
            assert fa.get_num_threads() == 7
        assert fa.get_num_threads() == 4
    assert fa.get_num_threads() == same_threads
    with pytest.raises(KeyError), fa.threads(4):
        raise KeyError
    assert fa.get_num_threads() == same_threads


# --- what a call leaves as it was ------------------------------------------------------------------------------------

@needs_affinity
def test_calls_keep_the_callers_affinity():
    arrays = inputs(np.random.default_rng(11), (), 8, 8, 256, 256, 64, 64)
    expected = fa.attention(*arrays, num_threads=1)
    allowed = os.sched_getaffinity(0)

    def call(mask):  # in a thread of its own, whose mask is its own
        os.sched_setaffinity(0, mask)
        same = [(fa.attention(*arrays, num_threads=n) == expected).all() for n in (2, 3) for _ in range(5)]
        return all(same), os.sched_getaffinity(0)

    for _ in range(20):
        fa.attention(*arrays, num_threads=2)
    assert os.sched_getaffinity(0) == allowed, f"isa={fa.isa()}"
    for mask in [allowed, *({cpu} for cpu in sorted(allowed)[:2])]:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(call, mask).result() == (True, mask), f"isa={fa.isa()}"
    assert os.sched_getaffinity(0) == allowed, f"isa={fa.isa()}"


def test_calls_keep_the_floating_point_environment():
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    tiny = {np.float32: np.finfo(np.float32).tiny, np.float64: np.finfo(np.float64).tiny}

    def state():
        return libm.fegetround(), [(np.full(3, x) * dtype(0.25)).tolist() for dtype, x in tiny.items()]

    before = state()
    assert before[1] == [[float(x) / 4] * 3 for x in tiny.values()], "denormal numbers are flushed before any call"
    for dtype in (np.float32, np.float64):
        arrays = inputs(np.random.default_rng(12), (), 8, 8, 256, 256, 64, 64, dtype)
        for n in (1, 2):
            fa.attention(*arrays, num_threads=n)
            fa.attention(*arrays, num_threads=n, softcap=3.0, causal=True)
            assert state() == before, f"isa={fa.isa()}"


@pytest.mark.parametrize("given", [{}, {"GOMP_SPINCOUNT": "77"}, {"OMP_WAIT_POLICY": "active"}], ids=str)
def test_import_leaves_the_environment_as_it_was(given):
    code = """
import ctypes, os
getenv = ctypes.CDLL(None).getenv
getenv.restype = ctypes.c_char_p
before = dict(os.environ)
import fastattn
assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())
for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
    assert (getenv(name.encode()) or b"").decode() == before.get(name, ""), name
"""
    script(code, **given)


def test_import_needs_numpy_and_the_standard_library_only():
    code = """
import sys
import numpy
before = set(sys.modules)
import fastattn
for name in sorted(set(sys.modules) - before):
    # Without a file: what Cython's modules share inside a process.
    if getattr(sys.modules[name], "__file__", None) or name in sys.builtin_module_names:
        print(name.partition(".")[0])
"""
    roots = set(script(code).split())
    assert "fastattn" in roots
    assert roots <= {"fastattn", "numpy", *sys.stdlib_module_names}, f"isa={fa.isa()}"


@needs_proc
def test_import_starts_no_thread():
    code = """
import os
import numpy
before = os.listdir("/proc/self/task")
import fastattn
print(os.listdir("/proc/self/task") == before)
"""
    assert script(code) == "True"


# --- the command line, the report ------------------------------------------------------------------------------------

def test_the_command_prints_the_configuration_and_checks_itself():
    status, out, err = run("-m", "fastattn")
    assert (status, err) == (0, ""), f"isa={fa.isa()}: {out}{err}"
    assert f"isa:       {fa.isa()}\n" in out and out.endswith("all agree\n")


def test_the_command_refuses_nonsense():
    status, out, err = run("-m", "fastattn", "nonsense")
    assert (status, out) == (2, "") and err.startswith("usage: python -m fastattn ")


def test_the_command_helps():
    status, out, err = run("-m", "fastattn", "--help")
    assert (status, err) == (0, "") and out.startswith("usage: python -m fastattn ")


@pytest.mark.parametrize("wrong", [lambda out: out + 1e-5, lambda out: out * np.nan, np.zeros_like],
                         ids=["off", "NaN", "zero"])
def test_the_self_check_notices_wrong_results(wrong, monkeypatch, capsys):
    right = fa.attention
    monkeypatch.setattr(command_line.fa, "attention", lambda *args, **options: wrong(right(*args, **options)))
    assert command_line.main([]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_show_config_prints_what_is_bound(capsys):
    fa.show_config()
    report = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    report = {name: text.strip() for name, text in report.items()}
    assert report["isa"] == fa.isa() and report["usable"] == ", ".join(_runtime.available)
    assert report["fastattn"] == fa.__version__ and report["threads"] == str(fa.get_num_threads())
    assert report["numpy"] == np.__version__
    assert ("note" in report) == (fa.isa() == "reference"), "the stand-in says so"


# --- source trees ----------------------------------------------------------------------------------------------------

@pytest.fixture
def checkout(tmp_path):
    """A source tree: Python files and no compiled module."""
    ignore = shutil.ignore_patterns("*.so", "*.pyd", "_build.py", "__pycache__")
    shutil.copytree(HERE.parent / "fastattn", tmp_path / "fastattn", ignore=ignore)
    return tmp_path


def test_a_checkout_binds_the_installed_kernels(checkout):
    code = """
import fastattn
print(fastattn.__file__)
print(fastattn.isa())
print(fastattn.get_include())
"""
    where, isa, include = script(code, flags=(), cwd=checkout).splitlines()
    assert Path(where).resolve().is_relative_to(checkout.resolve()), "this must test the checkout's files"
    assert isa == fa.isa()
    assert Path(include, "fastattn.h").exists()
    status, out, _ = run("-m", "fastattn", flags=(), cwd=checkout)
    assert status == 0 and f"isa:       {fa.isa()}\n" in out


def test_a_checkout_alone_is_the_reference(checkout):
    code = """
import pkgutil
pkgutil.extend_path = lambda path, name: path   # as if nothing were installed
import fastattn as fa
print(fa.attention([[1.0]], [[1.0]], [[3.0]]).item())
fa.show_config()
"""
    out = script(code, flags=(), cwd=checkout, FASTATTN_ISA="")
    assert out.startswith("3.0\nfastattn:  source tree, not built\nisa:       reference\n") and "NumPy reference" in out
    status, _, err = run("-c", code, flags=(), cwd=checkout, FASTATTN_ISA="avx512")
    assert status == 1 and "ImportError: FASTATTN_ISA must be one of reference on this machine, got 'avx512'" in err


def test_get_include_has_the_header():
    assert "fastattn_kernel" in Path(fa.get_include(), "fastattn.h").read_text(encoding="utf-8")


# --- these tests themselves ------------------------------------------------------------------------------------------

def test_a_hang_is_a_failure(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "HANG", 0.2)
    with pytest.raises(pytest.fail.Exception, match="hangs"):
        script("import time; time.sleep(30)")


def test_the_bound_refuses_what_is_just_outside():
    arrays = inputs(np.random.default_rng(13), (), 1, 1, 3, 5, 4, 4)
    (out, _), allowed = exact(*arrays), bound(*arrays)
    with pytest.raises(AssertionError, match="are wrong"):
        assert_close(out + 1.01 * allowed.out, out, allowed.out, {"seed": 13})
