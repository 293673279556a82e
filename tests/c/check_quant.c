/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Activation quantisation, KV rows, index rows and the Hadamard rotation: every variant against
 * ref; sizes around the lanes, non-finite groups, every code under every scale, buffers ending at
 * an unmapped page.
 */
#include "check.h"

#include <stdio.h>
#include <string.h>

void check_quant(void);

static const int32_t sizes[] = {127, 128, 129, 255, 256, 257, 384, 1000, 1536, 4096, 7168};
enum { N_SIZES = 65 + sizeof sizes / sizeof sizes[0] };

static int32_t size_at(int i) {
    return i < 65 ? i + 1 : sizes[i - 65];
}

/* Values of a kind; `odd` adds huge values, infinities and NaN. */
static dsv4_bf16 *values(int32_t n, enum check_kind kind, int odd) {
    static const dsv4_bf16 specials[] = {0x7f80, 0xff80, 0x7fc0, 0xff81, 0x7f7f, 0xff78, 0x7f77};
    dsv4_bf16 *x = check_bytes(2 * (size_t)n);
    check_fill_bf16(x, (size_t)n, kind);
    for (int i = 0; odd && i < 1 + n / 200; i++)
        x[check_below((uint32_t)n)] = specials[check_below(odd == 1 ? 4 : 7)];
    return x;
}

static void act_quant(int32_t n, enum check_kind kind, int odd) {
    const struct dsv4_variant *v[CHECK_MAX_VARIANTS];
    int n_variants = check_variants(DSV4_OP_act_quant, v);
    size_t groups = ((size_t)n + 127) / 128, m = (size_t)n;
    dsv4_bf16 *x = values(n, kind, odd), *want = check_bytes(2 * m);
    uint8_t *codes = check_bytes(m), *scales = check_bytes(groups);
    ((dsv4k_act_quant_fn *)v[0]->fn)(want, codes, scales, x, n);
    for (int i = 0; i < n_variants; i++) {
        dsv4k_act_quant_fn *f = (dsv4k_act_quant_fn *)v[i]->fn;
        dsv4_bf16 *out = check_bytes(2 * m), *alone = check_bytes(2 * m);
        uint8_t *c = check_bytes(m), *s = check_bytes(groups);
        f(out, c, s, x, n);
        f(alone, NULL, NULL, x, n);
        check_equal("values", v[i], out, want, m, 2);
        check_equal("values without codes", v[i], alone, want, m, 2);
        check_equal("codes", v[i], c, codes, m, 1);
        check_equal("scales", v[i], s, scales, groups, 1);
    }
    check_reset();
}

static void act_flush(int32_t n, enum check_kind kind, int odd) {
    const struct dsv4_variant *v[CHECK_MAX_VARIANTS];
    int n_variants = check_variants(DSV4_OP_act_flush, v);
    size_t bytes = 2 * (size_t)n;
    dsv4_bf16 *x = values(n, kind, odd), *want = check_bytes(bytes);
    ((dsv4k_act_flush_fn *)v[0]->fn)(want, x, n);
    for (int i = 0; i < n_variants; i++) {
        dsv4_bf16 *out = check_bytes(bytes), *place = check_bytes(bytes);
        memcpy(place, x, bytes);
        ((dsv4k_act_flush_fn *)v[i]->fn)(out, x, n);
        ((dsv4k_act_flush_fn *)v[i]->fn)(place, place, n);
        check_equal("flushed", v[i], out, want, (size_t)n, 2);
        check_equal("flushed in place", v[i], place, want, (size_t)n, 2);
    }
    check_reset();
}

static void kv(int32_t nope, int32_t rope, enum dsv4_kv_format f, enum check_kind kind, int odd) {
    const struct dsv4_variant *store[CHECK_MAX_VARIANTS], *load[CHECK_MAX_VARIANTS];
    int n_store = check_variants(DSV4_OP_kv_store, store);
    int n_load = check_variants(DSV4_OP_kv_load, load);
    int32_t n = nope + rope;
    size_t bytes = dsv4_kv_row_bytes(f, n, rope);
    dsv4_bf16 *x = values(n, kind, odd), *want_x = check_bytes(2 * (size_t)n);
    uint8_t *want = check_bytes(bytes);
    ((dsv4k_kv_store_fn *)store[0]->fn)(want, x, f, n, rope);
    ((dsv4k_kv_load_fn *)load[0]->fn)(want_x, want, f, n, rope);
    for (int i = 0; i < n_store; i++) {
        uint8_t *row = check_bytes(bytes);
        memset(row, 0xee, bytes);
        ((dsv4k_kv_store_fn *)store[i]->fn)(row, x, f, n, rope);
        check_equal("KV row", store[i], row, want, bytes, 1);
    }
    for (int i = 0; i < n_load; i++) {
        dsv4_bf16 *back = check_bytes(2 * (size_t)n);
        ((dsv4k_kv_load_fn *)load[i]->fn)(back, want, f, n, rope);
        check_equal_bf16("loaded KV row", load[i], back, want_x, (size_t)n);
    }
    check_reset();
}

/* Rows no store would write: every code under every scale. */
static void kv_any_bytes(void) {
    const struct dsv4_variant *load[CHECK_MAX_VARIANTS];
    int n_load = check_variants(DSV4_OP_kv_load, load);
    for (int scale = 0; scale < 256; scale++) {
        uint8_t *row = check_bytes(264);
        for (int i = 0; i < 256; i++)
            row[i] = (uint8_t)i;
        memset(row + 256, scale, 8);
        dsv4_bf16 *want = check_bytes(512);
        ((dsv4k_kv_load_fn *)load[0]->fn)(want, row, DSV4_KV_FP8, 256, 0);
        for (int i = 0; i < n_load; i++) {
            dsv4_bf16 *back = check_bytes(512);
            ((dsv4k_kv_load_fn *)load[i]->fn)(back, row, DSV4_KV_FP8, 256, 0);
            check_equal_bf16("every code", load[i], back, want, 256);
        }
        check_reset();
    }
}

static void hadamard(int32_t n, enum check_kind kind, int odd) {
    const struct dsv4_variant *v[CHECK_MAX_VARIANTS];
    int n_variants = check_variants(DSV4_OP_hadamard, v);
    size_t bytes = 2 * (size_t)n;
    dsv4_bf16 *x = values(n, kind, odd), *want = check_bytes(bytes);
    memcpy(want, x, bytes);
    ((dsv4k_hadamard_fn *)v[0]->fn)(want, n);
    for (int i = 0; i < n_variants; i++) {
        dsv4_bf16 *y = check_bytes(bytes);
        memcpy(y, x, bytes);
        ((dsv4k_hadamard_fn *)v[i]->fn)(y, n);
        check_equal_bf16("rotated", v[i], y, want, (size_t)n);
    }
    check_reset();
}

static void index_rows(int32_t n, enum check_kind kind, int odd) {
    const struct dsv4_variant *store[CHECK_MAX_VARIANTS], *load[CHECK_MAX_VARIANTS];
    int n_store = check_variants(DSV4_OP_index_store, store);
    int n_load = check_variants(DSV4_OP_index_load, load);
    size_t bytes = dsv4_index_row_bytes(n), m = (size_t)n;
    dsv4_bf16 *x = values(n, kind, odd), *want_x = check_bytes(2 * m);
    uint8_t *want = check_bytes(bytes);
    ((dsv4k_index_store_fn *)store[0]->fn)(want, x, n);
    ((dsv4k_index_load_fn *)load[0]->fn)(want_x, want, n);
    for (int i = 0; i < n_store; i++) {
        uint8_t *row = check_bytes(bytes);
        ((dsv4k_index_store_fn *)store[i]->fn)(row, x, n);
        check_equal("index row", store[i], row, want, bytes, 1);
    }
    for (int i = 0; i < n_load; i++) {
        dsv4_bf16 *back = check_bytes(2 * m);
        ((dsv4k_index_load_fn *)load[i]->fn)(back, want, n);
        check_equal("loaded index row", load[i], back, want_x, m, 2);
    }
    check_reset();
}

void check_quant(void) {
    for (int kind = 0; kind < CHECK_KINDS; kind++) {
        for (int odd = 0; odd < 3; odd++) {
            for (int i = 0; i < (int)N_SIZES; i++) {
                act_quant(size_at(i), (enum check_kind)kind, odd);
                act_flush(size_at(i), (enum check_kind)kind, odd);
            }
            for (int32_t nope = 0; nope <= 512; nope += 64)
                for (int32_t rope = 0; rope <= 64; rope += 32)
                    for (int f = DSV4_KV_FP8; f <= DSV4_KV_BF16; f++)
                        if (nope + rope > 0)
                            kv(nope, rope, (enum dsv4_kv_format)f, (enum check_kind)kind, odd);
            for (int32_t n = 1; n <= 256; n *= 2)
                hadamard(n, (enum check_kind)kind, odd);
            for (int32_t n = 32; n <= 256; n += 32)
                index_rows(n, (enum check_kind)kind, odd);
        }
    }
    kv_any_bytes();
}
