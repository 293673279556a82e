/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dsv4's kernels as the engine runs them, with several threads: what peers.py times against other
 * engines.  OpenMP, so that ggml and this file share one team of threads (libgomp) and neither
 * disturbs the other.  Compiled when the bench starts.
 */
#define _POSIX_C_SOURCE 200809L
#include <omp.h>
#include <stdatomic.h>
#include <time.h>

#include "kernels.h"

/* Rows per kernel call, as csrc/model/linear.c has it; columns of one unit of the experts, as
 * csrc/model/moe.c. */
enum { TILE_ROWS = 256, UNIT = DSV4_ACT_GROUP, MAX_EXPERTS = 16 };

struct products {
    dsv4k_linear_fn *linear;
    dsv4k_act_quant_fn *quant; /* NULL: the layer takes plain bf16 */
    dsv4k_act_flush_fn *flush;
    const struct dsv4_weight *weights; /* [n_weight], of one shape */
    const dsv4_bf16 *x;                /* [n_tok][cols] */
    dsv4_bf16 *operands;               /* likewise: x as the kernel takes it */
    float *out;                        /* [n_tok][rows] */
    char *scratch; /* [n_thread] of DSV4_LINEAR_SCRATCH(cols), 64-byte aligned */
    int32_t n_weight, n_tok, n_thread;
};

struct moe {
    dsv4k_linear_fn *linear;
    dsv4k_act_quant_fn *quant;
    dsv4k_swiglu_fn *swiglu;
    dsv4k_expert_sum_fn *sum;
    const struct dsv4_weight *w1, *w3, *w2; /* [n_expert], the chosen ones, ascending */
    const float *route;                     /* [n_expert] */
    const dsv4_bf16 *x;                     /* [d]: one token */
    dsv4_bf16 *y;                           /* [d] */
    dsv4_bf16 *operands, *gate, *up, *down; /* [d]; [n_expert][width] twice; [n_expert][d] */
    char *scratch;                          /* as above, for the larger of d and width */
    float limit;
    int32_t n_expert, d, width, n_thread;
};

double wall(void);
double products_seconds(const struct products *p);
double moe_seconds(const struct moe *m);

double wall(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- a barrier ---- */

struct barrier {
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_int phase;
};

static void meet(struct barrier *b, int n) {
    int seen = atomic_load(&b->phase);
    if (atomic_fetch_add(&b->arrived, 1) + 1 == n) {
        atomic_store(&b->arrived, 0);
        atomic_store(&b->phase, seen + 1);
        return;
    }
    while (atomic_load_explicit(&b->phase, memory_order_acquire) == seen)
#if defined(__x86_64__)
        __builtin_ia32_pause();
#else
        ;
#endif
}

/* The part of [0, n) that belongs to thread `id` of `count`, cut at multiples of `grain`. */
static void share(int id, int count, int32_t n, int32_t grain, int32_t *lo, int32_t *hi) {
    int64_t units = ((int64_t)n + grain - 1) / grain;
    *lo = (int32_t)(units * id / count * grain);
    *hi = (int32_t)(units * (id + 1) / count * grain);
    *hi = *hi > n ? n : *hi;
    *lo = *lo > n ? n : *lo;
}

static void rows(struct dsv4_linear_args *a, dsv4k_linear_fn *fn, int32_t lo, int32_t hi) {
    for (int32_t r = lo; r < hi; r = a->row1) {
        a->row0 = r;
        a->row1 = hi - r > TILE_ROWS ? r + TILE_ROWS : hi;
        fn(a);
    }
}

/* ---- a chunk of equal layers, one after the other ---- */

double products_seconds(const struct products *p) {
    struct barrier b = {0};
    int32_t n_row = p->weights->rows, cols = p->weights->cols;
    double start = wall();
#pragma omp parallel num_threads(p->n_thread)
    {
        int id = omp_get_thread_num(), n = omp_get_num_threads();
        int32_t t0, t1, lo, hi;
        share(id, n, p->n_tok, 1, &t0, &t1);
        share(id, n, n_row, 4, &lo, &hi);
        for (int32_t i = 0; i < p->n_weight; i++) {
            for (int32_t t = t0; t < t1; t++) {
                ptrdiff_t at = (ptrdiff_t)t * cols;
                if (p->quant)
                    p->quant(p->operands + at, NULL, NULL, p->x + at, cols);
                else
                    p->flush(p->operands + at, p->x + at, cols);
            }
            meet(&b, n);
            struct dsv4_linear_args a = {
                .out = p->out,
                .x = p->operands,
                .w = p->weights + i,
                .scratch = p->scratch + (size_t)id * DSV4_LINEAR_SCRATCH(cols),
                .ld_out = n_row,
                .ld_x = cols,
                .n_tok = p->n_tok,
                .out_f32 = 1,
            };
            rows(&a, p->linear, lo, hi);
            meet(&b, n);
        }
    }
    return wall() - start;
}

/* ---- the routed experts of one token, with the barriers of csrc/model/moe.c ---- */

static void up_unit(const struct moe *m, char *scratch, int32_t e, int32_t lo, int32_t hi) {
    dsv4_bf16 *g = m->gate + (ptrdiff_t)e * m->width, *u = m->up + (ptrdiff_t)e * m->width;
    struct dsv4_linear_args a = {
        .out = g,
        .x = m->operands,
        .w = m->w1 + e,
        .scratch = scratch,
        .ld_out = m->width,
        .ld_x = m->d,
        .n_tok = 1,
    };
    rows(&a, m->linear, lo, hi);
    a.out = u;
    a.w = m->w3 + e;
    rows(&a, m->linear, lo, hi);
    m->swiglu(g + lo, g + lo, u + lo, hi - lo, m->limit, m->route[e]);
    m->quant(u + lo, NULL, NULL, g + lo, hi - lo);
}

double moe_seconds(const struct moe *m) {
    struct barrier b = {0};
    double start = wall();
#pragma omp parallel num_threads(m->n_thread)
    {
        int id = omp_get_thread_num(), n = omp_get_num_threads();
        int32_t larger = m->d > m->width ? m->d : m->width;
        char *scratch = m->scratch + (size_t)id * DSV4_LINEAR_SCRATCH(larger);
        int32_t units = m->width / UNIT, lo, hi;
        if (id == 0)
            m->quant(m->operands, NULL, NULL, m->x, m->d);
        meet(&b, n);
        share(id, n, m->n_expert * units, 1, &lo, &hi);
        for (int32_t e = 0; e < m->n_expert; e++) {
            int32_t u0 = lo - e * units, u1 = hi - e * units;
            u0 = u0 < 0 ? 0 : u0;
            u1 = u1 > units ? units : u1;
            if (u0 < u1)
                up_unit(m, scratch, e, u0 * UNIT, u1 * UNIT);
        }
        meet(&b, n);
        share(id, n, m->d, 16, &lo, &hi);
        const dsv4_bf16 *outs[MAX_EXPERTS];
        for (int32_t e = 0; e < m->n_expert; e++) {
            struct dsv4_linear_args a = {
                .out = m->down + (ptrdiff_t)e * m->d,
                .x = m->up + (ptrdiff_t)e * m->width,
                .w = m->w2 + e,
                .scratch = scratch,
                .ld_out = m->d,
                .ld_x = m->width,
                .n_tok = 1,
            };
            rows(&a, m->linear, lo, hi);
            outs[e] = m->down + (ptrdiff_t)e * m->d + lo;
        }
        if (lo < hi)
            m->sum(m->y + lo, outs, m->n_expert, hi - lo);
        meet(&b, n);
    }
    return wall() - start;
}
