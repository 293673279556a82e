/* SPDX-License-Identifier: Apache-2.0 */
#include "gen/session.h"

#include <stdlib.h>

dsv4_status dsv4_session_create(dsv4_session **out, dsv4_model *model, dsv4_error *err) {
    dsv4_session *s = calloc(1, sizeof *s);
    if (!s)
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for a session");
    dsv4_status status = dsv4_kv_create(&s->kv, model, 0, model->config.num_hidden_layers, err);
    if (status != DSV4_OK) {
        free(s);
        return status;
    }
    pthread_mutex_init(&s->lock, NULL);
    s->model = model;
    atomic_fetch_add(&model->references, 1);
    *out = s;
    return DSV4_OK;
}

void dsv4_session_destroy(dsv4_session *s) {
    if (!s)
        return;
    pthread_mutex_lock(&s->lock);
    pthread_mutex_unlock(&s->lock);
    pthread_mutex_destroy(&s->lock);
    dsv4_kv_destroy(&s->kv);
    free(s->tokens);
    dsv4_model_destroy(s->model);
    free(s);
}

int32_t dsv4_session_position(dsv4_session *s) {
    pthread_mutex_lock(&s->lock);
    int32_t position = s->position;
    pthread_mutex_unlock(&s->lock);
    return position;
}

dsv4_status dsv4_session_tokens(dsv4_session *s, int32_t *out, int32_t first, int32_t n, dsv4_error *err) {
    dsv4_status status = DSV4_OK;
    pthread_mutex_lock(&s->lock);
    if (first < 0 || n < 0 || n > s->position - first)
        status = dsv4_fail(err, DSV4_E_ARGUMENT, "tokens: got [%d, %lld), wanted a range within [0, %d)", first,
                           (long long)first + n, s->position);
    else if (n)
        memcpy(out, s->tokens + first, (size_t)n * sizeof *out);
    pthread_mutex_unlock(&s->lock);
    return status;
}

void dsv4_session_bytes(dsv4_session *s, uint64_t *fixed, uint64_t *grown) {
    pthread_mutex_lock(&s->lock);
    *fixed = s->model->state_bytes;
    *grown = dsv4_kv_grown_bytes(&s->kv);
    pthread_mutex_unlock(&s->lock);
}

static dsv4_status rows_locked(dsv4_session *s, int32_t layer, int32_t kind, uint16_t *out, int32_t first, int32_t n,
                               dsv4_error *err) {
    const dsv4_model *m = s->model;
    const struct dsv4_config *c = &m->config;
    if (layer < 0 || layer >= c->num_hidden_layers)
        return dsv4_fail(err, DSV4_E_ARGUMENT, "layer: got %d, wanted one in [0, %d)", layer, c->num_hidden_layers);
    const struct dsv4_layer *l = &m->layers[layer];
    const struct dsv4_kv_layer *kv = &s->kv.layers[layer];
    int32_t low = 0, high = 0;
    if (kind == DSV4_ROWS_WINDOW) {
        high = s->position;
        low = high > c->sliding_window ? high - c->sliding_window : 0;
    } else if ((kind == DSV4_ROWS_COMPRESSED && l->kind != DSV4_SWA) || (kind == DSV4_ROWS_INDEX && l->kind == DSV4_CSA)) {
        high = s->position / l->compressor.ratio;
    }
    if (first < low || n < 0 || n > high - first)
        return dsv4_fail(err, DSV4_E_ARGUMENT, "rows of layer %d: got [%d, %lld), wanted a range within [%d, %d)", layer,
                         first, (long long)first + n, low, high);
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

dsv4_status dsv4_session_reserve_tokens_locked(dsv4_session *s, int32_t n, dsv4_error *err) {
    if (n <= s->capacity - s->position)
        return DSV4_OK;
    int32_t wanted = s->position + n, capacity = wanted > 2 * s->capacity ? wanted : 2 * s->capacity;
    int32_t *tokens = realloc(s->tokens, (size_t)capacity * sizeof *tokens);
    if (!tokens)
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for %d token ids", capacity);
    s->tokens = tokens;
    s->capacity = capacity;
    return DSV4_OK;
}
