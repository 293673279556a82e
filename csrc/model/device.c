/* SPDX-License-Identifier: Apache-2.0 */
/* Weights and buffers of a stage on its device: laid out in one block each, counted before anything is allocated. */
#include "model/device_experts.h"

#include <stdlib.h>
#include <string.h>

#include "core/arena.h"
#include "model/device_sites.h"

enum { ALIGN = 256, USUAL_CONTEXT = 4096 };

static dsv4_status remember(struct dsv4_device *d, dsv4_status status, const dsv4_error *err) {
    if (status == DSV4_E_DEVICE && d->pipeline->dead.code == DSV4_OK)
        d->pipeline->dead = *err;
    return status;
}

dsv4_status dsv4_device_status(struct dsv4_device *d, int code, const char *doing, dsv4_error *err) {
    return code == 0 ? DSV4_OK : remember(d, dsv4_cuda_status(d->plugin, code, doing, err), err);
}

dsv4_status dsv4_device_prepare(struct dsv4_device *d, dsv4_error *err) {
    return dsv4_device_status(d, d->plugin->runtime.prepare(d->number), "the device", err);
}

/* A block of the device that is filled from its start: first only counted (base NULL), then for real. */
struct placing {
    struct dsv4_device *d;
    uint8_t *base;
    size_t used;
    size_t total, told; /* all of it, and how much was copied when the caller was last told */
    dsv4_error *err;
    dsv4_status status; /* of the first failure */
};

enum { PART_BYTES = 32 << 20 }; /* between two looks at whether the load goes on */

static void *take(struct placing *p, uint64_t bytes) {
    uint8_t *at = p->base ? p->base + p->used : NULL;
    p->used += (bytes + ALIGN - 1) / ALIGN * ALIGN;
    return at;
}

/* `copied` bytes of the block are there. */
static dsv4_status tell(struct placing *p, size_t copied) {
    const struct dsv4_options *o = &p->d->model->options;
    if (copied - p->told < PART_BYTES && copied < p->total)
        return DSV4_OK;
    p->told = copied;
    if (o->progress && o->progress(o->progress_arg, copied, p->total))
        return dsv4_fail(p->err, DSV4_E_CANCELLED, "the load was cancelled");
    return DSV4_OK;
}

static dsv4_status send(struct placing *p, uint8_t *to, const uint8_t *from, size_t bytes) {
    for (size_t at = 0, n; at < bytes; at += n) {
        n = bytes - at < PART_BYTES ? bytes - at : PART_BYTES;
        DSV4_TRY(dsv4_device_status(p->d, p->d->plugin->runtime.upload(to + at, from + at, n, p->d->stream),
                                    "copying weights", p->err));
        DSV4_TRY(tell(p, at + n < bytes ? (size_t)(to + at + n - p->base) : p->used));
    }
    return DSV4_OK;
}

static const void *copy(struct placing *p, const void *from, uint64_t bytes) {
    void *to = take(p, bytes);
    if (to && bytes && p->status == DSV4_OK)
        p->status = send(p, to, from, bytes);
    if (to && bytes && p->status == DSV4_OK)
        p->status = dsv4_device_note(p->d, from, to, bytes, p->err);
    return to;
}

/* ------------------------------------------------------------------------------------------------------------- weights */

static void weight(struct placing *p, struct dsv4_weight *w) {
    w->data = copy(p, w->data, dsv4_weight_bytes(w));
    if (w->scale)
        w->scale = copy(p, w->scale, dsv4_scale_bytes(w));
}

static void vector(struct placing *p, const float **v, int64_t n) {
    *v = copy(p, *v, (uint64_t)n * sizeof **v);
}

static void hyper(struct placing *p, struct dsv4_hyper *h, int32_t mixes, int32_t scales) {
    weight(p, &h->fn);
    vector(p, &h->base, mixes);
    vector(p, &h->scale, scales);
}

static void compressor(struct placing *p, struct dsv4_compressor *c) {
    int64_t width = (int64_t)c->dim * (c->overlap ? 2 : 1);
    weight(p, &c->wkv);
    weight(p, &c->wgate);
    vector(p, &c->ape, width * c->ratio);
    vector(p, &c->norm, c->dim);
}

/* The weights of all experts that are to be there, and on the device a table of each projection. */
static void experts(struct placing *p, struct dsv4_device_layer *out, const struct dsv4_layer *l, int32_t layer) {
    size_t n = (size_t)p->d->model->config.n_routed_experts + 1, bytes = n * sizeof(struct dsv4_weight);
    struct dsv4_weight *tables = malloc(3 * bytes);
    if (!tables) {
        p->status = dsv4_fail(p->err, DSV4_E_MEMORY, "no memory for a table of %zu experts", n);
        return;
    }
    for (size_t e = 0; e < n; e++) {
        const struct dsv4_expert *x = e + 1 < n ? &l->experts[e] : &l->shared;
        tables[e] = x->w1;
        tables[n + e] = x->w3;
        tables[2 * n + e] = x->w2;
    }
    for (size_t i = 0; i < 3 * n; i++) {
        if (i % n + 1 < n && dsv4_beside_has(p->d, layer, (int32_t)(i % n)))
            tables[i].data = tables[i].scale = NULL;
        else
            weight(p, &tables[i]);
    }
    out->w1 = copy(p, tables, bytes);
    out->w3 = copy(p, tables + n, bytes);
    out->w2 = copy(p, tables + 2 * n, bytes);
    if (p->base && p->status == DSV4_OK)
        p->status = dsv4_device_status(p->d, p->d->plugin->runtime.synchronize(p->d->stream), "copying weights", p->err);
    free(tables);
}

/* What tensor cores need to know of a layer's experts, the shared one among them; 0: they cannot take them all. */
static int32_t mma_kinds(const struct dsv4_layer *l, int32_t n_exp) {
    int32_t kinds = 0;
    for (int32_t e = 0; e <= n_exp; e++) {
        const struct dsv4_expert *x = e < n_exp ? &l->experts[e] : &l->shared;
        const struct dsv4_weight *w[] = {&x->w1, &x->w3, &x->w2};
        for (int i = 0; i < 3; i++) {
            if (w[i]->format == DSV4_W_F32 || w[i]->cols % DSV4_CUDA_MMA_COLS)
                return 0;
            kinds |= DSV4_CUDA_MMA_KIND(w[i]->format, w[i]->scale_rule);
        }
    }
    return kinds;
}

static void layer(struct placing *p, int32_t index) {
    const dsv4_model *m = p->d->model;
    struct dsv4_device_layer *out = &p->d->layers[index];
    const struct dsv4_layer *from = &m->layers[index];
    const struct dsv4_config *c = &m->config;
    struct dsv4_layer *l = &out->l;
    int32_t mixes = (2 + c->hc_mult) * c->hc_mult;
    *l = *from;
    l->experts = NULL;
    hyper(p, &l->hc_attn, mixes, 3);
    hyper(p, &l->hc_ffn, mixes, 3);
    vector(p, &l->attn_norm, c->hidden_size);
    vector(p, &l->ffn_norm, c->hidden_size);
    vector(p, &l->q_norm, c->q_lora_rank);
    vector(p, &l->kv_norm, c->head_dim);
    vector(p, &l->sink, c->num_attention_heads);
    weight(p, &l->wq_a);
    weight(p, &l->wq_b);
    weight(p, &l->wkv);
    weight(p, &l->wo_a);
    weight(p, &l->wo_b);
    if (l->kind != DSV4_SWA)
        compressor(p, &l->compressor);
    if (l->kind == DSV4_CSA) {
        compressor(p, &l->index_compressor);
        weight(p, &l->index_wq_b);
        weight(p, &l->weights_proj);
    }
    weight(p, &l->gate);
    if (l->gate_bias)
        vector(p, &l->gate_bias, c->n_routed_experts);
    if (l->tid2eid)
        l->tid2eid = copy(p, l->tid2eid, (uint64_t)c->vocab_size * (uint64_t)c->num_experts_per_tok *
                                             (uint64_t)l->tid2eid_bytes);
    experts(p, out, from, index);
    out->quant_down = dsv4_rounds_input(m, &from->experts[0].w2);
    out->quant_shared = dsv4_rounds_input(m, &from->shared.w2);
    out->mma_kinds = mma_kinds(from, c->n_routed_experts);
}

static void all_weights(struct placing *p) {
    struct dsv4_device *d = p->d;
    const dsv4_model *m = d->model;
    const struct dsv4_config *c = &m->config;
    d->freq_main = m->freq_main;
    d->freq_compressed = m->freq_compressed;
    vector(p, &d->freq_main, c->qk_rope_head_dim / 2);
    vector(p, &d->freq_compressed, c->qk_rope_head_dim / 2);
    if (d->first_layer == 0) {
        d->embed = m->embed;
        weight(p, &d->embed);
    }
    if (d->end_layer == c->num_hidden_layers) {
        d->head = m->head;
        d->hc_head = m->hc_head;
        d->norm = m->norm;
        weight(p, &d->head);
        hyper(p, &d->hc_head, c->hc_mult, 1);
        vector(p, &d->norm, c->hidden_size);
    }
    for (int32_t i = d->first_layer; i < d->end_layer && p->status == DSV4_OK; i++)
        layer(p, i);
}

/* ------------------------------------------------------------------------------------------------------------- buffers */

/* Enough for any launch: what each of them needs at most, and more. */
static size_t most_tickets(const dsv4_model *m) {
    const struct dsv4_config *c = &m->config;
    size_t tiles = DSV4_CUDA_FEW_TILE * ((size_t)c->num_experts_per_tok + 1), n = (size_t)m->options.chunk_tok;
    size_t down = ((size_t)c->hidden_size + 15) / 16, up = tiles * (((size_t)c->moe_intermediate_size + 127) / 128);
    size_t low = (size_t)c->o_groups * (size_t)c->o_lora_rank / 128 + 1;
    size_t heads = (size_t)c->num_attention_heads + (size_t)c->index_n_heads;
    return down + up + low + heads + n + DSV4_CUDA_FEW_TILE + DSV4_CUDA_ATTENTION_TICKETS(n, c->num_attention_heads);
}

static void all_buffers(struct placing *p) {
    const dsv4_model *m = p->d->model;
    const struct dsv4_config *c = &m->config;
    struct dsv4_device_buffers *b = &p->d->b;
    size_t n = (size_t)m->options.chunk_tok, d = (size_t)c->hidden_size, hc = (size_t)c->hc_mult;
    size_t heads = (size_t)c->num_attention_heads * (size_t)c->head_dim, pairs = (size_t)c->qk_rope_head_dim / 2;
    size_t iq = (size_t)c->index_n_heads, low = (size_t)c->o_groups * (size_t)c->o_lora_rank;
    size_t top_k = (size_t)c->num_experts_per_tok, rows = n * (top_k + 1), width = (size_t)c->moe_intermediate_size;
    size_t n_exp = (size_t)c->n_routed_experts, ql = (size_t)c->q_lora_rank, mixes = (2 + hc) * hc;
    size_t dim = (size_t)c->head_dim, idim = (size_t)c->index_head_dim;
#define TAKE(field, count) b->field = take(p, (uint64_t)(count) * sizeof *b->field)
    dsv4_staging_measure(p->d);
    TAKE(in, p->d->staging.in_bytes);
    TAKE(out, p->d->staging.out_bytes);
    TAKE(tok, DSV4_LOGIT_ROWS);
    TAKE(tickets, most_tickets(m));
    TAKE(streams, n * hc * d);
    TAKE(u, n * d);
    TAKE(u_quant, n * d);
    TAKE(u_plain, n * d);
    TAKE(y, n * d);
    TAKE(dots, n * mixes);
    TAKE(squares, DSV4_CUDA_FEW_TILE);
    TAKE(post, n * hc);
    TAKE(comb, n * hc * hc);
    TAKE(cos_main, n * pairs);
    TAKE(sin_main, n * pairs);
    TAKE(cos_comp, n * pairs);
    TAKE(sin_comp, n * pairs);
    TAKE(qa, n * ql);
    TAKE(qr_quant, n * ql);
    TAKE(kv_raw, n * dim);
    TAKE(q, n * heads);
    TAKE(o, n * heads);
    TAKE(z, n * low);
    TAKE(z_quant, n * low);
    TAKE(kv_rows, n * m->kv_row);
    TAKE(index_q_rows, n * iq * m->index_row);
    TAKE(comp_k, n * 2 * dim);
    TAKE(comp_gate, n * 2 * dim);
    TAKE(icomp_k, n * 2 * idim);
    TAKE(icomp_gate, n * 2 * idim);
    TAKE(index_q, n * iq * idim);
    TAKE(index_w, n * iq);
    TAKE(selected, n * (size_t)c->index_topk);
    TAKE(n_selected, n);
    TAKE(n_key, n);
    TAKE(router_logits, n * n_exp);
    TAKE(router_scores, n * n_exp);
    TAKE(expert_weights, n * top_k);
    TAKE(row_weight, rows);
    TAKE(expert_ids, n * top_k);
    TAKE(group_first, n_exp + 2);
    TAKE(row_tok, rows);
    TAKE(tok_rows, rows);
    TAKE(n_tile, 1);
    TAKE(tiles, rows); /* never more tiles than rows */
    TAKE(gate_out, rows * width);
    TAKE(up_out, rows * width);
    TAKE(expert_out, rows * d);
    TAKE(hidden, DSV4_LOGIT_ROWS * d);
    TAKE(hidden_plain, DSV4_LOGIT_ROWS * d);
    TAKE(head_dots, DSV4_LOGIT_ROWS * hc);
    TAKE(logits, DSV4_LOGIT_ROWS * (size_t)c->vocab_size);
    if (p->d->end_layer == c->num_hidden_layers) {
        TAKE(draws, dsv4_device_draw_bytes(m));
        TAKE(drawn, dsv4_device_drawn_words());
        TAKE(sample_scratch, DSV4_CUDA_SAMPLE_SCRATCH(DSV4_LOGIT_ROWS, c->vocab_size));
    }
#undef TAKE
}

/* --------------------------------------------------------------------------------------------------- create and destroy */

static size_t count(struct dsv4_device *d, void (*lay)(struct placing *)) {
    dsv4_error ignored;
    struct placing p = {.d = d, .err = &ignored};
    lay(&p);
    return p.used;
}

static dsv4_status fill(struct dsv4_device *d, uint8_t **base, size_t bytes, void (*lay)(struct placing *),
                        const char *doing, dsv4_error *err) {
    void *memory;
    DSV4_TRY(dsv4_device_status(d, d->plugin->runtime.allocate(&memory, bytes), doing, err));
    *base = memory;
    struct placing p = {.d = d, .base = *base, .total = bytes, .err = err};
    lay(&p);
    return p.status;
}

static dsv4_status clear_tickets(struct dsv4_device *d, dsv4_error *err) {
    size_t n = most_tickets(d->model);
    int32_t *zeros = calloc(n, sizeof *zeros);
    if (!zeros)
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for %zu tickets", n);
    int code = d->plugin->runtime.upload(d->b.tickets, zeros, n * sizeof *zeros, d->stream);
    code = code ? code : d->plugin->runtime.synchronize(d->stream);
    free(zeros);
    return dsv4_device_status(d, code, "memory for a pass", err);
}

/*
 * What is left to sessions: one of usual length, or where only the free memory bounds what is used, a sixteenth of it or
 * 4 GiB.
 */
static uint64_t kept_for_sessions(const struct dsv4_device *d, uint64_t free_bytes, uint64_t most) {
    uint64_t session = dsv4_mirror_bytes(d, USUAL_CONTEXT), kept = most ? 0 : free_bytes / 16;
    kept = kept < (uint64_t)4 << 30 ? kept : (uint64_t)4 << 30;
    return kept > session ? kept : session;
}

/* Decides where routed experts lie; nothing has been allocated on the device yet. */
static dsv4_status fit(struct dsv4_device *d, uint64_t most, dsv4_error *err) {
    const dsv4_model *m = d->model;
    uint64_t free_bytes = 0, least = 0, routed = 0;
    DSV4_TRY(dsv4_cuda_status(d->plugin, d->plugin->runtime.free_bytes(&free_bytes), "free memory of the device", err));
    d->weight_bytes = count(d, all_weights);
    d->pass_bytes = count(d, all_buffers) + dsv4_device_scratch_bytes(m);
    for (int32_t l = d->first_layer; l < d->end_layer; l++)
        for (int32_t e = 0; e < m->config.n_routed_experts; e++)
            routed += dsv4_beside_expert_bytes(d, l, e);
    uint64_t kept = kept_for_sessions(d, free_bytes, most), always = d->weight_bytes - routed;
    uint64_t room = most && most < free_bytes ? most : free_bytes, needed = always + d->pass_bytes + kept;
    dsv4_status status = DSV4_E_MEMORY;
    if (needed <= room)
        status = dsv4_beside_choose(d, room - needed, &least, err);
    if (status == DSV4_E_MEMORY)
        return dsv4_fail(err, DSV4_E_MEMORY, "GPU memory: needed at least %.3f GiB on device %d (%.3f for weights that each "
                         "token reads, %.3f for a pass, %.3f for sessions; routed experts may lie in host memory), %s %.3f "
                         "GiB; use device='cpu', or GPUs with more memory", (double)(needed + least) / (1 << 30), d->number,
                         (double)always / (1 << 30), (double)(d->pass_bytes + least) / (1 << 30),
                         (double)kept / (1 << 30), most && most < free_bytes ? "allowed" : "free",
                         (double)room / (1 << 30));
    d->weight_bytes = count(d, all_weights);
    return status;
}

dsv4_status dsv4_device_open(struct dsv4_device *d, dsv4_error *err) {
    const dsv4_model *m = d->model;
    size_t n_layer = (size_t)m->config.num_hidden_layers;
    d->prompts = d->plugin->launches;
    d->prompts.linear = d->plugin->launches.linear_mma;
    d->prompts.attention = d->plugin->launches.attention_mma;
    DSV4_TRY(dsv4_cuda_prepare(d->plugin, d->number, err));
    DSV4_TRY(dsv4_arena_take(m->arena, &d->layers, n_layer, sizeof *d->layers, err));
    return dsv4_device_status(d, d->plugin->runtime.stream_create(&d->stream), "a stream", err);
}

dsv4_status dsv4_device_room(struct dsv4_device *d, uint64_t *room, dsv4_error *err) {
    uint64_t most = d->model->options.gpu_bytes;
    DSV4_TRY(dsv4_device_prepare(d, err));
    DSV4_TRY(dsv4_cuda_status(d->plugin, d->plugin->runtime.free_bytes(room), "free memory of the device", err));
    *room = most && most < *room ? most : *room;
    return DSV4_OK;
}

uint64_t dsv4_device_layer_bytes(struct dsv4_device *d, int32_t layer) {
    d->first_layer = layer;
    d->end_layer = layer + 1;
    return count(d, all_weights);
}

uint64_t dsv4_device_work_bytes(struct dsv4_device *d) {
    return count(d, all_buffers) + dsv4_device_scratch_bytes(d->model);
}

dsv4_status dsv4_device_build(struct dsv4_device *d, dsv4_error *err) {
    const dsv4_model *m = d->model;
    if (d->end_layer == m->config.num_hidden_layers) {
        DSV4_TRY(dsv4_arena_take(m->arena, &d->draws, dsv4_device_draw_bytes(m), 1, err));
        DSV4_TRY(dsv4_arena_take(m->arena, &d->drawn, dsv4_device_drawn_words(), sizeof *d->drawn, err));
    }
    DSV4_TRY(dsv4_device_prepare(d, err));
    DSV4_TRY(fit(d, m->options.gpu_bytes, err));
    DSV4_TRY(dsv4_staging_create(d, err));
    DSV4_TRY(fill(d, &d->workspace, count(d, all_buffers), all_buffers, "memory for a pass", err));
    DSV4_TRY(dsv4_beside_build(d, err));
    DSV4_TRY(fill(d, &d->weights, d->weight_bytes, all_weights, "memory for weights", err));
    DSV4_TRY(clear_tickets(d, err));
    return dsv4_device_status(d, d->plugin->runtime.synchronize(d->stream), "copying weights", err);
}

void dsv4_device_destroy(struct dsv4_device *d) {
    const struct dsv4_cuda_runtime *rt = &d->plugin->runtime; /* errors of a device that is lost are of no interest */
    rt->prepare(d->number);
    if (d->stream)
        rt->synchronize(d->stream);
    dsv4_graphs_drop(d);
    dsv4_staging_destroy(d);
    dsv4_beside_destroy(d);
    rt->release(d->weights);
    rt->release(d->workspace);
    rt->release(d->scratch);
    dsv4_device_sites_destroy(d);
    free(d->placed);
    if (d->stream)
        rt->stream_destroy(d->stream);
}
