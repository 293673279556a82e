/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Linear layers and experts on tensor cores: within the error of launches.h of the exact sum (in double) and of ref, for
 * both orders of an mma on the host; a token's results the same bits for any number of tokens and any neighbours; layers
 * that tensor cores cannot take equal to ref.
 */
#include <math.h>

#include "weights.h"

void check_linear_mma(void);

extern int dsv4_host_mma_bits;

static const float bf16_unit = 0x1p-8f; /* half a unit of the last place, relative */

/* Element (r, k) of w, as an operand but for bf16 values below 2^-55; scale: what rule 3 multiplies with, else 1. */
static double element(const struct dsv4_weight *w, int32_t r, int32_t k, double *scale) {
    size_t cols = (size_t)w->cols, at = (size_t)r * cols + (size_t)k;
    const uint8_t *p = w->data;
    *scale = 1;
    if (w->format == DSV4_W_BF16) {
        dsv4_bf16 v;
        memcpy(&v, p + 2 * at, 2);
        return dsv4_bf16_to_f32(v);
    }
    int fp4 = w->format == DSV4_W_FP4;
    float code = fp4 ? dsv4_e2m1_to_f32((uint8_t)(p[at / 2] >> at % 2 * 4 & 15)) : dsv4_e4m3_to_f32(p[at]), s;
    size_t number = fp4 ? at / DSV4_FP4_BLOCK
                        : (size_t)(r / DSV4_FP8_BLOCK) * ((cols + DSV4_FP8_BLOCK - 1) / DSV4_FP8_BLOCK) +
                              (size_t)(k / DSV4_FP8_BLOCK);
    if (w->scale_type == DSV4_SCALE_E8M0) {
        s = dsv4_e8m0_to_f32(((const uint8_t *)w->scale)[number]);
    } else if (w->scale_type == DSV4_SCALE_F32) {
        memcpy(&s, (const uint8_t *)w->scale + 4 * number, 4);
    } else {
        dsv4_bf16 half;
        memcpy(&half, (const uint8_t *)w->scale + 2 * number, 2);
        s = dsv4_bf16_to_f32(half);
    }
    if (w->scale_rule == DSV4_SCALE_ROUND)
        return dsv4_bf16_to_f32(dsv4_bf16_operand(dsv4_f32_to_bf16(code * s)));
    if (w->scale_rule == DSV4_SCALE_BLOCK)
        *scale = s;
    return w->scale_rule == DSV4_SCALE_FOLD ? (double)code * s : code;
}

/* One result against the exact sum and ref's. */
static void near_one(const struct dsv4_weight *w, int32_t r, const dsv4_bf16 *x, float got, float want, int out_f32) {
    double sum = 0, all = 0, below = 0, scale;
    for (int32_t k = 0; k < w->cols; k++) {
        double v = element(w, r, k, &scale), product = v * scale * dsv4_bf16_to_f32(x[k]);
        sum += product;
        all += fabs(product);
        below += fabs(v) < 0x1p-55 ? fabs(product) : 0; /* what ref leaves out */
    }
    if (isnan(sum) || isnan(want)) {
        check_true(isnan(got) && isnan(want) && isnan(sum), "row %d: got %g, wanted NaN", r, (double)got);
        return;
    }
    double error = 2.5 * w->cols * 0x1p-24 * all, round = out_f32 ? 0 : bf16_unit * (fabs(sum) + error);
    check_true(fabs(got - sum) <= error + round, "row %d: got %.9g, the sum is %.9g, of |terms| %.3g, off by %.3g, at most %.3g",
               r, (double)got, sum, all, fabs(got - sum), error + round);
    /* ref: chains of K / 16 and four more; rule 3 joins each block */
    error += (w->cols / 16.0 + 4 + w->cols / 32.0) * 0x1p-24 * all + below;
    check_true(fabs((double)got - want) <= error + 2 * round, "row %d: got %.9g, ref has %.9g", r, (double)got, (double)want);
}

static float value_of(const void *p, size_t i, int out_f32) {
    return out_f32 ? ((const float *)p)[i] : dsv4_bf16_to_f32(((const dsv4_bf16 *)p)[i]);
}

static struct dsv4_cuda_linear_job random_job(int32_t n_x, enum check_kind kind, int nan, int plain) {
    const struct weight_case *c = &weight_cases[check_below(WEIGHT_CASES)];
    int32_t groups = check_below(3) ? 1 : between(1, 3), rows = groups * (groups == 1 ? between(1, 290) : plain ? 128 : between(1, 60));
    int32_t cols = 32 * between(1, check_below(3) ? 9 : 24);
    if (!plain && check_below(2))
        cols += c->format == DSV4_W_FP4 ? 0 : between(1, 31); /* not for tensor cores */
    ptrdiff_t ld_x = (ptrdiff_t)groups * cols + 8 * between(0, 2), ld_out = rows + between(0, 3);
    ld_x = plain ? (ld_x + 7) / 8 * 8 : ld_x;
    int out_f32 = (int)check_below(2);
    dsv4_bf16 *x = check_aligned(2 * (size_t)(n_x * ld_x), 16);
    check_fill_bf16(x, (size_t)(n_x * ld_x), kind);
    ref()->act_flush(x, x, (int32_t)(n_x * ld_x));
    return (struct dsv4_cuda_linear_job){.w = random_weight(c, rows, cols, kind, nan, plain ? 0 : (int)check_below(2)),
        .x = x, .ld_x = ld_x, .ld_out = ld_out, .group_rows = groups > 1 ? rows / groups : 0, .group_x = cols,
        .out_f32 = out_f32};
}

static int on_tensor_cores(const struct dsv4_cuda_linear_job *job) {
    if (job->w.format == DSV4_W_FP8 && job->group_rows % 128)
        return 0;
    return job->w.format != DSV4_W_F32 && job->w.cols % 32 == 0 && (uintptr_t)job->w.data % 16 == 0 && job->ld_x % 8 == 0 &&
           job->group_x % 8 == 0;
}

/* Tokens of the launch `a` alone or among fewer, the same rows of x: the same bits. */
static void fewer(const struct dsv4_cuda_linear_args *a) {
    int32_t n = between(1, a->n_tok), first = between(0, a->n_tok - n);
    struct dsv4_cuda_linear_args b = *a;
    int32_t *tok = check_aligned(4 * (size_t)n, 4);
    for (int32_t t = 0; t < n; t++) { /* backwards, so that each is at another place of its tile */
        int32_t from = first + n - 1 - t;
        tok[t] = a->tok ? a->tok[from] : from;
    }
    b.tok = tok;
    b.n_tok = n;
    for (int j = 0; j < a->n_job; j++)
        b.jobs[j].out = check_aligned((size_t)(n * b.jobs[j].ld_out) * 4, 8);
    check_true(dsv4_cuda_linear(&b, NULL) == 0, "launch");
    for (int j = 0; j < a->n_job; j++)
        for (int32_t t = 0; t < n; t++) {
            const struct dsv4_cuda_linear_job *job = &a->jobs[j];
            size_t size = job->out_f32 ? 4 : 2, row = size * (size_t)job->ld_out;
            const uint8_t *got = (const uint8_t *)b.jobs[j].out + row * (size_t)t;
            const uint8_t *want = (const uint8_t *)job->out + row * (size_t)(first + n - 1 - t);
            if (job->out_f32)
                same_f32("alone", (const float *)(const void *)got, (const float *)(const void *)want, (size_t)job->w.rows);
            else
                same_bf16("alone", (const dsv4_bf16 *)(const void *)got, (const dsv4_bf16 *)(const void *)want,
                          (size_t)job->w.rows);
        }
}

static void one_launch(int32_t n_tok, enum check_kind kind, int nan, int plain) {
    struct dsv4_cuda_linear_args a = {.n_job = between(1, 3), .n_tok = n_tok, .tensor_cores = 1};
    int32_t n_x = n_tok + 3, *tok = check_below(2) ? check_aligned(4 * (size_t)n_tok, 4) : NULL;
    for (int32_t t = 0; tok && t < n_tok; t++)
        tok[t] = between(0, n_x - 1);
    a.tok = tok;
    for (int j = 0; j < a.n_job; j++) {
        struct dsv4_cuda_linear_job *job = &a.jobs[j];
        *job = random_job(n_x, kind, nan, plain);
        size_t n = (size_t)(n_tok * job->ld_out), size = job->out_f32 ? 4 : 2;
        job->out = check_aligned(n * size, size);
        memset(job->out, 0x5a, n * size); /* between the rows nothing is written */
    }
    check_true(dsv4_cuda_linear(&a, NULL) == 0, "launch");
    for (int j = 0; j < a.n_job; j++) {
        const struct dsv4_cuda_linear_job *job = &a.jobs[j];
        size_t n = (size_t)(n_tok * job->ld_out), size = job->out_f32 ? 4 : 2;
        void *want = check_aligned(n * size, size);
        memset(want, 0x5a, n * size);
        int32_t group = job->group_rows ? job->group_rows : job->w.rows;
        for (int32_t r = 0; r < job->w.rows; r += group)
            ref_linear(&job->w, want, job->out_f32, job->ld_out, job->x + r / group * job->group_x, job->ld_x, tok, n_tok, r,
                       r + group);
        int exact = !on_tensor_cores(job);
        for (size_t i = 0; i < n; i++) {
            int32_t t = (int32_t)(i / (size_t)job->ld_out), r = (int32_t)(i % (size_t)job->ld_out);
            float got = value_of(job->out, i, job->out_f32), v = value_of(want, i, job->out_f32);
            if (exact || r >= job->w.rows)
                check_true(dsv4_f32_bits(got) == dsv4_f32_bits(v) || (isnan(got) && isnan(v)), "token %d, row %d", t, r);
            else if (check_below(7) == 0)
                near_one(&job->w, r, job->x + (tok ? tok[t] : t) * job->ld_x + r / group * job->group_x, got, v, job->out_f32);
        }
    }
    fewer(&a);
    check_reset();
}

/* One projection of experts: their tiles give what each expert's rows give as a layer. */
static void experts(int32_t n_exp, int32_t n_row) {
    int32_t rows = between(1, 200), cols = 32 * between(1, 8), at = 0, n_tile = 0;
    struct dsv4_weight *w[2];
    struct dsv4_cuda_tile *tiles = check_aligned(sizeof *tiles * (size_t)(n_exp + n_row), 4);
    int32_t *count = check_aligned(4, 4), *row_tok = check_aligned(4 * (size_t)n_row, 4), kinds = 0;
    dsv4_bf16 *x = check_aligned(2 * (size_t)(n_row * cols), 16), *out[2];
    check_fill_bf16(x, (size_t)(n_row * cols), CHECK_NORMAL);
    for (int i = 0; i < 2; i++) {
        w[i] = check_aligned(sizeof *w[i] * (size_t)n_exp, 8);
        out[i] = check_aligned(2 * (size_t)(n_row * rows), 2);
        memset(out[i], 0, 2 * (size_t)(n_row * rows));
        for (int32_t e = 0; e < n_exp; e++) {
            const struct weight_case *c = &weight_cases[check_below(WEIGHT_CASES)];
            while (c->format == DSV4_W_F32)
                c = &weight_cases[check_below(WEIGHT_CASES)];
            w[i][e] = random_weight(c, rows, cols, CHECK_NORMAL, 0, 0);
            kinds |= DSV4_CUDA_MMA_KIND(c->format, c->rule);
        }
    }
    for (int32_t i = 0; i < n_row; i++)
        row_tok[i] = between(0, n_row - 1);
    while (at < n_row) {
        int32_t n = between(1, DSV4_CUDA_MMA_TILE);
        n = n < n_row - at ? n : n_row - at;
        tiles[n_tile++] = (struct dsv4_cuda_tile){between(0, n_exp - 1), at, n};
        at += n;
    }
    *count = n_tile;
    const void *gone = w[1][0].data;
    w[1][0].data = NULL;
    RUN(experts, .w = {w[0], w[1]}, .out = {out[0], out[1]}, .x_quant = x, .x_plain = x, .row_tok = row_tok, .tiles = tiles,
        .n_tile = count, .max_tile = n_tile + 2, .tile_tok = DSV4_CUDA_MMA_TILE, .rows = rows, .cols = cols, .n_tok = n_row,
        .kinds = kinds);
    w[1][0].data = gone;
    for (int32_t i = 0; i < n_tile; i++)
        for (int j = 0; j < 2; j++) {
            dsv4_bf16 *want = check_aligned(2 * (size_t)(tiles[i].n * rows), 4);
            memset(want, 0, 2 * (size_t)(tiles[i].n * rows));
            struct dsv4_cuda_linear_args a = {.n_job = 1, .n_tok = tiles[i].n, .tok = row_tok + tiles[i].first, .tensor_cores = 1};
            a.jobs[0] = (struct dsv4_cuda_linear_job){.w = w[j][tiles[i].expert], .x = x, .out = want, .ld_x = cols, .ld_out = rows};
            if (j == 0 || tiles[i].expert)
                check_true(dsv4_cuda_linear(&a, NULL) == 0, "launch");
            same_bf16("experts", out[j] + tiles[i].first * rows, want, (size_t)(tiles[i].n * rows));
        }
    check_reset();
}

void check_linear_mma(void) {
    static const int32_t counts[] = {1, 3, 16, 17, 60, 128, 129, 200};
    for (int i = 0; i < 32; i++) {
        dsv4_host_mma_bits = i % 2 * 24;
        one_launch(counts[check_below(sizeof counts / sizeof counts[0])], (enum check_kind)(i / 2 % CHECK_KINDS), i % 16 == 9,
                   i % 8 != 6);
    }
    for (int i = 0; i < 8; i++) {
        dsv4_host_mma_bits = i % 2 * 24;
        experts(between(1, 5), between(1, 260));
    }
    dsv4_host_mma_bits = 0;
}
