/* SPDX-License-Identifier: Apache-2.0 */
#include "model/call.h"

#include <errno.h>
#include <stdlib.h>

#include "core/threads.h"
#include "model/edit.h"

enum state { GOES_ON, ASKS, ENDED };

struct dsv4_calls {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    enum state state;
    /* what is asked: written by the first worker before it asks */
    const struct dsv4_pass *pass;
    const struct dsv4_piece *piece;
    int32_t op; /* of the piece's edit at this layer */
    struct dsv4_call call;
};

dsv4_status dsv4_calls_create(struct dsv4_calls **out, dsv4_error *err) {
    struct dsv4_calls *c = calloc(1, sizeof *c);
    if (!c)
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for calls");
    pthread_mutex_init(&c->lock, NULL);
    dsv4_condition_init(&c->changed);
    *out = c;
    return DSV4_OK;
}

void dsv4_calls_destroy(struct dsv4_calls *c) {
    if (!c)
        return;
    pthread_mutex_destroy(&c->lock);
    pthread_cond_destroy(&c->changed);
    free(c);
}

static void set_state(struct dsv4_calls *c, enum state state) {
    pthread_mutex_lock(&c->lock);
    c->state = state;
    pthread_cond_broadcast(&c->changed);
    pthread_mutex_unlock(&c->lock);
}

void dsv4_calls_begin(struct dsv4_calls *c) {
    set_state(c, GOES_ON);
}

void dsv4_calls_end(struct dsv4_calls *c) {
    set_state(c, ENDED);
}

/* Whether this operation asks about any token of the piece; how many, and for whom. */
static int selects(struct dsv4_calls *c) {
    c->call.n = 0;
    c->call.hc_mult = c->pass->m->config.hc_mult;
    c->call.hidden_size = c->pass->m->config.hidden_size;
    for (int32_t t = c->piece->first_tok; t < c->piece->first_tok + c->piece->n; t++)
        c->call.n += dsv4_edit_asks(c->pass, c->call.layer, t, c->op, &c->call.function);
    return c->call.n > 0;
}

static int any(const struct dsv4_pass *p, int32_t layer) {
    for (int32_t i = 0; i < p->n_piece; i++)
        for (int32_t j = 0; j < dsv4_edit_count(p->pieces[i].edit, layer); j++)
            for (int32_t t = p->pieces[i].first_tok; t < p->pieces[i].first_tok + p->pieces[i].n; t++)
                if (dsv4_edit_asks(p, layer, t, j, NULL))
                    return 1;
    return 0;
}

int dsv4_calls_ask(dsv4_worker *w, struct dsv4_pass *p, int32_t layer) {
    struct dsv4_calls *c = p->calls;
    if (!any(p, layer))
        return 0;
    for (int32_t i = 0; w->id == 0 && i < p->n_piece; i++) {
        c->pass = p;
        c->piece = &p->pieces[i];
        c->call.layer = layer;
        for (c->op = 0; c->op < dsv4_edit_count(c->piece->edit, layer) && !dsv4_cancelled(w); c->op++) {
            if (!selects(c))
                continue;
            set_state(c, ASKS);
            pthread_mutex_lock(&c->lock);
            while (c->state == ASKS)
                pthread_cond_wait(&c->changed, &c->lock);
            pthread_mutex_unlock(&c->lock);
        }
    }
    DSV4_SYNC(w, p);
    return 0;
}

int dsv4_calls_wait(struct dsv4_calls *c, int milliseconds) {
    const struct timespec end = dsv4_deadline(milliseconds);
    pthread_mutex_lock(&c->lock);
    int late = 0;
    while (c->state == GOES_ON && !late)
        late = pthread_cond_timedwait(&c->changed, &c->lock, &end) == ETIMEDOUT;
    int found = c->state == ASKS ? 2 : c->state == GOES_ON;
    pthread_mutex_unlock(&c->lock);
    return found;
}

static size_t width(const struct dsv4_calls *c) {
    return (size_t)c->pass->m->config.hc_mult * (size_t)c->pass->m->config.hidden_size;
}

void dsv4_calls_read(const struct dsv4_calls *c, struct dsv4_call *out, float *streams, int32_t *positions) {
    size_t n = width(c);
    if (out)
        *out = c->call;
    for (int32_t t = c->piece->first_tok; streams && t < c->piece->first_tok + c->piece->n; t++) {
        if (!dsv4_edit_asks(c->pass, c->call.layer, t, c->op, NULL))
            continue;
        for (size_t i = 0; i < n; i++)
            *streams++ = dsv4_bf16_to_f32(c->pass->ws->streams[(size_t)t * n + i]);
        *positions++ = c->pass->positions[t];
    }
}

void dsv4_calls_answer(struct dsv4_calls *c, const float *streams) {
    size_t n = width(c);
    for (int32_t t = c->piece->first_tok; streams && t < c->piece->first_tok + c->piece->n; t++) {
        if (!dsv4_edit_asks(c->pass, c->call.layer, t, c->op, NULL))
            continue;
        for (size_t i = 0; i < n; i++)
            c->pass->ws->streams[(size_t)t * n + i] = dsv4_f32_to_bf16(*streams++);
    }
    set_state(c, GOES_ON);
}
