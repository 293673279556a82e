/* SPDX-License-Identifier: Apache-2.0 */
/*
 * R rows of codes on their way by lines of 64 bytes (linear_few.h).  The including file has defined
 * UNITS, MAX_ROWS, lanes and seen_line.
 */
#ifndef DSV4_LINEAR_LINES_H
#define DSV4_LINEAR_LINES_H

#include "cpu/linear_forms.h"

/* A line holds 128 columns of FP4, four blocks; packed inputs fill whole lines of either format. */
enum { LINE = 64, LINE_COLUMNS = 2 * LINE };
/* The most tokens that a set takes at a time by lines. */
enum { LINE_TOKENS = 6 };
enum { FP4_BLOCK_BYTES = DSV4_FP4_BLOCK / 2, LINE_BLOCKS = LINE / FP4_BLOCK_BYTES };

struct lines {
    const uint8_t *w[MAX_ROWS];
    const uint8_t *scale[MAX_ROWS]; /* e8m0, of the row's first column */
    int32_t cols;
    const uint8_t *x; /* the packed input of the tile's first token */
    size_t packed;    /* bytes from token to token */
    seen_line seen[MAX_ROWS];
    /* For line_fp4 to keep the scales of some lines. */
    union {
        float each[MAX_ROWS][SPAN_STEPS];
        uint32_t words[MAX_ROWS][SPAN_STEPS];
    };
    lanes acc[MAX_ROWS][LINE_TOKENS][UNITS];
};

INLINE int32_t packed_columns(int32_t cols) {
    return (cols + LINE_COLUMNS - 1) / LINE_COLUMNS * LINE_COLUMNS;
}

/* Bytes of one token's packed input: room for f32, or for bf16 twice. */
INLINE size_t packed_bytes(int32_t cols) {
    return (size_t)4 * (size_t)packed_columns(cols);
}

#endif
