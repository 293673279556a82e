/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention: every variant against ref.  Head counts around lanes and tiles, all row formats and
 * tails of dimensions, key counts around blocks, masked ranks anywhere, whole blocks masked, edge
 * operands and scales, NaN and infinity; rows, queries and results end at an unmapped page.
 */
#include "check.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

void check_attention(void);

struct shape {
    int32_t n_head, d_head, d_rope, n_key;
};

/* How ranks are masked. */
enum mask { MASK_NONE, MASK_SOME, MASK_FIRST_BLOCKS, MASK_TAIL, MASK_ALL, MASKS };

/* Where the scales of the FP8 groups lie. */
enum range {
    RANGE_USUAL,
    RANGE_WILD, /* among usual ones every extreme, with NaN codes and infinities in the bf16 part */
    RANGE_LOW,  /* values around 2^-55, where operands become zero; the bf16 part is zero */
    RANGE_HIGH, /* up to 2^127 */
    RANGES
};

static uint8_t scale_byte(enum range range) {
    static const uint8_t edges[] = {0, 1, 72, 80, 81, 100, 245, 246, 247, 248, 254, 255};
    if (range == RANGE_LOW)
        return (uint8_t)(66 + check_below(17));
    if (range == RANGE_HIGH)
        return (uint8_t)(238 + check_below(9));
    if (range == RANGE_WILD && check_below(8) == 0)
        return edges[check_below(sizeof edges)];
    return (uint8_t)(118 + check_below(10));
}

/* A KV row that ends at an unmapped page and starts at an even address. */
static const uint8_t *make_row(const struct shape *s, enum dsv4_kv_format format,
                               enum check_kind kind, enum range range) {
    size_t bytes = dsv4_kv_row_bytes(format, s->d_head, s->d_rope);
    size_t nope = format == DSV4_KV_FP8 ? (size_t)(s->d_head - s->d_rope) : 0;
    size_t n_bf16 = format == DSV4_KV_FP8 ? (size_t)s->d_rope : (size_t)s->d_head;
    int wild = range == RANGE_WILD;
    uint8_t *row = check_bytes(bytes);
    dsv4_bf16 *rest = (dsv4_bf16 *)(void *)(row + nope);
    check_fill_bytes(row, bytes);
    for (size_t i = 0; i < nope; i++)
        if ((row[i] & 0x7f) == 0x7f && !(wild && check_below(16) == 0))
            row[i] ^= 1;
    check_fill_bf16(rest, n_bf16, nope > 0 && range >= RANGE_LOW ? CHECK_ZEROS : kind);
    if (wild && check_below(16) == 0)
        rest[check_below((uint32_t)n_bf16)] = (dsv4_bf16)(0x7f80 | check_below(2) << 15);
    if (wild && check_below(16) == 0)
        rest[check_below((uint32_t)n_bf16)] = 0x7fc0;
    for (size_t g = 0; g < nope / DSV4_KV_GROUP; g++)
        row[nope + 2 * (size_t)s->d_rope + g] = scale_byte(range);
    return row;
}

static int masked(enum mask mask, int32_t j, int32_t n) {
    return mask == MASK_ALL || (mask == MASK_SOME && check_below(3) == 0) ||
           (mask == MASK_FIRST_BLOCKS && j < 128 && j != 70) || (mask == MASK_TAIL && j > n / 2);
}

static void check_case(const struct shape *s, enum dsv4_kv_format format, enum check_kind kind,
                       enum mask mask, enum range range) {
    enum { ROWS = 12 }; /* distinct rows; longer lists repeat them */
    const struct dsv4_variant *v[CHECK_MAX_VARIANTS];
    size_t n = (size_t)s->n_head * (size_t)s->d_head;
    size_t scratch_bytes = (DSV4_ATTENTION_SCRATCH(s->n_head, s->d_head) + 63) / 64 * 64;
    const uint8_t *rows[ROWS],
        **keys = check_aligned((size_t)s->n_key * sizeof *keys, sizeof(void *));
    dsv4_bf16 *q = check_bytes(n * sizeof *q), *want = check_bytes(n * sizeof *want);
    float *sink = check_aligned((size_t)s->n_head * sizeof *sink, sizeof(float));
    char what[160];
    for (int i = 0; i < ROWS; i++)
        rows[i] = make_row(s, format, kind, range);
    for (int32_t j = 0; j < s->n_key; j++)
        keys[j] = masked(mask, j, s->n_key) ? NULL : rows[check_below(ROWS)];
    check_fill_bf16(q, n, kind);
    if (range != RANGE_USUAL) /* keep products below 2^128, where they are exact */
        for (size_t i = 0; i < n; i++)
            q[i] = dsv4_f32_to_bf16(dsv4_bf16_to_f32(q[i]) *
                                    (range == RANGE_LOW ? 0x1p30f : 0x1p-24f));
    check_fill_f32(sink, (size_t)s->n_head, CHECK_NORMAL);
    if (check_below(3) == 0)
        sink[check_below((uint32_t)s->n_head)] = check_below(2) ? 60.0f : -INFINITY;
    struct dsv4_attention_args a = {.out = want,
                                    .q = q,
                                    .keys = keys,
                                    .sink = sink,
                                    .scratch = check_aligned(scratch_bytes, 64),
                                    .n_key = s->n_key,
                                    .n_head = s->n_head,
                                    .d_head = s->d_head,
                                    .d_rope = s->d_rope,
                                    .scale = kind == CHECK_SPREAD ? 0.001f
                                                                  : 1.0f / sqrtf((float)s->d_head),
                                    .format = format};
    snprintf(what, sizeof what, "%d heads of %d/%d, %d keys, format %d, kind %d, mask %d, range %d",
             s->n_head, s->d_head, s->d_rope, s->n_key, (int)format, (int)kind, (int)mask,
             (int)range);
    int count = check_variants(DSV4_OP_attention, v);
    for (int i = 0; i < count; i++) {
        if (i > 0)
            a.out = check_bytes(n * sizeof *a.out);
        memset(a.scratch, 0xff, scratch_bytes); /* NaN: what is not written must not be used */
        ((dsv4k_attention_fn *)v[i]->fn)(&a);
        check_equal(what, v[i], a.out, want, n, sizeof *want);
    }
    if (mask == MASK_ALL)
        for (size_t i = 0; i < n; i++)
            check_true(want[i] == 0 || sink[i / (size_t)s->d_head] == -INFINITY,
                       "%s: no key gives %04x", what, want[i]);
    check_reset();
}

/*
 * Accumulators scaled to around 2^-95, below which they become zero: 64 ranks of score 0 and value
 * 2^-54, then 64 ranks of value 0 whose score is 20 ... 60 and shrinks the sum 2^-48 by 2^-29 ...
 * 2^-87; head by head.
 */
static void check_small_sums(void) {
    enum { HEADS = 41, DIMS = 64, KEYS = 128 };
    const struct dsv4_variant *v[CHECK_MAX_VARIANTS];
    const uint8_t *keys[KEYS];
    dsv4_bf16 rows[2][DIMS] = {{0}}, q[HEADS * DIMS] = {0}, want[HEADS * DIMS], out[HEADS * DIMS];
    float sink[HEADS] = {0};
    int zeros = 0, others = 0;
    for (int d = 1; d < DIMS; d++)
        rows[0][d] = DSV4_TINY_BF16 + 0x80;
    rows[1][0] = 0x3f80;
    for (int j = 0; j < KEYS; j++)
        keys[j] = (const uint8_t *)rows[j / 64];
    for (int h = 0; h < HEADS; h++)
        q[h * DIMS] = dsv4_f32_to_bf16((float)(20 + h));
    struct dsv4_attention_args a = {
        .out = want,
        .q = q,
        .keys = keys,
        .sink = sink,
        .scratch = check_aligned((DSV4_ATTENTION_SCRATCH(HEADS, DIMS) + 63) / 64 * 64, 64),
        .n_key = KEYS,
        .n_head = HEADS,
        .d_head = DIMS,
        .d_rope = 64,
        .scale = 1.0f,
        .format = DSV4_KV_BF16};
    int count = check_variants(DSV4_OP_attention, v);
    for (int i = 0; i < count; i++) {
        a.out = i ? out : want;
        ((dsv4k_attention_fn *)v[i]->fn)(&a);
        check_equal("small sums", v[i], a.out, want, HEADS * DIMS, sizeof *want);
    }
    for (int h = 0; h < HEADS; h++)
        *(want[h * DIMS + 1] ? &others : &zeros) += 1;
    check_true(zeros > 0 && others > 0, "small sums: %d of %d heads are zero", zeros, HEADS);
    check_reset();
}

/* Heads are independent: a call for some of them gives the bits of the call for all. */
static void check_split(void) {
    enum { HEADS = 20, DIMS = 128, KEYS = 100, FIRST = 7 };
    const struct dsv4_variant *v[CHECK_MAX_VARIANTS];
    const struct shape s = {HEADS, DIMS, 64, KEYS};
    const uint8_t *row = make_row(&s, DSV4_KV_FP8, CHECK_NORMAL, 0), *keys[KEYS];
    dsv4_bf16 q[HEADS * DIMS], out[HEADS * DIMS], part[HEADS * DIMS];
    float sink[HEADS];
    for (int j = 0; j < KEYS; j++)
        keys[j] = j % 5 ? row : make_row(&s, DSV4_KV_FP8, CHECK_NORMAL, 0);
    check_fill_bf16(q, HEADS * DIMS, CHECK_NORMAL);
    check_fill_f32(sink, HEADS, CHECK_NORMAL);
    struct dsv4_attention_args a = {
        .out = out,
        .q = q,
        .keys = keys,
        .sink = sink,
        .scratch = check_aligned((DSV4_ATTENTION_SCRATCH(HEADS, DIMS) + 63) / 64 * 64, 64),
        .n_key = KEYS,
        .n_head = HEADS,
        .d_head = DIMS,
        .d_rope = 64,
        .scale = 0.1f,
        .format = DSV4_KV_FP8};
    int count = check_variants(DSV4_OP_attention, v);
    for (int i = 0; i < count; i++) {
        struct dsv4_attention_args b = a;
        ((dsv4k_attention_fn *)v[i]->fn)(&a);
        b.n_head = FIRST;
        b.out = part;
        ((dsv4k_attention_fn *)v[i]->fn)(&b);
        b.n_head = HEADS - FIRST;
        b.out = part + FIRST * DIMS;
        b.q = q + FIRST * DIMS;
        b.sink = sink + FIRST;
        ((dsv4k_attention_fn *)v[i]->fn)(&b);
        check_equal("heads in two calls", v[i], part, out, HEADS * DIMS, sizeof *out);
    }
    check_reset();
}

void check_attention(void) {
    static const struct shape shapes[] = {
        {1, 512, 64, 1},   {4, 512, 64, 150},  {64, 512, 64, 130}, {3, 192, 64, 64},
        {5, 192, 64, 65},  {16, 128, 64, 66},  {17, 96, 32, 63},   {33, 130, 2, 129},
        {2, 32, 32, 200},  {1, 2, 2, 3},       {48, 64, 64, 31},   {8, 66, 2, 17},
        {128, 192, 64, 2}, {7, 256, 128, 257}, {20, 62, 62, 5},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++)
        for (int format = DSV4_KV_FP8; format <= DSV4_KV_BF16; format++)
            for (int kind = 0; kind < CHECK_KINDS; kind++) {
                enum mask mask = (enum mask)((i + (size_t)kind) % (MASK_ALL));
                for (int range = 0; range < (format == DSV4_KV_FP8 ? RANGES : RANGE_LOW); range++)
                    check_case(&shapes[i], format, kind, range ? MASK_NONE : mask, range);
            }
    check_case(&shapes[3], DSV4_KV_FP8, CHECK_NORMAL, MASK_ALL, 0);
    const struct shape empty = {5, 192, 64, 0};
    check_case(&empty, DSV4_KV_FP8, CHECK_NORMAL, MASK_ALL, 0);
    check_small_sums();
    check_split();
}
