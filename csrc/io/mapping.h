/* SPDX-License-Identifier: Apache-2.0 */
/* One file as memory, counted: it goes with the last block of rows that lies in it.  A file that is replaced (renamed
 * over) meanwhile stays as it was; one that somebody shortens does not, unless it was read rather than mapped. */
#ifndef DSV4_MAPPING_H
#define DSV4_MAPPING_H

#include <stdatomic.h>

#include "io/shards.h"

struct dsv4_mapping {
    struct dsv4_shard file; /* owned */
    int use_mmap;
    atomic_int references;
    char path[]; /* for messages */
};

/* With one reference. */
dsv4_status dsv4_mapping_create(struct dsv4_mapping **out, const struct dsv4_shard_desc *desc, int use_mmap,
                                dsv4_error *err);
void dsv4_mapping_retain(struct dsv4_mapping *m);
void dsv4_mapping_release(struct dsv4_mapping *m); /* NULL is legal */

#endif
