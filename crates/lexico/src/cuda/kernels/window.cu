// New rows into windows, and rows out of them. M: the head dim, a multiple of 16.

// Writes rows first to first + count of each pair's new ones, keys and values [pairs, t, M], where the newest `count` rows of its
// window lie. Grid: (rows, pairs).
extern "C" __global__ void __launch_bounds__(M)
append(const Pair *pairs, const float *keys, const float *values, int t, int first, int count) {
    const Pair &pair = pairs[blockIdx.y];
    for (int row = blockIdx.x; row < count; row += gridDim.x) {
        size_t to = window_place(pair, pair.window - count + row) + threadIdx.x;
        size_t from = new_place(blockIdx.y, t, first + row) + threadIdx.x;
        pair.window_keys[to] = to_half(keys[from]);
        pair.window_values[to] = to_half(values[from]);
    }
}
KERNEL(append)

// out_keys and out_values [pairs, count, M]: rows first to first + count of each pair's window and then its new ones. Grid: (rows,
// pairs).
extern "C" __global__ void __launch_bounds__(M)
gather(const Pair *pairs, const float *keys, const float *values, int t, int first, int count, float *out_keys, float *out_values) {
    const Pair &pair = pairs[blockIdx.y];
    for (int row = blockIdx.x; row < count; row += gridDim.x) {
        size_t to = new_place(blockIdx.y, count, row) + threadIdx.x;
        if (first + row < pair.window) {
            size_t from = window_place(pair, first + row) + threadIdx.x;
            out_keys[to] = from_half(pair.window_keys[from]);
            out_values[to] = from_half(pair.window_values[from]);
        } else {
            size_t from = new_place(blockIdx.y, t, first + row - pair.window) + threadIdx.x;
            out_keys[to] = keys[from];
            out_values[to] = values[from];
        }
    }
}
KERNEL(gather)

// out_keys and out_values [pairs, positions, M]: what first positions, codes and windows stand for, from the first position that is
// seen on; atoms are halves. Grid: (positions, pairs).
extern "C" __global__ void __launch_bounds__(M)
decode(const Pair *pairs, const u16 *key_atoms, const u16 *value_atoms, int positions, float *out_keys, float *out_values) {
    const Pair &pair = pairs[blockIdx.y];
    int coded = pair.coded - pair.hidden;
    for (int t = blockIdx.x; t < positions; t += gridDim.x) {
        size_t to = new_place(blockIdx.y, positions, t) + threadIdx.x;
        // Codes lie between the window's rows of first positions and its others.
        int code = t - pair.sinks, row = code < 0 ? t : t - coded;
        if (code >= 0 && code < coded) {
            float key = 0.0f, value = 0.0f;
            float scale = visit_code(pair.keys, pair.hidden + code, [&](int atom, float c) {
                key += c * from_half(key_atoms[(size_t)atom * M + threadIdx.x]);
            });
            out_keys[to] = key * scale;
            scale = visit_code(pair.values, pair.hidden + code, [&](int atom, float c) {
                value += c * from_half(value_atoms[(size_t)atom * M + threadIdx.x]);
            });
            out_values[to] = value * scale;
        } else if (row < pair.window) {
            size_t from = window_place(pair, row) + threadIdx.x;
            out_keys[to] = from_half(pair.window_keys[from]);
            out_values[to] = from_half(pair.window_values[from]);
        }
    }
}
KERNEL(decode)
