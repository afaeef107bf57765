//! Training that is broken off, by whatever means, and goes on.

#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test may panic

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use lexico::tensor_file::TensorFile;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Corpus and training, with settings beside those that all trainings here share.
struct Training {
    folder: tempfile::TempDir,
    settings: Vec<&'static str>,
}

impl Training {
    fn new(settings: &[&'static str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let training = Self {
            folder,
            settings: settings.to_vec(),
        };
        training.write_corpus("lobster");
        training
    }

    fn write_corpus(&self, animal: &str) {
        let sentence = |i: usize| {
            format!(
                "In the year {i} the {animal} of the north had {} eggs. ",
                i * 7
            )
        };
        let text: String = (0..100).map(sentence).collect();
        std::fs::write(self.folder.path().join("corpus.txt"), text).unwrap();
    }

    fn out(&self) -> PathBuf {
        self.folder.path().join("d.safetensors")
    }

    fn state(&self) -> PathBuf {
        self.folder.path().join("d.safetensors.state")
    }

    fn command(&self, more: &[&str]) -> Command {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin!("lexico"));
        let fixed = [
            "--threads",
            "1",
            "train",
            "--corpus",
            "corpus.txt",
            "--out",
            "d.safetensors",
            "--context",
            "128",
            "--sparsity",
            "4",
            "--batch",
            "64",
        ];
        command.args(fixed).args(&self.settings).args(more);
        command.current_dir(self.folder.path());
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(Stdio::piped());
        command
    }

    fn finish(&self, more: &[&str]) {
        let output = self.command(more).output().unwrap();
        assert!(output.status.success(), "{}", message(&output));
        assert!(!self.state().exists(), "the state is removed in the end");
    }

    /// Returns the message of a call that must fail, without a trace of a panic.
    fn fails(&self, more: &[&str]) -> String {
        let output = self.command(more).output().unwrap();
        let message = message(&output);
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(!message.contains("panicked"), "{message}");
        message
    }

    fn tensors(&self) -> Vec<Vec<u8>> {
        let file = TensorFile::open(self.out()).unwrap();
        let names = file.names();
        names.iter().map(|name| file.bytes(name).unwrap()).collect()
    }

    /// Names the stage that the state has come to.
    fn stage(&self) -> String {
        let name = |entry: std::io::Result<std::fs::DirEntry>| {
            let name = entry.unwrap().file_name();
            name.to_string_lossy().into_owned()
        };
        let Ok(files) = std::fs::read_dir(self.state()) else {
            return "no state".to_owned();
        };
        let files: Vec<String> = files.map(name).collect();
        let codebooks = files.iter().filter(|f| f.ends_with(".groups")).count();
        if codebooks > 0 {
            return format!("{codebooks} of 8 dictionaries have their codebooks");
        }
        match files.iter().filter(|f| f.ends_with(".learning")).count() {
            0 if !files.iter().any(|f| f == "reading") => "nothing read is saved".to_owned(),
            0 => "reading".to_owned(),
            begun => format!("{begun} of 8 dictionaries begun or learned"),
        }
    }

    /// Replaces a text in a file of the state, whose checksum stays right.
    fn edit(&self, file: &str, from: &str, to: &str) {
        let path = self.state().join(file);
        let saved = std::fs::read(&path).unwrap();
        let text = String::from_utf8_lossy(&saved[..saved.len() - 4]).into_owned();
        let text = text.replace(from, to);
        assert!(text.contains(to), "{text}");
        let checksum = crc32fast::hash(text.as_bytes()).to_le_bytes();
        std::fs::write(path, [text.as_bytes(), &checksum].concat()).unwrap();
    }

    /// Begins and kills the program as soon as `there` says so.
    fn begin(&self, there: impl Fn(&Path) -> bool) {
        let mut child = self.command(&["--save-every", "0.05"]).spawn().unwrap();
        let began = Instant::now();
        while !there(&self.state()) {
            assert!(child.try_wait().unwrap().is_none(), "it ended too early");
            assert!(
                began.elapsed() < Duration::from_secs(120),
                "nothing is saved"
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        kill(&mut child);
    }
}

fn kill(child: &mut Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

fn message(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

const SMALL: [&str; 10] = [
    "--atoms",
    "64",
    "--vectors",
    "600",
    "--epochs",
    "30",
    "--codebooks",
    "2",
    "--first-codebook",
    "32",
];
const ENDLESS: [&str; 8] = [
    "--atoms",
    "64",
    "--vectors",
    "600",
    "--epochs",
    "100000000",
    "--patience",
    "0",
];

#[test]
fn killed_at_ten_drawn_moments_it_ends_with_the_same_tensors() {
    let training = Training::new(&SMALL);
    let began = Instant::now();
    training.finish(&[]);
    let whole = began.elapsed();
    let tensors = training.tensors();
    std::fs::remove_file(training.out()).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let mut kills = 0;
    while kills < 10 {
        let resume = ["--resume", "--save-every", "0.02"];
        let mut child = training.command(&resume).spawn().unwrap();
        let moment = whole.mul_f64(rng.random_range(0.05..0.5));
        std::thread::sleep(moment);
        let ended = child.try_wait().unwrap().is_some();
        kill(&mut child);
        if ended {
            assert_eq!(training.tensors(), tensors, "after {kills} kills");
            let _ = std::fs::remove_file(training.out());
        } else {
            kills += 1;
            println!("kill {kills} after {moment:.2?}: {}", training.stage());
        }
    }
    training.finish(&["--resume"]);
    assert_eq!(training.tensors(), tensors);
    // On another number of threads: the same.
    training.finish(&["--resume", "--threads", "3"]);
    assert_eq!(training.tensors(), tensors);
}

#[test]
fn a_state_is_never_overwritten_and_only_resumed_with_its_settings() {
    let training = Training::new(&ENDLESS);
    training.begin(|state| state.join("layers.0.keys.learning").exists());
    let message = training.fails(&[]);
    assert!(
        message.contains("d.safetensors.state") && message.contains("--resume"),
        "{message}"
    );
    let message = training.fails(&["--resume", "--seed", "3", "--learning-rate", "0.5"]);
    assert!(
        message.contains("seed (0 in the state, 3 now)") && message.contains("learning rate"),
        "{message}"
    );
    assert!(!message.contains("atoms ("), "{message}");
    training.write_corpus("seal");
    let message = training.fails(&["--resume"]);
    assert!(message.contains("bytes of the corpus"), "{message}");
}

#[test]
fn a_state_of_a_learner_that_is_gone_is_refused() {
    let training = Training::new(&ENDLESS);
    training.begin(|state| state.join("layers.0.keys.learning").exists());
    training.edit("settings", r#""learner":"Adam""#, r#""learner":"Ksvd""#);
    let message = training.fails(&["--resume"]);
    assert!(
        message.contains("learner (Ksvd in the state, Adam now)") && message.contains("remove"),
        "{message}"
    );
}

#[test]
fn another_text_of_the_same_length_is_noticed() {
    let training = Training::new(&ENDLESS);
    training.begin(|state| state.join("reading").exists());
    // As if reading had been broken off after a chunk.
    let _ = std::fs::remove_file(training.state().join("layers.0.keys.learning"));
    training.edit("reading", "\"done\":true", "\"done\":false");
    training.write_corpus("turtles");
    let message = training.fails(&["--resume"]);
    assert!(message.contains("the corpus is another"), "{message}");
}

#[test]
fn damaged_states_are_refused() {
    let training = Training::new(&ENDLESS);
    training.begin(|state| state.join("layers.0.keys.learning").exists());
    let files = [
        "settings",
        "reading",
        "layers.0.keys.learning",
        "layers.0.keys.vectors",
        "layers.0.keys.held-out",
    ];
    for name in files {
        let path = training.state().join(name);
        let whole = std::fs::read(&path).unwrap();
        let mut flipped = whole.clone();
        flipped[whole.len() / 40] ^= 16;
        for bytes in [&flipped[..], &whole[..whole.len() / 2], &whole[..3]] {
            std::fs::write(&path, bytes).unwrap();
            let message = training.fails(&["--resume"]);
            assert!(
                message.contains("damaged") && message.contains(name),
                "{message}"
            );
        }
        std::fs::write(&path, whole).unwrap();
    }
    std::fs::remove_file(training.state().join("settings")).unwrap();
    let message = training.fails(&["--resume"]);
    assert!(message.contains("no state of a training"), "{message}");
}

#[test]
fn codebooks_that_are_learned_are_not_learned_again() {
    let mut training = Training::new(&SMALL);
    training.finish(&[]);
    let tensors = training.tensors();
    // Of each layer two dictionaries, two parts of each codebooks, means and matrices of each part, and what keys are without.
    assert_eq!(tensors.len(), 4 * 12);
    std::fs::remove_file(training.out()).unwrap();
    training.begin(|state| state.join("layers.1.keys.groups").exists());
    let path = training.state().join("layers.0.values.groups");
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() - 40]).unwrap();
    let message = training.fails(&["--resume"]);
    assert!(
        message.contains("damaged") && message.contains("layers.0.values.groups"),
        "{message}"
    );
    std::fs::write(&path, whole).unwrap();
    let first = std::mem::replace(training.settings.last_mut().unwrap(), "16");
    let message = training.fails(&["--resume"]);
    assert!(message.contains("first of 32 atoms"), "{message}");
    *training.settings.last_mut().unwrap() = first;
    training.finish(&["--resume"]);
    assert_eq!(training.tensors(), tensors);
}

#[test]
fn a_full_disk_leaves_the_state_whole() {
    let training = Training::new(&SMALL);
    training.finish(&[]);
    let tensors = training.tensors();
    std::fs::remove_file(training.out()).unwrap();
    training.begin(|state| state.join("layers.0.keys.learning").exists());
    // A file may have 20 blocks of 512 bytes: the state of a learner has more.
    let limited = training.command(&["--resume", "--save-every", "0"]);
    let mut shell = Command::new("sh");
    shell.args([
        "-c",
        "trap '' XFSZ; ulimit -f \"$1\"; shift; exec \"$@\"",
        "sh",
        "20",
    ]);
    shell.arg(limited.get_program()).args(limited.get_args());
    shell
        .current_dir(training.folder.path())
        .stdout(Stdio::null());
    let output = shell.output().unwrap();
    let message = message(&output);
    assert_eq!(output.status.code(), Some(1), "{message}");
    for word in ["learning: File too large", "--resume"] {
        assert!(message.contains(word), "{message}");
    }
    training.finish(&["--resume"]);
    assert_eq!(training.tensors(), tensors);
}
