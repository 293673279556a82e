/* SPDX-License-Identifier: Apache-2.0 */
/* The stages of a model: made one after the other, and given back together when one of them fails. */
#include <stdlib.h>

#include "model/device.h"

/* The experts of a layer are computed by one launch, so the inputs of their second projections are rounded alike. */
static dsv4_status check_experts(const dsv4_model *m, dsv4_error *err) {
    for (int32_t i = 0; i < m->config.num_hidden_layers; i++)
        for (int32_t e = 1; e < m->config.n_routed_experts; e++)
            if (dsv4_rounds_input(m, &m->layers[i].experts[e].w2) != dsv4_rounds_input(m, &m->layers[i].experts[0].w2))
                return dsv4_fail(err, DSV4_E_UNAVAILABLE, "CUDA: layer %d: experts 0 and %d have w2 of formats whose inputs "
                                 "are rounded differently; use device='cpu'", i, e);
    return DSV4_OK;
}

static dsv4_status build(struct dsv4_pipeline *p, const dsv4_model *m, const struct dsv4_cuda_paths *paths, uint64_t most,
                         dsv4_error *err) {
    const struct dsv4_cuda_plugin *plugin;
    DSV4_TRY(check_experts(m, err));
    DSV4_TRY(dsv4_cuda_load(&plugin, paths, err));
    DSV4_TRY(dsv4_cuda_prepare(plugin, 0, err));
    p->stages = calloc(1, sizeof *p->stages);
    if (!p->stages)
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for a device");
    p->stages[0] = (struct dsv4_device){.plugin = plugin, .model = m, .pipeline = p,
                                        .end_layer = m->config.num_hidden_layers};
    p->n = 1;
    return dsv4_device_build(&p->stages[0], most, err);
}

dsv4_status dsv4_pipeline_create(struct dsv4_pipeline **out, const dsv4_model *m, const struct dsv4_cuda_paths *paths,
                                 uint64_t most_bytes, dsv4_error *err) {
    struct dsv4_pipeline *p = calloc(1, sizeof *p);
    if (!p)
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for a device");
    dsv4_status status = build(p, m, paths, most_bytes, err);
    if (status != DSV4_OK) {
        dsv4_pipeline_destroy(p);
        return status;
    }
    *out = p;
    return DSV4_OK;
}

void dsv4_pipeline_destroy(struct dsv4_pipeline *p) {
    if (!p)
        return;
    for (int32_t i = 0; i < p->n; i++)
        dsv4_device_destroy(&p->stages[i]);
    free(p->stages);
    free(p);
}
