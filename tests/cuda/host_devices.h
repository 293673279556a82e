// SPDX-License-Identifier: Apache-2.0
//
// Devices that lie in the host's memory, HOST_DEVICES of them (one unless it is set), each with HOST_BYTES bytes (one number
// for all, or one for each, with commas).  While one of them is at work the memory of the others cannot be touched: a
// kernel that does ends the process.
#pragma once

#include <stdint.h>

int dsv4_host_count();
// The calling thread's context: a device's own, NULL, which counts as the first device, or somebody else's.
void *dsv4_host_context();
void dsv4_host_set_context(void *context);
int dsv4_host_current(); // of whose it is; -1: of no device's
void dsv4_host_set_current(int device);

uint64_t dsv4_host_total(int device);
uint64_t dsv4_host_used(int device);
void *dsv4_host_take(int device, uint64_t bytes); // NULL where there is no room
bool dsv4_host_give(void *p);                     // false for what was not taken
// Whether [p, p + bytes) lies in one block of that device.
bool dsv4_host_inside(int device, const void *p, uint64_t bytes);

void dsv4_host_stream_on(void *stream, int device); // is one of that device; -1: is no more
int dsv4_host_device_of(const void *stream);     // -1: of none

// From now on this device's memory may be touched, and no other's; -1: that of all.
void dsv4_host_work_on(int device);

// The error this call is to give (HOST_FAIL), 0 for none.
int dsv4_host_fails(const char *name);

// What a stream of host_plugin.cpp was to copy is copied now.
void dsv4_host_catch_up(void *stream);

// Communicators (host_nccl.cpp): how many there are; a device is lost, and whether some that may wait for it are there yet.
int dsv4_host_communicators();
void dsv4_host_lost();
bool dsv4_host_stuck();
