//! RULER's synthetic tasks (Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?",
//! COLM 2024), prompted as by its published generator and with its scores.
//!
//! Two things differ. Paul Graham's essays are not here: what hides its needles in them takes a text that is given, cut
//! into sentences by a plain rule where the generator has NLTK's, or the generator's own noise. And where the model
//! chats, the examples of the task are part of its message. QA is left out, since it needs data sets.
//!
//! The texts of the prompts are NVIDIA's (github.com/NVIDIA/RULER, Apache-2.0).

mod needles;
mod variables;
mod words;

use std::collections::VecDeque;

use serde_json::json;

use super::python_random::{NumpyRandom, PythonRandom};
use crate::error::{Error, Result};
use crate::questions::{Item, Questions, Verdict};
use crate::task::{Measure, named};
use needles::Needles;

/// Max prompts that are made.
const MAX_PROMPTS: usize = 10_000;
/// Max tokens of a prompt: more than any model's context.
const MAX_LENGTH: usize = 1 << 24;
/// Draws of the smallest size, where the generator would go on for ever.
const MAX_DRAWS: usize = 100;
/// Lengths from which on the generator takes larger steps, and makes words more frequent.
const LONG: usize = 4096;
const NOISE: &str =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";

/// A task of RULER.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RulerTask {
    /// Name.
    pub name: &'static str,
    kind: Kind,
    /// Tokens of an answer.
    max_tokens: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Needles(Needles),
    Variables,
    CommonWords,
    FrequentWords,
}

/// All tasks that need no data, in the order in which they are published.
pub const TASKS: [RulerTask; 11] = {
    const fn needles(name: &'static str, needles: Needles) -> RulerTask {
        RulerTask {
            name,
            kind: Kind::Needles(needles),
            max_tokens: 128,
        }
    }
    const fn other(name: &'static str, kind: Kind, max_tokens: usize) -> RulerTask {
        RulerTask {
            name,
            kind,
            max_tokens,
        }
    }
    [
        needles("niah_single_1", Needles::SINGLE_1),
        needles("niah_single_2", Needles::SINGLE_2),
        needles("niah_single_3", Needles::SINGLE_3),
        needles("niah_multikey_1", Needles::MULTIKEY_1),
        needles("niah_multikey_2", Needles::MULTIKEY_2),
        needles("niah_multikey_3", Needles::MULTIKEY_3),
        needles("niah_multivalue", Needles::MULTIVALUE),
        needles("niah_multiquery", Needles::MULTIQUERY),
        other("vt", Kind::Variables, 30),
        other("cwe", Kind::CommonWords, 120),
        other("fwe", Kind::FrequentWords, 50),
    ]
};

impl RulerTask {
    /// The task of a name.
    ///
    /// # Errors
    /// [`Error::Options`] for others.
    pub fn named(name: &str) -> Result<Self> {
        let found = TASKS.into_iter().find(|task| task.name == name);
        found.ok_or_else(|| {
            let names = TASKS.map(|task| task.name).join(", ");
            Error::Options(format!("RULER has no task {name} here; it has {names}"))
        })
    }

    /// True where needles are hidden in Paul Graham's essays.
    pub fn wants_essays(&self) -> bool {
        matches!(self.kind, Kind::Needles(needles) if needles.wants_essays())
    }
}

/// Settings of [`ruler`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RulerOptions {
    /// Tasks.
    pub tasks: Vec<RulerTask>,
    /// Tokens of the prompts, together with those of their answers.
    pub lengths: Vec<usize>,
    /// Prompts of each task and length.
    pub samples: usize,
    /// A text in place of Paul Graham's essays; without one, the generator's noise.
    pub haystack: Option<String>,
    /// Tokens of a chat template, which are taken off the lengths.
    pub template_tokens: usize,
    /// The generator's seed, which is 42 in published results.
    pub seed: u32,
}

/// A prompt, with the beginning of the answer at its end.
struct Drawn {
    prompt: String,
    /// Bytes of the beginning of the answer.
    begun: usize,
    answers: Vec<String>,
}

/// What all prompts of a task and length are drawn with.
struct Generator<'a> {
    random: PythonRandom,
    numpy: NumpyRandom,
    seed: u32,
    /// Tokens of the prompts as they were asked for.
    length: usize,
    /// The same without a chat template's.
    max: usize,
    /// Tokens of an answer.
    max_tokens: usize,
    count: &'a dyn Fn(&str) -> Result<usize>,
}

/// Makes the prompts of some tasks; `count` counts tokens, without one that begins a text.
///
/// # Errors
/// [`Error::Options`] for lengths that are too short or too long for a task, and those of `count`.
pub fn ruler(options: &RulerOptions, count: &dyn Fn(&str) -> Result<usize>) -> Result<Questions> {
    let RulerOptions { tasks, lengths, .. } = options;
    let cells = tasks.len().saturating_mul(lengths.len());
    if cells.saturating_mul(options.samples) > MAX_PROMPTS {
        return Err(Error::Options(format!(
            "{} prompts of {cells} tasks and lengths are too many: at most {MAX_PROMPTS} in all",
            options.samples
        )));
    }
    let (mut items, mut answers) = (Vec::new(), Vec::new());
    for (number, task) in tasks.iter().enumerate() {
        if tasks[..number].contains(task) {
            return Err(Error::Options(format!("{} is named twice", task.name)));
        }
        for (number, &length) in lengths.iter().enumerate() {
            if lengths[..number].contains(&length) {
                return Err(Error::Options(format!(
                    "a length of {length} is named twice"
                )));
            }
            for (sample, drawn) in draw(*task, length, options, count)?.into_iter().enumerate() {
                items.push(Item {
                    id: format!("{}/{length}/{sample}", task.name),
                    group: Some(format!("{}, {length} tokens", task.name)),
                    begun: drawn.prompt[drawn.prompt.len() - drawn.begun..].to_owned(),
                    prompt: drawn.prompt,
                    is_message: true,
                    max_tokens: task.max_tokens,
                    stop: Vec::new(),
                    expected: drawn.answers.join(", "),
                });
                answers.push(drawn.answers);
            }
        }
    }
    let names: Vec<&str> = tasks.iter().map(|task| task.name).collect();
    let haystack = options.haystack.as_ref();
    let haystack = haystack.map(|text| format!("{:08x}", crc32fast::hash(text.as_bytes())));
    Ok(Questions {
        name: "ruler",
        measure: Measure::GroupMean,
        settings: named([
            ("tasks", json!(names)),
            ("lengths", json!(lengths)),
            ("samples", json!(options.samples)),
            ("haystack_crc32", json!(haystack)),
            ("draw", json!(options.seed)),
        ]),
        items,
        judge: Box::new(move |number, _, text| Verdict {
            score: string_match_all(text, &answers[number]),
            answer: None,
        }),
    })
}

/// Share of the answers that a text has in it, in whatever case.
fn string_match_all(text: &str, answers: &[String]) -> f64 {
    let text = text.to_lowercase();
    let there = answers
        .iter()
        .filter(|answer| text.contains(&answer.to_lowercase()));
    there.count() as f64 / answers.len().max(1) as f64
}

fn draw(
    task: RulerTask,
    length: usize,
    options: &RulerOptions,
    count: &dyn Fn(&str) -> Result<usize>,
) -> Result<Vec<Drawn>> {
    let refuse = |reason: &str| {
        Err(Error::Options(format!(
            "prompts of {length} tokens are impossible for {}: {reason}",
            task.name
        )))
    };
    if length > MAX_LENGTH {
        return refuse(&format!("at most {MAX_LENGTH}"));
    }
    let taken = options.template_tokens + task.max_tokens;
    if length <= taken {
        return refuse(&format!("the answer and the chat template take {taken}"));
    }
    let generator = Generator {
        random: PythonRandom::new(u64::from(options.seed)),
        numpy: NumpyRandom::new(options.seed),
        seed: options.seed,
        length,
        max: length - options.template_tokens,
        max_tokens: task.max_tokens,
        count,
    };
    let made = match task.kind {
        Kind::Needles(needles) => needles.draw(generator, options),
        Kind::Variables => variables::draw(generator, options.samples),
        Kind::CommonWords => words::common(generator, options.samples),
        Kind::FrequentWords => words::frequent(generator, options.samples),
    };
    match made {
        // None is what the generator would go on drawing for ever.
        Ok(None) => refuse("too short"),
        Ok(Some(made)) => Ok(made),
        Err(error) => Err(error),
    }
}

impl Generator<'_> {
    /// `random.Random(seed).shuffle`
    fn shuffle<T>(&self, list: &mut [T]) {
        PythonRandom::new(u64::from(self.seed)).shuffle(list);
    }

    /// True where a prompt and `more` tokens are not too long.
    fn fits(&self, prompt: &str, more: usize, max: usize) -> Result<bool> {
        Ok((self.count)(prompt)? + more <= max)
    }

    /// The size from `least` to `most` that the generator's bisection finds, `least` where none fits.
    fn bisect(
        &mut self,
        (least, most): (usize, usize),
        (more, max): (usize, usize),
        mut make: impl FnMut(&mut Self, usize) -> Result<Option<Drawn>>,
    ) -> Result<usize> {
        let (mut low, mut high) = (least, most.max(2 * least));
        let mut found = None;
        while low <= high {
            let middle = usize::midpoint(low, high);
            let fits = match make(self, middle)? {
                Some(drawn) => self.fits(&drawn.prompt, more, max)?,
                None => false,
            };
            if fits {
                found = Some(middle);
                low = middle + 1;
            } else {
                high = middle - 1;
            }
        }
        Ok(found.unwrap_or(least))
    }

    /// Draws until a prompt fits, each time with `step` pieces less while there are more than `step`; `None` where none
    /// ever does.
    fn until_it_fits(
        &mut self,
        size: usize,
        step: usize,
        (more, max): (usize, usize),
        mut make: impl FnMut(&mut Self, usize) -> Result<Option<Drawn>>,
    ) -> Result<Option<Drawn>> {
        let (mut size, mut left) = (size, MAX_DRAWS);
        while left > 0 {
            if let Some(drawn) = make(self, size)?
                && self.fits(&drawn.prompt, more, max)?
            {
                return Ok(Some(drawn));
            }
            if size > step {
                size -= step;
            } else {
                left -= 1;
            }
        }
        Ok(None)
    }
}

/// `sentences` with each of `others` before the sentence of its place, as those are before anything is put in. Places
/// rise.
fn insert<T>(sentences: Vec<T>, others: Vec<(usize, T)>) -> Vec<T> {
    let mut whole = Vec::with_capacity(sentences.len() + others.len());
    let mut others = VecDeque::from(others);
    for (number, sentence) in sentences.into_iter().enumerate() {
        while others.front().is_some_and(|(place, _)| *place <= number) {
            whole.extend(others.pop_front().map(|(_, other)| other));
        }
        whole.push(sentence);
    }
    whole.extend(others.into_iter().map(|(_, other)| other));
    whole
}
