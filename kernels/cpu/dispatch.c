/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The choice of dispatch.h.  What the experiments of trial.h find is kept for the life of the
 * process, so a second table costs nothing and equals the first.
 */
#include "cpu/dispatch.h"

#include <pthread.h>

#include "cpu/cpu_features.h"
#include "cpu/registry.h"
#include "cpu/trial.h"

enum { MAX_VARIANTS = 64, MAX_TIMED = 256, TRIAL_ROUNDS = 5 };

const char *const dsv4k_cpu_set_names[] = {"avx2", "avx512", "avx512vnni", "avx512bf16", NULL};

/* The set of each name, and with it all sets it builds on. */
static const unsigned set_bit[] = {DSV4_SET_AVX2, DSV4_SET_AVX512, DSV4_SET_AVX512VNNI,
                                   DSV4_SET_AVX512BF16};
static const unsigned set_needs[] = {
    DSV4_SET_AVX2,
    DSV4_SET_AVX2 | DSV4_SET_AVX512,
    DSV4_SET_AVX2 | DSV4_SET_AVX512 | DSV4_SET_AVX512VNNI,
    DSV4_SET_AVX2 | DSV4_SET_AVX512 | DSV4_SET_AVX512VNNI | DSV4_SET_AVX512BF16,
};

/* Found once, under the lock. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int bf16_tested, bf16_equal;
static struct timing {
    const struct dsv4_variant *variant;
    double seconds;
} timings[MAX_TIMED];
static int n_timings;

static int find_set(const char *name, size_t length) {
    for (int i = 0; dsv4k_cpu_set_names[i]; i++)
        if (strlen(dsv4k_cpu_set_names[i]) == length &&
            memcmp(dsv4k_cpu_set_names[i], name, length) == 0)
            return i;
    return -1;
}

/* The sets that a name needs, up to a slash; none for "ref". */
static unsigned name_needs(const char *name) {
    int set = find_set(name, strcspn(name, "/"));
    return set < 0 ? 0 : set_needs[set];
}

static unsigned variant_needs(const struct dsv4_variant *v) {
    return name_needs(v->name);
}

int dsv4k_cpu_has(const char *set) {
    int i = find_set(set, strlen(set));
    return i >= 0 && (dsv4k_cpu_features() & set_needs[i]) == set_needs[i];
}

const char *dsv4k_op_name(enum dsv4_op op) {
    static const char *const names[] = {
#define X(op, type) #op,
        DSV4_KERNEL_OPS(X)
#undef X
    };
    return names[op];
}

/* All compiled variants of an operation whose needs lie within `sets`, in the order of the
 * registry. */
static int collect(enum dsv4_op op, unsigned sets, const struct dsv4_variant **out, int capacity) {
    int n = 0;
    for (const struct dsv4_variant *const *list = dsv4k_registry; *list; list++)
        for (const struct dsv4_variant *v = *list; v->fn; v++)
            if (v->op == (int)op && (variant_needs(v) & ~sets) == 0 && n < capacity)
                out[n++] = v;
    return n;
}

/* Whether vdpbf16ps sums in the contract's order on this processor: its linear layer against ref,
 * once. */
static int bf16_dot_equal_lock_held(void) {
    const struct dsv4_variant *v[MAX_VARIANTS];
    if (bf16_tested)
        return bf16_equal;
    bf16_tested = 1;
    int n = collect(DSV4_OP_linear_many_bf16, set_needs[3], v, MAX_VARIANTS);
    struct dsv4_trial *trial = dsv4k_trial_create();
    bf16_equal = trial != NULL;
    for (int i = 0; trial && i < n; i++)
        if (variant_needs(v[i]) & DSV4_SET_AVX512BF16)
            bf16_equal = bf16_equal && dsv4k_trial_equal(trial, v[i], v[0]);
    dsv4k_trial_destroy(trial);
    return bf16_equal;
}

static unsigned usable_sets(void) {
    unsigned sets = dsv4k_cpu_features();
    if (sets & DSV4_SET_AVX512BF16) {
        pthread_mutex_lock(&lock);
        if (!bf16_dot_equal_lock_held())
            sets &= ~(unsigned)DSV4_SET_AVX512BF16;
        pthread_mutex_unlock(&lock);
    }
    return sets;
}

int dsv4k_cpu_variants(enum dsv4_op op, const struct dsv4_variant **out, int capacity) {
    return collect(op, usable_sets(), out, capacity);
}

static struct timing *find_timing_lock_held(const struct dsv4_variant *v) {
    for (int i = 0; i < n_timings; i++)
        if (timings[i].variant == v)
            return &timings[i];
    return NULL;
}

/* Times the variants that have not been timed, in turns: what disturbs the machine for a while then
 * meets all of them. */
static void time_lock_held(struct dsv4_trial **trial, const struct dsv4_variant *const *v, int n) {
    const int first = n_timings;
    if (!*trial)
        *trial = dsv4k_trial_create();
    for (int i = 0; *trial && i < n && n_timings < MAX_TIMED; i++)
        if (!find_timing_lock_held(v[i]))
            timings[n_timings++] = (struct timing){v[i], 1e9};
    for (int round = 0; round < TRIAL_ROUNDS; round++)
        for (int i = first; i < n_timings; i++) {
            double seconds = dsv4k_trial_seconds(*trial, timings[i].variant);
            timings[i].seconds = seconds < timings[i].seconds ? seconds : timings[i].seconds;
        }
}

/* The strongest variant, or the fastest of those that compete on registers as wide as its own; a
 * lead of less than a twentieth is noise of calls as short as these. */
static const struct dsv4_variant *choose_lock_held(enum dsv4_op op, unsigned sets,
                                                   struct dsv4_trial **trial) {
    const struct dsv4_variant *v[MAX_VARIANTS];
    int n = collect(op, sets, v, MAX_VARIANTS), rivals = 0;
    const struct dsv4_variant *best = v[n - 1];
    const unsigned wide = variant_needs(best) & DSV4_SET_AVX512;
    for (int i = 0; i < n; i++)
        if (v[i]->competes && (variant_needs(v[i]) & DSV4_SET_AVX512) == wide)
            v[rivals++] = v[i];
    if (!best->competes || rivals < 2)
        return best;
    time_lock_held(trial, v, rivals);
    const struct timing *fastest = find_timing_lock_held(best), *strongest = fastest;
    for (int i = rivals - 1; i >= 0; i--) {
        const struct timing *timing = find_timing_lock_held(v[i]);
        if (timing && fastest && timing->seconds < fastest->seconds)
            fastest = timing;
    }
    return fastest && fastest->seconds < 0.95 * strongest->seconds ? fastest->variant : best;
}

/* The sets named in `disable` and all that build on them; NULL, or where an unknown name starts. */
static const char *disabled_sets(const char *disable, unsigned *sets) {
    *sets = 0;
    for (const char *p = disable; p && *p;) {
        size_t length = strcspn(p, ",");
        int set = find_set(p, length);
        if (set < 0)
            return p;
        for (int i = 0; dsv4k_cpu_set_names[i]; i++)
            if (set_needs[i] & set_bit[set])
                *sets |= set_bit[i];
        p += length + (p[length] == ',');
    }
    return NULL;
}

const char *dsv4k_cpu_limits(const struct dsv4_limit **out, int *n, int capacity,
                             const char *disable) {
    unsigned disabled, sets;
    const char *unknown = disabled_sets(disable, &disabled);
    if (unknown)
        return unknown;
    sets = usable_sets() & ~disabled;
    *n = 0;
    for (const struct dsv4_limit *const *list = dsv4k_limits; *list; list++)
        for (const struct dsv4_limit *limit = *list; limit->name && *n < capacity; limit++)
            if ((name_needs(limit->set) & ~sets) == 0)
                out[(*n)++] = limit;
    return NULL;
}

const char *dsv4k_cpu_init(struct dsv4_kernels *table,
                           const struct dsv4_variant *chosen[DSV4_OP_COUNT], const char *disable) {
    unsigned disabled;
    const char *unknown = disabled_sets(disable, &disabled);
    if (unknown)
        return unknown;
    unsigned sets = usable_sets() & ~disabled;
    struct dsv4_trial *trial = NULL;
    pthread_mutex_lock(&lock);
    for (int op = 0; op < DSV4_OP_COUNT; op++)
        chosen[op] = choose_lock_held((enum dsv4_op)op, sets, &trial);
    pthread_mutex_unlock(&lock);
    dsv4k_trial_destroy(trial);
#define X(op, type) table->op = (type *)chosen[DSV4_OP_##op]->fn;
    DSV4_KERNEL_OPS(X)
#undef X
    return NULL;
}
