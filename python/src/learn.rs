//! Learning from arrays.

use std::ops::ControlFlow;

use lexico::learn::{
    CodebookOptions, Effort, InMemory, InitialAtoms, LearnOptions, Learner, RotaryKeys, joint_basis,
};
use lexico::threads::Rayon;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::arrays::Numbers;
use crate::codec::{Codebooks, Dictionary, HeadMaps};
use crate::error::{codec, value};
use crate::work::detached;

/// The efforts: tokens, vectors, and the arguments of [`learn_codebooks`], by name.
pub(crate) fn efforts(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let all = PyDict::new(py);
    for effort in Effort::ALL {
        // None of these depends on the head dim.
        let CodebookOptions {
            rounds,
            vectors,
            beam,
            ..
        } = effort.codebooks(1);
        let arguments = PyDict::new(py);
        arguments.set_item("rounds", rounds)?;
        arguments.set_item("vectors_per_round", vectors)?;
        arguments.set_item("beam", beam)?;
        all.set_item(
            effort.name(),
            (effort.tokens(), effort.vectors(), arguments),
        )?;
    }
    Ok(all)
}

/// A callback that is told of steps done and steps in all.
struct Progress {
    callback: Option<Py<PyAny>>,
    /// The exception that it, or a signal, ended the work with.
    raised: Option<PyErr>,
}

impl Progress {
    fn tell(&mut self, step: usize, steps: usize) -> ControlFlow<()> {
        let told = Python::attach(|py| {
            py.check_signals()?;
            match &self.callback {
                Some(callback) => callback.call1(py, (step, steps)).map(drop),
                None => Ok(()),
            }
        });
        match told {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                self.raised = Some(error);
                ControlFlow::Break(())
            }
        }
    }

    /// The outcome, or what was raised meanwhile.
    fn outcome<T>(self, outcome: lexico::Result<T>) -> PyResult<T> {
        match self.raised {
            Some(error) => Err(error),
            None => outcome.map_err(codec),
        }
    }
}

/// Vectors to learn from, their length, and those to judge by.
fn vectors<'py>(
    given: &Bound<'py, PyAny>,
    held_out: Option<&Bound<'py, PyAny>>,
) -> PyResult<(Numbers<'py>, usize, Option<Numbers<'py>>)> {
    let vectors = Numbers::new(given, "vectors")?;
    let [_, m] = vectors.dims("[n, m]")?;
    if m == 0 {
        return Err(value("vectors: their length is 0"));
    }
    let held_out = held_out
        .map(|own| Numbers::new(own, "held_out"))
        .transpose()?;
    if let Some(own) = &held_out {
        let [_, length] = own.dims("[n, m]")?;
        if length != m {
            return Err(value(format!(
                "held_out: vectors of length {length}, and those to learn from have length {m}"
            )));
        }
    }
    Ok((vectors, m, held_out))
}

#[pyfunction]
#[pyo3(signature = (vectors, held_out = None, *, codebooks = None, first = 2048, sparsity = None, rounds = 8,
    vectors_per_round = 32768, beam = 4, seed = 0, progress = None))]
#[allow(clippy::too_many_arguments, reason = "keyword arguments of Python")]
pub(crate) fn learn_codebooks(
    py: Python<'_>,
    vectors: &Bound<'_, PyAny>,
    held_out: Option<&Bound<'_, PyAny>>,
    codebooks: Option<usize>,
    first: usize,
    sparsity: Option<usize>,
    rounds: usize,
    vectors_per_round: usize,
    beam: usize,
    seed: u64,
    progress: Option<Py<PyAny>>,
) -> PyResult<(Codebooks, Option<f32>)> {
    let (vectors, m, held_out) = self::vectors(vectors, held_out)?;
    let usual = CodebookOptions::of(m);
    let options = CodebookOptions {
        first,
        codebooks: codebooks.unwrap_or(usual.codebooks),
        sparsity: sparsity.unwrap_or(usual.sparsity),
        rounds,
        vectors: vectors_per_round,
        beam,
        seed,
    };
    if vectors_per_round == 0 {
        return Err(value("vectors_per_round must be at least 1"));
    }
    let numbers = vectors.numbers()?.to_vec();
    let held_out = held_out.as_ref().map_or(Ok(&[][..]), Numbers::numbers)?;
    let mut progress = Progress {
        callback: progress,
        raised: None,
    };
    let learned = detached(py, || {
        let mut tell = |p: lexico::learn::CodebookProgress| progress.tell(p.step, p.steps);
        let learned =
            lexico::learn::learn_codebooks(numbers, held_out, m, &options, &Rayon, &mut tell)?;
        // As a file keeps them.
        Ok::<_, lexico::Error>((learned.codebooks.in_eight_bits()?, learned.held_out_error))
    })?;
    let (codebooks, error) = progress.outcome(learned)?;
    Ok((Codebooks(codebooks.into()), error))
}

#[pyfunction]
#[pyo3(signature = (vectors, held_out = None, *, atoms = 4096, sparsity = 8, epochs = 24, batch = 512,
    learning_rate = 1e-2, patience = 3, seed = 0, progress = None))]
#[allow(clippy::too_many_arguments, reason = "keyword arguments of Python")]
pub(crate) fn learn_dictionary(
    py: Python<'_>,
    vectors: &Bound<'_, PyAny>,
    held_out: Option<&Bound<'_, PyAny>>,
    atoms: usize,
    sparsity: usize,
    epochs: usize,
    batch: usize,
    learning_rate: f32,
    patience: usize,
    seed: u64,
    progress: Option<Py<PyAny>>,
) -> PyResult<(Dictionary, Option<f32>)> {
    let (vectors, m, held_out) = self::vectors(vectors, held_out)?;
    let options = LearnOptions {
        atoms,
        sparsity,
        epochs,
        batch,
        learning_rate,
        initial: InitialAtoms::Vectors,
        reseed: true,
        patience,
        seed,
    };
    let numbers = vectors.numbers()?;
    let held_out = held_out.as_ref().map_or(Ok(&[][..]), Numbers::numbers)?;
    let mut progress = Progress {
        callback: progress,
        raised: None,
    };
    let learned = detached(py, || {
        let vectors = InMemory::new(numbers, m)?;
        let mut learner = Learner::new(&vectors, held_out, m, &options)?;
        while !learner.is_done() {
            let step = learner.step(&Rayon)?;
            if progress.tell(step.step, step.steps).is_break() {
                return Err(lexico::Error::Interrupted);
            }
        }
        Ok::<_, lexico::Error>(learner.finish())
    })?;
    let learned = progress.outcome(learned)?;
    Ok((
        Dictionary(learned.dictionary.into()),
        learned.held_out_error,
    ))
}

#[pyfunction]
#[pyo3(signature = (vectors, moments, *, frequencies = None, positions = None, joint_heads = 1))]
pub(crate) fn head_maps(
    py: Python<'_>,
    vectors: &Bound<'_, PyAny>,
    moments: &Bound<'_, PyAny>,
    frequencies: Option<&Bound<'_, PyAny>>,
    positions: Option<Vec<u32>>,
    joint_heads: usize,
) -> PyResult<HeadMaps> {
    let vectors = Numbers::new(vectors, "vectors")?;
    let [heads, n, m] = vectors.dims("[heads, n, m]")?;
    if heads * n * m == 0 {
        return Err(value("vectors: there are none"));
    }
    if joint_heads == 0 || !heads.is_multiple_of(joint_heads) {
        return Err(value(format!(
            "joint_heads={joint_heads}: there are {heads} KV heads, which must be a multiple of it"
        )));
    }
    let moments: Numbers<'_, f64> = Numbers::new(moments, "moments")?;
    if moments.shape() != [heads, m, m] {
        return Err(value(format!(
            "moments: their shape is {:?}, but [{heads}, {m}, {m}] is needed",
            moments.shape()
        )));
    }
    let moments = moments.numbers()?;
    if !moments.iter().all(|x| x.is_finite()) {
        return Err(value("moments: a number is a NaN or an infinity"));
    }
    let frequencies = frequencies
        .map(|own| Numbers::new(own, "frequencies"))
        .transpose()?;
    let rotary = match (&frequencies, &positions) {
        (None, None) => None,
        (Some(frequencies), Some(positions)) => {
            let frequencies = frequencies.numbers()?;
            if positions.len() != n {
                let count = positions.len();
                return Err(value(format!(
                    "{count} positions of {n} vectors of each head"
                )));
            }
            Some(RotaryKeys {
                frequencies,
                positions,
            })
        }
        _ => {
            return Err(value(
                "frequencies and positions belong together: give both, or neither",
            ));
        }
    };
    let numbers = vectors.numbers()?;
    let by_head: Vec<Vec<f32>> = numbers.chunks_exact(n * m).map(<[f32]>::to_vec).collect();
    let maps = detached(py, || {
        let maps = lexico::learn::head_maps(&by_head, rotary, moments, m)?;
        if joint_heads == 1 {
            return Ok(maps);
        }
        let positions = positions.as_deref().unwrap_or_default();
        let positions = positions.iter().map(|&position| position as usize);
        // Without a rotary embedding maps do not ask where vectors were.
        let coded = maps.all_to_coded(positions, numbers);
        maps.with_basis(joint_basis(&coded, heads, joint_heads, m)?)
    })?;
    Ok(HeadMaps(maps.map_err(codec)?.into()))
}
