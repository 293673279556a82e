/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Every byte layout of the model, once: bf16, e4m3, e2m1, e8m0, the FP8 and FP4 weight blocks, the KV row and the
 * index row.  Plain C; the CUDA kernels include it as well.  Nothing here allocates or fails.
 * Source: SPEC sections 0, 3.11, 6.3, 6.5.
 */
#ifndef DSV4_TYPES_H
#define DSV4_TYPES_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__cplusplus)
#define DSV4_STATIC_ASSERT static_assert
#else
#define DSV4_STATIC_ASSERT _Static_assert
#endif

#if defined(__CUDACC__)
#define DSV4_INLINE static inline __host__ __device__
#else
#define DSV4_INLINE static inline
#endif

/*
 * bf16: the upper half of an IEEE single.        15 14      7 6      0
 *                                               [s][exponent][mantissa]
 */
typedef uint16_t dsv4_bf16;

DSV4_INLINE uint32_t dsv4_f32_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

DSV4_INLINE float dsv4_f32_from_bits(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

DSV4_INLINE float dsv4_bf16_to_f32(dsv4_bf16 h) {
    return dsv4_f32_from_bits((uint32_t)h << 16);
}

/* Round to nearest even; subnormals are kept, every NaN becomes the quiet NaN of its sign (0x7fc0 or 0xffc0). */
DSV4_INLINE dsv4_bf16 dsv4_f32_to_bf16(float x) {
    uint32_t u = dsv4_f32_bits(x);
    if ((u & 0x7fffffffu) > 0x7f800000u)
        return (dsv4_bf16)((u >> 16 & 0x8000u) | 0x7fc0u);
    return (dsv4_bf16)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

/* Rule 2 of the sums: an operand below 2^-55 in magnitude counts as zero (of its sign), so no product is subnormal. */
#define DSV4_TINY_BF16 0x2400u     /* bf16 bits of 2^-55 */
#define DSV4_TINY_F32 0x24000000u  /* float bits of 2^-55 */

DSV4_INLINE dsv4_bf16 dsv4_bf16_operand(dsv4_bf16 h) {
    return (h & 0x7fffu) < DSV4_TINY_BF16 ? (dsv4_bf16)(h & 0x8000u) : h;
}

DSV4_INLINE float dsv4_f32_operand(float x) {
    uint32_t u = dsv4_f32_bits(x);
    return (u & 0x7fffffffu) < DSV4_TINY_F32 ? dsv4_f32_from_bits(u & 0x80000000u) : x;
}

/*
 * e4m3 (OCP FP8 E4M3FN):   7  6    3  2   0      bias 7; exponent 0: mantissa * 2^-9; no infinity;
 *                         [s][exp ][mant ]       0x7f and 0xff are NaN; largest value 448.
 */
DSV4_INLINE float dsv4_e4m3_to_f32(uint8_t code) {
    uint32_t sign = (uint32_t)(code & 0x80u) << 24, exp = code >> 3 & 15u, mant = code & 7u;
    if ((code & 0x7fu) == 0x7fu)
        return dsv4_f32_from_bits(sign | 0x7fc00000u);
    if (exp == 0) {
        float tiny = (float)mant * 0.001953125f; /* 2^-9, exact */
        return dsv4_f32_from_bits(dsv4_f32_bits(tiny) | sign);
    }
    return dsv4_f32_from_bits(sign | (exp + 120u) << 23 | mant << 20);
}

/* f32 to the nearest e4m3 code, ties to even, saturating at +-448; NaN gives 0x7f of its sign. */
DSV4_INLINE uint8_t dsv4_e4m3_from_f32(float x) {
    uint32_t u = dsv4_f32_bits(x), sign = u >> 24 & 0x80u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u)
        return (uint8_t)(sign | 0x7fu);
    if (a >= 0x43e00000u) /* 448 */
        return (uint8_t)(sign | 0x7eu);
    if (a < 0x3c800000u) { /* below 2^-6: steps of 2^-9; adding 2^14 leaves ulp 2^-9, so the sum rounds there */
        float r = dsv4_f32_from_bits(a) + 16384.0f;
        return (uint8_t)(sign | (dsv4_f32_bits(r) - 0x46800000u));
    }
    a += 0x7ffffu + (a >> 20 & 1u);
    return (uint8_t)(sign | ((a >> 20) - (120u << 3)));
}

/* e2m1 (OCP FP4):  bit 3 sign, bits 0-2 index 0, .5, 1, 1.5, 2, 3, 4, 6.  Twice the value is a small integer. */
DSV4_INLINE int dsv4_e2m1_twice(uint8_t code) {
    int m = code & 7, twice = m < 4 ? m : m < 6 ? 2 * m - 4 : 4 * m - 16;
    return code & 8 ? -twice : twice;
}

DSV4_INLINE float dsv4_e2m1_to_f32(uint8_t code) {
    float v = 0.5f * (float)dsv4_e2m1_twice(code & 7);
    return code & 8 ? -v : v;
}

/* f32 to the nearest e2m1 code, ties to the even code, saturating at +-6; NaN gives 7 (6) of its sign. */
DSV4_INLINE uint8_t dsv4_e2m1_from_f32(float x) {
    uint32_t u = dsv4_f32_bits(x), sign = u >> 28 & 8u;
    float a = dsv4_f32_from_bits(u & 0x7fffffffu);
    uint32_t code = 7;
    if (a <= 5.0f) /* not true for NaN */
        code = a >= 3.5f ? 6 : a > 2.5f ? 5 : a >= 1.75f ? 4 : a > 1.25f ? 3 : a >= 0.75f ? 2 : a > 0.25f;
    return (uint8_t)(sign | code);
}

/* e8m0: 2^(byte - 127); 255 is NaN; there is no zero and no sign.  Byte 0 is 2^-127, a subnormal float. */
DSV4_INLINE float dsv4_e8m0_to_f32(uint8_t byte) {
    if (byte == 255)
        return dsv4_f32_from_bits(0x7fc00000u);
    return dsv4_f32_from_bits(byte ? (uint32_t)byte << 23 : 0x00400000u);
}

/*
 * The power-of-two scale of a group: the smallest 2^e >= amax * inv_max, as an e8m0 byte; amax is already floored to
 * a positive value.  A non-finite amax gives 255.
 */
DSV4_INLINE uint8_t dsv4_group_scale(float amax, float inv_max) {
    uint32_t u = dsv4_f32_bits(amax * inv_max), e = u >> 23;
    if (e >= 255)
        return 255;
    return (uint8_t)(e + ((u & 0x7fffffu) != 0));
}

/*
 * FP8 weight: codes e4m3 [rows][cols]; scales [ceil(rows/128)][ceil(cols/128)], e8m0, f32 or bf16; they multiply.
 *
 * FP4 weight: two e2m1 codes a byte, [rows][cols/2]; scales e8m0 [rows][cols/32].
 *
 *      byte j of a row:   7       4 3       0
 *                        [ col 2j+1 | col 2j ]
 */
enum { DSV4_FP8_BLOCK = 128, DSV4_FP4_BLOCK = 32, DSV4_ACT_GROUP = 128, DSV4_KV_GROUP = 64, DSV4_INDEX_GROUP = 32 };

/*
 * KV row, one token of the window or one compressed entry (SPEC 3.11), d_nope = d_head - d_rope a multiple of 64:
 *
 *      offset 0            d_nope                 d_nope + 2 d_rope         + d_nope / 64
 *             [ e4m3 codes ][ bf16, rotated part  ][ e8m0 per 64 codes      ][ zero pad to 8 ]
 *      512/64:  448           128                    7                         1              = 584 bytes
 *
 * DSV4_KV_BF16 (the April parity switch, where the reference never rounded): 2 d_head bytes of bf16.
 */
enum dsv4_kv_format { DSV4_KV_FP8 = 0, DSV4_KV_BF16 = 1 };

DSV4_INLINE size_t dsv4_kv_row_bytes(enum dsv4_kv_format format, int32_t d_head, int32_t d_rope) {
    size_t nope = (size_t)(d_head - d_rope);
    if (format == DSV4_KV_BF16)
        return 2 * (size_t)d_head;
    return (nope + 2 * (size_t)d_rope + nope / DSV4_KV_GROUP + 7) & ~(size_t)7;
}

/*
 * Index row, one compressed key (or one query head) of the lightning indexer, d_index a multiple of 32:
 *
 *      offset 0                    d_index / 2           + d_index / 32
 *             [ e2m1, low nibble first ][ e8m0 per 32 codes ]        128: 64 + 4 = 68 bytes, no padding
 */
DSV4_INLINE size_t dsv4_index_row_bytes(int32_t d_index) {
    return (size_t)d_index / 2 + (size_t)d_index / DSV4_INDEX_GROUP;
}

DSV4_STATIC_ASSERT(sizeof(dsv4_bf16) == 2, "bf16 is two bytes");
DSV4_STATIC_ASSERT(sizeof(float) == 4, "IEEE single");
DSV4_STATIC_ASSERT((448 + 128 + 7 + 7) / 8 * 8 == 584, "KV row of 512/64");
DSV4_STATIC_ASSERT(128 / 2 + 128 / DSV4_INDEX_GROUP == 68, "index row of 128");

#endif
