use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{self, CUdevice_attribute, CUfunction_attribute};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, DriverError, result};

use super::compile::{compile, compile_cached};
use super::device::{Argument, Device, Grid, Program, Streams};
use crate::{Error, Result};

/// Blocks for every multiprocessor.
const BLOCKS: u32 = 4;
/// Shared memory that a kernel has without asking.
const SHARED: usize = 48 * 1024;

/// A stream of an NVIDIA GPU, by CUDA's driver; its primary context is that of other libraries in the process too.
pub struct Gpu {
    stream: Arc<CudaStream>,
    architecture: String,
    blocks: u32,
    /// Where compiled programs are kept.
    folder: Option<PathBuf>,
    functions: Arc<Mutex<HashMap<(Program, &'static str), Function>>>,
}

/// Memory of a [`Gpu`].
pub struct GpuMemory {
    slice: CudaSlice<u8>,
    address: u64,
}

/// A kernel that was loaded; modules stay loaded as long as the context.
#[derive(Clone, Copy)]
struct Function(sys::CUfunction);

// SAFETY: the driver's handles may be used by any thread.
unsafe impl Send for Function {}

fn failed(what: &str) -> impl Fn(DriverError) -> Error + '_ {
    move |error| Error::Device(format!("{what}: {error}"))
}

impl Gpu {
    /// GPU number `ordinal`, the first being 0. What is compiled for it is kept in `folder`.
    ///
    /// # Errors
    /// [`Error::Device`] where there is no driver, or no such GPU.
    pub fn new(ordinal: usize, folder: Option<PathBuf>) -> Result<Self> {
        #[cfg(not(feature = "cuda-linked"))]
        // SAFETY: asks for the library's presence only.
        if !unsafe { sys::is_culib_present() } {
            let reason = "there is no NVIDIA driver (libcuda.so); use --device cpu";
            return Err(Error::Device(reason.to_owned()));
        }
        let name = format!("GPU {ordinal}");
        let context = CudaContext::new(ordinal).map_err(failed(&name))?;
        Self::of_stream(context.new_stream().map_err(failed(&name))?, folder)
    }

    /// The GPU of a stream that another library made, and that stream.
    ///
    /// # Errors
    /// [`Error::Device`] where the GPU says nothing of itself.
    pub fn of_stream(stream: Arc<CudaStream>, folder: Option<PathBuf>) -> Result<Self> {
        let context = stream.context();
        let said = failed("what it is");
        let (major, minor) = context.compute_capability().map_err(&said)?;
        let multiprocessors = context
            .attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .map_err(&said)?;
        Ok(Self {
            architecture: format!("sm_{major}{minor}"),
            blocks: BLOCKS * multiprocessors.max(1) as u32,
            folder,
            functions: Arc::default(),
            stream,
        })
    }

    /// This stream, and one beside it.
    ///
    /// # Errors
    /// [`Error::Device`] where there can be no other stream.
    pub fn with_stream_aside(self) -> Result<Streams<Self>> {
        let stream = self.context().new_stream();
        let aside = Self {
            stream: stream.map_err(failed("a stream"))?,
            architecture: self.architecture.clone(),
            blocks: self.blocks,
            folder: self.folder.clone(),
            functions: Arc::clone(&self.functions),
        };
        Ok(Streams { main: self, aside })
    }

    fn context(&self) -> &Arc<CudaContext> {
        self.stream.context()
    }

    /// The GPU's name, as the driver has it.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn name(&self) -> Result<String> {
        self.context().name().map_err(failed("its name"))
    }

    /// Bytes of memory that are free, and bytes that there are.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.context().mem_get_info().map_err(failed("its memory"))
    }

    fn function(&self, program: &Program, kernel: &'static str) -> Result<Function> {
        let mut functions = self
            .functions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let key = (program.clone(), kernel);
        if let Some(&function) = functions.get(&key) {
            return Ok(function);
        }
        let code = match &self.folder {
            Some(folder) => compile_cached(program, &self.architecture, folder)?,
            None => compile(program, &self.architecture)?,
        };
        let name = CString::new(kernel).map_err(|error| Error::Device(error.to_string()))?;
        // SAFETY: the code is a whole image, as NVRTC made it; the module is never unloaded.
        let function = unsafe {
            let module = result::module::load_data(code.as_ptr().cast::<c_void>());
            let module = module.map_err(failed(program.name))?;
            result::module::get_function(module, name).map_err(failed(kernel))?
        };
        functions.insert(key, Function(function));
        Ok(Function(function))
    }
}

impl Device for Gpu {
    type Memory = GpuMemory;

    fn allocate(&self, bytes: usize) -> Result<GpuMemory> {
        // SAFETY: bytes are numbers whatever they hold.
        let slice = unsafe { self.stream.alloc::<u8>(bytes.max(1)) };
        let slice = slice.map_err(|error| {
            let (free, all) = self.memory().unwrap_or_default();
            Error::Device(format!(
                "{bytes} bytes of its memory, of which {free} of {all} are free: {error}"
            ))
        })?;
        let address = slice.device_ptr(&self.stream).0;
        Ok(GpuMemory { slice, address })
    }

    fn address(memory: &GpuMemory) -> u64 {
        memory.address
    }

    fn write(&self, to: &mut GpuMemory, at: usize, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let mut place = to.slice.slice_mut(at..at + bytes.len());
        self.stream
            .memcpy_htod(bytes, &mut place)
            .map_err(failed("writing"))
    }

    fn read(&self, from: &GpuMemory, at: usize, bytes: &mut [u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let place = from.slice.slice(at..at + bytes.len());
        self.stream
            .memcpy_dtoh(&place, bytes)
            .map_err(failed("reading"))?;
        self.finish()
    }

    fn finish(&self) -> Result<()> {
        self.stream.synchronize().map_err(failed("a kernel"))
    }

    fn wait_for(&self, other: &Self) -> Result<()> {
        self.stream.join(&other.stream).map_err(failed("waiting"))
    }

    fn blocks(&self) -> u32 {
        self.blocks
    }

    unsafe fn launch(
        &self,
        program: &Program,
        kernel: &'static str,
        grid: Grid,
        arguments: &[Argument],
    ) -> Result<()> {
        self.context().bind_to_thread().map_err(failed(kernel))?;
        let Function(function) = self.function(program, kernel)?;
        if grid.shared > SHARED {
            let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is there.
            unsafe { result::function::set_function_attribute(function, most, grid.shared as i32) }
                .map_err(|error| {
                    Error::Device(format!(
                        "{} bytes of shared memory for {kernel}: {error}",
                        grid.shared
                    ))
                })?;
        }
        let mut places: Vec<*mut c_void> = arguments
            .iter()
            .map(|argument| argument.place().cast_mut().cast())
            .collect();
        let [x, y] = grid.blocks;
        // SAFETY: the caller's.
        unsafe {
            result::launch_kernel(
                function,
                (x, y, 1),
                (grid.threads, 1, 1),
                grid.shared as u32,
                self.stream.cu_stream(),
                &mut places,
            )
        }
        .map_err(failed(kernel))
    }
}
