/* SPDX-License-Identifier: Apache-2.0 */
/* What a processor without a folder of its own can be measured against: reading memory. */
#define READ_WIDTH 16
#include "cpu/limits_read.h"

extern const struct dsv4_limit dsv4k_ref_limits[];
const struct dsv4_limit dsv4k_ref_limits[] = {
    READ_WALKS("ref"),
    {NULL, NULL, 0, NULL, NULL},
};
