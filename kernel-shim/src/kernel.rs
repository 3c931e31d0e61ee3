//! The kernel: its CPUs, and the calls that take address spaces down.
#![expect(unsafe_code, reason = "the engine takes the map lock and the CPU on trust")]

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use core::fmt;
use core::pin::Pin;
use core::sync::atomic::AtomicI64;

use crossbeam_utils::CachePadded;
use mmu_gather::pagetable::{TableMemory, VirtRange};
use mmu_gather::tlb::{
    CpuId, CpuTlb, CtxIds, Laziness, enter_lazy_tlb, flush_interrupt, init_cpu, offline_cpu, switch_mm,
};
use mmu_gather::{
    CutLeaf, FlushedGather, Limits, MmuGather, Platform, exit_mmap, shift_arg_pages, unmap_region,
};
use spin::mutex::SpinMutex;
use x86_64::structures::paging::PhysFrame;

use crate::counters::Counters;
use crate::embed::Embedder;
use crate::frame::{FrameKind, Frames};
use crate::locks::map_lock::MapRead;
use crate::machine::{Contents, FrameRole, Machine, Note, UnderMapLock};
use crate::mm::Mm;
use crate::supply::{Pressure, Site, Supply};
use crate::swap::Swap;
use crate::vma::{Area, AreaKind, Protection, Vma, VmaTree};

/// The kernel.
///
/// What every flush reads (the configuration, the CPUs) shares no cache line with what calls write.
pub struct Kernel<M: Machine> {
    pub(crate) embedder: Embedder<M>,
    active: Box<[Active<M>]>,
    pub(crate) config: Config,
    /// Pages of files: the cache holds one reference on each.
    pub(crate) page_cache: CachePadded<SpinMutex<PageCache, M::Relax>>,
    /// The 2 MiB page of zeroes, once it was needed.
    pub(crate) zero_block: CachePadded<SpinMutex<Option<PhysFrame>, M::Relax>>,
    /// What areas of device frames map, once one was needed.
    pub(crate) device_frame: CachePadded<SpinMutex<Option<PhysFrame>, M::Relax>>,
    ids: CachePadded<CtxIds>,
    pub(crate) batch_supply: Pressure,
    pub(crate) table_supply: Pressure,
    pub(crate) frame_supply: Pressure,
}

/// Frames by file and page.
type PageCache = BTreeMap<(u32, u64), PhysFrame>;

/// Keeps the address space alive that a CPU may have loaded, lazily perhaps. Linux: active_mm,
/// mm_count.
type Active<M> = CachePadded<SpinMutex<Option<Arc<Mm<M>>>, <M as Machine>::Relax>>;

/// How this kernel is to behave.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Capacities of every gather.
    pub limits: Limits,
    /// Whether gathers get batch pages, to begin with.
    pub batches: Supply,
    /// More pages than this are not invalidated one by one.
    pub flush_ceiling: u64,
    /// How pages are discarded.
    pub discarding: Discarding,
    /// What it does wrong, on purpose.
    pub misbehaviour: Misbehaviour,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            limits: Limits::DEFAULT,
            batches: Supply::Always,
            flush_ceiling: mmu_gather::tlb::SINGLE_PAGE_FLUSH_CEILING,
            discarding: Discarding::AtOnce,
            misbehaviour: Misbehaviour::Absent,
        }
    }
}

/// The longest stack that exec moves, page by page under one lock: 256 MiB. Linux: RLIMIT_STACK.
const MOST_STACK_PAGES: u64 = 1 << 16;

/// How pages are discarded while programs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discarding {
    /// Entries are cleared, and then flushed for.
    AtOnce,
    /// Where it is more than one page, and not more than 2048, the right to write is taken away
    /// from all of them first, in the same gather, and under the map lock held for reading. What
    /// another CPU still writes through what it has cached, and another call clears meanwhile, must
    /// not be lost.
    ///
    /// Linux: what a write-protecting userfaultfd and MADV_DONTNEED do to one range, each with the
    /// map lock held for reading (mwriteprotect_range, mm/userfaultfd.c).
    WriteProtectedFirst,
}

/// What the kernel does wrong, on purpose, so that a checker can be seen to notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Misbehaviour {
    /// Nothing.
    Absent,
    /// It frees pages when their entries are cleared, before any flush.
    FreeBeforeFlush,
}

/// Why a call was refused. Nothing was changed, where the call does not say otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// No memory for a table, a page or a split.
    NoMemory,
    /// Nothing is mapped at this address.
    NoArea(u64),
    /// Something is mapped there already.
    Overlap(VirtRange),
    /// Outside user space.
    NotUserSpace(u64),
    /// What is mapped at this address is not the program's own.
    NotPrivate(u64),
    /// A CPU still runs programs in the address space.
    Busy(CpuId),
    /// A large page reaches beyond what was to be unmapped, and is still mapped.
    CutLeaf(VirtRange),
}

impl From<CutLeaf> for Error {
    fn from(cut: CutLeaf) -> Self {
        Self::CutLeaf(cut.range())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NoMemory => f.write_str("out of memory"),
            Self::NoArea(address) => write!(f, "nothing is mapped at {address:#x}"),
            Self::Overlap(range) => write!(f, "{range} overlaps an area"),
            Self::NotUserSpace(address) => write!(f, "{address:#x} is outside user space"),
            Self::NotPrivate(address) => write!(f, "{address:#x} is not in a private area"),
            Self::Busy(cpu) => write!(f, "{cpu} still runs programs there"),
            Self::CutLeaf(range) => write!(f, "the large page at {range} was not split"),
        }
    }
}

impl core::error::Error for Error {}

impl<M: Machine> Kernel<M> {
    /// Boots on `machine`: every CPU starts on the kernel's own address space.
    ///
    /// # Errors
    /// [`Error::NoMemory`] if the machine has no frame for the root table.
    ///
    /// [`start_cpu`](Self::start_cpu) is then called on each CPU, before it does anything else.
    pub fn boot(machine: M, config: Config) -> Result<Self, Error> {
        let nr_cpus = machine.nr_cpus();
        let embedder = Embedder {
            frames: Frames::new(machine.nr_frames(), machine.nr_reserved_frames()),
            cpus: (0..nr_cpus).map(|_| CpuTlb::new()).collect(),
            machine,
            init_root: PhysFrame::containing_address(x86_64::PhysAddr::zero()),
            flush_ceiling: config.flush_ceiling,
            counters: Counters::new(nr_cpus),
            swap: CachePadded::new(Swap::new()),
            guards: CachePadded::new(AtomicI64::new(0)),
        };
        let mut kernel = Self {
            embedder,
            active: (0..nr_cpus).map(|_| CachePadded::new(SpinMutex::new(None))).collect(),
            config,
            page_cache: CachePadded::new(SpinMutex::new(BTreeMap::new())),
            zero_block: CachePadded::new(SpinMutex::new(None)),
            device_frame: CachePadded::new(SpinMutex::new(None)),
            ids: CachePadded::new(CtxIds::new()),
            batch_supply: Pressure::new(config.batches),
            table_supply: Pressure::new(Supply::Always),
            frame_supply: Pressure::new(Supply::Always),
        };
        kernel.embedder.init_root = kernel.allocate_table().ok_or(Error::NoMemory)?;
        kernel.machine.prepare_root(kernel.init_root);
        Ok(kernel)
    }

    /// Starts the CPU it runs on: drops all it may have cached and loads the kernel's own address
    /// space.
    pub fn start_cpu(&self) {
        self.machine.pinned(|cpu| {
            // SAFETY: pinned, interrupts off; it has loaded nothing since it was switched on.
            self.machine.without_interrupts(|| unsafe { init_cpu(self, cpu) });
        });
    }

    /// Takes the CPU it runs on out of service, until [`start_cpu`](Self::start_cpu) runs there.
    pub fn stop_cpu(&self) {
        let left = self.machine.pinned(|cpu| {
            // SAFETY: pinned, interrupts off; nothing of the kernel runs here until `start_cpu`.
            self.machine.without_interrupts(|| unsafe { offline_cpu(self, cpu) });
            self.active[cpu.index()].lock().take()
        });
        drop(left);
    }

    /// Flushes what other CPUs have asked of this one: the handler of the flush interrupt, and what
    /// a CPU does that spins with interrupts off.
    pub fn flush_interrupt(&self) {
        self.machine.without_interrupts(|| {
            // SAFETY: pinned, interrupts off.
            self.machine.pinned(|cpu| unsafe { flush_interrupt(self, cpu) });
        });
    }

    /// The machine.
    pub const fn machine(&self) -> &M {
        &self.embedder.machine
    }

    /// The frames.
    pub const fn frames(&self) -> &Frames<M::Relax> {
        &self.embedder.frames
    }

    /// What happened so far.
    pub const fn counters(&self) -> &Counters {
        &self.embedder.counters
    }

    /// How it was told to behave.
    pub const fn config(&self) -> &Config {
        &self.config
    }

    /// Places in swap that entries name now.
    pub fn swap_slots(&self) -> i64 {
        self.swap.nr_entries()
    }

    /// A new address space without areas.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub fn new_mm(&self) -> Result<Arc<Mm<M>>, Error> {
        let root = self.take_table(Site::Root).ok_or(Error::NoMemory)?;
        self.machine.prepare_root(root);
        // SAFETY: a fresh table whose lower half is zero; it is freed in `exit` only, when every
        // CPU has left it.
        let engine = unsafe { mmu_gather::Mm::new(&self.ids, root, self.machine.paging_mode()) };
        Ok(Arc::new(Mm::new(engine)))
    }

    /// Adds an area.
    ///
    /// # Errors
    /// [`Error::Overlap`], [`Error::NotUserSpace`].
    pub fn mmap(&self, mm: &Mm<M>, vma: Vma) -> Result<(), Error> {
        if !mm.engine.space().user_range().covers(vma.range) {
            return Err(Error::NotUserSpace(vma.range.end()));
        }
        let mut vmas = mm.write(&self.machine, UnderMapLock::WaitsForNobody);
        vmas.insert(vma).map_err(|vma| Error::Overlap(vma.range))?;
        self.note_shown(mm, vma);
        Ok(())
    }

    /// Takes down whatever lies in `range`. Nothing mapped there is no error.
    ///
    /// The areas are detached under the map lock held for writing; the long part runs with it held
    /// for reading, and the pages are freed with no lock at all.
    ///
    /// # Errors
    /// [`Error::NoMemory`] if a large page at one end cannot be split; nothing was unmapped then.
    pub fn munmap(&self, mm: &Mm<M>, range: VirtRange) -> Result<(), Error> {
        let mut vmas = mm.write(&self.machine, UnderMapLock::Flushes);
        self.split_ends(mm, &vmas, range)?;
        let detached = vmas.detach(range);
        if detached.is_empty() {
            return Ok(());
        }
        let bounds = vmas.bounds_around(range);
        let vmas = vmas.downgrade(UnderMapLock::FreesEarly);
        let limits = &self.config.limits;
        let going = detached.iter().map(Vma::going_away);
        self.machine.note(Note::Areas(detached.len()));
        // SAFETY: the map lock is held, for reading, until the flush is done. The areas are
        // detached: no fault finds them, and neighbours grow only under the lock held for writing.
        let flushed = unsafe {
            unmap_region(self, &mm.engine, limits, going, bounds, || self.note_unlinked(mm, &detached))
        }?;
        self.note_unmapped(mm, range);
        drop(vmas);
        flushed.free();
        Ok(())
    }

    /// Drops the pages in `range` and keeps the areas: madvise(MADV_DONTNEED). Several of these may
    /// run at once.
    ///
    /// # Errors
    /// [`Error::NoMemory`] if a large page at one end cannot be split; nothing was dropped then.
    pub fn madvise_dontneed(&self, mm: &Mm<M>, range: VirtRange) -> Result<(), Error> {
        let vmas = self.lock_with_whole_ends(mm, range, UnderMapLock::Frees)?;
        for vma in vmas.iter() {
            let Some(part) = vma.range.intersect(range) else { continue };
            let since = self.machine.moment();
            self.note_contents(Contents::Discarding { root: mm.root(), range: part, began: since });
            let flushed = self.zap_discarded(mm, vma, part)?;
            let caller = self.laziness_here();
            self.machine.note(Note::Discarded { root: mm.root(), range: part, since, caller });
            self.note_contents(Contents::Discarded { root: mm.root(), range: part, began: since });
            flushed.free();
        }
        Ok(())
    }

    /// Takes the whole address space down: the last program has left it.
    ///
    /// This CPU and others may still have it loaded lazily.
    ///
    /// # Errors
    /// [`Error::Busy`] if a CPU still has it loaded and is not lazy.
    pub fn exit(&self, mm: &Mm<M>) -> Result<(), Error> {
        let context = mm.engine.context();
        for (number, cpu) in (0u32..).zip(&*self.cpus) {
            if cpu.has_loaded(context) && cpu.laziness() == Laziness::Active {
                return Err(Error::Busy(CpuId::new(number)));
            }
        }
        let mut vmas = mm.write(&self.machine, UnderMapLock::FreesEarly);
        let all = mm.engine.space().user_range();
        let detached = vmas.detach(all);
        self.machine.note(Note::Areas(detached.len()));
        let going = detached.iter().map(Vma::going_away);
        // SAFETY: the map lock is held for writing; no program runs here and none can come back.
        let flushed = unsafe { exit_mmap(self, &mm.engine, &self.config.limits, going, || {}) };
        self.note_unmapped(mm, all);
        drop(vmas);
        flushed.free();
        // SAFETY: every CPU has left the address space, `exit_mmap` says so, and nobody else frees
        // its root.
        unsafe { self.free_tables(&[mm.root()]) };
        Ok(())
    }

    /// Moves the stack of a new program down by `shift` bytes; exec does. Linux moves nothing but
    /// stacks; here any area will do, and shows the same part of its file afterwards.
    ///
    /// # Errors
    /// [`Error::NoArea`] if no area starts at `stack`; [`Error::NoMemory`], [`Error::Overlap`]
    /// otherwise.
    pub fn move_stack(&self, mm: &Mm<M>, stack: VirtRange, shift: u64) -> Result<(), Error> {
        let Some(new) = stack
            .start()
            .checked_sub(shift)
            .and_then(|start| VirtRange::new(start, stack.end() - shift).ok())
        else {
            return Err(Error::NotUserSpace(stack.start()));
        };
        let mut vmas = mm.write(&self.machine, UnderMapLock::FreesEarly);
        let Some(vma) = vmas.find(stack.start()).copied().filter(|vma| vma.range == stack) else {
            return Err(Error::NoArea(stack.start()));
        };
        if stack.nr_pages() > MOST_STACK_PAGES {
            return Err(Error::NoMemory);
        }
        // SAFETY: the map lock is held for writing; the gather is finished at once.
        self.split_all(&mut unsafe { MmuGather::new(self, &mm.engine) }, &vma, stack)?;
        vmas.detach(stack);
        // The stack slides through everything between the two places: nothing else may be there (in
        // exec nothing is).
        let path = VirtRange::new(new.start(), stack.end()).unwrap_or(new);
        if vmas.overlaps(path) {
            let _ = vmas.insert(vma);
            return Err(Error::Overlap(path));
        }
        // The pages move along, and with them the part of the file that they show.
        let area = Area { file_base: vma.area.file_base.wrapping_add(shift >> 12), ..vma.area };
        if let Err(moved) = vmas.insert(Vma { range: new, area }) {
            // The place was the stack's own a moment ago.
            let _ = vmas.insert(vma);
            return Err(Error::Overlap(moved.range));
        }
        let next = vmas.find_from(stack.end()).map(|vma| vma.range.start());
        let (root, to) = (mm.root(), new.start());
        self.note_contents(Contents::Moving { root, from: stack, to });
        // SAFETY: the map lock is held for writing.
        let result = unsafe { shift_arg_pages(self, &mm.engine, &self.config.limits, stack, shift, next) };
        self.note_contents(Contents::Moved { root, from: stack, to });
        match result {
            Ok(flushed) => {
                if let Ok(given_up) = VirtRange::new(stack.start().max(new.end()), stack.end()) {
                    self.note_unmapped(mm, given_up);
                }
                drop(vmas);
                flushed.free();
                Ok(())
            }
            Err(_) => {
                self.note_moved(mm, new, stack.start());
                vmas.detach(new);
                let _ = vmas.insert(vma);
                let unused = VirtRange::new(new.start(), new.end().min(stack.start()));
                let flushed = unused.map(|unused| self.drop_empty_tables(mm, &vmas, unused));
                drop(vmas);
                drop(flushed);
                Err(Error::NoMemory)
            }
        }
    }

    /// Runs programs of `mm` (`None`: the kernel's own address space) on this CPU from now on.
    pub fn switch_to(&self, mm: Option<&Arc<Mm<M>>>) {
        let left = self.machine.pinned(|cpu| {
            let active = &self.active[cpu.index()];
            self.machine.without_interrupts(|| {
                // SAFETY: an `Mm` is made in its `Arc` and never moved out: a CPU that has it
                // loaded keeps a clone.
                let next = mm.map(|mm| unsafe { Pin::new_unchecked(&mm.engine) }.pinned_context());
                self.machine.note(Note::Runs(Laziness::Lazy));
                // SAFETY: pinned, interrupts off; `active` keeps the address space until this CPU
                // has switched away, and its root is freed by `exit` only, which makes every CPU
                // leave first. This kernel has one source of names.
                unsafe { switch_mm(self, cpu, next) };
                self.machine.note(Note::Runs(Laziness::Active));
                core::mem::replace(&mut *active.lock(), mm.cloned())
            })
        });
        // The CPU that leaves last drops the structure, here, with interrupts on.
        drop(left);
    }

    /// Runs only kernel threads on this CPU from now on; the address space stays in CR3.
    pub fn go_lazy(&self) {
        self.machine.pinned(|cpu| {
            self.machine.note(Note::Runs(Laziness::Lazy));
            // SAFETY: pinned; the caller uses no user address before `switch_to`.
            self.machine.without_interrupts(|| unsafe { enter_lazy_tlb(self, cpu) });
        });
    }

    /// Gives up the page cache, the large page of zeroes and the frame of the device: what is left
    /// afterwards was lost.
    pub fn drop_caches(&self) {
        let cached = core::mem::take(&mut *self.page_cache.lock());
        self.drop_references_in_chunks(cached.into_values());
        if let Some(block) = self.zero_block.lock().take() {
            self.machine.note(Note::Freed(block, FrameRole::Block));
            self.frames.free_block(block);
        }
        if let Some(frame) = self.device_frame.lock().take() {
            self.give_back(frame, FrameKind::Reserved);
        }
    }

    /// Drops one reference on each page, a chunk at a time.
    pub(crate) fn drop_references_in_chunks(&self, frames: impl IntoIterator<Item = PhysFrame>) {
        let chunk = usize::from(self.config.limits.free_chunk.max(1));
        for (number, frame) in (1..).zip(frames) {
            self.drop_references([frame]);
            if usize::is_multiple_of(number, chunk) {
                self.machine.cond_resched();
            }
        }
    }

    /// Frames that are not free although nothing is mapped any more, and tables among them. The
    /// kernel's root is neither.
    pub fn lost(&self) -> (u64, u64) {
        let tables = self.frames.count(FrameKind::Table).saturating_sub(1);
        let pages = [FrameKind::Page, FrameKind::Block, FrameKind::Tail, FrameKind::Batch];
        (pages.into_iter().map(|kind| self.frames.count(kind)).sum(), tables)
    }

    /// The areas can no longer be found, so the owner of the device frames that they mapped may use
    /// those again.
    fn note_unlinked(&self, mm: &Mm<M>, areas: &[Vma]) {
        for vma in areas.iter().filter(|vma| vma.area.kind == AreaKind::Pfn) {
            self.note_unmapped(mm, vma.range);
        }
    }

    /// Takes the map lock for reading, and sees to it that no end of `range` lies inside a large
    /// page. The call then does no more than `most`.
    pub(crate) fn lock_with_whole_ends<'m>(
        &'m self,
        mm: &'m Mm<M>,
        range: VirtRange,
        most: UnderMapLock,
    ) -> Result<MapRead<'m, M>, Error> {
        let vmas = mm.read(&self.machine, most);
        if !self.ends_cut_a_large_page(mm, &vmas, range) {
            return Ok(vmas);
        }
        drop(vmas);
        // Large pages come and go under the lock held for writing only.
        let vmas = mm.write(&self.machine, UnderMapLock::Flushes);
        self.split_ends(mm, &vmas, range)?;
        Ok(vmas.downgrade(most))
    }

    /// Whether an end of `range` lies inside a large page. The map lock is held, for reading at
    /// least.
    fn ends_cut_a_large_page(&self, mm: &Mm<M>, vmas: &VmaTree, range: VirtRange) -> bool {
        let ends = [range.start(), range.end()].into_iter().filter(|end| vmas.find(*end).is_some());
        ends.into_iter().any(|end| {
            // SAFETY: the map lock is held, and `end` lies in an area: its tables stay.
            let found = unsafe { mm.engine.space().lookup(self, end) };
            !found.value.is_empty() && end & (found.level.entry_span() - 1) != 0
        })
    }

    /// Splits the large pages that the ends of `range` cut. The map lock is held for writing.
    pub(crate) fn split_ends(&self, mm: &Mm<M>, vmas: &VmaTree, range: VirtRange) -> Result<(), Error> {
        for end in [range.start(), range.end()] {
            let Some(vma) = vmas.find(end) else { continue };
            // SAFETY: the map lock is held for writing.
            let mut gather = unsafe { MmuGather::new(self, &mm.engine) };
            // SAFETY: as above.
            unsafe { gather.split_leaf(vma.going_away().area, end) }.map_err(|_| Error::NoMemory)?;
        }
        Ok(())
    }

    /// Splits every large page in `range`, which lies in one area: single pages can be moved. The
    /// map lock is held for writing.
    pub(crate) fn split_all(
        &self,
        gather: &mut MmuGather<'_, '_, Self>,
        vma: &Vma,
        range: VirtRange,
    ) -> Result<(), Error> {
        let mut rest = range;
        while let Some(address) = gather.find_large_leaf(rest) {
            // An address in the same leaf that is not its first: cutting there splits it.
            // SAFETY: the map lock is held for writing.
            unsafe { gather.split_leaf(vma.going_away().area, address | 4096) }
                .map_err(|_| Error::NoMemory)?;
            self.machine.cond_resched();
            let Ok(from_here) = VirtRange::new(address, rest.end()) else { break };
            rest = from_here;
        }
        Ok(())
    }

    /// Unhooks tables that were linked in `range`, where no area is, for something that then could
    /// not be done. The map lock is held for writing; what comes back is dropped after it.
    pub(crate) fn drop_empty_tables(
        &self,
        mm: &Mm<M>,
        vmas: &VmaTree,
        range: VirtRange,
    ) -> Option<FlushedGather<'_, Self>> {
        let nothing = Vma { range, area: Area::anon() };
        let bounds = vmas.bounds_around(range);
        // SAFETY: the map lock is held for writing, and no area is in the range: nobody faults
        // there.
        let flushed = unsafe {
            unmap_region(self, &mm.engine, &self.config.limits, [nothing.going_away()], bounds, || {})
        };
        // Where no area is, no leaf is cut.
        flushed.ok()
    }

    /// Says that an unmapping is about to return.
    pub(crate) fn note_unmapped(&self, mm: &Mm<M>, range: VirtRange) {
        let caller = self.laziness_here();
        self.machine.note(Note::Unmapped { root: mm.root(), range, caller });
        self.note_contents(Contents::Gone { root: mm.root(), range });
    }

    /// Says that programs may do no more than `most` in `range` any longer. The map lock is held
    /// for writing.
    pub(crate) fn note_protected(&self, mm: &Mm<M>, range: VirtRange, most: Protection) {
        let caller = self.laziness_here();
        self.machine.note(Note::Protected { root: mm.root(), range, most, caller });
    }

    pub(crate) fn laziness_here(&self) -> Laziness {
        self.machine.pinned(|cpu| self.cpus[cpu.index()].laziness())
    }

    /// This kernel is all that the engine asks for.
    const fn _is_a_platform(&self) -> &impl Platform {
        self
    }
}

impl<M: Machine> fmt::Debug for Kernel<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernel")
            .field("config", &self.config)
            .field("nr_free", &self.frames.nr_free())
            .field("cpus", &self.cpus)
            .finish_non_exhaustive()
    }
}
