//! Two threads of one program that each give memory back, in tables of their own: how much more
//! two get done than one.
//!
//! `cargo bench -p mmu-benches --bench same_space` prints the table of README.md. After `--`:
//! `--test` runs everything once, `--quick` takes fewer rounds, `--write` puts the figures into
//! README.md.
//!
//! Each thread plays a CPU, has its own tables, frames and counters, and calls MADV_DONTNEED of 1
//! or 16 pages. No CPU has the address space loaded, so nobody is interrupted: what is left in
//! common is what the engine itself keeps of an address space. The floor is a thread that does the
//! one write which they cannot but share: it raises a number.
#![expect(unsafe_code, reason = "plays CPUs, and builds page tables")]

use core::cell::Cell;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use core::time::Duration;
use std::io;
use std::time::Instant;

use mmu_benches::document::Page;
use mmu_gather::pagetable::{EntryValue, Level, PagingMode, TableLock, TableMemory, UsedLines, VirtRange};
use mmu_gather::spin::Spin;
use mmu_gather::tlb::{CachedTranslations, CpuId, CpuSet, CpuTlb, Cpus, CtxIds};
use mmu_gather::{
    BatchArena, BatchPage, Disposition, FreedPages, GatherEvent, Limits, Mm, Pages, UnmappedLeaf, Vma,
    VmaKind, zap_page_range,
};
use mmu_measured::machine::Bits;
use mmu_measured::preempted::times_preempted;
use x86_64::PhysAddr;
use x86_64::instructions::tlb::Pcid;
use x86_64::structures::paging::mapper::PageTableFrameMapping;
use x86_64::structures::paging::{PageTable, PageTableFlags, PhysFrame};

const PAGE: u64 = 4096;
const TABLE: u64 = 1 << 21;
/// Tables of each thread.
const TABLES: u64 = 8;
/// Where the areas of the threads begin: apart, as the heaps of threads are.
const HEAP: u64 = 64 << 20;
const START: u64 = 0x7f00_0000_0000;
/// Frames for tables.
const FRAMES: usize = 64;

/// A table and what the kernel knows of it, each in lines of its own.
#[repr(C, align(4096))]
struct Frame {
    table: UnsafeCell<PageTable>,
    lock: TableLock<Spin>,
    used_lines: UsedLines,
}

/// What the threads share.
struct Shared {
    frames: Vec<Frame>,
    given_out: AtomicUsize,
    cpus: [CpuTlb<Bits>; 2],
    mm: Box<Mm<Bits>>,
}

// SAFETY: tables are changed by atomic accesses alone.
unsafe impl Sync for Shared {}

/// One thread.
struct Thread<'s> {
    shared: &'s Shared,
    me: CpuId,
    batches: BatchArena,
    freed: Cell<usize>,
    /// Flushes of the whole address space because another gather was open.
    whole: Cell<u64>,
}

fn number_of(frame: PhysFrame) -> usize {
    usize::try_from(frame.start_address().as_u64() / PAGE).expect("x86_64: usize has 64 bits")
}

// SAFETY: a frame of a table is an element of `frames`, which is neither moved nor freed.
unsafe impl PageTableFrameMapping for Thread<'_> {
    #[inline]
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        self.shared.frames[number_of(frame)].table.get()
    }
}

// SAFETY: a table is zeroed, and given out once; each has a lock of its own.
unsafe impl TableMemory for Thread<'_> {
    type Lock = TableLock<Spin>;

    #[inline]
    unsafe fn table_lock(&self, table: PhysFrame) -> &TableLock<Spin> {
        &self.shared.frames[number_of(table)].lock
    }

    #[inline]
    unsafe fn used_lines(&self, table: PhysFrame) -> Option<&UsedLines> {
        Some(&self.shared.frames[number_of(table)].used_lines)
    }

    fn allocate_table(&self) -> Option<PhysFrame> {
        let number = self.shared.given_out.fetch_add(1, Ordering::Relaxed);
        (number < FRAMES).then(|| frame(number as u64))
    }

    unsafe fn free_tables(&self, tables: &[PhysFrame]) {
        assert!(tables.is_empty(), "every table stays");
    }
}

fn frame(number: u64) -> PhysFrame {
    PhysFrame::containing_address(PhysAddr::new(number * PAGE))
}

// SAFETY: a thread is one CPU, which loads nothing, and so holds no translation.
unsafe impl Cpus for Thread<'_> {
    type Bits = Bits;

    #[inline]
    fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R {
        f(self.me)
    }

    #[inline]
    fn cpu_state(&self, cpu: CpuId) -> &CpuTlb<Bits> {
        &self.shared.cpus[cpu.index()]
    }

    fn init_root(&self) -> PhysFrame {
        frame(0)
    }

    fn send_flush_interrupt(&self, targets: &CpuSet<Bits>) {
        assert!(targets.is_empty(), "nobody has the address space loaded");
    }

    #[inline]
    fn without_interrupts<R>(&self, f: impl FnOnce() -> R) -> R {
        f()
    }

    fn invlpg(&self, _: u64) {}

    unsafe fn load_cr3(&self, _: PhysFrame, _: Pcid, _: CachedTranslations) {}
}

impl Pages for Thread<'_> {
    type Area = ();

    #[inline]
    fn unmap_page(&self, (): (), _: &UnmappedLeaf) -> Disposition {
        Disposition::Free
    }

    #[inline]
    fn free_pages(&self, pages: FreedPages<'_>) {
        self.freed.set(self.freed.get() + pages.iter().count());
    }

    fn allocate_batch(&self) -> Option<BatchPage> {
        // SAFETY: a gather gives its pages back before the thread ends.
        unsafe { self.batches.allocate() }
    }

    fn free_batch(&self, page: BatchPage) {
        self.batches.free(page);
    }

    #[inline]
    fn observe_gather(&self, event: GatherEvent) {
        if event == GatherEvent::NestedFlush {
            self.whole.set(self.whole.get() + 1);
        }
    }
}

impl Shared {
    fn new() -> Self {
        let empty = || Frame {
            table: UnsafeCell::new(PageTable::new()),
            lock: TableLock::new(()),
            used_lines: UsedLines::new(),
        };
        // SAFETY: frame 1 is an empty table, given out to nobody else; one source of names.
        let mm = unsafe { Mm::new(&CtxIds::new(), frame(1), PagingMode::FourLevel) };
        Self {
            frames: (0..FRAMES).map(|_| empty()).collect(),
            given_out: AtomicUsize::new(2),
            cpus: [CpuTlb::new(), CpuTlb::new()],
            mm: Box::new(mm),
        }
    }

    fn thread(&self, me: u32) -> Thread<'_> {
        Thread {
            shared: self,
            me: CpuId::new(me),
            batches: BatchArena::new(None),
            freed: Cell::new(0),
            whole: Cell::new(0),
        }
    }
}

impl Thread<'_> {
    fn area(&self) -> VirtRange {
        let start = START + self.me.index() as u64 * HEAP;
        VirtRange::new(start, start + TABLES * TABLE).expect("not empty")
    }

    /// Maps every page of the thread's tables.
    fn fill(&self) {
        let flags = PageTableFlags::WRITABLE
            | PageTableFlags::USER_ACCESSIBLE
            | PageTableFlags::ACCESSED
            | PageTableFlags::DIRTY;
        let area = self.area();
        for table in (area.start()..area.end()).step_by(1 << 21) {
            // SAFETY: no table is ever freed.
            let view = unsafe { self.shared.mm.space().ensure_table(self, table, Level::Pte) };
            let locked = view.expect("there are frames enough").lock(self);
            for address in (table..table + TABLE).step_by(4096) {
                let page =
                    EntryValue::leaf(Level::Pte, PhysAddr::new((1 << 30) + (address & 0xfff_f000)), flags);
                // SAFETY: the entry is empty; the page is a number only.
                unsafe { locked.entry(address).store(page) };
            }
        }
    }

    /// Unmaps all of it, `pages` at a time; returns how often.
    fn unmap(&self, pages: u64) -> u64 {
        let area = self.area();
        let vma = Vma { range: area, kind: VmaKind::Normal, area: () };
        let mut calls = 0;
        for start in (area.start()..area.end()).step_by(usize::try_from(pages * PAGE).expect("few")) {
            let range = VirtRange::new(start, start + pages * PAGE).expect("not empty");
            // SAFETY: the area stays, and no table is freed.
            let flushed = unsafe { zap_page_range(self, &self.shared.mm, &Limits::DEFAULT, &vma, range) };
            flushed.expect("no leaf is large").free();
            calls += 1;
        }
        calls
    }
}

/// What the threads do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// DONTNEED, so many pages a call.
    Discard(u64),
    /// Add to one word.
    Floor,
    /// Add to one word, and to a word of one's own before and after.
    FloorCounted,
}

impl Work {
    const ALL: [Self; 4] = [Self::Discard(1), Self::Discard(16), Self::Floor, Self::FloorCounted];

    fn name(self) -> String {
        match self {
            Self::Discard(1) => "DONTNEED of 1 page".into(),
            Self::Discard(pages) => format!("DONTNEED of {pages} pages"),
            Self::Floor => "floor: one number raised".into(),
            Self::FloorCounted => "floor: the same, and a count of one's own up and down".into(),
        }
    }
}

/// A word in a line of its own.
#[repr(align(128))]
struct Own(AtomicU64);

/// Calls in a second of each thread, summed, and the share of them that flushed everything; `None`
/// if a thread lost its CPU meanwhile.
fn sample(work: Work, threads: u32) -> Option<(f64, f64)> {
    let shared = Shared::new();
    let ready = AtomicUsize::new(0);
    let word = Own(AtomicU64::new(0));
    let play = |me: u32| {
        let thread = shared.thread(me);
        thread.fill();
        let own = Own(AtomicU64::new(0));
        let before = times_preempted();
        ready.fetch_add(1, Ordering::AcqRel);
        let patience = Instant::now();
        while ready.load(Ordering::Acquire) != threads as usize && patience.elapsed() < Duration::from_secs(5)
        {
            core::hint::spin_loop();
        }
        let start = Instant::now();
        let calls = match work {
            Work::Discard(pages) => thread.unmap(pages),
            Work::Floor => (0..20_000).map(|_| word.0.fetch_add(1, Ordering::SeqCst)).fold(0, |n, _| n + 1),
            Work::FloorCounted => (0..20_000)
                .map(|_| {
                    own.0.fetch_add(1, Ordering::AcqRel);
                    word.0.fetch_add(1, Ordering::SeqCst);
                    own.0.fetch_sub(1, Ordering::AcqRel)
                })
                .fold(0, |n, _| n + 1),
        };
        let took = start.elapsed();
        if let Work::Discard(_) = work {
            assert_eq!(thread.freed.get() as u64, TABLES * 512, "every page was freed");
        }
        (before == times_preempted()).then(|| (calls, took, thread.whole.get()))
    };
    let done: Option<Vec<_>> = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads).map(|me| scope.spawn(move || play(me))).collect();
        handles.into_iter().map(|handle| handle.join().expect("no thread fails")).collect()
    });
    let done = done?;
    let a_second = done.iter().map(|(calls, took, _)| *calls as f64 / took.as_secs_f64()).sum();
    let calls: u64 = done.iter().map(|(calls, ..)| calls).sum();
    let whole: u64 = done.iter().map(|(.., whole)| whole).sum();
    Some((a_second, whole as f64 / calls as f64))
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A row of the table: one thread and two in turn, until there are `rounds` of each.
fn row(work: Work, rounds: usize) -> String {
    let (mut alone, mut ratios, mut whole) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..10 * rounds {
        if ratios.len() == rounds {
            break;
        }
        if let (Some(one), Some(two)) = (sample(work, 1), sample(work, 2)) {
            alone.push(1e9 / one.0);
            ratios.push(two.0 / one.0);
            whole.push(100.0 * two.1);
        }
    }
    if ratios.len() < rounds {
        eprintln!("{}: {} rounds of {rounds}: the threads lose their CPUs", work.name(), ratios.len());
    }
    format!("| {} | {:.1} | {:.2} | {:.1} |\n", work.name(), median(alone), median(ratios), median(whole))
}

fn main() -> io::Result<()> {
    let has = |flag: &str| std::env::args().any(|argument| argument == flag);
    let rounds = if has("--test") {
        1
    } else if has("--quick") {
        11
    } else {
        101
    };
    let mut table = String::from(
        "| | one thread: ns a call | two: times one | of these flush all, % |\n| --- | ---: | ---: | ---: |\n",
    );
    for work in Work::ALL {
        table += &row(work, rounds);
    }
    println!("{table}");
    if has("--write") {
        Page::here("README.md").write("one space", &table)?;
    }
    Ok(())
}
