/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The small part of the hyper-connection collapse, at most 80 numbers a token: from the 24
 * projections to the gates pre and post and the doubly stochastic comb.  Every instruction set uses
 * it as it is; the CUDA kernels use the gates and have a Sinkhorn of their own, an entry per thread.
 * Source: SPEC 2.2 steps 3-7.
 */
#ifndef DSV4_HYPER_GATES_H
#define DSV4_HYPER_GATES_H

#include "functions.h"
#include "kernels.h"

enum { DSV4_HC_MAX = 8 };

/* Row softmax (+ eps), then column and row divisions in turn; the last step is a column step. */
static inline void dsv4_sinkhorn(float *comb, int32_t hc, int32_t iters, float eps) {
    for (int32_t j = 0; j < hc; j++) {
        float *row = comb + j * hc, top = row[0], sum = 0.0f;
        for (int32_t k = 1; k < hc; k++)
            if (row[k] > top)
                top = row[k];
        for (int32_t k = 0; k < hc; k++) {
            row[k] = dsv4_expf(row[k] - top);
            sum += row[k];
        }
        for (int32_t k = 0; k < hc; k++)
            row[k] = row[k] / sum + eps;
    }
    for (int32_t step = 0; step < 2 * iters - 1; step++) { /* even: columns, odd: rows */
        int32_t along = step % 2 ? 1 : hc, across = step % 2 ? hc : 1;
        for (int32_t line = 0; line < hc; line++) {
            float *first = comb + line * across, sum = 0.0f;
            for (int32_t k = 0; k < hc; k++)
                sum += first[k * along];
            sum += eps;
            for (int32_t k = 0; k < hc; k++)
                first[k * along] /= sum;
        }
    }
}

/* One entry of pre; the mixed projection m * scale + base that post and comb start from; one entry
 * of post. */
DSV4_INLINE float dsv4_hc_pre_gate(float dot, double r_wide, float scale, float base,
                                   float eps) {
    double z = dot * r_wide * scale + base;
    return (float)(1.0 / (1.0 + dsv4_exp(-z)) + (double)eps);
}

DSV4_INLINE float dsv4_hc_mix(float dot, float r, float scale, float base) {
    return dot * r * scale + base;
}

DSV4_INLINE float dsv4_hc_post_gate(float mix) {
    return 2.0f * dsv4_sigmoidf(mix);
}

DSV4_INLINE float dsv4_hc_r(float mean_square, float eps) {
    return 1.0f / sqrtf(mean_square + eps);
}

DSV4_INLINE double dsv4_hc_r_wide(float mean_square, float eps) {
    return 1.0 / sqrt((double)mean_square + (double)eps);
}

/*
 * pre [hc] from the mean square of the streams; post and comb of `a` unless this is the head's collapse.  pre is
 * evaluated in double and rounded once: it decides the roundings of everything a sublayer reads.
 */
static inline void dsv4_hc_gates(float pre[DSV4_HC_MAX], const struct dsv4_hc_pre_args *a,
                                 float mean_square) {
    int32_t hc = a->hc;
    float r = dsv4_hc_r(mean_square, a->norm_eps);
    double r_wide = dsv4_hc_r_wide(mean_square, a->norm_eps);
    for (int32_t j = 0; j < hc; j++)
        pre[j] = dsv4_hc_pre_gate(a->dots[j], r_wide, a->scale[0], a->base[j], a->hc_eps);
    for (int32_t j = 0; a->pre && j < hc; j++)
        a->pre[j] = pre[j];
    if (!a->post)
        return;
    for (int32_t j = 0; j < hc; j++)
        a->post[j] =
            dsv4_hc_post_gate(dsv4_hc_mix(a->dots[hc + j], r, a->scale[1], a->base[hc + j]));
    for (int32_t j = 0; j < hc * hc; j++)
        a->comb[j] = dsv4_hc_mix(a->dots[2 * hc + j], r, a->scale[2], a->base[2 * hc + j]);
    dsv4_sinkhorn(a->comb, hc, a->sinkhorn_iters, a->hc_eps);
}

#endif
