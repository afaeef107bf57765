//! Files of sampled vectors.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use lexico::learn::Vectors;
use rand::{Rng, RngExt};

use super::state::damaged;
use crate::error::{Error, Result, io};

/// File of fixed size with rows, each at its place and with a checksum: numbers in f32, and the CRC-32 of the
/// place's number and them.
///
/// The file is read and written rather than mapped: the system keeps in memory what fits, as it would of a
/// map, but a full or failing disk is an error and not a signal.
pub(super) struct Rows {
    path: PathBuf,
    file: Mutex<File>,
    /// Numbers of a row.
    length: usize,
}

impl Rows {
    /// Opens the file, or makes it with room for `max` vectors.
    pub(super) fn open(path: &Path, length: usize, max: usize) -> Result<Self> {
        let mut open = OpenOptions::new();
        let file = open.read(true).write(true).create(true).truncate(false);
        let file = file.open(path).map_err(io(path))?;
        let rows = Self {
            path: path.to_owned(),
            file: Mutex::new(file),
            length,
        };
        let size = (max * rows.row_bytes()) as u64;
        rows.with_file(|file| match file.metadata()?.len() {
            0 => file.set_len(size).map(|()| true),
            length => Ok(length == size),
        })?
        .then_some(rows)
        .ok_or_else(|| damaged(path))
    }

    fn row_bytes(&self) -> usize {
        4 * self.length + 4
    }

    fn with_file<T>(&self, work: impl FnOnce(&mut File) -> std::io::Result<T>) -> Result<T> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        work(&mut file).map_err(io(&self.path))
    }

    /// Writes `vectors` `[n, m]` to the places from `first` on.
    fn write(&self, first: usize, vectors: &[f32]) -> Result<()> {
        let mut bytes = Vec::with_capacity(vectors.len() / self.length * self.row_bytes());
        for (number, x) in vectors.chunks_exact(self.length).enumerate() {
            let start = bytes.len();
            bytes.extend(x.iter().flat_map(|x| x.to_le_bytes()));
            let checksum = checksum(first + number, &bytes[start..]);
            bytes.extend_from_slice(&checksum.to_le_bytes());
        }
        let at = (first * self.row_bytes()) as u64;
        self.with_file(|file| {
            file.seek(SeekFrom::Start(at))?;
            file.write_all(&bytes)
        })
    }

    /// Waits until all that was written will outlast a power cut.
    pub(super) fn sync(&self) -> Result<()> {
        self.with_file(|file| file.sync_data())
    }

    /// Fills `out` `[n, m]` with the vectors at the places from `first` on.
    pub(super) fn read(&self, first: usize, out: &mut [f32]) -> Result<()> {
        // So many at once that memory does not hold the bytes beside the numbers.
        const AT_ONCE: usize = 4096;
        for (part, out) in out.chunks_mut(AT_ONCE * self.length).enumerate() {
            let first = first + part * AT_ONCE;
            let mut bytes = vec![0; out.len() / self.length * self.row_bytes()];
            let at = (first * self.row_bytes()) as u64;
            self.with_file(|file| {
                file.seek(SeekFrom::Start(at))?;
                file.read_exact(&mut bytes)
            })?;
            let rows = bytes.chunks_exact(self.row_bytes());
            for (number, (row, out)) in rows.zip(out.chunks_exact_mut(self.length)).enumerate() {
                let Some((numbers, stored)) = row.split_last_chunk::<4>() else {
                    return Err(damaged(&self.path));
                };
                if checksum(first + number, numbers) != u32::from_le_bytes(*stored) {
                    return Err(damaged(&self.path));
                }
                for (out, bytes) in out.iter_mut().zip(numbers.as_chunks::<4>().0) {
                    *out = f32::from_le_bytes(*bytes);
                }
            }
        }
        Ok(())
    }

    /// Reads the first `count` vectors.
    pub(super) fn read_first(&self, count: usize) -> Result<Vec<f32>> {
        let mut vectors = vec![0.0; count * self.length];
        self.read(0, &mut vectors)?;
        Ok(vectors)
    }
}

fn checksum(place: usize, numbers: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&(place as u64).to_le_bytes());
    hasher.update(numbers);
    hasher.finalize()
}

/// First `count` vectors of a file whose rows hold several each and then a position, read when they are needed.
pub(super) struct OnDisk<'a> {
    pub(super) rows: &'a Rows,
    pub(super) count: usize,
    pub(super) head_dim: usize,
}

impl Vectors for OnDisk<'_> {
    fn count(&self) -> usize {
        self.count
    }

    fn read(&self, numbers: &[u32], out: &mut [f32]) -> lexico::Result<()> {
        let m = self.head_dim;
        let each = (self.rows.length - 1) / m;
        let mut row = vec![0.0; self.rows.length];
        for (&number, out) in numbers.iter().zip(out.chunks_exact_mut(m)) {
            let (place, head) = (number as usize / each, number as usize % each);
            self.rows
                .read(place, &mut row)
                .map_err(|error| match error {
                    Error::Io { path, reason } => lexico::Error::Io { path, reason },
                    other => lexico::Error::Vectors(Box::new(other)),
                })?;
            out.copy_from_slice(&row[head * m..][..m]);
        }
        Ok(())
    }
}

/// Unbiased sample of at most `max` rows of a stream (algorithm R: Vitter 1985).
pub(super) struct Reservoir {
    pub(super) rows: Rows,
    pub(super) max: usize,
}

impl Reservoir {
    /// Counts the rows that it holds after `seen` were offered.
    pub(super) fn held(&self, seen: u64) -> usize {
        seen.min(self.max as u64) as usize
    }

    /// Offers `vectors`, whole rows, before which `seen` were offered.
    ///
    /// The draws of `rng` alone decide where vectors go, so that offering them again changes nothing.
    pub(super) fn offer(&self, vectors: &[f32], seen: u64, rng: &mut impl Rng) -> Result<()> {
        let m = self.rows.length;
        let vacant = (self.max as u64).saturating_sub(seen) as usize;
        let (first, rest) = vectors.split_at(vectors.len().min(vacant * m));
        if !first.is_empty() {
            self.rows.write(seen as usize, first)?;
        }
        let before = seen + (first.len() / m) as u64;
        for (number, vector) in rest.chunks_exact(m).enumerate() {
            let place = rng.random_range(0..=before + number as u64);
            if place < self.max as u64 {
                self.rows.write(place as usize, vector)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn every_vector_is_as_likely_to_be_kept() {
        let folder = tempfile::tempdir().unwrap();
        let (max, stream, runs) = (20, 100, 400);
        let mut kept = vec![0u32; stream];
        for run in 0..runs {
            let path = folder.path().join(format!("{run}"));
            let rows = Rows::open(&path, 1, max).unwrap();
            let reservoir = Reservoir { rows, max };
            let vectors: Vec<f32> = (0..stream).map(|v| v as f32).collect();
            let mut seen = 0;
            for (number, vectors) in vectors.chunks(7).enumerate() {
                let mut rng = ChaCha8Rng::seed_from_u64(run);
                rng.set_stream(number as u64);
                reservoir.offer(vectors, seen, &mut rng).unwrap();
                seen += vectors.len() as u64;
            }
            for v in reservoir.rows.read_first(max).unwrap() {
                kept[v as usize] += 1;
            }
        }
        // 80 expected of each, standard deviation 8.
        assert!(kept.iter().all(|&k| (48..112).contains(&k)), "{kept:?}");
        let squares: f64 = kept.iter().map(|&k| (f64::from(k) - 80.0).powi(2)).sum();
        // Chi-squared over 64: 100 expected less those that are bound, standard deviation 14.
        assert!(
            (50.0..150.0).contains(&(squares / 64.0)),
            "{}",
            squares / 64.0
        );
    }

    #[test]
    fn changed_and_cut_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows");
        let rows = Rows::open(&path, 3, 4).unwrap();
        let vectors: Vec<f32> = (0..12).map(|x| x as f32).collect();
        rows.write(0, &vectors).unwrap();
        assert_eq!(rows.read_first(4).unwrap(), vectors);
        let whole = std::fs::read(&path).unwrap();
        for place in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[place] ^= 4;
            std::fs::write(&path, flipped).unwrap();
            assert!(rows.read_first(4).is_err(), "byte {place}");
        }
        std::fs::write(&path, &whole[..60]).unwrap();
        assert!(matches!(Rows::open(&path, 3, 4), Err(Error::State { .. })));
    }
}
