/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Linear layers with AVX2: the 16 lanes of a sum are two registers, lanes 0-7 and 8-15, which never
 * meet before the tree.  A unit is 16 columns: 8 odd and 8 even elements.  Contract: kernels.h;
 * loops: linear_few.h, linear_many.h.
 */
#include <immintrin.h>

#include "cpu/linear_forms.h"

enum { UNITS = 2, MAX_ROWS = 4, GROUP_TOKENS = 4, GROUP_ROWS = 1, BLOCK_ROWS = 1 };
enum { LINE_ROWS_FP8 = 1, LINE_TOKENS_FP8 = 4 };
enum { LINE_ROWS_FP4 = 2, LINE_TOKENS_FP4 = 2 };
enum { FEW_FP8 = 0, FEW_FP4 = 0, FEW_BF16 = 0 };
enum { TILE_ROWS = 2, TILE_TOKENS = 5, OPERAND_BYTES = 64 };

typedef __m256 lanes;

INLINE lanes lanes_zero(void) {
    return _mm256_setzero_ps();
}

INLINE lanes lanes_set1(float v) {
    return _mm256_set1_ps(v);
}

INLINE lanes lanes_fma(lanes a, lanes b, lanes c) {
    return _mm256_fmadd_ps(a, b, c);
}

typedef struct {
    __m256 odd, even;
} operand;

/* 16 bf16, or n and +0. */
INLINE __m256i load_bf16(const void *p, int32_t n, const int masked) {
    dsv4_bf16 part[16] = {0};
    if (masked)
        memcpy(part, p, 2 * (size_t)n);
    return _mm256_loadu_si256((const __m256i *)(masked ? part : p));
}

INLINE __m256 odd_elements(__m256i bf16) {
    return _mm256_castsi256_ps(_mm256_and_si256(bf16, _mm256_set1_epi32((int)0xffff0000)));
}

INLINE __m256 even_elements(__m256i bf16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(bf16, 16));
}

INLINE operand expand(__m256i bf16) {
    return (operand){odd_elements(bf16), even_elements(bf16)};
}

INLINE operand load_operand(const dsv4_bf16 *x, int32_t n, const int masked) {
    return expand(load_bf16(x, n, masked));
}

INLINE __m256 multiply_add(__m256 acc, operand w, operand x) {
    return _mm256_fmadd_ps(w.even, x.even, _mm256_fmadd_ps(w.odd, x.odd, acc));
}

INLINE void operand_store(uint8_t *p, operand w) {
    _mm256_store_ps((float *)(void *)p, w.odd);
    _mm256_store_ps((float *)(void *)(p + 32), w.even);
}

/* All odd products, or all even ones: 10 sums, 2 weights and one x leave registers free, without
 * which the compiler keeps sums in memory. */
INLINE void multiply_half(__m256 acc[TILE_ROWS][TILE_TOKENS], const float *panel,
                          const dsv4_bf16 *const *x, int32_t k, int32_t n, const int masked,
                          const int T, const int odd) {
    __m256 w[TILE_ROWS];
    EACH (r, TILE_ROWS)
        w[r] = _mm256_load_ps(panel + r * OPERAND_BYTES / 4 + (odd ? 0 : 8));
    EACH (t, T) {
        __m256i pairs = load_bf16(x[t] + k, n, masked);
        __m256 v = odd ? odd_elements(pairs) : even_elements(pairs);
        EACH (r, TILE_ROWS)
            acc[r][t] = _mm256_fmadd_ps(w[r], v, acc[r][t]);
    }
}

INLINE void multiply_tile(__m256 acc[TILE_ROWS][TILE_TOKENS], const uint8_t *panel,
                          const dsv4_bf16 *const *x, int32_t k, int32_t n, const int masked,
                          const int T) {
    const float *w = (const float *)(const void *)panel;
    multiply_half(acc, w, x, k, n, masked, T, 1);
    __asm__ volatile("" ::: "memory"); /* x is loaded again, not kept in registers sums need */
    multiply_half(acc, w, x, k, n, masked, T, 0);
}

/* Rule 2 for weights as stored: magnitudes below 2^-55 become +0. */
INLINE __m256i flush_bf16(__m256i w) {
    __m256i size = _mm256_and_si256(w, _mm256_set1_epi16(0x7fff));
    return _mm256_and_si256(w, _mm256_cmpgt_epi16(size, _mm256_set1_epi16(DSV4_TINY_BF16 - 1)));
}

INLINE __m256 flush_f32(__m256i w) {
    __m256i size = _mm256_and_si256(w, _mm256_set1_epi32(0x7fffffff));
    __m256i keep = _mm256_cmpgt_epi32(size, _mm256_set1_epi32(DSV4_TINY_F32 - 1));
    return _mm256_castsi256_ps(_mm256_and_si256(w, keep));
}

/* bf16 values of f32 (DSV4_SCALE_ROUND), as operands. */
INLINE __m256 round_to_bf16(__m256 v) {
    __m256i u = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
    r = _mm256_castps_si256(
        _mm256_blendv_ps(_mm256_castsi256_ps(r), nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
    return flush_f32(_mm256_and_si256(r, _mm256_set1_epi32((int)0xffff0000)));
}

/* Largest doubled code so far: 0xfe once a NaN (0x7f or 0xff) was among them. */
typedef __m128i seen_codes;

INLINE seen_codes seen_zero(void) {
    return _mm_setzero_si128();
}

INLINE int seen_nan(seen_codes seen) {
    return _mm_movemask_epi8(_mm_cmpeq_epi8(seen, _mm_set1_epi8((char)0xfe))) != 0;
}

/* Scales of one row for one span of columns. */
struct row_scale {
    float first;            /* FP8: the first factor of a code times 2^-120 */
    float block;            /* FP8: the scale as it is (rule 3 and the two-factor forms) */
    float each[SPAN_STEPS]; /* FP4: of each step */
};

INLINE void prepare_scale(const enum form form, const struct dsv4_weight *w, size_t scales,
                          int32_t k, int32_t n, struct row_scale *out) {
    if (form == FP8_FOLD) {
        uint32_t byte = ((const uint8_t *)w->scale)[scales + (size_t)(k / SPAN_FP8)];
        out->first = dsv4_f32_from_bits((byte + 120) << 23);
    } else if (is_fp8(form)) {
        out->first = 0x1p120f;
        out->block = read_scale(w, scales + (size_t)(k / SPAN_FP8));
    } else if (is_fp4(form)) {
        const uint8_t *bytes = (const uint8_t *)w->scale + scales + k / DSV4_FP4_BLOCK;
        for (int32_t i = 0; i < n / DSV4_FP4_BLOCK; i++)
            out->each[i] = dsv4_e8m0_to_f32(bytes[i]);
    }
}

/* The code's exponent field is put where the float's is: its value times 2^-120, subnormals too.
 * NaN codes come out as 480; rows that hold one are found by `seen_nan`. */
INLINE operand decode_fp8(const enum form form, __m128i codes, const struct row_scale *scale) {
    const __m256i keep = _mm256_set1_epi32((int)0x87f00000);
    __m256i pair = _mm256_cvtepi16_epi32(codes);
    __m256i odd = _mm256_and_si256(_mm256_slli_epi32(pair, 12), keep);
    __m256i even = _mm256_and_si256(_mm256_srai_epi32(_mm256_slli_epi32(pair, 24), 4), keep);
    __m256 first = _mm256_set1_ps(scale->first), block = _mm256_set1_ps(scale->block);
    operand w = {_mm256_mul_ps(_mm256_castsi256_ps(odd), first),
                 _mm256_mul_ps(_mm256_castsi256_ps(even), first)};
    if (form == FP8_WIDE || form == FP8_ROUND) {
        w.odd = _mm256_mul_ps(w.odd, block);
        w.even = _mm256_mul_ps(w.even, block);
    }
    if (form == FP8_ROUND) {
        w.odd = round_to_bf16(w.odd);
        w.even = round_to_bf16(w.even);
    }
    return w;
}

/* Byte i holds element 2i in its low, 2i+1 in its high bits; a table of 8 values, scaled, gives the
 * magnitude, the code's upper bit the sign. */
INLINE operand decode_fp4(const enum form form, __m128i codes, float scale) {
    const __m256i sign = _mm256_set1_epi32((int)0x80000000);
    __m256 table = _mm256_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6);
    if (form == FP4_FOLD)
        table = _mm256_mul_ps(table, _mm256_set1_ps(scale));
    __m256i i = _mm256_cvtepi8_epi32(codes); /* the odd element's sign is now the upper bit */
    __m256i odd_sign = _mm256_and_si256(i, sign);
    __m256i even_sign = _mm256_and_si256(_mm256_slli_epi32(i, 28), sign);
    return (operand){
        _mm256_xor_ps(_mm256_permutevar8x32_ps(table, _mm256_srli_epi32(i, 4)),
                      _mm256_castsi256_ps(odd_sign)),
        _mm256_xor_ps(_mm256_permutevar8x32_ps(table, i), _mm256_castsi256_ps(even_sign))};
}

INLINE operand decode_f32(const uint8_t *p, int32_t n, const int masked) {
    float part[16] = {0};
    if (masked)
        memcpy(part, p, 4 * (size_t)n);
    const float *v = masked ? part : (const float *)(const void *)p;
    __m256 low = _mm256_loadu_ps(v), high = _mm256_loadu_ps(v + 8);
    __m256i odd = _mm256_castps_si256(_mm256_shuffle_ps(low, high, 0xdd));
    __m256i even = _mm256_castps_si256(_mm256_shuffle_ps(low, high, 0x88));
    return (operand){flush_f32(_mm256_permute4x64_epi64(odd, 0xd8)),
                     flush_f32(_mm256_permute4x64_epi64(even, 0xd8))};
}

/* One unit of one row: 16 weights at p; `step` counts from the start of the span. */
INLINE operand decode(const enum form form, const uint8_t *p, const struct row_scale *scale,
                      int step, int32_t n, const int masked, seen_codes *seen) {
    if (is_fp8(form)) {
        uint8_t part[16] = {0};
        if (masked)
            memcpy(part, p, (size_t)n);
        __m128i codes = _mm_loadu_si128((const __m128i *)(const void *)(masked ? part : p));
        *seen = _mm_max_epu8(*seen, _mm_add_epi8(codes, codes));
        return decode_fp8(form, codes, scale);
    }
    if (is_fp4(form))
        return decode_fp4(form, _mm_loadl_epi64((const __m128i *)(const void *)p),
                          scale->each[step]);
    if (form == BF16_PLAIN)
        return expand(flush_bf16(load_bf16(p, n, masked)));
    return decode_f32(p, n, masked);
}

/* The tree of rule 1 for four sums. */
INLINE void sum4(float sums[4], const lanes *a, const lanes *b, const lanes *c, const lanes *d) {
    __m256 a8 = _mm256_add_ps(a[0], a[1]), b8 = _mm256_add_ps(b[0], b[1]);
    __m256 c8 = _mm256_add_ps(c[0], c[1]), d8 = _mm256_add_ps(d[0], d[1]);
    __m256 ab =
        _mm256_add_ps(_mm256_permute2f128_ps(a8, b8, 0x20), _mm256_permute2f128_ps(a8, b8, 0x31));
    __m256 cd =
        _mm256_add_ps(_mm256_permute2f128_ps(c8, d8, 0x20), _mm256_permute2f128_ps(c8, d8, 0x31));
    ab = _mm256_add_ps(ab, _mm256_permute_ps(ab, 0x4e));
    cd = _mm256_add_ps(cd, _mm256_permute_ps(cd, 0x4e));
    ab = _mm256_add_ps(ab, _mm256_permute_ps(ab, 0xb1));
    cd = _mm256_add_ps(cd, _mm256_permute_ps(cd, 0xb1));
    sums[0] = _mm256_cvtss_f32(ab);
    sums[1] = _mm_cvtss_f32(_mm256_extractf128_ps(ab, 1));
    sums[2] = _mm256_cvtss_f32(cd);
    sums[3] = _mm_cvtss_f32(_mm256_extractf128_ps(cd, 1));
}

/* The same for 4 rows of 2 tokens, [token][row]. */
enum { SUM_TOKENS = 2 };

INLINE void sums_of_tile(float *sums, lanes v[SUM_TOKENS][4][UNITS]) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256 s[SUM_TOKENS];
    EACH (t, SUM_TOKENS) {
        __m256 w[4];
        EACH (r, 4)
            w[r] = _mm256_add_ps(v[t][r][0], v[t][r][1]);
        __m256 ab = _mm256_add_ps(_mm256_permute2f128_ps(w[0], w[1], 0x20),
                                  _mm256_permute2f128_ps(w[0], w[1], 0x31));
        __m256 cd = _mm256_add_ps(_mm256_permute2f128_ps(w[2], w[3], 0x20),
                                  _mm256_permute2f128_ps(w[2], w[3], 0x31));
        s[t] = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    }
    __m256 all =
        _mm256_add_ps(_mm256_shuffle_ps(s[0], s[1], 0x88), _mm256_shuffle_ps(s[0], s[1], 0xdd));
    _mm256_store_ps(sums, _mm256_permutevar8x32_ps(all, order));
}

#include "cpu/avx2/linear_lines_avx2.h"

#define LINEAR_SET avx2
#define F32_OPERANDS 1
#include "cpu/linear_entries.h"

LINEAR_WALK(rows2, 2, 0, 2048)
LINEAR_WALK(rows4, 4, 0, 2048)
LINEAR_WALK(rows4_far, 4, 0, 8192)
LINEAR_WALK(rows4_spaced, 4, 1, 2048)

static void dsv4k_linear_few_f32_avx2(const struct dsv4_linear_args *a) {
    assert(a->w->format == DSV4_W_F32);
    few_steps(a, F32_PLAIN);
}

static void dsv4k_linear_many_f32_avx2(const struct dsv4_linear_args *a) {
    assert(a->w->format == DSV4_W_F32);
    many(a, F32_PLAIN);
}

const struct dsv4_variant dsv4k_avx2_linear[] = {
    LINEAR_WALK_VARIANTS(rows2),
    LINEAR_WALK_VARIANTS(rows4),
    LINEAR_WALK_VARIANTS(rows4_far),
    LINEAR_WALK_VARIANTS(rows4_spaced),
    LINEAR_MANY_VARIANTS,
    DSV4_VARIANT(linear_few_f32, dsv4k_linear_few_f32_avx2, "avx2", 0),
    DSV4_VARIANT(linear_many_f32, dsv4k_linear_many_f32_avx2, "avx2", 0),
    {NULL, NULL, 0, 0},
};
