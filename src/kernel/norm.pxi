# Rows of mean 0 and variance 1 (LayerNorm; Ba, Kiros and Hinton 2016), or of mean square 1 (RMSNorm; Zhang and Sennrich 2019):
#
#     s = x + add;   RMSNorm:    out = s / sqrt(mean s² + eps) w + b
#                    LayerNorm:  out = (d - mean d) / sqrt(mean d² - (mean d)² + eps) w + b,   d = s - (mean s as rounded)
#
# mean d is what rounding left of the mean: else a mean that is large beside the deviation costs the digits by which it is so.
# VL rows at a time: their sums become one vector, and what follows from them is computed in lanes. Rows of reals are read where
# they are, a sum that is kept where it was written; what must be converted is in scratch.
#
#     x, add: NORM_ROWS │ N │  ──▶  s: VL │ N │  ──▶  mean  ──▶  sums of d and d²  ──▶  out

cdef enum:
    SUMMED = 32             # vectors that are summed from zero: a chain over a long row would have its error grow with N


cdef struct Sums:           # of a row and of its squares, lane by lane
    vf total, total_2


cdef inline bint is_plain(const fastattn_array* a) noexcept nogil:
    return a.data == NULL or (a.kind == FASTATTN_REAL and a.col == 1)


cdef const real* norm_inputs(const fastattn_norm* p, int64_t row, real* scratch) noexcept nogil:
    # s = x + add as reals, where it is or was written
    cdef bint plain = is_plain(&p.x) and is_plain(&p.add) and is_plain(&p.sum)
    cdef const real* x = <const real*>p.x.data + row*p.x.row
    cdef const real* y = <const real*>p.add.data + row*p.add.row if p.add.data != NULL else NULL
    cdef real* to = <real*>p.sum.data + row*p.sum.row if plain and p.sum.data != NULL else scratch
    cdef vf s
    cdef Py_ssize_t d = 0
    if plain and y == NULL:
        return x
    while plain and d + VL <= p.N:
        v_store(to + d, v_add(v_load(x + d), v_load(y + d)))
        d += VL
    while d < p.N:
        s = load_row(p.x.data, row*p.x.row + d*p.x.col, p.x.col, p.N - d, p.x.kind)
        if y != NULL:
            s = v_add(s, load_row(p.add.data, row*p.add.row + d*p.add.col, p.add.col, p.N - d, p.add.kind))
        v_store_as(to, d, 1, s, p.N - d, FASTATTN_REAL)
        if p.sum.data != NULL and not plain:
            v_store_as(<void*>p.sum.data, row*p.sum.row + d*p.sum.col, p.sum.col, s, p.N - d, p.sum.kind)
        d += VL
    return to


cdef inline void fetch_row(const fastattn_norm* p, const fastattn_array* a, int64_t row) noexcept nogil:
    # While rows are stored, so that memory has no pause: a tenth of the time where rows come from there.
    cdef Py_ssize_t size = v_size(a.kind)
    if a.data != NULL and a.col == 1 and row < p.M:
        v_fetch_later(<const char*>a.data + row*a.row*size, p.N*size)


cdef inline vf deviation(const real* s, vf mean, const bint centred) noexcept nogil:
    return v_sub(v_load(s), mean) if centred else v_load(s)


cdef inline Sums sum_norm_row(const real* s, Py_ssize_t N, real mean, const bint centred, const bint squares) noexcept nogil:
    # The sums of d = s - mean and of d²; where nothing is subtracted one of them. Two chains: an addition takes a few cycles.
    cdef Sums t
    cdef real m[VL]
    cdef vf mean_v = v_set1(mean)
    cdef vf total = v_zero()
    cdef vf total_2 = v_zero()
    cdef vf a, b, aa, bb, x, y
    cdef Py_ssize_t d = 0
    cdef Py_ssize_t end
    while d < N:
        end = min(N, d + SUMMED*VL)
        a = b = aa = bb = v_zero()
        while d + 2*VL <= end:
            x = deviation(s + d, mean_v, centred)
            y = deviation(s + d + VL, mean_v, centred)
            if centred or not squares:
                a = v_add(a, x)
                b = v_add(b, y)
            if centred or squares:
                aa = v_fma(x, x, aa)
                bb = v_fma(y, y, bb)
            d += 2*VL
        while d < end:
            x = v_load_part(s + d, end - d)
            if centred:
                v_store(m, mean_v)
                x = v_sub(x, v_load_part(m, end - d))
            a = v_add(a, x)
            aa = v_fma(x, x, aa)
            d += VL
        total = v_add(total, v_add(a, b))
        total_2 = v_add(total_2, v_add(aa, bb))
    t.total = total
    t.total_2 = total_2
    return t


cdef inline vf normalised(const fastattn_norm* p, const real* s, Py_ssize_t d, Py_ssize_t n, vf mean, vf centre,
                          vf factor) noexcept nogil:
    # of at most VL elements from d on
    cdef vf x = v_mul(v_sub(v_sub(v_load_part(s + d, n), mean), centre), factor)
    # One sum for all: of several, a product may be shared and then be rounded in one of them. x 1 - 0 is x, also where x is -0.
    return v_fma(x, v_load_part(<const real*>p.weight + d, n) if p.weight != NULL else v_set1(1),
                 v_load_part(<const real*>p.bias + d, n) if p.bias != NULL else v_set1(<real>-0.0))


cdef void store_normalised(const fastattn_norm* p, int64_t row, const real* s, vf mean, vf centre, vf factor) noexcept nogil:
    cdef real* out = <real*>p.out.data + row*p.out.row
    cdef Py_ssize_t d = 0
    if p.out.kind == FASTATTN_REAL and p.out.col == 1:
        while d + VL <= p.N:
            v_store(out + d, normalised(p, s, d, VL, mean, centre, factor))
            d += VL
    while d < p.N:
        v_store_as(<void*>p.out.data, row*p.out.row + d*p.out.col, p.out.col,
                   normalised(p, s, d, p.N - d, mean, centre, factor), p.N - d, p.out.kind)
        d += VL


cdef size_t norm_scratch(const fastattn_norm* p) noexcept nogil:
    return VL*whole(p.N)*sizeof(real)


cdef void norm_rows(const fastattn_norm* p, int64_t row, int n, real* scratch) noexcept nogil:
    cdef const real* s[VL]
    cdef vf sums[VL]
    cdef vf squares[VL]
    cdef real mean[VL]
    cdef real centre[VL]
    cdef real square[VL]
    cdef Sums t
    cdef int i
    for i in range(VL):
        sums[i] = squares[i] = v_zero()
        mean[i] = centre[i] = 0
    for i in range(n):
        s[i] = norm_inputs(p, row + i, scratch + i*whole(p.N))
        if p.centre:
            sums[i] = sum_norm_row(s[i], p.N, 0, False, False).total
        else:
            squares[i] = sum_norm_row(s[i], p.N, 0, False, True).total_2
    if p.centre:
        v_store(mean, v_div(v_sums(sums), v_set1(<real>p.N)))
        for i in range(n):
            t = sum_norm_row(s[i], p.N, mean[i], True, True)
            sums[i] = t.total
            squares[i] = t.total_2
        v_store(centre, v_div(v_sums(sums), v_set1(<real>p.N)))
    v_store(square, v_div(v_sums(squares), v_set1(<real>p.N)))
    for i in range(n):
        if p.centre:
            square[i] = <real>(<double>square[i] - <double>centre[i]*centre[i])
            if square[i] < 0:           # by rounding; a NaN stays
                square[i] = 0
        fetch_row(p, &p.x, row + i + VL)
        fetch_row(p, &p.add, row + i + VL)
        store_normalised(p, row + i, s[i], v_set1(mean[i]), v_set1(centre[i]), v_set1(<real>(1/sqrt(square[i] + p.eps))))


cdef void run_norm(const fastattn_norm* p, int64_t task, void* memory) noexcept nogil:
    cdef int64_t row = task*FASTATTN_NORM_ROWS
    cdef int64_t end = min(p.M, row + FASTATTN_NORM_ROWS)
    while row < end:
        norm_rows(p, row, <int>min(end - row, <int64_t>VL), <real*>memory)
        row += VL
