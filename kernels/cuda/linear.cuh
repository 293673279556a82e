// SPDX-License-Identifier: Apache-2.0
//
// What the kernels for few and for many tokens share: which rows of which layer a block works on.
#pragma once

#include "device.cuh"

// A launch of several layers: block b works on layer j with first[j] <= b < first[j + 1].  A weight of several groups
// has whole groups.
struct layers {
    struct dsv4_cuda_linear_args of;
    unsigned first[DSV4_CUDA_JOBS + 1];
};

// What a block works on: rows [first, end), which read x at this offset.
struct block_rows {
    int32_t first, end;
    ptrdiff_t x;
};

// Blocks of `rows` rows over one layer; no block has rows of two groups.
static inline unsigned blocks_of(const struct dsv4_cuda_linear_job *job, int32_t rows) {
    int32_t group = job->group_rows ? job->group_rows : job->w.rows;
    return (unsigned)(group ? job->w.rows / group * ((group + rows - 1) / rows) : 0);
}

static inline struct layers lay_out(const struct dsv4_cuda_linear_args *a, int32_t rows) {
    struct layers l;
    l.of = *a;
    l.first[0] = 0;
    for (int32_t j = 0; j < DSV4_CUDA_JOBS; j++)
        l.first[j + 1] = l.first[j] + (j < a->n_job ? blocks_of(&a->jobs[j], rows) : 0u);
    return l;
}

DSV4_DEVICE struct block_rows rows_of_block(const struct dsv4_cuda_linear_job &job, unsigned block, int32_t rows) {
    int32_t group = job.group_rows ? job.group_rows : job.w.rows, blocks = (group + rows - 1) / rows;
    int32_t g = (int32_t)block / blocks, first = g * group + (int32_t)block % blocks * rows;
    int32_t end = first + rows < (g + 1) * group ? first + rows : (g + 1) * group;
    return {first, end, job.group_rows ? (ptrdiff_t)g * job.group_x : 0};
}

DSV4_DEVICE void store_sum(void *out, int64_t at, int out_f32, float sum) {
    if (out_f32)
        ((float *)out)[at] = sum;
    else
        ((dsv4_bf16 *)out)[at] = dsv4_f32_to_bf16(sum);
}

// linear_many.cu
int launch_linear_many(const struct dsv4_cuda_linear_args *a, void *stream);
int launch_experts_many(const struct dsv4_cuda_experts_args *a, void *stream);

// linear_mma.cu
int launch_linear_mma(const struct dsv4_cuda_linear_args *a, void *stream);
int launch_experts_mma(const struct dsv4_cuda_experts_args *a, void *stream);
