# The weights themselves, and what is reduced from them: a second walk over a task's blocks, when its references m and sums l
# are final. P / l of a block is written out, reduced over the queries, or over the keys; it is never stored beyond the block.
#
#     weights   result[i, j]  = P[j, i] c[i]                             c = 1 / l
#     sum, max  result[j]     = over i of P[j, i] c[i]                   a chunk of rows, one task: always in the same order
#     entropy   result[i]     = -sum_j p ln p,  ln p = (S - m) κ ln 2 + ln c
#     top k     result[i, :k] = the largest p of each row                scores are kept, in descending order

cdef void spoil(Task* t, int first, int vectors, int64_t block, const Parts* parts, bint masked) noexcept nogil:
    # Rows whose weights are NaN (a NaN score, or all scores -inf): NaN for each key that they see, 0 for the others.
    cdef Py_ssize_t i, j
    cdef int part
    for i in range(first*VL, min((first + vectors)*VL, t.n_queries)):
        if t.nan_rows >> i & 1 == 0:
            continue
        for part in range(parts.n):
            for j in range(parts.begin[part], parts.end[part]):
                if (not masked or t.seen[j] >> i & 1) and not biased_away(t, i, block + j):
                    t.S[j*LANES + i] = NAN
                else:
                    t.S[j*LANES + i] = 0


cdef void reduce_queries(Task* t, int first, int vectors, const Parts* parts) noexcept nogil:
    # across[j] = sum or maximum over the vectors of P c. Lanes past the last query are left out: their query is 0, and
    # 0 · Inf of a key is NaN.
    cdef uint64_t valid = ~<uint64_t>0 >> (64 - t.n_queries)
    cdef bint largest = t.p.reduce == FASTATTN_MAX
    cdef const real* P
    cdef vf x, y
    cdef Py_ssize_t j
    cdef int g, part
    for part in range(parts.n):
        for j in range(parts.begin[part], parts.end[part]):
            P = t.S + j*LANES
            x = v_load(t.across + j*VL)
            for g in range(first, first + vectors):
                y = v_keep(v_mul(v_load(P + g*VL), v_load(t.c + g*VL)), valid >> g*VL)
                # 0 (x + y): a NaN stays, which the maximum alone would drop
                x = v_fma(v_zero(), v_add(x, y), v_max(x, y)) if largest else v_add(x, y)
            v_store(t.across + j*VL, x)


cdef void reduce_lanes(Task* t, int64_t block, Py_ssize_t n) noexcept nogil:
    # result[j] += or max= over the lanes of across[j], VL keys at once
    cdef const fastattn_problem* p = t.p
    cdef real* out = (<real*>p.result.data + offset(p, &p.result, t.b, t.h, NULL) + t.chunk*p.result.row + block)
    cdef v_square square
    cdef vf x, y
    cdef Py_ssize_t j = 0
    cdef int i
    while j < n:
        for i in range(VL):
            square.row[i] = v_load(t.across + (j + i)*VL) if j + i < n else v_zero()
        v_transpose(&square)
        x = v_load_part(out + j, n - j)
        for i in range(VL):
            y = square.row[i]
            x = v_fma(v_zero(), v_add(x, y), v_max(x, y)) if p.reduce == FASTATTN_MAX else v_add(x, y)
        v_store_part(out + j, x, n - j)
        j += VL


cdef void add_entropy(Task* t, int first, int vectors, const Parts* parts) noexcept nogil:
    # total[0] += sum_j w x,  w = 2^x,  x = (S - m) κ; 0 · -inf is 0 here. A block is summed from zero, in one chain over its
    # parts: where they are cut depends on other rows.
    cdef vf k = v_set1(t.kappa)
    cdef vf sum_, x, w
    cdef Py_ssize_t j
    cdef int g, part
    for g in range(first, first + vectors):
        sum_ = v_zero()
        for part in range(parts.n):
            for j in range(parts.begin[part], parts.end[part]):
                x = v_mul(v_sub(v_load(t.S + j*LANES + g*VL), v_load(t.base + g*VL)), k)
                w = v_exp2(x)
                sum_ = v_add(sum_, v_where_lt(v_zero(), w, v_mul(w, x), v_zero()))
        v_store(t.total + g*VL, v_add(v_load(t.total + g*VL), sum_))


cdef void keep_largest(Task* t, int first, int vectors, int64_t block, Py_ssize_t begin, Py_ssize_t n) noexcept nogil:
    # Scores above the k-th largest so far go into their lane's list; of equal ones the first key stays in front.
    cdef Py_ssize_t k = t.p.k
    cdef uint64_t bits
    cdef real* top
    cdef int64_t* at
    cdef real x
    cdef Py_ssize_t i, j, r
    cdef int g
    for j in range(begin, begin + n):
        for g in range(first, first + vectors):
            bits = v_above_bits(v_load(t.S + j*LANES + g*VL), v_load(t.total + g*VL))     # total[0]: the k-th largest
            while bits != 0:
                i = g*VL + bits_first(bits)
                bits &= bits - 1
                top = t.top + i*k
                at = t.top_at + i*k
                x = t.S[j*LANES + i]
                r = k - 1
                while r > 0 and top[r - 1] < x:
                    top[r] = top[r - 1]
                    at[r] = at[r - 1]
                    r -= 1
                top[r] = x
                at[r] = block + j
                t.total[i] = top[k - 1]


cdef void weighed_segment(Task* t, int first, int vectors, const Operands* of, int64_t block, const Parts* parts,
                          bint masked) noexcept nogil:
    # As `segment`, with references that are final.
    cdef const fastattn_problem* p = t.p
    cdef const fastattn_array* result = &p.result
    cdef Py_ssize_t lane = first*VL
    cdef Py_ssize_t begin, n
    cdef int part
    for part in range(parts.n):
        begin = parts.begin[part]
        n = parts.end[part] - begin
        if p.reduce == FASTATTN_TOP_K or (p.reduce == FASTATTN_ENTROPY and p.normalizer == FASTATTN_SOFTMAX):
            logits(t, first, vectors, of, block, begin, n, masked)
        else:
            weights(t, first, vectors, of, block, begin, n, masked)
        if p.reduce == FASTATTN_TOP_K:
            keep_largest(t, first, vectors, block, begin, n)
    if p.reduce == FASTATTN_ENTROPY and p.normalizer == FASTATTN_SOFTMAX:
        add_entropy(t, first, vectors, parts)
    elif p.reduce == FASTATTN_ENTROPY:
        add_plain_entropy(t, first, vectors, parts)
    if p.reduce == FASTATTN_ENTROPY or p.reduce == FASTATTN_TOP_K:
        return
    if t.nan_rows != 0:
        spoil(t, first, vectors, block, parts, masked)
    if p.reduce != FASTATTN_WEIGHTS:
        reduce_queries(t, first, vectors, parts)
        return
    for part in range(parts.n):
        begin = parts.begin[part]
        write_out(t.S + begin*LANES + lane, t.c + lane, t.n_queries - lane, vectors, parts.end[part] - begin,
                  <real*>result.data + offset(p, result, t.b, t.h, NULL) + (t.q_begin + lane)*result.row + block + begin,
                  result.row, 1, FASTATTN_REAL)


cdef void finish_weights(Task* t) noexcept nogil:
    # What is left of entropy and top k behind the last block.
    cdef const fastattn_problem* p = t.p
    cdef real* out = <real*>p.result.data + offset(p, &p.result, t.b, t.h, NULL) + t.q_begin*p.result.row
    cdef int64_t* indices = <int64_t*>p.indices.data
    cdef double c, ln2 = 0.69314718055994530942
    cdef int64_t at
    cdef Py_ssize_t i, r
    if p.reduce == FASTATTN_TOP_K:
        indices += offset(p, &p.indices, t.b, t.h, NULL) + t.q_begin*p.indices.row
    for i in range(t.n_queries):
        c = NAN if t.nan_rows >> i & 1 else t.c[i]
        if p.reduce == FASTATTN_ENTROPY and p.normalizer != FASTATTN_SOFTMAX:
            out[i*p.result.row] = t.l[i] if c == c else NAN
        elif p.reduce == FASTATTN_ENTROPY:
            out[i*p.result.row] = <real>(0 - c*(ln2*t.total[i] + t.l[i]*log(c))) if c != 0 else 0
        elif p.reduce == FASTATTN_TOP_K:
            for r in range(p.k):        # a row that is NaN has no order
                at = t.top_at[i*p.k + r] if c == c else -1
                indices[i*p.indices.row + r] = at
                out[i*p.result.row + r] = NAN if c != c else 0
                if at >= 0 and p.normalizer != FASTATTN_SOFTMAX:
                    out[i*p.result.row + r] = <real>weight_of(t, i, t.top[i*p.k + r])
                elif at >= 0:
                    out[i*p.result.row + r] = <real>(c*exp((<double>t.top[i*p.k + r] - t.base[i])*t.kappa*ln2))


cdef void run_weights(const fastattn_problem* p, int64_t task, bint caller, void* memory) noexcept nogil:
    # One chunk of the rows of a head: its blocks of queries in their order.
    cdef Task t
    cdef Place place
    cdef int64_t n_blocks = (p.L + LANES - 1) // LANES
    cdef int64_t q_block, i
    place.few = False
    place.heads = 1
    place.b = task // p.chunks // p.H
    place.h = task // p.chunks % p.H
    for q_block in range(n_blocks*(task % p.chunks) // p.chunks, n_blocks*(task % p.chunks + 1) // p.chunks):
        place.q_begin = q_block*LANES
        place.q_end = min(p.L, place.q_begin + LANES)
        if not prepare(&t, p, &place, 0, memory):
            continue
        t.cold = False
        t.chunk = task % p.chunks
        t.later.at = 0
        t.later.n_next = 0
        t.nan_rows = 0
        if p.normalizer == FASTATTN_SOFTMAX and not walk(&t, 1, caller):
            return
        if finds_threshold(p) and not find_thresholds(&t, caller):
            return
        normalise(&t, NULL)
        for i in range(t.vectors*VL):
            if t.c[i] != t.c[i]:
                t.nan_rows |= <uint64_t>1 << i
                t.c[i] = 1
            t.total[i] = -INFINITY if p.reduce == FASTATTN_TOP_K else 0
            if p.normalizer != FASTATTN_SOFTMAX:
                t.l[i] = 0
        for i in range(LANES*p.k):
            t.top[i] = -INFINITY
            t.top_at[i] = -1
        t.stage = WEIGH
        if not walk(&t, 1, caller):
            return
        finish_weights(&t)
