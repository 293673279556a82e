/* SPDX-License-Identifier: Apache-2.0 */
/* Random weights of every format and scale rule, for the checks of linear layers and experts. */
#ifndef DSV4_CHECK_WEIGHTS_H
#define DSV4_CHECK_WEIGHTS_H

#include "check_cuda.h"

struct weight_case {
    enum dsv4_weight_format format;
    enum dsv4_scale_type type;
    enum dsv4_scale_rule rule;
};

enum { WEIGHT_CASES = 11 };
extern const struct weight_case weight_cases[WEIGHT_CASES];

/* Data and scales end at an unmapped page; NaN codes if asked for.  skew bytes are left before the end of the data, so
 * that rows are not aligned. */
struct dsv4_weight random_weight(const struct weight_case *c, int32_t rows, int32_t cols, enum check_kind kind, int nan,
                                 int skew);

/* out through ref, by the entry for the weight's format. */
void ref_linear(const struct dsv4_weight *w, void *out, int out_f32, ptrdiff_t ld_out, const dsv4_bf16 *x, ptrdiff_t ld_x,
                const int32_t *tok, int32_t n_tok, int32_t row0, int32_t row1);

#endif
