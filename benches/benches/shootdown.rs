//! Flushing one page while other threads play CPUs: alone, beside others, and against others.
//!
//! Where there are more CPUs than cores, what is measured is mostly how soon the operating system runs the next thread.

use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use std::sync::Barrier;
use std::time::Instant;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use mmu_benches::machine::Bits;
use mmu_benches::threads::{Cpu, MAX_CPUS, Threads};
use mmu_gather::tlb::{CtxIds, FreedTables, MmContext, PageSpan, flush_tlb_mm_range, switch_mm};
use x86_64::PhysAddr;
use x86_64::structures::paging::PhysFrame;

/// Who flushes what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    /// Each CPU its own address space: nobody is told.
    EachItsOwn,
    /// All CPUs the one they share: everybody tells everybody.
    AllTheSame,
    /// CPU 0 the one they share; the others only answer.
    OneTellsAll,
}

const PAGE: PageSpan = PageSpan { start: 0x1000, end: 0x2000, stride_shift: 12 };

fn shootdown(criterion: &mut Criterion) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    for who in [Who::EachItsOwn, Who::AllTheSame, Who::OneTellsAll] {
        let mut group = criterion.benchmark_group(format!("shootdown/{who:?}, {cores} cores"));
        for cpus in [1, 2, 4, 8, MAX_CPUS] {
            let initiators = if who == Who::OneTellsAll { 1 } else { cpus as u64 };
            group.throughput(Throughput::Elements(initiators));
            group.bench_function(BenchmarkId::new("CPUs", cpus), |bencher| {
                bencher.iter_custom(|iterations| run(who, cpus, iterations));
            });
        }
        group.finish();
    }
}

/// How long `iterations` flushes of each initiator took, all at the same time.
fn run(who: Who, cpus: usize, iterations: u64) -> Duration {
    let threads = Threads::new(cpus);
    let ids = CtxIds::new();
    let spaces: Vec<Padded> = (0..cpus)
        .map(|_| Padded(MmContext::new(&ids, PhysFrame::containing_address(PhysAddr::zero()))))
        .collect();
    let ready = Barrier::new(cpus);
    let longest = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for number in 0..u32::try_from(cpus).expect("at most 16") {
            let (threads, spaces, ready, longest) = (&threads, &spaces, &ready, &longest);
            scope.spawn(move || {
                // Spread over the cores by the operating system.
                play(threads, spaces, ready, longest, who, number, iterations);
            });
        }
    });
    if who == Who::OneTellsAll {
        // Every CPU forgot the page each time, or more at once.
        assert!(threads.invalidations() > 0, "nobody flushed");
    }
    Duration::from_nanos(longest.load(Ordering::Relaxed))
}

#[repr(align(128))]
struct Padded(MmContext<Bits>);

#[expect(unsafe_code, reason = "plays a CPU")]
fn play(
    threads: &Threads,
    spaces: &[Padded],
    ready: &Barrier,
    longest: &AtomicU64,
    who: Who,
    number: u32,
    iterations: u64,
) {
    // SAFETY: each thread has its own number.
    let cpu = unsafe { Cpu::new(threads, number) };
    let space = if who == Who::EachItsOwn { &spaces[number as usize].0 } else { &spaces[0].0 };
    // SAFETY: this thread is that CPU; the spaces outlive the threads, and their root is never walked.
    unsafe { switch_mm(&cpu, cpu.id(), Some(space)) };
    ready.wait();
    if who != Who::OneTellsAll || number == 0 {
        let start = Instant::now();
        for _ in 0..iterations {
            let _flushed = flush_tlb_mm_range(&cpu, space, PAGE, FreedTables::No);
        }
        let nanoseconds = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        longest.fetch_max(nanoseconds, Ordering::Relaxed);
    }
    cpu.answer_until_all_finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(500));
    targets = shootdown
}
criterion_main!(benches);
