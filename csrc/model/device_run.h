/* SPDX-License-Identifier: Apache-2.0 */
/* What the phases of a pass on the device share: device_pass.c begins and ends it, device_layer.c is what a layer launches. */
#ifndef DSV4_DEVICE_RUN_H
#define DSV4_DEVICE_RUN_H

#include "model/device.h"

/* What every phase needs. */
struct dsv4_device_run {
    struct dsv4_device *d;
    const struct dsv4_pass *p;
    struct dsv4_cuda_pass pass; /* pointers of the device; states of the layer at work */
    int32_t n;
    dsv4_error *err;
};

/* Launches `op` with the named arguments, or returns its failure. */
#define LAUNCH(r, op, ...)                                                                                             \
    DSV4_TRY(dsv4_device_status((r)->d, (r)->d->plugin->launches.op(&(struct dsv4_cuda_##op##_args){__VA_ARGS__},        \
                                                                  (r)->d->stream), #op, (r)->err))

/* A layer over tokens and weights without groups: row t of x at t * ld_x. */
static inline struct dsv4_cuda_linear_job dsv4_linear_job(const struct dsv4_weight *w, const dsv4_bf16 *x, void *out,
                                                          ptrdiff_t ld_x, ptrdiff_t ld_out, int out_f32) {
    return (struct dsv4_cuda_linear_job){.w = *w, .x = x, .out = out, .ld_x = ld_x, .ld_out = ld_out, .out_f32 = out_f32};
}

/* Layer `layer` of the model, for the streams of the pass. */
dsv4_status dsv4_device_layer(struct dsv4_device_run *r, int32_t layer);

#endif
