/* SPDX-License-Identifier: Apache-2.0 */
/* Rule 1 of kernels.h for a vector against itself: 16 lanes, element 2i+1 before 2i of each 32,
 * then the tree. */
#ifndef DSV4_REF_LANES_H
#define DSV4_REF_LANES_H

#include "types.h"

static inline float dsv4_ref_tree(float lane[16]) {
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            lane[i] += lane[i + half];
    return lane[0];
}

static inline float dsv4_ref_mean_square(const dsv4_bf16 *x, int32_t n) {
    float lane[16] = {0};
    for (int32_t k = 0; k < n; k += 32) {
        for (int odd = 1; odd >= 0; odd--) {
            for (int i = 0; i < 16; i++) {
                int32_t at = k + 2 * i + odd;
                float v = at < n ? dsv4_bf16_to_f32(dsv4_bf16_operand(x[at])) : 0.0f;
                lane[i] += v * v;
            }
        }
    }
    return dsv4_ref_tree(lane) / (float)n;
}

#endif
