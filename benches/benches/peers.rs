//! The peer table: the engine, the floors, other crates and Linux on the same work, in one run.
//!
//! `cargo bench -p mmu-benches --bench peers` prints it; `-- --test` runs every row once on small sizes; `-- --quick` takes
//! fewer rounds; `-- --variants` adds what the same costs under other conditions; `-- --engine W1,W5` has only the floors and the
//! engine, on these workloads; `-- --calls` has only the calls of few pages;
//! `-- --write` takes all rows and puts them into README.md, here and of the project.

use core::time::Duration;
use std::io;

use mmu_benches::document::Page;
use mmu_benches::entry::{Clock, Counts, Entry, Path, Sampler};
use mmu_benches::flushes::{Flusher, flushing_sample};
use mmu_benches::linux::{self, Way};
use mmu_benches::machine::Machine;
use mmu_benches::memory::Memory;
use mmu_benches::peers::{Tables, Told};
use mmu_benches::rounds::{Series, measure};
use mmu_benches::shape::{Shape, Size, Workload};
use mmu_gather::tlb::OnlineCpus;

/// The rows of the tables in README.md, and of the one there about what counting costs.
const ROWS: [Entry; 5] = [
    Entry::Engine(Path::MunmapEach, Counts::Batched),
    Entry::X86_64(Told::Areas, Tables::Kept),
    Entry::X86_64(Told::Pages, Tables::Freed),
    Entry::Multiarch(Told::Areas, Tables::Kept),
    Entry::Multiarch(Told::Pages, Tables::Freed),
];
const COUNTING: [Entry; 6] = [
    Entry::Engine(Path::Exit, Counts::Batched),
    Entry::Engine(Path::Munmap, Counts::Batched),
    Entry::Engine(Path::Exit, Counts::Combined),
    Entry::Engine(Path::Exit, Counts::AtUnmap),
    Entry::Engine(Path::Munmap, Counts::AtUnmap),
    Entry::Engine(Path::Munmap, Counts::Locked),
];

fn main() -> io::Result<()> {
    let has = |flag: &str| std::env::args().any(|argument| argument == flag);
    if let Some(names) = std::env::args().skip_while(|argument| argument != "--engine").nth(1) {
        engine_only(&names);
        return Ok(());
    }
    let (size, rounds, patience) = if has("--test") {
        (Size::Small, 1, Duration::ZERO)
    } else if has("--quick") {
        (Size::for_this_machine(), 5, Duration::from_secs(4))
    } else {
        (Size::for_this_machine(), 21, Duration::from_secs(25))
    };
    if has("--calls") {
        let memory = Memory::new();
        let calls = Calls::measured(&Sampler::new(&memory), size, rounds, patience / 4);
        println!("{}\n{}", calls.nanoseconds(&Entry::CALLS), calls.ratios());
        return Ok(());
    }
    let variants = has("--variants") || has("--test") || has("--write");
    // Before this process grows: its copies then have nothing else to tear down.
    let linux = linux_rows(if has("--test") { Size::Small } else { Size::for_this_machine() }, rounds.min(5));
    let memory = Memory::new();
    let sampler = Sampler::new(&memory);
    let all: Vec<Entry> = Entry::MAIN.into_iter().chain(Entry::VARIANTS).collect();
    let measured = Workload::ALL.map(|workload| {
        let shape = workload.shape(size);
        let wanted = if variants { &all[..] } else { &Entry::MAIN };
        let rows: Vec<Entry> = wanted.iter().copied().filter(|entry| entry.applies_to(workload)).collect();
        let series = measure(&sampler, &shape, &rows, rounds, patience);
        eprintln!("{} {} leaves, {} rounds", workload.name(), shape.nr_leaves(), series[0].0.len());
        rows.into_iter().zip(series).collect::<Column>()
    });
    let calls = Calls::measured(&sampler, size, rounds, patience / 4);
    let flushes = flush_table(&memory, size, rounds.min(5));

    let rows: Vec<Entry> =
        if variants { Entry::MAIN.into_iter().chain(ROWS).collect() } else { Entry::MAIN.to_vec() };
    let names = Workload::ALL.map(|workload| workload.name().into());
    let table = |rows: &[Entry], value: &Value| cells(&names, rows, &measured, value);
    let mut nanoseconds = table(&rows, &|series, _| series.median());
    for (name, cells) in linux {
        nanoseconds += &format!("| {name} | {} |\n", cells.join(" | "));
    }
    let to_plain = table(&rows, &|series, column| series.ratio_to(row(column, Entry::PLAIN)?));
    let to_exchange = table(&rows, &|series, column| series.ratio_to(row(column, Entry::EXCHANGE)?));
    let counting = table(if variants { &COUNTING } else { &[] }, &|series, _| series.median());
    println!(
        "Median ns for each leaf torn down ({size:?} sizes; a leaf is 4 KiB, in W5 2 MiB)\n\n{nanoseconds}"
    );
    println!("Median ns for each leaf, by how frames are counted\n\n{counting}");
    println!("Median of the ratios to the plain floor, round by round\n\n{to_plain}");
    println!("Median of the ratios to the exchange floor, round by round\n\n{to_exchange}");
    println!(
        "Median ns for a call of so many pages, in a table that stays\n\n{}",
        calls.nanoseconds(&Entry::CALLS)
    );
    println!("Median of the ratios to the same by hand, round by round\n\n{}", calls.ratios());
    println!(
        "Median ns for each leaf, one other CPU to interrupt at 1 us; interrupts for each 1000 leaves\n\n{flushes}"
    );
    if has("--write") {
        let page = Page::here("README.md");
        page.write("nanoseconds", &nanoseconds)?;
        page.write("counting", &counting)?;
        page.write("ratios to the plain floor", &to_plain)?;
        page.write("ratios to the exchange floor", &to_exchange)?;
        page.write("calls", &calls.nanoseconds(&Entry::CALLS))?;
        page.write("calls, ratios", &calls.ratios())?;
        page.write("interrupts", &flushes)?;
        let page = Page::here("../README.md");
        page.write("nanoseconds", &in_short(&measured))?;
        page.write("calls", &calls.nanoseconds(&IN_SHORT_CALLS))?;
    }
    Ok(())
}

/// Five workloads and the rows that matter most, for the README of the project.
fn in_short(measured: &[Column; Workload::ALL.len()]) -> String {
    let [w1, _, w3, w4, _, w6, w7] = measured;
    let columns = [w1, w3, w4, w6, w7].map(Clone::clone);
    let names =
        ["dense 1 GiB", "a page in each 2 MiB", "10 000 small areas", "frames shuffled", "a page at a time"];
    let rows = [
        Entry::PLAIN,
        Entry::EXCHANGE,
        Entry::Engine(Path::Exit, Counts::Batched),
        Entry::Engine(Path::Munmap, Counts::Batched),
        Entry::Engine(Path::MunmapEach, Counts::Batched),
        Entry::X86_64(Told::Areas, Tables::Freed),
        Entry::Multiarch(Told::Areas, Tables::Freed),
        Entry::Multiarch(Told::Areas, Tables::Kept),
    ];
    cells(&names.map(String::from), &rows, &columns, &|series, _| series.median())
}

const IN_SHORT_CALLS: [Entry; 4] = [
    Entry::Protocol,
    Entry::Engine(Path::Munmap, Counts::Batched),
    Entry::X86_64(Told::Areas, Tables::Kept),
    Entry::Multiarch(Told::Areas, Tables::Kept),
];

/// The floors and the engine on the workloads named, in more rounds.
fn engine_only(names: &str) {
    let memory = Memory::new();
    let sampler = Sampler::new(&memory);
    let size = Size::for_this_machine();
    println!(
        "Median ns a leaf, and of the ratios round by round to the plain floor and to the exchange floor\n"
    );
    for workload in
        Workload::ALL.into_iter().filter(|workload| names.split(',').any(|name| name == workload.name()))
    {
        let shape = workload.shape(size);
        let rows = [Entry::PLAIN, Entry::EXCHANGE, Entry::Protocol].into_iter().chain(Entry::ENGINE);
        let rows: Vec<Entry> = rows.filter(|entry| entry.applies_to(workload)).collect();
        let series = measure(&sampler, &shape, &rows, 61, Duration::from_secs(30));
        let column: Column = rows.into_iter().zip(series).collect();
        for (entry, series) in &column {
            let cells = [
                series.median(),
                row(&column, Entry::PLAIN).and_then(|floor| series.ratio_to(floor)),
                row(&column, Entry::EXCHANGE).and_then(|floor| series.ratio_to(floor)),
            ];
            let cells = cells.map(|number| number.map_or_else(|| "-".into(), three_digits));
            println!("| {} | {} | {} |", workload.name(), entry.name(), cells.join(" | "));
        }
    }
}

/// Linux on the same shapes. W5 is 2 GiB there, and W7 256 pages: it needs real memory.
fn linux_rows(size: Size, rounds: u32) -> Vec<(&'static str, Vec<String>)> {
    let shapes = Workload::ALL.map(|workload| match workload {
        Workload::W5Huge | Workload::W7OnePage => workload.shape(Size::Small),
        _ => workload.shape(size),
    });
    let cell = |way: Way, shape: &Shape| {
        if !way.applies_to(shape.workload) {
            return "-".into();
        }
        let samples: Result<Vec<f64>, _> = (0..rounds).map(|_| linux::sample(shape, way)).collect();
        match samples {
            Ok(samples) => Series(samples).median().map_or_else(|| "-".into(), three_digits),
            Err(error) => {
                eprintln!("{}, {}: {error}", way.name(), shape.workload.name());
                "-".into()
            }
        }
    };
    Way::ALL.map(|way| (way.name(), shapes.iter().map(|shape| cell(way, shape)).collect())).into()
}

/// What calls of few pages cost: nanoseconds a call, by the number of pages.
struct Calls {
    pages: Vec<String>,
    columns: Vec<Column>,
}

impl Calls {
    fn measured(sampler: &Sampler<'_>, size: Size, rounds: u32, patience: Duration) -> Self {
        let mut this = Self { pages: Vec::new(), columns: Vec::new() };
        for workload in Workload::CALLS {
            let shape = workload.shape(size);
            let series = measure(sampler, &shape, &Entry::CALLS, rounds, patience);
            let pages = shape.leaves.len() / shape.areas.len();
            this.pages.push(pages.to_string());
            #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
            let pages = pages as f64;
            let a_call = |series: Series| Series(series.0.iter().map(|a_page| a_page * pages).collect());
            this.columns.push(Entry::CALLS.into_iter().zip(series.into_iter().map(a_call)).collect());
        }
        this
    }

    fn nanoseconds(&self, rows: &[Entry]) -> String {
        cells(&self.pages, rows, &self.columns, &|series, _| series.median())
    }

    /// To the same protocol written out by hand.
    fn ratios(&self) -> String {
        cells(&self.pages, &Entry::CALLS, &self.columns, &|series, column| {
            series.ratio_to(row(column, Entry::Protocol)?)
        })
    }
}

/// The same where a flush costs something: one other CPU runs the program, and takes a microsecond to interrupt.
fn flush_table(memory: &Memory, size: Size, rounds: u32) -> String {
    let mut text = String::from("| | W2 | | W4 | |\n| --- | ---: | ---: | ---: | ---: |\n");
    let shapes = [Workload::W2Dense64, Workload::W4Areas].map(|workload| workload.shape(size));
    for flusher in Flusher::ALL {
        let machine = Machine::new(memory, OnlineCpus::Many).with_others(1, Duration::from_micros(1));
        let cells = shapes.iter().map(|shape| {
            let mut nanoseconds = Series::default();
            let mut interrupts = 0;
            for _ in 0..rounds {
                let mut clock = Clock::default();
                interrupts = flushing_sample(&machine, shape, flusher, &mut clock);
                nanoseconds.0.push(clock.nanoseconds_for(shape.nr_leaves()));
            }
            let median = nanoseconds.median().map_or_else(|| "-".into(), three_digits);
            #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
            let interrupts = interrupts as f64 * 1000.0 / shape.nr_leaves() as f64;
            format!("{median} | {}", three_digits(interrupts))
        });
        text += &format!("| {} | {} |\n", flusher.name(), cells.collect::<Vec<_>>().join(" | "));
    }
    text
}

type Column = Vec<(Entry, Series)>;

fn row(column: &Column, entry: Entry) -> Option<&Series> {
    column.iter().find(|(other, _)| *other == entry).map(|(_, series)| series)
}

/// The number that a cell shows, from its series and its column.
type Value = dyn Fn(&Series, &Column) -> Option<f64>;

/// A table with a column for each of `names`.
fn cells(names: &[String], entries: &[Entry], columns: &[Column], value: &Value) -> String {
    let mut text = format!("| | {} |\n| --- |{}\n", names.join(" | "), " ---: |".repeat(names.len()));
    for entry in entries {
        let cells: Vec<String> = columns
            .iter()
            .map(|column| {
                let number = row(column, *entry).and_then(|series| value(series, column));
                number.map_or_else(|| "-".into(), three_digits)
            })
            .collect();
        text += &format!("| {} | {} |\n", entry.name(), cells.join(" | "));
    }
    text
}

fn three_digits(number: f64) -> String {
    match number {
        0.0..10.0 => format!("{number:.2}"),
        10.0..100.0 => format!("{number:.1}"),
        _ => format!("{number:.0}"),
    }
}
