/* SPDX-License-Identifier: Apache-2.0 */
/* Mean square, the weighted norm and the norm of a query head; AVX-512.  Source: SPEC 2.5, 3.1. */
#include "bf16_avx512.h"

#include "functions.h"

static float dsv4k_mean_square_avx512(const dsv4_bf16 *x, int32_t n) {
    return mean_square_avx512(x, n);
}

static void dsv4k_rmsnorm_avx512(dsv4_bf16 *out, const dsv4_bf16 *x, const float *w, int32_t n,
                                 float eps) {
    __m512 r = _mm512_set1_ps(dsv4_rsqrtf(mean_square_avx512(x, n) + eps));
    for (int32_t c = 0; c < n; c += 16) {
        __m512 y = _mm512_mul_ps(load16(x + c, n - c), r);
        store16(out + c, _mm512_mul_ps(load16_f32(w + c, n - c), y), n - c);
    }
}

/* Adds bf16(x * x), operands of rule 2, to the lanes. */
static __m512 add_square(__m512 acc, __m512 x) {
    __m512 s = rounded16(_mm512_mul_ps(x, x));
    __mmask16 counts = _mm512_cmpge_epu32_mask(
        _mm512_castps_si512(s), _mm512_set1_epi32(DSV4_TINY_F32)); /* a sign has only a NaN */
    return _mm512_mask_add_ps(acc, counts, acc, s);
}

static float bf(float x) {
    return dsv4_bf16_to_f32(dsv4_f32_to_bf16(x));
}

static void dsv4k_headnorm_avx512(dsv4_bf16 *x, int32_t n, float eps) {
    __m512 acc = _mm512_setzero_ps();
    for (int32_t k = 0; k < n; k += 32) {
        __m512i pairs = load32(x + k, n - k);
        acc = add_square(add_square(acc, odds(pairs)), evens(pairs));
    }
    float m = bf(tree16(acc) / (float)n);
    __m512 r = _mm512_set1_ps(bf(1.0f / sqrtf(bf(m + bf(eps)))));
    for (int32_t c = 0; c < n; c += 16)
        store16(x + c, _mm512_mul_ps(load16(x + c, n - c), r), n - c);
}

const struct dsv4_variant dsv4k_avx512_norm[] = {
    DSV4_VARIANT(mean_square, dsv4k_mean_square_avx512, "avx512", 0),
    DSV4_VARIANT(rmsnorm, dsv4k_rmsnorm_avx512, "avx512", 0),
    DSV4_VARIANT(headnorm, dsv4k_headnorm_avx512, "avx512", 0),
    {NULL, NULL, 0, 0},
};
