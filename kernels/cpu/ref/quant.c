/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Activations to FP8, KV rows, index rows and the Hadamard rotation, in portable C.  The byte
 * layouts are those of types.h.  Source: SPEC 3.4, 3.6, 3.11, 6.4.
 */
#include "kernels.h"

#include <assert.h>
#include <math.h>

/* The e8m0 byte of a group's power-of-two scale; 255 if an element is infinite or NaN. */
static uint8_t group_scale(const dsv4_bf16 *x, int32_t n, float floor, float inv_max) {
    uint32_t largest = 0;
    for (int32_t i = 0; i < n; i++) {
        uint32_t magnitude = x[i] & 0x7fffu;
        if (magnitude > largest)
            largest = magnitude;
    }
    if (largest >= 0x7f80u)
        return 255;
    float amax = dsv4_bf16_to_f32((dsv4_bf16)largest);
    return dsv4_group_scale(amax > floor ? amax : floor, inv_max);
}

/* 1 / scale, a normal float for every scale that group_scale gives: floors and bf16 keep it within
 * 2^+-126. */
static float inverse_scale(uint8_t scale) {
    return dsv4_f32_from_bits((254u - scale) << 23);
}

/* n values of one group -> codes; NaN codes under scale 255. */
static void encode_fp8(uint8_t *codes, const dsv4_bf16 *x, int32_t n, uint8_t scale) {
    for (int32_t i = 0; i < n; i++)
        codes[i] =
            scale == 255 ? 0x7f : dsv4_e4m3_from_f32(dsv4_bf16_to_f32(x[i]) * inverse_scale(scale));
}

static void decode_fp8(dsv4_bf16 *x, const uint8_t *codes, int32_t n, uint8_t scale) {
    for (int32_t i = 0; i < n; i++)
        x[i] = scale == 255
                   ? 0x7fc0
                   : dsv4_f32_to_bf16(dsv4_e4m3_to_f32(codes[i]) * dsv4_e8m0_to_f32(scale));
}

static void dsv4k_act_quant_ref(dsv4_bf16 *out, uint8_t *codes, uint8_t *scales, const dsv4_bf16 *x,
                                int32_t n) {
    uint8_t group[DSV4_ACT_GROUP];
    for (int32_t k = 0; k < n; k += DSV4_ACT_GROUP) {
        int32_t m = n - k < DSV4_ACT_GROUP ? n - k : DSV4_ACT_GROUP;
        uint8_t scale = group_scale(x + k, m, 1e-4f, 1.0f / 448.0f);
        encode_fp8(group, x + k, m, scale);
        decode_fp8(out + k, group, m, scale);
        if (codes)
            memcpy(codes + k, group, (size_t)m);
        if (scales)
            scales[k / DSV4_ACT_GROUP] = scale;
    }
}

static void dsv4k_act_flush_ref(dsv4_bf16 *out, const dsv4_bf16 *x, int32_t n) {
    for (int32_t i = 0; i < n; i++)
        out[i] = dsv4_bf16_operand(x[i]);
}

static void dsv4k_kv_store_ref(uint8_t *row, const dsv4_bf16 *x, enum dsv4_kv_format f,
                               int32_t d_head, int32_t d_rope) {
    if (f == DSV4_KV_BF16) {
        memcpy(row, x, 2 * (size_t)d_head);
        return;
    }
    int32_t nope = d_head - d_rope, groups = nope / DSV4_KV_GROUP;
    assert(nope % DSV4_KV_GROUP == 0);
    uint8_t *scales = row + nope + 2 * d_rope, *end = row + dsv4_kv_row_bytes(f, d_head, d_rope);
    for (int32_t g = 0; g < groups; g++) {
        const dsv4_bf16 *group = x + g * DSV4_KV_GROUP;
        scales[g] = group_scale(group, DSV4_KV_GROUP, 1e-4f, 1.0f / 448.0f);
        encode_fp8(row + g * DSV4_KV_GROUP, group, DSV4_KV_GROUP, scales[g]);
    }
    memcpy(row + nope, x + nope, 2 * (size_t)d_rope);
    memset(scales + groups, 0, (size_t)(end - (scales + groups)));
}

static void dsv4k_kv_load_ref(dsv4_bf16 *x, const uint8_t *row, enum dsv4_kv_format f,
                              int32_t d_head, int32_t d_rope) {
    if (f == DSV4_KV_BF16) {
        memcpy(x, row, 2 * (size_t)d_head);
        return;
    }
    int32_t nope = d_head - d_rope;
    const uint8_t *scales = row + nope + 2 * d_rope;
    for (int32_t g = 0; g < nope / DSV4_KV_GROUP; g++)
        decode_fp8(x + g * DSV4_KV_GROUP, row + g * DSV4_KV_GROUP, DSV4_KV_GROUP, scales[g]);
    memcpy(x + nope, row + nope, 2 * (size_t)d_rope);
}

static void dsv4k_hadamard_ref(dsv4_bf16 *x, int32_t n) {
    float y[256], scale = (float)(1.0 / sqrt((double)n));
    assert(n > 0 && n <= 256 && (n & (n - 1)) == 0);
    for (int32_t i = 0; i < n; i++)
        y[i] = dsv4_bf16_to_f32(x[i]);
    for (int32_t stride = 1; stride < n; stride *= 2) {
        for (int32_t i = 0; i < n; i++) {
            if (i & stride)
                continue;
            float a = y[i], b = y[i + stride];
            y[i] = a + b;
            y[i + stride] = a - b;
        }
    }
    for (int32_t i = 0; i < n; i++)
        x[i] = dsv4_f32_to_bf16(y[i] * scale);
}

static void dsv4k_index_store_ref(uint8_t *row, const dsv4_bf16 *x, int32_t n) {
    assert(n % DSV4_INDEX_GROUP == 0);
    uint8_t *scales = row + n / 2;
    for (int32_t g = 0; g < n / DSV4_INDEX_GROUP; g++) {
        const dsv4_bf16 *group = x + g * DSV4_INDEX_GROUP;
        uint8_t scale = group_scale(group, DSV4_INDEX_GROUP, 0x1.8p-124f, 1.0f / 6.0f);
        for (int32_t i = 0; i < DSV4_INDEX_GROUP; i += 2) {
            uint8_t low = 0, high = 0;
            if (scale != 255) {
                low = dsv4_e2m1_from_f32(dsv4_bf16_to_f32(group[i]) * inverse_scale(scale));
                high = dsv4_e2m1_from_f32(dsv4_bf16_to_f32(group[i + 1]) * inverse_scale(scale));
            }
            row[(g * DSV4_INDEX_GROUP + i) / 2] = (uint8_t)(low | high << 4);
        }
        scales[g] = scale;
    }
}

static void dsv4k_index_load_ref(dsv4_bf16 *x, const uint8_t *row, int32_t n) {
    const uint8_t *scales = row + n / 2;
    for (int32_t i = 0; i < n; i++) {
        uint8_t scale = scales[i / DSV4_INDEX_GROUP], code = row[i / 2] >> 4 * (i & 1) & 15;
        x[i] = scale == 255 ? 0x7fc0
                            : dsv4_f32_to_bf16(dsv4_e2m1_to_f32(code) * dsv4_e8m0_to_f32(scale));
    }
}

const struct dsv4_variant dsv4k_ref_quant[] = {
    DSV4_VARIANT(act_quant, dsv4k_act_quant_ref, "ref", 0),
    DSV4_VARIANT(act_flush, dsv4k_act_flush_ref, "ref", 0),
    DSV4_VARIANT(kv_store, dsv4k_kv_store_ref, "ref", 0),
    DSV4_VARIANT(kv_load, dsv4k_kv_load_ref, "ref", 0),
    DSV4_VARIANT(hadamard, dsv4k_hadamard_ref, "ref", 0),
    DSV4_VARIANT(index_store, dsv4k_index_store_ref, "ref", 0),
    DSV4_VARIANT(index_load, dsv4k_index_load_ref, "ref", 0),
    {NULL, NULL, 0, 0},
};
