/* SPDX-License-Identifier: Apache-2.0 */
/* The buffers of check.h, each at the end of pages of its own. */
#include "check.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { MAX_BUFFERS = 128, GAP_BYTE = 0xa5 };

static struct buffer {
    unsigned char *map, *data;
    size_t map_bytes, bytes, gap;
} buffers[MAX_BUFFERS];
static int n_buffers;

void *check_aligned(size_t bytes, size_t align) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), gap = (align - bytes % align) % align;
    size_t map_bytes = (bytes + gap + page - 1) / page * page + page;
    check_true(n_buffers < MAX_BUFFERS, "more than %d buffers in one case", MAX_BUFFERS);
    unsigned char *map =
        mmap(NULL, map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check_true(map != MAP_FAILED, "no memory for %zu bytes", map_bytes);
    check_true(mprotect(map + map_bytes - page, page, PROT_NONE) == 0, "mprotect failed");
    unsigned char *data = map + map_bytes - page - gap - bytes;
    memset(data + bytes, GAP_BYTE, gap);
    buffers[n_buffers++] = (struct buffer){map, data, map_bytes, bytes, gap};
    return data;
}

void *check_bytes(size_t bytes) {
    return check_aligned(bytes, 1);
}

void check_reset(void) {
    for (int i = 0; i < n_buffers; i++) {
        for (size_t j = 0; j < buffers[i].gap; j++)
            check_true(buffers[i].data[buffers[i].bytes + j] == GAP_BYTE,
                       "byte %zu behind a buffer of %zu was written", j, buffers[i].bytes);
        munmap(buffers[i].map, buffers[i].map_bytes);
    }
    n_buffers = 0;
}
