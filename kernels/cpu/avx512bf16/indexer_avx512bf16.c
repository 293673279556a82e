/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Index scores by vpdpbusd, rounded two vectors at a time by vcvtne2ps2bf16, whose halves vdpbf16ps
 * takes apart again: with 0 as the other element of a pair it is a plain product, or a plain sum,
 * of every second lane.  The structure is in indexer_simd.h and indexer_fold_avx512.h.
 */
#define KEY_VECS 2
#define FOLD_KEYS 64
#include "cpu/avx512/indexer_avx512.h"

#define sum_start(bias) (bias)
#define sum_add _mm512_dpbusd_epi32
#define sum_finish(sum, bias) (sum)

#include "cpu/avx512/indexer_fold_avx512.h"

static inline __m512 dot(__m512 acc, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}

static inline __m512i two_to_bf16(__m512 high, __m512 low) {
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

static inline void add_to(float *score, __m512i p) {
    _mm512_store_ps(score, v_add(_mm512_load_ps(score), v_cast(p)));
}

/*
 * Two vectors at a time, keys 0...31: a is bf16(t) of all in order; x and y are the products of
 * even keys and of odd keys; a is these rounded, keys 0, 2, ... 30, 1, 3, ... 31.  So the first
 * vector of scores has keys 0, 4, ... 28, 1, 5, ... 29 and the second the others.
 */
static inline __attribute__((always_inline)) void fold_pair(struct fold_head *s, int part,
                                                            const int32_t *sum, float *score) {
    if (part == 0) {
        s->x = v_from_int(i_load(sum));
        FOLD_HERE(s->x);
    } else if (part == 1) {
        s->y = v_from_int(i_load(sum + LANES));
        FOLD_HERE(s->y);
    } else if (part == 2) {
        s->a = two_to_bf16(s->y, s->x);
        FOLD_HERE(s->a);
    } else if (part == 3) {
        s->a = _mm512_max_epi16(s->a, _mm512_setzero_si512());
        FOLD_HERE(s->a);
    } else if (part == 4) {
        s->x = dot(v_zero(), s->a, i_set1(*s->even));
        FOLD_HERE(s->x);
        s->y = dot(v_zero(), s->a, i_set1(*s->odd));
        FOLD_HERE(s->y);
    } else if (part == 5) {
        s->a = two_to_bf16(s->y, s->x);
        FOLD_HERE(s->a);
    } else if (part == 6) {
        add_to(score, SHIFT_LEFT(s->a, 16));
    } else {
        add_to(score + LANES, i_and(s->a, i_set1((int)0xffff0000u)));
    }
}

static inline __attribute__((always_inline)) void fold_add(struct fold_head *s, int part) {
    const int pair = part / 8 * 2 * LANES;
    fold_pair(s, part % 8, s->sum + pair, s->score + pair);
}

static void fold_order(float *score) {
    const __m512i low = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(4));
    for (int v = 0; v < 4 * LANES; v += 2 * LANES) {
        __m512 x = _mm512_load_ps(score + v), y = _mm512_load_ps(score + v + LANES);
        _mm512_store_ps(score + v, _mm512_permutex2var_ps(x, low, y));
        _mm512_store_ps(score + v + LANES, _mm512_permutex2var_ps(x, high, y));
    }
}

static void dsv4k_index_scores_avx512bf16(const struct dsv4_index_scores_args *a) {
    index_scores(a);
}

const struct dsv4_variant dsv4k_avx512bf16_indexer[] = {
    DSV4_VARIANT(index_scores, dsv4k_index_scores_avx512bf16, "avx512bf16", 0),
    {NULL, NULL, 0, 0},
};
