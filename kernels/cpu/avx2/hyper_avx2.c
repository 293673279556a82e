/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The collapse of the residual streams and the spread of a result over them; AVX2.  The gates and
 * Sinkhorn are the portable code: at most 80 numbers a token.  Source: SPEC 2.2 to 2.4.
 */
#include "bf16_avx2.h"
#include "cpu/ref/hyper_gates.h"

static void dsv4k_hc_pre_avx2(const struct dsv4_hc_pre_args *a) {
    float pre[DSV4_HC_MAX];
    dsv4_hc_gates(pre, a, mean_square_avx2(a->streams, a->hc * a->d_model));
    for (int32_t c = 0; c < a->d_model; c += 8) {
        int32_t left = a->d_model - c;
        __m256 acc = _mm256_setzero_ps();
        for (int32_t j = 0; j < a->hc; j++) {
            __m256 x = load8(a->streams + (ptrdiff_t)j * a->d_model + c, left);
            acc = _mm256_fmadd_ps(_mm256_set1_ps(pre[j]), x, acc);
        }
        store8(a->x + c, acc, left);
    }
}

/* hc is a constant at the call that matters, so that the streams stay in registers. */
static inline void spread(const struct dsv4_hc_post_args *a, int32_t hc) {
    for (int32_t c = a->c0; c < a->c1; c += 8) {
        int32_t left = a->c1 - c;
        __m256 y = load8(a->y + c, left), stream[DSV4_HC_MAX];
        for (int32_t j = 0; j < hc; j++) /* all of the columns first: out may be streams */
            stream[j] = load8(a->streams + (ptrdiff_t)j * a->d_model + c, left);
        for (int32_t k = 0; k < hc; k++) {
            __m256 acc = _mm256_mul_ps(_mm256_set1_ps(a->post[k]), y);
            for (int32_t j = 0; j < hc; j++)
                acc = _mm256_fmadd_ps(_mm256_set1_ps(a->comb[j * hc + k]), stream[j], acc);
            store8(a->out + (ptrdiff_t)k * a->d_model + c, acc, left);
        }
    }
}

static void dsv4k_hc_post_avx2(const struct dsv4_hc_post_args *a) {
    if (a->hc == 4)
        spread(a, 4);
    else
        spread(a, a->hc);
}

const struct dsv4_variant dsv4k_avx2_hyper[] = {
    DSV4_VARIANT(hc_pre, dsv4k_hc_pre_avx2, "avx2", 0),
    DSV4_VARIANT(hc_post, dsv4k_hc_post_avx2, "avx2", 0),
    {NULL, NULL, 0, 0},
};
