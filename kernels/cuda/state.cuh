// SPDX-License-Identifier: Apache-2.0
//
// What passes through a session's state, by blocks of any kernel: KV rows of new tokens, compressed windows that close,
// rings, key lists.  Contracts: kernels.h, launches.h.
#pragma once

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

// The KV row of token t.
DSV4_DEVICE void block_kv_row(struct kv_work &s, const struct dsv4_cuda_norm_kv_args &a, int64_t t) {
    const dsv4_bf16 *x = a.kv + t * a.d_head;
    for (int32_t d = (int32_t)threadIdx.x; d < a.d_head; d += block_threads())
        s.row[d] = x[d];
    float r = dsv4_rsqrtf(block_mean_square(s.sums, x, a.d_head) + a.eps);
    int64_t angle = t * (a.d_rope / 2);
    block_norm_rope(s.row, a.kv_norm, a.d_head, r, a.cos + angle, a.sin + angle, a.d_rope / 2);
    block_kv_store(a.kv_rows + t * (int64_t)dsv4_kv_row_bytes(a.format, a.d_head, a.d_rope), s.row, a.format, a.d_head,
                   a.d_rope);
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

// Window number `item` of those that close, if there are so many.
DSV4_DEVICE void block_window(struct window_work &s, const struct dsv4_cuda_windows_args &a, int32_t item) {
    int32_t which, entry, i = (int32_t)threadIdx.x, n_pair = a.d_rope / 2;
    if (!find_window(a.pass, a.ratio, item, &which, &entry))
        return;
    const struct dsv4_cuda_piece piece = a.pass.pieces[which];
    const struct dsv4_cuda_state &state = a.pass.states[which];
    const float *old_k = a.index ? state.index_k : state.k, *old_gate = a.index ? state.index_gate : state.gate;
    int32_t width = a.dim * (a.overlap ? 2 : 1), n_row = a.ratio * (a.overlap ? 2 : 1);
    int32_t first = entry * a.ratio - (a.overlap ? a.ratio : 0);
    for (int32_t c = i; c < a.dim; c += block_threads())
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
    for (int32_t k = i; k < n_pair; k += block_threads())
        dsv4_sincosf((float)(entry * a.ratio) * a.freq[k], &s.sin[k], &s.cos[k]);
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

// --------------------------------------------------------------------------------------------------------------- rings

DSV4_DEVICE void keep_raw(float *to, const float *from, int32_t slot, int32_t t, int32_t width) {
    if (!from)
        return;
    for (int32_t c = (int32_t)threadIdx.x; c < width; c += block_threads())
        to[(int64_t)slot * width + c] = from[(int64_t)t * width + c];
}

// Token t; of those that share a slot the last one alone writes it.
DSV4_DEVICE void block_keep(const struct dsv4_cuda_keep_args &a, int32_t t) {
    int32_t which = a.pass.piece_of[t];
    const struct dsv4_cuda_piece piece = a.pass.pieces[which];
    const struct dsv4_cuda_state &state = a.pass.states[which];
    int32_t at = t - piece.first_tok, left = piece.n - at, position = piece.position + at;
    if (left <= a.window) {
        const uint8_t *from = a.kv_rows + (size_t)t * a.kv_row;
        uint8_t *to = state.window + (size_t)(position % a.window) * a.kv_row;
        for (size_t i = threadIdx.x; i < a.kv_row / 2; i += blockDim.x)
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

// ----------------------------------------------------------------------------------------------------------- key lists

// Keys of token t.
DSV4_DEVICE int32_t count_keys(const struct dsv4_cuda_keys_args &a, int32_t t) {
    return a.window + (a.selected ? a.n_selected[t] : a.ratio ? (a.pass.positions[t] + 1) / a.ratio : 0);
}

// The key of token t at a rank below their count; NULL: masked.
DSV4_DEVICE const uint8_t *key_at(const struct dsv4_cuda_keys_args &a, int32_t t, int32_t rank) {
    int32_t which = a.pass.piece_of[t], position = a.pass.positions[t];
    const struct dsv4_cuda_state &state = a.pass.states[which];
    if (rank >= a.window) {
        int32_t entry = rank - a.window;
        return entry_row(state.compressed, a.selected ? a.selected[(int64_t)t * a.top_k + entry] : entry, a.kv_row);
    }
    const struct dsv4_cuda_piece piece = a.pass.pieces[which];
    int32_t at = (position < a.window ? 0 : position - a.window + 1) + rank;
    if (at > position)
        return NULL;
    return at >= piece.position ? a.new_rows + (size_t)(piece.first_tok + at - piece.position) * a.kv_row
                                : state.window + (size_t)(at % a.window) * a.kv_row;
}
