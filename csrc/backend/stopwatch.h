/* SPDX-License-Identifier: Apache-2.0 */
/* Wall time of a function on a team of threads of its own: for measurements, not for steps. */
#ifndef DSV4_STOPWATCH_H
#define DSV4_STOPWATCH_H

#include "backend/parallel.h"

/*
 * Runs fn on n threads `repeats` times, all starting together; seconds[i] is the time from the first that starts to
 * the last that is done.
 */
dsv4_status dsv4_stopwatch(double *seconds, int repeats, int n, dsv4_job_fn *fn, void *ctx, dsv4_error *err);

#endif
