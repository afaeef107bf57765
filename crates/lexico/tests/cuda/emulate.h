// A device on the host, so that the kernels' own text is tested where there is no GPU: blocks run one after the other, a block's
// threads as coroutines that take turns wherever they wait for each other.
#define EMULATED
#define UNROLL
#define SHARED static
#define __global__
#define __device__
#define __shared__
#define __align__(bytes)
#define __launch_bounds__(...)
#define __restrict__

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <tuple>
#include <vector>

struct Three {
    unsigned x, y, z;
};

static Three threadIdx, blockIdx, blockDim, gridDim;
alignas(128) unsigned char shared[232448];

namespace emulated {

// What some threads wait at until all have come.
struct Barrier {
    int size = 0, arrived = 0;
    uint64_t generation = 0;
};

const size_t STACK = 1 << 16;

// A thread of the block: begun on a stack of its own, then left and taken up again by jumps, which ask the system for nothing.
struct Thread {
    ucontext_t beginning;
    jmp_buf place;
    bool begun = false, done = false;
    // What it waits at, and until when.
    Barrier *barrier = nullptr;
    uint64_t generation = 0;
};

static jmp_buf scheduler;
static std::vector<Thread> threads;
static std::vector<std::vector<char>> stacks;
static size_t running;
static std::function<void()> body;
static Barrier block;
static std::vector<Barrier> warps;
// What the lanes of each warp show each other, and what the threads of a block do.
static std::vector<uint64_t> shown;
static int voted[2];

static void wait(Barrier &barrier) {
    uint64_t generation = barrier.generation;
    if (++barrier.arrived == barrier.size) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    threads[running].barrier = &barrier;
    threads[running].generation = generation;
    if (_setjmp(threads[running].place) == 0) _longjmp(scheduler, 1);
}

static void begin() {
    body();
    threads[running].done = true;
    _longjmp(scheduler, 1);
}

// Has thread `running` go on until it waits or ends.
static void resume() {
    if (_setjmp(scheduler) != 0) return;
    Thread &thread = threads[running];
    if (thread.begun) _longjmp(thread.place, 1);
    thread.begun = true;
    setcontext(&thread.beginning);
}

static void run_block(size_t count, size_t shared_bytes) {
    threads.assign(count, {});
    stacks.resize(count);
    block = Barrier{(int)count};
    warps.assign((count + 31) / 32, {});
    for (size_t w = 0; w < warps.size(); ++w) warps[w].size = (int)std::min<size_t>(32, count - 32 * w);
    shown.assign(count * 8, 0);
    voted[0] = voted[1] = 0;
    // Whatever was in shared memory before: a kernel must not count on zeros.
    memset(shared, 0xcb, shared_bytes);
    for (size_t t = 0; t < count; ++t) {
        stacks[t].resize(STACK);
        ucontext_t &beginning = threads[t].beginning;
        getcontext(&beginning);
        beginning.uc_stack = {stacks[t].data(), 0, STACK};
        beginning.uc_link = nullptr;
        makecontext(&beginning, begin, 0);
    }
    for (size_t left = count; left > 0;) {
        bool moved = false;
        for (size_t t = 0; t < count; ++t) {
            Thread &thread = threads[t];
            if (thread.done || (thread.barrier && thread.barrier->generation == thread.generation)) continue;
            running = t;
            threadIdx = {(unsigned)t, 0, 0};
            resume();
            moved = true;
            if (threads[t].done) --left;
        }
        // A thread that waits for one that has ended would wait for ever.
        if (!moved) {
            fprintf(stderr, "threads wait for each other\n");
            abort();
        }
    }
}

template <class... A> void launch(void (*kernel)(A...), const unsigned *shape, void **arguments) {
    std::tuple<A...> values;
    size_t next = 0;
    std::apply([&](auto &...value) { ((memcpy(&value, arguments[next++], sizeof value)), ...); }, values);
    body = [&] { std::apply(kernel, values); };
    gridDim = {shape[0], shape[1], shape[2]};
    blockDim = {shape[3], 1, 1};
    for (unsigned z = 0; z < shape[2]; ++z)
        for (unsigned y = 0; y < shape[1]; ++y)
            for (unsigned x = 0; x < shape[0]; ++x) {
                blockIdx = {x, y, z};
                run_block(shape[3], shape[4]);
            }
}

// What `value` of the lane `from(lane)` is.
template <class T> T exchange(T value, int from) {
    static_assert(sizeof(T) <= 8);
    size_t thread = running, first = thread / 32 * 32;
    memcpy(&shown[thread * 8], &value, sizeof value);
    wait(warps[thread / 32]);
    T found;
    memcpy(&found, &shown[(first + from) * 8], sizeof found);
    wait(warps[thread / 32]);
    return found;
}

} // namespace emulated

#define KERNEL(name) \
    extern "C" void launch_##name(const unsigned *shape, void **arguments) { emulated::launch(name, shape, arguments); }

inline void __syncthreads() { emulated::wait(emulated::block); }

inline void __syncwarp() { emulated::wait(emulated::warps[emulated::running / 32]); }

inline int __syncthreads_or(int any) {
    static int round = 0;
    emulated::voted[round] |= any;
    emulated::wait(emulated::block);
    int found = emulated::voted[round];
    emulated::wait(emulated::block);
    if (emulated::running == 0) {
        emulated::voted[round] = 0;
    }
    emulated::wait(emulated::block);
    return found != 0;
}

template <class T> T __shfl_xor_sync(unsigned, T value, int step) {
    return emulated::exchange(value, (int)(emulated::running % 32) ^ step);
}

template <class T> T __shfl_sync(unsigned, T value, int from) { return emulated::exchange(value, from % 32); }

inline unsigned __ballot_sync(unsigned, int yes) {
    unsigned all = 0;
    for (int lane = 0; lane < 32; ++lane) all |= (unsigned)(emulated::exchange(yes, lane) != 0) << lane;
    return all;
}

template <class T> T atomicAdd(T *at, T more) {
    T before = *at;
    *at += more;
    return before;
}

inline float __uint_as_float(unsigned x) {
    float y;
    memcpy(&y, &x, 4);
    return y;
}

inline unsigned __float_as_uint(float x) {
    unsigned y;
    memcpy(&y, &x, 4);
    return y;
}

inline int __float2int_rn(float x) { return (int)lrintf(x); }

inline int min(int a, int b) { return a < b ? a : b; }

inline int max(int a, int b) { return a > b ? a : b; }

inline float from_half(unsigned short x) {
    _Float16 half;
    memcpy(&half, &x, 2);
    return (float)half;
}

inline unsigned short to_half(float x) {
    _Float16 half = (_Float16)x;
    unsigned short bits;
    memcpy(&bits, &half, 2);
    return bits;
}

inline unsigned to_halves(float low, float high) { return to_half(low) | (unsigned)to_half(high) << 16; }

inline void multiply(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    using namespace emulated;
    size_t thread = running, first = thread / 32 * 32, lane = thread % 32;
    memcpy(&shown[thread * 8], a, sizeof a);
    memcpy((char *)&shown[thread * 8] + sizeof a, b, sizeof b);
    wait(warps[thread / 32]);
    auto half = [&](size_t from, int word, int k) {
        unsigned words[6];
        memcpy(words, &shown[(first + from) * 8], sizeof words);
        return from_half((unsigned short)(words[word] >> 16 * (k % 2)));
    };
    for (int j = 0; j < 4; ++j) {
        size_t row = lane / 4, column = lane % 4 * 2 + j % 2;
        for (int k = 0; k < 16; ++k) {
            float x = half(row * 4 + k % 8 / 2, (j / 2) + (k / 8) * 2, k);
            float y = half(column * 4 + k % 8 / 2, 4 + k / 8, k);
            sums[j] += x * y;
        }
    }
    wait(warps[thread / 32]);
}

inline void copy(void *to, const void *from) { memcpy(to, from, 16); }

inline void copies_end() {}

template <int LEFT> void copied() {}
