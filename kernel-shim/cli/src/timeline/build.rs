//! The timeline of a run, made from its events.

use mmu_gather::tlb::TlbEvent;
use mmu_hosted::{Detail, Run, Sequence, Verdict, Violation, What};
use x86_64::structures::paging::PhysFrame;

use crate::timeline::focus::mark_what_matters;
use crate::timeline::names::Names;
use crate::timeline::phrases::{long_phrase, short_phrase};
use crate::timeline::rows::{Focus, Mark, Row, Timeline, has_address, is_of_an_entry};

impl Timeline {
    /// The timeline of a run of `sequence` that was told to remember all.
    #[must_use]
    pub(crate) fn from_run(sequence: &Sequence, run: &Run) -> Self {
        let nr_cpus = usize::try_from(sequence.nr_cpus).unwrap_or(64);
        let mut names = Names::new(nr_cpus);
        let mut rows: Vec<Row> = Vec::with_capacity(run.events.len());
        let mut violated: Vec<(usize, Option<PhysFrame>)> = Vec::new();
        // The requests to each CPU that were not answered yet: sender, row.
        let mut requests: Vec<Vec<(usize, usize)>> = vec![Vec::new(); nr_cpus];
        for event in &run.events {
            let cpu = event.cpu.index();
            if cpu >= nr_cpus {
                continue;
            }
            names.before(event, sequence);
            let root = names.root_of(event, sequence);
            let mut row = Row {
                at: event.step,
                cpu,
                mark: mark(event.what),
                short: short_phrase(event.what, &names, sequence),
                long: long_phrase(event, &names, sequence),
                call: names.call_on(cpu),
                matters: false,
                partner: None,
                what: event.what,
                root,
                mm: root.map(|root| names.root(root)),
            };
            match event.what {
                What::Sent(to) => {
                    if let Some(waiting) = requests.get_mut(to.index()) {
                        waiting.push((cpu, rows.len()));
                    }
                }
                What::Answered(from) | What::Lost(from) => {
                    let waiting = &mut requests[cpu];
                    if let Some(place) = waiting.iter().position(|(sender, _)| *sender == from.index()) {
                        let (_, sent) = waiting.remove(place);
                        row.partner = Some(sent);
                        rows[sent].partner = Some(rows.len());
                    }
                }
                What::Detail(Detail::Violated(..)) => {
                    violated.push((rows.len(), names.loaded_on(cpu)));
                }
                _ => {}
            }
            rows.push(row);
            names.after(event);
        }
        let mut timeline = Self { nr_cpus, rows, focus: None };
        timeline.focus = told(&run.verdict).and_then(|violation| {
            let matches = |row: usize| match timeline.rows[row].what {
                What::Detail(Detail::Violated(kind, address, frame)) => {
                    kind == violation.kind
                        && address == violation.address
                        && frame == violation.frame
                        && timeline.rows[row].cpu == violation.cpu.index()
                }
                _ => false,
            };
            let (row, loaded) = violated.iter().copied().find(|(row, _)| matches(*row))?;
            let root = timeline.root_at(row, violation, loaded);
            let mm = root.map_or_else(|| "an address space".to_owned(), |root| names.root(root));
            Some(Focus { violation: violation.clone(), row, root, mm })
        });
        if let Some(focus) = &timeline.focus {
            timeline.rows[focus.row].mm = focus.root.map(|_| focus.mm.clone());
        }
        mark_what_matters(&mut timeline, sequence);
        timeline
    }

    /// The address space whose translation a violation is about: the one last loaded under the
    /// entry's PCID, or where a fault mapped the page that an entry should not map.
    fn root_at(&self, row: usize, violation: &Violation, loaded: Option<PhysFrame>) -> Option<PhysFrame> {
        if !has_address(violation.kind) {
            return None;
        }
        if is_of_an_entry(violation.kind) {
            // The CPU that found it may run whatever it likes.
            return self.rows[..row].iter().rev().find_map(|row| match row.what {
                What::Detail(Detail::Mapped(root, address, frame))
                    if address >> 12 == violation.address >> 12 && frame == violation.frame =>
                {
                    Some(root)
                }
                _ => None,
            });
        }
        let Some(entry) = &violation.entry else { return loaded };
        let mmu_hosted::watch::Tag::Pcid(pcid) = entry.held.tag else { return loaded };
        let cpu = violation.cpu.index();
        let under_pcid = self.rows[..row].iter().rev().find_map(|row| match row.what {
            What::LoadedCr3(root, other, _) if row.cpu == cpu && other == pcid.value() => Some(root),
            _ => None,
        });
        under_pcid.or(loaded)
    }
}

fn told(verdict: &Verdict) -> Option<&Violation> {
    match verdict {
        Verdict::Ended(outcome) => outcome.found.told.first(),
        Verdict::Panicked(_) => None,
    }
}

fn mark(what: What) -> Mark {
    match what {
        What::Allocated(..) => Mark::Allocated,
        What::Freed(..) => Mark::Freed,
        What::Accessed(..) | What::Detail(Detail::Filled(..)) => Mark::Fill,
        What::Invlpg(_) | What::Skipped(_) => Mark::Flush,
        What::LoadedCr3(..) => Mark::Switch,
        What::Sent(_) | What::Answered(_) | What::Lost(_) => Mark::Interrupt,
        What::Unmapped(..)
        | What::Called(_)
        | What::Returned(_)
        | What::Detail(Detail::Began(..) | Detail::Ended(_)) => Mark::Call,
        What::Detail(Detail::Mapped(..) | Detail::Cleared(..) | Detail::Restricted(..)) => Mark::Entry,
        What::Detail(Detail::Gather(_)) => Mark::Generation,
        What::Detail(Detail::Tlb(event, _)) => match event {
            TlbEvent::Requested { .. } | TlbEvent::Raised { .. } => Mark::Generation,
            TlbEvent::IpisSent(_) | TlbEvent::IpisSaved { .. } => Mark::Interrupt,
            _ => Mark::Flush,
        },
        What::Detail(Detail::Violated(..)) => Mark::Violation,
    }
}
