/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a pass sends to its device, and what it gets back, as one copy each, between host memory that stays in place and a
 * block on the device.  On the way back a launch gathers rows from all over the device first; once they are here the host
 * puts them where its sessions have them.
 *
 * The blocks have room for what a pass of single tokens that is a graph needs, and for a full pass of one session.  Passes
 * of many long pieces come back in rounds, pieces after pieces.
 */
#include <limits.h>
#include <string.h>

#include "core/arena.h"
#include "model/device_run.h"

typedef struct dsv4_device_run run;

enum { ALIGN = 16, COPY_BYTES = 16 << 10, MOST_BLOCKS = 1024 };

static size_t aligned(size_t n) {
    return (n + ALIGN - 1) / ALIGN * ALIGN;
}

/* -------------------------------------------------------------------------------------------------------------- layout */

/* Where things lie in what is sent; the copies that are wanted back come last. */
struct layout {
    size_t states, pieces, ids, positions, piece_of, tok, draws, bad, n_copy, copies;
};

static struct layout layout_for(const struct dsv4_device *d, size_t n_tok, size_t n_piece, size_t n_row) {
    struct layout l = {0};
    size_t n_layer = (size_t)(d->end_layer - d->first_layer), at = 0;
#define PLACE(field, bytes) \
    l.field = at; \
    at += aligned(bytes)
    PLACE(states, n_layer * n_piece * sizeof(struct dsv4_cuda_state));
    PLACE(pieces, n_piece * sizeof(struct dsv4_cuda_piece));
    PLACE(ids, n_tok * sizeof(int32_t));
    PLACE(positions, n_tok * sizeof(int32_t));
    PLACE(piece_of, n_tok * sizeof(int32_t));
    PLACE(tok, n_row * sizeof(int32_t));
    PLACE(draws, n_row * sizeof(struct dsv4_cuda_draw));
    PLACE(bad, sizeof(int32_t));
    PLACE(n_copy, sizeof(int32_t));
    l.copies = at;
#undef PLACE
    return l;
}

static struct layout layout_of(const run *r) {
    return layout_for(r->d, (size_t)r->n, (size_t)r->p->n_piece, (size_t)r->shape.n_row);
}

/* Copies and bytes, alignment included. */
struct need {
    size_t copies, bytes;
};

/* At most, for `rows` rows that lie in so many runs, and (shift > 0) in the host's blocks of 2^shift rows. */
static void need_rows(struct need *n, size_t rows, size_t row_bytes, size_t runs, int32_t shift) {
    size_t parts = runs + rows * row_bytes / COPY_BYTES;
    if (shift)
        parts += (rows >> shift) * (1 + (row_bytes << shift) / COPY_BYTES) + 1;
    n->copies += parts;
    n->bytes += rows * row_bytes + parts * ALIGN;
}

static void need_ring(struct need *need, size_t n, size_t slots, size_t row_bytes) {
    need_rows(need, n < slots ? n : slots, row_bytes, n > 1 ? 2 : 1, 0);
}

/* What comes back of a piece of n tokens, at most. */
static struct need need_of_piece(const struct dsv4_device *d, int32_t n_tok) {
    const dsv4_model *m = d->model;
    size_t n = (size_t)n_tok;
    struct need need = {0};
    for (int32_t i = d->first_layer; i < d->end_layer; i++) {
        const struct dsv4_layer *l = &m->layers[i];
        size_t slots = (size_t)m->state[i].rows;
        need_ring(&need, n, (size_t)m->config.sliding_window, m->kv_row);
        if (l->kind == DSV4_SWA)
            continue;
        size_t rows = n / (size_t)l->compressor.ratio + 1;
        need_ring(&need, n, slots, dsv4_state_row_bytes(&l->compressor));
        need_ring(&need, n, slots, dsv4_state_row_bytes(&l->compressor));
        need_rows(&need, rows, m->kv_row, 1, rows > 1 ? DSV4_KV_BLOCK_SHIFT : 0);
        if (l->kind != DSV4_CSA)
            continue;
        need_ring(&need, n, slots, dsv4_state_row_bytes(&l->index_compressor));
        need_ring(&need, n, slots, dsv4_state_row_bytes(&l->index_compressor));
        need_rows(&need, rows, m->index_row, 1, rows > 1 ? DSV4_BLOCK_SHIFT : 0);
    }
    return need;
}

static struct need need_of_head(const struct dsv4_device *d) {
    struct need need = {0};
    if (d->end_layer < d->model->config.num_hidden_layers)
        return need;
    need_rows(&need, DSV4_LOGIT_ROWS, (size_t)d->model->config.vocab_size * sizeof(float), DSV4_LOGIT_ROWS, 0);
    need_rows(&need, dsv4_device_drawn_words(), sizeof(int32_t), 1, 0);
    return need;
}

void dsv4_staging_measure(struct dsv4_device *d) {
    struct dsv4_staging *s = &d->staging;
    struct need head = need_of_head(d);
    size_t chunk = (size_t)d->model->options.chunk_tok, few = chunk < DSV4_GRAPH_TOKENS ? chunk : DSV4_GRAPH_TOKENS;
    struct need one = need_of_piece(d, 1), all = need_of_piece(d, (int32_t)chunk);
    s->most_copies = 1 + head.copies + (few * one.copies > all.copies ? few * one.copies : all.copies);
    s->out_bytes = ALIGN + head.bytes + (few * one.bytes > all.bytes ? few * one.bytes : all.bytes);
    s->in_bytes = layout_for(d, chunk, chunk, DSV4_LOGIT_ROWS).copies + s->most_copies * sizeof(struct dsv4_cuda_copy);
}

dsv4_status dsv4_staging_create(struct dsv4_device *d, dsv4_error *err) {
    struct dsv4_staging *s = &d->staging;
    const struct dsv4_cuda_runtime *rt = &d->plugin->runtime;
    void *host, *unused;
    DSV4_TRY(dsv4_arena_take(d->model->arena, &s->places, s->most_copies, sizeof *s->places, err));
    DSV4_TRY(dsv4_device_status(d, rt->host_allocate(&host, &unused, s->in_bytes), "host memory for a pass", err));
    s->in = host;
    DSV4_TRY(dsv4_device_status(d, rt->host_allocate(&host, &unused, s->out_bytes), "host memory for a pass", err));
    s->out = host;
    return DSV4_OK;
}

void dsv4_staging_destroy(struct dsv4_device *d) {
    if (d->staging.in)
        d->plugin->runtime.host_release(d->staging.in);
    if (d->staging.out)
        d->plugin->runtime.host_release(d->staging.out);
}

/* ------------------------------------------------------------------------------------------------------ what comes back */

void dsv4_staging_want(struct dsv4_device *d, void *host, const void *there, size_t bytes) {
    struct dsv4_staging *s = &d->staging;
    for (size_t at = 0, n; at < bytes; at += n) {
        n = bytes - at < COPY_BYTES ? bytes - at : COPY_BYTES;
        s->copies[s->n_copy] = (struct dsv4_cuda_copy){(const uint8_t *)there + at, (uint32_t)s->used, (uint32_t)n};
        s->places[s->n_copy++] = (uint8_t *)host + at;
        s->used += aligned(n);
    }
}

/* Lists what comes back of the next pieces, as many as there is room for, into the block that is sent. */
static void list_pieces(run *r, const struct layout *l) {
    struct dsv4_device *d = r->d;
    struct dsv4_staging *s = &d->staging;
    s->copies = (struct dsv4_cuda_copy *)(void *)(s->in + l->copies);
    s->n_copy = 0;
    s->used = 0;
    if (r->fetched == 0) {
        dsv4_staging_want(d, &r->bad, d->b.bad, sizeof r->bad);
        if (r->shape.n_row)
            dsv4_head_want(r);
    }
    for (struct need all = {(size_t)s->n_copy, s->used}; r->fetched < r->p->n_piece; r->fetched++) {
        struct need more = need_of_piece(d, r->p->pieces[r->fetched].n);
        all.copies += more.copies;
        all.bytes += more.bytes;
        if (all.copies > s->most_copies || all.bytes > s->out_bytes)
            break;
        dsv4_mirror_want(d, &r->p->pieces[r->fetched]);
    }
    memcpy(s->in + l->n_copy, &s->n_copy, sizeof s->n_copy);
}

dsv4_status dsv4_device_gather(const run *r) {
    const struct dsv4_device *d = r->d;
    const struct layout l = layout_of(r);
    size_t most = 1 + (size_t)r->p->n_piece * need_of_piece(d, r->n).copies + (r->shape.n_row ? need_of_head(d).copies : 0);
    LAUNCH(r, gather, .out = d->b.out, .copies = (const struct dsv4_cuda_copy *)(const void *)(d->b.in + l.copies),
           .n_copy = (const int32_t *)(const void *)(d->b.in + l.n_copy),
           .n_block = most < MOST_BLOCKS ? (int32_t)most : MOST_BLOCKS);
    return DSV4_OK;
}

static dsv4_status upload(const run *r, size_t first, size_t end) {
    const struct dsv4_staging *s = &r->d->staging;
    int code = r->d->plugin->runtime.upload(r->d->b.in + first, s->in + first, end - first, r->d->stream);
    return dsv4_device_status(r->d, code, "input of a pass", r->err);
}

static size_t end_of_copies(const run *r, const struct layout *l) {
    return l->copies + (size_t)r->d->staging.n_copy * sizeof *r->d->staging.copies;
}

/* --------------------------------------------------------------------------------------------------------------- a pass */

static dsv4_status wait(const run *r) {
    DSV4_TRY(dsv4_pipeline_wait(r->d->pipeline, "a pass", r->err));
    return dsv4_device_prepare(r->d, r->err);
}

static void write_input(const run *r, const struct layout *l) {
    const struct dsv4_device *d = r->d;
    const struct dsv4_pass *p = r->p;
    uint8_t *in = d->staging.in;
    struct dsv4_cuda_state *states = (struct dsv4_cuda_state *)(void *)(in + l->states);
    struct dsv4_cuda_piece *pieces = (struct dsv4_cuda_piece *)(void *)(in + l->pieces);
    size_t ints = (size_t)r->n * sizeof(int32_t);
    int32_t none = INT_MAX;
    for (int32_t i = 0; i < p->n_piece; i++) {
        const struct dsv4_piece *piece = &p->pieces[i];
        const struct dsv4_mirror *k = dsv4_mirror_of(d, piece);
        pieces[i] = (struct dsv4_cuda_piece){piece->first_tok, piece->n, piece->position};
        for (int32_t layer = d->first_layer; layer < d->end_layer; layer++)
            dsv4_mirror_state(k, layer, &states[(layer - d->first_layer) * p->n_piece + i]);
    }
    memcpy(in + l->ids, p->ids, ints);
    memcpy(in + l->positions, p->positions, ints);
    memcpy(in + l->piece_of, p->piece_of, ints);
    memcpy(in + l->bad, &none, sizeof none);
    if (r->shape.n_row)
        dsv4_head_write(r, in + l->tok, in + l->draws);
}

dsv4_status dsv4_device_send(run *r) {
    struct dsv4_device *d = r->d;
    struct dsv4_device_buffers *b = &d->b;
    const struct layout l = layout_of(r);
    if (d->staging.busy) /* of a pass that failed half-way, which may still read what it sent */
        DSV4_TRY(wait(r));
    for (int32_t i = 0; i < r->p->n_piece; i++)
        DSV4_TRY(dsv4_mirror_ready(d, r->p, &r->p->pieces[i], r->err));
    b->states = (struct dsv4_cuda_state *)(void *)(b->in + l.states);
    b->pieces = (struct dsv4_cuda_piece *)(void *)(b->in + l.pieces);
    b->ids = (int32_t *)(void *)(b->in + l.ids);
    b->positions = (int32_t *)(void *)(b->in + l.positions);
    b->piece_of = (int32_t *)(void *)(b->in + l.piece_of);
    b->bad = (int32_t *)(void *)(b->in + l.bad);
    d->rows.tok = (const int32_t *)(void *)(b->in + l.tok);
    d->rows.draws = (const struct dsv4_cuda_draw *)(void *)(b->in + l.draws);
    r->pass = (struct dsv4_cuda_pass){.pieces = b->pieces, .piece_of = b->piece_of, .positions = b->positions,
                                      .n_piece = r->p->n_piece, .n_tok = r->n};
    write_input(r, &l);
    list_pieces(r, &l);
    d->staging.busy = 1;
    return upload(r, 0, end_of_copies(r, &l));
}

static dsv4_status download(const run *r) {
    const struct dsv4_staging *s = &r->d->staging;
    int code = r->d->plugin->runtime.download(s->out, r->d->b.out, s->used, r->d->stream);
    return dsv4_device_status(r->d, code, "result of a pass", r->err);
}

static void put(const struct dsv4_staging *s) {
    for (int32_t i = 0; i < s->n_copy; i++)
        memcpy(s->places[i], s->out + s->copies[i].to, s->copies[i].bytes);
}

dsv4_status dsv4_device_fetch(run *r) {
    const struct layout l = layout_of(r);
    DSV4_TRY(download(r));
    while (r->fetched < r->p->n_piece) {
        DSV4_TRY(wait(r));
        put(&r->d->staging);
        list_pieces(r, &l);
        DSV4_TRY(upload(r, l.n_copy, end_of_copies(r, &l)));
        DSV4_TRY(dsv4_device_gather(r));
        DSV4_TRY(download(r));
    }
    return DSV4_OK;
}

void dsv4_device_arrive(run *r) {
    r->d->staging.busy = 0;
    put(&r->d->staging);
    for (int32_t i = 0; i < r->p->n_piece; i++)
        dsv4_mirror_of(r->d, &r->p->pieces[i])->position = r->p->pieces[i].position + r->p->pieces[i].n;
    if (r->bad < atomic_load(r->p->bad_layer))
        atomic_store(r->p->bad_layer, r->bad);
}
