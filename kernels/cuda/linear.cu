// SPDX-License-Identifier: Apache-2.0
//
// Linear layers and experts for one to eight tokens; for more see linear_many.cu.  Contracts: kernels.h, launches.h.
#include "linear.cuh"
#include "linear_few.cuh"

// One kernel for both, since all its code is in the sums: n_job 0 means experts.
struct few_args {
    struct layers layers;
    struct dsv4_cuda_experts_args experts;
};

// What a block reads and writes; row t of x at x + tok[first + t] * ld_x.
struct few_block {
    struct dsv4_weight w;
    const dsv4_bf16 *x;
    const int32_t *tok;
    void *out; // element (t, r) at t * ld_out + r
    ptrdiff_t ld_x, ld_out;
    int32_t first, n, r0, end, out_f32;
};

DSV4_DEVICE struct few_block block_of_layer(const struct layers &l) {
    int32_t j = 0;
    while (j + 1 < l.of.n_job && blockIdx.x >= l.first[j + 1])
        j++;
    const struct dsv4_cuda_linear_job &job = l.of.jobs[j];
    struct block_rows rows = rows_of_block(job, blockIdx.x - l.first[j], FEW_ROWS);
    return {job.w, job.x + rows.x, l.of.tok, job.out, job.ld_x, job.ld_out, 0, l.of.n_tok, rows.first, rows.end, job.out_f32};
}

// blockIdx.x: rows of w[0], then of w[1]; blockIdx.y: tile.
DSV4_DEVICE struct few_block block_of_expert(const struct dsv4_cuda_experts_args &e) {
    struct few_block b = {};
    if ((int32_t)blockIdx.y >= *e.n_tile)
        return b;
    struct dsv4_cuda_tile tile = e.tiles[blockIdx.y];
    int32_t blocks = (e.rows + FEW_ROWS - 1) / FEW_ROWS, which = (int32_t)blockIdx.x / blocks;
    b.w = which ? e.w[1][tile.expert] : e.w[0][tile.expert];
    b.x = b.w.format == DSV4_W_FP8 || b.w.format == DSV4_W_FP4 ? e.x_quant : e.x_plain;
    b.tok = e.row_tok;
    b.out = (which ? e.out[1] : e.out[0]) + (int64_t)tile.first * e.rows;
    b.ld_x = e.cols;
    b.ld_out = e.rows;
    b.first = tile.first;
    b.n = tile.n;
    b.r0 = (int32_t)blockIdx.x % blocks * FEW_ROWS;
    b.end = e.rows;
    return b;
}

template <int n_tok> DSV4_KERNEL(few_kernel, struct few_args, FEW_THREADS, 4) {
    DSV4_SHARED(struct few_stages, s);
    struct few_block b = a.layers.of.n_job ? block_of_layer(a.layers) : block_of_expert(a.experts);
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
    few_any<n_tok>(s, b.w, b.r0, b.end, x, aligned, sum);
    if (threadIdx.x % 16)
        return;
#pragma unroll
    for (int i = 0; i < FEW_EACH; i++)
#pragma unroll
        for (int t = 0; t < n_tok; t++)
            if (r + i < b.end && t < b.n)
                store_sum(b.out, t * b.ld_out + r + i, b.out_f32, sum[i][t]);
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

int dsv4_cuda_linear(const struct dsv4_cuda_linear_args *a, void *stream) {
    if (a->tensor_cores)
        return launch_linear_mma(a, stream);
    if (a->n_tok > DSV4_CUDA_FEW_TILE)
        return launch_linear_many(a, stream);
    if (!a->n_job)
        return 0;
    struct few_args args = {};
    args.layers = lay_out(a, FEW_ROWS);
    return launch_few(args, dim3(args.layers.first[DSV4_CUDA_JOBS]), a->n_tok, stream);
}

int dsv4_cuda_experts(const struct dsv4_cuda_experts_args *a, void *stream) {
    if (a->tile_tok == DSV4_CUDA_MMA_TILE)
        return launch_experts_mma(a, stream);
    if (a->tile_tok > DSV4_CUDA_FEW_TILE)
        return launch_experts_many(a, stream);
    struct few_args args = {};
    args.experts = *a;
    dim3 grid(dsv4_blocks((size_t)a->rows, FEW_ROWS) * (a->w[1] ? 2u : 1u), (unsigned)a->max_tile);
    return launch_few(args, grid, a->n_tok, stream);
}
