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

dsv4_status dsv4_kv_create(struct dsv4_kv **out, const dsv4_model *m, int32_t first_layer, int32_t end_layer,
                           dsv4_error *err) {
    size_t n = (size_t)m->config.num_hidden_layers;
    struct dsv4_kv *kv = calloc(1, sizeof *kv);
    if (!kv)
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for a session");
    *kv = (struct dsv4_kv){.model = m, .first_layer = first_layer, .end_layer = end_layer};
    atomic_init(&kv->references, 1);
    kv->tokens.row_bytes = DSV4_TOKENS_PER_ROW * sizeof(int32_t);
    kv->tokens.shift = DSV4_BLOCK_SHIFT;
    kv->layers = calloc(n, sizeof *kv->layers);
    kv->fixed = calloc(1, m->state_bytes + 64);
    if (!kv->layers || !kv->fixed) {
        dsv4_kv_release(kv);
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
        l->compressed.shift = DSV4_KV_BLOCK_SHIFT;
        l->index.row_bytes = m->index_row;
        l->index.shift = DSV4_BLOCK_SHIFT; /* kernels score blocks of 64 */
    }
    *out = kv;
    return DSV4_OK;
}

struct dsv4_kv *dsv4_kv_retain(struct dsv4_kv *kv) {
    atomic_fetch_add(&kv->references, 1);
    return kv;
}

void dsv4_kv_release(struct dsv4_kv *kv) {
    if (!kv || atomic_fetch_sub(&kv->references, 1) > 1)
        return;
    for (int32_t i = 0; kv->layers && i < kv->model->config.num_hidden_layers; i++) {
        dsv4_rows_release(&kv->layers[i].compressed);
        dsv4_rows_release(&kv->layers[i].index);
    }
    dsv4_rows_release(&kv->tokens);
    dsv4_mirror_destroy(kv->mirror);
    free(kv->layers);
    free(kv->fixed);
    free(kv->undo);
    free(kv);
}

static int32_t token_rows(int32_t n) {
    return (n + DSV4_TOKENS_PER_ROW - 1) / DSV4_TOKENS_PER_ROW;
}

static int share_rows(struct dsv4_kv *to, const struct dsv4_kv *from) {
    int failed = dsv4_rows_share(&to->tokens, &from->tokens, token_rows(from->position));
    for (int32_t i = from->first_layer; i < from->end_layer && !failed; i++) {
        const struct dsv4_layer *l = &from->model->layers[i];
        const struct dsv4_kv_layer *s = &from->layers[i];
        if (l->kind == DSV4_SWA)
            continue;
        int32_t rows = from->position / l->compressor.ratio;
        failed = dsv4_rows_share(&to->layers[i].compressed, &s->compressed, rows) ||
                 (l->kind == DSV4_CSA && dsv4_rows_share(&to->layers[i].index, &s->index, rows));
    }
    return failed;
}

dsv4_status dsv4_kv_own(struct dsv4_kv **kv, dsv4_error *err) {
    struct dsv4_kv *old = *kv, *copy;
    if (atomic_load(&old->references) == 1)
        return DSV4_OK;
    DSV4_TRY(dsv4_kv_create(&copy, old->model, old->first_layer, old->end_layer, err));
    memcpy(copy->fixed, old->fixed, old->model->state_bytes);
    copy->position = old->position;
    if (share_rows(copy, old)) {
        dsv4_kv_release(copy);
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory to share the rows of %d positions", old->position);
    }
    /* it follows the timeline that goes on first; others that share `old` may do so at the same time */
    copy->mirror = atomic_exchange(&old->mirror, NULL);
    dsv4_kv_release(old);
    *kv = copy;
    return DSV4_OK;
}

dsv4_status dsv4_rows_fault(enum dsv4_rows_status status, const struct dsv4_row_store *s, int32_t layer, int32_t row,
                            dsv4_error *err) {
    const char *file = status == DSV4_ROWS_DAMAGED ? dsv4_rows_file(s, row) : NULL;
    if (status == DSV4_ROWS_OK)
        return DSV4_OK;
    if (status == DSV4_ROWS_NO_MEMORY)
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for the rows of layer %d", layer);
    return dsv4_fail(err, DSV4_E_FORMAT, "%s: layer %d: the block of rows that begins at row %d differs from its checksum: "
                     "the file is damaged", file ? file : "a session's file", layer, row);
}

static dsv4_status reserve_rows(struct dsv4_row_store *s, int32_t layer, int32_t first, int32_t end, dsv4_error *err) {
    return dsv4_rows_fault(dsv4_rows_reserve(s, first, end), s, layer,
                           first / DSV4_ROWS_PER_BLOCK * DSV4_ROWS_PER_BLOCK, err);
}

dsv4_status dsv4_kv_reserve(struct dsv4_kv *kv, int32_t n, dsv4_error *err) {
    int32_t from = kv->position, to = from + n;
    if (dsv4_rows_reserve(&kv->tokens, from / DSV4_TOKENS_PER_ROW, token_rows(to)))
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for %d tokens", to);
    for (int32_t i = kv->first_layer; i < kv->end_layer; i++) {
        const struct dsv4_layer *l = &kv->model->layers[i];
        struct dsv4_kv_layer *s = &kv->layers[i];
        if (l->kind == DSV4_SWA)
            continue;
        int32_t first = from / l->compressor.ratio, end = to / l->compressor.ratio;
        DSV4_TRY(reserve_rows(&s->compressed, i, first, end, err));
        if (l->kind == DSV4_CSA)
            DSV4_TRY(reserve_rows(&s->index, i, first, end, err));
    }
    return DSV4_OK;
}

/* The next up to DSV4_TOKENS_PER_ROW tokens from `position` on that lie together, at most n. */
static int32_t *token_run(const struct dsv4_kv *kv, int32_t position, int32_t *n) {
    int32_t at = position % DSV4_TOKENS_PER_ROW, left = DSV4_TOKENS_PER_ROW - at;
    *n = *n < left ? *n : left;
    return (int32_t *)(void *)dsv4_row(&kv->tokens, position / DSV4_TOKENS_PER_ROW) + at;
}

void dsv4_kv_commit(struct dsv4_kv *kv, const int32_t *ids, int32_t n) {
    for (int32_t done = 0, run; done < n; done += run) {
        run = n - done;
        int32_t *to = token_run(kv, kv->position + done, &run);
        memcpy(to, ids + done, (size_t)run * sizeof *ids);
    }
    kv->position += n;
}

void dsv4_kv_tokens(const struct dsv4_kv *kv, int32_t *out, int32_t first, int32_t n) {
    for (int32_t done = 0, run; done < n; done += run) {
        run = n - done;
        const int32_t *from = token_run(kv, first + done, &run);
        memcpy(out + done, from, (size_t)run * sizeof *out);
    }
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

dsv4_status dsv4_kv_save(struct dsv4_kv *kv, int32_t n, dsv4_error *err) {
    size_t bytes = walk(kv, NULL, kv->position, n, 0);
    if (bytes > kv->undo_capacity) {
        uint8_t *undo = realloc(kv->undo, bytes);
        if (!undo)
            return dsv4_fail(err, DSV4_E_MEMORY, "no memory to keep %zu bytes of a session's state", bytes);
        kv->undo = undo;
        kv->undo_capacity = bytes;
    }
    walk(kv, kv->undo, kv->position, n, 0);
    return DSV4_OK;
}

void dsv4_kv_restore(struct dsv4_kv *kv, int32_t n) {
    walk(kv, kv->undo, kv->position, n, 1);
    dsv4_mirror_forget(kv->mirror);
}

void dsv4_kv_forget_undo(struct dsv4_kv *kv) {
    free(kv->undo);
    kv->undo = NULL;
    kv->undo_capacity = 0;
}

uint64_t dsv4_kv_grown_bytes(const struct dsv4_kv *kv) {
    uint64_t bytes = 0;
    for (int32_t i = kv->first_layer; i < kv->end_layer; i++)
        bytes += dsv4_rows_bytes(&kv->layers[i].compressed) + dsv4_rows_bytes(&kv->layers[i].index);
    return bytes;
}
