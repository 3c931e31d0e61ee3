//! A CPU, a little physical memory with page tables in it, and a watcher that counts.

use core::cell::{Cell, RefCell};
use std::collections::HashMap;

use mmu_hosted::arch::{LinearAddress, PageSize, PagingMode, TableLevel};
use mmu_hosted::features::Features;
use mmu_hosted::mmu::{Access, AccessKind, AccessMode, Fault, Mmu, PageFault};
use mmu_hosted::physical::PhysicalMemory;
use mmu_hosted::walk::{Depth, Speculation};
use mmu_hosted::watch::{FrameWatch, Held, Reach};
use x86_64::PhysAddr;
use x86_64::instructions::tlb::Pcid;
use x86_64::registers::control::Cr4Flags;
use x86_64::structures::paging::{PageTableFlags, PhysFrame};

pub(crate) const P: u64 = PageTableFlags::PRESENT.bits();
pub(crate) const W: u64 = PageTableFlags::WRITABLE.bits();
pub(crate) const U: u64 = PageTableFlags::USER_ACCESSIBLE.bits();
pub(crate) const A: u64 = PageTableFlags::ACCESSED.bits();
pub(crate) const D: u64 = PageTableFlags::DIRTY.bits();
pub(crate) const PS: u64 = PageTableFlags::HUGE_PAGE.bits();
pub(crate) const G: u64 = PageTableFlags::GLOBAL.bits();
pub(crate) const XD: u64 = PageTableFlags::NO_EXECUTE.bits();

/// Present, writable, user.
pub(crate) const PWU: u64 = P | W | U;

/// An address in the middle of the lower half, with a different index at every level.
pub(crate) const VA: LinearAddress = LinearAddress::new(0x0000_1234_5678_9000);

pub(crate) const PCID_ON: Cr4Flags = Cr4Flags::PCID.union(Cr4Flags::PAGE_GLOBAL);
pub(crate) const PCID_OFF: Cr4Flags = Cr4Flags::PAGE_GLOBAL;

pub(crate) fn pcid(number: u16) -> Pcid {
    Pcid::new(number).expect("a PCID below 4096")
}

pub(crate) fn frame(number: u64) -> PhysFrame {
    PhysFrame::containing_address(PhysAddr::new(number << 12))
}

/// `address` plus so many bytes.
pub(crate) fn after(address: LinearAddress, bytes: u64) -> LinearAddress {
    LinearAddress::new(address.as_u64() + bytes)
}

/// Sparse physical memory that reads as 0 and remembers which entries were read.
#[derive(Default)]
pub(crate) struct Ram {
    words: RefCell<HashMap<u64, u64>>,
    reads: Cell<u32>,
    tables: Cell<u64>,
    /// A store that another CPU makes just before the next locked update: address, value.
    pub(crate) store_before_update: Cell<Option<(PhysAddr, u64)>>,
}

impl Ram {
    pub(crate) fn peek(&self, address: PhysAddr) -> u64 {
        self.words.borrow().get(&address.as_u64()).copied().unwrap_or(0)
    }

    pub(crate) fn poke(&self, address: PhysAddr, value: u64) {
        assert_eq!(address.as_u64() % 8, 0);
        self.words.borrow_mut().insert(address.as_u64(), value);
    }

    /// A fresh, empty table. Tables lie from frame 0x100 on, so tests use other frames for pages.
    pub(crate) fn table(&self) -> PhysFrame {
        self.tables.set(self.tables.get() + 1);
        frame(0xff + self.tables.get())
    }

    /// Entries read since the last call.
    pub(crate) fn take_reads(&self) -> u32 {
        self.reads.replace(0)
    }
}

impl PhysicalMemory for Ram {
    fn read(&self, address: PhysAddr) -> u64 {
        self.reads.set(self.reads.get() + 1);
        self.peek(address)
    }

    fn fetch_or(&self, address: PhysAddr, bits: u64, expected: u64) -> Result<(), u64> {
        if let Some((elsewhere, value)) = self.store_before_update.take() {
            self.poke(elsewhere, value);
        }
        let found = self.peek(address);
        if found == expected {
            self.poke(address, found | bits);
            Ok(())
        } else {
            Err(found)
        }
    }
}

/// Holders by frame and by what they are.
#[derive(Default, Debug, PartialEq)]
pub(crate) struct Counts(pub(crate) HashMap<(u64, Held), u32>);

impl FrameWatch for Counts {
    fn hold(&mut self, first: PhysFrame, held: Held) {
        *self.0.entry((first.start_address().as_u64(), held)).or_insert(0) += 1;
    }

    fn release(&mut self, first: PhysFrame, held: Held) {
        let key = (first.start_address().as_u64(), held);
        let count = self.0.get_mut(&key).unwrap_or_else(|| panic!("{held:?} of {first:?} was never held"));
        *count -= 1;
        if *count == 0 {
            self.0.remove(&key);
        }
    }
}

/// One CPU and its memory.
pub(crate) struct Rig {
    pub(crate) ram: Ram,
    pub(crate) mmu: Mmu,
    pub(crate) counts: Counts,
}

impl Rig {
    pub(crate) fn new(features: Features, cr4: Cr4Flags) -> Self {
        let ram = Ram::default();
        let mut counts = Counts::default();
        let mmu = Mmu::new(features, cr4, ram.table(), &mut counts);
        Self { ram, mmu, counts }
    }

    /// Intel-like, PCIDs and global pages on.
    pub(crate) fn intel() -> Self {
        Self::new(Features::INTEL, PCID_ON)
    }

    /// AMD-like, PCIDs and global pages on.
    pub(crate) fn amd() -> Self {
        Self::new(Features::AMD, PCID_ON)
    }

    /// Address of the entry that translates `address` at `level`, under the loaded root; makes the
    /// tables above it.
    pub(crate) fn slot(&self, level: TableLevel, address: LinearAddress) -> PhysAddr {
        let mut at = self.mmu.paging_mode().root();
        let mut table = self.mmu.cr3().0.start_address();
        loop {
            let slot = table + 8 * at.index(address);
            if at == level {
                return slot;
            }
            if self.ram.peek(slot) & P == 0 {
                self.ram.poke(slot, self.ram.table().start_address().as_u64() | PWU);
            }
            table = PhysAddr::new(self.ram.peek(slot) & 0x000f_ffff_ffff_f000);
            at = at.below().expect("the level asked for is below the root");
        }
    }

    /// Maps the page of `size` at `address` to frame number `number`; returns where the entry is.
    pub(crate) fn map(&self, size: PageSize, address: LinearAddress, number: u64, flags: u64) -> PhysAddr {
        let (level, ps) = match size {
            PageSize::Size4KiB => (TableLevel::Pt, 0),
            PageSize::Size2MiB => (TableLevel::Pd, PS),
            PageSize::Size1GiB => (TableLevel::Pdpt, PS),
        };
        let slot = self.slot(level, address);
        self.ram.poke(slot, (number << 12) | flags | ps);
        slot
    }

    /// Maps 4 KiB.
    pub(crate) fn map_page(&self, address: LinearAddress, number: u64, flags: u64) -> PhysAddr {
        self.map(PageSize::Size4KiB, address, number, flags)
    }

    pub(crate) fn try_access(
        &mut self,
        address: LinearAddress,
        kind: AccessKind,
        mode: AccessMode,
    ) -> Result<Access, Fault> {
        let Self { ram, mmu, counts } = self;
        mmu.access(address, kind, mode, ram, counts)
    }

    pub(crate) fn user(&mut self, address: LinearAddress, kind: AccessKind) -> Result<Access, Fault> {
        self.try_access(address, kind, AccessMode::User)
    }

    /// A user read that must go through; the frame number it reaches.
    pub(crate) fn read(&mut self, address: LinearAddress) -> u64 {
        self.user(address, AccessKind::Read).expect("the read goes through").address.as_u64() >> 12
    }

    /// A user write that must go through; the frame number it reaches.
    pub(crate) fn write(&mut self, address: LinearAddress) -> u64 {
        self.user(address, AccessKind::Write).expect("the write goes through").address.as_u64() >> 12
    }

    /// A user access that must fault.
    pub(crate) fn fault(&mut self, address: LinearAddress, kind: AccessKind) -> PageFault {
        match self.user(address, kind) {
            Err(Fault::Page(fault)) => fault,
            other => panic!("expected a page fault, got {other:?}"),
        }
    }

    pub(crate) fn speculate(&mut self, address: LinearAddress, depth: Depth) -> Speculation {
        let Self { ram, mmu, counts } = self;
        mmu.speculate(address, depth, ram, counts)
    }

    /// Whether the TLB serves `address` now.
    pub(crate) fn in_tlb(&self, address: LinearAddress) -> bool {
        self.mmu.lookup(address).is_some()
    }

    /// Level of the deepest structure entry a walk for `address` would start from.
    pub(crate) fn deepest(&self, address: LinearAddress) -> Option<TableLevel> {
        match self.mmu.begin_speculation(address, Depth::Page).expect("canonical").start() {
            mmu_hosted::mmu::Start::Cr3 => None,
            mmu_hosted::mmu::Start::Structure(level) => Some(level),
        }
    }

    pub(crate) fn invlpg(&mut self, address: LinearAddress) {
        self.mmu.invlpg(address, &mut self.counts);
    }

    pub(crate) fn load(&mut self, root: PhysFrame, number: u16, load: mmu_hosted::invalidate::Cr3Load) {
        self.mmu.load_cr3(root, pcid(number), load, &mut self.counts).expect("a PCID that CR4 allows");
    }
}

impl Rig {
    /// What the watcher was told, the caches and the questions about them agree.
    pub(crate) fn check(&self) {
        let mut held = Counts::default();
        for entry in self.mmu.entries() {
            held.hold(entry.frame, entry.held);
        }
        assert_eq!(self.counts, held, "the watcher was told something else than what the caches hold");
        for entry in self.mmu.entries() {
            assert!(self.mmu.entries_reaching(entry.frame).any(|found| found == entry));
            assert_ne!(self.mmu.reach(entry.frame), Reach::Nowhere);
        }
        for entry in self.mmu.usable_entries() {
            assert_eq!(self.mmu.reach(entry.frame), Reach::Now);
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.check();
        }
    }
}

/// A five-level CPU.
pub(crate) fn la57() -> Rig {
    let rig = Rig::new(Features::INTEL, PCID_ON | Cr4Flags::L5_PAGING);
    assert_eq!(rig.mmu.paging_mode(), PagingMode::FiveLevel);
    rig
}
