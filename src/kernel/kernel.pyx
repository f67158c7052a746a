# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The hot loops, compiled once per (instruction set, precision).

Walk: dispatch.pyx calls `run` once a task  →  this file (one task)  →  block.pxi (one block of keys)  →  softmax.pxi and
products.pxi (the loops)  →  simd.h (vectors). Beside them tasks.pxi (which rows a task has), task.pxi (who sees what),
logits.pxi (options), pack.pxi (moves), weights.pxi (the weights themselves).

One task is (batch, head, block of queries); queries live in vector lanes. Memory of a task, reused for every task of a thread:

    Qt [D][LANES]      the block of queries, transposed once
    S  [BLOCK][LANES]  scores of a block of keys, then their weights: written and read by every stage below
    Ot [Dv][LANES]     the running output, transposed, unnormalised
    m, l, c [LANES]    reference of the exponential, running sum, and the factor of the last rescaling

For each block of keys, at fixed multiples of BLOCK so that a row's sums do not depend on where its block of queries starts:

    S = K Qt  →  softcap, bias, masks  →  P = 2^((S - m) κ)  →  Ot = Ot c + Vt P

Glossary: B H Hkv L S D Dv as in fastattn.h; q k v o lse; m maximum, l sum; lo/hi: lane i sees keys lo <= j < hi.
"""
include "simd.pxi"

from cpython.pycapsule cimport PyCapsule_New
from libc.string cimport memcpy, memset

include "abi.pxi"

cdef extern from *:
    # Keys of a block: P (96 x 256 bytes) and the block of V share a 48 KiB first-level cache at D = 64, and a sum of 96
    # products before it joins the running sum keeps the rounding error at that of pairwise schemes (docs/accuracy.md).
    enum: BLOCK "FASTATTN_TILE_KEYS"

cdef enum:
    PAIRS = 48              # of keys in a block
    HEADROOM = 10           # a maximum may exceed the reference of the exponential by this power of two
    CHAINS = 8              # interleaved sums of a block's weights; BLOCK is even, so pairs of keys do not straddle blocks
    WASTE = 24              # vector x key products a wider segment may waste: narrow ones run at 0.8 of the speed
    COPIED = 24             # columns of values that are copied at once where they cannot be read in place: whole tiles
    NARROW = 3              # pairs of keys between two parts of a block that are multiplied rather than skipped
    POLL_EVERY = 8          # blocks of keys between two looks at `stop`

include "products.pxi"
include "pack.pxi"
include "softmax.pxi"
include "logits.pxi"
include "task.pxi"
include "block.pxi"
include "tasks.pxi"
include "weights.pxi"


cdef double finish_row(Task* t, Py_ssize_t i) noexcept nogil:
    # The row's log-sum-exp; its factor in t.c where that is not 1/l. A sink is one more logit, without a value. A row without
    # a visible key is zero and has its sink's logit, or -inf.
    cdef const fastattn_problem* p = t.p
    cdef double m = t.m[i]*(t.kappa*0.69314718055994530942)       # in nats; the product of constants first: it is near scale
    cdef double l = t.l[i]
    cdef double sink = -INFINITY
    cdef double top
    if p.sinks != NULL:
        sink = (<const real*>p.sinks)[t.h]
    if l == 0:
        # Nothing is visible, or all visible scores are -inf, which came from infinite inputs: softmax of them is NaN.
        if sink - sink == 0 or not sees_any(t, i):
            return sink
        l = NAN
        t.c[i] = NAN
    if sink == -INFINITY:
        return m + log(l)
    top = m if m > sink else sink
    l = l*exp(m - top) + exp(sink - top)
    t.c[i] = <real>(exp(m - top)/l)
    return top + log(l)


cdef void normalise(Task* t, real* lse) noexcept nogil:
    # c = 1 / l, and the rows' log-sum-exp
    cdef Py_ssize_t i
    cdef double row_lse
    for i in range(t.vectors*VL):
        t.c[i] = 1/t.l[i] if t.l[i] != 0 else <real>0
    for i in range(t.n_queries):
        if t.l[i] == 0 or t.p.sinks != NULL or lse != NULL:
            row_lse = finish_row(t, i)
            if lse != NULL:
                lse[i*t.p.lse.row] = <real>row_lse


cdef void empty_rows(const fastattn_problem* p, Py_ssize_t n, real* out, real* lse) noexcept nogil:
    cdef Py_ssize_t i, d
    for i in range(n):
        for d in range(p.Dv):
            out[i*p.out.row + d*p.out.col] = 0
        if lse != NULL:
            lse[i*p.lse.row] = -INFINITY


cdef Py_ssize_t aligned(Py_ssize_t n) noexcept nogil:
    return (n + 15) // 16*16            # reals to whole cache lines, in either precision


cdef size_t scratch(const fastattn_problem* p) noexcept nogil:
    return sizeof(real)*<size_t>(aligned(p.D*LANES) + BLOCK*LANES + aligned(p.Dv*LANES) + (5 + CHAINS)*LANES
                                 + aligned(BLOCK*p.D if p.key.col != 1 else 0)
                                 + (BLOCK*(LANES + VL) if p.bias.data != NULL else 0)
                                 + (BLOCK*VL if p.reduce != FASTATTN_OUTPUT else 0)
                                 + BLOCK*COPIED) + <size_t>p.k*LANES*(sizeof(real) + sizeof(int64_t))


cdef bint walk(Task* t, bint caller) noexcept nogil:
    # All blocks of keys; False if the call was abandoned.
    cdef const fastattn_problem* p = t.p
    cdef int64_t block = t.k_begin - t.k_begin % BLOCK
    cdef int count = 0
    cdef bint across = t.second and (p.reduce == FASTATTN_SUM or p.reduce == FASTATTN_MAX)
    cdef Py_ssize_t i
    cdef int a
    t.tile = t.tile_begin
    if not t.second:
        t.settled = True
        t.cut = False
        t.some = 0
        memset(t.Ot, 0, p.Dv*LANES*sizeof(real))
        for i in range(LANES):
            t.m[i] = -INFINITY
            t.l[i] = 0
    t.later.n = 0
    expect_masks(t, block, min(t.k_end, block + BLOCK))
    for a in range(t.later.n):
        for i in range(t.later.rows[a].left):
            v_fetch_later(t.later.rows[a].at + i*t.later.rows[a].row, t.later.rows[a].size)
    while next_block(t, &block):
        if across:
            memset(t.across, 0, BLOCK*VL*sizeof(real))
        key_block(t, block, min(t.k_end, block + BLOCK))
        if across:
            reduce_lanes(t, block, min(t.k_end, block + BLOCK) - block)
        block += BLOCK
        count += 1
        if count % POLL_EVERY == 0 and p.stop != NULL:
            if caller and p.poll != NULL:
                p.poll(p.poll_data)
            if p.stop[0]:
                return False
    return True


cdef void run(const fastattn_problem* p, int64_t n_tasks, int64_t task, int32_t caller, void* memory) noexcept nogil:
    cdef Task t
    cdef Place place
    cdef Py_ssize_t rows
    cdef real* out
    cdef real* lse = NULL
    if p.reduce != FASTATTN_OUTPUT:
        run_weights(p, task, caller, memory)
        return
    locate(p, n_tasks, task, &place)
    rows = place.q_end - place.q_begin
    if rows <= 0:
        return
    out = <real*>p.out.data + offset(p, &p.out, place.b, place.h, p.cu_q) + place.q_begin*p.out.row
    if p.lse.data != NULL:
        lse = <real*>p.lse.data + offset(p, &p.lse, place.b, place.h, p.cu_q) + place.q_begin*p.lse.row
    if not prepare(&t, p, &place, memory):
        empty_rows(p, rows, out, lse)
        return
    empty_rows(p, rows - t.n_queries, out + t.n_queries*p.out.row, lse + t.n_queries*p.lse.row if lse != NULL else NULL)
    t.cold = n_tasks <= 4*p.B*p.H
    expect_task(&t, n_tasks, task + 1)
    if not walk(&t, caller):
        return
    if t.cut and not all_finite(t.Ot, LANES, p.Dv, t.vectors*VL):
        # 0 · NaN or 0 · Inf of a value may have reached lanes that do not see its key
        t.careful = True
        if not walk(&t, caller):
            return
    normalise(&t, lse)
    write_out(t.Ot, t.c, t.n_queries, t.vectors, p.Dv, out, p.out.row, p.out.col)


cdef void exp2_array(const void* x, void* y, int64_t n) noexcept nogil:
    cdef int64_t i = 0
    while i < n:
        v_store_part(<real*>y + i, v_exp2(v_load_part(<const real*>x + i, n - i)), n - i)
        i += VL


cdef void tanh_array(const void* x, void* y, int64_t n) noexcept nogil:
    cdef int64_t i = 0
    while i < n:
        v_store_part(<real*>y + i, v_tanh(v_load_part(<const real*>x + i, n - i)), n - i)
        i += VL


cdef double peak(int64_t rounds) noexcept nogil:
    # Twelve chains of FMAs that never leave the registers: what the units can do. Returns the operations done.
    cdef vf acc[12]
    cdef vf a = v_set1(<real>0.999)
    cdef vf b = v_set1(<real>0.001)
    cdef int64_t _i
    cdef int j
    cdef real sink[VL]
    for j in range(12):
        acc[j] = v_set1(<real>(rounds % 7) + <real>(j*0.1))     # unknown to the compiler: it folds chains it can see through
    for _i in range(rounds):
        for j in range(12):
            acc[j] = v_fma(acc[j], a, b)
    for j in range(1, 12):
        acc[0] = v_add(acc[0], acc[j])
    v_store(sink, acc[0])
    return rounds*12.0*VL*2 + (0 if sink[0] > -1 else 1)


cdef fastattn_kernel kernel
kernel.abi = FASTATTN_ABI
kernel.bits = 8*sizeof(real)
kernel.lanes = LANES
kernel.vector = VL
kernel.tasks = tasks
kernel.scratch = scratch
kernel.run = run
kernel.exp2 = exp2_array
kernel.tanh = tanh_array
kernel.peak = peak

table = PyCapsule_New(&kernel, "fastattn_kernel", NULL)
