/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The lightning indexer (SPEC 3.6): which compressed entries each token of a CSA layer attends to.  ws->selected gets
 * their ids, ascending.  While everything visible fits into index_topk nothing is scored.
 */
#include <string.h>

#include "model/edit.h"
#include "model/part.h"
#include "model/sites.h"

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

/* NaN would only lose the selection silently: the step fails and names this layer instead. */
static void check_scores(const struct dsv4_pass *p, int32_t layer, const float *scores, int32_t n) {
    int nan = 0;
    int32_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int32_t j = 0; j < 16; j++)
            nan |= scores[i + j] != scores[i + j];
    for (; i < n; i++)
        nan |= scores[i] != scores[i];
    int seen = atomic_load(p->bad_layer);
    while (nan && layer < seen && !atomic_compare_exchange_weak(p->bad_layer, &seen, layer))
        continue;
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
        check_scores(p, layer, scores + s, n);
    }
    if (dsv4_edited(p))
        dsv4_edit_scores(p, layer, t, scores, first, end);
    dsv4_lap(w, p, DSV4_PHASE_INDEXER);
}

static void selected(dsv4_worker *w, const struct dsv4_pass *p, int32_t layer, int64_t t) {
    int32_t *ids = p->ws->selected + t * p->m->config.index_topk;
    if (dsv4_edited(p))
        p->ws->n_selected[t] = dsv4_edit_entries(p, layer, t, ids, p->ws->n_selected[t]);
    if (dsv4_asked(p, layer, DSV4_SITE_INDEX_SELECTED))
        dsv4_at(w, p, &(struct dsv4_sight){.site = DSV4_SITE_INDEX_SELECTED, .layer = layer, .tok = (int32_t)t,
                                           .ids = ids, .n_ids = &p->ws->n_selected[t]});
}

static void select_token(dsv4_worker *w, const struct dsv4_pass *p, int32_t layer, int64_t t, float *scores) {
    const struct dsv4_config *c = &p->m->config;
    int32_t *ids = p->ws->selected + t * c->index_topk;
    int32_t n = visible(p, t, p->m->layers[layer].compressor.ratio);
    if (dsv4_asked(p, layer, DSV4_SITE_INDEX_SCORES))
        dsv4_at(w, p, &(struct dsv4_sight){.site = DSV4_SITE_INDEX_SCORES, .layer = layer, .tok = (int32_t)t,
                                           .scores = scores, .n = n > c->index_topk ? n : 0});
    if (n > c->index_topk) {
        n = p->m->k.top_k(ids, scores, n, c->index_topk, dsv4_scratch(w, p, p->ws->at_top_k));
        dsv4_lap(w, p, DSV4_PHASE_INDEXER);
    } else {
        for (int32_t i = 0; i < n; i++)
            ids[i] = i;
    }
    p->ws->n_selected[t] = n;
    selected(w, p, layer, t);
}

/* Whether every worker's part of n entries has room for what keep_best leaves there: parts differ by up to a block, and
 * the last block may hold a single entry.  Scores that are asked for must all be left. */
static int parts_hold(const dsv4_worker *w, const struct dsv4_pass *p, int32_t layer, int32_t n) {
    return n / w->n >= 2 * (p->m->config.index_topk + DSV4_ROWS_PER_BLOCK) &&
           !dsv4_asked(p, layer, DSV4_SITE_INDEX_SCORES);
}

/* A worker's part of a token's scores: the best index_topk are moved to its front, their ids behind them.  Nothing else
 * can be among the best of all. */
static void keep_best(dsv4_worker *w, const struct dsv4_pass *p, float *scores, int32_t first, int32_t end) {
    int32_t k = p->m->config.index_topk, *ids = dsv4_scratch(w, p, p->ws->at_scores);
    p->m->k.top_k(ids, scores + first, end - first, k, dsv4_scratch(w, p, p->ws->at_top_k));
    for (int32_t i = 0; i < k; i++) {
        scores[first + i] = scores[first + ids[i]]; /* ids ascend */
        ids[i] += first;
    }
    memcpy(scores + first + k, ids, (size_t)k * sizeof *ids);
    dsv4_lap(w, p, DSV4_PHASE_INDEXER);
}

/* The best of what keep_best left; equal scores keep the order of their ids. */
static void select_kept(dsv4_worker *w, const struct dsv4_pass *p, int32_t layer, int32_t n, int64_t t,
                        const float *scores) {
    int32_t k = p->m->config.index_topk, *ids = p->ws->selected + t * k;
    float *kept = dsv4_scratch(w, p, p->ws->at_scores);
    int32_t *kept_ids = (int32_t *)(void *)(kept + (size_t)w->n * (size_t)k);
    dsv4_worker other = *w;
    for (other.id = 0; other.id < w->n; other.id++) {
        int64_t lo, hi;
        size_t at = (size_t)other.id * (size_t)k;
        dsv4_share(&other, n, DSV4_ROWS_PER_BLOCK, &lo, &hi);
        memcpy(kept + at, scores + lo, (size_t)k * sizeof *kept);
        memcpy(kept_ids + at, scores + lo + k, (size_t)k * sizeof *kept_ids);
    }
    p->ws->n_selected[t] = p->m->k.top_k(ids, kept, w->n * k, k, dsv4_scratch(w, p, p->ws->at_top_k));
    for (int32_t i = 0; i < k; i++)
        ids[i] = kept_ids[ids[i]];
    selected(w, p, layer, t);
    dsv4_lap(w, p, DSV4_PHASE_INDEXER);
}

/* Few tokens: all workers score each token's entries together, then each token is selected by one of them, among the
 * best of each worker where there are many. */
static int select_together(dsv4_worker *w, struct dsv4_pass *p, int32_t layer) {
    int32_t ratio = p->m->layers[layer].compressor.ratio, topk = p->m->config.index_topk;
    int64_t lo, hi;
    for (int32_t t = 0; t < p->n_tok; t++) {
        float *scores = p->ws->shared_scores + (size_t)t * (size_t)p->ws->score_capacity;
        int32_t n = visible(p, t, ratio);
        dsv4_share(w, n, DSV4_ROWS_PER_BLOCK, &lo, &hi);
        if (n > topk)
            score(w, p, layer, t, (int32_t)lo, (int32_t)hi, scores);
        if (parts_hold(w, p, layer, n) && !dsv4_cancelled(w))
            keep_best(w, p, scores, (int32_t)lo, (int32_t)hi);
    }
    DSV4_SYNC(w, p);
    dsv4_share(w, p->n_tok, 1, &lo, &hi);
    for (int64_t t = lo; t < hi; t++) {
        float *scores = p->ws->shared_scores + (size_t)t * (size_t)p->ws->score_capacity;
        int32_t n = visible(p, t, ratio);
        if (parts_hold(w, p, layer, n))
            select_kept(w, p, layer, n, t, scores);
        else
            select_token(w, p, layer, t, scores);
    }
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

int32_t dsv4_score_all(dsv4_worker *w, const struct dsv4_pass *p, int32_t layer, int64_t t, float *scores) {
    int32_t n = visible(p, t, p->m->layers[layer].compressor.ratio);
    score(w, p, layer, t, 0, n, scores);
    return n;
}
