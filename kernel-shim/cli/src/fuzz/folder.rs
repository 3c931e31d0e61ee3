//! The folder of a fuzzing campaign that goes on over many runs of the command.
//!
//! ```text
//! DIR/sequences/HASH.sequence    went somewhere new; in comments, what was new, and in which step
//! DIR/campaigns/NAME.json        how far the runs with these settings have come, and what they did
//! DIR/campaigns/NAME.lock        held while one of them runs
//! ```
//!
//! Files are written beside their place and renamed. So a folder may be shared by processes with
//! different seeds, and what stopped in the middle of anything leaves whole files. A file that
//! cannot be read is passed over and told.

use core::fmt::Write as _;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use mmu_hosted::{Corpus, Feature, Sequence};
use serde_json::{Value, json};

use crate::fuzz::options::FuzzOptions;

/// What the engine, the small kernel and the checker are that are built in: version, and a hash of
/// their sources.
const BUILD: &str = env!("MMU_BUILD");

/// What a line begins with that says what was new in a sequence.
const FEATURES: &str = "# features";

/// Features on one line.
const FEATURES_A_LINE: usize = 10;

/// A folder that a run works in.
#[derive(Debug)]
pub(crate) struct CorpusFolder {
    sequences: PathBuf,
    campaigns: PathBuf,
    name: String,
    /// Released when it is dropped.
    _lock: File,
    before: Done,
    unread: Unread,
}

/// How much was done.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Done {
    /// The number of the next sequence.
    pub next: u64,
    /// Sequences run.
    pub sequences: u64,
    /// Operations in them.
    pub ops: u64,
    /// Seconds they took.
    pub seconds: f64,
}

/// Files that could not be read.
#[derive(Clone, Debug, Default)]
pub(crate) struct Unread {
    /// How many.
    pub files: usize,
    /// The first, and why.
    pub first: Option<String>,
}

impl Unread {
    fn note(&mut self, path: &Path, why: impl core::fmt::Display) {
        self.files += 1;
        let name = path.file_name().unwrap_or_default().display();
        self.first.get_or_insert_with(|| format!("{name}: {why}"));
    }
}

impl CorpusFolder {
    /// Opens the folder, or makes it.
    ///
    /// # Errors
    /// What the host says; [`io::ErrorKind::WouldBlock`] if another process runs the same campaign.
    pub(crate) fn open(path: &Path, options: &FuzzOptions) -> io::Result<Self> {
        let (sequences, campaigns) = (path.join("sequences"), path.join("campaigns"));
        fs::create_dir_all(&sequences)?;
        fs::create_dir_all(&campaigns)?;
        let FuzzOptions { seed, nr_cpus, length, .. } = options;
        let name = format!("{BUILD}-seed{seed}-cpus{nr_cpus}-length{length}");
        let lock = File::create(campaigns.join(format!("{name}.lock")))?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => io::Error::new(
                io::ErrorKind::WouldBlock,
                format!("another process runs seed {seed} there: give this one another --seed"),
            ),
            TryLockError::Error(error) => error,
        })?;
        let mut unread = Unread::default();
        let file = campaigns.join(format!("{name}.json"));
        let before = if file.exists() { read_done(&file, &mut unread) } else { None };
        Ok(Self { sequences, campaigns, name, _lock: lock, before: before.unwrap_or_default(), unread })
    }

    /// What earlier runs with the same settings have done.
    pub(crate) const fn before(&self) -> Done {
        self.before
    }

    /// Files that could not be read.
    pub(crate) const fn unread(&self) -> &Unread {
        &self.unread
    }

    /// Reads the sequences that are kept.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub(crate) fn load(&mut self) -> io::Result<Corpus> {
        let mut corpus = Corpus::new();
        for path in files_of(&self.sequences, "sequence")? {
            let text = match fs::read_to_string(&path) {
                Ok(text) => text,
                // Another process may have taken it away.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => {
                    self.unread.note(&path, error);
                    continue;
                }
            };
            match Sequence::parse(&text) {
                Ok(sequence) => {
                    let _is_new = corpus.add(&sequence, &features_in(&text, &sequence));
                }
                Err(error) => self.unread.note(&path, error),
            }
        }
        Ok(corpus)
    }

    /// Keeps a sequence, with what was new in it.
    ///
    /// # Errors
    /// What the host says.
    pub(crate) fn keep(&self, sequence: &Sequence, new: &[(Feature, u16)]) -> io::Result<()> {
        let text = sequence.to_string();
        let mut lines = String::new();
        for features in new.chunks(FEATURES_A_LINE) {
            lines.push_str(FEATURES);
            for (Feature(feature), step) in features {
                // Writing to a string does not fail.
                let _ = write!(lines, " {feature:04x}:{step}");
            }
            lines.push('\n');
        }
        let path = self.sequences.join(format!("{:016x}.sequence", hash_of(&text)));
        if path.exists() { Ok(()) } else { write_whole(&path, &format!("{lines}{text}")) }
    }

    /// Notes what this run has done so far.
    ///
    /// # Errors
    /// What the host says.
    pub(crate) fn save(&self, run: Done) -> io::Result<()> {
        let Done { next, sequences, ops, seconds } = run;
        let before = self.before;
        let state = json!({
            "build": BUILD,
            "next": next,
            "sequences": before.sequences + sequences,
            "operations": before.ops + ops,
            "seconds": before.seconds + seconds,
        });
        write_whole(&self.campaigns.join(format!("{}.json", self.name)), &format!("{state:#}\n"))
    }

    /// What all runs have done in this folder with what is built in, and with other builds.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub(crate) fn in_all(&mut self) -> io::Result<(Done, Done)> {
        let (mut this, mut others) = (Done::default(), Done::default());
        let own = self.campaigns.join(format!("{}.json", self.name));
        for path in files_of(&self.campaigns, "json")? {
            // One that could not be read at the beginning has been counted then.
            let mut again = Unread::default();
            let unread = if path == own { &mut again } else { &mut self.unread };
            let Some(done) = read_done(&path, unread) else { continue };
            let name = path.file_name().unwrap_or_default().as_encoded_bytes();
            let sum = if name.starts_with(BUILD.as_bytes()) { &mut this } else { &mut others };
            sum.sequences += done.sequences;
            sum.ops += done.ops;
            sum.seconds += done.seconds;
        }
        Ok((this, others))
    }
}

fn read_done(path: &Path, unread: &mut Unread) -> Option<Done> {
    let parsed = fs::read_to_string(path).map_err(|error| error.to_string()).and_then(|text| {
        let value: Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
        let number = |name: &str| value[name].as_u64().ok_or_else(|| format!("{name} is missing"));
        Ok(Done {
            next: number("next")?,
            sequences: number("sequences")?,
            ops: number("operations")?,
            seconds: value["seconds"].as_f64().unwrap_or(0.0),
        })
    });
    parsed.map_err(|why| unread.note(path, why)).ok()
}

/// What was new in a sequence. One that was put there by other means has never been run here: it is
/// gone on from as if its end were something new.
fn features_in(text: &str, sequence: &Sequence) -> Vec<(Feature, u16)> {
    let words =
        text.lines().filter_map(|line| line.strip_prefix(FEATURES)).flat_map(str::split_ascii_whitespace);
    let pairs = words.filter_map(|word| {
        let (feature, step) = word.split_once(':')?;
        Some((Feature(u16::from_str_radix(feature, 16).ok()?), step.parse().ok()?))
    });
    let features: Vec<_> = pairs.collect();
    if !features.is_empty() {
        return features;
    }
    let feature = Feature((hash_of(&sequence.to_string()) >> 48).try_into().unwrap_or(0));
    vec![(feature, u16::MAX)]
}

/// The files with this extension, in the order of their names.
fn files_of(folder: &Path, extension: &str) -> io::Result<Vec<PathBuf>> {
    let paths = fs::read_dir(folder)?.map(|entry| Ok(entry?.path()));
    let mut paths = paths.collect::<io::Result<Vec<_>>>()?;
    paths.retain(|path| path.extension().is_some_and(|is| is == extension));
    paths.sort();
    Ok(paths)
}

/// All of it or nothing is there afterwards.
fn write_whole(path: &Path, text: &str) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".{}.part", std::process::id()));
    fs::write(&beside, text)?;
    fs::rename(&beside, path)
}

/// FNV-1a, 64 bits: names must be the same in every build.
fn hash_of(text: &str) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    text.bytes().fold(0xcbf2_9ce4_8422_2325, step)
}
