/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Index scores in vectors, a key per lane: the part every x86 variant shares.  The bits are those
 * of cpu/ref/indexer.c.
 *
 * The codes of a key become unsigned bytes 2k + 12, those of a query signed bytes 2q: the sum of a
 * block of 32 is sum (2k + 12)(2q) - 12 sum 2q, exact in integers.  The bytes of a block lie in the
 * order of its nibbles: for each dword of codes the four low nibbles, then the four high ones.
 *
 * The including file defines first
 *
 *   vec, ivec, LANES          float and integer vectors, lanes of 32 bits
 *   KEY_VECS                  vectors of keys in a tile
 *   v_zero v_set1 v_add v_mul v_cast     v_cast(i): the bits of i as floats
 *   v_fma(a, b, c)            a * b + c
 *   v_relu(x)                 max(x, 0); NaN stays
 *   v_from_int(i)             to float
 *   v_round(x)                bf16(x) as float; a NaN stays one
 *   v_store_scores(out, x, nan, n)   the first n lanes, 0x7fc0 for NaN and where nan is -1
 *   i_load i_store            aligned
 *   i_set1 i_add i_and i_or i_equal(a, b)     i_equal: -1 or 0
 *   i_clamp(x, low, high)
 *   i_any_outside(x, low, high)      whether any lane is
 *   SHIFT_LEFT(x, n), SHIFT_RIGHT(x, n)   the right one arithmetic
 *   sum_start(bias), sum_add(s, k, q), sum_finish(s, bias)   bias + sum of products of bytes
 *   load_codes(codes, keys, row_bytes, n_block, n)
 *                             LANES keys (n exist) as bytes 2k + 12: [n_block][STEPS], a dword each
 *
 * and may define FOLD_KEYS, a number of keys whose scores it finds faster where their scales allow;
 * then it gives after the include the two functions that are declared below for that.
 */
#ifndef DSV4_INDEXER_SIMD_H
#define DSV4_INDEXER_SIMD_H

#include <assert.h>
#include <string.h>

#include "kernels.h"

#define UNROLL _Pragma("GCC unroll 16")

enum {
    GROUP = 4,                    /* query heads in a tile */
    STEPS = DSV4_INDEX_GROUP / 4, /* of four bytes in a block */
    TILE_KEYS = KEY_VECS * LANES,
    FIELD = 23, /* exponents are kept where a float has them */
};

/* A block of 32 of GROUP query heads. */
struct query_block {
    int32_t codes[STEPS][GROUP]; /* four bytes 2q */
    int32_t bias[GROUP];         /* -12 sum 2q */
    int32_t exponent[GROUP]; /* (byte - 129) << FIELD: 2^(eq + ek - 2) has field eq + ek - 129 */
};

struct work {
    const struct dsv4_index_scores_args *a;
    struct query_block *q; /* [n_group][n_block] */
    float *weight;         /* [n_group][GROUP], 0 beyond n_head */
    uint8_t *codes;        /* [KEY_VECS][n_block][STEPS][LANES][4] */
    int32_t *exponent;     /* [KEY_VECS][n_block][LANES]: byte << FIELD */
    int32_t *nan_keys;     /* [KEY_VECS][LANES]: -1 where a scale byte is 255 */
    size_t n_group, n_block, row_bytes;
    int32_t low, high; /* exponents of keys within give normal scales with every query block */
    int loaded, nan;   /* whether q and weight are there; whether a scale of a query is NaN */
    uint8_t *rest;     /* what is left of the scratch, 64-byte aligned */
    int half;          /* where the tile loaded last is */
};

/* Keys in a row and where their scores go. */
struct tile {
    const uint8_t *keys;
    float *scores;
    size_t n; /* 0: none */
};

#ifdef FOLD_KEYS
/* Looks at the queries once; returns whether they can be scored so at all. */
static int fold_queries(struct work *w);

/* Loads the first of some tiles of at most FOLD_KEYS; returns whether it can be scored so. */
static int fold_keys(struct work *w, const struct tile *t);

/* Scores the first tile, loaded last, and loads the second meanwhile; returns whether that one can
 * be scored so.  The third is fetched into the cache. */
static int fold_scores(struct work *w, const struct tile t[3]);
#endif

static struct work cut(const struct dsv4_index_scores_args *a) {
    struct work w = {.a = a};
    w.n_group = ((size_t)a->n_head + GROUP - 1) / GROUP;
    w.n_block = (size_t)a->d_index / DSV4_INDEX_GROUP;
    w.row_bytes = dsv4_index_row_bytes(a->d_index);
    w.codes = a->scratch;
    w.exponent = (int32_t *)(void *)(w.codes + TILE_KEYS * w.n_block * DSV4_INDEX_GROUP);
    w.nan_keys = w.exponent + TILE_KEYS * w.n_block;
    w.q = (struct query_block *)(void *)(w.nan_keys + TILE_KEYS);
    w.weight = (float *)(void *)(w.q + w.n_group * w.n_block);
    w.rest = (uint8_t *)a->scratch +
             ((size_t)((uint8_t *)(w.weight + w.n_group * GROUP) - (uint8_t *)a->scratch) + 63) /
                 64 * 64;
    assert((uintptr_t)a->scratch % 64 == 0 && a->d_index % DSV4_INDEX_GROUP == 0);
    assert(w.rest <= (uint8_t *)a->scratch + DSV4_INDEX_SCRATCH(a->n_head, a->d_index));
    return w;
}

static void load_queries(struct work *w) {
    static const int8_t twice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    const struct dsv4_index_scores_args *a = w->a;
    int lowest = 254, highest = 0, nan = 0;
    memset(w->q, 0, w->n_group * w->n_block * sizeof *w->q);
    memset(w->weight, 0, w->n_group * GROUP * sizeof *w->weight);
    for (size_t h = 0; h < (size_t)a->n_head; h++) {
        const uint8_t *row = a->q + h * w->row_bytes, *scale = row + (size_t)a->d_index / 2;
        float weight = dsv4_bf16_to_f32(a->head_w[h]) * a->w_scale;
        w->weight[h] = dsv4_bf16_to_f32(dsv4_f32_to_bf16(weight));
        for (size_t b = 0; b < w->n_block; b++) {
            struct query_block *q = w->q + h / GROUP * w->n_block + b;
            int sum = 0;
            /* step i is dword i / 2 of the codes, low nibbles first */
            for (size_t i = 0; i < STEPS; i++) {
                int8_t *out = (int8_t *)&q->codes[i][h % GROUP];
                for (size_t j = 0; j < 4; j++) {
                    out[j] = twice[row[b * 16 + i / 2 * 4 + j] >> 4 * (i % 2) & 15];
                    sum += out[j];
                }
            }
            q->bias[h % GROUP] = -12 * sum;
            q->exponent[h % GROUP] = (scale[b] - 129) * (1 << FIELD);
            nan |= scale[b] == 255;
            lowest = scale[b] < lowest ? scale[b] : lowest;
            highest = scale[b] > highest ? scale[b] : highest;
        }
    }
    w->low = (130 - lowest) * (1 << FIELD);
    w->high = (highest > 129 ? 383 - highest : 254) * (1 << FIELD);
    w->nan = nan;
    w->loaded = 1;
}

/*
 * Scale bytes of LANES keys, of which n exist, as exponents, and the NaN among them; four blocks at
 * a time by the dword that holds their bytes (the last four bytes of the row where fewer are left).
 * Returns whether some lie outside w->low ... w->high.
 */
static int load_scales(const struct work *w, int32_t *exponent, int32_t *nan, const uint8_t *keys,
                       size_t n) {
    _Alignas(64) int32_t dwords[LANES];
    ivec bad = i_set1(0);
    int outside = 0;
    for (size_t b = 0; b < w->n_block; b += 4) {
        size_t left = w->n_block - b, skip = left < 4 ? 4 - left : 0;
        for (size_t i = 0; i < LANES; i++) {
            dwords[i] = 0x7f7f7f7f;
            if (i < n)
                memcpy(dwords + i, keys + i * w->row_bytes + w->n_block * 16 + b - skip, 4);
        }
        ivec x = i_load(dwords);
        UNROLL
        for (size_t i = 0; i < 4; i++) {
            if (i >= skip) {
                ivec byte = i_and(x, i_set1(255)), e = SHIFT_LEFT(byte, FIELD);
                bad = i_or(bad, i_equal(byte, i_set1(255)));
                outside |= i_any_outside(e, w->low, w->high);
                i_store(exponent + (b + i - skip) * LANES, e);
            }
            x = SHIFT_RIGHT(x, 8);
        }
    }
    i_store(nan, bad);
    return outside;
}

/* Up to TILE_KEYS keys into w; returns whether their scales need clamping. */
static int load_keys(const struct work *w, const uint8_t *keys, size_t n) {
    int clamp = 0;
    for (size_t v = 0; v < KEY_VECS && v * LANES < n; v++) {
        const uint8_t *part = keys + v * LANES * w->row_bytes;
        size_t exist = n - v * LANES < LANES ? n - v * LANES : LANES;
        load_codes(w->codes + v * w->n_block * STEPS * LANES * 4, part, w->row_bytes, w->n_block,
                   exist);
        clamp |= load_scales(w, w->exponent + v * w->n_block * LANES, w->nan_keys + v * LANES, part,
                             exist);
    }
    return clamp;
}

/* score[v] += bf16(w * bf16(relu(acc))) for one group of heads, ascending. */
static inline __attribute__((always_inline)) void
score_group(const struct work *w, size_t group, vec score[KEY_VECS], const int clamp) {
    vec acc[GROUP][KEY_VECS];
    UNROLL
    for (size_t h = 0; h < GROUP; h++) {
        UNROLL
        for (size_t v = 0; v < KEY_VECS; v++)
            acc[h][v] = v_zero();
    }
    const struct query_block *q = w->q + group * w->n_block;
    for (size_t b = 0; b < w->n_block; b++, q++) {
        const uint8_t *k = w->codes + b * STEPS * LANES * 4;
        const int32_t *exponent = w->exponent + b * LANES;
        ivec sum[GROUP][KEY_VECS];
        UNROLL
        for (size_t h = 0; h < GROUP; h++) {
            UNROLL
            for (size_t v = 0; v < KEY_VECS; v++)
                sum[h][v] = sum_start(i_set1(q->bias[h]));
        }
        UNROLL
        for (size_t i = 0; i < STEPS; i++) {
            ivec x[KEY_VECS];
            UNROLL
            for (size_t v = 0; v < KEY_VECS; v++)
                x[v] = i_load(k + (v * w->n_block * STEPS + i) * LANES * 4);
            UNROLL
            for (size_t h = 0; h < GROUP; h++) {
                ivec y = i_set1(q->codes[i][h]);
                UNROLL
                for (size_t v = 0; v < KEY_VECS; v++)
                    sum[h][v] = sum_add(sum[h][v], x[v], y);
            }
        }
        UNROLL
        for (size_t h = 0; h < GROUP; h++) {
            ivec eq = i_set1(q->exponent[h]);
            UNROLL
            for (size_t v = 0; v < KEY_VECS; v++) {
                ivec ek = i_load(exponent + v * w->n_block * LANES), e = i_add(ek, eq);
                if (clamp) { /* the sum of two may not fit its 32 bits: eight times smaller */
                    e = i_add(SHIFT_RIGHT(ek, 3), SHIFT_RIGHT(eq, 3));
                    e = SHIFT_LEFT(i_clamp(e, 1 << (FIELD - 3), 254 << (FIELD - 3)), 3);
                }
                vec s = v_from_int(sum_finish(sum[h][v], i_set1(q->bias[h])));
                acc[h][v] = v_fma(s, v_cast(e), acc[h][v]);
            }
        }
    }
    UNROLL
    for (size_t h = 0; h < GROUP; h++) {
        vec weight = v_set1(w->weight[group * GROUP + h]);
        UNROLL
        for (size_t v = 0; v < KEY_VECS; v++)
            score[v] = v_add(score[v], v_round(v_mul(weight, v_round(v_relu(acc[h][v])))));
    }
}

/* Scores of n <= TILE_KEYS keys, block by block. */
static void tile_scores(struct work *w, float *scores, const uint8_t *keys, size_t n) {
    if (!w->loaded) {
        load_queries(w);
        memset(w->codes, 0,
               TILE_KEYS * (w->n_block * (DSV4_INDEX_GROUP + 4) + 4)); /* keys, scales */
    }
    int clamp = load_keys(w, keys, n);
    vec score[KEY_VECS];
    UNROLL
    for (size_t v = 0; v < KEY_VECS; v++)
        score[v] = v_zero();
    if (clamp)
        for (size_t g = 0; g < w->n_group; g++)
            score_group(w, g, score, 1);
    else
        for (size_t g = 0; g < w->n_group; g++)
            score_group(w, g, score, 0);
    UNROLL
    for (size_t v = 0; v < KEY_VECS; v++) {
        size_t exist = n <= v * LANES ? 0 : n - v * LANES < LANES ? n - v * LANES : LANES;
        ivec nan = w->nan ? i_set1(-1) : i_load(w->nan_keys + v * LANES);
        v_store_scores(scores + v * LANES, score[v], nan, exist);
    }
}

/* The keys from s on, as many as lie in a row and fill a tile. */
static struct tile tile_at(const struct work *w, size_t s, size_t most) {
    const struct dsv4_index_scores_args *a = w->a;
    size_t n_key = (size_t)a->n_key, block = (size_t)a->block_keys;
    if (s >= n_key)
        return (struct tile){NULL, NULL, 0};
    size_t run = block - s % block, left = n_key - s, n = left < most ? left : most;
    return (struct tile){a->keys[s / block] + s % block * w->row_bytes, a->scores + s,
                         n < run ? n : run};
}

static void index_scores(const struct dsv4_index_scores_args *a) {
    struct work w = cut(a);
#ifdef FOLD_KEYS
    int fold = fold_queries(&w);
    struct tile t[3];
    size_t s = 0; /* the first key behind them */
    for (int i = 0; i < 3; i++, s += t[i - 1].n)
        t[i] = tile_at(&w, s, FOLD_KEYS);
    for (int loaded = fold && fold_keys(&w, t); t[0].n; s += t[2].n) {
        int fast = loaded;
        if (fast)
            loaded = fold_scores(&w, t);
        for (size_t i = 0; !fast && i < t[0].n; i += TILE_KEYS) {
            size_t left = t[0].n - i;
            tile_scores(&w, t[0].scores + i, t[0].keys + i * w.row_bytes,
                        left < TILE_KEYS ? left : TILE_KEYS);
        }
        if (!fast)
            loaded = fold && fold_keys(&w, t + 1);
        t[0] = t[1];
        t[1] = t[2];
        t[2] = tile_at(&w, s, FOLD_KEYS);
    }
#else
    for (struct tile t = tile_at(&w, 0, TILE_KEYS); t.n;
         t = tile_at(&w, (size_t)(t.scores - a->scores) + t.n, TILE_KEYS))
        tile_scores(&w, t.scores, t.keys, t.n);
#endif
}

#endif
