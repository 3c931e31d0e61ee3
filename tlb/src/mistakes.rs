//! What debug builds look for in a kernel that embeds this crate, and say in words. Release builds
//! look for none of it.

use x86_64::structures::paging::PhysFrame;

use crate::cpu_state::{CpuTlb, Laziness};
use crate::cpuset::{CpuBits, CpuId};
use crate::generation::MmContext;
use crate::mmu::Cpus;

/// Whether to look at all. Not in this crate's unit tests, which record what a flush itself reads,
/// nor in model checks.
const LOOKS: bool = cfg!(all(debug_assertions, not(test), not(mmu_loom)));

/// T2: each CPU has a state of its own.
#[inline(always)]
pub(crate) fn check_owner<B: CpuBits>(_state: &CpuTlb<B>, _cpu: CpuId) {
    #[cfg(debug_assertions)]
    if LOOKS && let Some(owner) = _state.other_owner(_cpu) {
        panic!(
            "T2: {_cpu} and {owner} have one CpuTlb: what one has flushed, the other is taken to have flushed. \
             `cpu_state` returns another one for each CPU; or {owner} is what the kernel calls this CPU elsewhere"
        );
    }
}

/// T4: what is in CR3 was put there by `switch_mm`. Pinned to `here`.
#[inline(always)]
pub(crate) fn check_cr3<C: Cpus>(cpus: &C, here: CpuId, mm: &MmContext<C::Bits>) {
    if LOOKS && let Some(root) = cpus.cr3() {
        compare_cr3(cpus.cpu_state(here), here, mm, root);
    }
}

fn compare_cr3<B: CpuBits>(state: &CpuTlb<B>, here: CpuId, mm: &MmContext<B>, root: PhysFrame) {
    let (is_known, is_loaded) = (state.has_loaded(mm), root == mm.root());
    let name = mm.ctx_id().get();
    assert!(
        is_known || !is_loaded,
        "T4: context {name} is in CR3 of {here}, and switch_mm has not put it there: nobody would tell this CPU to \
         flush. CR3 is loaded by switch_mm alone, after init_cpu; a kernel that flushes by means of its own says so \
         by the trait that it implements"
    );
    assert!(
        is_loaded || !is_known,
        "T4: switch_mm has put context {name} into CR3 of {here}, and {:#x} is there now: a flush would drop \
         translations of something else. CR3 is loaded by switch_mm alone",
        root.start_address()
    );
}

/// CPUs know a context by its address, from now on: a CPU is about to load it.
#[inline(always)]
pub(crate) fn note_place<B: CpuBits>(_mm: &MmContext<B>) {
    #[cfg(debug_assertions)]
    if LOOKS {
        _mm.note_place();
        check_place(_mm);
    }
}

/// A context that no CPU has loaded yet may move, flushed for or not.
#[inline(always)]
pub(crate) fn check_place<B: CpuBits>(_mm: &MmContext<B>) {
    #[cfg(debug_assertions)]
    if LOOKS && let Some(before) = _mm.moved_from() {
        panic!(
            "context {} was at {before:#x} when a CPU loaded it, and is at {:p} now: CPUs know it by its address. An Mm \
             that a CPU has loaded is neither moved nor copied (keep it in a Pin<Box<Mm>> or a Pin<Arc<..>>)",
            _mm.ctx_id().get(),
            core::ptr::from_ref(_mm),
        );
    }
}

/// Whether whoever waits has waited long enough to say so.
#[inline(always)]
pub(crate) fn is_too_long<C: Cpus>(cpus: &C, turns: u64) -> bool {
    LOOKS && turns.is_multiple_of(TURNS_BETWEEN_LOOKS) && cpus.most_turns().is_some_and(|most| turns >= most)
}

/// How rarely that is asked.
const TURNS_BETWEEN_LOOKS: u64 = 1024;

/// `target` was asked by `here`, and has not even looked.
#[cold]
pub(crate) fn name_silent<C: Cpus>(cpus: &C, here: CpuId, target: CpuId, turns: u64) -> ! {
    let loaded = if cpus.cpu_state(target).laziness() == Laziness::Lazy { "lazy" } else { "not lazy" };
    panic!(
        "{here} has waited {turns} turns for {target} to flush ({target} is {loaded}), and {target} has not taken its \
         mail. It is off, and offline_cpu was not the last that it ran; or it spins with interrupts off and does not \
         call flush_interrupt meanwhile; or send_flush_interrupt has not reached it; or its handler does not call \
         flush_interrupt, or names another CPU; or it gets no turn, because wait_for_answers lets no other CPU run \
         where that is needed (CPUs that share a core or a thread, as in a test)"
    )
}
