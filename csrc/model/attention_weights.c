/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The weights of attention, for traces alone: the kernel never holds them all.  The score of a key is that of the
 * kernel (rule 4 of kernels.h: the same chain, so the same bits); its weight is exp(score - m) / l with m the largest
 * score of all keys and l the sum of these exponentials and of exp(sink - m).  The kernel goes by blocks of 64 keys with
 * the largest score so far, and rounds exp(score - m) to bf16 before it multiplies the values: weights times values give
 * its output to within that rounding.
 */
#include <math.h>
#include <string.h>

#include "functions.h"
#include "model/sites.h"

enum { LANES = 16 };

/* q of up to LANES heads as operands, [D][LANES]; missing heads are zero. */
static void turn(float *q, const struct dsv4_attention_args *a, int32_t first) {
    for (int32_t d = 0; d < a->d_head; d++)
        for (int32_t i = 0; i < LANES; i++)
            q[d * LANES + i] = first + i < a->n_head
                                   ? dsv4_bf16_to_f32(dsv4_bf16_operand(a->q[(ptrdiff_t)(first + i) * a->d_head + d]))
                                   : 0.0f;
}

/* Scores of LANES heads for one key. */
static void score(float *s, const float *q, const float *k, const struct dsv4_attention_args *a) {
    float chain[LANES] = {0};
    for (int32_t d = 0; d < a->d_head; d += 2) {
        for (int32_t i = 0; i < LANES; i++)
            chain[i] = chain[i] + q[(d + 1) * LANES + i] * k[d + 1];
        for (int32_t i = 0; i < LANES; i++)
            chain[i] = chain[i] + q[d * LANES + i] * k[d];
    }
    for (int32_t i = 0; i < LANES; i++)
        s[i] = chain[i] * a->scale;
}

/* Scores of n ranks and the sink, in place, to weights. */
static void soften(float *sink, float *ranks, int32_t n) {
    float m = -INFINITY;
    for (int32_t j = 0; j < n; j++)
        m = ranks[j] > m ? ranks[j] : m;
    if (m == -INFINITY) { /* no key at all */
        memset(ranks, 0, (size_t)n * sizeof *ranks);
        *sink = 1.0f;
        return;
    }
    *sink = dsv4_expf(*sink - m);
    double sum = (double)*sink;
    for (int32_t j = 0; j < n; j++) {
        ranks[j] = dsv4_expf(ranks[j] - m);
        sum += (double)ranks[j];
    }
    *sink = (float)((double)*sink / sum);
    for (int32_t j = 0; j < n; j++)
        ranks[j] = (float)((double)ranks[j] / sum);
}

void dsv4_attention_weights(const dsv4_worker *w, const struct dsv4_pass *p, const struct dsv4_sight *s, float *out,
                            int32_t n_rank) {
    const struct dsv4_attention_args *a = s->attention;
    int32_t ld = 1 + p->m->config.sliding_window + n_rank;
    float *q = dsv4_scratch(w, p, p->ws->at_kernel), *k = q + (ptrdiff_t)a->d_head * LANES;
    dsv4_bf16 *row = (dsv4_bf16 *)(void *)(k + a->d_head);
    for (int32_t first = 0; first < a->n_head; first += LANES) {
        int32_t n = a->n_head - first < LANES ? a->n_head - first : LANES;
        float *heads = out + (ptrdiff_t)(s->h0 + first) * ld, scores[LANES];
        turn(q, a, first);
        for (int32_t j = 0; j < a->n_key; j++) {
            if (s->keys[j]) {
                p->m->k.kv_load(row, s->keys[j], a->format, a->d_head, a->d_rope);
                for (int32_t d = 0; d < a->d_head; d++)
                    k[d] = dsv4_bf16_to_f32(dsv4_bf16_operand(row[d]));
                score(scores, q, k, a);
            }
            for (int32_t i = 0; i < n; i++)
                heads[(ptrdiff_t)i * ld + 1 + j] = s->keys[j] ? scores[i] : -INFINITY;
        }
        for (int32_t i = 0; i < n; i++) {
            float *head = heads + (ptrdiff_t)i * ld;
            head[0] = a->sink[first + i];
            soften(head, head + 1, a->n_key);
            memset(head + 1 + a->n_key, 0, (size_t)(ld - 1 - a->n_key) * sizeof *head);
        }
    }
}
