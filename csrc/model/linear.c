/* SPDX-License-Identifier: Apache-2.0 */
#include "model/pass.h"

/*
 * Rows and tokens per kernel call: enough to pay for preparing the input, few enough to answer a cancellation in
 * milliseconds and to keep the inputs of the tokens in the last cache while the rows pass by.  With few tokens rows wait
 * for memory, and each call has to fill its streams anew.
 */
enum { FEW_TILE_ROWS = 2048, TILE_ROWS = 256, TILE_TOKENS = 512 };

/* Jobs are cut at multiples of so many rows. */
enum { GRAIN_ROWS = 4 };

DSV4_STATIC_ASSERT((int)DSV4_PHASE_F32 == (int)DSV4_W_F32, "the first phases are the weight formats");

static dsv4k_linear_fn *entry(const struct dsv4_kernels *k, int format, int32_t n_tok) {
    int few = n_tok <= DSV4_FEW_TOKENS;
    switch (format) {
    case DSV4_W_FP8:
        return few ? k->linear_few_fp8 : k->linear_many_fp8;
    case DSV4_W_FP4:
        return few ? k->linear_few_fp4 : k->linear_many_fp4;
    case DSV4_W_BF16:
        return few ? k->linear_few_bf16 : k->linear_many_bf16;
    default:
        return few ? k->linear_few_f32 : k->linear_many_f32;
    }
}

void dsv4_linear_rows(dsv4_worker *w, const struct dsv4_pass *p, const struct dsv4_linear_job *job, const int32_t *tok,
                      int32_t n_tok, int32_t row0, int32_t row1) {
    dsv4k_linear_fn *fn = entry(&p->m->k, job->w->format, n_tok);
    const int32_t rows = n_tok <= DSV4_FEW_TOKENS ? FEW_TILE_ROWS : TILE_ROWS;
    struct dsv4_linear_args a = {
        .out = job->out, .x = job->x, .tok = tok, .w = job->w, .scratch = dsv4_scratch(w, p, p->ws->at_kernel),
        .ld_out = job->ld_out, .ld_x = job->ld_x, .n_tok = n_tok, .out_f32 = job->out_f32,
    };
    dsv4_lap(w, p, DSV4_PHASE_OTHER);
    for (int32_t t = 0; t < n_tok; t += TILE_TOKENS) {
        a.n_tok = n_tok - t > TILE_TOKENS ? TILE_TOKENS : n_tok - t;
        a.tok = tok ? tok + t : NULL;
        a.x = tok ? job->x : job->x + t * job->ld_x;
        a.out = (uint8_t *)job->out + t * job->ld_out * (job->out_f32 ? 4 : 2);
        for (int32_t r = row0; r < row1 && !dsv4_cancelled(w); r = a.row1) {
            a.row0 = r;
            a.row1 = (r / rows + 1) * rows; /* whole blocks of FP8 scales */
            a.row1 = a.row1 < row1 ? a.row1 : row1;
            fn(&a);
        }
    }
    dsv4_lap(w, p, (enum dsv4_phase)job->w->format);
}

/* What four rows cost: few tokens wait for their bytes, many for the arithmetic. */
static int64_t grain_cost(const struct dsv4_weight *w, int32_t n_tok) {
    static const int64_t half_bytes[DSV4_W_FORMATS] = {2, 1, 4, 8};
    return w->cols * (n_tok <= DSV4_FEW_TOKENS ? half_bytes[w->format] : 1);
}

void dsv4_linear_jobs(dsv4_worker *w, const struct dsv4_pass *p, const struct dsv4_linear_job *jobs, int n_job) {
    int64_t total = 0, before = 0, lo, hi, u0, u1;
    for (int i = 0; i < n_job; i++) {
        dsv4_share_node(w, (jobs[i].w->rows + GRAIN_ROWS - 1) / GRAIN_ROWS, &lo, &hi);
        total += (hi - lo) * grain_cost(jobs[i].w, p->n_tok);
    }
    for (int i = 0; i < n_job; i++) {
        int64_t cost = grain_cost(jobs[i].w, p->n_tok);
        dsv4_share_node(w, (jobs[i].w->rows + GRAIN_ROWS - 1) / GRAIN_ROWS, &lo, &hi);
        dsv4_share_cost(w, total, before, cost, hi - lo, &u0, &u1);
        int32_t r0 = (int32_t)(lo + u0) * GRAIN_ROWS, r1 = (int32_t)(lo + u1) * GRAIN_ROWS;
        dsv4_linear_rows(w, p, &jobs[i], NULL, p->n_tok, r0, r1 < jobs[i].w->rows ? r1 : jobs[i].w->rows);
        before += (hi - lo) * cost;
    }
}
