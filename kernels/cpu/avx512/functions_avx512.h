/* SPDX-License-Identifier: Apache-2.0 */
/*
 * functions.h in sixteen lanes: the same operations, the same bits.  Arithmetic runs on arguments
 * clamped to the range where the scalar function computes; the other cases are blended in
 * afterwards.
 */
#ifndef DSV4_FUNCTIONS_AVX512_H
#define DSV4_FUNCTIONS_AVX512_H

#include "functions.h"

#include <immintrin.h>

static inline __m512 dsv4_exp_avx512(__m512 x) {
    const __m512 high = _mm512_set1_ps(DSV4_EXP_HIGH), low = _mm512_set1_ps(DSV4_EXP_LOW);
    const __m512 magic = _mm512_set1_ps(DSV4_ROUND_F32), one = _mm512_set1_ps(1.0f);
    __mmask16 over = _mm512_cmp_ps_mask(x, high, _CMP_GT_OQ),
              in = _mm512_cmp_ps_mask(x, low, _CMP_NLT_UQ);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    __m512 y = _mm512_min_ps(_mm512_max_ps(x, low), high); /* NaN becomes low */
    __m512 t = _mm512_fmadd_ps(y, _mm512_set1_ps(DSV4_LOG2E), magic), n = _mm512_sub_ps(t, magic);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(DSV4_LN2_HIGH), y);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(DSV4_LN2_LOW), r);
    __m512 p = _mm512_set1_ps(DSV4_EXP_C4);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(DSV4_EXP_C3));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(DSV4_EXP_C2));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(DSV4_EXP_C1));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(DSV4_EXP_C0));
    p = _mm512_fmadd_ps(p, r, one);
    p = _mm512_fmadd_ps(p, r, one);
    __m512i e = _mm512_slli_epi32(_mm512_castps_si512(t), 23);
    p = _mm512_castsi512_ps(_mm512_maskz_add_epi32(in, _mm512_castps_si512(p), e));
    p = _mm512_mask_mov_ps(p, over, _mm512_castsi512_ps(_mm512_set1_epi32((int)DSV4_INF_BITS)));
    return _mm512_mask_mov_ps(p, nan, _mm512_castsi512_ps(_mm512_set1_epi32((int)DSV4_NAN_BITS)));
}

static inline __m512 dsv4_sigmoid_avx512(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    __m512 minus =
        _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(x), _mm512_set1_epi32(INT32_MIN)));
    return _mm512_div_ps(one, _mm512_add_ps(one, dsv4_exp_avx512(minus)));
}

/* dsv4_log1p_core: finite x > -1. */
static inline __m512 dsv4_log1p_core_avx512(__m512 x) {
    __m512i u = _mm512_castps_si512(_mm512_add_ps(_mm512_set1_ps(1.0f), x));
    __m512i e = _mm512_and_si512(_mm512_sub_epi32(u, _mm512_set1_epi32(0x3f400000)),
                                 _mm512_set1_epi32((int)0xff800000u));
    __m512 quarter = _mm512_castsi512_ps(_mm512_sub_epi32(_mm512_set1_epi32(0x40800000), e));
    __m512 f =
        _mm512_add_ps(_mm512_castsi512_ps(_mm512_sub_epi32(_mm512_castps_si512(x), e)),
                      _mm512_fmadd_ps(_mm512_set1_ps(0.25f), quarter, _mm512_set1_ps(-1.0f)));
    __m512 k = _mm512_cvtepi32_ps(_mm512_srai_epi32(e, 23));
    __m512 p = _mm512_set1_ps(DSV4_LOG_C8);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(DSV4_LOG_C7));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(DSV4_LOG_C6));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(DSV4_LOG_C5));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(DSV4_LOG_C4));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(DSV4_LOG_C3));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(DSV4_LOG_C2));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(DSV4_LOG_C1));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(DSV4_LOG_C0));
    return _mm512_fmadd_ps(k, _mm512_set1_ps(DSV4_LN2), _mm512_fmadd_ps(_mm512_mul_ps(f, f), p, f));
}

static inline __m512 dsv4_softplus_avx512(__m512 x) {
    const __m512 edge = _mm512_set1_ps(20.0f);
    __mmask16 linear = _mm512_cmp_ps_mask(x, edge, _CMP_GT_OQ),
              nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    __mmask16 tiny = _mm512_cmp_ps_mask(x, _mm512_set1_ps(DSV4_EXP_LOW), _CMP_LT_OQ);
    __m512 y = _mm512_min_ps(x, edge); /* NaN becomes 20 */
    y = _mm512_mask_mul_ps(y, tiny, y, _mm512_set1_ps(0.5f));
    y = dsv4_exp_avx512(y);
    y = _mm512_mask_mul_ps(y, tiny, y, y);
    y = _mm512_mask_mov_ps(dsv4_log1p_core_avx512(y), tiny, y);
    y = _mm512_mask_mov_ps(y, linear, x);
    return _mm512_mask_mov_ps(y, nan, _mm512_castsi512_ps(_mm512_set1_epi32((int)DSV4_NAN_BITS)));
}

#endif
