//! What CPUs and address spaces are called at one moment of a run: learned event by event.

use std::collections::HashMap;

use mmu_gather::tlb::{CtxId, TlbEvent};
use mmu_hosted::{Detail, Event, Op, Sequence, What};
use x86_64::structures::paging::PhysFrame;

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

impl Names {
    /// Nothing is known of `nr_cpus` CPUs yet.
    pub(crate) fn new(nr_cpus: usize) -> Self {
        Self { cpus: vec![CpuNow::default(); nr_cpus], ..Self::default() }
    }

    /// The step of the sequence that a CPU is working on.
    pub(crate) fn call_on(&self, cpu: usize) -> Option<usize> {
        self.cpus[cpu].call
    }

    /// The root in CR3 of a CPU.
    pub(crate) fn loaded_on(&self, cpu: usize) -> Option<PhysFrame> {
        self.cpus[cpu].root
    }

    /// Learns what must be known to tell `event`.
    pub(crate) fn before(&mut self, event: &Event, sequence: &Sequence) {
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
    pub(crate) fn after(&mut self, event: &Event) {
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
    pub(crate) fn root_of(&self, event: &Event, sequence: &Sequence) -> Option<PhysFrame> {
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
