/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention by vdpbf16ps, which adds the product of the odd elements of its pairs, then that of the
 * even ones: the contract's order, with pairs of dimensions for the scores and pairs of ranks for
 * the values.
 *
 * The room of w->k holds two bf16 layouts:
 *
 *      [rank][64]                                 one strip by rank, for the scores
 *      [strip][pair of ranks][64 x (even, odd)]   all strips interleaved, for the values
 *
 * where the second has the dimensions of each 32 in the order of the unpack instructions: 0-3,
 * 8-11, 16-19, 24-27, then 4-7, 12-15, ...; w->acc keeps that order until order_strip.
 */
#include "cpu/avx512/attention_avx512.h"
#include "cpu/attention_simd.h"

static uint32_t *query_pairs(const struct work *w) {
    return (uint32_t *)w->q;
}

static dsv4_bf16 *key_rows(const struct work *w) {
    return (dsv4_bf16 *)w->k;
}

static dsv4_bf16 *value_pairs(const struct work *w, size_t strip) {
    return (dsv4_bf16 *)w->k + (1 + strip) * RANKS * STRIP;
}

static void pack_query(const struct work *w, const struct dsv4_attention_args *a) {
    __m512i r[16];
    size_t pairs = w->d_head / 2, n_head = (size_t)a->n_head;
    for (size_t h = 0; h < n_head; h += 16)
        for (size_t i = 0; i < pairs; i += 16) {
            size_t n = pairs - i < 16 ? pairs - i : 16;
            transposed_pairs(r, a->q + h * w->d_head + 2 * i, w->d_head, n_head - h, n);
            for (size_t j = 0; j < n; j++)
                _mm512_store_si512(query_pairs(w) + (i + j) * w->heads + h, r[j]);
        }
}

/*
 * 32 e4m3 codes (no NaN, scale byte 81...245) as bf16.  A normal code shifted left by 4 is a bf16
 * whose exponent is 120 too small; `sub` holds the subnormal ones likewise.  All but zero carry 240
 * more in the exponent, so that the saturating subtraction of `less` = (240 - (scale - 7)) << 7
 * gives the exponent its scale and leaves zero alone.
 */
static inline __m512i fp8_to_bf16(const uint8_t *codes, __m512i less) {
    const __m512i sub = _mm512_castsi128_si512(
        _mm_set_epi16(0x7860, 0x7840, 0x7820, 0x7800, 0x77c0, 0x7780, 0x7700, 0));
    __m512i z = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)codes)),
            v = _mm512_slli_epi16(z, 4);
    v = _mm512_ternarylogic_epi32(v, _mm512_set1_epi16(0x07f0), _mm512_set1_epi16(0x7800),
                                  0xea); /* v & b | c */
    v = _mm512_mask_permutexvar_epi16(v, _mm512_testn_epi16_mask(z, _mm512_set1_epi16(0x78)), z,
                                      sub);
    v = _mm512_subs_epu16(v, less);
    return _mm512_ternarylogic_epi32(v, z, _mm512_set1_epi16((short)0x8000),
                                     0xf8); /* v | z & sign */
}

/* A strip of FP8 codes that fp8_to_bf16 cannot take, or n < 64 bf16 values. */
static __attribute__((noinline)) void load_rare(__m512i x[2], const uint8_t *from, size_t n,
                                                int fp8, uint8_t scale) {
    dsv4_bf16 h[STRIP] = {0};
    if (!fp8)
        memcpy(h, from, n * sizeof *h);
    for (size_t i = 0; i < n; i++)
        h[i] = dsv4_bf16_operand(
            fp8 ? dsv4_f32_to_bf16(dsv4_e4m3_to_f32(from[i]) * dsv4_e8m0_to_f32(scale)) : h[i]);
    x[0] = _mm512_loadu_si512(h);
    x[1] = _mm512_loadu_si512(h + 32);
}

/* One strip of a row (NULL: +0) as 2 x 32 bf16 operands. */
static inline void load_strip(const struct work *w, __m512i x[2], const uint8_t *row,
                              size_t strip) {
    size_t d = strip * STRIP, left = w->d_head - d;
    if (row == NULL) {
        x[0] = x[1] = _mm512_setzero_si512();
    } else if (d < w->nope) {
        uint8_t scale = row[w->scales + strip];
        if (scale < 81 || scale > 245 || fp8_has_nan(row + d)) {
            load_rare(x, row + d, STRIP, 1, scale);
            return;
        }
        __m512i less = _mm512_set1_epi16((short)((247 - scale) << 7));
        x[0] = fp8_to_bf16(row + d, less);
        x[1] = fp8_to_bf16(row + d + 32, less);
    } else {
        const uint8_t *from = row + w->nope + (d - w->nope) * sizeof(dsv4_bf16);
        if (left < STRIP) {
            load_rare(x, from, left, 0, 0);
            return;
        }
        x[0] = operands(_mm512_loadu_si512(from));
        x[1] = operands(_mm512_loadu_si512(from + 64));
    }
}

static void load_pair(const struct work *w, size_t strip, size_t pair, const uint8_t *even,
                      const uint8_t *odd) {
    dsv4_bf16 *k = key_rows(w) + 2 * pair * STRIP, *v = value_pairs(w, strip) + 2 * pair * STRIP;
    __m512i x[2], y[2];
    load_strip(w, x, even, strip);
    load_strip(w, y, odd, strip);
    UNROLL
    for (int i = 0; i < 2; i++) {
        _mm512_store_si512(k + 32 * i, x[i]);
        _mm512_store_si512(k + STRIP + 32 * i, y[i]);
        _mm512_store_si512(v + 64 * i, _mm512_unpacklo_epi16(x[i], y[i]));
        _mm512_store_si512(v + 64 * i + 32, _mm512_unpackhi_epi16(x[i], y[i]));
    }
}

static inline __m512 dot(__m512 acc, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}

/* A pair of bf16 in every lane. */
static inline __m512i pair_at(const void *p) {
    int32_t x;
    memcpy(&x, p, sizeof x);
    return _mm512_set1_epi32(x);
}

/* The chains of `vecs` vectors of heads and `keys` ranks go on through one strip; the last strip
 * scales them to S. */
static inline __attribute__((always_inline)) void score_tile(const struct work *w, float scale,
                                                             size_t strip, size_t head, size_t rank,
                                                             const size_t vecs, const size_t keys) {
    __m512 s[16];
    float *p = w->p + rank * w->heads + head;
    const uint32_t *q = query_pairs(w) + strip * STRIP / 2 * w->heads + head;
    const dsv4_bf16 *k = key_rows(w) + rank * STRIP;
    size_t left = w->d_head - strip * STRIP, n = left < STRIP ? left : STRIP;
    UNROLL
    for (size_t i = 0; i < vecs * keys; i++)
        s[i] =
            strip == 0 ? _mm512_setzero_ps() : v_load(p + i / vecs * w->heads + i % vecs * LANES);
    for (size_t d = 0; d < n; d += 2, k += 2, q += w->heads) {
        UNROLL
        for (size_t j = 0; j < keys; j++) {
            __m512i x = pair_at(k + j * STRIP);
            UNROLL
            for (size_t i = 0; i < vecs; i++)
                s[j * vecs + i] = dot(s[j * vecs + i], _mm512_load_si512(q + i * LANES), x);
        }
    }
    UNROLL
    for (size_t i = 0; i < vecs * keys; i++)
        v_store(p + i / vecs * w->heads + i % vecs * LANES,
                left <= STRIP ? v_mul(s[i], v_set1(scale)) : s[i]);
}

static void scores(const struct work *w, float scale, size_t strip, size_t ranks) {
    size_t head = 0;
    for (; head + 4 * LANES <= w->heads; head += 4 * LANES)
        for (size_t j = 0; j < ranks; j += 4)
            score_tile(w, scale, strip, head, j, 4, 4);
    for (; head + 2 * LANES <= w->heads; head += 2 * LANES)
        for (size_t j = 0; j < ranks; j += 8)
            score_tile(w, scale, strip, head, j, 2, 8);
    for (; head < w->heads; head += LANES)
        for (size_t j = 0; j < ranks; j += 16)
            score_tile(w, scale, strip, head, j, 1, 16);
}

static void pack_p(const struct work *w, size_t pair, size_t head, __m512 even, __m512 odd) {
    const __m512i tiny = _mm512_set1_epi32(DSV4_TINY_F32);
    __m512i x = round_upper(even), y = round_upper(odd);
    x = _mm512_maskz_srli_epi32(_mm512_cmpge_epi32_mask(x, tiny), x, 16);
    y = _mm512_maskz_and_epi32(_mm512_cmpge_epi32_mask(y, tiny), y,
                               _mm512_set1_epi32((int)0xffff0000u));
    _mm512_store_si512(w->p + pair * w->heads + head, _mm512_or_si512(x, y));
}

/* 4 heads and a strip of dimensions, all ranks of the block. */
static void value_tile(const struct work *w, float *acc, const dsv4_bf16 *v, size_t head,
                       size_t pairs) {
    __m512 s[4][4];
    const float *p = w->p + head;
    UNROLL
    for (int h = 0; h < 4; h++) {
        UNROLL
        for (int i = 0; i < 4; i++)
            s[h][i] =
                v_flush(v_mul(v_load(acc + h * STRIP + i * LANES), v_set1(w->c[head + (size_t)h])));
    }
    for (size_t j = 0; j < pairs; j++, v += 2 * STRIP, p += w->heads) {
        __m512i x[4];
        UNROLL
        for (int i = 0; i < 4; i++)
            x[i] = _mm512_load_si512(v + i * 2 * LANES);
        UNROLL
        for (int h = 0; h < 4; h++) {
            __m512i y = pair_at(p + h);
            UNROLL
            for (int i = 0; i < 4; i++)
                s[h][i] = dot(s[h][i], x[i], y);
        }
    }
    UNROLL
    for (int h = 0; h < 4; h++) {
        UNROLL
        for (int i = 0; i < 4; i++)
            v_store(acc + h * STRIP + i * LANES, s[h][i]);
    }
}

static void values(const struct work *w, size_t n_head, size_t pairs) {
    for (size_t s = 0; s < w->strips; s++)
        for (size_t h = 0; h < n_head; h += 4)
            value_tile(w, w->acc + (s * w->heads + h) * STRIP, value_pairs(w, s), h, pairs);
}

static void order_strip(float *acc) {
    const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i second =
        _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
    for (int i = 0; i < STRIP; i += 2 * LANES) {
        __m512 x = v_load(acc + i), y = v_load(acc + i + LANES);
        v_store(acc + i, _mm512_permutex2var_ps(x, first, y));
        v_store(acc + i + LANES, _mm512_permutex2var_ps(x, second, y));
    }
}

static void dsv4k_attention_avx512bf16(const struct dsv4_attention_args *a) {
    attention(a);
}

const struct dsv4_variant dsv4k_avx512bf16_attention[] = {
    DSV4_VARIANT(attention, dsv4k_attention_avx512bf16, "avx512bf16", 1),
    {NULL, NULL, 0, 0},
};
