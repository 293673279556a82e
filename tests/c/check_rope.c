/* SPDX-License-Identifier: Apache-2.0 */
/* Rotation of pairs and its tables: every variant against ref, any number of pairs. */
#include "check.h"

#include <string.h>

void check_rope(void);

static void rotate(int32_t n_pair, enum check_kind kind, int32_t inverse) {
    const struct dsv4_variant *v[CHECK_MAX_VARIANTS];
    int n_variants = check_variants(DSV4_OP_rope, v);
    size_t m = (size_t)n_pair;
    dsv4_bf16 *x = check_bytes(4 * m), *want = check_bytes(4 * m);
    float *cos = check_bytes(4 * m), *sin = check_bytes(4 * m);
    check_fill_bf16(x, 2 * m, kind);
    check_fill_f32(cos, m, CHECK_NORMAL);
    check_fill_f32(sin, m, CHECK_NORMAL);
    if (check_below(4) == 0)
        x[check_below((uint32_t)(2 * m))] = check_below(2) ? 0x7f80 : 0xffc1;
    memcpy(want, x, 4 * m);
    ((dsv4k_rope_fn *)v[0]->fn)(want, cos, sin, n_pair, inverse);
    for (int i = 0; i < n_variants; i++) {
        dsv4_bf16 *y = check_bytes(4 * m);
        memcpy(y, x, 4 * m);
        ((dsv4k_rope_fn *)v[i]->fn)(y, cos, sin, n_pair, inverse);
        check_equal_bf16("rotated", v[i], y, want, 2 * m);
    }
    check_reset();
}

static void table(int32_t n_pair, int32_t position) {
    const struct dsv4_variant *v[CHECK_MAX_VARIANTS];
    int n_variants = check_variants(DSV4_OP_rope_table, v);
    size_t m = (size_t)n_pair;
    float *freq = check_bytes(4 * m), *cos = check_bytes(4 * m), *sin = check_bytes(4 * m);
    for (size_t i = 0; i < m; i++)
        freq[i] = 1.0f / (float)(1 + check_below(1000000));
    ((dsv4k_rope_table_fn *)v[0]->fn)(cos, sin, freq, n_pair, position);
    for (int i = 0; i < n_variants; i++) {
        float *c = check_bytes(4 * m), *s = check_bytes(4 * m);
        ((dsv4k_rope_table_fn *)v[i]->fn)(c, s, freq, n_pair, position);
        check_equal("cos", v[i], c, cos, m, 4);
        check_equal("sin", v[i], s, sin, m, 4);
    }
    check_reset();
}

void check_rope(void) {
    for (int32_t n_pair = 1; n_pair <= 65; n_pair++) {
        for (int kind = 0; kind < CHECK_KINDS; kind++)
            for (int32_t inverse = 0; inverse < 2; inverse++)
                rotate(n_pair, (enum check_kind)kind, inverse);
        table(n_pair, n_pair == 1 ? 0 : (int32_t)check_below(1048576));
    }
}
