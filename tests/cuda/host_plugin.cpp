// SPDX-License-Identifier: Apache-2.0
//
// The plugin with its real kernels, executed on the CPU (host.h), over devices in host memory (host_devices.h): so that the
// engine's pass on the device runs whole where there is none.  New memory holds NaN; what is downloaded arrives at
// synchronize, not before, and what is uploaded from memory that stays in place when somebody has waited for it;
// HOST_FAIL="allocate:3:2" lets the third allocate fail with error 2, "flip:5:1" the fifth upload arrive with another bit,
// "skip_send:2:1" the second send never run.
//
// Streams and graphs as on hardware: while a stream captures, its launches are noted and not executed, and what the
// runtime forbids then (memory, waiting, copies, launches elsewhere) fails and spoils the capture.
//
// Threads may call at the same time: one call happens after the other.
#include <map>
#include <mutex>
#include <set>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <thread>
#include <vector>

#include "cuda/plugin.h"
#include "host.h"
#include "host_devices.h"

namespace {

enum { INVALID_CONTEXT = 201 };

struct arrival {
    void *stream, *to;
    std::vector<char> bytes;
};

// A copy that its stream has not come to.
struct copy {
    void *to;
    const void *from;
    uint64_t bytes;
};

struct event {
    void *stream; // recorded there, or none
    int asked;    // since then
};

std::map<void *, uint64_t> in_place;
std::map<void *, std::vector<copy>> copies; // of each stream
std::vector<arrival> arrivals;
std::map<void *, int> waits; // of each stream, for copies that another one had not come to
std::set<void *> fresh; // streams that nobody has asked since they were given something
std::map<std::string, int> calls, totals;
int streams, events, graphs;
uint64_t downloaded;
dsv4_host_stream *capturing;
std::thread::id capturer;
std::recursive_mutex one_call;
bool spoilt;

// The error this call is to give; a count per name since HOST_FAIL was last changed.
int fails(const char *name) {
    static char *seen;
    const char *text = getenv("HOST_FAIL");
    char wanted[32];
    int nth, code;
    totals[name]++;
    if (!text)
        text = "";
    if (!seen || strcmp(seen, text)) {
        free(seen);
        seen = strdup(text);
        calls.clear();
    }
    if (sscanf(text, "%31[^:]:%d:%d", wanted, &nth, &code) != 3 || strcmp(wanted, name))
        return 0;
    return ++calls[name] == nth ? code : 0;
}

// What a capture does not survive, from the thread that captures.
int forbidden() {
    if (!capturing || std::this_thread::get_id() != capturer)
        return 0;
    spoilt = true;
    return 900;
}

// The same of a call that shows that a device is lost: others wait for it from now on.
int faults(const char *name) {
    int code = fails(name);
    if (code)
        dsv4_host_lost();
    return code;
}

uint64_t used() {
    uint64_t sum = 0;
    for (int i = 0; i < dsv4_host_count(); i++)
        sum += dsv4_host_used(i);
    return sum;
}

// Whether [p, p + bytes) stays in place.
bool stays(const void *p, uint64_t bytes) {
    auto next = in_place.upper_bound((void *)p);
    if (next == in_place.begin())
        return false;
    --next;
    return (const char *)p + bytes <= (const char *)next->first + next->second;
}

// What this stream was to copy is copied now, and its device is at work.
void catch_up(void *stream) {
    dsv4_host_work_on(dsv4_host_device_of(stream));
    fresh.insert(stream);
    for (auto &c : copies[stream])
        memcpy(c.to, c.from, c.bytes);
    copies.erase(stream);
}

// Waiting for a device while a copy of it waits for one that is lost never ends.
void never_stuck(const char *what) {
    if (dsv4_host_stuck()) {
        fprintf(stderr, "%s waits for a device that waits for one that is lost\n", what);
        exit(1);
    }
}

int device_count(int32_t *n) {
    *n = dsv4_host_count();
    return fails("device_count");
}

int properties(struct dsv4_cuda_properties *out, int32_t device) {
    *out = {};
    if (device < 0 || device >= dsv4_host_count())
        return 101;
    strcpy(out->name, "kernels executed on the host");
    out->major = 9;
    out->multiprocessors = 1;
    out->total_bytes = dsv4_host_total(device);
    return fails("properties");
}

int prepare(int32_t device) {
    if (device < 0 || device >= dsv4_host_count())
        return 101;
    dsv4_host_set_current(device);
    return fails("prepare");
}

int context(void **out) {
    *out = dsv4_host_context();
    return fails("context");
}

int set_context(void *wanted) {
    dsv4_host_set_context(wanted);
    return 0;
}

int free_bytes(uint64_t *out) {
    int device = dsv4_host_current();
    if (device < 0)
        return INVALID_CONTEXT;
    *out = dsv4_host_total(device) - dsv4_host_used(device);
    return fails("free_bytes");
}

int allocate(void **out, uint64_t bytes) {
    *out = nullptr;
    if (int code = forbidden())
        return code;
    if (dsv4_host_current() < 0)
        return INVALID_CONTEXT;
    if (int code = fails("allocate"))
        return code;
    *out = dsv4_host_take(dsv4_host_current(), bytes);
    return *out ? 0 : 2;
}

int release(void *p) {
    if (int code = p ? forbidden() : 0)
        return code;
    never_stuck("release");
    return p && !dsv4_host_give(p);
}

int stream_create(void **out) {
    *out = nullptr;
    if (dsv4_host_current() < 0)
        return INVALID_CONTEXT;
    if (int code = fails("stream_create"))
        return code;
    *out = new dsv4_host_stream{};
    dsv4_host_stream_on(*out, dsv4_host_current());
    streams++;
    return 0;
}

int stream_destroy(void *stream) {
    if (capturing == stream)
        return forbidden();
    catch_up(stream);
    fresh.erase(stream);
    dsv4_host_stream_on(stream, -1);
    delete (dsv4_host_stream *)stream;
    streams--;
    return 0;
}

// What this stream has brought.
void arrive(void *stream) {
    size_t left = 0;
    for (auto &a : arrivals)
        if (a.stream == stream)
            memcpy(a.to, a.bytes.data(), a.bytes.size());
        else
            std::swap(arrivals[left++], a);
    arrivals.resize(left);
}

int synchronize(void *stream) {
    if (int code = forbidden())
        return code;
    never_stuck("synchronize");
    catch_up(stream);
    arrive(stream);
    return faults("synchronize");
}

int upload(void *to, const void *from, uint64_t bytes, void *stream) {
    if (int code = forbidden())
        return code;
    if (bytes && !dsv4_host_inside(dsv4_host_device_of(stream), to, bytes))
        return 1;
    if (stays(from, bytes)) {
        copies[stream].push_back({to, from, bytes});
        return faults("upload");
    }
    catch_up(stream);
    memcpy(to, from, bytes);
    if (fails("flip"))
        *(char *)to ^= 0x10;
    return faults("upload");
}

int download(void *to, const void *from, uint64_t bytes, void *stream) {
    if (int code = forbidden())
        return code;
    if (bytes && !dsv4_host_inside(dsv4_host_device_of(stream), from, bytes))
        return 1;
    catch_up(stream);
    downloaded += bytes;
    arrivals.push_back({stream, to, std::vector<char>((const char *)from, (const char *)from + bytes)});
    return faults("download");
}

int copy_here(void *to, const void *from, uint64_t bytes, void *stream) {
    if (int code = forbidden())
        return code;
    if (bytes && (!dsv4_host_inside(dsv4_host_device_of(stream), to, bytes) ||
                  !dsv4_host_inside(dsv4_host_device_of(stream), from, bytes)))
        return 1;
    copies[stream].push_back({to, from, bytes});
    return fails("copy");
}

// Kernels use it where the host does; outside of every device, so that copies to and from it as memory of the device fail.
int host_allocate(void **out, void **device, uint64_t bytes) {
    if (int code = forbidden())
        return code;
    *out = *device = nullptr;
    if (int code = fails("host_allocate"))
        return code;
    *out = *device = aligned_alloc(256, (bytes + 255) / 256 * 256);
    memset(*out, 0xff, bytes);
    in_place[*out] = bytes;
    return 0;
}

int host_release(void *p) {
    if (int code = forbidden())
        return code;
    if (p && !in_place.erase(p))
        return 1;
    free(p);
    return 0;
}

// With several devices, who asks for the first time after something was enqueued comes too early.
int stream_done(void *stream, int32_t *done) {
    if (int code = forbidden())
        return code;
    *done = dsv4_host_count() == 1 || !fresh.erase(stream);
    dsv4_host_work_on(dsv4_host_device_of(stream));
    if (*done) {
        catch_up(stream);
        fresh.erase(stream);
        arrive(stream);
    }
    return faults("stream_done");
}

int event_create(void **out) {
    *out = nullptr;
    if (int code = fails("event_create"))
        return code;
    *out = new event{};
    events++;
    return 0;
}

int event_destroy(void *e) {
    events -= e != nullptr;
    delete (event *)e;
    return 0;
}

int event_record(void *e, void *stream) {
    if (int code = forbidden())
        return code;
    *(event *)e = {stream, 0};
    return fails("event_record");
}

int event_wait(void *e, void *stream) {
    if (int code = forbidden())
        return code;
    waits[stream] += (int)copies.count(((event *)e)->stream);
    catch_up(((event *)e)->stream);
    return fails("event_wait");
}

// The first who asks comes too early.
int event_done(void *e, int32_t *done) {
    if (int code = forbidden())
        return code;
    *done = !copies.count(((event *)e)->stream) || ((event *)e)->asked++;
    if (*done)
        catch_up(((event *)e)->stream);
    return fails("event_done");
}

int capture_begin(void *stream) {
    if (int code = fails("capture_begin"))
        return code;
    if (int code = forbidden())
        return code;
    capturing = (dsv4_host_stream *)stream;
    capturing->capturing = true;
    capturer = std::this_thread::get_id();
    capturing->nodes.clear();
    spoilt = false;
    return 0;
}

int capture_end(void *stream, void **out) {
    if (out)
        *out = nullptr;
    if (!capturing || capturing != stream)
        return 1;
    capturing->capturing = false;
    capturing = nullptr;
    int code = fails("capture_end");
    if (code || spoilt || !out)
        return code ? code : spoilt ? 901 : 0;
    *out = new std::vector<dsv4_host_node>(((dsv4_host_stream *)stream)->nodes);
    graphs++;
    return 0;
}

int graph_launch(void *graph, void *stream) {
    if (int code = forbidden())
        return code;
    if (dsv4_host_device_of(stream) != dsv4_host_current())
        return 400;
    if (int code = faults("graph_launch"))
        return code;
    catch_up(stream);
    for (auto &node : *(std::vector<dsv4_host_node> *)graph)
        if (int code = dsv4_host_launch(stream, node))
            return code;
    return 0;
}

int graph_destroy(void *graph) {
    if (!graph)
        return 0;
    delete (std::vector<dsv4_host_node> *)graph;
    graphs--;
    return 0;
}

const char *error_name(int) {
    return "cudaErrorOfTheTest";
}

const char *error_text(int) {
    return "as the test wants it";
}

template <auto f> struct locked;
template <class... A, int (*f)(A...)> struct locked<f> {
    static int call(A... a) {
        std::lock_guard<std::recursive_mutex> guard(one_call);
        return f(a...);
    }
};

#define X(op)                                                                                                          \
    int op(const struct dsv4_cuda_##op##_args *a, void *stream) {                                                      \
        std::lock_guard<std::recursive_mutex> guard(one_call);                                                         \
        if (dsv4_host_device_of(stream) != dsv4_host_current())                                                        \
            return 400;                                                                                                \
        if (!capturing)                                                                                                \
            catch_up(stream);                                                                                          \
        int code = capturing && capturing != stream ? forbidden() : faults(#op);                                       \
        return code || fails("skip_" #op) ? code : dsv4_cuda_##op(a, stream);                                          \
    }
DSV4_CUDA_LAUNCHES(X)
#undef X

} // namespace

void dsv4_host_catch_up(void *stream) {
    catch_up(stream);
}

int dsv4_host_fails(const char *name) {
    return fails(name);
}

#define EXPORTED __attribute__((visibility("default")))

extern "C" {

// Bytes, streams, events, graphs and communicators that are not given back.
EXPORTED uint64_t host_live(void) {
    uint64_t sum = used() + (uint64_t)streams + (uint64_t)events + (uint64_t)graphs +
                   (uint64_t)dsv4_host_communicators();
    for (auto &block : in_place)
        sum += block.second;
    return sum;
}

// What the calling thread has current, as others in the process find and leave it.
EXPORTED void *host_context(void) {
    return dsv4_host_context();
}

EXPORTED void host_set_context(void *context) {
    dsv4_host_set_context(context);
}

// Bytes of the device in use.
EXPORTED uint64_t host_used(void) {
    return used();
}

// Graphs there are; whether a stream captures.
EXPORTED int host_graphs(void) {
    return graphs;
}

EXPORTED int host_captures(void) {
    return capturing != nullptr;
}

// Kernels executed so far.
EXPORTED unsigned host_launches(void) {
    return dsv4_host_launches();
}

// Calls of a function or an operation so far.
EXPORTED int host_calls(const char *name) {
    return totals[name];
}

// Bytes that came back so far.
EXPORTED uint64_t host_downloaded(void) {
    return downloaded;
}

// The order inside an mma: host.h.
EXPORTED void host_mma_bits(int bits) {
    dsv4_host_mma_bits = bits;
}

// Times a stream came to wait for copies of another one.
EXPORTED int host_waits(void *stream) {
    return waits[stream];
}

EXPORTED const struct dsv4_cuda_plugin *dsv4_cuda_plugin(void) {
    static const struct dsv4_cuda_plugin plugin = {
        DSV4_CUDA_ABI,
        sizeof(struct dsv4_cuda_plugin),
        13000,
        "the host",
#define L(f) locked<f>::call
        {L(device_count), L(properties), L(prepare), L(context), L(set_context), L(free_bytes), L(allocate),
         L(release), L(stream_create), L(stream_destroy), L(synchronize), L(upload), L(download), L(copy_here),
         L(host_allocate), L(host_release), L(stream_done), L(event_create), L(event_destroy), L(event_record),
         L(event_wait), L(event_done), L(capture_begin), L(capture_end), L(graph_launch), L(graph_destroy),
         error_name, error_text},
#undef L
        {
#define X(op) op,
            DSV4_CUDA_LAUNCHES(X)
#undef X
        },
    };
    return &plugin;
}
}
