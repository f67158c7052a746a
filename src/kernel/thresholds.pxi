# The threshold of a row for sparsemax (Martins and Astudillo 2016) and entmax with α = 1.5 (Peters, Niculae and Martins 2019):
#
#     y_j = (s_j - m) κ,  m = max s      κ = scale, or scale / 2 where squared
#     t in [-1, 0):  sum_j max(y_j - t, 0) = 1, or of the squares; those terms are the weights
#
# The sum, or where squared its root, which is the norm of the terms, falls with t and is convex. So Newton's steps from -1,
# where it is at least 1, only ever rise to the solution; one step would do if all scores were equal (of the sum of squares
# many: each halves the distance). Relative to the maximum, because m + t would lose t where scores are large.

cdef inline real sum_lanes(vf x) noexcept nogil:
    cdef real lanes[VL]
    cdef Py_ssize_t i
    cdef int half = VL//2
    v_store(lanes, x)
    while half > 0:
        for i in range(half):
            lanes[i] += lanes[i + half]
        half //= 2
    return lanes[0]


cdef inline double newton_step(double t, double total, double slope, bint squared) noexcept nogil:
    # total: the sum of the terms, or of their squares; slope: their number, or their sum. t where it can't rise.
    cdef double root = sqrt(total)
    cdef double next = t + ((root - 1)*root if squared else total - 1)/slope
    return next if next > t else t


cdef double threshold_of(const real* S, Py_ssize_t n, real m, real kappa, bint squared, double t) noexcept nogil:
    # t for n scores, from a t that is not above it (-1 always is one). Sums of 8 vectors join in double.
    cdef vf base = v_set1(m)
    cdef vf k = v_set1(kappa)
    cdef vf one = v_set1(1)
    cdef vf x, level, total, slope
    cdef double all_total, all_slope, next
    cdef Py_ssize_t i, stop
    while True:
        level = v_set1(<real>t)
        all_total = all_slope = 0
        i = 0
        while i < n:
            total = slope = v_zero()
            stop = min(n, i + 8*VL)
            while i < stop:
                x = v_sub(v_mul(v_sub(v_load_part(S + i, n - i), base), k), level)
                if n - i < VL:
                    x = v_keep(x, (<uint64_t>1 << (n - i)) - 1)
                x = v_max(x, v_zero())
                if squared:
                    slope = v_add(slope, x)
                    total = v_fma(x, x, total)
                else:
                    slope = v_add(slope, v_where_lt(v_zero(), x, one, v_zero()))
                    total = v_add(total, x)
                i += VL
            all_total += sum_lanes(total)
            all_slope += sum_lanes(slope)
        next = newton_step(t, all_total, all_slope, squared)
        if <real>next <= <real>t:
            return next
        t = next
