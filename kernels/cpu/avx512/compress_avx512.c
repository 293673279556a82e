/* SPDX-License-Identifier: Apache-2.0 */
/* Softmax pooling of a window of tokens, sixteen dimensions at a time; AVX-512.  Source: SPEC 3.5.
 */
#include "bf16_avx512.h"
#include "functions_avx512.h"

static void dsv4k_pool_avx512(const struct dsv4_pool_args *a) {
    for (int32_t c = 0; c < a->n; c += 16) {
        int32_t left = a->n - c;
        __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps(), acc = sum;
        for (int32_t r = 0; r < a->n_row; r++) {
            if (!a->gate[r])
                continue;
            __m512 s =
                _mm512_add_ps(load16_f32(a->gate[r] + c, left), load16_f32(a->ape[r] + c, left));
            top = _mm512_max_ps(s, top); /* a NaN in s leaves top */
        }
        for (int32_t r = 0; r < a->n_row; r++) {
            if (!a->gate[r])
                continue;
            __m512 s =
                _mm512_add_ps(load16_f32(a->gate[r] + c, left), load16_f32(a->ape[r] + c, left));
            __m512 p = dsv4_exp_avx512(_mm512_sub_ps(s, top));
            sum = _mm512_add_ps(sum, p);
            acc = _mm512_fmadd_ps(p, load16_f32(a->k[r] + c, left), acc);
        }
        store16(a->out + c, _mm512_div_ps(acc, sum), left);
    }
}

const struct dsv4_variant dsv4k_avx512_compress[] = {
    DSV4_VARIANT(pool, dsv4k_pool_avx512, "avx512", 0),
    {NULL, NULL, 0, 0},
};
