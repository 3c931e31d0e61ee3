//! What one CPU's TLB may hold, as far as software knows.
#![expect(
    unsafe_code,
    reason = "a CPU remembers its address space by pointer; the pointer is followed here only"
)]

use core::fmt;
use core::ptr;

use x86_64::instructions::tlb::Pcid;

use crate::cpuset::CpuBits;
#[cfg(debug_assertions)]
use crate::cpuset::CpuId;
use crate::generation::{CtxId, MmContext, TlbGen};
use crate::mailbox::Mailbox;
use crate::sync::{AtomicBool, AtomicPtr, AtomicU16, AtomicU64, Ordering, array_of, const_fn};

/// Whether CR4.PCIDE is set on every CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PcidSupport {
    /// All translations are tagged 0; a CR3 load drops them.
    Off,
    /// Each CPU keeps [`NR_DYN_ASIDS`] address spaces apart.
    On,
}

/// How many address spaces one CPU keeps translations of when PCIDs are on. Linux:
/// TLB_NR_DYN_ASIDS.
///
/// With six slots the CPU-local part of [`CpuTlb`] is two cache lines.
#[doc(alias = "TLB_NR_DYN_ASIDS")]
pub const NR_DYN_ASIDS: u16 = 6;

/// The number of a slot on one CPU, `0..NR_DYN_ASIDS`. Its PCID is one more, because PCID 0 is the
/// kernel's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asid(u16);

impl Asid {
    /// The slot number.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// The PCID that tags this slot's translations; 0 for every slot while PCIDs are off.
    #[must_use]
    pub const fn pcid(self, support: PcidSupport) -> Pcid {
        match support {
            PcidSupport::Off => KERNEL_PCID,
            PcidSupport::On => SLOT_PCIDS[self.0 as usize],
        }
    }
}

/// The tag of the kernel's own address space, and of every translation while PCIDs are off.
pub(crate) const KERNEL_PCID: Pcid = pcid(0);

const SLOT_PCIDS: [Pcid; NR_DYN_ASIDS as usize] = [pcid(1), pcid(2), pcid(3), pcid(4), pcid(5), pcid(6)];

const fn pcid(number: u16) -> Pcid {
    match Pcid::new(number) {
        Ok(pcid) => pcid,
        Err(_) => panic!("a PCID has 12 bits"),
    }
}

/// What a CPU promises about one PCID: nothing older than `tlb_gen` of context `ctx_id` is cached
/// under it (rule T2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The context whose translations are cached there; `None` if the slot was never used.
    pub ctx_id: Option<CtxId>,
    /// The generation that they are at least as new as.
    pub tlb_gen: TlbGen,
}

/// Whether a CPU merely borrows the address space in its CR3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Laziness {
    /// User programs may run: flushes must arrive.
    Active,
    /// Only kernel threads run: page flushes may wait until the CPU wakes.
    Lazy,
}

/// The address space in a CPU's CR3.
pub enum LoadedMm<'a, B: CpuBits> {
    /// The kernel's own, without user translations (Linux: init_mm).
    Init,
    /// The CPU is between two: CR3 may hold the old one or the new one. Interrupts are off (Linux:
    /// LOADED_MM_SWITCHING).
    Switching,
    /// The CPU is off. Nobody needs to know what its CR3 holds, because it starts without
    /// translations ([`init_cpu`](crate::init_cpu)).
    Offline,
    /// This one.
    Mm(&'a MmContext<B>),
}

#[derive(Debug)]
struct SlotCell {
    ctx_id: AtomicU64,
    tlb_gen: AtomicU64,
}

impl SlotCell {
    const_fn! {
        fn new() -> Self {
            Self { ctx_id: AtomicU64::new(0), tlb_gen: AtomicU64::new(0) }
        }
    }
}

/// One CPU's state. Only the CPU itself writes it, but for its mailbox; other CPUs read what is in
/// `shared`.
///
/// The part that the CPU alone uses is two cache lines, which it writes whenever it flushes. What
/// flushing CPUs read at every shootdown has a line of its own, which the CPU writes only when it
/// switches, goes lazy or wakes. Linux: cpu_tlbstate and cpu_tlbstate_shared; there `loaded_mm` is
/// in the first.
#[doc(alias = "cpu_tlbstate")]
#[repr(C, align(64))]
pub struct CpuTlb<B: CpuBits> {
    loaded_asid: AtomicU16,
    next_asid: AtomicU16,
    /// The number of the CPU whose state this is, plus 1; 0 while nobody has used it. It takes the
    /// room that alignment leaves.
    #[cfg(debug_assertions)]
    owner: core::sync::atomic::AtomicU32,
    slots: [SlotCell; NR_DYN_ASIDS as usize],
    shared: SharedLine<B>,
    mailbox: Mailbox<B>,
}

#[derive(Debug)]
#[repr(C, align(64))]
struct SharedLine<B: CpuBits> {
    /// Null is init_mm, `switching()` is between two, `offline()` is a CPU that is off.
    loaded_mm: AtomicPtr<MmContext<B>>,
    is_lazy: AtomicBool,
}

#[cfg(not(mmu_loom))]
mod layout {
    use super::{CpuTlb, Mailbox, SharedLine};
    use crate::sync::AtomicU64;
    use static_assertions::{assert_impl_all, assert_not_impl_any, const_assert_eq};

    const_assert_eq!(core::mem::offset_of!(CpuTlb<[AtomicU64; 1]>, shared), 128);
    const_assert_eq!(size_of::<CpuTlb<[AtomicU64; 1]>>(), 320);
    const_assert_eq!(size_of::<Mailbox<[AtomicU64; 1]>>(), 128);
    const_assert_eq!(align_of::<SharedLine<[AtomicU64; 1]>>(), 64);
    const_assert_eq!(size_of::<SharedLine<[AtomicU64; 64]>>(), 64);
    assert_impl_all!(CpuTlb<[AtomicU64; 1]>: Send, Sync);
    assert_not_impl_any!(CpuTlb<[AtomicU64; 1]>: Clone, Copy);
}

impl<B: CpuBits> CpuTlb<B> {
    const_fn! {
        /// A CPU that runs on the kernel's own address space and holds no user translation.
        ///
        /// It is `const`, so a kernel without per-CPU memory may keep all of them in a static.
        ///
        /// ```
        /// use core::sync::atomic::AtomicU64;
        /// use mmu_tlb::CpuTlb;
        ///
        /// static CPUS: [CpuTlb<[AtomicU64; 1]>; 64] = [const { CpuTlb::new() }; 64];
        /// # assert_eq!(CPUS.len(), 64);
        /// ```
        #[must_use]
        pub fn new() -> Self {
            Self {
                loaded_asid: AtomicU16::new(0),
                next_asid: AtomicU16::new(0),
                #[cfg(debug_assertions)]
                owner: core::sync::atomic::AtomicU32::new(0),
                slots: array_of!(SlotCell::new(); NR_DYN_ASIDS as usize),
                shared: SharedLine {
                    loaded_mm: AtomicPtr::new(ptr::null_mut()),
                    is_lazy: AtomicBool::new(false),
                },
                mailbox: Mailbox::new(),
            }
        }
    }

    /// Debug builds: `cpu` uses this state. Who has used it before, if that was another.
    #[cfg(debug_assertions)]
    pub(crate) fn other_owner(&self, cpu: CpuId) -> Option<CpuId> {
        let number = cpu.number().wrapping_add(1);
        let before = self.owner.compare_exchange(0, number, Ordering::Relaxed, Ordering::Relaxed);
        before.err().filter(|owner| *owner != number).map(|owner| CpuId::new(owner.wrapping_sub(1)))
    }

    /// What other CPUs ask of this one, and what it asks of them.
    #[inline]
    pub(crate) const fn mailbox(&self) -> &Mailbox<B> {
        &self.mailbox
    }

    /// Whether the CPU has said that it merely borrows its address space.
    #[must_use]
    #[inline]
    pub fn laziness(&self) -> Laziness {
        // ORDERING: acquire, pairs with `set_laziness`: whoever does not interrupt a lazy CPU and
        // frees a page must come after the last use of the page there.
        if self.shared.is_lazy.load(Ordering::Acquire) { Laziness::Lazy } else { Laziness::Active }
    }

    /// Whether this CPU has `mm` in CR3, by its own account; false while it switches.
    #[must_use]
    #[inline]
    pub fn has_loaded(&self, mm: &MmContext<B>) -> bool {
        // ORDERING: acquire, as in `may_have_loaded`, when asked of another CPU. When asked of this
        // CPU, any ordering would do.
        ptr::eq(self.shared.loaded_mm.load(Ordering::Acquire), mm)
    }

    /// Whether this CPU may have `mm` in CR3: it has it, or it switches, and then it does not say
    /// from or to what.
    #[must_use]
    pub(crate) fn may_have_loaded(&self, mm: &MmContext<B>) -> bool {
        // One read, as in `concern`.
        // ORDERING: acquire, pairs with the release store in `set_loaded`: whoever finds that the
        // CPU has gone elsewhere may use the root again, and the last walk there must come first.
        let loaded = self.shared.loaded_mm.load(Ordering::Acquire);
        ptr::eq(loaded, mm) || ptr::eq(loaded, switching())
    }

    /// Decides whether a flush of `mm` that frees no tables must interrupt this CPU; with `None`, a
    /// flush of whatever the CPU has loaded.
    ///
    /// A flush that frees tables asks this function only whether the CPU is off, and interrupts
    /// every other CPU in the cpumask, lazy ones included (rule T5). That is decided in
    /// `cpus_to_interrupt` in shootdown.rs, which is the only caller for flushes of one address
    /// space; `flush_all_updated` is the one for reclaim batches.
    ///
    /// Linux: should_flush_tlb.
    #[doc(alias = "should_flush_tlb")]
    #[must_use]
    #[inline]
    pub fn concern(&self, mm: Option<&MmContext<B>>) -> Concern {
        // One read: between two reads, a switch could go from SWITCHING to `mm`, and the CPU would
        // be taken for neither.
        // ORDERING: acquire, pairs with the release store in `set_loaded`: whoever finds the CPU
        // elsewhere frees pages without asking it, and its last use of them must come first. That a
        // CPU on its way in is never taken for a lazy one has another reason: the flusher's fence
        // comes before both reads, and the switcher's after both writes (S1, S2), so either both
        // writes are seen or S4 sees the new generation.
        let loaded = self.shared.loaded_mm.load(Ordering::Acquire);
        if self.laziness() == Laziness::Lazy {
            return Concern::Lazy;
        }
        match mm {
            _ if ptr::eq(loaded, offline()) => Concern::Offline,
            Some(mm) if !ptr::eq(loaded, mm) && !ptr::eq(loaded, switching()) => Concern::Elsewhere,
            _ => Concern::MustFlush,
        }
    }

    /// Whether the CPU is off: [`offline_cpu`](crate::offline_cpu) ran there, and
    /// [`init_cpu`](crate::init_cpu) has not run since.
    ///
    /// Such a CPU holds no translation that it will use again, and will never answer. So an
    /// implementor of [`flush_others`](crate::Cpus::flush_others) counts a target that is off as
    /// one that has answered.
    #[must_use]
    #[inline]
    pub fn is_offline(&self) -> bool {
        // ORDERING: acquire, as in `may_have_loaded`.
        ptr::eq(self.shared.loaded_mm.load(Ordering::Acquire), offline())
    }

    /// The slot that the loaded address space uses.
    #[must_use]
    #[inline]
    pub fn loaded_asid(&self) -> Asid {
        Asid(self.loaded_asid.load(Ordering::Relaxed))
    }

    /// What slot `asid` promises.
    #[must_use]
    #[inline]
    pub fn slot(&self, asid: Asid) -> Slot {
        let cell = &self.slots[asid.index()];
        Slot {
            ctx_id: CtxId::from_raw(cell.ctx_id.load(Ordering::Relaxed)),
            tlb_gen: TlbGen::new(cell.tlb_gen.load(Ordering::Relaxed)),
        }
    }

    /// Every slot, in order.
    pub fn slots(&self) -> impl Iterator<Item = (Asid, Slot)> + '_ {
        (0..NR_DYN_ASIDS).map(|number| (Asid(number), self.slot(Asid(number))))
    }

    /// The address space in CR3.
    ///
    /// # Safety
    /// Called on this CPU, with interrupts off or while it cannot switch. The caller of
    /// [`switch_mm`](crate::switch_mm) promised that a context lives while it is loaded, and
    /// nothing about afterwards.
    #[must_use]
    pub unsafe fn loaded_mm(&self) -> LoadedMm<'_, B> {
        let pointer = self.shared.loaded_mm.load(Ordering::Relaxed);
        if pointer.is_null() {
            LoadedMm::Init
        } else if ptr::eq(pointer, switching()) {
            LoadedMm::Switching
        } else if ptr::eq(pointer, offline()) {
            LoadedMm::Offline
        } else {
            // SAFETY: the pointer is neither null nor one of the marks, so `set_loaded` stored it
            // from a pinned reference that, by the contract of `switch_mm`, lives until this CPU
            // has loaded another; our caller keeps that from happening.
            LoadedMm::Mm(unsafe { &*pointer })
        }
    }

    /// Announces what CR3 holds, or that it is about to change. Only the CPU itself calls this,
    /// with interrupts off.
    pub(crate) fn set_loaded(&self, loaded: &LoadedMm<'_, B>) {
        let pointer = match loaded {
            LoadedMm::Init => ptr::null_mut(),
            LoadedMm::Switching => switching(),
            LoadedMm::Offline => offline(),
            LoadedMm::Mm(mm) => ptr::from_ref(*mm).cast_mut(),
        };
        // ORDERING: release, pairs with the acquire in `has_loaded`, `may_have_loaded`, `concern`
        // and `is_offline`: the CPU's uses and walks of the old address space come first.
        self.shared.loaded_mm.store(pointer, Ordering::Release);
    }

    pub(crate) fn set_loaded_asid(&self, asid: Asid) {
        self.loaded_asid.store(asid.0, Ordering::Relaxed);
    }

    pub(crate) fn set_laziness(&self, laziness: Laziness) {
        // ORDERING: release, pairs with the acquire in `laziness`: user memory is used before this
        // store, and not after it.
        self.shared.is_lazy.store(laziness == Laziness::Lazy, Ordering::Release);
    }

    /// Raises a slot. The caller also makes the flush that makes the promise true (rule T2).
    pub(crate) fn set_slot(&self, asid: Asid, ctx_id: CtxId, tlb_gen: TlbGen) {
        let cell = &self.slots[asid.index()];
        cell.ctx_id.store(ctx_id.get(), Ordering::Relaxed);
        cell.tlb_gen.store(tlb_gen.get(), Ordering::Relaxed);
    }

    pub(crate) fn forget_slots(&self) {
        for cell in &self.slots {
            cell.ctx_id.store(0, Ordering::Relaxed);
            cell.tlb_gen.store(0, Ordering::Relaxed);
        }
        self.next_asid.store(0, Ordering::Relaxed);
        self.set_loaded_asid(Asid(0));
    }

    /// Chooses the slot for `ctx_id`, and says whether it is already at `tlb_gen` or must be
    /// flushed (rule T6).
    ///
    /// A slot that holds the context is used again; otherwise the next slot in turn is taken over.
    /// Linux: choose_new_asid.
    pub(crate) fn choose_new_asid(
        &self,
        ctx_id: CtxId,
        tlb_gen: TlbGen,
        support: PcidSupport,
    ) -> (Asid, SlotIs) {
        if support == PcidSupport::Off {
            return (Asid(0), SlotIs::Stale);
        }
        for (asid, slot) in self.slots() {
            if slot.ctx_id == Some(ctx_id) {
                return (asid, if slot.tlb_gen < tlb_gen { SlotIs::Stale } else { SlotIs::Current });
            }
        }
        let asid = Asid(self.next_asid.load(Ordering::Relaxed));
        self.next_asid.store((asid.0 + 1) % NR_DYN_ASIDS, Ordering::Relaxed);
        (asid, SlotIs::Stale)
    }
}

/// Whether a slot may be used as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SlotIs {
    Current,
    Stale,
}

/// What a flush means to a CPU in the cpumask; [`CpuTlb::concern`] decides it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Concern {
    /// It uses the address space, or may be about to: it must be interrupted.
    MustFlush,
    /// It is lazy: it looks at the generation when it wakes. Only a flush that frees tables
    /// interrupts it.
    Lazy,
    /// It has another address space loaded: it looks at the generation when it comes back. Only a
    /// flush that frees tables interrupts it.
    Elsewhere,
    /// It is off, and starts without translations: even a flush that frees tables does not
    /// interrupt it.
    Offline,
}

/// The mark for "between two": an address that no context can have.
fn switching<B: CpuBits>() -> *mut MmContext<B> {
    ptr::without_provenance_mut(1)
}

/// The mark for a CPU that is off: another address that no context can have.
fn offline<B: CpuBits>() -> *mut MmContext<B> {
    ptr::without_provenance_mut(2)
}

impl<B: CpuBits> Default for CpuTlb<B> {
    fn default() -> Self {
        Self::new()
    }
}

impl<B: CpuBits> fmt::Debug for CpuTlb<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CpuTlb")
            .field("loaded_mm", &self.shared.loaded_mm.load(Ordering::Relaxed))
            .field("loaded_asid", &self.loaded_asid())
            .field("laziness", &self.laziness())
            .field("slots", &self.slots)
            .finish_non_exhaustive()
    }
}

impl<B: CpuBits> fmt::Debug for LoadedMm<'_, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Init => f.write_str("Init"),
            Self::Switching => f.write_str("Switching"),
            Self::Offline => f.write_str("Offline"),
            Self::Mm(mm) => write!(f, "Mm({})", mm.ctx_id().get()),
        }
    }
}
