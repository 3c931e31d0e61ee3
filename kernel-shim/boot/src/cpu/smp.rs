//! The other CPUs: starting them, and giving all CPUs work.
//!
//! Start: INIT, then a start-up IPI, to one CPU at a time (Intel SDM vol. 3A, 8.4.4.1); each finds
//! in the start block what it needs until it has a GS base.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, Ordering};

use x86_64::PhysAddr;
use x86_64::instructions::interrupts;

use crate::arch::apic::{self, Delivery};
use crate::arch::paging::{kernel_root, new_stack};
use crate::arch::phys_map::phys_to_ptr;
use crate::arch::{clock, descriptors, mmu, symbols};
use crate::cpu::index::{CpuIndex, CpuMask, MAX_CPUS};
use crate::cpu::ipi;
use crate::cpu::percpu::{self, Cpu, cpu, online, this_index};

/// Physical address of the code that other CPUs start with: any page of the first megabyte that is
/// RAM.
pub(crate) const TRAMPOLINE: u64 = 0x8000;
/// Pages of the stack on which a CPU runs the kernel.
pub(crate) const KERNEL_STACK_PAGES: u64 = 32;
/// How long a CPU may take to come up. Long, because an emulated CPU may have to wait for a busy
/// host.
const START_TIMEOUT_US: u64 = 10_000_000;

/// What a starting CPU needs; read by `start.s`.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct StartBlock {
    pub(crate) root: AtomicU64,
    pub(crate) stack_top: AtomicU64,
    pub(crate) cpu: AtomicU64,
}

pub(crate) static START_BLOCK: StartBlock =
    StartBlock { root: AtomicU64::new(0), stack_top: AtomicU64::new(0), cpu: AtomicU64::new(0) };

/// Work for a set of CPUs.
struct Job {
    function: UnsafeCell<Option<&'static Function<'static>>>,
    /// CPUs that have the job still to do.
    running: AtomicU64,
}

type Function<'a> = dyn Fn(CpuIndex) + Sync + 'a;

// SAFETY: the cell is written by the first CPU only, while no CPU runs a job, and read by the
// others only while they are in `running`; see the orderings in `on_cpus` and `do_jobs`.
unsafe impl Sync for Job {}

static JOB: Job = Job { function: UnsafeCell::new(None), running: AtomicU64::new(0) };

/// Starts the CPUs whose APICs are listed, except the one that runs this, and returns how many run
/// afterwards.
///
/// # Panics
///
/// If a CPU does not come up: it might do so later, and would then take the start block of another.
pub(crate) fn start_others(apic_ids: &[u32]) -> u32 {
    copy_trampoline();
    let me = apic::id();
    let others = apic_ids.iter().copied().filter(|id| *id != me).take(MAX_CPUS - 1);
    // The APICs come first in the zip: there is no `CpuIndex` after the 64th CPU, so none may be
    // made.
    for (apic_id, index) in others.zip((1..).map(CpuIndex::new)) {
        start_cpu(index, apic_id);
    }
    online().count()
}

/// Runs `function` on every CPU; see [`on_cpus`].
pub fn on_every_cpu(function: &(dyn Fn(CpuIndex) + Sync)) {
    on_cpus(online(), function);
}

/// Runs `function` on the CPUs of `set` in ordinary context (interrupts on, own stack), and returns
/// when all have finished. CPUs without work halt.
///
/// # Panics
///
/// If called on another CPU than the first, or from a `function`, or if a member is not online.
pub fn on_cpus(set: CpuMask, function: &(dyn Fn(CpuIndex) + Sync)) {
    assert!(set.bits() & !online().bits() == 0, "work for a CPU that is not online");
    assert!(this_index() == CpuIndex::FIRST, "only the first CPU gives out work");
    assert!(JOB.running.load(Ordering::Relaxed) == 0, "work given out from within work");
    // SAFETY: only the lifetime changes: this function returns after every CPU has finished, and
    // panics abort.
    let lasting = unsafe { core::mem::transmute::<&Function<'_>, &'static Function<'static>>(function) };
    // SAFETY: no CPU runs a job, and none looks before it is in `running`.
    unsafe { *JOB.function.get() = Some(lasting) };
    let others = set.without(CpuIndex::FIRST);
    // ORDERING: pairs with the load in `do_jobs`: a CPU that finds itself in the set sees the
    // function.
    JOB.running.store(others.bits(), Ordering::Release);
    others.iter().for_each(ipi::wake);
    if set.contains(CpuIndex::FIRST) {
        function(CpuIndex::FIRST);
    }
    loop {
        interrupts::disable();
        // ORDERING: pairs with the `fetch_and` in `do_jobs`: what the others did is visible here.
        if JOB.running.load(Ordering::Acquire) == 0 {
            interrupts::enable();
            return;
        }
        // The last CPU to finish wakes this one. Interrupts come on together with the halt, so the
        // wake-up is not missed.
        interrupts::enable_and_hlt();
    }
}

/// Makes a CPU leave ring 3: [`crate::cpu::ring3::run_user`] returns there, now or when it is
/// called next.
pub fn kick(target: CpuIndex) {
    // ORDERING: pairs with the swap in `ring3::run_user`: a CPU that has taken the interrupt sees
    // the flag.
    cpu(target).kicked.store(true, Ordering::Release);
    ipi::wake(target);
}

/// Called by `start.s` on every CPU but the first.
#[cfg_attr(not(bare), expect(dead_code, reason = "called from assembly, which only the image has"))]
pub(crate) extern "C" fn secondary_main(me: &'static Cpu) -> ! {
    // SAFETY: `start_cpu` prepared it for this CPU alone, and `start.s` has loaded GS already.
    unsafe { percpu::install(me) };
    mmu::enable_features();
    descriptors::load();
    apic::init();
    percpu::set_online(me.index());
    do_jobs(me)
}

/// Does job after job, and halts in between.
fn do_jobs(me: &'static Cpu) -> ! {
    let mine = CpuMask::only(me.index()).bits();
    loop {
        interrupts::disable();
        // ORDERING: pairs with the store in `on_cpus`.
        if JOB.running.load(Ordering::Acquire) & mine == 0 {
            interrupts::enable_and_hlt();
            continue;
        }
        interrupts::enable();
        // SAFETY: this CPU is in `running`, so the function is there, and stays until this CPU
        // leaves.
        if let Some(function) = unsafe { *JOB.function.get() } {
            function(me.index());
        }
        // ORDERING: pairs with the load in `on_cpus`.
        if JOB.running.fetch_and(!mine, Ordering::AcqRel) == mine {
            ipi::wake(CpuIndex::FIRST);
        }
    }
}

fn start_cpu(index: CpuIndex, apic_id: u32) {
    let cpu = percpu::prepare(index, apic_id);
    START_BLOCK.root.store(kernel_root().start_address().as_u64(), Ordering::Relaxed);
    START_BLOCK.stack_top.store(new_stack(KERNEL_STACK_PAGES).as_u64(), Ordering::Relaxed);
    // ORDERING: the IPI publishes it: `apic::send` issues the IPI only after earlier stores are
    // visible.
    START_BLOCK.cpu.store(core::ptr::from_ref(cpu).addr() as u64, Ordering::Release);
    let is_up = || online().contains(index);
    let page = u8::try_from(TRAMPOLINE >> 12).expect("the trampoline is in the first megabyte");
    apic::send(apic_id, Delivery::Init);
    clock::wait_us(10_000);
    apic::send(apic_id, Delivery::StartUp(page));
    if !clock::wait_until(200, is_up) {
        // A CPU that has started ignores the second start-up IPI.
        apic::send(apic_id, Delivery::StartUp(page));
    }
    assert!(clock::wait_until(START_TIMEOUT_US, is_up), "the CPU with APIC id {apic_id} did not start");
}

fn copy_trampoline() {
    let code = symbols::trampoline();
    let length = usize::try_from(code.end - code.start).expect("usize has 64 bits");
    assert!(length <= 4096, "the trampoline fits its page");
    let from: *const u8 = phys_to_ptr(PhysAddr::new(code.start));
    // SAFETY: the page lies in the first megabyte, which the frame allocator leaves alone; source
    // and target are mapped (B3) and do not overlap, since the image begins at 2 MiB.
    unsafe { phys_to_ptr::<u8>(PhysAddr::new(TRAMPOLINE)).copy_from_nonoverlapping(from, length) };
}
