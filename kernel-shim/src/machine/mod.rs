//! What a machine supplies to this kernel.
#![expect(unsafe_code, reason = "a machine is believed about its memory and its CPUs")]

mod contents;

use mmu_gather::GatherEvent;
use mmu_gather::pagetable::{Level, PagingMode, TableLock, VirtRange};
use mmu_gather::tlb::{
    Answers, CachedTranslations, CpuBits, CpuId, CpuSet, CtxId, EarlyAnswer, Laziness, OnlineCpus, PageSpan,
    PcidSupport, Slot, TlbEvent,
};
use spin::RelaxStrategy;
use x86_64::instructions::tlb::Pcid;
use x86_64::structures::paging::{PageTable, PhysFrame};

use crate::vma::Protection;

pub use contents::{Contents, Moment, Place, Shows};

/// CPUs, interrupts and physical memory.
///
/// # Safety
/// - `frame_to_pointer` of any frame below `nr_frames` points to its 4096 bytes, valid as long as
///   the machine;
/// - `pinned` names the CPU it runs on and does not move; `without_interrupts` does what it says;
/// - `send_flush_interrupt` reaches every target, which then calls
///   [`Kernel::flush_interrupt`](crate::Kernel::flush_interrupt); nothing else calls that for it;
/// - `invlpg` and `load_cr3` do what the instructions do.
pub unsafe trait Machine: Sync {
    /// What a CPU does while it waits for a lock; it keeps answering interrupts.
    type Relax: RelaxStrategy;
    /// Storage for a set of CPUs.
    type Bits: CpuBits;

    /// How many CPUs there are, all of them online.
    fn nr_cpus(&self) -> u32;

    /// Frames of physical memory, numbered from 0.
    fn nr_frames(&self) -> u64;

    /// Frames at the bottom that are not the kernel's to give out.
    fn nr_reserved_frames(&self) -> u64;

    /// The bytes of a frame.
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable;

    /// The frame whose bytes start at `pointer`, which [`frame_to_pointer`](Self::frame_to_pointer)
    /// returned.
    fn pointer_to_frame(&self, pointer: *const PageTable) -> PhysFrame;

    /// Runs `f` on one CPU without being moved.
    fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R;

    /// Runs `f` with interrupts off on this CPU.
    fn without_interrupts<R>(&self, f: impl FnOnce() -> R) -> R;

    /// Interrupts every CPU in `targets`, which then calls
    /// [`Kernel::flush_interrupt`](crate::Kernel::flush_interrupt).
    fn send_flush_interrupt(&self, targets: &CpuSet<Self::Bits>);

    /// As [`Cpus::wait_for_answers`](mmu_gather::tlb::Cpus::wait_for_answers).
    fn wait_for_answers(&self, _answers: Answers<'_, Self::Bits>) {
        core::hint::spin_loop();
    }

    /// As [`Cpus::answered`](mmu_gather::tlb::Cpus::answered).
    fn answered(&self, _initiator: CpuId) {}

    /// As [`Cpus::answered_early`](mmu_gather::tlb::Cpus::answered_early): a machine that loses
    /// requests on purpose overrides it.
    ///
    /// # Panics
    /// Unless overridden.
    fn answered_early(&self, early: &EarlyAnswer) {
        panic!("{early}");
    }

    /// As [`Cpus::cr3`](mmu_gather::tlb::Cpus::cr3), for a machine whose CR3 is not the host's.
    fn cr3(&self) -> Option<PhysFrame> {
        None
    }

    /// INVLPG on this CPU.
    fn invlpg(&self, address: u64);

    /// MOV to CR3 on this CPU.
    ///
    /// # Safety
    /// As for [`Cpus::load_cr3`](mmu_gather::tlb::Cpus::load_cr3).
    unsafe fn load_cr3(&self, root: PhysFrame, pcid: Pcid, cached: CachedTranslations);

    /// Secondary TLBs forget `span` of the context, or all of it, before this returns.
    ///
    /// May be called under a table lock: see
    /// [`Cpus::invalidate_secondary`](mmu_gather::tlb::Cpus::invalidate_secondary).
    fn invalidate_secondary(&self, _ctx_id: CtxId, _span: Option<PageSpan>) {}

    /// Fills a new root table's upper half, so that the kernel stays mapped in it.
    fn prepare_root(&self, _root: PhysFrame) {}

    /// Whether more than one CPU may run.
    fn online_cpus(&self) -> OnlineCpus {
        if self.nr_cpus() == 1 { OnlineCpus::One } else { OnlineCpus::Many }
    }

    /// Whether PCIDs are on.
    fn pcid_support(&self) -> PcidSupport {
        PcidSupport::Off
    }

    /// How many levels page tables have on every CPU.
    fn paging_mode(&self) -> PagingMode {
        PagingMode::FourLevel
    }

    /// A preemption point.
    fn cond_resched(&self) {}

    /// Whether the kernel notes the used lines of its tables
    /// ([`TableMemory::used_lines`](mmu_gather::pagetable::TableMemory::used_lines)). The answer
    /// never changes.
    #[inline]
    fn notes_used_lines(&self) -> bool {
        true
    }

    /// Whether entries of areas that programs may not execute say so. It takes IA32_EFER.NXE, and
    /// areas that name what is code. The answer never changes.
    #[inline]
    fn forbids_execution(&self) -> bool {
        false
    }

    /// A moment at which something else may happen on other CPUs. The hosted machine lets it.
    #[inline]
    fn seam(&self, _seam: Seam) {}

    /// This CPU has dropped a table lock. A [`Seam::Unlock`], without a machine at hand: a lock is
    /// a byte, and does not know which it belongs to.
    #[inline]
    fn unlocked() {}

    /// Something a checker wants to know.
    #[inline]
    fn note(&self, _note: Note) {}

    /// Now, by a checker's clock: what a CPU caches later than this was cached after it.
    fn moment(&self) -> Moment {
        Moment::START
    }

    /// The lock of the table in `frame` is about to be taken. A [`Seam::Lock`].
    #[inline]
    fn about_to_lock(&self, _frame: PhysFrame, _lock: &TableLock<Self::Relax>) {
        self.seam(Seam::Lock);
    }

    /// Fills `count` frames from `first` on, which nobody else uses, with zeroes.
    fn zero_frames(&self, first: PhysFrame, count: u64) {
        for number in 0..count {
            // SAFETY: the machine's contract makes the 4096 bytes writable, and nobody else uses
            // them.
            unsafe { self.frame_to_pointer(first + number).write_bytes(0, 1) };
        }
    }

    /// Copies what is in frame `from` to `to`, which nobody else uses.
    fn copy_frame(&self, from: PhysFrame, to: PhysFrame) {
        let (from, to) = (self.frame_to_pointer(from), self.frame_to_pointer(to));
        // SAFETY: the machine's contract makes both readable and writable for 4096 bytes, and two
        // frames do not overlap.
        unsafe { from.copy_to_nonoverlapping(to, 1) };
    }

    /// Writes what is in `frame` to a disk.
    ///
    /// A machine without one, which this is unless overridden, loses it.
    fn write_to_disk(&self, _frame: PhysFrame, _place: Place) {}

    /// Reads what is at a place of a disk into `frame`, which nobody else uses.
    ///
    /// A machine without a disk, which this is unless overridden, reads zeroes.
    fn read_from_disk(&self, _place: Place, frame: PhysFrame) {
        self.zero_frames(frame, 1);
    }
}

/// The moments at which a machine may interleave other CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seam {
    /// An entry was looked at, and is about to be changed; its table is locked.
    Entry,
    /// A leaf was cleared; its table is locked.
    Cleared,
    /// A table lock is about to be taken.
    Lock,
    /// Pages or tables are about to be freed.
    Free,
    /// A frame was allocated.
    Allocate,
    /// A table lock was dropped.
    Unlock,
    /// Between two steps of what the engine does without a table lock: the count of open gathers,
    /// and what is owed to others.
    Step,
}

/// The most that a call does while it holds the map lock of an address space, the least first. Each
/// does what those before it do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum UnderMapLock {
    /// It waits for no other CPU, and frees nothing.
    WaitsForNobody,
    /// It waits for other CPUs to flush.
    Flushes,
    /// It frees early, when a gather has no room for more or holds dirty pages of a file; what the
    /// gather clears last is freed after the lock was dropped.
    FreesEarly,
    /// It frees.
    Frees,
}

/// What a frame is given out for, or was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameRole {
    /// A page of a program, or one lent to a gather.
    Page,
    /// The first of 512 frames of one.
    Block,
    /// A page table.
    Table,
}

/// What a kernel knows of the content of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nobody has written to it since it was read or written back.
    Clean,
    /// Somebody has.
    Dirty,
}

/// What a checker wants to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Note {
    /// The frame is in use from now on; its bytes are as they were when it was freed.
    Allocated(PhysFrame, FrameRole),
    /// The frame is free from now on; another use may follow at once.
    Freed(PhysFrame, FrameRole),
    /// Nothing maps this page of a file any more: it is written back if it is known to be dirty,
    /// and clean from now on.
    MappedByNobody(PhysFrame, Content),
    /// An unmapping is about to return: no program may use these addresses of the address space any
    /// more.
    Unmapped {
        /// The root table.
        root: PhysFrame,
        /// The addresses.
        range: VirtRange,
        /// Whether the CPU that unmaps runs programs, or merely borrows an address space: a lazy
        /// one may keep old translations until it wakes (rule T5).
        caller: Laziness,
    },
    /// Pages were discarded while their areas stay: no program may use what a CPU cached of these
    /// addresses before `since`.
    ///
    /// What was cached later may be of a page that a fault has just put there.
    Discarded {
        /// The root table.
        root: PhysFrame,
        /// The addresses; areas cover all of them.
        range: VirtRange,
        /// When the call began.
        since: Moment,
        /// As for `Unmapped`.
        caller: Laziness,
    },
    /// Programs lost rights, and the map lock is still held for writing: nothing cached of these
    /// addresses may allow more than this.
    Protected {
        /// The root table.
        root: PhysFrame,
        /// The addresses.
        range: VirtRange,
        /// What programs may do from now on.
        most: Protection,
        /// As for `Unmapped`.
        caller: Laziness,
    },
    /// A fault was answered: the entry maps this frame from now on.
    Mapped {
        /// The root table.
        root: PhysFrame,
        /// The page.
        address: u64,
        /// The frame.
        frame: PhysFrame,
    },
    /// A program may write to this page from now on because no other uses it.
    OwnedAlone {
        /// The root table.
        root: PhysFrame,
        /// The page.
        address: u64,
        /// The frame.
        frame: PhysFrame,
    },
    /// This CPU runs programs of the address space in CR3 from now on, or the kernel for them; or
    /// it is lazy, or switches, and uses no user address. Said before it goes lazy or switches, and
    /// after it has switched.
    Runs(Laziness),
    /// A leaf was cleared; its table is locked.
    Cleared {
        /// The first address it mapped.
        address: u64,
        /// Level of the table it was in.
        level: Level,
        /// The (first) frame it mapped.
        frame: PhysFrame,
    },
    /// A leaf lost rights; its table is locked.
    Restricted {
        /// The first address it maps.
        address: u64,
        /// Level of the table it is in.
        level: Level,
        /// The (first) frame it maps.
        frame: PhysFrame,
    },
    /// A large leaf makes way for a table of smaller ones; its table is locked, or the map lock is
    /// held for writing.
    Split {
        /// The first address it maps.
        address: u64,
        /// Level of the table it is in.
        level: Level,
        /// The first frame it maps.
        frame: PhysFrame,
    },
    /// This CPU asks that one to flush, and is going to wait for the answer.
    Asked(CpuId),
    /// The shootdown core did something on this CPU.
    Tlb {
        /// What.
        event: TlbEvent,
        /// What the slot of the loaded address space says after it.
        slot: Slot,
    },
    /// A gather did something on this CPU.
    Gather(GatherEvent),
    /// This CPU holds the map lock of an address space from now on, for reading or for writing, or
    /// has downgraded it.
    MapLocked {
        /// The root table.
        root: PhysFrame,
        /// The most that is done on this CPU until the lock is dropped, or until this is said
        /// again.
        most: UnderMapLock,
    },
    /// The kernel has given a gather a batch page.
    BatchTaken,
    /// The kernel had no batch page to give.
    BatchRefused,
    /// The kernel removes the reverse mapping of a page that was cleared after a flush, before the
    /// lock of its table is dropped.
    RmapDelayed,
    /// The call that this CPU makes works on so many areas.
    Areas(usize),
    /// This CPU is about to drop the map lock.
    MapUnlocked {
        /// The root table.
        root: PhysFrame,
    },
    /// What programs are to read changes.
    Contents(Contents),
}

// SAFETY: every method passes on to the machine behind the `Arc`, whose contract it is.
unsafe impl<M: Machine + Send> Machine for alloc::sync::Arc<M> {
    type Relax = M::Relax;
    type Bits = M::Bits;

    fn nr_cpus(&self) -> u32 {
        (**self).nr_cpus()
    }

    fn nr_frames(&self) -> u64 {
        (**self).nr_frames()
    }

    fn nr_reserved_frames(&self) -> u64 {
        (**self).nr_reserved_frames()
    }

    #[inline]
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        (**self).frame_to_pointer(frame)
    }

    fn pointer_to_frame(&self, pointer: *const PageTable) -> PhysFrame {
        (**self).pointer_to_frame(pointer)
    }

    fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R {
        (**self).pinned(f)
    }

    fn without_interrupts<R>(&self, f: impl FnOnce() -> R) -> R {
        (**self).without_interrupts(f)
    }

    fn send_flush_interrupt(&self, targets: &CpuSet<Self::Bits>) {
        (**self).send_flush_interrupt(targets);
    }

    fn wait_for_answers(&self, answers: Answers<'_, Self::Bits>) {
        (**self).wait_for_answers(answers);
    }

    fn answered(&self, initiator: CpuId) {
        (**self).answered(initiator);
    }

    fn answered_early(&self, early: &EarlyAnswer) {
        (**self).answered_early(early);
    }

    fn cr3(&self) -> Option<PhysFrame> {
        (**self).cr3()
    }

    fn invlpg(&self, address: u64) {
        (**self).invlpg(address);
    }

    unsafe fn load_cr3(&self, root: PhysFrame, pcid: Pcid, cached: CachedTranslations) {
        // SAFETY: passed on to our caller.
        unsafe { (**self).load_cr3(root, pcid, cached) };
    }

    fn invalidate_secondary(&self, ctx_id: CtxId, span: Option<PageSpan>) {
        (**self).invalidate_secondary(ctx_id, span);
    }

    fn prepare_root(&self, root: PhysFrame) {
        (**self).prepare_root(root);
    }

    fn online_cpus(&self) -> OnlineCpus {
        (**self).online_cpus()
    }

    fn pcid_support(&self) -> PcidSupport {
        (**self).pcid_support()
    }

    fn paging_mode(&self) -> PagingMode {
        (**self).paging_mode()
    }

    fn cond_resched(&self) {
        (**self).cond_resched();
    }

    #[inline]
    fn notes_used_lines(&self) -> bool {
        (**self).notes_used_lines()
    }

    #[inline]
    fn forbids_execution(&self) -> bool {
        (**self).forbids_execution()
    }

    #[inline]
    fn seam(&self, seam: Seam) {
        (**self).seam(seam);
    }

    #[inline]
    fn unlocked() {
        M::unlocked();
    }

    #[inline]
    fn note(&self, note: Note) {
        (**self).note(note);
    }

    fn moment(&self) -> Moment {
        (**self).moment()
    }

    #[inline]
    fn about_to_lock(&self, frame: PhysFrame, lock: &TableLock<Self::Relax>) {
        (**self).about_to_lock(frame, lock);
    }

    fn zero_frames(&self, first: PhysFrame, count: u64) {
        (**self).zero_frames(first, count);
    }

    fn copy_frame(&self, from: PhysFrame, to: PhysFrame) {
        (**self).copy_frame(from, to);
    }

    fn write_to_disk(&self, frame: PhysFrame, place: Place) {
        (**self).write_to_disk(frame, place);
    }

    fn read_from_disk(&self, place: Place, frame: PhysFrame) {
        (**self).read_from_disk(place, frame);
    }
}
