use super::LayerSettings;
use crate::{attention, codes};

/// Dense positions that the window keeps at the least, in batches.
const LEAST: usize = 2;
/// Bytes that a page of codes takes beside them, at the most.
const CODE_PAGE: usize = 256;

/// A limit of the bytes that the caches of all layers of a sequence take: positions stay dense while they fit, and as the
/// memory fills the oldest are coded, in every layer as many.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MemoryLimit {
    bytes: usize,
    /// What is taken whatever is held.
    fixed: usize,
    /// Bytes of a position in all layers, dense.
    dense: usize,
    /// Bytes of a position in all layers, coded.
    code: usize,
    sinks: usize,
    batch: usize,
    /// Dense positions that may be held beyond the window: those that are to leave, their copies and room for more.
    beyond: usize,
}

impl MemoryLimit {
    /// The limit of the caches of a model's layers with these settings, `bytes` for all of them; `None` where a code takes as
    /// much as what it stands for.
    #[must_use]
    pub fn new(bytes: usize, layers: &[LayerSettings], head_dim: usize) -> Option<Self> {
        let first = layers.first()?;
        let all = |of: &dyn Fn(&LayerSettings) -> usize| layers.iter().map(of).sum::<usize>();
        let dense = all(&|layer| layer.dense_bytes(head_dim));
        let code = all(&|layer| layer.code_bytes());
        // Two batches leave at the most; while they do the older is held a second time, in f32.
        let copies = 2 * first.batch * size_of::<f32>() / first.number_type.bytes();
        // Lists of pages, of dense vectors and of codes.
        let dense_pages = 2 + bytes / dense.max(1) / attention::PAGE;
        let code_pages = 2 + bytes / code.max(1) / codes::PAGE;
        let lists = |layer: &LayerSettings| 2 * layer.sparsities.keys.len();
        let list = dense_pages * size_of::<Vec<u16>>() + code_pages * CODE_PAGE;
        let bookkeeping = |layer: &LayerSettings| super::layer::bookkeeping(&layer.sparsities);
        (code < dense).then_some(Self {
            bytes,
            fixed: all(&|layer| bookkeeping(layer) + lists(layer) * list),
            dense,
            code,
            sinks: first.sinks,
            batch: first.batch,
            beyond: 2 * first.batch + copies + attention::ROOM,
        })
    }

    /// The limit, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The positions that the caches can take at the most, all but the newest few of them coded. Fewer than the first
    /// positions and the smallest window where the limit is too small for anything.
    #[must_use]
    pub fn capacity(&self) -> usize {
        let least = self.sinks + LEAST * self.batch;
        let taken = self.fixed + (least + self.beyond) * self.dense + room(usize::MAX) * self.code;
        match self.bytes.checked_sub(taken) {
            Some(left) => least + left / self.code,
            None => self.bytes.saturating_sub(self.fixed) / self.dense.max(1),
        }
    }

    /// The newest positions that stay dense when `positions` are held: all of them while they fit.
    pub(crate) fn window(&self, positions: usize) -> usize {
        let fixed = self.fixed + (self.sinks + self.beyond) * self.dense;
        let others = positions.saturating_sub(self.sinks);
        if fixed + others * self.dense <= self.bytes {
            return positions;
        }
        // `fixed + window · dense + (others − window + room) · code = bytes`
        let coded = fixed + (others + room(others)) * self.code;
        let window = self.bytes.saturating_sub(coded) / (self.dense - self.code);
        window.clamp(LEAST * self.batch, positions.max(LEAST * self.batch))
    }

    /// The steps that a batch may wait at the most, so that as many positions leave as must: for each that comes more than
    /// one.
    pub(crate) fn wait(&self) -> usize {
        (self.batch * (self.dense - self.code) / self.dense).saturating_sub(1)
    }
}

/// The codes that there is room for beyond `coded`, at the most.
fn room(coded: usize) -> usize {
    4 + coded.min(codes::PAGE) / 64
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // a test may panic

    use super::*;
    use crate::dictionary::LayerSparsities;

    #[test]
    fn the_window_shrinks_as_memory_fills_and_grows_with_the_limit() {
        let layers = vec![LayerSettings::new(LayerSparsities::same(3, 12, 12)); 30];
        let dense = 30 * layers[0].dense_bytes(64);
        let limit = |positions: usize| MemoryLimit::new(positions * dense, &layers, 64).unwrap();
        let own = limit(1000);
        assert_eq!(own.window(800), 800);
        assert!(
            own.window(1001) < 900 && own.window(1001) > 700,
            "{}",
            own.window(1001)
        );
        let windows: Vec<usize> = (1000..own.capacity()).map(|n| own.window(n)).collect();
        assert!(windows.is_sorted_by(|a, b| a >= b));
        assert!(windows.last().unwrap() < &40, "{:?}", windows.last());
        assert!(own.capacity() > 6000, "{}", own.capacity());
        for positions in [500, 2000, 5000] {
            let windows = [300, 600, 1000, 3000].map(|n| limit(n).window(positions));
            assert!(windows.is_sorted(), "{windows:?}");
        }
        assert!(limit(10).capacity() <= 10);
        assert!(own.wait() >= 8);
    }

    #[test]
    fn codes_as_long_as_vectors_are_no_help() {
        let layers = [LayerSettings::new(LayerSparsities::same(1, 200, 200))];
        assert_eq!(MemoryLimit::new(1 << 20, &layers, 64), None);
    }
}
