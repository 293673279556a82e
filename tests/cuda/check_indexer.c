/* SPDX-License-Identifier: Apache-2.0 */
/* Index scores and selection on the device against ref: all widths, groups that are not finite, ties, NaN, -0. */
#include <math.h>
#include <stdlib.h>

#include "check_cuda.h"

void check_indexer(void);

enum { ENTRY_BLOCKS = 6, RATIO = 4 };

static void scores(int32_t n_head, int32_t d, int32_t top_k, int nan) {
    enum { TOKENS = 3 };
    const int32_t entries = between(1, ENTRY_BLOCKS * DSV4_CUDA_BLOCK_ROWS);
    const int32_t max_entry = check_below(4) ? entries + between(0, 200) : 8200; /* the larger blocks */
    size_t row = dsv4_index_row_bytes(d);
    uint8_t *q = check_bytes((size_t)(TOKENS * n_head) * row), **blocks = check_aligned(ENTRY_BLOCKS * sizeof *blocks, 8);
    dsv4_bf16 *head_w = check_aligned(2 * (size_t)(TOKENS * n_head), 2);
    float *got = check_aligned(4 * (size_t)(TOKENS * max_entry), 4);
    float *want = check_aligned(4 * (size_t)(TOKENS * max_entry), 4);
    int32_t *piece_of = check_aligned(4 * TOKENS, 4), *positions = check_aligned(4 * TOKENS, 4);
    int32_t *bad = check_aligned(4, 4), *ids = check_aligned(4 * (size_t)(TOKENS * top_k), 4);
    int32_t *want_ids = check_aligned(4 * (size_t)(TOKENS * top_k), 4), *n_id = check_aligned(4 * TOKENS, 4);
    struct dsv4_cuda_state *states = check_aligned(2 * sizeof *states, 8);
    void *scratch = aligned_alloc(64, (DSV4_INDEX_SCRATCH(n_head, d) + 4 * (size_t)max_entry + 16384 + 63) / 64 * 64);
    memset(states, 0, 2 * sizeof *states);
    states[1].index = blocks;
    for (int b = 0; b < ENTRY_BLOCKS; b++)
        blocks[b] = check_bytes(DSV4_CUDA_BLOCK_ROWS * row);
    check_fill_bytes(q, (size_t)(TOKENS * n_head) * row);
    for (int b = 0; b < ENTRY_BLOCKS; b++)
        check_fill_bytes(blocks[b], DSV4_CUDA_BLOCK_ROWS * row);
    for (int32_t i = 0; i < TOKENS * n_head + ENTRY_BLOCKS * DSV4_CUDA_BLOCK_ROWS; i++) {
        uint8_t *r = i < TOKENS * n_head ? q + (size_t)i * row
                                         : blocks[(i - TOKENS * n_head) / DSV4_CUDA_BLOCK_ROWS] +
                                               (size_t)((i - TOKENS * n_head) % DSV4_CUDA_BLOCK_ROWS) * row;
        for (int32_t b = 0; b < d / 32; b++)
            r[d / 2 + b] = (uint8_t)(nan && check_below(300) == 0 ? 255 : nan ? between(0, 254) : between(118, 130));
    }
    check_fill_bf16(head_w, (size_t)(TOKENS * n_head), CHECK_NORMAL);
    memset(got, 0, 4 * (size_t)(TOKENS * max_entry));
    memset(want, 0, 4 * (size_t)(TOKENS * max_entry));
    int found = 0, chosen = (int)check_below(3);
    int32_t *tickets = check_aligned(4 * TOKENS, 4);
    memset(tickets, 0, 4 * TOKENS);
    *bad = 9;
    for (int32_t t = 0; t < TOKENS; t++) {
        piece_of[t] = 1;
        positions[t] = RATIO * (t ? between(0, entries) : entries) + between(0, RATIO - 1) - 1;
        positions[t] = positions[t] < 0 ? 0 : positions[t];
        int32_t n = (positions[t] + 1) / RATIO;
        if (n > top_k)
            ref()->index_scores(&(struct dsv4_index_scores_args){
                .scores = want + t * max_entry, .q = q + (size_t)(t * n_head) * row,
                .keys = (const uint8_t *const *)blocks, .head_w = head_w + t * n_head, .scratch = scratch,
                .w_scale = 0.011f, .n_key = n, .block_keys = DSV4_CUDA_BLOCK_ROWS, .n_head = n_head, .d_index = d});
        for (int32_t i = 0; i < n; i++)
            found |= want[t * max_entry + i] != want[t * max_entry + i];
    }
    memset(ids, 0x5a, 4 * (size_t)(TOKENS * top_k));
    memset(want_ids, 0x5a, 4 * (size_t)(TOKENS * top_k));
    struct dsv4_cuda_top_k_args choice = {.ids = ids, .n_id = n_id, .scores = got, .positions = positions, .n_tok = TOKENS,
                                          .k = top_k, .ratio = RATIO, .max_entry = max_entry};
    RUN(scores, .pass = {.states = states, .piece_of = piece_of, .positions = positions, .n_piece = 2, .n_tok = TOKENS},
        .scores = got, .q = q, .head_w = head_w, .bad = bad, .w_scale = 0.011f, .n_head = n_head, .d_index = d,
        .ratio = RATIO, .top_k = top_k, .max_entry = max_entry, .layer = 4, .tickets = tickets,
        .choice = chosen ? &choice : NULL);
    same("index_scores", got, want, (size_t)(TOKENS * max_entry), 4);
    check_true(*bad == (found ? 4 : 9), "bad: got %d, a score is NaN: %d", *bad, found);
    if (!chosen)
        check_true(dsv4_cuda_top_k(&choice, NULL) == 0, "launch");
    for (int32_t t = 0; t < TOKENS; t++) {
        int32_t n = ref()->top_k(want_ids + t * top_k, want + t * max_entry, (positions[t] + 1) / RATIO, top_k, scratch);
        check_true(n_id[t] == n, "top_k: got %d ids, wanted %d", n_id[t], n);
    }
    same("top_k of scores", ids, want_ids, (size_t)(TOKENS * top_k), 4);
    free(scratch);
    check_reset();
}

static void top_k(int32_t n, int32_t k, int how) {
    static const float values[] = {-0.0f, 0.0f, 1.0f, -1.0f, NAN, -INFINITY, INFINITY, 0x1p-140f};
    float *x = check_aligned(4 * (size_t)n, 4);
    int32_t *ids[2], *n_id = check_aligned(4, 4), *position = check_aligned(4, 4);
    void *scratch = aligned_alloc(64, (4 * (size_t)n + 16384 + 63) / 64 * 64);
    for (int i = 0; i < 2; i++) {
        ids[i] = check_aligned(4 * (size_t)k, 4);
        memset(ids[i], 0x5a, 4 * (size_t)k);
    }
    check_fill_f32(x, (size_t)n, CHECK_NORMAL);
    for (int32_t i = 0; how && i < n; i++)
        if (check_below(2) || how == 2)
            x[i] = values[check_below(8)];
    *position = n - 1;
    int32_t want = ref()->top_k(ids[0], x, n, k, scratch);
    RUN(top_k, .ids = ids[1], .n_id = n_id, .scores = x, .positions = position, .n_tok = 1, .k = k, .ratio = 1,
        .max_entry = n);
    check_true(*n_id == want, "top_k: got %d ids, wanted %d", *n_id, want);
    same("top_k", ids[1], ids[0], (size_t)k, 4);
    free(scratch);
    check_reset();
}

void check_indexer(void) {
    for (int i = 0; i < 24; i++) {
        scores(between(1, 40), 32 << i % 4, between(1, i % 3 ? 60 : 300), i % 2);
        top_k(between(1, i % 4 ? 700 : i % 8 ? 5000 : 12000), between(1, 600), i % 3);
    }
}
