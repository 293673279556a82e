/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention on tensor cores against ref, within the error of launches.h for both orders of an mma on the host, most results
 * equal; lists as in check_attention.c; a token's results the same bits alone.
 */
#include <math.h>
#include <stdlib.h>

#include "check_cuda.h"

void check_attention_mma(void);

extern int dsv4_host_mma_bits;

enum { MOST = 1024 }; /* dimensions, ranks */

struct lists {
    dsv4_bf16 *q;
    const uint8_t **keys;
    int32_t *n_key;
    float *sink, scale;
    int32_t n_head, d, rope, max_key;
    enum dsv4_kv_format f;
};

/* The rows of one token as operands, in double; masked ones have used[r] = 0.  Returns how many ranks there are. */
static int32_t rows_of(const struct lists *a, int32_t t, double *rows, int *used) {
    dsv4_bf16 x[MOST];
    for (int32_t r = 0; r < a->n_key[t]; r++) {
        const uint8_t *key = a->keys[t * a->max_key + r];
        used[r] = key != NULL;
        if (!key)
            continue;
        ref()->kv_load(x, key, a->f, a->d, a->rope);
        for (int32_t i = 0; i < a->d; i++)
            rows[r * a->d + i] = dsv4_bf16_to_f32(dsv4_bf16_operand(x[i]));
    }
    return a->n_key[t];
}

/* One head of one token. */
static void near_head(const struct lists *a, int32_t t, int32_t h, const double *rows, const int *used, int32_t n,
                      const dsv4_bf16 *got, const dsv4_bf16 *want) {
    const dsv4_bf16 *q = a->q + (t * a->n_head + h) * a->d;
    double s[MOST], top = a->sink[h], error = 0, sum;
    for (int32_t r = 0; r < n; r++) {
        double all = 0;
        s[r] = 0;
        for (int32_t i = 0; used[r] && i < a->d; i++) {
            double p = dsv4_bf16_to_f32(dsv4_bf16_operand(q[i])) * rows[r * a->d + i];
            s[r] += p;
            all += fabs(p);
        }
        s[r] *= a->scale;
        error = fmax(error, 2.5 * 0x1p-24 * a->d * a->scale * all);
        top = used[r] ? fmax(top, s[r]) : top;
    }
    sum = exp(a->sink[h] - top);
    for (int32_t r = 0; r < n; r++)
        sum += s[r] = used[r] ? exp(s[r] - top) : 0;
    for (int32_t i = 0; i < a->d; i++) {
        double x = dsv4_bf16_to_f32(got[i]), y = dsv4_bf16_to_f32(want[i]), most = 0;
        for (int32_t r = 0; r < n; r++)
            most += used[r] ? s[r] / sum * fabs(rows[r * a->d + i]) : 0;
        most = most * (4 * error + 0x1p-7 + 2.5 * n * 0x1p-24) + 0x1p-8 * (fabs(x) + fabs(y));
        check_true(isnan(x) ? isnan(y) : fabs(x - y) <= most,
                   "token %d, head %d, dimension %d: got %.6g, ref has %.6g, at most %.3g apart", t, h, i, x, y, most);
    }
}

static void attention(int32_t n_tok, int32_t n_head, int32_t nope, int32_t rope, int32_t max_key, int how) {
    int32_t d = nope + rope, n_row = between(2, 200), equal = 0; /* many: later blocks raise the maximum */
    struct lists a = {.n_head = n_head, .d = d, .rope = rope, .max_key = max_key, .f = how & 1 ? DSV4_KV_BF16 : DSV4_KV_FP8,
                      .scale = 1.0f / sqrtf((float)d)};
    size_t row = dsv4_kv_row_bytes(a.f, d, rope), n = (size_t)(n_tok * n_head * d);
    dsv4_bf16 *got = check_aligned(2 * n, 2), *want = check_aligned(2 * n, 2);
    dsv4_bf16 *alone = check_aligned(2 * (size_t)(n_head * d), 2);
    dsv4_bf16 *x = check_aligned(2 * (size_t)d, 2);
    uint8_t *rows = check_aligned((size_t)n_row * row, how & 4 ? 2 : 8);
    double *decoded = check_aligned(8 * (size_t)(max_key * d), 8);
    int *used = check_aligned(sizeof(int) * (size_t)max_key, 4);
    float *cos = NULL, *sin = NULL;
    int32_t flush = (int32_t)check_below(2);
    void *scratch = check_aligned(DSV4_CUDA_ATTENTION_SCRATCH(n_tok, n_head, max_key), 16);
    void *ref_scratch = aligned_alloc(64, (DSV4_ATTENTION_SCRATCH(n_head, d) + 63) / 64 * 64);
    memset(scratch, 0xff, DSV4_CUDA_ATTENTION_SCRATCH(n_tok, n_head, max_key));
    a.q = check_aligned(2 * n, 2);
    a.keys = check_aligned((size_t)(n_tok * max_key) * sizeof *a.keys, 8);
    a.n_key = check_aligned(4 * (size_t)n_tok, 4);
    a.sink = check_aligned(4 * (size_t)n_head, 4);
    check_fill_bf16(a.q, n, CHECK_NORMAL);
    check_fill_f32(a.sink, (size_t)n_head, CHECK_NORMAL);
    for (int32_t r = 0; r < n_row; r++) {
        check_fill_bf16(x, (size_t)d, CHECK_NORMAL);
        if (how & 2 && r == 0)
            x[between(0, d - 1)] = 0x7fc0;
        ref()->kv_store(rows + (size_t)r * row, x, a.f, d, rope);
    }
    for (int32_t t = 0; t < n_tok; t++) {
        a.n_key[t] = between(0, max_key);
        for (int32_t r = 0; r < max_key; r++) {
            int masked = check_below(4) == 0 || (how & 8 && r / 64 % 2 == t % 2) || (t == 2 && check_below(90));
            a.keys[t * max_key + r] = masked ? NULL : rows + check_below((uint32_t)n_row) * row;
        }
        ref()->attention(&(struct dsv4_attention_args){
            .out = want + t * n_head * d, .q = a.q + t * n_head * d, .keys = a.keys + t * max_key, .sink = a.sink,
            .scratch = ref_scratch, .n_key = a.n_key[t], .n_head = n_head, .d_head = d, .d_rope = rope, .scale = a.scale,
            .format = a.f});
    }
    RUN(attention_mma, .out = got, .q = a.q, .keys = a.keys, .n_key = a.n_key, .sink = a.sink, .scratch = scratch,
        .n_tok = n_tok, .n_head = n_head, .d_head = d, .d_rope = rope, .max_key = max_key, .scale = a.scale, .format = a.f);
    for (int32_t t = 0; t < n_tok; t++) {
        int32_t n_rank = rows_of(&a, t, decoded, used);
        for (int32_t h = 0; h < n_head; h++)
            near_head(&a, t, h, decoded, used, n_rank, got + (t * n_head + h) * d, want + (t * n_head + h) * d);
    }
    for (size_t i = 0; i < n; i++)
        equal += got[i] == want[i] || (how & 2);
    check_true(4 * (size_t)equal >= 3 * n, "%d of %zu results equal ref's", equal, n);

    int32_t t = between(0, n_tok - 1); /* again, with rope and flush behind it, as they are for ref's result */
    if (check_below(2)) {
        cos = check_aligned(4 * (size_t)(rope / 2), 4);
        sin = check_aligned(4 * (size_t)(rope / 2), 4);
        check_fill_f32(cos, (size_t)rope / 2, CHECK_NORMAL);
        check_fill_f32(sin, (size_t)rope / 2, CHECK_NORMAL);
    }
    RUN(attention_mma, .out = alone, .q = a.q + t * n_head * d, .keys = a.keys + t * max_key, .n_key = a.n_key + t,
        .cos = cos, .sin = sin, .sink = a.sink, .scratch = scratch, .n_tok = 1, .n_head = n_head, .d_head = d, .d_rope = rope,
        .max_key = max_key, .flush = flush, .scale = a.scale, .format = a.f);
    for (int32_t h = 0; h < n_head && cos; h++)
        ref()->rope(got + (t * n_head + h) * d + nope, cos, sin, rope / 2, 1);
    if (flush)
        ref()->act_flush(got + t * n_head * d, got + t * n_head * d, n_head * d);
    same_bf16("alone", alone, got + t * n_head * d, (size_t)(n_head * d));
    free(ref_scratch);
    check_reset();
}

void check_attention_mma(void) {
    for (int i = 0; i < 16; i++) {
        dsv4_host_mma_bits = i % 2 * 24;
        attention(between(1, 3), between(1, 70), 64 * between(0, 3), 2 * between(1, 20), between(1, 200), i);
    }
    dsv4_host_mma_bits = 0;
    attention(1, 64, 448, 64, 200, 0);
}
