/* SPDX-License-Identifier: Apache-2.0 */
/* Which routed experts a device has, and the memory for those beside it; see device_experts.h. */
#include <stdlib.h>
#include <string.h>

#include "core/arena.h"
#include "model/device_experts.h"

enum { ALIGN = 256 };

static size_t aligned(size_t n) {
    return (n + ALIGN - 1) / ALIGN * ALIGN;
}

/* The next bytes of a block, from `base` on or (NULL) only counted. */
static void *take(uint8_t *base, size_t *used, size_t bytes) {
    void *at = base ? base + *used : NULL;
    *used += aligned(bytes);
    return at;
}

static void parts_of(const struct dsv4_expert *x, const void **data, size_t *bytes) {
    const struct dsv4_weight *w[] = {&x->w1, &x->w3, &x->w2};
    for (int i = 0; i < DSV4_EXPERT_PARTS; i++) {
        data[i] = i % 2 ? w[i / 2]->scale : w[i / 2]->data;
        bytes[i] = (size_t)(i % 2 ? dsv4_scale_bytes(w[i / 2]) : dsv4_weight_bytes(w[i / 2]));
    }
}

static const struct dsv4_expert *expert_of(const dsv4_model *m, int32_t layer, int32_t e) {
    return &m->layers[layer].experts[e];
}

size_t dsv4_beside_expert_bytes(const struct dsv4_device *d, int32_t layer, int32_t e) {
    const void *data[DSV4_EXPERT_PARTS];
    size_t bytes[DSV4_EXPERT_PARTS], sum = 0;
    parts_of(expert_of(d->model, layer, e), data, bytes);
    for (int i = 0; i < DSV4_EXPERT_PARTS; i++)
        sum += aligned(bytes[i]);
    return sum;
}

/* --------------------------------------------------------------------------------------------------- which experts */

/* A slot has room for the largest part of each kind. */
static void lay_slot(struct dsv4_beside *b) {
    const struct dsv4_device *d = b->d;
    const void *data[DSV4_EXPERT_PARTS];
    size_t bytes[DSV4_EXPERT_PARTS], most[DSV4_EXPERT_PARTS] = {0};
    for (int32_t l = d->first_layer; l < d->end_layer; l++)
        for (int32_t e = 0; e < d->model->config.n_routed_experts; e++) {
            parts_of(expert_of(d->model, l, e), data, bytes);
            for (int i = 0; i < DSV4_EXPERT_PARTS; i++)
                most[i] = bytes[i] > most[i] ? bytes[i] : most[i];
        }
    b->slot_bytes = 0;
    for (int i = 0; i < DSV4_EXPERT_PARTS; i++) {
        b->part_at[i] = b->slot_bytes;
        b->slot_bytes += aligned(most[i]);
    }
}

static size_t table_entries(const struct dsv4_beside *b) {
    const struct dsv4_config *c = &b->d->model->config;
    return (size_t)c->num_hidden_layers * 3 * ((size_t)c->n_routed_experts + 1);
}

static size_t all_experts(const struct dsv4_beside *b) {
    const struct dsv4_config *c = &b->d->model->config;
    return (size_t)c->num_hidden_layers * (size_t)c->n_routed_experts;
}

/* Pointers into the device's block, and its size. */
static size_t lay_memory(struct dsv4_beside *b) {
    size_t used = 0;
    b->count = take(b->memory, &used, 2 * sizeof *b->count);
    b->uses = take(b->memory, &used, all_experts(b) * sizeof *b->uses);
    for (int i = 0; i < DSV4_SLOTS; i++)
        b->tables[i] = take(b->memory, &used, table_entries(b) * sizeof *b->tables[i]);
    for (int i = 0; i < DSV4_SLOTS; i++)
        b->slots[i] = take(b->memory, &used, b->slot_bytes);
    return used;
}

size_t dsv4_beside_bytes(const struct dsv4_beside *b) {
    struct dsv4_beside counted = *b;
    return lay_memory(&counted);
}

static void keep(struct dsv4_beside *b, int32_t layer, int32_t e, uint64_t *room) {
    size_t at = (size_t)layer * (size_t)b->d->model->config.n_routed_experts + (size_t)e;
    size_t bytes = dsv4_beside_expert_bytes(b->d, layer, e);
    if (b->resident[at] || bytes > *room)
        return;
    *room -= bytes;
    b->resident[at] = 1;
    b->missing[layer]--;
    b->n_missing--;
}

/* Those that are used most, then whole layers: one that is whole needs no word with the host. */
static void keep_all_that_fit(struct dsv4_beside *b, uint64_t room) {
    const struct dsv4_options *o = &b->d->model->options;
    int32_t n_exp = b->d->model->config.n_routed_experts, first = b->d->first_layer, end = b->d->end_layer;
    for (int32_t i = 0; i < o->n_hot; i++)
        if (o->hot[i] >= first * n_exp && o->hot[i] < end * n_exp)
            keep(b, o->hot[i] / n_exp, o->hot[i] % n_exp, &room);
    for (int32_t l = first; l < end; l++)
        for (int32_t e = 0; e < n_exp; e++)
            keep(b, l, e, &room);
}

static dsv4_status create(struct dsv4_beside **out, struct dsv4_device *d, dsv4_error *err) {
    struct dsv4_arena *arena = d->model->arena;
    const struct dsv4_config *c = &d->model->config;
    size_t n_exp = (size_t)c->n_routed_experts, n_layer = (size_t)c->num_hidden_layers;
    struct dsv4_beside *b;
    DSV4_TRY(dsv4_arena_take(arena, &b, 1, sizeof *b, err));
    DSV4_TRY(dsv4_arena_take(arena, &b->resident, n_layer * n_exp, sizeof *b->resident, err));
    DSV4_TRY(dsv4_arena_take(arena, &b->missing, n_layer, sizeof *b->missing, err));
    b->d = d;
    for (int32_t l = d->first_layer; l < d->end_layer; l++) {
        b->missing[l] = c->n_routed_experts;
        b->n_missing += c->n_routed_experts;
    }
    lay_slot(b);
    *out = b;
    return DSV4_OK;
}

dsv4_status dsv4_beside_choose(struct dsv4_device *d, uint64_t room, uint64_t *least, dsv4_error *err) {
    struct dsv4_beside *b;
    uint64_t all = 0;
    for (int32_t l = d->first_layer; l < d->end_layer; l++)
        for (int32_t e = 0; e < d->model->config.n_routed_experts; e++)
            all += dsv4_beside_expert_bytes(d, l, e);
    *least = 0;
    if (all <= room)
        return DSV4_OK;
    DSV4_TRY(create(&b, d, err));
    *least = dsv4_beside_bytes(b);
    if (*least > room)
        return DSV4_E_MEMORY;
    keep_all_that_fit(b, room - *least);
    d->beside = b;
    return DSV4_OK;
}

/* --------------------------------------------------------------------------------------------------------- memory */

/* Pointers into the block that both see, as it lies at `base`, and its size. */
static size_t lay_wire(const struct dsv4_beside *b, uint8_t *base, struct dsv4_wire *w) {
    const struct dsv4_config *c = &b->d->model->config;
    size_t n = (size_t)b->d->model->options.chunk_tok, d = (size_t)c->hidden_size, used = 0;
    size_t choices = n * (size_t)c->num_experts_per_tok, rows = (size_t)b->most_rows;
#define TAKE(field, count) w->field = take(base, &used, (size_t)(count) * sizeof *w->field)
    TAKE(sent, 1);
    TAKE(n_row, 1);
    TAKE(ids, choices);
    TAKE(weights, choices);
    TAKE(quant, b->quant ? n * d : 0);
    TAKE(plain, b->plain ? n * d : 0);
    TAKE(to, rows);
    TAKE(rows, rows * d);
    for (int i = 0; i < DSV4_SLOTS; i++)
        TAKE(staging[i], b->slot_bytes);
#undef TAKE
    w->quant = b->quant ? w->quant : NULL;
    w->plain = b->plain ? w->plain : NULL;
    return used;
}

/* The weights of those missing, as they lie in each slot. */
static dsv4_status fill_tables(struct dsv4_beside *b, struct dsv4_weight *tables, dsv4_error *err) {
    struct dsv4_device *d = b->d;
    size_t n_exp = (size_t)d->model->config.n_routed_experts, n = table_entries(b);
    for (int i = 0; i < DSV4_SLOTS; i++) {
        memset(tables, 0, n * sizeof *tables);
        for (int32_t l = d->first_layer; l < d->end_layer; l++)
            for (int32_t e = 0; e < (int32_t)n_exp; e++) {
                const struct dsv4_expert *x = expert_of(d->model, l, e);
                const struct dsv4_weight *from[] = {&x->w1, &x->w3, &x->w2};
                for (size_t j = 0; j < 3 && dsv4_beside_has(d, l, e); j++) {
                    struct dsv4_weight *w = &tables[((size_t)l * 3 + j) * (n_exp + 1) + (size_t)e];
                    *w = *from[j];
                    w->data = b->slots[i] + b->part_at[2 * j];
                    w->scale = w->scale ? b->slots[i] + b->part_at[2 * j + 1] : NULL;
                }
            }
        DSV4_TRY(dsv4_device_status(d, d->plugin->runtime.upload(b->tables[i], tables, n * sizeof *tables, d->stream),
                                    "a table of experts", err));
        DSV4_TRY(dsv4_device_status(d, d->plugin->runtime.synchronize(d->stream), "a table of experts", err));
    }
    return DSV4_OK;
}

/* Zero counters and the tables; a source stays as it is until its upload has ended. */
static dsv4_status fill_memory(struct dsv4_beside *b, dsv4_error *err) {
    struct dsv4_device *d = b->d;
    size_t zeros = (size_t)((uint8_t *)b->tables[0] - b->memory), table = table_entries(b) * sizeof(struct dsv4_weight);
    void *temporary = calloc(1, zeros > table ? zeros : table);
    if (!temporary)
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for a table of %zu bytes", table);
    dsv4_status status = dsv4_device_status(d, d->plugin->runtime.upload(b->memory, temporary, zeros, d->stream),
                                            "counters of experts", err);
    if (status == DSV4_OK)
        status = dsv4_device_status(d, d->plugin->runtime.synchronize(d->stream), "counters of experts", err);
    if (status == DSV4_OK)
        status = fill_tables(b, temporary, err);
    free(temporary);
    return status;
}

/* What the CPU's experts read and write of a layer. */
static dsv4_status prepare_host(struct dsv4_beside *b, dsv4_error *err) {
    const dsv4_model *m = b->d->model;
    struct dsv4_arena *arena = m->arena;
    struct dsv4_prepared *p = &b->prepared;
    size_t n_exp = (size_t)m->config.n_routed_experts, rows = (size_t)b->most_rows;
    size_t team = (size_t)dsv4_team_size(m->team);
    p->u_quant = b->host.quant;
    p->u_plain = b->host.plain;
    DSV4_TRY(dsv4_arena_take(arena, &p->group_first, n_exp + 2, sizeof *p->group_first, err));
    DSV4_TRY(dsv4_arena_take(arena, &p->row_tok, rows, sizeof *p->row_tok, err));
    DSV4_TRY(dsv4_arena_take(arena, &p->row_weight, rows, sizeof *p->row_weight, err));
    DSV4_TRY(dsv4_arena_take(arena, &b->first, n_exp + 1, sizeof *b->first, err));
    DSV4_TRY(dsv4_arena_take(arena, &b->n_rows, n_exp, sizeof *b->n_rows, err));
    DSV4_TRY(dsv4_arena_take(arena, &b->uploads, n_exp, sizeof *b->uploads, err));
    DSV4_TRY(dsv4_arena_take(arena, &b->own, team, sizeof *b->own, err));
    for (size_t i = 0; i < team; i++)
        b->own[i] = *p;
    return DSV4_OK;
}

/* What crosses the bus, at most. */
static void measure(struct dsv4_beside *b) {
    const dsv4_model *m = b->d->model;
    int32_t n_exp = m->config.n_routed_experts;
    int64_t most = (int64_t)m->options.chunk_tok * m->config.num_experts_per_tok, few = (int64_t)DSV4_FEW_TOKENS * n_exp;
    b->most_rows = (int32_t)(most < few ? most : few);
    for (int32_t l = b->d->first_layer; l < b->d->end_layer; l++)
        for (int32_t e = 0; e < n_exp; e++) {
            const struct dsv4_expert *x = expert_of(m, l, e);
            if (!dsv4_beside_has(b->d, l, e))
                continue;
            b->quant |= dsv4_rounds_input(m, &x->w1) || dsv4_rounds_input(m, &x->w3);
            b->plain |= !dsv4_rounds_input(m, &x->w1) || !dsv4_rounds_input(m, &x->w3);
        }
}

dsv4_status dsv4_beside_build(struct dsv4_device *d, dsv4_error *err) {
    struct dsv4_beside *b = d->beside;
    const struct dsv4_cuda_runtime *rt = &d->plugin->runtime;
    void *memory, *seen;
    if (!b)
        return DSV4_OK;
    measure(b);
    DSV4_TRY(dsv4_device_status(d, rt->allocate(&memory, dsv4_beside_bytes(b)), "memory for experts on their way", err));
    b->memory = memory;
    lay_memory(b);
    size_t bytes = lay_wire(b, NULL, &b->host);
    DSV4_TRY(dsv4_device_status(d, rt->host_allocate(&memory, &seen, bytes), "host memory for experts beside it", err));
    b->shared = memory;
    lay_wire(b, memory, &b->host);
    lay_wire(b, seen, &b->device);
    *b->host.sent = 0;
    DSV4_TRY(dsv4_device_status(d, rt->stream_create(&b->stream), "a stream", err));
    for (int i = 0; i < DSV4_SLOTS; i++) {
        DSV4_TRY(dsv4_device_status(d, rt->event_create(&b->arrived[i]), "an event", err));
        DSV4_TRY(dsv4_device_status(d, rt->event_create(&b->free[i]), "an event", err));
    }
    DSV4_TRY(prepare_host(b, err));
    return fill_memory(b, err);
}

void dsv4_beside_destroy(struct dsv4_device *d) {
    struct dsv4_beside *b = d->beside;
    const struct dsv4_cuda_runtime *rt = &d->plugin->runtime; /* errors of a device that is lost are of no interest */
    if (!b)
        return;
    if (b->stream)
        rt->synchronize(b->stream);
    for (int i = 0; i < DSV4_SLOTS; i++) {
        rt->event_destroy(b->arrived[i]);
        rt->event_destroy(b->free[i]);
    }
    if (b->stream)
        rt->stream_destroy(b->stream);
    rt->release(b->memory);
    rt->host_release(b->shared);
}

/* ---------------------------------------------------------------------------------------------------------- accounts */

void dsv4_model_placement(const dsv4_model *m, struct dsv4_placement *out) {
    *out = (struct dsv4_placement){0};
    for (int32_t i = 0; m->pipeline && i < m->pipeline->n; i++) {
        const struct dsv4_device *d = &m->pipeline->stages[i];
        struct dsv4_wire ignored;
        int32_t experts = (d->end_layer - d->first_layer) * m->config.n_routed_experts;
        out->experts += experts;
        out->experts_on_device += experts - (d->beside ? d->beside->n_missing : 0);
        out->weight_bytes += d->weight_bytes;
        out->pass_bytes += d->pass_bytes + (d->beside ? dsv4_beside_bytes(d->beside) : 0);
        out->shared_bytes += d->beside ? lay_wire(d->beside, NULL, &ignored) : 0;
    }
}

struct uses {
    dsv4_model *m;
    uint64_t *out;
    dsv4_status status;
    dsv4_error *err;
};

static dsv4_status uses_of(struct dsv4_device *d, uint64_t *out, dsv4_error *err) {
    const struct dsv4_cuda_runtime *rt = &d->plugin->runtime;
    size_t n_exp = (size_t)d->model->config.n_routed_experts, first = (size_t)d->first_layer * n_exp;
    size_t bytes = ((size_t)d->end_layer * n_exp - first) * sizeof *out;
    if (!d->beside)
        return DSV4_OK;
    DSV4_TRY(dsv4_device_prepare(d, err));
    DSV4_TRY(dsv4_device_status(d, rt->download(out + first, d->beside->uses + first, bytes, d->stream), "uses of experts",
                                err));
    return dsv4_device_status(d, rt->synchronize(d->stream), "uses of experts", err);
}

/* By one worker, between two steps: the streams are a step's. */
static void uses_job(dsv4_worker *w, void *ctx) {
    struct uses *u = ctx;
    const struct dsv4_pipeline *all = u->m->pipeline;
    if (w->id)
        return;
    for (int32_t i = 0; i < all->n && u->status == DSV4_OK; i++)
        u->status = uses_of(&all->stages[i], u->out, u->err);
}

dsv4_status dsv4_model_uses(dsv4_model *m, uint64_t *out, dsv4_error *err) {
    struct uses u = {m, out, DSV4_OK, err};
    memset(out, 0, (size_t)m->config.num_hidden_layers * (size_t)m->config.n_routed_experts * sizeof *out);
    if (!m->pipeline)
        return DSV4_OK;
    if (m->pipeline->dead.code != DSV4_OK) {
        *err = m->pipeline->dead;
        return err->code;
    }
    DSV4_TRY(dsv4_team_start(m->team, uses_job, &u, err));
    dsv4_team_finish(m->team);
    return u.status;
}
