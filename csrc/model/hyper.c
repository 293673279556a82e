/* SPDX-License-Identifier: Apache-2.0 */
/* The hyper-connection sites around a sublayer (SPEC 2.2, 2.3): collapse the streams, spread the output. */
#include "model/edit.h"
#include "model/pass.h"
#include "model/sites.h"

/* streams -> post, comb and the normed input u, as operands in u_plain and, with official numerics, u_quant. */
int dsv4_collapse(dsv4_worker *w, struct dsv4_pass *p, int32_t layer, int ffn) {
    const struct dsv4_layer *l = &p->m->layers[layer];
    const struct dsv4_hyper *h = ffn ? &l->hc_ffn : &l->hc_attn;
    const enum dsv4_site mix = ffn ? DSV4_SITE_FFN_MIX : DSV4_SITE_ATTENTION_MIX;
    const enum dsv4_site in = ffn ? DSV4_SITE_FFN_IN : DSV4_SITE_ATTENTION_IN;
    const struct dsv4_config *c = &p->m->config;
    const struct dsv4_kernels *k = &p->m->k;
    struct dsv4_workspace *ws = p->ws;
    struct dsv4_prepared *b = dsv4_prepared(w, p);
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
    DSV4_SYNC(w, p);
    dsv4_share_tokens(w, p, &lo, &hi);
    for (int64_t t = lo; t < hi && !dsv4_cancelled(w); t++) {
        dsv4_bf16 *u = b->u + t * d;
        float pre[DSV4_MOST_STREAMS];
        k->hc_pre(&(struct dsv4_hc_pre_args){
            .x = u, .post = b->post + t * hc, .comb = b->comb + t * hc * hc, .streams = ws->streams + t * hc * d,
            .dots = ws->dots + t * mixes, .scale = h->scale, .base = h->base, .hc = hc, .d_model = d,
            .sinkhorn_iters = c->hc_sinkhorn_iters, .norm_eps = c->rms_norm_eps, .hc_eps = c->hc_eps,
            .pre = dsv4_asked(p, layer, mix) ? pre : NULL,
        });
        if (dsv4_asked(p, layer, mix))
            dsv4_at(w, p, &(struct dsv4_sight){.site = mix, .layer = layer, .tok = (int32_t)t, .pre = pre,
                                               .post = b->post + t * hc, .comb = b->comb + t * hc * hc});
        k->rmsnorm(u, u, ffn ? l->ffn_norm : l->attn_norm, d, c->rms_norm_eps);
        if (dsv4_edited(p))
            dsv4_edit_token(p, ffn ? DSV4_AT_FFN_IN : DSV4_AT_ATTENTION_IN, layer, t, u);
        if (dsv4_asked(p, layer, in))
            dsv4_at(w, p, &(struct dsv4_sight){.site = in, .layer = layer, .tok = (int32_t)t, .x = u});
        dsv4_input_operands(p, b, t);
    }
    DSV4_SYNC_TOKENS(w, p);
    return 0;
}

void dsv4_spread(dsv4_worker *w, struct dsv4_pass *p) {
    const struct dsv4_config *c = &p->m->config;
    const struct dsv4_prepared *b = dsv4_prepared(w, p);
    int32_t d = c->hidden_size, hc = c->hc_mult, c0, c1;
    dsv4_share_columns(w, p, &c0, &c1);
    for (int64_t t = 0; t < p->n_tok && c0 < c1 && !dsv4_cancelled(w); t++) {
        dsv4_bf16 *streams = p->ws->streams + t * hc * d;
        p->m->k.hc_post(&(struct dsv4_hc_post_args){
            .out = streams, .y = p->ws->y + t * d, .streams = streams, .post = b->post + t * hc,
            .comb = b->comb + t * hc * hc, .hc = hc, .d_model = d, .c0 = c0, .c1 = c1,
        });
    }
}
