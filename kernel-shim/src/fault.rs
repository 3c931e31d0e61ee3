//! Demand faults.
#![expect(unsafe_code, reason = "walks tables under the map lock")]

use mmu_gather::pagetable::{Decoded, EntryValue, Level, MapError, Marker, NonPresent, VirtRange};
use mmu_gather::{Disposition, GatherEvent, MmuGather, Pages, UnmappedLeaf};
use x86_64::PhysAddr;
use x86_64::structures::paging::{PageTableFlags, PhysFrame};

use core::sync::atomic::Ordering;

use crate::frame::FrameKind;
use crate::kernel::Kernel;
use crate::machine::{FrameRole, Machine, Note, Seam};
use crate::mm::Mm;
use crate::vma::{Area, AreaKind, Growth, Protection, Vma};

/// What a program tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UserAccess {
    /// Load, or fetch.
    Read,
    /// Store.
    Write,
}

/// Why a fault was not answered: the program gets a signal, or is out of luck.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultError {
    /// Nothing is mapped there.
    NoArea,
    /// The area does not allow it, or a marker forbids it.
    NotAllowed,
    /// No memory for a page or a table.
    NoMemory,
}

/// How far below a stack a fault still makes it grow.
const STACK_GUARD: u64 = 1 << 20;

/// What one try came to.
enum Try {
    Done,
    /// Somebody is changing the entry; look again.
    Again,
    /// The page that this entry maps may not be written: it must first go from here, everywhere.
    Replace(EntryValue),
}

impl<M: Machine> Kernel<M> {
    /// Answers a fault of a program at `address`.
    ///
    /// # Errors
    /// [`FaultError`].
    ///
    /// # Context
    /// Interrupts on, no lock held.
    pub fn handle_fault(&self, mm: &Mm<M>, address: u64, access: UserAccess) -> Result<(), FaultError> {
        let page = address & !0xfff;
        loop {
            let vmas = mm.vmas.read();
            let Some(vma) = vmas.find(address).copied() else {
                drop(vmas);
                self.grow_stack(mm, page)?;
                continue;
            };
            let allowed = match access {
                UserAccess::Read => vma.area.protection != Protection::None,
                UserAccess::Write => vma.area.protection == Protection::Write,
            };
            if !allowed {
                return Err(FaultError::NotAllowed);
            }
            match self.try_fault(mm, vma, page, access)? {
                Try::Done => {
                    self.count().fault();
                    return Ok(());
                }
                Try::Again => {
                    drop(vmas);
                    self.machine.cond_resched();
                }
                Try::Replace(seen) => {
                    self.count().copied();
                    // SAFETY: the map lock is held for reading until the flush is done.
                    let mut gather =
                        unsafe { MmuGather::new(self, &mm.engine) }.with_limits(&self.config.limits);
                    self.remove_seen(mm, &mut gather, vma, page, seen)?;
                    let flushed = gather.flush();
                    drop(vmas);
                    flushed.free();
                }
            }
        }
    }

    /// Removes the page at `page` if the entry still maps what was seen there: another thread may have replaced it meanwhile, and
    /// what it has written since must not be lost.
    fn remove_seen<'a>(
        &'a self,
        mm: &'a Mm<M>,
        gather: &mut MmuGather<'a, Self>,
        vma: Vma,
        page: u64,
        seen: EntryValue,
    ) -> Result<(), FaultError> {
        // SAFETY: the map lock is held for reading, and the area is not detached: its tables stay.
        let view = unsafe { mm.engine.space().ensure_table(self, page, Level::Pte) };
        let Ok(view) = view else { return Err(FaultError::NoMemory) };
        let range = VirtRange::of_entry(Level::Pte, page);
        let locked = view.lock(self);
        let entry = locked.entry(page);
        let now = entry.load();
        let same_page = now.leaf_address(Level::Pte) == seen.leaf_address(Level::Pte);
        if !now.is_present() || !same_page || now.is_writable() {
            return Ok(());
        }
        // SAFETY: the gather is told before the lock drops, and the page is freed through it.
        let value = unsafe { entry.get_and_clear() };
        let frame = PhysFrame::containing_address(value.leaf_address(Level::Pte));
        let leaf = UnmappedLeaf { address: page, level: Level::Pte, value, frame };
        let disposition = self.unmap_page(vma.staying().area, &leaf);
        gather.changed(range, Level::Pte);
        drop(locked);
        self.observe_gather(GatherEvent::LockDropped { leaves: 1 });
        if disposition != Disposition::Keep {
            // SAFETY: the entry was cleared just now, and what it held is dropped nowhere else.
            unsafe { gather.remove_page(frame, range, Level::Pte) };
        }
        Ok(())
    }

    fn try_fault(&self, mm: &Mm<M>, vma: Vma, page: u64, access: UserAccess) -> Result<Try, FaultError> {
        // SAFETY: the map lock is held for reading, and the area is not detached: its tables stay.
        let view = match unsafe { mm.engine.space().ensure_table(self, page, Level::Pte) } {
            Ok(view) => view,
            // A large leaf: another CPU was faster, or a cached entry was less than memory allows.
            Err(MapError::Occupied(_, _, value)) if value.is_present() => return Ok(Try::Done),
            Err(MapError::Occupied(..)) => return Ok(Try::Again),
            Err(_) => return Err(FaultError::NoMemory),
        };
        let locked = view.lock(self);
        let entry = locked.entry(page);
        let value = entry.load();
        match value.decode(Level::Pte) {
            Decoded::Leaf(_) | Decoded::Table(_) => {
                if access == UserAccess::Read || value.is_writable() {
                    return Ok(Try::Done);
                }
                let frame = PhysFrame::containing_address(value.leaf_address(Level::Pte));
                if !self.may_write_in_place(vma.area, frame) {
                    return Ok(Try::Replace(value));
                }
                let flags = PageTableFlags::WRITABLE.bits();
                // More rights need no flush (SDM 4.10.4.3); hardware may set A meanwhile, then the fault comes again.
                // SAFETY: the page is this program's alone, or the area's programs may write to it.
                let _ = unsafe { entry.compare_exchange(value, EntryValue::from_bits(value.bits() | flags)) };
                Ok(Try::Done)
            }
            Decoded::NonPresent(NonPresent::Migration { .. }) => Ok(Try::Again),
            Decoded::NonPresent(NonPresent::Swap { .. }) => {
                let frame = self.new_page().ok_or(FaultError::NoMemory)?;
                self.swap_slots.fetch_sub(1, Ordering::Relaxed);
                // SAFETY: the entry maps nothing, and the page is new.
                unsafe { entry.store(leaf(frame, vma.area.protection)) };
                self.count().swapped_in();
                self.note_mapped(mm, page, frame);
                Ok(Try::Done)
            }
            Decoded::NonPresent(meaning) => {
                if meaning == NonPresent::Marker(Marker::Guard) {
                    self.count().guard_fault();
                }
                Err(FaultError::NotAllowed)
            }
            Decoded::None => {
                let value = self.page_for(vma.area, page, access).ok_or(FaultError::NoMemory)?;
                // SAFETY: the entry is empty; `page_for` took a reference for it on a page that the area may map so.
                unsafe { entry.store(value) };
                self.note_mapped(mm, page, PhysFrame::containing_address(value.leaf_address(Level::Pte)));
                Ok(Try::Done)
            }
        }
    }

    fn note_mapped(&self, mm: &Mm<M>, address: u64, frame: PhysFrame) {
        self.machine.note(Note::Mapped { root: mm.root(), address, frame });
    }

    /// The entry for a page that is not there yet; counts are taken.
    pub(crate) fn page_for(&self, area: Area, page: u64, access: UserAccess) -> Option<EntryValue> {
        match (area.kind, access) {
            (AreaKind::Anon | AreaKind::FilePrivate(_), UserAccess::Write) => {
                Some(leaf(self.new_page()?, area.protection))
            }
            (AreaKind::Anon, UserAccess::Read) => Some(leaf(self.zero_page(), Protection::Read)),
            (AreaKind::FilePrivate(file), UserAccess::Read) => {
                Some(leaf(self.file_page(file, area.file_page(page))?, Protection::Read))
            }
            (AreaKind::FileShared(file), _) => {
                Some(leaf(self.file_page(file, area.file_page(page))?, area.protection))
            }
            (AreaKind::Pfn, _) => Some(leaf(self.zero_page(), area.protection)),
        }
    }

    /// A page of a program, mapped once.
    pub(crate) fn new_page(&self) -> Option<PhysFrame> {
        let frame = self.frames.allocate(FrameKind::Page)?;
        self.frames.meta(frame).add_mapping();
        self.machine.note(Note::Allocated(frame, FrameRole::Page));
        self.machine.seam(Seam::Allocate);
        Some(frame)
    }

    /// The page of a file, mapped once more.
    pub(crate) fn file_page(&self, file: u32, page: u64) -> Option<PhysFrame> {
        let mut cache = self.page_cache.lock();
        let frame = match cache.get(&(file, page)) {
            Some(frame) => *frame,
            None => {
                let frame = self.frames.allocate(FrameKind::Page)?;
                let meta = self.frames.meta(frame);
                meta.add_ref();
                // Any number but 0 says "a page of a file".
                meta.set_owner(u64::from(file) << 32 | page & 0xffff_ffff | 1 << 63);
                self.machine.note(Note::Allocated(frame, FrameRole::Page));
                cache.insert((file, page), frame);
                frame
            }
        };
        self.frames.meta(frame).add_mapping();
        Some(frame)
    }

    /// The shared page of zeroes: the last reserved frame. Not counted.
    pub(crate) fn zero_page(&self) -> PhysFrame {
        PhysFrame::containing_address(PhysAddr::new(
            self.machine.nr_reserved_frames().saturating_sub(1) << 12,
        ))
    }

    /// Whether a private page may simply be made writable: it is nobody else's.
    ///
    /// One mapping is not enough. Another address space may have unmapped the page just now, and its gather holds a reference
    /// until every CPU has flushed: until then programs there can still read what would be written here.
    pub(crate) fn may_write_in_place(&self, area: Area, frame: PhysFrame) -> bool {
        let meta = self.frames.meta(frame);
        match area.kind {
            AreaKind::FileShared(_) | AreaKind::Pfn => true,
            AreaKind::Anon | AreaKind::FilePrivate(_) => {
                matches!(meta.kind(), FrameKind::Page | FrameKind::Block)
                    && meta.owner() == 0
                    && meta.is_exclusive()
            }
        }
    }

    fn grow_stack(&self, mm: &Mm<M>, page: u64) -> Result<(), FaultError> {
        let mut vmas = mm.vmas.write();
        let next = vmas.find_from(page).copied().ok_or(FaultError::NoArea)?;
        if next.range.contains(page) {
            return Ok(());
        }
        if next.area.growth != Growth::Down || next.range.start() - page > STACK_GUARD {
            return Err(FaultError::NoArea);
        }
        vmas.grow_down(next.range.start(), page);
        Ok(())
    }
}

/// The entry that maps a frame for a program.
pub(crate) fn leaf(frame: PhysFrame, protection: Protection) -> EntryValue {
    leaf_at(Level::Pte, frame, protection)
}

/// The entry of a table at `level` that maps a page for a program.
pub(crate) fn leaf_at(level: Level, frame: PhysFrame, protection: Protection) -> EntryValue {
    let flags = match protection {
        Protection::None => PageTableFlags::empty(),
        Protection::Read => PageTableFlags::USER_ACCESSIBLE,
        Protection::Write => PageTableFlags::USER_ACCESSIBLE | PageTableFlags::WRITABLE,
    };
    EntryValue::leaf(level, frame.start_address(), flags)
}
