/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Scores of the lightning indexer and the selection of the best, portable C: the definition of the
 * bits (SPEC 3.6, contracts at dsv4_index_scores_args and dsv4k_top_k_fn).
 */
#include <assert.h>
#include <math.h>
#include <string.h>

#include "kernels.h"

static float round_bf16(float x) {
    return dsv4_bf16_to_f32(dsv4_f32_to_bf16(x));
}

/* sum over one block of 32 of (2q)(2k), exact: at most 32 * 12 * 12 in magnitude. */
static int block_dot(const uint8_t *q, const uint8_t *k) {
    int sum = 0;
    for (int i = 0; i < DSV4_INDEX_GROUP / 2; i++) {
        sum += dsv4_e2m1_twice(q[i] & 15) * dsv4_e2m1_twice(k[i] & 15);
        sum += dsv4_e2m1_twice(q[i] >> 4) * dsv4_e2m1_twice(k[i] >> 4);
    }
    return sum;
}

/* 2^(eq + ek - 2) within the normal floats; NaN where a group was not finite. */
static float block_scale(uint8_t q, uint8_t k) {
    int e = q - 127 + k - 127 - 2;
    if (q == 255 || k == 255)
        return NAN;
    e = e < -126 ? -126 : e > 127 ? 127 : e;
    return dsv4_f32_from_bits((uint32_t)(e + 127) << 23);
}

static void dsv4k_index_scores_ref(const struct dsv4_index_scores_args *a) {
    size_t row = dsv4_index_row_bytes(a->d_index), codes = (size_t)a->d_index / 2;
    assert(a->d_index > 0 && a->d_index % DSV4_INDEX_GROUP == 0);
    for (int32_t s = 0; s < a->n_key; s++) {
        const uint8_t *k = a->keys[s / a->block_keys] + (size_t)(s % a->block_keys) * row;
        float score = 0.0f;
        for (int32_t h = 0; h < a->n_head; h++) {
            const uint8_t *q = a->q + (size_t)h * row;
            float acc = 0.0f, w = round_bf16(dsv4_bf16_to_f32(a->head_w[h]) * a->w_scale);
            for (size_t b = 0; b < (size_t)a->d_index / DSV4_INDEX_GROUP; b++) {
                size_t at = b * DSV4_INDEX_GROUP / 2;
                acc = fmaf((float)block_dot(q + at, k + at),
                           block_scale(q[codes + b], k[codes + b]), acc);
            }
            float t = round_bf16(acc);
            t = t <= 0.0f ? 0.0f : t; /* a NaN passes */
            score = score + round_bf16(w * t);
        }
        a->scores[s] = score == score ? round_bf16(score) : dsv4_f32_from_bits(0x7fc00000u);
    }
}

/* A key that orders like the score: -0 as +0, NaN as -infinity. */
static uint32_t order_key(float score) {
    uint32_t u = dsv4_f32_bits(score == score ? score + 0.0f : -INFINITY);
    return u >> 31 ? ~u : u | 0x80000000u;
}

/* Radix selection, a byte of the key per pass from the top: `bound` becomes the k-th best key. */
static int32_t dsv4k_top_k_ref(int32_t *ids, const float *scores, int32_t n, int32_t k,
                               void *scratch) {
    uint32_t bound = 0;
    int32_t need = k, count = 0;
    (void)scratch;
    if (k >= n) {
        for (int32_t i = 0; i < n; i++)
            ids[i] = i;
        return n;
    }
    if (k <= 0)
        return 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        int32_t histogram[256] = {0}, bin = 255;
        for (int32_t i = 0; i < n; i++) {
            uint32_t key = order_key(scores[i]);
            if (shift == 24 || key >> (shift + 8) == bound >> (shift + 8))
                histogram[key >> shift & 255u]++;
        }
        for (; histogram[bin] < need; bin--)
            need -= histogram[bin];
        bound |= (uint32_t)bin << shift;
    }
    /* all above the bound, and the first `need` of those on it */
    for (int32_t i = 0; i < n; i++) {
        uint32_t key = order_key(scores[i]);
        if (key > bound || (key == bound && need-- > 0))
            ids[count++] = i;
    }
    return count;
}

const struct dsv4_variant dsv4k_ref_indexer[] = {
    DSV4_VARIANT(index_scores, dsv4k_index_scores_ref, "ref", 0),
    DSV4_VARIANT(top_k, dsv4k_top_k_ref, "ref", 0),
    {NULL, NULL, 0, 0},
};
