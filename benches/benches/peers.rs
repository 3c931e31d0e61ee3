//! The peer table: the engine, the floors, other crates and Linux on the same work, in one run.
//!
//! `cargo bench -p mmu-benches --bench peers` prints it; `-- --test` runs every row once on small sizes; `-- --quick` takes
//! fewer rounds; `-- --variants` adds what the same costs under other conditions.

use core::time::Duration;

use mmu_benches::entry::{Entry, Sampler};
use mmu_benches::memory::Memory;
use mmu_benches::rounds::{Series, measure};
use mmu_benches::shape::{Size, Workload};

fn main() {
    let has = |flag: &str| std::env::args().any(|argument| argument == flag);
    let (size, rounds, patience) = if has("--test") {
        (Size::Small, 1, Duration::ZERO)
    } else if has("--quick") {
        (Size::for_this_machine(), 5, Duration::from_secs(4))
    } else {
        (Size::for_this_machine(), 21, Duration::from_secs(25))
    };
    let mut entries = Entry::MAIN.to_vec();
    if has("--variants") || has("--test") {
        entries.extend(Entry::VARIANTS);
    }
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
    println!("\nMedian of the ratios to the plain floor, round by round\n");
    print_table(&entries, &columns, |series, column| series.ratio_to(row(column, Entry::PLAIN)?));
    println!("\nMedian of the ratios to the exchange floor, round by round\n");
    print_table(&entries, &columns, |series, column| series.ratio_to(row(column, Entry::EXCHANGE)?));
}

type Column = Vec<(Entry, Series)>;

fn row(column: &Column, entry: Entry) -> Option<&Series> {
    column.iter().find(|(other, _)| *other == entry).map(|(_, series)| series)
}

fn print_table(entries: &[Entry], columns: &[Column], value: impl Fn(&Series, &Column) -> Option<f64>) {
    let names: Vec<&str> = Workload::ALL.iter().map(|workload| workload.name()).collect();
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
