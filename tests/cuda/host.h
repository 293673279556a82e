// SPDX-License-Identifier: Apache-2.0
//
// CUDA as far as the kernels use it, on the CPU: blocks one after the other, the threads of a block as fibers that change
// at barriers and shuffles.  The order of blocks and threads changes from launch to launch, shared memory starts as NaN, and
// asynchronous copies happen as early or as late as they may, so that a missing barrier or wait shows as other bits.
// An mma happens when its whole warp is there; its sums in one of two orders (dsv4_host_mma_bits).
// A barrier that some threads of a block (or warp) do not reach, and a ticket (device.cuh) that is not zero when a launch
// ends, end the program.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <vector>

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {
    }
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

// One block's shared memory, in the order in which its objects are named.
void *dsv4_host_shared(size_t bytes);
// Publishes this thread's value, waits for its warp, and gives the values of all 32 lanes.
const uint64_t *dsv4_host_exchange(uint64_t value);
void dsv4_host_copy16(void *shared, const void *global);
void dsv4_host_copy_commit();
void dsv4_host_copy_wait(int left);
void dsv4_host_mma(float *d, const uint32_t *a, const uint32_t *b);
// 0: an mma adds its products one after the other, each sum rounded.  Else: it aligns them and the sum so far to the largest
// and cuts each and the result to so many bits.  24 is as bad as launches.h allows; with fewer one sees what an mma made.
extern "C" int dsv4_host_mma_bits;

// A launch with its arguments as a kernel gets them.
struct dsv4_host_node {
    void (*body)(const void *);
    std::vector<unsigned char> args;
    dim3 grid;
    unsigned threads;
    const char *name;
};
// While it captures, launches are noted.  NULL is a stream that never does.
struct dsv4_host_stream {
    bool capturing;
    std::vector<dsv4_host_node> nodes;
};
int dsv4_host_launch(void *stream, const dsv4_host_node &launch);

void __syncthreads();
int __syncthreads_or(int predicate);
// Kernels executed so far.
unsigned dsv4_host_launches();
// A counter that must be zero before and after each launch.
void dsv4_host_ticket(const int32_t *ticket);
// Blocks run one after the other: what one wrote the next one sees.
static inline void __threadfence() {
}
static inline void __syncwarp(unsigned = ~0u) {
    dsv4_host_exchange(0);
}

// One block after the other: what was written is seen.
static inline void __threadfence_system() {
}

#define DSV4_DEVICE static inline
#define DSV4_KERNEL(name, type, threads, blocks) static void name(const type &a)
#define DSV4_SHARED(type, name) type &name = *(type *)dsv4_host_shared(sizeof(type))
#define DSV4_LAUNCH(kernel, grid, threads, stream, args)                                                               \
    do {                                                                                                               \
        auto launch_args = args;                                                                                       \
        const unsigned char *launch_bytes = (const unsigned char *)&launch_args;                                       \
        int launch_code =                                                                                              \
            dsv4_host_launch(stream, {[](const void *p) { kernel(*(const decltype(launch_args) *)p); },                \
                                      std::vector<unsigned char>(launch_bytes, launch_bytes + sizeof launch_args),     \
                                      grid, threads, #kernel});                                                        \
        if (launch_code)                                                                                               \
            return launch_code;                                                                                        \
    } while (0)

static inline float dsv4_mad(float a, float b, float c) {
    return c + a * b;
}

static inline float dsv4_half_to_f32(uint32_t h) {
    uint32_t sign = (h & 0x8000u) << 16, exp = h >> 10 & 31u, mant = h & 0x3ffu;
    uint32_t bits = exp == 31 ? 0x7f800000u | mant << 13 : (exp + 112) << 23 | mant << 13;
    float x;
    if (exp == 0) {
        x = (float)mant * 0x1p-24f;
        memcpy(&bits, &x, 4);
    }
    bits |= sign;
    memcpy(&x, &bits, 4);
    return x;
}

static inline void dsv4_copy16(void *shared, const void *global) {
    dsv4_host_copy16(shared, global);
}
static inline void dsv4_copy_commit() {
    dsv4_host_copy_commit();
}
template <int left> static inline void dsv4_copy_wait() {
    dsv4_host_copy_wait(left);
}

template <class T> static inline T dsv4_host_lane(T value, unsigned lane) {
    uint64_t bits = 0;
    static_assert(sizeof(T) <= 8, "one register pair");
    memcpy(&bits, &value, sizeof value);
    memcpy(&value, &dsv4_host_exchange(bits)[lane & 31u], sizeof value);
    return value;
}
template <class T> static inline T __shfl_sync(unsigned, T value, int lane) {
    return dsv4_host_lane(value, (unsigned)lane);
}
template <class T> static inline T __shfl_xor_sync(unsigned, T value, int mask) {
    return dsv4_host_lane(value, threadIdx.x ^ (unsigned)mask);
}
// Lanes without a lower neighbour keep their value.
template <class T> static inline T __shfl_up_sync(unsigned, T value, unsigned by) {
    unsigned lane = threadIdx.x & 31u;
    return dsv4_host_lane(value, lane >= by ? lane - by : lane);
}
static inline unsigned __ballot_sync(unsigned, int predicate) {
    const uint64_t *all = dsv4_host_exchange(predicate != 0);
    unsigned bits = 0;
    for (unsigned i = 0; i < 32; i++)
        bits |= (unsigned)all[i] << i;
    return bits;
}
static inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}

template <class T> static inline T atomicAdd(T *p, T x) {
    T old = *p;
    *p += x;
    return old;
}
static inline int atomicMin(int *p, int x) {
    int old = *p;
    *p = x < old ? x : old;
    return old;
}

// Bytes of the eight in (high, low) chosen by the low 3 bits of each nibble of s; bit 3 is not used.
static inline unsigned __byte_perm(unsigned low, unsigned high, unsigned s) {
    uint64_t all = (uint64_t)high << 32 | low;
    unsigned out = 0;
    for (unsigned i = 0; i < 4; i++)
        out |= (unsigned)(all >> 8 * (s >> 4 * i & 7u) & 255u) << 8 * i;
    return out;
}

// c plus the four products of signed bytes.
static inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 32; i += 8)
        c += (int)(int8_t)((unsigned)a >> i) * (int)(int8_t)((unsigned)b >> i);
    return c;
}

struct __attribute__((may_alias)) uint4 {
    unsigned x, y, z, w;
};

struct __attribute__((may_alias)) uint2 {
    unsigned x, y;
};

struct __attribute__((may_alias)) float2 {
    float x, y;
};

static inline void dsv4_mma(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    dsv4_host_mma(d, a, b);
}

static inline unsigned dsv4_opaque(unsigned x) {
    return x;
}

static inline uint32_t dsv4_mul_bf16x2(uint32_t a, uint32_t b) {
    uint32_t out = 0;
    for (int i = 0; i < 32; i += 16) {
        uint32_t x = a >> i << 16, y = b >> i << 16, bits;
        float p, q;
        memcpy(&p, &x, 4);
        memcpy(&q, &y, 4);
        p *= q;
        memcpy(&bits, &p, 4);
        out |= ((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16 & 0xffffu) << i; // no NaN comes here
    }
    return out;
}
