/* SPDX-License-Identifier: Apache-2.0 */
/* Zeroed memory that lives as long as its owner and is freed at once. */
#ifndef DSV4_ARENA_H
#define DSV4_ARENA_H

#include <stddef.h>

#include "core/status.h"

typedef struct dsv4_arena dsv4_arena;

dsv4_status dsv4_arena_create(dsv4_arena **out, dsv4_error *err);
void dsv4_arena_destroy(dsv4_arena *arena); /* NULL is legal */
/* `count` items of `size` bytes, zeroed, aligned to 64.  Fails when the product overflows or memory is out. */
dsv4_status dsv4_arena_take(dsv4_arena *arena, void *out_pointer, size_t count, size_t size, dsv4_error *err);

#endif
