use std::hash::{Hash, Hasher};

use crate::{Error, Result};

/// Where kernels run, with memory of its own: a stream of a GPU, or in tests the host in its place. What is asked of it is done
/// in the order in which it is asked.
pub trait Device {
    /// Bytes there. When it is dropped they are freed once all is done that was asked before of the stream that allocated them.
    type Memory;
    /// A place in the order of what a stream was asked for.
    type Mark;

    /// Room for so many bytes, which hold anything.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) where there is not so much.
    fn allocate(&self, bytes: usize) -> Result<Self::Memory>;

    /// Where a kernel finds the memory.
    fn address(memory: &Self::Memory) -> u64;

    /// Copies bytes to the memory, from byte `at` on.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) where the device fails.
    ///
    /// # Panics
    /// Where they do not fit.
    fn write(&self, to: &mut Self::Memory, at: usize, bytes: &[u8]) -> Result<()>;

    /// Copies bytes from the memory, from byte `at` on, once all that was asked for before is done.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) where the device fails.
    ///
    /// # Panics
    /// Where there are not so many.
    fn read(&self, from: &Self::Memory, at: usize, bytes: &mut [u8]) -> Result<()>;

    /// Waits until all that was asked for is done.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) where a kernel failed.
    fn finish(&self) -> Result<()>;

    /// A mark behind all that was asked so far.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) where the device fails.
    fn mark(&self) -> Result<Self::Mark>;

    /// Has all that is asked from now on wait for what lies before a mark, of another stream of the same device, say.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) where the device fails.
    fn wait_until(&self, mark: &Self::Mark) -> Result<()>;

    /// Has all that is asked from now on wait for what was asked of another stream so far.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) where the device fails.
    fn wait_for(&self, other: &Self) -> Result<()> {
        self.wait_until(&other.mark()?)
    }

    /// Bytes of shared memory that a block can have at the most.
    fn most_shared(&self) -> usize;

    /// Blocks that it runs at a time, about: a kernel that goes through its work in strides needs no more.
    fn blocks(&self) -> u32;

    /// Has a kernel of a program run.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) where it cannot be compiled or started.
    ///
    /// # Safety
    /// The arguments must be those that the kernel takes, and addresses lead to as much memory as it uses, which must
    /// be there until it has ended.
    unsafe fn launch(
        &self,
        program: &Program,
        kernel: &'static str,
        grid: Grid,
        arguments: &[Argument],
    ) -> Result<()>;
}

/// Two streams of a device: decoding does not wait for the codes that are made beside it.
pub struct Streams<D> {
    /// What decodes, and what all memory is allocated by.
    pub main: D,
    /// What codes.
    pub background: D,
}

/// Kernels and the constants that they are compiled with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// The source's name.
    pub name: &'static str,
    /// The parts of the source, one after the other.
    pub parts: &'static [&'static str],
    /// Names of constants, and their values.
    pub constants: Vec<(&'static str, usize)>,
}

impl Hash for Program {
    /// Of what tells programs apart; the source is long.
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.name.hash(state);
        self.constants.hash(state);
    }
}

impl Program {
    /// The whole text.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for (name, value) in &self.constants {
            text += &format!("#define {name} {value}\n");
        }
        for part in self.parts {
            text += part;
        }
        text
    }
}

/// How many blocks of how many threads, with how much shared memory.
#[derive(Debug, Clone, Copy)]
pub struct Grid {
    /// Blocks along x and y.
    pub blocks: [u32; 2],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of shared memory beside what the kernel declares.
    pub shared: usize,
}

/// What a kernel is given.
#[derive(Debug, Clone, Copy)]
pub enum Argument {
    /// A pointer.
    Address(u64),
    /// An `int`.
    Integer(i32),
}

impl Argument {
    /// Where the value lies, as the driver takes it.
    pub fn place(&self) -> *const u8 {
        match self {
            Self::Address(value) => std::ptr::from_ref(value).cast(),
            Self::Integer(value) => std::ptr::from_ref(value).cast(),
        }
    }
}

/// Memory that holds these numbers.
pub(super) fn upload<D: Device>(device: &D, bytes: &[u8]) -> Result<D::Memory> {
    let mut memory = device.allocate(bytes.len())?;
    device.write(&mut memory, 0, bytes)?;
    Ok(memory)
}

/// The first bytes of the memory.
pub(super) fn download<D: Device>(device: &D, from: &D::Memory, bytes: usize) -> Result<Vec<u8>> {
    let mut read = vec![0; bytes];
    device.read(from, 0, &mut read)?;
    Ok(read)
}

/// As [`download`], of `count` numbers.
pub(super) fn download_f32<D: Device>(
    device: &D,
    from: &D::Memory,
    count: usize,
) -> Result<Vec<f32>> {
    let bytes = download(device, from, count * size_of::<f32>())?;
    Ok(bytes
        .as_chunks()
        .0
        .iter()
        .map(|&b| f32::from_le_bytes(b))
        .collect())
}

/// As [`download`], of `count` numbers.
pub(super) fn download_u16<D: Device>(
    device: &D,
    from: &D::Memory,
    count: usize,
) -> Result<Vec<u16>> {
    let bytes = download(device, from, count * size_of::<u16>())?;
    Ok(bytes
        .as_chunks()
        .0
        .iter()
        .map(|&b| u16::from_le_bytes(b))
        .collect())
}

/// Refuses what takes more shared memory than a block has, with some to spare for what kernels declare themselves.
pub(super) fn check_shared<D: Device>(device: &D, bytes: usize, what: &str) -> Result<()> {
    const DECLARED: usize = 2048;
    let most = device.most_shared();
    if bytes + DECLARED <= most {
        return Ok(());
    }
    Err(Error::Device(format!(
        "{what} takes {bytes} bytes of a block's shared memory, of which this device has {most}; fewer atoms, or query heads a KV head, \
         take less"
    )))
}

/// Memory of rows `[n, m]`, filled up with zeros to `padded` numbers each.
pub(super) fn upload_rows<D: Device>(
    device: &D,
    rows: &[f32],
    m: usize,
    padded: usize,
) -> Result<D::Memory> {
    let numbers = padded_rows(rows, m, padded).into_iter();
    upload(
        device,
        &numbers.flat_map(f32::to_le_bytes).collect::<Vec<u8>>(),
    )
}

/// Rows filled up with zeros.
pub(super) fn padded_rows(rows: &[f32], m: usize, padded: usize) -> Vec<f32> {
    let mut out = vec![0.0; rows.len() / m * padded];
    for (row, out) in rows.chunks_exact(m).zip(out.chunks_exact_mut(padded)) {
        out[..m].copy_from_slice(row);
    }
    out
}

/// The source that every program begins with.
pub(super) const COMMON: &str = include_str!("kernels/device.cuh");
