//! Copying an address space: fork.
#![expect(unsafe_code, reason = "walks tables under the map lock")]

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use mmu_gather::MmuGather;
use mmu_gather::pagetable::{
    Decoded, EntryValue, Level, LockedEntry, Marker, NonPresent, TableMemory, TableView, VirtRange,
};
use x86_64::structures::paging::{PageTableFlags, PhysFrame};

use crate::frame::FrameKind;
use crate::kernel::{Error, Kernel};
use crate::machine::{Contents, Machine, Note, UnderMapLock};
use crate::mm::Mm;
use crate::vma::{AreaKind, Vma};

/// An area on its way to a child.
struct CopiedArea<'a, M: Machine> {
    child: &'a Mm<M>,
    vma: &'a Vma,
}

impl<M: Machine> Kernel<M> {
    /// A new address space with the areas of `parent`, but for what lies in `left_out`
    /// (madvise(MADV_DONTFORK)); fork(2).
    ///
    /// Private pages are shared until one side writes: both sides lose the right to, and every CPU
    /// has forgotten that the parent had it when this returns. Pages of shared files are left to
    /// faults. Large pages of private areas are split first.
    ///
    /// # Errors
    /// [`Error::NoMemory`]; the parent may have lost rights to pages, which its next writes get
    /// back.
    ///
    /// # Source
    /// Linux: dup_mmap, kernel/fork.c, and copy_page_range, mm/memory.c.
    #[doc(alias = "dup_mmap")]
    #[doc(alias = "copy_page_range")]
    pub fn fork(
        &self,
        parent: &Mm<M>,
        left_out: impl IntoIterator<Item = VirtRange>,
    ) -> Result<Arc<Mm<M>>, Error> {
        let child = self.new_mm()?;
        let vmas = parent.write(&self.machine, UnderMapLock::Flushes);
        let mut copied = vmas.clone();
        let left_out: Vec<Vma> = left_out.into_iter().flat_map(|range| copied.detach(range)).collect();
        *child.write(&self.machine, UnderMapLock::WaitsForNobody) = copied.clone();
        // SAFETY: the parent's map lock is held for writing until the gather has flushed.
        let mut gather = unsafe { MmuGather::new(self, &parent.engine) }.with_limits(&self.config.limits);
        self.machine.note(Note::Areas(copied.iter().count()));
        let result = copied.iter().try_for_each(|vma| self.copy_area(&mut gather, parent, &child, vma));
        // The child does not run yet: no page that both have is written to before every CPU has
        // flushed.
        let flushed = gather.flush();
        if result.is_ok() {
            let is_shared_out =
                |vma: &&Vma| matches!(vma.area.kind, AreaKind::Anon | AreaKind::FilePrivate(_));
            for vma in copied.iter().filter(is_shared_out) {
                self.note_protected(parent, vma.range, vma.area.protection.without_write());
            }
            self.note_contents(Contents::Forked { parent: parent.root(), child: child.root() });
            for vma in left_out {
                self.note_contents(Contents::Gone { root: child.root(), range: vma.range });
            }
        }
        drop(vmas);
        flushed.free();
        match result {
            Ok(()) => Ok(child),
            Err(error) => {
                // It was never loaded, so no CPU is in the way.
                let _gone = self.exit(&child);
                Err(error)
            }
        }
    }

    fn copy_area(
        &self,
        gather: &mut MmuGather<'_, '_, Self>,
        parent: &Mm<M>,
        child: &Mm<M>,
        vma: &Vma,
    ) -> Result<(), Error> {
        if matches!(vma.area.kind, AreaKind::FileShared(_)) {
            return Ok(());
        }
        // Frames of a device are not counted, so their large pages are copied as they are.
        if vma.area.kind != AreaKind::Pfn {
            self.split_all(gather, vma, vma.range)?;
        }
        // SAFETY: the parent's map lock is held for writing.
        let root = unsafe { parent.engine.space().root_table(self) };
        self.copy_tables(gather, &CopiedArea { child, vma }, root, vma.range)
    }

    /// Copies what lies below `view` in `range`.
    fn copy_tables(
        &self,
        gather: &mut MmuGather<'_, '_, Self>,
        copied: &CopiedArea<'_, M>,
        view: TableView<'_>,
        range: VirtRange,
    ) -> Result<(), Error> {
        let level = view.level();
        if level == Level::Pte {
            return self.copy_table(gather, copied, view, range);
        }
        for address in view.used_parts(self, range).addresses() {
            // SAFETY: the parent's map lock is held for writing.
            if let Some(below) = unsafe { view.child(self, address) } {
                self.copy_tables(gather, copied, below, range.within_entry(level, address))?;
            } else {
                self.copy_large(copied, view, address)?;
            }
        }
        // What was passed over may be empty because reclaim is still to flush it.
        gather.note_deferred_flushes_of(view);
        self.machine.cond_resched();
        Ok(())
    }

    /// Copies the large page of a device that the entry for `address` in `view` maps, if it is one
    /// and the area has all of it. What is not copied is left to faults.
    fn copy_large(&self, copied: &CopiedArea<'_, M>, view: TableView<'_>, address: u64) -> Result<(), Error> {
        let CopiedArea { child, vma } = *copied;
        let level = view.level();
        let whole = VirtRange::of_entry(level, address);
        let value = view.load(address);
        if !matches!(value.decode(level), Decoded::Leaf(_)) || !vma.range.covers(whole) {
            return Ok(());
        }
        // SAFETY: the child's areas are in place and nobody else knows it.
        let target = unsafe { child.engine.space().ensure_table(self, whole.start(), level) }
            .map_err(|_| Error::NoMemory)?;
        let locked = target.lock(self);
        // SAFETY: the child's entry is empty, and the page is not counted. Rights stay: the frames
        // are both programs'.
        unsafe { locked.entry(whole.start()).store(value) };
        Ok(())
    }

    /// Copies the entries of `range`, which one last-level table covers.
    fn copy_table(
        &self,
        gather: &mut MmuGather<'_, '_, Self>,
        copied: &CopiedArea<'_, M>,
        view: TableView<'_>,
        range: VirtRange,
    ) -> Result<(), Error> {
        let CopiedArea { child, vma } = *copied;
        let addresses = || view.used_parts(self, range).addresses();
        if addresses().all(|address| view.load(address).is_empty()) {
            gather.note_deferred_flushes_of(view);
            return Ok(());
        }
        // SAFETY: the child's areas are in place and nobody else knows it.
        let target = unsafe { child.engine.space().ensure_table(self, range.start(), Level::Pte) }
            .map_err(|_| Error::NoMemory)?;
        let both = view.lock_both(self, target);
        let (source, target) = (both.first(), both.second());
        gather.note_deferred_flushes();
        for address in addresses() {
            let entry = source.entry(address);
            match entry.load().decode(Level::Pte) {
                Decoded::Leaf(page) => {
                    let frame = PhysFrame::containing_address(page);
                    let value = self.share(gather, vma, entry, address, frame);
                    if vma.area.kind != AreaKind::Pfn && self.frames.meta(frame).kind() == FrameKind::Page {
                        self.frames.meta(frame).add_mapping();
                    }
                    // SAFETY: the child's entry is empty, and the page was counted once more for
                    // it.
                    unsafe { target.entry(address).store(value) };
                }
                Decoded::NonPresent(meaning @ NonPresent::Swap { slot, .. }) => {
                    self.swap.add_entry(slot);
                    // SAFETY: the child's entry is empty, and this maps nothing.
                    unsafe { target.entry(address).store(meaning.encode()) };
                }
                Decoded::NonPresent(meaning @ NonPresent::Marker(marker)) => {
                    if marker == Marker::Guard {
                        self.guards.fetch_add(1, Ordering::Relaxed);
                    }
                    // SAFETY: as above.
                    unsafe { target.entry(address).store(meaning.encode()) };
                }
                Decoded::Empty | Decoded::Table(_) | Decoded::NonPresent(_) => {}
            }
        }
        drop(both);
        self.machine.cond_resched();
        Ok(())
    }

    /// Takes the right to write from the parent's `entry`, which maps `frame`. What the child's is
    /// to be.
    fn share(
        &self,
        gather: &mut MmuGather<'_, '_, Self>,
        vma: &Vma,
        entry: LockedEntry<'_>,
        address: u64,
        frame: PhysFrame,
    ) -> EntryValue {
        let mut old = entry.load();
        while vma.area.kind != AreaKind::Pfn && old.is_writable() {
            let new = EntryValue::from_bits(old.bits() & !PageTableFlags::WRITABLE.bits());
            self.between_look_and_change();
            // Hardware may set A/D meanwhile; then look again.
            // SAFETY: the gather is told before the lock drops.
            match unsafe { entry.compare_exchange(old, new) } {
                Ok(()) => {
                    self.machine.note(Note::Restricted { address, level: Level::Pte, frame });
                    gather.changed(VirtRange::of_entry(Level::Pte, address), Level::Pte);
                    old = new;
                }
                Err(found) => {
                    self.count().fork_retried();
                    old = found;
                }
            }
        }
        EntryValue::from_bits(old.bits() & !PageTableFlags::ACCESSED.bits())
    }
}
