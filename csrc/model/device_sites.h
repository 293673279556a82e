/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sites (model/sites.h) of a pass on the device: its values are copied between the launches, on the device, with the
 * shapes of struct dsv4_tap: to where a tap on the device lies, or to a stage from which the host takes all of them at
 * the end of the pass (before it, each time the stage is full).  The bits are those that a pass on the CPU copies.
 *
 * Not on the device: the weights of attention, which no kernel holds.  A pass in which they are asked for is computed on
 * the CPU.
 */
#ifndef DSV4_DEVICE_SITES_H
#define DSV4_DEVICE_SITES_H

#include "model/device_run.h"
#include "model/sites.h"

/* Whether everything that is asked for in this pass can be copied on the device. */
int dsv4_device_sees(const struct dsv4_pass *p);

/* Before the first launch, and after the last; `take` once what `end` enqueued is complete.  Nothing without taps. */
dsv4_status dsv4_device_sites_begin(struct dsv4_device_run *r);
dsv4_status dsv4_device_sites_end(struct dsv4_device_run *r);
void dsv4_device_sites_take(struct dsv4_device_run *r);
void dsv4_device_sites_destroy(struct dsv4_device *d);

/* The streams as they are: STREAMS_IN, STREAMS_MID, STREAMS. */
dsv4_status dsv4_device_at_streams(struct dsv4_device_run *r, int32_t layer, enum dsv4_site site);
/* All of a sublayer but what follows, after its output and before that is spread. */
dsv4_status dsv4_device_at_attention(struct dsv4_device_run *r, int32_t layer);
dsv4_status dsv4_device_at_ffn(struct dsv4_device_run *r, int32_t layer);
/* Where collapse shall leave `pre` for these; NULL: nobody asks. */
float *dsv4_device_pre(const struct dsv4_device_run *r, int32_t layer, enum dsv4_site site);
/* Scores [n][max_entry] of tokens [t, t + n), of which entries the tokens have scored. */
dsv4_status dsv4_device_at_scores(struct dsv4_device_run *r, int32_t layer, const float *scores, int32_t max_entry,
                                  int32_t t, int32_t n);
/* What the heads give, turned back, not yet flushed. */
dsv4_status dsv4_device_at_heads(struct dsv4_device_run *r, int32_t layer);

#endif
