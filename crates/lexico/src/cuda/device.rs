use std::hash::{Hash, Hasher};

use crate::{Error, Result};

/// A place where kernels run, with memory of its own: a stream of a GPU, or in tests the host in its place. What is asked of it is done
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

    /// The address at which a kernel finds the memory.
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
    /// The stream that decodes and that allocates all memory.
    pub main: D,
    /// The stream that codes.
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
    /// Prints what tells programs apart; the source is long.
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

/// A number of blocks, of threads in each, and of bytes of shared memory.
#[derive(Debug, Clone, Copy)]
pub struct Grid {
    /// Blocks along x and y.
    pub blocks: [u32; 2],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of shared memory beside what the kernel declares.
    pub shared: usize,
}

/// An argument of a kernel.
#[derive(Debug, Clone, Copy)]
pub enum Argument {
    /// A pointer.
    Address(u64),
    /// An `int`.
    Integer(i32),
}

impl Argument {
    /// The address of memory.
    pub(super) fn of<D: Device>(memory: &D::Memory) -> Self {
        Self::Address(D::address(memory))
    }

    /// A number that is checked or small: kernels count in `int`.
    pub(super) fn int(number: usize) -> Self {
        Self::Integer(number as i32)
    }

    /// The address of the value, as the driver takes it.
    pub fn place(&self) -> *const u8 {
        match self {
            Self::Address(value) => std::ptr::from_ref(value).cast(),
            Self::Integer(value) => std::ptr::from_ref(value).cast(),
        }
    }
}

/// Memory that holds these bytes.
pub(super) fn upload<D: Device>(
    device: &D,
    bytes: impl IntoIterator<Item = u8>,
) -> Result<D::Memory> {
    let bytes: Vec<u8> = bytes.into_iter().collect();
    let mut memory = device.allocate(bytes.len())?;
    device.write(&mut memory, 0, &bytes)?;
    Ok(memory)
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

/// The source that every program begins with.
pub(super) const COMMON: &str = include_str!("kernels/device.cuh");
/// The source of what reads codes.
pub(super) const CODES: &str = include_str!("kernels/codes.cuh");
/// The source of what reads what KV heads hold.
pub(super) const PAIR: &str = include_str!("kernels/pair.cuh");
