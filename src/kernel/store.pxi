# New tokens into the pages of a cache: rows of keys, turned by their positions, and of values, as the cache stores them.
#
#     row [D] of any layout  ──widen──▶  [D] reals  ──turn──▶  [D]  ──round, or scale and round──▶  row of a page
#
#     a' = a cos - b sin    b' = b cos + a sin            for the pairs (a, b) of the first 2 n features
#     code = rint(x / scale),  scale = max|x| / 127       int8, for each row

cdef void turn(real* x, Py_ssize_t n, const float* cos, const float* sin, bint interleaved) noexcept nogil:
    # Each product is rounded, as in positions.apply_rotary: the same bits.
    cdef Py_ssize_t step = 2 if interleaved else 1
    cdef real* y = x + (1 if interleaved else n)
    cdef Py_ssize_t i = 0
    cdef vf a, b, c, s
    while i < n:
        a = load_row(x, i*step, step, n - i, FASTATTN_REAL)
        b = load_row(y, i*step, step, n - i, FASTATTN_REAL)
        c = v_load_part(<const real*>cos + i, n - i)
        s = v_load_part(<const real*>sin + i, n - i)
        v_store_as(x, i*step, step, v_sub(v_rounded(v_mul(a, c)), v_rounded(v_mul(b, s))), n - i, FASTATTN_REAL)
        v_store_as(y, i*step, step, v_add(v_rounded(v_mul(b, c)), v_rounded(v_mul(a, s))), n - i, FASTATTN_REAL)
        i += VL


cdef float store_codes(const real* x, Py_ssize_t n, int8_t* codes) noexcept nogil:
    # Returns the scale: NaN for a row with NaN or Inf, whose codes are 0; normal, so that no code is past 127 by the rounding
    # of a denormal, and small enough for 127 of it to be finite.
    cdef real largest = 0
    cdef real scale
    cdef bint finite
    cdef vf top = v_zero()
    cdef vf bad = v_zero()
    cdef vf s
    cdef real lanes[VL]
    cdef Py_ssize_t i = 0
    cdef Py_ssize_t j
    while i < n:
        s = v_load_part(x + i, n - i)
        top = v_max(v_max(s, v_sub(v_zero(), s)), top)
        bad = v_fma(s, v_zero(), bad)
        i += VL
    v_store(lanes, top)
    for j in range(VL):
        largest = max(largest, lanes[j])
    finite = not v_any_nan(bad)
    scale = min(max(largest/<real>127, <real>SMALLEST_SCALE), <real>LARGEST_SCALE)
    i = 0
    while i < n:
        s = v_round(v_div(v_load_part(x + i, n - i), v_set1(scale))) if finite else v_zero()
        v_store_codes(codes + i, s, n - i)
        i += VL
    return scale if finite else <real>NAN


cdef void store(const fastattn_tokens* t, void* memory) noexcept nogil:
    # memory: whole vectors for the longer of D and Dv
    cdef real* x = <real*>memory
    cdef int64_t token = 0
    cdef int64_t b, h, i, d, page, place
    cdef const fastattn_array* from_
    cdef const fastattn_array* pool
    cdef const fastattn_array* scales
    cdef const char* row
    cdef char* to
    cdef int64_t n
    cdef int side
    for b in range(t.B):
        for i in range(t.counts[b] if t.counts != NULL else t.L):
            page = t.slots[token] // t.page
            place = t.slots[token] % t.page
            token += 1
            for h in range(t.H):
                for side in range(2):
                    from_ = &t.key if side == 0 else &t.value
                    pool = &t.key_pool if side == 0 else &t.value_pool
                    scales = &t.key_scale if side == 0 else &t.value_scale
                    n = t.D if side == 0 else t.Dv
                    row = <const char*>from_.data + (b*from_.lead[0] + h*from_.head + i*from_.row)*v_size(from_.kind)
                    to = <char*>pool.data + (page*pool.lead[0] + h*pool.head + place*pool.row)*v_size(pool.kind)
                    if from_.kind == pool.kind and from_.col == 1 and (side == 1 or t.pairs == 0):
                        memcpy(to, row, n*v_size(pool.kind))
                        continue
                    d = 0
                    while d < n:
                        v_store(x + d, load_row(row, d*from_.col, from_.col, n - d, from_.kind))
                        d += VL
                    if side == 0 and t.pairs > 0:
                        d = (t.first[b] + i)*t.pairs
                        turn(x, t.pairs, t.cos + d, t.sin + d, t.interleaved != 0)
                    if pool.kind == FASTATTN_I8:
                        d = page*scales.lead[0] + h*scales.head + place*scales.row
                        (<float*>scales.data)[d] = store_codes(x, n, <int8_t*>to)
                        continue
                    d = 0
                    while d < n:
                        v_store_as(to, d, 1, v_load(x + d), n - d, pool.kind)
                        d += VL
