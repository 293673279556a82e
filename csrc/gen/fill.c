/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A session advanced without computing, for measuring decode at long contexts: a million tokens of state in seconds
 * instead of days.  Every byte is a hash of the seed, the layer, the kind of state and its place in it, so the state does
 * not depend on how it is reached; all values are finite and of ordinary size (KV rows within +-4, index rows of scales
 * around 1, raw compressor rows within +-1).  What such a session says means nothing.
 */
#include "gen/session.h"

enum { TOKEN = 0 }; /* what the session's tokens are said to be */

enum state_kind { WINDOW, RAW_K, RAW_GATE, RAW_INDEX_K, RAW_INDEX_GATE, COMPRESSED, INDEX };

/* A stream of hashed words: word i depends on key and i alone (SplitMix64). */
struct stream {
    uint64_t key, i;
};

static struct stream stream_of(uint64_t seed, int32_t layer, enum state_kind kind, uint64_t row) {
    return (struct stream){seed * 0xd1342543de82ef95u + ((uint64_t)layer << 48 | (uint64_t)kind << 40 | row), 0};
}

static inline uint64_t next(struct stream *s) {
    uint64_t z = s->key * 0x2545f4914f6cdd1du + ++s->i * 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* n bytes: hashed bits where `mask` has ones, plus `base`, per word of 8. */
static inline void put(uint8_t *to, size_t n, struct stream *s, uint64_t mask, uint64_t base) {
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        uint64_t word = (next(s) & mask) + base;
        memcpy(to + i, &word, 8);
    }
    if (i < n) {
        uint64_t word = (next(s) & mask) + base;
        memcpy(to + i, &word, n - i);
    }
}

static const uint64_t EVERY_BYTE = 0x0101010101010101u, EVERY_TWO = 0x0001000100010001u;

/* Codes without the lowest bit of the exponent, so none is NaN; scales 2^-9 ... 2^-6; bf16 of 0.5 up to 2. */
static void put_kv(uint8_t *row, const dsv4_model *m, struct stream s) {
    size_t rope = (size_t)m->config.qk_rope_head_dim, nope = (size_t)m->config.head_dim - rope;
    uint8_t *bf16 = row;
    size_t n = (size_t)m->config.head_dim;
    if (m->kv_format == DSV4_KV_FP8) {
        put(row, nope, &s, EVERY_BYTE * 0xf7, 0);
        put(row + nope + 2 * rope, nope / DSV4_KV_GROUP, &s, EVERY_BYTE * 3, EVERY_BYTE * 118);
        bf16 = row + nope;
        n = rope;
    }
    put(bf16, 2 * n, &s, EVERY_TWO * 0x80ff, EVERY_TWO * 0x3f00);
}

/* Any code; scales 1/2 or 1. */
static void put_index(uint8_t *row, const dsv4_model *m, struct stream s) {
    size_t n = (size_t)m->config.index_head_dim;
    put(row, n / 2, &s, ~(uint64_t)0, 0);
    put(row + n / 2, n / DSV4_INDEX_GROUP, &s, EVERY_BYTE, EVERY_BYTE * 126);
}

/* Rows of f32 in [-1, 1). */
static void put_raw(float *rows, size_t n, struct stream s) {
    for (size_t i = 0; i < n; i++)
        rows[i] = (float)(int32_t)(next(&s) >> 40) * 0x1p-23f - 1.0f;
}

static void fill_layer(struct dsv4_kv *kv, int32_t layer, int32_t from, int32_t to, uint64_t seed) {
    const dsv4_model *m = kv->model;
    const struct dsv4_layer *l = &m->layers[layer];
    struct dsv4_kv_layer *s = &kv->layers[layer];
    for (int32_t i = 0; i < m->config.sliding_window; i++)
        put_kv(s->window + (size_t)i * m->kv_row, m, stream_of(seed, layer, WINDOW, (uint64_t)i));
    if (l->kind == DSV4_SWA)
        return;
    size_t raw = (size_t)m->state[layer].rows * dsv4_state_row_bytes(&l->compressor) / sizeof(float);
    put_raw(s->k, raw, stream_of(seed, layer, RAW_K, 0));
    put_raw(s->gate, raw, stream_of(seed, layer, RAW_GATE, 0));
    for (int32_t i = from / l->compressor.ratio; i < to / l->compressor.ratio; i++)
        put_kv(dsv4_row(&s->compressed, i), m, stream_of(seed, layer, COMPRESSED, (uint64_t)i));
    if (l->kind != DSV4_CSA)
        return;
    raw = (size_t)m->state[layer].rows * dsv4_state_row_bytes(&l->index_compressor) / sizeof(float);
    put_raw(s->index_k, raw, stream_of(seed, layer, RAW_INDEX_K, 0));
    put_raw(s->index_gate, raw, stream_of(seed, layer, RAW_INDEX_GATE, 0));
    for (int32_t i = from / l->compressor.ratio; i < to / l->compressor.ratio; i++)
        put_index(dsv4_row(&s->index, i), m, stream_of(seed, layer, INDEX, (uint64_t)i));
}

static dsv4_status fill_locked(dsv4_session *s, int32_t position, uint64_t seed, dsv4_error *err) {
    int32_t most = s->model->config.max_position_embeddings, from = s->kv->position;
    if (position < from || position > most)
        return dsv4_fail(err, DSV4_E_ARGUMENT, "position: got %d, wanted one from where the session is, %d, to %d",
                         position, from, most);
    DSV4_TRY(dsv4_kv_own(&s->kv, err));
    DSV4_TRY(dsv4_kv_reserve(s->kv, position - from, err));
    if (position > from)
        for (int32_t i = s->kv->first_layer; i < s->kv->end_layer; i++)
            fill_layer(s->kv, i, from, position, seed);
    for (const int32_t token = TOKEN; s->kv->position < position;)
        dsv4_kv_commit(s->kv, &token, 1);
    return DSV4_OK;
}

dsv4_status dsv4_session_fill(dsv4_session *s, int32_t position, uint64_t seed, dsv4_error *err) {
    pthread_mutex_lock(&s->lock);
    dsv4_status status = fill_locked(s, position, seed, err);
    pthread_mutex_unlock(&s->lock);
    return status;
}
