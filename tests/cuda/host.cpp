// SPDX-License-Identifier: Apache-2.0
// The scheduler of host.h.
#include "host.h"

#include <numeric>
#include <set>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

enum { WARP = 32, MAX_THREADS = 1024, STACK_BYTES = 64 << 10, SHARED_BYTES = 48 << 10 };
enum state : unsigned char { READY, AT_BLOCK, AT_WARP, AT_MMA, DONE };

struct copy {
    void *to;
    const void *from;
    int group;
};

// The compiler's own jumps: those of the library cost several times as much, and swapping contexts asks the kernel for
// signal masks.
typedef void *jump[5];

// Not in a function that is jumped to.
[[noreturn]] __attribute__((noipa)) void go(void **to) {
    __builtin_longjmp(to, 1);
}

struct fiber {
    jump stopped;
    bool started; // for good: it goes from one block to the next, of whatever launch
    size_t shared_at;
    unsigned exchanges, votes;
    int group;
    std::vector<copy> copies;
    float *d; // fragments of an mma
    const uint32_t *a, *b;
};

fiber fibers[MAX_THREADS];
state states[MAX_THREADS];
unsigned char *stacks;
jump scheduler;
size_t shared_used; // of this block, at most
unsigned current, n_threads;
uint64_t slots[MAX_THREADS / WARP][2][WARP];
int votes[2][MAX_THREADS];
std::set<const int32_t *> tickets; // of the launch
alignas(64) unsigned char shared[SHARED_BYTES];
void (*kernel_body)(const void *);
const void *kernel_args;
const char *kernel_name;
unsigned launches;
bool late_copies;

[[noreturn]] void fail(const char *what) {
    fprintf(stderr, "%s, block %u %u %u, thread %u: %s\n", kernel_name, blockIdx.x, blockIdx.y, blockIdx.z, current,
            what);
    exit(1);
}

__attribute__((noinline)) void pause(state s) {
    states[current] = s;
    if (!__builtin_setjmp(fibers[current].stopped))
        go(scheduler);
}

void body() {
    for (;;) {
        kernel_body(kernel_args);
        if (!fibers[current].copies.empty())
            fail("ended with an asynchronous copy under way");
        pause(DONE);
    }
}

[[noreturn]] void start(unsigned t) {
    ucontext_t context;
    fibers[t].started = true;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + (size_t)t * STACK_BYTES;
    context.uc_stack.ss_size = STACK_BYTES;
    context.uc_link = nullptr;
    makecontext(&context, body, 0);
    setcontext(&context);
    abort();
}

__attribute__((noinline)) void resume(unsigned t) {
    current = t;
    threadIdx = dim3(t);
    if (__builtin_setjmp(scheduler))
        return;
    if (fibers[t].started)
        go(fibers[t].stopped);
    start(t);
}

// Lets the threads [first, end) that wait at `s` go on if all of them do.
bool release(unsigned first, unsigned end, state s) {
    for (unsigned t = first; t < end; t++)
        if (states[t] != s)
            return false;
    memset(states + first, READY, end - first);
    return true;
}

float pair_half(uint32_t pair, int half) {
    uint32_t bits = half ? pair & 0xffff0000u : pair << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// `x` without the bits below 2^exponent.
double cut(double x, int exponent) {
    return scalbn(trunc(scalbn(x, -exponent)), exponent);
}

float cut_sum(float c, const float *a, const float *b) {
    double terms[17] = {c}, largest = fabs((double)c), sum = 0;
    for (int k = 0; k < 16; k++) {
        terms[k + 1] = (double)a[k] * b[k];
        largest = fmax(largest, fabs(terms[k + 1]));
    }
    if (largest == 0)
        return c;
    double unit = scalbn(1.0, ilogb(largest) + 1 - dsv4_host_mma_bits), per = 1 / unit;
    for (double term : terms)
        sum += trunc(term * per);
    return sum == 0 ? 0.0f : (float)(cut(sum, ilogb(sum) + 1 - dsv4_host_mma_bits) * unit);
}

// Lane (g, q) = 4 g + q: a 0..3 are rows g, g + 8, g, g + 8, columns 2q, 2q, 2q + 8, 2q + 8 and the next; b 0..1 rows 2q,
// 2q + 8 and the next of column g; d 0..3 are (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1).
bool multiply(unsigned first) {
    float a[16][16], b[8][16];
    if (!release(first, first + WARP, AT_MMA))
        return false;
    for (unsigned lane = 0; lane < WARP; lane++) {
        const fiber &f = fibers[first + lane];
        unsigned g = lane / 4, q = lane % 4;
        for (int half = 0; half < 2; half++) {
            for (unsigned i = 0; i < 4; i++)
                a[g + i % 2 * 8][2 * q + i / 2 * 8 + (unsigned)half] = pair_half(f.a[i], half);
            for (unsigned i = 0; i < 2; i++)
                b[g][2 * q + i * 8 + (unsigned)half] = pair_half(f.b[i], half);
        }
    }
    for (unsigned lane = 0; lane < WARP; lane++)
        for (unsigned i = 0; i < 4; i++) {
            float *d = &fibers[first + lane].d[i];
            const float *x = a[lane / 4 + i / 2 * 8], *y = b[2 * (lane % 4) + i % 2];
            float sum = *d;
            for (int k = 0; k < 16; k++)
                sum += x[k] * y[k];
            *d = dsv4_host_mma_bits && isfinite(sum) ? cut_sum(*d, x, y) : sum;
        }
    return true;
}

void run_warp(unsigned first, unsigned turn) {
    do
        for (unsigned i = 0; i < WARP; i++) {
            unsigned t = first + (turn % 3 == 0 ? i : turn % 3 == 1 ? WARP - 1 - i : (i * 13 + turn) % WARP);
            if (states[t] == READY)
                resume(t);
        }
    while (release(first, first + WARP, AT_WARP) || multiply(first));
}

void run_block(unsigned turn) {
    memset(shared, 0xff, shared_used);
    shared_used = 0;
    for (unsigned t = 0; t < n_threads; t++) {
        states[t] = READY;
        fibers[t].shared_at = fibers[t].exchanges = fibers[t].votes = 0;
        fibers[t].group = 0;
    }
    do
        for (unsigned i = 0, n = n_threads / WARP; i < n; i++)
            run_warp((turn % 2 ? n - 1 - i : i) * WARP, turn);
    while (release(0, n_threads, AT_BLOCK));
    for (current = 0; current < n_threads; current++)
        if (states[current] != DONE)
            fail("waits at a barrier that others do not reach");
}

} // namespace

int dsv4_host_mma_bits;

void dsv4_host_mma(float *d, const uint32_t *a, const uint32_t *b) {
    fiber &f = fibers[current];
    f.d = d;
    f.a = a;
    f.b = b;
    pause(AT_MMA);
}

void __syncthreads() {
    pause(AT_BLOCK);
}

int __syncthreads_or(int predicate) {
    int *all = votes[fibers[current].votes++ % 2], any = 0;
    all[current] = predicate;
    pause(AT_BLOCK);
    for (unsigned t = 0; t < n_threads; t++)
        any |= all[t];
    return any != 0;
}

unsigned dsv4_host_launches() {
    return launches;
}

void dsv4_host_ticket(const int32_t *ticket) {
    tickets.insert(ticket);
}

const uint64_t *dsv4_host_exchange(uint64_t value) {
    fiber &f = fibers[current];
    uint64_t *all = slots[current / WARP][f.exchanges++ % 2]; // two: a fast lane may already write the next one
    all[current % WARP] = value;
    pause(AT_WARP);
    return all;
}

void *dsv4_host_shared(size_t bytes) {
    fiber &f = fibers[current];
    void *p = shared + f.shared_at;
    f.shared_at += (bytes + 15) / 16 * 16;
    if (f.shared_at > SHARED_BYTES)
        fail("more than 48 KB of shared memory");
    if (f.shared_at > shared_used)
        shared_used = f.shared_at;
    return p;
}

void dsv4_host_copy16(void *to, const void *from) {
    if ((uintptr_t)to % 16 || (uintptr_t)from % 16)
        fail("an asynchronous copy that is not aligned");
    if (late_copies)
        fibers[current].copies.push_back({to, from, fibers[current].group});
    else
        memcpy(to, from, 16);
}

void dsv4_host_copy_commit() {
    fibers[current].group++;
}

void dsv4_host_copy_wait(int left) {
    fiber &f = fibers[current];
    size_t n = 0;
    for (const copy &c : f.copies)
        if (c.group < f.group - left)
            memcpy(c.to, c.from, 16);
        else
            f.copies[n++] = c;
    f.copies.resize(n);
}

int dsv4_host_launch(void *stream, const dsv4_host_node &launch) {
    dim3 grid = launch.grid;
    unsigned threads = launch.threads;
    kernel_name = launch.name;
    if (threads % WARP || threads > MAX_THREADS || !threads)
        fail("threads of a block are not whole warps");
    if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535)
        fail("a grid that is empty or too large");
    if (stream && ((dsv4_host_stream *)stream)->capturing) {
        ((dsv4_host_stream *)stream)->nodes.push_back(launch);
        return 0;
    }
    if (!stacks) {
        stacks = (unsigned char *)malloc((size_t)MAX_THREADS * STACK_BYTES);
        memset(shared, 0xff, sizeof shared);
    }
    kernel_body = launch.body;
    kernel_args = launch.args.data();
    n_threads = threads;
    gridDim = grid;
    blockDim = dim3(threads);
    unsigned turn = launches++;
    late_copies = turn / 4 % 2;
    unsigned n_block = grid.x * grid.y * grid.z, stride = 1;
    while (turn % 4 == 3 && (stride < n_block / 3 || std::gcd(stride, n_block) > 1))
        stride++; // every block once, far from the one before
    for (unsigned i = 0; i < n_block; i++) {
        unsigned at = turn % 4 == 2 ? n_block - 1 - i : (unsigned)((uint64_t)i * stride % n_block);
        blockIdx = dim3(at % grid.x, at / grid.x % grid.y, at / grid.x / grid.y);
        run_block(turn + blockIdx.x);
    }
    for (const int32_t *ticket : tickets)
        if (*ticket)
            fail("left a ticket that is not zero");
    tickets.clear();
    return 0;
}
