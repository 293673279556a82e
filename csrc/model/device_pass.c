/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A pass on the device: what goes there, the launches of forward.c, what comes back.  One thread enqueues
 * everything on one stream and waits once, at the end.
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

/* The pass through one stage. */
static dsv4_status stage(run *r) {
    DSV4_TRY(dsv4_device_prepare(r->d, r->err));
    DSV4_TRY(dsv4_device_sites_begin(r));
    dsv4_head_plan(r);
    dsv4_graphs_find(r);
    DSV4_TRY(dsv4_device_send(r));
    DSV4_TRY(dsv4_beside_segments(r));
    if (dsv4_cancelled(r->w))
        return DSV4_OK;
    DSV4_TRY(dsv4_device_fetch(r));
    DSV4_TRY(dsv4_device_sites_end(r));
    DSV4_TRY(dsv4_device_status(r->d, r->d->plugin->runtime.synchronize(r->d->stream), "a pass", r->err));
    dsv4_device_sites_take(r);
    dsv4_device_arrive(r);
    dsv4_graphs_done(r);
    return DSV4_OK;
}

dsv4_status dsv4_device_layers(dsv4_worker *w, struct dsv4_pass *p, dsv4_error *err) {
    struct dsv4_pipeline *all = p->m->pipeline;
    dsv4_status status = DSV4_OK;
    if (all->dead.code != DSV4_OK) {
        *err = all->dead;
        return err->code;
    }
    for (int32_t i = 0; status == DSV4_OK && i < all->n; i++)
        status = stage(&(run){.d = &all->stages[i], .p = p, .w = w, .n = p->n_tok, .eager = p->asked != NULL,
                        .launches = p->prompt ? &all->stages[i].prompts : &all->stages[i].plugin->launches, .err = err});
    for (int32_t i = 0; status != DSV4_OK && i < p->n_piece; i++)
        dsv4_mirror_forget(p->pieces[i].kv->mirror);
    return status;
}
