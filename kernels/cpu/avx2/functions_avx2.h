/* SPDX-License-Identifier: Apache-2.0 */
/*
 * functions.h in eight lanes: the same operations, the same bits.  Arithmetic runs on arguments
 * clamped to the range where the scalar function computes; the other cases are blended in
 * afterwards.
 */
#ifndef DSV4_FUNCTIONS_AVX2_H
#define DSV4_FUNCTIONS_AVX2_H

#include "functions.h"

#include <immintrin.h>

static inline __m256 dsv4_exp_avx2(__m256 x) {
    const __m256 high = _mm256_set1_ps(DSV4_EXP_HIGH), low = _mm256_set1_ps(DSV4_EXP_LOW);
    const __m256 magic = _mm256_set1_ps(DSV4_ROUND_F32), one = _mm256_set1_ps(1.0f);
    __m256 over = _mm256_cmp_ps(x, high, _CMP_GT_OQ), under = _mm256_cmp_ps(x, low, _CMP_LT_OQ);
    __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    __m256 y = _mm256_min_ps(_mm256_max_ps(x, low), high); /* NaN becomes low */
    __m256 t = _mm256_fmadd_ps(y, _mm256_set1_ps(DSV4_LOG2E), magic), n = _mm256_sub_ps(t, magic);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(DSV4_LN2_HIGH), y);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(DSV4_LN2_LOW), r);
    __m256 p = _mm256_set1_ps(DSV4_EXP_C4);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(DSV4_EXP_C3));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(DSV4_EXP_C2));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(DSV4_EXP_C1));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(DSV4_EXP_C0));
    p = _mm256_fmadd_ps(p, r, one);
    p = _mm256_fmadd_ps(p, r, one);
    __m256i e = _mm256_slli_epi32(_mm256_castps_si256(t), 23);
    p = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), e));
    p = _mm256_andnot_ps(under, p);
    p = _mm256_blendv_ps(p, _mm256_castsi256_ps(_mm256_set1_epi32((int)DSV4_INF_BITS)), over);
    return _mm256_blendv_ps(p, _mm256_castsi256_ps(_mm256_set1_epi32((int)DSV4_NAN_BITS)), nan);
}

static inline __m256 dsv4_sigmoid_avx2(__m256 x) {
    const __m256 one = _mm256_set1_ps(1.0f);
    __m256 minus = _mm256_xor_ps(x, _mm256_set1_ps(-0.0f));
    return _mm256_div_ps(one, _mm256_add_ps(one, dsv4_exp_avx2(minus)));
}

/* dsv4_log1p_core: finite x > -1. */
static inline __m256 dsv4_log1p_core_avx2(__m256 x) {
    __m256i u = _mm256_castps_si256(_mm256_add_ps(_mm256_set1_ps(1.0f), x));
    __m256i e = _mm256_and_si256(_mm256_sub_epi32(u, _mm256_set1_epi32(0x3f400000)),
                                 _mm256_set1_epi32((int)0xff800000u));
    __m256 quarter = _mm256_castsi256_ps(_mm256_sub_epi32(_mm256_set1_epi32(0x40800000), e));
    __m256 f =
        _mm256_add_ps(_mm256_castsi256_ps(_mm256_sub_epi32(_mm256_castps_si256(x), e)),
                      _mm256_fmadd_ps(_mm256_set1_ps(0.25f), quarter, _mm256_set1_ps(-1.0f)));
    __m256 k = _mm256_cvtepi32_ps(_mm256_srai_epi32(e, 23));
    __m256 p = _mm256_set1_ps(DSV4_LOG_C8);
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(DSV4_LOG_C7));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(DSV4_LOG_C6));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(DSV4_LOG_C5));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(DSV4_LOG_C4));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(DSV4_LOG_C3));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(DSV4_LOG_C2));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(DSV4_LOG_C1));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(DSV4_LOG_C0));
    return _mm256_fmadd_ps(k, _mm256_set1_ps(DSV4_LN2), _mm256_fmadd_ps(_mm256_mul_ps(f, f), p, f));
}

static inline __m256 dsv4_softplus_avx2(__m256 x) {
    const __m256 edge = _mm256_set1_ps(20.0f);
    __m256 linear = _mm256_cmp_ps(x, edge, _CMP_GT_OQ), nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    __m256 tiny = _mm256_cmp_ps(x, _mm256_set1_ps(DSV4_EXP_LOW), _CMP_LT_OQ);
    __m256 y = _mm256_min_ps(x, edge); /* NaN becomes 20 */
    y = dsv4_exp_avx2(_mm256_blendv_ps(y, _mm256_mul_ps(y, _mm256_set1_ps(0.5f)), tiny));
    __m256 square = _mm256_mul_ps(y, y);
    y = _mm256_blendv_ps(dsv4_log1p_core_avx2(y), square, tiny);
    y = _mm256_blendv_ps(y, x, linear);
    return _mm256_blendv_ps(y, _mm256_castsi256_ps(_mm256_set1_epi32((int)DSV4_NAN_BITS)), nan);
}

#endif
