/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Edits that ask the caller: at the end of a layer the first worker posts the streams of a piece and sleeps until the
 * thread that waits for the run has answered (dsv4_run_wait, dsv4_run_resume); the other workers wait at a barrier.  The
 * engine calls nothing outside itself.
 */
#ifndef DSV4_CALL_H
#define DSV4_CALL_H

#include "model/pass.h"

dsv4_status dsv4_calls_create(struct dsv4_calls **out, dsv4_error *err);
void dsv4_calls_destroy(struct dsv4_calls *calls); /* NULL is legal */

/* Workers, all of them, with complete streams after this layer (-1: the embedding).  1: cancelled. */
int dsv4_calls_ask(dsv4_worker *w, struct dsv4_pass *p, int32_t layer);
void dsv4_calls_begin(struct dsv4_calls *calls); /* before the job */
void dsv4_calls_end(struct dsv4_calls *calls); /* the first worker, leaving the job */

/* The thread that waits: 1 nothing yet, 0 the job ends, 2 somebody asks; the next two only then. */
int dsv4_calls_wait(struct dsv4_calls *calls, int milliseconds);
void dsv4_calls_read(const struct dsv4_calls *calls, struct dsv4_call *out, float *streams, int32_t *positions);
void dsv4_calls_answer(struct dsv4_calls *calls, const float *streams);

#endif
