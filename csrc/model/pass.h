/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One pass: up to `chunk` tokens of any sessions through the layers.  Every function below is executed by all workers
 * of the team from start to end and cuts its own work with dsv4_share; functions that return int return 1 when the run
 * was cancelled (DSV4_SYNC).  A phase writes only what no other worker reads before the next barrier.
 *
 * Weights are cut by rows, what is done to a token by tokens.  A pass of one token has nothing to cut there: every
 * worker does it for itself, into rows of its own (dsv4_prepared), and needs no barrier after it (DSV4_SYNC_TOKENS).
 */
#ifndef DSV4_PASS_H
#define DSV4_PASS_H

#include "gen/kvcache.h"
#include "model/model.h"

/* A stretch of one session's tokens inside a pass. */
struct dsv4_piece {
    struct dsv4_kv *kv;
    int32_t first_tok; /* index of its first token in the pass */
    int32_t n;
    int32_t position;  /* of its first token in the session */
    const struct dsv4_tap *taps; /* [layers][DSV4_VALUES] what is copied of it, or NULL */
    int taps_on_device; /* they lie there */
    int32_t row;       /* of its first token in the segment, so in the taps */
    const dsv4_edit *edit; /* of its session, or NULL */
};

/* A logits row that somebody wants. */
struct dsv4_wanted {
    float *logits; /* [vocab] or NULL */
    dsv4_sampler *sampler;
    struct dsv4_sample *sample;
    int32_t tok; /* index in the pass */
    int32_t position; /* of the token that will be sampled */
};

/* What is made of tokens between two linear layers; N tokens, P = N (top_k + 1) expert rows. */
struct dsv4_prepared {
    float *post, *comb;              /* [N][hc], [N][hc hc] */
    dsv4_bf16 *u;                    /* [N][d] normed input of a sublayer */
    dsv4_bf16 *u_quant;              /* [N][d] rounded to FP8, as bf16 */
    dsv4_bf16 *u_plain;              /* [N][d] operand, not rounded */
    dsv4_bf16 *qr, *qr_quant;        /* [N][q_lora] */
    dsv4_bf16 *kv;                   /* [N][D] */
    uint8_t *kv_rows;                /* [N][kv_row] */
    dsv4_bf16 *z_quant;              /* [N][o_groups o_lora] */
    float *router_scores;            /* [N][E] */
    int32_t *expert_ids;             /* [N][top_k] */
    float *expert_weights;           /* [N][top_k] */
    int32_t *group_first;            /* [E + 2]: rows of expert e in the order by expert; E is the shared expert */
    int32_t *row_tok;                /* [P] token of each expert row */
    float *row_weight;               /* [P] */
    int32_t *tok_rows;               /* [P]: [N][top_k + 1] rows of each token, ascending expert, shared last */
};

/* Buffers of one pass, N = chunk tokens, P = N (top_k + 1) expert rows; sizes in workspace.c. */
struct dsv4_workspace {
    struct dsv4_prepared shared; /* for N tokens */
    struct dsv4_prepared *own;   /* [team], for one token each */
    dsv4_bf16 *streams;        /* [N][hc d] */
    float *dots;               /* [N][(2 + hc) hc] */
    dsv4_bf16 *y;              /* [N][d] output of a sublayer */
    float *cos_main, *sin_main, *cos_comp, *sin_comp; /* [N][d_rope / 2] */
    dsv4_bf16 *qa;                   /* [N][q_lora] */
    dsv4_bf16 *kv_raw;               /* [N][D] */
    dsv4_bf16 *q, *o;                /* [N][H D] */
    float *comp_k, *comp_gate;       /* [N][2 D] */
    float *icomp_k, *icomp_gate;     /* [N][2 index_dim] */
    dsv4_bf16 *index_q;              /* [N][index heads * index dim] */
    uint8_t *index_q_rows;           /* [N][index heads][index_row] */
    dsv4_bf16 *index_w;              /* [N][index heads] */
    int32_t *selected, *n_selected;  /* [N][index_topk], [N] */
    dsv4_bf16 *z;                    /* [N][o_groups o_lora] */
    float *router_logits;            /* [N][E] */
    dsv4_bf16 *gate_out, *up_out;    /* [P][I]; the activation overwrites gate_out */
    dsv4_bf16 *expert_out;           /* [P][d] */
    dsv4_bf16 *hidden;               /* [LOGIT_ROWS][d] */
    float *head_dots;                /* [LOGIT_ROWS][hc] */
    float *logits;                   /* [LOGIT_ROWS][vocab] */
    _Atomic int64_t *taken_up, *taken_down; /* [team] of each node, at its first worker: see moe.c */
    float *shared_scores;            /* [team][score_capacity]: index scores of few tokens, all workers */
    atomic_int score_capacity;       /* compressed entries there is room for; read before a job is started */
    void **scratch;                  /* [team] of each worker */
    uint8_t *grown;                  /* owned: what depends on the longest context */
    struct dsv4_arena *arena;        /* owned: everything else */
    /* parts of a worker's scratch, in bytes from its start */
    size_t at_kernel, at_keys, at_scores, at_top_k, at_small, at_edit, scratch_bytes;
};

enum { DSV4_LOGIT_ROWS = 32 };

/* The time of the first worker by phase. */
struct dsv4_clock {
    double last, seconds[DSV4_PHASES];
};

/* The first damaged rows that some worker found: the step fails. */
struct dsv4_damage {
    atomic_int found;
    const struct dsv4_row_store *store;
    int32_t layer, row;
};

struct dsv4_pass {
    dsv4_model *m;
    struct dsv4_workspace *ws;
    struct dsv4_piece *pieces;
    int32_t n_piece, n_tok;
    const int32_t *ids;              /* [n_tok] */
    const int32_t *positions;        /* [n_tok] */
    const int32_t *piece_of;         /* [n_tok] */
    int32_t first_layer, end_layer;
    const struct dsv4_asked *asked;  /* [layers] what pieces ask of sites (model/sites.h); NULL: nothing */
    struct dsv4_clock *clock;        /* or NULL */
    struct dsv4_wanted *wanted;
    int32_t n_wanted;
    int32_t unread, unread_layer;    /* an expert that could not be read from disk, or -1; worker 0 */
    atomic_int *bad_layer;           /* lowest layer with a non-finite stream; the layer count for the head; INT_MAX */
    struct dsv4_damage *damage;
    dsv4_error *fault;               /* of the model's device (model/device.h): the step fails */
    int prompt;                      /* all tokens are of segments that say so, or none is; with tensor_cores */
    int on_device;                   /* the model's device computes this pass; else the CPU: the same bits */
    uint32_t drawn;                  /* bit i: the device has chosen the token of row i of the block at work */
    const struct dsv4_beside_job *beside; /* what all workers do next of it (model/device_experts.h); NULL: it is over */
    int stopped;                     /* the others have left it */
    int diagnose;                    /* look at the streams after every layer */
    int edited;                      /* a piece is: ask dsv4_edited (model/edit.h) */
    struct dsv4_calls *calls;        /* of the edits that ask the caller (model/call.h), or NULL */
};

/* forward.c: the time since the last call, or the start, belongs to this phase. */
void dsv4_clock_start(struct dsv4_clock *clock);
void dsv4_clock_add(struct dsv4_clock *clock, enum dsv4_phase phase);
static inline void dsv4_lap(const dsv4_worker *w, const struct dsv4_pass *p, enum dsv4_phase phase) {
    if (p->clock && w->id == 0)
        dsv4_clock_add(p->clock, phase);
}

static inline int dsv4_meet(dsv4_worker *w, const struct dsv4_pass *p) {
    dsv4_lap(w, p, DSV4_PHASE_OTHER);
    int cancelled = dsv4_barrier(w);
    dsv4_lap(w, p, DSV4_PHASE_WAIT);
    return cancelled;
}

#define DSV4_SYNC(w, p)                                                                                                \
    do {                                                                                                               \
        if (dsv4_meet(w, p))                                                                                           \
            return 1;                                                                                                  \
    } while (0)

/* After what is cut by tokens. */
#define DSV4_SYNC_TOKENS(w, p)                                                                                         \
    do {                                                                                                               \
        if ((p)->n_tok > 1 && dsv4_meet(w, p))                                                                         \
            return 1;                                                                                                  \
    } while (0)

/* The prepared rows this worker reads and writes. */
static inline struct dsv4_prepared *dsv4_prepared(const dsv4_worker *w, const struct dsv4_pass *p) {
    return p->n_tok > 1 ? &p->ws->shared : &p->ws->own[w->id];
}

/* The tokens this worker prepares. */
static inline void dsv4_share_tokens(const dsv4_worker *w, const struct dsv4_pass *p, int64_t *lo, int64_t *hi) {
    *lo = 0;
    *hi = p->n_tok;
    if (p->n_tok > 1)
        dsv4_share(w, p->n_tok, 1, lo, hi);
}

/* The columns of a sublayer's output that this worker makes, and spreads into the streams. */
static inline void dsv4_share_columns(const dsv4_worker *w, const struct dsv4_pass *p, int32_t *c0, int32_t *c1) {
    int64_t lo, hi;
    dsv4_share(w, p->m->config.hidden_size, 32, &lo, &hi);
    *c0 = (int32_t)lo;
    *c1 = (int32_t)hi;
}

dsv4_status dsv4_workspace_create(struct dsv4_workspace **out, const dsv4_model *m, dsv4_error *err);
void dsv4_workspace_destroy(struct dsv4_workspace *ws);
int dsv4_workspace_fits(const struct dsv4_workspace *ws, const dsv4_model *m, int32_t position);
/* Room for sessions of up to `position` tokens; the old room stays valid on failure. */
dsv4_status dsv4_workspace_reserve(struct dsv4_workspace *ws, const dsv4_model *m, int32_t position, dsv4_error *err);

/* forward.c: embedding (unless the streams are already there), layers, head. */
int dsv4_forward(dsv4_worker *w, struct dsv4_pass *p, int embed);
/* hyper.c */
int dsv4_collapse(dsv4_worker *w, struct dsv4_pass *p, int32_t layer, int ffn);
/* This worker's columns of ws->y into the streams, in place; nobody else reads those columns of ws->y. */
void dsv4_spread(dsv4_worker *w, struct dsv4_pass *p);
/* attention.c: u_* -> this worker's columns of ws->y */
int dsv4_attention(dsv4_worker *w, struct dsv4_pass *p, int32_t layer);
/* compress.c: closes the windows that end in this pass; keeps the raw rows of the last tokens. */
void dsv4_close_windows(dsv4_worker *w, struct dsv4_pass *p, int32_t layer);
void dsv4_keep_state(dsv4_worker *w, struct dsv4_pass *p, int32_t layer);
/* forward.c: asks for rows [first, end) of a layer's store before they are read; what is damaged ends the step. */
void dsv4_check_rows(const struct dsv4_pass *p, const struct dsv4_row_store *s, int32_t layer, int32_t first, int32_t end);
/* indexer.c: whether any token of the pass sees more entries than it selects; ws->selected */
int dsv4_scores(const struct dsv4_pass *p, int32_t layer);
int dsv4_select(dsv4_worker *w, struct dsv4_pass *p, int32_t layer);
/* moe.c: u_* -> this worker's columns of ws->y */
int dsv4_moe(dsv4_worker *w, struct dsv4_pass *p, int32_t layer);
/* Of rows already grouped by expert, this worker's columns of ws->expert_out. */
int dsv4_moe_rows(dsv4_worker *w, struct dsv4_pass *p, int32_t layer);
/* head.c */
int dsv4_head(dsv4_worker *w, struct dsv4_pass *p);

/* linear.c */
struct dsv4_linear_job {
    const struct dsv4_weight *w;
    const dsv4_bf16 *x;
    void *out;
    ptrdiff_t ld_x, ld_out;
    int32_t out_f32;
};
/* Rows [row0, row1) of one job for n_tok tokens (tok NULL: 0, 1, 2, ...), in tiles between which cancellation is looked
 * at. */
void dsv4_linear_rows(dsv4_worker *w, const struct dsv4_pass *p, const struct dsv4_linear_job *job, const int32_t *tok,
                      int32_t n_tok, int32_t row0, int32_t row1);
/* This worker's part of the rows of all jobs, cut by cost, for all tokens of the pass. */
void dsv4_linear_jobs(dsv4_worker *w, const struct dsv4_pass *p, const struct dsv4_linear_job *jobs, int n_job);

/* Whether the input of this weight is rounded to FP8 (SPEC 6.4: the input of FP8 and FP4 linears). */
static inline int dsv4_rounds_input(const dsv4_model *m, const struct dsv4_weight *w) {
    return m->options.numerics == DSV4_OFFICIAL && (w->format == DSV4_W_FP8 || w->format == DSV4_W_FP4);
}

/* n values as an operand of `weight`, rounded to FP8 where that is the rule. */
static inline void dsv4_operand_of(const dsv4_model *m, const struct dsv4_weight *weight, dsv4_bf16 *out,
                                   const dsv4_bf16 *x, int32_t n) {
    if (dsv4_rounds_input(m, weight))
        m->k.act_quant(out, NULL, NULL, x, n);
    else
        m->k.act_flush(out, x, n);
}

/* What linear layers read of token t's normed input b->u. */
static inline void dsv4_input_operands(const struct dsv4_pass *p, struct dsv4_prepared *b, int64_t t) {
    int32_t d = p->m->config.hidden_size;
    if (p->m->options.numerics == DSV4_OFFICIAL)
        p->m->k.act_quant(b->u_quant + t * d, NULL, NULL, b->u + t * d, d);
    p->m->k.act_flush(b->u_plain + t * d, b->u + t * d, d);
}

static inline void *dsv4_scratch(const dsv4_worker *w, const struct dsv4_pass *p, size_t at) {
    return (uint8_t *)p->ws->scratch[w->id] + at;
}

#endif
