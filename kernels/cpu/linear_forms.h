/* SPDX-License-Identifier: Apache-2.0 */
/* What the linear layers of all instruction sets agree on before a register is named. */
#ifndef DSV4_LINEAR_FORMS_H
#define DSV4_LINEAR_FORMS_H

#include "kernels.h"

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

/* A loop whose count n <= 8 is a constant once inlined, unrolled so that arrays become registers.
 */
#define EACH(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < (n); i++)

/* Columns of a step, and of the span whose scales are prepared together. */
enum { STEP = 32, SPAN_FP8 = 128, SPAN_OTHER = 512, SPAN_STEPS = SPAN_OTHER / STEP };

/* What a row of weights is; a constant in every function that takes one. */
enum form {
    FP8_FOLD,
    FP8_WIDE, /* FOLD with scales beyond FOLD_ONCE_MAX */
    FP8_BLOCK,
    FP8_ROUND,
    FP4_FOLD,
    FP4_BLOCK,
    BF16_PLAIN,
    F32_PLAIN
};

/* The largest FOLD byte whose scale times 2^120 is still finite: beyond it f32 forms scale FP8
 * codes in two multiplications. */
enum { FOLD_ONCE_MAX = 134 };

INLINE int is_fp8(enum form form) {
    return form <= FP8_ROUND;
}

INLINE int is_fp4(enum form form) {
    return form == FP4_FOLD || form == FP4_BLOCK;
}

/* Bytes of so many columns of a row of weights. */
INLINE size_t row_bytes(enum form form, int32_t cols) {
    size_t n = (size_t)cols;
    return is_fp8(form) ? n : is_fp4(form) ? n / 2 : form == BF16_PLAIN ? 2 * n : 4 * n;
}

/* Index of the first scale of a row; column k's is k / 128 (FP8) or k / 32 (FP4) further. */
INLINE size_t row_scales(enum form form, int32_t row, int32_t cols) {
    if (is_fp4(form))
        return (size_t)row * (size_t)(cols / DSV4_FP4_BLOCK);
    return (size_t)(row / DSV4_FP8_BLOCK) * (((size_t)cols + DSV4_FP8_BLOCK - 1) / DSV4_FP8_BLOCK);
}

INLINE float read_scale(const struct dsv4_weight *w, size_t i) {
    if (w->scale_type == DSV4_SCALE_E8M0)
        return dsv4_e8m0_to_f32(((const uint8_t *)w->scale)[i]);
    if (w->scale_type == DSV4_SCALE_BF16) {
        dsv4_bf16 s;
        memcpy(&s, (const char *)w->scale + 2 * i, sizeof s);
        return dsv4_bf16_to_f32(s);
    }
    float s;
    memcpy(&s, (const char *)w->scale + 4 * i, sizeof s);
    return s;
}

INLINE const dsv4_bf16 *token(const struct dsv4_linear_args *a, int32_t t) {
    return a->x + (a->tok ? a->tok[t] : t) * a->ld_x;
}

INLINE void store_sum(const struct dsv4_linear_args *a, int32_t t, int32_t r, float sum) {
    if (a->out_f32)
        ((float *)a->out)[t * a->ld_out + r] = sum;
    else
        ((dsv4_bf16 *)a->out)[t * a->ld_out + r] = dsv4_f32_to_bf16(sum);
}

#endif
