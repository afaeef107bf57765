//! The inner loops, chosen once at run time for the machine at hand.
//!
//! A folder is a family of kernels: its `mod.rs` has what the rest of the crate calls, with checks of all sizes
//! and tests against f64 at every level of instructions; `portable.rs` has the kernels in plain Rust; `x86_64.rs`
//! and `aarch64.rs` have those that need more than what a compiler makes of plain Rust. In `dispatch.rs`, `compile!`
//! compiles plain kernels for every level, and `dispatch!` picks the kernel of a level, in the manner of the memchr
//! crate. `amx.rs` has the tiles that the families `tables` and `beam` multiply in where there are some.
//!
//! This is the ground floor: nothing here uses another module of the crate. Public are the products that a model's
//! own weights need too, and [`check_level`].

pub(crate) mod additive;
#[cfg(target_arch = "x86_64")]
mod amx;
pub(crate) mod beam;
pub mod blocks;
pub(crate) mod dense;
mod dispatch;
mod gate;
mod level;
pub mod matmul;
mod memory;
pub(crate) mod rows;
pub(crate) mod scan;
pub(crate) mod softmax;
pub(crate) mod sparse;
mod table;
pub(crate) mod tables;
pub(crate) mod vector;

pub use dense::dot_f16;
use dispatch::{compile, dispatch};
pub use gate::gate;
pub use level::{LevelError, check_level};
pub(crate) use memory::prefetch_first;
pub use vector::dot_bf16;

/// Number of atoms that there can be at the most: indices are stored in 16 bits.
pub const MAX_ATOMS: usize = 1 << 16;

/// Independent sums that a loop carries: enough to fill the widest registers and hide latency.
const LANES: usize = 32;

/// Added to a number of moderate size, this leaves its nearest integer, ties to even, in the lowest bits.
const ROUNDING: f32 = 12_582_912.0;

/// `a · b + c`; `FMA` says whether the caller is compiled with fused multiply-add: without the instruction
/// `mul_add` would call a slow library function.
#[inline(always)]
fn multiply_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// The larger number, `b` where they cannot be compared: one instruction, unlike `f32::max`.
#[inline(always)]
pub(crate) fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// Help for the kernels' tests.
#[cfg(test)]
mod testing {
    use std::cell::Cell;

    use super::level::Level;

    thread_local! {
        /// The level that this thread is held to.
        pub(super) static HELD: Cell<Option<Level>> = const { Cell::new(None) };
    }

    /// Levels that this machine has.
    pub(super) fn levels() -> impl Iterator<Item = Level> {
        Level::all().into_iter().map(|(_, level)| level)
    }

    /// Runs kernels at a level.
    pub(super) fn at_level(level: Level, run: impl FnOnce()) {
        HELD.set(Some(level));
        run();
        HELD.set(None);
    }

    /// Runs a kernel at every level that this machine has and gives all results.
    macro_rules! every_level {
        ($name:ident($($argument:expr),*)) => {{
            let levels = crate::kernels::testing::levels();
            levels.map(|level| dispatch!(level, $name($($argument),*))).collect::<Vec<_>>()
        }};
    }
    pub(super) use every_level;

    pub(super) fn close(a: f32, b: f64, size: f64) -> bool {
        (f64::from(a) - b).abs() <= 1e-5 * size.max(1e-30)
    }
}
