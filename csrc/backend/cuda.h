/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The CUDA plugin (kernels/cuda/plugin.h), found at run time: nothing here is linked to CUDA, and nothing is loaded before
 * somebody asks for a device.  Refuses, each with its cause and what to do: no plugin, no driver, a driver that reports an
 * error or is too old, a plugin of another version, no device, a device the plugin has no code for.
 */
#ifndef DSV4_CUDA_H
#define DSV4_CUDA_H

#include "core/status.h"
#include "cuda/plugin.h"

/* Where plugin and driver lie; the driver is a name for dlopen. */
struct dsv4_cuda_paths {
    const char *plugin, *driver;
};

/*
 * The plugin's table, once driver and plugin are loaded and there is a device.  Both stay loaded to the end of the
 * process, as CUDA wants it.  DSV4_E_UNAVAILABLE.
 */
dsv4_status dsv4_cuda_load(const struct dsv4_cuda_plugin **out, const struct dsv4_cuda_paths *paths, dsv4_error *err);

/* Devices there are; their properties.  `prepare` also tells whether the plugin has code for it, and is of effect on the
 * calling thread. */
dsv4_status dsv4_cuda_count(const struct dsv4_cuda_plugin *p, int32_t *n, dsv4_error *err);
dsv4_status dsv4_cuda_properties(const struct dsv4_cuda_plugin *p, int32_t device, struct dsv4_cuda_properties *out,
                                 dsv4_error *err);
dsv4_status dsv4_cuda_prepare(const struct dsv4_cuda_plugin *p, int32_t device, dsv4_error *err);

/* What the calling thread has current: others in the process (torch, CuPy) go by it. */
struct dsv4_cuda_visit {
    const struct dsv4_cuda_plugin *plugin; /* NULL: nothing to go back to */
    void *context;
};

/* Around all that a thread of somebody else does on devices.  What the thread has current is what it had, whatever fails. */
dsv4_status dsv4_cuda_enter(struct dsv4_cuda_visit *v, const struct dsv4_cuda_plugin *p, dsv4_error *err);
void dsv4_cuda_leave(const struct dsv4_cuda_visit *v);

/*
 * DSV4_OK for code 0; else the failure of what was `doing` as one sentence: the code, its name, and what to do.
 * DSV4_E_MEMORY for memory of the device, DSV4_E_UNAVAILABLE where it cannot be used at all, else DSV4_E_DEVICE.
 */
dsv4_status dsv4_cuda_status(const struct dsv4_cuda_plugin *p, int code, const char *doing, dsv4_error *err);

#endif
