# The two register-tile products; everything else in the kernel prepares their operands or uses their results.
#
#     N:  C[i, lane]  = (C +) sum_k A[i, k] B[k, lane]                 rows of A contiguous in k    (scores: A = K, B = Qt)
#     T:  C[i, lane]  = C[i, lane] c[lane] + sum_k A[k, i] B[k, lane]  rows of A contiguous in i    (output: A = V, B = Pt)
#
# A is read where it lies, a scalar at a time, as the broadcast operand of the FMA. Rows of B and C are LANES reals apart.
#
#            B: | nv vectors |            a tile holds mr x nv accumulators for the whole sum over k:
#               |            | k          mr broadcasts and nv loads feed mr * nv FMAs, so the FMA units are the limit
#     A: ┌────┐ ┌────────────┐
#     mr │  k │ │  mr x nv   │ C          nv = 4: 6 x 4, 3: 8 x 3, 2: 12 x 2, 1: 16 x 1
#        └────┘ └────────────┘
#
# Where the instruction set has them, products take pairs (WORD = 2): a real of A and B is then a word of two bfloat16 along
# the inner axis k. In T a pair is two rows of A, zipped, and B has it in the place of the first of its two rows.
#
# `mr` and `nv` are literals at every call: the loops over them must unroll completely, or acc leaves the registers.
# The sum over k is one chain of FMAs for each element, whatever the tile: the bits of C do not depend on the tiling.

cdef enum How:
    STORE                   # C = A B
    ADD                     # C += A B
    BIAS                    # C = scale A B + C, where C is a bias: -inf masks, even a NaN score


cdef inline vf biased(vf s, vf scale, vf b) noexcept nogil:
    # selected, because a NaN score plus -inf would be NaN
    return v_where_lt(b, v_set1(-REAL_MAX), v_set1(-INFINITY), v_fma(s, scale, b))


cdef inline void store_tile(const int mr, const int nv, vf acc[16][4], real* C, Py_ssize_t ldc, How how, real scale,
                            const real* last) noexcept nogil:
    # last: a row that is added to every row of the result (NULL: none)
    cdef int i, j
    if last != NULL and how == ADD:
        for i in range(mr):
            for j in range(nv):
                v_store(C + i*ldc + j*VL, v_add(v_add(v_load(C + i*ldc + j*VL), acc[i][j]), v_load(last + j*VL)))
    elif last != NULL:
        for i in range(mr):
            for j in range(nv):
                v_store(C + i*ldc + j*VL, v_add(acc[i][j], v_load(last + j*VL)))
    elif how == BIAS:
        for i in range(mr):
            for j in range(nv):
                v_store(C + i*ldc + j*VL, biased(acc[i][j], v_set1(scale), v_load(C + i*ldc + j*VL)))
    elif how == ADD:
        for i in range(mr):
            for j in range(nv):
                v_store(C + i*ldc + j*VL, v_add(v_load(C + i*ldc + j*VL), acc[i][j]))
    else:
        for i in range(mr):
            for j in range(nv):
                v_store(C + i*ldc + j*VL, acc[i][j])


cdef inline void tile_n(const int mr, const int nv, const real* A, Py_ssize_t lda, const real* B, Py_ssize_t ldb,
                        Py_ssize_t n, real* C, Py_ssize_t ldc, How how, real scale, const real* last) noexcept nogil:
    cdef vf acc[16][4]
    cdef vf b[4]
    cdef vf a
    cdef Py_ssize_t k
    cdef int i, j
    for i in range(mr):
        for j in range(nv):
            acc[i][j] = v_zero()
    for k in range(n):
        for j in range(nv):
            b[j] = v_load(B + k*ldb + j*VL)
        for i in range(mr):
            a = v_word(A + i*lda + k)
            for j in range(nv):
                acc[i][j] = v_dot(a, b[j], acc[i][j])
    store_tile(mr, nv, acc, C, ldc, how, scale, last)


cdef struct Parts:          # ascending ranges of a block's keys that take part
    int n
    Py_ssize_t begin[PAIRS]
    Py_ssize_t end[PAIRS]


cdef inline void tile_t(const int mr, const int nv, const real* A, Py_ssize_t lda, const real* B, const Parts* parts,
                        real* C, const real* c) noexcept nogil:
    cdef vf acc[16][4]
    cdef vf b[4]
    cdef vf a
    cdef Py_ssize_t k
    cdef int i, j, part
    for i in range(mr):
        for j in range(nv):
            acc[i][j] = v_zero()
    for part in range(parts.n):
        for k in range(parts.begin[part]//WORD, (parts.end[part] + WORD - 1)//WORD):
            for j in range(nv):
                b[j] = v_load(B + k*WORD*LANES + j*VL)
            for i in range(mr):
                a = v_word(A + k*lda + i)
                for j in range(nv):
                    acc[i][j] = v_dot(a, b[j], acc[i][j])
    # One rounding for rescaling the older sum and adding this block's: where the maximum did not grow c is 1 and exact.
    for j in range(nv):
        b[j] = v_load(c + j*VL)
    for i in range(mr):
        for j in range(nv):
            v_store(C + i*LANES + j*VL, v_fma(v_load(C + i*LANES + j*VL), b[j], acc[i][j]))


cdef inline int rows_of(const int nv) noexcept nogil:
    return ROWS_1 if nv == 1 else ROWS_2 if nv == 2 else ROWS_3 if nv == 3 else ROWS_4


cdef struct Rows:           # rows that will be read later: values, bias, mask
    const char* at
    Py_ssize_t row          # bytes from one to the next
    Py_ssize_t size         # bytes of one
    Py_ssize_t left         # rows


cdef struct Ahead:
    Rows rows[3]            # for the next stage of this task, together
    int n
    Rows keys               # of the next block, while the values of this one are multiplied
    Rows next[8]            # for the next task, one after the other
    int at, n_next
    int pace                # rows of these for each row of the others


cdef inline void fetch_rows(Rows* rows, Py_ssize_t m) noexcept nogil:
    cdef Py_ssize_t i
    m = min(m, rows.left)
    for i in range(m):
        v_fetch_later(rows.at, rows.size)
        rows.at += rows.row
    rows.left -= m


cdef inline void fetch(const int mr, const real* A, Py_ssize_t lda, Py_ssize_t n, Py_ssize_t m, Ahead* later) noexcept nogil:
    # While a tile of mr rows is multiplied: those of A of the next one, where m are left, and as many rows of each array that
    # comes later. All at once would fill the queue of misses and stop the loads of the product.
    cdef Py_ssize_t i
    cdef int a
    for i in range(min(<Py_ssize_t>mr, m)):
        v_fetch_soon(<const char*>(A + i*lda), n*sizeof(real))
    for a in range(later.n):
        fetch_rows(&later.rows[a], mr)
    if later.at < later.n_next:
        fetch_rows(&later.next[later.at], later.pace*mr)
        later.at += later.next[later.at].left == 0


cdef inline void columns_n(const int nv, const real* A, Py_ssize_t lda, const real* B, Py_ssize_t ldb, Py_ssize_t n,
                           real* C, Py_ssize_t ldc, Py_ssize_t m, How how, real scale, const real* last,
                           Ahead* later) noexcept nogil:
    # C[m, nv*VL] = A[m, n] · B[n, nv*VL]: full tiles, then what is left in tiles of 6, 4, 2 and 1 rows
    # (8 as 4 + 4: two rows alone have too few accumulators to fill the FMA units).
    while m >= rows_of(nv) and not (rows_of(nv) == 6 and m == 8):
        if later != NULL:
            fetch(rows_of(nv), A + rows_of(nv)*lda, lda, n, m - rows_of(nv), later)
        tile_n(rows_of(nv), nv, A, lda, B, ldb, n, C, ldc, how, scale, last)
        A += rows_of(nv)*lda
        C += rows_of(nv)*ldc
        m -= rows_of(nv)
    if rows_of(nv) > 12 and m >= 12:
        tile_n(12, nv, A, lda, B, ldb, n, C, ldc, how, scale, last)
        A += 12*lda
        C += 12*ldc
        m -= 12
    if rows_of(nv) > 12 and m >= 8:
        tile_n(8, nv, A, lda, B, ldb, n, C, ldc, how, scale, last)
        A += 8*lda
        C += 8*ldc
        m -= 8
    if rows_of(nv) > 6 and m >= 6:
        tile_n(6, nv, A, lda, B, ldb, n, C, ldc, how, scale, last)
        A += 6*lda
        C += 6*ldc
        m -= 6
    while rows_of(nv) > 4 and m >= 4:
        tile_n(4, nv, A, lda, B, ldb, n, C, ldc, how, scale, last)
        A += 4*lda
        C += 4*ldc
        m -= 4
    if rows_of(nv) > 2 and m >= 2:
        tile_n(2, nv, A, lda, B, ldb, n, C, ldc, how, scale, last)
        A += 2*lda
        C += 2*ldc
        m -= 2
    if m >= 1:
        tile_n(1, nv, A, lda, B, ldb, n, C, ldc, how, scale, last)


cdef inline void columns_t(const int nv, const real* A, Py_ssize_t lda, const real* B, const Parts* parts, real* C,
                           Py_ssize_t m, const real* c, Rows* later) noexcept nogil:
    # C[m, nv*VL] = C c + A[n, m]ᵀ · B[n, nv*VL], over the rows that take part
    cdef Py_ssize_t pace = later.left*rows_of(nv)//max(m, <Py_ssize_t>1) + 1 if later != NULL else 0
    while m >= rows_of(nv) and not (rows_of(nv) == 6 and m == 8):
        if later != NULL:
            fetch_rows(later, pace)
        tile_t(rows_of(nv), nv, A, lda, B, parts, C, c)
        A += rows_of(nv)
        C += rows_of(nv)*LANES
        m -= rows_of(nv)
    if rows_of(nv) > 12 and m >= 12:
        tile_t(12, nv, A, lda, B, parts, C, c)
        A += 12
        C += 12*LANES
        m -= 12
    if rows_of(nv) > 12 and m >= 8:
        tile_t(8, nv, A, lda, B, parts, C, c)
        A += 8
        C += 8*LANES
        m -= 8
    if rows_of(nv) > 6 and m >= 6:
        tile_t(6, nv, A, lda, B, parts, C, c)
        A += 6
        C += 6*LANES
        m -= 6
    while rows_of(nv) > 4 and m >= 4:
        tile_t(4, nv, A, lda, B, parts, C, c)
        A += 4
        C += 4*LANES
        m -= 4
    if rows_of(nv) > 2 and m >= 2:
        tile_t(2, nv, A, lda, B, parts, C, c)
        A += 2
        C += 2*LANES
        m -= 2
    if m >= 1:
        tile_t(1, nv, A, lda, B, parts, C, c)


cdef inline void groups_n(const int group, Py_ssize_t vectors, const real* A, Py_ssize_t lda, const real* B, Py_ssize_t ldb,
                          Py_ssize_t n, real* C, Py_ssize_t ldc, Py_ssize_t m, How how, real scale, const real* last,
                          Ahead* later) noexcept nogil:
    # C[m, vectors*VL] = A[m, n] · B[n, vectors*VL], or += it: group vectors at a time, then what is left
    while vectors >= group:
        columns_n(group, A, lda, B, ldb, n, C, ldc, m, how, scale, last, later)
        B += group*VL
        C += group*VL
        last += group*VL if last != NULL else 0
        vectors -= group
    if group > 3 and vectors == 3:
        columns_n(3, A, lda, B, ldb, n, C, ldc, m, how, scale, last, later)
    elif group > 2 and vectors == 2:
        columns_n(2, A, lda, B, ldb, n, C, ldc, m, how, scale, last, later)
    elif vectors == 1:
        columns_n(1, A, lda, B, ldb, n, C, ldc, m, how, scale, last, later)


cdef void product_n(int vectors, const real* A, Py_ssize_t lda, const real* B, Py_ssize_t n, real* C,
                    Py_ssize_t m, How how, real scale, Ahead* later) noexcept nogil:
    groups_n(GROUP, vectors, A, lda, B, LANES, n, C, LANES, m, how, scale, NULL, later)


cdef void product_rows(const real* A, Py_ssize_t n, const real* B, Py_ssize_t ldb, real* C, Py_ssize_t m, Py_ssize_t ldc,
                       Py_ssize_t width, Ahead* later) noexcept nogil:
    # C[m, width] += A[m, n] · B[n, width], where rows of A are LANES apart, and width is whole vectors
    groups_n(GROUP, width//VL, A, LANES, B, ldb, n, C, ldc, m, ADD, 1, NULL, later)


cdef void product_t(int vectors, const real* A, Py_ssize_t lda, const real* B, const Parts* parts, real* C,
                    Py_ssize_t m, const real* c, Rows* later) noexcept nogil:
    # C[m, vectors*VL] = C c + A[n, m]ᵀ · B[n, vectors*VL]
    while vectors >= GROUP:
        columns_t(GROUP, A, lda, B, parts, C, m, c, later)
        B += GROUP*VL
        C += GROUP*VL
        c += GROUP*VL
        vectors -= GROUP
    if GROUP > 3 and vectors == 3:
        columns_t(3, A, lda, B, parts, C, m, c, later)
    elif GROUP > 2 and vectors == 2:
        columns_t(2, A, lda, B, parts, C, m, c, later)
    elif vectors == 1:
        columns_t(1, A, lda, B, parts, C, m, c, later)
