// SPDX-License-Identifier: Apache-2.0
//
// What both kinds of attention share: how the scratch is cut, keys as operands, the softmax of one row.
#pragma once

#include "state.cuh"
#include "weights.cuh"

enum { BLOCK = 64 };

struct attention_args {
    struct dsv4_cuda_attention_args of;
    struct dsv4_cuda_keys_args list;
    int32_t listed;
};

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
