# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The hot loops, compiled once per (instruction set, precision).

Walk: dispatch.pyx calls `run` once a task  →  this file (one task)  →  products.pxi, softmax.pxi, logits.pxi, pack.pxi
→  simd.h (vectors).

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


cdef struct Task:
    const fastattn_problem* p
    int64_t b, h
    Py_ssize_t q_begin              # first query of the block
    Py_ssize_t n_queries            # valid ones; rows past query_lengths are not
    int vectors
    # lane i sees keys lo[i] <= j < hi[i]; per vector the union [lo_min, hi_max) and the part all its lanes see
    int64_t lo[LANES]
    int64_t hi[LANES]
    int64_t lo_min[BLOCK_VECTORS]
    int64_t hi_max[BLOCK_VECTORS]
    int64_t lo_max[BLOCK_VECTORS]
    int64_t hi_min[BLOCK_VECTORS]
    const real* q
    const real* k
    const real* v
    const real* bias
    const uint8_t* mask
    real kappa                      # logits of S to exponents of 2; > 0
    bint plain                      # scores are logits as they stand: no softcap, no bias
    bint cold                       # few blocks of queries share these keys: worth fetching the values early
    bint settled                    # no maximum has outgrown its reference yet: worth fusing
    # scratch
    real* Qt
    real* S
    real* Ot
    real* m
    real* l
    real* c
    real* before                    # l as it was before the block
    real* base                      # m, or 0 where it is -inf
    real* total                     # [CHAINS][LANES] sums of the block's weights
    real* lo_rel                    # lo and hi relative to the block of keys, as numbers
    real* hi_rel
    real* packed_k
    real* copied                    # [BLOCK][COPIED] values


cdef inline int64_t offset(const fastattn_problem* p, const fastattn_array* a, int64_t b, int64_t h) noexcept nogil:
    cdef int64_t at = h*a.head
    cdef int axis
    for axis in range(p.n_lead - 1, -1, -1):
        at += b % p.lead[axis]*a.lead[axis]
        b //= p.lead[axis]
    return at


cdef bint visible(const Task* t, Py_ssize_t i, int64_t j) noexcept nogil:
    # The definition, one position at a time: for the rare paths only. i counts from the block's first query.
    cdef real x
    if j < t.lo[i] or j >= t.hi[i]:
        return False
    if t.mask != NULL and t.mask[(t.q_begin + i)*t.p.mask.row + j*t.p.mask.col] == 0:
        return False
    if t.bias != NULL:
        x = t.bias[(t.q_begin + i)*t.p.bias.row + j*t.p.bias.col]
        return not (x < -REAL_MAX)
    return True


cdef void intervals(Task* t, int64_t n_keys) noexcept nogil:
    # Causal, window and lengths are one interval a lane. Lanes past the last query repeat it, so that they never make a
    # full tile partial; an empty lane has lo = hi = 0 and drops out of the unions.
    cdef const fastattn_problem* p = t.p
    cdef int64_t at, lo, hi
    cdef int64_t first = p.query_offset[t.b] if p.query_offset != NULL else p.offset
    cdef Py_ssize_t i
    cdef int g
    for g in range(t.vectors):
        t.lo_min[g] = n_keys
        t.hi_max[g] = 0
        t.lo_max[g] = 0
        t.hi_min[g] = n_keys
    for i in range(t.vectors*VL):
        at = first + t.q_begin + min(i, t.n_queries - 1)
        lo = max(<int64_t>0, at - p.left)
        hi = min(n_keys, at + p.right + 1)
        if lo >= hi:
            lo = 0
            hi = 0
        g = i // VL
        t.lo[i] = lo
        t.hi[i] = hi
        t.lo_max[g] = max(t.lo_max[g], lo)
        t.hi_min[g] = min(t.hi_min[g], hi)
        if lo < hi:
            t.lo_min[g] = min(t.lo_min[g], lo)
            t.hi_max[g] = max(t.hi_max[g], hi)
    for g in range(t.vectors):
        if t.hi_max[g] == 0:
            t.lo_min[g] = 0


cdef void copied_values(Task* t, int first, int vectors, const real* v, int64_t begin, int64_t end,
                        bint partial) noexcept nogil:
    # Ot = Ot c + Vt P on a copy of V, a few columns at a time: for values whose last axis is not contiguous, and for blocks
    # where some lane does not see some key while a value is infinite or NaN. There 0 · NaN would reach lanes that do not see
    # it: the copy holds zeros in the place of those values, then they go one by one to the lanes that see them. Every finite
    # column keeps its bits.
    cdef const fastattn_problem* p = t.p
    cdef Py_ssize_t row = p.value.row
    cdef Py_ssize_t col = p.value.col
    cdef Py_ssize_t n = end - begin
    cdef Py_ssize_t lane = first*VL
    cdef Py_ssize_t at = begin % BLOCK*LANES
    cdef Py_ssize_t column = 0
    cdef Py_ssize_t j, d, i, width
    cdef bint poisoned
    cdef real x
    while column < p.Dv:
        width = min(<Py_ssize_t>COPIED, p.Dv - column)
        pack_rows(v + column*col, row, col, n, width, t.copied)
        poisoned = partial and not all_finite(t.copied, width, n, width)
        if poisoned:
            for i in range(n*width):
                x = t.copied[i]
                t.copied[i] = x if x - x == 0 else 0
        product_t(vectors, t.copied, width, t.S + at + lane, n, t.Ot + column*LANES + lane, width, t.c + lane)
        if poisoned:
            for j in range(n):
                for d in range(width):
                    x = v[j*row + (column + d)*col]
                    if x - x != 0:
                        for i in range(lane, min(lane + <Py_ssize_t>vectors*VL, t.n_queries)):
                            if visible(t, i, begin + j):
                                t.Ot[(column + d)*LANES + i] += x*t.S[at + j*LANES + i]
        column += COPIED


cdef inline bint finite_lanes(const real* m, int vectors) noexcept nogil:
    cdef vf x = v_zero()
    cdef int g
    for g in range(vectors):
        x = v_fma(v_load(m + g*VL), v_zero(), x)
    return not v_any_nan(x)


cdef Py_ssize_t scores(Task* t, int first, int vectors, const real* k, Py_ssize_t k_row, real* S, Py_ssize_t n,
                       bint whole, Rows later) noexcept nogil:
    # S = K Qt for n keys. A long D goes in parts: Qt of one part stays in the first-level cache, and a sum of DEPTH products
    # from zero has the smaller error. Without `whole` the last part is left to the caller; returns how much of D is done.
    cdef Py_ssize_t depth = t.p.D if t.p.D <= DEPTH_WHOLE else DEPTH
    cdef Py_ssize_t d = 0
    while t.p.D - d > depth:
        product_n(vectors, k + d, k_row, t.Qt + d*LANES + first*VL, depth, S, n, d > 0, later)
        d += depth
    if whole:
        product_n(vectors, k + d, k_row, t.Qt + d*LANES + first*VL, t.p.D - d, S, n, d > 0, later)
    return d


cdef void logits(Task* t, int first, int vectors, const real* k, Py_ssize_t k_row, int64_t begin, int64_t end, int mask,
                 bint partial, Rows later) noexcept nogil:
    # Final logits of vectors [first, first + vectors) and keys [begin, end) of one block; k points at key `begin`.
    cdef const fastattn_problem* p = t.p
    cdef Py_ssize_t lane = first*VL
    cdef Py_ssize_t n = end - begin
    cdef Py_ssize_t n_queries = t.n_queries - lane
    cdef real* S = t.S + begin % BLOCK*LANES + lane
    scores(t, first, vectors, k, k_row, S, n, True, later)
    if p.softcap > 0:
        softcap_pass(S, vectors, n, <real>p.scale, <real>p.softcap)
    if t.bias != NULL:
        bias_pass(S, vectors, n, <real>1 if p.softcap > 0 else <real>p.scale,
                  t.bias + (t.q_begin + lane)*p.bias.row + begin*p.bias.col, p.bias.row, p.bias.col, n_queries)
    if mask == 1:
        mask_pass(S, vectors, n, t.mask + (t.q_begin + lane)*p.mask.row + begin*p.mask.col, p.mask.row, p.mask.col,
                  n_queries)
    if partial:
        interval_pass(S, vectors, begin % BLOCK, n, t.lo_rel + lane, t.hi_rel + lane)


cdef void segment(Task* t, int first, int vectors, const real* k, Py_ssize_t k_row, const real* v, int64_t begin,
                  int64_t end, int mask) noexcept nogil:
    # Vectors [first, first + vectors) against keys [begin, end) of one block; k and v point at key `begin`.
    cdef const fastattn_problem* p = t.p
    cdef Py_ssize_t lane = first*VL
    cdef Py_ssize_t at = begin % BLOCK
    cdef Py_ssize_t n = end - begin
    cdef real* S = t.S + at*LANES + lane
    cdef int64_t full_lo = t.lo_max[first]
    cdef int64_t full_hi = t.hi_min[first]
    cdef Py_ssize_t d, i
    cdef Py_ssize_t whole = 0               # the first keys, which every lane sees as they are: scored and weighed at once
    cdef bint partial
    cdef Rows later
    cdef int g
    for g in range(first + 1, first + vectors):
        full_lo = max(full_lo, t.lo_max[g])
        full_hi = min(full_hi, t.hi_min[g])
    partial = full_lo > begin or full_hi < end
    later.at = v
    later.row = p.value.row
    later.n = p.Dv if t.cold and p.value.col == 1 else 0

    clear_chains(vectors, t.total + lane)
    if t.settled and finite_lanes(t.m + lane, vectors):
        if t.plain and mask == 2 and full_lo <= begin and at % 2 == 0 and full_hi > begin:
            whole = n if full_hi >= end else (full_hi - begin)//2*2
            d = scores(t, first, vectors, k, k_row, S, whole, False, later)
            fused_step(vectors, k + d, k_row, t.Qt + d*LANES + lane, p.D - d, S, d > 0, at, whole, t.kappa, t.base + lane,
                       t.total + lane, later)
        if whole < n:
            logits(t, first, vectors, k + whole*k_row, k_row, begin + whole, end, mask, partial, later)
            weigh_rows(vectors, S + whole*LANES, at + whole, n - whole, t.kappa, t.base + lane, t.total + lane)
        for i in range(lane, lane + vectors*VL):
            t.c[i] = 1
        memcpy(t.before + lane, t.l + lane, vectors*VL*sizeof(real))
        if add_sums(vectors, t.total + lane, t.c + lane, t.l + lane):
            memcpy(t.l + lane, t.before + lane, vectors*VL*sizeof(real))
            clear_chains(vectors, t.total + lane)
            t.settled = False
            whole = -1
    else:
        whole = -1
    if whole < 0:
        logits(t, first, vectors, k, k_row, begin, end, mask, partial, later)
        new_reference(vectors, S, n, t.kappa, t.m + lane, t.base + lane, t.c + lane)
        weigh_rows(vectors, S, at, n, t.kappa, t.base + lane, t.total + lane)
        add_sums(vectors, t.total + lane, t.c + lane, t.l + lane)

    partial = partial or mask == 1 or t.bias != NULL
    if p.value.col != 1 or (partial and not all_finite(v, p.value.row, n, p.Dv)):
        copied_values(t, first, vectors, v, begin, end, partial)
    else:
        product_t(vectors, v, p.value.row, S, n, t.Ot + lane, p.Dv, t.c + lane)


cdef void key_block(Task* t, int64_t block, int64_t end) noexcept nogil:
    # All lanes against keys [block, end). Neighbouring vectors with about the same range of keys form a segment, so that at
    # the edge of a causal or windowed pattern the work follows the visible area.
    cdef const fastattn_problem* p = t.p
    cdef const real* k = t.k + block*p.key.row
    cdef const real* v = t.v + block*p.value.row
    cdef Py_ssize_t k_row = p.key.row
    cdef int64_t begin, stop, lo, hi, seen
    cdef int mask = 2
    cdef int g = 0
    cdef int first
    cdef Py_ssize_t i
    if t.mask != NULL:
        mask = mask_summary(t.mask + t.q_begin*p.mask.row + block*p.mask.col, p.mask.row, p.mask.col, t.n_queries,
                            end - block)
        if mask == 0:
            return
    if p.key.col != 1:
        pack_rows(k, p.key.row, p.key.col, end - block, p.D, t.packed_k)
        k = t.packed_k
        k_row = p.D
    for i in range(t.vectors*VL):
        t.lo_rel[i] = <real>max(min(t.lo[i] - block, <int64_t>BLOCK), <int64_t>0)
        t.hi_rel[i] = <real>max(min(t.hi[i] - block, <int64_t>BLOCK), <int64_t>0)
    while g < t.vectors:
        first = g
        begin = max(block, t.lo_min[g])
        stop = min(end, t.hi_max[g])
        seen = max(stop - begin, <int64_t>0)
        g += 1
        while g < t.vectors and begin < stop:
            # widen the segment by one vector, unless that multiplies too many pairs that nobody sees
            lo = max(block, t.lo_min[g])
            hi = min(end, t.hi_max[g])
            if lo >= hi:
                break
            seen += hi - lo
            lo = min(lo, begin)
            hi = max(hi, stop)
            if (g + 1 - first)*(hi - lo) - seen > WASTE:
                break
            begin = lo
            stop = hi
            g += 1
        if begin < stop:
            segment(t, first, g - first, k + (begin - block)*k_row, k_row, v + (begin - block)*p.value.row, begin, stop,
                    mask)


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
    return sizeof(real)*<size_t>(aligned(p.D*LANES) + BLOCK*LANES + aligned(p.Dv*LANES) + (7 + CHAINS)*LANES
                                 + aligned(BLOCK*p.D if p.key.col != 1 else 0)
                                 + BLOCK*COPIED)


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


cdef void run(const fastattn_problem* p, int64_t n_tasks, int64_t task, int32_t caller, void* memory) noexcept nogil:
    cdef Task t
    cdef int64_t n_blocks = n_tasks // (p.B*p.H)
    cdef int64_t n_vectors = (p.L + VL - 1) // VL
    cdef int64_t q_block = n_blocks - 1 - task % n_blocks       # the last rows see most when causal: longest first
    cdef int64_t n_keys = p.S
    cdef int64_t q_end, rows, block, k_begin, k_end, h_kv
    cdef Py_ssize_t i
    cdef int g
    cdef int count = 0
    cdef double kappa
    cdef real sign = 1
    cdef real* out
    cdef real* lse = NULL
    t.p = p
    t.b = task // n_blocks // p.H
    t.h = task // n_blocks % p.H

    # Which rows: vectors [n q / N, n (q + 1) / N) of the head's n vectors.
    t.q_begin = n_vectors*q_block // n_blocks*VL
    q_end = min(p.L, n_vectors*(q_block + 1) // n_blocks*VL)
    out = <real*>p.out.data + offset(p, &p.out, t.b, t.h) + t.q_begin*p.out.row
    if p.lse.data != NULL:
        lse = <real*>p.lse.data + offset(p, &p.lse, t.b, t.h) + t.q_begin*p.lse.row
    rows = q_end - t.q_begin
    t.n_queries = rows
    if p.query_lengths != NULL:
        t.n_queries = max(<int64_t>0, min(rows, p.query_lengths[t.b] - t.q_begin))
        empty_rows(p, rows - t.n_queries, out + t.n_queries*p.out.row, lse + t.n_queries*p.lse.row if lse != NULL else NULL)
        if t.n_queries == 0:
            return
    t.vectors = <int>((t.n_queries + VL - 1) // VL)
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
    t.lo_rel = t.total + CHAINS*LANES
    t.hi_rel = t.lo_rel + LANES
    t.copied = t.hi_rel + LANES
    t.packed_k = t.copied + BLOCK*COPIED

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
    t.plain = p.softcap == 0 and t.bias == NULL
    t.settled = True
    t.cold = n_blocks <= 4

    pack_queries(t.q + t.q_begin*p.query.row, p.query.row, p.query.col, t.n_queries, t.vectors, p.D, sign, t.Qt)
    memset(t.Ot, 0, p.Dv*LANES*sizeof(real))
    for i in range(LANES):
        t.m[i] = -INFINITY
        t.l[i] = 0

    k_begin = t.lo_min[0]
    k_end = t.hi_max[0]
    for g in range(1, t.vectors):
        if t.hi_max[g] > 0:
            k_begin = t.lo_min[g] if k_end == 0 else min(k_begin, t.lo_min[g])
            k_end = max(k_end, t.hi_max[g])
    block = k_begin - k_begin % BLOCK
    while block < k_end:
        key_block(&t, block, min(k_end, block + BLOCK))
        block += BLOCK
        count += 1
        if count % POLL_EVERY == 0 and p.stop != NULL:
            if caller and p.poll != NULL:
                p.poll(p.poll_data)
            if p.stop[0]:
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
    cdef int64_t i
    cdef int j
    cdef real sink[VL]
    for j in range(12):
        acc[j] = v_set1(<real>(rounds % 7) + <real>(j*0.1))     # unknown to the compiler: it folds chains it can see through
    for i in range(rounds):
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
