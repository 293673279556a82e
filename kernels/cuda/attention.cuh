// SPDX-License-Identifier: Apache-2.0
//
// What both kinds of attention share: key lists, how the scratch is cut, keys as operands, the softmax of one row.
#pragma once

#include "state.cuh"
#include "weights.cuh"

enum { BLOCK = 64 };

// ----------------------------------------------------------------------------------------------------------- key lists

// Where the keys are those of a session's pass, the first launch makes their list, and the last one reads it.
struct attention_args {
    struct dsv4_cuda_attention_args of;
    struct dsv4_cuda_keys_args list;
    int32_t listed;
};

static inline struct attention_args with_list(const struct dsv4_cuda_attention_args *a) {
    struct attention_args args = {};
    args.of = *a;
    if (a->list) {
        args.listed = 1;
        args.list = *a->list;
        args.of.keys = a->list->keys;
        args.of.n_key = a->list->n_key;
    }
    return args;
}

DSV4_DEVICE int32_t keys_of(const struct attention_args &a, int32_t t) {
    return a.listed ? count_keys(a.list, t) : a.of.n_key[t];
}

// The keys of token t at 64 ranks from `first` on, to shared memory and, by the blocks of the first heads, to the list;
// tells whether there is any.  All threads of the block, which pass a barrier.
DSV4_DEVICE int stage_keys(const uint8_t *(&keys)[BLOCK], const struct attention_args &a, int32_t t, int32_t first,
                           int32_t n_key) {
    int32_t i = (int32_t)threadIdx.x;
    int64_t at = (int64_t)t * a.of.max_key + first + i;
    const uint8_t *key = NULL;
    if (i < BLOCK && first + i < n_key)
        key = a.listed ? key_at(a.list, t, first + i) : a.of.keys[at];
    if (i < BLOCK)
        keys[i] = key;
    if (a.listed && blockIdx.y == 0) {
        if (i < BLOCK && first + i < n_key)
            a.list.keys[at] = key;
        if (i == 0 && first == 0)
            a.list.n_key[t] = n_key;
    }
    return __syncthreads_or(key != NULL);
}

// ------------------------------------------------------------------------------------------------------------- scratch

// The factor of a block of ranks without any key.
#define NO_KEYS -1.0f

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

// ---------------------------------------------------------------------------------------------------------------- keys

// Two e4m3 codes of a KV row under their scale as operands: bf16 values, exact.
DSV4_DEVICE uint32_t scaled_pair(uint32_t codes, float scale) {
    float even, odd;
    e4m3_pair(codes, &even, &odd);
    return dsv4_pair_bf16(dsv4_f32_operand(even * scale), dsv4_f32_operand(odd * scale));
}

// Dimensions d and d + 1 (d even) of a KV row as bf16 operands, the first in the low half.
DSV4_DEVICE uint32_t key_pair(const uint8_t *row, int32_t d, const struct dsv4_cuda_attention_args &a) {
    int32_t nope = a.format == DSV4_KV_FP8 ? a.d_head - a.d_rope : 0;
    if (d >= nope) {
        const uint8_t *p = row + nope + 2 * (d - nope); // 2-byte aligned
        return dsv4_pair_operands(*(const dsv4_word16 *)p, *(const dsv4_word16 *)(p + 2));
    }
    // shortened to d_head + d_rope, the index makes nvcc 13 spill in the tensor-core values of sm_120
    float scale = dsv4_e8m0_to_f32(row[a.d_head - a.d_rope + 2 * a.d_rope + d / DSV4_KV_GROUP]);
    return scaled_pair(*(const dsv4_word16 *)(row + d), scale); // nope is a multiple of 64
}

// ------------------------------------------------------------------------------------------------------------- softmax

// Sums of P over a block, by a warp, as rule 1 has them.
DSV4_DEVICE float sum_of_block(float *staged, float low, float high) {
    int32_t lane = (int32_t)threadIdx.x % 32;
    float sum = 0.0f;
    staged[lane] = low;
    staged[lane + 32] = high;
    __syncwarp();
#pragma unroll
    for (int k = 0; k < BLOCK; k += 32) {
        sum = sum + staged[k + 2 * (lane % 16) + 1];
        sum = sum + staged[k + 2 * (lane % 16)];
    }
    __syncwarp();
    return dsv4_lane_tree(sum);
}

// Softmax of one row (token, head) by a warp, block after block.  A block without any key leaves everything as it was.
DSV4_DEVICE void warp_softmax(float *staged, const struct parts &at, int64_t row, int32_t n_key, float sink) {
    int32_t lane = (int32_t)threadIdx.x % 32;
    float *scores = at.p + (size_t)row * at.ranks, *factors = at.c + (size_t)row * at.blocks;
    float m = -DSV4_INF, l = 0.0f, next_low = 0.0f, next_high = 0.0f, next_mark = NO_KEYS;
    for (int32_t first = -BLOCK; first < n_key; first += BLOCK) {
        float low = next_low, high = next_high, mark = next_mark;
        if (first + BLOCK < n_key) { // the next ones are on their way meanwhile
            next_low = scores[first + BLOCK + lane];
            next_high = scores[first + BLOCK + lane + 32];
            next_mark = factors[first / BLOCK + 1];
        }
        if (mark == NO_KEYS)
            continue;
        float top = m;
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
        float c = dsv4_expf(m - top), sum = sum_of_block(staged, low, high);
        l = l * c + sum;
        m = top;
        if (lane == 0)
            factors[first / BLOCK] = c;
    }
    if (lane == 0) // the tree is right in the first lane
        at.l[row] = l + dsv4_expf(sink - m);
}
