/* SPDX-License-Identifier: Apache-2.0 */
/* Operations of an edit: checked and laid out by layer, then applied to single tokens. */
#include "model/edit.h"

#include <stdlib.h>
#include <string.h>

#include "core/arena.h"

/* `place` of a position is its index among the operation's positions: which of n_row rows belongs to it. */
struct op {
    int32_t kind, site, n_row;
    int32_t n_range, n_id;
    int32_t *ranges; /* [n_range][3]: first, end, positions in the ranges before */
    int32_t *ids;    /* of one row or of n_row rows; entries: [n][2], first and end */
    float *values;
    int32_t per_row; /* streams that a row of values has, or 1 for all alike */
    uint32_t streams;
    void *function;
};

struct dsv4_edit {
    atomic_int references;
    const dsv4_model *model; /* borrowed: what uses the edit belongs to it */
    int32_t n_call;
    int32_t *first; /* [layers + 2]: operations of layer i are [first[i + 1], first[i + 2]), the embedding's i = -1 */
    struct op *ops;
    struct dsv4_arena *arena; /* owned: everything above and this */
};

/* ---------------------------------------------------------------------------------------------------------- creating */

static dsv4_status wrong(dsv4_error *err, int32_t i, const char *what, long long got, long long low, long long high) {
    return dsv4_fail(err, DSV4_E_ARGUMENT, "edit, operation %d: %s: got %lld, wanted %lld to %lld", i, what, got, low, high);
}

static dsv4_status check_ids(const struct dsv4_edit_op *o, int32_t i, const char *what, int32_t end, dsv4_error *err) {
    for (int32_t j = 0; j < o->n_id; j++)
        if (o->ids[j] < 0 || o->ids[j] >= end)
            return wrong(err, i, what, o->ids[j], 0, end - 1);
    return DSV4_OK;
}

static dsv4_status check_positions(const struct dsv4_edit_op *o, int32_t i, dsv4_error *err) {
    int64_t count = 0, before = 0;
    for (int32_t j = 0; j < o->n_range; j++) {
        int32_t first = o->positions[2 * j], end = o->positions[2 * j + 1];
        if (first < before || end <= first)
            return dsv4_fail(err, DSV4_E_ARGUMENT, "edit, operation %d: positions: got [%d, %d) after %lld, wanted ascending "
                             "ranges", i, first, end, (long long)before);
        count += end - first;
        before = end;
    }
    if (o->n_row < 1 || (o->n_row > 1 && o->n_row != count))
        return wrong(err, i, "rows", o->n_row, 1, count ? count : 1);
    return DSV4_OK;
}

static dsv4_status check_rows(const dsv4_model *m, const struct dsv4_edit_op *o, int32_t i, dsv4_error *err) {
    const struct dsv4_config *c = &m->config;
    int64_t d = c->hidden_size, width = d * o->n_row;
    int hc = o->site == DSV4_AT_STREAMS ? c->hc_mult : 1, chosen = 0;
    if (o->site < 0 || o->site >= DSV4_EDIT_SITES)
        return wrong(err, i, "site", o->site, 0, DSV4_EDIT_SITES - 1);
    if (o->layer < 0 && o->site != DSV4_AT_STREAMS)
        return wrong(err, i, "layer of a sublayer", o->layer, 0, c->num_hidden_layers - 1);
    if (o->n_id != 1 || o->ids[0] < 1 || o->ids[0] >= 1 << hc)
        return wrong(err, i, "streams", o->n_id == 1 ? o->ids[0] : 0, 1, (1 << hc) - 1);
    for (int s = 0; s < hc; s++)
        chosen += o->ids[0] >> s & 1;
    if (o->kind == DSV4_EDIT_CLAMP && (o->n_row != 1 || o->n_value != 2 * d))
        return wrong(err, i, "values", o->n_value, 2 * d, 2 * d);
    if (o->kind != DSV4_EDIT_CLAMP && o->n_value != width && o->n_value != chosen * width)
        return wrong(err, i, "values", o->n_value, width, chosen * width);
    return DSV4_OK;
}

static dsv4_status check_experts(const dsv4_model *m, const struct dsv4_edit_op *o, int32_t i, dsv4_error *err) {
    int32_t top_k = m->config.num_experts_per_tok;
    DSV4_TRY(check_ids(o, i, "expert", m->config.n_routed_experts, err));
    if (o->kind == DSV4_EDIT_EXPERTS_WEIGH && o->n_value != o->n_id)
        return wrong(err, i, "values", o->n_value, o->n_id, o->n_id);
    if (o->kind != DSV4_EDIT_EXPERTS_FORCE)
        return o->n_row == 1 ? DSV4_OK : wrong(err, i, "rows", o->n_row, 1, 1);
    if (o->n_id != (int64_t)o->n_row * top_k)
        return wrong(err, i, "experts", o->n_id, (int64_t)o->n_row * top_k, (int64_t)o->n_row * top_k);
    for (int32_t j = 0; j < o->n_id; j++)
        for (int32_t k = j / top_k * top_k; k < j; k++)
            if (o->ids[j] == o->ids[k])
                return dsv4_fail(err, DSV4_E_ARGUMENT, "edit, operation %d: got expert %d twice, wanted each once", i,
                                 o->ids[j]);
    return DSV4_OK;
}

static dsv4_status check_entries(const dsv4_model *m, const struct dsv4_edit_op *o, int32_t i, dsv4_error *err) {
    int32_t before = 0, kind = (int32_t)m->layers[o->layer].kind;
    if (kind == DSV4_SWA || (o->kind == DSV4_EDIT_ENTRIES_ON && kind != DSV4_CSA))
        return dsv4_fail(err, DSV4_E_ARGUMENT, "edit, operation %d: layer %d has no choice of compressed entries", i, o->layer);
    for (int32_t j = 0; j + 1 < o->n_id; j += 2) {
        if (o->ids[j] < before || o->ids[j + 1] <= o->ids[j])
            return dsv4_fail(err, DSV4_E_ARGUMENT, "edit, operation %d: entries: got [%d, %d) after %d, wanted ascending "
                             "ranges", i, o->ids[j], o->ids[j + 1], before);
        before = o->ids[j + 1];
    }
    return o->n_id % 2 || o->n_row != 1 ? wrong(err, i, "entries", o->n_id, 0, o->n_id - 1) : DSV4_OK;
}

static dsv4_status check_op(const dsv4_model *m, const struct dsv4_edit_op *o, int32_t i, dsv4_error *err) {
    const struct dsv4_config *c = &m->config;
    int streams = (o->kind == DSV4_EDIT_ADD || o->kind == DSV4_EDIT_SET || o->kind == DSV4_EDIT_CLAMP ||
                   o->kind == DSV4_EDIT_CALL);
    if (o->kind < 0 || o->kind >= DSV4_EDIT_KINDS)
        return wrong(err, i, "kind", o->kind, 0, DSV4_EDIT_KINDS - 1);
    if (o->layer < (streams ? -1 : 0) || o->layer >= c->num_hidden_layers)
        return wrong(err, i, "layer", o->layer, streams ? -1 : 0, c->num_hidden_layers - 1);
    if (o->n_range < 0 || o->n_id < 0 || o->n_value < 0)
        return wrong(err, i, "sizes", -1, 0, INT32_MAX);
    DSV4_TRY(check_positions(o, i, err));
    switch (o->kind) {
    case DSV4_EDIT_ADD:
    case DSV4_EDIT_SET:
    case DSV4_EDIT_CLAMP:
        return check_rows(m, o, i, err);
    case DSV4_EDIT_EXPERTS_OFF:
    case DSV4_EDIT_EXPERTS_WEIGH:
    case DSV4_EDIT_EXPERTS_FORCE:
        return check_experts(m, o, i, err);
    case DSV4_EDIT_HEADS_OFF:
    case DSV4_EDIT_SINKS_OFF:
        return check_ids(o, i, "head", c->num_attention_heads, err);
    case DSV4_EDIT_ENTRIES_OFF:
    case DSV4_EDIT_ENTRIES_ON:
        return check_entries(m, o, i, err);
    default:
        return DSV4_OK;
    }
}

/* memcpy(NULL, NULL, 0) is not defined. */
static void copy(void *to, const void *from, size_t bytes) {
    if (bytes)
        memcpy(to, from, bytes);
}

static dsv4_status fill(struct dsv4_edit *e, struct op *to, const struct dsv4_edit_op *o, dsv4_error *err) {
    int rows = o->kind == DSV4_EDIT_ADD || o->kind == DSV4_EDIT_SET || o->kind == DSV4_EDIT_CLAMP;
    *to = (struct op){.kind = o->kind, .site = o->site, .n_row = o->n_row, .n_range = o->n_range, .n_id = o->n_id,
                      .function = o->function, .per_row = 1};
    DSV4_TRY(dsv4_arena_take(e->arena, &to->ranges, 3 * (size_t)o->n_range, sizeof *to->ranges, err));
    DSV4_TRY(dsv4_arena_take(e->arena, &to->ids, (size_t)o->n_id, sizeof *to->ids, err));
    DSV4_TRY(dsv4_arena_take(e->arena, &to->values, (size_t)o->n_value, sizeof *to->values, err));
    int32_t before = 0;
    for (int32_t j = 0; j < o->n_range; j++) {
        to->ranges[3 * j] = o->positions[2 * j];
        to->ranges[3 * j + 1] = o->positions[2 * j + 1];
        to->ranges[3 * j + 2] = before;
        before += o->positions[2 * j + 1] - o->positions[2 * j]; /* disjoint: at most INT32_MAX in all */
    }
    copy(to->ids, o->ids, (size_t)o->n_id * sizeof *to->ids);
    copy(to->values, o->values, (size_t)o->n_value * sizeof *to->values);
    if (rows)
        to->streams = (uint32_t)o->ids[0];
    if (rows && o->kind != DSV4_EDIT_CLAMP)
        to->per_row = (int32_t)(o->n_value / e->model->config.hidden_size / o->n_row);
    return DSV4_OK;
}

/* Operations by layer, those of one layer in their order. */
static dsv4_status lay_out(struct dsv4_edit *e, const struct dsv4_edit_op *ops, int32_t n, dsv4_error *err) {
    int32_t layers = e->model->config.num_hidden_layers, at = 0;
    DSV4_TRY(dsv4_arena_take(e->arena, &e->first, (size_t)layers + 2, sizeof *e->first, err));
    DSV4_TRY(dsv4_arena_take(e->arena, &e->ops, (size_t)n, sizeof *e->ops, err));
    for (int32_t layer = -1; layer < layers; layer++) {
        e->first[layer + 1] = at;
        for (int32_t i = 0; i < n; i++)
            if (ops[i].layer == layer)
                DSV4_TRY(fill(e, &e->ops[at++], &ops[i], err));
    }
    e->first[layers + 1] = at;
    for (int32_t i = 0; i < n; i++)
        e->n_call += ops[i].kind == DSV4_EDIT_CALL;
    return DSV4_OK;
}

dsv4_status dsv4_edit_create(dsv4_edit **out, const dsv4_model *m, const struct dsv4_edit_op *ops, int32_t n,
                             dsv4_error *err) {
    struct dsv4_arena *arena;
    struct dsv4_edit *e;
    if (n < 1)
        return dsv4_fail(err, DSV4_E_ARGUMENT, "edit: got no operations, wanted at least one");
    for (int32_t i = 0; i < n; i++)
        DSV4_TRY(check_op(m, &ops[i], i, err));
    DSV4_TRY(dsv4_arena_create(&arena, err));
    dsv4_status status = dsv4_arena_take(arena, &e, 1, sizeof *e, err);
    if (status == DSV4_OK) {
        *e = (struct dsv4_edit){.model = m, .arena = arena};
        atomic_init(&e->references, 1);
        status = lay_out(e, ops, n, err);
    }
    if (status != DSV4_OK) {
        dsv4_arena_destroy(arena);
        return status;
    }
    *out = e;
    return DSV4_OK;
}

dsv4_edit *dsv4_edit_retain(dsv4_edit *e) {
    if (e)
        atomic_fetch_add(&e->references, 1);
    return e;
}

void dsv4_edit_release(dsv4_edit *e) {
    if (e && atomic_fetch_sub(&e->references, 1) == 1)
        dsv4_arena_destroy(e->arena);
}

int32_t dsv4_edit_calls(const dsv4_edit *e) {
    return e ? e->n_call : 0;
}

const dsv4_model *dsv4_edit_model(const dsv4_edit *e) {
    return e->model;
}

/* ---------------------------------------------------------------------------------------------------------- applying */

/* The operations of one layer for the session of token t. */
struct span {
    const struct op *at, *end;
};

static struct span operations(const struct dsv4_pass *p, int32_t layer, int64_t t) {
    const struct dsv4_edit *e = p->pieces[p->piece_of[t]].edit;
    if (!e)
        return (struct span){NULL, NULL};
    return (struct span){e->ops + e->first[layer + 1], e->ops + e->first[layer + 2]};
}

/* Which of the operation's positions this one is, or -1. */
static int64_t place(const struct op *o, int32_t position) {
    int32_t low = 0, high = o->n_range;
    if (!o->n_range)
        return 0;
    while (low < high) { /* the ranges that begin at or before it */
        int32_t middle = low + (high - low) / 2;
        if (o->ranges[3 * middle] <= position)
            low = middle + 1;
        else
            high = middle;
    }
    if (!low)
        return -1;
    const int32_t *r = o->ranges + 3 * (low - 1);
    return position < r[1] ? (int64_t)r[2] + position - r[0] : -1;
}

/* Columns [c0, c1) of the selected streams of one token; values are finite, rounding is to nearest. */
static void change_row(const struct op *o, int64_t row, dsv4_bf16 *x, ptrdiff_t d, int32_t c0, int32_t c1) {
    const float *v = o->values + (o->n_row > 1 ? row : 0) * o->per_row * d;
    for (int s = 0; o->streams >> s; s++) {
        dsv4_bf16 *to = x + s * d;
        if (!(o->streams >> s & 1))
            continue;
        for (int32_t c = c0; c < c1; c++) {
            float old = dsv4_bf16_to_f32(to[c]);
            if (o->kind == DSV4_EDIT_ADD)
                old += v[c];
            else if (o->kind == DSV4_EDIT_SET)
                old = v[c];
            else
                old = old < v[c] ? v[c] : old > v[d + c] ? v[d + c] : old;
            to[c] = dsv4_f32_to_bf16(old);
        }
        v += o->per_row > 1 ? d : 0;
    }
}

static void change_token(const struct dsv4_pass *p, enum dsv4_edit_site site, int32_t layer, int64_t t, dsv4_bf16 *x,
                         int32_t c0, int32_t c1) {
    struct span s = operations(p, layer, t);
    for (const struct op *o = s.at; o < s.end; o++) {
        if (o->kind > DSV4_EDIT_CLAMP || o->site != (int32_t)site)
            continue;
        int64_t row = place(o, p->positions[t]);
        if (row >= 0)
            change_row(o, row, x, p->m->config.hidden_size, c0, c1);
    }
}

void dsv4_edit_columns(const dsv4_worker *w, const struct dsv4_pass *p, enum dsv4_edit_site site, int32_t layer) {
    int32_t d = p->m->config.hidden_size, rows = site == DSV4_AT_STREAMS ? p->m->config.hc_mult : 1, c0, c1;
    dsv4_bf16 *x = site == DSV4_AT_STREAMS ? p->ws->streams : p->ws->y;
    dsv4_share_columns(w, p, &c0, &c1);
    for (int64_t t = 0; t < p->n_tok; t++)
        change_token(p, site, layer, t, x + t * rows * d, c0, c1);
}

void dsv4_edit_token(const struct dsv4_pass *p, enum dsv4_edit_site site, int32_t layer, int64_t t, dsv4_bf16 *x) {
    change_token(p, site, layer, t, x, 0, p->m->config.hidden_size);
}

int32_t dsv4_edit_count(const dsv4_edit *e, int32_t layer) {
    return e ? e->first[layer + 2] - e->first[layer + 1] : 0;
}

int dsv4_edit_asks(const struct dsv4_pass *p, int32_t layer, int64_t t, int32_t i, void **function) {
    const struct op *o = operations(p, layer, t).at + i;
    if (o->kind != DSV4_EDIT_CALL || place(o, p->positions[t]) < 0)
        return 0;
    if (function)
        *function = o->function;
    return 1;
}

/* ------------------------------------------------------------------------------------------------------------ router */

size_t dsv4_edit_scratch(const struct dsv4_config *c) {
    size_t experts = sizeof(float) * (size_t)c->n_routed_experts + sizeof(int32_t) * (size_t)c->num_experts_per_tok;
    size_t sinks = sizeof(float) * (size_t)c->num_attention_heads;
    return experts > sinks ? experts : sinks;
}

static int has(const int32_t *ids, int32_t n, int32_t id) {
    for (int32_t i = 0; i < n; i++)
        if (ids[i] == id)
            return 1;
    return 0;
}

static int is_off(struct span s, int32_t position, int32_t expert) {
    for (const struct op *o = s.at; o < s.end; o++)
        if (o->kind == DSV4_EDIT_EXPERTS_OFF && place(o, position) >= 0 && has(o->ids, o->n_id, expert))
            return 1;
    return 0;
}

/* The table of a hash layer names experts that are off: the best by score, of those neither off nor chosen yet, take
 * their places; the lower id among equals. */
static void replace(const struct dsv4_router_args *a, int32_t *chosen, struct span s, int32_t position) {
    for (int32_t j = 0; j < a->top_k; j++) {
        int32_t best = -1;
        if (!is_off(s, position, chosen[j]))
            continue;
        for (int32_t e = 0; e < a->n_exp; e++)
            if (!has(chosen, a->top_k, e) && !is_off(s, position, e) && (best < 0 || a->scores[e] > a->scores[best]))
                best = e;
        if (best >= 0)
            chosen[j] = best;
    }
}

void dsv4_edit_route(const struct dsv4_pass *p, int32_t layer, int64_t t, struct dsv4_router_args *a, void *scratch) {
    struct span s = operations(p, layer, t);
    int32_t position = p->positions[t], *chosen = scratch, off = 0;
    float *bias = (float *)(void *)(chosen + a->top_k);
    const int32_t *forced = NULL;
    for (const struct op *o = s.at; o < s.end; o++) {
        int64_t row = place(o, position);
        if (row >= 0 && o->kind == DSV4_EDIT_EXPERTS_FORCE)
            forced = o->ids + (o->n_row > 1 ? row : 0) * a->top_k;
        off |= row >= 0 && o->kind == DSV4_EDIT_EXPERTS_OFF;
    }
    if (forced) {
        a->forced = forced;
    } else if (off && a->forced) {
        memcpy(chosen, a->forced, (size_t)a->top_k * sizeof *chosen);
        p->m->k.router(a); /* for the scores */
        replace(a, chosen, s, position);
        a->forced = chosen;
    } else if (off) {
        for (int32_t e = 0; e < a->n_exp; e++)
            bias[e] = is_off(s, position, e) ? dsv4_f32_from_bits(0xff800000u) : a->bias ? a->bias[e] : 0.0f;
        a->bias = bias;
    }
    p->m->k.router(a);
    for (const struct op *o = s.at; o < s.end; o++) {
        if (o->kind != DSV4_EDIT_EXPERTS_WEIGH || place(o, position) < 0)
            continue;
        for (int32_t j = 0; j < a->top_k; j++)
            for (int32_t i = 0; i < o->n_id; i++)
                a->weights[j] *= o->ids[i] == a->ids[j] ? o->values[i] : 1.0f;
    }
}

/* --------------------------------------------------------------------------------------------------------- attention */

const float *dsv4_edit_sinks(const struct dsv4_pass *p, int32_t layer, int64_t t, const float *sink, void *scratch) {
    struct span s = operations(p, layer, t);
    float *changed = scratch;
    for (const struct op *o = s.at; o < s.end; o++) {
        if (o->kind != DSV4_EDIT_SINKS_OFF || place(o, p->positions[t]) < 0)
            continue;
        if (sink != changed)
            memcpy(changed, sink, (size_t)p->m->config.num_attention_heads * sizeof *changed);
        for (int32_t i = 0; i < o->n_id; i++)
            changed[o->ids[i]] = dsv4_f32_from_bits(0xff800000u);
        sink = changed;
    }
    return sink;
}

void dsv4_edit_heads(const struct dsv4_pass *p, int32_t layer, int64_t t, dsv4_bf16 *o, int32_t h0, int32_t h1) {
    struct span s = operations(p, layer, t);
    ptrdiff_t hd = p->m->config.head_dim;
    for (const struct op *e = s.at; e < s.end; e++) {
        if (e->kind != DSV4_EDIT_HEADS_OFF || place(e, p->positions[t]) < 0)
            continue;
        for (int32_t i = 0; i < e->n_id; i++)
            if (e->ids[i] >= h0 && e->ids[i] < h1)
                memset(o + (e->ids[i] - h0) * hd, 0, (size_t)hd * sizeof *o);
    }
}

static void set_scores(const struct op *o, float value, float *scores, int32_t first, int32_t end) {
    for (int32_t i = 0; i < o->n_id; i += 2) {
        int32_t low = o->ids[i] > first ? o->ids[i] : first, high = o->ids[i + 1] < end ? o->ids[i + 1] : end;
        for (int32_t e = low; e < high; e++)
            scores[e] = value;
    }
}

/* Masking comes last: a masked entry is never attended to. */
void dsv4_edit_scores(const struct dsv4_pass *p, int32_t layer, int64_t t, float *scores, int32_t first, int32_t end) {
    struct span s = operations(p, layer, t);
    for (const struct op *o = s.at; o < s.end; o++)
        if (o->kind == DSV4_EDIT_ENTRIES_ON && place(o, p->positions[t]) >= 0)
            set_scores(o, dsv4_f32_from_bits(0x7f800000u), scores, first, end);
    for (const struct op *o = s.at; o < s.end; o++)
        if (o->kind == DSV4_EDIT_ENTRIES_OFF && place(o, p->positions[t]) >= 0)
            set_scores(o, dsv4_f32_from_bits(0xff800000u), scores, first, end);
}

int32_t dsv4_edit_entries(const struct dsv4_pass *p, int32_t layer, int64_t t, int32_t *ids, int32_t n) {
    struct span s = operations(p, layer, t);
    for (const struct op *o = s.at; o < s.end; o++) {
        int32_t left = 0, range = 0;
        if (o->kind != DSV4_EDIT_ENTRIES_OFF || place(o, p->positions[t]) < 0)
            continue;
        for (int32_t i = 0; i < n; i++) {
            while (range < o->n_id && o->ids[range + 1] <= ids[i])
                range += 2;
            if (range == o->n_id || ids[i] < o->ids[range])
                ids[left++] = ids[i];
        }
        n = left;
    }
    return n;
}

void dsv4_edit_keys(const struct dsv4_pass *p, int32_t layer, int64_t t, const uint8_t **keys, int32_t n) {
    struct span s = operations(p, layer, t);
    for (const struct op *o = s.at; o < s.end; o++) {
        if (o->kind != DSV4_EDIT_ENTRIES_OFF || place(o, p->positions[t]) < 0)
            continue;
        for (int32_t i = 0; i < o->n_id; i += 2)
            for (int32_t e = o->ids[i]; e < o->ids[i + 1] && e < n; e++)
                keys[e] = NULL;
    }
}
