# The state of one task, and which keys each of its lanes sees.

cdef struct Task:
    const fastattn_problem* p
    int64_t b, h
    Py_ssize_t q_begin              # first query of the block
    Py_ssize_t n_queries            # valid ones; rows past query_lengths are not
    int vectors
    # Lane i sees keys lo[i] <= j < hi[i], of which the mask may hide some. Some lane sees [k_begin, k_end), all see
    # [full_begin, full_end).
    int64_t lo[LANES]
    int64_t hi[LANES]
    int64_t k_begin, k_end, full_begin, full_end
    uint64_t lanes                  # bits of the block's lanes
    uint64_t seen[BLOCK]            # the lanes that see each key of the present block, where not all see all
    const real* q
    const real* k
    const real* v
    const real* bias
    const uint8_t* mask
    real kappa                      # logits of S to exponents of 2; > 0
    bint cold                       # few blocks of queries share these keys: worth fetching the values early
    bint settled                    # no maximum has outgrown its reference yet: worth fusing
    bint cut                        # a value was multiplied by the weight 0 of a lane that does not see its key
    bint careful                    # such values are looked at first: NaN and Inf stay with those who see them
    Ahead later
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
    real* bias_tile                 # [BLOCK][LANES]
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
    # full tile partial; an empty lane has lo = hi = 0.
    cdef const fastattn_problem* p = t.p
    cdef int64_t at, lo, hi
    cdef int64_t first = p.query_offset[t.b] if p.query_offset != NULL else p.offset
    cdef Py_ssize_t i
    t.k_begin = n_keys
    t.k_end = 0
    t.full_begin = 0
    t.full_end = n_keys
    for i in range(t.vectors*VL):
        at = first + t.q_begin + min(i, t.n_queries - 1)
        lo = max(<int64_t>0, at - p.left)
        hi = min(n_keys, at + p.right + 1)
        if lo >= hi:
            lo = 0
            hi = 0
        t.lo[i] = lo
        t.hi[i] = hi
        t.full_begin = max(t.full_begin, lo)
        t.full_end = min(t.full_end, hi)
        if lo < hi:
            t.k_begin = min(t.k_begin, lo)
            t.k_end = max(t.k_end, hi)


cdef void hide_masked(Task* t, int64_t block, Py_ssize_t n) noexcept nogil:
    # seen[j] &= the lanes i whose mask[i, j] is not 0. Bytes along keys become bits along lanes: eight rows make a row of
    # bytes, eight of those a row of words.
    cdef Py_ssize_t row = t.p.mask.row
    cdef Py_ssize_t col = t.p.mask.col
    cdef const uint8_t* mask = t.mask + t.q_begin*row + block*col
    cdef const uint8_t* line
    cdef uint8_t octets[8][BLOCK]
    cdef uint8_t packed[BLOCK]
    cdef uint8_t* octet
    cdef uint8_t bit
    cdef Py_ssize_t i, j
    if row == 0:
        for j in range(n):
            if mask[j*col] == 0:
                t.seen[j] = 0
        return
    memset(octets, 0, sizeof(octets))
    for i in range(t.vectors*VL):
        line = mask + min(i, t.n_queries - 1)*row
        if col != 1:
            for j in range(n):
                packed[j] = line[j*col]
            line = packed
        octet = octets[i//8]
        bit = <uint8_t>(1 << i % 8)
        for j in range(n):
            octet[j] |= bit if line[j] != 0 else 0
    for j in range(n):
        t.seen[j] &= (<uint64_t>octets[0][j] | <uint64_t>octets[1][j] << 8 | <uint64_t>octets[2][j] << 16
                      | <uint64_t>octets[3][j] << 24 | <uint64_t>octets[4][j] << 32 | <uint64_t>octets[5][j] << 40
                      | <uint64_t>octets[6][j] << 48 | <uint64_t>octets[7][j] << 56)


cdef enum Look:
    NOTHING
    PART
    ALL


cdef Look look(Task* t, int64_t block, int64_t end) noexcept nogil:
    # How much of keys [block, end) the lanes see; fills `seen` unless that is all by the intervals alone.
    cdef Py_ssize_t n = end - block
    cdef Py_ssize_t i, j, begin, stop
    cdef bint full = t.full_begin <= block and t.full_end >= end
    cdef uint64_t lanes
    cdef uint64_t some = 0
    cdef uint64_t every = t.lanes
    if full and t.mask == NULL:
        return ALL
    if full:
        for j in range(n):
            t.seen[j] = t.lanes
    else:
        # a bit turns where an interval begins and where it ends
        memset(t.seen, 0, n*sizeof(uint64_t))
        for i in range(t.vectors*VL):
            begin = max(t.lo[i] - block, <int64_t>0)
            stop = min(t.hi[i] - block, <int64_t>n)
            if begin < stop:
                t.seen[begin] ^= <uint64_t>1 << i
                if stop < n:
                    t.seen[stop] ^= <uint64_t>1 << i
        lanes = 0
        for j in range(n):
            lanes ^= t.seen[j]
            t.seen[j] = lanes
    if t.mask != NULL:
        hide_masked(t, block, n)
    for j in range(n):
        some |= t.seen[j]
        every &= t.seen[j]
    return NOTHING if some == 0 else ALL if every == t.lanes else PART
