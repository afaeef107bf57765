//! Pursuit, storage and attention on codes as kernels for NVIDIA GPUs.
//!
//! The kernels are CUDA C++ in `kernels/`, compiled for the device and the shape at hand when they are first needed. They reach a
//! device by [`Device`] alone, so that tests run the same text on the host, where there is no GPU.

mod attention;
mod codes;
mod compile;
mod device;
mod encode;
mod gpu;
mod layer;
mod means;
mod pair;

pub use attention::DeviceAttention;
pub use codes::DeviceCodes;
pub use compile::{compile, compile_cached, kernel_folder};
pub use device::{Argument, Device, Grid, Program, Streams};
pub use encode::{DEVICE_BEAM, DeviceEncoder, FoundCodes};
pub use gpu::{Gpu, GpuMemory};
pub use layer::{DeviceLayer, DeviceSequence};
pub use pair::{DevicePast, DeviceRows};
