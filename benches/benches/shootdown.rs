//! Flushing one page while other threads play CPUs: alone, beside others, and against others.
//!
//! `EachItsOwn` is the CPU time of one flush, which waits for nobody: it stays the same as for one
//! CPU as long as the CPUs write to no common cache line, and other work on the machine hardly
//! disturbs it. The other two are the time from when the first CPU begins until the last has
//! finished. Where there are more CPUs than cores, these mostly measure how soon the operating
//! system runs the next thread.

use core::pin::Pin;
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use std::sync::Barrier;
use std::time::Instant;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use mmu_benches::threads::{ByMail, Cpu, MAX_CPUS, Play, Threads};
use mmu_gather::tlb::{CtxIds, FreedTables, MmContext, PageSpan, flush_tlb_mm_range, switch_mm};
use mmu_measured::machine::Bits;
use mmu_measured::preempted::cpu_time;
use x86_64::PhysAddr;
use x86_64::structures::paging::PhysFrame;

/// How requests get to other CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// Through the engine's mailbox.
    Mail,
    /// Through one written by hand.
    ByHand,
}

/// Who flushes what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    /// Each CPU flushes its own address space: nobody is told.
    EachItsOwn,
    /// All CPUs flush the address space that they share: everybody tells everybody.
    AllTheSame,
    /// CPU 0 flushes the address space that they share; the others only answer.
    OneTellsAll,
}

const PAGE: PageSpan = PageSpan { start: 0x1000, end: 0x2000, stride_shift: 12 };

fn shootdown(criterion: &mut Criterion) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    for who in [Who::EachItsOwn, Who::AllTheSame, Who::OneTellsAll] {
        let mut group = criterion.benchmark_group(format!("shootdown/{who:?}, {cores} cores"));
        for cpus in [1, 2, 4, 8, MAX_CPUS] {
            // Flushes at a time.
            let elements = if who == Who::AllTheSame { cpus as u64 } else { 1 };
            group.throughput(Throughput::Elements(elements));
            for how in [How::Mail, How::ByHand] {
                group.bench_function(BenchmarkId::new(format!("{how:?}"), cpus), |bencher| {
                    bencher.iter_custom(|iterations| run(who, how, cpus, iterations));
                });
            }
        }
        group.finish();
    }
}

/// When the initiators began and ended.
#[derive(Debug)]
struct Times {
    zero: Instant,
    /// Nanoseconds after `zero`.
    first_start: AtomicU64,
    last_end: AtomicU64,
    /// Nanoseconds that the initiators ran, summed.
    cpu_time: AtomicU64,
}

impl Times {
    fn new() -> Self {
        Self {
            zero: Instant::now(),
            first_start: AtomicU64::new(u64::MAX),
            last_end: AtomicU64::new(0),
            cpu_time: AtomicU64::new(0),
        }
    }

    /// Does what one initiator does.
    fn measure(&self, work: impl FnOnce()) {
        self.first_start.fetch_min(nanoseconds(self.zero.elapsed()), Ordering::Relaxed);
        let ran = cpu_time();
        work();
        let ran = cpu_time() - ran;
        self.last_end.fetch_max(nanoseconds(self.zero.elapsed()), Ordering::Relaxed);
        self.cpu_time.fetch_add(nanoseconds(ran), Ordering::Relaxed);
    }

    fn of(self, who: Who, cpus: usize) -> Duration {
        match who {
            Who::EachItsOwn => Duration::from_nanos(self.cpu_time.into_inner() / cpus as u64),
            Who::AllTheSame | Who::OneTellsAll => {
                Duration::from_nanos(self.last_end.into_inner() - self.first_start.into_inner())
            }
        }
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// How long `iterations` flushes of each initiator took, all at the same time.
fn run(who: Who, how: How, cpus: usize, iterations: u64) -> Duration {
    let threads = Threads::new(cpus);
    let ids = CtxIds::new();
    // Side by side: their own alignment keeps them apart.
    let spaces: Vec<_> =
        // SAFETY: one source of names; nothing is mapped below the root that they seem to share.
        (0..cpus).map(|_| unsafe { MmContext::new(&ids, PhysFrame::containing_address(PhysAddr::zero())) }).collect();
    let ready = Barrier::new(cpus);
    let times = Times::new();
    std::thread::scope(|scope| {
        for number in 0..u32::try_from(cpus).expect("at most 16") {
            let (threads, spaces, ready, times) = (&threads, &spaces, &ready, &times);
            scope.spawn(move || {
                // Spread over the cores by the operating system.
                #[expect(unsafe_code, reason = "plays a CPU")]
                // SAFETY: each thread has its own number.
                let cpu = unsafe { Cpu::new(threads, number) };
                let space = &spaces[if who == Who::EachItsOwn { number as usize } else { 0 }];
                let iterations = if who == Who::OneTellsAll && number != 0 { 0 } else { iterations };
                match how {
                    How::Mail => play(&ByMail::new(cpu), space, ready, times, iterations),
                    How::ByHand => play(&cpu, space, ready, times, iterations),
                }
            });
        }
    });
    if who == Who::OneTellsAll {
        // Every CPU forgot the page each time, or more at once.
        assert!(threads.invalidations() > 0, "nobody flushed");
    }
    times.of(who, cpus)
}

#[expect(unsafe_code, reason = "plays a CPU")]
fn play<C: Play>(cpu: &C, space: &MmContext<Bits>, ready: &Barrier, times: &Times, iterations: u64) {
    // SAFETY: the spaces outlive the threads, and stay where they are.
    let pinned = unsafe { Pin::new_unchecked(space) };
    // SAFETY: this thread is that CPU, and the root is never walked.
    unsafe { switch_mm(cpu, cpu.cpu().id(), Some(pinned)) };
    ready.wait();
    if iterations > 0 {
        times.measure(|| {
            for _ in 0..iterations {
                let _flushed = flush_tlb_mm_range(cpu, space, PAGE, FreedTables::No);
            }
        });
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
