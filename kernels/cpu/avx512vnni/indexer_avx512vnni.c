/* SPDX-License-Identifier: Apache-2.0 */
/* Index scores by vpdpbusd; the structure is in indexer_simd.h and indexer_fold_avx512.h. */
#define KEY_VECS 2
#define FOLD_KEYS 64
#include "cpu/avx512/indexer_avx512.h"

#define sum_start(bias) (bias)
#define sum_add _mm512_dpbusd_epi32
#define sum_finish(sum, bias) (sum)

#include "cpu/avx512/indexer_fold_avx512.h"

/* A vector of keys in four parts. */
static inline __attribute__((always_inline)) void fold_add(struct fold_head *s, int part) {
    const int v = part / 4 * LANES;
    if (part % 4 == 0) {
        s->x = v_from_int(_mm512_max_epi32(i_load(s->sum + v), _mm512_setzero_si512()));
        FOLD_HERE(s->x);
    } else if (part % 4 == 1) {
        s->x = v_round(s->x);
        FOLD_HERE(s->x);
    } else if (part % 4 == 2) {
        s->x = v_mul(v_cast(i_set1(*s->odd)), s->x);
        FOLD_HERE(s->x);
    } else {
        _mm512_store_ps(s->score + v, v_add(_mm512_load_ps(s->score + v), v_round(s->x)));
    }
}

static void fold_order(float *score) {
    (void)score;
}

static void dsv4k_index_scores_avx512vnni(const struct dsv4_index_scores_args *a) {
    index_scores(a);
}

const struct dsv4_variant dsv4k_avx512vnni_indexer[] = {
    DSV4_VARIANT(index_scores, dsv4k_index_scores_avx512vnni, "avx512vnni", 0),
    {NULL, NULL, 0, 0},
};
