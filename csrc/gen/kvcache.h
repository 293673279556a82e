/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The state of one timeline up to its position (SPEC 3.10): tokens and KV.  It is counted: sessions that are forks of
 * each other, and the points a session keeps to return to, share one until somebody writes (dsv4_kv_own).
 *
 * Fixed state, one allocation: per layer the window ring, row of position t at slot t mod sliding_window; for
 * compressed layers the compressor's raw rows k and gate of the last tokens, row of position t at slot t mod rows
 * (rows = 2 ratio where windows overlap, else ratio), so that closing a window moves nothing; the same for the index
 * compressor.  Grown state: tokens, compressed rows and index rows (gen/rows.h); entry i exists once position >=
 * (i + 1) ratio, rows beyond the position are free to be overwritten, so a step that fails has nothing to take back
 * there.
 */
#ifndef DSV4_KVCACHE_H
#define DSV4_KVCACHE_H

#include "gen/rows.h"
#include "model/model.h"

struct dsv4_kv_layer {
    uint8_t *window;              /* borrowed: into the fixed state, like the four below */
    float *k, *gate;
    float *index_k, *index_gate;
    struct dsv4_row_store compressed, index;
};

/* Raised with every change of what the fixed state or a row holds, or where: states of another version are refused. */
enum { DSV4_KV_LAYOUT_VERSION = 1 };

enum { DSV4_TOKENS_PER_ROW = 64 };

/*
 * Compressed rows lie in blocks of 16: every fork copies its last block of each layer, and with 64 rows of 584 bytes these
 * were up to a tenth of V4-Flash's fixed state.
 */
enum { DSV4_KV_BLOCK_SHIFT = 4 };

struct dsv4_kv {
    const dsv4_model *model; /* borrowed: the session holds the reference */
    atomic_int references;
    int32_t position;        /* tokens so far */
    uint8_t *fixed;          /* owned, model->state_bytes */
    uint8_t *undo;           /* owned: what a running step overwrote in the fixed state */
    size_t undo_capacity;
    struct dsv4_row_store tokens; /* rows of DSV4_TOKENS_PER_ROW int32 */
    struct dsv4_kv_layer *layers; /* owned, [layers] */
    _Atomic(struct dsv4_mirror *) mirror; /* owned: this state on the model's device (model/device_kv.c), or NULL */
    int32_t first_layer, end_layer; /* layers with state: all, or one for a layer run alone */
};

void dsv4_mirror_destroy(struct dsv4_mirror *k); /* NULL is legal */
/* The host's state has moved without it: to be copied again.  NULL is legal. */
void dsv4_mirror_forget(struct dsv4_mirror *k);

/* Fills model->state and model->state_bytes. */
dsv4_status dsv4_kv_layout(dsv4_model *m, dsv4_error *err);

/* At position 0, with one reference. */
dsv4_status dsv4_kv_create(struct dsv4_kv **out, const dsv4_model *m, int32_t first_layer, int32_t end_layer,
                           dsv4_error *err);
struct dsv4_kv *dsv4_kv_retain(struct dsv4_kv *kv);
void dsv4_kv_release(struct dsv4_kv *kv); /* NULL is legal */

/* Replaces *kv by a copy (fixed state copied, rows shared) unless this is the only reference. */
dsv4_status dsv4_kv_own(struct dsv4_kv **kv, dsv4_error *err);

/* Room to write the next n tokens and their rows, before any work; on failure what was there stays valid.  Owned kv. */
dsv4_status dsv4_kv_reserve(struct dsv4_kv *kv, int32_t n, dsv4_error *err);

/* Keeps what the next n tokens will overwrite in the fixed state; restore puts it back. */
dsv4_status dsv4_kv_save(struct dsv4_kv *kv, int32_t n, dsv4_error *err);
void dsv4_kv_restore(struct dsv4_kv *kv, int32_t n);
void dsv4_kv_forget_undo(struct dsv4_kv *kv); /* owned kv */

/* After a step: the tokens are part of the timeline.  Reserved before. */
void dsv4_kv_commit(struct dsv4_kv *kv, const int32_t *ids, int32_t n);

/* Copies tokens [first, first + n). */
void dsv4_kv_tokens(const struct dsv4_kv *kv, int32_t *out, int32_t first, int32_t n);

/* The error of a store of this layer: no memory, or the block that begins at `row` is damaged (names the file). */
dsv4_status dsv4_rows_fault(enum dsv4_rows_status status, const struct dsv4_row_store *s, int32_t layer, int32_t row,
                            dsv4_error *err);

uint64_t dsv4_kv_grown_bytes(const struct dsv4_kv *kv);

/* One raw row, k or gate, of a compressor in the fixed state. */
static inline size_t dsv4_state_row_bytes(const struct dsv4_compressor *p) {
    return (size_t)p->dim * (p->overlap ? 2 : 1) * sizeof(float);
}

#endif
