//! Filling areas without faulting page by page: for layouts taken from real processes.
#![expect(unsafe_code, reason = "walks tables under the map lock")]

use mmu_gather::pagetable::{EntryValue, Level, NonPresent, VirtRange};
use x86_64::structures::paging::PageTableFlags;

use crate::frame::{device_page, owner_of};
use crate::kernel::{Error, Kernel};
use crate::machine::{Contents, Machine, Place, Shows, UnderMapLock};
use crate::mm::Mm;
use crate::vma::{Area, AreaKind, Vma};

/// What a stretch of an area holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageContent {
    /// Pages of the program's own.
    Anon,
    /// Pages of the area's file, clean.
    File,
    /// Pages of the area's file, written to through this mapping.
    FileDirty,
    /// The page of zeroes.
    Zero,
    /// Frames that are not counted.
    Pfn,
    /// 2 MiB pages of the program's own; the stretch is made of whole ones.
    AnonBlock,
    /// 2 MiB pages of the program's own that it has only read; the stretch is made of whole ones.
    CleanBlock,
    /// 2 MiB pages of a file.
    FileBlock,
    /// The 2 MiB page of zeroes.
    ZeroBlock,
    /// Nothing present: a place in swap.
    Swap,
    /// 1 GiB pages of a device that are not counted; the stretch is made of whole ones.
    DeviceGiant,
}

impl PageContent {
    const ALL: [Self; 11] = [
        Self::Anon,
        Self::File,
        Self::FileDirty,
        Self::Zero,
        Self::Pfn,
        Self::AnonBlock,
        Self::CleanBlock,
        Self::FileBlock,
        Self::ZeroBlock,
        Self::Swap,
        Self::DeviceGiant,
    ];

    /// Its word in a [`plan`](crate::plan).
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Anon => "anon",
            Self::File => "file",
            Self::FileDirty => "file-dirty",
            Self::Zero => "zero",
            Self::Pfn => "pfn",
            Self::AnonBlock => "anon-block",
            Self::CleanBlock => "clean-block",
            Self::FileBlock => "file-block",
            Self::ZeroBlock => "zero-block",
            Self::Swap => "swap",
            Self::DeviceGiant => "device-giant",
        }
    }

    /// The content that a word names.
    #[must_use]
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|content| content.word() == word)
    }

    /// Whether an area of this kind that programs have not written to reads like this.
    const fn is_what_shows(self, kind: AreaKind) -> bool {
        match self {
            Self::Anon | Self::Zero | Self::AnonBlock | Self::CleanBlock | Self::ZeroBlock | Self::Swap => {
                matches!(kind, AreaKind::Anon)
            }
            Self::File | Self::FileDirty => {
                matches!(kind, AreaKind::FilePrivate(_) | AreaKind::FileShared(_))
            }
            // Whoever writes to its pages does not write to those in the page cache.
            Self::Pfn | Self::DeviceGiant | Self::FileBlock => false,
        }
    }

    const fn level(self) -> Level {
        match self {
            Self::AnonBlock | Self::CleanBlock | Self::FileBlock | Self::ZeroBlock => Level::Pmd,
            Self::DeviceGiant => Level::Pud,
            _ => Level::Pte,
        }
    }
}

impl<M: Machine> Kernel<M> {
    /// Fills `range`, which lies in one area and holds nothing yet, as if it had been used.
    ///
    /// # Errors
    /// [`Error::NoArea`] if the range is not inside one area; [`Error::NoMemory`]; what was filled
    /// so far stays.
    pub fn populate(&self, mm: &Mm<M>, range: VirtRange, content: PageContent) -> Result<(), Error> {
        // For writing: a call that holds it for reading relies on it that no large page appears.
        let vmas = mm.write(&self.machine, UnderMapLock::WaitsForNobody);
        let vma = vmas
            .find(range.start())
            .copied()
            .filter(|vma| vma.range.covers(range))
            .ok_or(Error::NoArea(range.start()))?;
        if !content.is_what_shows(vma.area.kind) {
            self.note_contents(Contents::Shown { root: mm.root(), range, shows: Shows::Anything });
        }
        let level = content.level();
        let mut address = range.start();
        while address < range.end() {
            let Some(above) = level.above() else { break };
            let part = range.within_entry(above, address);
            self.populate_table(mm, vma, part, content)?;
            address = part.end();
        }
        Ok(())
    }

    /// Fills entries of one table.
    fn populate_table(
        &self,
        mm: &Mm<M>,
        vma: Vma,
        part: VirtRange,
        content: PageContent,
    ) -> Result<(), Error> {
        let level = content.level();
        // SAFETY: the map lock is held, and the area is not detached.
        let view = unsafe { mm.engine.space().ensure_table(self, part.start(), level) }
            .map_err(|_| Error::NoMemory)?;
        let locked = view.lock(self);
        let mut address = part.start();
        while address < part.end() {
            let entry = locked.entry(address);
            if entry.load().is_empty() {
                let value = self.entry_for(vma.area, address, content).ok_or(Error::NoMemory)?;
                // SAFETY: the entry is empty; `entry_for` took a reference for it on a page that
                // the area may map so.
                unsafe { entry.store(value) };
            }
            address += level.entry_span();
        }
        Ok(())
    }

    fn entry_for(&self, area: Area, address: u64, content: PageContent) -> Option<EntryValue> {
        let used = PageTableFlags::ACCESSED;
        let written = used | PageTableFlags::DIRTY;
        let private = match area.kind {
            AreaKind::FileShared(_) => area,
            AreaKind::Anon | AreaKind::FilePrivate(_) | AreaKind::Pfn => area.without_write(),
        };
        let file = match area.kind {
            AreaKind::FilePrivate(file) | AreaKind::FileShared(file) => file,
            AreaKind::Anon | AreaKind::Pfn => 0,
        };
        Some(match content {
            PageContent::Anon => with(self.leaf(self.zeroed_page()?, area), written),
            PageContent::File => {
                with(self.leaf(self.file_page(file, area.file_page(address))?, private), used)
            }
            PageContent::FileDirty => {
                with(self.leaf(self.file_page(file, area.file_page(address))?, private), written)
            }
            PageContent::Zero => with(self.leaf(self.zero_page(), area.without_write()), used),
            PageContent::Pfn => with(self.leaf(self.device_frame()?, area), used),
            PageContent::AnonBlock => with(self.leaf_at(Level::Pmd, self.new_block()?, area), written),
            PageContent::CleanBlock => with(self.leaf_at(Level::Pmd, self.new_block()?, area), used),
            PageContent::FileBlock => {
                let block = self.new_block()?;
                self.frames.meta(block).set_owner(owner_of(file, area.file_page(address)));
                with(self.leaf_at(Level::Pmd, block, private), used)
            }
            PageContent::ZeroBlock => {
                with(self.leaf_at(Level::Pmd, self.zero_block()?, area.without_write()), used)
            }
            PageContent::DeviceGiant => {
                with(self.leaf_at(Level::Pud, device_page(area.file_page(address)), area), used)
            }
            PageContent::Swap => {
                let slot = self.swap.take();
                self.machine.write_to_disk(self.zero_page(), Place::Swap { slot });
                self.swap.written(slot);
                NonPresent::Swap { device: 0, slot }.encode()
            }
        })
    }
}

fn with(value: EntryValue, flags: PageTableFlags) -> EntryValue {
    EntryValue::from_bits(value.bits() | flags.bits())
}
