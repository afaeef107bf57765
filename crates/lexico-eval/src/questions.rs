//! Tasks that ask the model to go on from prompts, and judge what it writes.

use std::ops::ControlFlow;

use lexico_llm::Model;
use lexico_llm::cache::{CacheSpec, KvCache};
use lexico_llm::chat::Message;
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

/// Questions as a task for one model.
pub struct Asked<Q> {
    questions: Q,
    options: AskOptions,
    prompts: Vec<Vec<u32>>,
    limits: Vec<GenerateOptions>,
}

impl<Q: Questions> Asked<Q> {
    /// Prepares the prompts for the model.
    ///
    /// # Errors
    /// [`Error::Options`] where there are none, one does not fit the model's context, or the model has no chat
    /// template and is to chat; those of the tokenizer.
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
        let context = model.decoder.config().context;
        let mut prompts = Vec::with_capacity(questions.items().len());
        let mut limits = Vec::with_capacity(prompts.capacity());
        for (number, item) in questions.items().iter().enumerate() {
            let mut tokens = match &template {
                Some(template) if questions.is_message(number) => {
                    let message = Message::new("user", &item.prompt);
                    let text = template.render(&[message], true)?;
                    model.tokenizer.encode_more(&text)?
                }
                _ => model.tokenizer.encode_first(&item.prompt)?,
            };
            let room = context.saturating_sub(item.max_tokens);
            if tokens.len() > room {
                let (id, length, most) = (&item.id, tokens.len(), item.max_tokens);
                if options.truncate == Truncate::Never || room < 2 {
                    return refuse(format!(
                        "item {id}: its prompt of {length} tokens and {most} tokens of an answer do not fit the \
                         model's context of {context}; ask for shorter prompts or answers, or drop the oldest tokens \
                         of prompts that are too long with --truncate"
                    ));
                }
                tokens.drain(1..=length - room);
            }
            prompts.push(tokens);
            limits.push(GenerateOptions {
                max_tokens: item.max_tokens,
                stop: item.stop.clone(),
                ..GenerateOptions::default()
            });
        }
        Ok(Self {
            questions,
            options,
            prompts,
            limits,
        })
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
        for tokens in &self.prompts {
            tokens
                .iter()
                .for_each(|token| checksum.update(&token.to_le_bytes()));
            checksum.update(&[0xff; 4]);
        }
        let checksum = format!("{:08x}", checksum.finalize());
        settings.insert("prompts_crc32".to_owned(), checksum.into());
        settings
    }

    fn len(&self) -> usize {
        self.prompts.len()
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
        let mut prompts: Vec<Prompt<'_>> = items
            .iter()
            .zip(&mut caches)
            .map(|(&item, cache)| Prompt {
                tokens: &self.prompts[item],
                cache: cache.as_mut(),
                options: &self.limits[item],
            })
            .collect();
        let Some(generated) = generate_batch(model, &mut prompts, on_step)? else {
            return Ok(None);
        };
        let config = model.decoder.config();
        let outcomes = items.iter().zip(generated).zip(&caches);
        let outcomes = outcomes.map(|((&item, generated), cache)| {
            let verdict = self.questions.judge(item, &generated.text);
            let positions = cache.len();
            Outcome {
                id: self.questions.items()[item].id.clone(),
                group: self.questions.group(item).map(str::to_owned),
                score: verdict.score,
                share: cache.footprint().total() as f64 / config.fp16_cache_bytes(positions) as f64,
                prompt_positions: self.prompts[item].len(),
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
