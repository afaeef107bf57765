//! A model with all it needs to speak: decoder, tokenizer, dictionaries.

use std::path::Path;
use std::sync::Arc;

use lexico::DictionarySet;
use lexico::dictionary::ModelIdentity;
use lexico::tensor_file::TensorFile;

use crate::cache::{CacheContext, CacheSpec, KvCache};
use crate::config::{Config, GenerationConfig};
use crate::decoder::Decoder;
use crate::error::{Error, Result, io};
use crate::tokenizer::Tokenizer;
use crate::weights::Weights;

/// What a model folder must hold besides its weights.
const NEEDED: &str = "config.json, tokenizer.json and model.safetensors";

/// A language model, loaded.
pub struct Model {
    /// Its name, for people.
    pub name: String,
    /// The decoder.
    pub decoder: Decoder,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// Tokens that end a text.
    pub end_tokens: Vec<u32>,
    /// Texts that end a generation unless the caller says otherwise.
    pub stop_texts: Vec<String>,
    /// Its dictionaries, where there are any.
    pub dictionaries: Option<Arc<DictionarySet>>,
}

impl Model {
    /// The small model that is embedded in the program, with its dictionaries.
    ///
    /// # Errors
    /// None in a sound build: the tests load it.
    pub fn tiny() -> Result<Self> {
        macro_rules! embedded {
            ($file:literal) => {
                include_bytes!(concat!("../../../models/tiny/", $file))
            };
        }
        let text = |bytes: &'static [u8]| String::from_utf8_lossy(bytes);
        let mut model = Self::assemble(
            "tiny",
            Path::new("tiny"),
            &text(embedded!("config.json")),
            Some(&text(embedded!("generation_config.json"))),
            embedded!("tokenizer.json"),
            Some(&text(embedded!("tokenizer_config.json"))),
            &Weights::single(TensorFile::from_static(
                "tiny/model.safetensors",
                embedded!("model.safetensors"),
            )?),
        )?;
        model.set_dictionaries(DictionarySet::read(&TensorFile::from_static(
            "tiny/dictionary.safetensors",
            embedded!("dictionary.safetensors"),
        )?)?)?;
        Ok(model)
    }

    /// Loads a folder in Hugging Face layout; weights are converted to f32. A
    /// `dictionary.safetensors` beside them is the model's.
    ///
    /// # Errors
    /// [`Error::MissingFile`], [`Error::Config`], [`Error::Tokenizer`], [`Error::Weight`], and
    /// those of the files themselves.
    pub fn load(folder: &Path) -> Result<Self> {
        if !folder.is_dir() {
            let source = std::io::Error::new(std::io::ErrorKind::NotFound, "no such model folder");
            return Err(io(folder)(source));
        }
        let required = |file: &str| {
            let path = folder.join(file);
            if path.is_file() {
                return std::fs::read(&path).map_err(io(&path));
            }
            Err(Error::MissingFile {
                folder: folder.to_owned(),
                file: file.to_owned(),
                needed: NEEDED,
            })
        };
        let optional = |file: &str| {
            let path = folder.join(file);
            let read = || std::fs::read_to_string(&path).map_err(io(&path));
            path.is_file().then(read).transpose()
        };
        let config_path = folder.join("config.json");
        let config = String::from_utf8(required("config.json")?).map_err(|_| Error::Config {
            path: config_path,
            reason: "it is not UTF-8 text".to_owned(),
        })?;
        let tokenizer = required("tokenizer.json")?;
        let name = folder.canonicalize().map_err(io(folder))?;
        let name = name
            .file_name()
            .map_or("model".into(), |name| name.to_string_lossy());
        let mut model = Self::assemble(
            &name,
            folder,
            &config,
            optional("generation_config.json")?.as_deref(),
            &tokenizer,
            optional("tokenizer_config.json")?.as_deref(),
            &Weights::open(folder)?,
        )?;
        let dictionary = folder.join("dictionary.safetensors");
        if dictionary.is_file() {
            model.set_dictionaries(DictionarySet::load(dictionary)?)?;
        }
        Ok(model)
    }

    fn assemble(
        name: &str,
        folder: &Path,
        config: &str,
        generation_config: Option<&str>,
        tokenizer: &[u8],
        tokenizer_config: Option<&str>,
        weights: &Weights,
    ) -> Result<Self> {
        let config = Config::parse(config, &folder.join("config.json"))?;
        let path = folder.join("generation_config.json");
        let generation = generation_config.map(|text| GenerationConfig::parse(text, &path));
        let generation = generation.transpose()?.unwrap_or_default();
        let path = folder.join("tokenizer.json");
        Ok(Self {
            name: name.to_owned(),
            end_tokens: generation
                .end_tokens
                .unwrap_or_else(|| config.end_tokens.clone()),
            stop_texts: generation.stop_texts,
            tokenizer: Tokenizer::parse(tokenizer, tokenizer_config, &path)?,
            decoder: Decoder::load(config, weights)?,
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

    /// What a dictionary must agree with to serve this model.
    pub fn identity(&self) -> ModelIdentity {
        self.decoder.config().identity(&self.name)
    }

    /// An empty cache for one sequence of this model.
    ///
    /// # Errors
    /// As [`CacheSpec::build`].
    pub fn cache(&self, spec: &CacheSpec) -> Result<Box<dyn KvCache>> {
        spec.build(&CacheContext {
            model: &self.name,
            config: self.decoder.config(),
            dictionaries: self.dictionaries.as_ref(),
        })
    }
}
