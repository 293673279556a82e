/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the loops of linear_few.h and linear_many.h ask of one instruction set and one kind of
 * multiply.  The 16 lanes of a sum lie in UNITS registers; a step is 32 columns, a unit of it
 * 32 / UNITS.  The including file has included linear_forms.h and defined, for one unit each:
 *
 *      lanes, lanes_zero(), lanes_set1(), lanes_fma()    a register of partial sums
 *      operand                                           weights or x, ready to multiply
 *      load_operand(x, n, masked)                        bf16 -> operand; masked: only n columns
 *      multiply_add(acc, w, x)                           rule 1 for one unit of a step
 *      operand_store(p, w)                               into a panel, OPERAND_BYTES
 *      multiply_tile(acc, panel, x, k, n, masked, T)     TILE_ROWS panel rows, T <= TILE_TOKENS
 * tokens struct row_scale, prepare_scale()                 scales of one row for a span of columns
 *      decode(form, p, scale, step, n, masked, seen)     weights of one row -> operand
 *      seen_codes, seen_zero(), seen_nan()               whether a row of e4m3 codes held a NaN
 *      sum4(sums, a, b, c, d)                            the tree of rule 1 for four sums
 *      sums_of_tile(sums, v)                             the same for SUM_TOKENS tokens by four
 * rows
 */
#ifndef DSV4_LINEAR_UNITS_H
#define DSV4_LINEAR_UNITS_H

#include "cpu/linear_forms.h"

enum { UNIT = STEP / UNITS };

/* Columns of a unit that exist, n of them left at the start of the step. */
INLINE int32_t unit_columns(int32_t n, int u) {
    int32_t left = n - u * UNIT;
    return left < 0 ? 0 : left > UNIT ? UNIT : left;
}

#endif
