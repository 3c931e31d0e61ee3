//! The ways in which the engine tears a space down.
#![expect(unsafe_code, reason = "the engine takes the map lock on trust")]

use mmu_gather::pagetable::{Bounds, Level, VirtRange};
use mmu_gather::{Limits, MmuGather, Vma, VmaKind, exit_mmap, unmap_region, zap_page_range};

use mmu_measured::machine::{Counting, Machine};
use mmu_measured::space::Space;

/// The area at `range`, of pages with counts.
#[must_use]
#[inline]
pub const fn vma(range: VirtRange) -> Vma<()> {
    Vma { range, kind: VmaKind::Normal, area: () }
}

/// Exit: everything is unmapped at once, and no CPU runs in the space.
#[inline(never)]
pub fn exit<C: Counting>(machine: &Machine<'_, C>, space: &Space<'_>, limits: &Limits) {
    let vmas = space.shape.areas.iter().copied().map(vma);
    // SAFETY: this thread alone knows the space, and its CPUs are lazy.
    unsafe { exit_mmap(machine, &space.mm, limits, vmas, || {}) }.free();
}

/// Why `expect` holds: every shape here promises it.
const WHOLE: &str = "no area ends in the middle of a large leaf";

/// One munmap over all areas, while programs run in the space.
///
/// # Panics
/// If an area ends in the middle of a large leaf.
#[inline(never)]
pub fn munmap<C: Counting>(machine: &Machine<'_, C>, space: &Space<'_>, limits: &Limits) {
    let vmas = space.shape.areas.iter().copied().map(vma);
    // SAFETY: this thread alone changes the space; nothing else is mapped.
    unsafe { unmap_region(machine, &space.mm, limits, vmas, Bounds::whole(), || {}) }.expect(WHOLE).free();
}

/// One munmap for each area, none of which [cuts a large leaf](munmap). `bounds` are the
/// neighbours: the next areas, or the pages that stay.
#[inline(never)]
pub fn munmap_each<C: Counting>(machine: &Machine<'_, C>, space: &Space<'_>, limits: &Limits) {
    if space.shape.is_one_by_one() {
        for area in &space.shape.areas {
            let up_to = if space.shape.tables_go_one_by_one() {
                VirtRange::of_entry(Level::Pmd, area.start())
            } else {
                *area
            };
            let bounds = Bounds::between(Some(up_to.start()), Some(up_to.end()));
            unmap_one(machine, space, limits, *area, bounds);
        }
        return;
    }
    let mut areas = space.shape.areas.iter().peekable();
    while let Some(area) = areas.next() {
        // The areas below are unmapped already.
        let bounds = Bounds::between(None, areas.peek().map(|next| next.start()));
        unmap_one(machine, space, limits, *area, bounds);
    }
}

fn unmap_one<C: Counting>(
    machine: &Machine<'_, C>,
    space: &Space<'_>,
    limits: &Limits,
    area: VirtRange,
    bounds: Bounds,
) {
    // SAFETY: this thread alone changes the space, and nothing else is mapped between the bounds.
    unsafe { unmap_region(machine, &space.mm, limits, [vma(area)], bounds, || {}) }.expect(WHOLE).free();
}

/// A gather that is begun, finds nothing, and is finished: the fixed cost.
#[inline(never)]
pub fn nothing<C: Counting>(machine: &Machine<'_, C>, space: &Space<'_>) {
    // SAFETY: this thread alone changes the space.
    unsafe { MmuGather::new(machine, &space.mm) }.flush().free();
}

/// Looks every leaf up, from the root; returns how many were found.
///
/// # Panics
/// If one is missing.
#[inline(never)]
#[must_use]
pub fn look_up<C: Counting>(machine: &Machine<'_, C>, space: &Space<'_>) -> u64 {
    let mut sum = 0;
    for leaf in &space.shape.leaves {
        // SAFETY: nobody frees tables meanwhile.
        let found = unsafe { space.mm.space().lookup(machine, leaf.address) };
        assert!(found.level <= Level::Pmd, "{leaf:?} is not mapped");
        sum += found.value.leaf_address(found.level).as_u64() >> 12;
    }
    sum
}

/// Removes the pages of all areas and keeps the tables: madvise(MADV_DONTNEED) an area.
///
/// # Panics
/// As [`munmap`].
#[inline(never)]
pub fn discard<C: Counting>(machine: &Machine<'_, C>, space: &Space<'_>, limits: &Limits) {
    for area in &space.shape.areas {
        // SAFETY: this thread alone changes the space.
        unsafe { zap_page_range(machine, &space.mm, limits, &vma(*area), *area) }.expect(WHOLE).free();
    }
}
