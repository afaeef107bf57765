//! Tasks: some items, each run with a cache and given a score.

use std::ops::ControlFlow;

use lexico_llm::Model;
use lexico_llm::cache::{CacheSpec, KvCache};
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

    /// About how many steps [`run`](Task::run) takes.
    fn steps(&self, caches: &[&CacheSpec], items: &[usize]) -> usize;

    /// Runs some items together with each of `caches`, and returns the outcomes with each, in the order given. What the
    /// model computes of a prompt serves all caches that leave it as it is, and all are decoded together. `on_step` is called
    /// at every step and may break off: `None` then.
    ///
    /// # Errors
    /// Those of the model.
    fn run(
        &self,
        model: &Model,
        caches: &[&CacheSpec],
        items: &[usize],
        on_step: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Result<Option<Vec<Vec<Outcome>>>>;
}

/// One sequence's caches, and the place of each among the specs, in groups that read a prompt together: those that leave what
/// the model computes as it is, in their order, and each other alone.
pub(crate) fn reading_groups<'c>(
    specs: &[&CacheSpec],
    caches: &'c mut [Box<dyn KvCache>],
) -> Vec<Vec<(usize, &'c mut dyn KvCache)>> {
    let mut together: Vec<(usize, &mut dyn KvCache)> = Vec::new();
    let mut groups = Vec::new();
    for ((place, cache), spec) in caches.iter_mut().enumerate().zip(specs) {
        match spec.exact_prompts() {
            true => together.push((place, cache.as_mut())),
            false => groups.push(vec![(place, cache.as_mut() as &mut dyn KvCache)]),
        }
    }
    if !together.is_empty() {
        groups.insert(0, together);
    }
    groups
}

/// Readings of a prompt: one for all caches that leave what the model computes as it is, and one for each other.
pub(crate) fn readings(caches: &[&CacheSpec]) -> usize {
    let alone = caches.iter().filter(|spec| !spec.exact_prompts()).count();
    alone + usize::from(alone < caches.len())
}

/// Settings by their names.
pub(crate) fn named<const N: usize>(settings: [(&str, Value); N]) -> Map<String, Value> {
    settings
        .map(|(name, value)| (name.to_owned(), value))
        .into_iter()
        .collect()
}

/// Measure of a task's scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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
            Measure::Divergence | Measure::Perplexity => self.of_means(&scores(&outcomes)),
            Measure::GroupMean => {
                let groups = groups(outcomes).into_iter();
                let groups: Vec<_> = groups.map(|(_, of_group)| scores(&of_group)).collect();
                statistics::mean_of_groups(&groups).clamped(0.0, 1.0)
            }
        }
    }

    /// The same of items' means of what is measured token by token.
    fn of_means(self, means: &[f64]) -> Estimate {
        let mean = statistics::mean(means);
        match self {
            Measure::Perplexity => mean.map(f64::exp),
            _ => mean.clamped(0.0, f64::INFINITY),
        }
    }

    /// What another cache adds to the score of `full` on the same items, with the 95 % confidence interval of that: the
    /// difference of shares, or the part by which the perplexity is higher. None of a divergence, which is a difference
    /// already.
    pub fn beside(self, outcomes: &[Outcome], full: &[Outcome]) -> Option<Estimate> {
        let pairs = || outcomes.iter().zip(full);
        match self {
            Measure::Accuracy => {
                let right = |outcome: &Outcome| outcome.score >= 1.0;
                let only = |own: bool| {
                    let those = pairs().filter(|(a, b)| right(a) == own && right(b) != own);
                    those.count()
                };
                Some(statistics::paired_shares(
                    only(true),
                    only(false),
                    outcomes.len(),
                ))
            }
            Measure::GroupMean => {
                let differences = pairs().map(|(own, full)| Outcome {
                    score: own.score - full.score,
                    ..own.clone()
                });
                let differences: Vec<Outcome> = differences.collect();
                let scores =
                    |of_group: Vec<&Outcome>| of_group.iter().map(|own| own.score).collect();
                let groups = groups(&differences).into_iter();
                let groups: Vec<Vec<f64>> = groups.map(|(_, own)| scores(own)).collect();
                Some(statistics::mean_of_groups(&groups).clamped(-1.0, 1.0))
            }
            Measure::Perplexity => {
                let differences: Vec<f64> =
                    pairs().map(|(own, full)| own.score - full.score).collect();
                Some(statistics::mean(&differences).map(f64::exp_m1))
            }
            Measure::Divergence => None,
        }
    }

    /// Prints what [`beside`](Self::beside) tells.
    pub fn print_beside(self, difference: f64) -> String {
        let unit = if self == Measure::Perplexity {
            "%"
        } else {
            "points"
        };
        format!("{:+.1} {unit}", 100.0 * difference)
    }
}

/// The mean of what is measured token by token at some positions.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Band {
    /// The first position.
    pub from: usize,
    /// The last one.
    pub to: usize,
    /// Tokens that were predicted there, of all items.
    pub tokens: usize,
    /// Score, as the task's [`Measure`] says.
    pub score: f64,
    /// The lower end of the score's 95 % confidence interval; none of a single item.
    pub low: Option<f64>,
    /// The upper end.
    pub high: Option<f64>,
}

/// The scores at positions from each power of two to the next, of what is measured token by token.
pub fn bands(measure: Measure, outcomes: &[Outcome]) -> Vec<Band> {
    let range =
        |own: &Outcome| own.prompt_positions..own.prompt_positions + own.by_position().len();
    let ranges = outcomes.iter().map(range).filter(|range| !range.is_empty());
    let first = ranges.clone().map(|range| range.start).min();
    let end = ranges.map(|range| range.end).max();
    let (Some(first), Some(end)) = (first, end) else {
        return Vec::new();
    };
    let mut bands = Vec::new();
    let mut from = first;
    while from < end {
        let next = (from + 1).next_power_of_two().min(end);
        let of_item = |own: &Outcome| {
            let there = range(own);
            let from = from.max(there.start) - there.start;
            let to = next.min(there.end).saturating_sub(there.start);
            let values = own.by_position().get(from..to)?;
            let sum: f64 = values.iter().copied().map(f64::from).sum();
            (!values.is_empty()).then(|| (values.len(), sum / values.len() as f64))
        };
        let of_items = outcomes.iter().filter_map(of_item);
        let (tokens, means): (Vec<usize>, Vec<f64>) = of_items.unzip();
        if means.is_empty() {
            // No item has tokens there.
            from = next;
            continue;
        }
        let Estimate { value, interval } = measure.of_means(&means);
        bands.push(Band {
            from,
            to: next - 1,
            tokens: tokens.iter().sum(),
            score: value,
            low: interval.map(|(low, _)| low),
            high: interval.map(|(_, high)| high),
        });
        from = next;
    }
    bands
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

impl Outcome {
    /// What was measured token by token, the first at [`prompt_positions`](Self::prompt_positions); empty where a score
    /// is of the whole.
    pub fn by_position(&self) -> &[f32] {
        match &self.detail {
            Detail::Distributions { divergences, .. } => divergences,
            Detail::Likelihood { losses, .. } => losses,
            Detail::Answer { .. } => &[],
        }
    }
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
        /// Negative log likelihood, token by token; an earlier version did not keep them.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        losses: Vec<f32>,
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
            detail: Detail::Likelihood {
                tokens: 2,
                losses: Vec::new(),
            },
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
    fn what_is_right_or_wrong_is_compared_item_by_item() {
        let outcomes = |scores: &[f64]| -> Vec<Outcome> {
            scores.iter().map(|&score| outcome(None, score)).collect()
        };
        let full = outcomes(&[1.0, 1.0, 0.0, 1.0, 1.0]);
        let own = outcomes(&[1.0, 0.0, 1.0, 0.0, 0.0]);
        let beside = Measure::Accuracy.beside(&own, &full).unwrap();
        assert_eq!(beside, statistics::paired_shares(1, 3, 5));
        assert_eq!(Measure::Accuracy.print_beside(beside.value), "-40.0 points");
        let perplexity = Measure::Perplexity.beside(&outcomes(&[2.0, 3.0]), &outcomes(&[1.5, 2.5]));
        let perplexity = perplexity.unwrap();
        let increase = 0.5f64.exp() - 1.0;
        let (low, high) = perplexity.interval.unwrap();
        for found in [perplexity.value, low, high] {
            assert!((found - increase).abs() < 1e-9, "{perplexity:?}");
        }
        assert_eq!(Measure::Divergence.beside(&own, &full), None);
        let groups = |scores: [f64; 4]| {
            let groups = ["a", "a", "a", "b"].into_iter().zip(scores);
            groups
                .map(|(name, score)| outcome(Some(name), score))
                .collect::<Vec<_>>()
        };
        let (own, full) = (groups([0.5, 0.5, 0.5, 0.0]), groups([0.5, 1.0, 0.0, 1.0]));
        let beside = Measure::GroupMean.beside(&own, &full).unwrap();
        assert_eq!((beside.value, beside.interval), (-0.5, None));
    }

    #[test]
    fn bands_of_positions_double() {
        let item = |prompt_positions, divergences: Vec<f32>| Outcome {
            prompt_positions,
            detail: Detail::Distributions {
                divergences,
                agreement: 1.0,
            },
            ..outcome(None, 0.0)
        };
        let items = [
            item(6, vec![1.0, 3.0, 5.0, 7.0]),
            item(6, vec![3.0, 5.0, 9.0, 11.0]),
        ];
        let found = bands(Measure::Divergence, &items);
        let seen: Vec<_> = found
            .iter()
            .map(|b| (b.from, b.to, b.tokens, b.score))
            .collect();
        assert_eq!(seen, [(6, 7, 4, 3.0), (8, 9, 4, 8.0)]);
        // Means of 2 and 4: an error of 1, with one degree of freedom.
        assert!((found[0].high.unwrap() - 3.0 - 12.7062).abs() < 1e-4);
        assert_eq!(found[0].low, Some(0.0));
        let perplexity = Outcome {
            prompt_positions: 1,
            detail: Detail::Likelihood {
                tokens: 3,
                losses: vec![1.0, 2.0, 3.0],
            },
            ..outcome(None, 2.0)
        };
        let found = bands(Measure::Perplexity, &[perplexity]);
        let seen: Vec<_> = found.iter().map(|b| (b.from, b.to, b.low)).collect();
        assert_eq!(seen, [(1, 1, None), (2, 3, None)]);
        assert!((found[1].score - 2.5f64.exp()).abs() < 1e-9);
        // Items of other lengths count where they are.
        let found = bands(
            Measure::Divergence,
            &[item(6, vec![1.0]), item(9, vec![2.0])],
        );
        let seen: Vec<_> = found
            .iter()
            .map(|b| (b.from, b.to, b.tokens, b.score))
            .collect();
        assert_eq!(seen, [(6, 7, 1, 1.0), (8, 9, 1, 2.0)]);
        // None where no item has any.
        let found = bands(
            Measure::Divergence,
            &[item(6, vec![1.0]), item(33, vec![2.0])],
        );
        let seen: Vec<_> = found.iter().map(|b| (b.from, b.to, b.tokens)).collect();
        assert_eq!(seen, [(6, 7, 1), (32, 33, 1)]);
        // What is judged as a whole has none, whatever the lengths of prompts.
        let whole = |prompt_positions| Outcome {
            prompt_positions,
            ..outcome(None, 1.0)
        };
        assert_eq!(bands(Measure::Accuracy, &[whole(5), whole(900)]), []);
        assert_eq!(bands(Measure::Accuracy, &[outcome(None, 1.0)]), []);
        assert_eq!(bands(Measure::Divergence, &[]), []);
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
            Detail::Likelihood {
                tokens: 2,
                losses: vec![0.1, 7.0],
            },
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
        // As an earlier version wrote it.
        let before =
            r#"{"id":"1","score":0.5,"share":0.1,"prompt_positions":3,"positions":5,"tokens":2}"#;
        let outcome = serde_json::from_str::<Outcome>(before).unwrap();
        assert!(outcome.by_position().is_empty());
    }
}
