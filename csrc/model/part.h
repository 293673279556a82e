/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Parts of a layer called on their own (dsv4.h, "parts"): the phases of a pass that they are made of.  Executed by all
 * workers like everything in pass.h.
 */
#ifndef DSV4_PART_H
#define DSV4_PART_H

#include "model/pass.h"

/* part.c: the rows of this pass through one part of the layer. */
int dsv4_part(dsv4_worker *w, struct dsv4_pass *p, const struct dsv4_part *part);

/* Whether it can be run, before any work; and on this state, while that is locked. */
dsv4_status dsv4_part_check(const struct dsv4_part *part, const dsv4_model *m, dsv4_error *err);
dsv4_status dsv4_part_check_state(const struct dsv4_part *part, const dsv4_model *m, const struct dsv4_kv *kv,
                                  dsv4_error *err);

/* forward.c: cos and sin of every token; the embedding into the streams, if asked for. */
int dsv4_enter(dsv4_worker *w, struct dsv4_pass *p, int embed);

/* attention.c: u_* -> the KV rows of the tokens and the windows that close; the queries, with index queries where
 * entries are scored; the heads' outputs ws->o; ws->o -> this worker's columns of ws->y. */
int dsv4_attention_rows(dsv4_worker *w, struct dsv4_pass *p, int32_t layer, int scored);
int dsv4_attention_queries(dsv4_worker *w, struct dsv4_pass *p, int32_t layer, int scored);
int dsv4_attention_heads(dsv4_worker *w, struct dsv4_pass *p, int32_t layer);
int dsv4_attention_output(dsv4_worker *w, struct dsv4_pass *p, int32_t layer);

/* indexer.c: the scores of all entries that token t sees, of which there are so many. */
int32_t dsv4_score_all(dsv4_worker *w, const struct dsv4_pass *p, int32_t layer, int64_t t, float *scores);

/* moe.c: u_plain -> expert_ids, expert_weights, router_scores; and u_* -> this worker's columns of ws->expert_out, row t
 * for token t, by expert e alone (n_routed_experts: the shared one) with weights [n_tok]. */
int dsv4_moe_route(dsv4_worker *w, struct dsv4_pass *p, int32_t layer);
int dsv4_moe_expert(dsv4_worker *w, struct dsv4_pass *p, int32_t layer, int32_t e, const float *weights);

#endif
