/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the phases of a pass on the device share: device_pass.c begins and ends it, device_graph.c captures and replays what
 * is launched, device_layer.c is what a layer launches.
 *
 * A pass is a row of segments, each from one cut to the next: what is enqueued between two cuts is one graph.  Cuts lie
 * between half layers: half 2 i is layer i up to the choice of its experts (all launches up to `group`), half 2 i + 1
 * the rest.  Where experts of the layer lie beside the device (device_experts.h), those it has belong to half 2 i.  Whoever
 * needs the host in the middle of a pass runs the halves before it as a segment, enqueues copies and waits on the stream,
 * and goes on with the next one.  Launches of a segment may depend on nothing but the shape of the pass (never on its
 * positions, pieces or session states), and in a segment nobody allocates, waits or copies.
 */
#ifndef DSV4_DEVICE_RUN_H
#define DSV4_DEVICE_RUN_H

#include "model/device.h"

/* What every phase needs. */
struct dsv4_device_run {
    struct dsv4_device *d;
    const struct dsv4_cuda_launches *launches; /* with the CPU's sums, or of prompts: nothing else decides on it */
    struct dsv4_pass *p;
    dsv4_worker *w;
    struct dsv4_cuda_pass pass; /* pointers of the device; states of the layer at work */
    int32_t n;
    struct dsv4_device_shape shape;
    struct dsv4_shape_graphs *graphs; /* of this shape; NULL: its launches are not captured */
    int eager;                  /* never captured: somebody looks into the pass */
    int capturing;
    int32_t fetched;            /* pieces whose rows are back or asked for */
    int32_t bad;                /* the lowest layer that found a NaN, or INT_MAX */
    dsv4_error *err;
};

/* Launches `op` with the named arguments, or returns its failure. */
#define LAUNCH(r, op, ...)                                                                                             \
    DSV4_TRY(dsv4_device_status((r)->d, (r)->launches->op(&(struct dsv4_cuda_##op##_args){__VA_ARGS__}, (r)->d->stream), \
                                #op, (r)->err))

/* A layer over tokens and weights without groups: row t of x at t * ld_x. */
static inline struct dsv4_cuda_linear_job dsv4_linear_job(const struct dsv4_weight *w, const dsv4_bf16 *x, void *out,
                                                          ptrdiff_t ld_x, ptrdiff_t ld_out, int out_f32) {
    return (struct dsv4_cuda_linear_job){.w = *w, .x = x, .out = out, .ld_x = ld_x, .ld_out = ld_out, .out_f32 = out_f32};
}

/* Angles and embedding. */
dsv4_status dsv4_device_enter(struct dsv4_device_run *r);
/* Half layer `half` of the model, for the streams of the pass. */
dsv4_status dsv4_device_half_layer(struct dsv4_device_run *r, int32_t half);
/* The rows of routed expert e alone, from these weights (all of the device, by expert); rows of expert i of the order by
 * expert are [first[i], first[i + 1]).  After the half layer that grouped them, outside of segments. */
struct dsv4_expert_tables {
    const struct dsv4_weight *w1, *w3, *w2;
};
dsv4_status dsv4_device_expert(const struct dsv4_device_run *r, const struct dsv4_device_layer *l,
                               const struct dsv4_expert_tables *w, const int32_t *first, int32_t e);

/* Whether tokens of the pass may see more entries of this layer than it selects. */
static inline int dsv4_device_scored(const struct dsv4_device_run *r, const struct dsv4_layer *l) {
    return l->kind == DSV4_CSA && l->compressor.ratio <= r->shape.scored_ratio;
}

/* device_staging.c: the input of the pass is sent and what shall come back is listed; gathered, at the end of the last
 * segment; copied, after which somebody waits for the stream; put in its place.  A pass that ends early leaves the last
 * two out. */
dsv4_status dsv4_device_send(struct dsv4_device_run *r);
dsv4_status dsv4_device_gather(const struct dsv4_device_run *r);
dsv4_status dsv4_device_fetch(struct dsv4_device_run *r);
void dsv4_device_arrive(struct dsv4_device_run *r);

/* device_head.c: whether the first rows that somebody wants can be part of the pass, as d->rows says then; what they
 * launch; what of theirs is sent (from the host's `tok` and `draws` on), and comes back.  Before dsv4_graphs_find. */
void dsv4_head_plan(struct dsv4_device_run *r);
dsv4_status dsv4_head_launch(const struct dsv4_device_run *r);
void dsv4_head_write(const struct dsv4_device_run *r, uint8_t *tok, uint8_t *draws);
void dsv4_head_want(const struct dsv4_device_run *r);

/* device_graph.c: the shape of the pass, and its graphs if this shape was here before; once, before the first segment. */
void dsv4_graphs_find(struct dsv4_device_run *r);
/* Half layers [first, end), before the first one of the stage dsv4_device_enter: launched, captured and launched, or
 * replayed. */
dsv4_status dsv4_device_segment(struct dsv4_device_run *r, int32_t first, int32_t end);
/* Once the pass has ended well: the next one of its shape is captured. */
void dsv4_graphs_done(struct dsv4_device_run *r);

#endif
