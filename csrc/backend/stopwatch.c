/* SPDX-License-Identifier: Apache-2.0 */
#include "backend/stopwatch.h"

#include <stdlib.h>

#include "core/threads.h"

struct span {
    _Alignas(64) double start; /* of one worker, a cache line each */
    double end;
};

struct watch {
    dsv4_job_fn *fn;
    void *ctx;
    double *seconds; /* [repeats] */
    int repeats;
    struct span *spans; /* owned, [n] */
};

static double elapsed(const struct span *spans, int n) {
    double start = spans[0].start, end = spans[0].end;
    for (int i = 1; i < n; i++) {
        start = spans[i].start < start ? spans[i].start : start;
        end = spans[i].end > end ? spans[i].end : end;
    }
    return end - start;
}

static void watch_job(dsv4_worker *w, void *ctx) {
    struct watch *watch = ctx;
    for (int i = 0; i < watch->repeats; i++) {
        struct span *span = &watch->spans[w->id];
        if (dsv4_barrier(w))
            return;
        span->start = dsv4_seconds();
        watch->fn(w, watch->ctx);
        span->end = dsv4_seconds();
        if (dsv4_barrier(w))
            return;
        if (w->id == 0)
            watch->seconds[i] = elapsed(watch->spans, w->n);
    }
}

dsv4_status dsv4_stopwatch(double *seconds, int repeats, int n, dsv4_job_fn *fn, void *ctx, dsv4_error *err) {
    struct watch watch = {.fn = fn, .ctx = ctx, .seconds = seconds, .repeats = repeats};
    dsv4_team *team = NULL;
    watch.spans = aligned_alloc(64, (size_t)n * sizeof *watch.spans);
    if (!watch.spans)
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for the times of %d threads", n);
    dsv4_status status = dsv4_team_create(&team, n, err);
    if (status == DSV4_OK)
        status = dsv4_team_start(team, watch_job, &watch, err);
    if (status == DSV4_OK)
        dsv4_team_finish(team);
    dsv4_team_destroy(team);
    free(watch.spans);
    return status;
}
