//! CPUs that come and go.
#![expect(unsafe_code, reason = "loads CR3")]

use crate::cpu_state::{KERNEL_PCID, Laziness, LoadedMm};
use crate::cpuset::CpuId;
use crate::delivery::flush_interrupt;
use crate::mistakes::check_owner;
use crate::mmu::{CachedTranslations, Cpus};
use crate::switch::switch_mm;

/// Takes a CPU out of service: once this returns no flush waits for the CPU, not even a flush of
/// freed tables.
///
/// The CPU stays in cpumasks, which does no harm. The initiator takes back mail that this CPU has
/// not taken; a kernel that overrides [`flush_others`](crate::Cpus::flush_others) answers, or takes
/// a CPU as having answered once [`CpuTlb::is_offline`](crate::CpuTlb::is_offline) says so.
///
/// # Safety
/// - It runs on `cpu`, interrupts off.
/// - No user address is used on `cpu`, and nothing but the kernel's own address space is loaded
///   there, before [`init_cpu`] has run.
///
/// # Source
/// Linux: idle_task_exit, kernel/sched/core.c, and cpu_online_mask in smp_call_function_many_cond,
/// kernel/smp.c.
#[doc(alias = "idle_task_exit")]
pub unsafe fn offline_cpu<C: Cpus>(cpus: &C, cpu: CpuId) {
    // SAFETY: on this CPU, interrupts off.
    unsafe { switch_mm(cpus, cpu, None) };
    // ORDERING: release (in `set_loaded`), after CR3: whoever finds this CPU off may free the
    // tables that it walked before.
    cpus.cpu_state(cpu).set_loaded(&LoadedMm::Offline);
}

/// Starts a CPU, or starts it again after it was off: no slot is believed, everything cached is
/// dropped.
///
/// Its interrupt controller accepts the flush interrupt from before this call on: what was sent to
/// a CPU that is off may be lost, and mail is looked for here once more.
///
/// # Safety
/// It runs on `cpu`, interrupts off, before any address space is loaded there.
///
/// # Source
/// Linux: initialize_tlbstate_and_flush, arch/x86/mm/tlb.c.
#[doc(alias = "initialize_tlbstate_and_flush")]
pub unsafe fn init_cpu<C: Cpus>(cpus: &C, cpu: CpuId) {
    let state = cpus.cpu_state(cpu);
    check_owner(state, cpu);
    state.set_laziness(Laziness::Active);
    // A flusher that still found this CPU off need not ask it: what is cached from here on comes
    // from tables as they are now, and `switch_mm` announces itself before it reads a generation.
    // SAFETY: the kernel's own root maps the kernel and is never freed. Translations under other
    // PCIDs are harmless: no slot names them any more, so their next use flushes first (T6).
    unsafe { cpus.load_cr3(cpus.init_root(), KERNEL_PCID, CachedTranslations::Flush) };
    state.forget_slots();
    state.set_loaded(&LoadedMm::Init);
    // Whoever asked while it was off, and found it here again before it could take that back.
    // SAFETY: on this CPU, interrupts off.
    unsafe { flush_interrupt(cpus, cpu) };
}
