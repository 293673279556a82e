/* SPDX-License-Identifier: Apache-2.0 */
/* The rows somebody wants: the head's collapse, final norm, logits (SPEC 2.4, 5.1), sampling; in blocks of rows. */
#include <limits.h>

#include "model/device.h"

static int hidden_rows(dsv4_worker *w, struct dsv4_pass *p, const int32_t *tok, int32_t n) {
    const struct dsv4_config *c = &p->m->config;
    struct dsv4_workspace *ws = p->ws;
    int32_t d = c->hidden_size, hc = c->hc_mult;
    int64_t lo, hi;
    struct dsv4_linear_job job = {&p->m->hc_head.fn, ws->streams, ws->head_dots, (ptrdiff_t)hc * d, hc, 1};
    if (w->id == 0)
        dsv4_linear_rows(w, p, &job, tok, n, 0, hc);
    DSV4_SYNC(w, p);
    dsv4_share(w, n, 1, &lo, &hi);
    for (int64_t i = lo; i < hi; i++) {
        dsv4_bf16 *h = ws->hidden + i * d;
        p->m->k.hc_pre(&(struct dsv4_hc_pre_args){
            .x = h, .streams = ws->streams + (ptrdiff_t)tok[i] * hc * d, .dots = ws->head_dots + i * hc,
            .scale = p->m->hc_head.scale, .base = p->m->hc_head.base, .hc = hc, .d_model = d,
            .norm_eps = c->rms_norm_eps, .hc_eps = c->hc_eps,
        });
        p->m->k.rmsnorm(h, h, p->m->norm, d, c->rms_norm_eps);
        p->m->k.act_flush(h, h, d);
    }
    DSV4_SYNC(w, p);
    return 0;
}

static int all_finite(const float *x, int64_t n) {
    uint32_t worst = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t u = dsv4_f32_bits(x[i]) & 0x7fffffffu;
        worst = u > worst ? u : worst;
    }
    return worst < 0x7f800000u;
}

/* ws->logits of n tokens, complete for all workers. */
static int logits_of(dsv4_worker *w, struct dsv4_pass *p, const int32_t *tok, int32_t n) {
    int32_t vocab = p->m->config.vocab_size;
    int64_t lo, hi;
    if (hidden_rows(w, p, tok, n))
        return 1;
    struct dsv4_linear_job job = {&p->m->head, p->ws->hidden, p->ws->logits, p->m->config.hidden_size, vocab, 1};
    dsv4_share(w, vocab, 16, &lo, &hi);
    dsv4_linear_rows(w, p, &job, NULL, n, (int32_t)lo, (int32_t)hi);
    DSV4_SYNC(w, p);
    return 0;
}

/* Likewise of rows that want them, and the tokens the device has chosen. */
static int device_rows(dsv4_worker *w, struct dsv4_pass *p, const struct dsv4_wanted *wanted, int32_t n) {
    if (w->id == 0)
        dsv4_device_head(p, wanted, n, &p->drawn, p->fault);
    DSV4_SYNC(w, p);
    return p->fault->code != DSV4_OK;
}

static int block_of_rows(dsv4_worker *w, struct dsv4_pass *p, const struct dsv4_wanted *wanted, int32_t n) {
    int32_t vocab = p->m->config.vocab_size;
    int32_t tok[DSV4_LOGIT_ROWS];
    int64_t lo, hi;
    for (int32_t i = 0; i < n; i++)
        tok[i] = wanted[i].tok;
    if (p->on_device ? device_rows(w, p, wanted, n) : logits_of(w, p, tok, n))
        return 1;
    dsv4_share(w, vocab, 16, &lo, &hi);
    for (int32_t i = 0; i < n; i++) {
        const float *row = p->ws->logits + (ptrdiff_t)i * vocab;
        int none = INT_MAX; /* a layer found before stays */
        if (!p->on_device && !all_finite(row + lo, hi - lo))
            atomic_compare_exchange_strong(p->bad_layer, &none, p->m->config.num_hidden_layers);
        if (wanted[i].logits)
            memcpy(wanted[i].logits + lo, row + lo, (size_t)(hi - lo) * sizeof *row);
    }
    DSV4_SYNC(w, p);
    if (atomic_load(p->bad_layer) != INT_MAX)
        return 0; /* the run fails: nothing is sampled */
    dsv4_share(w, n, 1, &lo, &hi);
    for (int64_t i = lo; i < hi; i++)
        if (wanted[i].sampler && !(p->drawn >> i & 1))
            dsv4_sampler_sample(wanted[i].sampler, p->ws->logits + i * vocab, wanted[i].position, wanted[i].sample);
    DSV4_SYNC(w, p);
    return 0;
}

int dsv4_head(dsv4_worker *w, struct dsv4_pass *p) {
    for (int32_t i = 0; i < p->n_wanted; i += DSV4_LOGIT_ROWS) {
        int32_t n = p->n_wanted - i < DSV4_LOGIT_ROWS ? p->n_wanted - i : DSV4_LOGIT_ROWS;
        if (block_of_rows(w, p, p->wanted + i, n))
            return 1;
    }
    return 0;
}
