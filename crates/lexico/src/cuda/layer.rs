use std::sync::Arc;

use super::attention::DeviceAttention;
use super::codes::DeviceCodes;
use super::device::{Argument, CODES, COMMON, Device, Grid, PAIR, Program, Streams, upload};
use super::encode::{DEVICE_BEAM, DeviceEncoder, FoundCodes};
use super::pair::{DevicePast, DeviceRows, describe};
use crate::attention::NumberType;
use crate::cache::{Coder, Coding, LayerFootprint, LayerSettings, Leaving};
use crate::codes::{CodeFormat, CoefficientFormat};
use crate::dictionary::LayerDictionaries;
use crate::key_value::KeyValue;
use crate::{Error, Result};

/// Positions of a prompt that are coded at once.
const AT_ONCE: usize = 4096;
/// Blocks along x at the most, each of which goes through rows in strides.
const MAX_BLOCKS: usize = 4096;

/// The part of a layer that its sequences share on a device: dictionaries, and the kernels over them.
pub struct DeviceLayer<D: Device> {
    streams: Arc<Streams<D>>,
    settings: LayerSettings,
    query_group: usize,
    coders: KeyValue<Coder>,
    encoders: KeyValue<DeviceEncoder<D>>,
    attention: DeviceAttention<D>,
    program: Program,
    head_dim: usize,
    /// Rows that a window has room for: those of a batch that is being coded stay until it is due.
    room: usize,
}

/// One sequence's keys and values in one layer, in a device's memory: the first positions dense, codes, the newest positions dense.
pub struct DeviceSequence<D: Device> {
    /// Those of each head.
    codes: KeyValue<Vec<DeviceCodes<D>>>,
    /// Each head's recent window, `[room, m]`, and its first positions, `[sinks, m]`, halves.
    dense: KeyValue<D::Memory>,
    room: usize,
    sliding_window: Option<usize>,
    /// The first positions that are held, and how many before them no query sees any more.
    sinks: usize,
    first_sink: usize,
    /// The window's first row, and how many there are.
    start: usize,
    held: usize,
    leaving: Option<Leaving<DeviceBatch<D>>>,
    /// Positions that have come.
    positions: usize,
}

/// Positions that are being coded on the second stream.
struct DeviceBatch<D: Device> {
    found: KeyValue<FoundCodes<D>>,
    /// Vectors of each head.
    count: usize,
    /// The end of the search.
    done: D::Mark,
    /// The vectors that it reads.
    _vectors: KeyValue<D::Memory>,
    streams: Arc<Streams<D>>,
}

impl<D: Device> Drop for DeviceBatch<D> {
    /// The search may still be on its way, and its memory is the main stream's.
    fn drop(&mut self) {
        // Where the device has failed, all that follows fails too, and says so.
        let _ = self.streams.main.wait_until(&self.done);
    }
}

impl<D: Device> Drop for DeviceLayer<D> {
    /// The second stream may still read the dictionaries, which are the first one's.
    fn drop(&mut self) {
        // As above.
        let _ = self.streams.main.wait_for(&self.streams.background);
    }
}

/// Checks that a device can do what the settings ask for.
fn check(settings: &LayerSettings) -> Result<()> {
    let (setting, value, reason) = match settings.coding {
        Coding::Additive { beam_width } if beam_width != DEVICE_BEAM => {
            let reason = "on a GPU the search follows 8 sums";
            ("beam", beam_width.to_string(), reason)
        }
        Coding::Sparse {
            coefficients: CoefficientFormat::F32,
            ..
        } => {
            let reason = "on a GPU coefficients take a byte: i8 or f8";
            ("format", "f32".to_owned(), reason)
        }
        Coding::Sparse { tolerance, .. } if tolerance > 0.0 => {
            let reason = "on a GPU all codes have as many atoms";
            ("tolerance", tolerance.to_string(), reason)
        }
        _ if let Some(memory) = settings.memory => {
            let reason = "on a GPU the window is fixed: give window";
            ("memory", memory.bytes().to_string(), reason)
        }
        _ if settings.number_type != NumberType::F16 => {
            let reason = "on a GPU the recent window is in f16";
            ("dense", "f32".to_owned(), reason)
        }
        _ => return Ok(()),
    };
    Err(Error::Setting {
        setting,
        value,
        reason: reason.to_owned(),
    })
}

impl<D: Device> DeviceLayer<D> {
    /// Brings a layer's dictionaries to a device. `query_group` query heads share a KV head. The second stream codes
    /// in the background whatever [`LayerSettings::background`] says. [Maps](crate::dictionary::HeadMaps) are the caller's to
    /// apply: keys, values, queries and outputs are those behind them. Means before the rotary embedding are not.
    ///
    /// # Errors
    /// [`Error::Setting`] and those of [`LayerCache::new`](crate::cache::LayerCache::new) for settings that cannot be, on a device or at all;
    /// [`Error::Device`] for shapes that devices do not take, a head dim that is no multiple of 16, say, or where memory
    /// does not suffice.
    pub fn new(
        streams: Arc<Streams<D>>,
        dictionaries: &LayerDictionaries,
        settings: LayerSettings,
        query_group: usize,
    ) -> Result<Self> {
        check(&settings)?;
        let coders = settings.coders(dictionaries)?;
        let (window, batch, sinks) = (settings.recent_window, settings.batch, settings.sinks);
        let parts = [window, batch, batch, settings.wait()];
        let room = parts.into_iter().try_fold(1usize, usize::checked_add);
        let rows = room.and_then(|room| room.checked_add(sinks));
        // Kernels count rows in `int`.
        let possible = rows.is_some_and(|rows| i32::try_from(rows).is_ok());
        let Some(room) = room.filter(|_| possible) else {
            return Err(Error::Device(format!(
                "a window of {window} positions, of which {batch} leave at once, and {sinks} first ones; less than 2³¹ are possible"
            )));
        };
        let device = &streams.main;
        let largest = |own: &Vec<usize>| own.iter().copied().max().unwrap_or(1);
        let parts = coders
            .as_ref()
            .zip(settings.sparsities.as_ref().map(largest));
        let formats = parts.map(|(coder, max)| coder.format(max));
        if let (CodeFormat::Additive(keys), CodeFormat::Additive(values)) =
            (formats.keys, formats.values)
            && keys.sizes != values.sizes
        {
            let reason = "keys and values whose first codebooks differ in size";
            return Err(Error::Device(reason.to_owned()));
        }
        let encoders = parts.try_map(|(coder, max)| match coder {
            Coder::Additive { codebooks, .. } => DeviceEncoder::beam_search(device, codebooks, max),
            Coder::Sparse { dictionary, .. } => DeviceEncoder::pursuit(device, dictionary, max),
        })?;
        let KeyValue { keys, values } = parts.map(|(coder, max)| coder.atoms(max));
        let maps = coders.keys.maps();
        if maps.is_some_and(|maps| maps.basis().is_some()) {
            let reason = "heads that are coded together";
            return Err(Error::Device(reason.to_owned()));
        }
        let attention =
            DeviceAttention::behind(device, formats.keys, keys, values, query_group, maps)?;
        let head_dim = keys.head_dim();
        let program = Program {
            name: "window",
            parts: &[COMMON, CODES, PAIR, include_str!("kernels/window.cu")],
            constants: vec![("M", head_dim), ("FORMAT", attention.format)],
        };
        Ok(Self {
            coders,
            streams,
            settings,
            query_group,
            encoders,
            attention,
            program,
            head_dim,
            room,
        })
    }

    /// A sequence of which nothing has come yet.
    ///
    /// # Errors
    /// [`Error::Device`] where memory does not suffice.
    pub fn sequence(&self) -> Result<DeviceSequence<D>> {
        let device = &self.streams.main;
        let bytes = self.heads() * self.ring_bytes();
        let parts = self.coders.as_ref().zip(self.settings.sparsities.as_ref());
        let codes = |(coder, sparsities): (&Coder, &Vec<usize>)| -> Result<_> {
            let heads = sparsities.iter();
            let heads = heads.map(|&sparsity| DeviceCodes::new(device, coder.format(sparsity)));
            heads.collect()
        };
        Ok(DeviceSequence {
            codes: parts.try_map(codes)?,
            dense: KeyValue::new(device.allocate(bytes)?, device.allocate(bytes)?),
            room: self.room,
            sliding_window: self.settings.sliding_window,
            sinks: 0,
            first_sink: 0,
            start: 0,
            held: 0,
            leaving: None,
            positions: 0,
        })
    }

    /// The bytes of a head's dense keys, or values.
    fn ring_bytes(&self) -> usize {
        (self.room + self.settings.sinks) * self.head_dim * size_of::<u16>()
    }

    /// KV heads.
    pub fn heads(&self) -> usize {
        self.settings.sparsities.keys.len()
    }

    /// Query heads that share a KV head.
    pub fn query_group(&self) -> usize {
        self.query_group
    }

    /// Takes one new position of each sequence, keys and values `[sequences, heads, m]`, and attends with `queries` `[sequences,
    /// heads, G, m]`, scaled by `1/√m`, over all that the sliding window shows; `out` is of the queries' shape.
    /// All are addresses of f32.
    ///
    /// # Errors
    /// [`Error::Device`].
    ///
    /// # Safety
    /// As many numbers must be at each address until the main stream has done this. The sequences must be this layer's.
    pub unsafe fn decode(
        &self,
        sequences: &mut [&mut DeviceSequence<D>],
        new: KeyValue<u64>,
        queries: u64,
        out: u64,
    ) -> Result<()> {
        for sequence in &mut *sequences {
            match self.sinks_of(sequence, 1) {
                0 => sequence.held += 1,
                own => sequence.sinks += own,
            }
            sequence.positions += 1;
        }
        // SAFETY: the caller's; the windows have room for a row more.
        unsafe { self.append(sequences, new, 1, 0, 1)? };
        let pasts: Vec<DevicePast<'_, D>> = sequences
            .iter()
            .flat_map(|sequence| self.pasts(sequence, sequence.hidden()))
            .collect();
        // SAFETY: the caller's.
        unsafe {
            self.attention
                .attend(&self.streams.main, &pasts, queries, out)?;
        }
        for sequence in sequences {
            self.take_turn(sequence)?;
            self.drop_hidden(sequence)?;
        }
        Ok(())
    }

    /// Takes `t` new positions of a sequence, keys and values `[heads, t, m]`, addresses of f32, and codes at once what neither the first
    /// positions nor the window can hold. Attention over them is the caller's, who finds what came before with [`DeviceLayer::read_back`].
    ///
    /// # Errors
    /// [`Error::Device`].
    ///
    /// # Safety
    /// As many numbers must be at each address until the main stream has done this. The sequence must be this layer's.
    pub unsafe fn take(
        &self,
        sequence: &mut DeviceSequence<D>,
        new: KeyValue<u64>,
        t: usize,
    ) -> Result<()> {
        if let Some(leaving) = sequence.leaving.take() {
            self.settle(sequence, leaving.codes)?;
        }
        let first = self.sinks_of(sequence, t);
        sequence.sinks += first;
        let position = sequence.positions + first - sequence.held;
        sequence.positions += t;
        let mut sequences = [sequence];
        // SAFETY: the caller's; there is room for as many first positions as the settings say.
        unsafe { self.append(&mut sequences, new, t, 0, first)? };
        let [sequence] = sequences;
        // The others of each head, which lie as far apart as before.
        let skipped = (first * self.head_dim * size_of::<f32>()) as u64;
        let (new, rest) = (new.map(|address| address + skipped), t - first);
        let held = sequence.held;
        let surplus = self.settings.surplus(0, held, rest);
        for first in (0..surplus).step_by(AT_ONCE) {
            let count = AT_ONCE.min(surplus - first);
            // SAFETY: the caller's.
            let batch = unsafe { self.encode(sequence, new, t, position, first, count)? };
            self.store(sequence, batch)?;
        }
        let from_window = surplus.min(held);
        sequence.drop_rows(from_window);
        let passing = surplus - from_window;
        sequence.held += rest - passing;
        let mut sequences = [sequence];
        // SAFETY: the caller's; no more rows are left than the window has room for.
        unsafe { self.append(&mut sequences, new, t, passing, rest - passing)? };
        let [sequence] = sequences;
        self.drop_hidden(sequence)
    }

    /// Writes what a sequence's first positions, codes and window stand for, as far as the next query sees them: keys and values `[heads, positions, m]`,
    /// f32, written to memory at these addresses.
    ///
    /// # Errors
    /// [`Error::Device`].
    ///
    /// # Safety
    /// There must be room for [`DeviceSequence::seen`] positions of every head at each address until the main stream has done this.
    pub unsafe fn read_back(&self, sequence: &DeviceSequence<D>, out: KeyValue<u64>) -> Result<()> {
        let positions = sequence.seen();
        if positions == 0 {
            return Ok(());
        }
        let pasts: Vec<DevicePast<'_, D>> = self.pasts(sequence, sequence.hidden()).collect();
        let pairs = upload(&self.streams.main, describe(&pasts))?;
        let arguments = [
            Argument::of::<D>(&pairs),
            Argument::of::<D>(&self.attention.key_atoms),
            Argument::of::<D>(&self.attention.value_atoms),
            Argument::int(positions),
            Argument::Address(out.keys),
            Argument::Address(out.values),
        ];
        // SAFETY: the arguments are those of `decode` in kernels/window.cu; room for what it writes is the caller's.
        unsafe { self.launch("decode", positions, pasts.len(), &arguments)? };
        let Some((means, past)) = self.attention.means.as_ref().zip(pasts.first()) else {
            return Ok(());
        };
        let coded = past.keys.len - past.hidden;
        let rows = [positions, past.window.sinks, coded, past.hidden];
        let device = &self.streams.main;
        // SAFETY: as above.
        unsafe { means.add(device, &pairs, pasts.len(), rows, 1, out.keys) }
    }

    /// The bytes that a sequence holds, by part: whole pages of codes in the device's memory.
    pub fn footprint(&self, sequence: &DeviceSequence<D>) -> LayerFootprint {
        let rows = |count: usize, number: usize| 2 * self.heads() * count * self.head_dim * number;
        let leaving = sequence.leaving.iter();
        let leaving = leaving.map(|leaving| {
            let found = leaving.codes.found.as_ref().into_iter();
            rows(self.settings.batch, size_of::<f32>())
                + found.map(|found| found.bytes).sum::<usize>()
        });
        let codes = sequence.codes.as_ref();
        LayerFootprint {
            codes: codes.map(|codes| codes.iter().map(DeviceCodes::bytes).sum()),
            sinks: rows(self.settings.sinks, size_of::<u16>()),
            recent_window: rows(sequence.room, size_of::<u16>()),
            leaving: leaving.sum(),
            bookkeeping: size_of::<DeviceSequence<D>>(),
        }
    }

    /// How many of `t` new positions are among a sequence's first ones, which are kept dense.
    fn sinks_of(&self, sequence: &DeviceSequence<D>, t: usize) -> usize {
        let room = self.settings.sinks - sequence.first_sink - sequence.sinks;
        match sequence.coded() + sequence.held {
            0 => room.min(t),
            _ => 0,
        }
    }

    /// Returns what each head holds but for the oldest `hidden` positions.
    fn pasts<'a>(
        &self,
        sequence: &'a DeviceSequence<D>,
        hidden: usize,
    ) -> impl Iterator<Item = DevicePast<'a, D>> {
        let hidden_sinks = hidden.min(sequence.sinks);
        let hidden_codes = (hidden - hidden_sinks).min(sequence.coded());
        let hidden_rows = (hidden - hidden_sinks - hidden_codes).min(sequence.held);
        let ring = self.ring_bytes() as u64;
        let sinks = sequence.sinks - hidden_sinks;
        let KeyValue { keys, values } = sequence.dense.as_ref().map(D::address);
        let codes = &sequence.codes;
        let heads = codes.keys.iter().zip(&codes.values).zip(0u64..);
        heads.map(move |((key_codes, value_codes), head)| DevicePast {
            keys: key_codes,
            values: value_codes,
            hidden: hidden_codes,
            first: sequence.positions - sequence.held - sequence.coded(),
            window: DeviceRows {
                keys: keys + head * ring,
                values: values + head * ring,
                room: sequence.room,
                start: (sequence.start + hidden_rows) % sequence.room,
                len: sinks + sequence.held - hidden_rows,
                sinks,
                first_sink: sequence.first_sink + hidden_sinks,
            },
        })
    }

    /// # Safety
    /// The arguments must be those of a kernel in kernels/window.cu, with room for what it writes.
    unsafe fn launch(
        &self,
        kernel: &'static str,
        rows: usize,
        pairs: usize,
        arguments: &[Argument],
    ) -> Result<()> {
        let grid = Grid {
            blocks: [rows.min(MAX_BLOCKS) as u32, pairs as u32],
            threads: self.head_dim as u32,
            shared: 0,
        };
        let device = &self.streams.main;
        // SAFETY: the caller's.
        unsafe { device.launch(&self.program, kernel, grid, arguments) }
    }

    /// Writes new rows, `count` from `first` on of each head's `t`, to the places of the windows' newest.
    ///
    /// # Safety
    /// That of [`DeviceLayer::take`].
    unsafe fn append(
        &self,
        sequences: &mut [&mut DeviceSequence<D>],
        new: KeyValue<u64>,
        t: usize,
        first: usize,
        count: usize,
    ) -> Result<()> {
        let pasts: Vec<DevicePast<'_, D>> = sequences
            .iter()
            .flat_map(|sequence| self.pasts(sequence, 0))
            .collect();
        if count == 0 || pasts.is_empty() {
            return Ok(());
        }
        // SAFETY: `append` takes nothing more; what is at the addresses is the caller's.
        unsafe { self.launch_rows("append", &pasts, new, [t, first, count], &[]) }
    }

    /// Has a kernel go through rows, `count` from `first` on, of new keys and values `[pairs, t, m]` and windows.
    ///
    /// # Safety
    /// That of [`DeviceLayer::take`]; `more` must be what the kernel takes beside, with room for what it writes.
    unsafe fn launch_rows(
        &self,
        kernel: &'static str,
        pasts: &[DevicePast<'_, D>],
        new: KeyValue<u64>,
        [t, first, count]: [usize; 3],
        more: &[Argument],
    ) -> Result<()> {
        let pairs = upload(&self.streams.main, describe(pasts))?;
        let mut arguments = vec![
            Argument::of::<D>(&pairs),
            Argument::Address(new.keys),
            Argument::Address(new.values),
        ];
        arguments.extend([t, first, count].map(Argument::int));
        arguments.extend_from_slice(more);
        // SAFETY: the caller's.
        unsafe { self.launch(kernel, count, pasts.len(), &arguments) }
    }

    /// Begins to code positions, `count` from `first` on of the window's, which begins at `position`, and then the new ones' `[heads, t, m]`.
    ///
    /// # Safety
    /// That of [`DeviceLayer::take`].
    unsafe fn encode(
        &self,
        sequence: &DeviceSequence<D>,
        new: KeyValue<u64>,
        t: usize,
        position: usize,
        first: usize,
        count: usize,
    ) -> Result<DeviceBatch<D>> {
        let device = &self.streams.main;
        // First positions stay as they are.
        let pasts = self.pasts(sequence, sequence.sinks);
        let pasts = pasts.map(|past| DevicePast {
            first: position,
            ..past
        });
        let pasts: Vec<DevicePast<'_, D>> = pasts.collect();
        let bytes = self.heads() * count * self.head_dim * size_of::<f32>();
        let vectors = KeyValue::new(device.allocate(bytes)?, device.allocate(bytes)?);
        let KeyValue { keys, values } = vectors.as_ref().map(Argument::of::<D>);
        let out = [keys, values];
        // SAFETY: `gather` takes the places of what it writes too; the rest is the caller's.
        unsafe { self.launch_rows("gather", &pasts, new, [t, first, count], &out)? };
        if let Some(means) = &self.attention.means {
            let described = upload(device, describe(&pasts))?;
            let (heads, rows) = (pasts.len(), [count, 0, count, first]);
            let keys = D::address(&vectors.keys);
            // SAFETY: so many keys were gathered.
            unsafe { means.add(device, &described, heads, rows, -1, keys)? };
        }
        let (settings, n) = (&self.settings, count * self.heads());
        let parts = self.encoders.as_ref().zip(settings.sparsities.as_ref());
        let parts = parts.zip(vectors.as_ref());
        let found = parts.try_map(|((encoder, own), vectors)| {
            encoder.encode_heads(&self.streams, vectors, n, own, settings.fit)
        });
        // What is dropped where that failed is still in use.
        let found = found.inspect_err(|_| drop(device.wait_for(&self.streams.background)))?;
        Ok(DeviceBatch {
            found,
            count,
            done: self.streams.background.mark()?,
            _vectors: vectors,
            streams: Arc::clone(&self.streams),
        })
    }

    /// Puts what was coded among a sequence's codes.
    fn store(&self, sequence: &mut DeviceSequence<D>, batch: DeviceBatch<D>) -> Result<()> {
        let device = &self.streams.main;
        // Keys and values grow together or not at all.
        for codes in sequence.codes.as_mut().into_iter().flatten() {
            codes.reserve(device, batch.count)?;
        }
        device.wait_until(&batch.done)?;
        let parts = batch.found.as_ref().zip(sequence.codes.as_mut());
        parts.try_map(|(found, codes)| DeviceCodes::store(device, codes, found))?;
        Ok(())
    }

    /// Begins to code the oldest positions where the window is full, or ends it where it is due.
    fn take_turn(&self, sequence: &mut DeviceSequence<D>) -> Result<()> {
        let mut leaving = sequence.leaving.take();
        let position = sequence.positions - sequence.held;
        let batch = self.settings.batch;
        // SAFETY: nothing new is read.
        let begin = || unsafe { self.encode(sequence, KeyValue::default(), 0, position, 0, batch) };
        let due = Leaving::step(&mut leaving, &self.settings, 0, sequence.held, begin);
        sequence.leaving = leaving;
        due?.map_or(Ok(()), |batch| self.settle(sequence, batch))
    }

    /// Puts the batch that is leaving the window among the codes.
    fn settle(&self, sequence: &mut DeviceSequence<D>, batch: DeviceBatch<D>) -> Result<()> {
        self.store(sequence, batch)?;
        sequence.drop_rows(self.settings.batch);
        Ok(())
    }

    fn drop_hidden(&self, sequence: &mut DeviceSequence<D>) -> Result<()> {
        let sinks = sequence.hidden().min(sequence.sinks);
        sequence.first_sink += sinks;
        sequence.sinks -= sinks;
        let hidden = sequence.hidden();
        let mut codes = sequence.codes.as_mut().into_iter().flatten();
        codes.try_for_each(|codes| codes.drop_hidden(&self.streams.main, hidden))
    }
}

impl<D: Device> DeviceSequence<D> {
    /// The number of positions that have come.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// The number of positions that the next query sees, or one more.
    pub fn seen(&self) -> usize {
        self.sinks + self.coded() + self.held - self.hidden()
    }

    /// The number of positions that are codes.
    pub fn coded(&self) -> usize {
        self.codes.keys.first().map_or(0, |codes| codes.len)
    }

    /// The number of first positions that are kept dense.
    pub fn sinks(&self) -> usize {
        self.sinks
    }

    /// The number of positions in the recent window.
    pub fn dense(&self) -> usize {
        self.held
    }

    /// The number of the oldest positions that the newest one, or the next, does not see.
    fn hidden(&self) -> usize {
        let held = self.sinks + self.coded() + self.held;
        let sliding = self.sliding_window;
        sliding.map_or(0, |sliding| held.saturating_sub(sliding.max(1)))
    }

    fn drop_rows(&mut self, count: usize) {
        self.start = (self.start + count) % self.room;
        self.held -= count;
    }
}
