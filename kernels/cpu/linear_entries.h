/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The entries of the linear family, made from the loops of linear_few.h and linear_many.h.
 * Before including:
 *
 *      LINEAR_SET       the name of the instruction set, as in function names
 *      F32_OPERANDS     1: FP8 scales beyond FOLD_ONCE_MAX need two multiplications
 *      FEW_FP8, ...     up to so many tokens a panel does not pay: `many` takes rows as `few` does
 *
 * After it: LINEAR_WALK(name, rows, spaced, ahead) defines the three `few` entries of one way to
 * walk, LINEAR_WALK_VARIANTS(name) lists them.  LINEAR_MANY_VARIANTS lists the `many` entries.
 */
#ifndef DSV4_LINEAR_ENTRIES_H
#define DSV4_LINEAR_ENTRIES_H

#include <assert.h>

#include "cpu/linear_few.h"
#include "cpu/linear_many.h"

/* Bytes to prefetch ahead in the walks that are not chosen by measurement. */
enum { AHEAD = 2048 };

#define LINEAR_PASTE(a, b, c) a##b##c
#define LINEAR_NAME(prefix, set, suffix) LINEAR_PASTE(prefix, set, suffix)
#define LINEAR_TEXT(set) LINEAR_STRING(set)
#define LINEAR_STRING(set) #set

/* Rows by steps, any number of tokens: R rows with one, GROUP_ROWS with more. */
INLINE void few_steps_by(const struct dsv4_linear_args *a, const enum form form, const int one,
                         const int more) {
    if (a->n_tok == 1)
        few_walk(a, form, 0, a->row0, a->row1, one, 1, 1, AHEAD);
    else
        few_walk(a, form, 0, a->row0, a->row1, more, GROUP_TOKENS, 1, AHEAD);
}

INLINE void few_steps(const struct dsv4_linear_args *a, const enum form form) {
    few_steps_by(a, form, 4, GROUP_ROWS);
}

/* Codes that do not go by lines. */
static NOINLINE void few_fp8_steps(const struct dsv4_linear_args *args, int32_t row0,
                                   int32_t row1) {
    struct dsv4_linear_args a = *args;
    a.row0 = row0;
    a.row1 = row1;
    if (a.w->scale_rule == DSV4_SCALE_BLOCK)
        few_steps_by(&a, FP8_BLOCK, BLOCK_ROWS, BLOCK_ROWS);
    else if (a.w->scale_rule == DSV4_SCALE_ROUND)
        few_steps_by(&a, FP8_ROUND, BLOCK_ROWS, BLOCK_ROWS);
    else
        few_steps_by(&a, F32_OPERANDS ? FP8_WIDE : FP8_FOLD, BLOCK_ROWS, BLOCK_ROWS);
}

static NOINLINE void few_fp4_steps(const struct dsv4_linear_args *a) {
    few_steps_by(a, FP4_BLOCK, BLOCK_ROWS, BLOCK_ROWS);
}

/* More than one token: these share their code. */
static NOINLINE void few_fp8_tokens(const struct dsv4_linear_args *a, int32_t row0, int32_t row1) {
    few_walk(a, FP8_FOLD, 1, row0, row1, LINE_ROWS_FP8, LINE_TOKENS_FP8, 1, AHEAD);
}

static NOINLINE void few_fp4_tokens(const struct dsv4_linear_args *a) {
    few_walk(a, FP4_FOLD, 1, a->row0, a->row1, LINE_ROWS_FP4, LINE_TOKENS_FP4, 1, AHEAD);
}

static NOINLINE void few_bf16_tokens(const struct dsv4_linear_args *a) {
    few_walk(a, BF16_PLAIN, 0, a->row0, a->row1, GROUP_ROWS, GROUP_TOKENS, 1, AHEAD);
}

/* The inputs of all tokens into the scratch. */
static NOINLINE int pack_fp8_tokens(const struct dsv4_linear_args *a, int32_t row) {
    const uint8_t *scales = (const uint8_t *)a->w->scale + row_scales(FP8_FOLD, row, a->w->cols);
    int all = 1;
    for (int32_t t = 0; t < a->n_tok; t++)
        all &= pack_fp8((uint8_t *)a->scratch + (size_t)t * packed_bytes(a->w->cols), token(a, t),
                        a->w->cols, scales);
    return all;
}

static NOINLINE void pack_fp4_tokens(const struct dsv4_linear_args *a) {
    for (int32_t t = 0; t < a->n_tok; t++)
        pack_fp4((uint8_t *)a->scratch + (size_t)t * packed_bytes(a->w->cols), token(a, t),
                 a->w->cols);
}

INLINE void few_fp8(const struct dsv4_linear_args *a, const int R, const int spaced,
                    const int ahead) {
    assert(a->w->format == DSV4_W_FP8);
    if (a->w->scale_rule != DSV4_SCALE_FOLD) {
        few_fp8_steps(a, a->row0, a->row1);
        return;
    }
    for (int32_t row = a->row0, end; row < a->row1; row = end) {
        end = (row / DSV4_FP8_BLOCK + 1) * DSV4_FP8_BLOCK;
        end = end < a->row1 ? end : a->row1;
        if (!pack_fp8_tokens(a, row))
            few_fp8_steps(a, row, end);
        else if (a->n_tok == 1)
            few_walk(a, FP8_FOLD, 1, row, end, R, 1, spaced, ahead);
        else
            few_fp8_tokens(a, row, end);
    }
}

INLINE void few_fp4(const struct dsv4_linear_args *a, const int R, const int spaced,
                    const int ahead) {
    assert(a->w->format == DSV4_W_FP4 && a->w->cols % DSV4_FP4_BLOCK == 0);
    if (a->w->scale_rule != DSV4_SCALE_FOLD) {
        few_fp4_steps(a);
        return;
    }
    pack_fp4_tokens(a);
    if (a->n_tok == 1)
        few_walk(a, FP4_FOLD, 1, a->row0, a->row1, R, 1, spaced, ahead);
    else
        few_fp4_tokens(a);
}

INLINE void few_bf16(const struct dsv4_linear_args *a, const int R, const int spaced,
                     const int ahead) {
    assert(a->w->format == DSV4_W_BF16);
    if (a->n_tok == 1)
        few_walk(a, BF16_PLAIN, 0, a->row0, a->row1, R, 1, spaced, ahead);
    else
        few_bf16_tokens(a);
}

#define LINEAR_FEW(format, name) LINEAR_NAME(dsv4k_linear_few_##format##_, LINEAR_SET, _##name)
#define LINEAR_WALK(name, rows, spaced, ahead)                                                     \
    static void LINEAR_FEW(fp8, name)(const struct dsv4_linear_args *a) {                          \
        few_fp8(a, rows, spaced, ahead);                                                           \
    }                                                                                              \
    static void LINEAR_FEW(fp4, name)(const struct dsv4_linear_args *a) {                          \
        few_fp4(a, rows, spaced, ahead);                                                           \
    }                                                                                              \
    static void LINEAR_FEW(bf16, name)(const struct dsv4_linear_args *a) {                         \
        few_bf16(a, rows, spaced, ahead);                                                          \
    }

/* clang-format off */
#define LINEAR_WALK_VARIANTS(name) \
    DSV4_VARIANT(linear_few_fp8, LINEAR_FEW(fp8, name), LINEAR_TEXT(LINEAR_SET) "/" #name, 1), \
    DSV4_VARIANT(linear_few_fp4, LINEAR_FEW(fp4, name), LINEAR_TEXT(LINEAR_SET) "/" #name, 1), \
    DSV4_VARIANT(linear_few_bf16, LINEAR_FEW(bf16, name), LINEAR_TEXT(LINEAR_SET) "/" #name, 1)

#define LINEAR_MANY(format) LINEAR_NAME(dsv4k_linear_many_##format##_, LINEAR_SET, )
#define LINEAR_MANY_VARIANTS \
    DSV4_VARIANT(linear_many_fp8, LINEAR_MANY(fp8), LINEAR_TEXT(LINEAR_SET), 1), \
    DSV4_VARIANT(linear_many_fp4, LINEAR_MANY(fp4), LINEAR_TEXT(LINEAR_SET), 1), \
    DSV4_VARIANT(linear_many_bf16, LINEAR_MANY(bf16), LINEAR_TEXT(LINEAR_SET), 1)
/* clang-format on */

/* A walk that every set has; more than one token take their own in any case. */
static dsv4k_linear_fn LINEAR_FEW(fp8, rows4), LINEAR_FEW(fp4, rows4), LINEAR_FEW(bf16, rows4);

static void LINEAR_MANY(fp8)(const struct dsv4_linear_args *a) {
    assert(a->w->format == DSV4_W_FP8);
    if (a->n_tok <= FEW_FP8 && a->w->scale_rule == DSV4_SCALE_FOLD)
        LINEAR_FEW(fp8, rows4)(a);
    else if (a->w->scale_rule == DSV4_SCALE_BLOCK)
        many(a, FP8_BLOCK);
    else if (a->w->scale_rule == DSV4_SCALE_ROUND)
        many(a, FP8_ROUND);
    else
        many(a, F32_OPERANDS ? FP8_WIDE : FP8_FOLD);
}

static void LINEAR_MANY(fp4)(const struct dsv4_linear_args *a) {
    assert(a->w->format == DSV4_W_FP4 && a->w->cols % DSV4_FP4_BLOCK == 0);
    if (a->n_tok <= FEW_FP4 && a->w->scale_rule == DSV4_SCALE_FOLD)
        LINEAR_FEW(fp4, rows4)(a);
    else if (a->w->scale_rule == DSV4_SCALE_BLOCK)
        many(a, FP4_BLOCK);
    else
        many(a, FP4_FOLD);
}

static void LINEAR_MANY(bf16)(const struct dsv4_linear_args *a) {
    assert(a->w->format == DSV4_W_BF16);
    if (a->n_tok <= FEW_BF16)
        LINEAR_FEW(bf16, rows4)(a);
    else
        many(a, BF16_PLAIN);
}

#endif
