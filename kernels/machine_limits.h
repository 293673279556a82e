/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a processor can do at most, as loops that have nothing else in them: walks that read memory, and chains of one
 * multiply-add instruction in registers.  Measurements divide by them; no kernel calls them.  Each instruction set
 * offers a list, kernels/cpu/<set>/limits*.c; the caller takes the time.
 */
#ifndef DSV4_MACHINE_LIMITS_H
#define DSV4_MACHINE_LIMITS_H

#include <stddef.h>
#include <stdint.h>

/* READ: bytes.  F32_FMA, BF16_DOT: the two instructions whose sums are exact in the contract's order.  BYTE_DOT: products
 * of bytes, for index scores. */
enum dsv4_limit_kind {
    DSV4_LIMIT_READ = 0,
    DSV4_LIMIT_F32_FMA = 1,
    DSV4_LIMIT_BF16_DOT = 2,
    DSV4_LIMIT_BYTE_DOT = 3,
    DSV4_LIMIT_KINDS = 4
};

/* Reads the bytes from p on, in whole steps of 512 bytes for each of its streams; the sum of all words read. */
typedef uint64_t dsv4k_read_fn(const void *p, size_t bytes);

/* Runs the loop `rounds` times; how many operations (a product and its sum are two) that were. */
typedef double dsv4k_peak_fn(int64_t rounds);

struct dsv4_limit {
    const char *name; /* of the walk or the instruction */
    const char *set;  /* the instruction set it needs; "ref": none */
    int kind;         /* enum dsv4_limit_kind */
    dsv4k_read_fn *read; /* the one that kind asks for, the other NULL */
    dsv4k_peak_fn *peak;
};

#endif
