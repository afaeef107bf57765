// Codes as they lie in device memory.
//
// A code is a record of some bytes: of additive codes the first atom and scale in two, then an atom a byte; of codes with
// coefficients of a byte four nonzeros in twelve, their indices before their coefficients, what is left over likewise, and
// the scale's exponent last. Records lie in pages of PAGE, sliced so that neighbouring threads read neighbouring words: first
// the first four bytes of all records, then the next four, and at last two and one that are left.
const int PAGE = 1024;

__device__ inline u32 record_word(const u8 *page, int word, int at) { return ((const u32 *)page)[word * PAGE + at]; }

__device__ inline u8 *record_place(u8 *page, int bytes, int byte, int at) {
    int whole = bytes / 4 * 4;
    if (byte < whole) return page + ((size_t)(byte / 4) * PAGE + at) * 4 + byte % 4;
    page += (size_t)whole * PAGE;
    int left = byte - whole;
    if (bytes - whole >= 2) {
        if (left < 2) return page + (size_t)at * 2 + left;
        return page + (size_t)PAGE * 2 + at;
    }
    return page + at;
}

__device__ inline u32 record_byte(const u8 *page, int bytes, int byte, int at) {
    return *record_place((u8 *)page, bytes, byte, at);
}

// The numbers that coefficients of a byte stand for, before their vector's scale.
enum Format { ADDITIVE = 0, I8 = 1, F8 = 2 };

__device__ inline float coefficient(int format, u32 byte) {
    if (format == I8) return (float)(signed char)byte;
    // E4M3: its bits at a half's place, whose exponents are 8 larger.
    return from_half((u16)((byte & 0x80) << 8 | (byte & 0x7f) << 7)) * 256.0f;
}

const int ATOM_BITS = 11;

__device__ inline float additive_scale(u32 leading) { return exp2f((float)(leading >> ATOM_BITS) / 32.0f); }

// The power of two of an exponent with E8M0's bias; the smallest is a subnormal number.
__device__ inline float power(u32 exponent) { return __uint_as_float(exponent == 0 ? 1 << 22 : exponent << 23); }

// One KV head's codes of one sequence, keys or values.
struct Head {
    const u8 *const *pages;
    // Atoms of a vector.
    int sparsity;
    // Atoms of the first codebook, of additive codes.
    int first;
};

__device__ inline int record_bytes(int format, int sparsity) { return format == ADDITIVE ? sparsity + 1 : 3 * sparsity + 1; }

// Calls `visit` with the number of each atom of the code at a position and what it is multiplied by, but for the code's scale, which
// is returned.
template <class Visit> __device__ inline float visit_code(const Head &head, int position, Visit visit) {
    const u8 *page = head.pages[position / PAGE];
    int at = position % PAGE, s = head.sparsity, bytes = record_bytes(FORMAT, s);
    if (FORMAT == ADDITIVE) {
        // The word of the first atom holds two more; the others hold four.
        u32 leading = bytes >= 4 ? record_word(page, 0, at) : record_byte(page, bytes, 0, at) | record_byte(page, bytes, 1, at) << 8;
        visit((int)(leading & ((1 << ATOM_BITS) - 1)), 1.0f);
        int codebook = head.first;
        if (bytes >= 4) {
            visit(codebook + (int)(leading >> 16 & 0xff), 1.0f);
            visit(codebook + 256 + (int)(leading >> 24), 1.0f);
            codebook += 512;
            for (int word = 1; word < bytes / 4; ++word, codebook += 1024) {
                u32 atoms = record_word(page, word, at);
                UNROLL
                for (int j = 0; j < 4; ++j) visit(codebook + j * 256 + (int)(atoms >> 8 * j & 0xff), 1.0f);
            }
        }
        for (int byte = bytes >= 4 ? bytes / 4 * 4 : 2; byte < bytes; ++byte, codebook += 256)
            visit(codebook + (int)record_byte(page, bytes, byte, at), 1.0f);
        return additive_scale(leading & 0xffff);
    }
    int fours = s / 4;
    for (int four = 0; four < fours; ++four) {
        u32 a = record_word(page, 3 * four, at), b = record_word(page, 3 * four + 1, at);
        u32 coefficients = record_word(page, 3 * four + 2, at);
        visit((int)(a & 0xffff), coefficient(FORMAT, coefficients & 0xff));
        visit((int)(a >> 16), coefficient(FORMAT, coefficients >> 8 & 0xff));
        visit((int)(b & 0xffff), coefficient(FORMAT, coefficients >> 16 & 0xff));
        visit((int)(b >> 16), coefficient(FORMAT, coefficients >> 24));
    }
    int left = s - 4 * fours, start = 12 * fours;
    for (int j = 0; j < left; ++j) {
        u32 low = record_byte(page, bytes, start + 2 * j, at), high = record_byte(page, bytes, start + 2 * j + 1, at);
        visit((int)(low | high << 8), coefficient(FORMAT, record_byte(page, bytes, start + 2 * left + j, at)));
    }
    return power(record_byte(page, bytes, bytes - 1, at));
}
