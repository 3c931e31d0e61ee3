//! How the length of a batch changes the cost of a page: from the eight slots on the stack to 19
//! pages of 510.
//!
//! Once with flushes that cost nothing, which shows what the batches themselves cost, and once with
//! another CPU that takes a microsecond to interrupt.

use core::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use mmu_benches::engine;
use mmu_benches::entry::{Clock, Meter};
use mmu_gather::Limits;
use mmu_gather::tlb::OnlineCpus;
use mmu_measured::machine::{Batched, Machine};
use mmu_measured::memory::Memory;
use mmu_measured::shape::{Shape, Size, Workload};
use mmu_measured::space::Space;

fn batch(criterion: &mut Criterion) {
    let small = std::env::args().any(|argument| argument == "--test");
    let size = if small { Size::Small } else { Size::Full };
    let memory = Memory::new();
    for workload in [Workload::W2Dense64, Workload::W4Areas] {
        let shape = workload.shape(size);
        for (others, cost) in [(0, Duration::ZERO), (1, Duration::from_micros(1))] {
            let name = format!("batch/{}/{others} other CPUs, {cost:?} each", workload.name());
            let mut group = criterion.benchmark_group(name);
            group.throughput(Throughput::Elements(shape.nr_leaves()));
            let machine = Machine::<Batched>::new(&memory, OnlineCpus::Many).with_others(others, cost);
            let without = Machine::<Batched>::new(&memory, OnlineCpus::Many)
                .with_others(others, cost)
                .without_batches();
            group.bench_function("8 on the stack", |bencher| {
                bencher.iter_custom(|iterations| run(&without, &shape, &Limits::DEFAULT, iterations));
            });
            for (slots, pages) in [(64, 1), (126, 1), (254, 1), (510, 1), (510, 2), (510, 19)] {
                let limits = Limits::DEFAULT.with_batch_slots(slots).with_batch_pages(pages);
                group.bench_function(BenchmarkId::from_parameter(format!("{pages} x {slots}")), |bencher| {
                    bencher.iter_custom(|iterations| run(&machine, &shape, &limits, iterations));
                });
            }
            group.finish();
        }
    }
}

#[expect(unsafe_code, reason = "loads an address space into a CPU that is only played")]
fn run(machine: &Machine<'_, Batched>, shape: &Shape, limits: &Limits, iterations: u64) -> Duration {
    let mut clock = Clock::default();
    for _ in 0..iterations {
        let space = Space::new(machine, shape);
        // SAFETY: the space is boxed, and left below before it goes.
        unsafe { machine.load(&space.mm) };
        clock.measure(|| engine::munmap(machine, &space, limits));
        space.check(machine, shape.nr_leaves(), space.nr_tables());
        machine.leave();
    }
    clock.elapsed
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = batch
}
criterion_main!(benches);
