/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A model on CUDA devices: its weights copied there, the buffers of a pass, and mirrors of sessions' states.  The layers
 * are cut into stages, each on a device of its own: the first also embeds, the last makes the logits.  The host's weights
 * stay mapped and the host's session state stays the one that counts: after each pass what it wrote comes back, so forks,
 * rewinds, saved sessions and failed steps work as without a device.  What somebody looks
 * at (model/sites.h) is copied on the device (model/device_sites.h), but for weights of attention: passes in which these are
 * asked for, or that somebody changes (model/edit.h), layers and parts run alone, and the search for a bad layer are
 * computed on the CPU: the bits are the same.
 *
 * Refuses what does not fit before anything is allocated; what fails half-way is given back.
 */
#ifndef DSV4_DEVICE_H
#define DSV4_DEVICE_H

#include "backend/cuda.h"
#include "backend/nccl.h"
#include "model/pass.h"

/* One layer, every pointer of the device; for the experts launch also the weights of all experts, [E + 1] each. */
struct dsv4_device_layer {
    struct dsv4_layer l;             /* l.experts stays NULL */
    const struct dsv4_weight *w1, *w3, *w2;
    int32_t quant_down, quant_shared; /* whether w2's input is rounded to FP8, of routed experts and the shared one */
    int32_t mma_kinds;               /* of all experts, for tensor cores (launches.h); 0: some they cannot take */
};

/* Buffers of a pass on the device, N = chunk tokens, P = N (top_k + 1) rows; as in struct dsv4_workspace. */
struct dsv4_device_buffers {
    uint8_t *in, *out;              /* of the staging */
    int32_t *ids, *positions, *piece_of; /* of the pass at work, in `in`, like the next three */
    struct dsv4_cuda_piece *pieces; /* [pieces] */
    struct dsv4_cuda_state *states; /* [layers of the stage][pieces] */
    int32_t *bad;                   /* [1] */
    int32_t *tickets;               /* zeros between launches (launches.h) */
    int32_t *tok;
    dsv4_bf16 *streams, *u, *u_quant, *u_plain, *y;
    float *dots, *squares, *post, *comb;
    float *cos_main, *sin_main, *cos_comp, *sin_comp;
    dsv4_bf16 *qa, *qr_quant, *kv_raw, *q, *o, *z, *z_quant;
    uint8_t *kv_rows, *index_q_rows;
    float *comp_k, *comp_gate, *icomp_k, *icomp_gate;
    dsv4_bf16 *index_q, *index_w;
    int32_t *selected, *n_selected, *n_key;
    float *router_logits, *router_scores, *expert_weights, *row_weight;
    int32_t *expert_ids, *group_first, *row_tok, *tok_rows, *n_tile;
    struct dsv4_cuda_tile *tiles;
    dsv4_bf16 *gate_out, *up_out, *expert_out;
    dsv4_bf16 *hidden, *hidden_plain;
    float *head_dots, *logits;
    uint8_t *draws;   /* of the last stage, like the next two: what rows sample from, as in struct dsv4_device */
    int32_t *drawn;
    uint8_t *sample_scratch;
};

/* What passes between host and device (device_staging.c); its blocks are as large on both sides. */
struct dsv4_staging {
    uint8_t *in, *out;             /* owned, host: memory that stays in place */
    size_t in_bytes, out_bytes, most_copies;
    struct dsv4_cuda_copy *copies; /* in `in`: what is wanted back */
    void **places;                 /* where each of them goes; owned by the model's arena */
    int32_t n_copy;
    size_t used;                   /* of out, by these copies */
    int busy;                      /* what was sent may not have been read */
};

/* A block of rows that somebody wants (device_head.c). */
struct dsv4_device_rows {
    int32_t n;                           /* 0: none are at work */
    int32_t row[DSV4_LOGIT_ROWS];        /* of each draw, in the block */
    int32_t n_draw, n_list, n_top, needs;
    const int32_t *tok;                  /* device: token of each row in the pass */
    const struct dsv4_cuda_draw *draws;  /* device */
};

enum {
    DSV4_GRAPH_TOKENS = 64, /* larger passes are launched one by one: their work takes longer than that */
    DSV4_GRAPH_SHAPES = 32, /* whose graphs are kept; that needed longest ago goes */
};

/* All that the launches of a pass depend on beside what lies in device memory. */
struct dsv4_device_shape {
    int32_t n_tok, n_piece;
    int32_t n_row, n_draw, n_top, needs; /* of the head's rows (struct dsv4_device_rows), where they are part of it */
    int32_t context;      /* at least the tokens of the longest session, those of the pass among them */
    int32_t scored_ratio; /* layers that compress more select all they see; 0: all do */
    int32_t prompt;       /* on tensor cores */
};

/* A segment of a pass of that shape: half layers [first, end) (device_run.h). */
struct dsv4_graph {
    int32_t first, end;
    void *exec; /* owned, of the runtime */
};

struct dsv4_shape_graphs {
    struct dsv4_device_shape shape;
    uint64_t last_use;         /* 0: no shape yet */
    struct dsv4_graph *graphs; /* owned [n_graph] */
    int32_t n_graph;
};

/* Where bytes that a tensor of the model has on the host lie on a device. */
struct dsv4_placed {
    const void *from;
    void *to;
    uint64_t nbytes;
};

struct dsv4_pipeline;

/* A stage: layers [first_layer, end_layer) on one device. */
struct dsv4_device {
    const struct dsv4_cuda_plugin *plugin; /* borrowed, like the next two */
    const dsv4_model *model;
    struct dsv4_cuda_launches prompts; /* the plugin's; what tensor cores do, done by them */
    struct dsv4_pipeline *pipeline;   /* this is one of its stages */
    int32_t number;                   /* CUDA's, of the device */
    int32_t first_layer, end_layer;
    void *stream;                     /* owned, like the next three: memory of the device */
    uint8_t *weights;
    uint8_t *workspace;
    uint8_t *scratch;                 /* what grows with the context: key lists, scores, parts of attention */
    size_t scratch_bytes;
    size_t weight_bytes, pass_bytes;  /* of weights; of workspace and the most of scratch */
    struct dsv4_beside *beside;       /* owned: experts that are not there (device_experts.h); NULL: all are */
    struct dsv4_device_layer *layers; /* [layers of the model], those of this stage set; owned by the model's arena */
    struct dsv4_weight embed, head;   /* of the first stage; of the last, like hc_head and norm */
    struct dsv4_hyper hc_head;
    const float *norm, *freq_main, *freq_compressed;
    struct dsv4_device_buffers b;
    struct dsv4_staging staging;
    uint8_t *draws;                   /* host, of the last stage: choices of rows and their lists, owned by the arena */
    int32_t *drawn;                   /* host, likewise: tokens and log-probabilities */
    struct dsv4_device_rows rows;
    int32_t head_tok[DSV4_LOGIT_ROWS]; /* host: rows.tok, until the pass has ended */
    struct dsv4_shape_graphs graphs[DSV4_GRAPH_SHAPES];
    uint64_t passes;
    struct dsv4_placed *placed;       /* owned [n_placed]: weights as they were copied (device_memory.c) */
    size_t n_placed, most_placed;
    struct dsv4_device_sites *sites;  /* owned: what passes with a trace need (device_sites.c); NULL before the first */
};

/* All stages, in the order of their layers. */
struct dsv4_pipeline {
    int32_t n;
    struct dsv4_device *stages; /* owned, [n] */
    struct dsv4_nccl *nccl;     /* owned; NULL with one stage, or once a device is lost */
    dsv4_error dead;            /* code DSV4_OK, or why a device is lost: every later step fails with it */
};

enum { DSV4_STAGES = 64 };

/* pipeline.c: by the model's options; copies the weights.  DSV4_E_MEMORY with what is needed and what is free. */
dsv4_status dsv4_pipeline_create(struct dsv4_pipeline **out, const dsv4_model *m, dsv4_error *err);
void dsv4_pipeline_destroy(struct dsv4_pipeline *p); /* NULL is legal */

/* Enqueues the copy of bytes from stage i - 1 to stage i, between all that is enqueued on the two before and after. */
dsv4_status dsv4_pipeline_move(struct dsv4_pipeline *p, int32_t i, void *to, const void *from, uint64_t bytes,
                               dsv4_error *err);
/* Until all that is enqueued has ended, or a stage fails: then the others may wait for it without end, and destroy or
 * abandon has to be next. */
dsv4_status dsv4_pipeline_wait(struct dsv4_pipeline *p, const char *doing, dsv4_error *err);
/* Whether all that is enqueued on this stage has ended, without waiting; errors of it, and of those that it may wait for. */
dsv4_status dsv4_pipeline_ask(struct dsv4_device *d, int32_t *done, const char *doing, dsv4_error *err);
/* Ends copies that wait for a stage that is lost. */
void dsv4_pipeline_abandon(struct dsv4_pipeline *p);

/* device.c: one stage, whose plugin, model, pipeline and number are set: opened, then (its layers known) built.  Destroy is
 * legal after each, failed or not. */
dsv4_status dsv4_device_open(struct dsv4_device *d, dsv4_error *err);
dsv4_status dsv4_device_build(struct dsv4_device *d, dsv4_error *err);
void dsv4_device_destroy(struct dsv4_device *d);

/* Bytes it may use: what is free, at most the model's gpu_bytes. */
dsv4_status dsv4_device_room(struct dsv4_device *d, uint64_t *room, dsv4_error *err);
/* Bytes of the weights of one layer, with those of the embedding or the head for the first and last one; of the buffers. */
uint64_t dsv4_device_layer_bytes(struct dsv4_device *d, int32_t layer);
uint64_t dsv4_device_work_bytes(struct dsv4_device *d);

/* Makes this stage's device the current one of the calling thread: before all that is done on it. */
dsv4_status dsv4_device_prepare(struct dsv4_device *d, dsv4_error *err);

/* A code of the runtime or a launch, as a status; a fault of the device is remembered. */
dsv4_status dsv4_device_status(struct dsv4_device *d, int code, const char *doing, dsv4_error *err);

/* device_pass.c, device_layer.c: embedding and layers.  By one thread, like the next. */
dsv4_status dsv4_device_layers(dsv4_worker *w, struct dsv4_pass *p, dsv4_error *err);
/*
 * device_head.c: what n <= DSV4_LOGIT_ROWS rows want.  Bit i of *drawn: the token of row i is there; the other rows that
 * want logits or a token have their logits in the workspace.
 */
dsv4_status dsv4_device_head(struct dsv4_pass *p, const struct dsv4_wanted *wanted, int32_t n, uint32_t *drawn,
                             dsv4_error *err);
/* Bytes of what a block of rows samples from, beside its logits; words that come back. */
size_t dsv4_device_draw_bytes(const dsv4_model *m);
size_t dsv4_device_drawn_words(void);

/* device_layer.c: bytes that scratch grows to, whatever a pass is. */
size_t dsv4_device_scratch_bytes(const dsv4_model *m);

/* device_memory.c: weights at `from` have been copied to `to`. */
dsv4_status dsv4_device_note(struct dsv4_device *d, const void *from, void *to, uint64_t nbytes, dsv4_error *err);

/* device_graph.c: no graph is left: what they point to has moved, or goes. */
void dsv4_graphs_drop(struct dsv4_device *d);
/* Nor is any shape known: each is launched one by one again before it is captured. */
void dsv4_graphs_forget(struct dsv4_device *d);

/* device_staging.c: sets the sizes (layers are known); allocates the host's part.  Destroy is legal after each. */
void dsv4_staging_measure(struct dsv4_device *d);
dsv4_status dsv4_staging_create(struct dsv4_device *d, dsv4_error *err);
void dsv4_staging_destroy(struct dsv4_device *d);
/* The pass at work will bring these bytes of the device to the host.  There is room (dsv4_staging_measure). */
void dsv4_staging_want(struct dsv4_device *d, void *host, const void *there, size_t bytes);

/* -------------------------------------------------------------------------------------- device_kv.c: state of sessions */

/* A session's state on a stage's device, as it is at `position`; rows of a layer in blocks of DSV4_CUDA_BLOCK_ROWS. */
struct dsv4_mirror {
    struct dsv4_device *device; /* borrowed: the model outlives its sessions */
    struct dsv4_mirror *next;   /* owned: the same session on another stage */
    int32_t position;           /* -1: to be copied again */
    int32_t capacity;           /* tokens there are blocks for */
    uint8_t *fixed;             /* owned, of the device: the fixed state from the stage's first layer on */
    uint8_t **slabs;            /* owned [n_slab], of the device: blocks */
    int32_t n_slab;
    uint8_t **tables;           /* host, owned: of each layer, pointers to the blocks of compressed, then of index rows */
    uint8_t **device_tables;    /* owned, of the device: the same */
    size_t *at;                 /* host, owned [layers of the model][2]: where a layer's pointers begin in the tables */
};

/* That of this stage; NULL where there is none yet. */
struct dsv4_mirror *dsv4_mirror_of(const struct dsv4_device *d, const struct dsv4_piece *piece);

/* Makes the mirror of a piece's session what its host state is, with room for the piece's tokens. */
dsv4_status dsv4_mirror_ready(struct dsv4_device *d, const struct dsv4_pass *p, const struct dsv4_piece *piece,
                              dsv4_error *err);
/* One layer's pointers. */
void dsv4_mirror_state(const struct dsv4_mirror *k, int32_t layer, struct dsv4_cuda_state *out);
/* Where row `row` of a layer's compressed (or index) rows lies on the device; *n of them lie there, one after another. */
const uint8_t *dsv4_mirror_rows(const struct dsv4_device *d, const struct dsv4_piece *piece, int32_t layer, int index,
                                int32_t row, int32_t *n);
/* What the pass writes for this piece is wanted in the host's state. */
void dsv4_mirror_want(struct dsv4_device *d, const struct dsv4_piece *piece);
/* Bytes of the mirror of a session of so many tokens. */
size_t dsv4_mirror_bytes(const struct dsv4_device *d, int32_t tokens);
#endif
