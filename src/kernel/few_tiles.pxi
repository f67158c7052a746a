# Few rows: decoding, a handful of speculative tokens, short chunks. Each key and value is then used a few times only, so the
# limit is the memory they come from. Lanes of the two products run over D and Dv instead of queries, vectors of keys and
# values are loaded (and widened) where they lie, once for all rows and for all heads that share them:
#
#     Q [rows][D']   P[j, i] = sum over lanes of  sum_d Q[i, d..] K[j, d..]        SUMS such vectors are summed together
#     O [rows][Dv']  O[i, d..] = O[i, d..] c[i] + sum_j P[j, i] V[j, d..]          the same chain over j as in product_t
#
# This file: the loops over the rows of a tile. Rows go in tiles of SUMS / 2, the last of them in one of 6, 5, 4, 2 or 1 where
# that holds them. few.pxi: a block of keys, and the task around it.

cdef enum:
    SPLIT = 22*96           # keys of a task: fixed, so that no bit depends on the number of threads
    TOGETHER = 8            # groups of heads that a task takes where memory has their keys side by side
    STEP = 32               # values that all rows go through before the next ones
    AHEAD = 96              # rows between the one that is read and the one asked for, at most
    AHEAD_BYTES = 6144      # and bytes: half as far or twice as far is slower
    ROOM = 96 + AHEAD + 16  # rows of a block, those asked for, and as many as a tile may read past them
    TURN_BYTES = 2048       # of keys, then as many of values, where the two products take turns
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


cdef struct Late:           # values of the block before that are still to be added
    Task* task              # NULL: none
    Py_ssize_t n
    const real* P
    const Source* values
    int side                # which half of what is double the present block takes
    Operands of[2]


cdef inline int64_t few_rows(const fastattn_problem* p) noexcept nogil:
    # Rows of a head up to which they go this way. It is the faster one up to about here, more rows where keys come from memory,
    # fewer where from a cache (docs/kernel.md); halves where a vector of the other way holds half the queries, or multiplies
    # twice as much. By D alone: what else is in the call must not change a sequence's bits.
    cdef int64_t n = 24 if p.D >= 64 else 12 if p.D >= 32 else 8
    if VL*sizeof(real) < 64:
        n = FEW_UNROLLED if p.D == 64 or p.D == 128 else 4
    return n//2 if WORD == 2 or sizeof(real) == 8 else n


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
