/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention of one token over an ordered list of KV rows, portable C: the definition of the bits
 * (SPEC 3.8, contract at dsv4_attention_args).  A lane per head for the scores, a lane per
 * dimension for the values; no reduction crosses lanes but the denominator's tree.
 */
#include <assert.h>
#include <math.h>
#include <string.h>

#include "functions.h"
#include "kernels.h"

enum { BLOCK = 64, LANES = 16 };

/* How the scratch is cut; heads and dims are n_head and d_head rounded up to whole lanes. */
struct work {
    float *q;         /* [d_head][heads], operands */
    float *acc;       /* [n_head][dims] */
    float *k;         /* [BLOCK][dims], operands; masked ranks +0 */
    float *p;         /* [BLOCK][heads], scores, then P */
    float *m, *l, *c; /* [heads] running maximum, denominator, rescale factor of the block */
    size_t heads, dims;
};

static struct work cut(const struct dsv4_attention_args *a) {
    struct work w;
    w.heads = ((size_t)a->n_head + LANES - 1) / LANES * LANES;
    w.dims = ((size_t)a->d_head + LANES - 1) / LANES * LANES;
    w.q = a->scratch;
    w.acc = w.q + (size_t)a->d_head * w.heads;
    w.k = w.acc + (size_t)a->n_head * w.dims;
    w.p = w.k + BLOCK * w.dims;
    w.m = w.p + BLOCK * w.heads;
    w.l = w.m + w.heads;
    w.c = w.l + w.heads;
    return w;
}

/* One KV row as f32 operands (rule 2). */
static void load_row(float *k, const uint8_t *row, const struct dsv4_attention_args *a) {
    int32_t nope = a->format == DSV4_KV_FP8 ? a->d_head - a->d_rope : 0;
    const uint8_t *rest = row + nope, *scales = row + nope + 2 * (size_t)a->d_rope;
    for (int32_t d = 0; d < nope; d++)
        k[d] = dsv4_f32_operand(dsv4_e4m3_to_f32(row[d]) *
                                dsv4_e8m0_to_f32(scales[d / DSV4_KV_GROUP]));
    for (int32_t d = nope; d < a->d_head; d++) {
        dsv4_bf16 h;
        memcpy(&h, rest + 2 * (size_t)(d - nope), sizeof h);
        k[d] = dsv4_bf16_to_f32(dsv4_bf16_operand(h));
    }
}

/* w->k from ranks [first, first + n); returns whether there is any key. */
static int load_block(const struct work *w, const struct dsv4_attention_args *a, int32_t first,
                      int32_t n) {
    int any = 0;
    memset(w->k, 0, BLOCK * w->dims * sizeof(float));
    for (int32_t j = 0; j < n; j++) {
        if (a->keys[first + j] == NULL)
            continue;
        load_row(w->k + (size_t)j * w->dims, a->keys[first + j], a);
        any = 1;
    }
    return any;
}

/* w->p = S, LANES heads from `h`; a masked or missing rank scores -infinity, which makes its P
 * zero. */
static void scores(const struct work *w, const struct dsv4_attention_args *a, size_t h,
                   int32_t first, int32_t n) {
    for (int32_t j = 0; j < BLOCK; j++) {
        float s[LANES] = {0};
        const float *k = w->k + (size_t)j * w->dims, *q = w->q + h;
        for (int32_t d = 0; d < a->d_head; d += 2, q += 2 * w->heads) {
            for (int i = 0; i < LANES; i++)
                s[i] = s[i] + q[w->heads + (size_t)i] * k[d + 1];
            for (int i = 0; i < LANES; i++)
                s[i] = s[i] + q[i] * k[d];
        }
        int masked = j >= n || a->keys[first + j] == NULL;
        for (int i = 0; i < LANES; i++)
            w->p[(size_t)j * w->heads + h + (size_t)i] = masked ? -INFINITY : s[i] * a->scale;
    }
}

/* For head h: the new maximum, w->p from S to P, the rescale factor, the denominator. */
static void soften(const struct work *w, size_t h) {
    float m = w->m[h], lane[LANES] = {0};
    for (int j = 0; j < BLOCK; j++) {
        float s = w->p[(size_t)j * w->heads + h];
        m = s > m ? s : m; /* a NaN is lost here and makes its P NaN below, so the whole head */
    }
    for (int j = 0; j < BLOCK; j++) {
        float *p = w->p + (size_t)j * w->heads + h;
        *p = dsv4_expf(*p - m); /* masked: exp(-infinity) = +0 */
    }
    for (int k = 0; k < BLOCK; k += 2 * LANES)
        for (int i = 0; i < LANES; i++) {
            lane[i] = lane[i] + w->p[(size_t)(k + 2 * i + 1) * w->heads + h];
            lane[i] = lane[i] + w->p[(size_t)(k + 2 * i) * w->heads + h];
        }
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            lane[i] = lane[i] + lane[i + half];
    w->c[h] = dsv4_expf(w->m[h] - m);
    w->l[h] = w->l[h] * w->c[h] + lane[0];
    w->m[h] = m;
}

/* acc of head h takes the block's values. */
static void values(const struct work *w, size_t h) {
    float *acc = w->acc + h * w->dims;
    for (size_t d = 0; d < w->dims; d++) {
        float x = acc[d] * w->c[h];
        acc[d] = fabsf(x) < 0x1p-95f ? 0.0f : x;
    }
    for (int j = 0; j < BLOCK; j += 2) {
        const float *even = w->k + (size_t)j * w->dims, *odd = even + w->dims;
        const float *p = w->p + (size_t)j * w->heads + h;
        float p0 = dsv4_bf16_to_f32(dsv4_bf16_operand(dsv4_f32_to_bf16(p[0])));
        float p1 = dsv4_bf16_to_f32(dsv4_bf16_operand(dsv4_f32_to_bf16(p[w->heads])));
        for (size_t d = 0; d < w->dims; d += LANES)
            for (size_t i = d; i < d + LANES; i++) {
                acc[i] = acc[i] + p1 * odd[i];
                acc[i] = acc[i] + p0 * even[i];
            }
    }
}

static void dsv4k_attention_ref(const struct dsv4_attention_args *a) {
    struct work w = cut(a);
    assert(a->d_head % 2 == 0 && (uintptr_t)a->scratch % 64 == 0);
    memset(w.q, 0, (size_t)a->d_head * w.heads * sizeof(float));
    memset(w.acc, 0, (size_t)a->n_head * w.dims * sizeof(float));
    for (size_t h = 0; h < w.heads; h++) {
        w.m[h] = -INFINITY;
        w.l[h] = 0.0f;
    }
    for (size_t h = 0; h < (size_t)a->n_head; h++)
        for (size_t d = 0; d < (size_t)a->d_head; d++)
            w.q[d * w.heads + h] =
                dsv4_bf16_to_f32(dsv4_bf16_operand(a->q[h * (size_t)a->d_head + d]));

    for (int32_t first = 0; first < a->n_key; first += BLOCK) {
        int32_t n = a->n_key - first < BLOCK ? a->n_key - first : BLOCK;
        if (!load_block(&w, a, first, n))
            continue;
        for (size_t h = 0; h < w.heads; h += LANES)
            scores(&w, a, h, first, n);
        for (size_t h = 0; h < (size_t)a->n_head; h++) {
            soften(&w, h);
            values(&w, h);
        }
    }

    for (size_t h = 0; h < (size_t)a->n_head; h++) {
        float l = w.l[h] + dsv4_expf(a->sink[h] - w.m[h]);
        for (size_t d = 0; d < (size_t)a->d_head; d++) {
            float o = w.acc[h * w.dims + d] / l;
            a->out[h * (size_t)a->d_head + d] = o == o ? dsv4_f32_to_bf16(o) : 0x7fc0;
        }
    }
}

const struct dsv4_variant dsv4k_ref_attention[] = {
    DSV4_VARIANT(attention, dsv4k_attention_ref, "ref", 0),
    {NULL, NULL, 0, 0},
};
