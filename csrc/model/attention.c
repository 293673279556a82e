/* SPDX-License-Identifier: Apache-2.0 */
/* The attention sublayer (SPEC 3): projections, rope, compressed entries, the ordered key list, grouped output. */
#include "model/edit.h"
#include "model/part.h"
#include "model/sites.h"

/* Everything that reads the normed input: one phase, one barrier.  Without scores nobody asks for their head weights. */
static int project_input(dsv4_worker *w, struct dsv4_pass *p, const struct dsv4_layer *l, int scored) {
    const struct dsv4_config *c = &p->m->config;
    struct dsv4_workspace *ws = p->ws;
    const struct dsv4_prepared *b = dsv4_prepared(w, p);
    ptrdiff_t d = c->hidden_size;
    struct dsv4_linear_job jobs[7];
    int n = 0;
    const dsv4_bf16 *uq = dsv4_rounds_input(p->m, &l->wq_a) ? b->u_quant : b->u_plain;
    const dsv4_bf16 *uk = dsv4_rounds_input(p->m, &l->wkv) ? b->u_quant : b->u_plain;
    jobs[n++] = (struct dsv4_linear_job){&l->wq_a, uq, ws->qa, d, c->q_lora_rank, 0};
    jobs[n++] = (struct dsv4_linear_job){&l->wkv, uk, ws->kv_raw, d, c->head_dim, 0};
    if (l->kind != DSV4_SWA) {
        const struct dsv4_compressor *m = &l->compressor;
        jobs[n++] = (struct dsv4_linear_job){&m->wkv, b->u_plain, ws->comp_k, d, m->wkv.rows, 1};
        jobs[n++] = (struct dsv4_linear_job){&m->wgate, b->u_plain, ws->comp_gate, d, m->wgate.rows, 1};
    }
    if (l->kind == DSV4_CSA) {
        const struct dsv4_compressor *i = &l->index_compressor;
        jobs[n++] = (struct dsv4_linear_job){&i->wkv, b->u_plain, ws->icomp_k, d, i->wkv.rows, 1};
        jobs[n++] = (struct dsv4_linear_job){&i->wgate, b->u_plain, ws->icomp_gate, d, i->wgate.rows, 1};
    }
    if (scored)
        jobs[n++] = (struct dsv4_linear_job){&l->weights_proj, b->u_plain, ws->index_w, d, c->index_n_heads, 0};
    dsv4_linear_jobs(w, p, jobs, n);
    DSV4_SYNC(w, p);
    return 0;
}

static const float *cos_of(const struct dsv4_pass *p, const struct dsv4_layer *l, int64_t t) {
    return (l->kind == DSV4_SWA ? p->ws->cos_main : p->ws->cos_comp) + t * (p->m->config.qk_rope_head_dim / 2);
}

static const float *sin_of(const struct dsv4_pass *p, const struct dsv4_layer *l, int64_t t) {
    return (l->kind == DSV4_SWA ? p->ws->sin_main : p->ws->sin_comp) + t * (p->m->config.qk_rope_head_dim / 2);
}

/* Norms of the low-rank query and of the KV row, the KV row's rope and storage, and the windows that close. */
static int norm_and_store(dsv4_worker *w, struct dsv4_pass *p, const struct dsv4_layer *l, int32_t layer) {
    const struct dsv4_config *c = &p->m->config;
    const struct dsv4_kernels *k = &p->m->k;
    struct dsv4_workspace *ws = p->ws;
    struct dsv4_prepared *b = dsv4_prepared(w, p);
    int32_t ql = c->q_lora_rank, hd = c->head_dim, rope = c->qk_rope_head_dim;
    int64_t lo, hi;
    dsv4_share_tokens(w, p, &lo, &hi);
    for (int64_t t = lo; t < hi; t++) {
        k->rmsnorm(b->qr + t * ql, ws->qa + t * ql, l->q_norm, ql, c->rms_norm_eps);
        dsv4_operand_of(p->m, &l->wq_b, b->qr_quant + t * ql, b->qr + t * ql, ql);
        dsv4_bf16 *kv = b->kv + t * hd;
        k->rmsnorm(kv, ws->kv_raw + t * hd, l->kv_norm, hd, c->rms_norm_eps);
        k->rope(kv + hd - rope, cos_of(p, l, t), sin_of(p, l, t), rope / 2, 0);
        k->kv_store(b->kv_rows + (size_t)t * p->m->kv_row, kv, p->m->kv_format, hd, rope);
    }
    if (l->kind != DSV4_SWA)
        dsv4_close_windows(w, p, layer);
    DSV4_SYNC_TOKENS(w, p);
    if (dsv4_asked(p, layer, DSV4_SITE_KV)) /* of a single token all workers have the row, the first its entries */
        for (int64_t t = lo; t < hi; t++)
            dsv4_at(w, p, &(struct dsv4_sight){.site = DSV4_SITE_KV, .layer = layer, .tok = (int32_t)t,
                                               .row = b->kv_rows + (size_t)t * p->m->kv_row});
    return 0;
}

/* Full-rank queries; where entries are scored also the index queries: rope, Hadamard, FP4 row. */
static int make_queries(dsv4_worker *w, struct dsv4_pass *p, const struct dsv4_layer *l, int scored) {
    const struct dsv4_config *c = &p->m->config;
    const struct dsv4_kernels *k = &p->m->k;
    struct dsv4_workspace *ws = p->ws;
    const struct dsv4_prepared *b = dsv4_prepared(w, p);
    ptrdiff_t all = (ptrdiff_t)c->num_attention_heads * c->head_dim;
    int32_t rope = c->qk_rope_head_dim, id = c->index_head_dim;
    struct dsv4_linear_job jobs[2] = {
        {&l->wq_b, b->qr_quant, ws->q, c->q_lora_rank, all, 0},
        {&l->index_wq_b, b->qr_quant, ws->index_q, c->q_lora_rank, (ptrdiff_t)c->index_n_heads * id, 0},
    };
    dsv4_linear_jobs(w, p, jobs, scored ? 2 : 1);
    DSV4_SYNC(w, p);
    if (!scored)
        return 0;
    int64_t lo, hi;
    dsv4_share(w, (int64_t)p->n_tok * c->index_n_heads, 1, &lo, &hi);
    for (int64_t i = lo; i < hi; i++) {
        dsv4_bf16 *q = ws->index_q + i * id;
        int64_t t = i / c->index_n_heads;
        k->rope(q + id - rope, cos_of(p, l, t), sin_of(p, l, t), rope / 2, 0);
        k->hadamard(q, id);
        k->index_store(ws->index_q_rows + (size_t)i * p->m->index_row, q, id);
    }
    DSV4_SYNC(w, p);
    return 0;
}

/*
 * The key list of token t (kernels.h, rule 4): ranks [0, window) are the window, ascending positions, then masked; the
 * compressed entries follow, ascending ids.  Returns the number of ranks.
 */
static int32_t list_keys(const struct dsv4_pass *p, const uint8_t *new_rows, const struct dsv4_layer *l, int32_t layer,
                         int64_t t, const uint8_t **keys) {
    const struct dsv4_piece *piece = &p->pieces[p->piece_of[t]];
    const struct dsv4_kv_layer *s = &piece->kv->layers[layer];
    int32_t window = p->m->config.sliding_window, position = p->positions[t], n = 0;
    for (int32_t at = position < window ? 0 : position - window + 1; at <= position; at++)
        keys[n++] = at >= piece->position
                        ? new_rows + (size_t)(piece->first_tok + at - piece->position) * p->m->kv_row
                        : s->window + (size_t)(at % window) * p->m->kv_row;
    while (n < window)
        keys[n++] = NULL;
    if (l->kind == DSV4_CSA) {
        const int32_t *ids = p->ws->selected + t * p->m->config.index_topk;
        for (int32_t i = 0; i < p->ws->n_selected[t]; i++) {
            dsv4_check_rows(p, &s->compressed, layer, ids[i], ids[i] + 1);
            keys[n++] = dsv4_row(&s->compressed, ids[i]);
        }
    } else if (l->kind == DSV4_HCA) {
        int32_t visible = (position + 1) / l->compressor.ratio;
        dsv4_check_rows(p, &s->compressed, layer, 0, visible);
        for (int32_t i = 0; i < visible; i++)
            keys[n++] = dsv4_row(&s->compressed, i);
        if (dsv4_edited(p))
            dsv4_edit_keys(p, layer, t, keys + window, visible);
    }
    return n;
}

/*
 * Attention of all tokens, cut by (token, head group): head norm and rope of the queries, attention, inverse rope,
 * operands for the output projection.
 */
static int attend(dsv4_worker *w, struct dsv4_pass *p, const struct dsv4_layer *l, int32_t layer) {
    const struct dsv4_config *c = &p->m->config;
    const struct dsv4_kernels *k = &p->m->k;
    int32_t heads = c->num_attention_heads, hd = c->head_dim, rope = c->qk_rope_head_dim;
    /* groups of 16 heads (one vector of lanes) only as far as workers would idle otherwise */
    int32_t groups = (w->n + p->n_tok - 1) / p->n_tok, most = (heads + 15) / 16;
    groups = groups > most ? most : groups;
    int32_t size = ((heads + groups - 1) / groups + 15) / 16 * 16;
    const uint8_t **keys = dsv4_scratch(w, p, p->ws->at_keys);
    for (int64_t i = w->id; i < (int64_t)p->n_tok * groups && !dsv4_cancelled(w); i += w->n) {
        int64_t t = i / groups;
        int32_t h0 = (int32_t)(i % groups) * size, h1 = h0 + size < heads ? h0 + size : heads;
        if (h0 >= h1)
            continue;
        dsv4_bf16 *o = p->ws->o + (t * heads + h0) * hd, *q = p->ws->q + (t * heads + h0) * hd;
        for (int32_t h = 0; h < h1 - h0; h++) {
            k->headnorm(q + (ptrdiff_t)h * hd, hd, c->rms_norm_eps);
            k->rope(q + (ptrdiff_t)(h + 1) * hd - rope, cos_of(p, l, t), sin_of(p, l, t), rope / 2, 0);
        }
        int32_t n_key = list_keys(p, dsv4_prepared(w, p)->kv_rows, l, layer, t, keys);
        struct dsv4_attention_args a = {
            .out = o, .q = q, .keys = keys, .sink = l->sink + h0, .scratch = dsv4_scratch(w, p, p->ws->at_kernel),
            .n_key = n_key, .n_head = h1 - h0, .d_head = hd, .d_rope = rope, .scale = p->m->softmax_scale,
            .format = p->m->kv_format,
        };
        if (dsv4_edited(p))
            a.sink = h0 + dsv4_edit_sinks(p, layer, t, l->sink, dsv4_scratch(w, p, p->ws->at_edit));
        if (dsv4_asked(p, layer, DSV4_SITE_KEYS))
            dsv4_at(w, p, &(struct dsv4_sight){.site = DSV4_SITE_KEYS, .layer = layer, .tok = (int32_t)t, .h0 = h0,
                                               .keys = keys, .attention = &a});
        dsv4_lap(w, p, DSV4_PHASE_OTHER);
        k->attention(&a);
        dsv4_lap(w, p, DSV4_PHASE_ATTENTION);
        for (int32_t h = 0; h < h1 - h0; h++)
            k->rope(o + (ptrdiff_t)(h + 1) * hd - rope, cos_of(p, l, t), sin_of(p, l, t), rope / 2, 1);
        if (dsv4_edited(p))
            dsv4_edit_heads(p, layer, t, o, h0, h1);
        if (dsv4_asked(p, layer, DSV4_SITE_HEADS))
            dsv4_at(w, p, &(struct dsv4_sight){.site = DSV4_SITE_HEADS, .layer = layer, .tok = (int32_t)t, .h0 = h0,
                                               .n = h1 - h0, .x = o});
        k->act_flush(o, o, (h1 - h0) * hd);
    }
    DSV4_SYNC(w, p);
    return 0;
}

/* z[g] = wo_a[g] o[g] per group of heads, then this worker's columns of wo_b (SPEC 3.9). */
static int project_output(dsv4_worker *w, struct dsv4_pass *p, const struct dsv4_layer *l) {
    const struct dsv4_config *c = &p->m->config;
    struct dsv4_workspace *ws = p->ws;
    const struct dsv4_prepared *b = dsv4_prepared(w, p);
    int32_t rank = c->o_lora_rank, low = c->o_groups * rank, c0, c1;
    ptrdiff_t all = (ptrdiff_t)c->num_attention_heads * c->head_dim, part = all / c->o_groups;
    int64_t lo, hi;
    dsv4_share(w, low, 4, &lo, &hi);
    for (int32_t g = (int32_t)(lo / rank); (int64_t)g * rank < hi; g++) {
        struct dsv4_linear_job job = {&l->wo_a, ws->o + g * part, ws->z, all, low, 0};
        int32_t r0 = (int32_t)lo > g * rank ? (int32_t)lo : g * rank;
        int32_t r1 = (int32_t)hi < (g + 1) * rank ? (int32_t)hi : (g + 1) * rank;
        dsv4_linear_rows(w, p, &job, NULL, p->n_tok, r0, r1);
    }
    DSV4_SYNC(w, p);
    dsv4_share_tokens(w, p, &lo, &hi);
    for (int64_t t = lo; t < hi; t++)
        dsv4_operand_of(p->m, &l->wo_b, b->z_quant + t * low, ws->z + t * low, low);
    DSV4_SYNC_TOKENS(w, p);
    struct dsv4_linear_job job = {&l->wo_b, b->z_quant, ws->y, low, c->hidden_size, 0};
    dsv4_share_columns(w, p, &c0, &c1);
    dsv4_linear_rows(w, p, &job, NULL, p->n_tok, c0, c1);
    return 0;
}

int dsv4_attention_rows(dsv4_worker *w, struct dsv4_pass *p, int32_t layer, int scored) {
    const struct dsv4_layer *l = &p->m->layers[layer];
    return project_input(w, p, l, scored) || norm_and_store(w, p, l, layer);
}

int dsv4_attention_queries(dsv4_worker *w, struct dsv4_pass *p, int32_t layer, int scored) {
    return make_queries(w, p, &p->m->layers[layer], scored);
}

int dsv4_attention_heads(dsv4_worker *w, struct dsv4_pass *p, int32_t layer) {
    return attend(w, p, &p->m->layers[layer], layer);
}

int dsv4_attention_output(dsv4_worker *w, struct dsv4_pass *p, int32_t layer) {
    return project_output(w, p, &p->m->layers[layer]);
}

int dsv4_attention(dsv4_worker *w, struct dsv4_pass *p, int32_t layer) {
    int csa = p->m->layers[layer].kind == DSV4_CSA, scored = csa && dsv4_scores(p, layer);
    if (dsv4_attention_rows(w, p, layer, scored) || dsv4_attention_queries(w, p, layer, scored))
        return 1;
    if (csa && dsv4_select(w, p, layer))
        return 1;
    if (dsv4_attention_heads(w, p, layer))
        return 1;
    dsv4_keep_state(w, p, layer);
    return dsv4_attention_output(w, p, layer);
}
