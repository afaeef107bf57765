//! Chooses between the forms of a kernel. `sparse`, `dense` and `scan` also ask for the level in their `mod.rs`.

/// Runs a kernel of the family around it at the program's level, or at the one given: the function of that name in
/// `portable`, `avx2` and so on.
macro_rules! dispatch {
    ($name:ident($($argument:expr),*)) => {
        dispatch!($crate::kernels::level::level(), $name($($argument),*))
    };
    ($level:expr, $name:ident($($argument:expr),*)) => {
        match $level {
            $crate::kernels::level::Level::Portable => portable::$name::<false>($($argument),*),
            // SAFETY: such a level is only where its instructions are; the family's `mod.rs` checks the sizes.
            #[cfg(target_arch = "x86_64")]
            $crate::kernels::level::Level::Avx2 => unsafe { avx2::$name($($argument),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            $crate::kernels::level::Level::AvxVnni => unsafe { avx_vnni::$name($($argument),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            $crate::kernels::level::Level::Avx512 => unsafe { avx512::$name($($argument),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            $crate::kernels::level::Level::Amx => unsafe { amx::$name($($argument),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "aarch64")]
            $crate::kernels::level::Level::Neon => unsafe { neon::$name($($argument),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "aarch64")]
            $crate::kernels::level::Level::DotProduct => unsafe { dot_product::$name($($argument),*) },
        }
    };
}
pub(super) use dispatch;

/// Compiles kernels of `portable` for the instructions of every level, as [`dispatch!`] looks for them.
macro_rules! compile {
    (@ $module:ident $arch:literal $features:literal
        $($name:ident($($argument:ident: $type:ty),*) $(-> $result:ty)?;)*
    ) => {
        #[cfg(target_arch = $arch)]
        mod $module {
            use super::*;
            $(#[target_feature(enable = $features)]
            pub(super) fn $name($($argument: $type),*) $(-> $result)? {
                portable::$name::<true>($($argument),*)
            })*
        }
    };
    ($($kernels:tt)*) => {
        compile!(@ avx2 "x86_64" "avx2,fma,f16c" $($kernels)*);
        compile!(@ avx512 "x86_64" "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c" $($kernels)*);
        compile!(@ neon "aarch64" "neon" $($kernels)*);
        #[cfg(target_arch = "x86_64")]
        use {avx2 as avx_vnni, avx512 as amx};
        #[cfg(target_arch = "aarch64")]
        use neon as dot_product;
    };
}
pub(super) use compile;
