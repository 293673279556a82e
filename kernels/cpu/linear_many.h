/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Linear layers for many tokens, a template over what the including
 * file defines (linear_units.h): as many rows as PANEL_BYTES hold
 * are decoded to a panel of operands, [row tile][unit][step][row of the tile], then multiplied with
 * tile after tile of tokens.  Missing rows of the last tile are zeros.
 */
#ifndef DSV4_LINEAR_MANY_H
#define DSV4_LINEAR_MANY_H

#include "cpu/linear_units.h"

/* A panel shares the second-level cache with two tiles of tokens and the codes of the next rows;
 * with its scales it never outgrows the scratch: 120 rows of f32, or 240 of bf16. */
enum { PANEL_BYTES = 512 << 10, PANEL_MAX_ROWS = 120 * 4 * STEP / (UNITS * OPERAND_BYTES) };

/* How far ahead the decoder prefetches. */
enum { DECODE_AHEAD = 2048, CACHE_LINE = 64 };

struct many {
    const struct dsv4_linear_args *a;
    const uint8_t *w;
    size_t row_bytes;
    uint8_t *panel;
    float *scales;     /* rule 3: [row tile][block][row of the tile] */
    size_t unit_bytes; /* of one unit of a panel tile, all steps */
    size_t tile_bytes, tile_scales;
    int32_t steps, token_tiles;
};

/* One register tile. */
struct many_tile {
    const uint8_t *panel;
    const float *scales;
    const dsv4_bf16 *x[TILE_TOKENS];
    const dsv4_bf16 *next;  /* a token of the next tile, to prefetch to the second level */
    const uint8_t *weights; /* of the next panel, to prefetch, or NULL */
    int32_t often;          /* a line at multiples of so many columns, a power of two */
    int32_t row, n_row, t, n_tok;
};

/* One row decoded into its tile of the panel; scales (rule 3) to [block][row of the tile]. */
INLINE void decode_row(const struct many *m, const enum form form, int32_t row, uint8_t *panel,
                       float *scales) {
    const struct dsv4_weight *weight = m->a->w;
    const int32_t cols = weight->cols, span = is_fp8(form) ? SPAN_FP8 : SPAN_OTHER;
    const uint8_t *w = m->w + (size_t)row * row_bytes(form, cols);
    const size_t first = row_scales(form, row, cols);
    struct row_scale scale;
    seen_codes seen = seen_zero();
    uint8_t *out = panel;
    for (int32_t k = 0; k < cols; k += span) {
        int32_t n = cols - k < span ? cols - k : span;
        prepare_scale(form, weight, first, k, n, &scale);
        for (size_t i = 0; i < row_bytes(form, span); i += CACHE_LINE)
            __builtin_prefetch(w + row_bytes(form, k) + i + DECODE_AHEAD);
        for (int32_t step = 0; step * STEP < n; step++, out += TILE_ROWS * OPERAND_BYTES) {
            EACH (u, UNITS) {
                const uint8_t *p = w + row_bytes(form, k + step * STEP + u * UNIT);
                const int32_t here = unit_columns(n - step * STEP, u);
                operand v = here == UNIT ? decode(form, p, &scale, step, here, 0, &seen)
                                         : decode(form, p, &scale, step, here, 1, &seen);
                operand_store(out + (size_t)u * m->unit_bytes, v);
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

/* The lanes of unit u of a register tile of T tokens over all of K. */
INLINE void many_unit(const struct many *m, const struct many_tile *tile, const int blocks,
                      const int T, int u, lanes sums[TILE_ROWS][TILE_TOKENS]) {
    const int32_t cols = m->a->w->cols, block = blocks ? blocks * STEP : cols;
    const uint8_t *panel = tile->panel + (size_t)u * m->unit_bytes, *weights = tile->weights;
    const dsv4_bf16 *x[TILE_TOKENS], *next = tile->next;
    const int32_t often = tile->often;
    lanes total[TILE_ROWS][TILE_TOKENS], acc[TILE_ROWS][TILE_TOKENS];
    EACH (t, T)
        x[t] = tile->x[t] + u * UNIT;
    EACH (r, TILE_ROWS)
        EACH (t, T)
            acc[r][t] = total[r][t] = lanes_zero();
    for (int32_t k0 = 0; k0 < cols; k0 += block) {
        const int32_t end = cols - k0 < block ? cols : k0 + block;
        int32_t k = k0;
        for (; k + STEP <= end; k += STEP, panel += TILE_ROWS * OPERAND_BYTES) {
            __builtin_prefetch(next + k, 0, 2);
            if (weights && !u && !(k & (often - 1))) {
                __builtin_prefetch(weights, 0, 2);
                weights += CACHE_LINE;
            }
            multiply_tile(acc, panel, x, k, UNIT, 0, T);
        }
        if (k < end)
            multiply_tile(acc, panel, x, k, unit_columns(end - k, u), 1, T);
        if (blocks)
            EACH (r, TILE_ROWS) {
                lanes scale = lanes_set1(tile->scales[k0 / block * TILE_ROWS + r]);
                EACH (t, T) {
                    total[r][t] = lanes_fma(acc[r][t], scale, total[r][t]);
                    acc[r][t] = lanes_zero();
                }
            }
    }
    EACH (r, TILE_ROWS)
        EACH (t, T)
            sums[r][t] = blocks ? total[r][t] : acc[r][t];
}

/* The sums of SUM_TOKENS tokens as bf16. */
INLINE void round_sums(dsv4_bf16 *out, const float *sums) {
    typedef uint32_t words __attribute__((vector_size(16 * SUM_TOKENS)));
    typedef uint16_t halves __attribute__((vector_size(8 * SUM_TOKENS)));
    words u;
    memcpy(&u, sums, sizeof u);
    words nan = (words)((u & 0x7fffffffu) > 0x7f800000u);
    u = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
    halves h = __builtin_convertvector((u & ~nan) | (nan & 0x7fc0u), halves);
    memcpy(out, &h, sizeof h);
}

/* A register tile: TILE_ROWS panel rows, n_row of which count, times T tokens, n_tok of which. */
INLINE void many_tile(const struct many *m, const struct many_tile *tile, const int blocks,
                      const int T) {
    lanes acc[UNITS][TILE_ROWS][TILE_TOKENS];
    EACH (u, UNITS)
        many_unit(m, tile, blocks, T, u, acc[u]);
    enum { PARTS = (TILE_TOKENS + SUM_TOKENS - 1) / SUM_TOKENS };
    float sums[PARTS * SUM_TOKENS][TILE_ROWS];
    dsv4_bf16 rounded[PARTS * SUM_TOKENS][TILE_ROWS];
    EACH (part, PARTS)
        EACH (group, (TILE_ROWS + 3) / 4) {
            const int t0 = part * SUM_TOKENS, r0 = 4 * group;
            if (t0 >= T)
                break;
            lanes parts[SUM_TOKENS][4][UNITS];
            _Alignas(64) float four[SUM_TOKENS][4];
            dsv4_bf16 halves[SUM_TOKENS][4];
            EACH (t, SUM_TOKENS)
                EACH (r, 4)
                    EACH (u, UNITS)
                        parts[t][r][u] =
                            acc[u][r0 + r < TILE_ROWS ? r0 + r : r0][t0 + t < T ? t0 + t : t0];
            sums_of_tile(four[0], parts);
            round_sums(halves[0], four[0]);
            const size_t rows = TILE_ROWS - r0 < 4 ? TILE_ROWS - r0 : 4;
            EACH (t, SUM_TOKENS) {
                memcpy(&sums[t0 + t][r0], four[t], rows * sizeof(float));
                memcpy(&rounded[t0 + t][r0], halves[t], rows * sizeof(dsv4_bf16));
            }
        }
    const struct dsv4_linear_args *a = m->a;
    ptrdiff_t at = tile->t * a->ld_out + tile->row;
    for (int t = 0; t < tile->n_tok; t++, at += a->ld_out) {
        if (tile->n_row < TILE_ROWS)
            for (int r = 0; r < tile->n_row; r++)
                store_sum(a, tile->t + t, tile->row + r, sums[t][r]);
        else if (a->out_f32)
            memcpy((float *)a->out + at, sums[t], sizeof sums[t]);
        else
            memcpy((dsv4_bf16 *)a->out + at, rounded[t], sizeof rounded[t]);
    }
}

/* One function for each number of tokens and steps of a block of rule 3, whatever the weights. */
typedef void many_tile_fn(const struct many *m, const struct many_tile *tile);
#define MANY_TILE(blocks, fewer)                                                                   \
    static NOINLINE void many_tile_##blocks##_##fewer(const struct many *m,                        \
                                                      const struct many_tile *tile) {              \
        many_tile(m, tile, blocks, TILE_TOKENS - fewer);                                           \
    }
#define MANY_TILES(blocks)                                                                         \
    MANY_TILE(blocks, 0)                                                                           \
    MANY_TILE(blocks, 1)                                                                           \
    MANY_TILE(blocks, 2)                                                                           \
    static many_tile_fn *const many_tiles_##blocks[] = {                                           \
        many_tile_##blocks##_0, many_tile_##blocks##_1, many_tile_##blocks##_2};
MANY_TILES(0)
MANY_TILES(1)
MANY_TILES(4)

/* Tokens are cut into tiles of nearly equal size: from 9 tokens on none has fewer than
 * TILE_TOKENS - 2, the least a register tile takes; with fewer the last one is repeated. */
INLINE int32_t tile_start(const struct many *m, int32_t j) {
    return (int32_t)((int64_t)m->a->n_tok * j / m->token_tiles);
}

/* The n rows of the panel, the first of them `row`, with all tokens. */
static NOINLINE void many_tokens(const struct many *m, many_tile_fn *const *fn, int32_t row,
                                 int32_t n) {
    /* the codes of TILE_ROWS rows are so many times a line a step; they come with the last tokens,
     * as slowly as there are tokens for it */
    int32_t shares = (int32_t)(TILE_ROWS * m->row_bytes / CACHE_LINE) / m->steps, often = STEP;
    for (; often < 4 * STEP && 2 * shares <= m->token_tiles; often *= 2)
        shares *= 2;
    const size_t share_bytes = (size_t)(m->steps * STEP / often) * CACHE_LINE;
    for (int32_t j = 0; j < m->token_tiles; j++) {
        const int32_t t0 = tile_start(m, j), share = shares - (m->token_tiles - j);
        const int32_t t1 = tile_start(m, j + 1),
                      t2 = j + 1 < m->token_tiles ? tile_start(m, j + 2) : t1;
        const int32_t T = t1 - t0 < TILE_TOKENS - 2 ? TILE_TOKENS - 2 : t1 - t0;
        struct many_tile tile = {.t = t0, .n_tok = t1 - t0};
        for (int32_t t = 0; t < T; t++)
            tile.x[t] = token(m->a, t0 + t < t1 ? t0 + t : t0);
        for (int32_t i = 0; i * TILE_ROWS < n; i++) {
            const int32_t after = row + n + i * TILE_ROWS;
            tile.panel = m->panel + (size_t)i * m->tile_bytes;
            tile.scales = m->scales + (size_t)i * m->tile_scales;
            tile.row = row + i * TILE_ROWS;
            tile.n_row = n - i * TILE_ROWS;
            tile.next = token(m->a, t1 + i < t2 ? t1 + i : t0);
            tile.often = often;
            tile.weights = share >= 0 && after + TILE_ROWS <= m->a->w->rows
                               ? m->w + (size_t)after * m->row_bytes + (size_t)share * share_bytes
                               : NULL;
            fn[TILE_TOKENS - T](m, &tile);
        }
    }
}

/* All rows with all tokens. */
INLINE void many(const struct dsv4_linear_args *a, const enum form form) {
    struct many m = {.a = a, .w = a->w->data, .steps = (a->w->cols + STEP - 1) / STEP};
    const int32_t rows = a->row1 - a->row0;
    if (!rows || !a->n_tok)
        return;
    m.token_tiles = (a->n_tok + TILE_TOKENS - 1) / TILE_TOKENS;
    m.row_bytes = row_bytes(form, a->w->cols);
    m.unit_bytes = (size_t)m.steps * TILE_ROWS * OPERAND_BYTES;
    m.tile_bytes = UNITS * m.unit_bytes;
    m.tile_scales = (size_t)m.steps * TILE_ROWS;
    /* panels of equal size, as few as can be */
    const size_t fit = PANEL_BYTES / m.tile_bytes;
    int32_t most = TILE_ROWS * (int32_t)(fit < 1 ? 1 : fit);
    most = most < PANEL_MAX_ROWS ? most : PANEL_MAX_ROWS;
    const int32_t panels = (rows + most - 1) / most;
    most = ((rows + panels - 1) / panels + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
    m.panel = a->scratch;
    m.scales = (float *)(void *)(m.panel + (size_t)(most / TILE_ROWS) * m.tile_bytes);
    for (int32_t row = a->row0; row < a->row1; row += most) {
        const int32_t n = a->row1 - row < most ? a->row1 - row : most;
        if (n % TILE_ROWS)
            memset(m.panel + (size_t)(n / TILE_ROWS) * m.tile_bytes, 0, m.tile_bytes);
        for (int32_t r = 0; r < n; r++)
            decode_row(&m, form, row + r,
                       m.panel + (size_t)(r / TILE_ROWS) * m.tile_bytes +
                           r % TILE_ROWS * OPERAND_BYTES,
                       m.scales + (size_t)(r / TILE_ROWS) * m.tile_scales + r % TILE_ROWS);
        many_tokens(&m,
                    form == FP8_BLOCK   ? many_tiles_4
                    : form == FP4_BLOCK ? many_tiles_1
                                        : many_tiles_0,
                    row, n);
    }
}

#endif
