// SPDX-License-Identifier: Apache-2.0
//
// Experts that lie in host memory, beside the device: what the host needs for their rows goes out to memory that both
// see, and the rows come back from there.  Contracts: launches.h.
//
// The host waits for a number in that memory, not for the stream.  So a block's bytes are made visible to the system
// before its ticket, and the number is written by the block that draws the last one.
#include "device.cuh"

enum { BESIDE_THREADS = 256 };

// n values by the whole block.
DSV4_DEVICE void copy_row(dsv4_bf16 *to, const dsv4_bf16 *from, int32_t n) {
    if (n % 8 == 0 && (uintptr_t)to % 16 == 0 && (uintptr_t)from % 16 == 0) {
        for (int32_t i = (int32_t)threadIdx.x; i < n / 8; i += BESIDE_THREADS)
            ((uint4 *)(void *)to)[i] = ((const uint4 *)(const void *)from)[i];
        return;
    }
    for (int32_t i = (int32_t)threadIdx.x; i < n; i += BESIDE_THREADS)
        to[i] = from[i];
}

// A block per token.
DSV4_KERNEL(send_kernel, struct dsv4_cuda_send_args, BESIDE_THREADS, 1) {
    int64_t t = blockIdx.x;
    int computed = 0; // whether the host computes one of its rows
    for (int32_t j = 0; j < a.top_k; j++) {
        int32_t e = a.ids[t * a.top_k + j];
        computed |= !a.w[e].data && a.group_first[e + 1] - a.group_first[e] <= a.few;
    }
    for (int32_t j = (int32_t)threadIdx.x; j < a.top_k; j += BESIDE_THREADS) {
        a.to_ids[t * a.top_k + j] = a.ids[t * a.top_k + j];
        a.to_weights[t * a.top_k + j] = a.weights[t * a.top_k + j];
    }
    if (computed && a.to_quant)
        copy_row(a.to_quant + t * a.n, a.x_quant + t * a.n, a.n);
    if (computed && a.to_plain)
        copy_row(a.to_plain + t * a.n, a.x_plain + t * a.n, a.n);
    __syncthreads();
    if (threadIdx.x)
        return;
    __threadfence_system();
    if (atomicAdd((int32_t *)a.count, 1) + 1 < (int32_t)gridDim.x)
        return;
    __threadfence_system();
    a.count[0] = 0;
    *(volatile uint32_t *)a.sent = ++a.count[1];
}

int dsv4_cuda_send(const struct dsv4_cuda_send_args *a, void *stream) {
    if (a->n_tok)
        DSV4_LAUNCH(send_kernel, (unsigned)a->n_tok, BESIDE_THREADS, stream, *a);
    return 0;
}

// A block per row that there may be.
DSV4_KERNEL(receive_kernel, struct dsv4_cuda_receive_args, BESIDE_THREADS, 1) {
    int64_t i = blockIdx.x;
    if (i < *a.n_row)
        copy_row(a.rows + (int64_t)a.to[i] * a.n, a.from + i * a.n, a.n);
}

int dsv4_cuda_receive(const struct dsv4_cuda_receive_args *a, void *stream) {
    if (a->max_row)
        DSV4_LAUNCH(receive_kernel, (unsigned)a->max_row, BESIDE_THREADS, stream, *a);
    return 0;
}
