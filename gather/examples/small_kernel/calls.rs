// The two system calls that unmap, and a program that makes them. The kernel's own side, with the
// three traits for the engine, is in machine.rs.
fn munmap<'k>(
    kernel: &'k Kernel,
    mm: &MyMm,
    vma: Vma<()>,
    neighbours: Bounds,
) -> Result<FlushedGather<'k, Kernel>, CutLeaf> {
    // SAFETY: one thread alone frees tables of `mm`, which is an address space of this kernel. (A
    // kernel with more threads holds its map lock until `flush` has returned.)
    let mut gather = unsafe { MmuGather::new(kernel, mm) };
    // Entries are cleared, and their pages queued.
    gather.unmap_vmas([vma], vma.range)?;
    // SAFETY: the pages are gone, and nothing is mapped between the area and its neighbours.
    // Tables are unhooked, and queued.
    unsafe { gather.free_pgtables([vma], neighbours) };
    // Every CPU forgets the area. What comes back is to be freed when the locks are dropped.
    Ok(gather.flush())
}

fn exit(kernel: &Kernel, mm: &MyMm, vmas: &[Vma<()>]) {
    // SAFETY: `vmas` are all areas of `mm`, and no CPU runs programs in it any more.
    let flushed = unsafe { exit_mmap(kernel, mm, &Limits::DEFAULT, vmas.iter().copied(), || ()) };
    flushed.free();
    // SAFETY: no CPU has the root in CR3 any more, and nothing is mapped below it.
    unsafe { kernel.free_tables(&[mm.space().root()]) };
}

pub(crate) fn main() {
    let kernel = Kernel::new();
    let mm = kernel.new_mm();
    let (code, data) = (area(0x1000, 0x3000), area(0x20_0000, 0x24_0000));
    for vma in [code, data] {
        kernel.map(&mm, vma.range);
    }
    for cpu in CPU {
        kernel.run(cpu, Some(&mm));
        assert!(kernel.touch(cpu, &mm, 0x1000) && kernel.touch(cpu, &mm, 0x20_0000));
    }

    let neighbours = Bounds::between(Some(code.range.end()), None);
    let flushed = munmap(&kernel, &mm, data, neighbours).expect("no large page is there");
    for cpu in CPU {
        assert!(!kernel.touch(cpu, &mm, 0x20_0000), "no CPU can use the page any more");
        assert!(kernel.touch(cpu, &mm, 0x1000), "the neighbour stays");
    }
    assert_eq!(kernel.freed_pages.get(), 0, "nothing is freed before this:");
    flushed.free();
    assert_eq!(kernel.freed_pages.get(), 64);

    kernel.run(CPU[1], None);
    exit(&kernel, &mm, &[code]);
    assert_eq!(kernel.freed_pages.get(), 66);
    assert_eq!(kernel.free_tables.borrow().len(), 15, "every table has come back");
}
