//! What the kernel knows of one CPU, found through the GS base.
//!
//! A file that needs more state a CPU keeps an array of its own, by [`CpuIndex`], as
//! `DEFINE_PER_CPU` does in Linux: this file names nobody above it.

use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};

use spin::Once;
use x86_64::VirtAddr;
use x86_64::registers::model_specific::{GsBase, KernelGsBase};

use crate::arch::asm::gs_self;
use crate::arch::context::UserContext;
use crate::cpu::index::{AtomicCpuIndex, CpuIndex, CpuMask, MAX_CPUS};

static CPUS: [Cpu; MAX_CPUS] = [const { Cpu::new() }; MAX_CPUS];

/// Number of CPUs that have come up.
static NR_CPUS: AtomicU32 = AtomicU32::new(0);

/// State of one CPU. The first three fields are used by `trap.s`.
#[repr(C, align(128))]
#[derive(Debug)]
pub struct Cpu {
    /// The address of this structure.
    self_pointer: AtomicPtr<Cpu>,
    /// Where the next trap from ring 3 stores the user's registers.
    user_context: AtomicPtr<UserContext>,
    /// The stack on which `enter_user` was called.
    kernel_stack: AtomicU64,
    index: AtomicCpuIndex,
    apic_id: Once<u32>,
    /// Another CPU wants this one out of ring 3.
    pub(crate) kicked: AtomicBool,
}

impl Cpu {
    /// Byte offsets for `trap.s`.
    #[cfg(bare)]
    pub(crate) const USER_CONTEXT_OFFSET: usize = core::mem::offset_of!(Cpu, user_context);
    #[cfg(bare)]
    pub(crate) const KERNEL_STACK_OFFSET: usize = core::mem::offset_of!(Cpu, kernel_stack);

    const fn new() -> Self {
        Self {
            self_pointer: AtomicPtr::new(core::ptr::null_mut()),
            user_context: AtomicPtr::new(core::ptr::null_mut()),
            kernel_stack: AtomicU64::new(0),
            index: AtomicCpuIndex::new(),
            apic_id: Once::new(),
            kicked: AtomicBool::new(false),
        }
    }

    /// Returns the number of this CPU.
    #[must_use]
    pub fn index(&self) -> CpuIndex {
        self.index.load()
    }

    /// Returns the id of this CPU's local APIC.
    ///
    /// # Panics
    ///
    /// Before the CPU was brought up.
    #[must_use]
    pub fn apic_id(&self) -> u32 {
        *self.apic_id.get().expect("a CPU gets its APIC id before its index is given to anyone")
    }
}

/// Returns the state of the CPU that runs this. Keep the reference only where the code cannot move
/// to another CPU; in this image it never moves. The state exists from the first Rust function on.
#[inline]
#[must_use]
pub fn this_cpu() -> &'static Cpu {
    // SAFETY: invariant B2: GS holds the address of an element of `CPUS`, a static.
    unsafe { &*gs_self().cast::<Cpu>() }
}

/// Returns the number of the CPU that runs this.
#[inline]
#[must_use]
pub fn this_index() -> CpuIndex {
    this_cpu().index()
}

/// Returns the state of any CPU.
#[inline]
#[must_use]
pub fn cpu(index: CpuIndex) -> &'static Cpu {
    &CPUS[index.get()]
}

/// Returns the set of all CPUs that have come up.
#[must_use]
pub fn online() -> CpuMask {
    // ORDERING: pairs with `set_online`: whoever counts a CPU also sees what that CPU set up
    // before.
    let count = NR_CPUS.load(Ordering::Acquire);
    CpuMask::first(count)
}

/// Prepares the state of a CPU before it starts.
pub(crate) fn prepare(index: CpuIndex, apic_id: u32) -> &'static Cpu {
    let cpu = cpu(index);
    cpu.self_pointer.store(core::ptr::from_ref(cpu).cast_mut(), Ordering::Relaxed);
    cpu.index.store(index);
    cpu.apic_id.call_once(|| apic_id);
    cpu
}

/// Makes `cpu` the state of the CPU that runs this (establishes B2).
///
/// # Safety
///
/// `cpu` was prepared, and is the state of no other running CPU. The segment register GS is not
/// loaded afterwards.
pub(crate) unsafe fn install(cpu: &'static Cpu) {
    GsBase::write(VirtAddr::from_ptr(cpu));
    // What SWAPGS puts in place on the way to ring 3.
    KernelGsBase::write(VirtAddr::zero());
}

/// Counts the running CPU, which has set itself up, among those that are online.
pub(crate) fn set_online(index: CpuIndex) {
    // ORDERING: pairs with `online`.
    NR_CPUS.store(index.number() + 1, Ordering::Release);
}
