/* SPDX-License-Identifier: Apache-2.0 */
#include "gen/session.h"

#include <stdlib.h>

#include "model/edit.h"

dsv4_status dsv4_session_of(dsv4_session **out, dsv4_model *model, struct dsv4_kv *kv, int32_t most_kept,
                            dsv4_error *err) {
    if (most_kept < 0 || most_kept > DSV4_MOST_KEPT)
        return dsv4_fail(err, DSV4_E_ARGUMENT, "kept states: got %d, wanted 0 to %d", most_kept, DSV4_MOST_KEPT);
    dsv4_session *s = calloc(1, sizeof *s);
    struct dsv4_kv **kept = calloc((size_t)most_kept + 1, sizeof(*kept));
    if (!s || !kept) {
        free(s);
        free(kept);
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for a session");
    }
    pthread_mutex_init(&s->lock, NULL);
    s->model = model;
    s->kv = dsv4_kv_retain(kv);
    s->kept = kept;
    s->most_kept = most_kept;
    atomic_fetch_add(&model->references, 1);
    *out = s;
    return DSV4_OK;
}

dsv4_status dsv4_session_create(dsv4_session **out, dsv4_model *model, int32_t most_kept, dsv4_error *err) {
    struct dsv4_kv *kv;
    DSV4_TRY(dsv4_kv_create(&kv, model, 0, model->config.num_hidden_layers, err));
    dsv4_status status = dsv4_session_of(out, model, kv, most_kept, err);
    dsv4_kv_release(kv);
    return status;
}

dsv4_status dsv4_session_create_layer(dsv4_session **out, dsv4_model *model, int32_t layer, dsv4_error *err) {
    struct dsv4_kv *kv;
    if (layer < 0 || layer >= model->config.num_hidden_layers)
        return dsv4_fail(err, DSV4_E_ARGUMENT, "layer: got %d, wanted one in [0, %d)", layer,
                         model->config.num_hidden_layers);
    DSV4_TRY(dsv4_kv_create(&kv, model, layer, layer + 1, err));
    dsv4_status status = dsv4_session_of(out, model, kv, 0, err);
    dsv4_kv_release(kv);
    return status;
}

static void forget(dsv4_session *s) {
    for (int32_t i = 0; i < s->n_kept; i++)
        dsv4_kv_release(s->kept[i]);
    s->n_kept = 0;
}

void dsv4_session_destroy(dsv4_session *s) {
    if (!s)
        return;
    pthread_mutex_lock(&s->lock);
    pthread_mutex_unlock(&s->lock);
    pthread_mutex_destroy(&s->lock);
    forget(s);
    free(s->kept);
    dsv4_kv_release(s->kv);
    dsv4_edit_release(s->edit);
    dsv4_model_destroy(s->model);
    free(s);
}

void dsv4_session_keep_locked(dsv4_session *s) {
    int32_t position = s->kv->position;
    if (!s->most_kept || position == 0 || (s->n_kept && s->kept[s->n_kept - 1]->position == position))
        return;
    if (s->n_kept == s->most_kept) {
        dsv4_kv_release(s->kept[0]);
        memmove(s->kept, s->kept + 1, (size_t)--s->n_kept * sizeof(*s->kept));
    }
    s->kept[s->n_kept++] = dsv4_kv_retain(s->kv);
}

/* The newest state at or before a position; NULL: only the beginning. */
static struct dsv4_kv *newest(const dsv4_session *s, int32_t position) {
    if (s->kv->position <= position)
        return s->kv;
    for (int32_t i = s->n_kept; i > 0; i--)
        if (s->kept[i - 1]->position <= position)
            return s->kept[i - 1];
    return NULL;
}

static dsv4_status fork_locked(dsv4_session **out, dsv4_session *s, int32_t at, int32_t most_kept, dsv4_error *err) {
    int32_t n = 0;
    if (at == DSV4_NOW)
        at = s->kv->position;
    if (most_kept == DSV4_AS_MANY)
        most_kept = s->most_kept;
    if (at < 0 || at > s->kv->position)
        return dsv4_fail(err, DSV4_E_ARGUMENT, "position: got %d, wanted 0 to %d, where the session is", at,
                         s->kv->position);
    struct dsv4_kv *kv = newest(s, at);
    DSV4_TRY(kv ? dsv4_session_of(out, s->model, kv, most_kept, err)
                : dsv4_session_create(out, s->model, most_kept, err));
    (*out)->edit = dsv4_edit_retain(s->edit);
    while (n < s->n_kept && s->kept[n]->position <= at)
        n++;
    for (int32_t i = n > most_kept ? n - most_kept : 0; i < n; i++)
        (*out)->kept[(*out)->n_kept++] = dsv4_kv_retain(s->kept[i]);
    return DSV4_OK;
}

dsv4_status dsv4_session_fork(dsv4_session **out, dsv4_session *s, int32_t at, int32_t most_kept, dsv4_error *err) {
    pthread_mutex_lock(&s->lock);
    dsv4_status status = fork_locked(out, s, at, most_kept, err);
    pthread_mutex_unlock(&s->lock);
    return status;
}

void dsv4_session_swap(dsv4_session *a, dsv4_session *b) {
    dsv4_session *first = a < b ? a : b, *second = a < b ? b : a;
    if (a == b)
        return;
    pthread_mutex_lock(&first->lock);
    pthread_mutex_lock(&second->lock);
    struct dsv4_kv *kv = a->kv, **kept = a->kept;
    int32_t n_kept = a->n_kept, most_kept = a->most_kept;
    a->kv = b->kv;
    a->kept = b->kept;
    a->n_kept = b->n_kept;
    a->most_kept = b->most_kept;
    b->kv = kv;
    b->kept = kept;
    b->n_kept = n_kept;
    b->most_kept = most_kept;
    pthread_mutex_unlock(&second->lock);
    pthread_mutex_unlock(&first->lock);
}

dsv4_status dsv4_session_edit(dsv4_session *s, dsv4_edit *edit, dsv4_error *err) {
    if (edit && dsv4_edit_model(edit) != s->model)
        return dsv4_fail(err, DSV4_E_ARGUMENT, "edit: got one of another model, wanted one of this model");
    dsv4_edit_retain(edit);
    pthread_mutex_lock(&s->lock);
    dsv4_edit *old = s->edit;
    s->edit = edit;
    pthread_mutex_unlock(&s->lock);
    dsv4_edit_release(old);
    return DSV4_OK;
}

int32_t dsv4_session_position(dsv4_session *s) {
    pthread_mutex_lock(&s->lock);
    int32_t position = s->kv->position;
    pthread_mutex_unlock(&s->lock);
    return position;
}

dsv4_status dsv4_session_tokens(dsv4_session *s, int32_t *out, int32_t first, int32_t n, dsv4_error *err) {
    dsv4_status status = DSV4_OK;
    pthread_mutex_lock(&s->lock);
    if (first < 0 || n < 0 || n > s->kv->position - first)
        status = dsv4_fail(err, DSV4_E_ARGUMENT, "tokens: got [%d, %lld), wanted a range within [0, %d)", first,
                           (long long)first + n, s->kv->position);
    else
        dsv4_kv_tokens(s->kv, out, first, n);
    pthread_mutex_unlock(&s->lock);
    return status;
}

void dsv4_session_bytes(dsv4_session *s, uint64_t *fixed, uint64_t *grown) {
    pthread_mutex_lock(&s->lock);
    *fixed = s->model->state_bytes;
    *grown = dsv4_kv_grown_bytes(s->kv);
    pthread_mutex_unlock(&s->lock);
}

static dsv4_status rows_locked(dsv4_session *s, int32_t layer, int32_t kind, uint16_t *out, int32_t first, int32_t n,
                               dsv4_error *err) {
    const dsv4_model *m = s->model;
    const struct dsv4_config *c = &m->config;
    if (layer < s->kv->first_layer || layer >= s->kv->end_layer)
        return dsv4_fail(err, DSV4_E_ARGUMENT, "layer: got %d, wanted one in [%d, %d)", layer, s->kv->first_layer,
                         s->kv->end_layer);
    const struct dsv4_layer *l = &m->layers[layer];
    const struct dsv4_kv_layer *kv = &s->kv->layers[layer];
    int32_t low = 0, high = 0;
    if (kind == DSV4_ROWS_WINDOW) {
        high = s->kv->position;
        low = high > c->sliding_window ? high - c->sliding_window : 0;
    } else if ((kind == DSV4_ROWS_COMPRESSED && l->kind != DSV4_SWA) || (kind == DSV4_ROWS_INDEX && l->kind == DSV4_CSA)) {
        high = s->kv->position / l->compressor.ratio;
    }
    if (first < low || n < 0 || n > high - first)
        return dsv4_fail(err, DSV4_E_ARGUMENT, "rows of layer %d: got [%d, %lld), wanted a range within [%d, %d)", layer,
                         first, (long long)first + n, low, high);
    const struct dsv4_row_store *store = kind == DSV4_ROWS_INDEX ? &kv->index : &kv->compressed;
    int32_t damaged = kind == DSV4_ROWS_WINDOW || !n ? -1 : dsv4_rows_damaged(store, first, first + n);
    if (damaged >= 0)
        return dsv4_rows_fault(DSV4_ROWS_DAMAGED, store, layer, damaged, err);
    for (int32_t i = first; i < first + n; i++) {
        if (kind == DSV4_ROWS_INDEX) {
            m->k.index_load(out + (ptrdiff_t)(i - first) * c->index_head_dim, dsv4_row(&kv->index, i), c->index_head_dim);
            continue;
        }
        const uint8_t *row = kind == DSV4_ROWS_COMPRESSED ? dsv4_row(&kv->compressed, i)
                                                          : kv->window + (size_t)(i % c->sliding_window) * m->kv_row;
        m->k.kv_load(out + (ptrdiff_t)(i - first) * c->head_dim, row, m->kv_format, c->head_dim, c->qk_rope_head_dim);
    }
    return DSV4_OK;
}

dsv4_status dsv4_session_rows(dsv4_session *s, int32_t layer, int32_t kind, uint16_t *out, int32_t first, int32_t n,
                              dsv4_error *err) {
    pthread_mutex_lock(&s->lock);
    dsv4_status status = rows_locked(s, layer, kind, out, first, n, err);
    pthread_mutex_unlock(&s->lock);
    return status;
}
