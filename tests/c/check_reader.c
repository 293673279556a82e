/* SPDX-License-Identifier: Apache-2.0 */
/* The reader of experts: every byte of every load, ends of files, short files, loads that nobody waits for. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "check.h"
#include "io/reader.h"

void check_reader(void);

enum { SIZE = 9 * 1024 * 1024 + 1234, ROOM = SIZE / DSV4_READ_ALIGN * DSV4_READ_ALIGN + DSV4_READ_ALIGN, LOADS = 12 };

/* An unlinked file in `folder`, which may not know direct reads. */
static int make_file(const char *folder, const uint8_t *bytes) {
    char path[64];
    snprintf(path, sizeof path, "%s/dsv4-check-XXXXXX", folder);
    int fd = mkstemp(path);
    if (fd < 0)
        return -1;
    unlink(path);
    check_true(write(fd, bytes, SIZE) == SIZE, "writing");
    return fd;
}

static uint8_t *room(size_t bytes) {
    uint8_t *p = aligned_alloc(DSV4_READ_ALIGN, bytes);
    check_true(p != NULL, "memory");
    memset(p, 0xee, bytes);
    return p;
}

static void wait_all(dsv4_reader *r, const struct dsv4_load *loads, int n) {
    for (int i = 0; i < n; i++)
        while (dsv4_reader_wait(r, &loads[i], 5))
            continue;
}

/* Many loads of several reads at random places, one of them to the end of the file. */
static void check_places(dsv4_reader *r, const uint8_t *bytes) {
    struct dsv4_load loads[LOADS] = {{.n = 0}};
    uint8_t *to[LOADS];
    uint64_t before = dsv4_reader_bytes(r), total = 0;
    for (int i = 0; i < LOADS; i++) {
        to[i] = room(2 * (size_t)ROOM);
        uint8_t *at = to[i];
        loads[i].n = 1 + (int32_t)check_below(DSV4_LOAD_READS);
        for (int32_t k = 0; k < loads[i].n; k++) {
            uint64_t pages = ROOM / DSV4_READ_ALIGN, from = i == 0 && k == 0 ? 0 : check_below((uint32_t)pages);
            uint64_t n = i == 0 && k == 0 ? pages : 1 + check_below((uint32_t)((pages - from + 7) / 8));
            loads[i].reads[k] =
                (struct dsv4_read){k % 2, from * DSV4_READ_ALIGN, n * DSV4_READ_ALIGN, at};
            at += n * DSV4_READ_ALIGN;
            total += n * DSV4_READ_ALIGN;
        }
        dsv4_reader_start(r, &loads[i]);
    }
    wait_all(r, loads, LOADS);
    check_true(dsv4_reader_bytes(r) - before == total, "bytes are counted");
    for (int i = 0; i < LOADS; i++) {
        check_true(!loads[i].failed, "load %d", i);
        for (int32_t k = 0; k < loads[i].n; k++) {
            const struct dsv4_read *read = &loads[i].reads[k];
            uint64_t n = read->offset + read->bytes > SIZE ? SIZE - read->offset : read->bytes;
            check_true(memcmp(read->to, bytes + read->offset, n) == 0, "load %d, read %d", i, k);
        }
        free(to[i]);
    }
}

static void check_folder(const char *folder, const uint8_t *bytes) {
    int a = make_file(folder, bytes), b = make_file(folder, bytes);
    dsv4_reader *r;
    if (a < 0 || b < 0)
        return; /* no such folder here */
    struct dsv4_shard_desc files[] = {{"a", a, SIZE}, {"b", b, SIZE}};
    check_true(dsv4_reader_create(&r, files, 2, NULL) == DSV4_OK, "reader");
    close(b); /* it has descriptors of its own */
    for (int round = 0; round < 3; round++)
        check_places(r, bytes);
    /* a file that shrank, then one that is whole */
    uint8_t *to = room(ROOM);
    struct dsv4_load load = {.reads = {{0, 0, ROOM, to}}, .n = 1}, whole = {.reads = {{1, 0, ROOM, to}}, .n = 1};
    check_true(ftruncate(a, SIZE - 1) == 0, "truncate");
    dsv4_reader_start(r, &load);
    wait_all(r, &load, 1);
    check_true(load.failed, "a file that shrank by a byte fails its load");
    dsv4_reader_start(r, &whole);
    wait_all(r, &whole, 1);
    check_true(!whole.failed && memcmp(to, bytes, SIZE) == 0, "the next load is good");
    /* destroyed with loads that nobody waits for */
    struct dsv4_load many[LOADS];
    for (int i = 0; i < LOADS; i++) {
        many[i] = (struct dsv4_load){.reads = {{1, 0, ROOM, to}}, .n = 1};
        dsv4_reader_start(r, &many[i]);
    }
    dsv4_reader_destroy(r);
    free(to);
    close(a);
}

void check_reader(void) {
    uint8_t *bytes = malloc(SIZE);
    dsv4_reader *none = NULL;
    dsv4_error err;
    check_true(bytes != NULL, "memory");
    check_fill_bytes(bytes, SIZE);
    check_folder("/tmp", bytes);
    check_folder("/dev/shm", bytes);
    struct dsv4_shard_desc closed = {"nothing", -1, SIZE};
    check_true(dsv4_reader_create(&none, &closed, 1, &err) == DSV4_E_IO && !none, "no file is refused");
    dsv4_reader_destroy(NULL);
    free(bytes);
}
