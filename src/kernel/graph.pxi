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
