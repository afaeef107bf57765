//! Sizes of memory as people write them, and this process's memory as the operating system counts it.

/// Reads a size in bytes.
pub(crate) fn size(text: &str) -> Result<usize, String> {
    let bytes = lexico::parse_size(text).map(|bytes| bytes as usize);
    bytes.ok_or_else(|| "it must be a size, as 512MiB or 2GiB".to_owned())
}

/// Returns resident bytes now, and their peak so far; `None` where the system does not tell (Linux does).
pub(crate) fn resident() -> Option<(usize, usize)> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kibibytes = |name: &str| -> Option<usize> {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse().ok()
    };
    Some((kibibytes("VmRSS:")? * 1024, kibibytes("VmHWM:")? * 1024))
}

/// Starts the peak of [`resident`] anew, where the system can.
pub(crate) fn forget_peak() {
    // Where it cannot, what came before counts too.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}
