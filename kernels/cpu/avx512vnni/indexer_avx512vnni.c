/* SPDX-License-Identifier: Apache-2.0 */
/* Index scores by vpdpbusd; the structure is in indexer_simd.h and indexer_fold_avx512.h. */
#define KEY_VECS 2
#define FOLD_KEYS 64
#include "cpu/avx512/indexer_avx512.h"

#define sum_start(bias) (bias)
#define sum_add _mm512_dpbusd_epi32
#define sum_finish(sum, bias) (sum)

static inline __attribute__((always_inline)) void fold_add(__m512 score[4], const __m512i sum[4],
                                                           __m512i even, __m512i odd) {
    (void)even;
    UNROLL
    for (int v = 0; v < 4; v++) {
        __m512 t = v_round(v_from_int(_mm512_max_epi32(sum[v], _mm512_setzero_si512())));
        score[v] = v_add(score[v], v_round(v_mul(v_cast(odd), t)));
    }
}

static inline void fold_order(__m512 score[4]) {
    (void)score;
}

#include "cpu/avx512/indexer_fold_avx512.h"

static void dsv4k_index_scores_avx512vnni(const struct dsv4_index_scores_args *a) {
    index_scores(a);
}

const struct dsv4_variant dsv4k_avx512vnni_indexer[] = {
    DSV4_VARIANT(index_scores, dsv4k_index_scores_avx512vnni, "avx512vnni", 0),
    {NULL, NULL, 0, 0},
};
