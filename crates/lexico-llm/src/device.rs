//! Devices on which a model computes: the processor, or a GPU.

use std::fmt;
use std::str::FromStr;

use candle_core::Device;

use crate::error::{Error, Result};

/// A device by its name: `cpu`, `cuda` or `cuda:N`, or `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceName {
    /// The first GPU where this build is for GPUs and there is one, else the processor.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// The NVIDIA GPU of this number, the first being 0.
    Cuda(usize),
}

impl DeviceName {
    /// The device.
    ///
    /// # Errors
    /// [`Error::Device`] for a GPU that is not there, or where this build is not for GPUs.
    pub fn open(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda(number) => cuda(number),
            Self::Auto if candle_core::utils::cuda_is_available() => match cuda(0) {
                Err(Error::Device { reason, .. }) if reason.contains(NO_DEVICE) => Ok(Device::Cpu),
                // A GPU that is there and fails is no reason to be slow without a word.
                opened => opened,
            },
            Self::Auto => Ok(Device::Cpu),
        }
    }
}

/// Message of CUDA's driver where there is no GPU.
const NO_DEVICE: &str = "CUDA_ERROR_NO_DEVICE";

fn cuda(number: usize) -> Result<Device> {
    // Without the calls that led there, which candle may add.
    let refused = |reason: &str| Error::Device {
        name: DeviceName::Cuda(number).to_string(),
        reason: reason.lines().next().unwrap_or_default().to_owned(),
    };
    if !candle_core::utils::cuda_is_available() {
        let reason = "this build of the program is for the processor alone; build it with \
                      --features cuda, or use --device cpu";
        return Err(refused(reason));
    }
    // A stream of its own: that of a thread would wait for other threads' work.
    let device = Device::new_cuda_with_stream(number);
    let device = device.map_err(|error| refused(&error.to_string()))?;
    // SAFETY: all tensors are used on candle's stream alone; what another stream uses is ours, and waits are ours too.
    #[cfg(feature = "cuda")]
    unsafe {
        device.as_cuda_device()?.disable_event_tracking();
    }
    Ok(device)
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => write!(f, "auto"),
            Self::Cpu => write!(f, "cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let number = match text {
            "auto" => return Ok(Self::Auto),
            "cpu" => return Ok(Self::Cpu),
            "cuda" => Some(0),
            _ => text.strip_prefix("cuda:").and_then(|n| n.parse().ok()),
        };
        number
            .map(Self::Cuda)
            .ok_or_else(|| format!("{text:?} is none of auto, cpu, cuda and cuda:N"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_names() {
        for name in ["auto", "cpu", "cuda:0", "cuda:13"] {
            assert_eq!(name.parse::<DeviceName>().unwrap().to_string(), name);
        }
        assert_eq!("cuda".parse(), Ok(DeviceName::Cuda(0)));
        for name in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "CPU", "cuda:1:2"] {
            let refused = name.parse::<DeviceName>().unwrap_err();
            assert!(refused.contains("cuda:N"), "{refused}");
        }
    }

    #[test]
    fn what_is_not_there_is_said() {
        assert!(DeviceName::Cpu.open().unwrap().is_cpu());
        if !candle_core::utils::cuda_is_available() {
            assert!(DeviceName::Auto.open().unwrap().is_cpu());
            let refused = DeviceName::Cuda(3).open().unwrap_err().to_string();
            assert!(refused.contains("cuda:3") && refused.contains("--features cuda"));
        }
    }
}
