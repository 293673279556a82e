// SPDX-License-Identifier: Apache-2.0
//
// What kernels are written with, for two compilers.  nvcc: CUDA as it is.  A C++ compiler: the same source runs on the
// CPU, where tests/cuda/host.h gives threadIdx, __syncthreads, shuffles, atomics and asynchronous copies, a fiber per
// thread, so that every kernel can be compared with `ref` without a device.
//
// Arithmetic: contraction is off (-fmad=false); fmaf is written where the contract of kernels.h says fused, dsv4_mad
// where the product is exact, so that fused and separate give the same bits.
#pragma once

#include "functions.h"
#include "launches.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#define DSV4_DEVICE static __device__ __forceinline__
// A kernel: its name, the type of its one argument `a`, threads in a block, blocks a multiprocessor shall hold.
#define DSV4_KERNEL(name, type, threads, blocks)                                                                       \
    static __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ type a)
// An object shared by the threads of a block; static, so that ptxas reports its size.
#define DSV4_SHARED(type, name) __shared__ type name

#define DSV4_LAUNCH(kernel, grid, threads, stream, args)                                                               \
    do {                                                                                                               \
        kernel<<<grid, threads, 0, (cudaStream_t)(stream)>>>(args);                                                    \
        cudaError_t launch_code = cudaGetLastError();                                                                  \
        if (launch_code != cudaSuccess)                                                                                \
            return launch_code;                                                                                        \
    } while (0)

DSV4_DEVICE float dsv4_mad(float a, float b, float c) {
    return __fmaf_rn(a, b, c);
}

// The f32 of an IEEE half, every bit pattern.
DSV4_DEVICE float dsv4_half_to_f32(uint32_t h) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((uint16_t)h));
    return x;
}

// 16 bytes from global to shared memory, both aligned, behind the thread's back until dsv4_copy_wait.
DSV4_DEVICE void dsv4_copy16(void *shared, const void *global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(shared)),
                 "l"(global)
                 : "memory");
}
DSV4_DEVICE void dsv4_copy_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most `left` of the groups this thread committed are under way.
template <int left> DSV4_DEVICE void dsv4_copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}


// d += A B for a warp, A 16 x 16 and B 16 x 8 of bf16; fragments as PTX has them for mma.m16n8k16.
DSV4_DEVICE void dsv4_mma(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// x, of which the compiler knows nothing.
DSV4_DEVICE unsigned dsv4_opaque(unsigned x) {
    asm volatile("" : "+r"(x));
    return x;
}

// The products of two pairs of bf16.
DSV4_DEVICE uint32_t dsv4_mul_bf16x2(uint32_t a, uint32_t b) {
    uint32_t product;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u)); // plus -0: nothing
    return product;
}

#define DSV4_TICKET(ticket) // known on the host alone, where all must be zero after a launch

#else
#include "host.h"
#define DSV4_TICKET(ticket) dsv4_host_ticket(ticket)
#endif

// To look at bytes in larger pieces than they were written in.
typedef uint16_t __attribute__((may_alias)) dsv4_word16;
typedef uint32_t __attribute__((may_alias)) dsv4_word32;
typedef float __attribute__((may_alias)) dsv4_word_f32;

#define DSV4_FULL_WARP 0xffffffffu
#define DSV4_INF dsv4_f32_from_bits(DSV4_INF_BITS)

// ---------------------------------------------------------------------------------------------------- small helpers

DSV4_DEVICE float dsv4_low_bf16(uint32_t pair) {
    return dsv4_f32_from_bits(pair << 16);
}

DSV4_DEVICE float dsv4_high_bf16(uint32_t pair) {
    return dsv4_f32_from_bits(pair & 0xffff0000u);
}

// Two values that are bf16, the first in the low half.
DSV4_DEVICE uint32_t dsv4_pair_bf16(float low, float high) {
    return dsv4_f32_bits(low) >> 16 | (dsv4_f32_bits(high) & 0xffff0000u);
}

// Two bf16 as operands (rule 2), the first in the low half.
DSV4_DEVICE uint32_t dsv4_pair_operands(dsv4_bf16 low, dsv4_bf16 high) {
    return (uint32_t)dsv4_bf16_operand(low) | (uint32_t)dsv4_bf16_operand(high) << 16;
}

DSV4_DEVICE float dsv4_round_bf16(float x) {
    return dsv4_bf16_to_f32(dsv4_f32_to_bf16(x));
}

// The tree of rule 1 over 16 neighbouring lanes of a warp; the sum is right in the first of them.
DSV4_DEVICE float dsv4_lane_tree(float lane) {
    lane = lane + __shfl_xor_sync(DSV4_FULL_WARP, lane, 8);
    lane = lane + __shfl_xor_sync(DSV4_FULL_WARP, lane, 4);
    lane = lane + __shfl_xor_sync(DSV4_FULL_WARP, lane, 2);
    return lane + __shfl_xor_sync(DSV4_FULL_WARP, lane, 1);
}

DSV4_DEVICE uint32_t dsv4_warp_max(uint32_t x) {
    for (int step = 16; step > 0; step /= 2) {
        uint32_t other = __shfl_xor_sync(DSV4_FULL_WARP, x, step);
        x = other > x ? other : x;
    }
    return x;
}

// ------------------------------------------------------------------------------------- what follows in the same launch

// Adds the block's `parts` to a ticket that is complete with `all`, and tells whether they were the last: then this block
// sees what the others wrote before theirs, and the ticket is zero again for the next launch.  No block waits for another.
// All threads of the block.
DSV4_DEVICE int dsv4_last_part(int32_t *ticket, int32_t parts, int32_t all) {
    int last = 0;
    DSV4_TICKET(ticket);
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence(); // what the block wrote, before its parts; the barrier has brought it to this thread
        last = atomicAdd(ticket, parts) == all - parts;
        if (last)
            *ticket = 0;
        __threadfence(); // the others' parts, before what is read now
    }
    return __syncthreads_or(last);
}

static inline unsigned dsv4_blocks(size_t n, size_t each) {
    return (unsigned)((n + each - 1) / each);
}
