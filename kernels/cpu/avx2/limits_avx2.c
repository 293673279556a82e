/* SPDX-License-Identifier: Apache-2.0 */
/* Reading memory 32 bytes at a time, and the peaks of the multiply-adds on ymm registers. */
#define READ_WIDTH 32
#include "cpu/limits_read.h"
#define CHAINS_WIDE 0
#include "cpu/limits_chains.h"

#define FMA(i) CHAINS_LINK("vfmadd231ps", i)
CHAINS_PEAK(fma_peak, FMA, 16)

/* Products of bytes summed by pairs, those widened, those added: three instructions, 64 operations.
 */
#define BYTES(i)                                                                                   \
    "vpmaddubsw %%ymm15, %%ymm15, %%ymm14\nvpmaddwd %%ymm15, %%ymm14, %%ymm14\n"                   \
    "vpaddd %%ymm14, %%ymm" #i ", %%ymm" #i "\n"
CHAINS_PEAK(bytes_peak, BYTES, 64)

extern const struct dsv4_limit dsv4k_avx2_limits[];
const struct dsv4_limit dsv4k_avx2_limits[] = {
    READ_WALKS("avx2"),
    {"vfmadd231ps ymm", "avx2", DSV4_LIMIT_F32_FMA, NULL, fma_peak},
    {"vpmaddubsw ymm", "avx2", DSV4_LIMIT_BYTE_DOT, NULL, bytes_peak},
    {NULL, NULL, 0, NULL, NULL},
};
