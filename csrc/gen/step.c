/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Steps: checks, locks, the cut of segments into passes, and the all-or-nothing rule.  A step keeps what it overwrites
 * of each session's fixed state (dsv4_kv_save); compressed rows beyond the position need no undoing.
 */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>

#include "gen/session.h"
#include "model/call.h"
#include "model/device_sites.h"
#include "model/edit.h"
#include "model/experts.h"
#include "model/part.h"
#include "model/sites.h"

/* What a run has allocated; the model keeps the last run for the next step, so decoding allocates nothing. */
struct kept {
    struct dsv4_piece *pieces;   /* [chunk], like the next four */
    struct dsv4_wanted *wanted;
    int32_t *ids, *positions, *piece_of;
    struct dsv4_asked *asked;    /* [layers] */
    dsv4_session **order;        /* [capacity] */
    int32_t capacity;            /* segments */
};

struct dsv4_run {
    dsv4_model *model;
    struct kept kept;              /* owned */
    struct dsv4_segment *segments; /* borrowed; NULL for a layer or the head run alone */
    int32_t n_segment, n_locked, n_saved;
    float *seconds;                /* borrowed, or NULL */
    struct dsv4_clock clock;
    atomic_int bad_layer;
    struct dsv4_damage damage;
    dsv4_error fault;              /* of the device; code DSV4_OK: none */
    atomic_llong progress;
    int diagnose, cancelled;
    /* one pass at a time, planned by worker 0 */
    struct dsv4_pass pass;
    int32_t segment, offset; /* where the next pass begins */
    /* a layer or the head run alone */
    struct dsv4_kv *kv; /* owned */
    int32_t layer, n_tok;
    const uint16_t *streams_in;
    uint16_t *streams_out;    /* of a layer */
    float *logits;            /* of the head */
    const int32_t *token_ids; /* of a layer */
    const struct dsv4_tap *taps;
    /* a part run alone */
    const struct dsv4_part *part;      /* borrowed, or NULL */
    struct dsv4_segment state_segment; /* the tokens that enter its state */
};

/* ---------------------------------------------------------------------------------------------- planning the passes */

static void add_piece(dsv4_run *r, struct dsv4_kv *kv, const dsv4_edit *edit, const int32_t *ids, int32_t n,
                      int32_t position, const struct dsv4_tap *taps, int taps_on_device, int32_t row) {
    struct dsv4_pass *p = &r->pass;
    if (taps_on_device && r->diagnose)
        taps = NULL; /* the CPU looks for a bad layer: what is copied is of no interest any more */
    p->pieces[p->n_piece] = (struct dsv4_piece){kv, p->n_tok, n, position, taps, taps_on_device, row, edit};
    p->edited |= edit != NULL;
    for (int32_t i = 0; i < n; i++) {
        r->kept.ids[p->n_tok + i] = ids ? ids[i] : 0; /* the head reads none */
        r->kept.positions[p->n_tok + i] = position + i;
        r->kept.piece_of[p->n_tok + i] = p->n_piece;
    }
    p->n_tok += n;
    p->n_piece++;
}

static void want_rows(dsv4_run *r, const struct dsv4_segment *s, int32_t first, int32_t n, int32_t tok) {
    struct dsv4_pass *p = &r->pass;
    size_t vocab = (size_t)r->model->config.vocab_size;
    for (int32_t i = first; i < first + n; i++) {
        int last = i == s->n - 1, all = s->want == DSV4_LOGITS_ALL;
        if (!all && !(last && (s->want == DSV4_LOGITS_LAST || s->sampler)))
            continue;
        p->wanted[p->n_wanted++] = (struct dsv4_wanted){
            .logits = all ? s->logits + (size_t)i * vocab : s->want == DSV4_LOGITS_LAST ? s->logits : NULL,
            .sampler = last ? s->sampler : NULL, .sample = s->sample, .tok = tok + i - first,
            .position = s->session->kv->position + i + 1,
        };
    }
}

/* The next tokens of a layer or the head run alone. */
static int plan_alone(dsv4_run *r) {
    struct dsv4_pass *p = &r->pass;
    int32_t chunk = r->model->options.chunk_tok, n = r->n_tok - r->offset < chunk ? r->n_tok - r->offset : chunk;
    if (n > 0)
        add_piece(r, r->kv, NULL, r->token_ids ? r->token_ids + r->offset : NULL, n, r->offset, r->taps, 0,
                  r->offset);
    for (int32_t i = 0; r->logits && i < n; i++)
        p->wanted[p->n_wanted++] = (struct dsv4_wanted){
            .logits = r->logits + (size_t)(r->offset + i) * (size_t)r->model->config.vocab_size, .tok = i};
    r->offset += n;
    p->asked = dsv4_sites_asked(p, r->kept.asked);
    return n > 0;
}

/* Fills the next pass with up to chunk tokens; 0 when nothing is left.  Tokens of prompts, if they are computed with other
 * sums, and generated ones are never in one pass: so neither depends on what else a step does, nor on how a prompt is cut. */
static int plan_pass(dsv4_run *r) {
    struct dsv4_pass *p = &r->pass;
    int32_t chunk = r->model->options.chunk_tok;
    p->n_piece = p->n_tok = p->n_wanted = p->edited = p->prompt = 0;
    if (!r->segments)
        return plan_alone(r);
    while (r->segment < r->n_segment && p->n_tok < chunk) {
        const struct dsv4_segment *s = &r->segments[r->segment];
        int prompt = s->prompt && r->model->options.tensor_cores;
        if (p->n_tok && prompt != p->prompt)
            break;
        p->prompt = prompt;
        int32_t left = s->n - r->offset, n = left < chunk - p->n_tok ? left : chunk - p->n_tok;
        want_rows(r, s, r->offset, n, p->n_tok);
        add_piece(r, s->session->kv, s->session->edit, s->ids + r->offset, n, s->session->kv->position + r->offset,
                  s->taps, s->taps_on_device, r->offset);
        r->offset += n;
        if (r->offset == s->n) {
            r->segment++;
            r->offset = 0;
        }
    }
    p->asked = dsv4_sites_asked(p, r->kept.asked);
    return p->n_tok > 0;
}

static void copy_streams(const dsv4_worker *w, dsv4_run *r, int out) {
    const struct dsv4_config *c = &r->model->config;
    size_t row = (size_t)c->hc_mult * (size_t)c->hidden_size;
    int64_t lo, hi;
    dsv4_share(w, r->pass.n_tok, 1, &lo, &hi);
    size_t first = (size_t)r->pass.pieces[0].position + (size_t)lo, n = (size_t)(hi - lo) * row * sizeof(dsv4_bf16);
    dsv4_bf16 *streams = r->pass.ws->streams + (size_t)lo * row;
    if (out)
        memcpy(r->streams_out + first * row, streams, n);
    else
        memcpy(streams, r->streams_in + first * row, n);
}

/* A layer run alone, or none and the head. */
static int run_layer(dsv4_worker *w, dsv4_run *r) {
    copy_streams(w, r, 0);
    if (dsv4_forward(w, &r->pass, 0))
        return 1;
    if (r->streams_out)
        copy_streams(w, r, 1);
    return 0;
}

/* The next pass, by one worker: nothing runs beside it. */
static void begin_pass(dsv4_run *r) {
    struct dsv4_pass *p = &r->pass;
    if (!plan_pass(r))
        return;
    if (r->model->cache)
        dsv4_experts_begin(p);
    p->on_device = r->model->pipeline && r->segments && !p->edited && !p->diagnose && dsv4_device_sees(p);
    for (int32_t i = 0; r->segments && !p->on_device && i < p->n_piece; i++)
        dsv4_mirror_forget(p->pieces[i].kv->mirror); /* the host's state moves on alone */
}

static void run_passes(dsv4_worker *w, dsv4_run *r) {
    for (;;) {
        if (w->id == 0)
            begin_pass(r);
        if (dsv4_meet(w, &r->pass) || !r->pass.n_tok)
            return;
        if (r->part ? dsv4_part(w, &r->pass, r->part) : r->segments ? dsv4_forward(w, &r->pass, 1) : run_layer(w, r))
            return;
        if (dsv4_meet(w, &r->pass))
            return;
        if (w->id == 0)
            atomic_fetch_add(&r->progress, r->pass.n_tok);
        if (!r->diagnose && (atomic_load(&r->bad_layer) != INT_MAX || atomic_load(&r->damage.found)))
            return;
    }
}

/* What every worker does from the start of the step to its end. */
static void step_job(dsv4_worker *w, void *ctx) {
    dsv4_run *r = ctx;
    run_passes(w, r);
    if (r->pass.calls && w->id == 0)
        dsv4_calls_end(r->pass.calls);
}

/* ------------------------------------------------------------------------------------------------- start and finish */

static dsv4_status check_segment(dsv4_model *m, const struct dsv4_segment *s, int32_t index, dsv4_error *err) {
    const struct dsv4_config *c = &m->config;
    if (s->session->model != m)
        return dsv4_fail(err, DSV4_E_ARGUMENT, "segment %d: the session belongs to another model", index);
    if (s->n < 1)
        return dsv4_fail(err, DSV4_E_ARGUMENT, "segment %d: got no tokens, wanted at least one", index);
    for (int32_t i = 0; i < s->n; i++)
        if (s->ids[i] < 0 || s->ids[i] >= c->vocab_size)
            return dsv4_fail(err, DSV4_E_ARGUMENT, "segment %d: token %d: got id %d, wanted one in [0, %d)", index, i,
                             s->ids[i], c->vocab_size);
    return DSV4_OK;
}

static dsv4_status check_room(const struct dsv4_segment *s, dsv4_error *err) {
    int32_t most = s->session->model->config.max_position_embeddings, position = s->session->kv->position;
    if (s->n > most - position)
        return dsv4_fail(err, DSV4_E_ARGUMENT, "the context: got %d tokens after %d, wanted at most %d in all", s->n,
                         position, most);
    return DSV4_OK;
}

static int by_address(const void *a, const void *b) {
    const dsv4_session *x = *(dsv4_session *const *)a, *y = *(dsv4_session *const *)b;
    return (x > y) - (x < y);
}

/* Locks in the order of addresses, so two steps with the same sessions cannot wait for each other. */
static dsv4_status lock_sessions(dsv4_run *r, dsv4_error *err) {
    dsv4_session **order = r->kept.order;
    for (int32_t i = 0; i < r->n_segment; i++)
        order[i] = r->segments[i].session;
    qsort(order, (size_t)r->n_segment, sizeof(*order), by_address);
    for (int32_t i = 1; i < r->n_segment; i++)
        if (order[i] == order[i - 1])
            return dsv4_fail(err, DSV4_E_ARGUMENT, "segments: one session occurs twice, wanted each once");
    for (int32_t i = 0; i < r->n_segment; i++)
        pthread_mutex_lock(&order[i]->lock);
    r->n_locked = r->n_segment;
    return DSV4_OK;
}

/* Puts every session back to where it was; the position never moved. */
static void restore(dsv4_run *r) {
    for (int32_t i = 0; i < r->n_saved; i++) {
        dsv4_kv_restore(r->segments[i].session->kv, r->segments[i].n);
    }
}

void dsv4_run_free(dsv4_run *r) {
    if (!r)
        return;
    free(r->kept.pieces);
    free(r->kept.wanted);
    free(r->kept.ids);
    free(r->kept.positions);
    free(r->kept.piece_of);
    free(r->kept.asked);
    free(r->kept.order);
    free(r);
}

static void run_release(dsv4_run *r) {
    dsv4_model *m = r->model;
    dsv4_run *none = NULL;
    for (int32_t i = 0; i < r->n_locked; i++)
        pthread_mutex_unlock(&r->segments[i].session->lock);
    if (!r->segments)
        dsv4_kv_release(r->kv);
    dsv4_calls_destroy(r->pass.calls);
    r->pass.calls = NULL;
    if (!atomic_compare_exchange_strong(&m->spare, &none, r))
        dsv4_run_free(r);
    dsv4_model_destroy(m);
}

static dsv4_run *run_allocate(const dsv4_model *m) {
    size_t chunk = (size_t)m->options.chunk_tok;
    dsv4_run *r = calloc(1, sizeof *r);
    if (!r)
        return NULL;
    r->kept.pieces = calloc(chunk, sizeof *r->kept.pieces);
    r->kept.wanted = calloc(chunk, sizeof *r->kept.wanted);
    r->kept.ids = calloc(chunk, sizeof *r->kept.ids);
    r->kept.positions = calloc(chunk, sizeof *r->kept.positions);
    r->kept.piece_of = calloc(chunk, sizeof *r->kept.piece_of);
    r->kept.asked = calloc((size_t)m->config.num_hidden_layers, sizeof *r->kept.asked);
    if (r->kept.pieces && r->kept.wanted && r->kept.ids && r->kept.positions && r->kept.piece_of && r->kept.asked)
        return r;
    dsv4_run_free(r);
    return NULL;
}

static int reserve_segments(struct kept *kept, int32_t n) {
    if (n <= kept->capacity)
        return 0;
    dsv4_session **order = realloc(kept->order, (size_t)n * sizeof(*order));
    kept->order = order ? order : kept->order;
    if (!order)
        return 1;
    kept->capacity = n;
    return 0;
}

static dsv4_status run_create(dsv4_run **out, dsv4_model *m, float *seconds, struct dsv4_segment *segments,
                              int32_t n_segment, dsv4_error *err) {
    dsv4_run *r = atomic_exchange(&m->spare, NULL);
    if (!r)
        r = run_allocate(m);
    if (!r || reserve_segments(&r->kept, n_segment)) {
        dsv4_run_free(r);
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for a step of %d segments", n_segment);
    }
    atomic_fetch_add(&m->references, 1); /* the sessions may go before the run has been put away */
    *r = (dsv4_run){.model = m, .kept = r->kept, .segments = segments, .n_segment = n_segment, .seconds = seconds};
    atomic_init(&r->bad_layer, INT_MAX);
    atomic_init(&r->damage.found, 0);
    r->pass = (struct dsv4_pass){
        .m = m, .ws = m->workspace, .pieces = r->kept.pieces, .ids = r->kept.ids, .positions = r->kept.positions,
        .piece_of = r->kept.piece_of, .end_layer = m->config.num_hidden_layers, .clock = seconds ? &r->clock : NULL,
        .wanted = r->kept.wanted, .unread = -1,
        .bad_layer = &r->bad_layer, .damage = &r->damage, .fault = &r->fault,
    };
    *out = r;
    return DSV4_OK;
}

static int asks_weights(const dsv4_run *r, const struct dsv4_tap *taps) {
    for (int32_t i = 0; taps && i < r->model->config.num_hidden_layers; i++)
        if (taps[i * DSV4_VALUES + DSV4_V_ATTENTION_WEIGHTS].out)
            return 1;
    return 0;
}

/* Taps on the device are filled by passes on the device alone. */
static dsv4_status check_device_taps(const dsv4_run *r, dsv4_error *err) {
    int any = 0;
    for (int32_t i = 0; i < r->n_segment; i++)
        any |= r->segments[i].taps && r->segments[i].taps_on_device;
    for (int32_t i = 0; any && i < r->n_segment; i++) {
        if (r->segments[i].session->edit)
            return dsv4_fail(err, DSV4_E_ARGUMENT, "trace: got one on the device in a step with an edited session (segment "
                             "%d), which the CPU computes; wanted no edit, or a trace without device=True", i);
        if (asks_weights(r, r->segments[i].taps))
            return dsv4_fail(err, DSV4_E_ARGUMENT, "trace: got one on the device in a step that traces weights of attention "
                             "(segment %d), which the CPU computes; wanted two steps", i);
    }
    return DSV4_OK;
}

/* A step that asks the caller looks at the streams of every layer at once: it cannot be run again to find them. */
static dsv4_status prepare_calls(dsv4_run *r, dsv4_error *err) {
    for (int32_t i = 0; i < r->n_segment && !r->diagnose; i++)
        r->diagnose = dsv4_edit_calls(r->segments[i].session->edit) > 0;
    return r->diagnose ? dsv4_calls_create(&r->pass.calls, err) : DSV4_OK;
}

static dsv4_status prepare_sessions(dsv4_run *r, dsv4_error *err) {
    for (int32_t i = 0; i < r->n_segment; i++)
        DSV4_TRY(check_segment(r->model, &r->segments[i], i, err));
    DSV4_TRY(lock_sessions(r, err));
    for (int32_t i = 0; i < r->n_segment; i++) {
        struct dsv4_segment *s = &r->segments[i];
        if (s->session->kv->end_layer - s->session->kv->first_layer < r->model->config.num_hidden_layers)
            return dsv4_fail(err, DSV4_E_ARGUMENT, "segment %d: got the state of one layer, wanted a session", i);
        DSV4_TRY(check_room(s, err));
        if (s->n > 1)
            dsv4_session_keep_locked(s->session);
        DSV4_TRY(dsv4_kv_own(&s->session->kv, err));
        DSV4_TRY(dsv4_kv_reserve(s->session->kv, s->n, err));
        DSV4_TRY(dsv4_sites_check(r->model, s->taps, s->session->kv->position, s->n, err));
    }
    DSV4_TRY(check_device_taps(r, err));
    DSV4_TRY(prepare_calls(r, err));
    for (int32_t i = 0; i < r->n_segment; i++, r->n_saved++)
        DSV4_TRY(dsv4_kv_save(r->segments[i].session->kv, r->segments[i].n, err));
    return DSV4_OK;
}

/* A job that only enlarges the workspace's scratch would race with a running step, so it happens inside the queue. */
struct growth {
    dsv4_run *run;
    int32_t position;
    dsv4_status status;
    dsv4_error *err;
};

static void grow_job(dsv4_worker *w, void *ctx) {
    struct growth *g = ctx;
    if (w->id == 0)
        g->status = dsv4_workspace_reserve(g->run->model->workspace, g->run->model, g->position, g->err);
}

static dsv4_status grow_workspace(dsv4_run *r, dsv4_error *err) {
    struct growth g = {r, r->n_tok, DSV4_OK, err};
    for (int32_t i = 0; i < r->n_segment; i++) {
        int32_t end = r->segments[i].session->kv->position + r->segments[i].n;
        g.position = end > g.position ? end : g.position;
    }
    if (dsv4_workspace_fits(r->model->workspace, r->model, g.position))
        return DSV4_OK;
    DSV4_TRY(dsv4_team_start(r->model->team, grow_job, &g, err));
    dsv4_team_finish(r->model->team);
    return g.status;
}

static dsv4_status launch(dsv4_run *r, dsv4_error *err) {
    DSV4_TRY(grow_workspace(r, err));
    r->pass.diagnose = r->diagnose;
    r->segment = r->offset = 0;
    if (r->pass.calls)
        dsv4_calls_begin(r->pass.calls);
    if (r->pass.clock)
        dsv4_clock_start(r->pass.clock);
    return dsv4_team_start(r->model->team, step_job, r, err);
}

dsv4_status dsv4_step_start(dsv4_run **out, dsv4_model *m, struct dsv4_segment *segments, int32_t n_segment,
                            float *seconds, dsv4_error *err) {
    dsv4_run *r;
    if (n_segment < 1)
        return dsv4_fail(err, DSV4_E_ARGUMENT, "segments: got none, wanted at least one");
    DSV4_TRY(run_create(&r, m, seconds, segments, n_segment, err));
    dsv4_status status = prepare_sessions(r, err);
    if (status == DSV4_OK)
        status = launch(r, err);
    if (status != DSV4_OK) {
        run_release(r);
        return status;
    }
    *out = r;
    return DSV4_OK;
}

dsv4_status dsv4_layer_start(dsv4_run **out, dsv4_model *m, int32_t layer, uint16_t *streams_out,
                             const uint16_t *streams_in, const int32_t *token_ids, int32_t n,
                             const struct dsv4_tap *taps, dsv4_error *err) {
    dsv4_run *r;
    if (layer < 0 || layer >= m->config.num_hidden_layers)
        return dsv4_fail(err, DSV4_E_ARGUMENT, "layer: got %d, wanted one in [0, %d)", layer,
                         m->config.num_hidden_layers);
    if (n < 1 || n > m->config.max_position_embeddings)
        return dsv4_fail(err, DSV4_E_ARGUMENT, "streams: got %d rows, wanted 1 to %d", n,
                         m->config.max_position_embeddings);
    for (int32_t i = 0; i < n; i++)
        if (token_ids[i] < 0 || token_ids[i] >= m->config.vocab_size)
            return dsv4_fail(err, DSV4_E_ARGUMENT, "token_ids: got %d at %d, wanted ids in [0, %d)", token_ids[i], i,
                             m->config.vocab_size);
    DSV4_TRY(dsv4_sites_check(m, taps, 0, n, err));
    DSV4_TRY(run_create(&r, m, NULL, NULL, 0, err));
    r->streams_in = streams_in;
    r->streams_out = streams_out;
    r->token_ids = token_ids;
    r->taps = taps;
    r->n_tok = n;
    r->pass.first_layer = layer;
    r->pass.end_layer = layer + 1;
    dsv4_status status = dsv4_kv_create(&r->kv, m, layer, layer + 1, err);
    if (status == DSV4_OK)
        status = dsv4_kv_reserve(r->kv, n, err);
    if (status == DSV4_OK)
        status = launch(r, err);
    if (status != DSV4_OK) {
        run_release(r);
        return status;
    }
    *out = r;
    return DSV4_OK;
}

/* The state is locked: what was checked of it stays true until the run is finished. */
static dsv4_status prepare_state(dsv4_run *r, dsv4_error *err) {
    struct dsv4_segment *s = &r->state_segment;
    DSV4_TRY(lock_sessions(r, err));
    DSV4_TRY(dsv4_part_check_state(r->part, r->model, s->session->kv, err));
    DSV4_TRY(check_room(s, err));
    DSV4_TRY(dsv4_kv_own(&s->session->kv, err));
    DSV4_TRY(dsv4_kv_reserve(s->session->kv, s->n, err));
    DSV4_TRY(dsv4_kv_save(s->session->kv, s->n, err));
    r->n_saved = 1;
    return DSV4_OK;
}

dsv4_status dsv4_part_start(dsv4_run **out, dsv4_model *m, const struct dsv4_part *part, dsv4_error *err) {
    dsv4_run *r;
    DSV4_TRY(dsv4_part_check(part, m, err));
    DSV4_TRY(run_create(&r, m, NULL, NULL, part->state != NULL, err));
    r->part = part;
    r->token_ids = part->token_ids;
    r->n_tok = part->n;
    r->pass.first_layer = part->layer;
    r->pass.end_layer = part->layer + (part->kind == DSV4_PART_MOE); /* whose experts hash ids choose */
    dsv4_status status = DSV4_OK;
    if (part->state) {
        r->state_segment = (struct dsv4_segment){.session = part->state, .ids = part->token_ids, .n = part->n};
        r->segments = &r->state_segment;
        status = prepare_state(r, err);
    }
    if (status == DSV4_OK)
        status = launch(r, err);
    if (status != DSV4_OK) {
        run_release(r);
        return status;
    }
    *out = r;
    return DSV4_OK;
}

dsv4_status dsv4_head_start(dsv4_run **out, dsv4_model *m, float *logits, const uint16_t *streams, int32_t n,
                            dsv4_error *err) {
    dsv4_run *r;
    if (n < 1)
        return dsv4_fail(err, DSV4_E_ARGUMENT, "streams: got %d rows, wanted at least one", n);
    DSV4_TRY(run_create(&r, m, NULL, NULL, 0, err));
    r->streams_in = streams;
    r->logits = logits;
    r->n_tok = n;
    r->pass.end_layer = 0;
    dsv4_status status = dsv4_kv_create(&r->kv, m, 0, 0, err);
    if (status == DSV4_OK)
        status = launch(r, err);
    if (status != DSV4_OK) {
        run_release(r);
        return status;
    }
    *out = r;
    return DSV4_OK;
}

int dsv4_run_wait(dsv4_run *r, int milliseconds) {
    int asked = r->pass.calls ? dsv4_calls_wait(r->pass.calls, milliseconds) : 0;
    if (asked)
        return asked;
    return dsv4_team_wait(r->model->team, milliseconds);
}

void dsv4_run_call(const dsv4_run *r, struct dsv4_call *out) {
    dsv4_calls_read(r->pass.calls, out, NULL, NULL);
}

void dsv4_run_read(const dsv4_run *r, float *streams, int32_t *positions) {
    dsv4_calls_read(r->pass.calls, NULL, streams, positions);
}

void dsv4_run_resume(dsv4_run *r, const float *streams) {
    dsv4_calls_answer(r->pass.calls, streams);
}

void dsv4_run_cancel(dsv4_run *r) {
    r->cancelled = 1;
    dsv4_team_cancel(r->model->team);
}

int64_t dsv4_run_progress(const dsv4_run *r) {
    return atomic_load(&r->progress);
}

/* Runs the failed step again, looking at the streams after every layer, unless it has done so. */
static int find_bad_layer(dsv4_run *r) {
    dsv4_error ignored;
    restore(r);
    if (!r->diagnose) {
        r->diagnose = 1;
        if (launch(r, &ignored) == DSV4_OK)
            dsv4_team_finish(r->model->team);
    }
    int layer = atomic_load(&r->bad_layer);
    return layer < r->model->config.num_hidden_layers ? layer : -1;
}

static void commit(dsv4_run *r) {
    for (int32_t i = 0; i < r->n_segment; i++) {
        const struct dsv4_segment *s = &r->segments[i];
        dsv4_kv_commit(s->session->kv, s->ids, s->n);
        if (s->n == 1)
            continue;
        dsv4_kv_forget_undo(s->session->kv); /* as large as the fixed state after a long segment */
        dsv4_session_keep_locked(s->session);
    }
}

dsv4_status dsv4_run_finish(dsv4_run *r, dsv4_error *err) {
    dsv4_status status = DSV4_OK;
    dsv4_team_finish(r->model->team);
    for (int i = 0; r->pass.clock && i < DSV4_PHASES; i++)
        r->seconds[i] = (float)r->clock.seconds[i];
    if (r->cancelled) {
        status = dsv4_fail(err, DSV4_E_CANCELLED, "the step was cancelled; every session is as it was");
    } else if (r->pass.unread >= 0) {
        status = dsv4_fail(err, DSV4_E_IO, "layers.%d.ffn.experts.%d: its file could not be read; every session is as it "
                           "was", r->pass.unread_layer, r->pass.unread);
    } else if (r->fault.code != DSV4_OK) {
        status = r->fault.code;
        if (err)
            *err = r->fault;
    } else if (atomic_load(&r->damage.found)) {
        status = dsv4_rows_fault(DSV4_ROWS_DAMAGED, r->damage.store, r->damage.layer, r->damage.row, err);
    } else if (atomic_load(&r->bad_layer) != INT_MAX && r->part) {
        status = dsv4_fail(err, DSV4_E_NONFINITE, "layer %d: a score of its indexer is NaN", r->part->layer);
        if (err)
            err->layer = r->part->layer;
    } else if (atomic_load(&r->bad_layer) != INT_MAX) {
        int layer = find_bad_layer(r);
        char where[32] = "the head";
        if (layer >= 0)
            snprintf(where, sizeof where, "the output of layer %d", layer);
        status = dsv4_fail(err, DSV4_E_NONFINITE, "a logit is NaN or infinite; this begins in %s", where);
        if (err)
            err->layer = layer;
    }
    if (status == DSV4_OK && !(r->part && r->part->kind != DSV4_PART_ATTENTION))
        commit(r);
    else
        restore(r);
    run_release(r);
    return status;
}
