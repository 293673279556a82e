/* SPDX-License-Identifier: Apache-2.0 */
/* The peak of the dot of bf16 pairs. */
#define CHAINS_WIDE 1
#include "cpu/limits_chains.h"

#define DOT(i) CHAINS_LINK("vdpbf16ps", i)
CHAINS_PEAK(dot_peak, DOT, 64)

extern const struct dsv4_limit dsv4k_avx512bf16_limits[];
const struct dsv4_limit dsv4k_avx512bf16_limits[] = {
    {"vdpbf16ps zmm", "avx512bf16", DSV4_LIMIT_BF16_DOT, NULL, dot_peak},
    {NULL, NULL, 0, NULL, NULL},
};
