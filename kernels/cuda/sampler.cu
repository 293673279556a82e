// SPDX-License-Identifier: Apache-2.0
//
// The sampler of csrc/gen/sampler.h over device memory, a launch per step of it and a block per 1,024 tokens of a row.
// Weights are integers, so sums over blocks are the CPU's whatever their order; the only ordered sum, by ascending id, is
// that of the draw.
//
// The best tokens, for top_k, top_p and the alternatives of log-probabilities, are found without sorting: each token has a
// rank of 52 bits (key of its value, then the lower id), distinct, and the rank of the last token that stays is found in
// five digits.  One launch adds up the shares of all tokens by the next digit, in bins; the launch after it finds in each
// block, from the same bins, which digit it is.  So no block waits for another, and no memory is written in the launch
// that reads it.
#include "device.cuh"

typedef unsigned long long wide; // as atomicAdd has it

enum { THREADS = 256, CHUNK = 1024, BINS = 2048, DIGITS = 5, RING = 3, ID_BITS = 20 };
enum kind { TOP_K, TOP_P, ALTERNATIVES, KINDS };
static_assert(DIGITS == 5, "the digits of select_shift and select_width");

// What is known of the last rank that stays, before a digit is looked for, and after the last one.
struct cut {
    uint64_t known;  // its digits so far
    uint64_t target; // what those of this prefix have to reach
    int32_t all;     // nothing is cut
};

struct sample {
    struct dsv4_cuda_sample_args a;
    uint64_t *weights;                    // [n_draw][n]
    wide *bins;                           // [n_draw][2][RING][BINS]: of the filters, of the alternatives
    uint64_t *best_raw, *best;            // [n_draw][n_chunk] ranks of the best logit and value
    uint64_t *sums, *log_sums;            // [n_draw][n_chunk] of weights
    struct cut *cuts;                     // [n_draw][KINDS][DIGITS + 1]
    uint64_t *found;                      // [n_draw][DSV4_CUDA_ALTERNATIVES] ranks, in any order
    int32_t *n_found;                     // [n_draw]
    float *values;                        // [n_draw][n]
    int32_t n_chunk;
    int32_t edited;                       // best_kernel: of the edited values
    int32_t first, stage[2];              // bins_kernel: 5 kind + digit for each z, -1: none; the filters' first
};

struct work {
    uint64_t scan[THREADS];
    struct cut cut;
};

// ------------------------------------------------------------------------------------------------------- block helpers

// The sum over the block, of all threads.
DSV4_DEVICE uint64_t block_sum(uint64_t x, uint64_t *scan) {
    int32_t i = (int32_t)threadIdx.x;
    scan[i] = x;
    __syncthreads();
    for (int32_t step = THREADS / 2; step > 0; step /= 2) {
        if (i < step)
            scan[i] += scan[i + step];
        __syncthreads();
    }
    x = scan[0];
    __syncthreads();
    return x;
}

DSV4_DEVICE uint64_t block_max(uint64_t x, uint64_t *scan) {
    int32_t i = (int32_t)threadIdx.x;
    scan[i] = x;
    __syncthreads();
    for (int32_t step = THREADS / 2; step > 0; step /= 2) {
        if (i < step && scan[i + step] > scan[i])
            scan[i] = scan[i + step];
        __syncthreads();
    }
    x = scan[0];
    __syncthreads();
    return x;
}

// The sum of x up to this thread, itself included; *total the sum of all.
DSV4_DEVICE uint64_t block_scan(uint64_t x, uint64_t *scan, uint64_t *total) {
    int32_t i = (int32_t)threadIdx.x;
    scan[i] = x;
    __syncthreads();
    for (int32_t step = 1; step < THREADS; step *= 2) {
        uint64_t before = i >= step ? scan[i - step] : 0;
        __syncthreads();
        x += before;
        scan[i] = x;
        __syncthreads();
    }
    *total = scan[THREADS - 1];
    __syncthreads();
    return x;
}

DSV4_DEVICE uint64_t block_sum_of(const uint64_t *x, int32_t n, uint64_t *scan) {
    uint64_t sum = 0;
    for (int32_t i = (int32_t)threadIdx.x; i < n; i += THREADS)
        sum += x[i];
    return block_sum(sum, scan);
}

// ------------------------------------------------------------------------------------------------------ rows and ranks

DSV4_DEVICE int32_t needs_of(const struct sample &s, int32_t r) {
    return dsv4_draw_needs(&s.a.draws[r].d);
}

DSV4_DEVICE const float *logits_of(const struct sample &s, int32_t r) {
    return s.a.logits + (int64_t)s.a.draws[r].row * s.a.n;
}

DSV4_DEVICE const float *values_of(const struct sample &s, int32_t r) {
    return needs_of(s, r) & DSV4_NEEDS_EDITS ? s.values + (int64_t)r * s.a.n : logits_of(s, r);
}

DSV4_DEVICE uint64_t rank_of(float value, int32_t id) {
    return (uint64_t)dsv4_order_key(value) << ID_BITS | (uint32_t)((1 << ID_BITS) - 1 - id);
}

DSV4_DEVICE int32_t id_of(uint64_t rank) {
    return (1 << ID_BITS) - 1 - (int32_t)(rank & ((1 << ID_BITS) - 1));
}

// The best token of a row from those of its chunks; 0 if every value is a NaN or -infinity.
DSV4_DEVICE int32_t best_token(const struct sample &s, int32_t r, int edited, uint64_t *scan) {
    const uint64_t *best = (edited ? s.best : s.best_raw) + (int64_t)r * s.n_chunk;
    uint64_t high = 0;
    for (int32_t i = (int32_t)threadIdx.x; i < s.n_chunk; i += THREADS)
        high = best[i] > high ? best[i] : high;
    high = block_max(high, scan);
    return high ? id_of(high) : 0;
}

DSV4_DEVICE int edits(const struct sample &s, int32_t r) {
    return (needs_of(s, r) & DSV4_NEEDS_EDITS) != 0;
}

// ------------------------------------------------------------------------------------------------ edits, best, weights

// The best logit of each chunk, a copy where edits follow, empty bins; or (edited) the best value of each.
DSV4_KERNEL(best_kernel, struct sample, THREADS, 4) {
    DSV4_SHARED(struct work, w);
    int32_t r = (int32_t)blockIdx.y, chunk = (int32_t)blockIdx.x, i = (int32_t)threadIdx.x;
    int copy = edits(a, r);
    if (a.edited && !copy)
        return;
    const float *from = a.edited ? values_of(a, r) : logits_of(a, r);
    uint64_t best = 0;
    for (int32_t id = chunk * CHUNK + i; id < (chunk + 1) * CHUNK && id < a.a.n; id += THREADS) {
        float v = from[id];
        uint64_t rank = v > -DSV4_INF ? rank_of(v, id) : 0; // a NaN is not above
        best = rank > best ? rank : best;
        if (copy && !a.edited)
            a.values[(int64_t)r * a.a.n + id] = v;
    }
    best = block_max(best, w.scan);
    if (i == 0)
        (a.edited ? a.best : a.best_raw)[(int64_t)r * a.n_chunk + chunk] = best;
    if (a.edited)
        return;
    wide *bins = a.bins + (int64_t)r * 2 * RING * BINS;
    for (int32_t b = chunk * THREADS + i; b < 2 * RING * BINS; b += a.n_chunk * THREADS)
        bins[b] = 0;
    if (chunk == 0 && i == 0)
        a.n_found[r] = 0;
}

// A block per row.  Biases of one id are neighbours: the first one's thread adds them all.
DSV4_KERNEL(edit_kernel, struct sample, THREADS, 1) {
    int32_t r = (int32_t)blockIdx.x, i = (int32_t)threadIdx.x;
    const struct dsv4_cuda_draw &draw = a.a.draws[r];
    const struct dsv4_draw &d = draw.d;
    float *v = a.values + (int64_t)r * a.a.n;
    const int32_t *bias = a.a.lists + draw.lists, *stop = bias + 2 * d.n_bias;
    const int32_t *seen = stop + d.n_stop, *count = seen + d.n_seen;
    for (int32_t j = i; j < d.n_bias; j += THREADS) {
        if (j > 0 && bias[j] == bias[j - 1])
            continue;
        float x = v[bias[j]];
        for (int32_t k = j; k < d.n_bias && bias[k] == bias[j]; k++)
            x += dsv4_f32_from_bits((uint32_t)bias[d.n_bias + k]);
        v[bias[j]] = x;
    }
    __syncthreads();
    for (int32_t j = i; j < d.n_stop; j += THREADS)
        v[stop[j]] = -DSV4_INF;
    __syncthreads();
    for (int32_t j = i; j < d.n_seen; j += THREADS)
        v[seen[j]] = dsv4_penalised(v[seen[j]], count[j], d.repetition, d.frequency, d.presence);
}

// Weights that reach min_p and their sums by chunk; the sums at temperature 1 of the logits as they were.
DSV4_KERNEL(weigh_kernel, struct sample, THREADS, 4) {
    DSV4_SHARED(struct work, w);
    int32_t r = (int32_t)blockIdx.y, chunk = (int32_t)blockIdx.x;
    const struct dsv4_draw &d = a.a.draws[r].d;
    int32_t needs = needs_of(a, r), first = chunk * CHUNK + (int32_t)threadIdx.x;
    int64_t at = (int64_t)r * a.n_chunk + chunk;
    if (needs & DSV4_NEEDS_WEIGHTS) {
        const float *v = values_of(a, r);
        double inverse = 1.0 / (double)d.temperature, high = (double)v[best_token(a, r, edits(a, r), w.scan)];
        uint64_t least = dsv4_least_weight(d.min_p), sum = 0;
        for (int32_t id = first; id < (chunk + 1) * CHUNK && id < a.a.n; id += THREADS) {
            uint64_t x = dsv4_softmax_weight(((double)v[id] - high) * inverse);
            x = x >= least ? x : 0;
            a.weights[(int64_t)r * a.a.n + id] = x;
            sum += x;
        }
        sum = block_sum(sum, w.scan);
        if (threadIdx.x == 0)
            a.sums[at] = sum;
    }
    if (needs & DSV4_NEEDS_LOGPROB) {
        const float *l = logits_of(a, r);
        double high = (double)l[best_token(a, r, 0, w.scan)];
        uint64_t sum = 0;
        for (int32_t id = first; id < (chunk + 1) * CHUNK && id < a.a.n; id += THREADS)
            sum += dsv4_softmax_weight((double)l[id] - high);
        sum = block_sum(sum, w.scan);
        if (threadIdx.x == 0)
            a.log_sums[at] = sum;
    }
}

// ---------------------------------------------------------------------------------------------------- finding the best

DSV4_DEVICE int32_t select_shift(int32_t digit) {
    return digit == 0 ? 41 : digit == 1 ? 30 : 10 * (DIGITS - 1 - digit);
}

DSV4_DEVICE int32_t select_width(int32_t digit) {
    return digit < 2 ? 11 : 10;
}

DSV4_DEVICE int wants(const struct sample &s, int32_t r, int32_t kind) {
    int32_t need = kind == TOP_K ? DSV4_NEEDS_TOP_K : kind == TOP_P ? DSV4_NEEDS_TOP_P : DSV4_NEEDS_ALTERNATIVES;
    return (needs_of(s, r) & need) != 0;
}

DSV4_DEVICE wide *bins_of(const struct sample &s, int32_t r, int32_t stage) {
    return s.bins + (((int64_t)r * 2 + (stage >= DIGITS * ALTERNATIVES)) * RING + stage % RING) * BINS;
}

DSV4_DEVICE struct cut *cut_of(const struct sample &s, int32_t r, int32_t kind, int32_t digit) {
    return s.cuts + ((int64_t)r * KINDS + kind) * (DIGITS + 1) + digit;
}

// What is known before the first digit, of shares that make `total`.
DSV4_DEVICE struct cut first_cut(const struct dsv4_draw &d, int32_t kind, uint64_t total) {
    struct cut c = {0, 0, 0};
    c.target = kind == TOP_K   ? (uint64_t)d.top_k
               : kind == TOP_P ? dsv4_top_p_target(d.top_p, total)
                               : (uint64_t)d.logprobs;
    c.all = c.target >= total;
    return c;
}

// What is known after the digit of this stage, from its bins; one block of the row keeps it.
DSV4_DEVICE struct cut resolve(const struct sample &s, int32_t r, int32_t stage, struct work &w) {
    enum { EACH = BINS / THREADS };
    int32_t kind = stage / DIGITS, digit = stage % DIGITS, i = (int32_t)threadIdx.x;
    const wide *bins = bins_of(s, r, stage) + (BINS - EACH * (i + 1)); // of this thread; the first has the highest
    uint64_t total, own = 0;
    for (int32_t b = 0; b < EACH; b++)
        own += bins[b];
    uint64_t reached = block_scan(own, w.scan, &total);
    struct cut c = digit == 0 ? first_cut(s.a.draws[r].d, kind, total) : *cut_of(s, r, kind, digit);
    if (i == 0 && c.all)
        w.cut = c;
    if (!c.all && reached >= c.target && reached - own < c.target) {
        int32_t b = EACH - 1;
        c.target -= reached - own;
        for (; bins[b] < c.target; b--)
            c.target -= bins[b];
        c.known = c.known << select_width(digit) | (uint32_t)(BINS - EACH * (i + 1) + b);
        w.cut = c;
    }
    __syncthreads();
    c = w.cut;
    __syncthreads();
    if (i == 0 && blockIdx.x == 0)
        *cut_of(s, r, kind, digit + 1) = c;
    return c;
}

// The least rank that the filters up to and including `kind` leave.
DSV4_DEVICE uint64_t floor_after(const struct sample &s, int32_t r, int32_t kind) {
    for (; kind >= 0; kind--)
        if (wants(s, r, kind)) {
            const struct cut *c = cut_of(s, r, kind, DIGITS);
            return c->all ? 0 : c->known;
        }
    return 0;
}

// The same where the last stage before `stage` has not been looked at.
DSV4_DEVICE uint64_t floor_before(const struct sample &s, int32_t r, int32_t stage, struct work &w) {
    int32_t kind = stage / DIGITS - 1;
    if (stage % DIGITS || stage == s.first || !wants(s, r, kind))
        return floor_after(s, r, kind);
    struct cut c = resolve(s, r, stage - 1, w);
    return c.all ? 0 : c.known;
}

// A chunk's sums by digit in two halves, which shared memory adds by itself: 1,024 times less than 2^22.
struct halves {
    struct work w;
    uint32_t low[BINS], high[BINS];
};
enum { HALF_BITS = 21 };

// One digit of a filter (z = 0) or of the alternatives.
DSV4_KERNEL(bins_kernel, struct sample, THREADS, 4) {
    DSV4_SHARED(struct halves, h);
    int32_t r = (int32_t)blockIdx.y, chunk = (int32_t)blockIdx.x, i = (int32_t)threadIdx.x, stage = a.stage[blockIdx.z];
    int32_t kind = stage / DIGITS, digit = stage % DIGITS;
    if (stage < 0)
        return;
    int last = stage + 1 == DIGITS * ALTERNATIVES || stage + 1 == DIGITS * KINDS;
    for (int32_t b = chunk * THREADS + i; b < BINS && !last; b += a.n_chunk * THREADS)
        bins_of(a, r, stage + 1)[b] = 0; // last read by the launch before
    uint64_t floor = kind == ALTERNATIVES ? 0 : floor_before(a, r, stage, h.w);
    if (!wants(a, r, kind))
        return;
    struct cut c = {0, 0, 0};
    if (digit > 0)
        c = resolve(a, r, stage - 1, h.w);
    if (c.all)
        return;
    for (int32_t b = i; b < BINS; b += THREADS)
        h.low[b] = h.high[b] = 0;
    __syncthreads();
    const float *v = kind == ALTERNATIVES ? logits_of(a, r) : values_of(a, r);
    int32_t shift = select_shift(digit), width = select_width(digit);
    for (int32_t id = chunk * CHUNK + i; id < (chunk + 1) * CHUNK && id < a.a.n; id += THREADS) {
        uint64_t rank = rank_of(v[id], id), weight = kind == ALTERNATIVES ? 1 : a.weights[(int64_t)r * a.a.n + id];
        if (!weight || rank < floor || rank >> (shift + width) != c.known)
            continue;
        int32_t bin = (int32_t)(rank >> shift & ((1u << width) - 1));
        atomicAdd(&h.low[bin], kind == TOP_P ? (uint32_t)(weight & ((1u << HALF_BITS) - 1)) : 1u);
        if (kind == TOP_P && weight >> HALF_BITS)
            atomicAdd(&h.high[bin], (uint32_t)(weight >> HALF_BITS));
    }
    __syncthreads();
    wide *bins = bins_of(a, r, stage);
    for (int32_t b = i; b < BINS; b += THREADS)
        if (h.low[b] | h.high[b])
            atomicAdd(&bins[b], (wide)h.low[b] + ((wide)h.high[b] << HALF_BITS));
}

// What is left after the filters: sums by chunk (z = 0); the ranks of the alternatives (z = 1).
DSV4_KERNEL(kept_kernel, struct sample, THREADS, 4) {
    DSV4_SHARED(struct work, w);
    int32_t r = (int32_t)blockIdx.y, chunk = (int32_t)blockIdx.x, stage = a.stage[blockIdx.z];
    int32_t first = chunk * CHUNK + (int32_t)threadIdx.x, alternatives = stage == DIGITS * KINDS;
    if (stage < 0 || (alternatives ? !wants(a, r, ALTERNATIVES) : !(needs_of(a, r) & DSV4_NEEDS_WEIGHTS)))
        return;
    const float *v = alternatives ? logits_of(a, r) : values_of(a, r);
    uint64_t floor = floor_before(a, r, stage, w), sum = 0;
    for (int32_t id = first; id < (chunk + 1) * CHUNK && id < a.a.n; id += THREADS) {
        uint64_t rank = rank_of(v[id], id);
        if (rank < floor)
            continue;
        if (alternatives)
            a.found[(int64_t)r * DSV4_CUDA_ALTERNATIVES + atomicAdd(&a.n_found[r], 1)] = rank;
        else
            sum += a.weights[(int64_t)r * a.a.n + id];
    }
    if (alternatives)
        return;
    sum = block_sum(sum, w.scan);
    if (threadIdx.x == 0)
        a.sums[(int64_t)r * a.n_chunk + chunk] = sum;
}

// ------------------------------------------------------------------------------------------------------------ the draw

struct choice {
    struct work w;
    uint64_t left;
    int32_t token;
};

// The first place of x[0..n) whose running sum is above `left`, as (place, *rest): EACH neighbours a thread.
template <int EACH, class Get> DSV4_DEVICE void first_above(struct choice &s, int32_t n, uint64_t left, Get get) {
    int32_t i = (int32_t)threadIdx.x;
    uint64_t own = 0, total;
    for (int32_t j = EACH * i; j < EACH * (i + 1) && j < n; j++)
        own += get(j);
    uint64_t reached = block_scan(own, s.w.scan, &total);
    if (reached > left && reached - own <= left) {
        int32_t j = EACH * i;
        left -= reached - own;
        for (uint64_t x = get(j); left >= x; x = get(++j))
            left -= x;
        s.left = left;
        s.token = j;
    }
    __syncthreads();
}

// A block per row: the token and its log-probability.
DSV4_KERNEL(draw_kernel, struct sample, THREADS, 1) {
    DSV4_SHARED(struct choice, s);
    int32_t r = (int32_t)blockIdx.x, needs = needs_of(a, r);
    const struct dsv4_draw &d = a.a.draws[r].d;
    const uint64_t *sums = a.sums + (int64_t)r * a.n_chunk, *weights = a.weights + (int64_t)r * a.a.n;
    int32_t token = d.forced >= 0 ? d.forced : best_token(a, r, edits(a, r), s.w.scan);
    uint64_t total = needs & DSV4_NEEDS_WEIGHTS ? block_sum_of(sums, a.n_chunk, s.w.scan) : 0;
    if (total) { // else nothing has a weight: the highest value is infinite
        const float *v = values_of(a, r);
        uint64_t floor = floor_after(a, r, TOP_P);
        first_above<4>(s, a.n_chunk, dsv4_draw_below(d.seed, d.choice, d.position, total),
                       [&](int32_t i) { return sums[i]; });
        int32_t first = s.token * CHUNK;
        uint64_t left = s.left;
        __syncthreads();
        first_above<CHUNK / THREADS>(s, a.a.n - first, left, [&](int32_t i) {
            return rank_of(v[first + i], first + i) >= floor ? weights[first + i] : (uint64_t)0;
        });
        token = first + s.token;
    }
    if (needs & DSV4_NEEDS_LOGPROB) {
        const float *l = logits_of(a, r);
        double high = (double)l[best_token(a, r, 0, s.w.scan)];
        double log_sum = dsv4_log_sum(block_sum_of(a.log_sums + (int64_t)r * a.n_chunk, a.n_chunk, s.w.scan));
        if (threadIdx.x == 0)
            a.a.logprobs[r] = dsv4_logprob(l[token], high, log_sum);
    }
    if (threadIdx.x == 0)
        a.a.tokens[r] = token;
}

struct sorted {
    struct work w;
    uint64_t rank[DSV4_CUDA_ALTERNATIVES];
};

// A block per row: the alternatives, best first.
DSV4_KERNEL(alternatives_kernel, struct sample, THREADS, 1) {
    DSV4_SHARED(struct sorted, s);
    enum { N = DSV4_CUDA_ALTERNATIVES };
    int32_t r = (int32_t)blockIdx.x, i = (int32_t)threadIdx.x, k = a.a.draws[r].d.logprobs;
    if (!wants(a, r, ALTERNATIVES))
        return;
    for (int32_t j = i; j < N; j += THREADS)
        s.rank[j] = j < k ? a.found[(int64_t)r * N + j] : 0;
    for (int32_t run = 2; run <= N; run *= 2)
        for (int32_t step = run / 2; step > 0; step /= 2) {
            __syncthreads();
            for (int32_t j = i; j < N; j += THREADS) {
                int32_t other = j ^ step;
                if (other > j && (s.rank[j] < s.rank[other]) == !(j & run)) {
                    uint64_t x = s.rank[j];
                    s.rank[j] = s.rank[other];
                    s.rank[other] = x;
                }
            }
        }
    __syncthreads();
    const float *l = logits_of(a, r);
    double high = (double)l[best_token(a, r, 0, s.w.scan)];
    double log_sum = dsv4_log_sum(block_sum_of(a.log_sums + (int64_t)r * a.n_chunk, a.n_chunk, s.w.scan));
    for (int32_t j = i; j < k; j += THREADS) {
        int32_t id = id_of(s.rank[j]), at = a.a.draws[r].top + j;
        a.a.top_ids[at] = id;
        a.a.top_logprobs[at] = dsv4_logprob(l[id], high, log_sum);
    }
}

// ----------------------------------------------------------------------------------------------------------- launches

static struct sample laid_out(const struct dsv4_cuda_sample_args *a) {
    struct sample s = {};
    s.a = *a;
    s.n_chunk = (int32_t)dsv4_blocks((size_t)a->n, CHUNK);
    size_t rows = (size_t)a->n_draw, chunks = rows * (size_t)s.n_chunk;
    s.weights = (uint64_t *)a->scratch;
    s.bins = (wide *)(s.weights + rows * (size_t)a->n);
    s.best_raw = (uint64_t *)(s.bins + rows * 2 * RING * BINS);
    s.best = s.best_raw + chunks;
    s.sums = s.best + chunks;
    s.log_sums = s.sums + chunks;
    s.cuts = (struct cut *)(s.log_sums + chunks);
    s.found = (uint64_t *)(s.cuts + rows * KINDS * (DIGITS + 1));
    s.n_found = (int32_t *)(s.found + rows * DSV4_CUDA_ALTERNATIVES);
    s.values = (float *)(s.n_found + rows);
    return s;
}
static_assert(2 * RING * BINS * 8 + KINDS * (DIGITS + 1) * sizeof(struct cut) + 8 * DSV4_CUDA_ALTERNATIVES <= 107008,
              "DSV4_CUDA_SAMPLE_SCRATCH");

// Digits of the filters and, beside them, of the alternatives; then what both leave.
static int narrow(struct sample *s, dim3 grid, void *stream) {
    int32_t needs = s->a.needs, filters = needs & (DSV4_NEEDS_TOP_K | DSV4_NEEDS_TOP_P);
    int32_t end = needs & DSV4_NEEDS_TOP_P ? DIGITS * 2 : DIGITS, both = needs & DSV4_NEEDS_ALTERNATIVES;
    s->first = needs & DSV4_NEEDS_TOP_K ? 0 : DIGITS;
    int32_t n = filters ? end - s->first : 0;
    grid.z = both ? 2 : 1;
    for (int32_t i = 0; i < n || (both && i < DIGITS); i++) {
        s->stage[0] = i < n ? s->first + i : -1;
        s->stage[1] = i < DIGITS ? DIGITS * ALTERNATIVES + i : -1;
        DSV4_LAUNCH(bins_kernel, grid, THREADS, stream, *s);
    }
    s->stage[0] = filters ? end : -1;
    s->stage[1] = DIGITS * KINDS;
    DSV4_LAUNCH(kept_kernel, grid, THREADS, stream, *s);
    return 0;
}

int dsv4_cuda_sample(const struct dsv4_cuda_sample_args *a, void *stream) {
    if (!a->n_draw)
        return 0;
    struct sample s = laid_out(a);
    dim3 grid((unsigned)s.n_chunk, (unsigned)a->n_draw);
    DSV4_LAUNCH(best_kernel, grid, THREADS, stream, s);
    if (a->needs & DSV4_NEEDS_EDITS) {
        DSV4_LAUNCH(edit_kernel, (unsigned)a->n_draw, THREADS, stream, s);
        s.edited = 1;
        DSV4_LAUNCH(best_kernel, grid, THREADS, stream, s);
    }
    if (a->needs & (DSV4_NEEDS_WEIGHTS | DSV4_NEEDS_LOGPROB))
        DSV4_LAUNCH(weigh_kernel, grid, THREADS, stream, s);
    if (a->needs & (DSV4_NEEDS_TOP_K | DSV4_NEEDS_TOP_P | DSV4_NEEDS_ALTERNATIVES))
        if (int code = narrow(&s, grid, stream))
            return code;
    DSV4_LAUNCH(draw_kernel, (unsigned)a->n_draw, THREADS, stream, s);
    if (a->needs & DSV4_NEEDS_ALTERNATIVES)
        DSV4_LAUNCH(alternatives_kernel, (unsigned)a->n_draw, THREADS, stream, s);
    return 0;
}
