# Attention along the edges of a graph: each target attends to the sources of its edges, head by head.
#
#     s_e = scale q · (k[source e] + edge_key_e)    or leaky(q + k), or w · leaky(q + k), see `score`  then softcap, edge_bias
#     m, l, O: the online softmax over blocks of EDGES edges, of which each is summed from zero before it joins; or, by
#     sparsemax and entmax, the scores of all edges, then their threshold, then O
#     O += sum_e P_e (v[source e] + edge_value_e)
#
# Lanes are features where rows are read (few edges make a target: they could not fill lanes), and edges from the scores to
# the weights. Rows of keys and values lie anywhere: those of AHEAD edges later are asked for while a block is worked on.
#
# A row's bits depend on its edges and their order alone. Edges whose bias is -inf are left out before anything is read.

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


cdef inline void take_head(Edges* t, int64_t h, bint first, int64_t begin, int64_t end) noexcept nogil:
    # The heads of a block share the list of its edges, unless a bias leaves some out.
    t.h = h
    t.h_kv = h//(t.p.H//t.p.Hkv)
    if first or t.p.edge_bias.data != NULL:
        gather_edges(t, begin, end)


cdef void attend_rows(Edges* t, int64_t first, const int n, int64_t h_begin, int64_t h_end) noexcept nogil:
    # Target `first`, or n of them with the same sources. All of the heads take a block of edges before the next one.
    cdef const fastattn_graph* p = t.p
    cdef real* q = t.q
    cdef real* O = t.O
    cdef real* S
    cdef Py_ssize_t ldq = whole(p.D)
    cdef Py_ssize_t ldo = whole(p.Dv)
    cdef int64_t begin = p.begin[first]
    cdef int64_t end = p.end[first]
    cdef int64_t stop, h, at
    cdef real most, sink
    cdef real c[TWINS]
    cdef bint by_softmax = p.normalizer == FASTATTN_SOFTMAX
    cdef int r
    for h in range(h_begin, h_end):
        for r in range(n):
            at = (h - h_begin)*n + r
            unpack(&p.query, row_of(p, first + r), h, p.D, q + at*ldq)
            t.m[at] = -INFINITY
            t.l[at] = 0 if by_softmax else count_of(t, begin, end, first + r, h)
    memset(O, 0, n*(h_end - h_begin)*ldo*sizeof(real))
    while begin < end:
        stop = min(end, begin + EDGES)
        for h in range(h_begin, h_end):
            take_head(t, h, h == h_begin, begin, stop)
            if t.n == 0:
                continue
            t.q = q + (h - h_begin)*n*ldq
            t.O = O + (h - h_begin)*n*ldo
            if n > 1:
                twin_scores(t, n)
            else:
                if p.score != FASTATTN_DOT:
                    unpack(&p.w, 0, h, p.D, t.w)
                edge_scores(t)
            for r in range(n):
                S = t.S + r*EDGES
                at = (h - h_begin)*n + r
                c[r] = 1
                if not by_softmax:
                    weigh_alone(p, S, NULL, t.n, 0, 0, t.l[at])
                    continue
                most = largest(S, t.n)
                if most > t.m[at]:
                    c[r] = <real>exp(<double>t.m[at] - most) if t.m[at] != -INFINITY else 0
                    t.m[at] = most
                t.l[at] = t.l[at]*c[r] + weigh_edges(S, t.n, t.m[at])
            if n == TWINS:
                twin_values(TWINS, t, c)
            elif n == 2:
                twin_values(2, t, c)
            else:
                if p.dropout != 0:
                    drop_edges(t)
                add_edges(t, t.S, &p.value, &p.edge_value, t.v_at, p.Dv, c[0])
        begin = stop
    for h in range(h_begin, h_end):
        sink = (<const real*>p.sinks)[h] if p.sinks != NULL else -INFINITY
        for r in range(n):
            at = (h - h_begin)*n + r
            if sink != -INFINITY:
                if sink > t.m[at]:
                    c[0] = <real>exp(<double>t.m[at] - sink) if t.m[at] != -INFINITY else 0
                    t.l[at] *= c[0]
                    t.m[at] = sink
                    scale_row(O + at*ldo, ldo, c[0])
                t.l[at] += exp(<double>sink - t.m[at])
            if not by_softmax:
                write_result(p, first + r, h, O + at*ldo, 1, 0 if t.l[at] != 0 else -INFINITY)
            elif t.l[at] != 0:
                write_result(p, first + r, h, O + at*ldo, <real>(1/t.l[at]), <real>(t.m[at] + log(t.l[at])))
            else:
                write_result(p, first + r, h, O + at*ldo, 0, -INFINITY)
    t.q = q
    t.O = O


cdef void write_result(const fastattn_graph* p, int64_t row, int64_t h, const real* O, real factor, real lse) noexcept nogil:
    write_node(&p.out, row, h, p.Dv, O, factor)
    if p.lse.data != NULL:
        (<real*>node(&p.lse, row, h))[0] = lse


cdef void score_row(Edges* t, int64_t row, real* to, Py_ssize_t ld) noexcept nogil:
    # to[h][..]: scores of the row, those that count of each block first and -inf in the place of the others
    cdef const fastattn_graph* p = t.p
    cdef real* q = t.q
    cdef Py_ssize_t ldq = whole(p.D)
    cdef int64_t begin = p.begin[row]
    cdef int64_t end = p.end[row]
    cdef int64_t stop, h
    cdef real* S
    cdef Py_ssize_t i
    for h in range(p.H):
        unpack(&p.query, row_of(p, row), h, p.D, q + h*ldq)
    while begin < end:
        stop = min(end, begin + EDGES)
        for h in range(p.H):
            take_head(t, h, h == 0, begin, stop)
            t.q = q + h*ldq
            if t.n > 0:
                if p.score != FASTATTN_DOT:
                    unpack(&p.w, 0, h, p.D, t.w)
                edge_scores(t)
            S = to + h*ld + begin - p.begin[row]
            memcpy(S, t.S, t.n*sizeof(real))
            for i in range(t.n, stop - begin):
                S[i] = -INFINITY
        begin = stop
    t.q = q


cdef void level_of(const fastattn_graph* p, const real* S, Py_ssize_t n, real* m, double* level) noexcept nogil:
    # The maximum of n scores and the threshold from it; -inf where there is no score, NaN where one is NaN or +inf.
    cdef bint squared = p.normalizer == FASTATTN_ENTMAX15
    cdef bint bad = False
    cdef Py_ssize_t i
    m[0] = largest(S, n)
    for i in range(n):
        bad |= S[i] != S[i]
    level[0] = 0
    if bad or m[0] == INFINITY:
        m[0] = NAN
    elif m[0] != -INFINITY:
        level[0] = threshold_of(S, n, m[0], <real>(0.5 if squared else 1.0), squared, -1)


cdef void attend_sparsely(Edges* t, int64_t row) noexcept nogil:
    # One target by sparsemax or entmax: its scores, thresholds, then values. Parts of one have theirs.
    cdef const fastattn_graph* p = t.p
    cdef Py_ssize_t ldo = whole(p.Dv)
    cdef real* O = t.O
    cdef int64_t begin = p.begin[row]
    cdef int64_t end = p.end[row]
    cdef int64_t stop, h
    cdef Py_ssize_t ld = p.longest
    cdef real* scores = t.scores
    cdef double tau
    if p.scores != NULL:
        ld = p.n_scores
        scores = <real*>p.scores + p.first_score[row]
    else:
        score_row(t, row, scores, ld)
    memset(O, 0, p.H*ldo*sizeof(real))
    for h in range(p.H):
        if p.scores != NULL:
            t.m[h] = <real>p.pairs[2*(row*p.H + h)]
            t.l[h] = p.pairs[2*(row*p.H + h) + 1]
        else:
            level_of(p, scores + h*ld, end - begin, &t.m[h], &t.l[h])
    while begin < end:
        stop = min(end, begin + EDGES)
        for h in range(p.H):
            take_head(t, h, h == 0, begin, stop)
            if t.n > 0 and t.m[h] != -INFINITY:
                memcpy(t.S, scores + h*ld + begin - p.begin[row], t.n*sizeof(real))
                weigh_alone(p, t.S, NULL, t.n, t.m[h], <real>t.l[h], 0)
                if p.dropout != 0:
                    drop_edges(t)
                t.O = O + h*ldo
                add_edges(t, t.S, &p.value, &p.edge_value, t.v_at, p.Dv, 1)
        begin = stop
    for h in range(p.H):
        tau = t.m[h]*(0.5 if p.normalizer == FASTATTN_ENTMAX15 else 1.0) + t.l[h]
        write_result(p, row, h, O + h*ldo, 1, <real>tau)
    t.O = O


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


cdef void add_slopes(Edges* t, const real* dS, const fastattn_array* a, const fastattn_array* feature, real* own_grad,
                     real* w_grad) noexcept nogil:
    # Of s = w · leaky(own + x_e): own_grad += sum_e dS_e w leaky'(own + x_e), and w_grad += sum_e dS_e leaky(own + x_e). The
    # slope at 0 is that below it, as in torch.
    cdef const fastattn_graph* p = t.p
    cdef vf slope = v_set1(<real>p.slope)
    cdef vf one = v_set1(1)
    cdef vf x, of_own, of_w, ds
    cdef Py_ssize_t e
    cdef Py_ssize_t d = 0
    while d < p.D:
        of_own = v_zero()
        of_w = v_zero()
        for e in range(t.n):
            x = load_row(node(a, t.source[e], t.h_kv), d*a.col, a.col, p.D - d, a.kind)
            if feature.data != NULL:
                x = v_add(x, load_row(node(feature, t.at[e], t.h_kv), d*feature.col, feature.col, p.D - d, feature.kind))
            x = v_add(v_load(t.q + d), x)
            ds = v_set1(dS[e])
            of_own = v_fma(ds, v_where_lt(v_zero(), x, one, slope), of_own)
            of_w = v_fma(ds, leaky(x, slope), of_w)
        v_store(own_grad + d, v_fma(of_own, v_load(t.w + d), v_load(own_grad + d)))
        if w_grad != NULL:
            v_store(w_grad + d, v_add(v_load(w_grad + d), of_w))
        d += VL


cdef void block_gradient(Edges* t, int64_t begin, int64_t end, real lse, double count) noexcept nogil:
    # Of edges [begin, end): P and dP with the dropout's factors, and G, what P without it changes with its score; in t.bias the
    # slopes of the softcap
    cdef const fastattn_graph* p = t.p
    cdef real x
    cdef Py_ssize_t i
    gather_edges(t, begin, end)
    if t.n == 0:
        return
    edge_scores(t)
    if p.softcap > 0:           # before the weights take the scores' place; the bias was added behind the cap
        for i in range(t.n):
            x = (t.S[i] - (t.bias[i] if p.edge_bias.data != NULL else 0))/<real>p.softcap
            t.bias[i] = (1 - x)*(1 + x)
    if p.normalizer == FASTATTN_SOFTMAX:
        weigh_edges(t.S, t.n, lse)
        memcpy(t.G, t.S, t.n*sizeof(real))
    else:
        weigh_alone(p, t.S, t.G, t.n, 0, lse, count)
    edge_dots(t, t.g, &p.value, &p.edge_value, t.v_at, p.Dv, t.dP)
    if p.dropout != 0:
        keep_edges(t, t.keep)
        for i in range(t.n):
            t.dP[i] = t.dP[i]*t.keep[i] if t.keep[i] != 0 else 0
            t.S[i] = t.S[i]*t.keep[i] if t.keep[i] != 0 else 0


cdef void row_sums(Edges* t, int64_t row, real lse, double* of_dP, double* of_g) noexcept nogil:
    # Over the edges of the target or a part: sum G dP, sum G
    cdef const fastattn_graph* p = t.p
    cdef int64_t begin = p.begin[row]
    cdef Py_ssize_t i
    of_dP[0] = of_g[0] = 0
    while begin < p.end[row]:
        block_gradient(t, begin, min(p.end[row], begin + EDGES), lse, 0)
        for i in range(t.n):
            of_dP[0] += <double>t.G[i]*t.dP[i]
            of_g[0] += t.G[i]
        begin += EDGES


cdef void row_gradient(Edges* t, int64_t row, real* w_grad) noexcept nogil:
    # One target, one head: dZ and P of its edges, and its query's gradient.
    cdef const fastattn_graph* p = t.p
    cdef real lse = (<const real*>node(&p.lse, t.row, t.h))[0]
    cdef real delta = (<const real*>node(&p.delta, t.row, t.h))[0]
    cdef int64_t begin = p.begin[row]
    cdef int64_t end = p.end[row]
    cdef double count = 0
    cdef double of_dP, of_g
    cdef bint done = False
    cdef real dz
    cdef real* at
    cdef Py_ssize_t i
    unpack(&p.query, t.row, t.h, p.D, t.q)
    unpack(&p.grad_out, t.row, t.h, p.Dv, t.g)
    if p.mode == FASTATTN_GRAPH_DELTA:
        row_sums(t, row, lse, &p.pairs[2*(row*p.H + t.h)], &p.pairs[2*(row*p.H + t.h) + 1])
        return
    if is_sparse(p) and p.rows == NULL:
        row_sums(t, row, lse, &of_dP, &of_g)
        delta = <real>(of_dP/of_g) if of_g != 0 else 0
        done = end - begin <= EDGES
    elif p.normalizer != FASTATTN_SOFTMAX:
        count = count_of(t, begin, end, row, t.h)
    memset(t.O, 0, whole(p.D)*sizeof(real))
    while begin < end:
        if not done:
            block_gradient(t, begin, min(end, begin + EDGES), lse, count)
        begin += EDGES
        if t.n == 0:
            continue
        for i in range(t.n):
            dz = t.G[i]*(t.dP[i] - delta)
            at = <real*>p.weights + t.at[i]*p.H + t.h
            at[0] = t.S[i]
            at = <real*>p.grad_bias + t.at[i]*p.H + t.h
            at[0] = dz
            dz = dz*<real>p.scale*(t.bias[i] if p.softcap > 0 else 1)
            at = <real*>p.grad_scores + t.at[i]*p.H + t.h
            at[0] = dz
            t.S[i] = dz
        if p.score == FASTATTN_DOT:
            add_edges(t, t.S, &p.key, &p.edge_key, t.k_at, p.D, 1)
        else:
            add_slopes(t, t.S, &p.key, &p.edge_key, t.O, w_grad)
    write_node(&p.grad_query, row, t.h, p.D, t.O, 1)


cdef void sum_row(Edges* t, int64_t begin, int64_t end, int64_t out_row) noexcept nogil:
    # out[row, h_kv] = the sum over its edges and the query heads of h_kv of weights[e, h] · value[source e, h]; where `score`
    # is not the product, of weights · w leaky'(query[row] + value[source e])
    cdef const fastattn_graph* p = t.p
    cdef int64_t group = p.H//p.Hkv
    cdef int64_t h_kv = t.h_kv
    cdef int64_t e
    cdef Py_ssize_t i
    memset(t.O, 0, whole(p.Dv)*sizeof(real))
    if p.score != FASTATTN_DOT:
        unpack(&p.query, t.row, h_kv, p.D, t.q)
    for t.h in range(h_kv*group, (h_kv + 1)*group):
        t.h_kv = t.h            # of what is summed
        if p.score != FASTATTN_DOT:
            unpack(&p.w, 0, t.h, p.D, t.w)
        e = begin
        while e < end:
            gather_edges(t, e, min(end, e + EDGES))
            e += EDGES
            for i in range(t.n):
                t.S[i] = (<const real*>p.weights)[t.at[i]*p.H + t.h]
            if p.score == FASTATTN_DOT:
                add_edges(t, t.S, &p.value, &p.edge_value, t.v_at, p.Dv, 1)
            else:
                add_slopes(t, t.S, &p.value, &p.edge_value, t.O, NULL)
    write_node(&p.out, out_row, h_kv, p.Dv, t.O, 1)


cdef size_t lay_out_edges(Edges* t, const fastattn_graph* p, char* memory) noexcept nogil:
    cdef Py_ssize_t wide = max(whole(p.D), whole(p.Dv))
    cdef real* at = <real*>(memory + (sizeof(Edges) + 63)//64*64)
    t.q = at
    t.w = t.q + max(TWINS, p.H)*whole(p.D)
    t.g = t.w + whole(p.D)
    t.Ob = t.g + whole(p.Dv)
    t.O = t.Ob + wide
    t.l = <double*>(t.O + max(TWINS, p.H)*wide)
    t.m = <real*>(t.l + max(TWINS, p.H))
    t.scores = t.m + max(TWINS, p.H)
    if is_sparse(p) and p.mode == FASTATTN_GRAPH_OUTPUT and p.scores == NULL:
        return <char*>(t.scores + p.H*p.longest) - memory
    return <char*>t.scores - memory


cdef size_t graph_scratch(const fastattn_graph* p) noexcept nogil:
    cdef Edges t
    return lay_out_edges(&t, p, NULL)


cdef void find_levels(const fastattn_graph* p, int64_t task) noexcept nogil:
    # Of target task / H and head task % H
    cdef int64_t i = task//p.H
    cdef const real* S = <const real*>p.scores + (task % p.H)*p.n_scores + p.begin[i]
    cdef real m
    level_of(p, S, p.end[i] - p.begin[i], &m, &p.pairs[2*task + 1])
    p.pairs[2*task] = m


cdef void attend_task(Edges* t, int64_t i, int64_t stop) noexcept nogil:
    # Targets with the same sources go head by head: keys and values of one are found in the cache again.
    cdef int64_t end, h, row
    cdef int n
    while i < stop:
        if is_sparse(t.p):
            attend_sparsely(t, i)
            i += 1
            continue
        end = i + alike(t.p, i, stop)
        if end == i + 1:
            attend_rows(t, i, 1, 0, t.p.H)
            i += 1
            continue
        for h in range(t.p.H):
            row = i
            while row < end:
                n = TWINS if end - row >= TWINS else 2 if end - row >= 2 else 1
                attend_rows(t, row, n, h, h + 1)
                row += n
        i = end


cdef void run_graph(const fastattn_graph* p, int64_t task, void* memory) noexcept nogil:
    # Rows cuts[task] to cuts[task + 1] - 1 of all heads.
    cdef Edges* t = <Edges*>memory
    cdef int64_t i, h
    cdef int64_t heads = p.Hkv if p.mode == FASTATTN_GRAPH_SUM else p.H
    cdef real* w_grad
    if p.mode == FASTATTN_GRAPH_LEVELS:
        find_levels(p, task)
        return
    memset(t, 0, sizeof(Edges))         # lanes behind the last edge are computed with, not used
    t.p = p
    lay_out_edges(t, p, <char*>memory)
    if p.mode == FASTATTN_GRAPH_OUTPUT:
        attend_task(t, p.cuts[task], p.cuts[task + 1])
        return
    for i in range(p.cuts[task], p.cuts[task + 1]):
        t.row = row_of(p, i)
        if p.mode == FASTATTN_GRAPH_SCORES:
            score_row(t, i, <real*>p.scores + p.first_score[i], p.n_scores)
            continue
        for h in range(heads):
            t.h = h
            t.h_kv = h if p.mode == FASTATTN_GRAPH_SUM else h//(p.H//p.Hkv)
            if p.mode == FASTATTN_GRAPH_SUM:
                sum_row(t, p.begin[i], p.end[i], i)
                continue
            if p.score != FASTATTN_DOT:
                unpack(&p.w, 0, h, p.D, t.w)
            w_grad = NULL
            if p.grad_w != NULL:
                w_grad = <real*>p.grad_w + (task*p.H + h)*((p.D + 15)//16*16)
            row_gradient(t, i, w_grad)
