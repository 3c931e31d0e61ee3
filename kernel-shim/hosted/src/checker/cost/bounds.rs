//! What a call may cost, as functions of what it did: pure, and total.

use mmu_gather::Limits;
use mmu_gather::pagetable::VirtRange;
use mmu_gather::tlb::PageSpan;

/// A sort of call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CallKind {
    /// munmap, or another that takes areas down.
    Unmap,
    /// MADV_DONTNEED.
    Discard,
    /// MADV_GUARD_INSTALL, MADV_GUARD_REMOVE.
    Guard,
    /// mprotect.
    Protect,
    /// mremap.
    Remap,
    /// The move of a stack.
    MoveStack,
    /// fork.
    Fork,
    /// exit.
    Exit,
    /// Reclaim.
    Reclaim,
    /// A fault of a program that writes.
    Fault,
    /// A fault of a program that reads.
    ReadFault,
    /// mmap.
    Map,
}

impl CallKind {
    /// Its word in what is told.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Unmap => "munmap",
            Self::Discard => "discard",
            Self::Guard => "guard",
            Self::Protect => "mprotect",
            Self::Remap => "mremap",
            Self::MoveStack => "move of a stack",
            Self::Fork => "fork",
            Self::Exit => "exit",
            Self::Reclaim => "reclaim",
            Self::Fault => "fault of a write",
            Self::ReadFault => "fault of a read",
            Self::Map => "mmap",
        }
    }

    /// Whether such a call may have a gather open, for which others flush everything (rule G6).
    pub(crate) const fn opens_gathers(self) -> bool {
        !matches!(self, Self::Map | Self::Reclaim | Self::ReadFault)
    }

    /// Whether it moves entries from table to table, which no note tells one by one.
    pub(crate) const fn moves(self) -> bool {
        matches!(self, Self::Remap | Self::MoveStack)
    }
}

/// What a call has done since it began, or since it last said that a part of it is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Done {
    /// Leaves cleared or restricted.
    pub(crate) leaves: u64,
    /// Large leaves among them.
    pub(crate) large: u64,
    /// Large leaves split.
    pub(crate) splits: u64,
    /// Tables taken, to be linked.
    pub(crate) linked: u64,
    /// Tables unhooked.
    pub(crate) tables: u64,
    /// Batch pages that the kernel refused.
    pub(crate) refused: u64,
    /// Pages whose reverse mapping the kernel wants to remove later, under the lock of their table.
    pub(crate) delayed: u64,
    /// Areas it works on.
    pub(crate) areas: u64,
    /// Flushes asked for.
    pub(crate) requests: u64,
    /// Flushes of address spaces that nobody else knows: a fork that fails ends its child.
    pub(crate) of_others: u64,
    /// Batch pages taken.
    pub(crate) batches: u64,
}

/// The addresses changed since the last flush, and the smallest leaf among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Changed {
    /// The first.
    pub(crate) start: u64,
    /// The end.
    pub(crate) end: u64,
    /// Of the smallest.
    pub(crate) shift: u32,
}

impl Changed {
    /// Nothing.
    pub(crate) const NOTHING: Self = Self { start: u64::MAX, end: 0, shift: u32::MAX };

    /// Anything.
    pub(crate) const ANYWHERE: Self = Self { start: 0, end: 1 << 63, shift: 12 };

    pub(crate) const fn is_nothing(self) -> bool {
        self.end == 0
    }

    /// With `start..end`, too.
    pub(crate) fn with(self, start: u64, end: u64, shift: u32) -> Self {
        Self { start: self.start.min(start), end: self.end.max(end), shift: self.shift.min(shift) }
    }

    /// The first address, rounded down to a leaf of the smallest size.
    pub(crate) const fn first(self) -> u64 {
        if self.is_nothing() { 0 } else { self.start & !((1u64 << self.shift) - 1) }
    }

    /// Whether a flush is of this, exactly.
    pub(crate) fn is_span(self, span: Option<PageSpan>) -> bool {
        span.is_some_and(|span| (span.start, span.end) == (self.start, self.end))
    }

    /// How many invalidations make one CPU forget it: one a leaf of the smallest size, from the
    /// first to the last.
    pub(crate) fn strides(self) -> u64 {
        if self.is_nothing() {
            return 0;
        }
        let stride = 1u64 << self.shift;
        (self.end.next_multiple_of(stride) - (self.start & !(stride - 1))) >> self.shift
    }
}

/// Pages that the queue of one gather holds before it must flush.
fn capacity(call: CallKind, limits: &Limits) -> u64 {
    // A bundle or a batch counts as full one slot early, so that a run fits.
    let pages = match call {
        CallKind::Exit => limits.batch_pages.min(Limits::EXIT_BATCH_PAGES),
        _ => limits.batch_pages,
    };
    (u64::from(limits.bundle_slots) - 1) + (u64::from(limits.batch_slots) - 1) * u64::from(pages)
}

/// The most flushes that a call asks for.
///
/// One when it is done; one for each time that its gather was full, of pages or of tables; one for
/// each batch page that was refused it, each large leaf that it split, and each page whose dirty
/// bit must be flushed for under the lock of its table. If tables go, one before the first: of
/// device frames.
pub(crate) fn most_requests(call: CallKind, range: VirtRange, done: &Done, limits: &Limits) -> u64 {
    let when_full =
        done.leaves / capacity(call, limits).max(1) + done.tables / u64::from(limits.table_slots.max(1));
    // What an exiting gather flushes after: rule G7, the work of large leaves.
    let large = done.large / 64;
    let before_tables = u64::from(done.tables > 0);
    let moved = if call.moves() { 2 * (range.nr_pages() / 512 + 2) } else { 0 };
    // What is cleared by an exit whose address space a CPU still has is flushed for twice.
    // A fault may find one page after another there that its program may not write to.
    let replaced = if call == CallKind::Fault { done.leaves.saturating_sub(1) } else { 0 };
    let leaves_everywhere = u64::from(call == CallKind::Exit);
    1 + when_full
        + large
        + done.refused
        + done.splits
        + done.delayed
        + before_tables
        + moved
        + replaced
        + leaves_everywhere
}

/// The most batch pages that a call takes: as many as its pages fill, and one for tables. They are
/// used again after each flush.
pub(crate) fn most_batches(call: CallKind, done: &Done, limits: &Limits) -> u64 {
    // One is asked for when the last is full, before anybody knows whether another page comes.
    let beyond_bundle = (done.leaves + 1).saturating_sub(u64::from(limits.bundle_slots) - 1);
    let filled = beyond_bundle.div_ceil((u64::from(limits.batch_slots) - 1).max(1));
    let pages = match call {
        CallKind::Exit => limits.batch_pages.min(Limits::EXIT_BATCH_PAGES),
        _ => limits.batch_pages,
    };
    filled.min(u64::from(pages)) + u64::from(done.tables > 0)
}

/// The most seams that a call crosses while it holds a map lock, or none if its range says nothing
/// of its size.
///
/// Eight for each page of the range: its entry is looked at, its page taken or freed, its lock
/// taken by whoever goes page by page. And what each flush costs, here and in answers to others.
pub(crate) fn most_seams(
    call: CallKind,
    range: VirtRange,
    done: &Done,
    limits: &Limits,
    ceiling: u64,
) -> Option<u64> {
    match call {
        CallKind::Fork | CallKind::Exit | CallKind::MoveStack => None,
        _ => {
            let flushes = most_requests(call, range, done, limits) + done.requests;
            Some(256 + 8 * range.nr_pages() + 16 * done.areas + (ceiling + 32) * flushes)
        }
    }
}

/// What a call did with one table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Taken {
    /// How often it took its lock.
    pub(crate) takes: u64,
    /// Leaves that it changed under it.
    pub(crate) leaves: u64,
    /// How often it took it to unhook last-level tables there.
    pub(crate) unhookings: u64,
    /// Last-level tables that it unhooked there; and others.
    pub(crate) children: u64,
    pub(crate) upper_children: u64,
}

/// The most often that a call takes the lock of one table to unhook last-level tables there: once
/// for each area, and for 32 tables.
pub(crate) fn most_unhookings(done: &Done, table: &Taken) -> u64 {
    done.areas.max(1) + table.children / 32
}

/// The most often that a call takes the lock of one table.
///
/// Once for each area that reaches into it. To unhook its children once for each area, or for 32 of
/// them, or for each above the last level. Without such children once more, and if it has leaves,
/// once more for each flush that was made before they were all cleared, and for each large one.
/// Reclaim finds its pages one by one, as by their reverse mappings, and takes the lock for each.
pub(crate) fn most_takes(call: CallKind, range: VirtRange, done: &Done, table: &Taken) -> u64 {
    let areas = done.areas.max(1);
    let children = table.children.min(areas + table.children / 32) + table.upper_children;
    let again = if table.leaves > 0 { 2 + done.requests + done.of_others + done.large } else { 0 };
    let own = match call {
        CallKind::Reclaim => 2 * range.nr_pages().min(512) + 2,
        // A move takes both locks for each table that it moves, whole or page by page.
        CallKind::Remap | CallKind::MoveStack => 8 + 2 * (range.nr_pages() / 512).min(512),
        CallKind::Guard => 8,
        // Once for each large leaf, whatever comes of it.
        CallKind::Protect => 1 + range.nr_pages() / 512,
        // To look, to take what must be replaced, to look again.
        CallKind::Fault | CallKind::ReadFault => 3,
        // Once for each large page of a device, which it copies one by one.
        CallKind::Fork => 513,
        // A table of leaves may be looked at once more, by whoever finds that reclaim owes a flush.
        CallKind::Unmap | CallKind::Discard | CallKind::Exit | CallKind::Map => {
            u64::from(table.children == 0)
        }
    };
    own + areas + done.linked + again + 2 * done.splits + children
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits =
        Limits::DEFAULT.with_bundle_slots(4).with_batch_slots(16).with_batch_pages(3).with_table_slots(3);

    fn pages(nr_pages: u64) -> VirtRange {
        VirtRange::new(1 << 30, (1 << 30) + nr_pages * 4096).expect("a good range")
    }

    fn leaves(leaves: u64) -> Done {
        Done { leaves, areas: 1, ..Done::default() }
    }

    #[test]
    fn a_call_that_fits_into_its_gather_flushes_once() {
        let one = |call, done| most_requests(call, pages(3), &done, &LIMITS);
        for call in [CallKind::Unmap, CallKind::Discard, CallKind::Protect, CallKind::Fork, CallKind::Fault] {
            assert_eq!(one(call, leaves(0)), 1, "{call:?}");
            assert_eq!(one(call, leaves(1)), 1, "{call:?}");
        }
        // If tables go, what device frames were at is flushed for before the first.
        assert_eq!(one(CallKind::Unmap, Done { tables: 1, ..leaves(3) }), 2);
    }

    #[test]
    fn each_full_queue_explains_one_flush_more() {
        let requests = |done| most_requests(CallKind::Unmap, pages(300), &done, &LIMITS);
        // Three in the bundle, fifteen in each of three batches.
        assert_eq!((requests(leaves(47)), requests(leaves(48)), requests(leaves(96))), (1, 2, 3));
        assert_eq!(requests(Done { tables: 6, ..leaves(0) }), 1 + 1 + 2);
        assert_eq!(requests(Done { refused: 2, splits: 1, delayed: 1, ..leaves(0) }), 1 + 4);
        // An exit takes one batch only: nobody waits for its pages.
        assert_eq!(most_requests(CallKind::Exit, pages(300), &leaves(18), &LIMITS), 1 + 1 + 1);
    }

    #[test]
    fn batch_pages_are_as_many_as_pages_fill_however_often_it_flushes() {
        let batches = |done| most_batches(CallKind::Unmap, &done, &LIMITS);
        assert_eq!(
            (batches(leaves(2)), batches(leaves(3)), batches(leaves(17)), batches(leaves(18))),
            (0, 1, 1, 2)
        );
        assert_eq!(batches(leaves(1000)), 3);
        assert_eq!(batches(Done { tables: 100, ..leaves(1000) }), 4);
    }

    #[test]
    fn the_lock_of_a_table_is_not_taken_for_each_child() {
        let takes = |call, table| most_takes(call, pages(100), &leaves(0), &table);
        let of_children = |children| takes(CallKind::Unmap, Taken { children, ..Taken::default() });
        let children = Taken { children: 31, ..Taken::default() };
        assert_eq!(most_unhookings(&leaves(1), &children), 1);
        assert_eq!(most_unhookings(&Done { areas: 3, ..leaves(1) }, &Taken { children: 32, ..children }), 4);
        assert_eq!((of_children(1), of_children(3), of_children(31)), (2, 2, 2));
        assert_eq!((of_children(32), of_children(64)), (3, 4), "32 children at a time");
        assert_eq!(takes(CallKind::Unmap, Taken { upper_children: 3, ..Taken::default() }), 5);
        assert!(takes(CallKind::Reclaim, Taken::default()) >= 200, "page by page");
        let flushed = Done { requests: 5, ..leaves(1) };
        let with_leaves = Taken { leaves: 1, ..Taken::default() };
        let takes = |table| most_takes(CallKind::Unmap, pages(100), &flushed, &table);
        assert_eq!(takes(with_leaves) - takes(Taken::default()), 7, "a table is visited again after a flush");
    }

    #[test]
    fn a_large_page_is_one_invalidation_and_a_small_one_beside_it_makes_it_512() {
        let large = Changed::NOTHING.with(2 << 20, 4 << 20, 21);
        assert_eq!(large.strides(), 1);
        assert_eq!(large.with(4 << 20, (4 << 20) + 4096, 12).strides(), 513);
        assert_eq!(Changed::NOTHING.strides(), 0);
        // A table of one page is flushed for at an address inside its span.
        assert_eq!(Changed::NOTHING.with(3 << 19, (3 << 19) + 4096, 21).strides(), 1);
    }

    #[test]
    fn what_is_done_under_a_map_lock_is_bounded_where_the_range_says_how_much_it_is() {
        let seams = |call, range| most_seams(call, range, &leaves(1), &LIMITS, 33);
        assert!(seams(CallKind::Unmap, pages(1)) < seams(CallKind::Unmap, pages(1000)));
        assert!(seams(CallKind::Fault, pages(1)).is_some_and(|most| most < 1000));
        assert_eq!(seams(CallKind::Exit, pages(1)), None);
    }
}
