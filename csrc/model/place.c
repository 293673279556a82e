/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Machines with several memory nodes: rows of every weight lie on the node whose workers compute them (dsv4_share_node).
 * Each worker, bound to its node, copies its part of the bytes of a weight and so is the first to touch those pages,
 * which the kernel then takes from its node.  What was copied is given up by the mapping and by the page cache, so the
 * weights are in memory once, and a little more while they move.  Not copied: the embedding and the hash tables, of
 * which a step reads a few rows, and vectors.
 *
 * Costs: the whole model is read at load.  Tested with simulated nodes; what it gains has not been measured.
 */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "model/experts.h"
#include "model/model.h"

/* Where large pages do not blur the border between two nodes; and how much is copied before its source is given up. */
enum { BLOCK_ALIGN = 2 << 20, LARGE = 16 << 20, BATCH = 64 << 20 };

struct block {
    const void **data; /* the field of the weight, replaced when its copy is complete */
    uint64_t bytes, at;
};

struct place {
    dsv4_model *m;
    const struct dsv4_shard_desc *shards;
    struct block *blocks; /* owned */
    size_t n, capacity;
    uint64_t total;
    atomic_ullong done;
};

static int add_block(struct place *p, const void **data, uint64_t bytes) {
    if (!bytes)
        return 0;
    if (p->n == p->capacity) {
        size_t capacity = p->capacity ? 2 * p->capacity : 1024;
        struct block *grown = realloc(p->blocks, capacity * sizeof *grown);
        if (!grown)
            return 1;
        p->blocks = grown;
        p->capacity = capacity;
    }
    uint64_t align = bytes >= LARGE ? BLOCK_ALIGN : 4096;
    uint64_t at = (p->total + align - 1) / align * align;
    p->blocks[p->n++] = (struct block){data, bytes, at};
    p->total = at + bytes;
    return 0;
}

static int add(struct place *p, struct dsv4_weight *w) {
    return add_block(p, &w->data, dsv4_weight_bytes(w)) || add_block(p, &w->scale, dsv4_scale_bytes(w));
}

static int add_expert(struct place *p, struct dsv4_expert *e) {
    return add(p, &e->w1) || add(p, &e->w3) || add(p, &e->w2);
}

static int add_compressor(struct place *p, struct dsv4_compressor *c) {
    return c->wkv.data && (add(p, &c->wkv) || add(p, &c->wgate));
}

static int add_layer(struct place *p, struct dsv4_layer *l) {
    if (add(p, &l->wq_a) || add(p, &l->wq_b) || add(p, &l->wkv) || add(p, &l->wo_a) || add(p, &l->wo_b) ||
        add_compressor(p, &l->compressor) || add_compressor(p, &l->index_compressor))
        return 1;
    if (l->index_wq_b.data && (add(p, &l->index_wq_b) || add(p, &l->weights_proj)))
        return 1;
    for (int32_t e = 0; e < p->m->config.n_routed_experts; e++)
        if (add_expert(p, &l->experts[e]))
            return 1;
    return add(p, &l->gate) || add_expert(p, &l->shared);
}

static int collect(struct place *p) {
    for (int32_t i = 0; i < p->m->config.num_hidden_layers; i++)
        if (add_layer(p, &p->m->layers[i]))
            return 1;
    return add(p, &p->m->head);
}

/* The blocks from `first` on that are copied together. */
static size_t batch_end(const struct place *p, size_t first) {
    size_t end = first;
    for (uint64_t bytes = 0; end < p->n && bytes < BATCH; end++)
        bytes += p->blocks[end].bytes;
    return end;
}

/* The mapped bytes of a block are no longer needed. */
static void give_up(const struct place *p, const uint8_t *data, uint64_t bytes) {
    for (int32_t i = 0; i < p->m->n_shard; i++) {
        const struct dsv4_shard *shard = &p->m->shards[i];
        if (data < shard->data || data >= shard->data + shard->size)
            continue;
        dsv4_resident_unmap(data, (size_t)bytes);
        posix_fadvise(p->shards[i].fd, (off_t)(data - shard->data), (off_t)bytes, POSIX_FADV_DONTNEED);
    }
}

static void place_job(dsv4_worker *w, void *ctx) {
    struct place *p = ctx;
    uint8_t *to = p->m->placed;
    for (size_t first = 0, end; first < p->n; first = end) {
        end = batch_end(p, first);
        for (size_t i = first; i < end && !dsv4_cancelled(w); i++) {
            const struct block *b = &p->blocks[i];
            uint64_t lo = b->bytes * (uint64_t)w->id / (uint64_t)w->n, hi = b->bytes * (uint64_t)(w->id + 1) / (uint64_t)w->n;
            memcpy(to + b->at + lo, (const uint8_t *)*b->data + lo, (size_t)(hi - lo));
            atomic_fetch_add(&p->done, hi - lo);
        }
        if (dsv4_barrier(w))
            return;
        for (size_t i = first; w->id == 0 && i < end; i++) {
            const uint8_t *from = *p->blocks[i].data;
            *p->blocks[i].data = to + p->blocks[i].at;
            give_up(p, from, p->blocks[i].bytes);
        }
        if (dsv4_barrier(w))
            return;
    }
}

static dsv4_status copy_all(struct place *p, dsv4_error *err) {
    dsv4_model *m = p->m;
    void *room = mmap(NULL, (size_t)p->total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED)
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for copies of the weights, %llu bytes",
                         (unsigned long long)p->total);
    m->placed = room;
    m->placed_bytes = (size_t)p->total;
    for (size_t i = 0; i < p->n; i++)
        if (p->blocks[i].bytes >= LARGE)
            madvise((uint8_t *)room + p->blocks[i].at, (size_t)p->blocks[i].bytes, MADV_HUGEPAGE);
    madvise(room, (size_t)p->total, MADV_DONTFORK); /* a child cannot use the model */
    return dsv4_load_job(m, place_job, p, &p->done, p->total, err);
}

dsv4_status dsv4_place_weights(dsv4_model *m, const struct dsv4_shard_desc *shards, dsv4_error *err) {
    struct place p = {.m = m, .shards = shards};
    dsv4_status status = collect(&p) ? dsv4_fail(err, DSV4_E_MEMORY, "no memory for a list of weights")
                                     : copy_all(&p, err);
    free(p.blocks);
    return status;
}
