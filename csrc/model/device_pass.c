/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A pass on the devices: what goes there, the launches of forward.c, what comes back.  One thread enqueues
 * everything on the stream of each stage and waits once, at the end.
 */
#include "model/device_experts.h"
#include "model/device_sites.h"

typedef struct dsv4_device_run run;

static const struct dsv4_config *config_of(const run *r) {
    return &r->d->model->config;
}

dsv4_status dsv4_device_enter(run *r) {
    const struct dsv4_config *c = config_of(r);
    const struct dsv4_device_buffers *b = &r->d->b;
    int32_t pairs = c->qk_rope_head_dim / 2;
    LAUNCH(r, rope_table, .cos = b->cos_main, .sin = b->sin_main, .freq = r->d->freq_main, .positions = b->positions,
           .n_tok = r->n, .n_pair = pairs);
    LAUNCH(r, rope_table, .cos = b->cos_comp, .sin = b->sin_comp, .freq = r->d->freq_compressed, .positions = b->positions,
           .n_tok = r->n, .n_pair = pairs);
    if (r->d->first_layer > 0) /* the streams come from the stage before */
        return DSV4_OK;
    LAUNCH(r, embed, .streams = b->streams, .table = r->d->embed.data, .ids = b->ids, .n_tok = r->n, .hc = c->hc_mult,
           .d_model = c->hidden_size, .table_f32 = r->d->embed.format == DSV4_W_F32);
    return DSV4_OK;
}

/* The streams of the pass from the stage before. */
static dsv4_status receive(const run *r) {
    const struct dsv4_config *c = config_of(r);
    const struct dsv4_device *before = r->d - 1;
    size_t bytes = (size_t)r->n * (size_t)c->hc_mult * (size_t)c->hidden_size * sizeof *before->b.streams;
    struct dsv4_pipeline *all = r->d->pipeline;
    return dsv4_pipeline_move(all, (int32_t)(r->d - all->stages), r->d->b.streams, before->b.streams, bytes, r->err);
}

/* The layers of one stage. */
static dsv4_status stage(run *r) {
    if (r->d->first_layer > 0)
        DSV4_TRY(receive(r));
    DSV4_TRY(dsv4_device_prepare(r->d, r->err));
    return dsv4_beside_segments(r);
}

/* What the stages need of the host, before any of them begins. */
static dsv4_status begin(run *r) {
    DSV4_TRY(dsv4_device_prepare(r->d, r->err));
    DSV4_TRY(dsv4_device_sites_begin(r));
    dsv4_head_plan(r);
    dsv4_graphs_find(r);
    return dsv4_device_send(r);
}

static dsv4_status fetch(run *r) {
    DSV4_TRY(dsv4_device_prepare(r->d, r->err));
    DSV4_TRY(dsv4_device_fetch(r));
    return dsv4_device_sites_end(r);
}

/* Once the pass has ended well. */
static void take(run *r) {
    dsv4_device_sites_take(r);
    dsv4_device_arrive(r);
    dsv4_graphs_done(r);
}

/* Everything is enqueued, the input of all stages first, before the one wait at the end. */
static dsv4_status layers(dsv4_worker *w, struct dsv4_pass *p, run *runs, dsv4_error *err) {
    struct dsv4_pipeline *all = p->m->pipeline;
    for (int32_t i = 0; i < all->n; i++) {
        struct dsv4_device *d = &all->stages[i];
        runs[i] = (run){.d = d, .p = p, .w = w, .n = p->n_tok, .eager = p->asked != NULL,
                        .launches = p->prompt ? &d->prompts : &d->plugin->launches, .err = err};
        DSV4_TRY(begin(&runs[i]));
    }
    for (int32_t i = 0; i < all->n && !dsv4_cancelled(w); i++)
        DSV4_TRY(stage(&runs[i]));
    if (dsv4_cancelled(w))
        return DSV4_OK;
    for (int32_t i = 0; i < all->n; i++)
        DSV4_TRY(fetch(&runs[i]));
    DSV4_TRY(dsv4_pipeline_wait(all, "a pass", err));
    for (int32_t i = 0; i < all->n; i++)
        take(&runs[i]);
    return DSV4_OK;
}

dsv4_status dsv4_device_layers(dsv4_worker *w, struct dsv4_pass *p, dsv4_error *err) {
    struct dsv4_pipeline *all = p->m->pipeline;
    run runs[DSV4_STAGES];
    if (all->dead.code != DSV4_OK) {
        *err = all->dead;
        return err->code;
    }
    dsv4_status status = layers(w, p, runs, err);
    if (all->dead.code != DSV4_OK)
        dsv4_pipeline_abandon(all);
    for (int32_t i = 0; status != DSV4_OK && i < p->n_piece; i++)
        dsv4_mirror_forget(p->pieces[i].kv->mirror);
    return status;
}
