// SPDX-License-Identifier: Apache-2.0
//
// Values of a pass to where a trace wants them: rows of four bytes an element.  Contract: launches.h.
#include "device.cuh"

enum { TAP_THREADS = 256 };

// Elements of x there are in row t; what lies behind is filled.
DSV4_DEVICE int32_t tap_count(const struct dsv4_cuda_tap_args &a, int64_t t) {
    if (a.positions) {
        int32_t n = (a.positions[t] + 1) / a.ratio;
        return n > a.top_k ? n : 0;
    }
    return a.counts ? a.counts[t] : a.n;
}

DSV4_KERNEL(tap_kernel, struct dsv4_cuda_tap_args, TAP_THREADS, 1) {
    int64_t i = (int64_t)blockIdx.x * TAP_THREADS + (int32_t)threadIdx.x;
    if (i >= (int64_t)a.n_row * a.width)
        return;
    int64_t t = i / a.width, c = i % a.width, from = t * a.ld_x + c;
    uint32_t value = a.fill;
    if (c < tap_count(a, t))
        value = a.bf16 ? (uint32_t)((const dsv4_bf16 *)a.x)[from] << 16 : ((const uint32_t *)a.x)[from];
    ((uint32_t *)a.out)[t * a.ld_out + c] = value;
}

int dsv4_cuda_tap(const struct dsv4_cuda_tap_args *a, void *stream) {
    size_t n = (size_t)a->n_row * (size_t)a->width;
    if (n)
        DSV4_LAUNCH(tap_kernel, dsv4_blocks(n, TAP_THREADS), TAP_THREADS, stream, *a);
    return 0;
}
