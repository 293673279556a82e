/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Linear layers for many tokens, a template over what the including
 * file defines (linear_units.h): as many rows as PANEL_BYTES hold
 * are decoded to a panel of operands, [tile][unit][step][row of the tile], then multiplied with
 * tile after tile of tokens.  Missing rows of the last tile are zeros, missing tokens repeat the
 * last.
 */
#ifndef DSV4_LINEAR_MANY_H
#define DSV4_LINEAR_MANY_H

#include "cpu/linear_units.h"

/* A panel shares the second-level cache with a tile of tokens; it never outgrows the scratch. */
enum { PANEL_BYTES = 448 << 10, PANEL_MAX_ROWS = 120 };

INLINE int32_t panel_rows(size_t tile_bytes) {
    size_t fit = PANEL_BYTES / tile_bytes, most = PANEL_MAX_ROWS / TILE_ROWS;
    return (int32_t)(fit < 1 ? 1 : fit < most ? fit : most) * TILE_ROWS;
}

/* Bytes of one unit of a panel tile, all steps. */
INLINE size_t unit_bytes(int32_t cols) {
    return (size_t)((cols + STEP - 1) / STEP) * TILE_ROWS * OPERAND_BYTES;
}

/* One row decoded into its tile of the panel; scales (rule 3) to [block][row of the tile]. */
INLINE void decode_row(const struct dsv4_weight *weight, const enum form form, int32_t row,
                       uint8_t *panel, float *scales) {
    const int32_t cols = weight->cols, span = is_fp8(form) ? SPAN_FP8 : SPAN_OTHER;
    const uint8_t *w = (const uint8_t *)weight->data + (size_t)row * row_bytes(form, cols);
    const size_t first = row_scales(form, row, cols);
    struct row_scale scale;
    seen_codes seen = seen_zero();
    uint8_t *out = panel;
    for (int32_t k = 0; k < cols; k += span) {
        int32_t n = cols - k < span ? cols - k : span;
        prepare_scale(form, weight, first, k, n, &scale);
        for (int32_t step = 0; step * STEP < n; step++, out += TILE_ROWS * OPERAND_BYTES) {
            EACH (u, UNITS) {
                const uint8_t *p = w + row_bytes(form, k + step * STEP + u * UNIT);
                const int32_t here = unit_columns(n - step * STEP, u);
                operand v = here == UNIT ? decode(form, p, &scale, step, here, 0, &seen)
                                         : decode(form, p, &scale, step, here, 1, &seen);
                operand_store(out + (size_t)u * unit_bytes(cols), v);
            }
            if (form == FP4_BLOCK)
                scales[(k / STEP + step) * TILE_ROWS] = scale.each[step];
        }
        if (form == FP8_BLOCK)
            scales[k / SPAN_FP8 * TILE_ROWS] = scale.block;
    }
    if (is_fp8(form) && seen_nan(seen)) /* one NaN operand makes every sum of the row a NaN */
        memset(panel, 0xff, OPERAND_BYTES);
}

/* The lanes of unit u of a register tile over all of K; `next` is a row of x to prefetch. */
INLINE void many_unit(lanes sums[TILE_ROWS][TILE_TOKENS], const enum form form,
                      const uint8_t *panel, const float *scales, const dsv4_bf16 *const *x,
                      const dsv4_bf16 *next, int32_t cols, int u) {
    const int blocks = form == FP8_BLOCK || form == FP4_BLOCK;
    const int32_t block = form == FP8_BLOCK ? DSV4_FP8_BLOCK : blocks ? DSV4_FP4_BLOCK : cols;
    lanes total[TILE_ROWS][TILE_TOKENS], acc[TILE_ROWS][TILE_TOKENS];
    EACH (r, TILE_ROWS)
        EACH (t, TILE_TOKENS)
            acc[r][t] = total[r][t] = lanes_zero();
    for (int32_t k0 = 0; k0 < cols; k0 += block) {
        const int32_t end = cols - k0 < block ? cols : k0 + block;
        int32_t k = k0;
        for (; k + STEP <= end; k += STEP, panel += TILE_ROWS * OPERAND_BYTES) {
            __builtin_prefetch(next + k);
            multiply_tile(acc, panel, x, k + u * UNIT, UNIT, 0);
        }
        if (k < end) {
            multiply_tile(acc, panel, x, k + u * UNIT, unit_columns(end - k, u), 1);
            panel += TILE_ROWS * OPERAND_BYTES;
        }
        if (blocks)
            EACH (r, TILE_ROWS)
                EACH (t, TILE_TOKENS) {
                    lanes scale = lanes_set1(scales[k0 / block * TILE_ROWS + r]);
                    total[r][t] = lanes_fma(acc[r][t], scale, total[r][t]);
                    acc[r][t] = lanes_zero();
                }
    }
    EACH (r, TILE_ROWS)
        EACH (t, TILE_TOKENS)
            sums[r][t] = blocks ? total[r][t] : acc[r][t];
}

/* A register tile: TILE_ROWS panel rows times TILE_TOKENS tokens; n_row and n_tok of them count. */
INLINE void many_tile(const struct dsv4_linear_args *a, const enum form form, const uint8_t *panel,
                      const float *scales, int32_t row, int32_t n_row, int32_t t0, int32_t n_tok,
                      const dsv4_bf16 *next) {
    const dsv4_bf16 *x[TILE_TOKENS];
    lanes acc[UNITS][TILE_ROWS][TILE_TOKENS];
    EACH (t, TILE_TOKENS)
        x[t] = token(a, t0 + (t < n_tok ? t : n_tok - 1));
    EACH (u, UNITS)
        many_unit(acc[u], form, panel + (size_t)u * unit_bytes(a->w->cols), scales, x, next,
                  a->w->cols, u);
    EACH (r, TILE_ROWS) {
        float sums[4];
        lanes parts[4][UNITS];
        EACH (t, 4)
            EACH (u, UNITS)
                parts[t][u] = acc[u][r][t < TILE_TOKENS ? t : 0];
        sum4(sums, parts[0], parts[1], parts[2], parts[3]);
        if (r < n_row)
            for (int t = 0; t < n_tok; t++)
                store_sum(a, t0 + t, row + r, sums[t]);
    }
}

/* All rows with all tokens. */
INLINE void many(const struct dsv4_linear_args *a, const enum form form) {
    const int32_t cols = a->w->cols;
    const size_t tile_bytes = UNITS * unit_bytes(cols);
    const size_t tile_scales = (size_t)((cols + STEP - 1) / STEP) * TILE_ROWS;
    const int32_t most = panel_rows(tile_bytes);
    uint8_t *panel = a->scratch;
    float *scales = (float *)(void *)(panel + (size_t)(most / TILE_ROWS) * tile_bytes);
    for (int32_t row = a->row0; row < a->row1; row += most) {
        const int32_t n = a->row1 - row < most ? a->row1 - row : most;
        const int32_t tiles = (n + TILE_ROWS - 1) / TILE_ROWS;
        if (n % TILE_ROWS)
            memset(panel + (size_t)(tiles - 1) * tile_bytes, 0, tile_bytes);
        for (int32_t r = 0; r < n; r++)
            decode_row(a->w, form, row + r,
                       panel + (size_t)(r / TILE_ROWS) * tile_bytes + r % TILE_ROWS * OPERAND_BYTES,
                       scales + (size_t)(r / TILE_ROWS) * tile_scales + r % TILE_ROWS);
        for (int32_t t = 0; t < a->n_tok; t += TILE_TOKENS)
            for (int32_t i = 0; i < tiles; i++) {
                int32_t n_row = n - i * TILE_ROWS, n_tok = a->n_tok - t;
                int32_t ahead = t + TILE_TOKENS + i; /* the first tiles fetch a token each */
                if (i >= TILE_TOKENS || ahead >= a->n_tok)
                    ahead = t;
                many_tile(a, form, panel + (size_t)i * tile_bytes, scales + (size_t)i * tile_scales,
                          row + i * TILE_ROWS, n_row, t, n_tok < TILE_TOKENS ? n_tok : TILE_TOKENS,
                          token(a, ahead));
            }
    }
}

#endif
