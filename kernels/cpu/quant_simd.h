/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows in groups that share a scale: FP8 activations and KV rows, the part every x86 variant
 * shares. The bits are those of cpu/ref/quant.c; the byte layouts are in types.h.
 *
 * The including file defines first
 *
 *   QUANT(op)                 the name of its function for that operation
 *   group_scale(x, n, floor, inv_max)         the scale of n values, 255 if one is not finite
 *   encode_group(out, codes, x, n, scale)     their e4m3 codes, and their values; either may be
 * NULL decode_fp8(x, codes, scale)               the values of DSV4_KV_GROUP codes; any scale but
 * 255
 */
#ifndef DSV4_QUANT_SIMD_H
#define DSV4_QUANT_SIMD_H

#include <string.h>

#include "kernels.h"

static void QUANT(act_quant)(dsv4_bf16 *out, uint8_t *codes, uint8_t *scales, const dsv4_bf16 *x,
                             int32_t n) {
    for (int32_t k = 0; k < n; k += DSV4_ACT_GROUP) {
        int32_t m = n - k < DSV4_ACT_GROUP ? n - k : DSV4_ACT_GROUP;
        uint8_t scale = group_scale(x + k, m, 1e-4f, 1.0f / 448.0f);
        if (scales)
            scales[k / DSV4_ACT_GROUP] = scale;
        if (scale == 255) {
            for (int32_t i = 0; i < m; i++)
                out[k + i] = 0x7fc0;
            if (codes)
                memset(codes + k, 0x7f, (size_t)m);
        } else if (codes) {
            encode_group(out + k, codes + k, x + k, m, scale);
        } else {
            encode_group(out + k, NULL, x + k, m, scale);
        }
    }
}

static void QUANT(kv_store)(uint8_t *row, const dsv4_bf16 *x, enum dsv4_kv_format f, int32_t d_head,
                            int32_t d_rope) {
    if (f == DSV4_KV_BF16) {
        memcpy(row, x, 2 * (size_t)d_head);
        return;
    }
    int32_t nope = d_head - d_rope, groups = nope / DSV4_KV_GROUP;
    uint8_t *scales = row + nope + 2 * d_rope, *end = row + dsv4_kv_row_bytes(f, d_head, d_rope);
    for (int32_t g = 0; g < groups; g++) {
        const dsv4_bf16 *group = x + g * DSV4_KV_GROUP;
        scales[g] = group_scale(group, DSV4_KV_GROUP, 1e-4f, 1.0f / 448.0f);
        if (scales[g] == 255)
            memset(row + g * DSV4_KV_GROUP, 0x7f, DSV4_KV_GROUP);
        else
            encode_group(NULL, row + g * DSV4_KV_GROUP, group, DSV4_KV_GROUP, scales[g]);
    }
    memcpy(row + nope, x + nope, 2 * (size_t)d_rope);
    memset(scales + groups, 0, (size_t)(end - (scales + groups)));
}

static void QUANT(kv_load)(dsv4_bf16 *x, const uint8_t *row, enum dsv4_kv_format f, int32_t d_head,
                           int32_t d_rope) {
    if (f == DSV4_KV_BF16) {
        memcpy(x, row, 2 * (size_t)d_head);
        return;
    }
    int32_t nope = d_head - d_rope;
    const uint8_t *scales = row + nope + 2 * d_rope;
    for (int32_t k = 0; k < nope; k += DSV4_KV_GROUP) {
        if (scales[k / DSV4_KV_GROUP] == 255) {
            for (int32_t i = 0; i < DSV4_KV_GROUP; i++)
                x[k + i] = 0x7fc0;
        } else {
            decode_fp8(x + k, row + k, scales[k / DSV4_KV_GROUP]);
        }
    }
    memcpy(x + nope, row + nope, 2 * (size_t)d_rope);
}

#endif
