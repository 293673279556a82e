/* SPDX-License-Identifier: Apache-2.0 */
/* The team: shares cover everything once, barriers separate phases, cancellation reaches all workers alike, callers queue. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#include "backend/parallel.h"
#include "check.h"

void check_parallel(void);

enum { ITEMS = 1000, PHASES = 200 };

struct phases {
    int data[2][ITEMS];
    atomic_int wrong;
};

/* Each phase adds one to what all the others wrote in the phase before. */
static void count_job(dsv4_worker *w, void *ctx) {
    struct phases *p = ctx;
    int64_t lo, hi;
    dsv4_share(w, ITEMS, 7, &lo, &hi);
    for (int phase = 0; phase < PHASES; phase++) {
        const int *from = p->data[phase & 1];
        int *to = p->data[(phase & 1) ^ 1];
        for (int64_t i = lo; i < hi; i++)
            to[i] = from[ITEMS - 1 - i] + 1;
        if (dsv4_barrier(w)) {
            atomic_store(&p->wrong, 1);
            return;
        }
    }
}

static void check_phases(int n) {
    dsv4_team *team;
    dsv4_error err;
    check_true(dsv4_team_create(&team, n, &err) == DSV4_OK, "team of %d", n);
    check_true(dsv4_team_size(team) == n, "size");
    for (int round = 0; round < 3; round++) {
        struct phases *p = calloc(1, sizeof *p);
        check_true(dsv4_team_start(team, count_job, p, &err) == DSV4_OK, "start");
        while (dsv4_team_wait(team, 5))
            continue;
        dsv4_team_finish(team);
        for (int i = 0; i < ITEMS; i++)
            check_true(p->data[PHASES & 1][i] == PHASES && !atomic_load(&p->wrong), "item %d of a team of %d", i, n);
        free(p);
    }
    dsv4_team_destroy(team);
}

static void check_shares(void) {
    for (int n = 1; n <= 9; n++)
        for (int64_t items = 0; items < 70; items++)
            for (int64_t grain = 1; grain <= 33; grain += 8) {
                int64_t next = 0;
                for (int id = 0; id < n; id++) {
                    dsv4_worker w = {.id = id, .n = n, .node_n = n};
                    int64_t lo, hi;
                    dsv4_share(&w, items, grain, &lo, &hi);
                    check_true(lo == next && hi >= lo && (hi == items || hi % grain == 0), "share %d of %d", id, n);
                    next = hi;
                }
                check_true(next == items, "shares of %lld cover all", (long long)items);
            }
}

struct taken {
    _Atomic int64_t at;
    int64_t total, first;
    atomic_int times[ITEMS], wrong;
};

static void take_job(dsv4_worker *w, void *ctx) {
    struct taken *t = ctx;
    int64_t lo, hi, last = 0;
    while (dsv4_take(w, &t->at, t->total, &lo, &hi)) {
        if (lo < last || hi <= lo || hi > t->total)
            atomic_store(&t->wrong, 1);
        if (lo == 0)
            t->first = hi;
        last = hi;
        for (int64_t i = lo; i < hi && i < ITEMS; i++)
            atomic_fetch_add(&t->times[i], 1);
    }
}

/* Whoever is free takes: everything once, each worker ascending, long parts first. */
static void check_taken(int n) {
    dsv4_team *team;
    check_true(dsv4_team_create(&team, n, NULL) == DSV4_OK, "team of %d", n);
    for (int64_t total = 0; total <= ITEMS; total += total < 20 ? 1 : 245) {
        struct taken *t = calloc(1, sizeof *t);
        t->total = total;
        check_true(dsv4_team_start(team, take_job, t, NULL) == DSV4_OK, "start");
        dsv4_team_finish(team);
        check_true(!atomic_load(&t->wrong), "parts ascend within %lld", (long long)total);
        check_true(total < 500 || t->first == total / (2 * n), "the first part is half of a share");
        for (int64_t i = 0; i < ITEMS; i++)
            check_true(atomic_load(&t->times[i]) == (i < total), "item %lld of %lld", (long long)i, (long long)total);
        free(t);
    }
    dsv4_team_destroy(team);
}

struct endless {
    atomic_int stops, worst;
};

/* Runs until cancelled; every worker must leave at the same barrier. */
static void endless_job(dsv4_worker *w, void *ctx) {
    struct endless *e = ctx;
    int phase = 0;
    while (!dsv4_barrier(w))
        phase++;
    int seen = atomic_load(&e->worst);
    if (seen >= 0 && seen != phase)
        atomic_store(&e->stops, -1000);
    atomic_store(&e->worst, phase);
    atomic_fetch_add(&e->stops, 1);
}

static void check_cancel(void) {
    dsv4_team *team;
    check_true(dsv4_team_create(&team, 3, NULL) == DSV4_OK, "team");
    for (int round = 0; round < 20; round++) {
        struct endless e;
        atomic_init(&e.stops, 0);
        atomic_init(&e.worst, -1);
        check_true(dsv4_team_start(team, endless_job, &e, NULL) == DSV4_OK, "start");
        check_true(dsv4_team_wait(team, 1) == 1, "an endless job runs");
        dsv4_team_cancel(team);
        dsv4_team_finish(team);
        check_true(atomic_load(&e.stops) == 3, "all three workers stopped at one barrier");
    }
    dsv4_team_destroy(team);
}

struct caller {
    dsv4_team *team;
    atomic_int *inside;
    int wrong;
};

static void exclusive_job(dsv4_worker *w, void *ctx) {
    struct caller *c = ctx;
    if (w->id == 0 && atomic_fetch_add(c->inside, 1) != 0)
        c->wrong = 1;
    dsv4_barrier(w);
    if (w->id == 0)
        atomic_fetch_sub(c->inside, 1);
}

static void *call_often(void *arg) {
    struct caller *c = arg;
    for (int i = 0; i < 100; i++) {
        if (dsv4_team_start(c->team, exclusive_job, c, NULL) != DSV4_OK)
            c->wrong = 1;
        dsv4_team_finish(c->team);
    }
    return NULL;
}

static void check_callers(void) {
    dsv4_team *team;
    atomic_int inside;
    atomic_init(&inside, 0);
    check_true(dsv4_team_create(&team, 2, NULL) == DSV4_OK, "team");
    struct caller callers[4];
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) {
        callers[i] = (struct caller){team, &inside, 0};
        pthread_create(&threads[i], NULL, call_often, &callers[i]);
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
        check_true(!callers[i].wrong, "one job at a time");
    }
    dsv4_team_destroy(team);
}

void check_parallel(void) {
    check_shares();
    for (int n = 1; n <= 4; n++)
        check_phases(n);
    for (int n = 1; n <= 4; n++)
        check_taken(n);
    check_cancel();
    check_callers();
}
