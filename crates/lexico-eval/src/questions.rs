//! Tasks that ask the model to go on from prompts, and judge what it writes.

use std::ops::ControlFlow;

use lexico_llm::Model;
use lexico_llm::cache::{CacheSpec, KvCache};
use lexico_llm::chat::{ChatTemplate, Message};
use lexico_llm::generate::{GenerateOptions, Prompt, generate_batch};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::task::{Detail, Item, Judgement, Measure, Outcome, Task, Verdict};

/// Prompts, and how what the model writes is judged.
pub trait Questions {
    /// The task's name.
    fn name(&self) -> &'static str;

    /// What its scores are.
    fn measure(&self) -> Measure {
        Measure::Accuracy
    }

    /// All that decides what its prompts are.
    fn settings(&self) -> Map<String, Value>;

    /// The prompts.
    fn items(&self) -> &[Item];

    /// The part of the task that an item belongs to.
    fn group(&self, _item: usize) -> Option<&str> {
        None
    }

    /// Whether an item's prompt may be put as a message to a model that chats.
    fn is_message(&self, _item: usize) -> bool {
        true
    }

    /// Judges what the model wrote after an item's prompt.
    fn judge(&self, item: usize, text: &str) -> Verdict;
}

/// How prompts are put to the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AskOptions {
    /// As a user's message in the model's chat template, rather than as a text to go on from.
    pub chat: bool,
    /// What becomes of a prompt that is too long.
    pub truncate: Truncate,
}

/// What becomes of a prompt that does not fit the model's context together with its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Truncate {
    /// It is refused.
    #[default]
    Never,
    /// It loses its oldest tokens but the one that begins a text.
    Left,
}

/// Questions as a task.
pub struct Asked<Q> {
    questions: Q,
    options: AskOptions,
    template: Option<ChatTemplate>,
}

impl<Q: Questions> Asked<Q> {
    /// Prepares to ask the model.
    ///
    /// # Errors
    /// [`Error::Options`] where there are no questions, or the model has no chat template and is to chat.
    pub fn new(model: &Model, questions: Q, options: AskOptions) -> Result<Self> {
        let refuse = |reason: String| Err(Error::Options(reason));
        if questions.items().is_empty() {
            return refuse(format!("{}: there are no items", questions.name()));
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
        let item = &self.questions.items()[number];
        let mut tokens = match &self.template {
            Some(template) if self.questions.is_message(number) => {
                let message = Message::new("user", &item.prompt);
                let text = template.render(&[message], true)?;
                model.tokenizer.encode_more(&text)?
            }
            _ => model.tokenizer.encode_first(&item.prompt)?,
        };
        let (id, length, most) = (&item.id, tokens.len(), item.max_tokens);
        let context = model.decoder.config().context;
        let room = context.saturating_sub(most);
        if length == 0 {
            return Err(Error::Options(format!("item {id}: its prompt is empty")));
        }
        if length > room {
            if self.options.truncate == Truncate::Never || room < 2 {
                return Err(Error::Options(format!(
                    "item {id}: its prompt of {length} tokens and {most} tokens of an answer do not fit the model's \
                     context of {context}; ask for shorter prompts or answers, or drop the oldest tokens of prompts \
                     that are too long with --truncate"
                )));
            }
            tokens.drain(1..=length - room);
        }
        Ok(tokens)
    }
}

impl<Q: Questions> Task for Asked<Q> {
    fn name(&self) -> &'static str {
        self.questions.name()
    }

    fn measure(&self) -> Measure {
        self.questions.measure()
    }

    fn settings(&self) -> Map<String, Value> {
        let mut settings = self.questions.settings();
        settings.insert("chat".to_owned(), self.options.chat.into());
        let truncate = self.options.truncate == Truncate::Left;
        settings.insert("truncate".to_owned(), truncate.into());
        let mut checksum = crc32fast::Hasher::new();
        for (number, item) in self.questions.items().iter().enumerate() {
            for text in [
                &item.id,
                &item.prompt,
                &self.questions.judge(number, "").expected,
            ] {
                checksum.update(text.as_bytes());
                checksum.update(&[0xff]);
            }
        }
        let checksum = format!("{:08x}", checksum.finalize());
        settings.insert("items_crc32".to_owned(), checksum.into());
        settings
    }

    fn len(&self) -> usize {
        self.questions.items().len()
    }

    fn check(&self, model: &Model, items: &[usize]) -> Result<()> {
        items
            .iter()
            .try_for_each(|&item| self.tokens(model, item).map(drop))
    }

    fn prompt(&self, item: usize) -> Option<&str> {
        Some(&self.questions.items()[item].prompt)
    }

    fn run(
        &self,
        model: &Model,
        cache: &CacheSpec,
        items: &[usize],
        on_step: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Result<Option<Vec<Outcome>>> {
        let caches = items.iter().map(|_| model.cache(cache));
        let mut caches: Vec<Box<dyn KvCache>> = caches.collect::<lexico_llm::Result<_>>()?;
        let tokens = items.iter().map(|&item| self.tokens(model, item));
        let tokens: Vec<Vec<u32>> = tokens.collect::<Result<_>>()?;
        let limits: Vec<GenerateOptions> = items
            .iter()
            .map(|&item| {
                let item = &self.questions.items()[item];
                GenerateOptions {
                    max_tokens: item.max_tokens,
                    stop: item.stop.clone(),
                    ..GenerateOptions::default()
                }
            })
            .collect();
        let mut prompts: Vec<Prompt<'_>> = tokens
            .iter()
            .zip(&limits)
            .zip(&mut caches)
            .map(|((tokens, options), cache)| Prompt {
                tokens,
                cache: cache.as_mut(),
                options,
            })
            .collect();
        let Some(generated) = generate_batch(model, &mut prompts, on_step)? else {
            return Ok(None);
        };
        let config = model.decoder.config();
        let outcomes = items.iter().zip(generated).zip(caches.iter().zip(&tokens));
        let outcomes = outcomes.map(|((&item, generated), (cache, tokens))| {
            let verdict = self.questions.judge(item, &generated.text);
            let positions = cache.len();
            Outcome {
                id: self.questions.items()[item].id.clone(),
                group: self.questions.group(item).map(str::to_owned),
                score: verdict.score,
                share: cache.footprint().total() as f64 / config.fp16_cache_bytes(positions) as f64,
                prompt_positions: tokens.len(),
                positions,
                detail: Detail::Answer {
                    text: generated.text,
                    answer: verdict.answer,
                    expected: verdict.expected,
                    verdict: Judgement::of(verdict.score),
                },
            }
        });
        Ok(Some(outcomes.collect()))
    }
}
