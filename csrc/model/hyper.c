/* SPDX-License-Identifier: Apache-2.0 */
/* The hyper-connection sites around a sublayer (SPEC 2.2, 2.3): collapse the streams, spread the output. */
#include "model/pass.h"

/* streams -> ws->post, ws->comb and the normed input ws->u, as operands in u_quant and u_plain where wanted. */
int dsv4_collapse(dsv4_worker *w, struct dsv4_pass *p, const struct dsv4_hyper *h, const float *norm, int quant,
                  int plain) {
    const struct dsv4_config *c = &p->m->config;
    const struct dsv4_kernels *k = &p->m->k;
    struct dsv4_workspace *ws = p->ws;
    int32_t d = c->hidden_size, hc = c->hc_mult, mixes = (2 + hc) * hc;
    int64_t lo, hi;
    struct dsv4_linear_job job = {&h->fn, ws->streams, ws->dots, (ptrdiff_t)hc * d, mixes, 1};
    if (p->n_tok >= 4 * w->n) { /* few rows: with many tokens cut by tokens instead */
        dsv4_share(w, p->n_tok, 1, &lo, &hi);
        job.x += lo * job.ld_x;
        job.out = ws->dots + lo * mixes;
        if (lo < hi)
            dsv4_linear_rows(w, p, &job, NULL, (int32_t)(hi - lo), 0, mixes);
    } else {
        dsv4_linear_jobs(w, p, &job, 1);
    }
    DSV4_SYNC(w);
    dsv4_share(w, p->n_tok, 1, &lo, &hi);
    for (int64_t t = lo; t < hi && !dsv4_cancelled(w); t++) {
        dsv4_bf16 *u = ws->u + t * d;
        k->hc_pre(&(struct dsv4_hc_pre_args){
            .x = u, .post = ws->post + t * hc, .comb = ws->comb + t * hc * hc, .streams = ws->streams + t * hc * d,
            .dots = ws->dots + t * mixes, .scale = h->scale, .base = h->base, .hc = hc, .d_model = d,
            .sinkhorn_iters = c->hc_sinkhorn_iters, .norm_eps = c->rms_norm_eps, .hc_eps = c->hc_eps,
        });
        k->rmsnorm(u, u, norm, d, c->rms_norm_eps);
        if (quant)
            k->act_quant(ws->u_quant + t * d, NULL, NULL, u, d);
        if (plain)
            k->act_flush(ws->u_plain + t * d, u, d);
    }
    DSV4_SYNC(w);
    return 0;
}

/* ws->y into the streams, in place. */
int dsv4_spread(dsv4_worker *w, struct dsv4_pass *p) {
    const struct dsv4_config *c = &p->m->config;
    struct dsv4_workspace *ws = p->ws;
    int32_t d = c->hidden_size, hc = c->hc_mult;
    int64_t lo, hi, t0 = 0, t1 = p->n_tok, c0 = 0, c1 = d;
    dsv4_share(w, p->n_tok >= w->n ? p->n_tok : d, p->n_tok >= w->n ? 1 : 64, &lo, &hi);
    if (p->n_tok >= w->n) {
        t0 = lo;
        t1 = hi;
    } else {
        c0 = lo;
        c1 = hi;
    }
    for (int64_t t = t0; t < t1; t++) {
        dsv4_bf16 *streams = ws->streams + t * hc * d;
        p->m->k.hc_post(&(struct dsv4_hc_post_args){
            .out = streams, .y = ws->y + t * d, .streams = streams, .post = ws->post + t * hc,
            .comb = ws->comb + t * hc * hc, .hc = hc, .d_model = d, .c0 = (int32_t)c0, .c1 = (int32_t)c1,
        });
    }
    DSV4_SYNC(w);
    return 0;
}
