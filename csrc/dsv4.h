/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The public C API: model, session, step.
 *
 * A model is loaded once, immutable, and shared freely between threads and sessions.  A session is one timeline: token
 * ids and the KV state that belongs to them.  A step is one forward pass over segments, any mix of prompt chunks and
 * single tokens of any number of sessions; decode, prefill and batching are all this one call.  What a row computes
 * does not depend on its neighbours, on the chunking, on the number of threads or on the instruction set.
 *
 * Nothing here prints, exits, installs handlers or knows Python.  Every function that can fail returns a status
 * (core/status.h) and leaves its objects as they were.
 */
#ifndef DSV4_H
#define DSV4_H

#include <stddef.h>
#include <stdint.h>

#include "core/status.h"
#include "gen/sampler.h"

typedef struct dsv4_model dsv4_model;
typedef struct dsv4_session dsv4_session;
typedef struct dsv4_run dsv4_run;
typedef struct dsv4_edit dsv4_edit;

/* ------------------------------------------------------------------------------------------------------------ model */

/* Every number of config.json that the engine needs (SPEC 1.1), already validated by the reader, checked again here. */
struct dsv4_config {
    int32_t vocab_size, hidden_size, num_hidden_layers, num_attention_heads, head_dim, qk_rope_head_dim;
    int32_t q_lora_rank, o_groups, o_lora_rank, moe_intermediate_size, n_routed_experts, num_experts_per_tok;
    int32_t num_hash_layers, sliding_window, index_n_heads, index_head_dim, index_topk;
    int32_t hc_mult, hc_sinkhorn_iters, max_position_embeddings;
    double rope_theta, compress_rope_theta, yarn_factor, yarn_beta_fast, yarn_beta_slow;
    int32_t yarn_original_positions;
    float rms_norm_eps, hc_eps, routed_scaling_factor, swiglu_limit;
    const int32_t *compress_ratios; /* [num_hidden_layers]; 0, 4 (overlapping, with indexer), or another ratio >= 2 */
};

enum dsv4_dtype {
    DSV4_I64, DSV4_I32, DSV4_F32, DSV4_F16, DSV4_BF16, DSV4_F8_E4M3, DSV4_F8_E8M0, DSV4_FP4 /* two a byte, I8 or U8 */
};

struct dsv4_shard_desc {
    const char *path; /* for messages only */
    int fd;           /* open for reading; borrowed during dsv4_model_create */
    uint64_t size;    /* as seen when its header was checked */
};

struct dsv4_tensor_desc {
    const char *name; /* official name, SPEC 6.2 */
    int32_t dtype;    /* enum dsv4_dtype */
    int32_t rank;
    int64_t shape[4]; /* logical: an FP4 [rows][cols] says cols, not cols / 2 */
    int32_t shard;
    uint64_t offset;  /* absolute in the file */
    uint64_t nbytes;
};

enum dsv4_numerics { DSV4_OFFICIAL = 0, DSV4_WEIGHTS = 1 }; /* WEIGHTS: linear inputs are not rounded to FP8 */

struct dsv4_options {
    int32_t numerics;               /* enum dsv4_numerics */
    int32_t april_kv;               /* 1: KV rows are not rounded to FP8 (SPEC 3.4, official bug) */
    int32_t april_shared;           /* 1: the shared expert is not clamped (SPEC 4.3) */
    int32_t n_thread;               /* 0: one per physical core this process may use, fewer for small models */
    int32_t chunk_tok;              /* tokens per pass; 0: default */
    int32_t use_mmap;               /* 0: read into owned memory */
    uint64_t expert_bytes;          /* with use_mmap: memory for routed experts, read from disk when chosen; 0: no limit */
    int32_t copy_to_nodes;          /* with use_mmap and several memory nodes: copy weights to where they are used */
    int32_t use_cuda;               /* 1: CUDA devices compute; weights are copied there */
    int32_t n_cuda_device;          /* with use_cuda: devices, each with some of the layers */
    const int32_t *cuda_devices;    /* [n_cuda_device], as CUDA numbers them, each once, in the order of the layers */
    int32_t tensor_cores;           /* with use_cuda: prompts are computed on tensor cores, not with the CPU's sums */
    uint64_t gpu_bytes;             /* with use_cuda: most bytes of each for weights, a pass and a session; 0: what is free */
    const int32_t *hot;             /* [n_hot] layer * experts + expert: those to have on the device first; or NULL */
    int32_t n_hot;
    const char *cuda_plugin, *cuda_driver; /* with use_cuda: as for dsv4_devices */
    const char *nccl;               /* with several devices: NCCL's library, a file or a name for dlopen */
    const char *root;               /* where /sys and /proc are found, for tests; NULL: this machine's */
    const char *disable;            /* instruction sets not to use, comma-separated, or NULL */
    /* bytes scanned, at least every 50 ms, then those copied to each GPU; from the calling thread; non-zero cancels
     * (DSV4_E_CANCELLED); or NULL */
    int (*progress)(void *arg, uint64_t done, uint64_t total);
    void *progress_arg;
};

/*
 * Maps the shards (weights are used where they lie), binds every tensor of the main model by name and checks dtype and
 * shape, scans scales, norms and other small tensors for NaN.  DSV4_E_FORMAT names the tensor.
 */
dsv4_status dsv4_model_create(dsv4_model **out, const struct dsv4_config *config, const struct dsv4_shard_desc *shards,
                              int32_t n_shard, const struct dsv4_tensor_desc *tensors, int32_t n_tensor,
                              const struct dsv4_options *options, dsv4_error *err);

/* Sessions hold a reference: the weights go when the last of them is destroyed.  NULL is legal. */
void dsv4_model_destroy(dsv4_model *model);

const struct dsv4_config *dsv4_model_config(const dsv4_model *model);
int32_t dsv4_model_threads(const dsv4_model *model);
int32_t dsv4_model_chunk(const dsv4_model *model);

/* Routed experts since the load, by layers and tokens of a step: kept in memory, read from disk, or used as mapped. */
struct dsv4_expert_counts {
    int32_t slots; /* experts that memory is set aside for; 0: all are used where they are mapped, and nothing counts */
    uint64_t slot_bytes, kept, read, mapped, bytes; /* bytes: read in all */
};
void dsv4_model_experts(const dsv4_model *model, struct dsv4_expert_counts *out);

/* Where the weights of a model on devices are; all 0 on the CPU. */
struct dsv4_placement {
    int32_t experts, experts_on_device; /* routed, of all layers */
    uint64_t weight_bytes, pass_bytes;  /* of devices: weights; a pass at its longest, and experts on their way */
    uint64_t shared_bytes;              /* of the host, locked, that devices see */
};
void dsv4_model_placement(const dsv4_model *model, struct dsv4_placement *out);

/*
 * How often each routed expert was chosen by tokens on devices since the load, [layers][experts]; zeros where all are on
 * one.  Waits for steps that are under way.
 */
dsv4_status dsv4_model_uses(dsv4_model *model, uint64_t *out, dsv4_error *err);

/* op and variant name of entry i of the kernel table, i in [0, dsv4_kernel_count()). */
int32_t dsv4_kernel_count(void);
void dsv4_model_kernel(const dsv4_model *model, int32_t i, const char **op, const char **variant);

/* Pointer, size and scale of one tensor as mapped, by official name; the pointer lives as long as the model. */
dsv4_status dsv4_model_tensor(const dsv4_model *model, const char *name, const void **data, uint64_t *nbytes,
                              dsv4_error *err);

/* ---------------------------------------------------------------------------------------------------------- devices */

/* A GPU, as the CUDA plugin sees it. */
struct dsv4_device_facts {
    char name[256];
    int32_t major, minor; /* architecture */
    int32_t multiprocessors;
    uint64_t total_bytes, free_bytes; /* of its memory; free_bytes 0 where it cannot be used */
    char why[512];        /* why it cannot be used; empty where it can */
};

/* The CUDA version of the plugin, and the architectures it has code for. */
struct dsv4_plugin_facts {
    int32_t cuda_version; /* 1000 major + 10 minor */
    const char *built_for;
};

/*
 * Loads the plugin at path `plugin` and the driver that dlopen finds as `driver`; both stay loaded.  Fills up to
 * `capacity` devices; *n is how many there are.  DSV4_E_UNAVAILABLE says why there are none.
 */
dsv4_status dsv4_devices(struct dsv4_device_facts *out, int32_t capacity, int32_t *n, struct dsv4_plugin_facts *facts,
                         const char *plugin, const char *driver, dsv4_error *err);

/* Layers [first, end) of a model and where they are computed. */
struct dsv4_stage {
    int32_t device, first, end;
    uint64_t weight_bytes; /* of that device, like the other */
    uint64_t work_bytes;   /* of the buffers of a pass */
};

/* Fills up to `capacity` stages in the order of the layers; returns how many there are: 0 on the CPU. */
int32_t dsv4_model_stages(const dsv4_model *model, struct dsv4_stage *out, int32_t capacity);

/*
 * How layers are cut into n stages: at ends[i] the i-th one ends, each has at least one, and the largest share of its room
 * that a stage takes, its layers' bytes and `each` over rooms[i], is as small as it can be.  n <= n_layer.
 */
dsv4_status dsv4_split_layers(int32_t *ends, const uint64_t *bytes, int32_t n_layer, uint64_t each, const uint64_t *rooms,
                              int32_t n, dsv4_error *err);

/* ------------------------------------------------------------------------------------------------ memory of a device */

/*
 * Memory of the GPU that computes some layer: made by the caller, or where the model keeps a tensor.  What lies there is
 * complete when a step, or a call below, has
 * returned.  Calls may be made beside a running step; none of them waits for it,
 * but that giving memory back waits for all that runs on the device.
 */
struct dsv4_memory {
    void *data;      /* of the device */
    uint64_t nbytes;
    int32_t device;  /* CUDA's number */
    int32_t stage;   /* of the model */
};

/* CUDA's number of the GPU that computes a layer; -1 on the CPU, or without such a layer. */
int32_t dsv4_model_device(const dsv4_model *model, int32_t layer);
/* Bytes that are free there.  DSV4_E_ARGUMENT on the CPU, like the next two. */
dsv4_status dsv4_memory_room(uint64_t *nbytes, dsv4_model *model, int32_t layer, dsv4_error *err);
/* nbytes > 0, aligned to 256, undefined contents.  DSV4_E_MEMORY. */
dsv4_status dsv4_memory_create(struct dsv4_memory *out, dsv4_model *model, int32_t layer, uint64_t nbytes, dsv4_error *err);
/* The bytes of a tensor as they are stored, for reading; they live as long as the model.  DSV4_E_ARGUMENT where they are
 * not there: vectors lie there as f32, and what a GPU does not compute nowhere. */
dsv4_status dsv4_memory_of_tensor(struct dsv4_memory *out, dsv4_model *model, const char *name, dsv4_error *err);
void dsv4_memory_destroy(dsv4_model *model, const struct dsv4_memory *memory); /* of dsv4_memory_create */
/* Bytes [at, at + nbytes) to the host. */
dsv4_status dsv4_memory_read(dsv4_model *model, void *to, const struct dsv4_memory *from, uint64_t at, uint64_t nbytes,
                             dsv4_error *err);
/*
 * Bytes [at, at + nbytes) to new memory of the same device.  With `reader`, a cudaStream_t of the caller (1 the default
 * stream, 2 that of the thread), what that stream gets from now on waits for the copy, and the call does not.
 */
dsv4_status dsv4_memory_copy(struct dsv4_memory *out, dsv4_model *model, const struct dsv4_memory *from, uint64_t at,
                             uint64_t nbytes, void *reader, dsv4_error *err);
/* n rows of four-byte elements, from_width each, to the start of `to` as rows of `width`, `fill` behind them. */
dsv4_status dsv4_memory_widen(dsv4_model *model, const struct dsv4_memory *to, const struct dsv4_memory *from, int32_t n,
                              int32_t width, int32_t from_width, uint32_t fill, dsv4_error *err);

/* ---------------------------------------------------------------------------------------------------------- session */

/*
 * most_kept (0 to DSV4_MOST_KEPT): how many earlier states the session keeps to be rewound to, at the beginning and end
 * of steps that append several tokens to it.  Each costs one fixed state (dsv4_session_bytes) once the session moves on.
 */
enum { DSV4_MOST_KEPT = 1024 };
dsv4_status dsv4_session_create(dsv4_session **out, dsv4_model *model, int32_t most_kept, dsv4_error *err);

/*
 * A session of its own that begins at the newest state of `session` at or before position `at`: what it is now, one
 * that it has kept, or position 0.  Nothing is copied until one of them moves on, and then only what is written.  It keeps
 * up to `most_kept` states, the newest of `session`'s to begin with.
 */
enum { DSV4_NOW = -1, DSV4_AS_MANY = -1 };
dsv4_status dsv4_session_fork(dsv4_session **out, dsv4_session *session, int32_t at, int32_t most_kept, dsv4_error *err);
/* Exchanges the timelines of two sessions of one model. */
void dsv4_session_swap(dsv4_session *a, dsv4_session *b);
void dsv4_session_destroy(dsv4_session *session); /* NULL is legal; waits for a running step */
int32_t dsv4_session_position(dsv4_session *session); /* tokens so far */
/* Copies tokens [first, first + n) to out; the range must lie within the position. */
dsv4_status dsv4_session_tokens(dsv4_session *session, int32_t *out, int32_t first, int32_t n, dsv4_error *err);
/* Bytes this session holds now: the fixed state (window, compressors) and the grown rows. */
void dsv4_session_bytes(dsv4_session *session, uint64_t *fixed, uint64_t *grown);

enum dsv4_rows { DSV4_ROWS_WINDOW = 0, DSV4_ROWS_COMPRESSED = 1, DSV4_ROWS_INDEX = 2 };

/*
 * Decodes rows [first, first + n) of one layer to bf16: WINDOW by token position (only the last sliding_window ones
 * exist) and COMPRESSED by entry, [n][head_dim]; INDEX by entry, [n][index_head_dim].
 */
dsv4_status dsv4_session_rows(dsv4_session *session, int32_t layer, int32_t kind, uint16_t *out, int32_t first,
                              int32_t n, dsv4_error *err);

/*
 * For measuring: moves the session on to `position` without computing anything, with finite pseudo-random state of every
 * kind that depends on the seed alone; its tokens are said to be id 0.  DSV4_E_ARGUMENT where the position lies behind it.
 */
dsv4_status dsv4_session_fill(dsv4_session *session, int32_t position, uint64_t seed, dsv4_error *err);

/* ------------------------------------------------------------------------------------------------------ saved state */

/*
 * A state leaves and enters the engine in pieces; how they lie in a file is the caller's business.  They are the tokens,
 * the fixed state, and the rows of every store: rows lie one after another, in blocks of DSV4_STATE_BLOCK with a CRC-32C
 * each, the last one as long as there are rows.
 */
enum { DSV4_STATE_BLOCK = 64, DSV4_STATE_PARTS = 4 };

/* What a state of this model has at some position: one entry for each layer and kind (COMPRESSED, INDEX) with rows. */
struct dsv4_store {
    int32_t layer, kind, rows, row_bytes;
};
/* Fills up to two entries a layer, by layer and kind; returns how many.  0 <= position. */
int32_t dsv4_model_stores(const dsv4_model *model, int32_t position, struct dsv4_store *out);

uint64_t dsv4_model_state_bytes(const dsv4_model *model); /* the fixed state */

/* Versions of what the fixed state and the rows hold, and of the bits that operations give. */
void dsv4_state_versions(int32_t *layout, int32_t *numerics);

/* The fixed state where it lies: valid until the session moves on or is destroyed. */
const uint8_t *dsv4_session_fixed(dsv4_session *session, uint64_t *nbytes);

/*
 * Blocks [first, first + n) of one store where they lie (valid likewise): their checksums, crcs [n], and their bytes, which
 * may lie in up to DSV4_STATE_PARTS places each: data and nbytes [DSV4_STATE_PARTS n] get the *n_part places in order.
 * DSV4_E_FORMAT where a block that lies in a file is damaged.
 */
dsv4_status dsv4_session_blocks(dsv4_session *session, int32_t layer, int32_t kind, const uint8_t **data,
                                uint64_t *nbytes, int32_t *n_part, uint32_t *crcs, int32_t first, int32_t n,
                                dsv4_error *err);

struct dsv4_saved_rows {
    struct dsv4_store store;
    uint64_t offset;      /* in the file, a multiple of 64 */
    const uint32_t *crcs; /* [n_crc], one for each block */
    int32_t n_crc;
};

struct dsv4_saved_state {
    struct dsv4_shard_desc file;  /* mapped (or read, without use_mmap): blocks of rows are used where they lie */
    int32_t use_mmap;
    int32_t position;
    const int32_t *ids;           /* [position], copied */
    const uint8_t *fixed;         /* [fixed_bytes], copied */
    uint64_t fixed_bytes;
    const struct dsv4_saved_rows *rows; /* [n_rows], as dsv4_model_stores gives them */
    int32_t n_rows;
};

/*
 * A session in that state.  Every number is checked against the model and the file; whole blocks of rows are compared with
 * their checksums when they are first read: a step, dsv4_session_rows and dsv4_session_blocks give DSV4_E_FORMAT then.
 */
dsv4_status dsv4_session_load(dsv4_session **out, dsv4_model *model, int32_t most_kept,
                              const struct dsv4_saved_state *state, dsv4_error *err);

/* CRC-32C of the bytes that gave `crc` (0 for none), then these. */
uint32_t dsv4_checksum(uint32_t crc, const void *data, size_t nbytes);

/* ------------------------------------------------------------------------------------------------------------- edit */

/*
 * What a session changes in its own passes.  Each operation has a layer and positions, those of the tokens whose rows it
 * changes; what is computed for other tokens, layers and sessions is the same code.
 *
 * ADD, SET and CLAMP change rows at a site: x + v, v, or x within [v[0], v[1]], computed in f32, rounded to bf16.  CALL
 * asks the caller for the streams after a layer (dsv4_run_wait), after all other operations there.
 * EXPERTS_OFF: never chosen, the next best take their places (in a hash layer: the best by score), weights as the router
 * makes them of those; EXPERTS_FORCE: chosen instead of all others, also where they are off, weights from the router's
 * scores; EXPERTS_WEIGH: the weight, if chosen, multiplied afterwards.
 * HEADS_OFF: a head's output is 0 before the output projection; SINKS_OFF: its sink takes no share of the attention.
 * ENTRIES_OFF: compressed entries that are not attended to, and in CSA layers not selected: the next best are;
 * ENTRIES_ON (CSA only): always selected, unless they are off or do not exist yet.
 */
enum dsv4_edit_kind {
    DSV4_EDIT_ADD, DSV4_EDIT_SET, DSV4_EDIT_CLAMP, DSV4_EDIT_CALL, DSV4_EDIT_EXPERTS_OFF, DSV4_EDIT_EXPERTS_WEIGH,
    DSV4_EDIT_EXPERTS_FORCE, DSV4_EDIT_HEADS_OFF, DSV4_EDIT_SINKS_OFF, DSV4_EDIT_ENTRIES_OFF, DSV4_EDIT_ENTRIES_ON,
    DSV4_EDIT_KINDS
};

/* The streams after a layer; the normed input of a sublayer; its output before it is spread over the streams. */
enum dsv4_edit_site {
    DSV4_AT_STREAMS, DSV4_AT_ATTENTION_IN, DSV4_AT_ATTENTION_OUT, DSV4_AT_FFN_IN, DSV4_AT_FFN_OUT, DSV4_EDIT_SITES
};

struct dsv4_edit_op {
    int32_t kind, site, layer; /* site of ADD, SET and CLAMP; layer -1: the embedding (streams only) */
    int32_t n_row;             /* rows of ids or values: 1 for all positions, or one for each (ADD, SET, EXPERTS_FORCE) */
    const int32_t *positions;  /* [n_range][2] half-open, ascending; n_range 0: all */
    /* experts, heads; [n_row][num_experts_per_tok] forced experts; entries [n_id / 2][2] half-open, ascending; or one mask
     * of streams (1 at other sites) */
    const int32_t *ids;
    /* ADD, SET: [n_row][streams in the mask, or 1 for all alike][hidden_size]; CLAMP: [2][hidden_size], low and high;
     * EXPERTS_WEIGH: [n_id] */
    const float *values;
    void *function;            /* CALL: for dsv4_run_call */
    int32_t n_range, n_id;
    int64_t n_value;
};

/* Immutable and counted; every number is checked against the model.  What it points to is copied, `function` is not. */
dsv4_status dsv4_edit_create(dsv4_edit **out, const dsv4_model *model, const struct dsv4_edit_op *ops, int32_t n,
                             dsv4_error *err);
void dsv4_edit_release(dsv4_edit *edit); /* NULL is legal */

/* From now on the session's passes are edited (NULL: not), and those of sessions that begin as its forks.  Takes a
 * reference.  Keeping it right for positions that are computed again is the caller's business. */
dsv4_status dsv4_session_edit(dsv4_session *session, dsv4_edit *edit, dsv4_error *err);

/* ------------------------------------------------------------------------------------------------------------- step */

enum dsv4_logits { DSV4_LOGITS_NONE = 0, DSV4_LOGITS_LAST = 1, DSV4_LOGITS_ALL = 2 };

/*
 * Internals of a layer that a step copies for those who ask, f32 unless said otherwise, one row for each token of a
 * segment.  d = hidden_size, H = heads, D = head_dim; values the model holds as bf16 are widened.
 */
enum dsv4_value {
    DSV4_V_STREAMS_IN,  /* [hc_mult][d] residual streams before the layer */
    DSV4_V_STREAMS_MID, /* [hc_mult][d] between its attention and its experts */
    DSV4_V_STREAMS,     /* [hc_mult][d] after it */
    DSV4_V_ATTENTION_PRE, DSV4_V_ATTENTION_POST, DSV4_V_ATTENTION_COMB, /* [hc], [hc], [hc][hc] hyper-connections (SPEC 2.2) */
    DSV4_V_FFN_PRE, DSV4_V_FFN_POST, DSV4_V_FFN_COMB,
    DSV4_V_ATTENTION_IN, DSV4_V_ATTENTION_OUT, DSV4_V_FFN_IN, DSV4_V_FFN_OUT, /* [d] what a sublayer reads, normed, and gives */
    DSV4_V_KV,                /* [D] the row of the window, rounded as it is kept */
    DSV4_V_KV_COMPRESSED,     /* [D] one row for each entry that closes in the segment; layers with compression */
    DSV4_V_KV_INDEX,          /* [index_head_dim] likewise; layers with an indexer, like the next two */
    DSV4_V_INDEX_SCORES,      /* [width] of the entries, ascending ids; NaN where there are none, or all are selected unseen */
    DSV4_V_INDEX_SELECTED,    /* i32 [index_topk] ascending, padded with -1 */
    DSV4_V_ATTENTION_WEIGHTS, /* [H][1 + sliding_window + width]: see csrc/model/attention_weights.c */
    DSV4_V_HEADS,             /* [H][D] what the heads give, before the output projection */
    DSV4_V_EXPERTS,           /* i32 [num_experts_per_tok] in the order of choice */
    DSV4_V_EXPERT_WEIGHTS,    /* [num_experts_per_tok] */
    DSV4_V_ROUTER_SCORES,     /* [n_routed_experts] before the bias */
    DSV4_VALUES
};

/* The shape of a row; its last dimension grows by the width. */
struct dsv4_value_shape {
    int32_t integer; /* i32, else f32 */
    int32_t rank;
    int64_t dims[2]; /* with width 0 */
    int32_t per_entry; /* one row for each entry, not for each token */
    int32_t widens;    /* entries a row needs beyond dims: 0, or as many as are visible to the segment's last token */
};
extern const char *const dsv4_value_names[DSV4_VALUES];
/* 1, or 0 where the layer has no such value (or there is no such layer or value). */
int dsv4_model_value(const dsv4_model *model, int32_t layer, int32_t value, struct dsv4_value_shape *out);

/* Where a value goes: `rows` rows as above one after another; the first is that of the segment's first token. */
struct dsv4_tap {
    void *out;     /* NULL: not asked for; memory of the host, or of the layer's device where the segment says so */
    int64_t rows;
    int32_t width; /* 0 unless the value widens */
};

/*
 * ids are appended to the session.  logits receives [vocab] (LAST) or [n][vocab] (ALL) f32, or is NULL with NONE.  A
 * sampler, if given, samples the token that follows the last row (logits may still be NONE); it is not appended.
 */
struct dsv4_segment {
    dsv4_session *session;
    const int32_t *ids;
    float *logits;
    dsv4_sampler *sampler;      /* or NULL */
    struct dsv4_sample *sample; /* result of the sampler */
    int32_t n;
    int32_t want; /* enum dsv4_logits */
    const struct dsv4_tap *taps; /* [layers][DSV4_VALUES], or NULL; undefined contents when the step fails */
    /* 1: taps lie on the model's device (dsv4_memory_create).  Not in a step that the CPU computes: one with an edited
     * session, or with a tap of ATTENTION_WEIGHTS. */
    int32_t taps_on_device;
    int32_t prompt; /* 1: the tokens are given, 0: generated; with tensor_cores it decides which sums are used */
};

/* Where the time of a step goes, as its first worker sees it; the first four are linear layers by weight format. */
enum dsv4_phase {
    DSV4_PHASE_FP8, DSV4_PHASE_FP4, DSV4_PHASE_BF16, DSV4_PHASE_F32, DSV4_PHASE_ATTENTION, DSV4_PHASE_INDEXER,
    DSV4_PHASE_OTHER, DSV4_PHASE_WAIT /* for the other workers */, DSV4_PHASES
};

/*
 * Starts a step and returns at once; the segments, what they point to and `seconds` must live until dsv4_run_finish.
 * seconds, [DSV4_PHASES] or NULL, is written when the step ends.  Waits for a step of another thread on the same model, in order of arrival.  A session may occur in
 * one segment only.  Atomic: a step that fails or is cancelled leaves every session as it was.  Long segments are cut
 * into passes of at most dsv4_model_chunk() tokens.
 *
 *     DSV4_TRY(dsv4_step_start(&run, model, segments, n, NULL, err));
 *     while (dsv4_run_wait(run, 50))
 *         if (interrupted) dsv4_run_cancel(run);
 *     status = dsv4_run_finish(run, err);
 */
dsv4_status dsv4_step_start(dsv4_run **out, dsv4_model *model, struct dsv4_segment *segments, int32_t n_segment,
                            float *seconds, dsv4_error *err);

/*
 * Starts one whole layer alone, from position 0 with a state of its own: streams_in [n][hc_mult][hidden_size] bf16 ->
 * streams_out likewise; token_ids [n] are used by hash layers; taps as in a segment.  The same code as inside a step.
 */
dsv4_status dsv4_layer_start(dsv4_run **out, dsv4_model *model, int32_t layer, uint16_t *streams_out,
                             const uint16_t *streams_in, const int32_t *token_ids, int32_t n,
                             const struct dsv4_tap *taps, dsv4_error *err);

/* ------------------------------------------------------------------------------------------------------------ parts */

/*
 * What a layer is made of, called on its own with the code that runs inside a step.  d = hidden_size, hc = hc_mult,
 * H = heads, D = head_dim, E = n_routed_experts, k = num_experts_per_tok; one row for each of n tokens; bf16 unless said
 * otherwise.  Output pointers may be NULL.
 */
enum dsv4_part_kind {
    DSV4_PART_COLLAPSE,  /* streams -> pre, post, comb, collapsed, y: the collapsed streams after the norm */
    DSV4_PART_SPREAD,    /* x: a sublayer's output; streams, post, comb -> streams_out */
    DSV4_PART_ROUTE,     /* x, token_ids -> experts, weights, scores */
    DSV4_PART_MOE,       /* x, token_ids -> y */
    DSV4_PART_EXPERT,    /* x, expert, weights -> y */
    DSV4_PART_COMPRESS,  /* x, state -> entries, index_entries: those that close; the state stays as it is */
    DSV4_PART_INDEX,     /* x, state -> selected, index_scores; likewise; layers with an indexer */
    DSV4_PART_ATTEND,    /* x, state -> heads; likewise; with selected in place of the indexer's choice, if given */
    DSV4_PART_OUTPUT,    /* heads -> y */
    DSV4_PART_ATTENTION, /* x, state -> y; the tokens' rows become part of the state */
    DSV4_PARTS
};

struct dsv4_part {
    int32_t kind, layer, n;
    int32_t site;             /* COLLAPSE: 0 before attention, 1 before the experts */
    int32_t expert;           /* EXPERT: in [0, E]; E is the shared one */
    int32_t position;         /* with a state: where it is; it must still be there */
    dsv4_session *state;      /* of dsv4_session_create_layer */
    const uint16_t *x;        /* [n][d] */
    const uint16_t *streams;  /* [n][hc][d] */
    const int32_t *token_ids; /* [n]; where they have no part in the result, zeros */
    float *pre, *post, *comb; /* [n][hc], [n][hc], [n][hc][hc] */
    uint16_t *collapsed, *y;  /* [n][d] */
    uint16_t *streams_out;    /* [n][hc][d] */
    int32_t *experts;         /* [n][k] in the order of choice */
    float *weights;           /* [n][k]; of EXPERT [n] */
    float *scores;            /* [n][E] */
    uint16_t *entries;        /* [(position + n) / ratio - position / ratio][D] */
    uint16_t *index_entries;  /* likewise [index_head_dim]; layers with an indexer */
    int32_t *selected;        /* [n][index_topk] ascending, padded with -1 */
    float *index_scores;      /* [n][(position + n) / ratio]; NaN where a token does not see an entry */
    uint16_t *heads;          /* [n][H][D] */
};

/* A session that is the state of one layer's attention: for parts of that layer, not for steps. */
dsv4_status dsv4_session_create_layer(dsv4_session **out, dsv4_model *model, int32_t layer, dsv4_error *err);

/* Starts one part; like dsv4_step_start.  The part and what it points to must live until dsv4_run_finish. */
dsv4_status dsv4_part_start(dsv4_run **out, dsv4_model *model, const struct dsv4_part *part, dsv4_error *err);

/* Starts the model's head alone: streams [n][hc_mult][hidden_size] bf16, as after a layer -> logits [n][vocab]. */
dsv4_status dsv4_head_start(dsv4_run **out, dsv4_model *model, float *logits, const uint16_t *streams, int32_t n,
                            dsv4_error *err);

/* 1: still running after that time; 0: done; 2: an edit of kind CALL waits for dsv4_run_resume. */
int dsv4_run_wait(dsv4_run *run, int milliseconds);

/* The rows of one piece that a CALL is about; valid until dsv4_run_resume. */
struct dsv4_call {
    void *function; /* of the operation */
    int32_t layer, n, hc_mult, hidden_size;
};
void dsv4_run_call(const dsv4_run *run, struct dsv4_call *out);
void dsv4_run_read(const dsv4_run *run, float *streams, int32_t *positions); /* [n][hc_mult][hidden_size], [n] */
/* The step goes on with these streams, rounded to bf16; NULL: as they were, also after dsv4_run_cancel. */
void dsv4_run_resume(dsv4_run *run, const float *streams);
void dsv4_run_cancel(dsv4_run *run);                /* tiles poll it: the run ends within about a tile's time */
/* Tokens whose last layer is done, for a progress display; any thread. */
int64_t dsv4_run_progress(const dsv4_run *run);
dsv4_status dsv4_run_finish(dsv4_run *run, dsv4_error *err); /* waits, releases, frees the run */

#endif
