// What a KV head of a sequence holds: a *pair* of keys and values.
struct Pair {
    Head keys, values;
    // Coded positions, of which the first `hidden` are not seen.
    int coded, hidden;
    // Dense rows, halves: of rings [room, M] the `window` rows from `start` on.
    u16 *window_keys, *window_values;
    int room, start, window, unused;
};

// Where the window's row of this number begins.
__device__ inline size_t window_place(const Pair &pair, int row) { return (size_t)((pair.start + row) % pair.room) * M; }

// Where a row of a pair's begins among new rows [pairs, t, M].
__device__ inline size_t new_place(int pair, int t, int row) { return ((size_t)pair * t + row) * M; }
