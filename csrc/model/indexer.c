/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The lightning indexer (SPEC 3.6): which compressed entries each token of a CSA layer attends to.  ws->selected gets
 * their ids, ascending.  While everything visible fits into index_topk nothing is scored.
 */
#include "model/pass.h"

/* Entries visible to token t of the pass: those whose window has closed, its own included (SPEC 3.7). */
static int32_t visible(const struct dsv4_pass *p, int64_t t, int32_t ratio) {
    return (p->positions[t] + 1) / ratio;
}

int dsv4_scores(const struct dsv4_pass *p, int32_t layer) {
    for (int64_t t = 0; t < p->n_tok; t++)
        if (visible(p, t, p->m->layers[layer].compressor.ratio) > p->m->config.index_topk)
            return 1;
    return 0;
}

/* Scores of entries [first, end) for token t, a page of the session's blocks per call; `first` begins a block. */
static void score(dsv4_worker *w, const struct dsv4_pass *p, int32_t layer, int64_t t, int32_t first, int32_t end,
                  float *scores) {
    const struct dsv4_config *c = &p->m->config;
    const struct dsv4_row_store *keys = &p->pieces[p->piece_of[t]].kv->layers[layer].index;
    const int32_t per_page = DSV4_ROWS_PER_BLOCK * DSV4_BLOCKS_PER_PAGE;
    dsv4_lap(w, p, DSV4_PHASE_OTHER);
    dsv4_check_rows(p, keys, layer, first, end);
    for (int32_t s = first, n; s < end && !dsv4_cancelled(w); s += n) {
        const uint8_t *const *blocks = (const uint8_t *const *)keys->pages[s / per_page]->rows;
        n = per_page - s % per_page < end - s ? per_page - s % per_page : end - s;
        p->m->k.index_scores(&(struct dsv4_index_scores_args){
            .scores = scores + s, .q = p->ws->index_q_rows + (size_t)t * (size_t)c->index_n_heads * p->m->index_row,
            .keys = blocks + s % per_page / DSV4_ROWS_PER_BLOCK, .head_w = p->ws->index_w + t * c->index_n_heads,
            .scratch = dsv4_scratch(w, p, p->ws->at_kernel), .w_scale = p->m->index_w_scale, .n_key = n,
            .block_keys = DSV4_ROWS_PER_BLOCK, .n_head = c->index_n_heads, .d_index = c->index_head_dim,
        });
    }
    dsv4_lap(w, p, DSV4_PHASE_INDEXER);
}

/* NaN would only lose the selection silently: the step fails and names this layer instead. */
static void check_scores(const struct dsv4_pass *p, int32_t layer, const float *scores, int32_t n) {
    int nan = 0;
    for (int32_t i = 0; i < n; i++)
        nan |= scores[i] != scores[i];
    int seen = atomic_load(p->bad_layer);
    while (nan && layer < seen && !atomic_compare_exchange_weak(p->bad_layer, &seen, layer))
        continue;
}

static void select_token(dsv4_worker *w, const struct dsv4_pass *p, int32_t layer, int64_t t, const float *scores) {
    const struct dsv4_config *c = &p->m->config;
    int32_t *ids = p->ws->selected + t * c->index_topk;
    int32_t n = visible(p, t, p->m->layers[layer].compressor.ratio);
    if (n > c->index_topk) {
        check_scores(p, layer, scores, n);
        n = p->m->k.top_k(ids, scores, n, c->index_topk, dsv4_scratch(w, p, p->ws->at_top_k));
        dsv4_lap(w, p, DSV4_PHASE_INDEXER);
    } else {
        for (int32_t i = 0; i < n; i++)
            ids[i] = i;
    }
    p->ws->n_selected[t] = n;
}

/* Few tokens: all workers score each token's entries together, then each token is selected by one of them. */
static int select_together(dsv4_worker *w, struct dsv4_pass *p, int32_t layer) {
    int32_t ratio = p->m->layers[layer].compressor.ratio, topk = p->m->config.index_topk;
    int64_t lo, hi;
    for (int32_t t = 0; t < p->n_tok; t++) {
        int32_t n = visible(p, t, ratio);
        dsv4_share(w, n, DSV4_ROWS_PER_BLOCK, &lo, &hi);
        if (n > topk)
            score(w, p, layer, t, (int32_t)lo, (int32_t)hi, p->ws->shared_scores + (size_t)t * (size_t)p->ws->score_capacity);
    }
    DSV4_SYNC(w, p);
    dsv4_share(w, p->n_tok, 1, &lo, &hi);
    for (int64_t t = lo; t < hi; t++)
        select_token(w, p, layer, t, p->ws->shared_scores + (size_t)t * (size_t)p->ws->score_capacity);
    DSV4_SYNC(w, p);
    return 0;
}

int dsv4_select(dsv4_worker *w, struct dsv4_pass *p, int32_t layer) {
    if (p->n_tok < w->n)
        return select_together(w, p, layer);
    float *scores = dsv4_scratch(w, p, p->ws->at_scores);
    /* round robin: later tokens see more entries */
    for (int64_t t = w->id; t < p->n_tok && !dsv4_cancelled(w); t += w->n) {
        int32_t n = visible(p, t, p->m->layers[layer].compressor.ratio);
        if (n > p->m->config.index_topk)
            score(w, p, layer, t, 0, n, scores);
        if (!dsv4_cancelled(w))
            select_token(w, p, layer, t, scores);
    }
    DSV4_SYNC(w, p);
    return 0;
}
