/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory of devices for callers: what traces fill, and where weights lie.  Every call has a stream of its own, as that of
 * the passes may be captured into a graph meanwhile, and what the calling thread has current stays as it was.  A fault
 * is that of the call: if the device is lost the next step says so.
 */
#include <stdlib.h>

#include "model/device.h"

/* ------------------------------------------------------------------------------------------------------------- weights */

dsv4_status dsv4_device_note(struct dsv4_device *d, const void *from, void *to, uint64_t nbytes, dsv4_error *err) {
    if (d->n_placed == d->most_placed) {
        size_t most = d->most_placed ? 2 * d->most_placed : 1024;
        struct dsv4_placed *grown = realloc(d->placed, most * sizeof *grown);
        if (!grown)
            return dsv4_fail(err, DSV4_E_MEMORY, "no memory for a table of %zu weights", most);
        d->placed = grown;
        d->most_placed = most;
    }
    d->placed[d->n_placed++] = (struct dsv4_placed){from, to, nbytes};
    return DSV4_OK;
}

dsv4_status dsv4_memory_of_tensor(struct dsv4_memory *out, dsv4_model *m, const char *name, dsv4_error *err) {
    const void *data;
    uint64_t nbytes;
    DSV4_TRY(dsv4_model_tensor(m, name, &data, &nbytes, err));
    for (int32_t i = 0; m->pipeline && i < m->pipeline->n; i++) {
        const struct dsv4_device *d = &m->pipeline->stages[i];
        for (size_t j = 0; j < d->n_placed; j++)
            if (d->placed[j].from == data && d->placed[j].nbytes == nbytes) {
                *out = (struct dsv4_memory){d->placed[j].to, nbytes, d->number, i};
                return DSV4_OK;
            }
    }
    return dsv4_fail(err, DSV4_E_ARGUMENT, "%s: is not in the memory of a GPU as it is stored%s", name,
                     m->pipeline ? ": vectors lie there as float32, other experts and the draft heads on the host"
                                 : ": this model runs on the CPU");
}

/* ------------------------------------------------------------------------------------------------- a call, on a device */

static struct dsv4_device *device_of(const dsv4_model *m, int32_t layer) {
    for (int32_t i = 0; m->pipeline && i < m->pipeline->n; i++)
        if (layer >= m->pipeline->stages[i].first_layer && layer < m->pipeline->stages[i].end_layer)
            return &m->pipeline->stages[i];
    return NULL;
}

int32_t dsv4_model_device(const dsv4_model *m, int32_t layer) {
    const struct dsv4_device *d = device_of(m, layer);
    return d ? d->number : -1;
}

struct visit {
    const struct dsv4_cuda_runtime *rt;
    struct dsv4_cuda_visit back;
};

static void leave(const struct visit *v) {
    dsv4_cuda_leave(&v->back);
}

static dsv4_status enter(struct visit *v, const struct dsv4_device *d, dsv4_error *err) {
    v->rt = &d->plugin->runtime;
    DSV4_TRY(dsv4_cuda_enter(&v->back, d->plugin, err));
    dsv4_status status = dsv4_cuda_status(d->plugin, v->rt->prepare(d->number), "the device", err);
    if (status != DSV4_OK)
        leave(v);
    return status;
}

/* As enter, and a stream. */
static dsv4_status open_stream(struct visit *v, void **stream, const struct dsv4_device *d, dsv4_error *err) {
    DSV4_TRY(enter(v, d, err));
    dsv4_status status = dsv4_cuda_status(d->plugin, v->rt->stream_create(stream), "a stream", err);
    if (status != DSV4_OK)
        leave(v);
    return status;
}

/* Waits for what the stream has, or lets `reader` wait. */
static dsv4_status close_stream(const struct visit *v, void *stream, const struct dsv4_device *d, void *reader, int code,
                                const char *doing, dsv4_error *err) {
    void *event = NULL;
    if (!code && reader) {
        code = v->rt->event_create(&event);
        code = code ? code : v->rt->event_record(event, stream);
        code = code ? code : v->rt->event_wait(event, reader);
        v->rt->event_destroy(event); /* it goes when it has happened, as the stream does */
    } else if (!code) {
        code = v->rt->synchronize(stream);
    }
    if (code)
        v->rt->synchronize(stream);
    v->rt->stream_destroy(stream);
    leave(v);
    return dsv4_cuda_status(d->plugin, code, doing, err);
}

/* --------------------------------------------------------------------------------------------------------------- memory */

static dsv4_status on_device(struct dsv4_device **out, const dsv4_model *m, int32_t layer, dsv4_error *err) {
    *out = device_of(m, layer);
    return *out ? DSV4_OK : dsv4_fail(err, DSV4_E_ARGUMENT, "layer %d: is computed by no GPU", layer);
}

dsv4_status dsv4_memory_room(uint64_t *nbytes, dsv4_model *m, int32_t layer, dsv4_error *err) {
    struct dsv4_device *d;
    struct visit v;
    DSV4_TRY(on_device(&d, m, layer, err));
    DSV4_TRY(enter(&v, d, err));
    int code = v.rt->free_bytes(nbytes);
    leave(&v);
    return dsv4_cuda_status(d->plugin, code, "free memory of the device", err);
}

static dsv4_status create(struct dsv4_memory *out, const dsv4_model *m, const struct dsv4_device *d, uint64_t nbytes,
                          dsv4_error *err) {
    struct visit v;
    void *data;
    DSV4_TRY(enter(&v, d, err));
    int code = v.rt->allocate(&data, nbytes);
    leave(&v);
    DSV4_TRY(dsv4_cuda_status(d->plugin, code, "memory for an array", err));
    *out = (struct dsv4_memory){data, nbytes, d->number, (int32_t)(d - m->pipeline->stages)};
    return DSV4_OK;
}

dsv4_status dsv4_memory_create(struct dsv4_memory *out, dsv4_model *m, int32_t layer, uint64_t nbytes, dsv4_error *err) {
    struct dsv4_device *d;
    DSV4_TRY(on_device(&d, m, layer, err));
    return create(out, m, d, nbytes, err);
}

void dsv4_memory_destroy(dsv4_model *m, const struct dsv4_memory *memory) {
    struct visit v;
    dsv4_error ignored; /* of a device that is lost */
    if (enter(&v, &m->pipeline->stages[memory->stage], &ignored) != DSV4_OK)
        return;
    v.rt->release(memory->data);
    leave(&v);
}

static dsv4_status check_range(const struct dsv4_memory *from, uint64_t at, uint64_t nbytes, dsv4_error *err) {
    if (at <= from->nbytes && nbytes <= from->nbytes - at)
        return DSV4_OK;
    return dsv4_fail(err, DSV4_E_ARGUMENT, "memory: got %llu bytes from %llu on, there are %llu", (unsigned long long)nbytes,
                     (unsigned long long)at, (unsigned long long)from->nbytes);
}

dsv4_status dsv4_memory_read(dsv4_model *m, void *to, const struct dsv4_memory *from, uint64_t at, uint64_t nbytes,
                             dsv4_error *err) {
    const struct dsv4_device *d = &m->pipeline->stages[from->stage];
    struct visit v;
    void *stream;
    DSV4_TRY(check_range(from, at, nbytes, err));
    if (!nbytes)
        return DSV4_OK;
    DSV4_TRY(open_stream(&v, &stream, d, err));
    int code = v.rt->download(to, (const uint8_t *)from->data + at, nbytes, stream);
    return close_stream(&v, stream, d, NULL, code, "an array to the host", err);
}

dsv4_status dsv4_memory_copy(struct dsv4_memory *out, dsv4_model *m, const struct dsv4_memory *from, uint64_t at,
                             uint64_t nbytes, void *reader, dsv4_error *err) {
    const struct dsv4_device *d = &m->pipeline->stages[from->stage];
    struct visit v;
    struct dsv4_memory made;
    void *stream;
    DSV4_TRY(check_range(from, at, nbytes, err));
    DSV4_TRY(create(&made, m, d, nbytes ? nbytes : 1, err));
    dsv4_status status = open_stream(&v, &stream, d, err);
    if (status == DSV4_OK) {
        int code = v.rt->copy(made.data, (const uint8_t *)from->data + at, nbytes, stream);
        status = close_stream(&v, stream, d, reader, code, "a copy of an array", err);
    }
    if (status != DSV4_OK) {
        dsv4_memory_destroy(m, &made);
        return status;
    }
    *out = made;
    return DSV4_OK;
}

dsv4_status dsv4_memory_widen(dsv4_model *m, const struct dsv4_memory *to, const struct dsv4_memory *from, int32_t n,
                              int32_t width, int32_t from_width, uint32_t fill, dsv4_error *err) {
    const struct dsv4_device *d = &m->pipeline->stages[from->stage];
    struct visit v;
    void *stream;
    uint64_t had = 4 * (uint64_t)n * (uint64_t)from_width, has = 4 * (uint64_t)n * (uint64_t)width;
    if (to->stage != from->stage || n < 0 || from_width < 0 || width < from_width || had > from->nbytes || has > to->nbytes)
        return dsv4_fail(err, DSV4_E_ARGUMENT, "memory: got %d rows of %d elements to widen to %d, from %llu bytes to %llu", n,
                         from_width, width, (unsigned long long)from->nbytes, (unsigned long long)to->nbytes);
    DSV4_TRY(open_stream(&v, &stream, d, err));
    int code = d->plugin->launches.tap(
        &(struct dsv4_cuda_tap_args){.out = to->data, .x = from->data, .ld_out = width, .ld_x = from_width, .n_row = n,
                                     .width = width, .n = from_width, .fill = fill}, stream);
    return close_stream(&v, stream, d, NULL, code, "rows of an array", err);
}
