use std::sync::Arc;

use super::attention::DeviceAttention;
use super::beam::{DeviceBeamSearch, FoundSums};
use super::codes::DeviceCodes;
use super::device::{Argument, COMMON, Device, Grid, Program, Streams, upload};
use super::pair::{DevicePast, DeviceRows, describe};
use super::pursuit::{DevicePursuit, FoundCodes};
use crate::codes::{CodeFormat, CoefficientFormat};
use crate::dictionary::{Codebooks, Dictionary, LayerSparsities};
use crate::{Error, Result};

/// Positions of a prompt that are coded at once.
const AT_ONCE: usize = 4096;
/// Blocks along x at the most, each of which goes through rows in strides.
const MAX_BLOCKS: usize = 4096;

/// What a layer's keys and values are coded over.
#[derive(Debug, Clone, Copy)]
pub enum DeviceDictionaries<'a> {
    /// One atom a group.
    Additive {
        /// Of the keys.
        keys: &'a Codebooks,
        /// Of the values.
        values: &'a Codebooks,
    },
    /// Any atoms, with coefficients of a byte.
    Sparse {
        /// Of the keys.
        keys: &'a Dictionary,
        /// Of the values.
        values: &'a Dictionary,
        /// How coefficients are stored.
        coefficients: CoefficientFormat,
    },
}

/// Settings of [`DeviceLayer`].
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceLayerSettings {
    /// Atoms of each head's keys and values.
    pub sparsities: LayerSparsities,
    /// Whether codes are scaled up so that no score is shrunk.
    pub unbiased: bool,
    /// Queries of a KV head.
    pub group: usize,
    /// Newest positions, kept dense.
    pub window: usize,
    /// How many positions leave the window at once.
    pub batch: usize,
    /// Steps after which those that leave it take their place among the codes.
    pub due: usize,
}

/// What the sequences of one layer share on a device: dictionaries, and the kernels over them.
pub struct DeviceLayer<D: Device> {
    streams: Arc<Streams<D>>,
    settings: DeviceLayerSettings,
    keys: Pursuit<D>,
    values: Pursuit<D>,
    attention: DeviceAttention<D>,
    program: Program,
    head_dim: usize,
    /// Rows that a window has room for: those of a batch that is being coded stay until it is due.
    room: usize,
}

/// How keys, or values, are coded.
struct Pursuit<D: Device> {
    search: Search<D>,
    coefficients: CoefficientFormat,
    sparsities: Vec<usize>,
}

enum Search<D: Device> {
    Additive(DeviceBeamSearch<D>),
    Sparse(DevicePursuit<D>),
}

enum Found<D: Device> {
    Additive(FoundSums<D>),
    Sparse(FoundCodes<D>),
}

/// One sequence's keys and values in one layer, in a device's memory: codes, then the newest positions dense.
pub struct DeviceSequence<D: Device> {
    keys: Vec<DeviceCodes<D>>,
    values: Vec<DeviceCodes<D>>,
    /// `[heads, room, m]`, halves.
    window_keys: D::Memory,
    window_values: D::Memory,
    room: usize,
    /// The window's first row, and how many there are.
    start: usize,
    held: usize,
    leaving: Option<Leaving<D>>,
    /// Positions that have come.
    positions: usize,
}

/// The window's oldest positions, which are being coded.
struct Leaving<D: Device> {
    /// Steps since it began.
    age: usize,
    keys: Found<D>,
    values: Found<D>,
    /// Vectors of each head.
    count: usize,
    /// Where the search ends.
    done: D::Mark,
    /// What it reads.
    _vectors: [D::Memory; 2],
    streams: Arc<Streams<D>>,
}

impl<D: Device> Drop for Leaving<D> {
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

impl<D: Device> Pursuit<D> {
    fn code(
        &self,
        streams: &Streams<D>,
        vectors: &D::Memory,
        count: usize,
        unbiased: bool,
    ) -> Result<Found<D>> {
        let n = count * self.sparsities.len();
        Ok(match &self.search {
            Search::Additive(pursuit) => {
                let found = pursuit.encode_heads(streams, vectors, n, &self.sparsities, unbiased);
                Found::Additive(found?)
            }
            Search::Sparse(pursuit) => {
                Found::Sparse(pursuit.encode_heads(streams, vectors, n, &self.sparsities)?)
            }
        })
    }

    fn codes(&self, device: &D) -> Result<Vec<DeviceCodes<D>>> {
        let format = |&sparsity: &usize| CodeFormat {
            sparsity,
            variable: false,
            coefficients: self.coefficients,
        };
        let heads = self.sparsities.iter().map(format);
        heads.map(|f| DeviceCodes::new(device, f)).collect()
    }
}

impl<D: Device> Found<D> {
    fn store(&self, device: &D, heads: &mut [DeviceCodes<D>], unbiased: bool) -> Result<()> {
        match self {
            Self::Additive(found) => DeviceCodes::extend_additive(device, heads, found),
            Self::Sparse(found) => DeviceCodes::extend_sparse(device, heads, found, unbiased),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Additive(found) => found.bytes(),
            Self::Sparse(found) => found.bytes(),
        }
    }
}

impl<D: Device> DeviceLayer<D> {
    /// A layer whose KV heads are as many as the sparsities.
    ///
    /// # Errors
    /// [`Error::Device`] for what devices do not take, a head dim that is no multiple of 16, say, or where memory does not suffice;
    /// those of the dictionaries for sparsities that they do not have.
    pub fn new(
        streams: Arc<Streams<D>>,
        dictionaries: DeviceDictionaries<'_>,
        settings: DeviceLayerSettings,
    ) -> Result<Self> {
        let device = &streams.main;
        let own = &settings.sparsities;
        let most = |sparsities: &[usize]| sparsities.iter().copied().max().unwrap_or(1);
        let (max_keys, max_values) = (most(&own.keys), most(&own.values));
        if settings.batch == 0 || own.keys.is_empty() || own.keys.len() != own.values.len() {
            let reason = "a layer on a device needs KV heads, and a batch of at least one position";
            return Err(Error::Device(reason.to_owned()));
        }
        let parts = [
            settings.window,
            settings.batch,
            settings.batch,
            settings.due,
        ];
        let room = parts.into_iter().try_fold(1usize, usize::checked_add);
        // Kernels count rows in `int`.
        let Some(room) = room.filter(|&room| i32::try_from(room).is_ok()) else {
            return Err(Error::Device(format!(
                "a window of {} positions, of which {} leave at once; less than 2³¹ are possible",
                settings.window, settings.batch
            )));
        };
        let format = |coefficients| CodeFormat {
            sparsity: max_keys,
            variable: false,
            coefficients,
        };
        let (keys, values, attention, head_dim) = match dictionaries {
            DeviceDictionaries::Additive { keys, values } => {
                if keys.groups() != values.groups() {
                    let reason = "keys and values whose first groups differ in size";
                    return Err(Error::Device(reason.to_owned()));
                }
                let coder = |dictionary: &Codebooks, own: &[usize]| -> Result<_> {
                    Ok(Pursuit {
                        search: Search::Additive(DeviceBeamSearch::new(
                            device,
                            dictionary,
                            most(own),
                        )?),
                        coefficients: CoefficientFormat::InAtoms(dictionary.groups()),
                        sparsities: own.to_vec(),
                    })
                };
                let attention = DeviceAttention::new(
                    device,
                    format(CoefficientFormat::InAtoms(keys.groups())),
                    keys.atoms(max_keys),
                    values.atoms(max_values),
                    settings.group,
                )?;
                let coders = (coder(keys, &own.keys)?, coder(values, &own.values)?);
                (coders.0, coders.1, attention, keys.head_dim())
            }
            DeviceDictionaries::Sparse {
                keys,
                values,
                coefficients,
            } => {
                let coder = |dictionary: &Dictionary, own: &[usize]| -> Result<_> {
                    let pursuit = DevicePursuit::new(device, dictionary, most(own))?;
                    Ok(Pursuit {
                        search: Search::Sparse(pursuit),
                        coefficients,
                        sparsities: own.to_vec(),
                    })
                };
                let attention = DeviceAttention::new(
                    device,
                    format(coefficients),
                    keys.into(),
                    values.into(),
                    settings.group,
                )?;
                let coders = (coder(keys, &own.keys)?, coder(values, &own.values)?);
                (coders.0, coders.1, attention, keys.head_dim())
            }
        };
        let program = Program {
            name: "window",
            parts: &[
                COMMON,
                include_str!("kernels/codes.cuh"),
                include_str!("kernels/pair.cuh"),
                include_str!("kernels/window.cu"),
            ],
            constants: vec![("M", head_dim), ("FORMAT", attention.format_number())],
        };
        Ok(Self {
            streams,
            settings,
            keys,
            values,
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
        let bytes = self.heads() * self.room * self.head_dim * size_of::<u16>();
        Ok(DeviceSequence {
            keys: self.keys.codes(device)?,
            values: self.values.codes(device)?,
            window_keys: device.allocate(bytes)?,
            window_values: device.allocate(bytes)?,
            room: self.room,
            start: 0,
            held: 0,
            leaving: None,
            positions: 0,
        })
    }

    /// KV heads.
    pub fn heads(&self) -> usize {
        self.keys.sparsities.len()
    }

    /// Queries of a KV head.
    pub fn group(&self) -> usize {
        self.settings.group
    }

    /// Takes one new position of each sequence, keys and values `[sequences, heads, m]`, and attends with `queries` `[sequences,
    /// heads, G, m]`, scaled by `1/√m`, over all that a sliding window of so many positions shows; `out` is of the queries' shape.
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
        [keys, values]: [u64; 2],
        queries: u64,
        out: u64,
        sliding: Option<usize>,
    ) -> Result<()> {
        for sequence in &mut *sequences {
            sequence.held += 1;
            sequence.positions += 1;
        }
        // SAFETY: the caller's; the windows have room for a row more.
        unsafe { self.append(sequences, [keys, values], 1, 0, 1)? };
        let pasts: Vec<DevicePast<'_, D>> = sequences
            .iter()
            .flat_map(|sequence| self.pasts(sequence, sliding))
            .collect();
        // SAFETY: the caller's.
        unsafe {
            self.attention
                .attend(&self.streams.main, &pasts, queries, out)?;
        }
        for sequence in sequences {
            self.take_turn(sequence)?;
            self.drop_hidden(sequence, sliding)?;
        }
        Ok(())
    }

    /// Takes `t` new positions of a sequence, keys and values `[heads, t, m]`, addresses of f32, and codes at once what the window
    /// cannot hold. Attention over them is the caller's, who finds what came before with [`DeviceLayer::read_back`].
    ///
    /// # Errors
    /// [`Error::Device`].
    ///
    /// # Safety
    /// As many numbers must be at each address until the main stream has done this. The sequence must be this layer's.
    pub unsafe fn take(
        &self,
        sequence: &mut DeviceSequence<D>,
        [keys, values]: [u64; 2],
        t: usize,
        sliding: Option<usize>,
    ) -> Result<()> {
        self.settle(sequence)?;
        sequence.positions += t;
        let held = sequence.held;
        let mut surplus = (held + t).saturating_sub(self.settings.window);
        if surplus < self.settings.batch {
            surplus = 0;
        }
        for first in (0..surplus).step_by(AT_ONCE) {
            let count = AT_ONCE.min(surplus - first);
            // SAFETY: the caller's.
            let leaving = unsafe { self.code(sequence, [keys, values], t, first, count)? };
            self.store(sequence, leaving)?;
        }
        let from_window = surplus.min(held);
        sequence.drop_rows(from_window);
        let passing = surplus - from_window;
        sequence.held += t - passing;
        let mut sequences = [sequence];
        // SAFETY: the caller's; no more rows are left than the window has room for.
        unsafe { self.append(&mut sequences, [keys, values], t, passing, t - passing)? };
        let [sequence] = sequences;
        self.drop_hidden(sequence, sliding)
    }

    /// What a sequence's codes and window stand for, as far as the next query sees them: keys and values `[heads, positions, m]`,
    /// f32, written to memory at these addresses.
    ///
    /// # Errors
    /// [`Error::Device`].
    ///
    /// # Safety
    /// There must be room for [`DeviceSequence::seen`] positions of every head at each address until the main stream has done this.
    pub unsafe fn read_back(
        &self,
        sequence: &DeviceSequence<D>,
        [keys, values]: [u64; 2],
        sliding: Option<usize>,
    ) -> Result<()> {
        let positions = sequence.seen(sliding);
        if positions == 0 {
            return Ok(());
        }
        let pasts: Vec<DevicePast<'_, D>> = self.pasts(sequence, sliding).collect();
        let pairs = upload(&self.streams.main, &describe(&pasts))?;
        let [key_atoms, value_atoms] = self.attention.atoms();
        let arguments = [
            Argument::Address(D::address(&pairs)),
            Argument::Address(D::address(key_atoms)),
            Argument::Address(D::address(value_atoms)),
            Argument::Integer(positions as i32),
            Argument::Address(keys),
            Argument::Address(values),
        ];
        // SAFETY: the arguments are those of `decode` in kernels/window.cu; room for what it writes is the caller's.
        unsafe { self.launch("decode", positions, pasts.len(), &arguments) }
    }

    /// Bytes of device memory that a sequence holds.
    pub fn bytes(&self, sequence: &DeviceSequence<D>) -> DeviceBytes {
        let rows = |count: usize, number: usize| 2 * self.heads() * count * self.head_dim * number;
        let leaving = sequence.leaving.iter();
        let leaving = leaving.map(|leaving| {
            rows(self.settings.batch, size_of::<f32>())
                + leaving.keys.bytes()
                + leaving.values.bytes()
        });
        DeviceBytes {
            codes: [&sequence.keys, &sequence.values]
                .map(|codes| codes.iter().map(DeviceCodes::bytes).sum()),
            window: rows(sequence.room, size_of::<u16>()),
            leaving: leaving.sum(),
        }
    }

    fn pasts<'a>(
        &self,
        sequence: &'a DeviceSequence<D>,
        sliding: Option<usize>,
    ) -> impl Iterator<Item = DevicePast<'a, D>> {
        let hidden = sequence.hidden(sliding);
        let hidden_codes = hidden.min(sequence.coded());
        let hidden_rows = (hidden - hidden_codes).min(sequence.held);
        let ring = (sequence.room * self.head_dim * size_of::<u16>()) as u64;
        let (keys, values) = (
            D::address(&sequence.window_keys),
            D::address(&sequence.window_values),
        );
        let heads = sequence.keys.iter().zip(&sequence.values).zip(0u64..);
        heads.map(move |((key_codes, value_codes), head)| DevicePast {
            keys: key_codes,
            values: value_codes,
            hidden: hidden_codes,
            window: DeviceRows {
                keys: keys + head * ring,
                values: values + head * ring,
                room: sequence.room,
                start: (sequence.start + hidden_rows) % sequence.room,
                len: sequence.held - hidden_rows,
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
        // SAFETY: the caller's.
        unsafe {
            self.streams
                .main
                .launch(&self.program, kernel, grid, arguments)
        }
    }

    /// Writes new rows, `count` from `first` on of each head's `t`, to the places of the windows' newest.
    ///
    /// # Safety
    /// As that of [`DeviceLayer::take`].
    unsafe fn append(
        &self,
        sequences: &mut [&mut DeviceSequence<D>],
        [keys, values]: [u64; 2],
        t: usize,
        first: usize,
        count: usize,
    ) -> Result<()> {
        let pasts: Vec<DevicePast<'_, D>> = sequences
            .iter()
            .flat_map(|sequence| self.pasts(sequence, None))
            .collect();
        if count == 0 || pasts.is_empty() {
            return Ok(());
        }
        // SAFETY: `append` takes nothing more; what is at the addresses is the caller's.
        unsafe { self.launch_rows("append", &pasts, [keys, values], [t, first, count], &[]) }
    }

    /// Has a kernel go through rows, `count` from `first` on, of new keys and values `[pairs, t, m]` and windows.
    ///
    /// # Safety
    /// As that of [`DeviceLayer::take`]; `more` must be what the kernel takes beside, with room for what it writes.
    unsafe fn launch_rows(
        &self,
        kernel: &'static str,
        pasts: &[DevicePast<'_, D>],
        [keys, values]: [u64; 2],
        [t, first, count]: [usize; 3],
        more: &[Argument],
    ) -> Result<()> {
        let pairs = upload(&self.streams.main, &describe(pasts))?;
        let mut arguments = vec![
            Argument::Address(D::address(&pairs)),
            Argument::Address(keys),
            Argument::Address(values),
            Argument::Integer(t as i32),
            Argument::Integer(first as i32),
            Argument::Integer(count as i32),
        ];
        arguments.extend_from_slice(more);
        // SAFETY: the caller's.
        unsafe { self.launch(kernel, count, pasts.len(), &arguments) }
    }

    /// Begins to code positions, `count` from `first` on of the window's and then the new ones' `[heads, t, m]`.
    ///
    /// # Safety
    /// As that of [`DeviceLayer::take`].
    unsafe fn code(
        &self,
        sequence: &DeviceSequence<D>,
        [keys, values]: [u64; 2],
        t: usize,
        first: usize,
        count: usize,
    ) -> Result<Leaving<D>> {
        let device = &self.streams.main;
        let pasts: Vec<DevicePast<'_, D>> = self.pasts(sequence, None).collect();
        let bytes = self.heads() * count * self.head_dim * size_of::<f32>();
        let vectors = [device.allocate(bytes)?, device.allocate(bytes)?];
        let out = vectors
            .each_ref()
            .map(|memory| Argument::Address(D::address(memory)));
        // SAFETY: `gather` takes the places of what it writes too; the rest is the caller's.
        unsafe {
            self.launch_rows("gather", &pasts, [keys, values], [t, first, count], &out)?;
        }
        let unbiased = self.settings.unbiased;
        let code =
            |pursuit: &Pursuit<D>, vectors| pursuit.code(&self.streams, vectors, count, unbiased);
        let keys = code(&self.keys, &vectors[0])?;
        let values = code(&self.values, &vectors[1]);
        // What is dropped where that failed is still in use.
        let values = values.inspect_err(|_| drop(device.wait_for(&self.streams.background)))?;
        Ok(Leaving {
            age: 0,
            keys,
            values,
            count,
            done: self.streams.background.mark()?,
            _vectors: vectors,
            streams: Arc::clone(&self.streams),
        })
    }

    /// Puts what was coded among a sequence's codes.
    fn store(&self, sequence: &mut DeviceSequence<D>, leaving: Leaving<D>) -> Result<()> {
        let device = &self.streams.main;
        // Keys and values grow together or not at all.
        for codes in sequence.keys.iter_mut().chain(&mut sequence.values) {
            codes.reserve(device, leaving.count)?;
        }
        device.wait_until(&leaving.done)?;
        let unbiased = self.settings.unbiased;
        leaving.keys.store(device, &mut sequence.keys, unbiased)?;
        leaving.values.store(device, &mut sequence.values, unbiased)
    }

    /// Begins to code the oldest positions where the window is full, or ends it where it is due.
    fn take_turn(&self, sequence: &mut DeviceSequence<D>) -> Result<()> {
        let full = self.settings.window + self.settings.batch;
        if sequence.leaving.is_none() && sequence.held >= full {
            // SAFETY: nothing new is read.
            let leaving = unsafe { self.code(sequence, [0; 2], 0, 0, self.settings.batch)? };
            sequence.leaving = Some(leaving);
        }
        match &mut sequence.leaving {
            Some(leaving) if leaving.age < self.settings.due => leaving.age += 1,
            Some(_) => self.settle(sequence)?,
            None => {}
        }
        Ok(())
    }

    /// Ends the coding of what is leaving the window.
    fn settle(&self, sequence: &mut DeviceSequence<D>) -> Result<()> {
        if let Some(leaving) = sequence.leaving.take() {
            self.store(sequence, leaving)?;
            sequence.drop_rows(self.settings.batch);
        }
        Ok(())
    }

    fn drop_hidden(&self, sequence: &mut DeviceSequence<D>, sliding: Option<usize>) -> Result<()> {
        let hidden = sequence.hidden(sliding);
        let device = &self.streams.main;
        let mut codes = sequence.keys.iter_mut().chain(&mut sequence.values);
        codes.try_for_each(|codes| codes.drop_hidden(device, hidden))
    }
}

/// Bytes of device memory, by part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DeviceBytes {
    /// Of the keys' codes and of the values', whole pages of them.
    pub codes: [usize; 2],
    /// Of the dense window.
    pub window: usize,
    /// Of what is being coded.
    pub leaving: usize,
}

impl<D: Device> DeviceSequence<D> {
    /// Positions that have come.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Positions that the next query sees, or one more.
    pub fn seen(&self, sliding: Option<usize>) -> usize {
        self.coded() + self.held - self.hidden(sliding)
    }

    fn coded(&self) -> usize {
        self.keys.first().map_or(0, DeviceCodes::len)
    }

    /// Of the positions that are held, how many of the oldest the newest one, or the next, does not see.
    fn hidden(&self, sliding: Option<usize>) -> usize {
        let Some(sliding) = sliding else { return 0 };
        (self.coded() + self.held).saturating_sub(sliding.max(1))
    }

    fn drop_rows(&mut self, count: usize) {
        self.start = (self.start + count) % self.room;
        self.held -= count;
    }
}
