//! Instructions for each leaf torn down and for each call, counted exactly; and a check that they
//! have not grown.
//!
//! `cargo bench -p mmu-benches --bench instructions` prints the table. With `-- --check`, and with
//! `-- --test`, it compares the engine's rows with `instructions.snapshot`, and fails if one has
//! grown by more than 2 percent. With `-- --bless` it writes the snapshot and the table in
//! README.md.

use std::process::ExitCode;

use mmu_benches::document::Page;
use mmu_benches::entry::{Counts, Entry, Meter, Path, Sampler};
use mmu_benches::peers::{Tables, Told};
use mmu_benches::steps::{Counted, count};
use mmu_measured::memory::Memory;
use mmu_measured::shape::{Kind, Size, Workload};

const SNAPSHOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/instructions.snapshot");
/// A compiler update moves a few instructions; a real slowdown moves more.
const TOLERANCE: f64 = 0.02;

/// Rows of the engine, which the snapshot holds, and others beside them, on some workloads.
struct Section {
    /// What a number is, and the name of its place in README.md.
    title: &'static str,
    place: &'static str,
    workloads: &'static [Workload],
    engine: &'static [Entry],
    others: &'static [Entry],
}

const EXIT: Entry = Entry::Engine(Path::Exit, Counts::Batched);
const MUNMAP: Entry = Entry::Engine(Path::Munmap, Counts::Batched);
const DISCARD: Entry = Entry::Engine(Path::Discard, Counts::Batched);

const SECTIONS: [Section; 3] = [
    Section {
        title: "instructions per leaf",
        place: "instructions",
        // W2 and W6 take as many instructions as W1; only their time differs.
        workloads: &[
            Workload::W1Dense,
            Workload::W3Sparse,
            Workload::W4Areas,
            Workload::W5Huge,
            Workload::W7OnePage,
        ],
        engine: &[EXIT, MUNMAP, Entry::Engine(Path::MunmapEach, Counts::Batched)],
        others: &[
            Entry::ClearOnly,
            Entry::PLAIN,
            Entry::EXCHANGE,
            Entry::Protocol,
            Entry::X86_64(Told::Areas, Tables::Freed),
            Entry::Multiarch(Told::Areas, Tables::Freed),
            Entry::Multiarch(Told::Areas, Tables::Kept),
        ],
    },
    Section {
        title: "instructions per call",
        place: "instructions of calls",
        workloads: &[
            Workload::Calls(1),
            Workload::Calls(2),
            Workload::Calls(4),
            Workload::Calls(8),
            Workload::Calls(16),
            Workload::Calls(33),
            Workload::Calls(64),
            Workload::CallsWithTable(1),
            Workload::CallsWithTable(8),
        ],
        engine: &[MUNMAP, DISCARD],
        others: &[Entry::Protocol],
    },
    Section {
        title: "instructions per leaf, by entry",
        place: "instructions by kind",
        workloads: &[
            Workload::Kinds(Kind::Written),
            Workload::Kinds(Kind::ReadOnly),
            Workload::Kinds(Kind::OneReadOnly),
            Workload::Kinds(Kind::Clean),
            Workload::Kinds(Kind::EverySecond),
        ],
        engine: &[EXIT, MUNMAP],
        others: &[Entry::PLAIN],
    },
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
    let mut grown = 0;
    let mut snapshot = String::new();
    for section in &SECTIONS {
        let mut rows = section.engine.to_vec();
        if !check {
            rows.extend(section.others);
        }
        let table: Table =
            rows.iter().map(|entry| (entry.name(), measure(&sampler, *entry, section, empty))).collect();
        if check {
            let Some(more) = compare(section, &table) else { return ExitCode::FAILURE };
            grown += more;
            continue;
        }
        let text = render(section, &table);
        println!("{text}");
        snapshot += &render(section, &table[..section.engine.len()]);
        if has("--bless")
            && let Err(error) = Page::here("README.md").write(section.place, &text)
        {
            eprintln!("README.md: {error}");
            return ExitCode::FAILURE;
        }
    }
    if has("--bless")
        && let Err(error) = std::fs::write(SNAPSHOT, snapshot)
    {
        eprintln!("{SNAPSHOT}: {error}");
        return ExitCode::FAILURE;
    }
    if grown > 0 {
        eprintln!("{grown} grew by more than {TOLERANCE}; if that is meant, run with -- --bless");
        return ExitCode::FAILURE;
    }
    if check {
        println!("instructions per leaf and per call: within {TOLERANCE} of the snapshot, or better");
    }
    ExitCode::SUCCESS
}

type Row = (String, Vec<Option<f64>>);
type Table = Vec<Row>;

fn measure(sampler: &Sampler<'_>, entry: Entry, section: &Section, empty: u64) -> Vec<Option<f64>> {
    let cell = |workload: &Workload| {
        if !entry.applies_to(*workload) {
            return None;
        }
        let shape = workload.shape(Size::Tiny);
        // Counted the second time, when the batch pages are there.
        let counted = count(|marks| {
            sampler.sample(&shape, entry, &mut Unmeasured);
            sampler.sample(&shape, entry, marks);
        });
        let Counted { instructions, stretches } = counted.expect("tracing worked a moment ago");
        let pieces = match workload {
            Workload::Calls(_) | Workload::CallsWithTable(_) => shape.areas.len() as u64 * shape.repeats,
            _ => shape.nr_leaves(),
        };
        #[expect(clippy::cast_precision_loss, reason = "far fewer than 2^52")]
        Some((instructions - stretches * empty) as f64 / pieces as f64)
    };
    section.workloads.iter().map(cell).collect()
}

/// What a workload is called at the head of its column.
fn column(workload: Workload) -> String {
    match workload {
        Workload::Calls(pages) => pages.to_string(),
        Workload::CallsWithTable(pages) => format!("{pages}, table goes"),
        _ => workload.name().into(),
    }
}

struct Unmeasured;

impl Meter for Unmeasured {
    fn measure<R>(&mut self, work: impl FnOnce() -> R) -> R {
        work()
    }
}

fn render(section: &Section, table: &[Row]) -> String {
    let names: Vec<String> = section.workloads.iter().copied().map(column).collect();
    let mut text = format!("| {} | {} |\n| --- |", section.title, names.join(" | "));
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

/// Compares `table` with the section's part of the snapshot: more instructions are a failure, fewer
/// are reported. Returns how many have grown, if there is a snapshot.
fn compare(section: &Section, table: &[Row]) -> Option<u32> {
    let snapshot = match std::fs::read_to_string(SNAPSHOT) {
        Ok(text) => text,
        Err(error) => {
            eprintln!("{SNAPSHOT}: {error}");
            return None;
        }
    };
    let head = format!("| {} |", section.title);
    let of_section: Vec<&str> = snapshot
        .lines()
        .skip_while(|line| !line.starts_with(&head))
        .skip(2)
        .take(section.engine.len())
        .collect();
    let mut grown = 0;
    for (name, cells) in table {
        let Some(line) = of_section.iter().find(|line| line.starts_with(&format!("| {name} |"))) else {
            eprintln!("{name}, {}: not in {SNAPSHOT}", section.title);
            grown += 1;
            continue;
        };
        let before = line.split('|').skip(2).map(|cell| cell.trim().parse::<f64>().ok());
        for ((workload, now), before) in section.workloads.iter().zip(cells).zip(before) {
            let (Some(now), Some(before)) = (*now, before) else { continue };
            let ratio = now / before;
            if ratio > 1.0 + TOLERANCE {
                grown += 1;
            }
            if (ratio - 1.0).abs() > TOLERANCE {
                let (unit, workload) = (section.title, column(*workload));
                eprintln!("{name}, {workload}: {before:.1} {unit}, now {now:.1}");
            }
        }
    }
    Some(grown)
}
