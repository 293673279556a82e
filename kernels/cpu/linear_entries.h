/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The entries of the linear family, made from the loops of linear_few.h and linear_many.h.
 * Before including:
 *
 *      LINEAR_SET       the name of the instruction set, as in function names
 *      F32_OPERANDS     1: FP8 scales beyond FOLD_ONCE_MAX need two multiplications
 *
 * After it: LINEAR_WALK(name, rows, spaced, ahead) defines the three `few` entries of one way to
 * walk, LINEAR_WALK_VARIANTS(name) lists them, LINEAR_MANY_VARIANTS lists the `many` entries.
 */
#ifndef DSV4_LINEAR_ENTRIES_H
#define DSV4_LINEAR_ENTRIES_H

#include <assert.h>

#include "cpu/linear_few.h"
#include "cpu/linear_many.h"

#define LINEAR_PASTE(a, b, c) a##b##c
#define LINEAR_NAME(prefix, set, suffix) LINEAR_PASTE(prefix, set, suffix)
#define LINEAR_TEXT(set) LINEAR_STRING(set)
#define LINEAR_STRING(set) #set

/* Whether one multiplication, or none, puts the scales of the call's rows into FP8 codes. */
INLINE int fp8_folds(const struct dsv4_linear_args *a) {
    return a->w->scale_rule == DSV4_SCALE_FOLD && (!F32_OPERANDS || folds_once(a));
}

/* The rows from `row` on, any number of tokens, any scales. */
static NOINLINE void few_fp8_rest(const struct dsv4_linear_args *a, int32_t row) {
    if (a->w->scale_rule == DSV4_SCALE_BLOCK)
        few_plain(a, FP8_BLOCK);
    else if (a->w->scale_rule == DSV4_SCALE_ROUND)
        few_plain(a, FP8_ROUND);
    else if (F32_OPERANDS && !folds_once(a))
        few_plain(a, FP8_WIDE);
    else
        few_rows(a, FP8_FOLD, row);
}

static NOINLINE void few_fp4_rest(const struct dsv4_linear_args *a, int32_t row) {
    if (a->w->scale_rule == DSV4_SCALE_BLOCK)
        few_plain(a, FP4_BLOCK);
    else
        few_rows(a, FP4_FOLD, row);
}

static NOINLINE void few_bf16_rest(const struct dsv4_linear_args *a, int32_t row) {
    few_rows(a, BF16_PLAIN, row);
}

INLINE void few_fp8(const struct dsv4_linear_args *a, const int R, const int spaced,
                    const int ahead) {
    assert(a->w->format == DSV4_W_FP8);
    int walk = a->n_tok == 1 && fp8_folds(a);
    few_fp8_rest(a, walk ? few_walk(a, FP8_FOLD, R, spaced, ahead) : a->row0);
}

INLINE void few_fp4(const struct dsv4_linear_args *a, const int R, const int spaced,
                    const int ahead) {
    assert(a->w->format == DSV4_W_FP4 && a->w->cols % DSV4_FP4_BLOCK == 0);
    int walk = a->n_tok == 1 && a->w->scale_rule == DSV4_SCALE_FOLD;
    few_fp4_rest(a, walk ? few_walk(a, FP4_FOLD, R, spaced, ahead) : a->row0);
}

INLINE void few_bf16(const struct dsv4_linear_args *a, const int R, const int spaced,
                     const int ahead) {
    assert(a->w->format == DSV4_W_BF16);
    few_bf16_rest(a, a->n_tok == 1 ? few_walk(a, BF16_PLAIN, R, spaced, ahead) : a->row0);
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

static void LINEAR_MANY(fp8)(const struct dsv4_linear_args *a) {
    assert(a->w->format == DSV4_W_FP8);
    if (a->w->scale_rule == DSV4_SCALE_BLOCK)
        many(a, FP8_BLOCK);
    else if (a->w->scale_rule == DSV4_SCALE_ROUND)
        many(a, FP8_ROUND);
    else
        many(a, F32_OPERANDS ? FP8_WIDE : FP8_FOLD);
}

static void LINEAR_MANY(fp4)(const struct dsv4_linear_args *a) {
    assert(a->w->format == DSV4_W_FP4 && a->w->cols % DSV4_FP4_BLOCK == 0);
    if (a->w->scale_rule == DSV4_SCALE_BLOCK)
        many(a, FP4_BLOCK);
    else
        many(a, FP4_FOLD);
}

static void LINEAR_MANY(bf16)(const struct dsv4_linear_args *a) {
    assert(a->w->format == DSV4_W_BF16);
    many(a, BF16_PLAIN);
}

#endif
