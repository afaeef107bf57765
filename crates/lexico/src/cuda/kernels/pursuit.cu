// Orthogonal matching pursuit (Pati et al. 1993) of many vectors at once.
//
// M: the head dim, a multiple of 16; vectors and atoms are filled up with zeros. A block codes ROWS vectors side by side:
// round by round its warps multiply all residuals, as halves, with all atoms, which pass through shared memory, and keep each
// row's largest product in registers. The chosen atom is then made orthogonal to those before it (modified Gram-Schmidt, in
// f32), and its part taken off the residual.

const int ROWS = 64;
const int WARP_ROWS = 16;
const int THREADS = ROWS / WARP_ROWS * WARP;
// Atoms in shared memory at a time, twice: one half is read while the other is filled.
const int TILE = 64;
// Halves between atoms there: so that the eight that a warp reads at once lie in different banks.
const int STRIDE = M + 8;
const int SLICES = M / 16;
// Numbers of a row that a lane holds; all of them where M is a multiple of 32, and in half of the lanes one less otherwise.
const int OWN = (M + WARP - 1) / WARP;
// An atom of which less than this is left, after those before it, is no new direction in f32.
const float LEAST_LEFT = 1e-3f;

struct Best {
    float size;
    int atom;
};

__device__ inline void keep(Best &best, float product, int atom) {
    float size = fabsf(product);
    if (size > best.size) {
        best.size = size;
        best.atom = atom;
    }
}

// The better of both, the lower atom of equals, so that the order of the lanes does not matter.
__device__ inline void join(Best &best, int step) {
    float size = __shfl_xor_sync(ALL, best.size, step);
    int atom = __shfl_xor_sync(ALL, best.atom, step);
    if (size > best.size || (size == best.size && atom < best.atom)) {
        best.size = size;
        best.atom = atom;
    }
}

__device__ inline void fetch(u16 *tile, const u16 *atoms, int first, int count) {
    const int PARTS = M / 8;
    for (int i = threadIdx.x; i < TILE * PARTS; i += THREADS) {
        int atom = i / PARTS, part = i % PARTS;
        if (first + atom < count)
            copy(&tile[atom * STRIDE + part * 8], &atoms[(size_t)(first + atom) * M + part * 8]);
    }
    copies_end();
}

// The atom whose product with each row's residual is largest in magnitude: rows lane / 4 and lane / 4 + 8 of the warp's.
__device__ inline void choose(const u32 (&rows)[SLICES][4], const u16 *atoms, int count, u16 *tiles, Best &upper, Best &lower) {
    upper = lower = Best{-1.0f, 0};
    fetch(tiles, atoms, 0, count);
    for (int first = 0, half = 0; first < count; first += TILE, half ^= 1) {
        if (first + TILE < count) {
            fetch(tiles + (half ^ 1) * TILE * STRIDE, atoms, first + TILE, count);
            copied<1>();
        } else {
            copied<0>();
        }
        __syncthreads();
        const u16 *tile = tiles + half * TILE * STRIDE;
        for (int eight = 0; eight < TILE; eight += 8) {
            float sums[4] = {0, 0, 0, 0};
            const u16 *own = tile + (eight + lane() / 4) * STRIDE + lane() % 4 * 2;
            multiply_all(sums, rows, own);
            int atom = first + eight + lane() % 4 * 2;
            UNROLL
            for (int j = 0; j < 2; ++j) {
                if (atom + j < count) {
                    keep(upper, sums[j], atom + j);
                    keep(lower, sums[2 + j], atom + j);
                }
            }
        }
        __syncthreads();
    }
    for (int step = 1; step < 4; step *= 2) {
        join(upper, step);
        join(lower, step);
    }
}

// vectors [heads, each, M], each head with as many atoms as `sparsities` has, up to `max_atoms`; atoms [atom_count, M], halves; basis:
// room for [gridDim.x, ROWS, max_atoms, M]; triangles: for [gridDim.x, ROWS, max_atoms, max_atoms]. Of each vector: length, indices [max_atoms],
// coefficients [max_atoms], and the norm of what is left over its own.
extern "C" __global__ void __launch_bounds__(THREADS)
pursue(const float *vectors, int count, int each, const int *sparsities, int max_atoms, const u16 *atoms, u16 *indices,
       float *coefficients, float *errors, int atom_count, float *basis, float *triangles, u8 *lengths) {
    extern __shared__ __align__(16) u8 shared[];
    u16 *tiles = (u16 *)shared;
    float *residuals = (float *)(tiles + 2 * TILE * STRIDE);
    float *projections = residuals + ROWS * M;
    int *chosen = (int *)(projections + ROWS * max_atoms);
    int *states = chosen + ROWS;
    basis += (size_t)blockIdx.x * ROWS * max_atoms * M;
    triangles += (size_t)blockIdx.x * ROWS * max_atoms * max_atoms;
    for (int start = blockIdx.x * ROWS; start < count; start += gridDim.x * ROWS) {
        // Each row scaled to length 1, so that halves hold it whatever its size; a state is its number of atoms, or less
        // than 0 where it is done: -1 - that number.
        float norms[WARP_ROWS];
        UNROLL
        for (int r = 0; r < WARP_ROWS; ++r) {
            int row = warp() * WARP_ROWS + r;
            float own[OWN], largest = 0.0f, square = 0.0f;
            for (int j = 0; j < OWN; ++j) {
                int at = lane() + j * WARP;
                own[j] = start + row < count && at < M ? vectors[(size_t)(start + row) * M + at] : 0.0f;
                largest = fmaxf(largest, fabsf(own[j]));
            }
            largest = warp_max(largest);
            float inverse = largest > 0.0f ? 1.0f / largest : 0.0f;
            for (int j = 0; j < OWN; ++j) {
                own[j] *= inverse;
                square += own[j] * own[j];
            }
            float norm = sqrtf(warp_sum(square));
            norms[r] = norm * largest;
            for (int j = 0; j < OWN; ++j) {
                int at = lane() + j * WARP;
                if (at < M) residuals[row * M + at] = norm > 0.0f ? own[j] / norm : 0.0f;
            }
            if (lane() == 0) states[row] = norm > 0.0f ? 0 : -1;
        }
        __syncthreads();
        for (int round = 0; round < max_atoms; ++round) {
            int going = 0;
            for (int row = threadIdx.x; row < ROWS; row += THREADS) going |= states[row] >= 0;
            if (!__syncthreads_or(going)) break;
            u32 rows[SLICES][4];
            UNROLL
            for (int slice = 0; slice < SLICES; ++slice) {
                UNROLL
                for (int part = 0; part < 4; ++part) {
                    int row = warp() * WARP_ROWS + lane() / 4 + part % 2 * 8;
                    const float *own = &residuals[row * M + slice * 16 + lane() % 4 * 2 + part / 2 * 8];
                    rows[slice][part] = to_halves(own[0], own[1]);
                }
            }
            Best upper, lower;
            choose(rows, atoms, atom_count, tiles, upper, lower);
            if (lane() % 4 == 0) {
                chosen[warp() * WARP_ROWS + lane() / 4] = upper.atom;
                chosen[warp() * WARP_ROWS + lane() / 4 + 8] = lower.atom;
            }
            __syncwarp();
            for (int r = 0; r < WARP_ROWS; ++r) {
                int row = warp() * WARP_ROWS + r;
                if (states[row] < 0) continue;
                const u16 *atom = &atoms[(size_t)chosen[row] * M];
                float *own_basis = basis + (size_t)row * max_atoms * M;
                float *triangle = triangles + (size_t)row * max_atoms * max_atoms + round * max_atoms;
                float left[OWN], residual[OWN];
                for (int j = 0; j < OWN; ++j) {
                    int at = lane() + j * WARP;
                    left[j] = at < M ? from_half(atom[at]) : 0.0f;
                    residual[j] = at < M ? residuals[row * M + at] : 0.0f;
                }
                for (int k = 0; k < round; ++k) {
                    float along = 0.0f, direction[OWN];
                    for (int j = 0; j < OWN; ++j) {
                        int at = lane() + j * WARP;
                        direction[j] = at < M ? own_basis[k * M + at] : 0.0f;
                        along += direction[j] * left[j];
                    }
                    along = warp_sum(along);
                    for (int j = 0; j < OWN; ++j) left[j] -= along * direction[j];
                    if (lane() == 0) triangle[k] = along;
                }
                float square = 0.0f;
                for (int j = 0; j < OWN; ++j) square += left[j] * left[j];
                float norm = sqrtf(warp_sum(square));
                if (!(norm > LEAST_LEFT)) {
                    __syncwarp();
                    if (lane() == 0) states[row] = -1 - round;
                    continue;
                }
                float along = 0.0f;
                for (int j = 0; j < OWN; ++j) {
                    left[j] /= norm;
                    along += left[j] * residual[j];
                }
                along = warp_sum(along);
                float rest = 0.0f;
                for (int j = 0; j < OWN; ++j) {
                    int at = lane() + j * WARP;
                    residual[j] -= along * left[j];
                    rest += residual[j] * residual[j];
                    if (at < M) {
                        residuals[row * M + at] = residual[j];
                        own_basis[round * M + at] = left[j];
                    }
                }
                rest = sqrtf(warp_sum(rest));
                if (lane() == 0) {
                    triangle[round] = norm;
                    projections[row * max_atoms + round] = along;
                    indices[(size_t)(start + row) * max_atoms + round] = chosen[row];
                    states[row] = rest > 0.0f && round + 1 < sparsities[(start + row) / each] ? round + 1 : -2 - round;
                    errors[start + row] = rest;
                }
                __syncwarp();
            }
            __syncthreads();
        }
        // The coefficients, by back substitution: a lane a row.
        if (lane() < WARP_ROWS) {
            int row = warp() * WARP_ROWS + lane();
            if (start + row < count) {
                int length = states[row] < 0 ? -1 - states[row] : states[row];
                const float *triangle = triangles + (size_t)row * max_atoms * max_atoms;
                float *own = &coefficients[(size_t)(start + row) * max_atoms];
                float norm = 0.0f;
                UNROLL
                for (int r = 0; r < WARP_ROWS; ++r) norm = r == lane() ? norms[r] : norm;
                for (int k = length - 1; k >= 0; --k) {
                    float sum = projections[row * max_atoms + k];
                    for (int later = k + 1; later < length; ++later) sum -= triangle[later * max_atoms + k] * own[later];
                    own[k] = sum / triangle[k * max_atoms + k];
                }
                for (int k = 0; k < length; ++k) own[k] *= norm;
                for (int k = length; k < max_atoms; ++k) {
                    own[k] = 0.0f;
                    indices[(size_t)(start + row) * max_atoms + k] = 0;
                }
                lengths[start + row] = length;
                if (length == 0) errors[start + row] = norm > 0.0f ? 1.0f : 0.0f;
            }
        }
        __syncthreads();
    }
}
KERNEL(pursue)
