use std::path::{Path, PathBuf};

/// Everything that can go wrong in this crate; each message says what was wrong with what.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read.
    #[error("{path}: {reason}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        reason: std::io::Error,
    },
    /// A model folder lacks a file.
    #[error("{folder}: no {file}; a model folder in Hugging Face layout has {needed}", folder = folder.display())]
    MissingFile {
        /// The folder.
        folder: PathBuf,
        /// The file that is not there.
        file: String,
        /// What such a folder has.
        needed: &'static str,
    },
    /// A model or a data set cannot be had from the hub.
    #[error("{name} on the hub: {reason}")]
    Hub {
        /// What it is, and its name with the revision.
        name: String,
        /// Why not, and what helps.
        reason: String,
    },
    /// A config cannot be understood or describes no possible model.
    #[error("{path}: {reason}", path = path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A GGUF file is damaged, or lacks or holds what cannot be used.
    #[error("{path}: {reason}", path = path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A tokenizer cannot be read or used.
    #[error("{path}: {reason}", path = path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A weight is missing or of another shape than the config says.
    #[error("{path}: weight {name:?}: {reason}", path = path.display())]
    Weight {
        /// The file it should be in.
        path: PathBuf,
        /// The weight.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file of the reference implementation cannot be imported.
    #[error("{path}: cannot import it: {reason}", path = path.display())]
    Import {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Dictionaries cannot be written as a file of the reference implementation.
    #[error("{path}: cannot export to it: {reason}", path = path.display())]
    Export {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A chat template that does not parse, or that refuses a conversation.
    #[error("the model's chat template: {0}")]
    Chat(String),
    /// No cache method of that name.
    #[error("no cache method {name:?}; there are: {known}")]
    UnknownMethod {
        /// The name given.
        name: String,
        /// The names there are.
        known: String,
    },
    /// A cache method has no such option.
    #[error("cache method {method:?} has no option {option:?}; {known}")]
    UnknownOption {
        /// The method.
        method: &'static str,
        /// The option given.
        option: String,
        /// The options there are.
        known: String,
    },
    /// An option's value cannot be used.
    #[error("cache method {method:?}: {option}={value}: {reason}")]
    OptionValue {
        /// The method.
        method: &'static str,
        /// The option.
        option: &'static str,
        /// The value given.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A cache method cannot be made as small as a budget.
    #[error(
        "{spec} does not fit {share:.1} % of FP16 at these lengths: the least is {smallest_share:.1} %, as {smallest}"
    )]
    Budget {
        /// The method, with the options given.
        spec: String,
        /// The budget, in per cent of FP16.
        share: f64,
        /// The smallest setting.
        smallest: String,
        /// What that takes, in per cent of FP16.
        smallest_share: f64,
    },
    /// A cache method needs dictionaries and there are none.
    #[error(
        "cache method {method:?} needs the dictionaries of the model {model}, and there are none"
    )]
    NoDictionary {
        /// The method.
        method: &'static str,
        /// The model.
        model: String,
    },
    /// A device cannot be used.
    #[error("the device {name}: {reason}")]
    Device {
        /// Its name.
        name: String,
        /// Why not, and what helps.
        reason: String,
    },
    /// A prompt without tokens.
    #[error("the prompt is empty; the model needs at least one token to go on from")]
    EmptyPrompt,
    /// More tokens than the model's context holds.
    #[error("{wanted} tokens do not fit a context of {context}; shorten the prompt")]
    ContextFull {
        /// Tokens asked for in all.
        wanted: usize,
        /// What fits.
        context: usize,
    },
    /// A token outside the vocabulary.
    #[error("token {token} lies outside the model's vocabulary of {vocabulary}")]
    TokenOutside {
        /// The token.
        token: u32,
        /// The vocabulary's size.
        vocabulary: usize,
    },
    /// A sampling setting that cannot be used.
    #[error("{0}")]
    Sampling(String),
    /// The model's output is not finite.
    #[error(
        "the model's logits hold a NaN or an infinity: its weights are damaged, or a setting is extreme"
    )]
    NotFinite,
    /// A key or value that cannot be coded.
    #[error("layer {layer}: a {part} cannot be coded: {reason}")]
    Coding {
        /// The layer.
        layer: usize,
        /// `key` or `value`.
        part: &'static str,
        /// Why.
        reason: lexico::Error,
    },
    /// A text that cannot serve as a corpus.
    #[error("{path}: {reason}", path = path.display())]
    Corpus {
        /// The file, or another input.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// What a training left behind cannot be used, or not be written.
    #[error("{path}: {reason}", path = path.display())]
    State {
        /// The folder of the state, or a file in it.
        path: PathBuf,
        /// What is wrong with it, and what helps.
        reason: String,
    },
    /// A saved cache cannot be used, or a cache not be saved.
    #[error("{path}: {reason}", path = path.display())]
    Saved {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what helps.
        reason: String,
    },
    /// An error of the codec.
    #[error(transparent)]
    Codec(#[from] lexico::Error),
    /// An error of the tensor library.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// This crate's result.
pub type Result<T> = std::result::Result<T, Error>;

pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error + '_ {
    move |reason| Error::Io {
        path: path.to_owned(),
        reason,
    }
}

/// The end of a message that names what there is.
pub(crate) fn listed(names: &[String]) -> String {
    const MAX: usize = 12;
    match names {
        [] => String::new(),
        _ if names.len() > MAX => format!("; there are {} and more", names[..MAX].join(", ")),
        _ => format!("; there are {}", names.join(", ")),
    }
}
