//! candle's tensors in a GPU's memory, for our kernels.

use std::sync::{Arc, Mutex, PoisonError};

use ::lexico::cuda::{Gpu, Streams, kernel_folder};
use candle_core::cuda_backend::cudarc::driver::DevicePtr;
use candle_core::{CudaDevice, DType, Device, DeviceLocation, Storage, Tensor};

use crate::error::{Error, Result};

/// A device's streams, the first of which is candle's.
pub(super) fn streams(device: &Device) -> Result<Arc<Streams<Gpu>>> {
    static OPEN: Mutex<Vec<(CudaDevice, Arc<Streams<Gpu>>)>> = Mutex::new(Vec::new());
    let own = device.as_cuda_device()?;
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, streams)) = open.iter().find(|(device, _)| device.id() == own.id()) {
        return Ok(Arc::clone(streams));
    }
    let refused = |reason: ::lexico::Error| refused(device, &reason);
    let gpu = Gpu::of_stream(own.cuda_stream(), kernel_folder()).map_err(refused)?;
    let streams = Arc::new(gpu.with_background_stream().map_err(refused)?);
    open.push((own.clone(), Arc::clone(&streams)));
    Ok(streams)
}

pub(super) fn refused(device: &Device, reason: &::lexico::Error) -> Error {
    let name = match device.location() {
        DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        _ => "cpu".to_owned(),
    };
    Error::Device {
        name,
        reason: reason.to_string(),
    }
}

/// A tensor's numbers in a row, in f32.
pub(super) fn in_a_row(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.to_dtype(DType::F32)?.contiguous()?)
}

/// The address of the numbers of a tensor that [`in_a_row`] gave. They stay as long as the tensor, and what was asked of candle's stream
/// before it is dropped still finds them.
pub(super) fn address(tensor: &Tensor) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cuda(storage) => {
            let numbers = storage.as_cuda_slice::<f32>()?;
            let (start, _) = numbers.device_ptr(numbers.stream());
            Ok(start + (layout.start_offset() * size_of::<f32>()) as u64)
        }
        _ => Err(Error::Device {
            name: "cpu".to_owned(),
            reason: "its tensors are not in a GPU's memory".to_owned(),
        }),
    }
}

/// A tensor of this shape that holds anything.
pub(super) fn room(shape: (usize, usize, usize), device: &Device) -> Result<Tensor> {
    // SAFETY: floats are numbers whatever they hold; callers write all of them before they read any.
    Ok(unsafe { Tensor::empty(shape, DType::F32, device)? })
}
