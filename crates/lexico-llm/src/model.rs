//! A model with all it needs to speak: decoder, tokenizer, dictionaries.

use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Device;
use lexico::DictionarySet;
use lexico::attention::NumberType;
use lexico::dictionary::ModelIdentity;
use lexico::shown::{shown, shown_path};
use lexico::tensor_file::TensorFile;
use sha2::{Digest, Sha256};

use crate::cache::{CacheContext, CacheSpec, Calibration, FullCache, KvCache, Lengths};
use crate::chat::ChatTemplate;
use crate::config::{Config, GenerationConfig, OneOrMany, read_required};
use crate::decoder::{Decoder, Logits};
use crate::error::{Error, Result, io};
use crate::gguf::{GgufModel, GgufTokenizer};
use crate::tokenizer::Tokenizer;
use crate::tokenizer_config::TokenizerFiles;
use crate::weights::{Quantize, Weights};

/// The file beside a model's weights that holds its dictionaries.
pub const DICTIONARY_FILE: &str = "dictionary.safetensors";

/// A language model, loaded.
pub struct Model {
    /// Name, for people.
    pub name: String,
    /// The decoder.
    pub decoder: Decoder,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// Tokens that end a text.
    pub end_tokens: Vec<u32>,
    /// Texts that end a generation unless the caller says otherwise.
    pub stop_texts: Vec<String>,
    /// What the user should know: where the model's files disagree, and which of them holds, a line each.
    pub notes: Vec<String>,
    /// Dictionaries, where there are any.
    pub dictionaries: Option<Arc<DictionarySet>>,
    /// What [`Model::calibrate`] found, for cache methods that calibrate.
    pub calibration: Option<Calibration>,
}

/// The files of a model in Hugging Face layout.
struct ModelFiles {
    /// Name in messages.
    folder: PathBuf,
    config: Config,
    /// Where the config's entries disagree.
    notes: Vec<String>,
    generation_config: Option<String>,
    tokenizer: Vec<u8>,
    tokenizer_files: TokenizerFiles,
    weights: Weights,
}

impl Model {
    /// The small model that is embedded in the program, with its dictionaries.
    ///
    /// # Errors
    /// None in a sound build: the tests load it.
    pub fn tiny() -> Result<Self> {
        Self::tiny_on(Quantize::None, &Device::Cpu)
    }

    /// Opens the model of [`Model::tiny`], its matrices held as `quantize` says, to compute on a device.
    ///
    /// # Errors
    /// Where the device's memory does not suffice.
    pub fn tiny_on(quantize: Quantize, device: &Device) -> Result<Self> {
        macro_rules! embedded {
            ($file:literal) => {
                include_bytes!(concat!("../../../models/tiny/", $file))
            };
        }
        let text = |bytes: &'static [u8]| String::from_utf8_lossy(bytes).into_owned();
        let config = Path::new("tiny/config.json");
        let files = ModelFiles {
            folder: PathBuf::from("tiny"),
            notes: Vec::new(),
            config: Config::parse(&text(embedded!("config.json")), config)?,
            generation_config: Some(text(embedded!("generation_config.json"))),
            tokenizer: embedded!("tokenizer.json").to_vec(),
            tokenizer_files: TokenizerFiles::of_config(&text(embedded!("tokenizer_config.json"))),
            weights: Weights::single(TensorFile::from_static(
                "tiny/model.safetensors",
                embedded!("model.safetensors"),
            )?),
        };
        let mut model = Self::assemble("tiny", files, quantize, device)?;
        model.set_dictionaries(DictionarySet::read(&TensorFile::from_static(
            "tiny/dictionary.safetensors",
            embedded!("dictionary.safetensors"),
        )?)?)?;
        Ok(model)
    }

    /// Loads a folder in Hugging Face layout, or a GGUF file, its matrices held as `quantize` says.
    /// Dictionaries come apart: [`Model::load_dictionaries`].
    ///
    /// # Errors
    /// The missing-file, config, GGUF, tokenizer and weight variants of [`crate::Error`], and
    /// those of the files themselves.
    pub fn load(path: &Path, quantize: Quantize) -> Result<Self> {
        Self::load_on(path, quantize, &Device::Cpu)
    }

    /// Loads a model as [`Model::load`] does, to compute on a device.
    ///
    /// # Errors
    /// Those of [`Model::load`], and where the device's memory does not suffice.
    pub fn load_on(path: &Path, quantize: Quantize, device: &Device) -> Result<Self> {
        if path.is_file() {
            Self::load_gguf(path, quantize, device)
        } else {
            Self::load_folder(path, quantize, device)
        }
    }

    fn load_gguf(path: &Path, quantize: Quantize, device: &Device) -> Result<Self> {
        let gguf = Arc::new(GgufModel::open(path)?);
        let (name, config, path) = (gguf.name(), gguf.config().clone(), gguf.path().to_owned());
        let end_tokens = config.end_tokens.clone();
        let weights = Weights::Gguf(Arc::clone(&gguf));
        let tokenizer = || {
            let GgufTokenizer {
                inner,
                config,
                notes,
            } = gguf.tokenizer()?;
            let files = TokenizerFiles::of_config(&config);
            Ok::<_, Error>((Tokenizer::new(inner, files, &path)?, notes))
        };
        let decoder = || Decoder::load(config, &weights, quantize, device);
        // The tokenizer is made by this thread: it allocates a million times, for which a pool's threads take twice as long
        // with glibc.
        let (tokenizer, decoder) = std::thread::scope(|scope| {
            let decoder = scope.spawn(decoder);
            let tokenizer = tokenizer();
            let decoder = decoder.join();
            (
                tokenizer,
                decoder.unwrap_or_else(|panic| resume_unwind(panic)),
            )
        });
        let (tokenizer, notes) = tokenizer?;
        Ok(Self {
            name,
            end_tokens,
            stop_texts: Vec::new(),
            notes,
            tokenizer,
            decoder: decoder?,
            dictionaries: None,
            calibration: None,
        })
    }

    fn load_folder(folder: &Path, quantize: Quantize, device: &Device) -> Result<Self> {
        let optional = |file: &str| {
            let path = folder.join(file);
            let read = || std::fs::read_to_string(&path).map_err(io(&path));
            path.is_file().then(read).transpose()
        };
        let (config, notes) = Config::load_noting(folder)?;
        let files = ModelFiles {
            folder: folder.to_owned(),
            config,
            notes,
            generation_config: optional("generation_config.json")?,
            tokenizer: read_required(folder, "tokenizer.json")?,
            tokenizer_files: TokenizerFiles::read(folder)?,
            weights: Weights::open(folder)?,
        };
        let name = folder.canonicalize().map_err(io(folder))?;
        let name = name.file_name().map(|name| name.to_string_lossy());
        Self::assemble(&name.unwrap_or("model".into()), files, quantize, device)
    }

    /// The model's chat template, where it has one.
    ///
    /// # Errors
    /// Those of [`ChatTemplate::choose`].
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>> {
        ChatTemplate::choose(&self.tokenizer.templates, self.tokenizer.special.clone())
    }

    /// Loads the model's dictionaries from a file, [`DICTIONARY_FILE`] of its folder, say.
    ///
    /// # Errors
    /// Those of [`DictionarySet::load`] and [`Model::set_dictionaries`].
    pub fn load_dictionaries(&mut self, path: &Path) -> Result<()> {
        self.set_dictionaries(DictionarySet::load(path)?)
    }

    fn assemble(
        name: &str,
        files: ModelFiles,
        quantize: Quantize,
        device: &Device,
    ) -> Result<Self> {
        let path = files.folder.join("generation_config.json");
        let text = files.generation_config;
        let generation = text.map(|text| GenerationConfig::parse(&text, &path));
        let generation = generation.transpose()?.unwrap_or_default();
        let stop_texts = generation.stop_strings.map(OneOrMany::list);
        let path = files.folder.join("tokenizer.json");
        let tokenizer = Tokenizer::parse(&files.tokenizer, files.tokenizer_files, &path)?;
        let (mut config, mut notes) = (files.config, files.notes);
        notes.extend(files.weights.check_names(&config)?);
        notes.extend(untie(&mut config, &files.weights)?);
        let (known, held) = (tokenizer.vocabulary(), config.vocabulary);
        if known > held {
            notes.push(format!(
                "the tokenizer has {known} tokens and the model {held} (vocab_size): text with the others is refused"
            ));
        }
        let of_generation = generation.eos_token_id.map(OneOrMany::list);
        let end_tokens = end_tokens(&config, of_generation, &tokenizer, &mut notes);
        let folder = shown_path(&files.folder);
        let notes = notes.iter().map(|note| format!("{folder}: {note}"));
        Ok(Self {
            name: name.to_owned(),
            end_tokens,
            notes: notes.collect(),
            stop_texts: stop_texts.unwrap_or_default(),
            tokenizer,
            decoder: Decoder::load(config, &files.weights, quantize, device)?,
            dictionaries: None,
            calibration: None,
        })
    }

    /// Gives the model its dictionaries.
    ///
    /// # Errors
    /// [`lexico::Error::OtherModel`] where they belong to another model.
    pub fn set_dictionaries(&mut self, dictionaries: DictionarySet) -> Result<()> {
        dictionaries.check_fits(&self.identity())?;
        self.dictionaries = Some(Arc::new(dictionaries));
        Ok(())
    }

    /// Calibrates cache methods that need it, for all caches made from now on, on the tokens of a text: the first of them
    /// where they are more than a few thousand or than the model's context. Without a token nothing changes.
    ///
    /// # Errors
    /// Those of [`Decoder::forward`].
    pub fn calibrate(&mut self, tokens: &[u32]) -> Result<()> {
        // They are read at once, and attention takes the square of their number.
        const MAX: usize = 4096;
        let count = tokens.len().min(MAX).min(self.decoder.config().context);
        if count > 0 {
            self.calibration = Some(Calibration::on(&self.decoder, &tokens[..count])?);
        }
        Ok(())
    }

    /// A checksum of what the model says after a few tokens: models of one name and shape differ in it.
    ///
    /// # Errors
    /// Those of [`Decoder::forward`].
    pub fn fingerprint(&self) -> Result<String> {
        let config = self.decoder.config();
        let tokens: Vec<u32> = (0..config.vocabulary.min(8) as u32).collect();
        let mut cache = FullCache::new(config, NumberType::F32);
        let tokens = &tokens[..tokens.len().min(config.context)];
        let logits = self.decoder.forward_one(tokens, &mut cache, Logits::Last)?;
        let mut hasher = crc32fast::Hasher::new();
        for logit in logits.flatten_all()?.to_vec1::<f32>()? {
            hasher.update(&logit.to_le_bytes());
        }
        Ok(format!("{:08x}", hasher.finalize()))
    }

    /// A fingerprint of the model's weights, the same on every machine and of every file of the model: the first 16 digits
    /// of a SHA-256 of its norms, which neither GGUF files nor [`Quantize`] round.
    ///
    /// Models that were trained apart differ in it; one that was tuned without its norms, by LoRA say, shares it with the
    /// one that it comes from.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn weights_fingerprint(&self) -> Result<String> {
        let mut hasher = Sha256::new();
        for weight in self.decoder.norms()? {
            hasher.update(weight.to_le_bytes());
        }
        let digest = hasher.finalize();
        Ok(digest[..8].iter().map(|b| format!("{b:02x}")).collect())
    }

    /// Identity that a dictionary must agree with to serve this model.
    pub fn identity(&self) -> ModelIdentity {
        self.decoder.config().identity(&self.name)
    }

    /// An empty cache for one sequence of this model.
    ///
    /// # Errors
    /// Those of [`CacheSpec::build`].
    pub fn cache(&self, spec: &CacheSpec) -> Result<Box<dyn KvCache>> {
        spec.build(&self.cache_context())
    }

    /// The bytes that a cache of this model is expected to hold at the end of a sequence of these lengths.
    ///
    /// # Errors
    /// Those of [`CacheSpec::expected_bytes`].
    pub fn cache_bytes(&self, spec: &CacheSpec, lengths: Lengths) -> Result<f64> {
        spec.expected_bytes(&self.cache_context(), lengths)
    }

    fn cache_context(&self) -> CacheContext<'_> {
        CacheContext {
            model: &self.name,
            config: self.decoder.config(),
            dictionaries: self.dictionaries.as_ref(),
            calibration: self.calibration.as_ref(),
            device: self.decoder.device(),
        }
    }
}

/// Tokens that end a text: those of the generation config, else of the config, and the tokenizer's own, at which fine-tunes
/// of a chat end a turn whatever the configs say.
fn end_tokens(
    config: &Config,
    of_generation: Option<Vec<u32>>,
    tokenizer: &Tokenizer,
    notes: &mut Vec<String>,
) -> Vec<u32> {
    if let Some(given) = &of_generation
        && let Some(token) = config
            .end_tokens
            .iter()
            .find(|token| !given.contains(token))
    {
        notes.push(format!(
            "config.json ends a text at token {token}, and generation_config.json does not: generation_config.json holds, \
             as in transformers"
        ));
    }
    let mut tokens = of_generation.unwrap_or_else(|| config.end_tokens.clone());
    let mut special = tokenizer.special.iter();
    if let Some((_, text)) = special.find(|(name, _)| *name == "eos_token") {
        match tokenizer.id(text) {
            Some(token) if tokens.contains(&token) => {}
            Some(token) => {
                if !tokens.is_empty() {
                    notes.push(format!(
                        "tokenizer_config.json ends a text at \"{}\", and the configs do not: it is an end here too",
                        shown(text)
                    ));
                }
                tokens.push(token);
            }
            None => notes.push(format!(
                "tokenizer_config.json ends a text at \"{}\", which is no token of the tokenizer",
                shown(text)
            )),
        }
    }
    if tokens.is_empty() {
        notes.push("it names no token that ends a text: it goes on until a limit".to_owned());
    }
    tokens
}

/// Where a config says that the output head is the embedding and the weights hold another head, that head is used, as in
/// transformers 5; returns what has to be said of it.
pub(crate) fn untie(config: &mut Config, weights: &Weights) -> Result<Option<String>> {
    /// Rows that are compared at once.
    const ROWS: usize = 256;
    let names = ["model.embed_tokens.weight", "lm_head.weight"];
    if !config.tied_head || !names.iter().all(|name| weights.has(name)) {
        return Ok(None);
    }
    let shape = [config.vocabulary, config.hidden];
    for first in (0..config.vocabulary).step_by(ROWS) {
        let rows = first..config.vocabulary.min(first + ROWS);
        let read = |name: &str| {
            let stored = weights.number_type(name, &shape)?;
            weights.f32_rows(name, stored, config.hidden, rows.clone())
        };
        if read(names[0])? != read(names[1])? {
            config.tied_head = false;
            let note = "config.json says that the output head is the embedding (tie_word_embeddings), and lm_head.weight \
                        differs from it: lm_head.weight is used, as in transformers 5";
            return Ok(Some(note.to_owned()));
        }
    }
    Ok(None)
}
