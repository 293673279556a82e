/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Linear layers for few tokens, a template over what the including
 * file defines (linear_units.h): weights are read once; R rows are
 * walked together, adjacent or spaced, with up to GROUP_TOKENS tokens at a time.
 */
#ifndef DSV4_LINEAR_FEW_H
#define DSV4_LINEAR_FEW_H

#include "cpu/linear_units.h"

/* AHEAD: bytes to prefetch in the walks that are not chosen by measurement. */
enum { MAX_ROWS = 8, AHEAD = 2048 };

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

#endif
