/* SPDX-License-Identifier: Apache-2.0 */
/* Index scores by vpmaddubsw and the selection of the best in sixteen lanes; the structure is in
 * indexer_simd.h and topk_simd.h.  The 16-bit sums of a block stay within 8 * 2 * 24 * 12 = 4608.
 */
#define KEY_VECS 2
#include "cpu/avx512/indexer_avx512.h"

#define sum_start(bias) _mm512_setzero_si512()
#define sum_add(sum, k, q) _mm512_add_epi16(sum, _mm512_maddubs_epi16(k, q))
#define sum_finish(sum, bias) _mm512_add_epi32(_mm512_madd_epi16(sum, _mm512_set1_epi16(1)), bias)

#include "cpu/indexer_simd.h"

static inline __m512i order_keys(const float *scores) {
    __m512 x = _mm512_add_ps(_mm512_loadu_ps(scores), _mm512_setzero_ps()); /* -0 to +0 */
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    __m512i u = _mm512_mask_mov_epi32(_mm512_castps_si512(x), nan, i_set1((int)0xff800000u));
    return _mm512_xor_si512(u, _mm512_srli_epi32(_mm512_srai_epi32(u, 31), 1));
}

static inline unsigned keys_above(__m512i x, int32_t bound) {
    return _mm512_cmpgt_epi32_mask(x, i_set1(bound));
}

#include "cpu/topk_simd.h"

static void dsv4k_index_scores_avx512(const struct dsv4_index_scores_args *a) {
    index_scores(a);
}

static int32_t dsv4k_top_k_avx512(int32_t *ids, const float *scores, int32_t n, int32_t k,
                                  void *scratch) {
    return top_k(ids, scores, n, k, scratch);
}

const struct dsv4_variant dsv4k_avx512_indexer[] = {
    DSV4_VARIANT(index_scores, dsv4k_index_scores_avx512, "avx512", 0),
    DSV4_VARIANT(top_k, dsv4k_top_k_avx512, "avx512", 0),
    {NULL, NULL, 0, 0},
};
