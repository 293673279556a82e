/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The mixture of experts (SPEC 4): router, rows grouped by expert, up and gate, SwiGLU, down, sum.  The shared expert is
 * one more expert, the last, that takes every token.
 */
#include "model/edit.h"
#include "model/experts.h"
#include "model/part.h"
#include "model/sites.h"

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

static int route(dsv4_worker *w, struct dsv4_pass *p, const struct dsv4_layer *l, int32_t layer) {
    const struct dsv4_config *c = &p->m->config;
    struct dsv4_workspace *ws = p->ws;
    struct dsv4_prepared *b = dsv4_prepared(w, p);
    int32_t n_exp = c->n_routed_experts, top_k = c->num_experts_per_tok;
    struct dsv4_linear_job job = {&l->gate, b->u_plain, ws->router_logits, c->hidden_size, n_exp, 1};
    int64_t lo, hi;
    dsv4_linear_jobs(w, p, &job, 1);
    DSV4_SYNC(w, p);
    dsv4_share_tokens(w, p, &lo, &hi);
    for (int64_t t = lo; t < hi; t++) {
        int32_t *forced = dsv4_scratch(w, p, ws->at_small);
        if (l->tid2eid)
            hash_ids(l, p->ids[t], top_k, forced);
        struct dsv4_router_args args = {
            .ids = b->expert_ids + t * top_k, .weights = b->expert_weights + t * top_k,
            .scores = b->router_scores + t * n_exp, .logits = ws->router_logits + t * n_exp, .bias = l->gate_bias,
            .forced = l->tid2eid ? forced : NULL, .n_exp = n_exp, .top_k = top_k,
            .route_scale = c->routed_scaling_factor,
        };
        if (dsv4_edited(p))
            dsv4_edit_route(p, layer, t, &args, dsv4_scratch(w, p, ws->at_edit));
        else
            p->m->k.router(&args);
        if (dsv4_asked(p, layer, DSV4_SITE_ROUTER))
            dsv4_at(w, p, &(struct dsv4_sight){.site = DSV4_SITE_ROUTER, .layer = layer, .tok = (int32_t)t,
                                               .ids = b->expert_ids + t * top_k,
                                               .weights = b->expert_weights + t * top_k,
                                               .scores = b->router_scores + t * n_exp, .n = n_exp});
    }
    DSV4_SYNC_TOKENS(w, p);
    return 0;
}

/* A counting sort of (token, choice) by expert; expert rows of a token come out in ascending expert order. */
static void group_rows(const struct dsv4_pass *p, struct dsv4_prepared *b) {
    const struct dsv4_config *c = &p->m->config;
    int32_t n_exp = c->n_routed_experts, top_k = c->num_experts_per_tok, per_tok = top_k + 1;
    int32_t *first = b->group_first;
    memset(first, 0, (size_t)(n_exp + 2) * sizeof *first);
    for (int32_t i = 0; i < p->n_tok * top_k; i++)
        first[b->expert_ids[i] + 1]++;
    for (int32_t e = 0; e < n_exp; e++)
        first[e + 1] += first[e];
    first[n_exp + 1] = first[n_exp] + p->n_tok;
    for (int32_t t = 0; t < p->n_tok; t++) {
        for (int32_t j = 0; j < top_k; j++) {
            int32_t row = first[b->expert_ids[t * top_k + j]]++;
            b->row_tok[row] = t;
            b->row_weight[row] = b->expert_weights[t * top_k + j];
        }
    }
    for (int32_t e = n_exp; e > 0; e--) /* undo the advance */
        first[e] = first[e - 1];
    first[0] = 0;
    int32_t shared = first[n_exp];
    for (int32_t t = 0; t < p->n_tok; t++) {
        b->row_tok[shared + t] = t;
        b->row_weight[shared + t] = 1.0f;
        b->tok_rows[t * per_tok] = 0; /* counts during the next loop */
    }
    /* rows are in ascending expert order, so each token meets its rows in that order */
    for (int32_t row = 0; row < shared; row++) {
        int32_t *list = b->tok_rows + b->row_tok[row] * per_tok;
        int32_t n = list[0]++;
        if (n < top_k) /* slot 0 holds the count until the end: keep the first row in the last slot */
            list[n == 0 ? top_k : n] = row;
    }
    for (int32_t t = 0; t < p->n_tok; t++) {
        int32_t *list = b->tok_rows + t * per_tok;
        list[0] = list[top_k];
        list[top_k] = shared + t;
    }
}

static const struct dsv4_expert *expert_at(const struct dsv4_pass *p, const struct dsv4_layer *l, int32_t e) {
    return e < p->m->config.n_routed_experts ? &l->experts[e] : &l->shared;
}

/*
 * Work on experts is cut into units of one group of columns, contiguous, weighed by what a unit costs: reading its
 * weights (as much as a few tokens' arithmetic) plus its tokens.  The units of all experts lie in a line, the shared
 * expert first: with several tokens it is bound by arithmetic and the others by memory, so both limits are used at once.
 * Of one token every worker has an even part; of more, whoever is done takes the next (dsv4_take).
 */
enum { UNIT = DSV4_ACT_GROUP };

typedef void units_fn(dsv4_worker *w, struct dsv4_pass *p, const struct dsv4_layer *l, int32_t e, int64_t u0, int64_t u1);

struct line {
    units_fn *run;
    int32_t width; /* columns of each expert */
    int second;    /* of w2; else of w1 and w3 */
    int64_t lo, hi, total; /* units of each expert on this node; the cost of all */
    int32_t at;            /* the item at work, and the cost of those before it */
    int64_t before;
};

static int32_t expert_of(const struct dsv4_pass *p, int32_t item) {
    return item ? item - 1 : p->m->config.n_routed_experts;
}

static int64_t item_cost(const struct line *line, const struct dsv4_pass *p, const struct dsv4_prepared *b,
                         const struct dsv4_layer *l, int32_t item) {
    static const int32_t reading[DSV4_W_FORMATS] = {8, 4, 16, 32};
    int32_t e = expert_of(p, item), rows = b->group_first[e + 1] - b->group_first[e];
    const struct dsv4_expert *x = expert_at(p, l, e);
    return rows ? (line->hi - line->lo) * (rows + reading[(line->second ? x->w2 : x->w1).format]) : 0;
}

/* The units that begin in [from, to) of the line; not before those of the call before. */
static void run_part(struct line *line, dsv4_worker *w, struct dsv4_pass *p, const struct dsv4_layer *l, int64_t from,
                     int64_t to) {
    const struct dsv4_prepared *b = dsv4_prepared(w, p);
    int64_t units = line->hi - line->lo, u0, u1;
    for (;; line->at++) {
        int64_t all = item_cost(line, p, b, l, line->at), end = line->before + all;
        if (all) {
            dsv4_units_in(from, to, line->before, all / units, units, &u0, &u1);
            if (u0 < u1)
                line->run(w, p, l, expert_of(p, line->at), line->lo + u0, line->lo + u1);
        }
        if (to <= end)
            return;
        line->before = end;
    }
}

static void run_line(struct line *line, dsv4_worker *w, struct dsv4_pass *p, const struct dsv4_layer *l,
                     _Atomic int64_t *taken) {
    const struct dsv4_prepared *b = dsv4_prepared(w, p);
    int64_t from, to, id = w->id - w->node_first;
    dsv4_share_node(w, (line->width + UNIT - 1) / UNIT, &line->lo, &line->hi);
    for (int32_t i = 0; i <= p->m->config.n_routed_experts; i++)
        line->total += item_cost(line, p, b, l, i);
    if (!line->total)
        return;
    if (p->n_tok == 1)
        run_part(line, w, p, l, line->total * id / w->node_n, line->total * (id + 1) / w->node_n);
    else
        while (!dsv4_cancelled(w) && dsv4_take(w, &taken[w->node_first], line->total, &from, &to))
            run_part(line, w, p, l, from, to);
}

/* Units [u0, u1) of expert e: both projections, the activation, and its rounding for w2. */
static void up_units(dsv4_worker *w, struct dsv4_pass *p, const struct dsv4_layer *l, int32_t e, int64_t u0, int64_t u1) {
    const struct dsv4_config *c = &p->m->config;
    const struct dsv4_expert *x = expert_at(p, l, e);
    struct dsv4_workspace *ws = p->ws;
    const struct dsv4_prepared *b = dsv4_prepared(w, p);
    int32_t first = b->group_first[e], n = b->group_first[e + 1] - first, width = c->moe_intermediate_size;
    int32_t r0 = (int32_t)u0 * UNIT, r1 = (int32_t)u1 * UNIT < width ? (int32_t)u1 * UNIT : width;
    int shared = e == c->n_routed_experts;
    float limit = shared && p->m->options.april_shared ? dsv4_f32_from_bits(0x7f800000u) : c->swiglu_limit;
    const dsv4_bf16 *u1x = dsv4_rounds_input(p->m, &x->w1) ? b->u_quant : b->u_plain;
    const dsv4_bf16 *u3x = dsv4_rounds_input(p->m, &x->w3) ? b->u_quant : b->u_plain;
    struct dsv4_linear_job gate = {&x->w1, u1x, ws->gate_out + (ptrdiff_t)first * width, c->hidden_size, width, 0};
    struct dsv4_linear_job up = {&x->w3, u3x, ws->up_out + (ptrdiff_t)first * width, c->hidden_size, width, 0};
    dsv4_linear_rows(w, p, &gate, b->row_tok + first, n, r0, r1);
    dsv4_linear_rows(w, p, &up, b->row_tok + first, n, r0, r1);
    for (int32_t i = first; i < first + n && !dsv4_cancelled(w); i++) {
        dsv4_bf16 *h = ws->gate_out + (ptrdiff_t)i * width + r0;
        p->m->k.swiglu(h, h, ws->up_out + (ptrdiff_t)i * width + r0, r1 - r0, limit, b->row_weight[i]);
        dsv4_operand_of(p->m, &x->w2, ws->up_out + (ptrdiff_t)i * width + r0, h, r1 - r0);
    }
}

static int up(dsv4_worker *w, struct dsv4_pass *p, const struct dsv4_layer *l) {
    struct line line = {.run = up_units, .width = p->m->config.moe_intermediate_size};
    run_line(&line, w, p, l, p->ws->taken_up);
    DSV4_SYNC(w, p);
    return 0;
}

/* Columns [c0, c1) of the rows of expert e. */
static void down_columns(dsv4_worker *w, struct dsv4_pass *p, const struct dsv4_layer *l, int32_t e, int32_t c0, int32_t c1) {
    const struct dsv4_config *c = &p->m->config;
    const struct dsv4_prepared *b = dsv4_prepared(w, p);
    int32_t d = c->hidden_size, width = c->moe_intermediate_size;
    int32_t first = b->group_first[e], n = b->group_first[e + 1] - first;
    struct dsv4_linear_job job = {&expert_at(p, l, e)->w2, p->ws->up_out + (ptrdiff_t)first * width,
                                  p->ws->expert_out + (ptrdiff_t)first * d, width, d, 0};
    if (n)
        dsv4_linear_rows(w, p, &job, NULL, n, c0, c1);
}

static void down_units(dsv4_worker *w, struct dsv4_pass *p, const struct dsv4_layer *l, int32_t e, int64_t u0, int64_t u1) {
    int32_t d = p->m->config.hidden_size;
    down_columns(w, p, l, e, (int32_t)u0 * UNIT, (int32_t)u1 * UNIT < d ? (int32_t)u1 * UNIT : d);
}

/* Of one token this worker's columns of every expert, which it will sum: no barrier between. */
static int down(dsv4_worker *w, struct dsv4_pass *p, const struct dsv4_layer *l) {
    int32_t lo, hi;
    if (p->n_tok > 1) {
        struct line line = {.run = down_units, .width = p->m->config.hidden_size, .second = 1};
        run_line(&line, w, p, l, p->ws->taken_down);
        DSV4_SYNC(w, p);
        return 0;
    }
    dsv4_share_columns(w, p, &lo, &hi);
    for (int32_t e = 0; e <= p->m->config.n_routed_experts; e++)
        down_columns(w, p, l, e, lo, hi);
    return 0;
}

/* The sum per token of this worker's columns. */
static void sum(dsv4_worker *w, struct dsv4_pass *p) {
    struct dsv4_workspace *ws = p->ws;
    const struct dsv4_prepared *b = dsv4_prepared(w, p);
    int32_t d = p->m->config.hidden_size, per_tok = p->m->config.num_experts_per_tok + 1, lo, hi;
    const dsv4_bf16 **rows = dsv4_scratch(w, p, ws->at_small);
    dsv4_share_columns(w, p, &lo, &hi);
    for (int32_t t = 0; t < p->n_tok && lo < hi && !dsv4_cancelled(w); t++) {
        for (int32_t j = 0; j < per_tok; j++)
            rows[j] = ws->expert_out + (ptrdiff_t)b->tok_rows[t * per_tok + j] * d + lo;
        p->m->k.expert_sum(ws->y + (ptrdiff_t)t * d + lo, rows, per_tok, hi - lo);
    }
}

int dsv4_moe_rows(dsv4_worker *w, struct dsv4_pass *p, int32_t layer) {
    const struct dsv4_layer *l = &p->m->layers[layer];
    /* nobody takes of these lines any more: there was a barrier behind each */
    if (w->id == w->node_first) {
        p->ws->taken_up[w->id] = 0;
        p->ws->taken_down[w->id] = 0;
    }
    if (p->m->cache) {
        if (w->id == 0)
            dsv4_experts_fetch(w, p, layer);
        DSV4_SYNC(w, p);
    } else {
        DSV4_SYNC_TOKENS(w, p);
    }
    return up(w, p, l) || down(w, p, l);
}

int dsv4_moe_route(dsv4_worker *w, struct dsv4_pass *p, int32_t layer) {
    return route(w, p, &p->m->layers[layer], layer);
}

int dsv4_moe_expert(dsv4_worker *w, struct dsv4_pass *p, int32_t layer, int32_t e, const float *weights) {
    struct dsv4_prepared *b = dsv4_prepared(w, p);
    if (w->id == 0 || p->n_tok == 1) {
        for (int32_t i = 0; i < p->m->config.n_routed_experts + 2; i++)
            b->group_first[i] = i > e ? p->n_tok : 0;
        for (int32_t t = 0; t < p->n_tok; t++) {
            b->row_tok[t] = t;
            b->row_weight[t] = weights[t];
        }
    }
    return dsv4_moe_rows(w, p, layer);
}

int dsv4_moe(dsv4_worker *w, struct dsv4_pass *p, int32_t layer) {
    if (dsv4_moe_route(w, p, layer))
        return 1;
    if (w->id == 0 || p->n_tok == 1)
        group_rows(p, dsv4_prepared(w, p));
    if (dsv4_moe_rows(w, p, layer))
        return 1;
    sum(w, p);
    return 0;
}
