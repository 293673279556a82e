/* SPDX-License-Identifier: Apache-2.0 */
/* A libcuda for tests: each call gives what the environment says, by default one device of CUDA 13.0. */
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
