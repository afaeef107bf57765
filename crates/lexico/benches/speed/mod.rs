//! Flags, devices and output that the benches of speed share.

#![allow(dead_code, unused_imports)] // each bench uses a part

pub(crate) mod gpu;

use std::fmt;
use std::str::FromStr;
use std::time::Instant;

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

/// Flags of every bench.
#[derive(clap::Args)]
pub(crate) struct Common {
    /// Device to measure: cpu, cuda or cuda:N (builds with --features cuda)
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    pub(crate) device: Device,
    /// Threads to use [default: all cores]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=512))]
    threads: Option<u16>,
    /// Print one JSON document
    #[arg(long)]
    pub(crate) json: bool,
    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

impl Common {
    /// Sets the number of threads, before anything uses them.
    pub(crate) fn set_threads(&self) -> anyhow::Result<()> {
        let Some(threads) = self.threads else {
            return Ok(());
        };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.into());
        Ok(pool.build_global()?)
    }

    /// Names what the figures were measured on.
    pub(crate) fn place(&self) -> String {
        match self.device {
            Device::Cpu => format!("{} threads", rayon::current_num_threads()),
            device => device.to_string(),
        }
    }
}

/// Device to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Device {
    /// The processor.
    Cpu,
    /// The NVIDIA GPU of this number.
    Cuda(usize),
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = match text {
            "cpu" => return Ok(Self::Cpu),
            "cuda" => Some(0),
            _ => text.strip_prefix("cuda:").and_then(|n| n.parse().ok()),
        };
        number
            .map(Self::Cuda)
            .ok_or_else(|| format!("{text:?} is none of cpu, cuda and cuda:N"))
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => write!(f, "cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

/// Returns the median microseconds of some runs.
pub(crate) fn microseconds<T>(
    repetitions: usize,
    run: impl Fn() -> lexico::Result<T>,
) -> anyhow::Result<f64> {
    let mut times = Vec::new();
    for _ in 0..repetitions {
        let started = Instant::now();
        run()?;
        times.push(started.elapsed().as_secs_f64() * 1e6);
    }
    Ok(median(&mut times))
}

/// Draws numbers from -1 to 1.
pub(crate) fn drawn(rng: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| rng.random_range(-1f32..1.0)).collect()
}

pub(crate) fn median(numbers: &mut [f64]) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(0.0)
}

pub(crate) fn print_json(document: &serde_json::Value) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(document)?);
    Ok(())
}
