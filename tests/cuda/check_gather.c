/* SPDX-License-Identifier: Apache-2.0 */
/* Copies of any size and alignment into one block; what lies between them stays as it was. */
#include "check_cuda.h"

void check_gather(void);

enum { COPIES = 40, MOST = 700 };

static void one_round(void) {
    int32_t n = between(0, COPIES), *n_copy = check_aligned(sizeof *n_copy, sizeof *n_copy);
    struct dsv4_cuda_copy *copies = check_aligned(COPIES * sizeof *copies, sizeof *copies);
    static const uint32_t units[] = {1, 2, 4, 8, 16};
    uint32_t at = 0, unit = units[check_below(5)];
    *n_copy = n;
    for (int32_t i = 0; i < n; i++) {
        uint32_t bytes = check_below(MOST / unit) * unit;
        uint8_t *from = check_aligned(bytes + unit, unit);
        check_fill_bytes(from, bytes + unit);
        copies[i] = (struct dsv4_cuda_copy){from + unit * check_below(2), at, bytes};
        at += bytes + unit * check_below(3);
    }
    uint8_t *got = check_aligned(at + 1, 16), *want = check_aligned(at + 1, 16);
    check_fill_bytes(got, at + 1);
    memcpy(want, got, at + 1);
    for (int32_t i = 0; i < n; i++)
        memcpy(want + copies[i].to, copies[i].from, copies[i].bytes);
    RUN(gather, .out = got, .copies = copies, .n_copy = n_copy, .n_block = between(1, 2 * COPIES));
    same("gather", got, want, at + 1, 1);
}

void check_gather(void) {
    for (int i = 0; i < 60; i++) {
        one_round();
        check_reset();
    }
}
