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
    return DSV4_ROWS_PER_BLOCK * s->row_bytes;
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
    int32_t at = i % DSV4_BLOCKS_PER_PAGE;
    struct dsv4_page *page = own_page(s, i / DSV4_BLOCKS_PER_PAGE);
    if (!page)
        return DSV4_ROWS_NO_MEMORY;
    struct dsv4_block *old = page->blocks[at];
    if (!old || atomic_load(&old->references) > 1) {
        int kept = i < s->n_block;
        if (kept && dsv4_rows_damaged(s, i * DSV4_ROWS_PER_BLOCK, i * DSV4_ROWS_PER_BLOCK + 1) >= 0)
            return DSV4_ROWS_DAMAGED;
        struct dsv4_block *fresh = block_create(s, page->rows[at], kept ? block_bytes(s) : 0);
        if (!fresh)
            return DSV4_ROWS_NO_MEMORY;
        block_release(old);
        page->blocks[at] = fresh;
        page->rows[at] = fresh->rows;
        atomic_fetch_and(&page->unchecked, ~((uint64_t)1 << at));
    }
    s->n_block = i < s->n_block ? s->n_block : i + 1;
    return DSV4_ROWS_OK;
}

enum dsv4_rows_status dsv4_rows_reserve(struct dsv4_row_store *s, int32_t first, int32_t end) {
    enum dsv4_rows_status status = DSV4_ROWS_OK;
    if (first == end)
        return status;
    int32_t last = (end + DSV4_ROWS_PER_BLOCK - 1) / DSV4_ROWS_PER_BLOCK;
    for (int32_t i = first / DSV4_ROWS_PER_BLOCK; i < last && status == DSV4_ROWS_OK; i++)
        status = own_block(s, i);
    return status;
}

enum dsv4_rows_status dsv4_rows_map(struct dsv4_row_store *s, struct dsv4_mapping *file, uint64_t offset,
                                    const uint32_t *crcs, int32_t n) {
    uint8_t *data = (uint8_t *)(uintptr_t)file->file.data + offset; /* written to only where it is copied first */
    for (int32_t i = 0; i * DSV4_ROWS_PER_BLOCK < n; i++) {
        int32_t left = n - i * DSV4_ROWS_PER_BLOCK, at = i % DSV4_BLOCKS_PER_PAGE;
        uint8_t *rows = data + (size_t)i * block_bytes(s);
        size_t part = (size_t)left * s->row_bytes;
        int whole = left >= DSV4_ROWS_PER_BLOCK;
        if (!whole && dsv4_crc32c(0, rows, part) != crcs[i])
            return DSV4_ROWS_DAMAGED;
        struct dsv4_page *page = own_page(s, i / DSV4_BLOCKS_PER_PAGE);
        struct dsv4_block *copy = page && !whole ? block_create(s, rows, part) : NULL;
        if (!page || (!whole && !copy))
            return DSV4_ROWS_NO_MEMORY;
        if (whole && !page->file) {
            dsv4_mapping_retain(file);
            page->file = file;
        }
        page->blocks[at] = copy;
        page->rows[at] = whole ? rows : copy->rows;
        page->crcs[at] = crcs[i];
        if (whole)
            atomic_fetch_or(&page->unchecked, (uint64_t)1 << at);
        s->n_block = i + 1;
    }
    s->mapped = 1;
    return DSV4_ROWS_OK;
}

int32_t dsv4_rows_check(const struct dsv4_row_store *s, int32_t first, int32_t end) {
    for (int32_t i = first / DSV4_ROWS_PER_BLOCK; i * DSV4_ROWS_PER_BLOCK < end; i++) {
        int32_t at = i % DSV4_BLOCKS_PER_PAGE;
        struct dsv4_page *page = s->pages[i / DSV4_BLOCKS_PER_PAGE];
        uint64_t bit = (uint64_t)1 << at;
        if (!(atomic_load_explicit(&page->unchecked, memory_order_relaxed) & bit))
            continue;
        if (dsv4_crc32c(0, page->rows[at], block_bytes(s)) != page->crcs[at])
            return i * DSV4_ROWS_PER_BLOCK;
        atomic_fetch_and(&page->unchecked, ~bit);
    }
    return -1;
}

const char *dsv4_rows_file(const struct dsv4_row_store *s, int32_t i) {
    int32_t block = i / DSV4_ROWS_PER_BLOCK;
    const struct dsv4_page *page = s->pages[block / DSV4_BLOCKS_PER_PAGE];
    return page->file && !page->blocks[block % DSV4_BLOCKS_PER_PAGE] ? page->file->path : NULL;
}

int dsv4_rows_share(struct dsv4_row_store *to, const struct dsv4_row_store *from, int32_t n) {
    int32_t blocks = (n + DSV4_ROWS_PER_BLOCK - 1) / DSV4_ROWS_PER_BLOCK;
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
    *s = (struct dsv4_row_store){.row_bytes = s->row_bytes};
}
