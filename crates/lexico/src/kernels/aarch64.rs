//! Kernels for NEON, where plain code does not compile to the instructions that it has.

pub(super) mod dense;
pub(super) mod scan;

/// Runs a kernel at the program's level, or at the one named.
macro_rules! dispatch {
    ($name:ident($($argument:expr),*)) => {
        dispatch!(crate::kernels::level::level(), $name($($argument),*))
    };
    ($level:expr, dot_f16($($argument:expr),*)) => {
        match $level {
            crate::kernels::level::Level::Portable => {
                crate::kernels::portable::dot_f16::<true>($($argument),*)
            }
            // SAFETY: such levels are only where NEON was detected.
            crate::kernels::level::Level::Neon | crate::kernels::level::Level::DotProduct => unsafe {
                crate::kernels::aarch64::dense::dot_f16($($argument),*)
            },
        }
    };
    // Every processor of the architecture has fused multiply-add, and the compiler uses NEON by itself.
    ($level:expr, $name:ident($($argument:expr),*)) => {{
        let _: crate::kernels::level::Level = $level;
        crate::kernels::portable::$name::<true>($($argument),*)
    }};
}
pub(super) use dispatch;
