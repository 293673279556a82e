/* SPDX-License-Identifier: Apache-2.0 */
/* Index scores by vpdpbusd; the structure is in indexer_simd.h. */
#define KEY_VECS 3
#include "cpu/avx512/indexer_avx512.h"

#define sum_start(bias) (bias)
#define sum_add _mm512_dpbusd_epi32
#define sum_finish(sum, bias) (sum)

#include "cpu/indexer_simd.h"

static void dsv4k_index_scores_avx512vnni(const struct dsv4_index_scores_args *a) {
    index_scores(a);
}

const struct dsv4_variant dsv4k_avx512vnni_indexer[] = {
    DSV4_VARIANT(index_scores, dsv4k_index_scores_avx512vnni, "avx512vnni", 0),
    {NULL, NULL, 0, 0},
};
