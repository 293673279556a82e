// SPDX-License-Identifier: Apache-2.0
//
// The mixture of experts around its projections (those: linear.cu): router, rows grouped by expert, activation, sum.
// Contracts: kernels.h, launches.h.
#include "rows.cuh"

enum { ROUTER_THREADS = 256, GROUP_THREADS = 1024, EXPERTS_MAX = DSV4_CUDA_EXPERTS };

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

// A block per token.  The rank of an expert is the number of those before it: ids[rank].
DSV4_KERNEL(router_kernel, struct dsv4_cuda_router_args, ROUTER_THREADS, 1) {
    DSV4_SHARED(struct router_work, s);
    int64_t t = blockIdx.x;
    int32_t first = (int32_t)threadIdx.x;
    float *scores = a.scores + t * a.n_exp;
    for (int32_t e = first; e < a.n_exp; e += ROUTER_THREADS) {
        float score = sqrtf(dsv4_softplusf(a.logits[t * a.n_exp + e]));
        scores[e] = score;
        s.keys[e] = router_key(a.bias ? score + a.bias[e] : score);
    }
    __syncthreads();
    if (a.table) {
        for (int32_t j = first; j < a.top_k; j += ROUTER_THREADS)
            s.ids[j] = table_entry(a.table, a.table_bytes, (size_t)a.tokens[t] * (size_t)a.top_k + (size_t)j);
    } else {
        for (int32_t e = first; e < a.n_exp; e += ROUTER_THREADS) {
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
    for (int32_t j = first; j < a.top_k; j += ROUTER_THREADS) {
        a.ids[t * a.top_k + j] = s.ids[j];
        a.weights[t * a.top_k + j] = scores[s.ids[j]] / s.sum * a.route_scale;
    }
}

int dsv4_cuda_router(const struct dsv4_cuda_router_args *a, void *stream) {
    if (a->n_tok)
        DSV4_LAUNCH(router_kernel, (unsigned)a->n_tok, ROUTER_THREADS, stream, *a);
    return 0;
}

// -------------------------------------------------------------------------------------------------------------- groups

struct group_work {
    int32_t rows[EXPERTS_MAX + 1], tiles[EXPERTS_MAX + 1]; // counts, then where each expert begins
};

// The sums of all before, of n numbers in shared memory, by the block (n at most its threads).
DSV4_DEVICE void block_starts(int32_t *x, int32_t n) {
    int32_t i = (int32_t)threadIdx.x;
    for (int32_t step = 1; step < n; step *= 2) {
        int32_t add = i < n && i >= step ? x[i - step] : 0;
        __syncthreads();
        if (i < n)
            x[i] += add;
        __syncthreads();
    }
    int32_t before = i > 0 && i < n ? x[i - 1] : 0;
    __syncthreads();
    if (i < n)
        x[i] = before;
    __syncthreads();
}

// One block; a thread per expert looks through all choices, twice, so that its rows come in their order.
DSV4_KERNEL(group_kernel, struct dsv4_cuda_group_args, GROUP_THREADS, 1) {
    DSV4_SHARED(struct group_work, s);
    int32_t e = (int32_t)threadIdx.x, chosen = a.n_tok * a.top_k, n_group = a.n_exp + 1, n_row = 0;
    for (int32_t i = 0; e < a.n_exp && i < chosen; i++)
        n_row += a.ids[i] == e;
    if (e == a.n_exp)
        n_row = a.n_tok;
    if (e < n_group) {
        s.rows[e] = n_row;
        s.tiles[e] = (n_row + a.tile_tok - 1) / a.tile_tok;
    }
    __syncthreads();
    int32_t n_tile = e < n_group ? s.tiles[e] : 0;
    __syncthreads();
    block_starts(s.rows, n_group);
    block_starts(s.tiles, n_group);
    if (e < n_group) {
        int32_t row = s.rows[e];
        a.group_first[e] = row;
        if (a.uses && e < a.n_exp)
            a.uses[e] += (uint64_t)n_row;
        if (e == a.n_exp) {
            a.group_first[n_group] = row + n_row;
            *a.n_tile = s.tiles[e] + n_tile;
        }
        for (int32_t i = 0; i < n_tile; i++) {
            int32_t left = n_row - i * a.tile_tok;
            a.tiles[s.tiles[e] + i] = {e, row + i * a.tile_tok, left < a.tile_tok ? left : a.tile_tok};
        }
        for (int32_t i = 0; e < a.n_exp && i < chosen; i++)
            if (a.ids[i] == e) {
                a.row_tok[row] = i / a.top_k;
                a.row_weight[row] = a.weights[i];
                a.tok_rows[i / a.top_k * (a.top_k + 1) + i % a.top_k] = row++;
            }
    }
    __syncthreads();
    for (int32_t t = e; t < a.n_tok; t += GROUP_THREADS) {
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

int dsv4_cuda_group(const struct dsv4_cuda_group_args *a, void *stream) {
    if (a->n_tok)
        DSV4_LAUNCH(group_kernel, 1, GROUP_THREADS, stream, *a);
    return 0;
}

// -------------------------------------------------------------------------------------------------- activation and sum

// A warp per group of 128 values.
DSV4_KERNEL(swiglu_kernel, struct dsv4_cuda_swiglu_args, ROW_THREADS, 1) {
    int32_t groups = (a.n + DSV4_ACT_GROUP - 1) / DSV4_ACT_GROUP, lane = (int32_t)threadIdx.x % 32;
    int64_t item = (int64_t)blockIdx.x * ROW_WARPS + (int32_t)threadIdx.x / 32;
    if (item >= (int64_t)a.n_row * groups)
        return; // whole warps
    int64_t row = item / groups;
    int32_t at = (int32_t)(item % groups) * DSV4_ACT_GROUP + 4 * lane;
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

int dsv4_cuda_swiglu(const struct dsv4_cuda_swiglu_args *a, void *stream) {
    size_t items = (size_t)a->n_row * (size_t)((a->n + DSV4_ACT_GROUP - 1) / DSV4_ACT_GROUP);
    if (items)
        DSV4_LAUNCH(swiglu_kernel, dsv4_blocks(items, ROW_WARPS), ROW_THREADS, stream, *a);
    return 0;
}

DSV4_KERNEL(expert_sum_kernel, struct dsv4_cuda_expert_sum_args, ROW_THREADS, 1) {
    int64_t i = (int64_t)blockIdx.x * ROW_THREADS + (int32_t)threadIdx.x;
    if (i >= (int64_t)a.n_tok * a.n)
        return;
    const int32_t *rows = a.tok_rows + i / a.n * a.per_tok;
    float acc = 0.0f;
    for (int32_t r = 0; r < a.per_tok; r++)
        acc += dsv4_bf16_to_f32(a.rows[(int64_t)rows[r] * a.n + i % a.n]);
    a.out[i] = dsv4_f32_to_bf16(acc);
}

int dsv4_cuda_expert_sum(const struct dsv4_cuda_expert_sum_args *a, void *stream) {
    size_t n = (size_t)a->n_tok * (size_t)a->n;
    if (n)
        DSV4_LAUNCH(expert_sum_kernel, dsv4_blocks(n, ROW_THREADS), ROW_THREADS, stream, *a);
    return 0;
}
