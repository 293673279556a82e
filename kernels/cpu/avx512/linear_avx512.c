/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Linear layers with f32 multiply-adds on 16 lanes: the operands of a step are two registers, the
 * odd and the even elements.  Contract: kernels.h; loops: linear_few.h, linear_many.h.
 */
#include "cpu/avx512/linear_decode_avx512.h"

enum { TILE_ROWS = 4, TILE_TOKENS = 5, OPERAND_BYTES = 128 };

typedef struct {
    __m512 odd, even;
} operand;

INLINE __m512 odd_elements(__m512i bf16) {
    return _mm512_castsi512_ps(_mm512_and_si512(bf16, _mm512_set1_epi32((int)0xffff0000)));
}

INLINE __m512 even_elements(__m512i bf16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(bf16, 16));
}

INLINE operand expand(__m512i bf16) {
    return (operand){odd_elements(bf16), even_elements(bf16)};
}

INLINE operand load_operand(const dsv4_bf16 *x, int32_t n, const int masked) {
    return expand(load_bf16(x, n, masked));
}

INLINE __m512 multiply_add(__m512 acc, operand w, operand x) {
    return _mm512_fmadd_ps(w.even, x.even, _mm512_fmadd_ps(w.odd, x.odd, acc));
}

INLINE void operand_store(uint8_t *p, operand w) {
    _mm512_store_ps(p, w.odd);
    _mm512_store_ps(p + 64, w.even);
}

/* All odd products first: half the registers for x.  With 24 sums the compiler would keep one in
 * memory. */
INLINE void multiply_tile(__m512 acc[TILE_ROWS][TILE_TOKENS], const uint8_t *panel,
                          const dsv4_bf16 *const *x, int32_t k, int32_t n, const int masked,
                          const int T) {
    __m512 v[TILE_TOKENS];
    EACH (t, T)
        v[t] = odd_elements(load_bf16(x[t] + k, n, masked));
    EACH (r, TILE_ROWS) {
        __m512 w = _mm512_load_ps(panel + r * OPERAND_BYTES);
        EACH (t, T)
            acc[r][t] = _mm512_fmadd_ps(w, v[t], acc[r][t]);
    }
    EACH (t, T)
        v[t] = even_elements(load_bf16(x[t] + k, n, masked));
    EACH (r, TILE_ROWS) {
        __m512 w = _mm512_load_ps(panel + r * OPERAND_BYTES + 64);
        EACH (t, T)
            acc[r][t] = _mm512_fmadd_ps(w, v[t], acc[r][t]);
    }
}

/* Scales of one row for one span of columns. */
struct row_scale {
    __m512 first;           /* FP8: the first factor of a code times 2^-120 */
    float block;            /* FP8: the scale as it is (rule 3 and the two-factor forms) */
    float each[SPAN_STEPS]; /* FP4: of each step */
};

INLINE void prepare_scale(const enum form form, const struct dsv4_weight *w, size_t scales,
                          int32_t k, int32_t n, struct row_scale *out) {
    const __m512 rebase = _mm512_castsi512_ps(_mm512_set1_epi32((127 + 120) << 23));
    if (form == FP8_FOLD) {
        uint32_t byte = ((const uint8_t *)w->scale)[scales + (size_t)(k / SPAN_FP8)];
        out->first = _mm512_castsi512_ps(_mm512_set1_epi32((int)((byte + 120) << 23)));
    } else if (is_fp8(form)) {
        out->first = rebase;
        out->block = read_scale(w, scales + (size_t)(k / SPAN_FP8));
    } else if (is_fp4(form)) {
        const uint8_t *bytes = (const uint8_t *)w->scale + scales + k / DSV4_FP4_BLOCK;
        _mm512_storeu_ps(out->each, e8m0_values(fp4_scale_bytes(bytes, n)));
    }
}

INLINE operand decode_fp8(const enum form form, __m256i codes, const struct row_scale *scale) {
    __m512i odd, even;
    fp8_planes(codes, &odd, &even);
    operand w = {_mm512_mul_ps(_mm512_castsi512_ps(odd), scale->first),
                 _mm512_mul_ps(_mm512_castsi512_ps(even), scale->first)};
    if (form == FP8_WIDE || form == FP8_ROUND) {
        w.odd = _mm512_mul_ps(w.odd, _mm512_set1_ps(scale->block));
        w.even = _mm512_mul_ps(w.even, _mm512_set1_ps(scale->block));
    }
    if (form == FP8_ROUND) {
        w.odd = _mm512_castsi512_ps(round_to_bf16(w.odd));
        w.even = _mm512_castsi512_ps(round_to_bf16(w.even));
    }
    return w;
}

/* Byte i holds element 2i in its low, 2i+1 in its high bits: a table of 16 values, scaled, gives
 * both. */
INLINE operand decode_fp4(const enum form form, __m128i codes, float scale) {
    __m512 table =
        _mm512_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6);
    if (form == FP4_FOLD)
        table = _mm512_mul_ps(table, _mm512_set1_ps(scale));
    __m512i i = _mm512_cvtepu8_epi32(codes);
    return (operand){_mm512_permutexvar_ps(_mm512_srli_epi32(i, 4), table),
                     _mm512_permutexvar_ps(i, table)};
}

INLINE operand decode_f32(const uint8_t *p, int32_t n, const int masked) {
    const __m512i evens =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
    __m512i low =
        masked ? _mm512_maskz_loadu_epi32((__mmask16)step_mask(n), p) : _mm512_loadu_si512(p);
    __m512i high = masked ? _mm512_maskz_loadu_epi32((__mmask16)(step_mask(n) >> 16), p + 64)
                          : _mm512_loadu_si512(p + 64);
    return (operand){_mm512_castsi512_ps(flush_f32(_mm512_permutex2var_epi32(low, odds, high))),
                     _mm512_castsi512_ps(flush_f32(_mm512_permutex2var_epi32(low, evens, high)))};
}

/* One step of one row: 32 weights at p; `step` counts from the start of the span. */
INLINE operand decode(const enum form form, const uint8_t *p, const struct row_scale *scale,
                      int step, int32_t n, const int masked, __m256i *seen) {
    if (is_fp8(form)) {
        __m256i codes = load_codes(p, n, masked);
        *seen = see_codes(*seen, codes);
        return decode_fp8(form, codes, scale);
    }
    if (is_fp4(form))
        return decode_fp4(form, _mm_loadu_si128((const __m128i *)(const void *)p),
                          scale->each[step]);
    if (form == BF16_PLAIN)
        return expand(flush_bf16(load_bf16(p, n, masked)));
    return decode_f32(p, n, masked);
}

/* What decode_fp4 takes of each scale under FP4_FOLD. */
INLINE __m512i fold_fp4(__m512i bytes) {
    return _mm512_slli_epi32(bytes, 23);
}

#include "cpu/avx512/linear_lines_avx512.h"

/* A line takes x as f32, 16 odd and 16 even elements of each step. */
INLINE void store_planes(uint8_t *out, int32_t k, operand x) {
    _mm512_store_ps(out + 4 * (size_t)k, x.odd);
    _mm512_store_ps(out + 4 * (size_t)k + 64, x.even);
}

INLINE int pack_fp8(uint8_t *out, const dsv4_bf16 *x, int32_t cols, const uint8_t *scales) {
    enum { NOT_FINITE = 0x99 };
    __mmask16 bad = 0;
    for (int32_t k = 0; k < packed_columns(cols); k += STEP) {
        const uint32_t byte = k < cols ? scales[k / DSV4_FP8_BLOCK] : 0;
        const __m512 scale = _mm512_castsi512_ps(_mm512_set1_epi32((int)((byte + 120) << 23)));
        operand v = expand(load_padded(x, k, cols));
        v.odd = _mm512_mul_ps(v.odd, scale);
        v.even = _mm512_mul_ps(v.even, scale);
        bad |= _mm512_fpclass_ps_mask(v.odd, NOT_FINITE) |
               _mm512_fpclass_ps_mask(v.even, NOT_FINITE) | (__mmask16)(byte > FOLD_ONCE_MAX);
        store_planes(out, k, v);
    }
    return !bad;
}

INLINE void pack_fp4(uint8_t *out, const dsv4_bf16 *x, int32_t cols) {
    for (int32_t k = 0; k < packed_columns(cols); k += STEP)
        store_planes(out, k, expand(load_padded(x, k, cols)));
}

INLINE void line_products(struct lines *s, int r, operand w, size_t k, const int T) {
    EACH (t, T) {
        const uint8_t *x = s->x + (size_t)t * s->packed + 4 * k;
        s->acc[r][t][0] =
            multiply_add(s->acc[r][t][0], w, (operand){_mm512_load_ps(x), _mm512_load_ps(x + 64)});
    }
}

INLINE void line_fp8(struct lines *s, size_t at, const int R, const int T) {
    EACH (r, R) {
        const uint8_t *codes = s->w[r] + at;
        __m512i v = _mm512_loadu_si512(codes);
        s->seen[r] = _mm512_max_epu8(s->seen[r], _mm512_add_epi8(v, v));
        EACH (half, 2)
            line_products(s, r, expand(fp8_words(codes + half * STEP)), at + half * STEP, T);
    }
}

INLINE void line_fp4(struct lines *s, size_t at, const int R, const int T) {
    line_scales(s, at, R);
    EACH (b, LINE_BLOCKS)
        EACH (r, R) {
            const size_t here = at + (size_t)b * FP4_BLOCK_BYTES;
            const float scale = s->each[r][at / FP4_BLOCK_BYTES % SPAN_STEPS + (size_t)b];
            line_products(s, r, decode_fp4(FP4_FOLD, line_block(s, r, here), scale), 2 * here, T);
        }
}

enum { LINE_TOKENS_FP8 = 4, LINE_TOKENS_FP4 = 4 };
#define LINEAR_SET avx512
#define F32_OPERANDS 1
#include "cpu/linear_entries.h"

LINEAR_WALK(rows4, 4, 0, 2048)
LINEAR_WALK(rows4_far, 4, 0, 8192)
LINEAR_WALK(rows4_spaced, 4, 1, 2048)

static void dsv4k_linear_few_f32_avx512(const struct dsv4_linear_args *a) {
    assert(a->w->format == DSV4_W_F32);
    few_steps(a, F32_PLAIN);
}

static void dsv4k_linear_many_f32_avx512(const struct dsv4_linear_args *a) {
    assert(a->w->format == DSV4_W_F32);
    many(a, F32_PLAIN);
}

const struct dsv4_variant dsv4k_avx512_linear[] = {
    LINEAR_WALK_VARIANTS(rows4),
    LINEAR_WALK_VARIANTS(rows4_far),
    LINEAR_WALK_VARIANTS(rows4_spaced),
    LINEAR_MANY_VARIANTS,
    DSV4_VARIANT(linear_few_f32, dsv4k_linear_few_f32_avx512, "avx512", 0),
    DSV4_VARIANT(linear_many_f32, dsv4k_linear_many_f32_avx512, "avx512", 0),
    {NULL, NULL, 0, 0},
};
