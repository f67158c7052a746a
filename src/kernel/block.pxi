# One block of keys for all lanes of a task: segments of vectors that see about the same keys, and for each
#
#     S = K Qt  →  softcap, bias, masks  →  P = 2^((S - m) κ)  →  Ot = Ot c + Vt P

cdef void copied_values(Task* t, int first, int vectors, const real* v, int64_t block, const Parts* parts, bint cut,
                        bint masked) noexcept nogil:
    # Ot = Ot c + Vt P on a copy of V, a few columns at a time: for values whose last axis is not contiguous, and for blocks
    # where some lane does not see some key while a value is infinite or NaN. There 0 · NaN would reach lanes that do not see
    # it: the copy holds zeros in the place of those values, then they go one by one to the lanes that see them. Every finite
    # column keeps its bits.
    cdef const fastattn_problem* p = t.p
    cdef Py_ssize_t row = p.value.row
    cdef Py_ssize_t col = p.value.col
    cdef Py_ssize_t begin = parts.begin[0]
    cdef Py_ssize_t n = parts.end[parts.n - 1] - begin
    cdef Py_ssize_t lane = first*VL
    cdef Py_ssize_t column = 0
    cdef Py_ssize_t j, d, i, width
    cdef real* copied
    cdef bint poisoned
    cdef real x
    cdef int part
    while column < p.Dv:
        width = min(<Py_ssize_t>COPIED, p.Dv - column)
        copied = t.copied + begin*width
        pack_rows(v + begin*row + column*col, row, col, n, width, copied)
        poisoned = cut and not all_finite(copied, width, n, width)
        if poisoned:
            for i in range(n*width):
                x = copied[i]
                copied[i] = x if x - x == 0 else 0
        product_t(vectors, t.copied, width, t.S + lane, parts, t.Ot + column*LANES + lane, width, t.c + lane)
        if poisoned:
            for part in range(parts.n):
                for j in range(parts.begin[part], parts.end[part]):
                    for d in range(width):
                        x = v[j*row + (column + d)*col]
                        if x - x != 0:
                            for i in range(lane, min(lane + <Py_ssize_t>vectors*VL, t.n_queries)):
                                if (not masked or t.seen[j] >> i & 1) and not biased_away(t, i, block + j):
                                    t.Ot[(column + d)*LANES + i] += x*t.S[j*LANES + i]
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


cdef void load_bias(Task* t, real* to, Py_ssize_t lane, int vectors, int64_t key, Py_ssize_t n) noexcept nogil:
    # The bias of vectors from `lane` on and n keys, as a tile.
    cdef const fastattn_problem* p = t.p
    cdef Py_ssize_t query = t.q_begin + lane
    if p.bias_rows != NULL:
        indexed_bias_tile(to, vectors, n, t.bias, p.bias_rows + query, p.bias_cols + key, t.n_queries - lane)
    else:
        bias_tile(to, vectors, n, t.bias + query*p.bias.row + key*p.bias.col, p.bias.row, p.bias.col, t.n_queries - lane,
                  t.lines)


cdef void logits(Task* t, int first, int vectors, const real* k, Py_ssize_t k_row, int64_t block, Py_ssize_t begin,
                 Py_ssize_t n, bint masked) noexcept nogil:
    # Final logits of vectors [first, first + vectors) and n keys from row `begin` of one block on.
    cdef const fastattn_problem* p = t.p
    cdef Py_ssize_t lane = first*VL
    cdef real* S = t.S + begin*LANES + lane
    scores(t, first, vectors, k + begin*k_row, k_row, S, n, True)
    if p.softcap > 0:
        softcap_pass(S, vectors, n, <real>p.scale, <real>p.softcap)
    if t.bias != NULL:
        load_bias(t, t.bias_tile, lane, vectors, block + begin, n)
        bias_pass(S, vectors, n, <real>1 if p.softcap > 0 else <real>p.scale, t.bias_tile)
    if masked:
        hide_pass(S, vectors, n, t.seen + begin, lane)


cdef void weights(Task* t, int first, int vectors, const real* k, Py_ssize_t k_row, int64_t block, Py_ssize_t begin,
                  Py_ssize_t n, bint masked) noexcept nogil:
    # P by the present references for vectors [first, first + vectors) and n keys from the even row `begin` of one block on,
    # and their sums.
    cdef const fastattn_problem* p = t.p
    cdef Py_ssize_t lane = first*VL
    cdef Py_ssize_t d
    cdef real* S = t.S + begin*LANES + lane
    cdef How how
    if p.softcap > 0 or (t.bias != NULL and p.D > DEPTH_WHOLE):
        logits(t, first, vectors, k, k_row, block, begin, n, masked)
        weigh_rows(vectors, False, S, n, t.kappa, t.base + lane, t.total + lane, begin, NULL, 0)
        return
    k += begin*k_row
    d = scores(t, first, vectors, k, k_row, S, n, False)
    how = ADD if d > 0 else STORE
    if t.bias != NULL:
        load_bias(t, S, lane, vectors, block + begin, n)
        how = BIAS
    if masked:
        fused_masked(vectors, k + d, k_row, t.Qt + d*LANES + lane, p.D - d, S, how, <real>p.scale, n, t.kappa, t.base + lane,
                     t.total + lane, begin, t.seen + begin, lane, &t.later)
    else:
        fused_plain(vectors, k + d, k_row, t.Qt + d*LANES + lane, p.D - d, S, how, <real>p.scale, n, t.kappa, t.base + lane,
                    t.total + lane, begin, &t.later)


cdef void segment(Task* t, int first, int vectors, const real* k, Py_ssize_t k_row, const real* v, int64_t block,
                  const Parts* parts, bint masked) noexcept nogil:
    # Vectors [first, first + vectors) against parts of one block; k and v point at its first key. Parts begin at even rows.
    cdef const fastattn_problem* p = t.p
    cdef Py_ssize_t lane = first*VL
    cdef bint over = True
    cdef bint cut = masked or t.bias != NULL
    cdef bint look_at_values = t.careful and cut
    cdef Py_ssize_t i
    cdef int part

    clear_chains(vectors, t.total + lane)
    if t.settled and finite_lanes(t.m + lane, vectors):
        for part in range(parts.n):
            weights(t, first, vectors, k, k_row, block, parts.begin[part], parts.end[part] - parts.begin[part], masked)
        for i in range(lane, lane + vectors*VL):
            t.c[i] = 1
        memcpy(t.before + lane, t.l + lane, vectors*VL*sizeof(real))
        over = add_sums(vectors, t.total + lane, t.c + lane, t.l + lane)
        if over:
            memcpy(t.l + lane, t.before + lane, vectors*VL*sizeof(real))
            clear_chains(vectors, t.total + lane)
            t.settled = False
    if over:
        for part in range(parts.n):
            logits(t, first, vectors, k, k_row, block, parts.begin[part], parts.end[part] - parts.begin[part], masked)
        new_reference(vectors, t.S + lane, parts, t.kappa, t.m + lane, t.base + lane, t.c + lane)
        for part in range(parts.n):
            weigh_rows(vectors, False, t.S + parts.begin[part]*LANES + lane, parts.end[part] - parts.begin[part], t.kappa,
                       t.base + lane, t.total + lane, parts.begin[part], NULL, 0)
        add_sums(vectors, t.total + lane, t.c + lane, t.l + lane)

    t.cut |= cut
    if look_at_values:
        look_at_values = False
        for part in range(parts.n):
            look_at_values |= not all_finite(v + parts.begin[part]*p.value.row, p.value.row,
                                             parts.end[part] - parts.begin[part], p.Dv if p.value.col == 1 else 0)
    if p.value.col != 1 or look_at_values:
        copied_values(t, first, vectors, v, block, parts, t.careful and cut, masked)
    else:
        product_t(vectors, v, p.value.row, t.S + lane, parts, t.Ot + lane, p.Dv, t.c + lane)


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
    if t.bias != NULL and p.bias.col == 1 and p.bias_rows == NULL:
        expect(&t.later.rows[t.later.n], t.bias + t.q_begin*p.bias.row + block, p.bias.row*sizeof(real), t.n_queries,
               (end - block)*sizeof(real))
        t.later.n += 1
    if t.mask != NULL and p.mask.col == 1:
        expect(&t.later.rows[t.later.n], t.mask + t.q_begin*p.mask.row + block, p.mask.row, t.n_queries, end - block)
        t.later.n += 1


cdef uint64_t fill_gaps(uint64_t pairs) noexcept nogil:
    # Gaps of up to NARROW pairs cost less multiplied than skipped.
    cdef int i
    cdef uint64_t below = pairs
    cdef uint64_t above = pairs
    for i in range(NARROW):
        below |= below << 1
        above |= above >> 1
    return pairs | below & above


cdef void parts_of(uint64_t pairs, Py_ssize_t n, Parts* parts) noexcept nogil:
    cdef int begin = 0
    cdef int length
    parts.n = 0
    while pairs != 0:
        length = bits_first(pairs)
        begin += length
        pairs >>= length
        length = bits_first(~pairs)
        parts.begin[parts.n] = 2*begin
        parts.end[parts.n] = min(2*<Py_ssize_t>(begin + length), n)
        parts.n += 1
        begin += length
        pairs >>= length


cdef void key_block(Task* t, int64_t block, int64_t end) noexcept nogil:
    # All lanes against keys [block, end). Neighbouring vectors that see about the same keys form a segment, so that at the
    # edge of a causal or windowed pattern the work follows the visible area.
    cdef const fastattn_problem* p = t.p
    cdef const real* k = t.k + block*p.key.row
    cdef const real* v = t.v + block*p.value.row
    cdef Py_ssize_t k_row = p.key.row
    cdef Py_ssize_t n = end - block
    cdef Parts parts
    cdef uint64_t pairs[BLOCK_VECTORS]      # bit j: some lane of the vector sees key 2 j or 2 j + 1
    cdef uint64_t lanes = t.lanes >> (t.vectors - 1)*VL        # of one vector
    cdef uint64_t both[PAIRS]
    cdef uint64_t seen, wider
    cdef Look how_much = look(t, block, end)
    cdef int area
    cdef int g = 0
    cdef int first
    cdef Py_ssize_t j
    t.later.n = 0
    if t.cold and p.value.col == 1:
        expect(&t.later.rows[0], v, p.value.row*sizeof(real), n, p.Dv*sizeof(real))
        t.later.n = 1
    expect_masks(t, end, min(t.k_end, end + BLOCK))
    if how_much == NOTHING:
        return
    if p.key.col != 1:
        pack_rows(k, p.key.row, p.key.col, n, p.D, t.packed_k)
        k = t.packed_k
        k_row = p.D
    if how_much == ALL:
        parts.n = 1
        parts.begin[0] = 0
        parts.end[0] = n
        if t.second:
            weighed_segment(t, 0, t.vectors, k, k_row, block, &parts, False)
        else:
            segment(t, 0, t.vectors, k, k_row, v, block, &parts, False)
        return
    for j in range(n//2):
        both[j] = t.seen[2*j] | t.seen[2*j + 1]
    if n % 2 == 1:
        both[n//2] = t.seen[n - 1]
    for g in range(t.vectors):
        seen = 0
        wider = lanes << g*VL
        for j in range((n + 1)//2):
            seen |= <uint64_t>(both[j] & wider != 0) << j
        pairs[g] = seen
    g = 0
    while g < t.vectors:
        first = g
        seen = pairs[g]
        area = bits_count(seen)
        g += 1
        while seen != 0 and g < t.vectors and pairs[g] != 0:
            # widen the segment by one vector, unless that multiplies too many pairs that nobody sees
            area += bits_count(pairs[g])
            wider = seen | pairs[g]
            if 2*((g + 1 - first)*bits_count(wider) - area) > WASTE:
                break
            seen = wider
            g += 1
        if seen != 0:
            parts_of(fill_gaps(seen), n, &parts)
            if t.second:
                weighed_segment(t, first, g - first, k, k_row, block, &parts, True)
            else:
                segment(t, first, g - first, k, k_row, v, block, &parts, True)
