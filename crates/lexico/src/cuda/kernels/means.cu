// Means of keys before their rotary embedding: taken away from keys that are coded, and what their scores lack in place of them.
//
// M: the head dim. PAIRS: pairs of numbers that turn; the first FAST of them are turned by the angle of each position, the others by that
// of the middle of its block of BLOCK positions. HEADS: KV heads; pair i of keys and values is of head i % HEADS. G: queries of a KV head.

const int BLOCK = 64;

// cosines and sines of the angles of all pairs at a position.
__device__ inline void turn(int position, const double *frequencies, float *cosines, float *sines) {
    for (int k = threadIdx.x; k < PAIRS; k += blockDim.x) {
        double place = k < FAST ? (double)position : position / BLOCK * BLOCK + 0.5 * (BLOCK - 1);
        double angle = place * frequencies[k];
        cosines[k] = (float)cos(angle);
        sines[k] = (float)sin(angle);
    }
}

// Adds `sign` times their means to keys [pairs, count, M], rows first to first + coded of each, of which the first is at position `position` plus
// the pair's own. directions: [HEADS, 2 PAIRS, M]. Grid: (rows, pairs); a thread a column.
extern "C" __global__ void __launch_bounds__(M)
add_means(const Pair *held, const double *frequencies, const float *directions, int count, int first, int coded, int position, int sign,
          float *keys) {
    SHARED float cosines[PAIRS], sines[PAIRS];
    const float *own = directions + (size_t)(blockIdx.y % HEADS) * 2 * PAIRS * M + threadIdx.x;
    for (int row = blockIdx.x; row < coded; row += gridDim.x) {
        __syncthreads();
        turn(held[blockIdx.y].first + position + row, frequencies, cosines, sines);
        __syncthreads();
        float sum = 0.0f;
        for (int k = 0; k < PAIRS; ++k) sum += cosines[k] * own[k * M] + sines[k] * own[(PAIRS + k) * M];
        keys[new_place(blockIdx.y, count, first + row) + threadIdx.x] += (float)sign * sum;
    }
}
KERNEL(add_means)

// products[pair][2 PAIRS][G]: those of queries [pairs, G, M] with directions. Grid: (1, pairs).
extern "C" __global__ void __launch_bounds__(M)
project_means(const float *directions, const float *queries, float *products) {
    const float *own = directions + (size_t)(blockIdx.y % HEADS) * 2 * PAIRS * M;
    const float *query = queries + (size_t)blockIdx.y * G * M;
    for (int i = threadIdx.x; i < 2 * PAIRS * G; i += blockDim.x) {
        float sum = 0.0f;
        for (int k = 0; k < M; ++k) sum += own[i / G * M + k] * query[i % G * M + k];
        products[(size_t)blockIdx.y * 2 * PAIRS * G + i] = sum;
    }
}
KERNEL(project_means)

// scores[pair][room][G]: what the means add to the scores of codes that are seen. within: [2 FAST, BLOCK], cosines and sines of what fast
// pairs turn by within a block. Grid: (blocks of positions, pairs); a thread a position.
extern "C" __global__ void __launch_bounds__(BLOCK)
offset(const Pair *held, const double *frequencies, const float *within, const float *products, int room, float *scores) {
    SHARED float cosines[PAIRS], sines[PAIRS], still[G], turning[2 * FAST * G + 1];
    const Pair &pair = held[blockIdx.y];
    const float *along = products + (size_t)blockIdx.y * 2 * PAIRS * G, *across = along + PAIRS * G;
    int seen = pair.coded - pair.hidden, start = pair.first + pair.hidden;
    int blocks = seen > 0 ? (start + seen - 1) / BLOCK - start / BLOCK + 1 : 0;
    for (int block = blockIdx.x; block < blocks; block += gridDim.x) {
        int place = (start / BLOCK + block) * BLOCK;
        __syncthreads();
        turn(place, frequencies, cosines, sines);
        __syncthreads();
        for (int i = threadIdx.x; i < FAST * G; i += blockDim.x) {
            float cosine = cosines[i / G], sine = sines[i / G];
            turning[i] = along[i] * cosine + across[i] * sine;
            turning[FAST * G + i] = across[i] * cosine - along[i] * sine;
        }
        for (int g = threadIdx.x; g < G; g += blockDim.x) {
            float sum = 0.0f;
            for (int k = FAST; k < PAIRS; ++k) sum += along[k * G + g] * cosines[k] + across[k * G + g] * sines[k];
            still[g] = sum;
        }
        __syncthreads();
        int t = place + threadIdx.x - start;
        if (t < 0 || t >= seen) continue;
        float sums[G];
        UNROLL
        for (int g = 0; g < G; ++g) sums[g] = still[g];
        for (int k = 0; k < 2 * FAST; ++k) {
            float turned = within[k * BLOCK + threadIdx.x];
            UNROLL
            for (int g = 0; g < G; ++g) sums[g] += turned * turning[k * G + g];
        }
        UNROLL
        for (int g = 0; g < G; ++g) scores[((size_t)blockIdx.y * room + t) * G + g] = sums[g];
    }
}
KERNEL(offset)
