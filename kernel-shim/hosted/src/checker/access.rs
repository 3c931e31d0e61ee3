//! Accesses of programs, and walks on the way to them: neither may reach what is free.

use core::cell::Cell;

use mmu_gather::pagetable::PagingMode;
use mmu_gather::tlb::CpuId;
use x86_64::PhysAddr;
use x86_64::structures::paging::PhysFrame;

use crate::boundary::Boundary;
use crate::checker::checked::{Caches, Checked};
use crate::checker::events::{Detail, Fill, What};
use crate::checker::kind::ViolationKind;
use crate::checker::ledger::Ledger;
use crate::machine::HostedMachine;
use crate::memory::Memory;
use crate::mmu::arch::LinearAddress;
use crate::mmu::physical::PhysicalMemory;
use crate::mmu::watch::Held;
use crate::mmu::{AccessKind, AccessMode, Fault};
use crate::mutex::lock;
use crate::vocabulary::UserAccess;

/// Memory as a walk reads it, with an eye on walks through tables that are free.
pub(crate) struct WatchedMemory<'a> {
    pub(crate) memory: &'a Memory,
    pub(crate) ledger: &'a Ledger,
    pub(crate) freed_table: Cell<Option<PhysFrame>>,
    pub(crate) unknown_table: Cell<Option<PhysFrame>>,
}

impl<'a> WatchedMemory<'a> {
    pub(crate) const fn new(memory: &'a Memory, ledger: &'a Ledger) -> Self {
        Self { memory, ledger, freed_table: Cell::new(None), unknown_table: Cell::new(None) }
    }
}

impl PhysicalMemory for WatchedMemory<'_> {
    fn read(&self, address: PhysAddr) -> u64 {
        let frame = PhysFrame::containing_address(address);
        if self.ledger.when_freed(frame).is_some() {
            self.freed_table.set(Some(frame));
        } else if self.ledger.is_unknown(frame) {
            self.unknown_table.set(Some(frame));
        }
        self.memory.read(address)
    }

    fn fetch_or(&self, address: PhysAddr, bits: u64, expected: u64) -> Result<(), u64> {
        self.memory.fetch_or(address, bits, expected)
    }
}

impl HostedMachine {
    /// The program on this CPU uses an address, or the kernel in its name (`copy_to_user`), with no
    /// more rights. The frame it reaches, or the fault it takes.
    ///
    /// # Errors
    /// The fault; nothing was reached.
    pub fn user_access(&self, address: u64, access: UserAccess) -> Result<Option<PhysFrame>, Fault> {
        self.point_at(address);
        let Some(checked) = &self.checked else { return Ok(None) };
        let memory = WatchedMemory::new(&self.memory, &checked.ledger);
        let kind = match access {
            UserAccess::Read => AccessKind::Read,
            UserAccess::Write => AccessKind::Write,
            UserAccess::Fetch => AccessKind::Execute,
        };
        let (root, result) = match &mut *lock(&self.cpu().caches) {
            Some(Caches { mmu, watch }) => {
                let result = mmu.access(LinearAddress::new(address), kind, AccessMode::User, &memory, watch);
                log_fills(checked, self.current(), address, watch.take_fills(), Fill::Access);
                (mmu.cr3().0, result)
            }
            None => return Ok(None),
        };
        let here = self.current();
        if let Some(frame) = memory.freed_table.get() {
            self.report_walk(checked, here, address, frame);
        }
        let unknown = ViolationKind::NeverAllocated;
        if let Some(frame) = memory.unknown_table.get() {
            self.report(checked, unknown, here, address, frame, None);
        }
        self.check_sizes(checked, here.index());
        let reached = result?;
        let frame = PhysFrame::containing_address(reached.address);
        if checked.ledger.is_unknown(frame) {
            self.report(checked, unknown, here, address, frame, None);
        }
        if address >= PagingMode::FourLevel.user_end() {
            self.note_reached(Boundary::HighAddress);
        }
        self.log(What::Accessed(address, frame));
        if access == UserAccess::Write {
            checked.ledger.note_written(frame);
        }
        self.check_content(checked, root, (address, frame), access);
        if checked.ledger.when_freed(frame).is_some() {
            let kind = if reached.source.was_cached() {
                ViolationKind::PageReachableAfterFree
            } else {
                ViolationKind::FreePageMapped
            };
            self.report(checked, kind, here, address, frame, None);
        }
        Ok(Some(frame))
    }

    pub(crate) fn report_walk(&self, checked: &Checked, cpu: CpuId, address: u64, frame: PhysFrame) {
        self.report(checked, ViolationKind::TableReachableAfterFree, cpu, address, frame, None);
    }
}

/// Tells what entered the caches of a CPU on its way to `address`.
pub(crate) fn log_fills(
    checked: &Checked,
    cpu: CpuId,
    address: u64,
    fills: Vec<(PhysFrame, Held)>,
    fill: Fill,
) {
    for (frame, held) in fills {
        checked.log.detail(cpu, Detail::Filled(address, frame, held, fill));
    }
}
