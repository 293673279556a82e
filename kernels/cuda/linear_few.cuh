// SPDX-License-Identifier: Apache-2.0
//
// Linear layers for one to eight tokens: a block owns 16 rows or fewer, whose bytes all its threads bring to shared memory
// with asynchronous 16-byte copies, four stages ahead, of one token also those of x; 16 threads, one for each lane of rule
// 1, make the sums of two rows.  So the loads do not wait for the sums, whose order is fixed: one chain of two
// multiply-adds per 32 columns and lane.  Fewer rows make longer stretches of each: layers of few rows still fill a device.
#pragma once

#include "weights.cuh"

enum { FEW_THREADS = 128, FEW_WARPS = FEW_THREADS / 32, FEW_ROWS = 16, FEW_EACH = 2, FEW_STAGES = 4,
       FEW_BYTES = 8192, FEW_PAD = 32, FEW_COLS = 1024, FEW_BLOCKS = 256 };

// The bytes of all rows in a stage; a row is followed by 32 of padding: rows 2 apart, as two halves of a warp read them,
// lie 16 banks apart.  x: of one token.
template <int n_tok> struct few_stages {
    uint4 w[FEW_STAGES][(FEW_BYTES + FEW_ROWS * FEW_PAD) / 16];
    uint4 x[FEW_STAGES][n_tok == 1 ? FEW_COLS / 8 : 1];
};

// Rows of a block (16, 8, 4 or 2), and bytes of a row in a stage, 16 << shift of them.
struct few_shape {
    int32_t rows, bytes, shift;
};

template <int format> DSV4_DEVICE struct few_shape shape_of(int32_t rows) {
    int32_t most = FEW_COLS / 32 * step_bytes<format>::value;
    struct few_shape g = {rows, FEW_BYTES / rows < most ? FEW_BYTES / rows : most, 0};
    while (16 << g.shift < g.bytes)
        g.shift++;
    return g;
}

// Bytes from `at` on of the block's rows, r0 up to row `end`, into one stage, +0 where there are none.
DSV4_DEVICE void few_fetch(uint4 *stage, const struct few_shape &g, const struct dsv4_weight &w, size_t bytes, int32_t r0,
                           int32_t end, size_t at) {
    for (int32_t i = (int32_t)threadIdx.x; i < g.rows << g.shift; i += FEW_THREADS) {
        int32_t row = i >> g.shift, piece = i - (row << g.shift);
        uint4 *to = stage + row * ((g.bytes + FEW_PAD) / 16) + piece;
        size_t from = at + 16 * (size_t)piece;
        const uint8_t *p = (const uint8_t *)w.data + (size_t)(r0 + row) * bytes + from;
        if (r0 + row >= end || from >= bytes) {
            *to = uint4{0, 0, 0, 0};
        } else if (from + 16 <= bytes && (uintptr_t)p % 16 == 0) {
            dsv4_copy16(to, p);
        } else {
            for (size_t j = 0; j < 16; j++)
                ((uint8_t *)to)[j] = from + j < bytes ? p[j] : (uint8_t)0;
        }
    }
}

// Columns from `first` on of x, as many as a stage has, +0 behind the end.
DSV4_DEVICE void few_fetch_x(uint4 *stage, const dsv4_bf16 *x, int32_t first, int32_t n, int32_t cols) {
    int32_t at = 8 * (int32_t)threadIdx.x;
    if (at >= n)
        return;
    uint4 *to = stage + threadIdx.x;
    const dsv4_bf16 *p = x + first + at;
    if (first + at + 8 <= cols && (uintptr_t)p % 16 == 0) {
        dsv4_copy16(to, p);
    } else {
        for (int32_t j = 0; j < 8; j++)
            ((dsv4_word16 *)to)[j] = first + at + j < cols ? p[j] : (dsv4_bf16)0;
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
DSV4_DEVICE void few_dots(struct few_stages<n_tok> &s, const struct dsv4_weight &w, int32_t rows, int32_t r0, int32_t end,
                          const dsv4_bf16 *const *x, int aligned, float sum[FEW_EACH][n_tok]) {
    const int STEP = step_bytes<format>::value;
    const int SPAN = format == DSV4_W_FP4 ? 1 : 4; // steps in which the scale of a row is one number
    const struct few_shape g = shape_of<format>(rows);
    int lane = (int)threadIdx.x % 16, own = (int)threadIdx.x / 16 * FEW_EACH;
    int32_t steps = g.bytes / STEP, cols = 32 * steps; // of a stage
    size_t bytes = row_bytes(w);
    int32_t n_stage = (int32_t)((bytes + (size_t)g.bytes - 1) / (size_t)g.bytes);
#pragma unroll
    for (int i = 0; i < FEW_EACH; i++)
#pragma unroll
        for (int t = 0; t < n_tok; t++)
            sum[i][t] = 0.0f;
    for (int32_t i = 1 - FEW_STAGES; i < n_stage; i++) {
        int32_t next = i + FEW_STAGES - 1;
        if (i >= 0) {
            dsv4_copy_wait<FEW_STAGES - 2>();
            __syncthreads(); // everybody's part of this stage is there, and the stage before is free
        }
        if (next < n_stage) {
            few_fetch(s.w[next % FEW_STAGES], g, w, bytes, r0, end, (size_t)next * (size_t)g.bytes);
            if (n_tok == 1)
                few_fetch_x(s.x[next % FEW_STAGES], x[0], next * cols, cols, w.cols);
        }
        dsv4_copy_commit();
        if (i < 0 || own >= rows)
            continue;
        const uint8_t *first_row = (const uint8_t *)s.w[i % FEW_STAGES] + own * (g.bytes + FEW_PAD);
        const dsv4_word32 *staged_x = (const dsv4_word32 *)s.x[i % FEW_STAGES] + lane;
#pragma unroll(format == DSV4_W_FP4 ? 4 : 1)
        for (int span = 0; span < steps; span += SPAN) {
            int32_t step0 = i * steps + span;
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
#pragma unroll
            for (int k = 0; k < SPAN; k++) {
                float even[FEW_EACH], odd[FEW_EACH];
#pragma unroll
                for (int j = 0; j < FEW_EACH; j++)
                    decode_pair<format, rule>(first_row + j * (g.bytes + FEW_PAD) + (span + k) * STEP, lane, scale[j],
                                              &even[j], &odd[j]);
#pragma unroll
                for (int t = 0; t < n_tok; t++) {
                    float x_even, x_odd;
                    if (n_tok == 1) {
                        uint32_t pair = staged_x[16 * (span + k)];
                        x_even = dsv4_low_bf16(pair);
                        x_odd = dsv4_high_bf16(pair);
                    } else {
                        few_x(x[t], 32 * (step0 + k) + 2 * lane, w.cols, aligned, &x_even, &x_odd);
                    }
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
DSV4_DEVICE void few_any(struct few_stages<n_tok> &s, const struct dsv4_weight &w, int32_t rows, int32_t r0, int32_t end,
                         const dsv4_bf16 *const *x, int aligned, float sum[FEW_EACH][n_tok]) {
    if (w.format == DSV4_W_FP8 && w.scale_rule == DSV4_SCALE_FOLD)
        few_dots<DSV4_W_FP8, DSV4_SCALE_FOLD, n_tok>(s, w, rows, r0, end, x, aligned, sum);
    else if (w.format == DSV4_W_FP8 && w.scale_rule == DSV4_SCALE_BLOCK)
        few_dots<DSV4_W_FP8, DSV4_SCALE_BLOCK, n_tok>(s, w, rows, r0, end, x, aligned, sum);
    else if (w.format == DSV4_W_FP8)
        few_dots<DSV4_W_FP8, DSV4_SCALE_ROUND, n_tok>(s, w, rows, r0, end, x, aligned, sum);
    else if (w.format == DSV4_W_FP4 && w.scale_rule == DSV4_SCALE_FOLD)
        few_dots<DSV4_W_FP4, DSV4_SCALE_FOLD, n_tok>(s, w, rows, r0, end, x, aligned, sum);
    else if (w.format == DSV4_W_FP4)
        few_dots<DSV4_W_FP4, DSV4_SCALE_BLOCK, n_tok>(s, w, rows, r0, end, x, aligned, sum);
    else if (w.format == DSV4_W_BF16)
        few_dots<DSV4_W_BF16, DSV4_SCALE_NONE, n_tok>(s, w, rows, r0, end, x, aligned, sum);
    else
        few_dots<DSV4_W_F32, DSV4_SCALE_NONE, n_tok>(s, w, rows, r0, end, x, aligned, sum);
}
