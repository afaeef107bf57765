use std::path::{Path, PathBuf};

use lexico::shown::{shown, shown_message, shown_path};

use crate::train::StateError;

/// Everything that can go wrong in this crate; each message says what was wrong with what.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read.
    #[error("{path}: {reason}", path = shown_path(path))]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        reason: std::io::Error,
    },
    /// A model or a data set cannot be had from the hub.
    #[error("{name} on the hub: {reason}", name = shown(name), reason = shown_message(reason))]
    Hub {
        /// Its kind, and its name with the revision.
        name: String,
        /// Why not, and what helps.
        reason: String,
    },
    /// A file or folder that lacks, or holds, what cannot be used: of a model, a corpus, or dictionaries.
    #[error("{path}: {reason}", path = shown_path(path), reason = shown_message(reason))]
    File {
        /// The file or folder, or another input.
        path: PathBuf,
        /// The fault, and what helps.
        reason: String,
    },
    /// A chat template that does not parse, or that refuses a conversation.
    #[error("the model's chat template: {}", shown_message(.0))]
    Chat(String),
    /// A message for a text that is not a conversation.
    #[error("the text so far is plain and no conversation; it goes on only as plain text")]
    PlainText,
    /// No cache method of that name.
    #[error("no cache method \"{name}\"; there are: {known}", name = shown(name))]
    UnknownMethod {
        /// The name given.
        name: String,
        /// The names there are.
        known: String,
    },
    /// A cache method has no such option.
    #[error("cache method {method:?} has no option \"{option}\"; {known}", option = shown(option))]
    UnknownOption {
        /// The method.
        method: &'static str,
        /// The option given.
        option: String,
        /// The options there are.
        known: String,
    },
    /// An option's value cannot be used.
    #[error("cache method {method:?}: {option}={value}: {reason}", value = shown(value), reason = shown_message(reason))]
    OptionValue {
        /// The method.
        method: &'static str,
        /// The option.
        option: &'static str,
        /// The value given.
        value: String,
        /// The fault.
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
        /// The share that this takes, in per cent of FP16.
        smallest_share: f64,
    },
    /// A cache method needs dictionaries and there are none.
    #[error(
        "cache method {method:?} needs the dictionaries of the model {model}, and there are none", model = shown(model)
    )]
    NoDictionary {
        /// The method.
        method: &'static str,
        /// The model.
        model: String,
    },
    /// A device cannot be used.
    #[error("the device {name}: {reason}", name = shown(name), reason = shown_message(reason))]
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
        /// Tokens that the context holds.
        context: usize,
    },
    /// More tokens than the memory of a cache holds.
    #[error(
        "{wanted} tokens do not fit the cache's memory, which holds {capacity} even as codes; shorten the prompt, or give more memory"
    )]
    MemoryFull {
        /// Tokens asked for in all.
        wanted: usize,
        /// Tokens that the memory holds.
        capacity: usize,
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
    /// A training has nothing to learn.
    #[error("dictionaries that are kept and no codebooks leave nothing to learn")]
    NothingToLearn,
    /// Heads cannot be coded together.
    #[error(
        "{together} heads together: the model has {heads} KV heads, which must be a multiple of it"
    )]
    JointHeads {
        /// Heads that are to be coded together.
        together: usize,
        /// KV heads of the model.
        heads: usize,
    },
    /// Layers cannot be coded together.
    #[error(
        "{together} layers together: the model has {layers} layers, which must be a multiple of it"
    )]
    JointLayers {
        /// Layers that are to be coded together.
        together: usize,
        /// Layers of the model.
        layers: usize,
    },
    /// Layers are to be coded together that have dictionaries for sparse codes.
    #[error(
        "dictionaries for sparse codes are of one layer each; layers are coded together where codebooks alone are learned"
    )]
    JointSparse,
    /// A training is to read longer chunks than the model's context.
    #[error("the model's context is {max}, not {context} tokens")]
    TrainContext {
        /// Tokens asked for.
        context: usize,
        /// Tokens that the model can see at once.
        max: usize,
    },
    /// A training is to read too little.
    #[error(
        "{tokens} tokens in chunks of {context} are too few: one chunk is to learn from, one to judge by, and a chunk \
         has at least 2 tokens"
    )]
    TrainTokens {
        /// Tokens to read.
        tokens: usize,
        /// Tokens of a chunk.
        context: usize,
    },
    /// The losses of codes cannot be measured.
    #[error("{0}")]
    Measure(String),
    /// The state of a training cannot be used.
    #[error("{path}: {reason}", path = shown_path(path))]
    State {
        /// Folder of the state, or a file in it.
        path: PathBuf,
        /// Fault, and its cure.
        reason: StateError,
    },
    /// The state of a training cannot be written.
    #[error(
        "{folder}: the work since the last saving could not be saved; all before is whole: make room and go on with \
         --resume, or name a roomier --work-dir", folder = folder.display()
    )]
    StateNotSaved {
        /// Folder of the state.
        folder: PathBuf,
        /// Failed write, with its file.
        source: Box<Error>,
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

pub(crate) fn refused(path: &Path, reason: impl Into<String>) -> Error {
    Error::File {
        path: path.to_owned(),
        reason: reason.into(),
    }
}

/// The end of a message that names what there is.
pub(crate) fn listed(names: &[String]) -> String {
    if names.is_empty() {
        return String::new();
    }
    format!("; there are {}", some_of(names))
}

/// The first of some names, outside text as they are.
pub(crate) fn some_of(names: &[String]) -> String {
    const MAX: usize = 12;
    let first: Vec<String> = names.iter().take(MAX).map(shown).collect();
    let more = if names.len() > MAX { " and more" } else { "" };
    first.join(", ") + more
}

/// Reads JSON; else says which entry is wrong, and why, without repeating the document.
pub(crate) fn from_json<T: serde::de::DeserializeOwned>(
    json: &[u8],
) -> std::result::Result<T, String> {
    let mut json = serde_json::Deserializer::from_slice(json);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|e| {
        let path = e.path().to_string();
        match path.as_str() {
            "." => shown(e.into_inner()),
            _ => format!("{}: {}", shown(path), shown(e.into_inner())),
        }
    })?;
    json.end().map_err(shown)?;
    Ok(value)
}
