// SPDX-License-Identifier: Apache-2.0
//
// What passes through a session's state: KV rows of new tokens, compressed windows that close, rings, key lists.
// Contracts: kernels.h, launches.h.
#include "rows.cuh"

// Index of `position` in a ring, or of an entry in its block.
DSV4_DEVICE const uint8_t *entry_row(uint8_t *const *blocks, int32_t i, size_t bytes) {
    return blocks[i / DSV4_CUDA_BLOCK_ROWS] + (size_t)(i % DSV4_CUDA_BLOCK_ROWS) * bytes;
}

// ------------------------------------------------------------------------------------------------ queries and KV rows

struct kv_work {
    struct mean_square_work sums;
    dsv4_bf16 row[ENTRY_MAX];
};

// blockIdx.x: token; blockIdx.y: 0 the low-rank query, 1 the KV row.
DSV4_KERNEL(norm_kv_kernel, struct dsv4_cuda_norm_kv_args, ROW_THREADS, 1) {
    DSV4_SHARED(struct kv_work, s);
    size_t t = blockIdx.x;
    if (blockIdx.y == 0) {
        size_t first = t * (size_t)a.q_lora;
        float r = dsv4_rsqrtf(block_mean_square(s.sums, a.qa + first, a.q_lora) + a.eps);
        block_norm_operands(a.qr ? a.qr + first : NULL, a.quant ? a.qr_operand + first : NULL,
                            a.quant ? NULL : a.qr_operand + first, a.qa + first, a.q_norm, a.q_lora, r);
        return;
    }
    const dsv4_bf16 *x = a.kv + t * (size_t)a.d_head;
    for (int32_t d = (int32_t)threadIdx.x; d < a.d_head; d += ROW_THREADS)
        s.row[d] = x[d];
    float r = dsv4_rsqrtf(block_mean_square(s.sums, x, a.d_head) + a.eps);
    size_t angle = t * (size_t)(a.d_rope / 2);
    block_norm_rope(s.row, a.kv_norm, a.d_head, r, a.cos + angle, a.sin + angle, a.d_rope / 2);
    block_kv_store(a.kv_rows + t * dsv4_kv_row_bytes(a.format, a.d_head, a.d_rope), s.row, a.format, a.d_head, a.d_rope);
}

int dsv4_cuda_norm_kv(const struct dsv4_cuda_norm_kv_args *a, void *stream) {
    if (a->n_tok)
        DSV4_LAUNCH(norm_kv_kernel, dim3((unsigned)a->n_tok, 2), ROW_THREADS, stream, *a);
    return 0;
}

// ------------------------------------------------------------------------------------------------------------- pooling

// One row of a pooled window, at one dimension: absent rows have no gate.
struct pooled {
    float k, gate; // the gate with its position's bias
    int there;
};

// The softmax over rows at one dimension (dsv4_pool_args); `at` gives row r.
template <class Rows> DSV4_DEVICE dsv4_bf16 pool_one(const Rows &at, int32_t n_row) {
    float top = -DSV4_INF, sum = 0.0f, acc = 0.0f;
    for (int32_t r = 0; r < n_row; r++) {
        struct pooled x = at(r);
        if (x.there && x.gate > top)
            top = x.gate;
    }
    for (int32_t r = 0; r < n_row; r++) {
        struct pooled x = at(r);
        if (!x.there)
            continue;
        float p = dsv4_expf(x.gate - top);
        sum += p;
        acc = fmaf(p, x.k, acc);
    }
    return dsv4_f32_to_bf16(acc / sum);
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

// The piece and the entry of window number `item` of the pass; 0 when there are not so many.
DSV4_DEVICE int find_window(const struct dsv4_cuda_pass &pass, int32_t ratio, int32_t item, int32_t *piece,
                            int32_t *entry) {
    for (int32_t i = 0; i < pass.n_piece; i++) {
        int32_t first = pass.pieces[i].position / ratio, n = (pass.pieces[i].position + pass.pieces[i].n) / ratio - first;
        if (item < n) {
            *piece = i;
            *entry = first + item;
            return 1;
        }
        item -= n;
    }
    return 0;
}

struct window_work {
    struct mean_square_work sums;
    dsv4_bf16 row[ENTRY_MAX];
    float cos[ROW_THREADS], sin[ROW_THREADS];
};

// A block per window that closes.
DSV4_KERNEL(windows_kernel, struct dsv4_cuda_windows_args, ROW_THREADS, 1) {
    DSV4_SHARED(struct window_work, s);
    int32_t which, entry, i = (int32_t)threadIdx.x, n_pair = a.d_rope / 2;
    if (!find_window(a.pass, a.ratio, (int32_t)blockIdx.x, &which, &entry))
        return;
    const struct dsv4_cuda_piece piece = a.pass.pieces[which];
    const struct dsv4_cuda_state &state = a.pass.states[which];
    const float *old_k = a.index ? state.index_k : state.k, *old_gate = a.index ? state.index_gate : state.gate;
    int32_t width = a.dim * (a.overlap ? 2 : 1), n_row = a.ratio * (a.overlap ? 2 : 1);
    int32_t first = entry * a.ratio - (a.overlap ? a.ratio : 0);
    for (int32_t c = i; c < a.dim; c += ROW_THREADS)
        s.row[c] = pool_one(
            [&](int32_t r) -> struct pooled {
                int32_t t = first + r;
                if (t < 0)
                    return {0.0f, 0.0f, 0};
                int32_t half = a.overlap && r >= a.ratio ? a.dim : 0, fresh = t >= piece.position;
                int64_t at = (int64_t)(fresh ? piece.first_tok + t - piece.position : t % a.slots) * width + half + c;
                float gate = (fresh ? a.new_gate : old_gate)[at] + a.ape[(int64_t)(t % a.ratio) * width + half + c];
                return {(fresh ? a.new_k : old_k)[at], gate, 1};
            },
            n_row);
    if (i < n_pair)
        dsv4_sincosf((float)(entry * a.ratio) * a.freq[i], &s.sin[i], &s.cos[i]);
    __syncthreads();
    float r = dsv4_rsqrtf(block_mean_square(s.sums, s.row, a.dim) + a.eps);
    block_norm_rope(s.row, a.norm, a.dim, r, s.cos, s.sin, n_pair);
    if (a.index) {
        float v[INDEX_EACH];
        if (i >= 32)
            return;
        warp_row_load(v, s.row, a.dim);
        warp_row_hadamard(v, a.dim);
        warp_index_store((uint8_t *)entry_row(state.index, entry, dsv4_index_row_bytes(a.dim)), v, a.dim);
    } else {
        size_t bytes = dsv4_kv_row_bytes(a.format, a.dim, a.d_rope);
        block_kv_store((uint8_t *)entry_row(state.compressed, entry, bytes), s.row, a.format, a.dim, a.d_rope);
    }
}

int dsv4_cuda_windows(const struct dsv4_cuda_windows_args *a, void *stream) {
    if (a->max_window)
        DSV4_LAUNCH(windows_kernel, (unsigned)a->max_window, ROW_THREADS, stream, *a);
    return 0;
}

// --------------------------------------------------------------------------------------------------------------- rings

DSV4_DEVICE void keep_raw(float *to, const float *from, int32_t slot, int32_t t, int32_t width) {
    if (!from)
        return;
    for (int32_t c = (int32_t)threadIdx.x; c < width; c += ROW_THREADS)
        to[(int64_t)slot * width + c] = from[(int64_t)t * width + c];
}

// A block per token; of those that share a slot the last one alone writes it.
DSV4_KERNEL(keep_kernel, struct dsv4_cuda_keep_args, ROW_THREADS, 1) {
    int32_t t = (int32_t)blockIdx.x, which = a.pass.piece_of[t];
    const struct dsv4_cuda_piece piece = a.pass.pieces[which];
    const struct dsv4_cuda_state &state = a.pass.states[which];
    int32_t at = t - piece.first_tok, left = piece.n - at, position = piece.position + at;
    if (left <= a.window) {
        const uint8_t *from = a.kv_rows + (size_t)t * a.kv_row;
        uint8_t *to = state.window + (size_t)(position % a.window) * a.kv_row;
        for (size_t i = threadIdx.x; i < a.kv_row / 2; i += ROW_THREADS)
            ((dsv4_word16 *)to)[i] = ((const dsv4_word16 *)from)[i];
    }
    if (left > a.slots)
        return;
    int32_t slot = position % a.slots;
    keep_raw(state.k, a.k, slot, t, a.width);
    keep_raw(state.gate, a.gate, slot, t, a.width);
    keep_raw(state.index_k, a.index_k, slot, t, a.index_width);
    keep_raw(state.index_gate, a.index_gate, slot, t, a.index_width);
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
