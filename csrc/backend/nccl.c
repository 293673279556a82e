/* SPDX-License-Identifier: Apache-2.0 */
#include "backend/nccl.h"

#include <dlfcn.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

/* enum ncclResult_t 0 and enum ncclDataType_t, as in every NCCL 2. */
enum { SUCCESS = 0, BYTE = 1 };
/*
 * 10000 major + 100 minor + patch, since 2.9.  From 2.14 on groups end communicators together; before, each of them was ended
 * at once, and one thread that does so for all of a machine may wait for itself.
 */
enum { OLDEST = 21400, NEWER = 30000 };

struct functions {
    int (*get_version)(int *version);
    const char *(*get_error_string)(int result);
    int (*comm_init_all)(void **comms, int n, const int *devices);
    int (*comm_destroy)(void *comm);
    int (*comm_abort)(void *comm);
    int (*comm_get_async_error)(void *comm, int *result);
    int (*group_start)(void);
    int (*group_end)(void);
    int (*send)(const void *from, size_t count, int type, int peer, void *comm, void *stream);
    int (*recv)(void *to, size_t count, int type, int peer, void *comm, void *stream);
};

struct dsv4_nccl {
    struct functions f;
    int n;
    void *comms[]; /* owned [n], each of a device */
};

/* What to do about a result.  Source: NCCL user guide, "ncclResult_t". */
static dsv4_status fail(const struct functions *f, int result, const char *doing, dsv4_error *err) {
    static const struct {
        dsv4_status status;
        const char *text;
    } remedies[] = {
        [1] = {DSV4_E_DEVICE, "see with NCCL_DEBUG=INFO which call failed, and load the model in a new process"},
        [2] = {DSV4_E_UNAVAILABLE, "see with NCCL_DEBUG=INFO which call failed; a container may need more shared memory "
                                   "(docker run --shm-size=1g)"},
        [3] = {DSV4_E_DEVICE, "load the model in a new process, or install another version of NCCL"},
        [4] = {DSV4_E_DEVICE, "this is a fault of dsv4; please report it"},
        [5] = {DSV4_E_DEVICE, "this is a fault of dsv4; please report it"},
        [6] = {DSV4_E_DEVICE, "load the model in a new process"},
        [7] = {DSV4_E_DEVICE, "take NCCL_COMM_BLOCKING out of the environment"},
    };
    static const int known = sizeof remedies / sizeof *remedies;
    int row = result > 0 && result < known ? result : 6;
    return dsv4_fail(err, remedies[row].status, "NCCL: %s: got error %d, %.150s; %s", doing, result,
                     f->get_error_string(result), remedies[row].text);
}

static dsv4_status check(const struct dsv4_nccl *c, int result, const char *doing, dsv4_error *err) {
    return result == SUCCESS ? DSV4_OK : fail(&c->f, result, doing, err);
}

/* ---------------------------------------------------------------------------------------------------------- the library */

static const struct {
    const char *name;
    size_t at;
} symbols[] = {
    {"ncclGetVersion", offsetof(struct functions, get_version)},
    {"ncclGetErrorString", offsetof(struct functions, get_error_string)},
    {"ncclCommInitAll", offsetof(struct functions, comm_init_all)},
    {"ncclCommDestroy", offsetof(struct functions, comm_destroy)},
    {"ncclCommAbort", offsetof(struct functions, comm_abort)},
    {"ncclCommGetAsyncError", offsetof(struct functions, comm_get_async_error)},
    {"ncclGroupStart", offsetof(struct functions, group_start)},
    {"ncclGroupEnd", offsetof(struct functions, group_end)},
    {"ncclSend", offsetof(struct functions, send)},
    {"ncclRecv", offsetof(struct functions, recv)},
};

static dsv4_status open_library(struct functions *f, const char *path, dsv4_error *err) {
    int version = 0;
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (!library)
        return dsv4_fail(err, DSV4_E_UNAVAILABLE, "NCCL: several GPUs need it, and it cannot be loaded: %.250s; install it "
                         "(the package nvidia-nccl-cu13, or your system's libnccl2), or use one GPU", dlerror());
    for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
        void *found = dlsym(library, symbols[i].name);
        if (!found)
            return dsv4_fail(err, DSV4_E_UNAVAILABLE, "NCCL: %.200s has no %s, so it is no NCCL that dsv4 can use; install "
                             "the package nvidia-nccl-cu13", path, symbols[i].name);
        memcpy((char *)f + symbols[i].at, &found, sizeof found); /* ISO C has no conversion to a function pointer */
    }
    int result = f->get_version(&version);
    if (result != SUCCESS)
        return fail(f, result, "its version", err);
    if (version < OLDEST || version >= NEWER)
        return dsv4_fail(err, DSV4_E_UNAVAILABLE, "NCCL: %.200s: got version code %d, wanted one from %d (2.14) to %d; install "
                         "the package nvidia-nccl-cu13", path, version, OLDEST, NEWER - 1);
    return DSV4_OK;
}

/* ------------------------------------------------------------------------------------------------------- communicators */

dsv4_status dsv4_nccl_create(struct dsv4_nccl **out, const char *path, const int32_t *devices, int32_t n, dsv4_error *err) {
    struct functions f = {0};
    _Static_assert(sizeof *devices == sizeof(int), "CUDA numbers devices by int");
    DSV4_TRY(open_library(&f, path, err));
    struct dsv4_nccl *c = calloc(1, sizeof *c + (size_t)n * sizeof *c->comms);
    if (!c)
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for %d communicators", n);
    c->f = f;
    c->n = n;
    dsv4_status status = check(c, f.comm_init_all(c->comms, n, devices), "connecting the devices", err);
    if (status != DSV4_OK) {
        free(c); /* NCCL has taken back what it began */
        return status;
    }
    *out = c;
    return DSV4_OK;
}

void dsv4_nccl_destroy(struct dsv4_nccl *c, int lost) {
    if (!c)
        return;
    /* as a group: each of them may wait for the others, which one thread ends in turn */
    c->f.group_start();
    for (int i = 0; i < c->n; i++)
        lost ? c->f.comm_abort(c->comms[i]) : c->f.comm_destroy(c->comms[i]);
    c->f.group_end();
    free(c);
}

dsv4_status dsv4_nccl_move(struct dsv4_nccl *c, int32_t to_rank, void *to, void *to_stream, int32_t from_rank,
                           const void *from, void *from_stream, uint64_t bytes, dsv4_error *err) {
    DSV4_TRY(check(c, c->f.group_start(), "beginning a copy", err));
    int sent = c->f.send(from, bytes, BYTE, to_rank, c->comms[from_rank], from_stream);
    int received = sent == SUCCESS ? c->f.recv(to, bytes, BYTE, from_rank, c->comms[to_rank], to_stream) : sent;
    int ended = c->f.group_end(); /* in any case, or the next group would be part of this one */
    DSV4_TRY(check(c, sent, "sending streams to the next device", err));
    DSV4_TRY(check(c, received, "receiving streams from the device before", err));
    return check(c, ended, "copying streams to the next device", err);
}

dsv4_status dsv4_nccl_check(struct dsv4_nccl *c, dsv4_error *err) {
    for (int i = 0; i < c->n; i++) {
        int result = SUCCESS;
        DSV4_TRY(check(c, c->f.comm_get_async_error(c->comms[i], &result), "the state of a copy", err));
        DSV4_TRY(check(c, result, "a copy to the next device", err));
    }
    return DSV4_OK;
}
