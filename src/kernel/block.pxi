# One block of keys for all lanes of a task: segments of vectors that see about the same keys, and for each
#
#     S = K Qt  →  softcap, bias, masks  →  P = 2^((S - m) κ)  →  Ot = Ot c + Vt P

cdef void find_rows(const Task* t, const fastattn_array* a, int64_t block, Py_ssize_t n, Py_ssize_t size,
                    int64_t* at) noexcept nogil:
    # at[j] = elements to the row of key block + j, times size
    cdef int64_t first
    cdef int64_t step = a.row*size
    cdef Py_ssize_t j = 0
    cdef Py_ssize_t i, run
    while j < n:
        run = even_rows(t, a, block + j, n - j, &first)
        first *= size
        for i in range(run):
            at[j + i] = first + i*step
        j += run


cdef void find_scales(const Task* t, const fastattn_array* a, const float* scale, int64_t block, Py_ssize_t n,
                      float* scales) noexcept nogil:
    # those of the rows of n keys
    cdef int64_t first
    cdef Py_ssize_t j = 0
    cdef Py_ssize_t i, run
    while j < n and scale != NULL:
        run = even_rows(t, a, block + j, n - j, &first)
        if a.row == 1:
            memcpy(scales + j, scale + first, run*sizeof(float))
        else:
            for i in range(run):
                scales[j + i] = scale[first + i*a.row]
        j += run


cdef void pack_keys(Task* t, int64_t block, Py_ssize_t n, bint words) noexcept nogil:
    cdef const fastattn_array* a = &t.p.key
    cdef int64_t at[BLOCK]
    cdef float scales[BLOCK]
    find_rows(t, a, block, n, 1, at)
    find_scales(t, &t.p.key_scale, t.k_scale, block, n, scales)
    if WORD == 2 and words:
        pack_words(t.k, at, a.col, n, t.p.D//WORD, t.packed_k)
    else:
        pack_rows(t.k, at, a.col, a.kind, scales, n, t.p.D, t.packed_k)


cdef bint pack_values(Task* t, int64_t block, Py_ssize_t n, bint words, bint clean) noexcept nogil:
    # Values of a block. clean: infinities and NaN become 0; returns whether there were some.
    cdef const fastattn_array* a = &t.p.value
    cdef int64_t at[BLOCK]
    cdef float scales[BLOCK]
    cdef Py_ssize_t Dv = t.p.Dv
    cdef Py_ssize_t i, j, d
    cdef real x
    find_rows(t, a, block, n, 1, at)
    find_scales(t, &t.p.value_scale, t.v_scale, block, n, scales)
    if WORD == 2 and words:
        zip_rows(t.v, at, a.col, n, Dv, t.packed_v)
        if not clean or finite_words(t.packed_v, (n + 1)//2*Dv):
            return False
        for j in range(n):
            for d in range(Dv):
                x = real_at(t.v, at[j] + d*a.col, a.kind)
                if x - x != 0:
                    (<uint16_t*>t.packed_v)[(j//2*Dv + d)*2 + j % 2] = 0
        return True
    pack_rows(t.v, at, a.col, a.kind, scales, n, Dv, t.packed_v)
    if not clean or all_finite(t.packed_v, Dv, n, Dv):
        return False
    for i in range(n*Dv):
        x = t.packed_v[i]
        t.packed_v[i] = x if x - x == 0 else 0
    return True


cdef real weight_at(const Task* t, Py_ssize_t i, Py_ssize_t j) noexcept nogil:
    # P of lane i and row j of the block, from its word where weights are pairs
    if WORD == 2 and not t.few:
        return real_at(<const uint16_t*>(t.S + (j - j % 2)*LANES + i) + j % 2, 0, FASTATTN_BF16)
    return t.S[j*LANES + i]


cdef void add_poisoned(Task* t, int first, int vectors, int64_t block, const Parts* parts, bint masked) noexcept nogil:
    # The infinite and NaN values of a block, which were multiplied as 0, to the lanes that see their keys: 0 · NaN must not
    # reach the others. Every finite column keeps its bits.
    cdef const fastattn_problem* p = t.p
    cdef Py_ssize_t lane = first*VL
    cdef Py_ssize_t ldo = whole(p.Dv)
    cdef Py_ssize_t i, j, d
    cdef int64_t at
    cdef int part
    cdef real x
    for part in range(parts.n):
        for j in range(parts.begin[part], parts.end[part]):
            at = key_at(t, &p.value, block + j)
            for d in range(p.Dv):
                x = real_at(t.v, at + d*p.value.col, p.value.kind)
                if t.v_scale != NULL:
                    x *= t.v_scale[key_at(t, &p.value_scale, block + j)]
                if x - x == 0:
                    continue
                for i in range(lane, min(lane + <Py_ssize_t>vectors*VL, t.n_queries)):
                    if (not masked or t.seen[j] >> i & 1) and not biased_away(t, i, block + j):
                        if t.few:
                            t.Ot[i*ldo + d] += x*weight_at(t, i, j)
                        else:
                            t.Ot[d*LANES + i] += x*weight_at(t, i, j)


cdef inline bint finite_lanes(const real* m, int vectors) noexcept nogil:
    cdef vf x = v_zero()
    cdef int g
    for g in range(vectors):
        x = v_fma(v_load(m + g*VL), v_zero(), x)
    return not v_any_nan(x)


cdef Py_ssize_t chain_n(int vectors, const real* A, Py_ssize_t lda, const real* B, Py_ssize_t D, real* C, Py_ssize_t n,
                        bint whole, Ahead* later) noexcept nogil:
    # C = A B for n rows. A long D goes in parts: B of one part stays in the first-level cache, and a sum of DEPTH products
    # from zero has the smaller error. Without `whole` the last part is left to the caller; returns how much of D is done.
    cdef Py_ssize_t depth = D if D <= DEPTH_WHOLE else DEPTH
    cdef Py_ssize_t d = 0
    while D - d > depth:
        product_n(vectors, A + d, lda, B + d*LANES, depth, C, n, ADD if d > 0 else STORE, 1, later)
        d += depth
    if whole:
        product_n(vectors, A + d, lda, B + d*LANES, D - d, C, n, ADD if d > 0 else STORE, 1, later)
    return d


cdef Py_ssize_t scores(Task* t, int first, int vectors, const real* k, Py_ssize_t k_row, real* S, Py_ssize_t n,
                       bint whole) noexcept nogil:
    # S = K Qt for n keys, but for the last part of D without `whole`; returns how much of D is done.
    return chain_n(vectors, k, k_row, t.Qt + first*VL, t.p.D//WORD, S, n, whole, &t.later)


cdef void load_bias(Task* t, real* to, Py_ssize_t lane, int vectors, int64_t key, Py_ssize_t n) noexcept nogil:
    # The bias of vectors from `lane` on and n keys, as a tile.
    cdef const fastattn_problem* p = t.p
    if p.bias_rows != NULL:
        indexed_bias_tile(to, vectors, n, <const real*>t.bias, p.bias_rows + t.q_begin + lane, p.bias_cols + key,
                          t.n_queries - lane)
    else:
        bias_tile(t, to, lane, vectors, key, n)


cdef void change_scores(const Task* t, real* S, Py_ssize_t lane, int vectors, int64_t key, Py_ssize_t n) noexcept nogil:
    # the caller's function on a tile of vectors from `lane` on and n keys; a call a row where they don't follow each other
    cdef const fastattn_problem* p = t.p
    cdef Py_ssize_t n_lanes = min(<Py_ssize_t>vectors*VL, t.n_queries - lane)
    cdef Py_ssize_t i
    multiply_pass(S, vectors, n, <real>p.scale)
    if t.stage == DERIVE:
        copy_pass(S, t.back.before + (S - t.S), vectors, n)
    if p.rows == NULL:
        p.score_mod(S, t.b, t.h, t.q_begin + lane, key, n_lanes, n, LANES, p.score_data)
        return
    for i in range(n_lanes):
        p.score_mod(S + i, t.b, t.h, p.rows[t.q_begin + lane + i], key, 1, n, LANES, p.score_data)


cdef void logits(Task* t, int first, int vectors, const Operands* of, int64_t block, Py_ssize_t begin, Py_ssize_t n,
                 bint masked) noexcept nogil:
    # Final logits of vectors [first, first + vectors) and n keys from row `begin` of one block on.
    cdef const fastattn_problem* p = t.p
    cdef Py_ssize_t lane = first*VL
    cdef real* S = t.S + begin*LANES + lane
    if t.few:
        few_scores(t, first, vectors, of, begin, n)
    elif p.score == FASTATTN_ADDITIVE:
        additive_scores(t, first, vectors, of.k + begin*of.k_row, of.k_row, S, n)
    else:
        scores(t, first, vectors, of.k + begin*of.k_row, of.k_row, S, n, True)
    if p.score_mod != NULL:
        change_scores(t, S, lane, vectors, block + begin, n)
    if p.softcap > 0:
        softcap_pass(S, vectors, n, <real>1 if p.score_mod != NULL else <real>p.scale, <real>p.softcap)
        if t.stage == DERIVE:
            softcap_slope(S, t.back.slope + begin*LANES + lane, vectors, n, <real>p.softcap)
    if t.bias != NULL:
        load_bias(t, t.bias_tile, lane, vectors, block + begin, n)
        bias_pass(S, vectors, n, <real>1 if t.separate else <real>p.scale, t.bias_tile)
    if masked:
        hide_pass(S, vectors, n, t.seen + begin, lane)


cdef void exponentials(Task* t, int first, int vectors, const Operands* of, int64_t block, Py_ssize_t begin, Py_ssize_t n,
                       bint masked) noexcept nogil:
    # 2^((S - base) κ) for vectors [first, first + vectors) and n keys from the even row `begin` of one block on, and their sums
    cdef const fastattn_problem* p = t.p
    cdef Py_ssize_t lane = first*VL
    cdef Py_ssize_t D = p.D//WORD
    cdef Py_ssize_t d
    cdef const real* k = of.k + begin*of.k_row
    cdef real* S = t.S + begin*LANES + lane
    cdef How how
    if t.separate or (t.bias != NULL and D > DEPTH_WHOLE):
        logits(t, first, vectors, of, block, begin, n, masked)
        weigh_rows(vectors, S, n, t.kappa, t.base + lane, t.total + lane, begin, True)
        return
    d = scores(t, first, vectors, k, of.k_row, S, n, False)
    how = ADD if d > 0 else STORE
    if t.bias != NULL:
        load_bias(t, S, lane, vectors, block + begin, n)
        how = BIAS
    if masked:
        fused_masked(vectors, k + d, of.k_row, t.Qt + d*LANES + lane, D - d, S, how, <real>p.scale, n, t.kappa, t.base + lane,
                     t.total + lane, begin, t.seen + begin, lane, &t.later)
    else:
        fused_plain(vectors, k + d, of.k_row, t.Qt + d*LANES + lane, D - d, S, how, <real>p.scale, n, t.kappa, t.base + lane,
                    t.total + lane, begin, &t.later)


cdef void weights(Task* t, int first, int vectors, const Operands* of, int64_t block, Py_ssize_t begin, Py_ssize_t n,
                  bint masked) noexcept nogil:
    # P by the present references, as `exponentials`; of a softmax their sums too
    if t.p.normalizer <= FASTATTN_SIGMOID:
        exponentials(t, first, vectors, of, block, begin, n, masked)
    else:
        logits(t, first, vectors, of, block, begin, n, masked)
    if t.p.normalizer != FASTATTN_SOFTMAX:
        activate(t, t.S + begin*LANES + first*VL, first*VL, vectors, n, t.seen + begin if masked else NULL)


cdef inline void few_parts(Task* t, int first, int vectors, Operands* of, int64_t block, Py_ssize_t n,
                           const Parts* parts) noexcept nogil:
    # Ob += Pt V over parts of a block, where rows are few
    cdef int part
    if t.few:
        if of.in_turn:
            of.poisoned = pack_values(t, block, n, False, of.clean)
        for part in range(parts.n):
            few_values(t, first, vectors, of, parts.begin[part], parts.end[part])


cdef bint settled_segment(Task* t, int first, int vectors, const Operands* of, int64_t block, const Parts* parts,
                          bint masked) noexcept nogil:
    # Weights by the references as they are, and their sums; False, and nothing is done, if some weight has outgrown its
    # reference.
    cdef Py_ssize_t lane = first*VL
    cdef Py_ssize_t begin
    cdef Py_ssize_t i
    cdef int part
    for part in range(parts.n):
        begin = parts.begin[part]
        weights(t, first, vectors, of, block, begin, parts.end[part] - begin, masked)
    for i in range(lane, lane + vectors*VL):
        t.c[i] = 1
    memcpy(t.before + lane, t.l + lane, vectors*VL*sizeof(real))
    if not add_sums(vectors, t.total + lane, t.c + lane, t.l + lane):
        return True
    memcpy(t.l + lane, t.before + lane, vectors*VL*sizeof(real))
    clear_chains(vectors, t.total + lane)
    t.settled = False
    return False


cdef void segment(Task* t, int first, int vectors, Operands* of, int64_t block, Py_ssize_t n, const Parts* parts,
                  bint masked) noexcept nogil:
    # Vectors [first, first + vectors) against parts of one block. Parts begin at even rows.
    cdef Py_ssize_t lane = first*VL
    cdef Py_ssize_t i
    cdef int part

    if of.in_turn:
        pack_keys(t, block, n, not t.few)
    clear_chains(vectors, t.total + lane)
    if t.few:
        if weaves(t, of, masked):
            few_woven(t, of, n)
            return
        add_late(t)
        clear_block(t, first, vectors)
    if t.p.normalizer != FASTATTN_SOFTMAX:
        for part in range(parts.n):
            weights(t, first, vectors, of, block, parts.begin[part], parts.end[part] - parts.begin[part], masked)
        for i in range(lane, lane + vectors*VL):
            t.c[i] = 1
        if t.p.reduce == FASTATTN_MEAN:
            mean_weights(t, first, vectors, parts)
    elif t.few and stays_packed(t, of, masked):
        few_whole(t, first, vectors, of, parts.end[0])
    elif not (t.settled and not t.few and finite_lanes(t.m + lane, vectors)
              and settled_segment(t, first, vectors, of, block, parts, masked)):
        for part in range(parts.n):
            logits(t, first, vectors, of, block, parts.begin[part], parts.end[part] - parts.begin[part], masked)
        new_reference(vectors, t.S + lane, parts, t.kappa, t.m + lane, t.base + lane, t.c + lane)
        for part in range(parts.n):
            weigh_rows(vectors, t.S + parts.begin[part]*LANES + lane, parts.end[part] - parts.begin[part], t.kappa,
                       t.base + lane, t.total + lane, parts.begin[part], not t.few)
        few_parts(t, first, vectors, of, block, n, parts)
        add_sums(vectors, t.total + lane, t.c + lane, t.l + lane)

    t.cut |= masked or t.bias != NULL
    if t.few:
        add_block(t, first, vectors)
    else:
        if of.in_turn:
            of.poisoned = pack_values(t, block, n, True, of.clean)
        if t.p.dropout != 0:
            drop_weights(t, first, vectors, block, parts)
        product_t(vectors, of.v, of.v_row, t.S + lane, parts, t.Ot + lane, t.p.Dv, t.c + lane, &t.later.keys)
    if of.poisoned:
        add_poisoned(t, first, vectors, block, parts, masked)


cdef void any_segment(Task* t, int first, int vectors, Operands* of, int64_t block, Py_ssize_t n, const Parts* parts,
                      bint masked) noexcept nogil:
    if t.stage == ATTEND:
        segment(t, first, vectors, of, block, n, parts, masked)
    elif t.stage == WEIGH:
        weighed_segment(t, first, vectors, of, block, parts, masked)
    elif t.stage == DERIVE:
        gradient_segment(t, first, vectors, of, block, n, parts, masked)
    else:
        threshold_segment(t, first, vectors, of, block, parts, masked)


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
    cdef Py_ssize_t row
    cdef Py_ssize_t size = v_size(p.bias.kind)
    if t.bias != NULL and p.bias.col == 1 and p.bias_rows == NULL and even_lanes(t, &p.bias, &row):
        expect(&t.later.rows[t.later.n], t.bias + (lane_at(t, &p.bias, 0) + block)*size, row*size, t.n_queries,
               (end - block)*size)
        t.later.n += 1
    if t.mask != NULL and p.mask.col == 1 and even_lanes(t, &p.mask, &row):
        expect(&t.later.rows[t.later.n], t.mask + lane_at(t, &p.mask, 0) + block, row, t.n_queries, end - block)
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


cdef void find_operands(Task* t, int64_t block, Py_ssize_t n, bint cut, Operands* of) noexcept nogil:
    # Keys and values of a block: in place, or packed. cut: some lane may not see some key.
    cdef const fastattn_problem* p = t.p
    of.clean = t.careful and cut
    of.poisoned = False
    if t.few:
        few_operands(t, block, n, of)
    else:
        of.packs_k = not (p.pages == NULL and p.key.col == 1
                          and (p.key.kind == FASTATTN_REAL if WORD == 1 else p.key.row % 2 == 0))
        of.packs_v = not (p.pages == NULL and p.value.col == 1 and p.value.kind == FASTATTN_REAL and not of.clean)
        of.k_row = p.D//WORD if of.packs_k else p.key.row//WORD
        of.k = t.packed_k if of.packs_k else <const real*>t.k + block*of.k_row
        of.v_row = p.Dv if of.packs_v else p.value.row
        of.v = t.packed_v if of.packs_v else <const real*>t.v + block*of.v_row
    of.packs_v = of.packs_v and (t.stage == ATTEND or t.stage == DERIVE)
    of.in_turn = t.packed_k == t.packed_v and of.packs_k and of.packs_v
    if of.in_turn:
        return
    if of.packs_k:
        pack_keys(t, block, n, not t.few)
    if of.packs_v:
        of.poisoned = pack_values(t, block, n, not t.few, of.clean)


cdef void key_block(Task* t, int64_t block, int64_t end) noexcept nogil:
    # All lanes against keys [block, end). Neighbouring vectors that see about the same keys form a segment, so that at the
    # edge of a causal or windowed pattern the work follows the visible area.
    cdef const fastattn_problem* p = t.p
    cdef Operands* of = &t.late.of[t.late.side]
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
    t.later.keys.left = 0
    if t.cold and p.value.col == 1 and p.pages == NULL:
        expect(&t.later.rows[0], t.v + block*p.value.row*v_size(p.value.kind), p.value.row*v_size(p.value.kind), n,
               p.Dv*v_size(p.value.kind))
        t.later.n = 1
    if (t.cold and bytes_of_keys(p) > FAR_BYTES and p.key.col == 1 and p.pages == NULL and p.tiles.first == NULL
            and end < t.end):
        expect(&t.later.keys, t.k + end*p.key.row*v_size(p.key.kind), p.key.row*v_size(p.key.kind),
               min(t.end - end, <int64_t>BLOCK), p.D*v_size(p.key.kind))
    expect_masks(t, end, min(t.end, end + BLOCK))
    if how_much == NOTHING:
        return
    if p.reduce == FASTATTN_GRADIENT and p.grad_bias.data != NULL and p.grad_rows == NULL and p.grad_bias.row != 0:
        expect(&t.later.rows[t.later.n], <real*>p.grad_bias.data + offset(p, &p.grad_bias, t.b, t.h, NULL)
               + t.q_begin*p.grad_bias.row + block, p.grad_bias.row*sizeof(real), t.n_queries, n*sizeof(real))
        t.later.n += 1
    find_operands(t, block, n, how_much == PART or t.bias != NULL, of)
    if how_much == ALL:
        parts.n = 1
        parts.begin[0] = 0
        parts.end[0] = n
        any_segment(t, 0, t.vectors, of, block, n, &parts, False)
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
            any_segment(t, first, g - first, of, block, n, &parts, True)
