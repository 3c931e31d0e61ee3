//! Threads of one process use memory in ring 3 while the first CPU takes it away from them, in
//! every way there is.
//!
//! Two kinds of rounds:
//! - *caught reading*: every thread is known to be reading when the memory goes, and nobody gets
//!   the frames before every thread has noticed. So a forgotten flush is always seen: the thread
//!   goes on reading, and reads poison.
//! - *free for all*: threads write, read and fault at any moment. With three CPUs or more, the last
//!   one runs processes of its own meanwhile, so that what is freed has another owner at once.

use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use mmu_gather::pagetable::VirtRange;
use mmu_kernel_shim::{Error, PageContent, Protection};

use crate::checks::violation;
use crate::cpu::index::CpuIndex;
use crate::cpu::percpu::online;
use crate::cpu::{ipi, smp, watchdog};
use crate::println;
use crate::workloads::churn;
use crate::workloads::meeting::{self, Meeting};
use crate::workloads::program::{BareKernel, Found, StampedProcess, page_range};

/// The memory of a free for all, start and pages: more pages than are invalidated one by one, fewer
/// than an emulated TLB holds.
const REGION: (u64, u64) = (0x7f00_0000_0000, 48);
/// The part of the region that goes alone: few enough pages to be invalidated one by one.
const PART: (u64, u64) = (REGION.0 + 8 * 4096, 16);
/// Where the region is moved to and back from.
const ASIDE: (u64, u64) = (0x7e00_0000_0000, 48);
/// The bait: threads are caught reading its first page. It has many pages, so that a kernel that
/// frees each page when its entry is cleared frees the first one long before the flush.
const BAIT: (u64, u64) = (0x7d00_0000_0000, 512);
/// Pages of the bait that go alone, in every second round: few enough to be invalidated one by one.
const FEW_BAITS: u64 = 16;
/// Pages that are read before they are written to again. Few, because each of them maps the page of
/// zeroes first, which takes a flush to replace.
const LOOKED_AT: u64 = 4;
/// At most this many reads of one word, while a thread waits for it to go.
const WATCHED: u64 = 200_000;
/// Reads of one word in a free for all.
const GLANCED: u64 = 1000;
/// The first rounds, this many, catch threads reading,
const CAUGHT_FIRST: u64 = 12;
/// and so does one in this many of the rest.
const CAUGHT_LATER: u64 = 4;
/// Rounds between two lines of progress.
const PROGRESS: u64 = 100;

/// Runs `rounds` rounds.
///
/// # Errors
///
/// Whatever the kernel refused.
pub(crate) fn run_threads(kernel: &BareKernel, rounds: u64) -> Result<u64, Error> {
    let process = StampedProcess::new(kernel, churn::new_process_number(CpuIndex::FIRST))?;
    process.map(page_range(REGION.0, REGION.1))?;
    process.map(page_range(BAIT.0, BAIT.1))?;
    let cpus = online();
    let neighbour = cpus.iter().last().filter(|_| cpus.count() >= 3);
    let threads = Threads {
        process: &process,
        mode: AtomicU32::new(CATCHING),
        bait_is_out: AtomicBool::new(false),
        nr_reading: AtomicU32::new(0),
        nr_threads: cpus.count() - 1 - u32::from(neighbour.is_some()),
    };
    let ready = Meeting::new(u64::from(cpus.count()));
    let result = spin::Mutex::<_>::new(Ok(()));
    smp::on_every_cpu(&|me| {
        ready.meet();
        if me == CpuIndex::FIRST {
            watchdog::note(&"taking memory away");
            *result.lock() = threads.take_away(rounds);
            threads.mode.store(OVER, Ordering::Relaxed);
            meeting::wake_others();
        } else if Some(me) == neighbour {
            watchdog::note(&"running processes of its own");
            meeting::halt_until(|| threads.mode.load(Ordering::Relaxed) != CATCHING);
            while threads.mode.load(Ordering::Relaxed) != OVER {
                churn::run_process(kernel, me, 16).unwrap_or(());
            }
        } else {
            watchdog::note(&"using memory");
            threads.use_memory();
        }
        kernel.go_lazy();
        ready.meet();
    });
    result.into_inner()?;
    kernel.exit(&process.mm)?;
    smp::on_every_cpu(&|_| kernel.switch_to(None));
    Ok(1)
}

/// The first rounds, in which nobody else allocates frames.
const CATCHING: u32 = 0;
/// All CPUs do what they like, the neighbour too.
const FREE_FOR_ALL: u32 = 1;
const OVER: u32 = 2;

/// What the threads share.
struct Threads<'a> {
    process: &'a StampedProcess<'a>,
    mode: AtomicU32,
    /// Threads should read the bait.
    bait_is_out: AtomicBool,
    nr_reading: AtomicU32,
    nr_threads: u32,
}

impl Threads<'_> {
    /// The work of a thread: what it finds in its own words must be its own stamps, or zero.
    fn use_memory(&self) {
        let (region, part, bait) =
            (page_range(REGION.0, REGION.1), page_range(PART.0, PART.1), page_range(BAIT.0, 1));
        let process = self.process;
        process.enter();
        while self.mode.load(Ordering::Relaxed) != OVER {
            if self.bait_is_out.load(Ordering::Relaxed) && process.write(bait) == Found::AsExpected {
                self.nr_reading.fetch_add(1, Ordering::Relaxed);
                ipi::wake(CpuIndex::FIRST);
                process.watch(bait, WATCHED);
                self.nr_reading.fetch_sub(1, Ordering::Relaxed);
                ipi::wake(CpuIndex::FIRST);
            }
            process.write(region);
            process.check(region);
            process.watch(part, GLANCED);
            process.check(region);
        }
    }

    /// The first CPU's part.
    fn take_away(&self, rounds: u64) -> Result<(), Error> {
        let (process, region) = (self.process, page_range(REGION.0, REGION.1));
        process.enter();
        process.write(region);
        for round in 0..rounds {
            if round == CAUGHT_FIRST {
                self.mode.store(FREE_FOR_ALL, Ordering::Relaxed);
                meeting::wake_others();
            }
            if round < CAUGHT_FIRST || round.is_multiple_of(CAUGHT_LATER) {
                self.catch_reading(round)?;
            }
            if let Some(dropped) = self.take_region(round)? {
                // This thread has not written there since. It must read zero: neither what it wrote
                // before, nor what another wrote.
                process.check_fresh(dropped).must_be(Found::AsExpected, "reading what was dropped");
            }
            // Nobody else drops pages, so what this thread finds is certain.
            process.write(region).must_be(Found::AsExpected, "writing");
            process.check(region).must_be(Found::AsExpected, "reading back");
            if round % PROGRESS == 0 {
                println!("progress: threads {round} of {rounds}");
            }
        }
        Ok(())
    }

    /// Unmaps what every thread is reading, and waits until each has noticed.
    fn catch_reading(&self, round: u64) -> Result<(), Error> {
        let (process, kernel) = (self.process, self.process.kernel);
        let all = page_range(BAIT.0, BAIT.1);
        let range = if round.is_multiple_of(2) { all } else { page_range(BAIT.0, FEW_BAITS) };
        kernel.populate(&process.mm, all, PageContent::Anon)?;
        let own = page_range(BAIT.0, LOOKED_AT);
        process.write(own).must_be(Found::AsExpected, "writing bait");
        process.check(own).must_be(Found::AsExpected, "reading bait");
        self.bait_is_out.store(true, Ordering::Relaxed);
        meeting::halt_until(|| self.nr_reading.load(Ordering::Relaxed) == self.nr_threads);
        kernel.munmap(&process.mm, range)?;
        // A thread that still has the translation goes on reading: the frames are free, and this
        // CPU takes none.
        meeting::halt_until(|| self.nr_reading.load(Ordering::Relaxed) == 0);
        self.bait_is_out.store(false, Ordering::Relaxed);
        if process.check(own) != Found::Signal {
            violation::usable_after_unmap(&kernel.machine().ledger, process.mm.root(), own.start());
        }
        // What is left of the bait goes, too.
        self.map_anew(all)
    }

    /// Unmaps whatever is in `range`, and maps all of it as one new area.
    fn map_anew(&self, range: VirtRange) -> Result<(), Error> {
        self.process.kernel.munmap(&self.process.mm, range)?;
        self.process.map(range)
    }

    /// Takes some of the region away, and returns where this thread's words must be zero now.
    fn take_region(&self, round: u64) -> Result<Option<VirtRange>, Error> {
        let (region, part, aside) =
            (page_range(REGION.0, REGION.1), page_range(PART.0, PART.1), page_range(ASIDE.0, ASIDE.1));
        let (kernel, mm) = (self.process.kernel, &self.process.mm);
        let dropped = match round % 6 {
            0 => {
                self.map_anew(region)?;
                region
            }
            1 => {
                kernel.madvise_dontneed(mm, part)?;
                part
            }
            2 => {
                self.map_anew(part)?;
                part
            }
            3 => {
                kernel.madvise_dontneed(mm, region)?;
                region
            }
            4 => {
                kernel.mprotect(mm, part, Protection::Read)?;
                kernel.mprotect(mm, part, Protection::Write)?;
                return Ok(None);
            }
            _ => {
                // The region may be several areas by now; after this it is one.
                self.map_anew(region)?;
                self.process.write(region);
                kernel.mremap(mm, region, aside)?;
                kernel.mremap(mm, aside, region)?;
                return Ok(None);
            }
        };
        Ok(Some(page_range(dropped.start(), LOOKED_AT)))
    }
}
