// SPDX-License-Identifier: Apache-2.0
//
// Attention over key lists, in three launches, since the contract orders nothing but two chains: scores of all (head,
// rank) pairs, each one chain over the dimensions; per head the running maximum, P and the factor of every block, the
// denominator; values, one chain over the ranks for each (head, dimension).  Contracts: kernels.h, launches.h.
#include "weights.cuh"

enum { BLOCK = 64, SCORE_THREADS = 256, SCORE_HEADS = 16, SCORE_EACH = 4, DIMS = 128, SOFT_THREADS = 128,
       VALUE_THREADS = 128, VALUE_HEADS = 8 };

// How the scratch is cut: scores [n_tok][n_head][ranks], factors [n_tok][n_head][blocks], denominators [n_tok][n_head].
struct parts {
    float *p, *c, *l;
    size_t ranks, blocks;
};

DSV4_DEVICE struct parts cut(const struct dsv4_cuda_attention_args &a) {
    struct parts s;
    size_t rows = (size_t)a.n_tok * (size_t)a.n_head;
    s.blocks = ((size_t)a.max_key + BLOCK - 1) / BLOCK;
    s.ranks = s.blocks * BLOCK;
    s.p = (float *)a.scratch;
    s.c = s.p + rows * s.ranks;
    s.l = s.c + rows * s.blocks;
    return s;
}

// Dimensions d and d + 1 (d even) of a KV row as bf16 operands, the first in the low half.
DSV4_DEVICE uint32_t key_pair(const uint8_t *row, int32_t d, const struct dsv4_cuda_attention_args &a) {
    int32_t nope = a.format == DSV4_KV_FP8 ? a.d_head - a.d_rope : 0;
    if (d >= nope) {
        const uint8_t *p = row + nope + 2 * (d - nope); // 2-byte aligned
        uint32_t even = *(const dsv4_word16 *)p, odd = *(const dsv4_word16 *)(p + 2);
        return (uint32_t)dsv4_bf16_operand((dsv4_bf16)even) | (uint32_t)dsv4_bf16_operand((dsv4_bf16)odd) << 16;
    }
    float scale = dsv4_e8m0_to_f32(row[a.d_head - a.d_rope + 2 * a.d_rope + d / DSV4_KV_GROUP]), even, odd;
    e4m3_pair(*(const dsv4_word16 *)(row + d), &even, &odd); // nope is a multiple of 64
    even = dsv4_f32_operand(even * scale); // bf16 values, exact
    odd = dsv4_f32_operand(odd * scale);
    return dsv4_f32_bits(even) >> 16 | (dsv4_f32_bits(odd) & 0xffff0000u);
}

struct score_work {
    uint32_t k[DIMS / 2][BLOCK + 1]; // pairs of dimensions, a rank each
    uint32_t q[DIMS / 2][SCORE_HEADS];
};

// blockIdx: block of ranks, group of 16 heads, token.  A thread has one rank and four heads.
DSV4_KERNEL(score_kernel, struct dsv4_cuda_attention_args, SCORE_THREADS, 2) {
    DSV4_SHARED(struct score_work, s);
    struct parts to = cut(a);
    int32_t t = (int32_t)blockIdx.z, h0 = (int32_t)blockIdx.y * SCORE_HEADS, first = (int32_t)blockIdx.x * BLOCK;
    int32_t n_key = a.n_key[t], i = (int32_t)threadIdx.x, rank = i % BLOCK, own = i / BLOCK * SCORE_EACH;
    if (first >= n_key)
        return;
    const uint8_t *const *keys = a.keys + (int64_t)t * a.max_key;
    float sum[SCORE_EACH] = {};
    for (int32_t d0 = 0; d0 < a.d_head; d0 += DIMS) {
        int32_t pairs = (a.d_head - d0 < DIMS ? a.d_head - d0 : DIMS) / 2;
        for (int32_t e = i; e < BLOCK * pairs; e += SCORE_THREADS) {
            int32_t r = e / pairs, d = e % pairs;
            const uint8_t *row = first + r < n_key ? keys[first + r] : NULL;
            s.k[d][r] = row ? key_pair(row, d0 + 2 * d, a) : 0u;
        }
        for (int32_t e = i; e < SCORE_HEADS * pairs; e += SCORE_THREADS) {
            int32_t h = e / pairs, d = e % pairs;
            uint32_t pair = 0;
            if (h0 + h < a.n_head) {
                const dsv4_bf16 *q = a.q + ((int64_t)t * a.n_head + h0 + h) * a.d_head + d0 + 2 * d;
                pair = (uint32_t)dsv4_bf16_operand(q[0]) | (uint32_t)dsv4_bf16_operand(q[1]) << 16;
            }
            s.q[d][h] = pair;
        }
        __syncthreads();
#pragma unroll 4
        for (int32_t d = 0; d < pairs; d++) {
            uint32_t k = s.k[d][rank];
            float odd = dsv4_high_bf16(k), even = dsv4_low_bf16(k);
#pragma unroll
            for (int j = 0; j < SCORE_EACH; j++) {
                uint32_t q = s.q[d][own + j];
                sum[j] = dsv4_mad(dsv4_high_bf16(q), odd, sum[j]);
                sum[j] = dsv4_mad(dsv4_low_bf16(q), even, sum[j]);
            }
        }
        __syncthreads();
    }
    int masked = first + rank >= n_key || !keys[first + rank];
#pragma unroll
    for (int j = 0; j < SCORE_EACH; j++)
        if (h0 + own + j < a.n_head)
            to.p[((size_t)t * (size_t)a.n_head + (size_t)(h0 + own + j)) * to.ranks + (size_t)(first + rank)] =
                masked ? -DSV4_INF : sum[j] * a.scale;
}

struct soft_work {
    float p[SOFT_THREADS / 32][BLOCK];
};

// A warp per (token, head), block after block.  A block without any key leaves everything as it was.
DSV4_KERNEL(soft_kernel, struct dsv4_cuda_attention_args, SOFT_THREADS, 1) {
    DSV4_SHARED(struct soft_work, s);
    struct parts at = cut(a);
    int32_t lane = (int32_t)threadIdx.x % 32, warp = (int32_t)threadIdx.x / 32;
    int64_t row = (int64_t)blockIdx.x * (SOFT_THREADS / 32) + warp;
    if (row >= (int64_t)a.n_tok * a.n_head)
        return; // whole warps
    int32_t t = (int32_t)(row / a.n_head), n_key = a.n_key[t];
    const uint8_t *const *keys = a.keys + (int64_t)t * a.max_key;
    float *scores = at.p + (size_t)row * at.ranks, *factors = at.c + (size_t)row * at.blocks;
    float m = -DSV4_INF, l = 0.0f;
    for (int32_t first = 0; first < n_key; first += BLOCK) {
        int any = (first + lane < n_key && keys[first + lane]) || (first + lane + 32 < n_key && keys[first + lane + 32]);
        if (!__ballot_sync(DSV4_FULL_WARP, any))
            continue;
        float low = scores[first + lane], high = scores[first + lane + 32], top = m;
        top = low > top ? low : top; // a NaN is lost here and makes its P NaN below, so the whole head
        top = high > top ? high : top;
        for (int step = 16; step > 0; step /= 2) {
            float other = __shfl_xor_sync(DSV4_FULL_WARP, top, step);
            top = other > top ? other : top;
        }
        low = dsv4_expf(low - top); // masked: exp(-infinity) = +0
        high = dsv4_expf(high - top);
        scores[first + lane] = low;
        scores[first + lane + 32] = high;
        s.p[warp][lane] = low;
        s.p[warp][lane + 32] = high;
        __syncwarp();
        float sum = 0.0f;
        for (int k = 0; k < BLOCK; k += 32) {
            sum = sum + s.p[warp][k + 2 * (lane % 16) + 1];
            sum = sum + s.p[warp][k + 2 * (lane % 16)];
        }
        sum = dsv4_lane_tree(sum);
        float c = dsv4_expf(m - top);
        l = l * c + sum;
        m = top;
        if (lane == 0)
            factors[first / BLOCK] = c;
        __syncwarp();
    }
    if (lane == 0) // the tree is right in the first lane
        at.l[row] = l + dsv4_expf(a.sink[row % a.n_head] - m);
}

struct value_work {
    uint32_t k[BLOCK / 2][VALUE_THREADS]; // ranks 2i and 2i + 1 of a dimension
    float p[BLOCK][VALUE_HEADS];          // as operands
    float c[VALUE_HEADS];
    int any;
};

// blockIdx: group of 128 dimensions, group of 8 heads, token.  A thread has one dimension of all heads of the group.
DSV4_KERNEL(value_kernel, struct dsv4_cuda_attention_args, VALUE_THREADS, 4) {
    DSV4_SHARED(struct value_work, s);
    struct parts from = cut(a);
    int32_t t = (int32_t)blockIdx.z, h0 = (int32_t)blockIdx.y * VALUE_HEADS, d0 = (int32_t)blockIdx.x * VALUE_THREADS;
    int32_t n_key = a.n_key[t], i = (int32_t)threadIdx.x;
    int32_t pairs = (a.d_head - d0 < VALUE_THREADS ? a.d_head - d0 : VALUE_THREADS) / 2;
    const uint8_t *const *keys = a.keys + (int64_t)t * a.max_key;
    float acc[VALUE_HEADS] = {};
    for (int32_t first = 0; first < n_key; first += BLOCK) {
        if (i == 0)
            s.any = 0;
        __syncthreads();
        if (i < BLOCK && first + i < n_key && keys[first + i])
            s.any = 1; // whoever writes it writes the same
        for (int32_t e = i; e < BLOCK / 2 * pairs; e += VALUE_THREADS) {
            int32_t r = first + e / pairs * 2, d = e % pairs;
            const uint8_t *row0 = r < n_key ? keys[r] : NULL, *row1 = r + 1 < n_key ? keys[r + 1] : NULL;
            uint32_t even = row0 ? key_pair(row0, d0 + 2 * d, a) : 0u, odd = row1 ? key_pair(row1, d0 + 2 * d, a) : 0u;
            s.k[e / pairs][2 * d] = (even & 0xffffu) | odd << 16;
            s.k[e / pairs][2 * d + 1] = even >> 16 | (odd & 0xffff0000u);
        }
        for (int32_t e = i; e < BLOCK * VALUE_HEADS; e += VALUE_THREADS) {
            int32_t h = e / BLOCK, r = e % BLOCK;
            float p = 0.0f;
            if (h0 + h < a.n_head)
                p = from.p[((size_t)t * (size_t)a.n_head + (size_t)(h0 + h)) * from.ranks + (size_t)(first + r)];
            s.p[r][h] = rounded_operand(p);
        }
        if (i < VALUE_HEADS && h0 + i < a.n_head)
            s.c[i] = from.c[((size_t)t * (size_t)a.n_head + (size_t)(h0 + i)) * from.blocks + (size_t)(first / BLOCK)];
        __syncthreads();
        if (s.any && d0 + i < a.d_head) {
#pragma unroll
            for (int h = 0; h < VALUE_HEADS; h++) {
                float x = acc[h] * s.c[h];
                acc[h] = fabsf(x) < 0x1p-95f ? 0.0f : x;
            }
#pragma unroll 4
            for (int r = 0; r < BLOCK; r += 2) {
                uint32_t k = s.k[r / 2][i];
                float odd = dsv4_high_bf16(k), even = dsv4_low_bf16(k);
#pragma unroll
                for (int h = 0; h < VALUE_HEADS; h++) {
                    acc[h] = dsv4_mad(s.p[r + 1][h], odd, acc[h]);
                    acc[h] = dsv4_mad(s.p[r][h], even, acc[h]);
                }
            }
        }
        __syncthreads();
    }
    if (d0 + i >= a.d_head)
        return;
#pragma unroll
    for (int h = 0; h < VALUE_HEADS; h++) {
        if (h0 + h >= a.n_head)
            break;
        int64_t row = (int64_t)t * a.n_head + h0 + h;
        float o = acc[h] / from.l[row];
        a.out[row * a.d_head + d0 + i] = o == o ? dsv4_f32_to_bf16(o) : (dsv4_bf16)0x7fc0;
    }
}

int dsv4_cuda_attention(const struct dsv4_cuda_attention_args *a, void *stream) {
    if (!a->n_tok || !a->n_head)
        return 0;
    unsigned heads = dsv4_blocks((size_t)a->n_head, SCORE_HEADS), tokens = (unsigned)a->n_tok;
    if (a->max_key)
        DSV4_LAUNCH(score_kernel, dim3(dsv4_blocks((size_t)a->max_key, BLOCK), heads, tokens), SCORE_THREADS, stream, *a);
    DSV4_LAUNCH(soft_kernel, dsv4_blocks((size_t)a->n_tok * (size_t)a->n_head, SOFT_THREADS / 32), SOFT_THREADS, stream,
                *a);
    dim3 grid(dsv4_blocks((size_t)a->d_head, VALUE_THREADS), dsv4_blocks((size_t)a->n_head, VALUE_HEADS), tokens);
    DSV4_LAUNCH(value_kernel, grid, VALUE_THREADS, stream, *a);
    return 0;
}
