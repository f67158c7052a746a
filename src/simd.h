/* The vector vocabulary: one set of operations, whatever the instruction set and the precision.
 *
 * A build of the kernel chooses with two macros, and this file is the only place that looks at them:
 *     FASTATTN_BITS   32 or 64, the precision of `real`
 *     FASTATTN_VECTOR 64, 32 or 16, bytes of a vector; meson.build passes it beside the flags of the instruction set
 * and a third where the instruction set has it:
 *     FASTATTN_PAIRS  products take pairs of bfloat16: a word of 32 bits is two of them wherever a product reads
 * `vf` is a vector of VL reals. Everything is written with the vector extensions of GCC and Clang; intrinsics appear
 * where the generic form compiles to something slower (each is marked with the reason).
 *
 * Built with -ffp-contract=fast (a*b+c is one rounding where the machine has FMA) and never with -ffast-math:
 * infinities and NaN carry meaning here.
 */
#ifndef FASTATTN_SIMD_H
#define FASTATTN_SIMD_H

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define V_INLINE static inline __attribute__((always_inline))

#ifndef FASTATTN_VECTOR
#define FASTATTN_VECTOR 16
#endif
#if FASTATTN_VECTOR == 64 && !(defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__))
#error "64-byte vectors need AVX-512 F, DQ, BW and VL: meson.build passed the wrong flags"
#endif
#if FASTATTN_VECTOR == 32 && !(defined(__AVX2__) && defined(__FMA__))
#error "32-byte vectors need AVX2 and FMA: meson.build passed the wrong flags"
#endif
#if FASTATTN_VECTOR == 32 && !defined(__F16C__)
#error "32-byte vectors need F16C: meson.build passed the wrong flags"
#endif
#ifdef FASTATTN_PAIRS
#if FASTATTN_VECTOR != 64 || FASTATTN_BITS != 32 || !defined(__AVX512BF16__)
#error "pairs of bfloat16 need AVX-512 BF16: meson.build passed the wrong flags"
#endif
#endif
#if FASTATTN_VECTOR >= 32
#include <immintrin.h>
#endif

#include "fastattn.h"

#if FASTATTN_BITS == 32
typedef float real;
typedef int32_t real_int;
#define REAL_MAX FLT_MAX
#define REAL_HALF 0x1p64f     /* about its square root */
#define V_MANTISSA 23
#define V_EXP_BIAS 127
#define V_EXP2_FLOOR -151.0f        /* 2^-151 rounds to zero, 2^-150 is the tie that does */
#define V_EXP2_CEILING 63.0f
#define V_EXP2_LIFT 64              /* lifts every n in [-151, 63] into the normal exponents */
#define V_MAGIC 12582912.0f         /* 1.5 * 2^23: adding it rounds to an integer held in the low bits */
#elif FASTATTN_BITS == 64
typedef double real;
typedef int64_t real_int;
#define REAL_MAX DBL_MAX
#define REAL_HALF 0x1p512
#define V_MANTISSA 52
#define V_EXP_BIAS 1023
#define V_EXP2_FLOOR -1076.0
#define V_EXP2_CEILING 63.0
#define V_EXP2_LIFT 512
#define V_MAGIC 6755399441055744.0  /* 1.5 * 2^52 */
#else
#error "FASTATTN_BITS must be 32 or 64"
#endif

/* Scales of int8 are normal, and 127 of them are finite. */
#define SMALLEST_SCALE 0x1p-126f
#define LARGEST_SCALE (0x1.fffffep127f / 127 * 0x1.fffffep-1f)

typedef real vf __attribute__((vector_size(FASTATTN_VECTOR), may_alias));
typedef real_int vi __attribute__((vector_size(FASTATTN_VECTOR), may_alias));
typedef struct { vf row[FASTATTN_VECTOR / sizeof(real)]; } v_square;  /* VL x VL values */

/* Sizes that follow from the registers. A product tile holds rows x vectors accumulators; 24 of 32 registers (12 of 16)
 * leave room for the vectors of B and a broadcast, and are more than latency x ports (4 x 2) needs. */
enum {
    VL = FASTATTN_VECTOR / sizeof(real),
    LANES = FASTATTN_BITS == 32 ? 64 : 32,      /* queries of a block: one tile row is 256 bytes in either precision */
    BLOCK_VECTORS = LANES / VL,
    /* elements in a word of the products' operands */
#ifdef FASTATTN_PAIRS
    WORD = 2,
#else
    WORD = 1,
#endif
    /* Few rows: sums over lanes are taken of this many vectors at once, all accumulators in registers. */
    SUMS = FASTATTN_VECTOR == 64 && FASTATTN_BITS == 32 ? 16 : 8,
    /* A sum over the head size goes in one chain up to DEPTH_WHOLE, in chains of DEPTH past it. Where product and sum are
     * rounded apart, shorter chains make up for it. */
#if FASTATTN_VECTOR >= 32 || defined(__FMA__) || defined(__aarch64__)
    DEPTH_WHOLE = 128, DEPTH = 64,
    FEW_UNROLLED = 12,                              /* rows that go their own way where vectors are short; see few_rows */
#else
    DEPTH_WHOLE = 16, DEPTH = 16,
    FEW_UNROLLED = 32,
#endif
#if FASTATTN_VECTOR == 64 || defined(__aarch64__)
    GROUP = BLOCK_VECTORS < 4 ? BLOCK_VECTORS : 4,  /* vectors a product takes at once */
    ROWS_1 = 16, ROWS_2 = 12, ROWS_3 = 8, ROWS_4 = 6,
#else
    GROUP = 2,
    ROWS_1 = 12, ROWS_2 = 6, ROWS_3 = 4, ROWS_4 = 2,
#endif
};

/* Of words of bits: how many are set; the place of the first one, of a word that is not 0. */
V_INLINE int bits_count(uint64_t x) { return __builtin_popcountll(x); }
V_INLINE int bits_first(uint64_t x) { return __builtin_ctzll(x); }

/* Ask for n bytes from p, to be read soon (first level of the cache) or later (second level); any address is allowed. */
V_INLINE void v_fetch_soon(const char *p, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += 64) __builtin_prefetch(p + i, 0, 3);
}
V_INLINE void v_fetch_line(const char *p) { __builtin_prefetch(p, 0, 3); }
V_INLINE void v_fetch_later(const char *p, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += 64) __builtin_prefetch(p + i, 0, 2);
}

/* The same address, forgotten where it came from: offsets from it then stay in the instructions, where the compiler would
 * compute each before a loop and keep them all, most on the stack. */
V_INLINE const real *v_anchor(const real *p) { __asm__("" : "+r"(p)); return p; }

V_INLINE vf v_load(const real *p) { vf r; memcpy(&r, p, sizeof r); return r; }
V_INLINE void v_store(real *p, vf a) { memcpy(p, &a, sizeof a); }
V_INLINE vf v_set1(real x) { return x - (vf){0}; }
V_INLINE vf v_zero(void) { return (vf){0}; }
V_INLINE vf v_add(vf a, vf b) { return a + b; }
V_INLINE vf v_sub(vf a, vf b) { return a - b; }
V_INLINE vf v_mul(vf a, vf b) { return a * b; }
V_INLINE vf v_fma(vf a, vf b, vf c) { return a * b + c; }

/* A product or sum that was rounded: it can't be contracted with what follows. */
V_INLINE vf v_rounded(vf a) {
#if defined(__x86_64__) && FASTATTN_VECTOR == 64
    __asm__("" : "+v"(a));
#elif defined(__x86_64__)
    __asm__("" : "+x"(a));
#elif defined(__aarch64__)
    __asm__("" : "+w"(a));
#else
    __asm__("" : "+m"(a));
#endif
    return a;
}
V_INLINE vf v_div(vf a, vf b) { return a / b; }
/* Nearest integers, ties to even, of |a| < 2^22. */
V_INLINE vf v_round(vf a) { return (a + v_set1(V_MAGIC)) - v_set1(V_MAGIC); }

/* What a product does with two words: acc + a b, or acc + a0 b0 + a1 b1 of pairs. */
V_INLINE vf v_dot(vf a, vf b, vf acc) {
#ifdef FASTATTN_PAIRS
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
    return a * b + acc;
#endif
}
/* The first elements of words. */
V_INLINE vf v_low(vf a) {
#ifdef FASTATTN_PAIRS
    return (vf)_mm512_slli_epi32((__m512i)a, 16);
#else
    return a;
#endif
}
/* A word in every lane; rows of pairs lie at any even address. */
V_INLINE vf v_word(const real *p) {
#ifdef FASTATTN_PAIRS
    int32_t word;
    memcpy(&word, p, sizeof word);
    return (vf)_mm512_set1_epi32(word);
#else
    return v_set1(*p);
#endif
}
/* The words of two keys' weights: pairs, rounded to nearest. Without pairs no caller is left. */
V_INLINE vf v_pair(vf a, vf b) {
#ifdef FASTATTN_PAIRS
    static const uint16_t zip[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    return (vf)_mm512_permutexvar_epi16(_mm512_loadu_si512(zip), both);
#else
    (void)b;
    return a;
#endif
}

/* a < b ? x : y, lane by lane; false where a or b is NaN. */
V_INLINE vf v_where_lt(vf a, vf b, vf x, vf y) {
#if FASTATTN_VECTOR == 64 && FASTATTN_BITS == 32     /* the generic form expands the mask register to a vector */
    return (vf)_mm512_mask_blend_ps(_mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ), (__m512)y, (__m512)x);
#elif FASTATTN_VECTOR == 64
    return (vf)_mm512_mask_blend_pd(_mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_LT_OQ), (__m512d)y, (__m512d)x);
#else
    vi m = (vi)(a < b);
    return (vf)(((vi)x & m) | ((vi)y & ~m));
#endif
}

/* Bit i of `bits` says whether lane i is kept; the others become 0, or -inf. NaN in them vanishes. */
#if FASTATTN_VECTOR < 64
V_INLINE vi v_lanes(uint64_t bits) {
    vi lane = {0};
    for (int i = 0; i < VL; i++) lane[i] = (real_int)1 << i;
    return (vi)((((real_int)bits - (vi){0}) & lane) != 0);
}
#endif
V_INLINE vf v_keep(vf a, uint64_t bits) {
#if FASTATTN_VECTOR == 64 && FASTATTN_BITS == 32
    return (vf)_mm512_maskz_mov_ps((__mmask16)bits, (__m512)a);
#elif FASTATTN_VECTOR == 64
    return (vf)_mm512_maskz_mov_pd((__mmask8)bits, (__m512d)a);
#else
    return (vf)((vi)a & v_lanes(bits));
#endif
}
/* Lanes of a where their bit is set, of b elsewhere. */
V_INLINE vf v_select(uint64_t bits, vf a, vf b) {
#if FASTATTN_VECTOR == 64 && FASTATTN_BITS == 32
    return (vf)_mm512_mask_mov_ps((__m512)b, (__mmask16)bits, (__m512)a);
#elif FASTATTN_VECTOR == 64
    return (vf)_mm512_mask_mov_pd((__m512d)b, (__mmask8)bits, (__m512d)a);
#else
    vi m = v_lanes(bits);
    return (vf)(((vi)a & m) | ((vi)b & ~m));
#endif
}
V_INLINE vf v_hide(vf a, uint64_t bits) { return v_select(bits, a, v_set1(-INFINITY)); }

/* a > b ? a : b: b where either is NaN, so the second argument is the one whose NaN survives. */
V_INLINE vf v_max(vf a, vf b) {
#if FASTATTN_VECTOR == 64 && FASTATTN_BITS == 32     /* one instruction, which the generic form is not matched to */
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif FASTATTN_VECTOR == 64
    return (vf)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif FASTATTN_VECTOR == 32 && FASTATTN_BITS == 32
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif FASTATTN_VECTOR == 32
    return (vf)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
    return v_where_lt(b, a, a, b);
#endif
}

/* a < b ? a : b: b where either is NaN. */
V_INLINE vf v_min(vf a, vf b) {
#if FASTATTN_VECTOR == 32 && FASTATTN_BITS == 32
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#elif FASTATTN_VECTOR == 32
    return (vf)_mm256_min_pd((__m256d)a, (__m256d)b);
#else
    return v_where_lt(a, b, a, b);
#endif
}

/* Is any lane NaN? */
V_INLINE int v_any_nan(vf a) {
#if FASTATTN_VECTOR == 64 && FASTATTN_BITS == 32
    return _mm512_cmp_ps_mask((__m512)a, (__m512)a, _CMP_UNORD_Q) != 0;
#elif FASTATTN_VECTOR == 64
    return _mm512_cmp_pd_mask((__m512d)a, (__m512d)a, _CMP_UNORD_Q) != 0;
#else
    real x[VL];
    int any = 0;
    v_store(x, a);
    for (int i = 0; i < VL; i++) any |= x[i] != x[i];
    return any;
#endif
}

/* Is any lane larger than limit? NaN is not. */
V_INLINE int v_any_above(vf a, real limit) {
#if FASTATTN_VECTOR == 64 && FASTATTN_BITS == 32
    return _mm512_cmp_ps_mask((__m512)a, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
#elif FASTATTN_VECTOR == 64
    return _mm512_cmp_pd_mask((__m512d)a, _mm512_set1_pd(limit), _CMP_GT_OQ) != 0;
#else
    real x[VL];
    int any = 0;
    v_store(x, a);
    for (int i = 0; i < VL; i++) any |= x[i] > limit;
    return any;
#endif
}

/* The lanes where a > b, as bits; not where either is NaN. */
V_INLINE uint64_t v_above_bits(vf a, vf b) {
#if FASTATTN_VECTOR == 64 && FASTATTN_BITS == 32
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#elif FASTATTN_VECTOR == 64
    return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ);
#else
    real x[VL], y[VL];
    uint64_t bits = 0;
    v_store(x, a);
    v_store(y, b);
    for (int i = 0; i < VL; i++) bits |= (uint64_t)(x[i] > y[i]) << i;
    return bits;
#endif
}

/* The first n <= VL values, zeros behind them; nothing past p + n is read or written. */
V_INLINE vf v_load_part(const real *p, ptrdiff_t n) {
    vf r = {0};
    if (n >= VL) return v_load(p);
#if FASTATTN_VECTOR == 64 && FASTATTN_BITS == 32
    r = (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1u), p);
#elif FASTATTN_VECTOR == 64
    r = (vf)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1u), p);
#else
    real x[VL] = {0};
    for (ptrdiff_t i = 0; i < n; i++) x[i] = p[i];
    r = v_load(x);
#endif
    return r;
}

V_INLINE void v_store_part(real *p, vf a, ptrdiff_t n) {
    if (n >= VL) { v_store(p, a); return; }
#if FASTATTN_VECTOR == 64 && FASTATTN_BITS == 32
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1u), (__m512)a);
#elif FASTATTN_VECTOR == 64
    _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1u), (__m512d)a);
#else
    real x[VL];
    v_store(x, a);
    for (ptrdiff_t i = 0; i < n; i++) p[i] = x[i];
#endif
}

/* to[i] = the word of elements i of two rows of bfloat16, for 2 VL of them. */
V_INLINE void v_zip_words(const uint16_t *a, const uint16_t *b, real *to) {
#ifdef FASTATTN_PAIRS
    static const uint16_t zip[64] = {
        0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47,
        16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62,
        31, 63};
    __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(x, _mm512_loadu_si512(zip), y));
    _mm512_storeu_si512(to + VL, _mm512_permutex2var_epi16(x, _mm512_loadu_si512(zip + 32), y));
#else
    (void)a; (void)b; (void)to;
#endif
}

/* --- narrower kinds of storage: widened exactly, rounded to nearest, ties to even --- */
#if FASTATTN_BITS == 32
typedef uint32_t v_u32 __attribute__((vector_size(FASTATTN_VECTOR), may_alias));
typedef uint16_t v_u16 __attribute__((vector_size(FASTATTN_VECTOR / 2), may_alias));
typedef int8_t v_i8 __attribute__((vector_size(FASTATTN_VECTOR / 4), may_alias));

/* __builtin_convertvector goes by halves for the wider vectors. */
V_INLINE vf v_from_bf16(v_u16 h) {
#if FASTATTN_VECTOR == 64
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#elif FASTATTN_VECTOR == 32
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16);
#else
    return (vf)(__builtin_convertvector(h, v_u32) << 16);
#endif
}
V_INLINE vf v_from_i8(v_i8 h) {
#if FASTATTN_VECTOR == 64
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)h));
#elif FASTATTN_VECTOR == 32
    int64_t eight;
    memcpy(&eight, &h, sizeof eight);
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(eight)));
#else
    return __builtin_convertvector(__builtin_convertvector(h, vi), vf);
#endif
}
V_INLINE vf v_from_f16(v_u16 h) {
#if FASTATTN_VECTOR == 64
    return (vf)_mm512_cvtph_ps((__m256i)h);
#elif FASTATTN_VECTOR == 32
    return (vf)_mm256_cvtph_ps((__m128i)h);
#else
    /* Exponents are 112 apart; the product is exact, and right for denormals. Infinities and NaN have all ones. */
    v_u32 x = __builtin_convertvector(h, v_u32);
    v_u32 magnitude = (x & 0x7fff) << 13;
    v_u32 special = (v_u32)((vi)magnitude >= 0x0f800000) & 0x7f800000;
    return (vf)((v_u32)((vf)magnitude * 0x1p112f) | special | (x & 0x8000) << 16);
#endif
}
V_INLINE v_u16 v_to_bf16(vf a) {
    v_u32 x = (v_u32)a;
    v_u32 nan = (v_u32)(a != a);
    v_u32 rounded = (x + 0x7fff + (x >> 16 & 1)) >> 16;
    rounded = (rounded & ~nan) | ((x >> 16 | 0x40) & nan);
#if FASTATTN_VECTOR == 64
    return (v_u16)_mm512_cvtepi32_epi16((__m512i)rounded);
#else
    return __builtin_convertvector(rounded, v_u16);
#endif
}
V_INLINE v_u16 v_to_f16(vf a) {
#if FASTATTN_VECTOR == 64
    return (v_u16)_mm512_cvtps_ph((__m512)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif FASTATTN_VECTOR == 32
    return (v_u16)_mm256_cvtps_ph((__m256)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    v_u32 x = (v_u32)a;
    v_u32 sign = x >> 16 & 0x8000;
    v_u32 m = x & 0x7fffffff;
    v_u32 normal = (m + 0xfff + (m >> 13 & 1) - (112u << 23)) >> 13;
    /* below 2^-14 the sum with 1/2 has the spacing of float16's denormals, 2^-24, and rounds to it */
    v_u32 tiny = (v_u32)((vf)m + v_set1(0.5f)) - 0x3f000000;
    v_u32 is_tiny = (v_u32)((vi)m < 0x38800000), is_inf = (v_u32)((vi)m >= 0x477ff000), is_nan = (v_u32)((vi)m > 0x7f800000);
    v_u32 r = (tiny & is_tiny) | (normal & ~is_tiny);
    r = (r & ~is_inf) | (0x7c00 & is_inf);
    r = (r & ~is_nan) | ((0x7e00 | (m >> 13 & 0x3ff)) & is_nan);
    return __builtin_convertvector(r | sign, v_u16);
#endif
}
#endif

/* Elements i, i + 1, ... of p[0], .. p[0], p[1], ..., each `times` times: 1, 2, 4 or 8. i is a multiple of VL. */
V_INLINE vf v_repeat(const float *p, ptrdiff_t i, int times) {
#if FASTATTN_VECTOR == 64 && FASTATTN_BITS == 32
    const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int shift = times == 8 ? 3 : times == 4 ? 2 : times == 2 ? 1 : 0;
    return (vf)_mm512_permutexvar_ps((__m512i)(lane >> shift), _mm512_loadu_ps(p + i / times));
#else
    real x[VL];
    for (int j = 0; j < VL; j++) x[j] = p[(i + j) / times];
    return v_load(x);
#endif
}

/* Lane i of the result is lane (i + by) % VL of a. */
V_INLINE vf v_rotate(vf a, int by) {
#if FASTATTN_VECTOR == 64 && FASTATTN_BITS == 32
    const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return (vf)_mm512_permutexvar_ps((__m512i)(lane + by), (__m512)a);
#elif FASTATTN_VECTOR == 64
    const vi lane = {0, 1, 2, 3, 4, 5, 6, 7};
    return (vf)_mm512_permutexvar_pd((__m512i)(lane + by), (__m512d)a);
#elif FASTATTN_VECTOR == 32 && FASTATTN_BITS == 32
    const vi lane = {0, 1, 2, 3, 4, 5, 6, 7};
    return (vf)_mm256_permutevar8x32_ps((__m256)a, (__m256i)(lane + by));
#else
    real x[2 * VL];
    v_store(x, a);
    v_store(x + VL, a);
    return v_load(x + by % VL);
#endif
}

/* n integers as codes of int8. */
V_INLINE void v_store_codes(int8_t *p, vf a, ptrdiff_t n) {
    real x[VL];
    v_store(x, a);
    for (ptrdiff_t i = 0; i < n && i < VL; i++) p[i] = (int8_t)x[i];
}

V_INLINE ptrdiff_t v_size(int kind) { return kind == FASTATTN_REAL ? (ptrdiff_t)sizeof(real) : kind == FASTATTN_I8 ? 1 : 2; }

/* VL elements from element i on, of any kind, as reals. */
V_INLINE vf v_load_as(const void *p, ptrdiff_t i, int kind) {
#if FASTATTN_BITS == 32
    v_u16 h;
    v_i8 b;
    if (kind == FASTATTN_F16) { memcpy(&h, (const uint16_t *)p + i, sizeof h); return v_from_f16(h); }
    if (kind == FASTATTN_BF16) { memcpy(&h, (const uint16_t *)p + i, sizeof h); return v_from_bf16(h); }
    if (kind == FASTATTN_I8) { memcpy(&b, (const int8_t *)p + i, sizeof b); return v_from_i8(b); }
#endif
    (void)kind;
    return v_load((const real *)p + i);
}

/* The first n <= VL of them, zeros behind; nothing past them is read. */
V_INLINE vf v_load_part_as(const void *p, ptrdiff_t i, ptrdiff_t n, int kind) {
    if (n >= VL) return v_load_as(p, i, kind);
#if FASTATTN_BITS == 32
#if FASTATTN_VECTOR == 64
    const __mmask16 m = (__mmask16)((1u << n) - 1u);
    if (kind == FASTATTN_F16) return v_from_f16((v_u16)_mm256_maskz_loadu_epi16(m, (const uint16_t *)p + i));
    if (kind == FASTATTN_BF16) return v_from_bf16((v_u16)_mm256_maskz_loadu_epi16(m, (const uint16_t *)p + i));
    if (kind == FASTATTN_I8) return v_from_i8((v_i8)_mm_maskz_loadu_epi8(m, (const int8_t *)p + i));
#else
    uint16_t h[VL] = {0};
    int8_t b[VL] = {0};
    if (kind == FASTATTN_I8) {
        for (ptrdiff_t j = 0; j < n; j++) b[j] = ((const int8_t *)p)[i + j];
        return v_load_as(b, 0, kind);
    }
    if (kind != FASTATTN_REAL) {
        for (ptrdiff_t j = 0; j < n; j++) h[j] = ((const uint16_t *)p)[i + j];
        return v_load_as(h, 0, kind);
    }
#endif
#endif
    return v_load_part((const real *)p + i, n);
}

/* n <= VL elements that lie `stride` elements apart. */
V_INLINE vf v_gather_as(const void *p, ptrdiff_t i, ptrdiff_t stride, ptrdiff_t n, int kind) {
    real x[VL] = {0};
    for (ptrdiff_t j = 0; j < n && j < VL; j++) {
        x[j] = 0;
        if (kind == FASTATTN_REAL) x[j] = ((const real *)p)[i + j * stride];
#if FASTATTN_BITS == 32
        else {
            const char *at = (const char *)p + (i + j * stride) * v_size(kind);
            uint16_t h[VL] = {0};
            int8_t b[VL] = {0};
            if (kind == FASTATTN_I8) b[0] = *(const int8_t *)at;
            else memcpy(h, at, sizeof *h);
            x[j] = v_load_as(kind == FASTATTN_I8 ? (const void *)b : (const void *)h, 0, kind)[0];
        }
#endif
    }
    return v_load(x);
}

/* n <= VL reals to elements i, i + stride, ... of any kind but I8. */
V_INLINE void v_store_as(void *p, ptrdiff_t i, ptrdiff_t stride, vf a, ptrdiff_t n, int kind) {
#if FASTATTN_BITS == 32
    if (kind != FASTATTN_REAL) {
        v_u16 h = kind == FASTATTN_F16 ? v_to_f16(a) : v_to_bf16(a);
        uint16_t *to = (uint16_t *)p + i, x[VL];
        if (stride == 1 && n >= VL) { memcpy(to, &h, sizeof h); return; }
#if FASTATTN_VECTOR == 64
        if (stride == 1) { _mm256_mask_storeu_epi16(to, (__mmask16)((1u << n) - 1u), (__m256i)h); return; }
#endif
        memcpy(x, &h, sizeof h);
        for (ptrdiff_t j = 0; j < n && j < VL; j++) to[j * stride] = x[j];
        return;
    }
#endif
    (void)kind;
    real *to = (real *)p + i, x[VL];
    if (stride == 1) { v_store_part(to, a, n); return; }
    v_store(x, a);
    for (ptrdiff_t j = 0; j < n && j < VL; j++) to[j * stride] = x[j];
}

/* Transpose: log2(VL) rounds of interleaving row i with row i + VL/2 carry every bit of the row number into the lane
 * number. A round is VL shuffles of two sources, no matter how wide the vector is. */
#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)
#define V_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define V_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif
V_INLINE vf v_zip_low(vf a, vf b) {
#if FASTATTN_VECTOR / (FASTATTN_BITS / 8) == 16
    return V_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif FASTATTN_VECTOR / (FASTATTN_BITS / 8) == 8
    return V_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#elif FASTATTN_VECTOR / (FASTATTN_BITS / 8) == 4
    return V_SHUFFLE(a, b, 0, 4, 1, 5);
#else
    return V_SHUFFLE(a, b, 0, 2);
#endif
}
V_INLINE vf v_zip_high(vf a, vf b) {
#if FASTATTN_VECTOR / (FASTATTN_BITS / 8) == 16
    return V_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif FASTATTN_VECTOR / (FASTATTN_BITS / 8) == 8
    return V_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#elif FASTATTN_VECTOR / (FASTATTN_BITS / 8) == 4
    return V_SHUFFLE(a, b, 2, 6, 3, 7);
#else
    return V_SHUFFLE(a, b, 1, 3);
#endif
}
V_INLINE void v_transpose(v_square *t) {
    for (int width = 1; width < VL; width *= 2) {
        v_square u;
        for (int i = 0; i < VL / 2; i++) {
            u.row[2 * i] = v_zip_low(t->row[i], t->row[i + VL / 2]);
            u.row[2 * i + 1] = v_zip_high(t->row[i], t->row[i + VL / 2]);
        }
        *t = u;
    }
}

/* Lane i = the sum of the lanes of x[i], for VL vectors: each round adds halves and joins the results of two vectors, so VL
 * sums take VL - 1 additions. The order of a sum does not depend on i. */
#define V_LIST(...) __VA_ARGS__
#define V_SHUFFLE_(a, b, ...) V_SHUFFLE(a, b, __VA_ARGS__)
#define V_FOLD(a, b, low, high) (V_SHUFFLE_(a, b, V_LIST low) + V_SHUFFLE_(a, b, V_LIST high))
V_INLINE vf v_sums(vf *x) {
#if FASTATTN_VECTOR / (FASTATTN_BITS / 8) == 16
#define FOLD_8(a, b) V_FOLD(a, b, (0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23), \
                             (8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#define FOLD_4(a, b) V_FOLD(a, b, (0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27), \
                             (4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31))
#define FOLD_2(a, b) V_FOLD(a, b, (0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29), \
                             (2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
#define FOLD_1(a, b) V_FOLD(a, b, (0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30), \
                             (1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31))
    vf y[8], z[4];
    for (int i = 0; i < 4; i++) {
        y[i] = FOLD_8(x[i], x[i + 4]);
        y[i + 4] = FOLD_8(x[i + 8], x[i + 12]);
    }
    for (int i = 0; i < 4; i++) z[i] = FOLD_4(y[i], y[i + 4]);
    return FOLD_1(FOLD_2(z[0], z[1]), FOLD_2(z[2], z[3]));
#elif FASTATTN_VECTOR / (FASTATTN_BITS / 8) == 8
#define FOLD_4(a, b) V_FOLD(a, b, (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15))
#define FOLD_2(a, b) V_FOLD(a, b, (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15))
#define FOLD_1(a, b) V_FOLD(a, b, (0, 2, 8, 10, 4, 6, 12, 14), (1, 3, 9, 11, 5, 7, 13, 15))
    vf z[4];
    for (int i = 0; i < 4; i++) z[i] = FOLD_4(x[i], x[i + 4]);
    return FOLD_1(FOLD_2(z[0], z[1]), FOLD_2(z[2], z[3]));
#elif FASTATTN_VECTOR / (FASTATTN_BITS / 8) == 4
#define FOLD_2(a, b) V_FOLD(a, b, (0, 1, 4, 5), (2, 3, 6, 7))
#define FOLD_1(a, b) V_FOLD(a, b, (0, 2, 4, 6), (1, 3, 5, 7))
    return FOLD_1(FOLD_2(x[0], x[1]), FOLD_2(x[2], x[3]));
#else
#define FOLD_1(a, b) V_FOLD(a, b, (0, 2), (1, 3))
    return FOLD_1(x[0], x[1]);
#endif
}

/* to[j][i] = from[i][j] for VL x VL values, rows `from_row` and `to_row` apart; all in registers. */
V_INLINE void v_move_square(const real *from, ptrdiff_t from_row, real *to, ptrdiff_t to_row) {
    v_square t;
    for (int i = 0; i < VL; i++) t.row[i] = v_load(from + i * from_row);
    v_transpose(&t);
    for (int i = 0; i < VL; i++) v_store(to + i * to_row, t.row[i]);
}

/* The same, with every row multiplied by `factor` on the way. */
V_INLINE void v_move_square_scaled(const real *from, ptrdiff_t from_row, real *to, ptrdiff_t to_row, vf factor) {
    v_square t;
    for (int i = 0; i < VL; i++) t.row[i] = v_load(from + i * from_row) * factor;
    v_transpose(&t);
    for (int i = 0; i < VL; i++) v_store(to + i * to_row, t.row[i]);
}

/* q(f) of 2^f = 1 + f q(f) on [-1/2, 1/2]: interpolation in Chebyshev nodes, computed with 50 digits.
 * Relative error of the polynomial 5e-9 (float32, 0.08 ulp) and 8e-18 (float64, 0.08 ulp). */
V_INLINE vf v_exp2_fraction(vf f) {
#if FASTATTN_BITS == 32
    vf q = v_set1(0.00015453162945120690f);
    q = q * f + v_set1(0.0013390863364671234f);
    q = q * f + v_set1(0.0096180825572778515f);
    q = q * f + v_set1(0.055503571142190778f);
    q = q * f + v_set1(0.24022650760568127f);
    q = q * f + v_set1(0.69314718802622879f);
#else
    vf q = v_set1(4.4549605981865183938e-10);
    q = q * f + v_set1(7.0725859492692236999e-9);
    q = q * f + v_set1(1.0178062445845773521e-7);
    q = q * f + v_set1(1.3215442587921689653e-6);
    q = q * f + v_set1(0.000015252733829836118394);
    q = q * f + v_set1(0.00015403530441736050155);
    q = q * f + v_set1(0.001333355814641693531);
    q = q * f + v_set1(0.0096181291076068885273);
    q = q * f + v_set1(0.055504108664821594339);
    q = q * f + v_set1(0.2402265069591009822);
    q = q * f + v_set1(0.69314718055994530942);
#endif
    return q;
}

/* 2^x for x <= 63, and some number of at least 2^63 above: at most 1 ulp, denormal results kept, 2^-inf = +0, NaN kept. 2^0 is exactly 1. */
V_INLINE vf v_exp2(vf x) {
#if FASTATTN_VECTOR == 64 && FASTATTN_BITS == 32
    /* The FMA units are what the products wait for: 16 powers in a register take two FMAs off them, 5 remain of 7.
     * x = n + f, n a multiple of 1/16 and |f| <= 1/32; 2^x = 2^floor(n) T (1 + f q(f)), T = 2^(n - floor(n)).
     * Error: T 0.452 ulp (the worst of the 16), rounding 0.5, polynomial 0.02. vreduce(-inf) = 0, vscalef(T, -inf) = 0. */
    const vf table = {1.0f, 1.044273734f, 1.090507746f, 1.138788581f, 1.189207077f, 1.241857767f, 1.296839595f, 1.354255557f,
                      1.414213538f, 1.476826191f, 1.542210817f, 1.610490322f, 1.681792855f, 1.75625217f, 1.834008098f, 1.915206552f};
    vf f = (vf)_mm512_reduce_ps((__m512)x, 4 << 4);
    vf n = x - f;
    vf t = (vf)_mm512_permutexvar_ps((__m512i)(n + v_set1(V_MAGIC / 16)), (__m512)table);
    vf q = v_set1(0.05550508525196962683f) * f + v_set1(0.24023355156988720906f);
    q = q * f + v_set1(0.69314718055994530942f);
    return (vf)_mm512_scalef_ps((__m512)(t * (f * q) + t), (__m512)n);
#elif FASTATTN_VECTOR == 64
    /* The same in float64 with steps of 1/8 (16 powers would be off by up to 0.478 ulp): T 0.435 ulp, polynomial 0.001. */
    const vf table = {1.0, 1.0905077326652577, 1.189207115002721, 1.2968395546510096,
                      1.4142135623730951, 1.5422108254079407, 1.681792830507429, 1.8340080864093424};
    vf f = (vf)_mm512_reduce_pd((__m512d)x, 3 << 4);
    vf n = x - f;
    vf t = (vf)_mm512_permutexvar_pd((__m512i)(n + v_set1(V_MAGIC / 8)), (__m512d)table);
    vf q = v_set1(1.3216037965889916444e-6);
    q = q * f + v_set1(0.000015253528985683798318);
    q = q * f + v_set1(0.00015403530379925089541);
    q = q * f + v_set1(0.0013333558127014688787);
    q = q * f + v_set1(0.0096181291076285822913);
    q = q * f + v_set1(0.055504108664823096657);
    q = q * f + v_set1(0.24022650695910071232);
    q = q * f + v_set1(0.69314718055994530923);
    return (vf)_mm512_scalef_pd((__m512d)(t * (f * q) + t), (__m512d)n);
#elif defined(__FMA__) || defined(__aarch64__)
    x = v_min(v_set1(V_EXP2_CEILING), v_max(v_set1(V_EXP2_FLOOR), x));
    vf t = x + v_set1(V_MAGIC);
    vf f = x - (t - v_set1(V_MAGIC));
    /* 2^n in two factors, both normal: their product may be denormal and is rounded once. */
    vi n = (vi)t - (vi)v_set1(V_MAGIC) + (V_EXP_BIAS + V_EXP2_LIFT);
    vf lifted = (v_exp2_fraction(f) * f + v_set1(1)) * (vf)(n << V_MANTISSA);
    return lifted * v_set1(FASTATTN_BITS == 32 ? 0x1p-64 : 0x1p-512);
#else
    x = v_min(v_set1(V_EXP2_CEILING), v_max(v_set1(V_EXP2_FLOOR), x));
    /* Without FMA, f q(f) and 1 + f q(f) round twice: 1.13 ulp. So |f| <= 1/4: x = n/2 + f, and odd n bring sqrt 2. */
    vf t = x + v_set1(V_MAGIC / 2);
    vf f = x - (t - v_set1(V_MAGIC / 2));
    vi n = (vi)t - (vi)v_set1(V_MAGIC / 2);
    vi odd = -(n & 1);
    const real root = 1.41421356237309504880;
    vf high = (vf)(((vi)v_set1(root) & odd) | ((vi)v_set1(1) & ~odd));
    vf low = (vf)((vi)v_set1((real)(1.41421356237309504880L - (long double)(real)1.41421356237309504880)) & odd);
    vf power = (v_exp2_fraction(f) * f * high + low) + high;
    vf lifted = power * (vf)(((n >> 1) + (V_EXP_BIAS + V_EXP2_LIFT)) << V_MANTISSA);
    return lifted * v_set1(FASTATTN_BITS == 32 ? 0x1p-64 : 0x1p-512);
#endif
}

/* tanh(x) = x + x^3 p(x^2) where |x| < 0.55 (p: Chebyshev, relative error 0.07 ulp), else 1 - 2 / (exp(2|x|) + 1), where
 * nothing cancels. At most 2 ulp; odd to the bit, for it is computed of |x|; NaN kept. */
V_INLINE vf v_tanh(vf x) {
    const real limit = FASTATTN_BITS == 32 ? 10 : 20;       /* tanh is 1 to the last bit from 9.02 and 19.07 on */
    const real two_log2e = 2.8853900817779268147;
    vi sign = (vi)x & (vi)v_set1(-(real)0.0);
    vf a = (vf)((vi)x ^ sign);
    vf z = a * a;
#if FASTATTN_BITS == 32
    vf p = v_set1(-0.0066102278311147342f);
    p = p * z + v_set1(0.021309388664443473f);
    p = p * z + v_set1(-0.053909428827460545f);
    p = p * z + v_set1(0.13333113729020872f);
    p = p * z + v_set1(-0.33333332007976980f);
#else
    vf p = v_set1(-0.000020602765376366339549);
    p = p * z + v_set1(0.000085113136855776712196);
    p = p * z + v_set1(-0.00023463474108872371264);
    p = p * z + v_set1(0.00058893605200740577637);
    p = p * z + v_set1(-0.0014556618301007160335);
    p = p * z + v_set1(0.0035921103786890238773);
    p = p * z + v_set1(-0.0088632343978143548378);
    p = p * z + v_set1(0.021869488493666941903);
    p = p * z + v_set1(-0.053968253967434014504);
    p = p * z + v_set1(0.13333333333332714826);
    p = p * z + v_set1(-0.33333333333333332561);
#endif
    vf small = a + a * (z * p);
    vf b = v_where_lt(v_set1(limit), a, v_set1(limit), a);
    vf y = b * v_set1(two_log2e);
    vf t = y + v_set1(V_MAGIC);
    /* y - n, with the rounding of y given back (with FMA): it would cost y ulp of the exponential. */
    vf f = (y - (t - v_set1(V_MAGIC))) + (b * v_set1(two_log2e) - y);
    vf scale = (vf)(((vi)t - (vi)v_set1(V_MAGIC) + V_EXP_BIAS) << V_MANTISSA);
    vf large = v_set1(1) - v_set1(2) / (scale * (v_exp2_fraction(f) * f) + scale + v_set1(1));
    return (vf)((vi)v_where_lt(a, v_set1((real)0.55), small, large) | sign);
}

/* x Φ(x) of n <= 4 vectors, Φ the normal distribution function: x/2 erfc(-x / √2), so nothing cancels where x < 0. float32:
 * erfc(a) = t e^(-a² + p(t)), t = 1 / (1 + a/2), p of degree 9 (Press et al., Numerical Recipes, erfcc: relative error 1.2e-7);
 * float64: the C library's. In step, because each step waits for the one before: 4.8 instead of 6.7 ns a vector (Zen 5). */
V_INLINE void v_gelu(vf *x, const int n) {
#if FASTATTN_BITS == 32
    const real c[10] = {0.17087277f, -0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f,
                        -0.18628806f, 0.09678418f, 0.37409196f, 1.00002368f, -1.26551223f};
    vf t[4], p[4];
    for (int j = 0; j < n; j++) {
        vf a = (vf)((vi)x[j] & ~(vi)v_set1(-0.0f)) * v_set1(0.70710678118654752440f);
        t[j] = v_set1(1) / (v_set1(0.5f) * a + v_set1(1));
        p[j] = v_set1(c[0]);
    }
    for (int i = 1; i < 10; i++)
        for (int j = 0; j < n; j++) p[j] = p[j] * t[j] + v_set1(c[i]);
    for (int j = 0; j < n; j++) {
        vf a = x[j] * v_set1(0.70710678118654752440f);
        vf tail = v_set1(0.5f) * t[j] * v_exp2((p[j] - a * a) * v_set1(1.44269504088896340736f));     /* Φ(-|x|) */
        x[j] = x[j] * v_where_lt(x[j], v_zero(), tail, v_set1(1) - tail);
    }
#else
    real lanes[VL];
    for (int j = 0; j < n; j++) {
        v_store(lanes, x[j]);
        for (int i = 0; i < VL; i++) lanes[i] *= 0.5 * erfc(-0.70710678118654752440 * lanes[i]);
        x[j] = v_load(lanes);
    }
#endif
}

#endif
