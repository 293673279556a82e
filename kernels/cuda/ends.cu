// SPDX-License-Identifier: Apache-2.0
//
// The first and the last steps of a pass: embedding, a look for values that are not finite.
#include "device.cuh"

enum { ENDS_THREADS = 256 };

// A thread per column of a token, for all streams.
DSV4_KERNEL(embed_kernel, struct dsv4_cuda_embed_args, ENDS_THREADS, 1) {
    int64_t i = (int64_t)blockIdx.x * ENDS_THREADS + (int32_t)threadIdx.x;
    if (i >= (int64_t)a.n_tok * a.d_model)
        return;
    int64_t t = i / a.d_model, c = i % a.d_model, from = (int64_t)a.ids[t] * a.d_model + c;
    dsv4_bf16 x = a.table_f32 ? dsv4_f32_to_bf16(((const float *)a.table)[from]) : ((const dsv4_bf16 *)a.table)[from];
    for (int32_t j = 0; j < a.hc; j++)
        a.streams[(t * a.hc + j) * a.d_model + c] = x;
}

int dsv4_cuda_embed(const struct dsv4_cuda_embed_args *a, void *stream) {
    size_t n = (size_t)a->n_tok * (size_t)a->d_model;
    if (n)
        DSV4_LAUNCH(embed_kernel, dsv4_blocks(n, ENDS_THREADS), ENDS_THREADS, stream, *a);
    return 0;
}

DSV4_KERNEL(finite_kernel, struct dsv4_cuda_finite_args, ENDS_THREADS, 1) {
    int found = 0;
    for (size_t i = (size_t)blockIdx.x * ENDS_THREADS + threadIdx.x; i < a.n; i += (size_t)gridDim.x * ENDS_THREADS)
        found |= a.f32 ? (((const uint32_t *)a.x)[i] & 0x7f800000u) == 0x7f800000u
                       : (((const dsv4_bf16 *)a.x)[i] & 0x7f80u) == 0x7f80u;
    if (found)
        atomicMin(a.bad, a.layer);
}

int dsv4_cuda_finite(const struct dsv4_cuda_finite_args *a, void *stream) {
    unsigned blocks = dsv4_blocks(a->n, ENDS_THREADS);
    if (blocks)
        DSV4_LAUNCH(finite_kernel, blocks < 1024 ? blocks : 1024, ENDS_THREADS, stream, *a);
    return 0;
}
