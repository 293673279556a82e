// SPDX-License-Identifier: Apache-2.0
//
// Hyper-connections, by blocks and threads of any kernel: the collapse of a token's streams with its gates, Sinkhorn and
// the norm that follows, and the spread of a sublayer's output.  Contracts: kernels.h, launches.h.
#pragma once

#include "cpu/ref/hyper_gates.h"
#include "rows.cuh"

struct collapse_work {
    struct mean_square_work sums;
    float pre[DSV4_HC_MAX], comb[DSV4_HC_MAX * DSV4_HC_MAX];
};

// dsv4_sinkhorn by one warp: lane l has entries l and l + 32, whose row and column sums it makes itself, by index
// ascending.
DSV4_DEVICE void warp_sinkhorn(float *comb, int32_t hc, int32_t iters, float eps) {
    int32_t lane = (int32_t)threadIdx.x % 32, all = hc * hc;
    float mine[2];
    for (int e = 0; e < 2; e++) {
        int32_t at = lane + 32 * e;
        if (at >= all)
            continue;
        const float *row = comb + at / hc * hc;
        float top = row[0];
        for (int32_t k = 1; k < hc; k++)
            if (row[k] > top)
                top = row[k];
        mine[e] = dsv4_expf(comb[at] - top);
    }
    __syncwarp();
    for (int e = 0; e < 2; e++)
        if (lane + 32 * e < all)
            comb[lane + 32 * e] = mine[e];
    __syncwarp();
    for (int32_t step = -1; step < 2 * iters - 1; step++) { // -1: rows of the softmax; then columns, rows, columns, ...
        int rows = step < 0 || step % 2;
        for (int e = 0; e < 2; e++) {
            int32_t at = lane + 32 * e;
            if (at >= all)
                continue;
            const float *line = rows ? comb + at / hc * hc : comb + at % hc;
            float sum = 0.0f;
            for (int32_t k = 0; k < hc; k++)
                sum += line[rows ? k : k * hc];
            mine[e] = step < 0 ? comb[at] / sum + eps : comb[at] / (sum + eps);
        }
        __syncwarp();
        for (int e = 0; e < 2; e++)
            if (lane + 32 * e < all)
                comb[lane + 32 * e] = mine[e];
        __syncwarp();
    }
}

// Columns c ... c + 8 (at most to the end) of the weighted sum of the streams.
DSV4_DEVICE void collapse_columns(dsv4_bf16 *x, const dsv4_bf16 *streams, const float *pre, int32_t hc, int32_t d,
                                  int32_t c) {
    float acc[8] = {};
    int whole = c + 8 <= d && d % 8 == 0 && (uintptr_t)streams % 16 == 0;
#pragma unroll
    for (int32_t j = 0; j < DSV4_HC_MAX; j++) {
        dsv4_bf16 h[8] = {};
        if (j >= hc)
            break;
        const dsv4_bf16 *from = streams + (int64_t)j * d + c;
        if (whole) {
            uint4 all = *(const uint4 *)(const void *)from;
            memcpy(h, &all, sizeof h);
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++)
                h[i] = c + i < d ? from[i] : (dsv4_bf16)0;
        }
#pragma unroll
        for (int i = 0; i < 8; i++)
            acc[i] = fmaf(pre[j], dsv4_bf16_to_f32(h[i]), acc[i]);
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (c + i < d)
            x[c + i] = dsv4_f32_to_bf16(acc[i]);
}

// Token t, by a block of two warps or more: the last one makes comb while the others collapse.
DSV4_DEVICE void block_collapse(struct collapse_work &s, const struct dsv4_cuda_collapse_args &a, int64_t t,
                                float mean_square) {
    int32_t hc = a.hc, i = (int32_t)threadIdx.x, others = a.post ? block_threads() - 32 : block_threads();
    const dsv4_bf16 *streams = a.streams + (int64_t)(a.tok ? a.tok[t] : t) * hc * a.d_model;
    const float *dots = a.dots + t * (a.post ? (2 + hc) * hc : hc);
    dsv4_bf16 *x = a.x + t * a.d_model;
    if (i < hc) {
        s.pre[i] = dsv4_hc_pre_gate(dots[i], dsv4_hc_r_wide(mean_square, a.norm_eps), a.scale[0], a.base[i], a.hc_eps);
        if (a.pre)
            a.pre[t * hc + i] = s.pre[i];
    }
    __syncthreads();
    for (int32_t c = 8 * i; i < others && c < a.d_model; c += 8 * others)
        collapse_columns(x, streams, s.pre, hc, a.d_model, c);
    if (i >= others) {
        int32_t lane = i - others;
        float r = dsv4_hc_r(mean_square, a.norm_eps);
        if (lane < hc)
            a.post[t * hc + lane] = dsv4_hc_post_gate(dsv4_hc_mix(dots[hc + lane], r, a.scale[1], a.base[hc + lane]));
        for (int32_t e = lane; e < hc * hc; e += 32)
            s.comb[e] = dsv4_hc_mix(dots[2 * hc + e], r, a.scale[2], a.base[2 * hc + e]);
        __syncwarp();
        warp_sinkhorn(s.comb, hc, a.sinkhorn_iters, a.hc_eps);
        for (int32_t e = lane; e < hc * hc; e += 32)
            a.comb[t * hc * hc + e] = s.comb[e];
    }
    if (!a.norm)
        return;
    __syncthreads();
    float r = dsv4_rsqrtf(block_mean_square(s.sums, x, a.d_model) + a.rms_eps);
    block_norm_operands(x, a.quant ? a.quant + t * a.d_model : NULL, a.plain ? a.plain + t * a.d_model : NULL, x, a.norm,
                        a.d_model, r);
}

// Column c of token t, whose streams are all read before one is written: out may be streams.
DSV4_DEVICE void spread_column(const struct dsv4_cuda_spread_args &a, int64_t t, int32_t c) {
    int64_t first = t * a.hc * a.d_model + c;
    const float *post = a.post + t * a.hc, *comb = a.comb + t * a.hc * a.hc;
    float stream[DSV4_HC_MAX], y = dsv4_bf16_to_f32(a.y[t * a.d_model + c]);
#pragma unroll
    for (int32_t j = 0; j < DSV4_HC_MAX; j++)
        if (j < a.hc)
            stream[j] = dsv4_bf16_to_f32(a.streams[first + (int64_t)j * a.d_model]);
    for (int32_t k = 0; k < a.hc; k++) {
        float acc = post[k] * y;
#pragma unroll
        for (int32_t j = 0; j < DSV4_HC_MAX; j++)
            if (j < a.hc)
                acc = fmaf(comb[j * a.hc + k], stream[j], acc);
        a.out[first + (int64_t)k * a.d_model] = dsv4_f32_to_bf16(acc);
    }
}
