/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Collapse and spread of the residual streams: every variant against ref; 1 to 8 streams, any
 * width, in place, by ranges of columns, extreme gates, buffers ending at an unmapped page.
 */
#include "check.h"

#include <string.h>

void check_hyper(void);

static void collapse(int32_t hc, int32_t d, enum check_kind kind, int head) {
    const struct dsv4_variant *v[CHECK_MAX_VARIANTS];
    int n_variants = check_variants(DSV4_OP_hc_pre, v);
    size_t n = (size_t)(hc * d), gates = (size_t)(head ? hc : (2 + hc) * hc), h = (size_t)hc;
    dsv4_bf16 *streams = check_bytes(2 * n), *x = check_bytes(2 * (size_t)d);
    float *dots = check_bytes(4 * gates), *base = check_bytes(4 * gates);
    float *scale = check_bytes(head ? 4 : 12), *post = check_bytes(4 * h);
    float *comb = check_bytes(4 * h * h), *pre = check_bytes(4 * h);
    check_fill_bf16(streams, n, kind);
    check_fill_f32(dots, gates, kind);
    check_fill_f32(base, gates, CHECK_NORMAL);
    check_fill_f32(scale, head ? 1 : 3, CHECK_NORMAL);
    struct dsv4_hc_pre_args a = {.x = x,
                                 .post = head ? NULL : post,
                                 .comb = head ? NULL : comb,
                                 .streams = streams,
                                 .dots = dots,
                                 .scale = scale,
                                 .base = base,
                                 .hc = hc,
                                 .d_model = d,
                                 .sinkhorn_iters = 1 + (int32_t)check_below(20),
                                 .norm_eps = 1e-6f,
                                 .hc_eps = 1e-6f,
                                 .pre = pre};
    ((dsv4k_hc_pre_fn *)v[0]->fn)(&a);
    for (int i = 0; i < n_variants; i++) {
        struct dsv4_hc_pre_args b = a;
        b.x = check_bytes(2 * (size_t)d);
        b.pre = check_below(2) ? check_bytes(4 * h) : NULL;
        if (!head) {
            b.post = check_bytes(4 * h);
            b.comb = check_bytes(4 * h * h);
        }
        ((dsv4k_hc_pre_fn *)v[i]->fn)(&b);
        check_equal_bf16("collapsed", v[i], b.x, x, (size_t)d);
        if (b.pre)
            check_equal_f32("pre", v[i], b.pre, pre, h);
        if (head)
            continue;
        check_equal_f32("post", v[i], b.post, post, h);
        check_equal_f32("comb", v[i], b.comb, comb, h * h);
    }
    check_reset();
}

static void spread(int32_t hc, int32_t d, enum check_kind kind) {
    const struct dsv4_variant *v[CHECK_MAX_VARIANTS];
    int n_variants = check_variants(DSV4_OP_hc_post, v);
    size_t n = (size_t)(hc * d), h = (size_t)hc;
    dsv4_bf16 *streams = check_bytes(2 * n), *y = check_bytes(2 * (size_t)d);
    dsv4_bf16 *want = check_bytes(2 * n);
    float *post = check_bytes(4 * h), *comb = check_bytes(4 * h * h);
    check_fill_bf16(streams, n, kind);
    check_fill_bf16(y, (size_t)d, kind);
    check_fill_f32(post, h, kind);
    check_fill_f32(comb, h * h, CHECK_NORMAL);
    if (check_below(8) == 0)
        y[check_below((uint32_t)d)] = check_below(2) ? 0x7f80 : 0xffc1;
    struct dsv4_hc_post_args a = {want, y, streams, post, comb, hc, d, 0, d};
    ((dsv4k_hc_post_fn *)v[0]->fn)(&a);
    for (int i = 0; i < n_variants; i++) {
        dsv4k_hc_post_fn *f = (dsv4k_hc_post_fn *)v[i]->fn;
        dsv4_bf16 *out = check_bytes(2 * n), *place = check_bytes(2 * n);
        int32_t cut = (int32_t)check_below((uint32_t)d + 1);
        a.out = out;
        a.c0 = 0;
        a.c1 = cut;
        f(&a);
        a.c0 = cut;
        a.c1 = d;
        f(&a);
        check_equal_bf16("spread in two pieces", v[i], out, want, n);
        memcpy(place, streams, 2 * n);
        struct dsv4_hc_post_args b = {place, y, place, post, comb, hc, d, 0, d};
        f(&b);
        check_equal_bf16("spread in place", v[i], place, want, n);
    }
    check_reset();
}

void check_hyper(void) {
    static const int32_t widths[] = {128, 255, 1000, 4096, 7168};
    for (int kind = 0; kind < CHECK_KINDS; kind++) {
        for (int i = 0; i < 65 + 5; i++) {
            int32_t d = i < 65 ? i + 1 : widths[i - 65];
            for (int32_t hc = d > 1000 ? 4 : 1; hc <= (d > 1000 ? 4 : 8); hc++) {
                collapse(hc, d, (enum check_kind)kind, 0);
                collapse(hc, d, (enum check_kind)kind, 1);
                spread(hc, d, (enum check_kind)kind);
            }
        }
    }
}
