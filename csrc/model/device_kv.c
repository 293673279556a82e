/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The mirror of a session's state on a device (gen/kvcache.h says what it holds).  It follows the session from step to
 * step; when the host's state has moved without it (a fork, a rewind, a loaded file, a step on the CPU) it is copied
 * again.  Blocks never move: a longer context adds a slab of them.
 */
#include <stdlib.h>
#include <string.h>

#include "model/device.h"

enum { BLOCK = DSV4_CUDA_BLOCK_ROWS, LEAST_TOKENS = 1024 };

/* Blocks of one layer's rows for that many tokens. */
static size_t blocks_for(const dsv4_model *m, int32_t layer, int32_t tokens) {
    if (m->layers[layer].kind == DSV4_SWA)
        return 0;
    return (size_t)(tokens / m->layers[layer].compressor.ratio + BLOCK - 1) / BLOCK;
}

static size_t row_bytes(const dsv4_model *m, int32_t layer, int index) {
    return !index ? m->kv_row : m->layers[layer].kind == DSV4_CSA ? m->index_row : 0;
}

/* That of one stage. */
static void destroy(struct dsv4_mirror *k) {
    const struct dsv4_cuda_runtime *rt = &k->device->plugin->runtime;
    rt->prepare(k->device->number); /* errors of a device that is lost are of no interest */
    rt->release(k->fixed);
    for (int32_t i = 0; i < k->n_slab; i++)
        rt->release(k->slabs[i]);
    rt->release(k->device_tables);
    free(k->slabs);
    free(k->tables);
    free(k->at);
    free(k);
}

void dsv4_mirror_destroy(struct dsv4_mirror *k) {
    struct dsv4_cuda_visit visit; /* whoever lets a session go, a collector of garbage too */
    dsv4_error ignored;
    if (!k)
        return;
    dsv4_cuda_enter(&visit, k->device->plugin, &ignored);
    for (struct dsv4_mirror *next; k; k = next) {
        next = k->next;
        destroy(k);
    }
    dsv4_cuda_leave(&visit);
}

void dsv4_mirror_forget(struct dsv4_mirror *k) {
    for (; k; k = k->next)
        k->position = -1;
}

struct dsv4_mirror *dsv4_mirror_of(const struct dsv4_device *d, const struct dsv4_piece *piece) {
    struct dsv4_mirror *k = piece->kv->mirror;
    while (k && k->device != d)
        k = k->next;
    return k;
}

/* The part of the fixed state that a stage has: layers lie one after the other. */
static size_t fixed_first(const struct dsv4_device *d) {
    return d->model->state[d->first_layer].window;
}

static size_t fixed_bytes(const struct dsv4_device *d) {
    int last = d->end_layer == d->model->config.num_hidden_layers;
    return (last ? d->model->state_bytes : d->model->state[d->end_layer].window) - fixed_first(d);
}

/* Where that offset of the fixed state lies; NULL for the 0 of what a layer does not have. */
static uint8_t *fixed_at(const struct dsv4_mirror *k, size_t offset) {
    size_t first = fixed_first(k->device);
    return offset < first ? NULL : k->fixed + (offset - first);
}

size_t dsv4_mirror_bytes(const struct dsv4_device *d, int32_t tokens) {
    int32_t most = d->model->config.max_position_embeddings;
    size_t bytes = fixed_bytes(d);
    tokens = tokens < most ? tokens : most;
    for (int32_t i = d->first_layer; i < d->end_layer; i++)
        bytes += blocks_for(d->model, i, tokens) *
                 (2 * sizeof(void *) + BLOCK * (row_bytes(d->model, i, 0) + row_bytes(d->model, i, 1)));
    return bytes;
}

static dsv4_status allocate(struct dsv4_device *d, void *out_pointer, size_t bytes, dsv4_error *err) {
    void *memory;
    DSV4_TRY(dsv4_device_status(d, d->plugin->runtime.allocate(&memory, bytes ? bytes : 1), "memory for a session", err));
    memcpy(out_pointer, &memory, sizeof memory);
    return DSV4_OK;
}

static dsv4_status mirror_create(struct dsv4_mirror **out, struct dsv4_device *d, dsv4_error *err) {
    struct dsv4_mirror *k = calloc(1, sizeof *k);
    if (!k)
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for a session on the device");
    k->device = d;
    k->position = -1;
    dsv4_status status = allocate(d, &k->fixed, fixed_bytes(d), err);
    if (status != DSV4_OK) {
        destroy(k);
        return status;
    }
    *out = k;
    return DSV4_OK;
}

/* New tables with the old blocks and new ones from a slab; nothing changes on failure. */
struct growth {
    uint8_t **tables, **device_tables;
    uint8_t **slabs;
    size_t *at;
    uint8_t *slab;
    size_t pointers, slab_bytes;
};

static void measure(const struct dsv4_mirror *k, int32_t tokens, struct growth *g) {
    const dsv4_model *m = k->device->model;
    for (int32_t i = k->device->first_layer; i < k->device->end_layer; i++) {
        size_t n = blocks_for(m, i, tokens), old = k->at ? blocks_for(m, i, k->capacity) : 0;
        for (int index = 0; index < 2; index++) {
            if (g->at)
                g->at[2 * i + index] = g->pointers;
            g->pointers += n;
            g->slab_bytes += (n - old) * BLOCK * row_bytes(m, i, index);
        }
    }
}

static void fill_tables(const struct dsv4_mirror *k, int32_t tokens, struct growth *g) {
    const dsv4_model *m = k->device->model;
    uint8_t *next = g->slab;
    for (int32_t i = k->device->first_layer; i < k->device->end_layer; i++) {
        size_t n = blocks_for(m, i, tokens), old = k->at ? blocks_for(m, i, k->capacity) : 0;
        for (int index = 0; index < 2; index++) {
            uint8_t **to = g->tables + g->at[2 * i + index];
            if (old)
                memcpy(to, k->tables + k->at[2 * i + index], old * sizeof *to);
            for (size_t j = old; j < n; j++, next += BLOCK * row_bytes(m, i, index))
                to[j] = next;
        }
    }
}

static dsv4_status make_growth(struct dsv4_mirror *k, int32_t tokens, struct growth *g, dsv4_error *err) {
    struct dsv4_device *d = k->device;
    g->at = malloc(2 * (size_t)d->model->config.num_hidden_layers * sizeof *g->at);
    g->slabs = malloc(((size_t)k->n_slab + 1) * sizeof *g->slabs);
    if (g->at)
        measure(k, tokens, g);
    g->tables = malloc((g->pointers + 1) * sizeof *g->tables);
    if (!g->at || !g->slabs || !g->tables)
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for a session of %d tokens on the device", tokens);
    DSV4_TRY(allocate(d, &g->slab, g->slab_bytes, err));
    DSV4_TRY(allocate(d, &g->device_tables, g->pointers * sizeof *g->tables, err));
    fill_tables(k, tokens, g);
    return dsv4_device_status(d, d->plugin->runtime.upload(g->device_tables, g->tables, g->pointers * sizeof *g->tables,
                                                           d->stream), "the table of a session", err);
}

static dsv4_status grow(struct dsv4_mirror *k, int32_t tokens, dsv4_error *err) {
    const struct dsv4_cuda_runtime *rt = &k->device->plugin->runtime;
    int32_t limit = k->device->model->config.max_position_embeddings;
    struct growth g = {0};
    if (k->at && tokens <= k->capacity)
        return DSV4_OK;
    int32_t wanted = k->capacity > LEAST_TOKENS ? 2 * k->capacity : LEAST_TOKENS;
    wanted = wanted < limit ? wanted : limit;
    tokens = tokens > wanted ? tokens : wanted;
    dsv4_status status = make_growth(k, tokens, &g, err);
    if (status != DSV4_OK) {
        rt->release(g.slab);
        rt->release(g.device_tables);
        free(g.at);
        free(g.slabs);
        free(g.tables);
        return status;
    }
    if (k->n_slab)
        memcpy(g.slabs, k->slabs, (size_t)k->n_slab * sizeof *g.slabs);
    g.slabs[k->n_slab] = g.slab;
    rt->release(k->device_tables);
    free(k->slabs);
    free(k->tables);
    free(k->at);
    k->slabs = g.slabs;
    k->n_slab++;
    k->tables = g.tables;
    k->device_tables = g.device_tables;
    k->at = g.at;
    k->capacity = tokens;
    return DSV4_OK;
}

/* What happens to a stretch of rows: `there` on the device. */
typedef dsv4_status stretch_fn(struct dsv4_device *d, uint8_t *host, uint8_t *there, size_t bytes, dsv4_error *err);

static dsv4_status send_stretch(struct dsv4_device *d, uint8_t *host, uint8_t *there, size_t bytes, dsv4_error *err) {
    return dsv4_device_status(d, d->plugin->runtime.upload(there, host, bytes, d->stream), "rows of a session", err);
}

static dsv4_status want_stretch(struct dsv4_device *d, uint8_t *host, uint8_t *there, size_t bytes, dsv4_error *err) {
    (void)err;
    dsv4_staging_want(d, host, there, bytes);
    return DSV4_OK;
}

/* Rows [first, end) of a layer's store. */
static dsv4_status each_stretch(const struct dsv4_mirror *k, const struct dsv4_row_store *s, int32_t layer, int index,
                                int32_t first, int32_t end, stretch_fn *fn, dsv4_error *err) {
    int32_t together = 1 << s->shift; /* no more than BLOCK, and blocks begin at the same rows */
    for (int32_t r = first, n; r < end; r += n) {
        n = together - r % together < end - r ? together - r % together : end - r;
        uint8_t *there = k->tables[k->at[2 * layer + index] + (size_t)(r / BLOCK)] + (size_t)(r % BLOCK) * s->row_bytes;
        DSV4_TRY(fn(k->device, dsv4_row(s, r), there, (size_t)n * s->row_bytes, err));
    }
    return DSV4_OK;
}

/* The whole state as the host has it. */
static dsv4_status copy_state(struct dsv4_mirror *k, const struct dsv4_pass *p, const struct dsv4_piece *piece,
                              dsv4_error *err) {
    struct dsv4_device *d = k->device;
    const struct dsv4_kv *kv = piece->kv;
    const dsv4_model *m = d->model;
    DSV4_TRY(dsv4_device_status(d, d->plugin->runtime.upload(k->fixed, kv->fixed + fixed_first(d), fixed_bytes(d), d->stream),
                                "the state of a session", err));
    for (int32_t i = d->first_layer; i < d->end_layer; i++) {
        if (m->layers[i].kind == DSV4_SWA)
            continue;
        int32_t rows = piece->position / m->layers[i].compressor.ratio;
        dsv4_check_rows(p, &kv->layers[i].compressed, i, 0, rows);
        DSV4_TRY(each_stretch(k, &kv->layers[i].compressed, i, 0, 0, rows, send_stretch, err));
        if (m->layers[i].kind != DSV4_CSA)
            continue;
        dsv4_check_rows(p, &kv->layers[i].index, i, 0, rows);
        DSV4_TRY(each_stretch(k, &kv->layers[i].index, i, 1, 0, rows, send_stretch, err));
    }
    return DSV4_OK;
}

dsv4_status dsv4_mirror_ready(struct dsv4_device *d, const struct dsv4_pass *p, const struct dsv4_piece *piece,
                              dsv4_error *err) {
    struct dsv4_mirror *k = dsv4_mirror_of(d, piece);
    if (!k) {
        DSV4_TRY(mirror_create(&k, d, err));
        k->next = piece->kv->mirror;
        piece->kv->mirror = k;
    }
    DSV4_TRY(grow(k, piece->position + piece->n, err));
    if (k->position != piece->position)
        DSV4_TRY(copy_state(k, p, piece, err));
    k->position = -1; /* until the pass is done */
    return DSV4_OK;
}

void dsv4_mirror_state(const struct dsv4_mirror *k, int32_t layer, struct dsv4_cuda_state *out) {
    const struct dsv4_state_layout *s = &k->device->model->state[layer];
    *out = (struct dsv4_cuda_state){
        .window = fixed_at(k, s->window), .k = (float *)(void *)fixed_at(k, s->k),
        .gate = (float *)(void *)fixed_at(k, s->gate), .index_k = (float *)(void *)fixed_at(k, s->index_k),
        .index_gate = (float *)(void *)fixed_at(k, s->index_gate),
        .compressed = k->device_tables + k->at[2 * layer], .index = k->device_tables + k->at[2 * layer + 1],
    };
}

const uint8_t *dsv4_mirror_rows(const struct dsv4_device *d, const struct dsv4_piece *piece, int32_t layer, int index,
                                int32_t row, int32_t *n) {
    const struct dsv4_mirror *k = dsv4_mirror_of(d, piece);
    *n = BLOCK - row % BLOCK;
    return k->tables[k->at[2 * layer + index] + (size_t)(row / BLOCK)] + (size_t)(row % BLOCK) * row_bytes(d->model, layer, index);
}

/* The slots of the piece's tokens in the ring at `at` of the fixed state, in at most two runs. */
static void want_ring(struct dsv4_mirror *k, const struct dsv4_piece *piece, size_t at, int32_t slots, size_t row) {
    int32_t left = piece->n < slots ? piece->n : slots, slot = (piece->position + piece->n - left) % slots;
    while (left > 0) {
        int32_t run = left < slots - slot ? left : slots - slot;
        size_t from = at + (size_t)slot * row;
        dsv4_staging_want(k->device, piece->kv->fixed + from, fixed_at(k, from), (size_t)run * row);
        left -= run;
        slot = 0;
    }
}

void dsv4_mirror_want(struct dsv4_device *d, const struct dsv4_piece *piece) {
    const dsv4_model *m = d->model;
    const struct dsv4_kv *kv = piece->kv;
    struct dsv4_mirror *k = dsv4_mirror_of(d, piece);
    for (int32_t i = d->first_layer; i < d->end_layer; i++) {
        const struct dsv4_layer *l = &m->layers[i];
        const struct dsv4_state_layout *s = &m->state[i];
        size_t raw = dsv4_state_row_bytes(&l->compressor), index_raw = dsv4_state_row_bytes(&l->index_compressor);
        want_ring(k, piece, s->window, m->config.sliding_window, m->kv_row);
        if (l->kind == DSV4_SWA)
            continue;
        int32_t first = piece->position / l->compressor.ratio, end = (piece->position + piece->n) / l->compressor.ratio;
        want_ring(k, piece, s->k, s->rows, raw);
        want_ring(k, piece, s->gate, s->rows, raw);
        each_stretch(k, &kv->layers[i].compressed, i, 0, first, end, want_stretch, NULL);
        if (l->kind != DSV4_CSA)
            continue;
        want_ring(k, piece, s->index_k, s->rows, index_raw);
        want_ring(k, piece, s->index_gate, s->rows, index_raw);
        each_stretch(k, &kv->layers[i].index, i, 1, first, end, want_stretch, NULL);
    }
}
