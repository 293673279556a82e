/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The contract of every operation, and the table that holds the chosen variant of each.
 *
 * Kernels are math on raw pointers: they know no model, allocate nothing, never fail, never start a thread, and keep
 * no state.  The caller has validated everything; a kernel asserts its contract in debug builds.  All are thread-safe
 * on distinct outputs and scratch.  Inputs and outputs never overlap unless a comment says "in place".
 *
 * THE SAME BITS EVERYWHERE.  `ref` in cpu/ref defines the result, every other variant equals it bit for bit, for any
 * number of tokens per call and any split of rows, heads or tokens over calls:
 *  1. Dot products (linear layers, mean squares, row sums = dot with ones): 16 virtual f32 lanes over K padded with
 *     +0 to a multiple of 32; lane i takes element 2i+1, then 2i, of each 32; then the tree l[i] += l[i+8], +4, +2,
 *     +1.  bf16 x bf16 products are exact in f32, so multiply-add and fused are the same; where one operand is a full
 *     f32 the multiply-add is fused (fmaf).
 *  2. Operands below 2^-55 in magnitude count as zero.  Weights are decoded exactly to bf16 with their power-of-two
 *     scale folded in.
 *  3. Scales that are not powers of two (DSV4_SCALE_BLOCK): the lanes of each block start at +0, then per lane
 *     acc = fmaf(block, scale, acc).
 *  4. Attention: see dsv4_attention_args.   5. Index scores: see dsv4_index_scores_args.
 *  6. Other sums: by index ascending, plain adds, unless their contract says fused.
 *  7. Functions: functions.h; sqrt and division are IEEE.  No libm in any value path (fmaf is the IEEE operation).
 * No kernel sets flush-to-zero or another rounding mode.
 * Where a result is NaN, its sign and payload are not defined, unless the contract names the value.
 *
 * Names: n_tok tokens, d_model hidden size, n_head heads, d_head head size, d_rope rotary part, n_exp experts, K the
 * reduced dimension, ld_* strides in elements.  Source of the formulas: SPEC, section given at each entry.
 */
#ifndef DSV4_KERNELS_H
#define DSV4_KERNELS_H

#include "types.h"

/* Raised with every change of the bits that some operation gives: saved states of another version are refused. */
enum { DSV4_NUMERICS_VERSION = 1 };

/* ------------------------------------------------------------------------------------------ linear layers, SPEC 6 */

enum dsv4_weight_format { DSV4_W_FP8 = 0, DSV4_W_FP4 = 1, DSV4_W_BF16 = 2, DSV4_W_F32 = 3, DSV4_W_FORMATS = 4 };

enum dsv4_scale_type { DSV4_SCALE_E8M0 = 0, DSV4_SCALE_F32 = 1, DSV4_SCALE_BF16 = 2 };

enum dsv4_scale_rule {
    DSV4_SCALE_NONE = 0,  /* bf16 and f32 weights */
    DSV4_SCALE_FOLD = 1,  /* e8m0 within DSV4_FOLD_*: weight = code * scale, exact in bf16, zero or within 2^+-55 */
    DSV4_SCALE_BLOCK = 2, /* rule 3; the block is 128 columns for FP8, 32 columns for FP4 */
    DSV4_SCALE_ROUND = 3, /* FP8 only: weight = bf16(f32(code * scale)), then rules 1 and 2 (wo_a with f32 scales) */
};

/* The e8m0 bytes with which every code of a format stays within 2^+-55: 2^-9 ... 448 for FP8, 1/2 ... 6 for FP4. */
enum { DSV4_FOLD_FP8_MIN = 81, DSV4_FOLD_FP8_MAX = 173, DSV4_FOLD_FP4_MIN = 73, DSV4_FOLD_FP4_MAX = 179 };

/* A weight [rows][cols] as it lies in the checkpoint; layouts in types.h.  data and scale may be unaligned. */
struct dsv4_weight {
    const void *data;
    const void *scale; /* NULL with DSV4_SCALE_NONE */
    int32_t rows, cols; /* cols of FP4 a multiple of 32 */
    uint8_t format;     /* enum dsv4_weight_format */
    uint8_t scale_type; /* enum dsv4_scale_type */
    uint8_t scale_rule; /* enum dsv4_scale_rule */
};

/*
 * out[t][r] = dot(x[t], w[r]) for r in [row0, row1), t in [0, n_tok).  bf16 out: one rounding of the f32 sum.
 * x are bf16 values already made operands (act_quant or act_flush).  Rules 1-3.  A NaN code, weight, scale or x makes
 * the result a NaN, which one is not specified; so it is for the value of a sum once a product has reached 2^128.
 */
struct dsv4_linear_args {
    void *out;            /* f32 or bf16; element (t, r) at out[t * ld_out + r]: row 0 of the weight is column 0 */
    const dsv4_bf16 *x;   /* row t at x + tok[t] * ld_x, cols elements each, 2-byte aligned */
    const int32_t *tok;   /* NULL = 0, 1, 2, ... */
    const struct dsv4_weight *w;
    void *scratch;        /* DSV4_LINEAR_SCRATCH(cols) bytes, 64-byte aligned */
    ptrdiff_t ld_out, ld_x;
    int32_t n_tok, row0, row1;
    int32_t out_f32;      /* 1: out is float, 0: bf16 */
};

/* Room for 128 rows (of weights, of x) as f32, and a margin. */
#define DSV4_LINEAR_SCRATCH(cols) ((size_t)128 * 4 * (((size_t)(cols) + 255) / 128 * 128) + 4096)

/* Up to this many tokens the `few` entry is called (weights streamed once), above it the `many` entry (tiles). */
enum { DSV4_FEW_TOKENS = 8 };

typedef void dsv4k_linear_fn(const struct dsv4_linear_args *a);

/* ------------------------------------------------------------------------------- activations and formats, SPEC 3, 6 */

/*
 * One row of n bf16 values -> what its FP8 codes stand for, as bf16 (exact): per 128 elements (the last group may be
 * shorter) amax = max(|x|, 1e-4), scale = 2^ceil(log2(amax * (1/448))), code = e4m3(clamp(x / scale)).  codes [n] and
 * scales [ceil(n/128)] may be NULL.  A group with a NaN or infinity gives scale 255, codes 0x7f, values 0x7fc0.  A value
 * that rounds up past the largest bf16 (|x| above 0x7f77) becomes infinity.
 */
typedef void dsv4k_act_quant_fn(dsv4_bf16 *out, uint8_t *codes, uint8_t *scales, const dsv4_bf16 *x, int32_t n);

/* n bf16 values with those below 2^-55 in magnitude made zero (rule 2); in place allowed. */
typedef void dsv4k_act_flush_fn(dsv4_bf16 *out, const dsv4_bf16 *x, int32_t n);

/*
 * One KV row (types.h) from d_head bf16 values, the last d_rope of them already rotated: "fp8_sim_64" of SPEC 3.4 on
 * the first part; a group with a NaN or infinity gets scale 255.  kv_load gives the bf16 values back (scale 255 gives
 * 0x7fc0 for the group).  row is 2-byte aligned.
 */
typedef void dsv4k_kv_store_fn(uint8_t *row, const dsv4_bf16 *x, enum dsv4_kv_format f, int32_t d_head, int32_t d_rope);
typedef void dsv4k_kv_load_fn(dsv4_bf16 *x, const uint8_t *row, enum dsv4_kv_format f, int32_t d_head, int32_t d_rope);

/* y = bf16(n^-0.5 * Hadamard(x)), in place, n a power of two <= 256; f32 butterflies of stride 1, 2, 4, ... (a+b, a-b),
 * then one multiplication.  SPEC 3.6. */
typedef void dsv4k_hadamard_fn(dsv4_bf16 *x, int32_t n);

/* One index row (types.h) from n bf16 values: "fp4_sim_32" of SPEC 3.6; a group with a NaN or infinity gives scale 255 and
 * codes 0.  And back: scale 255 gives 0x7fc0 for the group. */
typedef void dsv4k_index_store_fn(uint8_t *row, const dsv4_bf16 *x, int32_t n);
typedef void dsv4k_index_load_fn(dsv4_bf16 *x, const uint8_t *row, int32_t n);

/* --------------------------------------------------------------------------------------------------- norms and rope */

/* dot(x, x) / n by rule 1 (x as operands, rule 2). */
typedef float dsv4k_mean_square_fn(const dsv4_bf16 *x, int32_t n);

/* out[c] = bf16(w[c] * (x[c] * r)), r = f32(1 / sqrt(f64(mean_square + eps))): rounded once, since an ulp of r flips
 * roundings of a whole row.  w f32.  In place allowed.  SPEC 2.5. */
typedef void dsv4k_rmsnorm_fn(dsv4_bf16 *out, const dsv4_bf16 *x, const float *w, int32_t n, float eps);

/* The q head norm, bf16 arithmetic step by step, in place: s = bf16(x * x); m = bf16(dot(s, ones) / n);
 * m = bf16(m + bf16(eps)); r = bf16(1 / sqrt(m)); x = bf16(x * r).  SPEC 3.1. */
typedef void dsv4k_headnorm_fn(dsv4_bf16 *x, int32_t n, float eps);

/* cos and sin [n_pair] of the f32 angle f32(position) * freq[i] (functions.h, evaluated in double).  SPEC 3.2. */
typedef void dsv4k_rope_table_fn(float *cos, float *sin, const float *freq, int32_t n_pair, int32_t position);

/* Rotates pairs (2i, 2i+1) in place: a*cos - b*sin, a*sin + b*cos in f32 (two products, one add), rounded to bf16;
 * inverse: sin negated.  SPEC 3.2. */
typedef void dsv4k_rope_fn(dsv4_bf16 *x, const float *cos, const float *sin, int32_t n_pair, int32_t inverse);

/* -------------------------------------------------------------------------------------- hyper-connections, SPEC 2.2 */

/*
 * The collapse of one token's streams.  dots[o] = dot(fn[o], streams) comes from a linear layer with f32 weights.
 * r = 1 / sqrt(mean_square(streams) + norm_eps); m[o] = dots[o] * r; post, comb and Sinkhorn as SPEC 2.2 (sums by
 * index ascending, plain; m * scale + base as product, then add); pre from dots in double, rounded once; x[c] = bf16(sum_j pre[j] * stream[j][c]), j
 * ascending, each step fused from 0 (fmaf(pre, stream, acc)).  post == NULL: the head's collapse (SPEC 2.4), dots has
 * hc entries and comb is ignored.
 */
struct dsv4_hc_pre_args {
    dsv4_bf16 *x;             /* [d_model] */
    float *post;              /* [hc] or NULL */
    float *comb;              /* [hc][hc] */
    const dsv4_bf16 *streams; /* [hc][d_model], contiguous */
    const float *dots;        /* [(2 + hc) * hc], or [hc] */
    const float *scale;       /* [3] or [1] */
    const float *base;        /* like dots */
    int32_t hc, d_model, sinkhorn_iters; /* hc <= 8 */
    float norm_eps, hc_eps;
    float *pre;               /* [hc] or NULL: receives pre */
};
typedef void dsv4k_hc_pre_fn(const struct dsv4_hc_pre_args *a);

/* out[k][c] = bf16(post[k] * y[c] + sum_j comb[j][k] * streams[j][c]): acc = post[k] * y[c], then j ascending
 * acc = fmaf(comb[j][k], streams[j][c], acc).  Columns [c0, c1) only.  In place (out == streams) allowed.  SPEC 2.3. */
struct dsv4_hc_post_args {
    dsv4_bf16 *out;
    const dsv4_bf16 *y, *streams;
    const float *post, *comb;
    int32_t hc, d_model, c0, c1;
};
typedef void dsv4k_hc_post_fn(const struct dsv4_hc_post_args *a);

/* ------------------------------------------------------------------------------------------------ attention, SPEC 3.8 */

/*
 * One token, n_head heads, an ordered list of keys (NULL = masked), each row both key and value.  Blocks of 64 ranks;
 * a block with no key at all is skipped.  In each block, per head:
 *   S[j] = scale * chain, chain over dimension pairs ascending: + q[2i+1]*k[2i+1], then + q[2i]*k[2i] (operands by
 *          rule 2, products exact; those of 2^128 and more are outside the contract); masked: P = 0
 *   m' = max(m, max_j S);  P[j] = exp(S[j] - m');  c = exp(m - m')   (m starts at -infinity: c = 0)
 *   l = l * c + dot(P, ones)  (64 unrounded P, rule 1 without rule 2; product, then add)
 *   acc[d] = acc[d] * c, magnitudes below 2^-95 becoming +0 (every sum is then a multiple of 2^-124, none subnormal),
 *          then by pairs of ranks: + bf16(P[2i+1]) * k[2i+1][d], then + bf16(P[2i]) * k[2i][d], masked and missing ranks
 *          adding +0 (bf16(P) and the key values are operands by rule 2)
 * At the end l = l + exp(sink - m); out[d] = bf16(acc[d] / l), any NaN as 0x7fc0.  A NaN or infinite score makes its
 * head NaN.  No key at all and a finite sink: +0.  d_head is even.
 */
struct dsv4_attention_args {
    dsv4_bf16 *out;             /* [n_head][d_head] */
    const dsv4_bf16 *q;         /* [n_head][d_head] */
    const uint8_t *const *keys; /* [n_key] KV rows, 2-byte aligned */
    const float *sink;          /* [n_head] */
    void *scratch;              /* DSV4_ATTENTION_SCRATCH(n_head, d_head) bytes, 64-byte aligned */
    int32_t n_key, n_head, d_head, d_rope;
    float scale;
    enum dsv4_kv_format format;
};
/* q and acc as f32 [d_head][heads padded to 16], one block of keys as f32, scores and P, and a margin. */
#define DSV4_ATTENTION_SCRATCH(n_head, d_head)                                                                         \
    ((size_t)4 * (((size_t)(n_head) + 15) / 16 * 16) * (2 * (size_t)(d_head) + 256) + (size_t)64 * 8 * (d_head) + 8192)
typedef void dsv4k_attention_fn(const struct dsv4_attention_args *a);

/* ----------------------------------------------------------------------------------------------- compressor, SPEC 3.5 */

/*
 * out[c] = bf16(sum_r p_r * k_r[c] / sum_r p_r), p_r = exp(s_r - max s), s_r = gate_r[c] + ape_r[c]; rows ascending,
 * acc = fmaf(p, k, acc), plain adds for the denominator, one division.  gate[r] == NULL: the row is absent.
 */
struct dsv4_pool_args {
    dsv4_bf16 *out;            /* [n] */
    const float *const *k;     /* [n_row] pointers to n floats */
    const float *const *gate;  /* likewise */
    const float *const *ape;   /* likewise */
    int32_t n_row, n;
};
typedef void dsv4k_pool_fn(const struct dsv4_pool_args *a);

/* -------------------------------------------------------------------------------------------------- indexer, SPEC 3.6 */

/*
 * scores[s] (f32 holding bf16 values) of n_key index rows for one token's n_head query rows.  Per head:
 * acc = 0; for the blocks of 32 ascending acc = fmaf(f32(sum of (2q)(2k), an exact integer), 2^e, acc) with
 * e = clamp(eq + ek - 2, -126, 127), eq and ek the unbiased exponents; a scale byte 255 makes the score NaN;
 * t = bf16(acc); t = t > 0 ? t : (t is NaN ? NaN : 0); t = bf16(w * t), w = bf16(head_w * w_scale); heads ascending,
 * plain adds from +0; then bf16, any NaN as 0x7fc0.
 */
struct dsv4_index_scores_args {
    float *scores;
    const uint8_t *q;        /* [n_head] index rows */
    const uint8_t *const *keys; /* runs of block_keys index rows: key s is row s % block_keys of keys[s / block_keys] */
    const dsv4_bf16 *head_w; /* [n_head] */
    void *scratch;           /* DSV4_INDEX_SCRATCH(n_head, d_index) bytes, 64-byte aligned */
    float w_scale;
    int32_t n_key, block_keys, n_head, d_index;
};
#define DSV4_INDEX_SCRATCH(n_head, d_index) ((size_t)64 * ((size_t)(n_head) + 64) * ((size_t)(d_index) / 32 * 9 + 8))
typedef void dsv4k_index_scores_fn(const struct dsv4_index_scores_args *a);

/* The k best of n scores (higher first, then lower id; NaN counts as -infinity, -0 as +0), their ids written ascending;
 * returns min(k, n).  scratch: 4 * n + 16384 bytes, 64-byte aligned. */
typedef int32_t dsv4k_top_k_fn(int32_t *ids, const float *scores, int32_t n, int32_t k, void *scratch);

/* ------------------------------------------------------------------------------------------------------ MoE, SPEC 4 */

/*
 * s[e] = sqrt(softplus(logits[e])) (softplus(z) = log1p(exp(z)), z above 20); ids = top_k of s + bias in descending
 * order (ties: lower id; NaN lowest), or `forced` as given; weights[j] = s[ids[j]] / sum_j s[ids[j]] * route_scale, the
 * sum in the order of ids.  scores receives s.
 */
struct dsv4_router_args {
    int32_t *ids;          /* [top_k] */
    float *weights;        /* [top_k] */
    float *scores;         /* [n_exp], work space and result, never NULL */
    const float *logits;   /* [n_exp] */
    const float *bias;     /* [n_exp] or NULL */
    const int32_t *forced; /* [top_k] or NULL */
    int32_t n_exp, top_k;
    float route_scale;
};
typedef void dsv4k_router_fn(const struct dsv4_router_args *a);

/* out = bf16(weight * (silu(min(g, limit)) * clamp(u, -limit, limit))), silu(z) = z / (1 + exp(-z)); limit may be
 * infinity; NaN passes through.  In place on g or u allowed.  SPEC 4.2. */
typedef void dsv4k_swiglu_fn(dsv4_bf16 *out, const dsv4_bf16 *g, const dsv4_bf16 *u, int32_t n, float limit, float weight);

/* out[c] = bf16(((0 + rows[0][c]) + rows[1][c]) + ...), f32 adds in the order given. */
typedef void dsv4k_expert_sum_fn(dsv4_bf16 *out, const dsv4_bf16 *const *rows, int32_t n_row, int32_t n);

/* --------------------------------------------------------------------------------------------------------- the table */

#define DSV4_KERNEL_OPS(X)                                                                                             \
    X(linear_few_fp8, dsv4k_linear_fn)                                                                                 \
    X(linear_few_fp4, dsv4k_linear_fn)                                                                                 \
    X(linear_few_bf16, dsv4k_linear_fn)                                                                                \
    X(linear_few_f32, dsv4k_linear_fn)                                                                                 \
    X(linear_many_fp8, dsv4k_linear_fn)                                                                                \
    X(linear_many_fp4, dsv4k_linear_fn)                                                                                \
    X(linear_many_bf16, dsv4k_linear_fn)                                                                               \
    X(linear_many_f32, dsv4k_linear_fn)                                                                                \
    X(act_quant, dsv4k_act_quant_fn)                                                                                   \
    X(act_flush, dsv4k_act_flush_fn)                                                                                   \
    X(kv_store, dsv4k_kv_store_fn)                                                                                     \
    X(kv_load, dsv4k_kv_load_fn)                                                                                       \
    X(hadamard, dsv4k_hadamard_fn)                                                                                     \
    X(index_store, dsv4k_index_store_fn)                                                                               \
    X(index_load, dsv4k_index_load_fn)                                                                                 \
    X(mean_square, dsv4k_mean_square_fn)                                                                               \
    X(rmsnorm, dsv4k_rmsnorm_fn)                                                                                       \
    X(headnorm, dsv4k_headnorm_fn)                                                                                     \
    X(rope_table, dsv4k_rope_table_fn)                                                                                 \
    X(rope, dsv4k_rope_fn)                                                                                             \
    X(hc_pre, dsv4k_hc_pre_fn)                                                                                         \
    X(hc_post, dsv4k_hc_post_fn)                                                                                       \
    X(attention, dsv4k_attention_fn)                                                                                   \
    X(pool, dsv4k_pool_fn)                                                                                             \
    X(index_scores, dsv4k_index_scores_fn)                                                                             \
    X(top_k, dsv4k_top_k_fn)                                                                                           \
    X(router, dsv4k_router_fn)                                                                                         \
    X(swiglu, dsv4k_swiglu_fn)                                                                                         \
    X(expert_sum, dsv4k_expert_sum_fn)

enum dsv4_op {
#define X(op, type) DSV4_OP_##op,
    DSV4_KERNEL_OPS(X)
#undef X
        DSV4_OP_COUNT
};

/* The chosen variant of every operation; filled once (cpu/dispatch.c or a device plugin), constant afterwards. */
struct dsv4_kernels {
#define X(op, type) type *op;
    DSV4_KERNEL_OPS(X)
#undef X
};

typedef void dsv4k_any_fn(void);

/* One implementation of one operation.  A family's list (kernels/cpu/<isa>/<family>.c) ends with fn == NULL. */
struct dsv4_variant {
    dsv4k_any_fn *fn;
    const char *name; /* "ref", "avx2", "avx512", "avx512bf16", ... optionally with a suffix: "avx512/rows4" */
    int16_t op;       /* enum dsv4_op */
    int16_t competes; /* 1: which of the competing variants of this operation is used is measured at load */
};

#define DSV4_VARIANT(op, function, name, competes)                                                                     \
    { (dsv4k_any_fn *)(function), name, DSV4_OP_##op, competes }

#endif
