//! Changing the address space in CR3, going lazy, and waking.
#![expect(unsafe_code, reason = "loads CR3")]

use core::pin::Pin;

use crate::cpu_state::{Asid, CpuTlb, KERNEL_PCID, Laziness, LoadedMm, PcidSupport, SlotIs};
use crate::cpuset::CpuId;
use crate::generation::{MmContext, TlbGen};
use crate::mistakes::{check_owner, note_place};
use crate::mmu::{CachedTranslations, Cpus, TlbEvent};
use crate::sync::{Ordering, fence};

/// Puts `next` (`None`: the kernel's own address space) into this CPU's CR3 and ends lazy mode.
///
/// Translations cached from an earlier stay are kept if the generation of the address space has not
/// risen since, and dropped otherwise. The old address space keeps this CPU in its cpumask until a
/// flush finds it elsewhere.
///
/// # Context
/// A scheduler calls it with interrupts off. Takes no lock, allocates nothing.
///
/// # Safety
/// - It runs on `cpu`, interrupts off, with `cpus` the machine that knows `cpu` by that number.
/// - `next` lives, and its root stays a table, until this CPU has switched away from it (a lazy CPU
///   has not): the embedder counts lazy users (Linux: mm_count), or frees the tables through a
///   flush that reaches lazy CPUs. (That `next` does not move is said by its being pinned.)
/// - All contexts that CPUs of this machine load have their names from one
///   [`CtxIds`](crate::CtxIds): a slot knows a context by its name alone.
///
/// # Source
/// Linux: switch_mm_irqs_off, arch/x86/mm/tlb.c.
///
/// # Example
/// ```
/// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/doc/machine.rs"));
/// # fn main() {
/// use mmu_tlb::{CtxIds, MmContext, switch_mm};
/// use x86_64::PhysAddr;
///
/// // `Machine` is the example of `Cpus`.
/// let (machine, cpu, ids) = (Machine::default(), CpuId::new(0), CtxIds::new());
/// // SAFETY: one source of names, and a root each.
/// let [one, other] = [0x1000, 0x2000].map(|root| unsafe {
///     Box::pin(MmContext::new(&ids, PhysFrame::containing_address(PhysAddr::new(root))))
/// });
/// for mm in [&one, &other, &one] {
///     // SAFETY: this thread is the CPU, and both contexts live to the end.
///     unsafe { switch_mm(&machine, cpu, Some(mm.as_ref())) };
/// }
/// // What was cached of the first address space is kept when the CPU comes back to it.
/// let did = machine.did.take();
/// assert_eq!(did[0], "CR3 0x1000, PCID 1: Flush");
/// assert_eq!(did[1], "CR3 0x2000, PCID 2: Flush");
/// assert_eq!(did[2], "CR3 0x1000, PCID 1: Keep");
/// # }
/// ```
#[doc(alias = "switch_mm_irqs_off")]
pub unsafe fn switch_mm<C: Cpus>(cpus: &C, cpu: CpuId, next: Option<Pin<&MmContext<C::Bits>>>) {
    let state = cpus.cpu_state(cpu);
    check_owner(state, cpu);
    let was = state.laziness();
    // S1, L1. ORDERING: before the fence after S3; in the same-mm case, before L2's fence.
    if was == Laziness::Lazy {
        state.set_laziness(Laziness::Active);
    }
    let Some(next) = next else {
        load_init(cpus, cpu);
        return;
    };
    let next = next.get_ref();
    note_place(next);
    if state.has_loaded(next) {
        if was == Laziness::Lazy {
            catch_up(cpus, cpu, next);
        }
        return;
    }
    state.set_loaded(&LoadedMm::Switching); // S2
    cpus.between_flush_steps();
    next.cpumask().set(cpu); // S3; no write, hence no barrier, if the bit is there already
    // ORDERING: pairs with the fence in MmContext::raise_tlb_gen; one of the two must see the
    // other: S4 the new generation, or the flusher this CPU in the cpumask and SWITCHING (rule T4).
    fence(Ordering::SeqCst);
    let tlb_gen = next.tlb_gen(); // S4
    cpus.between_flush_steps();
    let support = cpus.pcid_support();
    let (asid, slot_is) = state.choose_new_asid(next.ctx_id(), tlb_gen, support);
    let cached = match slot_is {
        SlotIs::Current => CachedTranslations::Keep,
        SlotIs::Stale => {
            // S5. INVARIANT: T2 and T6, the CR3 load that follows drops whatever the slot held, and
            // interrupts are off.
            state.set_slot(asid, next.ctx_id(), tlb_gen);
            CachedTranslations::Flush
        }
    };
    // SAFETY: our caller answers for `next`'s root; `Keep` comes only with PCIDs on, for a slot
    // whose generation is the one just read (T2: nothing older is cached under its PCID).
    unsafe { cpus.load_cr3(next.root(), asid.pcid(support), cached) }; // S6
    cpus.between_flush_steps();
    state.set_loaded_asid(asid);
    cpus.between_flush_steps();
    state.set_loaded(&LoadedMm::Mm(next)); // S7
}

/// Ends a lazy stretch in the address space that is still loaded: flushes if any flush was missed.
fn catch_up<C: Cpus>(cpus: &C, cpu: CpuId, mm: &MmContext<C::Bits>) {
    let state = cpus.cpu_state(cpu);
    // L2. ORDERING: pairs with the fence in MmContext::raise_tlb_gen; one of the two must see the
    // other: L3 the new generation, or the flusher is_lazy = false.
    fence(Ordering::SeqCst);
    let tlb_gen = mm.tlb_gen(); // L3
    cpus.between_flush_steps();
    let asid = state.loaded_asid();
    if state.slot(asid).tlb_gen != tlb_gen {
        flush_context(cpus, state, mm, asid, tlb_gen); // L4
        cpus.observe(TlbEvent::CaughtUp);
    }
}

/// Drops everything cached of the loaded `mm` and raises its slot. On this CPU, interrupts off.
#[inline(never)]
pub(crate) fn flush_context<C: Cpus>(
    cpus: &C,
    state: &CpuTlb<C::Bits>,
    mm: &MmContext<C::Bits>,
    asid: Asid,
    raise_to: TlbGen,
) {
    // SAFETY: `mm` is loaded already: its root maps the kernel and lives. Flushing is always legal.
    unsafe { cpus.load_cr3(mm.root(), asid.pcid(cpus.pcid_support()), CachedTranslations::Flush) };
    cpus.between_flush_steps();
    // INVARIANT: T2, all of the context was dropped after `raise_to` had been read.
    state.set_slot(asid, mm.ctx_id(), raise_to);
}

/// Puts the kernel's own address space into CR3.
fn load_init<C: Cpus>(cpus: &C, cpu: CpuId) {
    let state = cpus.cpu_state(cpu);
    state.set_loaded(&LoadedMm::Switching);
    let cached = match cpus.pcid_support() {
        PcidSupport::Off => CachedTranslations::Flush,
        // PCID 0 is only ever used with this root, which maps no user address: nothing stale can be
        // cached under it.
        PcidSupport::On => CachedTranslations::Keep,
    };
    // SAFETY: the kernel's own root maps the kernel and is never freed.
    unsafe { cpus.load_cr3(cpus.init_root(), KERNEL_PCID, cached) };
    cpus.between_flush_steps();
    state.set_loaded(&LoadedMm::Init);
}

/// Says that only kernel threads will run on this CPU for now, while CR3 stays as it is.
///
/// From then on page flushes do not interrupt this CPU. It must call [`switch_mm`] before a user
/// program runs again, even with the same address space. No fence is needed: a flush that still
/// finds the CPU active merely interrupts it.
///
/// # Safety
/// It runs on `cpu`, and no user address is used there until the next [`switch_mm`].
///
/// # Source
/// Linux: enter_lazy_tlb, arch/x86/mm/tlb.c.
pub unsafe fn enter_lazy_tlb<C: Cpus>(cpus: &C, cpu: CpuId) {
    let state = cpus.cpu_state(cpu);
    // SAFETY: on this CPU, by our caller's promise; it does not switch while it runs this.
    if matches!(unsafe { state.loaded_mm() }, LoadedMm::Mm(_)) {
        state.set_laziness(Laziness::Lazy);
    }
}

/// Leaves a borrowed address space for the kernel's own; for use before deep idle states, or before
/// the tables of the address space go.
///
/// Does nothing unless the CPU is lazy.
///
/// # Safety
/// As for [`switch_mm`].
///
/// # Source
/// Linux: leave_mm, arch/x86/mm/tlb.c.
pub unsafe fn leave_mm<C: Cpus>(cpus: &C, cpu: CpuId) {
    if cpus.cpu_state(cpu).laziness() == Laziness::Lazy {
        // SAFETY: passed on to our caller.
        unsafe { switch_mm(cpus, cpu, None) };
    }
}
