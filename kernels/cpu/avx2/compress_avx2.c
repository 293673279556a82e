/* SPDX-License-Identifier: Apache-2.0 */
/* Softmax pooling of a window of tokens, eight dimensions at a time; AVX2.  Source: SPEC 3.5. */
#include "bf16_avx2.h"
#include "functions_avx2.h"

static void dsv4k_pool_avx2(const struct dsv4_pool_args *a) {
    for (int32_t c = 0; c < a->n; c += 8) {
        int32_t left = a->n - c;
        __m256 top = _mm256_set1_ps(-INFINITY), sum = _mm256_setzero_ps(), acc = sum;
        for (int32_t r = 0; r < a->n_row; r++) {
            if (!a->gate[r])
                continue;
            __m256 s =
                _mm256_add_ps(load8_f32(a->gate[r] + c, left), load8_f32(a->ape[r] + c, left));
            top = _mm256_max_ps(s, top); /* a NaN in s leaves top */
        }
        for (int32_t r = 0; r < a->n_row; r++) {
            if (!a->gate[r])
                continue;
            __m256 s =
                _mm256_add_ps(load8_f32(a->gate[r] + c, left), load8_f32(a->ape[r] + c, left));
            __m256 p = dsv4_exp_avx2(_mm256_sub_ps(s, top));
            sum = _mm256_add_ps(sum, p);
            acc = _mm256_fmadd_ps(p, load8_f32(a->k[r] + c, left), acc);
        }
        store8(a->out + c, _mm256_div_ps(acc, sum), left);
    }
}

const struct dsv4_variant dsv4k_avx2_compress[] = {
    DSV4_VARIANT(pool, dsv4k_pool_avx2, "avx2", 0),
    {NULL, NULL, 0, 0},
};
