//! Embedding the engine: everything a kernel writes to use it.
//!
//! Twenty-four methods, twelve of which the traits demand, in about 110 lines. The calls of `note`
//! and `check_...` are this kernel's own; an embedder does not need them. Frame numbers are heap
//! addresses here, so the number of a frame is its pointer.
#![expect(unsafe_code, reason = "the platform traits are unsafe: the engine believes what they say")]

use core::ptr;

use mmu_gather::pagetable::{Level, Marker, NonPresent, TableLock, TableMemory, UsedLines};
use mmu_gather::tlb::{
    CachedTranslations, CpuId, CpuSet, CpuTlb, Cpus, FlushRequest, OnlineCpus, PcidSupport, TlbEvent,
    flush_tlb_func,
};
use mmu_gather::{BatchPage, Disposition, Fate, FreedPages, GatherEvent, Pages, UnmappedLeaf};
use x86_64::instructions::tlb::Pcid;
use x86_64::structures::paging::mapper::PageTableFrameMapping;
use x86_64::structures::paging::{PageTable, PhysFrame};

use crate::kernel::PaperKernel;
use crate::log::Event;
use crate::options::{Answers, Bits, LineNotes, Locks};
use crate::table_page::{Deadlock, TablePage};

/// What backs an area. The engine hands it back with every page of the area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Pages of the program's own: freed with their last mapping.
    Anonymous,
    /// Pages of a file: a dirty one keeps its mapcount until nobody can write to it any more.
    File,
    /// Frames of a device: they are flushed, and never freed by this kernel.
    Device,
}

// SAFETY: the pointer is to the entries of a `TablePage` in the arena, which is never reset while
// the kernel lives.
unsafe impl PageTableFrameMapping for PaperKernel {
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        ptr::with_exposed_provenance_mut(address_of(frame))
    }
}

// SAFETY: tables come zeroed out of the arena and are never used twice; each has its own lock,
// beside its entries.
unsafe impl TableMemory for PaperKernel {
    type Lock = TableLock<Deadlock>;

    unsafe fn table_lock(&self, frame: PhysFrame) -> &TableLock<Deadlock> {
        self.note_lock(frame);
        self.lock_of(frame)
    }

    unsafe fn used_lines(&self, frame: PhysFrame) -> Option<&UsedLines> {
        match self.options().line_notes {
            LineNotes::Kept => Some(self.used_lines_of(frame)),
            LineNotes::NotKept => None,
        }
    }

    fn allocate_table(&self) -> Option<PhysFrame> {
        self.check_no_lock_is_held("allocate_table");
        self.table_supply().take().then(|| self.new_table())
    }

    unsafe fn free_tables(&self, tables: &[PhysFrame]) {
        self.check_before_freeing("free_tables");
        for table in tables {
            self.check_table_may_be_freed(*table);
            self.note(Event::TableFreed(*table));
        }
    }
}

// SAFETY: one thread plays every CPU: `here` says which, and nothing interrupts it. A target's
// flush runs to its end inside `flush_others`. The pretend TLB drops what is named.
unsafe impl Cpus for PaperKernel {
    type Bits = Bits;

    fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R {
        f(self.here())
    }

    fn cpu_state(&self, cpu: CpuId) -> &CpuTlb<Bits> {
        self.note(Event::StateRead(cpu));
        &self.cpu(cpu).state
    }

    fn init_root(&self) -> PhysFrame {
        self.kernel_root()
    }

    fn flush_others(
        &self,
        targets: &CpuSet<Bits>,
        request: &FlushRequest<'_, Bits>,
        meanwhile: impl FnOnce(),
    ) {
        self.check_ipi_is_allowed();
        let answers = self.options().answers;
        if answers == Answers::AtOnce {
            return meanwhile();
        }
        for cpu in targets.iter() {
            self.note(Event::Ipi { to: cpu });
            let named = if answers == Answers::ForAnother { self.here() } else { cpu };
            // SAFETY: `on` makes this thread that CPU, unless a test wants the mistake to be
            // noticed.
            self.on(named, || unsafe { flush_tlb_func(self, named, request) });
        }
        if answers != Answers::WithoutMeanwhile {
            self.note(Event::Meanwhile);
            meanwhile();
        }
        self.note(Event::Answered);
    }

    fn without_interrupts<R>(&self, f: impl FnOnce() -> R) -> R {
        f()
    }

    fn online_cpus(&self) -> OnlineCpus {
        self.options().online
    }

    fn pcid_support(&self) -> PcidSupport {
        self.options().pcid
    }

    fn single_page_flush_ceiling(&self) -> u64 {
        self.options().flush_ceiling
    }

    fn invlpg(&self, address: u64) {
        self.note(Event::Invlpg { cpu: self.here(), address });
        self.cpu(self.here()).tlb.borrow_mut().invlpg(address);
    }

    unsafe fn load_cr3(&self, root: PhysFrame, pcid: Pcid, cached: CachedTranslations) {
        let cpu = self.here();
        self.note(Event::Cr3 { cpu, root, pcid: pcid.value(), cached });
        self.cpu(cpu).tlb.borrow_mut().load_cr3(root, pcid.value(), cached);
        self.check_what_was_kept(cpu);
    }

    fn observe(&self, event: TlbEvent) {
        self.note(Event::Tlb(event));
    }
}

impl Pages for PaperKernel {
    type Area = Backing;

    fn unmap_page(&self, backing: Backing, leaf: &UnmappedLeaf) -> Disposition {
        self.note(Event::LeafCleared(*leaf));
        match backing {
            Backing::Device => Disposition::Keep,
            Backing::File if leaf.value.is_dirty() => Disposition::FreeAfterRmap,
            Backing::Anonymous | Backing::File => {
                self.ledger().remove_rmap(leaf.frame);
                Disposition::Free
            }
        }
    }

    fn free_pages(&self, pages: FreedPages<'_>) {
        self.check_before_freeing("free_pages");
        self.note(Event::FreeChunk { slots: pages.nr_slots() });
        for run in pages.iter() {
            self.release(run.frame, run.nr_pages);
        }
    }

    fn allocate_batch(&self) -> Option<BatchPage> {
        self.batch_supply().take().then(|| self.lend_batch()).flatten()
    }

    fn free_batch(&self, page: BatchPage) {
        self.take_batch_back(page);
    }

    fn remove_rmaps(&self, pages: FreedPages<'_>) {
        for run in pages.iter() {
            self.note(Event::RmapRemoved(run.frame));
            self.check_nobody_writes(run.frame);
            self.ledger().remove_rmap(run.frame);
        }
    }

    fn unmap_non_present(&self, _backing: Backing, address: u64, level: Level, entry: NonPresent) -> Fate {
        self.note(Event::NonPresentMet { address, level, entry });
        if entry == NonPresent::Marker(Marker::Guard) { Fate::Keep } else { Fate::Clear }
    }

    fn leaf_was_split(&self, _backing: Backing, leaf: &UnmappedLeaf) {
        self.note(Event::LeafSplit(*leaf));
        self.ledger().split(leaf.frame);
    }

    fn between_gather_steps(&self) {
        match self.steps_to_unwinding.take() {
            Some(0) => std::panic::resume_unwind(Box::new("the kernel's own")),
            left => self.steps_to_unwinding.set(left.map(|left| left - 1)),
        }
    }

    fn cond_resched(&self) {
        self.check_no_lock_is_held("cond_resched");
        self.note(Event::Resched);
    }

    fn observe_gather(&self, event: GatherEvent) {
        self.note_dirty_flush(event);
        self.note(Event::Gather(event));
    }
}

impl PaperKernel {
    pub(crate) fn lock_of(&self, table: PhysFrame) -> &TableLock<Deadlock> {
        match self.options().locks {
            // SAFETY: only frames of tables come here, and those are the first bytes of a
            // `TablePage` in the arena, which lives as long as `self`. The entries are not touched
            // through this reference.
            Locks::PerTable => unsafe { &(*page_of(table)).lock },
            Locks::Two => self.two_locks.lock_of(table),
            Locks::One => self.one_lock.lock_of(table),
        }
    }

    fn used_lines_of(&self, table: PhysFrame) -> &UsedLines {
        // SAFETY: as for the lock of a table, in `lock_of`.
        unsafe { &(*page_of(table)).used_lines }
    }
}

fn page_of(table: PhysFrame) -> *const TablePage {
    ptr::with_exposed_provenance(address_of(table))
}

/// A frame's number is an address of this process.
fn address_of(frame: PhysFrame) -> usize {
    usize::try_from(frame.start_address().as_u64()).expect("x86_64 has 64-bit pointers")
}
