//! What is around the glue: pages with contents, faults, programs on four CPUs, and the model.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use libkernel::memory::address::VA;
use libkernel::memory::address_space::UserAddressSpace;
use libkernel::memory::page::PageFrame;
use libkernel::memory::paging::permissions::PtePermissions;
use libkernel::memory::proc_vm::memory_map::{AddressRequest, RemapDestination};
use libkernel::memory::proc_vm::vmarea::{VMAPermissions, VMAreaKind};
use libkernel::memory::region::VirtMemoryRegion;
use mmu_gather::pagetable::VirtRange;
use mmu_tests::{Access, CPU, GIB, MIB, PaperKernel, range};
use x86_64::PhysAddr;
use x86_64::structures::paging::PhysFrame;

use crate::glue::{Process, boot};

pub(crate) const PAGE: u64 = 4096;
/// Pages around the border of two top-level entries, and pages around the next border of 2 MiB.
pub(crate) const PLACES: u64 = 64 + 32;
pub(crate) const BORDER: u64 = 512 * GIB;
/// A kernel on paper has room for as many address spaces.
const PROCESSES: usize = 16;

/// The address of a place. Places ascend, with one gap between 63 and 64.
pub(crate) const fn address(place: u64) -> u64 {
    if place < 64 {
        BORDER - 32 * PAGE + place * PAGE
    } else {
        BORDER + 2 * MIB - 16 * PAGE + (place - 64) * PAGE
    }
}

/// Whether an area may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rights {
    ReadOnly,
    ReadWrite,
}

impl From<Rights> for VMAPermissions {
    fn from(rights: Rights) -> Self {
        match rights {
            Rights::ReadOnly => Self::ro(),
            Rights::ReadWrite => Self::rw(),
        }
    }
}

/// Where an area is moved to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum To {
    Anywhere,
    Place(u64),
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Op {
    Mmap { from: u64, len: u64, rights: Rights },
    Munmap { from: u64, len: u64 },
    Mprotect { from: u64, len: u64, rights: Rights },
    Mremap { from: u64, len: u64, new_len: u64, to: To },
    Fork,
    Exit,
    Read { cpu: usize, place: u64 },
    Write { cpu: usize, place: u64, word: u64 },
}

/// A page of a process, as its programs see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    word: u64,
    rights: Rights,
}

/// All that the model knows of a process.
type Model = BTreeMap<u64, Seen>;

/// What a program gets instead of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segv;

/// How often the sequences came to something.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Reached {
    pub(crate) protected: usize,
    pub(crate) resized: usize,
    pub(crate) moved: usize,
    pub(crate) forked: usize,
    pub(crate) copied: usize,
    pub(crate) reused: usize,
}

pub(crate) struct World {
    pub(crate) kernel: Rc<PaperKernel>,
    processes: Vec<(Process, Model)>,
    nr_ever: usize,
    /// One word for each page: the memory.
    words: BTreeMap<PhysFrame, u64>,
    pub(crate) reached: Reached,
}

#[expect(clippy::cast_possible_truncation, reason = "x86_64 has 64-bit addresses")]
pub(crate) const fn va(address: u64) -> VA {
    VA::from_value(address as usize)
}

pub(crate) const fn region(range: VirtRange) -> VirtMemoryRegion {
    VirtMemoryRegion::from_start_end_address(va(range.start()), va(range.end()))
}

pub(crate) fn frame_of(page: PageFrame) -> PhysFrame {
    PhysFrame::containing_address(PhysAddr::new((page.value() as u64) << 12))
}

impl World {
    pub(crate) fn new(kernel: PaperKernel) -> Self {
        let kernel = Rc::new(kernel);
        boot(&kernel);
        let first = (Process::new().expect("room"), Model::new());
        Self {
            kernel,
            processes: vec![first],
            nr_ever: 1,
            words: BTreeMap::new(),
            reached: Reached::default(),
        }
    }

    /// Takes `op` in process `which` of those there are.
    pub(crate) fn take(&mut self, which: usize, op: Op) {
        let which = which % self.processes.len();
        let (process, model) = &mut self.processes[which];
        match op {
            Op::Mmap { from, len, rights } => {
                let part = places(from, len, if from < 64 { 64 } else { PLACES });
                let at = AddressRequest::Fixed { address: va(part.start()), permit_overlap: true };
                let len = region(part).size();
                let kind = VMAreaKind::Anon;
                let mapped = process.map.write().mmap_replacing(at, len, rights.into(), kind, String::new());
                let (at, freed) = mapped.expect("the place is taken");
                assert_eq!((at.value() as u64, freed.len()), (part.start(), 0));
                model.extend(pages(part).map(|page| (page, Seen { word: 0, rights })));
            }
            Op::Munmap { from, len } => {
                let part = places(from, len, PLACES);
                process.map.write().munmap(region(part)).expect("munmap has no error");
                model.retain(|page, _| !part.contains(*page));
            }
            Op::Mprotect { from, len, rights } => {
                let part = places(from, len, PLACES);
                // An error if the range is not inside one area.
                if process.map.write().mprotect(region(part), rights.into()).is_ok() {
                    self.reached.protected += 1;
                    pages(part).for_each(|page| model.get_mut(&page).expect("mapped").rights = rights);
                }
            }
            Op::Mremap { from, len, new_len, to } => match mremap(process, model, from, len, new_len, to) {
                None => {}
                Some(start) if start == address(from) => self.reached.resized += 1,
                Some(_) => self.reached.moved += 1,
            },
            Op::Fork if self.nr_ever < PROCESSES => {
                let child = (process.fork().expect("room"), model.clone());
                self.nr_ever += 1;
                self.reached.forked += 1;
                self.processes.push(child);
            }
            Op::Exit if self.processes.len() > 1 => self.exit(which),
            Op::Fork | Op::Exit => {}
            Op::Read { cpu, place } => self.access(which, cpu, place, Access::Read, 0),
            Op::Write { cpu, place, word } => self.access(which, cpu, place, Access::Write, word),
        }
    }

    /// A program of the process on `cpu` reads or writes, and sees what the model says.
    fn access(&mut self, which: usize, cpu: usize, place: u64, access: Access, word: u64) {
        self.run(which, cpu);
        let found = self.reach(which, CPU[cpu], address(place), access);
        let (_, model) = &mut self.processes[which];
        let seen = model.get_mut(&address(place));
        match seen.filter(|seen| access == Access::Read || seen.rights == Rights::ReadWrite) {
            None => assert_eq!(found, Err(Segv), "{access:?} at place {place}"),
            Some(seen) => {
                let frame = found.expect("the model has it");
                if access == Access::Write {
                    self.words.insert(frame, word);
                    seen.word = word;
                }
                assert_eq!(self.words[&frame], seen.word, "what is read at place {place}");
            }
        }
    }

    fn run(&self, which: usize, cpu: usize) {
        let (process, _) = &self.processes[which];
        self.kernel.on(CPU[cpu], || process.map.write().address_space_mut().activate());
    }

    /// Touches, and faults until the page is there.
    fn reach(
        &mut self,
        which: usize,
        cpu: mmu_gather::tlb::CpuId,
        at: u64,
        access: Access,
    ) -> Result<PhysFrame, Segv> {
        for _ in 0..3 {
            match self.kernel.touch(cpu, at, access) {
                Ok(frame) => return Ok(frame),
                Err(_) => self.fault(which, at, access)?,
            }
        }
        panic!("{at:#x} faults again and again");
    }

    /// The page-fault handler: new pages, and copies of shared ones.
    fn fault(&mut self, which: usize, at: u64, access: Access) -> Result<(), Segv> {
        let mut map = self.processes[which].0.map.write();
        let allowed = map.find_vma(va(at)).ok_or(Segv)?.permissions();
        if access == Access::Write && !allowed.write {
            return Err(Segv);
        }
        let new_page = || {
            let frame = self.kernel.ledger().new_page(PAGE);
            let number = frame.start_address().as_u64() >> 12;
            (frame, PageFrame::from_pfn(usize::try_from(number).expect("64 bits")))
        };
        let space = map.address_space_mut();
        let perms = PtePermissions::from(allowed);
        match space.translate(va(at)) {
            None => {
                let (frame, page) = new_page();
                self.words.insert(frame, 0);
                space.map_page(page, va(at), perms).expect("nothing is there");
            }
            Some(old) if access == Access::Write && !old.perms.is_write() => {
                let old = frame_of(old.pfn);
                let account = self.kernel.ledger().page(old).expect("a page");
                if account.mappings == 1 {
                    self.reached.reused += 1;
                    space.protect_range(va(at).page_region(), perms).expect("mapped");
                } else {
                    self.reached.copied += 1;
                    let (frame, page) = new_page();
                    self.words.insert(frame, self.words[&old]);
                    space.remap(va(at), page, perms).expect("mapped");
                }
            }
            Some(_) => {}
        }
        Ok(())
    }

    fn exit(&mut self, which: usize) {
        let (process, _) = self.processes.remove(which);
        let mm = process.map.write().address_space_mut().with(|_, mm| mm.context().ctx_id());
        for cpu in self.kernel.cpu_ids() {
            // Every other CPU of it stays, lazily.
            let is_here = self.kernel.state(cpu).slots().any(|(_, slot)| slot.ctx_id == Some(mm));
            if is_here && cpu.index() % 2 == 1 { self.kernel.go_lazy(cpu) } else { self.kernel.stop(cpu) }
        }
        process.exit();
    }

    /// Entries, areas and counts are as the models say.
    pub(crate) fn compare(&self) {
        let mut frames = BTreeSet::new();
        for (process, model) in &self.processes {
            let mut map = process.map.write();
            let areas: u64 = map.iter_vmas().map(|vma| vma.region().size() as u64 / PAGE).sum();
            assert_eq!(areas, model.len() as u64, "pages in areas");
            for (at, seen) in model {
                let area = map.find_vma(va(*at)).expect("an area");
                assert_eq!(area.permissions(), seen.rights.into(), "the area of {at:#x}");
                let Some(page) = map.address_space_mut().translate(va(*at)) else {
                    assert_eq!(seen.word, 0, "{at:#x} was written, and is gone");
                    continue;
                };
                let frame = frame_of(page.pfn);
                frames.insert(frame);
                assert_eq!(self.words[&frame], seen.word, "the word at {at:#x}");
                let account = self.kernel.ledger().page(frame).expect("a page");
                assert!(!page.perms.is_write() || account.mappings == 1, "{at:#x} is shared and writable");
                assert!(!page.perms.is_write() || seen.rights == Rights::ReadWrite, "{at:#x} is writable");
            }
        }
        assert_eq!(self.kernel.ledger().nr_held(), frames.len(), "every other page is free");
        assert_eq!(self.kernel.take_violations(), []);
    }

    /// Unmaps all areas of a process, and expects no table to be left.
    pub(crate) fn unmap_all(&mut self, which: usize) {
        let which = which % self.processes.len();
        let (process, model) = &mut self.processes[which];
        let whole = process.map.write().address_space_mut().with(|_, mm| mm.space().user_range());
        process.map.write().munmap(region(whole)).expect("munmap has no error");
        model.clear();
        let tables = process.map.write().address_space_mut().with(|kernel, mm| kernel.tables(mm));
        assert_eq!(tables, []);
    }

    /// Every process ends.
    pub(crate) fn end(mut self) {
        while !self.processes.is_empty() {
            self.exit(0);
            self.compare();
        }
        assert_eq!(self.kernel.ledger().nr_held(), 0);
        assert_eq!(self.kernel.batches_lent(), 0);
        for index in 0..self.nr_ever {
            assert_eq!(self.kernel.tables(self.kernel.mm(index)), []);
        }
    }
}

/// Places `from..from + len`, as far as there are any.
fn places(from: u64, len: u64, end: u64) -> VirtRange {
    range(address(from), address((from + len).min(end) - 1) + PAGE)
}

fn pages(range: VirtRange) -> impl Iterator<Item = u64> {
    (range.start()..range.end()).step_by(4096)
}

/// Resizes or moves in the process and in the model: where it starts now, if that can be.
fn mremap(process: &Process, model: &mut Model, from: u64, len: u64, new_len: u64, to: To) -> Option<u64> {
    let (start, old_end) = (address(from), address(from) + len * PAGE);
    let destination = match to {
        To::Anywhere => RemapDestination::MayMove,
        To::Place(place) => RemapDestination::Fixed(va(address(place))),
    };
    let bytes = |pages: u64| va(pages * PAGE).value();
    let moved = process.map.write().mremap(va(start), bytes(len), bytes(new_len), destination);
    // An error if the old range is not inside one area, or the new one overlaps that.
    let (new_start, freed) = moved.ok()?;
    assert_eq!(freed, []);
    let new_start = new_start.value() as u64;
    let rights = model[&start].rights;
    if new_start == start {
        // In place: what is there already stays.
        for page in (old_end..start + new_len * PAGE).step_by(4096) {
            model.entry(page).or_insert(Seen { word: 0, rights });
        }
        model.retain(|page, _| !(start + new_len * PAGE..old_end).contains(page));
        return Some(start);
    }
    let old: Vec<Seen> =
        (start..old_end).step_by(4096).map(|page| model.remove(&page).expect("mapped")).collect();
    for index in 0..new_len {
        let kept = usize::try_from(index).ok().and_then(|index| old.get(index).copied());
        model.insert(new_start + index * PAGE, kept.unwrap_or(Seen { word: 0, rights }));
    }
    Some(new_start)
}
