use candle_core::Tensor;
use lexico_llm::cache::{Footprint, KvCache};
use lexico_llm::{Error, Result, caught};

/// A cache whose failure is its own: the step that it fails in goes on for all other sequences.
pub(crate) struct Guarded {
    inner: Box<dyn KvCache>,
    failed: Option<String>,
}

impl Guarded {
    pub(crate) fn new(inner: Box<dyn KvCache>) -> Self {
        let failed = None;
        Self { inner, failed }
    }

    pub(crate) fn inner(&self) -> &dyn KvCache {
        self.inner.as_ref()
    }

    /// The reason why the cache can no longer be used.
    pub(crate) fn failed(&self) -> Option<&str> {
        self.failed.as_deref()
    }
}

impl KvCache for Guarded {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        if self.failed.is_none() {
            let inner = &mut self.inner;
            match caught(move || inner.attend(layer, q, k, v)) {
                Ok(Ok(attended)) => return Ok(attended),
                Ok(Err(error)) => self.failed = Some(error.to_string()),
                Err(panic) => self.failed = Some(panic),
            }
        }
        q.zeros_like().map_err(Error::from)
    }

    fn len(&self) -> usize {
        self.inner.len()
    }

    fn footprint(&self) -> Footprint {
        self.inner.footprint()
    }

    fn fork(&self) -> Option<Box<dyn KvCache>> {
        self.inner.fork()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)] // a test may panic

    use std::sync::Arc;

    use lexico_llm::Model;
    use lexico_llm::decoder::{Logits, Sequence};

    use super::*;

    /// A cache that panics, or fails, at the second layer.
    struct Poisoned {
        panics: bool,
    }

    impl KvCache for Poisoned {
        fn attend(&mut self, layer: usize, q: &Tensor, _: &Tensor, _: &Tensor) -> Result<Tensor> {
            match layer {
                0 => Ok(q.clone()),
                _ if self.panics => panic!("poison"),
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
    fn a_cache_that_fails_leaves_the_others_of_its_step_as_they_are() {
        let model = Arc::new(Model::tiny().unwrap());
        let spec = "lexico".parse().unwrap();
        let alone = {
            let mut cache = model.cache(&spec).unwrap();
            let logits = model
                .decoder
                .forward_one(&[5, 6, 7], cache.as_mut(), Logits::Last);
            logits.unwrap().to_vec2::<f32>().unwrap()
        };
        for panics in [false, true] {
            let mut good = Guarded::new(model.cache(&spec).unwrap());
            let mut bad = Guarded::new(Box::new(Poisoned { panics }));
            let mut sequences = [
                Sequence {
                    tokens: &[9, 8],
                    cache: &mut bad,
                },
                Sequence {
                    tokens: &[5, 6, 7],
                    cache: &mut good,
                },
            ];
            let logits = model.decoder.forward(&mut sequences, Logits::Last).unwrap();
            let logits = logits.to_vec2::<f32>().unwrap();
            assert_eq!(logits[1], alone[0]);
            assert!(good.failed().is_none());
            assert!(bad.failed().is_some());
        }
    }
}
