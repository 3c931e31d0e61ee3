//! What one CPU does about a flush request: the decision alone, then the whole of `flush_tlb_func`.

use mmu_gather::tlb::{
    Action, CachedTranslations, Cpus, FlushKind, FlushRequest, FreedTables, Laziness, LoadedIs, PageSpan,
    Situation, TlbEvent, TlbGen, Wanted, WhyNothing, flush_tlb_func, plan,
};
use mmu_tests::{Access, CPU, Event, GIB, Options, PaperKernel};

const START: u64 = 0;

fn generation(number: u64) -> TlbGen {
    TlbGen::new(number)
}

/// What a request asks, as in the columns "f.gen" and "range".
#[derive(Clone, Copy, Debug)]
enum Ask {
    Pages(u64),
    Whole(u64),
    AllUpdated,
}

/// What can be seen from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Did {
    Nothing,
    Pages,
    All,
}

/// `(local_gen, asked, mm_gen)`, then what is done and the generation of the slot afterwards.
const VECTORS: [(u64, Ask, u64, Did, u64); 10] = [
    (5, Ask::Pages(6), 6, Did::Pages, 6),
    (5, Ask::Pages(6), 7, Did::All, 7),
    (5, Ask::Pages(7), 7, Did::All, 7),
    (6, Ask::Pages(6), 7, Did::Nothing, 6),
    (7, Ask::Pages(6), 7, Did::Nothing, 7),
    (5, Ask::Whole(6), 6, Did::All, 6),
    (5, Ask::AllUpdated, 6, Did::All, 6),
    (6, Ask::AllUpdated, 6, Did::Nothing, 6),
    // A generation of zero is a generation like any other (Linux took it for "no generation",
    // 2022).
    (START, Ask::Pages(1), 1, Did::Pages, 1),
    (START, Ask::AllUpdated, 1, Did::All, 1),
];

fn wanted(ask: Ask) -> Wanted {
    match ask {
        Ask::Pages(asked) => Wanted::Range(generation(asked)),
        Ask::Whole(asked) => Wanted::Mm(generation(asked)),
        Ask::AllUpdated => Wanted::AllUpdated,
    }
}

#[test]
fn the_decision_follows_the_generations() {
    for (local, ask, mm, did, after) in VECTORS {
        let situation = Situation {
            loaded: LoadedIs::Requested,
            laziness: Laziness::Active,
            local_gen: generation(local),
            mm_gen: generation(mm),
        };
        let expected = match did {
            Did::Nothing => Action::Nothing(WhyNothing::AlreadyThere),
            Did::Pages => Action::Pages(generation(after)),
            Did::All => Action::All(generation(after)),
        };
        assert_eq!(plan(wanted(ask), situation), expected, "slot at {local}, {ask:?}, mm at {mm}");
    }
}

/// CPU 1 with its slot at `local` and its mm at `mm`, one page at 1 GiB cached.
fn kernel_at(local: u64, mm: u64) -> PaperKernel {
    let kernel = PaperKernel::new(Options::default());
    let space = kernel.new_mm();
    kernel.map(space, GIB, mmu_gather::pagetable::Level::Pte);
    for _ in 0..local {
        space.context().raise_tlb_gen();
    }
    kernel.run(CPU[1], space);
    kernel.touch(CPU[1], GIB, Access::Read).expect("mapped");
    for _ in local..mm {
        space.context().raise_tlb_gen();
    }
    kernel.take_events();
    kernel
}

#[expect(unsafe_code, reason = "plays the flush interrupt")]
fn interrupt(kernel: &PaperKernel, ask: Ask) {
    let mm = kernel.mm(0).context();
    let kind = match ask {
        Ask::Pages(asked) => FlushKind::Range {
            mm,
            tlb_gen: generation(asked),
            span: PageSpan { start: GIB, end: GIB + 0x2000, stride_shift: 12 },
        },
        Ask::Whole(asked) => FlushKind::Mm { mm, tlb_gen: generation(asked) },
        Ask::AllUpdated => FlushKind::AllUpdated,
    };
    // SAFETY: nothing changed in any generation.
    let request = unsafe { FlushRequest::new(kind, FreedTables::No, CPU[0]) };
    // SAFETY: this thread plays CPU 1, and nothing interrupts it.
    kernel.on(CPU[1], || unsafe { flush_tlb_func(kernel, CPU[1], &request) });
}

fn slot_gen(kernel: &PaperKernel) -> TlbGen {
    let state = kernel.state(CPU[1]);
    state.slot(state.loaded_asid()).tlb_gen
}

#[test]
fn the_flush_does_what_was_decided_and_raises_the_slot_to_the_generation_read() {
    for (local, ask, mm, did, after) in VECTORS {
        let kernel = kernel_at(local, mm);
        interrupt(&kernel, ask);
        let name = format!("slot at {local}, {ask:?}, mm at {mm}");
        assert_eq!(slot_gen(&kernel), generation(after), "{name}");
        let pages = kernel.count(|event| matches!(event, Event::Invlpg { .. }));
        let loads = kernel.count(|event| matches!(event, Event::Cr3 { .. }));
        assert_eq!((pages, loads), [(0, 0), (2, 0), (0, 1)][did as usize], "{name}");
        assert_eq!(kernel.cached(CPU[1], GIB).is_some(), did == Did::Nothing, "{name}");
    }
}

#[test]
fn a_cpu_elsewhere_takes_itself_out_of_the_cpumask_and_flushes_nothing() {
    for elsewhere in ["another mm", "the kernel's own"] {
        let kernel = kernel_at(5, 6);
        if elsewhere == "another mm" {
            kernel.run(CPU[1], kernel.new_mm());
        } else {
            kernel.stop(CPU[1]);
        }
        kernel.take_events();
        interrupt(&kernel, Ask::Pages(6));
        assert!(!kernel.mm(0).context().cpumask().contains(CPU[1]), "{elsewhere}");
        assert_eq!(
            kernel.count(|event| matches!(event, Event::Invlpg { .. } | Event::Cr3 { .. })),
            0,
            "{elsewhere}"
        );
    }
}

#[test]
fn a_lazy_cpu_goes_to_the_kernels_own_address_space_and_its_slot_keeps_its_generation() {
    for ask in [Ask::Pages(6), Ask::Whole(6), Ask::AllUpdated] {
        let kernel = kernel_at(5, 6);
        kernel.go_lazy(CPU[1]);
        kernel.take_events();
        interrupt(&kernel, ask);
        let cr3 =
            Event::Cr3 { cpu: CPU[1], root: kernel.init_root(), pcid: 0, cached: CachedTranslations::Keep };
        assert_eq!(kernel.count(|event| *event == cr3), 1, "{ask:?}");
        assert_eq!(kernel.count(|event| *event == Event::Tlb(TlbEvent::LeftLazyMm)), 1, "{ask:?}");
        let kept = kernel.state(CPU[1]).slots().find(|(_, slot)| slot.ctx_id.is_some());
        assert_eq!(kept.map(|(_, slot)| slot.tlb_gen), Some(generation(5)), "{ask:?}");
        assert_eq!(kernel.state(CPU[1]).laziness(), Laziness::Active);
    }
}

#[test]
fn a_batch_flush_finds_nothing_to_do_on_the_kernels_own_address_space() {
    let kernel = kernel_at(5, 6);
    kernel.stop(CPU[1]);
    kernel.take_events();
    interrupt(&kernel, Ask::AllUpdated);
    assert_eq!(kernel.count(|event| matches!(event, Event::Invlpg { .. } | Event::Cr3 { .. })), 0);
}

/// What a slot may still cache: bit `g` is set while translations older than generation `g` may be
/// there.
///
/// Each generation changed pages of its own; a ranged request names those of one generation.
#[derive(Clone, Copy)]
struct Stale(u32);

impl Stale {
    fn of(local: u64, mm: u64) -> Self {
        Self((local + 1..=mm).fold(0, |bits, changed| bits | 1 << changed))
    }

    fn without(self, changed: u64) -> Self {
        Self(self.0 & !(1 << changed))
    }

    /// Whether nothing older than `reached` is left.
    fn is_at_least(self, reached: u64) -> bool {
        self.0 & ((2 << reached) - 1) == 0
    }
}

/// Every request in every situation with generations up to 6, compared with what may really be
/// cached.
#[test]
fn no_decision_ever_leaves_behind_what_the_slot_or_the_request_claims_is_gone() {
    const LAST: u64 = 6;
    let (mut looked_at, mut ranged) = (0, 0);
    for mm in 0..=LAST {
        for local in 0..=mm {
            let asks = (0..=mm).flat_map(|asked| [Ask::Pages(asked), Ask::Whole(asked)]);
            for ask in asks.chain([Ask::AllUpdated]) {
                for loaded in [LoadedIs::Init, LoadedIs::Requested, LoadedIs::Other] {
                    for laziness in [Laziness::Active, Laziness::Lazy] {
                        let situation = Situation {
                            loaded,
                            laziness,
                            local_gen: generation(local),
                            mm_gen: generation(mm),
                        };
                        let name = format!("{ask:?} in {situation:?}");
                        looked_at += 1;
                        let before = Stale::of(local, mm);
                        let (left, slot, in_use) = match plan(wanted(ask), situation) {
                            Action::Nothing(_) => (before, local, loaded == LoadedIs::Requested),
                            Action::LeaveCpumask | Action::LoadInit => (before, local, false),
                            Action::Pages(raised) => {
                                ranged += 1;
                                let Ask::Pages(asked) = ask else { panic!("{name}: no pages were named") };
                                (before.without(asked), raised.get(), true)
                            }
                            Action::All(raised) => (Stale(0), raised.get(), true),
                        };
                        assert!(left.is_at_least(slot), "T2, {name}: the slot claims {slot}");
                        let asked = match ask {
                            Ask::Pages(asked) | Ask::Whole(asked) => asked,
                            Ask::AllUpdated => mm,
                        };
                        assert!(!in_use || left.is_at_least(asked), "{name}: asked for {asked}");
                        let must_act = loaded == LoadedIs::Requested && !before.is_at_least(asked);
                        let acts = !matches!(plan(wanted(ask), situation), Action::Nothing(_));
                        assert!(!must_act || acts, "{name}: nothing was done");
                        let idle = loaded == LoadedIs::Requested && laziness == Laziness::Active;
                        assert!(!(idle && !must_act && acts), "{name}: something was done for nothing");
                    }
                }
            }
        }
    }
    assert!(looked_at > 1000 && ranged > 0, "{looked_at} situations, {ranged} ranged flushes");
}

#[test]
fn a_ranged_flush_of_a_large_page_takes_one_invlpg_a_stride() {
    for (span, pages) in [
        (PageSpan { start: 0, end: 4096, stride_shift: 12 }, vec![0]),
        (PageSpan { start: 0, end: 4 << 20, stride_shift: 21 }, vec![0, 2 << 20]),
        (PageSpan { start: 1 << 30, end: 3 << 30, stride_shift: 30 }, vec![1 << 30, 2 << 30]),
        // A last page of which only a part is in the range counts.
        (PageSpan { start: 0, end: (2 << 20) + 4096, stride_shift: 21 }, vec![0, 2 << 20]),
    ] {
        assert_eq!(span.pages().collect::<Vec<_>>(), pages, "{span}");
        assert_eq!(span.nr_pages(), pages.len() as u64, "{span}");
    }
}
