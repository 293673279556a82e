/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Stores of rows without a model: growth, sharing and copies on write against plain arrays, blocks in a file (damaged ones
 * too, and one whose rows lie beyond 4 GiB), and the checksum's two ways.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "check.h"
#include "core/crc32c.h"
#include "gen/rows.h"

void check_rows(void);

enum { ROW = 24, BLOCK = ROW * DSV4_ROWS_PER_BLOCK, MOST = 3 * DSV4_ROWS_PER_BLOCK * DSV4_BLOCKS_PER_PAGE };

static void check_checksums(void) {
    for (size_t n = 0; n < 300; n++) {
        uint8_t *data = check_bytes(n + 1);
        check_fill_bytes(data, n + 1);
        uint32_t seed = (uint32_t)check_random();
        check_true(dsv4_crc32c(seed, data + 1, n) == dsv4_crc32c_portable(seed, data + 1, n), "crc32c of %zu bytes", n);
        check_reset();
    }
    check_true(dsv4_crc32c(0, "123456789", 9) == 0xe3069283u, "crc32c of a known text");
}

static int temporary(void) {
    char name[] = "/tmp/dsv4-rows-XXXXXX";
    int fd = mkstemp(name);
    check_true(fd >= 0 && unlink(name) == 0, "a temporary file: %s", strerror(errno));
    return fd;
}

static void write_at(int fd, const void *data, size_t n, off_t at) {
    check_true(pwrite(fd, data, n, at) == (ssize_t)n, "writing to a temporary file: %s", strerror(errno));
}

static struct dsv4_mapping *map(int fd, int use_mmap) {
    struct dsv4_mapping *file;
    dsv4_error err;
    off_t size = lseek(fd, 0, SEEK_END);
    struct dsv4_shard_desc desc = {"a file", fd, (uint64_t)size};
    check_true(dsv4_mapping_create(&file, &desc, use_mmap, &err) == DSV4_OK, "mapping: %s", err.message);
    return file;
}

static void same_rows(const struct dsv4_row_store *s, const uint8_t *want, int32_t n) {
    check_true(dsv4_rows_damaged(s, 0, n) < 0, "rows of a sound file");
    for (int32_t i = 0; i < n; i++)
        check_true(!memcmp(dsv4_row(s, i), want + (size_t)i * ROW, ROW), "row %d of %d", i, n);
}

/* Stores that share each other's blocks and a file's, against arrays of their own. */
static void check_copies(int32_t n, int32_t shift, int use_mmap) {
    enum { STORES = 5 };
    static uint8_t want[STORES][MOST * ROW];
    uint32_t crcs[MOST / DSV4_ROWS_PER_BLOCK];
    struct dsv4_row_store stores[STORES] = {{.row_bytes = ROW, .shift = shift}};
    int32_t rows[STORES] = {n};
    int fd = temporary();
    check_fill_bytes(want[0], (size_t)n * ROW);
    write_at(fd, "x", 1, 127);
    write_at(fd, want[0], (size_t)n * ROW, 128);
    for (int32_t i = 0; i * BLOCK < n * ROW; i++)
        crcs[i] = dsv4_crc32c(0, want[0] + i * BLOCK, n * ROW - i * BLOCK < BLOCK ? (size_t)(n * ROW - i * BLOCK) : BLOCK);
    struct dsv4_mapping *file = map(fd, use_mmap);
    close(fd);
    check_true(dsv4_rows_map(&stores[0], file, 128, crcs, n) == DSV4_ROWS_OK, "mapping rows");
    dsv4_mapping_release(file);
    same_rows(&stores[0], want[0], n);
    for (int turn = 0; turn < 200; turn++) {
        uint32_t a = check_below(STORES), b = check_below(STORES);
        if (a != b && turn % 3 == 0) {
            dsv4_rows_release(&stores[a]);
            stores[a].row_bytes = ROW;
            stores[a].shift = shift;
            rows[a] = rows[b] ? (int32_t)check_below((uint32_t)rows[b] + 1) : 0;
            check_true(!dsv4_rows_share(&stores[a], &stores[b], rows[a]), "sharing");
            memcpy(want[a], want[b], (size_t)rows[a] * ROW);
            continue;
        }
        stores[a].row_bytes = ROW;
        stores[a].shift = shift;
        int32_t first = (int32_t)check_below((uint32_t)rows[a] + 1), end = first + (int32_t)check_below(150);
        end = end < MOST ? end : MOST;
        if (first >= end)
            continue;
        check_true(dsv4_rows_reserve(&stores[a], first, end) == DSV4_ROWS_OK, "reserving");
        check_fill_bytes(want[a] + (size_t)first * ROW, (size_t)(end - first) * ROW);
        for (int32_t i = first; i < end; i++)
            memcpy(dsv4_row(&stores[a], i), want[a] + (size_t)i * ROW, ROW);
        rows[a] = rows[a] > end ? rows[a] : end;
        same_rows(&stores[a], want[a], rows[a]);
    }
    for (int i = 0; i < STORES; i++) {
        same_rows(&stores[i], want[i], rows[i]);
        dsv4_rows_release(&stores[i]);
    }
}

static void check_damage(int32_t shift) {
    enum { N = 200 }; /* three blocks, and eight rows more */
    uint8_t *data = calloc(N, ROW);
    uint32_t crcs[4];
    check_fill_bytes(data, N * ROW);
    for (int i = 0; i < 4; i++)
        crcs[i] = dsv4_crc32c(0, data + i * BLOCK, i < 3 ? BLOCK : 8 * ROW);
    for (int bad = 0; bad < 4; bad++) {
        struct dsv4_row_store s = {.row_bytes = ROW, .shift = shift}, t = s;
        int fd = temporary();
        write_at(fd, data, N * ROW, 0);
        write_at(fd, &(uint8_t){(uint8_t)~data[bad * BLOCK + 7]}, 1, bad * BLOCK + 7);
        struct dsv4_mapping *file = map(fd, 1);
        close(fd);
        int got = dsv4_rows_map(&s, file, 0, crcs, N);
        dsv4_mapping_release(file);
        check_true(got == (bad == 3 ? DSV4_ROWS_DAMAGED : DSV4_ROWS_OK), "block %d: got %d", bad, got);
        if (bad < 3) {
            int32_t row = bad * DSV4_ROWS_PER_BLOCK;
            check_true(!dsv4_rows_share(&t, &s, N), "sharing");
            check_true(dsv4_rows_damaged(&t, 0, N) == row, "a damaged block is found");
            check_true(dsv4_rows_damaged(&s, row + 63, row + 64) == row, "in every copy, again and again");
            check_true(dsv4_rows_damaged(&s, (row + 64) % 192, (row + 64) % 192 + 64) < 0, "the next one is not");
            check_true(dsv4_rows_reserve(&t, row + 5, row + 6) == DSV4_ROWS_DAMAGED, "it is not copied");
            check_true(dsv4_rows_reserve(&t, row + 63, row + 64) == DSV4_ROWS_DAMAGED, "nor what lies in it elsewhere");
            dsv4_rows_release(&t);
            check_true(!dsv4_rows_share(&t, &s, row + 32), "sharing a part of it");
            check_true(dsv4_rows_reserve(&t, row + 32, row + 33) == DSV4_ROWS_DAMAGED, "nor written beside");
            check_true(!strcmp(dsv4_rows_file(&s, row), "a file") && !dsv4_rows_file(&s, 192), "the file is named");
        }
        dsv4_rows_release(&s);
        dsv4_rows_release(&t);
    }
    free(data);
}

/* A sparse file: rows of 64 KiB, 5 GiB of them, the last ones not zero. */
static void check_large(void) {
    enum { WIDE = 1 << 16, BLOCKS = 1280 };
    uint64_t block = (uint64_t)WIDE * DSV4_ROWS_PER_BLOCK, at = 4096;
    uint8_t *rows = calloc(1, block);
    uint32_t *crcs = calloc(BLOCKS, sizeof *crcs);
    check_true(rows && crcs, "memory");
    for (int i = 0; i < BLOCKS - 1; i++)
        crcs[i] = i ? crcs[0] : dsv4_crc32c(0, rows, block);
    check_fill_bytes(rows, block);
    crcs[BLOCKS - 1] = dsv4_crc32c(0, rows, block);
    int fd = temporary();
    write_at(fd, rows, block, (off_t)(at + (BLOCKS - 1) * block));
    struct dsv4_mapping *file = map(fd, 1);
    close(fd);
    struct dsv4_row_store s = {.row_bytes = WIDE, .shift = DSV4_BLOCK_SHIFT};
    int32_t n = BLOCKS * DSV4_ROWS_PER_BLOCK;
    check_true(dsv4_rows_map(&s, file, at, crcs, n) == DSV4_ROWS_OK, "mapping 5 GiB");
    dsv4_mapping_release(file);
    check_true(dsv4_rows_damaged(&s, 0, 64) < 0 && dsv4_rows_damaged(&s, n - 64, n) < 0, "rows beyond 4 GiB");
    check_true(!memcmp(dsv4_row(&s, n - 64), rows, block), "their bytes");
    check_true(dsv4_rows_bytes(&s) == BLOCKS * block, "their number");
    dsv4_rows_release(&s);
    free(rows);
    free(crcs);
}

void check_rows(void) {
    check_checksums();
    for (int use_mmap = 0; use_mmap < 2; use_mmap++) {
        static const int32_t sizes[] = {0, 1, 63, 64, 65, 640, 4096, 4097, 9000};
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
            for (int32_t shift = 0; shift <= DSV4_BLOCK_SHIFT; shift += 2)
                check_copies(sizes[i], shift, use_mmap);
    }
    for (int32_t shift = 0; shift <= DSV4_BLOCK_SHIFT; shift++)
        check_damage(shift);
    if (sizeof(size_t) == 8)
        check_large();
}
