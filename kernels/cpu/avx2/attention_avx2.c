/* SPDX-License-Identifier: Apache-2.0 */
/* Attention by f32 multiply-adds in eight lanes; the structure is in attention_fma.h. */
#include "cpu/avx2/functions_avx2.h"
#include "kernels.h"

#include <string.h>

#define LANES 8
#define vec __m256
#define ivec __m256i
#define v_load _mm256_load_ps
#define v_store _mm256_store_ps
#define v_set1 _mm256_set1_ps
#define v_zero _mm256_setzero_ps
#define v_add _mm256_add_ps
#define v_sub _mm256_sub_ps
#define v_mul _mm256_mul_ps
#define v_div _mm256_div_ps
#define v_max _mm256_max_ps
#define v_fma _mm256_fmadd_ps
#define v_exp dsv4_exp_avx2

/* Score tiles: vectors of heads by ranks; value tiles: 4 heads by vectors of dimensions.  Sixteen
 * registers. */
enum { SCORE_VECS = 2, SCORE_KEYS = 4, VALUE_VECS = 2 };

/* bf16 in the upper half of each lane, to nearest even; the lower half is left over.  A NaN of
 * functions.h stays. */
static inline __m256i round_upper(__m256 x) {
    __m256i u = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
}

static inline void v_store_bf16(dsv4_bf16 *out, __m256 x) {
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    __m256i h =
        _mm256_blendv_epi8(_mm256_srli_epi32(round_upper(x), 16), _mm256_set1_epi32(0x7fc0), nan);
    h = _mm256_permute4x64_epi64(_mm256_packus_epi32(h, h), 0x08);
    _mm_storeu_si128((__m128i *)out, _mm256_castsi256_si128(h));
}

static inline __m256 v_flush(__m256 x) {
    __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
    return _mm256_and_ps(x, _mm256_cmp_ps(magnitude, _mm256_set1_ps(0x1p-95f), _CMP_NLT_UQ));
}

/* 16 bf16 by rule 2; magnitudes are below 2^15, so signed comparisons do. */
static inline __m256i operands(__m256i h) {
    __m256i magnitude = _mm256_and_si256(h, _mm256_set1_epi16(0x7fff));
    __m256i keep = _mm256_cmpgt_epi16(magnitude, _mm256_set1_epi16(DSV4_TINY_BF16 - 1));
    return _mm256_and_si256(h, _mm256_or_si256(keep, _mm256_set1_epi16((short)0x8000)));
}

static inline __m256 v_even(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
}

static inline __m256 v_odd(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000u)));
}

static inline __m256 v_operand_p(__m256 p) {
    __m256i u = _mm256_and_si256(round_upper(p), _mm256_set1_epi32((int)0xffff0000u));
    return _mm256_castsi256_ps(
        _mm256_and_si256(u, _mm256_cmpgt_epi32(u, _mm256_set1_epi32(DSV4_TINY_F32 - 1))));
}

static inline __m256 v_load_operand(const uint8_t *row) {
    __m256i h = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)row));
    return v_even(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(operands(h))));
}

static void transposed_pairs(__m256i r[8], const dsv4_bf16 *x, size_t ld, size_t n_row,
                             size_t n_pair) {
    __m256i t[8];
    for (size_t h = 0; h < 8; h++) {
        dsv4_bf16 tail[16] = {0};
        const dsv4_bf16 *row = x + h * ld;
        if (h < n_row && n_pair < 8)
            row = memcpy(tail, row, n_pair * 2 * sizeof *row);
        r[h] = h < n_row ? operands(_mm256_loadu_si256((const __m256i *)(const void *)row))
                         : _mm256_setzero_si256();
    }
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        __m256i low = r[i], high = r[i + 4];
        r[i] = _mm256_permute2x128_si256(low, high, 0x20);
        r[i + 4] = _mm256_permute2x128_si256(low, high, 0x31);
    }
}

static inline int fp8_has_nan(const uint8_t *codes) {
    const __m256i nan = _mm256_set1_epi8(0x7f);
    __m256i a = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)codes), nan);
    __m256i b = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(codes + 32)), nan);
    return _mm256_movemask_epi8(
               _mm256_or_si256(_mm256_cmpeq_epi8(a, nan), _mm256_cmpeq_epi8(b, nan))) != 0;
}

/* An e4m3 code is a half float 2^8 too small: sign, then 7 bits; halves widen exactly, subnormal
 * ones too. */
static inline void fp8_strip(float *k, const uint8_t *codes, uint8_t scale) {
    __m256 s = _mm256_castsi256_ps(_mm256_set1_epi32((scale + 8) << 23));
    for (int i = 0; i < 64; i += 16) {
        __m256i z = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(codes + i)));
        __m256i h = _mm256_and_si256(_mm256_slli_epi16(z, 7), _mm256_set1_epi16(0x3f80));
        h = _mm256_or_si256(h, _mm256_and_si256(z, _mm256_set1_epi16((short)0x8000)));
        _mm256_store_ps(k + i, _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(h)), s));
        _mm256_store_ps(k + i + 8,
                        _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(h, 1)), s));
    }
}

#include "cpu/attention_fma.h"

static void dsv4k_attention_avx2(const struct dsv4_attention_args *a) {
    attention(a);
}

const struct dsv4_variant dsv4k_avx2_attention[] = {
    DSV4_VARIANT(attention, dsv4k_attention_avx2, "avx2", 0),
    {NULL, NULL, 0, 0},
};
