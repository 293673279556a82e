// SPDX-License-Identifier: Apache-2.0
//
// Attention of prompts on tensor cores: scores, then the softmax of ref's order, then values, each a launch.  All heads of
// a token read the same keys, so a token alone is a matrix product: heads by ranks over the dimensions, heads by
// dimensions over the ranks.  A block is one token's, so nothing depends on how many there are.  Operands are those of
// kernels.h (P as bf16 among them); sums are mma.m16n8k16 in ascending order.  Error: launches.h.
#include "attention.cuh"

enum { MMA_THREADS = 128, HEADS = 64, DIMS = 128, WARP_HEADS = 32, WARP_RANKS = 32, WARP_DIMS = 64, SOFT_WARPS = 4 };
// words between rows.  Scores: lanes (g, q) read 16 bytes at row g, column 4 q; two rows are 16 banks apart.
enum { SCORE_STRIDE = DIMS / 2 + 16 };
// values: lanes read a word at row g, column q of P, and at row q, column g of keys
enum { P_STRIDE = BLOCK / 2 + 4, KEY_STRIDE = DIMS + 8 };

// Dimensions d ... d + 3 (d a multiple of 4) of a KV row as two pairs of operands.
DSV4_DEVICE void key_four(uint32_t out[2], const uint8_t *row, int32_t d, const struct dsv4_cuda_attention_args &a) {
    if (!row) {
        out[0] = out[1] = 0u;
    } else if (a.format == DSV4_KV_FP8 && d + 4 <= a.d_head - a.d_rope && (uintptr_t)row % 4 == 0) {
        uint32_t codes = *(const dsv4_word32 *)(row + d);
        float scale = dsv4_e8m0_to_f32(row[a.d_head + a.d_rope + d / DSV4_KV_GROUP]);
#pragma unroll
        for (int i = 0; i < 2; i++)
            out[i] = scaled_pair(i ? codes >> 16 : codes & 0xffffu, scale);
    } else {
        out[0] = key_pair(row, d, a);
        out[1] = d + 2 < a.d_head ? key_pair(row, d + 2, a) : 0u;
    }
}

struct mma_score_work {
    alignas(16) uint32_t q[HEADS][SCORE_STRIDE], k[BLOCK][SCORE_STRIDE]; // pairs of dimensions
    const uint8_t *keys[BLOCK];
};

// blockIdx: block of ranks, group of 64 heads, token.  A warp makes 32 heads by 32 ranks.
DSV4_KERNEL(mma_score_kernel, struct attention_args, MMA_THREADS, 4) {
    DSV4_SHARED(struct mma_score_work, s);
    const struct dsv4_cuda_attention_args &o = a.of;
    struct parts to = cut(o);
    int32_t t = (int32_t)blockIdx.z, h0 = (int32_t)blockIdx.y * HEADS, first = (int32_t)blockIdx.x * BLOCK;
    int32_t n_key = keys_of(a, t), i = (int32_t)threadIdx.x;
    int32_t warp = i / 32, g = i % 32 / 4, q = i % 4, head0 = warp / 2 * WARP_HEADS, rank0 = warp % 2 * WARP_RANKS;
    if (first >= n_key && first > 0)
        return;
    int any = stage_keys(s.keys, a, t, first, n_key);
    float acc[WARP_HEADS / 16][WARP_RANKS / 8][4] = {};
    for (int32_t d0 = 0; d0 < o.d_head; d0 += DIMS) {
#pragma unroll 4
        for (int32_t e = i; e < BLOCK * (DIMS / 4); e += MMA_THREADS) {
            int32_t r = e / (DIMS / 4), d = e % (DIMS / 4) * 4;
            uint32_t pairs[2] = {};
            if (d0 + d < o.d_head)
                key_four(pairs, s.keys[r], d0 + d, o);
            s.k[r][d / 2] = pairs[0];
            s.k[r][d / 2 + 1] = pairs[1];
        }
#pragma unroll 4
        for (int32_t e = i; e < HEADS * (DIMS / 2); e += MMA_THREADS) {
            int32_t h = e / (DIMS / 2), d = e % (DIMS / 2) * 2;
            uint32_t pair = 0;
            if (h0 + h < o.n_head && d0 + d < o.d_head) {
                const dsv4_bf16 *x = o.q + ((int64_t)t * o.n_head + h0 + h) * o.d_head + d0 + d;
                pair = dsv4_pair_operands(x[0], x[1]);
            }
            s.q[h][d / 2] = pair;
        }
        __syncthreads();
#pragma unroll
        for (int32_t d = 0; d < DIMS / 2; d += 16) { // 32 dimensions, in the order of linear_mma.cu
            uint4 b[WARP_RANKS / 8];
#pragma unroll
            for (int n = 0; n < WARP_RANKS / 8; n++)
                b[n] = *(const uint4 *)&s.k[rank0 + 8 * n + g][d + 4 * q];
#pragma unroll
            for (int m = 0; m < WARP_HEADS / 16; m++) {
                uint4 low = *(const uint4 *)&s.q[head0 + 16 * m + g][d + 4 * q];
                uint4 high = *(const uint4 *)&s.q[head0 + 16 * m + g + 8][d + 4 * q];
                const uint32_t x[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
#pragma unroll
                for (int n = 0; n < WARP_RANKS / 8; n++) {
                    const uint32_t y[2][2] = {{b[n].x, b[n].y}, {b[n].z, b[n].w}};
                    dsv4_mma(acc[m][n], x[0], y[0]);
                    dsv4_mma(acc[m][n], x[1], y[1]);
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int m = 0; m < WARP_HEADS / 16; m++)
#pragma unroll
        for (int j = 0; j < WARP_RANKS / 2; j++) { // fragments: heads 16 m + g and + 8, ranks 8 n + 2 q and + 1
            int32_t c = j % 4, h = head0 + 16 * m + g + c / 2 * 8, rank = rank0 + j / 4 * 8 + 2 * q + c % 2;
            if (h0 + h < o.n_head)
                to.p[((size_t)t * (size_t)o.n_head + (size_t)(h0 + h)) * to.ranks + (size_t)(first + rank)] =
                    s.keys[rank] ? acc[m][j / 4][c] * o.scale : -DSV4_INF;
        }
    if (i < HEADS && h0 + i < o.n_head)
        to.c[((size_t)t * (size_t)o.n_head + (size_t)(h0 + i)) * to.blocks + blockIdx.x] = any ? 0.0f : NO_KEYS;
}

struct mma_soft_work {
    float p[SOFT_WARPS][BLOCK];
};

// A warp per (token, head).
DSV4_KERNEL(mma_soft_kernel, struct dsv4_cuda_attention_args, 32 * SOFT_WARPS, 4) {
    DSV4_SHARED(struct mma_soft_work, s);
    int64_t row = (int64_t)blockIdx.x * SOFT_WARPS + threadIdx.x / 32;
    if (row < (int64_t)a.n_tok * a.n_head) // whole warps
        warp_softmax(s.p[threadIdx.x / 32], cut(a), row, a.n_key[row / a.n_head], a.sink[row % a.n_head]);
}

struct mma_value_work {
    alignas(16) uint32_t k[BLOCK / 2][KEY_STRIDE]; // ranks 2i and 2i + 1 of a dimension
    uint32_t p[HEADS][P_STRIDE];       // pairs of ranks
    float c[HEADS];
    const uint8_t *keys[BLOCK];
};

// Keys of 64 ranks and 128 dimensions as pairs of ranks, and P as operands.
DSV4_DEVICE void stage_values(struct mma_value_work &s, const struct dsv4_cuda_attention_args &a, const struct parts &from,
                              size_t row0, int32_t heads, int32_t first, int32_t d0) {
    int32_t i = (int32_t)threadIdx.x;
#pragma unroll 4
    for (int32_t e = i; e < BLOCK / 2 * (DIMS / 4); e += MMA_THREADS) {
        int32_t r = e / (DIMS / 4), d = e % (DIMS / 4) * 4;
        uint32_t even[2] = {}, odd[2] = {};
        if (d0 + d < a.d_head) {
            key_four(even, s.keys[2 * r], d0 + d, a);
            key_four(odd, s.keys[2 * r + 1], d0 + d, a);
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            s.k[r][d + 2 * j] = (even[j] & 0xffffu) | odd[j] << 16;
            s.k[r][d + 2 * j + 1] = even[j] >> 16 | (odd[j] & 0xffff0000u);
        }
    }
#pragma unroll 4
    for (int32_t e = i; e < HEADS * (BLOCK / 2); e += MMA_THREADS) {
        int32_t h = e / (BLOCK / 2), r = e % (BLOCK / 2) * 2;
        uint32_t pair = 0;
        if (h < heads) {
            const float *p = from.p + (row0 + (size_t)h) * from.ranks + (size_t)(first + r);
            pair = dsv4_pair_bf16(rounded_operand(p[0]), rounded_operand(p[1]));
        }
        s.p[h][r / 2] = pair;
    }
}

// Two neighbouring dimensions of one head as they leave attention.
DSV4_DEVICE void store_pair(const struct dsv4_cuda_attention_args &a, int32_t t, int64_t row, int32_t d, float even,
                            float odd) {
    dsv4_bf16 x[2] = {even == even ? dsv4_f32_to_bf16(even) : (dsv4_bf16)0x7fc0,
                      odd == odd ? dsv4_f32_to_bf16(odd) : (dsv4_bf16)0x7fc0};
    int32_t at = d - (a.d_head - a.d_rope);
    if (a.cos && at >= 0) {
        int64_t angle = (int64_t)t * (a.d_rope / 2) + at / 2;
        float p = dsv4_bf16_to_f32(x[0]), q = dsv4_bf16_to_f32(x[1]), c = a.cos[angle], s = -a.sin[angle];
        x[0] = dsv4_f32_to_bf16(p * c - q * s);
        x[1] = dsv4_f32_to_bf16(p * s + q * c);
    }
    for (int i = 0; i < 2; i++)
        a.out[row * a.d_head + d + i] = a.flush ? dsv4_bf16_operand(x[i]) : x[i];
}

// blockIdx: group of 128 dimensions, group of 64 heads, token.  A warp makes 32 heads by 64 dimensions.
DSV4_KERNEL(mma_value_kernel, struct dsv4_cuda_attention_args, MMA_THREADS, 3) {
    DSV4_SHARED(struct mma_value_work, s);
    struct parts from = cut(a);
    int32_t t = (int32_t)blockIdx.z, h0 = (int32_t)blockIdx.y * HEADS, d0 = (int32_t)blockIdx.x * DIMS;
    int32_t n_key = a.n_key[t], i = (int32_t)threadIdx.x, heads = a.n_head - h0 < HEADS ? a.n_head - h0 : HEADS;
    int32_t warp = i / 32, g = i % 32 / 4, q = i % 4, head0 = warp / 2 * WARP_HEADS, dim0 = warp % 2 * WARP_DIMS;
    size_t row0 = (size_t)t * (size_t)a.n_head + (size_t)h0;
    const uint8_t *const *keys = a.keys + (int64_t)t * a.max_key;
    float acc[WARP_HEADS / 16][WARP_DIMS / 8][4] = {};
    for (int32_t first = 0; first < n_key; first += BLOCK) {
        if (i < BLOCK)
            s.keys[i] = first + i < n_key ? keys[first + i] : NULL;
        if (i < heads)
            s.c[i] = from.c[(row0 + (size_t)i) * from.blocks + (size_t)(first / BLOCK)];
        __syncthreads();
        if (s.c[0] != NO_KEYS) { // of all heads
            stage_values(s, a, from, row0, heads, first, d0);
            __syncthreads();
#pragma unroll
            for (int m = 0; m < WARP_HEADS / 16; m++) {
#pragma unroll
                for (int j = 0; j < WARP_DIMS / 2; j++) {
                    int32_t h = head0 + 16 * m + g + j % 4 / 2 * 8;
                    float x = h < heads ? acc[m][j / 4][j % 4] * s.c[h] : 0.0f;
                    acc[m][j / 4][j % 4] = fabsf(x) < 0x1p-95f ? 0.0f : x;
                }
            }
#pragma unroll
            for (int k = 0; k < BLOCK / 2; k += 8) { // 16 ranks
                uint32_t x[WARP_HEADS / 16][4];
#pragma unroll
                for (int m = 0; m < WARP_HEADS / 16; m++)
#pragma unroll
                    for (int j = 0; j < 4; j++)
                        x[m][j] = s.p[head0 + 16 * m + g + j % 2 * 8][k + q + j / 2 * 4];
#pragma unroll
                for (int n = 0; n < WARP_DIMS / 8; n++) {
                    const uint32_t y[2] = {s.k[k + q][dim0 + 8 * n + g], s.k[k + q + 4][dim0 + 8 * n + g]};
#pragma unroll
                    for (int m = 0; m < WARP_HEADS / 16; m++)
                        dsv4_mma(acc[m][n], x[m], y);
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int m = 0; m < WARP_HEADS / 16; m++)
#pragma unroll
        for (int j = 0; j < WARP_DIMS / 4; j++) { // fragments: heads 16 m + g and + 8, dimensions 8 n + 2 q and + 1
            int32_t h = head0 + 16 * m + g + j % 2 * 8, d = d0 + dim0 + j / 2 * 8 + 2 * q;
            if (h >= heads || d >= a.d_head)
                continue;
            float l = from.l[row0 + (size_t)h];
            store_pair(a, t, (int64_t)row0 + h, d, acc[m][j / 2][j % 2 * 2] / l, acc[m][j / 2][j % 2 * 2 + 1] / l);
        }
}

int dsv4_cuda_attention_mma(const struct dsv4_cuda_attention_args *a, void *stream) {
    if (!a->n_tok || !a->n_head)
        return 0;
    struct attention_args args = with_list(a);
    unsigned heads = dsv4_blocks((size_t)a->n_head, HEADS), tokens = (unsigned)a->n_tok;
    dim3 scores(dsv4_blocks((size_t)a->max_key, BLOCK), heads, tokens);
    dim3 values(dsv4_blocks((size_t)a->d_head, DIMS), heads, tokens);
    DSV4_LAUNCH(mma_score_kernel, scores, MMA_THREADS, stream, args);
    DSV4_LAUNCH(mma_soft_kernel, dsv4_blocks((size_t)a->n_tok * (size_t)a->n_head, SOFT_WARPS), 32 * SOFT_WARPS, stream,
                args.of);
    DSV4_LAUNCH(mma_value_kernel, values, MMA_THREADS, stream, args.of);
    return 0;
}
