# The gradients along edges. One pass over the targets computes the weights again from lse and leaves three numbers for each
# edge and head; with them each source, in a graph of edges turned around, sums what its edges bring: sum_row.

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
