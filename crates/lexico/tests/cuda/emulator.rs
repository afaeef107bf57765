//! A [`Device`] that compiles kernels for the host: `emulate.h` beside this file stands in for the GPU.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::path::Path;
use std::process::Command;

use lexico::cuda::{Argument, Device, Grid, Program};
use lexico::{Error, Result};
use libloading::Library;

pub(crate) struct Emulator {
    folder: tempfile::TempDir,
    programs: RefCell<HashMap<Program, Library>>,
}

impl Emulator {
    /// # Errors
    /// Why there is none: no compiler.
    pub(crate) fn new() -> std::result::Result<Self, String> {
        match Command::new("c++").arg("--version").output() {
            Ok(output) if output.status.success() => Ok(Self {
                folder: tempfile::tempdir().unwrap(),
                programs: RefCell::default(),
            }),
            _ => Err("there is no C++ compiler c++".to_owned()),
        }
    }

    fn compile(&self, program: &Program) -> Library {
        let number = self.programs.borrow().len();
        let source = self.folder.path().join(format!("{number}.cpp"));
        let library = self.folder.path().join(format!("{number}.so"));
        std::fs::write(
            &source,
            format!("#include \"emulate.h\"\n{}", program.text()),
        )
        .unwrap();
        let headers = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda");
        let output = Command::new("c++")
            .args([
                "-std=c++20",
                "-O2",
                "-U_FORTIFY_SOURCE",
                "-shared",
                "-fPIC",
                "-I",
            ])
            .arg(headers)
            .arg(&source)
            .arg("-o")
            .arg(&library)
            .output()
            .unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {message}", program.name);
        // SAFETY: the library was just made; loading it runs nothing but C++'s own beginnings.
        unsafe { Library::new(&library) }.unwrap()
    }
}

impl Device for Emulator {
    type Memory = Vec<u64>;
    type Mark = ();

    fn allocate(&self, bytes: usize) -> Result<Vec<u64>> {
        // What no kernel has written shows.
        Ok(vec![0x7ff8_dead_7fc0_dead; bytes.div_ceil(8) + 2])
    }

    fn address(memory: &Vec<u64>) -> u64 {
        // Sixteen bytes are copied at once.
        (memory.as_ptr() as u64).next_multiple_of(16)
    }

    fn write(&self, to: &mut Vec<u64>, at: usize, bytes: &[u8]) -> Result<()> {
        assert!(at + bytes.len() <= 8 * (to.len() - 2));
        let start = Self::address(to) as *mut u8;
        // SAFETY: as many bytes are there, and nothing else uses them.
        unsafe { start.add(at).copy_from(bytes.as_ptr(), bytes.len()) };
        Ok(())
    }

    fn read(&self, from: &Vec<u64>, at: usize, bytes: &mut [u8]) -> Result<()> {
        assert!(at + bytes.len() <= 8 * (from.len() - 2));
        let start = Self::address(from) as *const u8;
        // SAFETY: as many bytes are there.
        unsafe { start.add(at).copy_to(bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        Ok(())
    }

    fn mark(&self) -> Result<()> {
        Ok(())
    }

    fn wait_until(&self, _: &()) -> Result<()> {
        Ok(())
    }

    fn most_shared(&self) -> usize {
        227 * 1024
    }

    fn blocks(&self) -> u32 {
        2
    }

    unsafe fn launch(
        &self,
        program: &Program,
        kernel: &'static str,
        grid: Grid,
        arguments: &[Argument],
    ) -> Result<()> {
        if !self.programs.borrow().contains_key(program) {
            let library = self.compile(program);
            self.programs.borrow_mut().insert(program.clone(), library);
        }
        let programs = self.programs.borrow();
        type Entry = unsafe extern "C" fn(*const u32, *mut *mut c_void);
        let name = format!("launch_{kernel}");
        // SAFETY: every entry has this type.
        let entry = unsafe { programs[program].get::<Entry>(name.as_bytes()) };
        let entry = entry.map_err(|error| Error::Device(format!("{kernel}: {error}")))?;
        let [x, y] = grid.blocks;
        let shape = [x, y, 1, grid.threads, grid.shared as u32];
        let mut places: Vec<*mut c_void> =
            arguments.iter().map(|a| a.place() as *mut c_void).collect();
        // SAFETY: the caller's.
        unsafe { entry(shape.as_ptr(), places.as_mut_ptr()) };
        Ok(())
    }
}
