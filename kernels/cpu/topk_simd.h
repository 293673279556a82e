/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The k best scores in vectors, by thresholds instead of sorting: the key that k keys reach is
 * found bit by bit, each bit one count.  With many scores the counts run over candidates only:
 * those that reach a bound guessed from every sixteenth vector.  A guess that leaves too few costs
 * a second pass, never the result, which is that of cpu/ref/indexer.c.
 *
 * The including file defines
 *
 *   LANES, ivec, i_load, i_store
 *
 *   order_keys(scores)      keys of LANES scores at any address: signed integers that order like
 *                           them, -0 as +0, NaN as -infinity; none is INT32_MIN
 *
 *   keys_above(x, bound)    bit mask of the lanes of x above an int32_t
 */
#ifndef DSV4_TOPK_SIMD_H
#define DSV4_TOPK_SIMD_H

#include <string.h>

#include "kernels.h"

enum { SAMPLED_VECTORS = 16, FEW_SCORES = 4096 };

/* Scores that are looked at: n keys, padded with INT32_MIN to whole vectors; ids NULL: 0, 1, ... */
struct pool {
    int32_t *keys, *ids;
    size_t n;
};

/* A vector of keys of the last n < LANES scores, padded. */
static void order_tail(int32_t *keys, const float *scores, size_t n) {
    float x[LANES] = {0};
    memcpy(x, scores, n * sizeof *x);
    i_store(keys, order_keys(x));
    for (size_t i = n; i < LANES; i++)
        keys[i] = INT32_MIN;
}

static size_t count_above(const struct pool *p, int32_t bound) {
    size_t count = 0;
    for (size_t i = 0; i < p->n; i += LANES)
        count += (size_t)__builtin_popcount(keys_above(i_load(p->keys + i), bound));
    return count;
}

/* The largest t whose bits from `lowest` up are free, with k keys >= t; t and keys as unsigned with
 * the sign flipped. */
static uint32_t raise(const struct pool *p, size_t k, uint32_t t, int highest, int lowest) {
    for (int bit = highest; bit >= lowest; bit--) {
        uint32_t higher = t | 1u << bit;
        if (count_above(p, (int32_t)((higher - 1) ^ 0x80000000u)) >= k)
            t = higher;
    }
    return t;
}

/* The k-th best key.  Those of bf16 values end in 16 equal bits: ones where negative, else zeros.
 */
static int32_t kth_key(const struct pool *p, size_t k) {
    uint32_t t = raise(p, k, 0, 31, 16);
    if (count_above(p, (int32_t)((t + 0xfffeu) ^ 0x80000000u)) >= k)
        t += 0xffffu;
    else if (count_above(p, (int32_t)(t ^ 0x80000000u)) >= k)
        t = raise(p, k, t, 15, 0);
    return (int32_t)(t ^ 0x80000000u);
}

static void take_all(struct pool *p, const float *scores, size_t n, int32_t *scratch) {
    size_t whole = n / LANES * LANES;
    *p = (struct pool){scratch, NULL, n};
    for (size_t i = 0; i < whole; i += LANES)
        i_store(p->keys + i, order_keys(scores + i));
    if (whole < n)
        order_tail(p->keys + whole, scores + whole, n - whole);
}

static void add_above(struct pool *p, ivec x, int32_t bound, size_t first) {
    _Alignas(64) int32_t keys[LANES];
    unsigned mask = keys_above(x, bound);
    if (mask)
        i_store(keys, x);
    for (; mask; mask &= mask - 1) {
        unsigned lane = (unsigned)__builtin_ctz(mask);
        p->keys[p->n] = keys[lane];
        p->ids[p->n++] = (int32_t)(first + lane);
    }
}

/* The scores that reach the guessed bound; returns 0 if they are fewer than k or more than half. */
static int take_candidates(struct pool *p, const float *scores, size_t n, size_t k,
                           int32_t *scratch) {
    _Alignas(64) int32_t tail[LANES];
    size_t whole = n / LANES * LANES, room = n / 2 / 64 * 64;
    *p = (struct pool){scratch, scratch + room, 0};
    for (size_t i = 0; i < whole; i += SAMPLED_VECTORS * LANES, p->n += LANES)
        i_store(p->keys + p->n, order_keys(scores + i));
    size_t rank = k * p->n / n; /* expected of the k-th best, then half as many more and some */
    uint32_t t = raise(p, rank + rank / 2 + 16, 0, 31, 16);
    int32_t bound = (int32_t)((t - 1) ^ 0x80000000u);
    p->n = 0;
    for (size_t i = 0; i < whole && p->n + 2 * LANES <= room; i += LANES)
        add_above(p, order_keys(scores + i), bound, i);
    if (p->n + 2 * LANES > room)
        return 0;
    order_tail(tail, scores + whole, n - whole);
    add_above(p, i_load(tail), bound, whole);
    for (size_t i = p->n; i % LANES; i++)
        p->keys[i] = INT32_MIN;
    return p->n >= k;
}

static int32_t top_k(int32_t *ids, const float *scores, int32_t n, int32_t k, void *scratch) {
    struct pool p;
    if (k >= n || k <= 0) {
        for (int32_t i = 0; k > 0 && i < n; i++)
            ids[i] = i;
        return k > 0 ? n : 0;
    }
    if (n <= FEW_SCORES || k > n / 8 || !take_candidates(&p, scores, (size_t)n, (size_t)k, scratch))
        take_all(&p, scores, (size_t)n, scratch);
    int32_t last = kth_key(&p, (size_t)k), count = 0;
    int ties =
        k - (int)count_above(&p, last); /* that many of the keys equal to `last`, the first */
    for (size_t i = 0; i < p.n; i += LANES) {
        unsigned above = keys_above(i_load(p.keys + i), last);
        unsigned equal = keys_above(i_load(p.keys + i), last - 1) & ~above;
        while (__builtin_popcount(equal) > ties)
            equal ^= 1u << (31 - __builtin_clz(equal));
        ties -= __builtin_popcount(equal);
        for (unsigned mask = above | equal; mask; mask &= mask - 1) {
            size_t at = i + (unsigned)__builtin_ctz(mask);
            ids[count++] = p.ids ? p.ids[at] : (int32_t)at;
        }
    }
    return count;
}

#endif
