// SPDX-License-Identifier: Apache-2.0
//
// Linear layers for one to eight tokens: a block owns 16 rows, whose bytes all its threads bring to shared memory with
// asynchronous 16-byte copies, four stages ahead; 16 threads, one for each lane of rule 1, make the sums of two rows.
// So the loads do not wait for the sums, whose order is fixed: one chain of two multiply-adds per 32 columns and lane.
#pragma once

#include "weights.cuh"

enum { FEW_THREADS = 128, FEW_ROWS = 16, FEW_EACH = 2, FEW_STAGES = 4, STAGE_BYTES = 512, STAGE_STRIDE = 544 };

struct few_stages {
    // a row every 544 bytes: rows 2 apart, as two halves of a warp read them, lie 16 banks apart
    uint4 bytes[FEW_STAGES][FEW_ROWS][STAGE_STRIDE / 16];
};

// Bytes [at, at + 512) of rows [r0, r0 + 16), up to row `end`, into one stage, +0 where there are none.
DSV4_DEVICE void few_fetch(struct few_stages &s, int stage, const struct dsv4_weight &w, size_t bytes, int32_t r0,
                           int32_t end, size_t at) {
    int32_t lane = (int32_t)threadIdx.x % 32;
    for (int32_t i = (int32_t)threadIdx.x / 32; i < FEW_ROWS; i += FEW_THREADS / 32) {
        uint4 *to = &s.bytes[stage][i][lane];
        size_t from = at + 16 * (size_t)lane;
        const uint8_t *p = (const uint8_t *)w.data + (size_t)(r0 + i) * bytes + from;
        if (r0 + i >= end || from >= bytes) {
            *to = uint4{0, 0, 0, 0};
        } else if (from + 16 <= bytes && (uintptr_t)p % 16 == 0) {
            dsv4_copy16(to, p);
        } else {
            for (size_t j = 0; j < 16; j++)
                ((uint8_t *)to)[j] = from + j < bytes ? p[j] : (uint8_t)0;
        }
    }
}

// Elements k and k + 1 of a row of x, +0 behind the end.
DSV4_DEVICE void few_x(const dsv4_bf16 *x, int32_t k, int32_t cols, int aligned, float *even, float *odd) {
    if (aligned && k + 1 < cols) {
        uint32_t pair = *(const dsv4_word32 *)(const void *)(x + k);
        *even = dsv4_low_bf16(pair);
        *odd = dsv4_high_bf16(pair);
        return;
    }
    *even = k < cols ? dsv4_bf16_to_f32(x[k]) : 0.0f;
    *odd = k + 1 < cols ? dsv4_bf16_to_f32(x[k + 1]) : 0.0f;
}

// sum[i][t] = dot(x[t], row r0 + 2 (threadIdx.x / 16) + i), in the first of the 16 lanes; all threads of the block.
template <int format, int rule, int n_tok>
DSV4_DEVICE void few_dots(struct few_stages &s, const struct dsv4_weight &w, int32_t r0, int32_t end,
                          const dsv4_bf16 *const *x, int aligned, float sum[FEW_EACH][n_tok]) {
    const int STEP = step_bytes<format>::value, STEPS = STAGE_BYTES / STEP;
    // columns and steps in which the scale of a row is one number
    const int SPAN = format == DSV4_W_FP4 ? 1 : format == DSV4_W_FP8 ? 4 : STEPS;
    int lane = (int)threadIdx.x % 16, own = (int)threadIdx.x / 16 * FEW_EACH;
    size_t bytes = row_bytes(w);
    int32_t n_stage = (int32_t)((bytes + STAGE_BYTES - 1) / STAGE_BYTES);
#pragma unroll
    for (int i = 0; i < FEW_EACH; i++)
#pragma unroll
        for (int t = 0; t < n_tok; t++)
            sum[i][t] = 0.0f;
    for (int32_t i = 0; i < FEW_STAGES - 1; i++) {
        if (i < n_stage)
            few_fetch(s, i, w, bytes, r0, end, (size_t)i * STAGE_BYTES);
        dsv4_copy_commit();
    }
    for (int32_t i = 0; i < n_stage; i++) {
        dsv4_copy_wait<FEW_STAGES - 2>();
        __syncthreads(); // everybody's part of this stage is there, and the stage before is free
        if (i + FEW_STAGES - 1 < n_stage)
            few_fetch(s, (i + FEW_STAGES - 1) % FEW_STAGES, w, bytes, r0, end,
                      (size_t)(i + FEW_STAGES - 1) * STAGE_BYTES);
        dsv4_copy_commit();
        for (int span = 0; span < STEPS; span += SPAN) {
            int32_t step0 = i * STEPS + span;
            if (32 * step0 >= w.cols)
                break;
            float scale[FEW_EACH], part[FEW_EACH][n_tok];
#pragma unroll
            for (int j = 0; j < FEW_EACH; j++) {
                scale[j] = 1.0f;
                if (rule != DSV4_SCALE_NONE && r0 + own + j < end)
                    scale[j] = block_scale<format>(w, r0 + own + j, step0 / SPAN);
#pragma unroll
                for (int t = 0; t < n_tok; t++)
                    part[j][t] = rule == DSV4_SCALE_BLOCK ? 0.0f : sum[j][t];
            }
#pragma unroll 4
            for (int k = 0; k < SPAN; k++) {
                float even[FEW_EACH], odd[FEW_EACH];
#pragma unroll
                for (int j = 0; j < FEW_EACH; j++)
                    decode_pair<format, rule>((const uint8_t *)s.bytes[i % FEW_STAGES][own + j] + (span + k) * STEP,
                                              lane, scale[j], &even[j], &odd[j]);
#pragma unroll
                for (int t = 0; t < n_tok; t++) {
                    float x_even, x_odd;
                    few_x(x[t], 32 * (step0 + k) + 2 * lane, w.cols, aligned, &x_even, &x_odd);
#pragma unroll
                    for (int j = 0; j < FEW_EACH; j++) {
                        if (format == DSV4_W_F32) {
                            part[j][t] = fmaf(x_odd, odd[j], part[j][t]);
                            part[j][t] = fmaf(x_even, even[j], part[j][t]);
                        } else {
                            part[j][t] = dsv4_mad(x_odd, odd[j], part[j][t]);
                            part[j][t] = dsv4_mad(x_even, even[j], part[j][t]);
                        }
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < FEW_EACH; j++)
#pragma unroll
                for (int t = 0; t < n_tok; t++)
                    sum[j][t] = rule == DSV4_SCALE_BLOCK ? fmaf(part[j][t], scale[j], sum[j][t]) : part[j][t];
        }
    }
    dsv4_copy_wait<0>();
#pragma unroll
    for (int j = 0; j < FEW_EACH; j++)
#pragma unroll
        for (int t = 0; t < n_tok; t++)
            sum[j][t] = dsv4_lane_tree(sum[j][t]);
}

// The same for a weight of any format.
template <int n_tok>
DSV4_DEVICE void few_any(struct few_stages &s, const struct dsv4_weight &w, int32_t r0, int32_t end,
                         const dsv4_bf16 *const *x, int aligned, float sum[FEW_EACH][n_tok]) {
    if (w.format == DSV4_W_FP8 && w.scale_rule == DSV4_SCALE_FOLD)
        few_dots<DSV4_W_FP8, DSV4_SCALE_FOLD, n_tok>(s, w, r0, end, x, aligned, sum);
    else if (w.format == DSV4_W_FP8 && w.scale_rule == DSV4_SCALE_BLOCK)
        few_dots<DSV4_W_FP8, DSV4_SCALE_BLOCK, n_tok>(s, w, r0, end, x, aligned, sum);
    else if (w.format == DSV4_W_FP8)
        few_dots<DSV4_W_FP8, DSV4_SCALE_ROUND, n_tok>(s, w, r0, end, x, aligned, sum);
    else if (w.format == DSV4_W_FP4 && w.scale_rule == DSV4_SCALE_FOLD)
        few_dots<DSV4_W_FP4, DSV4_SCALE_FOLD, n_tok>(s, w, r0, end, x, aligned, sum);
    else if (w.format == DSV4_W_FP4)
        few_dots<DSV4_W_FP4, DSV4_SCALE_BLOCK, n_tok>(s, w, r0, end, x, aligned, sum);
    else if (w.format == DSV4_W_BF16)
        few_dots<DSV4_W_BF16, DSV4_SCALE_NONE, n_tok>(s, w, r0, end, x, aligned, sum);
    else
        few_dots<DSV4_W_F32, DSV4_SCALE_NONE, n_tok>(s, w, r0, end, x, aligned, sum);
}
