// SPDX-License-Identifier: Apache-2.0
//
// Weights as they lie in the checkpoint -> f32 operands, two neighbours at a time.  All decoding is exact; bits: kernels.h.
#pragma once

#include "device.cuh"

// The two halves with the values of two e4m3 codes times 2^-8 (the low byte first); NaN codes give NaN.
DSV4_DEVICE uint32_t e4m3_halves_by_bits(uint32_t codes) {
    uint32_t w = (codes & 0xffu) << 8 | (codes & 0xff00u) << 16; // each code in the upper byte of a half
    uint32_t h = (w >> 1 & 0x3f803f80u) | (w & 0x80008000u);
    uint32_t nan = ((h & 0x7fff7fffu) + 0x00800080u) & 0x40004000u; // carries out of 0x3f80 alone
    return h | (nan >> 4) * 31u;                                    // exponent of all ones
}

// The f32 values of two e4m3 codes.
DSV4_DEVICE void e4m3_pair(uint32_t codes, float *even, float *odd) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    uint32_t h;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(h) : "h"((uint16_t)codes));
    *even = dsv4_half_to_f32(h & 0xffffu);
    *odd = dsv4_half_to_f32(h >> 16);
#else
    uint32_t h = e4m3_halves_by_bits(codes);
    *even = dsv4_half_to_f32(h & 0xffffu) * 256.0f;
    *odd = dsv4_half_to_f32(h >> 16) * 256.0f;
#endif
}

// The f32 values of the two e2m1 codes of a byte, times 2^-14: sign, two bits of exponent and one of mantissa are those
// of a half.
DSV4_DEVICE void e2m1_pair(uint32_t byte, float *even, float *odd) {
    *even = dsv4_half_to_f32((byte & 7u) << 9 | (byte & 8u) << 12);
    *odd = dsv4_half_to_f32((byte & 0x70u) << 5 | (byte & 0x80u) << 8);
}
#define E2M1_FACTOR 16384.0f /* 2^14 */

DSV4_DEVICE float scale_of(const struct dsv4_weight &w, size_t i) {
    if (w.scale_type == DSV4_SCALE_E8M0)
        return dsv4_e8m0_to_f32(((const uint8_t *)w.scale)[i]);
    const uint8_t *p = (const uint8_t *)w.scale + (w.scale_type == DSV4_SCALE_BF16 ? 2 : 4) * i;
    uint32_t low = (uint32_t)p[0] | (uint32_t)p[1] << 8; // scales may lie anywhere
    if (w.scale_type == DSV4_SCALE_BF16)
        return dsv4_bf16_to_f32((dsv4_bf16)low);
    return dsv4_f32_from_bits(low | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24);
}

// Scale number `block` of row r, of FP8 (128 columns) or FP4 (32 columns).
template <int format> DSV4_DEVICE float block_scale(const struct dsv4_weight &w, int32_t r, int32_t block) {
    if (format == DSV4_W_FP4)
        return scale_of(w, (size_t)r * (size_t)(w.cols / DSV4_FP4_BLOCK) + (size_t)block);
    size_t per_row = ((size_t)w.cols + DSV4_FP8_BLOCK - 1) / DSV4_FP8_BLOCK;
    return scale_of(w, (size_t)(r / DSV4_FP8_BLOCK) * per_row + (size_t)block);
}

DSV4_DEVICE float rounded_operand(float v) {
    return dsv4_bf16_to_f32(dsv4_bf16_operand(dsv4_f32_to_bf16(v)));
}

// Bytes in which 32 columns of a row lie.
template <int format> struct step_bytes {
    enum { value = format == DSV4_W_FP8 ? 32 : format == DSV4_W_FP4 ? 16 : format == DSV4_W_BF16 ? 64 : 128 };
};

DSV4_DEVICE size_t row_bytes(const struct dsv4_weight &w) {
    size_t cols = (size_t)w.cols;
    return w.format == DSV4_W_FP8 ? cols : w.format == DSV4_W_FP4 ? cols / 2 : w.format == DSV4_W_BF16 ? 2 * cols : 4 * cols;
}

// Elements 2 lane and 2 lane + 1 of the 32 columns at `step` (shared memory, 16-byte aligned, +0 behind the row's end),
// as operands; `scale` is that of the block, used by the rules that fold it in.
template <int format, int rule>
DSV4_DEVICE void decode_pair(const uint8_t *step, int lane, float scale, float *even, float *odd) {
    if (format == DSV4_W_F32) {
        *even = dsv4_f32_operand(((const dsv4_word_f32 *)step)[2 * lane]);
        *odd = dsv4_f32_operand(((const dsv4_word_f32 *)step)[2 * lane + 1]);
        return;
    }
    if (format == DSV4_W_BF16) {
        uint32_t pair = ((const dsv4_word32 *)step)[lane];
        *even = dsv4_bf16_to_f32(dsv4_bf16_operand((dsv4_bf16)pair));
        *odd = dsv4_bf16_to_f32(dsv4_bf16_operand((dsv4_bf16)(pair >> 16)));
        return;
    }
    if (format == DSV4_W_FP4) {
        e2m1_pair(step[lane], even, odd);
        float factor = rule == DSV4_SCALE_FOLD ? scale * E2M1_FACTOR : E2M1_FACTOR; // both exact: powers of two
        *even *= factor;
        *odd *= factor;
        return;
    }
    e4m3_pair(((const dsv4_word16 *)step)[lane], even, odd);
    if (rule != DSV4_SCALE_BLOCK) {
        *even *= scale;
        *odd *= scale;
    }
    if (rule == DSV4_SCALE_ROUND) {
        *even = rounded_operand(*even);
        *odd = rounded_operand(*odd);
    }
}
