# The loops over a block of edges: scores, weights, sums of rows. See graph.pxi.

cdef enum:
    EDGES = 64              # of a block
    EDGES_AHEAD = 16        # the edge that is asked for, behind the one that is read
    EDGE_ROOM = EDGES + EDGES_AHEAD + 16
    TWINS = 4               # targets in a row with the same sources that are done together
    ALIKE = 8               # edges from which that is worth while


cdef struct Edges:
    const fastattn_graph* p
    int64_t row, h, h_kv
    Py_ssize_t n                    # edges of the block that count
    int64_t source[EDGE_ROOM]       # and those behind
    int64_t at[EDGES]               # where what belongs to the edge stands
    int64_t k_at[EDGE_ROOM]         # bytes from the first source's key to this one's
    int64_t v_at[EDGE_ROOM]
    Source values
    real bias[EDGES]
    real S[TWINS*EDGES]             # scores, then weights, of each twin
    real G[EDGES]                   # what the weights change with their scores
    real dP[EDGES]
    real keep[EDGES]
    real* q                         # [heads][twins][D'] queries: of all heads of a target, or of twins
    real* w                         # [D'] the head's weight of features
    real* g                         # [Dv'] its grad_out
    real* O                         # [heads][twins][max(D', Dv')]
    real* Ob                        # [max(D', Dv')] of one block
    real* m                         # [heads][twins]
    double* l                       # [heads][twins]; edges that count, or thresholds
    real* scores                    # [H][longest] of a target, for its thresholds


cdef inline int64_t source_of(const fastattn_graph* p, int64_t e) noexcept nogil:
    return (<const int64_t*>p.source)[e] if p.wide else (<const int32_t*>p.source)[e]


cdef inline const char* node(const fastattn_array* a, int64_t row, int64_t h) noexcept nogil:
    return <const char*>a.data + (row*a.row + h*a.head)*v_size(a.kind)


cdef void unpack(const fastattn_array* a, int64_t row, int64_t h, Py_ssize_t n, real* to) noexcept nogil:
    # a row as whole vectors, zeros behind
    cdef Py_ssize_t d = 0
    while d < n:
        v_store(to + d, load_row(node(a, row, h), d*a.col, a.col, n - d, a.kind))
        d += VL


cdef void gather_edges(Edges* t, int64_t begin, int64_t end) noexcept nogil:
    # The edges that count of [begin, end), at most EDGES, and behind them those to come.
    cdef const fastattn_graph* p = t.p
    cdef int64_t e, j
    cdef Py_ssize_t i
    cdef real b = 0
    cdef int64_t k_row = p.key.row*v_size(p.key.kind)
    cdef int64_t v_row = p.value.row*v_size(p.value.kind)
    t.n = 0
    for e in range(begin, end):
        t.source[t.n] = source_of(p, e)
        t.at[t.n] = p.order[e] if p.order != NULL else e
        if p.edge_bias.data != NULL:
            b = real_at(node(&p.edge_bias, t.at[t.n], t.h), 0, p.edge_bias.kind)
            t.bias[t.n] = b
        t.n += b != -INFINITY
    if t.n == 0:
        return
    for i in range(t.n, t.n + EDGES_AHEAD + 16):
        j = end + i - t.n
        t.source[i] = source_of(p, j) if j < p.n_edges else t.source[0]
    for i in range(t.n + EDGES_AHEAD + 16):
        t.k_at[i] = t.source[i]*k_row
        t.v_at[i] = t.source[i]*v_row


cdef inline vf leaky(vf x, vf slope) noexcept nogil:
    return v_where_lt(x, v_zero(), v_mul(x, slope), x)


cdef inline void dots_of(const int nv, const int kind, Edges* t, const real* q, const fastattn_array* a, const int64_t* at,
                         Py_ssize_t D, real* to) noexcept nogil:
    # to[e] = q · a[source e] for rows that lie together
    cdef vf acc[16]
    cdef const char* data = node(a, 0, t.h_kv)
    cdef Py_ssize_t j = 0
    while j < t.n:
        group_dots(1, min(4, VL), nv, kind, v_anchor(q), data, at + j, EDGES_AHEAD, D, acc)
        if VL > 4:
            group_dots(1, min(4, VL), nv, kind, v_anchor(q), data, at + j + 4, EDGES_AHEAD, D, acc + 4)
        if VL > 8:
            group_dots(1, min(4, VL), nv, kind, v_anchor(q), data, at + j + 8, EDGES_AHEAD, D, acc + 8)
            group_dots(1, min(4, VL), nv, kind, v_anchor(q), data, at + j + 12, EDGES_AHEAD, D, acc + 12)
        v_store(to + j, v_sums(acc))
        j += VL


cdef inline void dots_kind(const int kind, Edges* t, const real* q, const fastattn_array* a, const int64_t* at, Py_ssize_t D,
                           real* to) noexcept nogil:
    if D == 32:
        dots_of(32//VL, kind, t, q, a, at, D, to)
    elif D == 64:
        dots_of(64//VL, kind, t, q, a, at, D, to)
    else:
        dots_of(0, kind, t, q, a, at, D, to)


cdef void edge_dots(Edges* t, const real* q, const fastattn_array* a, const fastattn_array* feature, const int64_t* at,
                    Py_ssize_t D, real* to) noexcept nogil:
    # to[e] = q · (a[source e] + feature_e); anything behind the last edge
    cdef vf sums[VL]
    cdef vf acc, x
    cdef const char* row
    cdef const char* f
    cdef Py_ssize_t first = 0
    cdef Py_ssize_t i, d
    if a.col == 1 and feature.data == NULL:
        if sizeof(real) == 8 or a.kind == FASTATTN_REAL:
            dots_kind(FASTATTN_REAL, t, q, a, at, D, to)
        elif a.kind == FASTATTN_F16:
            dots_kind(FASTATTN_F16, t, q, a, at, D, to)
        else:
            dots_kind(FASTATTN_BF16, t, q, a, at, D, to)
        return
    while first < t.n:
        for i in range(VL):
            acc = v_zero()
            if first + i < t.n:
                row = node(a, t.source[first + i], t.h_kv)
                f = node(feature, t.at[first + i], t.h_kv) if feature.data != NULL else NULL
                d = 0
                while d < D:
                    x = load_row(row, d*a.col, a.col, D - d, a.kind)
                    if f != NULL:
                        x = v_add(x, load_row(f, d*feature.col, feature.col, D - d, feature.kind))
                    acc = v_fma(v_load(q + d), x, acc)
                    d += VL
            sums[i] = acc
        v_store(to + first, v_sums(sums))
        first += VL


cdef void leaky_scores(Edges* t) noexcept nogil:
    # S = w · leaky(q + k[source e] + edge_key_e)
    cdef const fastattn_graph* p = t.p
    cdef vf slope = v_set1(<real>p.slope)
    cdef vf sums[VL]
    cdef vf acc, x
    cdef const char* k
    cdef Py_ssize_t first = 0
    cdef Py_ssize_t i, d
    if p.D == 1:            # GAT: lanes are edges
        for i in range(t.n):
            v_fetch_soon(node(&p.key, t.source[i + EDGES_AHEAD], t.h_kv), 1)
            t.S[i] = real_at(node(&p.key, t.source[i], t.h_kv), 0, p.key.kind)
            if p.edge_key.data != NULL:
                t.S[i] += real_at(node(&p.edge_key, t.at[i], t.h_kv), 0, p.edge_key.kind)
        while first < t.n:
            x = leaky(v_add(v_load(t.S + first), v_set1(t.q[0])), slope)
            v_store(t.S + first, v_mul(x, v_set1(t.w[0])))
            first += VL
        return
    while first < t.n:
        for i in range(VL):
            acc = v_zero()
            d = 0
            while first + i < t.n and d < p.D:
                k = node(&p.key, t.source[first + i], t.h_kv)
                if d == 0 and p.key.col == 1:
                    v_fetch_soon(node(&p.key, t.source[first + i + EDGES_AHEAD], t.h_kv), p.D*v_size(p.key.kind))
                x = load_row(k, d*p.key.col, p.key.col, p.D - d, p.key.kind)
                if p.edge_key.data != NULL:
                    x = v_add(x, load_row(node(&p.edge_key, t.at[first + i], t.h_kv), d*p.edge_key.col, p.edge_key.col,
                                          p.D - d, p.edge_key.kind))
                acc = v_fma(v_load(t.w + d), leaky(v_add(v_load(t.q + d), x), slope), acc)
                d += VL
            sums[i] = acc
        v_store(t.S + first, v_sums(sums))
        first += VL


cdef void edge_scores(Edges* t) noexcept nogil:
    # S of the block's edges, anything in the lanes behind them
    cdef const fastattn_graph* p = t.p
    if p.score == FASTATTN_DOT:
        edge_dots(t, t.q, &p.key, &p.edge_key, t.k_at, p.D, t.S)
    else:
        leaky_scores(t)
    finish_scores(t, t.S)


cdef inline void finish_scores(Edges* t, real* S) noexcept nogil:
    # scale, softcap, bias
    cdef const fastattn_graph* p = t.p
    cdef vf x
    cdef Py_ssize_t i = 0
    while i < t.n:
        x = v_mul(v_load(S + i), v_set1(<real>p.scale))
        if p.softcap > 0:
            x = v_mul(v_tanh(v_div(x, v_set1(<real>p.softcap))), v_set1(<real>p.softcap))
        v_store(S + i, v_add(x, v_load(t.bias + i)) if p.edge_bias.data != NULL else x)
        i += VL


cdef inline void twin_dots(const int n, const int nv, Edges* t) noexcept nogil:
    # S of n targets with the same sources, each as `dots_of` has it alone
    cdef const char* data = node(&t.p.key, 0, t.h_kv)
    cdef vf acc[16]
    cdef vf sums[TWINS*VL]
    cdef Py_ssize_t j = 0
    cdef Py_ssize_t g
    cdef int i, r
    while j < t.n:
        g = 0
        while g < VL:
            group_dots(n, min(VL, SUMS//4), nv, FASTATTN_REAL, v_anchor(t.q), data, t.k_at + j + g, EDGES_AHEAD, t.p.D, acc)
            for i in range(min(VL, SUMS//4)):
                for r in range(n):
                    sums[r*VL + g + i] = acc[i*n + r]
            g += min(VL, SUMS//4)
        for r in range(n):
            v_store(t.S + r*EDGES + j, v_sums(sums + r*VL))
        j += VL


cdef void twin_scores(Edges* t, int n) noexcept nogil:
    cdef int r
    if t.p.D == 32 and n == TWINS:
        twin_dots(TWINS, 32//VL, t)
    elif t.p.D == 64 and n == TWINS:
        twin_dots(TWINS, 64//VL, t)
    elif n == TWINS:
        twin_dots(TWINS, 0, t)
    else:
        twin_dots(2, 0, t)
    for r in range(n):
        finish_scores(t, t.S + r*EDGES)


cdef inline void twin_columns(const int n, const int nv, Edges* t, Py_ssize_t d, const real* c) noexcept nogil:
    # O[r, d..] = O[r, d..] c[r] + sum_e P[r, e] value[source e, d..], each as `add_edges` has it alone
    cdef vf acc[16]
    cdef vf x[4]
    cdef const char* data = node(&t.p.value, 0, t.h_kv) + d*sizeof(real)
    cdef const real* row
    cdef Py_ssize_t left = t.p.Dv - d
    cdef Py_ssize_t ldo = whole(t.p.Dv)
    cdef Py_ssize_t e
    cdef int r, g
    for g in range(n*nv):
        acc[g] = v_zero()
    for e in range(t.n):
        row = <const real*>(data + t.v_at[e])
        for g in range(nv):
            v_fetch_line(data + t.v_at[e + EDGES_AHEAD] + g*VL*sizeof(real))
            x[g] = v_load_part(row, left) if nv == 1 else v_load(row + g*VL)
        for r in range(n):
            for g in range(nv):
                acc[r*nv + g] = v_fma(v_set1(t.S[r*EDGES + e]), x[g], acc[r*nv + g])
    for r in range(n):
        for g in range(nv):
            v_store(t.O + r*ldo + d + g*VL, v_fma(v_load(t.O + r*ldo + d + g*VL), v_set1(c[r]), acc[r*nv + g]))


cdef inline void twin_values(const int n, Edges* t, const real* c) noexcept nogil:
    cdef Py_ssize_t d = 0
    while t.p.Dv - d >= SUMS//4*VL:
        twin_columns(n, SUMS//4, t, d, c)
        d += SUMS//4*VL
    while d < t.p.Dv:
        twin_columns(n, 1, t, d, c)
        d += VL


cdef int64_t alike(const fastattn_graph* p, int64_t i, int64_t stop) noexcept nogil:
    # How many of the targets i .. stop - 1 have the first one's sources. Only in what full graphs and cliques have is it looked
    # for: rows of real numbers, and nothing that belongs to edges.
    cdef int64_t size = p.end[i] - p.begin[i]
    cdef int64_t width = 8 if p.wide else 4
    cdef const char* source = <const char*>p.source
    cdef int64_t n = 1
    if size < ALIKE or p.score != FASTATTN_DOT or p.key.col != 1 or p.value.col != 1 or p.edge_bias.data != NULL \
            or p.edge_key.data != NULL or p.edge_value.data != NULL or p.dropout != 0 \
            or (sizeof(real) == 4 and (p.key.kind != FASTATTN_REAL or p.value.kind != FASTATTN_REAL)):
        return 1
    while i + n < stop and p.end[i + n] - p.begin[i + n] == size \
            and memcmp(source + p.begin[i]*width, source + p.begin[i + n]*width, size*width) == 0:
        n += 1
    return n


cdef inline real largest(const real* S, Py_ssize_t n) noexcept nogil:
    # NaN is passed over: the exponential keeps it
    cdef real lanes[VL]
    cdef vf most = v_set1(-INFINITY)
    cdef Py_ssize_t i = 0
    while i + VL <= n:
        most = v_max(v_load(S + i), most)
        i += VL
    v_store(lanes, most)
    while i < n:
        lanes[i % VL] = S[i] if S[i] > lanes[i % VL] else lanes[i % VL]
        i += 1
    for i in range(1, VL):
        lanes[0] = lanes[i] if lanes[i] > lanes[0] else lanes[0]
    return lanes[0]


cdef real weigh_edges(real* S, Py_ssize_t n, real m) noexcept nogil:
    # P = e^(S - m), 0 behind the last edge, and their sum
    cdef vf total = v_zero()
    cdef vf k = v_set1(<real>1.4426950408889634074)
    cdef vf base = v_set1(m if m != -INFINITY else 0)
    cdef vf x
    cdef Py_ssize_t i = 0
    while i < n:
        x = v_exp2(v_mul(v_sub(v_load(S + i), base), k))
        if n - i < VL:
            x = v_keep(x, (<uint64_t>1 << (n - i)) - 1)
        v_store(S + i, x)
        total = v_add(total, x)
        i += VL
    return sum_lanes(total)


cdef inline void add_rows(Edges* t, const int nv, Py_ssize_t d, const real* P, const fastattn_array* a,
                          const fastattn_array* feature, Py_ssize_t columns, vf factor) noexcept nogil:
    # O[d : d + nv VL] = O factor + sum_e P_e (a[source e] + feature_e)
    cdef vf acc[4]
    cdef vf x
    cdef const char* row
    cdef Py_ssize_t e, at
    cdef int u
    cdef bint plain = a.kind == FASTATTN_REAL and a.col == 1 and feature.data == NULL
    for u in range(nv):
        acc[u] = v_zero()
    for e in range(t.n):
        row = node(a, t.source[e], t.h_kv)
        for u in range(nv):
            at = d + u*VL
            if plain:
                x = v_load_part(<const real*>row + at, columns - at)
            else:
                x = load_row(row, at*a.col, a.col, columns - at, a.kind)
                if feature.data != NULL:
                    x = v_add(x, load_row(node(feature, t.at[e], t.h_kv), at*feature.col, feature.col, columns - at,
                                          feature.kind))
            acc[u] = v_fma(v_set1(P[e]), x, acc[u])
    for u in range(nv):
        v_store(t.O + d + u*VL, v_fma(v_load(t.O + d + u*VL), factor, acc[u]))


cdef inline void sums_kind(const int kind, Edges* t, const real* P, Py_ssize_t columns) noexcept nogil:
    # Ob += sum_e P_e a[source e] for rows that lie together
    cdef Py_ssize_t d = 0
    while columns - d >= 4*VL:
        tile_rows(1, 4, True, kind, P, 1, &t.values, d, VL, 0, t.n, t.Ob + d, 0, EDGES_AHEAD)
        d += 4*VL
    while columns - d >= 2*VL:
        tile_rows(1, 2, True, kind, P, 1, &t.values, d, VL, 0, t.n, t.Ob + d, 0, EDGES_AHEAD)
        d += 2*VL
    while d < columns:
        tile_rows(1, 1, True, kind, P, 1, &t.values, d, columns - d, 0, t.n, t.Ob + d, 0, EDGES_AHEAD)
        d += VL


cdef void add_edges(Edges* t, const real* P, const fastattn_array* a, const fastattn_array* feature, const int64_t* at,
                    Py_ssize_t columns, real factor) noexcept nogil:
    # O = O factor + sum_e P_e (a[source e] + feature_e)
    cdef Py_ssize_t d = 0
    cdef vf c = v_set1(factor)
    if a.col != 1 or feature.data != NULL:
        while whole(columns) - d >= 4*VL:
            add_rows(t, 4, d, P, a, feature, columns, c)
            d += 4*VL
        while d < columns:
            add_rows(t, 1, d, P, a, feature, columns, c)
            d += VL
        return
    memset(t.Ob, 0, whole(columns)*sizeof(real))
    t.values.data = node(a, 0, t.h_kv)
    t.values.at = at
    if sizeof(real) == 8 or a.kind == FASTATTN_REAL:
        sums_kind(FASTATTN_REAL, t, P, columns)
    elif a.kind == FASTATTN_F16:
        sums_kind(FASTATTN_F16, t, P, columns)
    else:
        sums_kind(FASTATTN_BF16, t, P, columns)
    while d < columns:
        v_store(t.O + d, v_fma(v_load(t.O + d), c, v_load(t.Ob + d)))
        d += VL


cdef void write_node(const fastattn_array* a, int64_t row, int64_t h, Py_ssize_t n, const real* x, real factor) noexcept nogil:
    cdef Py_ssize_t d = 0
    while d < n:
        v_store_as(<char*>node(a, row, h), d*a.col, a.col, v_mul(v_load(x + d), v_set1(factor)), n - d, a.kind)
        d += VL


cdef inline bint is_sparse(const fastattn_graph* p) noexcept nogil:
    return p.normalizer == FASTATTN_SPARSEMAX or p.normalizer == FASTATTN_ENTMAX15


cdef void weigh_alone(const fastattn_graph* p, real* S, real* G, Py_ssize_t n, real m, real level, double count) noexcept nogil:
    # Of normalizers but softmax: P in the place of S, and in G what it changes with S, but for what the row has in common.
    # level: the threshold from m, infinite for a row without any score; count: edges of the target.
    cdef vf k = v_set1(<real>1.4426950408889634074)
    cdef vf b = v_set1(<real>(p.offset if p.offset == p.offset else -log(count) if count > 0 else 0.0))
    cdef vf edges = v_set1(<real>count)
    cdef vf kappa = v_set1(<real>(0.5 if p.normalizer == FASTATTN_ENTMAX15 else 1.0))
    cdef vf base = v_set1(m)
    cdef vf threshold = v_set1(level if level != -INFINITY else INFINITY)
    cdef vf zero = v_zero()
    cdef vf one = v_set1(1)
    cdef vf x, e, g
    cdef Py_ssize_t i = 0
    while i < n:
        x = v_load(S + i)
        if p.normalizer == FASTATTN_SIGMOID:
            x = v_add(x, b)
            e = v_exp2(v_sub(zero, v_mul(v_max(x, v_sub(zero, x)), k)))
            g = v_add(one, e)
            x = v_div(v_where_lt(x, zero, e, one), g)       # neither side loses digits
            g = v_div(e, v_mul(g, g))
        elif p.normalizer == FASTATTN_RELU:
            g = v_where_lt(zero, x, v_div(one, edges), v_where_lt(x, one, zero, x))
            x = v_div(v_where_lt(x, zero, zero, x), edges)
        else:
            x = v_max(zero, v_sub(v_mul(v_sub(x, base), kappa), threshold))
            if p.normalizer == FASTATTN_ENTMAX15:
                g = x
                x = v_mul(x, x)
            else:
                g = v_where_lt(zero, x, one, x)             # NaN is kept
        v_store(S + i, x)
        if G != NULL:
            v_store(G + i, g)
        i += VL


cdef double count_of(Edges* t, int64_t begin, int64_t end, int64_t row, int64_t h) noexcept nogil:
    # edges that count of the target, of which these are all or a part
    cdef const fastattn_graph* p = t.p
    cdef int64_t e, at
    cdef int64_t n = end - begin
    if p.counts != NULL:
        return p.counts[row*p.H + h]
    if p.edge_bias.data != NULL:
        for e in range(begin, end):
            at = p.order[e] if p.order != NULL else e
            n -= real_at(node(&p.edge_bias, at, h), 0, p.edge_bias.kind) == -INFINITY
    return <double>n


cdef void scale_row(real* x, Py_ssize_t n, real c) noexcept nogil:
    cdef Py_ssize_t d = 0
    while d < n:
        v_store(x + d, v_mul(v_load(x + d), v_set1(c)))
        d += VL


cdef inline int64_t row_of(const fastattn_graph* p, int64_t i) noexcept nogil:
    return p.rows[i] if p.rows != NULL else i


cdef void keep_edges(Edges* t, real* factor) noexcept nogil:
    # What a dropout multiplies each weight by: numbers of (edge, head) for (key, head), in row and batch 0
    cdef uint64_t kept[4]
    cdef int64_t group = -1
    cdef Py_ssize_t i
    for i in range(t.n):
        if t.at[i]//4 != group:
            group = t.at[i]//4
            v_kept(<unsigned int>group, 0, <unsigned int>t.h, 0, t.p.seed, t.p.dropout, 1, kept)
        factor[i] = <real>t.p.keep if kept[t.at[i] % 4] & 1 else 0


cdef void drop_edges(Edges* t) noexcept nogil:
    cdef Py_ssize_t i
    keep_edges(t, t.keep)
    for i in range(t.n):
        t.S[i] = t.S[i]*t.keep[i] if t.keep[i] != 0 else 0
