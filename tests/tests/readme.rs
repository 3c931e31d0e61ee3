//! The example in the README, compiled and run. The README has this very text.
#![expect(unsafe_code, reason = "a gather takes the map lock on trust")]

use mmu_gather::pagetable::{Bounds, VirtRange};
use mmu_gather::{CutLeaf, MmuGather, Vma};
use mmu_tests::{
    Access, Backing, CPU, Fault, GIB, MIB, Options, PaperKernel as Kernel, PaperMm, area, range,
};
use spin::RwLock;

/// An embedder's address space.
struct MyMm<'k> {
    engine: &'k PaperMm,
    areas: RwLock<Areas>,
}

/// Its areas, in ascending order; each of them is unmapped as a whole here.
struct Areas(Vec<Vma<Backing>>);

impl Areas {
    fn detach(&mut self, range: VirtRange) -> Vec<Vma<Backing>> {
        self.0.extract_if(.., |vma| range.covers(vma.range)).collect()
    }

    fn bounds_around(&self, range: VirtRange) -> Bounds {
        Bounds::around(self.0.iter().map(|vma| vma.range), range)
    }
}

#[rustfmt::skip]
#[expect(clippy::needless_borrow, reason = "an embedder's address space holds the engine's, not a reference to it")]
fn munmap(kernel: &Kernel, mm: &MyMm, range: VirtRange) -> Result<(), CutLeaf> {
    let mut areas = mm.areas.write();
    let detached = areas.detach(range);              // nobody faults there any more
    let bounds = areas.bounds_around(range);
    let areas = areas.downgrade();
    // SAFETY: the map lock is held until `flush` has returned.
    let mut gather = unsafe { MmuGather::new(kernel, &mm.engine) };
    gather.unmap_vmas(detached.iter().copied(), range)?; // clear entries, queue pages; `?`: cannot fail after `split_leaf` at both ends
    // SAFETY: the areas are detached, their pages gone, and `bounds` are the neighbours that stay.
    unsafe { gather.free_pgtables(detached.iter().copied(), bounds) }; // unhook tables, queue them
    let flushed = gather.flush();                    // every CPU has forgotten the range
    drop(areas);                                     // lock released
    flushed.free();                                  // frees happen here, outside every lock
    Ok(())
}

#[test]
fn the_example_unmaps_frees_and_spares_the_neighbours() {
    let kernel = Kernel::new(Options::default());
    let engine = kernel.new_mm();
    let parts =
        [range(GIB, GIB + MIB), range(GIB + 2 * MIB, GIB + 6 * MIB), range(GIB + 6 * MIB, GIB + 7 * MIB)];
    for part in parts {
        kernel.map_range(engine, part);
    }
    let areas = parts.map(|part| area(part.start(), part.end(), Backing::Anonymous));
    let mm = MyMm { engine, areas: RwLock::new(Areas(areas.to_vec())) };
    kernel.run(CPU[1], engine);
    for part in parts {
        kernel.touch(CPU[1], part.start(), Access::Write).expect("mapped");
    }
    munmap(&kernel, &mm, parts[1]).expect("no large page is there");
    assert_eq!(kernel.touch(CPU[1], parts[1].start(), Access::Read), Err(Fault::NotPresent));
    for part in [parts[0], parts[2]] {
        kernel.touch(CPU[1], part.start(), Access::Write).expect("still mapped");
    }
    assert_eq!(kernel.ledger().nr_held(), 512, "two times a mebibyte");
    assert_eq!(kernel.nr_tables(engine)[0], 2, "the tables of the neighbours");
    assert!(kernel.take_violations().is_empty());
}

#[test]
fn the_readme_shows_this_function() {
    let function = |text: &'static str| {
        let start = text.find("fn munmap(").expect("it begins");
        let end = text[start..].find("\n}\n").expect("it ends");
        &text[start..start + end]
    };
    let shown = function(include_str!("../../README.md"));
    assert_eq!(shown, function(include_str!("readme.rs")));
}
