/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The compressors (SPEC 3.5) over any cut of the tokens into passes: a window that closes inside this pass pools raw
 * rows that lie partly in the session's state, partly in the workspace.
 */
#include "model/pass.h"

/* One compressor of one layer in one pass. */
struct view {
    const struct dsv4_compressor *c;
    const float *new_k, *new_gate;     /* raw rows of this pass, row t at t * width */
    float *old_k, *old_gate;           /* the session's ring */
    int32_t slots, width;
};

static struct view main_view(const struct dsv4_pass *p, const struct dsv4_piece *piece, int32_t layer) {
    const struct dsv4_compressor *c = &p->m->layers[layer].compressor;
    struct dsv4_kv_layer *s = &piece->kv->layers[layer];
    return (struct view){c, p->ws->comp_k, p->ws->comp_gate, s->k, s->gate, p->m->state[layer].rows,
                         c->dim * (c->overlap ? 2 : 1)};
}

static struct view index_view(const struct dsv4_pass *p, const struct dsv4_piece *piece, int32_t layer) {
    const struct dsv4_compressor *c = &p->m->layers[layer].index_compressor;
    struct dsv4_kv_layer *s = &piece->kv->layers[layer];
    return (struct view){c, p->ws->icomp_k, p->ws->icomp_gate, s->index_k, s->index_gate, p->m->state[layer].rows,
                         c->dim * 2};
}

/* The pooled, normed and rotated entry of window `entry`, bf16 [dim]; scratch as laid out in workspace.c. */
static void pool_entry(const struct dsv4_pass *p, const struct dsv4_piece *piece, const struct view *v, int32_t entry,
                       dsv4_bf16 *out, void *small) {
    const struct dsv4_config *cfg = &p->m->config;
    const struct dsv4_compressor *c = v->c;
    int32_t rows = c->ratio * (c->overlap ? 2 : 1), first = entry * c->ratio - (c->overlap ? c->ratio : 0);
    int32_t n_pair = cfg->qk_rope_head_dim / 2;
    const float **k = small, **gate = k + rows, **ape = gate + rows;
    float *cos = (float *)(void *)(ape + rows), *sin = cos + n_pair;
    for (int32_t i = 0; i < rows; i++) {
        int32_t t = first + i;
        k[i] = gate[i] = ape[i] = NULL;
        if (t < 0)
            continue;
        ptrdiff_t half = c->overlap && i >= c->ratio ? c->dim : 0;
        ptrdiff_t at = t >= piece->position ? (ptrdiff_t)(piece->first_tok + t - piece->position) * v->width
                                            : (ptrdiff_t)(t % v->slots) * v->width;
        k[i] = (t >= piece->position ? v->new_k : v->old_k) + at + half;
        gate[i] = (t >= piece->position ? v->new_gate : v->old_gate) + at + half;
        ape[i] = c->ape + (ptrdiff_t)(t % c->ratio) * v->width + half;
    }
    p->m->k.pool(&(struct dsv4_pool_args){out, k, gate, ape, rows, c->dim});
    p->m->k.rmsnorm(out, out, c->norm, c->dim, cfg->rms_norm_eps);
    p->m->k.rope_table(cos, sin, p->m->freq_compressed, n_pair, entry * c->ratio);
    p->m->k.rope(out + c->dim - 2 * n_pair, cos, sin, n_pair, 0);
}

void dsv4_close_windows(dsv4_worker *w, struct dsv4_pass *p, int32_t layer) {
    const struct dsv4_config *c = &p->m->config;
    const struct dsv4_kernels *k = &p->m->k;
    int csa = p->m->layers[layer].kind == DSV4_CSA;
    int32_t ratio = p->m->layers[layer].compressor.ratio;
    dsv4_bf16 *entry = dsv4_scratch(w, p, p->ws->at_kernel);
    void *small = dsv4_scratch(w, p, p->ws->at_small);
    int64_t item = 0;
    for (int32_t i = 0; i < p->n_piece; i++) {
        const struct dsv4_piece *piece = &p->pieces[i];
        int32_t end = (piece->position + piece->n) / ratio;
        for (int32_t e = piece->position / ratio; e < end; e++, item++) {
            if (item % w->n != w->id || dsv4_cancelled(w))
                continue;
            struct dsv4_kv_layer *s = &piece->kv->layers[layer];
            struct view v = main_view(p, piece, layer);
            pool_entry(p, piece, &v, e, entry, small);
            k->kv_store(dsv4_row(&s->compressed, e), entry, p->m->kv_format, c->head_dim, c->qk_rope_head_dim);
            if (!csa)
                continue;
            v = index_view(p, piece, layer);
            pool_entry(p, piece, &v, e, entry, small);
            k->hadamard(entry, c->index_head_dim);
            k->index_store(dsv4_row(&s->index, e), entry, c->index_head_dim);
        }
    }
}

/* The raw rows of a piece's last tokens into the session's ring. */
static void keep_raw(const struct dsv4_piece *piece, const struct view *v, int32_t t) {
    int32_t slot = (piece->position + t) % v->slots;
    size_t bytes = (size_t)v->width * sizeof(float);
    ptrdiff_t from = (ptrdiff_t)(piece->first_tok + t) * v->width, to = (ptrdiff_t)slot * v->width;
    memcpy(v->old_k + to, v->new_k + from, bytes);
    memcpy(v->old_gate + to, v->new_gate + from, bytes);
}

/* What the next pass needs of this one; after attention, which still reads the old window. */
void dsv4_keep_state(dsv4_worker *w, struct dsv4_pass *p, int32_t layer) {
    const struct dsv4_layer *l = &p->m->layers[layer];
    const struct dsv4_prepared *b = dsv4_prepared(w, p);
    int32_t window = p->m->config.sliding_window;
    int64_t lo, hi;
    dsv4_share(w, p->n_tok, 1, &lo, &hi);
    for (int64_t i = lo; i < hi; i++) {
        const struct dsv4_piece *piece = &p->pieces[p->piece_of[i]];
        int32_t t = (int32_t)i - piece->first_tok, left = piece->n - t;
        if (left <= window)
            memcpy(piece->kv->layers[layer].window + (size_t)((piece->position + t) % window) * p->m->kv_row,
                   b->kv_rows + (size_t)i * p->m->kv_row, p->m->kv_row);
        if (l->kind == DSV4_SWA || left > p->m->state[layer].rows)
            continue;
        struct view v = main_view(p, piece, layer);
        keep_raw(piece, &v, t);
        if (l->kind == DSV4_CSA) {
            v = index_view(p, piece, layer);
            keep_raw(piece, &v, t);
        }
    }
}
