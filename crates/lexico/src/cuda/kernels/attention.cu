// Attention of one new position of each sequence over its codes and its dense window.
//
// M: the head dim, a multiple of 16. G: queries of a KV head, up to 8. FORMAT: how codes are stored. MEANS: whether
// `scores` hold what those of coded positions lack (see means.cu). In order: project, score, accumulate, combine, finish.

const int THREADS = 256;

// What every kernel takes, though none uses all. held [pairs]: what each KV head has; key_atoms [key_count, M], value_atoms
// [value_count, M], halves; queries [pairs, G, M], scaled by 1/√m; room: positions of a pair in `scores`; parts: those of the
// codes; each: atoms of a slice. The other arrays are described where they are written.
#define ARGUMENTS                                                                                                                      \
    const Pair *held, int pairs, const u16 *key_atoms, int key_count, const u16 *value_atoms, int value_count, const float *queries,   \
        u16 *products, float *scores, int room, float *maxima, int parts, float *accumulated, float *totals, int each, int slices,     \
        float *outputs, float *out

// products[pair][atom][G], halves: the product of each atom with each query. A block: 64 atoms, four warps of 16, and all
// pairs of its slice of the grid.
extern "C" __global__ void __launch_bounds__(128)
project(ARGUMENTS) {
    SHARED __align__(16) u16 columns[8 * (M + 8)];
    const int SLICES = M / 16;
    int first = blockIdx.x * 64 + warp() * 16;
    u32 rows[SLICES][4];
    UNROLL
    for (int slice = 0; slice < SLICES; ++slice) {
        UNROLL
        for (int part = 0; part < 4; ++part) {
            int atom = first + lane() / 4 + part % 2 * 8;
            rows[slice][part] =
                atom < key_count ? *(const u32 *)&key_atoms[(size_t)atom * M + slice * 16 + lane() % 4 * 2 + part / 2 * 8] : 0;
        }
    }
    int all = pairs * G;
    for (int start = blockIdx.y * 8; start < all; start += gridDim.y * 8) {
        __syncthreads();
        for (int i = threadIdx.x; i < 8 * M; i += blockDim.x) {
            int column = i / M, k = i % M;
            columns[column * (M + 8) + k] = to_half(start + column < all ? queries[(size_t)(start + column) * M + k] : 0.0f);
        }
        __syncthreads();
        float sums[4] = {0, 0, 0, 0};
        const u16 *own = &columns[lane() / 4 * (M + 8) + lane() % 4 * 2];
        multiply_all(sums, rows, own);
        UNROLL
        for (int j = 0; j < 4; ++j) {
            int atom = first + lane() / 4 + j / 2 * 8, column = start + lane() % 4 * 2 + j % 2;
            if (atom < key_count && column < all)
                products[((size_t)(column / G) * key_count + atom) * G + column % G] = to_half(sums[j]);
        }
    }
}
KERNEL(project)

// The products of an atom with the queries of a pair, added up.
struct Sums {
    float of[G];
};

__device__ inline void add_products(Sums &sums, float c, const u16 *products) {
    if (G != 2 && G != 4 && G != 8) {
        UNROLL
        for (int g = 0; g < G; ++g) sums.of[g] += c * from_half(products[g]);
        return;
    }
    // As wide as may be: one look-up gives all queries.
    u32 words[4];
    if (G == 2) words[0] = *(const u32 *)products;
    if (G >= 4) {
        UNROLL
        for (int half = 0; half < G / 4; ++half) {
            u64 four = ((const u64 *)products)[half];
            words[2 * half] = (u32)four;
            words[2 * half + 1] = (u32)(four >> 32);
        }
    }
    UNROLL
    for (int g = 0; g < G; ++g) sums.of[g] += c * from_half((u16)(words[g / 2] >> 16 * (g % 2)));
}

// The largest of each query over a block, in every thread. `room`: [G * warps].
__device__ inline void block_max(Sums &largest, float *room) {
    int warps = blockDim.x / WARP;
    UNROLL
    for (int g = 0; g < G; ++g) {
        float top = warp_max(largest.of[g]);
        if (lane() == 0) room[g * warps + warp()] = top;
    }
    __syncthreads();
    UNROLL
    for (int g = 0; g < G; ++g) {
        float top = room[g * warps];
        for (int w = 1; w < warps; ++w) top = fmaxf(top, room[g * warps + w]);
        largest.of[g] = top;
    }
    __syncthreads();
}

__device__ inline void block_sum(Sums &sums, float *room) {
    int warps = blockDim.x / WARP;
    UNROLL
    for (int g = 0; g < G; ++g) {
        float sum = warp_sum(sums.of[g]);
        if (lane() == 0) room[g * warps + warp()] = sum;
    }
    __syncthreads();
    UNROLL
    for (int g = 0; g < G; ++g) {
        float sum = 0.0f;
        for (int w = 0; w < warps; ++w) sum += room[g * warps + w];
        sums.of[g] = sum;
    }
    __syncthreads();
}

// scores[pair][room][G]: of coded positions that are seen, then of the window's; and the largest of each part, maxima[pair][parts + 1][G]. Part
// `parts` of a pair is its window. Grid: (parts + 1, pairs). Shared: the products of a pair.
extern "C" __global__ void __launch_bounds__(THREADS)
score(ARGUMENTS) {
    extern __shared__ __align__(16) u8 shared[];
    SHARED float reduced[G * THREADS / WARP];
    const Pair &pair = held[blockIdx.y];
    int part = blockIdx.x;
    float *own = scores + (size_t)blockIdx.y * room * G;
    Sums largest;
    UNROLL
    for (int g = 0; g < G; ++g) largest.of[g] = nothing();
    if (part < parts) {
        u16 *table = (u16 *)shared;
        const u16 *from = products + (size_t)blockIdx.y * key_count * G;
        // Products of every pair begin at whole words where there is an even number of them.
        if (key_count * G % 2 == 0)
            for (int i = threadIdx.x; i < key_count * G / 2; i += THREADS) ((u32 *)table)[i] = ((const u32 *)from)[i];
        else
            for (int i = threadIdx.x; i < key_count * G; i += THREADS) table[i] = from[i];
        __syncthreads();
        int coded = pair.coded - pair.hidden, end = (int)((long long)coded * (part + 1) / parts);
        for (int t = (int)((long long)coded * part / parts) + threadIdx.x; t < end; t += THREADS) {
            Sums sums;
            UNROLL
            for (int g = 0; g < G; ++g) sums.of[g] = 0.0f;
            float scale = visit_code(pair.keys, pair.hidden + t, [&](int atom, float c) { add_products(sums, c, &table[atom * G]); });
            UNROLL
            for (int g = 0; g < G; ++g) {
                float found = sums.of[g] * scale + (MEANS ? own[(size_t)t * G + g] : 0.0f);
                own[(size_t)t * G + g] = found;
                largest.of[g] = fmaxf(largest.of[g], found);
            }
        }
    } else {
        const float *query = queries + (size_t)blockIdx.y * G * M;
        for (int t = warp(); t < pair.window; t += THREADS / WARP) {
            UNROLL
            for (int g = 0; g < G; ++g) {
                float sum = 0.0f;
                const u16 *key = pair.window_keys + window_place(pair, t);
                for (int k = lane(); k < M; k += WARP) sum += query[g * M + k] * from_half(key[k]);
                sum = warp_sum(sum);
                if (lane() == 0) own[(size_t)(pair.coded - pair.hidden + t) * G + g] = sum;
                largest.of[g] = fmaxf(largest.of[g], sum);
            }
        }
    }
    block_max(largest, reduced);
    if (threadIdx.x < G) {
        float top = largest.of[0];
        UNROLL
        for (int g = 1; g < G; ++g) top = threadIdx.x == g ? largest.of[g] : top;
        maxima[((size_t)blockIdx.y * gridDim.x + part) * G + threadIdx.x] = top;
    }
}
KERNEL(score)

// The largest score of each query of a pair; 0 where nothing is seen.
__device__ inline Sums references(const float *maxima, int pair, int parts) {
    Sums largest;
    UNROLL
    for (int g = 0; g < G; ++g) {
        largest.of[g] = nothing();
        for (int part = 0; part < parts; ++part)
            largest.of[g] = fmaxf(largest.of[g], maxima[((size_t)pair * parts + part) * G + g]);
        if (largest.of[g] == nothing()) largest.of[g] = 0.0f;
    }
    return largest;
}

// The largest magnitude that a coefficient can have, before its scale.
__device__ inline float max_coefficient() { return FORMAT == ADDITIVE ? 1.0f : FORMAT == I8 ? 128.0f : 448.0f; }

__device__ inline float scale_of(const Head &head, int position) {
    const u8 *page = head.pages[position / PAGE];
    int at = position % PAGE, bytes = record_bytes(FORMAT, head.sparsity);
    if (FORMAT != ADDITIVE) return power(record_byte(page, bytes, bytes - 1, at));
    return additive_scale(record_byte(page, bytes, 0, at) | record_byte(page, bytes, 1, at) << 8);
}

// accumulated[part][pair][G][atoms]: the weighted codes of a part's values; totals[part][pair][G]: its weights' sum. Sums are
// made in whole numbers, which shared memory adds at once where it takes turns for floats, and which come out the same in
// whatever order: in steps of what all terms together can be at the most, over 2^30. Grid: (parts, pairs). Shared: the sums.
extern "C" __global__ void __launch_bounds__(THREADS)
accumulate(ARGUMENTS) {
    extern __shared__ __align__(16) u8 shared[];
    SHARED float reduced[G * THREADS / WARP];
    int *table = (int *)shared;
    const Pair &pair = held[blockIdx.y];
    int part = blockIdx.x;
    const float *own = scores + (size_t)blockIdx.y * room * G;
    Sums reference = references(maxima, blockIdx.y, parts + 1);
    for (int i = threadIdx.x; i < G * value_count; i += THREADS) table[i] = 0;
    int coded = pair.coded - pair.hidden;
    int start = (int)((long long)coded * part / parts), end = (int)((long long)coded * (part + 1) / parts);
    Sums total, bound;
    UNROLL
    for (int g = 0; g < G; ++g) total.of[g] = bound.of[g] = 0.0f;
    for (int t = start + threadIdx.x; t < end; t += THREADS) {
        float scale = scale_of(pair.values, pair.hidden + t);
        UNROLL
        for (int g = 0; g < G; ++g) {
            float weight = expf(own[(size_t)t * G + g] - reference.of[g]);
            total.of[g] += weight;
            bound.of[g] += weight * scale;
        }
    }
    block_sum(total, reduced);
    block_sum(bound, reduced);
    Sums steps, inverse;
    UNROLL
    for (int g = 0; g < G; ++g) {
        steps.of[g] = bound.of[g] * max_coefficient() / (float)(1 << 30);
        inverse.of[g] = steps.of[g] > 0.0f ? 1.0f / steps.of[g] : 0.0f;
    }
    for (int t = start + threadIdx.x; t < end; t += THREADS) {
        float scale = scale_of(pair.values, pair.hidden + t);
        float weights[G];
        UNROLL
        for (int g = 0; g < G; ++g) weights[g] = expf(own[(size_t)t * G + g] - reference.of[g]) * scale * inverse.of[g];
        visit_code(pair.values, pair.hidden + t, [&](int atom, float c) {
            UNROLL
            for (int g = 0; g < G; ++g) atomicAdd(&table[g * value_count + atom], __float2int_rn(c * weights[g]));
        });
    }
    __syncthreads();
    float *sums = accumulated + ((size_t)part * gridDim.y + blockIdx.y) * G * value_count;
    UNROLL
    for (int g = 0; g < G; ++g)
        for (int i = threadIdx.x; i < value_count; i += THREADS)
            sums[g * value_count + i] = (float)table[g * value_count + i] * steps.of[g];
    if (threadIdx.x == 0) {
        UNROLL
        for (int g = 0; g < G; ++g) totals[((size_t)part * gridDim.y + blockIdx.y) * G + g] = total.of[g];
    }
}
KERNEL(accumulate)

// outputs[slice][pair][G][M]: the accumulated codes of a slice of `each` atoms, times these. Grid: (slices, pairs); a thread a
// column. Shared: [G][each] floats.
extern "C" __global__ void __launch_bounds__(M)
combine(ARGUMENTS) {
    extern __shared__ __align__(16) u8 shared[];
    float *own = (float *)shared;
    int first = blockIdx.x * each, here = min(each, value_count - first);
    for (int i = threadIdx.x; i < G * here; i += M) {
        int g = i / here, atom = i % here;
        float sum = 0.0f;
        for (int part = 0; part < parts; ++part)
            sum += accumulated[(((size_t)part * gridDim.y + blockIdx.y) * G + g) * value_count + first + atom];
        own[g * each + atom] = sum;
    }
    __syncthreads();
    Sums sums;
    UNROLL
    for (int g = 0; g < G; ++g) sums.of[g] = 0.0f;
    for (int atom = 0; atom < here; ++atom) {
        float number = from_half(value_atoms[(size_t)(first + atom) * M + threadIdx.x]);
        UNROLL
        for (int g = 0; g < G; ++g) sums.of[g] += own[g * each + atom] * number;
    }
    UNROLL
    for (int g = 0; g < G; ++g)
        outputs[(((size_t)blockIdx.x * gridDim.y + blockIdx.y) * G + g) * M + threadIdx.x] = sums.of[g];
}
KERNEL(combine)

// out[pair][G][M]: the slices' sum and the window's weighted rows, over the sum of all weights. Grid: pairs; a thread a column.
extern "C" __global__ void __launch_bounds__(M)
finish(ARGUMENTS) {
    const Pair &pair = held[blockIdx.x];
    Sums reference = references(maxima, blockIdx.x, parts + 1);
    Sums sums, total;
    UNROLL
    for (int g = 0; g < G; ++g) {
        sums.of[g] = total.of[g] = 0.0f;
        for (int part = 0; part < parts; ++part) total.of[g] += totals[((size_t)part * gridDim.x + blockIdx.x) * G + g];
        for (int slice = 0; slice < slices; ++slice)
            sums.of[g] += outputs[(((size_t)slice * gridDim.x + blockIdx.x) * G + g) * M + threadIdx.x];
    }
    const float *own = scores + ((size_t)blockIdx.x * room + pair.coded - pair.hidden) * G;
    for (int t = 0; t < pair.window; ++t) {
        float value = from_half(pair.window_values[window_place(pair, t) + threadIdx.x]);
        UNROLL
        for (int g = 0; g < G; ++g) {
            float weight = expf(own[(size_t)t * G + g] - reference.of[g]);
            total.of[g] += weight;
            sums.of[g] += weight * value;
        }
    }
    UNROLL
    for (int g = 0; g < G; ++g)
        out[((size_t)blockIdx.x * G + g) * M + threadIdx.x] = total.of[g] > 0.0f ? sums.of[g] / total.of[g] : 0.0f;
}
KERNEL(finish)
