// SPDX-License-Identifier: Apache-2.0
//
// Linear layers and experts for many tokens on tensor cores: blocks of 128 tokens by 128 rows, mma.m16n8k16 over bf16
// operands with f32 sums.  Not the CPU's sums; what they keep is in launches.h ("tensor_cores").
//
// A step is 32 columns.  All threads copy the bytes of a step of both sides to shared memory, asynchronously, two or three
// steps ahead; a warp makes 64 tokens by 32 rows and decodes the weights it multiplies in registers, on their way from
// shared memory, so shared memory holds bytes as they lie in the checkpoint.
//
// Any order of the 32 columns of a step will do if both sides agree.  Lane (g, q) of a warp, g = lane / 4, q = lane % 4,
// takes columns 8 q ... 8 q + 7 of rows g: one read of 16 bytes of x, and of 16, 8 or 4 bytes of a weight.  A row of a
// step is 64, 32 or 16 bytes and rows follow each other without gaps, so what the lanes of one transaction read is always
// 128 bytes in a row: no two of them use the same bank, without padding, swizzle or ldmatrix.  The first mma of a step
// multiplies columns 8 q ... 8 q + 3 of every q, the second the others:
//
//      columns of lane (g, q)     8q  8q+1   8q+2 8q+3 | 8q+4 8q+5  8q+6 8q+7
//      k of the mma               2q  2q+1   2q+8 2q+9 | 2q   2q+1  2q+8 2q+9
#include "linear.cuh"
#include "weights.cuh"

enum { MMA_THREADS = 256, MMA_ROWS = 128, MMA_TOK = DSV4_CUDA_MMA_TILE, STEP = 32, WARP_TOK = 64, WARP_ROWS = 32 };
enum { M = WARP_TOK / 16, N = WARP_ROWS / 8, GROUP = DSV4_FP8_BLOCK / STEP };

struct mma_stages {
    uint4 bytes[3072]; // 48 KB: stages of 8 KB of x and, by the format, 8, 4 or 2 KB of weights; behind FP4's, scales
};

// What a block makes: out[t][r] for rows [r0, end) of w and n_tok tokens.
struct mma_tile {
    struct dsv4_weight w;
    int32_t r0, end, n_tok;
};

template <int format> struct mma_shape {
    enum {
        row = step_bytes<format>::value / 16,              // pieces of 16 bytes
        stage = MMA_TOK * 4 + MMA_ROWS * row,
        stages = format == DSV4_W_BF16 ? 3 : 4,
    };
};

// ------------------------------------------------------------------------------------------------------------ decoding

// Two bf16 values of which only the upper halves are asked for.
DSV4_DEVICE uint32_t pack(float even, float odd) {
    return __byte_perm(dsv4_f32_bits(even), dsv4_f32_bits(odd), 0x7632u);
}

// Eight codes as bf16 pairs, times the scale, which is 2^e with |e| <= 55.
DSV4_DEVICE void decode_fp4(uint32_t out[4], uint32_t codes, uint32_t scale_pair) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint32_t four = i ? codes >> 16 : codes & 0xffffu, index = four & 0x7777u;
        // bytes of bf16: 0, .5, 1, 1.5, 2, 3, 4, 6
        uint32_t high = __byte_perm(0x3f3f3f00u, 0x40404040u, index), low = __byte_perm(0xc0800000u, 0xc0804000u, index);
        uint32_t signs = __byte_perm(four, 0u, 0x1100u); // bit 3 of bytes 0 and 2, bit 7 of 1 and 3
        high |= (signs << 4 & 0x00800080u) | (signs & 0x80008000u);
        out[2 * i] = dsv4_mul_bf16x2(__byte_perm(low, high, 0x5140u), scale_pair);
        out[2 * i + 1] = dsv4_mul_bf16x2(__byte_perm(low, high, 0x7362u), scale_pair);
    }
}

// The same of eight FP8 codes; `scale` is not used under rule 3.
template <int rule> DSV4_DEVICE void decode_fp8(uint32_t out[4], uint2 codes, float scale) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t word = i < 2 ? codes.x : codes.y;
        float even, odd;
        e4m3_pair(i % 2 ? word >> 16 : word & 0xffffu, &even, &odd);
        if (rule != DSV4_SCALE_BLOCK) {
            even *= scale;
            odd *= scale;
        }
        out[i] = rule == DSV4_SCALE_ROUND ? pack(rounded_operand(even), rounded_operand(odd)) : pack(even, odd);
    }
}

// The scale bytes of a row for four steps, the first in the lowest byte, of `left` that are there.
DSV4_DEVICE uint32_t fp4_scales(const uint8_t *p, int32_t left) {
    if (left >= GROUP && (uintptr_t)p % 4 == 0)
        return *(const dsv4_word32 *)p;
    uint32_t all = 0;
#pragma unroll
    for (int i = 0; i < GROUP; i++)
        if (i < left)
            all |= (uint32_t)p[i] << 8 * i;
    return all;
}

// ---------------------------------------------------------------------------------------------------------------- sums

// What this thread copies in every step: 16 bytes of two rows of x and of one or two rows of w; NULL: no such row.
struct mma_source {
    const uint8_t *x[2], *w[2];
};

template <int format> DSV4_DEVICE struct mma_source source_of(const struct mma_tile &tile, const dsv4_bf16 *const x[2]) {
    const int each = mma_shape<format>::row;
    int32_t i = (int32_t)threadIdx.x;
    struct mma_source from = {};
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int32_t at = i + h * MMA_THREADS, r = tile.r0 + at / each;
        from.x[h] = x[h] ? (const uint8_t *)(x[h] + i % 4 * 8) : NULL;
        if (at < MMA_ROWS * each && r < tile.end)
            from.w[h] = (const uint8_t *)tile.w.data + (size_t)r * row_bytes(tile.w) + 16 * (size_t)(at % each);
    }
    return from;
}

// The next step of a tile to shared memory.
template <int format> DSV4_DEVICE void fetch_step(uint4 *stage, struct mma_source &from) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        uint4 *to = stage + (int)threadIdx.x + h * MMA_THREADS;
        if (from.x[h]) {
            dsv4_copy16(to, from.x[h]);
            from.x[h] += 2 * STEP;
        }
        if ((h == 0 || MMA_ROWS * mma_shape<format>::row > MMA_THREADS) && from.w[h]) {
            dsv4_copy16(to + MMA_TOK * 4, from.w[h]);
            from.w[h] += step_bytes<format>::value;
        }
    }
}

// The weights of this lane for one step: rows first + 8 n + g, columns 8 q ... 8 q + 7, as pairs.  scales: of FP4, those of
// the rows for a group; scale: of FP8, that of the tile, whose rows all have the same.
template <int format, int rule>
DSV4_DEVICE void take_weights(uint32_t b[N][4], const uint4 *w, int first, int step, const uint32_t *scales, float scale) {
    int g = (int)threadIdx.x % 32 / 4, q = (int)threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < N; n++) {
        int r = first + 8 * n + g;
        if (format == DSV4_W_BF16) {
            uint4 v = w[4 * r + q];
            b[n][0] = v.x, b[n][1] = v.y, b[n][2] = v.z, b[n][3] = v.w;
        } else if (format == DSV4_W_FP8) {
            decode_fp8<rule>(b[n], ((const uint2 *)w)[4 * r + q], scale);
        } else {
            uint32_t byte = rule == DSV4_SCALE_FOLD ? scales[r] >> step % GROUP * 8 & 0xffu : 127u;
            decode_fp4(b[n], ((const dsv4_word32 *)w)[4 * r + q], byte * 0x00800080u); // 2^(byte - 127), twice
        }
    }
}

// acc += the products of a step: m tiles of 16 tokens that exist.
DSV4_DEVICE void multiply(float acc[M][N][4], const uint4 *x, const uint32_t b[N][4], int n_tok) {
    int g = (int)threadIdx.x % 32 / 4, q = (int)threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < M; m++) {
        if (16 * m >= n_tok)
            break;
        uint4 low = x[4 * (16 * m + g) + q], high = x[4 * (16 * m + g + 8) + q];
        const uint32_t a[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
#pragma unroll
        for (int k = 0; k < 2; k++)
#pragma unroll
            for (int n = 0; n < N; n++)
                dsv4_mma(acc[m][n], a[k], b[n] + 2 * k);
    }
}

DSV4_DEVICE void clear(float acc[M][N][4]) {
#pragma unroll
    for (int i = 0; i < M * N * 4; i++)
        acc[i / (4 * N)][i / 4 % N][i % 4] = 0.0f;
}

// Rule 3: the sums of a block of columns join through the scale of their row; column of a fragment = row of the weight.
template <int format>
DSV4_DEVICE void join(float acc[M][N][4], float block[M][N][4], const struct mma_tile &tile, int first, int32_t number) {
    int q = (int)threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < N; n++) {
        float scale[2] = {0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int32_t r = tile.r0 + first + 8 * n + 2 * q + i;
            if (r < tile.end)
                scale[i] = block_scale<format>(tile.w, r, number);
        }
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                acc[m][n][i] = fmaf(block[m][n][i], scale[i % 2], acc[m][n][i]);
                block[m][n][i] = 0.0f;
            }
    }
}

// All sums of a tile: of this warp's 64 tokens and 32 rows, from token tok0 and row row0 of the tile on.
template <int format, int rule>
DSV4_DEVICE void mma_sums(struct mma_stages &s, const struct mma_tile &tile, const dsv4_bf16 *const x[2], int tok0,
                          int row0, float acc[M][N][4]) {
    const int stages = mma_shape<format>::stages, size = mma_shape<format>::stage;
    int32_t steps = tile.w.cols / STEP;
    float block[M][N][4];
    uint32_t *scales = (uint32_t *)(s.bytes + stages * size), ahead = 0; // FP4: two groups; one more on its way
    float scale = 0.0f;
    const uint8_t *scale_at = NULL; // where this thread's part of FP4's comes from
    if (format == DSV4_W_FP4 && rule == DSV4_SCALE_FOLD && threadIdx.x < MMA_ROWS && tile.r0 + (int32_t)threadIdx.x < tile.end)
        scale_at = (const uint8_t *)tile.w.scale + (size_t)(tile.r0 + (int32_t)threadIdx.x) * (size_t)steps;
    struct mma_source from = source_of<format>(tile, x);
    clear(acc);
    if (rule == DSV4_SCALE_BLOCK)
        clear(block);
    if (scale_at)
        ahead = fp4_scales(scale_at, steps);
    for (int32_t i = 0; i < stages - 1; i++) {
        if (i < steps)
            fetch_step<format>(s.bytes + i * size, from);
        dsv4_copy_commit();
    }
    for (int32_t i = 0; i < steps; i++) {
        if (format == DSV4_W_FP8 && rule != DSV4_SCALE_BLOCK && i % GROUP == 0)
            scale = block_scale<DSV4_W_FP8>(tile.w, tile.r0, i / GROUP); // before the wait, so that it comes during it
        if (scale_at && i % GROUP == 0) {
            scales[i / GROUP % 2 * MMA_ROWS + (int)threadIdx.x] = ahead;
            scale_at += GROUP;
            ahead = fp4_scales(scale_at, steps - i - GROUP);
        }
        dsv4_copy_wait<mma_shape<format>::stages - 2>();
        __syncthreads(); // everybody's part of this stage is there, and the stage before is free
        if (i + stages - 1 < steps)
            fetch_step<format>(s.bytes + (i + stages - 1) % stages * size, from);
        dsv4_copy_commit();
        if (tok0 < tile.n_tok) { // the whole warp
            const uint4 *stage = s.bytes + i % stages * size;
            uint32_t b[N][4];
            take_weights<format, rule>(b, stage + MMA_TOK * 4, row0, i, scales + i / GROUP % 2 * MMA_ROWS, scale);
            multiply(rule == DSV4_SCALE_BLOCK ? block : acc, stage + 4 * tok0, b, tile.n_tok - tok0);
            if (rule == DSV4_SCALE_BLOCK && format == DSV4_W_FP4)
                join<format>(acc, block, tile, row0, i);
            if (rule == DSV4_SCALE_BLOCK && format == DSV4_W_FP8 && (i % GROUP == GROUP - 1 || i == steps - 1))
                join<format>(acc, block, tile, row0, i / GROUP);
        }
    }
    dsv4_copy_wait<0>();
}

// Lane (g, q) has tokens 16 m + g and + 8, rows 8 n + 2 q and + 1 of its warp's part.
DSV4_DEVICE void store_sums(const struct mma_tile &tile, void *out, ptrdiff_t ld_out, int out_f32, int tok0, int row0,
                            float acc[M][N][4]) {
    int g = (int)threadIdx.x % 32 / 4, q = (int)threadIdx.x % 4;
    int paired = ld_out % 2 == 0 && tile.r0 % 2 == 0 && (uintptr_t)out % (out_f32 ? 8 : 4) == 0;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int32_t t = tok0 + 16 * m + g + 8 * half;
#pragma unroll
            for (int n = 0; n < N; n++) {
                int32_t r = tile.r0 + row0 + 8 * n + 2 * q;
                int64_t at = (int64_t)t * ld_out + r;
                float low = acc[m][n][2 * half], high = acc[m][n][2 * half + 1];
                if (t >= tile.n_tok || r >= tile.end)
                    continue;
                if (paired && r + 1 < tile.end) {
                    if (out_f32)
                        *(float2 *)((float *)out + at) = float2{low, high};
                    else
                        *(dsv4_word32 *)((dsv4_bf16 *)out + at) =
                            (uint32_t)dsv4_f32_to_bf16(low) | (uint32_t)dsv4_f32_to_bf16(high) << 16;
                    continue;
                }
                store_sum(out, at, out_f32, low);
                if (r + 1 < tile.end)
                    store_sum(out, at + 1, out_f32, high);
            }
        }
}

// ------------------------------------------------------------------------------------------------------------- kernels

// What a block reads and writes; token t of x at x + tok[first + t] * ld_x.
struct mma_block {
    struct mma_tile tile;
    const dsv4_bf16 *x;
    const int32_t *tok;
    void *out; // element (t, r) at t * ld_out + r
    ptrdiff_t ld_x, ld_out;
    int32_t first, out_f32;
};

// x: rows of a layer; y: tokens.
DSV4_DEVICE struct mma_block block_of(const struct layers &l, unsigned x, unsigned y) {
    int32_t j = 0, t0 = (int32_t)y * MMA_TOK, left = l.of.n_tok - t0;
    while (j + 1 < l.of.n_job && x >= l.first[j + 1])
        j++;
    const struct dsv4_cuda_linear_job &job = l.of.jobs[j];
    struct block_rows rows = rows_of_block(job, x - l.first[j], MMA_ROWS);
    size_t size = job.out_f32 ? 4 : 2;
    return {{job.w, rows.first, rows.end, left < MMA_TOK ? left : MMA_TOK}, job.x + rows.x, l.of.tok,
            (char *)job.out + (ptrdiff_t)size * t0 * job.ld_out, job.ld_x, job.ld_out, t0, job.out_f32};
}

// x: rows of w[0], then of w[1]; y: tile.  No weight: there is nothing to do.
DSV4_DEVICE struct mma_block block_of(const struct dsv4_cuda_experts_args &e, unsigned x, unsigned y) {
    struct mma_block b = {};
    if ((int32_t)y >= *e.n_tile)
        return b;
    struct dsv4_cuda_tile tile = e.tiles[y];
    int32_t blocks = (e.rows + MMA_ROWS - 1) / MMA_ROWS, which = (int32_t)x / blocks;
    struct dsv4_weight w = which ? e.w[1][tile.expert] : e.w[0][tile.expert];
    b.tile = {w, (int32_t)x % blocks * MMA_ROWS, e.rows, tile.n};
    b.x = w.format == DSV4_W_FP8 || w.format == DSV4_W_FP4 ? e.x_quant : e.x_plain;
    b.tok = e.row_tok;
    b.out = (which ? e.out[1] : e.out[0]) + (int64_t)tile.first * e.rows;
    b.ld_x = e.cols;
    b.ld_out = e.rows;
    b.first = tile.first;
    return b;
}

// A kernel makes the tiles whose weights are of its format and rule; rule 3 needs twice the sums.
template <int format, int rule, class args> DSV4_DEVICE void mma_any(struct mma_stages &s, const args &a) {
    int warp = (int)threadIdx.x / 32, tok0 = warp / 4 * WARP_TOK, row0 = warp % 4 * WARP_ROWS;
    struct mma_block b = block_of(a, blockIdx.x, blockIdx.y);
    if (!b.tile.w.data || b.tile.w.format != format || b.tile.w.scale_rule != rule)
        return; // the whole block
    const dsv4_bf16 *x[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int32_t t = (int32_t)threadIdx.x / 4 + h * (MMA_TOK / 2), i = b.first + t;
        x[h] = t < b.tile.n_tok ? b.x + (ptrdiff_t)(b.tok ? b.tok[i] : i) * b.ld_x : NULL;
    }
    float acc[M][N][4];
    mma_sums<format, rule>(s, b.tile, x, tok0, row0, acc);
    // found again, not held in registers all the while
    b = block_of(a, dsv4_opaque(blockIdx.x), dsv4_opaque(blockIdx.y));
    store_sums(b.tile, b.out, b.ld_out, b.out_f32, tok0, row0, acc);
}

// FP4 outside of experts, which no published model has, would need a register more than two blocks leave.
template <int format, int rule>
DSV4_KERNEL(mma_kernel, struct layers, MMA_THREADS, rule == DSV4_SCALE_BLOCK || format == DSV4_W_FP4 ? 1 : 2) {
    DSV4_SHARED(struct mma_stages, s);
    mma_any<format, rule>(s, a);
}

template <int format, int rule>
DSV4_KERNEL(mma_experts_kernel, struct dsv4_cuda_experts_args, MMA_THREADS, rule == DSV4_SCALE_BLOCK ? 1 : 2) {
    DSV4_SHARED(struct mma_stages, s);
    mma_any<format, rule>(s, a);
}

// ------------------------------------------------------------------------------------------------------------ launches

static inline int kind_of(const struct dsv4_weight &w) {
    return w.format == DSV4_W_F32 || w.cols % STEP ? 0 : DSV4_CUDA_MMA_KIND(w.format, w.scale_rule);
}

// Rows that can be copied by 16 bytes, of formats that bf16 operands are made of: a property of the layer, not of a pass.
// No tile has FP8 rows of two blocks of scales.
static inline int fits(const struct dsv4_cuda_linear_job *job) {
    const struct dsv4_weight *w = &job->w;
    if (w->format == DSV4_W_FP8 && job->group_rows % DSV4_FP8_BLOCK)
        return 0;
    return kind_of(*w) && (uintptr_t)w->data % 16 == 0 && (uintptr_t)job->x % 16 == 0 && job->ld_x % 8 == 0 &&
           job->group_x % 8 == 0;
}

template <int format, int rule> static int launch_layers(const struct dsv4_cuda_linear_args *a, void *stream) {
    struct dsv4_cuda_linear_args mine = {};
    mine.tok = a->tok;
    mine.n_tok = a->n_tok;
    for (int32_t j = 0; j < a->n_job; j++)
        if (fits(&a->jobs[j]) && kind_of(a->jobs[j].w) == DSV4_CUDA_MMA_KIND(format, rule))
            mine.jobs[mine.n_job++] = a->jobs[j];
    struct layers l = lay_out(&mine, MMA_ROWS);
    if (l.first[DSV4_CUDA_JOBS])
        DSV4_LAUNCH((mma_kernel<format, rule>), dim3(l.first[DSV4_CUDA_JOBS], dsv4_blocks((size_t)a->n_tok, MMA_TOK)), MMA_THREADS, stream, l);
    return 0;
}

template <int format, int rule> static int launch_some(const struct dsv4_cuda_experts_args *a, void *stream) {
    dim3 grid(dsv4_blocks((size_t)a->rows, MMA_ROWS) * (a->w[1] ? 2u : 1u), (unsigned)a->max_tile);
    if (a->kinds & DSV4_CUDA_MMA_KIND(format, rule))
        DSV4_LAUNCH((mma_experts_kernel<format, rule>), grid, MMA_THREADS, stream, *a);
    return 0;
}

#define EACH_KIND(X)                                                                                                   \
    X(DSV4_W_FP8, DSV4_SCALE_FOLD)                                                                                     \
    X(DSV4_W_FP8, DSV4_SCALE_BLOCK)                                                                                    \
    X(DSV4_W_FP8, DSV4_SCALE_ROUND)                                                                                    \
    X(DSV4_W_FP4, DSV4_SCALE_FOLD)                                                                                     \
    X(DSV4_W_FP4, DSV4_SCALE_BLOCK)                                                                                    \
    X(DSV4_W_BF16, DSV4_SCALE_NONE)

int launch_linear_mma(const struct dsv4_cuda_linear_args *a, void *stream) {
    struct dsv4_cuda_linear_args rest = {};
    int code = 0;
    if (!a->n_tok)
        return 0;
#define X(format, rule)                                                                                                \
    if (!code)                                                                                                         \
        code = launch_layers<format, rule>(a, stream);
    EACH_KIND(X)
#undef X
    rest.tok = a->tok;
    rest.n_tok = a->n_tok;
    for (int32_t j = 0; j < a->n_job; j++)
        if (!fits(&a->jobs[j]))
            rest.jobs[rest.n_job++] = a->jobs[j];
    return code || !rest.n_job ? code : dsv4_cuda_linear(&rest, stream);
}

int dsv4_cuda_linear_mma(const struct dsv4_cuda_linear_args *a, void *stream) {
    struct dsv4_cuda_linear_args args = *a;
    args.tensor_cores = 1;
    return dsv4_cuda_linear(&args, stream);
}

int launch_experts_mma(const struct dsv4_cuda_experts_args *a, void *stream) {
    int code = 0;
    if (!a->rows || !a->max_tile)
        return 0;
#define X(format, rule)                                                                                                \
    if (!code)                                                                                                         \
        code = launch_some<format, rule>(a, stream);
    EACH_KIND(X)
#undef X
    return code;
}
