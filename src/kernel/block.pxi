# One block of keys for all lanes of a task: segments of vectors that see about the same keys, and for each
#
#     S = K Qt  →  softcap, bias, masks  →  P = 2^((S - m) κ)  →  Ot = Ot c + Vt P

cdef void copied_values(Task* t, int first, int vectors, const real* v, int64_t begin, int64_t end,
                        bint cut) noexcept nogil:
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
        poisoned = cut and not all_finite(t.copied, width, n, width)
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
                       bint whole) noexcept nogil:
    # S = K Qt for n keys. A long D goes in parts: Qt of one part stays in the first-level cache, and a sum of DEPTH products
    # from zero has the smaller error. Without `whole` the last part is left to the caller; returns how much of D is done.
    cdef Py_ssize_t depth = t.p.D if t.p.D <= DEPTH_WHOLE else DEPTH
    cdef Py_ssize_t d = 0
    while t.p.D - d > depth:
        product_n(vectors, k + d, k_row, t.Qt + d*LANES + first*VL, depth, S, n, ADD if d > 0 else STORE, 1, &t.later)
        d += depth
    if whole:
        product_n(vectors, k + d, k_row, t.Qt + d*LANES + first*VL, t.p.D - d, S, n, ADD if d > 0 else STORE, 1, &t.later)
    return d


cdef void logits(Task* t, int first, int vectors, const real* k, Py_ssize_t k_row, int64_t begin, int64_t end,
                 bint masked) noexcept nogil:
    # Final logits of vectors [first, first + vectors) and keys [begin, end) of one block; k points at key `begin`.
    cdef const fastattn_problem* p = t.p
    cdef Py_ssize_t lane = first*VL
    cdef Py_ssize_t at = begin % BLOCK
    cdef Py_ssize_t n = end - begin
    cdef real* S = t.S + at*LANES + lane
    scores(t, first, vectors, k, k_row, S, n, True)
    if p.softcap > 0:
        softcap_pass(S, vectors, n, <real>p.scale, <real>p.softcap)
    if t.bias != NULL:
        bias_tile(t.bias_tile, vectors, n, t.bias + (t.q_begin + lane)*p.bias.row + begin*p.bias.col, p.bias.row, p.bias.col,
                  t.n_queries - lane)
        bias_pass(S, vectors, n, <real>1 if p.softcap > 0 else <real>p.scale, t.bias_tile)
    if masked:
        hide_pass(S, vectors, n, t.seen + at, lane)


cdef void weights(Task* t, int first, int vectors, const real* k, Py_ssize_t k_row, int64_t begin, int64_t end,
                  bint masked) noexcept nogil:
    # P for vectors [first, first + vectors) and keys [begin, end) of one block by the present references, and their sums.
    cdef const fastattn_problem* p = t.p
    cdef Py_ssize_t lane = first*VL
    cdef Py_ssize_t at = begin % BLOCK
    cdef Py_ssize_t n = end - begin
    cdef Py_ssize_t d
    cdef real* S = t.S + at*LANES + lane
    cdef How how
    if p.softcap > 0 or (t.bias != NULL and p.D > DEPTH_WHOLE):
        logits(t, first, vectors, k, k_row, begin, end, masked)
        weigh_rows(vectors, False, S, n, t.kappa, t.base + lane, t.total + lane, at, NULL, 0)
        return
    d = scores(t, first, vectors, k, k_row, S, n, False)
    how = ADD if d > 0 else STORE
    if t.bias != NULL:
        bias_tile(S, vectors, n, t.bias + (t.q_begin + lane)*p.bias.row + begin*p.bias.col, p.bias.row, p.bias.col,
                  t.n_queries - lane)
        how = BIAS
    if masked:
        fused_masked(vectors, k + d, k_row, t.Qt + d*LANES + lane, p.D - d, S, how, <real>p.scale, n, t.kappa, t.base + lane,
                     t.total + lane, at, t.seen + at, lane, &t.later)
    else:
        fused_plain(vectors, k + d, k_row, t.Qt + d*LANES + lane, p.D - d, S, how, <real>p.scale, n, t.kappa, t.base + lane,
                    t.total + lane, at, &t.later)


cdef void segment(Task* t, int first, int vectors, const real* k, Py_ssize_t k_row, const real* v, int64_t begin,
                  int64_t end, bint masked) noexcept nogil:
    # Vectors [first, first + vectors) against keys [begin, end) of one block, begin even; k and v point at key `begin`.
    cdef const fastattn_problem* p = t.p
    cdef Py_ssize_t lane = first*VL
    cdef Py_ssize_t at = begin % BLOCK
    cdef Py_ssize_t n = end - begin
    cdef real* S = t.S + at*LANES + lane
    cdef bint over = True
    cdef bint cut = masked or t.bias != NULL
    cdef Py_ssize_t i

    clear_chains(vectors, t.total + lane)
    if t.settled and finite_lanes(t.m + lane, vectors):
        weights(t, first, vectors, k, k_row, begin, end, masked)
        for i in range(lane, lane + vectors*VL):
            t.c[i] = 1
        memcpy(t.before + lane, t.l + lane, vectors*VL*sizeof(real))
        over = add_sums(vectors, t.total + lane, t.c + lane, t.l + lane)
        if over:
            memcpy(t.l + lane, t.before + lane, vectors*VL*sizeof(real))
            clear_chains(vectors, t.total + lane)
            t.settled = False
    if over:
        logits(t, first, vectors, k, k_row, begin, end, masked)
        new_reference(vectors, S, n, t.kappa, t.m + lane, t.base + lane, t.c + lane)
        weigh_rows(vectors, False, S, n, t.kappa, t.base + lane, t.total + lane, at, NULL, 0)
        add_sums(vectors, t.total + lane, t.c + lane, t.l + lane)

    t.cut |= cut
    if p.value.col != 1 or (t.careful and cut and not all_finite(v, p.value.row, n, p.Dv)):
        copied_values(t, first, vectors, v, begin, end, t.careful and cut)
    else:
        product_t(vectors, v, p.value.row, S, n, t.Ot + lane, p.Dv, t.c + lane)


cdef inline void expect(Rows* rows, const void* at, Py_ssize_t row, Py_ssize_t n, Py_ssize_t size) noexcept nogil:
    rows.at = <const char*>at
    rows.row = row
    rows.size = size
    rows.left = 1 if row == 0 and n > 1 else n


cdef void expect_masks(Task* t, int64_t block, int64_t end) noexcept nogil:
    # Rows of bias and mask lie far apart, a line or two a block each: no prefetcher sees them coming.
    cdef const fastattn_problem* p = t.p
    if block >= end:
        return
    if t.bias != NULL and p.bias.col == 1:
        expect(&t.later.rows[t.later.n], t.bias + t.q_begin*p.bias.row + block, p.bias.row*sizeof(real), t.n_queries,
               (end - block)*sizeof(real))
        t.later.n += 1
    if t.mask != NULL and p.mask.col == 1:
        expect(&t.later.rows[t.later.n], t.mask + t.q_begin*p.mask.row + block, p.mask.row, t.n_queries, end - block)
        t.later.n += 1


cdef void key_block(Task* t, int64_t block, int64_t end) noexcept nogil:
    # All lanes against keys [block, end). Neighbouring vectors with about the same range of keys form a segment, so that at
    # the edge of a causal or windowed pattern the work follows the visible area.
    cdef const fastattn_problem* p = t.p
    cdef const real* k = t.k + block*p.key.row
    cdef const real* v = t.v + block*p.value.row
    cdef Py_ssize_t k_row = p.key.row
    cdef Py_ssize_t n = end - block
    cdef Py_ssize_t begins[BLOCK_VECTORS]
    cdef Py_ssize_t stops[BLOCK_VECTORS]
    cdef Py_ssize_t begin, stop, lo, hi, area
    cdef uint64_t lanes = t.lanes >> (t.vectors - 1)*VL        # of one vector
    cdef Look seen = look(t, block, end)
    cdef int g = 0
    cdef int first
    t.later.n = 0
    if t.cold and p.value.col == 1:
        expect(&t.later.rows[0], v, p.value.row*sizeof(real), n, p.Dv*sizeof(real))
        t.later.n = 1
    expect_masks(t, end, min(t.k_end, end + BLOCK))
    if seen == NOTHING:
        return
    if p.key.col != 1:
        pack_rows(k, p.key.row, p.key.col, n, p.D, t.packed_k)
        k = t.packed_k
        k_row = p.D
    if seen == ALL:
        segment(t, 0, t.vectors, k, k_row, v, block, end, False)
        return
    for g in range(t.vectors):
        begin = 0
        stop = n
        while begin < n and t.seen[begin] & lanes << g*VL == 0:
            begin += 1
        while stop > begin and t.seen[stop - 1] & lanes << g*VL == 0:
            stop -= 1
        begins[g] = begin//2*2              # sums go in pairs of keys
        stops[g] = stop if begin < n else begins[g]
    g = 0
    while g < t.vectors:
        first = g
        begin = begins[g]
        stop = stops[g]
        area = stop - begin
        g += 1
        while g < t.vectors and begin < stop:
            # widen the segment by one vector, unless that multiplies too many pairs that nobody sees
            if begins[g] >= stops[g]:
                break
            area += stops[g] - begins[g]
            lo = min(begin, begins[g])
            hi = max(stop, stops[g])
            if (g + 1 - first)*(hi - lo) - area > WASTE:
                break
            begin = lo
            stop = hi
            g += 1
        if begin < stop:
            segment(t, first, g - first, k + begin*k_row, k_row, v + begin*p.value.row, block + begin, block + stop, True)
