# Few rows: a block of keys by the loops of few_tiles.pxi, and what a task of few rows does before its first and behind its
# last block. All keys of a block, then all its values: two long runs through memory, which a processor foresees; finer turns
# cost a quarter of the bandwidth, except where FMAs are the limit: there the keys of a block take turns with the values of the
# one before (few_woven).
#
# Blocks that all rows see, without bias and softcap, stay as they are summed: P[keys][rows of the tile], no lane wasted.
# Others are spread over the lanes of S, keys by lanes of rows, so that everything between the products is that of the other
# path. Both are the same operations in the same order.
# A task takes SPLIT keys; what it leaves is merged in the order of the keys by the task of the group that ends last.

cdef void few_scores(Task* t, int first, int vectors, const Operands* of, Py_ssize_t begin, Py_ssize_t n) noexcept nogil:
    # S[begin + j] = Q · K[begin + j] for n keys of a block; lanes behind the last row get other sums
    cdef Py_ssize_t lane = first*VL
    cdef Py_ssize_t end = min(lane + <Py_ssize_t>vectors*VL, t.n_queries)
    cdef Py_ssize_t i, j
    cdef real top[SUMS]         # of no use here
    cdef int mr, ld
    memset(top, 0, sizeof(top))
    while lane < end:
        mr = rows_of_tile(end - lane)
        ld = ld_of(mr)
        tile_dots(mr, t, &of.keys, lane, begin, n, t.sums, top)
        v_store(t.sums + (n*ld + SUMS - 1)//SUMS*SUMS, v_zero())    # what the lanes behind the last sums get
        for j in range(n):
            i = 0
            while i < mr:
                v_store_part(t.S + (begin + j)*LANES + lane + i, v_load(t.sums + j*ld + i), LANES - lane - i)
                i += VL
        lane += mr


cdef void few_values(Task* t, int first, int vectors, const Operands* of, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    # Ob += Pt V over keys [begin, end) of a block, P in S
    cdef Py_ssize_t lane = first*VL
    cdef Py_ssize_t last = min(lane + <Py_ssize_t>vectors*VL, t.n_queries)
    cdef Py_ssize_t j
    cdef int g, mr
    cdef vf s
    if of.values.kind == FASTATTN_I8:
        for j in range(begin, end):
            s = v_set1(of.values.scale[j])
            for g in range(vectors):
                v_store(t.S + j*LANES + lane + g*VL, v_mul(v_load(t.S + j*LANES + lane + g*VL), s))
    while lane < last:
        mr = rows_of_tile(last - lane)
        tile_values(mr, t, &of.values, lane, t.S + begin*LANES + lane, LANES, begin, end)
        lane += mr


cdef void few_whole(Task* t, int first, int vectors, const Operands* of, Py_ssize_t n) noexcept nogil:
    # Ob += P V, the sums of weights and what becomes of the reference, for the n keys of a block, which all rows see. Several
    # tiles go through the block together, STEP keys at a time: these stay in the first-level cache. P lies where S would.
    cdef Py_ssize_t begin = first*VL
    cdef Py_ssize_t end = min(begin + <Py_ssize_t>vectors*VL, t.n_queries)
    cdef Py_ssize_t step = n if end - begin <= SUMS//2 else STEP
    cdef Py_ssize_t lane, i
    cdef Py_ssize_t j = 0
    cdef real top[2*LANES]                          # SUMS for each SUMS / 2 lanes
    cdef real* P = t.S
    cdef int mr
    for i in range(begin, begin + vectors*VL):      # also lanes without a row
        t.c[i] = 1
    for i in range(2*LANES):
        top[i] = -INFINITY
    while j < n:
        lane = begin
        while lane < end:
            mr = rows_of_tile(end - lane)
            tile_dots(mr, t, &of.keys, lane, j, min(step, n - j), P + lane*BLOCK + j*ld_of(mr), top + 2*lane)
            lane += mr
        j += step
    lane = begin
    while lane < end:
        mr = rows_of_tile(end - lane)
        tile_weights(mr, t, &of.values, lane, n, P + lane*BLOCK, top + 2*lane)
        lane += mr
    j = 0
    while j < n:
        lane = begin
        while lane < end:
            mr = rows_of_tile(end - lane)
            tile_values(mr, t, &of.values, lane, P + lane*BLOCK + j*ld_of(mr), ld_of(mr), j, min(n, j + step))
            lane += mr
        j += step
    add_sums(vectors, t.total + begin, t.c + begin, t.l + begin)


cdef void clear_block(Task* t, int first, int vectors) noexcept nogil:
    # as many rows as tiles may reach
    cdef Py_ssize_t ldo = whole(t.p.Dv)
    cdef Py_ssize_t rows = min(<Py_ssize_t>vectors*VL, (t.n_queries - first*VL + SUMS//2 - 1)//(SUMS//2)*(SUMS//2))
    memset(t.Ob + first*VL*ldo, 0, rows*ldo*sizeof(real))


cdef void add_block(Task* t, int first, int vectors) noexcept nogil:
    # O = O c + Ob: the sums of a block join at once, as in tile_t
    cdef Py_ssize_t ldo = whole(t.p.Dv)
    cdef Py_ssize_t i, d
    for i in range(first*VL, min((first + vectors)*VL, t.n_queries)):
        d = i*ldo
        while d < (i + 1)*ldo:
            v_store(t.Ot + d, v_fma(v_load(t.Ot + d), v_set1(t.c[i]), v_load(t.Ob + d)))
            d += VL


cdef inline void repeat_last(int64_t* at, Py_ssize_t n, Py_ssize_t end) noexcept nogil:
    # rows past the last one, which tiles may read
    cdef Py_ssize_t j
    for j in range(n, end):
        at[j] = at[n - 1]


cdef void find_source(Task* t, const fastattn_array* a, const char* data, Py_ssize_t D, int64_t block, Py_ssize_t n,
                      int64_t next_data, int64_t* at, Source* source) noexcept nogil:
    # Behind the rows of a block come those to ask for: of the next block, or, where tasks take blocks of pages in turn, of the
    # next task, whose data are next_data bytes further. Tables stay where the next block's would be the same: in an array but
    # for its last rows, in pages for tasks in turn. Behind a table stands whose it is.
    cdef Py_ssize_t size = v_size(a.kind)
    cdef Py_ssize_t left = min(t.end - block, <int64_t>ROOM)
    cdef bint whole_table = left >= ROOM - AHEAD
    cdef Py_ssize_t j, rows
    source.data = data
    source.kind = a.kind
    source.at = at
    source.ahead = max(<Py_ssize_t>4, min(<Py_ssize_t>AHEAD, AHEAD_BYTES//max(<Py_ssize_t>1, D*size)))
    if t.pages == NULL:
        source.data += block*a.row*size
        if at[ROOM] != a.row:
            for j in range(ROOM - AHEAD + source.ahead):
                at[j] = j*a.row*size
        if not whole_table:         # those asked for may be another head's
            repeat_last(at, left, min(left + 16, <Py_ssize_t>ROOM))
        at[ROOM] = a.row if whole_table else INT64_MAX
        return
    if at[ROOM] != ~block:
        find_rows(t, a, block, n, size, at)
        repeat_last(at, n, ROOM)
        at[ROOM] = ~block
    rows = min(left - n, source.ahead)
    if n % SUMS != 0 or (t.next == NULL and rows <= 0):     # a tile may read past the last row
        return
    if t.next > t:
        for j in range(source.ahead):
            at[n + j] = at[min(j, n - 1)] + next_data
        return
    if rows > 0:
        find_rows(t, a, block + n, rows, size, at + n)
    repeat_last(at, n + max(<Py_ssize_t>0, rows), n + source.ahead)
    for j in range(n, n + source.ahead):
        at[j] += next_data


cdef void source_scales(Task* t, const fastattn_array* a, const float* scales, int64_t block, Py_ssize_t n,
                        Source* source) noexcept nogil:
    # of the rows of a block, and of those past the last that tiles may read; those of the next block are asked for
    cdef Py_ssize_t j = 0
    cdef Py_ssize_t n_run
    cdef int64_t first
    cdef int64_t next = block + n
    cdef Py_ssize_t n_next = min(t.end - next, <int64_t>BLOCK)
    while a.row == 1 and j < n_next:
        n_run = even_rows(t, a, next + j, n_next - j, &first)
        v_fetch_soon(<const char*>(scales + first), n_run*sizeof(float) + 60)
        j += n_run
    find_scales(t, a, scales, block, n, source.scale)
    for j in range(n, n + 16):
        source.scale[j] = source.scale[n - 1]


cdef void packed_source(const real* data, Py_ssize_t row, Py_ssize_t n, int64_t* at, Source* source) noexcept nogil:
    # rows of reals one behind the other
    cdef Py_ssize_t j
    source.data = <const char*>data
    source.kind = FASTATTN_REAL
    source.at = at
    source.ahead = 0
    for j in range(n):
        at[j] = j*row*sizeof(real)
    repeat_last(at, n, ROOM)
    at[ROOM] = INT64_MAX


cdef void few_operands(Task* t, int64_t block, Py_ssize_t n, Operands* of) noexcept nogil:
    # Many rows widen each key and value once, a few as often as there are tiles of rows.
    cdef const fastattn_problem* p = t.p
    cdef bint once = t.n_queries > SUMS
    cdef int64_t* k_at = t.k_at + t.late.side*(ROOM + 1)
    cdef int64_t* v_at = t.v_at + t.late.side*(ROOM + 1)
    of.packs_k = p.key.col != 1 or (once and p.key.kind != FASTATTN_REAL)
    of.packs_v = p.value.col != 1 or of.clean or (once and p.value.kind != FASTATTN_REAL)
    if of.packs_k:
        packed_source(t.packed_k, p.D, n, k_at, &of.keys)
    else:
        find_source(t, &p.key, t.k, p.D, block, n, t.next.k - t.k if t.next != NULL else 0, k_at, &of.keys)
    if of.packs_v:
        packed_source(t.packed_v, p.Dv, n, v_at, &of.values)
    elif (t.pages != NULL and not of.packs_k and p.key.kind == p.value.kind and p.D == p.Dv and p.key.row == p.value.row
            and p.key.lead[0] == p.value.lead[0] and p.key.head == p.value.head):
        of.values.data = t.v
        of.values.kind = of.keys.kind
        of.values.at = of.keys.at
        of.values.ahead = of.keys.ahead
    else:
        find_source(t, &p.value, t.v, p.Dv, block, n, t.next.v - t.v if t.next != NULL else 0, v_at, &of.values)
    if of.keys.kind == FASTATTN_I8:
        source_scales(t, &p.key_scale, t.k_scale, block, n, &of.keys)
    if of.values.kind == FASTATTN_I8:
        source_scales(t, &p.value_scale, t.v_scale, block, n, &of.values)


cdef inline bint stays_packed(const Task* t, const Operands* of, bint masked) noexcept nogil:
    # Whether scores need no lanes of S: few_whole.
    return not masked and t.bias == NULL and t.p.softcap == 0 and not of.in_turn


cdef inline bint weaves(const Task* t, const Operands* of, bint masked) noexcept nogil:
    # Whether the values of a block wait until the keys of the next one are read: one large tile, and rows that are long in
    # bytes. Else the long runs through memory are worth more.
    return (stays_packed(t, of, masked) and ld_of(rows_of_tile(t.n_queries)) > 4 and t.n_queries <= SUMS//2
            and not of.packs_k and not of.packs_v and of.keys.kind == FASTATTN_REAL and of.values.kind == FASTATTN_REAL)


cdef void add_late(Task* t) noexcept nogil:
    # what is left of the block before
    cdef Late* late = t.late
    cdef int mr
    if late.task != NULL:
        mr = rows_of_tile(late.task.n_queries)
        tile_values(mr, late.task, late.values, 0, late.P, ld_of(mr), 0, late.n)
        add_block(late.task, 0, late.task.vectors)
        late.task = NULL


cdef void few_woven(Task* t, const Operands* of, Py_ssize_t n) noexcept nogil:
    # As few_whole and add_block, but the values are left for the next block, whose keys take turns with them: shuffles and FMAs
    # of the two products overlap, and lines are asked for evenly.
    cdef Late* late = t.late
    cdef const Task* before = late.task
    cdef real* P = t.S + late.side*SCORES
    cdef real top[SUMS]
    cdef int mr = rows_of_tile(t.n_queries)
    cdef int ld = ld_of(mr)
    cdef Py_ssize_t group = SUMS//ld                # keys that are summed together
    cdef Py_ssize_t turn = max(<Py_ssize_t>1, TURN_BYTES//(whole(t.p.D)*sizeof(real)*group))*group
    cdef Py_ssize_t i
    cdef Py_ssize_t j = 0
    for i in range(SUMS):
        top[i] = -INFINITY
    while before != NULL and j + turn <= n and j + turn <= late.n:
        tile_values(mr, before, late.values, 0, late.P + j*ld, ld, j, j + turn)
        tile_dots(mr, t, &of.keys, 0, j, turn, P + j*ld, top)
        j += turn
    if before != NULL:
        tile_values(mr, before, late.values, 0, late.P + j*ld, ld, j, late.n)
        add_block(late.task, 0, t.vectors)
    if j < n:
        tile_dots(mr, t, &of.keys, 0, j, n - j, P + j*ld, top)
    clear_block(t, 0, t.vectors)
    for i in range(t.vectors*VL):
        t.c[i] = 1
    tile_weights(mr, t, &of.values, 0, n, P, top)
    add_sums(t.vectors, t.total, t.c, t.l)
    late.task = t
    late.n = n
    late.P = P
    late.values = &of.values
    late.side ^= 1


cdef void few_queries(Task* t, const char* q, real sign) noexcept nogil:
    # Qt = sign · Q, rows of whole vectors; zeros behind them, for tiles of rows that are not full
    cdef const fastattn_array* a = &t.p.query
    cdef Py_ssize_t D = t.p.D
    cdef Py_ssize_t ldq = whole(D)
    cdef Py_ssize_t i, d
    for i in range(t.n_queries):
        d = 0
        while d < D:
            v_store(t.Qt + i*ldq + d, v_mul(v_set1(sign), load_row(q, lane_at(t, a, i) + d*a.col, a.col, D - d, a.kind)))
            d += VL
    i = min(<Py_ssize_t>LANES, (t.n_queries + SUMS//2 - 1)//(SUMS//2)*(SUMS//2))
    memset(t.Qt + t.n_queries*ldq, 0, (i - t.n_queries)*ldq*sizeof(real))


cdef void few_out(const Task* t, char* out) noexcept nogil:
    # out = O c
    cdef const fastattn_array* a = &t.p.out
    cdef Py_ssize_t Dv = t.p.Dv
    cdef Py_ssize_t ldo = whole(Dv)
    cdef Py_ssize_t i, d
    for i in range(t.n_queries):
        d = 0
        while d < Dv:
            v_store_as(out, lane_at(t, a, i) + d*a.col, a.col, v_mul(v_load(t.Ot + i*ldo + d), v_set1(t.c[i])), Dv - d, a.kind)
            d += VL


# --- splits: a record of m [LANES], l [LANES], the lanes that saw something, and O [rows][Dv'] ------------------------

cdef inline real* record_of(const fastattn_problem* p, int64_t group, int64_t split) noexcept nogil:
    return <real*>(<char*>p.state + (p.groups*8 + 63)//64*64 + (group*p.splits + split)*p.record)


cdef void keep_state(const Task* t, int64_t group, int64_t split) noexcept nogil:
    cdef real* record = record_of(t.p, group, split)
    memcpy(record, t.m, LANES*sizeof(real))
    memcpy(record + LANES, t.l, LANES*sizeof(real))
    memcpy(record + 2*LANES, &t.some, sizeof(uint64_t))
    memcpy(record + 2*LANES + 16, t.Ot, t.n_queries*whole(t.p.Dv)*sizeof(real))


cdef void merge_states(Task* t, int64_t group, int64_t splits) noexcept nogil:
    # m, l and O of all keys: with M the largest m, the sum of l 2^((m - M) κ), and so O
    cdef Py_ssize_t ldo = whole(t.p.Dv)
    cdef const real* record
    cdef uint64_t some
    cdef vf f
    cdef Py_ssize_t i, d
    cdef int64_t s
    cdef int g
    for i in range(LANES):
        t.m[i] = -INFINITY
        t.l[i] = 0
    memset(t.Ot, 0, t.n_queries*ldo*sizeof(real))
    t.some = 0
    for s in range(splits):
        record = record_of(t.p, group, s)
        memcpy(&some, record + 2*LANES, sizeof(uint64_t))
        t.some |= some
        for g in range(t.vectors):
            v_store(t.m + g*VL, v_max(v_load(t.m + g*VL), v_load(record + g*VL)))
    for g in range(t.vectors):          # 0 where nothing was seen: -inf - (-inf) would be NaN
        f = v_load(t.m + g*VL)
        v_store(t.base + g*VL, v_where_lt(f, v_set1(-REAL_MAX), v_zero(), f))
    for s in range(splits):
        record = record_of(t.p, group, s)
        for g in range(t.vectors):
            f = v_exp2(v_mul(v_sub(v_load(record + g*VL), v_load(t.base + g*VL)), v_set1(t.kappa)))
            v_store(t.c + g*VL, f)
            v_store(t.l + g*VL, v_fma(v_load(record + LANES + g*VL), f, v_load(t.l + g*VL)))
        record += 2*LANES + 16
        for i in range(t.n_queries):
            f = v_set1(t.c[i])
            d = 0
            while d < ldo:
                v_store(t.Ot + i*ldo + d, v_fma(v_load(record + i*ldo + d), f, v_load(t.Ot + i*ldo + d)))
                d += VL
