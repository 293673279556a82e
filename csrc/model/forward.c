/* SPDX-License-Identifier: Apache-2.0 */
/* The forward pass (SPEC A.1): embedding, layers, head.  There is no other. */
#include <limits.h>

#include "core/threads.h"
#include "model/call.h"
#include "model/device_experts.h"
#include "model/edit.h"
#include "model/part.h"
#include "model/sites.h"

/* Embedding rows into every stream, and cos and sin of every token for both tables. */
int dsv4_enter(dsv4_worker *w, struct dsv4_pass *p, int embed) {
    const struct dsv4_config *c = &p->m->config;
    struct dsv4_workspace *ws = p->ws;
    int32_t d = c->hidden_size, hc = c->hc_mult, n_pair = c->qk_rope_head_dim / 2;
    int64_t lo, hi;
    dsv4_share(w, p->n_tok, 1, &lo, &hi);
    for (int64_t t = lo; t < hi; t++) {
        p->m->k.rope_table(ws->cos_main + t * n_pair, ws->sin_main + t * n_pair, p->m->freq_main, n_pair,
                           p->positions[t]);
        p->m->k.rope_table(ws->cos_comp + t * n_pair, ws->sin_comp + t * n_pair, p->m->freq_compressed, n_pair,
                           p->positions[t]);
        if (!embed)
            continue;
        dsv4_bf16 *x = ws->streams + t * hc * d;
        size_t row = (size_t)p->ids[t] * (size_t)d;
        if (p->m->embed.format == DSV4_W_BF16) {
            memcpy(x, (const uint8_t *)p->m->embed.data + 2 * row, 2 * (size_t)d);
        } else {
            for (int32_t i = 0; i < d; i++) {
                float v;
                memcpy(&v, (const uint8_t *)p->m->embed.data + 4 * (row + (size_t)i), 4);
                x[i] = dsv4_f32_to_bf16(v);
            }
        }
        for (int32_t j = 1; j < hc; j++)
            memcpy(x + (ptrdiff_t)j * d, x, 2 * (size_t)d);
        if (dsv4_edited(p))
            dsv4_edit_token(p, DSV4_AT_STREAMS, -1, t, x);
    }
    DSV4_SYNC(w, p);
    return dsv4_edited(p) && p->calls ? dsv4_calls_ask(w, p, -1) : 0;
}

void dsv4_check_rows(const struct dsv4_pass *p, const struct dsv4_row_store *s, int32_t layer, int32_t first,
                     int32_t end) {
    int32_t row = dsv4_rows_damaged(s, first, end);
    int none = 0;
    if (row < 0 || !atomic_compare_exchange_strong(&p->damage->found, &none, 1))
        return;
    p->damage->store = s;
    p->damage->layer = layer;
    p->damage->row = row;
}

void dsv4_clock_start(struct dsv4_clock *clock) {
    *clock = (struct dsv4_clock){.last = dsv4_seconds()};
}

void dsv4_clock_add(struct dsv4_clock *clock, enum dsv4_phase phase) {
    double now = dsv4_seconds();
    clock->seconds[phase] += now - clock->last;
    clock->last = now;
}

/* Reports the first layer whose streams are not finite. */
static void diagnose(const dsv4_worker *w, struct dsv4_pass *p, int32_t layer) {
    int64_t size = (int64_t)p->m->config.hc_mult * p->m->config.hidden_size, lo, hi;
    dsv4_share(w, p->n_tok * size, 1, &lo, &hi);
    for (int64_t i = lo; i < hi; i++) {
        if ((p->ws->streams[i] & 0x7f80) != 0x7f80)
            continue;
        int seen = atomic_load(p->bad_layer);
        while (layer < seen && !atomic_compare_exchange_weak(p->bad_layer, &seen, layer))
            continue;
        return;
    }
}

static int layer(dsv4_worker *w, struct dsv4_pass *p, int32_t i) {
    if (dsv4_asked(p, i, DSV4_SITE_STREAMS_IN))
        dsv4_at_tokens(w, p, i, DSV4_SITE_STREAMS_IN);
    if (dsv4_collapse(w, p, i, 0) || dsv4_attention(w, p, i))
        return 1;
    if (dsv4_edited(p))
        dsv4_edit_columns(w, p, DSV4_AT_ATTENTION_OUT, i);
    if (dsv4_asked(p, i, DSV4_SITE_ATTENTION_OUT) && dsv4_at_columns(w, p, i, DSV4_SITE_ATTENTION_OUT))
        return 1;
    dsv4_spread(w, p);
    DSV4_SYNC(w, p);
    if (dsv4_asked(p, i, DSV4_SITE_STREAMS_MID))
        dsv4_at_tokens(w, p, i, DSV4_SITE_STREAMS_MID);
    if (dsv4_collapse(w, p, i, 1) || dsv4_moe(w, p, i))
        return 1;
    if (dsv4_edited(p))
        dsv4_edit_columns(w, p, DSV4_AT_FFN_OUT, i);
    if (dsv4_asked(p, i, DSV4_SITE_FFN_OUT) && dsv4_at_columns(w, p, i, DSV4_SITE_FFN_OUT))
        return 1;
    dsv4_spread(w, p);
    if (dsv4_edited(p))
        dsv4_edit_columns(w, p, DSV4_AT_STREAMS, i);
    DSV4_SYNC(w, p);
    if (dsv4_edited(p) && p->calls && dsv4_calls_ask(w, p, i))
        return 1;
    if (dsv4_asked(p, i, DSV4_SITE_STREAMS))
        dsv4_at_tokens(w, p, i, DSV4_SITE_STREAMS);
    if (p->diagnose)
        diagnose(w, p, i);
    return 0;
}

/* By the first worker; the others wait, and help with what is not on the device. */
static int forward_on_device(dsv4_worker *w, struct dsv4_pass *p) {
    if (w->id == 0) {
        p->stopped = 0;
        dsv4_device_layers(w, p, p->fault);
    }
    if (dsv4_beside_help(w, p))
        return 1;
    if (p->fault->code != DSV4_OK || atomic_load(&p->damage->found))
        return 1;
    return dsv4_head(w, p);
}

int dsv4_forward(dsv4_worker *w, struct dsv4_pass *p, int embed) {
    if (p->on_device)
        return forward_on_device(w, p);
    if (dsv4_enter(w, p, embed))
        return 1;
    for (int32_t i = p->first_layer; i < p->end_layer; i++)
        if (layer(w, p, i))
            return 1;
    return dsv4_head(w, p);
}
