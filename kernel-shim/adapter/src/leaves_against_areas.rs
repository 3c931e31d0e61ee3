//! Every entry must be what the area says in which it is: no more rights, the right page, of a sort
//! that programs may have.
//!
//! A file of pure questions: `tables_against_frames` goes through the tables and asks them.

use mmu_gather::pagetable::VirtRange;
use mmu_hosted::ViolationKind;
use mmu_hosted::arch::{PageSize, Rights};
use mmu_kernel_shim::{Area, AreaKind, FrameKind, Protection, SharedFrames, Vma};
use x86_64::structures::paging::{PageTableFlags, PhysFrame};

use crate::program::{HostedKernel, HostedMm};

/// The bits that this kernel sets in an entry that maps a page, and those that hardware sets.
const KNOWN: PageTableFlags = PageTableFlags::PRESENT
    .union(PageTableFlags::WRITABLE)
    .union(PageTableFlags::USER_ACCESSIBLE)
    .union(PageTableFlags::ACCESSED)
    .union(PageTableFlags::DIRTY)
    .union(PageTableFlags::NO_EXECUTE);

/// Bits 12 to 51: where a page is. Of a large page, bit 12 says how it is cached instead.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const PAT_OF_A_LARGE_PAGE: u64 = 1 << 12;

/// The areas of one address space, asked for addresses that only go up.
#[derive(Debug)]
pub(crate) struct Areas {
    sorted: Vec<Vma>,
    next: usize,
}

impl Areas {
    pub(crate) fn of(mm: &HostedMm) -> Self {
        Self { sorted: mm.vmas().iter().copied().collect(), next: 0 }
    }

    /// The area that covers `range`, which starts no lower than the one asked for before.
    pub(crate) fn covering(&mut self, range: VirtRange) -> Option<Area> {
        while self.sorted.get(self.next)?.range.end() <= range.start() {
            self.next += 1;
        }
        self.sorted.get(self.next).filter(|vma| vma.range.covers(range)).map(|vma| vma.area)
    }
}

/// An entry that maps a page, as hardware reads it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Leaf {
    /// The first address.
    pub(crate) address: u64,
    pub(crate) size: PageSize,
    /// The first frame.
    pub(crate) frame: PhysFrame,
    pub(crate) bits: u64,
    /// What the entry allows, and all those above it.
    pub(crate) rights: Rights,
}

impl Leaf {
    /// The addresses that it maps.
    pub(crate) fn range(&self) -> Option<VirtRange> {
        VirtRange::new(self.address, self.address.checked_add(self.size.bytes())?).ok()
    }
}

/// What is wrong with `leaf` in an area like this, if anything is.
pub(crate) fn find_wrong(
    kernel: &HostedKernel,
    shared: &SharedFrames,
    area: Option<Area>,
    leaf: &Leaf,
) -> Option<ViolationKind> {
    let Some(area) = area else { return Some(ViolationKind::EntryOutsideAreas) };
    if let Some(kind) = find_wrong_bits(area, leaf) {
        return Some(kind);
    }
    if area.protection == Protection::Execute && leaf.rights.no_execute() {
        return Some(ViolationKind::StrayBits);
    }
    if allows_too_much(area, leaf) {
        return Some(ViolationKind::MoreThanAreaAllows);
    }
    let frames = kernel.frames();
    let is_private = matches!(area.kind, AreaKind::Anon | AreaKind::FilePrivate(_));
    let is_writable = leaf.rights.writable();
    if shared.are_zeroes(leaf.frame) {
        return match area.kind {
            AreaKind::Pfn => Some(ViolationKind::WrongPageMapped),
            _ => is_writable.then_some(ViolationKind::SharedPageWritable),
        };
    }
    if shared.device == Some(leaf.frame) || area.kind == AreaKind::Pfn {
        let belongs =
            area.kind == AreaKind::Pfn && shared.is_of_device(leaf.frame, area.file_page(leaf.address));
        return (!belongs).then_some(ViolationKind::WrongPageMapped);
    }
    let Some(meta) = frames.get(leaf.frame) else { return Some(ViolationKind::NoPageMapped) };
    let wanted = if leaf.size == PageSize::Size4KiB { FrameKind::Page } else { FrameKind::Block };
    if meta.kind() != wanted {
        return Some(ViolationKind::NoPageMapped);
    }
    let file = match area.kind {
        AreaKind::FilePrivate(file) | AreaKind::FileShared(file) => Some(file),
        AreaKind::Anon | AreaKind::Pfn => None,
    };
    if meta.is_of_a_file() {
        let is_right = file.is_some_and(|file| meta.is_page_of(file, area.file_page(leaf.address)));
        if !is_right {
            return Some(ViolationKind::WrongPageMapped);
        }
        return (is_private && is_writable).then_some(ViolationKind::SharedPageWritable);
    }
    if !is_private {
        return Some(ViolationKind::WrongPageMapped);
    }
    (is_writable && !meta.is_exclusive()).then_some(ViolationKind::SharedPageWritable)
}

fn allows_too_much(area: Area, leaf: &Leaf) -> bool {
    let is_executable = leaf.rights.user() && !leaf.rights.no_execute();
    if is_executable && area.protection != Protection::Execute {
        return true;
    }
    match area.protection {
        Protection::Write => false,
        Protection::Read | Protection::Execute => leaf.rights.writable(),
        Protection::Nothing => leaf.rights.writable() || leaf.rights.user(),
    }
}

/// How a page is cached, its protection key, whether it is global, what it may not be used for,
/// what is the kernel's own: an entry says of these what its area does, whatever call has made it.
fn find_wrong_bits(area: Area, leaf: &Leaf) -> Option<ViolationKind> {
    let attributes = area.attributes.bits();
    let (known, wanted) = match leaf.size {
        PageSize::Size4KiB => (ADDRESS | KNOWN.bits(), attributes),
        PageSize::Size2MiB | PageSize::Size1GiB => {
            let known = KNOWN.union(PageTableFlags::HUGE_PAGE).bits();
            let size = PageTableFlags::HUGE_PAGE.bits();
            let pat = if attributes & size != 0 { PAT_OF_A_LARGE_PAGE } else { 0 };
            (ADDRESS & !PAT_OF_A_LARGE_PAGE | known, attributes & !size | pat)
        }
    };
    let besides = leaf.bits & !known;
    if besides & !wanted != 0 {
        return Some(ViolationKind::StrayBits);
    }
    (besides != wanted).then_some(ViolationKind::BitsLost)
}
