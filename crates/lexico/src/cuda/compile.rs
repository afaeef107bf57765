use std::ffi::{CString, c_char};
use std::io::Write;
use std::path::{Path, PathBuf};

use cudarc::nvrtc::{result, sys};

use super::device::Program;
use crate::{Error, Result};

/// Compiles a program by NVRTC to machine code for one architecture, such as `sm_90`; nothing of it needs a GPU.
///
/// # Errors
/// [`Error::Device`] with the compiler's words, or where there is no NVRTC.
pub fn compile(program: &Program, architecture: &str) -> Result<Vec<u8>> {
    if !is_present() {
        return Err(Error::Device(
            "there is no NVRTC, CUDA's compiler library (libnvrtc.so); install the CUDA toolkit, or the Python package \
             nvidia-cuda-nvrtc, and have LD_LIBRARY_PATH name its folder"
                .to_owned(),
        ));
    }
    let failed = |what: &str, reason: &dyn std::fmt::Display| {
        Error::Device(format!("the program {}: {what}: {reason}", program.name))
    };
    let c_string = |text: String| CString::new(text).map_err(|error| failed("text", &error));
    let text = c_string(program.text())?;
    let name = c_string(format!("{}.cu", program.name))?;
    let source = result::create_program(&text, Some(&name)).map_err(|e| failed("NVRTC", &e))?;
    let options = [
        format!("--gpu-architecture={architecture}"),
        "--std=c++17".to_owned(),
        "--extra-device-vectorization".to_owned(),
    ];
    // SAFETY: the program is there until it is destroyed below; the code has as much room as it is said to need.
    unsafe {
        let compiled = result::compile_program(source, &options);
        let code = match compiled {
            Ok(()) => code_of(source).map_err(|e| failed("its machine code", &e)),
            Err(error) => {
                let log = result::get_program_log(source).unwrap_or_default();
                let log: Vec<u8> = log
                    .iter()
                    .map(|&c| c as u8)
                    .take_while(|&c| c != 0)
                    .collect();
                let log = String::from_utf8_lossy(&log).into_owned();
                let hint = match log.contains("--gpu-architecture") {
                    true => " (this NVRTC is older than the GPU; a newer CUDA toolkit knows it)",
                    false => "",
                };
                Err(failed(&format!("{error}{hint}"), &log.trim()))
            }
        };
        let _ = result::destroy_program(source);
        code
    }
}

/// Returns whether the compiler's library is there.
fn is_present() -> bool {
    // SAFETY: asks for the library's presence only.
    #[cfg(not(feature = "cuda-linked"))]
    return unsafe { sys::is_culib_present() };
    #[cfg(feature = "cuda-linked")]
    true
}

/// # Safety
/// The program must have been compiled, and not be destroyed.
unsafe fn code_of(source: sys::nvrtcProgram) -> std::result::Result<Vec<u8>, result::NvrtcError> {
    // SAFETY: the caller's.
    unsafe {
        let mut size = 0;
        sys::nvrtcGetCUBINSize(source, &mut size).result()?;
        let mut code = vec![0u8; size];
        sys::nvrtcGetCUBIN(source, code.as_mut_ptr().cast::<c_char>()).result()?;
        Ok(code)
    }
}

/// Does what [`compile`] does, from a file in `folder` where the same text was compiled for the same architecture before; what is compiled is
/// kept there.
///
/// # Errors
/// Those of [`compile`]. A folder that cannot be read or written is no error: there is only no cache then.
pub fn compile_cached(program: &Program, architecture: &str, folder: &Path) -> Result<Vec<u8>> {
    let text = format!("{architecture}\n{}", program.text());
    let file = file_of(program, &text, folder);
    if let Some(code) = std::fs::read(&file)
        .ok()
        .and_then(|bytes| of_text(bytes, &text))
    {
        return Ok(code);
    }
    let code = compile(program, architecture)?;
    let _ = keep(&file, folder, &text, &code);
    Ok(code)
}

/// The folder where compiled kernels are kept, beside other programs' caches; `None` where the environment names no such place.
pub fn kernel_folder() -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache"));
    Some(cache.or_else(home)?.join("lexico").join("kernels"))
}

fn file_of(program: &Program, text: &str, folder: &Path) -> PathBuf {
    let number = crc32fast::hash(text.as_bytes());
    folder.join(format!("{}-{number:08x}.cubin", program.name))
}

/// The code in a file, where the file is of this text, whole: the text's length, the text, a checksum, the code.
fn of_text(bytes: Vec<u8>, text: &str) -> Option<Vec<u8>> {
    let (length, rest) = bytes.split_first_chunk::<8>()?;
    let rest = rest.strip_prefix(text.as_bytes())?;
    let (checksum, code) = rest.split_first_chunk::<4>()?;
    let right = u64::from_le_bytes(*length) == text.len() as u64
        && u32::from_le_bytes(*checksum) == crc32fast::hash(code);
    right.then(|| code.to_vec())
}

fn keep(file: &Path, folder: &Path, text: &str, code: &[u8]) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let mut beside = tempfile::NamedTempFile::new_in(folder)?;
    beside.write_all(&(text.len() as u64).to_le_bytes())?;
    beside.write_all(text.as_bytes())?;
    beside.write_all(&crc32fast::hash(code).to_le_bytes())?;
    beside.write_all(code)?;
    beside.persist(file)?;
    Ok(())
}
