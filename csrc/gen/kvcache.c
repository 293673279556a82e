/* SPDX-License-Identifier: Apache-2.0 */
#include "gen/kvcache.h"

#include <stdlib.h>
#include <string.h>

#include "core/arena.h"

static size_t align64(size_t n) {
    return (n + 63) & ~(size_t)63;
}

dsv4_status dsv4_kv_layout(dsv4_model *m, dsv4_error *err) {
    const struct dsv4_config *c = &m->config;
    size_t at = 0;
    DSV4_TRY(dsv4_arena_take(m->arena, &m->state, (size_t)c->num_hidden_layers, sizeof *m->state, err));
    for (int32_t i = 0; i < c->num_hidden_layers; i++) {
        const struct dsv4_layer *l = &m->layers[i];
        struct dsv4_state_layout *s = &m->state[i];
        s->window = at;
        at = align64(at + (size_t)c->sliding_window * m->kv_row);
        if (l->kind == DSV4_SWA)
            continue;
        s->rows = l->compressor.ratio * (l->compressor.overlap ? 2 : 1);
        size_t bytes = align64((size_t)s->rows * dsv4_state_row_bytes(&l->compressor));
        s->k = at;
        s->gate = at + bytes;
        at += 2 * bytes;
        if (l->kind != DSV4_CSA)
            continue;
        bytes = align64((size_t)s->rows * dsv4_state_row_bytes(&l->index_compressor));
        s->index_k = at;
        s->index_gate = at + bytes;
        at += 2 * bytes;
    }
    m->state_bytes = at;
    return DSV4_OK;
}

dsv4_status dsv4_kv_create(struct dsv4_kv *kv, const dsv4_model *m, int32_t first_layer, int32_t end_layer,
                           dsv4_error *err) {
    size_t n = (size_t)m->config.num_hidden_layers;
    *kv = (struct dsv4_kv){.model = m, .first_layer = first_layer, .end_layer = end_layer};
    kv->layers = calloc(n, sizeof *kv->layers);
    kv->fixed = calloc(1, m->state_bytes + 64);
    if (!kv->layers || !kv->fixed) {
        dsv4_kv_destroy(kv);
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for a session's fixed state of %zu bytes", m->state_bytes);
    }
    for (size_t i = 0; i < n; i++) {
        const struct dsv4_state_layout *s = &m->state[i];
        struct dsv4_kv_layer *l = &kv->layers[i];
        l->window = kv->fixed + s->window;
        l->k = (float *)(void *)(kv->fixed + s->k);
        l->gate = (float *)(void *)(kv->fixed + s->gate);
        l->index_k = (float *)(void *)(kv->fixed + s->index_k);
        l->index_gate = (float *)(void *)(kv->fixed + s->index_gate);
        l->compressed.row_bytes = m->kv_row;
        l->index.row_bytes = m->index_row;
    }
    return DSV4_OK;
}

static void free_store(struct dsv4_row_store *s) {
    for (int32_t i = 0; i < s->n_block; i++)
        free(s->blocks[i]);
    free(s->blocks);
}

void dsv4_kv_destroy(struct dsv4_kv *kv) {
    for (int32_t i = 0; kv->layers && i < kv->model->config.num_hidden_layers; i++) {
        free_store(&kv->layers[i].compressed);
        free_store(&kv->layers[i].index);
    }
    free(kv->layers);
    free(kv->fixed);
    free(kv->undo);
    *kv = (struct dsv4_kv){0};
}

static int grow(struct dsv4_row_store *s, int32_t rows) {
    int32_t blocks = (rows + DSV4_ROWS_PER_BLOCK - 1) / DSV4_ROWS_PER_BLOCK;
    if (blocks > s->capacity) {
        int32_t capacity = blocks > 2 * s->capacity ? blocks : 2 * s->capacity;
        uint8_t **table = realloc(s->blocks, (size_t)capacity * sizeof(*table));
        if (!table)
            return 1;
        s->blocks = table;
        s->capacity = capacity;
    }
    for (; s->n_block < blocks; s->n_block++) {
        s->blocks[s->n_block] = calloc(DSV4_ROWS_PER_BLOCK, s->row_bytes);
        if (!s->blocks[s->n_block])
            return 1;
    }
    return 0;
}

dsv4_status dsv4_kv_reserve(struct dsv4_kv *kv, int32_t position, dsv4_error *err) {
    for (int32_t i = kv->first_layer; i < kv->end_layer; i++) {
        const struct dsv4_layer *l = &kv->model->layers[i];
        if (l->kind == DSV4_SWA)
            continue;
        int32_t rows = position / l->compressor.ratio;
        if (grow(&kv->layers[i].compressed, rows) || (l->kind == DSV4_CSA && grow(&kv->layers[i].index, rows)))
            return dsv4_fail(err, DSV4_E_MEMORY, "no memory for the compressed rows of %d positions", position);
    }
    return DSV4_OK;
}

/* Copies the slots of tokens [position, position + n) of one ring to or from `at`; returns the bytes it takes. */
static size_t copy_slots(uint8_t *at, uint8_t *ring, int32_t slots, size_t row, int32_t position, int32_t n, int restore) {
    int32_t count = n < slots ? n : slots;
    for (int32_t i = 0; at && i < count; i++) {
        uint8_t *slot = ring + (size_t)((position + i) % slots) * row, *kept = at + (size_t)i * row;
        memcpy(restore ? slot : kept, restore ? kept : slot, row);
    }
    return (size_t)count * row;
}

/* Walks every ring of the session; with undo == NULL it only counts. */
static size_t walk(struct dsv4_kv *kv, uint8_t *undo, int32_t position, int32_t n, int restore) {
    const dsv4_model *m = kv->model;
    size_t at = 0;
#define RING(ring, slots, row) \
    at += copy_slots(undo ? undo + at : NULL, (uint8_t *)(ring), slots, row, position, n, restore)
    for (int32_t i = kv->first_layer; i < kv->end_layer; i++) {
        const struct dsv4_layer *l = &m->layers[i];
        struct dsv4_kv_layer *s = &kv->layers[i];
        RING(s->window, m->config.sliding_window, m->kv_row);
        if (l->kind == DSV4_SWA)
            continue;
        RING(s->k, m->state[i].rows, dsv4_state_row_bytes(&l->compressor));
        RING(s->gate, m->state[i].rows, dsv4_state_row_bytes(&l->compressor));
        if (l->kind != DSV4_CSA)
            continue;
        RING(s->index_k, m->state[i].rows, dsv4_state_row_bytes(&l->index_compressor));
        RING(s->index_gate, m->state[i].rows, dsv4_state_row_bytes(&l->index_compressor));
    }
#undef RING
    return at;
}

dsv4_status dsv4_kv_save(struct dsv4_kv *kv, int32_t position, int32_t n, dsv4_error *err) {
    size_t bytes = walk(kv, NULL, position, n, 0);
    if (bytes > kv->undo_capacity) {
        uint8_t *undo = realloc(kv->undo, bytes);
        if (!undo)
            return dsv4_fail(err, DSV4_E_MEMORY, "no memory to keep %zu bytes of a session's state", bytes);
        kv->undo = undo;
        kv->undo_capacity = bytes;
    }
    walk(kv, kv->undo, position, n, 0);
    return DSV4_OK;
}

void dsv4_kv_restore(struct dsv4_kv *kv, int32_t position, int32_t n) {
    walk(kv, kv->undo, position, n, 1);
}

uint64_t dsv4_kv_grown_bytes(const struct dsv4_kv *kv) {
    uint64_t bytes = 0;
    for (int32_t i = 0; i < kv->model->config.num_hidden_layers; i++) {
        const struct dsv4_kv_layer *l = &kv->layers[i];
        bytes += (uint64_t)DSV4_ROWS_PER_BLOCK * ((uint64_t)l->compressed.n_block * l->compressed.row_bytes +
                                                  (uint64_t)l->index.n_block * l->index.row_bytes);
    }
    return bytes;
}
