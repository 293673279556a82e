/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Activations to FP8, KV rows, index rows and the Hadamard rotation; AVX-512.  The byte layouts are
 * those of types.h.  Source: SPEC 3.4, 3.6, 3.11, 6.4.
 */
#include "bf16_avx512.h"

#include <math.h>

/* The e8m0 byte of a group's power-of-two scale; 255 if an element is infinite or NaN. */
static uint8_t group_scale(const dsv4_bf16 *x, int32_t n, float floor, float inv_max) {
    __m512i top = _mm512_setzero_si512();
    for (int32_t i = 0; i < n; i += 32) {
        __m512i h = _mm512_and_si512(load32(x + i, n - i), _mm512_set1_epi16(0x7fff));
        top = _mm512_max_epu16(top, h);
    }
    uint32_t largest = largest32(top);
    if (largest >= 0x7f80u)
        return 255;
    float amax = dsv4_bf16_to_f32((dsv4_bf16)largest);
    return dsv4_group_scale(amax > floor ? amax : floor, inv_max);
}

/*
 * Sixteen e4m3 codes, 0 to 0x7e, of magnitudes v: above 2^-6 the upper bits rounded in place, below
 * it the low bits of v + 2^14, whose last place is 2^-9.  A group's scale keeps v <= 448.
 */
static inline __m512i encode16(__m512 v) {
    __m512i u = _mm512_castps_si512(v), one = _mm512_set1_epi32(1);
    __m512i even = _mm512_and_si512(_mm512_srli_epi32(u, 20), one);
    __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7ffff)), even);
    r = _mm512_sub_epi32(_mm512_srli_epi32(r, 20), _mm512_set1_epi32(120 << 3));
    __m512 shifted = _mm512_add_ps(v, _mm512_set1_ps(16384.0f));
    __m512i small = _mm512_sub_epi32(_mm512_castps_si512(shifted), _mm512_set1_epi32(0x46800000));
    __mmask16 below = _mm512_cmp_ps_mask(v, _mm512_set1_ps(0x1p-6f), _CMP_LT_OQ);
    return _mm512_mask_mov_epi32(r, below, small);
}

/* The magnitudes of codes 0 to 0x7f (0x7f gives 480; see decode_fp8). */
static inline __m512 decode16(__m512i code) {
    __m512i normal = _mm512_add_epi32(_mm512_slli_epi32(code, 20), _mm512_set1_epi32(120 << 23));
    __m512i bits = _mm512_add_epi32(code, _mm512_set1_epi32(0x46800000));
    __m512 small = _mm512_sub_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(16384.0f));
    __mmask16 below = _mm512_cmplt_epi32_mask(code, _mm512_set1_epi32(8));
    return _mm512_mask_mov_ps(_mm512_castsi512_ps(normal), below, small);
}

static void store_bytes(uint8_t *p, __m512i words, int32_t left) {
    __m128i bytes = _mm512_cvtepi32_epi8(words);
    if (left >= 16)
        _mm_storeu_si128((__m128i *)(void *)p, bytes);
    else
        _mm_mask_storeu_epi8(p, first16(left), bytes);
}

/* One group under a finite scale: codes and the bf16 values they stand for; either may be NULL. */
static inline void encode_group(dsv4_bf16 *out, uint8_t *codes, const dsv4_bf16 *x, int32_t n,
                                uint8_t scale) {
    const __m512 up = _mm512_castsi512_ps(_mm512_set1_epi32((254 - scale) << 23));
    const __m512 down = _mm512_set1_ps(dsv4_e8m0_to_f32(scale));
    const __m512i sign = _mm512_set1_epi32(INT32_MIN);
    for (int32_t i = 0; i < n; i += 16) {
        __m512 v = load16(x + i, n - i);
        __m512i s = _mm512_and_si512(_mm512_castps_si512(v), sign);
        __m512i code = encode16(_mm512_mul_ps(_mm512_abs_ps(v), up));
        if (codes)
            store_bytes(codes + i, _mm512_or_si512(code, _mm512_srli_epi32(s, 24)), n - i);
        if (!out)
            continue;
        __m512i value = _mm512_castps_si512(_mm512_mul_ps(decode16(code), down));
        __m256i h = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_or_si512(value, s), 16));
        if (n - i >= 16) /* a value of an e4m3 code is exact in bf16 */
            _mm256_storeu_si256((__m256i *)(void *)(out + i), h);
        else
            _mm256_mask_storeu_epi16(out + i, first16(n - i), h);
    }
}

static void dsv4k_act_flush_avx512(dsv4_bf16 *out, const dsv4_bf16 *x, int32_t n) {
    const __m512i magnitude = _mm512_set1_epi16(0x7fff), tiny = _mm512_set1_epi16(DSV4_TINY_BF16);
    for (int32_t i = 0; i < n; i += 32) {
        __m512i h = load32(x + i, n - i), m = _mm512_and_si512(h, magnitude);
        __mmask32 zero = _mm512_cmplt_epu16_mask(m, tiny);
        store32(out + i, _mm512_mask_mov_epi16(h, zero, _mm512_andnot_si512(magnitude, h)), n - i);
    }
}

/* One group of 64 codes, any codes under any scale but 255. */
static void decode_fp8(dsv4_bf16 *x, const uint8_t *codes, uint8_t scale) {
    const __m512 down = _mm512_set1_ps(dsv4_e8m0_to_f32(scale));
    const __m512i low = _mm512_set1_epi32(0x7f);
    for (int32_t i = 0; i < DSV4_KV_GROUP; i += 16) {
        __m512i c =
            _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)(codes + i)));
        __m512i code = _mm512_and_si512(c, low);
        __m512i v = _mm512_castps_si512(decode16(code));
        v = _mm512_mask_mov_epi32(v, _mm512_cmpeq_epi32_mask(code, low),
                                  _mm512_set1_epi32(0x7fc00000));
        v = _mm512_or_si512(v, _mm512_slli_epi32(_mm512_andnot_si512(low, c), 24));
        store16(x + i, _mm512_mul_ps(_mm512_castsi512_ps(v), down), 16);
    }
}

#define QUANT(op) dsv4k_##op##_avx512
#include "cpu/quant_simd.h"

/* Butterflies inside a register: lane i and lane i ^ stride give their sum and their difference. */
static inline __m512 butterflies(__m512 x, int32_t n) {
    const __m512i minus = _mm512_set1_epi32(INT32_MIN), none = _mm512_setzero_si512();
    const __m512i ones[4] = {
        _mm512_mask_mov_epi32(none, 0xaaaa, minus), _mm512_mask_mov_epi32(none, 0xcccc, minus),
        _mm512_mask_mov_epi32(none, 0xf0f0, minus), _mm512_mask_mov_epi32(none, 0xff00, minus)};
#define STEP(bit, swapped)                                                                         \
    if (n > 1 << bit)                                                                              \
    x = _mm512_add_ps(swapped, _mm512_xor_ps(x, _mm512_castsi512_ps(ones[bit])))
    STEP(0, _mm512_permute_ps(x, 0xb1));
    STEP(1, _mm512_permute_ps(x, 0x4e));
    STEP(2, _mm512_shuffle_f32x4(x, x, 0xb1));
    STEP(3, _mm512_shuffle_f32x4(x, x, 0x4e));
#undef STEP
    return x;
}

static void dsv4k_hadamard_avx512(dsv4_bf16 *x, int32_t n) {
    __m512 y[16], scale = _mm512_set1_ps((float)(1.0 / sqrt((double)n)));
    int32_t regs = n > 16 ? n / 16 : 1;
    for (int32_t i = 0; i < regs; i++)
        y[i] = butterflies(load16(x + 16 * i, n - 16 * i), n);
    for (int32_t stride = 1; stride < regs; stride *= 2) {
        for (int32_t i = 0; i < regs; i++) {
            if (i & stride)
                continue;
            __m512 a = y[i], b = y[i + stride];
            y[i] = _mm512_add_ps(a, b);
            y[i + stride] = _mm512_sub_ps(a, b);
        }
    }
    for (int32_t i = 0; i < regs; i++)
        store16(x + 16 * i, _mm512_mul_ps(y[i], scale), n - 16 * i);
}

/*
 * The midpoints between e2m1 values have at most three bits, so times the scale they are bf16 (or
 * infinity) and the comparison is one of integers: a code is the number of midpoints passed.  At
 * midpoints 0.75, 1.75 and 3.5 the tie goes up, to the even code.
 */
static inline __m512i count_midpoints(__m512i magnitude, float scale) {
    static const float middle[7] = {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f};
    __m512i code = _mm512_setzero_si512(), one = _mm512_set1_epi16(1);
    for (int i = 0; i < 7; i++) {
        int bits = dsv4_f32_to_bf16(middle[i] * scale) - i % 2;
        __mmask32 passed = _mm512_cmpgt_epi16_mask(magnitude, _mm512_set1_epi16((short)bits));
        code = _mm512_mask_add_epi16(code, passed, code, one);
    }
    return code;
}

static void dsv4k_index_store_avx512(uint8_t *row, const dsv4_bf16 *x, int32_t n) {
    for (int32_t k = 0; k < n; k += DSV4_INDEX_GROUP) {
        uint8_t scale = group_scale(x + k, DSV4_INDEX_GROUP, 0x1.8p-124f, 1.0f / 6.0f);
        __m512i h = load32(x + k, DSV4_INDEX_GROUP), code = _mm512_setzero_si512();
        if (scale != 255) {
            code = count_midpoints(_mm512_and_si512(h, _mm512_set1_epi16(0x7fff)),
                                   dsv4_e8m0_to_f32(scale));
            code = _mm512_or_si512(
                code, _mm512_and_si512(_mm512_srli_epi16(h, 12), _mm512_set1_epi16(8)));
        }
        code = _mm512_or_si512(code, _mm512_srli_epi32(code, 12)); /* the odd code above the even */
        store_bytes(row + k / 2, code, 16);
        row[n / 2 + k / DSV4_INDEX_GROUP] = scale;
    }
}

const struct dsv4_variant dsv4k_avx512_quant[] = {
    DSV4_VARIANT(act_quant, dsv4k_act_quant_avx512, "avx512", 0),
    DSV4_VARIANT(act_flush, dsv4k_act_flush_avx512, "avx512", 0),
    DSV4_VARIANT(kv_store, dsv4k_kv_store_avx512, "avx512", 0),
    DSV4_VARIANT(kv_load, dsv4k_kv_load_avx512, "avx512", 0),
    DSV4_VARIANT(hadamard, dsv4k_hadamard_avx512, "avx512", 0),
    DSV4_VARIANT(index_store, dsv4k_index_store_avx512, "avx512", 0),
    {NULL, NULL, 0, 0},
};
