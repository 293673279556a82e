/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a session changes in its passes (dsv4.h, "edit"): operations by layer, each at positions of its own, applied to
 * the rows of that session alone.  An operation changes a row where it is made, before anybody reads it, by the worker
 * that made it: no barrier is added, and the result does not depend on the cut into passes or the number of workers.
 *
 * Values are copied for a trace (model/sites.h) after they are changed here.  A pass none of whose sessions is edited
 * tests one flag per place; all functions that change something are called behind it.
 */
#ifndef DSV4_EDIT_H
#define DSV4_EDIT_H

#include "model/pass.h"

/* Whether any piece of the pass is edited. */
static inline int dsv4_edited(const struct dsv4_pass *p) {
#ifdef DSV4_WITHOUT_SITES
    (void)p;
    return 0;
#else
    return p->edited;
#endif
}

int32_t dsv4_edit_calls(const dsv4_edit *e); /* operations of kind CALL; NULL: 0 */
dsv4_edit *dsv4_edit_retain(dsv4_edit *e); /* NULL is legal */
const dsv4_model *dsv4_edit_model(const dsv4_edit *e);

/* This worker's columns of what a site holds: the streams, or ws->y for the outputs of sublayers; layer -1: the
 * embedding. */
void dsv4_edit_columns(const dsv4_worker *w, const struct dsv4_pass *p, enum dsv4_edit_site site, int32_t layer);
/* All columns of token t at x, [hc_mult][d] for the streams and [d] for the inputs of sublayers. */
void dsv4_edit_token(const struct dsv4_pass *p, enum dsv4_edit_site site, int32_t layer, int64_t t, dsv4_bf16 *x);

/* For model/call.c: operations of this layer (NULL: none), and whether operation i is a CALL about token t. */
int32_t dsv4_edit_count(const dsv4_edit *e, int32_t layer);
int dsv4_edit_asks(const struct dsv4_pass *p, int32_t layer, int64_t t, int32_t i, void **function);

/* The router's choice and weights for token t: calls the kernel, with other arguments where that is asked for. */
void dsv4_edit_route(const struct dsv4_pass *p, int32_t layer, int64_t t, struct dsv4_router_args *args, void *scratch);
/* Scratch of one worker for the two functions that take it. */
size_t dsv4_edit_scratch(const struct dsv4_config *c);

/* The sinks of all heads for token t: `sink`, or a copy in scratch. */
const float *dsv4_edit_sinks(const struct dsv4_pass *p, int32_t layer, int64_t t, const float *sink, void *scratch);
/* The output of heads [h0, h1) of token t, at o. */
void dsv4_edit_heads(const struct dsv4_pass *p, int32_t layer, int64_t t, dsv4_bf16 *o, int32_t h0, int32_t h1);

/* Scores of entries [first, end) at scores[first]: +infinity where forced, -infinity where masked. */
void dsv4_edit_scores(const struct dsv4_pass *p, int32_t layer, int64_t t, float *scores, int32_t first, int32_t end);
/* Takes masked entries out of n ascending ids; returns how many are left. */
int32_t dsv4_edit_entries(const struct dsv4_pass *p, int32_t layer, int64_t t, int32_t *ids, int32_t n);
/* Masks the keys of entries 0, 1, ..., n - 1. */
void dsv4_edit_keys(const struct dsv4_pass *p, int32_t layer, int64_t t, const uint8_t **keys, int32_t n);

#endif
