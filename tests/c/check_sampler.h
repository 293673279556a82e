/* SPDX-License-Identifier: Apache-2.0 */
/* What the checks of the sampler share: samplers, settings, rows of logits, log-probabilities. */
#ifndef CHECK_SAMPLER_H
#define CHECK_SAMPLER_H

#include "check.h"

#include "gen/sampler.h"
#include "sampling.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { SMALL_VOCAB = 1500, LARGE_VOCAB = 129280 };

static inline struct dsv4_sampling plain(void) {
    return (struct dsv4_sampling){.temperature = 1.0f,
                                  .top_p = 1.0f,
                                  .repetition_penalty = 1.0f,
                                  .logprobs = -1,
                                  .max_new_tokens = -1};
}

static inline dsv4_sampler *make(int32_t vocab, const struct dsv4_sampling *p) {
    dsv4_sampler *s = NULL;
    dsv4_error err = {.message = ""};
    check_true(dsv4_sampler_create(&s, vocab, p, &err) == DSV4_OK, "create: %s", err.message);
    return s;
}

static inline int32_t token_at(dsv4_sampler *s, const float *logits, int64_t position) {
    struct dsv4_sample out;
    dsv4_sampler_sample(s, logits, position, &out);
    return out.token;
}

#define PICK(...) pick((const float[]){__VA_ARGS__}, sizeof (float[]){__VA_ARGS__} / sizeof(float))
static inline float pick(const float *list, size_t n) {
    return list[check_below((uint32_t)n)];
}

/* Every other one among the first twenty, so that they meet. */
static inline int32_t *random_ids(int32_t n, int32_t vocab) {
    int32_t *ids = check_bytes((size_t)n * sizeof *ids);
    for (int32_t i = 0; i < n; i++)
        ids[i] = (int32_t)check_below((uint32_t)(vocab < 20 || check_below(2) ? vocab : 20));
    return ids;
}

static inline void random_biases(struct dsv4_sampling *p, int32_t n, int32_t vocab) {
    float *values = check_bytes((size_t)n * sizeof *values);
    for (int32_t i = 0; i < n; i++)
        values[i] = PICK(-INFINITY, -100.0f, 0.5f, 0.1f, 5.0f, 100.0f, 1e30f);
    p->n_bias = n;
    p->bias_ids = random_ids(n, vocab);
    p->bias_values = values;
}

static inline struct dsv4_sampling random_settings(int32_t vocab) {
    struct dsv4_sampling p = plain();
    p.seed = check_random();
    p.choice = check_below(3);
    p.temperature = PICK(0.0f, 0.3f, 1.0f, 1.0f, 2.5f, 100.0f, 1e-30f);
    p.top_p = PICK(1.0f, 1.0f, 0.999f, 0.9f, 0.5f, 1e-6f, 1e-40f, 0x1.fffffep-1f);
    p.min_p = PICK(0.0f, 0.0f, 1e-3f, 0.3f, 1.0f);
    p.top_k = (int32_t[]){0, 0, 1, 2, 20, vocab, INT32_MAX}[check_below(7)];
    p.logprobs = (int32_t[]){-1, 0, 1, 5, vocab}[check_below(5)];
    p.logprobs = p.logprobs < vocab ? p.logprobs : vocab;
    if (check_below(2)) {
        p.repetition_penalty = PICK(1.0f, 1.3f, 0.5f, 100.0f);
        p.frequency_penalty = PICK(0.0f, 0.7f, -0.4f, 2.0f);
        p.presence_penalty = PICK(0.0f, 0.3f, -2.0f, 1.5f);
    }
    p.min_new_tokens = (int32_t)check_below(4);
    p.max_new_tokens = check_below(2) ? -1 : p.min_new_tokens + (int32_t)check_below(4);
    p.n_stop_ids = (int32_t)check_below(4);
    p.stop_ids = random_ids(p.n_stop_ids, vocab);
    p.n_force = check_below(3) ? 0 : (int32_t)check_below(4);
    p.force = random_ids(p.n_force, vocab);
    random_biases(&p, check_below(2) ? 0 : (int32_t)check_below(8), vocab);
    return p;
}

/* log(sum of exp(l - l_max)) of a row in double. */
struct log_sum {
    double high, sum, log;
    int32_t vocab;
};

static inline struct log_sum log_sum_of(const float *logits, int32_t vocab) {
    struct log_sum l = {-INFINITY, 0, 0, vocab};
    for (int32_t i = 0; i < vocab; i++)
        l.high = (double)logits[i] > l.high ? (double)logits[i] : l.high;
    for (int32_t i = 0; i < vocab; i++)
        l.sum += isnan(logits[i]) ? 0 : exp((double)logits[i] - l.high);
    l.log = log(l.sum);
    return l;
}

/*
 * The bound: the sum's rounding to f32, half an ulp; the f32 logarithm, 0.92 ulp; the weights' last
 * place, 2^-42 each; the result's rounding, half an ulp.
 */
static inline void check_logprob(float got, const struct log_sum *l, float logit) {
    double want = (double)logit - l->high - l->log;
    if (!isfinite(l->high) || isnan(logit)) {
        check_true(isnan(got), "log-probability %g, wanted NaN", (double)got);
        return;
    }
    double bound = 0x1p-24 * (fmin(l->sum - 1, 1) + 2 * l->log + fabs(want)) + 0x1p-42 * l->vocab;
    check_true(got == (float)want || fabs((double)got - want) <= bound,
               "log-probability %.9g, wanted %.9g +- %.2g", (double)got, want, bound);
}

enum row_kind {
    NORMAL,
    EQUAL,
    TIES,
    ZEROS,
    HOLES,
    NANS,
    HUGE_ROW,
    PEAK,
    ALL_MINUS_INF,
    ALL_NAN,
    PLUS_INF,
    ROW_KINDS
};

static inline float row_value(enum row_kind kind) {
    float x = 4 * check_normal();
    switch (kind) {
    case EQUAL:
        return -3.25f;
    case TIES:
        return (float)check_below(5);
    case ZEROS:
        return check_below(2) ? 0.0f : -0.0f;
    case HOLES:
        return check_below(3) ? x : -INFINITY;
    case NANS:
        return check_below(3) ? x : NAN;
    case HUGE_ROW:
        return x * 2e37f;
    case PEAK:
        return check_below(50) ? x : 60.0f + x;
    case ALL_MINUS_INF:
        return -INFINITY;
    case ALL_NAN:
        return NAN;
    case PLUS_INF:
        return check_below(4) ? x : INFINITY;
    default:
        return x;
    }
}

static inline void fill_row(float *row, int32_t vocab, enum row_kind kind) {
    for (int32_t i = 0; i < vocab; i++)
        row[i] = row_value(kind);
}

#endif
