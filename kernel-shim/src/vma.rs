//! Areas of an address space, and the tree that holds them.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use mmu_gather::pagetable::{Bounds, VirtRange};
use x86_64::structures::paging::PageTableFlags;

/// What a program may do in an area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// Nothing.
    Nothing,
    /// Read; execute too, where the machine [does not forbid it].
    ///
    /// [does not forbid it]: crate::Machine::forbids_execution
    Read,
    /// Read and write; execute too, as for `Read`.
    Write,
    /// Read and execute.
    Execute,
}

impl Protection {
    /// The same without the right to write.
    #[must_use]
    pub const fn without_write(self) -> Self {
        match self {
            Self::Write => Self::Read,
            other => other,
        }
    }
}

/// What backs an area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AreaKind {
    /// The program's own memory.
    Anon,
    /// Private mapping of a file: pages come from the page cache until written.
    FilePrivate(u32),
    /// Shared mapping of a file or of shared memory.
    FileShared(u32),
    /// Frames this kernel does not count.
    Pfn,
}

/// Whether an area grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Growth {
    /// It does not.
    Fixed,
    /// Downwards on a fault just below it: a stack.
    Down,
}

/// What one fault brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Granule {
    /// One page.
    Page,
    /// For a write, the 16 pages around it, if nothing is there yet.
    Folio,
    /// For a read, the 2 MiB page of zeroes, if nothing is there yet; a write then brings a 2 MiB
    /// page of the program's own.
    Block,
}

/// What an area is, wherever it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// What backs it.
    pub kind: AreaKind,
    /// What a program may do.
    pub protection: Protection,
    /// Whether it grows.
    pub growth: Growth,
    /// Page of the file at the start of address space; page of an address is this plus the address
    /// in pages.
    pub file_base: u64,
    /// What its entries say besides, as those of the last level do: how pages are cached (there,
    /// bit 7 is the PAT bit), a protection key, bits that hardware does not look at.
    pub attributes: PageTableFlags,
    /// What one fault brings, if the area is anonymous.
    pub granule: Granule,
}

impl Area {
    /// An anonymous area a program may write.
    #[must_use]
    pub const fn anon() -> Self {
        Self {
            kind: AreaKind::Anon,
            protection: Protection::Write,
            growth: Growth::Fixed,
            file_base: 0,
            attributes: PageTableFlags::empty(),
            granule: Granule::Page,
        }
    }

    /// The same, but that programs may only read.
    pub(crate) const fn without_write(self) -> Self {
        Self { protection: self.protection.without_write(), ..self }
    }

    /// The page of its file that `address` shows.
    #[must_use]
    pub const fn file_page(&self, address: u64) -> u64 {
        self.file_base.wrapping_add(address >> 12)
    }
}

/// One area. Linux: vm_area_struct.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vma {
    /// Where.
    pub range: VirtRange,
    /// What.
    pub area: Area,
}

/// The areas of one address space, by start.
#[derive(Clone, Debug, Default)]
pub struct VmaTree {
    by_start: BTreeMap<u64, Vma>,
}

impl VmaTree {
    /// No areas.
    #[must_use]
    pub const fn new() -> Self {
        Self { by_start: BTreeMap::new() }
    }

    /// The area that contains `address`.
    #[must_use]
    pub fn find(&self, address: u64) -> Option<&Vma> {
        self.by_start
            .range(..=address)
            .next_back()
            .map(|(_, vma)| vma)
            .filter(|vma| vma.range.contains(address))
    }

    /// The first area that ends above `address`: the one it is in, or the next one.
    #[must_use]
    pub fn find_from(&self, address: u64) -> Option<&Vma> {
        self.find(address).or_else(|| self.by_start.range(address..).next().map(|(_, vma)| vma))
    }

    /// The last area that starts below `address`, if it does not reach there.
    pub(crate) fn find_before(&self, address: u64) -> Option<&Vma> {
        let (_, vma) = self.by_start.range(..address).next_back()?;
        Some(vma).filter(|vma| vma.range.end() <= address)
    }

    /// Every area, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Vma> {
        self.by_start.values()
    }

    /// How many areas there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_start.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_start.is_empty()
    }

    /// Whether any area has a byte in `range`.
    #[must_use]
    pub fn overlaps(&self, range: VirtRange) -> bool {
        self.find_from(range.start()).is_some_and(|vma| vma.range.start() < range.end())
    }

    /// Adds an area where there is none; gives it back otherwise.
    ///
    /// # Errors
    /// The area, if it overlaps another.
    pub fn insert(&mut self, vma: Vma) -> Result<(), Vma> {
        if self.overlaps(vma.range) {
            return Err(vma);
        }
        self.by_start.insert(vma.range.start(), vma);
        Ok(())
    }

    /// Takes out what lies in `range`, cutting areas at its ends.
    pub fn detach(&mut self, range: VirtRange) -> Vec<Vma> {
        self.cut(range.start());
        self.cut(range.end());
        let starts: Vec<u64> =
            self.by_start.range(range.start()..range.end()).map(|(start, _)| *start).collect();
        starts.iter().filter_map(|start| self.by_start.remove(start)).collect()
    }

    /// Cuts the area that `address` lies inside, if any, in two.
    pub fn cut(&mut self, address: u64) {
        let Some(whole) = self.find(address).copied() else { return };
        let (Ok(low), Ok(high)) =
            (VirtRange::new(whole.range.start(), address), VirtRange::new(address, whole.range.end()))
        else {
            return;
        };
        self.by_start.insert(low.start(), Vma { range: low, ..whole });
        self.by_start.insert(high.start(), Vma { range: high, ..whole });
    }

    /// The neighbours of a stretch in which no area is left.
    #[must_use]
    pub fn bounds_around(&self, range: VirtRange) -> Bounds {
        let below = self.by_start.range(..range.start()).next_back().map(|(_, vma)| vma.range.end());
        let above = self.by_start.range(range.end()..).next().map(|(start, _)| *start);
        Bounds::between(below, above)
    }

    /// Changes every area in `range`, which starts and ends at area ends.
    pub fn update(&mut self, range: VirtRange, change: impl Fn(&mut Area)) {
        for (_, vma) in self.by_start.range_mut(range.start()..range.end()) {
            change(&mut vma.area);
        }
    }

    /// Lets the area at `start` begin lower.
    pub(crate) fn grow_down(&mut self, start: u64, new_start: u64) -> Option<Vma> {
        let old = self.by_start.remove(&start)?;
        let grown = VirtRange::new(new_start, old.range.end()).map_or(old, |range| Vma { range, ..old });
        self.by_start.insert(grown.range.start(), grown);
        Some(grown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> VirtRange {
        VirtRange::new(start, end).expect("a good range")
    }

    #[test]
    fn detaching_cuts_areas_at_both_ends_and_leaves_the_rest() {
        let mut tree = VmaTree::new();
        tree.insert(Vma { range: range(0x1000, 0x9000), area: Area::anon() }).expect("free");
        let out = tree.detach(range(0x3000, 0x5000));
        assert_eq!(out.iter().map(|vma| vma.range).collect::<Vec<_>>(), [range(0x3000, 0x5000)]);
        let left: Vec<_> = tree.iter().map(|vma| vma.range).collect();
        assert_eq!(left, [range(0x1000, 0x3000), range(0x5000, 0x9000)]);
        assert_eq!(tree.bounds_around(range(0x3000, 0x5000)), Bounds::between(Some(0x3000), Some(0x5000)));
    }

    #[test]
    fn an_overlapping_area_is_refused() {
        let mut tree = VmaTree::new();
        tree.insert(Vma { range: range(0x1000, 0x3000), area: Area::anon() }).expect("free");
        assert!(tree.insert(Vma { range: range(0x2000, 0x4000), area: Area::anon() }).is_err());
        assert!(tree.insert(Vma { range: range(0x3000, 0x4000), area: Area::anon() }).is_ok());
    }
}
