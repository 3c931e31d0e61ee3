//! What happened: counted where it happens, on lines of the CPU's own, and added up when it is read
//! for the report.

use alloc::boxed::Box;
use core::sync::atomic::{AtomicU64, Ordering};

use mmu_gather::GatherEvent;
use mmu_gather::pagetable::Level;
use mmu_gather::tlb::{CpuId, TlbEvent};
use static_assertions::const_assert_eq;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What one CPU has counted. None is touched once per page.
        ///
        /// On cache lines of its own: counting an event takes nothing away from another CPU.
        #[derive(Debug, Default)]
        #[repr(align(64))]
        pub struct CpuCounters { $($(#[$doc])* pub(crate) $name: AtomicU64,)* }

        /// The counters at one moment: of one CPU, or of all.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Snapshot { $($(#[$doc])* pub $name: u64,)* }

        impl Snapshot {
            /// How many counters there are.
            pub const LEN: usize = [$(stringify!($name)),*].len();

            /// The names of all of them.
            pub const NAMES: [&'static str; Self::LEN] = [$(stringify!($name)),*];

            /// The counters alone, in the order of their names.
            #[must_use]
            pub const fn values(&self) -> [u64; Self::LEN] {
                [$(self.$name),*]
            }

            /// Every counter with its name.
            #[must_use]
            pub fn fields(&self) -> [(&'static str, u64); Self::LEN] {
                [$((stringify!($name), self.$name)),*]
            }

            /// The counter of this name, to be set.
            pub fn field_mut(&mut self, name: &str) -> Option<&mut u64> {
                match name {
                    $(stringify!($name) => Some(&mut self.$name),)*
                    _ => None,
                }
            }

            /// What two CPUs have counted together: the sums, and the higher of the high-water
            /// marks (`max_...`).
            #[must_use]
            pub fn and(&self, other: &Self) -> Self {
                let both = |name: &str, one: u64, other: u64| {
                    if is_mark(name) { one.max(other) } else { one.wrapping_add(other) }
                };
                Self { $($name: both(stringify!($name), self.$name, other.$name),)* }
            }

            /// What was counted since `before`; the high-water marks (`max_...`) stay as they are.
            #[must_use]
            pub fn since(&self, before: &Self) -> Self {
                let less =
                    |name: &str, now: u64, then: u64| if is_mark(name) { now } else { now.wrapping_sub(then) };
                Self { $($name: less(stringify!($name), self.$name, before.$name),)* }
            }
        }

        impl CpuCounters {
            /// The counters of this CPU now.
            #[must_use]
            pub fn snapshot(&self) -> Snapshot {
                Snapshot { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Flushes asked for that named pages.
    flushes_ranged,
    /// Flushes asked for that named a whole address space.
    flushes_full,
    /// Times a CPU was asked to flush and had nothing to do.
    flushes_skipped,
    /// Pages invalidated one by one, over all CPUs.
    invlpgs,
    /// Whole contexts dropped, over all CPUs.
    contexts_dropped,
    /// Interrupts sent for flushes.
    ipis_sent,
    /// CPUs not interrupted because they were lazy.
    ipis_saved_lazy,
    /// CPUs not interrupted because they ran something else and would compare generations.
    ipis_saved_elsewhere,
    /// Lazy CPUs that left for the kernel's own address space when asked.
    lazy_left,
    /// Batch pages taken.
    batches,
    /// Batch pages wanted and not had.
    batches_refused,
    /// Flushes because a gather was full.
    forced_flushes,
    /// Flushes under a table lock, for dirty pages.
    dirty_flushes,
    /// Whole flushes because another gather was open.
    nested_flushes,
    /// PTE tables unhooked.
    pte_tables,
    /// PMD tables unhooked.
    pmd_tables,
    /// PUD tables unhooked.
    pud_tables,
    /// P4D tables unhooked (five levels only).
    p4d_tables,
    /// Tables freed alone, for want of a batch page.
    table_fallbacks,
    /// Leaves cleared.
    leaves,
    /// Most leaves cleared under one lock.
    max_leaves_per_lock,
    /// Slots of pages freed.
    released_slots,
    /// Tables freed.
    released_tables,
    /// Most slots of pages waiting at one flush.
    max_deferred_slots,
    /// Most tables waiting at one flush.
    max_deferred_tables,
    /// Frames freed that were free already, or whose counts were wrong.
    double_frees,
    /// Faults answered by mapping a page.
    faults,
    /// Large leaves split.
    splits,
    /// Flushes of named pages that became full ones: more pages than the ceiling.
    ceilings_passed,
    /// Times a CPU that was asked to flush pages dropped the whole context: a generation was missed
    /// or another had followed.
    gap_flushes,
    /// Times a lazy CPU came back, had missed a flush, and dropped the whole context.
    caught_up,
    /// Deferred flushes of reclaim found outstanding under a table lock.
    deferred_seen,
    /// Page tables wanted and not had.
    tables_refused,
    /// Private pages replaced by a copy when a program wrote.
    copies,
    /// Faults answered from swap.
    swap_ins,
    /// Guards that stayed when pages around them were dropped.
    guards_kept,
    /// Faults refused because of a guard.
    guard_faults,
    /// Times a fault had put a page in before the guard came.
    guards_outrun,
    /// Frames for programs' pages that could not be had.
    frames_refused,
    /// Entries that mprotect looked at again, because hardware had set a bit.
    protect_retries,
    /// Entries that fork looked at again, because hardware had set a bit.
    fork_retries,
    /// Pages freed that had been queued as one record.
    runs_released,
    /// Reads answered with the 2 MiB page of zeroes.
    zero_blocks,
    /// Writes that put a 2 MiB page in its place.
    zero_blocks_replaced,
}

const_assert_eq!(align_of::<CpuCounters>(), 64);

/// Whether this counter is a high-water mark.
fn is_mark(name: &str) -> bool {
    name.starts_with("max_")
}

/// The counters of one kernel: a block for each CPU.
#[derive(Debug)]
pub struct Counters {
    cpus: Box<[CpuCounters]>,
}

impl Counters {
    pub(crate) fn new(nr_cpus: u32) -> Self {
        Self { cpus: (0..nr_cpus).map(|_| CpuCounters::default()).collect() }
    }

    /// What `cpu` has counted.
    ///
    /// # Panics
    /// If there is no such CPU.
    #[must_use]
    #[inline]
    pub fn of_cpu(&self, cpu: CpuId) -> &CpuCounters {
        &self.cpus[cpu.index()]
    }

    /// What all CPUs have counted together.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        self.cpus.iter().fold(Snapshot::default(), |sum, cpu| sum.and(&cpu.snapshot()))
    }
}

/// An atomic addition, not a load and a store: an interrupt on this CPU counts, too.
fn add(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

impl CpuCounters {
    pub(crate) fn tlb(&self, event: TlbEvent, ceiling: u64) {
        match event {
            TlbEvent::Raised { span, .. } if span.is_some_and(|span| span.nr_pages() > ceiling) => {
                add(&self.ceilings_passed, 1);
            }
            TlbEvent::FlushedAllForPages => {
                add(&self.contexts_dropped, 1);
                add(&self.gap_flushes, 1);
            }
            TlbEvent::CaughtUp => add(&self.caught_up, 1),
            TlbEvent::Requested { pages: Some(_), .. } => add(&self.flushes_ranged, 1),
            TlbEvent::Requested { pages: None, .. } => add(&self.flushes_full, 1),
            TlbEvent::IpisSent(sent) => add(&self.ipis_sent, u64::from(sent)),
            TlbEvent::IpisSaved { lazy, elsewhere } => {
                add(&self.ipis_saved_lazy, u64::from(lazy));
                add(&self.ipis_saved_elsewhere, u64::from(elsewhere));
            }
            TlbEvent::FlushedPages(pages) => add(&self.invlpgs, pages),
            TlbEvent::FlushedAll => add(&self.contexts_dropped, 1),
            TlbEvent::AlreadyCurrent => add(&self.flushes_skipped, 1),
            TlbEvent::LeftLazyMm => add(&self.lazy_left, 1),
            // A later engine may have more to say than there are counters here.
            _ => {}
        }
    }

    pub(crate) fn gather(&self, event: GatherEvent) {
        match event {
            GatherEvent::BatchTaken => add(&self.batches, 1),
            GatherEvent::BatchRefused => add(&self.batches_refused, 1),
            GatherEvent::ForcedFlush => add(&self.forced_flushes, 1),
            GatherEvent::DirtyFlush => add(&self.dirty_flushes, 1),
            GatherEvent::NestedFlush => add(&self.nested_flushes, 1),
            GatherEvent::DeferredFlushSeen => add(&self.deferred_seen, 1),
            GatherEvent::TableFallback => add(&self.table_fallbacks, 1),
            GatherEvent::LockDropped { leaves } => {
                add(&self.leaves, u64::from(leaves));
                self.max_leaves_per_lock.fetch_max(u64::from(leaves), Ordering::Relaxed);
            }
            GatherEvent::TableUnhooked(level) => match level {
                Level::Pte => add(&self.pte_tables, 1),
                Level::Pmd => add(&self.pmd_tables, 1),
                Level::Pud => add(&self.pud_tables, 1),
                Level::P4d | Level::Pgd => add(&self.p4d_tables, 1),
            },
            GatherEvent::Released { slots, tables } => {
                add(&self.released_slots, slots);
                add(&self.released_tables, tables);
                self.max_deferred_slots.fetch_max(slots, Ordering::Relaxed);
                self.max_deferred_tables.fetch_max(tables, Ordering::Relaxed);
            }
            _ => {}
        }
    }

    pub(crate) fn double_free(&self) {
        add(&self.double_frees, 1);
    }

    pub(crate) fn fault(&self) {
        add(&self.faults, 1);
    }

    pub(crate) fn split(&self) {
        add(&self.splits, 1);
    }

    pub(crate) fn table_refused(&self) {
        add(&self.tables_refused, 1);
    }

    pub(crate) fn copied(&self) {
        add(&self.copies, 1);
    }

    pub(crate) fn swapped_in(&self) {
        add(&self.swap_ins, 1);
    }

    pub(crate) fn guard_kept(&self) {
        add(&self.guards_kept, 1);
    }

    pub(crate) fn guard_fault(&self) {
        add(&self.guard_faults, 1);
    }

    pub(crate) fn frame_refused(&self) {
        add(&self.frames_refused, 1);
    }

    pub(crate) fn protect_retried(&self) {
        add(&self.protect_retries, 1);
    }

    pub(crate) fn fork_retried(&self) {
        add(&self.fork_retries, 1);
    }

    pub(crate) fn run_released(&self) {
        add(&self.runs_released, 1);
    }

    pub(crate) fn zero_block(&self) {
        add(&self.zero_blocks, 1);
    }

    pub(crate) fn zero_block_replaced(&self) {
        add(&self.zero_blocks_replaced, 1);
    }

    pub(crate) fn guard_outrun(&self) {
        add(&self.guards_outrun, 1);
    }
}
