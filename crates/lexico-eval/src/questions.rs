//! Tasks that ask the model to go on from prompts, and judge what it writes.

use std::ops::ControlFlow;

use lexico_llm::Model;
use lexico_llm::cache::{CacheSpec, KvCache};
use lexico_llm::chat::{ChatTemplate, Message};
use lexico_llm::generate::{GenerateOptions, Prompt, generate_batch};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::task::{Detail, Judgement, Measure, Outcome, Task, reading_groups, readings};

/// A text for the model to go on from, and the answer that it asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Name in the results.
    pub id: String,
    /// The part of the task that it belongs to.
    pub group: Option<String>,
    /// The text.
    pub prompt: String,
    /// The end of the text, where it begins the answer: where the model chats it stands behind the template, not in the
    /// message.
    pub begun: String,
    /// True where the text may be put as a message to a model that chats.
    pub is_message: bool,
    /// Max tokens that the model may add.
    pub max_tokens: usize,
    /// Texts that end what it adds.
    pub stop: Vec<String>,
    /// Answer that is asked for.
    pub expected: String,
}

/// Verdict on the text that the model added to a prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    /// Score from 0 to 1.
    pub score: f64,
    /// The answer in it, where there is one.
    pub answer: Option<String>,
}

impl Verdict {
    /// Scores an answer that must be the expected one to the letter.
    pub fn exact(answer: Option<String>, expected: &str) -> Self {
        Self {
            score: f64::from(answer.as_deref() == Some(expected)),
            answer,
        }
    }
}

/// Judges the text that the model added to the item of a number.
pub type Judge = Box<dyn Fn(usize, &Item, &str) -> Verdict>;

/// Prompts, and how what the model writes is judged.
pub struct Questions {
    /// The task's name.
    pub name: &'static str,
    /// Measure of its scores.
    pub measure: Measure,
    /// Settings that decide what its prompts are.
    pub settings: Map<String, Value>,
    /// The prompts.
    pub items: Vec<Item>,
    /// Judges answers.
    pub judge: Judge,
}

impl Questions {
    /// Judges what the model wrote after the prompt of the item of that number.
    pub fn judge(&self, number: usize, text: &str) -> Verdict {
        (self.judge)(number, &self.items[number], text)
    }
}

/// Way in which prompts are put to the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AskOptions {
    /// True for a user's message in the model's chat template, rather than a text to go on from.
    pub chat: bool,
    /// True to drop the oldest tokens, but the one that begins a text, of a prompt that does not fit the model's context
    /// together with its answer, rather than refuse it.
    pub truncate: bool,
}

/// Tokens that the model's chat template adds to a message; none where it has no template.
///
/// # Errors
/// Those of the template.
pub fn template_tokens(model: &Model) -> Result<usize> {
    let Some(template) = model.chat_template()? else {
        return Ok(0);
    };
    let text = template.render(&[Message::new("user", "")], true)?;
    Ok(model.tokenizer.encode_more(&text)?.len())
}

/// Questions as a task.
pub struct Asked {
    questions: Questions,
    options: AskOptions,
    template: Option<ChatTemplate>,
}

impl Asked {
    /// Prepares to ask the model.
    ///
    /// # Errors
    /// [`Error::Options`] where there are no questions, or the model has no chat template and is to chat.
    pub fn new(model: &Model, questions: Questions, options: AskOptions) -> Result<Self> {
        let refuse = |reason: String| Err(Error::Options(reason));
        if questions.items.is_empty() {
            return refuse(format!("{}: there are no items", questions.name));
        }
        let template = model.chat_template()?.filter(|_| options.chat);
        if options.chat && template.is_none() {
            return refuse(format!(
                "the model {} has no chat template; leave out --chat",
                model.name
            ));
        }
        Ok(Self {
            questions,
            options,
            template,
        })
    }

    /// The tokens of an item's prompt.
    fn tokens(&self, model: &Model, number: usize) -> Result<Vec<u32>> {
        let item = &self.questions.items[number];
        let mut tokens = match &self.template {
            Some(template) if item.is_message => {
                let asked = item.prompt.strip_suffix(&item.begun);
                let message = Message::new("user", asked.unwrap_or(&item.prompt));
                let text = template.render(&[message], true)? + &item.begun;
                model.tokenizer.encode_more(&text)?
            }
            _ => model.tokenizer.encode_first(&item.prompt)?,
        };
        let (id, length, max) = (&item.id, tokens.len(), item.max_tokens);
        let context = model.decoder.config().context;
        let room = context.saturating_sub(max);
        if length == 0 {
            return Err(Error::Options(format!("item {id}: its prompt is empty")));
        }
        if length > room {
            if !self.options.truncate || room < 2 {
                return Err(Error::Options(format!(
                    "item {id}: its prompt of {length} tokens and {max} tokens of an answer do not fit the model's \
                     context of {context}; ask for shorter prompts or answers, or drop the oldest tokens of prompts \
                     that are too long with --truncate"
                )));
            }
            tokens.drain(1..=length - room);
        }
        Ok(tokens)
    }
}

impl Task for Asked {
    fn name(&self) -> &'static str {
        self.questions.name
    }

    fn measure(&self) -> Measure {
        self.questions.measure
    }

    fn settings(&self) -> Map<String, Value> {
        let mut settings = self.questions.settings.clone();
        settings.insert("chat".to_owned(), self.options.chat.into());
        settings.insert("truncate".to_owned(), self.options.truncate.into());
        let mut checksum = crc32fast::Hasher::new();
        for item in &self.questions.items {
            for text in [&item.id, &item.prompt, &item.expected] {
                checksum.update(text.as_bytes());
                checksum.update(&[0xff]);
            }
        }
        let checksum = format!("{:08x}", checksum.finalize());
        settings.insert("items_crc32".to_owned(), checksum.into());
        settings
    }

    fn count(&self) -> usize {
        self.questions.items.len()
    }

    fn check(&self, model: &Model, items: &[usize]) -> Result<()> {
        items
            .iter()
            .try_for_each(|&item| self.tokens(model, item).map(drop))
    }

    fn prompt(&self, item: usize) -> Option<&str> {
        Some(&self.questions.items[item].prompt)
    }

    fn steps(&self, caches: &[&CacheSpec], items: &[usize]) -> usize {
        let longest = items
            .iter()
            .map(|&item| self.questions.items[item].max_tokens);
        items.len() * readings(caches) + longest.max().unwrap_or(0)
    }

    fn run(
        &self,
        model: &Model,
        caches: &[&CacheSpec],
        items: &[usize],
        on_step: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Result<Option<Vec<Vec<Outcome>>>> {
        let held = items.iter().flat_map(|_| caches);
        let held = held.map(|spec| model.cache(spec));
        let mut held: Vec<Box<dyn KvCache>> = held.collect::<lexico_llm::Result<_>>()?;
        let tokens = items.iter().map(|&item| self.tokens(model, item));
        let tokens: Vec<Vec<u32>> = tokens.collect::<Result<_>>()?;
        let limits: Vec<GenerateOptions> = items
            .iter()
            .map(|&item| {
                let item = &self.questions.items[item];
                GenerateOptions {
                    max_tokens: item.max_tokens,
                    stop: item.stop.clone(),
                    ..GenerateOptions::default()
                }
            })
            .collect();
        let each = caches.len();
        // The caches of each prompt that read it together, and then the others.
        let mut places = Vec::with_capacity(held.len());
        let mut prompts: Vec<Prompt<'_>> = Vec::new();
        let of_items = held.chunks_mut(each).zip(tokens.iter().zip(&limits));
        for (item, (own, (tokens, options))) in of_items.enumerate() {
            for group in reading_groups(caches, own) {
                let (own, caches): (Vec<usize>, Vec<_>) = group.into_iter().unzip();
                places.extend(own.into_iter().map(|place| item * each + place));
                prompts.push(Prompt {
                    tokens,
                    caches,
                    options,
                });
            }
        }
        let Some(generated) = generate_batch(model, &mut prompts, on_step)? else {
            return Ok(None);
        };
        let mut texts: Vec<(usize, String)> = places
            .into_iter()
            .zip(generated.into_iter().map(|generated| generated.text))
            .collect();
        texts.sort_by_key(|(place, _)| *place);
        let config = model.decoder.config();
        let mut outcomes = vec![Vec::with_capacity(items.len()); each];
        for ((place, text), cache) in texts.into_iter().zip(&held) {
            let (number, tokens) = (items[place / each], &tokens[place / each]);
            let item = &self.questions.items[number];
            let verdict = self.questions.judge(number, &text);
            let positions = cache.len();
            outcomes[place % each].push(Outcome {
                id: item.id.clone(),
                group: item.group.clone(),
                score: verdict.score,
                share: cache.footprint().total() as f64 / config.fp16_cache_bytes(positions) as f64,
                prompt_positions: tokens.len(),
                positions,
                detail: Detail::Answer {
                    text,
                    answer: verdict.answer,
                    expected: item.expected.clone(),
                    verdict: Judgement::of(verdict.score),
                },
            });
        }
        Ok(Some(outcomes))
    }
}
