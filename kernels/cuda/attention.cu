// SPDX-License-Identifier: Apache-2.0
//
// Attention over key lists, in two launches, since the contract orders nothing but two chains: scores of all (head, rank)
// pairs, each one chain over the dimensions, after which whoever made the last ones of a group of heads goes over its
// blocks of ranks: the running maximum, P and the factor of every block, the denominator; then values, one chain over the
// ranks for each (head, dimension).  Few tokens have fewer heads in a block, so that there are blocks for a device.
// Contracts: kernels.h, launches.h.
#include "attention.cuh"

enum { SCORE_THREADS = 256, SCORE_WARPS = SCORE_THREADS / 32, DIMS = 128, VALUE_THREADS = 128 };
enum { FEW_TOKENS = DSV4_CUDA_FEW_TILE, FEW_EACH = 2, MANY_EACH = 4, FEW_VALUES = 2, MANY_VALUES = 8 };

template <int each> struct score_work {
    uint32_t k[DIMS / 2][BLOCK + 1]; // pairs of dimensions, a rank each
    uint32_t q[DIMS / 2][4 * each];
    const uint8_t *keys[BLOCK];
    float p[SCORE_WARPS][BLOCK];
};

// blockIdx: block of ranks, group of 4 each heads, token.  A thread has one rank and `each` heads.
template <int each> DSV4_KERNEL(score_kernel, struct attention_args, SCORE_THREADS, 2) {
    DSV4_SHARED(struct score_work<each>, s);
    const struct dsv4_cuda_attention_args &o = a.of;
    struct parts to = cut(o);
    int32_t t = (int32_t)blockIdx.z, h0 = (int32_t)blockIdx.y * 4 * each, first = (int32_t)blockIdx.x * BLOCK;
    int32_t n_key = keys_of(a, t);
    int32_t i = (int32_t)threadIdx.x, rank = i % BLOCK, own = i / BLOCK * each;
    if (first >= n_key && first > 0)
        return;
    int any = stage_keys(s.keys, a, t, first, n_key);
    float sum[each] = {};
    for (int32_t d0 = 0; d0 < o.d_head; d0 += DIMS) {
        int32_t pairs = (o.d_head - d0 < DIMS ? o.d_head - d0 : DIMS) / 2;
#pragma unroll 8
        for (int32_t e = i; e < BLOCK * pairs; e += SCORE_THREADS) {
            const uint8_t *row = s.keys[e / pairs];
            s.k[e % pairs][e / pairs] = row ? key_pair(row, d0 + 2 * (e % pairs), o) : 0u;
        }
        for (int32_t e = i; e < 4 * each * pairs; e += SCORE_THREADS) {
            int32_t h = e / pairs, d = e % pairs;
            uint32_t pair = 0;
            if (h0 + h < o.n_head) {
                const dsv4_bf16 *q = o.q + ((int64_t)t * o.n_head + h0 + h) * o.d_head + d0 + 2 * d;
                pair = dsv4_pair_operands(q[0], q[1]);
            }
            s.q[d][h] = pair;
        }
        __syncthreads();
#pragma unroll 4
        for (int32_t d = 0; d < pairs; d++) {
            uint32_t k = s.k[d][rank];
            float odd = dsv4_high_bf16(k), even = dsv4_low_bf16(k);
#pragma unroll
            for (int j = 0; j < each; j++) {
                uint32_t q = s.q[d][own + j];
                sum[j] = dsv4_mad(dsv4_high_bf16(q), odd, sum[j]);
                sum[j] = dsv4_mad(dsv4_low_bf16(q), even, sum[j]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < each; j++) {
        size_t row = (size_t)t * (size_t)o.n_head + (size_t)(h0 + own + j);
        if (h0 + own + j >= o.n_head)
            break;
        to.p[row * to.ranks + (size_t)(first + rank)] = s.keys[rank] ? sum[j] * o.scale : -DSV4_INF;
        if (rank == 0)
            to.c[row * to.blocks + blockIdx.x] = any ? 0.0f : NO_KEYS;
    }
    int32_t blocks = n_key > 0 ? (n_key + BLOCK - 1) / BLOCK : 1;
    if (!dsv4_last_part(o.tickets + (size_t)t * gridDim.y + blockIdx.y, 1, blocks))
        return;
    for (int32_t h = h0 + i / 32; h < h0 + 4 * each && h < o.n_head; h += SCORE_WARPS)
        warp_softmax(s.p[i / 32], to, (int64_t)t * o.n_head + h, n_key, o.sink[h]);
}

template <int heads> struct value_work {
    uint32_t k[BLOCK / 2][VALUE_THREADS]; // ranks 2i and 2i + 1 of a dimension
    float p[BLOCK][heads];                // as operands
    float c[heads];
    const uint8_t *keys[BLOCK];
};

// The value of one (head, dimension) as it leaves attention; its pair is that of the neighbouring thread.
DSV4_DEVICE dsv4_bf16 turned_back(const struct dsv4_cuda_attention_args &a, int32_t t, int32_t d, dsv4_bf16 x) {
    float own = dsv4_bf16_to_f32(x), other = __shfl_xor_sync(DSV4_FULL_WARP, own, 1);
    int32_t at = d - (a.d_head - a.d_rope);
    if (a.cos && at >= 0 && d < a.d_head) {
        int64_t angle = (int64_t)t * (a.d_rope / 2) + at / 2;
        float c = a.cos[angle], s = -a.sin[angle];
        x = dsv4_f32_to_bf16(at % 2 ? other * s + own * c : own * c - other * s);
    }
    return a.flush ? dsv4_bf16_operand(x) : x;
}

// blockIdx: group of 128 dimensions, group of `heads` heads, token.  A thread has one dimension of all heads of the group.
template <int heads> DSV4_KERNEL(value_kernel, struct dsv4_cuda_attention_args, VALUE_THREADS, 4) {
    DSV4_SHARED(struct value_work<heads>, s);
    struct parts from = cut(a);
    int32_t t = (int32_t)blockIdx.z, h0 = (int32_t)blockIdx.y * heads, d0 = (int32_t)blockIdx.x * VALUE_THREADS;
    int32_t n_key = a.n_key[t], i = (int32_t)threadIdx.x;
    int32_t pairs = (a.d_head - d0 < VALUE_THREADS ? a.d_head - d0 : VALUE_THREADS) / 2;
    size_t row0 = (size_t)t * (size_t)a.n_head + (size_t)h0;
    const uint8_t *const *keys = a.keys + (int64_t)t * a.max_key;
    const uint8_t *next = i < BLOCK && i < n_key ? keys[i] : NULL;
    float acc[heads] = {};
    for (int32_t first = 0; first < n_key; first += BLOCK) {
        if (i < BLOCK) {
            s.keys[i] = next;
            next = first + BLOCK + i < n_key ? keys[first + BLOCK + i] : NULL;
        }
        if (i < heads && h0 + i < a.n_head)
            s.c[i] = from.c[(row0 + (size_t)i) * from.blocks + (size_t)(first / BLOCK)];
        __syncthreads();
        if (s.c[0] == NO_KEYS) { // of all heads
            __syncthreads();
            continue;
        }
#pragma unroll 8
        for (int32_t e = i; e < BLOCK / 2 * pairs; e += VALUE_THREADS) {
            int32_t r = e / pairs, d = e % pairs;
            const uint8_t *first_row = s.keys[2 * r], *second = s.keys[2 * r + 1];
            uint32_t even = first_row ? key_pair(first_row, d0 + 2 * d, a) : 0u;
            uint32_t odd = second ? key_pair(second, d0 + 2 * d, a) : 0u;
            s.k[r][2 * d] = (even & 0xffffu) | odd << 16;
            s.k[r][2 * d + 1] = even >> 16 | (odd & 0xffff0000u);
        }
#pragma unroll
        for (int32_t e = i; e < BLOCK * heads; e += VALUE_THREADS) {
            int32_t h = e / BLOCK, r = e % BLOCK;
            s.p[r][h] = h0 + h < a.n_head ? rounded_operand(from.p[(row0 + (size_t)h) * from.ranks + (size_t)(first + r)])
                                          : 0.0f;
        }
        __syncthreads();
        if (d0 + i < a.d_head) {
#pragma unroll
            for (int h = 0; h < heads; h++) {
                float x = acc[h] * s.c[h];
                acc[h] = fabsf(x) < 0x1p-95f ? 0.0f : x;
            }
#pragma unroll 4
            for (int r = 0; r < BLOCK; r += 2) {
                uint32_t k = s.k[r / 2][i];
                float odd = dsv4_high_bf16(k), even = dsv4_low_bf16(k);
#pragma unroll
                for (int h = 0; h < heads; h++) {
                    acc[h] = dsv4_mad(s.p[r + 1][h], odd, acc[h]);
                    acc[h] = dsv4_mad(s.p[r][h], even, acc[h]);
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int h = 0; h < heads; h++) {
        if (h0 + h >= a.n_head)
            break; // the whole block
        float x = acc[h] / from.l[row0 + (size_t)h];
        dsv4_bf16 o = turned_back(a, t, d0 + i, x == x ? dsv4_f32_to_bf16(x) : (dsv4_bf16)0x7fc0);
        if (d0 + i < a.d_head)
            a.out[((int64_t)t * a.n_head + h0 + h) * a.d_head + d0 + i] = o;
    }
}

template <int each, int heads>
static int launch_attention(const struct attention_args &args, void *stream) {
    const struct dsv4_cuda_attention_args &a = args.of;
    unsigned tokens = (unsigned)a.n_tok;
    dim3 scores(dsv4_blocks((size_t)a.max_key, BLOCK), dsv4_blocks((size_t)a.n_head, 4 * each), tokens);
    dim3 values(dsv4_blocks((size_t)a.d_head, VALUE_THREADS), dsv4_blocks((size_t)a.n_head, heads), tokens);
    DSV4_LAUNCH(score_kernel<each>, scores, SCORE_THREADS, stream, args);
    DSV4_LAUNCH(value_kernel<heads>, values, VALUE_THREADS, stream, a);
    return 0;
}

int dsv4_cuda_attention(const struct dsv4_cuda_attention_args *a, void *stream) {
    if (!a->n_tok || !a->n_head)
        return 0;
    struct attention_args args = with_list(a);
    return a->n_tok <= FEW_TOKENS ? launch_attention<FEW_EACH, FEW_VALUES>(args, stream)
                                  : launch_attention<MANY_EACH, MANY_VALUES>(args, stream);
}
