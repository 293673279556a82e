/* SPDX-License-Identifier: Apache-2.0 */
/* A pass on a device with experts beside it: what the first worker does between the segments, and all workers together. */
#include "model/device_experts.h"

#include <sched.h>
#include <string.h>

#include "model/part.h"

typedef struct dsv4_device_run run;

/* Looks at the number between two questions to the stream, which cost microseconds: some 0.1 ms. */
enum { LOOKS = 2048 };

/* Up to so many rows an expert costs the CPU the reading of its weights, which its memory gives faster than the bus; every
 * row more costs arithmetic, of which the device has more. */
enum { FEW = DSV4_FEW_TOKENS };

/* The most rows of an expert that the host computes; none where the device's bits are not the CPU's. */
static int32_t few_of(const run *r, int32_t layer) {
    return r->p->prompt && r->d->layers[layer].mma_kinds ? 0 : FEW;
}

/* ------------------------------------------------------------------------------------------------------------ launches */

dsv4_status dsv4_beside_send(const run *r, int32_t layer) {
    const struct dsv4_beside *b = r->d->beside;
    const struct dsv4_device_buffers *o = &r->d->b;
    const struct dsv4_config *c = &r->d->model->config;
    LAUNCH(r, send, .sent = b->device.sent, .to_ids = b->device.ids, .to_weights = b->device.weights,
           .to_quant = b->device.quant, .to_plain = b->device.plain, .count = b->count, .ids = o->expert_ids,
           .weights = o->expert_weights, .x_quant = o->u_quant, .x_plain = o->u_plain, .w = r->d->layers[layer].w1,
           .group_first = o->group_first, .n_tok = r->n, .top_k = c->num_experts_per_tok, .n = c->hidden_size,
           .few = few_of(r, layer));
    return DSV4_OK;
}

dsv4_status dsv4_beside_receive(const run *r) {
    const struct dsv4_beside *b = r->d->beside;
    const struct dsv4_config *c = &r->d->model->config;
    int32_t rows = r->n * c->num_experts_per_tok;
    LAUNCH(r, receive, .rows = r->d->b.expert_out, .from = b->device.rows, .to = b->device.to, .n_row = b->device.n_row,
           .max_row = rows < b->most_rows ? rows : b->most_rows, .n = c->hidden_size);
    return DSV4_OK;
}

/* --------------------------------------------------------------------------------------------------- workers together */

static void copy_part(const dsv4_worker *w, uint8_t *to, const struct dsv4_weight *from, int scale) {
    const uint8_t *data = scale ? from->scale : from->data;
    int64_t lo, hi;
    dsv4_share(w, (int64_t)(scale ? dsv4_scale_bytes(from) : dsv4_weight_bytes(from)), 4096, &lo, &hi);
    if (lo < hi)
        memcpy(to + lo, data + lo, (size_t)(hi - lo));
}

static int work(dsv4_worker *w, struct dsv4_beside *b, const struct dsv4_beside_job *job) {
    if (job->expert < 0) {
        if (dsv4_moe_rows(w, &b->pass, job->layer))
            return 1;
    } else {
        const struct dsv4_expert *x = &b->d->model->layers[job->layer].experts[job->expert];
        const struct dsv4_weight *from[] = {&x->w1, &x->w3, &x->w2};
        for (int i = 0; i < DSV4_EXPERT_PARTS; i++)
            copy_part(w, b->host.staging[job->slot] + b->part_at[i], from[i / 2], i % 2);
    }
    return dsv4_meet(w, &b->pass);
}

int dsv4_beside_help(dsv4_worker *w, struct dsv4_pass *p) {
    if (w->id == 0) {
        p->beside = NULL;
        return p->stopped || dsv4_meet(w, p);
    }
    for (;;) {
        if (dsv4_meet(w, p))
            return 1;
        if (!p->beside)
            return 0;
        if (work(w, p->beside->beside, p->beside))
            return 1;
    }
}

/* The first worker's call.  1: the run was cancelled, and the others have left. */
static int together(run *r, int32_t layer, int32_t expert, int32_t slot) {
    struct dsv4_beside *b = r->d->beside;
    b->job = (struct dsv4_beside_job){b, layer, expert, slot};
    r->p->beside = &b->job;
    r->p->stopped = dsv4_meet(r->w, r->p) || work(r->w, b, &b->job);
    return r->p->stopped;
}

/* ----------------------------------------------------------------------------------------------------- a layer's rows */

/* The first worker waits for the device's choices. */
static dsv4_status wait_for_choices(const run *r) {
    const struct dsv4_beside *b = r->d->beside;
    const uint32_t *sent = b->host.sent;
    for (uint32_t look = 1; __atomic_load_n(sent, __ATOMIC_ACQUIRE) != b->number && !dsv4_cancelled(r->w); look++) {
        int32_t done = 0;
        dsv4_relax();
        if (look % LOOKS)
            continue;
        DSV4_TRY(dsv4_pipeline_ask(r->d, &done, "a pass", r->err));
        if (done && __atomic_load_n(sent, __ATOMIC_ACQUIRE) != b->number)
            return dsv4_device_status(r->d, 999, "the choices of a layer, which never came", r->err);
        sched_yield();
    }
    return DSV4_OK;
}

/* Rows by expert as the device has them; those of experts beside it that the host computes, in the same order, and a list
 * of the others.  The ids come from a device: what is no id is a fault of it. */
static dsv4_status group(const run *r, int32_t layer) {
    struct dsv4_beside *b = r->d->beside;
    const struct dsv4_config *c = &r->d->model->config;
    struct dsv4_prepared *p = &b->prepared;
    int32_t n_exp = c->n_routed_experts, top_k = c->num_experts_per_tok, n_choice = r->n * top_k, few = few_of(r, layer);
    memset(b->n_rows, 0, (size_t)n_exp * sizeof *b->n_rows);
    for (int32_t i = 0; i < n_choice; i++) {
        if (b->host.ids[i] < 0 || b->host.ids[i] >= n_exp)
            return dsv4_device_status(r->d, 999, "the choices of a layer, which are no experts", r->err);
        b->n_rows[b->host.ids[i]]++;
    }
    b->n_upload = 0;
    b->first[0] = p->group_first[0] = 0;
    for (int32_t e = 0; e < n_exp; e++) {
        int beside = dsv4_beside_has(r->d, layer, e) && b->n_rows[e], here = beside && b->n_rows[e] <= few;
        if (beside && !here)
            b->uploads[b->n_upload++] = e;
        b->first[e + 1] = b->first[e] + b->n_rows[e];
        p->group_first[e + 1] = p->group_first[e] + (here ? b->n_rows[e] : 0);
        b->n_rows[e] = here ? 0 : -1; /* from here on: those placed so far, or not the host's */
    }
    p->group_first[n_exp + 1] = *b->host.n_row = p->group_first[n_exp];
    for (int32_t i = 0; i < n_choice; i++) {
        int32_t e = b->host.ids[i];
        if (b->n_rows[e] < 0)
            continue;
        int32_t row = p->group_first[e] + b->n_rows[e];
        p->row_tok[row] = i / top_k;
        p->row_weight[row] = b->host.weights[i];
        b->host.to[row] = b->first[e] + b->n_rows[e]++;
    }
    return DSV4_OK;
}

/* Until the copy from staging[slot] is over, which may then be filled again. */
static dsv4_status wait_for_copy(const run *r, int32_t slot) {
    const struct dsv4_beside *b = r->d->beside;
    int32_t done = !b->filled[slot];
    while (!done && !dsv4_cancelled(r->w)) {
        DSV4_TRY(dsv4_device_status(r->d, r->d->plugin->runtime.event_done(b->arrived[slot], &done), "a copy", r->err));
        if (!done)
            sched_yield();
    }
    return DSV4_OK;
}

/* Copies an expert to a slot of the device, behind its last use, and enqueues its rows behind the copy. */
static dsv4_status upload(run *r, int32_t layer, int32_t e, int32_t slot) {
    struct dsv4_beside *b = r->d->beside;
    const struct dsv4_cuda_runtime *rt = &r->d->plugin->runtime;
    size_t n = (size_t)r->d->model->config.n_routed_experts + 1;
    const struct dsv4_weight *table = b->tables[slot] + (size_t)layer * 3 * n;
    DSV4_TRY(wait_for_copy(r, slot));
    if (dsv4_cancelled(r->w) || together(r, layer, e, slot))
        return DSV4_OK;
    if (b->filled[slot])
        DSV4_TRY(dsv4_device_status(r->d, rt->event_wait(b->free[slot], b->stream), "a slot", r->err));
    DSV4_TRY(dsv4_device_status(r->d, rt->upload(b->slots[slot], b->host.staging[slot], b->slot_bytes, b->stream),
                                "an expert on its way", r->err));
    DSV4_TRY(dsv4_device_status(r->d, rt->event_record(b->arrived[slot], b->stream), "a copy", r->err));
    b->filled[slot] = 1;
    DSV4_TRY(dsv4_device_status(r->d, rt->event_wait(b->arrived[slot], r->d->stream), "a copy", r->err));
    struct dsv4_expert_tables w = {table, table + n, table + 2 * n};
    DSV4_TRY(dsv4_device_expert(r, &r->d->layers[layer], &w, b->first, e));
    return dsv4_device_status(r->d, rt->event_record(b->free[slot], r->d->stream), "a slot", r->err);
}

static dsv4_status uploads(run *r, int32_t layer, int32_t from, int32_t end) {
    for (int32_t i = from; i < end && !dsv4_cancelled(r->w); i++)
        DSV4_TRY(upload(r, layer, r->d->beside->uploads[i], i % DSV4_SLOTS));
    return DSV4_OK;
}

/* The rows of the experts beside the device: the first copies are under way while the host computes its rows. */
static dsv4_status rows(run *r, int32_t layer) {
    struct dsv4_beside *b = r->d->beside;
    DSV4_TRY(wait_for_choices(r));
    if (dsv4_cancelled(r->w))
        return DSV4_OK;
    DSV4_TRY(group(r, layer));
    int32_t first = b->n_upload < DSV4_SLOTS ? b->n_upload : DSV4_SLOTS;
    DSV4_TRY(uploads(r, layer, 0, first));
    if (*b->host.n_row && !dsv4_cancelled(r->w))
        together(r, layer, -1, 0);
    return uploads(r, layer, first, b->n_upload);
}

/* ------------------------------------------------------------------------------------------------------------ the pass */

/* The model's workspace, but for what crosses the bus. */
static dsv4_status begin(run *r) {
    struct dsv4_beside *b = r->d->beside;
    if (b->unsure) {
        DSV4_TRY(dsv4_pipeline_wait(r->d->pipeline, "a pass", r->err));
        DSV4_TRY(dsv4_device_prepare(r->d, r->err));
        b->number = *b->host.sent;
    }
    b->unsure = 1;
    b->ws = *r->p->ws;
    b->ws.shared = b->prepared;
    b->ws.own = b->own;
    b->ws.expert_out = b->host.rows;
    b->pass = (struct dsv4_pass){.m = r->p->m, .ws = &b->ws, .n_tok = r->n, .clock = r->p->clock};
    return DSV4_OK;
}

dsv4_status dsv4_beside_segments(run *r) {
    struct dsv4_beside *b = r->d->beside;
    int32_t first = 2 * r->d->first_layer;
    if (b)
        DSV4_TRY(begin(r));
    for (int32_t l = r->d->first_layer; l < r->d->end_layer && !dsv4_cancelled(r->w); l++) {
        if (!dsv4_beside_at(r->d, l))
            continue;
        DSV4_TRY(dsv4_device_segment(r, first, 2 * l + 1));
        b->number++;
        first = 2 * l + 1;
        DSV4_TRY(rows(r, l));
    }
    if (!dsv4_cancelled(r->w))
        DSV4_TRY(dsv4_device_segment(r, first, 2 * r->d->end_layer));
    if (b)
        b->unsure = dsv4_cancelled(r->w);
    return DSV4_OK;
}
