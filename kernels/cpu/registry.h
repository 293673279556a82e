/* SPDX-License-Identifier: Apache-2.0 */
/* Every list of variants that was compiled in, weakest instruction set first; NULL-terminated. */
#ifndef DSV4_CPU_REGISTRY_H
#define DSV4_CPU_REGISTRY_H

#include "kernels.h"

extern const struct dsv4_variant *const dsv4k_registry[];

#endif
