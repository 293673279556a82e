/* SPDX-License-Identifier: Apache-2.0 */
/* Rotary position embedding on interleaved pairs, in portable C.  Source: SPEC 3.2. */
#include "functions.h"
#include "kernels.h"

static void dsv4k_rope_table_ref(float *cos, float *sin, const float *freq, int32_t n_pair,
                                 int32_t position) {
    for (int32_t i = 0; i < n_pair; i++)
        dsv4_sincosf((float)position * freq[i], sin + i, cos + i);
}

static void dsv4k_rope_ref(dsv4_bf16 *x, const float *cos, const float *sin, int32_t n_pair,
                           int32_t inverse) {
    for (int32_t i = 0; i < n_pair; i++) {
        float a = dsv4_bf16_to_f32(x[2 * i]), b = dsv4_bf16_to_f32(x[2 * i + 1]);
        float c = cos[i], s = inverse ? -sin[i] : sin[i];
        x[2 * i] = dsv4_f32_to_bf16(a * c - b * s);
        x[2 * i + 1] = dsv4_f32_to_bf16(a * s + b * c);
    }
}

const struct dsv4_variant dsv4k_ref_rope[] = {
    DSV4_VARIANT(rope_table, dsv4k_rope_table_ref, "ref", 0),
    DSV4_VARIANT(rope, dsv4k_rope_ref, "ref", 0),
    {NULL, NULL, 0, 0},
};
