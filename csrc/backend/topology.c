/* SPDX-License-Identifier: Apache-2.0 */
#include "backend/topology.h"

#include <fcntl.h>
#include <limits.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { TEXT = 16384, PATH = 512 };

/* The text of a small file, without what does not fit; empty when it cannot be read. */
static void read_text(char *text, const char *path) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? 0 : read(fd, text, TEXT - 1);
    if (fd >= 0)
        close(fd);
    text[n > 0 ? n : 0] = 0;
}

/* The next range of a list such as "0-3,8,10-11"; 0 at its end or where it is no list. */
static int next_range(const char **at, long *low, long *high) {
    char *end;
    while (**at == ',' || **at == ' ')
        ++*at;
    if (**at < '0' || **at > '9')
        return 0;
    *low = *high = strtol(*at, &end, 10);
    if (*end == '-' && end[1] >= '0' && end[1] <= '9')
        *high = strtol(end + 1, &end, 10);
    *at = end;
    return *low <= *high;
}

static int listed(const char *list, long id) {
    long low, high;
    while (next_range(&list, &low, &high))
        if (low <= id && id <= high)
            return 1;
    return 0;
}

/* ---------------------------------------------------------------------------------------------- processors and nodes */

/* The smallest processor of the core, whether this process may use it or not; the processor itself if none is told. */
static int32_t core_of(const char *root, int32_t id) {
    static const char *const names[] = {"core_cpus_list", "thread_siblings_list"};
    char path[PATH], text[TEXT];
    for (int i = 0; i < 2; i++) {
        long low, high;
        const char *at = text;
        snprintf(path, sizeof path, "%s/sys/devices/system/cpu/cpu%d/topology/%s", root, id, names[i]);
        read_text(text, path);
        if (listed(text, id) && next_range(&at, &low, &high))
            return (int32_t)low;
    }
    return id;
}

/* Gives every processor its node; those of no node keep the first. */
static void read_nodes(struct dsv4_topology *t, const char *root) {
    char path[PATH], nodes[TEXT], text[TEXT];
    const char *at = nodes;
    long low, high;
    int32_t first = -1;
    snprintf(path, sizeof path, "%s/sys/devices/system/node/online", root);
    read_text(nodes, path);
    for (int32_t i = 0; i < t->n_cpu; i++)
        t->cpus[i].node = -1;
    while (next_range(&at, &low, &high))
        for (long node = low; node <= high && node < DSV4_MAX_CPUS; node++) {
            snprintf(path, sizeof path, "%s/sys/devices/system/node/node%ld/cpulist", root, node);
            read_text(text, path);
            first = first < 0 ? (int32_t)node : first;
            for (int32_t i = 0; i < t->n_cpu; i++)
                if (listed(text, t->cpus[i].id))
                    t->cpus[i].node = (int32_t)node;
        }
    for (int32_t i = 0; i < t->n_cpu; i++)
        t->cpus[i].node = t->cpus[i].node < 0 ? first : t->cpus[i].node;
}

static int by_place(const void *a, const void *b) {
    const struct dsv4_cpu *x = a, *y = b;
    if (x->node != y->node)
        return x->node < y->node ? -1 : 1;
    if (x->core != y->core)
        return x->core < y->core ? -1 : 1;
    return (x->id > y->id) - (x->id < y->id);
}

/* Sorted, and cores and nodes numbered from 0. */
static void number(struct dsv4_topology *t) {
    int32_t core = -1, node = -1, last_core = INT_MIN, last_node = INT_MIN;
    qsort(t->cpus, (size_t)t->n_cpu, sizeof *t->cpus, by_place);
    for (int32_t i = 0; i < t->n_cpu; i++) {
        struct dsv4_cpu *c = &t->cpus[i];
        int new_node = c->node != last_node, new_core = new_node || c->core != last_core;
        last_node = c->node;
        last_core = c->core;
        c->node = node += new_node;
        c->core = core += new_core;
    }
    t->n_core = core + 1;
    t->n_node = node + 1;
}

static dsv4_status read_cpus(struct dsv4_topology *t, const char *root, const cpu_set_t *allowed, size_t bytes,
                             dsv4_error *err) {
    char path[PATH], online[TEXT];
    int32_t most = (int32_t)(bytes * CHAR_BIT < DSV4_MAX_CPUS ? bytes * CHAR_BIT : DSV4_MAX_CPUS);
    snprintf(path, sizeof path, "%s/sys/devices/system/cpu/online", root);
    read_text(online, path);
    t->cpus = calloc((size_t)most + 1, sizeof *t->cpus);
    if (!t->cpus)
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for a list of %d processors", most);
    for (int32_t id = 0; id < most; id++)
        if (CPU_ISSET_S((size_t)id, bytes, allowed) && (!online[0] || listed(online, id)))
            t->cpus[t->n_cpu++] = (struct dsv4_cpu){.id = id, .core = core_of(root, id)};
    if (!t->n_cpu) /* the list contradicts the set: trust neither */
        t->n_cpu = 1;
    read_nodes(t, root);
    number(t);
    return DSV4_OK;
}

/* --------------------------------------------------------------------------------------------------------- the quota */

static int32_t least(int32_t quota, long long time, long long period) {
    if (time <= 0 || period <= 0)
        return quota;
    long long whole = (time + period - 1) / period;
    return whole < quota ? (int32_t)whole : quota;
}

/* The quota of one control group of either version. */
static int32_t group_quota(int32_t quota, const char *folder) {
    char path[2 * PATH + 32], text[TEXT];
    long long time, period;
    snprintf(path, sizeof path, "%s/cpu.max", folder);
    read_text(text, path);
    if (sscanf(text, "%lld %lld", &time, &period) == 2)
        return least(quota, time, period);
    snprintf(path, sizeof path, "%s/cpu.cfs_quota_us", folder);
    read_text(text, path);
    if (sscanf(text, "%lld", &time) != 1)
        return quota;
    snprintf(path, sizeof path, "%s/cpu.cfs_period_us", folder);
    read_text(text, path);
    return sscanf(text, "%lld", &period) == 1 ? least(quota, time, period) : quota;
}

/* Whether "cpu" is one of the words between commas. */
static int names_cpu(const char *from, const char *end) {
    while (from < end) {
        const char *comma = memchr(from, ',', (size_t)(end - from));
        const char *stop = comma ? comma : end;
        if (stop - from == 3 && memcmp(from, "cpu", 3) == 0)
            return 1;
        from = stop + 1;
    }
    return 0;
}

/* The group named by a line of /proc/self/cgroup, and all groups around it up to the top of what is mounted. */
static int32_t line_quota(int32_t quota, const char *root, const char *line, size_t length) {
    const char *end = line + length, *names = memchr(line, ':', length), *group;
    char folder[2 * PATH];
    if (!names || !(group = memchr(names + 1, ':', (size_t)(end - names - 1))))
        return quota;
    int old = group != names + 1; /* version 1 names its controllers */
    if (old && !names_cpu(names + 1, group))
        return quota;
    int top = snprintf(folder, sizeof folder, "%s/sys/fs/cgroup%s", root, old ? "/cpu" : "");
    if (end - group - 1 >= (ptrdiff_t)sizeof folder - top)
        return quota;
    snprintf(folder + top, sizeof folder - (size_t)top, "%.*s", (int)(end - group - 1), group + 1);
    for (;;) {
        quota = group_quota(quota, folder);
        char *slash = strrchr(folder + top, '/');
        if (!slash)
            return quota;
        *slash = 0;
    }
}

static int32_t read_quota(int32_t quota, const char *root) {
    char path[PATH], text[TEXT];
    snprintf(path, sizeof path, "%s/proc/self/cgroup", root);
    read_text(text, path);
    for (const char *line = text; *line;) {
        size_t length = strcspn(line, "\n");
        quota = line_quota(quota, root, line, length);
        line += length + (line[length] != 0);
    }
    return quota;
}

/* ---------------------------------------------------------------------------------------------------------- the whole */

dsv4_status dsv4_topology_read(struct dsv4_topology *out, const char *root, const cpu_set_t *allowed, size_t bytes,
                               dsv4_error *err) {
    struct dsv4_topology t = {0};
    cpu_set_t *own = NULL;
    if (!allowed) {
        bytes = CPU_ALLOC_SIZE(DSV4_MAX_CPUS);
        own = CPU_ALLOC(DSV4_MAX_CPUS);
        if (!own)
            return dsv4_fail(err, DSV4_E_MEMORY, "no memory for a set of processors");
        CPU_ZERO_S(bytes, own);
        if (sched_getaffinity(0, bytes, own) != 0)
            CPU_SET_S(0, bytes, own);
        allowed = own;
    }
    dsv4_status status = read_cpus(&t, root, allowed, bytes, err);
    if (own)
        CPU_FREE(own);
    if (status != DSV4_OK)
        return status;
    t.quota = read_quota(t.n_cpu, root);
    *out = t;
    return DSV4_OK;
}

void dsv4_topology_free(struct dsv4_topology *t) {
    free(t->cpus);
    *t = (struct dsv4_topology){0};
}

int32_t dsv4_topology_threads(const struct dsv4_topology *t) {
    return t->quota < t->n_core ? t->quota : t->n_core;
}

/* Cores on nodes before this one. */
static int32_t cores_before(const struct dsv4_topology *t, int32_t node) {
    for (int32_t i = 0; i < t->n_cpu; i++)
        if (t->cpus[i].node >= node)
            return t->cpus[i].core;
    return t->n_core;
}

int32_t dsv4_topology_node(const struct dsv4_topology *t, int32_t id, int32_t n, int32_t *first, int32_t *count) {
    for (int32_t node = 0;; node++) {
        int64_t low = (int64_t)n * cores_before(t, node), high = (int64_t)n * cores_before(t, node + 1);
        *first = (int32_t)((low + t->n_core - 1) / t->n_core);
        *count = (int32_t)((high + t->n_core - 1) / t->n_core) - *first;
        if (id < *first + *count || node + 1 >= t->n_node)
            return node;
    }
}

void dsv4_topology_bind(const struct dsv4_topology *t, int32_t node) {
    size_t bytes = CPU_ALLOC_SIZE(DSV4_MAX_CPUS);
    cpu_set_t *set = CPU_ALLOC(DSV4_MAX_CPUS);
    if (!set)
        return;
    CPU_ZERO_S(bytes, set);
    for (int32_t i = 0; i < t->n_cpu; i++)
        if (t->cpus[i].node == node)
            CPU_SET_S((size_t)t->cpus[i].id, bytes, set);
    sched_setaffinity(0, bytes, set);
    CPU_FREE(set);
}
