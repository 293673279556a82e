/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Routed experts that a device has no room for: they lie "beside" it, in host memory, where the files are mapped.
 *
 * Their rows are computed by the host's workers with the CPU's own code (moe.c) while the device does those of its own
 * experts and of the shared one; only operands go out and rows come back, 8 KB each for V4-Flash, through memory that both
 * see.  An expert with more rows than the CPU reads weights once for (DSV4_FEW_TOKENS) is worth its way over the bus: it is
 * copied to one of two slots of the device, in turns, so that one is filled while the other is used.  Where an expert
 * lies, and which way its rows take, changes no bit: expert_sum adds a token's rows by ascending expert.
 *
 * The host waits for a number that the device writes when a layer's choices have come out, not for the stream; a device
 * that stops ends the wait, because the stream is asked for its errors meanwhile.
 */
#ifndef DSV4_DEVICE_EXPERTS_H
#define DSV4_DEVICE_EXPERTS_H

#include "model/device_run.h"

enum { DSV4_SLOTS = 2, DSV4_EXPERT_PARTS = 6 };

/* Memory that both see, as one of them sees it. */
struct dsv4_wire {
    uint32_t *sent;           /* [1] of the device's launches, the last that is complete */
    int32_t *ids;             /* [N][top_k] */
    float *weights;           /* [N][top_k] */
    dsv4_bf16 *quant, *plain; /* [N][d], or NULL where no expert beside the device reads them */
    int32_t *n_row;           /* [1] rows that the host has computed */
    int32_t *to;              /* [most_rows] the device's row of each */
    dsv4_bf16 *rows;          /* [most_rows][d] */
    uint8_t *staging[DSV4_SLOTS];
};

/* What the workers are to do together. */
struct dsv4_beside_job {
    struct dsv4_beside *beside;
    int32_t layer, expert; /* expert -1: the rows; else the copy of that one to staging[slot] */
    int32_t slot;
};

struct dsv4_beside {
    struct dsv4_device *d; /* borrowed */
    uint8_t *resident;     /* [layers E] of the model's arena, like all arrays of the host below: 1 on the device */
    int32_t *missing;      /* [layers] experts of each that are not */
    int32_t n_missing;     /* of the layers of this device */
    int32_t quant, plain;  /* whether one of them reads rounded operands, or others */
    int32_t most_rows;     /* the host computes in one layer */
    /* of the device: one block */
    uint8_t *memory;       /* owned */
    uint8_t *slots[DSV4_SLOTS];
    uint32_t *count;
    uint64_t *uses;        /* [layers][E] */
    struct dsv4_weight *tables[DSV4_SLOTS]; /* [layers][3][E + 1]: w1, w3, w2 of those missing as they lie in a slot */
    size_t part_at[DSV4_EXPERT_PARTS], slot_bytes;
    /* of the host, seen by both: one block */
    uint8_t *shared;       /* owned */
    struct dsv4_wire host, device;
    void *stream;          /* owned, like the events: copies to the slots */
    void *arrived[DSV4_SLOTS], *free[DSV4_SLOTS]; /* a slot is filled; its last products are done */
    int32_t filled[DSV4_SLOTS];                   /* whether the events were recorded */
    uint32_t number;       /* of launches of `send` so far */
    int32_t unsure;        /* the last pass did not end well: the number is what the device says */
    /* the layer at work, as the CPU's experts see it */
    struct dsv4_prepared prepared, *own; /* own: [team], each the same */
    struct dsv4_workspace ws;            /* the model's, but for these and the rows */
    struct dsv4_pass pass;
    int32_t *first, *n_rows; /* [E + 1], [E]: of the device's order by expert */
    int32_t *uploads;        /* [E] experts that go to the device */
    int32_t n_upload;
    struct dsv4_beside_job job;
};

/* device_place.c.  Decides which experts of this stage lie on the device, in the order of the option `hot`, then by layer;
 * there are `room` bytes for them and what those beside it need.  d->beside stays NULL if all do; *least is what it takes
 * with none.  DSV4_OK or DSV4_E_MEMORY, without a sentence when *least is more than there is. */
dsv4_status dsv4_beside_choose(struct dsv4_device *d, uint64_t room, uint64_t *least, dsv4_error *err);
/* Bytes on the device for those that are not there. */
size_t dsv4_beside_bytes(const struct dsv4_beside *b);
dsv4_status dsv4_beside_build(struct dsv4_device *d, dsv4_error *err);
void dsv4_beside_destroy(struct dsv4_device *d);
/* Bytes of routed expert e of a layer on a device. */
size_t dsv4_beside_expert_bytes(const struct dsv4_device *d, int32_t layer, int32_t e);

static inline int dsv4_beside_has(const struct dsv4_device *d, int32_t layer, int32_t e) {
    return d->beside && !d->beside->resident[(size_t)layer * (size_t)d->model->config.n_routed_experts + (size_t)e];
}

/* Whether experts of this layer lie beside the device: its half layers then meet the host (device_run.h). */
static inline int dsv4_beside_at(const struct dsv4_device *d, int32_t layer) {
    return d->beside && d->beside->missing[layer] > 0;
}

/* Counters of this layer's experts, of the device; NULL where all experts are there. */
static inline uint64_t *dsv4_beside_uses(const struct dsv4_device *d, int32_t layer) {
    return d->beside ? d->beside->uses + (size_t)layer * (size_t)d->model->config.n_routed_experts : NULL;
}

/* device_experts.c.  Launches: the choices of a layer to the host; its rows to where the sum reads them. */
dsv4_status dsv4_beside_send(const struct dsv4_device_run *r, int32_t layer);
dsv4_status dsv4_beside_receive(const struct dsv4_device_run *r);
/* All segments of the pass, and what the host does between them. */
dsv4_status dsv4_beside_segments(struct dsv4_device_run *r);
/* The other workers, and the first one when its part of the pass is over.  1: the run was cancelled. */
int dsv4_beside_help(dsv4_worker *w, struct dsv4_pass *p);

#endif
