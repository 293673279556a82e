/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The rows somebody wants, on the device: logits, a look for values that are not finite, and the tokens of samplers.  What
 * comes back is tokens and, where asked for, log-probabilities; logits only of rows whose logits are wanted, or whose
 * sampler asks for more than the device has room for.  The first block of rows is part of the pass, unless it samples from
 * lists; the others follow it.
 */
#include <limits.h>
#include <string.h>

#include "model/device_run.h"
#include "sampling.h"

typedef struct dsv4_device_run run;

enum { ROWS = DSV4_LOGIT_ROWS, LISTS_PER_TOKEN = 4 };

/* Words of a block of rows that come back: tokens, log-probabilities, alternatives, their log-probabilities. */
enum { AT_LOGPROBS = ROWS, AT_TOPS = 2 * ROWS, DRAWN_WORDS = 2 * ROWS + 2 * ROWS * DSV4_CUDA_ALTERNATIVES };

static int32_t room_for_lists(const dsv4_model *m) {
    return LISTS_PER_TOKEN * m->config.vocab_size;
}

size_t dsv4_device_draw_bytes(const dsv4_model *m) {
    return ROWS * sizeof(struct dsv4_cuda_draw) + (size_t)room_for_lists(m) * sizeof(int32_t);
}

size_t dsv4_device_drawn_words(void) {
    return DRAWN_WORDS;
}

static struct dsv4_cuda_draw *host_draws(const struct dsv4_device *d) {
    return (struct dsv4_cuda_draw *)(void *)d->draws; /* [ROWS]; the lists follow */
}

/* Adds the row's choice unless its alternatives or lists are too many. */
static void add_draw(struct dsv4_device *d, const struct dsv4_wanted *wanted, int32_t row) {
    struct dsv4_device_rows *all = &d->rows;
    struct dsv4_cuda_draw *draw = &host_draws(d)[all->n_draw];
    int32_t *lists = (int32_t *)(void *)(host_draws(d) + ROWS) + all->n_list;
    int32_t used = dsv4_sampler_pack(wanted->sampler, wanted->position, &draw->d, lists,
                                     room_for_lists(d->model) - all->n_list);
    if (used < 0 || draw->d.logprobs > DSV4_CUDA_ALTERNATIVES)
        return;
    draw->row = row;
    draw->lists = all->n_list;
    draw->top = all->n_top;
    all->row[all->n_draw++] = row;
    all->n_list += used;
    all->n_top += draw->d.logprobs > 0 ? draw->d.logprobs : 0;
    all->needs |= dsv4_draw_needs(&draw->d);
}

/* What n rows want; the draws that the device makes of it stay on the host. */
static void plan(struct dsv4_device *d, const struct dsv4_wanted *wanted, int32_t n) {
    d->rows = (struct dsv4_device_rows){.n = n};
    for (int32_t i = 0; i < n; i++)
        if (wanted[i].sampler)
            add_draw(d, &wanted[i], i);
}

/* Bit i: the device chooses the token of row i. */
static uint32_t drawn_rows(const struct dsv4_device_rows *rows) {
    uint32_t drawn = 0;
    for (int32_t i = 0; i < rows->n_draw; i++)
        drawn |= 1u << rows->row[i];
    return drawn;
}

dsv4_status dsv4_head_launch(const run *pass) {
    run own = *pass; /* whatever a prompt's layers take, the head has the CPU's sums */
    const run *r = &own;
    own.launches = &pass->d->plugin->launches;
    const struct dsv4_config *c = &r->d->model->config;
    const struct dsv4_device_buffers *b = &r->d->b;
    const struct dsv4_device_rows *rows = &r->d->rows;
    const struct dsv4_hyper *h = &r->d->hc_head;
    int32_t d = c->hidden_size, hc = c->hc_mult, *tops = b->drawn + AT_TOPS;
    LAUNCH(r, linear, .n_job = 1, .n_tok = rows->n, .tok = rows->tok,
           .jobs = {dsv4_linear_job(&h->fn, b->streams, b->head_dots, (ptrdiff_t)hc * d, hc, 1)});
    LAUNCH(r, collapse, .x = b->hidden, .plain = b->hidden_plain, .streams = b->streams, .tok = rows->tok,
           .dots = b->head_dots, .scale = h->scale, .base = h->base, .norm = r->d->norm, .n_tok = rows->n, .hc = hc,
           .d_model = d, .norm_eps = c->rms_norm_eps, .hc_eps = c->hc_eps, .rms_eps = c->rms_norm_eps);
    LAUNCH(r, linear, .n_job = 1, .n_tok = rows->n,
           .jobs = {dsv4_linear_job(&r->d->head, b->hidden_plain, b->logits, d, c->vocab_size, 1)});
    LAUNCH(r, finite, .bad = b->bad, .x = b->logits, .n = (size_t)rows->n * (size_t)c->vocab_size,
           .layer = c->num_hidden_layers, .f32 = 1);
    if (rows->n_draw)
        LAUNCH(r, sample, .tokens = b->drawn, .logprobs = (float *)(void *)(b->drawn + AT_LOGPROBS), .top_ids = tops,
               .top_logprobs = (float *)(void *)(tops + rows->n_top), .logits = b->logits, .draws = rows->draws,
               .lists = (const int32_t *)(const void *)(b->draws + ROWS * sizeof *rows->draws),
               .scratch = b->sample_scratch, .n_draw = rows->n_draw, .n = c->vocab_size, .needs = rows->needs);
    return DSV4_OK;
}

/* -------------------------------------------------------------------------------------------------- as part of the pass */

void dsv4_head_plan(run *r) {
    struct dsv4_device *d = r->d;
    d->rows.n = 0;
    if (d->end_layer < d->model->config.num_hidden_layers || !r->p->n_wanted)
        return;
    plan(d, r->p->wanted, r->p->n_wanted < ROWS ? r->p->n_wanted : ROWS);
    if (d->rows.n_list) /* too long for what is sent with a pass */
        d->rows.n = 0;
}

void dsv4_head_write(const run *r, uint8_t *tok, uint8_t *draws) {
    const struct dsv4_device_rows *rows = &r->d->rows;
    for (int32_t i = 0; i < rows->n; i++)
        memcpy(tok + (size_t)i * sizeof(int32_t), &r->p->wanted[i].tok, sizeof(int32_t));
    memcpy(draws, r->d->draws, (size_t)rows->n_draw * sizeof *rows->draws);
}

void dsv4_head_want(const run *r) {
    struct dsv4_device *d = r->d;
    size_t vocab = (size_t)d->model->config.vocab_size;
    uint32_t drawn = drawn_rows(&d->rows);
    for (int32_t i = 0; i < d->rows.n; i++)
        if (r->p->wanted[i].logits || !(drawn >> i & 1))
            dsv4_staging_want(d, r->p->ws->logits + (size_t)i * vocab, d->b.logits + (size_t)i * vocab,
                              vocab * sizeof(float));
    if (d->rows.n_draw)
        dsv4_staging_want(d, d->drawn, d->b.drawn, (AT_TOPS + 2 * (size_t)d->rows.n_top) * sizeof *d->drawn);
}

/* -------------------------------------------------------------------------------------------------------- after the pass */

static dsv4_status download(const run *r, void *to, const void *from, size_t bytes) {
    return dsv4_device_status(r->d, r->d->plugin->runtime.download(to, from, bytes, r->d->stream), "what was sampled",
                              r->err);
}

static dsv4_status send(run *r, const struct dsv4_wanted *wanted) {
    struct dsv4_device_rows *rows = &r->d->rows;
    const struct dsv4_cuda_runtime *rt = &r->d->plugin->runtime;
    size_t bytes = ROWS * sizeof *rows->draws + (size_t)rows->n_list * sizeof(int32_t);
    int32_t *tok = r->d->head_tok; /* an upload may read it later */
    for (int32_t i = 0; i < rows->n; i++)
        tok[i] = wanted[i].tok;
    rows->tok = r->d->b.tok;
    rows->draws = (const struct dsv4_cuda_draw *)(const void *)r->d->b.draws;
    DSV4_TRY(dsv4_device_status(r->d, rt->upload(r->d->b.tok, tok, (size_t)rows->n * sizeof *tok, r->d->stream),
                                "input of the head", r->err));
    if (!rows->n_draw)
        return DSV4_OK;
    return dsv4_device_status(r->d, rt->upload(r->d->b.draws, r->d->draws, bytes, r->d->stream), "what is sampled", r->err);
}

/* Everything the host needs of the block, and the end of all that was enqueued. */
static dsv4_status fetch(const run *r, const struct dsv4_wanted *wanted, uint32_t drawn, int32_t *bad) {
    const struct dsv4_device_buffers *b = &r->d->b;
    const struct dsv4_device_rows *rows = &r->d->rows;
    size_t vocab = (size_t)r->d->model->config.vocab_size;
    for (int32_t i = 0; i < rows->n; i++)
        if (wanted[i].logits || !(drawn >> i & 1))
            DSV4_TRY(download(r, r->p->ws->logits + (size_t)i * vocab, b->logits + (size_t)i * vocab,
                              vocab * sizeof(float)));
    if (rows->n_draw)
        DSV4_TRY(download(r, r->d->drawn, b->drawn, (AT_TOPS + 2 * (size_t)rows->n_top) * sizeof *b->drawn));
    DSV4_TRY(download(r, bad, b->bad, sizeof *bad));
    return dsv4_device_status(r->d, r->d->plugin->runtime.synchronize(r->d->stream), "logits", r->err);
}

static dsv4_status run_head(run *r, const struct dsv4_wanted *wanted, int32_t n) {
    int32_t bad = INT_MAX, none = INT_MAX;
    plan(r->d, wanted, n);
    DSV4_TRY(send(r, wanted));
    DSV4_TRY(dsv4_head_launch(r));
    DSV4_TRY(fetch(r, wanted, drawn_rows(&r->d->rows), &bad));
    if (bad != INT_MAX)
        atomic_compare_exchange_strong(r->p->bad_layer, &none, bad); /* a layer found before stays */
    return DSV4_OK;
}

/* The samplers take note of what was drawn. */
static void hand_out(const struct dsv4_device *d, const struct dsv4_wanted *wanted) {
    const struct dsv4_device_rows *rows = &d->rows;
    for (int32_t i = 0; i < rows->n_draw; i++) {
        const struct dsv4_wanted *w = &wanted[rows->row[i]];
        const int32_t *top = d->drawn + AT_TOPS + host_draws(d)[i].top;
        float logprob = 0.0f;
        if (host_draws(d)[i].d.logprobs >= 0)
            memcpy(&logprob, &d->drawn[AT_LOGPROBS + i], sizeof logprob);
        dsv4_sampler_take(w->sampler, d->drawn[i], logprob, top, (const float *)(const void *)(top + rows->n_top),
                          w->sample);
    }
}

dsv4_status dsv4_device_head(struct dsv4_pass *p, const struct dsv4_wanted *wanted, int32_t n, uint32_t *drawn,
                             dsv4_error *err) {
    const struct dsv4_pipeline *stages = p->m->pipeline;
    run r = {.d = &stages->stages[stages->n - 1], .p = p, .err = err};
    DSV4_TRY(dsv4_device_prepare(r.d, err));
    if (wanted != p->wanted || !r.d->rows.n) /* else they came with the pass */
        DSV4_TRY(run_head(&r, wanted, n));
    *drawn = drawn_rows(&r.d->rows);
    if (atomic_load(p->bad_layer) == INT_MAX)
        hand_out(r.d, wanted); /* else the run fails: nothing is sampled */
    return DSV4_OK;
}
