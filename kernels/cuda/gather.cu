// SPDX-License-Identifier: Apache-2.0
//
// Rows that lie all over the device into one block, so that they go to the host as one copy.  Contract: launches.h.
#include "device.cuh"

enum { COPY_THREADS = 128 };

typedef uint64_t __attribute__((may_alias)) dsv4_word64;

template <class Word> DSV4_DEVICE void copy_words(uint8_t *to, const uint8_t *from, uint32_t bytes) {
    for (uint32_t i = threadIdx.x; i < bytes / (uint32_t)sizeof(Word); i += COPY_THREADS)
        ((Word *)to)[i] = ((const Word *)from)[i];
}

// A block takes every gridDim.x-th copy: how many there are is known on the device alone.
DSV4_KERNEL(gather_kernel, struct dsv4_cuda_gather_args, COPY_THREADS, 1) {
    int32_t n = *a.n_copy;
    for (int32_t i = (int32_t)blockIdx.x; i < n; i += (int32_t)gridDim.x) {
        const struct dsv4_cuda_copy c = a.copies[i];
        uint8_t *to = a.out + c.to;
        const uint8_t *from = (const uint8_t *)c.from;
        uintptr_t all = (uintptr_t)to | (uintptr_t)from | c.bytes;
        if (all % 16 == 0)
            copy_words<uint4>(to, from, c.bytes);
        else if (all % 8 == 0)
            copy_words<dsv4_word64>(to, from, c.bytes);
        else if (all % 4 == 0)
            copy_words<dsv4_word32>(to, from, c.bytes);
        else
            copy_words<uint8_t>(to, from, c.bytes);
    }
}

int dsv4_cuda_gather(const struct dsv4_cuda_gather_args *a, void *stream) {
    if (a->n_block)
        DSV4_LAUNCH(gather_kernel, (unsigned)a->n_block, COPY_THREADS, stream, *a);
    return 0;
}
