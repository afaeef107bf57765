use super::device::{Argument, CODES, COMMON, Device, Grid, Program, upload};
use super::encode::FoundCodes;
use crate::codes::{AdditiveFormat, CodeFormat, CoefficientFormat};
use crate::encode::{EncodedBatch, Fit, vectors_per_head};
use crate::kernels::additive::Leading;
use crate::{Error, Result};

/// Codes of a page; `PAGE` in codes.cuh.
const PAGE: usize = 1024;
const THREADS: u32 = 128;
/// Bytes that kernels read at once.
const ALIGNMENT: usize = 16;

/// Codes of one KV head, keys or values, in a device's memory: as [`Codes`](crate::Codes) of a fixed sparsity and
/// coefficients of a byte, or packed.
pub struct DeviceCodes<D: Device> {
    format: CodeFormat,
    pages: Vec<D::Memory>,
    /// Addresses of the pages, and of pages that there may be.
    table: D::Memory,
    table_pages: usize,
    /// Number of vectors.
    pub(super) len: usize,
}

/// The number by which kernels know a format.
pub(super) fn format_number(format: CodeFormat) -> Result<usize> {
    let CodeFormat::Sparse(format) = format else {
        return Ok(0);
    };
    let reason = match format.coefficients {
        _ if format.variable => "codes of varying sparsity are not for devices; choose tolerance=0",
        CoefficientFormat::I8 => return Ok(1),
        CoefficientFormat::F8 => return Ok(2),
        CoefficientFormat::F32 => {
            "coefficients of f32 are not for devices; choose additive, i8 or f8"
        }
    };
    Err(Error::Device(reason.to_owned()))
}

impl<D: Device> DeviceCodes<D> {
    /// No codes yet.
    ///
    /// # Errors
    /// [`Error::Device`] for a format that devices do not take.
    pub fn new(device: &D, format: impl Into<CodeFormat>) -> Result<Self> {
        let format = format.into();
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

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        self.pages.len() * self.page_bytes() + self.table_pages * size_of::<u64>()
    }

    fn page_bytes(&self) -> usize {
        (PAGE * self.format.bytes()).next_multiple_of(ALIGNMENT)
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

    /// The place where kernels find the codes: `Head` in codes.cuh.
    pub(super) fn head(&self) -> [u8; 16] {
        let first = match self.format {
            CodeFormat::Additive(format) => format.sizes.first,
            CodeFormat::Sparse(_) => 0,
        };
        let mut head = [0; 16];
        head[..8].copy_from_slice(&D::address(&self.table).to_le_bytes());
        head[8..12].copy_from_slice(&(self.format.sparsity() as i32).to_le_bytes());
        head[12..].copy_from_slice(&(first as i32).to_le_bytes());
        head
    }

    /// Gives up whole pages of the oldest codes, of which the first `hidden` are no longer needed.
    pub(super) fn drop_hidden(&mut self, device: &D, hidden: usize) -> Result<()> {
        let pages = hidden.min(self.len) / PAGE;
        if pages > 0 {
            self.pages.drain(..pages);
            self.len -= pages * PAGE;
            self.write_table(device, 0)?;
        }
        Ok(())
    }

    /// Appends codes that were found, the vectors of each head to its own codes, and nothing leaves the device; the
    /// kernel scales coefficients for the fit.
    ///
    /// # Panics
    /// Where the vectors are not as many for each head, or a head's codes have more atoms than were looked for.
    pub(super) fn store(device: &D, heads: &mut [Self], found: &FoundCodes<D>) -> Result<()> {
        let sparsities: Vec<usize> = heads.iter().map(|codes| codes.format.sparsity()).collect();
        let each = vectors_per_head(found.count, &sparsities, found.max);
        if found.count == 0 {
            return Ok(());
        }
        let mut targets = Vec::new();
        for (codes, sparsity) in heads.iter_mut().zip(sparsities) {
            codes.reserve(device, each)?;
            // `Target` in store.cu.
            targets.extend(D::address(&codes.table).to_le_bytes());
            targets.extend((codes.len as i32).to_le_bytes());
            targets.extend((sparsity as i32).to_le_bytes());
        }
        let targets = upload(device, targets)?;
        let format = format_number(heads[0].format)?;
        let program = Program {
            name: "store",
            parts: &[COMMON, CODES, include_str!("kernels/store.cu")],
            constants: vec![("FORMAT", format)],
        };
        let at = Argument::of::<D>;
        let [each_head, count, max] = [each, found.count, found.max].map(Argument::int);
        let [indices, coefficients] = [&found.indices, &found.coefficients].map(at);
        let mut arguments = vec![at(&targets), each_head, count, max, indices, coefficients];
        let mut kernel = "store_additive";
        if format > 0 {
            kernel = "store_sparse";
            arguments.extend([&found.lengths, &found.errors].map(at));
            arguments.push(Argument::int(usize::from(found.fit == Fit::Unbiased)));
        }
        let blocks = found.count.div_ceil(THREADS as usize) as u32;
        let grid = Grid {
            blocks: [device.blocks().min(blocks), 1],
            threads: THREADS,
            shared: 0,
        };
        // SAFETY: the arguments are those of the kernels in kernels/store.cu; all pages are there.
        unsafe { device.launch(&program, kernel, grid, &arguments)? };
        heads.iter_mut().for_each(|codes| codes.len += each);
        Ok(())
    }

    /// Appends a batch that was found elsewhere.
    ///
    /// # Errors
    /// [`Error::Device`].
    ///
    /// # Panics
    /// Where the batch has another sparsity than these codes.
    pub fn extend(&mut self, device: &D, batch: &EncodedBatch) -> Result<()> {
        let s = self.format.sparsity();
        assert_eq!(batch.sparsity, s, "codes of one sparsity");
        let numbers =
            |numbers: &[f32]| upload(device, numbers.iter().flat_map(|x| x.to_le_bytes()));
        let mut indices = batch.indices.clone();
        let (coefficients, lengths) = match self.format {
            CodeFormat::Additive(AdditiveFormat { sizes, .. }) => {
                let own = indices.iter_mut().enumerate();
                own.for_each(|(i, index)| *index -= sizes.start(i % s) as u16);
                let scales = batch.coefficients.iter().step_by(s);
                let scales = scales.map(|&scale| Leading::new(0, scale).scale_number());
                (upload(device, scales)?, Vec::new())
            }
            CodeFormat::Sparse(_) => {
                let lengths = batch.lengths.iter().map(|&length| length as u8);
                (numbers(&batch.coefficients)?, lengths.collect())
            }
        };
        let found = FoundCodes {
            count: batch.len(),
            max: s,
            fit: Fit::LeastSquares,
            indices: upload(device, indices.into_iter().flat_map(u16::to_le_bytes))?,
            coefficients,
            lengths: upload(device, lengths)?,
            errors: numbers(&batch.relative_errors)?,
            bytes: 0,
            used: Vec::new(),
        };
        Self::store(device, std::slice::from_mut(self), &found)
    }
}
