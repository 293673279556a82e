/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Linear layers with vdpbf16ps, which is one step of rule 1: a register of 32 bf16 weights, one of
 * 32 bf16 x. Contract: kernels.h; loops: linear_few.h, linear_many.h.  f32 weights have no bf16
 * form and stay with avx512.
 */
#include "cpu/avx512/linear_decode_avx512.h"

enum { TILE_ROWS = 4, TILE_TOKENS = 5, OPERAND_BYTES = 64 };

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
                          const dsv4_bf16 *const *x, int32_t k, int32_t n, const int masked,
                          const int T) {
    operand v[TILE_TOKENS];
    EACH (t, T)
        v[t] = load_bf16(x[t] + k, n, masked);
    EACH (r, TILE_ROWS) {
        operand w = _mm512_load_si512(panel + r * OPERAND_BYTES);
        EACH (t, T)
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

/* What decode_fp4 takes of each scale under FP4_FOLD. */
INLINE __m512i fold_fp4(__m512i bytes) {
    __m512i word = _mm512_slli_epi32(_mm512_sub_epi32(bytes, _mm512_set1_epi32(127)), 7);
    return _mm512_mask_blend_epi16(0xaaaaaaaau, word, _mm512_slli_epi32(word, 16));
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
        if (form == FP4_BLOCK)
            _mm512_storeu_ps(out->each, e8m0_values(wide));
        else
            _mm512_storeu_si512(out->words, fold_fp4(wide));
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
 * upper word, by one multiplication, the low 4 bits of each word are a code; vpermw looks at 5, so
 * the table is there twice.
 */
INLINE operand decode_fp4(const enum form form, __m128i codes, uint32_t exponent) {
    const __m512i half = _mm512_castsi256_si512(_mm256_setr_epi16(
        0, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, 0, (short)0xbf00, (short)0xbf80,
        (short)0xbfc0, (short)0xc000, (short)0xc040, (short)0xc080, (short)0xc0c0));
    __m512i table = _mm512_inserti64x4(half, _mm512_castsi512_si256(half), 1);
    if (form == FP4_FOLD)
        table = _mm512_maskz_add_epi16(0xfefefefeu, table, _mm512_set1_epi32((int)exponent));
    __m512i twice = _mm512_set1_epi32(0x1001);
    __asm__("" : "+v"(twice)); /* else gcc makes it a shift and an addition */
    __m512i i = _mm512_mullo_epi32(_mm512_cvtepu8_epi32(codes), twice);
    return _mm512_permutexvar_epi16(i, table);
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

#include "cpu/avx512/linear_lines_avx512.h"

/*
 * A line takes x as bf16.  For FP8 the first half of a packed input is times the scales and 2^120,
 * the second half as it is, for the codes whose value times 2^-120 is subnormal: vdpbf16ps takes
 * those as zero.
 */
INLINE int pack_fp8(uint8_t *out, const dsv4_bf16 *x, int32_t cols, const uint8_t *scales) {
    uint8_t *plain = out + packed_bytes(cols) / 2;
    __mmask32 bad = 0;
    for (int32_t k = 0; k < packed_columns(cols); k += STEP) {
        const int byte = k < cols ? scales[k / DSV4_FP8_BLOCK] : 127;
        const __m512i up = rebase(byte), limit = _mm512_sub_epi16(_mm512_set1_epi16(0x7f80), up);
        __m512i v = load_padded(x, k, cols);
        __m512i size = _mm512_and_si512(v, _mm512_set1_epi16(0x7fff));
        bad |= _mm512_cmpge_epu16_mask(size, limit) | (__mmask32)(byte > FOLD_ONCE_MAX);
        _mm512_store_si512(out + 2 * k,
                           _mm512_mask_add_epi16(v, _mm512_test_epi16_mask(size, size), v, up));
        _mm512_store_si512(plain + 2 * k, v);
    }
    return !bad;
}

INLINE void pack_fp4(uint8_t *out, const dsv4_bf16 *x, int32_t cols) {
    for (int32_t k = 0; k < packed_columns(cols); k += STEP)
        _mm512_store_si512(out + 2 * k, load_padded(x, k, cols));
}

/* One step of R rows; x lies `x` bytes from the packed inputs' start. */
INLINE void line_products(struct lines *s, const operand w[MAX_ROWS], size_t x, const int R,
                          const int T) {
    EACH (t, T) {
        operand v = _mm512_load_si512(s->x + (size_t)t * s->packed + x);
        EACH (r, R)
            s->acc[r][t][0] = multiply_add(s->acc[r][t][0], w[r], v);
    }
}

INLINE void line_fp8(struct lines *s, size_t at, const int R, const int T) {
    __m512i least = _mm512_set1_epi8((char)0xff);
    EACH (r, R) {
        __m512i v = _mm512_loadu_si512(s->w[r] + at), twice = _mm512_add_epi8(v, v);
        s->seen[r] = _mm512_max_epu8(s->seen[r], twice);
        least = _mm512_min_epu8(least, twice);
    }
    const int small = _mm512_cmplt_epu8_mask(least, _mm512_set1_epi8(16)) != 0;
    operand w[MAX_ROWS];
    EACH (half, 2) {
        const size_t k = at + (size_t)half * STEP;
        if (__builtin_expect(!small, 1)) {
            EACH (r, R)
                w[r] = fp8_words(s->w[r] + k);
            line_products(s, w, 2 * k, R, T);
        } else {
            const __m512i exponent = rebase(s->scale[0][at / DSV4_FP8_BLOCK]);
            EACH (r, R)
                w[r] = decode_fp8(load_codes(s->w[r] + k, STEP, 0), exponent);
            line_products(s, w, s->packed / 2 + 2 * k, R, T);
        }
    }
}

INLINE void line_fp4(struct lines *s, size_t at, const int R, const int T) {
    line_scales(s, at, R);
    EACH (b, LINE_BLOCKS) {
        const size_t here = at + (size_t)b * FP4_BLOCK_BYTES;
        operand w[MAX_ROWS];
        EACH (r, R)
            w[r] = decode_fp4(FP4_FOLD, line_block(s, r, here),
                              s->words[r][at / FP4_BLOCK_BYTES % SPAN_STEPS + (size_t)b]);
        line_products(s, w, 4 * here, R, T);
    }
}

#define LINEAR_SET avx512bf16
#define F32_OPERANDS 0
#include "cpu/linear_entries.h"

LINEAR_WALK(rows4, 4, 0, 2048)
LINEAR_WALK(rows4_spaced, 4, 1, 2048)
LINEAR_WALK(rows4_far, 4, 0, 8192)
LINEAR_WALK(rows8_spaced, 8, 1, 2048)

const struct dsv4_variant dsv4k_avx512bf16_linear[] = {
    LINEAR_WALK_VARIANTS(rows4),
    LINEAR_WALK_VARIANTS(rows4_spaced),
    LINEAR_WALK_VARIANTS(rows4_far),
    LINEAR_WALK_VARIANTS(rows8_spaced),
    LINEAR_MANY_VARIANTS,
    {NULL, NULL, 0, 0},
};
