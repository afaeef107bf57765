//! Products of 8-bit integers and of bf16 in AMX's tiles, sixteen rows by sixteen columns at a time: of integers some thirty times as many
//! a cycle as there are products in f32 registers.
//!
//! The compiler has no names for these instructions yet, so they are written as assembly.

use core::arch::asm;
use core::arch::x86_64::__cpuid_count;
use std::marker::PhantomData;

/// Rows of a tile, and its columns of 32 bits.
pub(super) const SIDE: usize = 16;
/// Numbers of 8 bits that a row of a tile holds, which is how many one instruction sums over.
pub(super) const DEPTH: usize = 64;
/// Parts of 8 bits that a number in f32 is taken apart into.
pub(super) const DIGITS: usize = 3;

/// Numbers of a tile: `[SIDE, DEPTH]` as rows; as columns `[DEPTH / 4, SIDE, 4]`.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Tile(pub(super) [i8; SIDE * DEPTH]);

/// Numbers in bf16 that a row of a tile holds.
pub(super) const HALF_DEPTH: usize = DEPTH / 2;

/// Columns of a tile in bf16: `[HALF_DEPTH / 2, SIDE, 2]`.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct HalfTile(pub(super) [[[u16; 2]; SIDE]; HALF_DEPTH / 2]);

impl HalfTile {
    pub(super) const ZEROS: Self = Self([[[0; 2]; SIDE]; HALF_DEPTH / 2]);
}

/// Sums that a tile of rows and one of columns make.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Sums(pub(super) [[i32; SIDE]; SIDE]);

/// One tile, or one for each digit.
pub(super) type Digits<T> = [T; DIGITS];

impl Tile {
    pub(super) const ZEROS: Self = Self([0; SIDE * DEPTH]);
}

impl Sums {
    pub(super) const ZEROS: Self = Self([[0; SIDE]; SIDE]);
}

/// Whether this processor has tiles, and the system lets the program use them, for which it is asked here.
pub(super) fn is_available() -> bool {
    const AMX_TILE: u32 = 1 << 24;
    const AMX_INT8: u32 = 1 << 25;
    const AMX_BF16: u32 = 1 << 22;
    let all = AMX_TILE | AMX_INT8 | AMX_BF16;
    __cpuid_count(7, 0).edx & all == all && is_permitted()
}

/// Asks the system for the tiles' state to be kept for this process, as Linux wants it.
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers, and changes nothing but what the process may use.
    let refused = unsafe {
        libc::syscall(
            libc::SYS_arch_prctl,
            ARCH_REQ_XCOMP_PERM,
            XFEATURE_XTILEDATA,
        )
    };
    refused == 0
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// How tiles are laid out, as `ldtilecfg` reads it.
#[repr(C, align(64))]
struct Layout {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// The calling thread's tiles, all of full size, for as long as this lives.
pub(super) struct Tiles {
    /// They are the thread's own.
    not_send: PhantomData<*const ()>,
}

impl Tiles {
    /// # Safety
    /// [`is_available`] has said so, and there is no other of this thread.
    pub(super) unsafe fn new() -> Self {
        let mut layout = Layout {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        layout.row_bytes[..8].fill(DEPTH as u16);
        layout.rows[..8].fill(SIDE as u8);
        // SAFETY: tiles are there; nothing but this module's instructions sees them.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const layout, options(nostack, preserves_flags));
        }
        Self {
            not_send: PhantomData,
        }
    }

    /// Sums over `columns.len()` tiles' depth of products of rows that lie in memory, row `r` from `rows + r · stride` on, with columns
    /// in digits.
    ///
    /// # Safety
    /// Behind `rows` lie sixteen such rows, [`DEPTH`] numbers for each of `columns`.
    #[inline]
    pub(super) unsafe fn rows_by_digits(
        &self,
        rows: *const i8,
        stride: usize,
        columns: &[Digits<Tile>],
        sums: &mut Digits<Sums>,
    ) {
        if columns.is_empty() {
            *sums = [Sums::ZEROS; DIGITS];
            return;
        }
        // SAFETY: the caller vouches for the rows; columns and sums are whole tiles.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "2:",
                "tileloadd tmm3, [{rows} + {stride}]",
                "tileloadd tmm4, [{columns} + {line}]",
                "tileloadd tmm5, [{columns} + {line} + 1024]",
                "tileloadd tmm6, [{columns} + {line} + 2048]",
                "tdpbssd tmm0, tmm3, tmm4",
                "tdpbssd tmm1, tmm3, tmm5",
                "tdpbssd tmm2, tmm3, tmm6",
                "add {rows}, 64",
                "add {columns}, 3072",
                "dec {count}",
                "jnz 2b",
                "tilestored [{sums} + {line}], tmm0",
                "tilestored [{sums} + {line} + 1024], tmm1",
                "tilestored [{sums} + {line} + 2048], tmm2",
                rows = inout(reg) rows => _,
                columns = inout(reg) columns.as_ptr() => _,
                count = inout(reg) columns.len() => _,
                stride = in(reg) stride,
                line = in(reg) DEPTH,
                sums = in(reg) sums.as_mut_ptr(),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _,
                options(nostack),
            );
        }
    }

    /// Sums over the tiles' depth of products of rows in digits with columns, as many of either.
    #[inline]
    pub(super) fn digits_by_columns(
        &self,
        rows: &[Digits<Tile>],
        columns: &[Tile],
        sums: &mut Digits<Sums>,
    ) {
        assert_eq!(rows.len(), columns.len(), "tiles of one depth");
        if rows.is_empty() {
            *sums = [Sums::ZEROS; DIGITS];
            return;
        }
        // SAFETY: all are whole tiles, as many rows as columns.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "2:",
                "tileloadd tmm3, [{columns} + {line}]",
                "tileloadd tmm4, [{rows} + {line}]",
                "tileloadd tmm5, [{rows} + {line} + 1024]",
                "tileloadd tmm6, [{rows} + {line} + 2048]",
                "tdpbssd tmm0, tmm4, tmm3",
                "tdpbssd tmm1, tmm5, tmm3",
                "tdpbssd tmm2, tmm6, tmm3",
                "add {rows}, 3072",
                "add {columns}, 1024",
                "dec {count}",
                "jnz 2b",
                "tilestored [{sums} + {line}], tmm0",
                "tilestored [{sums} + {line} + 1024], tmm1",
                "tilestored [{sums} + {line} + 2048], tmm2",
                rows = inout(reg) rows.as_ptr() => _,
                columns = inout(reg) columns.as_ptr() => _,
                count = inout(reg) rows.len() => _,
                line = in(reg) DEPTH,
                sums = in(reg) sums.as_mut_ptr(),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _,
                options(nostack),
            );
        }
    }

    /// Tiles of columns, and of rows, that [`Tiles::rows_of_halves`] takes: as many sums as are under way at a time.
    pub(super) const HALVES_AT_ONCE: usize = 2;

    /// Products of 32 rows with 32 columns, both `depth` tiles deep, of numbers in bf16. Rows are in two parts, one after the other, `row`
    /// bytes from one to the next, whose products are added up: what bf16 keeps of a number, and what it keeps of the rest. The columns' tiles
    /// lie one after the other. Row `r` of the sums lies from `sums + r · stride` bytes on.
    ///
    /// # Safety
    /// Behind each of `rows` lie 32 rows of `64 · depth` bytes, `row` from one to the next; behind `columns` twice `depth` tiles, at least one;
    /// and behind `sums` 32 rows of 32 numbers, `stride` bytes from one to the next.
    #[inline]
    pub(super) unsafe fn rows_of_halves(
        &self,
        rows: [*const u16; 2],
        row: usize,
        columns: *const HalfTile,
        depth: usize,
        sums: *mut f32,
        stride: usize,
    ) {
        let below = |part: *const u16| part.wrapping_byte_add(SIDE * row);
        // SAFETY: the caller vouches for all of it.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{a} + {line}]",
                "tileloadd tmm6, [{high} + {row}]",
                "tileloadd tmm5, [{b} + {line}]",
                "tileloadd tmm7, [{high_below} + {row}]",
                "tdpbf16ps tmm0, tmm6, tmm4",
                "tdpbf16ps tmm1, tmm6, tmm5",
                "tileloadd tmm6, [{low} + {row}]",
                "tdpbf16ps tmm2, tmm7, tmm4",
                "tdpbf16ps tmm3, tmm7, tmm5",
                "tileloadd tmm7, [{low_below} + {row}]",
                "tdpbf16ps tmm0, tmm6, tmm4",
                "tdpbf16ps tmm1, tmm6, tmm5",
                "tdpbf16ps tmm2, tmm7, tmm4",
                "tdpbf16ps tmm3, tmm7, tmm5",
                "add {high}, 64",
                "add {low}, 64",
                "add {high_below}, 64",
                "add {low_below}, 64",
                "add {a}, 1024",
                "add {b}, 1024",
                "dec {depth}",
                "jnz 2b",
                "tilestored [{sums} + {stride}], tmm0",
                "tilestored [{sums} + {stride} + 64], tmm1",
                "tilestored [{below} + {stride}], tmm2",
                "tilestored [{below} + {stride} + 64], tmm3",
                high = inout(reg) rows[0] => _,
                low = inout(reg) rows[1] => _,
                high_below = inout(reg) below(rows[0]) => _,
                low_below = inout(reg) below(rows[1]) => _,
                a = inout(reg) columns => _,
                b = inout(reg) columns.wrapping_add(depth) => _,
                depth = inout(reg) depth => _,
                row = in(reg) row,
                line = in(reg) DEPTH,
                sums = in(reg) sums,
                below = in(reg) sums.wrapping_byte_add(SIDE * stride),
                stride = in(reg) stride,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: tiles are there, and these are this thread's.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
    }
}
