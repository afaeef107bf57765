//! Memory that is free, and that the allocator keeps.

#![allow(unsafe_code, reason = "the allocator's own function")]

/// Gives the system the memory that is free and that the allocator keeps for later: what caches of many texts leave between those
/// that go on would else count as the program's. For programs that run long: it takes some 10 ms for every GiB that the program holds,
/// during which others wait for memory. Only glibc keeps so much that it matters; nothing happens elsewhere.
pub fn give_back_free_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `malloc_trim` takes no pointers, and other threads may allocate meanwhile.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(all(test, target_os = "linux", target_env = "gnu"))]
mod tests {
    #![allow(clippy::unwrap_used)] // a test may panic

    use super::*;

    /// MiB of the process.
    fn resident() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        let kib = line.unwrap().split_whitespace().nth(1).unwrap();
        kib.parse::<usize>().unwrap() / 1024
    }

    #[test]
    fn memory_between_what_is_held_goes_back() {
        let blocks: Vec<Vec<u8>> = (0..1 << 16).map(|_| vec![1; 4000]).collect();
        // One of many stays, so that nothing is free at the end.
        let stays = blocks.into_iter().step_by(64).collect::<Vec<_>>();
        let before = resident();
        give_back_free_memory();
        let after = resident();
        assert!(after + 150 < before, "{before} MiB before, {after} after");
        assert_eq!(stays.len(), 1 << 10);
    }
}
