/* SPDX-License-Identifier: Apache-2.0 */
/* What a program may know about the GPUs of a machine before it loads a model. */
#include <string.h>

#include "backend/cuda.h"
#include "dsv4.h"

/* One device; what keeps it from being used is said in it, and is no error. */
static void describe(const struct dsv4_cuda_plugin *p, int32_t index, struct dsv4_device_facts *out) {
    struct dsv4_cuda_properties found;
    dsv4_error err;
    *out = (struct dsv4_device_facts){0};
    dsv4_status status = dsv4_cuda_properties(p, index, &found, &err);
    if (status == DSV4_OK) {
        _Static_assert(sizeof out->name == sizeof found.name && sizeof out->why == sizeof err.message, "strings");
        memcpy(out->name, found.name, sizeof out->name);
        out->major = found.major;
        out->minor = found.minor;
        out->multiprocessors = found.multiprocessors;
        out->total_bytes = found.total_bytes;
        status = dsv4_cuda_prepare(p, index, &err);
    }
    if (status == DSV4_OK)
        status = dsv4_cuda_status(p, p->runtime.free_bytes(&out->free_bytes), "free memory of the device", &err);
    if (status != DSV4_OK) {
        out->free_bytes = 0;
        memcpy(out->why, err.message, sizeof out->why);
    }
}

dsv4_status dsv4_devices(struct dsv4_device_facts *out, int32_t capacity, int32_t *n, struct dsv4_plugin_facts *facts,
                         const char *plugin, const char *driver, dsv4_error *err) {
    const struct dsv4_cuda_plugin *p;
    DSV4_TRY(dsv4_cuda_load(&p, &(struct dsv4_cuda_paths){plugin, driver}, err));
    struct dsv4_cuda_visit visit;
    DSV4_TRY(dsv4_cuda_count(p, n, err));
    DSV4_TRY(dsv4_cuda_enter(&visit, p, err));
    for (int32_t i = 0; i < *n && i < capacity; i++)
        describe(p, i, &out[i]);
    dsv4_cuda_leave(&visit);
    *facts = (struct dsv4_plugin_facts){p->cuda_version, p->built_for};
    return DSV4_OK;
}
