//! The code of the README's "Embed", compiled and run: `embed.rs`, whose very text the README has.
#![expect(unsafe_code, reason = "a gather takes the map lock on trust")]
#![expect(dead_code, unused_imports, reason = "the machine has more, for the example that it belongs to")]

// `Kernel`, of two CPUs, with the traits that the README names first.
include!(concat!(env!("CARGO_MANIFEST_DIR"), "/../gather/examples/small_kernel/machine.rs"));

use mmu_gather::pagetable::{Decoded, MapError};
use mmu_gather::tlb::{enter_lazy_tlb, offline_cpu};
use spin::RwLock;

/// The areas of a process, in ascending order; each is unmapped or protected as a whole here.
#[derive(Default)]
struct Areas(Vec<Vma<()>>);

impl Areas {
    fn iter(&self) -> impl Iterator<Item = Vma<()>> + Clone {
        self.0.iter().copied()
    }

    fn detach(&mut self, range: VirtRange) -> Vec<Vma<()>> {
        self.0.extract_if(.., |vma| range.covers(vma.range)).collect()
    }
}

include!("embed.rs");

fn pages(start: u64, end: u64) -> VirtRange {
    VirtRange::new(start, end).expect("aligned, and not empty")
}

/// Two CPUs that run a process of three areas, and have all its pages cached.
fn running(kernel: &Kernel) -> Process {
    let process = new_process(kernel).expect("a frame");
    let areas = [area(0x1000, 0x3000), area(0x20_0000, 0x24_0000), area(0x40_0000, 0x40_2000)];
    for vma in areas {
        kernel.map(&process.mm, vma.range);
        process.areas.write().0.push(vma);
    }
    for cpu in CPU {
        kernel.on(cpu, || start(kernel, cpu));
        kernel.on(cpu, || run(kernel, cpu, &process));
        for vma in areas {
            assert!(kernel.touch(cpu, &process.mm, vma.range.start()));
        }
    }
    process
}

fn is_cached(kernel: &Kernel, address: u64) -> bool {
    kernel.tlbs.iter().any(|tlb| tlb.borrow().contains(&address))
}

fn flags_at(kernel: &Kernel, process: &Process, address: u64) -> PageTableFlags {
    // SAFETY: no table is freed meanwhile.
    unsafe { process.mm.space().lookup(kernel, address) }.value.flags()
}

#[test]
fn munmap_frees_what_no_cpu_can_reach_and_spares_the_neighbours() {
    let kernel = Kernel::new();
    let process = running(&kernel);
    let tables = kernel.free_tables.borrow().len();
    munmap(&kernel, &process, pages(0x20_0000, 0x24_0000)).expect("no large page is there");
    assert!(!is_cached(&kernel, 0x20_0000));
    assert!(kernel.touch(CPU[1], &process.mm, 0x1000), "the neighbour is mapped");
    assert_eq!(kernel.freed_pages.get(), 64);
    assert_eq!(kernel.free_tables.borrow().len(), tables + 1, "the tables of the neighbours stay");
}

#[test]
fn mprotect_leaves_no_cpu_that_may_still_write() {
    let kernel = Kernel::new();
    let process = running(&kernel);
    mprotect(&kernel, &process, pages(0x1000, 0x3000), PageTableFlags::USER_ACCESSIBLE)
        .expect("no large page");
    assert!(!is_cached(&kernel, 0x1000));
    assert!(!flags_at(&kernel, &process, 0x1000).contains(PageTableFlags::WRITABLE));
    assert!(flags_at(&kernel, &process, 0x1000).contains(PageTableFlags::PRESENT));
    assert_eq!(kernel.freed_pages.get(), 0);
}

#[test]
fn fork_leaves_nobody_who_may_write_to_what_is_shared() {
    let kernel = Kernel::new();
    let (parent, child) = (running(&kernel), new_process(&kernel).expect("a frame"));
    fork(&kernel, &parent, &child).expect("frames");
    for address in [0x1000, 0x23_f000, 0x40_1000] {
        assert!(!is_cached(&kernel, address));
        for process in [&parent, &child] {
            let flags = flags_at(&kernel, process, address);
            assert!(flags.contains(PageTableFlags::PRESENT) && !flags.contains(PageTableFlags::WRITABLE));
        }
    }
}

#[test]
fn an_exit_frees_all_while_a_cpu_is_lazy_and_another_is_off() {
    let kernel = Kernel::new();
    let process = running(&kernel);
    kernel.on(CPU[1], || idle(&kernel, CPU[1]));
    exit(&kernel, &process);
    assert_eq!(kernel.freed_pages.get(), 2 + 64 + 2);
    assert_eq!(kernel.free_tables.borrow().len(), 15, "every table has come back");
    let next = running(&kernel);
    kernel.on(CPU[1], || stop(&kernel, CPU[1]));
    kernel.on(CPU[0], || flush_vector(&kernel, CPU[0]));
    exit(&kernel, &next);
    assert_eq!(kernel.free_tables.borrow().len(), 15, "nobody waits for a CPU that is off");
}

#[test]
fn the_readme_shows_this_code() {
    let code = include_str!("embed.rs");
    assert!(
        include_str!("../../../README.md").contains(code),
        "README.md has the text of embed.rs, under Embed"
    );
}
