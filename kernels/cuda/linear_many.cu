// SPDX-License-Identifier: Apache-2.0
//
// Linear layers and experts for many tokens: tiles of 32 rows by 32 tokens of the sums of rule 1.  Per 128 columns a
// block brings both to shared memory, weights decoded to pairs of bf16 operands (of f32 weights: f32); a thread has one
// lane of 8 x 8 outputs.  Contracts: kernels.h, launches.h.
#include "linear.cuh"
#include "weights.cuh"

enum { MANY_THREADS = 256, MANY_ROWS = 32, MANY_TOK = DSV4_CUDA_MANY_TILE, EACH = 8, CHUNK = 128, PAIRS = CHUNK / 2 };
// words between rows: 8 rows apart, as two halves of a warp read them, is 16 banks apart
enum { STRIDE = PAIRS + 2 };

struct many_work {
    uint32_t w[MANY_ROWS][STRIDE], x[MANY_TOK][STRIDE]; // element 2i in the low half of word i
    float scale[MANY_ROWS][CHUNK / DSV4_FP4_BLOCK];     // rule 3
};

struct many_work_f32 {
    float2 w[MANY_ROWS][STRIDE];
    uint32_t x[MANY_TOK][STRIDE];
};

// What a block makes: out[t][r] for rows [r0, end) of w and n_tok tokens.
struct many_tile {
    struct dsv4_weight w;
    int32_t r0, end, n_tok;
};

// `n` bytes of a row of `bytes` from `at` on, zeros behind the end.
template <int n> DSV4_DEVICE void fetch(uint4 *to, const uint8_t *row, size_t at, size_t bytes) {
    const uint8_t *p = row + at;
    if (at + n <= bytes && (uintptr_t)p % 16 == 0 && n % 16 == 0) {
#pragma unroll
        for (int i = 0; i < n / 16; i++)
            to[i] = ((const uint4 *)(const void *)p)[i];
        return;
    }
    int words = at + n <= bytes && (uintptr_t)p % 4 == 0;
    dsv4_word32 *word = (dsv4_word32 *)to;
#pragma unroll
    for (int i = 0; i < n / 4; i++) {
        uint32_t v = 0;
        if (words) {
            v = ((const dsv4_word32 *)(const void *)p)[i];
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++)
                v |= at + 4 * i + j < bytes ? (uint32_t)p[4 * i + j] << 8 * j : 0u;
        }
        word[i] = v;
    }
}

// 16 elements of x from column k on as pairs, +0 behind the end; x NULL: all +0.
DSV4_DEVICE void stage_x(uint32_t *to, const dsv4_bf16 *x, int32_t k, int32_t cols) {
    uint4 pairs[2] = {};
    if (x)
        fetch<32>(pairs, (const uint8_t *)x, 2 * (size_t)k, 2 * (size_t)cols);
#pragma unroll
    for (int i = 0; i < 8; i++)
        to[i] = ((const dsv4_word32 *)pairs)[i];
}

// 16 elements of row r from column k on, decoded to pairs of bf16, without their scale under rule 3.
template <int format, int rule>
DSV4_DEVICE void stage_pairs(uint32_t *to, const struct dsv4_weight &w, int32_t r, int32_t k) {
    const int n = step_bytes<format>::value / 2;
    uint4 raw[(n + 15) / 16];
    size_t bytes = row_bytes(w);
    fetch<n>(raw, (const uint8_t *)w.data + (size_t)r * bytes, (size_t)k * n / 16, bytes);
    const int block = format == DSV4_W_FP4 ? DSV4_FP4_BLOCK : DSV4_FP8_BLOCK;
    float scale = 1.0f;
    if (rule != DSV4_SCALE_NONE && rule != DSV4_SCALE_BLOCK && k < w.cols)
        scale = block_scale<format>(w, r, k / block);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float even, odd;
        decode_pair<format, rule>((const uint8_t *)raw, i, scale, &even, &odd);
        to[i] = dsv4_pair_bf16(even, odd); // exact
    }
}

DSV4_DEVICE void stage_w(uint32_t *to, const struct many_tile &tile, int32_t r, int32_t k) {
    const struct dsv4_weight &w = tile.w;
    if (r >= tile.end) {
#pragma unroll
        for (int i = 0; i < 8; i++)
            to[i] = 0;
    } else if (w.format == DSV4_W_BF16) {
        stage_pairs<DSV4_W_BF16, DSV4_SCALE_NONE>(to, w, r, k);
    } else if (w.format == DSV4_W_FP4 && w.scale_rule == DSV4_SCALE_FOLD) {
        stage_pairs<DSV4_W_FP4, DSV4_SCALE_FOLD>(to, w, r, k);
    } else if (w.format == DSV4_W_FP4) {
        stage_pairs<DSV4_W_FP4, DSV4_SCALE_BLOCK>(to, w, r, k);
    } else if (w.scale_rule == DSV4_SCALE_FOLD) {
        stage_pairs<DSV4_W_FP8, DSV4_SCALE_FOLD>(to, w, r, k);
    } else if (w.scale_rule == DSV4_SCALE_BLOCK) {
        stage_pairs<DSV4_W_FP8, DSV4_SCALE_BLOCK>(to, w, r, k);
    } else {
        stage_pairs<DSV4_W_FP8, DSV4_SCALE_ROUND>(to, w, r, k);
    }
}

// acc += the products of one step of 32 columns, this thread's lane of 8 rows by 8 tokens.
DSV4_DEVICE void add_step(float acc[EACH][EACH], const uint32_t (*w)[STRIDE], const uint32_t (*x)[STRIDE], int at) {
    float even[EACH], odd[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        even[i] = dsv4_low_bf16(w[i][at]);
        odd[i] = dsv4_high_bf16(w[i][at]);
    }
#pragma unroll
    for (int t = 0; t < EACH; t++) {
        uint32_t pair = x[t][at];
        float x_even = dsv4_low_bf16(pair), x_odd = dsv4_high_bf16(pair);
#pragma unroll
        for (int i = 0; i < EACH; i++)
            acc[i][t] = dsv4_mad(x_odd, odd[i], acc[i][t]);
#pragma unroll
        for (int i = 0; i < EACH; i++)
            acc[i][t] = dsv4_mad(x_even, even[i], acc[i][t]);
    }
}

DSV4_DEVICE void add_step_f32(float acc[EACH][EACH], const float2 (*w)[STRIDE], const uint32_t (*x)[STRIDE], int at) {
#pragma unroll
    for (int t = 0; t < EACH; t++) {
        uint32_t pair = x[t][at];
        float x_even = dsv4_low_bf16(pair), x_odd = dsv4_high_bf16(pair);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            acc[i][t] = fmaf(x_odd, w[i][at].y, acc[i][t]);
            acc[i][t] = fmaf(x_even, w[i][at].x, acc[i][t]);
        }
    }
}

DSV4_DEVICE void clear(float acc[EACH][EACH]) {
#pragma unroll
    for (int i = 0; i < EACH; i++)
#pragma unroll
        for (int t = 0; t < EACH; t++)
            acc[i][t] = 0.0f;
}

// This thread's part of the tile: rows first_row + i, tokens first_tok + t.
DSV4_DEVICE int first_row() {
    return (int)threadIdx.x / 64 * EACH;
}
DSV4_DEVICE int first_tok() {
    return (int)threadIdx.x / 16 % 4 * EACH;
}

// All sums of a tile whose weights are operands (rule 1); x: this thread's row to stage, or NULL.
DSV4_DEVICE void plain_sums(struct many_work &s, const struct many_tile &tile, const dsv4_bf16 *x,
                            float acc[EACH][EACH]) {
    int row = (int)threadIdx.x / 8, part = (int)threadIdx.x % 8, lane = (int)threadIdx.x % 16;
    clear(acc);
    for (int32_t k = 0; k < tile.w.cols; k += CHUNK) {
        stage_x(&s.x[row][8 * part], x, k + 16 * part, tile.w.cols);
        stage_w(&s.w[row][8 * part], tile, tile.r0 + row, k + 16 * part);
        __syncthreads();
#pragma unroll 1
        for (int step = 0; step < CHUNK / 32; step++)
            add_step(acc, s.w + first_row(), s.x + first_tok(), 16 * step + lane);
        __syncthreads();
    }
}

// The same under rule 3: sums of each block start at +0 and join through their scale.
DSV4_DEVICE void block_sums(struct many_work &s, const struct many_tile &tile, const dsv4_bf16 *x,
                            float acc[EACH][EACH]) {
    int row = (int)threadIdx.x / 8, part = (int)threadIdx.x % 8, lane = (int)threadIdx.x % 16;
    int fp4 = tile.w.format == DSV4_W_FP4, each = fp4 ? 1 : CHUNK / 32; // steps in a block
    clear(acc);
    for (int32_t k = 0; k < tile.w.cols; k += CHUNK) {
        stage_x(&s.x[row][8 * part], x, k + 16 * part, tile.w.cols);
        stage_w(&s.w[row][8 * part], tile, tile.r0 + row, k + 16 * part);
        if (part < CHUNK / DSV4_FP4_BLOCK && part % each == 0 && tile.r0 + row < tile.end &&
            k + 32 * part < tile.w.cols)
            s.scale[row][part] = fp4 ? block_scale<DSV4_W_FP4>(tile.w, tile.r0 + row, k / DSV4_FP4_BLOCK + part)
                                     : block_scale<DSV4_W_FP8>(tile.w, tile.r0 + row, k / DSV4_FP8_BLOCK);
        __syncthreads();
#pragma unroll 1
        for (int first = 0; first < CHUNK / 32 && k + 32 * first < tile.w.cols; first += each) {
            float block[EACH][EACH];
            clear(block);
#pragma unroll 1
            for (int step = first; step < first + each; step++)
                add_step(block, s.w + first_row(), s.x + first_tok(), 16 * step + lane);
#pragma unroll
            for (int i = 0; i < EACH; i++)
#pragma unroll
                for (int t = 0; t < EACH; t++)
                    acc[i][t] = fmaf(block[i][t], s.scale[first_row() + i][first], acc[i][t]);
        }
        __syncthreads();
    }
}

DSV4_DEVICE void f32_sums(struct many_work_f32 &s, const struct many_tile &tile, const dsv4_bf16 *x,
                          float acc[EACH][EACH]) {
    int row = (int)threadIdx.x / 8, part = (int)threadIdx.x % 8, lane = (int)threadIdx.x % 16;
    clear(acc);
    size_t bytes = row_bytes(tile.w);
    for (int32_t k = 0; k < tile.w.cols; k += CHUNK) {
        stage_x(&s.x[row][8 * part], x, k + 16 * part, tile.w.cols);
        uint4 raw[4] = {};
        if (tile.r0 + row < tile.end)
            fetch<64>(raw, (const uint8_t *)tile.w.data + (size_t)(tile.r0 + row) * bytes, 4 * (size_t)(k + 16 * part),
                      bytes);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float2 pair;
            decode_pair<DSV4_W_F32, DSV4_SCALE_NONE>((const uint8_t *)raw, i, 1.0f, &pair.x, &pair.y);
            s.w[row][8 * part + i] = pair;
        }
        __syncthreads();
#pragma unroll 1
        for (int step = 0; step < CHUNK / 32; step++)
            add_step_f32(acc, s.w + first_row(), s.x + first_tok(), 16 * step + lane);
        __syncthreads();
    }
}

// Trees, then the sums into out, whose element (t, r) is at t * ld_out + r.
DSV4_DEVICE void store_tile(const struct many_tile &tile, void *out, ptrdiff_t ld_out, int out_f32,
                            float acc[EACH][EACH]) {
#pragma unroll
    for (int i = 0; i < EACH; i++)
#pragma unroll
        for (int t = 0; t < EACH; t++) {
            float sum = dsv4_lane_tree(acc[i][t]);
            int32_t r = tile.r0 + first_row() + i, at = first_tok() + t;
            if (threadIdx.x % 16 == 0 && r < tile.end && at < tile.n_tok)
                store_sum(out, at * ld_out + r, out_f32, sum);
        }
}

union many_any {
    struct many_work pairs;
    struct many_work_f32 wide;
};

DSV4_DEVICE void many_sums(union many_any &s, const struct many_tile &tile, const dsv4_bf16 *x, float acc[EACH][EACH]) {
    if (tile.w.format == DSV4_W_F32)
        f32_sums(s.wide, tile, x, acc);
    else if (tile.w.scale_rule == DSV4_SCALE_BLOCK)
        block_sums(s.pairs, tile, x, acc);
    else
        plain_sums(s.pairs, tile, x, acc);
}

// blockIdx.x: rows of a layer; blockIdx.y: tokens.
DSV4_KERNEL(many_kernel, struct layers, MANY_THREADS, 1) {
    DSV4_SHARED(union many_any, s);
    int32_t j = 0, row = (int32_t)threadIdx.x / 8, t0 = (int32_t)blockIdx.y * MANY_TOK;
    while (j + 1 < a.of.n_job && blockIdx.x >= a.first[j + 1])
        j++;
    const struct dsv4_cuda_linear_job &job = a.of.jobs[j];
    struct block_rows rows = rows_of_block(job, blockIdx.x - a.first[j], MANY_ROWS);
    struct many_tile tile = {job.w, rows.first, rows.end, a.of.n_tok - t0 < MANY_TOK ? a.of.n_tok - t0 : MANY_TOK};
    const dsv4_bf16 *x = NULL;
    if (row < tile.n_tok)
        x = job.x + (a.of.tok ? a.of.tok[t0 + row] : t0 + row) * job.ld_x + rows.x;
    float acc[EACH][EACH];
    many_sums(s, tile, x, acc);
    size_t size = job.out_f32 ? 4 : 2;
    store_tile(tile, (char *)job.out + (ptrdiff_t)size * t0 * job.ld_out, job.ld_out, job.out_f32, acc);
}

int launch_linear_many(const struct dsv4_cuda_linear_args *a, void *stream) {
    struct layers l = lay_out(a, MANY_ROWS);
    dim3 grid(l.first[DSV4_CUDA_JOBS], dsv4_blocks((size_t)a->n_tok, MANY_TOK));
    if (grid.x)
        DSV4_LAUNCH(many_kernel, grid, MANY_THREADS, stream, l);
    return 0;
}

// blockIdx.x: rows of w[0], then of w[1]; blockIdx.y: tile.
DSV4_KERNEL(many_experts_kernel, struct dsv4_cuda_experts_args, MANY_THREADS, 1) {
    DSV4_SHARED(union many_any, s);
    if ((int32_t)blockIdx.y >= *a.n_tile)
        return;
    struct dsv4_cuda_tile group = a.tiles[blockIdx.y];
    int32_t blocks = (a.rows + MANY_ROWS - 1) / MANY_ROWS, which = (int32_t)blockIdx.x / blocks;
    int32_t r0 = (int32_t)blockIdx.x % blocks * MANY_ROWS, row = (int32_t)threadIdx.x / 8;
    struct many_tile tile = {which ? a.w[1][group.expert] : a.w[0][group.expert], r0, a.rows, group.n};
    if (!tile.w.data)
        return;
    const dsv4_bf16 *x = NULL;
    if (row < group.n) {
        int64_t i = a.row_tok ? a.row_tok[group.first + row] : group.first + row;
        x = (tile.w.format == DSV4_W_FP8 || tile.w.format == DSV4_W_FP4 ? a.x_quant : a.x_plain) + i * a.cols;
    }
    float acc[EACH][EACH];
    many_sums(s, tile, x, acc);
    store_tile(tile, (which ? a.out[1] : a.out[0]) + (int64_t)group.first * a.rows, a.rows, 0, acc);
}

int launch_experts_many(const struct dsv4_cuda_experts_args *a, void *stream) {
    dim3 grid(dsv4_blocks((size_t)a->rows, MANY_ROWS) * (a->w[1] ? 2u : 1u), (unsigned)a->max_tile);
    if (grid.x && grid.y)
        DSV4_LAUNCH(many_experts_kernel, grid, MANY_THREADS, stream, *a);
    return 0;
}
