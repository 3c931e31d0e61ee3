//! A sequence: steps, and everything else that decides what they do.

use core::fmt;

use mmu_gather::pagetable::PagingMode;
use mmu_gather::tlb::PcidSupport;

use crate::mmu::features::{Features, InvlpgUppers, SettingDirty};
use crate::options::{Adversary, Device, Options};
use crate::sequence::op::{Step, parse_step};
use crate::sequence::quirks::{Quirk, Quirks};

/// Steps for a machine of so many CPUs, and the seed that decides how they interleave.
///
/// The text form is one step a line after five lines of header, and ends with `end`; the same text
/// does the same every time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// CPUs, 1 to 192.
    pub nr_cpus: u32,
    /// Decides the schedule and the speculation.
    pub seed: u64,
    /// Whether PCIDs are on.
    pub pcid: PcidSupport,
    /// What INVLPG does to structure caches: blunt as Intel's, or precise as AMD's.
    pub uppers: InvlpgUppers,
    /// Whether MMUs forget.
    pub adversary: Adversary,
    /// What CPUs look at before they set a dirty flag.
    pub dirty: SettingDirty,
    /// Whether a device shares address spaces.
    pub device: Device,
    /// What else the machine is.
    pub quirks: Quirks,
    /// How many levels page tables have, if the kernel can do with either.
    pub paging: PagingMode,
    /// Frames of the machine.
    pub nr_frames: u64,
    /// The steps.
    pub steps: Vec<Step>,
}

/// Frames of most machines: few, so that they are used again soon.
pub(crate) const NR_FRAMES: u64 = 24 << 10;

/// The fewest frames of a machine: enough to boot, and for one address space to be made.
const FEWEST_FRAMES: u64 = 64;

/// What the comment begins with that names the kernel.
pub(crate) const KERNEL: &str = "# kernel ";

const HEADER: &str = "mmu-gather sequence 1";

/// What is wrong with a text.
#[derive(Clone, PartialEq, Eq)]
pub struct SequenceError {
    /// Line, counted from 1.
    pub line: usize,
    /// What should stand there.
    pub expected: &'static str,
}

impl fmt::Display for SequenceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: expected {}", self.line, self.expected)
    }
}

/// As it is displayed: a test that fails with it prints it by `expect`.
impl fmt::Debug for SequenceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl core::error::Error for SequenceError {}

impl Sequence {
    /// The machine it runs on.
    #[must_use]
    pub fn options(&self) -> Options {
        let base = Options::new(self.nr_cpus, self.nr_frames, self.seed);
        self.quirks.apply(Options {
            pcid: self.pcid,
            paging: self.paging,
            features: Features { invlpg_uppers: self.uppers, dirty: self.dirty, ..base.features },
            device: self.device,
            adversary: self.adversary,
            ..base
        })
    }

    /// The kernel whose failure [`fuzz`](crate::fuzz()) has saved as this text, if it was `fuzz`:
    /// the path of its type.
    #[must_use]
    pub fn kernel_in(text: &str) -> Option<&str> {
        text.lines().find_map(|line| line.strip_prefix(KERNEL)).map(str::trim)
    }

    /// Reads the text form. Blank lines are skipped, and what follows a `#` that begins a word.
    ///
    /// # Errors
    /// The first line that is wrong, and what was expected there.
    pub fn parse(text: &str) -> Result<Self, SequenceError> {
        let mut lines = text
            .lines()
            .map(|line| without_comment(line).trim())
            .zip(1..)
            .filter(|(line, _)| !line.is_empty());
        let after_all = text.lines().count() + 1;
        let mut next = |expected| {
            let (line, number) = lines.next().ok_or(SequenceError { line: after_all, expected })?;
            Ok((line, number))
        };
        let (first, line) = next(HEADER)?;
        if first != HEADER {
            return Err(SequenceError { line, expected: HEADER });
        }
        let expected = "cpus and a number from 1 to 192";
        let cpus = next(expected)?;
        let mut sequence = Self {
            nr_cpus: number(cpus, "cpus", expected)?,
            seed: number(next("seed N")?, "seed", "seed and a number")?,
            pcid: PcidSupport::On,
            uppers: InvlpgUppers::All,
            adversary: Adversary::Keeper,
            dirty: SettingDirty::Checked,
            device: Device::Absent,
            quirks: Quirks::default(),
            paging: PagingMode::FourLevel,
            nr_frames: NR_FRAMES,
            steps: Vec::new(),
        };
        if !(1..=Options::MOST_CPUS).contains(&sequence.nr_cpus) {
            return Err(SequenceError { line: cpus.1, expected });
        }
        let expected = Quirk::MMU_LINE;
        let (mmu, line) = next(expected)?;
        let words: Vec<&str> = mmu.split_ascii_whitespace().collect();
        let ["mmu", pcid, uppers, adversary, ref others @ ..] = words[..] else {
            return Err(SequenceError { line, expected });
        };
        sequence.pcid =
            choose(pcid, [("pcid", PcidSupport::On), ("nopcid", PcidSupport::Off)], line, expected)?;
        let makers = [("intel", InvlpgUppers::All), ("amd", InvlpgUppers::LeadingToAddress)];
        sequence.uppers = choose(uppers, makers, line, expected)?;
        let adversaries = [("keeper", Adversary::Keeper), ("forgetter", Adversary::Forgetter)];
        sequence.adversary = choose(adversary, adversaries, line, expected)?;
        for word in others {
            match *word {
                "late-dirty" => sequence.dirty = SettingDirty::Unchecked,
                "device" => sequence.device = Device::Present,
                "la57" => sequence.paging = PagingMode::FiveLevel,
                word => {
                    if let Some(frames) = frames_in(word) {
                        sequence.nr_frames = frames;
                    } else {
                        let quirks = sequence.quirks.with_word(word);
                        sequence.quirks = quirks.ok_or(SequenceError { line, expected })?;
                    }
                }
            }
        }
        loop {
            let (line, number) = next("a step, or `end`")?;
            let at_line = |expected| SequenceError { line: number, expected };
            if line == "end" {
                let expected = "nothing after `end`";
                return match next(expected) {
                    Ok((_, line)) => Err(SequenceError { line, expected }),
                    Err(_) => Ok(sequence),
                };
            }
            let step = parse_step(line).map_err(at_line)?;
            if u32::from(step.cpu) >= sequence.nr_cpus {
                return Err(at_line("a CPU that the machine has: from 0, below the number after `cpus`"));
            }
            sequence.steps.push(step);
        }
    }
}

/// The line up to a `#` that begins a word.
fn without_comment(line: &str) -> &str {
    let is_start = |at: usize| line[..at].chars().next_back().is_none_or(char::is_whitespace);
    line.match_indices('#').find(|(at, _)| is_start(*at)).map_or(line, |(at, _)| &line[..at])
}

fn frames_in(word: &str) -> Option<u64> {
    let number = word.strip_prefix("frames=")?.parse().ok();
    number.filter(|frames| (FEWEST_FRAMES..=NR_FRAMES).contains(frames))
}

fn number<T: core::str::FromStr>(
    (line, at): (&str, usize),
    word: &str,
    expected: &'static str,
) -> Result<T, SequenceError> {
    let rest = line.strip_prefix(word).map(str::trim);
    rest.and_then(|number| number.parse().ok()).ok_or(SequenceError { line: at, expected })
}

fn choose<T: Copy>(
    word: &str,
    choices: [(&str, T); 2],
    line: usize,
    expected: &'static str,
) -> Result<T, SequenceError> {
    let chosen = choices.iter().find(|(name, _)| *name == word);
    chosen.map(|(_, choice)| *choice).ok_or(SequenceError { line, expected })
}

impl fmt::Display for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{HEADER}\ncpus {}\nseed {}", self.nr_cpus, self.seed)?;
        let pcid = if self.pcid == PcidSupport::On { "pcid" } else { "nopcid" };
        let uppers = if self.uppers == InvlpgUppers::All { "intel" } else { "amd" };
        let adversary = if self.adversary == Adversary::Keeper { "keeper" } else { "forgetter" };
        let dirty = if self.dirty == SettingDirty::Unchecked { " late-dirty" } else { "" };
        let device = if self.device == Device::Present { " device" } else { "" };
        let paging = if self.paging == PagingMode::FiveLevel { " la57" } else { "" };
        write!(f, "mmu {pcid} {uppers} {adversary}{dirty}{device}{paging}")?;
        if self.nr_frames != NR_FRAMES {
            write!(f, " frames={}", self.nr_frames)?;
        }
        writeln!(f, "{}", self.quirks)?;
        for step in &self.steps {
            writeln!(f, "{step}")?;
        }
        writeln!(f, "end")
    }
}
