# One block of keys for all lanes of a task: segments of vectors that see about the same keys, and for each
#
#     S = K Qt  →  softcap, bias, masks  →  P = 2^((S - m) κ)  →  Ot = Ot c + Vt P

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
    # rows [whole, rest) of the segment are seen by every lane, as they are: scored and weighed at once
    cdef Py_ssize_t whole = 0
    cdef Py_ssize_t rest = 0
    cdef bint partial
    cdef bint over = True
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
        if t.plain and mask == 2:
            whole = min(max(full_lo - begin, <int64_t>0), n)
            whole += (at + whole) % 2
            rest = n if full_hi >= end else (max(full_hi - begin, <int64_t>0) + at)//2*2 - at
        if whole >= rest:
            whole = rest = 0
        if whole > 0:
            logits(t, first, vectors, k, k_row, begin, begin + whole, mask, True, later)
            weigh_rows(vectors, S, at, whole, t.kappa, t.base + lane, t.total + lane)
        if whole < rest:
            d = scores(t, first, vectors, k + whole*k_row, k_row, S + whole*LANES, rest - whole, False, later)
            fused_step(vectors, k + whole*k_row + d, k_row, t.Qt + d*LANES + lane, p.D - d, S + whole*LANES, d > 0,
                       at + whole, rest - whole, t.kappa, t.base + lane, t.total + lane, later)
        if rest < n:
            logits(t, first, vectors, k + rest*k_row, k_row, begin + rest, end, mask, partial, later)
            weigh_rows(vectors, S + rest*LANES, at + rest, n - rest, t.kappa, t.base + lane, t.total + lane)
        for i in range(lane, lane + vectors*VL):
            t.c[i] = 1
        memcpy(t.before + lane, t.l + lane, vectors*VL*sizeof(real))
        over = add_sums(vectors, t.total + lane, t.c + lane, t.l + lane)
        if over:
            memcpy(t.l + lane, t.before + lane, vectors*VL*sizeof(real))
            clear_chains(vectors, t.total + lane)
            t.settled = False
    if over:
        logits(t, first, vectors, k, k_row, begin, end, mask, partial, later)
        new_reference(vectors, S, n, t.kappa, t.m + lane, t.base + lane, t.c + lane)
        weigh_rows(vectors, S, at, n, t.kappa, t.base + lane, t.total + lane)
        add_sums(vectors, t.total + lane, t.c + lane, t.l + lane)

    partial = partial or mask == 1 or t.bias != NULL
    if p.value.col != 1 or (partial and not all_finite(v, p.value.row, n, p.Dv)):
        copied_values(t, first, vectors, v, begin, end, partial)
    else:
        product_t(vectors, v, p.value.row, S, n, t.Ot + lane, p.Dv, t.c + lane)


cdef void fetch_rows(const char* at, Py_ssize_t row, Py_ssize_t n, Py_ssize_t size) noexcept nogil:
    # Rows of bias or mask lie far apart, a line or two a block each: no prefetcher sees them coming.
    cdef Py_ssize_t i
    for i in range(1 if row == 0 else n):
        v_fetch_bytes(at + i*row, size)


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
    if t.bias != NULL and p.bias.col == 1:
        fetch_rows(<const char*>(t.bias + t.q_begin*p.bias.row + block), p.bias.row*sizeof(real), t.n_queries,
                   (end - block)*sizeof(real))
    if t.mask != NULL and p.mask.col == 1:
        fetch_rows(<const char*>t.mask + t.q_begin*p.mask.row + block + BLOCK, p.mask.row, t.n_queries, BLOCK)
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
