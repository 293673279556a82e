// SPDX-License-Identifier: Apache-2.0
//
// Linear layers and experts for one to eight tokens, and what follows them in the same launch; for more tokens see
// linear_many.cu.  Contracts: kernels.h, launches.h.
#include "hyper.cuh"
#include "linear.cuh"
#include "linear_few.cuh"
#include "moe.cuh"

// What is done with the results.
enum few_kind { FEW_PLAIN, FEW_ACT, FEW_SPREAD, FEW_SWIGLU, FEW_SUM };

union few_after {
    struct dsv4_cuda_act_args act;
    struct dsv4_cuda_spread_args spread;
    struct dsv4_cuda_swiglu_args swiglu;
    struct {
        struct dsv4_cuda_expert_sum_args sum;
        struct dsv4_cuda_spread_args spread; // n_tok 0: none
    } experts;
};

// One kernel for both, since all its code is in the sums: n_job 0 means experts.
struct few_args {
    struct layers layers;
    struct dsv4_cuda_experts_args experts;
    union few_after after;
    int32_t *tickets;
    int32_t kind, rows; // of a block
};

// What a block reads and writes: rows [r0, end) of w for tokens first ... first + n; row t of x at
// x + tok[first + t] * ld_x, of out (element (t, r) at t * ld_out + r) at first + t.
struct few_block {
    struct dsv4_weight w;
    const dsv4_bf16 *x;
    const int32_t *tok;
    void *out;
    ptrdiff_t ld_x, ld_out;
    int32_t first, n, r0, end, out_f32;
    int32_t part; // of experts: which projection
};

DSV4_DEVICE struct few_block block_of_layer(const struct few_args &a) {
    const struct layers &l = a.layers;
    int32_t j = 0;
    while (j + 1 < l.of.n_job && blockIdx.x >= l.first[j + 1])
        j++;
    const struct dsv4_cuda_linear_job &job = l.of.jobs[j];
    struct block_rows rows = rows_of_block(job, blockIdx.x - l.first[j], a.rows);
    return {job.w, job.x + rows.x, l.of.tok, job.out, job.ld_x, job.ld_out, 0, l.of.n_tok, rows.first, rows.end,
            job.out_f32, 0};
}

// blockIdx.x: rows of w[0], then of w[1]; blockIdx.y: tile.
DSV4_DEVICE struct few_block block_of_expert(const struct few_args &a) {
    const struct dsv4_cuda_experts_args &e = a.experts;
    struct few_block b = {};
    if ((int32_t)blockIdx.y >= *e.n_tile)
        return b;
    struct dsv4_cuda_tile tile = e.tiles[blockIdx.y];
    int32_t blocks = (e.rows + a.rows - 1) / a.rows;
    b.part = (int32_t)blockIdx.x / blocks;
    b.w = b.part ? e.w[1][tile.expert] : e.w[0][tile.expert];
    b.x = b.w.format == DSV4_W_FP8 || b.w.format == DSV4_W_FP4 ? e.x_quant : e.x_plain;
    b.tok = e.row_tok;
    b.out = b.part ? e.out[1] : e.out[0];
    b.ld_x = e.cols;
    b.ld_out = e.rows;
    b.first = tile.first;
    b.n = tile.n;
    b.r0 = (int32_t)blockIdx.x % blocks * a.rows;
    b.end = b.r0 + a.rows < e.rows ? b.r0 + a.rows : e.rows;
    return b;
}

// ------------------------------------------------------------------------------------------------------- what follows

// Adds the block's rows to the tickets of the groups of 128 they are in, of `all` rows and as many projections, and calls
// tail(group) for each that is complete now.
template <class Tail>
DSV4_DEVICE void after_groups(int32_t *tickets, const struct few_block &b, int32_t all, int32_t projections,
                              const Tail &tail) {
    for (int32_t g = b.r0 / DSV4_ACT_GROUP; g * DSV4_ACT_GROUP < b.end; g++) {
        int32_t first = g * DSV4_ACT_GROUP, end = first + DSV4_ACT_GROUP < all ? first + DSV4_ACT_GROUP : all;
        int32_t rows = (b.end < end ? b.end : end) - (b.r0 > first ? b.r0 : first);
        if (dsv4_last_part(tickets + g, rows, projections * (end - first)))
            tail(g);
    }
}

DSV4_DEVICE void few_follow(const struct few_args &a, const struct few_block &b) {
    int32_t i = (int32_t)threadIdx.x, warp = i / 32, width = b.end - b.r0;
    switch (a.kind) {
    case FEW_ACT:
        after_groups(a.tickets, b, a.after.act.n, 1, [&](int32_t g) {
            for (int32_t t = warp; t < b.n; t += FEW_WARPS)
                warp_act(a.after.act, t, g);
        });
        break;
    case FEW_SPREAD:
        __syncthreads(); // a column is the block's own
        for (int32_t e = i; e < b.n * width; e += FEW_THREADS)
            spread_column(a.after.spread, e / width, b.r0 + e % width);
        break;
    case FEW_SWIGLU: {
        int32_t groups = (a.experts.rows + DSV4_ACT_GROUP - 1) / DSV4_ACT_GROUP;
        after_groups(a.tickets + (int32_t)blockIdx.y * groups, b, a.experts.rows, 2, [&](int32_t g) {
            for (int32_t r = warp; r < b.n; r += FEW_WARPS)
                warp_swiglu(a.after.swiglu, b.first + r, g);
        });
        break;
    }
    case FEW_SUM: {
        const struct dsv4_cuda_expert_sum_args &sum = a.after.experts.sum;
        if (!dsv4_last_part(a.tickets + blockIdx.x, 1, *a.experts.n_tile))
            break;
        for (int32_t e = i; e < sum.n_tok * width; e += FEW_THREADS) {
            int32_t t = e / width, c = b.r0 + e % width;
            sum.out[(int64_t)t * sum.n + c] = sum_of_experts(sum, t, c);
            if (a.after.experts.spread.n_tok)
                spread_column(a.after.experts.spread, t, c);
        }
        break;
    }
    default:
        break;
    }
}

template <int n_tok> DSV4_KERNEL(few_kernel, struct few_args, FEW_THREADS, (n_tok > 4 ? 3 : 4)) {
    DSV4_SHARED(struct few_stages<n_tok>, s);
    struct few_block b = a.layers.of.n_job ? block_of_layer(a) : block_of_expert(a);
    if (!b.w.data)
        return; // the whole block: no such tile, or an expert that is elsewhere
    int32_t r = b.r0 + (int32_t)threadIdx.x / 16 * FEW_EACH;
    int aligned = (uintptr_t)b.x % 4 == 0 && b.ld_x % 2 == 0;
    const dsv4_bf16 *x[n_tok];
#pragma unroll
    for (int t = 0; t < n_tok; t++) {
        int32_t i = b.first + (t < b.n ? t : 0);
        x[t] = b.x + (b.tok ? b.tok[i] : i) * b.ld_x;
    }
    float sum[FEW_EACH][n_tok];
    few_any<n_tok>(s, b.w, a.rows, b.r0, b.end, x, aligned, sum);
    if (threadIdx.x % 16 == 0) {
#pragma unroll
        for (int i = 0; i < FEW_EACH; i++)
#pragma unroll
            for (int t = 0; t < n_tok; t++)
                if (r + i < b.end && t < b.n)
                    store_sum(b.out, (b.first + t) * b.ld_out + r + i, b.out_f32, sum[i][t]);
    }
    few_follow(a, b);
}

static int launch_few(const struct few_args &args, dim3 grid, int32_t n_tok, void *stream) {
    if (!grid.x || !grid.y || !n_tok)
        return 0;
    if (n_tok == 1)
        DSV4_LAUNCH(few_kernel<1>, grid, FEW_THREADS, stream, args);
    else if (n_tok <= 4)
        DSV4_LAUNCH(few_kernel<4>, grid, FEW_THREADS, stream, args);
    else
        DSV4_LAUNCH(few_kernel<8>, grid, FEW_THREADS, stream, args);
    return 0;
}

// Runs an operation if its args are there, after what may have failed.
#define FOLLOW(op, args) (code == 0 && (args) ? dsv4_cuda_##op(args, stream) : code)

int dsv4_cuda_linear(const struct dsv4_cuda_linear_args *a, void *stream) {
    if (a->tensor_cores || a->n_tok > DSV4_CUDA_FEW_TILE) {
        int code = a->tensor_cores ? launch_linear_mma(a, stream) : launch_linear_many(a, stream);
        code = FOLLOW(act, a->act);
        return FOLLOW(spread, a->spread);
    }
    if (!a->n_job)
        return 0;
    struct few_args args = {};
    args.rows = FEW_ROWS;
    args.layers = lay_out(a, args.rows);
    args.tickets = a->tickets;
    if (a->act) {
        args.kind = FEW_ACT;
        args.after.act = *a->act;
    } else if (a->spread) {
        args.kind = FEW_SPREAD;
        args.after.spread = *a->spread;
    }
    return launch_few(args, dim3(args.layers.first[DSV4_CUDA_JOBS]), a->n_tok, stream);
}

int dsv4_cuda_experts(const struct dsv4_cuda_experts_args *a, void *stream) {
    if (a->tile_tok > DSV4_CUDA_FEW_TILE) {
        int code = a->tile_tok == DSV4_CUDA_MMA_TILE ? launch_experts_mma(a, stream) : launch_experts_many(a, stream);
        code = FOLLOW(swiglu, a->swiglu);
        code = FOLLOW(expert_sum, a->sum);
        return FOLLOW(spread, a->spread);
    }
    struct few_args args = {};
    args.rows = FEW_ROWS;
    args.experts = *a;
    args.tickets = a->tickets;
    if (a->swiglu) {
        args.kind = FEW_SWIGLU;
        args.after.swiglu = *a->swiglu;
    } else if (a->sum) {
        args.kind = FEW_SUM;
        args.after.experts.sum = *a->sum;
        if (a->spread)
            args.after.experts.spread = *a->spread;
    }
    dim3 grid(dsv4_blocks((size_t)a->rows, FEW_ROWS) * (a->w[1] ? 2u : 1u), (unsigned)a->max_tile);
    return launch_few(args, grid, a->n_tok, stream);
}
