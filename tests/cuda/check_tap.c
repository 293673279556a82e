/* SPDX-License-Identifier: Apache-2.0 */
/* What a trace copies: widened or as it is, and filled behind what there is. */
#include "check_cuda.h"

void check_tap(void);

/* which: 0 n of each row, 1 counts, 2 visible entries. */
static void tap(int32_t n_row, int32_t width, int32_t n, int bf16, int which) {
    int32_t ld_x = n + between(0, 3), ld_out = width + between(0, 3), ratio = between(1, 5), top_k = between(0, 4);
    size_t all = (size_t)(n_row * ld_out);
    uint32_t fill = 0x7fc00000u, *got = check_aligned(4 * all, 4), *want = check_aligned(4 * all, 4);
    void *x = check_aligned((bf16 ? 2 : 4) * (size_t)(n_row * ld_x), bf16 ? 2 : 4);
    int32_t *counts = check_aligned(4 * (size_t)n_row, 4);
    if (bf16)
        check_fill_bf16(x, (size_t)(n_row * ld_x), CHECK_EDGES);
    else
        check_fill_f32(x, (size_t)(n_row * ld_x), CHECK_EDGES);
    memset(got, 0x11, 4 * all);
    memset(want, 0x11, 4 * all);
    for (int32_t t = 0; t < n_row; t++) {
        int32_t there = n < width ? n : width;
        if (which == 1)
            there = counts[t] = between(0, there);
        if (which == 2) {
            there = between(0, there);
            counts[t] = there * ratio + between(0, ratio - 1) - 1; /* the position */
            there = there > top_k ? there : 0;
        }
        for (int32_t i = 0; i < width; i++) {
            uint32_t word = i >= there ? fill : bf16 ? (uint32_t)((dsv4_bf16 *)x)[t * ld_x + i] << 16
                                                     : ((uint32_t *)x)[t * ld_x + i];
            want[t * ld_out + i] = word;
        }
    }
    RUN(tap, .out = got, .x = x, .counts = which == 1 ? counts : NULL, .positions = which == 2 ? counts : NULL,
        .ld_out = ld_out, .ld_x = ld_x, .n_row = n_row, .width = width, .n = n, .ratio = ratio, .top_k = top_k,
        .bf16 = bf16, .fill = fill);
    check_true(memcmp(got, want, 4 * all) == 0, "tap of %d rows of %d, %d of them from x", n_row, width, n);
    check_reset();
}

void check_tap(void) {
    for (int i = 0; i < 60; i++) {
        int32_t width = i % 20 ? between(1, 40) : between(1, 2000);
        tap(between(1, 9), width, i % 3 ? width : between(1, width), i % 2, i % 5 % 3);
    }
    tap(0, 3, 3, 1, 0);
}
