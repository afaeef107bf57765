//! The part of the benches that runs on a GPU, in builds for GPUs.

#[cfg(feature = "cuda")]
use lexico::Fit;
use lexico::dictionary::{Atoms, Codebooks};
use lexico::{CodeFormat, Dictionary, EncodedBatch, Result};

use super::Device;

/// Vectors that lie ready on a GPU.
pub(crate) struct OnGpu {
    /// Mean relative error of their codes.
    pub(crate) relative_error: f32,
    /// Codes them all once, and waits for it.
    pub(crate) encode: Box<dyn Fn() -> Result<()>>,
}

/// Prepares pursuit of `vectors` on a GPU, the error that of `sample`; `None` where the device is the processor.
#[cfg(not(feature = "cuda"))]
pub(crate) fn pursuit(
    device: Device,
    _dictionary: &Dictionary,
    _sparsity: usize,
    _sample: &[f32],
    _vectors: &[f32],
) -> anyhow::Result<Option<OnGpu>> {
    none(device)
}

/// Prepares beam search of `vectors` on a GPU; `None` where the device is the processor.
#[cfg(not(feature = "cuda"))]
pub(crate) fn beam_search(
    device: Device,
    _dictionary: &Codebooks,
    _sparsity: usize,
    _vectors: &[f32],
) -> anyhow::Result<Option<OnGpu>> {
    none(device)
}

/// Bytes of the codes on a GPU, and the function that attends to them once and waits for it.
pub(crate) type Attend = (usize, Box<dyn Fn() -> Result<()>>);

/// Prepares attention of one new position on a GPU over codes that `draw` makes, those of keys and of values of each
/// *pair*, a sequence's KV head; `None` where the device is the processor.
#[cfg(not(feature = "cuda"))]
pub(crate) fn attention(
    device: Device,
    _format: CodeFormat,
    _atoms: [Atoms<'_>; 2],
    _group: usize,
    _pairs: usize,
    _draw: impl FnMut() -> anyhow::Result<Vec<EncodedBatch>>,
) -> anyhow::Result<Option<Attend>> {
    none(device)
}

/// Refuses a GPU in a build that is for the processor alone.
#[cfg(not(feature = "cuda"))]
fn none<T>(device: Device) -> anyhow::Result<Option<T>> {
    anyhow::ensure!(
        !matches!(device, Device::Cuda(_)),
        "the device {device}: this build is for the processor alone; build it with --features cuda, or use --device cpu"
    );
    Ok(None)
}

#[cfg(feature = "cuda")]
pub(crate) use on::{attention, beam_search, pursuit};

#[cfg(feature = "cuda")]
mod on {
    use super::*;
    use lexico::cuda::{
        Device as _, DeviceAttention, DeviceCodes, DeviceEncoder, DevicePast, DeviceRows, Gpu,
        Streams, kernel_folder,
    };

    /// Opens a GPU's streams; `None` for the processor.
    fn streams(device: Device) -> anyhow::Result<Option<Streams<Gpu>>> {
        let number = match device {
            Device::Cpu => return Ok(None),
            Device::Cuda(number) => number,
        };
        Ok(Some(
            Gpu::new(number, kernel_folder())?.with_background_stream()?,
        ))
    }

    fn upload(gpu: &Gpu, numbers: &[f32]) -> Result<<Gpu as lexico::cuda::Device>::Memory> {
        let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        let mut memory = gpu.allocate(bytes.len())?;
        gpu.write(&mut memory, 0, &bytes)?;
        Ok(memory)
    }

    pub(crate) fn pursuit(
        device: Device,
        dictionary: &Dictionary,
        sparsity: usize,
        sample: &[f32],
        vectors: &[f32],
    ) -> anyhow::Result<Option<OnGpu>> {
        let Some(streams) = streams(device)? else {
            return Ok(None);
        };
        let encoder = DeviceEncoder::pursuit(&streams.main, dictionary, sparsity)?;
        prepared(
            encoder,
            streams,
            dictionary.head_dim(),
            sparsity,
            sample,
            vectors,
        )
    }

    pub(crate) fn beam_search(
        device: Device,
        dictionary: &Codebooks,
        sparsity: usize,
        vectors: &[f32],
    ) -> anyhow::Result<Option<OnGpu>> {
        let Some(streams) = streams(device)? else {
            return Ok(None);
        };
        let encoder = DeviceEncoder::beam_search(&streams.main, dictionary, sparsity)?;
        prepared(
            encoder,
            streams,
            dictionary.head_dim(),
            sparsity,
            vectors,
            vectors,
        )
    }

    fn prepared(
        encoder: DeviceEncoder<Gpu>,
        streams: Streams<Gpu>,
        m: usize,
        sparsity: usize,
        sample: &[f32],
        vectors: &[f32],
    ) -> anyhow::Result<Option<OnGpu>> {
        anyhow::ensure!(
            m.is_multiple_of(16),
            "on a GPU vectors are of a multiple of 16 numbers, not of {m}"
        );
        let count = sample.len() / m;
        let rows = upload(&streams.main, sample)?;
        let fit = Fit::LeastSquares;
        let found = encoder.encode_heads(&streams, &rows, count, &[sparsity], fit)?;
        streams.main.wait_for(&streams.background)?;
        let mut errors = vec![0; count * size_of::<f32>()];
        streams.main.read(&found.errors, 0, &mut errors)?;
        drop(found);
        let errors = errors.as_chunks().0.iter();
        let sum: f64 = errors.map(|&b| f64::from(f32::from_le_bytes(b))).sum();
        let count = vectors.len() / m;
        let vectors = upload(&streams.main, vectors)?;
        let encode = move || {
            let found = encoder.encode_heads(&streams, &vectors, count, &[sparsity], fit)?;
            streams.background.finish()?;
            drop(found);
            Ok(())
        };
        Ok(Some(OnGpu {
            relative_error: (sum / (sample.len() / m).max(1) as f64) as f32,
            encode: Box::new(encode),
        }))
    }

    pub(crate) fn attention(
        device: Device,
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
                    first: 0,
                    window: DeviceRows {
                        keys: 0,
                        values: 0,
                        room: 1,
                        start: 0,
                        len: 0,
                        sinks: 0,
                        first_sink: 0,
                    },
                })
                .collect();
            let at = <Gpu as lexico::cuda::Device>::address;
            // SAFETY: as many queries and outputs are there; no window is read.
            unsafe { attention.attend(&gpu, &pasts, at(&queries), at(&out))? };
            gpu.finish()
        };
        Ok(Some((bytes, Box::new(attend))))
    }
}
