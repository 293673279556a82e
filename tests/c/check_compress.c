/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Pooling of compressor windows: every variant against ref; any width, 1 to 128 rows, absent rows,
 * gates of minus infinity and NaN, rows ending at an unmapped page.
 */
#include "check.h"

#include <math.h>
#include <string.h>

void check_compress(void);

/* n floats in the middle of a buffer that ends with them, as the halves of a CSA row lie. */
static float *row(int32_t n, enum check_kind kind) {
    float *p = check_bytes(4 * (size_t)n);
    check_fill_f32(p, (size_t)n, kind);
    return p;
}

static void pool(int32_t n, int32_t n_row, enum check_kind kind, int odd) {
    const struct dsv4_variant *v[CHECK_MAX_VARIANTS];
    int n_variants = check_variants(DSV4_OP_pool, v);
    const float *k[128], *gate[128], *ape[128];
    float *shared = row(n, kind); /* one ape row for all but the first: buffers are few */
    for (int32_t r = 0; r < n_row; r++) {
        int fresh = r < 8;
        k[r] = fresh ? row(n, kind) : k[r - 8];
        float *g = fresh ? row(n, kind) : (float *)gate[r - 3];
        ape[r] = r ? shared : row(n, kind);
        if (odd && g && fresh)
            g[check_below((uint32_t)n)] = odd == 1 ? -INFINITY : r ? 1e30f : NAN;
        gate[r] = r && check_below(5) == 0 ? NULL : g;
    }
    dsv4_bf16 *want = check_bytes(2 * (size_t)n);
    struct dsv4_pool_args a = {want, k, gate, ape, n_row, n};
    ((dsv4k_pool_fn *)v[0]->fn)(&a);
    for (int i = 0; i < n_variants; i++) {
        a.out = check_bytes(2 * (size_t)n);
        ((dsv4k_pool_fn *)v[i]->fn)(&a);
        check_equal_bf16("pooled", v[i], a.out, want, (size_t)n);
    }
    check_reset();
}

void check_compress(void) {
    static const int32_t widths[] = {127, 128, 129, 512};
    static const int32_t rows[] = {1, 2, 4, 8, 32, 128};
    for (int kind = 0; kind < CHECK_KINDS; kind++)
        for (int odd = 0; odd < 3; odd++)
            for (int i = 0; i < 65 + 4; i++)
                for (int r = 0; r < 6; r++)
                    pool(i < 65 ? i + 1 : widths[i - 65], rows[r], (enum check_kind)kind, odd);
}
