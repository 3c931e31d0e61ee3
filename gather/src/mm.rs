//! One address space, as the engine sees it.
#![expect(unsafe_code, reason = "takes a root table on trust; pins a field")]

use core::pin::Pin;

use mmu_pagetable::{AddressSpace, PagingMode, TableMemory};
use mmu_tlb::{CpuBits, CtxIds, MmContext};
use x86_64::structures::paging::PhysFrame;

use crate::levels::context::{OwnContext, TlbContext};
use crate::overlap::counts::{Count, OpenGathers, Stripes};

/// An address space that the engine flushes; `B` is the storage of a set of CPUs. What it can do is
/// at [`MmOf`].
pub type Mm<B> = MmOf<MmContext<B>>;

/// What an embedder puts in its mm structure: the paging structures, the TLB context, and the count
/// of open gathers. A kernel that implements [`Cpus`](mmu_tlb::Cpus) has an [`Mm`], one with a
/// flush of its own an `MmOf<OwnContext<..>>`.
///
/// An [`Mm`] must not move while a CPU has it loaded: [`switch_mm`](mmu_tlb::switch_mm) takes its
/// [context](Self::pinned_context) pinned, so an `Mm` lives in a `Pin<Box<Mm>>`, in a
/// `Pin<Arc<..>>`, or in a structure that is pinned.
/// Linux: the parts of mm_struct that mm/mmu_gather.c and arch/x86/mm/tlb.c use.
#[derive(Debug)]
pub struct MmOf<C: TlbContext> {
    space: AddressSpace,
    context: C,
    /// Gathers begun and not yet flushed that may look anywhere. Beside `space`, which every call
    /// reads, because calls for few pages read this, and do not write it.
    open_everywhere: Count,
    /// Gathers begun and not yet flushed that look into few tables.
    open_in_tables: Stripes,
}

impl<B: CpuBits> MmOf<MmContext<B>> {
    /// A new address space whose top table is `root`.
    ///
    /// # Safety
    /// - As for [`AddressSpace::new`];
    /// - as for [`MmContext::new`].
    ///
    /// # Examples
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/small_kernel/machine.rs"));
    /// # fn main() -> Result<(), CutLeaf> {
    /// # let kernel = Kernel::new();
    /// let root = kernel.allocate_table().expect("a frame is left");
    /// // SAFETY: `root` is an empty table of this memory and of no other address space; the kernel
    /// // has one source of names.
    /// let mm = Box::pin(unsafe { Mm::new(&kernel.ids, root, PagingMode::FourLevel) });
    /// kernel.run(CPU[0], Some(&mm)); // switch_mm, with mm.as_ref().pinned_context()
    /// # kernel.run(CPU[0], None);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub unsafe fn new(ids: &CtxIds, root: PhysFrame, mode: PagingMode) -> Self {
        // SAFETY: passed on to our caller.
        let space = unsafe { AddressSpace::new(root, mode) };
        // SAFETY: passed on to our caller.
        unsafe { Self::of_space(ids, space) }
    }

    /// An address space whose top table is `root`, below which tables are linked already; see
    /// [`AddressSpace::adopt`].
    ///
    /// No CPU has it loaded, as far as the engine knows: flushes reach those that have called
    /// [`switch_mm`](mmu_tlb::switch_mm) for it.
    ///
    /// # Safety
    /// - As for [`AddressSpace::adopt`];
    /// - as for [`MmContext::new`];
    /// - no CPU has `root` in CR3, or anything cached from below it: each that had it there has run
    ///   [`init_cpu`](mmu_tlb::init_cpu) since.
    ///
    /// # Examples
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/small_kernel/machine.rs"));
    /// # fn main() -> Result<(), CutLeaf> {
    /// # let kernel = Kernel::new();
    /// # let made_before = kernel.new_mm();
    /// # kernel.map(&made_before, area(0x1000, 0x5000).range);
    /// # let root = made_before.space().root();
    /// // SAFETY: whoever filled `root` knows it no more, and no CPU has it loaded.
    /// let mm = unsafe { Mm::adopt(&kernel, &kernel.ids, root, PagingMode::FourLevel) };
    /// let mm: MyMm = Box::pin(mm);
    /// assert_eq!(mm.space().nr_tables(Level::Pte), 1);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub unsafe fn adopt<M: TableMemory>(memory: &M, ids: &CtxIds, root: PhysFrame, mode: PagingMode) -> Self {
        // SAFETY: passed on to our caller.
        let space = unsafe { AddressSpace::adopt(memory, root, mode) };
        // SAFETY: passed on to our caller.
        unsafe { Self::of_space(ids, space) }
    }

    /// # Safety
    /// As for [`MmContext::new`].
    unsafe fn of_space(ids: &CtxIds, space: AddressSpace) -> Self {
        // SAFETY: passed on to our caller.
        let context = unsafe { MmContext::new(ids, space.root()) };
        let (open_everywhere, open_in_tables) = OpenGathers::none();
        Self { space, context, open_everywhere, open_in_tables }
    }

    /// The TLB context, as [`switch_mm`](mmu_tlb::switch_mm) takes it.
    #[must_use]
    #[inline]
    pub fn pinned_context(self: Pin<&Self>) -> Pin<&MmContext<B>> {
        // SAFETY: `context` is pinned whenever the `Mm` is: it is reached by shared references
        // only, `Mm` has no `Drop` of its own, and is not `Unpin`, because `MmContext` is not.
        unsafe { self.map_unchecked(|mm| &mm.context) }
    }
}

impl<T> MmOf<OwnContext<T>> {
    /// An address space that the kernel itself flushes ([`FlushTlb`](crate::FlushTlb)); `key` is
    /// what its flush needs to find it.
    ///
    /// # Safety
    /// - `key` stands for `space`: a flush of it reaches every CPU that loads the root, however it
    ///   comes to load it;
    /// - there is no second `MmOf` of that root.
    #[must_use]
    pub unsafe fn with_own_flush(space: AddressSpace, key: T) -> Self {
        let (open_everywhere, open_in_tables) = OpenGathers::none();
        Self { space, context: OwnContext::new(key), open_everywhere, open_in_tables }
    }
}

impl<C: TlbContext> MmOf<C> {
    /// The paging structures.
    #[must_use]
    #[inline]
    pub const fn space(&self) -> &AddressSpace {
        &self.space
    }

    /// The TLB context.
    #[must_use]
    #[inline]
    pub const fn context(&self) -> &C {
        &self.context
    }

    /// Gathers begun on this address space and not yet flushed, in any part of it. (One that looks
    /// into two tables may count twice.)
    ///
    /// Whoever finds an entry empty or write-protected under its table lock, while this is not
    /// zero, cannot conclude that no CPU uses the old translation. Linux: mm_tlb_flush_pending.
    #[doc(alias = "mm_tlb_flush_pending")]
    #[must_use]
    #[inline]
    pub fn open_gathers(&self) -> u64 {
        self.gathers().sum()
    }

    /// The counts of gathers that are open.
    #[inline(always)]
    pub(crate) const fn gathers(&self) -> OpenGathers<'_> {
        OpenGathers { everywhere: &self.open_everywhere, stripes: &self.open_in_tables }
    }
}
