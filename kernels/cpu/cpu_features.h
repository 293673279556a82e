/* SPDX-License-Identifier: Apache-2.0 */
/* What processor and operating system offer: one bit per instruction set that has a kernel folder.
 */
#ifndef DSV4_CPU_FEATURES_H
#define DSV4_CPU_FEATURES_H

enum dsv4_cpu_set {
    DSV4_SET_AVX2 = 1,       /* avx2 fma f16c bmi2 */
    DSV4_SET_AVX512 = 2,     /* avx512 f bw dq vl, with AVX2 */
    DSV4_SET_AVX512VNNI = 4, /* with AVX512 */
    DSV4_SET_AVX512BF16 = 8, /* avx512 bf16 vbmi, with AVX512VNNI */
};

/* The bits of enum dsv4_cpu_set this machine has; 0 on processors other than x86-64. */
unsigned dsv4k_cpu_features(void);

#endif
