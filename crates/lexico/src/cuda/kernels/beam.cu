// The beam search for additive codes, as encode/beam.rs makes it, of many vectors at once.
//
// M: the head dim, a multiple of 16. A warp follows BEAM sums of each of two vectors, whose residuals, as halves, are the 16 rows
// that it multiplies with the atoms of one codebook after another. Each lane keeps the best of what it sees; the best of all
// lanes are the sums to go on with.

const int BEAM = 8;
const int WARPS = 4;
const int THREADS = WARPS * WARP;
const int ROWS = 2 * BEAM;
const int VECTORS = 2 * WARPS;
const int TILE = 64;
const int STRIDE = M + 8;
const int SLICES = M / 16;
const int OWN = (M + WARP - 1) / WARP;
const int CODEBOOK = 256;
// What no sum gains.
const float WORST = -3e38f;

// The best that a lane has seen for one vector, in falling order: what the sum gains, and its beam and atom.
struct List {
    float gains[BEAM];
    u32 names[BEAM];
};

// `a` before `b`: equals in the order of beams and atoms, whatever lane saw them.
__device__ inline bool before(float gain, u32 name, float other, u32 other_name) {
    return gain > other || (gain == other && name < other_name);
}

__device__ inline void insert(List &list, float gain, u32 name) {
    if (!before(gain, name, list.gains[BEAM - 1], list.names[BEAM - 1])) return;
    list.gains[BEAM - 1] = gain;
    list.names[BEAM - 1] = name;
    UNROLL
    for (int i = BEAM - 1; i > 0; --i) {
        if (before(list.gains[i], list.names[i], list.gains[i - 1], list.names[i - 1])) {
            float held = list.gains[i];
            list.gains[i] = list.gains[i - 1];
            list.gains[i - 1] = held;
            u32 name = list.names[i];
            list.names[i] = list.names[i - 1];
            list.names[i - 1] = name;
        }
    }
}

// Takes the best of all lanes' lists off them.
__device__ inline void take(List &list, float &gain, u32 &name) {
    gain = list.gains[0];
    name = list.names[0];
    for (int step = WARP / 2; step > 0; step /= 2) {
        float other = __shfl_xor_sync(ALL, gain, step);
        u32 other_name = __shfl_xor_sync(ALL, name, step);
        if (before(other, other_name, gain, name)) {
            gain = other;
            name = other_name;
        }
    }
    if (list.gains[0] == gain && list.names[0] == name) {
        UNROLL
        for (int i = 0; i + 1 < BEAM; ++i) {
            list.gains[i] = list.gains[i + 1];
            list.names[i] = list.names[i + 1];
        }
        list.gains[BEAM - 1] = WORST;
        list.names[BEAM - 1] = ALL;
    }
}

__device__ inline void fetch(u16 *tile, float *losses, const u16 *atoms, const float *half_squares, int first, int end) {
    const int PARTS = M / 8;
    for (int i = threadIdx.x; i < TILE * PARTS; i += THREADS) {
        int atom = i / PARTS, part = i % PARTS;
        if (first + atom < end) copy(&tile[atom * STRIDE + part * 8], &atoms[(size_t)(first + atom) * M + part * 8]);
    }
    for (int i = threadIdx.x; i < TILE; i += THREADS) losses[i] = first + i < end ? half_squares[first + i] : 0.0f;
    copies_end();
}

// vectors [heads, each, M], each head with as many atoms as `sparsities` has, up to `max_atoms`; atoms [first + 256 · (max_atoms − 1), M],
// halves, and half the square of each. Of each vector: paths [count, max_atoms], the numbers of its atoms within their codebooks; scales
// [count], the number of the scale with which ⟨x, x̂⟩ = ‖x‖², or 0 unless `unbiased`; errors [count], the norm of what is
// left over its own.
extern "C" __global__ void __launch_bounds__(THREADS)
search(const float *vectors, int count, int each, const int *sparsities, int max_atoms, const u16 *atoms, u16 *paths, u8 *scales,
       float *errors, const float *half_squares, int first_size, int unbiased) {
    extern __shared__ __align__(16) u8 shared[];
    u16 *tiles = (u16 *)shared;
    float *losses = (float *)(tiles + 2 * TILE * STRIDE);
    float *residuals = losses + 2 * TILE;
    // Of each step and row, where it came from: the beam before it in the high bits, the atom in the low ones.
    u16 *history = (u16 *)(residuals + WARPS * ROWS * M);
    float *own_residuals = residuals + warp() * ROWS * M;
    u16 *own_history = history + warp() * ROWS;
    for (int start = blockIdx.x * VECTORS; start < count; start += gridDim.x * VECTORS) {
        int numbers[2], lengths[2], longest = 0;
        float units[2];
        for (int v = 0; v < VECTORS; ++v) {
            int number = start + v;
            if (number < count) longest = max(longest, sparsities[number / each]);
        }
        for (int half = 0; half < 2; ++half) {
            numbers[half] = start + warp() * 2 + half;
            bool there = numbers[half] < count;
            lengths[half] = there ? sparsities[numbers[half] / each] : 0;
            float own[OWN];
            for (int j = 0; j < OWN; ++j) {
                int at = lane() + j * WARP;
                own[j] = there && at < M ? vectors[(size_t)numbers[half] * M + at] : 0.0f;
            }
            for (int beam = 0; beam < BEAM; ++beam)
                for (int j = 0; j < OWN; ++j) {
                    int at = lane() + j * WARP;
                    if (at < M) own_residuals[(half * BEAM + beam) * M + at] = own[j];
                }
        }
        // What each row's sum has gained: ‖x‖² less what is left, halved.
        float gains[2] = {lane() / 4 == 0 ? 0.0f : WORST, lane() / 4 == 0 ? 0.0f : WORST};
        __syncwarp();
        int codebook_start = 0;
        for (int step = 0; step < longest; ++step) {
            int codebook_end = codebook_start + (step == 0 ? first_size : CODEBOOK);
            // A row's own power of two keeps its halves within their range, whatever the vector's size.
            u32 rows[SLICES][4];
            for (int half = 0; half < 2; ++half) {
                float largest = 0.0f;
                for (int i = lane(); i < BEAM * M; i += WARP) largest = fmaxf(largest, fabsf(own_residuals[half * BEAM * M + i]));
                largest = warp_max(largest);
                units[half] = largest > 0.0f ? largest : 1.0f;
            }
            UNROLL
            for (int slice = 0; slice < SLICES; ++slice) {
                UNROLL
                for (int part = 0; part < 4; ++part) {
                    float inverse = 1.0f / units[part % 2];
                    const float *own = &own_residuals[(lane() / 4 + part % 2 * BEAM) * M + slice * 16 + lane() % 4 * 2 + part / 2 * 8];
                    rows[slice][part] = to_halves(own[0] * inverse, own[1] * inverse);
                }
            }
            List lists[2];
            UNROLL
            for (int i = 0; i < BEAM; ++i) {
                lists[0].gains[i] = lists[1].gains[i] = WORST;
                lists[0].names[i] = lists[1].names[i] = ALL;
            }
            fetch(tiles, losses, atoms, half_squares, codebook_start, codebook_end);
            int buffer = 0;
            for (int first = codebook_start; first < codebook_end; first += TILE, buffer ^= 1) {
                if (first + TILE < codebook_end) {
                    int other = buffer ^ 1;
                    fetch(tiles + other * TILE * STRIDE, losses + other * TILE, atoms, half_squares, first + TILE, codebook_end);
                    copied<1>();
                } else {
                    copied<0>();
                }
                __syncthreads();
                const u16 *tile = tiles + buffer * TILE * STRIDE;
                for (int eight = 0; eight < TILE; eight += 8) {
                    float sums[4] = {0, 0, 0, 0};
                    const u16 *own = tile + (eight + lane() / 4) * STRIDE + lane() % 4 * 2;
                    multiply_all(sums, rows, own);
                    UNROLL
                    for (int j = 0; j < 4; ++j) {
                        int at = eight + lane() % 4 * 2 + j % 2;
                        if (first + at < codebook_end) {
                            float gain = gains[j / 2] + sums[j] * units[j / 2] - losses[buffer * TILE + at];
                            u32 name = (u32)(lane() / 4) << 16 | (u32)(first + at - codebook_start);
                            if (gains[j / 2] > WORST) insert(lists[j / 2], gain, name);
                        }
                    }
                }
                __syncthreads();
            }
            UNROLL
            for (int half = 0; half < 2; ++half) {
                u32 chosen[BEAM];
                float best = 0.0f;
                UNROLL
                for (int beam = 0; beam < BEAM; ++beam) {
                    float gain;
                    take(lists[half], gain, chosen[beam]);
                    if (lane() / 4 == beam) best = gain;
                }
                gains[half] = best;
                // All rows are read before the first is written.
                float left[BEAM][OWN];
                UNROLL
                for (int beam = 0; beam < BEAM; ++beam) {
                    bool found = chosen[beam] != ALL;
                    int parent = found ? chosen[beam] >> 16 : 0, atom = found ? chosen[beam] & 0xffff : 0;
                    for (int j = 0; j < OWN; ++j) {
                        int at = lane() + j * WARP;
                        left[beam][j] = at < M ? own_residuals[(half * BEAM + parent) * M + at] -
                                                     from_half(atoms[(size_t)(codebook_start + atom) * M + at])
                                               : 0.0f;
                    }
                    if (lane() == 0)
                        own_history[(size_t)step * WARPS * ROWS + half * BEAM + beam] = (u16)(parent << 11 | atom);
                }
                __syncwarp();
                UNROLL
                for (int beam = 0; beam < BEAM; ++beam)
                    for (int j = 0; j < OWN; ++j) {
                        int at = lane() + j * WARP;
                        if (at < M) own_residuals[(half * BEAM + beam) * M + at] = left[beam][j];
                    }
                __syncwarp();
                if (step + 1 == lengths[half]) {
                    // The first sum is the best: its path, from its end.
                    int number = numbers[half];
                    if (lane() == 0) {
                        int beam = 0;
                        for (int back = step; back >= 0; --back) {
                            u16 name = own_history[(size_t)back * WARPS * ROWS + half * BEAM + beam];
                            paths[(size_t)number * max_atoms + back] = name & 0x7ff;
                            beam = name >> 11;
                        }
                    }
                    float square = 0.0f, along = 0.0f, rest = 0.0f;
                    // In units of the largest, so that squares are numbers.
                    float largest = 0.0f;
                    for (int k = lane(); k < M; k += WARP) largest = fmaxf(largest, fabsf(vectors[(size_t)number * M + k]));
                    largest = warp_max(largest);
                    float inverse = largest > 0.0f ? 1.0f / largest : 0.0f;
                    for (int k = lane(); k < M; k += WARP) {
                        float x = vectors[(size_t)number * M + k] * inverse, r = own_residuals[half * BEAM * M + k] * inverse;
                        square += x * x;
                        along += x * (x - r);
                        rest += r * r;
                    }
                    square = warp_sum(square);
                    along = warp_sum(along);
                    rest = warp_sum(rest);
                    if (lane() == 0) {
                        float scale = unbiased && along > 0.0f ? rintf(log2f(square / along) * 32.0f) : 0.0f;
                        scales[number] = (u8)fminf(fmaxf(scale, 0.0f), 31.0f);
                        errors[number] = square > 0.0f ? sqrtf(rest / square) : 0.0f;
                    }
                    __syncwarp();
                }
            }
            codebook_start = codebook_end;
        }
        __syncthreads();
    }
}
KERNEL(search)
