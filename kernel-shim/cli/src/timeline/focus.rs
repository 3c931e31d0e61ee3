//! Which rows of a timeline explain its violation; without one, which make the outline.

use mmu_gather::pagetable::Level;
use mmu_gather::tlb::TlbEvent;
use mmu_hosted::FrameRole;
use mmu_hosted::watch::Use;
use mmu_hosted::{Detail, Op, Sequence, ViolationKind, What};
use x86_64::structures::paging::PhysFrame;

use crate::timeline::rows::{Focus, Row, Timeline, has_address};

/// How many loads of CR3 on the CPU of a violation are shown, counted back from the violation.
const MOST_LOADS: usize = 6;

/// Marks the rows that matter.
pub(crate) fn mark_what_matters(timeline: &mut Timeline, sequence: &Sequence) {
    let matters = match &timeline.focus {
        Some(focus) => Seeker { focus, rows: &timeline.rows, sequence }.seek(),
        None => timeline.rows.iter().map(|row| is_outline(row, sequence)).collect(),
    };
    for (row, matters) in timeline.rows.iter_mut().zip(matters) {
        row.matters = matters;
    }
}

/// What is shown of a run without a violation: calls, generations, requests, flushes, switches.
fn is_outline(row: &Row, sequence: &Sequence) -> bool {
    match row.what {
        // At power-on and at the end every CPU loads the kernel's.
        What::LoadedCr3(..) => row.call.is_some(),
        What::Sent(_) | What::Answered(_) | What::Lost(_) => true,
        What::Detail(Detail::Began(..)) => true,
        // Where a step is over at once, nothing happens between its two ends.
        What::Detail(Detail::Ended(step)) => sequence
            .steps
            .get(step)
            .is_some_and(|step| !matches!(step.op, Op::Batches(_) | Op::Tables(_) | Op::Lazy | Op::Map(..))),
        What::Detail(Detail::Tlb(event, _)) => {
            !matches!(event, TlbEvent::Requested { .. } | TlbEvent::IpisSent(_))
        }
        What::Detail(Detail::Gather(event)) => decides(event),
        What::Detail(Detail::Cleared(..)) => true,
        _ => false,
    }
}

/// Whether a gather did something out of the ordinary.
const fn decides(event: mmu_gather::GatherEvent) -> bool {
    use mmu_gather::GatherEvent as G;
    matches!(
        event,
        G::BatchRefused
            | G::ForcedFlush
            | G::DirtyFlush
            | G::NestedFlush
            | G::DeferredFlushSeen
            | G::TableUnhooked(_)
            | G::TableFallback
            | G::Released { .. }
    )
}

struct Seeker<'a> {
    focus: &'a Focus,
    rows: &'a [Row],
    sequence: &'a Sequence,
}

impl Seeker<'_> {
    fn seek(&self) -> Vec<bool> {
        let mut matters: Vec<bool> = self
            .rows
            .iter()
            .enumerate()
            .map(|(at, row)| at <= self.focus.row && self.is_about(row))
            .collect();
        matters[self.focus.row] = true;
        self.add_requests(&mut matters);
        self.add_loads(&mut matters);
        self.add_calls(&mut matters);
        matters
    }

    /// Whether the row alone says that it is about the address, the frame or the address space.
    fn is_about(&self, row: &Row) -> bool {
        let violation = &self.focus.violation;
        let here = row.cpu == violation.cpu.index();
        let ours = self.is_ours(row);
        let address = violation.address;
        match row.what {
            What::Allocated(frame, role) | What::Freed(frame, role) => self.names(frame, role),
            What::Accessed(page, frame) => {
                self.is_the_frame(frame) || (ours && here && page >> 12 == address >> 12)
            }
            What::Invlpg(page) => ours && page >> 12 == address >> 12,
            What::Skipped(page) => ours && here && page.is_none_or(|page| page >> 12 == address >> 12),
            What::Unmapped(start, end) => ours && start <= address && address < end,
            What::Detail(Detail::Mapped(_, page, frame)) => {
                self.is_the_frame(frame) || (ours && page >> 12 == address >> 12)
            }
            What::Detail(Detail::Filled(page, frame, held, _)) => match held.as_a {
                Use::Page(_) => self.is_the_frame(frame) || (ours && here && page >> 12 == address >> 12),
                Use::Table(_) | Use::Root => frame == violation.frame,
            },
            What::Detail(Detail::Cleared(page, level, frame)) => {
                self.is_the_frame(frame) || (ours && covers(page, level, address))
            }
            What::Detail(Detail::Restricted(page, level)) => ours && covers(page, level, address),
            What::Detail(Detail::Tlb(event, _)) => self.is_flush_about(row, event),
            _ => false,
        }
    }

    fn is_flush_about(&self, row: &Row, event: TlbEvent) -> bool {
        match event {
            TlbEvent::Raised { span, .. } => {
                row.root.is_some()
                    && row.root == self.focus.root
                    && (self.is_of_a_table()
                        || span.is_none_or(|span| {
                            span.start <= self.focus.violation.address
                                && self.focus.violation.address < span.end
                        }))
            }
            TlbEvent::Requested { .. } | TlbEvent::IpisSent(_) | TlbEvent::IpisSaved { .. } => false,
            // What the CPU of the violation flushed of the address space, or did not.
            _ => {
                row.cpu == self.focus.violation.cpu.index()
                    && (row.root == self.focus.root || row.root.is_none())
            }
        }
    }

    /// Whether the frame, alone or as part of a block, is that of the violation.
    fn names(&self, frame: PhysFrame, role: FrameRole) -> bool {
        let shift = if role == FrameRole::Block { 21 } else { 12 };
        let number = |frame: PhysFrame| frame.start_address().as_u64() >> shift;
        number(frame) == number(self.focus.violation.frame)
    }

    /// Whether this is the frame that the violation is about. A violation that concerns an address
    /// is about no frame: the frame may be the page of zeroes, which is mapped everywhere.
    fn is_the_frame(&self, frame: PhysFrame) -> bool {
        use ViolationKind as V;
        let of_an_address = matches!(
            self.focus.violation.kind,
            V::AddressUsableAfterUnmap
                | V::PageUsableAfterDiscard
                | V::RightsUsableAfterProtect
                | V::TwoPageSizes
                | V::SlotIsOlder
                | V::NotInCpumask
        );
        frame == self.focus.violation.frame && !of_an_address
    }

    fn is_ours(&self, row: &Row) -> bool {
        has_address(self.focus.violation.kind) && self.is_of_the_same(row)
    }

    fn is_of_the_same(&self, row: &Row) -> bool {
        self.focus.root.is_none() || row.root.is_none() || row.root == self.focus.root
    }

    fn is_of_a_table(&self) -> bool {
        match &self.focus.violation.entry {
            Some(entry) => !matches!(entry.held.as_a, Use::Page(_)),
            None => self.focus.violation.kind == ViolationKind::TableReachableAfterFree,
        }
    }

    /// Requests that belong to a generation that matters, with their answers, and what was spared.
    fn add_requests(&self, matters: &mut [bool]) {
        let nr_cpus = self.rows.iter().map(|row| row.cpu + 1).max().unwrap_or(0);
        let mut raised = vec![false; nr_cpus];
        for at in 0..=self.focus.row {
            let row = &self.rows[at];
            match row.what {
                What::Detail(Detail::Tlb(TlbEvent::Raised { .. }, _)) => raised[row.cpu] = matters[at],
                What::Detail(Detail::Ended(_)) => raised[row.cpu] = false,
                What::Sent(_) if raised[row.cpu] => {
                    matters[at] = true;
                    if let Some(answer) = row.partner.filter(|answer| *answer <= self.focus.row) {
                        matters[answer] = true;
                    }
                }
                What::Lost(from) => matters[at] |= raised.get(from.index()) == Some(&true),
                What::Detail(Detail::Tlb(TlbEvent::IpisSaved { .. }, _)) => matters[at] |= raised[row.cpu],
                _ => {}
            }
        }
    }

    /// The last loads of CR3 on the CPU of the violation, and those of the address space there.
    fn add_loads(&self, matters: &mut [bool]) {
        let mut left = MOST_LOADS;
        for at in (0..=self.focus.row).rev() {
            let row = &self.rows[at];
            if row.cpu == self.focus.violation.cpu.index()
                && matches!(row.what, What::LoadedCr3(..))
                && left > 0
            {
                left -= 1;
                matters[at] = true;
            }
        }
    }

    /// Steps in which something matters, from their beginning to their end; what their gathers
    /// decided when it did.
    fn add_calls(&self, matters: &mut [bool]) {
        let mut counts = vec![0_usize; self.sequence.steps.len()];
        let mut clears = vec![false; self.sequence.steps.len()];
        for (row, matters) in self.rows.iter().zip(matters.iter()) {
            if let Some(call) = row.call.filter(|_| *matters)
                && let Some(count) = counts.get_mut(call)
            {
                *count += 1;
                clears[call] |= matches!(row.what, What::Detail(Detail::Cleared(..)) | What::Freed(..));
            }
        }
        for (row, matters) in self.rows.iter().zip(matters).take(self.focus.row) {
            match row.what {
                What::Detail(Detail::Began(step, _) | Detail::Ended(step)) => {
                    *matters = counts.get(step).is_some_and(|count| *count > 0);
                }
                What::Detail(Detail::Gather(event)) => {
                    let clears = row.call.and_then(|call| clears.get(call));
                    *matters = clears == Some(&true) && decides(event);
                }
                _ => {}
            }
        }
    }
}

/// Whether the entry of `level` that maps `page` covers `address`.
fn covers(page: u64, level: Level, address: u64) -> bool {
    let span = level.entry_span();
    page & !(span - 1) <= address && address - (page & !(span - 1)) < span
}
