use super::beam::FoundSums;
use super::device::{Argument, COMMON, Device, Grid, Program, upload};
use super::pursuit::FoundCodes;
use crate::codes::{CodeFormat, CoefficientFormat, Leading};
use crate::encode::EncodedBatch;
use crate::{Error, Result};

/// Codes of a page; `PAGE` in codes.cuh.
const PAGE: usize = 1024;
const THREADS: u32 = 128;
/// What kernels read at once.
const ALIGNMENT: usize = 16;

/// Codes of one KV head, keys or values, in a device's memory: as [`Codes`](crate::Codes) of a fixed sparsity and
/// coefficients of a byte, or packed.
pub struct DeviceCodes<D: Device> {
    format: CodeFormat,
    pages: Vec<D::Memory>,
    /// Addresses of the pages, and of pages that there may be.
    table: D::Memory,
    table_pages: usize,
    len: usize,
}

/// How kernels name a format.
pub(super) fn format_number(format: CodeFormat) -> Result<usize> {
    match format.coefficients {
        _ if format.variable => Err(Error::Device(
            "codes of varying sparsity are not for devices; choose tolerance=0".to_owned(),
        )),
        CoefficientFormat::InAtoms(_) => Ok(0),
        CoefficientFormat::I8 => Ok(1),
        CoefficientFormat::F8 => Ok(2),
        CoefficientFormat::F32 => Err(Error::Device(
            "coefficients of f32 are not for devices; choose packed, i8 or f8".to_owned(),
        )),
    }
}

impl<D: Device> DeviceCodes<D> {
    /// No codes yet.
    ///
    /// # Errors
    /// [`Error::Device`] for a format that devices do not take.
    pub fn new(device: &D, format: CodeFormat) -> Result<Self> {
        format_number(format)?;
        let table_pages = 16;
        Ok(Self {
            format,
            pages: Vec::new(),
            table: device.allocate(table_pages * size_of::<u64>())?,
            table_pages,
            len: 0,
        })
    }

    /// Number of vectors.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        self.pages.len() * self.page_bytes() + self.table_pages * size_of::<u64>()
    }

    /// Bytes of a code.
    fn record_bytes(&self) -> usize {
        match self.format.coefficients {
            CoefficientFormat::InAtoms(_) => self.format.sparsity + 1,
            _ => 3 * self.format.sparsity + 1,
        }
    }

    fn page_bytes(&self) -> usize {
        (PAGE * self.record_bytes()).next_multiple_of(ALIGNMENT)
    }

    /// Room for so many vectors more.
    pub(super) fn reserve(&mut self, device: &D, vectors: usize) -> Result<()> {
        let pages = (self.len + vectors).div_ceil(PAGE);
        let first = self.pages.len();
        while self.pages.len() < pages {
            self.pages.push(device.allocate(self.page_bytes())?);
        }
        let grown = pages > self.table_pages;
        if grown {
            self.table_pages = pages.next_power_of_two();
            self.table = device.allocate(self.table_pages * size_of::<u64>())?;
        }
        self.write_table(device, if grown { 0 } else { first })
    }

    /// Says in the table where the pages from number `from` on are.
    fn write_table(&mut self, device: &D, from: usize) -> Result<()> {
        let addresses: Vec<u8> = self.pages[from..]
            .iter()
            .flat_map(|page| D::address(page).to_le_bytes())
            .collect();
        device.write(&mut self.table, from * size_of::<u64>(), &addresses)
    }

    /// Where kernels find the codes: `Head` in codes.cuh.
    pub(super) fn head(&self) -> [u8; 16] {
        let first = match self.format.coefficients {
            CoefficientFormat::InAtoms(groups) => groups.first,
            _ => 0,
        };
        let mut head = [0; 16];
        head[..8].copy_from_slice(&D::address(&self.table).to_le_bytes());
        head[8..12].copy_from_slice(&(self.format.sparsity as i32).to_le_bytes());
        head[12..].copy_from_slice(&(first as i32).to_le_bytes());
        head
    }

    /// Gives up whole pages of the oldest codes, of which the first `hidden` are no longer needed.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn drop_hidden(&mut self, device: &D, hidden: usize) -> Result<()> {
        let pages = hidden.min(self.len) / PAGE;
        if pages > 0 {
            self.pages.drain(..pages);
            self.len -= pages * PAGE;
            self.write_table(device, 0)?;
        }
        Ok(())
    }

    /// Appends packed codes that were found, the vectors of each head to its own codes, and nothing leaves the device.
    ///
    /// # Errors
    /// [`Error::Device`].
    ///
    /// # Panics
    /// Where the vectors are not as many for each head, or a head's codes have more atoms than were looked for.
    pub fn extend_additive(device: &D, heads: &mut [Self], found: &FoundSums<D>) -> Result<()> {
        let each = vectors_a_head(heads, found.count, found.most);
        let arguments = [
            Argument::Integer(found.most as i32),
            Argument::Address(D::address(&found.paths)),
            Argument::Address(D::address(&found.scales)),
        ];
        store(device, heads, each, "store_packed", &arguments)
    }

    /// Appends codes with coefficients that were found, as [`DeviceCodes::extend_additive`]; where `unbiased`, scaled up as
    /// [`EncodedBatch::unbias`] does.
    ///
    /// # Errors
    /// [`Error::Device`].
    ///
    /// # Panics
    /// As [`DeviceCodes::extend_additive`].
    pub fn extend_sparse(
        device: &D,
        heads: &mut [Self],
        found: &FoundCodes<D>,
        unbiased: bool,
    ) -> Result<()> {
        let each = vectors_a_head(heads, found.count, found.most);
        let Some(first) = heads.first() else {
            return Ok(());
        };
        let arguments = [
            Argument::Integer(found.most as i32),
            Argument::Integer(format_number(first.format)? as i32),
            Argument::Integer(i32::from(unbiased)),
            Argument::Address(D::address(&found.indices)),
            Argument::Address(D::address(&found.coefficients)),
            Argument::Address(D::address(&found.lengths)),
            Argument::Address(D::address(&found.errors)),
        ];
        store(device, heads, each, "store_sparse", &arguments)
    }

    /// Appends a batch that was found elsewhere.
    ///
    /// # Errors
    /// [`Error::Device`].
    ///
    /// # Panics
    /// Where the batch has another sparsity than these codes.
    pub fn extend(&mut self, device: &D, batch: &EncodedBatch) -> Result<()> {
        let s = self.format.sparsity;
        assert_eq!(batch.sparsity, s, "codes of one sparsity");
        let numbers = |numbers: &[f32]| {
            let bytes = numbers.iter().flat_map(|x| x.to_le_bytes());
            upload(device, &bytes.collect::<Vec<u8>>())
        };
        let indices = |starts: &dyn Fn(usize) -> usize| {
            let own = batch.indices.iter().enumerate();
            let own = own.map(|(i, &index)| index - starts(i % s) as u16);
            upload(device, &own.flat_map(u16::to_le_bytes).collect::<Vec<u8>>())
        };
        let heads = std::slice::from_mut(self);
        let (count, most) = (batch.len(), s);
        if let CoefficientFormat::InAtoms(groups) = heads[0].format.coefficients {
            let scales = batch.coefficients.chunks_exact(s);
            let scales: Vec<u8> = scales
                .map(|scales| Leading::new(0, scales[0]).scale_number())
                .collect();
            let found = FoundSums {
                count,
                most,
                paths: indices(&|group| groups.start(group))?,
                scales: upload(device, &scales)?,
                errors: numbers(&batch.relative_errors)?,
                used: Vec::new(),
            };
            Self::extend_additive(device, heads, &found)
        } else {
            let lengths: Vec<u8> = batch.lengths.iter().map(|&length| length as u8).collect();
            let found = FoundCodes {
                count,
                most,
                indices: indices(&|_| 0)?,
                coefficients: numbers(&batch.coefficients)?,
                lengths: upload(device, &lengths)?,
                errors: numbers(&batch.relative_errors)?,
                used: Vec::new(),
            };
            Self::extend_sparse(device, heads, &found, false)
        }
    }
}

/// How many of `count` vectors each head has.
fn vectors_a_head<D: Device>(heads: &[DeviceCodes<D>], count: usize, most: usize) -> usize {
    let sparsities: Vec<usize> = heads.iter().map(|codes| codes.format.sparsity).collect();
    crate::encode::vectors_a_head(count, &sparsities, most)
}

/// Has a kernel store `each` vectors more in the codes of each head; `arguments` are those after the vectors' number.
fn store<D: Device>(
    device: &D,
    heads: &mut [DeviceCodes<D>],
    each: usize,
    kernel: &'static str,
    arguments: &[Argument],
) -> Result<()> {
    let count = each * heads.len();
    if count == 0 {
        return Ok(());
    }
    let mut targets = Vec::new();
    for codes in &mut *heads {
        codes.reserve(device, each)?;
        // `Target` in store.cu.
        targets.extend(D::address(&codes.table).to_le_bytes());
        targets.extend((codes.len as i32).to_le_bytes());
        targets.extend((codes.format.sparsity as i32).to_le_bytes());
    }
    let targets = upload(device, &targets)?;
    let program = Program {
        name: "store",
        parts: &[
            COMMON,
            include_str!("kernels/codes.cuh"),
            include_str!("kernels/store.cu"),
        ],
        constants: vec![("FORMAT", format_number(heads[0].format)?)],
    };
    let mut all = vec![
        Argument::Address(D::address(&targets)),
        Argument::Integer(each as i32),
        Argument::Integer(count as i32),
    ];
    all.extend_from_slice(arguments);
    let grid = Grid {
        blocks: [
            device.blocks().min(count.div_ceil(THREADS as usize) as u32),
            1,
        ],
        threads: THREADS,
        shared: 0,
    };
    // SAFETY: the arguments are those of the kernels in kernels/store.cu; all pages are there.
    unsafe { device.launch(&program, kernel, grid, &all)? };
    heads.iter_mut().for_each(|codes| codes.len += each);
    Ok(())
}
