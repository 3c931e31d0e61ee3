//! Instructions for each leaf torn down, counted exactly; and a check that they have not grown.
//!
//! `cargo bench -p mmu-benches --bench instructions` prints the table; `-- --check` (and `-- --test`) compares the engine's
//! rows with `instructions.snapshot` and fails if one has grown by more than 2 percent; `-- --bless` writes the
//! snapshot and the table in README.md.

use std::process::ExitCode;

use mmu_benches::document::Page;
use mmu_benches::entry::{Counts, Entry, Meter, Path, Sampler};
use mmu_benches::memory::Memory;
use mmu_benches::peers::{Tables, Told};
use mmu_benches::shape::{Size, Workload};
use mmu_benches::steps::{Counted, count};

const SNAPSHOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/instructions.snapshot");
/// A compiler update moves a few instructions; a real slowdown moves more.
const TOLERANCE: f64 = 0.02;

/// W2 and W6 take as many as W1; their time differs.
const WORKLOADS: [Workload; 5] =
    [Workload::W1Dense, Workload::W3Sparse, Workload::W4Areas, Workload::W5Huge, Workload::W7OnePage];
const ENGINE: [Entry; 3] = [
    Entry::Engine(Path::Exit, Counts::Batched),
    Entry::Engine(Path::Munmap, Counts::Batched),
    Entry::Engine(Path::MunmapEach, Counts::Batched),
];
const OTHERS: [Entry; 7] = [
    Entry::ClearOnly,
    Entry::PLAIN,
    Entry::EXCHANGE,
    Entry::Protocol,
    Entry::X86_64(Told::Areas, Tables::Freed),
    Entry::Multiarch(Told::Areas, Tables::Freed),
    Entry::Multiarch(Told::Areas, Tables::Kept),
];

fn main() -> ExitCode {
    let has = |flag: &str| std::env::args().any(|argument| argument == flag);
    let check = has("--check") || has("--test");
    let memory = Memory::new();
    let sampler = Sampler::new(&memory);
    let empty = match count(|marks| marks.measure(|| ())) {
        Ok(counted) => counted.instructions,
        Err(error) => {
            eprintln!("instructions were not counted: {error}");
            return if check { ExitCode::SUCCESS } else { ExitCode::FAILURE };
        }
    };
    let mut rows: Vec<Entry> = ENGINE.to_vec();
    if !check {
        rows.extend(OTHERS);
    }
    let table = rows.iter().map(|entry| (entry.name(), measure(&sampler, *entry, empty))).collect();
    if check {
        return compare(&table);
    }
    let text = render(&table);
    print!("{text}");
    if has("--bless") {
        if let Err(error) = Page::here("README.md").write("instructions", &text) {
            eprintln!("README.md: {error}");
            return ExitCode::FAILURE;
        }
        let engine: Table = table.into_iter().take(ENGINE.len()).collect();
        if let Err(error) = std::fs::write(SNAPSHOT, render(&engine)) {
            eprintln!("{SNAPSHOT}: {error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

type Table = Vec<(String, Vec<Option<f64>>)>;

fn measure(sampler: &Sampler<'_>, entry: Entry, empty: u64) -> Vec<Option<f64>> {
    let mut cells = Vec::new();
    for workload in WORKLOADS {
        if !entry.applies_to(workload) {
            cells.push(None);
            continue;
        }
        let shape = workload.shape(Size::Tiny);
        // The second time, when the batch pages are there.
        let counted = count(|marks| {
            sampler.sample(&shape, entry, &mut Unmeasured);
            sampler.sample(&shape, entry, marks);
        });
        let Counted { instructions, stretches } = counted.expect("tracing worked a moment ago");
        #[expect(clippy::cast_precision_loss, reason = "far fewer than 2^52")]
        cells.push(Some((instructions - stretches * empty) as f64 / shape.nr_leaves() as f64));
    }
    cells
}

struct Unmeasured;

impl Meter for Unmeasured {
    fn measure<R>(&mut self, work: impl FnOnce() -> R) -> R {
        work()
    }
}

fn render(table: &Table) -> String {
    let names: Vec<&str> = WORKLOADS.iter().map(|workload| workload.name()).collect();
    let mut text = format!("| instructions per leaf | {} |\n| --- |", names.join(" | "));
    text += &" ---: |".repeat(names.len());
    text += "\n";
    for (name, cells) in table {
        let cells: Vec<String> = cells
            .iter()
            .map(|cell| cell.map_or_else(|| "-".into(), |number| format!("{number:.1}")))
            .collect();
        text += &format!("| {name} | {} |\n", cells.join(" | "));
    }
    text
}

/// Holds `table` against the snapshot: more is a failure, less is news.
fn compare(table: &Table) -> ExitCode {
    let snapshot = match std::fs::read_to_string(SNAPSHOT) {
        Ok(text) => text,
        Err(error) => {
            eprintln!("{SNAPSHOT}: {error}");
            return ExitCode::FAILURE;
        }
    };
    let mut grown = 0;
    for (name, cells) in table {
        let Some(line) = snapshot.lines().find(|line| line.starts_with(&format!("| {name} |"))) else {
            eprintln!("{name}: not in {SNAPSHOT}");
            grown += 1;
            continue;
        };
        let before = line.split('|').skip(2).map(|cell| cell.trim().parse::<f64>().ok());
        for ((workload, now), before) in WORKLOADS.iter().zip(cells).zip(before) {
            let (Some(now), Some(before)) = (*now, before) else { continue };
            let ratio = now / before;
            if ratio > 1.0 + TOLERANCE {
                grown += 1;
            }
            if (ratio - 1.0).abs() > TOLERANCE {
                eprintln!("{name}, {}: {before:.1} instructions a leaf, now {now:.1}", workload.name());
            }
        }
    }
    if grown > 0 {
        eprintln!("{grown} grew by more than {TOLERANCE}; if that is meant, run with -- --bless");
        return ExitCode::FAILURE;
    }
    println!("instructions per leaf: within {TOLERANCE} of the snapshot, or better");
    ExitCode::SUCCESS
}
