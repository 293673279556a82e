/* SPDX-License-Identifier: Apache-2.0 */
/* Rotary position embedding, eight pairs at a time; AVX2.  Source: SPEC 3.2. */
#include "bf16_avx2.h"

static void dsv4k_rope_avx2(dsv4_bf16 *x, const float *cos, const float *sin, int32_t n_pair,
                            int32_t inverse) {
    const __m256 sign = _mm256_set1_ps(inverse ? -0.0f : 0.0f);
    for (int32_t i = 0; i < n_pair; i += 8) {
        int32_t left = n_pair - i;
        __m256i pairs = load16(x + 2 * i, 2 * left);
        __m256 a = evens(pairs), b = odds(pairs), c = load8_f32(cos + i, left);
        __m256 s = _mm256_xor_ps(load8_f32(sin + i, left), sign);
        __m256 even = _mm256_sub_ps(_mm256_mul_ps(a, c), _mm256_mul_ps(b, s));
        __m256 odd = _mm256_add_ps(_mm256_mul_ps(a, s), _mm256_mul_ps(b, c));
        __m256i both = _mm256_blend_epi16(_mm256_srli_epi32(round8(even), 16), round8(odd), 0xaa);
        store16(x + 2 * i, both, 2 * left);
    }
}

const struct dsv4_variant dsv4k_avx2_rope[] = {
    DSV4_VARIANT(rope, dsv4k_rope_avx2, "avx2", 0),
    {NULL, NULL, 0, 0},
};
