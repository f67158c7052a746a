# What may happen to a tile of scores between the product and the softmax, in the order of semantics: softcap, bias, masks.
# Each is one pass over S[keys][LANES] for the vectors of a segment, and none of them runs on a tile it does not concern.
# Rows of a bias run over keys, so they come in by VL x VL transposes.

cdef void softcap_pass(real* S, int vectors, Py_ssize_t n, real scale, real cap) noexcept nogil:
    # S = cap · tanh(S · scale / cap)
    cdef Py_ssize_t j
    cdef int g
    cdef vf inner = v_set1(scale / cap)
    cdef vf outer = v_set1(cap)
    for j in range(n):
        for g in range(vectors):
            v_store(S + j*LANES + g*VL, v_mul(outer, v_tanh(v_mul(inner, v_load(S + j*LANES + g*VL)))))


cdef void indexed_bias_tile(real* to, int vectors, Py_ssize_t n, const real* bias, const int64_t* rows, const int64_t* cols,
                            Py_ssize_t n_queries) noexcept nogil:
    # to[j, i] = bias[rows[i] + cols[j]]: tables over the difference of two positions of a grid. Along a row of it
    # queries are contiguous.
    cdef real lanes[VL]
    cdef Py_ssize_t i, j, first, last
    cdef bint contiguous
    cdef int g
    for g in range(vectors):
        first = g*VL
        last = min(first + VL, n_queries) - 1
        contiguous = last == first + VL - 1
        for i in range(first, last):
            contiguous &= rows[i + 1] - rows[i] == 1
        if contiguous:
            for j in range(n):
                v_store(to + j*LANES + first, v_load(bias + rows[first] + cols[j]))
        else:
            for j in range(n):
                for i in range(VL):
                    lanes[i] = bias[rows[min(first + i, last)] + cols[j]]
                v_store(to + j*LANES + first, v_load(lanes))


cdef void bias_tile(real* to, int vectors, Py_ssize_t n, const real* bias, Py_ssize_t row, Py_ssize_t col,
                    Py_ssize_t n_queries, real* lines) noexcept nogil:
    # to[j, i] = bias[i, j]; bias points at the first query and key of the tile. Lanes past the last query read its row: they
    # are never written out.
    cdef v_square t
    cdef Py_ssize_t j, i, first, whole
    cdef int g
    cdef vf b
    if row == 0:                        # one value a key, for all queries
        for j in range(n):
            b = v_set1(bias[j*col])
            for g in range(vectors):
                v_store(to + j*LANES + g*VL, b)
        return
    for g in range(vectors):
        first = g*VL
        if row == 1:                    # queries are contiguous: tables over j - i, transposed arrays
            for j in range(n):
                v_store(to + j*LANES + first, v_load_part(bias + first + j*col, n_queries - first))
            continue
        # Whole squares where they lie; what is left, a row at a time into `lines`.
        whole = n//VL*VL if col == 1 and first + VL <= n_queries else 0
        j = 0
        while j < whole:
            v_move_square(bias + first*row + j, row, to + j*LANES + first, LANES)
            j += VL
        for i in range(VL):
            j = whole
            while j < n:
                v_store(lines + i*BLOCK + j, load_row(bias + min(first + i, n_queries - 1)*row + j*col, col, n - j))
                j += VL
        j = whole
        while j < n:
            if n - j >= VL:
                v_move_square(lines + j, BLOCK, to + j*LANES + first, LANES)
            else:
                for i in range(VL):
                    t.row[i] = v_load(lines + i*BLOCK + j)
                v_transpose(&t)
                for i in range(n - j):
                    v_store(to + (j + i)*LANES + first, t.row[i])
            j += VL


cdef void bias_pass(real* S, int vectors, Py_ssize_t n, real scale, const real* bias) noexcept nogil:
    # S = scale S + bias, both tiles
    cdef Py_ssize_t j
    cdef int g
    for j in range(n):
        for g in range(vectors):
            v_store(S + j*LANES + g*VL, biased(v_load(S + j*LANES + g*VL), v_set1(scale), v_load(bias + j*LANES + g*VL)))


cdef void hide_pass(real* S, int vectors, Py_ssize_t n, const uint64_t* seen, int shift) noexcept nogil:
    # -inf where a lane does not see the key. A selection, never a sum: NaN in a masked score must vanish.
    cdef Py_ssize_t j
    cdef int g
    for j in range(n):
        for g in range(vectors):
            v_store(S + j*LANES + g*VL, v_hide(v_load(S + j*LANES + g*VL), seen[j] >> (shift + g*VL)))


cdef bint all_finite(const real* a, Py_ssize_t row, Py_ssize_t n_rows, Py_ssize_t n) noexcept nogil:
    # x · 0 is 0 for every number and NaN for infinities and NaN.
    cdef vf x = v_zero()
    cdef vf y = v_zero()
    cdef vf zero = v_zero()
    cdef Py_ssize_t j, d
    for j in range(n_rows):
        d = 0
        while d + 2*VL <= n:
            x = v_fma(v_load(a + j*row + d), zero, x)
            y = v_fma(v_load(a + j*row + d + VL), zero, y)
            d += 2*VL
        while d < n:
            x = v_fma(v_load_part(a + j*row + d, n - d), zero, x)
            d += VL
    return not v_any_nan(v_add(x, y))
