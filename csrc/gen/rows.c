/* SPDX-License-Identifier: Apache-2.0 */
#include "gen/rows.h"

#include <stdlib.h>
#include <string.h>

struct dsv4_block {
    atomic_int references;
    _Alignas(64) uint8_t rows[];
};

static struct dsv4_block *block_create(const struct dsv4_row_store *s, const struct dsv4_block *from) {
    size_t bytes = DSV4_ROWS_PER_BLOCK * s->row_bytes;
    struct dsv4_block *b = aligned_alloc(64, (sizeof *b + bytes + 63) / 64 * 64);
    if (!b)
        return NULL;
    atomic_init(&b->references, 1);
    if (from)
        memcpy(b->rows, from->rows, bytes);
    else
        memset(b->rows, 0, bytes);
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
    free(p);
}

static struct dsv4_page *page_create(const struct dsv4_page *from) {
    struct dsv4_page *p = calloc(1, sizeof *p);
    if (!p)
        return NULL;
    atomic_init(&p->references, 1);
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

static int own_block(struct dsv4_row_store *s, int32_t i) {
    struct dsv4_page *page = own_page(s, i / DSV4_BLOCKS_PER_PAGE);
    if (!page)
        return 1;
    struct dsv4_block *old = page->blocks[i % DSV4_BLOCKS_PER_PAGE];
    if (!old || atomic_load(&old->references) > 1) {
        struct dsv4_block *fresh = block_create(s, i < s->n_block ? old : NULL);
        if (!fresh)
            return 1;
        block_release(old);
        page->blocks[i % DSV4_BLOCKS_PER_PAGE] = fresh;
        page->rows[i % DSV4_BLOCKS_PER_PAGE] = fresh->rows;
    }
    s->n_block = i < s->n_block ? s->n_block : i + 1;
    return 0;
}

int dsv4_rows_reserve(struct dsv4_row_store *s, int32_t first, int32_t end) {
    if (first == end)
        return 0;
    for (int32_t i = first / DSV4_ROWS_PER_BLOCK; i < (end + DSV4_ROWS_PER_BLOCK - 1) / DSV4_ROWS_PER_BLOCK; i++)
        if (own_block(s, i))
            return 1;
    return 0;
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
    return 0;
}

void dsv4_rows_release(struct dsv4_row_store *s) {
    for (int32_t i = 0; i < s->n_page; i++)
        page_release(s->pages[i]);
    free(s->pages);
    *s = (struct dsv4_row_store){.row_bytes = s->row_bytes};
}
