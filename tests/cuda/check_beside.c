/* SPDX-License-Identifier: Apache-2.0 */
/* What goes to the host for experts that are beside the device, and rows that come back. */
#include "check_cuda.h"

void check_beside(void);

static void send(int32_t n_tok, int32_t n_exp, int32_t top_k, int32_t n, int32_t few, int which) {
    size_t chosen = (size_t)(n_tok * top_k), size = (size_t)(n_tok * n);
    int32_t *ids[2], *first = check_aligned(4 * (size_t)(n_exp + 1), 4), *computed = check_aligned(4 * (size_t)n_tok, 4);
    float *weights[2];
    dsv4_bf16 *x[2][2];
    struct dsv4_weight *w = check_aligned((size_t)n_exp * sizeof *w, 8);
    uint32_t *count = check_aligned(8, 4), *sent = check_aligned(4, 4), before = (uint32_t)between(-2, 2);
    memset(w, 0, (size_t)n_exp * sizeof *w);
    for (int32_t e = 0; e < n_exp; e++)
        w[e].data = check_below(2) ? w : NULL;
    for (int i = 0; i < 2; i++) {
        ids[i] = check_aligned(4 * chosen, 4);
        weights[i] = check_aligned(4 * chosen, 4);
        for (int j = 0; j < 2; j++)
            x[i][j] = check_aligned(2 * size, 2);
    }
    for (size_t i = 0; i < chosen; i++)
        ids[0][i] = between(0, n_exp - 1);
    memset(ids[1], 0xff, 4 * chosen);
    check_fill_f32(weights[0], chosen, CHECK_NORMAL);
    for (int j = 0; j < 2; j++) {
        check_fill_bf16(x[0][j], size, CHECK_NORMAL);
        memset(x[1][j], 0x11, 2 * size);
    }
    memset(first, 0, 4 * (size_t)(n_exp + 1));
    for (size_t i = 0; i < chosen; i++)
        first[ids[0][i] + 1]++;
    for (int32_t e = 0; e < n_exp; e++)
        first[e + 1] += first[e];
    for (int32_t t = 0; t < n_tok; t++) {
        computed[t] = 0;
        for (int32_t j = 0; j < top_k; j++) {
            int32_t e = ids[0][t * top_k + j];
            computed[t] |= !w[e].data && first[e + 1] - first[e] <= few;
        }
    }
    count[0] = 0;
    count[1] = before;
    *sent = before;
    RUN(send, .sent = sent, .to_ids = ids[1], .to_weights = weights[1], .to_quant = which & 1 ? x[1][0] : NULL,
        .to_plain = which & 2 ? x[1][1] : NULL, .count = count, .ids = ids[0], .weights = weights[0], .x_quant = x[0][0],
        .x_plain = x[0][1], .w = w, .group_first = first, .n_tok = n_tok, .top_k = top_k, .n = n, .few = few);
    check_true(*sent == before + 1 && count[0] == 0 && count[1] == before + 1, "the number: got %u after %u", *sent, before);
    same("ids", ids[1], ids[0], chosen, 4);
    same_f32("weights", weights[1], weights[0], chosen);
    for (int32_t t = 0; t < n_tok; t++)
        for (int j = 0; j < 2; j++) {
            int there = computed[t] && which & (1 << j);
            dsv4_bf16 *got = x[1][j] + t * n, *want = there ? x[0][j] + t * n : NULL;
            for (int32_t i = 0; i < n; i++)
                check_true(got[i] == (want ? want[i] : 0x1111), "operand %d of token %d", i, t);
        }
    check_reset();
}

static void receive(int32_t n_row, int32_t room, int32_t n) {
    size_t all = (size_t)(n_row + room) * (size_t)n;
    dsv4_bf16 *rows = check_aligned(2 * all + 2, 2), *from = check_aligned(2 * (size_t)(n_row * n) + 2, 2);
    int32_t *to = check_aligned(4 * (size_t)n_row + 4, 4), *count = check_aligned(4, 4);
    memset(rows, 0x11, 2 * all);
    check_fill_bf16(from, (size_t)(n_row * n), CHECK_NORMAL);
    for (int32_t i = 0; i < n_row; i++)
        to[i] = n_row + room - 1 - i;
    *count = n_row;
    RUN(receive, .rows = rows, .from = from, .to = to, .n_row = count, .max_row = n_row + room, .n = n);
    for (int32_t i = 0; i < n_row + room; i++)
        for (int32_t k = 0; k < n; k++) {
            int32_t row = n_row + room - 1 - i;
            check_true(rows[i * n + k] == (row < n_row ? from[row * n + k] : 0x1111), "row %d", i);
        }
    check_reset();
}

void check_beside(void) {
    for (int i = 0; i < 40; i++) {
        int32_t n = check_below(2) ? 8 * between(1, 80) : between(1, 600);
        send(between(1, 12), between(1, 20), between(1, 5), n, between(0, 4), i % 4);
        receive(between(0, 6), between(0, 6), n);
    }
}
