//! ggml's blocks laid out for the kernels, in plain Rust.

use super::layout::Line;
use super::types::{Kind, Layout, kind, with_kind};
use super::{BlockType, GROUP, LINE, STEP, STEPS, UNIT};

/// Lays out the blocks of sixteen rows or fewer.
#[inline(always)]
pub(super) fn lay_out<const FMA: bool>(
    kind: BlockType,
    rows: &[u8],
    row_bytes: usize,
    quants: &mut [Line],
    scales: &mut [u8],
) {
    with_kind!(kind, K => lay_out_kind::<K>(rows, row_bytes, quants, scales));
}

#[inline(always)]
fn lay_out_kind<K: Kind>(rows: &[u8], row_bytes: usize, quants: &mut [Line], scales: &mut [u8]) {
    let (kind, layout) = (K::TYPE, &const { K::LAYOUT });
    let units = kind.numbers() / UNIT;
    let lines = layout.quant_bytes() / LINE;
    let scale_bytes = units / layout.units() * layout.scale_bytes();
    let mut numbers = [[0u8; 256]; GROUP];
    let quants = quants.chunks_exact_mut(units * lines);
    let blocks = quants.zip(scales.chunks_exact_mut(scale_bytes));
    for (block, (quants, scales)) in blocks.enumerate() {
        for (lane, row) in rows.chunks_exact(row_bytes).enumerate() {
            let bytes = &row[block * kind.bytes()..][..kind.bytes()];
            read_numbers(kind, bytes, &mut numbers[lane]);
            put_scales(kind, bytes, lane, scales);
        }
        for (unit, quants) in quants.chunks_exact_mut(lines).enumerate() {
            put_unit(layout, &numbers, unit * UNIT, quants);
        }
    }
}

/// Lays out the numbers of sixteen rows in a unit that begins at column `first`.
#[inline(always)]
fn put_unit(layout: &Layout, numbers: &[[u8; 256]; GROUP], first: usize, out: &mut [Line]) {
    let mut steps = [Line([0; LINE]); STEPS];
    for (lane, row) in numbers.iter().enumerate() {
        let columns = row[first..first + UNIT].as_chunks::<STEP>().0;
        for (step, columns) in steps.iter_mut().zip(columns) {
            step.0[lane * STEP..][..STEP].copy_from_slice(columns);
        }
    }
    let (low, high) = out.split_at_mut(layout.low);
    match layout.low {
        2 => put_bits::<0, 2>(&steps, low),
        4 => put_bits::<0, 4>(&steps, low),
        _ => put_bits::<0, 8>(&steps, low),
    }
    match (layout.low, layout.high) {
        (2, 1) => put_bits::<2, 1>(&steps, high),
        (4, 1) => put_bits::<4, 1>(&steps, high),
        (4, 2) => put_bits::<4, 2>(&steps, high),
        _ => {}
    }
}

/// Puts `BITS` bits of all steps' numbers, from bit `FROM` on, over each other.
#[inline(always)]
fn put_bits<const FROM: usize, const BITS: usize>(steps: &[Line; STEPS], out: &mut [Line]) {
    for (at, out) in out.iter_mut().enumerate() {
        for i in 0..LINE {
            let mut byte = 0;
            for part in 0..8 / BITS {
                let number = steps[(part * BITS + at) % STEPS].0[i];
                byte |= ((number >> FROM) & ((1u32 << BITS) - 1) as u8) << (part * BITS);
            }
            out.0[i] = byte;
        }
    }
}

/// Writes a block's scales into their lane.
#[inline(always)]
fn put_scales(kind: BlockType, block: &[u8], lane: usize, out: &mut [u8]) {
    let layout = kind.layout();
    let (floats, bytes) = out.split_at_mut(layout.float_bytes());
    for (number, &place) in kind.float_places().iter().enumerate() {
        let mut float = [block[place], block[place + 1]];
        // Least values are taken away here; ggml adds those of its older types.
        if number == 1 && !layout.nested {
            float[1] ^= 0x80;
        }
        floats[2 * (number * GROUP + lane)..][..2].copy_from_slice(&float);
    }
    let mut put = |number: usize, byte: u8| bytes[number * GROUP + lane] = byte;
    match kind {
        BlockType::Q2K => {
            for (part, &byte) in block[..16].iter().enumerate() {
                put(2 * part, byte & 15);
                put(2 * part + 1, byte >> 4);
            }
        }
        BlockType::Q3K => {
            let scales = &block[96..108];
            for part in 0..16 {
                let low = (scales[part % 8] >> (part / 8 * 4)) & 15;
                let high = (scales[8 + part % 4] >> (part / 4 * 2)) & 3;
                put(part, (low | high << 4).wrapping_sub(32));
            }
        }
        BlockType::Q4K | BlockType::Q5K => {
            let scales = &block[4..16];
            for part in 0..8 {
                let (scale, least) = match part {
                    0..4 => (scales[part] & 63, scales[part + 4] & 63),
                    _ => (
                        scales[part + 4] & 15 | scales[part - 4] >> 6 << 4,
                        scales[part + 4] >> 4 | scales[part] >> 6 << 4,
                    ),
                };
                put(2 * part, scale);
                put(2 * part + 1, least);
            }
        }
        BlockType::Q6K => {
            for (part, &byte) in block[192..208].iter().enumerate() {
                put(part, byte);
            }
        }
        _ => {}
    }
}

/// Reads the numbers of a block, each into a byte, as ggml's functions `dequantize_row_…` do.
#[inline(always)]
fn read_numbers(kind: BlockType, block: &[u8], out: &mut [u8; 256]) {
    match kind {
        BlockType::Q4_0 => nibbles(&block[2..], out),
        BlockType::Q4_1 => nibbles(&block[4..], out),
        BlockType::Q5_0 => {
            nibbles(&block[6..], out);
            fifth_bits(&block[2..6], out);
        }
        BlockType::Q5_1 => {
            nibbles(&block[8..], out);
            fifth_bits(&block[4..8], out);
        }
        BlockType::Q8_0 => out[..UNIT].copy_from_slice(&block[2..]),
        BlockType::Q2K => crumbs(&block[16..80], out),
        BlockType::Q3K => {
            crumbs(&block[32..96], out);
            for (part, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                for (out, high) in out.iter_mut().zip(&block[..32]) {
                    *out |= (high >> part & 1) << 2;
                }
            }
        }
        BlockType::Q4K => pairs_of_parts(&block[16..144], out),
        BlockType::Q5K => {
            pairs_of_parts(&block[48..176], out);
            for (part, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                for (out, high) in out.iter_mut().zip(&block[16..48]) {
                    *out |= (high >> part & 1) << 4;
                }
            }
        }
        BlockType::Q6K => {
            for (half, out) in out.as_chunks_mut::<128>().0.iter_mut().enumerate() {
                let (low, high) = (&block[64 * half..][..64], &block[128 + 32 * half..][..32]);
                for l in 0..32 {
                    out[l] = low[l] & 15 | (high[l] & 3) << 4;
                    out[l + 32] = low[l + 32] & 15 | (high[l] >> 2 & 3) << 4;
                    out[l + 64] = low[l] >> 4 | (high[l] >> 4 & 3) << 4;
                    out[l + 96] = low[l + 32] >> 4 | (high[l] >> 6) << 4;
                }
            }
        }
    }
}

/// Numbers of 4 bits, the second half above the first.
#[inline(always)]
fn nibbles(bytes: &[u8], out: &mut [u8; 256]) {
    let (low, high) = out[..UNIT].split_at_mut(UNIT / 2);
    for ((byte, low), high) in bytes.iter().zip(low).zip(high) {
        (*low, *high) = (byte & 15, byte >> 4);
    }
}

/// The fifth bits of 32 numbers.
#[inline(always)]
fn fifth_bits(bytes: &[u8], out: &mut [u8; 256]) {
    const ONES: u64 = 0x0101_0101_0101_0101;
    for (&bits, out) in bytes.iter().zip(out.as_chunks_mut::<8>().0) {
        // Bit `i` of byte `i`, then moved to the fifth place of each byte where it is set.
        let apart = (u64::from(bits) * ONES) & 0x8040_2010_0804_0201;
        let fifth = ((apart + 0x7f * ONES) >> 7 & ONES) << 4;
        *out = (u64::from_le_bytes(*out) | fifth).to_le_bytes();
    }
}

/// Numbers of 2 bits, four parts of 32 above each other.
#[inline(always)]
fn crumbs(bytes: &[u8], out: &mut [u8; 256]) {
    for (bytes, out) in bytes.chunks_exact(32).zip(out.as_chunks_mut::<128>().0) {
        for (part, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            for (out, byte) in out.iter_mut().zip(bytes) {
                *out = byte >> (2 * part) & 3;
            }
        }
    }
}

/// Numbers of 4 bits, parts of 32 in pairs above each other.
#[inline(always)]
fn pairs_of_parts(bytes: &[u8], out: &mut [u8; 256]) {
    for (bytes, out) in bytes.chunks_exact(32).zip(out.as_chunks_mut::<64>().0) {
        let (low, high) = out.split_at_mut(32);
        for ((byte, low), high) in bytes.iter().zip(low).zip(high) {
            (*low, *high) = (byte & 15, byte >> 4);
        }
    }
}
