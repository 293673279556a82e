// SPDX-License-Identifier: Apache-2.0
//
// Hyper-connections in launches of their own.  Contracts: kernels.h, launches.h.
#include "hyper.cuh"

DSV4_KERNEL(collapse_kernel, struct dsv4_cuda_collapse_args, ROW_THREADS, 1) {
    DSV4_SHARED(struct collapse_work, s);
    int64_t t = blockIdx.x, row = a.tok ? a.tok[t] : t;
    float mean_square = block_mean_square(s.sums, a.streams + row * a.hc * a.d_model, a.hc * a.d_model);
    block_collapse(s, a, t, mean_square);
}

int dsv4_cuda_collapse(const struct dsv4_cuda_collapse_args *a, void *stream) {
    if (a->n_tok)
        DSV4_LAUNCH(collapse_kernel, (unsigned)a->n_tok, ROW_THREADS, stream, *a);
    return 0;
}

// A thread per column of a token.
DSV4_KERNEL(spread_kernel, struct dsv4_cuda_spread_args, ROW_THREADS, 1) {
    int64_t i = (int64_t)blockIdx.x * ROW_THREADS + (int32_t)threadIdx.x;
    if (i < (int64_t)a.n_tok * a.d_model)
        spread_column(a, i / a.d_model, (int32_t)(i % a.d_model));
}

int dsv4_cuda_spread(const struct dsv4_cuda_spread_args *a, void *stream) {
    size_t n = (size_t)a->n_tok * (size_t)a->d_model;
    if (n)
        DSV4_LAUNCH(spread_kernel, dsv4_blocks(n, ROW_THREADS), ROW_THREADS, stream, *a);
    return 0;
}
