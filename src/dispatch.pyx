# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""From arrays to tasks: fills the problem struct, takes scratch, runs the bound kernel on threads without the GIL.

Everything here assumes what checks.py has established. `plain` is the one exception: a short test that is true only of calls
that need no check, so that a small call costs little; when in doubt it answers None and the caller takes the long way.
"""
include "kernel/abi.pxi"

cimport numpy as cnp
from cpython.exc cimport PyErr_Occurred
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.ref cimport Py_INCREF
from cython.parallel cimport parallel, prange
from libc.math cimport sqrt
from libc.stdint cimport uintptr_t, uint64_t
from libc.string cimport memset

cnp.import_array()

cdef extern from "Python.h":
    int check_signals "PyErr_CheckSignals"()            # leaves the exception set; raised when the threads have stopped
    unsigned long PyThread_get_thread_ident() nogil

cdef extern from "<stdlib.h>" nogil:
    void* aligned_alloc(size_t, size_t)
    void free(void*)

cdef extern from "threads.h" nogil:
    ctypedef struct fastattn_place:
        pass
    int fastattn_thread()
    int fastattn_team()
    int64_t fastattn_add(int64_t*, int64_t)
    double fastattn_clock()
    void fastattn_rest(double)
    void fastattn_caller(fastattn_place*)
    void fastattn_keep_off(const fastattn_place*)
    int fastattn_supports(const char*)

cdef extern from "numpy/arrayobject.h":
    int PyArray_SetBaseObject(cnp.ndarray, object) except -1

cdef enum:
    POLL_MS = 50
    RUN = 8                     # tasks taken at once, fewer near the end: neighbours share keys, each prefetches for the next
    KEPT = 8                    # scratch buffers kept between calls
    TANH = 16                   # products that take as long as one

cdef const fastattn_kernel* kernel_f32 = NULL
cdef const fastattn_kernel* kernel_f64 = NULL
cdef const fastattn_kernel* kernel_pairs = NULL     # of bfloat16, where the instruction set has such products
cdef unsigned long main_thread = 0
cdef int default_threads = 1
cdef int most_threads = 64
cdef bint forked = False

# FLOPs that pay for waking one more thread: about 10 µs of AVX-512 work on one core.
cdef double FLOPS_A_THREAD = 2.5e6


def supports(str isa):
    """Whether this CPU and its operating system can run a build of the kernel."""
    return bool(fastattn_supports(isa.encode()))


cdef const fastattn_kernel* table_of(capsule, int bits) except *:
    cdef const fastattn_kernel* kernel = <const fastattn_kernel*>PyCapsule_GetPointer(capsule, "fastattn_kernel")
    if kernel.abi != FASTATTN_ABI or kernel.bits != bits:
        raise ImportError("fastattn's kernels were built from other sources than its dispatch module: install it again")
    return kernel


def bind(f32, f64, pairs=None):
    """Take the tables of the chosen kernel modules."""
    global kernel_f32, kernel_f64, kernel_pairs
    kernel_f32 = table_of(f32, 32)
    kernel_f64 = table_of(f64, 64)
    if pairs is not None:
        kernel_pairs = table_of(pairs, 16)


def set_threads(int n):
    """Default number of threads for calls that do not say."""
    global default_threads
    default_threads = n


def set_process(unsigned long main_thread_ident, int cpus):
    """Which Python thread receives signals, and how many CPUs there are."""
    global main_thread, most_threads
    main_thread = main_thread_ident
    most_threads = max(64, 2*cpus)      # libgomp ends the process when it cannot create a thread: more are never of use


def after_fork():
    """libgomp hangs in a forked child that enters a parallel region: run serially there."""
    global forked
    forked = True


# --- scratch ---------------------------------------------------------------------------------------------------------
# Fresh memory costs a page fault every 4 KiB; a few buffers are kept. Taken and given back with the GIL held.

cdef struct Buffer:
    void* data
    size_t size

cdef Buffer kept[KEPT]
memset(kept, 0, sizeof(kept))


cdef void* take(size_t* size) noexcept:
    cdef int i
    cdef void* data
    for i in range(KEPT):
        if kept[i].data != NULL and kept[i].size >= size[0]:
            data = kept[i].data
            size[0] = kept[i].size
            kept[i].data = NULL
            return data
    size[0] = (size[0] + 4095)//4096*4096
    return aligned_alloc(64, size[0])


cdef void give_back(void* data, size_t size) noexcept:
    cdef int i
    cdef int smallest = 0
    for i in range(KEPT):
        if kept[i].data == NULL:
            kept[i].data = data
            kept[i].size = size
            return
        if kept[i].size < kept[smallest].size:
            smallest = i
    if kept[smallest].size < size:
        free(kept[smallest].data)
        kept[smallest].data = data
        kept[smallest].size = size
    else:
        free(data)


# --- running ---------------------------------------------------------------------------------------------------------

cdef struct Watch:
    double last
    int stop


cdef void poll(void* data) noexcept nogil:
    # On the calling thread, between blocks of keys. Only the main thread can receive signals in Python.
    cdef Watch* watch = <Watch*>data
    cdef double now = fastattn_clock()
    if now - watch.last < POLL_MS*1e-3:
        return
    watch.last = now
    with gil:
        if check_signals() != 0:
            watch.stop = 1


ctypedef void (*Each)(const void*, int64_t, void*) noexcept nogil


cdef struct Work:
    const fastattn_kernel* kernel
    const fastattn_problem* p
    Each each                           # does a task of `of`, instead of run and p; or NULL
    const void* of
    const fastattn_problem* calls       # whose stop and poll are looked at
    bint in_turn                        # tasks wait for earlier ones: one at a time
    int64_t n_tasks, next, idle         # next: the first task nobody has; idle: threads that found none
    char* scratch
    size_t size                         # of a thread's part


cdef void work_off(Work* work) noexcept nogil:
    cdef int thread = fastattn_thread()
    cdef int64_t first, task, n
    cdef double start
    while work.calls.stop[0] == 0:
        n = fastattn_add(&work.next, 0)
        n = max(<int64_t>1, min(<int64_t>RUN, (work.n_tasks - n)//(8*fastattn_team())))
        if work.in_turn:
            n = 1
        first = fastattn_add(&work.next, n)
        if first >= work.n_tasks:
            break
        for task in range(first, min(first + n, work.n_tasks)):
            if work.calls.stop[0] != 0:
                break
            if thread == 0 and work.calls.poll != NULL:
                work.calls.poll(work.calls.poll_data)
            if work.each != NULL:
                work.each(work.of, task, work.scratch + thread*work.size)
            else:
                work.kernel.run(work.p, work.n_tasks, task, thread == 0, work.scratch + thread*work.size)
    fastattn_add(&work.idle, 1)
    if thread == 0 and work.calls.poll != NULL:
        # The others' last tasks may be long: go on looking for signals, busy for a millisecond, then at leisure.
        start = fastattn_clock()
        while fastattn_add(&work.idle, 0) < fastattn_team():
            work.calls.poll(work.calls.poll_data)
            if fastattn_clock() - start > 1e-3:
                fastattn_rest(2e-4)


cdef void run_threads(Work* work, int n_threads) noexcept nogil:
    cdef fastattn_place place
    fastattn_caller(&place)
    with parallel(num_threads=n_threads):
        fastattn_keep_off(&place)
        work_off(work)


cdef double pairs(const fastattn_problem* p) noexcept nogil:
    # Of queries and keys in all batches and heads. Few queries of a key head take as long as eight more would: what they wait
    # for are the keys.
    cdef double extra = 8.0*p.Hkv/p.H
    cdef double n = 0
    cdef double rows
    cdef int64_t b
    if p.cu_q == NULL:
        return <double>p.B*p.H*p.S*(p.L + (extra if p.L < 32 else 0))
    for b in range(p.B):
        rows = <double>(p.cu_q[b + 1] - p.cu_q[b])
        n += (rows + (extra if 0 < rows < 32 else 0))*(p.cu_k[b + 1] - p.cu_k[b])
    return n*p.H


cdef const fastattn_kernel* kernel_of(int bits) noexcept:
    return kernel_f64 if bits == 64 else kernel_pairs if bits == 16 else kernel_f32


cdef int threads_for(int n_threads, double flops) noexcept:
    if n_threads <= 0:
        n_threads = default_threads
    n_threads = 1 if forked else min(n_threads, most_threads)
    if n_threads > 1 and flops < n_threads*FLOPS_A_THREAD:
        n_threads = max(1, <int>(flops/FLOPS_A_THREAD))
    return n_threads


cdef int perform(Work* work, fastattn_problem* p, int n_threads, double flops) except -1:
    # Do a work's tasks. `p` has stop and poll, and takes the memory that the tasks share.
    cdef size_t size = (work.size + 4095 + 128)//4096*4096 + 64   # not a multiple of 4096 apart: threads would share L1 sets
    cdef size_t shared = (work.kernel.state(p) + 63)//64*64 if work.each == NULL else 0
    cdef size_t total
    cdef char* scratch
    cdef Watch watch
    n_threads = <int>min(<int64_t>n_threads, work.n_tasks)
    total = size*n_threads + shared
    scratch = <char*>take(&total)
    if scratch == NULL:
        raise MemoryError(f"fastattn needs {total} bytes of scratch for {n_threads} threads")
    p.state = scratch
    if shared > 0:
        memset(scratch, 0, p.groups*sizeof(int64_t))
    watch.last = 0
    watch.stop = 0
    p.stop = &watch.stop
    p.poll = NULL
    p.poll_data = &watch
    if flops > 1e8 and PyThread_get_thread_ident() == main_thread:
        watch.last = fastattn_clock()
        p.poll = poll
    work.calls = p
    work.next = 0
    work.idle = 0
    work.scratch = scratch + shared
    work.size = size
    with nogil:
        if n_threads == 1:
            work_off(work)
        else:
            run_threads(work, n_threads)
    give_back(scratch, total)
    if watch.stop != 0 and PyErr_Occurred() != NULL:
        return -1
    return 0


cdef int perform_each(const fastattn_kernel* kernel, Each each, const void* of, int64_t n_tasks, size_t size, int n_threads,
                      double flops) except -1:
    # the tasks of what is no attention problem, independent of each other; size: scratch of a thread
    cdef fastattn_problem calls
    cdef Work work
    memset(&calls, 0, sizeof(calls))
    work.kernel = kernel
    work.each = each
    work.of = of
    work.in_turn = False
    work.n_tasks = n_tasks
    work.size = size
    return perform(&work, &calls, n_threads, flops)


cdef int run(fastattn_problem* p, int n_threads) except -1:
    cdef Work work
    cdef double flops
    if p.B*p.H*p.L == 0:
        return 0
    flops = 2*pairs(p)*(3*p.D + 2*p.Dv if p.reduce == FASTATTN_GRADIENT else 2*p.D if p.reduce and p.reduce != FASTATTN_MEAN
                        else p.D + p.Dv)
    if p.score == FASTATTN_ADDITIVE:
        flops += 2*pairs(p)*p.D*TANH
    n_threads = threads_for(n_threads, flops)
    work.kernel = kernel_of(p.bits)
    work.n_tasks = work.kernel.tasks(p, n_threads)
    if work.n_tasks == 0:
        return 0
    p.abi = FASTATTN_ABI
    work.p = p
    work.each = NULL
    work.in_turn = p.reduce == FASTATTN_GRADIENT and p.chunks > 1
    work.size = work.kernel.scratch(p)
    return perform(&work, p, n_threads, flops)


# --- arrays ----------------------------------------------------------------------------------------------------------

cdef cnp.ndarray empty(int n_axes, cnp.npy_intp* shape, int typenum):
    # 64-byte aligned, from NumPy's allocator
    cdef cnp.npy_intp n = 4 if typenum == cnp.NPY_FLOAT32 else 8
    cdef int i
    cdef cnp.ndarray raw, result
    for i in range(n_axes):
        n *= shape[i]
    n += 64
    raw = cnp.PyArray_SimpleNew(1, &n, cnp.NPY_UINT8)
    result = cnp.PyArray_New(cnp.ndarray, n_axes, shape, typenum, NULL,
                             <void*>((<uintptr_t>cnp.PyArray_DATA(raw) + 63)//64*64), 0, cnp.NPY_ARRAY_CARRAY, <object>NULL)
    Py_INCREF(raw)
    PyArray_SetBaseObject(result, raw)
    return result


cdef int kind_of(cnp.ndarray x) noexcept:
    # checks.py has looked at the dtype; bfloat16 has a number of its own in each process
    cdef int n = cnp.PyArray_TYPE(x)
    if n == cnp.NPY_FLOAT32 or n == cnp.NPY_FLOAT64:
        return FASTATTN_REAL
    if n == cnp.NPY_FLOAT16:
        return FASTATTN_F16
    return FASTATTN_I8 if cnp.PyArray_ITEMSIZE(x) == 1 else FASTATTN_BF16


cdef void describe(fastattn_array* a, cnp.ndarray x, int tail, int n_lead) noexcept:
    # Strides of (*lead, head, row, col), or without col (tail = 2); axes that are missing on the left get 0.
    cdef int n = cnp.PyArray_NDIM(x)
    cdef cnp.npy_intp* strides = cnp.PyArray_STRIDES(x)
    cdef cnp.npy_intp size = cnp.PyArray_ITEMSIZE(x)
    cdef int i
    a.data = cnp.PyArray_DATA(x)
    a.kind = kind_of(x)
    for i in range(n_lead):
        a.lead[i] = strides[i]//size if cnp.PyArray_DIM(x, i) != 1 else 0
    a.col = strides[n - 1]//size if tail == 3 else 1
    a.row = strides[n - tail + 1]//size if n >= tail - 1 else 0
    a.head = strides[n - tail]//size if n >= tail else 0


cdef inline bint simple(cnp.ndarray x, int typenum) noexcept:
    # native, whole-element strides
    cdef cnp.npy_intp size = cnp.PyArray_ITEMSIZE(x)
    cdef int i
    if cnp.PyArray_TYPE(x) != typenum or not cnp.PyArray_ISNOTSWAPPED(x) or not cnp.PyArray_ISALIGNED(x):
        return False
    for i in range(cnp.PyArray_NDIM(x)):
        if cnp.PyArray_STRIDE(x, i) % size:
            return False
    return True


def plain(query, key, value, bint causal, scale, num_threads):
    """Attention without options on arrays that plainly fit together; None when that is not sure."""
    cdef int n, i, typenum
    cdef cnp.ndarray q, k, v, out
    cdef cnp.npy_intp shape[16]
    cdef fastattn_problem p
    if type(query) is not cnp.ndarray or type(key) is not cnp.ndarray or type(value) is not cnp.ndarray:
        return None
    q = query
    k = key
    v = value
    n = cnp.PyArray_NDIM(q)
    typenum = cnp.PyArray_TYPE(q)
    if (n < 2 or n > 3 + FASTATTN_LEAD or cnp.PyArray_NDIM(k) != n or cnp.PyArray_NDIM(v) != n
            or (typenum != cnp.NPY_FLOAT32 and typenum != cnp.NPY_FLOAT64)
            or not simple(q, typenum) or not simple(k, typenum) or not simple(v, typenum)):
        return None
    memset(&p, 0, sizeof(p))
    p.B = 1
    p.n_lead = max(n - 3, 0)
    for i in range(n):
        shape[i] = cnp.PyArray_DIM(q, i)
    for i in range(p.n_lead):
        if cnp.PyArray_DIM(k, i) != shape[i] or cnp.PyArray_DIM(v, i) != shape[i]:
            return None
        p.lead[i] = shape[i]
        p.B *= shape[i]
    p.H = shape[n - 3] if n > 2 else 1
    p.Hkv = cnp.PyArray_DIM(k, n - 3) if n > 2 else 1
    p.L = shape[n - 2]
    p.D = shape[n - 1]
    p.S = cnp.PyArray_DIM(k, n - 2)
    p.Dv = cnp.PyArray_DIM(v, n - 1)
    if (p.Hkv == 0 or p.H % p.Hkv or cnp.PyArray_DIM(k, n - 1) != p.D or cnp.PyArray_DIM(v, n - 2) != p.S
            or (n > 2 and cnp.PyArray_DIM(v, n - 3) != p.Hkv)):
        return None
    if scale is None:
        p.scale = 1/sqrt(<double>p.D) if p.D > 0 else 1.0      # sqrt, as checks.py: pow may differ in the last bit
    elif type(scale) is float and -1e30 < <double>scale < 1e30:
        p.scale = scale
    else:
        return None
    if num_threads is None:
        i = 0
    elif type(num_threads) is int and 1 <= num_threads < 1024:
        i = num_threads
    else:
        return None
    if <double>p.B*p.H*p.L*p.Dv > 2.0**36:     # memory for the result is in doubt, and so is its size in an int64
        return None
    shape[n - 1] = p.Dv
    out = empty(n, shape, typenum)
    p.bits = 32 if typenum == cnp.NPY_FLOAT32 else 64
    p.left = FASTATTN_UNBOUNDED
    p.right = 0 if causal else FASTATTN_UNBOUNDED
    p.offset = p.S - p.L
    describe(&p.query, q, 3, p.n_lead)
    describe(&p.key, k, 3, p.n_lead)
    describe(&p.value, v, 3, p.n_lead)
    describe(&p.out, out, 3, p.n_lead)
    run(&p, i)
    return out


cdef int64_t* integers(cnp.ndarray x) noexcept:
    return NULL if x is None else <int64_t*>cnp.PyArray_DATA(x)


cdef void describe_tiles(fastattn_tiles* tiles, plan, int n_lead) except *:
    # Lists lie in the order of plan.lead, whose axes are the last ones of (*lead, H).
    cdef tuple lead = plan.lead
    cdef int n = len(lead)
    cdef int i
    cdef int64_t stride = 1
    tiles.first = <const int64_t*>cnp.PyArray_DATA(plan.first)
    tiles.block = <const int32_t*>cnp.PyArray_DATA(plan.block)
    tiles.word = <const int32_t*>cnp.PyArray_DATA(plan.word)
    tiles.words = <const uint64_t*>cnp.PyArray_DATA(plan.words)
    for i in range(n):                  # from the last axis on
        if lead[n - 1 - i] != 1:
            if i == 0:
                tiles.head = stride
            else:
                tiles.lead[n_lead - i] = stride
        stride *= lead[n - 1 - i]


cdef void describe_pools(pools, fastattn_array* key, fastattn_array* value, fastattn_array* key_scale,
                         fastattn_array* value_scale) except *:
    # of a cache: the leading stride is that of a page
    describe(key, pools.key, 3, 1)
    describe(value, pools.value, 3, 1)
    if pools.key_scale is not None:
        describe(key_scale, pools.key_scale, 2, 1)
        describe(value_scale, pools.value_scale, 2, 1)


cdef void describe_pages(fastattn_problem* p, pages) except *:
    describe_pools(pages.pools, &p.key, &p.value, &p.key_scale, &p.value_scale)
    p.page = cnp.PyArray_DIM(pages.pools.key, 2)
    p.pages = <const int32_t*>cnp.PyArray_DATA(pages.tables)
    p.page_stride = cnp.PyArray_DIM(pages.tables, 1)
    p.page_rows = integers(pages.rows)
    p.hole_begin = integers(pages.hole_begin)
    p.hole_end = integers(pages.hole_end)


cdef void describe_problem(fastattn_problem* p, problem) except *:
    # all but what a pass writes
    cdef cnp.ndarray q = problem.query
    cdef cnp.ndarray k = problem.key
    cdef cnp.ndarray v = problem.value
    cdef cnp.ndarray offsets = problem.query_offset
    cdef cnp.ndarray q_lengths = problem.query_lengths
    cdef cnp.ndarray kv_lengths = problem.kv_lengths
    cdef cnp.ndarray sinks = problem.sinks
    cdef cnp.ndarray cu_q = problem.cu_q
    cdef cnp.ndarray cu_k = problem.cu_k
    cdef int n = cnp.PyArray_NDIM(q)
    cdef cnp.ndarray w, b
    cdef int i
    memset(p, 0, sizeof(p[0]))
    p.B = 1
    p.n_lead = n - 3
    for i in range(p.n_lead):
        p.lead[i] = cnp.PyArray_DIM(q, i)
        p.B *= p.lead[i]
    p.H = cnp.PyArray_DIM(q, n - 3)
    p.L = cnp.PyArray_DIM(q, n - 2)
    p.D = cnp.PyArray_DIM(q, n - 1)
    p.Hkv = cnp.PyArray_DIM(k, n - 3)
    p.S = cnp.PyArray_DIM(k, n - 2)
    p.Dv = cnp.PyArray_DIM(v, n - 1)
    p.bits = 64 if cnp.PyArray_TYPE(q) == cnp.NPY_FLOAT64 else 32
    p.one_path = problem.one_path
    p.seed = problem.seed
    p.dropout = problem.dropout
    p.keep = problem.keep
    p.left = problem.left
    p.right = problem.right
    p.scale = problem.scale
    p.softcap = problem.softcap
    p.normalizer = problem.normalizer
    p.shift = problem.shift
    if problem.additive is not None:
        p.score = FASTATTN_ADDITIVE
        w, b = problem.additive
        p.w = cnp.PyArray_DATA(w)
        p.w_bias = NULL if b is None else cnp.PyArray_DATA(b)
    if problem.score_mod is not None:
        p.score_mod = <fastattn_score><uintptr_t>problem.score_mod.function
        p.score_grad = <fastattn_score_grad><uintptr_t>problem.score_mod.gradient
        p.score_data = <void*><uintptr_t>problem.score_mod.data
    p.query_offset = integers(offsets)
    p.query_lengths = integers(q_lengths)
    p.kv_lengths = integers(kv_lengths)
    if sinks is not None:
        p.sinks = cnp.PyArray_DATA(sinks)
    describe(&p.query, q, 3, p.n_lead)
    describe(&p.key, k, 3, p.n_lead)
    describe(&p.value, v, 3, p.n_lead)
    describe(&p.out, problem.out, 3, p.n_lead)
    if problem.lse is not None:
        describe(&p.lse, problem.lse, 2, p.n_lead)
    if problem.bias is not None:
        describe(&p.bias, problem.bias, 3, p.n_lead)
    if problem.mask is not None:
        describe(&p.mask, problem.mask, 3, p.n_lead)
    if problem.bias_index is not None:
        p.bias_rows, p.bias_cols = integers(problem.bias_index[0]), integers(problem.bias_index[1])
    if problem.plan is not None:
        describe_tiles(&p.tiles, problem.plan, p.n_lead)
    if problem.pages is not None:
        describe_pages(p, problem.pages)
    if cu_q is not None:
        p.cu_q = integers(cu_q)
        p.cu_k = integers(cu_k)
        p.L = problem.L
        p.S = problem.S


def forward(problem):
    """Fill problem.out and problem.lse (see checks.Problem)."""
    cdef fastattn_problem p
    describe_problem(&p, problem)
    if problem.reduce:
        p.reduce = problem.reduce
        p.k = problem.k
        p.chunks = problem.chunks
        p.rows = integers(problem.rows)
        p.L = problem.L
        describe(&p.result, problem.weights, 3, p.n_lead)
        if problem.indices is not None:
            describe(&p.indices, problem.indices, 3, p.n_lead)
    # Pairs: the products read rows of words, and the scale's sign and size stay out of Q.
    if (kernel_pairs != NULL and p.query.kind == FASTATTN_BF16 and p.key.kind == FASTATTN_BF16
            and p.value.kind == FASTATTN_BF16 and p.D % 2 == 0 and 1e-30 < p.scale < 1e30 and not p.reduce
            and p.dropout == 0 and p.normalizer == FASTATTN_SOFTMAX and p.score == FASTATTN_DOT and p.score_mod == NULL):
        p.bits = 16
    run(&p, 0 if problem.num_threads is None else problem.num_threads)


def backward(problem):
    """Fill the gradients of problem (see checks.Problem)."""
    cdef fastattn_problem p
    cdef int n_threads = 0 if problem.num_threads is None else problem.num_threads
    describe_problem(&p, problem)
    if problem.means is not None:
        describe(&p.out, problem.means, 3, p.n_lead)
        p.reduce = FASTATTN_MEAN
        run(&p, n_threads)
    p.reduce = FASTATTN_GRADIENT
    p.in_turn = problem.in_turn
    p.fresh = problem.fresh
    p.parts = problem.parts
    describe(&p.grad_out, problem.grad_out, 3, p.n_lead)
    if problem.grad_lse is not None:
        describe(&p.grad_lse, problem.grad_lse, 2, p.n_lead)
    describe(&p.grad_query, problem.grad_query, 3, p.n_lead)
    describe(&p.grad_key, problem.grad_key, 3, p.n_lead)
    describe(&p.grad_value, problem.grad_value, 3, p.n_lead)
    describe(&p.delta, problem.delta, 2, p.n_lead)
    if problem.grad_w is not None:
        p.grad_w = cnp.PyArray_DATA(problem.grad_w)
    if problem.row_grad is not None:
        describe(&p.row_grad, problem.row_grad, 2, p.n_lead)
    if problem.grad_index is not None:      # (parts, *lead, H, 1, n)
        p.grad_rows, p.grad_cols = integers(problem.grad_index[0]), integers(problem.grad_index[1])
        describe(&p.grad_bias, problem.grad_bias[0], 3, p.n_lead)
        p.grad_bias.row = cnp.PyArray_STRIDE(problem.grad_bias, 0)//cnp.PyArray_ITEMSIZE(problem.grad_bias)
    elif problem.grad_bias is not None:
        describe(&p.grad_bias, problem.grad_bias, 3, p.n_lead)
    run(&p, n_threads)


cdef void describe_nodes(fastattn_array* a, cnp.ndarray x, int tail) noexcept:
    # (n, H, columns), or (n, H) with tail = 2
    if x is not None:
        describe(a, x.swapaxes(0, 1), tail, 0)


def graph(call):
    """Fill the results of a problem on a graph (see graph.Problem)."""
    cdef fastattn_graph p
    cdef const fastattn_kernel* kernel
    cdef double flops
    cdef int n_threads = 0 if call.num_threads is None else call.num_threads
    memset(&p, 0, sizeof(p))
    p.mode, p.score, p.normalizer = call.mode, call.score, call.normalizer
    p.n_rows, p.n_edges, p.n_tasks = len(call.begin), len(call.source), len(call.cuts) - 1
    p.H, p.Hkv, p.D, p.Dv = call.H, call.Hkv, call.D, call.Dv
    describe_nodes(&p.query, call.query, 3)
    describe_nodes(&p.key, call.key, 3)
    describe_nodes(&p.value, call.value, 3)
    describe_nodes(&p.out, call.out, 3)
    describe_nodes(&p.edge_key, call.edge_key, 3)
    describe_nodes(&p.edge_value, call.edge_value, 3)
    describe_nodes(&p.edge_bias, call.edge_bias, 2)
    describe_nodes(&p.lse, call.lse, 2)
    describe_nodes(&p.delta, call.delta, 2)
    describe_nodes(&p.grad_out, call.grad_out, 3)
    describe_nodes(&p.grad_query, call.grad_query, 3)
    describe_nodes(&p.w, call.w, 3)
    p.begin, p.end, p.rows = integers(call.begin), integers(call.end), integers(call.rows)
    p.order, p.cuts = integers(call.order), integers(call.cuts)
    p.source = cnp.PyArray_DATA(call.source)
    p.wide = cnp.PyArray_ITEMSIZE(call.source) == 8
    p.sinks = NULL if call.sinks is None else cnp.PyArray_DATA(call.sinks)
    p.weights = NULL if call.weights is None else cnp.PyArray_DATA(call.weights)
    p.grad_scores = NULL if call.grad_scores is None else cnp.PyArray_DATA(call.grad_scores)
    p.grad_bias = NULL if call.grad_bias is None else cnp.PyArray_DATA(call.grad_bias)
    p.grad_w = NULL if call.grad_w is None else cnp.PyArray_DATA(call.grad_w)
    p.longest = call.longest
    p.counts = NULL if call.counts is None else <const double*>cnp.PyArray_DATA(call.counts)
    p.pairs = NULL if call.pairs is None else <double*>cnp.PyArray_DATA(call.pairs)
    p.first_score = integers(call.first_score)
    if call.scores is not None:
        p.scores = cnp.PyArray_DATA(call.scores)
        p.n_scores = cnp.PyArray_DIM(call.scores, 1)
    p.scale, p.softcap, p.slope, p.keep, p.offset = call.scale, call.softcap, call.slope, call.keep, call.offset
    p.seed, p.dropout = call.seed, call.dropout
    if p.n_tasks == 0 or p.H == 0:
        return
    flops = 2.0*p.H*(p.n_edges + p.n_rows)*(p.D + p.Dv + 32)
    kernel = kernel_of(call.bits)
    perform_each(kernel, <Each>kernel.graph, &p, p.n_tasks, kernel.graph_scratch(&p), threads_for(n_threads, flops), flops)


def linear(call):
    """Fill the results of linear attention (see linear_attention.Call)."""
    cdef fastattn_linear p
    cdef const fastattn_kernel* kernel = kernel_of(call.bits)
    cdef double flops
    cdef int64_t heads, sources, lanes, n_tasks
    cdef size_t size
    cdef int n_threads = 0 if call.num_threads is None else call.num_threads
    cdef int i
    cdef cnp.npy_intp shape[3]
    cdef cnp.ndarray q = call.query
    cdef cnp.ndarray sums
    memset(&p, 0, sizeof(p))
    p.mode, p.map, p.causal, p.half = call.mode, call.map, call.causal, call.half
    p.B = 1
    p.n_lead = cnp.PyArray_NDIM(q) - 3
    for i in range(p.n_lead):
        p.lead[i] = cnp.PyArray_DIM(q, i)
        p.B *= p.lead[i]
    p.H, p.Hkv, p.L, p.S, p.D, p.Dv, p.F = call.H, call.Hkv, call.L, call.S, call.D, call.Dv, call.F
    p.wide = (p.Dv + 16)//16*16
    describe(&p.query, q, 3, p.n_lead)
    describe(&p.key, call.key, 3, p.n_lead)
    describe(&p.value, call.value, 3, p.n_lead)
    describe(&p.out, call.out, 3, p.n_lead)
    if call.normalizer is not None:
        describe(&p.normalizer, call.normalizer, 2, p.n_lead)
    if p.mode != FASTATTN_LINEAR_OUTPUT:
        describe(&p.grad_out, call.grad_out, 3, p.n_lead)
        describe(&p.grad_query, call.grad_query, 3, p.n_lead)
        describe(&p.grad_key, call.grad_key, 3, p.n_lead)
        describe(&p.grad_value, call.grad_value, 3, p.n_lead)
    p.projection = NULL if call.projection is None else cnp.PyArray_DATA(call.projection)
    p.shift = NULL if call.shift is None else cnp.PyArray_DATA(call.shift)
    p.begin = NULL if call.begin is None else cnp.PyArray_DATA(call.begin)
    p.end = NULL if call.end is None else cnp.PyArray_DATA(call.end)
    p.kv_lengths = integers(call.kv_lengths)
    heads = p.B*p.Hkv
    if heads == 0:
        return
    sources = p.L if p.mode == FASTATTN_LINEAR_KEY else p.S
    p.segments = (sources + FASTATTN_LINEAR_SEGMENT - 1)//FASTATTN_LINEAR_SEGMENT
    lanes = p.S if p.mode == FASTATTN_LINEAR_KEY else p.L
    p.row_segments = (lanes + FASTATTN_LINEAR_SEGMENT - 1)//FASTATTN_LINEAR_SEGMENT
    flops = 4.0*p.F*(p.Dv + 1)*p.B*(p.H*p.L + p.Hkv*p.S)*(1 if p.mode == FASTATTN_LINEAR_OUTPUT else 2)
    n_threads = threads_for(n_threads, flops)
    size = kernel.linear_scratch(&p)
    # One walk where heads keep all threads busy: the same bits, a product less.
    if p.causal and (heads % n_threads == 0 or heads >= 4*n_threads):
        phases = (FASTATTN_LINEAR_WALK,)
    else:
        phases = (FASTATTN_LINEAR_SUMS, FASTATTN_LINEAR_PREFIX, FASTATTN_LINEAR_ROWS)
        shape[0], shape[1], shape[2] = heads*(p.segments + 1), p.F, p.wide
        sums = empty(3, shape, cnp.NPY_FLOAT64 if call.bits == 64 else cnp.NPY_FLOAT32)
        p.sums = cnp.PyArray_DATA(sums)
    for phase in phases:
        p.phase = phase
        n_tasks = heads
        if phase == FASTATTN_LINEAR_SUMS:
            n_tasks *= p.segments
        elif phase == FASTATTN_LINEAR_ROWS:
            n_tasks *= p.row_segments
        if n_tasks > 0:
            perform_each(kernel, <Each>kernel.linear, &p, n_tasks, size, n_threads, flops)


def pack(cnp.ndarray weight, cnp.ndarray panels, int bits):
    """Fill panels of a linear layer from weight (N, K): see layer.PackedWeight."""
    cdef fastattn_array a
    cdef const fastattn_kernel* kernel = kernel_of(bits)
    cdef int64_t K = cnp.PyArray_DIM(weight, 1)
    cdef size_t size = max(<int64_t>1, K)*kernel.lanes*8
    cdef void* memory = take(&size)
    cdef int64_t N = cnp.PyArray_DIM(weight, 0)
    cdef int kind = kind_of(panels)
    cdef void* to = cnp.PyArray_DATA(panels)
    if memory == NULL:
        raise MemoryError(f"fastattn needs {size} bytes of scratch")
    describe(&a, weight, 3, 0)
    with nogil:
        kernel.pack(&a, N, K, kind, to, memory)
    give_back(memory, size)


def layer(cnp.ndarray x, cnp.ndarray panels, cnp.ndarray bias, int activation, cnp.ndarray out, int bits, int n_threads):
    """out (M, N) = activation(x (M, K) W^T + bias), W as packed panels; the arguments are those of layer.linear."""
    cdef fastattn_layer p
    memset(&p, 0, sizeof(p))
    p.M, p.K, p.N = cnp.PyArray_DIM(x, 0), cnp.PyArray_DIM(x, 1), cnp.PyArray_DIM(out, 1)
    describe(&p.x, x, 3, 0)
    describe(&p.out, out, 3, 0)
    run_layer(&p, panels, bias, activation, bits, n_threads)


cdef int run_layer(fastattn_layer* p, cnp.ndarray panels, cnp.ndarray bias, int activation, int bits, int n_threads) except -1:
    # p has x and out
    cdef const fastattn_kernel* kernel = kernel_of(bits)
    cdef int64_t n_tasks
    cdef double flops = 2.0*max(p.M, <int64_t>8)*p.N*p.K      # fewer rows take as long: they wait for the weight
    if p.M*p.N == 0:
        return 0
    p.panels = cnp.PyArray_DATA(panels)
    p.kind = kind_of(panels)
    p.bias = NULL if bias is None else cnp.PyArray_DATA(bias)
    p.activation = activation
    n_threads = threads_for(n_threads, flops)
    n_tasks = kernel.layer_tasks(p, n_threads)
    return perform_each(kernel, <Each>kernel.layer, p, n_tasks, kernel.layer_scratch(p), n_threads, flops)


def plain_layer(x, cnp.ndarray panels, int64_t N, int64_t K, bias, int activation, int bits):
    """The layer's result for an array x (..., K) of reals that lies row after row, bias alike; None for others."""
    cdef cnp.ndarray a, b, out
    cdef cnp.npy_intp shape[64]
    cdef fastattn_layer p
    cdef int typenum = cnp.NPY_FLOAT64 if bits == 64 else cnp.NPY_FLOAT32
    cdef int i, n
    if type(x) is not cnp.ndarray or not (bias is None or type(bias) is cnp.ndarray):
        return None
    a = x
    b = bias
    n = cnp.PyArray_NDIM(a)
    if (n < 2 or n > 60 or K == 0 or not simple(a, typenum) or not cnp.PyArray_IS_C_CONTIGUOUS(a)
            or cnp.PyArray_DIM(a, n - 1) != K):
        return None
    if b is not None and (cnp.PyArray_NDIM(b) != 1 or cnp.PyArray_DIM(b, 0) != N or not simple(b, typenum)
                          or not cnp.PyArray_IS_C_CONTIGUOUS(b)):
        return None
    memset(&p, 0, sizeof(p))
    p.M, p.K, p.N = cnp.PyArray_SIZE(a)//K, K, N
    if <double>p.M*N > 2.0**36:
        return None
    for i in range(n - 1):
        shape[i] = cnp.PyArray_DIM(a, i)
    shape[n - 1] = N
    out = empty(n, shape, typenum)
    p.x.data, p.x.kind, p.x.row, p.x.col = cnp.PyArray_DATA(a), FASTATTN_REAL, K, 1
    p.out.data, p.out.kind, p.out.row, p.out.col = cnp.PyArray_DATA(out), FASTATTN_REAL, N, 1
    run_layer(&p, panels, b, activation, bits, 0)
    return out


def norm(cnp.ndarray x, cnp.ndarray add, cnp.ndarray total, cnp.ndarray weight, cnp.ndarray bias, double eps, bint centre,
         cnp.ndarray out, int n_threads):
    """out (M, N) = rows of x + add normalised, and total = x + add; the arguments are those of layer.normalise."""
    cdef fastattn_norm p
    cdef const fastattn_kernel* kernel = kernel_of(64 if cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT64 else 32)
    cdef int64_t n_tasks
    cdef double flops
    memset(&p, 0, sizeof(p))
    p.M, p.N = cnp.PyArray_DIM(x, 0), cnp.PyArray_DIM(x, 1)
    if p.M*p.N == 0:
        return
    describe(&p.x, x, 3, 0)
    describe(&p.out, out, 3, 0)
    if add is not None:
        describe(&p.add, add, 3, 0)
    if total is not None:
        describe(&p.sum, total, 3, 0)
    p.weight = NULL if weight is None else cnp.PyArray_DATA(weight)
    p.bias = NULL if bias is None else cnp.PyArray_DATA(bias)
    p.eps = eps
    p.centre = centre
    flops = 32.0*p.M*p.N        # as long as so many of a product
    n_tasks = (p.M + FASTATTN_NORM_ROWS - 1)//FASTATTN_NORM_ROWS
    perform_each(kernel, <Each>kernel.norm, &p, n_tasks, kernel.norm_scratch(&p), threads_for(n_threads, flops), flops)


def lanes(int bits):
    """Outputs of a panel."""
    if kernel_of(bits) == NULL:
        raise ValueError(f"there is no kernel for {bits} bits")
    return kernel_of(bits).lanes


def store(pools, cnp.ndarray slots, cnp.ndarray counts, cnp.ndarray begin, cnp.ndarray key, cnp.ndarray value, rotary):
    """Write tokens into the pages of a cache; the arguments are those of cache._write, which has checked them."""
    cdef fastattn_tokens t
    cdef size_t size
    cdef void* memory
    memset(&t, 0, sizeof(t))
    t.B = cnp.PyArray_DIM(key, 0)
    t.H = cnp.PyArray_DIM(key, 1)
    t.L = cnp.PyArray_DIM(key, 2)
    t.D = cnp.PyArray_DIM(key, 3)
    t.Dv = cnp.PyArray_DIM(value, 3)
    describe(&t.key, key, 3, 1)
    describe(&t.value, value, 3, 1)
    describe_pools(pools, &t.key_pool, &t.value_pool, &t.key_scale, &t.value_scale)
    t.page = cnp.PyArray_DIM(pools.key, 2)
    t.slots = integers(slots)
    t.counts = integers(counts)
    t.first = integers(begin)
    if rotary is not None:
        t.cos = <const float*>cnp.PyArray_DATA(rotary.cos)
        t.sin = <const float*>cnp.PyArray_DATA(rotary.sin)
        t.pairs = cnp.PyArray_DIM(rotary.cos, 1)
        t.interleaved = rotary.interleaved
    size = (max(t.D, t.Dv) + 64)*sizeof(float)
    memory = take(&size)
    if memory == NULL:
        raise MemoryError(f"fastattn needs {size} bytes of scratch")
    with nogil:
        kernel_f32.store(&t, memory)
    give_back(memory, size)


# --- what tests and the bench ask ------------------------------------------------------------------------------------

def evaluate(str function, cnp.ndarray x):
    """The bound kernel's "exp2" or "tanh" of a contiguous float32 or float64 array."""
    cdef cnp.ndarray y = cnp.PyArray_NewCopy(x, cnp.NPY_CORDER)
    cdef const fastattn_kernel* kernel = kernel_f32 if cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT32 else kernel_f64
    if kernel == NULL:
        raise RuntimeError("no compiled kernel is bound")
    if function == "exp2":
        kernel.exp2(cnp.PyArray_DATA(y), cnp.PyArray_DATA(y), cnp.PyArray_SIZE(y))
    else:
        kernel.tanh(cnp.PyArray_DATA(y), cnp.PyArray_DATA(y), cnp.PyArray_SIZE(y))
    return y


def scratch_bytes(int64_t D, int64_t Dv, int bits=32):
    """Scratch a thread needs for unit-stride and for strided keys and values, in bytes."""
    cdef fastattn_problem p
    memset(&p, 0, sizeof(p))
    p.D = D
    p.Dv = Dv
    p.key.col = 1
    p.value.col = 1
    p.Hkv = p.H = p.together = 1
    a = (kernel_f32 if bits == 32 else kernel_f64).scratch(&p)
    p.key.col = 2
    p.value.col = 2
    return a, (kernel_f32 if bits == 32 else kernel_f64).scratch(&p)


cdef double time_peak(const fastattn_kernel* kernel, int64_t rounds, int n_threads) noexcept nogil:
    cdef int _i
    cdef double flops = 0
    cdef double start
    cdef fastattn_place place
    fastattn_caller(&place)
    start = fastattn_clock()
    with parallel(num_threads=n_threads):
        fastattn_keep_off(&place)
        for _i in prange(n_threads, schedule="static", chunksize=1):
            flops += kernel.peak(rounds)
    return flops/(fastattn_clock() - start)*1e-9


def measure_peak(str dtype="float32", int n_threads=1):
    """GFLOP/s of FMAs, or of products of bfloat16 pairs, that never leave the registers: the bound kernel's vectors, this
    moment's clock; 0 where there are none."""
    cdef const fastattn_kernel* kernel = kernel_of(64 if dtype == "float64" else 16 if dtype == "bfloat16" else 32)
    cdef double best
    if kernel == NULL:          # no products of pairs
        return 0.0
    with nogil:
        best = time_peak(kernel, 400000, n_threads)
    return best


cdef double read_chunks(const char* data, int64_t n, int n_threads) noexcept nogil:
    cdef int64_t chunk = 1 << 20
    cdef int64_t i
    cdef double sink = 0
    cdef fastattn_place place
    fastattn_caller(&place)
    with parallel(num_threads=n_threads):
        fastattn_keep_off(&place)
        for i in prange((n + chunk - 1)//chunk, schedule="dynamic", chunksize=1):
            sink += kernel_f32.read(data + i*chunk, min(chunk, n - i*chunk))
    return sink


def read_once(cnp.ndarray x, int n_threads=1):
    """Load every byte of a contiguous array with the bound kernel's vectors, on n threads: the limit of decoding."""
    cdef const char* data = <const char*>cnp.PyArray_DATA(x)
    cdef int64_t n = cnp.PyArray_NBYTES(x)
    cdef double sink
    with nogil:
        sink = read_chunks(data, n, n_threads)
    return sink
