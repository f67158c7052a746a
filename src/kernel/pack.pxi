# Moves between the arrays of the caller and the tiles of the kernel; elements of every kind become reals, or words of pairs.
#
#     Q rows [queries, D]  ──▶  Qt [D][LANES]            Ot [Dv][LANES]  ──▶  out rows [queries, Dv]
#     K rows [keys, D]     ──▶  [keys][D]                V rows [keys, Dv]  ──▶  [keys][Dv]; pairs: [keys/2][Dv]
#
# Keys and values are read in place where they are what the products take; else a block at a time comes through here.

cdef inline Py_ssize_t aligned(Py_ssize_t n) noexcept nogil:
    return (n + 15) // 16*16            # reals to whole cache lines, in either precision


cdef inline Py_ssize_t whole(Py_ssize_t n) noexcept nogil:
    return (n + VL - 1) // VL*VL        # vectors


cdef inline real real_at(const void* a, Py_ssize_t at, int kind) noexcept nogil:
    cdef real x
    if kind == FASTATTN_REAL:
        return (<const real*>a)[at]
    v_store_part(&x, v_load_part_as(a, at, 1, kind), 1)
    return x


cdef inline vf load_row(const void* a, Py_ssize_t at, Py_ssize_t col, Py_ssize_t n, int kind) noexcept nogil:
    return v_load_part_as(a, at, n, kind) if col == 1 else v_gather_as(a, at, col, n, kind)


cdef inline vf load_words(const void* a, Py_ssize_t at, Py_ssize_t col, Py_ssize_t n, int kind) noexcept nogil:
    # n words of a row, as products take them
    cdef uint16_t x[2*VL]
    cdef Py_ssize_t i
    if WORD == 1:
        return load_row(a, at, col, n, kind)
    if col == 1:
        return v_load_part(<const real*>(<const uint16_t*>a + at), n)
    for i in range(2*min(n, <Py_ssize_t>VL)):
        x[i] = (<const uint16_t*>a)[at + i*col]
    return v_load_part(<const real*>x, n)


cdef void pack_queries(const void* q, Py_ssize_t row, Py_ssize_t col, int kind, Py_ssize_t n_queries, int vectors,
                       Py_ssize_t D, real sign, real* Qt) noexcept nogil:
    # Qt[d, i] = sign · q[i, d], for D words; lanes past the last query get zeros. sign is 0 or ± a power of two: exact; 1 for
    # pairs.
    cdef v_square t
    cdef Py_ssize_t d, i, n, first
    cdef Py_ssize_t size = v_size(kind)
    cdef bint squares = col == 1 and (kind == FASTATTN_REAL if WORD == 1 else row % 2 == 0)
    cdef const char* rows = <const char*>q
    cdef int g
    cdef vf s = v_set1(sign)
    for i in range(min(n_queries, <Py_ssize_t>2*VL)):       # rows two vectors ahead: they are read a line at a time, VL apart
        v_fetch_soon(rows + i*row*size, WORD*D*size if col == 1 else 0)
    for g in range(vectors):
        first = g*VL
        for i in range(first + 2*VL, min(n_queries, first + 3*VL)):
            v_fetch_soon(rows + i*row*size, WORD*D*size if col == 1 else 0)
        d = 0
        while d < D:
            n = min(<Py_ssize_t>VL, D - d)
            if n == VL and squares and first + VL <= n_queries:
                if WORD == 1:
                    v_move_square_scaled(<const real*>q + first*row + d, row, Qt + d*LANES + first, LANES, s)
                else:
                    v_move_square(<const real*>q + first*row//WORD + d, row//WORD, Qt + d*LANES + first, LANES)
                d += VL
                continue
            for i in range(VL):
                t.row[i] = v_zero()
                if first + i < n_queries:
                    t.row[i] = load_words(q, (first + i)*row + d*WORD*col, col, n, kind)
                    if WORD == 1:
                        t.row[i] = v_mul(s, t.row[i])
            v_transpose(&t)
            for i in range(n):
                v_store(Qt + (d + i)*LANES + first, t.row[i])
            d += VL


cdef void write_out(const real* Ot, const real* factor, Py_ssize_t n_queries, int vectors, Py_ssize_t Dv,
                    void* out, Py_ssize_t row, Py_ssize_t col, int kind) noexcept nogil:
    # out[i, d] = Ot[d, i] · factor[i]
    cdef v_square t
    cdef Py_ssize_t d, i, n, first
    cdef int g
    cdef vf f
    for g in range(vectors):
        first = g*VL
        f = v_load(factor + first)
        d = 0
        while d < Dv:
            n = min(<Py_ssize_t>VL, Dv - d)
            if n == VL and col == 1 and kind == FASTATTN_REAL and first + VL <= n_queries:
                v_move_square_scaled(Ot + d*LANES + first, LANES, <real*>out + first*row + d, row, f)
                d += VL
                continue
            for i in range(VL):
                t.row[i] = v_mul(v_load(Ot + (d + i)*LANES + first), f) if i < n else v_zero()
            v_transpose(&t)
            for i in range(min(<Py_ssize_t>VL, n_queries - first)):
                v_store_as(out, (first + i)*row + d*col, col, t.row[i], n, kind)
            d += VL


cdef void pack_squares(const real* a, Py_ssize_t col, Py_ssize_t n_rows, Py_ssize_t n, real* packed) noexcept nogil:
    # packed[j, d] = a[j + d·col]: a transposed array, whose columns are contiguous
    cdef v_square t
    cdef Py_ssize_t d, i, j, n_d, n_j
    j = 0
    while j < n_rows:
        n_j = min(<Py_ssize_t>VL, n_rows - j)
        d = 0
        while d < n:
            n_d = min(<Py_ssize_t>VL, n - d)
            if n_d == VL and n_j == VL:
                v_move_square(a + j + d*col, col, packed + j*n + d, n)
                d += VL
                continue
            for i in range(VL):
                t.row[i] = v_load_part(a + j + (d + i)*col, n_j) if i < n_d else v_zero()
            v_transpose(&t)
            for i in range(n_j):
                v_store_part(packed + (j + i)*n + d, t.row[i], n_d)
            d += VL
        j += VL


cdef inline void pack_kind(const int kind, const void* a, const int64_t* at, const float* scale, Py_ssize_t n_rows,
                           Py_ssize_t n, real* packed) noexcept nogil:
    # packed[j, d] = a[at[j] + d], times scale[j]
    cdef Py_ssize_t j, d
    cdef vf x
    for j in range(n_rows):
        d = 0
        while d < n:
            x = v_load_part_as(a, at[j] + d, n - d, kind)
            if kind == FASTATTN_I8:
                x = v_mul(x, v_set1(scale[j]))
            v_store_part(packed + j*n + d, x, n - d)
            d += VL


cdef void pack_rows(const void* a, const int64_t* at, Py_ssize_t col, int kind, const float* scale, Py_ssize_t n_rows,
                    Py_ssize_t n, real* packed) noexcept nogil:
    # packed[j, d] = a[at[j] + d·col], times scale[j], in reals
    cdef Py_ssize_t j, d
    cdef vf x
    if n_rows > 1 and col != 1 and kind == FASTATTN_REAL and at[1] - at[0] == 1 and at[n_rows - 1] - at[0] == n_rows - 1:
        pack_squares(<const real*>a + at[0], col, n_rows, n, packed)
    elif col == 1 and kind == FASTATTN_F16:
        pack_kind(FASTATTN_F16, a, at, scale, n_rows, n, packed)
    elif col == 1 and kind == FASTATTN_BF16:
        pack_kind(FASTATTN_BF16, a, at, scale, n_rows, n, packed)
    elif col == 1 and kind == FASTATTN_I8:
        pack_kind(FASTATTN_I8, a, at, scale, n_rows, n, packed)
    elif col == 1:
        pack_kind(FASTATTN_REAL, a, at, scale, n_rows, n, packed)
    else:
        for j in range(n_rows):
            d = 0
            while d < n:
                x = v_gather_as(a, at[j] + d*col, col, min(<Py_ssize_t>VL, n - d), kind)
                if kind == FASTATTN_I8:
                    x = v_mul(x, v_set1(scale[j]))
                v_store_part(packed + j*n + d, x, n - d)
                d += VL


cdef void pack_words(const void* a, const int64_t* at, Py_ssize_t col, Py_ssize_t n_rows, Py_ssize_t n,
                     real* packed) noexcept nogil:
    # packed[j, d] = word d of row j
    cdef Py_ssize_t j, d
    for j in range(n_rows):
        d = 0
        while d < n:
            v_store_part(packed + j*n + d, load_words(a, at[j] + d*WORD*col, col, n - d, FASTATTN_BF16), n - d)
            d += VL


cdef void zip_rows(const void* a, const int64_t* at, Py_ssize_t col, Py_ssize_t n_rows, Py_ssize_t n,
                   real* packed) noexcept nogil:
    # packed[j, d] = the word of a[2 j, d] and a[2 j + 1, d]; zero past the last row
    cdef Py_ssize_t j, d
    cdef vf x, y
    for j in range((n_rows + 1)//2):
        d = 0
        if col == 1 and 2*j + 1 < n_rows:
            while d + 2*VL <= n:
                v_zip_words(<const uint16_t*>a + at[2*j] + d, <const uint16_t*>a + at[2*j + 1] + d, packed + j*n + d)
                d += 2*VL
        while d < n:
            x = load_row(a, at[2*j] + d*col, col, n - d, FASTATTN_BF16)
            y = v_zero()
            if 2*j + 1 < n_rows:
                y = load_row(a, at[2*j + 1] + d*col, col, n - d, FASTATTN_BF16)
            v_store_part(packed + j*n + d, v_pair(x, y), n - d)
            d += VL
