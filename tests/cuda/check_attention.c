/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention on the device against ref: lists of any length with masked keys anywhere, whole blocks masked, no key at all,
 * odd head counts and sizes, both row formats, scores that overflow or are NaN.
 */
#include <math.h>
#include <stdlib.h>

#include "check_cuda.h"

void check_attention(void);

static void attention(int32_t n_tok, int32_t n_head, int32_t nope, int32_t rope, int32_t max_key, int how,
                      enum check_kind kind) {
    enum dsv4_kv_format f = how & 1 ? DSV4_KV_BF16 : DSV4_KV_FP8;
    int32_t d = nope + rope, n_row = 7;
    size_t row = dsv4_kv_row_bytes(f, d, rope), n = (size_t)(n_tok * n_head * d);
    dsv4_bf16 *q = check_aligned(2 * n, 2), *got = check_aligned(2 * n, 2), *want = check_aligned(2 * n, 2);
    dsv4_bf16 *x = check_aligned(2 * (size_t)d, 2);
    uint8_t *rows = check_aligned((size_t)n_row * row, 2);
    const uint8_t **keys = check_aligned((size_t)(n_tok * max_key) * sizeof *keys, 8);
    int32_t *n_key = check_aligned(4 * (size_t)n_tok, 4);
    float *sink = check_aligned(4 * (size_t)n_head, 4), *cos = NULL, *sin = NULL;
    size_t angles = (size_t)(n_tok * rope / 2), n_ticket = DSV4_CUDA_ATTENTION_TICKETS(n_tok, n_head);
    int32_t *tickets = check_aligned(4 * n_ticket, 4), flush = (int32_t)check_below(2);
    void *scratch = check_aligned(DSV4_CUDA_ATTENTION_SCRATCH(n_tok, n_head, max_key), 16);
    void *ref_scratch = aligned_alloc(64, (DSV4_ATTENTION_SCRATCH(n_head, d) + 63) / 64 * 64);
    memset(scratch, 0xff, DSV4_CUDA_ATTENTION_SCRATCH(n_tok, n_head, max_key));
    check_fill_bf16(q, n, kind);
    check_fill_f32(sink, (size_t)n_head, CHECK_NORMAL);
    memset(tickets, 0, 4 * n_ticket);
    if (check_below(2)) {
        cos = check_aligned(4 * angles, 4);
        sin = check_aligned(4 * angles, 4);
        check_fill_f32(cos, angles, CHECK_NORMAL);
        check_fill_f32(sin, angles, CHECK_NORMAL);
    }
    for (int32_t r = 0; r < n_row; r++) {
        check_fill_bf16(x, (size_t)d, kind);
        if (how & 2 && r == 0)
            x[between(0, d - 1)] = 0x7fc0;
        ref()->kv_store(rows + (size_t)r * row, x, f, d, rope);
    }
    float scale = how & 4 ? 1.0f : 1.0f / sqrtf((float)d);
    for (int32_t t = 0; t < n_tok; t++) {
        n_key[t] = between(0, max_key);
        for (int32_t r = 0; r < max_key; r++) {
            int masked = check_below(4) == 0 || (how & 8 && r / 64 % 2 == t % 2) || (t == 2 && check_below(90));
            keys[t * max_key + r] = masked ? NULL : rows + check_below((uint32_t)n_row) * row;
        }
        ref()->attention(&(struct dsv4_attention_args){
            .out = want + t * n_head * d, .q = q + t * n_head * d, .keys = keys + t * max_key, .sink = sink,
            .scratch = ref_scratch, .n_key = n_key[t], .n_head = n_head, .d_head = d, .d_rope = rope, .scale = scale,
            .format = f});
        for (int32_t h = 0; h < n_head && cos; h++)
            ref()->rope(want + (t * n_head + h) * d + nope, cos + t * rope / 2, sin + t * rope / 2, rope / 2, 1);
    }
    if (flush)
        ref()->act_flush(want, want, (int32_t)n);
    RUN(attention, .out = got, .q = q, .keys = keys, .n_key = n_key, .cos = cos, .sin = sin, .sink = sink,
        .scratch = scratch, .tickets = tickets, .n_tok = n_tok, .n_head = n_head, .d_head = d, .d_rope = rope,
        .max_key = max_key, .flush = flush, .scale = scale, .format = f);
    same_bf16("attention", got, want, n);
    free(ref_scratch);
    check_reset();
}

/* A later block whose scores are higher by `gap` and whose values are zero but in one dimension: what the first block left
 * in the others shrinks by e^-gap, and from 2^-95 down becomes +0. */
static void fading(float gap) {
    enum { HEADS = 3, DIM = 6, RANKS = 128 };
    dsv4_bf16 *q = check_aligned(2 * HEADS * DIM, 2), *got = check_aligned(2 * HEADS * DIM, 2);
    dsv4_bf16 *want = check_aligned(2 * HEADS * DIM, 2), *rows = check_aligned(4 * DIM, 2);
    const uint8_t **keys = check_aligned(RANKS * sizeof *keys, 8);
    float *sink = check_aligned(4 * HEADS, 4);
    int32_t *n_key = check_aligned(4, 4), *tickets = check_aligned(4, 4);
    void *scratch = check_aligned(DSV4_CUDA_ATTENTION_SCRATCH(1, HEADS, RANKS), 16);
    void *ref_scratch = aligned_alloc(64, (DSV4_ATTENTION_SCRATCH(HEADS, DIM) + 63) / 64 * 64);
    memset(rows, 0, 4 * DIM);
    check_fill_bf16(rows + 1, DIM - 1, CHECK_NORMAL);
    rows[DIM] = dsv4_f32_to_bf16(gap);
    for (int32_t h = 0; h < HEADS; h++) {
        memset(q + h * DIM, 0, 2 * DIM);
        q[h * DIM] = 0x3f80;
        sink[h] = -INFINITY;
    }
    for (int32_t r = 0; r < RANKS; r++)
        keys[r] = (const uint8_t *)(rows + (r < 64 ? 0 : DIM));
    *n_key = RANKS;
    *tickets = 0;
    ref()->attention(&(struct dsv4_attention_args){
        .out = want, .q = q, .keys = keys, .sink = sink, .scratch = ref_scratch, .n_key = RANKS, .n_head = HEADS,
        .d_head = DIM, .d_rope = 2, .scale = 1.0f, .format = DSV4_KV_BF16});
    RUN(attention, .out = got, .q = q, .keys = keys, .n_key = n_key, .sink = sink, .scratch = scratch,
        .tickets = tickets, .n_tok = 1, .n_head = HEADS, .d_head = DIM, .d_rope = 2, .max_key = RANKS, .scale = 1.0f, .format = DSV4_KV_BF16);
    same("fading", got, want, HEADS * DIM, 2);
    free(ref_scratch);
    check_reset();
}

void check_attention(void) {
    for (int32_t gap = 40; gap < 90; gap++)
        fading((float)gap);
    for (int i = 0; i < 40; i++) {
        enum check_kind kind = i % 3 ? CHECK_NORMAL : (enum check_kind)check_below(CHECK_KINDS);
        attention(i % 8 ? between(1, 3) : between(9, 10), between(1, 20), 64 * between(0, 3), 2 * between(1, 20), between(1, 300), i % 16, kind);
    }
    attention(1, 64, 448, 64, 200, 0, CHECK_NORMAL);
}
