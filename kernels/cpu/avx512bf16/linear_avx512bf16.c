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

/* What decode_fp4 takes of each scale under FP4_FOLD: its byte in the exponent fields of two words.
 */
INLINE __m512i fold_fp4(__m512i bytes) {
    return _mm512_mullo_epi32(bytes, _mm512_set1_epi32(0x00800080));
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

/* The sixteen codes as bf16, twice: vpermw looks at 5 bits.  Under FP4_FOLD they take the scale's
 * exponent, so theirs lack its bias; the zeros stay. */
INLINE __m512i fp4_table(const enum form form, uint32_t exponent) {
    const __m512i half = _mm512_castsi256_si512(_mm256_setr_epi16(
        0, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, 0, (short)0xbf00, (short)0xbf80,
        (short)0xbfc0, (short)0xc000, (short)0xc040, (short)0xc080, (short)0xc0c0));
    const __m512i table = _mm512_inserti64x4(half, _mm512_castsi512_si256(half), 1);
    if (form != FP4_FOLD)
        return table;
    const __m512i unbiased = _mm512_sub_epi16(table, _mm512_set1_epi16(127 * 128));
    return _mm512_maskz_add_epi16(0xfefefefeu, unbiased, _mm512_set1_epi32((int)exponent));
}

/* Byte i holds element 2i in its low, 2i+1 in its high bits.  With the byte also shifted into the
 * upper word, by one multiplication, the low 4 bits of each word are a code. */
INLINE operand decode_fp4(const enum form form, __m128i codes, uint32_t exponent) {
    __m512i twice = _mm512_set1_epi32(0x1001);
    __asm__("" : "+v"(twice)); /* else gcc makes it a shift and an addition */
    __m512i i = _mm512_mullo_epi32(_mm512_cvtepu8_epi32(codes), twice);
    return _mm512_permutexvar_epi16(i, fp4_table(form, exponent));
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

/* A line takes x as bf16, for FP8 times the scales. */
INLINE int pack_fp8(uint8_t *out, const dsv4_bf16 *x, int32_t cols, const uint8_t *scales) {
    const __m512i infinity = _mm512_set1_epi16(0x7f80);
    __mmask32 bad = 0;
    for (int32_t k = 0; k < packed_columns(cols); k += STEP) {
        const int byte = k < cols ? scales[k / DSV4_FP8_BLOCK] : 127;
        const __m512i up = _mm512_set1_epi16((short)((byte - 127) * 128));
        __m512i v = load_padded(x, k, cols);
        __m512i size = _mm512_and_si512(v, _mm512_set1_epi16(0x7fff));
        __mmask32 some = _mm512_test_epi16_mask(size, size); /* zeros stay, whatever the scale */
        bad |= _mm512_cmpge_epu16_mask(size, infinity) |
               _mm512_mask_cmpge_epu16_mask(some, _mm512_add_epi16(size, up), infinity);
        _mm512_store_si512(out + 2 * k, _mm512_mask_add_epi16(v, some, v, up));
    }
    return !bad;
}

INLINE void pack_fp4(uint8_t *out, const dsv4_bf16 *x, int32_t cols) {
    for (int32_t k = 0; k < packed_columns(cols); k += STEP)
        _mm512_store_si512(out + 2 * k, load_padded(x, k, cols));
}

/*
 * Two blocks of a line as codes: one byte permutation puts byte i of the first block into the lower
 * bytes of both words of lane i, that of the second into the upper ones, and the odd words go down
 * by 4.  The low 4 bits of a word are then a code of the first block; 8 bits up, of the second.
 */
INLINE __m512i fp4_two_blocks(const uint8_t *line, int first) {
    const __m512i even =
        _mm512_cvtepu8_epi32(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    const __m512i both = _mm512_or_si512(even, _mm512_slli_epi32(even, 16));
    const __m512i from = _mm512_add_epi8(_mm512_or_si512(both, _mm512_slli_epi32(both, 8)),
                                         _mm512_set1_epi16((short)(first * 0x1010 + 0x1000)));
    __m512i bytes = _mm512_permutexvar_epi8(from, _mm512_loadu_si512(line));
    return _mm512_srlv_epi16(bytes, _mm512_set1_epi32(4 << 16));
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

/* The 128 magnitudes of e4m3 as bf16, subnormals and NaN as they are: lower bytes, upper bytes. */
#define FP8_SUBNORMAL(m) ((m) < 4 ? 0x3a80 + (m) * 0x80 - ((m) == 3) * 0x40 : 0x3b80 + (m) * 0x20)
#define FP8_MAGNITUDE(m)                                                                           \
    ((m) == 0 ? 0 : (m) < 8 ? FP8_SUBNORMAL(m) : (m) == 127 ? 0x7fc0 : ((m) << 4) + 120 * 128)
#define FP8_LOWER(m) FP8_MAGNITUDE(m) & 0xff
#define FP8_UPPER(m) FP8_MAGNITUDE(m) >> 8
#define FP8_EIGHT(X, m)                                                                            \
    X(m), X((m) + 1), X((m) + 2), X((m) + 3), X((m) + 4), X((m) + 5), X((m) + 6), X((m) + 7)
#define FP8_HALF(X, m)                                                                             \
    FP8_EIGHT(X, m), FP8_EIGHT(X, (m) + 8), FP8_EIGHT(X, (m) + 16), FP8_EIGHT(X, (m) + 24),        \
        FP8_EIGHT(X, (m) + 32), FP8_EIGHT(X, (m) + 40), FP8_EIGHT(X, (m) + 48),                    \
        FP8_EIGHT(X, (m) + 56)
static const _Alignas(64) uint8_t fp8_bytes[2][128] = {
    {FP8_HALF(FP8_LOWER, 0), FP8_HALF(FP8_LOWER, 64)},
    {FP8_HALF(FP8_UPPER, 0), FP8_HALF(FP8_UPPER, 64)}};

/* Bits 0-6 of each code choose a byte. */
INLINE __m512i fp8_lookup(const uint8_t table[128], __m512i codes) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), codes, _mm512_load_si512(table + 64));
}

/* The two steps of a line: each quarter of the register takes eight codes of both, which the bytes'
 * meeting parts again. */
INLINE void line_decode_fp8(operand w[2], const uint8_t *line) {
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    __m512i codes = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(line));
    __m512i lower = fp8_lookup(fp8_bytes[0], codes), upper = fp8_lookup(fp8_bytes[1], codes);
    upper = _mm512_ternarylogic_epi32(upper, codes, sign, 0xf8); /* upper | codes & sign */
    w[0] = _mm512_unpacklo_epi8(lower, upper);
    w[1] = _mm512_unpackhi_epi8(lower, upper);
}

INLINE void line_fp8(struct lines *s, size_t at, const int R, const int T) {
    operand w[2][MAX_ROWS];
    EACH (r, R) {
        operand two[2];
        line_decode_fp8(two, s->w[r] + at);
        w[0][r] = two[0];
        w[1][r] = two[1];
    }
    EACH (half, 2)
        line_products(s, w[half], 2 * (at + (size_t)half * STEP), R, T);
}

INLINE void line_fp4(struct lines *s, size_t at, const int R, const int T) {
    line_scales(s, at, R);
    EACH (pair, LINE_BLOCKS / 2) {
        __m512i codes[MAX_ROWS];
        EACH (r, R)
            codes[r] = fp4_two_blocks(s->w[r] + at, 2 * pair);
        EACH (i, 2) {
            const size_t b = 2 * (size_t)pair + (size_t)i;
            operand w[MAX_ROWS];
            EACH (r, R) {
                const uint32_t exponent = s->words[r][at / FP4_BLOCK_BYTES % SPAN_STEPS + b];
                w[r] = _mm512_permutexvar_epi16(i ? _mm512_srli_epi16(codes[r], 8) : codes[r],
                                                fp4_table(FP4_FOLD, exponent));
            }
            line_products(s, w, 4 * (at + b * FP4_BLOCK_BYTES), R, T);
        }
    }
}

enum { LINE_TOKENS_FP8 = 5, LINE_TOKENS_FP4 = 6 };
#define LINEAR_SET avx512bf16
#define F32_OPERANDS 0
#include "cpu/linear_entries.h"

LINEAR_WALK(rows4, 4, 0, 2048)
LINEAR_WALK(rows4_far, 4, 0, 8192)
LINEAR_WALK(rows4_spaced, 4, 1, 2048)

const struct dsv4_variant dsv4k_avx512bf16_linear[] = {
    LINEAR_WALK_VARIANTS(rows4),
    LINEAR_WALK_VARIANTS(rows4_far),
    LINEAR_WALK_VARIANTS(rows4_spaced),
    LINEAR_MANY_VARIANTS,
    {NULL, NULL, 0, 0},
};
