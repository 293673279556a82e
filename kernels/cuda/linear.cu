// SPDX-License-Identifier: Apache-2.0
//
// Linear layers and experts for one to eight tokens; for more see linear_many.cu.  Contracts: kernels.h, launches.h.
#include "linear.cuh"
#include "linear_few.cuh"

template <int n_tok> DSV4_KERNEL(few_kernel, struct layers, FEW_THREADS, 4) {
    DSV4_SHARED(struct few_stages, s);
    int32_t j = 0;
    while (j + 1 < a.of.n_job && blockIdx.x >= a.first[j + 1])
        j++;
    const struct dsv4_cuda_linear_job &job = a.of.jobs[j];
    struct block_rows rows = rows_of_block(job, blockIdx.x - a.first[j], FEW_ROWS);
    int32_t r = rows.first + (int32_t)threadIdx.x / 16 * FEW_EACH;
    int aligned = (uintptr_t)job.x % 4 == 0 && job.ld_x % 2 == 0 && rows.x % 2 == 0;
    const dsv4_bf16 *x[n_tok];
#pragma unroll
    for (int t = 0; t < n_tok; t++) {
        int32_t i = t < a.of.n_tok ? t : 0;
        x[t] = job.x + (a.of.tok ? a.of.tok[i] : i) * job.ld_x + rows.x;
    }
    float sum[FEW_EACH][n_tok];
    few_any<n_tok>(s, job.w, rows.first, rows.end, x, aligned, sum);
    if (threadIdx.x % 16)
        return;
#pragma unroll
    for (int i = 0; i < FEW_EACH; i++)
#pragma unroll
        for (int t = 0; t < n_tok; t++)
            if (r + i < rows.end && t < a.of.n_tok)
                store_sum(job.out, t * job.ld_out + r + i, job.out_f32, sum[i][t]);
}

int dsv4_cuda_linear(const struct dsv4_cuda_linear_args *a, void *stream) {
    if (a->n_tok > DSV4_FEW_TOKENS)
        return launch_linear_many(a, stream);
    struct layers l = lay_out(a, FEW_ROWS);
    unsigned blocks = l.first[DSV4_CUDA_JOBS];
    if (!blocks || !a->n_tok)
        return 0;
    if (a->n_tok == 1)
        DSV4_LAUNCH(few_kernel<1>, blocks, FEW_THREADS, stream, l);
    else if (a->n_tok <= 4)
        DSV4_LAUNCH(few_kernel<4>, blocks, FEW_THREADS, stream, l);
    else
        DSV4_LAUNCH(few_kernel<8>, blocks, FEW_THREADS, stream, l);
    return 0;
}

// blockIdx.x: rows of w[0], then of w[1]; blockIdx.y: tile.
template <int n_tok> DSV4_KERNEL(few_experts_kernel, struct dsv4_cuda_experts_args, FEW_THREADS, 4) {
    DSV4_SHARED(struct few_stages, s);
    if ((int32_t)blockIdx.y >= *a.n_tile)
        return;
    struct dsv4_cuda_tile tile = a.tiles[blockIdx.y];
    int32_t blocks = (a.rows + FEW_ROWS - 1) / FEW_ROWS, which = (int32_t)blockIdx.x / blocks;
    struct dsv4_weight w = which ? a.w[1][tile.expert] : a.w[0][tile.expert];
    if (!w.data)
        return;
    int32_t r0 = (int32_t)blockIdx.x % blocks * FEW_ROWS, r = r0 + (int32_t)threadIdx.x / 16 * FEW_EACH;
    const dsv4_bf16 *from = w.format == DSV4_W_FP8 || w.format == DSV4_W_FP4 ? a.x_quant : a.x_plain;
    int aligned = (uintptr_t)from % 4 == 0 && a.cols % 2 == 0;
    const dsv4_bf16 *x[n_tok];
#pragma unroll
    for (int t = 0; t < n_tok; t++) {
        int32_t i = tile.first + (t < tile.n ? t : 0);
        x[t] = from + (int64_t)(a.row_tok ? a.row_tok[i] : i) * a.cols;
    }
    float sum[FEW_EACH][n_tok];
    few_any<n_tok>(s, w, r0, a.rows, x, aligned, sum);
    if (threadIdx.x % 16)
        return;
    dsv4_bf16 *out = (which ? a.out[1] : a.out[0]) + (int64_t)tile.first * a.rows;
#pragma unroll
    for (int i = 0; i < FEW_EACH; i++)
#pragma unroll
        for (int t = 0; t < n_tok; t++)
            if (r + i < a.rows && t < tile.n)
                out[(int64_t)t * a.rows + r + i] = dsv4_f32_to_bf16(sum[i][t]);
}

int dsv4_cuda_experts(const struct dsv4_cuda_experts_args *a, void *stream) {
    if (a->tile_tok > DSV4_CUDA_FEW_TILE)
        return launch_experts_many(a, stream);
    dim3 grid(dsv4_blocks((size_t)a->rows, FEW_ROWS) * (a->w[1] ? 2u : 1u), (unsigned)a->max_tile);
    if (!grid.x || !grid.y)
        return 0;
    if (a->n_tok == 1)
        DSV4_LAUNCH(few_experts_kernel<1>, grid, FEW_THREADS, stream, *a);
    else if (a->n_tok <= 4)
        DSV4_LAUNCH(few_experts_kernel<4>, grid, FEW_THREADS, stream, *a);
    else
        DSV4_LAUNCH(few_experts_kernel<8>, grid, FEW_THREADS, stream, *a);
    return 0;
}
