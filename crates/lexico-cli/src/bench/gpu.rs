//! What the benchmarks run on a GPU, in builds for GPUs.

use lexico::dictionary::{Atoms, Codebooks};
use lexico::{CodeFormat, Dictionary, EncodedBatch, Result};
use lexico_llm::DeviceName;

/// Vectors that lie ready on a GPU, and what codes them once and waits for it.
pub(super) struct OnGpu {
    /// Mean relative error of their codes.
    pub(super) relative_error: f32,
    /// Codes them all.
    pub(super) encode: Box<dyn Fn() -> Result<()>>,
}

/// Pursuit of `vectors` on a GPU, the error that of `sample`; `None` where the device is the processor.
#[cfg(not(feature = "cuda"))]
pub(super) fn pursuit(
    device: DeviceName,
    _dictionary: &Dictionary,
    _sparsity: usize,
    _sample: &[f32],
    _vectors: &[f32],
) -> anyhow::Result<Option<OnGpu>> {
    device.open()?;
    Ok(None)
}

/// The search for packed codes of `vectors` on a GPU; `None` where the device is the processor.
#[cfg(not(feature = "cuda"))]
pub(super) fn beam_search(
    device: DeviceName,
    _dictionary: &Codebooks,
    _sparsity: usize,
    _vectors: &[f32],
) -> anyhow::Result<Option<OnGpu>> {
    device.open()?;
    Ok(None)
}

/// What attends once on a GPU, and waits for it; before it the bytes of the codes that it attends to.
pub(super) type Attend = (usize, Box<dyn Fn() -> Result<()>>);

/// Attention of one new position over codes that `draw` makes, those of keys and of values of each *pair*, a sequence's KV head, on a
/// GPU; `None` where the device is the processor.
#[cfg(not(feature = "cuda"))]
pub(super) fn attention(
    device: DeviceName,
    _format: CodeFormat,
    _atoms: [Atoms<'_>; 2],
    _group: usize,
    _pairs: usize,
    _draw: impl FnMut() -> anyhow::Result<Vec<EncodedBatch>>,
) -> anyhow::Result<Option<Attend>> {
    device.open()?;
    Ok(None)
}

#[cfg(feature = "cuda")]
pub(super) use on::{attention, beam_search, pursuit};

#[cfg(feature = "cuda")]
mod on {
    use super::*;
    use lexico::cuda::{
        Device, DeviceAttention, DeviceBeamSearch, DeviceCodes, DevicePast, DevicePursuit,
        DeviceRows, Gpu, Streams, kernel_folder,
    };

    /// A GPU's streams; `None` for the processor.
    fn streams(device: DeviceName) -> anyhow::Result<Option<Streams<Gpu>>> {
        let number = match device {
            DeviceName::Cpu => return Ok(None),
            DeviceName::Cuda(number) => number,
            DeviceName::Auto if device.open()?.is_cuda() => 0,
            DeviceName::Auto => return Ok(None),
        };
        Ok(Some(
            Gpu::new(number, kernel_folder())?.with_background_stream()?,
        ))
    }

    fn upload(gpu: &Gpu, numbers: &[f32]) -> Result<<Gpu as Device>::Memory> {
        let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        let mut memory = gpu.allocate(bytes.len())?;
        gpu.write(&mut memory, 0, &bytes)?;
        Ok(memory)
    }

    fn check_head_dim(m: usize) -> anyhow::Result<()> {
        anyhow::ensure!(
            m.is_multiple_of(16),
            "on a GPU vectors are of a multiple of 16 numbers, not of {m}"
        );
        Ok(())
    }

    pub(in super::super) fn pursuit(
        device: DeviceName,
        dictionary: &Dictionary,
        sparsity: usize,
        sample: &[f32],
        vectors: &[f32],
    ) -> anyhow::Result<Option<OnGpu>> {
        let Some(streams) = streams(device)? else {
            return Ok(None);
        };
        check_head_dim(dictionary.head_dim())?;
        let pursuit = DevicePursuit::new(&streams.main, dictionary, sparsity)?;
        let relative_error = pursuit.encode(&streams, sample)?.mean_relative_error();
        let count = vectors.len() / dictionary.head_dim();
        let vectors = upload(&streams.main, vectors)?;
        let encode = move || {
            let found = pursuit.encode_heads(&streams, &vectors, count, &[sparsity])?;
            streams.background.finish()?;
            drop(found);
            Ok(())
        };
        Ok(Some(OnGpu {
            relative_error,
            encode: Box::new(encode),
        }))
    }

    pub(in super::super) fn beam_search(
        device: DeviceName,
        dictionary: &Codebooks,
        sparsity: usize,
        vectors: &[f32],
    ) -> anyhow::Result<Option<OnGpu>> {
        let Some(streams) = streams(device)? else {
            return Ok(None);
        };
        check_head_dim(dictionary.head_dim())?;
        let pursuit = DeviceBeamSearch::new(&streams.main, dictionary, sparsity)?;
        let found = pursuit.encode(&streams, vectors, &[sparsity], false)?;
        let batch = found.batch(&streams.main, dictionary.groups(), &[sparsity])?;
        let relative_error = batch.mean_relative_error();
        let count = vectors.len() / dictionary.head_dim();
        let vectors = upload(&streams.main, vectors)?;
        let encode = move || {
            let found = pursuit.encode_heads(&streams, &vectors, count, &[sparsity], false)?;
            streams.background.finish()?;
            drop(found);
            Ok(())
        };
        Ok(Some(OnGpu {
            relative_error,
            encode: Box::new(encode),
        }))
    }

    pub(in super::super) fn attention(
        device: DeviceName,
        format: CodeFormat,
        [key_atoms, value_atoms]: [Atoms<'_>; 2],
        group: usize,
        pairs: usize,
        mut draw: impl FnMut() -> anyhow::Result<Vec<EncodedBatch>>,
    ) -> anyhow::Result<Option<Attend>> {
        let Some(streams) = streams(device)? else {
            return Ok(None);
        };
        let gpu = streams.main;
        let attention = DeviceAttention::new(&gpu, format, key_atoms, value_atoms, group)?;
        let mut codes = Vec::new();
        for _ in 0..2 * pairs {
            let mut own = DeviceCodes::new(&gpu, format)?;
            for batch in draw()? {
                own.extend(&gpu, &batch)?;
            }
            codes.push(own);
        }
        let m = key_atoms.head_dim();
        let queries = upload(&gpu, &vec![0.1; pairs * group * m])?;
        let out = upload(&gpu, &vec![0.0; pairs * group * m])?;
        let bytes = codes.iter().map(DeviceCodes::bytes).sum();
        let attend = move || {
            let pasts: Vec<DevicePast<'_, Gpu>> = codes
                .as_chunks::<2>()
                .0
                .iter()
                .map(|[keys, values]| DevicePast {
                    keys,
                    values,
                    hidden: 0,
                    window: DeviceRows {
                        keys: 0,
                        values: 0,
                        room: 1,
                        start: 0,
                        len: 0,
                    },
                })
                .collect();
            let at = <Gpu as Device>::address;
            // SAFETY: as many queries and outputs are there; no window is read.
            unsafe { attention.attend(&gpu, &pasts, at(&queries), at(&out))? };
            gpu.finish()
        };
        Ok(Some((bytes, Box::new(attend))))
    }
}
