/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Router, gated activation and the sum over experts: every variant against ref; sizes around the
 * lanes, ties, NaN and infinities, every gate value, buffers ending at an unmapped page.
 */
#include "check.h"

#include <math.h>
#include <string.h>

void check_moe(void);

/* forced: 0 no bias, 1 bias, 2 forced ids */
static void router(int32_t n_exp, int32_t top_k, int way, int odd) {
    static const float specials[] = {NAN,   INFINITY, -INFINITY,  0.0f,
                                     -0.0f, 20.0f,    20.000002f, -90.0f};
    const struct dsv4_variant *v[CHECK_MAX_VARIANTS];
    int n_variants = check_variants(DSV4_OP_router, v);
    size_t n = (size_t)n_exp, k = (size_t)top_k;
    float *logits = check_bytes(4 * n), *bias = check_bytes(4 * n), *scores = check_bytes(4 * n);
    float *weights = check_bytes(4 * k);
    int32_t *ids = check_bytes(4 * k), *forced = check_bytes(4 * k);
    for (size_t e = 0; e < n; e++) {
        logits[e] = 12.0f * check_normal();
        bias[e] = (float)check_below(4); /* ties */
        if (odd && check_below(6) == 0)
            logits[e] = specials[check_below(8)];
        if (odd && check_below(6) == 0)
            bias[e] = specials[check_below(8)];
    }
    for (size_t j = 0; j < k; j++)
        forced[j] = (int32_t)check_below((uint32_t)n_exp);
    struct dsv4_router_args a = {.ids = ids,
                                 .weights = weights,
                                 .scores = scores,
                                 .logits = logits,
                                 .bias = way == 1 ? bias : NULL,
                                 .forced = way == 2 ? forced : NULL,
                                 .n_exp = n_exp,
                                 .top_k = top_k,
                                 .route_scale = 1.5f};
    ((dsv4k_router_fn *)v[0]->fn)(&a);
    for (int i = 0; i < n_variants; i++) {
        struct dsv4_router_args b = a;
        b.ids = check_bytes(4 * k);
        b.weights = check_bytes(4 * k);
        b.scores = check_bytes(4 * n);
        ((dsv4k_router_fn *)v[i]->fn)(&b);
        check_equal("ids", v[i], b.ids, ids, k, 4);
        check_equal_f32("scores", v[i], b.scores, scores, n);
        check_equal_f32("weights", v[i], b.weights, weights, k);
    }
    check_reset();
}

static void swiglu(const dsv4_bf16 *g, const dsv4_bf16 *u, int32_t n, float limit, float weight) {
    const struct dsv4_variant *v[CHECK_MAX_VARIANTS];
    int n_variants = check_variants(DSV4_OP_swiglu, v);
    size_t m = (size_t)n, bytes = 2 * m;
    dsv4_bf16 *want = check_bytes(bytes);
    ((dsv4k_swiglu_fn *)v[0]->fn)(want, g, u, n, limit, weight);
    for (int i = 0; i < n_variants; i++) {
        dsv4k_swiglu_fn *f = (dsv4k_swiglu_fn *)v[i]->fn;
        dsv4_bf16 *out = check_bytes(bytes), *on_g = check_bytes(bytes), *on_u = check_bytes(bytes);
        memcpy(on_g, g, bytes);
        memcpy(on_u, u, bytes);
        f(out, g, u, n, limit, weight);
        f(on_g, on_g, u, n, limit, weight);
        f(on_u, g, on_u, n, limit, weight);
        check_equal_bf16("gated", v[i], out, want, m);
        check_equal_bf16("gated on g", v[i], on_g, want, m);
        check_equal_bf16("gated on u", v[i], on_u, want, m);
    }
}

static void expert_sum(int32_t n, int32_t n_row, enum check_kind kind) {
    const struct dsv4_variant *v[CHECK_MAX_VARIANTS];
    int n_variants = check_variants(DSV4_OP_expert_sum, v);
    size_t m = (size_t)n;
    const dsv4_bf16 *rows[9];
    for (int32_t r = 0; r < n_row; r++) {
        dsv4_bf16 *row = check_bytes(2 * m);
        check_fill_bf16(row, m, kind);
        if (check_below(16) == 0)
            row[check_below((uint32_t)n)] = 0x7f80;
        rows[r] = row;
    }
    dsv4_bf16 *want = check_bytes(2 * m);
    ((dsv4k_expert_sum_fn *)v[0]->fn)(want, rows, n_row, n);
    for (int i = 0; i < n_variants; i++) {
        dsv4_bf16 *out = check_bytes(2 * m);
        ((dsv4k_expert_sum_fn *)v[i]->fn)(out, rows, n_row, n);
        check_equal_bf16("sum", v[i], out, want, m);
    }
    check_reset();
}

static dsv4_bf16 *filled(int32_t n, enum check_kind kind) {
    dsv4_bf16 *x = check_bytes(2 * (size_t)n);
    check_fill_bf16(x, (size_t)n, kind);
    return x;
}

void check_moe(void) {
    static const int32_t experts[] = {128, 255, 256, 257, 384};
    static const int32_t widths[] = {127, 128, 129, 2048, 3072, 4096, 7168};
    for (int i = 0; i < 65 + 5; i++) {
        int32_t n = i < 65 ? i + 1 : experts[i - 65];
        for (int way = 0; way < 3; way++)
            for (int odd = 0; odd < 2; odd++)
                for (int32_t k = 1; k <= n && k <= 8; k++)
                    router(n, k, way, odd);
    }
    for (int kind = 0; kind < CHECK_KINDS; kind++) {
        for (int i = 0; i < 65 + 7; i++) {
            int32_t n = i < 65 ? i + 1 : widths[i - 65];
            swiglu(filled(n, (enum check_kind)kind), filled(n, (enum check_kind)kind), n, 10.0f,
                   0.3f);
            check_reset();
            for (int32_t n_row = 1; n_row <= 9; n_row += 2)
                expert_sum(n, n_row, (enum check_kind)kind);
        }
    }
    dsv4_bf16 *every = check_bytes(2 * 65536), *up = check_bytes(2 * 65536);
    for (uint32_t i = 0; i < 65536; i++) {
        every[i] = (dsv4_bf16)i;
        up[i] = (dsv4_bf16)(i * 40503u); /* odd, so every value once */
    }
    swiglu(every, up, 65536, 10.0f, 1.0f);
    swiglu(every, up, 65536, INFINITY, -2.5f);
    check_reset();
}
