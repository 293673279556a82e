/* SPDX-License-Identifier: Apache-2.0 */
/* Simulated machines, as trees of files: cores, memory nodes, quotas; which node a worker is on; the cut by node. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/parallel.h"
#include "backend/topology.h"
#include "check.h"

void check_topology(void);

static char folder[32];

static void put(const char *name, const char *text) {
    check_write(folder, name, text);
}

static void put_siblings(int cpu, const char *name, const char *list) {
    char path[128];
    snprintf(path, sizeof path, "sys/devices/system/cpu/cpu%d/topology/%s", cpu, name);
    put(path, list);
}

static void put_node(int node, const char *list) {
    char path[128];
    snprintf(path, sizeof path, "sys/devices/system/node/node%d/cpulist", node);
    put(path, list);
}

static void begin(void) {
    snprintf(folder, sizeof folder, "/tmp/dsv4-check-XXXXXX");
    check_true(mkdtemp(folder) != NULL, "temporary folder");
}

/* The machine below `folder` for a process allowed on these processors; the folder is removed. */
static struct dsv4_topology machine(const char *allowed) {
    struct dsv4_topology t;
    size_t bytes = CPU_ALLOC_SIZE(DSV4_MAX_CPUS);
    cpu_set_t *set = CPU_ALLOC(DSV4_MAX_CPUS);
    char command[64];
    CPU_ZERO_S(bytes, set);
    for (const char *at = allowed; *at; at += strcspn(at, ","), at += *at == ',') {
        int low, high, n = sscanf(at, "%d-%d", &low, &high);
        for (int id = low; id <= (n == 2 ? high : low); id++)
            CPU_SET_S((size_t)id, bytes, set);
    }
    check_true(dsv4_topology_read(&t, folder, set, bytes, NULL) == DSV4_OK, "reading");
    CPU_FREE(set);
    snprintf(command, sizeof command, "rm -r %s", folder);
    check_true(system(command) == 0, "removing");
    return t;
}

static void expect(const char *what, struct dsv4_topology *t, int cpus, int cores, int nodes, int threads,
                   const char *order) {
    char got[512] = "";
    for (int32_t i = 0; i < t->n_cpu; i++)
        snprintf(got + strlen(got), sizeof got - strlen(got), "%d:%d:%d ", t->cpus[i].id, t->cpus[i].core,
                 t->cpus[i].node);
    check_true(t->n_cpu == cpus && t->n_core == cores && t->n_node == nodes && dsv4_topology_threads(t) == threads,
               "%s: %d processors, %d cores, %d nodes, %d threads", what, t->n_cpu, t->n_core, t->n_node,
               dsv4_topology_threads(t));
    check_true(!order || strcmp(got, order) == 0, "%s: got %s, wanted %s", what, got, order ? order : "");
    dsv4_topology_free(t);
}

static void check_small(void) {
    struct dsv4_topology t;
    begin();
    put("sys/devices/system/cpu/online", "0-3\n");
    put("sys/devices/system/node/online", "0\n");
    put_node(0, "0-3\n");
    for (int i = 0; i < 4; i++) {
        char list[16];
        snprintf(list, sizeof list, "%d\n", i);
        put_siblings(i, "core_cpus_list", list);
    }
    t = machine("0-3");
    expect("one node, no SMT", &t, 4, 4, 1, 4, "0:0:0 1:1:0 2:2:0 3:3:0 ");

    begin(); /* older kernels: thread_siblings_list; siblings far apart */
    for (int i = 0; i < 8; i++) {
        char list[16];
        snprintf(list, sizeof list, "%d,%d\n", i % 4, i % 4 + 4);
        put_siblings(i, "thread_siblings_list", list);
    }
    put("sys/devices/system/node/online", "0\n");
    put_node(0, "0-7\n");
    t = machine("0-7");
    expect("SMT-2", &t, 8, 4, 1, 4, "0:0:0 4:0:0 1:1:0 5:1:0 2:2:0 6:2:0 3:3:0 7:3:0 ");

    begin();
    t = machine("0-2,5");
    expect("nothing is told", &t, 4, 4, 1, 4, "0:0:0 1:1:0 2:2:0 5:3:0 ");

    begin();
    put("sys/devices/system/cpu/online", "4-7\n");
    t = machine("0-2");
    expect("a list that contradicts the set", &t, 1, 1, 1, 1, NULL);

    begin();
    put("sys/devices/system/cpu/online", "0-3\n");
    put_siblings(0, "core_cpus_list", "garbage\n");
    put_siblings(1, "core_cpus_list", "2-\n");
    put_siblings(2, "core_cpus_list", "7,9\n"); /* does not list itself */
    put("sys/devices/system/node/online", "x\n");
    t = machine("0-2");
    expect("files that say nothing", &t, 3, 3, 1, 3, "0:0:0 1:1:0 2:2:0 ");
}

/* Two nodes of two cores of two threads, numbered as on common servers: 0 and 4, 1 and 5, ... are siblings. */
static void put_server(void) {
    begin();
    put("sys/devices/system/cpu/online", "0-7\n");
    put("sys/devices/system/node/online", "0-1\n");
    put_node(0, "0-1,4-5\n");
    put_node(1, "2-3,6-7\n");
    for (int i = 0; i < 8; i++) {
        char list[16];
        snprintf(list, sizeof list, "%d,%d\n", i % 4, i % 4 + 4);
        put_siblings(i, "core_cpus_list", list);
    }
}

static void check_server(void) {
    struct dsv4_topology t;
    put_server();
    t = machine("0-7");
    expect("two nodes", &t, 8, 4, 2, 4, "0:0:0 4:0:0 1:1:0 5:1:0 2:2:1 6:2:1 3:3:1 7:3:1 ");
    put_server();
    t = machine("1,4,6,7"); /* a container with some processors: cores 1, 0, 2, 3 */
    expect("restricted", &t, 4, 4, 2, 4, "4:0:0 1:1:0 6:2:1 7:3:1 ");
    put_server();
    t = machine("2,6"); /* one core of the second node */
    expect("one core", &t, 2, 1, 1, 1, "2:0:0 6:0:0 ");
    put_server();
    put("sys/devices/system/cpu/online", "0-3,5-7\n"); /* 4 is offline */
    t = machine("0-7");
    expect("offline", &t, 7, 4, 2, 4, "0:0:0 1:1:0 5:1:0 2:2:1 6:2:1 3:3:1 7:3:1 ");

    begin(); /* holes in both numberings; processor 17 on no node, nodes 1 and 3, one without processors */
    put("sys/devices/system/cpu/online", "2,5,16-17\n");
    put("sys/devices/system/node/online", "1,3-4\n");
    put_node(1, "2,5\n");
    put_node(3, "16\n");
    put_node(4, "\n");
    t = machine("0-31");
    expect("holes", &t, 4, 4, 2, 4, "2:0:0 5:1:0 17:2:0 16:3:1 ");
}

static void check_quota(void) {
    static const struct {
        const char *group, *file, *text;
        int threads;
    } cases[] = {
        {"0::/job/step\n", "sys/fs/cgroup/job/step/cpu.max", "max 100000\n", 8},
        {"0::/job/step\n", "sys/fs/cgroup/job/step/cpu.max", "250000 100000\n", 3},
        {"0::/job/step\n", "sys/fs/cgroup/job/cpu.max", "50000 100000\n", 1},
        {"0::/\n", "sys/fs/cgroup/cpu.max", "400000 100000\n", 4},
        {"0::/job\n", "sys/fs/cgroup/other/cpu.max", "100000 100000\n", 8},
        {"0::/job\n", "sys/fs/cgroup/job/cpu.max", "nonsense\n", 8},
        {"9:cpuset:/a\n3:cpuacct,cpu:/docker/1\n", "sys/fs/cgroup/cpu/docker/1/cpu.cfs_quota_us", "600000\n", 6},
        {"3:cpu,cpuacct:/docker/1\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "150000\n", 2},
        {"3:cpu:/docker/1\n", "sys/fs/cgroup/cpu/docker/1/cpu.cfs_quota_us", "-1\n", 8},
        {"3:cpuset:/a\n", "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "100000\n", 8},
        {"no line at all", "sys/fs/cgroup/cpu.max", "100000 100000\n", 8},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char path[128];
        begin();
        put("proc/self/cgroup", cases[i].group);
        put(cases[i].file, cases[i].text);
        const char *old = strstr(cases[i].file, "cpu.cfs_quota_us");
        snprintf(path, sizeof path, "%.*scpu.cfs_period_us", old ? (int)(old - cases[i].file) : 0, cases[i].file);
        if (old)
            put(path, "100000\n");
        struct dsv4_topology t = machine("0-7");
        check_true(dsv4_topology_threads(&t) == cases[i].threads, "quota %zu: %d threads", i, dsv4_topology_threads(&t));
        dsv4_topology_free(&t);
    }
}

enum { ITEMS = 5, MOST_UNITS = 40 };

/* Every unit of every item belongs to one worker, and the same part of each item to a node. */
static void check_cut(const struct dsv4_topology *t, int n) {
    int64_t units[ITEMS], cost[ITEMS];
    int owner[ITEMS][MOST_UNITS], last_node = 0;
    memset(owner, -1, sizeof owner);
    for (int i = 0; i < ITEMS; i++) {
        units[i] = 1 + check_below(MOST_UNITS);
        cost[i] = 1 + check_below(9);
    }
    for (int id = 0; id < n; id++) {
        dsv4_worker w = {.id = id, .n = n};
        int32_t node = dsv4_topology_node(t, id, n, &w.node_first, &w.node_n);
        int64_t total = 0, before = 0, lo, hi, u0, u1;
        check_true(node >= last_node && node < t->n_node && id >= w.node_first && id < w.node_first + w.node_n,
                   "worker %d of %d on node %d", id, n, node);
        last_node = node;
        for (int i = 0; i < ITEMS; i++) {
            dsv4_share_node(&w, units[i], &lo, &hi);
            total += (hi - lo) * cost[i];
        }
        for (int i = 0; i < ITEMS; i++) {
            dsv4_share_node(&w, units[i], &lo, &hi);
            dsv4_share_cost(&w, total, before, cost[i], hi - lo, &u0, &u1);
            for (int64_t u = lo + u0; u < lo + u1; u++) {
                check_true(owner[i][u] == -1, "unit %d of item %d has one owner", (int)u, i);
                owner[i][u] = id;
            }
            before += (hi - lo) * cost[i];
        }
    }
    for (int i = 0; i < ITEMS; i++)
        for (int64_t u = 0; u < units[i]; u++)
            check_true(owner[i][u] >= 0, "unit %d of item %d has an owner", (int)u, i);
}

static void check_workers(void) {
    struct dsv4_topology t;
    int32_t first, count;
    for (int uneven = 0; uneven < 2; uneven++) {
        put_server();
        t = machine(uneven ? "0-2" : "0-7"); /* cores on nodes: 2 and 1, or 2 and 2 */
        for (int n = 1; n <= 9; n++)
            for (int round = 0; round < 20; round++)
                check_cut(&t, n);
        check_true(dsv4_topology_node(&t, 1, t.n_core, &first, &count) == 0 && first == 0 && count == 2, "node 0");
        check_true(dsv4_topology_node(&t, 2, t.n_core, &first, &count) == 1 && first == 2 && count == t.n_core - 2,
                   "node 1");
        check_true(dsv4_topology_node(&t, 0, 1, &first, &count) == 0 && count == 1, "a single worker");
        dsv4_topology_free(&t);
    }
}

void check_topology(void) {
    struct dsv4_topology t;
    check_small();
    check_server();
    check_quota();
    check_workers();
    check_true(dsv4_topology_read(&t, "", NULL, 0, NULL) == DSV4_OK && t.n_cpu >= t.n_core && t.n_core >= t.n_node &&
                   t.n_node >= 1 && dsv4_topology_threads(&t) >= 1, "this machine");
    cpu_set_t before, bound;
    check_true(sched_getaffinity(0, sizeof before, &before) == 0, "affinity");
    dsv4_topology_bind(&t, t.n_node - 1);
    check_true(sched_getaffinity(0, sizeof bound, &bound) == 0 && CPU_ISSET((size_t)t.cpus[t.n_cpu - 1].id, &bound) &&
                   (t.n_node == 1) == CPU_EQUAL(&before, &bound), "bound to the last node");
    sched_setaffinity(0, sizeof before, &before);
    dsv4_topology_free(&t);
}
