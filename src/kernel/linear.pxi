# Linear attention: softmax's exponential is replaced by a product of features φ, so sums over the keys are made once.
#
#     out_i = φ(q_i) · R / φ(q_i) · r        R [F][Dv] = sum_j φ(k_j) v_jᵀ, r [F] = sum_j φ(k_j);  j <= i where it is causal
#
# With v' = [v, 1] both are one state R [F][N], N = Dv + 1. With g' = [g / z, -g · out / z], z the normaliser φ(q_i) · r,
#
#     dφ(q_i) = R g'_i            dφ(k_j) = R' v'_j,  dv_j = R'ᵀ φ(k_j)            R' = sum_i φ(q_i) g'_iᵀ, over i >= j
#
# so the three modes are one walk over rows of two sides: sources, which join the state, and lanes, which read it.
#
#     mode         sources: features Bt, values C     lanes: features At, values Vt       of each lane
#     OUTPUT       keys    φ(k)  v'                   queries  φ(q)                       Ot = Rᵀ At
#     QUERY        keys    φ(k)  v'                   queries        g'                   Et = R Vt
#     KEY          queries φ(q)  g'                   keys     φ(k)  v'                   both; the walk goes backwards
#
# The walk goes in chunks of LANES rows. What comes before a chunk is in the state; within it, S is [sources][lanes], 0 where
# the lane does not see the source:
#
#     Ot = Cᵀ (Btᵀ At) + Rᵀ At        product T, T, T         Bt, At [F][LANES]   C [LANES][W]   Vt [N][LANES]
#     Et = Bt (C Vt) + R Vt           product N, N, N         Et [F][LANES]       R [F][W], W = N up to whole vectors
#     R += Bt C                       product N
#
# Row Dv of Ot, the normalizer, is summed beside the products, and v is read where it lies if that will do.
#
# A segment of SEGMENT rows is summed from zero, T, and joins the sums of those before it, `prefix`, at its end; the state of a
# chunk is prefix + T. So the sums of segments can be made at once, by tasks of their own (SUMS), then added in order
# (PREFIX), then used (ROWS), and have the same bits as those of one walk (WALK), which does a product less.
#
# `careful`: 0 · NaN must not reach a sum. Where a chunk's C or Bt is not finite, the products over its sources leave out
# what a lane does not see, in the order of the products.

cdef extern from *:
    enum: SEGMENT "FASTATTN_LINEAR_SEGMENT"

cdef enum:
    HALF = LANES//2         # the triangle of a chunk is done in two halves of lanes: a quarter of it is left out


cdef struct Linear:
    const fastattn_linear* p
    Py_ssize_t F, D, N, W
    int64_t b, h_kv
    bint backwards, values, features    # what lanes want: Ot, Et
    bint careful
    Parts parts
    Ahead later
    real* Bt                            # [F][LANES]
    real* At                            # [F][LANES]
    real* Xb                            # [D][LANES] the rows themselves, where φ is a product
    real* Xa                            # [D][LANES]; then the gradient of the lanes' rows
    real* C                             # [LANES][W]
    const real* rows                    # C, or where v lies if that will do: rows of v without the 1, ld apart
    Py_ssize_t ld
    real* V                             # [LANES][W]
    real* Vt                            # [N][LANES]
    real* S                             # [LANES][LANES]
    real* Ot                            # [N][LANES]
    real* Et                            # [F][LANES]
    real* T                             # [F][W]
    real* prefix                        # [F][W]
    real* state                         # [F][W] prefix + T
    real* ones                          # [LANES]
    real* factor                        # [LANES]
    real* end                           # [F][W] of the task's head, outside


cdef inline char* rows_at(const fastattn_linear* p, const fastattn_array* a, int64_t b, int64_t h,
                          int64_t row) noexcept nogil:
    cdef int64_t at = h*a.head + row*a.row
    cdef int i = p.n_lead - 1
    while i >= 0:
        at += b % p.lead[i]*a.lead[i]
        b //= p.lead[i]
        i -= 1
    return <char*>a.data + at*v_size(a.kind)


cdef inline int64_t visible_keys(const fastattn_linear* p, int64_t b) noexcept nogil:
    return p.kv_lengths[b] if p.kv_lengths != NULL else p.S


cdef inline int64_t n_sources(const fastattn_linear* p, int64_t b) noexcept nogil:
    return p.L if p.mode == FASTATTN_LINEAR_KEY else visible_keys(p, b)


cdef inline int64_t n_lanes(const fastattn_linear* p, int64_t b) noexcept nogil:
    return visible_keys(p, b) if p.mode == FASTATTN_LINEAR_KEY else p.L


# --- features --------------------------------------------------------------------------------------------------------

cdef inline vf elu_plus_one(vf x) noexcept nogil:
    # x + 1 or e^x; NaN comes out of the exponential
    return v_where_lt(v_zero(), x, v_add(x, v_set1(1)), v_exp2(v_mul(x, v_set1(<real>1.4426950408889634074))))


cdef void apply_map(int map, real* X, Py_ssize_t F, int vectors) noexcept nogil:
    cdef Py_ssize_t f
    cdef int g
    for f in range(F):
        for g in range(vectors):
            if map == FASTATTN_LINEAR_ELU:
                v_store(X + f*LANES + g*VL, elu_plus_one(v_load(X + f*LANES + g*VL)))
            else:
                v_store(X + f*LANES + g*VL, v_max(v_zero(), v_load(X + f*LANES + g*VL)))


cdef void random_features(const Linear* t, bint of_query, const real* Xt, real* X, int vectors) noexcept nogil:
    # 2^(ω·q + c - their largest), and 2^(ω·k - |k|² / 2 - c): the first factor cancels in out, and c, of each feature, keeps
    # the second in range whatever k is
    cdef const real* shift = <const real*>t.p.shift
    cdef vf top, square, x
    cdef Py_ssize_t f, d
    cdef int g
    product_n(vectors, <const real*>t.p.projection, t.D, Xt, t.D, X, t.F, STORE, 1, &t.later)
    for g in range(vectors):
        if of_query:
            top = v_set1(-INFINITY)
            for f in range(t.F):
                x = v_add(v_load(X + f*LANES + g*VL), v_set1(shift[f]))
                v_store(X + f*LANES + g*VL, x)
                top = v_max(x, top)
            for f in range(t.F):
                v_store(X + f*LANES + g*VL, v_exp2(v_sub(v_load(X + f*LANES + g*VL), top)))
        else:
            square = v_zero()
            for d in range(t.D):
                x = v_load(Xt + d*LANES + g*VL)
                square = v_fma(x, x, square)
            square = v_mul(square, v_set1(<real>t.p.half))
            for f in range(t.F):
                x = v_sub(v_load(X + f*LANES + g*VL), square)
                v_store(X + f*LANES + g*VL, v_exp2(v_sub(x, v_set1(shift[f]))))


cdef void pack_features(const Linear* t, bint of_query, int64_t h, int64_t first, Py_ssize_t n, real* Xt,
                        real* X) noexcept nogil:
    # X[f, i] = φ(row first + i); anything in lanes behind the last row
    cdef const fastattn_linear* p = t.p
    cdef const fastattn_array* a = &p.query if of_query else &p.key
    cdef int vectors = <int>((n + VL - 1)//VL)
    cdef const char* rows = rows_at(p, a, t.b, h, first)
    if p.map == FASTATTN_LINEAR_RANDOM:
        pack_queries(rows, a.row, a.col, a.kind, n, vectors, t.D, 1, Xt)
        random_features(t, of_query, Xt, X, vectors)
    else:
        pack_queries(rows, a.row, a.col, a.kind, n, vectors, t.D, 1, X)
        apply_map(p.map, X, t.F, vectors)


cdef void times_slope(const Linear* t, bint of_query, int vectors) noexcept nogil:
    # Xa[d, i] = the gradient of row i, from Et, that of its features, which are At
    cdef const fastattn_linear* p = t.p
    cdef real* Y = t.Xa
    cdef vf x, y, total
    cdef Py_ssize_t f, d, at
    cdef int g
    for f in range(t.F):
        for g in range(vectors):
            at = f*LANES + g*VL
            x = v_load(t.At + at)
            y = v_load(t.Et + at)
            if p.map == FASTATTN_LINEAR_ELU:        # the slope is 1 above, and φ itself below 1
                v_store(Y + at, v_mul(y, v_where_lt(v_set1(1), x, v_set1(1), x)))
            elif p.map == FASTATTN_LINEAR_RELU:     # the second choice is 0 or NaN
                v_store(Y + at, v_where_lt(v_zero(), x, y, v_mul(x, v_zero())))
            else:
                v_store(t.Et + at, v_mul(v_mul(x, y), v_set1(<real>0.69314718055994530942)))
    if p.map != FASTATTN_LINEAR_RANDOM:
        return
    # sum_f E_f (ω_f - |k|'s share)
    for g in range(vectors):
        total = v_zero()
        for f in range(t.F):
            total = v_add(total, v_load(t.Et + f*LANES + g*VL))
        total = v_mul(total, v_set1(0 if of_query else <real>(-2*p.half)))
        for d in range(t.D):
            at = d*LANES + g*VL
            v_store(Y + at, v_zero() if of_query else v_mul(v_load(Y + at), total))
    product_t(vectors, <const real*>p.projection, t.D, t.Et, all_of(t, t.F), Y, t.D, t.ones, NULL)


# --- values ----------------------------------------------------------------------------------------------------------

cdef void unpack_values(const Linear* t, int64_t h, int64_t first, Py_ssize_t n, real* rows) noexcept nogil:
    # rows[i] = [v, 1, 0 ...]
    cdef const fastattn_array* a = &t.p.value
    cdef const char* data = rows_at(t.p, a, t.b, h, first)
    cdef Py_ssize_t Dv = t.p.Dv
    cdef Py_ssize_t inside = Dv//VL*VL if a.kind == FASTATTN_REAL and a.col == 1 else 0
    cdef Py_ssize_t i, d
    cdef const real* from_
    cdef real* row
    for i in range(n):
        row = rows + i*t.W
        from_ = <const real*>data + i*a.row     # read where it is reals
        d = 0
        while d < inside:
            v_store(row + d, v_load(from_ + d))
            d += VL
        while d < t.W:
            v_store(row + d, load_row(data, i*a.row + d*a.col, a.col, Dv - d, a.kind) if d < Dv else v_zero())
            d += VL
        row[Dv] = 1


cdef bint in_place(Linear* t, int64_t h, int64_t first) noexcept nogil:
    # Values are read where they lie if they fill whole vectors and none of the products wants the 1 behind them.
    cdef const fastattn_array* a = &t.p.value
    if t.features or a.kind != FASTATTN_REAL or a.col != 1 or t.p.Dv % VL != 0:
        return False
    t.rows, t.ld = <const real*>rows_at(t.p, a, t.b, h, first), a.row
    return True


cdef void unpack_gradients(const Linear* t, int64_t h, int64_t first, Py_ssize_t n, real* rows) noexcept nogil:
    # rows[i] = [g, -g · out, 0 ...] / z; zero where z is
    cdef const fastattn_linear* p = t.p
    cdef const char* grad = rows_at(p, &p.grad_out, t.b, h, first)
    cdef const char* out = rows_at(p, &p.out, t.b, h, first)
    cdef const real* z = <const real*>rows_at(p, &p.normalizer, t.b, h, first)
    cdef Py_ssize_t i, d
    cdef vf g, total, factor
    cdef real* row
    for i in range(n):
        row = rows + i*t.W
        memset(row, 0, t.W*sizeof(real))
        if z[i*p.normalizer.row] == 0:
            continue
        factor = v_set1(1/z[i*p.normalizer.row])
        total = v_zero()
        d = 0
        while d < p.Dv:
            g = v_mul(factor, load_row(grad, i*p.grad_out.row + d*p.grad_out.col, p.grad_out.col, p.Dv - d, p.grad_out.kind))
            total = v_fma(g, load_row(out, i*p.out.row + d*p.out.col, p.out.col, p.Dv - d, p.out.kind), total)
            v_store(row + d, g)
            d += VL
        row[p.Dv] = -sum_lanes(total)


cdef bint finite_part(const real* x, Py_ssize_t ld, Py_ssize_t m, Py_ssize_t n) noexcept nogil:
    # of x[m, n]; four sums, for one would wait for itself
    cdef vf bad[4]
    cdef Py_ssize_t i, d
    cdef int u
    for u in range(4):
        bad[u] = v_zero()
    for i in range(m):
        d = 0
        while d + 4*VL <= n:
            for u in range(4):
                bad[u] = v_fma(v_load(x + i*ld + d + u*VL), v_zero(), bad[u])
            d += 4*VL
        while d < n:
            bad[0] = v_fma(v_load_part(x + i*ld + d, n - d), v_zero(), bad[0])
            d += VL
    return not v_any_nan(v_add(v_add(bad[0], bad[1]), v_add(bad[2], bad[3])))


# --- a chunk ---------------------------------------------------------------------------------------------------------

cdef inline const Parts* all_of(const Linear* t, Py_ssize_t n) noexcept nogil:
    cdef Parts* parts = <Parts*>&t.parts
    parts.n = 1
    parts.begin[0] = 0
    parts.end[0] = n
    return parts


cdef inline uint64_t seen_by(const Linear* t, Py_ssize_t source) noexcept nogil:
    # the lanes of a chunk that see its row `source`, as bits
    if t.backwards:
        return (<uint64_t>2 << source) - 1
    return ~<uint64_t>0 << source


cdef void hide(const Linear* t, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t lane, int vectors) noexcept nogil:
    cdef Py_ssize_t k
    cdef real* s
    cdef int g
    for k in range(begin, end):
        for g in range(vectors):
            s = t.S + k*LANES + lane + g*VL
            v_store(s, v_keep(v_load(s), seen_by(t, k) >> (lane + g*VL)))


cdef void add_careful(const Linear* t, const real* A, Py_ssize_t step, Py_ssize_t ld, Py_ssize_t begin, Py_ssize_t end,
                      Py_ssize_t lane, int vectors, real* to, Py_ssize_t m) noexcept nogil:
    # to[i, lane] += sum of A[k step + i ld] S[k, lane] over the k that the lane sees
    cdef Py_ssize_t i, k
    cdef int g
    cdef vf acc
    for i in range(m):
        for g in range(vectors):
            acc = v_zero()
            for k in range(begin, end):
                acc = v_select(seen_by(t, k) >> (lane + g*VL),
                               v_fma(v_set1(A[k*step + i*ld]), v_load(t.S + k*LANES + lane + g*VL), acc), acc)
            v_store(to + i*LANES + lane + g*VL, v_add(v_load(to + i*LANES + lane + g*VL), acc))


cdef inline void add_weighted(const int nv, Linear* t, const real* a, Py_ssize_t step, const real* rows, Py_ssize_t n,
                              Py_ssize_t lane) noexcept nogil:
    # the normalizer, row Dv of Ot, += sum of a[k step] rows[k, lane], for nv vectors of lanes, whatever is in the last ones
    cdef real* to = t.Ot + t.p.Dv*LANES + lane
    cdef vf acc[BLOCK_VECTORS]
    cdef Py_ssize_t k
    cdef int g
    for g in range(nv):
        acc[g] = v_zero()
    for k in range(n):
        for g in range(nv):
            acc[g] = v_fma(v_set1(a[k*step]), v_load(rows + k*LANES + g*VL), acc[g])
    for g in range(nv):
        v_store(to + g*VL, v_add(v_load(to + g*VL), acc[g]))


cdef void within(Linear* t, Py_ssize_t n, int all_vectors) noexcept nogil:
    # What the n sources of a chunk bring to its lanes, half of which go with the half of the sources that they see.
    cdef Py_ssize_t lane, begin, end, k
    cdef int half, vectors
    for half in range(2):
        lane = half*HALF
        vectors = min(all_vectors - half*(HALF//VL), HALF//VL)
        begin = lane if t.backwards else 0
        end = n if t.backwards else min(n, lane + HALF)
        if vectors <= 0 or begin >= end:
            continue
        if t.values:
            for k in range(begin, end):
                memset(t.S + k*LANES + lane, 0, vectors*VL*sizeof(real))
            product_t(vectors, t.Bt + begin, LANES, t.At + lane, all_of(t, t.F), t.S + begin*LANES + lane, end - begin,
                      t.ones, NULL)
            hide(t, max(begin, lane), min(end, lane + HALF), lane, vectors)
            if t.careful:
                add_careful(t, t.rows, t.ld, 1, begin, end, lane, vectors, t.Ot, t.p.Dv)
            else:
                product_t(vectors, t.rows + begin*t.ld, t.ld, t.S + begin*LANES + lane, all_of(t, end - begin), t.Ot + lane,
                          t.p.Dv, t.ones, NULL)
            if not t.features:
                add_weighted(HALF//VL, t, t.ones, 0, t.S + begin*LANES + lane, end - begin, lane)
        if t.features:
            product_n(vectors, t.C + begin*t.W, t.W, t.Vt + lane, t.N, t.S + begin*LANES + lane, end - begin, STORE, 1,
                      &t.later)
            hide(t, max(begin, lane), min(end, lane + HALF), lane, vectors)
            if t.careful:
                add_careful(t, t.Bt, 1, LANES, begin, end, lane, vectors, t.Et, t.F)
            else:
                product_n(vectors, t.Bt + begin, LANES, t.S + begin*LANES + lane, end - begin, t.Et + lane, t.F, ADD, 1,
                          &t.later)


cdef void add_sources(Linear* t, Py_ssize_t n) noexcept nogil:
    # T += Bt C over n sources. Where v fills whole vectors, the last column would take one more: it is summed by itself.
    cdef Py_ssize_t Dv = t.p.Dv
    cdef vf sums[VL]
    cdef real lanes[VL]
    cdef real last[LANES]
    cdef Py_ssize_t f, i, j
    product_rows(t.Bt, n, t.rows, t.ld, t.T, t.F, t.W, whole(Dv), &t.later)
    if Dv % VL != 0:
        return
    for j in range(n):
        last[j] = t.C[j*t.W + Dv] if t.rows == t.C else <real>1
    f = 0
    while f < t.F:
        for i in range(VL):
            sums[i] = v_zero()
            j = 0
            while f + i < t.F and j < n:
                sums[i] = v_fma(v_load_part(t.Bt + (f + i)*LANES + j, n - j), v_load_part(last + j, n - j), sums[i])
                j += VL
        v_store(lanes, v_sums(sums))
        for i in range(min(<Py_ssize_t>VL, t.F - f)):
            t.T[(f + i)*t.W + Dv] += lanes[i]
        f += VL


cdef void add_states(const real* a, const real* b, Py_ssize_t n, real* to) noexcept nogil:
    cdef Py_ssize_t i = 0
    while i < n:
        v_store(to + i, v_add(v_load(a + i), v_load(b + i)))
        i += VL


cdef void begin_lanes(Linear* t, int64_t h, int64_t first, Py_ssize_t n) noexcept nogil:
    cdef const fastattn_linear* p = t.p
    cdef int vectors = <int>((n + VL - 1)//VL)
    cdef bint of_query = p.mode != FASTATTN_LINEAR_KEY
    pack_features(t, of_query, h, first, n, t.Xa, t.At)
    if t.values:
        memset(t.Ot, 0, t.N*LANES*sizeof(real))
    if t.features:
        memset(t.Et, 0, t.F*LANES*sizeof(real))
        if of_query:
            unpack_gradients(t, h, first, n, t.V)
        else:
            unpack_values(t, h, first, n, t.V)
        pack_queries(t.V, t.W, 1, FASTATTN_REAL, n, vectors, t.N, 1, t.Vt)


cdef void end_lanes(Linear* t, int64_t h, int64_t first, Py_ssize_t n, const real* state) noexcept nogil:
    # What the rows before the chunk bring, and the results
    cdef const fastattn_linear* p = t.p
    cdef const fastattn_array* to
    cdef int vectors = <int>((n + VL - 1)//VL)
    cdef const real* z = t.Ot + p.Dv*LANES
    cdef real* kept
    cdef Py_ssize_t i
    if t.values:
        product_t(vectors, state, t.W, t.At, all_of(t, t.F), t.Ot, p.Dv, t.ones, NULL)
    if t.features:
        product_n(vectors, state, t.W, t.Vt, t.N, t.Et, t.F, ADD, 1, &t.later)
    if p.mode == FASTATTN_LINEAR_OUTPUT:
        add_weighted(BLOCK_VECTORS, t, state + p.Dv, t.W, t.At, t.F, 0)
        for i in range(vectors*VL):
            t.factor[i] = 1/z[i] if z[i] != 0 else <real>0
        write_out(t.Ot, t.factor, n, vectors, p.Dv, rows_at(p, &p.out, t.b, h, first), p.out.row, p.out.col, p.out.kind)
        if p.normalizer.data != NULL:
            kept = <real*>rows_at(p, &p.normalizer, t.b, h, first)
            for i in range(n):
                kept[i*p.normalizer.row] = z[i]
        return
    if p.mode == FASTATTN_LINEAR_KEY:
        to = &p.grad_value
        write_out(t.Ot, t.ones, n, vectors, p.Dv, rows_at(p, to, t.b, h, first), to.row, to.col, to.kind)
    to = &p.grad_key if p.mode == FASTATTN_LINEAR_KEY else &p.grad_query
    times_slope(t, p.mode != FASTATTN_LINEAR_KEY, vectors)
    write_out(t.Xa, t.ones, n, vectors, t.D, rows_at(p, to, t.b, h, first), to.row, to.col, to.kind)


cdef inline void expect_rows(Linear* t, const fastattn_array* a, int64_t h, int64_t first, int64_t end,
                             Py_ssize_t columns) noexcept nogil:
    cdef Rows* rows = &t.later.rows[t.later.n]
    if end <= first or a.col != 1:
        return
    rows.at = rows_at(t.p, a, t.b, h, first)
    rows.row = a.row*v_size(a.kind)
    rows.size = columns*v_size(a.kind)
    rows.left = min(end - first, LANES)
    t.later.n += 1


cdef void expect_chunk(Linear* t, int64_t first) noexcept nogil:
    # During the product that comes: the rows of the chunk after this one.
    cdef const fastattn_linear* p = t.p
    cdef int64_t h = t.h_kv*(p.H//p.Hkv)
    cdef int64_t keys = visible_keys(p, t.b)
    first += -LANES if t.backwards else LANES
    if first < 0:
        return
    if p.mode != FASTATTN_LINEAR_KEY or p.causal:
        expect_rows(t, &p.key, t.h_kv, first, keys, p.D)
        expect_rows(t, &p.value, t.h_kv, first, keys, p.Dv)
    if p.mode == FASTATTN_LINEAR_KEY or p.causal:
        expect_rows(t, &p.query, h, first, p.L, p.D)
    t.later.at = t.later.n_next = 0
    if p.mode == FASTATTN_LINEAR_OUTPUT and p.causal and p.out.col == 1 and first < p.L:
        t.later.next[0].at = rows_at(p, &p.out, t.b, h, first)
        t.later.next[0].row = p.out.row*v_size(p.out.kind)
        t.later.next[0].size = p.Dv*v_size(p.out.kind)
        t.later.next[0].left = min(p.L - first, LANES)
        t.later.n_next = t.later.pace = 1


cdef void chunk(Linear* t, int64_t first, Py_ssize_t n_b, Py_ssize_t n_a, bint join) noexcept nogil:
    # n_a lanes and n_b sources from row `first` on; sources join T if that is wanted. The heads of a key head take turns.
    cdef const fastattn_linear* p = t.p
    cdef int64_t group = p.H//p.Hkv
    cdef int64_t own = t.h_kv if p.mode == FASTATTN_LINEAR_KEY else t.h_kv*group
    cdef int64_t of_source = t.h_kv*group if p.mode == FASTATTN_LINEAR_KEY else t.h_kv
    cdef int64_t heads_a = 1 if p.mode == FASTATTN_LINEAR_KEY else group
    cdef int64_t heads_b = group if p.mode == FASTATTN_LINEAR_KEY else 1
    cdef const real* state = t.prefix
    cdef int64_t a, b
    if n_a > 0 and p.causal:
        add_states(t.prefix, t.T, t.F*t.W, t.state)
        state = t.state
    for b in range(heads_b):
        t.rows, t.ld = t.C, t.W
        if n_b > 0:
            pack_features(t, p.mode == FASTATTN_LINEAR_KEY, of_source + b, first, n_b, t.Xb, t.Bt)
            if p.mode == FASTATTN_LINEAR_KEY:
                unpack_gradients(t, of_source + b, first, n_b, t.C)
            elif not in_place(t, of_source + b, first):
                unpack_values(t, of_source + b, first, n_b, t.C)
            if n_a > 0:
                t.careful = not (finite_part(t.rows, t.ld, n_b, p.Dv) and finite_part(t.Bt, LANES, t.F, n_b))
        if n_a > 0:
            for a in range(heads_a):
                if b == 0:
                    begin_lanes(t, own + a, first, n_a)
                if n_b > 0:
                    within(t, n_b, <int>((n_a + VL - 1)//VL))
                if b == heads_b - 1:
                    end_lanes(t, own + a, first, n_a, state)
        if n_b > 0 and join:
            expect_chunk(t, first)
            add_sources(t, n_b)
            t.later.n = t.later.n_next = 0


# --- tasks -----------------------------------------------------------------------------------------------------------

cdef void walk_segment(Linear* t, int64_t s, bint sources, bint lanes, bint join) noexcept nogil:
    # The chunks of a segment, with sources, lanes or both; the last one joins T only where that is wanted.
    cdef const fastattn_linear* p = t.p
    cdef int64_t n_b = n_sources(p, t.b) if sources else 0
    cdef int64_t n_a = n_lanes(p, t.b) if lanes else 0
    cdef int64_t begin = s*SEGMENT
    cdef int64_t end = min(max(n_a, n_b), begin + SEGMENT)
    cdef int64_t chunks = (end - begin + LANES - 1)//LANES
    cdef int64_t i, first
    for i in range(chunks):
        first = begin + (chunks - 1 - i if t.backwards else i)*LANES
        chunk(t, first, max(0, min(n_b - first, LANES)), max(0, min(n_a - first, LANES)), join or i < chunks - 1)


cdef inline real* slot(const Linear* t, int64_t s) noexcept nogil:
    return <real*>t.p.sums + ((t.b*t.p.Hkv + t.h_kv)*(t.p.segments + 1) + s)*t.F*t.W


cdef void add_in_order(Linear* t) noexcept nogil:
    # From the sums of each segment those of all before it, and at the end of all; backwards, of all behind it.
    cdef Py_ssize_t size = t.F*t.W
    cdef int64_t n = t.p.segments
    cdef int64_t i
    memcpy(slot(t, n if t.backwards else 0), t.prefix, size*sizeof(real))
    for i in range(n):
        if t.backwards:
            add_states(slot(t, n - i), slot(t, n - 1 - i), size, slot(t, n - 1 - i))
        else:
            add_states(slot(t, i), slot(t, i + 1), size, slot(t, i + 1))
    if t.p.end != NULL:
        memcpy(t.end, slot(t, n), size*sizeof(real))


cdef char* lay_out_linear(Linear* t, const fastattn_linear* p, char* memory) noexcept nogil:
    cdef Py_ssize_t n[15]
    cdef real** to[15]
    cdef int i
    t.p = p
    t.F, t.D, t.N, t.W = p.F, p.D, p.Dv + 1, p.wide
    t.backwards = p.mode == FASTATTN_LINEAR_KEY
    t.values = p.mode != FASTATTN_LINEAR_QUERY
    t.features = p.mode != FASTATTN_LINEAR_OUTPUT
    to[0], to[1], to[2], to[3], to[4] = &t.Bt, &t.At, &t.Xb, &t.Xa, &t.C
    to[5], to[6], to[7], to[8], to[9] = &t.V, &t.Vt, &t.S, &t.Ot, &t.Et
    to[10], to[11], to[12], to[13], to[14] = &t.T, &t.prefix, &t.state, &t.ones, &t.factor
    n[0] = n[1] = t.F*LANES
    n[2] = n[3] = t.D*LANES
    n[4] = n[5] = LANES*t.W
    n[6] = n[8] = t.N*LANES
    n[7] = LANES*LANES
    n[9] = t.F*LANES
    n[10] = n[11] = n[12] = t.F*t.W
    n[13] = n[14] = LANES
    memory += (sizeof(Linear) + 63)//64*64
    for i in range(15):
        to[i][0] = <real*>memory
        memory += (n[i]*sizeof(real) + 63)//64*64
    return memory


cdef size_t linear_scratch(const fastattn_linear* p) noexcept nogil:
    cdef Linear t
    return lay_out_linear(&t, p, NULL) - <char*>NULL


cdef void run_linear(const fastattn_linear* p, int64_t task, void* memory) noexcept nogil:
    # A task is a key head of a batch; in SUMS and ROWS, a segment of it.
    cdef Linear* t = <Linear*>memory
    cdef int64_t each = 1
    cdef int64_t s, head
    cdef Py_ssize_t size, i
    if p.phase == FASTATTN_LINEAR_SUMS:
        each = p.segments
    elif p.phase == FASTATTN_LINEAR_ROWS:
        each = p.row_segments
    s, head = task % each, task//each
    lay_out_linear(t, p, <char*>memory)
    memset(&t.later, 0, sizeof(Ahead))
    t.b, t.h_kv = head//p.Hkv, head % p.Hkv
    t.end = <real*>p.end + head*t.F*t.W
    t.careful = False
    size = t.F*t.W*sizeof(real)
    for i in range(LANES):
        t.ones[i] = 1
    memset(t.T, 0, size)
    if p.phase == FASTATTN_LINEAR_SUMS:
        walk_segment(t, s, True, False, True)
        memcpy(slot(t, s if t.backwards else s + 1), t.T, size)
        return
    if p.phase == FASTATTN_LINEAR_ROWS:
        t.prefix = slot(t, (s + 1 if t.backwards else s) if p.causal else 0 if t.backwards else p.segments)
        walk_segment(t, s, p.causal != 0, True, False)
        return
    if p.begin != NULL:
        memcpy(t.prefix, <const real*>p.begin + head*t.F*t.W, size)
    else:
        memset(t.prefix, 0, size)
    if p.phase == FASTATTN_LINEAR_PREFIX:
        add_in_order(t)
        return
    for i in range(p.segments):
        walk_segment(t, p.segments - 1 - i if t.backwards else i, True, True, True)
        add_states(t.prefix, t.T, t.F*t.W, t.prefix)
        memset(t.T, 0, size)
    if p.end != NULL:
        memcpy(t.end, t.prefix, size)
