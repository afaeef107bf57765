use ::lexico::dictionary::HeadMaps;
use candle_core::{Device, Tensor};

use crate::error::Result;

/// The maps of a layer's keys, or its values, in a device's memory; see [`HeadMaps`]. Rows are of the KV heads, `[kv_heads, n, m]`, f32.
pub(super) struct DeviceMaps {
    /// `μ`, `[kv_heads, 1, m]`.
    means: Tensor,
    /// `Aᵀ`, `[kv_heads, m, m]`: rows are multiplied from the left.
    matrices: Tensor,
    /// `A⁻¹`, `[kv_heads, m, m]`.
    inverses: Tensor,
    /// `A⁻ᵀ`, `[kv_heads, m, m]`.
    transposed: Tensor,
}

impl DeviceMaps {
    pub(super) fn new(maps: &HeadMaps, device: &Device) -> Result<Self> {
        let (heads, m) = (maps.heads(), maps.head_dim());
        let (means, matrices) = maps.numbers();
        let square = |numbers: Vec<f32>| Tensor::from_vec(numbers, (heads, m, m), device);
        let turned = |square: &Tensor| square.transpose(1, 2)?.contiguous();
        let inverses = square(maps.inverses())?;
        Ok(Self {
            means: Tensor::from_vec(means, (heads, 1, m), device)?,
            matrices: turned(&square(matrices)?)?,
            transposed: turned(&inverses)?,
            inverses,
        })
    }

    /// `A(x − μ)`.
    pub(super) fn apply(&self, rows: &Tensor) -> Result<Tensor> {
        let centred = rows.broadcast_sub(&self.means)?;
        Ok(centred.matmul(&self.matrices)?)
    }

    /// `A⁻¹y + μ`.
    pub(super) fn invert(&self, rows: &Tensor) -> Result<Tensor> {
        let rows = rows.contiguous()?.matmul(&self.transposed)?;
        Ok(rows.broadcast_add(&self.means)?)
    }

    /// `A⁻ᵀq` of queries `[heads, n, m]`, of which as many share each KV head.
    pub(super) fn queries(&self, queries: &Tensor) -> Result<Tensor> {
        self.of_groups(queries, |rows| Ok(rows.matmul(&self.inverses)?))
    }

    /// `A⁻¹o + μ` of outputs `[heads, n, m]`.
    pub(super) fn outputs(&self, outputs: &Tensor) -> Result<Tensor> {
        self.of_groups(outputs, |rows| self.invert(rows))
    }

    /// Does something with the rows of all query heads that share a KV head.
    fn of_groups(&self, rows: &Tensor, each: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let (heads, n, m) = rows.dims3()?;
        let kv_heads = self.means.dim(0)?;
        let grouped = rows.contiguous()?;
        let grouped = grouped.reshape((kv_heads, heads / kv_heads * n, m))?;
        Ok(each(&grouped)?.reshape((heads, n, m))?)
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    /// Tensors on the processor serve as those of a device would.
    #[test]
    fn tensors_are_mapped_as_the_codec_maps() {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let mut draw = |count: usize| -> Vec<f32> {
            (0..count).map(|_| rng.random_range(-1f32..1.0)).collect()
        };
        for (kv_heads, group, n, m) in [(1, 1, 1, 4), (2, 3, 5, 6), (3, 2, 1, 5)] {
            let (means, mut matrices) = (draw(kv_heads * m), draw(kv_heads * m * m));
            for (i, x) in matrices.iter_mut().enumerate() {
                *x = 0.2 * *x + if i % (m * m) % (m + 1) == 0 { 1.5 } else { 0.0 };
            }
            let maps = HeadMaps::new(&means, &matrices, m).unwrap();
            let device = DeviceMaps::new(&maps, &Device::Cpu).unwrap();
            let (rows, asked) = (draw(kv_heads * n * m), draw(kv_heads * group * n * m));
            let tensor = |numbers: &[f32], heads: usize| {
                Tensor::from_slice(numbers, (heads, n, m), &Device::Cpu).unwrap()
            };
            // As a slice of something else lies in memory.
            let strided = |tensor: Tensor| {
                let turned = tensor.transpose(0, 1).unwrap().contiguous().unwrap();
                turned.transpose(0, 1).unwrap()
            };
            let (kv, q) = (
                tensor(&rows, kv_heads),
                strided(tensor(&asked, kv_heads * group)),
            );
            let by_head = |all: &[f32], each: &dyn Fn(usize, &[f32]) -> Vec<f32>| -> Vec<f32> {
                let heads = all.chunks_exact(all.len() / kv_heads).enumerate();
                heads.flat_map(|(head, own)| each(head, own)).collect()
            };
            let apply = by_head(&rows, &|head, own| maps.apply(head, own));
            let invert = by_head(&rows, &|head, own| maps.invert(head, own));
            let queries = by_head(&asked, &|head, own| maps.queries(head, own));
            let outputs = by_head(&asked, &|head, own| maps.invert(head, own));
            for (found, wanted) in [
                (device.apply(&kv), apply),
                (device.invert(&strided(kv.clone())), invert),
                (device.queries(&q), queries),
                (device.outputs(&q), outputs),
            ] {
                let found = found.unwrap();
                let found: Vec<f32> = found.flatten_all().unwrap().to_vec1().unwrap();
                assert_eq!(found.len(), wanted.len());
                for (found, wanted) in found.iter().zip(wanted) {
                    assert!((found - wanted).abs() < 1e-4, "{found} for {wanted}");
                }
            }
        }
    }
}
