/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The sampler against a slow restatement of its contract (full sort, running sums, libm), against
 * published Philox vectors, and what it refuses.
 */
#include "check_sampler.h"

/* ---------------------------------------------------------------------------------------- Philox
 */

/* kat_vectors of Random123. */
static void check_philox(void) {
    static const uint32_t cases[3][10] = {
        {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
        {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0x408f276d,
         0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
        {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09,
         0x94fdcceb, 0x5001e420, 0x24126ea1},
    };
    for (int i = 0; i < 3; i++) {
        uint32_t out[4];
        dsv4_philox(out, cases[i], cases[i] + 4);
        check_true(memcmp(out, cases[i] + 6, sizeof out) == 0, "Philox vector %d: %08x...", i,
                   (unsigned)out[0]);
    }
}

/* Within the stated error of the exponential; exact at 0, nothing below 2^-42. */
static void check_weights(void) {
    for (int i = 0; i < 100000; i++) {
        double x = -29.5 * ldexp((double)(check_random() >> 11), -53);
        double want = ldexp(exp(x), 42), error = want * 0x1p-46;
        double got = (double)dsv4_softmax_weight(x);
        check_true(got <= want + error && got + 1 > want - error, "weight of %.17g: %.0f, not %.3f",
                   x, got, want);
    }
    check_true(dsv4_softmax_weight(0.0) == (uint64_t)1 << 42, "the weight of 0");
    check_true(dsv4_softmax_weight(-29.112) == 1 && dsv4_softmax_weight(-29.113) == 0,
               "weights around -42 log 2");
    check_true(!dsv4_softmax_weight(-1e300) && !dsv4_softmax_weight(-HUGE_VAL) &&
                   !dsv4_softmax_weight((double)NAN),
               "weights of -1e300, -inf and NaN");
}

/* ---------------------------------------------------------------------- the contract, restated */

struct slow {
    const struct dsv4_sampling *p;
    int32_t vocab, n_output;
    int32_t produced[SMALL_VOCAB], prompt[SMALL_VOCAB];
    float value[SMALL_VOCAB];
    int32_t order[SMALL_VOCAB]; /* best first */
    uint64_t weight[SMALL_VOCAB];
    int dropped[SMALL_VOCAB];
};

static const float *sorted_by;

static int compare_ids(const void *a, const void *b) {
    int32_t i = *(const int32_t *)a, j = *(const int32_t *)b;
    float x = isnan(sorted_by[i]) ? -INFINITY : sorted_by[i];
    float y = isnan(sorted_by[j]) ? -INFINITY : sorted_by[j];
    if (x != y)
        return x > y ? -1 : 1;
    return i < j ? -1 : 1;
}

static void sort_ids(int32_t *order, const float *v, int32_t n) {
    for (int32_t i = 0; i < n; i++)
        order[i] = i;
    sorted_by = v;
    qsort(order, (size_t)n, sizeof *order, compare_ids);
}

static void slow_values(struct slow *w, const float *logits) {
    const struct dsv4_sampling *p = w->p;
    memcpy(w->value, logits, (size_t)w->vocab * sizeof *logits);
    for (int i = 0; i < p->n_bias; i++)
        w->value[p->bias_ids[i]] += p->bias_values[i];
    for (int i = 0; i < p->n_stop_ids; i++) {
        if (w->n_output < p->min_new_tokens)
            w->value[p->stop_ids[i]] = -INFINITY;
    }
    for (int32_t id = 0; id < w->vocab; id++) {
        float v = w->value[id];
        int32_t c = w->produced[id];
        if (c || w->prompt[id])
            v = v > 0 ? v / p->repetition_penalty : v * p->repetition_penalty;
        v = v - p->frequency_penalty * (float)c;
        v = v - p->presence_penalty * (float)(c > 0);
        w->value[id] = v;
    }
}

static uint64_t slow_total(const struct slow *w) {
    uint64_t total = 0;
    for (int32_t id = 0; id < w->vocab; id++)
        total += w->dropped[id] ? 0 : w->weight[id];
    return total;
}

/* Weights, then min_p, top_k and top_p over the sorted ids; returns the sum of what is left. */
static uint64_t slow_filter(struct slow *w) {
    const struct dsv4_sampling *p = w->p;
    float high = w->value[w->order[0]];
    for (int32_t id = 0; id < w->vocab; id++) {
        double x = exp(((double)w->value[id] - (double)high) / (double)p->temperature);
        w->weight[id] = isfinite(high) && !isnan(x) ? (uint64_t)ldexp(x, 42) : 0;
        w->dropped[id] = w->weight[id] == 0 || (double)w->weight[id] < ldexp((double)p->min_p, 42);
    }
    for (int32_t i = 0, n = 0; p->top_k && i < w->vocab; i++) {
        int32_t id = w->order[i];
        if (!w->dropped[id] && ++n > p->top_k)
            w->dropped[id] = 1;
    }
    double reach = (double)p->top_p * (double)slow_total(w);
    uint64_t sum = 0;
    for (int32_t i = 0; p->top_p < 1 && i < w->vocab; i++) {
        int32_t id = w->order[i];
        if (sum > 0 && (double)sum >= reach)
            w->dropped[id] = 1;
        sum += w->dropped[id] ? 0 : w->weight[id];
    }
    return slow_total(w);
}

static int32_t slow_token(struct slow *w, const float *logits, int64_t position) {
    const struct dsv4_sampling *p = w->p;
    if (w->n_output < p->n_force)
        return p->force[w->n_output];
    slow_values(w, logits);
    sort_ids(w->order, w->value, w->vocab);
    uint64_t total = p->temperature > 0 ? slow_filter(w) : 0;
    if (total == 0)
        return w->order[0];
    uint32_t r[4], counter[4] = {(uint32_t)position, (uint32_t)(position >> 32), p->choice, 0};
    uint32_t key[2] = {(uint32_t)p->seed, (uint32_t)(p->seed >> 32)};
    dsv4_philox(r, counter, key);
    __extension__ typedef unsigned __int128 wide;
    uint64_t at = (uint64_t)((wide)((uint64_t)r[1] << 32 | r[0]) * total >> 64), sum = 0;
    for (int32_t id = 0;; id++) {
        sum += w->dropped[id] ? 0 : w->weight[id];
        if (sum > at)
            return id;
    }
}

static enum dsv4_finish slow_finish(const struct slow *w, int32_t token) {
    const struct dsv4_sampling *p = w->p;
    for (int i = 0; i < p->n_stop_ids; i++) {
        int done = w->n_output >= p->min_new_tokens && w->n_output >= p->n_force;
        if (token == p->stop_ids[i] && done)
            return DSV4_FINISH_STOP;
    }
    int full = p->max_new_tokens >= 0 && w->n_output >= p->max_new_tokens;
    return full ? DSV4_FINISH_LENGTH : DSV4_FINISH_NONE;
}

static void check_logprobs(const struct dsv4_sample *out, const float *logits, int32_t vocab) {
    static int32_t order[SMALL_VOCAB];
    struct log_sum l = log_sum_of(logits, vocab);
    check_logprob(out->logprob, &l, logits[out->token]);
    sort_ids(order, logits, vocab);
    for (int32_t i = 0; i < out->n_top; i++) {
        check_true(out->top_ids[i] == order[i], "alternative %d: %d, wanted %d", (int)i,
                   (int)out->top_ids[i], (int)order[i]);
        check_logprob(out->top_logprobs[i], &l, logits[order[i]]);
    }
}

/* One sampler, eight tokens of changing rows, each against the restatement. */
static void compare_run(int32_t vocab, enum row_kind kind) {
    static struct slow w;
    struct dsv4_sampling p = random_settings(vocab);
    dsv4_sampler *s = make(vocab, &p);
    float *row = check_bytes((size_t)vocab * sizeof *row);
    int32_t *prompt = random_ids(6, vocab);
    memset(&w, 0, sizeof w);
    w.p = &p;
    w.vocab = vocab;
    dsv4_sampler_seen(s, prompt, 6, 1);
    for (int i = 0; i < 6; i++)
        w.prompt[prompt[i]] = 1;
    for (int64_t step = 0, position = (int64_t)(check_random() >> 2); step < 8; step++) {
        struct dsv4_sample out;
        fill_row(row, vocab, kind);
        int32_t want = slow_token(&w, row, position + step);
        dsv4_sampler_sample(s, row, position + step, &out);
        check_true(out.token == want, "rows %d, vocab %d, step %d: token %d, wanted %d", kind,
                   (int)vocab, (int)step, (int)out.token, (int)want);
        w.n_output++;
        w.produced[want]++;
        enum dsv4_finish finish = slow_finish(&w, want);
        check_true(out.finish == finish, "finish %d, wanted %d", out.finish, finish);
        check_true(out.n_top == (p.logprobs > 0 ? p.logprobs : 0), "%d alternatives", out.n_top);
        if (p.logprobs >= 0)
            check_logprobs(&out, row, vocab);
        if (finish == DSV4_FINISH_LENGTH)
            break;
    }
    dsv4_sampler_destroy(s);
    check_reset();
}

static void check_contract(void) {
    static const int32_t sizes[] = {1, 2, 3, 17, 64, 1000, SMALL_VOCAB};
    for (int kind = 0; kind < ROW_KINDS; kind++) {
        for (int i = 0; i < 7; i++) {
            for (int repeat = 0; repeat < (sizes[i] < 100 ? 60 : 6); repeat++)
                compare_run(sizes[i], (enum row_kind)kind);
        }
    }
}

/* ------------------------------------------------------------------------------------------
 * refusals */

static void refuse(const char *name, int32_t vocab, struct dsv4_sampling p) {
    dsv4_sampler *s = NULL;
    dsv4_error err = {.message = ""};
    check_true(dsv4_sampler_create(&s, vocab, &p, &err) == DSV4_E_ARGUMENT && !s,
               "a bad %s was accepted", name);
    check_true(strncmp(err.message, name, strlen(name)) == 0 && strstr(err.message, "got ") &&
                   strstr(err.message, ", wanted "),
               "%s: message '%s'", name, err.message);
}

static void check_refusals(void) {
    static const int32_t ids[] = {0, 9, 10, -1};
    static const float biases[] = {0.0f, INFINITY, NAN};
#define REFUSE(field, value)                                                                       \
    do {                                                                                           \
        struct dsv4_sampling p_ = plain();                                                         \
        p_.field = value;                                                                          \
        refuse(#field, 10, p_);                                                                    \
    } while (0)
    REFUSE(temperature, -0.1f);
    REFUSE(temperature, NAN);
    REFUSE(temperature, 101.0f);
    REFUSE(top_p, 0.0f);
    REFUSE(top_p, 1.001f);
    REFUSE(top_p, NAN);
    REFUSE(min_p, -0.001f);
    REFUSE(min_p, 1.001f);
    REFUSE(min_p, NAN);
    REFUSE(presence_penalty, 2.1f);
    REFUSE(frequency_penalty, -2.1f);
    REFUSE(repetition_penalty, 0.0f);
    REFUSE(repetition_penalty, INFINITY);
    REFUSE(top_k, -1);
    REFUSE(logprobs, -2);
    REFUSE(logprobs, 11);
    REFUSE(min_new_tokens, -1);
    REFUSE(max_new_tokens, -2);
#undef REFUSE
    refuse("vocab", 0, plain());
    refuse("vocab", DSV4_SAMPLER_MAX_VOCAB + 1, plain());
    struct dsv4_sampling p = plain();
    p.min_new_tokens = 5;
    p.max_new_tokens = 4;
    refuse("max_new_tokens", 10, p);
    for (int n = 3; n <= 4; n++) {
        const int32_t *bad = n == 3 ? ids : ids + 3;
        int32_t count = n == 3 ? 3 : 1;
        p = plain();
        p.stop_ids = bad;
        p.n_stop_ids = count;
        refuse("stop_ids", 10, p);
        p = plain();
        p.force = bad;
        p.n_force = count;
        refuse("force", 10, p);
        p = plain();
        p.bias_ids = bad;
        p.bias_values = biases;
        p.n_bias = count;
        refuse("bias_ids", 10, p);
    }
    p = plain();
    p.n_force = 2;
    refuse("force", 10, p);
    p.n_force = 0;
    p.bias_ids = ids;
    p.n_bias = 2;
    refuse("bias_values", 10, p);
    p.bias_values = biases;
    refuse("bias_values", 10, p);
    p.bias_values = biases + 1;
    p.n_bias = 1;
    refuse("bias_values", 10, p);
    p.bias_values = biases + 2;
    refuse("bias_values", 10, p);
    dsv4_sampler_destroy(NULL);
}

void check_sampler(void);
void check_sampler(void) {
    check_philox();
    check_weights();
    check_contract();
    check_refusals();
}
