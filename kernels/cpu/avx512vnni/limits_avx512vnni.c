/* SPDX-License-Identifier: Apache-2.0 */
/* The peak of the dot of bytes. */
#define CHAINS_WIDE 1
#include "cpu/limits_chains.h"

#define DOT(i) CHAINS_LINK("vpdpbusd", i)
CHAINS_PEAK(dot_peak, DOT, 128)

extern const struct dsv4_limit dsv4k_avx512vnni_limits[];
const struct dsv4_limit dsv4k_avx512vnni_limits[] = {
    {"vpdpbusd zmm", "avx512vnni", DSV4_LIMIT_BYTE_DOT, NULL, dot_peak},
    {NULL, NULL, 0, NULL, NULL},
};
