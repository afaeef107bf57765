// What a KV head of a sequence holds: a *pair* of keys and values.
struct Pair {
    Head keys, values;
    // Coded positions, of which the first `hidden` are not seen.
    int coded, hidden;
    // `window` dense rows, halves: `sinks` of first positions, which lie behind rings [room, M] from their row `first_sink` on, then
    // the rings' from `start` on. The first code is at position `first`.
    u16 *window_keys, *window_values;
    int room, start, window, sinks, first_sink, first;
};

// Where the window's row of this number begins.
__device__ inline size_t window_place(const Pair &pair, int row) {
    int place = row < pair.sinks ? pair.room + pair.first_sink + row : (pair.start + row - pair.sinks) % pair.room;
    return (size_t)place * M;
}

// Where a row of a pair's begins among new rows [pairs, t, M].
__device__ inline size_t new_place(int pair, int t, int row) { return ((size_t)pair * t + row) * M; }
