/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The stages of a model: how layers are cut, what goes from one to the next, and their common end.  All of them are made
 * and given back together, whatever fails.
 */
#include <math.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "model/device.h"

/* The experts of a layer are computed by one launch, so the inputs of their second projections are rounded alike. */
static dsv4_status check_experts(const dsv4_model *m, dsv4_error *err) {
    for (int32_t i = 0; i < m->config.num_hidden_layers; i++)
        for (int32_t e = 1; e < m->config.n_routed_experts; e++)
            if (dsv4_rounds_input(m, &m->layers[i].experts[e].w2) != dsv4_rounds_input(m, &m->layers[i].experts[0].w2))
                return dsv4_fail(err, DSV4_E_UNAVAILABLE, "CUDA: layer %d: experts 0 and %d have w2 of formats whose inputs "
                                 "are rounded differently; use device='cpu'", i, e);
    return DSV4_OK;
}

/* ----------------------------------------------------------------------------------------------------------- the split */

/* What a stage takes of its room. */
static double share(const uint64_t *sums, int32_t first, int32_t end, uint64_t each, uint64_t room) {
    return (double)(sums[end] - sums[first] + each) / ((double)room + 1);
}

/*
 * best[j] is the largest share that one of the first stages takes when they have the first j layers, last[i][j] where the
 * i-th of them begins.  Greed does not do: each stage has a layer, and the one left for a small device may be a large one.
 */
dsv4_status dsv4_split_layers(int32_t *ends, const uint64_t *bytes, int32_t n_layer, uint64_t each, const uint64_t *rooms,
                              int32_t n, dsv4_error *err) {
    size_t width = (size_t)n_layer + 1;
    double *best = malloc(width * sizeof *best);
    uint64_t *sums = calloc(width, sizeof *sums);
    int32_t *last = malloc((size_t)n * width * sizeof *last);
    dsv4_status status = best && sums && last ? DSV4_OK : dsv4_fail(err, DSV4_E_MEMORY, "no memory to split %d layers", n_layer);
    for (int32_t j = 0; status == DSV4_OK && j < n_layer; j++)
        sums[j + 1] = sums[j] + bytes[j];
    for (int32_t i = 0; status == DSV4_OK && i < n; i++)
        for (int32_t j = n_layer; j > i; j--) { /* downwards: best[k] of the stages before is still there */
            double least = HUGE_VAL;
            for (int32_t k = i ? i : 0; k < (i ? j : 1); k++) {
                double own = share(sums, k, j, each, rooms[i]), most = i && best[k] > own ? best[k] : own;
                if (most < least) {
                    least = most;
                    last[(size_t)i * width + (size_t)j] = k;
                }
            }
            best[j] = least;
        }
    for (int32_t i = n - 1, j = n_layer; status == DSV4_OK && i >= 0; i--) {
        ends[i] = j;
        j = last[(size_t)i * width + (size_t)j];
    }
    free(best);
    free(sums);
    free(last);
    return status;
}

/* The layers of each stage, by the room of its device. */
static dsv4_status split(struct dsv4_pipeline *p, dsv4_error *err) {
    struct dsv4_device *d = p->stages;
    int32_t n_layer = d->model->config.num_hidden_layers, ends[DSV4_STAGES];
    uint64_t rooms[DSV4_STAGES];
    for (int32_t i = 0; i < p->n; i++)
        DSV4_TRY(dsv4_device_room(&p->stages[i], &rooms[i], err));
    uint64_t *bytes = malloc((size_t)n_layer * sizeof *bytes);
    if (!bytes)
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for the sizes of %d layers", n_layer);
    for (int32_t i = 0; i < n_layer; i++)
        bytes[i] = dsv4_device_layer_bytes(d, i);
    d->first_layer = 0; /* the most that the buffers of a stage may take */
    d->end_layer = n_layer;
    dsv4_status status = dsv4_split_layers(ends, bytes, n_layer, dsv4_device_work_bytes(d), rooms, p->n, err);
    free(bytes);
    for (int32_t i = 0; status == DSV4_OK && i < p->n; i++) {
        p->stages[i].first_layer = i ? ends[i - 1] : 0;
        p->stages[i].end_layer = ends[i];
    }
    return status;
}

/* ---------------------------------------------------------------------------------------------- from a stage to the next */

/* Copies that failed leave nothing to go on with. */
static dsv4_status remember(struct dsv4_pipeline *p, dsv4_status status, const dsv4_error *err) {
    if (status != DSV4_OK && p->dead.code == DSV4_OK)
        p->dead = *err;
    return status;
}

dsv4_status dsv4_pipeline_move(struct dsv4_pipeline *p, int32_t i, void *to, const void *from, uint64_t bytes,
                               dsv4_error *err) {
    void *from_stream = p->stages[i - 1].stream, *to_stream = p->stages[i].stream;
    return remember(p, dsv4_nccl_move(p->nccl, i, to, to_stream, i - 1, from, from_stream, bytes, err), err);
}

/* Stages [0, end) and NCCL; *done: the last of them has ended; *left: how many have not. */
static dsv4_status ask(struct dsv4_pipeline *p, int32_t end, int32_t *done, int32_t *left, const char *doing,
                       dsv4_error *err) {
    *left = 0;
    for (int32_t i = 0; i < end; i++) {
        struct dsv4_device *d = &p->stages[i];
        DSV4_TRY(dsv4_device_prepare(d, err));
        DSV4_TRY(dsv4_device_status(d, d->plugin->runtime.stream_done(d->stream, done), doing, err));
        *left += !*done;
    }
    return p->nccl ? remember(p, dsv4_nccl_check(p->nccl, err), err) : DSV4_OK;
}

dsv4_status dsv4_pipeline_ask(struct dsv4_device *d, int32_t *done, const char *doing, dsv4_error *err) {
    int32_t left;
    return ask(d->pipeline, (int32_t)(d - d->pipeline->stages) + 1, done, &left, doing, err);
}

dsv4_status dsv4_pipeline_wait(struct dsv4_pipeline *p, const char *doing, dsv4_error *err) {
    struct dsv4_device *d = p->stages;
    int32_t left, done;
    if (!p->nccl)
        return dsv4_device_status(d, d->plugin->runtime.synchronize(d->stream), doing, err);
    do { /* all are asked in turn: one may wait for another that has failed */
        DSV4_TRY(ask(p, p->n, &done, &left, doing, err));
        if (left)
            sched_yield();
    } while (left);
    return DSV4_OK;
}

void dsv4_pipeline_abandon(struct dsv4_pipeline *p) {
    dsv4_nccl_destroy(p->nccl, 1);
    p->nccl = NULL;
}

/* --------------------------------------------------------------------------------------------------- the first exchange */

enum { PROBE_BYTES = 1 << 16 };

static dsv4_status exchange(struct dsv4_pipeline *p, uint8_t **probes, uint8_t *host, dsv4_error *err) {
    const struct dsv4_cuda_runtime *rt = &p->stages->plugin->runtime;
    uint8_t *back = host + PROBE_BYTES;
    for (int32_t i = 0; i < p->n; i++) {
        struct dsv4_device *d = &p->stages[i];
        void *memory;
        DSV4_TRY(dsv4_device_prepare(d, err));
        DSV4_TRY(dsv4_device_status(d, rt->allocate(&memory, PROBE_BYTES), "memory for a first copy", err));
        probes[i] = memory;
        DSV4_TRY(dsv4_device_status(d, rt->upload(memory, i ? back : host, PROBE_BYTES, d->stream), "a first copy", err));
    }
    for (int32_t i = 1; i < p->n; i++)
        DSV4_TRY(dsv4_pipeline_move(p, i, probes[i], probes[i - 1], PROBE_BYTES, err));
    struct dsv4_device *last = &p->stages[p->n - 1];
    DSV4_TRY(dsv4_device_prepare(last, err));
    DSV4_TRY(dsv4_device_status(last, rt->download(back, probes[p->n - 1], PROBE_BYTES, last->stream), "a first copy", err));
    DSV4_TRY(dsv4_pipeline_wait(p, "a first copy", err));
    return memcmp(host, back, PROBE_BYTES) == 0 ? DSV4_OK
        : dsv4_fail(err, DSV4_E_DEVICE, "NCCL: bytes arrive changed when they are copied from device to device; set "
                    "NCCL_P2P_DISABLE=1, or switch the IOMMU and ACS off, or use one GPU");
}

/* Bytes through all stages, before any memory is counted: so the connections are there, and what NCCL keeps for them. */
static dsv4_status first_exchange(struct dsv4_pipeline *p, dsv4_error *err) {
    uint8_t *probes[DSV4_STAGES] = {NULL}, *host = calloc(2, PROBE_BYTES);
    if (!host)
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for a first copy between devices");
    for (size_t i = 0; i < PROBE_BYTES; i++)
        host[i] = (uint8_t)(i * 2654435761u >> 13);
    dsv4_status status = exchange(p, probes, host, err);
    if (status != DSV4_OK)
        dsv4_pipeline_abandon(p);
    for (int32_t i = 0; i < p->n; i++) {
        p->stages[i].plugin->runtime.prepare(p->stages[i].number);
        p->stages[i].plugin->runtime.release(probes[i]);
    }
    free(host);
    return status;
}

/* --------------------------------------------------------------------------------------------------- create and destroy */

static dsv4_status check_devices(const dsv4_model *m, dsv4_error *err) {
    const int32_t *numbers = m->options.cuda_devices;
    int32_t n = m->options.n_cuda_device, most = m->config.num_hidden_layers;
    most = most < DSV4_STAGES ? most : DSV4_STAGES;
    if (n < 1 || n > most)
        return dsv4_fail(err, DSV4_E_ARGUMENT, "device: got %d GPUs, wanted 1 to %d: each has at least one of the %d layers", n,
                         most, m->config.num_hidden_layers);
    for (int32_t i = 0; i < n; i++)
        for (int32_t j = 0; j < i; j++)
            if (numbers[i] == numbers[j])
                return dsv4_fail(err, DSV4_E_ARGUMENT, "device: got GPU %d twice, wanted each once", numbers[i]);
    return DSV4_OK;
}

static dsv4_status build(struct dsv4_pipeline *p, const dsv4_model *m, const struct dsv4_cuda_plugin *plugin,
                         dsv4_error *err) {
    int32_t n = m->options.n_cuda_device;
    p->stages = calloc((size_t)n, sizeof *p->stages);
    if (!p->stages)
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for %d devices", n);
    for (; p->n < n; p->n++) {
        struct dsv4_device *d = &p->stages[p->n];
        *d = (struct dsv4_device){.plugin = plugin, .model = m, .pipeline = p, .number = m->options.cuda_devices[p->n]};
        DSV4_TRY(dsv4_device_open(d, err));
    }
    if (n > 1) {
        DSV4_TRY(dsv4_nccl_create(&p->nccl, m->options.nccl, m->options.cuda_devices, n, err));
        DSV4_TRY(first_exchange(p, err));
    }
    DSV4_TRY(split(p, err));
    for (int32_t i = 0; i < n; i++)
        DSV4_TRY(dsv4_device_build(&p->stages[i], err));
    return DSV4_OK;
}

dsv4_status dsv4_pipeline_create(struct dsv4_pipeline **out, const dsv4_model *m, dsv4_error *err) {
    const struct dsv4_cuda_plugin *plugin;
    struct dsv4_cuda_paths paths = {m->options.cuda_plugin, m->options.cuda_driver};
    struct dsv4_cuda_visit visit;
    DSV4_TRY(check_devices(m, err));
    DSV4_TRY(check_experts(m, err));
    DSV4_TRY(dsv4_cuda_load(&plugin, &paths, err));
    struct dsv4_pipeline *p = calloc(1, sizeof *p);
    if (!p)
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for a device");
    dsv4_status status = dsv4_cuda_enter(&visit, plugin, err);
    if (status == DSV4_OK)
        status = build(p, m, plugin, err);
    if (status == DSV4_OK)
        *out = p;
    else
        dsv4_pipeline_destroy(p);
    dsv4_cuda_leave(&visit);
    return status;
}

void dsv4_pipeline_destroy(struct dsv4_pipeline *p) {
    struct dsv4_cuda_visit visit = {0};
    dsv4_error ignored;
    if (!p)
        return;
    if (p->n)
        dsv4_cuda_enter(&visit, p->stages->plugin, &ignored);
    dsv4_nccl_destroy(p->nccl, p->dead.code != DSV4_OK);
    for (int32_t i = 0; i < p->n; i++)
        dsv4_device_destroy(&p->stages[i]);
    dsv4_cuda_leave(&visit);
    free(p->stages);
    free(p);
}

int32_t dsv4_model_stages(const dsv4_model *m, struct dsv4_stage *out, int32_t capacity) {
    int32_t n = m->pipeline ? m->pipeline->n : 0;
    for (int32_t i = 0; i < n && i < capacity; i++) {
        const struct dsv4_device *d = &m->pipeline->stages[i];
        out[i] = (struct dsv4_stage){d->number, d->first_layer, d->end_layer, d->weight_bytes, d->pass_bytes};
    }
    return n;
}
