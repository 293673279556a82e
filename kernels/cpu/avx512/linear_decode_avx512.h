/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the linear layers of avx512 and avx512bf16 share before the multiply: loads with tails, rule
 * 2, e4m3 to f32 planes, scales, the tree.  One register holds the 16 lanes: lane i of a step has
 * elements 2i (even) and 2i+1 (odd).
 */
#ifndef DSV4_LINEAR_DECODE_AVX512_H
#define DSV4_LINEAR_DECODE_AVX512_H

#include <immintrin.h>

#include "cpu/linear_forms.h"

enum { UNITS = 1, MAX_ROWS = 4, GROUP_TOKENS = 4, GROUP_ROWS = 4, BLOCK_ROWS = 2 };
enum { LINE_ROWS_FP8 = 4, LINE_ROWS_FP4 = 4 };
enum { FEW_FP8 = 16, FEW_FP4 = 24, FEW_BF16 = 16 };

typedef __m512 lanes;

INLINE lanes lanes_zero(void) {
    return _mm512_setzero_ps();
}

INLINE lanes lanes_set1(float v) {
    return _mm512_set1_ps(v);
}

INLINE lanes lanes_fma(lanes a, lanes b, lanes c) {
    return _mm512_fmadd_ps(a, b, c);
}

/* n < 32 columns. */
INLINE __mmask32 step_mask(int32_t n) {
    return (1u << n) - 1;
}

/* 32 bf16, or n and +0. */
INLINE __m512i load_bf16(const void *p, int32_t n, const int masked) {
    return masked ? _mm512_maskz_loadu_epi16(step_mask(n), p) : _mm512_loadu_si512(p);
}

/* Rule 2 for weights as stored: magnitudes below 2^-55 become +0. */
INLINE __m512i flush_bf16(__m512i w) {
    __m512i twice = _mm512_add_epi16(w, w);
    return _mm512_maskz_mov_epi16(
        _mm512_cmpge_epu16_mask(twice, _mm512_set1_epi16(2 * DSV4_TINY_BF16)), w);
}

INLINE __m512i flush_f32(__m512i w) {
    __m512i twice = _mm512_add_epi32(w, w);
    return _mm512_maskz_mov_epi32(
        _mm512_cmpge_epu32_mask(twice, _mm512_set1_epi32(2 * DSV4_TINY_F32)), w);
}

/* bf16 values of f32, still in the upper halves (DSV4_SCALE_ROUND), as operands. */
INLINE __m512i round_to_bf16(__m512 v) {
    __m512i u = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q),
                              _mm512_set1_epi32(0x7fc00000));
    return flush_f32(_mm512_and_si512(r, _mm512_set1_epi32((int)0xffff0000)));
}

/*
 * 32 e4m3 codes as f32 times 2^-120, exact: the code's exponent field is put where the float's is,
 * so its subnormals are the float's.  NaN codes come out as 480; rows that hold one are found by
 * `nan_codes`.
 */
INLINE void fp8_planes(__m256i codes, __m512i *odd, __m512i *even) {
    const __m512i keep = _mm512_set1_epi32((int)0x87f00000);
    __m512i pair = _mm512_cvtepi16_epi32(codes);
    *odd = _mm512_and_si512(_mm512_slli_epi32(pair, 12), keep);
    *even = _mm512_and_si512(_mm512_srai_epi32(_mm512_slli_epi32(pair, 24), 4), keep);
}

/* Largest doubled code so far: 0xfe once a NaN (0x7f or 0xff) was among them. */
typedef __m256i seen_codes;

INLINE seen_codes seen_zero(void) {
    return _mm256_setzero_si256();
}

INLINE seen_codes see_codes(seen_codes seen, __m256i codes) {
    return _mm256_max_epu8(seen, _mm256_add_epi8(codes, codes));
}

INLINE int seen_nan(seen_codes seen) {
    return _mm256_movemask_epi8(_mm256_cmpeq_epi8(seen, _mm256_set1_epi8((char)0xfe))) != 0;
}

/* 32 codes, or n and 0. */
INLINE __m256i load_codes(const uint8_t *p, int32_t n, const int masked) {
    return masked ? _mm256_maskz_loadu_epi8(step_mask(n), p)
                  : _mm256_loadu_si256((const __m256i *)(const void *)p);
}

/* The e8m0 bytes of the FP4 blocks of n <= SPAN_OTHER columns, one a lane. */
INLINE __m512i fp4_scale_bytes(const uint8_t *p, int32_t n) {
    return _mm512_cvtepu8_epi32(
        _mm_maskz_loadu_epi8((__mmask16)((1u << (n / DSV4_FP4_BLOCK)) - 1), p));
}

/* e8m0 bytes as floats: 0 is 2^-127, 255 is NaN. */
INLINE __m512 e8m0_values(__m512i bytes) {
    __m512i v = _mm512_slli_epi32(bytes, 23);
    v = _mm512_mask_mov_epi32(v, _mm512_testn_epi32_mask(bytes, bytes),
                              _mm512_set1_epi32(0x00400000));
    __mmask16 nan = _mm512_cmpeq_epi32_mask(bytes, _mm512_set1_epi32(255));
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(v, nan, _mm512_set1_epi32(0x7fc00000)));
}

/* The tree of rule 1 for four sums at once; they end in lanes 0, 4, 8, 12. */
INLINE void sum4(float sums[4], const lanes *a, const lanes *b, const lanes *c, const lanes *d) {
    __m512 ab =
        _mm512_add_ps(_mm512_shuffle_f32x4(*a, *b, 0x44), _mm512_shuffle_f32x4(*a, *b, 0xee));
    __m512 cd =
        _mm512_add_ps(_mm512_shuffle_f32x4(*c, *d, 0x44), _mm512_shuffle_f32x4(*c, *d, 0xee));
    __m512 s =
        _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    s = _mm512_add_ps(s, _mm512_permute_ps(s, 0x4e));
    s = _mm512_add_ps(s, _mm512_permute_ps(s, 0xb1));
    const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm_storeu_ps(sums, _mm512_castps512_ps128(_mm512_permutexvar_ps(first, s)));
}

/* The same for 4 rows of 4 tokens, [token][row]. */
enum { SUM_TOKENS = 4 };

INLINE void sums_of_tile(float *sums, lanes v[SUM_TOKENS][4][UNITS]) {
    const __m512i transposed =
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512 s[SUM_TOKENS], pair[2];
    EACH (t, SUM_TOKENS) {
        const lanes *a = v[t][0], *b = v[t][1], *c = v[t][2], *d = v[t][3];
        __m512 ab =
            _mm512_add_ps(_mm512_shuffle_f32x4(*a, *b, 0x44), _mm512_shuffle_f32x4(*a, *b, 0xee));
        __m512 cd =
            _mm512_add_ps(_mm512_shuffle_f32x4(*c, *d, 0x44), _mm512_shuffle_f32x4(*c, *d, 0xee));
        s[t] =
            _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    }
    EACH (i, 2)
        pair[i] = _mm512_add_ps(_mm512_shuffle_ps(s[2 * i], s[2 * i + 1], 0x44),
                                _mm512_shuffle_ps(s[2 * i], s[2 * i + 1], 0xee));
    __m512 all = _mm512_add_ps(_mm512_shuffle_ps(pair[0], pair[1], 0x88),
                               _mm512_shuffle_ps(pair[0], pair[1], 0xdd));
    _mm512_store_ps(sums, _mm512_permutexvar_ps(transposed, all));
}

#endif
