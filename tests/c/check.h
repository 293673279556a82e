/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The runner of the C checks.  Each tests/c/check_<family>.c defines one `void
 * check_<family>(void)`; build.py finds them by name and runs them all.  A check asks for buffers,
 * fills them, calls every variant of an operation and compares with `ref` bit for bit.  The first
 * difference is printed with its place and ends the program.
 */
#ifndef DSV4_CHECK_H
#define DSV4_CHECK_H

#include <stddef.h>
#include <stdint.h>

#include "cpu/dispatch.h"
#include "kernels.h"

/* Bytes that end at an unmapped page: one byte read or written behind them ends the program.  Freed
 * by check_reset. */
void *check_bytes(size_t bytes);

/* The same starting at a multiple of `align` (a power of two); the gap before the page, if any,
 * must stay untouched. */
void *check_aligned(size_t bytes, size_t align);

/* Frees all buffers and checks their gaps: call it between cases. */
void check_reset(void);

/* splitmix64, seeded by --seed. */
uint64_t check_random(void);
uint32_t check_below(uint32_t n);
/* Normal distribution, mean 0, deviation 1. */
float check_normal(void);

/* What a buffer of bf16 or f32 operands is filled with. */
enum check_kind {
    CHECK_NORMAL, /* Gaussian */
    CHECK_SPREAD, /* Gaussian times 2^-20 ... 2^20: sums round and cancel */
    CHECK_EDGES,  /* +-0, subnormals, around 2^-55, 2^-40, 1, 2^20, mixed with Gaussian */
    CHECK_ZEROS,  /* +-0 */
    CHECK_KINDS,
};
void check_fill_bf16(dsv4_bf16 *p, size_t n, enum check_kind kind);
void check_fill_f32(float *p, size_t n, enum check_kind kind);
void check_fill_bytes(void *p, size_t bytes);

/* Every variant of an operation on this CPU, `ref` first. */
int check_variants(enum dsv4_op op, const struct dsv4_variant **out);
enum { CHECK_MAX_VARIANTS = 64 };

/* got == want in every bit, elements of `size` bytes; `what` and the variant name the case. */
void check_equal(const char *what, const struct dsv4_variant *v, const void *got, const void *want,
                 size_t n, size_t size);
/* The same for floats, any NaN equal to any NaN. */
void check_equal_f32(const char *what, const struct dsv4_variant *v, const float *got,
                     const float *want, size_t n);
void check_equal_bf16(const char *what, const struct dsv4_variant *v, const dsv4_bf16 *got,
                      const dsv4_bf16 *want, size_t n);

/* Writes a file below a folder, with the folders it lies in. */
void check_write(const char *folder, const char *name, const char *text);

/* Ends the program with a message unless the condition holds. */
void check_true(int condition, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
