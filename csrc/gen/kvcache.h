/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The KV state of one session (SPEC 3.10).
 *
 * Fixed state, one allocation: per layer the window ring, row of position t at slot t mod sliding_window; for
 * compressed layers the compressor's raw rows k and gate of the last tokens, row of position t at slot t mod rows
 * (rows = 2 ratio where windows overlap, else ratio), so that closing a window moves nothing; the same for the index
 * compressor.  Grown state: compressed rows and index rows in blocks; row i exists once position >= (i + 1) ratio, rows
 * beyond the position are free to be overwritten, so a step that fails has nothing to take back there.
 */
#ifndef DSV4_KVCACHE_H
#define DSV4_KVCACHE_H

#include "model/model.h"

enum { DSV4_ROWS_PER_BLOCK = 64 };

struct dsv4_row_store {
    uint8_t **blocks; /* owned, each DSV4_ROWS_PER_BLOCK rows */
    int32_t n_block, capacity;
    size_t row_bytes;
};

struct dsv4_kv_layer {
    uint8_t *window;              /* borrowed: into the fixed state, like the four below */
    float *k, *gate;
    float *index_k, *index_gate;
    struct dsv4_row_store compressed, index;
};

struct dsv4_kv {
    const dsv4_model *model; /* borrowed: the session holds the reference */
    uint8_t *fixed;          /* owned, model->state_bytes */
    uint8_t *undo;           /* owned: what a running step overwrote in the fixed state */
    size_t undo_capacity;
    struct dsv4_kv_layer *layers; /* owned, [layers] */
    int32_t first_layer, end_layer; /* layers with state: all, or one for a layer run alone */
};

/* Fills model->state and model->state_bytes. */
dsv4_status dsv4_kv_layout(dsv4_model *m, dsv4_error *err);

dsv4_status dsv4_kv_create(struct dsv4_kv *kv, const dsv4_model *m, int32_t first_layer, int32_t end_layer,
                           dsv4_error *err);
void dsv4_kv_destroy(struct dsv4_kv *kv);

/* Room for all rows up to `position`, before any work; on failure what was there stays valid. */
dsv4_status dsv4_kv_reserve(struct dsv4_kv *kv, int32_t position, dsv4_error *err);

/* Keeps what tokens [position, position + n) will overwrite in the fixed state; restore puts it back. */
dsv4_status dsv4_kv_save(struct dsv4_kv *kv, int32_t position, int32_t n, dsv4_error *err);
void dsv4_kv_restore(struct dsv4_kv *kv, int32_t position, int32_t n);

uint64_t dsv4_kv_grown_bytes(const struct dsv4_kv *kv);

/* One raw row, k or gate, of a compressor in the fixed state. */
static inline size_t dsv4_state_row_bytes(const struct dsv4_compressor *p) {
    return (size_t)p->dim * (p->overlap ? 2 : 1) * sizeof(float);
}

static inline uint8_t *dsv4_row(const struct dsv4_row_store *s, int32_t i) {
    return s->blocks[i / DSV4_ROWS_PER_BLOCK] + (size_t)(i % DSV4_ROWS_PER_BLOCK) * s->row_bytes;
}

#endif
