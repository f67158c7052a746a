# Few rows: decoding, a handful of speculative tokens, short chunks. Each key and value is then used a few times only, so the
# limit is the memory they come from. Lanes of the two products run over D and Dv instead of queries, vectors of keys and
# values are loaded (and widened) where they lie, once for all rows and for all heads that share them:
#
#     Q [rows][D']   P[j, i] = sum over lanes of  sum_d Q[i, d..] K[j, d..]        SUMS such vectors are summed together
#     O [rows][Dv']  O[i, d..] = O[i, d..] c[i] + sum_j P[j, i] V[j, d..]          the same chain over j as in product_t
#
# Rows go in tiles of SUMS / 2, the last of them in one of 6, 5, 4, 2 or 1 where that holds them. All keys of a block, then
# all its values: two long runs through memory, which a processor foresees; finer turns cost a quarter of the bandwidth.
#
# Blocks that all rows see, without bias and softcap, stay as they are summed: P[keys][rows of the tile], no lane wasted.
# Others are spread over the lanes of S, keys by lanes of rows, so that everything between the products is that of the other
# path. Both are the same operations in the same order.
# A task takes SPLIT keys; what it leaves is merged in the order of the keys by the task of the group that ends last.

cdef enum:
    FEW = 40                # rows of a head up to which they go this way; 32 where LANES are no more
    SPLIT = 22*96           # keys of a task: fixed, so that no bit depends on the number of threads
    STEP = 32               # values that all rows go through before the next ones
    AHEAD = 96              # rows between the one that is read and the one asked for, at most
    AHEAD_BYTES = 6144      # and bytes: half as far or twice as far is slower
    ROOM = 96 + AHEAD + 16  # rows of a block, those asked for, and as many as a tile may read past them
    SCORES = 96*8 + 32      # of a block and SUMS / 2 rows, a tile and a vector past them


cdef struct Source:         # rows of a block: keys or values
    const char* data
    const int64_t* at       # [ROOM] bytes from data to each of them, and to those behind
    Py_ssize_t ahead        # rows; 0 where nothing is worth asking for
    int kind
    float scale[ROOM]       # of FASTATTN_I8


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


cdef inline int ld_of(const int mr) noexcept nogil:
    # how far the scores of two keys lie apart
    return 8 if mr > 4 else mr


cdef inline void group_dots(const int mr, const int nk, const int nv, const int kind, const real* Q, const char* data,
                            const int64_t* at, Py_ssize_t ahead, Py_ssize_t D, vf* acc) noexcept nogil:
    # The lanes of Q[i] · K[j] for mr rows and nk keys, of which the sum is left to do. D is nv vectors, or any where nv = 0.
    # Five and six rows have the place of eight.
    cdef vf part[16]
    cdef vf x
    cdef const char* row[4]
    cdef const char* later
    cdef Py_ssize_t ldq = nv*VL if nv > 0 else whole(D)
    cdef Py_ssize_t d = 0
    cdef int i, j, u
    for j in range(nk):
        row[j] = data + at[j]
        later = data + at[j + ahead]
        if nv > 0:
            for u in range(0, nv*VL*v_size(kind), 64):
                v_fetch_line(later + u)
        else:
            v_fetch_soon(later, D*v_size(kind))
        for i in range(mr):
            part[j*mr + i] = v_zero()
    for u in range(nv):
        for j in range(nk):
            x = v_load_as(row[j], u*VL, kind)
            for i in range(mr):
                part[j*mr + i] = v_fma(v_load(Q + i*ldq + u*VL), x, part[j*mr + i])
    while nv == 0 and d < D:
        for j in range(nk):
            x = v_load_part_as(row[j], d, D - d, kind)
            for i in range(mr):
                part[j*mr + i] = v_fma(v_load(Q + i*ldq + d), x, part[j*mr + i])
        d += VL
    for j in range(nk):
        for i in range(ld_of(mr)):
            acc[j*ld_of(mr) + i] = part[j*mr + min(i, mr - 1)]


cdef inline void deep_dots(const int mr, const int nv, const int kind, const Task* t, const Source* keys, Py_ssize_t lane,
                           Py_ssize_t begin, Py_ssize_t n, Py_ssize_t ahead, real* P, real* top) noexcept nogil:
    cdef const real* Q = t.Qt + lane*whole(t.p.D)
    cdef const int64_t* at = keys.at + begin
    cdef const char* data = keys.data
    cdef Py_ssize_t D = t.p.D
    cdef vf acc[16]
    cdef vf most[4]
    cdef vf x
    cdef Py_ssize_t j = 0
    cdef int ld = ld_of(mr)
    cdef int nk = min(4, SUMS//ld)
    cdef int u
    for u in range(SUMS//VL):
        most[u] = v_load(top + u*VL)
    while j < n:
        # written out: gcc keeps such a loop, and then the accumulators in memory
        group_dots(mr, min(4, SUMS//ld_of(mr)), nv, kind, v_anchor(Q), data, at + j, ahead, D, acc)
        if ld*nk < SUMS:
            group_dots(mr, min(4, SUMS//ld_of(mr)), nv, kind, v_anchor(Q), data, at + j + nk, ahead, D, acc + ld*nk)
        if 2*ld*nk < SUMS:
            group_dots(mr, min(4, SUMS//ld_of(mr)), nv, kind, v_anchor(Q), data, at + j + 2*nk, ahead, D, acc + 2*ld*nk)
            group_dots(mr, min(4, SUMS//ld_of(mr)), nv, kind, v_anchor(Q), data, at + j + 3*nk, ahead, D, acc + 3*ld*nk)
        for u in range(SUMS//VL):
            x = v_sums(acc + u*VL)
            if kind == FASTATTN_I8:
                x = v_mul(x, v_repeat(keys.scale + begin + j, u*VL, ld))
            v_store(P + j*ld + u*VL, x)
            most[u] = v_max(x, most[u])
        j += SUMS//ld
    for u in range(SUMS//VL):
        v_store(top + u*VL, most[u])


cdef inline void rows_dots(const int mr, const int kind, const Task* t, const Source* keys, Py_ssize_t lane, Py_ssize_t begin,
                           Py_ssize_t n, Py_ssize_t ahead, real* P, real* top) noexcept nogil:
    # P[j, i] = Q[lane + i] · K[begin + j] for mr rows and n keys, or as many more as make SUMS of them, and
    # top[i], top[i + ld_of(mr)], .. become at least the largest of row i.
    if t.p.D == 64:
        deep_dots(mr, 64//VL, kind, t, keys, lane, begin, n, ahead, P, top)
    elif t.p.D == 128:
        deep_dots(mr, 128//VL, kind, t, keys, lane, begin, n, ahead, P, top)
    else:
        deep_dots(mr, 0, kind, t, keys, lane, begin, n, ahead, P, top)


cdef inline void tile_rows(const int mr, const int nv, const bint asks, const int kind, const real* P, Py_ssize_t ldp,
                           const Source* values, Py_ssize_t d, Py_ssize_t n, Py_ssize_t begin, Py_ssize_t end, real* O,
                           Py_ssize_t ldo, Py_ssize_t ahead) noexcept nogil:
    # O[i, d..] += sum_j P[j - begin, i] V[j, d..] over keys [begin, end), for mr rows and nv vectors, or n < VL columns of one
    cdef vf acc[16]
    cdef vf x[16]
    cdef const char* data = values.data + d*v_size(kind)
    cdef const int64_t* at = values.at
    cdef const char* row
    cdef const char* later
    cdef Py_ssize_t j
    cdef int i, g
    for i in range(mr):
        for g in range(nv):
            acc[i*nv + g] = v_load(O + i*ldo + g*VL)
    for j in range(begin, end):
        row = data + at[j]
        if asks:
            later = data + at[j + ahead]
            for g in range((nv + vectors_of_line(kind) - 1)//vectors_of_line(kind)):
                v_fetch_line(later + g*vectors_of_line(kind)*VL*v_size(kind))
        for g in range(nv):
            x[g] = v_load_part_as(row, 0, n, kind) if nv == 1 else v_load_as(row, g*VL, kind)
        for i in range(mr):
            for g in range(nv):
                acc[i*nv + g] = v_fma(v_set1(P[i]), x[g], acc[i*nv + g])
        P += ldp
    for i in range(mr):
        for g in range(nv):
            v_store(O + i*ldo + g*VL, acc[i*nv + g])


cdef inline void tiles_rows(const int mr, const int each, const int nv, const int kind, const real* P, Py_ssize_t ldp,
                            const Source* values, Py_ssize_t d, Py_ssize_t n, Py_ssize_t begin, Py_ssize_t end, real* O,
                            Py_ssize_t ldo, Py_ssize_t ahead) noexcept nogil:
    # mr rows, `each` of them at a time
    cdef int i = each
    tile_rows(each, nv, True, kind, P, ldp, values, d, n, begin, end, O + d, ldo, ahead)
    while i + each <= mr:
        tile_rows(each, nv, False, kind, P + i, ldp, values, d, n, begin, end, O + i*ldo + d, ldo, 0)
        i += each
    if mr % each > 0:
        tile_rows(mr % each, nv, False, kind, P + i, ldp, values, d, n, begin, end, O + i*ldo + d, ldo, 0)


cdef inline void rows_values(const int mr, const int kind, const Task* t, const Source* values, Py_ssize_t lane, const real* P,
                             Py_ssize_t ldp, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t ahead) noexcept nogil:
    # Ob[lane + i] += sum_j P[j - begin, i] V[j]. Columns go together as far as the registers hold them, and rows in turn: in
    # memory's view the values come whole, and a STEP of them stays in the first-level cache meanwhile.
    cdef int widest = 8 if mr == 1 or SUMS == 16 else 4
    cdef Py_ssize_t Dv = t.p.Dv
    cdef Py_ssize_t ldo = whole(Dv)
    cdef real* O = t.Ob + lane*ldo
    cdef Py_ssize_t stop
    cdef Py_ssize_t d = 0
    while begin < end:
        stop = min(end, begin + STEP)
        d = 0
        while widest == 8 and Dv - d >= 8*VL:
            tiles_rows(mr, min(mr, SUMS//8), 8, kind, P, ldp, values, d, VL, begin, stop, O, ldo, ahead)
            d += 8*VL
        while Dv - d >= 4*VL:
            tiles_rows(mr, min(mr, SUMS//4), 4, kind, P, ldp, values, d, VL, begin, stop, O, ldo, ahead)
            d += 4*VL
        while d < Dv:
            tiles_rows(mr, mr, 1, kind, P, ldp, values, d, Dv - d, begin, stop, O, ldo, ahead)
            d += VL
        P += STEP*ldp
        begin = stop


cdef inline void weigh_tile(const int mr, const bint scaled, Task* t, const Source* values, Py_ssize_t lane, Py_ssize_t n,
                            real* P, const real* top) noexcept nogil:
    # The reference of mr rows, moved if need be, P[keys][mr] by it, and its sums in the order of `weigh`. scaled: rows of
    # values have scales, which go into P.
    cdef int vectors = mr//VL if mr > VL else 1         # of a key, or of VL / mr keys
    cdef Py_ssize_t end = n*mr
    cdef Py_ssize_t j = 0
    cdef real repeated[16]                              # base of the rows, as lanes have them
    cdef real flat[16*16]
    cdef vf sums[16]                                    # of CHAINS pairs of keys
    cdef vf most[4]
    cdef vf x, y
    cdef vf k = v_set1(t.kappa)
    cdef int g, i
    for i in range(SUMS//VL):
        x = v_load(top + i*VL)
        most[i % vectors] = v_max(x, most[i % vectors]) if i >= vectors else x
    i = VL//2
    while i >= mr:
        most[0] = v_max(v_rotate(most[0], i), most[0])
        i //= 2
    for g in range(vectors):
        v_store_part(t.base + lane + g*VL, most[g], mr - g*VL)
        move_reference(t.kappa, mr - g*VL, t.m + lane + g*VL, t.base + lane + g*VL, t.c + lane + g*VL)
    for i in range(vectors*VL):
        repeated[i] = t.base[lane + i % mr]
    for i in range(max(1, CHAINS*mr*(2 if 2*mr <= VL else 1)//VL)):
        sums[i] = v_zero()
    while j < end:
        if 2*mr <= VL:                                  # a pair of keys in one vector
            for i in range(2*CHAINS*mr//VL):
                if j + i*VL < end:
                    x = weight(v_load(P + j + i*VL), v_load(repeated), k, False, 0)
                    v_store(P + j + i*VL, v_mul(x, v_repeat(values.scale, j + i*VL, mr)) if scaled else x)
                    if j + (i + 1)*VL > end:
                        x = v_keep(x, (<uint64_t>1 << (end - j - i*VL)) - 1)
                    sums[i] = v_add(sums[i], v_add(x, v_rotate(x, mr)))
        else:
            for i in range(CHAINS*vectors):
                g = (i//vectors*2*vectors + i % vectors)*VL
                if j + g < end:
                    x = weight(v_load(P + j + g), v_load(repeated + i % vectors*VL), k, False, 0)
                    v_store(P + j + g, v_mul(x, v_repeat(values.scale, j + g, mr)) if scaled else x)
                    g += vectors*VL
                    if j + g < end:
                        y = weight(v_load(P + j + g), v_load(repeated + i % vectors*VL), k, False, 0)
                        v_store(P + j + g, v_mul(y, v_repeat(values.scale, j + g, mr)) if scaled else y)
                        x = v_add(x, y)
                    sums[i] = v_add(sums[i], x)
        j += 2*CHAINS*mr
    for i in range(max(1, CHAINS*mr*(2 if 2*mr <= VL else 1)//VL)):
        v_store(flat + i*VL, sums[i])
    for i in range(CHAINS*mr):      # of narrow vectors the first of each two groups of mr lanes holds the sums of a pair
        g = 2*(i - i % mr) + i % mr if 2*mr <= VL else i
        t.total[i//mr*LANES + lane + i % mr] = flat[g]


# A function for each loop over keys: in one for all, gcc hoists constants of some into registers that others need.

cdef inline void any_dots(const int kind, int mr, const Task* t, const Source* keys, Py_ssize_t lane, Py_ssize_t begin,
                          Py_ssize_t n, Py_ssize_t ahead, real* P, real* top) noexcept nogil:
    if mr == SUMS//2:
        rows_dots(SUMS//2, kind, t, keys, lane, begin, n, ahead, P, top)
    elif SUMS == 16 and mr == 6:
        rows_dots(6, kind, t, keys, lane, begin, n, ahead, P, top)
    elif SUMS == 16 and mr == 5:
        rows_dots(5, kind, t, keys, lane, begin, n, ahead, P, top)
    elif SUMS == 16 and mr == 4:
        rows_dots(4, kind, t, keys, lane, begin, n, ahead, P, top)
    elif mr == 2:
        rows_dots(2, kind, t, keys, lane, begin, n, ahead, P, top)
    else:
        rows_dots(1, kind, t, keys, lane, begin, n, ahead, P, top)


cdef void dots_real(int mr, const Task* t, const Source* keys, Py_ssize_t lane, Py_ssize_t begin, Py_ssize_t n,
                    Py_ssize_t ahead, real* P, real* top) noexcept nogil:
    any_dots(FASTATTN_REAL, mr, t, keys, lane, begin, n, ahead, P, top)


cdef void dots_f16(int mr, const Task* t, const Source* keys, Py_ssize_t lane, Py_ssize_t begin, Py_ssize_t n,
                   Py_ssize_t ahead, real* P, real* top) noexcept nogil:
    any_dots(FASTATTN_F16, mr, t, keys, lane, begin, n, ahead, P, top)


cdef void dots_bf16(int mr, const Task* t, const Source* keys, Py_ssize_t lane, Py_ssize_t begin, Py_ssize_t n,
                    Py_ssize_t ahead, real* P, real* top) noexcept nogil:
    any_dots(FASTATTN_BF16, mr, t, keys, lane, begin, n, ahead, P, top)


cdef void dots_i8(int mr, const Task* t, const Source* keys, Py_ssize_t lane, Py_ssize_t begin, Py_ssize_t n,
                  Py_ssize_t ahead, real* P, real* top) noexcept nogil:
    any_dots(FASTATTN_I8, mr, t, keys, lane, begin, n, ahead, P, top)


cdef void tile_dots(int mr, const Task* t, const Source* keys, Py_ssize_t lane, Py_ssize_t begin, Py_ssize_t n,
                    real* P, real* top) noexcept nogil:
    # The first tile of rows asks for the rows to come. Doubles are stored as such: the build for them has no other loops.
    cdef Py_ssize_t ahead = keys.ahead if lane == 0 else 0
    if sizeof(real) == 8 or keys.kind == FASTATTN_REAL:
        dots_real(mr, t, keys, lane, begin, n, ahead, P, top)
    elif keys.kind == FASTATTN_F16:
        dots_f16(mr, t, keys, lane, begin, n, ahead, P, top)
    elif keys.kind == FASTATTN_BF16:
        dots_bf16(mr, t, keys, lane, begin, n, ahead, P, top)
    else:
        dots_i8(mr, t, keys, lane, begin, n, ahead, P, top)


cdef inline void any_values(const int kind, int mr, const Task* t, const Source* values, Py_ssize_t lane, const real* P,
                            Py_ssize_t ldp, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t ahead) noexcept nogil:
    if mr == SUMS//2:
        rows_values(SUMS//2, kind, t, values, lane, P, ldp, begin, end, ahead)
    elif SUMS == 16 and mr == 6:
        rows_values(6, kind, t, values, lane, P, ldp, begin, end, ahead)
    elif SUMS == 16 and mr == 5:
        rows_values(5, kind, t, values, lane, P, ldp, begin, end, ahead)
    elif SUMS == 16 and mr == 4:
        rows_values(4, kind, t, values, lane, P, ldp, begin, end, ahead)
    elif mr == 2:
        rows_values(2, kind, t, values, lane, P, ldp, begin, end, ahead)
    else:
        rows_values(1, kind, t, values, lane, P, ldp, begin, end, ahead)


cdef void values_real(int mr, const Task* t, const Source* values, Py_ssize_t lane, const real* P, Py_ssize_t ldp,
                      Py_ssize_t begin, Py_ssize_t end, Py_ssize_t ahead) noexcept nogil:
    any_values(FASTATTN_REAL, mr, t, values, lane, P, ldp, begin, end, ahead)


cdef void values_f16(int mr, const Task* t, const Source* values, Py_ssize_t lane, const real* P, Py_ssize_t ldp,
                     Py_ssize_t begin, Py_ssize_t end, Py_ssize_t ahead) noexcept nogil:
    any_values(FASTATTN_F16, mr, t, values, lane, P, ldp, begin, end, ahead)


cdef void values_bf16(int mr, const Task* t, const Source* values, Py_ssize_t lane, const real* P, Py_ssize_t ldp,
                      Py_ssize_t begin, Py_ssize_t end, Py_ssize_t ahead) noexcept nogil:
    any_values(FASTATTN_BF16, mr, t, values, lane, P, ldp, begin, end, ahead)


cdef void values_i8(int mr, const Task* t, const Source* values, Py_ssize_t lane, const real* P, Py_ssize_t ldp,
                    Py_ssize_t begin, Py_ssize_t end, Py_ssize_t ahead) noexcept nogil:
    any_values(FASTATTN_I8, mr, t, values, lane, P, ldp, begin, end, ahead)


cdef void tile_values(int mr, const Task* t, const Source* values, Py_ssize_t lane, const real* P, Py_ssize_t ldp,
                      Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    cdef Py_ssize_t ahead = values.ahead if lane == 0 else 0
    if sizeof(real) == 8 or values.kind == FASTATTN_REAL:
        values_real(mr, t, values, lane, P, ldp, begin, end, ahead)
    elif values.kind == FASTATTN_F16:
        values_f16(mr, t, values, lane, P, ldp, begin, end, ahead)
    elif values.kind == FASTATTN_BF16:
        values_bf16(mr, t, values, lane, P, ldp, begin, end, ahead)
    else:
        values_i8(mr, t, values, lane, P, ldp, begin, end, ahead)


cdef inline void any_weights(const bint scaled, int mr, Task* t, const Source* values, Py_ssize_t lane, Py_ssize_t n,
                             real* P, const real* top) noexcept nogil:
    if ld_of(mr) == SUMS//2:
        weigh_tile(SUMS//2, scaled, t, values, lane, n, P, top)
    elif SUMS == 16 and mr == 4:
        weigh_tile(4, scaled, t, values, lane, n, P, top)
    elif mr == 2:
        weigh_tile(2, scaled, t, values, lane, n, P, top)
    else:
        weigh_tile(1, scaled, t, values, lane, n, P, top)


cdef void tile_weights(int mr, Task* t, const Source* values, Py_ssize_t lane, Py_ssize_t n, real* P,
                       const real* top) noexcept nogil:
    if sizeof(real) == 4 and values.kind == FASTATTN_I8:
        any_weights(True, mr, t, values, lane, n, P, top)
    else:
        any_weights(False, mr, t, values, lane, n, P, top)


cdef inline int rows_of_tile(Py_ssize_t rows) noexcept nogil:
    # where `rows` are left; lanes behind the last row are computed too
    if rows <= 2:
        return <int>rows
    if SUMS == 16 and rows <= 6:
        return 4 if rows <= 4 else <int>rows
    return SUMS//2


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
                      int64_t* at, Source* source) noexcept nogil:
    # Blocks of one array have the same table, but for the last, whose rows end: it stays. Behind it the distance of its rows
    # says whose it is.
    cdef Py_ssize_t size = v_size(a.kind)
    cdef Py_ssize_t left = min(t.end - block, <int64_t>ROOM)
    cdef bint whole_table = left >= ROOM - AHEAD
    cdef Py_ssize_t j, rows
    source.data = data
    source.kind = a.kind
    source.at = at
    source.ahead = max(<Py_ssize_t>4, min(<Py_ssize_t>AHEAD, AHEAD_BYTES//max(<Py_ssize_t>1, D*size)))
    if t.pages != NULL:
        rows = min(left, n + source.ahead)
        find_rows(t, a, block, rows, size, at)
        repeat_last(at, rows, ROOM)
    else:
        source.data += block*a.row*size
        if at[ROOM] != a.row:
            for j in range(ROOM - AHEAD + source.ahead):
                at[j] = j*a.row*size
        if not whole_table:         # those asked for may be another head's
            repeat_last(at, left, min(left + 16, <Py_ssize_t>ROOM))
    at[ROOM] = a.row if t.pages == NULL and whole_table else INT64_MAX


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
    of.packs_k = p.key.col != 1 or (once and p.key.kind != FASTATTN_REAL)
    of.packs_v = p.value.col != 1 or of.clean or (once and p.value.kind != FASTATTN_REAL)
    if of.packs_k:
        packed_source(t.packed_k, p.D, n, t.k_at, &of.keys)
    else:
        find_source(t, &p.key, t.k, p.D, block, n, t.k_at, &of.keys)
    if of.packs_v:
        packed_source(t.packed_v, p.Dv, n, t.v_at, &of.values)
    elif (t.pages != NULL and not of.packs_k and p.key.kind == p.value.kind and p.D == p.Dv and p.key.row == p.value.row
            and p.key.lead[0] == p.value.lead[0]):
        of.values.data = t.v
        of.values.kind = of.keys.kind
        of.values.at = of.keys.at
        of.values.ahead = of.keys.ahead
    else:
        find_source(t, &p.value, t.v, p.Dv, block, n, t.v_at, &of.values)
    if of.keys.kind == FASTATTN_I8:
        source_scales(t, &p.key_scale, t.k_scale, block, n, &of.keys)
    if of.values.kind == FASTATTN_I8:
        source_scales(t, &p.value_scale, t.v_scale, block, n, &of.values)


cdef inline bint stays_packed(const Task* t, const Operands* of, bint masked) noexcept nogil:
    # Whether scores need no lanes of S: few_whole.
    return not masked and t.bias == NULL and t.p.softcap == 0 and not of.in_turn


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
