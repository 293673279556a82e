/* SPDX-License-Identifier: Apache-2.0 */
/* The vectors of indexer_simd.h in sixteen lanes; used with and without vpdpbusd.  The including
 * file defines KEY_VECS, sum_start, sum_add and sum_finish. */
#ifndef DSV4_INDEXER_AVX512_H
#define DSV4_INDEXER_AVX512_H

#include "cpu/avx512/transpose_avx512.h"
#include "kernels.h"

#define LANES 16
#define vec __m512
#define ivec __m512i
#define v_zero _mm512_setzero_ps
#define v_set1 _mm512_set1_ps
#define v_add _mm512_add_ps
#define v_mul _mm512_mul_ps
#define v_fma _mm512_fmadd_ps
#define v_cast _mm512_castsi512_ps
#define v_from_int _mm512_cvtepi32_ps
#define v_relu(x) _mm512_max_ps(_mm512_setzero_ps(), x) /* the second operand where one is NaN */
#define i_load _mm512_load_si512
#define i_store _mm512_store_si512
#define i_set1 _mm512_set1_epi32
#define i_add _mm512_add_epi32
#define i_and _mm512_and_si512
#define i_or _mm512_or_si512
#define i_equal(a, b) _mm512_movm_epi32(_mm512_cmpeq_epi32_mask(a, b))
#define SHIFT_LEFT _mm512_slli_epi32
#define SHIFT_RIGHT _mm512_srai_epi32

static inline __m512i i_clamp(__m512i x, int32_t low, int32_t high) {
    return _mm512_min_epi32(_mm512_max_epi32(x, i_set1(low)), i_set1(high));
}

static inline int i_any_outside(__m512i x, int32_t low, int32_t high) {
    return (_mm512_cmplt_epi32_mask(x, i_set1(low)) | _mm512_cmpgt_epi32_mask(x, i_set1(high))) !=
           0;
}

/* To nearest even.  A NaN made here by an operation or canonical before stays one. */
static inline __m512 v_round(__m512 x) {
    __m512i u = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), i_set1(1));
    u = _mm512_add_epi32(_mm512_add_epi32(u, i_set1(0x7fff)), odd);
    return _mm512_castsi512_ps(_mm512_and_si512(u, i_set1((int)0xffff0000u)));
}

static inline void v_store_scores(float *out, __m512 x, __m512i nan, size_t n) {
    __mmask16 bad = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) | _mm512_movepi32_mask(nan);
    x = _mm512_mask_mov_ps(v_round(x), bad, v_cast(i_set1(0x7fc00000)));
    _mm512_mask_storeu_ps(out, (__mmask16)((1u << n) - 1), x);
}

/* Four blocks (64 bytes of codes) of sixteen keys at a time, dwords transposed. */
static void load_codes(uint8_t *codes, const uint8_t *keys, size_t row_bytes, size_t n_block,
                       size_t n) {
    const __m512i twice_12 = _mm512_broadcast_i32x4(
        _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    const __m512i nibble = _mm512_set1_epi8(15);
    for (size_t b = 0; b < n_block; b += 4) {
        size_t dwords = n_block - b < 4 ? (n_block - b) * 4 : 16;
        __mmask16 mask = (__mmask16)((1u << dwords) - 1);
        __m512i r[16];
        for (size_t i = 0; i < 16; i++)
            r[i] = i < n ? _mm512_maskz_loadu_epi32(mask, keys + i * row_bytes + b * 16)
                         : _mm512_setzero_si512();
        transpose_16x16(r);
        UNROLL
        for (size_t i = 0; i < 16; i++) {
            __m512i low = _mm512_and_si512(r[i], nibble);
            __m512i high = _mm512_and_si512(_mm512_srli_epi32(r[i], 4), nibble);
            if (i < dwords) {
                uint8_t *out = codes + (b * 8 + 2 * i) * 64;
                _mm512_store_si512(out, _mm512_shuffle_epi8(twice_12, low));
                _mm512_store_si512(out + 64, _mm512_shuffle_epi8(twice_12, high));
            }
        }
    }
}

#endif
