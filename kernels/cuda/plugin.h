/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The ABI of the CUDA plugin: one exported symbol, one table.  Its first two fields stay where they are in every
 * version, so a loader can refuse a plugin of another one.  Both halves are built together; DSV4_CUDA_ABI is raised with
 * every change of a struct here, in runtime.h or in launches.h.
 */
#ifndef DSV4_CUDA_PLUGIN_H
#define DSV4_CUDA_PLUGIN_H

#include "launches.h"
#include "runtime.h"

enum { DSV4_CUDA_ABI = 16 };

struct dsv4_cuda_plugin {
    uint32_t abi;          /* DSV4_CUDA_ABI */
    uint32_t bytes;        /* sizeof(struct dsv4_cuda_plugin) */
    int32_t cuda_version;  /* CUDART_VERSION of the toolkit: 1000 major + 10 minor */
    const char *built_for; /* architectures, as in "sm_80 sm_90a sm_100 sm_120 and later" */
    struct dsv4_cuda_runtime runtime;
    struct dsv4_cuda_launches launches; /* every one is there */
};

typedef const struct dsv4_cuda_plugin *dsv4_cuda_plugin_fn(void);
#define DSV4_CUDA_PLUGIN_SYMBOL "dsv4_cuda_plugin"

#endif
