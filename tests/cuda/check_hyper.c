/* SPDX-License-Identifier: Apache-2.0 */
/* The collapse of streams with its norm, the head's collapse, and the spread: the device against ref. */
#include "check_cuda.h"

void check_hyper(void);

static void collapse(int32_t n_tok, int32_t hc, int32_t d, int head, int gather, enum check_kind kind) {
    size_t mixes = (size_t)(head ? hc : (2 + hc) * hc), n = (size_t)n_tok * (size_t)d, square = (size_t)(hc * hc);
    int32_t n_from = gather ? n_tok + 2 : n_tok, iters = between(1, 20);
    dsv4_bf16 *streams = check_aligned(2 * (size_t)(n_from * hc * d), 2), *want[3], *got[3];
    float *dots = check_aligned(4 * (size_t)n_tok * mixes, 4), *base = check_aligned(4 * mixes, 4);
    float *scale = check_aligned(4 * (head ? 1 : 3), 4), *norm = check_aligned(4 * (size_t)d, 4);
    float *post[2] = {NULL, NULL}, *comb[2] = {NULL, NULL}, *pre[2] = {NULL, NULL};
    int32_t *tok = gather ? check_aligned(4 * (size_t)n_tok, 4) : NULL;
    int normed = !head || (int)check_below(2);
    for (int i = 0; i < 3; i++) {
        want[i] = check_aligned(2 * n, 2);
        got[i] = check_aligned(2 * n, 2);
    }
    for (int i = 0; i < 2 && n_tok % 2; i++)
        pre[i] = check_aligned(4 * (size_t)(n_tok * hc), 4);
    for (int i = 0; i < 2 && !head; i++) {
        post[i] = check_aligned(4 * (size_t)(n_tok * hc), 4);
        comb[i] = check_aligned(4 * (size_t)n_tok * square, 4);
    }
    check_fill_bf16(streams, (size_t)(n_from * hc * d), kind);
    check_fill_f32(dots, (size_t)n_tok * mixes, kind == CHECK_SPREAD ? CHECK_NORMAL : kind);
    check_fill_f32(base, mixes, CHECK_NORMAL);
    check_fill_f32(scale, head ? 1 : 3, CHECK_NORMAL);
    check_fill_f32(norm, (size_t)d, CHECK_NORMAL);
    for (int32_t t = 0; t < n_tok; t++) {
        int32_t from = t;
        if (gather)
            from = tok[t] = between(0, n_from - 1);
        dsv4_bf16 *x = want[0] + (size_t)t * (size_t)d;
        ref()->hc_pre(&(struct dsv4_hc_pre_args){
            .x = x, .pre = pre[0] ? pre[0] + t * hc : NULL, .post = head ? NULL : post[0] + t * hc, .comb = head ? NULL : comb[0] + (size_t)t * square,
            .streams = streams + (size_t)from * (size_t)(hc * d), .dots = dots + (size_t)t * mixes, .scale = scale,
            .base = base, .hc = hc, .d_model = d, .sinkhorn_iters = iters, .norm_eps = 1e-6f, .hc_eps = 1e-6f});
        if (!normed)
            continue;
        ref()->rmsnorm(x, x, norm, d, 1e-6f);
        ref()->act_quant(want[1] + (size_t)t * (size_t)d, NULL, NULL, x, d);
        ref()->act_flush(want[2] + (size_t)t * (size_t)d, x, d);
    }
    RUN(collapse, .x = got[0], .quant = got[1], .plain = got[2], .post = post[1], .comb = comb[1], .pre = pre[1],
        .streams = streams, .tok = tok, .dots = dots, .scale = scale, .base = base, .norm = normed ? norm : NULL, .n_tok = n_tok, .hc = hc,
        .d_model = d, .sinkhorn_iters = iters, .norm_eps = 1e-6f, .hc_eps = 1e-6f, .rms_eps = 1e-6f);
    same_bf16("collapse", got[0], want[0], n);
    if (normed) {
        same("collapse quant", got[1], want[1], n, 2);
        same_bf16("collapse plain", got[2], want[2], n);
    }
    if (pre[0])
        same_f32("pre", pre[1], pre[0], (size_t)(n_tok * hc));
    if (!head) {
        same_f32("post", post[1], post[0], (size_t)(n_tok * hc));
        same_f32("comb", comb[1], comb[0], (size_t)n_tok * square);
    }
    check_reset();
}

static void spread(int32_t n_tok, int32_t hc, int32_t d, int in_place, enum check_kind kind) {
    size_t n = (size_t)(n_tok * hc * d);
    dsv4_bf16 *streams = check_aligned(2 * n, 2), *y = check_aligned(2 * (size_t)(n_tok * d), 2);
    dsv4_bf16 *want = check_aligned(2 * n, 2), *got = check_aligned(2 * n, 2);
    float *post = check_aligned(4 * (size_t)(n_tok * hc), 4), *comb = check_aligned(4 * (size_t)(n_tok * hc * hc), 4);
    check_fill_bf16(streams, n, kind);
    check_fill_bf16(y, (size_t)(n_tok * d), kind);
    check_fill_f32(post, (size_t)(n_tok * hc), CHECK_NORMAL);
    check_fill_f32(comb, (size_t)(n_tok * hc * hc), CHECK_NORMAL);
    for (int32_t t = 0; t < n_tok; t++)
        ref()->hc_post(&(struct dsv4_hc_post_args){
            .out = want + t * hc * d, .y = y + t * d, .streams = streams + t * hc * d, .post = post + t * hc,
            .comb = comb + t * hc * hc, .hc = hc, .d_model = d, .c0 = 0, .c1 = d});
    if (in_place)
        memcpy(got, streams, 2 * n);
    RUN(spread, .out = got, .y = y, .streams = in_place ? got : streams, .post = post, .comb = comb, .n_tok = n_tok,
        .hc = hc, .d_model = d);
    same_bf16("spread", got, want, n);
    check_reset();
}

void check_hyper(void) {
    for (int i = 0; i < 40; i++) {
        enum check_kind kind = (enum check_kind)check_below(CHECK_KINDS);
        int32_t hc = i % 2 ? 4 : between(1, 8), d = i % 10 ? between(1, 300) : 1500;
        collapse(between(1, 4), hc, d, i % 3 == 0, (int)check_below(2), kind);
        spread(between(1, 4), hc, d, i % 2, kind);
    }
}
