/* SPDX-License-Identifier: Apache-2.0 */
/*
 * functions.h: errors against libm in double, and the vector twins bit for bit, on a spread sample
 * of all floats and on every float near the points where a function changes its course.  With
 * DSV4_CHECK_ALL set in the environment: on all 2^32 floats (half an hour).
 */
#include "check.h"

#include "functions.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

void check_functions(void);

/* The intrinsics of a set are usable in functions that name it; gcc and clang spell that
 * differently. */
#if defined(DSV4_HAVE_AVX2)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#include "cpu/avx2/functions_avx2.h"

static void twins_avx2(float out[3][16], const float *x) {
    for (int i = 0; i < 16; i += 8) {
        __m256 v = _mm256_loadu_ps(x + i);
        _mm256_storeu_ps(out[0] + i, dsv4_exp_avx2(v));
        _mm256_storeu_ps(out[1] + i, dsv4_sigmoid_avx2(v));
        _mm256_storeu_ps(out[2] + i, dsv4_softplus_avx2(v));
    }
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#if defined(DSV4_HAVE_AVX512)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512dq"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512dq")
#endif
#include "cpu/avx512/functions_avx512.h"

static void twins_avx512(float out[3][16], const float *x) {
    __m512 v = _mm512_loadu_ps(x);
    _mm512_storeu_ps(out[0], dsv4_exp_avx512(v));
    _mm512_storeu_ps(out[1], dsv4_sigmoid_avx512(v));
    _mm512_storeu_ps(out[2], dsv4_softplus_avx512(v));
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#if defined(DSV4_HAVE_AVX2)
static void same(const char *set, float got[3][16], float want[3][16], const float *x) {
    static const char *const names[] = {"exp", "sigmoid", "softplus"};
    for (int f = 0; f < 3; f++)
        for (int i = 0; i < 16; i++)
            check_true(memcmp(&got[f][i], &want[f][i], 4) == 0, "%s of %a: %s gives %a, scalar %a",
                       names[f], (double)x[i], set, (double)got[f][i], (double)want[f][i]);
}

static void check_twins(const float *x) {
    float want[3][16], got[3][16];
    for (int i = 0; i < 16; i++) {
        want[0][i] = dsv4_expf(x[i]);
        want[1][i] = dsv4_sigmoidf(x[i]);
        want[2][i] = dsv4_softplusf(x[i]);
    }
    memcpy(got, want, sizeof got);
#if defined(DSV4_HAVE_AVX2)
    if (dsv4k_cpu_has("avx2"))
        twins_avx2(got, x);
    same("avx2", got, want, x);
#endif
#if defined(DSV4_HAVE_AVX512)
    if (dsv4k_cpu_has("avx512"))
        twins_avx512(got, x);
    same("avx512", got, want, x);
#endif
}
#else
static void check_twins(const float *x) {
    (void)x; /* a machine without vector twins */
}
#endif

static double sigmoid(double x) {
    return 1 / (1 + exp(-x));
}

static double softplus(double x) {
    return x > 20 ? x : log1p(exp(x));
}

/* The name, our function, libm's, and the error allowed in units of the last place. */
static const struct function {
    const char *name;
    float (*ours)(float);
    double (*libm)(double);
    double ulp;
    int subnormal; /* 0: results below 2^-126 are zero */
} functions[] = {
    {"exp", dsv4_expf, exp, 0.90, 0},
    {"exp2", dsv4_exp2f, exp2, 0.95, 0},
    {"log", dsv4_logf, log, 0.93, 1},
    {"log1p", dsv4_log1pf, log1p, 1.27, 1},
    {"sigmoid", dsv4_sigmoidf, sigmoid, 2.49, 0},
    {"softplus", dsv4_softplusf, softplus, 1.67, 1},
};

static double last_place(double x) {
    int e;
    frexp(x, &e);
    return ldexp(1.0, e - 24 < -149 ? -149 : e - 24);
}

static void check_errors(float x) {
    for (size_t i = 0; i < sizeof functions / sizeof functions[0]; i++) {
        const struct function *f = functions + i;
        double want = f->libm((double)x), got = (double)f->ours(x);
        if (want != want) {
            check_true(got != got, "%s of %a is %a, not NaN", f->name, (double)x, got);
        } else if (fabs(want) > (double)0x1.fffffep127f) {
            check_true(got == want || fabs(got) > 0x1.fffffcp127, "%s of %a is %a", f->name,
                       (double)x, got);
        } else if (fabs(want) < 0x1p-126 && !f->subnormal) {
            check_true(got == 0.0 || fabs(got - want) < 0x1p-145, "%s of %a is %a, below 2^-126",
                       f->name, (double)x, got);
        } else {
            check_true(fabs(got - want) <= f->ulp * last_place(want), "%s of %a is %a, libm %a",
                       f->name, (double)x, got, want);
        }
    }
    if (fabsf(x) < 0x1p30f) {
        float s, c;
        dsv4_sincosf(x, &s, &c);
        double ws = sin((double)x), wc = cos((double)x);
        check_true(fabs((double)s - ws) <= 0.5001 * last_place(ws), "sin of %a is %a", (double)x,
                   (double)s);
        check_true(fabs((double)c - wc) <= 0.5001 * last_place(wc), "cos of %a is %a", (double)x,
                   (double)c);
    }
}

/* Sixteen floats whose bits are `step` apart. */
static void check_run(uint64_t first, uint64_t step) {
    float x[16];
    for (int i = 0; i < 16; i++) {
        x[i] = dsv4_f32_from_bits((uint32_t)(first + (uint64_t)i * step));
        check_errors(x[i]);
    }
    check_twins(x);
}

static void check_double(void) {
    for (int i = 0; i < 20000; i++) {
        double x = exp(20 * (double)check_normal()), y = 2 * (double)check_normal();
        double z = fmod(200 * (double)check_normal(), 700);
        double limit = 0x1p-52 * (3 + fabs(y * log(x)));
        check_true(fabs(dsv4_log(x) / log(x) - 1) < 0x1p-51, "log of %a", x);
        check_true(fabs(dsv4_exp(z) / exp(z) - 1) < 0x1.8p-52, "exp of %a", z);
        check_true(fabs(dsv4_pow(x, y) / pow(x, y) - 1) < limit, "%a to the power of %a", x, y);
    }
    check_true(dsv4_exp(-800) == 0 && dsv4_exp(800) == (double)INFINITY, "exp past its range");
    check_true(dsv4_log(0) == -(double)INFINITY && dsv4_log(-1) != dsv4_log(-1), "log of 0, -1");
    check_true(fabs(dsv4_log(0x1p-1060) / log(0x1p-1060) - 1) < 0x1p-51, "log of a subnormal");
}

void check_functions(void) {
    static const float points[] = {
        0.0f,      1.0f,          0.75f,        1.5f,          20.0f,         -1.0f,   -0.25f,
        0.5f,      -126.0f,       128.0f,       16.0f,         -104.0f,       -149.0f, INFINITY,
        0x1p-126f, DSV4_EXP_HIGH, DSV4_EXP_LOW, -DSV4_EXP_LOW, -DSV4_EXP_HIGH};
    uint64_t step = getenv("DSV4_CHECK_ALL") ? 1 : 4099;
    for (uint64_t first = check_below((uint32_t)step); first < 0x100000000u; first += 16 * step)
        check_run(first, step);
    for (size_t i = 0; i < sizeof points / sizeof points[0]; i++)
        for (int k = -8; k < 8; k++)
            check_run(dsv4_f32_bits(points[i]) + (uint64_t)(int64_t)(16 * k), 1);
    check_double();
}
