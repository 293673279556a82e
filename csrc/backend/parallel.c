/* SPDX-License-Identifier: Apache-2.0 */
#include "backend/parallel.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "core/threads.h"

struct dsv4_team {
    pthread_mutex_t lock;
    pthread_cond_t start, done, turn;
    pthread_t *threads;   /* owned, [n] */
    dsv4_worker *workers; /* owned, [n] */
    const struct dsv4_topology *topology; /* borrowed, or NULL */
    int n, started;       /* threads that run */
    pid_t pid;            /* the process that owns the threads */
    int quit;
    uint64_t next_ticket, serving; /* callers enter in order of arrival */
    uint64_t job;                  /* counts jobs; workers wait for it to change */
    dsv4_job_fn *fn;
    void *ctx;
    int running; /* workers still inside the job */
    atomic_int cancel;
    /* barrier: the last to arrive opens it by advancing `phase` */
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_int phase;
    atomic_int sleepers;
    int stop; /* written by the last to arrive, read by all after the phase changed */
};

/*
 * How long a barrier spins and yields before it sleeps: tens of microseconds, then some scheduler rounds.  Where spinning
 * was in vain (a neighbour, or another worker, holds the core that is waited for) the next one spins half as long.
 */
enum { LEAST_SPINS = 64, SPINS = 4096, YIELDS = 64 };

static void phase_sleep(dsv4_team *t, int seen) {
    atomic_fetch_add(&t->sleepers, 1);
    while (atomic_load(&t->phase) == seen)
        syscall(SYS_futex, &t->phase, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
    atomic_fetch_sub(&t->sleepers, 1);
}

int dsv4_barrier(dsv4_worker *w) {
    dsv4_team *t = w->team;
    int seen = atomic_load(&t->phase);
    if (atomic_fetch_add(&t->arrived, 1) + 1 == t->n) {
        atomic_store(&t->arrived, 0);
        t->stop = atomic_load(&t->cancel);
        atomic_store(&t->phase, seen + 1);
        if (atomic_load(&t->sleepers))
            syscall(SYS_futex, &t->phase, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
        return t->stop;
    }
    int spins = w->spins, i = 0;
    for (; atomic_load_explicit(&t->phase, memory_order_acquire) == seen; i++) {
        if (i < spins)
            dsv4_relax();
        else if (i < spins + YIELDS)
            sched_yield();
        else
            phase_sleep(t, seen);
    }
    if (i <= spins)
        w->spins = spins < SPINS ? 2 * spins : SPINS;
    else
        w->spins = spins > LEAST_SPINS ? spins / 2 : LEAST_SPINS;
    return t->stop;
}

int dsv4_cancelled(const dsv4_worker *w) {
    return atomic_load_explicit(&w->team->cancel, memory_order_relaxed);
}

static void *worker_main(void *arg) {
    dsv4_worker *w = arg;
    dsv4_team *t = w->team;
    uint64_t seen = 0;
    if (t->topology && t->topology->n_node > 1) {
        int32_t first, count;
        dsv4_topology_bind(t->topology, dsv4_topology_node(t->topology, w->id, w->n, &first, &count));
    }
    pthread_mutex_lock(&t->lock);
    for (;;) {
        while (t->job == seen && !t->quit)
            pthread_cond_wait(&t->start, &t->lock);
        if (t->quit)
            break;
        seen = t->job;
        pthread_mutex_unlock(&t->lock);
        t->fn(w, t->ctx);
        pthread_mutex_lock(&t->lock);
        if (--t->running == 0)
            pthread_cond_broadcast(&t->done);
    }
    pthread_mutex_unlock(&t->lock);
    return NULL;
}

dsv4_status dsv4_team_create(dsv4_team **out, int n, dsv4_error *err) {
    dsv4_team *t = aligned_alloc(64, (sizeof *t + 63) / 64 * 64);
    pthread_t *threads = calloc((size_t)n, sizeof *threads);
    dsv4_worker *workers = calloc((size_t)n, sizeof *workers);
    if (!t || !threads || !workers) {
        free(t);
        free(threads);
        free(workers);
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for a team of %d threads", n);
    }
    *t = (dsv4_team){.threads = threads, .workers = workers, .n = n, .pid = getpid()};
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->start, NULL);
    pthread_cond_init(&t->turn, NULL);
    dsv4_condition_init(&t->done);
    for (int i = 0; i < n; i++)
        workers[i] = (dsv4_worker){.team = t, .id = i, .n = n, .node_n = n, .spins = SPINS};
    *out = t;
    return DSV4_OK;
}

static dsv4_status start_threads(dsv4_team *t, dsv4_error *err) {
    for (; t->started < t->n; t->started++) {
        int failed = dsv4_thread_start(&t->threads[t->started], worker_main, &t->workers[t->started]);
        if (failed)
            return dsv4_fail(err, DSV4_E_MEMORY, "cannot start thread %d of %d: error %d", t->started + 1, t->n,
                             failed);
    }
    return DSV4_OK;
}

static void leave(dsv4_team *t) {
    t->serving++;
    pthread_cond_broadcast(&t->turn);
    pthread_mutex_unlock(&t->lock);
}

dsv4_status dsv4_team_start(dsv4_team *t, dsv4_job_fn *fn, void *ctx, dsv4_error *err) {
    if (t->pid != getpid())
        return dsv4_fail(err, DSV4_E_STATE,
                         "this model was loaded before the process forked; load it in the child, or start the child "
                         "with the \"spawn\" method");
    pthread_mutex_lock(&t->lock);
    uint64_t ticket = t->next_ticket++;
    while (t->serving != ticket)
        pthread_cond_wait(&t->turn, &t->lock);
    if (t->started < t->n) {
        dsv4_status status = start_threads(t, err);
        if (status != DSV4_OK) {
            leave(t);
            return status;
        }
    }
    t->fn = fn;
    t->ctx = ctx;
    t->running = t->n;
    atomic_store(&t->cancel, 0);
    t->job++;
    pthread_cond_broadcast(&t->start);
    pthread_mutex_unlock(&t->lock);
    return DSV4_OK;
}

int dsv4_team_wait(dsv4_team *t, int milliseconds) {
    const struct timespec end = dsv4_deadline(milliseconds);
    pthread_mutex_lock(&t->lock);
    int late = 0;
    while (t->running && !late) {
        if (milliseconds < 0)
            pthread_cond_wait(&t->done, &t->lock);
        else
            late = pthread_cond_timedwait(&t->done, &t->lock, &end) == ETIMEDOUT;
    }
    int running = t->running > 0;
    pthread_mutex_unlock(&t->lock);
    return running;
}

void dsv4_team_cancel(dsv4_team *t) {
    atomic_store(&t->cancel, 1);
}

void dsv4_team_finish(dsv4_team *t) {
    pthread_mutex_lock(&t->lock);
    while (t->running)
        pthread_cond_wait(&t->done, &t->lock);
    leave(t);
}

void dsv4_team_place(dsv4_team *t, const struct dsv4_topology *topology) {
    t->topology = topology;
    for (int32_t i = 0; i < t->n; i++)
        dsv4_topology_node(topology, i, t->n, &t->workers[i].node_first, &t->workers[i].node_n);
}

int dsv4_team_size(const dsv4_team *t) {
    return t->n;
}

void dsv4_team_destroy(dsv4_team *t) {
    if (!t)
        return;
    if (t->pid == getpid()) {
        pthread_mutex_lock(&t->lock);
        t->quit = 1;
        pthread_cond_broadcast(&t->start);
        pthread_mutex_unlock(&t->lock);
        for (int i = 0; i < t->started; i++)
            pthread_join(t->threads[i], NULL);
        pthread_mutex_destroy(&t->lock);
        pthread_cond_destroy(&t->start);
        pthread_cond_destroy(&t->done);
        pthread_cond_destroy(&t->turn);
    }
    free(t->threads);
    free(t->workers);
    free(t);
}
