# Rows of mean 0 and variance 1 (LayerNorm; Ba, Kiros and Hinton 2016), or of mean square 1 (RMSNorm; Zhang and Sennrich 2019):
#
#     s = x + add;   RMSNorm:    out = s / sqrt(mean s² + eps) w + b
#                    LayerNorm:  out = (d - mean d) / sqrt(mean d² - (mean d)² + eps) w + b,   d = s - (mean s as rounded)
#
# mean d is what rounding left of the mean: else a mean that is large beside the deviation costs the digits by which it is so.
# VL rows at a time are in scratch, as reals: their sums become one vector, and what follows from them is computed in lanes.
#
#     x, add: NORM_ROWS │ N │  ──▶  s: VL │ N' │  ──▶  d in its place  ──▶  out

cdef enum:
    SUMMED = 32             # vectors that are summed from zero: a chain over a long row would have its error grow with N


cdef struct Sums:           # of a row and of its squares, lane by lane
    vf total, total_2


cdef inline bint is_plain(const fastattn_array* a) noexcept nogil:
    return a.data == NULL or (a.kind == FASTATTN_REAL and a.col == 1)


cdef inline Sums sum_inputs(const fastattn_norm* p, const bint plain, const bint added, const bint kept, int64_t row,
                            real* s) noexcept nogil:
    # s = x + add, its sum and that of its squares; where it is kept it is also written to `sum`. plain: all are rows of reals.
    # Sums are locals: through a pointer each addition would wait for the store of the one before.
    cdef Sums t
    cdef vf total = v_zero()
    cdef vf total_2 = v_zero()
    cdef vf part, part_2, x
    cdef Py_ssize_t d = 0
    cdef Py_ssize_t end
    while d < p.N:
        end = min(p.N, d + SUMMED*VL)
        part = part_2 = v_zero()
        while d < end:
            if plain and p.N - d >= VL:
                x = v_load(<const real*>p.x.data + row*p.x.row + d)
                if added:
                    x = v_add(x, v_load(<const real*>p.add.data + row*p.add.row + d))
                if kept:
                    v_store(<real*>p.sum.data + row*p.sum.row + d, x)
            else:
                x = load_row(p.x.data, row*p.x.row + d*p.x.col, p.x.col, p.N - d, p.x.kind)
                if added:
                    x = v_add(x, load_row(p.add.data, row*p.add.row + d*p.add.col, p.add.col, p.N - d, p.add.kind))
                if kept:
                    v_store_as(<void*>p.sum.data, row*p.sum.row + d*p.sum.col, p.sum.col, x, p.N - d, p.sum.kind)
            x = v_rounded(x)            # else its square may be computed where x is, and be rounded in one copy of the loop
            v_store(s + d, x)
            part = v_add(part, x)
            part_2 = v_fma(x, x, part_2)
            d += VL
        total = v_add(total, part)
        total_2 = v_add(total_2, part_2)
    t.total = total
    t.total_2 = total_2
    return t


cdef Sums sum_norm_row(const fastattn_norm* p, int64_t row, real* s) noexcept nogil:
    cdef bint plain = is_plain(&p.x) and is_plain(&p.add) and is_plain(&p.sum)
    if not plain:
        return sum_inputs(p, False, p.add.data != NULL, p.sum.data != NULL, row, s)
    if p.add.data == NULL:
        return sum_inputs(p, True, False, False, row, s)
    if p.sum.data == NULL:
        return sum_inputs(p, True, True, False, row, s)
    return sum_inputs(p, True, True, True, row, s)


cdef Sums sum_deviations(Py_ssize_t N, real mean, real* s) noexcept nogil:
    # s - mean in the place of s, its sum and that of its squares
    cdef Sums t
    cdef vf m = v_set1(mean)
    cdef vf total = v_zero()
    cdef vf total_2 = v_zero()
    cdef vf part, part_2, x
    cdef Py_ssize_t d = 0
    cdef Py_ssize_t end
    while d < N:
        end = min(N, d + SUMMED*VL)
        part = part_2 = v_zero()
        while d < end:
            x = v_sub(v_load(s + d), m)
            v_store(s + d, x)
            if N - d < VL:
                x = v_load_part(s + d, N - d)
            part = v_add(part, x)
            part_2 = v_fma(x, x, part_2)
            d += VL
        total = v_add(total, part)
        total_2 = v_add(total_2, part_2)
    t.total = total
    t.total_2 = total_2
    return t


cdef void store_normalised(const fastattn_norm* p, int64_t row, const real* s, real centre, real factor) noexcept nogil:
    cdef const real* w = <const real*>p.weight
    cdef const real* b = <const real*>p.bias
    cdef real* out = <real*>p.out.data + row*p.out.row
    cdef vf x
    cdef Py_ssize_t d = 0
    if p.out.kind == FASTATTN_REAL and p.out.col == 1 and w != NULL and b != NULL:
        while d + VL <= p.N:
            x = v_mul(v_sub(v_load(s + d), v_set1(centre)), v_set1(factor))
            v_store(out + d, v_fma(x, v_load(w + d), v_load(b + d)))
            d += VL
    while d < p.N:
        x = v_mul(v_sub(v_load(s + d), v_set1(centre)), v_set1(factor))
        if w != NULL and b != NULL:
            x = v_fma(x, v_load_part(w + d, p.N - d), v_load_part(b + d, p.N - d))
        elif w != NULL:
            x = v_mul(x, v_load_part(w + d, p.N - d))
        elif b != NULL:
            x = v_add(x, v_load_part(b + d, p.N - d))
        v_store_as(<void*>p.out.data, row*p.out.row + d*p.out.col, p.out.col, x, p.N - d, p.out.kind)
        d += VL


cdef size_t norm_scratch(const fastattn_norm* p) noexcept nogil:
    return VL*whole(p.N)*sizeof(real)


cdef void norm_rows(const fastattn_norm* p, int64_t row, int n, real* s) noexcept nogil:
    cdef Py_ssize_t ld = whole(p.N)
    cdef vf sums[VL]
    cdef vf squares[VL]
    cdef real mean[VL]
    cdef real square[VL]
    cdef Sums t
    cdef int i
    for i in range(VL):
        sums[i] = squares[i] = v_zero()
    for i in range(n):
        t = sum_norm_row(p, row + i, s + i*ld)
        sums[i] = t.total
        squares[i] = t.total_2
    if p.centre:
        v_store(mean, v_div(v_sums(sums), v_set1(<real>p.N)))
        for i in range(n):
            t = sum_deviations(p.N, mean[i], s + i*ld)
            sums[i] = t.total
            squares[i] = t.total_2
    v_store(mean, v_div(v_sums(sums), v_set1(<real>p.N)))
    v_store(square, v_div(v_sums(squares), v_set1(<real>p.N)))
    for i in range(n):
        if p.centre:
            square[i] = <real>(<double>square[i] - <double>mean[i]*mean[i])
            if square[i] < 0:           # by rounding; a NaN stays
                square[i] = 0
        else:
            mean[i] = 0
        store_normalised(p, row + i, s + i*ld, mean[i], <real>(1/sqrt(square[i] + p.eps)))


cdef void run_norm(const fastattn_norm* p, int64_t task, void* memory) noexcept nogil:
    cdef int64_t row = task*FASTATTN_NORM_ROWS
    cdef int64_t end = min(p.M, row + FASTATTN_NORM_ROWS)
    while row < end:
        norm_rows(p, row, <int>min(end - row, <int64_t>VL), <real*>memory)
        row += VL
