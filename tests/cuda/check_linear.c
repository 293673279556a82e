/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Linear layers on the device against ref: all formats and scale rules, tails of rows and columns, one token to two
 * tiles, several layers in a launch, gathered tokens, groups of rows, data that are not aligned, NaN codes.
 */
#include "weights.h"

void check_linear(void);

static int32_t some_tokens(void) {
    static const int32_t counts[] = {1, 1, 2, 3, 4, 7, 8, 9, 32, 33, 70};
    return counts[check_below(sizeof counts / sizeof counts[0])];
}

static void one_launch(int n_job, int32_t n_tok, enum check_kind kind, int nan) {
    struct dsv4_cuda_linear_args a = {.n_job = n_job, .n_tok = n_tok};
    int32_t *tok = check_below(2) ? check_aligned(4 * (size_t)n_tok, 4) : NULL, n_x = n_tok + 3;
    float *want[DSV4_CUDA_JOBS];
    for (int32_t t = 0; tok && t < n_tok; t++)
        tok[t] = between(0, n_x - 1);
    a.tok = tok;
    for (int j = 0; j < n_job; j++) {
        const struct weight_case *c = &weight_cases[check_below(WEIGHT_CASES)];
        int32_t groups = check_below(3) ? 1 : between(1, 3), rows = groups * between(1, 150 / groups);
        int32_t most = check_below(3) ? 300 : 1500;
        int32_t cols = c->format == DSV4_W_FP4 ? 32 * between(1, most / 32) : between(1, most);
        int32_t skew = check_below(2) ? 0 : between(1, 15);
        struct dsv4_weight w = random_weight(c, rows, cols, kind, nan, skew);
        ptrdiff_t ld_x = (ptrdiff_t)groups * cols + between(0, 3), ld_out = rows + between(0, 3);
        dsv4_bf16 *x = check_aligned(2 * (size_t)(n_x * ld_x), 2);
        check_fill_bf16(x, (size_t)(n_x * ld_x), kind);
        ref()->act_flush(x, x, (int32_t)(n_x * ld_x));
        int out_f32 = (int)check_below(2);
        size_t n = (size_t)(n_tok * ld_out), size = out_f32 ? 4 : 2;
        void *got = check_aligned(n * size, size);
        want[j] = check_aligned(n * size, size);
        memset(got, 0x5a, n * size); /* between the rows nothing is written */
        memset(want[j], 0x5a, n * size);
        for (int32_t g = 0; g < groups; g++)
            ref_linear(&w, want[j], out_f32, ld_out, x + g * cols, ld_x, tok, n_tok, rows / groups * g,
                       rows / groups * (g + 1));
        a.jobs[j] = (struct dsv4_cuda_linear_job){.w = w, .x = x, .out = got, .ld_x = ld_x, .ld_out = ld_out,
            .group_rows = groups > 1 ? rows / groups : 0, .group_x = cols, .out_f32 = out_f32};
    }
    check_true(dsv4_cuda_linear(&a, NULL) == 0, "launch");
    for (int j = 0; j < n_job; j++) {
        size_t n = (size_t)(n_tok * a.jobs[j].ld_out);
        if (a.jobs[j].out_f32)
            same_f32("linear f32", a.jobs[j].out, want[j], n);
        else
            same_bf16("linear bf16", a.jobs[j].out, (const dsv4_bf16 *)want[j], n);
    }
    check_reset();
}

/* A launch and what follows its results, against one operation after the other. */
enum follower { ACT, SPREAD, FOLLOWERS };

static void followed(enum follower how, int32_t n_tok) {
    const struct weight_case *c = &weight_cases[check_below(WEIGHT_CASES)];
    int32_t groups = how == ACT ? between(1, 3) : 1, each = between(1, 200), rows = groups * each, cols = 32 * between(1, 9);
    int32_t hc = between(1, 8);
    struct dsv4_weight w = random_weight(c, rows, cols, CHECK_NORMAL, 0, 0);
    size_t n = (size_t)(n_tok * rows), n_x = (size_t)(n_tok * groups * cols), n_ticket = 2 + (size_t)rows / 128;
    dsv4_bf16 *x = check_aligned(2 * n_x, 2), *y[2], *z[2], *streams[2];
    float *post = check_aligned(4 * (size_t)(n_tok * hc), 4), *comb = check_aligned(4 * (size_t)(n_tok * hc * hc), 4);
    int32_t *tickets = check_aligned(4 * n_ticket, 4), quant = (int32_t)check_below(2);
    for (int i = 0; i < 2; i++) {
        y[i] = check_aligned(2 * n, 2);
        z[i] = check_aligned(2 * n, 2);
        streams[i] = check_aligned(2 * n * (size_t)hc, 2);
    }
    check_fill_bf16(x, n_x, CHECK_NORMAL);
    check_fill_bf16(streams[0], n * (size_t)hc, CHECK_NORMAL);
    check_fill_f32(post, (size_t)(n_tok * hc), CHECK_NORMAL);
    check_fill_f32(comb, (size_t)(n_tok * hc * hc), CHECK_NORMAL);
    memcpy(streams[1], streams[0], 2 * n * (size_t)hc);
    memset(tickets, 0, 4 * n_ticket);
    struct dsv4_cuda_act_args act = {.out = z[1], .x = y[1], .n_row = n_tok, .n = rows, .quant = quant};
    struct dsv4_cuda_spread_args spread = {.out = streams[1], .y = y[1], .streams = streams[1], .post = post, .comb = comb,
                                           .n_tok = n_tok, .hc = hc, .d_model = rows};
    struct dsv4_cuda_linear_args a = {.n_job = 1, .n_tok = n_tok, .tickets = tickets, .act = how == ACT ? &act : NULL,
                                      .spread = how == SPREAD ? &spread : NULL};
    a.jobs[0] = (struct dsv4_cuda_linear_job){.w = w, .x = x, .out = y[1], .ld_x = groups * cols, .ld_out = rows,
                                              .group_rows = groups > 1 ? each : 0, .group_x = cols};
    check_true(dsv4_cuda_linear(&a, NULL) == 0, "launch");
    for (int32_t g = 0; g < groups; g++)
        ref_linear(&w, y[0], 0, rows, x + g * cols, groups * cols, NULL, n_tok, each * g, each * (g + 1));
    same_bf16("linear", y[1], y[0], n);
    for (int32_t t = 0; t < n_tok; t++) {
        if (how == ACT && quant)
            ref()->act_quant(z[0] + t * rows, NULL, NULL, y[0] + t * rows, rows);
        else if (how == ACT)
            ref()->act_flush(z[0] + t * rows, y[0] + t * rows, rows);
        else
            ref()->hc_post(&(struct dsv4_hc_post_args){
                .out = streams[0] + t * hc * rows, .y = y[0] + t * rows, .streams = streams[0] + t * hc * rows,
                .post = post + t * hc, .comb = comb + t * hc * hc, .hc = hc, .d_model = rows, .c0 = 0, .c1 = rows});
    }
    if (how == ACT)
        same("act", z[1], z[0], n, 2);
    same_bf16("spread", streams[1], streams[0], n * (size_t)hc);
    check_reset();
}

void check_linear(void) {
    for (int i = 0; i < 24; i++)
        followed((enum follower)(i % FOLLOWERS), i % 6 ? between(1, 8) : between(9, 40));
    for (int i = 0; i < 120; i++)
        one_launch(between(1, 4), some_tokens(), (enum check_kind)check_below(CHECK_KINDS), check_below(4) == 0);
}
