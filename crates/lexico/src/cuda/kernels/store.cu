// Codes that a search has found, into pages as codes.cuh has them: a thread a vector. Vectors lie head by head, `each` of a head.

struct Target {
    u8 *const *pages;
    // The position of the first vector.
    int start;
    // Atoms of a vector.
    int sparsity;
};

struct Record {
    u8 *page;
    int bytes, at;
    __device__ void put(int byte, u32 value) { *record_place(page, bytes, byte, at) = (u8)value; }
};

__device__ inline Record record_of(const Target &target, int vector, int bytes) {
    int position = target.start + vector;
    return Record{target.pages[position / PAGE], bytes, position % PAGE};
}

// paths [count, most]: the numbers of each vector's atoms within their groups; scales [count]: the numbers of their scales.
extern "C" __global__ void store_additive(const Target *targets, int each, int count, int most, const u16 *paths, const u8 *scales) {
    for (int v = blockIdx.x * blockDim.x + threadIdx.x; v < count; v += gridDim.x * blockDim.x) {
        const Target &target = targets[v / each];
        Record record = record_of(target, v % each, target.sparsity + 1);
        u32 leading = paths[(size_t)v * most] | (u32)scales[v] << ATOM_BITS;
        record.put(0, leading & 0xff);
        record.put(1, leading >> 8);
        for (int group = 1; group < target.sparsity; ++group) record.put(group + 1, paths[(size_t)v * most + group]);
    }
}
KERNEL(store_additive)

// The exponent of the smallest power of two under which `largest` is at most `limit`, as a byte with E8M0's bias.
__device__ inline u32 exponent_of(float largest, float limit) {
    if (largest == 0.0f) return 127;
    int exponent;
    // From half to one, and so the logarithm's floor is one less.
    double fraction = frexp((double)largest / limit, &exponent);
    if (fraction == 0.5) --exponent;
    return (u32)max(min(exponent + 127, 254), 0);
}

// To the nearest FP8 E4M3, ties to even; the magnitude is at most 448.
__device__ inline u32 to_f8(float x) {
    u32 bits = __float_as_uint(x), sign = bits >> 31 << 7;
    bits &= 0x7fffffff;
    if (bits < (127 - 6) << 23) return sign | (u32)rintf(fabsf(x) * 512.0f);
    bits += 0x7ffff + (bits >> 20 & 1);
    return sign | (u32)min((int)(bits >> 20) - ((127 - 7) << 3), 0x7e);
}

// indices, coefficients [count, most]: the first lengths[v] of each vector's are its code, which is filled up with zeros. Where
// `unbiased`, coefficients are scaled up by 1 / (1 − error²), as pursuit on the processor does. Indices are sorted in place.
extern "C" __global__ void store_sparse(const Target *targets, int each, int count, int most, u16 *indices, float *coefficients,
                                        const u8 *lengths, const float *errors, int unbiased) {
    for (int v = blockIdx.x * blockDim.x + threadIdx.x; v < count; v += gridDim.x * blockDim.x) {
        const Target &target = targets[v / each];
        int s = target.sparsity, length = min((int)lengths[v], s);
        u16 *own_indices = indices + (size_t)v * most;
        float *own = coefficients + (size_t)v * most;
        float error = fminf(errors[v], 0.95f), factor = unbiased ? 1.0f / (1.0f - error * error) : 1.0f, largest = 0.0f;
        for (int j = 0; j < s; ++j) {
            u16 index = j < length ? own_indices[j] : 0;
            float c = j < length ? fminf(fmaxf(own[j] * factor, -3.4028235e38f), 3.4028235e38f) : 0.0f;
            largest = fmaxf(largest, fabsf(c));
            int at = j;
            for (; at > 0 && own_indices[at - 1] > index; --at) {
                own_indices[at] = own_indices[at - 1];
                own[at] = own[at - 1];
            }
            own_indices[at] = index;
            own[at] = c;
        }
        u32 exponent = exponent_of(largest, FORMAT == I8 ? 127.0f : 448.0f);
        Record record = record_of(target, v % each, 3 * s + 1);
        record.put(3 * s, exponent);
        int fours = s / 4 * 4;
        for (int j = 0; j < s; ++j) {
            int first = j / 4 * 4, width = first < fours ? 4 : s - fours;
            float scaled = ldexpf(own[j], 127 - (int)exponent);
            u32 byte = FORMAT == I8 ? (u32)__float2int_rn(scaled) & 0xff : to_f8(scaled);
            record.put(3 * first + 2 * (j - first), own_indices[j] & 0xff);
            record.put(3 * first + 2 * (j - first) + 1, own_indices[j] >> 8);
            record.put(3 * first + 2 * width + j - first, byte);
        }
    }
}
KERNEL(store_sparse)
