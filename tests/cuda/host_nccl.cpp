// SPDX-License-Identifier: Apache-2.0
//
// The functions of NCCL that dsv4 uses, between the devices of host_devices.h.  What would not be right on hardware fails:
// a send without its receive in one group (it would wait for ever), one outside of any group, a stream or memory of
// another device than the communicator's, a communicator given back while others of its clique stay.  HOST_FAIL names a
// function and the error it gives; HOST_NCCL_VERSION is the version.
#include <stdlib.h>
#include <string.h>
#include <vector>

#include "host_devices.h"

namespace {

enum { INVALID_ARGUMENT = 4, INVALID_USAGE = 5 };

struct clique;
struct communicator {
    clique *all;
    int rank, device;
};
struct clique {
    std::vector<communicator *> members;
};
struct operation {
    bool send;
    char *at;
    size_t bytes;
    int peer;
    communicator *comm;
};

int depth, live;
bool lost;
std::vector<operation> pending;
std::vector<communicator *> ending;

int add(bool send, const void *at, size_t count, int type, int peer, void *handle, void *stream) {
    communicator *comm = (communicator *)handle;
    if (int code = dsv4_host_fails(send ? "ncclSend" : "ncclRecv"))
        return code;
    if (!depth || dsv4_host_device_of(stream) != comm->device)
        return INVALID_USAGE;
    if (type != 1 || peer < 0 || peer >= (int)comm->all->members.size() || peer == comm->rank ||
        !dsv4_host_inside(comm->device, at, count))
        return INVALID_ARGUMENT;
    dsv4_host_catch_up(stream);
    pending.push_back({send, (char *)at, count, peer, comm});
    return 0;
}

// Copies what was sent to where it is received, in the order of the calls.
int exchange() {
    dsv4_host_work_on(-1);
    for (auto send = pending.begin(); send != pending.end(); send = pending.begin()) {
        auto receive = send;
        for (++receive; receive != pending.end(); ++receive)
            if (receive->send != send->send && receive->comm->all == send->comm->all &&
                receive->comm->rank == send->peer && send->comm->rank == receive->peer)
                break;
        if (receive == pending.end() || receive->bytes != send->bytes)
            return INVALID_USAGE;
        if (send->send)
            memcpy(receive->at, send->at, send->bytes);
        else
            memcpy(send->at, receive->at, send->bytes);
        if (dsv4_host_fails("ncclFlip"))
            *(send->send ? receive : send)->at ^= 0x10;
        pending.erase(receive);
        pending.erase(send);
    }
    return 0;
}

int give_back(void *handle) {
    ending.push_back((communicator *)handle);
    return depth ? 0 : INVALID_USAGE;
}

int end_communicators() {
    if (ending.empty())
        return 0;
    clique *all = ending.front()->all;
    if (all->members.size() != ending.size())
        return INVALID_USAGE;
    for (communicator *comm : ending)
        delete comm;
    delete all;
    live -= (int)ending.size();
    lost = false;
    ending.clear();
    return 0;
}

} // namespace

int dsv4_host_communicators() {
    return live;
}

void dsv4_host_lost() {
    lost = live > 0;
}

bool dsv4_host_stuck() {
    return lost;
}

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED int ncclGetVersion(int *version) {
    const char *text = getenv("HOST_NCCL_VERSION");
    *version = text ? atoi(text) : 22703;
    return dsv4_host_fails("ncclGetVersion");
}

EXPORTED const char *ncclGetErrorString(int) {
    return "as the test of NCCL wants it";
}

EXPORTED int ncclCommInitAll(void **comms, int n, const int *numbers) {
    if (int code = dsv4_host_fails("ncclCommInitAll"))
        return code;
    for (int i = 0; i < n; i++)
        for (int j = 0; j <= i; j++)
            if (numbers[i] < 0 || numbers[i] >= dsv4_host_count() || (j < i && numbers[i] == numbers[j]))
                return INVALID_ARGUMENT;
    clique *all = new clique;
    for (int i = 0; i < n; i++) {
        comms[i] = new communicator{all, i, numbers[i]};
        all->members.push_back((communicator *)comms[i]);
        live++;
    }
    return 0;
}

EXPORTED int ncclCommDestroy(void *comm) {
    if (lost)
        abort(); // it would wait for the device that is lost
    return give_back(comm);
}

EXPORTED int ncclCommAbort(void *comm) {
    return give_back(comm);
}

EXPORTED int ncclCommGetAsyncError(void *, int *result) {
    *result = dsv4_host_fails("ncclAsyncError");
    return dsv4_host_fails("ncclCommGetAsyncError");
}

EXPORTED int ncclGroupStart() {
    if (int code = dsv4_host_fails("ncclGroupStart"))
        return code;
    depth++;
    return 0;
}

EXPORTED int ncclGroupEnd() {
    if (!depth)
        return INVALID_USAGE;
    if (--depth)
        return 0;
    int code = dsv4_host_fails("ncclGroupEnd");
    if (!code)
        code = exchange();
    pending.clear();
    int ended = end_communicators();
    return code ? code : ended;
}

EXPORTED int ncclSend(const void *from, size_t count, int type, int peer, void *comm, void *stream) {
    return add(true, from, count, type, peer, comm, stream);
}

EXPORTED int ncclRecv(void *to, size_t count, int type, int peer, void *comm, void *stream) {
    return add(false, to, count, type, peer, comm, stream);
}
