//! Who makes every CPU forget: the engine's shootdown, or a flush of the kernel's own.
#![expect(unsafe_code, reason = "a flush of the kernel's own is taken on trust")]

use mmu_tlb::{
    Cpus, FreedTables, Laziness, MmContext, PageSpan, flush_tlb_mm, flush_tlb_mm_range, switch_mm,
};

use crate::levels::context::TlbContext;

/// Who makes every CPU forget what was unmapped.
///
/// A kernel that implements [`Cpus`] has this trait by that: its CPUs are told by the engine, which
/// knows from [`switch_mm`] where an address space is loaded.
///
/// A kernel with a flush of its own (a hypercall, INVLPGB, interrupts that it has already)
/// implements this trait and not `Cpus`. It needs no [`CpuTlb`](mmu_tlb::CpuTlb), no `switch_mm`
/// and no mailbox. No type can do both, so a kernel that implements `Cpus` and never calls
/// `switch_mm`, whose CPUs nobody would tell, has not chosen this.
///
/// # Safety
/// Frames and tables are freed as soon as [`flush_tlb`](Self::flush_tlb) has returned (rule G1). So
/// when it returns, of what was changed before the call at the addresses of its span:
/// - no CPU uses a translation any more, of whatever size, nor writes through one;
/// - with [`FreedTables::Yes`] no CPU holds an entry that led to a table either, and none walks a
///   table that was unhooked. Idle CPUs count, if they still have the address space in CR3:
///   speculation walks, too;
/// - that goes for CPUs that have the address space loaded, for CPUs that are on their way into it,
///   and for what CPUs elsewhere keep of it under a PCID. (A kernel that reads a set of CPUs has
///   them join it before they load CR3, with a full fence between, as it has one between the change
///   of the entries and the reading of the set.)
/// - devices that walk the tables, or keep translations, have forgotten, too.
///
/// It flushes the address space that the context stands for, on the CPUs that load it.
///
/// # Example
/// `gather/examples/level_b.rs`, and `gather/examples/level_a.rs` without tables.
pub unsafe trait FlushTlb {
    /// What is kept of an address space for its flushes: [`OwnContext`](crate::OwnContext) of what
    /// the kernel's flush needs to find it. ([`MmContext`], if the engine flushes.)
    type Context: TlbContext;

    /// Makes every CPU forget `span` of `context`, all of it if there is no span, and waits until
    /// each has.
    ///
    /// A span may be large; from [some size](PageSpan::nr_pages) on, flushing everything is faster.
    /// With `FreedTables::Yes`, a single page of each table that went lies in the span.
    ///
    /// # Context
    /// As the caller of the gather has it. For dirty pages and moved ones under a table lock (rule
    /// G3): it takes no table lock.
    fn flush_tlb(&self, context: &Self::Context, span: Option<PageSpan>, tables: FreedTables);

    /// The address space ends: this CPU leaves it, if programs of it ran here.
    ///
    /// Called first by [`exit_mmap`](crate::exit_mmap). Unless overridden it does nothing, and a
    /// kernel with a flush of its own has left before it exits.
    ///
    /// # Safety
    /// No program of the address space runs any more, nor comes back.
    #[inline]
    unsafe fn leave_here(&self, _context: &Self::Context) {}

    /// The address space ends, and its last flush has completed: when this returns, no CPU has its
    /// root loaded.
    ///
    /// Called last by [`exit_mmap`](crate::exit_mmap). Unless overridden it does nothing, and it is
    /// for the kernel to know that its root is loaded nowhere before it frees the root.
    ///
    /// # Panics
    /// If another CPU runs programs in it.
    ///
    /// # Safety
    /// As for [`leave_here`](Self::leave_here).
    #[inline]
    unsafe fn leave_everywhere(&self, _context: &Self::Context) {}
}

// SAFETY: the flush functions of `mmu-tlb` hand out a receipt when what is asked above is so; they
// rest on the contract of `Cpus`.
unsafe impl<C: Cpus> FlushTlb for C {
    type Context = MmContext<C::Bits>;

    #[inline(always)]
    fn flush_tlb(&self, context: &Self::Context, span: Option<PageSpan>, tables: FreedTables) {
        let receipt = match span {
            Some(span) => flush_tlb_mm_range(self, context, span, tables),
            None => flush_tlb_mm(self, context),
        };
        debug_assert!(receipt.is_of(context), "G1: {receipt:?} is of another address space");
    }

    /// A lazy CPU leaves when it flushes.
    unsafe fn leave_here(&self, context: &Self::Context) {
        self.pinned(|here| {
            let state = self.cpu_state(here);
            if state.has_loaded(context) && state.laziness() == Laziness::Active {
                // SAFETY: pinned to `here`, interrupts off.
                self.without_interrupts(|| unsafe { switch_mm(self, here, None) });
            }
        });
    }

    unsafe fn leave_everywhere(&self, context: &Self::Context) {
        if context.may_be_loaded_somewhere(self) {
            // Nothing was mapped, so nothing was flushed, and a CPU still has the address space
            // loaded lazily: a flush makes it leave. A CPU that is switching may still have the
            // root in CR3, too.
            let _left = flush_tlb_mm(self, context);
            assert!(
                !context.is_loaded_somewhere(self),
                "G1: context {} is torn down while a CPU runs programs in it",
                context.ctx_id().get()
            );
        }
    }
}
