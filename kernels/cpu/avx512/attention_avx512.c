/* SPDX-License-Identifier: Apache-2.0 */
/* Attention by f32 multiply-adds in sixteen lanes; the structure is in attention_fma.h. */
#include "cpu/avx512/attention_avx512.h"

#define v_fma _mm512_fmadd_ps
#define ivec __m512i

/* Score tiles: vectors of heads by ranks; value tiles: 4 heads by vectors of dimensions. */
enum { SCORE_VECS = 4, SCORE_KEYS = 4, VALUE_VECS = 4 };

static inline __m512 v_even(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
}

static inline __m512 v_odd(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000u)));
}

static inline __m512 v_operand_p(__m512 p) {
    __m512i u = _mm512_and_si512(round_upper(p), _mm512_set1_epi32((int)0xffff0000u));
    __mmask16 keep = _mm512_cmpge_epi32_mask(u, _mm512_set1_epi32(DSV4_TINY_F32));
    return _mm512_castsi512_ps(_mm512_maskz_mov_epi32(keep, u));
}

static inline __m512 v_load_operand(const uint8_t *row) {
    __m512i h = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)row));
    return v_even(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(operands(h))));
}

/* An e4m3 code is a half float 2^8 too small: sign, then 7 bits; halves widen exactly, subnormal
 * ones too. */
static inline void fp8_strip(float *k, const uint8_t *codes, uint8_t scale) {
    __m512 s = _mm512_castsi512_ps(_mm512_set1_epi32((scale + 8) << 23));
    for (int i = 0; i < 64; i += 32) {
        __m512i z = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(codes + i)));
        __m512i h = _mm512_and_si512(_mm512_slli_epi16(z, 7), _mm512_set1_epi16(0x3f80));
        h = _mm512_ternarylogic_epi32(h, z, _mm512_set1_epi16((short)0x8000),
                                      0xf8); /* h | z & sign */
        __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(h));
        __m512 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(h, 1));
        _mm512_store_ps(k + i, _mm512_mul_ps(low, s));
        _mm512_store_ps(k + i + 16, _mm512_mul_ps(high, s));
    }
}

#include "cpu/attention_fma.h"

static void dsv4k_attention_avx512(const struct dsv4_attention_args *a) {
    attention(a);
}

const struct dsv4_variant dsv4k_avx512_attention[] = {
    DSV4_VARIANT(attention, dsv4k_attention_avx512, "avx512", 1),
    {NULL, NULL, 0, 0},
};
