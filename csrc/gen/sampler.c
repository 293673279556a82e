/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The sampler of sampler.h.  One pass turns logits into integer weights; each filter is a radix
 * select over the ids that are left (three passes at most, no sort, no bad case); the draw is one
 * more pass.
 */
#include "gen/sampler.h"

#include "sampling.h"

#include <stdlib.h>

/* Widths of the three digits that a 32-bit key is cut into, from the top: 11, 11, 10. */
enum { FIRST_SHIFT = 21, SECOND_SHIFT = 10, N_BINS = 1 << 11 };

struct dsv4_sampler {
    struct dsv4_sampling p; /* its four arrays are owned */
    int32_t vocab;
    int64_t n_output;    /* tokens produced, or noted as output */
    float *values;       /* owned; [vocab] edited logits; NULL if no parameter edits */
    uint64_t *weights;   /* owned; [vocab]; NULL if greedy */
    int32_t *kept;       /* owned; [vocab] ids the filters left, ascending; NULL without filters */
    int32_t *n_produced; /* owned; [vocab]; NULL without penalties, like the next two */
    uint8_t *was_seen;   /* owned; [vocab] 1 if in `seen` */
    int32_t *seen;       /* owned; [n_seen of vocab] distinct ids of prompt and output */
    int32_t n_seen;
    int32_t *top_ids;    /* owned; [p.logprobs] */
    float *top_logprobs; /* owned; [p.logprobs] */
    uint64_t bins[N_BINS];
};

/* ---------------------------------------------------------------------------- order and weights */

/* Distinct for distinct ids; the better token has the higher rank. */
static uint64_t order_rank(const float *v, int32_t id) {
    return (uint64_t)dsv4_order_key(v[id]) << 32 | (0xffffffffu - (uint32_t)id);
}

static int32_t best_of(const float *v, int32_t n) {
    int32_t best = 0;
    float high = -HUGE_VALF;
    for (int32_t id = 0; id < n; id++) {
        if (v[id] > high) { /* never for a NaN */
            high = v[id];
            best = id;
        }
    }
    return best;
}

/* Weights of all tokens that reach min_p, zero for the others; returns their sum. */
static uint64_t weigh(dsv4_sampler *s, const float *v, float max) {
    double inverse = 1.0 / (double)s->p.temperature, high = (double)max;
    uint64_t total = 0, least = dsv4_least_weight(s->p.min_p);
    for (int32_t id = 0; id < s->vocab; id++) {
        uint64_t w = dsv4_softmax_weight(((double)v[id] - high) * inverse);
        w = w >= least ? w : 0;
        s->weights[id] = w;
        total += w;
    }
    return total;
}

/* -------------------------------------------------------------------------------------- filters */

/* What a token adds to the sum that a filter cuts: its weight for top_p, one for top_k. */
static uint64_t share(const dsv4_sampler *s, int32_t id, int by_weight) {
    return by_weight ? s->weights[id] : 1;
}

/*
 * Narrows kept[0..n) to the shortest run of the best whose shares reach `target` (at least 1, at
 * most the sum of all, 0 only with n = 0) and returns its length.  Finds the key of the last one
 * digit by digit; among equals the lower ids stay.
 */
static int32_t keep_best(dsv4_sampler *s, const float *v, int32_t n, uint64_t target,
                         int by_weight) {
    static const int shifts[3] = {FIRST_SHIFT, SECOND_SHIFT, 0};
    uint32_t last = 0, known = 0;
    for (int digit = 0; digit < 3; digit++) {
        int shift = shifts[digit];
        uint32_t low = digit == 2 ? (1u << SECOND_SHIFT) - 1 : N_BINS - 1, bin = low;
        memset(s->bins, 0, sizeof s->bins);
        for (int32_t i = 0; i < n; i++) {
            uint32_t key = dsv4_order_key(v[s->kept[i]]);
            if ((key & known) == last)
                s->bins[key >> shift & low] += share(s, s->kept[i], by_weight);
        }
        for (; s->bins[bin] < target; bin--)
            target -= s->bins[bin];
        last |= bin << shift;
        known |= low << shift;
    }
    int32_t n_left = 0;
    for (int32_t i = 0; i < n; i++) {
        int32_t id = s->kept[i];
        uint32_t key = dsv4_order_key(v[id]);
        if (key < last || (key == last && target == 0))
            continue;
        if (key == last) {
            uint64_t part = share(s, id, by_weight);
            target -= part < target ? part : target;
        }
        s->kept[n_left++] = id;
    }
    return n_left;
}

static uint64_t sum_kept(const dsv4_sampler *s, int32_t n) {
    uint64_t total = 0;
    for (int32_t i = 0; i < n; i++)
        total += s->weights[s->kept[i]];
    return total;
}

/* Applies top_k and top_p to the tokens with a weight: kept, *total; returns how many stay. */
static int32_t filter(dsv4_sampler *s, const float *v, uint64_t *total) {
    int32_t n = 0;
    for (int32_t id = 0; id < s->vocab; id++) {
        if (s->weights[id])
            s->kept[n++] = id;
    }
    if (s->p.top_k > 0 && s->p.top_k < n) {
        n = keep_best(s, v, n, (uint64_t)s->p.top_k, 0);
        *total = sum_kept(s, n);
    }
    if (s->p.top_p < 1.0f) {
        n = keep_best(s, v, n, dsv4_top_p_target(s->p.top_p, *total), 1);
        *total = sum_kept(s, n);
    }
    return n;
}

/* ------------------------------------------------------------------------------------- the draw */

static int32_t choose(dsv4_sampler *s, const float *v, int64_t position) {
    int32_t best = best_of(v, s->vocab), n = s->vocab;
    if (s->p.temperature == 0.0f)
        return best;
    uint64_t total = weigh(s, v, v[best]);
    if (s->kept)
        n = filter(s, v, &total);
    uint64_t left = dsv4_draw_below(s->p.seed, s->p.choice, position, total);
    for (int32_t i = 0; i < n; i++) {
        int32_t id = s->kept ? s->kept[i] : i;
        if (left < s->weights[id])
            return id;
        left -= s->weights[id];
    }
    return best; /* nothing has a weight: the highest value is infinite */
}

/* -------------------------------------------------------------------------- edits of the logits */

/* Whether no stop id may come yet. */
static int is_too_short(const dsv4_sampler *s) {
    return s->n_output < s->p.min_new_tokens && s->p.n_stop_ids > 0;
}

/* The values of all tokens: the logits themselves when nothing edits them. */
static const float *edit(dsv4_sampler *s, const float *logits) {
    const struct dsv4_sampling *p = &s->p;
    int too_short = is_too_short(s);
    float *v = s->values;
    if (!too_short && p->n_bias == 0 && s->n_seen == 0)
        return logits;
    memcpy(v, logits, (size_t)s->vocab * sizeof *v);
    for (int32_t i = 0; i < p->n_bias; i++)
        v[p->bias_ids[i]] += p->bias_values[i];
    for (int32_t i = 0; too_short && i < p->n_stop_ids; i++)
        v[p->stop_ids[i]] = -HUGE_VALF;
    for (int32_t i = 0; i < s->n_seen; i++) {
        int32_t id = s->seen[i];
        v[id] = dsv4_penalised(v[id], s->n_produced[id], p->repetition_penalty,
                               p->frequency_penalty, p->presence_penalty);
    }
    return v;
}

void dsv4_sampler_seen(dsv4_sampler *s, const int32_t *ids, int32_t n, int is_prompt) {
    if (!is_prompt)
        s->n_output += n;
    if (!s->seen)
        return;
    for (int32_t i = 0; i < n; i++) {
        int32_t id = ids[i];
        if (!s->was_seen[id]) {
            s->was_seen[id] = 1;
            s->seen[s->n_seen++] = id;
        }
        if (!is_prompt && s->n_produced[id] < INT32_MAX)
            s->n_produced[id]++;
    }
}

static enum dsv4_finish finish_after(const dsv4_sampler *s, int32_t token) {
    const struct dsv4_sampling *p = &s->p;
    int may_stop = s->n_output >= p->min_new_tokens && s->n_output >= p->n_force;
    for (int32_t i = 0; may_stop && i < p->n_stop_ids; i++) {
        if (p->stop_ids[i] == token)
            return DSV4_FINISH_STOP;
    }
    if (p->max_new_tokens >= 0 && s->n_output >= p->max_new_tokens)
        return DSV4_FINISH_LENGTH;
    return DSV4_FINISH_NONE;
}

void dsv4_sampler_sample(dsv4_sampler *s, const float *logits, int64_t position,
                         struct dsv4_sample *out) {
    const struct dsv4_sampling *p = &s->p;
    int32_t token;
    float logprob = 0.0f;
    if (s->n_output < p->n_force)
        token = p->force[s->n_output];
    else
        token = choose(s, edit(s, logits), position);
    if (p->logprobs >= 0)
        logprob = dsv4_logprobs(s->top_ids, s->top_logprobs, logits, s->vocab, token, p->logprobs);
    dsv4_sampler_take(s, token, logprob, s->top_ids, s->top_logprobs, out);
}

/* -------------------------------------------------------------------- a choice made elsewhere */

/* Copies n elements of 4 bytes; the address after them. */
static int32_t *put(int32_t *to, const void *from, int32_t n) {
    if (n > 0)
        memcpy(to, from, (size_t)n * sizeof *to);
    return to + n;
}

int32_t dsv4_sampler_pack(const dsv4_sampler *s, int64_t position, struct dsv4_draw *out,
                          int32_t *lists, int32_t room) {
    const struct dsv4_sampling *p = &s->p;
    int forced = s->n_output < p->n_force;
    *out = (struct dsv4_draw){.seed = p->seed,
                              .position = position,
                              .temperature = p->temperature,
                              .top_p = p->top_p,
                              .min_p = p->min_p,
                              .repetition = p->repetition_penalty,
                              .frequency = p->frequency_penalty,
                              .presence = p->presence_penalty,
                              .choice = p->choice,
                              .top_k = p->top_k,
                              .forced = forced ? p->force[s->n_output] : -1,
                              .logprobs = p->logprobs,
                              .n_bias = forced ? 0 : p->n_bias,
                              .n_stop = !forced && is_too_short(s) ? p->n_stop_ids : 0,
                              .n_seen = forced ? 0 : s->n_seen};
    int64_t wanted = 2 * ((int64_t)out->n_bias + out->n_seen) + out->n_stop;
    if (wanted > room)
        return -1;
    lists = put(lists, p->bias_ids, out->n_bias);
    lists = put(lists, p->bias_values, out->n_bias);
    lists = put(lists, p->stop_ids, out->n_stop);
    lists = put(lists, s->seen, out->n_seen);
    for (int32_t i = 0; i < out->n_seen; i++)
        lists[i] = s->n_produced[s->seen[i]];
    return (int32_t)wanted;
}

void dsv4_sampler_take(dsv4_sampler *s, int32_t token, float logprob, const int32_t *top_ids,
                       const float *top_logprobs, struct dsv4_sample *out) {
    int32_t k = s->p.logprobs > 0 ? s->p.logprobs : 0;
    if (top_ids != s->top_ids) {
        put(s->top_ids, top_ids, k);
        memcpy(s->top_logprobs, top_logprobs, (size_t)k * sizeof *top_logprobs);
    }
    *out = (struct dsv4_sample){.token = token,
                                .logprob = logprob,
                                .n_top = k,
                                .top_ids = s->top_ids,
                                .top_logprobs = s->top_logprobs};
    dsv4_sampler_seen(s, &token, 1, 0);
    out->finish = finish_after(s, token);
}

/* ---------------------------------------------------------------------------- log-probabilities */

/* Restores the heap below node i of n ids, the worst at the root. */
static void sift_down(int32_t *ids, const float *v, int32_t i, int32_t n) {
    int32_t id = ids[i];
    uint64_t rank = order_rank(v, id);
    for (int32_t child = i; (child = 2 * child + 1) < n; i = child) {
        if (child + 1 < n && order_rank(v, ids[child + 1]) < order_rank(v, ids[child]))
            child++;
        if (order_rank(v, ids[child]) > rank)
            break;
        ids[i] = ids[child];
    }
    ids[i] = id;
}

/* The k best of v [n], best first. */
static void best_first(int32_t *ids, const float *v, int32_t n, int32_t k) {
    for (int32_t i = 0; i < k; i++)
        ids[i] = i;
    for (int32_t i = k / 2; i-- > 0;)
        sift_down(ids, v, i, k);
    uint64_t worst_rank = order_rank(v, ids[0]);
    for (int32_t id = k; id < n; id++) {
        if (order_rank(v, id) > worst_rank) {
            ids[0] = id;
            sift_down(ids, v, 0, k);
            worst_rank = order_rank(v, ids[0]);
        }
    }
    for (int32_t left = k - 1; left > 0; left--) {
        int32_t worst = ids[0];
        ids[0] = ids[left];
        ids[left] = worst;
        sift_down(ids, v, 0, left);
    }
}

float dsv4_logprobs(int32_t *ids, float *logprobs, const float *logits, int32_t vocab, int32_t id,
                    int32_t k) {
    double high = (double)logits[best_of(logits, vocab)];
    uint64_t total = 0;
    for (int32_t i = 0; i < vocab; i++)
        total += dsv4_softmax_weight((double)logits[i] - high);
    double log_sum = dsv4_log_sum(total);
    if (k > 0) {
        best_first(ids, logits, vocab, k);
        for (int32_t i = 0; i < k; i++)
            logprobs[i] = dsv4_logprob(logits[ids[i]], high, log_sum);
    }
    return dsv4_logprob(logits[id], high, log_sum);
}

/* ------------------------------------------------------------------------------------- creation */

static dsv4_status check_real(dsv4_error *err, const char *name, float got, float low, float high) {
    if (got >= low && got <= high)
        return DSV4_OK;
    return dsv4_fail(err, DSV4_E_ARGUMENT, "%s: got %g, wanted %g to %g", name, (double)got,
                     (double)low, (double)high);
}

static dsv4_status check_positive(dsv4_error *err, const char *name, float got, float high) {
    if (got > 0.0f && got <= high)
        return DSV4_OK;
    return dsv4_fail(err, DSV4_E_ARGUMENT, "%s: got %g, wanted above 0, up to %g", name,
                     (double)got, (double)high);
}

static dsv4_status check_count(dsv4_error *err, const char *name, int32_t got, int32_t low,
                               int32_t high) {
    if (got >= low && got <= high)
        return DSV4_OK;
    return dsv4_fail(err, DSV4_E_ARGUMENT, "%s: got %d, wanted %d to %d", name, (int)got, (int)low,
                     (int)high);
}

static dsv4_status check_ids(dsv4_error *err, const char *name, const int32_t *ids, int32_t n,
                             int32_t vocab) {
    if (n < 0 || (n > 0 && !ids))
        return dsv4_fail(err, DSV4_E_ARGUMENT, "%s: got %d ids%s, wanted 0 or more", name, (int)n,
                         n > 0 ? " and no array" : "");
    for (int32_t i = 0; i < n; i++) {
        if (ids[i] < 0 || ids[i] >= vocab)
            return dsv4_fail(err, DSV4_E_ARGUMENT, "%s[%d]: got %d, wanted a token id from 0 to %d",
                             name, (int)i, (int)ids[i], (int)vocab - 1);
    }
    return DSV4_OK;
}

static dsv4_status check_all(const struct dsv4_sampling *p, int32_t vocab, dsv4_error *err) {
    DSV4_TRY(check_count(err, "vocab", vocab, 1, DSV4_SAMPLER_MAX_VOCAB));
    DSV4_TRY(check_real(err, "temperature", p->temperature, 0.0f, 100.0f));
    DSV4_TRY(check_positive(err, "top_p", p->top_p, 1.0f));
    DSV4_TRY(check_real(err, "min_p", p->min_p, 0.0f, 1.0f));
    DSV4_TRY(check_real(err, "presence_penalty", p->presence_penalty, -2.0f, 2.0f));
    DSV4_TRY(check_real(err, "frequency_penalty", p->frequency_penalty, -2.0f, 2.0f));
    DSV4_TRY(check_positive(err, "repetition_penalty", p->repetition_penalty, 100.0f));
    DSV4_TRY(check_count(err, "top_k", p->top_k, 0, INT32_MAX));
    DSV4_TRY(check_count(err, "logprobs", p->logprobs, -1, vocab));
    DSV4_TRY(check_count(err, "min_new_tokens", p->min_new_tokens, 0, INT32_MAX));
    DSV4_TRY(check_count(err, "max_new_tokens", p->max_new_tokens, -1, INT32_MAX));
    if (p->max_new_tokens >= 0 && p->max_new_tokens < p->min_new_tokens)
        return dsv4_fail(err, DSV4_E_ARGUMENT,
                         "max_new_tokens: got %d, wanted -1 or at least min_new_tokens, %d",
                         (int)p->max_new_tokens, (int)p->min_new_tokens);
    DSV4_TRY(check_ids(err, "stop_ids", p->stop_ids, p->n_stop_ids, vocab));
    DSV4_TRY(check_ids(err, "force", p->force, p->n_force, vocab));
    DSV4_TRY(check_ids(err, "bias_ids", p->bias_ids, p->n_bias, vocab));
    if (p->n_bias > 0 && !p->bias_values)
        return dsv4_fail(err, DSV4_E_ARGUMENT,
                         "bias_values: got none, wanted %d, one for each bias id", (int)p->n_bias);
    for (int32_t i = 0; i < p->n_bias; i++) {
        if (!(p->bias_values[i] <= 1e30f))
            return dsv4_fail(err, DSV4_E_ARGUMENT, "bias_values[%d]: got %g, wanted -inf to 1e+30",
                             (int)i, (double)p->bias_values[i]);
    }
    return DSV4_OK;
}

/* *out = n elements, copied or zero if from is NULL, or NULL if n <= 0; returns 0 out of memory. */
static int own(void *out, const void *from, int32_t n, size_t size) {
    void *copy = n > 0 ? calloc((size_t)n, size) : NULL;
    if (copy && from)
        memcpy(copy, from, (size_t)n * size);
    memcpy(out, &copy, sizeof copy);
    return n <= 0 || copy != NULL;
}

struct bias {
    int32_t id, at;
    float value;
};

static int by_id(const void *a, const void *b) {
    const struct bias *x = a, *y = b;
    return x->id != y->id ? (x->id > y->id) - (x->id < y->id) : x->at - y->at;
}

/* Biases by ascending id, those of one id in their order; returns 0 out of memory. */
static int sort_biases(struct dsv4_sampling *p, const int32_t *ids, const float *values) {
    size_t n = (size_t)p->n_bias;
    struct bias *list = malloc((n + 1) * sizeof *list);
    int32_t *sorted_ids = malloc((n + 1) * sizeof *sorted_ids);
    float *sorted_values = malloc((n + 1) * sizeof *sorted_values);
    for (size_t i = 0; list && i < n; i++)
        list[i] = (struct bias){ids[i], (int32_t)i, values[i]};
    if (list)
        qsort(list, n, sizeof *list, by_id);
    for (size_t i = 0; list && sorted_ids && sorted_values && i < n; i++) {
        sorted_ids[i] = list[i].id;
        sorted_values[i] = list[i].value;
    }
    int there = list && sorted_ids && sorted_values;
    free(list);
    p->bias_ids = sorted_ids;
    p->bias_values = sorted_values;
    return there;
}

dsv4_status dsv4_sampler_create(dsv4_sampler **out, int32_t vocab,
                                const struct dsv4_sampling *params, dsv4_error *err) {
    DSV4_TRY(check_all(params, vocab, err));
    dsv4_sampler *s = calloc(1, sizeof *s);
    if (!s)
        return dsv4_fail(err, DSV4_E_MEMORY, "sampler: no memory for %zu bytes", sizeof *s);
    struct dsv4_sampling *p = &s->p;
    *p = *params;
    s->vocab = vocab;
    int penalties = p->repetition_penalty != 1.0f || p->frequency_penalty != 0.0f ||
                    p->presence_penalty != 0.0f;
    int edits = penalties || p->n_bias > 0 || (p->min_new_tokens > 0 && p->n_stop_ids > 0);
    int draws = p->temperature > 0.0f, filters = draws && (p->top_k > 0 || p->top_p < 1.0f);
    /* Every one is called, so that each pointer is owned or NULL when the sampler is destroyed. */
    int there = own(&p->stop_ids, p->stop_ids, p->n_stop_ids, sizeof *p->stop_ids);
    there &= sort_biases(p, params->bias_ids, params->bias_values);
    there &= own(&p->force, p->force, p->n_force, sizeof *p->force);
    there &= own(&s->values, NULL, edits ? vocab : 0, sizeof *s->values);
    there &= own(&s->weights, NULL, draws ? vocab : 0, sizeof *s->weights);
    there &= own(&s->kept, NULL, filters ? vocab : 0, sizeof *s->kept);
    there &= own(&s->n_produced, NULL, penalties ? vocab : 0, sizeof *s->n_produced);
    there &= own(&s->was_seen, NULL, penalties ? vocab : 0, sizeof *s->was_seen);
    there &= own(&s->seen, NULL, penalties ? vocab : 0, sizeof *s->seen);
    there &= own(&s->top_ids, NULL, p->logprobs, sizeof *s->top_ids);
    there &= own(&s->top_logprobs, NULL, p->logprobs, sizeof *s->top_logprobs);
    if (!there) {
        dsv4_sampler_destroy(s);
        return dsv4_fail(err, DSV4_E_MEMORY,
                         "sampler: no memory for the work space of a vocabulary of %d", (int)vocab);
    }
    *out = s;
    return DSV4_OK;
}

void dsv4_sampler_destroy(dsv4_sampler *s) {
    if (!s)
        return;
    free((void *)s->p.stop_ids);
    free((void *)s->p.bias_ids);
    free((void *)s->p.bias_values);
    free((void *)s->p.force);
    free(s->values);
    free(s->weights);
    free(s->kept);
    free(s->n_produced);
    free(s->was_seen);
    free(s->seen);
    free(s->top_ids);
    free(s->top_logprobs);
    free(s);
}
