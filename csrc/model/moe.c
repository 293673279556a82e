/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The mixture of experts (SPEC 4): router, rows grouped by expert, up and gate, SwiGLU, down, sum.  The shared expert is
 * one more expert, the last, that takes every token.
 */
#include "model/pass.h"

static void hash_ids(const struct dsv4_layer *l, int32_t token, int32_t top_k, int32_t *out) {
    for (int32_t j = 0; j < top_k; j++) {
        size_t i = (size_t)token * (size_t)top_k + (size_t)j;
        if (l->tid2eid_bytes == 8) {
            int64_t wide;
            memcpy(&wide, l->tid2eid + 8 * i, 8);
            out[j] = (int32_t)wide;
        } else {
            memcpy(&out[j], l->tid2eid + 4 * i, 4);
        }
    }
}

static int route(dsv4_worker *w, struct dsv4_pass *p, const struct dsv4_layer *l) {
    const struct dsv4_config *c = &p->m->config;
    struct dsv4_workspace *ws = p->ws;
    int32_t n_exp = c->n_routed_experts, top_k = c->num_experts_per_tok;
    struct dsv4_linear_job job = {&l->gate, ws->u_plain, ws->router_logits, c->hidden_size, n_exp, 1};
    int64_t lo, hi;
    dsv4_linear_jobs(w, p, &job, 1);
    DSV4_SYNC(w);
    dsv4_share(w, p->n_tok, 1, &lo, &hi);
    for (int64_t t = lo; t < hi; t++) {
        int32_t *forced = dsv4_scratch(w, p, ws->at_small);
        if (l->tid2eid)
            hash_ids(l, p->ids[t], top_k, forced);
        p->m->k.router(&(struct dsv4_router_args){
            .ids = ws->expert_ids + t * top_k, .weights = ws->expert_weights + t * top_k,
            .scores = ws->router_scores + t * n_exp, .logits = ws->router_logits + t * n_exp, .bias = l->gate_bias,
            .forced = l->tid2eid ? forced : NULL, .n_exp = n_exp, .top_k = top_k,
            .route_scale = c->routed_scaling_factor,
        });
    }
    DSV4_SYNC(w);
    return 0;
}

/* A counting sort of (token, choice) by expert; expert rows of a token come out in ascending expert order. */
static void group_rows(struct dsv4_pass *p) {
    const struct dsv4_config *c = &p->m->config;
    struct dsv4_workspace *ws = p->ws;
    int32_t n_exp = c->n_routed_experts, top_k = c->num_experts_per_tok, per_tok = top_k + 1;
    int32_t *first = ws->group_first;
    memset(first, 0, (size_t)(n_exp + 2) * sizeof *first);
    for (int32_t i = 0; i < p->n_tok * top_k; i++)
        first[ws->expert_ids[i] + 1]++;
    for (int32_t e = 0; e < n_exp; e++)
        first[e + 1] += first[e];
    first[n_exp + 1] = first[n_exp] + p->n_tok;
    for (int32_t t = 0; t < p->n_tok; t++) {
        for (int32_t j = 0; j < top_k; j++) {
            int32_t row = first[ws->expert_ids[t * top_k + j]]++;
            ws->row_tok[row] = t;
            ws->row_weight[row] = ws->expert_weights[t * top_k + j];
        }
    }
    for (int32_t e = n_exp; e > 0; e--) /* undo the advance */
        first[e] = first[e - 1];
    first[0] = 0;
    int32_t shared = first[n_exp];
    for (int32_t t = 0; t < p->n_tok; t++) {
        ws->row_tok[shared + t] = t;
        ws->row_weight[shared + t] = 1.0f;
        ws->tok_rows[t * per_tok] = 0; /* counts during the next loop */
    }
    /* rows are in ascending expert order, so each token meets its rows in that order */
    for (int32_t row = 0; row < shared; row++) {
        int32_t *list = ws->tok_rows + ws->row_tok[row] * per_tok;
        int32_t n = list[0]++;
        if (n < top_k) /* slot 0 holds the count until the end: keep the first row in the last slot */
            list[n == 0 ? top_k : n] = row;
    }
    for (int32_t t = 0; t < p->n_tok; t++) {
        int32_t *list = ws->tok_rows + t * per_tok;
        list[0] = list[top_k];
        list[top_k] = shared + t;
    }
}

/*
 * This worker's share of the (expert, 128 columns) units, contiguous, weighed by what a unit costs: reading its weights
 * (as much as a few tokens' arithmetic) plus its tokens.
 */
enum { UNIT = DSV4_ACT_GROUP, READ_COST = 4 };

static int64_t unit_cost(const struct dsv4_workspace *ws, int32_t e) {
    int32_t rows = ws->group_first[e + 1] - ws->group_first[e];
    return rows ? rows + READ_COST : 0;
}

static const struct dsv4_expert *expert_at(const struct dsv4_pass *p, const struct dsv4_layer *l, int32_t e) {
    return e < p->m->config.n_routed_experts ? &l->experts[e] : &l->shared;
}

/* Units [u0, u1) of expert e: both projections, the activation, and its rounding for w2. */
static void up_units(dsv4_worker *w, struct dsv4_pass *p, const struct dsv4_layer *l, int32_t e, int64_t u0, int64_t u1) {
    const struct dsv4_config *c = &p->m->config;
    const struct dsv4_expert *x = expert_at(p, l, e);
    struct dsv4_workspace *ws = p->ws;
    int32_t first = ws->group_first[e], n = ws->group_first[e + 1] - first, width = c->moe_intermediate_size;
    int32_t r0 = (int32_t)u0 * UNIT, r1 = (int32_t)u1 * UNIT < width ? (int32_t)u1 * UNIT : width;
    int shared = e == c->n_routed_experts;
    float limit = shared && p->m->options.april_shared ? dsv4_f32_from_bits(0x7f800000u) : c->swiglu_limit;
    const dsv4_bf16 *u1x = dsv4_rounds_input(p->m, &x->w1) ? ws->u_quant : ws->u_plain;
    const dsv4_bf16 *u3x = dsv4_rounds_input(p->m, &x->w3) ? ws->u_quant : ws->u_plain;
    struct dsv4_linear_job gate = {&x->w1, u1x, ws->gate_out + (ptrdiff_t)first * width, c->hidden_size, width, 0};
    struct dsv4_linear_job up = {&x->w3, u3x, ws->up_out + (ptrdiff_t)first * width, c->hidden_size, width, 0};
    dsv4_linear_rows(w, p, &gate, ws->row_tok + first, n, r0, r1);
    dsv4_linear_rows(w, p, &up, ws->row_tok + first, n, r0, r1);
    for (int32_t i = first; i < first + n && !dsv4_cancelled(w); i++) {
        dsv4_bf16 *h = ws->gate_out + (ptrdiff_t)i * width + r0;
        p->m->k.swiglu(h, h, ws->up_out + (ptrdiff_t)i * width + r0, r1 - r0, limit, ws->row_weight[i]);
        dsv4_operand_of(p->m, &x->w2, ws->up_out + (ptrdiff_t)i * width + r0, h, r1 - r0);
    }
}

static int up(dsv4_worker *w, struct dsv4_pass *p, const struct dsv4_layer *l) {
    const struct dsv4_config *c = &p->m->config;
    int64_t units = (c->moe_intermediate_size + UNIT - 1) / UNIT, total = 0, before = 0;
    for (int32_t e = 0; e <= c->n_routed_experts; e++)
        total += units * unit_cost(p->ws, e);
    int64_t lo = total * w->id / w->n, hi = total * (w->id + 1) / w->n;
    for (int32_t e = 0; e <= c->n_routed_experts && before < hi; e++) {
        int64_t cost = unit_cost(p->ws, e);
        if (!cost)
            continue;
        /* unit u belongs to the worker in whose range its start lies */
        int64_t u0 = lo <= before ? 0 : (lo - before + cost - 1) / cost, u1 = (hi - before + cost - 1) / cost;
        u1 = u1 > units ? units : u1;
        if (u0 < u1)
            up_units(w, p, l, e, u0, u1);
        before += units * cost;
    }
    DSV4_SYNC(w);
    return 0;
}

/* This worker's output columns of every expert, then their sum per token: no barrier between. */
static int down(dsv4_worker *w, struct dsv4_pass *p, const struct dsv4_layer *l) {
    const struct dsv4_config *c = &p->m->config;
    struct dsv4_workspace *ws = p->ws;
    int32_t d = c->hidden_size, width = c->moe_intermediate_size, per_tok = c->num_experts_per_tok + 1;
    const dsv4_bf16 **rows = dsv4_scratch(w, p, ws->at_small);
    int64_t lo, hi;
    dsv4_share(w, d, 16, &lo, &hi);
    for (int32_t e = 0; e <= c->n_routed_experts; e++) {
        int32_t first = ws->group_first[e], n = ws->group_first[e + 1] - first;
        struct dsv4_linear_job job = {&expert_at(p, l, e)->w2, ws->up_out + (ptrdiff_t)first * width,
                                      ws->expert_out + (ptrdiff_t)first * d, width, d, 0};
        if (n)
            dsv4_linear_rows(w, p, &job, NULL, n, (int32_t)lo, (int32_t)hi);
    }
    for (int32_t t = 0; t < p->n_tok && lo < hi && !dsv4_cancelled(w); t++) {
        for (int32_t j = 0; j < per_tok; j++)
            rows[j] = ws->expert_out + (ptrdiff_t)ws->tok_rows[t * per_tok + j] * d + lo;
        p->m->k.expert_sum(ws->y + (ptrdiff_t)t * d + lo, rows, per_tok, (int32_t)(hi - lo));
    }
    DSV4_SYNC(w);
    return 0;
}

int dsv4_moe(dsv4_worker *w, struct dsv4_pass *p, int32_t layer) {
    const struct dsv4_layer *l = &p->m->layers[layer];
    if (route(w, p, l))
        return 1;
    if (w->id == 0)
        group_rows(p);
    DSV4_SYNC(w);
    return up(w, p, l) || down(w, p, l);
}
