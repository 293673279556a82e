// SPDX-License-Identifier: Apache-2.0
//
// Hyper-connections: the collapse of a token's streams with its gates, Sinkhorn and the norm that follows, and the spread
// of a sublayer's output.  Contracts: kernels.h, launches.h.
#include "cpu/ref/hyper_gates.h"
#include "rows.cuh"

struct gates {
    float pre[DSV4_HC_MAX], comb[DSV4_HC_MAX * DSV4_HC_MAX];
};

// dsv4_sinkhorn by one warp: lane l has entries l and l + 32, whose row and column sums it makes itself, by index
// ascending.
DSV4_DEVICE void warp_sinkhorn(float *comb, int32_t hc, int32_t iters, float eps) {
    int32_t lane = (int32_t)threadIdx.x, all = hc * hc;
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

DSV4_KERNEL(collapse_kernel, struct dsv4_cuda_collapse_args, ROW_THREADS, 1) {
    DSV4_SHARED(struct mean_square_work, s);
    DSV4_SHARED(struct gates, g);
    int32_t t = (int32_t)blockIdx.x, hc = a.hc, i = (int32_t)threadIdx.x;
    const dsv4_bf16 *streams = a.streams + (int64_t)(a.tok ? a.tok[t] : t) * hc * a.d_model;
    const float *dots = a.dots + (int64_t)t * (a.post ? (2 + hc) * hc : hc);
    float mean_square = block_mean_square(s, streams, hc * a.d_model);
    if (i < 32) {
        float r = dsv4_hc_r(mean_square, a.norm_eps);
        if (i < hc)
            g.pre[i] = dsv4_hc_pre_gate(dots[i], dsv4_hc_r_wide(mean_square, a.norm_eps), a.scale[0], a.base[i], a.hc_eps);
        if (a.pre && i < hc)
            a.pre[(int64_t)t * hc + i] = g.pre[i];
        if (a.post) {
            if (i < hc)
                a.post[(int64_t)t * hc + i] = dsv4_hc_post_gate(dsv4_hc_mix(dots[hc + i], r, a.scale[1], a.base[hc + i]));
            for (int32_t e = i; e < hc * hc; e += 32)
                g.comb[e] = dsv4_hc_mix(dots[2 * hc + e], r, a.scale[2], a.base[2 * hc + e]);
            __syncwarp();
            warp_sinkhorn(g.comb, hc, a.sinkhorn_iters, a.hc_eps);
            for (int32_t e = i; e < hc * hc; e += 32)
                a.comb[(int64_t)t * hc * hc + e] = g.comb[e];
        }
    }
    __syncthreads();
    dsv4_bf16 *x = a.x + (int64_t)t * a.d_model;
    for (int32_t c = i; c < a.d_model; c += ROW_THREADS) {
        float acc = 0.0f;
        for (int32_t j = 0; j < hc; j++)
            acc = fmaf(g.pre[j], dsv4_bf16_to_f32(streams[(int64_t)j * a.d_model + c]), acc);
        x[c] = dsv4_f32_to_bf16(acc);
    }
    if (!a.norm)
        return;
    __syncthreads();
    float r = dsv4_rsqrtf(block_mean_square(s, x, a.d_model) + a.rms_eps);
    block_norm_operands(x, a.quant ? a.quant + (int64_t)t * a.d_model : NULL,
                        a.plain ? a.plain + (int64_t)t * a.d_model : NULL, x, a.norm, a.d_model, r);
}

int dsv4_cuda_collapse(const struct dsv4_cuda_collapse_args *a, void *stream) {
    if (a->n_tok)
        DSV4_LAUNCH(collapse_kernel, (unsigned)a->n_tok, ROW_THREADS, stream, *a);
    return 0;
}

// A thread per column of a token, which reads all streams of it before it writes: out may be streams.
DSV4_KERNEL(spread_kernel, struct dsv4_cuda_spread_args, ROW_THREADS, 1) {
    int64_t i = (int64_t)blockIdx.x * ROW_THREADS + (int32_t)threadIdx.x;
    if (i >= (int64_t)a.n_tok * a.d_model)
        return;
    int64_t t = i / a.d_model, c = i % a.d_model, first = t * a.hc * a.d_model + c;
    const float *post = a.post + t * a.hc, *comb = a.comb + t * a.hc * a.hc;
    float stream[DSV4_HC_MAX], y = dsv4_bf16_to_f32(a.y[i]);
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

int dsv4_cuda_spread(const struct dsv4_cuda_spread_args *a, void *stream) {
    size_t n = (size_t)a->n_tok * (size_t)a->d_model;
    if (n)
        DSV4_LAUNCH(spread_kernel, dsv4_blocks(n, ROW_THREADS), ROW_THREADS, stream, *a);
    return 0;
}
