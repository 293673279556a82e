/* SPDX-License-Identifier: Apache-2.0 */
#include "core/arena.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct piece {
    struct piece *next;
    char pad[64 - sizeof(struct piece *)]; /* the memory follows, aligned to 64 */
};

struct dsv4_arena {
    struct piece *first;
    /* small requests share a block */
    char *free;
    size_t left;
};

enum { SHARED = 1 << 16 };

dsv4_status dsv4_arena_create(dsv4_arena **out, dsv4_error *err) {
    *out = calloc(1, sizeof **out);
    return *out ? DSV4_OK : dsv4_fail(err, DSV4_E_MEMORY, "no memory for an arena");
}

void dsv4_arena_destroy(dsv4_arena *arena) {
    if (!arena)
        return;
    for (struct piece *p = arena->first, *next; p; p = next) {
        next = p->next;
        free(p);
    }
    free(arena);
}

static char *new_piece(dsv4_arena *arena, size_t bytes) {
    struct piece *p = aligned_alloc(64, sizeof *p + bytes);
    if (!p)
        return NULL;
    memset(p, 0, sizeof *p + bytes);
    p->next = arena->first;
    arena->first = p;
    return (char *)(p + 1);
}

dsv4_status dsv4_arena_take(dsv4_arena *arena, void *out_pointer, size_t count, size_t size, dsv4_error *err) {
    size_t bytes;
    char *got;
    if (__builtin_mul_overflow(count, size, &bytes) || bytes > SIZE_MAX - 256)
        return dsv4_fail(err, DSV4_E_MEMORY, "%zu items of %zu bytes are more than an address can hold", count, size);
    bytes = (bytes + 63) & ~(size_t)63;
    if (bytes <= arena->left) {
        got = arena->free;
    } else if (bytes <= SHARED / 4) {
        got = new_piece(arena, SHARED);
        if (got)
            arena->left = SHARED;
    } else {
        got = new_piece(arena, bytes);
        if (got) {
            memcpy(out_pointer, &got, sizeof got);
            return DSV4_OK;
        }
    }
    if (!got)
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for %zu bytes", bytes);
    arena->free = got + bytes;
    arena->left -= bytes;
    memcpy(out_pointer, &got, sizeof got);
    return DSV4_OK;
}
