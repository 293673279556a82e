/* SPDX-License-Identifier: Apache-2.0 */
/* The choice of variants: complete without any set, nothing of a disabled set or of one that builds
 * on it, same twice. */
#include "check.h"

#include <stdio.h>
#include <string.h>

void check_dispatch(void);

static int uses(const struct dsv4_variant *v, const char *set) {
    size_t n = strcspn(v->name, "/");
    return strlen(set) == n && memcmp(v->name, set, n) == 0;
}

static void check_mask(const char *disable, const char *const *gone, int n_gone) {
    struct dsv4_kernels table;
    const struct dsv4_variant *chosen[DSV4_OP_COUNT], *again[DSV4_OP_COUNT];
    check_true(dsv4k_cpu_init(&table, chosen, disable) == NULL, "'%s' was refused", disable);
    check_true(dsv4k_cpu_init(&table, again, disable) == NULL, "'%s' was refused", disable);
    check_true(memcmp(chosen, again, sizeof chosen) == 0, "'%s' chose differently the second time",
               disable);
    for (int op = 0; op < DSV4_OP_COUNT; op++)
        for (int i = 0; i < n_gone; i++)
            check_true(!uses(chosen[op], gone[i]), "'%s' chose %s for %s", disable,
                       chosen[op]->name, dsv4k_op_name((enum dsv4_op)op));
}

static void check_unknown(const char *disable, size_t position) {
    struct dsv4_kernels table = {0};
    const struct dsv4_variant *chosen[DSV4_OP_COUNT] = {0};
    const char *unknown = dsv4k_cpu_init(&table, chosen, disable);
    check_true(unknown == disable + position, "'%s' was not refused at %zu", disable, position);
    check_true(!chosen[0], "a refused list changed the output");
}

void check_dispatch(void) {
    static const char *const all[] = {"avx2", "avx512", "avx512vnni", "avx512bf16"};
    check_mask(NULL, NULL, 0);
    check_mask("", NULL, 0);
    check_mask("avx2", all, 4);
    check_mask("avx512", all + 1, 3);
    check_mask("avx512vnni", all + 2, 1);
    check_mask("avx512bf16", all + 3, 1);
    check_mask("avx512vnni,avx512bf16", all + 2, 2);
    check_unknown("sse9", 0);
    check_unknown("avx2,avx", 5);
    check_unknown("avx512 ", 0);
    for (int op = 0; op < DSV4_OP_COUNT; op++) {
        const struct dsv4_variant *v[CHECK_MAX_VARIANTS];
        int n = check_variants((enum dsv4_op)op, v);
        for (int i = 0; i < n; i++) {
            char set[32] = {0};
            snprintf(set, sizeof set, "%.*s", (int)strcspn(v[i]->name, "/"), v[i]->name);
            check_true(i == 0 || dsv4k_cpu_has(set), "%s offered, but the CPU has no %s",
                       v[i]->name, set);
            check_true(v[i]->op == op, "%s is listed under %s", v[i]->name,
                       dsv4k_op_name((enum dsv4_op)op));
        }
    }
}
