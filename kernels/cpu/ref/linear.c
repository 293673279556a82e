/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Linear layers, the reference: this file defines the bits.  One row of weights is decoded to f32
 * operands at a time and multiplied with up to 64 tokens.  One function per weight format serves
 * both the `few` and the `many` entry. Contract: kernels.h.  Source: SPEC 6.3-6.6.
 */
#include <assert.h>
#include <math.h>

#include "kernels.h"

enum { LANES = 16, STEP = 32, TOKENS = 64, PAD = 128 };

/* cols rounded up so that a row holds whole steps and whole FP8 blocks. */
static int32_t padded(int32_t cols) {
    return (cols + PAD - 1) / PAD * PAD;
}

/* A row of x as f32, padded with +0. */
static void decode_x(float *out, const dsv4_bf16 *x, int32_t cols) {
    for (int32_t k = 0; k < cols; k++)
        out[k] = dsv4_bf16_to_f32(x[k]);
    for (int32_t k = cols; k < padded(cols); k++)
        out[k] = 0.0f;
}

static float scale_at(const struct dsv4_weight *w, size_t i) {
    if (w->scale_type == DSV4_SCALE_E8M0)
        return dsv4_e8m0_to_f32(((const uint8_t *)w->scale)[i]);
    if (w->scale_type == DSV4_SCALE_BF16) {
        dsv4_bf16 s;
        memcpy(&s, (const char *)w->scale + 2 * i, sizeof s);
        return dsv4_bf16_to_f32(s);
    }
    float s;
    memcpy(&s, (const char *)w->scale + 4 * i, sizeof s);
    return s;
}

/* The scale of column k in row r. */
static float weight_scale(const struct dsv4_weight *w, int32_t r, int32_t k) {
    if (w->format == DSV4_W_FP4)
        return scale_at(w, (size_t)r * (size_t)(w->cols / DSV4_FP4_BLOCK) +
                               (size_t)(k / DSV4_FP4_BLOCK));
    size_t per_row = ((size_t)w->cols + DSV4_FP8_BLOCK - 1) / DSV4_FP8_BLOCK;
    return scale_at(w, (size_t)(r / DSV4_FP8_BLOCK) * per_row + (size_t)(k / DSV4_FP8_BLOCK));
}

/* One weight as a dot product takes it; under rule 3 without its scale. */
static float weight_at(const struct dsv4_weight *w, int32_t r, int32_t k) {
    size_t i = (size_t)r * (size_t)w->cols + (size_t)k;
    if (w->format == DSV4_W_F32) {
        float v;
        memcpy(&v, (const char *)w->data + 4 * i, sizeof v);
        return dsv4_f32_operand(v);
    }
    if (w->format == DSV4_W_BF16) {
        dsv4_bf16 v;
        memcpy(&v, (const char *)w->data + 2 * i, sizeof v);
        return dsv4_bf16_to_f32(dsv4_bf16_operand(v));
    }
    float code;
    if (w->format == DSV4_W_FP4) {
        uint8_t byte = ((const uint8_t *)w->data)[i / 2];
        code = dsv4_e2m1_to_f32(k & 1 ? byte >> 4 : byte & 15);
    } else {
        code = dsv4_e4m3_to_f32(((const uint8_t *)w->data)[i]);
    }
    if (w->scale_rule == DSV4_SCALE_BLOCK)
        return code;
    float v = code * weight_scale(w, r, k);
    if (w->scale_rule == DSV4_SCALE_ROUND)
        return dsv4_bf16_to_f32(dsv4_bf16_operand(dsv4_f32_to_bf16(v)));
    return v;
}

/* Rule 1 over n elements (a multiple of 32): lane i takes element 2i+1, then 2i, of each 32. */
static void add_products(float lane[LANES], const float *x, const float *w, int32_t n) {
    for (int32_t k = 0; k < n; k += STEP) {
        for (int i = 0; i < LANES; i++)
            lane[i] = lane[i] + x[k + 2 * i + 1] * w[k + 2 * i + 1];
        for (int i = 0; i < LANES; i++)
            lane[i] = lane[i] + x[k + 2 * i] * w[k + 2 * i];
    }
}

/* The same with f32 weights, whose products are not exact: fused. */
static void add_products_fused(float lane[LANES], const float *x, const float *w, int32_t n) {
    for (int32_t k = 0; k < n; k += STEP) {
        for (int i = 0; i < LANES; i++)
            lane[i] = fmaf(x[k + 2 * i + 1], w[k + 2 * i + 1], lane[i]);
        for (int i = 0; i < LANES; i++)
            lane[i] = fmaf(x[k + 2 * i], w[k + 2 * i], lane[i]);
    }
}

/* Rule 3: every block starts at +0 and joins the sum through its scale. */
static void add_blocks(float lane[LANES], const float *x, const float *w, const float *scale,
                       int32_t n, int32_t block) {
    for (int32_t k = 0; k < n; k += block) {
        float part[LANES] = {0};
        add_products(part, x + k, w + k, block);
        for (int i = 0; i < LANES; i++)
            lane[i] = fmaf(part[i], scale[k / block], lane[i]);
    }
}

static float tree(float lane[LANES]) {
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            lane[i] += lane[i + half];
    return lane[0];
}

static void store(const struct dsv4_linear_args *a, int32_t t, int32_t r, float sum) {
    if (a->out_f32)
        ((float *)a->out)[t * a->ld_out + r] = sum;
    else
        ((dsv4_bf16 *)a->out)[t * a->ld_out + r] = dsv4_f32_to_bf16(sum);
}

/* One row of weights in f32 with its scales (rule 3), padded with +0. */
static void decode_row(float *out, float *scale, const struct dsv4_weight *w, int32_t r,
                       int32_t block) {
    for (int32_t k = 0; k < w->cols; k++)
        out[k] = weight_at(w, r, k);
    for (int32_t k = w->cols; k < padded(w->cols); k++)
        out[k] = 0.0f;
    if (w->scale_rule == DSV4_SCALE_BLOCK)
        for (int32_t k = 0; k < w->cols; k += block)
            scale[k / block] = weight_scale(w, r, k);
}

static void linear(const struct dsv4_linear_args *a, enum dsv4_weight_format format) {
    const struct dsv4_weight *w = a->w;
    assert(w->format == format && 0 <= a->row0 && a->row1 <= w->rows);
    (void)format;
    int32_t block = w->format == DSV4_W_FP4 ? DSV4_FP4_BLOCK : DSV4_FP8_BLOCK;
    int32_t n =
        w->scale_rule == DSV4_SCALE_BLOCK ? (w->cols + block - 1) / block * block : padded(w->cols);
    float *row = a->scratch, *scale = row + padded(w->cols), *x = scale + padded(w->cols);
    for (int32_t t0 = 0; t0 < a->n_tok; t0 += TOKENS) {
        int32_t t1 = t0 + TOKENS < a->n_tok ? t0 + TOKENS : a->n_tok;
        for (int32_t t = t0; t < t1; t++)
            decode_x(x + (size_t)(t - t0) * (size_t)padded(w->cols),
                     a->x + (a->tok ? a->tok[t] : t) * a->ld_x, w->cols);
        for (int32_t r = a->row0; r < a->row1; r++) {
            decode_row(row, scale, w, r, block);
            for (int32_t t = t0; t < t1; t++) {
                const float *xt = x + (size_t)(t - t0) * (size_t)padded(w->cols);
                float lane[LANES] = {0};
                if (w->format == DSV4_W_F32)
                    add_products_fused(lane, xt, row, n);
                else if (w->scale_rule == DSV4_SCALE_BLOCK)
                    add_blocks(lane, xt, row, scale, n, block);
                else
                    add_products(lane, xt, row, n);
                store(a, t, r, tree(lane));
            }
        }
    }
}

static void dsv4k_linear_fp8_ref(const struct dsv4_linear_args *a) {
    linear(a, DSV4_W_FP8);
}

static void dsv4k_linear_fp4_ref(const struct dsv4_linear_args *a) {
    linear(a, DSV4_W_FP4);
}

static void dsv4k_linear_bf16_ref(const struct dsv4_linear_args *a) {
    linear(a, DSV4_W_BF16);
}

static void dsv4k_linear_f32_ref(const struct dsv4_linear_args *a) {
    linear(a, DSV4_W_F32);
}

const struct dsv4_variant dsv4k_ref_linear[] = {
    DSV4_VARIANT(linear_few_fp8, dsv4k_linear_fp8_ref, "ref", 0),
    DSV4_VARIANT(linear_few_fp4, dsv4k_linear_fp4_ref, "ref", 0),
    DSV4_VARIANT(linear_few_bf16, dsv4k_linear_bf16_ref, "ref", 0),
    DSV4_VARIANT(linear_few_f32, dsv4k_linear_f32_ref, "ref", 0),
    DSV4_VARIANT(linear_many_fp8, dsv4k_linear_fp8_ref, "ref", 0),
    DSV4_VARIANT(linear_many_fp4, dsv4k_linear_fp4_ref, "ref", 0),
    DSV4_VARIANT(linear_many_bf16, dsv4k_linear_bf16_ref, "ref", 0),
    DSV4_VARIANT(linear_many_f32, dsv4k_linear_f32_ref, "ref", 0),
    {NULL, NULL, 0, 0},
};
