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


cdef void softcap_slope(const real* S, real* slope, int vectors, Py_ssize_t n, real cap) noexcept nogil:
    # of capped scores y: 1 - (y / cap)^2 = (1 - y / cap) (1 + y / cap)
    cdef vf inner = v_set1(1/cap)
    cdef vf one = v_set1(1)
    cdef vf x
    cdef Py_ssize_t j
    cdef int g
    for j in range(n):
        for g in range(vectors):
            x = v_mul(v_load(S + j*LANES + g*VL), inner)
            v_store(slope + j*LANES + g*VL, v_mul(v_sub(one, x), v_add(one, x)))


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


cdef void row_of_bias(const Task* t, const char* bias, Py_ssize_t i, bint even, Py_ssize_t row, Py_ssize_t begin, Py_ssize_t n,
                      real* line) noexcept nogil:
    # line[j] = element j of row i: begin <= j < n
    cdef const fastattn_array* a = &t.p.bias
    cdef Py_ssize_t j = begin
    cdef int64_t at
    if even:
        at = i*row
    else:
        at = lane_at(t, a, i)
    while j < n:
        v_store(line + j, load_row(bias, at + j*a.col, a.col, n - j, a.kind))
        j += VL


cdef void bias_tile(Task* t, real* to, Py_ssize_t lane, int vectors, int64_t key, Py_ssize_t n) noexcept nogil:
    # to[j, i] = bias of lane + i and key + j. Lanes past the last query read its row: they are never written out.
    cdef const fastattn_array* a = &t.p.bias
    cdef const char* bias = t.bias + key*a.col*v_size(a.kind)
    cdef Py_ssize_t n_queries = t.n_queries - lane
    cdef v_square square
    cdef Py_ssize_t j, i, first, whole, row
    cdef bint even = even_lanes(t, a, &row)
    cdef int g
    cdef vf b
    if even and row == 0:               # one value a key, for all queries
        for j in range(n):
            b = v_set1(real_at(bias, j*a.col, a.kind))
            for g in range(vectors):
                v_store(to + j*LANES + g*VL, b)
        return
    if even:
        bias += lane_at(t, a, lane)*v_size(a.kind)
    for g in range(vectors):
        first = g*VL
        if even and row == 1:           # queries are contiguous: tables over j - i, transposed arrays
            for j in range(n):
                v_store(to + j*LANES + first, v_load_part_as(bias, first + j*a.col, n_queries - first, a.kind))
            continue
        # Whole squares where they lie; what is left, a row at a time into `lines`.
        whole = 0
        if even and a.kind == FASTATTN_REAL and a.col == 1 and first + VL <= n_queries:
            whole = n//VL*VL
        j = 0
        while j < whole:
            v_move_square(<const real*>bias + first*row + j, row, to + j*LANES + first, LANES)
            j += VL
        for i in range(VL):
            row_of_bias(t, bias, min(first + i, n_queries - 1) + (0 if even else lane), even, row, whole, n,
                        t.lines + i*BLOCK)
        j = whole
        while j < n:
            if n - j >= VL:
                v_move_square(t.lines + j, BLOCK, to + j*LANES + first, LANES)
            else:
                for i in range(VL):
                    square.row[i] = v_load(t.lines + i*BLOCK + j)
                v_transpose(&square)
                for i in range(n - j):
                    v_store(to + (j + i)*LANES + first, square.row[i])
            j += VL


cdef void bias_pass(real* S, int vectors, Py_ssize_t n, real scale, const real* bias) noexcept nogil:
    # S = scale S + bias, both tiles
    cdef Py_ssize_t j
    cdef int g
    for j in range(n):
        for g in range(vectors):
            v_store(S + j*LANES + g*VL, biased(v_load(S + j*LANES + g*VL), v_set1(scale), v_load(bias + j*LANES + g*VL)))


cdef void scale_pass(real* S, const real* factor, int vectors, Py_ssize_t n) noexcept nogil:
    # S = S factor, both tiles
    cdef Py_ssize_t j
    cdef int g
    for j in range(n):
        for g in range(vectors):
            v_store(S + j*LANES + g*VL, v_mul(v_load(S + j*LANES + g*VL), v_load(factor + j*LANES + g*VL)))


cdef void multiply_pass(real* S, int vectors, Py_ssize_t n, real factor) noexcept nogil:
    cdef Py_ssize_t j
    cdef int g
    for j in range(n):
        for g in range(vectors):
            v_store(S + j*LANES + g*VL, v_mul(v_load(S + j*LANES + g*VL), v_set1(factor)))


cdef void copy_pass(const real* S, real* to, int vectors, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t j
    cdef int g
    for j in range(n):
        for g in range(vectors):
            v_store(to + j*LANES + g*VL, v_load(S + j*LANES + g*VL))


cdef void keep_pass(real* S, int vectors, Py_ssize_t n, const uint64_t* seen, int shift) noexcept nogil:
    # 0 where a lane does not see the key
    cdef Py_ssize_t j
    cdef int g
    for j in range(n):
        for g in range(vectors):
            v_store(S + j*LANES + g*VL, v_keep(v_load(S + j*LANES + g*VL), seen[j] >> (shift + g*VL)))


cdef void hide_pass(real* S, int vectors, Py_ssize_t n, const uint64_t* seen, int shift) noexcept nogil:
    # -inf where a lane does not see the key. A selection, never a sum: NaN in a masked score must vanish.
    cdef Py_ssize_t j
    cdef int g
    for j in range(n):
        for g in range(vectors):
            v_store(S + j*LANES + g*VL, v_hide(v_load(S + j*LANES + g*VL), seen[j] >> (shift + g*VL)))


cdef bint finite_words(const real* a, Py_ssize_t n) noexcept nogil:
    # of both halves of words: read as a float32, a word is as finite as its upper half
    cdef vf x = v_zero()
    cdef vf y
    cdef Py_ssize_t i = 0
    while i < n:
        y = v_load_part(a + i, n - i)
        x = v_fma(y, v_zero(), v_fma(v_low(y), v_zero(), x))
        i += VL
    return not v_any_nan(x)


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
