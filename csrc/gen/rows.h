/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A growing array of rows of one size, copied on write: a copy shares all blocks, and whoever writes gets blocks of its
 * own.  A block has 2^shift rows: 64 where kernels walk whole blocks, fewer where the last block, which each of many forks
 * copies, is to cost little.  Blocks hang in pages, so that a copy costs one reference for 64 blocks.
 *
 * Blocks may lie in a mapped file, pieces of 64 rows with a checksum each: they are copied on write too, and a piece is
 * compared with its checksum when one of its rows is first read, so whoever reads rows asks dsv4_rows_damaged first.
 *
 * Thread-safety: one store is used by one thread at a time; stores that share blocks may be used by several.
 */
#ifndef DSV4_ROWS_H
#define DSV4_ROWS_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "io/mapping.h"

enum { DSV4_BLOCK_SHIFT = 6, DSV4_ROWS_PER_BLOCK = 1 << DSV4_BLOCK_SHIFT, DSV4_BLOCKS_PER_PAGE = 64 };

struct dsv4_block;

struct dsv4_page {
    uint8_t *rows[DSV4_BLOCKS_PER_PAGE]; /* borrowed from the blocks, or from the file */
    struct dsv4_block *blocks[DSV4_BLOCKS_PER_PAGE]; /* one reference each, or NULL */
    struct dsv4_mapping *file; /* one reference: blocks that have rows and are NULL lie there; or NULL */
    uint32_t crcs[DSV4_BLOCKS_PER_PAGE]; /* of the pieces in the file */
    _Atomic uint64_t unchecked; /* bit i: piece i is whole in the file, and not yet compared with its checksum */
    atomic_int references;
};

struct dsv4_row_store {
    struct dsv4_page **pages; /* owned table of [capacity], n_page of them held, one reference each */
    int32_t n_page, capacity;
    int32_t n_block; /* blocks that hold rows; what pages have beyond is left over */
    size_t row_bytes;
    int32_t shift; /* 0 to DSV4_BLOCK_SHIFT: blocks of 2^shift rows */
    int mapped; /* blocks may lie in a file */
};

enum dsv4_rows_status { DSV4_ROWS_OK = 0, DSV4_ROWS_NO_MEMORY = 1, DSV4_ROWS_DAMAGED = 2 };

/*
 * Makes rows [first, end) exist, zeroed where new, and writable: blocks others share are copied.  No row between the
 * last one and `first` may be missing.  On failure every row is as it was; the piece of a block that must be copied may be
 * damaged.
 */
enum dsv4_rows_status dsv4_rows_reserve(struct dsv4_row_store *s, int32_t first, int32_t end);

/* The first n rows of `from` into the empty store `to`, of the same row_bytes and shift, shared.  1 without memory. */
int dsv4_rows_share(struct dsv4_row_store *to, const struct dsv4_row_store *from, int32_t n);

/*
 * Fills the empty store with n rows of a file, which lie there from `offset` (a multiple of 64, the rows inside the file)
 * on; crcs holds the CRC-32C of every piece of 64 rows as it lies there, the last of which may be shorter.  Whole pieces
 * stay in the file; the shorter one is checked and copied.
 */
enum dsv4_rows_status dsv4_rows_map(struct dsv4_row_store *s, struct dsv4_mapping *file, uint64_t offset,
                                    const uint32_t *crcs, int32_t n);

/* Compares the pieces of rows [first, end) with their checksums, once; the first row of the first damaged one, or -1. */
int32_t dsv4_rows_check(const struct dsv4_row_store *s, int32_t first, int32_t end);
/* The file that row i lies in, or NULL. */
const char *dsv4_rows_file(const struct dsv4_row_store *s, int32_t i);

void dsv4_rows_release(struct dsv4_row_store *s);

/* To be asked before rows [first, end) are read, by any number of threads; almost always two comparisons. */
static inline int32_t dsv4_rows_damaged(const struct dsv4_row_store *s, int32_t first, int32_t end) {
    return s->mapped ? dsv4_rows_check(s, first, end) : -1;
}

static inline uint64_t dsv4_rows_bytes(const struct dsv4_row_store *s) {
    return ((uint64_t)s->n_block << s->shift) * s->row_bytes;
}

/* To read; to write only after dsv4_rows_reserve. */
static inline uint8_t *dsv4_row(const struct dsv4_row_store *s, int32_t i) {
    uint32_t block = (uint32_t)i >> s->shift;
    return s->pages[block / DSV4_BLOCKS_PER_PAGE]->rows[block % DSV4_BLOCKS_PER_PAGE] +
           ((uint32_t)i - (block << s->shift)) * s->row_bytes;
}

#endif
