/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the engine needs of the CUDA runtime, as a table of functions: it includes no CUDA header and links to no CUDA
 * library.  Every function that returns int returns 0 or a cudaError_t; the loader (csrc/backend/cuda.c) turns that into
 * a sentence.  Plain C, and C++ for the .cu files.
 */
#ifndef DSV4_CUDA_RUNTIME_H
#define DSV4_CUDA_RUNTIME_H

#include <stdint.h>

struct dsv4_cuda_properties {
    char name[256];
    int32_t major, minor;    /* architecture, "compute capability" */
    int32_t multiprocessors;
    uint64_t total_bytes;    /* memory of the device */
};

struct dsv4_cuda_runtime {
    int (*device_count)(int32_t *n); /* *n is 0 on failure */
    int (*properties)(struct dsv4_cuda_properties *out, int32_t device);
    /* Whether the plugin has code for this device; makes it the current device of the calling thread. */
    int (*prepare)(int32_t device);
    /*
     * What the calling thread has current, NULL for nothing, and back to it.  A context rather than a device: that of a thread
     * may be none of a device's own, and a device that is made current gets one, with memory of its own.
     */
    int (*context)(void **out);
    int (*set_context)(void *context);
    int (*free_bytes)(uint64_t *out); /* of the current device */
    int (*allocate)(void **out, uint64_t bytes); /* aligned to 256; *out is NULL on failure */
    int (*release)(void *p);                     /* waits for what runs; NULL is legal */
    int (*stream_create)(void **out);
    int (*stream_destroy)(void *stream);
    int (*synchronize)(void *stream);            /* errors of launches come out here */
    /* In the order of the stream.  Host memory may be pageable or of host_allocate; either may be read as late as the
     * stream comes to it, so it stays as it is until a synchronize, after which it also holds what download brings. */
    int (*upload)(void *to, const void *from, uint64_t bytes, void *stream);
    int (*download)(void *to, const void *from, uint64_t bytes, void *stream);
    int (*copy)(void *to, const void *from, uint64_t bytes, void *stream); /* both on the device */
    /* Host memory that stays in place and that kernels read and write too: for them it lies at *device. */
    int (*host_allocate)(void **out, void **device, uint64_t bytes); /* as allocate */
    int (*host_release)(void *p);
    /* Whether all that was enqueued has ended, without waiting; errors of launches come out here. */
    int (*stream_done)(void *stream, int32_t *done);
    /* A point in a stream, recorded again and again; what another stream gets after event_wait comes behind it. */
    int (*event_create)(void **out);
    int (*event_destroy)(void *event);           /* NULL is legal */
    int (*event_record)(void *event, void *stream);
    int (*event_wait)(void *event, void *stream);
    int (*event_done)(void *event, int32_t *done);
    /*
     * From capture_begin to capture_end, launches on this stream are noted and not executed; the calling thread may neither
     * allocate, release, copy nor wait meanwhile.  capture_end makes a graph of them, which holds their arguments as
     * they were; out NULL throws them away.  It ends the capture in any case; *out is NULL on
     * failure.  A graph may be launched again once its last launch has ended, by one thread at a time.
     */
    int (*capture_begin)(void *stream);
    int (*capture_end)(void *stream, void **out);
    int (*graph_launch)(void *graph, void *stream);
    int (*graph_destroy)(void *graph); /* NULL is legal */
    const char *(*error_name)(int code);
    const char *(*error_text)(int code);
};

#endif
