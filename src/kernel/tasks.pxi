# How a problem is cut into tasks, what a task needs before its first block, and what the next one will read.

cdef int64_t blocks(int64_t L, int64_t heads, int64_t threads, bint whole) noexcept nogil:
    # Blocks of queries a head: as few as LANES allows, of equal width; more where that would leave threads idle. The bits
    # of a row do not depend on its block, so this may depend on the number of threads. `whole`: LANES rows
    # each, or halves or quarters, so that none straddles two groups of rows and sequences of all lengths have the same.
    cdef int64_t n_vectors = (L + VL - 1) // VL
    cdef int64_t best = (n_vectors + BLOCK_VECTORS - 1) // BLOCK_VECTORS
    cdef int64_t n, cost, least
    if whole:
        n = best
        while n < 4*best and heads*n < 4*threads:
            n *= 2
        return n
    if threads > 1 and heads*best < 4*threads:
        least = INT64_MAX
        for n in range(best, min(n_vectors, 4*best) + 1):
            cost = (heads*n + threads - 1) // threads*((n_vectors + n - 1) // n)
            if cost < least:
                least = cost
                best = n
    return best


cdef int64_t tasks(const fastattn_problem* p, int64_t threads) noexcept nogil:
    if p.reduce != FASTATTN_OUTPUT:
        return p.B*p.H*p.chunks
    return p.B*p.H*blocks(p.L, p.B*p.H, threads, p.tiles.first != NULL or p.cu_q != NULL)


cdef struct Place:
    int64_t b, h, q_begin, q_end


cdef inline int64_t rows_of_batch(const int64_t* cu, int64_t b, int64_t most) noexcept nogil:
    return cu[b + 1] - cu[b] if cu != NULL else most


cdef void locate(const fastattn_problem* p, int64_t n_tasks, int64_t task, Place* place) noexcept nogil:
    # Which rows of which head: vectors [n q / N, n (q + 1) / N) of its n vectors, or none. The last rows see most when causal:
    # longest first. Else in the order of memory: a window moves on over keys that are still in the cache.
    cdef int64_t n_blocks = n_tasks // (p.B*p.H)
    cdef int64_t q_block = task % n_blocks
    cdef int64_t L, n_vectors, width
    place.b = task // n_blocks // p.H
    place.h = task // n_blocks % p.H
    L = rows_of_batch(p.cu_q, place.b, p.L)
    if p.cu_q != NULL or p.tiles.first != NULL:
        # Shorter sequences have fewer blocks, and tiles want whole groups of rows: equal blocks of the longest one's width.
        width = LANES // (n_blocks // ((p.L + LANES - 1) // LANES))
        n_blocks = (L + width - 1) // width
    if p.left >= p.S and p.right < p.S:
        q_block = n_blocks - 1 - q_block
    if q_block < 0 or q_block >= n_blocks:
        place.q_begin = place.q_end = L
    elif p.tiles.first != NULL:
        place.q_begin = q_block*width
        place.q_end = min(L, (q_block + 1)*width)
    else:
        n_vectors = (L + VL - 1) // VL
        place.q_begin = n_vectors*q_block // n_blocks*VL
        place.q_end = min(L, n_vectors*(q_block + 1) // n_blocks*VL)


cdef void expect_task(Task* t, int64_t n_tasks, int64_t task) noexcept nogil:
    # What the next task reads and this one does not: its queries; the keys and values behind the window, or of another head.
    cdef const fastattn_problem* p = t.p
    cdef Ahead* later = &t.later
    cdef Place place
    cdef int64_t first = t.k_end if p.left < p.S or p.tiles.first != NULL else p.S
    cdef int64_t h_kv, n
    later.at = 0
    later.n_next = 0
    if p.out.col == 1:
        expect(&later.next[0], <const real*>p.out.data + offset(p, &p.out, t.b, t.h, p.cu_q) + t.q_begin*p.out.row,
               p.out.row*sizeof(real), t.n_queries, p.Dv*sizeof(real))
        later.n_next = 1
    if task >= n_tasks:
        return
    locate(p, n_tasks, task, &place)
    h_kv = place.h // (p.H // p.Hkv)
    if place.b != t.b or h_kv != t.h // (p.H // p.Hkv):
        first = 0
    n = max(<int64_t>0, min(rows_of_batch(p.cu_k, place.b, p.S) - first, <int64_t>LANES))
    if p.query.col == 1:
        expect(&later.next[later.n_next], <const real*>p.query.data + offset(p, &p.query, place.b, place.h, p.cu_q)
               + place.q_begin*p.query.row, p.query.row*sizeof(real), place.q_end - place.q_begin, p.D*sizeof(real))
        later.n_next += 1
    if p.key.col == 1 and n > 0:
        expect(&later.next[later.n_next], <const real*>p.key.data + offset(p, &p.key, place.b, h_kv, p.cu_k)
               + first*p.key.row, p.key.row*sizeof(real), n, p.D*sizeof(real))
        later.n_next += 1
    if p.value.col == 1 and n > 0 and not t.cold:
        expect(&later.next[later.n_next], <const real*>p.value.data + offset(p, &p.value, place.b, h_kv, p.cu_k)
               + first*p.value.row, p.value.row*sizeof(real), n, p.Dv*sizeof(real))
        later.n_next += 1


cdef bint prepare(Task* t, const fastattn_problem* p, const Place* place, void* memory) noexcept nogil:
    # Everything of a task before its first block of keys; False if it has no valid query.
    cdef int64_t n_keys, h_kv, at
    cdef double kappa
    cdef real sign = 1
    t.p = p
    t.b = place.b
    t.h = place.h
    t.q_begin = place.q_begin
    t.second = False
    t.n_queries = place.q_end - place.q_begin
    if p.query_lengths != NULL and p.rows == NULL:
        t.n_queries = max(<int64_t>0, min(t.n_queries, p.query_lengths[t.b] - t.q_begin))
    if t.n_queries <= 0:
        return False
    t.vectors = <int>((t.n_queries + VL - 1) // VL)
    t.lanes = ~<uint64_t>0 >> (64 - t.vectors*VL)
    n_keys = rows_of_batch(p.cu_k, t.b, p.S)
    if p.kv_lengths != NULL:
        n_keys = p.kv_lengths[t.b]
    intervals(t, n_keys)
    if p.tiles.first != NULL:
        # the group of 64 rows of this batch's and head's list
        at = t.h*p.tiles.head + lead_offset(p, p.tiles.lead, t.b)
        at = at*((p.L + FASTATTN_TILE_ROWS - 1) // FASTATTN_TILE_ROWS) + t.q_begin // FASTATTN_TILE_ROWS
        t.tile_begin = p.tiles.first[at]
        t.tile_end = p.tiles.first[at + 1]
        t.tile_shift = t.q_begin % FASTATTN_TILE_ROWS
        if t.tile_begin == t.tile_end:
            t.k_end = 0
        else:
            t.k_begin = max(t.k_begin, p.tiles.block[t.tile_begin]*<int64_t>BLOCK)
            t.k_end = min(t.k_end, (p.tiles.block[t.tile_end - 1] + 1)*<int64_t>BLOCK)

    # Where things are.
    h_kv = t.h // (p.H // p.Hkv)
    t.q = <const real*>p.query.data + offset(p, &p.query, t.b, t.h, p.cu_q)
    t.k = <const real*>p.key.data + offset(p, &p.key, t.b, h_kv, p.cu_k)
    t.v = <const real*>p.value.data + offset(p, &p.value, t.b, h_kv, p.cu_k)
    t.bias = NULL
    t.mask = NULL
    if p.bias.data != NULL:
        t.bias = <const real*>p.bias.data + offset(p, &p.bias, t.b, t.h, NULL)
    if p.mask.data != NULL:
        t.mask = <const uint8_t*>p.mask.data + offset(p, &p.mask, t.b, t.h, NULL)
    t.Qt = <real*>memory
    t.S = t.Qt + aligned(p.D*LANES)
    t.Ot = t.S + BLOCK*LANES
    t.m = t.Ot + aligned(p.Dv*LANES)
    t.l = t.m + LANES
    t.c = t.l + LANES
    t.before = t.c + LANES
    t.base = t.before + LANES
    t.total = t.base + LANES
    t.copied = t.total + CHAINS*LANES
    t.packed_k = t.copied + BLOCK*COPIED
    t.bias_tile = t.packed_k + aligned(BLOCK*p.D if p.key.col != 1 else 0)
    t.lines = t.bias_tile + BLOCK*LANES
    t.across = t.bias_tile + (BLOCK*(LANES + VL) if p.bias.data != NULL else 0)
    t.top_at = <int64_t*>(t.across + (BLOCK*VL if p.reduce != FASTATTN_OUTPUT else 0))
    t.top = <real*>(t.top_at + p.k*LANES)

    # The scale joins the exponent. Its sign goes into Q, exactly, so that the largest score has the largest exponent; where a
    # softcap or a bias makes logits of the scores, they apply it and the exponent keeps log2 e.
    kappa = 1.4426950408889634
    if p.softcap == 0 and t.bias == NULL:
        sign = -1 if p.scale < 0 else 1
        kappa *= 0.25*p.scale*sign
        if kappa > 0.25*REAL_MAX:           # past the largest number: a power of two goes into Q as well
            sign *= 4
        else:
            kappa *= 4
        if <real>kappa == 0:
            kappa = 1
            sign = 0
    t.kappa = <real>kappa
    pack_queries(t.q + t.q_begin*p.query.row, p.query.row, p.query.col, t.n_queries, t.vectors, p.D, sign, t.Qt)
    t.careful = False
    return True
