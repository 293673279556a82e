/* SPDX-License-Identifier: Apache-2.0 */
/* Embedding, the look for values that are not finite. */
#include <math.h>

#include "check_cuda.h"

void check_ends(void);

static void embed(int32_t n_tok, int32_t hc, int32_t d, int f32) {
    int32_t vocab = 5, *ids = check_aligned(4 * (size_t)n_tok, 4);
    size_t n = (size_t)(n_tok * hc * d);
    dsv4_bf16 *got = check_aligned(2 * n, 2), *want = check_aligned(2 * n, 2);
    void *table = check_aligned((f32 ? 4 : 2) * (size_t)(vocab * d), f32 ? 4 : 2);
    if (f32)
        check_fill_f32(table, (size_t)(vocab * d), CHECK_EDGES);
    else
        check_fill_bf16(table, (size_t)(vocab * d), CHECK_EDGES);
    for (int32_t t = 0; t < n_tok; t++) {
        ids[t] = between(0, vocab - 1);
        for (int32_t i = 0; i < hc * d; i++) {
            int32_t from = ids[t] * d + i % d;
            want[t * hc * d + i] = f32 ? dsv4_f32_to_bf16(((float *)table)[from]) : ((dsv4_bf16 *)table)[from];
        }
    }
    RUN(embed, .streams = got, .table = table, .ids = ids, .n_tok = n_tok, .hc = hc, .d_model = d, .table_f32 = f32);
    same("embed", got, want, n, 2);
    check_reset();
}

static void all_finite(size_t n, int f32, int bad_one) {
    int32_t *bad = check_aligned(4, 4);
    void *x = check_aligned((f32 ? 4 : 2) * n, f32 ? 4 : 2);
    size_t at = check_below((uint32_t)n);
    if (f32)
        check_fill_f32(x, n, CHECK_EDGES);
    else
        check_fill_bf16(x, n, CHECK_EDGES);
    if (bad_one && f32)
        ((float *)x)[at] = bad_one == 1 ? NAN : -INFINITY;
    else if (bad_one)
        ((dsv4_bf16 *)x)[at] = bad_one == 1 ? 0x7fc0 : 0xff80;
    for (int before = 3; before < 8; before += 4) {
        *bad = before;
        RUN(finite, .bad = bad, .x = x, .n = n, .layer = 5, .f32 = f32);
        int want = bad_one && before > 5 ? 5 : before;
        check_true(*bad == want, "finite: got %d, wanted %d", *bad, want);
    }
    check_reset();
}

void check_ends(void) {
    for (int i = 0; i < 30; i++) {
        embed(between(1, 4), between(1, 5), between(1, 300), i % 2);
        all_finite((size_t)between(1, i % 5 ? 1000 : 300000), i % 2, i % 3);
    }
}
