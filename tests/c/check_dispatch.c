/* SPDX-License-Identifier: Apache-2.0 */
/* The choice of variants: complete without any set, nothing of a disabled set or of one that builds
 * on it, the same twice; the self-test tells orders of sums apart. */
#include "check.h"

#include "cpu/trial.h"

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

/* A dot product that takes even elements first: what the self-test must refuse. */
static void even_first(const struct dsv4_linear_args *a) {
    const dsv4_bf16 *w = a->w->data;
    for (int32_t t = 0; t < a->n_tok; t++)
        for (int32_t r = 0; r < a->w->rows; r++) {
            float lane[16] = {0};
            for (int32_t k = 0; k < a->w->cols; k++)
                lane[k % 32 / 2] += dsv4_bf16_to_f32(a->x[t * a->ld_x + k]) *
                                    dsv4_bf16_to_f32(w[r * a->w->cols + k]);
            for (int half = 8; half > 0; half /= 2)
                for (int i = 0; i < half; i++)
                    lane[i] += lane[i + half];
            ((float *)a->out)[t * a->ld_out + r] = lane[0];
        }
}

static void check_self_test(void) {
    const struct dsv4_variant wrong = DSV4_VARIANT(linear_many_bf16, even_first, "wrong", 0);
    const struct dsv4_variant *v[CHECK_MAX_VARIANTS];
    check_variants(DSV4_OP_linear_many_bf16, v);
    struct dsv4_trial *trial = dsv4k_trial_create();
    check_true(trial != NULL, "no memory for the experiments");
    check_true(dsv4k_trial_equal(trial, v[0], v[0]), "the self-test refuses ref");
    check_true(!dsv4k_trial_equal(trial, &wrong, v[0]), "the self-test accepts another order");
    dsv4k_trial_destroy(trial);
}

void check_dispatch(void) {
    static const char *const all[] = {"avx2", "avx512", "avx512vnni", "avx512bf16"};
    check_mask(NULL, NULL, 0);
    check_mask("", NULL, 0);
    check_mask("avx2", all, 4);
    check_mask("avx512", all + 1, 3);
    check_mask("avx512vnni", all + 2, 2);
    check_mask("avx512bf16", all + 3, 1);
    check_mask("avx512vnni,avx512bf16", all + 2, 2);
    check_unknown("sse9", 0);
    check_unknown("avx2,avx", 5);
    check_unknown("avx512 ", 0);
    check_self_test();
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
