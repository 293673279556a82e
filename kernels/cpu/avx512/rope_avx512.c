/* SPDX-License-Identifier: Apache-2.0 */
/* Rotary position embedding, sixteen pairs at a time; AVX-512.  Source: SPEC 3.2. */
#include "bf16_avx512.h"

static void dsv4k_rope_avx512(dsv4_bf16 *x, const float *cos, const float *sin, int32_t n_pair,
                              int32_t inverse) {
    const __m512 sign = _mm512_set1_ps(inverse ? -0.0f : 0.0f);
    for (int32_t i = 0; i < n_pair; i += 16) {
        int32_t left = n_pair - i;
        __m512i pairs = load32(x + 2 * i, 2 * left);
        __m512 a = evens(pairs), b = odds(pairs), c = load16_f32(cos + i, left);
        __m512 s = _mm512_xor_ps(load16_f32(sin + i, left), sign);
        __m512 even = _mm512_sub_ps(_mm512_mul_ps(a, c), _mm512_mul_ps(b, s));
        __m512 odd = _mm512_add_ps(_mm512_mul_ps(a, s), _mm512_mul_ps(b, c));
        __m512i upper = _mm512_and_si512(round16(odd), _mm512_set1_epi32((int)0xffff0000u));
        __m512i both = _mm512_or_si512(upper, _mm512_srli_epi32(round16(even), 16));
        store32(x + 2 * i, both, 2 * left);
    }
}

const struct dsv4_variant dsv4k_avx512_rope[] = {
    DSV4_VARIANT(rope, dsv4k_rope_avx512, "avx512", 0),
    {NULL, NULL, 0, 0},
};
