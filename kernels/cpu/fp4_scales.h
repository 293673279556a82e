/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tables with an entry for every e8m0 byte that folds into FP4 codes (DSV4_FOLD_FP4_MIN ... _MAX):
 *
 *      #define ENTRY(s) {FP4_VALUES(WORD, s)},
 *      static const uint16_t table[FP4_SCALES][16] = {EACH_FP4_SCALE(ENTRY)};
 *
 * where WORD(v) makes an element of FP4_BF16: a code's value times the scale as bf16 bits.
 */
#ifndef DSV4_FP4_SCALES_H
#define DSV4_FP4_SCALES_H

#include "kernels.h"

enum { FP4_SCALES = DSV4_FOLD_FP4_MAX - DSV4_FOLD_FP4_MIN + 1 };

/* A bf16 of a normal number times 2^(s - 127). */
#define FP4_BF16(bits, s) (((bits) + ((s) - 127) * 128) & 0xffff)
#define FP4_HALF(E, s, sign)                                                                       \
    E(0), E(FP4_BF16(0x3f00 + (sign), s)), E(FP4_BF16(0x3f80 + (sign), s)),                        \
        E(FP4_BF16(0x3fc0 + (sign), s)), E(FP4_BF16(0x4000 + (sign), s)),                          \
        E(FP4_BF16(0x4040 + (sign), s)), E(FP4_BF16(0x4080 + (sign), s)),                          \
        E(FP4_BF16(0x40c0 + (sign), s))

/* The sixteen codes; the zeros are both +0, which no sum from +0 on can tell. */
#define FP4_VALUES(E, s) FP4_HALF(E, s, 0), FP4_HALF(E, s, 0x8000)

#define FP4_EIGHT_SCALES(X, s)                                                                     \
    X(s) X((s) + 1) X((s) + 2) X((s) + 3) X((s) + 4) X((s) + 5) X((s) + 6) X((s) + 7)
#define EACH_FP4_SCALE(X)                                                                          \
    FP4_EIGHT_SCALES(X, 73)                                                                        \
    FP4_EIGHT_SCALES(X, 81)                                                                        \
    FP4_EIGHT_SCALES(X, 89)                                                                        \
    FP4_EIGHT_SCALES(X, 97)                                                                        \
    FP4_EIGHT_SCALES(X, 105)                                                                       \
    FP4_EIGHT_SCALES(X, 113)                                                                       \
    FP4_EIGHT_SCALES(X, 121)                                                                       \
    FP4_EIGHT_SCALES(X, 129)                                                                       \
    FP4_EIGHT_SCALES(X, 137)                                                                       \
    FP4_EIGHT_SCALES(X, 145)                                                                       \
    FP4_EIGHT_SCALES(X, 153)                                                                       \
    FP4_EIGHT_SCALES(X, 161)                                                                       \
    FP4_EIGHT_SCALES(X, 169)                                                                       \
    X(177) X(178) X(179)

DSV4_STATIC_ASSERT(DSV4_FOLD_FP4_MIN == 73 && DSV4_FOLD_FP4_MAX == 179, "the bytes listed here");

#endif
