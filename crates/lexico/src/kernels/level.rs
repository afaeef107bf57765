//! Levels of instructions that kernels are compiled for, and the one that the program runs at.

use std::sync::OnceLock;

/// Instructions that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Level {
    /// Instructions of every processor of the architecture.
    Portable,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX2 and products of 8-bit integers, by AVX-VNNI.
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    /// AVX-512 F, BW, DQ, VL and VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX-512 and AMX's tiles of 8-bit integers.
    #[cfg(target_arch = "x86_64")]
    Amx,
    /// NEON.
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// NEON and products of 8-bit integers.
    #[cfg(target_arch = "aarch64")]
    DotProduct,
}

impl Level {
    /// Whether AVX-512 is among the level's instructions.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn has_avx512(self) -> bool {
        matches!(self, Self::Avx512 | Self::Amx)
    }

    /// Levels of this processor by their names in the environment variable, the best last.
    pub(super) fn all() -> Vec<(&'static str, Self)> {
        #[allow(unused_mut, reason = "other architectures have one level")]
        let mut all = vec![("portable", Self::Portable)];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
        {
            all.push(("avx2", Self::Avx2));
            if is_x86_feature_detected!("avxvnni") {
                all.push(("avx-vnni", Self::AvxVnni));
            }
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni")
            {
                all.push(("avx512", Self::Avx512));
                if super::amx::is_available() {
                    all.push(("amx", Self::Amx));
                }
            }
        }
        #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
        if std::arch::is_aarch64_feature_detected!("neon") {
            all.push(("neon", Self::Neon));
            if std::arch::is_aarch64_feature_detected!("dotprod") {
                all.push(("dotprod", Self::DotProduct));
            }
        }
        all
    }
}

/// Environment variable that holds the program to a lower level, for tests and measurements of every path.
const LEVEL_VARIABLE: &str = "LEXICO_LEVEL";

/// `LEXICO_LEVEL` names no level of this processor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{LEVEL_VARIABLE}={found:?} is no level of this processor, which has {known}; unset it for the best of them",
    known = known.join(", ")
)]
pub struct LevelError {
    /// The variable's value.
    pub found: String,
    /// Levels that this processor has, the best last.
    pub known: Vec<&'static str>,
}

static LEVEL: OnceLock<Level> = OnceLock::new();

/// Checks that `LEXICO_LEVEL` is unset or names one of this processor's levels. Programs call it once at their
/// start; dictionaries and codes check it when they are made.
///
/// # Errors
/// [`LevelError`] where it names another.
pub fn check_level() -> Result<(), LevelError> {
    if LEVEL.get().is_none() {
        let level = chosen(held_to())?;
        LEVEL.get_or_init(|| level);
    }
    Ok(())
}

/// The level that the program runs at: the best that this processor has, unless it is held to another.
///
/// # Panics
/// Where `LEXICO_LEVEL` names no level of this processor, which [`check_level`] would have said.
#[allow(
    clippy::panic,
    reason = "running at another level than the one asked for would go unnoticed"
)]
pub(super) fn level() -> Level {
    #[cfg(test)]
    if let Some(level) = super::testing::HELD.get() {
        return level;
    }
    *LEVEL.get_or_init(|| chosen(held_to()).unwrap_or_else(|error| panic!("{error}")))
}

fn held_to() -> Option<String> {
    let name = std::env::var_os(LEVEL_VARIABLE)?;
    Some(name.to_string_lossy().into_owned())
}

fn chosen(held_to: Option<String>) -> Result<Level, LevelError> {
    let all = Level::all();
    let Some(found) = held_to else {
        return Ok(all.last().map_or(Level::Portable, |&(_, level)| level));
    };
    match all.iter().find(|(name, _)| *name == found) {
        Some(&(_, level)) => Ok(level),
        None => Err(LevelError {
            found,
            known: all.into_iter().map(|(name, _)| name).collect(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_is_chosen_by_name_and_by_no_other() {
        let all = Level::all();
        assert_eq!(chosen(None), Ok(all[all.len() - 1].1));
        for &(name, level) in &all {
            assert_eq!(chosen(Some(name.to_owned())), Ok(level));
        }
        for wrong in ["avx3", "AVX2", " portable", ""] {
            let error = chosen(Some(wrong.to_owned())).unwrap_err();
            assert_eq!(error.found, wrong);
            assert_eq!(error.known.len(), all.len());
            let message = error.to_string();
            assert!(message.contains(&format!("{wrong:?}")), "{message}");
            assert!(message.contains("portable"), "{message}");
        }
    }

    #[test]
    fn a_level_of_another_processor_is_none_of_this_one() {
        let other = if cfg!(target_arch = "aarch64") {
            "avx2"
        } else {
            "neon"
        };
        assert!(chosen(Some(other.to_owned())).is_err());
    }
}
