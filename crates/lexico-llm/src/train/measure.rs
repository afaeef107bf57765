//! The errors of attention on codes, on windows that no dictionary learned from.

use ::lexico::DictionarySet;
use ::lexico::attention::NumberType;
use ::lexico::cache::{Coder, Coding};
use ::lexico::dictionary::{CodeFamily, JointLayers, LayerDictionaries};
use ::lexico::threads::Rayon;
use ::lexico::{CoefficientFormat, Fit};
use candle_core::Tensor;

use crate::cache::{Footprint, FullCache, KvCache, Step};
use crate::decoder::Logits;
use crate::error::Result;
use crate::model::Model;

/// Windows that are looked at, at the most.
const WINDOWS: usize = 2;
/// Queries of a head and window that are looked at.
const QUERIES: usize = 64;

/// Errors that codes at the training sparsity, f32 coefficients where they have any, make in one layer's attention.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct AttentionErrors {
    /// Root mean square of what coded keys change a score by, `q·(k − k̂)/√m`, over queries and the positions
    /// that they see.
    pub score: f64,
    /// Mean over queries of `‖o − ô‖ / ‖o‖`: what coded values change attention's output by, its weights as
    /// they are without codes.
    pub output: f64,
}

/// Runs the first of `windows` through the model once more, coding every key and value.
pub(super) fn attention_errors(
    model: &Model,
    dictionaries: &DictionarySet,
    windows: &[Vec<u32>],
) -> Result<Vec<AttentionErrors>> {
    let layers = &dictionaries.layers;
    let family = match dictionaries.max_sparsity(CodeFamily::Sparse) {
        0 => CodeFamily::Additive,
        _ => CodeFamily::Sparse,
    };
    let sparsity = dictionaries.usual_sparsity(family);
    let coding = match family {
        CodeFamily::Additive => Coding::usual(family),
        CodeFamily::Sparse => Coding::Sparse {
            coefficients: CoefficientFormat::F32,
            tolerance: 0.0,
        },
    };
    let config = model.decoder.config();
    let mut sums = vec![Sums::default(); config.layers];
    for window in windows.iter().take(WINDOWS) {
        let mut cache = Measured {
            cache: FullCache::new(config, NumberType::F32),
            joint: dictionaries.joint(),
            waiting: Vec::new(),
            layers,
            coding,
            sparsity,
            sliding: config.window.unwrap_or(usize::MAX),
            sums: &mut sums,
        };
        model
            .decoder
            .forward_one(window, &mut cache, Logits::Last)?;
    }
    Ok(sums.iter().map(Sums::errors).collect())
}

#[derive(Clone, Default)]
struct Sums {
    squares: f64,
    scores: usize,
    outputs: f64,
    queries: usize,
}

impl Sums {
    fn errors(&self) -> AttentionErrors {
        AttentionErrors {
            score: (self.squares / self.scores.max(1) as f64).sqrt(),
            output: self.outputs / self.queries.max(1) as f64,
        }
    }

    /// Adds one head's `query` at the last of the positions, which it sees all of.
    fn add(&mut self, query: &[f32], keys: [&[f32]; 2], values: [&[f32]; 2]) {
        let m = query.len();
        let scores = keys.map(|keys| {
            let scores = keys.chunks_exact(m).map(|k| dot(query, k));
            scores.map(|s| s / (m as f64).sqrt()).collect::<Vec<f64>>()
        });
        let pairs = scores[0].iter().zip(&scores[1]);
        self.squares += pairs.map(|(a, b)| (a - b).powi(2)).sum::<f64>();
        self.scores += scores[0].len();
        let largest = scores[0].iter().fold(f64::NEG_INFINITY, |a, &b| a.max(b));
        let weights = scores[0].iter().map(|s| (s - largest).exp());
        let (mut output, mut error) = (vec![0.0; m], vec![0.0; m]);
        let values = values[0].chunks_exact(m).zip(values[1].chunks_exact(m));
        for (weight, (value, coded)) in weights.zip(values) {
            for (((o, e), &v), &c) in output.iter_mut().zip(&mut error).zip(value).zip(coded) {
                *o += weight * f64::from(v);
                *e += weight * (f64::from(v) - f64::from(c));
            }
        }
        let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
        if norm(&output) > 0.0 {
            self.outputs += norm(&error) / norm(&output);
            self.queries += 1;
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter()
        .zip(b)
        .map(|(&a, &b)| f64::from(a) * f64::from(b))
        .sum()
}

/// A cache for one window that attends without codes and looks at what they would change.
struct Measured<'a> {
    cache: FullCache,
    joint: JointLayers,
    /// Steps of layers that are coded together, until the last one's is there.
    waiting: Vec<Step>,
    layers: &'a [LayerDictionaries],
    coding: Coding,
    sparsity: usize,
    /// Positions that a query sees, itself included.
    sliding: usize,
    sums: &'a mut [Sums],
}

impl Measured<'_> {
    /// Adds the errors of the layers that dictionaries `number` are of; queries are `[heads, t, m]`.
    fn measure(
        &mut self,
        number: usize,
        steps: &[Step],
        (heads, t, m): (usize, usize, usize),
    ) -> Result<()> {
        let group = heads / self.joint.kv_heads;
        let places = self.joint.heads_of(number);
        let first = number * self.joint.layers;
        let sparsities = vec![self.sparsity; places.len()];
        let coded = |coder: &Coder, vectors: fn(&Step) -> &[f32]| -> Result<Vec<f32>> {
            let own = |&(layer, head): &(usize, usize)| {
                &vectors(&steps[layer - first])[head * t * m..][..t * m]
            };
            let all = places.iter().flat_map(own).copied();
            let all: Vec<f32> = all.collect();
            Ok(coder.reconstruct(0.., &all, &sparsities, Fit::LeastSquares, &Rayon)?)
        };
        let coders = self.coding.coders(&self.layers[number])?;
        let coded_keys = coded(&coders.keys, |step| &step.keys)?;
        let coded_values = coded(&coders.values, |step| &step.values)?;
        let stride = t.div_ceil(QUERIES).max(1);
        for (layer, step) in (first..).zip(steps) {
            let own = self.joint.place(layer).1;
            for head in 0..heads {
                let kv_head = head / group;
                let (exact, coded) = (kv_head * t * m, own[kv_head] * t * m);
                // From the last position back: the first few see next to nothing.
                for position in (0..t).rev().step_by(stride) {
                    let from = (position + 1).saturating_sub(self.sliding);
                    let seen = |first: usize| first + from * m..first + (position + 1) * m;
                    self.sums[layer].add(
                        &step.queries[(head * t + position) * m..][..m],
                        [&step.keys[seen(exact)], &coded_keys[seen(coded)]],
                        [&step.values[seen(exact)], &coded_values[seen(coded)]],
                    );
                }
            }
        }
        Ok(())
    }
}

impl KvCache for Measured<'_> {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let step = Step::new(q, k, v)?;
        step.check_finite(layer)?;
        self.waiting.push(step);
        if self.waiting.len() == self.joint.layers {
            let steps = std::mem::take(&mut self.waiting);
            self.measure(layer / self.joint.layers, &steps, q.dims3()?)?;
        }
        self.cache.attend(layer, q, k, v)
    }

    fn len(&self) -> usize {
        self.cache.len()
    }

    fn footprint(&self) -> Footprint {
        self.cache.footprint()
    }
}
