/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The loops of the linear layers, a template for one instruction set and one kind of multiply.  The
 * 16 lanes of a sum lie in UNITS registers; a step is 32 columns, a unit of it 32 / UNITS.  The
 * including file has included linear_forms.h and defined, for one unit each:
 *
 *      lanes, lanes_zero(), lanes_set1(), lanes_fma()    a register of partial sums
 *      operand                                           weights or x, ready to multiply
 *      load_operand(x, n, masked)                        bf16 -> operand; masked: only n columns
 *      multiply_add(acc, w, x)                           rule 1 for one unit of a step
 *      operand_store(p, w)                               into a panel, OPERAND_BYTES
 *      multiply_tile(acc, panel, x, k, n, masked)        TILE_ROWS panel rows, TILE_TOKENS tokens
 *      struct row_scale, prepare_scale()                 the scales of one row for a span of
 * columns decode(form, p, scale, step, n, masked, seen)     weights of one row -> operand
 *      seen_codes, seen_zero(), seen_nan()               whether a row of e4m3 codes held a NaN
 *      sum4(sums, a, b, c, d)                            the tree of rule 1 for four sums
 *
 * few:  weights are read once; R rows are walked together, adjacent or spaced, with up to
 *       GROUP_TOKENS tokens at a time.
 * many: as many rows as PANEL_BYTES hold are decoded to a panel of operands, [tile][unit][step][row
 * of the tile], then multiplied with tile after tile of tokens.  Missing rows of the last tile are
 * zeros, missing tokens repeat the last one.
 */
#ifndef DSV4_LINEAR_TILES_H
#define DSV4_LINEAR_TILES_H

#include "cpu/linear_forms.h"

/* AHEAD: bytes to prefetch in the walks that are not chosen by measurement. */
enum { MAX_ROWS = 8, AHEAD = 2048, UNIT = STEP / UNITS };

/* R rows of weights on their way, with T tokens. */
struct rows {
    const uint8_t *w[MAX_ROWS];
    size_t scales[MAX_ROWS]; /* index of the row's first scale */
    struct row_scale scale[MAX_ROWS];
    seen_codes seen[MAX_ROWS];
    const dsv4_bf16 *x[GROUP_TOKENS];
    lanes acc[MAX_ROWS][GROUP_TOKENS][UNITS];
    lanes part[MAX_ROWS][GROUP_TOKENS][UNITS]; /* of a block, rule 3 */
};

/* Columns of a unit that exist, n of them left at the start of the step. */
INLINE int32_t unit_columns(int32_t n, int u) {
    int32_t left = n - u * UNIT;
    return left < 0 ? 0 : left > UNIT ? UNIT : left;
}

INLINE void few_step(struct rows *s, const enum form form, size_t at, int32_t k, int step,
                     int32_t n, const int masked, const int R, const int T) {
    EACH (u, UNITS) {
        operand x[GROUP_TOKENS];
        const int32_t here = unit_columns(n, u);
        EACH (t, T)
            x[t] = load_operand(s->x[t] + k + u * UNIT, here, masked);
        EACH (r, R) {
            const uint8_t *p = s->w[r] + at + row_bytes(form, u * UNIT);
            operand w = decode(form, p, &s->scale[r], step, here, masked, &s->seen[r]);
            EACH (t, T) {
                lanes *acc = &s->acc[r][t][u], *part = &s->part[r][t][u];
                if (form == FP8_BLOCK)
                    *part = multiply_add(*part, w, x[t]);
                else if (form == FP4_BLOCK)
                    *acc = lanes_fma(multiply_add(lanes_zero(), w, x[t]),
                                     lanes_set1(s->scale[r].each[step]), *acc);
                else
                    *acc = multiply_add(*acc, w, x[t]);
            }
        }
    }
}

/* The columns k0 ... k0 + n of R rows; `ahead` and `jump`: see few_tile. */
INLINE void few_span(struct rows *s, const struct dsv4_weight *weight, const enum form form,
                     int32_t k0, int32_t n, const int R, const int T, const int ahead,
                     size_t jump) {
    const size_t bytes = row_bytes(form, weight->cols), step_bytes = row_bytes(form, STEP);
    size_t at = row_bytes(form, k0);
    EACH (r, R) {
        prepare_scale(form, weight, s->scales[r], k0, n, &s->scale[r]);
        EACH (t, T)
            EACH (u, UNITS)
                s->part[r][t][u] = lanes_zero();
    }
    int step = 0;
    for (; (step + 1) * STEP <= n; step++, at += step_bytes) {
        if (ahead) {
            size_t next = at + (size_t)ahead;
            next += next >= bytes ? jump : 0;
            EACH (r, R)
                __builtin_prefetch(s->w[r] + next);
        }
        few_step(s, form, at, k0 + step * STEP, step, STEP, 0, R, T);
    }
    if (step * STEP < n)
        few_step(s, form, at, k0 + step * STEP, step, n - step * STEP, 1, R, T);
    if (form == FP8_BLOCK)
        EACH (r, R)
            EACH (t, T)
                EACH (u, UNITS)
                    s->acc[r][t][u] =
                        lanes_fma(s->part[r][t][u], lanes_set1(s->scale[r].block), s->acc[r][t][u]);
}

/*
 * R rows from `row` on, `stride` apart, times T tokens from t0 on.  `ahead` bytes are prefetched;
 * where that leaves the row, it is the next tile's row, `jump` bytes further.
 */
INLINE void few_tile(const struct dsv4_linear_args *a, const enum form form, int32_t row,
                     int32_t stride, int32_t t0, const int R, const int T, const int ahead,
                     size_t jump) {
    const int32_t cols = a->w->cols, span = is_fp8(form) ? SPAN_FP8 : SPAN_OTHER;
    struct rows s;
    EACH (r, R) {
        s.w[r] = (const uint8_t *)a->w->data + (size_t)(row + r * stride) * row_bytes(form, cols);
        s.scales[r] = row_scales(form, row + r * stride, cols);
        s.seen[r] = seen_zero();
        EACH (t, T)
            EACH (u, UNITS)
                s.acc[r][t][u] = lanes_zero();
    }
    EACH (t, T)
        s.x[t] = token(a, t0 + t);
    for (int32_t k = 0; k < cols; k += span)
        few_span(&s, a->w, form, k, cols - k < span ? cols - k : span, R, T, ahead, jump);
    EACH (r, R) {
        float sums[4];
        const int nan = is_fp8(form) && seen_nan(s.seen[r]);
        sum4(sums, s.acc[r][0], s.acc[r][T > 1 ? 1 : 0], s.acc[r][T > 2 ? 2 : 0],
             s.acc[r][T > 3 ? 3 : 0]);
        EACH (t, T)
            store_sum(a, t0 + t, row + r * stride, nan ? __builtin_nanf("") : sums[t]);
    }
}

/* R rows with all tokens: the first group of tokens finds the weights in memory, the others in the
 * nearest cache. */
INLINE void few_tokens(const struct dsv4_linear_args *a, const enum form form, int32_t row,
                       const int R, const int ahead) {
    size_t jump = (size_t)(R - 1) * row_bytes(form, a->w->cols);
    int32_t t = 0;
    for (; a->n_tok - t >= GROUP_TOKENS; t += GROUP_TOKENS)
        few_tile(a, form, row, 1, t, R, GROUP_TOKENS, ahead, jump);
    if (GROUP_TOKENS > 3 && a->n_tok - t == 3)
        few_tile(a, form, row, 1, t, R, 3, ahead, jump);
    else if (a->n_tok - t == 2)
        few_tile(a, form, row, 1, t, R, 2, ahead, jump);
    else if (a->n_tok - t == 1)
        few_tile(a, form, row, 1, t, R, 1, ahead, jump);
}

/* The rows from `row` on by GROUP_ROWS, the last ones singly, with any number of tokens. */
INLINE void few_rows(const struct dsv4_linear_args *a, const enum form form, int32_t row) {
    for (; row + GROUP_ROWS <= a->row1; row += GROUP_ROWS)
        few_tokens(a, form, row, GROUP_ROWS, AHEAD);
    for (; row < a->row1; row++)
        few_tokens(a, form, row, 1, 0);
}

/* One token, R rows walked together, spaced through the range or adjacent; returns the first row
 * that is left. */
INLINE int32_t few_walk(const struct dsv4_linear_args *a, const enum form form, const int R,
                        const int spaced, const int ahead) {
    int32_t row = a->row0, stride = (a->row1 - row) / R;
    for (int32_t i = 0; i < stride; i++) {
        if (spaced)
            few_tile(a, form, row + i, stride, 0, R, 1, ahead, 0);
        else
            few_tile(a, form, row + i * R, 1, 0, R, 1, ahead,
                     (size_t)(R - 1) * row_bytes(form, a->w->cols));
    }
    return row + stride * R;
}

/* For the forms that need no speed: tokens one by one. */
INLINE void few_plain(const struct dsv4_linear_args *a, const enum form form) {
    for (int32_t t = 0; t < a->n_tok; t++) {
        int32_t row = a->row0;
        for (; row + 4 <= a->row1; row += 4)
            few_tile(a, form, row, 1, t, 4, 1, AHEAD, 3 * row_bytes(form, a->w->cols));
        for (; row < a->row1; row++)
            few_tile(a, form, row, 1, t, 1, 1, 0, 0);
    }
}

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
