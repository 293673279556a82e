/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The processors this process may run on, as the kernel describes them below /sys and /proc: which share a core (SMT),
 * which a memory node, and how many of them a control group pays for.  From it come the default number of threads, one
 * per physical core, and the node each worker of a team belongs to.
 *
 * A missing file is no error: a processor whose siblings are not told has a core of its own, one that no node lists is
 * on the first node, no quota means none.  Source: Documentation/ABI/stable/sysfs-devices-system-cpu and
 * sysfs-devices-node, Documentation/admin-guide/cgroup-v2.rst, all of Linux.
 */
#ifndef DSV4_TOPOLOGY_H
#define DSV4_TOPOLOGY_H

#include <sched.h>
#include <stdint.h>

#include "core/status.h"

enum { DSV4_MAX_CPUS = 8192 };

struct dsv4_cpu {
    int32_t id;   /* as in /sys/devices/system/cpu/cpu<id> */
    int32_t core; /* 0, 1, ... of those this process may use; processors of one core share it */
    int32_t node; /* likewise */
};

struct dsv4_topology {
    struct dsv4_cpu *cpus; /* owned; by node, then core, then id */
    int32_t n_cpu, n_core, n_node;
    int32_t quota;         /* processors' worth of time that control groups allow, rounded up; n_cpu at most */
};

/*
 * Reads the machine below `root` ("" for this one).  `allowed` is a set of `bytes` bytes as sched_getaffinity gives;
 * NULL: this process's own.  At least one processor comes out.
 */
dsv4_status dsv4_topology_read(struct dsv4_topology *out, const char *root, const cpu_set_t *allowed, size_t bytes,
                               dsv4_error *err);
void dsv4_topology_free(struct dsv4_topology *t);

/* One thread per physical core, no more than the quota. */
int32_t dsv4_topology_threads(const struct dsv4_topology *t);

/*
 * The node of worker `id` of `n`: workers are dealt to nodes in their order, to each as many as its share of the cores.
 * *first and *count: the workers of that node.
 */
int32_t dsv4_topology_node(const struct dsv4_topology *t, int32_t id, int32_t n, int32_t *first, int32_t *count);

/* Lets the calling thread run on the processors of one node only.  A refusal changes nothing and is no error. */
void dsv4_topology_bind(const struct dsv4_topology *t, int32_t node);

#endif
