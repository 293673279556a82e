/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The loops of the linear layers on 16-lane registers, for one kind of multiply.  The including
 * file has defined
 *
 *      operand                              32 weights or 32 x, ready to multiply
 *      expand(bf16)                         32 bf16 values -> operand
 *      multiply_add(acc, w, x)              one step of rule 1
 *      operand_store(p, w)                  to a panel, OPERAND_BYTES
 *      multiply_tile()                      one step of TILE_ROWS panel rows with T tokens
 *      struct row_scale, prepare_scale()    the scales of one row for a span of columns
 *      decode()                             one step of one row of weights -> operand
 *      TILE_ROWS, TILE_TOKENS               the register tile of the `many` entries
 *
 * few:  weights are read once; R rows are walked together, adjacent or spaced, with up to 4 tokens
 * at a time. many: PANEL_ROWS rows are decoded to a panel of operands, [tile][step][row of the
 * tile], then multiplied with tile after tile of tokens.  A missing row of the last tile is zeros.
 */
#ifndef DSV4_LINEAR_TILES_AVX512_H
#define DSV4_LINEAR_TILES_AVX512_H

#include <assert.h>

#include "linear_decode_avx512.h"

/* AHEAD: bytes to prefetch in the walks that are not chosen by measurement. */
enum { MAX_ROWS = 8, GROUP_TOKENS = 4, AHEAD = 2048 };

/* R rows of weights on their way, with T tokens. */
struct rows {
    const uint8_t *w[MAX_ROWS];
    size_t scales[MAX_ROWS]; /* index of the row's first scale */
    struct row_scale scale[MAX_ROWS];
    __m256i seen[MAX_ROWS]; /* see_codes */
    const dsv4_bf16 *x[GROUP_TOKENS];
    __m512 acc[MAX_ROWS][GROUP_TOKENS];
    __m512 part[MAX_ROWS][GROUP_TOKENS]; /* of a block, rule 3 */
};

INLINE void few_step(struct rows *s, const enum form form, size_t at, int32_t k, int step,
                     __mmask32 mask, const int masked, const int R, const int T) {
    operand x[GROUP_TOKENS];
    EACH (t, T)
        x[t] = expand(load_x(s->x[t] + k, mask, masked));
    EACH (r, R) {
        operand w = decode(form, s->w[r] + at, &s->scale[r], step, mask, masked, &s->seen[r]);
        EACH (t, T) {
            if (form == FP8_BLOCK)
                s->part[r][t] = multiply_add(s->part[r][t], w, x[t]);
            else if (form == FP4_BLOCK)
                s->acc[r][t] =
                    _mm512_fmadd_ps(multiply_add(_mm512_setzero_ps(), w, x[t]),
                                    _mm512_set1_ps(s->scale[r].each[step]), s->acc[r][t]);
            else
                s->acc[r][t] = multiply_add(s->acc[r][t], w, x[t]);
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
            s->part[r][t] = _mm512_setzero_ps();
    }
    int step = 0;
    for (; (step + 1) * STEP <= n; step++, at += step_bytes) {
        if (ahead) {
            size_t next = at + (size_t)ahead;
            next += next >= bytes ? jump : 0;
            EACH (r, R)
                _mm_prefetch((const char *)s->w[r] + next, _MM_HINT_T0);
        }
        few_step(s, form, at, k0 + step * STEP, step, 0, 0, R, T);
    }
    if (step * STEP < n)
        few_step(s, form, at, k0 + step * STEP, step, step_mask(n - step * STEP), 1, R, T);
    if (form == FP8_BLOCK)
        EACH (r, R)
            EACH (t, T)
                s->acc[r][t] = _mm512_fmadd_ps(s->part[r][t], s->scale[r].block, s->acc[r][t]);
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
        s.seen[r] = _mm256_setzero_si256();
        EACH (t, T)
            s.acc[r][t] = _mm512_setzero_ps();
    }
    EACH (t, T)
        s.x[t] = token(a, t0 + t);
    for (int32_t k = 0; k < cols; k += span)
        few_span(&s, a->w, form, k, cols - k < span ? cols - k : span, R, T, ahead, jump);
    EACH (r, R) {
        if (is_fp8(form) && nan_codes(s.seen[r]))
            EACH (t, T)
                s.acc[r][t] = _mm512_set1_ps(__builtin_nanf(""));
        store4(a, s.acc[r], T, t0, row + r * stride);
    }
}

/* R rows with all tokens: the first group of tokens finds the weights in memory, the others in the
 * nearest cache. */
INLINE void few_tokens(const struct dsv4_linear_args *a, const enum form form, int32_t row,
                       const int R, const int ahead) {
    size_t jump = (size_t)(R - 1) * row_bytes(form, a->w->cols);
    int32_t t = 0;
    for (; a->n_tok - t >= GROUP_TOKENS; t += GROUP_TOKENS)
        few_tile(a, form, row, 1, t, R, 4, ahead, jump);
    if (a->n_tok - t == 3)
        few_tile(a, form, row, 1, t, R, 3, ahead, jump);
    else if (a->n_tok - t == 2)
        few_tile(a, form, row, 1, t, R, 2, ahead, jump);
    else if (a->n_tok - t == 1)
        few_tile(a, form, row, 1, t, R, 1, ahead, jump);
}

/* The rows from `row` on by 4, the last ones singly, with any number of tokens. */
INLINE void few_rows(const struct dsv4_linear_args *a, const enum form form, int32_t row) {
    for (; row + 4 <= a->row1; row += 4)
        few_tokens(a, form, row, 4, AHEAD);
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
            few_tile(a, form, row, 1, t, 4, 1, 0, 0);
        for (; row < a->row1; row++)
            few_tile(a, form, row, 1, t, 1, 1, 0, 0);
    }
}

enum { PANEL_ROWS = 32 / TILE_ROWS * TILE_ROWS };

/* One row decoded into its tile of the panel; scales (rule 3) to [block][row of the tile]. */
INLINE void decode_row(const struct dsv4_weight *weight, const enum form form, int32_t row,
                       uint8_t *panel, float *scales) {
    const int32_t cols = weight->cols, span = is_fp8(form) ? SPAN_FP8 : SPAN_OTHER;
    const uint8_t *w = (const uint8_t *)weight->data + (size_t)row * row_bytes(form, cols);
    const size_t first = row_scales(form, row, cols);
    struct row_scale scale;
    __m256i seen = _mm256_setzero_si256();
    uint8_t *out = panel;
    for (int32_t k = 0; k < cols; k += span) {
        int32_t n = cols - k < span ? cols - k : span, step = 0;
        prepare_scale(form, weight, first, k, n, &scale);
        for (; (step + 1) * STEP <= n;
             step++, w += row_bytes(form, STEP), out += TILE_ROWS * OPERAND_BYTES)
            operand_store(out, decode(form, w, &scale, step, 0, 0, &seen));
        if (step * STEP < n)
            operand_store(out, decode(form, w, &scale, step, step_mask(n - step * STEP), 1, &seen));
        if (form == FP8_BLOCK)
            scales[k / SPAN_FP8 * TILE_ROWS] = read_scale(weight, first + (size_t)(k / SPAN_FP8));
        else if (form == FP4_BLOCK)
            for (int32_t j = 0; j < n / DSV4_FP4_BLOCK; j++)
                scales[(k / DSV4_FP4_BLOCK + j) * TILE_ROWS] = scale.each[j];
    }
    if (is_fp8(form) && nan_codes(seen)) /* one NaN operand makes every sum of the row a NaN */
        memset(panel, 0xff, OPERAND_BYTES);
}

/* A register tile: TILE_ROWS panel rows times T tokens over all of K. */
INLINE void many_tile(const struct dsv4_linear_args *a, const enum form form, const uint8_t *panel,
                      const float *scales, int32_t row, int32_t n_row, int32_t t0, const int T) {
    const int32_t cols = a->w->cols;
    const int32_t block = form == FP8_BLOCK ? DSV4_FP8_BLOCK : DSV4_FP4_BLOCK;
    const int blocks = form == FP8_BLOCK || form == FP4_BLOCK;
    const dsv4_bf16 *x[TILE_TOKENS];
    __m512 acc[TILE_ROWS][TILE_TOKENS], total[TILE_ROWS][TILE_TOKENS];
    EACH (t, T)
        x[t] = token(a, t0 + t);
    EACH (r, TILE_ROWS)
        EACH (t, T)
            acc[r][t] = total[r][t] = _mm512_setzero_ps();
    int32_t k = 0;
    for (; k + STEP <= cols; k += STEP, panel += TILE_ROWS * OPERAND_BYTES) {
        multiply_tile(acc, panel, x, k, 0, 0, T);
        if (blocks && ((k + STEP) % block == 0))
            EACH (r, TILE_ROWS)
                EACH (t, T) {
                    total[r][t] = _mm512_fmadd_ps(
                        acc[r][t], _mm512_set1_ps(scales[k / block * TILE_ROWS + r]), total[r][t]);
                    acc[r][t] = _mm512_setzero_ps();
                }
    }
    if (k < cols)
        multiply_tile(acc, panel, x, k, step_mask(cols - k), 1, T);
    if (blocks && cols % block)
        EACH (r, TILE_ROWS)
            EACH (t, T)
                total[r][t] = _mm512_fmadd_ps(
                    acc[r][t], _mm512_set1_ps(scales[cols / block * TILE_ROWS + r]), total[r][t]);
    EACH (r, TILE_ROWS)
        if (r < n_row)
            store4(a, blocks ? total[r] : acc[r], T, t0, row + r);
}

/* All rows with all tokens. */
INLINE void many(const struct dsv4_linear_args *a, const enum form form) {
    const int32_t cols = a->w->cols, steps = (cols + STEP - 1) / STEP;
    const size_t tile_bytes = (size_t)steps * TILE_ROWS * OPERAND_BYTES,
                 tile_scales = (size_t)steps * TILE_ROWS;
    uint8_t *panel = a->scratch;
    float *scales = (float *)(void *)(panel + PANEL_ROWS / TILE_ROWS * tile_bytes);
    for (int32_t row = a->row0; row < a->row1; row += PANEL_ROWS) {
        const int32_t n = a->row1 - row < PANEL_ROWS ? a->row1 - row : PANEL_ROWS;
        const int32_t tiles = (n + TILE_ROWS - 1) / TILE_ROWS;
        if (n % TILE_ROWS)
            memset(panel + (size_t)(tiles - 1) * tile_bytes, 0, tile_bytes);
        for (int32_t r = 0; r < n; r++)
            decode_row(a->w, form, row + r,
                       panel + (size_t)(r / TILE_ROWS) * tile_bytes + r % TILE_ROWS * OPERAND_BYTES,
                       scales + (size_t)(r / TILE_ROWS) * tile_scales + r % TILE_ROWS);
        for (int32_t t = 0; t < a->n_tok; t += TILE_TOKENS)
            for (int32_t i = 0; i < tiles; i++) {
                const uint8_t *tile = panel + (size_t)i * tile_bytes;
                const float *tile_scale = scales + (size_t)i * tile_scales;
                int32_t r = row + i * TILE_ROWS,
                        n_row = n - i * TILE_ROWS < TILE_ROWS ? n - i * TILE_ROWS : TILE_ROWS;
                int32_t left = a->n_tok - t;
                if (left >= TILE_TOKENS)
                    many_tile(a, form, tile, tile_scale, r, n_row, t, TILE_TOKENS);
                else if (left == 3)
                    many_tile(a, form, tile, tile_scale, r, n_row, t, 3);
                else if (left == 2)
                    many_tile(a, form, tile, tile_scale, r, n_row, t, 2);
                else
                    many_tile(a, form, tile, tile_scale, r, n_row, t, 1);
            }
    }
}

#endif
