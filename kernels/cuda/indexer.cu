// SPDX-License-Identifier: Apache-2.0
//
// The lightning indexer: scores of compressed entries as exact integer dots of FP4 rows, and the choice of the best.
// Contracts: kernels.h, launches.h.
#include "device.cuh"

enum { SCORES_THREADS = 128, INDEX_MAX = 256, INDEX_BLOCKS = INDEX_MAX / DSV4_INDEX_GROUP, TOP_THREADS = 512,
       HEADS_AT_ONCE = 16 };

// Twice the values of the 4 codes in the low 16 bits, as signed bytes: two look-ups and a choice by sign.
DSV4_DEVICE uint32_t twice_bytes(uint32_t codes) {
    uint32_t s = codes & 0x7777u;
    uint32_t plus = __byte_perm(0x03020100u, 0x0c080604u, s), minus = __byte_perm(0xfdfeff00u, 0xf4f8fafcu, s);
    uint32_t sign = (codes & 8u) << 4 | (codes & 0x80u) << 8 | (codes & 0x800u) << 12 | (codes & 0x8000u) << 16;
    uint32_t mask = (sign >> 7) * 255u;
    return (plus & ~mask) | (minus & mask);
}

// The bytes of one block of 32 codes.
DSV4_DEVICE void unpack_block(uint32_t out[8], const uint8_t *codes) {
#pragma unroll
    for (int i = 0; i < 8; i++)
        out[i] = twice_bytes((uint32_t)codes[2 * i] | (uint32_t)codes[2 * i + 1] << 8);
}

// 2^(eq + ek - 2) within the normal floats; NaN where a group was not finite.
DSV4_DEVICE float block_factor(uint32_t q, uint32_t k) {
    int e = (int)q - 127 + (int)k - 127 - 2;
    e = e < -126 ? -126 : e > 127 ? 127 : e;
    return dsv4_f32_from_bits(q == 255 || k == 255 ? DSV4_NAN_BITS : (uint32_t)(e + 127) << 23);
}

struct scores_work {
    uint32_t q[HEADS_AT_ONCE][INDEX_MAX / 4];
    uint32_t scale[HEADS_AT_ONCE][INDEX_BLOCKS];
    float w[HEADS_AT_ONCE];
};

DSV4_DEVICE int32_t visible(int32_t position, int32_t ratio) {
    return (position + 1) / ratio;
}

// blockIdx.x: entries, one a thread, whose bytes stay in registers for all heads; blockIdx.y: token.  `blocks` of 32
// dimensions.
template <int blocks> DSV4_KERNEL(scores_kernel, struct dsv4_cuda_scores_args, SCORES_THREADS, 2) {
    DSV4_SHARED(struct scores_work, s);
    int32_t t = (int32_t)blockIdx.y, n = visible(a.pass.positions[t], a.ratio), i = (int32_t)threadIdx.x;
    int32_t entry = (int32_t)blockIdx.x * SCORES_THREADS + i;
    if (n <= a.top_k || (int32_t)blockIdx.x * SCORES_THREADS >= n)
        return; // the whole block
    size_t bytes = dsv4_index_row_bytes(a.d_index), codes = (size_t)a.d_index / 2;
    uint32_t k[blocks][8] = {}, k_scale[blocks] = {};
    if (entry < n) {
        const uint8_t *row = a.pass.states[a.pass.piece_of[t]].index[entry / DSV4_CUDA_BLOCK_ROWS] +
                             (size_t)(entry % DSV4_CUDA_BLOCK_ROWS) * bytes;
#pragma unroll
        for (int b = 0; b < blocks; b++) {
            unpack_block(k[b], row + 16 * b);
            k_scale[b] = row[codes + (size_t)b];
        }
    }
    float score = 0.0f;
    for (int32_t h0 = 0; h0 < a.n_head; h0 += HEADS_AT_ONCE) {
        int32_t heads = a.n_head - h0 < HEADS_AT_ONCE ? a.n_head - h0 : HEADS_AT_ONCE;
        for (int32_t e = i; e < heads * blocks; e += SCORES_THREADS) {
            const uint8_t *row = a.q + ((size_t)t * (size_t)a.n_head + (size_t)(h0 + e / blocks)) * bytes;
            unpack_block(&s.q[e / blocks][8 * (e % blocks)], row + 16 * (e % blocks));
            s.scale[e / blocks][e % blocks] = row[codes + (size_t)(e % blocks)];
        }
        if (i < heads)
            s.w[i] = dsv4_round_bf16(dsv4_bf16_to_f32(a.head_w[(int64_t)t * a.n_head + h0 + i]) * a.w_scale);
        __syncthreads();
        for (int32_t h = 0; h < heads && entry < n; h++) {
            float acc = 0.0f;
#pragma unroll
            for (int b = 0; b < blocks; b++) {
                int dot = 0;
#pragma unroll
                for (int j = 0; j < 8; j++)
                    dot = __dp4a((int)s.q[h][8 * b + j], (int)k[b][j], dot);
                acc = fmaf((float)dot, block_factor(s.scale[h][b], k_scale[b]), acc);
            }
            float x = dsv4_round_bf16(acc);
            x = x <= 0.0f ? 0.0f : x; // a NaN passes
            score = score + dsv4_round_bf16(s.w[h] * x);
        }
        __syncthreads();
    }
    if (entry >= n)
        return;
    a.scores[(int64_t)t * a.max_entry + entry] = score == score ? dsv4_round_bf16(score) : dsv4_f32_from_bits(DSV4_NAN_BITS);
    if (score != score)
        atomicMin(a.bad, a.layer);
}

int dsv4_cuda_scores(const struct dsv4_cuda_scores_args *a, void *stream) {
    dim3 grid(dsv4_blocks((size_t)a->max_entry, SCORES_THREADS), (unsigned)a->pass.n_tok);
    if (!grid.x || !grid.y)
        return 0;
    switch (a->d_index / DSV4_INDEX_GROUP) {
    case 1:
        DSV4_LAUNCH(scores_kernel<1>, grid, SCORES_THREADS, stream, *a);
        break;
    case 2:
        DSV4_LAUNCH(scores_kernel<2>, grid, SCORES_THREADS, stream, *a);
        break;
    case 4:
        DSV4_LAUNCH(scores_kernel<4>, grid, SCORES_THREADS, stream, *a);
        break;
    case 8:
        DSV4_LAUNCH(scores_kernel<8>, grid, SCORES_THREADS, stream, *a);
        break;
    default:
        return 1; // cudaErrorInvalidValue
    }
    return 0;
}

// ---------------------------------------------------------------------------------------------------------- selection

struct top_work {
    int32_t counts[256];
    int32_t above[TOP_THREADS / 32], equal[TOP_THREADS / 32];
    uint32_t bound;
    int32_t need;
};

// Orders like the score: -0 as +0, NaN as -infinity.
DSV4_DEVICE uint32_t order_of(float score) {
    uint32_t u = dsv4_f32_bits(score == score ? score + 0.0f : -DSV4_INF);
    return u >> 31 ? ~u : u | 0x80000000u;
}

// s.counts[b] becomes the sum of those from b on.
DSV4_DEVICE void sums_from_above(struct top_work &s) {
    int32_t i = (int32_t)threadIdx.x;
    for (int32_t step = 1; step < 256; step *= 2) {
        int32_t add = i + step < 256 ? s.counts[i + step] : 0;
        __syncthreads();
        if (i < 256)
            s.counts[i] += add;
        __syncthreads();
    }
}

// A block per token: the bound found digit by digit, then one pass in order of the ids.
DSV4_KERNEL(top_k_kernel, struct dsv4_cuda_top_k_args, TOP_THREADS, 1) {
    DSV4_SHARED(struct top_work, s);
    int32_t t = (int32_t)blockIdx.x, n = visible(a.positions[t], a.ratio), i = (int32_t)threadIdx.x;
    int32_t *ids = a.ids + (int64_t)t * a.k, lane = i % 32, warp = i / 32;
    const float *scores = a.scores + (int64_t)t * a.max_entry;
    if (i == 0)
        a.n_id[t] = n < a.k ? n : a.k;
    if (n <= a.k) {
        for (int32_t id = i; id < n; id += TOP_THREADS)
            ids[id] = id;
        return;
    }
    uint32_t bound = 0;
    int32_t need = a.k;
    for (int shift = 24; shift >= 0; shift -= 8) {
        if (i < 256)
            s.counts[i] = 0;
        __syncthreads();
        for (int32_t id = i; id < n; id += TOP_THREADS) {
            uint32_t key = order_of(scores[id]);
            if (shift == 24 || key >> (shift + 8) == bound >> (shift + 8))
                atomicAdd(&s.counts[key >> shift & 255u], 1);
        }
        __syncthreads();
        sums_from_above(s);
        int32_t above = i + 1 < 256 ? s.counts[i + 1] : 0;
        if (i < 256 && s.counts[i] >= need && above < need) { // one thread alone
            s.bound = bound | (uint32_t)i << shift;
            s.need = need - above;
        }
        __syncthreads();
        bound = s.bound;
        need = s.need;
    }
    // all above the bound, and the first `need` of those on it
    int32_t above_before = 0, equal_before = 0;
    for (int32_t first = 0; first < n; first += TOP_THREADS) {
        uint32_t key = first + i < n ? order_of(scores[first + i]) : 0;
        int above = first + i < n && key > bound, equal = first + i < n && key == bound;
        unsigned aboves = __ballot_sync(DSV4_FULL_WARP, above), equals = __ballot_sync(DSV4_FULL_WARP, equal);
        if (lane == 0) {
            s.above[warp] = __popc(aboves);
            s.equal[warp] = __popc(equals);
        }
        __syncthreads();
        unsigned lower = (1u << lane) - 1u;
        int32_t n_above = above_before + __popc(aboves & lower), n_equal = equal_before + __popc(equals & lower);
        for (int32_t w = 0; w < TOP_THREADS / 32; w++) {
            n_above += w < warp ? s.above[w] : 0;
            n_equal += w < warp ? s.equal[w] : 0;
            above_before += s.above[w];
            equal_before += s.equal[w];
        }
        if (above || (equal && n_equal < need))
            ids[n_above + (n_equal < need ? n_equal : need)] = first + i;
        __syncthreads();
    }
}

int dsv4_cuda_top_k(const struct dsv4_cuda_top_k_args *a, void *stream) {
    if (a->n_tok)
        DSV4_LAUNCH(top_k_kernel, (unsigned)a->n_tok, TOP_THREADS, stream, *a);
    return 0;
}
