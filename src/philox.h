/* Which weights a dropout keeps: Philox 4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3",
 * 2011), a function of a counter and a key and of nothing else, so any tile of any pass finds the same numbers.
 *
 * Counter (key position / 4, row, head, batch), key: the 64 bits of the seed. Its four words belong to four successive keys. */
#ifndef FASTATTN_PHILOX_H
#define FASTATTN_PHILOX_H

#include "simd.h"

/* Numbers of 32 bits in lanes of 64, of which the upper half may hold anything: products need the whole lane. */
typedef uint64_t v_wide __attribute__((vector_size(FASTATTN_VECTOR), may_alias));
enum { WIDE = FASTATTN_VECTOR / 8 };

V_INLINE v_wide v_wide_product(v_wide a, uint32_t b) {
    v_wide m = (uint64_t)b - (v_wide){0};
#if FASTATTN_VECTOR == 64       /* written as a product of 64 bits, none of these is one instruction */
    return (v_wide)_mm512_mul_epu32((__m512i)a, (__m512i)m);
#elif FASTATTN_VECTOR == 32
    return (v_wide)_mm256_mul_epu32((__m256i)a, (__m256i)m);
#elif defined(__SSE2__)
    return (v_wide)__builtin_ia32_pmuludq128((int __attribute__((vector_size(16))))a, (int __attribute__((vector_size(16))))m);
#else
    return (a & 0xffffffff) * m;
#endif
}

/* Bit i: lane i is negative. */
V_INLINE uint64_t v_wide_signs(v_wide a) {
#if FASTATTN_VECTOR == 64
    return _mm512_movepi64_mask((__m512i)a);
#elif FASTATTN_VECTOR == 32
    return (uint64_t)_mm256_movemask_pd((__m256d)a);
#else
    return (a[0] >> 63) | (a[1] >> 63) << 1;
#endif
}

V_INLINE void v_philox(v_wide x[4], uint64_t seed) {
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        v_wide p0 = v_wide_product(x[0], 0xD2511F53), p1 = v_wide_product(x[2], 0xCD9E8D57);
        x[0] = (p1 >> 32) ^ x[1] ^ (uint64_t)k0;
        x[1] = p1;
        x[2] = (p0 >> 32) ^ x[3] ^ (uint64_t)k1;
        x[3] = p0;
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
}

/* kept[r], bit i: the weight of row + i and key 4 group + r stays, for its number is at least `below`. rows: a multiple of WIDE,
 * at most 64. */
V_INLINE void v_kept(uint32_t group, uint32_t row, uint32_t head, uint32_t batch, uint64_t seed, uint32_t below, int rows,
                     uint64_t kept[4]) {
    v_wide lane = {0}, x[4];
    for (int i = 0; i < WIDE; i++) lane[i] = (uint64_t)i;
    kept[0] = kept[1] = kept[2] = kept[3] = 0;
    for (int i = 0; i < rows; i += WIDE) {
        x[0] = (uint64_t)group - (v_wide){0};
        x[1] = (uint64_t)row + (uint64_t)i + lane;
        x[2] = (uint64_t)head - (v_wide){0};
        x[3] = (uint64_t)batch - (v_wide){0};
        v_philox(x, seed);
        for (int r = 0; r < 4; r++)
            kept[r] |= (v_wide_signs((x[r] & 0xffffffff) - (uint64_t)below) ^ (((uint64_t)1 << WIDE) - 1)) << i;
    }
}

#endif
