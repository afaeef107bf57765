//! Caches that lie in a device's memory as a whole.

mod dense;
#[cfg(feature = "cuda")]
mod gpu;
#[cfg(feature = "cuda")]
mod lexico;
#[cfg(any(feature = "cuda", test))]
mod maps;

pub(crate) use dense::DeviceFullCache;
#[cfg(feature = "cuda")]
pub(crate) use lexico::{DeviceLexicoCache, decode_together};
