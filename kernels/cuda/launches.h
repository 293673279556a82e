/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The operations of kernels.h on a CUDA device: one launch does for all tokens of a pass what the CPU's workers do in
 * shares.  Every result equals `ref` bit for bit (the CPU's sums: 16 lanes, odd then even, one set of sums over all of K).
 *
 * A launch reads and writes device memory alone: every pointer in an args struct is one of the device, the struct itself
 * is read during the call.  What changes from step to step (positions, key lists, counts) is read from device memory, so
 * that a graph of launches can be replayed.  Launches are asynchronous on `stream` (a cudaStream_t) and return 0 or the
 * cudaError_t of the launch.  Sizes of zero tokens or rows are legal and launch nothing.
 *
 * Names as in kernels.h; "rows" of activations are contiguous unless a stride is given; t counts tokens of the pass.
 */
#ifndef DSV4_CUDA_LAUNCHES_H
#define DSV4_CUDA_LAUNCHES_H

#include "kernels.h"
#include "sampling.h"

/* ---------------------------------------------------------------------------------------------------- linear layers */

enum { DSV4_CUDA_JOBS = 8, DSV4_CUDA_FEW_TILE = 8, DSV4_CUDA_MANY_TILE = 32, DSV4_CUDA_MMA_TILE = 128 };

/*
 * On tensor cores (tensor_cores = 1, tile_tok = DSV4_CUDA_MMA_TILE) a sum is one chain of mma.m16n8k16 over all of K, the
 * columns of each 32 in an order of their own, the same for every row, token and number of tokens: a result depends on the
 * token's x and the row's weights alone, but not on `ref`'s order.  Operands are those of rules 2 and 3; bf16 weights below 2^-55 count.
 * PTX promises products and sums of at least single precision and leaves order and rounding open; if an mma aligns its 16
 * products and the sum so far to the largest of them and cuts each, and the result, to 24 bits, the errors of K columns are
 *     |out - sum| <= 2.5 K 2^-24 sum |x w|   (18 2^-23 per 16 columns, and those of rule 3's joins)
 * Layers with f32 weights, or whose rows are not multiples of 32 columns and 16 bytes, are computed as without.
 */

enum { DSV4_CUDA_MMA_COLS = 32 }; /* rows have a multiple of */
#define DSV4_CUDA_MMA_KIND(format, rule) (1 << (4 * (format) + (rule)))

/* out[t][r] = dot(x[t], w[r]) for all rows of w; see dsv4_linear_args. */
struct dsv4_cuda_linear_job {
    struct dsv4_weight w; /* data and scale of the device; any alignment, 16 bytes are fast */
    const dsv4_bf16 *x;   /* operands; row t at x + t * ld_x, or x + tok[t] * ld_x */
    void *out;            /* f32 or bf16 */
    ptrdiff_t ld_x, ld_out;
    int32_t group_rows;   /* 0; or row r of w reads x + r / group_rows * group_x: the grouped output projection */
    int32_t group_x;
    int32_t out_f32;
};

/*
 * Several layers over the same tokens, of any formats, in one launch.  Then, by the args of their own launches (NULL:
 * nothing), what follows: one of the lines below, on what job 0 made; and what stands beside it: operations that read
 * nothing of this launch and write nothing that is read in it.  The bits are those of one launch after the other.  With up
 * to DSV4_CUDA_FEW_TILE tokens all of it is one kernel, in which whoever makes the last result of a part goes on with it;
 * with more tokens these are launches.
 */
struct dsv4_cuda_linear_args {
    struct dsv4_cuda_linear_job jobs[DSV4_CUDA_JOBS];
    const int32_t *tok; /* [n_tok] or NULL */
    int32_t n_job, n_tok;
    int32_t tensor_cores;
    int32_t *tickets;   /* zeros before and after: one per 128 rows for act, per head, per token and one more, or one */
    const struct dsv4_cuda_act_args *act;
    const struct dsv4_cuda_spread_args *spread;
    const struct dsv4_cuda_collapse_args *collapse;  /* one job, whose x are the streams; squares not NULL */
    const struct dsv4_cuda_router_args *router;      /* one job; then group, of all tokens */
    const struct dsv4_cuda_group_args *group;
    const struct dsv4_cuda_rmsnorm_args *norm;
    const struct dsv4_cuda_headnorm_args *headnorm;  /* per_tok rows of a token; then index of what job 1 made, or NULL */
    const struct dsv4_cuda_index_args *index;
    const struct dsv4_cuda_norm_kv_args *kv;         /* beside, like the next two */
    const struct dsv4_cuda_windows_args *windows[2];
    const struct dsv4_cuda_keep_args *keep;
};

/* `linear` with tensor_cores. */
#define dsv4_cuda_linear_mma_args dsv4_cuda_linear_args

/* Rows [first, first + n) of the order by expert, all of one expert. */
struct dsv4_cuda_tile {
    int32_t expert, first, n;
};

/*
 * One or two projections of every expert; tiles as `group` makes them.  An expert whose data is NULL is left out.  What
 * follows is as for `linear`, with tiles of DSV4_CUDA_FEW_TILE rows in one kernel: swiglu of both projections' results;
 * or of one's, if no expert of a tile is left out, expert_sum and the spread of its result.
 */
struct dsv4_cuda_experts_args {
    const struct dsv4_weight *w[2]; /* [n_exp + 1] each, all [rows][cols]; w[1] NULL: one projection */
    dsv4_bf16 *out[2];              /* row i at out + i * rows */
    const dsv4_bf16 *x_quant;       /* what FP8 and FP4 weights multiply, and what the others do; row length cols */
    const dsv4_bf16 *x_plain;
    const int32_t *row_tok;         /* row i multiplies x row row_tok[i]; NULL: row i */
    const struct dsv4_cuda_tile *tiles;
    const int32_t *n_tile;          /* [1] */
    int32_t max_tile, tile_tok;     /* room for tiles; rows in each: DSV4_CUDA_FEW_TILE, _MANY_TILE or _MMA_TILE */
    int32_t rows, cols, n_tok;      /* no expert has more than n_tok rows */
    int32_t kinds;                  /* with _MMA_TILE: DSV4_CUDA_MMA_KIND of all weights, by or; cols a multiple of 32 */
    int32_t *tickets;               /* zeros before and after: max_tile * ceil(rows / 128) + ceil(rows / 16) */
    const struct dsv4_cuda_swiglu_args *swiglu;
    const struct dsv4_cuda_expert_sum_args *sum;
    const struct dsv4_cuda_spread_args *spread; /* with sum alone, or NULL */
};

/* --------------------------------------------------------------------------------------------- activations, formats */

/* act_quant (quant = 1) or act_flush of n_row rows of n. */
struct dsv4_cuda_act_args {
    dsv4_bf16 *out;
    uint8_t *codes, *scales; /* [n_row][n], [n_row][ceil(n / 128)]; or NULL */
    const dsv4_bf16 *x;      /* may be out */
    int32_t n_row, n, quant;
};

/* kv_store (load = 0) or kv_load of n_row KV rows. */
struct dsv4_cuda_kv_args {
    uint8_t *rows;
    dsv4_bf16 *x; /* [n_row][d_head] */
    int32_t n_row, d_head, d_rope, load;
    enum dsv4_kv_format format;
};

/* index_store (load = 0) or index_load of n_row index rows; to store, after rope (cos not NULL) and Hadamard if asked. */
struct dsv4_cuda_index_args {
    uint8_t *rows;
    dsv4_bf16 *x;           /* [n_row][n]; read alone when stored */
    const float *cos, *sin; /* [n_row / per_tok][n_pair], for the last 2 n_pair of each row; or NULL */
    int32_t n_row, n, per_tok, n_pair, hadamard, load; /* n <= 256 */
};

/* hadamard of n_row rows, in place. */
struct dsv4_cuda_hadamard_args {
    dsv4_bf16 *x;
    int32_t n_row, n;
};

/* ---------------------------------------------------------------------------------------------------- norms and rope */

struct dsv4_cuda_mean_square_args {
    float *out; /* [n_row] */
    const dsv4_bf16 *x;
    int32_t n_row, n;
};

/* rmsnorm of n_row rows, and the same as operands: act_quant and act_flush of it.  Any output may be NULL. */
struct dsv4_cuda_rmsnorm_args {
    dsv4_bf16 *out, *quant, *plain;
    const dsv4_bf16 *x; /* may be out */
    const float *w;
    int32_t n_row, n;
    float eps;
};

/* headnorm of n_row rows in place, then (cos not NULL) rope of the last 2 n_pair of each. */
struct dsv4_cuda_headnorm_args {
    dsv4_bf16 *x;
    const float *cos, *sin; /* [n_row / per_tok][n_pair], or NULL */
    int32_t n_row, n, per_tok, n_pair;
    float eps;
};

struct dsv4_cuda_rope_table_args {
    float *cos, *sin; /* [n_tok][n_pair] */
    const float *freq;
    const int32_t *positions;
    int32_t n_tok, n_pair;
};

/* rope of the last 2 n_pair of n_row rows of n, in place; flush: act_flush of the whole row after it. */
struct dsv4_cuda_rope_args {
    dsv4_bf16 *x;
    const float *cos, *sin; /* [n_row / per_tok][n_pair] */
    int32_t n_row, n, per_tok, n_pair, inverse, flush;
};

/* ------------------------------------------------------------------------------------------------- hyper-connections */

/* hc_pre of n_tok tokens, and with `norm` the rmsnorm of its result in its place, and that as operands. */
struct dsv4_cuda_collapse_args {
    dsv4_bf16 *x;             /* [n_tok][d_model] */
    dsv4_bf16 *quant, *plain; /* [n_tok][d_model] or NULL */
    float *post, *comb;       /* [n_tok][hc], [n_tok][hc][hc]; post NULL: the head's collapse */
    float *pre;               /* [n_tok][hc] or NULL */
    const dsv4_bf16 *streams; /* row t at t * hc * d_model, or tok[t] * hc * d_model */
    const int32_t *tok;       /* or NULL */
    const float *dots;        /* [n_tok][(2 + hc) hc], or [n_tok][hc] for the head */
    float *squares;           /* [DSV4_CUDA_FEW_TILE] for `linear`, which makes the streams' squares beside dots; or NULL */
    const float *scale, *base;
    const float *norm;        /* [d_model] or NULL */
    int32_t n_tok, hc, d_model, sinkhorn_iters;
    float norm_eps, hc_eps, rms_eps;
};

/* hc_post of n_tok tokens; out may be streams. */
struct dsv4_cuda_spread_args {
    dsv4_bf16 *out;
    const dsv4_bf16 *y, *streams;
    const float *post, *comb;
    int32_t n_tok, hc, d_model;
};

/* --------------------------------------------------------------------------------------- sessions' state on the device */

enum { DSV4_CUDA_BLOCK_ROWS = 64 };

/* A stretch of one session's tokens inside a pass. */
struct dsv4_cuda_piece {
    int32_t first_tok, n, position; /* in the pass; of its first token in the session */
};

/* One layer of one session (csrc/gen/kvcache.h): rings of the last rows, and tables of blocks of 64 rows. */
struct dsv4_cuda_state {
    uint8_t *window;                      /* [window][kv_row], position p at slot p mod window */
    float *k, *gate, *index_k, *index_gate; /* [slots][width], position p at slot p mod slots */
    uint8_t *const *compressed;           /* [blocks] of 64 KV rows each */
    uint8_t *const *index;                /* [blocks] of 64 index rows each */
};

/* The pieces of a pass, all on the device. */
struct dsv4_cuda_pass {
    const struct dsv4_cuda_piece *pieces;  /* [n_piece] */
    const struct dsv4_cuda_state *states;  /* [n_piece], of the layer at work */
    const int32_t *piece_of, *positions;   /* [n_tok] */
    int32_t n_piece, n_tok;
};

/* KV rows from their projection: rmsnorm, rope, kv_store. */
struct dsv4_cuda_norm_kv_args {
    uint8_t *kv_rows;       /* [n_tok][kv row bytes] */
    const dsv4_bf16 *kv;    /* [n_tok][d_head] */
    const float *kv_norm;
    const float *cos, *sin; /* [n_tok][d_rope / 2] */
    int32_t n_tok, d_head, d_rope; /* d_head <= 2048 */
    enum dsv4_kv_format format;
    float eps;
};

/* The pooled windows that end in this pass: pool, rmsnorm, rope, then kv_store, or Hadamard and index_store. */
struct dsv4_cuda_windows_args {
    struct dsv4_cuda_pass pass;
    const float *new_k, *new_gate; /* [n_tok][width], width = dim * (overlap ? 2 : 1) */
    const float *ape;              /* [ratio][width] */
    const float *norm;             /* [dim] */
    const float *freq;             /* [d_rope / 2] */
    int32_t ratio, overlap, dim, d_rope, slots;
    int32_t index;                 /* 1: the index compressor (index_k, index_gate -> index), dim <= 256 */
    int32_t max_window;            /* at least the windows that end in this pass; dim <= 2048, d_rope <= 512 */
    enum dsv4_kv_format format;
    float eps;
};

/* What the next pass needs of this one, after attention: KV rows and raw compressor rows into the rings. */
struct dsv4_cuda_keep_args {
    struct dsv4_cuda_pass pass;
    const uint8_t *kv_rows;
    const float *k, *gate, *index_k, *index_gate; /* NULL where the layer has none */
    int32_t window, slots, width, index_width;
    size_t kv_row;
};

/* Bytes of the device to out + to. */
struct dsv4_cuda_copy {
    const void *from;
    uint32_t to, bytes;
};

/* n_copy copies into one block of memory; n_block: of the grid, any number. */
struct dsv4_cuda_gather_args {
    uint8_t *out; /* 16-byte aligned where copies are to be fast */
    const struct dsv4_cuda_copy *copies;
    const int32_t *n_copy; /* [1] */
    int32_t n_block;
};

/* The plain contract: pointers to rows on the device. */
struct dsv4_cuda_pool_args {
    dsv4_bf16 *out;
    const float *const *k;
    const float *const *gate;
    const float *const *ape;
    int32_t n_row, n;
};

/* --------------------------------------------------------------------------------------------------------- attention */

/*
 * How attention makes the key list of every token (DESIGN 4.4): the window, ascending positions, masked up to `window` ranks; then the
 * compressed entries, those selected (selected not NULL) or all visible ones (ratio > 0).
 */
struct dsv4_cuda_keys_args {
    struct dsv4_cuda_pass pass;
    const uint8_t **keys;       /* [n_tok][max_key] */
    int32_t *n_key;             /* [n_tok] */
    const uint8_t *new_rows;    /* [n_tok][kv_row] */
    const int32_t *selected, *n_selected; /* [n_tok][top_k], [n_tok], or NULL */
    int32_t top_k, ratio, window, max_key;
    size_t kv_row;
};

/*
 * attention of n_tok tokens, at most 65535, over their key lists; with `list` these are made on the way, to where list->keys
 * and list->n_key say: keys and n_key.  Then (cos not NULL) rope back of the last d_rope of every head, then act_flush if
 * asked for.
 */
struct dsv4_cuda_attention_args {
    dsv4_bf16 *out;             /* [n_tok][n_head][d_head] */
    const dsv4_bf16 *q;
    const uint8_t *const *keys; /* [n_tok][max_key], NULL = masked; rows 2-byte aligned */
    const int32_t *n_key;       /* [n_tok], at most max_key */
    const struct dsv4_cuda_keys_args *list; /* or NULL */
    const float *cos, *sin;     /* [n_tok][d_rope / 2], or NULL */
    const float *sink;          /* [n_head] */
    void *scratch;              /* DSV4_CUDA_ATTENTION_SCRATCH bytes, 16-byte aligned */
    int32_t *tickets;           /* zeros before and after: DSV4_CUDA_ATTENTION_TICKETS */
    int32_t n_tok, n_head, d_head, d_rope, max_key; /* max_key >= 1 */
    int32_t flush;
    float scale;
    enum dsv4_kv_format format;
};
#define DSV4_CUDA_ATTENTION_TICKETS(n_tok, n_head) ((size_t)(n_tok) * (((size_t)(n_head) + 7) / 8))
/*
 * The same on tensor cores: scores and values are chains of mma.m16n8k16, the rest is as it is.  A token's bits do not depend
 * on the others.  With E = 2.5 2^-24 (d_head scale max |q k| summed over the dimensions), weights w of the softmax and
 * |v| their values, an element errs by no more than sum w |v| (4 E + 2^-7 + 2.5 n_key 2^-24), for P may round to the other
 * neighbour, and the rounding of the result.
 */
#define dsv4_cuda_attention_mma_args dsv4_cuda_attention_args
/* Scores of whole blocks of 64 ranks, a factor per block, the denominator. */
#define DSV4_CUDA_ATTENTION_SCRATCH(n_tok, n_head, max_key)                                                            \
    ((size_t)4 * (size_t)(n_tok) * (size_t)(n_head) * (((size_t)(max_key) + 63) / 64 * 65 + 1))

/* ----------------------------------------------------------------------------------------------------------- indexer */

/* index_scores of all entries visible to each token, (position + 1) / ratio of them, where these are more than top_k; then
 * (not NULL) the launch top_k, in the same kernel. */
struct dsv4_cuda_scores_args {
    struct dsv4_cuda_pass pass;
    float *scores;           /* [n_tok][max_entry] */
    const uint8_t *q;        /* [n_tok][n_head] index rows */
    const dsv4_bf16 *head_w; /* [n_tok][n_head] */
    int32_t *bad;            /* [1] becomes min(itself, layer) where a score is NaN */
    float w_scale;
    int32_t n_head, d_index, ratio, top_k, max_entry, layer; /* d_index 32, 64, 128 or 256 */
    int32_t *tickets;        /* zeros before and after: [n_tok] */
    const struct dsv4_cuda_top_k_args *choice;
};

/* top_k of each token's first (position + 1) / ratio scores; all ids where these are not more than k. */
struct dsv4_cuda_top_k_args {
    int32_t *ids, *n_id;      /* [n_tok][k], [n_tok] */
    const float *scores;      /* [n_tok][max_entry] */
    const int32_t *positions; /* [n_tok] */
    int32_t n_tok, k, ratio, max_entry;
};

/* --------------------------------------------------------------------------------------------------------------- MoE */

enum { DSV4_CUDA_EXPERTS = 1023 }; /* most experts of a layer */

/* router of n_tok tokens; with `table` the experts of a token are table[id], int32 or int64 [vocab][top_k], any
 * alignment. */
struct dsv4_cuda_router_args {
    int32_t *ids;          /* [n_tok][top_k] */
    float *weights;        /* [n_tok][top_k] */
    float *scores;         /* [n_tok][n_exp] */
    const float *logits;   /* [n_tok][n_exp] */
    const float *bias;     /* [n_exp] or NULL */
    const uint8_t *table;  /* or NULL */
    const int32_t *tokens; /* [n_tok], for the table */
    int32_t n_tok, n_exp, top_k, table_bytes;
    float route_scale;
};

/*
 * Rows by expert, ascending, those of the shared expert (number n_exp, weight 1) last; in each by token, then choice.
 * P = n_tok (top_k + 1) rows.
 */
struct dsv4_cuda_group_args {
    int32_t *group_first; /* [n_exp + 2] */
    int32_t *row_tok;     /* [P] */
    float *row_weight;    /* [P] */
    int32_t *tok_rows;    /* [n_tok][top_k + 1], ascending expert, shared last */
    struct dsv4_cuda_tile *tiles; /* [DSV4_CUDA_TILES(...)] */
    int32_t *n_tile;      /* [1] */
    uint64_t *uses;       /* [n_exp] grow by each expert's rows; or NULL */
    const int32_t *ids;   /* [n_tok][top_k], distinct in each token */
    const float *weights;
    int32_t n_tok, n_exp, top_k, tile_tok;
};
/* No more tiles than rows, nor than one for each expert and one for each full tile. */
#define DSV4_CUDA_TILES(n_tok, n_exp, top_k, tile_tok)                                                                 \
    ((n_tok) * (top_k) < (n_exp) + (n_tok) * (top_k) / (tile_tok)                                                      \
         ? (n_tok) * (top_k) + ((n_tok) + (tile_tok) - 1) / (tile_tok)                                                 \
         : (n_exp) + (n_tok) * (top_k) / (tile_tok) + ((n_tok) + (tile_tok) - 1) / (tile_tok))

/* swiglu of n_row rows with their weights, then the operand of the next layer: act_quant or act_flush.  Rows from
 * first_shared on are the shared expert's. */
struct dsv4_cuda_swiglu_args {
    dsv4_bf16 *out;       /* may be g or u */
    const dsv4_bf16 *g, *u;
    const float *weights; /* [n_row] */
    int32_t n_row, n, first_shared;
    float limit, shared_limit;
    int32_t quant, shared_quant; /* 2: neither, swiglu alone */
};

/* out[t] = expert_sum of rows[tok_rows[t][0..per_tok)]. */
struct dsv4_cuda_expert_sum_args {
    dsv4_bf16 *out;
    const dsv4_bf16 *rows;
    const int32_t *tok_rows;
    int32_t n_tok, per_tok, n;
};

/* -------------------------------------------------------------------------------------- experts beside the device */

/*
 * What the host needs of a layer after `group`, to memory of the host that the device sees: all choices with their
 * weights, and the operands of tokens that have an expert which the host computes: one whose data is NULL and which has
 * at most `few` rows.  When all of it is there, *sent becomes the number of this launch: one more than in the one before.
 */
struct dsv4_cuda_send_args {
    uint32_t *sent;                      /* [1], of the host, like the next four */
    int32_t *to_ids;                     /* [n_tok][top_k] */
    float *to_weights;                   /* [n_tok][top_k] */
    dsv4_bf16 *to_quant, *to_plain;      /* [n_tok][n], or NULL */
    uint32_t *count;                     /* [2] of the device, 0 at first: tickets, launches */
    const int32_t *ids;                  /* [n_tok][top_k] */
    const float *weights;
    const dsv4_bf16 *x_quant, *x_plain;  /* [n_tok][n] */
    const struct dsv4_weight *w;         /* [n_exp] one projection of every expert */
    const int32_t *group_first;          /* [n_exp + 1] */
    int32_t n_tok, top_k, n, few;
};

/* Rows that the host has computed: row to[i] of the device becomes row i of the host, for i < *n_row. */
struct dsv4_cuda_receive_args {
    dsv4_bf16 *rows;
    const dsv4_bf16 *from;       /* of the host, like the next two */
    const int32_t *to, *n_row;
    int32_t max_row, n;          /* at least *n_row; values of a row */
};

/* ----------------------------------------------------------------------------------------------- first and last steps */

/* Rows of the embedding into every stream. */
struct dsv4_cuda_embed_args {
    dsv4_bf16 *streams; /* [n_tok][hc][d_model] */
    const void *table;  /* bf16 or f32 [vocab][d_model] */
    const int32_t *ids;
    int32_t n_tok, hc, d_model, table_f32;
};

/* *bad = min(*bad, layer) if one of n values is not finite. */
struct dsv4_cuda_finite_args {
    int32_t *bad;
    const void *x; /* bf16, or f32 */
    size_t n;
    int32_t layer, f32;
};

/* ---------------------------------------------------------------------------------------------------------- sampling */

enum { DSV4_CUDA_ALTERNATIVES = 1024 }; /* most log-probabilities of a row beside its token's */

/* One choice; what it reads and writes beside its number in the arrays below. */
struct dsv4_cuda_draw {
    struct dsv4_draw d;
    int32_t row;   /* of the logits */
    int32_t lists; /* where its lists begin */
    int32_t top;   /* where its alternatives begin; d.logprobs of them, at most DSV4_CUDA_ALTERNATIVES */
};

/* The next token of each draw, as csrc/gen/sampler.h has it, and log-probabilities of what its logits were. */
struct dsv4_cuda_sample_args {
    int32_t *tokens;     /* [n_draw] */
    float *logprobs;     /* [n_draw]; where asked for */
    int32_t *top_ids;    /* best first, like the next */
    float *top_logprobs;
    const float *logits; /* [rows][n] */
    const struct dsv4_cuda_draw *draws; /* [n_draw] */
    const int32_t *lists;
    void *scratch;       /* DSV4_CUDA_SAMPLE_SCRATCH bytes, 8-byte aligned */
    int32_t n_draw, n;   /* n <= 2^20 */
    int32_t needs;       /* dsv4_draw_needs of all draws, or'ed */
};
/* Of each draw: a weight and a value per token, four sums per 1,024 tokens, and what finding the best takes. */
#define DSV4_CUDA_SAMPLE_SCRATCH(n_draw, n)                                                                            \
    ((size_t)(n_draw) * ((size_t)12 * (size_t)(n) + 4 + 32 * (((size_t)(n) + 1023) / 1024) + 107008))

/* -------------------------------------------------------------------------------------------------- what a trace copies */

/*
 * n_row rows of `width` elements of four bytes: the first ones from x (bf16 widened to f32, else as they are), `fill` behind
 * them.  How many come from x: n; or counts[t]; or, with positions, the (positions[t] + 1) / ratio visible entries where
 * they are more than top_k, else none.
 */
struct dsv4_cuda_tap_args {
    void *out;                /* row t at out + t * ld_out */
    const void *x;            /* row t at x + t * ld_x */
    const int32_t *counts;    /* [n_row] at most width, or NULL */
    const int32_t *positions; /* [n_row] or NULL */
    ptrdiff_t ld_out, ld_x;
    int32_t n_row, width, n, ratio, top_k, bf16;
    uint32_t fill;
};

/* --------------------------------------------------------------------------------------------------------- the table */

#define DSV4_CUDA_LAUNCHES(X)                                                                                          \
    X(linear)                                                                                                          \
    X(linear_mma)                                                                                                      \
    X(experts)                                                                                                         \
    X(act)                                                                                                             \
    X(kv)                                                                                                              \
    X(index)                                                                                                           \
    X(hadamard)                                                                                                        \
    X(mean_square)                                                                                                     \
    X(rmsnorm)                                                                                                         \
    X(headnorm)                                                                                                        \
    X(rope_table)                                                                                                      \
    X(rope)                                                                                                            \
    X(collapse)                                                                                                        \
    X(spread)                                                                                                          \
    X(norm_kv)                                                                                                         \
    X(windows)                                                                                                         \
    X(gather)                                                                                                          \
    X(keep)                                                                                                            \
    X(pool)                                                                                                            \
    X(attention_mma)                                                                                                   \
    X(attention)                                                                                                       \
    X(scores)                                                                                                          \
    X(top_k)                                                                                                           \
    X(router)                                                                                                          \
    X(group)                                                                                                           \
    X(swiglu)                                                                                                          \
    X(expert_sum)                                                                                                      \
    X(send)                                                                                                            \
    X(receive)                                                                                                         \
    X(embed)                                                                                                           \
    X(finite)                                                                                                          \
    X(sample)                                                                                                          \
    X(tap)

struct dsv4_cuda_launches {
#define X(op) int (*op)(const struct dsv4_cuda_##op##_args *a, void *stream);
    DSV4_CUDA_LAUNCHES(X)
#undef X
};

/* The functions themselves: dsv4_cuda_linear, ... */
#ifdef __cplusplus
extern "C" {
#endif
#define X(op) int dsv4_cuda_##op(const struct dsv4_cuda_##op##_args *a, void *stream);
DSV4_CUDA_LAUNCHES(X)
#undef X
#ifdef __cplusplus
}
#endif

#endif
