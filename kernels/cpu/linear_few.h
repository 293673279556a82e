/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Linear layers for few tokens, a template over what the including file defines (linear_units.h):
 * weights are read once; R rows are walked together, adjacent or spaced, with up to GROUP_TOKENS
 * (by lines LINE_TOKENS) at a time.  A row is taken in one of two ways:
 *
 *  - by steps of 32 columns with the functions of linear_units.h: any form, any tail;
 *  - by lines of 64 bytes, FP8_FOLD and FP4_FOLD: the input is packed once per call to what the
 *    multiply takes, padded with +0 to whole lines.  For FP8 it is also multiplied by the scales,
 *    which 128 rows share, so that a code costs no multiplication.
 *
 * For lines the including file has also defined, for R rows (all constants once inlined):
 *
 *      pack_fp8(out, x, cols, scales)    one token's input, packed_bytes(cols); 0 if one of its
 *                                        values times a scale is not finite
 *      pack_fp4(out, x, cols)
 *      line_fp8(s, at, R, T), line_fp4() the products of 64 bytes of R rows
 *      line_nan(seen)                    whether a row of e4m3 codes held a NaN
 *      line_sums(form, s, i, R, T, sums) for j < 4 the sum of row (i + j) / T, token (i + j) % T
 */
#ifndef DSV4_LINEAR_FEW_H
#define DSV4_LINEAR_FEW_H

#include "cpu/linear_lines.h"
#include "cpu/linear_units.h"

/* How the rows of a tile lie and what is prefetched. */
struct walk {
    int32_t stride; /* from row to row */
    size_t ahead;   /* bytes from what is read to what is prefetched */
    size_t jump;    /* ... and where that leaves the row */
};

/* R rows of weights on their way by steps, with T tokens. */
struct rows {
    const uint8_t *w[MAX_ROWS];
    size_t scales[MAX_ROWS]; /* index of the row's first scale */
    struct row_scale scale[MAX_ROWS];
    seen_codes seen[MAX_ROWS];
    const dsv4_bf16 *x[GROUP_TOKENS];
    lanes acc[MAX_ROWS][GROUP_TOKENS][UNITS];
    lanes part[MAX_ROWS][GROUP_TOKENS][UNITS]; /* of a block, rule 3 */
};

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

/* What is prefetched while byte `at` of a row is read. */
INLINE size_t few_next(const struct walk *walk, size_t at, size_t bytes) {
    size_t next = at + walk->ahead;
    return next >= bytes ? next + walk->jump : next;
}

/* The columns k0 ... k0 + n of R rows. */
INLINE void few_span(struct rows *s, const struct dsv4_weight *weight, const enum form form,
                     int32_t k0, int32_t n, const int R, const int T, const struct walk *walk) {
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
        const size_t next = few_next(walk, at, bytes);
        EACH (r, R)
            for (size_t line = 0; line < step_bytes; line += LINE)
                __builtin_prefetch(s->w[r] + next + line);
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

/* Row r of a tile: the rows from n_row on repeat the first and are not stored. */
INLINE int32_t tile_row(int32_t row, const struct walk *walk, int32_t n_row, int r) {
    return r < n_row ? row + r * walk->stride : row;
}

/* R rows from `row` on, n_row of them counting, times T tokens from t0 on. */
INLINE void step_tile(const struct dsv4_linear_args *a, const enum form form, int32_t row,
                      int32_t n_row, int32_t t0, const int R, const int T,
                      const struct walk *walk) {
    const int32_t cols = a->w->cols, span = is_fp8(form) ? SPAN_FP8 : SPAN_OTHER;
    struct rows s;
    EACH (r, R) {
        const int32_t here = tile_row(row, walk, n_row, r);
        s.w[r] = (const uint8_t *)a->w->data + (size_t)here * row_bytes(form, cols);
        s.scales[r] = row_scales(form, here, cols);
        s.seen[r] = seen_zero();
        EACH (t, T)
            EACH (u, UNITS)
                s.acc[r][t][u] = lanes_zero();
    }
    EACH (t, T)
        s.x[t] = token(a, t0 + t);
    for (int32_t k = 0; k < cols; k += span)
        few_span(&s, a->w, form, k, cols - k < span ? cols - k : span, R, T, walk);
    EACH (r, R) {
        float sums[4];
        const int nan = is_fp8(form) && seen_nan(s.seen[r]);
        sum4(sums, s.acc[r][0], s.acc[r][T > 1 ? 1 : 0], s.acc[r][T > 2 ? 2 : 0],
             s.acc[r][T > 3 ? 3 : 0]);
        if (r < n_row)
            EACH (t, T)
                store_sum(a, t0 + t, row + r * walk->stride, nan ? __builtin_nanf("") : sums[t]);
    }
}

/* The last columns of R rows, from byte `at` on, become a line of their own. */
INLINE void line_tail(struct lines *s, uint8_t (*codes)[LINE], uint8_t (*scale)[LINE_BLOCKS],
                      const enum form form, size_t at, size_t bytes, const int R) {
    const size_t block = at / FP4_BLOCK_BYTES, blocks = (bytes - at) / FP4_BLOCK_BYTES;
    EACH (r, R) {
        memset(codes[r], 0, LINE);
        memcpy(codes[r], s->w[r] + at, bytes - at);
        s->w[r] = codes[r] - at;
        if (form == FP4_FOLD) {
            memset(scale[r], 127, LINE_BLOCKS);
            memcpy(scale[r], s->scale[r] + block, blocks);
            s->scale[r] = scale[r] - block;
        }
    }
}

/* Like step_tile, by lines. */
INLINE void line_tile(const struct dsv4_linear_args *a, const enum form form, int32_t row,
                      int32_t n_row, int32_t t0, const int R, const int T,
                      const struct walk *walk) {
    const size_t bytes = row_bytes(form, a->w->cols);
    _Alignas(LINE) uint8_t codes[MAX_ROWS][LINE];
    uint8_t scale[MAX_ROWS][LINE_BLOCKS];
    struct lines s;
    EACH (r, R) {
        const int32_t here = tile_row(row, walk, n_row, r);
        s.w[r] = (const uint8_t *)a->w->data + (size_t)here * bytes;
        s.scale[r] = (const uint8_t *)a->w->scale + row_scales(form, here, a->w->cols);
        s.seen[r] = seen_line_zero();
        EACH (t, T)
            EACH (u, UNITS)
                s.acc[r][t][u] = lanes_zero();
    }
    if (form == FP4_FOLD && t0 == 0) /* the scales of the rows that are walked next */
        EACH (r, R)
            for (size_t i = 0; i < bytes / FP4_BLOCK_BYTES; i += LINE)
                __builtin_prefetch(s.scale[r] + (walk->jump + bytes) / FP4_BLOCK_BYTES + i);
    s.cols = a->w->cols;
    s.packed = packed_bytes(s.cols);
    s.x = (const uint8_t *)a->scratch + (size_t)t0 * s.packed;
    for (size_t at = 0; at < bytes; at += LINE) {
        const size_t next = few_next(walk, at, bytes);
        EACH (r, R)
            __builtin_prefetch(s.w[r] + next);
        if (__builtin_expect(at + LINE > bytes, 0))
            line_tail(&s, codes, scale, form, at, bytes, R);
        if (form == FP4_FOLD)
            line_fp4(&s, at, R, T);
        else
            line_fp8(&s, at, R, T);
    }
    EACH (q, (R * T + 3) / 4) {
        float sums[4];
        line_sums(form, &s, 4 * q, R, T, sums);
        EACH (j, 4) {
            const int r = (4 * q + j) / T, t = (4 * q + j) % T;
            if (r < R && r < n_row) {
                const int nan = form == FP8_FOLD && line_nan(s.seen[r]);
                store_sum(a, t0 + t, row + r * walk->stride, nan ? __builtin_nanf("") : sums[j]);
            }
        }
    }
}

INLINE void few_tile(const struct dsv4_linear_args *a, const enum form form, const int lines,
                     int32_t row, int32_t n_row, int32_t t0, const int R, const int T,
                     const struct walk *walk) {
    if (lines)
        line_tile(a, form, row, n_row, t0, R, T, walk);
    else
        step_tile(a, form, row, n_row, t0, R, T, walk);
}

/* The same for n tokens, at most `group`, which is at most GROUP_TOKENS, by lines LINE_TOKENS. */
INLINE void few_group(const struct dsv4_linear_args *a, const enum form form, const int lines,
                      int32_t row, int32_t n_row, int32_t t, int32_t n, const int R,
                      const int group, const struct walk *walk) {
    if (lines && group > 5 && n == 6)
        line_tile(a, form, row, n_row, t, R, 6, walk);
    else if (lines && group > 4 && n == 5)
        line_tile(a, form, row, n_row, t, R, 5, walk);
    else if (group > 3 && n == 4)
        few_tile(a, form, lines, row, n_row, t, R, 4, walk);
    else if (group > 2 && n == 3)
        few_tile(a, form, lines, row, n_row, t, R, 3, walk);
    else if (group > 1 && n == 2)
        few_tile(a, form, lines, row, n_row, t, R, 2, walk);
    else
        few_tile(a, form, lines, row, n_row, t, R, 1, walk);
}

/* Rows [row0, row1) by R, with all tokens, in as few groups of at most `group` as can be, of nearly
 * equal size: the first finds the weights in memory, the others in the nearest cache. */
INLINE void few_walk(const struct dsv4_linear_args *a, const enum form form, const int lines,
                     int32_t row0, int32_t row1, const int R, const int group, const int spaced,
                     const int ahead) {
    const int32_t tiles = (row1 - row0 + R - 1) / R, groups = (a->n_tok + group - 1) / group;
    const struct walk walk = {.stride = spaced ? tiles : 1,
                              .ahead = (size_t)ahead,
                              .jump = spaced ? 0 : (size_t)(R - 1) * row_bytes(form, a->w->cols)};
    for (int32_t i = 0; i < tiles; i++) {
        const int32_t row = row0 + i * (spaced ? 1 : R);
        const int32_t left = (row1 - row + walk.stride - 1) / walk.stride;
        const int32_t n_row = left < R ? left : R;
        if (group == 1) {
            few_tile(a, form, lines, row, n_row, 0, R, 1, &walk);
            continue;
        }
        for (int32_t g = 0, t = 0, end; g < groups; g++, t = end) {
            end = a->n_tok * (g + 1) / groups;
            few_group(a, form, lines, row, n_row, t, end - t, R, group, &walk);
        }
    }
}

#endif
