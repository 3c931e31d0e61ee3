//! Where areas lie: places that no two owners share, in tables that some of them do.

use mmu_gather::pagetable::VirtRange;

use crate::memory::PAGE;
use crate::tlb::PAGES_A_TABLE;

/// Places of each owner in a shared address space: the first [`COMMON`] in tables that all owners
/// use, two in each of four tables of its own.
pub(crate) const PLACES: u64 = COMMON + 8;
const COMMON: u64 = 4;
/// Most pages of an area.
pub(crate) const MOST_PAGES: u64 = 64;

const A_TABLE: u64 = PAGES_A_TABLE as u64;
/// The tables that all use start with this one.
const FIRST_COMMON: u64 = 2;
/// Those of single owners with this one: four each.
const FIRST_OWN: u64 = 8;
/// What only one CPU's own address spaces map.
const PRIVATE: u64 = 44;
const STACK: u64 = 50;

/// The first address of an owner's place.
pub(crate) const fn address_of(owner: u64, place: u64) -> u64 {
    let page = if place < COMMON {
        (FIRST_COMMON + place) * A_TABLE + owner * MOST_PAGES
    } else {
        let own = place - COMMON;
        (FIRST_OWN + owner * 4 + own / 2) * A_TABLE + own % 2 * 256
    };
    page * PAGE
}

/// The first address of an area in an address space of the CPU's own: one of 8 places, in 4 tables.
pub(crate) const fn private_address(place: u64) -> u64 {
    (PRIVATE * A_TABLE + place * 256) * PAGE
}

/// Where a new program's stack is before it moves down.
pub(crate) const fn stack_address() -> u64 {
    (STACK * A_TABLE + 300) * PAGE
}

/// So many pages from `start`.
///
/// # Panics
/// If that is no range: 0 pages.
pub(crate) fn pages(start: u64, nr_pages: u64) -> VirtRange {
    VirtRange::new(start, start + nr_pages * PAGE).expect("some pages of the window")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::MAX_CPUS;
    use crate::tlb::WINDOW_END;

    #[test]
    fn no_two_places_overlap_and_all_lie_in_the_window() {
        let mut starts: Vec<u64> = (0..MAX_CPUS as u64)
            .flat_map(|owner| (0..PLACES).map(move |place| address_of(owner, place)))
            .collect();
        starts.extend((0..8).map(private_address));
        starts.push(stack_address());
        starts.sort_unstable();
        for pair in starts.windows(2) {
            assert!(pair[1] - pair[0] >= MOST_PAGES * PAGE, "{pair:x?}");
        }
        assert!(starts.iter().all(|start| start + MOST_PAGES * PAGE <= WINDOW_END));
    }
}
