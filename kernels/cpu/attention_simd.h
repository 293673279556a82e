/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention in vectors, the part every x86 variant shares: the walk over the blocks of 64 ranks,
 * the softmax with a head per lane, the division at the end.  The bits are those of
 * cpu/ref/attention.c.
 *
 * The including file defines first
 *
 *   vec, LANES             float vector, its lanes (8 or 16)
 *   v_load v_store v_set1 v_zero v_add v_sub v_mul v_div
 *                          as they say; addresses are aligned to the vector
 *   v_max(a, b)            the greater; b where a is NaN
 *   v_exp(x)               functions.h
 *   v_store_bf16(out, x)   LANES bf16 to any address, a NaN as 0x7fc0
 *
 * and gives after the include the functions declared below, which know the layout of the operands.
 *
 * Dimensions come in strips of 64: one scale of FP8 codes, and a strip of 64 keys or of a few
 * heads' accumulators stays in the first-level cache.  The last strip is padded with +0.
 */
#ifndef DSV4_ATTENTION_SIMD_H
#define DSV4_ATTENTION_SIMD_H

#include <assert.h>
#include <math.h>
#include <string.h>

#include "functions.h"
#include "kernels.h"

enum { RANKS = 64, STRIP = 64 };

#define UNROLL _Pragma("GCC unroll 16")

/* How the scratch is cut; heads is n_head rounded up to 16. */
struct work {
    float *q;   /* queries as operands, a lane per head: [d_head][heads] f32, or [d_head / 2][heads]
                   bf16 pairs */
    float *acc; /* [strips][heads][STRIP] */
    float *k;   /* [strips][RANKS][STRIP] f32, or bf16 layouts in the same room */
    float *p;   /* [RANKS][heads]: S, then P, then P as operands */
    float *m, *l, *c; /* [heads]: running maximum, denominator, rescale factor of the block */
    size_t heads, strips, d_head;
    size_t nope, scales; /* in a KV row: FP8 codes before the bf16 part, offset of their scales */
    size_t row_bytes;
};

/* w->q from a->q; lanes beyond n_head are +0. */
static void pack_query(const struct work *w, const struct dsv4_attention_args *a);

/* One strip of ranks 2 * pair and 2 * pair + 1 of the block into w->k; NULL gives +0. */
static void load_pair(const struct work *w, size_t strip, size_t pair, const uint8_t *even,
                      const uint8_t *odd);

/*
 * The chains of ranks [0, ranks) in w->p go on through one strip, the first starting them, the last
 * scaling them to S. Rows beyond, up to RANKS, may be overwritten.
 */
static void scores(const struct work *w, float scale, size_t strip, size_t ranks);

/* P of two ranks of LANES heads to operands, in place or at `pair`. */
static void pack_p(const struct work *w, size_t pair, size_t head, vec even, vec odd);

/* acc = flush(acc * c), then the values of 2 * pairs ranks. */
static void values(const struct work *w, size_t n_head, size_t pairs);

/* One strip of accumulators of one head, made to ascend by dimension. */
static void order_strip(float *acc);

static struct work cut(const struct dsv4_attention_args *a) {
    struct work w;
    w.heads = ((size_t)a->n_head + 15) / 16 * 16;
    w.d_head = (size_t)a->d_head;
    w.strips = (w.d_head + STRIP - 1) / STRIP;
    w.nope = a->format == DSV4_KV_FP8 ? (size_t)(a->d_head - a->d_rope) : 0;
    w.scales = w.nope + 2 * (size_t)a->d_rope;
    w.row_bytes = dsv4_kv_row_bytes(a->format, a->d_head, a->d_rope);
    w.k = a->scratch;
    w.acc = w.k + w.strips * RANKS * STRIP;
    w.p = w.acc + w.strips * w.heads * STRIP;
    w.m = w.p + RANKS * w.heads;
    w.l = w.m + w.heads;
    w.c = w.l + w.heads;
    w.q = w.c + w.heads;
    assert(a->d_head % 2 == 0 && (uintptr_t)a->scratch % 64 == 0);
    assert((char *)(w.q + w.d_head * w.heads) <=
           (char *)a->scratch + DSV4_ATTENTION_SCRATCH(a->n_head, a->d_head));
    return w;
}

/* For LANES heads: the new maximum, S to P, the rescale factor, the denominator by rule 1. */
static void soften(const struct work *w, size_t head, size_t ranks) {
    float *p = w->p + head;
    size_t ld = w->heads, pairs = (ranks + 1) / 2;
    vec old = v_load(w->m + head), m = old, sum[8];
    for (size_t j = 0; j < ranks; j++)
        m = v_max(v_load(p + j * ld), m);
    for (size_t j = 0; j < ranks; j++)
        v_store(p + j * ld, v_exp(v_sub(v_load(p + j * ld), m)));
    for (size_t j = ranks; j < RANKS; j++)
        v_store(p + j * ld, v_zero());

    /* lane i is ((P[2i+1] + P[2i]) + P[32+2i+1]) + P[32+2i]; sum[i] starts the tree with lanes i
     * and i + 8 */
    UNROLL
    for (size_t i = 0; i < 8; i++) {
        const float *x = p + 2 * i * ld, *y = p + (2 * i + 16) * ld;
        vec a = v_add(v_load(x + ld), v_load(x)), b = v_add(v_load(y + ld), v_load(y));
        a = v_add(v_add(a, v_load(x + 33 * ld)), v_load(x + 32 * ld));
        b = v_add(v_add(b, v_load(y + 33 * ld)), v_load(y + 32 * ld));
        sum[i] = v_add(a, b);
    }
    vec a = v_add(v_add(sum[0], sum[4]), v_add(sum[2], sum[6]));
    vec b = v_add(v_add(sum[1], sum[5]), v_add(sum[3], sum[7]));
    vec c = v_exp(v_sub(old, m));
    v_store(w->c + head, c);
    v_store(w->l + head, v_add(v_mul(v_load(w->l + head), c), v_add(a, b)));
    v_store(w->m + head, m);
    for (size_t i = 0; i < pairs; i++)
        pack_p(w, i, head, v_load(p + 2 * i * ld), v_load(p + (2 * i + 1) * ld));
}

/* Part `strip` of the rows of the next block, as far as there are any, into the cache: compressed
 * rows lie anywhere in memory. */
static void fetch(const struct work *w, size_t strip, const uint8_t *const *keys, size_t n) {
    const size_t lines = (w->row_bytes + 63) / 64;
    for (size_t j = 0; j < n; j++)
        for (size_t i = strip; keys[j] && i < lines; i += w->strips)
            __builtin_prefetch(keys[j] + i * 64);
}

/* One block of at most RANKS keys, the first of `left`. */
static void block(const struct work *w, const struct dsv4_attention_args *a,
                  const uint8_t *const *keys, size_t left) {
    size_t ranks = left < RANKS ? left : RANKS, next = left - ranks;
    next = next < RANKS ? next : RANKS;
    while (ranks > 0 && keys[ranks - 1] == NULL)
        ranks--;
    if (ranks == 0)
        return;
    for (size_t s = 0; s < w->strips; s++) {
        for (size_t j = 0; j < ranks; j += 2)
            load_pair(w, s, j / 2, keys[j], j + 1 < ranks ? keys[j + 1] : NULL);
        fetch(w, s, keys + RANKS, next);
        scores(w, a->scale, s, ranks);
    }
    for (size_t j = 0; j < ranks; j++)
        for (size_t h = 0; keys[j] == NULL && h < w->heads; h += LANES)
            v_store(w->p + j * w->heads + h, v_set1(-INFINITY)); /* P = exp(-infinity) = +0 */
    for (size_t h = 0; h < w->heads; h += LANES)
        soften(w, h, ranks);
    values(w, (size_t)a->n_head, (ranks + 1) / 2);
}

static void finish(const struct work *w, const struct dsv4_attention_args *a) {
    dsv4_bf16 tail[STRIP];
    for (size_t h = 0; h < (size_t)a->n_head; h++) {
        vec l = v_set1(w->l[h] + dsv4_expf(a->sink[h] - w->m[h]));
        for (size_t s = 0; s < w->strips; s++) {
            float *acc = w->acc + (s * w->heads + h) * STRIP;
            dsv4_bf16 *out = a->out + h * w->d_head + s * STRIP;
            size_t left = w->d_head - s * STRIP;
            order_strip(acc);
            for (size_t d = 0; d < STRIP; d += LANES)
                v_store_bf16((left < STRIP ? tail : out) + d, v_div(v_load(acc + d), l));
            if (left < STRIP)
                memcpy(out, tail, left * sizeof *out);
        }
    }
}

static void attention(const struct dsv4_attention_args *a) {
    struct work w = cut(a);
    pack_query(&w, a);
    memset(w.acc, 0, w.strips * w.heads * STRIP * sizeof(float));
    for (size_t h = 0; h < w.heads; h++) {
        w.m[h] = -INFINITY;
        w.l[h] = 0.0f;
    }
    for (int32_t first = 0; first < a->n_key; first += RANKS)
        block(&w, a, a->keys + first, (size_t)(a->n_key - first));
    finish(&w, a);
}

#endif
