/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A loaded model: configuration, kernel table, thread team, and every weight of the main layers bound to a field.
 * Immutable after load, but for where routed experts lie when they come from disk.  Shapes in comments; d = hidden_size, H = heads, D = head_dim, E = experts, I = expert width.
 */
#ifndef DSV4_MODEL_H
#define DSV4_MODEL_H

#include <stdatomic.h>

#include "backend/parallel.h"
#include "cpu/dispatch.h"
#include "dsv4.h"
#include "io/shards.h"

/* One hyper-connection site (SPEC 2.2). */
struct dsv4_hyper {
    struct dsv4_weight fn; /* [(2 + hc) hc][hc d] f32, or [hc][hc d] for the head */
    const float *base;     /* owned by the model's arena, like every float pointer below */
    const float *scale;
};

struct dsv4_compressor {
    struct dsv4_weight wkv, wgate; /* [coff hd][d] */
    const float *ape;              /* [ratio][coff hd] */
    const float *norm;             /* [hd] */
    int32_t ratio, overlap;        /* overlap: coff = 2 */
    int32_t dim;                   /* hd: head_dim, or index_head_dim */
};

struct dsv4_expert {
    struct dsv4_weight w1, w3; /* [I][d] */
    struct dsv4_weight w2;     /* [d][I] */
};

enum dsv4_layer_kind { DSV4_SWA, DSV4_CSA, DSV4_HCA };

struct dsv4_layer {
    enum dsv4_layer_kind kind; /* ratio 0; ratio 4 with indexer; any other ratio */
    struct dsv4_hyper hc_attn, hc_ffn;
    const float *attn_norm, *ffn_norm; /* [d] */
    const float *q_norm;               /* [q_lora] */
    const float *kv_norm;              /* [D] */
    const float *sink;                 /* [H] */
    struct dsv4_weight wq_a, wq_b, wkv, wo_a, wo_b;
    struct dsv4_compressor compressor, index_compressor;
    struct dsv4_weight index_wq_b;     /* [index heads * index dim][q_lora] */
    struct dsv4_weight weights_proj;   /* [index heads][d] */
    struct dsv4_weight gate;           /* [E][d] */
    const float *gate_bias;            /* [E], or NULL for a hash layer */
    const uint8_t *tid2eid;            /* [vocab][top_k] i64 or i32 as mapped, maybe unaligned; NULL otherwise */
    int32_t tid2eid_bytes;             /* 8 or 4 */
    struct dsv4_expert *experts;       /* [E], owned by the arena */
    struct dsv4_expert shared;
};

/* Where a session's fixed state of one layer lies, in bytes from its start; see gen/session.h. */
struct dsv4_state_layout {
    size_t window;            /* [sliding_window][row] */
    size_t k, gate;           /* [rows][coff hd] f32 */
    size_t index_k, index_gate;
    int32_t rows;             /* compressor rows kept: 2 ratio with overlap, ratio without, 0 for SWA */
};

struct dsv4_model {
    struct dsv4_config config; /* compress_ratios owned by the arena */
    struct dsv4_options options;
    struct dsv4_kernels k;
    const struct dsv4_variant *chosen[DSV4_OP_COUNT];
    struct dsv4_topology topology; /* owned */
    dsv4_team *team;          /* owned */
    void *placed;             /* owned: copies of weights by node, or NULL (place.c) */
    size_t placed_bytes;
    struct dsv4_shard *shards; /* owned */
    int32_t n_shard;
    struct dsv4_tensor_desc *tensors; /* owned, sorted by name; names owned by the arena */
    int32_t n_tensor;
    struct dsv4_arena *arena; /* owned */
    struct dsv4_layer *layers;
    struct dsv4_weight embed, head; /* [vocab][d] */
    struct dsv4_hyper hc_head;
    const float *norm;
    const float *freq_main, *freq_compressed; /* [d_rope / 2] */
    float softmax_scale;      /* head_dim^-0.5, rounded once from double like the next */
    float index_w_scale;      /* index_head_dim^-0.5 * index_n_heads^-0.5 */
    enum dsv4_kv_format kv_format;
    size_t kv_row, index_row; /* bytes */
    struct dsv4_state_layout *state; /* [layers] */
    size_t state_bytes;
    struct dsv4_workspace *workspace; /* owned; used by the running step alone */
    _Atomic(dsv4_run *) spare; /* owned: the buffers of the last step, for the next */
    struct dsv4_pipeline *pipeline; /* owned: the GPUs (model/device.h); NULL on the CPU */
    struct dsv4_expert_cache *cache; /* owned; NULL unless routed experts come from disk (model/experts.h) */
    atomic_int references;
};

/* model/model.c: a job of the team while the model is loaded, of whose `total` bytes *done are: tells the progress
 * callback, and cancels when that asks for it (DSV4_E_CANCELLED). */
dsv4_status dsv4_load_job(dsv4_model *m, dsv4_job_fn *fn, void *ctx, const atomic_ullong *done, uint64_t total,
                          dsv4_error *err);

/* model/rope.c: the frequencies of both tables (SPEC 3.2). */
void dsv4_rope_frequencies(float *main_table, float *compressed, const struct dsv4_config *c);

/* Bytes of a weight's codes, and of its scales. */
uint64_t dsv4_weight_bytes(const struct dsv4_weight *w);
uint64_t dsv4_scale_bytes(const struct dsv4_weight *w);

/* model/weights.c: binds and checks every tensor; model/scan.c: looks for NaN and decides the scale rules. */
dsv4_status dsv4_bind_weights(dsv4_model *m, dsv4_error *err);
dsv4_status dsv4_scan_weights(dsv4_model *m, dsv4_error *err);
/* model/place.c: with several memory nodes, every weight copied so that rows lie on the node that computes them. */
dsv4_status dsv4_place_weights(dsv4_model *m, const struct dsv4_shard_desc *shards, dsv4_error *err);

/* gen/step.c */
void dsv4_run_free(dsv4_run *run);

const struct dsv4_tensor_desc *dsv4_find_tensor(const dsv4_model *m, const char *name);
static inline const uint8_t *dsv4_tensor_data(const dsv4_model *m, const struct dsv4_tensor_desc *t) {
    return m->shards[t->shard].data + t->offset;
}

#endif
