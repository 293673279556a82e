/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The threads that compute: one team per model.  A job is one function that every worker runs from start to end
 * (single program, multiple data): work is cut by `dsv4_share`, phases are separated by barriers.  A job is entered
 * once per step, not once per operation.
 *
 * Own pthreads rather than OpenMP: the calling thread must stay free to look after signals, a forked child must get an
 * error instead of a hang, and a barrier must be cheap yet yield when a neighbour holds a core.
 *
 * Cancellation: tiles poll `dsv4_cancelled` and may leave their work undone; every barrier tells all workers alike
 * whether to stop, so no phase ever reads what a cancelled one left out.
 */
#ifndef DSV4_PARALLEL_H
#define DSV4_PARALLEL_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "backend/topology.h"
#include "core/status.h"

typedef struct dsv4_team dsv4_team;

typedef struct dsv4_worker {
    dsv4_team *team; /* borrowed */
    int id, n;       /* this worker and how many there are */
    int node_first, node_n; /* the workers of its memory node; all where there is one */
    int spins;       /* at the next barrier, before it yields */
} dsv4_worker;

typedef void dsv4_job_fn(dsv4_worker *w, void *ctx);

/* Threads start at the first job. */
dsv4_status dsv4_team_create(dsv4_team **out, int n, dsv4_error *err);
void dsv4_team_destroy(dsv4_team *team); /* NULL is legal; waits for a running job; does nothing in a forked child */
int dsv4_team_size(const dsv4_team *team);
/*
 * Before the first job: gives each worker its node.  With several nodes its thread will run on the processors of that
 * node only.  The topology is borrowed and outlives the team.
 */
void dsv4_team_place(dsv4_team *team, const struct dsv4_topology *topology);

/*
 * Starts a job; waits in order of arrival while another one runs.  Exactly one dsv4_team_finish follows, by the same
 * thread.  DSV4_E_STATE in a forked child.
 */
dsv4_status dsv4_team_start(dsv4_team *team, dsv4_job_fn *fn, void *ctx, dsv4_error *err);
int dsv4_team_wait(dsv4_team *team, int milliseconds); /* 1: still running; negative time: until done */
void dsv4_team_cancel(dsv4_team *team);
void dsv4_team_finish(dsv4_team *team); /* waits, then lets the next caller in */

/* Called by workers inside a job. */
int dsv4_cancelled(const dsv4_worker *w); /* cheap; may differ between workers until the next barrier */
int dsv4_barrier(dsv4_worker *w);         /* 1: cancelled, for all workers alike */

/* Between two looks at what another thread or a device writes. */
static inline void dsv4_relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* The part [*lo, *hi) of n items for this worker, cut at multiples of grain, as even as that allows. */
static inline void dsv4_share(const dsv4_worker *w, int64_t n, int64_t grain, int64_t *lo, int64_t *hi) {
    int64_t units = (n + grain - 1) / grain, base = units / w->n, extra = units % w->n;
    int64_t first = w->id * base + (w->id < extra ? w->id : extra);
    int64_t last = first + base + (w->id < extra);
    *lo = first * grain < n ? first * grain : n;
    *hi = last * grain < n ? last * grain : n;
}

/*
 * Weights are cut by node first: of `units` rows or blocks of rows the node of this worker always has [*lo, *hi),
 * whatever else is computed, so these can lie in its memory.
 */
static inline void dsv4_share_node(const dsv4_worker *w, int64_t units, int64_t *lo, int64_t *hi) {
    *lo = units * w->node_first / w->n;
    *hi = units * (w->node_first + w->node_n) / w->n;
}

/*
 * Unequal work of the workers of one node: items lie one after another, each of `units` that cost the same.  Of the item
 * whose units begin at `before`, [*u0, *u1) are those that begin in the part [from, to) of the line.
 */
static inline void dsv4_units_in(int64_t from, int64_t to, int64_t before, int64_t cost, int64_t units, int64_t *u0,
                                 int64_t *u1) {
    int64_t first = from <= before ? 0 : (from - before + cost - 1) / cost;
    int64_t last = to <= before ? 0 : (to - before + cost - 1) / cost;
    *u0 = first < units ? first : units;
    *u1 = last < units ? last : units;
}

/* The same of this worker's even part of the total, which is contiguous. */
static inline void dsv4_share_cost(const dsv4_worker *w, int64_t total, int64_t before, int64_t cost, int64_t units,
                                   int64_t *u0, int64_t *u1) {
    int64_t id = w->id - w->node_first, lo = total * id / w->node_n, hi = total * (id + 1) / w->node_n;
    dsv4_units_in(lo, hi, before, cost, units, u0, u1);
}

/*
 * The next part [*lo, *hi) of such a line of work for whoever asks first: half of an even share of what is left, at least
 * a 128th of the whole share.  So parts are long, and yet all end together, though a neighbour takes a core from one of
 * them.  0: all is taken.  *taken began with 0.
 */
static inline int dsv4_take(const dsv4_worker *w, _Atomic int64_t *taken, int64_t total, int64_t *lo, int64_t *hi) {
    int64_t least = total / (128 * w->node_n) + 1, at = atomic_load_explicit(taken, memory_order_relaxed), n;
    do {
        if (at >= total)
            return 0;
        n = (total - at) / (2 * w->node_n);
        n = n < least ? least : n;
    } while (!atomic_compare_exchange_weak_explicit(taken, &at, at + n, memory_order_relaxed, memory_order_relaxed));
    *lo = at;
    *hi = at + n < total ? at + n : total;
    return 1;
}

#endif
