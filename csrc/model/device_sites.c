/* SPDX-License-Identifier: Apache-2.0 */
#include "model/device_sites.h"

#include <stdlib.h>
#include <string.h>

typedef struct dsv4_device_run run;

/* What a pass copies for the host waits on the device in a stage of at most this size, or of one row. */
enum { STAGE_BYTES = 64 << 20, ALIGN = 256 };

/* Bytes of the stage that belong to rows of a tap. */
struct record {
    void *to;
    size_t from, bytes;
};

struct dsv4_device_sites {
    uint8_t *stage;      /* owned, like the next two: memory of the device */
    dsv4_bf16 *rows;     /* [chunk][head_dim or index_head_dim]: rows of states, decoded */
    float *pre;          /* [chunk][hc] */
    uint8_t *host;       /* owned: the stage as it came */
    struct record *records; /* owned */
    size_t capacity, used, n_record, most_records;
};

int dsv4_device_sees(const struct dsv4_pass *p) {
    for (int32_t i = 0; p->asked && i < p->m->config.num_hidden_layers; i++)
        if (dsv4_asked(p, i, DSV4_SITE_KEYS))
            return 0;
    return 1;
}

/* ------------------------------------------------------------------------------------------------------- begin and end */

static dsv4_status allocate(const run *r, void *out_pointer, size_t bytes) {
    void *memory;
    DSV4_TRY(dsv4_device_status(r->d, r->d->plugin->runtime.allocate(&memory, bytes), "memory for a trace", r->err));
    memcpy(out_pointer, &memory, sizeof memory);
    return DSV4_OK;
}

static dsv4_status create(const run *r) {
    const struct dsv4_config *c = &r->p->m->config;
    size_t chunk = (size_t)r->p->m->options.chunk_tok;
    size_t dim = (size_t)(c->head_dim > c->index_head_dim ? c->head_dim : c->index_head_dim);
    struct dsv4_device_sites *s = calloc(1, sizeof *s);
    if (!s)
        return dsv4_fail(r->err, DSV4_E_MEMORY, "no memory for a trace");
    r->d->sites = s;
    dsv4_status status = allocate(r, &s->rows, chunk * dim * sizeof *s->rows);
    if (status == DSV4_OK)
        status = allocate(r, &s->pre, chunk * (size_t)c->hc_mult * sizeof *s->pre);
    if (status != DSV4_OK)
        dsv4_device_sites_destroy(r->d);
    return status;
}

void dsv4_device_sites_destroy(struct dsv4_device *d) {
    struct dsv4_device_sites *s = d->sites;
    if (!s)
        return;
    d->plugin->runtime.release(s->stage);
    d->plugin->runtime.release(s->rows);
    d->plugin->runtime.release(s->pre);
    free(s->host);
    free(s->records);
    free(s);
    d->sites = NULL;
}

/* Elements of a row of a value, each of four bytes. */
static int64_t row_size(const run *r, int32_t layer, int32_t value, int32_t width) {
    struct dsv4_value_shape s;
    if (!dsv4_model_value(r->p->m, layer, value, &s))
        return 0;
    return s.rank == 1 ? s.dims[0] + width : s.dims[0] * (s.dims[1] + width);
}

/* What the stage would have to hold for the whole pass, and for its largest row. */
static size_t needed(const run *r, size_t *least) {
    size_t bytes = 0;
    *least = 0;
    for (int32_t i = 0; i < r->p->n_piece; i++) {
        const struct dsv4_piece *piece = &r->p->pieces[i];
        if (!piece->taps || piece->taps_on_device)
            continue;
        for (int32_t layer = r->d->first_layer; layer < r->d->end_layer; layer++)
            for (int32_t value = 0; value < DSV4_VALUES; value++) {
                const struct dsv4_tap *tap = &piece->taps[layer * DSV4_VALUES + value];
                size_t row = tap->out ? (size_t)row_size(r, layer, value, tap->width) * 4 : 0;
                bytes += row * (size_t)piece->n + ALIGN; /* no more entries close than there are tokens */
                *least = row > *least ? row : *least;
            }
    }
    return bytes;
}

/* The stage, smaller where there is less room. */
static dsv4_status make_stage(const run *r, size_t want, size_t least) {
    struct dsv4_device_sites *s = r->d->sites;
    void *memory = NULL;
    r->d->plugin->runtime.release(s->stage);
    s->stage = NULL;
    s->capacity = 0;
    while (r->d->plugin->runtime.allocate(&memory, want) && want / 2 >= least)
        want /= 2;
    uint8_t *host = memory ? realloc(s->host, want) : NULL;
    if (!host) {
        r->d->plugin->runtime.release(memory);
        return dsv4_fail(r->err, DSV4_E_MEMORY, "trace: no room for %zu bytes %s, where what is copied waits for the end of a "
                         "pass", want, memory ? "in memory" : "on the device");
    }
    s->host = host;
    s->stage = memory;
    s->capacity = want;
    return DSV4_OK;
}

dsv4_status dsv4_device_sites_begin(run *r) {
    size_t least, want;
    if (!r->p->asked)
        return DSV4_OK;
    if (!r->d->sites)
        DSV4_TRY(create(r));
    struct dsv4_device_sites *s = r->d->sites;
    want = needed(r, &least);
    want = want < STAGE_BYTES || want < least ? want : STAGE_BYTES > least ? STAGE_BYTES : least;
    s->used = s->n_record = 0;
    return want <= s->capacity || !least ? DSV4_OK : make_stage(r, want, least);
}

dsv4_status dsv4_device_sites_end(run *r) {
    const struct dsv4_device_sites *s = r->d->sites;
    if (!r->p->asked || !s->used)
        return DSV4_OK;
    return dsv4_device_status(r->d, r->d->plugin->runtime.download(s->host, s->stage, s->used, r->d->stream), "a trace",
                              r->err);
}

void dsv4_device_sites_take(run *r) {
    struct dsv4_device_sites *s = r->d->sites;
    if (!r->p->asked)
        return;
    for (size_t i = 0; i < s->n_record; i++)
        memcpy(s->records[i].to, s->host + s->records[i].from, s->records[i].bytes);
    s->used = s->n_record = 0;
}

/* The stage is full: the host takes what is in it. */
static dsv4_status flush(run *r) {
    DSV4_TRY(dsv4_device_sites_end(r));
    DSV4_TRY(dsv4_pipeline_wait(r->d->pipeline, "a trace", r->err));
    DSV4_TRY(dsv4_device_prepare(r->d, r->err));
    dsv4_device_sites_take(r);
    return DSV4_OK;
}

static dsv4_status add_record(const run *r, void *to, size_t from, size_t bytes) {
    struct dsv4_device_sites *s = r->d->sites;
    if (s->n_record == s->most_records) {
        size_t most = s->most_records ? 2 * s->most_records : 256;
        struct record *grown = realloc(s->records, most * sizeof *grown);
        if (!grown)
            return dsv4_fail(r->err, DSV4_E_MEMORY, "no memory for a trace of %d tokens", r->n);
        s->records = grown;
        s->most_records = most;
    }
    s->records[s->n_record++] = (struct record){to, from, bytes};
    return DSV4_OK;
}

/* ------------------------------------------------------------------------------------------------------------- copying */

/* Rows of one value of a layer, as a tap launch reads them; args of the launch but for rows and where they go. */
struct source {
    int32_t layer, value;
    int32_t size;   /* elements of a row but for what widens */
    size_t element; /* bytes of one of x's */
    struct dsv4_cuda_tap_args args;
};

static const struct dsv4_tap *tap_of(const struct dsv4_piece *piece, const struct source *s) {
    return piece->taps ? &piece->taps[s->layer * DSV4_VALUES + s->value] : NULL;
}

static dsv4_status launch(const run *r, const struct source *s, int32_t skip, int32_t n, int32_t width, void *out) {
    struct dsv4_cuda_tap_args a = s->args;
    a.out = out;
    if (a.x)
        a.x = (const uint8_t *)a.x + (ptrdiff_t)s->element * skip * a.ld_x;
    a.counts = a.counts ? a.counts + skip : NULL;
    a.positions = a.positions ? a.positions + skip : NULL;
    a.n_row = n;
    a.width = width;
    a.ld_out = width;
    return dsv4_device_status(r->d, r->launches->tap(&a, r->d->stream), "tap", r->err);
}

/* The stage's next rows belong to the taps of the tokens from `tok` on, of this piece and those behind it. */
static dsv4_status note_tokens(const run *r, const struct source *s, const struct dsv4_piece *piece, int32_t tok, int32_t n,
                               size_t row_bytes) {
    size_t from = r->d->sites->used;
    for (int32_t here; n > 0; n -= here, tok += here, piece++) {
        here = piece->first_tok + piece->n - tok;
        here = here < n ? here : n;
        size_t row = (size_t)(piece->row + tok - piece->first_tok), bytes = (size_t)here * row_bytes;
        DSV4_TRY(add_record(r, (uint8_t *)tap_of(piece, s)->out + row * row_bytes, from, bytes));
        from += bytes;
    }
    return DSV4_OK;
}

/*
 * Rows [skip, skip + n) of the source to the stage, in turns that fit: those of tokens from `tok` on, or (tok -1) rows from
 * `row` on of the piece's tap.
 */
static dsv4_status to_stage(run *r, const struct source *s, const struct dsv4_piece *piece, int32_t skip, int32_t n,
                            int32_t tok, int64_t row) {
    struct dsv4_device_sites *sites = r->d->sites;
    const struct dsv4_tap *tap = tap_of(piece, s);
    int32_t width = s->size + tap->width;
    size_t row_bytes = (size_t)width * 4;
    for (int32_t now; n > 0 && width; n -= now, skip += now, row += now) {
        size_t most = (sites->capacity - sites->used) / row_bytes;
        if (!most)
            DSV4_TRY(flush(r));
        most = (sites->capacity - sites->used) / row_bytes;
        now = most < (size_t)n ? (int32_t)most : n;
        size_t bytes = (size_t)now * row_bytes, left = sites->capacity - sites->used;
        DSV4_TRY(launch(r, s, skip, now, width, sites->stage + sites->used));
        if (tok >= 0) {
            while (tok >= piece->first_tok + piece->n)
                piece++;
            DSV4_TRY(note_tokens(r, s, piece, tok, now, row_bytes));
            tok += now;
        } else {
            DSV4_TRY(add_record(r, (uint8_t *)tap->out + (size_t)row * row_bytes, sites->used, bytes));
        }
        bytes = (bytes + ALIGN - 1) / ALIGN * ALIGN;
        sites->used += bytes < left ? bytes : left;
    }
    return DSV4_OK;
}

static dsv4_status to_device(const run *r, const struct source *s, const struct dsv4_piece *piece, int32_t skip, int32_t n,
                             int64_t row) {
    const struct dsv4_tap *tap = tap_of(piece, s);
    int32_t width = s->size + tap->width;
    return n > 0 && width ? launch(r, s, skip, n, width, (float *)tap->out + row * width) : DSV4_OK;
}

/* Whether two neighbours can share a launch to the stage. */
static int together(const struct dsv4_piece *a, const struct dsv4_piece *b, const struct source *s) {
    const struct dsv4_tap *x = tap_of(a, s), *y = tap_of(b, s);
    return y && y->out && !b->taps_on_device && x->width == y->width;
}

/* Tokens [t, t + n) of the pass, the source's rows, to all that ask for them. */
static dsv4_status copy_tokens(run *r, const struct source *s, int32_t t, int32_t n) {
    const struct dsv4_piece *pieces = r->p->pieces;
    for (int32_t i = 0, end; i < r->p->n_piece; i = end) {
        const struct dsv4_piece *piece = &pieces[i];
        const struct dsv4_tap *tap = tap_of(piece, s);
        end = i + 1;
        if (!tap || !tap->out)
            continue;
        while (!piece->taps_on_device && end < r->p->n_piece && together(piece, &pieces[end], s))
            end++;
        int32_t first = piece->first_tok, last = pieces[end - 1].first_tok + pieces[end - 1].n;
        first = first > t ? first : t;
        last = last < t + n ? last : t + n;
        if (first >= last)
            continue;
        DSV4_TRY(piece->taps_on_device ? to_device(r, s, piece, first - t, last - first, piece->row + first - piece->first_tok)
                                       : to_stage(r, s, piece, first - t, last - first, first, 0));
    }
    return DSV4_OK;
}

static dsv4_status copy_bf16(run *r, int32_t layer, int32_t value, const dsv4_bf16 *x, int32_t size) {
    struct source s = {layer, value, size, sizeof *x, {.x = x, .ld_x = size, .n = size, .bf16 = 1}};
    return copy_tokens(r, &s, 0, r->n);
}

static dsv4_status copy_words(run *r, int32_t layer, int32_t value, const void *x, int32_t size) {
    struct source s = {layer, value, size, 4, {.x = x, .ld_x = size, .n = size}};
    return copy_tokens(r, &s, 0, r->n);
}

/* ------------------------------------------------------------------------------------------------------------ the sites */

dsv4_status dsv4_device_at_streams(run *r, int32_t layer, enum dsv4_site site) {
    const struct dsv4_config *c = &r->p->m->config;
    if (!dsv4_asked(r->p, layer, site))
        return DSV4_OK;
    int32_t value = site == DSV4_SITE_STREAMS_IN    ? DSV4_V_STREAMS_IN
                    : site == DSV4_SITE_STREAMS_MID ? DSV4_V_STREAMS_MID
                                                    : DSV4_V_STREAMS;
    return copy_bf16(r, layer, value, r->d->b.streams, c->hc_mult * c->hidden_size);
}

float *dsv4_device_pre(const run *r, int32_t layer, enum dsv4_site site) {
    return dsv4_asked(r->p, layer, site) ? r->d->sites->pre : NULL;
}

/* What a sublayer reads and gives, and its hyper-connection. */
static dsv4_status sublayer(run *r, int32_t layer, int ffn) {
    const struct dsv4_device_buffers *b = &r->d->b;
    int32_t d = r->p->m->config.hidden_size, hc = r->p->m->config.hc_mult;
    if (dsv4_asked(r->p, layer, ffn ? DSV4_SITE_FFN_MIX : DSV4_SITE_ATTENTION_MIX)) {
        DSV4_TRY(copy_words(r, layer, ffn ? DSV4_V_FFN_PRE : DSV4_V_ATTENTION_PRE, r->d->sites->pre, hc));
        DSV4_TRY(copy_words(r, layer, ffn ? DSV4_V_FFN_POST : DSV4_V_ATTENTION_POST, b->post, hc));
        DSV4_TRY(copy_words(r, layer, ffn ? DSV4_V_FFN_COMB : DSV4_V_ATTENTION_COMB, b->comb, hc * hc));
    }
    if (dsv4_asked(r->p, layer, ffn ? DSV4_SITE_FFN_IN : DSV4_SITE_ATTENTION_IN))
        DSV4_TRY(copy_bf16(r, layer, ffn ? DSV4_V_FFN_IN : DSV4_V_ATTENTION_IN, b->u, d));
    if (dsv4_asked(r->p, layer, ffn ? DSV4_SITE_FFN_OUT : DSV4_SITE_ATTENTION_OUT))
        DSV4_TRY(copy_bf16(r, layer, ffn ? DSV4_V_FFN_OUT : DSV4_V_ATTENTION_OUT, b->y, d));
    return DSV4_OK;
}

/* Rows of the window as they are stored, decoded; in sites->rows. */
static dsv4_status decode(const run *r, const uint8_t *rows, dsv4_bf16 *x, int32_t n, int index) {
    const struct dsv4_config *c = &r->p->m->config;
    /* a load reads the rows alone; the launches have one pointer for both ways */
    uint8_t *from = (uint8_t *)(uintptr_t)rows;
    if (index)
        LAUNCH(r, index, .rows = from, .x = x, .n_row = n, .n = c->index_head_dim, .per_tok = 1, .load = 1);
    else
        LAUNCH(r, kv, .rows = from, .x = x, .n_row = n, .d_head = c->head_dim, .d_rope = c->qk_rope_head_dim, .load = 1,
               .format = r->p->m->kv_format);
    return DSV4_OK;
}

/* The entries that close in this pass, from the blocks of the session. */
static dsv4_status entries(run *r, const struct dsv4_piece *piece, int32_t layer, int index) {
    const struct dsv4_config *c = &r->p->m->config;
    int32_t dim = index ? c->index_head_dim : c->head_dim, ratio = c->compress_ratios[layer];
    struct source s = {layer, index ? DSV4_V_KV_INDEX : DSV4_V_KV_COMPRESSED, dim, sizeof(dsv4_bf16),
                       {.x = r->d->sites->rows, .ld_x = dim, .n = dim, .bf16 = 1}};
    const struct dsv4_tap *tap = tap_of(piece, &s);
    if (!tap || !tap->out)
        return DSV4_OK;
    int32_t first = piece->position / ratio, end = (piece->position + piece->n) / ratio, n;
    for (int32_t e = first; e < end; e += n) {
        const uint8_t *rows = dsv4_mirror_rows(r->d, piece, layer, index, e, &n);
        n = n < end - e ? n : end - e;
        DSV4_TRY(decode(r, rows, r->d->sites->rows + (ptrdiff_t)(e - first) * dim, n, index));
    }
    int64_t row = first - (piece->position - piece->row) / ratio;
    return piece->taps_on_device ? to_device(r, &s, piece, 0, end - first, row)
                                 : to_stage(r, &s, piece, 0, end - first, -1, row);
}

static dsv4_status kv(run *r, int32_t layer) {
    const enum dsv4_layer_kind kind = r->p->m->layers[layer].kind;
    if (!dsv4_asked(r->p, layer, DSV4_SITE_KV))
        return DSV4_OK;
    DSV4_TRY(decode(r, r->d->b.kv_rows, r->d->sites->rows, r->n, 0));
    DSV4_TRY(copy_bf16(r, layer, DSV4_V_KV, r->d->sites->rows, r->p->m->config.head_dim));
    for (int32_t i = 0; i < r->p->n_piece; i++) {
        if (kind != DSV4_SWA)
            DSV4_TRY(entries(r, &r->p->pieces[i], layer, 0));
        if (kind == DSV4_CSA)
            DSV4_TRY(entries(r, &r->p->pieces[i], layer, 1));
    }
    return DSV4_OK;
}

dsv4_status dsv4_device_at_attention(run *r, int32_t layer) {
    int32_t top_k = r->p->m->config.index_topk;
    DSV4_TRY(kv(r, layer));
    if (dsv4_asked(r->p, layer, DSV4_SITE_INDEX_SELECTED)) {
        struct source s = {layer, DSV4_V_INDEX_SELECTED, top_k, 4,
                           {.x = r->d->b.selected, .ld_x = top_k, .counts = r->d->b.n_selected, .fill = 0xffffffffu}};
        DSV4_TRY(copy_tokens(r, &s, 0, r->n));
    }
    return sublayer(r, layer, 0);
}

dsv4_status dsv4_device_at_scores(run *r, int32_t layer, const float *scores, int32_t max_entry, int32_t t, int32_t n) {
    if (!dsv4_asked(r->p, layer, DSV4_SITE_INDEX_SCORES))
        return DSV4_OK;
    struct source s = {layer, DSV4_V_INDEX_SCORES, 0, 4,
                       {.x = scores, .ld_x = max_entry, .positions = r->d->b.positions + t,
                        .ratio = r->p->m->layers[layer].compressor.ratio, .top_k = r->p->m->config.index_topk,
                        .fill = 0x7fc00000u}};
    return copy_tokens(r, &s, t, n);
}

dsv4_status dsv4_device_at_heads(run *r, int32_t layer) {
    const struct dsv4_config *c = &r->p->m->config;
    return dsv4_asked(r->p, layer, DSV4_SITE_HEADS)
               ? copy_bf16(r, layer, DSV4_V_HEADS, r->d->b.o, c->num_attention_heads * c->head_dim)
               : DSV4_OK;
}

dsv4_status dsv4_device_at_ffn(run *r, int32_t layer) {
    const struct dsv4_config *c = &r->p->m->config;
    const struct dsv4_device_buffers *b = &r->d->b;
    if (dsv4_asked(r->p, layer, DSV4_SITE_ROUTER)) {
        DSV4_TRY(copy_words(r, layer, DSV4_V_EXPERTS, b->expert_ids, c->num_experts_per_tok));
        DSV4_TRY(copy_words(r, layer, DSV4_V_EXPERT_WEIGHTS, b->expert_weights, c->num_experts_per_tok));
        DSV4_TRY(copy_words(r, layer, DSV4_V_ROUTER_SCORES, b->router_scores, c->n_routed_experts));
    }
    return sublayer(r, layer, 1);
}
