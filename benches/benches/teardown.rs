//! What a leaf costs, from clearing its entry to its frame on the free list: the engine and its
//! floors.

use core::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use mmu_benches::engine;
use mmu_benches::entry::{Clock, Counts, Entry, Path, Sampler};
use mmu_gather::tlb::OnlineCpus;
use mmu_measured::machine::{Batched, Machine};
use mmu_measured::memory::Memory;
use mmu_measured::shape::{Size, Workload};
use mmu_measured::space::Space;

fn teardown(criterion: &mut Criterion) {
    let size = if std::env::args().any(|argument| argument == "--test") {
        Size::Small
    } else {
        Size::for_this_machine()
    };
    let memory = Memory::new();
    let sampler = Sampler::new(&memory);
    for workload in Workload::ALL {
        let shape = workload.shape(size);
        let mut group = criterion.benchmark_group(format!("teardown/{}", workload.name()));
        group.throughput(Throughput::Elements(shape.nr_leaves()));
        let rows = [
            Entry::PLAIN,
            Entry::EXCHANGE,
            Entry::Engine(Path::Exit, Counts::Batched),
            Entry::Engine(Path::Munmap, Counts::Batched),
            Entry::Engine(Path::MunmapEach, Counts::Batched),
        ];
        for entry in rows.into_iter().filter(|entry| entry.applies_to(workload)) {
            group.bench_function(BenchmarkId::from_parameter(entry.name()), |bencher| {
                bencher.iter_custom(|iterations| {
                    let mut clock = Clock::default();
                    for _ in 0..iterations {
                        sampler.sample(&shape, entry, &mut clock);
                    }
                    clock.elapsed
                });
            });
        }
        group.finish();
    }
    fixed_costs(criterion, &memory);
}

/// The cost that does not depend on how much is torn down.
fn fixed_costs(criterion: &mut Criterion, memory: &Memory) {
    let machine = Machine::<Batched>::new(memory, OnlineCpus::Many);
    let shape = Workload::W7OnePage.shape(Size::Small);
    let space = Space::new(&machine, &shape);
    let mut group = criterion.benchmark_group("gather");
    group.bench_function("begin and finish, nothing unmapped", |bencher| {
        bencher.iter(|| engine::nothing(&machine, &space));
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = teardown
}
criterion_main!(benches);
