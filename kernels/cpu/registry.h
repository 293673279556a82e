/* SPDX-License-Identifier: Apache-2.0 */
/* Every list of variants, and every list of limits, that was compiled in, weakest instruction set
 * first; NULL-terminated. */
#ifndef DSV4_CPU_REGISTRY_H
#define DSV4_CPU_REGISTRY_H

#include "kernels.h"
#include "machine_limits.h"

extern const struct dsv4_variant *const dsv4k_registry[];
extern const struct dsv4_limit *const dsv4k_limits[];

#endif
