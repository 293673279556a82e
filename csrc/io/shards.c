/* SPDX-License-Identifier: Apache-2.0 */
#include "io/shards.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static dsv4_status read_whole(uint8_t *to, const struct dsv4_shard_desc *desc, dsv4_error *err) {
    for (uint64_t done = 0; done < desc->size;) {
        uint64_t rest = desc->size - done, piece = rest < (1u << 30) ? rest : 1u << 30;
        ssize_t got = pread(desc->fd, to + done, (size_t)piece, (off_t)done);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return dsv4_fail(err, DSV4_E_IO, "%s: reading at byte %" PRIu64 " failed: %s", desc->path, done,
                             strerror(errno));
        if (got == 0)
            return dsv4_fail(err, DSV4_E_FORMAT, "%s: the file ends at byte %" PRIu64 ", wanted %" PRIu64
                             " (it shrank while it was read)", desc->path, done, desc->size);
        done += (uint64_t)got;
    }
    return DSV4_OK;
}

static dsv4_status open_one(struct dsv4_shard *out, const struct dsv4_shard_desc *desc, int use_mmap,
                            dsv4_error *err) {
    struct stat st;
    if (fstat(desc->fd, &st) != 0)
        return dsv4_fail(err, DSV4_E_IO, "%s: cannot stat: %s", desc->path, strerror(errno));
    if (!S_ISREG(st.st_mode) || (uint64_t)st.st_size != desc->size)
        return dsv4_fail(err, DSV4_E_FORMAT, "%s: got a file of %lld bytes, wanted %" PRIu64
                         " (it changed after its header was checked)", desc->path, (long long)st.st_size, desc->size);
    void *data;
    if (use_mmap) {
        data = mmap(NULL, (size_t)desc->size, PROT_READ, MAP_PRIVATE, desc->fd, 0);
        if (data == MAP_FAILED)
            return dsv4_fail(err, DSV4_E_MEMORY, "%s: cannot map %" PRIu64 " bytes: %s", desc->path, desc->size,
                             strerror(errno));
        /* large pages where the file's cache has them: fewer page walks; a hint, so its failure is none */
        (void)madvise(data, (size_t)desc->size, MADV_HUGEPAGE);
    } else {
        data = malloc((size_t)desc->size);
        if (!data)
            return dsv4_fail(err, DSV4_E_MEMORY, "%s: no memory for %" PRIu64 " bytes", desc->path, desc->size);
        dsv4_status status = read_whole(data, desc, err);
        if (status != DSV4_OK) {
            free(data);
            return status;
        }
    }
    *out = (struct dsv4_shard){data, desc->size};
    return DSV4_OK;
}

dsv4_status dsv4_shards_open(struct dsv4_shard *out, const struct dsv4_shard_desc *desc, int32_t n, int use_mmap,
                             dsv4_error *err) {
    for (int32_t i = 0; i < n; i++) {
        dsv4_status status = open_one(&out[i], &desc[i], use_mmap, err);
        if (status != DSV4_OK) {
            dsv4_shards_close(out, i, use_mmap);
            return status;
        }
    }
    return DSV4_OK;
}

void dsv4_shards_close(struct dsv4_shard *shards, int32_t n, int use_mmap) {
    for (int32_t i = 0; i < n; i++) {
        if (use_mmap)
            munmap((void *)(uintptr_t)shards[i].data, (size_t)shards[i].size);
        else
            free((void *)(uintptr_t)shards[i].data);
        shards[i] = (struct dsv4_shard){0};
    }
}
