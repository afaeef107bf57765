use std::borrow::Cow;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};

use super::{Coder, LayerSettings, Leaving};
use crate::attention::{DenseRows, Head, Source, attend_heads};
use crate::codes::Codes;
use crate::dictionary::{
    Atoms, HeadMaps, JointBasis, LayerDictionaries, LayerSparsities, for_heads,
};
use crate::encode::EncodedBatch;
use crate::key_value::KeyValue;
use crate::threads::{Alone, Threads};
use crate::{Error, Result};

/// Max positions of a prompt that are coded at once: enough to read a dictionary seldom.
const AT_ONCE: usize = 1024;
/// The number of `held` positions that the next query no longer sees through a sliding window; `None` until they are
/// enough to be worth moving the rest.
pub fn outside_window(sliding_window: Option<usize>, held: usize) -> Option<usize> {
    const WORTH: usize = 64;
    let outside = held.checked_sub(sliding_window?.saturating_sub(1))?;
    (outside >= WORTH).then_some(outside)
}

/// The keys and values of one layer of one sequence: the past as codes over the model's dictionaries, the newest
/// positions, and the first ones where the settings say so, dense. Where the dictionaries have maps of the heads all of them
/// are kept behind these; what goes in and comes out is as the model made it.
///
/// A step [attends](LayerCache::attend) with its own keys and values at full precision, then
/// [appends](LayerCache::append) them. What the recent window cannot hold of a prompt is coded right then. In decode
/// positions leave the recent window in batches of [`LayerSettings::batch`]; a batch takes its place among the codes
/// [`LayerSettings::delay`] steps later, coded in the background where the settings say so, and is attended to as dense
/// until then. With a [limit of memory](super::MemoryLimit) all positions are dense, and attended to as the uncompressed cache does,
/// until they no longer fit. Results depend neither on timing nor, but for the order of sums over long contexts, on the number of
/// threads.
pub struct LayerCache {
    pub(super) coders: KeyValue<Coder>,
    head_dim: usize,
    pub(super) settings: Arc<LayerSettings>,
    pub(super) heads: Box<[KeyValue<HeadRows>]>,
    /// The number of positions that were dropped.
    pub(super) dropped: usize,
    /// True while all positions lie in the recent window as the model made them: with a limit of memory, until the first
    /// are to be coded.
    pub(super) all_dense: bool,
    pub(super) leaving: Option<Leaving<Background>>,
}

/// The codes of a batch that another thread makes, in a mutex so that a cache can be shared by threads; `None` where
/// they are made when they are due.
pub(super) type Background = Option<Mutex<Receiver<Result<Batch>>>>;

/// The keys, or the values, of one KV head: the first positions, the past as codes, then the recent window. Where there
/// are maps, all of them are mapped.
#[derive(Clone)]
pub(super) struct HeadRows {
    pub(super) sinks: DenseRows,
    pub(super) codes: Codes,
    pub(super) recent: DenseRows,
}

/// The codes of some positions, head by head.
pub(super) type Batch = KeyValue<Vec<EncodedBatch>>;

/// The bytes that a layer's cache holds, by part. Dictionaries belong to the model and are not among them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LayerFootprint {
    /// The codes of the keys and of the values, room for growth included.
    pub codes: KeyValue<usize>,
    /// The first positions.
    pub sinks: usize,
    /// The recent window.
    pub recent_window: usize,
    /// Copies of what is being coded in the background.
    pub leaving: usize,
    /// Everything else.
    pub bookkeeping: usize,
}

impl LayerFootprint {
    /// The bytes of all parts.
    #[must_use]
    pub fn total(&self) -> usize {
        let dense = self.sinks + self.recent_window + self.leaving;
        self.codes.into_iter().sum::<usize>() + dense + self.bookkeeping
    }
}

/// The bytes that a layer's cache takes beside what it holds.
pub(super) fn bookkeeping(sparsities: &LayerSparsities) -> usize {
    let heads = sparsities.keys.len();
    size_of::<LayerCache>()
        + size_of::<LayerSettings>()
        + heads * (size_of::<KeyValue<HeadRows>>() + 2 * size_of::<usize>())
}

impl LayerCache {
    /// Makes an empty cache of a layer with these dictionaries.
    ///
    /// # Errors
    /// [`Error::Setting`] where the batch is 0, there are not sparsities for all KV heads, or there are no codebooks for
    /// additive codes; [`Error::Sparsity`], [`Error::Codebooks`] or [`Error::Tolerance`] where these cannot be.
    pub fn new(dictionaries: &LayerDictionaries, settings: LayerSettings) -> Result<Self> {
        let coders = settings.coders(dictionaries)?;
        let sparsities = &settings.sparsities;
        let head_dim = dictionaries.head_dim();
        let heads = sparsities.keys.iter().zip(&sparsities.values);
        let heads = heads.map(|(&keys, &values)| {
            let parts = coders.as_ref().zip(KeyValue { keys, values });
            parts.try_map(|(coder, sparsity)| {
                Ok(HeadRows {
                    sinks: DenseRows::new(head_dim, settings.number_type),
                    codes: Codes::new(coder.format(sparsity))?,
                    recent: DenseRows::new(head_dim, settings.number_type),
                })
            })
        });
        Ok(Self {
            heads: heads.collect::<Result<_>>()?,
            coders,
            head_dim,
            all_dense: settings.memory.is_some(),
            settings: Arc::new(settings),
            dropped: 0,
            leaving: None,
        })
    }

    /// The number of positions held.
    pub fn len(&self) -> usize {
        self.sinks() + self.coded() + self.dense()
    }

    /// Returns whether no positions are held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The number of positions that are codes.
    pub fn coded(&self) -> usize {
        self.heads.first().map_or(0, |head| head.keys.codes.len())
    }

    /// The number of first positions that are kept dense.
    pub fn sinks(&self) -> usize {
        self.heads.first().map_or(0, |head| head.keys.sinks.len())
    }

    /// The number of the position, as the model counts them, of the first one that is coded, or would be.
    fn first_coded(&self) -> usize {
        self.dropped + self.sinks()
    }

    /// The number of positions in the recent window.
    pub fn dense(&self) -> usize {
        self.heads.first().map_or(0, |head| head.keys.recent.len())
    }

    /// The settings.
    pub fn settings(&self) -> &LayerSettings {
        &self.settings
    }

    /// Attention of `queries` `[kv_heads, G, t, m]` over all positions held and, causally, over `t` new ones, keys and
    /// values `[kv_heads, t, m]`, which are not appended; scores are scaled by `1/√m`. Without new positions `t` is 1 and
    /// the query sees what is held. `out` is of the queries' shape.
    ///
    /// # Panics
    /// Where the slices' lengths do not agree.
    pub fn attend(
        &self,
        queries: &[f32],
        new: Option<KeyValue<&[f32]>>,
        out: &mut [f32],
        threads: &dyn Threads,
    ) {
        let heads: Vec<usize> = (0..self.heads.len()).collect();
        self.attend_some(&heads, queries, new, out, threads);
    }

    /// [`LayerCache::attend`] of some heads alone, all numbers theirs: those of one of the layers that are coded together, at
    /// whose turn the others' new positions are not there yet.
    ///
    /// # Panics
    /// Where the slices' lengths do not agree, or there is no such head.
    pub fn attend_some(
        &self,
        heads: &[usize],
        queries: &[f32],
        new: Option<KeyValue<&[f32]>>,
        out: &mut [f32],
        threads: &dyn Threads,
    ) {
        let m = self.head_dim;
        let row = heads.len() * m;
        assert!(
            new.is_none_or(|new| new.keys.len().is_multiple_of(row.max(1))
                && new.values.len() == new.keys.len()),
            "new keys and values of every head"
        );
        let t = new.map_or(1, |new| new.keys.len() / row);
        assert_eq!(queries.len(), out.len(), "one output a query");
        if queries.is_empty() {
            return;
        }
        if self.is_empty() && new.is_none() {
            out.fill(0.0);
            return;
        }
        let maps = self.maps_of_dense();
        let mapped = new.map(|new| self.mapped(heads, new));
        let new = mapped.as_ref().map(|both| both.as_ref().map(|x| &x[..]));
        let queries = match maps.keys {
            Some(maps) => &for_heads(heads.iter().copied(), queries, |head, own| {
                maps.queries(head, own)
            }),
            None => queries,
        };
        let atoms = self.atoms();
        let bases = self.bases();
        let codes = self.heads.iter();
        let codes = codes.map(|head| head.as_ref().map(|rows| &rows.codes));
        let codes: KeyValue<Vec<&Codes>> = codes.collect();
        let sources: Vec<Vec<Source<'_>>> = heads
            .iter()
            .enumerate()
            .map(|(number, &h)| {
                let rows = self.heads[h].as_ref();
                let mut sources = Vec::with_capacity(4);
                if self.settings.sinks > 0 && !self.all_dense {
                    sources.push(Source::Dense(rows.map(|rows| &rows.sinks)));
                }
                if !self.all_dense {
                    let offsets = maps.keys;
                    let offsets = offsets.and_then(|maps| maps.offsets(h, self.first_coded()));
                    sources.push(match bases {
                        KeyValue {
                            keys: Some(keys),
                            values: Some(values),
                        } => {
                            let first = h / keys.together() * keys.together();
                            Source::Joint {
                                codes: codes
                                    .as_ref()
                                    .map(|codes| &codes[first..first + keys.together()]),
                                basis: KeyValue::new(keys.of_head(h), values.of_head(h)),
                                atoms,
                                offsets,
                            }
                        }
                        _ => Source::Codes {
                            codes: rows.map(|rows| &rows.codes),
                            atoms,
                            offsets,
                        },
                    });
                }
                sources.push(Source::Dense(rows.map(|rows| &rows.recent)));
                if let Some(new) = new {
                    let own = new.map(|x| &x[number * t * m..][..t * m]);
                    sources.push(Source::Causal(own));
                }
                sources
            })
            .collect();
        let mut tasks = Head::split(queries, &sources, out);
        attend_heads(&mut tasks, m, t, self.settings.sliding_window, threads);
        if let Some(maps) = maps.values {
            let back = for_heads(heads.iter().copied(), out, |head, own| {
                maps.invert(head, own)
            });
            out.copy_from_slice(&back);
        }
    }

    /// Takes new positions, keys and values `[kv_heads, t, m]`; one is a step of decode, several are a prompt.
    ///
    /// # Errors
    /// [`Error::Coding`] for a key or value that is not finite, at the latest when it is coded; the cache cannot be used
    /// any further then. [`Error::Memory`] for more positions than the limit of memory holds; the cache is then as it was.
    ///
    /// # Panics
    /// Where the numbers are not as many for each head, or keys and values differ in number.
    pub fn append(&mut self, new: KeyValue<&[f32]>, threads: &dyn Threads) -> Result<()> {
        let row = self.heads.len() * self.head_dim;
        assert!(
            new.keys.len().is_multiple_of(row) && new.keys.len() == new.values.len(),
            "new keys and values of every head"
        );
        let mut t = new.keys.len() / row;
        if let Some(memory) = self.settings.memory
            && self.len() + t > memory.capacity()
        {
            return Err(Error::Memory {
                positions: self.len() + t,
                bytes: memory.bytes(),
                capacity: memory.capacity(),
            });
        }
        if self.all_dense && self.must_code(t) {
            self.prepare_to_code();
        }
        let heads: Vec<usize> = (0..self.heads.len()).collect();
        let mut mapped = self.mapped(&heads, new);
        if let Some(first) = self.extend_sinks(mapped.as_ref().map(|x| &x[..]), t) {
            mapped = first.map(Cow::Owned);
            t = mapped.keys.len() / row;
        }
        let new = mapped.as_ref().map(|x| &x[..]);
        if t == 1 && self.settings.wait() > 0 {
            self.append_one(new, threads)?;
        } else if t > 0 {
            self.append_many(new, t, threads)?;
        }
        if let Some(outside) = outside_window(self.settings.sliding_window, self.len()) {
            let oldest = match self.all_dense {
                true => self.dense(),
                false => self.sinks() + self.coded(),
            };
            self.drop_front(outside.min(oldest));
        }
        Ok(())
    }

    /// Drops the `count` oldest positions.
    ///
    /// # Panics
    /// Where there are fewer.
    pub fn drop_front(&mut self, count: usize) {
        self.dropped += count;
        let sinks = count.min(self.sinks());
        let coded = (count - sinks).min(self.coded());
        let recent = count - sinks - coded;
        if recent > 0 {
            // What is on its way to the codes would be other positions.
            self.leaving = None;
        }
        for rows in self.heads.iter_mut().flat_map(KeyValue::as_mut) {
            rows.sinks.drop_front(sinks);
            rows.codes.drop_front(coded);
            rows.recent.drop_front(recent);
        }
    }

    /// A copy that goes on by itself, exactly as this cache would. Both share the codes that are there, so that these take
    /// memory once; what is dense is copied.
    #[must_use]
    pub fn fork(&self) -> Self {
        Self {
            coders: self.coders.clone(),
            head_dim: self.head_dim,
            settings: Arc::clone(&self.settings),
            heads: self.heads.clone(),
            dropped: self.dropped,
            all_dense: self.all_dense,
            // Coding a batch anew gives the same.
            leaving: self.leaving.as_ref().map(|leaving| Leaving {
                age: leaving.age,
                codes: None,
            }),
        }
    }

    /// The keys and values of all positions, `[kv_heads, positions, m]`, as attention takes them.
    ///
    /// # Errors
    /// Those of [`Codes::decode`].
    pub fn decode(&self) -> Result<KeyValue<Vec<f32>>> {
        let coded = self.decoded_codes()?;
        let maps = self.maps_of_dense();
        let mut all = KeyValue::<Vec<f32>>::default();
        for (number, head) in self.heads.iter().enumerate() {
            let parts = head.as_ref().zip(coded.as_ref()).zip(maps);
            for (all, ((rows, coded), maps)) in all.as_mut().zip(parts) {
                let each = coded.len() / self.heads.len();
                let mut coded = coded[number * each..][..each].to_vec();
                let mut own = rows.sinks.to_f32();
                if let Some(maps) = maps {
                    maps.uncentre(number, self.first_coded().., &mut coded);
                }
                own.extend(coded);
                own.extend(rows.recent.to_f32());
                match maps {
                    Some(maps) => all.extend(maps.invert(number, &own)),
                    None => all.extend(own),
                }
            }
        }
        Ok(all)
    }

    /// What the codes of keys and of values stand for behind the maps of each head, `[kv_heads, positions, m]`.
    fn decoded_codes(&self) -> Result<KeyValue<Vec<f32>>> {
        let mut all = KeyValue::<Vec<f32>>::default();
        for head in &self.heads {
            let parts = head.as_ref().zip(self.atoms());
            for (all, (rows, atoms)) in all.as_mut().zip(parts) {
                all.extend(rows.codes.decode(atoms)?);
            }
        }
        let bases = self.bases();
        Ok(all.zip(bases).map(|(parts, basis)| match basis {
            Some(basis) => basis.invert(&parts),
            None => parts,
        }))
    }

    /// The bases that heads are coded in together, if there are any.
    fn bases(&self) -> KeyValue<Option<&JointBasis>> {
        self.maps().map(|maps| maps.and_then(HeadMaps::basis))
    }

    /// The bytes allocated now, by part.
    pub fn footprint(&self) -> LayerFootprint {
        let mut footprint = LayerFootprint {
            bookkeeping: bookkeeping(&self.settings.sparsities),
            ..LayerFootprint::default()
        };
        for head in &self.heads {
            for (codes, rows) in footprint.codes.as_mut().zip(head.as_ref()) {
                *codes += rows.codes.bytes();
                footprint.sinks += rows.sinks.bytes();
                footprint.recent_window += rows.recent.bytes();
            }
        }
        if self.leaving.as_ref().is_some_and(|l| l.codes.is_some()) {
            let numbers = 2 * self.heads.len() * self.settings.batch * self.head_dim;
            footprint.leaving = numbers * size_of::<f32>();
        }
        footprint
    }

    /// `m`, the length of a key or value of one head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// The atoms that keys and values are coded over.
    pub(super) fn atoms(&self) -> KeyValue<Atoms<'_>> {
        let parts = self.coders.as_ref().zip(self.settings.sparsities.as_ref());
        parts.map(|(coder, sparsities)| coder.atoms(max(sparsities)))
    }

    /// The maps of keys and of values.
    fn maps(&self) -> KeyValue<Option<&HeadMaps>> {
        self.coders.as_ref().map(Coder::maps)
    }

    /// The maps that what is dense is behind.
    fn maps_of_dense(&self) -> KeyValue<Option<&HeadMaps>> {
        match self.all_dense {
            true => KeyValue::default(),
            false => self.maps(),
        }
    }

    /// New keys and values of some heads, `[heads, t, m]`, behind the maps, if there are any.
    fn mapped<'v>(&self, heads: &[usize], new: KeyValue<&'v [f32]>) -> KeyValue<Cow<'v, [f32]>> {
        let parts = self.maps_of_dense().zip(new);
        parts.map(|(maps, new)| match maps {
            Some(maps) => Cow::Owned(for_heads(heads.iter().copied(), new, |head, own| {
                maps.apply(head, own)
            })),
            None => Cow::Borrowed(new),
        })
    }

    /// Takes the first positions of a sequence out of `t` new ones; returns the others, `None` where none were taken.
    fn extend_sinks(&mut self, new: KeyValue<&[f32]>, t: usize) -> Option<KeyValue<Vec<f32>>> {
        if self.all_dense || self.coded() + self.dense() > 0 {
            return None;
        }
        let count = self.settings.sinks.saturating_sub(self.sinks()).min(t);
        if count == 0 {
            return None;
        }
        let m = self.head_dim;
        let mut rest = KeyValue::<Vec<f32>>::default();
        for (h, head) in self.heads.iter_mut().enumerate() {
            for ((rows, new), rest) in head.as_mut().zip(new).zip(rest.as_mut()) {
                let (first, others) = new[h * t * m..(h + 1) * t * m].split_at(count * m);
                rows.sinks.reserve(count);
                rows.sinks.extend(first);
                rows.recent.pass(count);
                rest.extend_from_slice(others);
            }
        }
        Some(rest)
    }

    /// Takes the new position of a step of decode.
    fn append_one(&mut self, new: KeyValue<&[f32]>, threads: &dyn Threads) -> Result<()> {
        self.extend_recent(new, 0);
        let mut leaving = self.leaving.take();
        let begin = || Ok(self.begin());
        let (older, held) = (self.sinks() + self.coded(), self.dense());
        let due = Leaving::step(&mut leaving, &self.settings, older, held, begin);
        self.leaving = leaving;
        match due? {
            Some(codes) => self.finish(codes, threads),
            None => Ok(()),
        }
    }

    /// Takes new positions and codes at once what the recent window cannot hold: those of a prompt, and where batches are
    /// too small to wait.
    fn append_many(
        &mut self,
        new: KeyValue<&[f32]>,
        t: usize,
        threads: &dyn Threads,
    ) -> Result<()> {
        if let Some(leaving) = self.leaving.take() {
            self.finish(leaving.codes, threads)?;
        }
        let held = self.dense();
        let surplus = self.surplus(t);
        let position = self.first_coded() + self.coded();
        for first in (0..surplus).step_by(AT_ONCE) {
            let count = AT_ONCE.min(surplus - first);
            // What was dense goes before its codes come, so that both never take memory.
            let vectors = self.read(first - first.min(held), count, new);
            self.drop_recent(count.min(self.dense()));
            let batch = encode(
                &self.coders,
                &self.settings,
                position + first,
                vectors,
                threads,
            )?;
            self.extend_codes(&batch);
        }
        let passing = surplus.saturating_sub(held);
        if passing > 0 {
            for rows in self.heads.iter_mut().flat_map(KeyValue::as_mut) {
                rows.recent.pass(passing);
            }
        }
        self.extend_recent(new, passing);
        Ok(())
    }

    /// The positions to code at once where `t` new ones come.
    fn surplus(&self, t: usize) -> usize {
        let older = self.sinks() + self.coded();
        self.settings.surplus(older, self.dense(), t)
    }

    /// Whether anything is to be coded, or on its way to that, once `t` new positions are there.
    fn must_code(&self, t: usize) -> bool {
        match t == 1 && self.settings.wait() > 0 {
            true => self.settings.begins(0, self.dense() + 1),
            false => self.surplus(t) > 0,
        }
    }

    /// Makes the positions, all dense and as the model made them, what the codes need: the first ones apart, and all of them
    /// behind the maps.
    fn prepare_to_code(&mut self) {
        self.all_dense = false;
        let first = self.settings.sinks.saturating_sub(self.dropped);
        let count = first.min(self.dense());
        let maps = self.coders.as_ref().map(Coder::maps);
        for (number, head) in self.heads.iter_mut().enumerate() {
            for (rows, maps) in head.as_mut().zip(maps) {
                if let Some(maps) = maps {
                    rows.recent.map(|own| maps.apply(number, own));
                }
                let mut first = Vec::new();
                rows.recent.read(0, count, &mut first);
                rows.recent.drop_front(count);
                rows.sinks.reserve(count);
                rows.sinks.extend(&first);
            }
        }
    }

    /// Hands the oldest dense positions over to be coded.
    fn begin(&self) -> Background {
        self.settings.background.then(|| {
            let vectors = self.read(0, self.settings.batch, KeyValue::default());
            let (coders, settings) = (self.coders.clone(), Arc::clone(&self.settings));
            let first = self.first_coded() + self.coded();
            let (sender, receiver) = channel();
            rayon::spawn(move || {
                // Where the cache is gone nobody waits for them.
                let _ = sender.send(encode(&coders, &settings, first, vectors, &Alone));
            });
            Mutex::new(receiver)
        })
    }

    /// Puts the batch that is leaving the recent window among the codes.
    fn finish(&mut self, codes: Background, threads: &dyn Threads) -> Result<()> {
        let count = self.settings.batch;
        // A worker that is gone without an answer has panicked; what it had to code is still there.
        let codes = codes.and_then(|codes| codes.into_inner().ok()?.recv().ok());
        let batch = codes.unwrap_or_else(|| {
            let vectors = self.read(0, count, KeyValue::default());
            let first = self.first_coded() + self.coded();
            encode(&self.coders, &self.settings, first, vectors, threads)
        })?;
        self.drop_recent(count);
        self.extend_codes(&batch);
        Ok(())
    }

    /// Keys and values of `count` positions of all heads, from `first` on, of the dense and then the new ones.
    fn read(&self, first: usize, count: usize, new: KeyValue<&[f32]>) -> KeyValue<Vec<f32>> {
        let (m, held) = (self.head_dim, self.dense());
        let dense = count.min(held.saturating_sub(first));
        let passing = first.max(held) - held;
        let mut vectors = KeyValue::<Vec<f32>>::default();
        for (h, head) in self.heads.iter().enumerate() {
            for ((out, rows), new) in vectors.as_mut().zip(head.as_ref()).zip(new) {
                rows.recent.read(first.min(held), dense, out);
                let own = &new[h * new.len() / self.heads.len()..];
                out.extend_from_slice(&own[passing * m..][..(count - dense) * m]);
            }
        }
        vectors
    }

    fn extend_codes(&mut self, batch: &Batch) {
        let batches = batch.keys.iter().zip(&batch.values);
        for (head, (keys, values)) in self.heads.iter_mut().zip(batches) {
            head.keys.codes.extend(keys);
            head.values.codes.extend(values);
        }
    }

    /// Appends the new positions from `first` on to the recent window.
    fn extend_recent(&mut self, new: KeyValue<&[f32]>, first: usize) {
        let (m, heads) = (self.head_dim, self.heads.len());
        for (h, head) in self.heads.iter_mut().enumerate() {
            for (rows, new) in head.as_mut().zip(new) {
                let each = new.len() / heads;
                rows.recent
                    .extend(&new[h * each..(h + 1) * each][first * m..]);
            }
        }
    }

    fn drop_recent(&mut self, count: usize) {
        for rows in self.heads.iter_mut().flat_map(KeyValue::as_mut) {
            rows.recent.drop_front(count);
        }
    }
}

/// Codes mapped keys and values `[kv_heads, positions, m]` from position `first` on. All heads at once: every reading of a
/// dictionary serves as many vectors as there are.
fn encode(
    coders: &KeyValue<Coder>,
    settings: &LayerSettings,
    first: usize,
    vectors: KeyValue<Vec<f32>>,
    threads: &dyn Threads,
) -> Result<Batch> {
    let parts = KeyValue::new("key", "value").zip(coders.as_ref());
    let parts = parts.zip(settings.sparsities.as_ref().zip(vectors));
    parts.try_map(|((part, coder), (sparsities, mut vectors))| {
        if let Some(maps) = coder.maps().filter(|_| !vectors.is_empty()) {
            let each = vectors.len() / sparsities.len();
            for (head, own) in vectors.chunks_exact_mut(each).enumerate() {
                maps.centre(head, first.., own);
            }
            if let Some(basis) = maps.basis() {
                vectors = basis.apply(&vectors);
            }
        }
        let encoder = coder.encoder(max(sparsities), settings.fit)?;
        let batches = encoder.encode_heads(&vectors, sparsities, threads);
        batches.map_err(|source| Error::Coding {
            part,
            source: Box::new(source),
        })
    })
}

/// The largest sparsity of a layer's heads.
fn max(sparsities: &[usize]) -> usize {
    sparsities.iter().copied().max().unwrap_or(1)
}
