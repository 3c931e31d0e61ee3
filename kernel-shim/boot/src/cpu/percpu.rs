//! What belongs to one CPU, found through the GS base.

use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};

use spin::Once;
use x86_64::VirtAddr;
use x86_64::registers::model_specific::{GsBase, KernelGsBase};

use crate::arch::asm::gs_self;
use crate::cpu::ipi::CallSlot;
use crate::cpu::ring3::UserContext;
use crate::cpu::watchdog::Activity;

/// As many CPUs as a [`CpuMask`] has bits.
pub const MAX_CPUS: usize = 64;

static CPUS: [Cpu; MAX_CPUS] = [const { Cpu::new() }; MAX_CPUS];

/// Number of CPUs that have come up.
static NR_CPUS: AtomicU32 = AtomicU32::new(0);

/// The number of a CPU: 0 for the one that booted, then in the order in which they came up, without gaps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CpuIndex(u32);

impl CpuIndex {
    /// The CPU that booted.
    pub const FIRST: Self = Self(0);

    /// Returns the CPU with this number.
    ///
    /// # Panics
    ///
    /// From [`MAX_CPUS`] on.
    #[must_use]
    pub const fn new(index: u32) -> Self {
        assert!((index as usize) < MAX_CPUS, "no such CPU");
        Self(index)
    }

    /// Returns the number as an index into arrays of [`MAX_CPUS`].
    #[must_use]
    pub const fn get(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for CpuIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A set of CPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuMask(u64);

impl CpuMask {
    /// The set without members.
    pub const EMPTY: Self = Self(0);

    /// Returns the set of one CPU.
    #[must_use]
    pub const fn only(cpu: CpuIndex) -> Self {
        Self(1 << cpu.0)
    }

    /// Returns the set whose members are the bits of `bits`.
    #[must_use]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// Returns one bit a member.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Returns the set with `cpu`.
    #[must_use]
    pub const fn with(self, cpu: CpuIndex) -> Self {
        Self(self.0 | 1 << cpu.0)
    }

    /// Returns the set without `cpu`.
    #[must_use]
    pub const fn without(self, cpu: CpuIndex) -> Self {
        Self(self.0 & !(1 << cpu.0))
    }

    /// Returns whether `cpu` is a member.
    #[must_use]
    pub const fn contains(self, cpu: CpuIndex) -> bool {
        self.0 >> cpu.0 & 1 == 1
    }

    /// Returns whether there is no member.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Returns the number of members.
    #[must_use]
    pub const fn count(self) -> u32 {
        self.0.count_ones()
    }

    /// Returns the members, lowest first.
    pub fn iter(self) -> impl Iterator<Item = CpuIndex> {
        let mut bits = self.0;
        core::iter::from_fn(move || {
            (bits != 0).then(|| {
                let lowest = bits.trailing_zeros();
                bits &= bits - 1;
                CpuIndex(lowest)
            })
        })
    }
}

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
    index: AtomicU32,
    apic_id: Once<u32>,
    /// One bit for each CPU that has a call for this one; see [`crate::cpu::ipi`].
    pub(crate) inbox: AtomicU64,
    /// The call this CPU has for others.
    pub(crate) call: CallSlot,
    /// Somebody wants this CPU out of ring 3.
    pub(crate) kicked: AtomicBool,
    /// Counts steps of work, for the watchdog.
    pub(crate) progress: AtomicU64,
    /// What this CPU says it is doing, for the watchdog.
    pub(crate) activity: Activity,
    /// Calls that this CPU has sent to others.
    pub(crate) calls_sent: AtomicU64,
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
            index: AtomicU32::new(0),
            apic_id: Once::new(),
            inbox: AtomicU64::new(0),
            call: CallSlot::new(),
            kicked: AtomicBool::new(false),
            progress: AtomicU64::new(0),
            activity: Activity::new(),
            calls_sent: AtomicU64::new(0),
        }
    }

    /// Returns the number of this CPU.
    #[must_use]
    pub fn index(&self) -> CpuIndex {
        CpuIndex(self.index.load(Ordering::Relaxed))
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

/// Returns the state of the CPU that runs this. Hold it only where the code cannot move to another CPU, which in this image
/// is everywhere. It is there from the first Rust function on.
#[inline]
#[must_use]
pub fn this_cpu() -> &'static Cpu {
    // SAFETY: invariant B2: GS holds the address of an element of `CPUS`, a static.
    unsafe { &*gs_self() }
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
    // ORDERING: pairs with `set_online`: who sees a CPU's number also sees what it set up before.
    let count = NR_CPUS.load(Ordering::Acquire);
    CpuMask(u64::MAX.unbounded_shr(u64::BITS - count))
}

/// Prepares the state of a CPU before it starts.
pub(crate) fn prepare(index: CpuIndex, apic_id: u32) -> &'static Cpu {
    let cpu = cpu(index);
    cpu.self_pointer.store(core::ptr::from_ref(cpu).cast_mut(), Ordering::Relaxed);
    cpu.index.store(index.0, Ordering::Relaxed);
    cpu.apic_id.call_once(|| apic_id);
    cpu
}

/// Makes `cpu` the state of the CPU that runs this (establishes B2).
///
/// # Safety
///
/// `cpu` was prepared, and is the state of no other running CPU. The segment register GS is not loaded afterwards.
pub(crate) unsafe fn install(cpu: &'static Cpu) {
    GsBase::write(VirtAddr::from_ptr(cpu));
    // What SWAPGS puts in place on the way to ring 3.
    KernelGsBase::write(VirtAddr::zero());
}

/// Counts the running CPU, which has set itself up, among those that are online.
pub(crate) fn set_online(index: CpuIndex) {
    // ORDERING: pairs with `online`.
    NR_CPUS.store(index.0 + 1, Ordering::Release);
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::vec::Vec;

    use super::{CpuIndex, CpuMask};

    #[test]
    fn a_mask_lists_its_members_lowest_first() {
        let mask = CpuMask::only(CpuIndex::new(63)).with(CpuIndex::FIRST).with(CpuIndex::new(5));
        let members: Vec<usize> = mask.iter().map(CpuIndex::get).collect();
        assert_eq!(members, [0, 5, 63]);
        assert_eq!(mask.count(), 3);
        assert!(
            mask.contains(CpuIndex::new(5)) && !mask.without(CpuIndex::new(5)).contains(CpuIndex::new(5))
        );
    }

    #[test]
    #[should_panic(expected = "no such CPU")]
    fn a_cpu_beyond_the_mask_cannot_be_named() {
        let _ = CpuIndex::new(64);
    }
}
