/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Parts of a layer on rows that the caller brings (dsv4.h, "parts"): rows in, phases of a pass, rows out.  There is no
 * math here.
 */
#include <math.h>

#include "model/part.h"

/* ------------------------------------------------------------------------------------------------------------ checks */

static int has_state(int32_t kind) {
    return kind == DSV4_PART_COMPRESS || kind == DSV4_PART_INDEX || kind == DSV4_PART_ATTEND ||
           kind == DSV4_PART_ATTENTION;
}

/* The inputs that a kind reads; outputs may all be NULL. */
static int has_inputs(const struct dsv4_part *a) {
    switch (a->kind) {
    case DSV4_PART_COLLAPSE:
        return a->streams != NULL;
    case DSV4_PART_SPREAD:
        return a->x && a->streams && a->post && a->comb;
    case DSV4_PART_EXPERT:
        return a->x && a->weights;
    case DSV4_PART_OUTPUT:
        return a->heads != NULL;
    default:
        return a->x != NULL;
    }
}

dsv4_status dsv4_part_check(const struct dsv4_part *a, const dsv4_model *m, dsv4_error *err) {
    const struct dsv4_config *c = &m->config;
    if (a->layer < 0 || a->layer >= c->num_hidden_layers)
        return dsv4_fail(err, DSV4_E_ARGUMENT, "layer: got %d, wanted one in [0, %d)", a->layer, c->num_hidden_layers);
    if (a->kind < 0 || a->kind >= DSV4_PARTS || a->n < 1 || !a->token_ids || !has_inputs(a) ||
        has_state(a->kind) != (a->state != NULL) || a->site < 0 || a->site > 1)
        return dsv4_fail(err, DSV4_E_ARGUMENT, "part %d of layer %d: wanted its inputs, at least one row, and a state "
                         "where it has one", a->kind, a->layer);
    if (a->expert < 0 || a->expert > c->n_routed_experts)
        return dsv4_fail(err, DSV4_E_ARGUMENT, "expert: got %d, wanted one in [0, %d]", a->expert, c->n_routed_experts);
    enum dsv4_layer_kind kind = m->layers[a->layer].kind;
    if ((a->kind == DSV4_PART_COMPRESS && kind == DSV4_SWA) || (a->kind == DSV4_PART_INDEX && kind != DSV4_CSA) ||
        (a->kind == DSV4_PART_ATTEND && a->selected && kind != DSV4_CSA))
        return dsv4_fail(err, DSV4_E_ARGUMENT, "layer %d has no %s", a->layer,
                         a->kind == DSV4_PART_COMPRESS ? "compressor" : "indexer");
    for (int32_t i = 0; i < a->n; i++)
        if (a->token_ids[i] < 0 || a->token_ids[i] >= c->vocab_size)
            return dsv4_fail(err, DSV4_E_ARGUMENT, "token_ids: got %d at %d, wanted ids in [0, %d)", a->token_ids[i], i,
                             c->vocab_size);
    return DSV4_OK;
}

static dsv4_status check_selected(const struct dsv4_part *a, const dsv4_model *m, dsv4_error *err) {
    int32_t topk = m->config.index_topk, ratio = m->layers[a->layer].compressor.ratio;
    for (int32_t t = 0; t < a->n; t++) {
        const int32_t *ids = a->selected + (ptrdiff_t)t * topk;
        int32_t seen = (a->position + t + 1) / ratio, last = -1;
        for (int32_t i = 0; i < topk; i++) {
            if (ids[i] == -1 ? i + 1 < topk && ids[i + 1] != -1 : ids[i] <= last || ids[i] >= seen)
                return dsv4_fail(err, DSV4_E_ARGUMENT, "selected: row %d: got %d at %d, wanted ascending ids of the %d "
                                 "entries that this token sees, then -1", t, ids[i], i, seen);
            last = ids[i];
        }
    }
    return DSV4_OK;
}

dsv4_status dsv4_part_check_state(const struct dsv4_part *a, const dsv4_model *m, const struct dsv4_kv *kv,
                                  dsv4_error *err) {
    if (kv->model != m || kv->first_layer != a->layer || kv->end_layer != a->layer + 1)
        return dsv4_fail(err, DSV4_E_ARGUMENT, "state: got that of layer %d, wanted that of layer %d", kv->first_layer,
                         a->layer);
    if (kv->position != a->position)
        return dsv4_fail(err, DSV4_E_STATE, "the state moved from row %d to %d meanwhile, by another thread", a->position,
                         kv->position);
    if (a->n > m->config.max_position_embeddings - kv->position)
        return dsv4_fail(err, DSV4_E_ARGUMENT, "x: got %d rows after %d, wanted at most %d in all", a->n, kv->position,
                         m->config.max_position_embeddings);
    return a->kind == DSV4_PART_ATTEND && a->selected ? check_selected(a, m, err) : DSV4_OK;
}

/* -------------------------------------------------------------------------------------------------------- rows in, out */

/* The caller's row of the pass's first token. */
static ptrdiff_t first_row(const struct dsv4_pass *p) {
    const struct dsv4_piece *piece = &p->pieces[0];
    return piece->position - (piece->kv ? piece->kv->position : 0);
}

/* Rows of the pass out of the caller's, or into them (NULL: not wanted), by tokens. */
static void take(const dsv4_worker *w, const struct dsv4_pass *p, void *to, const void *from, size_t row_bytes) {
    int64_t lo, hi;
    dsv4_share(w, p->n_tok, 1, &lo, &hi);
    if (lo < hi)
        memcpy((uint8_t *)to + (size_t)lo * row_bytes,
               (const uint8_t *)from + (size_t)(first_row(p) + lo) * row_bytes, (size_t)(hi - lo) * row_bytes);
}

static void give(const dsv4_worker *w, const struct dsv4_pass *p, void *to, const void *from, size_t row_bytes) {
    int64_t lo, hi;
    dsv4_share(w, p->n_tok, 1, &lo, &hi);
    if (to && lo < hi)
        memcpy((uint8_t *)to + (size_t)(first_row(p) + lo) * row_bytes,
               (const uint8_t *)from + (size_t)lo * row_bytes, (size_t)(hi - lo) * row_bytes);
}

/* This worker's columns of [n_tok][d]. */
static void give_columns(const dsv4_worker *w, const struct dsv4_pass *p, dsv4_bf16 *to, const dsv4_bf16 *from) {
    int32_t d = p->m->config.hidden_size, c0, c1;
    dsv4_share_columns(w, p, &c0, &c1);
    for (int64_t t = 0; to && t < p->n_tok && c0 < c1; t++)
        memcpy(to + (first_row(p) + t) * d + c0, from + t * d + c0, (size_t)(c1 - c0) * sizeof *to);
}

/* The normed input of a sublayer, as operands. */
static int take_input(dsv4_worker *w, struct dsv4_pass *p, const struct dsv4_part *a) {
    struct dsv4_prepared *b = dsv4_prepared(w, p);
    int32_t d = p->m->config.hidden_size;
    int64_t lo, hi;
    dsv4_share_tokens(w, p, &lo, &hi);
    for (int64_t t = lo; t < hi; t++) {
        memcpy(b->u + t * d, a->x + (first_row(p) + t) * d, (size_t)d * sizeof *b->u);
        dsv4_input_operands(p, b, t);
    }
    DSV4_SYNC_TOKENS(w, p);
    return 0;
}

/* --------------------------------------------------------------------------------------------------- hyper-connections */

static int collapse(dsv4_worker *w, struct dsv4_pass *p, const struct dsv4_part *a) {
    const struct dsv4_config *c = &p->m->config;
    const struct dsv4_layer *l = &p->m->layers[a->layer];
    const struct dsv4_hyper *h = a->site ? &l->hc_ffn : &l->hc_attn;
    const struct dsv4_prepared *b = dsv4_prepared(w, p);
    int32_t d = c->hidden_size, hc = c->hc_mult, mixes = (2 + hc) * hc;
    int64_t lo, hi;
    take(w, p, p->ws->streams, a->streams, (size_t)hc * (size_t)d * sizeof(dsv4_bf16));
    DSV4_SYNC(w, p);
    if (dsv4_collapse(w, p, a->layer, a->site))
        return 1;
    give(w, p, a->post, b->post, (size_t)hc * sizeof(float));
    give(w, p, a->comb, b->comb, (size_t)hc * (size_t)hc * sizeof(float));
    give(w, p, a->y, b->u, (size_t)d * sizeof(dsv4_bf16));
    /* a step keeps neither the gates of the streams nor what comes before the norm: made once more */
    dsv4_share(w, p->n_tok, 1, &lo, &hi);
    for (int64_t t = lo; t < hi && a->pre && a->collapsed; t++)
        p->m->k.hc_pre(&(struct dsv4_hc_pre_args){
            .x = a->collapsed + (first_row(p) + t) * d, .pre = a->pre + (first_row(p) + t) * hc,
            .post = b->post + t * hc, .comb = b->comb + t * hc * hc, .streams = p->ws->streams + t * hc * d,
            .dots = p->ws->dots + t * mixes, .scale = h->scale, .base = h->base, .hc = hc, .d_model = d,
            .sinkhorn_iters = c->hc_sinkhorn_iters, .norm_eps = c->rms_norm_eps, .hc_eps = c->hc_eps,
        });
    return 0;
}

static int spread(dsv4_worker *w, struct dsv4_pass *p, const struct dsv4_part *a) {
    const struct dsv4_config *c = &p->m->config;
    struct dsv4_prepared *b = dsv4_prepared(w, p);
    size_t d = (size_t)c->hidden_size, hc = (size_t)c->hc_mult;
    int64_t lo, hi;
    take(w, p, p->ws->streams, a->streams, hc * d * sizeof(dsv4_bf16));
    take(w, p, p->ws->y, a->x, d * sizeof(dsv4_bf16));
    dsv4_share_tokens(w, p, &lo, &hi);
    for (int64_t t = lo; t < hi; t++) {
        size_t row = (size_t)(first_row(p) + t);
        memcpy(b->post + (size_t)t * hc, a->post + row * hc, hc * sizeof(float));
        memcpy(b->comb + (size_t)t * hc * hc, a->comb + row * hc * hc, hc * hc * sizeof(float));
    }
    DSV4_SYNC(w, p);
    dsv4_spread(w, p);
    DSV4_SYNC(w, p);
    give(w, p, a->streams_out, p->ws->streams, hc * d * sizeof(dsv4_bf16));
    return 0;
}

/* --------------------------------------------------------------------------------------------------------- experts */

static int experts(dsv4_worker *w, struct dsv4_pass *p, const struct dsv4_part *a) {
    const struct dsv4_config *c = &p->m->config;
    const struct dsv4_prepared *b = dsv4_prepared(w, p);
    size_t top_k = (size_t)c->num_experts_per_tok;
    if (take_input(w, p, a))
        return 1;
    if (a->kind == DSV4_PART_EXPERT) {
        if (dsv4_moe_expert(w, p, a->layer, a->expert, a->weights + first_row(p)))
            return 1;
        give_columns(w, p, a->y, p->ws->expert_out);
    } else if (a->kind == DSV4_PART_MOE) {
        if (dsv4_moe(w, p, a->layer))
            return 1;
        give_columns(w, p, a->y, p->ws->y);
    } else {
        if (dsv4_moe_route(w, p, a->layer))
            return 1;
        give(w, p, a->experts, b->expert_ids, top_k * sizeof(int32_t));
        give(w, p, a->weights, b->expert_weights, top_k * sizeof(float));
        give(w, p, a->scores, b->router_scores, (size_t)c->n_routed_experts * sizeof(float));
    }
    return 0;
}

/* -------------------------------------------------------------------------------------------------------- attention */

/* The entries that closed in this pass, decoded. */
static void give_entries(const dsv4_worker *w, const struct dsv4_pass *p, const struct dsv4_part *a) {
    const struct dsv4_config *c = &p->m->config;
    const struct dsv4_piece *piece = &p->pieces[0];
    const struct dsv4_kv_layer *s = &piece->kv->layers[a->layer];
    int32_t ratio = p->m->layers[a->layer].compressor.ratio, before = a->position / ratio;
    int32_t first = piece->position / ratio, end = (piece->position + piece->n) / ratio;
    for (int32_t e = first + w->id; e < end; e += w->n) {
        if (a->entries)
            p->m->k.kv_load(a->entries + (ptrdiff_t)(e - before) * c->head_dim, dsv4_row(&s->compressed, e),
                            p->m->kv_format, c->head_dim, c->qk_rope_head_dim);
        if (a->index_entries)
            p->m->k.index_load(a->index_entries + (ptrdiff_t)(e - before) * c->index_head_dim, dsv4_row(&s->index, e),
                               c->index_head_dim);
    }
}

static void give_selection(dsv4_worker *w, const struct dsv4_pass *p, const struct dsv4_part *a) {
    int32_t topk = p->m->config.index_topk, all = (a->position + a->n) / p->m->layers[a->layer].compressor.ratio;
    for (int64_t t = w->id; t < p->n_tok && !dsv4_cancelled(w); t += w->n) { /* round robin: later tokens see more */
        for (int32_t i = p->ws->n_selected[t]; i < topk; i++)
            p->ws->selected[t * topk + i] = -1;
        if (a->selected)
            memcpy(a->selected + (first_row(p) + t) * topk, p->ws->selected + t * topk, (size_t)topk * sizeof(int32_t));
        if (!a->index_scores)
            continue;
        float *scores = a->index_scores + (first_row(p) + t) * all;
        for (int32_t e = dsv4_score_all(w, p, a->layer, t, scores); e < all; e++)
            scores[e] = NAN;
    }
}

static int take_selection(dsv4_worker *w, struct dsv4_pass *p, const struct dsv4_part *a) {
    int32_t topk = p->m->config.index_topk;
    int64_t lo, hi;
    take(w, p, p->ws->selected, a->selected, (size_t)topk * sizeof(int32_t));
    dsv4_share(w, p->n_tok, 1, &lo, &hi);
    for (int64_t t = lo; t < hi; t++) {
        int32_t n = 0;
        while (n < topk && p->ws->selected[t * topk + n] >= 0)
            n++;
        p->ws->n_selected[t] = n;
    }
    DSV4_SYNC(w, p);
    return 0;
}

/* What the kinds do with the state at hand, each a piece of dsv4_attention. */
static int attention(dsv4_worker *w, struct dsv4_pass *p, const struct dsv4_part *a) {
    const struct dsv4_config *c = &p->m->config;
    int csa = p->m->layers[a->layer].kind == DSV4_CSA, given = a->kind == DSV4_PART_ATTEND && a->selected;
    int scored = csa && !given && (a->kind == DSV4_PART_INDEX || dsv4_scores(p, a->layer));
    if (dsv4_attention_rows(w, p, a->layer, scored))
        return 1;
    if (a->kind == DSV4_PART_COMPRESS) {
        DSV4_SYNC(w, p);
        give_entries(w, p, a);
        return 0;
    }
    if (dsv4_attention_queries(w, p, a->layer, scored))
        return 1;
    if (csa && (given ? take_selection(w, p, a) : dsv4_select(w, p, a->layer)))
        return 1;
    if (a->kind == DSV4_PART_INDEX) {
        give_selection(w, p, a);
        return 0;
    }
    if (dsv4_attention_heads(w, p, a->layer))
        return 1;
    if (a->kind == DSV4_PART_ATTEND)
        give(w, p, a->heads, p->ws->o, (size_t)c->num_attention_heads * (size_t)c->head_dim * sizeof(dsv4_bf16));
    return 0;
}

static int with_state(dsv4_worker *w, struct dsv4_pass *p, const struct dsv4_part *a) {
    if (dsv4_enter(w, p, 0) || take_input(w, p, a) || attention(w, p, a))
        return 1;
    dsv4_keep_state(w, p, a->layer); /* the next pass reads it */
    if (a->kind != DSV4_PART_ATTENTION)
        return 0;
    if (dsv4_attention_output(w, p, a->layer))
        return 1;
    give_columns(w, p, a->y, p->ws->y);
    return 0;
}

static int output(dsv4_worker *w, struct dsv4_pass *p, const struct dsv4_part *a) {
    const struct dsv4_config *c = &p->m->config;
    int32_t width = c->num_attention_heads * c->head_dim;
    int64_t lo, hi;
    dsv4_share(w, p->n_tok, 1, &lo, &hi);
    for (int64_t t = lo; t < hi; t++)
        p->m->k.act_flush(p->ws->o + t * width, a->heads + (first_row(p) + t) * width, width);
    DSV4_SYNC(w, p);
    if (dsv4_attention_output(w, p, a->layer))
        return 1;
    give_columns(w, p, a->y, p->ws->y);
    return 0;
}

int dsv4_part(dsv4_worker *w, struct dsv4_pass *p, const struct dsv4_part *a) {
    switch (a->kind) {
    case DSV4_PART_COLLAPSE:
        return collapse(w, p, a);
    case DSV4_PART_SPREAD:
        return spread(w, p, a);
    case DSV4_PART_ROUTE:
    case DSV4_PART_MOE:
    case DSV4_PART_EXPERT:
        return experts(w, p, a);
    case DSV4_PART_OUTPUT:
        return output(w, p, a);
    default:
        return with_state(w, p, a);
    }
}
