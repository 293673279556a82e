/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Lines of codes (linear_few.h) with AVX2.  Which register holds which of the 16 lanes is free as
 * long as x and the tree agree: FP8 puts the even lanes in one and the odd lanes in the other, so
 * that codes need no shuffle; FP4 takes two rows in the halves of a register, lanes 4j ... 4j + 3
 * of both in register j.  The including file, linear_avx2.c, has defined its operands.
 */
#ifndef DSV4_LINEAR_LINES_AVX2_H
#define DSV4_LINEAR_LINES_AVX2_H

#include "cpu/fp4_scales.h"

typedef __m256i seen_line;

#include "cpu/linear_lines.h"

INLINE seen_line seen_line_zero(void) {
    return _mm256_setzero_si256();
}

INLINE int line_nan(seen_line seen) {
    return _mm256_movemask_epi8(_mm256_cmpeq_epi8(seen, _mm256_set1_epi8((char)0xfe))) != 0;
}

/* Columns k ... k + 15 of a row of n; those behind its end are +0. */
INLINE operand load_padded(const dsv4_bf16 *x, int32_t k, int32_t n) {
    if (k + 16 <= n)
        return load_operand(x + k, 16, 0);
    return load_operand(x + k, k < n ? n - k : 0, 1);
}

/* The elements of even or odd index of two registers. */
INLINE __m256 every_second(__m256 a, __m256 b, const int odd) {
    __m256 mixed = odd ? _mm256_shuffle_ps(a, b, 0xdd) : _mm256_shuffle_ps(a, b, 0x88);
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xd8));
}

/* Of each step the odd elements of the even lanes, their even elements, those of the odd lanes. */
INLINE int pack_fp8(uint8_t *out, const dsv4_bf16 *x, int32_t cols, const uint8_t *scales) {
    const __m256 largest = _mm256_set1_ps(0x1.fffffep127f);
    const __m256 size = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    int good = 1;
    for (int32_t k = 0; k < packed_columns(cols); k += STEP) {
        const uint32_t byte = k < cols ? scales[k / DSV4_FP8_BLOCK] : 0;
        const __m256 scale = _mm256_castsi256_ps(_mm256_set1_epi32((int)((byte + 120) << 23)));
        operand low = load_padded(x, k, cols), high = load_padded(x, k + 16, cols);
        __m256 plane[4] = {every_second(low.odd, high.odd, 0), every_second(low.even, high.even, 0),
                           every_second(low.odd, high.odd, 1),
                           every_second(low.even, high.even, 1)};
        good &= byte <= FOLD_ONCE_MAX;
        EACH (i, 4) {
            plane[i] = _mm256_mul_ps(plane[i], scale);
            _mm256_store_ps((float *)(void *)out + k + 8 * i, plane[i]);
            __m256 finite = _mm256_cmp_ps(_mm256_and_ps(plane[i], size), largest, _CMP_LE_OQ);
            good &= _mm256_movemask_ps(finite) == 0xff;
        }
    }
    return good;
}

/* Of each step 16 odd elements, then 16 even ones. */
INLINE void pack_fp4(uint8_t *out, const dsv4_bf16 *x, int32_t cols) {
    for (int32_t k = 0; k < packed_columns(cols); k += 16) {
        operand v = load_padded(x, k, cols);
        float *p = (float *)(void *)out + k / STEP * STEP + k % STEP / 2;
        _mm256_store_ps(p, v.odd);
        _mm256_store_ps(p + 16, v.even);
    }
}

/* 32 columns: `odd` and `even` hold their odd and even elements as words, lower halves those of the
 * even lanes. */
INLINE void fp8_products(lanes acc[2], __m256i odd, __m256i even, const float *x) {
    acc[0] = _mm256_fmadd_ps(even_elements(odd), _mm256_load_ps(x), acc[0]);
    acc[0] = _mm256_fmadd_ps(even_elements(even), _mm256_load_ps(x + 8), acc[0]);
    acc[1] = _mm256_fmadd_ps(odd_elements(odd), _mm256_load_ps(x + 16), acc[1]);
    acc[1] = _mm256_fmadd_ps(odd_elements(even), _mm256_load_ps(x + 24), acc[1]);
}

INLINE const float *line_x(const struct lines *s, int t, size_t k) {
    return (const float *)(const void *)(s->x + (size_t)t * s->packed) + k;
}

/* The code's exponent field is put where the bf16's is: its value times 2^-120, the subnormals are
 * the float's. */
INLINE void line_fp8(struct lines *s, size_t at, const int R, const int T) {
    const __m256i keep = _mm256_set1_epi16((short)0x87f0);
    EACH (half, 2)
        EACH (r, R) {
            const uint8_t *p = s->w[r] + at + half * STEP;
            __m256i v = _mm256_loadu_si256((const __m256i *)(const void *)p);
            s->seen[r] = _mm256_max_epu8(s->seen[r], _mm256_add_epi8(v, v));
            __m256i odd = _mm256_and_si256(_mm256_srai_epi16(v, 4), keep);
            __m256i even = _mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(v, 8), 4), keep);
            EACH (t, T)
                fp8_products(s->acc[r][t], odd, even, line_x(s, t, at + (size_t)half * STEP));
        }
}

/* Of each scale the lower bytes of the sixteen codes as bf16, then the upper bytes. */
#define FP4_LOWER(bf16) (bf16) & 0xff
#define FP4_UPPER(bf16) (bf16) >> 8
#define FP4_ENTRY(s) {{FP4_VALUES(FP4_LOWER, s)}, {FP4_VALUES(FP4_UPPER, s)}},
static const _Alignas(32) uint8_t fp4_bytes[FP4_SCALES][2][16] = {EACH_FP4_SCALE(FP4_ENTRY)};

/* 16 bytes each of two places. */
INLINE __m256i two_halves(const void *low, const void *high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)low)),
                                   _mm_loadu_si128((const __m128i *)high), 1);
}

/* A nibble of each byte as two registers of bf16 words: bytes 0-7 and 8-15 of both rows. */
INLINE void fp4_words(__m256i words[2], __m256i nibbles, __m256i lower, __m256i upper) {
    __m256i l = _mm256_shuffle_epi8(lower, nibbles), u = _mm256_shuffle_epi8(upper, nibbles);
    words[0] = _mm256_unpacklo_epi8(l, u);
    words[1] = _mm256_unpackhi_epi8(l, u);
}

/* Lanes 8i ... 8i + 7 of two rows; x is the same for both. */
INLINE void fp4_products(lanes acc[2], __m256i words, const float *x) {
    const __m256i zero = _mm256_setzero_si256();
    __m256 low = _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, words));
    __m256 high = _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, words));
    acc[0] = _mm256_fmadd_ps(low, _mm256_broadcast_ps((const __m128 *)(const void *)x), acc[0]);
    acc[1] =
        _mm256_fmadd_ps(high, _mm256_broadcast_ps((const __m128 *)(const void *)(x + 4)), acc[1]);
}

INLINE void line_fp4(struct lines *s, size_t at, const int R, const int T) {
    const __m256i low = _mm256_set1_epi8(15);
    EACH (b, LINE_BLOCKS)
        EACH (pair, R / 2) {
            const int r = 2 * pair;
            const size_t here = at + (size_t)b * FP4_BLOCK_BYTES;
            const size_t first = (size_t)s->scale[r][here / FP4_BLOCK_BYTES] - DSV4_FOLD_FP4_MIN;
            const size_t second =
                (size_t)s->scale[r + 1][here / FP4_BLOCK_BYTES] - DSV4_FOLD_FP4_MIN;
            __m256i v = two_halves(s->w[r] + here, s->w[r + 1] + here);
            __m256i lower = two_halves(fp4_bytes[first][0], fp4_bytes[second][0]);
            __m256i upper = two_halves(fp4_bytes[first][1], fp4_bytes[second][1]);
            __m256i odd[2], even[2];
            fp4_words(odd, _mm256_and_si256(_mm256_srli_epi16(v, 4), low), lower, upper);
            fp4_words(even, _mm256_and_si256(v, low), lower, upper);
            EACH (t, T) {
                const float *x = line_x(s, t, 2 * here);
                /* Registers of x shared by several pairs would drive the sums to memory. */
                __asm__("" : "+r"(x));
                EACH (i, 2) {
                    fp4_products(s->acc[r + i][t], odd[i], x + 8 * i);
                    fp4_products(s->acc[r + i][t], even[i], x + 16 + 8 * i);
                }
            }
        }
}

/* The tree of rule 1: l[i] += l[i + 8] joins registers j and j + 2, l[i] += l[i + 4] the two. */
INLINE void fp4_sums(struct lines *s, const int r, const int t, float sums[2]) {
    lanes *low = s->acc[r][t], *high = s->acc[r + 1][t];
    __m256 v = _mm256_add_ps(_mm256_add_ps(low[0], high[0]), _mm256_add_ps(low[1], high[1]));
    v = _mm256_add_ps(v, _mm256_permute_ps(v, 0x4e));
    v = _mm256_add_ps(v, _mm256_permute_ps(v, 0xb1));
    sums[0] = _mm256_cvtss_f32(v);
    sums[1] = _mm_cvtss_f32(_mm256_extractf128_ps(v, 1));
}

/* Of the even lanes 2i in low, the odd lanes 2i + 1 in high: they meet last. */
INLINE float fp8_sum(const lanes acc[2]) {
    __m256 v = _mm256_add_ps(_mm256_permute2f128_ps(acc[0], acc[1], 0x20),
                             _mm256_permute2f128_ps(acc[0], acc[1], 0x31));
    v = _mm256_add_ps(v, _mm256_permute_ps(v, 0x4e));
    v = _mm256_add_ps(v, _mm256_permute_ps(v, 0xb1));
    return _mm256_cvtss_f32(v) + _mm_cvtss_f32(_mm256_extractf128_ps(v, 1));
}

INLINE void line_sums(const enum form form, struct lines *s, const int i, const int R, const int T,
                      float sums[4]) {
    EACH (j, 4) {
        const int r = (i + j) / T, t = (i + j) % T;
        if (r < R && form == FP8_FOLD) {
            sums[j] = fp8_sum(s->acc[r][t]);
        } else if (r < R) {
            float two[2];
            fp4_sums(s, r / 2 * 2, t, two);
            sums[j] = two[r % 2];
        }
    }
}

#endif
