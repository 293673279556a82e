// SPDX-License-Identifier: Apache-2.0
//
// A row of activations and the threads that work on it, a block of any size, a warp or half of one: sums, norms, rope, FP8
// and FP4 groups.  Bits: kernels.h.
#pragma once

#include "device.cuh"

enum { ROW_THREADS = 256, ROW_WARPS = ROW_THREADS / 32, STAGED = 4096, ENTRY_MAX = 2048 };
enum { INDEX_ROW_MAX = 256, INDEX_EACH = INDEX_ROW_MAX / 32 };

DSV4_DEVICE int32_t block_threads() {
    return (int32_t)blockDim.x;
}

DSV4_DEVICE int32_t block_warps() {
    return (int32_t)blockDim.x / 32;
}

// -------------------------------------------------------------------------------------- mean square by a whole block

struct mean_square_work {
    uint4 staged[STAGED / 8]; // bf16 operands
    float sum;
};

// x[at ... at + 8) of n as operands, +0 behind the end.
DSV4_DEVICE uint4 eight_operands(const dsv4_bf16 *x, int32_t at, int32_t n) {
    dsv4_bf16 h[8];
    if (at + 8 <= n && (uintptr_t)(x + at) % 16 == 0) {
        memcpy(h, x + at, sizeof h);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            h[i] = at + i < n ? x[at + i] : (dsv4_bf16)0;
    }
    uint4 out;
    uint32_t *word[4] = {&out.x, &out.y, &out.z, &out.w};
#pragma unroll
    for (int i = 0; i < 4; i++)
        *word[i] = dsv4_pair_operands(h[2 * i], h[2 * i + 1]);
    return out;
}

// dot(x, x) / n by rule 1, for every thread of the block.
DSV4_DEVICE float block_mean_square(struct mean_square_work &s, const dsv4_bf16 *x, int32_t n) {
    float lane = 0.0f;
    for (int32_t first = 0; first < n; first += STAGED) {
        for (int32_t i = (int32_t)threadIdx.x; i < STAGED / 8; i += block_threads())
            s.staged[i] = eight_operands(x, first + 8 * i, n);
        __syncthreads();
        if (threadIdx.x < 32) { // both halves of the warp make the same sums
            const dsv4_word32 *pairs = (const dsv4_word32 *)s.staged + threadIdx.x % 16;
            int32_t steps = n - first < STAGED ? (n - first + 31) / 32 : STAGED / 32;
#pragma unroll 8
            for (int32_t k = 0; k < steps; k++) {
                uint32_t pair = pairs[16 * k];
                float odd = dsv4_high_bf16(pair), even = dsv4_low_bf16(pair);
                lane = dsv4_mad(odd, odd, lane);
                lane = dsv4_mad(even, even, lane);
            }
        }
        __syncthreads();
    }
    if (threadIdx.x < 32) {
        lane = dsv4_lane_tree(lane);
        if (threadIdx.x == 0)
            s.sum = lane;
    }
    __syncthreads();
    return s.sum / (float)n;
}

// --------------------------------------------------------------------------------------- groups with a scale, by a warp

DSV4_DEVICE uint8_t scale_of_group(uint32_t largest, float floor, float inv_max) {
    if (largest >= 0x7f80u)
        return 255;
    float amax = dsv4_bf16_to_f32((dsv4_bf16)largest);
    return dsv4_group_scale(amax > floor ? amax : floor, inv_max);
}

DSV4_DEVICE float inverse_scale(uint8_t scale) {
    return dsv4_f32_from_bits((254u - scale) << 23);
}

// The scale of the group whose values a warp holds, each lane `each` of them.
template <int each>
DSV4_DEVICE uint8_t warp_scale(const dsv4_bf16 *h, float floor, float inv_max) {
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < each; i++) {
        uint32_t magnitude = h[i] & 0x7fffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    return scale_of_group(dsv4_warp_max(largest), floor, inv_max);
}

DSV4_DEVICE uint8_t fp8_code(dsv4_bf16 h, uint8_t scale) {
    return scale == 255 ? (uint8_t)0x7f : dsv4_e4m3_from_f32(dsv4_bf16_to_f32(h) * inverse_scale(scale));
}

DSV4_DEVICE dsv4_bf16 fp8_value(uint8_t code, uint8_t scale) {
    return scale == 255 ? (dsv4_bf16)0x7fc0 : dsv4_f32_to_bf16(dsv4_e4m3_to_f32(code) * dsv4_e8m0_to_f32(scale));
}

// act_quant of one group of up to 128, four values a lane (those behind n are zeros): value, code and scale.
DSV4_DEVICE uint8_t warp_act_quant(dsv4_bf16 *h, uint8_t *codes) {
    uint8_t scale = warp_scale<4>(h, 1e-4f, 1.0f / 448.0f);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        codes[i] = fp8_code(h[i], scale);
        h[i] = fp8_value(codes[i], scale);
    }
    return scale;
}

// Values at ... at + 4 of n, +0 behind the end.
DSV4_DEVICE void load_four(dsv4_bf16 *h, const dsv4_bf16 *x, int32_t at, int32_t n) {
    if (at + 4 <= n && (uintptr_t)(x + at) % 8 == 0) {
        memcpy(h, __builtin_assume_aligned(x + at, 8), 4 * sizeof *h);
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
        h[i] = at + i < n ? x[at + i] : (dsv4_bf16)0;
}

// rmsnorm of one group of 128 of a row by a warp, four values a lane, and the operands made of it; any output may be NULL.
DSV4_DEVICE void warp_norm_group(dsv4_bf16 *out, dsv4_bf16 *quant, dsv4_bf16 *plain, const dsv4_bf16 *in, const float *w,
                                 int32_t at, int32_t n, float r) {
    dsv4_bf16 h[4];
    uint8_t codes[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        h[i] = at + i < n ? dsv4_f32_to_bf16(w[i] * (dsv4_bf16_to_f32(in[i]) * r)) : (dsv4_bf16)0;
        if (out && at + i < n)
            out[at + i] = h[i];
        if (plain && at + i < n)
            plain[at + i] = dsv4_bf16_operand(h[i]);
    }
    if (quant) {
        warp_act_quant(h, codes);
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (at + i < n)
                quant[at + i] = h[i];
    }
}

// rmsnorm of a row by all warps of a block, and the operands made of it; any output may be NULL, `out` may be x.
DSV4_DEVICE void block_norm_operands(dsv4_bf16 *out, dsv4_bf16 *quant, dsv4_bf16 *plain, const dsv4_bf16 *x,
                                     const float *w, int32_t n, float r) {
    int32_t warp = (int32_t)threadIdx.x / 32, lane = (int32_t)threadIdx.x % 32;
    for (int32_t first = warp * DSV4_ACT_GROUP; first < n; first += block_warps() * DSV4_ACT_GROUP) {
        int32_t at = first + 4 * lane;
        dsv4_bf16 in[4];
        float own[4];
        load_four(in, x, at, n);
#pragma unroll
        for (int i = 0; i < 4; i++)
            own[i] = at + i < n ? w[at + i] : 0.0f;
        warp_norm_group(out, quant, plain, in, own, at, n, r);
    }
}

enum { NORM_ROWS = DSV4_CUDA_FEW_TILE, NORM_COLS = 2048 };

struct norm_rows_work {
    uint4 staged[NORM_ROWS][NORM_COLS / 8];
    float r[NORM_ROWS];
};

// Up to NORM_ROWS rows of `rmsnorm` at once, by a block of 16 threads for each: a half warp makes the sum of a row.
DSV4_DEVICE void block_norm_rows(struct norm_rows_work &s, const struct dsv4_cuda_rmsnorm_args &a) {
    int32_t i = (int32_t)threadIdx.x, row = i / 16;
    float sum = 0.0f;
    for (int32_t first = 0; first < a.n; first += NORM_COLS) {
        int32_t steps = a.n - first < NORM_COLS ? (a.n - first + 31) / 32 : NORM_COLS / 32;
#pragma unroll 4
        for (int32_t e = i; e < 4 * steps * a.n_row; e += block_threads())
            s.staged[e / (4 * steps)][e % (4 * steps)] =
                eight_operands(a.x + (int64_t)(e / (4 * steps)) * a.n, first + 8 * (e % (4 * steps)), a.n);
        __syncthreads();
        const dsv4_word32 *pairs = (const dsv4_word32 *)s.staged[row] + i % 16;
#pragma unroll 8
        for (int32_t k = 0; row < a.n_row && k < steps; k++) {
            float odd = dsv4_high_bf16(pairs[16 * k]), even = dsv4_low_bf16(pairs[16 * k]);
            sum = dsv4_mad(odd, odd, sum);
            sum = dsv4_mad(even, even, sum);
        }
        __syncthreads();
    }
    sum = dsv4_lane_tree(sum);
    if (i % 16 == 0 && row < a.n_row)
        s.r[row] = dsv4_rsqrtf(sum / (float)a.n + a.eps);
    __syncthreads();
    for (int32_t first = i / 32 * DSV4_ACT_GROUP; first < a.n; first += block_warps() * DSV4_ACT_GROUP) {
        int32_t at = first + 4 * (i % 32);
        dsv4_bf16 in[NORM_ROWS][4];
        float own[4];
#pragma unroll
        for (int k = 0; k < 4; k++)
            own[k] = at + k < a.n ? a.w[at + k] : 0.0f;
#pragma unroll
        for (int k = 0; k < NORM_ROWS; k++) // all are under way before the first is used
            if (k < a.n_row)
                load_four(in[k], a.x + (int64_t)k * a.n, at, a.n);
#pragma unroll
        for (int k = 0; k < NORM_ROWS; k++) {
            int64_t to = (int64_t)k * a.n;
            if (k < a.n_row)
                warp_norm_group(a.out ? a.out + to : NULL, a.quant ? a.quant + to : NULL, a.plain ? a.plain + to : NULL,
                                in[k], own, at, a.n, s.r[k]);
        }
    }
}

// ------------------------------------------------------------------------------------ a row in shared memory, by a block

// row[c] = rmsnorm of row, whose mean square is known; then the last 2 n_pair rotated by the table at cos, sin.
DSV4_DEVICE void block_norm_rope(dsv4_bf16 *row, const float *w, int32_t n, float r, const float *cos, const float *sin,
                                 int32_t n_pair) {
    for (int32_t c = (int32_t)threadIdx.x; c < n; c += block_threads())
        row[c] = dsv4_f32_to_bf16(w[c] * (dsv4_bf16_to_f32(row[c]) * r));
    __syncthreads();
    dsv4_bf16 *x = row + n - 2 * n_pair;
    for (int32_t i = (int32_t)threadIdx.x; i < n_pair; i += block_threads()) {
        float a = dsv4_bf16_to_f32(x[2 * i]), b = dsv4_bf16_to_f32(x[2 * i + 1]);
        x[2 * i] = dsv4_f32_to_bf16(a * cos[i] - b * sin[i]);
        x[2 * i + 1] = dsv4_f32_to_bf16(a * sin[i] + b * cos[i]);
    }
    __syncthreads();
}

// kv_store by all warps of a block; `row` in any memory.
DSV4_DEVICE void block_kv_store(uint8_t *out, const dsv4_bf16 *row, enum dsv4_kv_format f, int32_t d_head,
                                int32_t d_rope) {
    int32_t warp = (int32_t)threadIdx.x / 32, lane = (int32_t)threadIdx.x % 32;
    int32_t nope = f == DSV4_KV_FP8 ? d_head - d_rope : 0, groups = nope / DSV4_KV_GROUP;
    uint8_t *scales = out + nope + 2 * (d_head - nope);
    for (int32_t g = warp; g < groups; g += block_warps()) {
        int32_t at = g * DSV4_KV_GROUP + 2 * lane;
        dsv4_bf16 h[2] = {row[at], row[at + 1]};
        uint8_t scale = warp_scale<2>(h, 1e-4f, 1.0f / 448.0f);
        out[at] = fp8_code(h[0], scale);
        out[at + 1] = fp8_code(h[1], scale);
        if (lane == 0)
            scales[g] = scale;
    }
    for (int32_t d = nope + (int32_t)threadIdx.x; d < d_head; d += block_threads())
        memcpy(out + nope + 2 * (d - nope), row + d, 2);
    if (f == DSV4_KV_FP8) {
        int32_t end = (int32_t)(out + dsv4_kv_row_bytes(f, d_head, d_rope) - scales);
        for (int32_t i = groups + (int32_t)threadIdx.x; i < end; i += block_threads())
            scales[i] = 0;
    }
}

// ------------------------------------------------------------------------------------------------- index rows, by a warp

// A row of n <= 256 values: lane l has those at l, 32 + l, ...
DSV4_DEVICE void warp_row_load(float v[INDEX_EACH], const dsv4_bf16 *x, int32_t n) {
    int32_t lane = (int32_t)threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < INDEX_EACH; j++)
        v[j] = 32 * j + lane < n ? dsv4_bf16_to_f32(x[32 * j + lane]) : 0.0f;
}

// Rotates the last 2 n_pair of n values by a token's table; n a multiple of 32.
DSV4_DEVICE void warp_row_rope(float v[INDEX_EACH], int32_t n, const float *cos, const float *sin, int32_t n_pair) {
    int32_t lane = (int32_t)threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < INDEX_EACH; j++) {
        float other = __shfl_xor_sync(DSV4_FULL_WARP, v[j], 1);
        int32_t at = 32 * j + lane - (n - 2 * n_pair);
        if (at < 0 || 32 * j >= n)
            continue;
        float c = cos[at / 2], s = sin[at / 2];
        v[j] = dsv4_round_bf16(at % 2 ? other * s + v[j] * c : v[j] * c - other * s);
    }
}

// n a power of two.
DSV4_DEVICE void warp_row_hadamard(float v[INDEX_EACH], int32_t n) {
    int32_t lane = (int32_t)threadIdx.x % 32;
    float scale = (float)(1.0 / sqrt((double)n));
#pragma unroll
    for (int stride = 1; stride < 32; stride *= 2) {
#pragma unroll
        for (int j = 0; j < INDEX_EACH; j++) {
            float other = __shfl_xor_sync(DSV4_FULL_WARP, v[j], stride);
            if (stride < n)
                v[j] = lane & stride ? other - v[j] : v[j] + other;
        }
    }
#pragma unroll
    for (int stride = 1; stride < INDEX_EACH; stride *= 2)
#pragma unroll
        for (int j = 0; j < INDEX_EACH; j++)
            if (!(j & stride) && 32 * stride < n) {
                float a = v[j], b = v[j + stride];
                v[j] = a + b;
                v[j + stride] = a - b;
            }
#pragma unroll
    for (int j = 0; j < INDEX_EACH; j++)
        v[j] = dsv4_round_bf16(v[j] * scale);
}

// index_store.
DSV4_DEVICE void warp_index_store(uint8_t *out, const float v[INDEX_EACH], int32_t n) {
    int32_t lane = (int32_t)threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < INDEX_EACH; j++) {
        if (32 * j >= n)
            break; // the whole warp
        dsv4_bf16 h = dsv4_f32_to_bf16(v[j]);
        uint8_t scale = warp_scale<1>(&h, 0x1.8p-124f, 1.0f / 6.0f);
        uint32_t code = scale == 255 ? 0u : dsv4_e2m1_from_f32(v[j] * inverse_scale(scale));
        uint32_t high = __shfl_xor_sync(DSV4_FULL_WARP, code, 1);
        if (lane % 2 == 0)
            out[16 * j + lane / 2] = (uint8_t)(code | high << 4);
        if (lane == 0)
            out[n / 2 + j] = scale;
    }
}

// One row of `index`.
DSV4_DEVICE void warp_index_row(const struct dsv4_cuda_index_args &a, int64_t row) {
    float v[INDEX_EACH];
    int64_t angle = row / a.per_tok * a.n_pair;
    warp_row_load(v, a.x + row * a.n, a.n);
    if (a.cos)
        warp_row_rope(v, a.n, a.cos + angle, a.sin + angle, a.n_pair);
    if (a.hadamard)
        warp_row_hadamard(v, a.n);
    warp_index_store(a.rows + row * (int64_t)dsv4_index_row_bytes(a.n), v, a.n);
}

// ------------------------------------------------------------------------------------------------------- single launches

// One group of 128 of a row of `act`, by a warp.
DSV4_DEVICE void warp_act(const struct dsv4_cuda_act_args &a, int64_t row, int32_t group) {
    int32_t groups = (a.n + DSV4_ACT_GROUP - 1) / DSV4_ACT_GROUP, lane = (int32_t)threadIdx.x % 32;
    int32_t at = group * DSV4_ACT_GROUP + 4 * lane;
    int64_t first = row * a.n + at;
    dsv4_bf16 h[4];
    uint8_t codes[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        h[i] = at + i < a.n ? a.x[first + i] : (dsv4_bf16)0;
    if (a.quant) {
        uint8_t scale = warp_act_quant(h, codes);
        if (a.scales && lane == 0)
            a.scales[row * groups + group] = scale;
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++)
            h[i] = dsv4_bf16_operand(h[i]);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (at + i >= a.n)
            break;
        a.out[first + i] = h[i];
        if (a.quant && a.codes)
            a.codes[first + i] = codes[i];
    }
}

// One row of `headnorm`, by 16 lanes, each with the pairs of its lane of rule 1; n may be odd where nothing is rotated.
DSV4_DEVICE void half_warp_headnorm(const struct dsv4_cuda_headnorm_args &a, int64_t row) {
    int32_t lane = (int32_t)threadIdx.x % 16;
    int there = row < a.n_row;
    int32_t end = there ? a.n : 0; // a row that is not there takes part in the shuffles alone
    dsv4_bf16 *x = a.x + row * a.n;
    float sum = 0.0f;
#pragma unroll 8
    for (int32_t at = 2 * lane; at < end; at += 32) {
        float even = dsv4_bf16_to_f32(x[at]), odd = at + 1 < end ? dsv4_bf16_to_f32(x[at + 1]) : 0.0f;
        sum = sum + dsv4_f32_operand(dsv4_round_bf16(odd * odd));
        sum = sum + dsv4_f32_operand(dsv4_round_bf16(even * even));
    }
    sum = __shfl_sync(DSV4_FULL_WARP, dsv4_lane_tree(sum), (int)(threadIdx.x & 16));
    float m = dsv4_round_bf16(sum / (float)a.n);
    float r = dsv4_round_bf16(1.0f / sqrtf(dsv4_round_bf16(m + dsv4_round_bf16(a.eps))));
    int32_t rotated = a.cos ? a.n - 2 * a.n_pair : a.n;
#pragma unroll 4
    for (int32_t at = 2 * lane; at < end; at += 32) {
        float even = dsv4_round_bf16(dsv4_bf16_to_f32(x[at]) * r);
        float odd = at + 1 < end ? dsv4_round_bf16(dsv4_bf16_to_f32(x[at + 1]) * r) : 0.0f;
        if (at >= rotated) {
            int64_t i = row / a.per_tok * a.n_pair + (at - rotated) / 2;
            float c = a.cos[i], s = a.sin[i], first = even;
            even = even * c - odd * s;
            odd = first * s + odd * c;
        }
        x[at] = dsv4_f32_to_bf16(even);
        if (at + 1 < end)
            x[at + 1] = dsv4_f32_to_bf16(odd);
    }
}
