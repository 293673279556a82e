/* SPDX-License-Identifier: Apache-2.0 */
/*
 * States out of and into the engine (dsv4.h, "saved state").  What comes from a file was checked by the reader of the
 * format; here every number is compared again with the model and with the size of the file before a pointer exists.
 */
#include <stdlib.h>

#include "core/crc32c.h"
#include "gen/session.h"

_Static_assert((int)DSV4_STATE_BLOCK == (int)DSV4_ROWS_PER_BLOCK, "blocks of a file are the pieces that rows.h maps");
_Static_assert(DSV4_STATE_PARTS << DSV4_KV_BLOCK_SHIFT == DSV4_STATE_BLOCK, "and so many blocks in memory");

int32_t dsv4_model_stores(const dsv4_model *m, int32_t position, struct dsv4_store *out) {
    int32_t n = 0;
    for (int32_t i = 0; i < m->config.num_hidden_layers; i++) {
        const struct dsv4_layer *l = &m->layers[i];
        int32_t rows = l->kind == DSV4_SWA ? 0 : position / l->compressor.ratio;
        if (rows > 0)
            out[n++] = (struct dsv4_store){i, DSV4_ROWS_COMPRESSED, rows, (int32_t)m->kv_row};
        if (rows > 0 && l->kind == DSV4_CSA)
            out[n++] = (struct dsv4_store){i, DSV4_ROWS_INDEX, rows, (int32_t)m->index_row};
    }
    return n;
}

uint64_t dsv4_model_state_bytes(const dsv4_model *m) {
    return m->state_bytes;
}

void dsv4_state_versions(int32_t *layout, int32_t *numerics) {
    *layout = DSV4_KV_LAYOUT_VERSION;
    *numerics = DSV4_NUMERICS_VERSION;
}

uint32_t dsv4_checksum(uint32_t crc, const void *data, size_t nbytes) {
    return dsv4_crc32c(crc, data, nbytes);
}

const uint8_t *dsv4_session_fixed(dsv4_session *s, uint64_t *nbytes) {
    pthread_mutex_lock(&s->lock);
    const uint8_t *fixed = s->kv->fixed;
    *nbytes = s->model->state_bytes;
    pthread_mutex_unlock(&s->lock);
    return fixed;
}

static struct dsv4_row_store *store_of(struct dsv4_kv *kv, int32_t layer, int32_t kind) {
    return kind == DSV4_ROWS_INDEX ? &kv->layers[layer].index : &kv->layers[layer].compressed;
}

static int32_t rows_of(const struct dsv4_kv *kv, int32_t layer, int32_t kind) {
    const struct dsv4_layer *l = &kv->model->layers[layer];
    int has = kind == DSV4_ROWS_INDEX ? l->kind == DSV4_CSA : kind == DSV4_ROWS_COMPRESSED && l->kind != DSV4_SWA;
    return has ? kv->position / l->compressor.ratio : 0;
}

/* Rows [row, end) of one block of a file: where they lie, and their checksum. */
static uint32_t add_parts(const struct dsv4_row_store *store, int32_t row, int32_t end, const uint8_t **data,
                          uint64_t *nbytes, int32_t *n_part) {
    uint32_t crc = 0;
    for (int32_t next, before = *n_part; row < end; row = next) {
        next = ((row >> store->shift) + 1) << store->shift;
        next = next < end ? next : end;
        const uint8_t *rows = dsv4_row(store, row);
        uint64_t bytes = (uint64_t)(next - row) * store->row_bytes;
        crc = dsv4_crc32c(crc, rows, (size_t)bytes);
        if (*n_part > before && data[*n_part - 1] + nbytes[*n_part - 1] == rows) {
            nbytes[*n_part - 1] += bytes;
            continue;
        }
        data[*n_part] = rows;
        nbytes[(*n_part)++] = bytes;
    }
    return crc;
}

static dsv4_status blocks_locked(dsv4_session *s, int32_t layer, int32_t kind, const uint8_t **data, uint64_t *nbytes,
                                 int32_t *n_part, uint32_t *crcs, int32_t first, int32_t n, dsv4_error *err) {
    if (layer < s->kv->first_layer || layer >= s->kv->end_layer)
        return dsv4_fail(err, DSV4_E_ARGUMENT, "layer: got %d, wanted one in [%d, %d)", layer, s->kv->first_layer,
                         s->kv->end_layer);
    int32_t rows = rows_of(s->kv, layer, kind), blocks = (rows + DSV4_STATE_BLOCK - 1) / DSV4_STATE_BLOCK;
    if (first < 0 || n < 0 || n > blocks - first)
        return dsv4_fail(err, DSV4_E_ARGUMENT, "blocks of layer %d: got [%d, %lld), wanted a range within [0, %d)", layer,
                         first, (long long)first + n, blocks);
    const struct dsv4_row_store *store = store_of(s->kv, layer, kind);
    *n_part = 0;
    for (int32_t i = 0; i < n; i++) {
        int32_t row = (first + i) * DSV4_STATE_BLOCK, end = rows < row + DSV4_STATE_BLOCK ? rows : row + DSV4_STATE_BLOCK;
        if (dsv4_rows_damaged(store, row, end) >= 0)
            return dsv4_rows_fault(DSV4_ROWS_DAMAGED, store, layer, row, err);
        crcs[i] = add_parts(store, row, end, data, nbytes, n_part);
    }
    return DSV4_OK;
}

dsv4_status dsv4_session_blocks(dsv4_session *s, int32_t layer, int32_t kind, const uint8_t **data, uint64_t *nbytes,
                                int32_t *n_part, uint32_t *crcs, int32_t first, int32_t n, dsv4_error *err) {
    pthread_mutex_lock(&s->lock);
    dsv4_status status = blocks_locked(s, layer, kind, data, nbytes, n_part, crcs, first, n, err);
    pthread_mutex_unlock(&s->lock);
    return status;
}

/* -------------------------------------------------------------------------------------------------------------- load */

static int same_store(const struct dsv4_store *a, const struct dsv4_store *b) {
    return a->layer == b->layer && a->kind == b->kind && a->rows == b->rows && a->row_bytes == b->row_bytes;
}

static dsv4_status check_numbers(const dsv4_model *m, const struct dsv4_saved_state *f, dsv4_error *err) {
    const struct dsv4_config *c = &m->config;
    const char *path = f->file.path;
    if (f->position < 0 || f->position > c->max_position_embeddings)
        return dsv4_fail(err, DSV4_E_FORMAT, "%s: got position %d, wanted 0 to %d", path, f->position,
                         c->max_position_embeddings);
    if (f->fixed_bytes != m->state_bytes)
        return dsv4_fail(err, DSV4_E_FORMAT, "%s: got a fixed state of %llu bytes, wanted %zu", path,
                         (unsigned long long)f->fixed_bytes, m->state_bytes);
    for (int32_t i = 0; i < f->position; i++)
        if (f->ids[i] < 0 || f->ids[i] >= c->vocab_size)
            return dsv4_fail(err, DSV4_E_FORMAT, "%s: token %d: got id %d, wanted one in [0, %d)", path, i, f->ids[i],
                             c->vocab_size);
    for (int32_t i = 0; i < f->n_rows; i++) {
        const struct dsv4_saved_rows *r = &f->rows[i];
        uint64_t bytes = (uint64_t)r->store.rows * (uint64_t)r->store.row_bytes;
        if (r->offset % 64 || r->offset > f->file.size || bytes > f->file.size - r->offset)
            return dsv4_fail(err, DSV4_E_FORMAT, "%s: layer %d: got %llu bytes of rows at byte %llu, wanted them inside "
                             "the file's %llu bytes, at a multiple of 64", path, r->store.layer, (unsigned long long)bytes,
                             (unsigned long long)r->offset, (unsigned long long)f->file.size);
        if (r->n_crc != (r->store.rows + DSV4_STATE_BLOCK - 1) / DSV4_STATE_BLOCK)
            return dsv4_fail(err, DSV4_E_FORMAT, "%s: layer %d: got %d checksums, wanted one for each block of %d rows",
                             path, r->store.layer, r->n_crc, r->store.rows);
    }
    return DSV4_OK;
}

static dsv4_status check_stores(const dsv4_model *m, const struct dsv4_saved_state *f, dsv4_error *err) {
    struct dsv4_store *wanted = calloc(2 * (size_t)m->config.num_hidden_layers, sizeof *wanted);
    if (!wanted)
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for the table of a state");
    int32_t n = dsv4_model_stores(m, f->position, wanted);
    int same = n == f->n_rows;
    for (int32_t i = 0; i < n && same; i++)
        same = same_store(&wanted[i], &f->rows[i].store);
    free(wanted);
    return same ? DSV4_OK : dsv4_fail(err, DSV4_E_FORMAT, "%s: its rows are not those of position %d of this model",
                                      f->file.path, f->position);
}

static dsv4_status fill(struct dsv4_kv *kv, const struct dsv4_saved_state *f, dsv4_error *err) {
    struct dsv4_mapping *file;
    dsv4_status status = DSV4_OK;
    if (dsv4_rows_reserve(&kv->tokens, 0, (f->position + DSV4_TOKENS_PER_ROW - 1) / DSV4_TOKENS_PER_ROW))
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for %d tokens", f->position);
    DSV4_TRY(dsv4_mapping_create(&file, &f->file, f->use_mmap, err));
    for (int32_t i = 0; i < f->n_rows && status == DSV4_OK; i++) {
        const struct dsv4_saved_rows *r = &f->rows[i];
        struct dsv4_row_store *store = store_of(kv, r->store.layer, r->store.kind);
        enum dsv4_rows_status mapped = dsv4_rows_map(store, file, r->offset, r->crcs, r->store.rows);
        if (mapped == DSV4_ROWS_DAMAGED) /* the shorter block at the end, which is not there yet */
            status = dsv4_fail(err, DSV4_E_FORMAT, "%s: layer %d: the block of rows that begins at row %d differs from its "
                               "checksum: the file is damaged", f->file.path, r->store.layer,
                               r->store.rows / DSV4_STATE_BLOCK * DSV4_STATE_BLOCK);
        else
            status = dsv4_rows_fault(mapped, store, r->store.layer, 0, err);
    }
    dsv4_mapping_release(file);
    if (status != DSV4_OK)
        return status;
    dsv4_kv_commit(kv, f->ids, f->position);
    memcpy(kv->fixed, f->fixed, f->fixed_bytes);
    return DSV4_OK;
}

dsv4_status dsv4_session_load(dsv4_session **out, dsv4_model *m, int32_t most_kept, const struct dsv4_saved_state *f,
                              dsv4_error *err) {
    struct dsv4_kv *kv;
    DSV4_TRY(check_numbers(m, f, err));
    DSV4_TRY(check_stores(m, f, err));
    DSV4_TRY(dsv4_kv_create(&kv, m, 0, m->config.num_hidden_layers, err));
    dsv4_status status = fill(kv, f, err);
    if (status == DSV4_OK)
        status = dsv4_session_of(out, m, kv, most_kept, err);
    dsv4_kv_release(kv);
    return status;
}
