/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The checks of the kernels on a device: the launches are those of a built plugin (CHECK_PLUGIN, its path), each is waited
 * for, and buffers are managed memory of the driver (CHECK_DRIVER, or libcuda.so.1), which host and device both see.
 * Before each launch every pointer it is given, and those in small buffers, is looked at: memory of the host that the
 * device cannot see ends the program here rather than there.
 */
#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "check.h"
#include "plugin.h"

extern int dsv4_host_mma_bits;

enum { MAX_BUFFERS = 128, GAP_BYTE = 0xa5, ATTACH_GLOBAL = 1, PAGE = 4096, SMALL = 64 << 10, NO_DEVICE = 3 };

int dsv4_host_mma_bits; /* of the execution on the host; a device has its own order */

typedef int allocate_managed_fn(uint64_t *out, size_t bytes, unsigned flags);
typedef int free_fn(uint64_t p);

static struct buffer {
    unsigned char *base, *data;
    size_t bytes, gap;
} buffers[MAX_BUFFERS];
static int n_buffers;
static const struct dsv4_cuda_plugin *plugin;
static allocate_managed_fn *allocate_managed;
static free_fn *free_managed;

__attribute__((noreturn, format(printf, 1, 2))) static void stop(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    exit(NO_DEVICE);
}

static void *symbol(void *library, const char *name) {
    void *found = dlsym(library, name);
    if (!found)
        stop("no CUDA device: %s", dlerror());
    return found;
}

static void start(void) {
    const char *path = getenv("CHECK_PLUGIN"), *driver = getenv("CHECK_DRIVER");
    dsv4_cuda_plugin_fn *entry;
    int32_t n = 0;
    void *library = path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
    if (!library)
        stop("no CUDA plugin: %s", path ? dlerror() : "CHECK_PLUGIN is not set");
    *(void **)&entry = symbol(library, DSV4_CUDA_PLUGIN_SYMBOL);
    plugin = entry();
    if (plugin->abi != DSV4_CUDA_ABI || plugin->bytes != sizeof *plugin)
        stop("%s: a plugin of ABI %u, wanted %d: build it again", path, plugin->abi, DSV4_CUDA_ABI);
    int code = plugin->runtime.device_count(&n);
    if (code == 0 && n > 0)
        code = plugin->runtime.prepare(0);
    if (code != 0 || n == 0)
        stop("no CUDA device: %s: %s", plugin->runtime.error_name(code), plugin->runtime.error_text(code));
    library = dlopen(driver ? driver : "libcuda.so.1", RTLD_NOW);
    if (!library)
        stop("no CUDA device: %s", dlerror());
    *(void **)&allocate_managed = symbol(library, "cuMemAllocManaged");
    *(void **)&free_managed = symbol(library, "cuMemFree_v2");
}

/* ------------------------------------------------------------------------------------------------------------ buffers */

/* As far from a multiple of 256 as on the host, where buffers end at a page. */
void *check_aligned(size_t bytes, size_t align) {
    uint64_t base = 0;
    size_t gap = (align - bytes % align) % align, before = (PAGE - (bytes + gap) % PAGE) % 256;
    if (!plugin)
        start();
    check_true(n_buffers < MAX_BUFFERS, "more than %d buffers in one case", MAX_BUFFERS);
    int code = allocate_managed(&base, before + bytes + gap + (before + bytes + gap == 0), ATTACH_GLOBAL);
    check_true(code == 0, "no managed memory for %zu bytes: CUDA error %d", bytes, code);
    struct buffer b = {(unsigned char *)(uintptr_t)base, (unsigned char *)(uintptr_t)base + before, bytes, gap};
    memset(b.base, 0, before + bytes);
    memset(b.data + bytes, GAP_BYTE, gap);
    buffers[n_buffers++] = b;
    return b.data;
}

void *check_bytes(size_t bytes) {
    return check_aligned(bytes, 1);
}

void check_reset(void) {
    for (int i = 0; i < n_buffers; i++) {
        for (size_t j = 0; j < buffers[i].gap; j++)
            check_true(buffers[i].data[buffers[i].bytes + j] == GAP_BYTE, "byte %zu behind a buffer of %zu was written", j,
                       buffers[i].bytes);
        free_managed((uint64_t)(uintptr_t)buffers[i].base);
    }
    n_buffers = 0;
}

/* ----------------------------------------------------------------------------------------------------------- launches */

/* Whether the word is an address of this process, but of no buffer. */
static int is_of_the_host(uint64_t word) {
    uintptr_t p = (uintptr_t)word;
    if (word >> 47 || word >> 32 < 0x5000)
        return 0;
    for (int i = 0; i < n_buffers; i++)
        if (p >= (uintptr_t)buffers[i].base && p <= (uintptr_t)buffers[i].data + buffers[i].bytes)
            return 0;
    return msync((void *)(p / PAGE * PAGE), 1, MS_ASYNC) == 0;
}

static void check_words(const char *op, const void *from, size_t bytes) {
    uint64_t word;
    const unsigned char *p = from;
    for (size_t at = (8 - (uintptr_t)p % 8) % 8; at + sizeof word <= bytes; at += sizeof word) {
        memcpy(&word, p + at, sizeof word);
        if (is_of_the_host(word))
            check_true(0, "%s: memory of the host at byte %zu of %zu", op, at, bytes);
    }
}

static int launched(const char *op, int code) {
    if (code == 0)
        code = plugin->runtime.synchronize(NULL);
    if (code != 0)
        check_true(0, "%s: %s: %s", op, plugin->runtime.error_name(code), plugin->runtime.error_text(code));
    return 0;
}

static void look_at(const char *op, const void *args, size_t bytes) {
    check_words(op, args, bytes);
    for (int i = 0; i < n_buffers; i++)
        if (buffers[i].bytes <= SMALL)
            check_words(op, buffers[i].data, buffers[i].bytes);
}

/* Args of what follows are the host's, read during the call: looked at alone, then out of the way.  Bytes between fields
 * hold whatever the stack held, halves of addresses too: cleared before a look. */
#define APART(field, op)                                                                                               \
    do {                                                                                                               \
        if (a->field) {                                                                                                \
            struct dsv4_cuda_##op##_args seen = *a->field;                                                             \
            __builtin_clear_padding(&seen);                                                                            \
            look_at(#op, &seen, sizeof seen);                                                                          \
        }                                                                                                              \
        a->field = NULL;                                                                                               \
    } while (0)

static void linear_apart(struct dsv4_cuda_linear_args *a) {
    APART(act, act);
    APART(spread, spread);
    APART(collapse, collapse);
    APART(router, router);
    APART(group, group);
    APART(norm, rmsnorm);
    APART(headnorm, headnorm);
    APART(index, index);
    APART(kv, norm_kv);
    APART(windows[0], windows);
    APART(windows[1], windows);
    APART(keep, keep);
}

static void experts_apart(struct dsv4_cuda_experts_args *a) {
    APART(swiglu, swiglu);
    APART(sum, expert_sum);
    APART(spread, spread);
}

static void attention_apart(struct dsv4_cuda_attention_args *a) {
    APART(list, keys);
}

static void scores_apart(struct dsv4_cuda_scores_args *a) {
    APART(choice, top_k);
}

static void nothing_apart(const void *a) {
    (void)a;
}

#define X(op)                                                                                                          \
    int dsv4_cuda_##op(const struct dsv4_cuda_##op##_args *a, void *stream) {                                          \
        struct dsv4_cuda_##op##_args seen = *a;                                                                        \
        if (!plugin)                                                                                                   \
            start();                                                                                                   \
        _Generic(&seen, struct dsv4_cuda_linear_args *: linear_apart,                                                  \
                 struct dsv4_cuda_experts_args *: experts_apart, struct dsv4_cuda_attention_args *: attention_apart,   \
                 struct dsv4_cuda_scores_args *: scores_apart, default: nothing_apart)(&seen);                         \
        __builtin_clear_padding(&seen);                                                                                \
        look_at(#op, &seen, sizeof seen);                                                                              \
        return launched(#op, plugin->launches.op(a, stream));                                                          \
    }
DSV4_CUDA_LAUNCHES(X)
#undef X
