//! The files of a GGUF file's model that frontends read: those that tokenise texts and write chats for it.

use std::path::Path;

use lexico::tensor_file::write_atomically;
use serde_json::{Map, Value, json};

use super::{GgufModel, GgufTokenizer};
use crate::config::Config;
use crate::error::{Result, io};
use crate::tokenizer::failed;

impl GgufModel {
    /// Writes `config.json`, `tokenizer.json` and `tokenizer_config.json`, by what the file says, to a folder, which is made
    /// where it is not there: for programs that tokenise for a model that others run. Weights stay in the file.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io); [`Error::File`](crate::Error::File) for a tokenizer that is not supported.
    pub fn write_frontend_files(&self, folder: &Path) -> Result<()> {
        let GgufTokenizer { inner, config, .. } = self.tokenizer()?;
        let text = inner.to_string(false).map_err(failed)?;
        let mut tokenizer: Value = serde_json::from_str(&text).map_err(|e| failed(e.into()))?;
        let mut settings: Map<String, Value> =
            serde_json::from_str(&config).map_err(|e| failed(e.into()))?;
        settings.retain(|_, value| !value.is_null());
        settings.insert(
            "tokenizer_class".to_owned(),
            "PreTrainedTokenizerFast".into(),
        );
        let begins = settings.get("add_bos_token") == Some(&Value::Bool(true));
        if let (true, Some(Value::String(token))) = (begins, settings.get("bos_token"))
            && let Some(id) = inner.token_to_id(token)
        {
            begin_with(&mut tokenizer["post_processor"], token, id);
        }
        std::fs::create_dir_all(folder).map_err(io(folder))?;
        for (name, document) in [
            ("tokenizer.json", tokenizer),
            ("tokenizer_config.json", settings.into()),
            ("config.json", config_of(&self.config)),
        ] {
            write_atomically(&folder.join(name), document.to_string().as_bytes())?;
        }
        Ok(())
    }
}

/// Puts a token before every text.
fn begin_with(processor: &mut Value, token: &str, id: u32) {
    let sequence = |name: &str| json!({"Sequence": {"id": name, "type_id": 0}});
    if processor.is_null() {
        *processor = json!({
            "type": "TemplateProcessing", "single": [sequence("A")], "pair": [sequence("A"), sequence("B")],
            "special_tokens": {},
        });
    }
    if let Some(single) = processor["single"].as_array_mut() {
        single.insert(0, json!({"SpecialToken": {"id": token, "type_id": 0}}));
    }
    processor["special_tokens"][token] = json!({"id": token, "ids": [id], "tokens": [token]});
}

fn config_of(config: &Config) -> Value {
    let kind = config.architecture.strip_suffix("ForCausalLM");
    let mut document = json!({
        "architectures": [config.architecture],
        "model_type": kind.unwrap_or(&config.architecture).to_lowercase(),
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rotary.theta,
        "tie_word_embeddings": config.tied_head,
        "eos_token_id": config.end_tokens,
    });
    if let Some(window) = config.window {
        document["sliding_window"] = window.into();
    }
    document
}
