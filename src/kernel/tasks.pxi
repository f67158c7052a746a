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


cdef inline int64_t rows_of_batch(const int64_t* cu, int64_t b, int64_t most) noexcept nogil:
    return cu[b + 1] - cu[b] if cu != NULL else most


cdef inline int64_t queries_of(const fastattn_problem* p, int64_t b) noexcept nogil:
    # valid ones
    cdef int64_t n = rows_of_batch(p.cu_q, b, p.L)
    return min(n, p.query_lengths[b]) if p.query_lengths != NULL and p.rows == NULL else n


cdef inline int64_t keys_of(const fastattn_problem* p, int64_t b) noexcept nogil:
    return p.kv_lengths[b] if p.kv_lengths != NULL else rows_of_batch(p.cu_k, b, p.S)


cdef inline int64_t bytes_of_keys(const fastattn_problem* p) noexcept nogil:
    # and values, of all batches
    cdef int64_t rows = p.cu_k[p.B] if p.cu_k != NULL else p.B*p.S
    return rows*p.Hkv*(p.D*v_size(p.key.kind) + p.Dv*v_size(p.value.kind))


cdef inline bint are_few(const fastattn_problem* p, int64_t rows) noexcept nogil:
    # By the rows of the sequence alone: what else is in the call must not change its bits.
    return 0 < rows <= few_rows(p) and not p.one_path and p.reduce == FASTATTN_OUTPUT and p.dropout == 0


cdef inline bint attends(const fastattn_problem* p) noexcept nogil:
    # whether the result is out
    return p.reduce == FASTATTN_OUTPUT or p.reduce == FASTATTN_MEAN


cdef inline int64_t heads_together(const fastattn_problem* p, int64_t rows) noexcept nogil:
    # Query heads of one key head in a task of few rows: a divisor of their number that the lanes can hold.
    cdef int64_t group = p.H // p.Hkv
    cdef int64_t n = min(group, LANES // rows)
    if p.bias_rows != NULL or (p.tiles.first != NULL and p.tiles.head != 0):
        return 1
    while group % n:
        n -= 1
    return n


cdef inline int64_t splits_of(int64_t keys) noexcept nogil:
    return max(<int64_t>1, (keys + SPLIT - 1) // SPLIT)


cdef int64_t tasks(fastattn_problem* p, int64_t threads) noexcept nogil:
    # Batch b has tasks b * batch_tasks on: with many rows `blocks` for each head; with few, for each key head, `splits` of
    # the keys for each of the groups of heads that share them. Those that a batch does not need do nothing. Where the rows of
    # other key heads lie between those of one, as in pages, a task takes several groups, so that memory is read in long runs.
    cdef int64_t most_groups = 0        # of a batch with few rows
    cdef int64_t most_keys = 0
    cdef int64_t most_lanes = 0
    cdef bint many = False
    cdef int64_t b, rows, heads
    cdef int64_t last = p.B if p.cu_q != NULL or p.query_lengths != NULL or p.kv_lengths != NULL else min(p.B, <int64_t>1)
    p.blocks = p.splits = p.groups = p.record = 0
    p.together = 1
    if p.reduce == FASTATTN_GRADIENT:
        return gradient_tasks(p, threads)
    if not attends(p):
        p.batch_tasks = p.H*p.chunks
        return p.B*p.batch_tasks
    for b in range(last):
        rows = queries_of(p, b)
        if are_few(p, rows):
            heads = heads_together(p, rows)
            most_groups = max(most_groups, p.H // heads)
            most_keys = max(most_keys, keys_of(p, b))
            most_lanes = max(most_lanes, heads*rows)
        else:
            many = True
    if many:
        p.blocks = blocks(p.L, p.B*p.H, threads, p.tiles.first != NULL or p.cu_q != NULL)
    if most_groups > 0:
        p.splits = splits_of(most_keys)
        if p.splits > 1:
            p.groups = p.B*most_groups
            p.record = aligned(2*LANES + 16 + most_lanes*whole(p.Dv))*sizeof(real)
        if p.pages != NULL or p.key.head < p.S*p.key.row:
            p.together = min(most_groups, <int64_t>TOGETHER)
            while p.together > 1 and p.B*((most_groups + p.together - 1)//p.together)*p.splits < 4*threads:
                p.together = (p.together + 1)//2
    p.batch_tasks = max(p.H*p.blocks, (most_groups + p.together - 1)//p.together*p.splits)
    return p.B*p.batch_tasks


cdef size_t state(const fastattn_problem* p) noexcept nogil:
    return 0 if p.groups == 0 else <size_t>((p.groups*8 + 63)//64*64 + p.groups*p.splits*p.record)


cdef bint locate(const fastattn_problem* p, int64_t task, int64_t one, Place* place) noexcept nogil:
    # The place of one of the groups that a task takes; False if there is nothing to do.
    cdef int64_t at = task % p.batch_tasks
    cdef int64_t n_blocks = p.blocks
    cdef int64_t L, n_vectors, width, q_block, parts
    place.b = task // p.batch_tasks
    L = queries_of(p, place.b)
    place.few = are_few(p, L)
    place.heads = 1
    place.q_begin = 0
    if place.few:
        # Heads that read the same keys follow each other: the keys are in the cache then.
        place.heads = heads_together(p, L)
        parts = p.H // p.Hkv // place.heads if p.together == 1 else 1
        place.splits = splits_of(keys_of(p, place.b))
        place.split = at // parts % p.splits
        place.h = ((at // parts // p.splits*parts + at % parts)*p.together + one)*place.heads
        place.group = place.b*(p.groups // p.B) + place.h // place.heads
        place.q_end = rows_of_batch(p.cu_q, place.b, p.L)
        return place.h < p.H and place.split < place.splits
    if one > 0:
        return False
    # Many: vectors [n q / N, n (q + 1) / N) of the n vectors of a head. The last rows see most when causal: longest first.
    # Else in the order of memory: a window moves on over keys that are still in the cache.
    L = rows_of_batch(p.cu_q, place.b, p.L)
    place.h = at // n_blocks
    q_block = at % n_blocks
    if p.cu_q != NULL or p.tiles.first != NULL:
        # Shorter sequences have fewer blocks, and tiles want whole groups of rows: equal blocks of the longest one's width.
        width = LANES // (n_blocks // ((p.L + LANES - 1) // LANES))
        n_blocks = (L + width - 1) // width
    if p.left >= p.S and p.right < p.S:
        q_block = n_blocks - 1 - q_block
    if q_block < 0 or q_block >= n_blocks or place.h >= p.H:
        return False
    if p.tiles.first != NULL:
        place.q_begin = q_block*width
        place.q_end = min(L, (q_block + 1)*width)
    else:
        n_vectors = (L + VL - 1) // VL
        place.q_begin = n_vectors*q_block // n_blocks*VL
        place.q_end = min(L, n_vectors*(q_block + 1) // n_blocks*VL)
    return place.q_begin < place.q_end


cdef inline char* base_of(const fastattn_problem* p, const fastattn_array* a, int64_t b, int64_t h, const int64_t* cu,
                          bint paged) noexcept nogil:
    # the first row of a batch and head; of the first page, where keys are paged
    return <char*>a.data + (h*a.head if paged else offset(p, a, b, h, cu))*v_size(a.kind)


cdef void expect_array(Ahead* later, const fastattn_problem* p, const fastattn_array* a, int64_t b, int64_t h,
                       const int64_t* cu, int64_t first, int64_t n, Py_ssize_t columns) noexcept nogil:
    cdef Py_ssize_t size = v_size(a.kind)
    if a.col == 1 and n > 0:
        expect(&later.next[later.n_next], base_of(p, a, b, h, cu, False) + first*a.row*size, a.row*size, n, columns*size)
        later.n_next += 1


cdef void expect_task(Task* t, int64_t n_tasks, int64_t task) noexcept nogil:
    # What the next task reads and this one does not: its queries; the keys and values behind the window, or of another head.
    cdef const fastattn_problem* p = t.p
    cdef Ahead* later = &t.later
    cdef Place place
    cdef int64_t first = t.k_end if p.left < p.S or p.tiles.first != NULL else p.S
    cdef int64_t h_kv, n
    later.at = 0
    later.n_next = 0
    later.pace = 1
    if t.few:
        return
    expect_array(later, p, &p.out, t.b, t.h, p.cu_q, t.q_begin, t.n_queries, p.Dv)
    if task >= n_tasks or p.pages != NULL or not locate(p, task, 0, &place) or place.few:
        return
    h_kv = place.h // (p.H // p.Hkv)
    if place.b != t.b or h_kv != t.h // (p.H // p.Hkv):
        first = 0
    n = max(<int64_t>0, min(rows_of_batch(p.cu_k, place.b, p.S) - first, <int64_t>LANES))
    expect_array(later, p, &p.query, place.b, place.h, p.cu_q, place.q_begin, place.q_end - place.q_begin, p.D)
    expect_array(later, p, &p.key, place.b, h_kv, p.cu_k, first, n, p.D)
    if not t.cold:
        expect_array(later, p, &p.value, place.b, h_kv, p.cu_k, first, n, p.Dv)


cdef size_t lay_out(Task* t, const fastattn_problem* p, int64_t one, char* memory) noexcept nogil:
    # The parts of a thread's scratch, from `memory` on; the bytes they take. First the tasks that go together, then what each
    # of them keeps from block to block, then what they have in common.
    cdef real* at = <real*>(memory + (p.together*sizeof(Task) + 63)//64*64)
    cdef Py_ssize_t own = aligned(whole(p.D)*LANES) + aligned(whole(p.Dv)*LANES) + 2*LANES
    t.Qt = at + one*own
    t.Ot = t.Qt + aligned(whole(p.D)*LANES)
    t.m = t.Ot + aligned(whole(p.Dv)*LANES)
    t.l = t.m + LANES
    at += p.together*own
    t.S = at
    at += BLOCK*LANES
    t.c = at
    t.before = t.c + LANES
    t.base = t.before + LANES
    t.level = t.base + LANES
    t.total = t.level + LANES
    at = t.total + CHAINS*LANES
    t.packed_v = at
    t.packed_k = at
    if not (p.key.col != 1 or p.key.kind != FASTATTN_REAL or p.pages != NULL or (WORD == 2 and p.key.row % 2 != 0)):
        at += aligned(BLOCK*p.Dv)
    elif BLOCK*(p.D + p.Dv)*<Py_ssize_t>sizeof(real) > PACKED_BYTES and p.reduce != FASTATTN_GRADIENT:
        at += aligned(BLOCK*max(p.D, p.Dv))     # in turn, see Operands
    else:
        t.packed_k += aligned(BLOCK*p.Dv)
        at = t.packed_k + aligned(BLOCK*p.D)
    t.bias_tile = at
    t.lines = t.bias_tile + BLOCK*LANES
    if p.bias.data != NULL:
        at += BLOCK*(LANES + VL)
    t.across = at
    if not attends(p):
        at += BLOCK*VL
    t.listed = at
    t.listed_at = <int64_t*>(at + LANES*LISTED)
    t.n_listed = t.listed_at + LANES*LISTED
    if finds_threshold(p):
        at = <real*>(t.n_listed + LANES)
    t.Ob = at
    at += aligned(whole(p.Dv)*LANES)
    t.sums = at
    at += SCORES
    t.k_at = <int64_t*>at
    t.v_at = t.k_at + 2*(ROOM + 1)
    t.late = <Late*>(t.v_at + 2*(ROOM + 1))
    t.top_at = <int64_t*>(t.late + 1)
    t.top = <real*>(t.top_at + p.k*LANES)
    return <char*>(t.top + p.k*LANES) - memory


cdef size_t scratch(const fastattn_problem* p) noexcept nogil:
    cdef Task t
    cdef Back back
    cdef size_t size = lay_out(&t, p, 0, NULL)
    if p.reduce == FASTATTN_GRADIENT:
        size = (size + 63)//64*64 + lay_out_back(&back, p, NULL)
    return size


cdef bint prepare(Task* t, const fastattn_problem* p, const Place* place, int64_t one, void* memory) noexcept nogil:
    # Everything of a task, one of those that go together, before its first block of keys; False if it has no valid query.
    cdef int64_t n_keys, h_kv, at
    cdef const char* q
    cdef double kappa
    cdef double unit = 1
    cdef real sign = 1
    t.p = p
    t.place = place[0]
    t.next = NULL
    t.b = place.b
    t.h = place.h
    t.few = place.few
    t.heads = place.heads
    t.q_begin = place.q_begin
    t.stage = ATTEND
    t.each = place.q_end - place.q_begin
    if p.query_lengths != NULL and p.rows == NULL:
        t.each = max(<int64_t>0, min(t.each, p.query_lengths[t.b] - t.q_begin))
    t.n_queries = t.heads*t.each
    if t.n_queries <= 0:
        return False
    t.vectors = <int>((t.n_queries + VL - 1) // VL)
    t.lanes = ~<uint64_t>0 >> (64 - t.vectors*VL)
    n_keys = keys_of(p, t.b)
    intervals(t, n_keys)
    t.hole_begin = t.hole_end = 0
    if p.hole_begin != NULL:
        t.hole_begin = p.hole_begin[t.b]
        t.hole_end = p.hole_end[t.b]
    if p.tiles.first != NULL:
        # the group of 64 rows of this batch's and head's list
        at = t.h*p.tiles.head + lead_offset(p, p.tiles.lead, t.b)
        at = at*((p.L + FASTATTN_TILE_ROWS - 1) // FASTATTN_TILE_ROWS) + t.q_begin // FASTATTN_TILE_ROWS
        t.tile_begin = p.tiles.first[at]
        t.tile_end = p.tiles.first[at + 1]
        t.tile_shift = t.q_begin % FASTATTN_TILE_ROWS
        t.tile_rows = ~<uint64_t>0
        t.repeat = 1
        if t.heads > 1:
            t.tile_rows = ~<uint64_t>0 >> (64 - t.each)
            for at in range(1, t.heads):
                t.repeat |= <uint64_t>1 << at*t.each
        if t.tile_begin == t.tile_end:
            t.k_end = 0
        else:
            t.k_begin = max(t.k_begin, p.tiles.block[t.tile_begin]*<int64_t>BLOCK)
            t.k_end = min(t.k_end, (p.tiles.block[t.tile_end - 1] + 1)*<int64_t>BLOCK)
    t.begin = t.k_begin
    t.end = t.k_end
    if t.few:
        t.begin = max(t.begin, place.split*SPLIT)
        t.end = min(t.end, (place.split + 1)*SPLIT)

    # Where things are.
    h_kv = t.h // (p.H // p.Hkv)
    q = base_of(p, &p.query, t.b, t.h, p.cu_q, False)
    t.pages = NULL
    if p.pages != NULL:
        t.pages = p.pages + p.page_rows[t.b]*p.page_stride
    t.k = base_of(p, &p.key, t.b, h_kv, p.cu_k, p.pages != NULL)
    t.v = base_of(p, &p.value, t.b, h_kv, p.cu_k, p.pages != NULL)
    t.k_scale = NULL
    t.v_scale = NULL
    if p.key.kind == FASTATTN_I8:
        t.k_scale = <const float*>base_of(p, &p.key_scale, t.b, h_kv, p.cu_k, p.pages != NULL)
    if p.value.kind == FASTATTN_I8:
        t.v_scale = <const float*>base_of(p, &p.value_scale, t.b, h_kv, p.cu_k, p.pages != NULL)
    t.bias = NULL
    t.mask = NULL
    if p.bias.data != NULL:
        t.bias = base_of(p, &p.bias, t.b, t.h, NULL, False)
    if p.mask.data != NULL:
        t.mask = <const uint8_t*>p.mask.data + offset(p, &p.mask, t.b, t.h, NULL)
    lay_out(t, p, one, <char*>memory)

    # The scale joins the exponent. Its sign goes into Q, exactly, so that the largest score has the largest exponent; where a
    # softcap, a bias or the caller makes logits of the scores, they apply it and the exponent keeps log2 e.
    kappa = 1.4426950408889634
    t.separate = p.softcap > 0 or p.score_mod != NULL or p.score != FASTATTN_DOT
    if p.normalizer != FASTATTN_SOFTMAX:
        unit = unit_of(p, t.separate or t.bias != NULL, &sign)
        kappa = kappa_of(p, unit, n_keys)
    elif not t.separate and t.bias == NULL:
        sign = -1 if p.scale < 0 else 1
        kappa *= 0.25*p.scale*sign
        if kappa > 0.25*REAL_MAX:           # past the largest number: a power of two goes into Q as well
            sign *= 4
        else:
            kappa *= 4
        if p.reduce == FASTATTN_GRADIENT and kappa*REAL_HALF < 1:       # lse in units of S must not overflow
            kappa *= REAL_HALF
            sign /= REAL_HALF
        if <real>kappa == 0:
            kappa = 1
            sign = 0
    t.kappa = <real>kappa
    t.exact_kappa = kappa
    if p.normalizer != FASTATTN_SOFTMAX:
        set_references(t, unit, n_keys)
    if t.few:
        few_queries(t, q, sign)
        for at in range(2):
            t.k_at[at*(ROOM + 1) + ROOM] = INT64_MAX
            t.v_at[at*(ROOM + 1) + ROOM] = INT64_MAX
    else:
        pack_queries(q + t.q_begin*p.query.row*v_size(p.query.kind), p.query.row, p.query.col, p.query.kind, t.n_queries,
                     t.vectors, p.D//WORD, sign, t.Qt)
        if p.score == FASTATTN_ADDITIVE and p.w_bias != NULL:
            add_to_queries(t)
    t.careful = False
    t.gathers = False
    t.cut = False
    return True
