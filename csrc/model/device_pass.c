/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A pass on the device: what goes there, the launches of forward.c, what comes back.  One thread enqueues
 * everything on one stream and waits once, at the end.
 */
#include <limits.h>

#include "model/device_sites.h"

typedef struct dsv4_device_run run;

static const struct dsv4_config *config_of(const run *r) {
    return &r->d->model->config;
}

static dsv4_status upload(const run *r, void *to, const void *from, size_t bytes) {
    return dsv4_device_status(r->d, r->d->plugin->runtime.upload(to, from, bytes, r->d->stream), "input of a pass", r->err);
}

/* Sessions, token ids, positions and the pointers of every layer to the device. */
static dsv4_status send_pass(run *r) {
    struct dsv4_device *d = r->d;
    const struct dsv4_pass *p = r->p;
    const struct dsv4_device_buffers *b = &d->b;
    size_t n_piece = (size_t)p->n_piece, ints = (size_t)p->n_tok * sizeof(int32_t);
    int32_t none = INT_MAX;
    for (int32_t i = 0; i < p->n_piece; i++) {
        const struct dsv4_piece *piece = &p->pieces[i];
        DSV4_TRY(dsv4_mirror_ready(d, p, piece, r->err));
        d->pieces[i] = (struct dsv4_cuda_piece){piece->first_tok, piece->n, piece->position};
        for (int32_t l = d->first_layer; l < d->end_layer; l++)
            dsv4_mirror_state(dsv4_mirror_of(d, piece), l, &d->states[(size_t)l * n_piece + (size_t)i]);
    }
    size_t first = (size_t)d->first_layer * n_piece, states = (size_t)d->end_layer * n_piece - first;
    DSV4_TRY(upload(r, b->states + first, d->states + first, states * sizeof *d->states));
    DSV4_TRY(upload(r, b->pieces, d->pieces, n_piece * sizeof *d->pieces));
    DSV4_TRY(upload(r, b->ids, p->ids, ints));
    DSV4_TRY(upload(r, b->positions, p->positions, ints));
    DSV4_TRY(upload(r, b->piece_of, p->piece_of, ints));
    DSV4_TRY(upload(r, b->bad, &none, sizeof none));
    r->pass = (struct dsv4_cuda_pass){.pieces = b->pieces, .piece_of = b->piece_of, .positions = b->positions,
                                      .n_piece = p->n_piece, .n_tok = p->n_tok};
    return DSV4_OK;
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

/* What the host needs of the pass, and the end of all that was enqueued. */
static dsv4_status finish(run *r) {
    const struct dsv4_cuda_runtime *rt = &r->d->plugin->runtime;
    int32_t bad = INT_MAX;
    for (int32_t i = 0; i < r->p->n_piece; i++)
        DSV4_TRY(dsv4_mirror_fetch(r->d, &r->p->pieces[i], r->err));
    DSV4_TRY(dsv4_device_sites_end(r));
    DSV4_TRY(dsv4_device_status(r->d, rt->download(&bad, r->d->b.bad, sizeof bad, r->d->stream), "result of a pass",
                                r->err));
    DSV4_TRY(dsv4_device_status(r->d, rt->synchronize(r->d->stream), "a pass", r->err));
    dsv4_device_sites_take(r);
    if (bad != INT_MAX)
        atomic_store(r->p->bad_layer, bad);
    return DSV4_OK;
}

/* The pass through one stage. */
static dsv4_status stage(run *r) {
    DSV4_TRY(dsv4_device_prepare(r->d, r->err));
    DSV4_TRY(dsv4_device_sites_begin(r));
    dsv4_graphs_find(r);
    DSV4_TRY(send_pass(r));
    DSV4_TRY(dsv4_device_segment(r, 2 * r->d->first_layer, 2 * r->d->end_layer));
    DSV4_TRY(finish(r));
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
                        .err = err});
    for (int32_t i = 0; status != DSV4_OK && i < p->n_piece; i++)
        dsv4_mirror_forget(p->pieces[i].kv->mirror);
    return status;
}
