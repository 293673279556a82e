/* SPDX-License-Identifier: Apache-2.0 */
/* The router's scores, the gated activation of an expert, the sum over experts; AVX-512.  SPEC 4.
 */
#include "bf16_avx512.h"
#include "cpu/ref/router_pick.h"
#include "functions_avx512.h"

static void dsv4k_router_avx512(const struct dsv4_router_args *a) {
    for (int32_t e = 0; e < a->n_exp; e += 16) {
        __m512 s = _mm512_sqrt_ps(dsv4_softplus_avx512(load16_f32(a->logits + e, a->n_exp - e)));
        _mm512_mask_storeu_ps(a->scores + e, first16(a->n_exp - e), s);
    }
    dsv4_router_pick(a);
}

static void dsv4k_swiglu_avx512(dsv4_bf16 *out, const dsv4_bf16 *g, const dsv4_bf16 *u, int32_t n,
                                float limit, float weight) {
    const __m512 high = _mm512_set1_ps(limit), low = _mm512_set1_ps(-limit);
    const __m512 one = _mm512_set1_ps(1.0f), minus = _mm512_set1_ps(-0.0f);
    for (int32_t i = 0; i < n; i += 16) {
        __m512 gate = _mm512_min_ps(high, load16(g + i, n - i)); /* the second operand if NaN */
        __m512 up = _mm512_max_ps(low, _mm512_min_ps(high, load16(u + i, n - i)));
        __m512 e = dsv4_exp_avx512(_mm512_xor_ps(gate, minus));
        __m512 h = _mm512_mul_ps(_mm512_div_ps(gate, _mm512_add_ps(one, e)), up);
        store16(out + i, _mm512_mul_ps(_mm512_set1_ps(weight), h), n - i);
    }
}

static void dsv4k_expert_sum_avx512(dsv4_bf16 *out, const dsv4_bf16 *const *rows, int32_t n_row,
                                    int32_t n) {
    for (int32_t c = 0; c < n; c += 16) {
        __m512 acc = _mm512_setzero_ps();
        for (int32_t r = 0; r < n_row; r++)
            acc = _mm512_add_ps(acc, load16(rows[r] + c, n - c));
        store16(out + c, acc, n - c);
    }
}

const struct dsv4_variant dsv4k_avx512_moe[] = {
    DSV4_VARIANT(router, dsv4k_router_avx512, "avx512", 0),
    DSV4_VARIANT(swiglu, dsv4k_swiglu_avx512, "avx512", 0),
    DSV4_VARIANT(expert_sum, dsv4k_expert_sum_avx512, "avx512", 0),
    {NULL, NULL, 0, 0},
};
