//! When nothing is going on, what a CPU has cached must agree with memory, as far as its slots say
//! it does.
//!
//! This is rule T2 taken at its word: a slot at the generation of its address space promises that
//! everything cached under its PCID is as new as the page tables, whether or not the CPU will look
//! at the generation before it uses it.

use mmu_gather::Mm;
use mmu_gather::tlb::{CpuId, Cpus, PcidSupport, Slot};
use x86_64::structures::paging::PhysFrame;

use crate::checker::checked::Caches;
use crate::checker::kind::ViolationKind;
use crate::machine::HostedMachine;
use crate::mmu::watch::{CachedEntry, Tag, Use};
use crate::mutex::lock;

/// A kernel at rest, and the address spaces that it has.
struct AtRest<'a, K: Cpus> {
    machine: &'a HostedMachine,
    kernel: &'a K,
    mms: &'a [&'a Mm<K::Bits>],
}

impl HostedMachine {
    /// On every CPU, what is cached must be what page tables say, as far as the CPU's slots promise
    /// it: for a kernel that flushes by the engine's shootdown, with the slots in its `CpuTlb`s.
    ///
    /// Nothing else runs, and no gather is open. `mms` are all address spaces that have not exited.
    pub fn compare_caches_with_slots<K: Cpus>(&self, kernel: &K, mms: &[&Mm<K::Bits>]) {
        AtRest { machine: self, kernel, mms }.compare();
    }
}

impl<K: Cpus> AtRest<'_, K> {
    fn compare(&self) {
        let machine = self.machine;
        for cpu in &machine.cpus {
            let id = cpu.id;
            let caches = lock(&cpu.caches);
            let Some(Caches { mmu, .. }) = &*caches else { return };
            let wrong: Option<(ViolationKind, CachedEntry)> = mmu.entries().find_map(|entry| {
                let mm = self.mm_of(id, &entry, mmu.cr3().0)?;
                match entry.held.as_a {
                    Use::Root => {
                        let member = mm.context().cpumask().contains(id);
                        (!member).then_some((ViolationKind::NotInCpumask, entry))
                    }
                    Use::Page(_) | Use::Table(_) if !self.promises_to_be_new(id, &entry, mm) => None,
                    Use::Page(_) | Use::Table(_) => {
                        let agrees = machine.agrees(mm.space().root(), &entry);
                        (!agrees).then_some((ViolationKind::SlotIsOlder, entry))
                    }
                }
            });
            drop(caches);
            if let (Some((kind, entry)), Some(checked)) = (wrong, &machine.checked) {
                machine.report(checked, kind, id, entry.address.as_u64(), entry.frame, Some(entry));
            }
        }
    }

    /// The address space whose translations an entry is among, by what the CPU's slots say; none if
    /// it has exited.
    fn mm_of(&self, cpu: CpuId, entry: &CachedEntry, loaded_root: PhysFrame) -> Option<&Mm<K::Bits>> {
        let mut mms = self.mms.iter().copied();
        if entry.held.as_a == Use::Root {
            return mms.find(|mm| mm.space().root() == entry.frame);
        }
        match self.machine.options.pcid {
            PcidSupport::Off => mms.find(|mm| mm.space().root() == loaded_root),
            PcidSupport::On => {
                let slot = self.slot_of(cpu, entry)?;
                mms.find(|mm| slot.ctx_id == Some(mm.context().ctx_id()))
            }
        }
    }

    fn slot_of(&self, cpu: CpuId, entry: &CachedEntry) -> Option<Slot> {
        let Tag::Pcid(pcid) = entry.held.tag else { return None };
        let slots = self.kernel.cpu_state(cpu).slots();
        match self.machine.options.pcid {
            PcidSupport::Off => slots.map(|(_, slot)| slot).next(),
            // PCID 0 is the kernel's own, slot n has PCID n + 1.
            PcidSupport::On => slots.map(|(_, slot)| slot).nth(usize::from(pcid.value()).checked_sub(1)?),
        }
    }

    /// Whether the slot is at the generation of its address space, and no deferred flush is owed.
    fn promises_to_be_new(&self, cpu: CpuId, entry: &CachedEntry, mm: &Mm<K::Bits>) -> bool {
        let context = mm.context();
        let slot = self.slot_of(cpu, entry);
        slot.is_some_and(|slot| slot.ctx_id == Some(context.ctx_id()) && slot.tlb_gen == context.tlb_gen())
    }
}
