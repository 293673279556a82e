// SPDX-License-Identifier: Apache-2.0
// The memory and streams of host_devices.h: a range of addresses for each device, of which blocks are taken first fit.
#include "host_devices.h"

#include <map>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

namespace {

enum { MAX_DEVICES = 8, ALIGN = 256 };
const uint64_t RANGE = (uint64_t)4 << 30;

struct device {
    char *range;
    std::map<char *, uint64_t> blocks;
};

device devices[MAX_DEVICES];
std::map<const void *, int> streams;
thread_local void *current; // context
int at_work = -1;

void allow(int d, bool yes) {
    if (devices[d].range && mprotect(devices[d].range, RANGE, yes ? PROT_READ | PROT_WRITE : PROT_NONE)) {
        perror("mprotect");
        abort();
    }
}

} // namespace

int dsv4_host_count() {
    const char *text = getenv("HOST_DEVICES");
    int n = text ? atoi(text) : 1;
    return n < MAX_DEVICES ? n : MAX_DEVICES;
}

void *dsv4_host_context() {
    return current;
}

void dsv4_host_set_context(void *context) {
    current = context;
}

int dsv4_host_current() {
    for (int i = 0; i < MAX_DEVICES; i++)
        if (!current || current == &devices[i])
            return i;
    return -1;
}

void dsv4_host_set_current(int d) {
    current = &devices[d];
}

uint64_t dsv4_host_total(int d) {
    const char *text = getenv("HOST_BYTES");
    for (; text && d && strchr(text, ','); d--)
        text = strchr(text, ',') + 1;
    return text ? strtoull(text, nullptr, 10) : (uint64_t)1 << 30;
}

uint64_t dsv4_host_used(int d) {
    uint64_t sum = 0;
    for (auto &block : devices[d].blocks)
        sum += block.second;
    return sum;
}

void *dsv4_host_take(int d, uint64_t bytes) {
    if (!bytes || dsv4_host_used(d) + bytes > dsv4_host_total(d))
        return nullptr;
    dsv4_host_work_on(d);
    if (!devices[d].range) {
        void *range = mmap(nullptr, RANGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (range == MAP_FAILED)
            return nullptr;
        devices[d].range = (char *)range;
    }
    char *at = devices[d].range;
    for (auto &block : devices[d].blocks) {
        if (at + bytes <= block.first)
            break;
        at = block.first + (block.second + ALIGN - 1) / ALIGN * ALIGN;
    }
    if (at + bytes > devices[d].range + RANGE)
        return nullptr;
    devices[d].blocks[at] = bytes;
    memset(at, 0xff, bytes);
    return at;
}

bool dsv4_host_give(void *p) {
    for (device &d : devices) {
        auto block = d.blocks.find((char *)p);
        if (block == d.blocks.end())
            continue;
        uintptr_t page = 4096, first = ((uintptr_t)p + page - 1) / page * page, end = (uintptr_t)p + block->second;
        if (end / page * page > first)
            madvise((void *)first, end / page * page - first, MADV_DONTNEED);
        d.blocks.erase(block);
        return true;
    }
    return false;
}

bool dsv4_host_inside(int d, const void *p, uint64_t bytes) {
    auto next = devices[d].blocks.upper_bound((char *)p);
    if (next == devices[d].blocks.begin())
        return false;
    --next;
    return (const char *)p + bytes <= next->first + next->second;
}

void dsv4_host_stream_on(void *stream, int d) {
    if (d < 0)
        streams.erase(stream);
    else
        streams[stream] = d;
}

int dsv4_host_device_of(const void *stream) {
    if (!stream) // the stream of whatever device is current
        return dsv4_host_current();
    auto found = streams.find(stream);
    return found == streams.end() ? -1 : found->second;
}

void dsv4_host_work_on(int d) {
    if (d == at_work)
        return;
    for (int i = 0; i < MAX_DEVICES; i++)
        allow(i, d < 0 || i == d);
    at_work = d;
}
