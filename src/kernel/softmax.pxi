# One block of keys through the online softmax (Milakov & Gimelshein 2018), on tiles whose lanes are queries:
#
#     m' = m, or the block's maximum where a weight would pass 2^HEADROOM                   new_reference
#     P_j = 2^((S_j - m') κ)                                               weigh, or fused_plain, fused_masked with S = K Qt
#     l' = l c + sum_j P_j,  c = 2^((m - m') κ)                                             add_sums
#
# κ = scale · log2 e turns the exponential into 2^x. It is applied to the difference, so that the rounding of the scale is
# small where the weight is large, and equal scores weigh the same however large they are: rows that a bias of -1e30 hides
# throughout are uniform. Maximum, exponential and sum are vertical: no lane ever meets another.
#
# m is a reference, not the maximum: weights up to 2^HEADROOM lose nothing, and m then rarely moves after the first block.
# So a later block is weighed with the m it finds, which lets the fused functions weigh a tile of scores while the next one is
# multiplied: the exponential's latency and its additions disappear behind the FMAs. Where the sum of the weights then shows
# that a score outgrew m, the block is done again with a new one. Both ways give the same bits.
#
# l is summed in pairs of keys, CHAINS interleaved chains of pairs by their place in the block, then a tree: a single chain of
# 96 would be the largest error of short sequences, and a grouping by tile would make bits depend on the tiling.
#
# Guards: a lane that has seen no key yet has m = -inf, and -inf - (-inf) would be NaN: its `base` is 0 instead.
# v_max drops a NaN score; the exponential keeps it, so P, l and the output become NaN as IEEE says.

cdef inline vf weight(vf s, vf base, vf kappa, const bint masked, uint64_t seen) noexcept nogil:
    # 2^((s - base) κ), and 0 for lanes that do not see the key, whatever its score
    cdef vf x = v_exp2(v_mul(v_sub(s, base), kappa))
    return v_keep(x, seen) if masked else x


cdef inline void weigh(const int nv, const bint masked, const bint words, real* S, Py_ssize_t n, real kappa, const real* m,
                       real* total, Py_ssize_t first, const uint64_t* seen, int shift) noexcept nogil:
    # P = 2^((S - m) κ) in place for n rows of a block, from its even row `first` on, and their sums. seen[j] >> shift: the
    # lanes that see row j. `words`: pairs of rows become one word each, in the place of the first.
    cdef vf base[4]
    cdef vf k = v_set1(kappa)
    cdef vf x, y
    cdef real* chain
    cdef Py_ssize_t j = 0
    cdef bint pair
    cdef int g
    for g in range(nv):
        base[g] = v_load(m + g*VL)
    while j < n:
        chain = total + (first + j)//2 % CHAINS*LANES
        pair = j + 1 < n
        for g in range(nv):
            x = weight(v_load(S + g*VL), base[g], k, masked, seen[j] >> (shift + g*VL) if masked else 0)
            y = v_zero()
            if pair:
                y = weight(v_load(S + LANES + g*VL), base[g], k, masked, seen[j + 1] >> (shift + g*VL) if masked else 0)
                if not words:
                    v_store(S + LANES + g*VL, y)
            v_store(S + g*VL, v_pair(x, y) if words else x)
            if pair:
                x = v_add(x, y)
            v_store(chain + g*VL, v_add(v_load(chain + g*VL), x))
        j += 2
        S += 2*LANES


cdef inline void weigh_vectors(const bint masked, const bint words, int vectors, real* S, Py_ssize_t n, real kappa,
                               const real* m, real* total, Py_ssize_t first, const uint64_t* seen, int shift) noexcept nogil:
    while vectors >= 4 and not masked:
        weigh(4, False, words, S, n, kappa, m, total, first, seen, shift)
        S += 4*VL
        m += 4*VL
        total += 4*VL
        vectors -= 4
    if vectors == 3 and not masked:
        weigh(3, False, words, S, n, kappa, m, total, first, seen, shift)
        return
    while vectors >= 2:
        weigh(2, masked, words, S, n, kappa, m, total, first, seen, shift)
        S += 2*VL
        m += 2*VL
        total += 2*VL
        shift += 2*VL
        vectors -= 2
    if vectors == 1:
        weigh(1, masked, words, S, n, kappa, m, total, first, seen, shift)


cdef void weigh_rows(int vectors, real* S, Py_ssize_t n, real kappa, const real* m, real* total, Py_ssize_t first,
                     bint words) noexcept nogil:
    if WORD == 2 and words:
        weigh_vectors(False, True, vectors, S, n, kappa, m, total, first, NULL, 0)
    else:
        weigh_vectors(False, False, vectors, S, n, kappa, m, total, first, NULL, 0)


cdef void weigh_masked(int vectors, real* S, Py_ssize_t n, real kappa, const real* m, real* total, Py_ssize_t first,
                       const uint64_t* seen, int shift) noexcept nogil:
    weigh_vectors(True, WORD == 2, vectors, S, n, kappa, m, total, first, seen, shift)


cdef void clear_chains(int vectors, real* total) noexcept nogil:
    cdef int g, j
    for j in range(CHAINS):
        for g in range(vectors):
            v_store(total + j*LANES + g*VL, v_zero())


cdef inline vf sum_chains(const real* total) noexcept nogil:
    # a tree over the eight chains of one vector
    cdef vf s[CHAINS]
    cdef int j
    for j in range(CHAINS):
        s[j] = v_load(total + j*LANES)
    return v_add(v_add(v_add(s[0], s[4]), v_add(s[2], s[6])), v_add(v_add(s[1], s[5]), v_add(s[3], s[7])))


cdef inline void tile_n_weighing(const int mr, const int nv, const bint masked, const real* A, Py_ssize_t lda,
                                 const real* B, Py_ssize_t n, real* C, How how, real scale, real* W, real kappa,
                                 const real* m, real* total, Py_ssize_t first, const uint64_t* seen,
                                 int shift) noexcept nogil:
    # tile_n, and between its steps over k rows [first, first + mr) of the block, at W, become weights; first and mr are even.
    # mr * nv accumulators stay in registers: what the exponential needs besides is read from memory each time.
    cdef vf acc[16][4]
    cdef vf b[4]
    cdef vf a, x, y
    cdef Py_ssize_t k = 0
    cdef Py_ssize_t stop
    cdef int i, j, r
    cdef real* chain
    for i in range(mr):
        for j in range(nv):
            acc[i][j] = v_zero()
    for r in range(mr):
        chain = total + (first + r)//2 % CHAINS*LANES
        for j in range(nv):
            x = weight(v_load(W + r*LANES + j*VL), v_load(m + j*VL), v_set1(kappa), masked,
                       seen[r] >> (shift + j*VL) if masked else 0)
            if WORD == 1 or r % 2 == 0:
                v_store(W + r*LANES + j*VL, x)
            if r % 2 == 1:
                y = v_load(W + (r - 1)*LANES + j*VL)
                if WORD == 2:
                    v_store(W + (r - 1)*LANES + j*VL, v_pair(y, x))
                v_store(chain + j*VL, v_add(v_load(chain + j*VL), v_add(y, x)))
        stop = n*(r + 1)//mr
        while k < stop:
            for j in range(nv):
                b[j] = v_load(B + k*LANES + j*VL)
            for i in range(mr):
                a = v_word(A + i*lda + k)
                for j in range(nv):
                    acc[i][j] = v_dot(a, b[j], acc[i][j])
            k += 1
    store_tile(mr, nv, acc, C, LANES, how, scale, NULL)


cdef bint add_sums(int vectors, const real* total, const real* c, real* l) noexcept nogil:
    # l = l c + sums. Returns whether a sum, so perhaps a weight, went past 2^HEADROOM.
    cdef vf above = v_zero()
    cdef vf s
    cdef int g
    for g in range(vectors):
        s = sum_chains(total + g*VL)
        v_store(l + g*VL, v_fma(v_load(l + g*VL), v_load(c + g*VL), s))
        above = v_max(s, above)
    return v_any_above(above, 1 << HEADROOM)


cdef inline void fused_columns(const int nv, const bint masked, const real* A, Py_ssize_t lda, const real* B, Py_ssize_t n,
                               real* S, How how, real scale, Py_ssize_t n_keys, real kappa, const real* m, real* total,
                               Py_ssize_t first, const uint64_t* seen, int shift, Ahead* later) noexcept nogil:
    # Rows [first, first + n_keys) of the block, first even: S = 2^((A B - m) κ), and their sums.
    cdef real* waiting = S
    cdef Py_ssize_t left = n_keys
    if left >= rows_of(nv):
        fetch(rows_of(nv), A + rows_of(nv)*lda, lda, n, left - rows_of(nv), later)
        tile_n(rows_of(nv), nv, A, lda, B, LANES, n, S, LANES, how, scale, NULL)
        A += rows_of(nv)*lda
        S += rows_of(nv)*LANES
        left -= rows_of(nv)
    while left >= rows_of(nv):
        fetch(rows_of(nv), A + rows_of(nv)*lda, lda, n, left - rows_of(nv), later)
        tile_n_weighing(rows_of(nv), nv, masked, A, lda, B, n, S, how, scale, waiting, kappa, m, total, first, seen, shift)
        waiting = S
        first += rows_of(nv)
        seen += rows_of(nv)
        A += rows_of(nv)*lda
        S += rows_of(nv)*LANES
        left -= rows_of(nv)
    columns_n(nv, A, lda, B, LANES, n, S, LANES, left, how, scale, NULL, later)
    if masked:
        weigh_masked(nv, waiting, (S - waiting)//LANES + left, kappa, m, total, first, seen, shift)
    else:
        weigh_rows(nv, waiting, (S - waiting)//LANES + left, kappa, m, total, first, True)


cdef inline void fused_groups(const bint masked, int vectors, const real* A, Py_ssize_t lda, const real* B, Py_ssize_t n,
                              real* S, How how, real scale, Py_ssize_t n_keys, real kappa, const real* m, real* total,
                              Py_ssize_t first, const uint64_t* seen, int shift, Ahead* later) noexcept nogil:
    while vectors >= GROUP:
        fused_columns(GROUP, masked, A, lda, B, n, S, how, scale, n_keys, kappa, m, total, first, seen, shift, later)
        B += GROUP*VL
        S += GROUP*VL
        m += GROUP*VL
        total += GROUP*VL
        shift += GROUP*VL
        vectors -= GROUP
    if GROUP > 3 and vectors == 3:
        fused_columns(3, masked, A, lda, B, n, S, how, scale, n_keys, kappa, m, total, first, seen, shift, later)
    elif GROUP > 2 and vectors == 2:
        fused_columns(2, masked, A, lda, B, n, S, how, scale, n_keys, kappa, m, total, first, seen, shift, later)
    elif vectors == 1:
        fused_columns(1, masked, A, lda, B, n, S, how, scale, n_keys, kappa, m, total, first, seen, shift, later)


cdef void fused_plain(int vectors, const real* A, Py_ssize_t lda, const real* B, Py_ssize_t n, real* S, How how, real scale,
                      Py_ssize_t n_keys, real kappa, const real* m, real* total, Py_ssize_t first,
                      Ahead* later) noexcept nogil:
    fused_groups(False, vectors, A, lda, B, n, S, how, scale, n_keys, kappa, m, total, first, NULL, 0, later)


cdef void fused_masked(int vectors, const real* A, Py_ssize_t lda, const real* B, Py_ssize_t n, real* S, How how, real scale,
                       Py_ssize_t n_keys, real kappa, const real* m, real* total, Py_ssize_t first, const uint64_t* seen,
                       int shift, Ahead* later) noexcept nogil:
    fused_groups(True, vectors, A, lda, B, n, S, how, scale, n_keys, kappa, m, total, first, seen, shift, later)


cdef inline void maximum(const int nv, const real* S, const Parts* parts, real* result) noexcept nogil:
    cdef vf top[4]
    cdef Py_ssize_t j
    cdef int g, part
    for g in range(nv):
        top[g] = v_set1(-INFINITY)
    for part in range(parts.n):
        for j in range(parts.begin[part], parts.end[part]):
            for g in range(nv):
                top[g] = v_max(v_load(S + j*LANES + g*VL), top[g])
    for g in range(nv):
        v_store(result + g*VL, top[g])


cdef inline void move_reference(real kappa, Py_ssize_t n, real* m, real* base, real* c) noexcept nogil:
    # base holds the maxima of n rows, VL at most: where the weight of one would pass 2^HEADROOM, it becomes m.
    cdef vf k = v_set1(kappa)
    cdef vf top = v_load_part(base, n)
    cdef vf old = v_load_part(m, n)
    cdef vf new = v_where_lt(v_set1(HEADROOM), v_mul(v_sub(top, old), k), top, old)
    v_store_part(m, new, n)
    new = v_where_lt(new, v_set1(-REAL_MAX), v_zero(), new)
    v_store_part(base, new, n)
    v_store_part(c, v_exp2(v_mul(v_sub(old, new), k)), n)


cdef void new_reference(int vectors, const real* S, const Parts* parts, real kappa, real* m, real* base,
                        real* c) noexcept nogil:
    # Move m to the maximum of the block's rows that take part where its weight would pass 2^HEADROOM.
    cdef int g = 0
    while g + 4 <= vectors:
        maximum(4, S + g*VL, parts, base + g*VL)
        g += 4
    while g < vectors:
        maximum(1, S + g*VL, parts, base + g*VL)
        g += 1
    for g in range(vectors):
        move_reference(kappa, VL, m + g*VL, base + g*VL, c + g*VL)
