//! Programs of several processes on four CPUs, and the model: a word for each page.
//!
//! One thread plays every CPU: what meets what is for the kit to try.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use libkernel::memory::address_space::UserAddressSpace;
use libkernel::memory::proc_vm::memory_map::{AddressRequest, RemapDestination};
use libkernel::memory::proc_vm::vmarea::VMAreaKind;
use mmu_gather::pagetable::VirtRange;
use mmu_gather::tlb::CpuId;
use mmu_hosted::{Kernel, Rights, UserAccess};
use mmu_tests::{CPU, GIB, HostedPlatform, MIB, range};
use x86_64::structures::paging::PhysFrame;

use crate::fault::{Answer, Segv};
use crate::glue::{Process, Space, frame_of};
use crate::kit::{Layer, permissions, region, va};
use crate::runs::quiet_machine;

pub(crate) const PAGE: u64 = 4096;
/// Pages around the border of two top-level entries, and pages around the next border of 2 MiB.
pub(crate) const PLACES: u64 = 64 + 32;
pub(crate) const BORDER: u64 = 512 * GIB;
/// So many processes a sequence may have, one after the other.
const PROCESSES: usize = 16;

/// The address of a place. Places ascend, with one gap between 63 and 64.
pub(crate) const fn address(place: u64) -> u64 {
    if place < 64 {
        BORDER - 32 * PAGE + place * PAGE
    } else {
        BORDER + 2 * MIB - 16 * PAGE + (place - 64) * PAGE
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
    layer: Arc<Layer<Space>>,
    processes: Vec<(Arc<Process<Space>>, Model)>,
    nr_ever: usize,
    pub(crate) reached: Reached,
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        let layer = mmu_hosted::boot(&quiet_machine(seed), Layer::boot).expect("memory");
        let first = (layer.new_mm().expect("room"), Model::new());
        Self { layer, processes: vec![first], nr_ever: 1, reached: Reached::default() }
    }

    fn kernel(&self) -> &HostedPlatform {
        &self.layer.platform
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
                let mapped = process.lock().mmap_replacing(at, len, permissions(rights), kind, String::new());
                let (at, freed) = mapped.expect("the place is taken");
                assert_eq!((at.value() as u64, freed.len()), (part.start(), 0));
                model.extend(pages(part).map(|page| (page, Seen { word: 0, rights })));
            }
            Op::Munmap { from, len } => {
                let part = places(from, len, PLACES);
                process.lock().munmap(region(part)).expect("munmap has no error");
                model.retain(|page, _| !part.contains(*page));
            }
            Op::Mprotect { from, len, rights } => {
                let part = places(from, len, PLACES);
                // An error if the range is not inside one area.
                if process.lock().mprotect(region(part), permissions(rights)).is_ok() {
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
                let child = (Arc::new(process.fork().expect("room")), model.clone());
                self.nr_ever += 1;
                self.reached.forked += 1;
                self.processes.push(child);
            }
            Op::Exit if self.processes.len() > 1 => self.exit(which),
            Op::Fork | Op::Exit => {}
            Op::Read { cpu, place } => self.access(which, CPU[cpu], place, UserAccess::Read, 0),
            Op::Write { cpu, place, word } => self.access(which, CPU[cpu], place, UserAccess::Write, word),
        }
    }

    /// A program of the process on `cpu` reads or writes, and sees what the model says.
    fn access(&mut self, which: usize, cpu: CpuId, place: u64, access: UserAccess, word: u64) {
        let at = address(place);
        let found = self.reach(which, cpu, at, access);
        let seen = self.processes[which].1.get(&at).copied();
        match seen.filter(|seen| access == UserAccess::Read || seen.rights == Rights::Write) {
            None => assert_eq!(found, Err(Segv), "{access:?} at place {place}"),
            Some(mut seen) => {
                let page = found.expect("the model has it");
                if access == UserAccess::Write {
                    self.kernel().set_word(page, word);
                    seen.word = word;
                    self.processes[which].1.insert(at, seen);
                }
                assert_eq!(self.kernel().word(page), seen.word, "what is read at place {place}");
            }
        }
    }

    /// Touches, and faults until the page is there.
    fn reach(&mut self, which: usize, cpu: CpuId, at: u64, access: UserAccess) -> Result<PhysFrame, Segv> {
        let process = Arc::clone(&self.processes[which].0);
        let machine = Arc::clone(self.kernel().machine());
        machine.on_cpu(cpu, || {
            self.layer.switch_to(Some(&process));
            for _ in 0..3 {
                machine.enter_user_mode();
                let found = machine.user_access(at, access);
                machine.leave_user_mode();
                if let Ok(page) = found {
                    return Ok(page.expect("a page of the machine's memory"));
                }
                match process.fault(va(at), access)? {
                    Answer::Copied => self.reached.copied += 1,
                    Answer::Reused => self.reached.reused += 1,
                    Answer::NewPage | Answer::Nothing => {}
                }
            }
            panic!("{at:#x} faults again and again");
        })
    }

    fn exit(&mut self, which: usize) {
        let (process, _) = self.processes.remove(which);
        let machine = self.kernel().machine();
        for cpu in (0..machine.nr_cpus()).map(CpuId::new) {
            machine.on_cpu(cpu, || {
                // Every other CPU of it stays, lazily.
                let is_here = machine.cr3() == Some(process.mm.space().root());
                if is_here && cpu.index() % 2 == 1 {
                    self.kernel().go_lazy();
                } else {
                    self.layer.switch_to(None);
                }
            });
        }
        process.exit();
    }

    /// Entries, areas and counts are as the models say.
    pub(crate) fn compare(&self) {
        let mut frames = BTreeSet::new();
        for (process, model) in &self.processes {
            let mut map = process.lock();
            let areas: u64 = map.iter_vmas().map(|vma| vma.region().size() as u64 / PAGE).sum();
            assert_eq!(areas, model.len() as u64, "pages in areas");
            for (at, seen) in model {
                let area = map.find_vma(va(*at)).expect("an area");
                assert_eq!(area.permissions(), permissions(seen.rights), "the area of {at:#x}");
                let Some(page) = map.address_space_mut().translate(va(*at)) else {
                    assert_eq!(seen.word, 0, "{at:#x} was written, and is gone");
                    continue;
                };
                let frame = frame_of(page.pfn);
                frames.insert(frame);
                assert_eq!(self.kernel().word(frame), seen.word, "the word at {at:#x}");
                let is_shared = self.kernel().nr_mappings(frame) > 1;
                assert!(!page.perms.is_write() || !is_shared, "{at:#x} is shared and writable");
                assert!(!page.perms.is_write() || seen.rights == Rights::Write, "{at:#x} is writable");
            }
        }
        assert_eq!(self.kernel().nr_pages(), frames.len(), "every other page is free");
        assert_eq!(self.kernel().machine().violations().count, 0);
    }

    /// Unmaps all areas of a process, and expects no table to be left.
    pub(crate) fn unmap_all(&mut self, which: usize) {
        let which = which % self.processes.len();
        let (process, model) = &mut self.processes[which];
        let space = process.mm.space();
        process.lock().munmap(region(space.user_range())).expect("munmap has no error");
        model.clear();
        let linked = self.layer.platform.machine().entries_of(space.root()).filter(|entry| *entry != 0);
        assert_eq!(linked.count(), 0, "tables are left");
    }

    /// Every process ends.
    pub(crate) fn end(mut self) {
        while !self.processes.is_empty() {
            self.exit(0);
            self.compare();
        }
        let machine = self.kernel().machine();
        assert_eq!(machine.not_freed(), []);
        assert_eq!((machine.violations().count, machine.double_frees()), (0, 0));
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
fn mremap(
    process: &Process<Space>,
    model: &mut Model,
    from: u64,
    len: u64,
    new_len: u64,
    to: To,
) -> Option<u64> {
    let (start, old_end) = (address(from), address(from) + len * PAGE);
    let destination = match to {
        To::Anywhere => RemapDestination::MayMove,
        To::Place(place) => RemapDestination::Fixed(va(address(place))),
    };
    let bytes = |pages: u64| va(pages * PAGE).value();
    let moved = process.lock().mremap(va(start), bytes(len), bytes(new_len), destination);
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
