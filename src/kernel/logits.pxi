# What may happen to a tile of scores between the product and the softmax, in the order of semantics:
# softcap, bias, dense mask, intervals. Each is one pass over S[keys][LANES] for the vectors of a segment, and none of them
# runs on a tile it does not concern. Rows of bias and mask run over keys, so they come in by VL x VL transposes.

cdef void softcap_pass(real* S, int vectors, Py_ssize_t n, real scale, real cap) noexcept nogil:
    # S = cap · tanh(S · scale / cap)
    cdef Py_ssize_t j
    cdef int g
    cdef vf inner = v_set1(scale / cap)
    cdef vf outer = v_set1(cap)
    for j in range(n):
        for g in range(vectors):
            v_store(S + j*LANES + g*VL, v_mul(outer, v_tanh(v_mul(inner, v_load(S + j*LANES + g*VL)))))


cdef inline vf biased(vf s, vf scale, vf b) noexcept nogil:
    # -inf masks: selected, because a NaN score plus -inf would be NaN
    return v_where_lt(b, v_set1(-REAL_MAX), v_set1(-INFINITY), v_fma(s, scale, b))


cdef void bias_pass(real* S, int vectors, Py_ssize_t n, real scale, const real* bias, Py_ssize_t row, Py_ssize_t col,
                    Py_ssize_t n_queries) noexcept nogil:
    # S[j, i] = S[j, i] · scale + bias[i, j]; bias points at the first query and key of the tile.
    cdef v_square t
    cdef Py_ssize_t j, i, first, width
    cdef int g
    cdef real* s
    cdef vf b
    cdef vf k = v_set1(scale)
    if row == 0:                        # one value a key, for all queries
        for j in range(n):
            b = v_set1(bias[j*col])
            for g in range(vectors):
                s = S + j*LANES + g*VL
                v_store(s, biased(v_load(s), k, b))
        return
    for g in range(vectors):
        first = g*VL
        j = 0
        while j < n:
            width = min(<Py_ssize_t>VL, n - j)
            if width == VL and col == 1 and first + VL <= n_queries:
                for i in range(VL):
                    t.row[i] = v_load(bias + (first + i)*row + j)
            else:
                for i in range(VL):     # lanes past the last query read its row: they are never written out
                    t.row[i] = load_row(bias + min(first + i, n_queries - 1)*row + j*col, col, width)
            v_transpose(&t)
            for i in range(width):
                s = S + (j + i)*LANES + first
                v_store(s, biased(v_load(s), k, t.row[i]))
            j += VL


cdef void mask_pass(real* S, int vectors, Py_ssize_t n, const uint8_t* mask, Py_ssize_t row, Py_ssize_t col,
                    Py_ssize_t n_queries) noexcept nogil:
    # S[j, i] = mask[i, j] ? S[j, i] : -inf. A selection, never a sum: NaN in a masked score must vanish.
    cdef v_square t
    cdef Py_ssize_t j, i, first, width
    cdef int g
    cdef real* s
    cdef vf hidden = v_set1(-INFINITY)
    for g in range(vectors):
        first = g*VL
        j = 0
        while j < n:
            width = min(<Py_ssize_t>VL, n - j)
            for i in range(VL):
                t.row[i] = v_load_bytes(mask + min(first + i, n_queries - 1)*row + j*col, col, width)
            v_transpose(&t)
            for i in range(width):
                s = S + (j + i)*LANES + first
                v_store(s, v_where_lt(v_zero(), t.row[i], v_load(s), hidden))
            j += VL


cdef int mask_summary(const uint8_t* mask, Py_ssize_t row, Py_ssize_t col, Py_ssize_t n_queries,
                      Py_ssize_t n) noexcept nogil:
    # 0: nothing of the tile is visible, 2: all of it, 1: a part.
    cdef Py_ssize_t i, j
    cdef uint8_t any = 0, none = 0
    for i in range(1 if row == 0 else n_queries):
        if col == 1:
            for j in range(n):
                any |= mask[i*row + j] != 0
                none |= mask[i*row + j] == 0
        else:
            for j in range(n):
                any |= mask[i*row + j*col] != 0
                none |= mask[i*row + j*col] == 0
        if any and none:
            return 1
    return 2 if any else 0


cdef void interval_pass(real* S, int vectors, Py_ssize_t first, Py_ssize_t n, const real* lo, const real* hi) noexcept nogil:
    # Row j of the block is visible to the lanes with lo <= j < hi; S holds rows [first, first + n).
    cdef Py_ssize_t j
    cdef int g
    cdef vf at, low, high
    cdef vf hidden = v_set1(-INFINITY)
    for g in range(vectors):
        low = v_load(lo + g*VL)
        high = v_load(hi + g*VL)
        for j in range(n):
            at = v_set1(<real>(first + j))
            v_store(S + j*LANES + g*VL, v_where_lt(at, low, hidden, v_where_lt(at, high, v_load(S + j*LANES + g*VL), hidden)))


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
