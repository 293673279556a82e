/* SPDX-License-Identifier: Apache-2.0 */
/* A libcuda for tests: each call gives what the environment says, by default one device of CUDA 13.0. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

static int number(const char *name, int usual) {
    const char *text = getenv(name);
    return text ? atoi(text) : usual;
}

#ifndef WITHOUT_INIT
int cuInit(unsigned flags);
int cuInit(unsigned flags) {
    (void)flags;
    return number("STUB_CUINIT", 0);
}
#endif

int cuDriverGetVersion(int *version);
int cuDriverGetVersion(int *version) {
    *version = number("STUB_VERSION", 13000);
    return number("STUB_CUDRIVERGETVERSION", 0);
}

int cuDeviceGetCount(int *count);
int cuDeviceGetCount(int *count) {
    *count = number("STUB_COUNT", 1);
    return number("STUB_CUDEVICEGETCOUNT", 0);
}

/* Memory that the host and a device executed on it both see. */
int cuMemAllocManaged(unsigned long long *out, size_t bytes, unsigned flags);
int cuMemAllocManaged(unsigned long long *out, size_t bytes, unsigned flags) {
    void *p = NULL;
    int code = flags == 1 ? posix_memalign(&p, 256, bytes) : 1;
    *out = (unsigned long long)(uintptr_t)p;
    return code ? 2 : 0;
}

int cuMemFree_v2(unsigned long long p);
int cuMemFree_v2(unsigned long long p) {
    free((void *)(uintptr_t)p);
    return 0;
}
