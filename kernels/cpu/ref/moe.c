/* SPDX-License-Identifier: Apache-2.0 */
/* The router's choice, the gated activation of an expert and the sum over experts.  Source: SPEC 4.
 */
#include "functions.h"
#include "router_pick.h"

#include <assert.h>

static void dsv4k_router_ref(const struct dsv4_router_args *a) {
    assert(a->top_k >= 1 && a->top_k <= a->n_exp);
    for (int32_t e = 0; e < a->n_exp; e++)
        a->scores[e] = sqrtf(dsv4_softplusf(a->logits[e]));
    dsv4_router_pick(a);
}

static void dsv4k_swiglu_ref(dsv4_bf16 *out, const dsv4_bf16 *g, const dsv4_bf16 *u, int32_t n,
                             float limit, float weight) {
    for (int32_t i = 0; i < n; i++) {
        float gate = dsv4_bf16_to_f32(g[i]), up = dsv4_bf16_to_f32(u[i]);
        gate = gate > limit ? limit : gate; /* comparisons with NaN are false: it passes */
        up = up > limit ? limit : up < -limit ? -limit : up;
        float silu = gate / (1.0f + dsv4_expf(-gate));
        out[i] = dsv4_f32_to_bf16(weight * (silu * up));
    }
}

static void dsv4k_expert_sum_ref(dsv4_bf16 *out, const dsv4_bf16 *const *rows, int32_t n_row,
                                 int32_t n) {
    for (int32_t c = 0; c < n; c++) {
        float acc = 0.0f;
        for (int32_t r = 0; r < n_row; r++)
            acc += dsv4_bf16_to_f32(rows[r][c]);
        out[c] = dsv4_f32_to_bf16(acc);
    }
}

const struct dsv4_variant dsv4k_ref_moe[] = {
    DSV4_VARIANT(router, dsv4k_router_ref, "ref", 0),
    DSV4_VARIANT(swiglu, dsv4k_swiglu_ref, "ref", 0),
    DSV4_VARIANT(expert_sum, dsv4k_expert_sum_ref, "ref", 0),
    {NULL, NULL, 0, 0},
};
