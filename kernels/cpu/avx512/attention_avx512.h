/* SPDX-License-Identifier: Apache-2.0 */
/* The vectors of attention_simd.h in sixteen lanes; used by the f32 and the bf16-dot variant. */
#ifndef DSV4_ATTENTION_AVX512_H
#define DSV4_ATTENTION_AVX512_H

#include "cpu/avx512/functions_avx512.h"
#include "cpu/avx512/transpose_avx512.h"
#include "kernels.h"

#define LANES 16
#define vec __m512
#define v_load _mm512_load_ps
#define v_store _mm512_store_ps
#define v_set1 _mm512_set1_ps
#define v_zero _mm512_setzero_ps
#define v_add _mm512_add_ps
#define v_sub _mm512_sub_ps
#define v_mul _mm512_mul_ps
#define v_div _mm512_div_ps
#define v_max _mm512_max_ps
#define v_exp dsv4_exp_avx512

/* bf16 in the upper half of each lane, to nearest even; the lower half is left over.  A NaN of
 * functions.h stays. */
static inline __m512i round_upper(__m512 x) {
    __m512i u = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
}

static inline void v_store_bf16(dsv4_bf16 *out, __m512 x) {
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    __m512i h = _mm512_mask_mov_epi32(_mm512_srli_epi32(round_upper(x), 16), nan,
                                      _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256((__m256i *)out, _mm512_cvtepi32_epi16(h));
}

/* +0 where |x| < 2^-95: where the upper three bits of the exponent are clear. */
static inline __m512 v_flush(__m512 x) {
    return _mm512_maskz_mov_ps(
        _mm512_test_epi32_mask(_mm512_castps_si512(x), _mm512_set1_epi32(0x70000000)), x);
}

/* 32 bf16 by rule 2. */
static inline __m512i operands(__m512i h) {
    __mmask32 keep = _mm512_cmpge_epu16_mask(_mm512_and_si512(h, _mm512_set1_epi16(0x7fff)),
                                             _mm512_set1_epi16(DSV4_TINY_BF16));
    return _mm512_mask_mov_epi16(_mm512_and_si512(h, _mm512_set1_epi16((short)0x8000)), keep, h);
}

/* r[i] = pair i of elements, as operands, of 16 rows of which the first n_row exist, n_pair <= 16
 * pairs each. */
static inline void transposed_pairs(__m512i r[16], const dsv4_bf16 *x, size_t ld, size_t n_row,
                                    size_t n_pair) {
    __mmask16 pairs = (__mmask16)(n_pair < 16 ? (1u << n_pair) - 1 : 0xffffu);
    for (size_t h = 0; h < 16; h++)
        r[h] = h < n_row ? operands(_mm512_maskz_loadu_epi32(pairs, x + h * ld))
                         : _mm512_setzero_si512();
    transpose_16x16(r);
}

static inline int fp8_has_nan(const uint8_t *codes) {
    __m512i magnitude = _mm512_and_si512(_mm512_loadu_si512(codes), _mm512_set1_epi8(0x7f));
    return _mm512_cmpeq_epi8_mask(magnitude, _mm512_set1_epi8(0x7f)) != 0;
}

#endif
