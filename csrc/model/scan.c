/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Reads every scale of every linear layer once, before the first step: a NaN or non-positive scale is refused, and FP8
 * and FP4 weights whose power-of-two scales could leave 2^+-55 when folded into a bf16 get the block rule instead
 * (kernels.h, rule 2 and DSV4_FOLD_*).
 */
#include <inttypes.h>
#include <stdlib.h>

#include "model/experts.h"
#include "model/model.h"

enum { READ_AHEAD = 16 }; /* weights */

struct scan {
    int ahead;                    /* the kernel does not read ahead by itself (resident.c) */
    struct dsv4_weight **weights; /* owned */
    int64_t n, capacity;
    atomic_llong first_bad;       /* index of a weight with a bad scale, n if none */
    atomic_ullong done;           /* scale bytes read */
};

static int add(struct scan *s, struct dsv4_weight *w) {
    if (!w->scale)
        return 0;
    if (s->n == s->capacity) {
        int64_t capacity = s->capacity ? 2 * s->capacity : 1024;
        struct dsv4_weight **grown = realloc(s->weights, (size_t)capacity * sizeof(*grown));
        if (!grown)
            return 1;
        s->weights = grown;
        s->capacity = capacity;
    }
    s->weights[s->n++] = w;
    return 0;
}

static int add_expert(struct scan *s, struct dsv4_expert *e) {
    return add(s, &e->w1) || add(s, &e->w3) || add(s, &e->w2);
}

static int collect(struct scan *s, dsv4_model *m) {
    for (int32_t i = 0; i < m->config.num_hidden_layers; i++) {
        struct dsv4_layer *l = &m->layers[i];
        if (add(s, &l->wq_a) || add(s, &l->wq_b) || add(s, &l->wkv) || add(s, &l->wo_a) || add(s, &l->wo_b) ||
            add(s, &l->index_wq_b) || add_expert(s, &l->shared))
            return 1;
        for (int32_t e = 0; e < m->config.n_routed_experts; e++)
            if (add_expert(s, &l->experts[e]))
                return 1;
    }
    return 0;
}

static int64_t scale_count(const struct dsv4_weight *w) {
    if (w->format == DSV4_W_FP4)
        return (int64_t)w->rows * (w->cols / DSV4_FP4_BLOCK);
    return ((int64_t)w->rows + 127) / 128 * ((w->cols + 127) / 128);
}

/* 1 when every scale is a positive number; decides the rule of e8m0 scales. */
static int scan_weight(struct dsv4_weight *w, int64_t n) {
    const uint8_t *p = w->scale;
    if (w->scale_type == DSV4_SCALE_E8M0) {
        int low = 255, high = 0;
        for (int64_t i = 0; i < n; i++) {
            low = p[i] < low ? p[i] : low;
            high = p[i] > high ? p[i] : high;
        }
        int fp4 = w->format == DSV4_W_FP4;
        if (low < (fp4 ? DSV4_FOLD_FP4_MIN : DSV4_FOLD_FP8_MIN) || high > (fp4 ? DSV4_FOLD_FP4_MAX : DSV4_FOLD_FP8_MAX))
            w->scale_rule = DSV4_SCALE_BLOCK;
        return high < 255;
    }
    for (int64_t i = 0; i < n; i++) {
        uint32_t u = 0;
        if (w->scale_type == DSV4_SCALE_F32) {
            memcpy(&u, p + 4 * i, 4);
        } else {
            uint16_t h;
            memcpy(&h, p + 2 * i, 2);
            u = (uint32_t)h << 16;
        }
        if (u == 0 || u >= 0x7f800000u) /* zero, infinite, NaN or negative */
            return 0;
    }
    return 1;
}

static void scan_job(dsv4_worker *w, void *ctx) {
    struct scan *s = ctx;
    int64_t lo, hi, asked;
    dsv4_share(w, s->n, 1, &lo, &hi);
    asked = s->ahead ? lo : hi;
    for (int64_t i = lo; i < hi && !dsv4_cancelled(w); i++) {
        int64_t n = scale_count(s->weights[i]);
        for (; asked < hi && asked < i + READ_AHEAD; asked++)
            dsv4_resident_ask(s->weights[asked]->scale, (size_t)scale_count(s->weights[asked]));
        if (!scan_weight(s->weights[i], n)) {
            long long seen = atomic_load(&s->first_bad);
            while (i < seen && !atomic_compare_exchange_weak(&s->first_bad, &seen, i))
                continue;
        }
        atomic_fetch_add(&s->done, (unsigned long long)n);
    }
}

/* The name of the tensor whose data `scale` is. */
static const char *name_of(const dsv4_model *m, const void *scale) {
    for (int32_t i = 0; i < m->n_tensor; i++)
        if (m->tensors[i].nbytes && dsv4_tensor_data(m, &m->tensors[i]) == scale)
            return m->tensors[i].name;
    return "?";
}

static dsv4_status run_scan(dsv4_model *m, struct scan *s, dsv4_error *err) {
    uint64_t total = 0;
    for (int64_t i = 0; i < s->n; i++)
        total += (uint64_t)scale_count(s->weights[i]);
    atomic_store(&s->first_bad, s->n);
    DSV4_TRY(dsv4_load_job(m, scan_job, s, &s->done, total, err));
    int64_t bad = atomic_load(&s->first_bad);
    if (bad < s->n)
        return dsv4_fail(err, DSV4_E_FORMAT, "tensor %s: got a scale that is NaN, infinite, zero or negative, wanted "
                         "positive numbers", name_of(m, s->weights[bad]->scale));
    return DSV4_OK;
}

dsv4_status dsv4_scan_weights(dsv4_model *m, dsv4_error *err) {
    struct scan s = {.ahead = m->options.use_mmap && m->options.expert_bytes};
    dsv4_status status = collect(&s, m) ? dsv4_fail(err, DSV4_E_MEMORY, "no memory for the list of scales")
                                        : run_scan(m, &s, err);
    free(s.weights);
    return status;
}
