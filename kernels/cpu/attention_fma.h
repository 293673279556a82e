/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention with f32 multiply-adds: all operands as f32, the products by register tiles.  Beside
 * what attention_simd.h asks for, the including file defines
 *
 *   v_fma(a, b, c)       a * b + c
 *   v_flush(x)           +0 where |x| < 2^-95, else x
 *   v_operand_p(x)       bf16(x) as f32, rule 2 (x >= 0 or NaN)
 *   v_load_operand(p)    LANES bf16 at any address as f32, rule 2
 *
 *   ivec, transposed_pairs(r, x, ld, n_row, n_pair)
 *                        r[i] = pair i of bf16 elements, by rule 2, of LANES rows of which the
 * first n_row exist (the others +0), n_pair <= LANES pairs each v_even(i), v_odd(i)  the elements
 * of such pairs as f32
 *
 *   fp8_strip(k, codes, scale)
 *                        64 e4m3 codes as f32 operands; scale byte 81...245, no NaN among the codes
 *   fp8_has_nan(codes)   whether one of 64 codes is NaN
 *
 *   SCORE_VECS, SCORE_KEYS    a tile of the scores: vectors of heads by ranks
 *   VALUE_VECS                a tile of the values: 4 heads by vectors of dimensions
 */
#ifndef DSV4_ATTENTION_FMA_H
#define DSV4_ATTENTION_FMA_H

#include "cpu/attention_simd.h"

static void pack_query(const struct work *w, const struct dsv4_attention_args *a) {
    ivec r[LANES];
    size_t pairs = w->d_head / 2, n_head = (size_t)a->n_head;
    if (w->heads - n_head >= LANES)
        memset(w->q, 0, w->d_head * w->heads * sizeof(float));
    for (size_t h = 0; h < n_head; h += LANES)
        for (size_t i = 0; i < pairs; i += LANES) {
            size_t n = pairs - i < LANES ? pairs - i : LANES;
            transposed_pairs(r, a->q + h * w->d_head + 2 * i, w->d_head, n_head - h, n);
            for (size_t j = 0; j < n; j++) {
                v_store(w->q + 2 * (i + j) * w->heads + h, v_even(r[j]));
                v_store(w->q + (2 * (i + j) + 1) * w->heads + h, v_odd(r[j]));
            }
        }
}

/* A strip of FP8 codes that fp8_strip cannot take, or n < 64 bf16 values. */
static __attribute__((noinline)) void load_rare(float *k, const uint8_t *from, size_t n, int fp8,
                                                uint8_t scale) {
    dsv4_bf16 h[STRIP];
    if (!fp8)
        memcpy(h, from, n * sizeof *h);
    for (size_t i = 0; i < STRIP; i++)
        k[i] = i >= n ? 0.0f
                      : dsv4_f32_operand(fp8 ? dsv4_e4m3_to_f32(from[i]) * dsv4_e8m0_to_f32(scale)
                                             : dsv4_bf16_to_f32(h[i]));
}

static inline void load_strip(const struct work *w, float *k, const uint8_t *row, size_t strip) {
    size_t d = strip * STRIP, left = w->d_head - d;
    if (row == NULL) {
        memset(k, 0, STRIP * sizeof(float));
    } else if (d < w->nope) {
        uint8_t scale = row[w->scales + strip];
        if (scale < 81 || scale > 245 || fp8_has_nan(row + d))
            load_rare(k, row + d, STRIP, 1, scale);
        else
            fp8_strip(k, row + d, scale);
    } else {
        const uint8_t *from = row + w->nope + (d - w->nope) * sizeof(dsv4_bf16);
        if (left < STRIP)
            load_rare(k, from, left, 0, 0);
        else
            for (size_t i = 0; i < STRIP; i += LANES)
                v_store(k + i, v_load_operand(from + i * sizeof(dsv4_bf16)));
    }
}

static void load_pair(const struct work *w, size_t strip, size_t pair, const uint8_t *even,
                      const uint8_t *odd) {
    float *k = w->k + (strip * RANKS + 2 * pair) * STRIP;
    load_strip(w, k, even, strip);
    load_strip(w, k + STRIP, odd, strip);
}

static inline __attribute__((always_inline)) void score_step(vec *s, const float *q, const float *k,
                                                             const size_t vecs, const size_t keys) {
    UNROLL
    for (size_t j = 0; j < keys; j++) {
        vec x = v_set1(k[j * STRIP]);
        UNROLL
        for (size_t i = 0; i < vecs; i++)
            s[j * vecs + i] = v_fma(v_load(q + i * LANES), x, s[j * vecs + i]);
    }
}

/* The chains of `vecs` vectors of heads and `keys` ranks go on through one strip; the last strip
 * scales them to S. */
static inline __attribute__((always_inline)) void score_tile(const struct work *w, float scale,
                                                             size_t strip, size_t head, size_t rank,
                                                             const size_t vecs, const size_t keys) {
    vec s[16];
    float *p = w->p + rank * w->heads + head;
    const float *q = w->q + strip * STRIP * w->heads + head,
                *k = w->k + (strip * RANKS + rank) * STRIP;
    size_t left = w->d_head - strip * STRIP, n = left < STRIP ? left : STRIP;
    UNROLL
    for (size_t i = 0; i < vecs * keys; i++)
        s[i] = strip == 0 ? v_zero() : v_load(p + i / vecs * w->heads + i % vecs * LANES);
    for (size_t d = 0; d < n; d += 2, k += 2, q += 2 * w->heads) {
        score_step(s, q + w->heads, k + 1, vecs, keys);
        score_step(s, q, k, vecs, keys);
    }
    UNROLL
    for (size_t i = 0; i < vecs * keys; i++)
        v_store(p + i / vecs * w->heads + i % vecs * LANES,
                left <= STRIP ? v_mul(s[i], v_set1(scale)) : s[i]);
}

static void scores(const struct work *w, float scale, size_t strip, size_t ranks) {
    size_t head = 0;
    for (; head + SCORE_VECS * LANES <= w->heads; head += SCORE_VECS * LANES)
        for (size_t j = 0; j < ranks; j += SCORE_KEYS)
            score_tile(w, scale, strip, head, j, SCORE_VECS, SCORE_KEYS);
    for (; head < w->heads; head += LANES)
        for (size_t j = 0; j < ranks; j += 8)
            score_tile(w, scale, strip, head, j, 1, 8);
}

static void pack_p(const struct work *w, size_t pair, size_t head, vec even, vec odd) {
    v_store(w->p + 2 * pair * w->heads + head, v_operand_p(even));
    v_store(w->p + (2 * pair + 1) * w->heads + head, v_operand_p(odd));
}

static inline __attribute__((always_inline)) void value_step(vec *s, const float *p,
                                                             const float *k) {
    vec x[VALUE_VECS];
    UNROLL
    for (size_t v = 0; v < VALUE_VECS; v++)
        x[v] = v_load(k + v * LANES);
    UNROLL
    for (size_t h = 0; h < 4; h++) {
        vec y = v_set1(p[h]);
        UNROLL
        for (size_t v = 0; v < VALUE_VECS; v++)
            s[h * VALUE_VECS + v] = v_fma(y, x[v], s[h * VALUE_VECS + v]);
    }
}

/* 4 heads and VALUE_VECS vectors of dimensions, all ranks of the block. */
static inline __attribute__((always_inline)) void
value_tile(const struct work *w, float *acc, const float *k, size_t head, size_t pairs) {
    vec s[4 * VALUE_VECS];
    const float *p = w->p + head;
    UNROLL
    for (size_t h = 0; h < 4; h++) {
        vec c = v_set1(w->c[head + h]);
        UNROLL
        for (size_t v = 0; v < VALUE_VECS; v++)
            s[h * VALUE_VECS + v] = v_flush(v_mul(v_load(acc + h * STRIP + v * LANES), c));
    }
    for (size_t i = 0; i < pairs; i++, k += 2 * STRIP, p += 2 * w->heads) {
        value_step(s, p + w->heads, k + STRIP);
        value_step(s, p, k);
    }
    UNROLL
    for (size_t h = 0; h < 4; h++) {
        UNROLL
        for (size_t v = 0; v < VALUE_VECS; v++)
            v_store(acc + h * STRIP + v * LANES, s[h * VALUE_VECS + v]);
    }
}

static void values(const struct work *w, size_t n_head, size_t pairs) {
    for (size_t s = 0; s < w->strips; s++)
        for (size_t h = 0; h < n_head; h += 4)
            for (size_t d = 0; d < STRIP; d += VALUE_VECS * LANES)
                value_tile(w, w->acc + (s * w->heads + h) * STRIP + d, w->k + s * RANKS * STRIP + d,
                           h, pairs);
}

static void order_strip(float *acc) {
    (void)acc;
}

#endif
