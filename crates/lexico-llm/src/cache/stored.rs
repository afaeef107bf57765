//! One cache for the methods: it checks what it is given, attends, counts positions and adds up bytes. How a layer, a KV
//! head or a list of vectors is stored is the method's.

use ::lexico::KeyValue;
use ::lexico::attention::{DenseRows, NumberType, Positions, Source};
use ::lexico::cache::outside_window;
use candle_core::Tensor;

use super::method::Lengths;
use super::recent_window::RecentWindow;
use super::{Decoded, Footprint, KvCache, Step};
use crate::config::Config;
use crate::error::Result;

/// A cache whose layers are stored as a method has them.
pub struct StoredCache<L: StoredLayer> {
    pub(super) layers: Vec<L>,
    shared: L::Shared,
    sliding_window: Option<usize>,
    positions: usize,
}

/// A layer's keys and values as a method stores them.
#[allow(private_interfaces)] // public for `FullCache` alone
pub trait StoredLayer: Send {
    /// Settings and tables that all layers use.
    type Shared: Send;

    /// True where keys and values that are not finite are refused: quantisation would make something else of them.
    const FINITE_ONLY: bool = true;

    /// Attends with a step's queries to the positions held and to the step's own, and takes those.
    ///
    /// # Errors
    /// Those of the tensors that it computes with.
    fn attend(&mut self, shared: &mut Self::Shared, step: &Step, at: Place) -> Result<Tensor>;

    /// All keys and values as attention takes them; `None` of a method that gives positions up.
    ///
    /// # Errors
    /// Those of the tensors that it computes with.
    fn decoded(&self, _shared: &Self::Shared) -> Result<Option<Decoded>> {
        Ok(None)
    }

    /// Bytes allocated, by part.
    fn bytes(&self) -> Vec<(&'static str, usize)>;

    /// Bytes allocated for what all layers use, by part.
    fn shared_bytes(_shared: &Self::Shared) -> Vec<(&'static str, usize)> {
        Vec::new()
    }
}

/// A step's place in the model.
#[derive(Clone, Copy)]
pub struct Place {
    /// Number of the layer.
    pub(super) layer: usize,
    /// The model's sliding window.
    pub(super) sliding_window: Option<usize>,
}

/// A KV head's keys and values as a method stores them. A layer of a method that needs no more is a `Vec` of these.
pub trait StoredHead: Send + Sync {
    /// Settings and tables that all heads use.
    type Shared: Send;

    /// The layer's [`StoredLayer::FINITE_ONLY`].
    const FINITE_ONLY: bool = true;

    /// Number of positions held.
    fn len(&self) -> usize;

    /// Positions held, in order, as attention reads them.
    fn sources(&self) -> Vec<Source<'_>>;

    /// Takes a step's positions.
    fn take(&mut self, shared: &Self::Shared, new: NewPositions<'_>);

    /// Drops the `count` oldest positions, or as many of them as can be dropped now. Never called where the model has no
    /// sliding window.
    fn drop_front(&mut self, _count: usize) {}

    /// All keys and values, `[n, m]`; `None` of a method that gives positions up.
    fn vectors(&self) -> Option<KeyValue<Vec<f32>>> {
        None
    }

    /// Bytes allocated for keys and values, by part; the head's own struct is counted without it.
    fn bytes(&self) -> Vec<(&'static str, KeyValue<usize>)>;
}

/// A step's new positions in a KV head.
pub struct NewPositions<'a> {
    /// Number of the layer.
    pub(super) layer: usize,
    /// Queries at the new positions, `[G, t, m]`.
    pub(super) queries: &'a [f32],
    /// Keys and values, `[t, m]`.
    pub(super) vectors: KeyValue<&'a [f32]>,
}

impl<L: StoredLayer> StoredCache<L> {
    /// Makes an empty cache of layers that `layer` makes.
    pub(super) fn with_layers(config: &Config, shared: L::Shared, layer: impl Fn() -> L) -> Self {
        Self {
            layers: (0..config.layers).map(|_| layer()).collect(),
            shared,
            sliding_window: config.window,
            positions: 0,
        }
    }
}

impl<H: StoredHead> StoredCache<Vec<H>> {
    /// Makes an empty cache of KV heads that `head` makes.
    pub(super) fn with_heads(config: &Config, shared: H::Shared, head: impl Fn() -> H) -> Self {
        let layer = || (0..config.kv_heads).map(|_| head()).collect();
        Self::with_layers(config, shared, layer)
    }
}

impl<L: StoredLayer> KvCache for StoredCache<L> {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let step = Step::new(q, k, v)?;
        if L::FINITE_ONLY {
            step.check_finite(layer)?;
        }
        let at = Place {
            layer,
            sliding_window: self.sliding_window,
        };
        let out = self.layers[layer].attend(&mut self.shared, &step, at)?;
        if layer + 1 == self.layers.len() {
            self.positions += k.dim(1)?;
        }
        Ok(out)
    }

    fn len(&self) -> usize {
        self.positions
    }

    fn footprint(&self) -> Footprint {
        let mut footprint = Footprint::default();
        let layers = self.layers.iter().flat_map(L::bytes);
        for (name, bytes) in layers.chain(L::shared_bytes(&self.shared)) {
            footprint.add(name, bytes);
        }
        footprint
    }

    fn decoded(&self, layer: usize) -> Result<Option<Decoded>> {
        self.layers[layer].decoded(&self.shared)
    }
}

#[allow(private_interfaces)] // as the trait
impl<H: StoredHead> StoredLayer for Vec<H> {
    type Shared = H::Shared;

    const FINITE_ONLY: bool = H::FINITE_ONLY;

    fn attend(&mut self, shared: &mut H::Shared, step: &Step, at: Place) -> Result<Tensor> {
        let out = step.attend(self, at.sliding_window, H::sources)?;
        let new = step.queries().zip(step.heads());
        for (head, (queries, vectors)) in self.iter_mut().zip(new) {
            let new = NewPositions {
                layer: at.layer,
                queries,
                vectors,
            };
            head.take(shared, new);
            if let Some(outside) = outside_window(at.sliding_window, head.len()) {
                head.drop_front(outside);
            }
        }
        Ok(out)
    }

    fn decoded(&self, _shared: &Self::Shared) -> Result<Option<Decoded>> {
        let mut decoded = Decoded::default();
        for head in self {
            let Some(vectors) = head.vectors() else {
                return Ok(None);
            };
            decoded.extend(vectors);
            for (_, bytes) in head.bytes() {
                decoded.bytes[0] += bytes.keys;
                decoded.bytes[1] += bytes.values;
            }
        }
        Ok(Some(decoded))
    }

    fn bytes(&self) -> Vec<(&'static str, usize)> {
        let parts = self.iter().flat_map(H::bytes);
        let parts = parts.map(|(name, bytes)| (name, bytes.keys + bytes.values));
        parts
            .chain([("bookkeeping", self.len() * size_of::<H>())])
            .collect()
    }
}

/// A growing list of keys, or of values, of a KV head in a code.
pub(super) trait CodedVectors: Send + Sync {
    /// Number of vectors.
    fn len(&self) -> usize;

    /// Codes vectors, `[n, m]`, and appends them.
    fn extend(&mut self, vectors: &[f32]);

    /// Appends `count` decoded vectors from `first` on to `out`.
    fn read(&self, first: usize, count: usize, out: &mut Vec<f32>);

    /// Drops the `count` oldest vectors.
    fn drop_front(&mut self, count: usize);

    /// Bytes allocated.
    fn bytes(&self) -> usize;
}

/// A KV head whose positions are coded one by one, but for a recent window that is dense in f16.
pub(super) struct CodedHead<C> {
    pub(super) coded: KeyValue<C>,
    window: KeyValue<RecentWindow>,
}

impl<C: CodedVectors> CodedHead<C> {
    /// Makes an empty head; `coded` makes empty lists of vectors in the code.
    pub(super) fn new(head_dim: usize, window: usize, coded: impl Fn() -> C) -> Self {
        let window = || RecentWindow::new(head_dim, window);
        Self {
            coded: KeyValue::new(coded(), coded()),
            window: KeyValue::new(window(), window()),
        }
    }

    /// Bytes that a cache of such heads is expected to hold, with a recent window of `window` positions and `vector` bytes
    /// for each key and each value before it.
    pub(super) fn expected_bytes(
        config: &Config,
        lengths: Lengths,
        window: usize,
        vector: usize,
    ) -> f64 {
        let positions = lengths.end.min(config.window.unwrap_or(usize::MAX));
        let dense = positions.min(window);
        let each = (positions - dense) * vector + dense * 2 * config.head_dim;
        let head = size_of::<Self>() + 2 * each;
        (config.layers * config.kv_heads * head) as f64
    }
}

impl<C: CodedVectors> Positions for CodedHead<C> {
    fn len(&self) -> usize {
        self.coded.keys.len()
    }

    fn read(&self, first: usize, count: usize, keys: &mut Vec<f32>, values: &mut Vec<f32>) {
        self.coded.keys.read(first, count, keys);
        self.coded.values.read(first, count, values);
    }
}

impl<C: CodedVectors> StoredHead for CodedHead<C> {
    type Shared = ();

    fn len(&self) -> usize {
        self.coded.keys.len() + self.window.keys.rows.len()
    }

    fn sources(&self) -> Vec<Source<'_>> {
        let window = self.window.as_ref().map(|window| &window.rows);
        vec![Source::Decoded(self), Source::Dense(window)]
    }

    fn take(&mut self, _shared: &(), new: NewPositions<'_>) {
        let windows = self.window.as_mut().zip(new.vectors);
        for (coded, (window, vectors)) in self.coded.as_mut().zip(windows) {
            coded.extend(&window.take(vectors));
        }
    }

    fn drop_front(&mut self, count: usize) {
        for coded in self.coded.as_mut() {
            coded.drop_front(count.min(coded.len()));
        }
    }

    fn vectors(&self) -> Option<KeyValue<Vec<f32>>> {
        let both = self.coded.as_ref().zip(self.window.as_ref());
        Some(both.map(|(coded, window)| {
            let mut vectors = Vec::new();
            coded.read(0, coded.len(), &mut vectors);
            vectors.extend(window.rows.to_f32());
            vectors
        }))
    }

    fn bytes(&self) -> Vec<(&'static str, KeyValue<usize>)> {
        let window = self.window.as_ref();
        vec![
            ("codes", self.coded.as_ref().map(C::bytes)),
            ("window", window.map(|window| window.rows.bytes())),
        ]
    }
}

/// Dense keys and values of a KV head, in order of position.
pub struct DenseHead {
    pub(super) rows: KeyValue<DenseRows>,
}

impl DenseHead {
    /// Makes an empty head.
    pub(super) fn new(head_dim: usize, number_type: NumberType) -> Self {
        let rows = || DenseRows::new(head_dim, number_type);
        Self {
            rows: KeyValue::new(rows(), rows()),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.rows.keys.len()
    }

    pub(super) fn source(&self) -> Source<'_> {
        Source::Dense(self.rows.as_ref())
    }

    /// Appends keys and values, `[t, m]`.
    pub(super) fn extend(&mut self, new: KeyValue<&[f32]>) {
        for (rows, vectors) in self.rows.as_mut().zip(new) {
            rows.extend(vectors);
        }
    }

    /// Bytes allocated.
    pub(super) fn bytes(&self) -> KeyValue<usize> {
        self.rows.as_ref().map(DenseRows::bytes)
    }
}
