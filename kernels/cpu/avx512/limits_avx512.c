/* SPDX-License-Identifier: Apache-2.0 */
/* Reading memory 64 bytes at a time, and the peak of the f32 multiply-add on zmm registers. */
#define READ_WIDTH 64
#include "cpu/limits_read.h"
#define CHAINS_WIDE 1
#include "cpu/limits_chains.h"

#define FMA(i) CHAINS_LINK("vfmadd231ps", i)
CHAINS_PEAK(fma_peak, FMA, 32)

extern const struct dsv4_limit dsv4k_avx512_limits[];
const struct dsv4_limit dsv4k_avx512_limits[] = {
    READ_WALKS("avx512"),
    {"vfmadd231ps zmm", "avx512", DSV4_LIMIT_F32_FMA, NULL, fma_peak},
    {NULL, NULL, 0, NULL, NULL},
};
