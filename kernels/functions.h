/* SPDX-License-Identifier: Apache-2.0 */
/*
 * exp, exp2, log, log1p, sigmoid, softplus, pow, sin and cos: the only functions in a value path,
 * the same operations in the same order on every machine.  Each is a fixed sequence of IEEE
 * additions, multiplications, divisions and fused multiply-adds, so a vector twin
 * (cpu/<isa>/functions_<isa>.h) gives the same bits lane by lane.  Nothing here calls libm beyond
 * fmaf and fma, which are the IEEE operations.
 *
 * Common rules: a NaN in gives the NaN 0x7fc00000 out; results of exp and exp2 below 2^-126 are
 * zero by definition. The largest error over all floats is stated at each function, in units of
 * the last place.  Source: DESIGN section 4 rule 7; the f32 polynomials are minimax fits in
 * relative error, the double ones Taylor series.
 */
#ifndef DSV4_FUNCTIONS_H
#define DSV4_FUNCTIONS_H

#include "types.h"

#include <math.h>

#define DSV4_NAN_BITS 0x7fc00000u
#define DSV4_INF_BITS 0x7f800000u

/* 1.5 * 2^23: added to |t| < 2^22 it leaves the nearest integer (ties to even) in the low bits of
 * the sum. */
#define DSV4_ROUND_F32 0x1.8p23f
#define DSV4_ROUND_F64 0x1.8p52

/* exp: the largest x that stays finite, the smallest whose result is not below 2^-126. */
#define DSV4_EXP_HIGH 0x1.62e42ep6f
#define DSV4_EXP_LOW (-0x1.5d589ep6f)
#define DSV4_LOG2E 0x1.715476p0f
#define DSV4_LN2 0x1.62e430p-1f
/* ln 2 in two parts; n * high is exact for |n| <= 256. */
#define DSV4_LN2_HIGH 0x1.62e4p-1f
#define DSV4_LN2_LOW 0x1.7f7d1cp-20f

/* exp(r) = 1 + r + r^2 * polynomial on |r| <= ln(2) / 2; relative error 2^-28. */
#define DSV4_EXP_C0 0x1.fffffcp-2f
#define DSV4_EXP_C1 0x1.555492p-3f
#define DSV4_EXP_C2 0x1.5558f2p-5f
#define DSV4_EXP_C3 0x1.1239f2p-7f
#define DSV4_EXP_C4 0x1.6a2416p-10f

/* log(1 + f) = f + f^2 * polynomial on -1/4 <= f <= 1/2; relative error 2^-28. */
#define DSV4_LOG_C0 (-0x1.000000p-1f)
#define DSV4_LOG_C1 0x1.5555a6p-2f
#define DSV4_LOG_C2 (-0x1.000024p-2f)
#define DSV4_LOG_C3 0x1.99685ap-3f
#define DSV4_LOG_C4 (-0x1.54f242p-3f)
#define DSV4_LOG_C5 0x1.2897bep-3f
#define DSV4_LOG_C6 (-0x1.0d8ff6p-3f)
#define DSV4_LOG_C7 0x1.abf622p-4f
#define DSV4_LOG_C8 (-0x1.6fe530p-5f)

DSV4_INLINE uint64_t dsv4_f64_bits(double x) {
    uint64_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

DSV4_INLINE double dsv4_f64_from_bits(uint64_t u) {
    double x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* e^x, 0.90 ulp. */
DSV4_INLINE float dsv4_expf(float x) {
    if (x > DSV4_EXP_HIGH)
        return dsv4_f32_from_bits(DSV4_INF_BITS);
    if (x < DSV4_EXP_LOW)
        return 0.0f;
    if (x != x)
        return dsv4_f32_from_bits(DSV4_NAN_BITS);
    float t = fmaf(x, DSV4_LOG2E, DSV4_ROUND_F32), n = t - DSV4_ROUND_F32;
    float r = fmaf(-n, DSV4_LN2_LOW, fmaf(-n, DSV4_LN2_HIGH, x));
    float p = DSV4_EXP_C4;
    p = fmaf(p, r, DSV4_EXP_C3);
    p = fmaf(p, r, DSV4_EXP_C2);
    p = fmaf(p, r, DSV4_EXP_C1);
    p = fmaf(p, r, DSV4_EXP_C0);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);
    /* 0.7 < p < 1.5 and the result is a normal number, so n goes straight into the exponent (n =
     * 128 with p < 1). */
    return dsv4_f32_from_bits(dsv4_f32_bits(p) + (dsv4_f32_bits(t) << 23));
}

/* 2^x, 0.95 ulp. */
DSV4_INLINE float dsv4_exp2f(float x) {
    if (x >= 128.0f)
        return dsv4_f32_from_bits(DSV4_INF_BITS);
    if (x < -126.0f)
        return 0.0f;
    if (x != x)
        return dsv4_f32_from_bits(DSV4_NAN_BITS);
    float t = x + DSV4_ROUND_F32, r = x - (t - DSV4_ROUND_F32);
    float p = 0x1.41fb9ep-13f; /* 2^r = 1 + r * polynomial on |r| <= 1/2; relative error 2^-28.9 */
    p = fmaf(p, r, 0x1.5f3e80p-10f);
    p = fmaf(p, r, 0x1.3b2d4ep-7f);
    p = fmaf(p, r, 0x1.c6aee8p-5f);
    p = fmaf(p, r, 0x1.ebfbdcp-3f);
    p = fmaf(p, r, 0x1.62e430p-1f);
    p = fmaf(p, r, 1.0f);
    return dsv4_f32_from_bits(dsv4_f32_bits(p) + (dsv4_f32_bits(t) << 23));
}

/* k * ln 2 + log(1 + f), -1/4 <= f <= 1/2. */
DSV4_INLINE float dsv4_log_join(float k, float f) {
    float p = DSV4_LOG_C8;
    p = fmaf(p, f, DSV4_LOG_C7);
    p = fmaf(p, f, DSV4_LOG_C6);
    p = fmaf(p, f, DSV4_LOG_C5);
    p = fmaf(p, f, DSV4_LOG_C4);
    p = fmaf(p, f, DSV4_LOG_C3);
    p = fmaf(p, f, DSV4_LOG_C2);
    p = fmaf(p, f, DSV4_LOG_C1);
    p = fmaf(p, f, DSV4_LOG_C0);
    return fmaf(k, DSV4_LN2, fmaf(f * f, p, f));
}

/* The multiple of 2^23 that takes the bits of a positive normal float into [0.75, 1.5) when
 * subtracted. */
DSV4_INLINE uint32_t dsv4_log_exponent(float x) {
    return (dsv4_f32_bits(x) - 0x3f400000u) & 0xff800000u;
}

/* Natural logarithm, 0.93 ulp; log(+-0) = -infinity, negative: NaN.  Subnormal arguments count in
 * full. */
DSV4_INLINE float dsv4_logf(float x) {
    float k = 0.0f;
    if (!(x >= 0.0f))
        return dsv4_f32_from_bits(DSV4_NAN_BITS);
    if (x == 0.0f)
        return dsv4_f32_from_bits(DSV4_INF_BITS | 0x80000000u);
    if (dsv4_f32_bits(x) == DSV4_INF_BITS)
        return x;
    if (x < 0x1p-126f) {
        x *= 0x1p23f;
        k = -23.0f;
    }
    uint32_t e = dsv4_log_exponent(x);
    k += (float)((int32_t)e / 0x800000);
    return dsv4_log_join(k, dsv4_f32_from_bits(dsv4_f32_bits(x) - e) - 1.0f);
}

/* log(1 + x) for finite x > -1: x and 1 are scaled by the 2^-k that 1 + x asks for, so no digit of
 * x is lost. */
DSV4_INLINE float dsv4_log1p_core(float x) {
    uint32_t e = dsv4_log_exponent(1.0f + x);
    float quarter =
        dsv4_f32_from_bits(0x40800000u - e); /* 4 * 2^-k: 2^-k alone could be subnormal */
    float f = dsv4_f32_from_bits(dsv4_f32_bits(x) - e) + fmaf(0.25f, quarter, -1.0f);
    return dsv4_log_join((float)((int32_t)e / 0x800000), f);
}

/* log(1 + x), 1.27 ulp; -1 gives -infinity, less NaN; +-0 gives itself. */
DSV4_INLINE float dsv4_log1pf(float x) {
    if (!(x >= -1.0f))
        return dsv4_f32_from_bits(DSV4_NAN_BITS);
    if (x == -1.0f)
        return dsv4_f32_from_bits(DSV4_INF_BITS | 0x80000000u);
    if (x == 0.0f || dsv4_f32_bits(x) == DSV4_INF_BITS)
        return x;
    return dsv4_log1p_core(x);
}

/* 1 / sqrt(x) for x > 0, rounded once from double. */
DSV4_INLINE float dsv4_rsqrtf(float x) {
    return (float)(1.0 / sqrt((double)x));
}

/* 1 / (1 + e^-x), 2.49 ulp. */
DSV4_INLINE float dsv4_sigmoidf(float x) {
    return 1.0f / (1.0f + dsv4_expf(-x));
}

/*
 * log(1 + e^x), x itself above 20 (the router's); 1.67 ulp.  Where e^x is below 2^-126 it is the
 * square of e^(x/2), so that it keeps what a subnormal float can hold.
 */
DSV4_INLINE float dsv4_softplusf(float x) {
    if (x > 20.0f)
        return x;
    if (x != x)
        return dsv4_f32_from_bits(DSV4_NAN_BITS);
    if (x < DSV4_EXP_LOW) {
        float half = dsv4_expf(0.5f * x);
        return half * half; /* log(1 + tiny) is tiny itself */
    }
    return dsv4_log1p_core(dsv4_expf(x));
}

/* e^x in double, 1 ulp; results below 2^-1022 are zero. */
DSV4_INLINE double dsv4_exp(double x) {
    if (x > 0x1.62e42fefa39efp9)
        return dsv4_f64_from_bits(0x7ff0000000000000u);
    if (x < -0x1.6232bdd7abcd2p9)
        return 0.0;
    if (x != x)
        return dsv4_f64_from_bits(0x7ff8000000000000u);
    double t = fma(x, 0x1.71547652b82fep0, DSV4_ROUND_F64), n = t - DSV4_ROUND_F64;
    double r = fma(-n, 0x1.abc9e3b39803fp-56, fma(-n, 0x1.62e42fefa39efp-1, x));
    double p = 1.0 / 6227020800.0; /* 1/13!; the next term is below 2^-57 */
    p = fma(p, r, 1.0 / 479001600.0);
    p = fma(p, r, 1.0 / 39916800.0);
    p = fma(p, r, 1.0 / 3628800.0);
    p = fma(p, r, 1.0 / 362880.0);
    p = fma(p, r, 1.0 / 40320.0);
    p = fma(p, r, 1.0 / 5040.0);
    p = fma(p, r, 1.0 / 720.0);
    p = fma(p, r, 1.0 / 120.0);
    p = fma(p, r, 1.0 / 24.0);
    p = fma(p, r, 1.0 / 6.0);
    p = fma(p, r, 0.5);
    p = fma(p, r, 1.0);
    p = fma(p, r, 1.0);
    return dsv4_f64_from_bits(dsv4_f64_bits(p) + (dsv4_f64_bits(t) << 52));
}

/* Natural logarithm in double, about 2 ulp; zero gives -infinity, negative NaN. */
DSV4_INLINE double dsv4_log(double x) {
    double k = 0.0;
    if (!(x >= 0.0))
        return dsv4_f64_from_bits(0x7ff8000000000000u);
    if (x == 0.0)
        return dsv4_f64_from_bits(0xfff0000000000000u);
    if (dsv4_f64_bits(x) == 0x7ff0000000000000u)
        return x;
    if (x < 0x1p-1022) {
        x *= 0x1p52;
        k = -52.0;
    }
    uint64_t e = (dsv4_f64_bits(x) - 0x3fe6a09e667f3bcdu) &
                 0xfff0000000000000u; /* m in [sqrt(1/2), sqrt(2)) */
    k += (double)((int64_t)e / 0x10000000000000);
    double f = dsv4_f64_from_bits(dsv4_f64_bits(x) - e) - 1.0;
    double s = f / (2.0 + f),
           z = s * s; /* log(1 + f) = 2 atanh(s) = 2 s (1 + z/3 + z^2/5 + ...), z < 0.03 */
    double p = 2.0 / 23.0;
    p = fma(p, z, 2.0 / 21.0);
    p = fma(p, z, 2.0 / 19.0);
    p = fma(p, z, 2.0 / 17.0);
    p = fma(p, z, 2.0 / 15.0);
    p = fma(p, z, 2.0 / 13.0);
    p = fma(p, z, 2.0 / 11.0);
    p = fma(p, z, 2.0 / 9.0);
    p = fma(p, z, 2.0 / 7.0);
    p = fma(p, z, 2.0 / 5.0);
    p = fma(p, z, 2.0 / 3.0);
    double small = fma(s * z, p, fma(k, 0x1.abc9e3b39803fp-56, s + s));
    return fma(k, 0x1.62e42fefa39efp-1, small);
}

/* x^y for x > 0 (NaN otherwise), in double; relative error about 2^-52 * (2 + |y ln x|): for rope
 * frequencies. */
DSV4_INLINE double dsv4_pow(double x, double y) {
    return dsv4_exp(y * dsv4_log(x));
}

/*
 * Sine and cosine of an f32 angle, evaluated in double and rounded once; correct for |theta| <
 * 2^30.  The angle minus n * pi/2 is fused, so the reduction keeps 53 bits; the second part of pi/2
 * keeps them right for large n.
 */
DSV4_INLINE void dsv4_sincosf(float theta, float *sine, float *cosine) {
    double x = (double)theta;
    if (!(x - x == 0.0)) {
        *sine = *cosine = dsv4_f32_from_bits(DSV4_NAN_BITS);
        return;
    }
    double t = fma(x, 0x1.45f306dc9c883p-1, DSV4_ROUND_F64), n = t - DSV4_ROUND_F64;
    double r = fma(-n, 0x1.1a62633145c07p-54, fma(-n, 0x1.921fb54442d18p0, x)), z = r * r;
    double s = -1.0 / 1307674368000.0,
           c = 1.0 / 20922789888000.0; /* Taylor to r^15 and r^16: below 2^-46 */
    s = fma(s, z, 1.0 / 6227020800.0);
    s = fma(s, z, -1.0 / 39916800.0);
    s = fma(s, z, 1.0 / 362880.0);
    s = fma(s, z, -1.0 / 5040.0);
    s = fma(s, z, 1.0 / 120.0);
    s = fma(s, z, -1.0 / 6.0);
    s = fma(s * z, r, r);
    c = fma(c, z, -1.0 / 87178291200.0);
    c = fma(c, z, 1.0 / 479001600.0);
    c = fma(c, z, -1.0 / 3628800.0);
    c = fma(c, z, 1.0 / 40320.0);
    c = fma(c, z, -1.0 / 720.0);
    c = fma(c, z, 1.0 / 24.0);
    c = fma(c, z, -0.5);
    c = fma(c, z, 1.0);
    unsigned quadrant = (unsigned)(dsv4_f64_bits(t) & 3u);
    float fs = (float)(quadrant & 1u ? c : s), fc = (float)(quadrant & 1u ? s : c);
    *sine = quadrant & 2u ? -fs : fs;
    *cosine = quadrant == 1 || quadrant == 2 ? -fc : fc;
}

#endif
