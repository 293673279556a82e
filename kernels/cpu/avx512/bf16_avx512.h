/* SPDX-License-Identifier: Apache-2.0 */
/*
 * bf16 vectors in sixteen lanes: loads and stores of the first `left` elements (all sixteen when
 * there are more), the rounding of types.h, operands of rule 2 and the tree of rule 1.
 *
 * A zmm of 32 bf16 holds pairs: the low half of word i is element 2i, the high half 2i+1, which is
 * lane i of rule 1.
 */
#ifndef DSV4_BF16_AVX512_H
#define DSV4_BF16_AVX512_H

#include "kernels.h"

#include <immintrin.h>

static inline __mmask16 first16(int32_t left) {
    return left >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << left) - 1);
}

static inline __mmask32 first32(int32_t left) {
    return left >= 32 ? (__mmask32)0xffffffffu : ((__mmask32)1 << left) - 1;
}

static inline __m512 widen16(__m256i h) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

static inline __m512 load16(const dsv4_bf16 *p, int32_t left) {
    return widen16(_mm256_maskz_loadu_epi16(first16(left), p));
}

static inline __m512 load16_f32(const float *p, int32_t left) {
    return _mm512_maskz_loadu_ps(first16(left), p);
}

/* The bits of each lane rounded to bf16, in the upper half of the word; the lower half is not
 * cleared. */
static inline __m512i round16(__m512 x) {
    const __m512i one = _mm512_set1_epi32(1), half = _mm512_set1_epi32(0x7fff);
    __m512i u = _mm512_castps_si512(x);
    __m512i even = _mm512_and_si512(_mm512_srli_epi32(u, 16), one);
    __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, half), even);
    __m512i quiet = _mm512_or_si512(_mm512_and_si512(u, _mm512_set1_epi32(INT32_MIN)),
                                    _mm512_set1_epi32(0x7fc00000));
    return _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
}

/* x rounded to bf16, as f32. */
static inline __m512 rounded16(__m512 x) {
    return _mm512_castsi512_ps(_mm512_and_si512(round16(x), _mm512_set1_epi32((int)0xffff0000u)));
}

static inline void store16(dsv4_bf16 *p, __m512 x, int32_t left) {
    __m256i h = _mm512_cvtepi32_epi16(_mm512_srli_epi32(round16(x), 16));
    if (left >= 16)
        _mm256_storeu_si256((__m256i *)(void *)p, h);
    else
        _mm256_mask_storeu_epi16(p, first16(left), h);
}

static inline __m512i load32(const dsv4_bf16 *p, int32_t left) {
    return _mm512_maskz_loadu_epi16(first32(left), p);
}

static inline void store32(dsv4_bf16 *p, __m512i x, int32_t left) {
    if (left >= 32)
        _mm512_storeu_si512(p, x);
    else
        _mm512_mask_storeu_epi16(p, first32(left), x);
}

static inline __m512 evens(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
}

static inline __m512 odds(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000u)));
}

/* Rule 1's tree. */
static inline float tree16(__m512 l) {
    __m256 y = _mm256_add_ps(_mm512_castps512_ps256(l), _mm512_extractf32x8_ps(l, 1));
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

/* The largest of 32 unsigned 16-bit lanes. */
static inline uint32_t largest32(__m512i x) {
    __m256i y = _mm256_max_epu16(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    __m128i z = _mm_max_epu16(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    z = _mm_minpos_epu16(_mm_xor_si128(z, _mm_set1_epi16(-1)));
    return ~(uint32_t)_mm_cvtsi128_si32(z) & 0xffffu;
}

static inline float mean_square_avx512(const dsv4_bf16 *x, int32_t n) {
    const __m512i magnitude = _mm512_set1_epi16(0x7fff), tiny = _mm512_set1_epi16(DSV4_TINY_BF16);
    __m512 acc = _mm512_setzero_ps();
    for (int32_t k = 0; k < n; k += 32) {
        __m512i pairs = load32(x + k, n - k);
        __mmask32 counts = _mm512_cmpge_epu16_mask(_mm512_and_si512(pairs, magnitude), tiny);
        pairs = _mm512_maskz_mov_epi16(counts, pairs);
        acc = _mm512_fmadd_ps(odds(pairs), odds(pairs), acc);
        acc = _mm512_fmadd_ps(evens(pairs), evens(pairs), acc);
    }
    return tree16(acc) / (float)n;
}

#endif
