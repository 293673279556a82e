// SPDX-License-Identifier: Apache-2.0
//
// Linear layers and experts for one to eight tokens, and what follows them in the same launch; for more tokens see
// linear_many.cu.  Contracts: kernels.h, launches.h.
#include "hyper.cuh"
#include "linear.cuh"
#include "linear_few.cuh"
#include "moe.cuh"
#include "state.cuh"

// What is done with the results.
enum few_kind { FEW_PLAIN, FEW_ACT, FEW_SPREAD, FEW_COLLAPSE, FEW_ROUTER, FEW_NORM, FEW_HEADS, FEW_SWIGLU, FEW_SUM };

union few_after {
    struct dsv4_cuda_act_args act;
    struct dsv4_cuda_spread_args spread;
    struct dsv4_cuda_collapse_args collapse;
    struct {
        struct dsv4_cuda_router_args router;
        struct dsv4_cuda_group_args group; // n_tok 0: none
    } route;
    struct dsv4_cuda_rmsnorm_args norm;
    struct {
        struct dsv4_cuda_headnorm_args norm;
        struct dsv4_cuda_index_args index; // of job 1, if there is one
    } heads;
    struct dsv4_cuda_swiglu_args swiglu;
    struct {
        struct dsv4_cuda_expert_sum_args sum;
        struct dsv4_cuda_spread_args spread; // n_tok 0: none
    } experts;
};

// What stands beside: blocks before all others, counted here.
struct few_beside {
    struct dsv4_cuda_norm_kv_args kv;
    struct dsv4_cuda_windows_args windows[2];
    struct dsv4_cuda_keep_args keep;
    unsigned n_kv, n_window[2], n_keep, n;
};

// One kernel for both, since all its code is in the sums: n_job 0 means experts.
struct few_args {
    struct layers layers;
    struct dsv4_cuda_experts_args experts;
    struct few_beside beside;
    union few_after after;
    int32_t *tickets;
    int32_t kind, rows; // of a block
    int32_t by_tok;     // blockIdx.y is a token: layers of few rows, whose bytes are read again for each from L2
};

template <int n_tok> union few_work {
    struct few_stages<n_tok> stages;
    struct collapse_work collapse;
    struct router_work router;
    struct group_work group;
    struct norm_rows_work norm;
    struct kv_work kv;
    struct window_work window;
};

// What a block reads and writes: rows [r0, end) of w for tokens first ... first + n; row t of x at
// x + tok[first + t] * ld_x, of out (element (t, r) at t * ld_out + r) at first + t.
struct few_block {
    struct dsv4_weight w;
    const dsv4_bf16 *x;
    const int32_t *tok;
    void *out;
    ptrdiff_t ld_x, ld_out;
    int32_t first, n, r0, end, out_f32;
    int32_t part; // the job, or which projection of an expert
};

DSV4_DEVICE struct few_block block_of_layer(const struct few_args &a) {
    const struct layers &l = a.layers;
    unsigned block = blockIdx.x - a.beside.n;
    int32_t j = 0, first = a.by_tok ? (int32_t)blockIdx.y : 0, n = a.by_tok ? 1 : l.of.n_tok;
    while (j + 1 < l.of.n_job && block >= l.first[j + 1])
        j++;
    const struct dsv4_cuda_linear_job &job = l.of.jobs[j];
    if (block >= l.first[l.of.n_job]) { // the square of the token's streams: a layer of one row, the token itself
        const dsv4_bf16 *x = job.x + (l.of.tok ? l.of.tok[first] : first) * job.ld_x;
        struct dsv4_weight w = {x, NULL, 1, job.w.cols, DSV4_W_BF16, DSV4_SCALE_E8M0, DSV4_SCALE_NONE};
        return {w, job.x, l.of.tok, a.after.collapse.squares, job.ld_x, 1, first, 1, 0, 1, 1, 1};
    }
    struct block_rows rows = rows_of_block(job, block - l.first[j], a.rows);
    return {job.w, job.x + rows.x, l.of.tok, job.out, job.ld_x, job.ld_out, first, n, rows.first, rows.end, job.out_f32, j};
}

// blockIdx.x: rows of w[0], then of w[1]; blockIdx.y: tile.
DSV4_DEVICE struct few_block block_of_expert(const struct few_args &a) {
    const struct dsv4_cuda_experts_args &e = a.experts;
    struct few_block b = {};
    if ((int32_t)blockIdx.y >= *e.n_tile)
        return b;
    struct dsv4_cuda_tile tile = e.tiles[blockIdx.y];
    int32_t blocks = (e.rows + a.rows - 1) / a.rows;
    b.part = (int32_t)blockIdx.x / blocks;
    b.w = b.part ? e.w[1][tile.expert] : e.w[0][tile.expert];
    b.x = b.w.format == DSV4_W_FP8 || b.w.format == DSV4_W_FP4 ? e.x_quant : e.x_plain;
    b.tok = e.row_tok;
    b.out = b.part ? e.out[1] : e.out[0];
    b.ld_x = e.cols;
    b.ld_out = e.rows;
    b.first = tile.first;
    b.n = tile.n;
    b.r0 = (int32_t)blockIdx.x % blocks * a.rows;
    b.end = b.r0 + a.rows < e.rows ? b.r0 + a.rows : e.rows;
    return b;
}

// ------------------------------------------------------------------------------------------------------- what follows

// Adds the block's rows to the tickets of the units they are in, each of `unit` rows (the last of fewer) of `all` and as
// many projections, and calls tail(unit) for each that is complete now.
template <class Tail>
DSV4_DEVICE void after_units(int32_t *tickets, const struct few_block &b, int32_t unit, int32_t all, int32_t projections,
                             const Tail &tail) {
    for (int32_t u = b.r0 / unit; u * unit < b.end; u++) {
        int32_t first = u * unit, end = first + unit < all ? first + unit : all;
        int32_t rows = (b.end < end ? b.end : end) - (b.r0 > first ? b.r0 : first);
        if (dsv4_last_part(tickets + u, rows, projections * (end - first)))
            tail(u);
    }
}

// A half warp per token of a head, or a warp per token of an index head.
DSV4_DEVICE void follow_heads(const struct few_args &a, const struct few_block &b) {
    int32_t i = (int32_t)threadIdx.x;
    const struct dsv4_cuda_headnorm_args &norm = a.after.heads.norm;
    const struct dsv4_cuda_index_args &index = a.after.heads.index;
    if (b.part == 0)
        after_units(a.tickets, b, norm.n, b.w.rows, 1, [&](int32_t h) {
            half_warp_headnorm(norm, i / 16 < b.n ? (int64_t)(i / 16) * norm.per_tok + h : norm.n_row);
        });
    else if (b.part == 1 && index.n)
        after_units(a.tickets + norm.per_tok, b, index.n, b.w.rows, 1, [&](int32_t h) {
            for (int32_t t = i / 32; t < b.n; t += FEW_WARPS)
                warp_index_row(index, (int64_t)t * index.per_tok + h);
        });
}

DSV4_DEVICE void follow_experts(const struct few_args &a, const struct few_block &b) {
    const struct dsv4_cuda_expert_sum_args &sum = a.after.experts.sum;
    int32_t width = b.end - b.r0;
    if (!dsv4_last_part(a.tickets + blockIdx.x, 1, *a.experts.n_tile))
        return;
    for (int32_t e = (int32_t)threadIdx.x; e < sum.n_tok * width; e += FEW_THREADS) {
        int32_t t = e / width, c = b.r0 + e % width;
        sum.out[(int64_t)t * sum.n + c] = sum_of_experts(sum, t, c);
        if (a.after.experts.spread.n_tok)
            spread_column(a.after.experts.spread, t, c);
    }
}

template <int n_tok> DSV4_DEVICE void few_follow(union few_work<n_tok> &s, const struct few_args &a, const struct few_block &b) {
    int32_t i = (int32_t)threadIdx.x, width = b.end - b.r0;
    switch (a.kind) {
    case FEW_ACT:
        after_units(a.tickets, b, DSV4_ACT_GROUP, a.after.act.n, 1, [&](int32_t g) {
            for (int32_t t = i / 32; t < b.n; t += FEW_WARPS)
                warp_act(a.after.act, t, g);
        });
        break;
    case FEW_SPREAD:
        __syncthreads(); // a column is the block's own
        for (int32_t e = i; e < b.n * width; e += FEW_THREADS)
            spread_column(a.after.spread, e / width, b.r0 + e % width);
        break;
    case FEW_COLLAPSE: {
        const struct dsv4_cuda_collapse_args &c = a.after.collapse;
        if (n_tok == 1 && dsv4_last_part(a.tickets + b.first, width, a.layers.of.jobs[0].w.rows + 1))
            block_collapse(s.collapse, c, b.first, c.squares[b.first] / (float)(c.hc * c.d_model));
        break;
    }
    case FEW_ROUTER: {
        const struct dsv4_cuda_router_args &r = a.after.route.router;
        if (n_tok != 1 || !dsv4_last_part(a.tickets + b.first, width, b.w.rows))
            break;
        block_router(s.router, r, b.first);
        if (a.after.route.group.n_tok && dsv4_last_part(a.tickets + r.n_tok, 1, r.n_tok))
            block_group(s.group, a.after.route.group);
        break;
    }
    case FEW_NORM:
        if (b.part == 0 && dsv4_last_part(a.tickets, width, b.w.rows))
            block_norm_rows(s.norm, a.after.norm);
        break;
    case FEW_HEADS:
        follow_heads(a, b);
        break;
    case FEW_SWIGLU:
        after_units(a.tickets + (int32_t)blockIdx.y * ((b.w.rows + DSV4_ACT_GROUP - 1) / DSV4_ACT_GROUP), b,
                    DSV4_ACT_GROUP, b.w.rows, 2, [&](int32_t g) {
                        for (int32_t r = i / 32; r < b.n; r += FEW_WARPS)
                            warp_swiglu(a.after.swiglu, b.first + r, g);
                    });
        break;
    case FEW_SUM:
        follow_experts(a, b);
        break;
    default:
        break;
    }
}

template <int n_tok> DSV4_DEVICE void stand_aside(union few_work<n_tok> &s, const struct few_beside &a) {
    unsigned item = blockIdx.x;
    if (item < a.n_kv) {
        block_kv_row(s.kv, a.kv, item);
        return;
    }
    item -= a.n_kv;
    for (int c = 0; c < 2; item -= a.n_window[c], c++)
        if (item < a.n_window[c]) {
            block_window(s.window, a.windows[c], (int32_t)item);
            return;
        }
    block_keep(a.keep, (int32_t)item);
}

template <int n_tok> DSV4_KERNEL(few_kernel, struct few_args, FEW_THREADS, (n_tok > 4 ? 3 : 4)) {
    DSV4_SHARED(union few_work<n_tok>, s);
    if (blockIdx.x < a.beside.n) {
        stand_aside(s, a.beside);
        return;
    }
    struct few_block b = a.layers.of.n_job ? block_of_layer(a) : block_of_expert(a);
    if (!b.w.data)
        return; // the whole block: no such tile, or an expert that is elsewhere
    int32_t r = b.r0 + (int32_t)threadIdx.x / 16 * FEW_EACH;
    int aligned = (uintptr_t)b.x % 4 == 0 && b.ld_x % 2 == 0;
    const dsv4_bf16 *x[n_tok];
#pragma unroll
    for (int t = 0; t < n_tok; t++) {
        int32_t i = b.first + (t < b.n ? t : 0);
        x[t] = b.x + (b.tok ? b.tok[i] : i) * b.ld_x;
    }
    float sum[FEW_EACH][n_tok];
    few_any<n_tok>(s.stages, b.w, a.rows, b.r0, b.end, x, aligned, sum);
    if (threadIdx.x % 16 == 0) {
#pragma unroll
        for (int i = 0; i < FEW_EACH; i++)
#pragma unroll
            for (int t = 0; t < n_tok; t++)
                if (r + i < b.end && t < b.n)
                    store_sum(b.out, (b.first + t) * b.ld_out + r + i, b.out_f32, sum[i][t]);
    }
    few_follow(s, a, b);
}

static int launch_few(const struct few_args &args, dim3 grid, int32_t n_tok, void *stream) {
    if (!grid.x || !grid.y || !n_tok)
        return 0;
    if (n_tok == 1)
        DSV4_LAUNCH(few_kernel<1>, grid, FEW_THREADS, stream, args);
    else if (n_tok <= 4)
        DSV4_LAUNCH(few_kernel<4>, grid, FEW_THREADS, stream, args);
    else
        DSV4_LAUNCH(few_kernel<8>, grid, FEW_THREADS, stream, args);
    return 0;
}

// Runs an operation if its args are there, after what may have failed.
#define FOLLOW(op, args) code = code == 0 && (args) ? dsv4_cuda_##op(args, stream) : code

static int linear_many(const struct dsv4_cuda_linear_args *a, void *stream) {
    int code = a->tensor_cores ? launch_linear_mma(a, stream) : launch_linear_many(a, stream);
    FOLLOW(act, a->act);
    FOLLOW(spread, a->spread);
    FOLLOW(collapse, a->collapse);
    FOLLOW(router, a->router);
    FOLLOW(group, a->group);
    FOLLOW(rmsnorm, a->norm);
    FOLLOW(headnorm, a->headnorm);
    FOLLOW(index, a->index);
    FOLLOW(norm_kv, a->kv);
    FOLLOW(windows, a->windows[0]);
    FOLLOW(windows, a->windows[1]);
    FOLLOW(keep, a->keep);
    return code;
}

static void stand_beside(struct few_beside *out, const struct dsv4_cuda_linear_args *a) {
    if (a->kv) {
        out->kv = *a->kv;
        out->n_kv = (unsigned)a->kv->n_tok;
    }
    for (int c = 0; c < 2; c++)
        if (a->windows[c]) {
            out->windows[c] = *a->windows[c];
            out->n_window[c] = (unsigned)a->windows[c]->max_window;
        }
    if (a->keep) {
        out->keep = *a->keep;
        out->n_keep = (unsigned)a->keep->pass.n_tok;
    }
    out->n = out->n_kv + out->n_window[0] + out->n_window[1] + out->n_keep;
}

static void follow_layer(struct few_args *out, const struct dsv4_cuda_linear_args *a) {
    if (a->act) {
        out->kind = FEW_ACT;
        out->after.act = *a->act;
    } else if (a->spread) {
        out->kind = FEW_SPREAD;
        out->after.spread = *a->spread;
    } else if (a->collapse) {
        out->kind = FEW_COLLAPSE;
        out->after.collapse = *a->collapse;
    } else if (a->router) {
        out->kind = FEW_ROUTER;
        out->after.route.router = *a->router;
        if (a->group)
            out->after.route.group = *a->group;
    } else if (a->norm) {
        out->kind = FEW_NORM;
        out->after.norm = *a->norm;
    } else if (a->headnorm) {
        out->kind = FEW_HEADS;
        out->after.heads.norm = *a->headnorm;
        if (a->index)
            out->after.heads.index = *a->index;
    }
}

// Fewer rows a block where 16 leave multiprocessors without work; where tokens have blocks of their own, the longest
// stretches of a row that a stage holds.
static int32_t rows_of(const struct dsv4_cuda_linear_args *a, int by_tok) {
    const int format = a->jobs[0].w.format;
    if (by_tok)
        return format == DSV4_W_F32 ? 2 : format == DSV4_W_BF16 ? 4 : format == DSV4_W_FP8 ? 8 : FEW_ROWS;
    return lay_out(a, FEW_ROWS).first[DSV4_CUDA_JOBS] < FEW_BLOCKS ? FEW_ROWS / 2 : FEW_ROWS;
}

int dsv4_cuda_linear(const struct dsv4_cuda_linear_args *a, void *stream) {
    if (a->tensor_cores || a->n_tok > DSV4_CUDA_FEW_TILE)
        return linear_many(a, stream);
    if (!a->n_job || !a->n_tok)
        return 0;
    struct few_args args = {};
    args.by_tok = a->collapse || a->router;
    args.rows = rows_of(a, args.by_tok);
    args.layers = lay_out(a, args.rows);
    args.tickets = a->tickets;
    stand_beside(&args.beside, a);
    follow_layer(&args, a);
    dim3 grid(args.layers.first[DSV4_CUDA_JOBS] + args.beside.n);
    if (!args.by_tok)
        return launch_few(args, grid, a->n_tok, stream);
    grid.x += args.kind == FEW_COLLAPSE;
    grid.y = (unsigned)a->n_tok;
    return launch_few(args, grid, 1, stream);
}

int dsv4_cuda_experts(const struct dsv4_cuda_experts_args *a, void *stream) {
    if (a->tile_tok > DSV4_CUDA_FEW_TILE) {
        int code = a->tile_tok == DSV4_CUDA_MMA_TILE ? launch_experts_mma(a, stream) : launch_experts_many(a, stream);
        FOLLOW(swiglu, a->swiglu);
        FOLLOW(expert_sum, a->sum);
        FOLLOW(spread, a->spread);
        return code;
    }
    struct few_args args = {};
    args.rows = FEW_ROWS;
    args.experts = *a;
    args.tickets = a->tickets;
    if (a->swiglu) {
        args.kind = FEW_SWIGLU;
        args.after.swiglu = *a->swiglu;
    } else if (a->sum) {
        args.kind = FEW_SUM;
        args.after.experts.sum = *a->sum;
        if (a->spread)
            args.after.experts.spread = *a->spread;
    }
    dim3 grid(dsv4_blocks((size_t)a->rows, FEW_ROWS) * (a->w[1] ? 2u : 1u), (unsigned)a->max_tile);
    return launch_few(args, grid, a->n_tok, stream);
}
