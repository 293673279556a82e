/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the sampler draws: against the softmax by counting, at every size, whatever it drew before,
 * and against a checksum that is the same on every machine.
 */
#include "check_sampler.h"

/* -------------------------------------------------------------------------------------- counting
 */

/* Counts against probabilities: chi-square within six deviations; what has none must not occur. */
static void check_counts(const char *what, const int *counts, const double *prob, int32_t vocab,
                         int n_draw) {
    double chi = 0, rare = 0, rare_prob = 0, freedom = -1;
    for (int32_t id = 0; id < vocab; id++) {
        check_true(prob[id] > 0 || counts[id] == 0, "%s: token %d has no probability", what,
                   (int)id);
        double expected = prob[id] * n_draw;
        if (expected < 10) {
            rare += counts[id];
            rare_prob += prob[id];
            continue;
        }
        chi += (counts[id] - expected) * (counts[id] - expected) / expected;
        freedom++;
    }
    if (rare_prob * n_draw >= 10) {
        chi += (rare - rare_prob * n_draw) * (rare - rare_prob * n_draw) / (rare_prob * n_draw);
        freedom++;
    }
    check_true(freedom <= 0 ? chi < 1e-6 : chi < freedom + 6 * sqrt(2 * freedom) + 6,
               "%s: chi-square %.1f with %g degrees of freedom", what, chi, freedom);
}

/* Softmax at the temperature, narrowed to the n_best of the row (already sorted), renormalised. */
static void softmax(double *prob, const float *row, int32_t vocab, double temperature,
                    int32_t n_best) {
    double sum = 0;
    for (int32_t id = 0; id < vocab; id++) {
        prob[id] = id < n_best ? exp(((double)row[id] - (double)row[0]) / temperature) : 0;
        sum += prob[id];
    }
    for (int32_t id = 0; id < vocab; id++)
        prob[id] /= sum;
}

static void check_frequencies(void) {
    enum { VOCAB = 60, DRAWS = 10000 };
    static const struct {
        const char *name;
        float temperature, top_p, min_p;
        int32_t top_k, n_best; /* what must be left: worked out for logits 0, -0.1, -0.2, ... */
    } cases[] = {
        {"temperature 1", 1, 1, 0, 0, VOCAB},
        {"temperature 0.25", 0.25f, 1, 0, 0, VOCAB},
        {"temperature 3", 3, 1, 0, 0, VOCAB},
        {"top_k 7", 1, 1, 0, 7, 7},
        {"top_p 0.5", 1, 0.5f, 0, 0, 7},            /* 1 - e^(-n/10) >= 0.5 (1 - e^-6): n >= 6.91 */
        {"min_p 0.2", 1, 1, 0.2f, 0, 17},           /* e^(-n/10) >= 0.2: n <= 16.09, from 0 */
        {"top_k 10, top_p 0.5", 1, 0.5f, 0, 10, 4}, /* 1 - e^(-n/10) >= 0.5 (1 - e^-1): n >= 3.80 */
        {"min_p 0.5, top_p 0.8", 1, 0.8f, 0.5f, 0, 6}
        /* 7 stay; 1 - e^(-n/10) >= 0.8 (1 - e^-0.7) */
    };
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        for (int varied = 0; varied < 3; varied++) {
            struct dsv4_sampling p = plain();
            float row[VOCAB];
            double prob[VOCAB];
            int counts[VOCAB] = {0};
            for (int i = 0; i < VOCAB; i++)
                row[i] = 12.0f - 0.1f * (float)i;
            p.temperature = cases[c].temperature;
            p.top_p = cases[c].top_p;
            p.min_p = cases[c].min_p;
            p.top_k = cases[c].top_k;
            p.seed = check_random();
            dsv4_sampler *s = varied == 0 ? make(VOCAB, &p) : NULL;
            for (int i = 0; i < DRAWS; i++) {
                p.seed += varied == 1;
                p.choice += varied == 2;
                dsv4_sampler *one = s ? s : make(VOCAB, &p);
                counts[token_at(one, row, varied == 0 ? i : 1000)]++;
                if (one != s)
                    dsv4_sampler_destroy(one);
            }
            dsv4_sampler_destroy(s);
            softmax(prob, row, VOCAB, (double)p.temperature, cases[c].n_best);
            check_counts(cases[c].name, counts, prob, VOCAB, DRAWS);
        }
    }
}

/* -------------------------------------------------------------------------------- sizes and state
 */

/* Equal logits draw floor(r * vocab / 2^64), so every size is checked up to its last id. */
static void check_sizes(void) {
    static const int32_t sizes[] = {1, 2, 8191, 8192, 8193, LARGE_VOCAB};
    for (int i = 0; i < 6; i++) {
        int32_t vocab = sizes[i];
        struct dsv4_sampling p = plain(), q = plain(), k = plain();
        float *row = check_bytes((size_t)vocab * sizeof *row);
        fill_row(row, vocab, EQUAL);
        p.seed = q.seed = k.seed = check_random();
        q.top_p = 0.5f;
        k.top_k = vocab;
        dsv4_sampler *free_one = make(vocab, &p), *half = make(vocab, &q), *all = make(vocab, &k);
        for (uint32_t position = 0; position < 40; position++) {
            uint32_t r[4], counter[4] = {position, 0, 0, 0};
            uint32_t key[2] = {(uint32_t)p.seed, (uint32_t)(p.seed >> 32)};
            dsv4_philox(r, counter, key);
            double u = ldexp(r[1], -32) + ldexp(r[0], -64);
            int32_t want = (int32_t)(u * vocab), want_half = (int32_t)(u * ((vocab + 1) / 2));
            int32_t got = token_at(free_one, row, position);
            check_true(got == want, "vocab %d: %d, wanted %d", (int)vocab, (int)got, (int)want);
            check_true(token_at(all, row, position) == want, "top_k = vocab changes the token");
            got = token_at(half, row, position);
            check_true(got == want_half, "vocab %d, half: %d, wanted %d", (int)vocab, (int)got,
                       (int)want_half);
        }
        dsv4_sampler_destroy(free_one);
        dsv4_sampler_destroy(half);
        dsv4_sampler_destroy(all);
        check_reset();
    }
}

static void check_large(void) {
    float *row = check_bytes(LARGE_VOCAB * sizeof *row), top[4];
    int32_t ids[4];
    for (int repeat = 0; repeat < 4; repeat++) {
        struct dsv4_sampling p = plain();
        fill_row(row, LARGE_VOCAB, NORMAL);
        row[LARGE_VOCAB - 1] = row[7] = 40.0f;
        p.temperature = 0.0f;
        dsv4_sampler *s = make(LARGE_VOCAB, &p);
        check_true(token_at(s, row, repeat) == 7, "greedy takes the lower of two equal ids");
        dsv4_sampler_destroy(s);
        struct log_sum l = log_sum_of(row, LARGE_VOCAB);
        check_logprob(dsv4_logprobs(ids, top, row, LARGE_VOCAB, 99, 4), &l, row[99]);
        check_true(ids[0] == 7 && ids[1] == LARGE_VOCAB - 1 && top[0] == top[1], "the best two");
        for (int i = 0; i < 4; i++)
            check_logprob(top[i], &l, row[ids[i]]);
    }
    check_reset();
}

/* Tokens depend on seed, choice, position and row, not on history; positions beyond 2^32 count. */
static void check_stateless(void) {
    enum { VOCAB = 5000 };
    float *row = check_bytes(VOCAB * sizeof *row);
    struct dsv4_sampling p = plain();
    int same_choice = 0, same_high = 0, same_seed = 0;
    fill_row(row, VOCAB, NORMAL);
    p.seed = 0x123456789abcdef0u;
    p.top_p = 0.9f;
    p.temperature = 3.0f; /* flat, so that two draws seldom agree */
    dsv4_sampler *a = make(VOCAB, &p), *b = make(VOCAB, &p);
    p.choice = 1;
    dsv4_sampler *other_choice = make(VOCAB, &p);
    p.choice = 0;
    p.seed ^= (uint64_t)1 << 40;
    dsv4_sampler *other_seed = make(VOCAB, &p);
    int32_t forwards[100];
    for (int i = 0; i < 100; i++) {
        forwards[i] = token_at(a, row, i);
        same_choice += token_at(other_choice, row, i) == forwards[i];
        same_seed += token_at(other_seed, row, i) == forwards[i];
        same_high += token_at(a, row, i + ((int64_t)1 << 32)) == forwards[i];
    }
    for (int i = 99; i >= 0; i--)
        check_true(token_at(b, row, i) == forwards[i], "position %d depends on what was before", i);
    check_true(same_choice < 10 && same_seed < 10 && same_high < 10,
               "%d, %d, %d of 100 tokens are equal for another choice, seed, position", same_choice,
               same_seed, same_high);
    dsv4_sampler_destroy(a);
    dsv4_sampler_destroy(b);
    dsv4_sampler_destroy(other_choice);
    dsv4_sampler_destroy(other_seed);
    check_reset();
}

/* A sampler that is told prompt and output goes on like the one that made them. */
static void check_resumed(void) {
    enum { VOCAB = 40 };
    static const int32_t stop[] = {3, 4, 5};
    struct dsv4_sampling p = plain();
    float row[VOCAB];
    int32_t prompt[5] = {0, 7, 7, 39, 2}, made[30];
    p.repetition_penalty = 1.2f;
    p.frequency_penalty = 0.5f;
    p.presence_penalty = 0.25f;
    p.stop_ids = stop;
    p.n_stop_ids = 3;
    p.min_new_tokens = 25;
    p.max_new_tokens = 30;
    fill_row(row, VOCAB, NORMAL);
    dsv4_sampler *a = make(VOCAB, &p);
    dsv4_sampler_seen(a, prompt, 5, 1);
    for (int cut = 0; cut < 30; cut++) {
        dsv4_sampler *b = make(VOCAB, &p);
        struct dsv4_sample x, y;
        dsv4_sampler_seen(b, prompt, 5, 1);
        dsv4_sampler_seen(b, made, cut, 0);
        dsv4_sampler_sample(a, row, cut, &x);
        dsv4_sampler_sample(b, row, cut, &y);
        check_true(x.token == y.token && x.finish == y.finish, "resumed after %d tokens", cut);
        made[cut] = x.token;
        dsv4_sampler_destroy(b);
    }
    dsv4_sampler_destroy(a);
}

/* ------------------------------------------------------------------------------------ every
 * machine */

static void hash(uint64_t *sum, const void *data, size_t bytes) {
    for (size_t i = 0; i < bytes; i++)
        *sum = (*sum ^ ((const unsigned char *)data)[i]) * 0x100000001b3u;
}

/* Tokens and the bits of log-probabilities for rows made of Philox words: one number everywhere. */
static void check_machine(void) {
    enum { VOCAB = 1000, WANT_TOP = 8 };
    uint64_t sum = 0xcbf29ce484222325u;
    for (uint32_t setting = 0; setting < 8; setting++) {
        struct dsv4_sampling p = plain();
        float row[VOCAB];
        p.seed = setting;
        p.logprobs = WANT_TOP;
        p.temperature = 0.7f + 0.2f * (float)setting;
        p.top_p = setting & 1 ? 0.9f : 1.0f;
        p.top_k = setting & 2 ? 100 : 0;
        p.repetition_penalty = setting & 4 ? 1.1f : 1.0f;
        dsv4_sampler *s = make(VOCAB, &p);
        for (uint32_t position = 0; position < 50; position++) {
            struct dsv4_sample out;
            for (uint32_t i = 0; i < VOCAB; i++) {
                uint32_t r[4], counter[4] = {position, setting, i, 1}, key[2] = {0, 0};
                dsv4_philox(r, counter, key);
                row[i] = ldexpf((float)(int32_t)r[0], -28) - ldexpf((float)(r[1] >> 8), -22);
            }
            dsv4_sampler_sample(s, row, position, &out);
            hash(&sum, &out.token, sizeof out.token);
            hash(&sum, &out.logprob, sizeof out.logprob);
            hash(&sum, out.top_ids, WANT_TOP * sizeof *out.top_ids);
            hash(&sum, out.top_logprobs, WANT_TOP * sizeof *out.top_logprobs);
        }
        dsv4_sampler_destroy(s);
    }
    check_true(sum == 0xe85f0cef19d2ebd7u, "the checksum of this machine is %016llx",
               (unsigned long long)sum);
}

void check_draws(void);
void check_draws(void) {
    check_frequencies();
    check_sizes();
    check_large();
    check_stateless();
    check_resumed();
    check_machine();
}
