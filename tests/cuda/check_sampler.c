/* SPDX-License-Identifier: Apache-2.0 */
/* Tokens, log-probabilities and alternatives of several rows at once against the CPU's sampler, bit for bit. */
#include "check_cuda.h"
#include "check_sampler.h"

void check_sampler(void);

enum { MAX_ROWS = 4, LISTS = 4096 };

static struct dsv4_sampling settings(int32_t vocab) {
    struct dsv4_sampling p = random_settings(vocab);
    p.max_new_tokens = -1;
    if (check_below(6) == 0)
        p.logprobs = vocab;
    p.logprobs = p.logprobs < DSV4_CUDA_ALTERNATIVES ? p.logprobs : DSV4_CUDA_ALTERNATIVES;
    if (check_below(4) == 0)
        random_biases(&p, between(1, 600), vocab);
    return p;
}

static void same_sample(const struct dsv4_sample *got, const struct dsv4_sample *want) {
    check_true(got->token == want->token, "token %d, wanted %d", got->token, want->token);
    check_true(got->finish == want->finish && got->n_top == want->n_top, "finish %d, %d alternatives", got->finish,
               got->n_top);
    same_f32("log-probability", &got->logprob, &want->logprob, 1);
    if (got->n_top) {
        same("alternatives", got->top_ids, want->top_ids, (size_t)got->n_top, 4);
        same_f32("their log-probabilities", got->top_logprobs, want->top_logprobs, (size_t)got->n_top);
    }
}

/* Several rows, some steps; every sampler beside a twin that samples on the CPU. */
static void sample(int32_t n_draw, int32_t vocab, enum row_kind kind, int steps) {
    dsv4_sampler *own[MAX_ROWS], *twin[MAX_ROWS];
    struct dsv4_sampling p[MAX_ROWS];
    int64_t position = (int64_t)(check_random() >> 2);
    for (int32_t r = 0; r < n_draw; r++) {
        int32_t n = between(0, 40), *prompt = random_ids(n, vocab);
        p[r] = settings(vocab);
        own[r] = make(vocab, &p[r]);
        twin[r] = make(vocab, &p[r]);
        dsv4_sampler_seen(own[r], prompt, n, 1);
        dsv4_sampler_seen(twin[r], prompt, n, 1);
    }
    size_t tops = (size_t)n_draw * DSV4_CUDA_ALTERNATIVES, all = (size_t)(n_draw + 1) * (size_t)vocab;
    struct dsv4_cuda_draw *draws = check_aligned((size_t)n_draw * sizeof *draws, 8);
    int32_t *tokens = check_aligned(4 * (size_t)n_draw, 4), *top_ids = check_aligned(4 * tops, 4);
    float *logprobs = check_aligned(4 * (size_t)n_draw, 4), *top_logprobs = check_aligned(4 * tops, 4);
    float *logits = check_aligned(4 * all, 4);
    int32_t *lists = check_aligned((size_t)4 * LISTS * (size_t)n_draw, 4);
    void *scratch = check_aligned(DSV4_CUDA_SAMPLE_SCRATCH(n_draw, vocab), 8);
    for (int step = 0; step < steps; step++) {
        int32_t needs = 0, used = 0, top = 0;
        for (int32_t r = 0; r <= n_draw; r++)
            fill_row(logits + (ptrdiff_t)r * vocab, vocab, kind);
        for (int32_t r = 0; r < n_draw; r++) { /* row 0 is nobody's; the others in descending order */
            draws[r] = (struct dsv4_cuda_draw){.row = n_draw - r, .lists = used, .top = top};
            int32_t n = dsv4_sampler_pack(own[r], position + step, &draws[r].d, lists + used, LISTS * n_draw - used);
            check_true(n >= 0, "no room for the lists");
            used += n;
            top += draws[r].d.logprobs > 0 ? draws[r].d.logprobs : 0;
            needs |= dsv4_draw_needs(&draws[r].d);
            logprobs[r] = 0.0f;
        }
        memset(scratch, 0xff, DSV4_CUDA_SAMPLE_SCRATCH(n_draw, vocab));
        RUN(sample, .tokens = tokens, .logprobs = logprobs, .top_ids = top_ids, .top_logprobs = top_logprobs,
            .logits = logits, .draws = draws, .lists = lists, .scratch = scratch, .n_draw = n_draw, .n = vocab,
            .needs = needs);
        for (int32_t r = 0; r < n_draw; r++) {
            struct dsv4_sample got, want;
            dsv4_sampler_sample(twin[r], logits + (ptrdiff_t)(n_draw - r) * vocab, position + step, &want);
            check_true(tokens[r] >= 0 && tokens[r] < vocab, "token %d of %d", tokens[r], vocab);
            dsv4_sampler_take(own[r], tokens[r], logprobs[r], top_ids + draws[r].top, top_logprobs + draws[r].top, &got);
            same_sample(&got, &want);
        }
    }
    for (int32_t r = 0; r < n_draw; r++) {
        dsv4_sampler_destroy(own[r]);
        dsv4_sampler_destroy(twin[r]);
    }
    check_reset();
}

/* Lists that do not fit are refused, those that just do are not. */
static void room(void) {
    int32_t lists[8], ids[3] = {4, 2, 2};
    float values[3] = {1, 2, 3};
    struct dsv4_sampling p = {.repetition_penalty = 2.0f, .top_p = 1.0f, .max_new_tokens = -1, .logprobs = -1};
    struct dsv4_draw d;
    p.n_bias = 3;
    p.bias_ids = ids;
    p.bias_values = values;
    dsv4_sampler *s = make(5, &p);
    dsv4_sampler_seen(s, ids, 1, 1);
    check_true(dsv4_sampler_pack(s, 0, &d, lists, 7) == -1, "seven for eight");
    check_true(dsv4_sampler_pack(s, 0, &d, lists, 8) == 8, "eight for eight");
    static const int32_t want[3] = {2, 2, 4};
    static const float want_values[3] = {2, 3, 1};
    same("biases, ascending", lists, want, 3, 4);
    same("their values, those of one id in order", lists + 3, want_values, 3, 4);
    dsv4_sampler_destroy(s);
}

void check_sampler(void) {
    static const int32_t sizes[] = {1, 2, 17, 256, 1023, 1024, 1025, 2500};
    room();
    for (int kind = 0; kind < ROW_KINDS; kind++)
        for (int i = 0; i < 8; i++)
            sample(between(1, MAX_ROWS), sizes[i], (enum row_kind)kind, i < 4 ? 2 : 1);
    for (int i = 0; i < 12; i++)
        sample(between(1, MAX_ROWS), between(1, SMALL_VOCAB), NORMAL, 2);
    sample(1, LARGE_VOCAB, NORMAL, 1);
}
