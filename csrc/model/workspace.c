/* SPDX-License-Identifier: Apache-2.0 */
/* The buffers of a pass: allocated once per model for its chunk of tokens; a step allocates nothing unless the longest
 * context has outgrown the workers' scratch. */
#include <stdlib.h>

#include "core/arena.h"
#include "model/edit.h"

#define MAX(a, b) ((a) > (b) ? (a) : (b))

static size_t up64(size_t n) {
    return (n + 63) & ~(size_t)63;
}

/* Scratch of the largest kernel call any layer makes. */
static size_t kernel_scratch(const struct dsv4_config *c) {
    int64_t part = (int64_t)c->num_attention_heads * c->head_dim / c->o_groups;
    int64_t cols = MAX((int64_t)c->hc_mult * c->hidden_size, part);
    cols = MAX(cols, (int64_t)c->o_groups * c->o_lora_rank);
    cols = MAX(cols, MAX(c->q_lora_rank, c->moe_intermediate_size));
    size_t linear = DSV4_LINEAR_SCRATCH(cols);
    size_t attention = DSV4_ATTENTION_SCRATCH(c->num_attention_heads, (size_t)c->head_dim);
    return MAX(MAX(linear, attention), DSV4_INDEX_SCRATCH(c->index_n_heads, c->index_head_dim));
}

static int32_t longest_window(const dsv4_model *m) {
    int32_t rows = 0;
    for (int32_t i = 0; i < m->config.num_hidden_layers; i++)
        rows = MAX(rows, m->state[i].rows);
    return rows;
}

static int32_t smallest_ratio(const dsv4_model *m) {
    int32_t ratio = INT32_MAX;
    for (int32_t i = 0; i < m->config.num_hidden_layers; i++)
        if (m->config.compress_ratios[i] && m->config.compress_ratios[i] < ratio)
            ratio = m->config.compress_ratios[i];
    return ratio;
}

int dsv4_workspace_fits(const struct dsv4_workspace *ws, const dsv4_model *m, int32_t position) {
    return ws->grown && position / smallest_ratio(m) + 1 <= ws->score_capacity;
}

dsv4_status dsv4_workspace_reserve(struct dsv4_workspace *ws, const dsv4_model *m, int32_t position, dsv4_error *err) {
    const struct dsv4_config *c = &m->config;
    int32_t entries = position / smallest_ratio(m) + 1, team = dsv4_team_size(m->team);
    if (dsv4_workspace_fits(ws, m, position))
        return DSV4_OK;
    entries = MAX(entries, MAX(1024, 2 * ws->score_capacity));
    size_t small = up64(3 * sizeof(void *) * (size_t)longest_window(m) + 4 * (size_t)c->qk_rope_head_dim +
                        sizeof(void *) * (size_t)(c->num_experts_per_tok + 1));
    size_t at_kernel = small + up64(dsv4_edit_scratch(c));
    size_t at_keys = at_kernel + up64(kernel_scratch(c));
    size_t at_scores = at_keys + up64(sizeof(void *) * ((size_t)c->sliding_window + (size_t)entries));
    size_t at_top_k = at_scores + up64(4 * (size_t)entries);
    size_t bytes = at_top_k + up64(4 * (size_t)entries + 16384);
    size_t shared = up64(4 * (size_t)entries * (size_t)team);
    uint8_t *grown = aligned_alloc(64, bytes * (size_t)team + shared);
    if (!grown)
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for %zu bytes of scratch at position %d",
                         bytes * (size_t)team + shared, position);
    free(ws->grown);
    ws->grown = grown;
    ws->score_capacity = entries;
    ws->at_small = 0;
    ws->at_edit = small;
    ws->at_kernel = at_kernel;
    ws->at_keys = at_keys;
    ws->at_scores = at_scores;
    ws->at_top_k = at_top_k;
    ws->scratch_bytes = bytes;
    for (int i = 0; i < team; i++)
        ws->scratch[i] = grown + (size_t)i * bytes;
    ws->shared_scores = (float *)(void *)(grown + (size_t)team * bytes);
    return DSV4_OK;
}

#define TAKE_FROM(arena, object, field, count)                                                                         \
    if (status == DSV4_OK)                                                                                             \
    status = dsv4_arena_take(arena, &(object)->field, count, sizeof *(object)->field, err)

static dsv4_status take_prepared(struct dsv4_prepared *b, struct dsv4_arena *arena, const dsv4_model *m, size_t n,
                                 dsv4_error *err) {
    const struct dsv4_config *c = &m->config;
    size_t d = (size_t)c->hidden_size, hc = (size_t)c->hc_mult, ql = (size_t)c->q_lora_rank;
    size_t top_k = (size_t)c->num_experts_per_tok, rows = n * (top_k + 1), n_exp = (size_t)c->n_routed_experts;
    dsv4_status status = DSV4_OK;
#define TAKE(field, count) TAKE_FROM(arena, b, field, count)
    TAKE(post, n * hc);
    TAKE(comb, n * hc * hc);
    TAKE(u, n * d);
    TAKE(u_quant, n * d);
    TAKE(u_plain, n * d);
    TAKE(qr, n * ql);
    TAKE(qr_quant, n * ql);
    TAKE(kv, n * (size_t)c->head_dim);
    TAKE(kv_rows, n * m->kv_row);
    TAKE(z_quant, n * (size_t)c->o_groups * (size_t)c->o_lora_rank);
    TAKE(router_scores, n * n_exp);
    TAKE(expert_ids, n * top_k);
    TAKE(expert_weights, n * top_k);
    TAKE(group_first, n_exp + 2);
    TAKE(row_tok, rows);
    TAKE(row_weight, rows);
    TAKE(tok_rows, rows);
#undef TAKE
    return status;
}

#define TAKE(field, count) TAKE_FROM(ws->arena, ws, field, count)

dsv4_status dsv4_workspace_create(struct dsv4_workspace **out, const dsv4_model *m, dsv4_error *err) {
    const struct dsv4_config *c = &m->config;
    size_t n = (size_t)m->options.chunk_tok, d = (size_t)c->hidden_size, hc = (size_t)c->hc_mult;
    size_t heads = (size_t)c->num_attention_heads * (size_t)c->head_dim, pairs = (size_t)c->qk_rope_head_dim / 2;
    size_t iq = (size_t)c->index_n_heads, low = (size_t)c->o_groups * (size_t)c->o_lora_rank;
    size_t top_k = (size_t)c->num_experts_per_tok, rows = n * (top_k + 1), width = (size_t)c->moe_intermediate_size;
    size_t n_exp = (size_t)c->n_routed_experts, vocab = (size_t)c->vocab_size, ql = (size_t)c->q_lora_rank;
    size_t team = (size_t)dsv4_team_size(m->team);
    struct dsv4_workspace *ws = calloc(1, sizeof *ws);
    if (!ws)
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for the workspace");
    dsv4_status status = dsv4_arena_create(&ws->arena, err);
    TAKE(own, team);
    if (status == DSV4_OK)
        status = take_prepared(&ws->shared, ws->arena, m, n, err);
    for (size_t i = 0; i < team && status == DSV4_OK; i++)
        status = take_prepared(&ws->own[i], ws->arena, m, 1, err);
    TAKE(streams, n * hc * d);
    TAKE(dots, n * (2 + hc) * hc);
    TAKE(y, n * d);
    TAKE(cos_main, n * pairs);
    TAKE(sin_main, n * pairs);
    TAKE(cos_comp, n * pairs);
    TAKE(sin_comp, n * pairs);
    TAKE(qa, n * ql);
    TAKE(q, n * heads);
    TAKE(o, n * heads);
    TAKE(kv_raw, n * (size_t)c->head_dim);
    TAKE(comp_k, n * 2 * (size_t)c->head_dim);
    TAKE(comp_gate, n * 2 * (size_t)c->head_dim);
    TAKE(icomp_k, n * 2 * (size_t)c->index_head_dim);
    TAKE(icomp_gate, n * 2 * (size_t)c->index_head_dim);
    TAKE(index_q, n * iq * (size_t)c->index_head_dim);
    TAKE(index_q_rows, n * iq * m->index_row);
    TAKE(index_w, n * iq);
    TAKE(selected, n * (size_t)c->index_topk);
    TAKE(n_selected, n);
    TAKE(z, n * low);
    TAKE(router_logits, n * n_exp);
    TAKE(gate_out, rows * width);
    TAKE(up_out, rows * width);
    TAKE(expert_out, rows * d);
    TAKE(hidden, DSV4_LOGIT_ROWS * d);
    TAKE(head_dots, DSV4_LOGIT_ROWS * hc);
    TAKE(logits, DSV4_LOGIT_ROWS * vocab);
    TAKE(scratch, team);
    TAKE(taken_up, team);
    TAKE(taken_down, team);
    if (status == DSV4_OK)
        status = dsv4_workspace_reserve(ws, m, 4096, err);
    if (status != DSV4_OK) {
        dsv4_workspace_destroy(ws);
        return status;
    }
    *out = ws;
    return DSV4_OK;
}

void dsv4_workspace_destroy(struct dsv4_workspace *ws) {
    if (!ws)
        return;
    free(ws->grown);
    dsv4_arena_destroy(ws->arena);
    free(ws);
}
