// SPDX-License-Identifier: Apache-2.0
// The plugin's one exported symbol, and the CUDA runtime as the engine sees it (runtime.h).
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstring>

#include "plugin.h"

// DSV4_CUDA_BUILT_FOR: the architectures of this build, a string (setup.py)

// Loaded to learn whether this file holds code for a device; never run.
__global__ void dsv4_cuda_probe(void) {}

// A failure that is told here is told once: left behind, cudaGetLastError would give it for the next launch, which is
// none of its fault.
static int told(cudaError_t code) {
    if (code != cudaSuccess)
        cudaGetLastError();
    return code;
}

static int device_count(int32_t *n) {
    int found = 0; // the runtime leaves it as it is without a driver
    cudaError_t code = cudaGetDeviceCount(&found);
    *n = code == cudaSuccess ? found : 0;
    return told(code);
}

static int properties(struct dsv4_cuda_properties *out, int32_t device) {
    cudaDeviceProp found;
    cudaError_t code = cudaGetDeviceProperties(&found, device);
    if (code != cudaSuccess)
        return told(code);
    memset(out, 0, sizeof *out);
    static_assert(sizeof out->name == sizeof found.name, "names of devices");
    memcpy(out->name, found.name, sizeof out->name); // ends with 0
    out->major = found.major;
    out->minor = found.minor;
    out->multiprocessors = found.multiProcessorCount;
    out->total_bytes = found.totalGlobalMem;
    return 0;
}

static int prepare(int32_t device) {
    cudaFuncAttributes attributes;
    cudaError_t code = cudaSetDevice(device);
    return told(code != cudaSuccess ? code : cudaFuncGetAttributes(&attributes, dsv4_cuda_probe));
}

// A function of the driver, which the runtime has loaded and this file is not linked to.  The numbers of CUresult that such
// a one gives are those of cudaError_t.
template <class F> static F *driver(const char *name) {
    void *found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    cudaError_t code = cudaGetDriverEntryPointByVersion(name, &found, 4000, cudaEnableDefault, &result);
#else
    cudaError_t code = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
    return told(code) ? nullptr : (F *)found;
}

static int context(void **out) {
    static auto *get = driver<CUresult(CUcontext *)>("cuCtxGetCurrent");
    *out = nullptr;
    return get ? (int)get((CUcontext *)out) : (int)cudaErrorSymbolNotFound;
}

static int set_context(void *context) {
    static auto *set = driver<CUresult(CUcontext)>("cuCtxSetCurrent");
    return set ? (int)set((CUcontext)context) : (int)cudaErrorSymbolNotFound;
}

static int free_bytes(uint64_t *out) {
    size_t free = 0, total = 0;
    cudaError_t code = cudaMemGetInfo(&free, &total);
    *out = free;
    return told(code);
}

static int allocate(void **out, uint64_t bytes) {
    *out = nullptr;
    return told(cudaMalloc(out, bytes));
}

static int release(void *p) {
    return told(cudaFree(p));
}

static int stream_create(void **out) {
    return told(cudaStreamCreateWithFlags((cudaStream_t *)out, cudaStreamNonBlocking));
}

static int stream_destroy(void *stream) {
    return told(cudaStreamDestroy((cudaStream_t)stream));
}

static int synchronize(void *stream) {
    return told(cudaStreamSynchronize((cudaStream_t)stream));
}

static int upload(void *to, const void *from, uint64_t bytes, void *stream) {
    return told(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, (cudaStream_t)stream));
}

static int download(void *to, const void *from, uint64_t bytes, void *stream) {
    return told(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, (cudaStream_t)stream));
}

static int copy(void *to, const void *from, uint64_t bytes, void *stream) {
    return told(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, (cudaStream_t)stream));
}

static int host_allocate(void **out, void **device, uint64_t bytes) {
    *out = *device = nullptr;
    cudaError_t code = cudaHostAlloc(out, bytes, cudaHostAllocMapped | cudaHostAllocPortable);
    if (code == cudaSuccess)
        code = cudaHostGetDevicePointer(device, *out, 0);
    if (code != cudaSuccess && *out) {
        cudaFreeHost(*out);
        *out = nullptr;
    }
    return told(code);
}

static int host_release(void *p) {
    return told(cudaFreeHost(p));
}

// "Not ready" is an answer, not a failure, and no launch shall find it.
static int answer(cudaError_t code, int32_t *done) {
    *done = code == cudaSuccess;
    if (code != cudaErrorNotReady)
        return told(code);
    cudaGetLastError();
    return cudaSuccess;
}

static int stream_done(void *stream, int32_t *done) {
    return answer(cudaStreamQuery((cudaStream_t)stream), done);
}

static int event_create(void **out) {
    *out = nullptr;
    return told(cudaEventCreateWithFlags((cudaEvent_t *)out, cudaEventDisableTiming));
}

static int event_destroy(void *event) {
    return told(event ? cudaEventDestroy((cudaEvent_t)event) : cudaSuccess);
}

static int event_record(void *event, void *stream) {
    return told(cudaEventRecord((cudaEvent_t)event, (cudaStream_t)stream));
}

static int event_wait(void *event, void *stream) {
    return told(cudaStreamWaitEvent((cudaStream_t)stream, (cudaEvent_t)event, 0));
}

static int event_done(void *event, int32_t *done) {
    return answer(cudaEventQuery((cudaEvent_t)event), done);
}

// Only this thread may do nothing that is illegal in a capture: others give back memory of sessions meanwhile.
static int capture_begin(void *stream) {
    return told(cudaStreamBeginCapture((cudaStream_t)stream, cudaStreamCaptureModeThreadLocal));
}

static int capture_end(void *stream, void **out) {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t made = nullptr;
    cudaError_t code = cudaStreamEndCapture((cudaStream_t)stream, &graph);
    if (code == cudaSuccess && out)
        code = cudaGraphInstantiate(&made, graph, 0);
    if (graph)
        cudaGraphDestroy(graph);
    if (out)
        *out = code == cudaSuccess ? made : nullptr;
    return told(code);
}

static int graph_launch(void *graph, void *stream) {
    return told(cudaGraphLaunch((cudaGraphExec_t)graph, (cudaStream_t)stream));
}

static int graph_destroy(void *graph) {
    return told(graph ? cudaGraphExecDestroy((cudaGraphExec_t)graph) : cudaSuccess);
}

static const char *error_name(int code) {
    return cudaGetErrorName((cudaError_t)code);
}

static const char *error_text(int code) {
    return cudaGetErrorString((cudaError_t)code);
}

extern "C" __attribute__((visibility("default"))) const struct dsv4_cuda_plugin *dsv4_cuda_plugin(void) {
    static const struct dsv4_cuda_plugin plugin = {
        DSV4_CUDA_ABI,
        sizeof(struct dsv4_cuda_plugin),
        CUDART_VERSION,
        DSV4_CUDA_BUILT_FOR,
        {device_count, properties, prepare, context, set_context, free_bytes, allocate, release, stream_create,
         stream_destroy, synchronize, upload, download, copy, host_allocate, host_release, stream_done, event_create, event_destroy, event_record,
         event_wait, event_done, capture_begin, capture_end, graph_launch, graph_destroy, error_name, error_text},
        {
#define X(op) dsv4_cuda_##op,
            DSV4_CUDA_LAUNCHES(X)
#undef X
        },
    };
    return &plugin;
}
