/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Independent chains of one instruction in registers: its peak.  The factors are register 15 and
 * all sums start at zero, so no value is ever anything but zero.  Before including: CHAINS_WIDE, 0
 * for 12 chains in ymm registers, 1 for 24 in zmm registers (an instruction of six cycles, two a
 * cycle, needs twelve).
 */
#ifndef DSV4_LIMITS_CHAINS_H
#define DSV4_LIMITS_CHAINS_H

#include "machine_limits.h"

#define CHAINS_4(x, a, b, c, d) x(a) x(b) x(c) x(d)
#define CHAINS_12(x) CHAINS_4(x, 0, 1, 2, 3) CHAINS_4(x, 4, 5, 6, 7) CHAINS_4(x, 8, 9, 10, 11)
#if CHAINS_WIDE
#define CHAINS_REGISTER "zmm"
#define CHAINS_ZERO(i) "vpxord %%zmm" #i ", %%zmm" #i ", %%zmm" #i "\n"
#define CHAINS(x)                                                                                  \
    CHAINS_12(x)                                                                                   \
    CHAINS_4(x, 16, 17, 18, 19) CHAINS_4(x, 20, 21, 22, 23) CHAINS_4(x, 24, 25, 26, 27)
#define CHAINS_MORE                                                                                \
    , "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25",    \
        "xmm26", "xmm27"
enum { CHAINS_COUNT = 24 };
#else
#define CHAINS_REGISTER "ymm"
#define CHAINS_ZERO(i) "vpxor %%ymm" #i ", %%ymm" #i ", %%ymm" #i "\n"
#define CHAINS(x) CHAINS_12(x)
#define CHAINS_MORE
enum { CHAINS_COUNT = 12 };
#endif

/* One link of chain i. */
#define CHAINS_LINK(instruction, i)                                                                \
    instruction " %%" CHAINS_REGISTER "15, %%" CHAINS_REGISTER "15, %%" CHAINS_REGISTER #i "\n"

/* dsv4k_peak_fn `name`: `link(i)` is one link of chain i, of `operations` each. */
#define CHAINS_PEAK(name, link, operations)                                                        \
    static double name(int64_t rounds) {                                                           \
        int64_t left = rounds < 1 ? 1 : rounds;                                                    \
        const double done = (double)left * CHAINS_COUNT * (operations);                            \
        __asm__ volatile(                                                                          \
            CHAINS(CHAINS_ZERO)                                                                    \
                CHAINS_ZERO(15) "1:\n" CHAINS(link) "subq $1, %0\njnz 1b\nvzeroupper\n"            \
            : "+r"(left)                                                                           \
            :                                                                                      \
            : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",        \
              "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15" CHAINS_MORE);           \
        return done;                                                                               \
    }

#endif
