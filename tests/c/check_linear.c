/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Linear layers: every variant against ref, all weight formats, scale rules and types, tails of K,
 * token counts, row ranges, gathered tokens, unaligned weights, everything ending at an unmapped
 * page.
 */
#include "check.h"

#include <stdio.h>
#include <string.h>

void check_linear(void);

struct shape {
    int32_t rows, cols, n_tok;
};

struct weight_case {
    enum dsv4_weight_format format;
    enum dsv4_scale_type type;
    enum dsv4_scale_rule rule;
    const char *name;
};

static const struct weight_case cases[] = {
    {DSV4_W_FP8, DSV4_SCALE_E8M0, DSV4_SCALE_FOLD, "fp8 fold"},
    {DSV4_W_FP8, DSV4_SCALE_E8M0, DSV4_SCALE_BLOCK, "fp8 block e8m0"},
    {DSV4_W_FP8, DSV4_SCALE_F32, DSV4_SCALE_BLOCK, "fp8 block f32"},
    {DSV4_W_FP8, DSV4_SCALE_BF16, DSV4_SCALE_BLOCK, "fp8 block bf16"},
    {DSV4_W_FP8, DSV4_SCALE_F32, DSV4_SCALE_ROUND, "fp8 round f32"},
    {DSV4_W_FP8, DSV4_SCALE_BF16, DSV4_SCALE_ROUND, "fp8 round bf16"},
    {DSV4_W_FP8, DSV4_SCALE_E8M0, DSV4_SCALE_ROUND, "fp8 round e8m0"},
    {DSV4_W_FP4, DSV4_SCALE_E8M0, DSV4_SCALE_FOLD, "fp4 fold"},
    {DSV4_W_FP4, DSV4_SCALE_E8M0, DSV4_SCALE_BLOCK, "fp4 block"},
    {DSV4_W_BF16, DSV4_SCALE_E8M0, DSV4_SCALE_NONE, "bf16"},
    {DSV4_W_F32, DSV4_SCALE_E8M0, DSV4_SCALE_NONE, "f32"},
};

static const int few_ops[] = {DSV4_OP_linear_few_fp8, DSV4_OP_linear_few_fp4,
                              DSV4_OP_linear_few_bf16, DSV4_OP_linear_few_f32};
static const int many_ops[] = {DSV4_OP_linear_many_fp8, DSV4_OP_linear_many_fp4,
                               DSV4_OP_linear_many_bf16, DSV4_OP_linear_many_f32};

/* Codes: anything but NaN, in every second weight normal numbers alone, and a NaN now and then when
 * asked for. */
static void fill_codes(uint8_t *p, size_t n, int nan) {
    const int normal = (int)check_below(2);
    check_fill_bytes(p, n);
    for (size_t i = 0; i < n; i++) {
        if ((p[i] & 0x7f) == 0x7f)
            p[i] ^= 1;
        if (normal && (p[i] & 0x78) == 0)
            p[i] |= 0x08;
    }
    if (nan && n)
        p[check_below((uint32_t)n)] = check_below(2) ? 0x7f : 0xff;
}

/* e8m0 bytes: near 1, or the whole range that folds, or (not folded) the whole range but NaN. */
static void fill_e8m0(uint8_t *p, size_t n, const struct weight_case *c, int wide) {
    int low = c->format == DSV4_W_FP8 ? DSV4_FOLD_FP8_MIN : DSV4_FOLD_FP4_MIN;
    int high = c->format == DSV4_W_FP8 ? DSV4_FOLD_FP8_MAX : DSV4_FOLD_FP4_MAX;
    if (c->rule != DSV4_SCALE_FOLD && wide) {
        low = 0;
        high = 200;
    } else if (!wide) {
        low = 110;
        high = 130;
    }
    for (size_t i = 0; i < n; i++)
        p[i] = (uint8_t)(low + (int)check_below((uint32_t)(high - low + 1)));
}

static void fill_scales(void *p, size_t n, const struct weight_case *c, int wide) {
    if (c->type == DSV4_SCALE_E8M0)
        fill_e8m0(p, n, c, wide);
    else if (c->type == DSV4_SCALE_BF16)
        check_fill_bf16(p, n, wide ? CHECK_SPREAD : CHECK_NORMAL);
    else
        for (size_t i = 0; i < n; i++) {
            float s;
            check_fill_f32(&s, 1, wide ? CHECK_SPREAD : CHECK_NORMAL);
            memcpy((char *)p + 4 * i, &s, sizeof s);
        }
}

static size_t weight_bytes(enum dsv4_weight_format format, size_t n) {
    return format == DSV4_W_FP8    ? n
           : format == DSV4_W_FP4  ? n / 2
           : format == DSV4_W_BF16 ? 2 * n
                                   : 4 * n;
}

/* A random weight whose data and scales end at an unmapped page; for odd `skew` the data are not
 * aligned to 2 bytes. */
static struct dsv4_weight make_weight(const struct weight_case *c, int32_t rows, int32_t cols,
                                      enum check_kind kind, int nan) {
    size_t n = (size_t)rows * (size_t)cols, bytes = weight_bytes(c->format, n);
    uint8_t *data = check_bytes(bytes);
    if (c->format == DSV4_W_F32) {
        for (size_t i = 0; i < n; i++) {
            float v;
            check_fill_f32(&v, 1, kind);
            memcpy(data + 4 * i, &v, sizeof v);
        }
    } else if (c->format == DSV4_W_BF16) {
        for (size_t i = 0; i < n; i++) {
            dsv4_bf16 v;
            check_fill_bf16(&v, 1, kind);
            memcpy(data + 2 * i, &v, sizeof v);
        }
    } else if (c->format == DSV4_W_FP4) {
        check_fill_bytes(data, bytes);
    } else {
        fill_codes(data, bytes, nan);
    }
    struct dsv4_weight w = {.data = data,
                            .rows = rows,
                            .cols = cols,
                            .format = (uint8_t)c->format,
                            .scale_type = (uint8_t)c->type,
                            .scale_rule = (uint8_t)c->rule};
    if (c->rule != DSV4_SCALE_NONE) {
        size_t blocks = c->format == DSV4_W_FP4
                            ? n / DSV4_FP4_BLOCK
                            : ((size_t)rows + 127) / 128 * (((size_t)cols + 127) / 128);
        static const size_t size[] = {1, 4, 2};
        void *scale = check_bytes(blocks * size[c->type]);
        fill_scales(scale, blocks, c, kind != CHECK_NORMAL);
        w.scale = scale;
    }
    return w;
}

/* The whole layer through ref; then every variant over the same rows, cut in two at a random row.
 */
static void compare(const struct weight_case *c, const struct dsv4_weight *w, struct shape s,
                    const dsv4_bf16 *x, ptrdiff_t ld_x, const int32_t *tok, int out_f32) {
    const struct dsv4_variant *v[CHECK_MAX_VARIANTS];
    size_t size = out_f32 ? 4 : 2, n_out = (size_t)s.n_tok * (size_t)s.rows;
    void *want = check_aligned(n_out * size, size),
         *scratch = check_aligned(DSV4_LINEAR_SCRATCH(s.cols), 64);
    void *got = check_aligned(n_out * size, size);
    struct dsv4_linear_args a = {.out = want,
                                 .x = x,
                                 .tok = tok,
                                 .w = w,
                                 .scratch = scratch,
                                 .ld_out = s.rows,
                                 .ld_x = ld_x,
                                 .n_tok = s.n_tok,
                                 .row1 = s.rows,
                                 .out_f32 = out_f32};
    int op = s.n_tok > DSV4_FEW_TOKENS ? many_ops[c->format] : few_ops[c->format];
    int n = check_variants((enum dsv4_op)op, v);
    ((dsv4k_linear_fn *)v[0]->fn)(&a);
    char what[128];
    snprintf(what, sizeof what, "%s, rows %d, cols %d, tokens %d%s", c->name, s.rows, s.cols,
             s.n_tok, tok ? ", gathered" : "");
    for (int i = 0; i < n; i++) {
        memset(got, 0x5a, n_out * size);
        check_fill_bytes(scratch, DSV4_LINEAR_SCRATCH(s.cols));
        int32_t cut = (int32_t)check_below((uint32_t)s.rows + 1);
        a.out = got;
        a.row0 = 0;
        a.row1 = cut;
        ((dsv4k_linear_fn *)v[i]->fn)(&a);
        a.row0 = cut;
        a.row1 = s.rows;
        ((dsv4k_linear_fn *)v[i]->fn)(&a);
        if (out_f32)
            check_equal_f32(what, v[i], got, want, n_out);
        else
            check_equal_bf16(what, v[i], got, want, n_out);
    }
}

static void check_case(const struct weight_case *c, struct shape s, enum check_kind kind, int nan) {
    if (c->format == DSV4_W_FP4)
        s.cols = (s.cols + DSV4_FP4_BLOCK - 1) / DSV4_FP4_BLOCK * DSV4_FP4_BLOCK;
    struct dsv4_weight w = make_weight(c, s.rows, s.cols, kind, nan);
    int gathered = (int)check_below(2);
    int32_t n_x = gathered ? s.n_tok + 3 : s.n_tok, *tok = NULL;
    ptrdiff_t ld_x = s.cols + (gathered ? 5 : 0);
    size_t x_elements = (size_t)(n_x - 1) * (size_t)ld_x + (size_t)s.cols;
    dsv4_bf16 *x = check_aligned(2 * x_elements, 2);
    check_fill_bf16(x, x_elements, kind);
    for (size_t i = 0; i < x_elements; i++)
        x[i] = dsv4_bf16_operand(x[i]);
    if (gathered) {
        tok = check_aligned(4 * (size_t)s.n_tok, 4);
        for (int32_t t = 0; t < s.n_tok; t++)
            tok[t] = (int32_t)check_below((uint32_t)n_x);
    }
    compare(c, &w, s, x, ld_x, tok, (int)check_below(2));
    check_reset();
}

void check_linear(void) {
    static const struct shape v4[] = {{40, 4096, 1},  {24, 16384, 1}, {70, 7168, 3}, {96, 2048, 40},
                                      {20, 1024, 13}, {136, 384, 9},  {33, 1536, 65}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const struct weight_case *c = &cases[i];
        for (int32_t cols = 1; cols <= 65; cols++)
            check_case(c, (struct shape){1 + cols % 13, cols, 1 + cols % 11},
                       (enum check_kind)(cols % CHECK_KINDS), 0);
        for (int32_t n_tok = 1; n_tok <= 34; n_tok++)
            check_case(c, (struct shape){3 + n_tok % 30, 96 + 37 * (n_tok % 9), n_tok},
                       (enum check_kind)(n_tok % CHECK_KINDS), 0);
        for (int32_t n_tok = 2; n_tok <= 33; n_tok++) /* whole lines, groups of every size */
            check_case(c, (struct shape){1 + n_tok * 11 % 71, 128 * (1 + n_tok * 5 % 7), n_tok},
                       (enum check_kind)(n_tok % CHECK_KINDS), n_tok % 8 == 0);
        for (size_t j = 0; j < sizeof v4 / sizeof v4[0]; j++)
            check_case(c, v4[j], j % 2 ? CHECK_SPREAD : CHECK_NORMAL, 0);
        check_case(c, (struct shape){150, 300, 2}, CHECK_NORMAL, 1);
        check_case(c, (struct shape){150, 300, 20}, CHECK_SPREAD, 1);
        for (int j = 0; j < 40; j++)
            check_case(c,
                       (struct shape){1 + (int32_t)check_below(300), 1 + (int32_t)check_below(700),
                                      1 + (int32_t)check_below(20)},
                       (enum check_kind)check_below(CHECK_KINDS), 0);
    }
}
