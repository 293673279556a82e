/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A growing array of rows of one size, copied on write: a copy shares all blocks, and whoever writes gets blocks of its
 * own.  Blocks hang in pages, so that a copy costs one reference for 4,096 rows.
 *
 * Thread-safety: one store is used by one thread at a time; stores that share blocks may be used by several.
 */
#ifndef DSV4_ROWS_H
#define DSV4_ROWS_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

enum { DSV4_ROWS_PER_BLOCK = 64, DSV4_BLOCKS_PER_PAGE = 64 };

struct dsv4_block;

struct dsv4_page {
    uint8_t *rows[DSV4_BLOCKS_PER_PAGE]; /* borrowed from the blocks */
    struct dsv4_block *blocks[DSV4_BLOCKS_PER_PAGE]; /* one reference each, or NULL */
    atomic_int references;
};

struct dsv4_row_store {
    struct dsv4_page **pages; /* owned table of [capacity], n_page of them held, one reference each */
    int32_t n_page, capacity;
    int32_t n_block; /* blocks that hold rows; what pages have beyond is left over */
    size_t row_bytes;
};

/*
 * Makes rows [first, end) exist, zeroed where new, and writable: blocks others share are copied.  No row between the
 * last one and `first` may be missing.  1 without memory: every row is as it was.
 */
int dsv4_rows_reserve(struct dsv4_row_store *s, int32_t first, int32_t end);

/* The first n rows of `from` into the empty store `to`, shared.  1 without memory. */
int dsv4_rows_share(struct dsv4_row_store *to, const struct dsv4_row_store *from, int32_t n);

void dsv4_rows_release(struct dsv4_row_store *s);

static inline uint64_t dsv4_rows_bytes(const struct dsv4_row_store *s) {
    return (uint64_t)s->n_block * DSV4_ROWS_PER_BLOCK * s->row_bytes;
}

/* To read; to write only after dsv4_rows_reserve. */
static inline uint8_t *dsv4_row(const struct dsv4_row_store *s, int32_t i) {
    int32_t block = i / DSV4_ROWS_PER_BLOCK;
    return s->pages[block / DSV4_BLOCKS_PER_PAGE]->rows[block % DSV4_BLOCKS_PER_PAGE] +
           (size_t)(i % DSV4_ROWS_PER_BLOCK) * s->row_bytes;
}

#endif
