//! From logits to the next token.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::error::{Error, Result};

/// Settings by which the next token is chosen. Steps apply in the order of llama.cpp: repetition penalty,
/// top-k, top-p, min-p, temperature.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Temperature of the draws: 0 always takes the likeliest token, higher is more varied.
    pub temperature: f32,
    /// Number of likeliest tokens to draw from; 0 for all.
    pub top_k: usize,
    /// Probability that the tokens to draw from, the likeliest first, reach together; 1 for all.
    pub top_p: f32,
    /// Probability of a token to draw from, at least, as a share of the likeliest token's; 0 for all.
    pub min_p: f32,
    /// Number that logits of recent tokens are divided by (multiplied where negative); 1 for none.
    pub repetition_penalty: f32,
    /// Number of last tokens that count as recent.
    pub repetition_window: usize,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            repetition_penalty: 1.0,
            repetition_window: 64,
            seed: 0,
        }
    }
}

/// Draws the tokens of one text as a [`Sampling`] says.
pub struct Sampler {
    sampling: Sampling,
    rng: ChaCha8Rng,
    /// The text so far.
    tokens: Vec<u32>,
}

impl Sampler {
    /// Makes a sampler at the start of its random sequence.
    ///
    /// # Errors
    /// [`Error::Sampling`] for a setting outside its range.
    pub fn new(sampling: Sampling) -> Result<Self> {
        let (temperature, penalty) = (sampling.temperature, sampling.repetition_penalty);
        let (top_p, min_p) = (sampling.top_p, sampling.min_p);
        let top_p_sound = top_p > 0.0 && top_p <= 1.0;
        let min_p_sound = (0.0..=1.0).contains(&min_p);
        for (name, value, sound, range) in [
            ("temperature", temperature, temperature >= 0.0, "0 or more"),
            ("top-p", top_p, top_p_sound, "above 0 and at most 1"),
            ("min-p", min_p, min_p_sound, "between 0 and 1"),
            ("repetition penalty", penalty, penalty > 0.0, "above 0"),
        ] {
            if !(sound && value.is_finite()) {
                let reason = format!("{name} {value} is impossible: it must be {range}");
                return Err(Error::Sampling(reason));
            }
        }
        let rng = ChaCha8Rng::seed_from_u64(sampling.seed);
        Ok(Self {
            sampling,
            rng,
            tokens: Vec::new(),
        })
    }

    /// Takes tokens that were not drawn: those of a prompt.
    pub fn see(&mut self, tokens: &[u32]) {
        self.tokens.extend_from_slice(tokens);
    }

    /// Forgets all tokens but the first `count`: those of a text that goes on from there.
    pub fn rewind(&mut self, count: usize) {
        self.tokens.truncate(count);
    }

    /// Returns how many random numbers were drawn.
    pub fn draws(&self) -> u64 {
        // Each is one word; a text is over long before 2⁶⁴.
        self.rng.get_word_pos() as u64
    }

    /// Goes on as if so many random numbers had been drawn.
    pub fn set_draws(&mut self, draws: u64) {
        self.rng.set_word_pos(draws.into());
    }

    /// Chooses the next token.
    ///
    /// # Errors
    /// [`Error::NotFinite`] where a logit is NaN, or none is finite and largest.
    pub fn draw(&mut self, logits: Vec<f32>) -> Result<u32> {
        let token = self.choose(logits)?;
        self.tokens.push(token);
        Ok(token)
    }

    fn choose(&mut self, mut logits: Vec<f32>) -> Result<u32> {
        let penalty = self.sampling.repetition_penalty;
        if penalty != 1.0 {
            let window = self.sampling.repetition_window;
            let start = self.tokens.len().saturating_sub(window);
            let mut recent = self.tokens[start..].to_vec();
            recent.sort_unstable();
            recent.dedup();
            for token in recent {
                if let Some(logit) = logits.get_mut(token as usize) {
                    match *logit > 0.0 {
                        true => *logit /= penalty,
                        false => *logit *= penalty,
                    }
                }
            }
        }
        // Minus infinity forbids a token and does no harm; NaN and infinity would choose at will.
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if !largest.is_finite() || logits.iter().any(|l| l.is_nan()) {
            return Err(Error::NotFinite);
        }
        if self.sampling.temperature == 0.0 {
            return Ok(most_likely(&logits));
        }
        let mut candidates: Vec<(u32, f32)> = (0..).zip(logits).collect();
        // The token breaks ties, so that equal logits give the same text on every machine.
        let likelier = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        let top_k = self.sampling.top_k;
        if (1..candidates.len()).contains(&top_k) {
            candidates.select_nth_unstable_by(top_k - 1, likelier);
            candidates.truncate(top_k);
        }
        candidates.sort_unstable_by(likelier);
        let probabilities = softmax(&candidates, 1.0);
        let mut kept = 0;
        let mut reached = 0.0;
        for &p in &probabilities {
            let enough = reached >= self.sampling.top_p;
            if kept > 0 && (enough || p < self.sampling.min_p * probabilities[0]) {
                break;
            }
            reached += p;
            kept += 1;
        }
        candidates.truncate(kept);
        let probabilities = softmax(&candidates, self.sampling.temperature);
        let mut draw = self.rng.random::<f32>();
        for (&(token, _), p) in candidates.iter().zip(probabilities) {
            draw -= p;
            if draw < 0.0 {
                return Ok(token);
            }
        }
        // Rounding may leave a sliver past the last candidate.
        Ok(candidates.last().map_or(0, |&(token, _)| token))
    }
}

/// Returns the token of the largest logit, the first of equals.
pub fn most_likely(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = i;
        }
    }
    best as u32
}

fn softmax(candidates: &[(u32, f32)], temperature: f32) -> Vec<f32> {
    let largest = candidates.first().map_or(0.0, |c| c.1);
    let weight = |&(_, logit): &(u32, f32)| ((logit - largest) / temperature).exp();
    let weights: Vec<f32> = candidates.iter().map(weight).collect();
    let sum: f32 = weights.iter().sum();
    weights.into_iter().map(|w| w / sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(sampling: Sampling, logits: &[f32], tokens: &[u32]) -> Vec<u32> {
        let mut sampler = Sampler::new(sampling).unwrap();
        let mut draw = || {
            sampler.tokens = tokens.to_vec();
            sampler.draw(logits.to_vec()).unwrap()
        };
        (0..200).map(|_| draw()).collect()
    }

    fn hot() -> Sampling {
        Sampling {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            ..Sampling::default()
        }
    }

    #[test]
    fn greedy_takes_the_largest_and_the_first_of_equals() {
        assert_eq!(most_likely(&[0.0, 3.0, 3.0, -1.0]), 1);
        assert_eq!(drawn(Sampling::default(), &[0.0, 3.0, 3.0], &[])[0], 1);
    }

    #[test]
    fn draws_follow_the_probabilities_and_the_seed() {
        let logits = [1f32, 3.0, 0.0].map(f32::ln);
        let tokens = drawn(hot(), &logits, &[]);
        assert_eq!(tokens, drawn(hot(), &logits, &[]));
        let ones = tokens.iter().filter(|&&t| t == 1).count();
        assert!(
            (120..180).contains(&ones),
            "{ones} of 200 at probability 0.75"
        );
        assert!(!tokens.contains(&2));
    }

    #[test]
    fn cuts_leave_only_what_they_should() {
        let logits = [0.5f32, 0.3, 0.15, 0.05].map(f32::ln);
        let largest = |sampling: Sampling| drawn(sampling, &logits, &[]).into_iter().max().unwrap();
        assert_eq!(largest(Sampling { top_k: 2, ..hot() }), 1);
        assert_eq!(
            largest(Sampling {
                top_p: 0.6,
                ..hot()
            }),
            1
        );
        assert_eq!(
            largest(Sampling {
                min_p: 0.2,
                ..hot()
            }),
            2
        );
        assert_eq!(
            largest(Sampling {
                temperature: 0.01,
                ..hot()
            }),
            0
        );
        assert_eq!(
            largest(Sampling {
                top_p: 1e-9,
                ..hot()
            }),
            0
        );
    }

    #[test]
    fn recent_tokens_are_penalised() {
        let sampling = Sampling {
            repetition_penalty: 2.0,
            repetition_window: 2,
            ..Sampling::default()
        };
        assert_eq!(drawn(sampling.clone(), &[3.0, 2.0, -1.0], &[0])[0], 1);
        assert_eq!(drawn(sampling.clone(), &[3.0, 2.0, -1.0], &[0, 2, 2])[0], 0);
        assert_eq!(drawn(sampling, &[-1.0, -1.5, -9.0], &[0])[0], 1);
    }

    #[test]
    fn impossible_settings_and_logits_are_refused() {
        for sampling in [
            Sampling {
                temperature: -1.0,
                ..hot()
            },
            Sampling {
                temperature: f32::NAN,
                ..hot()
            },
            Sampling {
                top_p: 0.0,
                ..hot()
            },
            Sampling {
                min_p: 1.5,
                ..hot()
            },
            Sampling {
                repetition_penalty: 0.0,
                ..hot()
            },
        ] {
            assert!(matches!(Sampler::new(sampling), Err(Error::Sampling(_))));
        }
        let mut sampler = Sampler::new(hot()).unwrap();
        for logits in [
            [0.0, f32::NAN],
            [0.0, f32::INFINITY],
            [f32::NEG_INFINITY; 2],
        ] {
            assert!(matches!(
                sampler.draw(logits.to_vec()),
                Err(Error::NotFinite)
            ));
        }
        assert_eq!(sampler.draw(vec![f32::NEG_INFINITY, 0.0]).unwrap(), 1);
    }
}
