/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Index scores for queries and keys whose blocks have exponents close together, as a rotation
 * leaves them: codes are shifted to one exponent per row, so that the whole row is one sum of
 * vpdpbusd, four times fewer conversions and no multiplication by the scales.
 *
 * Why the bits are those of cpu/ref/indexer.c: with exponents at most 3 above the smallest of each
 * row, each block's sum times its scale is an integer below 2^19 times the scale 2^e of the
 * smallest ones, so all sums of the fused chain are integers below 2^24 times 2^e: none is rounded,
 * and the integer sum of all blocks is the same number.  Rounding to bf16, multiplying by the
 * weight and adding up heads commute with a factor 2^e, as long as nothing leaves the normal
 * floats: so the query's part of it is in the weight and the key's is multiplied at the end.  For
 * that exponents lie within 2^+-24 and weights within 2^-60 ... 2^24, or are zero.
 *
 * A tile is four heads by 64 keys.  The including file defines before that what indexer_avx512.h
 * and indexer_simd.h ask for, with FOLD_KEYS 64, and gives afterwards
 *
 *   fold_add(s, part)       part 0 ... 15 of adding bf16(w * bf16(max(sum, 0))) to the scores of 64
 *                           keys for one head, in an order of keys of its own
 *   fold_order(score)       makes the keys ascend
 *
 * The parts are there because the processor does not look far enough ahead to hide other work
 * behind so many dots: that work has to stand between them.
 */
#ifndef DSV4_INDEXER_FOLD_AVX512_H
#define DSV4_INDEXER_FOLD_AVX512_H

#include "cpu/avx512/indexer_avx512.h"
#include "cpu/indexer_simd.h"

/* Keeps what has been computed so far, in this order, before what follows. */
#define FOLD_HERE(x) __asm__ volatile("" : "+v"(x))

enum {
    FOLD_VECS = FOLD_KEYS / LANES,
    FOLD_SHIFT = 3,
    FOLD_LOW = 127 - 24, /* scale bytes */
    FOLD_HIGH = 127 + 24,
    KEY_OFFSET = 96, /* 12 << FOLD_SHIFT: makes the codes of keys unsigned */
};

/* Codes of FOLD_KEYS rows: a dword of each row per step. */
typedef int32_t fold_step[FOLD_KEYS];

struct folded {
    fold_step *keys[2];   /* [d_index / 4] each: bytes KEY_OFFSET + (2k << shift) */
    int32_t *exponent[2]; /* [FOLD_KEYS] each: smallest scale byte of each key */
    fold_step *q;         /* [ceil(n_head / FOLD_KEYS)][d_index / 4]: bytes 2q << shift */
    int32_t *start;       /* [heads] -KEY_OFFSET * sum of 2q << shift */
    int32_t *even, *odd;  /* [heads] weight * 2^(eq - 2) as bf16 in one half */
    int32_t *shift; /* [ceil(n_block / 4)][FOLD_KEYS] of the rows being loaded, a byte per block */
    int32_t *unit;  /* [6][LANES] of the rows being loaded, see fold_dwords */
    int32_t *sum;   /* [GROUP][FOLD_KEYS] of the heads before */
    float *score;   /* [FOLD_KEYS] */
    uint8_t *rows;  /* [FOLD_KEYS] rows of an incomplete tile */
    size_t steps, n_block; /* steps = n_block * STEPS */
};

/* The sums of a head and where they are added, and what is between the parts of that. */
struct fold_head {
    const int32_t *sum; /* [FOLD_KEYS] */
    /* the weight, times 2^(eq - 2), as bf16: in the lower half; in the upper half, so as float */
    const int32_t *even, *odd;
    float *score; /* [FOLD_KEYS] */
    ivec a, b;
    vec x, y;
};

static inline __attribute__((always_inline)) void fold_add(struct fold_head *s, int part);
static void fold_order(float *score);

static struct folded fold_cut(const struct work *w) {
    struct folded f;
    size_t parts = ((size_t)w->a->n_head + FOLD_KEYS - 1) / FOLD_KEYS, heads = parts * FOLD_KEYS;
    f.n_block = w->n_block;
    f.steps = w->n_block * STEPS;
    f.keys[0] = (fold_step *)(void *)w->rest;
    f.keys[1] = f.keys[0] + f.steps;
    f.q = f.keys[1] + f.steps;
    f.start = f.q[parts * f.steps];
    f.even = f.start + heads;
    f.odd = f.even + heads;
    f.exponent[0] = f.odd + heads;
    f.exponent[1] = f.exponent[0] + FOLD_KEYS;
    f.shift = f.exponent[1] + FOLD_KEYS;
    f.unit = f.shift + (f.n_block + 3) / 4 * FOLD_KEYS;
    f.sum = f.unit + 6 * LANES;
    f.score = (float *)(f.sum + GROUP * FOLD_KEYS);
    f.rows = (uint8_t *)(f.score + FOLD_KEYS);
    assert(f.rows + FOLD_KEYS * w->row_bytes <=
           (uint8_t *)w->a->scratch + DSV4_INDEX_SCRATCH(w->a->n_head, w->a->d_index));
    return f;
}

/*
 * The smallest scale byte of n <= FOLD_KEYS rows, and f->shift; returns 0 where they cannot be
 * folded.
 */
static int fold_scales(const struct folded *f, int32_t *exponent, const uint8_t *rows,
                       size_t row_bytes, size_t n) {
    /* which bytes of the dword that ends with the last of 1, 2, 3, 4 left, again to fill it */
    static const int32_t order[] = {0x03030303, 0x03020302, 0x01030201, 0x03020100};
    ivec low[FOLD_VECS], high[FOLD_VECS];
    UNROLL
    for (size_t v = 0; v < FOLD_VECS; v++) {
        low[v] = i_set1(-1);
        high[v] = i_set1(0);
    }
    for (size_t b = 0; b < f->n_block; b += 4) {
        size_t left = f->n_block - b < 4 ? f->n_block - b : 4;
        const uint8_t *from = rows + f->n_block * 16 + b + left - 4;
        int32_t *dwords = f->shift + b / 4 * FOLD_KEYS;
        ivec take = _mm512_or_si512(
            i_set1(order[left - 1]),
            _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c)));
        for (size_t i = 0; i < n; i++, from += row_bytes)
            memcpy(dwords + i, from, 4);
        for (size_t i = n; i < FOLD_KEYS; i++)
            dwords[i] = 0x7f7f7f7f;
        UNROLL
        for (size_t v = 0; v < FOLD_VECS; v++) {
            ivec x = _mm512_shuffle_epi8(i_load(dwords + v * LANES), take);
            low[v] = _mm512_min_epu8(low[v], x);
            high[v] = _mm512_max_epu8(high[v], x);
            i_store(dwords + v * LANES, x);
        }
    }
    __mmask64 outside = 0;
    UNROLL
    for (size_t v = 0; v < FOLD_VECS; v++) {
        low[v] = _mm512_min_epu8(low[v], _mm512_ror_epi32(low[v], 8));
        low[v] = _mm512_min_epu8(low[v], _mm512_ror_epi32(low[v], 16));
        outside |= _mm512_cmplt_epu8_mask(low[v], _mm512_set1_epi8(FOLD_LOW));
        outside |= _mm512_cmpgt_epu8_mask(low[v], _mm512_set1_epi8((char)FOLD_HIGH));
        outside |=
            _mm512_cmpgt_epu8_mask(_mm512_sub_epi8(high[v], low[v]), _mm512_set1_epi8(FOLD_SHIFT));
        i_store(exponent + v * LANES, i_and(low[v], i_set1(255)));
        for (size_t b = 0; b < f->n_block; b += 4) {
            int32_t *shift = f->shift + b / 4 * FOLD_KEYS + v * LANES;
            i_store(shift, _mm512_sub_epi8(i_load(shift), low[v]));
        }
    }
    return !outside;
}

/* n <= FOLD_KEYS rows where FOLD_KEYS may be read. */
static const uint8_t *fold_rows(const struct folded *f, const uint8_t *rows, size_t row_bytes,
                                size_t n) {
    if (n == FOLD_KEYS)
        return rows;
    memset(f->rows, 0, FOLD_KEYS * row_bytes);
    return memcpy(f->rows, rows, n * row_bytes);
}

/*
 * Rows are loaded in FOLD_VECS * n_block units, a block of LANES of them each: first their four
 * dwords, shifts, and what is added after shifting, to f->unit, then dword by dword to codes.
 */
static inline __attribute__((always_inline)) void fold_dwords(const struct folded *f,
                                                              const uint8_t *rows, size_t unit,
                                                              const int offset,
                                                              const size_t n_block) {
    const size_t first = unit / n_block * LANES, b = unit % n_block, row_bytes = 17 * n_block;
    const uint8_t *at = rows + first * row_bytes + b * 16;
    ivec r[4], t[4];
    UNROLL
    for (size_t i = 0; i < 4; i++, at += row_bytes) {
        const uint8_t *at_4 = at + 4 * row_bytes, *at_8 = at + 8 * row_bytes;
        const uint8_t *at_12 = at + 12 * row_bytes;
        r[i] = _mm512_castsi128_si512(_mm_loadu_si128((const void *)at));
        r[i] = _mm512_mask_broadcast_i32x4(r[i], 0x00f0, _mm_loadu_si128((const void *)at_4));
        r[i] = _mm512_mask_broadcast_i32x4(r[i], 0x0f00, _mm_loadu_si128((const void *)at_8));
        r[i] = _mm512_mask_broadcast_i32x4(r[i], 0xf000, _mm_loadu_si128((const void *)at_12));
    }
    /* r[i] has row 4j + i in 128-bit lane j: transposed within the lanes, dword i of rows 0...15 */
    t[0] = _mm512_unpacklo_epi32(r[0], r[1]);
    t[1] = _mm512_unpackhi_epi32(r[0], r[1]);
    t[2] = _mm512_unpacklo_epi32(r[2], r[3]);
    t[3] = _mm512_unpackhi_epi32(r[2], r[3]);
    i_store(f->unit, _mm512_unpacklo_epi64(t[0], t[2]));
    i_store(f->unit + LANES, _mm512_unpackhi_epi64(t[0], t[2]));
    i_store(f->unit + 2 * LANES, _mm512_unpacklo_epi64(t[1], t[3]));
    i_store(f->unit + 3 * LANES, _mm512_unpackhi_epi64(t[1], t[3]));
    ivec shift = i_load(f->shift + b / 4 * FOLD_KEYS + first);
    shift = i_and(_mm512_srl_epi32(shift, _mm_cvtsi32_si128((int)(b % 4 * 8))), i_set1(FOLD_SHIFT));
    i_store(f->unit + 4 * LANES, shift);
    i_store(f->unit + 5 * LANES, _mm512_sub_epi8(_mm512_set1_epi8((char)offset),
                                                 _mm512_sllv_epi32(_mm512_set1_epi8(12), shift)));
}

/* Codes of a dword of the unit: where they go, and what is between the parts of it. */
struct fold_load {
    const int32_t *unit, *dword;
    int32_t *to;
    ivec low, high;
};

/* Part 0 ... 15 of it; (2k + 12) << shift stays within its byte. */
static inline __attribute__((always_inline)) void fold_codes(struct fold_load *l, const int part) {
    const ivec nibble = _mm512_set1_epi8(15), shift = i_load(l->unit + 4 * LANES);
    const ivec twice_12 = _mm512_broadcast_i32x4(
        _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    if (part == 1) {
        l->low = i_and(i_load(l->dword), nibble);
        FOLD_HERE(l->low);
    } else if (part == 3) {
        l->low = _mm512_shuffle_epi8(twice_12, l->low);
        FOLD_HERE(l->low);
    } else if (part == 4) {
        l->high = _mm512_srli_epi32(i_load(l->dword), 4);
        FOLD_HERE(l->high);
    } else if (part == 5) {
        l->low = _mm512_sllv_epi32(l->low, shift);
        FOLD_HERE(l->low);
    } else if (part == 6) {
        l->high = i_and(l->high, nibble);
        FOLD_HERE(l->high);
    } else if (part == 8) {
        i_store(l->to, _mm512_add_epi8(l->low, i_load(l->unit + 5 * LANES)));
    } else if (part == 9) {
        l->high = _mm512_shuffle_epi8(twice_12, l->high);
        FOLD_HERE(l->high);
    } else if (part == 12) {
        l->high = _mm512_sllv_epi32(l->high, shift);
        FOLD_HERE(l->high);
    } else if (part == 13) {
        i_store(l->to + FOLD_KEYS, _mm512_add_epi8(l->high, i_load(l->unit + 5 * LANES)));
    }
}

static inline __attribute__((always_inline)) struct fold_load
fold_load(const struct folded *f, fold_step *out, size_t unit, size_t dword, const size_t n_block) {
    const size_t first = unit / n_block * LANES, step = unit % n_block * STEPS + 2 * dword;
    return (struct fold_load){
        .unit = f->unit, .dword = f->unit + dword * LANES, .to = out[step] + first};
}

static void fold_unit(const struct folded *f, fold_step *out, const uint8_t *rows, size_t unit,
                      int offset) {
    fold_dwords(f, rows, unit, offset, f->n_block);
    for (size_t i = 0; i < 4; i++) {
        struct fold_load l = fold_load(f, out, unit, i, f->n_block);
        UNROLL
        for (int part = 0; part < 16; part++)
            fold_codes(&l, part);
    }
}

/* Weights of heads as the contract says, times 2^(eq - 2); returns 0 where one is out of range. */
static int fold_weights(const struct work *w, const struct folded *f, const int32_t *exponent,
                        size_t head, size_t n) {
    for (size_t h = 0; h < FOLD_KEYS; h++) {
        float x = h < n ? dsv4_bf16_to_f32(w->a->head_w[head + h]) * w->a->w_scale : 0.0f;
        uint32_t u = (uint32_t)dsv4_f32_to_bf16(x) << 16, size = u & 0x7fffffffu;
        if (size != 0 && (size < (127 - 60) << FIELD || size > (127 + 24) << FIELD))
            return 0;
        if (size != 0)
            u += (uint32_t)(exponent[h] - 129) << FIELD;
        f->odd[head + h] = (int32_t)u;
        f->even[head + h] = (int32_t)(u >> 16);
    }
    return 1;
}

static int fold_queries(struct work *w) {
    const struct folded f = fold_cut(w);
    const size_t n_head = (size_t)w->a->n_head;
    for (size_t head = 0; head < n_head; head += FOLD_KEYS) {
        fold_step *q = f.q + head / FOLD_KEYS * f.steps;
        const uint8_t *rows = w->a->q + head * w->row_bytes;
        size_t n = n_head - head < FOLD_KEYS ? n_head - head : FOLD_KEYS;
        if (!fold_scales(&f, f.exponent[0], rows, w->row_bytes, n) ||
            !fold_weights(w, &f, f.exponent[0], head, n))
            return 0;
        rows = fold_rows(&f, rows, w->row_bytes, n);
        for (size_t unit = 0; unit < FOLD_VECS * f.n_block; unit++)
            fold_unit(&f, q, rows, unit, 0);
        for (size_t v = 0; v * LANES < n; v++) {
            ivec sum = i_set1(0);
            for (size_t i = 0; i < f.steps; i++)
                sum = sum_add(sum, _mm512_set1_epi8(KEY_OFFSET), i_load(q[i] + v * LANES));
            i_store(f.start + head + v * LANES, _mm512_sub_epi32(i_set1(0), sum));
        }
    }
    return 1;
}

static int fold_keys(struct work *w, const struct tile *t) {
    const struct folded f = fold_cut(w);
    int fold = t->n && fold_scales(&f, f.exponent[w->half], t->keys, w->row_bytes, t->n);
    const uint8_t *rows = fold ? fold_rows(&f, t->keys, w->row_bytes, t->n) : NULL;
    for (size_t unit = 0; fold && unit < FOLD_VECS * f.n_block; unit++)
        fold_unit(&f, f.keys[w->half], rows, unit, KEY_OFFSET);
    return fold;
}

/* A block of 32 of four heads and 64 keys; between the dots, part of a head and part of a load. */
static inline __attribute__((always_inline)) void fold_block(const fold_step *k, const int32_t *q,
                                                             ivec sum[GROUP][FOLD_VECS],
                                                             struct fold_head *s,
                                                             struct fold_load *l) {
    UNROLL
    for (int i = 0; i < STEPS; i++) {
        ivec x[FOLD_VECS];
        UNROLL
        for (size_t v = 0; v < FOLD_VECS; v++)
            x[v] = i_load(k[i] + v * LANES);
        UNROLL
        for (int h = 0; h < GROUP; h++) {
            ivec y = i_set1(q[i * FOLD_KEYS + h]);
            UNROLL
            for (size_t v = 0; v < FOLD_VECS; v++) {
                sum[h][v] = sum_add(sum[h][v], x[v], y);
                FOLD_HERE(sum[h][v]);
            }
            if (s && h % 2 == 0)
                fold_add(s, 2 * i + h / 2);
            if (l && h % 2 == 1)
                fold_codes(l, 2 * i + h / 2);
        }
    }
}

static inline struct fold_head fold_head(const struct folded *f, size_t head, size_t h) {
    return (struct fold_head){.sum = f->sum + h * FOLD_KEYS,
                              .even = f->even + head + h,
                              .odd = f->odd + head + h,
                              .score = f->score};
}

/* The four heads whose sums are there. */
static void fold_rest(const struct folded *f, size_t head) {
    for (size_t h = 0; h < GROUP; h++) {
        struct fold_head s = fold_head(f, head, h);
        UNROLL
        for (int part = 0; part < 16; part++)
            fold_add(&s, part);
    }
}

/*
 * Sums of four heads.  In the shadow of the dots the scores get the heads before them, unless these
 * are added already (between == 0), and the next tile a unit of its codes, if its dwords are there.
 */
static inline __attribute__((always_inline)) void
fold_group(const struct folded *f, const fold_step *k, size_t head, size_t before, fold_step *out,
           size_t unit, const int between, const int load) {
    ivec sum[GROUP][FOLD_VECS];
    const int32_t *q = f->q[head / FOLD_KEYS * f->steps] + head % FOLD_KEYS;
    UNROLL
    for (size_t h = 0; h < GROUP; h++) {
        UNROLL
        for (size_t v = 0; v < FOLD_VECS; v++)
            sum[h][v] = i_set1(f->start[head + h]);
    }
    for (size_t b = 0; b < (between ? 4 : f->n_block); b++, k += STEPS, q += STEPS * FOLD_KEYS) {
        struct fold_head s = fold_head(f, before, b);
        struct fold_load l = fold_load(f, out, unit, b, between ? 4 : f->n_block);
        fold_block(k, q, sum, between ? &s : NULL, load ? &l : NULL);
    }
    UNROLL
    for (size_t h = 0; h < GROUP; h++) {
        UNROLL
        for (size_t v = 0; v < FOLD_VECS; v++)
            i_store(f->sum + h * FOLD_KEYS + v * LANES, sum[h][v]);
    }
}

/* All heads of a tile, the next one loaded meanwhile; four blocks, which are four heads or dwords.
 */
static void fold_between(const struct folded *f, const fold_step *k, size_t n_head, fold_step *out,
                         const uint8_t *rows, const uint8_t *ahead, size_t ahead_bytes) {
    const size_t units = rows ? FOLD_VECS * 4 : 0;
    size_t unit = 0, before = 0, fetched = 0;
    for (; unit + (n_head + GROUP - 1) / GROUP < units; unit++)
        fold_unit(f, out, rows, unit, KEY_OFFSET);
    memset(f->sum, 0, GROUP * FOLD_KEYS * sizeof *f->sum); /* before the first: heads that add +0 */
    for (size_t head = 0; head < n_head; before = head, head += GROUP) {
        for (; fetched * n_head < ahead_bytes * (head + GROUP) && fetched < ahead_bytes;
             fetched += 64)
            __builtin_prefetch(ahead + fetched);
        if (unit < units) {
            fold_dwords(f, rows, unit, KEY_OFFSET, 4);
            fold_group(f, k, head, before, out, unit++, 1, 1);
        } else {
            fold_group(f, k, head, before, out, 0, 1, 0);
        }
    }
    fold_rest(f, before);
}

static int fold_scores(struct work *w, const struct tile t[3]) {
    const struct folded f = fold_cut(w);
    const size_t n_head = (size_t)w->a->n_head;
    const fold_step *k = f.keys[w->half];
    const int32_t *exponent = f.exponent[w->half];
    w->half ^= 1;
    fold_step *out = f.keys[w->half];
    int fold = t[1].n && fold_scales(&f, f.exponent[w->half], t[1].keys, w->row_bytes, t[1].n);
    const uint8_t *rows = fold ? fold_rows(&f, t[1].keys, w->row_bytes, t[1].n) : NULL;
    memset(f.score, 0, FOLD_KEYS * sizeof *f.score);
    if (f.n_block == 4) {
        fold_between(&f, k, n_head, out, rows, t[2].keys, t[2].n * w->row_bytes);
    } else {
        for (size_t unit = 0; fold && unit < FOLD_VECS * f.n_block; unit++)
            fold_unit(&f, out, rows, unit, KEY_OFFSET);
        for (size_t head = 0; head < n_head; head += GROUP) {
            fold_group(&f, k, head, 0, out, 0, 0, 0);
            fold_rest(&f, head);
        }
    }
    fold_order(f.score);
    for (size_t v = 0; v < FOLD_VECS; v++) {
        vec scale = v_cast(SHIFT_LEFT(i_load(exponent + v * LANES), FIELD));
        size_t first = v * LANES, left = t->n > first ? t->n - first : 0;
        v_store_scores(t->scores + first, v_mul(_mm512_load_ps(f.score + first), scale), i_set1(0),
                       left < LANES ? left : LANES);
    }
    return fold;
}

#endif
