/* SPDX-License-Identifier: Apache-2.0 */
/* The choice of experts and their weights from the scores; every instruction set uses it as it is.
 * SPEC 4.1. */
#ifndef DSV4_ROUTER_PICK_H
#define DSV4_ROUTER_PICK_H

#include "kernels.h"

/* Whether expert i with key a comes before expert j with key b: higher first, NaN last, then the
 * lower id. */
static inline int dsv4_router_before(float a, int32_t i, float b, int32_t j) {
    if (a > b || (a == a && b != b))
        return 1;
    if (a < b || (a != a && b == b))
        return 0;
    return i < j;
}

/* a->scores is filled; each pick is the first expert of the order that comes after the pick before
 * it. */
static inline void dsv4_router_pick(const struct dsv4_router_args *a) {
    const float *s = a->scores;
    float last = 0.0f;
    for (int32_t j = 0; j < a->top_k; j++) {
        if (a->forced) {
            a->ids[j] = a->forced[j];
            continue;
        }
        int32_t best = -1;
        float best_key = 0.0f;
        for (int32_t e = 0; e < a->n_exp; e++) {
            float key = a->bias ? s[e] + a->bias[e] : s[e];
            if (best >= 0 && !dsv4_router_before(key, e, best_key, best))
                continue;
            if (j > 0 && !dsv4_router_before(last, a->ids[j - 1], key, e))
                continue;
            best = e;
            best_key = key;
        }
        a->ids[j] = best;
        last = best_key;
    }
    float sum = 0.0f;
    for (int32_t j = 0; j < a->top_k; j++)
        sum += s[a->ids[j]];
    for (int32_t j = 0; j < a->top_k; j++)
        a->weights[j] = s[a->ids[j]] / sum * a->route_scale;
}

#endif
