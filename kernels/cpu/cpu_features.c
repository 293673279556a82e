/* SPDX-License-Identifier: Apache-2.0 */
/* cpuid says what the processor knows, xgetbv which registers the operating system saves; both must
 * agree. */
#include "cpu/cpu_features.h"

#if defined(__x86_64__)

#include <cpuid.h>
#include <stdint.h>

enum { XCR0_YMM = 0x06, XCR0_ZMM = 0xe6 }; /* xmm + ymm; and opmask + both halves of zmm */

static int bit(unsigned reg, int i) {
    return (int)(reg >> i & 1u);
}

static uint64_t read_xcr0(void) {
    uint32_t lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return (uint64_t)hi << 32 | lo;
}

unsigned dsv4k_cpu_features(void) {
    unsigned a1, b1, c1, d1, a7, b7, c7, d7, a71 = 0, b71, c71, d71, found = 0;
    if (!__get_cpuid(1, &a1, &b1, &c1, &d1) || !bit(c1, 27)) /* OSXSAVE: xgetbv exists */
        return 0;
    uint64_t xcr0 = read_xcr0();
    if (!__get_cpuid_count(7, 0, &a7, &b7, &c7, &d7))
        return 0;
    if (a7 >= 1)
        __get_cpuid_count(7, 1, &a71, &b71, &c71, &d71);
    int fma = bit(c1, 12), avx = bit(c1, 28), f16c = bit(c1, 29), avx2 = bit(b7, 5),
        bmi2 = bit(b7, 8);
    if ((xcr0 & XCR0_YMM) != XCR0_YMM || !(fma && avx && f16c && avx2 && bmi2))
        return 0;
    found |= DSV4_SET_AVX2;
    int f = bit(b7, 16), dq = bit(b7, 17), bw = bit(b7, 30), vl = bit(b7, 31);
    if ((xcr0 & XCR0_ZMM) != XCR0_ZMM || !(f && dq && bw && vl))
        return found;
    found |= DSV4_SET_AVX512;
    if (!bit(c7, 11))
        return found;
    found |= DSV4_SET_AVX512VNNI;
    if (bit(a71, 5) && bit(c7, 1)) /* Cooper Lake has the dot without vbmi; none lacks vnni */
        found |= DSV4_SET_AVX512BF16;
    return found;
}

#else

unsigned dsv4k_cpu_features(void) {
    return 0;
}

#endif
