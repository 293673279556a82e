/* SPDX-License-Identifier: Apache-2.0 */
/*
 * NCCL, found at run time and asked for only where a model uses several devices: bytes of one device to another, in the
 * order of their streams.  One process, one communicator for each device, used by one thread at a time.  Refuses, each
 * with its cause and what to do: no library, one that lacks a function, one older than 2.14 or newer than 2, and every
 * error it returns.  Source: NCCL user guide, "Group Calls", "Point-to-point communication", "Error handling".
 */
#ifndef DSV4_NCCL_H
#define DSV4_NCCL_H

#include <stdint.h>

#include "core/status.h"

struct dsv4_nccl;

/*
 * Communicators of these devices, numbered as CUDA does, each of which is there once.  `path` is a file, or a name for dlopen;
 * the library stays loaded to the end of the process.  DSV4_E_UNAVAILABLE, DSV4_E_DEVICE.
 */
dsv4_status dsv4_nccl_create(struct dsv4_nccl **out, const char *path, const int32_t *devices, int32_t n, dsv4_error *err);

/*
 * lost = 0: all copies have ended.  lost = 1 ends those that wait for a device that is lost, which nothing else would; so
 * before anything waits for the other devices.  NULL is legal.
 */
void dsv4_nccl_destroy(struct dsv4_nccl *c, int lost);

/* Enqueues a copy: sent in the order of from_stream, there in the order of to_stream.  Ranks count in `devices`. */
dsv4_status dsv4_nccl_move(struct dsv4_nccl *c, int32_t to_rank, void *to, void *to_stream, int32_t from_rank,
                           const void *from, void *from_stream, uint64_t bytes, dsv4_error *err);

/* An error that a copy ran into after it was enqueued. */
dsv4_status dsv4_nccl_check(struct dsv4_nccl *c, dsv4_error *err);

#endif
