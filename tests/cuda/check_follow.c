/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Linear layers and what follows them in one launch, against one launch after the other (whose bits the other families
 * compare with ref): any format, one to eight tokens and more, layers and units of any size.
 */
#include "weights.h"

void check_follow(void);

static struct dsv4_weight some_weight(int32_t rows, int32_t cols) {
    return random_weight(&weight_cases[check_below(WEIGHT_CASES)], rows, cols, CHECK_NORMAL, 0, 0);
}

static dsv4_bf16 *some_x(size_t n) {
    dsv4_bf16 *x = check_aligned(2 * n, 2);
    check_fill_bf16(x, n, CHECK_NORMAL);
    return x;
}

static float *some_f32(size_t n) {
    float *x = check_aligned(4 * n, 4);
    check_fill_f32(x, n, CHECK_NORMAL);
    return x;
}

static int32_t *tickets(size_t n) {
    int32_t *x = check_aligned(4 * n, 4);
    memset(x, 0, 4 * n);
    return x;
}

static void collapse(int32_t n_tok, int head) {
    int32_t hc = between(1, 8), d = 32 * between(1, 9), mixes = head ? hc : (2 + hc) * hc, n_from = n_tok + 3;
    int32_t *tok = head ? check_aligned(4 * (size_t)n_tok, 4) : NULL;
    size_t n = (size_t)(n_tok * d);
    struct dsv4_weight w = some_weight(mixes, hc * d);
    struct dsv4_cuda_collapse_args c[2];
    struct dsv4_cuda_linear_args a = {.n_job = 1, .n_tok = n_tok, .tok = tok, .tickets = tickets((size_t)n_tok)};
    dsv4_bf16 *streams = some_x((size_t)(n_from * hc * d));
    float *dots[2], *scale = some_f32(3), *base = some_f32((size_t)mixes), *norm = some_f32((size_t)d);
    for (int32_t t = 0; tok && t < n_tok; t++)
        tok[t] = between(0, n_from - 1);
    for (int i = 0; i < 2; i++) {
        dots[i] = some_f32((size_t)(n_tok * mixes));
        c[i] = (struct dsv4_cuda_collapse_args){
            .x = some_x(n), .quant = some_x(n), .plain = some_x(n), .post = head ? NULL : some_f32((size_t)(n_tok * hc)),
            .comb = head ? NULL : some_f32((size_t)(n_tok * hc * hc)), .pre = some_f32((size_t)(n_tok * hc)),
            .squares = i ? some_f32((size_t)n_tok) : NULL, .streams = streams, .tok = tok, .dots = dots[i], .scale = scale,
            .base = base, .norm = norm, .n_tok = n_tok, .hc = hc, .d_model = d, .sinkhorn_iters = 3, .norm_eps = 1e-6f,
            .hc_eps = 1e-6f, .rms_eps = 1e-6f};
        a.jobs[0] = (struct dsv4_cuda_linear_job){.w = w, .x = streams, .out = dots[i], .ld_x = hc * d, .ld_out = mixes,
                                                  .out_f32 = 1};
        a.collapse = i ? &c[i] : NULL;
        check_true(dsv4_cuda_linear(&a, NULL) == 0 && (i || dsv4_cuda_collapse(&c[i], NULL) == 0), "launch");
    }
    same_bf16("collapse", c[1].x, c[0].x, n);
    same("collapse quant", c[1].quant, c[0].quant, n, 2);
    same_bf16("collapse plain", c[1].plain, c[0].plain, n);
    same_f32("pre", c[1].pre, c[0].pre, (size_t)(n_tok * hc));
    if (!head) {
        same_f32("post", c[1].post, c[0].post, (size_t)(n_tok * hc));
        same_f32("comb", c[1].comb, c[0].comb, (size_t)(n_tok * hc * hc));
    }
    check_reset();
}

static void route(int32_t n_tok, int grouped) {
    int32_t n_exp = between(1, 300), top_k = between(1, n_exp < 9 ? n_exp : 9), d = 32 * between(1, 9);
    size_t k = (size_t)(n_tok * top_k), rows = k + (size_t)n_tok, n = (size_t)(n_tok * n_exp);
    struct dsv4_weight w = some_weight(n_exp, d);
    dsv4_bf16 *x = some_x((size_t)(n_tok * d));
    struct dsv4_cuda_router_args r[2];
    struct dsv4_cuda_group_args g[2];
    struct dsv4_cuda_linear_args a = {.n_job = 1, .n_tok = n_tok, .tickets = tickets((size_t)n_tok + 1)};
    size_t tiles = (size_t)DSV4_CUDA_TILES(n_tok, n_exp, top_k, DSV4_CUDA_FEW_TILE);
    for (int i = 0; i < 2; i++) {
        float *logits = some_f32(n);
        r[i] = (struct dsv4_cuda_router_args){
            .ids = check_aligned(4 * k, 4), .weights = some_f32(k), .scores = some_f32(n), .logits = logits, .n_tok = n_tok,
            .n_exp = n_exp, .top_k = top_k, .route_scale = 1.5f};
        g[i] = (struct dsv4_cuda_group_args){
            .group_first = tickets((size_t)n_exp + 2), .row_tok = tickets(rows), .row_weight = some_f32(rows),
            .tok_rows = tickets(rows), .tiles = check_aligned(tiles * sizeof *g->tiles, 4), .n_tile = tickets(1),
            .ids = r[i].ids, .weights = r[i].weights, .n_tok = n_tok, .n_exp = n_exp, .top_k = top_k,
            .tile_tok = DSV4_CUDA_FEW_TILE};
        a.jobs[0] = (struct dsv4_cuda_linear_job){.w = w, .x = x, .out = logits, .ld_x = d, .ld_out = n_exp, .out_f32 = 1};
        a.router = i ? &r[i] : NULL;
        a.group = i && grouped ? &g[i] : NULL;
        check_true(dsv4_cuda_linear(&a, NULL) == 0 && (i || dsv4_cuda_router(&r[i], NULL) == 0), "launch");
        check_true((i && grouped) || dsv4_cuda_group(&g[i], NULL) == 0, "launch");
    }
    same("ids", r[1].ids, r[0].ids, k, 4);
    same_f32("weights", r[1].weights, r[0].weights, k);
    same_f32("scores", r[1].scores, r[0].scores, n);
    same("group_first", g[1].group_first, g[0].group_first, (size_t)n_exp + 2, 4);
    same("row_tok", g[1].row_tok, g[0].row_tok, rows, 4);
    same_f32("row_weight", g[1].row_weight, g[0].row_weight, rows);
    same("tok_rows", g[1].tok_rows, g[0].tok_rows, rows, 4);
    same("n_tile", g[1].n_tile, g[0].n_tile, 1, 4);
    same("tiles", g[1].tiles, g[0].tiles, (size_t)*g[0].n_tile, sizeof *g->tiles);
    check_reset();
}

/* The first of two layers, then the norm of its results. */
static void norm(int32_t n_tok, int32_t n) {
    int32_t other = between(1, 60), d = 32 * between(1, 4), quant = (int32_t)check_below(2);
    struct dsv4_weight w[2] = {some_weight(n, d), some_weight(other, d)};
    dsv4_bf16 *x = some_x((size_t)(n_tok * d)), *out[2], *made[2];
    float *scale = some_f32((size_t)n);
    for (int i = 0; i < 2; i++) {
        out[i] = some_x((size_t)(n_tok * n));
        made[i] = some_x((size_t)(n_tok * n));
        struct dsv4_cuda_rmsnorm_args r = {.quant = quant ? made[i] : NULL, .plain = quant ? NULL : made[i], .x = out[i],
                                           .w = scale, .n_row = n_tok, .n = n, .eps = 1e-6f};
        struct dsv4_cuda_linear_args a = {.n_job = 2, .n_tok = n_tok, .tickets = tickets(1), .norm = i ? &r : NULL};
        a.jobs[0] = (struct dsv4_cuda_linear_job){.w = w[0], .x = x, .out = out[i], .ld_x = d, .ld_out = n};
        a.jobs[1] = (struct dsv4_cuda_linear_job){.w = w[1], .x = x, .out = some_x((size_t)(n_tok * other)), .ld_x = d,
                                                  .ld_out = other};
        check_true(dsv4_cuda_linear(&a, NULL) == 0 && (i || dsv4_cuda_rmsnorm(&r, NULL) == 0), "launch");
    }
    same_bf16("norm", made[1], made[0], (size_t)(n_tok * n));
    check_reset();
}

static void heads(int32_t n_tok, int indexed) {
    int32_t n_head = between(1, 7), n = 2 * between(1, 90), n_pair = between(0, n / 2), d = 32 * between(1, 4);
    int32_t n_index = between(1, 5), dim = 32 << check_below(4), index_pair = between(1, dim / 2), all[2];
    n_pair = indexed ? (n / 2 < dim / 2 ? n / 2 : dim / 2) : n_pair;
    index_pair = indexed ? n_pair : index_pair;
    all[0] = n_head * n;
    all[1] = n_index * dim;
    struct dsv4_weight w[2] = {some_weight(all[0], d), some_weight(all[1], d)};
    dsv4_bf16 *x = some_x((size_t)(n_tok * d)), *out[2][2];
    uint8_t *rows[2];
    float *cos = some_f32((size_t)(n_tok * n_pair) + 1), *sin = some_f32((size_t)(n_tok * n_pair) + 1);
    size_t bytes = (size_t)(n_tok * n_index) * dsv4_index_row_bytes(dim);
    for (int i = 0; i < 2; i++) {
        out[i][0] = some_x((size_t)(n_tok * all[0]));
        out[i][1] = some_x((size_t)(n_tok * all[1]));
        rows[i] = check_bytes(bytes);
        memset(rows[i], 0, bytes);
        struct dsv4_cuda_headnorm_args h = {.x = out[i][0], .cos = n_pair ? cos : NULL, .sin = sin, .n_row = n_tok * n_head,
                                            .n = n, .per_tok = n_head, .n_pair = n_pair, .eps = 1e-6f};
        struct dsv4_cuda_index_args k = {.rows = rows[i], .x = out[i][1], .cos = cos, .sin = sin, .n_row = n_tok * n_index,
                                         .n = dim, .per_tok = n_index, .n_pair = index_pair, .hadamard = 1};
        struct dsv4_cuda_linear_args a = {.n_job = 1 + indexed, .n_tok = n_tok, .tickets = tickets((size_t)(n_head + n_index)),
                                          .headnorm = i ? &h : NULL, .index = i && indexed ? &k : NULL};
        for (int j = 0; j < 2; j++)
            a.jobs[j] = (struct dsv4_cuda_linear_job){.w = w[j], .x = x, .out = out[i][j], .ld_x = d, .ld_out = all[j]};
        check_true(dsv4_cuda_linear(&a, NULL) == 0 && (i || dsv4_cuda_headnorm(&h, NULL) == 0), "launch");
        check_true(i || !indexed || dsv4_cuda_index(&k, NULL) == 0, "launch");
    }
    same_bf16("heads", out[1][0], out[0][0], (size_t)(n_tok * all[0]));
    same("index rows", rows[1], rows[0], bytes, 1);
    check_reset();
}

void check_follow(void) {
    for (int i = 0; i < 20; i++) {
        int32_t n_tok = i % 7 ? between(1, 8) : between(9, 20);
        collapse(n_tok, i % 4 == 0);
        route(n_tok, i % 3 > 0);
        norm(n_tok, i % 5 ? between(1, 400) : between(2000, 4500));
        heads(n_tok, i % 2);
    }
}
