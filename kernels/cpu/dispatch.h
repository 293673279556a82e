/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which variant of each operation runs on this CPU.  Variants are listed weakest instruction set
 * first; the last one the CPU has wins, except where variants compete (dsv4_variant.competes):
 * there a short measurement decides.  What is chosen changes the speed, never a bit.
 */
#ifndef DSV4_CPU_DISPATCH_H
#define DSV4_CPU_DISPATCH_H

#include "kernels.h"
#include "machine_limits.h"

/* Instruction sets by name, weakest first: "avx2", "avx512", "avx512vnni", "avx512bf16" on x86-64.
 * NULL-terminated. */
extern const char *const dsv4k_cpu_set_names[];

/* Whether this processor and operating system have the set (cpuid and xgetbv), without regard to
 * `disable`. */
int dsv4k_cpu_has(const char *set);

/* The available variants of one operation on this CPU, weakest first ("ref" always among them);
 * writes at most `capacity` pointers, returns the count. */
int dsv4k_cpu_variants(enum dsv4_op op, const struct dsv4_variant **out, int capacity);

/*
 * Fills `table` and `chosen` (the variant of each entry).  `disable` is NULL or a comma-separated
 * list of set names; the variants of a disabled set and of every stronger set that builds on it are
 * not offered.  Returns NULL, or the position in `disable` of the first unknown name, leaving the
 * outputs untouched.  Takes a few milliseconds.
 */
const char *dsv4k_cpu_init(struct dsv4_kernels *table,
                           const struct dsv4_variant *chosen[DSV4_OP_COUNT], const char *disable);

/*
 * The walks and peaks this CPU can run, weakest set first, without the sets of `disable` (as for
 * dsv4k_cpu_init, and so is what is returned); *n of them, at most `capacity`.
 */
const char *dsv4k_cpu_limits(const struct dsv4_limit **out, int *n, int capacity,
                             const char *disable);

/* The name of an operation, as in DSV4_KERNEL_OPS. */
const char *dsv4k_op_name(enum dsv4_op op);

#endif
