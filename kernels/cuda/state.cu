// SPDX-License-Identifier: Apache-2.0
//
// What passes through a session's state, in launches of its own, and key lists.  Contracts: kernels.h, launches.h.
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

// ----------------------------------------------------------------------------------------------------------- key lists

// blockIdx.x: ranks; blockIdx.y: token.
DSV4_KERNEL(keys_kernel, struct dsv4_cuda_keys_args, ROW_THREADS, 1) {
    int32_t t = (int32_t)blockIdx.y, rank = (int32_t)(blockIdx.x * ROW_THREADS + threadIdx.x);
    int32_t which = a.pass.piece_of[t], position = a.pass.positions[t];
    const struct dsv4_cuda_piece piece = a.pass.pieces[which];
    const struct dsv4_cuda_state &state = a.pass.states[which];
    int32_t entries = a.selected ? a.n_selected[t] : a.ratio ? (position + 1) / a.ratio : 0, n = a.window + entries;
    if (rank == 0)
        a.n_key[t] = n;
    if (rank >= n)
        return;
    const uint8_t *key = NULL;
    if (rank >= a.window) {
        int32_t entry = rank - a.window;
        if (a.selected)
            entry = a.selected[(int64_t)t * a.top_k + entry];
        key = entry_row(state.compressed, entry, a.kv_row);
    } else {
        int32_t at = (position < a.window ? 0 : position - a.window + 1) + rank;
        if (at <= position)
            key = at >= piece.position ? a.new_rows + (size_t)(piece.first_tok + at - piece.position) * a.kv_row
                                       : state.window + (size_t)(at % a.window) * a.kv_row;
    }
    a.keys[(int64_t)t * a.max_key + rank] = key;
}

int dsv4_cuda_keys(const struct dsv4_cuda_keys_args *a, void *stream) {
    dim3 grid(dsv4_blocks((size_t)a->max_key, ROW_THREADS), (unsigned)a->pass.n_tok);
    if (grid.x && grid.y)
        DSV4_LAUNCH(keys_kernel, grid, ROW_THREADS, stream, *a);
    return 0;
}
