//! What the operating system says of this process's memory.

/// Resident bytes now, and at their most so far; `None` where the system does not tell (it does on
/// Linux).
pub(crate) fn resident() -> Option<(usize, usize)> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kibibytes = |name: &str| -> Option<usize> {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse().ok()
    };
    Some((kibibytes("VmRSS:")? * 1024, kibibytes("VmHWM:")? * 1024))
}

/// Lets [`resident`] count the most from now on, where the system can.
pub(crate) fn forget_peak() {
    // Where it cannot, what came before counts too.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}
