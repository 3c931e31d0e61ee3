//! The machine: every method of the three traits is a call of a function that is not defined here.
//!
//! Methods that only a debug build calls are left as they are (`answered_early`, `cr3`,
//! `most_turns`).

use core::ptr::{self, NonNull};
use core::sync::atomic::AtomicU64;

use mmu_gather::pagetable::{EntryValue, Level, NonPresent, TableLock, TableMemory, UsedLines};
use mmu_gather::spin::RelaxStrategy;
use mmu_gather::tlb::{
    Answers, CpuId, CpuSet, CpuTlb, Cpus, CtxId, OnlineCpus, PageSpan, PcidSupport, TlbEvent,
};
use mmu_gather::x86_64::PhysAddr;
use mmu_gather::x86_64::structures::paging::mapper::PageTableFrameMapping;
use mmu_gather::x86_64::structures::paging::{PageTable, PhysFrame};
use mmu_gather::{BatchPage, Disposition, Fate, FreedPages, GatherEvent, Pages, UnmappedLeaf};

/// Room for 256 CPUs.
pub(crate) type Bits = [AtomicU64; 4];

// Pointers to the engine's own types go as pointers to nothing in particular: C has no layout for
// them.
unsafe extern "C" {
    fn platform_frame_to_pointer(frame: u64) -> *mut PageTable;
    fn platform_table_lock(frame: u64) -> *const ();
    fn platform_used_lines(frame: u64) -> *const ();
    fn platform_allocate_table() -> u64;
    fn platform_free_tables(tables: *const (), count: usize);
    fn platform_relax();
    fn platform_pin() -> u32;
    fn platform_unpin();
    fn platform_cpu_state(cpu: u32) -> *const ();
    fn platform_init_root() -> u64;
    fn platform_send_flush_interrupt(cpu: u32);
    fn platform_wait_for_answers();
    fn platform_answered(initiator: u32);
    fn platform_interrupts_off() -> u64;
    fn platform_interrupts_back(flags: u64);
    fn platform_one_cpu() -> bool;
    fn platform_pcid_support() -> bool;
    fn platform_single_page_flush_ceiling() -> u64;
    fn platform_invalidate_secondary(ctx_id: u64, span: *const ());
    fn platform_observe(event: *const ());
    fn platform_unmap_page(area: u64, leaf: *const ()) -> u32;
    fn platform_free_page(frame: u64, nr_pages: u64);
    fn platform_remove_rmap(frame: u64, nr_pages: u64);
    fn platform_allocate_batch() -> *mut [u8; 4096];
    fn platform_free_batch(page: *mut [u8; 4096]);
    fn platform_unmap_non_present(area: u64, address: u64, level: u32, entry: *const ()) -> bool;
    fn platform_leaf_was_split(area: u64, leaf: *const ());
    fn platform_cond_resched();
    fn platform_observe_gather(event: *const ());
    fn platform_rights(address: u64, level: u32, entry: u64) -> u64;
    fn platform_unlink();
}

/// A pointer to `value`, for a function that is not defined here.
const fn opaque<T>(value: &T) -> *const () {
    ptr::from_ref(value).cast()
}

/// The machine; there is one, and it has no size.
#[derive(Debug)]
pub struct Machine;

/// What a CPU does while it waits for a table lock.
#[derive(Debug)]
pub struct Relax;

impl RelaxStrategy for Relax {
    fn relax() {
        // SAFETY: declared above as this package means it.
        unsafe { platform_relax() }
    }
}

fn frame(address: u64) -> PhysFrame {
    PhysFrame::containing_address(PhysAddr::new_truncate(address))
}

// SAFETY: what is called is not defined anywhere; nothing of this ever runs.
unsafe impl PageTableFrameMapping for Machine {
    #[inline]
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        // SAFETY: declared above as this package means it.
        unsafe { platform_frame_to_pointer(frame.start_address().as_u64()) }
    }
}

// SAFETY: as above.
unsafe impl TableMemory for Machine {
    type Lock = TableLock<Relax>;

    #[inline]
    unsafe fn table_lock(&self, frame: PhysFrame) -> &TableLock<Relax> {
        // SAFETY: declared above as this package means it.
        let lock = unsafe { platform_table_lock(frame.start_address().as_u64()) };
        // SAFETY: as above.
        unsafe { &*lock.cast() }
    }

    #[inline]
    unsafe fn used_lines(&self, frame: PhysFrame) -> Option<&UsedLines> {
        // SAFETY: declared above as this package means it.
        let lines: *const UsedLines = unsafe { platform_used_lines(frame.start_address().as_u64()) }.cast();
        // SAFETY: as above.
        unsafe { lines.as_ref() }
    }

    #[inline]
    fn allocate_table(&self) -> Option<PhysFrame> {
        // SAFETY: declared above as this package means it.
        let table = unsafe { platform_allocate_table() };
        (table != 0).then(|| frame(table))
    }

    #[inline]
    unsafe fn free_tables(&self, tables: &[PhysFrame]) {
        // SAFETY: declared above as this package means it.
        unsafe { platform_free_tables(tables.as_ptr().cast(), tables.len()) }
    }
}

// SAFETY: as above.
unsafe impl Cpus for Machine {
    type Bits = Bits;

    #[inline]
    fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R {
        // SAFETY: declared above as this package means it.
        let result = f(CpuId::new(unsafe { platform_pin() }));
        // SAFETY: as above.
        unsafe { platform_unpin() };
        result
    }

    #[inline]
    fn cpu_state(&self, cpu: CpuId) -> &CpuTlb<Bits> {
        // SAFETY: declared above as this package means it.
        let state = unsafe { platform_cpu_state(cpu.number()) };
        // SAFETY: as above.
        unsafe { &*state.cast() }
    }

    #[inline]
    fn init_root(&self) -> PhysFrame {
        // SAFETY: declared above as this package means it.
        frame(unsafe { platform_init_root() })
    }

    fn send_flush_interrupt(&self, targets: &CpuSet<Bits>) {
        for cpu in targets.iter() {
            // SAFETY: declared above as this package means it.
            unsafe { platform_send_flush_interrupt(cpu.number()) };
        }
    }

    #[inline]
    fn wait_for_answers(&self, _: Answers<'_, Bits>) {
        // SAFETY: declared above as this package means it.
        unsafe { platform_wait_for_answers() }
    }

    #[inline]
    fn answered(&self, initiator: CpuId) {
        // SAFETY: declared above as this package means it.
        unsafe { platform_answered(initiator.number()) }
    }

    #[inline]
    fn without_interrupts<R>(&self, f: impl FnOnce() -> R) -> R {
        // SAFETY: declared above as this package means it.
        let flags = unsafe { platform_interrupts_off() };
        let result = f();
        // SAFETY: as above.
        unsafe { platform_interrupts_back(flags) };
        result
    }

    #[inline]
    fn online_cpus(&self) -> OnlineCpus {
        // SAFETY: declared above as this package means it.
        if unsafe { platform_one_cpu() } { OnlineCpus::One } else { OnlineCpus::Many }
    }

    #[inline]
    fn pcid_support(&self) -> PcidSupport {
        // SAFETY: declared above as this package means it.
        if unsafe { platform_pcid_support() } { PcidSupport::On } else { PcidSupport::Off }
    }

    #[inline]
    fn single_page_flush_ceiling(&self) -> u64 {
        // SAFETY: declared above as this package means it.
        unsafe { platform_single_page_flush_ceiling() }
    }

    #[inline]
    fn invalidate_secondary(&self, ctx_id: CtxId, span: Option<PageSpan>) {
        // SAFETY: declared above as this package means it.
        unsafe { platform_invalidate_secondary(ctx_id.get(), opaque(&span)) }
    }

    #[inline]
    fn observe(&self, event: TlbEvent) {
        // SAFETY: declared above as this package means it.
        unsafe { platform_observe(opaque(&event)) }
    }
}

impl Pages for Machine {
    type Area = u64;

    #[inline]
    fn unmap_page(&self, area: u64, leaf: &UnmappedLeaf) -> Disposition {
        // SAFETY: declared above as this package means it.
        match unsafe { platform_unmap_page(area, opaque(leaf)) } {
            0 => Disposition::Keep,
            1 => Disposition::Free,
            _ => Disposition::FreeAfterRmap,
        }
    }

    #[inline]
    fn free_pages(&self, pages: FreedPages<'_>) {
        for run in pages.iter() {
            // SAFETY: declared above as this package means it.
            unsafe { platform_free_page(run.frame.start_address().as_u64(), run.nr_pages.into()) }
        }
    }

    #[inline]
    fn remove_rmaps(&self, pages: FreedPages<'_>) {
        for run in pages.iter() {
            // SAFETY: declared above as this package means it.
            unsafe { platform_remove_rmap(run.frame.start_address().as_u64(), run.nr_pages.into()) }
        }
    }

    #[inline]
    fn allocate_batch(&self) -> Option<BatchPage> {
        // SAFETY: declared above as this package means it.
        let page = NonNull::new(unsafe { platform_allocate_batch() })?;
        // SAFETY: as above.
        Some(unsafe { BatchPage::new(page) })
    }

    #[inline]
    fn free_batch(&self, page: BatchPage) {
        // SAFETY: declared above as this package means it.
        unsafe { platform_free_batch(page.into_inner().as_ptr()) }
    }

    #[inline]
    fn unmap_non_present(&self, area: u64, address: u64, level: Level, entry: NonPresent) -> Fate {
        // SAFETY: declared above as this package means it.
        let is_kept = unsafe { platform_unmap_non_present(area, address, level as u32, opaque(&entry)) };
        if is_kept { Fate::Keep } else { Fate::Clear }
    }

    #[inline]
    fn leaf_was_split(&self, area: u64, leaf: &UnmappedLeaf) {
        // SAFETY: declared above as this package means it.
        unsafe { platform_leaf_was_split(area, opaque(leaf)) }
    }

    #[inline]
    fn cond_resched(&self) {
        // SAFETY: declared above as this package means it.
        unsafe { platform_cond_resched() }
    }

    #[inline]
    fn observe_gather(&self, event: GatherEvent) {
        // SAFETY: declared above as this package means it.
        unsafe { platform_observe_gather(opaque(&event)) }
    }
}

/// The rights that mprotect gives.
pub(crate) fn rights(address: u64, level: Level, old: EntryValue) -> u64 {
    // SAFETY: declared above as this package means it.
    unsafe { platform_rights(address, level as u32, old.bits()) }
}

/// Takes areas out of the rmap.
pub(crate) fn unlink() {
    // SAFETY: declared above as this package means it.
    unsafe { platform_unlink() }
}
