//! Tasks: some items, each run with a cache and given a score.

use std::ops::ControlFlow;

use lexico_llm::Model;
use lexico_llm::cache::CacheSpec;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::Result;
use crate::statistics::{self, Estimate};

/// Items that are run with each cache and scored.
pub trait Task {
    /// Name.
    fn name(&self) -> &'static str;

    /// Measure of its scores.
    fn measure(&self) -> Measure;

    /// All that decides what its items are, for the results and so that an interrupted run goes on with the same.
    fn settings(&self) -> Map<String, Value>;

    /// Number of items.
    fn count(&self) -> usize;

    /// Refuses items that the model cannot be given.
    ///
    /// # Errors
    /// Those of the task.
    fn check(&self, _model: &Model, _items: &[usize]) -> Result<()> {
        Ok(())
    }

    /// The prompt of an item, where it has one, for people to read.
    fn prompt(&self, _item: usize) -> Option<&str> {
        None
    }

    /// Runs some items together with their caches held as `cache`, in the order given. `on_step` is called at every
    /// step and may break off: `None` then.
    ///
    /// # Errors
    /// Those of the model.
    fn run(
        &self,
        model: &Model,
        cache: &CacheSpec,
        items: &[usize],
        on_step: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Result<Option<Vec<Outcome>>>;
}

/// Settings by their names.
pub(crate) fn named<const N: usize>(settings: [(&str, Value); N]) -> Map<String, Value> {
    settings
        .map(|(name, value)| (name.to_owned(), value))
        .into_iter()
        .collect()
}

/// Measure of a task's scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// Items are right (1) or wrong (0).
    Accuracy,
    /// Items score from 0 to 1; the score is the mean of the groups' means.
    GroupMean,
    /// An item's score is its mean negative log likelihood a token; of all, the exponential of the mean.
    Perplexity,
    /// An item's score is its mean Kullback–Leibler divergence a token, in nats; of all, the mean.
    Divergence,
}

impl Measure {
    /// Name of the score.
    pub fn name(self) -> &'static str {
        match self {
            Measure::Accuracy => "accuracy",
            Measure::GroupMean => "score",
            Measure::Perplexity => "perplexity",
            Measure::Divergence => "KL divergence",
        }
    }

    /// Returns true where scores are shares, printed in per cent.
    pub fn is_share(self) -> bool {
        matches!(self, Measure::Accuracy | Measure::GroupMean)
    }

    /// Prints a score as people read it.
    pub fn print(self, score: f64) -> String {
        match self {
            Measure::Accuracy | Measure::GroupMean => format!("{:.1} %", 100.0 * score),
            Measure::Perplexity => format!("{score:.3}"),
            Measure::Divergence => format!("{score:.5}"),
        }
    }

    /// The score of some items, with its 95 % confidence interval: Wilson's for right and wrong items, else from the
    /// standard error.
    pub fn of<'a>(self, outcomes: impl IntoIterator<Item = &'a Outcome>) -> Estimate {
        let outcomes: Vec<&Outcome> = outcomes.into_iter().collect();
        let scores = |outcomes: &[&Outcome]| -> Vec<f64> {
            outcomes.iter().map(|outcome| outcome.score).collect()
        };
        match self {
            Measure::Accuracy => {
                let right = outcomes.iter().filter(|outcome| outcome.score >= 1.0);
                statistics::share(right.count(), outcomes.len())
            }
            Measure::Divergence => statistics::mean(&scores(&outcomes)).clamped(0.0, f64::INFINITY),
            Measure::Perplexity => statistics::mean(&scores(&outcomes)).map(f64::exp),
            Measure::GroupMean => {
                let groups = groups(outcomes).into_iter();
                let groups: Vec<_> = groups.map(|(_, of_group)| scores(&of_group)).collect();
                statistics::mean_of_groups(&groups).clamped(0.0, 1.0)
            }
        }
    }
}

/// The outcomes of each group, in the order in which groups come up; those of none are not among them.
pub fn groups<'a>(
    outcomes: impl IntoIterator<Item = &'a Outcome>,
) -> Vec<(&'a str, Vec<&'a Outcome>)> {
    let outcomes: Vec<&Outcome> = outcomes.into_iter().collect();
    let names = unique(outcomes.iter().filter_map(|o| o.group.as_deref()));
    let group = |name| {
        let own = outcomes.iter().copied();
        let own = own.filter(|outcome| outcome.group.as_deref() == Some(name));
        (name, own.collect())
    };
    names.into_iter().map(group).collect()
}

/// The different ones among some, in the order in which they come up.
pub(crate) fn unique<T: PartialEq>(all: impl Iterator<Item = T>) -> Vec<T> {
    let mut unique = Vec::new();
    for one in all {
        if !unique.contains(&one) {
            unique.push(one);
        }
    }
    unique
}

/// Outcome of an item.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// The item.
    pub id: String,
    /// The part of the task that it belongs to: a data set, a subject, a depth.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Score, as the task's [`Measure`] says.
    pub score: f64,
    /// Bytes of the cache at the end over FP16's.
    pub share: f64,
    /// Positions of the prompt.
    pub prompt_positions: usize,
    /// Positions in the cache at the end.
    pub positions: usize,
    /// Details that the score comes from.
    #[serde(flatten)]
    pub detail: Detail,
}

/// Meaning of an answer's score.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Judgement {
    /// Score of 1.
    Right,
    /// Score in between.
    Partial,
    /// Score of 0.
    Wrong,
}

impl Judgement {
    /// Judges a score from 0 to 1.
    pub fn of(score: f64) -> Self {
        if score >= 1.0 {
            Self::Right
        } else if score > 0.0 {
            Self::Partial
        } else {
            Self::Wrong
        }
    }
}

/// Details that the score of an item comes from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Detail {
    /// A text that answers a question.
    Answer {
        /// Text that the model wrote.
        text: String,
        /// The answer in it, where there is one.
        answer: Option<String>,
        /// Answer that was asked for.
        expected: String,
        /// Meaning of the score.
        verdict: Judgement,
    },
    /// Distributions of the next token, beside those with the full cache.
    Distributions {
        /// Kullback–Leibler divergence from the full cache's, token by token, in nats.
        divergences: Vec<f32>,
        /// Share of tokens of which both find the same one most likely.
        agreement: f64,
    },
    /// Likelihoods of a text's tokens.
    Likelihood {
        /// Tokens that were predicted.
        tokens: usize,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(group: Option<&str>, score: f64) -> Outcome {
        Outcome {
            id: "1".to_owned(),
            group: group.map(str::to_owned),
            score,
            share: 0.1,
            prompt_positions: 3,
            positions: 5,
            detail: Detail::Likelihood { tokens: 2 },
        }
    }

    #[test]
    fn groups_count_alike_whatever_their_size() {
        let outcomes = [
            outcome(Some("a"), 1.0),
            outcome(Some("b"), 0.0),
            outcome(Some("b"), 0.5),
            outcome(Some("b"), 0.1),
        ];
        assert!((Measure::GroupMean.of(&outcomes).value - 0.6).abs() < 1e-12);
        assert!((Measure::Divergence.of(&outcomes).value - 0.4).abs() < 1e-12);
    }

    #[test]
    fn perplexity_is_the_exponential_of_the_mean() {
        let outcomes = [outcome(None, 1.0), outcome(None, 3.0)];
        let perplexity = Measure::Perplexity.of(&outcomes);
        assert!((perplexity.value - 2f64.exp()).abs() < 1e-9);
        let (low, high) = perplexity.interval.unwrap();
        assert!(low < perplexity.value && perplexity.value < high);
    }

    #[test]
    fn outcomes_come_back_from_json_as_they_were() {
        let details = [
            Detail::Answer {
                text: "4.\n#### 4".to_owned(),
                answer: None,
                expected: "4".to_owned(),
                verdict: Judgement::of(0.5),
            },
            Detail::Distributions {
                divergences: vec![0.1, 1e-7, 3.4e-5],
                agreement: 2.0 / 3.0,
            },
            Detail::Likelihood { tokens: 7 },
        ];
        for detail in details {
            let outcome = Outcome {
                detail,
                share: 1.0 / 3.0,
                ..outcome(Some("b"), 0.1 + 0.2)
            };
            let text = serde_json::to_string(&outcome).unwrap();
            assert_eq!(serde_json::from_str::<Outcome>(&text).unwrap(), outcome);
        }
    }
}
