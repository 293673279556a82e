/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Less memory than the model: routed experts in a bounded number of slots, read from disk when they are chosen.
 *
 * Everything that each step reads (all weights but the routed experts and the embedding) stays mapped and is brought
 * into memory at load.  The experts' part of the mapping is not used: an expert that is chosen is read into a slot,
 * past the page cache, and `layer.experts[e]` points there while it is kept.  So streaming experts cannot push the
 * other weights out, the memory used is slots times their size whatever the kernel thinks, and huge pages serve it.
 * Nothing is locked: if the budget was too high after all, the kernel takes mapped pages back, which costs speed only.
 *
 * What is read when: all missing experts of a layer together, right after its router; those of hash layers at the start
 * of a pass, from its token ids; and in a pass long enough to choose nearly every expert, those of the next layer while
 * this one is computed.  What is kept: each expert has a score, its uses by tokens, halved every 16 tokens; a
 * slot is taken from the lowest score, a little lower for layers that will not come again soon.  An expert for which no
 * slot is free is used where it is mapped: results never depend on any of this.  One that cannot be read fails the step.
 *
 * Called by worker 0 of a running step only, so it needs no lock; the counters may be read at any time.
 */
#ifndef DSV4_EXPERTS_H
#define DSV4_EXPERTS_H

#include "backend/parallel.h"
#include "dsv4.h"

struct dsv4_expert_cache;

/*
 * As many slots as `bytes` hold, at most one per expert.  After the scan of the scales, which decides what a weight is.
 * DSV4_E_MEMORY when the experts of one token in one layer do not fit.
 */
dsv4_status dsv4_experts_create(struct dsv4_expert_cache **out, dsv4_model *m, const struct dsv4_shard_desc *shards,
                                uint64_t bytes, dsv4_error *err);
void dsv4_experts_destroy(struct dsv4_expert_cache *cache); /* NULL is legal */

struct dsv4_pass;
void dsv4_experts_begin(struct dsv4_pass *p); /* at the start of a pass */
/*
 * After the rows of a layer are grouped by expert.  Returns when all chosen experts can be used, or after a
 * cancellation; an expert that cannot be read is noted in the pass and cancels the step.
 */
void dsv4_experts_fetch(dsv4_worker *w, struct dsv4_pass *p, int32_t layer);
void dsv4_experts_count(struct dsv4_expert_cache *cache, struct dsv4_expert_counts *out);

/*
 * resident.c, around the scan of the scales: no read-ahead in the experts' part of the mapping; its pages given up
 * again; and what each step reads, brought into memory.
 */
dsv4_status dsv4_resident_begin(const dsv4_model *m, dsv4_error *err);
void dsv4_resident_unmap(const void *data, size_t bytes); /* whole pages of it, until they are touched again */
void dsv4_resident_ask(const void *data, size_t bytes); /* to be read soon: starts it, where it is mapped */
dsv4_status dsv4_resident_finish(dsv4_model *m, const struct dsv4_shard_desc *shards, dsv4_error *err);

#endif
