# Few rows: decoding, a handful of speculative tokens, short chunks. Each key and value is then used a few times only, so the
# limit is the memory they come from. Lanes of the two products run over D and Dv instead of queries, vectors of keys and
# values are loaded (and widened) where they lie, once for all rows and for all heads that share them:
#
#     Q [rows][D']   S[j, i] = sum over lanes of  sum_d Q[i, d..] K[j, d..]        SUMS such vectors are summed together
#     O [rows][Dv']  O[i, d..] = O[i, d..] c[i] + sum_j P[j, i] V[j, d..]          the same chain over j as in product_t
#
# Rows go in tiles of SUMS / 2, the last of them in one of 4, 2 or 1 where that holds them: one pass over the keys for each.
#
# S keeps its layout, keys by lanes of rows, so that everything between the products is that of the other path.
# A task takes SPLIT keys; what it leaves is merged in the order of the keys by the task of the group that ends last.

cdef enum:
    FEW = 40                # rows of a head up to which they go this way; 32 where LANES are no more
    SPLIT = 22*96           # keys of a task: fixed, so that no bit depends on the number of threads
    STEP = 16               # keys that go through all stages before the next ones: in memory's view one even stream
    ROOM = 96 + 16          # rows of a block and as many as a tile may read past them
    SCORES = 96*8 + 32      # of a block and SUMS / 2 rows, a tile and a vector past them


cdef struct Source:         # rows of a block: keys or values
    const char* data
    const int64_t* at       # bytes from data to each of them
    int kind
    float scale[ROOM]       # of FASTATTN_I8
    const char* next_data   # and the same of the next block, which is fetched meanwhile
    const int64_t* next
    Py_ssize_t n_next


cdef struct Operands:       # of the products of a block
    const real* k           # many rows: the first row of each, and the distance of rows
    const real* v
    Py_ssize_t k_row, v_row
    bint packs_k, packs_v   # they can't be read in place
    bint in_turn            # both go through the same memory: packed anew where a segment needs them
    bint clean, poisoned    # values that are not finite become 0; there are some
    Source keys, values     # few rows


cdef inline Py_ssize_t vectors_of_line(const int kind) noexcept nogil:
    # vectors of elements in a line of 64 bytes; at most 4, which are taken in one step
    return 4 if v_size(kind)*VL*4 <= 64 else 64//(v_size(kind)*VL)


cdef inline void group_dots(const int mr, const int nk, const int kind, const real* Q, Py_ssize_t ldq, const Source* keys,
                            Py_ssize_t first, Py_ssize_t D, bint ahead, vf* acc) noexcept nogil:
    # The lanes of Q[i] · K[first + j], of which the sum is left to do. The same rows of the next block are asked for now: the
    # memory must never wait, nor be asked for much at once.
    cdef vf part[16]
    cdef vf x
    cdef const char* row[4]
    cdef const char* next
    cdef Py_ssize_t d = 0
    cdef int i, j, u
    for j in range(nk):
        row[j] = keys.data + keys.at[first + j]
        for i in range(mr):
            part[j*mr + i] = v_zero()
    if ahead:
        for j in range(nk):
            next = keys.next_data + keys.next[first + j]
            d = 0
            while d + 256 <= D*v_size(kind):
                for u in range(4):
                    v_fetch_line(next + d + 64*u)
                d += 256
            while d < D*v_size(kind):
                v_fetch_line(next + d)
                d += 64
    d = 0
    while d + vectors_of_line(kind)*VL <= D:
        for u in range(vectors_of_line(kind)):
            for j in range(nk):
                x = v_load_as(row[j], d + u*VL, kind)
                for i in range(mr):
                    part[j*mr + i] = v_fma(v_load(Q + i*ldq + d + u*VL), x, part[j*mr + i])
        d += vectors_of_line(kind)*VL
    while d < D:
        for j in range(nk):
            x = v_load_part_as(row[j], d, D - d, kind)
            for i in range(mr):
                part[j*mr + i] = v_fma(v_load(Q + i*ldq + d), x, part[j*mr + i])
        d += VL
    for i in range(mr*nk):
        acc[i] = part[i]


cdef inline void step_dots(const int mr, const int kind, Task* t, const Source* keys, Py_ssize_t lane, Py_ssize_t first,
                           Py_ssize_t done, Py_ssize_t n, bint ahead, vf* acc, real* P) noexcept nogil:
    # P[j, i] = Q[lane + i] · K[first + j] for keys [done, done + n) of a step; SUMS accumulators go on from call to call
    cdef Py_ssize_t ldq = whole(t.p.D)
    cdef Py_ssize_t j = done
    cdef int i
    while j < done + n:
        group_dots(mr, min(4, SUMS//mr), kind, t.Qt + lane*ldq, ldq, keys, first + j, t.p.D, ahead, acc + j*mr % SUMS)
        j += min(4, SUMS//mr)
        if j*mr % SUMS == 0:
            for i in range(SUMS//VL):
                v_store(P + j*mr - SUMS + i*VL, v_sums(acc + i*VL))


cdef inline void rows_dots(const int mr, const int kind, Task* t, const Source* keys, Py_ssize_t lane,
                           Py_ssize_t begin, Py_ssize_t n, bint ahead) noexcept nogil:
    # S[begin + j, lane + i] = Q[lane + i] · K[begin + j] for mr rows and n keys; lanes behind them get other sums
    cdef Py_ssize_t whole_n = (n + SUMS//mr - 1)//(SUMS//mr)*(SUMS//mr)
    cdef Py_ssize_t j
    cdef int i
    cdef vf acc[16]
    cdef vf x
    step_dots(mr, kind, t, keys, lane, begin, 0, whole_n, ahead, acc, t.sums)
    v_store(t.sums + whole_n*mr, v_zero())  # what the lanes behind the last sums get
    for j in range(n):
        i = 0
        while i < mr:
            x = v_load(t.sums + j*mr + i)
            if kind == FASTATTN_I8:
                x = v_mul(x, v_set1(keys.scale[begin + j]))
            v_store_part(t.S + (begin + j)*LANES + lane + i, x, LANES - lane - i)
            i += VL


cdef inline void kind_dots(const int kind, Task* t, const Operands* of, Py_ssize_t lane, Py_ssize_t rows, Py_ssize_t begin,
                           Py_ssize_t n) noexcept nogil:
    cdef bint ahead = lane == 0 and of.keys.n_next > 0
    while rows > SUMS//4:
        rows_dots(SUMS//2, kind, t, &of.keys, lane, begin, n, ahead)
        lane += SUMS//2
        rows -= SUMS//2
        ahead = False
    if SUMS == 16 and rows > 2:
        rows_dots(4, kind, t, &of.keys, lane, begin, n, ahead)
        lane += 4
        rows -= 4
        ahead = False
    if rows >= 2:
        rows_dots(2, kind, t, &of.keys, lane, begin, n, ahead)
        lane += 2
        rows -= 2
        ahead = False
    if rows >= 1:
        rows_dots(1, kind, t, &of.keys, lane, begin, n, ahead)


cdef void few_scores(Task* t, int first, int vectors, const Operands* of, Py_ssize_t begin, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t lane = first*VL
    cdef Py_ssize_t rows = min(<Py_ssize_t>vectors*VL, t.n_queries - lane)
    # doubles are stored as such: the build for them has no other loops
    if sizeof(real) == 8 or of.keys.kind == FASTATTN_REAL:
        kind_dots(FASTATTN_REAL, t, of, lane, rows, begin, n)
    elif of.keys.kind == FASTATTN_F16:
        kind_dots(FASTATTN_F16, t, of, lane, rows, begin, n)
    elif of.keys.kind == FASTATTN_BF16:
        kind_dots(FASTATTN_BF16, t, of, lane, rows, begin, n)
    else:
        kind_dots(FASTATTN_I8, t, of, lane, rows, begin, n)


cdef inline void tile_rows(const int mr, const int nv, const int kind, const real* P, const Source* values, Py_ssize_t d,
                           Py_ssize_t n, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t ldp, real* O, Py_ssize_t ldo,
                           bint ahead) noexcept nogil:
    # O[i, d..] += sum_j P[j - begin, i] V[j, d..] over keys [begin, end), for mr rows and nv vectors, or n < VL columns of one
    cdef vf acc[16]
    cdef vf x[16]
    cdef vf a
    cdef const char* data = values.data + d*v_size(kind)
    cdef const int64_t* at = values.at
    cdef const char* next_data = values.next_data + d*v_size(kind) if ahead else data
    cdef const int64_t* next_at = values.next if ahead else at
    cdef const char* row
    cdef const char* next
    cdef Py_ssize_t j
    cdef int i, g
    O += d
    for i in range(mr):
        for g in range(nv):
            acc[i*nv + g] = v_load(O + i*ldo + g*VL)
    for j in range(begin, end):
        row = data + at[j]
        next = next_data + next_at[j]
        for g in range((nv + vectors_of_line(kind) - 1)//vectors_of_line(kind)):
            v_fetch_line(next + g*vectors_of_line(kind)*VL*v_size(kind))
        for g in range(nv):
            x[g] = v_load_part_as(row, 0, n, kind) if nv == 1 else v_load_as(row, g*VL, kind)
        for i in range(mr):
            a = v_set1(P[(j - begin)*ldp + i])
            for g in range(nv):
                acc[i*nv + g] = v_fma(a, x[g], acc[i*nv + g])
    for i in range(mr):
        for g in range(nv):
            v_store(O + i*ldo + g*VL, acc[i*nv + g])


cdef inline void rows_values(const int mr, const int kind, Task* t, const Source* values, Py_ssize_t lane, const real* P,
                             Py_ssize_t ldp, Py_ssize_t begin, Py_ssize_t end, bint ahead) noexcept nogil:
    cdef Py_ssize_t Dv = t.p.Dv
    cdef Py_ssize_t ldo = whole(Dv)
    cdef real* O = t.Ob + lane*ldo
    cdef Py_ssize_t d = 0
    if mr*8 <= SUMS:
        while Dv - d >= 8*VL:
            tile_rows(mr, 8, kind, P, values, d, VL, begin, end, ldp, O, ldo, ahead)
            d += 8*VL
    if mr*4 <= SUMS:
        while Dv - d >= 4*VL:
            tile_rows(mr, 4, kind, P, values, d, VL, begin, end, ldp, O, ldo, ahead)
            d += 4*VL
    while Dv - d >= 2*VL:
        tile_rows(mr, 2, kind, P, values, d, VL, begin, end, ldp, O, ldo, ahead)
        d += 2*VL
    while d < Dv:
        tile_rows(mr, 1, kind, P, values, d, Dv - d, begin, end, ldp, O, ldo, ahead)
        d += VL


cdef inline void kind_values(const int kind, Task* t, const Source* values, Py_ssize_t lane, Py_ssize_t rows,
                             Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    cdef bint ahead = lane == 0 and values.n_next > 0
    while rows > SUMS//4:
        rows_values(SUMS//2, kind, t, values, lane, t.S + begin*LANES + lane, LANES, begin, end, ahead)
        lane += SUMS//2
        rows -= SUMS//2
        ahead = False
    if SUMS == 16 and rows > 2:
        rows_values(4, kind, t, values, lane, t.S + begin*LANES + lane, LANES, begin, end, ahead)
        lane += 4
        rows -= 4
        ahead = False
    if rows >= 2:
        rows_values(2, kind, t, values, lane, t.S + begin*LANES + lane, LANES, begin, end, ahead)
        lane += 2
        rows -= 2
        ahead = False
    if rows >= 1:
        rows_values(1, kind, t, values, lane, t.S + begin*LANES + lane, LANES, begin, end, ahead)


cdef void few_values(Task* t, int first, int vectors, const Source* values, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    # Ob += Pt V over keys [begin, end) of the block
    cdef Py_ssize_t lane = first*VL
    cdef Py_ssize_t rows = min(<Py_ssize_t>vectors*VL, t.n_queries - lane)
    cdef Py_ssize_t j
    cdef int g
    cdef vf s
    if sizeof(real) == 8 or values.kind == FASTATTN_REAL:
        kind_values(FASTATTN_REAL, t, values, lane, rows, begin, end)
    elif values.kind == FASTATTN_F16:
        kind_values(FASTATTN_F16, t, values, lane, rows, begin, end)
    elif values.kind == FASTATTN_BF16:
        kind_values(FASTATTN_BF16, t, values, lane, rows, begin, end)
    else:
        for j in range(begin, end):
            s = v_set1(values.scale[j])
            for g in range(vectors):
                v_store(t.S + j*LANES + lane + g*VL, v_mul(v_load(t.S + j*LANES + lane + g*VL), s))
        kind_values(FASTATTN_I8, t, values, lane, rows, begin, end)


cdef inline void plain_rows(const int mr, const int kind, Task* t, const Operands* of, Py_ssize_t lane, Py_ssize_t n_keys,
                            bint ahead) noexcept nogil:
    # All stages for mr rows and n_keys keys of a block, which all rows see, without bias and softcap: scores stay as they are
    # summed, P[keys][mr], and no lane is wasted. The same operations in the same order, so the same bits, as by way of S.
    # The dots of a step go between the values of the one before: keys and values then come from memory in turn.
    cdef real* P = t.sums
    cdef real* next_P = t.sums + SCORES
    cdef real* scaled = t.sums + 2*SCORES
    cdef real* chain
    cdef real repeated[16]          # base of the rows, as lanes have them
    cdef vf acc[16]
    cdef bint narrow = 8*mr <= VL   # some vectors hold the weights of a step
    cdef vf sums[16]                # and these the sums of its eight pairs of keys
    cdef Py_ssize_t begin = 0
    cdef Py_ssize_t chunk = (4 if kind == FASTATTN_REAL else 8) if mr <= 2 else 8 if mr == 4 and SUMS == 16 else STEP
    cdef Py_ssize_t j, n, n_next
    cdef int i
    cdef vf k = v_set1(t.kappa)
    cdef vf x
    for i in range(max(<int>VL, mr)):
        repeated[i] = t.base[lane + i % mr]
    for i in range(16):
        sums[i] = v_zero()
    step_dots(mr, kind, t, &of.keys, lane, 0, 0, STEP, ahead, acc, P)
    while begin < n_keys:
        n = min(<Py_ssize_t>STEP, n_keys - begin)
        n_next = min(<Py_ssize_t>STEP, n_keys - begin - n)
        j = 0
        while j < n*mr:
            x = v_load(P + j)
            if kind == FASTATTN_I8:
                x = v_mul(x, v_repeat(of.keys.scale + begin, j, mr))
            x = weight(x, v_load(repeated + (j % mr if mr > VL else 0)), k, False, 0)
            v_store(P + j, x)
            if kind == FASTATTN_I8:
                v_store(scaled + j, v_mul(x, v_repeat(of.values.scale + begin, j, mr)))
            j += VL
        j = 0
        while j < n:
            rows_values(mr, kind, t, &of.values, lane, (scaled if kind == FASTATTN_I8 else P) + j*mr, mr, begin + j,
                        begin + min(j + chunk, n), ahead)
            if n_next > 0:
                step_dots(mr, kind, t, &of.keys, lane, begin + n, j, chunk, ahead, acc, next_P)
            j += chunk
        # only now: a load that straddles two stores waits until they are done
        if narrow:
            for i in range(STEP*mr//VL):
                x = v_load_part(P + i*VL, n*mr - i*VL) if i*VL < n*mr else v_zero()
                sums[i] = v_add(sums[i], v_add(x, v_rotate(x, mr)))
        else:
            for j in range(0, n, 2):
                i = 0
                while i < mr:
                    x = v_load(P + j*mr + i)
                    if j + 1 < n:
                        x = v_add(x, v_load(P + (j + 1)*mr + i))
                    chain = t.total + j//2*LANES + lane + i
                    v_store_part(chain, v_add(v_load_part(chain, mr - i), x), mr - i)
                    i += VL
        P, next_P = next_P, P
        begin += n
    if narrow:                  # the first of each two groups of mr lanes holds the sums of a pair of keys
        for i in range(CHAINS*mr):
            t.total[i//mr*LANES + lane + i % mr] += (<real*>sums)[2*(i - i % mr) + i % mr]


cdef inline void plain_kind(const int kind, Task* t, const Operands* of, Py_ssize_t lane, Py_ssize_t rows,
                            Py_ssize_t n_keys) noexcept nogil:
    cdef bint ahead = lane == 0 and of.keys.n_next > 0 and of.values.n_next > 0
    while rows > SUMS//4:
        plain_rows(SUMS//2, kind, t, of, lane, n_keys, ahead)
        lane += SUMS//2
        rows -= SUMS//2
        ahead = False
    if SUMS == 16 and rows > 2:
        plain_rows(4, kind, t, of, lane, n_keys, ahead)
        lane += 4
        rows -= 4
        ahead = False
    if rows >= 2:
        plain_rows(2, kind, t, of, lane, n_keys, ahead)
        lane += 2
        rows -= 2
        ahead = False
    if rows >= 1:
        plain_rows(1, kind, t, of, lane, n_keys, ahead)


# A function for each kind: in one for all, the loops would share its registers.

cdef void plain_real(Task* t, const Operands* of, Py_ssize_t lane, Py_ssize_t rows, Py_ssize_t n_keys) noexcept nogil:
    plain_kind(FASTATTN_REAL, t, of, lane, rows, n_keys)


cdef void plain_f16(Task* t, const Operands* of, Py_ssize_t lane, Py_ssize_t rows, Py_ssize_t n_keys) noexcept nogil:
    plain_kind(FASTATTN_F16, t, of, lane, rows, n_keys)


cdef void plain_bf16(Task* t, const Operands* of, Py_ssize_t lane, Py_ssize_t rows, Py_ssize_t n_keys) noexcept nogil:
    plain_kind(FASTATTN_BF16, t, of, lane, rows, n_keys)


cdef void plain_i8(Task* t, const Operands* of, Py_ssize_t lane, Py_ssize_t rows, Py_ssize_t n_keys) noexcept nogil:
    plain_kind(FASTATTN_I8, t, of, lane, rows, n_keys)


cdef void few_plain(Task* t, int first, int vectors, const Operands* of, Py_ssize_t n) noexcept nogil:
    # Ob += P V and the sums of weights by the present references, for n keys that all rows see
    cdef Py_ssize_t lane = first*VL
    cdef Py_ssize_t rows = min(<Py_ssize_t>vectors*VL, t.n_queries - lane)
    if sizeof(real) == 8 or of.keys.kind == FASTATTN_REAL:
        plain_real(t, of, lane, rows, n)
    elif of.keys.kind == FASTATTN_F16:
        plain_f16(t, of, lane, rows, n)
    elif of.keys.kind == FASTATTN_BF16:
        plain_bf16(t, of, lane, rows, n)
    else:
        plain_i8(t, of, lane, rows, n)


cdef void clear_block(Task* t, int first, int vectors) noexcept nogil:
    cdef Py_ssize_t ldo = whole(t.p.Dv)
    memset(t.Ob + first*VL*ldo, 0, vectors*VL*ldo*sizeof(real))


cdef void add_block(Task* t, int first, int vectors) noexcept nogil:
    # O = O c + Ob: the sums of a block join at once, as in tile_t
    cdef Py_ssize_t ldo = whole(t.p.Dv)
    cdef Py_ssize_t i, d
    for i in range(first*VL, min((first + vectors)*VL, t.n_queries)):
        d = i*ldo
        while d < (i + 1)*ldo:
            v_store(t.Ot + d, v_fma(v_load(t.Ot + d), v_set1(t.c[i]), v_load(t.Ob + d)))
            d += VL


cdef inline void repeat_last(int64_t* at, Py_ssize_t n) noexcept nogil:
    # rows past the last one, which tiles may read
    cdef Py_ssize_t j
    for j in range(n, ROOM):
        at[j] = at[n - 1]


cdef void find_source(Task* t, const fastattn_array* a, const char* data, const fastattn_array* scale, const float* scales,
                      int64_t block, Py_ssize_t n, int64_t* at, Source* source) noexcept nogil:
    # at: [2][ROOM]; the rows of the block that follows are looked up now, for they are fetched while this one is multiplied
    cdef int side = block//BLOCK % 2
    cdef Py_ssize_t size = v_size(a.kind)
    source.data = source.next_data = data
    source.kind = a.kind
    source.at = at + side*ROOM
    source.next = at + (1 - side)*ROOM
    source.n_next = max(<int64_t>0, min(t.k_end - block - n, <int64_t>BLOCK)) if a.col == 1 else 0
    if t.found != block:
        find_rows(t, a, block, n, size, at + side*ROOM)
        repeat_last(at + side*ROOM, n)
    if source.n_next > 0:
        find_rows(t, a, block + n, source.n_next, size, at + (1 - side)*ROOM)
        repeat_last(at + (1 - side)*ROOM, source.n_next)
    find_scales(t, scale, scales, block, n, source.scale)


cdef void packed_source(const real* data, Py_ssize_t row, Py_ssize_t n, int64_t* at, Source* source) noexcept nogil:
    # rows of reals one behind the other; what follows is fetched from where it lies
    cdef Py_ssize_t j
    source.data = <const char*>data
    source.kind = FASTATTN_REAL
    source.at = at
    for j in range(n):
        at[j] = j*row*sizeof(real)
    repeat_last(at, n)


cdef void few_operands(Task* t, int64_t block, Py_ssize_t n, Operands* of) noexcept nogil:
    # Many rows widen each key and value once, a few as often as there are tiles of rows.
    cdef const fastattn_problem* p = t.p
    cdef bint once = t.n_queries > SUMS
    find_source(t, &p.key, t.k, &p.key_scale, t.k_scale, block, n, t.k_at, &of.keys)
    find_source(t, &p.value, t.v, &p.value_scale, t.v_scale, block, n, t.v_at, &of.values)
    t.found = block + n if p.key.col == 1 and p.value.col == 1 else -1
    of.packs_k = p.key.col != 1 or (once and p.key.kind != FASTATTN_REAL)
    of.packs_v = p.value.col != 1 or of.clean or (once and p.value.kind != FASTATTN_REAL)
    if of.packs_k:
        packed_source(t.packed_k, p.D, n, t.packed_at, &of.keys)
    if of.packs_v:
        packed_source(t.packed_v, p.Dv, n, t.packed_at + ROOM, &of.values)


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
