//! The peer table: the engine, the floors, other crates and Linux on the same work, in one run.
//!
//! `cargo bench -p mmu-benches --bench peers` prints it; `-- --test` runs every row once on small sizes; `-- --quick` takes
//! fewer rounds; `-- --variants` adds what the same costs under other conditions; `-- --engine W1,W5` has only the floors and the
//! engine, on these workloads; `-- --calls` has only the calls of few pages.

use core::time::Duration;

use mmu_benches::entry::{Clock, Entry, Sampler};
use mmu_benches::flushes::{Flusher, flushing_sample};
use mmu_benches::linux::{self, Way};
use mmu_benches::machine::Machine;
use mmu_benches::memory::Memory;
use mmu_benches::rounds::{Series, measure};
use mmu_benches::shape::{Shape, Size, Workload};
use mmu_gather::tlb::OnlineCpus;

fn main() {
    let has = |flag: &str| std::env::args().any(|argument| argument == flag);
    if let Some(names) = std::env::args().skip_while(|argument| argument != "--engine").nth(1) {
        return engine_only(&names);
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
        return calls_table(&Sampler::new(&memory), size, rounds, patience / 4);
    }
    let mut entries = Entry::MAIN.to_vec();
    if has("--variants") || has("--test") {
        entries.extend(Entry::VARIANTS);
    }
    // Before this process grows: its copies then have nothing else to tear down.
    let linux = linux_rows(if has("--test") { Size::Small } else { Size::for_this_machine() }, rounds.min(5));
    let memory = Memory::new();
    let sampler = Sampler::new(&memory);
    let mut columns = Vec::new();
    for workload in Workload::ALL {
        let shape = workload.shape(size);
        let rows: Vec<Entry> = entries.iter().copied().filter(|entry| entry.applies_to(workload)).collect();
        let series = measure(&sampler, &shape, &rows, rounds, patience);
        eprintln!("{} {} leaves, {} rounds", workload.name(), shape.nr_leaves(), series[0].0.len());
        let column: Vec<(Entry, Series)> = rows.into_iter().zip(series).collect();
        columns.push(column);
    }
    println!("Median ns for each leaf torn down ({size:?} sizes; a leaf is 4 KiB, in W5 2 MiB)\n");
    print_table(&entries, &columns, |series, _| series.median());
    for (name, cells) in linux {
        println!("| {name} | {} |", cells.join(" | "));
    }
    calls_table(&sampler, size, rounds, patience / 4);
    flush_table(&memory, size, rounds.min(5));
    println!("\nMedian of the ratios to the plain floor, round by round\n");
    print_table(&entries, &columns, |series, column| series.ratio_to(row(column, Entry::PLAIN)?));
    println!("\nMedian of the ratios to the exchange floor, round by round\n");
    print_table(&entries, &columns, |series, column| series.ratio_to(row(column, Entry::EXCHANGE)?));
}

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

/// Calls of few pages: what one costs, and the ratio to the same written out by hand.
fn calls_table(sampler: &Sampler<'_>, size: Size, rounds: u32, patience: Duration) {
    let mut names = Vec::new();
    let columns: Vec<Column> = Workload::CALLS
        .iter()
        .map(|workload| {
            let shape = workload.shape(size);
            let series = measure(sampler, &shape, &Entry::CALLS, rounds, patience);
            let pages = shape.leaves.len() / shape.areas.len();
            names.push(pages.to_string());
            #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
            let pages = pages as f64;
            let a_call = |series: Series| Series(series.0.iter().map(|a_page| a_page * pages).collect());
            Entry::CALLS.into_iter().zip(series.into_iter().map(a_call)).collect()
        })
        .collect();
    println!("\nMedian ns for a call of so many pages, in a table that stays\n");
    print_cells(&names, &Entry::CALLS, &columns, |series, _| series.median());
    println!("\nMedian of the ratios to the same by hand, round by round\n");
    print_cells(&names, &Entry::CALLS, &columns, |series, column| {
        series.ratio_to(row(column, Entry::Protocol)?)
    });
}

/// The same where a flush costs something: one other CPU runs the program, and takes a microsecond to interrupt.
fn flush_table(memory: &Memory, size: Size, rounds: u32) {
    println!(
        "\nMedian ns for each leaf, one other CPU to interrupt at 1 us; interrupts for each 1000 leaves\n"
    );
    println!("| | W2 | | W4 | |\n| --- | ---: | ---: | ---: | ---: |");
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
        println!("| {} | {} |", flusher.name(), cells.collect::<Vec<_>>().join(" | "));
    }
}

type Column = Vec<(Entry, Series)>;

fn row(column: &Column, entry: Entry) -> Option<&Series> {
    column.iter().find(|(other, _)| *other == entry).map(|(_, series)| series)
}

fn print_table(entries: &[Entry], columns: &[Column], value: impl Fn(&Series, &Column) -> Option<f64>) {
    print_cells(&Workload::ALL.map(|workload| workload.name().into()), entries, columns, value);
}

fn print_cells(
    names: &[String],
    entries: &[Entry],
    columns: &[Column],
    value: impl Fn(&Series, &Column) -> Option<f64>,
) {
    println!("| | {} |", names.join(" | "));
    println!("| --- |{}", " ---: |".repeat(names.len()));
    for entry in entries {
        let cells: Vec<String> = columns
            .iter()
            .map(|column| {
                let number = row(column, *entry).and_then(|series| value(series, column));
                number.map_or_else(|| "-".into(), three_digits)
            })
            .collect();
        println!("| {} | {} |", entry.name(), cells.join(" | "));
    }
}

fn three_digits(number: f64) -> String {
    match number {
        0.0..10.0 => format!("{number:.2}"),
        10.0..100.0 => format!("{number:.1}"),
        _ => format!("{number:.0}"),
    }
}
