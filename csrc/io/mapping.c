/* SPDX-License-Identifier: Apache-2.0 */
#include "io/mapping.h"

#include <stdlib.h>
#include <string.h>

dsv4_status dsv4_mapping_create(struct dsv4_mapping **out, const struct dsv4_shard_desc *desc, int use_mmap,
                                dsv4_error *err) {
    size_t length = strlen(desc->path) + 1;
    struct dsv4_mapping *m = malloc(sizeof *m + length);
    if (!m)
        return dsv4_fail(err, DSV4_E_MEMORY, "%s: no memory to open it", desc->path);
    m->use_mmap = use_mmap;
    atomic_init(&m->references, 1);
    memcpy(m->path, desc->path, length);
    dsv4_status status = dsv4_shards_open(&m->file, desc, 1, use_mmap, err);
    if (status != DSV4_OK) {
        free(m);
        return status;
    }
    *out = m;
    return DSV4_OK;
}

void dsv4_mapping_retain(struct dsv4_mapping *m) {
    atomic_fetch_add(&m->references, 1);
}

void dsv4_mapping_release(struct dsv4_mapping *m) {
    if (!m || atomic_fetch_sub(&m->references, 1) > 1)
        return;
    dsv4_shards_close(&m->file, 1, m->use_mmap);
    free(m);
}
