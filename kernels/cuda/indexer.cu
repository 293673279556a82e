// SPDX-License-Identifier: Apache-2.0
//
// The lightning indexer: scores of compressed entries as exact integer dots of FP4 rows, and the choice of the best.
// Contracts: kernels.h, launches.h.
#include "device.cuh"

enum { INDEX_MAX = 256, INDEX_BLOCKS = INDEX_MAX / DSV4_INDEX_GROUP, HEADS_AT_ONCE = 16 };
// Scores of so many entries are chosen from out of shared memory; of more by larger blocks, since one chooses alone.
enum { TOP_THREADS = 512, TOP_WARPS = TOP_THREADS / 32, STAGED_ENTRIES = 8192, FEW_ENTRY_THREADS = 128,
       MANY_ENTRY_THREADS = 256 };

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

DSV4_DEVICE int32_t visible(int32_t position, int32_t ratio) {
    return (position + 1) / ratio;
}

// ---------------------------------------------------------------------------------------------------------- selection

struct top_work {
    int32_t counts[256];
    int32_t above[TOP_WARPS], equal[TOP_WARPS];
    uint32_t bound;
    int32_t need;
    uint32_t staged[STAGED_ENTRIES];
};

// Orders like the score: -0 as +0, NaN as -infinity.
DSV4_DEVICE uint32_t order_of(float score) {
    uint32_t u = dsv4_f32_bits(score == score ? score + 0.0f : -DSV4_INF);
    return u >> 31 ? ~u : u | 0x80000000u;
}

// Among keys that agree with `bound` above this digit: the digit of the one with `need` - 1 before it; by one warp.
DSV4_DEVICE void find_digit(struct top_work &s, uint32_t bound, int32_t need, int shift) {
    int32_t lane = (int32_t)threadIdx.x % 32, own[8], sum = 0;
#pragma unroll
    for (int j = 7; j >= 0; j--) {
        sum += s.counts[8 * lane + j];
        own[j] = sum; // from j on
    }
    int32_t from = sum; // from this lane on
    for (int step = 1; step < 32; step *= 2) {
        int32_t other = __shfl_sync(DSV4_FULL_WARP, from, (lane + step) % 32);
        from += lane + step < 32 ? other : 0;
    }
    int32_t behind = from - sum;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        int32_t above = behind + (j < 7 ? own[j + 1] : 0);
        if (behind + own[j] >= need && above < need) { // one thread alone
            s.bound = bound | (uint32_t)(8 * lane + j) << shift;
            s.need = need - above;
        }
    }
}

// Token t by a block of at most TOP_THREADS: the bound found digit by digit, then one pass in order of the ids.
DSV4_DEVICE void block_top_k(struct top_work &s, const struct dsv4_cuda_top_k_args &a, int64_t t) {
    int32_t n = visible(a.positions[t], a.ratio), i = (int32_t)threadIdx.x, threads = (int32_t)blockDim.x;
    int32_t *ids = a.ids + t * a.k, lane = i % 32, warp = i / 32, staged = n <= STAGED_ENTRIES;
    const float *scores = a.scores + t * a.max_entry;
    if (i == 0)
        a.n_id[t] = n < a.k ? n : a.k;
    if (n <= a.k) {
        for (int32_t id = i; id < n; id += threads)
            ids[id] = id;
        return;
    }
#pragma unroll 4
    for (int32_t id = i; staged && id < n; id += threads)
        s.staged[id] = order_of(scores[id]);
    uint32_t bound = 0;
    int32_t need = a.k;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int32_t digit = i; digit < 256; digit += threads)
            s.counts[digit] = 0;
        __syncthreads();
#pragma unroll 4
        for (int32_t id = i; id < n; id += threads) {
            uint32_t key = staged ? s.staged[id] : order_of(scores[id]);
            if (shift == 24 || key >> (shift + 8) == bound >> (shift + 8))
                atomicAdd(&s.counts[key >> shift & 255u], 1);
        }
        __syncthreads();
        if (warp == 0)
            find_digit(s, bound, need, shift);
        __syncthreads();
        bound = s.bound;
        need = s.need;
    }
    // all above the bound, and the first `need` of those on it
    int32_t above_before = 0, equal_before = 0;
    for (int32_t first = 0; first < n; first += threads) {
        uint32_t key = first + i >= n ? 0 : staged ? s.staged[first + i] : order_of(scores[first + i]);
        int above = first + i < n && key > bound, equal = first + i < n && key == bound;
        unsigned aboves = __ballot_sync(DSV4_FULL_WARP, above), equals = __ballot_sync(DSV4_FULL_WARP, equal);
        if (lane == 0) {
            s.above[warp] = __popc(aboves);
            s.equal[warp] = __popc(equals);
        }
        __syncthreads();
        unsigned lower = (1u << lane) - 1u;
        int32_t n_above = above_before + __popc(aboves & lower), n_equal = equal_before + __popc(equals & lower);
        for (int32_t w = 0; w < threads / 32; w++) {
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

DSV4_KERNEL(top_k_kernel, struct dsv4_cuda_top_k_args, TOP_THREADS, 1) {
    DSV4_SHARED(struct top_work, s);
    block_top_k(s, a, blockIdx.x);
}

int dsv4_cuda_top_k(const struct dsv4_cuda_top_k_args *a, void *stream) {
    if (a->n_tok)
        DSV4_LAUNCH(top_k_kernel, (unsigned)a->n_tok, TOP_THREADS, stream, *a);
    return 0;
}

// ------------------------------------------------------------------------------------------------------------- scores

struct scores_work {
    uint32_t q[HEADS_AT_ONCE][INDEX_MAX / 4];
    uint32_t scale[HEADS_AT_ONCE][INDEX_BLOCKS];
    float w[HEADS_AT_ONCE];
};

union scores_or_top {
    struct scores_work scores;
    struct top_work top;
};

struct scores_args {
    struct dsv4_cuda_scores_args of;
    struct dsv4_cuda_top_k_args choice;
    int32_t choosing;
};

// blockIdx.x: entries, one a thread, whose bytes stay in registers for all heads; blockIdx.y: token.  `blocks` of 32
// dimensions.  The last block of a token chooses.
template <int blocks, int threads> DSV4_KERNEL(scores_kernel, struct scores_args, threads, (threads > 128 ? 1 : 2)) {
    DSV4_SHARED(union scores_or_top, shared);
    struct scores_work &s = shared.scores;
    const struct dsv4_cuda_scores_args &o = a.of;
    int32_t t = (int32_t)blockIdx.y, n = visible(o.pass.positions[t], o.ratio), i = (int32_t)threadIdx.x;
    int32_t entry = (int32_t)blockIdx.x * threads + i;
    if (n <= o.top_k && a.choosing && blockIdx.x == 0)
        block_top_k(shared.top, a.choice, t);
    if (n <= o.top_k || (int32_t)blockIdx.x * threads >= n)
        return; // the whole block
    size_t bytes = dsv4_index_row_bytes(o.d_index), codes = (size_t)o.d_index / 2;
    uint32_t k[blocks][8] = {}, k_scale[blocks] = {};
    if (entry < n) {
        const uint8_t *row = o.pass.states[o.pass.piece_of[t]].index[entry / DSV4_CUDA_BLOCK_ROWS] +
                             (size_t)(entry % DSV4_CUDA_BLOCK_ROWS) * bytes;
#pragma unroll
        for (int b = 0; b < blocks; b++) {
            unpack_block(k[b], row + 16 * b);
            k_scale[b] = row[codes + (size_t)b];
        }
    }
    float score = 0.0f;
    for (int32_t h0 = 0; h0 < o.n_head; h0 += HEADS_AT_ONCE) {
        int32_t heads = o.n_head - h0 < HEADS_AT_ONCE ? o.n_head - h0 : HEADS_AT_ONCE;
        for (int32_t e = i; e < heads * blocks; e += threads) {
            const uint8_t *row = o.q + ((size_t)t * (size_t)o.n_head + (size_t)(h0 + e / blocks)) * bytes;
            unpack_block(&s.q[e / blocks][8 * (e % blocks)], row + 16 * (e % blocks));
            s.scale[e / blocks][e % blocks] = row[codes + (size_t)(e % blocks)];
        }
        if (i < heads)
            s.w[i] = dsv4_round_bf16(dsv4_bf16_to_f32(o.head_w[(int64_t)t * o.n_head + h0 + i]) * o.w_scale);
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
    if (entry < n) {
        o.scores[(int64_t)t * o.max_entry + entry] =
            score == score ? dsv4_round_bf16(score) : dsv4_f32_from_bits(DSV4_NAN_BITS);
        if (score != score)
            atomicMin(o.bad, o.layer);
    }
    if (a.choosing && dsv4_last_part(o.tickets + t, 1, (n + threads - 1) / threads))
        block_top_k(shared.top, a.choice, t);
}

template <int threads> static int launch_scores(const struct scores_args &args, void *stream) {
    const struct dsv4_cuda_scores_args &a = args.of;
    dim3 grid(dsv4_blocks((size_t)a.max_entry, threads), (unsigned)a.pass.n_tok);
    switch (a.d_index / DSV4_INDEX_GROUP) {
    case 1:
        DSV4_LAUNCH((scores_kernel<1, threads>), grid, threads, stream, args);
        break;
    case 2:
        DSV4_LAUNCH((scores_kernel<2, threads>), grid, threads, stream, args);
        break;
    case 4:
        DSV4_LAUNCH((scores_kernel<4, threads>), grid, threads, stream, args);
        break;
    case 8:
        DSV4_LAUNCH((scores_kernel<8, threads>), grid, threads, stream, args);
        break;
    default:
        return 1; // cudaErrorInvalidValue
    }
    return 0;
}

int dsv4_cuda_scores(const struct dsv4_cuda_scores_args *a, void *stream) {
    struct scores_args args = {};
    if (!a->pass.n_tok)
        return 0;
    if (!a->max_entry)
        return a->choice ? dsv4_cuda_top_k(a->choice, stream) : 0;
    args.of = *a;
    if (a->choice) {
        args.choosing = 1;
        args.choice = *a->choice;
    }
    return a->max_entry <= STAGED_ENTRIES ? launch_scores<FEW_ENTRY_THREADS>(args, stream)
                                          : launch_scores<MANY_ENTRY_THREADS>(args, stream);
}
