//! The peer table: the engine, the floors, other crates and Linux on the same work, in one run.
//!
//! `cargo bench -p mmu-benches --bench peers` prints it. After `--`:
//!
//! - `--test` runs every row once on small sizes, `--quick` takes fewer rounds;
//! - `--variants` adds what the same costs under other conditions;
//! - `--engine W1,W5` has only the floors and the engine, on these workloads;
//! - `--calls` has only the calls of few pages, and the kinds of entries; `--calls 2,8` only calls
//!   of so many pages; with `--write` these tables alone are written;
//! - `--write` takes all rows and puts them into README.md, here and of the project.

use core::time::Duration;
use std::io;

use mmu_benches::document::Page;
use mmu_benches::entry::{Clock, Counts, Entry, Path, Sampler};
use mmu_benches::flushes::{Flusher, flushing_sample};
use mmu_benches::linux::{self, Way};
use mmu_benches::peers::{Tables, Told};
use mmu_benches::rounds::{Series, measure};
use mmu_gather::tlb::OnlineCpus;
use mmu_measured::machine::Machine;
use mmu_measured::memory::Memory;
use mmu_measured::shape::{Kind, Shape, Size, Workload};

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
        let sizes = std::env::args().skip_while(|argument| argument != "--calls").nth(1);
        let sizes = sizes.filter(|sizes| !sizes.starts_with("--"));
        let memory = Memory::new();
        let sampler = Sampler::new(&memory);
        match sizes {
            Some(sizes) => calls_of(&sampler, &sizes, size, rounds, patience / 4),
            None => {
                let small = Small::measured(&sampler, size, rounds, patience);
                small.print();
                if has("--write") {
                    small.write(&Page::here("README.md"))?;
                    Page::here("../README.md").write("calls", &small.calls.nanoseconds(&IN_SHORT_CALLS))?;
                }
            }
        }
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
    let small = Small::measured(&sampler, size, rounds, patience);
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
    small.print();
    println!(
        "Median ns for each leaf, one other CPU to interrupt at 1 us; interrupts for each 1000 leaves\n\n{flushes}"
    );
    if has("--write") {
        let page = Page::here("README.md");
        page.write("nanoseconds", &nanoseconds)?;
        page.write("counting", &counting)?;
        page.write("ratios to the plain floor", &to_plain)?;
        page.write("ratios to the exchange floor", &to_exchange)?;
        small.write(&page)?;
        page.write("interrupts", &flushes)?;
        let page = Page::here("../README.md");
        page.write("nanoseconds", &in_short(&measured))?;
        page.write("calls", &small.calls.nanoseconds(&IN_SHORT_CALLS))?;
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

/// Calls of so many pages, by hand and the engine's, and the ratio of the two.
fn calls_of(sampler: &Sampler<'_>, sizes: &str, size: Size, rounds: u32, patience: Duration) {
    println!(
        "Least and median ns for a call, and the median of the ratios round by round to the same by hand\n"
    );
    for pages in sizes.split(',').filter_map(|pages| pages.parse::<usize>().ok()) {
        for workload in [Workload::Calls(pages), Workload::CallsWithTable(pages)] {
            let rows = [
                Entry::Protocol,
                Entry::Engine(Path::Munmap, Counts::Batched),
                Entry::Engine(Path::Discard, Counts::Batched),
            ];
            let rows: Vec<Entry> = rows.into_iter().filter(|entry| entry.applies_to(workload)).collect();
            let series = measure(sampler, &workload.shape(size), &rows, rounds, patience);
            let column: Column = rows.iter().copied().zip(series).collect();
            let calls = Calls::of(&[workload], vec![column]);
            let table = if rows.len() == 3 { "stays" } else { "goes" };
            for (entry, series) in &calls.columns[0] {
                let ratio = row(&calls.columns[0], Entry::Protocol).and_then(|floor| series.ratio_to(floor));
                let cells = [series.min(), series.median(), ratio];
                let cells = cells.map(|number| number.map_or_else(|| "-".into(), three_digits));
                println!("| {pages}, table {table} | {} | {} |", entry.name(), cells.join(" | "));
            }
        }
    }
}

/// What programs ask for most: calls of few pages; and what is in the entries.
struct Small {
    calls: Calls,
    with_table: Calls,
    kinds: Vec<Column>,
}

impl Small {
    fn measured(sampler: &Sampler<'_>, size: Size, rounds: u32, patience: Duration) -> Self {
        let columns = |workloads: &[Workload], rows: &[Entry]| {
            let column = |workload: &Workload| {
                let series = measure(sampler, &workload.shape(size), rows, rounds, patience / 4);
                rows.iter().copied().zip(series).collect()
            };
            workloads.iter().map(column).collect()
        };
        Self {
            calls: Calls::of(&Workload::CALLS, columns(&Workload::CALLS, &Entry::CALLS)),
            with_table: Calls::of(
                &Workload::CALLS_WITH_TABLE,
                columns(&Workload::CALLS_WITH_TABLE, &Entry::CALLS_WITH_TABLE),
            ),
            kinds: columns(&Kind::ALL.map(Workload::Kinds), &Entry::KINDS),
        }
    }

    /// The tables, with the names of their places in README.md.
    fn tables(&self) -> [(&'static str, &'static str, String); 5] {
        let kinds = Kind::ALL.map(|kind| kind.name().to_owned());
        let kinds = cells(&kinds, &Entry::KINDS, &self.kinds, &|series, _| series.median());
        [
            (
                "calls",
                "Median ns for a call of so many pages, in a table that stays",
                self.calls.nanoseconds(&Entry::CALLS),
            ),
            (
                "calls, ratios",
                "Median of the ratios to the same by hand, round by round",
                self.calls.ratios(&Entry::CALLS),
            ),
            (
                "calls with table",
                "Median ns for a munmap of so many pages, whose table goes",
                self.with_table.nanoseconds(&Entry::CALLS_WITH_TABLE),
            ),
            (
                "calls with table, ratios",
                "Median of the ratios to the same by hand, round by round",
                self.with_table.ratios(&Entry::CALLS_WITH_TABLE),
            ),
            ("kinds", "Median ns for each leaf of 64 MiB, by what is in the entries", kinds),
        ]
    }

    fn print(&self) {
        for (_, title, table) in self.tables() {
            println!("{title}\n\n{table}");
        }
    }

    fn write(&self, page: &Page) -> io::Result<()> {
        self.tables().into_iter().try_for_each(|(name, _, table)| page.write(name, &table))
    }
}

/// What calls of few pages cost: nanoseconds a call, by the number of pages.
struct Calls {
    pages: Vec<String>,
    columns: Vec<Column>,
}

impl Calls {
    /// `columns` are of nanoseconds a page.
    fn of(workloads: &[Workload], columns: Vec<Column>) -> Self {
        let pages_of = |workload: &Workload| match workload {
            Workload::Calls(pages) | Workload::CallsWithTable(pages) => *pages,
            _ => 1,
        };
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        let a_call = |(workload, column): (&Workload, Column)| {
            let pages = pages_of(workload) as f64;
            let times = |series: Series| Series(series.0.iter().map(|a_page| a_page * pages).collect());
            column.into_iter().map(|(entry, series)| (entry, times(series))).collect()
        };
        let pages = workloads.iter().map(|workload| pages_of(workload).to_string()).collect();
        Self { pages, columns: workloads.iter().zip(columns).map(a_call).collect() }
    }

    fn nanoseconds(&self, rows: &[Entry]) -> String {
        cells(&self.pages, rows, &self.columns, &|series, _| series.median())
    }

    /// To the same protocol written out by hand.
    fn ratios(&self, rows: &[Entry]) -> String {
        cells(&self.pages, rows, &self.columns, &|series, column| {
            series.ratio_to(row(column, Entry::Protocol)?)
        })
    }
}

/// The same where a flush costs something: one other CPU runs the program, and takes a microsecond
/// to interrupt.
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
