/* SPDX-License-Identifier: Apache-2.0 */
/* Index scores by vpmaddubsw and the selection of the best in eight lanes; the structure is in
 * indexer_simd.h and topk_simd.h.  The 16-bit sums of a block stay within 8 * 2 * 24 * 12 = 4608.
 */
#include "kernels.h"

#include <immintrin.h>
#include <string.h>

#define LANES 8
#define KEY_VECS 1
#define vec __m256
#define ivec __m256i
#define v_zero _mm256_setzero_ps
#define v_set1 _mm256_set1_ps
#define v_add _mm256_add_ps
#define v_mul _mm256_mul_ps
#define v_fma _mm256_fmadd_ps
#define v_cast _mm256_castsi256_ps
#define v_from_int _mm256_cvtepi32_ps
#define v_relu(x) _mm256_max_ps(_mm256_setzero_ps(), x) /* the second operand where one is NaN */
#define i_load(p) _mm256_load_si256((const __m256i *)(const void *)(p))
#define i_store(p, x) _mm256_store_si256((__m256i *)(void *)(p), x)
#define i_set1 _mm256_set1_epi32
#define i_add _mm256_add_epi32
#define i_and _mm256_and_si256
#define i_or _mm256_or_si256
#define i_equal _mm256_cmpeq_epi32
#define SHIFT_LEFT _mm256_slli_epi32
#define SHIFT_RIGHT _mm256_srai_epi32
#define sum_start(bias) _mm256_setzero_si256()
#define sum_add(sum, k, q) _mm256_add_epi16(sum, _mm256_maddubs_epi16(k, q))
#define sum_finish(sum, bias) _mm256_add_epi32(_mm256_madd_epi16(sum, _mm256_set1_epi16(1)), bias)

static inline __m256i i_clamp(__m256i x, int32_t low, int32_t high) {
    return _mm256_min_epi32(_mm256_max_epi32(x, i_set1(low)), i_set1(high));
}

static inline int i_any_outside(__m256i x, int32_t low, int32_t high) {
    __m256i out =
        _mm256_or_si256(_mm256_cmpgt_epi32(i_set1(low), x), _mm256_cmpgt_epi32(x, i_set1(high)));
    return _mm256_movemask_epi8(out) != 0;
}

/* To nearest even.  A NaN made here by an operation or canonical before stays one. */
static inline __m256 v_round(__m256 x) {
    __m256i u = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), i_set1(1));
    u = _mm256_add_epi32(_mm256_add_epi32(u, i_set1(0x7fff)), odd);
    return v_cast(_mm256_and_si256(u, i_set1((int)0xffff0000u)));
}

static inline void v_store_scores(float *out, __m256 x, __m256i nan, size_t n) {
    float all[LANES];
    __m256 bad = _mm256_or_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q), v_cast(nan));
    _mm256_storeu_ps(all, _mm256_blendv_ps(v_round(x), v_cast(i_set1(0x7fc00000)), bad));
    memcpy(out, all, n * sizeof *out);
}

/* A block (16 bytes of codes) of eight keys at a time, dwords transposed. */
static void load_codes(uint8_t *codes, const uint8_t *keys, size_t row_bytes, size_t n_block,
                       size_t n) {
    const __m256i twice_12 = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    const __m256i nibble = _mm256_set1_epi8(15);
    for (size_t b = 0; b < n_block; b++) {
        __m256i r[4], t[4];
        for (size_t i = 0; i < 4; i++) { /* keys i and i + 4 */
            const uint8_t *low = keys + i * row_bytes + b * 16, *high = low + 4 * row_bytes;
            __m128i x = _mm_setzero_si128(), y = x;
            if (i < n)
                x = _mm_loadu_si128((const __m128i *)(const void *)low);
            if (i + 4 < n)
                y = _mm_loadu_si128((const __m128i *)(const void *)high);
            r[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(x), y, 1);
        }
        t[0] = _mm256_unpacklo_epi32(r[0], r[1]);
        t[1] = _mm256_unpackhi_epi32(r[0], r[1]);
        t[2] = _mm256_unpacklo_epi32(r[2], r[3]);
        t[3] = _mm256_unpackhi_epi32(r[2], r[3]);
        r[0] = _mm256_unpacklo_epi64(t[0], t[2]);
        r[1] = _mm256_unpackhi_epi64(t[0], t[2]);
        r[2] = _mm256_unpacklo_epi64(t[1], t[3]);
        r[3] = _mm256_unpackhi_epi64(t[1], t[3]);
        for (size_t i = 0; i < 4; i++) {
            __m256i low = _mm256_and_si256(r[i], nibble);
            __m256i high = _mm256_and_si256(_mm256_srli_epi32(r[i], 4), nibble);
            __m256i *out = (__m256i *)(void *)(codes + (b * 8 + 2 * i) * 32);
            _mm256_store_si256(out, _mm256_shuffle_epi8(twice_12, low));
            _mm256_store_si256(out + 1, _mm256_shuffle_epi8(twice_12, high));
        }
    }
}

#include "cpu/indexer_simd.h"

static inline __m256i order_keys(const float *scores) {
    __m256 x = _mm256_add_ps(_mm256_loadu_ps(scores), _mm256_setzero_ps()); /* -0 to +0 */
    __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    __m256i u = _mm256_castps_si256(_mm256_blendv_ps(x, v_cast(i_set1((int)0xff800000u)), nan));
    return _mm256_xor_si256(u, _mm256_srli_epi32(_mm256_srai_epi32(u, 31), 1));
}

static inline unsigned keys_above(__m256i x, int32_t bound) {
    __m256i above = _mm256_cmpgt_epi32(x, i_set1(bound));
    return (unsigned)_mm256_movemask_ps(v_cast(above));
}

#include "cpu/topk_simd.h"

static void dsv4k_index_scores_avx2(const struct dsv4_index_scores_args *a) {
    index_scores(a);
}

static int32_t dsv4k_top_k_avx2(int32_t *ids, const float *scores, int32_t n, int32_t k,
                                void *scratch) {
    return top_k(ids, scores, n, k, scratch);
}

const struct dsv4_variant dsv4k_avx2_indexer[] = {
    DSV4_VARIANT(index_scores, dsv4k_index_scores_avx2, "avx2", 0),
    DSV4_VARIANT(top_k, dsv4k_top_k_avx2, "avx2", 0),
    {NULL, NULL, 0, 0},
};
