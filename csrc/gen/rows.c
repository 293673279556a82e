/* SPDX-License-Identifier: Apache-2.0 */
#include "gen/rows.h"

#include <stdlib.h>
#include <string.h>

#include "core/crc32c.h"

struct dsv4_block {
    atomic_int references;
    _Alignas(64) uint8_t rows[];
};

static size_t block_bytes(const struct dsv4_row_store *s) {
    return s->row_bytes << s->shift;
}

/* The blocks that hold rows up to n. */
static int32_t blocks_of(const struct dsv4_row_store *s, int32_t n) {
    return (n + (1 << s->shift) - 1) >> s->shift;
}

/* Bit of the piece that block i is part of, in the `unchecked` of its page. */
static uint32_t piece_of(const struct dsv4_row_store *s, int32_t i) {
    return ((uint32_t)i % DSV4_BLOCKS_PER_PAGE) >> (DSV4_BLOCK_SHIFT - s->shift);
}

/* Zeroed but for the first n bytes. */
static struct dsv4_block *block_create(const struct dsv4_row_store *s, const uint8_t *from, size_t n) {
    size_t bytes = block_bytes(s);
    struct dsv4_block *b = aligned_alloc(64, (sizeof *b + bytes + 63) / 64 * 64);
    if (!b)
        return NULL;
    atomic_init(&b->references, 1);
    if (n)
        memcpy(b->rows, from, n);
    memset(b->rows + n, 0, bytes - n);
    return b;
}

static void block_release(struct dsv4_block *b) {
    if (b && atomic_fetch_sub(&b->references, 1) == 1)
        free(b);
}

static void page_release(struct dsv4_page *p) {
    if (atomic_fetch_sub(&p->references, 1) > 1)
        return;
    for (int i = 0; i < DSV4_BLOCKS_PER_PAGE; i++)
        block_release(p->blocks[i]);
    dsv4_mapping_release(p->file);
    free(p);
}

static struct dsv4_page *page_create(const struct dsv4_page *from) {
    struct dsv4_page *p = calloc(1, sizeof *p);
    if (!p)
        return NULL;
    atomic_init(&p->references, 1);
    atomic_init(&p->unchecked, from ? atomic_load(&from->unchecked) : 0);
    if (from && from->file) {
        dsv4_mapping_retain(from->file);
        p->file = from->file;
        memcpy(p->crcs, from->crcs, sizeof p->crcs);
    }
    for (int i = 0; from && i < DSV4_BLOCKS_PER_PAGE; i++) {
        p->rows[i] = from->rows[i];
        p->blocks[i] = from->blocks[i];
        if (p->blocks[i])
            atomic_fetch_add(&p->blocks[i]->references, 1);
    }
    return p;
}

static int reserve_table(struct dsv4_row_store *s, int32_t n) {
    if (n <= s->capacity)
        return 0;
    int32_t capacity = n > 2 * s->capacity ? n : 2 * s->capacity;
    struct dsv4_page **table = realloc(s->pages, (size_t)capacity * sizeof(*table));
    if (!table)
        return 1;
    s->pages = table;
    s->capacity = capacity;
    return 0;
}

/* The page of this index, referred to by nobody else; NULL without memory. */
static struct dsv4_page *own_page(struct dsv4_row_store *s, int32_t i) {
    if (i == s->n_page) {
        struct dsv4_page *fresh = reserve_table(s, i + 1) ? NULL : page_create(NULL);
        if (fresh)
            s->pages[s->n_page++] = fresh;
        return fresh;
    }
    struct dsv4_page *page = s->pages[i];
    if (atomic_load(&page->references) == 1)
        return page;
    struct dsv4_page *copy = page_create(page);
    if (!copy)
        return NULL;
    page_release(page);
    return s->pages[i] = copy;
}

static enum dsv4_rows_status own_block(struct dsv4_row_store *s, int32_t i) {
    int32_t at = i % DSV4_BLOCKS_PER_PAGE, row = i << s->shift;
    struct dsv4_page *page = own_page(s, i / DSV4_BLOCKS_PER_PAGE);
    if (!page)
        return DSV4_ROWS_NO_MEMORY;
    struct dsv4_block *old = page->blocks[at];
    if (!old || atomic_load(&old->references) > 1) {
        /* a piece whose rows have all been given up needs no comparison; of any other, this is the last chance */
        int piece_kept = row / DSV4_ROWS_PER_BLOCK * DSV4_ROWS_PER_BLOCK < s->n_block << s->shift;
        if (piece_kept && dsv4_rows_damaged(s, row, row + 1) >= 0)
            return DSV4_ROWS_DAMAGED;
        struct dsv4_block *fresh = block_create(s, page->rows[at], i < s->n_block ? block_bytes(s) : 0);
        if (!fresh)
            return DSV4_ROWS_NO_MEMORY;
        block_release(old);
        page->blocks[at] = fresh;
        page->rows[at] = fresh->rows;
        atomic_fetch_and(&page->unchecked, ~((uint64_t)1 << piece_of(s, i)));
    }
    s->n_block = i < s->n_block ? s->n_block : i + 1;
    return DSV4_ROWS_OK;
}

enum dsv4_rows_status dsv4_rows_reserve(struct dsv4_row_store *s, int32_t first, int32_t end) {
    enum dsv4_rows_status status = DSV4_ROWS_OK;
    if (first == end)
        return status;
    for (int32_t i = first >> s->shift; i < blocks_of(s, end) && status == DSV4_ROWS_OK; i++)
        status = own_block(s, i);
    return status;
}

/* Piece i of a file, at `rows`: n rows, which stay there if they are a whole piece. */
static enum dsv4_rows_status map_piece(struct dsv4_row_store *s, struct dsv4_mapping *file, uint8_t *rows, int32_t i,
                                       int32_t n, uint32_t crc) {
    int whole = n == DSV4_ROWS_PER_BLOCK;
    int32_t first = i << (DSV4_BLOCK_SHIFT - s->shift), end = first + blocks_of(s, n);
    if (!whole && dsv4_crc32c(0, rows, (size_t)n * s->row_bytes) != crc)
        return DSV4_ROWS_DAMAGED;
    struct dsv4_page *page = own_page(s, first / DSV4_BLOCKS_PER_PAGE);
    if (!page)
        return DSV4_ROWS_NO_MEMORY;
    if (whole && !page->file) {
        dsv4_mapping_retain(file);
        page->file = file;
    }
    for (int32_t b = first; b < end; b++, rows += block_bytes(s)) {
        int32_t at = b % DSV4_BLOCKS_PER_PAGE, left = n - ((b - first) << s->shift);
        size_t part = (size_t)(left < 1 << s->shift ? left : 1 << s->shift) * s->row_bytes;
        struct dsv4_block *copy = whole ? NULL : block_create(s, rows, part);
        if (!whole && !copy)
            return DSV4_ROWS_NO_MEMORY;
        page->blocks[at] = copy;
        page->rows[at] = whole ? rows : copy->rows;
        s->n_block = b + 1;
    }
    page->crcs[piece_of(s, first)] = crc;
    if (whole)
        atomic_fetch_or(&page->unchecked, (uint64_t)1 << piece_of(s, first));
    return DSV4_ROWS_OK;
}

enum dsv4_rows_status dsv4_rows_map(struct dsv4_row_store *s, struct dsv4_mapping *file, uint64_t offset,
                                    const uint32_t *crcs, int32_t n) {
    uint8_t *data = (uint8_t *)(uintptr_t)file->file.data + offset; /* written to only where it is copied first */
    enum dsv4_rows_status status = DSV4_ROWS_OK;
    for (int32_t i = 0; i * DSV4_ROWS_PER_BLOCK < n && status == DSV4_ROWS_OK; i++) {
        int32_t left = n - i * DSV4_ROWS_PER_BLOCK;
        status = map_piece(s, file, data + (size_t)i * DSV4_ROWS_PER_BLOCK * s->row_bytes, i,
                           left < DSV4_ROWS_PER_BLOCK ? left : DSV4_ROWS_PER_BLOCK, crcs[i]);
    }
    s->mapped = 1;
    return status;
}

int32_t dsv4_rows_check(const struct dsv4_row_store *s, int32_t first, int32_t end) {
    for (int32_t row = first / DSV4_ROWS_PER_BLOCK * DSV4_ROWS_PER_BLOCK; row < end; row += DSV4_ROWS_PER_BLOCK) {
        int32_t block = row >> s->shift;
        struct dsv4_page *page = s->pages[block / DSV4_BLOCKS_PER_PAGE];
        uint32_t piece = piece_of(s, block);
        uint64_t bit = (uint64_t)1 << piece;
        if (!(atomic_load_explicit(&page->unchecked, memory_order_relaxed) & bit))
            continue;
        if (dsv4_crc32c(0, dsv4_row(s, row), DSV4_ROWS_PER_BLOCK * s->row_bytes) != page->crcs[piece])
            return row;
        atomic_fetch_and(&page->unchecked, ~bit);
    }
    return -1;
}

const char *dsv4_rows_file(const struct dsv4_row_store *s, int32_t i) {
    int32_t block = i >> s->shift;
    const struct dsv4_page *page = s->pages[block / DSV4_BLOCKS_PER_PAGE];
    return page->file && !page->blocks[block % DSV4_BLOCKS_PER_PAGE] ? page->file->path : NULL;
}

int dsv4_rows_share(struct dsv4_row_store *to, const struct dsv4_row_store *from, int32_t n) {
    int32_t blocks = blocks_of(from, n);
    int32_t pages = (blocks + DSV4_BLOCKS_PER_PAGE - 1) / DSV4_BLOCKS_PER_PAGE;
    if (reserve_table(to, pages))
        return 1;
    for (int32_t i = 0; i < pages; i++) {
        to->pages[i] = from->pages[i];
        atomic_fetch_add(&to->pages[i]->references, 1);
    }
    to->n_page = pages;
    to->n_block = blocks;
    to->mapped = from->mapped;
    return 0;
}

void dsv4_rows_release(struct dsv4_row_store *s) {
    for (int32_t i = 0; i < s->n_page; i++)
        page_release(s->pages[i]);
    free(s->pages);
    *s = (struct dsv4_row_store){.row_bytes = s->row_bytes, .shift = s->shift};
}
