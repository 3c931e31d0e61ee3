//! The intrusive free lists that all rows of the table share: how much of a row they cost.

use core::hint::black_box;
use core::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use mmu_measured::memory::{Memory, Order};
use mmu_measured::shuffle;

fn free_lists(criterion: &mut Criterion) {
    let small = std::env::args().any(|argument| argument == "--test");
    let count: u64 = if small { 64 } else { 16384 };
    let memory = Memory::new();
    let mut group = criterion.benchmark_group("free lists");
    group.throughput(Throughput::Elements(count));
    for order in [Order::Ascending, Order::Shuffled] {
        let mut frames: Vec<u64> = (0..count).map(|number| Memory::data_start() + (number << 12)).collect();
        if order == Order::Shuffled {
            shuffle(&mut frames);
        }
        frames.iter().for_each(|frame| memory.make_page(*frame));
        group.bench_function(BenchmarkId::new("free a page", format!("{order:?}")), |bencher| {
            bencher.iter(|| frames.iter().for_each(|frame| memory.free_page(*frame)));
        });
    }
    group.throughput(Throughput::Elements(count));
    group.bench_function("allocate a table (zeroed) and free it", |bencher| {
        memory.reset(count, Order::Ascending);
        let mut tables = Vec::new();
        bencher.iter(|| {
            tables.extend(core::iter::from_fn(|| memory.allocate_table()));
            for table in tables.drain(..) {
                memory.free_table(black_box(table).start_address().as_u64());
            }
        });
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(500));
    targets = free_lists
}
criterion_main!(benches);
