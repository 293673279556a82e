/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sampling: one row of f32 logits -> one token id, its log-probability and the reason to stop.
 *
 * The same (seed, choice, position, logits) gives the same token on every CPU, whatever was sampled
 * before: there is no generator state, only the counts that the penalties need.
 *
 *  1. The value of a token is its logit, + bias; -inf for stop ids while fewer than min_new_tokens
 *     were produced; then the penalties, all in f32:
 *       in prompt or output   v = v > 0 ? v / repetition : v * repetition
 *       produced c > 0 times  v = v - frequency * c, then v = v - presence
 *     A NaN counts as -inf.  "Best" always means higher value, then lower id.
 *  2. temperature 0: the best token.  Otherwise the weight of a token is the integer
 *       w = floor(2^42 * exp((v - v_max) / temperature)),
 *     evaluated in double with plain multiplications and additions.  A token below 2^-42 of the
 *     highest probability has weight 0 and is never drawn.
 *  3. The filters narrow the tokens in this order, each working on what the one before left:
 *       min_p  keeps probabilities of at least min_p times the highest one;
 *       top_k  keeps the k best, never more;
 *       top_p  keeps the shortest run of the best whose renormalised probabilities reach top_p.
 *     Sums of weights are exact 64-bit integers and so do not depend on their order: top_p is what
 *     a stable sort and a running sum give, found without sorting.
 *  4. The draw: Philox 4x32-10 with counter (position low, position high, choice, 0) and key (seed
 *     low, seed high); output words 0 and 1 are the low and high half of r.  The token is the first
 *     of those kept, by ascending id, whose running sum is above floor(r * total / 2^64).
 * When the highest value is infinite, there are no weights and the best token is taken.
 *
 * Log-probabilities are the log-softmax of the raw logits, before 1., as vLLM's are by default.
 *
 * Not thread-safe on one sampler; distinct samplers are independent.  Refuses values out of range
 * at create; nothing fails or allocates after that.  Source: SPEC 7.5; the order of steps is
 * vLLM's.
 */
#ifndef DSV4_SAMPLER_H
#define DSV4_SAMPLER_H

#include "core/status.h"

#include <stdint.h>

enum { DSV4_SAMPLER_MAX_VOCAB = 1 << 20 }; /* 2^20 weights of 2^42 stay below 2^63 */

struct dsv4_sampling {
    uint64_t seed;
    float temperature;        /* 0 to 100; 0 = greedy */
    float top_p;              /* above 0, to 1; 1 = off */
    float min_p;              /* 0 to 1; 0 = off */
    float presence_penalty;   /* -2 to 2; 0 = off */
    float frequency_penalty;  /* -2 to 2; 0 = off */
    float repetition_penalty; /* above 0, to 100; 1 = off */
    int32_t top_k;            /* 0 or more; 0 = off */
    int32_t logprobs;         /* -1 = none, else how many alternatives, up to the vocabulary */
    int32_t min_new_tokens;   /* 0 or more */
    int32_t max_new_tokens;   /* -1 = no limit; at least min_new_tokens */
    uint32_t choice;          /* which of n answers to the same prompt this is */
    /* Arrays are borrowed during create.  EOS ends an answer only as one of the stop ids. */
    const int32_t *stop_ids;  /* [n_stop_ids] */
    const int32_t *bias_ids;  /* [n_bias]; an id named twice gets both */
    const float *bias_values; /* [n_bias], -inf (never) to 1e30 */
    const int32_t *force;     /* [n_force] tokens produced first, whatever the logits say */
    int32_t n_stop_ids, n_bias, n_force;
};

enum dsv4_finish { DSV4_FINISH_NONE = 0, DSV4_FINISH_STOP = 1, DSV4_FINISH_LENGTH = 2 };

struct dsv4_sample {
    int32_t token;
    float logprob; /* 0 with logprobs = -1 */
    /*
     * STOP: the token is a stop id, at least min_new_tokens are there and none is left to force.
     * LENGTH: otherwise, when max_new_tokens are there.
     */
    enum dsv4_finish finish;
    int32_t n_top;             /* alternatives: logprobs, or 0 with -1 */
    const int32_t *top_ids;    /* borrowed: valid until the next sample; best first */
    const float *top_logprobs; /* borrowed: likewise */
};

typedef struct dsv4_sampler dsv4_sampler;

/*
 * Copies the parameters.  Work space for each vocabulary entry: 25 bytes at most, 8 for temperature
 * alone, none for greedy.
 */
dsv4_status dsv4_sampler_create(dsv4_sampler **out, int32_t vocab,
                                const struct dsv4_sampling *params, dsv4_error *err);
void dsv4_sampler_destroy(dsv4_sampler *s); /* NULL is allowed */

/*
 * Takes note of tokens that the sampler did not produce itself: the prompt, or, with is_prompt = 0,
 * output made earlier (a session being resumed), which counts for every limit and penalty.  Ids in
 * [0, vocab).
 */
void dsv4_sampler_seen(dsv4_sampler *s, const int32_t *ids, int32_t n, int is_prompt);

/* The token that follows `logits` [vocab] and will stand at `position`; takes note of it. */
void dsv4_sampler_sample(dsv4_sampler *s, const float *logits, int64_t position,
                         struct dsv4_sample *out);

struct dsv4_draw; /* kernels/sampling.h */

/*
 * What dsv4_sampler_sample would choose at `position`, for whoever chooses elsewhere: *out and its
 * lists, of which there may be `room` int32.  Returns how many it took, or -1 if there are more.
 */
int32_t dsv4_sampler_pack(const dsv4_sampler *s, int64_t position, struct dsv4_draw *out,
                          int32_t *lists, int32_t room);
/* Takes note of that choice; arrays [logprobs] as dsv4_logprobs gives them. */
void dsv4_sampler_take(dsv4_sampler *s, int32_t token, float logprob, const int32_t *top_ids,
                       const float *top_logprobs, struct dsv4_sample *out);

/*
 * log-softmax of logits [vocab] at id (returned) and at the k best ids, best first (ids [k],
 * logprobs [k]; both may be NULL with k = 0), k <= vocab <= DSV4_SAMPLER_MAX_VOCAB: l - l_max -
 * log(sum), the sum of weights as in 2. at temperature 1, the logarithm in f32, the difference in
 * double.  NaN if the highest logit is not finite.
 */
float dsv4_logprobs(int32_t *ids, float *logprobs, const float *logits, int32_t vocab, int32_t id,
                    int32_t k);

#endif
