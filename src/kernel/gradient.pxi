# The gradients, with the weights of each block of keys recomputed from the saved log-sum-exp: nothing of L x S is stored.
#
#     P  = 2^((S - base) κ)        base = lse in units of S; as in the forward pass                          [keys][lanes]
#     dP = V dOt                   product N                                                                  [keys][lanes]
#     dZ = P (dP - delta)          delta = sum_d out dO - grad_lse, of each lane; dZ is the bias' gradient. A dropout
#                                  multiplies dP before and P behind this by its factors, made again from the seed
#     dS = dZ (1 - (y / cap)^2)    where a softcap made y of the scores
#
#     dV += P dO     dK += dS Q    product N, its lanes over Dv and D, rows of queries packed [LANES][Dv'], [LANES][D']
#     dQt += Kt dS                 product T; scale joins when dK and dQ are written
#
# A task is a chunk of the keys of one key head, whose dK and dV no other task touches: it goes through the blocks of queries
# of all heads that read them. dQ of a block of queries runs through the chunks: each goes on where the one before has left it,
# in its turn. So every sum has one order, that of the queries and of the keys, however many chunks or threads there are.
#
# `careful`: 0 · NaN must not reach a sum. Where not all lanes see all keys and an operand is not finite, the three sums leave
# out what is not seen, one lane after the other, in the order of the products.

cdef enum:
    CHUNK_KEYS = 11*96      # dK and dV of a chunk stay in the second-level cache
    PACE = 2                # rows asked for at each row of a product, where a key head has one chunk: its results and the next


cdef struct Back:
    int64_t chunk, first, end       # of keys
    real* Gt                        # [Dv][LANES] grad_out, transposed
    real* dS                        # [BLOCK][LANES]
    real* slope                     # [BLOCK][LANES] 1 - (y / cap)^2
    real* dQt                       # [D][LANES]
    real* room                      # [LANES][D'] for queries that are packed
    const real* Q                   # the block's queries, rows of whole vectors, ldq apart: where they lie if that is so
    Py_ssize_t ldq
    real* G                         # [LANES][Dv'] grad_out
    real* delta
    real* trim                      # what the rounding of base took from P; G has it too
    real* ones
    real* row_sums                  # of dZ
    real* dK                        # [keys of the chunk][D']
    real* dV                        # [keys of the chunk][Dv']
    real* dW                        # [D][VL] of additive scores
    real* before                    # [BLOCK][LANES] scores before the caller's function
    bint finite                     # Q and G are
    char* looked                    # of each block of the chunk: 1 if keys and values are finite, 2 if not, 0: not known yet


cdef inline int64_t query_blocks(const fastattn_problem* p, int64_t b) noexcept nogil:
    return (rows_of_batch(p.cu_q, b, p.L) + LANES - 1)//LANES


cdef void place_queries(const fastattn_problem* p, Place* place, int64_t q_block) noexcept nogil:
    # The rows of a block: vectors are shared out evenly, but where tiles of a mask want whole groups of rows.
    cdef int64_t L = rows_of_batch(p.cu_q, place.b, p.L)
    cdef int64_t n_vectors = (L + VL - 1)//VL
    cdef int64_t n_blocks = query_blocks(p, place.b)
    if p.tiles.first != NULL:
        place.q_begin = q_block*LANES
        place.q_end = min(L, place.q_begin + LANES)
    else:
        place.q_begin = n_vectors*q_block//n_blocks*VL
        place.q_end = min(L, n_vectors*(q_block + 1)//n_blocks*VL)


cdef inline int64_t block_of(const Place* place) noexcept nogil:
    # Its number, however they are shared out: a block ends behind the first row of the one of that number were all full.
    return (place.q_end - 1)//LANES


cdef inline int64_t key_blocks(const fastattn_problem* p) noexcept nogil:
    return (p.S + BLOCK - 1)//BLOCK


cdef inline int64_t chunk_begin(const fastattn_problem* p, int64_t chunk) noexcept nogil:
    # Where the blocks don't divide, the last chunks have one more: two threads in step never wait for a longer one before.
    cdef int64_t least = key_blocks(p)//p.chunks
    cdef int64_t shorter = p.chunks - key_blocks(p) % p.chunks
    return (chunk*least + max(<int64_t>0, chunk - shorter))*BLOCK


cdef inline int64_t chunk_of(const fastattn_problem* p, int64_t key) noexcept nogil:
    cdef int64_t least = key_blocks(p)//p.chunks
    cdef int64_t shorter = p.chunks - key_blocks(p) % p.chunks
    cdef int64_t block = key//BLOCK
    return block//least if block < shorter*least else shorter + (block - shorter*least)//(least + 1)


cdef int64_t gradient_tasks(fastattn_problem* p, int64_t threads) noexcept nogil:
    # As many chunks as keep all threads busy to the end: one for each where all chunks are the same work, more where only
    # some keys are seen.
    cdef int64_t tasks = p.B*p.Hkv//p.in_turn
    cdef int64_t most = key_blocks(p)
    cdef int64_t wanted = (most*BLOCK + CHUNK_KEYS - 1)//CHUNK_KEYS
    if p.grad_rows != NULL or p.grad_w != NULL:
        wanted = p.parts
    elif threads > 1 and tasks < 4*threads:
        if p.left < p.S or p.right < p.S or p.mask.data != NULL or p.tiles.first != NULL or p.kv_lengths != NULL:
            wanted = max(wanted, (4*threads + tasks - 1)//tasks)
        wanted = (wanted + threads - 1)//threads*threads
    p.chunks = max(<int64_t>1, min(wanted, most))
    p.groups = p.B*p.H*((p.L + LANES - 1)//LANES)       # turns
    p.batch_tasks = tasks
    return 0 if p.groups*p.S == 0 else tasks*p.chunks


cdef size_t lay_out_back(Back* back, const fastattn_problem* p, char* memory) noexcept nogil:
    cdef real* at = <real*>memory
    cdef Py_ssize_t rows = 0
    cdef int64_t chunk
    for chunk in range(p.chunks):
        rows = max(rows, chunk_begin(p, chunk + 1) - chunk_begin(p, chunk))
    back.Gt = at
    back.dS = back.Gt + aligned(p.Dv*LANES)
    back.slope = back.dS + BLOCK*LANES
    back.before = back.slope + (BLOCK*LANES if p.softcap > 0 else 0)
    back.dW = back.before + (BLOCK*LANES if p.score_mod != NULL else 0)
    back.dQt = back.dW + (aligned(p.D*VL) if p.score == FASTATTN_ADDITIVE else 0)
    back.room = back.dQt + aligned(p.D*LANES)
    back.G = back.room + LANES*whole(p.D)
    back.delta = back.G + LANES*whole(p.Dv)
    back.trim = back.delta + LANES
    back.ones = back.trim + LANES
    back.row_sums = back.ones + LANES
    back.dK = back.row_sums + LANES
    back.dV = back.dK + rows*whole(p.D)
    back.looked = <char*>(back.dV + rows*whole(p.Dv))
    return back.looked + rows//BLOCK + 64 - memory


# --- one block of keys -----------------------------------------------------------------------------------------------

cdef void score_gradients(real* P, real* dS, int vectors, Py_ssize_t n, const real* delta, const real* trim,
                          const uint64_t* seen, const uint64_t* kept, real keep, int shift) noexcept nogil:
    # dS = P (dS - delta) trim, 0 where a lane does not see the key; seen may be NULL. So may kept, which says whose weights
    # stay in a dropout: P and, before, dS are multiplied by keep or 0.
    cdef Py_ssize_t j
    cdef int g
    cdef vf x, p
    for j in range(n):
        for g in range(vectors):
            p = v_load(P + g*VL)
            x = v_load(dS + g*VL)
            if kept != NULL:
                x = v_mul(v_keep(x, kept[j] >> (shift + g*VL)), v_set1(keep))
                v_store(P + g*VL, v_mul(v_keep(p, kept[j] >> (shift + g*VL)), v_set1(keep)))
            x = v_mul(p, v_mul(v_sub(x, v_load(delta + g*VL)), v_load(trim + g*VL)))
            v_store(dS + g*VL, v_keep(x, seen[j] >> (shift + g*VL)) if seen != NULL else x)
        P += LANES
        dS += LANES


cdef void add_diagonals(Task* t, Py_ssize_t lane, Py_ssize_t last, int64_t key, Py_ssize_t n, const real* dZ) noexcept nogil:
    # of a bias that positions make: a part for each chunk
    cdef const fastattn_problem* p = t.p
    cdef real* to = <real*>p.grad_bias.data + t.back.chunk*p.grad_bias.row + offset(p, &p.grad_bias, t.b, t.h, NULL)
    cdef Py_ssize_t i, j
    for j in range(n):
        for i in range(lane, last):
            to[p.grad_rows[t.q_begin + i] + p.grad_cols[key + j]] += dZ[j*LANES + i - lane]


cdef void add_bias_gradient(Task* t, int first, int vectors, int64_t key, Py_ssize_t n, const real* dZ) noexcept nogil:
    # grad_bias += dZ, transposed, for n keys; what is one number for all keys goes to row_sums.
    cdef const fastattn_problem* p = t.p
    cdef const fastattn_array* a = &p.grad_bias
    cdef Py_ssize_t lane = first*VL
    cdef Py_ssize_t last = min(lane + <Py_ssize_t>vectors*VL, t.n_queries)
    cdef uint64_t valid
    cdef v_square square
    cdef real* to
    cdef real* row
    cdef vf x
    cdef Py_ssize_t i, j, m
    cdef int g
    if p.row_grad.data != NULL:
        for g in range(vectors):
            x = v_zero()
            for j in range(n):
                x = v_add(x, v_load(dZ + j*LANES + g*VL))
            v_store(t.back.row_sums + lane + g*VL, v_add(v_load(t.back.row_sums + lane + g*VL), x))
    if a.data == NULL:
        return
    if p.grad_rows != NULL:
        add_diagonals(t, lane, last, key, n, dZ)
        return
    to = <real*>a.data + offset(p, a, t.b, t.h, NULL) + key*a.col
    valid = ~<uint64_t>0 >> (64 - (last - lane))
    j = 0
    while j < n:
        m = min(<Py_ssize_t>VL, n - j)
        if a.row == 0:              # one number for all queries: lanes past the last one are left out
            for i in range(VL):
                square.row[i] = v_zero()
            for i in range(m):
                for g in range(vectors):
                    square.row[i] = v_add(square.row[i], v_keep(v_load(dZ + (j + i)*LANES + g*VL), valid >> g*VL))
            v_transpose(&square)
            x = v_load_part(to + j, m)
            for i in range(VL):
                x = v_add(x, square.row[i])
            v_store_part(to + j, x, m)
        else:
            for g in range(vectors):
                for i in range(VL):
                    square.row[i] = v_load(dZ + (j + i)*LANES + g*VL) if i < m else v_zero()
                v_transpose(&square)
                for i in range(min(<Py_ssize_t>VL, last - lane - g*VL)):
                    row = to + lane_at(t, a, lane + g*VL + i) + j
                    v_store_part(row, v_add(v_load_part(row, m), square.row[i]), m)
        j += VL


cdef void sum_seen_rows(const real* A, const uint64_t* words, Py_ssize_t lane, Py_ssize_t n, const real* B, Py_ssize_t ldb,
                        real* C, Py_ssize_t m, Py_ssize_t columns) noexcept nogil:
    # C[j] += sum of A[j, i] B[i] over the lanes i < n that see key j: as product_rows, but careful
    cdef Py_ssize_t i, j, d
    cdef vf acc
    for j in range(m):
        d = 0
        while d < columns:
            acc = v_zero()
            for i in range(n):
                if words[j] >> (lane + i) & 1:
                    acc = v_fma(v_set1(A[j*LANES + i]), v_load(B + i*ldb + d), acc)
            v_store(C + j*columns + d, v_add(v_load(C + j*columns + d), acc))
            d += VL


cdef void sum_seen_keys(const real* A, Py_ssize_t lda, const real* B, const uint64_t* words, int shift, int vectors,
                        const Parts* parts, real* C, Py_ssize_t m) noexcept nogil:
    # C[d] += sum of A[j, d] B[j] over the keys j that each lane sees: as product_t, but careful
    cdef Py_ssize_t j, d
    cdef int g, part
    cdef vf acc, x
    for d in range(m):
        for g in range(vectors):
            acc = v_zero()
            for part in range(parts.n):
                for j in range(parts.begin[part], parts.end[part]):
                    x = v_fma(v_set1(A[j*lda + d]), v_load(B + j*LANES + g*VL), acc)
                    acc = v_select(words[j] >> (shift + g*VL), x, acc)
            v_store(C + d*LANES + g*VL, v_add(v_load(C + d*LANES + g*VL), acc))


cdef void visible(Task* t, int64_t block, Py_ssize_t n, bint masked, uint64_t* words) noexcept nogil:
    # the lanes that see each key of a block, bias included
    cdef Py_ssize_t i, j
    for j in range(n):
        words[j] = t.seen[j] if masked else t.lanes
        if t.bias != NULL:
            for i in range(t.n_queries):
                if words[j] >> i & 1 and biased_away(t, i, block + j):
                    words[j] &= ~(<uint64_t>1 << i)


cdef bint finite_block(Task* t, const Operands* of, int64_t block, Py_ssize_t n) noexcept nogil:
    # Of all n keys and values that this block of queries sees some of; as far as known of the whole block of the chunk.
    cdef char* looked = t.back.looked + (block - t.back.first)//BLOCK
    cdef bint finite
    if looked[0] != 0:
        return looked[0] == 1
    finite = all_finite(of.k, of.k_row, n, t.p.D) and all_finite(of.v, of.v_row, n, t.p.Dv)
    if n == BLOCK or block + n == t.back.end:
        looked[0] = 1 if finite else 2
    return finite


cdef void gradient_segment(Task* t, int first, int vectors, const Operands* of, int64_t block, Py_ssize_t n,
                           const Parts* parts, bint masked) noexcept nogil:
    # As `segment`.
    cdef const fastattn_problem* p = t.p
    cdef Back* back = t.back
    cdef Py_ssize_t lane = first*VL
    cdef Py_ssize_t n_lanes = min(<Py_ssize_t>vectors*VL, t.n_queries - lane)
    cdef Py_ssize_t ldk = whole(p.D)
    cdef Py_ssize_t ldv = whole(p.Dv)
    cdef uint64_t words[BLOCK]
    cdef uint64_t kept[BLOCK]
    cdef uint64_t counted[BLOCK]
    cdef uint64_t valid = ~<uint64_t>0 >> (64 - t.n_queries)
    cdef const uint64_t* seen = t.seen if masked else NULL
    cdef bint careful = (masked or t.bias != NULL) and not (back.finite and finite_block(t, of, block, n))
    cdef Py_ssize_t begin, m, at, j
    cdef real* P
    cdef real* dS
    cdef int part
    if careful:
        visible(t, block, n, masked, words)
        seen = words
    for part in range(parts.n):
        begin = parts.begin[part]
        m = parts.end[part] - begin
        at = block + begin - back.first
        P = t.S + begin*LANES + lane
        dS = back.dS + begin*LANES + lane
        weights(t, first, vectors, of, block, begin, m, masked)
        chain_n(vectors, of.v + begin*of.v_row, of.v_row, back.Gt + lane, p.Dv, dS, m, True, &t.later)
        if p.dropout != 0:
            kept_lanes(t, first, vectors, block + begin, m, kept)
        if p.normalizer != FASTATTN_SOFTMAX:
            slope_gradients(t, P, dS, vectors, m, back.delta + lane, seen + begin if seen != NULL else NULL,
                            kept if p.dropout != 0 else NULL, <real>p.keep, lane)
        else:
            score_gradients(P, dS, vectors, m, back.delta + lane, back.trim + lane, seen + begin if seen != NULL else NULL,
                            kept if p.dropout != 0 else NULL, <real>p.keep, lane)
        if p.grad_bias.data != NULL or p.row_grad.data != NULL:
            add_bias_gradient(t, first, vectors, block + begin, m, dS)
        if p.softcap > 0:
            scale_pass(dS, back.slope + begin*LANES + lane, vectors, m)
        if p.score_mod != NULL:
            p.score_grad(dS, back.before + begin*LANES + lane, t.b, t.h, t.q_begin + lane, block + begin, n_lanes, m, LANES,
                         p.score_data)
            if seen != NULL:
                keep_pass(dS, vectors, m, seen + begin, lane)
        if p.score == FASTATTN_ADDITIVE:
            if careful:
                sum_seen_rows(P, words + begin, lane, n_lanes, back.G + lane*ldv, ldv, back.dV + at*ldv, m, ldv)
            else:
                product_rows(P, n_lanes, back.G + lane*ldv, ldv, back.dV + at*ldv, m, ldv, ldv, &t.later)
            for j in range(m):
                counted[j] = (seen[begin + j] if seen != NULL else t.lanes) & valid
            additive_gradients(t, first, vectors, of.k + begin*of.k_row, of.k_row, dS, counted, m, back.dQt + lane,
                               back.dK + at*ldk, ldk, back.dW)
        elif careful:
            sum_seen_rows(P, words + begin, lane, n_lanes, back.G + lane*ldv, ldv, back.dV + at*ldv, m, ldv)
            sum_seen_rows(dS, words + begin, lane, n_lanes, back.Q + lane*back.ldq, back.ldq, back.dK + at*ldk, m, ldk)
        else:
            product_rows(P, n_lanes, back.G + lane*ldv, ldv, back.dV + at*ldv, m, ldv, ldv, &t.later)
            product_rows(dS, n_lanes, back.Q + lane*back.ldq, back.ldq, back.dK + at*ldk, m, ldk, ldk, &t.later)
    if p.score == FASTATTN_ADDITIVE:
        return
    if careful:
        sum_seen_keys(of.k, of.k_row, back.dS + lane, words, lane, vectors, parts, back.dQt + lane, p.D)
    else:
        product_t(vectors, of.k, of.k_row, back.dS + lane, parts, back.dQt + lane, p.D, back.ones + lane, NULL)


# --- one block of queries against a chunk, and a task ----------------------------------------------------------------

cdef void pack_lines(const Task* t, const char* a, const fastattn_array* array, Py_ssize_t n, real* to) noexcept nogil:
    # rows of the block's queries as reals, one behind the other, each of whole vectors
    cdef Py_ssize_t i, d
    for i in range(t.n_queries):
        d = 0
        while d < n:
            v_store(to, load_row(a, (t.q_begin + i)*array.row + d*array.col, array.col, n - d, array.kind))
            to += VL
            d += VL


cdef void row_products(Task* t, const char* g, const char* out) noexcept nogil:
    # delta = sum_d grad_out · out of each lane, and G = grad_out · trim: rows of whole vectors, one behind the other
    cdef const fastattn_problem* p = t.p
    cdef Back* back = t.back
    cdef bint plain = (p.grad_out.kind == FASTATTN_REAL and p.grad_out.col == 1 and p.out.kind == FASTATTN_REAL
                       and p.out.col == 1)
    cdef vf sums[VL]
    cdef vf x, y, acc
    cdef real* to = back.G
    cdef Py_ssize_t first = 0
    cdef Py_ssize_t i, d, at_g, at_out
    while first < t.vectors*VL:
        for i in range(VL):
            acc = v_zero()
            d = 0
            while first + i < t.n_queries and d < p.Dv:
                at_g = (t.q_begin + first + i)*p.grad_out.row + d*p.grad_out.col
                at_out = (t.q_begin + first + i)*p.out.row + d*p.out.col
                if plain:
                    x = v_load_part(<const real*>g + at_g, p.Dv - d)
                    y = v_load_part(<const real*>out + at_out, p.Dv - d)
                else:
                    x = load_row(g, at_g, p.grad_out.col, p.Dv - d, p.grad_out.kind)
                    y = load_row(out, at_out, p.out.col, p.Dv - d, p.out.kind)
                acc = v_fma(x, y, acc)
                v_store(to, v_mul(x, v_set1(back.trim[first + i])))
                to += VL
                d += VL
            sums[i] = acc
        v_store(back.delta + first, v_sums(sums))
        first += VL


cdef inline double near_one(double y) noexcept nogil:
    # exp(y); y is mostly the rounding of a base
    return 1 + y*(1 + y*(0.5 + y*(1.0/6))) if -0.015625 < y < 0.015625 else exp(y)


cdef void rows_before(Task* t, bint begins) noexcept nogil:
    # What the products take of the block's queries, and what each row brings to its scores. begins: this is the first chunk.
    cdef const fastattn_problem* p = t.p
    cdef Back* back = t.back
    cdef Py_ssize_t i
    cdef const char* q = base_of(p, &p.query, t.b, t.h, p.cu_q, False)
    cdef const char* g = base_of(p, &p.grad_out, t.b, t.h, p.cu_q, False)
    cdef const char* out = base_of(p, &p.out, t.b, t.h, p.cu_q, False)
    cdef const real* lse = <const real*>base_of(p, &p.lse, t.b, t.h, p.cu_q, False)
    cdef const real* grad_lse = NULL
    cdef real* delta = <real*>base_of(p, &p.delta, t.b, t.h, p.cu_q, False)
    cdef double nats = t.exact_kappa*0.69314718055994530942
    cdef double x
    if p.grad_lse.data != NULL:
        grad_lse = <const real*>base_of(p, &p.grad_lse, t.b, t.h, p.cu_q, False)
    for i in range(t.n_queries if p.normalizer == FASTATTN_SOFTMAX else 0):
        x = lse[(t.q_begin + i)*p.lse.row]
        t.base[i] = <real>(x/nats) if x != -INFINITY else 0
        back.trim[i] = <real>near_one(t.base[i]*nats - x) if x != -INFINITY else 1
    for i in range(t.n_queries if p.normalizer == FASTATTN_SOFTMAX else 0, t.vectors*VL):
        back.trim[i] = 1
        if p.normalizer == FASTATTN_SOFTMAX:
            t.base[i] = 0
    for i in range(LANES):
        back.ones[i] = 1
    row_products(t, g, out)
    for i in range(t.n_queries):
        if p.normalizer != FASTATTN_SOFTMAX and not has_threshold(p):
            back.delta[i] = 0
        if grad_lse != NULL:
            back.delta[i] = <real>(<double>back.delta[i] - grad_lse[(t.q_begin + i)*p.grad_lse.row])
        if begins:
            delta[(t.q_begin + i)*p.delta.row] = back.delta[i]
    if p.query.kind == FASTATTN_REAL and p.query.col == 1 and p.D % VL == 0:
        back.Q = <const real*>q + t.q_begin*p.query.row
        back.ldq = p.query.row
    else:
        pack_lines(t, q, &p.query, p.D, back.room)
        back.Q = back.room
        back.ldq = whole(p.D)
    pack_queries(g + t.q_begin*p.grad_out.row*v_size(p.grad_out.kind), p.grad_out.row, p.grad_out.col, p.grad_out.kind,
                 t.n_queries, t.vectors, p.Dv, 1, back.Gt)
    back.finite = (all_finite(back.Q, back.ldq, t.n_queries, p.D)
                   and all_finite(back.G, whole(p.Dv), t.n_queries, p.Dv))


cdef void clear_rows(const fastattn_problem* p, const Place* place, Py_ssize_t begin) noexcept nogil:
    # dQ of rows from `begin` on that see no key
    cdef real* dQ = <real*>base_of(p, &p.grad_query, place.b, place.h, p.cu_q, False)
    cdef Py_ssize_t i
    for i in range(begin, place.q_end):
        memset(dQ + i*p.grad_query.row, 0, p.D*sizeof(real))


cdef bint next_place(const fastattn_problem* p, Place* place, bint other) noexcept nogil:
    # The block of queries behind `place`, of the next head of the group or, if other, of the next key head; False if none.
    cdef int64_t group = p.H//p.Hkv
    cdef int64_t q_block = block_of(place) + 1
    if place.q_end == rows_of_batch(p.cu_q, place.b, p.L):
        q_block = 0
        if (place.h + 1) % group == 0 and not other:
            return False
        place.h += 1
        if place.h == p.H:
            place.h = 0
            place.b += 1
            if place.b == p.B:
                return False
    if rows_of_batch(p.cu_q, place.b, p.L) == 0:
        return False
    place_queries(p, place, q_block)
    return True


cdef void expect_queries(Task* t, const Place* here) noexcept nogil:
    # Where this block's results go, and what the block of queries behind it reads: its rows; the keys and values behind those
    # of this block, or of another head.
    cdef const fastattn_problem* p = t.p
    cdef Ahead* later = &t.later
    cdef Place place = here[0]
    cdef int64_t h_kv = place.h//(p.H//p.Hkv)
    cdef int64_t n = rows_of_batch(p.cu_k, place.b, p.S)
    cdef int64_t first
    cdef bint last
    later.at = 0
    later.n_next = 0
    later.pace = 1
    expect_array(later, p, &p.grad_query, place.b, place.h, p.cu_q, place.q_begin, place.q_end - place.q_begin, p.D)
    last = not next_place(p, &place, p.chunks == 1 and p.in_turn == 1)
    if p.chunks == 1 and (last or place.b != here.b or place.h//(p.H//p.Hkv) != h_kv):
        expect_array(later, p, &p.grad_key, here.b, h_kv, p.cu_k, 0, min(n, <int64_t>2*BLOCK), p.D)
        expect_array(later, p, &p.grad_value, here.b, h_kv, p.cu_k, 0, min(n, <int64_t>2*BLOCK), p.Dv)
        later.pace = PACE
    if last:
        return
    n = place.q_end - place.q_begin
    expect_array(later, p, &p.grad_out, place.b, place.h, p.cu_q, place.q_begin, n, p.Dv)
    expect_array(later, p, &p.out, place.b, place.h, p.cu_q, place.q_begin, n, p.Dv)
    expect_array(later, p, &p.query, place.b, place.h, p.cu_q, place.q_begin, n, p.D)
    first = t.end
    n = min(<int64_t>LANES, t.back.end - first)
    if place.b != here.b or place.h//(p.H//p.Hkv) != h_kv:
        h_kv = place.h//(p.H//p.Hkv)
        first = 0
        n = 2*BLOCK
    n = min(n, rows_of_batch(p.cu_k, place.b, p.S) - first)
    expect_array(later, p, &p.key, place.b, h_kv, p.cu_k, first, n, p.D)
    expect_array(later, p, &p.value, place.b, h_kv, p.cu_k, first, n, p.Dv)


cdef void add_weight_gradient(const fastattn_problem* p, const Place* place, const Back* back) noexcept nogil:
    # grad_w += dW, whose lanes are summed, for this chunk
    cdef real* to = <real*>p.grad_w + ((place.b*p.H + place.h)*p.parts + back.chunk)*p.D
    cdef Py_ssize_t d
    for d in range(p.D):
        to[d] += sum_lanes(v_load(back.dW + d*VL))


cdef bint block_gradients(Task* t, const fastattn_problem* p, const Place* place, bint caller, void* memory) noexcept nogil:
    # One block of queries; False if the call was abandoned.
    cdef Back* back = t.back
    cdef int64_t begins, ends
    cdef int64_t* turn = <int64_t*>p.state + (place.b*p.H + place.h)*((p.L + LANES - 1)//LANES) + block_of(place)
    cdef real* dQ
    cdef real* sums = NULL
    cdef Py_ssize_t i
    if not prepare(t, p, place, 0, memory) or t.k_begin >= t.k_end:
        if back.chunk == 0:
            clear_rows(p, place, place.q_begin)
        return True
    begins = chunk_of(p, t.k_begin)
    ends = chunk_of(p, t.k_end - 1)
    if not begins <= back.chunk <= ends:
        return True
    t.back = back
    t.stage = DERIVE
    t.cold = False
    t.begin = max(t.k_begin, back.first)
    t.end = min(t.k_end, back.end)
    rows_before(t, begins == back.chunk)
    expect_queries(t, place)
    dQ = <real*>base_of(p, &p.grad_query, t.b, t.h, p.cu_q, False) + t.q_begin*p.grad_query.row
    if p.row_grad.data != NULL:
        sums = <real*>base_of(p, &p.row_grad, t.b, t.h, p.cu_q, False) + t.q_begin*p.row_grad.row
    while fastattn_add(turn, 0) != back.chunk - begins:
        if p.stop != NULL and p.stop[0]:
            return False
        fastattn_yield()
    if begins == back.chunk:
        memset(back.dQt, 0, p.D*LANES*sizeof(real))
    else:
        pack_queries(dQ, p.grad_query.row, 1, FASTATTN_REAL, t.n_queries, t.vectors, p.D, 1, back.dQt)
    if sums != NULL:
        for i in range(LANES):
            back.row_sums[i] = sums[i*p.row_grad.row] if i < t.n_queries else 0
    if p.score == FASTATTN_ADDITIVE:
        memset(back.dW, 0, p.D*VL*sizeof(real))
    if not walk(t, 1, caller):
        return False
    if p.grad_w != NULL:
        add_weight_gradient(p, place, back)
    for i in range(LANES):
        t.c[i] = <real>p.scale if back.chunk == ends else 1
    write_out(back.dQt, t.c, t.n_queries, t.vectors, p.D, dQ, p.grad_query.row, 1, FASTATTN_REAL)
    if sums != NULL:
        for i in range(t.n_queries):
            sums[i*p.row_grad.row] = back.row_sums[i]
    if back.chunk == ends:
        clear_rows(p, place, t.q_begin + t.each)
    fastattn_add(turn, 1)
    return True


cdef void write_rows(const real* a, Py_ssize_t lda, real scale, Py_ssize_t n, Py_ssize_t columns, real* to,
                     Py_ssize_t row) noexcept nogil:
    cdef Py_ssize_t j, d
    for j in range(n):
        d = 0
        while d < columns:
            v_store_part(to + j*row + d, v_mul(v_load(a + j*lda + d), v_set1(scale)), columns - d)
            d += VL


cdef void clear_bias(const fastattn_problem* p, int64_t b, int64_t first_head, int64_t heads, int64_t begin,
                     int64_t end) noexcept nogil:
    # grad_bias of some heads and of keys [begin, end)
    cdef int64_t h, i
    cdef real* to
    for h in range(first_head, first_head + heads):
        to = <real*>p.grad_bias.data + offset(p, &p.grad_bias, b, h, NULL)
        for i in range(p.L):
            memset(to + i*p.grad_bias.row + begin, 0, (end - begin)*sizeof(real))


cdef void run_gradient(const fastattn_problem* p, int64_t task, bint caller, void* memory) noexcept nogil:
    cdef Task* t = <Task*>memory
    cdef Back back
    cdef Place place
    cdef int64_t first = task % p.batch_tasks*p.in_turn
    cdef int64_t group = p.H//p.Hkv
    cdef int64_t one, h_kv, q_block
    cdef Py_ssize_t n
    back.chunk = task//p.batch_tasks
    back.first = chunk_begin(p, back.chunk)
    back.end = chunk_begin(p, back.chunk + 1)
    lay_out_back(&back, p, <char*>memory + (lay_out(t, p, 0, <char*>memory) + 63)//64*64)
    t.back = &back
    place.few = False
    place.heads = 1
    for one in range(first, first + p.in_turn):
        # The batches that share a bias one after the other, while it is in a cache.
        place.b = one//p.Hkv if p.in_turn == 1 else one % p.B
        h_kv = one % p.Hkv if p.in_turn == 1 else one//p.B
        if p.fresh and (p.in_turn == 1 or place.b == 0):
            clear_bias(p, place.b, h_kv*group, group, back.first, min(back.end, p.S))
        n = min(back.end, rows_of_batch(p.cu_k, place.b, p.S)) - back.first
        if n <= 0:
            if back.chunk == 0:         # a packed sequence without keys
                place.q_end = rows_of_batch(p.cu_q, place.b, p.L)
                for place.h in range(h_kv*group, (h_kv + 1)*group):
                    clear_rows(p, &place, 0)
            continue
        memset(back.dK, 0, n*whole(p.D)*sizeof(real))
        memset(back.dV, 0, n*whole(p.Dv)*sizeof(real))
        memset(back.looked, 0, (n + BLOCK - 1)//BLOCK)
        for place.h in range(h_kv*group, (h_kv + 1)*group):
            for q_block in range(query_blocks(p, place.b)):
                place_queries(p, &place, q_block)
                if not block_gradients(t, p, &place, caller, memory):
                    return
        write_rows(back.dK, whole(p.D), <real>p.scale, n, p.D,
                   <real*>base_of(p, &p.grad_key, place.b, h_kv, p.cu_k, False) + back.first*p.grad_key.row, p.grad_key.row)
        write_rows(back.dV, whole(p.Dv), 1, n, p.Dv,
                   <real*>base_of(p, &p.grad_value, place.b, h_kv, p.cu_k, False) + back.first*p.grad_value.row,
                   p.grad_value.row)
