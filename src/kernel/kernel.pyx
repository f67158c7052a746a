# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The hot loops, compiled once per (instruction set, precision).

Walk: dispatch.pyx calls `run` once a task  →  this file (one task)  →  block.pxi (one block of keys)  →  softmax.pxi and
products.pxi (the loops)  →  simd.h (vectors). Beside them task.pxi (who sees what), logits.pxi (options), pack.pxi (moves).

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

cdef enum:
    # Keys of a block: P (96 x 256 bytes) and the block of V share a 48 KiB first-level cache at D = 64, and a sum of 96
    # products before it joins the running sum keeps the rounding error at that of pairwise schemes (docs/accuracy.md).
    BLOCK = 96
    HEADROOM = 10           # a maximum may exceed the reference of the exponential by this power of two
    CHAINS = 8              # interleaved sums of a block's weights; BLOCK is even, so pairs of keys do not straddle blocks
    WASTE = 24              # vector x key products a wider segment may waste: narrow ones run at 0.8 of the speed
    COPIED = 24             # columns of values that are copied at once where they cannot be read in place: whole tiles
    POLL_EVERY = 8          # blocks of keys between two looks at `stop`

include "products.pxi"
include "pack.pxi"
include "softmax.pxi"
include "logits.pxi"
include "task.pxi"
include "block.pxi"


cdef double finish_row(Task* t, Py_ssize_t i) noexcept nogil:
    # The row's log-sum-exp; its factor in t.c where that is not 1/l. A sink is one more logit, without a value. A row without
    # a visible key is zero and has its sink's logit, or -inf.
    cdef const fastattn_problem* p = t.p
    cdef double m = t.m[i]*(t.kappa*0.69314718055994530942)       # in nats; the product of constants first: it is near scale
    cdef double l = t.l[i]
    cdef double sink = -INFINITY
    cdef double top
    cdef int64_t j
    if p.sinks != NULL:
        sink = (<const real*>p.sinks)[t.h]
    if l == 0:
        # Nothing is visible, or all visible scores are -inf, which came from infinite inputs: softmax of them is NaN.
        j = t.lo[i]
        while j < t.hi[i] and not visible(t, i, j):
            j += 1
        if j == t.hi[i] or sink - sink == 0:
            return sink
        l = NAN
        t.c[i] = NAN
    if sink == -INFINITY:
        return m + log(l)
    top = m if m > sink else sink
    l = l*exp(m - top) + exp(sink - top)
    t.c[i] = <real>(exp(m - top)/l)
    return top + log(l)


cdef void finish(Task* t, real* out, real* lse) noexcept nogil:
    # out = Ot / l
    cdef Py_ssize_t i
    cdef double row_lse
    for i in range(t.vectors*VL):
        t.c[i] = 1/t.l[i] if t.l[i] != 0 else <real>0
    for i in range(t.n_queries):
        if t.l[i] == 0 or t.p.sinks != NULL or lse != NULL:
            row_lse = finish_row(t, i)
            if lse != NULL:
                lse[i*t.p.lse.row] = <real>row_lse
    write_out(t.Ot, t.c, t.n_queries, t.vectors, t.p.Dv, out, t.p.out.row, t.p.out.col)


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
                                 + (BLOCK*LANES if p.bias.data != NULL else 0)
                                 + BLOCK*COPIED)


cdef bint walk(Task* t, bint caller) noexcept nogil:
    # All blocks of keys; False if the call was abandoned.
    cdef const fastattn_problem* p = t.p
    cdef int64_t block = t.k_begin - t.k_begin % BLOCK
    cdef int count = 0
    cdef Py_ssize_t i
    cdef int a
    t.settled = True
    t.cut = False
    memset(t.Ot, 0, p.Dv*LANES*sizeof(real))
    for i in range(LANES):
        t.m[i] = -INFINITY
        t.l[i] = 0
    t.later.n = 0
    expect_masks(t, block, min(t.k_end, block + BLOCK))
    for a in range(t.later.n):
        for i in range(t.later.rows[a].left):
            v_fetch_later(t.later.rows[a].at + i*t.later.rows[a].row, t.later.rows[a].size)
    while block < t.k_end:
        key_block(t, block, min(t.k_end, block + BLOCK))
        block += BLOCK
        count += 1
        if count % POLL_EVERY == 0 and p.stop != NULL:
            if caller and p.poll != NULL:
                p.poll(p.poll_data)
            if p.stop[0]:
                return False
    return True


cdef int64_t blocks(int64_t L, int64_t heads, int64_t threads) noexcept nogil:
    # Blocks of queries a head: as few as LANES allows, of equal width; more where that would leave threads idle. The bits
    # of a row do not depend on its block, so this may depend on the number of threads.
    cdef int64_t n_vectors = (L + VL - 1) // VL
    cdef int64_t best = (n_vectors + BLOCK_VECTORS - 1) // BLOCK_VECTORS
    cdef int64_t n, cost, least
    if threads > 1 and heads*best < 4*threads:
        least = INT64_MAX
        for n in range(best, min(n_vectors, 4*best) + 1):
            cost = (heads*n + threads - 1) // threads*((n_vectors + n - 1) // n)
            if cost < least:
                least = cost
                best = n
    return best


cdef int64_t tasks(const fastattn_problem* p, int64_t threads) noexcept nogil:
    return p.B*p.H*blocks(p.L, p.B*p.H, threads)


cdef struct Place:
    int64_t b, h, q_begin, q_end


cdef void locate(const fastattn_problem* p, int64_t n_tasks, int64_t task, Place* place) noexcept nogil:
    # Which rows of which head: vectors [n q / N, n (q + 1) / N) of its n vectors. The last rows see most when causal:
    # longest first. Else in the order of memory: a window moves on over keys that are still in the cache.
    cdef int64_t n_blocks = n_tasks // (p.B*p.H)
    cdef int64_t n_vectors = (p.L + VL - 1) // VL
    cdef int64_t q_block = task % n_blocks
    if p.left >= p.S and p.right < p.S:
        q_block = n_blocks - 1 - q_block
    place.b = task // n_blocks // p.H
    place.h = task // n_blocks % p.H
    place.q_begin = n_vectors*q_block // n_blocks*VL
    place.q_end = min(p.L, n_vectors*(q_block + 1) // n_blocks*VL)


cdef void expect_task(Task* t, int64_t n_tasks, int64_t task) noexcept nogil:
    # What the next task reads and this one does not: its queries; the keys and values behind the window, or of another head.
    cdef const fastattn_problem* p = t.p
    cdef Ahead* later = &t.later
    cdef Place place
    cdef int64_t first = t.k_end if p.left < p.S else p.S
    cdef int64_t h_kv, n
    later.at = 0
    later.n_next = 0
    if p.out.col == 1:
        expect(&later.next[0], <const real*>p.out.data + offset(p, &p.out, t.b, t.h) + t.q_begin*p.out.row,
               p.out.row*sizeof(real), t.n_queries, p.Dv*sizeof(real))
        later.n_next = 1
    if task >= n_tasks:
        return
    locate(p, n_tasks, task, &place)
    h_kv = place.h // (p.H // p.Hkv)
    if place.b != t.b or h_kv != t.h // (p.H // p.Hkv):
        first = 0
    n = max(<int64_t>0, min(p.S - first, <int64_t>LANES))
    if p.query.col == 1:
        expect(&later.next[later.n_next], <const real*>p.query.data + offset(p, &p.query, place.b, place.h)
               + place.q_begin*p.query.row, p.query.row*sizeof(real), place.q_end - place.q_begin, p.D*sizeof(real))
        later.n_next += 1
    if p.key.col == 1 and n > 0:
        expect(&later.next[later.n_next], <const real*>p.key.data + offset(p, &p.key, place.b, h_kv) + first*p.key.row,
               p.key.row*sizeof(real), n, p.D*sizeof(real))
        later.n_next += 1
    if p.value.col == 1 and n > 0 and not t.cold:
        expect(&later.next[later.n_next], <const real*>p.value.data + offset(p, &p.value, place.b, h_kv) + first*p.value.row,
               p.value.row*sizeof(real), n, p.Dv*sizeof(real))
        later.n_next += 1


cdef void run(const fastattn_problem* p, int64_t n_tasks, int64_t task, int32_t caller, void* memory) noexcept nogil:
    cdef Task t
    cdef Place place
    cdef int64_t n_keys = p.S
    cdef int64_t rows, h_kv
    cdef double kappa
    cdef real sign = 1
    cdef real* out
    cdef real* lse = NULL
    locate(p, n_tasks, task, &place)
    t.p = p
    t.b = place.b
    t.h = place.h
    t.q_begin = place.q_begin
    rows = place.q_end - place.q_begin
    out = <real*>p.out.data + offset(p, &p.out, t.b, t.h) + t.q_begin*p.out.row
    if p.lse.data != NULL:
        lse = <real*>p.lse.data + offset(p, &p.lse, t.b, t.h) + t.q_begin*p.lse.row
    t.n_queries = rows
    if p.query_lengths != NULL:
        t.n_queries = max(<int64_t>0, min(rows, p.query_lengths[t.b] - t.q_begin))
        empty_rows(p, rows - t.n_queries, out + t.n_queries*p.out.row, lse + t.n_queries*p.lse.row if lse != NULL else NULL)
        if t.n_queries == 0:
            return
    t.vectors = <int>((t.n_queries + VL - 1) // VL)
    t.lanes = ~<uint64_t>0 >> (64 - t.vectors*VL)
    if p.kv_lengths != NULL:
        n_keys = p.kv_lengths[t.b]
    intervals(&t, n_keys)

    # Where things are.
    h_kv = t.h // (p.H // p.Hkv)
    t.q = <const real*>p.query.data + offset(p, &p.query, t.b, t.h)
    t.k = <const real*>p.key.data + offset(p, &p.key, t.b, h_kv)
    t.v = <const real*>p.value.data + offset(p, &p.value, t.b, h_kv)
    t.bias = NULL
    t.mask = NULL
    if p.bias.data != NULL:
        t.bias = <const real*>p.bias.data + offset(p, &p.bias, t.b, t.h)
    if p.mask.data != NULL:
        t.mask = <const uint8_t*>p.mask.data + offset(p, &p.mask, t.b, t.h)
    t.Qt = <real*>memory
    t.S = t.Qt + aligned(p.D*LANES)
    t.Ot = t.S + BLOCK*LANES
    t.m = t.Ot + aligned(p.Dv*LANES)
    t.l = t.m + LANES
    t.c = t.l + LANES
    t.before = t.c + LANES
    t.base = t.before + LANES
    t.total = t.base + LANES
    t.copied = t.total + CHAINS*LANES
    t.packed_k = t.copied + BLOCK*COPIED
    t.bias_tile = t.packed_k + aligned(BLOCK*p.D if p.key.col != 1 else 0)

    # The scale joins the exponent. Its sign goes into Q, exactly, so that the largest score has the largest exponent; where a
    # softcap or a bias makes logits of the scores, they apply it and the exponent keeps log2 e.
    kappa = 1.4426950408889634
    if p.softcap == 0 and t.bias == NULL:
        sign = -1 if p.scale < 0 else 1
        kappa *= 0.25*p.scale*sign
        if kappa > 0.25*REAL_MAX:           # past the largest number: a power of two goes into Q as well
            sign *= 4
        else:
            kappa *= 4
        if <real>kappa == 0:
            kappa = 1
            sign = 0
    t.kappa = <real>kappa
    t.cold = n_tasks <= 4*p.B*p.H
    expect_task(&t, n_tasks, task + 1)

    pack_queries(t.q + t.q_begin*p.query.row, p.query.row, p.query.col, t.n_queries, t.vectors, p.D, sign, t.Qt)
    t.careful = False
    if not walk(&t, caller):
        return
    if t.cut and not all_finite(t.Ot, LANES, p.Dv, t.vectors*VL):
        # 0 · NaN or 0 · Inf of a value may have reached lanes that do not see its key
        t.careful = True
        if not walk(&t, caller):
            return
    finish(&t, out, lse)


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
