/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Passes as graphs.  What a pass launches depends on its shape alone, everything else lies in device memory; so the launches
 * of small passes, which would cost more than their work, are captured and replayed.  A shape is launched one by one
 * when it comes for the first time: many never come again, the scratch grows to what the shape needs, and kernels are
 * loaded, which a capture would not survive.
 */
#include <stdlib.h>

#include "model/device_run.h"

typedef struct dsv4_device_run run;

/* Contexts are counted up to powers of two from this on, so that a growing one changes its shape rarely. */
enum { LEAST_CONTEXT = 256 };

/* ------------------------------------------------------------------------------------------------------------- shapes */

static int32_t longest(const struct dsv4_pass *p) {
    int32_t end = 0;
    for (int32_t i = 0; i < p->n_piece; i++) {
        int32_t last = p->pieces[i].position + p->pieces[i].n;
        end = last > end ? last : end;
    }
    return end;
}

static struct dsv4_device_shape shape_of(const run *r) {
    const dsv4_model *m = r->d->model;
    int32_t end = longest(r->p), most = m->config.max_position_embeddings;
    const struct dsv4_device_rows *rows = &r->d->rows;
    struct dsv4_device_shape s = {.n_tok = r->n, .n_piece = r->p->n_piece, .context = end, .prompt = r->p->prompt};
    if (rows->n) {
        s.n_row = rows->n;
        s.n_draw = rows->n_draw;
        s.n_top = rows->n_top;
        s.needs = rows->needs;
    }
    if (r->n <= DSV4_GRAPH_TOKENS) {
        s.context = LEAST_CONTEXT;
        while (s.context < end)
            s.context = s.context <= most / 2 ? 2 * s.context : most;
    }
    for (int32_t i = 0; i < m->config.num_hidden_layers; i++) {
        int32_t ratio = m->layers[i].compressor.ratio;
        if (m->layers[i].kind == DSV4_CSA && ratio > s.scored_ratio && end / ratio > m->config.index_topk)
            s.scored_ratio = ratio;
    }
    return s;
}

static int same_shape(const struct dsv4_device_shape *a, const struct dsv4_device_shape *b) {
    return a->n_tok == b->n_tok && a->n_piece == b->n_piece && a->context == b->context &&
           a->scored_ratio == b->scored_ratio && a->prompt == b->prompt && a->n_row == b->n_row &&
           a->n_draw == b->n_draw && a->n_top == b->n_top && a->needs == b->needs;
}

/* -------------------------------------------------------------------------------------------------------------- graphs */

static void drop(struct dsv4_device *d, struct dsv4_shape_graphs *s) {
    for (int32_t i = 0; i < s->n_graph; i++)
        d->plugin->runtime.graph_destroy(s->graphs[i].exec);
    free(s->graphs);
    s->graphs = NULL;
    s->n_graph = 0;
}

void dsv4_graphs_drop(struct dsv4_device *d) {
    for (int32_t i = 0; i < DSV4_GRAPH_SHAPES; i++)
        drop(d, &d->graphs[i]);
}

void dsv4_graphs_forget(struct dsv4_device *d) {
    dsv4_graphs_drop(d);
    for (int32_t i = 0; i < DSV4_GRAPH_SHAPES; i++)
        d->graphs[i].last_use = 0;
}

/* The place of this shape, or that of the one which was needed longest ago. */
static struct dsv4_shape_graphs *place_of(struct dsv4_device *d, const struct dsv4_device_shape *shape) {
    struct dsv4_shape_graphs *oldest = &d->graphs[0];
    for (int32_t i = 0; i < DSV4_GRAPH_SHAPES; i++) {
        struct dsv4_shape_graphs *s = &d->graphs[i];
        if (s->last_use && same_shape(&s->shape, shape))
            return s;
        oldest = s->last_use < oldest->last_use ? s : oldest;
    }
    return oldest;
}

void dsv4_graphs_find(run *r) {
    r->shape = shape_of(r);
    r->graphs = NULL;
    if (r->eager || r->n > DSV4_GRAPH_TOKENS)
        return;
    struct dsv4_shape_graphs *s = place_of(r->d, &r->shape);
    if (s->last_use && same_shape(&s->shape, &r->shape))
        r->graphs = s;
}

void dsv4_graphs_done(run *r) {
    if (r->eager || r->n > DSV4_GRAPH_TOKENS)
        return;
    struct dsv4_shape_graphs *s = r->graphs;
    if (!s) {
        s = place_of(r->d, &r->shape);
        drop(r->d, s);
        s->shape = r->shape;
    }
    s->last_use = ++r->d->passes;
}

/* ------------------------------------------------------------------------------------------------------------ segments */

static dsv4_status launch(run *r, int32_t first, int32_t end) {
    if (first == 2 * r->d->first_layer)
        DSV4_TRY(dsv4_device_enter(r));
    for (int32_t half = first; half < end && (r->capturing || !dsv4_cancelled(r->w)); half++)
        DSV4_TRY(dsv4_device_half_layer(r, half));
    if (end < 2 * r->d->end_layer)
        return DSV4_OK;
    if (r->shape.n_row)
        DSV4_TRY(dsv4_head_launch(r));
    return dsv4_device_gather(r);
}

static dsv4_status capture(run *r, int32_t first, int32_t end, void **out) {
    const struct dsv4_cuda_runtime *rt = &r->d->plugin->runtime;
    DSV4_TRY(dsv4_device_status(r->d, rt->capture_begin(r->d->stream), "the capture of a pass", r->err));
    r->capturing = 1;
    dsv4_status status = launch(r, first, end);
    r->capturing = 0;
    if (status != DSV4_OK) {
        rt->capture_end(r->d->stream, NULL);
        return status;
    }
    return dsv4_device_status(r->d, rt->capture_end(r->d->stream, out), "the graph of a pass", r->err);
}

/* The graph of these halves, made if there is none yet. */
static dsv4_status graph_of(run *r, int32_t first, int32_t end, void **out) {
    struct dsv4_shape_graphs *s = r->graphs;
    for (int32_t i = 0; i < s->n_graph; i++)
        if (s->graphs[i].first == first && s->graphs[i].end == end) {
            *out = s->graphs[i].exec;
            return DSV4_OK;
        }
    struct dsv4_graph *more = realloc(s->graphs, ((size_t)s->n_graph + 1) * sizeof *more);
    if (!more)
        return dsv4_fail(r->err, DSV4_E_MEMORY, "no memory for a table of %d graphs", s->n_graph + 1);
    s->graphs = more;
    DSV4_TRY(capture(r, first, end, out));
    s->graphs[s->n_graph++] = (struct dsv4_graph){first, end, *out};
    return DSV4_OK;
}

dsv4_status dsv4_device_segment(run *r, int32_t first, int32_t end) {
    void *graph;
    if (!r->graphs)
        return launch(r, first, end);
    dsv4_status status = graph_of(r, first, end, &graph);
    if (status == DSV4_E_MEMORY) { /* the device has no room for graphs: without, it goes slower */
        dsv4_graphs_drop(r->d);
        r->graphs = NULL;
        *r->err = (dsv4_error){0};
        return launch(r, first, end);
    }
    DSV4_TRY(status);
    return dsv4_device_status(r->d, r->d->plugin->runtime.graph_launch(graph, r->d->stream), "a graph", r->err);
}
