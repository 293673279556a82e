/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Walks that read memory, a template over the width of a load.  A walk reads `streams` contiguous
 * parts of its bytes in turn and prefetches `ahead` bytes before each; the four of READ_WALKS are
 * those that were best somewhere.  Before including: READ_WIDTH, the bytes of one load.
 */
#ifndef DSV4_LIMITS_READ_H
#define DSV4_LIMITS_READ_H

#include "machine_limits.h"

typedef uint64_t read_words __attribute__((vector_size(READ_WIDTH), aligned(1), may_alias));

/* Bytes of a stream before the next has its turn; sums that do not wait for each other. */
enum { READ_STEP = 512, READ_LINE = 64, READ_SUMS = 8 };

static inline __attribute__((always_inline)) uint64_t read_walk(const void *p, size_t bytes,
                                                                const int streams,
                                                                const int ahead) {
    const size_t each = bytes / (size_t)streams / READ_STEP * READ_STEP;
    read_words sums[READ_SUMS] = {{0}};
    for (size_t at = 0; at < each; at += READ_STEP) {
        for (int s = 0; s < streams; s++) {
            const char *from = (const char *)p + (size_t)s * each + at;
            for (int line = 0; ahead && line < READ_STEP; line += READ_LINE)
                __builtin_prefetch(from + ahead + line);
            for (int i = 0; i < READ_STEP / READ_WIDTH; i++)
                sums[i % READ_SUMS] += *(const read_words *)(const void *)(from + i * READ_WIDTH);
        }
    }
    uint64_t sum = 0;
    for (int i = 0; i < READ_SUMS; i++)
        for (int j = 0; j < READ_WIDTH / 8; j++)
            sum += sums[i][j];
    return sum;
}

static uint64_t read_1_stream(const void *p, size_t bytes) {
    return read_walk(p, bytes, 1, 0);
}

static uint64_t read_1_stream_ahead(const void *p, size_t bytes) {
    return read_walk(p, bytes, 1, 8192);
}

static uint64_t read_2_streams_ahead(const void *p, size_t bytes) {
    return read_walk(p, bytes, 2, 4096);
}

static uint64_t read_4_streams_ahead(const void *p, size_t bytes) {
    return read_walk(p, bytes, 4, 2048);
}

/* The elements of a list of struct dsv4_limit. */
#define READ_WALKS(set)                                                                            \
    {"one stream", set, DSV4_LIMIT_READ, read_1_stream, NULL},                                     \
        {"one stream, prefetched", set, DSV4_LIMIT_READ, read_1_stream_ahead, NULL},               \
        {"two streams, prefetched", set, DSV4_LIMIT_READ, read_2_streams_ahead, NULL}, {           \
        "four streams, prefetched", set, DSV4_LIMIT_READ, read_4_streams_ahead, NULL               \
    }

#endif
