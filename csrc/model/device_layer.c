/* SPDX-License-Identifier: Apache-2.0 */
/* What a layer launches on the device: the same phases as hyper.c, attention.c, indexer.c and moe.c. */
#include "model/device_experts.h"
#include "model/device_sites.h"

/* Key lists, scores and parts of attention take room per token and entry: tokens are taken in turns that fit into this,
 * one at a time if need be. */
enum { SCRATCH_BYTES = 256 << 20, MOST_BLOCKS = 65535 /* tokens of a launch: CUDA's limit in y and z */ };

typedef struct dsv4_device_run run;

static const struct dsv4_config *config_of(const run *r) {
    return &r->d->model->config;
}

static const dsv4_bf16 *input_of(const run *r, const struct dsv4_weight *w) {
    return dsv4_rounds_input(r->d->model, w) ? r->d->b.u_quant : r->d->b.u_plain;
}

/* ------------------------------------------------------------------------------------------- streams around a sublayer */

static dsv4_status collapse(const run *r, const struct dsv4_hyper *h, const float *norm, float *pre) {
    const struct dsv4_config *c = config_of(r);
    const struct dsv4_device_buffers *b = &r->d->b;
    int32_t mixes = (2 + c->hc_mult) * c->hc_mult;
    int official = r->d->model->options.numerics == DSV4_OFFICIAL;
    struct dsv4_cuda_collapse_args collapse = {
        .x = b->u, .quant = official ? b->u_quant : NULL, .plain = b->u_plain, .post = b->post, .comb = b->comb, .pre = pre,
        .streams = b->streams, .dots = b->dots, .squares = b->squares, .scale = h->scale, .base = h->base, .norm = norm,
        .n_tok = r->n, .hc = c->hc_mult, .d_model = c->hidden_size, .sinkhorn_iters = c->hc_sinkhorn_iters,
        .norm_eps = c->rms_norm_eps, .hc_eps = c->hc_eps, .rms_eps = c->rms_norm_eps,
    };
    LAUNCH(r, linear, .n_job = 1, .n_tok = r->n, .tickets = b->tickets, .collapse = &collapse,
           .jobs = {dsv4_linear_job(&h->fn, b->streams, b->dots, (ptrdiff_t)c->hc_mult * c->hidden_size, mixes, 1)});
    return DSV4_OK;
}

/* What spreads a sublayer's output y, in the launch that makes it. */
static struct dsv4_cuda_spread_args spread_of(const run *r) {
    const struct dsv4_config *c = config_of(r);
    const struct dsv4_device_buffers *b = &r->d->b;
    return (struct dsv4_cuda_spread_args){
        .out = b->streams, .y = b->y, .streams = b->streams, .post = b->post, .comb = b->comb, .n_tok = r->n,
        .hc = c->hc_mult, .d_model = c->hidden_size,
    };
}

/* ----------------------------------------------------------------------------------------------------------- attention */

static dsv4_status project_input(const run *r, const struct dsv4_layer *l, int scored) {
    const struct dsv4_config *c = config_of(r);
    const struct dsv4_device_buffers *b = &r->d->b;
    ptrdiff_t d = c->hidden_size;
    int quant = dsv4_rounds_input(r->d->model, &l->wq_b);
    struct dsv4_cuda_rmsnorm_args norm = {.quant = quant ? b->qr_quant : NULL, .plain = quant ? NULL : b->qr_quant,
                                          .x = b->qa, .w = l->q_norm, .n_row = r->n, .n = c->q_lora_rank,
                                          .eps = c->rms_norm_eps};
    struct dsv4_cuda_linear_args a = {.n_tok = r->n, .tickets = b->tickets, .norm = &norm};
    a.jobs[a.n_job++] = dsv4_linear_job(&l->wq_a, input_of(r, &l->wq_a), b->qa, d, c->q_lora_rank, 0);
    a.jobs[a.n_job++] = dsv4_linear_job(&l->wkv, input_of(r, &l->wkv), b->kv_raw, d, c->head_dim, 0);
    if (l->kind != DSV4_SWA) {
        const struct dsv4_compressor *m = &l->compressor;
        a.jobs[a.n_job++] = dsv4_linear_job(&m->wkv, b->u_plain, b->comp_k, d, m->wkv.rows, 1);
        a.jobs[a.n_job++] = dsv4_linear_job(&m->wgate, b->u_plain, b->comp_gate, d, m->wgate.rows, 1);
    }
    if (l->kind == DSV4_CSA) {
        const struct dsv4_compressor *i = &l->index_compressor;
        a.jobs[a.n_job++] = dsv4_linear_job(&i->wkv, b->u_plain, b->icomp_k, d, i->wkv.rows, 1);
        a.jobs[a.n_job++] = dsv4_linear_job(&i->wgate, b->u_plain, b->icomp_gate, d, i->wgate.rows, 1);
    }
    if (scored)
        a.jobs[a.n_job++] = dsv4_linear_job(&l->weights_proj, b->u_plain, b->index_w, d, c->index_n_heads, 0);
    return dsv4_device_status(r->d, r->launches->linear(&a, r->d->stream), "linear", r->err);
}

/* Windows that end in a pass of this shape, of one compressor, at most. */
static int32_t most_windows(const run *r, int32_t ratio) {
    int32_t n = r->shape.n_tok / ratio + r->shape.n_piece;
    return n < r->shape.n_tok ? n : r->shape.n_tok;
}

static struct dsv4_cuda_windows_args windows_of(const run *r, const struct dsv4_layer *l, int32_t layer, int index) {
    const struct dsv4_config *c = config_of(r);
    const struct dsv4_device_buffers *b = &r->d->b;
    const struct dsv4_compressor *m = index ? &l->index_compressor : &l->compressor;
    return (struct dsv4_cuda_windows_args){
        .pass = r->pass, .new_k = index ? b->icomp_k : b->comp_k, .new_gate = index ? b->icomp_gate : b->comp_gate,
        .ape = m->ape, .norm = m->norm, .freq = r->d->freq_compressed, .ratio = m->ratio, .overlap = m->overlap,
        .dim = m->dim, .d_rope = c->qk_rope_head_dim, .slots = r->d->model->state[layer].rows, .index = index,
        .max_window = most_windows(r, m->ratio), .format = r->d->model->kv_format, .eps = c->rms_norm_eps,
    };
}

/* Queries and index queries; beside them what the other projections of the input are for: KV rows, windows that close. */
static dsv4_status make_queries(const run *r, const struct dsv4_layer *l, int32_t layer, int scored, const float *cos,
                                const float *sin) {
    const struct dsv4_config *c = config_of(r);
    const struct dsv4_device_buffers *b = &r->d->b;
    int32_t heads = c->num_attention_heads, pairs = c->qk_rope_head_dim / 2, iq = c->index_n_heads, id = c->index_head_dim;
    struct dsv4_cuda_norm_kv_args kv = {.kv_rows = b->kv_rows, .kv = b->kv_raw, .kv_norm = l->kv_norm, .cos = cos,
                                        .sin = sin, .n_tok = r->n, .d_head = c->head_dim, .d_rope = c->qk_rope_head_dim,
                                        .format = r->d->model->kv_format, .eps = c->rms_norm_eps};
    struct dsv4_cuda_windows_args windows[2];
    struct dsv4_cuda_headnorm_args norm = {.x = b->q, .cos = cos, .sin = sin, .n_row = r->n * heads, .n = c->head_dim,
                                           .per_tok = heads, .n_pair = pairs, .eps = c->rms_norm_eps};
    struct dsv4_cuda_index_args index = {.rows = b->index_q_rows, .x = b->index_q, .cos = cos, .sin = sin,
                                         .n_row = r->n * iq, .n = id, .per_tok = iq, .n_pair = pairs, .hadamard = 1};
    struct dsv4_cuda_linear_args a = {.n_tok = r->n, .tickets = b->tickets, .headnorm = &norm,
                                      .index = scored ? &index : NULL, .kv = &kv};
    for (int i = 0; i < (l->kind == DSV4_CSA ? 2 : l->kind == DSV4_HCA ? 1 : 0); i++) {
        windows[i] = windows_of(r, l, layer, i);
        a.windows[i] = &windows[i];
    }
    a.jobs[a.n_job++] = dsv4_linear_job(&l->wq_b, b->qr_quant, b->q, c->q_lora_rank, (ptrdiff_t)heads * c->head_dim, 0);
    if (scored)
        a.jobs[a.n_job++] = dsv4_linear_job(&l->index_wq_b, b->qr_quant, b->index_q, c->q_lora_rank, (ptrdiff_t)iq * id, 0);
    return dsv4_device_status(r->d, r->launches->linear(&a, r->d->stream), "linear", r->err);
}

/* The tokens from t on, as a pass of their own: pieces still count in the whole pass. */
static struct dsv4_cuda_pass from_token(const run *r, int32_t t, int32_t n) {
    struct dsv4_cuda_pass pass = r->pass;
    pass.piece_of += t;
    pass.positions += t;
    pass.n_tok = n;
    return pass;
}

/* Keys of a token, at most, and what attention takes for it. */
static int32_t max_keys(const struct dsv4_config *c, const struct dsv4_layer *l, int32_t context) {
    int32_t most = l->kind == DSV4_SWA ? 0 : l->kind == DSV4_CSA ? c->index_topk : context / l->compressor.ratio;
    return (c->sliding_window + most + 63) / 64 * 64;
}

static size_t attention_bytes(const struct dsv4_config *c, int32_t max_key) {
    return sizeof(void *) * (size_t)max_key + DSV4_CUDA_ATTENTION_SCRATCH(1, c->num_attention_heads, max_key) + 16;
}

/* Scratch for as many of the pass's tokens as fit, at `per_tok` bytes each; *n of them. */
static dsv4_status scratch(const run *r, size_t per_tok, int32_t *n) {
    struct dsv4_device *d = r->d;
    size_t most = SCRATCH_BYTES / per_tok, bytes;
    most = most < MOST_BLOCKS ? most : MOST_BLOCKS;
    *n = most < 1 ? 1 : most < (size_t)r->n ? (int32_t)most : r->n;
    size_t more = 1; /* a power of two: graphs that hold the old memory go with it, so it rarely moves */
    while (more < (size_t)*n)
        more *= 2;
    bytes = per_tok * (more < most ? more : (size_t)*n);
    if (per_tok * (size_t)*n <= d->scratch_bytes)
        return DSV4_OK;
    void *memory; /* the old one goes first: never more than dsv4_device_scratch_bytes */
    dsv4_graphs_drop(d);
    d->plugin->runtime.release(d->scratch);
    d->scratch = NULL;
    d->scratch_bytes = 0;
    dsv4_status status = dsv4_device_status(d, d->plugin->runtime.allocate(&memory, bytes), "memory for attention", r->err);
    if (status != DSV4_OK) {
        dsv4_graphs_forget(d); /* every shape allocates again, which a capture must not */
        return status;
    }
    d->scratch = memory;
    d->scratch_bytes = bytes;
    return DSV4_OK;
}

size_t dsv4_device_scratch_bytes(const dsv4_model *m) {
    const struct dsv4_config *c = &m->config;
    size_t most = 0, chunk = 1;
    while (chunk < (size_t)m->options.chunk_tok)
        chunk *= 2;
    for (int32_t i = 0; i < c->num_hidden_layers; i++) {
        int32_t ratio = c->compress_ratios[i], entries = ratio ? c->max_position_embeddings / ratio : 0;
        size_t scores = m->layers[i].kind == DSV4_CSA ? sizeof(float) * (((size_t)entries + 64) / 64 * 64) : 0;
        size_t keys = attention_bytes(c, max_keys(c, &m->layers[i], c->max_position_embeddings));
        size_t each = scores > keys ? scores : keys, all = each * chunk;
        all = all < SCRATCH_BYTES ? all : each > SCRATCH_BYTES ? each : SCRATCH_BYTES;
        most = all > most ? all : most;
    }
    return most;
}

/* CSA: the entries each token attends to; without scores all it sees. */
static dsv4_status choose_entries(run *r, const struct dsv4_layer *l, int32_t layer, int scored) {
    const struct dsv4_config *c = config_of(r);
    const struct dsv4_device_buffers *b = &r->d->b;
    int32_t ratio = l->compressor.ratio, iq = c->index_n_heads, entries = r->shape.context / ratio, n;
    entries = (entries + 64) / 64 * 64;
    DSV4_TRY(scratch(r, sizeof(float) * (size_t)entries, &n));
    float *scores = (float *)(void *)r->d->scratch;
    for (int32_t t = 0; t < r->n; t += n) {
        n = n < r->n - t ? n : r->n - t;
        struct dsv4_cuda_top_k_args choice = {
            .ids = b->selected + (ptrdiff_t)t * c->index_topk, .n_id = b->n_selected + t, .scores = scores,
            .positions = b->positions + t, .n_tok = n, .k = c->index_topk, .ratio = ratio, .max_entry = entries,
        };
        if (scored)
            LAUNCH(r, scores, .pass = from_token(r, t, n), .scores = scores,
                   .q = b->index_q_rows + (size_t)t * (size_t)iq * r->d->model->index_row,
                   .head_w = b->index_w + (ptrdiff_t)t * iq, .bad = b->bad, .w_scale = r->d->model->index_w_scale,
                   .n_head = iq, .d_index = c->index_head_dim, .ratio = ratio, .top_k = c->index_topk,
                   .max_entry = entries, .layer = layer, .tickets = b->tickets, .choice = &choice);
        else
            DSV4_TRY(dsv4_device_status(r->d, r->launches->top_k(&choice, r->d->stream), "top_k", r->err));
        DSV4_TRY(dsv4_device_at_scores(r, layer, scores, entries, t, n));
    }
    return DSV4_OK;
}

static dsv4_status attend(run *r, const struct dsv4_layer *l, int32_t layer, const float *cos, const float *sin) {
    const struct dsv4_config *c = config_of(r);
    const struct dsv4_device_buffers *b = &r->d->b;
    int32_t heads = c->num_attention_heads, hd = c->head_dim, pairs = c->qk_rope_head_dim / 2, n;
    int32_t max_key = max_keys(c, l, r->shape.context);
    size_t keys_bytes = sizeof(void *) * (size_t)max_key;
    int seen = dsv4_asked(r->p, layer, DSV4_SITE_HEADS);
    DSV4_TRY(scratch(r, attention_bytes(c, max_key), &n));
    for (int32_t t = 0; t < r->n; t += n) {
        n = n < r->n - t ? n : r->n - t;
        const uint8_t **keys = (const uint8_t **)(void *)r->d->scratch;
        ptrdiff_t first = (ptrdiff_t)t * heads * hd;
        struct dsv4_cuda_keys_args list = {
            .pass = from_token(r, t, n), .keys = keys, .n_key = b->n_key + t, .new_rows = b->kv_rows,
            .selected = l->kind == DSV4_CSA ? b->selected + (ptrdiff_t)t * c->index_topk : NULL,
            .n_selected = l->kind == DSV4_CSA ? b->n_selected + t : NULL, .top_k = c->index_topk,
            .ratio = l->kind == DSV4_HCA ? l->compressor.ratio : 0, .window = c->sliding_window, .max_key = max_key,
            .kv_row = r->d->model->kv_row,
        };
        LAUNCH(r, attention, .out = b->o + first, .q = b->q + first, .list = &list, .cos = cos + (ptrdiff_t)t * pairs,
               .sin = sin + (ptrdiff_t)t * pairs, .sink = l->sink, .scratch = r->d->scratch + keys_bytes * (size_t)n,
               .tickets = b->tickets, .n_tok = n, .n_head = heads, .d_head = hd, .d_rope = c->qk_rope_head_dim,
               .max_key = max_key, .flush = !seen, .scale = r->d->model->softmax_scale, .format = r->d->model->kv_format);
    }
    if (seen) { /* what a trace shows is not flushed */
        DSV4_TRY(dsv4_device_at_heads(r, layer));
        LAUNCH(r, act, .out = b->o, .x = b->o, .n_row = r->n, .n = heads * hd);
    }
    return DSV4_OK;
}

/* What the next pass needs of this one: after attention, which reads what it overwrites. */
static struct dsv4_cuda_keep_args keep_of(const run *r, const struct dsv4_layer *l, int32_t layer) {
    const struct dsv4_device_buffers *b = &r->d->b;
    int compressed = l->kind != DSV4_SWA, csa = l->kind == DSV4_CSA;
    return (struct dsv4_cuda_keep_args){
        .pass = r->pass, .kv_rows = b->kv_rows, .k = compressed ? b->comp_k : NULL, .gate = compressed ? b->comp_gate : NULL,
        .index_k = csa ? b->icomp_k : NULL, .index_gate = csa ? b->icomp_gate : NULL,
        .window = config_of(r)->sliding_window, .slots = r->d->model->state[layer].rows,
        .width = compressed ? l->compressor.wkv.rows : 0, .index_width = csa ? l->index_compressor.wkv.rows : 0,
        .kv_row = r->d->model->kv_row,
    };
}

static dsv4_status project_output(const run *r, const struct dsv4_layer *l, int32_t layer) {
    const struct dsv4_config *c = config_of(r);
    const struct dsv4_device_buffers *b = &r->d->b;
    int32_t low = c->o_groups * c->o_lora_rank;
    ptrdiff_t all = (ptrdiff_t)c->num_attention_heads * c->head_dim;
    struct dsv4_cuda_linear_job wo_a = dsv4_linear_job(&l->wo_a, b->o, b->z, all, low, 0);
    wo_a.group_rows = c->o_lora_rank;
    wo_a.group_x = (int32_t)(all / c->o_groups);
    struct dsv4_cuda_act_args act = {.out = b->z_quant, .x = b->z, .n_row = r->n, .n = low,
                                     .quant = dsv4_rounds_input(r->d->model, &l->wo_b)};
    struct dsv4_cuda_spread_args spread = spread_of(r);
    struct dsv4_cuda_keep_args keep = keep_of(r, l, layer);
    LAUNCH(r, linear, .n_job = 1, .n_tok = r->n, .jobs = {wo_a}, .tickets = b->tickets, .act = &act, .keep = &keep);
    LAUNCH(r, linear, .n_job = 1, .n_tok = r->n, .tickets = b->tickets, .spread = &spread,
           .jobs = {dsv4_linear_job(&l->wo_b, b->z_quant, b->y, low, c->hidden_size, 0)});
    return DSV4_OK;
}

static dsv4_status attention(run *r, const struct dsv4_layer *l, int32_t layer) {
    const struct dsv4_device_buffers *b = &r->d->b;
    const float *cos = l->kind == DSV4_SWA ? b->cos_main : b->cos_comp;
    const float *sin = l->kind == DSV4_SWA ? b->sin_main : b->sin_comp;
    int scored = dsv4_device_scored(r, l);
    DSV4_TRY(project_input(r, l, scored));
    DSV4_TRY(make_queries(r, l, layer, scored, cos, sin));
    if (l->kind == DSV4_CSA)
        DSV4_TRY(choose_entries(r, l, layer, scored));
    DSV4_TRY(attend(r, l, layer, cos, sin));
    return project_output(r, l, layer);
}

/* ----------------------------------------------------------------------------------------------------------------- MoE */

static int32_t tile_rows(const run *r, const struct dsv4_device_layer *dl) {
    if (r->p->prompt && dl->mma_kinds)
        return DSV4_CUDA_MMA_TILE;
    return r->n <= DSV4_CUDA_FEW_TILE ? DSV4_CUDA_FEW_TILE : DSV4_CUDA_MANY_TILE;
}

/* The experts of every token, and their rows. */
static dsv4_status route(const run *r, const struct dsv4_device_layer *dl, int32_t layer) {
    const struct dsv4_layer *l = &dl->l;
    const struct dsv4_config *c = config_of(r);
    const struct dsv4_device_buffers *b = &r->d->b;
    int32_t n_exp = c->n_routed_experts, top_k = c->num_experts_per_tok;
    struct dsv4_cuda_router_args router = {
        .ids = b->expert_ids, .weights = b->expert_weights, .scores = b->router_scores, .logits = b->router_logits,
        .bias = l->gate_bias, .table = l->tid2eid, .tokens = b->ids, .n_tok = r->n, .n_exp = n_exp, .top_k = top_k,
        .table_bytes = l->tid2eid_bytes, .route_scale = c->routed_scaling_factor,
    };
    struct dsv4_cuda_group_args group = {
        .group_first = b->group_first, .row_tok = b->row_tok, .row_weight = b->row_weight, .tok_rows = b->tok_rows,
        .tiles = b->tiles, .n_tile = b->n_tile, .uses = dsv4_beside_uses(r->d, layer), .ids = b->expert_ids,
        .weights = b->expert_weights, .n_tok = r->n, .n_exp = n_exp, .top_k = top_k, .tile_tok = tile_rows(r, dl),
    };
    LAUNCH(r, linear, .n_job = 1, .n_tok = r->n, .tickets = b->tickets, .router = &router, .group = &group,
           .jobs = {dsv4_linear_job(&l->gate, b->u_plain, b->router_logits, c->hidden_size, n_exp, 1)});
    return DSV4_OK;
}

/* Rows [row, row + n_row) and the tiles that they are; all: every row of the pass, none elsewhere. */
struct stretch {
    int32_t tile, n_tile, row, n_row, all;
};

static struct dsv4_cuda_expert_sum_args sum_of(const run *r) {
    const struct dsv4_config *c = config_of(r);
    const struct dsv4_device_buffers *b = &r->d->b;
    return (struct dsv4_cuda_expert_sum_args){.out = b->y, .rows = b->expert_out, .tok_rows = b->tok_rows, .n_tok = r->n,
                                              .per_tok = c->num_experts_per_tok + 1, .n = c->hidden_size};
}

/* Up, gate, activation and down of rows that are experts' on the device. */
static dsv4_status products(const run *r, const struct dsv4_device_layer *dl, const struct dsv4_expert_tables *w,
                            const struct stretch *s) {
    const struct dsv4_config *c = config_of(r);
    const struct dsv4_device_buffers *b = &r->d->b;
    const dsv4_model *m = r->d->model;
    int32_t width = c->moe_intermediate_size, d = c->hidden_size, tile = tile_rows(r, dl);
    const dsv4_bf16 *quant = m->options.numerics == DSV4_OFFICIAL ? b->u_quant : b->u_plain;
    const struct dsv4_cuda_tile *tiles = b->tiles + s->tile;
    ptrdiff_t first = (ptrdiff_t)s->row * width;
    struct dsv4_cuda_swiglu_args swiglu = {
        .out = b->up_out + first, .g = b->gate_out + first, .u = b->up_out + first, .weights = b->row_weight + s->row,
        .n_row = s->n_row, .n = width, .first_shared = r->n * c->num_experts_per_tok - s->row, .limit = c->swiglu_limit,
        .shared_limit = m->options.april_shared ? dsv4_f32_from_bits(0x7f800000u) : c->swiglu_limit,
        .quant = dl->quant_down, .shared_quant = dl->quant_shared,
    };
    struct dsv4_cuda_expert_sum_args sum = sum_of(r);
    struct dsv4_cuda_spread_args spread = spread_of(r);
    LAUNCH(r, experts, .w = {w->w1, w->w3}, .out = {b->gate_out, b->up_out}, .x_quant = quant, .x_plain = b->u_plain,
           .row_tok = b->row_tok, .tiles = tiles, .n_tile = b->n_tile, .max_tile = s->n_tile, .tile_tok = tile,
           .rows = width, .cols = d, .n_tok = r->n, .kinds = dl->mma_kinds, .tickets = b->tickets, .swiglu = &swiglu);
    LAUNCH(r, experts, .w = {w->w2, NULL}, .out = {b->expert_out, NULL}, .x_quant = b->up_out, .x_plain = b->up_out,
           .tiles = tiles, .n_tile = b->n_tile, .max_tile = s->n_tile, .tile_tok = tile, .rows = d, .cols = width,
           .n_tok = r->n, .kinds = dl->mma_kinds, .tickets = b->tickets, .sum = s->all ? &sum : NULL, .spread = s->all ? &spread : NULL);
    return DSV4_OK;
}

/* The experts that the device has; where it has all (`all`), with what follows. */
static dsv4_status experts(const run *r, const struct dsv4_device_layer *dl, int all) {
    const struct dsv4_config *c = config_of(r);
    int32_t top_k = c->num_experts_per_tok, most = DSV4_CUDA_TILES(r->n, c->n_routed_experts, top_k, tile_rows(r, dl));
    return products(r, dl, &(struct dsv4_expert_tables){dl->w1, dl->w3, dl->w2},
                    &(struct stretch){.n_tile = most, .n_row = r->n * (top_k + 1), .all = all});
}

/* Only in passes whose tiles are of the larger kinds: swiglu is a launch of its own then. */
DSV4_STATIC_ASSERT((int)DSV4_FEW_TOKENS >= (int)DSV4_CUDA_FEW_TILE, "experts that are uploaded have more rows");
dsv4_status dsv4_device_expert(const run *r, const struct dsv4_device_layer *dl, const struct dsv4_expert_tables *w,
                               const int32_t *first, int32_t e) {
    int32_t tile = tile_rows(r, dl);
    struct stretch s = {.row = first[e], .n_row = first[e + 1] - first[e]};
    for (int32_t i = 0; i < e; i++)
        s.tile += (first[i + 1] - first[i] + tile - 1) / tile;
    s.n_tile = (s.n_row + tile - 1) / tile;
    return products(r, dl, w, &s);
}

/* The sum of all experts, wherever their rows were made, and its spread. */
static dsv4_status join(const run *r) {
    struct dsv4_cuda_expert_sum_args sum = sum_of(r);
    struct dsv4_cuda_spread_args spread = spread_of(r);
    DSV4_TRY(dsv4_beside_receive(r));
    DSV4_TRY(dsv4_device_status(r->d, r->launches->expert_sum(&sum, r->d->stream), "expert_sum", r->err));
    return dsv4_device_status(r->d, r->launches->spread(&spread, r->d->stream), "spread", r->err);
}

/* ----------------------------------------------------------------------------------------------------------- the layer */

dsv4_status dsv4_device_half_layer(run *r, int32_t half) {
    int32_t layer = half / 2;
    const struct dsv4_device_layer *dl = &r->d->layers[layer];
    int beside = dsv4_beside_at(r->d, layer);
    if (half % 2) {
        DSV4_TRY(beside ? join(r) : experts(r, dl, 1));
        DSV4_TRY(dsv4_device_at_ffn(r, layer));
        return dsv4_device_at_streams(r, layer, DSV4_SITE_STREAMS);
    }
    r->pass.states = r->d->b.states + (ptrdiff_t)(layer - r->d->first_layer) * r->p->n_piece;
    DSV4_TRY(dsv4_device_at_streams(r, layer, DSV4_SITE_STREAMS_IN));
    DSV4_TRY(collapse(r, &dl->l.hc_attn, dl->l.attn_norm, dsv4_device_pre(r, layer, DSV4_SITE_ATTENTION_MIX)));
    DSV4_TRY(attention(r, &dl->l, layer));
    DSV4_TRY(dsv4_device_at_attention(r, layer));
    DSV4_TRY(dsv4_device_at_streams(r, layer, DSV4_SITE_STREAMS_MID));
    DSV4_TRY(collapse(r, &dl->l.hc_ffn, dl->l.ffn_norm, dsv4_device_pre(r, layer, DSV4_SITE_FFN_MIX)));
    DSV4_TRY(route(r, dl, layer));
    if (!beside)
        return DSV4_OK;
    DSV4_TRY(dsv4_beside_send(r, layer));
    return experts(r, dl, 0);
}
