/* SPDX-License-Identifier: Apache-2.0 */
/* A plugin for tests: each function gives the error the environment names, by default none, and one device. */
#include <stdlib.h>
#include <string.h>

#include "cuda/plugin.h"

#ifndef STUB_ABI
#define STUB_ABI DSV4_CUDA_ABI
#endif
#ifndef STUB_BYTES
#define STUB_BYTES sizeof(struct dsv4_cuda_plugin)
#endif

static int number(const char *name, int usual) {
    const char *text = getenv(name);
    return text ? atoi(text) : usual;
}

static int device_count(int32_t *n) {
    *n = number("STUB_DEVICES", 1);
    return number("STUB_DEVICE_COUNT", 0);
}

static int properties(struct dsv4_cuda_properties *out, int32_t device) {
    *out = (struct dsv4_cuda_properties){"Stub GPU", 9, device, 132, (uint64_t)140 << 30};
    return number("STUB_PROPERTIES", 0);
}

static int prepare(int32_t device) {
    (void)device;
    return number("STUB_PREPARE", 0);
}

static int context(void **out) {
    *out = NULL;
    return number("STUB_CONTEXT", 0);
}

static int set_context(void *context) {
    (void)context;
    return 0;
}

static int free_bytes(uint64_t *out) {
    *out = (uint64_t)139 << 30;
    return number("STUB_FREE_BYTES", 0);
}

static const char *error_name(int code) {
    (void)code;
    return "cudaErrorStub";
}

static const char *error_text(int code) {
    (void)code;
    return "as the test wants it";
}

dsv4_cuda_plugin_fn dsv4_cuda_plugin;
const struct dsv4_cuda_plugin *dsv4_cuda_plugin(void) {
    static struct dsv4_cuda_plugin plugin = {
        .abi = STUB_ABI, .bytes = STUB_BYTES, .cuda_version = 13000, .built_for = "sm_90a",
        .runtime = {.device_count = device_count, .properties = properties, .prepare = prepare,
                    .context = context, .set_context = set_context, .free_bytes = free_bytes,
                    .error_name = error_name,
                    .error_text = error_text},
    };
    return &plugin;
}
