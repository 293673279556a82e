/* SPDX-License-Identifier: Apache-2.0 */
/* Softmax pooling of a window of tokens into one compressed entry, in portable C.  Source:
 * SPEC 3.5. */
#include "functions.h"
#include "kernels.h"

static void dsv4k_pool_ref(const struct dsv4_pool_args *a) {
    for (int32_t c = 0; c < a->n; c++) {
        float top = -INFINITY, sum = 0.0f, acc = 0.0f;
        for (int32_t r = 0; r < a->n_row; r++) {
            if (a->gate[r] && a->gate[r][c] + a->ape[r][c] > top)
                top = a->gate[r][c] + a->ape[r][c];
        }
        for (int32_t r = 0; r < a->n_row; r++) {
            if (!a->gate[r])
                continue;
            float p = dsv4_expf(a->gate[r][c] + a->ape[r][c] - top);
            sum += p;
            acc = fmaf(p, a->k[r][c], acc);
        }
        a->out[c] = dsv4_f32_to_bf16(acc / sum);
    }
}

const struct dsv4_variant dsv4k_ref_compress[] = {
    DSV4_VARIANT(pool, dsv4k_pool_ref, "ref", 0),
    {NULL, NULL, 0, 0},
};
