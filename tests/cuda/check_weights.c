/* SPDX-License-Identifier: Apache-2.0 */
/* See weights.h; as a family of its own: every FP8 and FP4 code with every scale, through a layer of one column. */
#include <stdlib.h>

#include "weights.h"

void check_weights(void);

const struct weight_case weight_cases[WEIGHT_CASES] = {
    {DSV4_W_FP8, DSV4_SCALE_E8M0, DSV4_SCALE_FOLD}, {DSV4_W_FP8, DSV4_SCALE_E8M0, DSV4_SCALE_BLOCK},
    {DSV4_W_FP8, DSV4_SCALE_F32, DSV4_SCALE_BLOCK}, {DSV4_W_FP8, DSV4_SCALE_BF16, DSV4_SCALE_BLOCK},
    {DSV4_W_FP8, DSV4_SCALE_F32, DSV4_SCALE_ROUND}, {DSV4_W_FP8, DSV4_SCALE_BF16, DSV4_SCALE_ROUND},
    {DSV4_W_FP8, DSV4_SCALE_E8M0, DSV4_SCALE_ROUND}, {DSV4_W_FP4, DSV4_SCALE_E8M0, DSV4_SCALE_FOLD},
    {DSV4_W_FP4, DSV4_SCALE_E8M0, DSV4_SCALE_BLOCK}, {DSV4_W_BF16, DSV4_SCALE_E8M0, DSV4_SCALE_NONE},
    {DSV4_W_F32, DSV4_SCALE_E8M0, DSV4_SCALE_NONE},
};

static void fill_scales(void *p, size_t n, const struct weight_case *c, int wide) {
    int low = 110, high = 130;
    if (wide && c->rule == DSV4_SCALE_FOLD) {
        low = c->format == DSV4_W_FP8 ? DSV4_FOLD_FP8_MIN : DSV4_FOLD_FP4_MIN;
        high = c->format == DSV4_W_FP8 ? DSV4_FOLD_FP8_MAX : DSV4_FOLD_FP4_MAX;
    } else if (wide) {
        low = 0;
        high = 200;
    }
    for (size_t i = 0; i < n; i++) {
        if (c->type == DSV4_SCALE_E8M0) {
            ((uint8_t *)p)[i] = (uint8_t)between(low, high);
        } else if (c->type == DSV4_SCALE_BF16) {
            dsv4_bf16 s;
            check_fill_bf16(&s, 1, wide ? CHECK_SPREAD : CHECK_NORMAL);
            memcpy((char *)p + 2 * i, &s, sizeof s);
        } else {
            float s;
            check_fill_f32(&s, 1, wide ? CHECK_SPREAD : CHECK_NORMAL);
            memcpy((char *)p + 4 * i, &s, sizeof s);
        }
    }
}

struct dsv4_weight random_weight(const struct weight_case *c, int32_t rows, int32_t cols, enum check_kind kind, int nan,
                                 int skew) {
    size_t n = (size_t)rows * (size_t)cols;
    size_t bytes = c->format == DSV4_W_FP8 ? n : c->format == DSV4_W_FP4 ? n / 2 : c->format == DSV4_W_BF16 ? 2 * n : 4 * n;
    uint8_t *data = skew ? check_bytes(bytes + (size_t)skew) : check_aligned(bytes, 16);
    for (size_t i = 0; c->format == DSV4_W_F32 && i < n; i++) {
        float v;
        check_fill_f32(&v, 1, kind);
        memcpy(data + 4 * i, &v, sizeof v);
    }
    for (size_t i = 0; c->format == DSV4_W_BF16 && i < n; i++) {
        dsv4_bf16 v;
        check_fill_bf16(&v, 1, kind);
        memcpy(data + 2 * i, &v, sizeof v);
    }
    if (c->format == DSV4_W_FP8 || c->format == DSV4_W_FP4)
        check_fill_bytes(data, bytes);
    for (size_t i = 0; c->format == DSV4_W_FP8 && !nan && i < n; i++)
        if ((data[i] & 0x7f) == 0x7f)
            data[i] ^= 1;
    struct dsv4_weight w;
    memset(&w, 0, sizeof w); /* padding too: on_device.c looks for pointers in it */
    w.data = data;
    w.rows = rows;
    w.cols = cols;
    w.format = (uint8_t)c->format;
    w.scale_type = (uint8_t)c->type;
    w.scale_rule = (uint8_t)c->rule;
    if (c->rule != DSV4_SCALE_NONE) {
        static const size_t size[] = {1, 4, 2};
        size_t blocks = c->format == DSV4_W_FP4 ? n / DSV4_FP4_BLOCK
                                                : ((size_t)rows + 127) / 128 * (((size_t)cols + 127) / 128);
        void *scale = check_bytes(blocks * size[c->type]);
        fill_scales(scale, blocks, c, kind != CHECK_NORMAL);
        w.scale = scale;
    }
    return w;
}

void ref_linear(const struct dsv4_weight *w, void *out, int out_f32, ptrdiff_t ld_out, const dsv4_bf16 *x, ptrdiff_t ld_x,
                const int32_t *tok, int32_t n_tok, int32_t row0, int32_t row1) {
    dsv4k_linear_fn *const by_format[DSV4_W_FORMATS] = {
        [DSV4_W_FP8] = ref()->linear_few_fp8, [DSV4_W_FP4] = ref()->linear_few_fp4,
        [DSV4_W_BF16] = ref()->linear_few_bf16, [DSV4_W_F32] = ref()->linear_few_f32};
    void *scratch = aligned_alloc(64, (DSV4_LINEAR_SCRATCH(w->cols) + 63) / 64 * 64);
    by_format[w->format](&(struct dsv4_linear_args){
        .out = out, .x = x, .tok = tok, .w = w, .scratch = scratch,
        .ld_out = ld_out, .ld_x = ld_x, .n_tok = n_tok, .row0 = row0, .row1 = row1, .out_f32 = out_f32});
    free(scratch);
}

/* x = 1 in one column, and rows for all codes: the decoded weights themselves. */
static void all_codes(const struct weight_case *c, int32_t n_tok) {
    int32_t rows = 256, cols = c->format == DSV4_W_FP4 ? 32 : 1;
    struct dsv4_weight w = random_weight(c, rows, cols, CHECK_SPREAD, 0, 0);
    uint8_t *data = check_bytes((size_t)rows * (size_t)(c->format == DSV4_W_FP4 ? 16 : 1));
    for (int32_t r = 0; r < rows; r++)
        memset(data + (c->format == DSV4_W_FP4 ? 16 * r : r), r, c->format == DSV4_W_FP4 ? 16 : 1);
    w.data = data;
    dsv4_bf16 *x = check_aligned(2 * (size_t)n_tok * (size_t)cols, 2);
    memset(x, 0, 2 * (size_t)n_tok * (size_t)cols);
    for (int32_t t = 0; t < n_tok; t++)
        x[t * cols + between(0, cols - 1)] = 0x3f80;
    size_t n = (size_t)n_tok * (size_t)rows;
    float *got = check_aligned(4 * n, 4), *want = check_aligned(4 * n, 4);
    ref_linear(&w, want, 1, rows, x, cols, NULL, n_tok, 0, rows);
    struct dsv4_cuda_linear_args a = {.n_job = 1, .n_tok = n_tok};
    a.jobs[0] = (struct dsv4_cuda_linear_job){.w = w, .x = x, .out = got, .ld_x = cols, .ld_out = rows, .out_f32 = 1};
    check_true(dsv4_cuda_linear(&a, NULL) == 0, "launch");
    same_f32("all codes", got, want, n);
    check_reset();
}

void check_weights(void) {
    for (int i = 0; i < WEIGHT_CASES; i++) {
        if (weight_cases[i].format != DSV4_W_FP8 && weight_cases[i].format != DSV4_W_FP4)
            continue;
        for (int j = 0; j < 3; j++) {
            all_codes(&weight_cases[i], 1);
            all_codes(&weight_cases[i], 9);
        }
    }
}
