/* SPDX-License-Identifier: Apache-2.0 */
#include "model/experts.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "io/reader.h"
#include "model/model.h"
#include "model/pass.h"

/* A score is halved after so many tokens: in simulated routes, skewed and sticky, the best of 8 to 256 over all. */
static const double HALF_LIFE = 16;
enum { PARTS = DSV4_LOAD_READS, WAIT_MS = 20, IN_MAPPING = -1 };

/* Weights and scales of an expert: where they are in the files, or not at all (widened at load). */
struct part {
    uint64_t offset, bytes;
    int32_t file; /* -1: not in a file */
};

struct entry {
    struct dsv4_expert mapped;
    int32_t slot;     /* or IN_MAPPING */
    int32_t asked;    /* the kernel was asked for its mapped pages in this layer */
    double uses, when; /* score, and the clock when it was right */
};

struct slot {
    int32_t expert; /* layer * experts + expert, or -1 */
    int32_t loading, pinned;
    double key;        /* log2 of the score plus when / HALF_LIFE: decay leaves the order of keys as it is */
    int64_t at[PARTS]; /* of each part in the slot, -1: not in a file */
    struct dsv4_load load;
};

struct dsv4_expert_cache {
    dsv4_model *m;
    dsv4_reader *reader;   /* owned, as the next three */
    struct entry *entries; /* [layers][experts] */
    struct slot *slots;
    double *near;          /* [layers] what a layer's place in the pass adds to a key */
    uint8_t *pool;         /* owned; [n_slot][slot_bytes] */
    size_t slot_bytes, pool_bytes;
    int32_t n_layer, n_exp, n_slot;
    int32_t layer; /* fetched last in the pass, -1: none */
    double clock;  /* tokens so far */
    atomic_ullong kept, read, mapped;
};

/* ------------------------------------------------------------------------------------------------ where an expert is */

static struct part part_of(const dsv4_model *m, const void *data, uint64_t bytes) {
    const uint8_t *p = data;
    for (int32_t i = 0; data && i < m->n_shard; i++)
        if (p >= m->shards[i].data && p < m->shards[i].data + m->shards[i].size)
            return (struct part){(uint64_t)(p - m->shards[i].data), bytes, i};
    return (struct part){0, 0, -1};
}

static void parts_of(const dsv4_model *m, const struct dsv4_expert *e, struct part *out) {
    const struct dsv4_weight *w[] = {&e->w1, &e->w3, &e->w2};
    for (int i = 0; i < 3; i++) {
        out[2 * i] = part_of(m, w[i]->data, dsv4_weight_bytes(w[i]));
        out[2 * i + 1] = part_of(m, w[i]->scale, dsv4_scale_bytes(w[i]));
    }
}

static uint64_t floor_to(uint64_t n, uint64_t unit) {
    return n / unit * unit;
}

static uint64_t ceil_to(uint64_t n, uint64_t unit) {
    return (n + unit - 1) / unit * unit;
}

/* The fewest aligned reads that cover the parts, and where each part then lies behind `base`; the bytes of all reads. */
static size_t lay_out(const struct part *parts, uint8_t *base, struct dsv4_load *load, int64_t *at) {
    int order[PARTS], n = 0;
    size_t used = 0;
    for (int i = 0; i < PARTS; i++) {
        at[i] = -1;
        if (parts[i].file < 0)
            continue;
        int j = n++;
        for (; j > 0; j--) {
            const struct part *before = &parts[order[j - 1]];
            if (before->file < parts[i].file || (before->file == parts[i].file && before->offset < parts[i].offset))
                break;
            order[j] = order[j - 1];
        }
        order[j] = i;
    }
    load->n = 0;
    for (int k = 0; k < n; k++) {
        const struct part *part = &parts[order[k]];
        uint64_t from = floor_to(part->offset, DSV4_READ_ALIGN);
        uint64_t to = ceil_to(part->offset + part->bytes, DSV4_READ_ALIGN);
        struct dsv4_read *read = load->n ? &load->reads[load->n - 1] : NULL;
        if (!read || read->file != part->file || read->offset + read->bytes < from) {
            read = &load->reads[load->n++];
            *read = (struct dsv4_read){part->file, from, 0, base + used};
        }
        if (to > read->offset + read->bytes) {
            used += to - read->offset - read->bytes;
            read->bytes = to - read->offset;
        }
        at[order[k]] = read->to - base + (int64_t)(part->offset - read->offset);
    }
    return used;
}

/* ---------------------------------------------------------------------------------------------------- slots and keys */

static struct dsv4_expert *in_use(const struct dsv4_expert_cache *c, int32_t x) {
    return &c->m->layers[x / c->n_exp].experts[x % c->n_exp];
}

static void note_use(struct dsv4_expert_cache *c, int32_t x, int32_t rows) {
    struct entry *e = &c->entries[x];
    e->uses = e->uses * exp2((e->when - c->clock) / HALF_LIFE) + rows;
    e->when = c->clock;
}

static void unpin(struct dsv4_expert_cache *c, struct slot *s) {
    const struct entry *e = &c->entries[s->expert];
    s->pinned = 0;
    s->key = log2(e->uses + 1e-9) + e->when / HALF_LIFE;
}

/* A finished load: its expert is used from the slot now; a failed one gives up the slot.  1 when it failed. */
static int settle(struct dsv4_expert_cache *c, struct slot *s) {
    struct dsv4_expert *e = in_use(c, s->expert);
    struct dsv4_weight *w[] = {&e->w1, &e->w3, &e->w2};
    const uint8_t *base = c->pool + (size_t)(s - c->slots) * c->slot_bytes;
    s->loading = 0;
    if (s->load.failed) {
        c->entries[s->expert].slot = IN_MAPPING;
        s->expert = -1;
        s->pinned = 0;
        return 1;
    }
    for (int i = 0; i < 3; i++) {
        w[i]->data = s->at[2 * i] < 0 ? w[i]->data : base + s->at[2 * i];
        w[i]->scale = s->at[2 * i + 1] < 0 ? w[i]->scale : base + s->at[2 * i + 1];
    }
    return 0;
}

/* The slot that is needed least, emptied; NULL when all are in use. */
static struct slot *take_slot(struct dsv4_expert_cache *c) {
    struct slot *best = NULL;
    double lowest = INFINITY;
    for (int32_t i = 0; i < c->n_slot; i++) {
        struct slot *s = &c->slots[i];
        if (s->expert < 0)
            return s;
        if (s->pinned || s->loading)
            continue;
        double key = s->key + c->near[s->expert / c->n_exp];
        if (key < lowest) {
            lowest = key;
            best = s;
        }
    }
    if (best) {
        *in_use(c, best->expert) = c->entries[best->expert].mapped;
        c->entries[best->expert].slot = IN_MAPPING;
        best->expert = -1;
    }
    return best;
}

/* Starts to read an expert into a slot, where it stays at least until it is unpinned; 0 when there is no slot. */
static int start(struct dsv4_expert_cache *c, int32_t x) {
    struct slot *s = take_slot(c);
    struct part parts[PARTS];
    if (!s)
        return 0;
    parts_of(c->m, &c->entries[x].mapped, parts);
    lay_out(parts, c->pool + (size_t)(s - c->slots) * c->slot_bytes, &s->load, s->at);
    s->expert = x;
    s->loading = s->pinned = 1;
    c->entries[x].slot = (int32_t)(s - c->slots);
    dsv4_reader_start(c->reader, &s->load);
    return 1;
}

/* A step of another order than usual: layers to come weigh more than the layer just passed. */
static void set_near(struct dsv4_expert_cache *c, int32_t layer) {
    for (int32_t l = 0; l < c->n_layer; l++)
        c->near[l] = -(double)((l - layer - 1 + c->n_layer) % c->n_layer) / c->n_layer;
}

/* ------------------------------------------------------------------------------------------------------------- a pass */

static int32_t hash_id(const struct dsv4_layer *l, int32_t i) {
    int64_t wide;
    int32_t narrow;
    if (l->tid2eid_bytes == 8) {
        memcpy(&wide, l->tid2eid + 8 * (size_t)i, 8);
        return (int32_t)wide;
    }
    memcpy(&narrow, l->tid2eid + 4 * (size_t)i, 4);
    return narrow;
}

/* Keeps experts of the pass's hash layers, or reads them ahead, in the order of use, in at most half of the slots. */
static void read_hashed(struct dsv4_expert_cache *c, const struct dsv4_pass *p) {
    int32_t top_k = c->m->config.num_experts_per_tok, left = c->n_slot / 2;
    for (int32_t layer = p->first_layer; layer < p->end_layer && c->m->layers[layer].tid2eid; layer++) {
        const struct dsv4_layer *l = &c->m->layers[layer];
        for (int32_t i = 0; i < p->n_tok * top_k && left > 0; i++) {
            int32_t x = layer * c->n_exp + hash_id(l, p->ids[i / top_k] * top_k + i % top_k);
            struct slot *s = c->entries[x].slot < 0 ? NULL : &c->slots[c->entries[x].slot];
            if (s && s->pinned)
                continue;
            if (s)
                s->pinned = 1;
            else if (!start(c, x))
                return;
            left--;
        }
    }
}

/* No slot for it: at least its pages are asked for together, and given up after the layer. */
static void ask_kernel(struct dsv4_expert_cache *c, int32_t x) {
    struct part parts[PARTS];
    c->entries[x].asked = 1;
    parts_of(c->m, &c->entries[x].mapped, parts);
    for (int i = 0; i < PARTS; i++)
        if (parts[i].file >= 0)
            dsv4_resident_ask(c->m->shards[parts[i].file].data + parts[i].offset, (size_t)parts[i].bytes);
}

static void give_up_pages(struct dsv4_expert_cache *c, int32_t x) {
    struct part parts[PARTS];
    c->entries[x].asked = 0;
    parts_of(c->m, &c->entries[x].mapped, parts);
    for (int i = 0; i < PARTS; i++) {
        if (parts[i].file < 0)
            continue;
        dsv4_resident_unmap(c->m->shards[parts[i].file].data + parts[i].offset, (size_t)parts[i].bytes);
        dsv4_reader_forget(c->reader, parts[i].file, parts[i].offset, parts[i].bytes);
    }
}

/* The experts of the layer before stay where they are until here, then they may go. */
static void leave_layer(struct dsv4_expert_cache *c) {
    for (int32_t e = 0; c->layer >= 0 && e < c->n_exp; e++) {
        int32_t x = c->layer * c->n_exp + e;
        if (c->entries[x].slot >= 0)
            unpin(c, &c->slots[c->entries[x].slot]);
        else if (c->entries[x].asked)
            give_up_pages(c, x);
    }
    c->layer = -1;
}

void dsv4_experts_begin(struct dsv4_pass *p) {
    struct dsv4_expert_cache *c = p->m->cache;
    leave_layer(c);
    for (int32_t i = 0; i < c->n_slot; i++) { /* what a cancelled pass left behind */
        struct slot *s = &c->slots[i];
        if (s->loading && !dsv4_reader_wait(c->reader, &s->load, 0) && settle(c, s))
            continue;
        if (s->expert >= 0 && s->pinned)
            unpin(c, s);
    }
    c->clock += p->n_tok;
    set_near(c, p->first_layer > 0 ? p->first_layer - 1 : c->n_layer - 1);
    read_hashed(c, p);
}

/* In a pass so long that nearly every expert is chosen, the next layer's are read while this one is computed. */
static void read_next_layer(struct dsv4_expert_cache *c, const struct dsv4_pass *p, int32_t layer) {
    int64_t chosen = (int64_t)p->n_tok * c->m->config.num_experts_per_tok;
    if (layer + 1 >= p->end_layer || chosen < 3 * (int64_t)c->n_exp || c->n_slot < 2 * c->n_exp)
        return;
    for (int32_t e = 0; e < c->n_exp; e++) {
        int32_t x = (layer + 1) * c->n_exp + e;
        if (c->entries[x].slot >= 0)
            c->slots[c->entries[x].slot].pinned = 1;
        else if (!start(c, x))
            return;
    }
}

/* Returns when the slot is filled, or the step was cancelled.  1 when it could not be filled. */
static int wait_for(struct dsv4_expert_cache *c, const dsv4_worker *w, struct slot *s) {
    while (s->loading && !dsv4_cancelled(w))
        if (!dsv4_reader_wait(c->reader, &s->load, WAIT_MS))
            return settle(c, s);
    return 0;
}

void dsv4_experts_fetch(dsv4_worker *w, struct dsv4_pass *p, int32_t layer) {
    struct dsv4_expert_cache *c = p->m->cache;
    const int32_t *group_first = dsv4_prepared(w, p)->group_first;
    struct entry *entries = &c->entries[(size_t)layer * (size_t)c->n_exp];
    unsigned long long kept = 0, read = 0, mapped = 0;
    leave_layer(c);
    c->layer = layer;
    set_near(c, layer);
    for (int32_t e = 0; e < c->n_exp; e++) {
        int32_t rows = group_first[e + 1] - group_first[e];
        if (!rows)
            continue;
        note_use(c, layer * c->n_exp + e, rows);
        if (entries[e].slot >= 0) {
            struct slot *s = &c->slots[entries[e].slot];
            s->pinned = 1;
            *(s->loading ? &read : &kept) += 1;
        }
    }
    for (int32_t e = 0; e < c->n_exp; e++) {
        if (group_first[e + 1] == group_first[e] || entries[e].slot >= 0)
            continue;
        int started = start(c, layer * c->n_exp + e);
        *(started ? &read : &mapped) += 1;
        if (!started)
            ask_kernel(c, layer * c->n_exp + e);
    }
    atomic_fetch_add(&c->kept, kept);
    atomic_fetch_add(&c->read, read);
    atomic_fetch_add(&c->mapped, mapped);
    read_next_layer(c, p, layer);
    for (int32_t e = 0; e < c->n_exp; e++)
        if (group_first[e + 1] > group_first[e] && entries[e].slot >= 0 &&
            wait_for(c, w, &c->slots[entries[e].slot])) {
            p->unread = e;
            p->unread_layer = layer;
            dsv4_team_cancel(w->team);
            return;
        }
}

/* ------------------------------------------------------------------------------------------------- creating, asking */

/* Bytes of the largest expert in a slot, 0 when none lies in a file. */
static size_t largest(const struct dsv4_expert_cache *c) {
    struct dsv4_load load;
    struct part parts[PARTS];
    int64_t at[PARTS];
    size_t most = 0;
    for (int32_t x = 0; x < c->n_layer * c->n_exp; x++) {
        parts_of(c->m, in_use(c, x), parts);
        size_t bytes = lay_out(parts, NULL, &load, at);
        most = bytes > most ? bytes : most;
    }
    return most;
}

static dsv4_status make_pool(struct dsv4_expert_cache *c, uint64_t bytes, dsv4_error *err) {
    int32_t top_k = c->m->config.num_experts_per_tok;
    c->slot_bytes = largest(c);
    uint64_t n = c->slot_bytes ? bytes / c->slot_bytes : 0, all = (uint64_t)c->n_layer * (uint64_t)c->n_exp;
    if (n < (uint64_t)top_k)
        return dsv4_fail(err, DSV4_E_MEMORY, "memory for routed experts: got %llu bytes, wanted at least %llu (%d experts)",
                         (unsigned long long)bytes, (unsigned long long)c->slot_bytes * (unsigned)top_k, top_k);
    c->n_slot = (int32_t)(n < all ? n : all);
    c->pool_bytes = (size_t)c->n_slot * c->slot_bytes;
    void *pool = mmap(NULL, c->pool_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    c->slots = calloc((size_t)c->n_slot, sizeof *c->slots);
    c->pool = pool == MAP_FAILED ? NULL : pool;
    if (!c->slots || !c->pool)
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for %d experts of %zu bytes", c->n_slot, c->slot_bytes);
    madvise(c->pool, c->pool_bytes, MADV_HUGEPAGE);
    madvise(c->pool, c->pool_bytes, MADV_DONTFORK); /* a child cannot use the model */
    for (int32_t i = 0; i < c->n_slot; i++)
        c->slots[i].expert = -1;
    return DSV4_OK;
}

static dsv4_status build(struct dsv4_expert_cache *c, const struct dsv4_shard_desc *shards, uint64_t bytes,
                         dsv4_error *err) {
    size_t n = (size_t)c->n_layer * (size_t)c->n_exp;
    c->entries = calloc(n, sizeof *c->entries);
    c->near = calloc((size_t)c->n_layer, sizeof *c->near);
    if (!c->entries || !c->near)
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for a table of %zu experts", n);
    for (size_t x = 0; x < n; x++)
        c->entries[x] = (struct entry){.mapped = *in_use(c, (int32_t)x), .slot = IN_MAPPING};
    DSV4_TRY(make_pool(c, bytes, err));
    return dsv4_reader_create(&c->reader, shards, c->m->n_shard, err);
}

dsv4_status dsv4_experts_create(struct dsv4_expert_cache **out, dsv4_model *m, const struct dsv4_shard_desc *shards,
                                uint64_t bytes, dsv4_error *err) {
    struct dsv4_expert_cache *c = calloc(1, sizeof *c);
    if (!c)
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for a cache of experts");
    c->m = m;
    c->n_layer = m->config.num_hidden_layers;
    c->n_exp = m->config.n_routed_experts;
    c->layer = -1;
    dsv4_status status = build(c, shards, bytes, err);
    if (status != DSV4_OK) {
        dsv4_experts_destroy(c);
        return status;
    }
    *out = c;
    return DSV4_OK;
}

void dsv4_experts_destroy(struct dsv4_expert_cache *c) {
    if (!c)
        return;
    dsv4_reader_destroy(c->reader);
    if (c->pool)
        munmap(c->pool, c->pool_bytes);
    free(c->slots);
    free(c->near);
    free(c->entries);
    free(c);
}

void dsv4_experts_count(struct dsv4_expert_cache *c, struct dsv4_expert_counts *out) {
    *out = (struct dsv4_expert_counts){
        .slots = c->n_slot, .slot_bytes = c->slot_bytes, .kept = atomic_load(&c->kept), .read = atomic_load(&c->read),
        .mapped = atomic_load(&c->mapped), .bytes = dsv4_reader_bytes(c->reader),
    };
}
