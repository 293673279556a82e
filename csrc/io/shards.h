/* SPDX-License-Identifier: Apache-2.0 */
/* The files of a checkpoint as memory: mapped read-only, or read into owned memory.  No parsing: the reader did that. */
#ifndef DSV4_SHARDS_H
#define DSV4_SHARDS_H

#include "dsv4.h"

struct dsv4_shard {
    const uint8_t *data; /* owned: the whole file */
    uint64_t size;
};

/* Checks that each file is regular and has the stated size, then maps or reads it. */
dsv4_status dsv4_shards_open(struct dsv4_shard *out, const struct dsv4_shard_desc *desc, int32_t n, int use_mmap,
                             dsv4_error *err);
void dsv4_shards_close(struct dsv4_shard *shards, int32_t n, int use_mmap);

#endif
