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

static inline float dsv4_router_key(const struct dsv4_router_args *a, int32_t e) {
    return a->bias ? a->scores[e] + a->bias[e] : a->scores[e];
}

/* Puts expert e into the sorted list of the `held` best so far; returns the new length. */
static inline int32_t dsv4_router_offer(const struct dsv4_router_args *a, int32_t held, int32_t e) {
    float key = dsv4_router_key(a, e);
    int32_t at = held;
    while (at > 0 && dsv4_router_before(key, e, dsv4_router_key(a, a->ids[at - 1]), a->ids[at - 1]))
        at--;
    if (at == a->top_k)
        return held;
    int32_t last = held < a->top_k ? held : a->top_k - 1;
    memmove(a->ids + at + 1, a->ids + at, (size_t)(last - at) * sizeof *a->ids);
    a->ids[at] = e;
    return last + 1;
}

/* ids and weights of one token; a->scores is filled. */
static inline void dsv4_router_pick(const struct dsv4_router_args *a) {
    if (a->forced) {
        memcpy(a->ids, a->forced, (size_t)a->top_k * sizeof *a->ids);
    } else {
        int32_t held = 0;
        for (int32_t e = 0; e < a->n_exp; e++)
            held = dsv4_router_offer(a, held, e);
    }
    float sum = 0.0f;
    for (int32_t j = 0; j < a->top_k; j++)
        sum += a->scores[a->ids[j]];
    for (int32_t j = 0; j < a->top_k; j++)
        a->weights[j] = a->scores[a->ids[j]] / sum * a->route_scale;
}

#endif
