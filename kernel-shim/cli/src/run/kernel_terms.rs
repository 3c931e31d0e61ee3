//! What a layout or a log says of a page or an area, in the terms of the kernel that builds it.

use std::collections::HashMap;

use mmu_kernel_shim::{AreaKind, PageContent, Protection};

use crate::input::layout::{LayoutVma, PageState, Prot, Sharing, VmaKind};

/// What a page in this state holds.
pub(crate) const fn page_content(state: PageState) -> PageContent {
    match state {
        PageState::Anon => PageContent::Anon,
        PageState::File => PageContent::File,
        PageState::Zero => PageContent::Zero,
        PageState::Pfn => PageContent::Pfn,
        PageState::AnonHuge => PageContent::AnonBlock,
        PageState::FileHuge => PageContent::FileBlock,
        PageState::ZeroHuge => PageContent::ZeroBlock,
        PageState::Swap => PageContent::Swap,
    }
}

/// What a program may do with an area, as far as this kernel tells rights apart.
pub(crate) const fn protection(prot: Prot) -> Protection {
    match (prot.read || prot.exec, prot.write) {
        (_, true) => Protection::Write,
        (true, false) => Protection::Read,
        (false, false) => Protection::Nothing,
    }
}

/// The files of a layout, each with a number of its own.
#[derive(Debug, Default)]
pub(crate) struct FileNumbers {
    by_name: HashMap<String, u32>,
}

impl FileNumbers {
    /// What backs an area; areas of the same file get the same number.
    pub(crate) fn area_kind(&mut self, vma: &LayoutVma) -> AreaKind {
        let name = match &vma.kind {
            VmaKind::Anon | VmaKind::Heap | VmaKind::Stack => return AreaKind::Anon,
            VmaKind::Pfn(_) => return AreaKind::Pfn,
            VmaKind::File(name) | VmaKind::Shared(name) | VmaKind::HugeTlb(name) => name,
        };
        // At most one number an area, far below 2^32.
        let next = u32::try_from(self.by_name.len()).unwrap_or(u32::MAX);
        let file = *self.by_name.entry(name.clone()).or_insert(next);
        match vma.sharing {
            Sharing::Private => AreaKind::FilePrivate(file),
            Sharing::Shared => AreaKind::FileShared(file),
        }
    }
}

/// The dirty pages of one area. A layout says how many there are and not which: the first pages of
/// the file are taken.
#[derive(Debug)]
pub(crate) struct DirtyPages {
    nr_left: u64,
}

impl DirtyPages {
    /// None have been placed yet. Private pages of a file that are dirty are anonymous ones.
    pub(crate) fn of_area(vma: &LayoutVma) -> Self {
        Self { nr_left: if vma.sharing == Sharing::Shared { vma.nr_dirty.unwrap_or(0) } else { 0 } }
    }

    /// How many of the first pages of a run of `nr_pages` pages in `state` are dirty.
    pub(crate) fn take(&mut self, state: PageState, nr_pages: u64) -> u64 {
        let nr_dirty = if state == PageState::File { self.nr_left.min(nr_pages) } else { 0 };
        self.nr_left -= nr_dirty;
        nr_dirty
    }
}
