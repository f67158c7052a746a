# Moves between the arrays of the caller and the tiles of the kernel, through VL x VL transposes.
#
#     Q rows [queries, D]  ──▶  Qt [D][LANES]            Ot [Dv][LANES]  ──▶  out rows [queries, Dv]

cdef inline vf load_row(const real* p, Py_ssize_t stride, Py_ssize_t n) noexcept nogil:
    return v_load_part(p, n) if stride == 1 else v_gather(p, stride, n)


cdef void pack_queries(const real* q, Py_ssize_t row, Py_ssize_t col, Py_ssize_t n_queries, int vectors, Py_ssize_t D,
                       real sign, real* Qt) noexcept nogil:
    # Qt[d, i] = sign · q[i, d]; lanes past the last query get zeros. sign is 0 or ± a power of two: exact.
    cdef v_square t
    cdef Py_ssize_t d, i, n, first
    cdef int g
    cdef vf s = v_set1(sign)
    for i in range(min(n_queries, <Py_ssize_t>2*VL)):       # rows two vectors ahead: they are read a line at a time, VL apart
        v_fetch_soon(q + i*row, D if col == 1 else 0)
    for g in range(vectors):
        first = g*VL
        for i in range(first + 2*VL, min(n_queries, first + 3*VL)):
            v_fetch_soon(q + i*row, D if col == 1 else 0)
        d = 0
        while d < D:
            n = min(<Py_ssize_t>VL, D - d)
            if n == VL and col == 1 and first + VL <= n_queries:
                v_move_square_scaled(q + first*row + d, row, Qt + d*LANES + first, LANES, s)
                d += VL
                continue
            for i in range(VL):
                if first + i < n_queries:
                    t.row[i] = v_mul(s, load_row(q + (first + i)*row + d*col, col, n))
                else:
                    t.row[i] = v_zero()
            v_transpose(&t)
            for i in range(n):
                v_store(Qt + (d + i)*LANES + first, t.row[i])
            d += VL


cdef void write_out(const real* Ot, const real* factor, Py_ssize_t n_queries, int vectors, Py_ssize_t Dv,
                    real* out, Py_ssize_t row, Py_ssize_t col) noexcept nogil:
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
            if n == VL and col == 1 and first + VL <= n_queries:
                v_move_square_scaled(Ot + d*LANES + first, LANES, out + first*row + d, row, f)
                d += VL
                continue
            for i in range(VL):
                t.row[i] = v_mul(v_load(Ot + (d + i)*LANES + first), f) if i < n else v_zero()
            v_transpose(&t)
            for i in range(min(<Py_ssize_t>VL, n_queries - first)):
                if col == 1:
                    v_store_part(out + (first + i)*row + d, t.row[i], n)
                else:
                    v_scatter(out + (first + i)*row + d*col, col, t.row[i], n)
            d += VL


cdef void pack_rows(const real* a, Py_ssize_t row, Py_ssize_t col, Py_ssize_t n_rows, Py_ssize_t n,
                    real* packed) noexcept nogil:
    # packed[j, d] = a[j, d] with unit stride: for keys and values whose last axis is not contiguous, a block at a time.
    cdef v_square t
    cdef Py_ssize_t d, i, j, n_d, n_j
    if row == 1:                # a transposed array: columns are contiguous, so square by square
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
    else:
        for j in range(n_rows):
            d = 0
            while d < n:
                n_d = min(<Py_ssize_t>VL, n - d)
                v_store_part(packed + j*n + d, v_gather(a + j*row + d*col, col, n_d), n_d)
                d += VL
