/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The two frequency tables (SPEC 3.2): plain for layers without compression, another base with YaRN for the others.
 * The steps and their f32 roundings are those of the reference; the YaRN magnitude factor is not used.
 */
#include "functions.h"
#include "model/model.h"

/* The (fractional) index of the dimension that turns `rotations` times over the original context. */
static double correction(double rotations, const struct dsv4_config *c, double base) {
    const double two_pi = 6.283185307179586;
    return c->qk_rope_head_dim * dsv4_log(c->yarn_original_positions / (rotations * two_pi)) / (2.0 * dsv4_log(base));
}

static int32_t floor_int(double x) {
    int32_t i = (int32_t)x;
    return i - (x < i);
}

static void plain_frequencies(float *out, int32_t n_pair, double base) {
    for (int32_t i = 0; i < n_pair; i++)
        out[i] = 1.0f / (float)dsv4_pow(base, (float)(2 * i) / (float)(2 * n_pair));
}

void dsv4_rope_frequencies(float *main_table, float *compressed, const struct dsv4_config *c) {
    int32_t n_pair = c->qk_rope_head_dim / 2;
    plain_frequencies(main_table, n_pair, c->rope_theta);
    plain_frequencies(compressed, n_pair, c->compress_rope_theta);
    int32_t low = floor_int(correction(c->yarn_beta_fast, c, c->compress_rope_theta));
    int32_t high = -floor_int(-correction(c->yarn_beta_slow, c, c->compress_rope_theta));
    low = low < 0 ? 0 : low;
    high = high > c->qk_rope_head_dim - 1 ? c->qk_rope_head_dim - 1 : high;
    float span = low == high ? 0.001f : (float)(high - low), factor = (float)c->yarn_factor;
    for (int32_t i = 0; i < n_pair; i++) {
        float ramp = ((float)i - (float)low) / span;
        ramp = ramp < 0.0f ? 0.0f : ramp > 1.0f ? 1.0f : ramp;
        float smooth = 1.0f - ramp;
        compressed[i] = compressed[i] / factor * (1.0f - smooth) + compressed[i] * smooth;
    }
}
