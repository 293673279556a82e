/* SPDX-License-Identifier: Apache-2.0 */
/* See check_cuda.h. */
#include "check_cuda.h"

static struct dsv4_variant cuda = DSV4_VARIANT(linear_few_fp8, NULL, "on the device", 0);

const struct dsv4_kernels *ref(void) {
    static struct dsv4_kernels table;
    if (!table.act_flush) {
        const struct dsv4_variant *v[CHECK_MAX_VARIANTS];
#define X(op, type)                                                                                                    \
    check_variants(DSV4_OP_##op, v);                                                                                   \
    table.op = (type *)v[0]->fn;
        DSV4_KERNEL_OPS(X)
#undef X
    }
    return &table;
}

void same(const char *what, const void *got, const void *want, size_t n, size_t size) {
    check_equal(what, &cuda, got, want, n, size);
}

void same_bf16(const char *what, const dsv4_bf16 *got, const dsv4_bf16 *want, size_t n) {
    check_equal_bf16(what, &cuda, got, want, n);
}

void same_f32(const char *what, const float *got, const float *want, size_t n) {
    check_equal_f32(what, &cuda, got, want, n);
}

int32_t between(int32_t low, int32_t high) {
    return low + (int32_t)check_below((uint32_t)(high - low + 1));
}
