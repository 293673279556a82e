/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The rows somebody wants, on the device: logits, a look for values that are not finite, and the tokens of samplers.  What
 * comes back is tokens and, where asked for, log-probabilities; logits only of rows whose logits are wanted, or whose
 * sampler asks for more than the device has room for.
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

/* What the device chooses of a block of rows. */
struct draws {
    struct dsv4_cuda_draw *draws; /* [ROWS], on the host; the lists follow */
    int32_t row[ROWS];            /* of each draw, in the block */
    int32_t n, n_list, n_top, needs;
};

/* Adds the row's choice unless its alternatives or lists are too many. */
static void add_draw(const run *r, struct draws *all, const struct dsv4_wanted *wanted, int32_t row) {
    struct dsv4_cuda_draw *draw = &all->draws[all->n];
    int32_t *lists = (int32_t *)(void *)(all->draws + ROWS) + all->n_list;
    int32_t used = dsv4_sampler_pack(wanted->sampler, wanted->position, &draw->d, lists,
                                     room_for_lists(r->d->model) - all->n_list);
    if (used < 0 || draw->d.logprobs > DSV4_CUDA_ALTERNATIVES)
        return;
    draw->row = row;
    draw->lists = all->n_list;
    draw->top = all->n_top;
    all->row[all->n++] = row;
    all->n_list += used;
    all->n_top += draw->d.logprobs > 0 ? draw->d.logprobs : 0;
    all->needs |= dsv4_draw_needs(&draw->d);
}

static dsv4_status draw(const run *r, const struct draws *all) {
    const struct dsv4_device_buffers *b = &r->d->b;
    size_t bytes = ROWS * sizeof *all->draws + (size_t)all->n_list * sizeof(int32_t);
    int32_t *tops = b->drawn + AT_TOPS;
    DSV4_TRY(dsv4_device_status(r->d, r->d->plugin->runtime.upload(b->draws, all->draws, bytes, r->d->stream),
                                "what is sampled", r->err));
    LAUNCH(r, sample, .tokens = b->drawn, .logprobs = (float *)(void *)(b->drawn + AT_LOGPROBS), .top_ids = tops,
           .top_logprobs = (float *)(void *)(tops + all->n_top), .logits = b->logits,
           .draws = (const struct dsv4_cuda_draw *)(const void *)b->draws,
           .lists = (const int32_t *)(const void *)(b->draws + ROWS * sizeof *all->draws), .scratch = b->sample_scratch,
           .n_draw = all->n, .n = r->d->model->config.vocab_size, .needs = all->needs);
    return DSV4_OK;
}

static dsv4_status logits(const run *r, const int32_t *tok) {
    const struct dsv4_config *c = &r->d->model->config;
    const struct dsv4_device_buffers *b = &r->d->b;
    const struct dsv4_hyper *h = &r->d->hc_head;
    int32_t d = c->hidden_size, hc = c->hc_mult;
    DSV4_TRY(dsv4_device_status(r->d, r->d->plugin->runtime.upload(b->tok, tok, (size_t)r->n * sizeof *tok, r->d->stream),
                                "input of the head", r->err));
    LAUNCH(r, linear, .n_job = 1, .n_tok = r->n, .tok = b->tok,
           .jobs = {dsv4_linear_job(&h->fn, b->streams, b->head_dots, (ptrdiff_t)hc * d, hc, 1)});
    LAUNCH(r, collapse, .x = b->hidden, .plain = b->hidden_plain, .streams = b->streams, .tok = b->tok,
           .dots = b->head_dots, .scale = h->scale, .base = h->base, .norm = r->d->norm, .n_tok = r->n, .hc = hc,
           .d_model = d, .norm_eps = c->rms_norm_eps, .hc_eps = c->hc_eps, .rms_eps = c->rms_norm_eps);
    LAUNCH(r, linear, .n_job = 1, .n_tok = r->n,
           .jobs = {dsv4_linear_job(&r->d->head, b->hidden_plain, b->logits, d, c->vocab_size, 1)});
    LAUNCH(r, finite, .bad = b->bad, .x = b->logits, .n = (size_t)r->n * (size_t)c->vocab_size,
           .layer = c->num_hidden_layers, .f32 = 1);
    return DSV4_OK;
}

static dsv4_status download(const run *r, void *to, const void *from, size_t bytes) {
    return dsv4_device_status(r->d, r->d->plugin->runtime.download(to, from, bytes, r->d->stream), "what was sampled",
                              r->err);
}

/* Everything the host needs of the block, and the end of all that was enqueued. */
static dsv4_status fetch(const run *r, const struct draws *all, const struct dsv4_wanted *wanted, uint32_t drawn,
                         int32_t *bad) {
    const struct dsv4_device_buffers *b = &r->d->b;
    size_t vocab = (size_t)r->d->model->config.vocab_size;
    for (int32_t i = 0; i < r->n; i++)
        if (wanted[i].logits || !(drawn >> i & 1))
            DSV4_TRY(download(r, r->p->ws->logits + (size_t)i * vocab, b->logits + (size_t)i * vocab,
                              vocab * sizeof(float)));
    if (all->n)
        DSV4_TRY(download(r, r->d->drawn, b->drawn, (AT_TOPS + 2 * (size_t)all->n_top) * sizeof *b->drawn));
    DSV4_TRY(download(r, bad, b->bad, sizeof *bad));
    return dsv4_device_status(r->d, r->d->plugin->runtime.synchronize(r->d->stream), "logits", r->err);
}

/* The samplers take note of what was drawn. */
static void hand_out(const run *r, const struct draws *all, const struct dsv4_wanted *wanted) {
    const int32_t *drawn = r->d->drawn;
    for (int32_t i = 0; i < all->n; i++) {
        const struct dsv4_wanted *w = &wanted[all->row[i]];
        const int32_t *top = drawn + AT_TOPS + all->draws[i].top;
        float logprob = 0.0f;
        if (all->draws[i].d.logprobs >= 0)
            memcpy(&logprob, &drawn[AT_LOGPROBS + i], sizeof logprob);
        dsv4_sampler_take(w->sampler, drawn[i], logprob, top, (const float *)(const void *)(top + all->n_top), w->sample);
    }
}

dsv4_status dsv4_device_head(struct dsv4_pass *p, const struct dsv4_wanted *wanted, int32_t n, uint32_t *drawn,
                             dsv4_error *err) {
    const struct dsv4_pipeline *stages = p->m->pipeline;
    struct dsv4_device *last = &stages->stages[stages->n - 1]; /* still the current device */
    run r = {.d = last, .launches = &last->plugin->launches, .p = p, .n = n, .err = err};
    struct draws all = {.draws = (struct dsv4_cuda_draw *)(void *)r.d->draws};
    int32_t tok[ROWS], bad = INT_MAX, none = INT_MAX;
    *drawn = 0;
    for (int32_t i = 0; i < n; i++) {
        tok[i] = wanted[i].tok;
        if (wanted[i].sampler)
            add_draw(&r, &all, &wanted[i], i);
    }
    for (int32_t i = 0; i < all.n; i++)
        *drawn |= 1u << all.row[i];
    DSV4_TRY(logits(&r, tok));
    if (all.n)
        DSV4_TRY(draw(&r, &all));
    DSV4_TRY(fetch(&r, &all, wanted, *drawn, &bad));
    if (bad != INT_MAX)
        atomic_compare_exchange_strong(p->bad_layer, &none, bad); /* a layer found before stays */
    if (atomic_load(p->bad_layer) == INT_MAX)
        hand_out(&r, &all, wanted); /* else the run fails: nothing is sampled */
    return DSV4_OK;
}
