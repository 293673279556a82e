// SPDX-License-Identifier: Apache-2.0
//
// What passes through a session's state, in launches of its own.  Contracts: kernels.h, launches.h.
#include "state.cuh"

DSV4_KERNEL(norm_kv_kernel, struct dsv4_cuda_norm_kv_args, ROW_THREADS, 1) {
    DSV4_SHARED(struct kv_work, s);
    block_kv_row(s, a, blockIdx.x);
}

int dsv4_cuda_norm_kv(const struct dsv4_cuda_norm_kv_args *a, void *stream) {
    if (a->n_tok)
        DSV4_LAUNCH(norm_kv_kernel, (unsigned)a->n_tok, ROW_THREADS, stream, *a);
    return 0;
}

DSV4_KERNEL(pool_kernel, struct dsv4_cuda_pool_args, ROW_THREADS, 1) {
    int32_t c = (int32_t)(blockIdx.x * ROW_THREADS + threadIdx.x);
    if (c >= a.n)
        return;
    a.out[c] = pool_one(
        [&](int32_t r) -> struct pooled {
            if (!a.gate[r])
                return {0.0f, 0.0f, 0};
            return {a.k[r][c], a.gate[r][c] + a.ape[r][c], 1};
        },
        a.n_row);
}

int dsv4_cuda_pool(const struct dsv4_cuda_pool_args *a, void *stream) {
    if (a->n)
        DSV4_LAUNCH(pool_kernel, dsv4_blocks((size_t)a->n, ROW_THREADS), ROW_THREADS, stream, *a);
    return 0;
}

// A block per window that closes.
DSV4_KERNEL(windows_kernel, struct dsv4_cuda_windows_args, ROW_THREADS, 1) {
    DSV4_SHARED(struct window_work, s);
    block_window(s, a, (int32_t)blockIdx.x);
}

int dsv4_cuda_windows(const struct dsv4_cuda_windows_args *a, void *stream) {
    if (a->max_window)
        DSV4_LAUNCH(windows_kernel, (unsigned)a->max_window, ROW_THREADS, stream, *a);
    return 0;
}

DSV4_KERNEL(keep_kernel, struct dsv4_cuda_keep_args, ROW_THREADS, 1) {
    block_keep(a, (int32_t)blockIdx.x);
}

int dsv4_cuda_keep(const struct dsv4_cuda_keep_args *a, void *stream) {
    if (a->pass.n_tok)
        DSV4_LAUNCH(keep_kernel, (unsigned)a->pass.n_tok, ROW_THREADS, stream, *a);
    return 0;
}
