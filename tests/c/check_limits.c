/* SPDX-License-Identifier: Apache-2.0 */
/* The loops that measurements divide by: every walk reads all its bytes and none beyond them, every
 * peak does as many operations as it says; a disabled set offers none. */
#include "check.h"

#include <string.h>

void check_limits(void);

enum { MAX_LIMITS = 64, STEP = 512, MOST_STREAMS = 4 };

static void check_walk(const struct dsv4_limit *limit, size_t bytes, size_t offset) {
    uint8_t *p = (uint8_t *)check_bytes(bytes + offset) + offset;
    uint64_t sum = 0, word;
    check_fill_bytes(p, bytes);
    for (size_t i = 0; i < bytes; i += sizeof word) {
        memcpy(&word, p + i, sizeof word);
        sum += word;
    }
    check_true(limit->read(p, bytes) == sum, "%s (%s): not all of %zu bytes were read", limit->name,
               limit->set, bytes);
}

static void check_peak(const struct dsv4_limit *limit) {
    const double one = limit->peak(1), many = limit->peak(1000);
    check_true(one > 0 && many == 1000 * one, "%s (%s): %g operations in a round, %g in 1000",
               limit->name, limit->set, one, many);
}

void check_limits(void) {
    const struct dsv4_limit *all[MAX_LIMITS], *some[MAX_LIMITS];
    int n = 0, n_some = 0, walks = 0;
    check_true(dsv4k_cpu_limits(all, &n, MAX_LIMITS, NULL) == NULL && n > 0, "no limits");
    for (int i = 0; i < n; i++) {
        const int reads = all[i]->kind == DSV4_LIMIT_READ;
        check_true(reads == (all[i]->read != NULL) && reads == (all[i]->peak == NULL),
                   "%s: not what its kind says", all[i]->name);
        for (size_t steps = 0; reads && steps < 4; steps++) {
            check_walk(all[i], steps * MOST_STREAMS * STEP, steps);
            check_reset();
        }
        if (!reads)
            check_peak(all[i]);
        walks += reads;
    }
    check_true(walks > 0, "no walk");
    const char *unknown = "nonsense";
    check_true(dsv4k_cpu_limits(some, &n_some, MAX_LIMITS, unknown) == unknown, "not refused");
    if (!dsv4k_cpu_set_names[0])
        return;
    check_true(!dsv4k_cpu_limits(some, &n_some, MAX_LIMITS, dsv4k_cpu_set_names[0]), "refused");
    for (int i = 0; i < n_some; i++)
        check_true(strcmp(some[i]->set, "ref") == 0, "%s needs %s", some[i]->name, some[i]->set);
}
