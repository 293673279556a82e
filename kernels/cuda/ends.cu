// SPDX-License-Identifier: Apache-2.0
//
// The first and the last steps of a pass: embedding, a look for values that are not finite, the best token.
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

// The better of two (order of the value, then the lower id first) is the larger.
DSV4_DEVICE uint64_t token_rank(float value, int32_t id) {
    uint32_t u = dsv4_f32_bits(value + 0.0f), key = u >> 31 ? ~u : u | 0x80000000u;
    return value > -DSV4_INF ? (uint64_t)key << 32 | (0xffffffffu - (uint32_t)id) : 0u; // a NaN is not above
}

struct ranks {
    uint64_t best[ENDS_THREADS];
};

// A block per row.
DSV4_KERNEL(argmax_kernel, struct dsv4_cuda_argmax_args, ENDS_THREADS, 1) {
    DSV4_SHARED(struct ranks, s);
    const float *row = a.logits + (int64_t)blockIdx.x * a.n;
    int32_t i = (int32_t)threadIdx.x;
    uint64_t best = 0;
    for (int32_t id = i; id < a.n; id += ENDS_THREADS) {
        uint64_t rank = token_rank(row[id], id);
        best = rank > best ? rank : best;
    }
    s.best[i] = best;
    __syncthreads();
    for (int32_t step = ENDS_THREADS / 2; step > 0; step /= 2) {
        if (i < step && s.best[i + step] > s.best[i])
            s.best[i] = s.best[i + step];
        __syncthreads();
    }
    if (i == 0)
        a.ids[blockIdx.x] = s.best[0] ? (int32_t)(0xffffffffu - (uint32_t)s.best[0]) : 0;
}

int dsv4_cuda_argmax(const struct dsv4_cuda_argmax_args *a, void *stream) {
    if (a->n_row)
        DSV4_LAUNCH(argmax_kernel, (unsigned)a->n_row, ENDS_THREADS, stream, *a);
    return 0;
}
