/* SPDX-License-Identifier: Apache-2.0 */
/* What the checks of the CUDA kernels share: ref's table, a launch, a comparison, random sizes. */
#ifndef DSV4_CHECK_CUDA_H
#define DSV4_CHECK_CUDA_H

#include <string.h>

#include "check.h"
#include "launches.h"

/* Every operation of ref. */
const struct dsv4_kernels *ref(void);

/* Launches an operation with these fields of its args, the others zero. */
#define RUN(op, ...)                                                                                                   \
    check_true(dsv4_cuda_##op(&(struct dsv4_cuda_##op##_args){__VA_ARGS__}, NULL) == 0, "launch of " #op)

/* got == want in every bit, or (bf16, f32) both NaN. */
void same(const char *what, const void *got, const void *want, size_t n, size_t size);
void same_bf16(const char *what, const dsv4_bf16 *got, const dsv4_bf16 *want, size_t n);
void same_f32(const char *what, const float *got, const float *want, size_t n);

/* A random integer from low to high. */
int32_t between(int32_t low, int32_t high);

#endif
