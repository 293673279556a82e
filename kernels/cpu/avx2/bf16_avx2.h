/* SPDX-License-Identifier: Apache-2.0 */
/*
 * bf16 vectors in eight lanes: loads and stores of the first `left` elements (all when there are
 * more; the rest reads as zero), the rounding of types.h, operands of rule 2, the tree of rule 1.
 *
 * A ymm of 16 bf16 holds pairs: the low half of word i is element 2i, the high half 2i+1.
 */
#ifndef DSV4_BF16_AVX2_H
#define DSV4_BF16_AVX2_H

#include "kernels.h"

#include <immintrin.h>

static inline __m256i load16(const dsv4_bf16 *p, int32_t left) {
    dsv4_bf16 part[16] = {0};
    if (left < 16) {
        memcpy(part, p, (size_t)left * sizeof *p);
        p = part;
    }
    return _mm256_loadu_si256((const __m256i *)(const void *)p);
}

static inline void store16(dsv4_bf16 *p, __m256i x, int32_t left) {
    if (left >= 16) {
        _mm256_storeu_si256((__m256i *)(void *)p, x);
    } else {
        dsv4_bf16 part[16];
        _mm256_storeu_si256((__m256i *)(void *)part, x);
        memcpy(p, part, (size_t)left * sizeof *p);
    }
}

static inline __m256 load8(const dsv4_bf16 *p, int32_t left) {
    dsv4_bf16 part[8] = {0};
    if (left < 8) {
        memcpy(part, p, (size_t)left * sizeof *p);
        p = part;
    }
    __m128i h = _mm_loadu_si128((const __m128i *)(const void *)p);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

static inline __m256 load8_f32(const float *p, int32_t left) {
    float part[8] = {0};
    if (left < 8) {
        memcpy(part, p, (size_t)left * sizeof *p);
        p = part;
    }
    return _mm256_loadu_ps(p);
}

static inline void store8_f32(float *p, __m256 x, int32_t left) {
    if (left >= 8) {
        _mm256_storeu_ps(p, x);
    } else {
        float part[8];
        _mm256_storeu_ps(part, x);
        memcpy(p, part, (size_t)left * sizeof *p);
    }
}

/* The bits of each lane rounded to bf16, in the upper half of the word; the lower half is not
 * cleared. */
static inline __m256i round8(__m256 x) {
    const __m256i one = _mm256_set1_epi32(1), half = _mm256_set1_epi32(0x7fff);
    __m256i u = _mm256_castps_si256(x);
    __m256i even = _mm256_and_si256(_mm256_srli_epi32(u, 16), one);
    __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, half), even);
    __m256i quiet = _mm256_or_si256(_mm256_and_si256(u, _mm256_set1_epi32(INT32_MIN)),
                                    _mm256_set1_epi32(0x7fc00000));
    __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    return _mm256_blendv_epi8(r, quiet, _mm256_castps_si256(nan));
}

/* x rounded to bf16, as f32. */
static inline __m256 rounded8(__m256 x) {
    return _mm256_castsi256_ps(_mm256_and_si256(round8(x), _mm256_set1_epi32((int)0xffff0000u)));
}

/* The upper halves of eight words. */
static inline __m128i upper8(__m256i x) {
    x = _mm256_srli_epi32(x, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}

static inline void store8_bits(dsv4_bf16 *p, __m128i h, int32_t left) {
    if (left >= 8) {
        _mm_storeu_si128((__m128i *)(void *)p, h);
    } else {
        dsv4_bf16 part[8];
        _mm_storeu_si128((__m128i *)(void *)part, h);
        memcpy(p, part, (size_t)left * sizeof *p);
    }
}

static inline void store8(dsv4_bf16 *p, __m256 x, int32_t left) {
    store8_bits(p, upper8(round8(x)), left);
}

static inline __m256 evens(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
}

static inline __m256 odds(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000u)));
}

/* Rule 1's tree over lanes 0-7 and 8-15. */
static inline float tree8(__m256 low, __m256 high) {
    __m256 y = _mm256_add_ps(low, high);
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

/* The largest of 16 unsigned 16-bit lanes. */
static inline uint32_t largest16(__m256i x) {
    __m128i z = _mm_max_epu16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    z = _mm_minpos_epu16(_mm_xor_si128(z, _mm_set1_epi16(-1)));
    return ~(uint32_t)_mm_cvtsi128_si32(z) & 0xffffu;
}

/* Adds the squares of 16 elements, operands of rule 2, to eight lanes. */
static inline __m256 add_squares8(__m256 acc, __m256i pairs) {
    __m256i magnitude = _mm256_and_si256(pairs, _mm256_set1_epi16(0x7fff));
    __m256i counts = _mm256_cmpgt_epi16(magnitude, _mm256_set1_epi16(DSV4_TINY_BF16 - 1));
    pairs = _mm256_and_si256(pairs, counts);
    acc = _mm256_fmadd_ps(odds(pairs), odds(pairs), acc);
    return _mm256_fmadd_ps(evens(pairs), evens(pairs), acc);
}

static inline float mean_square_avx2(const dsv4_bf16 *x, int32_t n) {
    __m256 low = _mm256_setzero_ps(), high = low;
    for (int32_t k = 0; k < n; k += 32) {
        low = add_squares8(low, load16(x + k, n - k));
        if (n - k > 16) /* else +0 to every lane */
            high = add_squares8(high, load16(x + k + 16, n - k - 16));
    }
    return tree8(low, high) / (float)n;
}

#endif
