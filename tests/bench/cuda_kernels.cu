// SPDX-License-Identifier: Apache-2.0
//
// What tests/bench/cuda.py times on a device: a kernel that only reads, and launches of the built plugin, captured so that
// the host's part does not count.  One piece of work at a time; all memory is of the device, filled with random bytes that
// are no NaN codes, and far larger than its caches.  Functions return 0 or a text in bench_error().
#include "device.cuh"
#include "plugin.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { THREADS = 256, AT_ONCE = 4, PATTERN_BYTES = 8 << 20, MAX_BLOCKS = 1 << 12 };

struct read_args {
    const uint4 *from;
    size_t n; // a multiple of THREADS * AT_ONCE
    uint32_t *sink;
};

DSV4_KERNEL(read_kernel, struct read_args, THREADS, 4) {
    uint32_t x = 0;
    for (size_t i = (size_t)blockIdx.x * THREADS * AT_ONCE + threadIdx.x; i < a.n; i += (size_t)gridDim.x * THREADS * AT_ONCE) {
        uint4 v[AT_ONCE];
        for (int j = 0; j < AT_ONCE; j++)
            v[j] = a.from[i + (size_t)j * THREADS];
        for (int j = 0; j < AT_ONCE; j++)
            x ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    if (x == 0x5eed) // so that the loads stay
        *a.sink = x;
}

static int launch_read(const struct read_args &a, unsigned blocks, void *stream) {
    DSV4_LAUNCH(read_kernel, blocks, THREADS, stream, a);
    return 0;
}

static const struct dsv4_cuda_plugin *plugin;
static struct dsv4_cuda_properties device;
static void *stream, *graph, *blocks[MAX_BLOCKS];
static int n_block, n_kept, n_item;
static struct read_args reading;
static char error[512];
static unsigned char *pattern;

static int ok(int code, const char *doing) {
    if (code)
        snprintf(error, sizeof error, "%s: %s: %s", doing, plugin->runtime.error_name(code), plugin->runtime.error_text(code));
    return code == 0;
}

// Memory of the device with random bytes; NULL after an error.
static void *filled(size_t bytes) {
    void *p = NULL;
    if (n_block == MAX_BLOCKS) {
        snprintf(error, sizeof error, "more than %d pieces of memory", MAX_BLOCKS);
        return NULL;
    }
    if (!ok(plugin->runtime.allocate(&p, bytes), "memory of the device"))
        return NULL;
    blocks[n_block++] = p;
    for (size_t at = 0; at < bytes; at += PATTERN_BYTES) {
        size_t n = bytes - at < PATTERN_BYTES ? bytes - at : (size_t)PATTERN_BYTES;
        if (!ok(plugin->runtime.upload((char *)p + at, pattern, n, stream), "filling memory"))
            return NULL;
    }
    return ok(plugin->runtime.synchronize(stream), "filling memory") ? p : NULL;
}

static void *copied(const void *from, size_t bytes) {
    void *p = filled(bytes);
    return p && ok(plugin->runtime.upload(p, from, bytes, stream), "filling memory") &&
                   ok(plugin->runtime.synchronize(stream), "filling memory")
               ? p
               : NULL;
}

// A weight of E8M0 scales around one.
static int make_weight(struct dsv4_weight *w, int fp4, int32_t rows, int32_t cols) {
    size_t n = (size_t)rows * (size_t)cols, bytes = fp4 ? n / 2 : n;
    size_t scales = fp4 ? n / DSV4_FP4_BLOCK : ((size_t)rows + 127) / 128 * (((size_t)cols + 127) / 128);
    unsigned char *ones = (unsigned char *)malloc(scales);
    memset(w, 0, sizeof *w);
    w->data = filled(bytes);
    if (ones)
        memset(ones, 120, scales);
    w->scale = ones ? copied(ones, scales) : NULL;
    free(ones);
    w->rows = rows;
    w->cols = cols;
    w->format = fp4 ? DSV4_W_FP4 : DSV4_W_FP8;
    w->scale_type = DSV4_SCALE_E8M0;
    w->scale_rule = DSV4_SCALE_FOLD;
    return w->data && w->scale;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

extern "C" {

#define EXPORTED __attribute__((visibility("default")))

EXPORTED const char *bench_error(void) {
    return error;
}

EXPORTED const char *bench_device(void) {
    return device.name;
}

// Gives back what work has taken; what was there before it stays.
EXPORTED void bench_done(void) {
    if (!plugin)
        return;
    plugin->runtime.graph_destroy(graph);
    while (n_block > n_kept)
        plugin->runtime.release(blocks[--n_block]);
    graph = NULL;
}

// The plugin, the first device, and as much memory to read.
EXPORTED int bench_open(const char *path, uint64_t bytes) {
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    dsv4_cuda_plugin_fn *entry = library ? (dsv4_cuda_plugin_fn *)dlsym(library, DSV4_CUDA_PLUGIN_SYMBOL) : NULL;
    if (!entry) {
        snprintf(error, sizeof error, "%s", dlerror());
        return 1;
    }
    plugin = entry();
    if (plugin->abi != DSV4_CUDA_ABI || plugin->bytes != sizeof *plugin) {
        snprintf(error, sizeof error, "%s: a plugin of another version: build it again", path);
        plugin = NULL;
        return 1;
    }
    pattern = (unsigned char *)malloc(PATTERN_BYTES);
    if (!pattern) {
        snprintf(error, sizeof error, "no memory");
        return 1;
    }
    uint32_t x = 1;
    for (int i = 0; i < PATTERN_BYTES; i++) {
        x = x * 1664525u + 1013904223u;
        pattern[i] = (unsigned char)(x >> 24);
        if ((pattern[i] & 0x7f) == 0x7f)
            pattern[i] ^= 1;
    }
    if (!ok(plugin->runtime.prepare(0), "the device") || !ok(plugin->runtime.properties(&device, 0), "the device") ||
        !ok(plugin->runtime.stream_create(&stream), "a stream"))
        return 1;
    reading.n = (size_t)bytes / 16 / (THREADS * AT_ONCE) * (THREADS * AT_ONCE);
    reading.from = (const uint4 *)filled(reading.n * 16);
    reading.sink = (uint32_t *)filled(4);
    n_kept = n_block;
    return !(reading.from && reading.sink);
}

// Memory for somebody else, which stays.
EXPORTED void *bench_memory(uint64_t bytes) {
    void *p = filled(bytes);
    n_kept = n_block;
    return p;
}

EXPORTED int bench_wait(void) {
    return !ok(plugin->runtime.synchronize(stream), "waiting");
}

EXPORTED void *bench_stream(void) {
    return stream;
}

// Bytes a second of the best of some grids; 0 after an error.
EXPORTED double bench_read(void) {
    static const int each[] = {4, 8, 16, 32};
    double best = 0;
    for (int i = 0; i < 4; i++) {
        double began = now();
        if (!ok(launch_read(reading, (unsigned)(each[i] * device.multiprocessors), stream), "reading") ||
            !ok(plugin->runtime.synchronize(stream), "reading"))
            return 0;
        double rate = (double)reading.n * 16 / (now() - began);
        best = rate > best ? rate : best;
    }
    return best;
}

// The launches of make(0), ..., make(n - 1) as a graph.
static int captured(int n, int (*make)(int)) {
    for (int i = 0; i < n; i++) // kernels are loaded at their first launch, which a capture would not survive
        if (!ok(make(i), "a launch"))
            return 1;
    if (!ok(plugin->runtime.synchronize(stream), "launches") || !ok(plugin->runtime.capture_begin(stream), "a capture"))
        return 1;
    int code = 0;
    for (int i = 0; i < n && !code; i++)
        code = make(i);
    int ended = plugin->runtime.capture_end(stream, code ? NULL : &graph);
    n_item = n;
    return !(ok(code, "a launch") && ok(ended, "a graph"));
}

// Seconds of one of its items; 0 after an error.
EXPORTED double bench_run(void) {
    double began = now();
    if (!ok(plugin->runtime.graph_launch(graph, stream), "a graph") || !ok(plugin->runtime.synchronize(stream), "a graph"))
        return 0;
    return (now() - began) / n_item;
}

static struct dsv4_cuda_linear_args linears[64];

static int launch_linear(int i) {
    return plugin->launches.linear(&linears[i], stream);
}

// n <= 64 FP8 matrices, each times one token.
EXPORTED int bench_linear(int32_t rows, int32_t cols, int32_t n) {
    dsv4_bf16 *x = (dsv4_bf16 *)filled(2 * (size_t)cols), *out = (dsv4_bf16 *)filled(2 * (size_t)rows);
    for (int32_t i = 0; i < n; i++) {
        memset(&linears[i], 0, sizeof linears[i]);
        linears[i].n_job = linears[i].n_tok = 1;
        struct dsv4_cuda_linear_job *job = &linears[i].jobs[0];
        if (!x || !out || !make_weight(&job->w, 0, rows, cols))
            return 1;
        job->x = x;
        job->out = out;
        job->ld_x = cols;
        job->ld_out = rows;
    }
    return captured(n, launch_linear);
}

static struct {
    struct dsv4_cuda_experts_args up, down;
    struct dsv4_cuda_swiglu_args swiglu;
} phases[64];

static int launch_phase(int i) {
    int code = plugin->launches.experts(&phases[i].up, stream);
    return code ? code : plugin->launches.experts(&phases[i].down, stream);
}

// n <= 64 times the experts of one token: both projections, SwiGLU, the third; `used` experts each, all different.
EXPORTED int bench_experts(int32_t hidden, int32_t width, int32_t used, int32_t n) {
    size_t n_exp = (size_t)used + 1;
    int32_t tickets = used * ((hidden > width ? hidden : width) / 128 + 2) + (hidden > width ? hidden : width) / 16 + 2;
    void *none = calloc((size_t)tickets, 4);
    struct dsv4_weight *tables = (struct dsv4_weight *)calloc(3 * n_exp, sizeof *tables);
    struct dsv4_cuda_tile *tiles = (struct dsv4_cuda_tile *)calloc((size_t)used, sizeof *tiles);
    int32_t *rows = (int32_t *)calloc((size_t)used, sizeof *rows), bad = !none || !tables || !tiles || !rows;
    for (int32_t e = 0; e < used && !bad; e++) {
        tiles[e].expert = tiles[e].first = e;
        tiles[e].n = 1;
    }
    dsv4_bf16 *x = (dsv4_bf16 *)filled(2 * (size_t)hidden), *g = (dsv4_bf16 *)filled(2 * (size_t)(used * width));
    dsv4_bf16 *u = (dsv4_bf16 *)filled(2 * (size_t)(used * width)), *out = (dsv4_bf16 *)filled(2 * (size_t)(used * hidden));
    void *tile = bad ? NULL : copied(tiles, (size_t)used * sizeof *tiles), *row = bad ? NULL : copied(rows, 4 * (size_t)used);
    void *count = copied(&used, 4), *weights = filled(4 * (size_t)used), *zeros = bad ? NULL : copied(none, 4 * (size_t)tickets);
    bad |= !x || !g || !u || !out || !tile || !row || !count || !weights || !zeros;
    for (int32_t i = 0; i < n && !bad; i++) {
        for (size_t e = 0; e + 1 < n_exp && !bad; e++)
            bad = !make_weight(&tables[e], 1, width, hidden) || !make_weight(&tables[n_exp + e], 1, width, hidden) ||
                  !make_weight(&tables[2 * n_exp + e], 1, hidden, width);
        const struct dsv4_weight *w = bad ? NULL : (const struct dsv4_weight *)copied(tables, 3 * n_exp * sizeof *tables);
        bad |= !w;
        struct dsv4_cuda_experts_args *up = &phases[i].up, *down = &phases[i].down;
        memset(&phases[i], 0, sizeof phases[i]);
        up->w[0] = w;
        up->w[1] = w + n_exp;
        up->out[0] = g;
        up->out[1] = u;
        up->x_quant = up->x_plain = x;
        up->row_tok = (const int32_t *)row;
        up->tiles = down->tiles = (const struct dsv4_cuda_tile *)tile;
        up->n_tile = down->n_tile = (const int32_t *)count;
        up->max_tile = down->max_tile = used;
        up->tile_tok = down->tile_tok = DSV4_CUDA_FEW_TILE;
        up->rows = down->cols = width;
        up->cols = down->rows = hidden;
        up->n_tok = down->n_tok = 1;
        up->tickets = down->tickets = (int32_t *)zeros;
        struct dsv4_cuda_swiglu_args *s = &phases[i].swiglu;
        s->out = g;
        s->g = g;
        s->u = u;
        s->weights = (const float *)weights;
        s->n_row = s->first_shared = used;
        s->n = width;
        s->limit = s->shared_limit = 10.0f;
        s->quant = s->shared_quant = 1;
        up->swiglu = s;
        down->w[0] = w + 2 * n_exp;
        down->out[0] = out;
        down->x_quant = down->x_plain = g;
    }
    free(none);
    free(tables);
    free(tiles);
    free(rows);
    return bad || captured(n, launch_phase);
}
}
