# The vocabulary of simd.h for Cython. `vf` is declared as a scalar so that arrays of it can be written; every use goes
# through the functions below.

from libc.stdint cimport INT64_MAX, int8_t, int32_t, int64_t, uint8_t, uint16_t, uint64_t

cdef extern from "<math.h>" nogil:
    double exp(double)
    double log(double)
    double sqrt(double)
    const double INFINITY
    const double NAN

cdef extern from "simd.h" nogil:
    ctypedef float real
    ctypedef float vf
    ctypedef struct v_square:
        vf row[2]               # VL of them
    enum:
        VL
        LANES
        BLOCK_VECTORS
        WORD
        SUMS
        DEPTH_WHOLE
        DEPTH
        FEW_UNROLLED
        GROUP
        ROWS_1
        ROWS_2
        ROWS_3
        ROWS_4
    const real REAL_MAX, REAL_HALF
    int bits_count(uint64_t)
    int bits_first(uint64_t)
    void v_fetch_soon(const char*, Py_ssize_t)
    void v_fetch_line(const char*)
    void v_fetch_later(const char*, Py_ssize_t)
    const real* v_anchor(const real*)
    vf v_load(const real*)
    void v_store(real*, vf)
    vf v_set1(real)
    vf v_zero()
    vf v_add(vf, vf)
    vf v_sub(vf, vf)
    vf v_mul(vf, vf)
    vf v_fma(vf, vf, vf)
    vf v_rounded(vf)
    vf v_repeat(const float*, Py_ssize_t, int)
    vf v_div(vf, vf)
    vf v_round(vf)
    vf v_rotate(vf, int)
    void v_store_codes(int8_t*, vf, Py_ssize_t)
    const float SMALLEST_SCALE
    const float LARGEST_SCALE
    vf v_dot(vf, vf, vf)
    vf v_word(const real*)
    vf v_low(vf)
    vf v_pair(vf, vf)
    void v_zip_words(const uint16_t*, const uint16_t*, real*)
    vf v_max(vf, vf)
    vf v_min(vf, vf)
    vf v_where_lt(vf, vf, vf, vf)
    vf v_keep(vf, uint64_t)
    vf v_hide(vf, uint64_t)
    vf v_select(uint64_t, vf, vf)
    bint v_any_nan(vf)
    bint v_any_above(vf, real)
    uint64_t v_above_bits(vf, vf)
    vf v_load_part(const real*, Py_ssize_t)
    void v_store_part(real*, vf, Py_ssize_t)
    Py_ssize_t v_size(int)
    vf v_load_as(const void*, Py_ssize_t, int)
    vf v_load_part_as(const void*, Py_ssize_t, Py_ssize_t, int)
    vf v_gather_as(const void*, Py_ssize_t, Py_ssize_t, Py_ssize_t, int)
    void v_store_as(void*, Py_ssize_t, Py_ssize_t, vf, Py_ssize_t, int)
    vf v_sums(vf*)
    void v_transpose(v_square*)
    void v_move_square(const real*, Py_ssize_t, real*, Py_ssize_t)
    void v_move_square_scaled(const real*, Py_ssize_t, real*, Py_ssize_t, vf)
    vf v_exp2(vf)
    vf v_tanh(vf)
    void v_gelu(vf*, int)
