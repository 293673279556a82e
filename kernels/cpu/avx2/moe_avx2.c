/* SPDX-License-Identifier: Apache-2.0 */
/* The router's scores, the gated activation of an expert, the sum over experts; AVX2.  SPEC 4. */
#include "bf16_avx2.h"
#include "cpu/ref/router_pick.h"
#include "functions_avx2.h"

static void dsv4k_router_avx2(const struct dsv4_router_args *a) {
    for (int32_t e = 0; e < a->n_exp; e += 8) {
        int32_t left = a->n_exp - e;
        __m256 s = _mm256_sqrt_ps(dsv4_softplus_avx2(load8_f32(a->logits + e, left)));
        store8_f32(a->scores + e, s, left);
    }
    dsv4_router_pick(a);
}

static void dsv4k_swiglu_avx2(dsv4_bf16 *out, const dsv4_bf16 *g, const dsv4_bf16 *u, int32_t n,
                              float limit, float weight) {
    const __m256 high = _mm256_set1_ps(limit), low = _mm256_set1_ps(-limit);
    const __m256 one = _mm256_set1_ps(1.0f), minus = _mm256_set1_ps(-0.0f);
    for (int32_t i = 0; i < n; i += 8) {
        __m256 gate = _mm256_min_ps(high, load8(g + i, n - i)); /* the second operand if NaN */
        __m256 up = _mm256_max_ps(low, _mm256_min_ps(high, load8(u + i, n - i)));
        __m256 e = dsv4_exp_avx2(_mm256_xor_ps(gate, minus));
        __m256 h = _mm256_mul_ps(_mm256_div_ps(gate, _mm256_add_ps(one, e)), up);
        store8(out + i, _mm256_mul_ps(_mm256_set1_ps(weight), h), n - i);
    }
}

static void dsv4k_expert_sum_avx2(dsv4_bf16 *out, const dsv4_bf16 *const *rows, int32_t n_row,
                                  int32_t n) {
    for (int32_t c = 0; c < n; c += 8) {
        __m256 acc = _mm256_setzero_ps();
        for (int32_t r = 0; r < n_row; r++)
            acc = _mm256_add_ps(acc, load8(rows[r] + c, n - c));
        store8(out + c, acc, n - c);
    }
}

const struct dsv4_variant dsv4k_avx2_moe[] = {
    DSV4_VARIANT(router, dsv4k_router_avx2, "avx2", 0),
    DSV4_VARIANT(swiglu, dsv4k_swiglu_avx2, "avx2", 0),
    DSV4_VARIANT(expert_sum, dsv4k_expert_sum_avx2, "avx2", 0),
    {NULL, NULL, 0, 0},
};
