/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Index scores and the selection of the best: every variant against ref.  Head and key counts
 * around tiles, block counts around four, scales over their whole range and close together as the
 * engine's are, NaN scales, runs of keys of any length; keys, scores and ids end at an unmapped
 * page.  Selections of every size, ties, NaN, +-0, infinities, ascending scores (which defeat the
 * sampled bound), and values that are not bf16.
 */
#include "check.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void check_indexer(void);

/* Where the scale bytes of rows lie. */
enum range {
    RANGE_USUAL,
    RANGE_ALL,    /* with 255 now and then */
    RANGE_ENDS,   /* products of scales far below 2^-126 and far above 2^127 */
    RANGE_CLOSE,  /* within a row at most 3 apart, and between 2^-24 and 2^24 */
    RANGE_ALMOST, /* likewise, but for a row now and then */
    RANGES
};

/* The one scale byte of all blocks of a row, or -1. */
static int query_byte = -1, key_byte = -1;

static void fill_row(uint8_t *row, int32_t d_index, enum range range, int byte) {
    size_t codes = (size_t)d_index / 2;
    check_fill_bytes(row, codes);
    if (check_below(20) == 0)
        memset(row, 0x77, codes); /* the largest sums */
    if (check_below(20) == 0)
        memset(row, 0xff, codes);
    uint32_t near = 103 + check_below(46), spread = 4;
    if (range == RANGE_ALMOST && check_below(100) == 0)
        near += check_below(2) ? 3 : (uint32_t)-3, spread += check_below(2);
    for (size_t b = 0; b < (size_t)d_index / DSV4_INDEX_GROUP; b++)
        row[codes + b] = (uint8_t)(byte >= 0              ? (uint32_t)byte
                                   : range >= RANGE_CLOSE ? near + check_below(spread)
                                   : range == RANGE_USUAL ? 120 + check_below(10)
                                   : range == RANGE_ENDS  ? check_below(2) * 250 + check_below(5)
                                   : check_below(100)     ? check_below(255)
                                                          : 255);
}

static void check_scores(int32_t n_head, int32_t d_index, int32_t n_key, enum range range) {
    const struct dsv4_variant *v[CHECK_MAX_VARIANTS];
    size_t row = dsv4_index_row_bytes(d_index), n = (size_t)n_key;
    size_t block = n / 30 + 1 + check_below(70), n_block = (n + block - 1) / block;
    uint8_t *q = check_bytes((size_t)n_head * row), **keys = malloc((n_block + 1) * sizeof *keys);
    dsv4_bf16 *head_w = check_bytes((size_t)n_head * sizeof *head_w);
    float *want = check_bytes(n * sizeof *want);
    char what[96];
    for (int32_t h = 0; h < n_head; h++)
        fill_row(q + (size_t)h * row, d_index, range == RANGE_ALL ? RANGE_USUAL : range,
                 query_byte);
    if (range == RANGE_ALL && check_below(8) == 0)
        q[row - 1] = 255;
    for (size_t b = 0; b < n_block; b++) {
        size_t run = n - b * block < block ? n - b * block : block;
        keys[b] = check_bytes(run * row);
        for (size_t s = 0; s < run; s++)
            fill_row(keys[b] + s * row, d_index, range, key_byte);
    }
    check_fill_bf16(head_w, (size_t)n_head, check_below(4) ? CHECK_SPREAD : CHECK_EDGES);
    if (range == RANGE_ALL && check_below(8) == 0)
        head_w[check_below((uint32_t)n_head)] = check_below(2) ? 0xffff : 0x7f80;
    struct dsv4_index_scores_args a = {
        .scores = want,
        .q = q,
        .keys = (const uint8_t *const *)keys,
        .head_w = head_w,
        .scratch = check_aligned((DSV4_INDEX_SCRATCH(n_head, d_index) + 63) / 64 * 64, 64),
        .w_scale = 0.011048543f,
        .n_key = n_key,
        .block_keys = (int32_t)block,
        .n_head = n_head,
        .d_index = d_index};
    snprintf(what, sizeof what, "%d heads of %d, %d keys in runs of %zu, range %d", n_head, d_index,
             n_key, block, (int)range);
    int count = check_variants(DSV4_OP_index_scores, v);
    for (int i = 0; i < count; i++) {
        if (i > 0)
            a.scores = check_bytes(n * sizeof *a.scores);
        ((dsv4k_index_scores_fn *)v[i]->fn)(&a);
        check_equal(what, v[i], a.scores, want, n, sizeof *want);
    }
    free(keys);
    check_reset();
}

enum kind {
    TOPK_BF16,
    TOPK_FLOAT,
    TOPK_FEW_VALUES,
    TOPK_NEGATIVE,
    TOPK_ASCENDING,
    TOPK_MISLEADING, /* the vectors that are sampled have the best */
    TOPK_BURIED,     /* almost all -infinity or NaN */
    TOPK_KINDS
};

static float score(enum kind kind, int32_t i) {
    float x = check_normal();
    switch (kind) {
    case TOPK_FLOAT:
        return x;
    case TOPK_FEW_VALUES:
        x = (float)check_below(5) - 2.0f;
        return x == 0 && check_below(2) ? -0.0f : x;
    case TOPK_NEGATIVE:
        x = -fabsf(x);
        break;
    case TOPK_ASCENDING:
        return (float)i;
    case TOPK_MISLEADING:
        x += i % 128 < 8 ? 100.0f : 0.0f;
        break;
    case TOPK_BURIED:
        if (check_below(50))
            return check_below(2) ? NAN : -INFINITY;
        break;
    default:
        if (check_below(50) == 0)
            return check_below(2) ? check_below(2) ? 0.0f : -0.0f : NAN;
    }
    return dsv4_bf16_to_f32(dsv4_f32_to_bf16(x));
}

static void check_top_k(int32_t n, int32_t k, enum kind kind) {
    const struct dsv4_variant *v[CHECK_MAX_VARIANTS];
    size_t room = (size_t)(k < n ? k : n);
    float *scores = check_aligned((size_t)n * sizeof *scores, sizeof *scores);
    int32_t *want = check_aligned(room * sizeof *want, sizeof *want);
    void *scratch = check_aligned((4 * (size_t)n + 16384 + 63) / 64 * 64, 64);
    char what[64];
    for (int32_t i = 0; i < n; i++)
        scores[i] = score(kind, i);
    snprintf(what, sizeof what, "best %d of %d, kind %d", k, n, (int)kind);
    int count = check_variants(DSV4_OP_top_k, v);
    for (int i = 0; i < count; i++) {
        int32_t *ids = i ? check_aligned(room * sizeof *ids, sizeof *ids) : want;
        int32_t found = ((dsv4k_top_k_fn *)v[i]->fn)(ids, scores, n, k, scratch);
        check_true(found == (int32_t)room, "%s: %s returns %d", what, v[i]->name, found);
        check_equal(what, v[i], ids, want, room, sizeof *ids);
    }
    check_reset();
}

void check_indexer(void) {
    static const int32_t heads[] = {1, 3, 4, 5, 8, 64, 70}, dims[] = {32, 64, 96, 128, 160, 256};
    for (size_t h = 0; h < sizeof heads / sizeof heads[0]; h++)
        for (size_t d = 0; d < sizeof dims / sizeof dims[0]; d++)
            for (int range = 0; range < RANGES; range++)
                check_scores(heads[h], dims[d], (int32_t)check_below(120), range);
    for (int32_t n = 0; n <= 65; n++)
        check_scores(5, 64, n, n % 2 ? RANGE_USUAL : RANGE_ALL);
    for (int range = 0; range < RANGES; range++)
        check_scores(64, 128, 1000, range);
    for (int sum = 126; sum <= 386;
         sum += sum == 133 ? 246 : 1) { /* 2^-128 ... 2^-121, 2^125 ... */
        query_byte = sum / 2;
        key_byte = sum - query_byte;
        check_scores(5, 128, 50, RANGE_USUAL);
    }
    query_byte = key_byte = -1;
    for (int kind = 0; kind < TOPK_KINDS; kind++) {
        for (int32_t n = 0; n <= 65; n++)
            check_top_k(n, (int32_t)check_below((uint32_t)n + 3), kind);
        check_top_k(4096, 512, kind);
        check_top_k(4097, 512, kind);
        check_top_k(5000, 625, kind);
        check_top_k(5000, 626, kind);
        check_top_k(40007, 1, kind);
        check_top_k(40007, 1024, kind);
    }
    check_top_k(300000, 512, TOPK_BF16);
    check_top_k(300000, 512, TOPK_ASCENDING);
}
