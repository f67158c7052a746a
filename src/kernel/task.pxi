# The state of one task, and which keys each of its lanes sees.

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
