//! One cache for the methods: it checks what it is given, attends, counts positions and adds up bytes. How a layer, a KV
//! head or a list of vectors is stored is the method's.

use ::lexico::KeyValue;
use ::lexico::attention::{DenseRows, NumberType, Positions, Source};
use ::lexico::cache::outside_window;
use candle_core::Tensor;

use super::method::{Lengths, MethodOption, Values, option};
use super::recent_window::RecentWindow;
use super::{CacheSpec, Decoded, Footprint, KvCache, Step};
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

    /// Takes a step's positions where nobody asks for the attention.
    ///
    /// # Errors
    /// Those of [`attend`](StoredLayer::attend).
    fn read(&mut self, shared: &mut Self::Shared, step: &Step, at: Place) -> Result<()> {
        self.attend(shared, step, at).map(drop)
    }

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

    /// What a step's own queries attend to for its new keys and values, `[t, m]`; `None` where that is these as they are.
    fn as_attended(&self, _new: KeyValue<&[f32]>) -> Option<KeyValue<Vec<f32>>> {
        None
    }

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
    /// Makes an empty cache of layers that `layer` makes by their number.
    pub(super) fn with_layers(
        config: &Config,
        shared: L::Shared,
        layer: impl Fn(usize) -> L,
    ) -> Self {
        Self {
            layers: (0..config.layers).map(layer).collect(),
            shared,
            sliding_window: config.window,
            positions: 0,
        }
    }
}

impl<H: StoredHead> StoredCache<Vec<H>> {
    /// Makes an empty cache of KV heads that `head` makes for the layer of a number.
    pub(super) fn with_heads(
        config: &Config,
        shared: H::Shared,
        head: impl Fn(usize) -> H,
    ) -> Self {
        let layer = |layer| (0..config.kv_heads).map(|_| head(layer)).collect();
        Self::with_layers(config, shared, layer)
    }
}

impl<L: StoredLayer> StoredCache<L> {
    /// Gives a step to its layer.
    fn step<T>(
        &mut self,
        layer: usize,
        [q, k, v]: [&Tensor; 3],
        take: impl FnOnce(&mut L, &mut L::Shared, &Step, Place) -> Result<T>,
    ) -> Result<T> {
        let step = Step::new(q, k, v)?;
        if L::FINITE_ONLY {
            step.check_finite(layer)?;
        }
        let at = Place {
            layer,
            sliding_window: self.sliding_window,
        };
        let out = take(&mut self.layers[layer], &mut self.shared, &step, at)?;
        if layer + 1 == self.layers.len() {
            self.positions += k.dim(1)?;
        }
        Ok(out)
    }
}

impl<L: StoredLayer> KvCache for StoredCache<L> {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        self.step(layer, [q, k, v], L::attend)
    }

    fn read(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
        self.step(layer, [q, k, v], L::read)
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
        let attended = attended(self, step);
        let attended = attended.as_ref().unwrap_or(step);
        let out = attended.attend(self, at.sliding_window, H::sources)?;
        self.read(shared, step, at)?;
        Ok(out)
    }

    fn read(&mut self, shared: &mut H::Shared, step: &Step, at: Place) -> Result<()> {
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
        Ok(())
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

/// The step as its own queries attend to it, where some head has new positions attended to as coded.
fn attended<H: StoredHead>(heads: &[H], step: &Step) -> Option<Step> {
    let seen = heads.iter().zip(step.heads());
    let seen: Vec<_> = seen.map(|(head, new)| head.as_attended(new)).collect();
    seen.iter().any(Option::is_some).then(|| {
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for (seen, new) in seen.iter().zip(step.heads()) {
            let seen = seen.as_ref().map(|seen| seen.as_ref().map(Vec::as_slice));
            let seen = seen.unwrap_or(new);
            keys.extend_from_slice(seen.keys);
            values.extend_from_slice(seen.values);
        }
        Step {
            queries: step.queries.clone(),
            keys,
            values,
            shape: step.shape,
        }
    })
}

/// How a step's own positions are attended to by its queries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Own {
    /// As they are.
    Exact,
    /// As coded where they are, as in programs that write to the cache first and then attend to it.
    Coded,
    /// As coded where a step has one position, and as they are in prompts.
    CodedInDecode,
}

/// Option of methods whose programs write to the cache first, of prompts too.
pub(super) const OWN: MethodOption = option("own", Values::OneOf(&["coded", "exact"]), "coded")
    .about("new positions are attended to as coded (as in its program), or exact (as by others)");

impl Own {
    /// What the option says.
    pub(super) fn of(spec: &CacheSpec) -> Self {
        match spec.text(OWN.name) {
            "exact" => Self::Exact,
            _ => Self::Coded,
        }
    }
}

/// A growing list of keys, or of values, of a KV head in a code.
pub(super) trait CodedVectors: Send + Sync {
    /// An empty list of the same code.
    fn empty(&self) -> Self
    where
        Self: Sized;

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
    own: Own,
}

impl<C: CodedVectors> CodedHead<C> {
    /// Makes an empty head of keys and values in these codes, both empty.
    pub(super) fn new(head_dim: usize, window: usize, coded: KeyValue<C>) -> Self {
        let window = || RecentWindow::new(head_dim, window);
        Self {
            coded,
            window: KeyValue::new(window(), window()),
            own: Own::Exact,
        }
    }

    /// The same head, which attends to a step's own positions in this way. In a recent window they are as they are.
    pub(super) fn attending(self, own: Own) -> Self {
        Self { own, ..self }
    }

    /// Bytes that a head is expected to hold, with a recent window of `window` positions and `pair` bytes for each key
    /// and value before it.
    pub(super) fn expected_bytes(
        config: &Config,
        lengths: Lengths,
        window: usize,
        pair: usize,
    ) -> usize {
        let positions = lengths.end.min(config.window.unwrap_or(usize::MAX));
        let dense = positions.min(window);
        size_of::<Self>() + (positions - dense) * pair + dense * 4 * config.head_dim
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

    fn as_attended(&self, new: KeyValue<&[f32]>) -> Option<KeyValue<Vec<f32>>> {
        let m = self.window.keys.rows.head_dim();
        let coded = match self.own {
            Own::Exact => false,
            Own::Coded => true,
            Own::CodedInDecode => new.keys.len() == m,
        };
        (coded && self.window.keys.max == 0).then(|| {
            self.coded.as_ref().zip(new).map(|(coded, vectors)| {
                let mut list = coded.empty();
                list.extend(vectors);
                let mut out = Vec::with_capacity(vectors.len());
                list.read(0, list.len(), &mut out);
                out
            })
        })
    }

    fn take(&mut self, _shared: &(), new: NewPositions<'_>) {
        let windows = self.window.as_mut().zip(new.vectors);
        for (coded, (window, vectors)) in self.coded.as_mut().zip(windows) {
            coded.extend(&window.take(vectors));
        }
    }

    fn drop_front(&mut self, count: usize) {
        let coded = count.min(self.coded.keys.len());
        self.coded.keys.drop_front(coded);
        self.coded.values.drop_front(coded);
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
