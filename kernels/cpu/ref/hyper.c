/* SPDX-License-Identifier: Apache-2.0 */
/* The collapse of the residual streams into one and the spread of a result over them.  Source:
 * SPEC 2.2 to 2.4. */
#include "hyper_gates.h"
#include "lanes.h"

#include <assert.h>

static void dsv4k_hc_pre_ref(const struct dsv4_hc_pre_args *a) {
    float pre[DSV4_HC_MAX];
    assert(a->hc >= 1 && a->hc <= DSV4_HC_MAX);
    dsv4_hc_gates(pre, a, dsv4_ref_mean_square(a->streams, a->hc * a->d_model));
    for (int32_t c = 0; c < a->d_model; c++) {
        float acc = 0.0f;
        for (int32_t j = 0; j < a->hc; j++)
            acc = fmaf(pre[j], dsv4_bf16_to_f32(a->streams[(ptrdiff_t)j * a->d_model + c]), acc);
        a->x[c] = dsv4_f32_to_bf16(acc);
    }
}

static void dsv4k_hc_post_ref(const struct dsv4_hc_post_args *a) {
    float stream[DSV4_HC_MAX];
    assert(a->hc >= 1 && a->hc <= DSV4_HC_MAX);
    for (int32_t c = a->c0; c < a->c1; c++) {
        for (int32_t j = 0; j < a->hc; j++) /* all of the column first: out may be streams */
            stream[j] = dsv4_bf16_to_f32(a->streams[(ptrdiff_t)j * a->d_model + c]);
        for (int32_t k = 0; k < a->hc; k++) {
            float acc = a->post[k] * dsv4_bf16_to_f32(a->y[c]);
            for (int32_t j = 0; j < a->hc; j++)
                acc = fmaf(a->comb[j * a->hc + k], stream[j], acc);
            a->out[(ptrdiff_t)k * a->d_model + c] = dsv4_f32_to_bf16(acc);
        }
    }
}

const struct dsv4_variant dsv4k_ref_hyper[] = {
    DSV4_VARIANT(hc_pre, dsv4k_hc_pre_ref, "ref", 0),
    DSV4_VARIANT(hc_post, dsv4k_hc_post_ref, "ref", 0),
    {NULL, NULL, 0, 0},
};
