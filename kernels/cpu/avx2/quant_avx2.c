/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Activations to FP8, KV rows, index rows and the Hadamard rotation; AVX2.  The byte layouts are
 * those of types.h.  Source: SPEC 3.4, 3.6, 3.11, 6.4.
 */
#include "bf16_avx2.h"

#include <math.h>

/* The e8m0 byte of a group's power-of-two scale; 255 if an element is infinite or NaN. */
static uint8_t group_scale(const dsv4_bf16 *x, int32_t n, float floor, float inv_max) {
    __m256i top = _mm256_setzero_si256();
    for (int32_t i = 0; i < n; i += 16) {
        __m256i h = _mm256_and_si256(load16(x + i, n - i), _mm256_set1_epi16(0x7fff));
        top = _mm256_max_epu16(top, h);
    }
    uint32_t largest = largest16(top);
    if (largest >= 0x7f80u)
        return 255;
    float amax = dsv4_bf16_to_f32((dsv4_bf16)largest);
    return dsv4_group_scale(amax > floor ? amax : floor, inv_max);
}

/*
 * Eight e4m3 codes, 0 to 0x7e, of magnitudes v: above 2^-6 the upper bits rounded in place, below
 * it the low bits of v + 2^14, whose last place is 2^-9.  A group's scale keeps v <= 448.
 */
static inline __m256i encode8(__m256 v) {
    __m256i u = _mm256_castps_si256(v), one = _mm256_set1_epi32(1);
    __m256i even = _mm256_and_si256(_mm256_srli_epi32(u, 20), one);
    __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7ffff)), even);
    r = _mm256_sub_epi32(_mm256_srli_epi32(r, 20), _mm256_set1_epi32(120 << 3));
    __m256 shifted = _mm256_add_ps(v, _mm256_set1_ps(16384.0f));
    __m256i small = _mm256_sub_epi32(_mm256_castps_si256(shifted), _mm256_set1_epi32(0x46800000));
    __m256 below = _mm256_cmp_ps(v, _mm256_set1_ps(0x1p-6f), _CMP_LT_OQ);
    return _mm256_blendv_epi8(r, small, _mm256_castps_si256(below));
}

/* The magnitudes of codes 0 to 0x7f (0x7f gives 480; see decode_fp8). */
static inline __m256 decode8(__m256i code) {
    __m256i normal = _mm256_add_epi32(_mm256_slli_epi32(code, 20), _mm256_set1_epi32(120 << 23));
    __m256i bits = _mm256_add_epi32(code, _mm256_set1_epi32(0x46800000));
    __m256 small = _mm256_sub_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(16384.0f));
    __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(8), code);
    return _mm256_blendv_ps(_mm256_castsi256_ps(normal), small, _mm256_castsi256_ps(below));
}

/* The low bytes of eight words, each 0 to 255. */
static void store_bytes(uint8_t *p, __m256i words, int32_t left) {
    __m128i h = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    __m128i bytes = _mm_packus_epi16(h, h);
    if (left >= 8) {
        _mm_storel_epi64((__m128i *)(void *)p, bytes);
    } else {
        uint8_t part[16];
        _mm_storeu_si128((__m128i *)(void *)part, bytes);
        memcpy(p, part, (size_t)left);
    }
}

/* One group under a finite scale: codes and the bf16 values they stand for; either may be NULL. */
static inline void encode_group(dsv4_bf16 *out, uint8_t *codes, const dsv4_bf16 *x, int32_t n,
                                uint8_t scale) {
    const __m256 up = _mm256_castsi256_ps(_mm256_set1_epi32((254 - scale) << 23));
    const __m256 down = _mm256_set1_ps(dsv4_e8m0_to_f32(scale)), sign = _mm256_set1_ps(-0.0f);
    for (int32_t i = 0; i < n; i += 8) {
        __m256 v = load8(x + i, n - i);
        __m256i s = _mm256_castps_si256(_mm256_and_ps(v, sign));
        __m256i code = encode8(_mm256_mul_ps(_mm256_andnot_ps(sign, v), up));
        if (codes)
            store_bytes(codes + i, _mm256_or_si256(code, _mm256_srli_epi32(s, 24)), n - i);
        if (!out)
            continue;
        __m256i value = _mm256_castps_si256(_mm256_mul_ps(decode8(code), down));
        /* a value of an e4m3 code is exact in bf16 */
        store8_bits(out + i, upper8(_mm256_or_si256(value, s)), n - i);
    }
}

static void dsv4k_act_flush_avx2(dsv4_bf16 *out, const dsv4_bf16 *x, int32_t n) {
    const __m256i magnitude = _mm256_set1_epi16(0x7fff);
    for (int32_t i = 0; i < n; i += 16) {
        __m256i h = load16(x + i, n - i), m = _mm256_and_si256(h, magnitude);
        __m256i counts = _mm256_cmpgt_epi16(m, _mm256_set1_epi16(DSV4_TINY_BF16 - 1));
        __m256i keep = _mm256_or_si256(counts, _mm256_set1_epi16(INT16_MIN)); /* the sign stays */
        store16(out + i, _mm256_and_si256(h, keep), n - i);
    }
}

/* One group of 64 codes, any codes under any scale but 255. */
static void decode_fp8(dsv4_bf16 *x, const uint8_t *codes, uint8_t scale) {
    const __m256 down = _mm256_set1_ps(dsv4_e8m0_to_f32(scale));
    const __m256i low = _mm256_set1_epi32(0x7f), nan = _mm256_set1_epi32(0x7fc00000);
    for (int32_t i = 0; i < DSV4_KV_GROUP; i += 8) {
        __m256i c =
            _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(codes + i)));
        __m256i code = _mm256_and_si256(c, low);
        __m256i v = _mm256_castps_si256(decode8(code));
        v = _mm256_blendv_epi8(v, nan, _mm256_cmpeq_epi32(code, low));
        v = _mm256_or_si256(v, _mm256_slli_epi32(_mm256_andnot_si256(low, c), 24));
        store8(x + i, _mm256_mul_ps(_mm256_castsi256_ps(v), down), 8);
    }
}

#define QUANT(op) dsv4k_##op##_avx2
#include "cpu/quant_simd.h"

/* Butterflies inside a register: lane i and lane i ^ stride give their sum and their difference. */
static inline __m256 butterflies(__m256 x, int32_t n) {
    const __m256 p = _mm256_setzero_ps(), m = _mm256_set1_ps(-0.0f);
    if (n > 1)
        x = _mm256_add_ps(_mm256_permute_ps(x, 0xb1),
                          _mm256_xor_ps(x, _mm256_blend_ps(p, m, 0xaa)));
    if (n > 2)
        x = _mm256_add_ps(_mm256_permute_ps(x, 0x4e),
                          _mm256_xor_ps(x, _mm256_blend_ps(p, m, 0xcc)));
    if (n > 4)
        x = _mm256_add_ps(_mm256_permute2f128_ps(x, x, 1),
                          _mm256_xor_ps(x, _mm256_blend_ps(p, m, 0xf0)));
    return x;
}

static void dsv4k_hadamard_avx2(dsv4_bf16 *x, int32_t n) {
    __m256 y[32], scale = _mm256_set1_ps((float)(1.0 / sqrt((double)n)));
    int32_t regs = n > 8 ? n / 8 : 1;
    for (int32_t i = 0; i < regs; i++)
        y[i] = butterflies(load8(x + 8 * i, n - 8 * i), n);
    for (int32_t stride = 1; stride < regs; stride *= 2) {
        for (int32_t i = 0; i < regs; i++) {
            if (i & stride)
                continue;
            __m256 a = y[i], b = y[i + stride];
            y[i] = _mm256_add_ps(a, b);
            y[i + stride] = _mm256_sub_ps(a, b);
        }
    }
    for (int32_t i = 0; i < regs; i++)
        store8(x + 8 * i, _mm256_mul_ps(y[i], scale), n - 8 * i);
}

/*
 * The midpoints between e2m1 values have at most three bits, so times the scale they are bf16 (or
 * infinity) and the comparison is one of integers: a code is the number of midpoints passed.  At
 * midpoints 0.75, 1.75 and 3.5 the tie goes up, to the even code.
 */
static inline __m256i count_midpoints(__m256i magnitude, float scale) {
    static const float middle[7] = {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f};
    __m256i code = _mm256_setzero_si256();
    for (int i = 0; i < 7; i++) {
        int bits = dsv4_f32_to_bf16(middle[i] * scale) - i % 2;
        __m256i passed = _mm256_cmpgt_epi16(magnitude, _mm256_set1_epi16((short)bits));
        code = _mm256_sub_epi16(code, passed);
    }
    return code;
}

static void dsv4k_index_store_avx2(uint8_t *row, const dsv4_bf16 *x, int32_t n) {
    for (int32_t k = 0; k < n; k += DSV4_INDEX_GROUP) {
        uint8_t scale = group_scale(x + k, DSV4_INDEX_GROUP, 0x1.8p-124f, 1.0f / 6.0f);
        row[n / 2 + k / DSV4_INDEX_GROUP] = scale;
        for (int32_t i = k; i < k + DSV4_INDEX_GROUP; i += 16) {
            __m256i h = load16(x + i, 16), code = _mm256_setzero_si256();
            if (scale != 255) {
                code = count_midpoints(_mm256_and_si256(h, _mm256_set1_epi16(0x7fff)),
                                       dsv4_e8m0_to_f32(scale));
                code = _mm256_or_si256(
                    code, _mm256_and_si256(_mm256_srli_epi16(h, 12), _mm256_set1_epi16(8)));
            }
            code = _mm256_or_si256(code, _mm256_srli_epi32(code, 12)); /* odd above even */
            store_bytes(row + i / 2, _mm256_and_si256(code, _mm256_set1_epi32(0xff)), 8);
        }
    }
}

const struct dsv4_variant dsv4k_avx2_quant[] = {
    DSV4_VARIANT(act_quant, dsv4k_act_quant_avx2, "avx2", 0),
    DSV4_VARIANT(act_flush, dsv4k_act_flush_avx2, "avx2", 0),
    DSV4_VARIANT(kv_store, dsv4k_kv_store_avx2, "avx2", 0),
    DSV4_VARIANT(kv_load, dsv4k_kv_load_avx2, "avx2", 0),
    DSV4_VARIANT(hadamard, dsv4k_hadamard_avx2, "avx2", 0),
    DSV4_VARIANT(index_store, dsv4k_index_store_avx2, "avx2", 0),
    {NULL, NULL, 0, 0},
};
