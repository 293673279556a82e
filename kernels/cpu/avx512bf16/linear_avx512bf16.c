/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Linear layers with vdpbf16ps, which is one step of rule 1: a register of 32 bf16 weights, one of
 * 32 bf16 x. Contract: kernels.h; loops: linear_few.h, linear_many.h.  f32 weights have no bf16
 * form and stay with avx512.
 */
#include "cpu/avx512/linear_decode_avx512.h"

enum { TILE_ROWS = 6, TILE_TOKENS = 4, OPERAND_BYTES = 64 };

typedef __m512i operand;

INLINE operand load_operand(const dsv4_bf16 *x, int32_t n, const int masked) {
    return load_bf16(x, n, masked);
}

INLINE __m512 multiply_add(__m512 acc, operand w, operand x) {
    return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x);
}

INLINE void operand_store(uint8_t *p, operand w) {
    _mm512_store_si512(p, w);
}

INLINE void multiply_tile(__m512 acc[TILE_ROWS][TILE_TOKENS], const uint8_t *panel,
                          const dsv4_bf16 *const *x, int32_t k, int32_t n, const int masked) {
    operand v[TILE_TOKENS];
    EACH (t, TILE_TOKENS)
        v[t] = load_bf16(x[t] + k, n, masked);
    EACH (r, TILE_ROWS) {
        operand w = _mm512_load_si512(panel + r * OPERAND_BYTES);
        EACH (t, TILE_TOKENS)
            acc[r][t] = multiply_add(acc[r][t], w, v[t]);
    }
}

/* Scales of one row for one span of columns. */
struct row_scale {
    __m512i exponent; /* FP8: what is added to a code's exponent field, in words */
    float block;      /* FP8: the scale as it is (rule 3, DSV4_SCALE_ROUND) */
    /* FP4: of each step; the exponent in both words of 32 bits, or the scale as float */
    union {
        uint32_t words[SPAN_STEPS];
        float each[SPAN_STEPS];
    };
};

/* e4m3 to bf16: the exponent's bias grows by 120. */
INLINE __m512i rebase(int scale_byte) {
    return _mm512_set1_epi16((short)((120 + scale_byte - 127) * 128));
}

INLINE void prepare_scale(const enum form form, const struct dsv4_weight *w, size_t scales,
                          int32_t k, int32_t n, struct row_scale *out) {
    if (form == FP8_FOLD) {
        out->exponent = rebase(((const uint8_t *)w->scale)[scales + (size_t)(k / SPAN_FP8)]);
    } else if (is_fp8(form)) {
        out->exponent = rebase(127);
        out->block = read_scale(w, scales + (size_t)(k / SPAN_FP8));
    } else if (is_fp4(form)) {
        const uint8_t *bytes = (const uint8_t *)w->scale + scales + k / DSV4_FP4_BLOCK;
        __m512i wide = fp4_scale_bytes(bytes, n);
        if (form == FP4_BLOCK) {
            _mm512_storeu_ps(out->each, e8m0_values(wide));
        } else {
            __m512i word = _mm512_slli_epi32(_mm512_sub_epi32(wide, _mm512_set1_epi32(127)), 7);
            word = _mm512_mask_blend_epi16(0xaaaaaaaau, word, _mm512_slli_epi32(word, 16));
            _mm512_storeu_si512(out->words, word);
        }
    }
}

/* The words whose code is a subnormal or zero, exactly: m * 2^-9, from a table, with the scale's
 * exponent. */
static NOINLINE __m512i fp8_subnormals(__m512i w, __mmask32 which, __m512i codes,
                                       __m512i exponent) {
    const __m512i table = _mm512_castsi128_si512(
        _mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60)); /* as bf16 */
    __m512i m = _mm512_permutexvar_epi16(_mm512_and_si512(codes, _mm512_set1_epi16(7)), table);
    __m512i scaled = _mm512_sub_epi16(_mm512_add_epi16(m, exponent), _mm512_set1_epi16(120 * 128));
    scaled = _mm512_maskz_mov_epi16(_mm512_test_epi16_mask(m, m), scaled);
    __m512i sign = _mm512_and_si512(_mm512_slli_epi16(codes, 8), _mm512_set1_epi16((short)0x8000));
    return _mm512_mask_mov_epi16(w, which, _mm512_or_si512(scaled, sign));
}

/* bf16(f32(code * scale)) as an operand. */
INLINE operand decode_rounded(__m256i codes, __m512 scale) {
    const __m512 up = _mm512_castsi512_ps(_mm512_set1_epi32((127 + 120) << 23));
    __m512i odd, even;
    fp8_planes(codes, &odd, &even);
    odd = round_to_bf16(_mm512_mul_ps(_mm512_mul_ps(_mm512_castsi512_ps(odd), up), scale));
    even = round_to_bf16(_mm512_mul_ps(_mm512_mul_ps(_mm512_castsi512_ps(even), up), scale));
    return _mm512_or_si512(odd, _mm512_srli_epi32(even, 16));
}

/* Exponent and mantissa move into place together; codes with exponent 0 are rare and mended aside.
 */
INLINE operand decode_fp8(__m256i codes, __m512i exponent) {
    __m512i v = _mm512_cvtepu8_epi16(codes);
    __m512i u = _mm512_srai_epi16(_mm512_slli_epi16(v, 8), 4);
    u = _mm512_and_si512(u, _mm512_set1_epi16((short)0x87f0));
    __mmask32 subnormal = _mm512_testn_epi16_mask(u, _mm512_set1_epi16(0x0780));
    operand w = _mm512_add_epi16(u, exponent);
    if (__builtin_expect(subnormal != 0, 0))
        w = fp8_subnormals(w, subnormal, v, exponent);
    return w;
}

/*
 * Byte i holds element 2i in its low, 2i+1 in its high bits.  With the byte also shifted into the
 * upper word, the low 4 bits of each word are a code; vpermw looks at 5, so the table is there
 * twice.
 */
INLINE operand decode_fp4(const enum form form, __m128i codes, uint32_t exponent) {
    const __m512i half = _mm512_castsi256_si512(_mm256_setr_epi16(
        0, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, 0, (short)0xbf00, (short)0xbf80,
        (short)0xbfc0, (short)0xc000, (short)0xc040, (short)0xc080, (short)0xc0c0));
    __m512i table = _mm512_inserti64x4(half, _mm512_castsi512_si256(half), 1);
    if (form == FP4_FOLD)
        table = _mm512_maskz_add_epi16(0xfefefefeu, table, _mm512_set1_epi32((int)exponent));
    __m512i i = _mm512_cvtepu8_epi32(codes);
    return _mm512_permutexvar_epi16(_mm512_or_si512(i, _mm512_slli_epi32(i, 12)), table);
}

/* One step of one row: 32 weights at p; `step` counts from the start of the span. */
INLINE operand decode(const enum form form, const uint8_t *p, const struct row_scale *scale,
                      int step, int32_t n, const int masked, __m256i *seen) {
    if (is_fp8(form)) {
        __m256i codes = load_codes(p, n, masked);
        *seen = see_codes(*seen, codes);
        return form == FP8_ROUND ? decode_rounded(codes, _mm512_set1_ps(scale->block))
                                 : decode_fp8(codes, scale->exponent);
    }
    if (is_fp4(form))
        return decode_fp4(form, _mm_loadu_si128((const __m128i *)(const void *)p),
                          scale->words[step]);
    return flush_bf16(load_bf16(p, n, masked));
}

#define LINEAR_SET avx512bf16
#define F32_OPERANDS 0
#include "cpu/linear_entries.h"

LINEAR_WALK(rows4, 4, 0, 2048)
LINEAR_WALK(rows4_spaced, 4, 1, 2048)
LINEAR_WALK(rows4_far, 4, 0, 8192)
LINEAR_WALK(rows8, 8, 0, 2048)

const struct dsv4_variant dsv4k_avx512bf16_linear[] = {
    LINEAR_WALK_VARIANTS(rows4),
    LINEAR_WALK_VARIANTS(rows4_spaced),
    LINEAR_WALK_VARIANTS(rows4_far),
    LINEAR_WALK_VARIANTS(rows8),
    LINEAR_MANY_VARIANTS,
    {NULL, NULL, 0, 0},
};
