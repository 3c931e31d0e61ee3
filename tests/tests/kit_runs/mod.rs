//! What the tests of memory layers do with the conformance kit.

use std::path::Path;
use std::sync::Arc;
use std::{fs, io};

use mmu_gather::Limits;
use mmu_gather::pagetable::PagingMode;
use mmu_hosted::{
    FuzzOptions, HostedMachine, Kernel, MostWork, Options, Report, Trial, Verdict, ViolationKind, fuzz,
    generate, replay,
};

/// Fuzzes a kernel in which nothing is wrong, and which has a preemption point wherever one is due
/// (rule G7).
pub(crate) fn clean<K: Kernel>(boot: impl Fn(&Arc<HostedMachine>) -> io::Result<K>) -> Report {
    let most_work = MostWork::promised_by(&Limits::DEFAULT);
    let trial = Trial { most_work, ..Trial::default() };
    let report = fuzz(&FuzzOptions { trial, ..FuzzOptions::default() }, boot).expect("memory");
    assert!(report.is_clean(), "{report}");
    report
}

/// What the kit says of a mistake.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Finding {
    Violation(ViolationKind),
    /// A debug build of the engine says it first, with the name of the rule.
    TableFreedWithEntries,
}

/// A sequence that shows a mistake.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Saved {
    /// Below `tests/reproducers/`.
    pub(crate) file: &'static str,
    pub(crate) finding: Finding,
}

impl Saved {
    /// Fuzzing finds the mistake, and the saved sequence shows it.
    pub(crate) fn is_found_in<K: Kernel>(self, boot: impl Fn(&Arc<HostedMachine>) -> io::Result<K>) {
        self.finding.is_told(&fuzz(&FuzzOptions::default(), &boot).expect("memory"));
        self.finding.is_told(&replay(&text(self.file), Trial::default(), &boot).expect("a sequence"));
    }
}

/// A saved sequence shows nothing in a kernel in which nothing is wrong.
pub(crate) fn replayed_clean<K: Kernel>(file: &str, boot: impl Fn(&Arc<HostedMachine>) -> io::Result<K>) {
    let report = replay(&text(file), Trial::default(), boot).expect("a sequence");
    assert!(report.is_clean(), "{file}: {report}");
}

fn text(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("reproducers").join(file);
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{file}: {error}"))
}

impl Finding {
    fn is_told(self, report: &Report) {
        let failure = report.failure.as_ref().unwrap_or_else(|| panic!("{self:?} is not found: {report}"));
        let told = &failure.found.told;
        let is_told = match (self, &failure.verdict) {
            (Self::Violation(kind), Verdict::Ended(_)) => told.iter().any(|said| said.kind == kind),
            (Self::TableFreedWithEntries, Verdict::Panicked(words)) => {
                words.starts_with("P3: ") && words.contains("is freed with entries in it")
            }
            (Self::TableFreedWithEntries, Verdict::Ended(_)) => {
                told.iter().any(|said| said.kind == ViolationKind::TableFreedInUse)
            }
            (Self::Violation(_), Verdict::Panicked(_)) => false,
        };
        assert!(is_told, "{self:?}: {report}");
    }
}

/// A machine on which one thread plays every CPU.
pub(crate) fn quiet_machine(seed: u64) -> Arc<HostedMachine> {
    // The models of these kernels know four levels, and never run out of memory.
    let drawn = generate(seed, 4, 0).options();
    let options = Options { paging: PagingMode::FourLevel, nr_frames: 24 << 10, ..drawn };
    Arc::new(HostedMachine::new(options).expect("memory"))
}
