//! Hints to the compiler and the processor on memory and registers, for the kernels.

/// Fetches the cache line that lies `ahead` bytes after `from`, where the processor can be told to; whether
/// there is anything does not matter.
#[inline(always)]
pub(super) fn prefetch<T>(from: *const T, ahead: usize) {
    let line = from.cast::<i8>().wrapping_add(ahead);
    #[cfg(target_arch = "x86_64")]
    {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: every x86-64 processor has the instruction, and it never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line) };
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: the instruction never faults.
    unsafe {
        use core::arch::asm;
        asm!("prfm pldl1keep, [{0}]", in(reg) line, options(readonly, nostack, preserves_flags));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = line;
}

/// The number itself, which the compiler then does not put into a vector register together with others, to take
/// them out one by one where they are needed: that costs twice as much.
#[inline(always)]
pub(super) fn in_general_register(number: u64) -> u64 {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    {
        let mut number = number;
        // SAFETY: nothing is done.
        unsafe {
            core::arch::asm!("/* {0} */", inout(reg) number, options(pure, nomem, nostack, preserves_flags));
        }
        number
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    number
}

/// Bytes that are fetched at a time.
const CACHE_LINE: usize = 64;

/// Fetches all cache lines of `bytes` bytes that lie `ahead` bytes after `from`.
#[inline(always)]
pub(super) fn prefetch_lines<T>(from: *const T, bytes: usize, ahead: usize) {
    for line in (0..bytes).step_by(CACHE_LINE) {
        prefetch(from, ahead + line);
    }
}

/// Fetches the first numbers, up to 2 KiB, into the caches, where the processor can be told to.
pub(crate) fn prefetch_first<T>(numbers: &[T]) {
    prefetch_lines(numbers.as_ptr(), size_of_val(numbers).min(2048), 0);
}
