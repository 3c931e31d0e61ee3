//! What went wrong, in words: who cached, who unmapped, who was told, who freed.

use core::fmt;

use mmu_gather::tlb::TlbEvent;
use mmu_hosted::watch::Use;
use mmu_hosted::{Detail, Fill, ViolationKind, What};

use crate::timeline::rows::{Focus, Row, Timeline, has_address, is_of_an_entry};

/// One sentence or two.
#[derive(Debug)]
pub(crate) struct Sentence {
    /// The words; each row that is spoken of is named as "event" and its number.
    pub(crate) text: String,
    /// The rows, in the order in which they are named.
    pub(crate) rows: Vec<usize>,
}

impl Sentence {
    fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), rows: Vec::new() }
    }

    /// The sentence names these rows.
    fn naming(mut self, rows: impl IntoIterator<Item = usize>) -> Self {
        self.rows.extend(rows);
        self
    }
}

impl fmt::Display for Sentence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The sentences, in the order of time; one if nothing is wrong at an address.
#[must_use]
pub(crate) fn explanation(timeline: &Timeline) -> Vec<Sentence> {
    let Some(focus) = &timeline.focus else {
        return vec![Sentence::new("No violation at an address was found: this is an outline of the run.")];
    };
    let explainer = Explainer { focus, rows: &timeline.rows[..=focus.row] };
    let mut told = vec![explainer.finding()];
    told.extend(focus.violation.because.clone().map(|because| Sentence::new(format!("Here {because}."))));
    if is_of_an_entry(focus.violation.kind) {
        told.extend(explainer.tell_mapping());
        told.extend(explainer.tell_last_change());
    } else if has_address(focus.violation.kind) {
        let filled = explainer.filled();
        told.extend(filled.map(|at| explainer.tell_fill(at)));
        let cleared = explainer.cleared(filled.unwrap_or(0));
        told.push(explainer.tell_clearing(cleared));
        let raised = explainer.raised(cleared.or(filled).unwrap_or(0));
        told.extend(explainer.tell_generation(raised));
        told.extend(raised.map(|at| explainer.tell_requests(at)));
        told.extend(explainer.tell_freeing());
    } else {
        told.extend(explainer.tell_last_write());
        told.extend(explainer.cleared(0).map(|at| explainer.tell_clearing(Some(at))));
    }
    told.push(Sentence::new(focus.violation.kind.rule()));
    told
}

struct Explainer<'a> {
    focus: &'a Focus,
    /// Up to the violation.
    rows: &'a [Row],
}

impl Explainer<'_> {
    /// The CPU whose caches are stale.
    fn here(&self) -> usize {
        self.focus.violation.cpu.index()
    }

    fn is_table(&self) -> bool {
        match &self.focus.violation.entry {
            Some(entry) => !matches!(entry.held.as_a, Use::Page(_)),
            None => self.focus.violation.kind == ViolationKind::TableReachableAfterFree,
        }
    }

    /// What was found, and where.
    fn finding(&self) -> Sentence {
        let Focus { violation, row, mm, .. } = self.focus;
        let at = self.rows[*row].at;
        let (kind, frame) = (violation.kind, violation.frame.start_address());
        if !has_address(kind) {
            return Sentence::new(format!("At event {at}: {kind}. It is frame {frame:#x}.")).naming([*row]);
        }
        let through =
            violation.entry.as_ref().map_or_else(String::new, |entry| format!(", through its {entry}"));
        let name = if self.is_table() { "table" } else { "frame" };
        let (here, address) = (self.here(), violation.address);
        let text = format!(
            "At event {at}, on CPU {here}: {kind}. It is address {address:#x} of {mm}, {name} {frame:#x}{through}."
        );
        Sentence::new(text).naming([*row])
    }

    /// The fault that mapped what is there.
    fn tell_mapping(&self) -> Option<Sentence> {
        let page = self.focus.violation.address >> 12;
        let maps = |row: &Row| {
            matches!(row.what, What::Detail(Detail::Mapped(_, address, _)) if address >> 12 == page)
                && (self.focus.root.is_none() || row.root == self.focus.root)
        };
        let at = self.rows.iter().rposition(maps)?;
        let row = &self.rows[at];
        let text = format!("CPU {} last answered a fault there at step {}: {}.", row.cpu, row.at, row.long);
        Some(Sentence::new(text).naming([at]))
    }

    /// The last change of an entry that has to do with it.
    fn tell_last_change(&self) -> Option<Sentence> {
        let changes = |row: &Row| {
            row.matters && matches!(row.what, What::Detail(Detail::Cleared(..) | Detail::Restricted(..)))
        };
        let at = self.rows.iter().rposition(changes)?;
        Some(self.tell_clearing(Some(at)))
    }

    fn tell_last_write(&self) -> Option<Sentence> {
        let frame = self.focus.violation.frame;
        let used = |row: &Row| matches!(row.what, What::Accessed(_, other) if other == frame);
        let last = self.rows.iter().rposition(used)?;
        let row = &self.rows[last];
        let text = format!("A program last used it on CPU {} at event {}: {}.", row.cpu, row.at, row.long);
        Some(Sentence::new(text).naming([last]))
    }

    /// The row in which the CPU cached what it should have forgotten.
    fn filled(&self) -> Option<usize> {
        let violation = &self.focus.violation;
        self.rows.iter().rposition(|row| match row.what {
            What::Detail(Detail::Filled(address, frame, held, _)) => {
                let is_page = matches!(held.as_a, Use::Page(_));
                row.cpu == self.here()
                    && (frame == violation.frame || (is_page && address >> 12 == violation.address >> 12))
                    && is_page != self.is_table()
            }
            What::LoadedCr3(root, ..) => row.cpu == self.here() && root == violation.frame,
            _ => false,
        })
    }

    fn tell_fill(&self, at: usize) -> Sentence {
        let row = &self.rows[at];
        let how = match row.what {
            What::LoadedCr3(..) => "it loaded the table into CR3",
            What::Detail(Detail::Filled(_, _, _, Fill::Speculation)) => "it speculated",
            _ => "its program used the address",
        };
        let text = format!("CPU {} cached that at event {}, when {how}.", row.cpu, row.at);
        Sentence::new(text).naming([at])
    }

    /// The row in which the entry was changed, after `since`.
    fn cleared(&self, since: usize) -> Option<usize> {
        (since..self.rows.len()).find(|at| {
            let row = &self.rows[*at];
            row.matters && matches!(row.what, What::Detail(Detail::Cleared(..) | Detail::Restricted(..)))
        })
    }

    fn tell_clearing(&self, cleared: Option<usize>) -> Sentence {
        match cleared {
            Some(at) => {
                let row = &self.rows[at];
                let text = format!("CPU {} changed an entry at event {}: {}.", row.cpu, row.at, row.long);
                Sentence::new(text).naming([at])
            }
            None if self.is_table() => Sentence::new(
                "Tables are unhooked at the level above: no entry of this address had to be cleared for that.",
            ),
            None => Sentence::new(
                "No entry of this address was seen cleared after that: it moved, or it was never mapped here.",
            ),
        }
    }

    /// The first row after `since` in which the generation of the address space was raised, for
    /// this address or for all.
    fn raised(&self, since: usize) -> Option<usize> {
        (since..self.rows.len()).find(|at| {
            let row = &self.rows[*at];
            row.matters && matches!(row.what, What::Detail(Detail::Tlb(TlbEvent::Raised { .. }, _)))
        })
    }

    fn tell_generation(&self, raised: Option<usize>) -> Option<Sentence> {
        let mm = &self.focus.mm;
        let Some(at) = raised else {
            return Some(Sentence::new(format!(
                "Nobody raised the generation of {mm} for this address between that and the violation: no flush was \
                 requested (rules G1, T1)."
            )));
        };
        let row = &self.rows[at];
        let What::Detail(Detail::Tlb(TlbEvent::Raised { tlb_gen, span, .. }, _)) = row.what else {
            return None;
        };
        let what = span.map_or_else(|| "all of it".to_owned(), |span| span.to_string());
        let text = format!(
            "CPU {} raised the generation of {mm} to {} at event {}, for {what}.",
            row.cpu,
            tlb_gen.get(),
            row.at
        );
        Some(Sentence::new(text).naming([at]))
    }

    /// What the CPU of the violation was asked to flush, and what it did.
    fn tell_requests(&self, raised: usize) -> Sentence {
        let asker = self.rows[raised].cpu;
        let here = self.here();
        if asker == here {
            return self.tell_own(raised);
        }
        if let Some(lost) = self.find(raised, |row| {
            row.cpu == here && matches!(row.what, What::Lost(from) if from.index() == asker)
        }) {
            let text = format!(
                "Its request to CPU {here} was lost at event {} but acknowledged, which is the planted fault: \
                 CPU {here} has flushed nothing.",
                self.rows[lost].at
            );
            return Sentence::new(text).naming([lost]);
        }
        let sent = self
            .find(raised, |row| row.cpu == asker && matches!(row.what, What::Sent(to) if to.index() == here));
        let Some(sent) = sent else { return Sentence::new(format!("CPU {here} was not asked to flush.")) };
        let asked = self.rows[sent].at;
        let Some(answer) = self.rows[sent].partner.filter(|answer| *answer < self.rows.len()) else {
            let text = format!("CPU {here} was asked at event {asked} and has not answered yet.");
            return Sentence::new(text).naming([sent]);
        };
        let did = (sent..answer).rev().find(|at| self.rows[*at].cpu == here && is_flush(&self.rows[*at]));
        let did = did.map_or("nothing that is recorded", |at| &self.rows[at].long);
        let text = format!(
            "CPU {here} was asked at event {asked} and answered at event {}; what it did: {did}. The entry is still \
             there.",
            self.rows[answer].at
        );
        Sentence::new(text).naming([sent, answer])
    }

    fn tell_own(&self, raised: usize) -> Sentence {
        let here = self.here();
        match self.find(raised, |row| row.cpu == here && is_flush(row)) {
            Some(at) => {
                let row = &self.rows[at];
                let text = format!(
                    "That was CPU {here} itself; what it did at event {}: {}. The entry is still there.",
                    row.at, row.long
                );
                Sentence::new(text).naming([at])
            }
            None => Sentence::new(format!("That was CPU {here} itself; it has flushed nothing since.")),
        }
    }

    fn tell_freeing(&self) -> Option<Sentence> {
        let (step, by) = self.focus.violation.freed?;
        let freed = self.find(0, |row| row.at == step && matches!(row.what, What::Freed(..)));
        let text = format!("CPU {} freed it at event {step}.", by.number());
        Some(Sentence::new(text).naming(freed))
    }

    /// The first row from `since` on for which `is_so` holds.
    fn find(&self, since: usize, is_so: impl Fn(&Row) -> bool) -> Option<usize> {
        (since..self.rows.len()).find(|at| is_so(&self.rows[*at]))
    }
}

fn is_flush(row: &Row) -> bool {
    match row.what {
        What::Detail(Detail::Tlb(event, _)) => !matches!(
            event,
            TlbEvent::Requested { .. }
                | TlbEvent::Raised { .. }
                | TlbEvent::IpisSent(_)
                | TlbEvent::IpisSaved { .. }
        ),
        _ => false,
    }
}
