//! A model with all it needs to speak: decoder, tokenizer, dictionaries.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Device;
use lexico::DictionarySet;
use lexico::attention::NumberType;
use lexico::dictionary::ModelIdentity;
use lexico::tensor_file::TensorFile;

use crate::cache::{CacheContext, CacheSpec, FullCache, KvCache};
use crate::chat::ChatTemplate;
use crate::config::{Config, GenerationConfig, OneOrMany, read_required};
use crate::decoder::{Decoder, Logits};
use crate::error::{Result, io};
use crate::gguf::GgufModel;
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
    /// Dictionaries, where there are any.
    pub dictionaries: Option<Arc<DictionarySet>>,
}

/// The files of a model in Hugging Face layout.
struct ModelFiles {
    /// Name in messages.
    folder: PathBuf,
    config: Config,
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
        Self::tiny_quantised(Quantize::None)
    }

    /// Opens the model of [`Model::tiny`], its matrices held as `quantize` says.
    ///
    /// # Errors
    /// Those of [`Model::tiny`].
    pub fn tiny_quantised(quantize: Quantize) -> Result<Self> {
        macro_rules! embedded {
            ($file:literal) => {
                include_bytes!(concat!("../../../models/tiny/", $file))
            };
        }
        let text = |bytes: &'static [u8]| String::from_utf8_lossy(bytes).into_owned();
        let config = Path::new("tiny/config.json");
        let files = ModelFiles {
            folder: PathBuf::from("tiny"),
            config: Config::parse(&text(embedded!("config.json")), config)?,
            generation_config: Some(text(embedded!("generation_config.json"))),
            tokenizer: embedded!("tokenizer.json").to_vec(),
            tokenizer_files: TokenizerFiles::of_config(&text(embedded!("tokenizer_config.json"))),
            weights: Weights::single(TensorFile::from_static(
                "tiny/model.safetensors",
                embedded!("model.safetensors"),
            )?),
        };
        let mut model = Self::assemble("tiny", files, quantize)?;
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
        if path.is_file() {
            Self::load_gguf(path, quantize)
        } else {
            Self::load_folder(path, quantize)
        }
    }

    fn load_gguf(path: &Path, quantize: Quantize) -> Result<Self> {
        let gguf = GgufModel::open(path)?;
        let texts = gguf.tokenizer()?;
        let files = TokenizerFiles::of_config(&texts.config);
        let tokenizer = Tokenizer::parse(texts.tokenizer.as_bytes(), files, gguf.path())?;
        let config = gguf.config().clone();
        Ok(Self {
            name: gguf.name(),
            end_tokens: config.end_tokens.clone(),
            stop_texts: Vec::new(),
            tokenizer,
            decoder: Decoder::load(config, &Weights::Gguf(gguf), quantize)?,
            dictionaries: None,
        })
    }

    fn load_folder(folder: &Path, quantize: Quantize) -> Result<Self> {
        let optional = |file: &str| {
            let path = folder.join(file);
            let read = || std::fs::read_to_string(&path).map_err(io(&path));
            path.is_file().then(read).transpose()
        };
        let files = ModelFiles {
            folder: folder.to_owned(),
            config: Config::load(folder)?,
            generation_config: optional("generation_config.json")?,
            tokenizer: read_required(folder, "tokenizer.json")?,
            tokenizer_files: TokenizerFiles::read(folder)?,
            weights: Weights::open(folder)?,
        };
        let name = folder.canonicalize().map_err(io(folder))?;
        let name = name.file_name().map(|name| name.to_string_lossy());
        Self::assemble(&name.unwrap_or("model".into()), files, quantize)
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

    fn assemble(name: &str, files: ModelFiles, quantize: Quantize) -> Result<Self> {
        let path = files.folder.join("generation_config.json");
        let text = files.generation_config;
        let generation = text.map(|text| GenerationConfig::parse(&text, &path));
        let generation = generation.transpose()?.unwrap_or_default();
        let end_tokens = generation.eos_token_id.map(OneOrMany::list);
        let stop_texts = generation.stop_strings.map(OneOrMany::list);
        let path = files.folder.join("tokenizer.json");
        let tokenizer = Tokenizer::parse(&files.tokenizer, files.tokenizer_files, &path)?;
        Ok(Self {
            name: name.to_owned(),
            end_tokens: end_tokens.unwrap_or_else(|| files.config.end_tokens.clone()),
            stop_texts: stop_texts.unwrap_or_default(),
            tokenizer,
            decoder: Decoder::load(files.config, &files.weights, quantize)?,
            dictionaries: None,
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

    /// The same model, computing on another device.
    ///
    /// # Errors
    /// Where its memory does not suffice.
    pub fn on(self, device: &Device) -> Result<Self> {
        Ok(Self {
            decoder: self.decoder.on(device)?,
            ..self
        })
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
        spec.build(&CacheContext {
            model: &self.name,
            config: self.decoder.config(),
            dictionaries: self.dictionaries.as_ref(),
            device: self.decoder.device(),
        })
    }
}
