/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Binds the tensors of the main model (SPEC 6.2) to the fields of dsv4_layer by their official names, and checks dtype,
 * shape and extent of each: the reader has done so before, with friendlier lists, but nothing here trusts it.
 * Large weights are used where they lie; vectors become aligned f32 in the arena.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/arena.h"
#include "model/model.h"

static const char *const DTYPE_NAMES[] = {"I64", "I32", "F32", "F16", "BF16", "F8_E4M3", "F8_E8M0", "FP4"};

static const char *dtype_name(int32_t dtype) {
    return dtype >= 0 && dtype <= DSV4_FP4 ? DTYPE_NAMES[dtype] : "unknown";
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const struct dsv4_tensor_desc *)a)->name, ((const struct dsv4_tensor_desc *)b)->name);
}

const struct dsv4_tensor_desc *dsv4_find_tensor(const dsv4_model *m, const char *name) {
    struct dsv4_tensor_desc key = {.name = name};
    return bsearch(&key, m->tensors, (size_t)m->n_tensor, sizeof key, by_name);
}

uint64_t dsv4_weight_bytes(const struct dsv4_weight *w) {
    static const uint64_t half_bytes[DSV4_W_FORMATS] = {2, 1, 4, 8};
    return (uint64_t)w->rows * (uint64_t)w->cols * half_bytes[w->format] / 2;
}

uint64_t dsv4_scale_bytes(const struct dsv4_weight *w) {
    if (!w->scale)
        return 0;
    uint64_t n = w->format == DSV4_W_FP4 ? (uint64_t)w->rows * ((uint64_t)w->cols / DSV4_FP4_BLOCK)
                                         : ((uint64_t)w->rows + 127) / 128 * (((uint64_t)w->cols + 127) / 128);
    return w->scale_type == DSV4_SCALE_E8M0 ? n : w->scale_type == DSV4_SCALE_BF16 ? 2 * n : 4 * n;
}

struct binder {
    dsv4_model *m;
    dsv4_error *err;
    char prefix[64]; /* "layers.7." or "" */
};

/* Finds prefix + name with the exact shape; rank 1 has cols == 0. */
static dsv4_status find(struct binder *b, const struct dsv4_tensor_desc **out, const char *name, int64_t rows,
                        int64_t cols) {
    char full[192];
    snprintf(full, sizeof full, "%s%s", b->prefix, name);
    const struct dsv4_tensor_desc *t = dsv4_find_tensor(b->m, full);
    if (!t)
        return dsv4_fail(b->err, DSV4_E_FORMAT, "tensor %s is missing", full);
    int rank = cols ? 2 : 1;
    if (t->rank != rank || t->shape[0] != rows || (cols && t->shape[1] != cols))
        return dsv4_fail(b->err, DSV4_E_FORMAT, "tensor %s: got shape [%" PRId64 "%s%.0" PRId64 "] of rank %d, wanted "
                         "[%" PRId64 ", %" PRId64 "] (0: none)", full, t->rank > 0 ? t->shape[0] : 0,
                         t->rank > 1 ? ", " : "", t->rank > 1 ? t->shape[1] : 0, t->rank, rows, cols);
    *out = t;
    return DSV4_OK;
}

static dsv4_status bad_dtype(struct binder *b, const struct dsv4_tensor_desc *t, const char *wanted) {
    return dsv4_fail(b->err, DSV4_E_FORMAT, "tensor %s: got dtype %s, wanted %s", t->name, dtype_name(t->dtype), wanted);
}

static float half_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exp = h >> 10 & 31u, mant = h & 1023u;
    if (exp == 31)
        return dsv4_f32_from_bits(sign | 0x7f800000u | mant << 13);
    if (exp == 0) {
        float v = (float)mant * 5.9604644775390625e-8f; /* 2^-24 */
        return sign ? -v : v;
    }
    return dsv4_f32_from_bits(sign | (exp + 112u) << 23 | mant << 13);
}

/* Any float tensor -> `count` f32 in the arena. */
static dsv4_status to_f32(struct binder *b, const float **out, const struct dsv4_tensor_desc *t, size_t count) {
    const uint8_t *data = dsv4_tensor_data(b->m, t);
    float *v;
    if (t->dtype != DSV4_F32 && t->dtype != DSV4_BF16 && t->dtype != DSV4_F16)
        return bad_dtype(b, t, "F32, BF16 or F16");
    DSV4_TRY(dsv4_arena_take(b->m->arena, &v, count, sizeof *v, b->err));
    for (size_t i = 0; i < count; i++) {
        if (t->dtype == DSV4_F32) {
            memcpy(&v[i], data + 4 * i, 4);
        } else {
            uint16_t h;
            memcpy(&h, data + 2 * i, 2);
            v[i] = t->dtype == DSV4_BF16 ? dsv4_bf16_to_f32(h) : half_to_f32(h);
        }
        if ((dsv4_f32_bits(v[i]) & 0x7f800000u) == 0x7f800000u)
            return dsv4_fail(b->err, DSV4_E_FORMAT, "tensor %s: element %zu is NaN or infinite, wanted a finite number",
                             t->name, i);
    }
    *out = v;
    return DSV4_OK;
}

static dsv4_status vector(struct binder *b, const float **out, const char *name, int64_t n) {
    const struct dsv4_tensor_desc *t;
    DSV4_TRY(find(b, &t, name, n, 0));
    return to_f32(b, out, t, (size_t)n);
}

static dsv4_status table(struct binder *b, const float **out, const char *name, int64_t rows, int64_t cols) {
    const struct dsv4_tensor_desc *t;
    DSV4_TRY(find(b, &t, name, rows, cols));
    return to_f32(b, out, t, (size_t)(rows * cols));
}

/* A matrix without scale: BF16 or F32 where it lies, F16 widened to F32. */
static dsv4_status plain(struct binder *b, struct dsv4_weight *w, const char *name, int64_t rows, int64_t cols) {
    const struct dsv4_tensor_desc *t;
    DSV4_TRY(find(b, &t, name, rows, cols));
    *w = (struct dsv4_weight){.data = dsv4_tensor_data(b->m, t), .rows = (int32_t)rows, .cols = (int32_t)cols};
    if (t->dtype == DSV4_F16) {
        const float *wide;
        DSV4_TRY(to_f32(b, &wide, t, (size_t)(rows * cols)));
        w->data = wide;
    } else if (t->dtype != DSV4_BF16 && t->dtype != DSV4_F32) {
        return bad_dtype(b, t, "BF16, F32 or F16");
    }
    w->format = t->dtype == DSV4_BF16 ? DSV4_W_BF16 : DSV4_W_F32;
    return DSV4_OK;
}

/* The scale of an FP8 or FP4 weight; `rounded` is the rule of wo_a for scales that are not powers of two. */
static dsv4_status scale(struct binder *b, struct dsv4_weight *w, const char *name, int rounded) {
    const struct dsv4_tensor_desc *t;
    int fp4 = w->format == DSV4_W_FP4;
    int64_t rows = fp4 ? w->rows : (w->rows + 127) / 128, cols = fp4 ? w->cols / 32 : (w->cols + 127) / 128;
    DSV4_TRY(find(b, &t, name, rows, cols));
    w->scale = dsv4_tensor_data(b->m, t);
    if (t->dtype == DSV4_F8_E8M0) {
        w->scale_type = DSV4_SCALE_E8M0;
        w->scale_rule = DSV4_SCALE_FOLD;
        return DSV4_OK;
    }
    if (fp4 || (t->dtype != DSV4_F32 && t->dtype != DSV4_BF16))
        return bad_dtype(b, t, fp4 ? "F8_E8M0" : "F8_E8M0, F32 or BF16");
    w->scale_type = t->dtype == DSV4_F32 ? DSV4_SCALE_F32 : DSV4_SCALE_BF16;
    w->scale_rule = rounded ? DSV4_SCALE_ROUND : DSV4_SCALE_BLOCK;
    return DSV4_OK;
}

/* A linear layer: name.weight and, for FP8 and FP4, name.scale. */
static dsv4_status linear(struct binder *b, struct dsv4_weight *w, const char *name, int64_t rows, int64_t cols,
                          int rounded) {
    char full[96];
    const struct dsv4_tensor_desc *t;
    snprintf(full, sizeof full, "%s.weight", name);
    DSV4_TRY(find(b, &t, full, rows, cols));
    if (t->dtype != DSV4_F8_E4M3 && t->dtype != DSV4_FP4)
        return plain(b, w, full, rows, cols);
    *w = (struct dsv4_weight){.data = dsv4_tensor_data(b->m, t), .rows = (int32_t)rows, .cols = (int32_t)cols};
    w->format = t->dtype == DSV4_FP4 ? DSV4_W_FP4 : DSV4_W_FP8;
    if (w->format == DSV4_W_FP4 && cols % DSV4_FP4_BLOCK)
        return dsv4_fail(b->err, DSV4_E_FORMAT, "tensor %s%s: got %" PRId64 " columns, wanted a multiple of 32 for FP4",
                         b->prefix, full, cols);
    snprintf(full, sizeof full, "%s.scale", name);
    return scale(b, w, full, rounded);
}

static dsv4_status hyper(struct binder *b, struct dsv4_hyper *h, const char *name, int64_t mixes, int64_t scales) {
    const struct dsv4_config *c = &b->m->config;
    char full[64];
    snprintf(full, sizeof full, "%s_fn", name);
    DSV4_TRY(plain(b, &h->fn, full, mixes, (int64_t)c->hc_mult * c->hidden_size));
    snprintf(full, sizeof full, "%s_base", name);
    DSV4_TRY(vector(b, &h->base, full, mixes));
    snprintf(full, sizeof full, "%s_scale", name);
    return vector(b, &h->scale, full, scales);
}

static dsv4_status compressor(struct binder *b, struct dsv4_compressor *p, const char *name, int32_t ratio, int32_t dim) {
    char full[64];
    int64_t width = (int64_t)dim * (ratio == 4 ? 2 : 1);
    *p = (struct dsv4_compressor){.ratio = ratio, .overlap = ratio == 4, .dim = dim};
    snprintf(full, sizeof full, "%s.wkv.weight", name);
    DSV4_TRY(plain(b, &p->wkv, full, width, b->m->config.hidden_size));
    snprintf(full, sizeof full, "%s.wgate.weight", name);
    DSV4_TRY(plain(b, &p->wgate, full, width, b->m->config.hidden_size));
    snprintf(full, sizeof full, "%s.ape", name);
    DSV4_TRY(table(b, &p->ape, full, ratio, width));
    snprintf(full, sizeof full, "%s.norm.weight", name);
    return vector(b, &p->norm, full, dim);
}

static dsv4_status attention(struct binder *b, struct dsv4_layer *l, int32_t ratio) {
    const struct dsv4_config *c = &b->m->config;
    int64_t heads = (int64_t)c->num_attention_heads * c->head_dim, low = (int64_t)c->o_groups * c->o_lora_rank;
    DSV4_TRY(vector(b, &l->sink, "attn.attn_sink", c->num_attention_heads));
    DSV4_TRY(vector(b, &l->q_norm, "attn.q_norm.weight", c->q_lora_rank));
    DSV4_TRY(vector(b, &l->kv_norm, "attn.kv_norm.weight", c->head_dim));
    DSV4_TRY(linear(b, &l->wq_a, "attn.wq_a", c->q_lora_rank, c->hidden_size, 0));
    DSV4_TRY(linear(b, &l->wq_b, "attn.wq_b", heads, c->q_lora_rank, 0));
    DSV4_TRY(linear(b, &l->wkv, "attn.wkv", c->head_dim, c->hidden_size, 0));
    DSV4_TRY(linear(b, &l->wo_a, "attn.wo_a", low, heads / c->o_groups, 1));
    DSV4_TRY(linear(b, &l->wo_b, "attn.wo_b", c->hidden_size, low, 0));
    if (ratio)
        DSV4_TRY(compressor(b, &l->compressor, "attn.compressor", ratio, c->head_dim));
    if (ratio != 4)
        return DSV4_OK;
    DSV4_TRY(compressor(b, &l->index_compressor, "attn.indexer.compressor", ratio, c->index_head_dim));
    DSV4_TRY(linear(b, &l->index_wq_b, "attn.indexer.wq_b", (int64_t)c->index_n_heads * c->index_head_dim,
                    c->q_lora_rank, 0));
    return plain(b, &l->weights_proj, "attn.indexer.weights_proj.weight", c->index_n_heads, c->hidden_size);
}

static dsv4_status expert(struct binder *b, struct dsv4_expert *e, const char *name) {
    const struct dsv4_config *c = &b->m->config;
    char full[64];
    snprintf(full, sizeof full, "%s.w1", name);
    DSV4_TRY(linear(b, &e->w1, full, c->moe_intermediate_size, c->hidden_size, 0));
    snprintf(full, sizeof full, "%s.w3", name);
    DSV4_TRY(linear(b, &e->w3, full, c->moe_intermediate_size, c->hidden_size, 0));
    snprintf(full, sizeof full, "%s.w2", name);
    return linear(b, &e->w2, full, c->hidden_size, c->moe_intermediate_size, 0);
}

/* The hash table of expert ids; every id is checked once here, so a step can trust it. */
static dsv4_status hash_table(struct binder *b, struct dsv4_layer *l) {
    const struct dsv4_config *c = &b->m->config;
    const struct dsv4_tensor_desc *t;
    DSV4_TRY(find(b, &t, "ffn.gate.tid2eid", c->vocab_size, c->num_experts_per_tok));
    if (t->dtype != DSV4_I64 && t->dtype != DSV4_I32)
        return bad_dtype(b, t, "I64 or I32");
    l->tid2eid = dsv4_tensor_data(b->m, t);
    l->tid2eid_bytes = t->dtype == DSV4_I64 ? 8 : 4;
    for (int64_t i = 0; i < (int64_t)c->vocab_size * c->num_experts_per_tok; i++) {
        int64_t wide = 0;
        int32_t narrow = 0;
        if (l->tid2eid_bytes == 8)
            memcpy(&wide, l->tid2eid + 8 * i, 8);
        else
            memcpy(&narrow, l->tid2eid + 4 * i, 4);
        int64_t id = l->tid2eid_bytes == 8 ? wide : narrow;
        if (id < 0 || id >= c->n_routed_experts)
            return dsv4_fail(b->err, DSV4_E_FORMAT, "tensor %s: got expert %" PRId64 " at row %" PRId64 ", wanted an id "
                             "in [0, %d)", t->name, id, i / c->num_experts_per_tok, c->n_routed_experts);
    }
    return DSV4_OK;
}

static dsv4_status ffn(struct binder *b, struct dsv4_layer *l, int hashed) {
    const struct dsv4_config *c = &b->m->config;
    DSV4_TRY(plain(b, &l->gate, "ffn.gate.weight", c->n_routed_experts, c->hidden_size));
    if (hashed)
        DSV4_TRY(hash_table(b, l));
    else
        DSV4_TRY(vector(b, &l->gate_bias, "ffn.gate.bias", c->n_routed_experts));
    DSV4_TRY(dsv4_arena_take(b->m->arena, &l->experts, (size_t)c->n_routed_experts, sizeof *l->experts, b->err));
    for (int32_t e = 0; e < c->n_routed_experts; e++) {
        char name[32];
        snprintf(name, sizeof name, "ffn.experts.%d", e);
        DSV4_TRY(expert(b, &l->experts[e], name));
    }
    return expert(b, &l->shared, "ffn.shared_experts");
}

static dsv4_status layer(struct binder *b, struct dsv4_layer *l, int32_t index) {
    const struct dsv4_config *c = &b->m->config;
    int32_t ratio = c->compress_ratios[index], mixes = (2 + c->hc_mult) * c->hc_mult;
    snprintf(b->prefix, sizeof b->prefix, "layers.%d.", index);
    l->kind = ratio == 0 ? DSV4_SWA : ratio == 4 ? DSV4_CSA : DSV4_HCA;
    DSV4_TRY(hyper(b, &l->hc_attn, "hc_attn", mixes, 3));
    DSV4_TRY(hyper(b, &l->hc_ffn, "hc_ffn", mixes, 3));
    DSV4_TRY(vector(b, &l->attn_norm, "attn_norm.weight", c->hidden_size));
    DSV4_TRY(vector(b, &l->ffn_norm, "ffn_norm.weight", c->hidden_size));
    DSV4_TRY(attention(b, l, ratio));
    return ffn(b, l, index < c->num_hash_layers);
}

/* Every tensor's extent against its shard, its size against shape and dtype. */
static dsv4_status check_extents(dsv4_model *m, dsv4_error *err) {
    static const int HALF_BYTES[] = {16, 8, 8, 4, 4, 2, 2, 1};
    for (int32_t i = 0; i < m->n_tensor; i++) {
        const struct dsv4_tensor_desc *t = &m->tensors[i];
        uint64_t halves = 1, end;
        if (t->shard < 0 || t->shard >= m->n_shard || t->dtype < 0 || t->dtype > DSV4_FP4 || t->rank < 0 || t->rank > 4)
            return dsv4_fail(err, DSV4_E_FORMAT, "tensor %s: shard %d, dtype %d or rank %d is out of range", t->name,
                             t->shard, t->dtype, t->rank);
        for (int32_t r = 0; r < t->rank; r++)
            if (t->shape[r] < 0 || __builtin_mul_overflow(halves, (uint64_t)t->shape[r], &halves))
                return dsv4_fail(err, DSV4_E_FORMAT, "tensor %s: the product of its shape overflows", t->name);
        if (__builtin_mul_overflow(halves, (uint64_t)HALF_BYTES[t->dtype], &halves) || halves % 2 ||
            halves / 2 != t->nbytes || __builtin_add_overflow(t->offset, t->nbytes, &end) ||
            end > m->shards[t->shard].size)
            return dsv4_fail(err, DSV4_E_FORMAT, "tensor %s: %" PRIu64 " bytes at %" PRIu64 " do not match its shape or "
                             "lie outside its file of %" PRIu64 " bytes", t->name, t->nbytes, t->offset,
                             m->shards[t->shard].size);
    }
    return DSV4_OK;
}

dsv4_status dsv4_bind_weights(dsv4_model *m, dsv4_error *err) {
    const struct dsv4_config *c = &m->config;
    struct binder b = {m, err, ""};
    qsort(m->tensors, (size_t)m->n_tensor, sizeof *m->tensors, by_name);
    DSV4_TRY(check_extents(m, err));
    DSV4_TRY(plain(&b, &m->embed, "embed.weight", c->vocab_size, c->hidden_size));
    DSV4_TRY(plain(&b, &m->head, "head.weight", c->vocab_size, c->hidden_size));
    DSV4_TRY(vector(&b, &m->norm, "norm.weight", c->hidden_size));
    DSV4_TRY(hyper(&b, &m->hc_head, "hc_head", c->hc_mult, 1));
    DSV4_TRY(dsv4_arena_take(m->arena, &m->layers, (size_t)c->num_hidden_layers, sizeof *m->layers, err));
    for (int32_t i = 0; i < c->num_hidden_layers; i++)
        DSV4_TRY(layer(&b, &m->layers[i], i));
    return DSV4_OK;
}
