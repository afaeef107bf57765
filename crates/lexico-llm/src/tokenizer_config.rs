//! What the files beside `tokenizer.json` say: special tokens and chat templates, read as transformers reads them.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};

use crate::chat::{SpecialTokens, TemplateSources};
use crate::error::{Result, io, refused};

/// Special tokens that every tokenizer has a name for.
const NAMED: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// The texts of the files beside `tokenizer.json`, those that there are.
#[derive(Debug, Clone, Default)]
pub struct TokenizerFiles {
    /// `tokenizer_config.json`
    pub config: Option<String>,
    /// `special_tokens_map.json`, as older fine-tunes have it.
    pub special_tokens_map: Option<String>,
    /// Templates of files of their own, by name: `chat_template.jinja` is `default`, those of
    /// `additional_chat_templates` have the names of their files.
    pub templates: TemplateSources,
    /// `chat_template.json`, as processors have it.
    pub chat_template: Option<String>,
}

impl TokenizerFiles {
    /// Takes `tokenizer_config.json` alone.
    pub fn of_config(config: &str) -> Self {
        Self {
            config: Some(config.to_owned()),
            ..Self::default()
        }
    }

    /// Reads those of a model's folder.
    ///
    /// # Errors
    /// Those of reading.
    pub fn read(folder: &Path) -> Result<Self> {
        let optional = |file: &str| {
            let path = folder.join(file);
            let read = || std::fs::read_to_string(&path).map_err(io(&path));
            path.is_file().then(read).transpose()
        };
        let mut templates = BTreeMap::new();
        let more = folder.join("additional_chat_templates");
        if more.is_dir() {
            for entry in std::fs::read_dir(&more).map_err(io(&more))? {
                let path = entry.map_err(io(&more))?.path();
                let name = path.file_stem().and_then(|name| name.to_str());
                if let Some(name) = name.filter(|_| path.extension().is_some_and(|e| e == "jinja"))
                {
                    let source = std::fs::read_to_string(&path).map_err(io(&path))?;
                    templates.insert(name.to_owned(), source);
                }
            }
        }
        let default = optional("chat_template.jinja")?.map(|source| ("default".to_owned(), source));
        Ok(Self {
            config: optional("tokenizer_config.json")?,
            special_tokens_map: optional("special_tokens_map.json")?,
            templates: TemplateSources(default.into_iter().chain(templates).collect()),
            chat_template: optional("chat_template.json")?,
        })
    }
}

/// What the files say.
#[derive(Debug, Clone, Default)]
pub(crate) struct TokenizerConfig {
    /// The class of tokenizer in transformers.
    pub(crate) class: Option<String>,
    /// Whether the beginning token is put first, where that is said.
    pub(crate) add_bos_token: Option<bool>,
    /// Special tokens by the names that chat templates use.
    pub(crate) tokens: SpecialTokens,
    /// The sources of chat templates.
    pub(crate) templates: TemplateSources,
}

impl TokenizerConfig {
    /// Reads the texts of the files beside `path`.
    ///
    /// # Errors
    /// [`Error::File`](crate::Error::File).
    pub(crate) fn parse(files: TokenizerFiles, path: &Path) -> Result<Self> {
        let error = |file: &str, reason: String| refused(path, format!("its {file}: {reason}"));
        let object = |file: &str, text: Option<&str>| match text.map(serde_json::from_str) {
            None => Ok(Map::new()),
            Some(Ok(Value::Object(object))) => Ok(object),
            Some(Ok(_)) => Err(error(file, "no JSON object".into())),
            Some(Err(e)) => Err(error(file, e.to_string())),
        };
        let name = "tokenizer_config.json";
        let mut config = object(name, files.config.as_deref())?;
        let listed = config.contains_key("added_tokens_decoder");
        let older = object(
            "special_tokens_map.json",
            files.special_tokens_map.as_deref(),
        )?;
        // transformers reads the older file where the newer one lists no tokens, and it wins.
        if !listed {
            config.extend(older);
        }
        let class = optional(&config, "tokenizer_class", Value::as_str, "a text");
        let class = class.map_err(|why| error(name, why))?.map(str::to_owned);
        let add = optional(&config, "add_bos_token", Value::as_bool, "true or false");
        let mut templates = files.templates;
        if templates.0.is_empty() {
            templates = templates_of(&config).map_err(|why| error(name, why))?;
        }
        if templates.0.is_empty() {
            let name = "chat_template.json";
            let processor = object(name, files.chat_template.as_deref())?;
            templates = templates_of(&processor).map_err(|why| error(name, why))?;
        }
        Ok(Self {
            add_bos_token: add.map_err(|why| error(name, why))?,
            tokens: tokens_of(&config, class.as_deref()).map_err(|why| error(name, why))?,
            class,
            templates,
        })
    }

    /// The special token of a name.
    pub(crate) fn token(&self, name: &str) -> Option<&str> {
        let found = self.tokens.iter().find(|(known, _)| known == name);
        found.map(|(_, token)| token.as_str())
    }
}

fn optional<'c, T>(
    config: &'c Map<String, Value>,
    key: &str,
    read: fn(&'c Value) -> Option<T>,
    wanted: &str,
) -> std::result::Result<Option<T>, String> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match read(value) {
            Some(value) => Ok(Some(value)),
            None => Err(format!("{key} is not {wanted}")),
        },
    }
}

/// A token as a text, or as the object that older files write.
fn token(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// Special tokens by name: those that every tokenizer has, and those of this one alone.
fn tokens_of(
    config: &Map<String, Value>,
    class: Option<&str>,
) -> std::result::Result<SpecialTokens, String> {
    let mut tokens = SpecialTokens::new();
    for name in NAMED {
        let wanted = "a text, nor an object with its content";
        let found = optional(config, name, token, wanted);
        let found = found.map_err(|why| why.replace(" is not ", " is neither "))?;
        let found =
            found.or_else(|| class_token(class?, name).filter(|_| !config.contains_key(name)));
        tokens.extend(found.map(|token| (name.to_owned(), token.to_owned())));
    }
    let own = config
        .iter()
        .filter(|(name, _)| name.ends_with("_token") && !NAMED.contains(&name.as_str()));
    let extra = config
        .get("extra_special_tokens")
        .and_then(Value::as_object);
    for (name, value) in own.chain(extra.into_iter().flatten()) {
        if let Some(token) = token(value) {
            tokens.retain(|(known, _)| known != name);
            tokens.push((name.clone(), token.to_owned()));
        }
    }
    Ok(tokens)
}

/// The token that a class of transformers has where its config names none.
fn class_token(class: &str, name: &str) -> Option<&'static str> {
    let names: &[&str] = match class.trim_end_matches("Fast") {
        "Qwen2Tokenizer" => &["eos_token", "unk_token", "pad_token"],
        "GPT2Tokenizer" => &["bos_token", "eos_token", "unk_token"],
        _ => &[],
    };
    names.contains(&name).then_some("<|endoftext|>")
}

/// The templates of a config: one, or several by name.
fn templates_of(config: &Map<String, Value>) -> std::result::Result<TemplateSources, String> {
    let unfit = || "chat_template is neither a text nor a list of templates by name".to_owned();
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(TemplateSources::default()),
        Some(Value::String(source)) => Ok(TemplateSources(vec![(
            "default".to_owned(),
            source.clone(),
        )])),
        Some(Value::Array(list)) => {
            let named = list.iter().map(|entry| {
                let text = |key| Some(entry.get(key)?.as_str()?.to_owned());
                text("name").zip(text("template")).ok_or_else(unfit)
            });
            named
                .collect::<std::result::Result<_, _>>()
                .map(TemplateSources)
        }
        // As processors write it.
        Some(Value::Object(named)) => {
            let named = named.iter().map(|(name, source)| {
                let source = source.as_str().ok_or_else(unfit)?;
                Ok((name.clone(), source.to_owned()))
            });
            named
                .collect::<std::result::Result<_, String>>()
                .map(TemplateSources)
        }
        Some(_) => Err(unfit()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// The tokens and templates of a folder with these files.
    fn read(files: &[(&str, String)]) -> Result<TokenizerConfig> {
        let folder = tempfile::tempdir().expect("a folder");
        for (name, text) in files {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            std::fs::write(path, text).expect("written");
        }
        let files = TokenizerFiles::read(folder.path())?;
        TokenizerConfig::parse(files, &folder.path().join("tokenizer.json"))
    }

    /// As transformers 5's `special_tokens_map` has them.
    #[test]
    fn special_tokens_are_those_of_transformers() {
        let config = |config: Value| ("tokenizer_config.json", config.to_string());
        let map = |map: Value| ("special_tokens_map.json", map.to_string());
        let bos = json!({"bos_token": "<s>"});
        let named = |pairs: &[(&str, &str)]| -> SpecialTokens {
            let pair = |(name, token): &(&str, &str)| ((*name).to_owned(), (*token).to_owned());
            pairs.iter().map(pair).collect()
        };
        let cases = [
            (vec![config(bos.clone())], named(&[("bos_token", "<s>")])),
            // Older fine-tunes have the file alone, or more in it; there it wins.
            (vec![map(bos.clone())], named(&[("bos_token", "<s>")])),
            (
                vec![
                    config(json!({"bos_token": "<a>"})),
                    map(json!({"bos_token": {"content": "<b>"}})),
                ],
                named(&[("bos_token", "<b>")]),
            ),
            (
                vec![config(bos.clone()), map(json!({"bos_token": null}))],
                named(&[]),
            ),
            // Newer ones list their tokens, and it is not read.
            (
                vec![
                    config(json!({"added_tokens_decoder": {}})),
                    map(bos.clone()),
                ],
                named(&[]),
            ),
            (
                vec![config(json!({
                    "pad_token": {"__type": "AddedToken", "content": "<p>"},
                    "eos_token": "</s>",
                    "image_token": "<i>",
                    "add_bos_token": true,
                    "additional_special_tokens": ["<x>"],
                    "extra_special_tokens": {"video": "<v>"}
                }))],
                named(&[
                    ("eos_token", "</s>"),
                    ("pad_token", "<p>"),
                    ("image_token", "<i>"),
                    ("video", "<v>"),
                ]),
            ),
            (
                vec![config(
                    json!({"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<e>"}),
                )],
                named(&[
                    ("eos_token", "<e>"),
                    ("unk_token", "<|endoftext|>"),
                    ("pad_token", "<|endoftext|>"),
                ]),
            ),
        ];
        for (files, wanted) in cases {
            assert_eq!(read(&files).expect("sound").tokens, wanted, "{files:?}");
        }
        for (file, word) in [
            (config(json!({"bos_token": 1})), "bos_token"),
            (config(json!({"add_bos_token": "yes"})), "add_bos_token"),
            (config(json!([])), "object"),
            (map(json!("x")), "special_tokens_map.json"),
        ] {
            let error = read(&[file]).expect_err(word).to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn templates_come_from_where_transformers_has_them() {
        let template = |name, source: Value| (name, json!({"chat_template": source}).to_string());
        let config = |source| template("tokenizer_config.json", source);
        let processor = template("chat_template.json", json!("processor"));
        let file = ("chat_template.jinja", "file".to_owned());
        let tools = (
            "additional_chat_templates/tool_use.jinja",
            "tools".to_owned(),
        );
        let list =
            json!([{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]);
        let cases = [
            (vec![], vec![]),
            (vec![processor.clone()], vec![("default", "processor")]),
            (
                vec![processor, config(json!("config"))],
                vec![("default", "config")],
            ),
            (
                vec![config(json!("config")), file.clone()],
                vec![("default", "file")],
            ),
            (
                vec![config(list)],
                vec![("default", "a"), ("tool_use", "b")],
            ),
            (
                vec![tools.clone(), file],
                vec![("default", "file"), ("tool_use", "tools")],
            ),
            (
                vec![tools, config(json!("config"))],
                vec![("tool_use", "tools")],
            ),
        ];
        for (files, wanted) in cases {
            let found = read(&files).expect("sound").templates.0;
            let found: Vec<_> = found
                .iter()
                .map(|(n, s)| (n.as_str(), s.as_str()))
                .collect();
            assert_eq!(found, wanted, "{files:?}");
        }
        for source in [json!(1), json!(["x"]), json!([{"name": "default"}])] {
            let error = read(&[config(source)]).expect_err("unfit").to_string();
            assert!(error.contains("chat_template"), "{error}");
        }
    }
}
