//! What the processor has, asked once.

use std::sync::OnceLock;

/// Instructions that there are kernels for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Level {
    /// Those of every processor of the architecture.
    Portable,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// And products of 8-bit integers, by AVX-VNNI.
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    /// AVX-512 F, BW, DQ, VL and VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// NEON.
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// And products of 8-bit integers.
    #[cfg(target_arch = "aarch64")]
    DotProduct,
}

impl Level {
    /// Those of this processor, the best last.
    pub(super) fn all() -> Vec<Self> {
        #[allow(unused_mut, reason = "other architectures have one level")]
        let mut all = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
        {
            all.push(Self::Avx2);
            if is_x86_feature_detected!("avxvnni") {
                all.push(Self::AvxVnni);
            }
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni")
            {
                all.push(Self::Avx512);
            }
        }
        #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
        if std::arch::is_aarch64_feature_detected!("neon") {
            all.push(Self::Neon);
            if std::arch::is_aarch64_feature_detected!("dotprod") {
                all.push(Self::DotProduct);
            }
        }
        all
    }

    /// As the environment variable has it.
    fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => "avx-vnni",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
            #[cfg(target_arch = "aarch64")]
            Self::Neon => "neon",
            #[cfg(target_arch = "aarch64")]
            Self::DotProduct => "dotprod",
        }
    }
}

/// The environment variable that holds the program to a lower level, for tests and measurements of every
/// path.
const LEVEL_VARIABLE: &str = "LEXICO_LEVEL";

/// The level that the program runs at: the best that this processor has, unless it is held to another.
pub(super) fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        let held_to = std::env::var(LEVEL_VARIABLE);
        let all = Level::all();
        let named = all
            .iter()
            .find(|level| held_to.as_deref() == Ok(level.name()));
        named.or(all.last()).copied().unwrap_or(Level::Portable)
    })
}
