# Weights that are no softmax, from the final logits s = unit S of a tile:
#
#     sigmoid     P = e / (1 + e),  e = 2^((S - base) κ)     base: minus the shift, in units of S; e comes from the fused loops
#     relu        P = max((S - base) κ - level, 0)           base = level = 0, κ = unit / keys
#     sparsemax   the same                                   base = m, level = t (thresholds.pxi), κ = unit
#     entmax 1.5  P = max((S - base) κ - level, 0)^2         likewise, κ = unit / 2
#
# None of them needs what softmax carries from block to block, so a block is weighed and multiplied, no more. sparsemax and
# entmax 1.5 walk over the keys once before, for the thresholds: a score can be above its row's only if it is above that of the
# keys so far, which few are. Those are listed for each row; a full list is cut to what is above its own threshold. What is
# left in the end are the weights: where every row of the block has such a list and the values are finite, the output is
# gathered from it, which adds the same products in the same order as the second walk, but for those that are 0.
# Rows whose list stays full (nearly equal scores) take a walk for each step of Newton's method instead.
#
# Slopes, g = dp/ds up to a factor that the row has in common:
#
#     sigmoid  P (1 - P)      relu  1 / keys where P > 0      sparsemax  1 where P > 0      entmax 1.5  sqrt P

cdef inline bint has_threshold(const fastattn_problem* p) noexcept nogil:
    return p.normalizer == FASTATTN_SPARSEMAX or p.normalizer == FASTATTN_ENTMAX15


cdef inline bint finds_threshold(const fastattn_problem* p) noexcept nogil:
    # else it is given: lse
    return has_threshold(p) and p.reduce != FASTATTN_GRADIENT and p.reduce != FASTATTN_MEAN


cdef double unit_of(const fastattn_problem* p, bint separate, real* sign) noexcept nogil:
    # > 0; the sign goes into Q, and so does a scale that κ could not hold
    cdef double unit = p.scale if p.scale >= 0 else -p.scale
    sign[0] = 1
    if separate:
        return 1
    if p.scale < 0:
        sign[0] = -1
    if not 1e-18 < unit < 1e18:
        sign[0] *= <real>unit
        return 1
    return unit


cdef double kappa_of(const fastattn_problem* p, double unit, int64_t n_keys) noexcept nogil:
    if p.normalizer == FASTATTN_SIGMOID:
        return unit*1.4426950408889634
    if p.normalizer == FASTATTN_RELU:
        return unit/max(<int64_t>1, n_keys)
    return unit*0.5 if p.normalizer == FASTATTN_ENTMAX15 else unit


cdef void set_references(Task* t, double unit, int64_t n_keys) noexcept nogil:
    # base and level of all lanes, unless they are to be found
    cdef const fastattn_problem* p = t.p
    cdef const real* lse
    cdef double shift = 0
    cdef double x
    cdef Py_ssize_t i
    if p.normalizer == FASTATTN_SIGMOID:
        shift = p.shift if p.shift == p.shift else -log(<double>max(<int64_t>1, n_keys))
    for i in range(LANES):
        t.base[i] = <real>(0 - shift/unit)
        t.level[i] = 0
    if not has_threshold(p) or finds_threshold(p):
        return
    lse = <const real*>base_of(p, &p.lse, t.b, t.h, p.cu_q, False) + t.q_begin*p.lse.row
    for i in range(t.n_queries):
        x = lse[i*p.lse.row]
        if x != -INFINITY:          # else the row sees nothing
            t.base[i] = <real>(x/t.exact_kappa)
            t.level[i] = <real>(x - t.base[i]*t.exact_kappa)


cdef inline vf above_level(vf s, vf base, vf kappa, vf level, const bint squared) noexcept nogil:
    cdef vf x = v_sub(v_mul(v_sub(s, base), kappa), level)
    x = v_where_lt(x, v_zero(), v_zero(), x)        # NaN stays
    return v_mul(x, x) if squared else x


cdef inline void activate_tile(const bint logistic, const bint squared, const bint masked, const Task* t, real* S,
                               Py_ssize_t lane, int vectors, Py_ssize_t n, const uint64_t* seen) noexcept nogil:
    cdef vf k = v_set1(t.kappa)
    cdef vf one = v_set1(1)
    cdef vf most = v_set1(<real>1.8e19)     # e may be infinite
    cdef vf base, level, x
    cdef real* at
    cdef Py_ssize_t j
    cdef int g
    for g in range(vectors):
        base = v_load(t.base + lane + g*VL)
        level = v_load(t.level + lane + g*VL)
        at = S + g*VL
        for j in range(n):
            x = v_load(at + j*LANES)
            if logistic:
                x = v_min(most, x)
                x = v_div(x, v_add(one, x))
            else:
                x = above_level(x, base, k, level, squared)
                if masked:
                    x = v_keep(x, seen[j] >> (lane + g*VL))
            v_store(at + j*LANES, x)


cdef void activate(const Task* t, real* S, Py_ssize_t lane, int vectors, Py_ssize_t n, const uint64_t* seen) noexcept nogil:
    # P, for entmax 1.5 its root where slopes are wanted, of n rows of S: final logits, or e. seen may be NULL.
    cdef bint squared = t.p.normalizer == FASTATTN_ENTMAX15 and t.stage != DERIVE and t.p.reduce != FASTATTN_MEAN
    if t.p.normalizer == FASTATTN_SIGMOID:
        activate_tile(True, False, False, t, S, lane, vectors, n, NULL)
    elif squared and seen != NULL:
        activate_tile(False, True, True, t, S, lane, vectors, n, seen)
    elif squared:
        activate_tile(False, True, False, t, S, lane, vectors, n, NULL)
    elif seen != NULL:
        activate_tile(False, False, True, t, S, lane, vectors, n, seen)
    else:
        activate_tile(False, False, False, t, S, lane, vectors, n, NULL)


cdef inline vf slope_of(const int normalizer, vf p, vf factor) noexcept nogil:
    # of what `activate` leaves; where_lt(0, p, x, p) is x where p > 0, and keeps NaN
    if normalizer == FASTATTN_SIGMOID:
        return v_mul(p, v_sub(v_set1(1), p))
    if normalizer == FASTATTN_ENTMAX15:
        return p
    return v_where_lt(v_zero(), p, factor, p)


cdef void mean_weights(Task* t, int first, int vectors, const Parts* parts) noexcept nogil:
    # P = g, and l += their sums: a block is summed from zero
    cdef bint root = t.p.normalizer == FASTATTN_ENTMAX15
    cdef real* P
    cdef vf total, x
    cdef Py_ssize_t j
    cdef int g, part
    for g in range(first, first + vectors):
        total = v_zero()
        for part in range(parts.n):
            for j in range(parts.begin[part], parts.end[part]):
                P = t.S + j*LANES + g*VL
                x = v_load(P) if root else slope_of(FASTATTN_SPARSEMAX, v_load(P), v_set1(1))
                v_store(P, x)
                total = v_add(total, x)
        v_store(t.l + g*VL, v_add(v_load(t.l + g*VL), total))


cdef inline void slope_tile(const int normalizer, real* P, real* dS, int vectors, Py_ssize_t n, real factor, const real* delta,
                            const uint64_t* seen, const uint64_t* kept, real keep, int shift) noexcept nogil:
    cdef vf f = v_set1(factor)
    cdef vf x, p, g
    cdef Py_ssize_t j
    cdef int v
    for j in range(n):
        for v in range(vectors):
            p = v_load(P + v*VL)
            x = v_load(dS + v*VL)
            g = slope_of(normalizer, p, f)
            if normalizer == FASTATTN_ENTMAX15:
                p = v_mul(p, p)
            if kept != NULL:
                x = v_mul(v_keep(x, kept[j] >> (shift + v*VL)), v_set1(keep))
                p = v_mul(v_keep(p, kept[j] >> (shift + v*VL)), v_set1(keep))
            if normalizer == FASTATTN_ENTMAX15 or kept != NULL:
                v_store(P + v*VL, p)
            x = v_mul(g, v_sub(x, v_load(delta + v*VL)))
            v_store(dS + v*VL, v_keep(x, seen[j] >> (shift + v*VL)) if seen != NULL else x)
        P += LANES
        dS += LANES


cdef void slope_gradients(const Task* t, real* P, real* dS, int vectors, Py_ssize_t n, const real* delta, const uint64_t* seen,
                          const uint64_t* kept, real keep, int shift) noexcept nogil:
    # As score_gradients: dS = g (dS - delta); P becomes the weights.
    cdef int normalizer = t.p.normalizer
    if normalizer == FASTATTN_SIGMOID:
        slope_tile(FASTATTN_SIGMOID, P, dS, vectors, n, 1, delta, seen, kept, keep, shift)
    elif normalizer == FASTATTN_ENTMAX15:
        slope_tile(FASTATTN_ENTMAX15, P, dS, vectors, n, 1, delta, seen, kept, keep, shift)
    else:
        slope_tile(FASTATTN_SPARSEMAX, P, dS, vectors, n, <real>(1/<double>max(<int64_t>1, keys_of(t.p, t.b)))
                   if normalizer == FASTATTN_RELU else 1, delta, seen, kept, keep, shift)


# --- thresholds ------------------------------------------------------------------------------------------------------

cdef void shorten(Task* t, Py_ssize_t i) noexcept nogil:
    # A full list of lane i, cut to what is above its threshold; given up if that is nearly all.
    cdef real* list = t.listed + i*LISTED
    cdef int64_t* keys = t.listed_at + i*LISTED
    cdef Py_ssize_t n = 0
    cdef Py_ssize_t j
    t.level[i] = <real>threshold_of(list, LISTED, t.m[i], t.kappa, t.p.normalizer == FASTATTN_ENTMAX15, t.level[i])
    for j in range(LISTED):
        list[n] = list[j]
        keys[n] = keys[j]
        n += (list[j] - t.m[i])*t.kappa > t.level[i]
    t.n_listed[i] = n
    if n > LISTED_LEFT:
        t.many |= <uint64_t>1 << i


cdef void list_scores(Task* t, int g, int64_t block, const Parts* parts) noexcept nogil:
    # the scores of a vector of lanes that are above its thresholds so far
    cdef vf k = v_set1(t.kappa)
    cdef vf m = v_load(t.m + g*VL)
    cdef vf s
    cdef vf bad = v_zero()
    cdef real lanes[VL]
    cdef uint64_t bits
    cdef Py_ssize_t i, j
    cdef int part
    for part in range(parts.n):
        for j in range(parts.begin[part], parts.end[part]):
            s = v_load(t.S + j*LANES + g*VL)
            bits = v_above_bits(v_mul(v_sub(s, m), k), v_load(t.level + g*VL)) & ~(t.many >> g*VL)
            bad = v_fma(v_where_lt(s, v_zero(), v_zero(), s), v_zero(), bad)      # NaN of NaN and of +inf
            while bits != 0:
                i = g*VL + bits_first(bits)
                bits &= bits - 1
                t.listed[i*LISTED + t.n_listed[i]] = t.S[j*LANES + i]
                t.listed_at[i*LISTED + t.n_listed[i]] = block + j
                t.n_listed[i] += 1
                if t.n_listed[i] == LISTED:
                    shorten(t, i)
    if v_any_nan(bad):
        v_store(lanes, bad)
        for i in range(VL):
            t.nan_rows |= <uint64_t>(lanes[i] != lanes[i]) << (g*VL + i)


cdef void sum_above(const Task* t, int g, const Parts* parts, real* sums) noexcept nogil:
    # What a step of Newton's method takes of a block: sums[0] += the sum of the terms, sums[LANES] += the slope.
    cdef bint squared = t.p.normalizer == FASTATTN_ENTMAX15
    cdef vf k = v_set1(t.kappa)
    cdef vf m = v_load(t.m + g*VL)
    cdef vf level = v_load(t.level + g*VL)
    cdef vf total = v_zero()
    cdef vf slope = v_zero()
    cdef vf x
    cdef Py_ssize_t j
    cdef int part
    for part in range(parts.n):
        for j in range(parts.begin[part], parts.end[part]):
            x = v_sub(v_mul(v_sub(v_load(t.S + j*LANES + g*VL), m), k), level)
            x = v_max(x, v_zero())
            if squared:
                slope = v_add(slope, x)
                total = v_fma(x, x, total)
            else:
                slope = v_add(slope, v_where_lt(v_zero(), x, v_set1(1), v_zero()))
                total = v_add(total, x)
    v_store(sums, v_add(v_load(sums), total))
    v_store(sums + LANES, v_add(v_load(sums + LANES), slope))


cdef void first_levels(Task* t, int g, const Parts* parts) noexcept nogil:
    # Lanes whose first block this is: a level not far below the threshold of the block alone keeps their lists short. A few
    # steps of Newton's method, and a margin for their rounding.
    cdef real* sums = t.total + g*VL
    cdef vf old = v_load(t.level + g*VL)
    cdef vf factor = v_set1(<real>0.5 if t.p.normalizer == FASTATTN_ENTMAX15 else 1)
    cdef vf x
    cdef uint64_t lanes = 0
    cdef Py_ssize_t i
    for i in range(VL):
        lanes |= <uint64_t>(t.n_listed[g*VL + i] == 0) << i
    if lanes == 0:
        return
    for i in range(FIRST_STEPS):
        v_store(sums, v_zero())
        v_store(sums + LANES, v_zero())
        sum_above(t, g, parts, sums)
        x = v_mul(v_div(v_sub(v_load(sums), v_set1(1)), v_load(sums + LANES)), factor)
        x = v_max(v_add(v_load(t.level + g*VL), x), v_load(t.level + g*VL))         # NaN where nothing is seen
        v_store(t.level + g*VL, x)
    x = v_max(v_sub(x, v_set1(<real>0.0009765625)), old)
    v_store(t.level + g*VL, v_select(lanes, x, old))


cdef void threshold_segment(Task* t, int first, int vectors, const Operands* of, int64_t block, const Parts* parts,
                            bint masked) noexcept nogil:
    # As `segment`.
    cdef Py_ssize_t lane = first*VL
    cdef vf old, new
    cdef int part, g
    for part in range(parts.n):
        logits(t, first, vectors, of, block, parts.begin[part], parts.end[part] - parts.begin[part], masked)
    for g in range(first, first + vectors):
        if t.stage == RAISE:
            sum_above(t, g, parts, t.total + g*VL)
            continue
        maximum(1, t.S + g*VL, parts, t.before + g*VL)
        old = v_load(t.m + g*VL)
        new = v_max(v_load(t.before + g*VL), old)
        v_store(t.m + g*VL, new)
        # relative to the new maximum; -1 where there was none, whose difference is infinite or NaN
        new = v_sub(v_load(t.level + g*VL), v_mul(v_sub(new, old), v_set1(t.kappa)))
        v_store(t.level + g*VL, v_max(new, v_set1(-1)))
        first_levels(t, g, parts)
        list_scores(t, g, block, parts)


cdef bint find_thresholds(Task* t, bint caller) noexcept nogil:
    # m and t of all lanes, as base and level; False if the call was abandoned
    cdef bint squared = t.p.normalizer == FASTATTN_ENTMAX15
    cdef double next
    cdef Py_ssize_t i
    cdef bint more
    t.stage = FIND
    t.nan_rows = 0
    t.many = 0 if t.n_queries == 64 else ~<uint64_t>0 << t.n_queries        # lanes without a row
    for i in range(LANES):
        t.m[i] = -INFINITY
        t.level[i] = -1
        t.n_listed[i] = 0
    if not walk(t, 1, caller):
        return False
    for i in range(t.n_queries):
        if t.many >> i & 1 == 0 and t.n_listed[i] > 0:
            t.level[i] = <real>threshold_of(t.listed + i*LISTED, t.n_listed[i], t.m[i], t.kappa, squared, t.level[i])
    t.stage = RAISE
    more = (t.many & ~t.nan_rows & ~<uint64_t>0 >> (64 - t.n_queries)) != 0
    while more:
        for i in range(2*LANES):
            t.total[i] = 0
        if not walk(t, 1, caller):
            return False
        more = False
        for i in range(t.n_queries):
            if t.many >> i & 1 and not t.nan_rows >> i & 1:
                next = newton_step(t.level[i], t.total[i], t.total[LANES + i], squared)
                more |= <real>next > t.level[i]
                t.level[i] = <real>next
    for i in range(LANES):
        t.base[i] = t.m[i]
        if t.m[i] == -INFINITY:
            # Nothing is visible, or all visible scores are -inf, which came from infinite inputs.
            t.base[i] = 0
            t.level[i] = 0
            if i < t.n_queries and sees_any(t, i):
                t.nan_rows |= <uint64_t>1 << i
        if t.nan_rows >> i & 1:
            t.level[i] = NAN
    t.stage = ATTEND
    t.gathers = ((t.many & ~<uint64_t>0 >> (64 - t.n_queries)) | t.nan_rows) == 0 and gatherable(t)
    return True


cdef bint gatherable(const Task* t) noexcept nogil:
    # Finite values that are read in place. 0 · NaN is NaN, which a list of weights would not see.
    cdef const fastattn_array* a = &t.p.value
    return (t.p.reduce == FASTATTN_OUTPUT and t.pages == NULL and a.kind == FASTATTN_REAL and a.col == 1
            and (t.begin >= t.end or all_finite(<const real*>t.v + t.begin*a.row, a.row, t.end - t.begin, t.p.Dv)))


cdef Py_ssize_t list_weights(Task* t, Py_ssize_t i) noexcept nogil:
    # The list of lane i becomes its weights, those that are 0 left out; their number.
    cdef bint squared = t.p.normalizer == FASTATTN_ENTMAX15
    cdef real* list = t.listed + i*LISTED
    cdef int64_t* keys = t.listed_at + i*LISTED
    cdef uint64_t kept[4]
    cdef vf base = v_set1(t.base[i])
    cdef vf k = v_set1(t.kappa)
    cdef vf level = v_set1(t.level[i])
    cdef Py_ssize_t n = 0
    cdef Py_ssize_t j = 0
    while j < t.n_listed[i]:
        v_store(list + j, above_level(v_load(list + j), base, k, level, True) if squared
                else above_level(v_load(list + j), base, k, level, False))
        j += VL
    for j in range(t.n_listed[i]):
        list[n] = list[j]
        keys[n] = keys[j]
        if list[j] > 0 and t.p.dropout != 0:
            v_kept(<unsigned int>(keys[j]//4), <unsigned int>(t.q_begin + i), <unsigned int>t.h, <unsigned int>t.b, t.p.seed,
                   t.p.dropout, 1, kept)
            n += kept[keys[j] % 4] & 1
        else:
            n += list[j] > 0
    return n


cdef inline void gather_columns(const int nv, const Task* t, const real* P, const int64_t* keys, Py_ssize_t n, Py_ssize_t d,
                                char* out, int64_t at, real factor) noexcept nogil:
    # out[at + d : + nv VL] = sum of P V: a block of keys is summed from zero, as product_t does it
    cdef const fastattn_array* a = &t.p.out
    cdef const real* v = <const real*>t.v + d
    cdef const real* row
    cdef vf acc[4]
    cdef vf sums[4]
    cdef Py_ssize_t Dv = t.p.Dv - d
    cdef Py_ssize_t j = 0
    cdef int64_t block
    cdef int u
    for u in range(nv):
        sums[u] = v_zero()
    while j < n:
        block = keys[j] - keys[j] % BLOCK
        for u in range(nv):
            acc[u] = v_zero()
        while j < n and keys[j] < block + BLOCK:
            row = v + keys[j]*t.p.value.row
            for u in range(nv):
                acc[u] = v_fma(v_set1(P[j]), v_load_part(row + u*VL, Dv - u*VL) if nv == 1 else v_load(row + u*VL), acc[u])
            j += 1
        for u in range(nv):
            sums[u] = v_add(sums[u], acc[u])
    for u in range(nv):
        v_store_as(out, at + (d + u*VL)*a.col, a.col, v_mul(sums[u], v_set1(factor)), Dv - u*VL, a.kind)


cdef void gather_out(Task* t, char* out) noexcept nogil:
    cdef Py_ssize_t i, d, n
    for i in range(t.n_queries):
        n = list_weights(t, i)
        d = 0
        while t.p.Dv - d >= 4*VL:
            gather_columns(4, t, t.listed + i*LISTED, t.listed_at + i*LISTED, n, d, out, lane_at(t, &t.p.out, i), t.c[i])
            d += 4*VL
        while d < t.p.Dv:
            gather_columns(1, t, t.listed + i*LISTED, t.listed_at + i*LISTED, n, d, out, lane_at(t, &t.p.out, i), t.c[i])
            d += VL


# --- behind the last block -------------------------------------------------------------------------------------------

cdef void settle_rows(Task* t, real* lse) noexcept nogil:
    # As `normalise`: c, and what takes the place of the log-sum-exp.
    cdef const fastattn_problem* p = t.p
    cdef Py_ssize_t i
    cdef double x
    for i in range(t.vectors*VL):
        t.c[i] = 1
        if p.reduce == FASTATTN_MEAN:
            t.c[i] = 1/t.l[i] if t.l[i] != 0 else <real>0
    for i in range(t.n_queries):
        if lse != NULL:
            x = t.level[i] + t.base[i]*<double>t.exact_kappa if has_threshold(p) else 0
            lse[lane_at(t, &p.lse, i)] = <real>x if sees_any(t, i) else -INFINITY


cdef double weight_of(const Task* t, Py_ssize_t i, double s) noexcept nogil:
    # P of lane i and a score s of S
    cdef double x = (s - t.base[i])*t.exact_kappa - t.level[i]
    if t.p.normalizer == FASTATTN_SIGMOID:
        return 1/(1 + exp(-0.69314718055994530942*x))
    if x < 0:
        return 0
    return x*x if t.p.normalizer == FASTATTN_ENTMAX15 else x


cdef void add_plain_entropy(Task* t, int first, int vectors, const Parts* parts) noexcept nogil:
    # l -= sum_j p ln p of weights that are no softmax. Of a sigmoid's, `total` has the sums of what they are made of.
    cdef Py_ssize_t i, j
    cdef int part
    cdef double total, p
    for i in range(first*VL, (first + vectors)*VL):
        total = 0
        for part in range(parts.n):
            for j in range(parts.begin[part], parts.end[part]):
                p = t.S[j*LANES + i]
                total += p*log(p) if p != 0 else 0
        t.l[i] = <real>(t.l[i] - total)
