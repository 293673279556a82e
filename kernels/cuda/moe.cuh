// SPDX-License-Identifier: Apache-2.0
//
// The mixture of experts around its projections, by blocks and warps of any kernel: router, rows grouped by expert,
// activation, sum.  Contracts: kernels.h, launches.h.
#pragma once

#include "rows.cuh"

enum { EXPERTS_MAX = DSV4_CUDA_EXPERTS, MOE_THREADS = 1024, IDS_STAGED = 1024 };

// ------------------------------------------------------------------------------------------------------------- router

struct router_work {
    uint32_t keys[EXPERTS_MAX];
    int32_t ids[EXPERTS_MAX];
    float sum;
};

// Orders like dsv4_router_before: the higher score first, -0 as +0, a NaN below everything.
DSV4_DEVICE uint32_t router_key(float score) {
    uint32_t u = dsv4_f32_bits(score + 0.0f);
    return score != score ? 0u : u >> 31 ? ~u : u | 0x80000000u;
}

DSV4_DEVICE int32_t table_entry(const uint8_t *table, int32_t bytes, size_t i) {
    const uint8_t *p = table + (size_t)bytes * i; // ids are small: the low four bytes are all of them
    return (int32_t)((uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24);
}

// Token t, by a block.  The rank of an expert is the number of those before it: ids[rank].
DSV4_DEVICE void block_router(struct router_work &s, const struct dsv4_cuda_router_args &a, int64_t t) {
    int32_t first = (int32_t)threadIdx.x;
    float *scores = a.scores + t * a.n_exp;
    for (int32_t e = first; e < a.n_exp; e += block_threads()) {
        float score = sqrtf(dsv4_softplusf(a.logits[t * a.n_exp + e]));
        scores[e] = score;
        s.keys[e] = router_key(a.bias ? score + a.bias[e] : score);
    }
    __syncthreads();
    if (a.table) {
        for (int32_t j = first; j < a.top_k; j += block_threads())
            s.ids[j] = table_entry(a.table, a.table_bytes, (size_t)a.tokens[t] * (size_t)a.top_k + (size_t)j);
    } else {
        for (int32_t e = first; e < a.n_exp; e += block_threads()) {
            uint32_t key = s.keys[e];
            int32_t rank = 0;
            for (int32_t i = 0; i < a.n_exp; i++)
                rank += s.keys[i] > key || (s.keys[i] == key && i < e);
            if (rank < a.top_k)
                s.ids[rank] = e;
        }
    }
    __syncthreads();
    if (first == 0) {
        float sum = 0.0f;
        for (int32_t j = 0; j < a.top_k; j++)
            sum += scores[s.ids[j]];
        s.sum = sum;
    }
    __syncthreads();
    for (int32_t j = first; j < a.top_k; j += block_threads()) {
        a.ids[t * a.top_k + j] = s.ids[j];
        a.weights[t * a.top_k + j] = scores[s.ids[j]] / s.sum * a.route_scale;
    }
}

// -------------------------------------------------------------------------------------------------------------- groups

struct group_work {
    int32_t rows[EXPERTS_MAX + 1], tiles[EXPERTS_MAX + 1]; // counts, then where each expert begins
    int32_t sums[MOE_THREADS], ids[IDS_STAGED];
};

// x[i] becomes the sum of those before it, of n numbers in shared memory.
DSV4_DEVICE void block_starts(int32_t *x, int32_t *sums, int32_t n) {
    int32_t i = (int32_t)threadIdx.x, each = (n + block_threads() - 1) / block_threads(), sum = 0;
    int32_t end = (i + 1) * each < n ? (i + 1) * each : n;
    for (int32_t k = i * each; k < end; k++)
        sum += x[k];
    sums[i] = sum;
    __syncthreads();
    for (int32_t step = 1; step < block_threads(); step *= 2) {
        int32_t add = i >= step ? sums[i - step] : 0;
        __syncthreads();
        sums[i] += add;
        __syncthreads();
    }
    int32_t before = i > 0 ? sums[i - 1] : 0;
    for (int32_t k = i * each; k < end; k++) {
        int32_t own = x[k];
        x[k] = before;
        before += own;
    }
    __syncthreads();
}

// Rows of experts are in the order of the choices: a thread per expert looks through all of them, twice.
DSV4_DEVICE void block_group(struct group_work &s, const struct dsv4_cuda_group_args &a) {
    int32_t first = (int32_t)threadIdx.x, chosen = a.n_tok * a.top_k, n_group = a.n_exp + 1;
    const int32_t *ids = chosen <= IDS_STAGED ? s.ids : a.ids;
    for (int32_t i = first; i < chosen && chosen <= IDS_STAGED; i += block_threads())
        s.ids[i] = a.ids[i];
    __syncthreads();
    for (int32_t e = first; e < n_group; e += block_threads()) {
        int32_t n_row = e == a.n_exp ? a.n_tok : 0;
        for (int32_t i = 0; e < a.n_exp && i < chosen; i++)
            n_row += ids[i] == e;
        s.rows[e] = n_row;
        s.tiles[e] = (n_row + a.tile_tok - 1) / a.tile_tok;
    }
    __syncthreads();
    block_starts(s.rows, s.sums, n_group);
    block_starts(s.tiles, s.sums, n_group);
    for (int32_t e = first; e < n_group; e += block_threads()) {
        int32_t row = s.rows[e], end = e == a.n_exp ? row + a.n_tok : s.rows[e + 1], tile = s.tiles[e];
        a.group_first[e] = row;
        if (a.uses && e < a.n_exp)
            a.uses[e] += (uint64_t)(end - row);
        for (int32_t at = row; at < end; at += a.tile_tok)
            a.tiles[tile++] = {e, at, end - at < a.tile_tok ? end - at : a.tile_tok};
        if (e == a.n_exp) {
            a.group_first[n_group] = end;
            *a.n_tile = tile;
        }
        for (int32_t i = 0; e < a.n_exp && row < end && i < chosen; i++)
            if (ids[i] == e) {
                a.row_tok[row] = i / a.top_k;
                a.row_weight[row] = a.weights[i];
                a.tok_rows[i / a.top_k * (a.top_k + 1) + i % a.top_k] = row++;
            }
    }
    __syncthreads();
    for (int32_t t = first; t < a.n_tok; t += block_threads()) {
        int32_t *list = a.tok_rows + t * (a.top_k + 1);
        for (int32_t j = 1; j < a.top_k; j++) { // rows ascend with experts
            int32_t row = list[j], at = j;
            for (; at > 0 && list[at - 1] > row; at--)
                list[at] = list[at - 1];
            list[at] = row;
        }
        int32_t shared = s.rows[a.n_exp] + t;
        list[a.top_k] = shared;
        a.row_tok[shared] = t;
        a.row_weight[shared] = 1.0f;
    }
}

// -------------------------------------------------------------------------------------------------- activation and sum

// One group of 128 values of a row, by a warp.
DSV4_DEVICE void warp_swiglu(const struct dsv4_cuda_swiglu_args &a, int64_t row, int32_t group) {
    int32_t at = group * DSV4_ACT_GROUP + 4 * ((int32_t)threadIdx.x % 32);
    int shared = row >= a.first_shared, quant = shared ? a.shared_quant : a.quant;
    float limit = shared ? a.shared_limit : a.limit, weight = a.weights[row];
    dsv4_bf16 h[4];
    uint8_t codes[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        h[i] = 0;
        if (at + i >= a.n)
            continue;
        float gate = dsv4_bf16_to_f32(a.g[row * a.n + at + i]), up = dsv4_bf16_to_f32(a.u[row * a.n + at + i]);
        gate = gate > limit ? limit : gate; // comparisons with NaN are false: it passes
        up = up > limit ? limit : up < -limit ? -limit : up;
        float silu = gate / (1.0f + dsv4_expf(-gate));
        h[i] = dsv4_f32_to_bf16(weight * (silu * up));
    }
    if (quant == 1)
        warp_act_quant(h, codes);
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (at + i < a.n)
            a.out[row * a.n + at + i] = quant == 0 ? dsv4_bf16_operand(h[i]) : h[i];
}

// Column c of token t.
DSV4_DEVICE dsv4_bf16 sum_of_experts(const struct dsv4_cuda_expert_sum_args &a, int64_t t, int32_t c) {
    const int32_t *rows = a.tok_rows + t * a.per_tok;
    float acc = 0.0f;
#pragma unroll 8
    for (int32_t r = 0; r < a.per_tok; r++)
        acc += dsv4_bf16_to_f32(a.rows[(int64_t)rows[r] * a.n + c]);
    return dsv4_f32_to_bf16(acc);
}
