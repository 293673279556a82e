/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What passes through a session's state, on the device against ref and the words of csrc/model/compress.c: several
 * pieces in a pass, from the first position and later ones, windows that overlap or not, tokens that share ring slots.
 */
#include <stdlib.h>

#include "check_cuda.h"

void check_state(void);

enum { PIECES = 3, WINDOW = 8, BLOCKS = 3 };

static struct dsv4_cuda_piece *pieces; /* of the pass, like the next three: memory a device sees */
static struct dsv4_cuda_state *states, want_states[PIECES];
static int32_t *piece_of, *positions;
static dsv4_bf16 *pooled_out;
static const float **pooled[3]; /* rows of k, gate and ape that one entry is of */

/* Sessions with full rings; rows and floats of random bits where a state has none of its own. */
static struct dsv4_cuda_pass make_pass(int32_t most, size_t kv_row, int32_t slots, int32_t width, int32_t index_width) {
    int32_t n_tok = 0, n_piece = between(1, PIECES);
    pieces = check_aligned(PIECES * sizeof *pieces, 4);
    states = check_aligned(PIECES * sizeof *states, 8);
    piece_of = check_aligned(256 * sizeof *piece_of, 4);
    positions = check_aligned(256 * sizeof *positions, 4);
    for (int32_t i = 0; i < n_piece; i++) {
        pieces[i] = (struct dsv4_cuda_piece){n_tok, between(1, most), check_below(3) ? between(0, 60) : 0};
        for (int32_t t = 0; t < pieces[i].n; t++) {
            piece_of[n_tok] = i;
            positions[n_tok++] = pieces[i].position + t;
        }
        for (int w = 0; w < 2; w++) {
            struct dsv4_cuda_state *s = w ? &want_states[i] : &states[i];
            const struct dsv4_cuda_state *old = w ? &states[i] : NULL;
            s->window = check_aligned(WINDOW * kv_row, 2);
            float **rings[] = {&s->k, &s->gate, &s->index_k, &s->index_gate};
            float *const olds[] = {states[i].k, states[i].gate, states[i].index_k, states[i].index_gate};
            for (int j = 0; j < 4; j++) {
                size_t n = (size_t)slots * (size_t)(j < 2 ? width : index_width);
                *rings[j] = check_aligned(4 * n, 4);
                if (old)
                    memcpy(*rings[j], olds[j], 4 * n);
                else
                    check_fill_f32(*rings[j], n, CHECK_NORMAL);
            }
            if (old)
                memcpy(s->window, old->window, WINDOW * kv_row);
            else
                check_fill_bytes(s->window, WINDOW * kv_row);
        }
    }
    return (struct dsv4_cuda_pass){pieces, states, piece_of, positions, n_piece, n_tok};
}

static void norm_kv(int32_t n_tok, int32_t nope, int32_t rope, enum dsv4_kv_format f) {
    int32_t d = nope + rope;
    size_t row = dsv4_kv_row_bytes(f, d, rope), angles = (size_t)(n_tok * rope / 2);
    dsv4_bf16 *kv = check_aligned(2 * (size_t)(n_tok * d), 2);
    uint8_t *rows[2] = {check_aligned((size_t)n_tok * row, 2), check_aligned((size_t)n_tok * row, 2)};
    float *w = check_aligned(4 * (size_t)d, 4), *cos = check_aligned(4 * angles, 4), *sin = check_aligned(4 * angles, 4);
    check_fill_f32(w, (size_t)d, CHECK_NORMAL);
    check_fill_bf16(kv, (size_t)(n_tok * d), CHECK_NORMAL);
    check_fill_f32(cos, angles, CHECK_NORMAL);
    check_fill_f32(sin, angles, CHECK_NORMAL);
    RUN(norm_kv, .kv_rows = rows[1], .kv = kv, .kv_norm = w, .cos = cos, .sin = sin, .n_tok = n_tok, .d_head = d,
        .d_rope = rope, .format = f, .eps = 1e-6f);
    for (int32_t t = 0; t < n_tok; t++) {
        dsv4_bf16 *x = kv + t * d;
        ref()->rmsnorm(x, x, w, d, 1e-6f);
        ref()->rope(x + nope, cos + t * rope / 2, sin + t * rope / 2, rope / 2, 0);
        ref()->kv_store(rows[0] + (size_t)t * row, x, f, d, rope);
    }
    same("norm_kv", rows[1], rows[0], (size_t)n_tok * row, 1);
    check_reset();
}

/* Entry e of a piece, as csrc/model/compress.c makes it from single operations. */
static void ref_entry(uint8_t *out, const struct dsv4_cuda_windows_args *a, int32_t piece, int32_t e) {
    const struct dsv4_cuda_piece *p = &pieces[piece];
    const struct dsv4_cuda_state *s = &want_states[piece];
    const float *old_k = a->index ? s->index_k : s->k, *old_gate = a->index ? s->index_gate : s->gate;
    int32_t n_row = a->ratio * (a->overlap ? 2 : 1), width = a->dim * (a->overlap ? 2 : 1), n_pair = a->d_rope / 2;
    const float **k = pooled[0], **gate = pooled[1], **ape = pooled[2];
    float cos[256], sin[256];
    dsv4_bf16 x[2048];
    for (int32_t i = 0; i < n_row; i++) {
        int32_t t = e * a->ratio - (a->overlap ? a->ratio : 0) + i, half = a->overlap && i >= a->ratio ? a->dim : 0;
        k[i] = gate[i] = ape[i] = NULL;
        if (t < 0)
            continue;
        int fresh = t >= p->position;
        int32_t at = (fresh ? p->first_tok + t - p->position : t % a->slots) * width + half;
        k[i] = (fresh ? a->new_k : old_k) + at;
        gate[i] = (fresh ? a->new_gate : old_gate) + at;
        ape[i] = a->ape + t % a->ratio * width + half;
    }
    ref()->pool(&(struct dsv4_pool_args){x, k, gate, ape, n_row, a->dim});
    if (e % 3 == 0) { /* the plain pool as well */
        dsv4_bf16 *y = pooled_out;
        RUN(pool, .out = y, .k = k, .gate = gate, .ape = ape, .n_row = n_row, .n = a->dim);
        same("pool", y, x, (size_t)a->dim, 2);
    }
    ref()->rmsnorm(x, x, a->norm, a->dim, a->eps);
    ref()->rope_table(cos, sin, a->freq, n_pair, e * a->ratio);
    ref()->rope(x + a->dim - a->d_rope, cos, sin, n_pair, 0);
    if (a->index) {
        ref()->hadamard(x, a->dim);
        ref()->index_store(out, x, a->dim);
    } else {
        ref()->kv_store(out, x, a->format, a->dim, a->d_rope);
    }
}

static void windows(int32_t ratio, int32_t overlap, int32_t dim, int32_t d_rope, int index) {
    int32_t width = dim * (overlap ? 2 : 1), slots = ratio * (overlap ? 2 : 1);
    size_t row = index ? dsv4_index_row_bytes(dim) : dsv4_kv_row_bytes(DSV4_KV_FP8, dim, d_rope);
    struct dsv4_cuda_windows_args a = {.pass = make_pass(40, 8, slots, width, width), .ratio = ratio,
        .overlap = overlap, .dim = dim, .d_rope = d_rope, .slots = slots, .index = index, .format = DSV4_KV_FP8,
        .eps = 1e-6f};
    size_t n = (size_t)a.pass.n_tok * (size_t)width;
    float *k = check_aligned(4 * n, 4), *gate = check_aligned(4 * n, 4);
    float *ape = check_aligned(4 * (size_t)(ratio * width), 4), *norm = check_aligned(4 * (size_t)dim, 4);
    float *freq = check_aligned(2 * (size_t)d_rope, 4);
    uint8_t **blocks = check_aligned(PIECES * BLOCKS * sizeof *blocks, 8), *want = malloc(row);
    pooled_out = check_aligned(2 * (size_t)dim, 2);
    for (int i = 0; i < 3; i++)
        pooled[i] = check_aligned(64 * sizeof *pooled[i], 8);
    check_fill_f32(k, n, CHECK_NORMAL);
    check_fill_f32(gate, n, CHECK_NORMAL);
    check_fill_f32(ape, (size_t)(ratio * width), CHECK_NORMAL);
    check_fill_f32(norm, (size_t)dim, CHECK_NORMAL);
    for (int32_t i = 0; i < d_rope / 2; i++)
        freq[i] = 1.0f / (float)between(1, 9000);
    int32_t closing = 0;
    for (int32_t i = 0; i < a.pass.n_piece; i++) {
        for (int b = 0; b < BLOCKS; b++) {
            uint8_t *block = blocks[i * BLOCKS + b] = check_aligned(DSV4_CUDA_BLOCK_ROWS * row, 2);
            memset(block, 0x5a, DSV4_CUDA_BLOCK_ROWS * row);
        }
        states[i].compressed = states[i].index = blocks + i * BLOCKS;
        closing += (pieces[i].position + pieces[i].n) / ratio - pieces[i].position / ratio;
    }
    a.new_k = k;
    a.new_gate = gate;
    a.ape = ape;
    a.norm = norm;
    a.freq = freq;
    a.max_window = closing + between(0, 2);
    check_true(dsv4_cuda_windows(&a, NULL) == 0, "launch");
    for (int32_t i = 0; i < a.pass.n_piece; i++)
        for (int32_t e = 0; e < BLOCKS * DSV4_CUDA_BLOCK_ROWS; e++) {
            memset(want, 0x5a, row);
            if (e >= pieces[i].position / ratio && e < (pieces[i].position + pieces[i].n) / ratio)
                ref_entry(want, &a, i, e);
            same(index ? "index entry" : "entry",
                 blocks[i * BLOCKS + e / DSV4_CUDA_BLOCK_ROWS] + (size_t)(e % DSV4_CUDA_BLOCK_ROWS) * row, want, row, 1);
        }
    free(want);
    check_reset();
}

static void keep(int32_t slots, int32_t width, int32_t index_width) {
    const size_t kv_row = 24;
    struct dsv4_cuda_pass pass = make_pass(40, kv_row, slots, width, index_width);
    size_t n = (size_t)pass.n_tok;
    uint8_t *rows = check_aligned(n * kv_row, 2);
    float *raw[4];
    check_fill_bytes(rows, n * kv_row);
    for (int j = 0; j < 4; j++) {
        raw[j] = check_aligned(4 * n * (size_t)(j < 2 ? width : index_width), 4);
        check_fill_f32(raw[j], n * (size_t)(j < 2 ? width : index_width), CHECK_NORMAL);
    }
    int with_index = (int)check_below(2);
    RUN(keep, .pass = pass, .kv_rows = rows, .k = raw[0], .gate = raw[1], .index_k = with_index ? raw[2] : NULL,
        .index_gate = with_index ? raw[3] : NULL, .window = WINDOW, .slots = slots, .width = width,
        .index_width = index_width, .kv_row = kv_row);
    for (int32_t t = 0; t < pass.n_tok; t++) { /* in order: the last one stays */
        struct dsv4_cuda_state *s = &want_states[piece_of[t]];
        float *const rings[] = {s->k, s->gate, s->index_k, s->index_gate};
        memcpy(s->window + (size_t)(positions[t] % WINDOW) * kv_row, rows + (size_t)t * kv_row, kv_row);
        for (int j = 0; j < (with_index ? 4 : 2); j++) {
            size_t wide = (size_t)(j < 2 ? width : index_width);
            memcpy(rings[j] + (size_t)(positions[t] % slots) * wide, raw[j] + (size_t)t * wide, 4 * wide);
        }
    }
    for (int32_t i = 0; i < pass.n_piece; i++) {
        const float *const got[] = {states[i].k, states[i].gate, states[i].index_k, states[i].index_gate};
        const float *const want[] = {want_states[i].k, want_states[i].gate, want_states[i].index_k,
                                     want_states[i].index_gate};
        same("window", states[i].window, want_states[i].window, WINDOW * kv_row, 1);
        for (int j = 0; j < 4; j++)
            same("ring", got[j], want[j], (size_t)(slots * (j < 2 ? width : index_width)), 4);
    }
    check_reset();
}

static void keys(int kind) { /* 0 window alone, 1 all entries, 2 selected ones */
    const size_t kv_row = 24;
    struct dsv4_cuda_pass pass = make_pass(40, kv_row, 1, 1, 1);
    int32_t ratio = between(1, 4), top_k = 5, max_key = WINDOW + (kind == 1 ? 110 : kind == 2 ? top_k : 0) + 3;
    const uint8_t **got = check_aligned((size_t)(pass.n_tok * max_key) * sizeof *got, 8);
    uint8_t **blocks = check_aligned(PIECES * BLOCKS * sizeof *blocks, 8);
    uint8_t *rows = check_aligned((size_t)pass.n_tok * kv_row, 2);
    int32_t *n_key = check_aligned(4 * (size_t)pass.n_tok, 4), *n_selected = check_aligned(4 * (size_t)pass.n_tok, 4);
    int32_t *selected = check_aligned(4 * (size_t)(pass.n_tok * top_k), 4);
    for (int32_t i = 0; i < pass.n_piece; i++) {
        for (int b = 0; b < BLOCKS; b++)
            blocks[i * BLOCKS + b] = check_aligned(DSV4_CUDA_BLOCK_ROWS * kv_row, 2);
        states[i].compressed = blocks + i * BLOCKS;
    }
    for (int32_t t = 0; t < pass.n_tok; t++) {
        n_selected[t] = between(0, top_k);
        for (int32_t j = 0; j < top_k; j++)
            selected[t * top_k + j] = between(0, BLOCKS * DSV4_CUDA_BLOCK_ROWS - 1);
    }
    struct dsv4_cuda_keys_args list = {
        .pass = pass, .keys = got, .n_key = n_key, .new_rows = rows, .selected = kind == 2 ? selected : NULL,
        .n_selected = kind == 2 ? n_selected : NULL, .top_k = top_k, .ratio = kind == 1 ? ratio : 0, .window = WINDOW,
        .max_key = max_key, .kv_row = kv_row};
    const int32_t dim = (int32_t)kv_row / 2, heads = between(1, 20);
    const size_t n_ticket = DSV4_CUDA_ATTENTION_TICKETS(pass.n_tok, heads);
    int32_t *tickets = check_aligned(4 * n_ticket, 4);
    dsv4_bf16 *q = check_aligned(2 * (size_t)(pass.n_tok * heads * dim), 2);
    float *sink = check_aligned(4 * (size_t)heads, 4);
    memset(tickets, 0, 4 * n_ticket);
    RUN(attention, .out = q, .q = q, .list = &list, .sink = sink, .tickets = tickets,
        .scratch = check_aligned(DSV4_CUDA_ATTENTION_SCRATCH(pass.n_tok, heads, max_key), 16), .n_tok = pass.n_tok,
        .n_head = heads, .d_head = dim, .d_rope = 2, .max_key = max_key, .scale = 1.0f, .format = DSV4_KV_BF16);
    for (int32_t t = 0; t < pass.n_tok; t++) { /* as list_keys of csrc/model/attention.c */
        const struct dsv4_cuda_piece *p = &pieces[piece_of[t]];
        const struct dsv4_cuda_state *s = &states[piece_of[t]];
        int32_t n = 0, position = positions[t], entries = kind == 0 ? 0 : kind == 1 ? (position + 1) / ratio : n_selected[t];
        const uint8_t *want[200];
        for (int32_t at = position < WINDOW ? 0 : position - WINDOW + 1; at <= position; at++)
            want[n++] = at >= p->position ? rows + (size_t)(p->first_tok + at - p->position) * kv_row
                                          : s->window + (size_t)(at % WINDOW) * kv_row;
        while (n < WINDOW)
            want[n++] = NULL;
        for (int32_t i = 0; i < entries; i++) {
            int32_t e = kind == 1 ? i : selected[t * top_k + i];
            want[n++] = s->compressed[e / DSV4_CUDA_BLOCK_ROWS] + (size_t)(e % DSV4_CUDA_BLOCK_ROWS) * kv_row;
        }
        check_true(n_key[t] == n, "keys: got %d, wanted %d", n_key[t], n);
        same("keys", got + t * max_key, want, (size_t)n, sizeof *want);
    }
    check_reset();
}

void check_state(void) {
    for (int i = 0; i < 24; i++) {
        norm_kv(between(1, 3), 64 * between(0, 4), 2 * between(1, 32), i % 3 ? DSV4_KV_FP8 : DSV4_KV_BF16);
        windows(between(1, 6), i % 2, 64 * between(1, 4) + 32, 32, 0);
        windows(between(1, 5), 1, 32 << check_below(4), 2 * between(1, 16), 1);
        keep(between(1, 9), between(1, 300), between(1, 40));
        keys(i % 3);
    }
}
