//! ggml's block types, and how each is laid out here.

use super::{GROUP, LINE, UNIT};

/// A block type of ggml, by its own name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, reason = "names of ggml")]
pub enum BlockType {
    /// 4 bits a number, a scale for 32.
    Q4_0,
    /// 4 bits a number, a scale and a least value for 32.
    Q4_1,
    /// 5 bits a number, a scale for 32.
    Q5_0,
    /// 5 bits a number, a scale and a least value for 32.
    Q5_1,
    /// 8 bits a number, a scale for 32.
    Q8_0,
    /// 2 bits a number; of 256 numbers, every 16 with a scale and a least value in 4 bits.
    Q2K,
    /// 3 bits a number; of 256 numbers, every 16 with a scale in 6 bits.
    Q3K,
    /// 4 bits a number; of 256 numbers, every 32 with a scale and a least value in 6 bits.
    Q4K,
    /// 5 bits a number; of 256 numbers, every 32 with a scale and a least value in 6 bits.
    Q5K,
    /// 6 bits a number; of 256 numbers, every 16 with a scale in 8 bits.
    Q6K,
}

/// How numbers of a block type lie: a number is `scale · (q − zero) − least`.
pub(super) struct Layout {
    /// Low bits of a number that lie together: 2, 4 or 8.
    pub(super) low: usize,
    /// High bits of a number, apart from the low ones: 0, 1 or 2.
    pub(super) high: usize,
    /// Columns that share a scale: 16 or 32.
    pub(super) columns: usize,
    /// The power of two that is taken from numbers; none from those that are signed or have a least value.
    pub(super) zero: Option<u32>,
    /// True for numbers of 8 bits with a sign.
    pub(super) signed: bool,
    /// True where there is a least value beside each scale.
    pub(super) least: bool,
    /// True where scales are bytes, and a half-precision number for 256 columns is multiplied with them.
    pub(super) nested: bool,
}

impl Layout {
    /// Bytes of the numbers of a group in [`UNIT`] columns.
    pub(super) const fn quant_bytes(&self) -> usize {
        LINE * (self.low + self.high)
    }

    /// Units that one half-precision scale is for.
    pub(super) const fn units(&self) -> usize {
        if self.nested { 256 / UNIT } else { 1 }
    }

    /// Numbers beside one another: a scale, or a scale and a least value.
    pub(super) const fn pair(&self) -> usize {
        if self.least { 2 } else { 1 }
    }

    /// Bytes of a group's half-precision numbers for [`Layout::units`] units.
    pub(super) const fn float_bytes(&self) -> usize {
        2 * GROUP * self.pair()
    }

    /// Bytes of a group's scales for [`Layout::units`] units.
    pub(super) const fn scale_bytes(&self) -> usize {
        let nested = if self.nested {
            256 / self.columns * GROUP * self.pair()
        } else {
            0
        };
        self.float_bytes() + nested
    }
}

/// The layout of a block type as a type, so that kernels are compiled for each.
pub(super) trait Kind {
    const TYPE: BlockType;
    const LAYOUT: Layout;
}

macro_rules! kinds {
    ($($name:ident: $low:literal + $high:literal bits, $columns:literal columns, zero $zero:expr, signed $signed:literal,
       least $least:literal, nested $nested:literal, block of $numbers:literal in $bytes:literal bytes, floats at $floats:expr;)*) => {
        /// Types that stand for block types.
        pub(super) mod kind {
            $(pub(in super::super) struct $name;)*
        }

        $(impl Kind for kind::$name {
            const TYPE: BlockType = BlockType::$name;
            const LAYOUT: Layout = Layout {
                low: $low, high: $high, columns: $columns, zero: $zero, signed: $signed, least: $least, nested: $nested,
            };
        })*

        impl BlockType {
            /// All block types.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            pub(super) const fn layout(self) -> &'static Layout {
                match self {
                    $(Self::$name => &<kind::$name as Kind>::LAYOUT,)*
                }
            }

            /// Numbers in a block.
            pub const fn numbers(self) -> usize {
                match self {
                    $(Self::$name => $numbers,)*
                }
            }

            /// Bytes of a block in a file.
            pub const fn bytes(self) -> usize {
                match self {
                    $(Self::$name => $bytes,)*
                }
            }

            /// Places of a block's half-precision numbers in a file: the scale, and the least value where there is one.
            pub(super) const fn float_places(self) -> &'static [usize] {
                match self {
                    $(Self::$name => &$floats,)*
                }
            }
        }
    };
}

kinds! {
    Q4_0: 4 + 0 bits, 32 columns, zero Some(3), signed false, least false, nested false, block of 32 in 18 bytes, floats at [0];
    Q4_1: 4 + 0 bits, 32 columns, zero None, signed false, least true, nested false, block of 32 in 20 bytes, floats at [0, 2];
    Q5_0: 4 + 1 bits, 32 columns, zero Some(4), signed false, least false, nested false, block of 32 in 22 bytes, floats at [0];
    Q5_1: 4 + 1 bits, 32 columns, zero None, signed false, least true, nested false, block of 32 in 24 bytes, floats at [0, 2];
    Q8_0: 8 + 0 bits, 32 columns, zero None, signed true, least false, nested false, block of 32 in 34 bytes, floats at [0];
    Q2K: 2 + 0 bits, 16 columns, zero None, signed false, least true, nested true, block of 256 in 84 bytes, floats at [80, 82];
    Q3K: 2 + 1 bits, 16 columns, zero Some(2), signed false, least false, nested true, block of 256 in 110 bytes, floats at [108];
    Q4K: 4 + 0 bits, 32 columns, zero None, signed false, least true, nested true, block of 256 in 144 bytes, floats at [0, 2];
    Q5K: 4 + 1 bits, 32 columns, zero None, signed false, least true, nested true, block of 256 in 176 bytes, floats at [0, 2];
    Q6K: 4 + 2 bits, 16 columns, zero Some(5), signed false, least false, nested true, block of 256 in 210 bytes, floats at [208];
}

/// Evaluates an expression with a type that stands for a block type.
macro_rules! with_kind {
    ($block_type:expr, $kind:ident => $evaluated:expr) => {
        with_kind!(@ $block_type, $kind => $evaluated; Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2K Q3K Q4K Q5K Q6K)
    };
    (@ $block_type:expr, $kind:ident => $evaluated:expr; $($name:ident)*) => {
        match $block_type {
            $(BlockType::$name => {
                type $kind = kind::$name;
                $evaluated
            })*
        }
    };
}
pub(super) use with_kind;
