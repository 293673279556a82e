/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The lists of variants, one line X(set, family) for each file kernels/cpu/<set>/<family>*.c, which
 * defines dsv4k_<set>_<family>[], and those of limits.  The build leaves out the folders the
 * compiler or the processor cannot do.
 */
#include "cpu/registry.h"

/* clang-format off */
#define REF_LISTS(X) \
    X(ref, linear) \
    X(ref, quant) \
    X(ref, norm) \
    X(ref, rope) \
    X(ref, hyper) \
    X(ref, attention) \
    X(ref, compress) \
    X(ref, indexer) \
    X(ref, moe)

#if defined(DSV4_HAVE_AVX2)
#define AVX2_LISTS(X) \
    X(avx2, linear) \
    X(avx2, quant) \
    X(avx2, norm) \
    X(avx2, rope) \
    X(avx2, hyper) \
    X(avx2, compress) \
    X(avx2, moe) \
    X(avx2, attention) \
    X(avx2, indexer)
#else
#define AVX2_LISTS(X)
#endif

#if defined(DSV4_HAVE_AVX512)
#define AVX512_LISTS(X) \
    X(avx512, linear) \
    X(avx512, quant) \
    X(avx512, norm) \
    X(avx512, rope) \
    X(avx512, hyper) \
    X(avx512, compress) \
    X(avx512, moe) \
    X(avx512, attention) \
    X(avx512, indexer)
#else
#define AVX512_LISTS(X)
#endif

#if defined(DSV4_HAVE_AVX512VNNI)
#define AVX512VNNI_LISTS(X) \
    X(avx512vnni, indexer)
#else
#define AVX512VNNI_LISTS(X)
#endif

#if defined(DSV4_HAVE_AVX512BF16)
#define AVX512BF16_LISTS(X) \
    X(avx512bf16, linear) \
    X(avx512bf16, attention) \
    X(avx512bf16, indexer)
#else
#define AVX512BF16_LISTS(X)
#endif

/* clang-format on */

#define ALL_LISTS(X)                                                                               \
    REF_LISTS(X) AVX2_LISTS(X) AVX512_LISTS(X) AVX512VNNI_LISTS(X) AVX512BF16_LISTS(X)

#define X(set, family) extern const struct dsv4_variant dsv4k_##set##_##family[];
ALL_LISTS(X)
#undef X

const struct dsv4_variant *const dsv4k_registry[] = {
#define X(set, family) dsv4k_##set##_##family,
    ALL_LISTS(X)
#undef X
        NULL,
};

#define LIMITS(set) extern const struct dsv4_limit dsv4k_##set##_limits[];
LIMITS(ref)
LIMITS(avx2)
LIMITS(avx512)
LIMITS(avx512vnni)
LIMITS(avx512bf16)
#undef LIMITS

const struct dsv4_limit *const dsv4k_limits[] = {
    dsv4k_ref_limits,
#if defined(DSV4_HAVE_AVX2)
    dsv4k_avx2_limits,
#endif
#if defined(DSV4_HAVE_AVX512)
    dsv4k_avx512_limits,
#endif
#if defined(DSV4_HAVE_AVX512VNNI)
    dsv4k_avx512vnni_limits,
#endif
#if defined(DSV4_HAVE_AVX512BF16)
    dsv4k_avx512bf16_limits,
#endif
    NULL,
};
