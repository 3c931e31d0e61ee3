//! Demand faults.
#![expect(unsafe_code, reason = "walks tables under the map lock")]

use mmu_gather::pagetable::{
    Decoded, EntryValue, Level, MapError, Marker, NonPresent, TableMemory, VirtRange,
};
use mmu_gather::{Disposition, GatherEvent, MmuGather, Pages, UnmappedLeaf};
use x86_64::PhysAddr;
use x86_64::structures::paging::{PageTableFlags, PhysFrame};

use crate::frame::{FrameKind, owner_of};
use crate::kernel::Kernel;
use crate::large::zero_block::Replaced;
use crate::locks::map_lock::MapRead;
use crate::machine::{FrameRole, Machine, Note, Place, Seam, UnderMapLock};
use crate::mm::Mm;
use crate::supply::Site;
use crate::vma::{Area, AreaKind, Growth, Protection, Vma};

/// What a program tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UserAccess {
    /// Load.
    Read,
    /// Store.
    Write,
    /// Instruction fetch.
    Fetch,
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

/// How far below a stack a fault still makes it grow: the limit of one jump, not a gap. Linux had
/// one until 5.0, of 64 KiB below the stack pointer; since then only RLIMIT_STACK ends a stack, 8
/// MiB by default, which this kernel does not keep.
const STACK_JUMP_LIMIT: u64 = 1 << 20;

/// What stays free between a stack that grows and the area below it, so that a program that
/// overruns its stack faults instead of writing there. Linux: stack_guard_gap, 256 pages,
/// mm/mmap.c.
const STACK_GUARD_GAP: u64 = 256 << 12;

/// What stands in an entry while the page that was there is copied.
const BEING_COPIED: NonPresent = NonPresent::Other(4 << 1);

/// Whether the 2 MiB page of zeroes was tried for. Once is enough: there may be no memory for it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Zeroes {
    NotTried,
    Tried,
}

/// What one try came to.
enum Try {
    Done,
    /// Another CPU is changing the entry; look again.
    Again,
    /// The page that this entry maps may not be written: it must first go from here, everywhere.
    Replace(EntryValue),
    /// A large page is there, and its entry does not allow to write.
    Large,
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
        let mut zeroes = Zeroes::NotTried;
        loop {
            let vmas = mm.read(&self.machine, UnderMapLock::Flushes);
            let Some(vma) = vmas.find(address).copied() else {
                drop(vmas);
                self.grow_stack(mm, page)?;
                continue;
            };
            let allowed = match access {
                UserAccess::Read => vma.area.protection != Protection::Nothing,
                UserAccess::Write => vma.area.protection == Protection::Write,
                UserAccess::Fetch if self.machine.forbids_execution() => {
                    vma.area.protection == Protection::Execute
                }
                UserAccess::Fetch => vma.area.protection != Protection::Nothing,
            };
            if !allowed {
                return Err(FaultError::NotAllowed);
            }
            if access == UserAccess::Read
                && zeroes == Zeroes::NotTried
                && self.wants_zero_block(mm, &vma, page)
            {
                drop(vmas);
                zeroes = Zeroes::Tried;
                self.map_zero_block(mm, page);
                continue;
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
                Try::Replace(seen) => self.replace(mm, vmas, vma, page, seen)?,
                Try::Large => {
                    drop(vmas);
                    if self.replace_zero_block(mm, page) == Replaced::No {
                        self.split_for_writing(mm, page)?;
                    }
                }
            }
        }
    }

    /// Splits the large page at `page`, whose entry does not allow to write: the fault that comes
    /// again finds a small one.
    ///
    /// Linux first tries to make a large page writable as a whole, if only this program uses it.
    /// Here a private large page is split when fork shares it, so only large pages of a file or of
    /// zeroes come here. They must be replaced, and are, one small page at a time.
    ///
    /// Linux: the fallback of do_huge_pmd_wp_page, mm/huge_memory.c.
    #[doc(alias = "do_huge_pmd_wp_page")]
    fn split_for_writing(&self, mm: &Mm<M>, page: u64) -> Result<(), FaultError> {
        // For writing, because large pages come and go under that only. The entry may have changed
        // since the fault read it. If it allows to write by now, the split was not needed, and does
        // no harm.
        let vmas = mm.write(&self.machine, UnderMapLock::Flushes);
        let Some(vma) = vmas.find(page) else { return Ok(()) };
        // SAFETY: the map lock is held for writing until the gather is finished.
        let mut gather = unsafe { MmuGather::new(self, &mm.engine) };
        // An address in the page that is not its first: cutting there splits it.
        // SAFETY: the map lock is held for writing.
        unsafe { gather.split_leaf(vma.going_away().area, page | 4096) }.map_err(|_| FaultError::NoMemory)
    }

    /// Replaces the page at `page`, which was seen there and may not be written, by a copy.
    ///
    /// The old one first goes from here, everywhere: while one CPU can still read it, no other may
    /// write to the copy. Until the copy is there, a mark in the entry holds other faults off. A
    /// call that discards takes the mark out; then the copy is dropped, and the program faults
    /// again.
    ///
    /// Linux copies first and flushes under the table lock, which rule G3 does not allow here.
    ///
    /// # Source
    /// Linux: wp_page_copy, mm/memory.c.
    #[doc(alias = "wp_page_copy")]
    fn replace(
        &self,
        mm: &Mm<M>,
        vmas: MapRead<'_, M>,
        vma: Vma,
        page: u64,
        seen: EntryValue,
    ) -> Result<(), FaultError> {
        // Before anything is changed.
        let copy = self.new_page().ok_or(FaultError::NoMemory)?;
        // SAFETY: the map lock is held for reading until the flush is done.
        let mut gather = unsafe { MmuGather::new(self, &mm.engine) }.with_limits(&self.config.limits);
        let removed = self.remove_seen(mm, &mut gather, vma, page, seen);
        let flushed = gather.flush();
        let mut is_mapped = false;
        if let Some(old) = removed {
            self.count().copied();
            // The old page is not freed before `flushed` is.
            self.machine.copy_frame(old, copy);
            is_mapped = self.map_copy(mm, vma, page, copy);
        }
        drop(vmas);
        flushed.free();
        if !is_mapped {
            self.remove_mapping(copy);
            self.drop_references([copy]);
        }
        Ok(())
    }

    /// Removes the page at `page` if the entry still maps what was seen there, and leaves a mark:
    /// another thread may have replaced it meanwhile, and what it has written since must not be
    /// lost. The frame, to be copied after the flush.
    fn remove_seen(
        &self,
        mm: &Mm<M>,
        gather: &mut MmuGather<'_, '_, Self>,
        vma: Vma,
        page: u64,
        seen: EntryValue,
    ) -> Option<PhysFrame> {
        // SAFETY: the map lock is held for reading, and the area is not detached: its tables stay.
        let view = unsafe { mm.engine.space().find_table(self, page, Level::Pte) }?;
        let range = VirtRange::of_entry(Level::Pte, page);
        let locked = view.lock(self);
        let entry = locked.entry(page);
        let now = entry.load();
        let same_page = now.leaf_address(Level::Pte) == seen.leaf_address(Level::Pte);
        if !now.is_present() || !same_page || now.is_writable() {
            return None;
        }
        self.between_look_and_change();
        // SAFETY: the gather is told before the lock drops, and the page is freed through it.
        let value = unsafe { entry.exchange(BEING_COPIED.encode()) };
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
        Some(frame)
    }

    /// Maps the copy where its mark is; whether that was still there.
    fn map_copy(&self, mm: &Mm<M>, vma: Vma, page: u64, copy: PhysFrame) -> bool {
        // SAFETY: the map lock is held for reading, and the area is not detached: its tables stay.
        let Some(view) = (unsafe { mm.engine.space().find_table(self, page, Level::Pte) }) else {
            return false;
        };
        let locked = view.lock(self);
        let entry = locked.entry(page);
        if entry.load() != BEING_COPIED.encode() {
            return false;
        }
        // SAFETY: the entry maps nothing, and the page is new.
        unsafe { entry.store(self.leaf(copy, vma.area)) };
        self.note_mapped(mm, page, copy);
        true
    }

    fn try_fault(&self, mm: &Mm<M>, vma: Vma, page: u64, access: UserAccess) -> Result<Try, FaultError> {
        // SAFETY: the map lock is held for reading, and the area is not detached: its tables stay.
        let view = match unsafe { mm.engine.space().ensure_table(self, page, Level::Pte) } {
            Ok(view) => view,
            Err(MapError::Occupied(_, _, value)) if value.is_present() => {
                return Ok(match access {
                    UserAccess::Write if !value.is_writable() => Try::Large,
                    // Another CPU was faster, or a cached entry was less than memory allows.
                    UserAccess::Read | UserAccess::Fetch | UserAccess::Write => Try::Done,
                });
            }
            Err(MapError::Occupied(..)) => return Ok(Try::Again),
            Err(_) => return Err(FaultError::NoMemory),
        };
        let locked = view.lock(self);
        let entry = locked.entry(page);
        let value = entry.load();
        match value.decode(Level::Pte) {
            Decoded::Leaf(_) | Decoded::Table(_) => {
                if access != UserAccess::Write || value.is_writable() {
                    return Ok(Try::Done);
                }
                let frame = PhysFrame::containing_address(value.leaf_address(Level::Pte));
                if !self.may_write_in_place(vma.area, frame) {
                    return Ok(Try::Replace(value));
                }
                let flags = PageTableFlags::WRITABLE.bits();
                self.between_look_and_change();
                // More rights need no flush (SDM 4.10.4.3). If hardware sets A meanwhile, the
                // exchange fails and the program faults again.
                let more = EntryValue::from_bits(value.bits() | flags);
                // SAFETY: the page is this program's alone, or the area's programs may write to it.
                if unsafe { entry.compare_exchange(value, more) }.is_ok() {
                    self.note_owned(mm, vma.area, page, frame);
                }
                Ok(Try::Done)
            }
            Decoded::NonPresent(NonPresent::Migration { .. } | BEING_COPIED) => Ok(Try::Again),
            // Programs may still write to the page until every CPU has flushed.
            Decoded::NonPresent(NonPresent::Swap { slot, .. }) if !self.swap.is_written(slot) => {
                Ok(Try::Again)
            }
            Decoded::NonPresent(NonPresent::Swap { slot, .. }) => {
                let frame = self.new_page().ok_or(FaultError::NoMemory)?;
                self.machine.read_from_disk(Place::Swap { slot }, frame);
                self.swap.drop_entry(slot);
                // SAFETY: the entry maps nothing, and the page is new.
                unsafe { entry.store(self.leaf(frame, vma.area)) };
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
            Decoded::Empty if access == UserAccess::Write && self.map_folio(mm, &vma, &locked, page) => {
                Ok(Try::Done)
            }
            Decoded::Empty => {
                let value = self.page_for(vma.area, page, access).ok_or(FaultError::NoMemory)?;
                // SAFETY: the entry is empty; `page_for` took a reference for it on a page that the
                // area may map so.
                unsafe { entry.store(value) };
                self.note_mapped(mm, page, PhysFrame::containing_address(value.leaf_address(Level::Pte)));
                Ok(Try::Done)
            }
        }
    }

    pub(crate) fn note_mapped(&self, mm: &Mm<M>, address: u64, frame: PhysFrame) {
        self.machine.note(Note::Mapped { root: mm.root(), address, frame });
    }

    /// Says that the program may write to a page from now on because no other uses it, if that is
    /// why.
    pub(crate) fn note_owned(&self, mm: &Mm<M>, area: Area, address: u64, frame: PhysFrame) {
        if matches!(area.kind, AreaKind::Anon | AreaKind::FilePrivate(_)) {
            self.machine.note(Note::OwnedAlone { root: mm.root(), address, frame });
        }
    }

    /// The entry for a page that is not there yet; counts are taken.
    pub(crate) fn page_for(&self, area: Area, page: u64, access: UserAccess) -> Option<EntryValue> {
        match (area.kind, access) {
            (AreaKind::Anon, UserAccess::Write) => Some(self.leaf(self.zeroed_page()?, area)),
            (AreaKind::FilePrivate(file), UserAccess::Write) => {
                let cached = self.cached_page(file, area.file_page(page))?;
                let copy = self.new_page()?;
                self.machine.copy_frame(cached, copy);
                Some(self.leaf(copy, area))
            }
            (AreaKind::Anon, UserAccess::Read | UserAccess::Fetch) => {
                Some(self.leaf(self.zero_page(), area.without_write()))
            }
            (AreaKind::FilePrivate(file), UserAccess::Read | UserAccess::Fetch) => {
                Some(self.leaf(self.file_page(file, area.file_page(page))?, area.without_write()))
            }
            (AreaKind::FileShared(file), _) => {
                Some(self.leaf(self.file_page(file, area.file_page(page))?, area))
            }
            (AreaKind::Pfn, _) => Some(self.leaf(self.device_frame()?, area)),
        }
    }

    /// A page of zeroes for one program, mapped once.
    pub(crate) fn zeroed_page(&self) -> Option<PhysFrame> {
        let frame = self.new_page()?;
        self.machine.zero_frames(frame, 1);
        Some(frame)
    }

    /// A page for one program, mapped once. It holds what somebody has left there: whoever takes it
    /// fills it before it is mapped.
    fn new_page(&self) -> Option<PhysFrame> {
        if !self.may_have_frame(Site::Page) {
            return None;
        }
        let frame = self.frames.allocate(FrameKind::Page);
        if frame.is_none() {
            self.count().frame_refused();
        }
        let frame = frame?;
        self.frames.meta(frame).add_mapping();
        self.machine.note(Note::Allocated(frame, FrameRole::Page));
        self.machine.seam(Seam::Allocate);
        Some(frame)
    }

    /// The page of a file, mapped once more.
    pub(crate) fn file_page(&self, file: u32, page: u64) -> Option<PhysFrame> {
        let frame = self.cached_page(file, page)?;
        self.frames.meta(frame).add_mapping();
        Some(frame)
    }

    /// The page of a file, in the page cache from now on, which keeps its pages.
    fn cached_page(&self, file: u32, page: u64) -> Option<PhysFrame> {
        let mut cache = self.page_cache.lock();
        if let Some(frame) = cache.get(&(file, page)) {
            return Some(*frame);
        }
        if !self.may_have_frame(Site::FilePage) {
            return None;
        }
        let frame = self.frames.allocate(FrameKind::Page)?;
        let meta = self.frames.meta(frame);
        meta.add_ref();
        meta.set_owner(owner_of(file, page));
        self.machine.note(Note::Allocated(frame, FrameRole::Page));
        self.machine.read_from_disk(Place::File { file, page }, frame);
        cache.insert((file, page), frame);
        Some(frame)
    }

    /// The shared page of zeroes: the last reserved frame. Not counted.
    pub(crate) fn zero_page(&self) -> PhysFrame {
        PhysFrame::containing_address(PhysAddr::new(
            self.machine.nr_reserved_frames().saturating_sub(1) << 12,
        ))
    }

    /// A frame that is not memory to this kernel, as of a device: mapped by areas of device frames,
    /// never counted. One is enough.
    pub(crate) fn device_frame(&self) -> Option<PhysFrame> {
        let mut device = self.device_frame.lock();
        if device.is_none() {
            if !self.may_have_frame(Site::DeviceFrame) {
                return None;
            }
            let new = self.frames.allocate(FrameKind::Reserved)?;
            self.machine.note(Note::Allocated(new, FrameRole::Page));
            *device = Some(new);
        }
        *device
    }

    /// Whether a private page may simply be made writable, because only this program uses it.
    ///
    /// That only one entry maps it is not enough. Another address space may have unmapped the page
    /// just now, and its gather holds a reference until every CPU has flushed: until then programs
    /// there can still read what would be written here.
    pub(crate) fn may_write_in_place(&self, area: Area, frame: PhysFrame) -> bool {
        if area.kind == AreaKind::Pfn {
            return true;
        }
        let meta = self.frames.meta(frame);
        let is_page = matches!(meta.kind(), FrameKind::Page | FrameKind::Block);
        match area.kind {
            AreaKind::Pfn => true,
            // Not the page of zeroes, which may stand for a hole of the file.
            AreaKind::FileShared(_) => is_page,
            AreaKind::Anon | AreaKind::FilePrivate(_) => is_page && meta.owner() == 0 && meta.is_exclusive(),
        }
    }

    fn grow_stack(&self, mm: &Mm<M>, page: u64) -> Result<(), FaultError> {
        let mut vmas = mm.write(&self.machine, UnderMapLock::WaitsForNobody);
        let next = vmas.find_from(page).copied().ok_or(FaultError::NoArea)?;
        if next.range.contains(page) {
            return Ok(());
        }
        if next.area.growth != Growth::Down || next.range.start() - page > STACK_JUMP_LIMIT {
            return Err(FaultError::NoArea);
        }
        // An area that allows no access is a gap by itself, and below another stack is that stack's
        // own gap. Linux: expand_downwards.
        let is_in_the_way =
            |below: &Vma| below.area.growth != Growth::Down && below.area.protection != Protection::Nothing;
        if vmas
            .find_before(page)
            .is_some_and(|below| is_in_the_way(below) && page - below.range.end() < STACK_GUARD_GAP)
        {
            return Err(FaultError::NoArea);
        }
        vmas.grow_down(next.range.start(), page);
        if let Ok(range) = VirtRange::new(page, next.range.start()) {
            self.note_shown(mm, Vma { range, ..next });
        }
        Ok(())
    }
}

/// Bit 12 of a leaf above the last level, where bit 7 says that it is one.
const PAT_OF_A_LARGE_PAGE: u64 = 1 << 12;

impl<M: Machine> Kernel<M> {
    /// The entry that maps a frame for a program.
    pub(crate) fn leaf(&self, frame: PhysFrame, area: Area) -> EntryValue {
        self.leaf_at(Level::Pte, frame, area)
    }

    /// The entry of a table at `level` that maps a page for a program.
    pub(crate) fn leaf_at(&self, level: Level, frame: PhysFrame, area: Area) -> EntryValue {
        let has_pat = area.attributes.contains(PageTableFlags::HUGE_PAGE);
        let pat = if has_pat && level > Level::Pte { PAT_OF_A_LARGE_PAGE } else { 0 };
        let flags = self.flags_of(area.protection) | area.attributes;
        let value = EntryValue::leaf(level, frame.start_address(), flags);
        EntryValue::from_bits(value.bits() | pat)
    }

    /// What an entry says of a protection.
    pub(crate) fn flags_of(&self, protection: Protection) -> PageTableFlags {
        let flags = match protection {
            Protection::Nothing => PageTableFlags::empty(),
            Protection::Read | Protection::Execute => PageTableFlags::USER_ACCESSIBLE,
            Protection::Write => PageTableFlags::USER_ACCESSIBLE | PageTableFlags::WRITABLE,
        };
        if protection != Protection::Execute && self.machine.forbids_execution() {
            flags | PageTableFlags::NO_EXECUTE
        } else {
            flags
        }
    }
}
