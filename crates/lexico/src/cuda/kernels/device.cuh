// What every kernel shares. No header of the toolkit is needed, so that NVRTC alone compiles it; tests compile the same
// text for the host, where tests/cuda/emulate.h stands in for the device.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

const u32 ALL = 0xffffffff;
const int WARP = 32;

#ifndef EMULATED
#define UNROLL _Pragma("unroll")
#define SHARED __shared__
// Every kernel is followed by this, so that where the device is emulated it can be found by its name.
#define KERNEL(name)

__device__ inline float from_half(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

__device__ inline u16 to_half(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

// Two halves in a word, `low` in its lower bits.
__device__ inline u32 to_halves(float low, float high) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

// sums[16, 8] += a[16, 16] b[16, 8] of halves in f32, spread over a warp as PTX has it: mma.m16n8k16, row by column.
__device__ inline void multiply(float (&sums)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Starts to copy 16 bytes from global to shared memory; `copied` waits for all that this thread started but the newest
// `LEFT` groups.
__device__ inline void copy(void *to, const void *from) {
    u32 at = (u32)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
}

__device__ inline void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int LEFT> __device__ inline void copied() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }
#endif

// A score below all others: minus infinity.
__device__ inline float nothing() { return __uint_as_float(0xff800000); }

__device__ inline int lane() { return threadIdx.x % WARP; }

__device__ inline int warp() { return threadIdx.x / WARP; }

// The sum over a warp, in every lane.
__device__ inline float warp_sum(float x) {
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step);
    return x;
}

__device__ inline float warp_max(float x) {
    for (int step = WARP / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, step));
    return x;
}

// sums[16, 8] += rows[16, 16 · SLICES] times the columns of which this lane's begins at `own`.
template <int SLICES> __device__ inline void multiply_all(float (&sums)[4], const u32 (&rows)[SLICES][4], const u16 *own) {
    UNROLL
    for (int slice = 0; slice < SLICES; ++slice) {
        u32 b[2] = {*(const u32 *)(own + slice * 16), *(const u32 *)(own + slice * 16 + 8)};
        multiply(sums, rows[slice], b);
    }
}
