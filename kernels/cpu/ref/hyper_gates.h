/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The small part of the hyper-connection collapse, at most 80 numbers a token: from the 24
 * projections to the gates pre and post and the doubly stochastic comb.  Every instruction set uses
 * it as it is.  Source: SPEC 2.2 steps 3-7.
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

/*
 * pre [hc] from the mean square of the streams; post and comb of `a` unless this is the head's collapse.  pre is
 * evaluated in double and rounded once: it decides the roundings of everything a sublayer reads.
 */
static inline void dsv4_hc_gates(float pre[DSV4_HC_MAX], const struct dsv4_hc_pre_args *a,
                                 float mean_square) {
    int32_t hc = a->hc;
    float r = 1.0f / sqrtf(mean_square + a->norm_eps);
    double r_wide = 1.0 / sqrt((double)mean_square + (double)a->norm_eps);
    for (int32_t j = 0; j < hc; j++) {
        double z = a->dots[j] * r_wide * a->scale[0] + a->base[j];
        pre[j] = (float)(1.0 / (1.0 + dsv4_exp(-z)) + (double)a->hc_eps);
    }
    for (int32_t j = 0; a->pre && j < hc; j++)
        a->pre[j] = pre[j];
    if (!a->post)
        return;
    for (int32_t j = 0; j < hc; j++)
        a->post[j] = 2.0f * dsv4_sigmoidf(a->dots[hc + j] * r * a->scale[1] + a->base[hc + j]);
    for (int32_t j = 0; j < hc * hc; j++)
        a->comb[j] = a->dots[2 * hc + j] * r * a->scale[2] + a->base[2 * hc + j];
    dsv4_sinkhorn(a->comb, hc, a->sinkhorn_iters, a->hc_eps);
}

#endif
