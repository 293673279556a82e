/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The sampler of sampler.h.  One pass turns logits into integer weights; each filter is a radix
 * select over the ids that are left (three passes at most, no sort, no bad case); the draw is one
 * more pass.
 */
#include "gen/sampler.h"

#include "functions.h"

#include <stdlib.h>

/* Widths of the three digits that a 32-bit key is cut into, from the top: 11, 11, 10. */
enum { FIRST_SHIFT = 21, SECOND_SHIFT = 10, N_BINS = 1 << 11 };

#define ONE 0x1p42 /* the weight of the best token */

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

void dsv4_philox(uint32_t out[4], const uint32_t counter[4], const uint32_t key[2]) {
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xd2511f53u * c0, b = (uint64_t)0xcd9e8d57u * c2;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)b;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)a;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

/* ---------------------------------------------------------------------------- order and weights */

/* Unsigned keys in the order of the floats; -0 equals +0, a NaN equals -infinity. */
static uint32_t order_key(float v) {
    uint32_t u = dsv4_f32_bits(v + 0.0f);
    if (v != v)
        return 0x007fffffu;
    return u ^ ((0u - (u >> 31)) | 0x80000000u); /* negative: all bits, else the sign bit */
}

/* Distinct for distinct ids; the better token has the higher rank. */
static uint64_t order_rank(const float *v, int32_t id) {
    return (uint64_t)order_key(v[id]) << 32 | (0xffffffffu - (uint32_t)id);
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

/*
 * exp(x) = 2^n * exp(r) with the Taylor series to r^11, |r| < 0.347: the next term is below 2^-47.
 * Not dsv4_expf: its fused multiply-adds are library calls in files that are compiled for every
 * CPU, and cost three times as much over a row.
 */
uint64_t dsv4_softmax_weight(double x) {
    x = x > -29.2 ? x : -29.2; /* exp(-29.2) < 2^-42: all from here down have weight 0 */
    double t = x * 0x1.71547652b82fep0 + DSV4_ROUND_F64, n = t - DSV4_ROUND_F64;
    double r = x - n * 0x1.62e42fefa0000p-1; /* 37 bits of ln 2: the product is exact */
    r -= n * 0x1.cf79abc9e3b3ap-40;
    double p = 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    /* The low bits of t are n in two's complement: shifted, the exponent field of 2^(42 + n). */
    return (uint64_t)(int64_t)(p * dsv4_f64_from_bits((dsv4_f64_bits(t) + 42 + 1023) << 52));
}

/* Weights of all tokens that reach min_p, zero for the others; returns their sum. */
static uint64_t weigh(dsv4_sampler *s, const float *v, float max) {
    double inverse = 1.0 / (double)s->p.temperature, high = (double)max;
    uint64_t total = 0, least = (uint64_t)(int64_t)((double)s->p.min_p * ONE);
    if ((double)least < (double)s->p.min_p * ONE)
        least++;
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
            uint32_t key = order_key(v[s->kept[i]]);
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
        uint32_t key = order_key(v[id]);
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
        double part = (double)s->p.top_p * (double)*total;
        uint64_t target = (uint64_t)(int64_t)part;
        if ((double)target < part)
            target++;
        n = keep_best(s, v, n, target, 1);
        *total = sum_kept(s, n);
    }
    return n;
}

/* ------------------------------------------------------------------------------------- the draw */

/* floor(r * total / 2^64), r the 64 random bits of this answer and position. */
static uint64_t draw_below(const dsv4_sampler *s, int64_t position, uint64_t total) {
    __extension__ typedef unsigned __int128 wide;
    const uint32_t counter[4] = {(uint32_t)position, (uint32_t)((uint64_t)position >> 32),
                                 s->p.choice, 0};
    const uint32_t key[2] = {(uint32_t)s->p.seed, (uint32_t)(s->p.seed >> 32)};
    uint32_t r[4];
    dsv4_philox(r, counter, key);
    return (uint64_t)((wide)((uint64_t)r[1] << 32 | r[0]) * total >> 64);
}

static int32_t choose(dsv4_sampler *s, const float *v, int64_t position) {
    int32_t best = best_of(v, s->vocab), n = s->vocab;
    if (s->p.temperature == 0.0f)
        return best;
    uint64_t total = weigh(s, v, v[best]);
    if (s->kept)
        n = filter(s, v, &total);
    uint64_t left = draw_below(s, position, total);
    for (int32_t i = 0; i < n; i++) {
        int32_t id = s->kept ? s->kept[i] : i;
        if (left < s->weights[id])
            return id;
        left -= s->weights[id];
    }
    return best; /* nothing has a weight: the highest value is infinite */
}

/* -------------------------------------------------------------------------- edits of the logits */

/* The values of all tokens: the logits themselves when nothing edits them. */
static const float *edit(dsv4_sampler *s, const float *logits) {
    const struct dsv4_sampling *p = &s->p;
    int too_short = s->n_output < p->min_new_tokens && p->n_stop_ids > 0;
    float *v = s->values;
    if (!too_short && p->n_bias == 0 && s->n_seen == 0)
        return logits;
    memcpy(v, logits, (size_t)s->vocab * sizeof *v);
    for (int32_t i = 0; i < p->n_bias; i++)
        v[p->bias_ids[i]] += p->bias_values[i];
    for (int32_t i = 0; too_short && i < p->n_stop_ids; i++)
        v[p->stop_ids[i]] = -HUGE_VALF;
    for (int32_t i = 0; i < s->n_seen; i++) {
        int32_t id = s->seen[i], count = s->n_produced[id];
        float x = v[id];
        x = x > 0.0f ? x / p->repetition_penalty : x * p->repetition_penalty;
        x -= p->frequency_penalty * (float)count;
        x -= count > 0 ? p->presence_penalty : 0.0f;
        v[id] = x;
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
    int32_t token, k = p->logprobs;
    if (s->n_output < p->n_force)
        token = p->force[s->n_output];
    else
        token = choose(s, edit(s, logits), position);
    *out = (struct dsv4_sample){.token = token};
    if (k >= 0) {
        out->logprob = dsv4_logprobs(s->top_ids, s->top_logprobs, logits, s->vocab, token, k);
        out->n_top = k;
        out->top_ids = s->top_ids;
        out->top_logprobs = s->top_logprobs;
    }
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
    /* log1p, since f32 would lose a small rest beside the best token's 1. */
    double log_sum = (double)dsv4_log1pf((float)((double)total / ONE - 1.0));
    if (k > 0) {
        best_first(ids, logits, vocab, k);
        for (int32_t i = 0; i < k; i++)
            logprobs[i] = (float)((double)logits[ids[i]] - high - log_sum);
    }
    return (float)((double)logits[id] - high - log_sum);
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
    there &= own(&p->bias_ids, p->bias_ids, p->n_bias, sizeof *p->bias_ids);
    there &= own(&p->bias_values, p->bias_values, p->n_bias, sizeof *p->bias_values);
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
