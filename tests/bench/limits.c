/* SPDX-License-Identifier: Apache-2.0 */
/* The limits of this machine for the kernel bench: reading memory, and the two instructions that
 * give exact sums. */
#define _POSIX_C_SOURCE 200809L
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include "kernels.h"

double now(void);
double read_seconds(const void *p, size_t bytes, int streams);
double fma_gflops(void);
double bf16_dot_gflops(void);
double byte_dot_gops(void);
double linear_seconds(dsv4k_linear_fn *fn, struct dsv4_linear_args *a, int32_t chunk);
double call_seconds(void (*fn)(const void *), const void *args, int repeats);
double top_k_seconds(dsv4k_top_k_fn *fn, int32_t *ids, const float *scores, int32_t n, int32_t k,
                     void *scratch, int repeats);

double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef uint64_t vector __attribute__((vector_size(64), aligned(1), may_alias));

/* A sum of all 64-bit words: one stream, or four a quarter of the bytes apart with prefetches 2 KiB
 * ahead. */
double read_seconds(const void *p, size_t bytes, int streams) {
    const vector *v = p;
    const size_t n = bytes / 64 / 8 * 8;
    vector s[8] = {{0}};
    double start = now();
    if (streams == 1)
        for (size_t i = 0; i < n; i += 8)
            for (int j = 0; j < 8; j++)
                s[j] += v[i + (size_t)j];
    else
        for (size_t i = 0; i < n / 4; i += 2)
            for (size_t j = 0; j < 4; j++) {
                __builtin_prefetch(v + j * (n / 4) + i + 32);
                __builtin_prefetch(v + j * (n / 4) + i + 33);
                s[2 * j] += v[j * (n / 4) + i];
                s[2 * j + 1] += v[j * (n / 4) + i + 1];
            }
    double seconds = now() - start;
    volatile uint64_t keep = 0;
    for (int j = 0; j < 8; j++)
        for (int i = 0; i < 8; i++)
            keep += s[j][i];
    return seconds;
}

/* Independent chains of one instruction whose factors are register 15; the loop has nothing else.
 * Twelve, or 24 where there are 32 registers: vdpbf16ps takes six cycles on Zen 5, two a cycle. */
#define FOUR(x, a, b, c, d) x(a) x(b) x(c) x(d)
#define TWELVE(x) FOUR(x, 0, 1, 2, 3) FOUR(x, 4, 5, 6, 7) FOUR(x, 8, 9, 10, 11)
#if defined(__AVX512F__)
#define CHAINS(x) TWELVE(x) FOUR(x, 16, 17, 18, 19) FOUR(x, 20, 21, 22, 23) FOUR(x, 24, 25, 26, 27)
#define N_CHAINS 24
#define MORE_REGISTERS                                                                             \
    , "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25",    \
        "xmm26", "xmm27"
#else
#define CHAINS TWELVE
#define N_CHAINS 12
#define MORE_REGISTERS
#endif
#define LOOP(body)                                                                                 \
    double best = 1e9;                                                                             \
    for (int i = 0; i < 20; i++) {                                                                 \
        double start = now();                                                                      \
        for (int k = 0; k < 20000; k++)                                                            \
            __asm__ volatile(CHAINS(body)::                                                        \
                                 : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", \
                                   "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14",    \
                                   "xmm15" MORE_REGISTERS);                                        \
        double seconds = now() - start;                                                            \
        best = seconds < best ? seconds : best;                                                    \
    }                                                                                              \
    double per_second = 20000.0 * N_CHAINS / best / 1e9;

double fma_gflops(void) {
#if defined(__AVX512F__)
#define FMA(i) "vfmadd231ps %%zmm15, %%zmm15, %%zmm" #i "\n"
    __asm__ volatile("vpxor %%xmm15, %%xmm15, %%xmm15" ::: "xmm15");
    LOOP(FMA)
    return per_second * 32;
#elif defined(__FMA__)
#define FMA(i) "vfmadd231ps %%ymm15, %%ymm15, %%ymm" #i "\n"
    __asm__ volatile("vpxor %%xmm15, %%xmm15, %%xmm15" ::: "xmm15");
    LOOP(FMA)
    return per_second * 16;
#else
    return 0;
#endif
}

double bf16_dot_gflops(void) {
#if defined(__AVX512BF16__)
#define DOT(i) "vdpbf16ps %%zmm15, %%zmm15, %%zmm" #i "\n"
    __asm__ volatile("vpxor %%xmm15, %%xmm15, %%xmm15" ::: "xmm15");
    LOOP(DOT)
    return per_second * 64;
#else
    return 0;
#endif
}

/* Products of unsigned and signed bytes with their sums. */
double byte_dot_gops(void) {
#if defined(__AVX512VNNI__)
#define BYTES(i) "vpdpbusd %%zmm15, %%zmm15, %%zmm" #i "\n"
    __asm__ volatile("vpxor %%xmm15, %%xmm15, %%xmm15" ::: "xmm15");
    LOOP(BYTES)
    return per_second * 128;
#elif defined(__AVX2__)
#define BYTES(i) "vpmaddubsw %%ymm15, %%ymm15, %%ymm" #i "\n"
    __asm__ volatile("vpxor %%xmm15, %%xmm15, %%xmm15" ::: "xmm15");
    LOOP(BYTES)
    return per_second * 64;
#else
    return 0;
#endif
}

/* The shortest of some calls: kernels whose data the calls before have left in the caches. */
double call_seconds(void (*fn)(const void *), const void *args, int repeats) {
    double best = 1e9;
    for (int i = 0; i < repeats; i++) {
        double start = now();
        fn(args);
        double seconds = now() - start;
        best = seconds < best ? seconds : best;
    }
    return best;
}

double top_k_seconds(dsv4k_top_k_fn *fn, int32_t *ids, const float *scores, int32_t n, int32_t k,
                     void *scratch, int repeats) {
    double best = 1e9;
    for (int i = 0; i < repeats; i++) {
        double start = now();
        fn(ids, scores, n, k, scratch);
        double seconds = now() - start;
        best = seconds < best ? seconds : best;
    }
    return best;
}

/* One whole layer in calls of `chunk` rows, as the engine makes them. */
double linear_seconds(dsv4k_linear_fn *fn, struct dsv4_linear_args *a, int32_t chunk) {
    double start = now();
    for (int32_t row = 0; row < a->w->rows; row += chunk) {
        a->row0 = row;
        a->row1 = row + chunk < a->w->rows ? row + chunk : a->w->rows;
        fn(a);
    }
    return now() - start;
}
