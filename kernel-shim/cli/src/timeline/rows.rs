//! The events of one run, row by row: which CPU, which address space, in which words; and which of them explain a violation.

use std::collections::HashMap;

use mmu_gather::tlb::{CtxId, TlbEvent};
use mmu_hosted::{Detail, Event, Kept, Op, Run, Sequence, Verdict, Violation, ViolationKind, What};
use x86_64::structures::paging::PhysFrame;

use crate::timeline::focus::focus_on;
use crate::timeline::phrases::{long, short};

/// A run as somebody looks at it.
#[derive(Debug)]
pub(crate) struct Timeline {
    /// CPUs of the machine.
    pub nr_cpus: usize,
    /// What happened, oldest first.
    pub rows: Vec<Row>,
    /// What it is about, if something went wrong at an address.
    pub focus: Option<Focus>,
}

/// One thing that happened.
#[derive(Debug)]
pub(crate) struct Row {
    /// Its number; "step" in every report.
    pub at: u64,
    /// The CPU.
    pub cpu: usize,
    /// What sort it is.
    pub mark: Mark,
    /// In few words.
    pub short: String,
    /// In more.
    pub long: String,
    /// The step of the sequence that the CPU was working on, by its index.
    pub call: Option<usize>,
    /// Whether it helps to explain what this is about; without a focus, whether it belongs to the outline.
    pub matters: bool,
    /// Of a request, the row in which it is answered or lost; and back.
    pub partner: Option<usize>,
    /// The event.
    pub what: What,
    /// The address space it concerns, by its root.
    pub root: Option<PhysFrame>,
    /// Its name.
    pub mm: Option<String>,
}

/// What sort of thing happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    /// A step of the sequence begins or ends.
    Call,
    /// An entry was changed.
    Entry,
    /// A generation was raised, or a gather decided something.
    Generation,
    /// A request was sent, answered or lost.
    Interrupt,
    /// Something was invalidated, or a slot said to be new enough.
    Flush,
    /// CR3 was loaded.
    Switch,
    /// Something entered a cache, or a program used it.
    Fill,
    /// A frame was given out.
    Allocated,
    /// A frame was freed.
    Freed,
    /// Something is wrong.
    Violation,
}

/// The violation that a timeline explains.
#[derive(Debug)]
pub(crate) struct Focus {
    /// The violation.
    pub violation: Violation,
    /// The row in which it was found.
    pub row: usize,
    /// The address space, by its root, if it is known.
    pub root: Option<PhysFrame>,
    /// Its name.
    pub mm: String,
}

/// What is known of the CPUs and address spaces at one moment.
#[derive(Debug, Default)]
pub(crate) struct Names {
    cpus: Vec<CpuNow>,
    /// Of an address space by its root: the name.
    roots: HashMap<PhysFrame, String>,
    contexts: HashMap<CtxId, (PhysFrame, String)>,
    /// How many address spaces each name of the sequence has had.
    lives: HashMap<u8, Vec<CtxId>>,
}

#[derive(Clone, Debug, Default)]
struct CpuNow {
    call: Option<usize>,
    /// What the step names.
    call_root: Option<PhysFrame>,
    root: Option<PhysFrame>,
    /// By PCID, what was loaded under it last.
    pcids: HashMap<u16, PhysFrame>,
}

impl Timeline {
    /// The timeline of a run of `sequence` that was told to remember all.
    #[must_use]
    pub(crate) fn new(sequence: &Sequence, run: &Run) -> Self {
        let nr_cpus = usize::try_from(sequence.nr_cpus).unwrap_or(64);
        let mut names = Names { cpus: vec![CpuNow::default(); nr_cpus], ..Names::default() };
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
                short: short(event.what, &names, sequence),
                long: long(event, &names, sequence),
                call: names.cpus[cpu].call,
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
                What::Answered(from) => {
                    let waiting = &mut requests[cpu];
                    if let Some(place) = waiting.iter().position(|(sender, _)| *sender == from.index()) {
                        let (_, sent) = waiting.remove(place);
                        row.partner = Some(sent);
                        rows[sent].partner = Some(rows.len());
                    }
                }
                What::Detail(Detail::Violated(..)) => {
                    violated.push((rows.len(), names.cpus[cpu].root));
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
        focus_on(&mut timeline, sequence);
        timeline
    }

    /// The address space whose translation a violation is about: the one last loaded under the entry's PCID.
    fn root_at(&self, row: usize, violation: &Violation, loaded: Option<PhysFrame>) -> Option<PhysFrame> {
        if !has_address(violation.kind) {
            return None;
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

/// Whether a violation is about an address; one about a lost write names a frame only.
pub(crate) const fn has_address(kind: ViolationKind) -> bool {
    !matches!(kind, ViolationKind::WriteLost | ViolationKind::MeaningsDisagree)
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
        What::Invlpg(_) => Mark::Flush,
        What::LoadedCr3(..) => Mark::Switch,
        What::Sent(_) | What::Answered(_) | What::Lost(_) => Mark::Interrupt,
        What::Unmapped(..) | What::Detail(Detail::Began(..) | Detail::Ended(_)) => Mark::Call,
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

impl Names {
    /// Learns what must be known to tell `event`.
    fn before(&mut self, event: &Event, sequence: &Sequence) {
        let cpu = &mut self.cpus[event.cpu.index()];
        match event.what {
            What::LoadedCr3(root, pcid, _) => {
                if self.roots.is_empty() {
                    self.roots.insert(root, "the kernel's".to_owned());
                }
                cpu.root = Some(root);
                cpu.pcids.insert(pcid, root);
            }
            What::Detail(Detail::Began(step, named)) => {
                cpu.call = Some(step);
                cpu.call_root = named.map(|(root, _)| root);
                if let (Some((root, context)), Some(mm)) =
                    (named, sequence.steps.get(step).and_then(|step| step.op.mm()))
                {
                    self.learn(root, context, mm.0);
                }
            }
            _ => {}
        }
    }

    /// Forgets what is over.
    fn after(&mut self, event: &Event) {
        if let What::Detail(Detail::Ended(_)) = event.what {
            let cpu = &mut self.cpus[event.cpu.index()];
            cpu.call = None;
            cpu.call_root = None;
        }
    }

    fn learn(&mut self, root: PhysFrame, context: CtxId, mm: u8) {
        if self.contexts.contains_key(&context) {
            return;
        }
        let lives = self.lives.entry(mm).or_default();
        lives.push(context);
        // After an exit the name goes to another address space.
        let name = if lives.len() == 1 { format!("m{mm}") } else { format!("m{mm}#{}", lives.len()) };
        self.roots.insert(root, name.clone());
        self.contexts.insert(context, (root, name));
    }

    /// What an address space is called.
    pub(crate) fn root(&self, root: PhysFrame) -> String {
        self.roots.get(&root).cloned().unwrap_or_else(|| format!("root {:x}", root.start_address()))
    }

    /// As [`root`](Self::root), by its context.
    pub(crate) fn context(&self, context: CtxId) -> String {
        self.contexts
            .get(&context)
            .map_or_else(|| format!("context {}", context.get()), |(_, name)| name.clone())
    }

    /// The address space that an event concerns, if that is known.
    fn root_of(&self, event: &Event, sequence: &Sequence) -> Option<PhysFrame> {
        let cpu = &self.cpus[event.cpu.index()];
        match event.what {
            What::Accessed(..) | What::Invlpg(_) | What::Detail(Detail::Filled(..)) => cpu.root,
            What::LoadedCr3(root, ..) | What::Detail(Detail::Mapped(root, ..)) => Some(root),
            What::Detail(Detail::Tlb(TlbEvent::Raised { ctx_id, .. }, _)) => {
                self.contexts.get(&ctx_id).map(|(root, _)| *root)
            }
            What::Detail(Detail::Tlb(_, slot)) => {
                slot.ctx_id.and_then(|context| self.contexts.get(&context)).map(|(root, _)| *root)
            }
            What::Unmapped(..) | What::Detail(Detail::Cleared(..) | Detail::Restricted(..)) => {
                match cpu.call.and_then(|step| sequence.steps.get(step)).map(|step| step.op) {
                    // These work on two.
                    Some(Op::Reclaim(..) | Op::Fork(..)) => None,
                    Some(Op::Touch(..)) => cpu.root,
                    _ => cpu.call_root,
                }
            }
            _ => None,
        }
    }
}

/// What a CR3 load does to what is cached, in one word.
pub(crate) const fn kept(kept: Kept) -> &'static str {
    match kept {
        Kept::Yes => "keep",
        Kept::No => "flush",
    }
}
