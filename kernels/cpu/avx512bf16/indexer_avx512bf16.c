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

static inline __m512 dot(__m512 acc, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}

/*
 * Per pair of vectors, keys 0...31: bf16(t) of all in order; products of even keys and of odd keys;
 * rounded, keys 0, 2, ... 30, 1, 3, ... 31; so score[0] has keys 0, 4, ... 28, 1, 5, ... 29 and
 * score[1] the others.
 */
static inline __attribute__((always_inline)) void fold_add(__m512 score[4], const __m512i sum[4],
                                                           __m512i even, __m512i odd) {
    const __m512i upper = i_set1((int)0xffff0000u);
    UNROLL
    for (int v = 0; v < 4; v += 2) {
        __m512i t = (__m512i)_mm512_cvtne2ps_pbh(v_from_int(sum[v + 1]), v_from_int(sum[v]));
        t = _mm512_max_epi16(t, _mm512_setzero_si512());
        __m512 x = dot(v_zero(), t, even), y = dot(v_zero(), t, odd);
        __m512i p = (__m512i)_mm512_cvtne2ps_pbh(y, x);
        score[v] = v_add(score[v], v_cast(SHIFT_LEFT(p, 16)));
        score[v + 1] = v_add(score[v + 1], v_cast(i_and(p, upper)));
    }
}

static inline void fold_order(__m512 score[4]) {
    const __m512i low = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(4));
    for (int v = 0; v < 4; v += 2) {
        __m512 x = score[v], y = score[v + 1];
        score[v] = _mm512_permutex2var_ps(x, low, y);
        score[v + 1] = _mm512_permutex2var_ps(x, high, y);
    }
}

#include "cpu/avx512/indexer_fold_avx512.h"

static void dsv4k_index_scores_avx512bf16(const struct dsv4_index_scores_args *a) {
    index_scores(a);
}

const struct dsv4_variant dsv4k_avx512bf16_indexer[] = {
    DSV4_VARIANT(index_scores, dsv4k_index_scores_avx512bf16, "avx512bf16", 0),
    {NULL, NULL, 0, 0},
};
