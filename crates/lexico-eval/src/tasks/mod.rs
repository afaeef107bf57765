//! One file a task.

pub mod dictionary;
pub mod drawn;
pub mod gsm8k;
pub mod longbench;
pub mod mmlu_pro;
pub mod needle;
pub mod problems;
mod python_random;
pub mod recall;
pub mod reconstruction;
pub mod ruler;
pub mod text;

use std::path::PathBuf;

use lexico_llm::hub::DatasetName;

use crate::error::{Error, Result};

/// The one file of a data set on the hub that `path` stands for, which may have `*`.
fn fetch_one(repository: &str, path: &str, progress: bool) -> Result<PathBuf> {
    let dataset = DatasetName {
        repository: repository.to_owned(),
        revision: "main".to_owned(),
        path: Some(path.to_owned()),
    };
    let files = dataset.fetch(&|_| true, progress)?.files;
    match <[PathBuf; 1]>::try_from(files) {
        Ok([file]) => Ok(file),
        Err(files) => Err(Error::Options(format!(
            "{repository} has {} files {path} on the hub, where there was one; download it and name a file",
            files.len()
        ))),
    }
}
