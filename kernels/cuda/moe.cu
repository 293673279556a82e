// SPDX-License-Identifier: Apache-2.0
//
// The mixture of experts around its projections (those: linear.cu), in launches of its own.  Contracts: launches.h.
#include "moe.cuh"

enum { ROUTER_THREADS = 256 };

DSV4_KERNEL(router_kernel, struct dsv4_cuda_router_args, ROUTER_THREADS, 1) {
    DSV4_SHARED(struct router_work, s);
    block_router(s, a, blockIdx.x);
}

int dsv4_cuda_router(const struct dsv4_cuda_router_args *a, void *stream) {
    if (a->n_tok)
        DSV4_LAUNCH(router_kernel, (unsigned)a->n_tok, ROUTER_THREADS, stream, *a);
    return 0;
}

DSV4_KERNEL(group_kernel, struct dsv4_cuda_group_args, MOE_THREADS, 1) {
    DSV4_SHARED(struct group_work, s);
    block_group(s, a);
}

int dsv4_cuda_group(const struct dsv4_cuda_group_args *a, void *stream) {
    if (a->n_tok)
        DSV4_LAUNCH(group_kernel, 1, MOE_THREADS, stream, *a);
    return 0;
}

DSV4_KERNEL(swiglu_kernel, struct dsv4_cuda_swiglu_args, ROW_THREADS, 1) {
    int32_t groups = (a.n + DSV4_ACT_GROUP - 1) / DSV4_ACT_GROUP;
    int64_t item = (int64_t)blockIdx.x * ROW_WARPS + (int32_t)threadIdx.x / 32;
    if (item < (int64_t)a.n_row * groups)
        warp_swiglu(a, item / groups, (int32_t)(item % groups));
}

int dsv4_cuda_swiglu(const struct dsv4_cuda_swiglu_args *a, void *stream) {
    size_t items = (size_t)a->n_row * (size_t)((a->n + DSV4_ACT_GROUP - 1) / DSV4_ACT_GROUP);
    if (items)
        DSV4_LAUNCH(swiglu_kernel, dsv4_blocks(items, ROW_WARPS), ROW_THREADS, stream, *a);
    return 0;
}

DSV4_KERNEL(expert_sum_kernel, struct dsv4_cuda_expert_sum_args, ROW_THREADS, 1) {
    int64_t i = (int64_t)blockIdx.x * ROW_THREADS + (int32_t)threadIdx.x;
    if (i < (int64_t)a.n_tok * a.n)
        a.out[i] = sum_of_experts(a, i / a.n, (int32_t)(i % a.n));
}

int dsv4_cuda_expert_sum(const struct dsv4_cuda_expert_sum_args *a, void *stream) {
    size_t n = (size_t)a->n_tok * (size_t)a->n;
    if (n)
        DSV4_LAUNCH(expert_sum_kernel, dsv4_blocks(n, ROW_THREADS), ROW_THREADS, stream, *a);
    return 0;
}
