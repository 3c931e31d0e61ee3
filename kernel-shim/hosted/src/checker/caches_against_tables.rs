//! When nothing is going on, what a CPU has cached must agree with memory, as far as its slots say
//! it does.
//!
//! This is rule T2 taken at its word: a slot at the generation of its address space promises that
//! everything cached under its PCID is as new as the page tables, whether or not the CPU will look
//! at the generation before it uses it.
#![expect(unsafe_code, reason = "reads page tables while nothing changes them")]

use std::sync::Arc;

use mmu_gather::pagetable::{Level, TableView};
use mmu_gather::tlb::{CpuId, Cpus, PcidSupport};
use x86_64::structures::paging::PhysFrame;

use crate::checker::checked::Caches;
use crate::checker::kind::ViolationKind;
use crate::checker::violation::Violation;
use crate::mmu::arch::TableLevel;
use crate::mmu::watch::{CachedEntry, Tag, Use};
use crate::mutex::lock;
use crate::program::{HostedKernel, HostedMm};

/// A kernel at rest, and the address spaces that it has.
#[derive(Clone, Copy)]
struct AtRest<'a> {
    kernel: &'a HostedKernel,
    mms: &'a [Arc<HostedMm>],
}

/// Compares, while nothing else runs and no gather is open. `mms` are all address spaces that have
/// not exited.
pub(crate) fn compare_caches_with_tables(kernel: &HostedKernel, mms: &[Arc<HostedMm>]) {
    AtRest { kernel, mms }.compare();
}

impl AtRest<'_> {
    fn compare(self) {
        let machine = self.kernel.machine();
        for number in 0..self.nr_cpus() {
            let cpu = CpuId::new(number);
            let caches = lock(&machine.cpus[cpu.index()].caches);
            let Some(Caches { mmu, .. }) = &*caches else { return };
            let wrong: Option<(ViolationKind, CachedEntry)> = mmu.entries().find_map(|entry| {
                let mm = self.mm_of(cpu, &entry, mmu.cr3().0)?;
                match entry.held.as_a {
                    Use::Root => {
                        let member = mm.engine().context().cpumask().contains(cpu);
                        (!member).then_some((ViolationKind::NotInCpumask, entry))
                    }
                    Use::Page(_) | Use::Table(_) if !self.promises_to_be_new(cpu, &entry, mm) => None,
                    Use::Page(_) => {
                        (!self.page_agrees(mm, &entry)).then_some((ViolationKind::SlotIsOlder, entry))
                    }
                    Use::Table(level) => {
                        (!self.table_agrees(mm, &entry, level)).then_some((ViolationKind::SlotIsOlder, entry))
                    }
                }
            });
            drop(caches);
            if let (Some((kind, entry)), Some(checked)) = (wrong, &machine.checked) {
                let address = entry.address.as_u64();
                checked.report(kind, || Violation {
                    kind,
                    cpu,
                    address,
                    frame: entry.frame,
                    freed: checked.ledger.when_freed(entry.frame),
                    entry: Some(entry),
                    story: checked.log.explaining(cpu, entry.frame, address),
                });
            }
        }
    }

    fn nr_cpus(&self) -> u32 {
        self.kernel.machine().options().nr_cpus
    }

    /// The address space whose translations an entry is among, by what the CPU's slots say; none if
    /// it has exited.
    fn mm_of(&self, cpu: CpuId, entry: &CachedEntry, loaded_root: PhysFrame) -> Option<&HostedMm> {
        let mut mms = self.mms.iter().map(|mm| &**mm);
        if entry.held.as_a == Use::Root {
            return mms.find(|mm| mm.root() == entry.frame);
        }
        match self.kernel.machine().options().pcid {
            PcidSupport::Off => mms.find(|mm| mm.root() == loaded_root),
            PcidSupport::On => {
                let slot = self.slot_of(cpu, entry)?;
                mms.find(|mm| slot.ctx_id == Some(mm.engine().context().ctx_id()))
            }
        }
    }

    fn slot_of(&self, cpu: CpuId, entry: &CachedEntry) -> Option<mmu_gather::tlb::Slot> {
        let Tag::Pcid(pcid) = entry.held.tag else { return None };
        let slots = self.kernel.cpu_state(cpu).slots();
        match self.kernel.machine().options().pcid {
            PcidSupport::Off => slots.map(|(_, slot)| slot).next(),
            // PCID 0 is the kernel's own, slot n has PCID n + 1.
            PcidSupport::On => slots.map(|(_, slot)| slot).nth(usize::from(pcid.value()).checked_sub(1)?),
        }
    }

    /// Whether the slot is at the generation of its address space, and no deferred flush is owed.
    fn promises_to_be_new(&self, cpu: CpuId, entry: &CachedEntry, mm: &HostedMm) -> bool {
        let context = mm.engine().context();
        let slot = self.slot_of(cpu, entry);
        slot.is_some_and(|slot| slot.ctx_id == Some(context.ctx_id()) && slot.tlb_gen == context.tlb_gen())
    }

    fn page_agrees(&self, mm: &HostedMm, entry: &CachedEntry) -> bool {
        let address = entry.address.as_u64();
        // SAFETY: nothing else runs, so no table is freed meanwhile.
        let found = unsafe { mm.engine().space().lookup(self.kernel, address) };
        found.translate(address) == Some(entry.frame.start_address())
            && (!entry.rights.writable() || found.value.is_writable())
            && (!entry.dirty || found.value.is_dirty())
    }

    fn table_agrees(&self, mm: &HostedMm, entry: &CachedEntry, level: TableLevel) -> bool {
        let level = match level {
            TableLevel::Pt => Level::Pte,
            TableLevel::Pd => Level::Pmd,
            TableLevel::Pdpt => Level::Pud,
            TableLevel::Pml4 | TableLevel::Pml5 => Level::P4d,
        };
        // SAFETY: nothing else runs, so no table is freed meanwhile.
        let table = unsafe { mm.engine().space().find_table(self.kernel, entry.address.as_u64(), level) };
        table.as_ref().map(TableView::frame) == Some(entry.frame)
    }
}
