/* SPDX-License-Identifier: Apache-2.0 */
/* Mean square, the weighted norm and the norm of a query head; AVX2.  Source: SPEC 2.5, 3.1. */
#include "bf16_avx2.h"

#include "functions.h"

static float dsv4k_mean_square_avx2(const dsv4_bf16 *x, int32_t n) {
    return mean_square_avx2(x, n);
}

static void dsv4k_rmsnorm_avx2(dsv4_bf16 *out, const dsv4_bf16 *x, const float *w, int32_t n,
                               float eps) {
    __m256 r = _mm256_set1_ps(dsv4_rsqrtf(mean_square_avx2(x, n) + eps));
    for (int32_t c = 0; c < n; c += 8) {
        __m256 y = _mm256_mul_ps(load8(x + c, n - c), r);
        store8(out + c, _mm256_mul_ps(load8_f32(w + c, n - c), y), n - c);
    }
}

/* Adds bf16(x * x), operands of rule 2, to the lanes. */
static __m256 add_square(__m256 acc, __m256 x) {
    __m256 s = rounded8(_mm256_mul_ps(x, x));
    __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(s), _mm256_set1_epi32(0x7fffffff));
    __m256i counts = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(DSV4_TINY_F32 - 1));
    /* a lane at -0 cannot be: it starts at +0, so adding +0 leaves it */
    return _mm256_add_ps(acc, _mm256_and_ps(s, _mm256_castsi256_ps(counts)));
}

static float bf(float x) {
    return dsv4_bf16_to_f32(dsv4_f32_to_bf16(x));
}

static void dsv4k_headnorm_avx2(dsv4_bf16 *x, int32_t n, float eps) {
    __m256 low = _mm256_setzero_ps(), high = low;
    for (int32_t k = 0; k < n; k += 32) {
        __m256i pairs = load16(x + k, n - k);
        low = add_square(add_square(low, odds(pairs)), evens(pairs));
        if (n - k <= 16)
            break;
        pairs = load16(x + k + 16, n - k - 16);
        high = add_square(add_square(high, odds(pairs)), evens(pairs));
    }
    float m = bf(tree8(low, high) / (float)n);
    __m256 r = _mm256_set1_ps(bf(1.0f / sqrtf(bf(m + bf(eps)))));
    for (int32_t c = 0; c < n; c += 8)
        store8(x + c, _mm256_mul_ps(load8(x + c, n - c), r), n - c);
}

const struct dsv4_variant dsv4k_avx2_norm[] = {
    DSV4_VARIANT(mean_square, dsv4k_mean_square_avx2, "avx2", 0),
    DSV4_VARIANT(rmsnorm, dsv4k_rmsnorm_avx2, "avx2", 0),
    DSV4_VARIANT(headnorm, dsv4k_headnorm_avx2, "avx2", 0),
    {NULL, NULL, 0, 0},
};
