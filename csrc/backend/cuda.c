/* SPDX-License-Identifier: Apache-2.0 */
#include "backend/cuda.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/*
 * What to do about an error.  Numbers are those of enum cudaError; CUresult, which the driver gives, has the same for
 * these.  Source: CUDA Runtime API, "Data types used by CUDA Runtime".
 */
struct remedy {
    int code;
    dsv4_status status;
    const char *name, *text;
};

static const struct remedy remedies[] = {
    {1, DSV4_E_DEVICE, "invalid value", "this is a fault of dsv4; please report it"},
    {2, DSV4_E_MEMORY, "out of memory", "free memory of the device, or give it less with gpu_memory="},
    {3, DSV4_E_UNAVAILABLE, "initialization error", "start child processes with the method \"spawn\", and see whether "
     "nvidia-smi works"},
    {4, DSV4_E_DEVICE, "the driver is shutting down", "the process is about to end; start another"},
    {34, DSV4_E_UNAVAILABLE, "the driver library is a stub", "take the stubs folder of the CUDA toolkit out of "
     "LD_LIBRARY_PATH and install the NVIDIA driver"},
    {35, DSV4_E_UNAVAILABLE, "insufficient driver", "install a newer NVIDIA driver"},
    {36, DSV4_E_UNAVAILABLE, "call requires newer driver", "install a newer NVIDIA driver"},
    {46, DSV4_E_UNAVAILABLE, "devices unavailable", "another process may have the device for itself alone: see "
     "nvidia-smi"},
    {98, DSV4_E_UNAVAILABLE, "invalid device function", "the plugin has no code for this device; build it again with "
     "DSV4_CUDA_ARCH naming its architecture"},
    {100, DSV4_E_UNAVAILABLE, "no device", "see whether nvidia-smi lists one, and whether CUDA_VISIBLE_DEVICES hides it"},
    {101, DSV4_E_UNAVAILABLE, "invalid device", "see whether nvidia-smi lists the device, and whether "
     "CUDA_VISIBLE_DEVICES hides it"},
    {102, DSV4_E_UNAVAILABLE, "device not licensed", "get a licence for this virtual device"},
    {200, DSV4_E_UNAVAILABLE, "invalid kernel image", "the plugin is damaged; install dsv4 again"},
    {201, DSV4_E_DEVICE, "invalid context", "load the model in a new process"},
    {209, DSV4_E_UNAVAILABLE, "no kernel image for device", "the plugin has no code for this device; build it again with "
     "DSV4_CUDA_ARCH naming its architecture, if that is 8.0 or later"},
    {214, DSV4_E_DEVICE, "uncorrectable ECC error", "memory of the device is damaged: reset it or leave it out with "
     "CUDA_VISIBLE_DEVICES, and load the model again"},
    {218, DSV4_E_UNAVAILABLE, "invalid PTX", "the plugin is damaged; install dsv4 again"},
    {222, DSV4_E_UNAVAILABLE, "unsupported PTX version", "install a newer NVIDIA driver, or build the plugin with "
     "DSV4_CUDA_ARCH naming the architecture of this device"},
    {223, DSV4_E_UNAVAILABLE, "JIT compilation disabled", "build the plugin with DSV4_CUDA_ARCH naming the architecture "
     "of this device"},
    {304, DSV4_E_UNAVAILABLE, "operating system call failed", "see whether the device files /dev/nvidia* may be opened"},
    {700, DSV4_E_DEVICE, "illegal address", "the device's memory of this process is lost: load the model in a new process, "
     "and report it"},
    {701, DSV4_E_DEVICE, "launch out of resources", "this is a fault of dsv4; please report it"},
    {702, DSV4_E_DEVICE, "launch timeout", "a display runs on this device: use another one, or switch its watchdog off"},
    {714, DSV4_E_DEVICE, "hardware stack error", "load the model in a new process; if it happens again the device is "
     "faulty"},
    {715, DSV4_E_DEVICE, "illegal instruction", "load the model in a new process; if it happens again the device is faulty"},
    {716, DSV4_E_DEVICE, "misaligned address", "load the model in a new process, and report it"},
    {719, DSV4_E_DEVICE, "launch failure", "load the model in a new process, and see the kernel's log for an Xid error"},
    {800, DSV4_E_UNAVAILABLE, "not permitted", "this process may not use the device: see the permissions of /dev/nvidia*"},
    {801, DSV4_E_UNAVAILABLE, "not supported", "the device or the driver lacks what dsv4 needs; use device='cpu'"},
    {802, DSV4_E_UNAVAILABLE, "system not ready", "start the service nvidia-fabricmanager, or wait for it"},
    {803, DSV4_E_UNAVAILABLE, "system driver mismatch", "the driver's library and its kernel module differ: restart the "
     "machine after the update, or install matching ones"},
    {804, DSV4_E_UNAVAILABLE, "compatibility not supported on device", "take CUDA's forward-compatibility library out of "
     "LD_LIBRARY_PATH, or install a newer NVIDIA driver"},
    {805, DSV4_E_UNAVAILABLE, "MPS connection failed", "start the MPS daemon, or unset CUDA_MPS_PIPE_DIRECTORY"},
    {806, DSV4_E_UNAVAILABLE, "MPS RPC failure", "restart the MPS daemon"},
    {807, DSV4_E_UNAVAILABLE, "MPS server not ready", "try again later"},
    {808, DSV4_E_UNAVAILABLE, "too many MPS clients", "end other processes on the device"},
    {809, DSV4_E_UNAVAILABLE, "too many MPS connections", "end other processes on the device"},
    {900, DSV4_E_DEVICE, "stream capture unsupported", "this is a fault of dsv4; please report it"},
    {901, DSV4_E_DEVICE, "stream capture invalidated", "this is a fault of dsv4; please report it"},
    {999, DSV4_E_DEVICE, "unknown error", "see whether nvidia-smi works, and load the model in a new process"},
};

static const struct remedy *remedy_of(int code) {
    static const struct remedy other = {0, DSV4_E_DEVICE, "another error", "load the model in a new process; see whether "
                                        "nvidia-smi works"};
    for (size_t i = 0; i < sizeof remedies / sizeof *remedies; i++)
        if (remedies[i].code == code)
            return &remedies[i];
    return &other;
}

dsv4_status dsv4_cuda_status(const struct dsv4_cuda_plugin *p, int code, const char *doing, dsv4_error *err) {
    if (code == 0)
        return DSV4_OK;
    const struct remedy *r = remedy_of(code);
    return dsv4_fail(err, r->status, "CUDA: %s: got error %d, %s (%s); %s", doing, code, p->runtime.error_name(code),
                     p->runtime.error_text(code), r->text);
}

/* ---------------------------------------------------------------------------------------------------------- the driver */

typedef int driver_init_fn(unsigned flags);
typedef int driver_int_fn(int *out);

struct driver {
    driver_init_fn *init;
    driver_int_fn *version, *count;
};

/* A function pointer from dlsym: ISO C has no conversion from an object pointer. */
static void symbol(void *function, void *library, const char *name) {
    void *found = dlsym(library, name);
    memcpy(function, &found, sizeof found);
}

static dsv4_status driver_status(int code, const char *call, dsv4_error *err) {
    if (code == 0)
        return DSV4_OK;
    const struct remedy *r = remedy_of(code);
    /* nothing has worked yet: whatever it is, there is no device */
    return dsv4_fail(err, DSV4_E_UNAVAILABLE, "CUDA: the NVIDIA driver's %s: got error %d, %s; %s", call, code, r->name,
                     r->text);
}

/* Devices, and the CUDA version that the driver supports. */
static dsv4_status ask_driver(const char *name, int *version, dsv4_error *err) {
    struct driver d;
    int count = 0;
    void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (!library)
        return dsv4_fail(err, DSV4_E_UNAVAILABLE, "CUDA: no NVIDIA driver: %.300s; install one, and give containers their "
                         "devices", dlerror());
    symbol(&d.init, library, "cuInit");
    symbol(&d.version, library, "cuDriverGetVersion");
    symbol(&d.count, library, "cuDeviceGetCount");
    if (!d.init || !d.version || !d.count)
        return dsv4_fail(err, DSV4_E_UNAVAILABLE, "CUDA: %.200s has no %s, so it is no NVIDIA driver; install one", name,
                         !d.init ? "cuInit" : !d.version ? "cuDriverGetVersion" : "cuDeviceGetCount");
    *version = 0;
    DSV4_TRY(driver_status(d.version(version), "cuDriverGetVersion", err));
    DSV4_TRY(driver_status(d.init(0), "cuInit", err));
    DSV4_TRY(driver_status(d.count(&count), "cuDeviceGetCount", err));
    return count > 0 ? DSV4_OK : driver_status(100, "cuDeviceGetCount", err);
}

/* ---------------------------------------------------------------------------------------------------------- the plugin */

static dsv4_status open_plugin(const struct dsv4_cuda_plugin **out, const char *path, dsv4_error *err) {
    dsv4_cuda_plugin_fn *entry;
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (!library)
        return dsv4_fail(err, DSV4_E_UNAVAILABLE, "CUDA: the plugin cannot be loaded: %.400s; install dsv4 again",
                         dlerror());
    symbol(&entry, library, DSV4_CUDA_PLUGIN_SYMBOL);
    if (!entry)
        return dsv4_fail(err, DSV4_E_UNAVAILABLE, "CUDA: %.200s has no symbol %s, so it is no plugin of dsv4; install dsv4 "
                         "again", path, DSV4_CUDA_PLUGIN_SYMBOL);
    const struct dsv4_cuda_plugin *p = entry();
    if (p->abi != DSV4_CUDA_ABI || p->bytes != sizeof *p)
        return dsv4_fail(err, DSV4_E_UNAVAILABLE, "CUDA: %.200s: got a plugin of version %u (%u bytes), wanted %d (%zu "
                         "bytes); it was built from other sources: install dsv4 again", path, p->abi, p->bytes,
                         DSV4_CUDA_ABI, sizeof *p);
    *out = p;
    return DSV4_OK;
}

dsv4_status dsv4_cuda_load(const struct dsv4_cuda_plugin **out, const struct dsv4_cuda_paths *paths, dsv4_error *err) {
    const struct dsv4_cuda_plugin *p = NULL;
    int version = 0;
    if (access(paths->plugin, F_OK) != 0)
        return dsv4_fail(err, DSV4_E_UNAVAILABLE, "CUDA: this dsv4 was built without its CUDA plugin (%.200s); install it "
                         "where nvcc is found, with DSV4_CUDA=1", paths->plugin);
    DSV4_TRY(ask_driver(paths->driver, &version, err));
    DSV4_TRY(open_plugin(&p, paths->plugin, err));
    if (version / 1000 < p->cuda_version / 1000) /* drivers serve all minor versions of a major one */
        return dsv4_fail(err, DSV4_E_UNAVAILABLE, "CUDA: the NVIDIA driver supports CUDA %d.%d, the plugin was built with "
                         "%d.%d; install a driver for CUDA %d", version / 1000, version % 1000 / 10, p->cuda_version / 1000,
                         p->cuda_version % 1000 / 10, p->cuda_version / 1000);
    *out = p;
    return DSV4_OK;
}

dsv4_status dsv4_cuda_count(const struct dsv4_cuda_plugin *p, int32_t *n, dsv4_error *err) {
    *n = 0;
    DSV4_TRY(dsv4_cuda_status(p, p->runtime.device_count(n), "counting devices", err));
    return *n > 0 ? DSV4_OK : dsv4_cuda_status(p, 100, "counting devices", err);
}

dsv4_status dsv4_cuda_properties(const struct dsv4_cuda_plugin *p, int32_t device, struct dsv4_cuda_properties *out,
                                 dsv4_error *err) {
    char doing[64];
    snprintf(doing, sizeof doing, "properties of device %d", device);
    return dsv4_cuda_status(p, p->runtime.properties(out, device), doing, err);
}

dsv4_status dsv4_cuda_prepare(const struct dsv4_cuda_plugin *p, int32_t device, dsv4_error *err) {
    struct dsv4_cuda_properties found;
    char doing[512];
    DSV4_TRY(dsv4_cuda_properties(p, device, &found, err));
    snprintf(doing, sizeof doing, "device %d (%s, architecture %d.%d; the plugin has code for %.100s)", device, found.name,
             found.major, found.minor, p->built_for);
    return dsv4_cuda_status(p, p->runtime.prepare(device), doing, err);
}

dsv4_status dsv4_cuda_enter(struct dsv4_cuda_visit *v, const struct dsv4_cuda_plugin *p, dsv4_error *err) {
    *v = (struct dsv4_cuda_visit){0};
    DSV4_TRY(dsv4_cuda_status(p, p->runtime.context(&v->context), "the thread's context", err));
    v->plugin = p;
    return DSV4_OK;
}

void dsv4_cuda_leave(const struct dsv4_cuda_visit *v) {
    if (v->plugin)
        v->plugin->runtime.set_context(v->context);
}
