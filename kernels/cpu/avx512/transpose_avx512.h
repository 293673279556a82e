/* SPDX-License-Identifier: Apache-2.0 */
/* 16 x 16 dwords transposed in registers: r[i] lane j becomes r[j] lane i. */
#ifndef DSV4_TRANSPOSE_AVX512_H
#define DSV4_TRANSPOSE_AVX512_H

#include <immintrin.h>

#define UNROLL _Pragma("GCC unroll 16")

static inline __attribute__((always_inline)) void transpose_16x16(__m512i r[16]) {
    __m512i t[16];
    UNROLL
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    /* r[4i + c]: 128-bit lane l holds column 4l + c of rows 4i ... 4i + 3 */
    UNROLL
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    UNROLL
    for (int c = 0; c < 4; c++) {
        __m512i a = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x44),
                b = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xee);
        __m512i d = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x44);
        __m512i e = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xee);
        t[c] = _mm512_shuffle_i32x4(a, d, 0x88);
        t[4 + c] = _mm512_shuffle_i32x4(a, d, 0xdd);
        t[8 + c] = _mm512_shuffle_i32x4(b, e, 0x88);
        t[12 + c] = _mm512_shuffle_i32x4(b, e, 0xdd);
    }
    UNROLL
    for (int i = 0; i < 16; i++)
        r[i] = t[i];
}

#endif
