/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which bytes of the mapping stay in memory when routed experts come from disk: tensors by name, as runs of pages.
 */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "model/experts.h"
#include "model/model.h"

enum { PIECE = 4 << 20 };

static uint64_t page(void) {
    return (uint64_t)sysconf(_SC_PAGESIZE);
}

struct run {
    int32_t shard;
    uint64_t from, to;
};

static int is_expert(const char *name) {
    return strncmp(name, "layers.", 7) == 0 && strstr(name, ".ffn.experts.") != NULL;
}

/* All that a step reads as a whole: not the experts, not the rows of the embedding, not the draft blocks. */
static int is_always_read(const char *name) {
    return !is_expert(name) && strcmp(name, "embed.weight") != 0 && strncmp(name, "mtp.", 4) != 0;
}

static int by_place(const void *a, const void *b) {
    const struct run *x = a, *y = b;
    if (x->shard != y->shard)
        return x->shard < y->shard ? -1 : 1;
    return (x->from > y->from) - (x->from < y->from);
}

/* The tensors that `which` names, as few runs in order; the caller frees. */
static dsv4_status runs_of(struct run **out, size_t *n, const dsv4_model *m, int (*which)(const char *),
                           dsv4_error *err) {
    struct run *runs = malloc(((size_t)m->n_tensor + 1) * sizeof *runs);
    size_t count = 0, last = 0;
    if (!runs)
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for a list of %d tensors", m->n_tensor);
    for (int32_t i = 0; i < m->n_tensor; i++) {
        const struct dsv4_tensor_desc *t = &m->tensors[i];
        if (t->nbytes && which(t->name))
            runs[count++] = (struct run){t->shard, t->offset, t->offset + t->nbytes};
    }
    qsort(runs, count, sizeof *runs, by_place);
    for (size_t i = 1; i < count; i++) {
        if (runs[i].shard != runs[last].shard || runs[i].from > runs[last].to + page())
            runs[++last] = runs[i];
        else if (runs[i].to > runs[last].to)
            runs[last].to = runs[i].to;
    }
    *out = runs;
    *n = count ? last + 1 : 0;
    return DSV4_OK;
}

static void advise(const dsv4_model *m, int32_t shard, uint64_t from, uint64_t to, int advice) {
    if (from < to)
        madvise((void *)(uintptr_t)(m->shards[shard].data + from), (size_t)(to - from), advice);
}

void dsv4_resident_ask(const void *data, size_t bytes) {
    uintptr_t from = (uintptr_t)data / page() * page();
    madvise((void *)from, bytes + ((uintptr_t)data - from), MADV_WILLNEED);
}

void dsv4_resident_unmap(const void *data, size_t bytes) {
    uintptr_t from = ((uintptr_t)data + page() - 1) / page() * page(), to = ((uintptr_t)data + bytes) / page() * page();
    if (from < to)
        madvise((void *)from, to - from, MADV_DONTNEED);
}

dsv4_status dsv4_resident_begin(const dsv4_model *m, dsv4_error *err) {
    struct run *runs;
    size_t n;
    DSV4_TRY(runs_of(&runs, &n, m, is_expert, err));
    for (size_t i = 0; i < n; i++) {
        advise(m, runs[i].shard, runs[i].from / page() * page(), runs[i].to, MADV_RANDOM);
        advise(m, runs[i].shard, runs[i].from / page() * page(), runs[i].to, MADV_NOHUGEPAGE);
    }
    free(runs);
    return DSV4_OK;
}

/* Whole pages inside the runs of experts: unmapped, and given up by the page cache unless others map them. */
static dsv4_status give_up_experts(const dsv4_model *m, const struct dsv4_shard_desc *shards, dsv4_error *err) {
    struct run *runs;
    size_t n;
    DSV4_TRY(runs_of(&runs, &n, m, is_expert, err));
    for (size_t i = 0; i < n; i++) {
        uint64_t from = (runs[i].from + page() - 1) / page() * page(), to = runs[i].to / page() * page();
        if (from >= to)
            continue;
        advise(m, runs[i].shard, from, to, MADV_DONTNEED);
        posix_fadvise(shards[runs[i].shard].fd, (off_t)from, (off_t)(to - from), POSIX_FADV_DONTNEED);
    }
    free(runs);
    return DSV4_OK;
}

struct populate {
    const dsv4_model *m;
    struct run *runs;
    size_t n;
    uint64_t total;
    atomic_ullong done;
};

static void populate_piece(const dsv4_model *m, int32_t shard, uint64_t from, uint64_t to) {
    const uint8_t *base = m->shards[shard].data;
    uint64_t step = page();
    from = from / step * step;
#ifdef MADV_POPULATE_READ
    if (madvise((void *)(uintptr_t)(base + from), (size_t)(to - from), MADV_POPULATE_READ) == 0)
        return;
#endif
    for (uint64_t at = from; at < to; at += step)
        (void)*(const volatile uint8_t *)(base + at);
}

/* Each worker its share of the bytes, wherever the runs begin. */
static void populate_job(dsv4_worker *w, void *ctx) {
    struct populate *p = ctx;
    int64_t lo, hi, before = 0;
    dsv4_share(w, (int64_t)p->total, PIECE, &lo, &hi);
    for (size_t i = 0; i < p->n; i++) {
        const struct run *r = &p->runs[i];
        int64_t bytes = (int64_t)(r->to - r->from), first = lo > before ? lo - before : 0;
        int64_t last = hi - before < bytes ? hi - before : bytes;
        for (int64_t at = first; at < last && !dsv4_cancelled(w); at += PIECE) {
            int64_t end = last - at < PIECE ? last : at + PIECE;
            populate_piece(p->m, r->shard, r->from + (uint64_t)at, r->from + (uint64_t)end);
            atomic_fetch_add(&p->done, (unsigned long long)(end - at));
        }
        before += bytes;
    }
}

static dsv4_status populate(dsv4_model *m, struct populate *p, dsv4_error *err) {
    for (size_t i = 0; i < p->n; i++)
        p->total += p->runs[i].to - p->runs[i].from;
    return dsv4_load_job(m, populate_job, p, &p->done, p->total, err);
}

dsv4_status dsv4_resident_finish(dsv4_model *m, const struct dsv4_shard_desc *shards, dsv4_error *err) {
    struct populate p = {.m = m};
    DSV4_TRY(give_up_experts(m, shards, err));
    DSV4_TRY(runs_of(&p.runs, &p.n, m, is_always_read, err));
    dsv4_status status = populate(m, &p, err);
    free(p.runs);
    return status == DSV4_OK ? give_up_experts(m, shards, err) : status; /* what was read ahead at the edges */
}
