//! A [`Device`] that compiles kernels for GPUs and runs none.

use lexico::Result;
use lexico::cuda::{Argument, Device, Grid, Program, compile_cached};
use std::cell::RefCell;

/// The oldest that has what the kernels use, and the one that they are tuned for.
const ARCHITECTURES: [&str; 2] = ["sm_80", "sm_90"];

pub(crate) struct Compiler {
    folder: tempfile::TempDir,
    /// Kernels that were asked for, and bytes of their code.
    pub(crate) compiled: RefCell<Vec<(&'static str, usize)>>,
}

impl Compiler {
    pub(crate) fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            compiled: RefCell::default(),
        }
    }
}

impl Device for Compiler {
    type Memory = usize;
    type Mark = ();

    fn allocate(&self, bytes: usize) -> Result<usize> {
        Ok(bytes)
    }

    fn address(_: &usize) -> u64 {
        0
    }

    fn write(&self, to: &mut usize, at: usize, bytes: &[u8]) -> Result<()> {
        assert!(at + bytes.len() <= *to);
        Ok(())
    }

    fn read(&self, from: &usize, at: usize, bytes: &mut [u8]) -> Result<()> {
        assert!(at + bytes.len() <= *from);
        bytes.fill(0);
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
        528
    }

    unsafe fn launch(
        &self,
        program: &Program,
        kernel: &'static str,
        _: Grid,
        _: &[Argument],
    ) -> Result<()> {
        for architecture in ARCHITECTURES {
            let code = compile_cached(program, architecture, self.folder.path())?;
            let name = kernel.as_bytes();
            assert!(
                code.windows(name.len()).any(|part| part == name),
                "{architecture}: {kernel} is in the code"
            );
            self.compiled.borrow_mut().push((kernel, code.len()));
        }
        Ok(())
    }
}
