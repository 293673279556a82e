/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The experiments of trial.h.  A timed call streams 2 MiB of rows of 4096 columns for one token
 * (few), about as the engine's calls do: in shorter ones what a walk needs to start would decide.
 * Or it multiplies 96 rows of 2048 columns with 48 tokens (many).  The weights are flushed from the
 * caches first, so 2 MiB are enough to see memory.  About 0.1 ms a call.  Attention: 16 heads of
 * 512 over 64 bf16 rows, from the caches.
 */
#define _POSIX_C_SOURCE 200809L /* clock_gettime */
#include "cpu/trial.h"

#include <stdlib.h>
#include <time.h>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

enum {
    FEW_COLS = 4096,
    MANY_ROWS = 96,
    MANY_COLS = 2048,
    MANY_TOKENS = 48,
    EQUAL_ROWS = 12,
    EQUAL_COLS = 1000, /* not a multiple of 32: the tail is tried as well */
    EQUAL_TOKENS = 9,
    HEADS = 16,
    HEAD_DIMS = 512,
    KEYS = 64,
    WEIGHT_BYTES = 2 << 20,
    FEW_MOST_ROWS = WEIGHT_BYTES / (FEW_COLS / 2),
    X_ELEMENTS = MANY_TOKENS * FEW_COLS,
    OUT_FLOATS = 12 << 10,
    LINE = 64,
};

DSV4_STATIC_ASSERT(FEW_MOST_ROWS <= OUT_FLOATS && MANY_TOKENS * MANY_ROWS <= OUT_FLOATS &&
                       EQUAL_ROWS * EQUAL_COLS <= 2 * OUT_FLOATS,
                   "room for results, and for the weights of the equal ones");
DSV4_STATIC_ASSERT(DSV4_ATTENTION_SCRATCH(HEADS, HEAD_DIMS) <= DSV4_LINEAR_SCRATCH(FEW_COLS),
                   "attention's scratch fits");

struct dsv4_trial {
    uint8_t weights[WEIGHT_BYTES];
    dsv4_bf16 x[X_ELEMENTS];
    float out[2][OUT_FLOATS];
    uint8_t scale[WEIGHT_BYTES / (DSV4_FP4_BLOCK / 2)];
    _Alignas(LINE) uint8_t scratch[DSV4_LINEAR_SCRATCH(FEW_COLS)];
};

/* Numerical Recipes' 64-bit generator; the experiments need variety, not quality. */
static uint64_t next(uint64_t *state) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return *state >> 20;
}

static size_t round_up(size_t n, size_t m) {
    return (n + m - 1) / m * m;
}

struct dsv4_trial *dsv4k_trial_create(void) {
    struct dsv4_trial *trial = aligned_alloc(LINE, round_up(sizeof *trial, LINE));
    if (!trial)
        return NULL;
    /* Bytes 0x20-0x3f and 0xa0-0xbf are ordinary numbers whether read as e4m3, e2m1, bf16 or f32.
     */
    uint64_t state = 1;
    for (size_t i = 0; i < sizeof trial->weights; i += 4) {
        uint32_t word = ((uint32_t)next(&state) & 0x9f9f9f9fu) | 0x20202020u;
        memcpy(trial->weights + i, &word, sizeof word);
    }
    for (size_t i = 0; i < X_ELEMENTS; i++)
        trial->x[i] = (dsv4_bf16)((next(&state) & 0x9fffu) | 0x2000u);
    memset(trial->scale, 120, sizeof trial->scale);
    return trial;
}

void dsv4k_trial_destroy(struct dsv4_trial *trial) {
    free(trial);
}

static void run(const struct dsv4_variant *variant, const struct dsv4_linear_args *a) {
    ((dsv4k_linear_fn *)variant->fn)(a);
}

/* Exponents spread so that sums round, cancel and lose bits; zeros, the smallest operand and its
 * negative among them. */
static dsv4_bf16 edge_operand(uint64_t *state) {
    uint64_t r = next(state);
    uint32_t exponent = 127 - 20 + (uint32_t)(r >> 8) % 41;
    switch (r % 16) {
    case 0:
        return (dsv4_bf16)(r >> 16 & 0x8000u);
    case 1:
        return (dsv4_bf16)((r >> 16 & 0x8000u) | DSV4_TINY_BF16);
    default:
        return (dsv4_bf16)((r >> 16 & 0x8000u) | exponent << 7 | (r >> 32 & 0x7fu));
    }
}

int dsv4k_trial_equal(struct dsv4_trial *trial, const struct dsv4_variant *candidate,
                      const struct dsv4_variant *ref) {
    uint64_t state = 2;
    dsv4_bf16 *w = (dsv4_bf16 *)(void *)trial->out[1], *x = trial->x;
    for (int i = 0; i < EQUAL_ROWS * EQUAL_COLS; i++)
        w[i] = edge_operand(&state);
    for (int i = 0; i < EQUAL_TOKENS * EQUAL_COLS; i++)
        x[i] = edge_operand(&state);
    /* Neighbours that cancel: the order of the two products of a lane shows. */
    for (int i = 0; i + 3 < EQUAL_COLS; i += 8)
        for (int r = 0; r < EQUAL_ROWS; r++) {
            dsv4_bf16 *q = w + r * EQUAL_COLS + i;
            q[1] = q[0] ^ (dsv4_bf16)0x8000u;
        }
    for (int i = 0; i + 3 < EQUAL_COLS; i += 16)
        for (int t = 0; t < EQUAL_TOKENS; t++)
            x[t * EQUAL_COLS + i + 1] = x[t * EQUAL_COLS + i];
    struct dsv4_weight weight = {
        .data = w, .rows = EQUAL_ROWS, .cols = EQUAL_COLS, .format = DSV4_W_BF16};
    float *got = trial->out[0], *want = got + EQUAL_ROWS * EQUAL_TOKENS;
    struct dsv4_linear_args a = {.out = got,
                                 .x = x,
                                 .w = &weight,
                                 .scratch = trial->scratch,
                                 .ld_out = EQUAL_ROWS,
                                 .ld_x = EQUAL_COLS,
                                 .n_tok = EQUAL_TOKENS,
                                 .row1 = EQUAL_ROWS,
                                 .out_f32 = 1};
    run(candidate, &a);
    a.out = want;
    run(ref, &a);
    return memcmp(got, want, sizeof(float) * EQUAL_ROWS * EQUAL_TOKENS) == 0;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void flush(const void *p, size_t bytes) {
#if defined(__x86_64__)
    for (size_t i = 0; i < bytes; i += LINE)
        _mm_clflush((const char *)p + i);
    _mm_mfence();
#else
    (void)p;
    (void)bytes;
#endif
}

/* The weight format of a linear operation and whether it is a `many` entry; -1 for other
 * operations. */
static int linear_format(int op, int *many) {
    static const int few_ops[DSV4_W_FORMATS] = {DSV4_OP_linear_few_fp8, DSV4_OP_linear_few_fp4,
                                                DSV4_OP_linear_few_bf16, DSV4_OP_linear_few_f32};
    static const int many_ops[DSV4_W_FORMATS] = {DSV4_OP_linear_many_fp8, DSV4_OP_linear_many_fp4,
                                                 DSV4_OP_linear_many_bf16, DSV4_OP_linear_many_f32};
    for (int format = 0; format < DSV4_W_FORMATS; format++) {
        if (op == few_ops[format] || op == many_ops[format]) {
            *many = op == many_ops[format];
            return format;
        }
    }
    return -1;
}

static double attention_seconds(struct dsv4_trial *trial, const struct dsv4_variant *variant) {
    const uint8_t *keys[KEYS];
    float sink[HEADS] = {0};
    for (int j = 0; j < KEYS; j++)
        keys[j] = trial->weights + (size_t)j * HEAD_DIMS * sizeof(dsv4_bf16);
    struct dsv4_attention_args a = {.out = (dsv4_bf16 *)(void *)trial->out[0],
                                    .q = trial->x,
                                    .keys = keys,
                                    .sink = sink,
                                    .scratch = trial->scratch,
                                    .n_key = KEYS,
                                    .n_head = HEADS,
                                    .d_head = HEAD_DIMS,
                                    .d_rope = 64,
                                    .scale = 0.04f,
                                    .format = DSV4_KV_BF16};
    double start = now();
    ((dsv4k_attention_fn *)variant->fn)(&a);
    return now() - start;
}

double dsv4k_trial_seconds(struct dsv4_trial *trial, const struct dsv4_variant *variant) {
    static const int eighths[DSV4_W_FORMATS] = {8, 4, 16, 32}; /* bytes of eight weights */
    int many = 0, format = linear_format(variant->op, &many);
    if (variant->op == DSV4_OP_attention)
        return attention_seconds(trial, variant);
    if (format < 0)
        return 0;
    int32_t cols = many ? MANY_COLS : FEW_COLS;
    int32_t rows = many ? MANY_ROWS : WEIGHT_BYTES / (cols / 8 * eighths[format]);
    int scaled = format == DSV4_W_FP8 || format == DSV4_W_FP4;
    struct dsv4_weight weight = {.data = trial->weights,
                                 .scale = scaled ? trial->scale : NULL,
                                 .rows = rows,
                                 .cols = cols,
                                 .format = (uint8_t)format,
                                 .scale_rule = scaled ? DSV4_SCALE_FOLD : DSV4_SCALE_NONE};
    struct dsv4_linear_args a = {.out = trial->out[0],
                                 .x = trial->x,
                                 .w = &weight,
                                 .scratch = trial->scratch,
                                 .ld_out = rows,
                                 .ld_x = cols,
                                 .n_tok = many ? MANY_TOKENS : 1,
                                 .row1 = rows};
    flush(trial->weights, (size_t)rows * (size_t)cols / 8 * (size_t)eighths[format]);
    double start = now();
    run(variant, &a);
    return now() - start;
}
