/* SPDX-License-Identifier: Apache-2.0 */
/* What may be copied out of a pass, and the copying. */
#include "model/sites.h"

#include <math.h>
#include <string.h>

const char *const dsv4_value_names[DSV4_VALUES] = {
    [DSV4_V_STREAMS_IN] = "streams_in", [DSV4_V_STREAMS_MID] = "streams_mid", [DSV4_V_STREAMS] = "streams",
    [DSV4_V_ATTENTION_PRE] = "attention_pre", [DSV4_V_ATTENTION_POST] = "attention_post",
    [DSV4_V_ATTENTION_COMB] = "attention_comb", [DSV4_V_FFN_PRE] = "ffn_pre", [DSV4_V_FFN_POST] = "ffn_post",
    [DSV4_V_FFN_COMB] = "ffn_comb", [DSV4_V_ATTENTION_IN] = "attention_in",
    [DSV4_V_ATTENTION_OUT] = "attention_out", [DSV4_V_FFN_IN] = "ffn_in", [DSV4_V_FFN_OUT] = "ffn_out",
    [DSV4_V_KV] = "kv", [DSV4_V_KV_COMPRESSED] = "kv_compressed", [DSV4_V_KV_INDEX] = "kv_index",
    [DSV4_V_INDEX_SCORES] = "index_scores", [DSV4_V_INDEX_SELECTED] = "index_selected",
    [DSV4_V_ATTENTION_WEIGHTS] = "attention_weights", [DSV4_V_HEADS] = "heads", [DSV4_V_EXPERTS] = "experts",
    [DSV4_V_EXPERT_WEIGHTS] = "expert_weights", [DSV4_V_ROUTER_SCORES] = "router_scores",
};

/* Where each is seen. */
static const uint8_t site_of[DSV4_VALUES] = {
    [DSV4_V_STREAMS_IN] = DSV4_SITE_STREAMS_IN, [DSV4_V_STREAMS_MID] = DSV4_SITE_STREAMS_MID,
    [DSV4_V_STREAMS] = DSV4_SITE_STREAMS, [DSV4_V_ATTENTION_PRE] = DSV4_SITE_ATTENTION_MIX,
    [DSV4_V_ATTENTION_POST] = DSV4_SITE_ATTENTION_MIX, [DSV4_V_ATTENTION_COMB] = DSV4_SITE_ATTENTION_MIX,
    [DSV4_V_FFN_PRE] = DSV4_SITE_FFN_MIX, [DSV4_V_FFN_POST] = DSV4_SITE_FFN_MIX, [DSV4_V_FFN_COMB] = DSV4_SITE_FFN_MIX,
    [DSV4_V_ATTENTION_IN] = DSV4_SITE_ATTENTION_IN, [DSV4_V_ATTENTION_OUT] = DSV4_SITE_ATTENTION_OUT,
    [DSV4_V_FFN_IN] = DSV4_SITE_FFN_IN, [DSV4_V_FFN_OUT] = DSV4_SITE_FFN_OUT, [DSV4_V_KV] = DSV4_SITE_KV,
    [DSV4_V_KV_COMPRESSED] = DSV4_SITE_KV, [DSV4_V_KV_INDEX] = DSV4_SITE_KV,
    [DSV4_V_INDEX_SCORES] = DSV4_SITE_INDEX_SCORES, [DSV4_V_INDEX_SELECTED] = DSV4_SITE_INDEX_SELECTED,
    [DSV4_V_ATTENTION_WEIGHTS] = DSV4_SITE_KEYS, [DSV4_V_HEADS] = DSV4_SITE_HEADS, [DSV4_V_EXPERTS] = DSV4_SITE_ROUTER,
    [DSV4_V_EXPERT_WEIGHTS] = DSV4_SITE_ROUTER, [DSV4_V_ROUTER_SCORES] = DSV4_SITE_ROUTER,
};

enum dsv4_site dsv4_site_of(int32_t value) {
    return site_of[value];
}

/* Sites whose values every worker makes for itself in a pass of one token: the first one's are copied. */
static const uint32_t private_sites = 1u << DSV4_SITE_ATTENTION_MIX | 1u << DSV4_SITE_ATTENTION_IN |
                                      1u << DSV4_SITE_KV | 1u << DSV4_SITE_FFN_MIX | 1u << DSV4_SITE_FFN_IN |
                                      1u << DSV4_SITE_ROUTER;

/* ----------------------------------------------------------------------------------------------------------- shapes */

static struct dsv4_value_shape vector(int64_t n) {
    return (struct dsv4_value_shape){.rank = 1, .dims = {n}};
}

static struct dsv4_value_shape matrix(int64_t rows, int64_t cols) {
    return (struct dsv4_value_shape){.rank = 2, .dims = {rows, cols}};
}

int dsv4_model_value(const dsv4_model *m, int32_t layer, int32_t value, struct dsv4_value_shape *out) {
    const struct dsv4_config *c = &m->config;
    if (layer < 0 || layer >= c->num_hidden_layers)
        return 0;
    const enum dsv4_layer_kind kind = m->layers[layer].kind;
    switch (value) {
    case DSV4_V_STREAMS_IN:
    case DSV4_V_STREAMS_MID:
    case DSV4_V_STREAMS:
        *out = matrix(c->hc_mult, c->hidden_size);
        return 1;
    case DSV4_V_ATTENTION_PRE:
    case DSV4_V_ATTENTION_POST:
    case DSV4_V_FFN_PRE:
    case DSV4_V_FFN_POST:
        *out = vector(c->hc_mult);
        return 1;
    case DSV4_V_ATTENTION_COMB:
    case DSV4_V_FFN_COMB:
        *out = matrix(c->hc_mult, c->hc_mult);
        return 1;
    case DSV4_V_ATTENTION_IN:
    case DSV4_V_ATTENTION_OUT:
    case DSV4_V_FFN_IN:
    case DSV4_V_FFN_OUT:
        *out = vector(c->hidden_size);
        return 1;
    case DSV4_V_KV:
        *out = vector(c->head_dim);
        return 1;
    case DSV4_V_KV_COMPRESSED:
        *out = vector(c->head_dim);
        out->per_entry = 1;
        return kind != DSV4_SWA;
    case DSV4_V_KV_INDEX:
        *out = vector(c->index_head_dim);
        out->per_entry = 1;
        return kind == DSV4_CSA;
    case DSV4_V_INDEX_SCORES:
        *out = vector(0);
        out->widens = 1;
        return kind == DSV4_CSA;
    case DSV4_V_INDEX_SELECTED:
        *out = vector(c->index_topk);
        out->integer = 1;
        return kind == DSV4_CSA;
    case DSV4_V_ATTENTION_WEIGHTS:
        *out = matrix(c->num_attention_heads, 1 + c->sliding_window + (kind == DSV4_CSA ? c->index_topk : 0));
        out->widens = kind == DSV4_HCA;
        return 1;
    case DSV4_V_HEADS:
        *out = matrix(c->num_attention_heads, c->head_dim);
        return 1;
    case DSV4_V_EXPERTS:
        *out = vector(c->num_experts_per_tok);
        out->integer = 1;
        return 1;
    case DSV4_V_EXPERT_WEIGHTS:
        *out = vector(c->num_experts_per_tok);
        return 1;
    case DSV4_V_ROUTER_SCORES:
        *out = vector(c->n_routed_experts);
        return 1;
    default:
        return 0;
    }
}

static dsv4_status check_tap(const dsv4_model *m, const struct dsv4_tap *tap, int32_t layer, int32_t value,
                             int32_t position, int32_t n, dsv4_error *err) {
    struct dsv4_value_shape shape;
    int32_t ratio = m->config.compress_ratios[layer];
    if (!dsv4_model_value(m, layer, value, &shape))
        return dsv4_fail(err, DSV4_E_ARGUMENT, "trace: layer %d has no %s", layer, dsv4_value_names[value]);
    int64_t rows = shape.per_entry ? (position + n) / ratio - position / ratio : n;
    int32_t width = shape.widens ? (position + n) / ratio : 0;
    if (tap->rows < rows || tap->width < width)
        return dsv4_fail(err, DSV4_E_ARGUMENT,
                         "trace: %s of layer %d: got room for %lld rows of %d entries, wanted %lld of %d",
                         dsv4_value_names[value], layer, (long long)tap->rows, tap->width, (long long)rows, width);
    return DSV4_OK;
}

dsv4_status dsv4_sites_check(const dsv4_model *m, const struct dsv4_tap *taps, int32_t position, int32_t n,
                             dsv4_error *err) {
    for (int32_t layer = 0; taps && layer < m->config.num_hidden_layers; layer++)
        for (int32_t value = 0; value < DSV4_VALUES; value++)
            if (taps[layer * DSV4_VALUES + value].out)
                DSV4_TRY(check_tap(m, &taps[layer * DSV4_VALUES + value], layer, value, position, n, err));
    return DSV4_OK;
}

const struct dsv4_asked *dsv4_sites_asked(const struct dsv4_pass *p, struct dsv4_asked *asked) {
    int32_t layers = p->m->config.num_hidden_layers;
    int any = 0;
    for (int32_t i = 0; i < p->n_piece; i++) {
        if (!p->pieces[i].taps)
            continue;
        if (!any)
            memset(asked, 0, (size_t)layers * sizeof *asked);
        any = 1;
        for (int32_t layer = 0; layer < layers; layer++)
            for (int32_t value = 0; value < DSV4_VALUES; value++)
                if (p->pieces[i].taps[layer * DSV4_VALUES + value].out)
                    asked[layer].sites |= 1u << site_of[value];
    }
    return any ? asked : NULL;
}

/* ---------------------------------------------------------------------------------------------------------- copying */

static const struct dsv4_tap *tap_of(const struct dsv4_piece *piece, const struct dsv4_sight *s, int32_t value) {
    return &piece->taps[s->layer * DSV4_VALUES + value];
}

/* Where row `row` of a value of s's layer goes, `size` elements of four bytes each; NULL: not asked for. */
static void *row_of(const struct dsv4_piece *piece, const struct dsv4_sight *s, enum dsv4_value value, int32_t row,
                    int32_t size) {
    const struct dsv4_tap *tap = tap_of(piece, s, (int32_t)value);
    return tap->out ? (uint8_t *)tap->out + (size_t)row * (size_t)size * 4 : NULL;
}

static void widen(float *out, const dsv4_bf16 *x, int32_t n) {
    for (int32_t i = 0; i < n; i++)
        out[i] = dsv4_bf16_to_f32(x[i]);
}

/* n values of bf16, from element `at` of a row of `size` on. */
static void copy_bf16(const struct dsv4_piece *piece, const struct dsv4_sight *s, enum dsv4_value value, int32_t row,
                      int32_t size, int32_t at, int32_t n) {
    float *out = row_of(piece, s, value, row, size);
    if (out)
        widen(out + at, s->x, n);
}

static void copy_words(const struct dsv4_piece *piece, const struct dsv4_sight *s, enum dsv4_value value, int32_t row,
                       const void *from, int32_t n) {
    void *out = row_of(piece, s, value, row, n);
    if (out)
        memcpy(out, from, (size_t)n * 4);
}

static void copy_mix(const struct dsv4_pass *p, const struct dsv4_piece *piece, const struct dsv4_sight *s,
                     int32_t row) {
    int32_t hc = p->m->config.hc_mult;
    int attention = s->site == DSV4_SITE_ATTENTION_MIX;
    copy_words(piece, s, attention ? DSV4_V_ATTENTION_PRE : DSV4_V_FFN_PRE, row, s->pre, hc);
    copy_words(piece, s, attention ? DSV4_V_ATTENTION_POST : DSV4_V_FFN_POST, row, s->post, hc);
    copy_words(piece, s, attention ? DSV4_V_ATTENTION_COMB : DSV4_V_FFN_COMB, row, s->comb, hc * hc);
}

/* The token's row, and the entries that close with it, decoded. */
static void copy_kv(const dsv4_worker *w, const struct dsv4_pass *p, const struct dsv4_piece *piece,
                    const struct dsv4_sight *s, int32_t row) {
    const struct dsv4_config *c = &p->m->config;
    const struct dsv4_kv_layer *kv = &piece->kv->layers[s->layer];
    int32_t ratio = c->compress_ratios[s->layer], end = p->positions[s->tok] + 1, hd = c->head_dim;
    dsv4_bf16 *x = dsv4_scratch(w, p, p->ws->at_kernel);
    float *out = row_of(piece, s, DSV4_V_KV, row, hd);
    if (out) {
        p->m->k.kv_load(x, s->row, p->m->kv_format, hd, c->qk_rope_head_dim);
        widen(out, x, hd);
    }
    if (!ratio || end % ratio)
        return;
    int32_t entry = end / ratio - 1, first = (piece->position - piece->row) / ratio;
    out = row_of(piece, s, DSV4_V_KV_COMPRESSED, entry - first, hd);
    if (out) {
        p->m->k.kv_load(x, dsv4_row(&kv->compressed, entry), p->m->kv_format, hd, c->qk_rope_head_dim);
        widen(out, x, hd);
    }
    out = row_of(piece, s, DSV4_V_KV_INDEX, entry - first, c->index_head_dim);
    if (out) {
        p->m->k.index_load(x, dsv4_row(&kv->index, entry), c->index_head_dim);
        widen(out, x, c->index_head_dim);
    }
}

static void copy_scores(const struct dsv4_piece *piece, const struct dsv4_sight *s, int32_t row) {
    int32_t width = tap_of(piece, s, DSV4_V_INDEX_SCORES)->width;
    float *out = row_of(piece, s, DSV4_V_INDEX_SCORES, row, width);
    for (int32_t i = 0; out && i < width; i++)
        out[i] = i < s->n ? s->scores[i] : NAN;
}

static void copy_selected(const struct dsv4_piece *piece, const struct dsv4_sight *s, int32_t row, int32_t topk) {
    int32_t *out = row_of(piece, s, DSV4_V_INDEX_SELECTED, row, topk);
    for (int32_t i = 0; out && i < topk; i++)
        out[i] = i < *s->n_ids ? s->ids[i] : -1;
}

static void copy_weights(const dsv4_worker *w, const struct dsv4_pass *p, const struct dsv4_piece *piece,
                         const struct dsv4_sight *s, int32_t row) {
    const struct dsv4_config *c = &p->m->config;
    int32_t n_rank = tap_of(piece, s, DSV4_V_ATTENTION_WEIGHTS)->width;
    if (p->m->layers[s->layer].kind == DSV4_CSA)
        n_rank = c->index_topk;
    float *out = row_of(piece, s, DSV4_V_ATTENTION_WEIGHTS, row,
                        c->num_attention_heads * (1 + c->sliding_window + n_rank));
    if (out)
        dsv4_attention_weights(w, p, s, out, n_rank);
}

static void copy_values(const dsv4_worker *w, const struct dsv4_pass *p, const struct dsv4_piece *piece,
                        const struct dsv4_sight *s) {
    const struct dsv4_config *c = &p->m->config;
    int32_t d = c->hidden_size, streams = c->hc_mult * d, hd = c->head_dim;
    int32_t row = piece->row + s->tok - piece->first_tok;
    switch (s->site) {
    case DSV4_SITE_STREAMS_IN:
        copy_bf16(piece, s, DSV4_V_STREAMS_IN, row, streams, 0, streams);
        break;
    case DSV4_SITE_STREAMS_MID:
        copy_bf16(piece, s, DSV4_V_STREAMS_MID, row, streams, 0, streams);
        break;
    case DSV4_SITE_STREAMS:
        copy_bf16(piece, s, DSV4_V_STREAMS, row, streams, 0, streams);
        break;
    case DSV4_SITE_ATTENTION_MIX:
    case DSV4_SITE_FFN_MIX:
        copy_mix(p, piece, s, row);
        break;
    case DSV4_SITE_ATTENTION_IN:
        copy_bf16(piece, s, DSV4_V_ATTENTION_IN, row, d, 0, d);
        break;
    case DSV4_SITE_ATTENTION_OUT:
        copy_bf16(piece, s, DSV4_V_ATTENTION_OUT, row, d, 0, d);
        break;
    case DSV4_SITE_FFN_IN:
        copy_bf16(piece, s, DSV4_V_FFN_IN, row, d, 0, d);
        break;
    case DSV4_SITE_FFN_OUT:
        copy_bf16(piece, s, DSV4_V_FFN_OUT, row, d, 0, d);
        break;
    case DSV4_SITE_KV:
        copy_kv(w, p, piece, s, row);
        break;
    case DSV4_SITE_INDEX_SCORES:
        copy_scores(piece, s, row);
        break;
    case DSV4_SITE_INDEX_SELECTED:
        copy_selected(piece, s, row, c->index_topk);
        break;
    case DSV4_SITE_KEYS:
        copy_weights(w, p, piece, s, row);
        break;
    case DSV4_SITE_HEADS:
        copy_bf16(piece, s, DSV4_V_HEADS, row, c->num_attention_heads * hd, s->h0 * hd, s->n * hd);
        break;
    case DSV4_SITE_ROUTER:
        copy_words(piece, s, DSV4_V_EXPERTS, row, s->ids, c->num_experts_per_tok);
        copy_words(piece, s, DSV4_V_EXPERT_WEIGHTS, row, s->weights, c->num_experts_per_tok);
        copy_words(piece, s, DSV4_V_ROUTER_SCORES, row, s->scores, s->n);
        break;
    case DSV4_SITES:
        break;
    }
}

/* ------------------------------------------------------------------------------------------------------ at the sites */

void dsv4_at(const dsv4_worker *w, const struct dsv4_pass *p, const struct dsv4_sight *s) {
    const struct dsv4_piece *piece = &p->pieces[p->piece_of[s->tok]];
    if (piece->taps && (p->n_tok > 1 || w->id == 0 || !(private_sites >> s->site & 1)))
        copy_values(w, p, piece, s);
}

void dsv4_at_tokens(const dsv4_worker *w, const struct dsv4_pass *p, int32_t layer, enum dsv4_site site) {
    int32_t d = p->m->config.hidden_size, streams = p->m->config.hc_mult * d;
    int output = site == DSV4_SITE_ATTENTION_OUT || site == DSV4_SITE_FFN_OUT;
    int64_t lo, hi;
    dsv4_share(w, p->n_tok, 1, &lo, &hi);
    for (int64_t t = lo; t < hi && !dsv4_cancelled(w); t++)
        dsv4_at(w, p, &(struct dsv4_sight){.site = site, .layer = layer, .tok = (int32_t)t,
                                           .x = output ? p->ws->y + t * d : p->ws->streams + t * streams});
}

int dsv4_at_columns(dsv4_worker *w, struct dsv4_pass *p, int32_t layer, enum dsv4_site site) {
    DSV4_SYNC(w, p);
    dsv4_at_tokens(w, p, layer, site);
    return 0;
}
