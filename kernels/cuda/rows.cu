// SPDX-License-Identifier: Apache-2.0
//
// What is done to rows of activations between linear layers: quantisers, KV and index rows, norms, rope.
// Contracts: kernels.h (bits), launches.h (arguments).
#include "rows.cuh"

// ------------------------------------------------------------------------------------------------ quantisers, formats

DSV4_KERNEL(act_kernel, struct dsv4_cuda_act_args, ROW_THREADS, 1) {
    int32_t groups = (a.n + DSV4_ACT_GROUP - 1) / DSV4_ACT_GROUP;
    int64_t item = (int64_t)blockIdx.x * ROW_WARPS + (int32_t)threadIdx.x / 32;
    if (item < (int64_t)a.n_row * groups)
        warp_act(a, item / groups, (int32_t)(item % groups));
}

int dsv4_cuda_act(const struct dsv4_cuda_act_args *a, void *stream) {
    size_t items = (size_t)a->n_row * (size_t)((a->n + DSV4_ACT_GROUP - 1) / DSV4_ACT_GROUP);
    if (items)
        DSV4_LAUNCH(act_kernel, dsv4_blocks(items, ROW_WARPS), ROW_THREADS, stream, *a);
    return 0;
}

DSV4_KERNEL(kv_store_kernel, struct dsv4_cuda_kv_args, ROW_THREADS, 1) {
    block_kv_store(a.rows + blockIdx.x * dsv4_kv_row_bytes(a.format, a.d_head, a.d_rope),
                   a.x + (size_t)blockIdx.x * (size_t)a.d_head, a.format, a.d_head, a.d_rope);
}

DSV4_KERNEL(kv_load_kernel, struct dsv4_cuda_kv_args, ROW_THREADS, 1) {
    const uint8_t *row = a.rows + blockIdx.x * dsv4_kv_row_bytes(a.format, a.d_head, a.d_rope);
    dsv4_bf16 *x = a.x + (size_t)blockIdx.x * (size_t)a.d_head;
    int32_t nope = a.format == DSV4_KV_FP8 ? a.d_head - a.d_rope : 0;
    const uint8_t *scales = row + nope + 2 * a.d_rope;
    for (int32_t d = (int32_t)threadIdx.x; d < a.d_head; d += ROW_THREADS) {
        if (d < nope)
            x[d] = fp8_value(row[d], scales[d / DSV4_KV_GROUP]);
        else
            memcpy(x + d, row + nope + 2 * (d - nope), 2);
    }
}

int dsv4_cuda_kv(const struct dsv4_cuda_kv_args *a, void *stream) {
    if (a->n_row && a->load)
        DSV4_LAUNCH(kv_load_kernel, (unsigned)a->n_row, ROW_THREADS, stream, *a);
    else if (a->n_row)
        DSV4_LAUNCH(kv_store_kernel, (unsigned)a->n_row, ROW_THREADS, stream, *a);
    return 0;
}

// A warp per row of at most 256 values.
DSV4_KERNEL(index_store_kernel, struct dsv4_cuda_index_args, ROW_THREADS, 1) {
    int64_t row = (int64_t)blockIdx.x * ROW_WARPS + (int32_t)threadIdx.x / 32;
    if (row < a.n_row)
        warp_index_row(a, row);
}

DSV4_KERNEL(index_load_kernel, struct dsv4_cuda_index_args, ROW_THREADS, 1) {
    const uint8_t *row = a.rows + blockIdx.x * dsv4_index_row_bytes(a.n);
    int32_t i = (int32_t)threadIdx.x;
    if (i >= a.n)
        return;
    uint8_t scale = row[a.n / 2 + i / DSV4_INDEX_GROUP], code = row[i / 2] >> 4 * (i & 1) & 15;
    a.x[(size_t)blockIdx.x * (size_t)a.n + (size_t)i] =
        scale == 255 ? (dsv4_bf16)0x7fc0 : dsv4_f32_to_bf16(dsv4_e2m1_to_f32(code) * dsv4_e8m0_to_f32(scale));
}

int dsv4_cuda_index(const struct dsv4_cuda_index_args *a, void *stream) {
    if (a->n_row && a->load)
        DSV4_LAUNCH(index_load_kernel, (unsigned)a->n_row, ROW_THREADS, stream, *a);
    else if (a->n_row)
        DSV4_LAUNCH(index_store_kernel, dsv4_blocks((size_t)a->n_row, ROW_WARPS), ROW_THREADS, stream, *a);
    return 0;
}

// A warp per row.
DSV4_KERNEL(hadamard_kernel, struct dsv4_cuda_hadamard_args, ROW_THREADS, 1) {
    int64_t row = (int64_t)blockIdx.x * ROW_WARPS + (int32_t)threadIdx.x / 32;
    int32_t lane = (int32_t)threadIdx.x % 32;
    if (row >= a.n_row)
        return; // whole warps
    float v[INDEX_EACH];
    dsv4_bf16 *x = a.x + row * a.n;
    warp_row_load(v, x, a.n);
    warp_row_hadamard(v, a.n);
#pragma unroll
    for (int j = 0; j < INDEX_EACH; j++)
        if (32 * j + lane < a.n)
            x[32 * j + lane] = dsv4_f32_to_bf16(v[j]);
}

int dsv4_cuda_hadamard(const struct dsv4_cuda_hadamard_args *a, void *stream) {
    if (a->n_row)
        DSV4_LAUNCH(hadamard_kernel, dsv4_blocks((size_t)a->n_row, ROW_WARPS), ROW_THREADS, stream, *a);
    return 0;
}

// -------------------------------------------------------------------------------------------------------------- norms

DSV4_KERNEL(mean_square_kernel, struct dsv4_cuda_mean_square_args, ROW_THREADS, 1) {
    DSV4_SHARED(struct mean_square_work, s);
    float m = block_mean_square(s, a.x + (size_t)blockIdx.x * (size_t)a.n, a.n);
    if (threadIdx.x == 0)
        a.out[blockIdx.x] = m;
}

int dsv4_cuda_mean_square(const struct dsv4_cuda_mean_square_args *a, void *stream) {
    if (a->n_row)
        DSV4_LAUNCH(mean_square_kernel, (unsigned)a->n_row, ROW_THREADS, stream, *a);
    return 0;
}

DSV4_KERNEL(rmsnorm_kernel, struct dsv4_cuda_rmsnorm_args, ROW_THREADS, 1) {
    DSV4_SHARED(struct mean_square_work, s);
    size_t first = (size_t)blockIdx.x * (size_t)a.n;
    float r = dsv4_rsqrtf(block_mean_square(s, a.x + first, a.n) + a.eps);
    block_norm_operands(a.out ? a.out + first : NULL, a.quant ? a.quant + first : NULL, a.plain ? a.plain + first : NULL,
                        a.x + first, a.w, a.n, r);
}

int dsv4_cuda_rmsnorm(const struct dsv4_cuda_rmsnorm_args *a, void *stream) {
    if (a->n_row)
        DSV4_LAUNCH(rmsnorm_kernel, (unsigned)a->n_row, ROW_THREADS, stream, *a);
    return 0;
}

DSV4_KERNEL(headnorm_kernel, struct dsv4_cuda_headnorm_args, ROW_THREADS, 1) {
    half_warp_headnorm(a, (int64_t)blockIdx.x * (ROW_THREADS / 16) + (int32_t)threadIdx.x / 16);
}

int dsv4_cuda_headnorm(const struct dsv4_cuda_headnorm_args *a, void *stream) {
    if (a->n_row)
        DSV4_LAUNCH(headnorm_kernel, dsv4_blocks((size_t)a->n_row, ROW_THREADS / 16), ROW_THREADS, stream, *a);
    return 0;
}

// --------------------------------------------------------------------------------------------------------------- rope

DSV4_KERNEL(rope_table_kernel, struct dsv4_cuda_rope_table_args, ROW_THREADS, 1) {
    int64_t i = (int64_t)blockIdx.x * ROW_THREADS + (int32_t)threadIdx.x;
    if (i < (int64_t)a.n_tok * a.n_pair)
        dsv4_sincosf((float)a.positions[i / a.n_pair] * a.freq[i % a.n_pair], a.sin + i, a.cos + i);
}

int dsv4_cuda_rope_table(const struct dsv4_cuda_rope_table_args *a, void *stream) {
    size_t n = (size_t)a->n_tok * (size_t)a->n_pair;
    if (n)
        DSV4_LAUNCH(rope_table_kernel, dsv4_blocks(n, ROW_THREADS), ROW_THREADS, stream, *a);
    return 0;
}

// A thread per value outside the rotated part, one per pair inside; rows of even length.
DSV4_KERNEL(rope_kernel, struct dsv4_cuda_rope_args, ROW_THREADS, 1) {
    int64_t i = (int64_t)blockIdx.x * ROW_THREADS + (int32_t)threadIdx.x;
    int32_t nope = a.n - 2 * a.n_pair, items = a.flush ? nope + a.n_pair : a.n_pair;
    if (i >= (int64_t)a.n_row * items)
        return;
    int64_t row = i / items;
    int32_t at = (int32_t)(i % items) - (items - a.n_pair);
    dsv4_bf16 *x = a.x + row * a.n + nope;
    if (at < 0) {
        x[at] = dsv4_bf16_operand(x[at]);
        return;
    }
    int64_t angle = row / a.per_tok * a.n_pair + at;
    float p = dsv4_bf16_to_f32(x[2 * at]), q = dsv4_bf16_to_f32(x[2 * at + 1]);
    float c = a.cos[angle], s = a.inverse ? -a.sin[angle] : a.sin[angle];
    dsv4_bf16 u = dsv4_f32_to_bf16(p * c - q * s), v = dsv4_f32_to_bf16(p * s + q * c);
    x[2 * at] = a.flush ? dsv4_bf16_operand(u) : u;
    x[2 * at + 1] = a.flush ? dsv4_bf16_operand(v) : v;
}

int dsv4_cuda_rope(const struct dsv4_cuda_rope_args *a, void *stream) {
    size_t n = (size_t)a->n_row * (size_t)(a->flush ? a->n - a->n_pair : a->n_pair);
    if (n)
        DSV4_LAUNCH(rope_kernel, dsv4_blocks(n, ROW_THREADS), ROW_THREADS, stream, *a);
    return 0;
}
