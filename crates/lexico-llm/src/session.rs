//! Sessions: a text or a conversation that grows from call to call, and the cache that holds it.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use crate::cache::{CacheSpec, KvCache};
use crate::chat::{ChatTemplate, Message};
use crate::error::{Error, Result, refused};
use crate::generate::{Finish, GenerateOptions, Generated, check_fits, generate};
use crate::model::Model;
use crate::sample::{Sampler, Sampling};
use crate::saved::{self, Progress, SavedGeneration};

/// A text or a conversation, with the cache, the sampler and all else that it needs to grow.
///
/// Every call takes a prompt, finds how much of it the cache holds already, reads only the rest and generates. No cache
/// can be rewound: where a prompt differs from what the cache holds, all of it is read again, with an empty cache. After
/// an error the session holds the text and the messages of before the call, and the next call goes on from them.
///
/// Text is handed to a callback as it is generated. The callback ends the generation by [`ControlFlow::Break`]; the
/// session keeps what was generated until then.
///
/// ```no_run
/// use std::ops::ControlFlow;
/// use std::sync::Arc;
/// use lexico_llm::{Model, Quantize};
/// use lexico_llm::generate::GenerateOptions;
/// use lexico_llm::sample::Sampling;
/// use lexico_llm::session::Session;
///
/// let mut model = Model::load("Llama-3.2-1B-Instruct".as_ref(), Quantize::None)?;
/// model.load_dictionaries("dictionary.safetensors".as_ref())?;
/// let model = Arc::new(model);
/// let template = model.chat_template()?.expect("an instruction-tuned model has one");
/// let mut session = Session::new(model, "lexico:sparsity=8".parse()?, Sampling::default())?
///     .with_chat(template, Some("Answer in one sentence."));
///
/// let mut show = |text: &str| {
///     print!("{text}");
///     ControlFlow::Continue(())
/// };
/// let options = GenerateOptions::default();
/// session.prompt("What is a KV cache?", &options, &mut show)?;
/// let answer = session.prompt("And what does it cost?", &options, &mut show)?;
/// println!("{} of the tokens were in the cache", answer.cached_tokens);
/// session.save("conversation.cache".as_ref())?;
/// # Ok::<(), lexico_llm::Error>(())
/// ```
pub struct Session {
    model: Arc<Model>,
    spec: CacheSpec,
    cache: Box<dyn KvCache>,
    /// True of a cache that has read nothing, not even a prompt that failed half way.
    fresh: bool,
    /// Positions of the cache that are those of the first tokens; 0 after an error, whatever the cache holds.
    held: usize,
    sampler: Sampler,
    chat: Option<Chat>,
    /// State of the text but for the draws, which the sampler counts.
    progress: Progress,
}

/// Template and first message of a conversation.
struct Chat {
    template: ChatTemplate,
    system: Option<String>,
}

/// Text that a call generated, and how much it had to read for that.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The text and the tokens generated.
    pub generated: Generated,
    /// Number of the prompt's tokens that the cache held already.
    pub cached_tokens: usize,
    /// Number of the prompt's tokens that it did not hold.
    pub new_tokens: usize,
}

/// State of a text of which there is nothing yet.
fn empty(seed: u64) -> Progress {
    Progress {
        seed,
        ..Progress::default()
    }
}

impl Session {
    /// Makes an empty session of plain text.
    ///
    /// # Errors
    /// Those of [`Model::cache`] and [`Sampler::new`].
    pub fn new(model: Arc<Model>, cache: CacheSpec, sampling: Sampling) -> Result<Self> {
        Ok(Self {
            cache: model.cache(&cache)?,
            spec: cache,
            fresh: true,
            held: 0,
            progress: empty(sampling.seed),
            sampler: Sampler::new(sampling)?,
            chat: None,
            model,
        })
    }

    /// Makes the session a conversation: prompts are the user's messages, which a message of the system may precede.
    #[must_use]
    pub fn with_chat(mut self, template: ChatTemplate, system: Option<&str>) -> Self {
        let system = system.map(str::to_owned);
        self.chat = Some(Chat { template, system });
        self
    }

    /// Takes the cache, the text and the messages of a saved generation in place of its own. The draws go on where
    /// the seeds agree, and start where they do not.
    ///
    /// # Errors
    /// Those of [`SavedGeneration::resume`]; the session is as it was then.
    pub fn resume(&mut self, saved: SavedGeneration) -> Result<()> {
        let spec = saved.spec().clone();
        let (cache, progress) = saved.resume(&self.model)?;
        let seed = self.progress.seed;
        self.sampler.rewind(0);
        self.sampler.see(&progress.tokens);
        let same = seed == progress.seed;
        self.sampler
            .set_draws(if same { progress.draws } else { 0 });
        self.held = cache.len();
        (self.spec, self.cache, self.fresh) = (spec, cache, false);
        self.progress = Progress { seed, ..progress };
        Ok(())
    }

    /// Chooses tokens from now on by other settings, whose draws start.
    ///
    /// # Errors
    /// Those of [`Sampler::new`].
    pub fn set_sampling(&mut self, sampling: Sampling) -> Result<()> {
        let seed = sampling.seed;
        self.sampler = Sampler::new(sampling)?;
        self.sampler.see(&self.progress.tokens);
        self.progress.seed = seed;
        Ok(())
    }

    /// Forgets the text, the messages and the cache.
    ///
    /// # Errors
    /// Those of [`Model::cache`].
    pub fn clear(&mut self) -> Result<()> {
        (self.cache, self.fresh) = (self.model.cache(&self.spec)?, true);
        self.held = 0;
        self.progress = empty(self.progress.seed);
        Ok(())
    }

    /// Generates what follows `text`, which follows the text so far or, in a conversation, is the user's next message.
    ///
    /// # Errors
    /// [`Error::ContextFull`] and [`Error::MemoryFull`]; [`Error::PlainText`] in a conversation that was resumed from plain text; those of the
    /// tokenizer, the template and [`generate`].
    pub fn prompt(
        &mut self,
        text: &str,
        options: &GenerateOptions,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Answer> {
        let (tokenizer, progress) = (&self.model.tokenizer, &self.progress);
        let Some(chat) = &self.chat else {
            let tokens = match progress.tokens.as_slice() {
                [] => tokenizer.encode_first(text)?,
                so_far => [so_far, &tokenizer.encode_more(text)?].concat(),
            };
            return self.complete(tokens, options, on_text);
        };
        let mut messages = progress.messages.clone();
        if messages.is_empty() {
            if !progress.tokens.is_empty() {
                return Err(Error::PlainText);
            }
            let system = chat.system.as_deref();
            messages.extend(system.map(|text| Message::new("system", text)));
        }
        messages.push(Message::new("user", text));
        self.converse(messages, options, on_text)
    }

    /// Generates the answer to a whole conversation, which takes the place of the one so far.
    ///
    /// # Errors
    /// Those of [`Session::prompt`]; [`Error::Chat`] in a session without a template.
    pub fn converse(
        &mut self,
        messages: Vec<Message>,
        options: &GenerateOptions,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Answer> {
        let without = || Error::Chat("the session was made without one".to_owned());
        let chat = self.chat.as_ref().ok_or_else(without)?;
        // The template writes the special tokens itself.
        let text = chat.template.render(&messages, true)?;
        let tokens = self.model.tokenizer.encode_more(&text)?;
        let answer = self.read(tokens, options, on_text)?;
        self.progress.messages = messages;
        let message = Message::new("assistant", &answer.generated.text);
        self.progress.messages.push(message);
        Ok(answer)
    }

    /// Generates what follows a whole text, which takes the place of the one so far.
    ///
    /// # Errors
    /// Those of [`Session::prompt`]; [`Error::EmptyPrompt`].
    pub fn complete(
        &mut self,
        tokens: Vec<u32>,
        options: &GenerateOptions,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Answer> {
        let answer = self.read(tokens, options, on_text)?;
        self.progress.messages.clear();
        Ok(answer)
    }

    /// Generates what follows the text so far, exactly as if it had not stopped where the options of the call before
    /// said that it [goes on](GenerateOptions::goes_on). Nothing follows a text that had ended, unless the options
    /// ignore the end.
    ///
    /// # Errors
    /// Those of [`Session::prompt`]; [`Error::EmptyPrompt`] where there is no text yet.
    pub fn go_on(
        &mut self,
        options: &GenerateOptions,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Answer> {
        let (tokens, finish) = (&self.progress.tokens, self.progress.finish);
        let prompt_tokens = self.progress.prompt_tokens;
        if matches!(finish, Finish::End | Finish::Stop) && !options.ignore_end {
            let generated = Generated {
                finish,
                ..Generated::default()
            };
            return Ok(Answer {
                generated,
                cached_tokens: self.held,
                new_tokens: 0,
            });
        }
        let options = GenerateOptions {
            written: tokens[prompt_tokens..].to_vec(),
            ..options.clone()
        };
        let answer = self.read(tokens.clone(), &options, on_text)?;
        self.progress.prompt_tokens = prompt_tokens;
        if let Some(last) = self.progress.messages.last_mut() {
            last.push_content(&answer.generated.text);
        }
        Ok(answer)
    }

    /// Reads what the cache does not hold of `tokens`, and generates what follows.
    fn read(
        &mut self,
        tokens: Vec<u32>,
        options: &GenerateOptions,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Answer> {
        check_fits(&self.model, self.cache.as_ref(), options, tokens.len())?;
        let mut held = self.held;
        // A template may write the past anew, an answer without its thoughts for one.
        if held >= tokens.len() || !tokens.starts_with(&self.progress.tokens[..held]) {
            held = 0;
        }
        // Until it is known that nothing has failed half way.
        self.held = 0;
        if held == 0 && !self.fresh {
            self.cache = self.model.cache(&self.spec)?;
        }
        self.fresh = false;
        self.sampler.rewind(held);
        let generated = generate(
            &self.model,
            self.cache.as_mut(),
            &tokens[held..],
            &mut self.sampler,
            options,
            on_text,
        )?;
        self.held = self.cache.len();
        self.progress.prompt_tokens = tokens.len();
        self.progress.finish = generated.finish;
        let answer = Answer {
            cached_tokens: held,
            new_tokens: tokens.len() - held,
            generated,
        };
        self.progress.tokens = [tokens.as_slice(), &answer.generated.tokens].concat();
        Ok(answer)
    }

    /// Returns what of `text` is new where it begins with all of the text so far, else all of it.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn new_part<'a>(&self, text: &'a str) -> Result<&'a str> {
        let so_far = self.model.tokenizer.decode(&self.progress.tokens)?;
        Ok(text.strip_prefix(&so_far).unwrap_or(text))
    }

    /// Fails early where [`Session::save`] would fail late.
    ///
    /// # Errors
    /// Those of [`saved::check`].
    pub fn check_save(&self, path: &Path) -> Result<()> {
        saved::check(path, &self.spec, self.cache.as_ref())
    }

    /// Saves the cache, the text and the draws, for [`Session::resume`]; returns the bytes of the file.
    ///
    /// # Errors
    /// [`Error::File`] before the first generation and after one that failed; those of [`saved::save`].
    pub fn save(&self, path: &Path) -> Result<usize> {
        if self.held + 1 != self.progress.tokens.len() {
            let reason =
                "the session has no text, or an error has cost it its cache; a prompt mends both";
            return Err(refused(path, reason));
        }
        let progress = Progress {
            draws: self.sampler.draws(),
            ..self.progress.clone()
        };
        let cache = self.cache.as_ref();
        saved::save(path, &self.model, &self.spec, cache, &progress)
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// The cache's method and options.
    pub fn spec(&self) -> &CacheSpec {
        &self.spec
    }

    /// The cache.
    pub fn cache(&self) -> &dyn KvCache {
        self.cache.as_ref()
    }

    /// All tokens so far. The cache holds all but the last.
    pub fn tokens(&self) -> &[u32] {
        &self.progress.tokens
    }

    /// The tokens that the last generation followed.
    pub fn prompt_tokens(&self) -> &[u32] {
        &self.progress.tokens[..self.progress.prompt_tokens]
    }

    /// The conversation so far; empty of plain text.
    pub fn messages(&self) -> &[Message] {
        &self.progress.messages
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Tensor;

    use super::*;
    use crate::cache::Footprint;

    /// A cache that fails once the first layer has taken the prompt.
    struct Failing;

    impl KvCache for Failing {
        fn attend(&mut self, layer: usize, q: &Tensor, _: &Tensor, _: &Tensor) -> Result<Tensor> {
            match layer {
                0 => Ok(q.clone()),
                _ => Err(Error::NotFinite),
            }
        }

        fn len(&self) -> usize {
            0
        }

        fn footprint(&self) -> Footprint {
            Footprint::default()
        }
    }

    #[test]
    fn a_cache_that_failed_half_way_is_not_used_again() {
        let model = Arc::new(Model::tiny().unwrap());
        let spec: CacheSpec = "lexico:window=4,batch=4".parse().unwrap();
        let session = || Session::new(model.clone(), spec.clone(), Sampling::default()).unwrap();
        let options = GenerateOptions {
            max_tokens: 5,
            ..GenerateOptions::default()
        };
        let answer = |session: &mut Session| {
            let prompt = "Question: Ana has 12 coins at home. Ben gives Ana 7 more.";
            session.prompt(prompt, &options, &mut |_| ControlFlow::Continue(()))
        };
        let mut failed = session();
        failed.cache = Box::new(Failing);
        assert!(matches!(answer(&mut failed), Err(Error::NotFinite)));
        assert!(failed.cache.is_empty());
        let again = answer(&mut failed).unwrap();
        let other = answer(&mut session()).unwrap();
        assert_eq!(again.generated.tokens, other.generated.tokens);
        assert_eq!(again.new_tokens, other.new_tokens);
        assert_eq!(failed.cache().len(), again.new_tokens + 4);
    }
}
