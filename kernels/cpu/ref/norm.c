/* SPDX-License-Identifier: Apache-2.0 */
/* Mean square, the weighted norm and the norm of a query head, in portable C.  Source:
 * SPEC 2.5, 3.1. */
#include "kernels.h"
#include "lanes.h"

#include "functions.h"

static float dsv4k_mean_square_ref(const dsv4_bf16 *x, int32_t n) {
    return dsv4_ref_mean_square(x, n);
}

static void dsv4k_rmsnorm_ref(dsv4_bf16 *out, const dsv4_bf16 *x, const float *w, int32_t n,
                              float eps) {
    float r = dsv4_rsqrtf(dsv4_ref_mean_square(x, n) + eps);
    for (int32_t c = 0; c < n; c++)
        out[c] = dsv4_f32_to_bf16(w[c] * (dsv4_bf16_to_f32(x[c]) * r));
}

static float bf(float x) {
    return dsv4_bf16_to_f32(dsv4_f32_to_bf16(x));
}

static void dsv4k_headnorm_ref(dsv4_bf16 *x, int32_t n, float eps) {
    float lane[16] = {0};
    for (int32_t k = 0; k < n; k += 32) {
        for (int odd = 1; odd >= 0; odd--) {
            for (int i = 0; i < 16; i++) {
                int32_t at = k + 2 * i + odd;
                float v = at < n ? dsv4_bf16_to_f32(x[at]) : 0.0f;
                lane[i] += dsv4_f32_operand(bf(v * v));
            }
        }
    }
    float m = bf(dsv4_ref_tree(lane) / (float)n);
    float r = bf(1.0f / sqrtf(bf(m + bf(eps))));
    for (int32_t c = 0; c < n; c++)
        x[c] = dsv4_f32_to_bf16(dsv4_bf16_to_f32(x[c]) * r);
}

const struct dsv4_variant dsv4k_ref_norm[] = {
    DSV4_VARIANT(mean_square, dsv4k_mean_square_ref, "ref", 0),
    DSV4_VARIANT(rmsnorm, dsv4k_rmsnorm_ref, "ref", 0),
    DSV4_VARIANT(headnorm, dsv4k_headnorm_ref, "ref", 0),
    {NULL, NULL, 0, 0},
};
