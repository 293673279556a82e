/* SPDX-License-Identifier: Apache-2.0 */
#include "model/pass.h"

/* Rows per kernel call: enough to pay for preparing the input, few enough to answer a cancellation in milliseconds. */
enum { TILE_ROWS = 256 };

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
    struct dsv4_linear_args a = {
        .out = job->out, .x = job->x, .tok = tok, .w = job->w, .scratch = dsv4_scratch(w, p, p->ws->at_kernel),
        .ld_out = job->ld_out, .ld_x = job->ld_x, .n_tok = n_tok, .out_f32 = job->out_f32,
    };
    for (int32_t r = row0; r < row1 && !dsv4_cancelled(w); r = a.row1) {
        a.row0 = r;
        a.row1 = row1 - r > TILE_ROWS ? r + TILE_ROWS : row1;
        fn(&a);
    }
}

void dsv4_linear_jobs(dsv4_worker *w, const struct dsv4_pass *p, const struct dsv4_linear_job *jobs, int n_job) {
    for (int i = 0; i < n_job; i++) {
        int64_t lo, hi;
        dsv4_share(w, jobs[i].w->rows, 4, &lo, &hi);
        dsv4_linear_rows(w, p, &jobs[i], NULL, p->n_tok, (int32_t)lo, (int32_t)hi);
    }
}
