//! Which cache lines a flush touches: every access of this crate, recorded.
//!
//! Two promises are tested. A request that the CPU's slot already satisfies writes nothing, and
//! reads no line but that CPU's own. And where two CPUs flush address spaces and share none of
//! them, neither writes a line that the other touches.
#![expect(unsafe_code, reason = "plays the CPUs")]

extern crate std;

use core::cell::RefCell;
use core::pin::Pin;
use std::sync::Barrier;
use std::vec::Vec;

use x86_64::PhysAddr;
use x86_64::instructions::tlb::Pcid;
use x86_64::structures::paging::PhysFrame;

use super::recorded::{Access, Kind, Line, record};
use crate::sync::AtomicU64;
use crate::{
    CachedTranslations, CpuBits, CpuId, CpuSet, CpuTlb, Cpus, CtxIds, FlushKind, FlushRequest, FreedTables,
    MmContext, PageSpan, TlbGen, UnmapBatch, enter_lazy_tlb, flush_interrupt, flush_tlb_func, flush_tlb_mm,
    flush_tlb_mm_range, switch_mm,
};

/// Bits for up to 64 CPUs.
type Small = [AtomicU64; 1];
/// Bits for up to 4096 CPUs.
type Large = [AtomicU64; 64];

const PAGE: PageSpan = PageSpan { start: 0x1000, end: 0x2000, stride_shift: 12 };
const NR_SPACES: usize = 4;
const NR_CPUS: usize = 6;
const CPU: [CpuId; NR_CPUS] =
    [CpuId::new(0), CpuId::new(1), CpuId::new(2), CpuId::new(3), CpuId::new(4), CpuId::new(5)];

/// Address spaces and CPUs packed as closely as an embedder can have them: only their own alignment
/// keeps them apart.
#[repr(C, align(64))]
struct Machine<B: CpuBits> {
    spaces: [MmContext<B>; NR_SPACES],
    cpus: [CpuTlb<B>; NR_CPUS],
}

impl<B: CpuBits> Machine<B> {
    fn new() -> Self {
        let (ids, root) = (CtxIds::new(), PhysFrame::containing_address(PhysAddr::zero()));
        Self {
            // SAFETY: one source of names; nothing is mapped below the root that the spaces seem to
            // share.
            spaces: core::array::from_fn(|_| unsafe { MmContext::new(&ids, root) }),
            cpus: core::array::from_fn(|_| CpuTlb::new()),
        }
    }

    /// This thread is `cpu` from now on.
    fn on(&self, cpu: CpuId) -> Here<'_, B> {
        Here { machine: self, here: cpu, answers: RefCell::new(Vec::new()) }
    }

    fn space(&self, number: usize) -> &MmContext<B> {
        &self.spaces[number]
    }

    /// Loads space `number` on each of `cpus`.
    fn load(&self, number: usize, cpus: &[CpuId]) {
        for cpu in cpus {
            // SAFETY: the spaces live as long as the machine, and do not move while it is used.
            let next = unsafe { Pin::new_unchecked(self.space(number)) };
            // SAFETY: one thread plays all CPUs while it loads.
            unsafe { switch_mm(&self.on(*cpu), *cpu, Some(next)) };
        }
    }

    fn go_lazy(&self, cpu: CpuId) {
        // SAFETY: this thread plays the CPU, and no user address is used.
        unsafe { enter_lazy_tlb(&self.on(cpu), cpu) };
    }
}

/// One CPU, and what the CPUs that it interrupted did.
struct Here<'a, B: CpuBits> {
    machine: &'a Machine<B>,
    here: CpuId,
    answers: RefCell<Vec<Access>>,
}

impl<B: CpuBits> Here<'_, B> {
    /// What this CPU does in `work`, and what the CPUs do that it interrupts.
    fn recorded(&self, work: impl FnOnce(&Self)) -> Recorded {
        let here = record(|| work(self));
        Recorded { here, others: self.answers.take() }
    }
}

struct Recorded {
    here: Vec<Access>,
    others: Vec<Access>,
}

impl Recorded {
    fn all(&self) -> Vec<Access> {
        [&self.here[..], &self.others[..]].concat()
    }
}

// SAFETY: states are indexed; one thread at a time plays a CPU; `flush_others` runs the handler for
// each target; there are no translations to drop.
unsafe impl<B: CpuBits> Cpus for Here<'_, B> {
    type Bits = B;

    fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R {
        f(self.here)
    }

    fn cpu_state(&self, cpu: CpuId) -> &CpuTlb<B> {
        &self.machine.cpus[cpu.index()]
    }

    fn init_root(&self) -> PhysFrame {
        PhysFrame::containing_address(PhysAddr::zero())
    }

    fn send_flush_interrupt(&self, targets: &CpuSet<B>) {
        for cpu in targets.iter() {
            // The handler runs there: its debug check asks that CPU, not this one.
            let there = self.machine.on(cpu);
            // SAFETY: this thread plays the target for the moment.
            let answer = record(|| unsafe { flush_interrupt(&there, cpu) });
            self.answers.borrow_mut().extend(answer);
        }
    }

    fn without_interrupts<R>(&self, f: impl FnOnce() -> R) -> R {
        f()
    }

    fn invlpg(&self, _address: u64) {}

    unsafe fn load_cr3(&self, _root: PhysFrame, _pcid: Pcid, _cached: CachedTranslations) {}
}

fn writes(log: &[Access]) -> Vec<Access> {
    log.iter().copied().filter(|access| access.kind == Kind::Write).collect()
}

/// The lines in `log`, each once.
fn lines(log: &[Access]) -> Vec<Line> {
    let mut lines: Vec<Line> = log.iter().map(|access| access.line).collect();
    lines.sort_unstable();
    lines.dedup();
    lines
}

/// Accesses of `one` to lines that `other` writes.
fn disturbed(one: &[Access], other: &[Access]) -> Vec<(Access, Access)> {
    let written = writes(other);
    let by = |access: &Access| written.iter().find(|write| write.line == access.line).copied();
    one.iter().filter_map(|access| Some((*access, by(access)?))).collect()
}

/// What CPU 0 does about a request of CPU 1.
fn answer<B: CpuBits>(machine: &Machine<B>, kind: FlushKind<'_, B>) -> Vec<Access> {
    let request = FlushRequest::from_flush(kind, FreedTables::No, CPU[1]);
    // SAFETY: this thread plays CPU 0.
    record(|| unsafe { flush_tlb_func(&machine.on(CPU[0]), CPU[0], &request) })
}

#[test]
fn a_satisfied_request_writes_nothing_and_reads_only_its_own_cpu() {
    let machine = Machine::<Small>::new();
    machine.load(0, &CPU[..2]);
    let mm = machine.space(0);
    // CPU 0 is at generation 3; the space may have a later one.
    for _ in 0..3 {
        let _flushed = flush_tlb_mm_range(&machine.on(CPU[0]), mm, PAGE, FreedTables::No);
    }
    for behind in 0..2 {
        for asked in (1..=3).map(TlbGen::new) {
            let kinds =
                [FlushKind::Range { mm, tlb_gen: asked, span: PAGE }, FlushKind::Mm { mm, tlb_gen: asked }];
            for kind in kinds {
                let log = answer(&machine, kind);
                assert!(writes(&log).is_empty(), "{log:#?}");
                let own = Line::all_of(&machine.cpus[0]);
                let foreign: Vec<_> = log.iter().filter(|access| !own.contains(&access.line)).collect();
                assert!(foreign.is_empty(), "{behind} generations behind: {foreign:#?}");
                // What the CPU has loaded, and the slot.
                assert_eq!(lines(&log).len(), 2, "{log:#?}");
            }
        }
        mm.raise_tlb_gen();
    }
}

#[test]
fn a_satisfied_request_for_all_that_is_loaded_reads_one_line_of_others() {
    let machine = Machine::<Small>::new();
    machine.load(0, &CPU[..2]);
    let log = answer(&machine, FlushKind::AllUpdated);
    assert!(writes(&log).is_empty(), "{log:#?}");
    let own = Line::all_of(&machine.cpus[0]);
    let foreign: Vec<_> = log.iter().filter(|access| !own.contains(&access.line)).collect();
    // The generation: the request does not say how far to go.
    assert_eq!(foreign.len(), 1, "{foreign:#?}");
}

#[test]
fn a_request_that_is_not_satisfied_is_seen_to_write() {
    let machine = Machine::<Small>::new();
    machine.load(0, &CPU[..2]);
    let mm = machine.space(0);
    let tlb_gen = mm.raise_tlb_gen();
    let log = answer(&machine, FlushKind::Mm { mm, tlb_gen });
    let own = Line::all_of(&machine.cpus[0]);
    assert_eq!(lines(&writes(&log)).len(), 1, "the slot: {log:#?}");
    assert!(writes(&log).iter().all(|access| own.contains(&access.line)), "{log:#?}");
}

/// CPUs 0 to 2 have one address space loaded, CPUs 3 to 5 its neighbour in memory. CPUs 0 and 3
/// flush, each on a thread with a stack of its own.
fn two_initiators<B: CpuBits>(
    prepare: impl Fn(&Machine<B>),
    flush: impl Fn(&Here<'_, B>, &MmContext<B>) + Sync,
) {
    for first in 0..NR_SPACES - 1 {
        let machine = Machine::<B>::new();
        machine.load(first, &CPU[..3]);
        machine.load(first + 1, &CPU[3..]);
        prepare(&machine);
        // Both stacks are there at once: their addresses differ.
        let both = Barrier::new(2);
        let side = |initiator: usize, space: usize| {
            let here = machine.on(CPU[initiator]);
            both.wait();
            let recorded = here.recorded(|here| flush(here, machine.space(space)));
            both.wait();
            recorded
        };
        let (one, other) = std::thread::scope(|scope| {
            let other = scope.spawn(|| side(3, first + 1));
            (side(0, first), other.join().expect("no panic"))
        });
        assert!(!writes(&one.here).is_empty() && !writes(&other.here).is_empty(), "nothing was recorded");
        for (one, other) in [(&one, &other), (&other, &one)] {
            let disturbed = disturbed(&one.all(), &other.all());
            assert!(disturbed.is_empty(), "lines in common: {disturbed:#?}");
        }
    }
}

/// Every kind of flush, with the other CPUs running, lazy, or elsewhere.
fn every_flush_of_two_initiators<B: CpuBits>() {
    let ranged = |here: &Here<'_, B>, mm: &MmContext<B>| {
        let _flushed = flush_tlb_mm_range(here, mm, PAGE, FreedTables::No);
    };
    two_initiators::<B>(|_| {}, ranged);
    two_initiators::<B>(|machine| [1, 4].into_iter().for_each(|cpu| machine.go_lazy(CPU[cpu])), ranged);
    two_initiators::<B>(
        |_| {},
        |here, mm| {
            let _flushed = flush_tlb_mm_range(here, mm, PAGE, FreedTables::Yes);
        },
    );
    two_initiators::<B>(
        |_| {},
        |here, mm| {
            let _flushed = flush_tlb_mm(here, mm);
        },
    );
    two_initiators::<B>(
        |_| {},
        |here, mm| {
            let mut batch = UnmapBatch::new();
            batch.add_mm(here, mm);
            let _flushed = batch.flush(here);
        },
    );
}

#[test]
fn initiators_of_disjoint_spaces_write_no_line_that_the_other_touches() {
    every_flush_of_two_initiators::<Small>();
    every_flush_of_two_initiators::<Large>();
}

#[test]
fn an_initiator_alone_writes_the_generation_of_its_space_and_the_line_of_its_slot() {
    let machine = Machine::<Small>::new();
    machine.load(0, &CPU[..1]);
    let mm = machine.space(0);
    let recorded = machine.on(CPU[0]).recorded(|here| {
        let _flushed = flush_tlb_mm_range(here, mm, PAGE, FreedTables::No);
    });
    assert_eq!(lines(&writes(&recorded.here)).len(), 2, "{:#?}", recorded.here);
    // It also reads what it has loaded, and the rest of the space, which it does not write: other
    // threads of the program have that line, too.
    assert_eq!(lines(&recorded.here).len(), 4, "{:#?}", recorded.here);
}

#[test]
fn a_target_that_flushes_writes_no_line_that_initiators_read_of_it() {
    let machine = Machine::<Small>::new();
    machine.load(0, &CPU[..2]);
    let mm = machine.space(0);
    let recorded = machine.on(CPU[0]).recorded(|here| {
        let _flushed = flush_tlb_mm_range(here, mm, PAGE, FreedTables::No);
    });
    assert!(!writes(&recorded.others).is_empty(), "CPU 1 flushed nothing");
    // The mail itself goes by lines that both write.
    let is_mail =
        |access: &Access| machine.cpus.iter().any(|cpu| Line::all_of(cpu.mailbox()).contains(&access.line));
    let mut disturbed = disturbed(&recorded.here, &recorded.others);
    disturbed.retain(|(access, _)| !is_mail(access));
    assert!(disturbed.is_empty(), "{disturbed:#?}");
}

#[test]
fn a_request_by_mail_writes_two_lines_of_the_mailboxes() {
    let machine = Machine::<Small>::new();
    machine.load(0, &CPU[..2]);
    let mm = machine.space(0);
    let recorded = machine.on(CPU[0]).recorded(|here| {
        let _flushed = flush_tlb_mm_range(here, mm, PAGE, FreedTables::No);
    });
    let [own, other] = [0, 1].map(|cpu| Line::all_of(machine.cpus[cpu].mailbox()));
    let written = lines(&writes(&recorded.all()));
    // The outbox of the one, the inbox of the other: the request, the interrupt's reason, the
    // answer.
    assert_eq!(written.iter().filter(|line| own.contains(line)).count(), 1);
    assert_eq!(written.iter().filter(|line| other.contains(line)).count(), 1);
}
