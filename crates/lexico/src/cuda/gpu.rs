use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{self, CUdevice_attribute, CUfunction_attribute};
use cudarc::driver::{
    CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtr, DriverError, result,
};

use super::compile::{compile, compile_cached};
use super::device::{Argument, Device, Grid, Program, Streams};
use crate::{Error, Result};

/// Blocks for every multiprocessor.
const BLOCKS: u32 = 4;
/// The oldest GPUs that have what the kernels use: asynchronous copies, and products of halves of this shape.
const OLDEST: (i32, i32) = (8, 0);

/// A stream of an NVIDIA GPU, by CUDA's driver; its primary context is that of other libraries in the process too.
#[derive(Clone)]
pub struct Gpu {
    stream: Arc<CudaStream>,
    architecture: String,
    blocks: u32,
    most_shared: usize,
    /// The folder where compiled programs are kept.
    folder: Option<PathBuf>,
    modules: Arc<Mutex<HashMap<Program, Module>>>,
}

/// Memory of a [`Gpu`].
pub struct GpuMemory {
    slice: CudaSlice<u8>,
    address: u64,
}

/// A program that was loaded, and its kernels that were used; it stays loaded as long as the context.
struct Module {
    module: sys::CUmodule,
    functions: HashMap<&'static str, sys::CUfunction>,
}

// SAFETY: the driver's handles may be used by any thread.
unsafe impl Send for Module {}

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
        // SAFETY: streams wait for each other where they must by marks of our own.
        unsafe { context.disable_event_tracking() };
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
        if (major, minor) < OLDEST {
            let reason = format!("its compute capability is {major}.{minor}; 8.0 is needed");
            return Err(Error::Device(reason));
        }
        let number = |attribute| context.attribute(attribute).map_err(&said);
        let multiprocessors = number(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let most_shared =
            number(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        if context.has_async_alloc() {
            // Memory that is freed is kept for what is asked for next, not given back whenever somebody waits.
            let mut kept = u64::MAX;
            // SAFETY: the pool is the device's own, and the number is read before this returns.
            unsafe {
                let pool = result::device::get_default_mem_pool(context.cu_device());
                result::mem_pool::set_attribute(
                    pool.map_err(&said)?,
                    sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
                    (&raw mut kept).cast(),
                )
                .map_err(&said)?;
            }
        }
        Ok(Self {
            architecture: format!("sm_{major}{minor}"),
            blocks: BLOCKS * multiprocessors.max(1) as u32,
            most_shared: most_shared.max(0) as usize,
            folder,
            modules: Arc::default(),
            stream,
        })
    }

    /// This stream, and one beside it.
    ///
    /// # Errors
    /// [`Error::Device`] where there can be no other stream.
    pub fn with_background_stream(self) -> Result<Streams<Self>> {
        let stream = self.context().new_stream();
        let background = Self {
            stream: stream.map_err(failed("a stream"))?,
            ..self.clone()
        };
        Ok(Streams {
            main: self,
            background,
        })
    }

    fn context(&self) -> &Arc<CudaContext> {
        self.stream.context()
    }

    fn function(&self, program: &Program, kernel: &'static str) -> Result<sys::CUfunction> {
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if !modules.contains_key(program) {
            let code = match &self.folder {
                Some(folder) => compile_cached(program, &self.architecture, folder)?,
                None => compile(program, &self.architecture)?,
            };
            // SAFETY: the code is a whole image, as NVRTC made it; the module is never unloaded.
            let module = unsafe { result::module::load_data(code.as_ptr().cast::<c_void>()) };
            let module = Module {
                module: module.map_err(failed(program.name))?,
                functions: HashMap::new(),
            };
            modules.insert(program.clone(), module);
        }
        let Some(module) = modules.get_mut(program) else {
            return Err(Error::Device(format!("{}: it is not loaded", program.name)));
        };
        if let Some(&function) = module.functions.get(kernel) {
            return Ok(function);
        }
        let name = CString::new(kernel).map_err(|error| Error::Device(error.to_string()))?;
        // SAFETY: the module is loaded, and the function is its.
        let function = unsafe {
            let function = result::module::get_function(module.module, name);
            let function = function.map_err(failed(kernel))?;
            // As much as there is, less what the kernel declares: without this it has 48 KiB.
            let own = CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
            let own = result::function::get_function_attribute(function, own);
            let own = own.map_err(failed(kernel))?;
            let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let shared = self.most_shared as i32 - own;
            result::function::set_function_attribute(function, most, shared)
                .map_err(failed(kernel))?;
            function
        };
        module.functions.insert(kernel, function);
        Ok(function)
    }
}

impl Device for Gpu {
    type Memory = GpuMemory;
    type Mark = CudaEvent;

    fn allocate(&self, bytes: usize) -> Result<GpuMemory> {
        // SAFETY: bytes are numbers whatever they hold.
        let slice = unsafe { self.stream.alloc::<u8>(bytes.max(1)) };
        let slice = slice.map_err(|error| {
            let (free, all) = self.context().mem_get_info().unwrap_or_default();
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

    fn mark(&self) -> Result<CudaEvent> {
        self.stream.record_event(None).map_err(failed("a mark"))
    }

    fn wait_until(&self, mark: &CudaEvent) -> Result<()> {
        self.stream.wait(mark).map_err(failed("waiting"))
    }

    fn most_shared(&self) -> usize {
        self.most_shared
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
        let function = self.function(program, kernel)?;
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
