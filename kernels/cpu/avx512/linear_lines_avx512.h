/* SPDX-License-Identifier: Apache-2.0 */
/* Lines of codes (linear_few.h): what avx512 and avx512bf16 share.  The including file has defined
 * its operands. */
#ifndef DSV4_LINEAR_LINES_AVX512_H
#define DSV4_LINEAR_LINES_AVX512_H

/* Largest doubled code so far, like seen_codes. */
typedef __m512i seen_line;

#include "cpu/linear_lines.h"

INLINE seen_line seen_line_zero(void) {
    return _mm512_setzero_si512();
}

INLINE int line_nan(seen_line seen) {
    return _mm512_cmpeq_epi8_mask(seen, _mm512_set1_epi8((char)0xfe)) != 0;
}

/* 32 e4m3 codes as bf16 times 2^-120: the code's exponent field is put where the other's is. */
INLINE __m512i fp8_words(const uint8_t *codes) {
    __m256i v = _mm256_loadu_si256((const __m256i *)(const void *)codes);
    return _mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(v), 4),
                            _mm512_set1_epi16((short)0x87f0));
}

/* Columns k ... k + 31 of a row of n; those behind its end are +0. */
INLINE __m512i load_padded(const dsv4_bf16 *x, int32_t k, int32_t n) {
    if (k + STEP <= n)
        return load_bf16(x + k, STEP, 0);
    return k < n ? load_bf16(x + k, n - k, 1) : _mm512_setzero_si512();
}

/* Every SPAN_OTHER columns: the scales of FP4 rows from byte `at` on; behind a row's end there are
 * only zeros to scale. */
INLINE void line_scales(struct lines *s, size_t at, const int R) {
    const int32_t k = 2 * (int32_t)at, left = s->cols - k;
    if (k % SPAN_OTHER == 0)
        EACH (r, R)
            _mm512_storeu_si512(s->words[r],
                                fold_fp4(fp4_scale_bytes(s->scale[r] + k / DSV4_FP4_BLOCK,
                                                         left < SPAN_OTHER ? left : SPAN_OTHER)));
}

INLINE __m128i line_block(const struct lines *s, int r, size_t at) {
    return _mm_loadu_si128((const __m128i *)(const void *)(s->w[r] + at));
}

INLINE void line_sums(const enum form form, struct lines *s, const int i, const int R, const int T,
                      float sums[4]) {
    const int last = R * T - 1, i1 = i + 1 < last ? i + 1 : last, i2 = i + 2 < last ? i + 2 : last,
              i3 = i + 3 < last ? i + 3 : last;
    (void)form;
    sum4(sums, s->acc[i / T][i % T], s->acc[i1 / T][i1 % T], s->acc[i2 / T][i2 % T],
         s->acc[i3 / T][i3 % T]);
}

#endif
