/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What sampling is made of, on a CPU and on a device: the order of values, integer weights, the
 * edits of a value, random bits, and one row's choice in numbers.  csrc/gen/sampler.h is the
 * contract; everything here is the same IEEE additions, multiplications and divisions on every
 * machine, and integers.
 */
#ifndef DSV4_SAMPLING_H
#define DSV4_SAMPLING_H

#include "functions.h"

#define DSV4_ONE_WEIGHT 0x1p42 /* the weight of the best token */

/*
 * The next token of one row.  Its lists, int32 each, lie one after the other: ids of the biases,
 * ascending, and their f32 values; ids that are never taken; ids seen before, each once, and how
 * often each was produced.
 */
struct dsv4_draw {
    uint64_t seed;
    int64_t position;
    float temperature, top_p, min_p;
    float repetition, frequency, presence;
    uint32_t choice;
    int32_t top_k;    /* 0: off */
    int32_t forced;   /* the token, whatever the logits say, or -1 */
    int32_t logprobs; /* -1: none, else how many alternatives */
    int32_t n_bias, n_stop, n_seen;
};

/* What a row asks for beyond the best token. */
enum dsv4_draw_need {
    DSV4_NEEDS_EDITS = 1,
    DSV4_NEEDS_WEIGHTS = 2,
    DSV4_NEEDS_TOP_K = 4,
    DSV4_NEEDS_TOP_P = 8,
    DSV4_NEEDS_LOGPROB = 16,
    DSV4_NEEDS_ALTERNATIVES = 32,
};

DSV4_INLINE int32_t dsv4_draw_needs(const struct dsv4_draw *d) {
    int32_t needs = d->n_bias + d->n_stop + d->n_seen > 0 ? DSV4_NEEDS_EDITS : 0;
    if (d->forced < 0 && d->temperature > 0.0f) {
        needs |= DSV4_NEEDS_WEIGHTS;
        needs |= d->top_k > 0 ? DSV4_NEEDS_TOP_K : 0;
        needs |= d->top_p < 1.0f ? DSV4_NEEDS_TOP_P : 0;
    }
    needs |= d->logprobs >= 0 ? DSV4_NEEDS_LOGPROB : 0;
    return needs | (d->logprobs > 0 ? DSV4_NEEDS_ALTERNATIVES : 0);
}

/* Unsigned keys in the order of the floats; -0 equals +0, a NaN equals -infinity. */
DSV4_INLINE uint32_t dsv4_order_key(float v) {
    uint32_t u = dsv4_f32_bits(v + 0.0f);
    if (v != v)
        return 0x007fffffu;
    return u ^ ((0u - (u >> 31)) | 0x80000000u); /* negative: all bits, else the sign bit */
}

/*
 * floor(2^42 * exp(x)) for x <= 0, the exponential within 2^-46 of itself; a NaN gives 0.
 * exp(x) = 2^n * exp(r) with the Taylor series to r^11, |r| < 0.347: the next term is below 2^-47.
 * Not dsv4_expf: its fused multiply-adds are library calls in files that are compiled for every
 * CPU, and cost three times as much over a row.
 */
DSV4_INLINE uint64_t dsv4_softmax_weight(double x) {
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

/* The least integer that is not below x; 0 <= x < 2^63. */
DSV4_INLINE uint64_t dsv4_ceil_u64(double x) {
    uint64_t whole = (uint64_t)(int64_t)x;
    return (double)whole < x ? whole + 1 : whole;
}

/* The weight from which min_p keeps a token. */
DSV4_INLINE uint64_t dsv4_least_weight(float min_p) {
    return dsv4_ceil_u64((double)min_p * DSV4_ONE_WEIGHT);
}

/* The sum that the weights kept by top_p reach, of `total`. */
DSV4_INLINE uint64_t dsv4_top_p_target(float top_p, uint64_t total) {
    return dsv4_ceil_u64((double)top_p * (double)total);
}

/* The value of a token that was seen, and produced `count` times. */
DSV4_INLINE float dsv4_penalised(float x, int32_t count, float repetition, float frequency,
                                 float presence) {
    x = x > 0.0f ? x / repetition : x * repetition;
    x -= frequency * (float)count;
    x -= count > 0 ? presence : 0.0f;
    return x;
}

/* The logarithm of the sum of exp(l - l_max), from the sum of weights. */
DSV4_INLINE double dsv4_log_sum(uint64_t total) {
    /* log1p, since f32 would lose a small rest beside the best token's 1. */
    return (double)dsv4_log1pf((float)((double)total / DSV4_ONE_WEIGHT - 1.0));
}

DSV4_INLINE float dsv4_logprob(float logit, double high, double log_sum) {
    return (float)((double)logit - high - log_sum);
}

/* Philox 4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. */
DSV4_INLINE void dsv4_philox(uint32_t out[4], const uint32_t counter[4], const uint32_t key[2]) {
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

/* floor(r * total / 2^64), r the 64 random bits of this seed, answer and position. */
DSV4_INLINE uint64_t dsv4_draw_below(uint64_t seed, uint32_t choice, int64_t position,
                                     uint64_t total) {
    const uint32_t counter[4] = {(uint32_t)position, (uint32_t)((uint64_t)position >> 32), choice,
                                 0};
    const uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    uint32_t r[4];
    dsv4_philox(r, counter, key);
    uint64_t low = total & 0xffffffffu, high = total >> 32;
    uint64_t middle = r[1] * low + (r[0] * low >> 32); /* below 2^64: (2^32 - 1)^2 + 2^32 - 1 */
    uint64_t other = r[0] * high + (middle & 0xffffffffu);
    return r[1] * high + (middle >> 32) + (other >> 32);
}

#endif
