/* SPDX-License-Identifier: Apache-2.0 */
/* Quantisers, KV and index rows, norms and rope: the device's kernels against ref, over odd shapes. */
#include "check_cuda.h"

void check_rows(void);

static void act(int32_t n_row, int32_t n, int quant, enum check_kind kind) {
    size_t all = (size_t)n_row * (size_t)n, groups = ((size_t)n + 127) / 128;
    dsv4_bf16 *x = check_aligned(2 * all, 2), *got = check_aligned(2 * all, 2);
    dsv4_bf16 *want = check_aligned(2 * all, 2);
    uint8_t *codes[2], *scales[2];
    for (int i = 0; i < 2; i++) {
        codes[i] = check_bytes(all);
        scales[i] = check_bytes((size_t)n_row * groups);
        memset(codes[i], 0, all);
        memset(scales[i], 0, (size_t)n_row * groups);
    }
    check_fill_bf16(x, all, kind);
    if (check_below(3) == 0)
        x[check_below((uint32_t)all)] = check_below(2) ? 0x7f80 : 0xffc1;
    int keep = (int)check_below(2);
    for (int32_t r = 0; r < n_row; r++) {
        size_t at = (size_t)r * (size_t)n;
        if (quant)
            ref()->act_quant(want + at, keep ? codes[0] + at : NULL,
                             keep ? scales[0] + (size_t)r * groups : NULL, x + at, n);
        else
            ref()->act_flush(want + at, x + at, n);
    }
    RUN(act, .out = got, .codes = keep ? codes[1] : NULL, .scales = keep ? scales[1] : NULL, .x = x,
        .n_row = n_row, .n = n, .quant = quant);
    same("act", got, want, all, 2);
    same("act codes", codes[1], codes[0], all, 1);
    same("act scales", scales[1], scales[0], (size_t)n_row * groups, 1);
    check_reset();
}

static void kv(int32_t n_row, int32_t nope, int32_t rope, enum dsv4_kv_format f, enum check_kind kind) {
    int32_t d = nope + rope;
    size_t all = (size_t)n_row * (size_t)d, row = dsv4_kv_row_bytes(f, d, rope);
    dsv4_bf16 *x = check_aligned(2 * all, 2), *got = check_aligned(2 * all, 2);
    dsv4_bf16 *want = check_aligned(2 * all, 2);
    uint8_t *rows[2] = {check_aligned((size_t)n_row * row, 2), check_aligned((size_t)n_row * row, 2)};
    check_fill_bf16(x, all, kind);
    x[check_below((uint32_t)all)] = 0x7f80;
    for (int32_t r = 0; r < n_row; r++)
        ref()->kv_store(rows[0] + (size_t)r * row, x + (size_t)r * (size_t)d, f, d, rope);
    RUN(kv, .rows = rows[1], .x = x, .n_row = n_row, .d_head = d, .d_rope = rope, .format = f);
    same("kv_store", rows[1], rows[0], (size_t)n_row * row, 1);
    for (int32_t r = 0; r < n_row; r++)
        ref()->kv_load(want + (size_t)r * (size_t)d, rows[0] + (size_t)r * row, f, d, rope);
    RUN(kv, .rows = rows[0], .x = got, .n_row = n_row, .d_head = d, .d_rope = rope, .format = f, .load = 1);
    same("kv_load", got, want, all, 2);
    check_reset();
}

static void rope_tables(float **cos, float **sin, int32_t n_tok, int32_t n_pair) {
    size_t n = (size_t)n_tok * (size_t)n_pair;
    int32_t *positions = check_aligned(4 * (size_t)n_tok, 4);
    float *freq = check_aligned(4 * (size_t)n_pair, 4);
    float *want[2] = {check_aligned(4 * n, 4), check_aligned(4 * n, 4)};
    *cos = check_aligned(4 * n, 4);
    *sin = check_aligned(4 * n, 4);
    for (int32_t t = 0; t < n_tok; t++)
        positions[t] = (int32_t)check_below(1u << (1 + check_below(20)));
    for (int32_t i = 0; i < n_pair; i++)
        freq[i] = 1.0f / (float)(1 + check_below(100000));
    for (int32_t t = 0; t < n_tok; t++)
        ref()->rope_table(want[0] + (size_t)t * (size_t)n_pair, want[1] + (size_t)t * (size_t)n_pair,
                          freq, n_pair, positions[t]);
    RUN(rope_table, .cos = *cos, .sin = *sin, .freq = freq, .positions = positions, .n_tok = n_tok,
        .n_pair = n_pair);
    same("cos", *cos, want[0], n, 4);
    same("sin", *sin, want[1], n, 4);
}

static void index_rows(int32_t n_tok, int32_t per_tok, int32_t n, int32_t n_pair, int hadamard,
                       enum check_kind kind) {
    int32_t n_row = n_tok * per_tok;
    size_t all = (size_t)n_row * (size_t)n, row = dsv4_index_row_bytes(n);
    float *cos = NULL, *sin = NULL;
    dsv4_bf16 *x = check_aligned(2 * all, 2), *y = check_aligned(2 * all, 2);
    dsv4_bf16 *got = check_aligned(2 * all, 2), *want = check_aligned(2 * all, 2);
    uint8_t *rows[2] = {check_bytes((size_t)n_row * row), check_bytes((size_t)n_row * row)};
    if (n_pair)
        rope_tables(&cos, &sin, n_tok, n_pair);
    check_fill_bf16(x, all, kind);
    if (check_below(2))
        x[check_below((uint32_t)all)] = 0x7f81;
    memcpy(y, x, 2 * all);
    for (int32_t r = 0; r < n_row; r++) {
        dsv4_bf16 *yr = y + (size_t)r * (size_t)n;
        size_t angle = (size_t)(r / per_tok) * (size_t)n_pair;
        if (n_pair)
            ref()->rope(yr + n - 2 * n_pair, cos + angle, sin + angle, n_pair, 0);
        if (hadamard)
            ref()->hadamard(yr, n);
        ref()->index_store(rows[0] + (size_t)r * row, yr, n);
        ref()->index_load(want + (size_t)r * (size_t)n, rows[0] + (size_t)r * row, n);
    }
    RUN(index, .rows = rows[1], .x = x, .cos = cos, .sin = sin, .n_row = n_row, .n = n, .per_tok = per_tok,
        .n_pair = n_pair, .hadamard = hadamard);
    same("index_store", rows[1], rows[0], (size_t)n_row * row, 1);
    RUN(index, .rows = rows[0], .x = got, .n_row = n_row, .n = n, .per_tok = per_tok, .load = 1);
    same("index_load", got, want, all, 2);
    if (hadamard) {
        memcpy(got, x, 2 * all);
        memcpy(want, x, 2 * all);
        for (int32_t r = 0; r < n_row; r++)
            ref()->hadamard(want + (size_t)r * (size_t)n, n);
        RUN(hadamard, .x = got, .n_row = n_row, .n = n);
        same_bf16("hadamard", got, want, all);
    }
    check_reset();
}

static void norms(int32_t n_row, int32_t n, enum check_kind kind) {
    size_t all = (size_t)n_row * (size_t)n;
    dsv4_bf16 *x = check_aligned(2 * all, 2), *want = check_aligned(2 * all, 2);
    dsv4_bf16 *made = check_aligned(2 * all, 2), *got[3];
    float *w = check_aligned(4 * (size_t)n, 4), *m[2];
    for (int i = 0; i < 3; i++)
        got[i] = check_aligned(2 * all, 2);
    for (int i = 0; i < 2; i++)
        m[i] = check_aligned(4 * (size_t)n_row, 4);
    check_fill_bf16(x, all, kind);
    check_fill_f32(w, (size_t)n, CHECK_NORMAL);
    for (int32_t r = 0; r < n_row; r++) {
        m[0][r] = ref()->mean_square(x + (size_t)r * (size_t)n, n);
        ref()->rmsnorm(want + (size_t)r * (size_t)n, x + (size_t)r * (size_t)n, w, n, 1e-6f);
    }
    RUN(mean_square, .out = m[1], .x = x, .n_row = n_row, .n = n);
    same("mean_square", m[1], m[0], (size_t)n_row, 4);
    memcpy(got[0], x, 2 * all);
    RUN(rmsnorm, .out = got[0], .quant = got[1], .plain = got[2], .x = got[0], .w = w, .n_row = n_row, .n = n,
        .eps = 1e-6f);
    same("rmsnorm", got[0], want, all, 2);
    for (int32_t r = 0; r < n_row; r++)
        ref()->act_quant(made + (size_t)r * (size_t)n, NULL, NULL, want + (size_t)r * (size_t)n, n);
    same("rmsnorm quant", got[1], made, all, 2);
    ref()->act_flush(made, want, n_row * n);
    same("rmsnorm plain", got[2], made, all, 2);
    check_reset();
}

static void heads(int32_t n_tok, int32_t per_tok, int32_t n, int32_t n_pair, enum check_kind kind) {
    int32_t n_row = n_tok * per_tok;
    size_t all = (size_t)n_row * (size_t)n;
    float *cos = NULL, *sin = NULL;
    dsv4_bf16 *got = check_aligned(2 * all, 2), *want = check_aligned(2 * all, 2);
    if (n_pair)
        rope_tables(&cos, &sin, n_tok, n_pair);
    check_fill_bf16(got, all, kind);
    memcpy(want, got, 2 * all);
    for (int32_t r = 0; r < n_row; r++) {
        dsv4_bf16 *x = want + (size_t)r * (size_t)n;
        size_t angle = (size_t)(r / per_tok) * (size_t)n_pair;
        ref()->headnorm(x, n, 1e-6f);
        if (n_pair)
            ref()->rope(x + n - 2 * n_pair, cos + angle, sin + angle, n_pair, 0);
    }
    RUN(headnorm, .x = got, .cos = cos, .sin = sin, .n_row = n_row, .n = n, .per_tok = per_tok, .n_pair = n_pair,
        .eps = 1e-6f);
    same("headnorm", got, want, all, 2);
    if (!n_pair) {
        check_reset();
        return;
    }
    for (int flush = 0; flush < 2; flush++) {
        int inverse = (int)check_below(2);
        check_fill_bf16(got, all, kind);
        memcpy(want, got, 2 * all);
        for (int32_t r = 0; r < n_row; r++) {
            size_t angle = (size_t)(r / per_tok) * (size_t)n_pair;
            ref()->rope(want + (size_t)(r + 1) * (size_t)n - 2 * n_pair, cos + angle, sin + angle, n_pair, inverse);
        }
        if (flush)
            ref()->act_flush(want, want, n_row * n);
        RUN(rope, .x = got, .cos = cos, .sin = sin, .n_row = n_row, .n = n, .per_tok = per_tok, .n_pair = n_pair,
            .inverse = inverse, .flush = flush);
        same("rope", got, want, all, 2);
    }
    check_reset();
}

void check_rows(void) {
    for (int i = 0; i < 24; i++) {
        enum check_kind kind = (enum check_kind)check_below(CHECK_KINDS);
        act(between(1, 5), between(1, 700), i % 2, kind);
        kv(between(1, 3), 64 * between(0, 8), 2 * between(0, 40) + 2, i % 3 ? DSV4_KV_FP8 : DSV4_KV_BF16, kind);
        int32_t n = 32 << check_below(4);
        index_rows(between(1, 3), between(1, 4), n, check_below(2) ? between(1, n / 2) : 0, i % 2, kind);
        index_rows(1, between(1, 4), 32 * between(1, 8), 0, 0, kind);
        norms(between(1, 3), i % 4 ? between(1, 900) : between(4000, 9000), kind);
        n = between(2, 600);
        heads(between(1, 3), between(1, 9), n, n % 2 ? 0 : between(0, n / 2), kind);
    }
}
