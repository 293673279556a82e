/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Mean square and the two norms: every variant against ref; sizes around the lanes and of the
 * models, operands at the edge of what counts as zero, NaN and infinity, buffers ending at an
 * unmapped page.
 */
#include "check.h"

#include <string.h>

void check_norm(void);

static const int32_t sizes[] = {96,   127,  128,  129,  255,  256,  512,
                                1000, 1024, 1536, 4096, 7168, 16384};
enum { N_SIZES = 65 + sizeof sizes / sizeof sizes[0] };

static void one(int32_t n, enum check_kind kind, int odd) {
    const struct dsv4_variant *v[CHECK_MAX_VARIANTS];
    size_t m = (size_t)n, bytes = 2 * m;
    dsv4_bf16 *x = check_bytes(bytes), *want = check_bytes(bytes);
    float *w = check_bytes(4 * m);
    check_fill_bf16(x, m, kind);
    check_fill_f32(w, m, kind);
    if (odd)
        x[check_below((uint32_t)n)] = odd == 1 ? 0x7f80 : odd == 2 ? 0xffc1 : 0x7f7f;

    int n_variants = check_variants(DSV4_OP_mean_square, v);
    float square = ((dsv4k_mean_square_fn *)v[0]->fn)(x, n);
    for (int i = 0; i < n_variants; i++) {
        float got = ((dsv4k_mean_square_fn *)v[i]->fn)(x, n);
        check_equal_f32("mean square", v[i], &got, &square, 1);
    }

    n_variants = check_variants(DSV4_OP_rmsnorm, v);
    ((dsv4k_rmsnorm_fn *)v[0]->fn)(want, x, w, n, 1e-6f);
    for (int i = 0; i < n_variants; i++) {
        dsv4_bf16 *out = check_bytes(bytes), *place = check_bytes(bytes);
        memcpy(place, x, bytes);
        ((dsv4k_rmsnorm_fn *)v[i]->fn)(out, x, w, n, 1e-6f);
        ((dsv4k_rmsnorm_fn *)v[i]->fn)(place, place, w, n, 1e-6f);
        check_equal_bf16("normed", v[i], out, want, m);
        check_equal_bf16("normed in place", v[i], place, want, m);
    }

    n_variants = check_variants(DSV4_OP_headnorm, v);
    memcpy(want, x, bytes);
    ((dsv4k_headnorm_fn *)v[0]->fn)(want, n, 1e-6f);
    for (int i = 0; i < n_variants; i++) {
        dsv4_bf16 *y = check_bytes(bytes);
        memcpy(y, x, bytes);
        ((dsv4k_headnorm_fn *)v[i]->fn)(y, n, 1e-6f);
        check_equal_bf16("normed head", v[i], y, want, m);
    }
    check_reset();
}

void check_norm(void) {
    for (int kind = 0; kind < CHECK_KINDS; kind++)
        for (int odd = 0; odd < 4; odd++)
            for (int i = 0; i < (int)N_SIZES; i++)
                one(i < 65 ? i + 1 : sizes[i - 65], (enum check_kind)kind, odd);
}
