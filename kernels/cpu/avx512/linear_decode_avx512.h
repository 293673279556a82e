/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the linear layers of avx512 and avx512bf16 share before the multiply: loads with tails, rule
 * 2, e4m3 to f32 planes, scales, the tree.  A block of 32 columns is one step: lane i holds
 * elements 2i (even) and 2i+1 (odd).
 */
#ifndef DSV4_LINEAR_DECODE_AVX512_H
#define DSV4_LINEAR_DECODE_AVX512_H

#include <immintrin.h>

#include "kernels.h"

#define INLINE static inline __attribute__((always_inline))

#define NOINLINE __attribute__((noinline))
/* A loop whose count n <= 8 is a constant once inlined, unrolled so that arrays become registers.
 */
#define EACH(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < (n); i++)

/* Columns of a step, and of the span whose scales are prepared together. */
enum { STEP = 32, SPAN_FP8 = 128, SPAN_OTHER = 512, SPAN_STEPS = SPAN_OTHER / STEP };

/* What a row of weights is; a constant in every function below. */
enum form { FP8_FOLD, FP8_WIDE, FP8_BLOCK, FP8_ROUND, FP4_FOLD, FP4_BLOCK, BF16_PLAIN, F32_PLAIN };

INLINE int is_fp8(enum form form) {
    return form <= FP8_ROUND;
}

INLINE int is_fp4(enum form form) {
    return form == FP4_FOLD || form == FP4_BLOCK;
}

/* The largest FOLD byte whose scale times 2^120 is still finite: beyond it FP8 codes are scaled in
 * two multiplications. */
enum { FOLD_ONCE_MAX = 134 };

/* Bytes of a row of weights. */
INLINE size_t row_bytes(enum form form, int32_t cols) {
    size_t n = (size_t)cols;
    return is_fp8(form) ? n : is_fp4(form) ? n / 2 : form == BF16_PLAIN ? 2 * n : 4 * n;
}

/* Words of a step that exist, n columns from here on. */
INLINE __mmask32 step_mask(int32_t n) {
    return n >= STEP ? 0xffffffffu : (1u << n) - 1;
}

/* 32 bf16 of x; the columns beyond the mask are +0. */
INLINE __m512i load_x(const dsv4_bf16 *p, __mmask32 mask, const int masked) {
    return masked ? _mm512_maskz_loadu_epi16(mask, p) : _mm512_loadu_si512(p);
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
INLINE __m256i see_codes(__m256i seen, __m256i codes) {
    return _mm256_max_epu8(seen, _mm256_add_epi8(codes, codes));
}

INLINE int nan_codes(__m256i seen) {
    return _mm256_movemask_epi8(_mm256_cmpeq_epi8(seen, _mm256_set1_epi8((char)0xfe))) != 0;
}

INLINE float read_scale(const struct dsv4_weight *w, size_t i) {
    if (w->scale_type == DSV4_SCALE_E8M0)
        return dsv4_e8m0_to_f32(((const uint8_t *)w->scale)[i]);
    if (w->scale_type == DSV4_SCALE_BF16) {
        dsv4_bf16 s;
        memcpy(&s, (const char *)w->scale + 2 * i, sizeof s);
        return dsv4_bf16_to_f32(s);
    }
    float s;
    memcpy(&s, (const char *)w->scale + 4 * i, sizeof s);
    return s;
}

/* 32 codes; those beyond the mask are 0. */
INLINE __m256i load_codes(const uint8_t *p, __mmask32 mask, const int masked) {
    return masked ? _mm256_maskz_loadu_epi8(mask, p)
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

/* Index of the first scale of a row; the scale of column k is k / 128 (FP8) or k / 32 (FP4)
 * further. */
INLINE size_t row_scales(enum form form, int32_t row, int32_t cols) {
    if (is_fp4(form))
        return (size_t)row * (size_t)(cols / DSV4_FP4_BLOCK);
    return (size_t)(row / DSV4_FP8_BLOCK) * (((size_t)cols + DSV4_FP8_BLOCK - 1) / DSV4_FP8_BLOCK);
}

/* The tree of rule 1 for four sums at once; sums come out in lanes 0, 4, 8, 12. */
INLINE __m512 tree4(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
    __m512 s =
        _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    s = _mm512_add_ps(s, _mm512_permute_ps(s, 0x4e));
    return _mm512_add_ps(s, _mm512_permute_ps(s, 0xb1));
}

INLINE void store_sum(const struct dsv4_linear_args *a, int32_t t, int32_t r, float sum) {
    if (a->out_f32)
        ((float *)a->out)[t * a->ld_out + r] = sum;
    else
        ((dsv4_bf16 *)a->out)[t * a->ld_out + r] = dsv4_f32_to_bf16(sum);
}

/* The sums of row r with the T <= 4 tokens from t on. */
INLINE void store4(const struct dsv4_linear_args *a, const __m512 *acc, const int T, int32_t t,
                   int32_t r) {
    __m512 z = _mm512_setzero_ps();
    __m512 s = tree4(acc[0], T > 1 ? acc[1] : z, T > 2 ? acc[2] : z, T > 3 ? acc[3] : z);
    store_sum(a, t, r, _mm512_cvtss_f32(s));
    if (T > 1)
        store_sum(a, t + 1, r, _mm_cvtss_f32(_mm512_extractf32x4_ps(s, 1)));
    if (T > 2)
        store_sum(a, t + 2, r, _mm_cvtss_f32(_mm512_extractf32x4_ps(s, 2)));
    if (T > 3)
        store_sum(a, t + 3, r, _mm_cvtss_f32(_mm512_extractf32x4_ps(s, 3)));
}

INLINE const dsv4_bf16 *token(const struct dsv4_linear_args *a, int32_t t) {
    return a->x + (a->tok ? a->tok[t] : t) * a->ld_x;
}

#endif
