//! One address space of a log, and what recorded calls do to it.

use core::cell::{Cell, RefCell};
use core::ops::Range;
use std::sync::Arc;

use mmu_adapter::{HostedKernel, HostedMm};
use mmu_gather::pagetable::VirtRange;
use mmu_hosted::Choices;
use mmu_kernel_shim::{Area, AreaKind, Error, Growth, Kernel, PageContent, Vma, VmaTree};

use crate::input::layout::{PAGE_BYTES, Sharing, USER_END};
use crate::input::strace::{Advice, Backing, MemoryCall, OldRange, Placement};
use crate::run::kernel_terms::protection;
use crate::trace::kernel::TraceKernel;

/// An address space, and what must be known of it that the kernel does not know.
#[derive(Debug)]
pub(crate) struct TraceSpace {
    pub(crate) mm: Arc<HostedMm>,
    /// Threads that run in it.
    pub(crate) users: Cell<u32>,
    known: RefCell<Known>,
}

/// Never borrowed while the kernel is called.
#[derive(Clone, Debug, Default)]
struct Known {
    /// Areas and room for them that no call of the log made: where a call is given the same place,
    /// they were not there.
    assumed: VmaTree,
    /// What a fork leaves out.
    not_inherited: VmaTree,
    /// The break, once a call told it.
    break_end: Option<u64>,
    /// Where programs have been looking lately; parts may be gone.
    warm: Vec<VirtRange>,
}

/// Where a stack ends before exec moves it: below the last page of user space.
const STACK_TOP: u64 = 0x7fff_ffff_f000;
/// Pages of arguments and environment that exec has written by then.
const STACK_PAGES: u64 = 6;
/// How far exec moves a stack at most. The kernel of the recorded machine went up to 16 GiB; the
/// mappings below start lower.
const STACK_SHIFT_PAGES: u64 = 0x4000;
/// Room for a stack to grow into. Linux: the default RLIMIT_STACK.
const STACK_ROOM: u64 = 8 << 20;

/// How many ranges are remembered as warm.
const WARM_RANGES: usize = 48;

impl TraceSpace {
    /// The address space of a program that exec starts: a stack, moved to its place.
    pub(crate) fn new(kernel: &TraceKernel) -> Result<Self, Error> {
        let mm = kernel.hosted.new_mm()?;
        let stack = VirtRange::new(STACK_TOP - STACK_PAGES * PAGE_BYTES, STACK_TOP)
            .map_err(|_| Error::NotUserSpace(STACK_TOP))?;
        let area = Area { growth: Growth::Down, ..Area::anon() };
        kernel.hosted.mmap(&mm, Vma { range: stack, area })?;
        kernel.hosted.populate(&mm, stack, PageContent::Anon)?;
        // Half of the moves are short: the two places overlap, and the tables between must stay.
        let most = if kernel.choices().one_in(2) { STACK_PAGES } else { STACK_SHIFT_PAGES };
        let shift = (1 + kernel.choices().below(most)) * PAGE_BYTES;
        kernel.hosted.move_stack(&mm, stack, shift)?;
        kernel.areas.set(kernel.areas.get() + 1);

        let mut known = Known::default();
        if let Ok(room) = VirtRange::new(stack.end() - shift - STACK_ROOM, stack.end() - shift) {
            let _first = known.assumed.insert(Vma { range: room, area });
        }
        // Below the stack, too: it grows.
        known
            .warm
            .extend(VirtRange::new(stack.start() - shift - STACK_PAGES * PAGE_BYTES, stack.end() - shift));
        Ok(Self { mm, users: Cell::new(1), known: RefCell::new(known) })
    }

    /// A copy for a forked child.
    pub(crate) fn fork(&self, kernel: &TraceKernel) -> Result<Self, Error> {
        let known = self.known.borrow().clone();
        let mm = kernel.hosted.fork(&self.mm, known.not_inherited.iter().map(|vma| vma.range))?;
        kernel.areas.set(kernel.areas.get() + mm.nr_vmas() as u64);
        Ok(Self { mm, users: Cell::new(1), known: RefCell::new(known) })
    }

    /// The program on this CPU uses a page that it may have used before.
    pub(crate) fn touch_warm(&self, kernel: &TraceKernel) -> Result<(), Error> {
        self.warm_page(kernel.choices()).map_or(Ok(()), |page| kernel.touch(&self.mm, page))
    }

    /// A page that a thread may be about to use; now and then it is gone already.
    fn warm_page(&self, choices: &Choices) -> Option<u64> {
        let known = self.known.borrow();
        let range = known.warm.get(choices.pick(known.warm.len()))?;
        // Programs use what is near: most pages that are touched at all are at the start of their
        // area.
        let reach = if choices.one_in(8) { range.nr_pages() } else { range.nr_pages().min(24) };
        Some(range.start() + choices.below(reach) * PAGE_BYTES)
    }

    /// The range whose pages `call` takes away or changes.
    pub(crate) fn range_of(&self, call: &MemoryCall) -> Option<VirtRange> {
        let range = match call {
            MemoryCall::Munmap { range }
            | MemoryCall::Mmap { range, placement: Placement::Replace, .. }
            | MemoryCall::Madvise { range, .. }
            | MemoryCall::Mprotect { range, .. } => range.clone(),
            MemoryCall::Mremap { from, .. } => from.clone(),
            MemoryCall::Brk { end } => page_up(*end)..page_up(self.known.borrow().break_end?),
            _ => return None,
        };
        whole(&range)
    }

    /// Adds the areas that a call shows to have been there before, although no call of the log made
    /// them.
    pub(crate) fn assume_for(&self, kernel: &TraceKernel, call: &MemoryCall) -> Result<(), Error> {
        match call {
            // These fail where nothing is mapped; munmap and MAP_FIXED do not.
            MemoryCall::Madvise { range, .. } | MemoryCall::Mprotect { range, .. } => {
                self.assume(kernel, range)
            }
            MemoryCall::Mremap { from, to, .. } if from.is_empty() => {
                let length = to.end - to.start;
                self.assume(kernel, &(from.start..from.start.saturating_add(length).min(USER_END)))
            }
            MemoryCall::Mremap { from, .. } => self.assume(kernel, from),
            _ => Ok(()),
        }
    }

    /// Makes a call that succeeded according to the log.
    ///
    /// # Errors
    /// What the kernel says if it refuses.
    pub(crate) fn apply(&self, kernel: &TraceKernel, call: &MemoryCall) -> Result<(), Error> {
        match call {
            MemoryCall::Mmap { range, prot, sharing, backing, placement, other_flags } => {
                let Some(range) = whole(range) else { return Ok(()) };
                let grows = other_flags.iter().any(|flag| flag == "MAP_GROWSDOWN");
                let area = Area {
                    kind: self.kind(kernel, range, *sharing, *backing, *placement),
                    protection: protection(*prot),
                    growth: if grows { Growth::Down } else { Growth::Fixed },
                    file_base: match backing {
                        Backing::File { offset } => (offset >> 12).wrapping_sub(range.start() >> 12),
                        Backing::Anonymous => 0,
                    },
                    ..Area::anon()
                };
                if *placement == Placement::Replace {
                    self.munmap(kernel, range)?;
                }
                self.mmap(kernel, range, area)
            }
            MemoryCall::Munmap { range } => whole(range).map_or(Ok(()), |range| self.munmap(kernel, range)),
            MemoryCall::Mremap { from, to, old_range } => self.mremap(kernel, from, to, *old_range),
            MemoryCall::Brk { end } => self.brk(kernel, *end),
            MemoryCall::Madvise { range, advice } => {
                whole(range).map_or(Ok(()), |range| self.madvise(kernel, range, advice))
            }
            MemoryCall::Mprotect { range, prot } => whole(range)
                .map_or(Ok(()), |range| kernel.hosted.mprotect(&self.mm, range, protection(*prot))),
            MemoryCall::Clone { .. }
            | MemoryCall::Appears
            | MemoryCall::Exec
            | MemoryCall::Exit
            | MemoryCall::ExitGroup => Ok(()),
        }
    }

    /// Maps an area where the log says that nothing was.
    fn mmap(&self, kernel: &TraceKernel, range: VirtRange, area: Area) -> Result<(), Error> {
        self.make_room(kernel, range)?;
        kernel.hosted.mmap(&self.mm, Vma { range, area })?;
        kernel.areas.set(kernel.areas.get() + 1);
        self.warm_up(kernel, range);
        Ok(())
    }

    fn munmap(&self, kernel: &TraceKernel, range: VirtRange) -> Result<(), Error> {
        let mut known = self.known.borrow_mut();
        known.assumed.detach(range);
        known.not_inherited.detach(range);
        drop(known);
        kernel.timed(|| kernel.hosted.munmap(&self.mm, range))
    }

    fn mremap(
        &self,
        kernel: &TraceKernel,
        from: &Range<u64>,
        to: &Range<u64>,
        old_range: OldRange,
    ) -> Result<(), Error> {
        let Some(to) = whole(to) else { return Ok(()) };
        let Some(from) = whole(from) else { return self.map_again(kernel, from.start, to) };
        if from.start() == to.start() {
            return match (VirtRange::new(from.end(), to.end()), VirtRange::new(to.end(), from.end())) {
                (Ok(more), _) => {
                    self.make_room(kernel, more)?;
                    self.warm_up(kernel, more);
                    kernel.hosted.resize(&self.mm, more.start(), more.end())
                }
                (_, Ok(less)) => self.munmap(kernel, less),
                _ => Ok(()),
            };
        }
        if to.intersect(from).is_none() {
            self.make_room(kernel, to)?;
        }
        // The recorded kernel had merged neighbours into one area; this one keeps them apart.
        let areas = self.mm.vmas();
        for vma in areas.iter() {
            let Some(part) = vma.range.intersect(from) else { continue };
            let start = to.start() + (part.start() - from.start());
            let end =
                if part.end() == from.end() { to.end() } else { (start + part.len_bytes()).min(to.end()) };
            kernel.timed(|| match VirtRange::new(start, end) {
                Ok(place) => kernel.hosted.mremap(&self.mm, part, place),
                // It shrank by more than this part.
                Err(_) => kernel.hosted.munmap(&self.mm, part),
            })?;
            if old_range == OldRange::KeptEmpty {
                kernel.hosted.mmap(&self.mm, Vma { range: part, area: vma.area })?;
            }
        }
        self.warm_up(kernel, to);
        Ok(())
    }

    /// Maps the shared area at `start` a second time: mremap(2) with an old length of 0.
    fn map_again(&self, kernel: &TraceKernel, start: u64, to: VirtRange) -> Result<(), Error> {
        let vma = self.mm.vmas().find(start).copied().ok_or(Error::NoArea(start))?;
        let shift = (start >> 12).wrapping_sub(to.start() >> 12);
        let area = Area { file_base: vma.area.file_base.wrapping_add(shift), ..vma.area };
        self.munmap(kernel, to)?;
        self.mmap(kernel, to, area)
    }

    fn brk(&self, kernel: &TraceKernel, end: u64) -> Result<(), Error> {
        let before = self.known.borrow_mut().break_end.replace(end);
        // The first call of a program asks where its heap starts.
        let Some(before) = before else { return Ok(()) };
        if let Some(less) = whole(&(page_up(end)..page_up(before))) {
            return self.munmap(kernel, less);
        }
        let Some(more) = whole(&(page_up(before)..page_up(end))) else { return Ok(()) };
        let below = self.mm.vmas().find(more.start() - PAGE_BYTES).copied();
        if below.is_none_or(|vma| vma.area != Area::anon() || vma.range.end() != more.start()) {
            return self.mmap(kernel, more, Area::anon());
        }
        self.make_room(kernel, more)?;
        self.warm_up(kernel, more);
        kernel.hosted.resize(&self.mm, more.start(), more.end())
    }

    fn madvise(&self, kernel: &TraceKernel, range: VirtRange, advice: &Advice) -> Result<(), Error> {
        match advice {
            Advice::DontNeed | Advice::Free | Advice::Remove => {
                return kernel.timed(|| kernel.hosted.madvise_dontneed(&self.mm, range));
            }
            Advice::GuardInstall => return self.in_private_areas(kernel, range, Kernel::guard_install),
            Advice::GuardRemove => return self.in_private_areas(kernel, range, Kernel::guard_remove),
            Advice::DontFork => {
                let mut known = self.known.borrow_mut();
                known.not_inherited.detach(range);
                let _free = known.not_inherited.insert(Vma { range, area: Area::anon() });
            }
            Advice::DoFork => {
                self.known.borrow_mut().not_inherited.detach(range);
            }
            // The thread touches them before and after, as it does with every range.
            Advice::PopulateRead | Advice::PopulateWrite => self.warm_up(kernel, range),
            Advice::PageOut | Advice::HugePage | Advice::NoHugePage | Advice::Other(_) => {
                kernel.ignored_advice.set(kernel.ignored_advice.get() + 1);
            }
        }
        Ok(())
    }

    /// Guards are kept in private areas only; Linux has them in shared ones too, since 6.15.
    fn in_private_areas(
        &self,
        kernel: &TraceKernel,
        range: VirtRange,
        call: fn(&HostedKernel, &HostedMm, VirtRange) -> Result<(), Error>,
    ) -> Result<(), Error> {
        for vma in self.mm.vmas().iter() {
            let Some(part) = vma.range.intersect(range) else { continue };
            match vma.area.kind {
                AreaKind::Anon | AreaKind::FilePrivate(_) => {
                    kernel.timed(|| call(&kernel.hosted, &self.mm, part))?
                }
                AreaKind::FileShared(_) | AreaKind::Pfn => {
                    kernel.ignored_advice.set(kernel.ignored_advice.get() + 1)
                }
            }
        }
        Ok(())
    }

    /// Adds areas wherever nothing is mapped in `range`.
    fn assume(&self, kernel: &TraceKernel, range: &Range<u64>) -> Result<(), Error> {
        let areas = self.mm.vmas();
        let mut address = range.start;
        while address < range.end {
            let next = areas.find_from(address).map(|vma| vma.range);
            if let Some(here) = next.filter(|next| next.contains(address)) {
                address = here.end();
                continue;
            }
            let end = next.map_or(range.end, |next| next.start().min(range.end));
            let Some(gap) = whole(&(address..end)) else { return Ok(()) };
            let area = Area { kind: AreaKind::FilePrivate(kernel.new_file()), ..Area::anon() };
            self.mmap(kernel, gap, area)?;
            kernel.assumed_areas.set(kernel.assumed_areas.get() + 1);
            let _free = self.known.borrow_mut().assumed.insert(Vma { range: gap, area });
            address = end;
        }
        Ok(())
    }

    /// Something else lies in `range` according to the log: what was only assumed to be there goes,
    /// and so does what the log mapped there, of which it has lost the munmap.
    fn make_room(&self, kernel: &TraceKernel, range: VirtRange) -> Result<(), Error> {
        let wrong = self.known.borrow_mut().assumed.detach(range);
        wrong.iter().try_for_each(|vma| kernel.hosted.munmap(&self.mm, vma.range))?;
        let left = self.mm.vmas().find_from(range.start()).is_some_and(|vma| vma.range.start() < range.end());
        if left {
            kernel.replaced_areas.set(kernel.replaced_areas.get() + 1);
            self.munmap(kernel, range)?;
        }
        Ok(())
    }

    fn kind(
        &self,
        kernel: &TraceKernel,
        range: VirtRange,
        sharing: Sharing,
        backing: Backing,
        placement: Placement,
    ) -> AreaKind {
        // A loader maps a file whole, then its segments over it.
        let over = match placement {
            Placement::Replace => self.mm.vmas().find(range.start()).map(|vma| vma.area.kind),
            Placement::Free => None,
        };
        match (backing, sharing, over) {
            (Backing::Anonymous, Sharing::Private, _) => AreaKind::Anon,
            (Backing::File { .. }, Sharing::Private, Some(AreaKind::FilePrivate(file))) => {
                AreaKind::FilePrivate(file)
            }
            (Backing::File { .. }, Sharing::Private, _) => AreaKind::FilePrivate(kernel.new_file()),
            (_, Sharing::Shared, _) => AreaKind::FileShared(kernel.new_file()),
        }
    }

    /// Programs will look at `range`.
    fn warm_up(&self, kernel: &TraceKernel, range: VirtRange) {
        let mut known = self.known.borrow_mut();
        if known.warm.len() < WARM_RANGES {
            known.warm.push(range);
        } else {
            let place = kernel.choices().pick(WARM_RANGES);
            known.warm[place] = range;
        }
    }
}

const fn page_up(address: u64) -> u64 {
    // Below 2^47, as all addresses of a log.
    address.next_multiple_of(PAGE_BYTES)
}

/// A range with something in it.
fn whole(range: &Range<u64>) -> Option<VirtRange> {
    VirtRange::new(range.start, range.end).ok()
}
