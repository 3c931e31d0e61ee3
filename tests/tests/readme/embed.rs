struct Process {
    mm: Pin<Box<Mm<Bits>>>,                          // pinned: CPUs know it by its address
    areas: RwLock<Areas>,                            // the map lock
}

fn new_process(kernel: &Kernel) -> Option<Process> {
    let root = kernel.allocate_table()?;             // zeroed; your kernel's half is copied into it here, for good
    // SAFETY: the root is this address space's alone, and `ids` is the machine's one `CtxIds`.
    let mm = Box::pin(unsafe { Mm::new(&kernel.ids, root, PagingMode::FourLevel) });
    Some(Process { mm, areas: RwLock::default() })
}

fn start(kernel: &Kernel, cpu: CpuId) {              // each CPU first, and again when it comes back
    // SAFETY: on `cpu`, interrupts off.
    unsafe { init_cpu(kernel, cpu) };
}
fn flush_vector(kernel: &Kernel, cpu: CpuId) {       // the interrupt handler, and whoever spins with interrupts off
    // SAFETY: on `cpu`, interrupts off.
    unsafe { flush_interrupt(kernel, cpu) };
}
fn run(kernel: &Kernel, cpu: CpuId, next: &Process) { // the scheduler; `next` lives until this CPU has left it
    // SAFETY: on `cpu`, interrupts off.
    unsafe { switch_mm(kernel, cpu, Some(next.mm.as_ref().pinned_context())) };
}
fn idle(kernel: &Kernel, cpu: CpuId) {               // a kernel thread, too: CR3 stays as it is
    // SAFETY: on `cpu`, interrupts off.
    unsafe { enter_lazy_tlb(kernel, cpu) };
}
fn stop(kernel: &Kernel, cpu: CpuId) {               // the last that a CPU does: no flush waits for it any more
    // SAFETY: on `cpu`, interrupts off.
    unsafe { offline_cpu(kernel, cpu) };
}

fn munmap(kernel: &Kernel, process: &Process, range: VirtRange) -> Result<(), CutLeaf> {
    let mut areas = process.areas.write();
    let detached = areas.detach(range);              // nobody faults there any more
    let bounds = Bounds::around(areas.iter().map(|vma| vma.range), range); // the neighbours: their tables stay
    let areas = areas.downgrade();
    // SAFETY: the map lock is held until `flush` has returned.
    let mut gather = unsafe { MmuGather::new(kernel, &process.mm) };
    gather.unmap_vmas(detached.iter().copied(), range)?; // clear entries, queue pages; no error if `split_leaf` came first
    // SAFETY: the areas are detached, their pages gone, and `bounds` are the neighbours that stay.
    unsafe { gather.free_pgtables(detached.iter().copied(), bounds) }; // unhook tables, queue them
    let flushed = gather.flush();                    // every CPU has forgotten the range
    drop(areas);                                     // lock released
    flushed.free();                                  // frees happen here, outside every lock
    Ok(())
}

fn mprotect(kernel: &Kernel, process: &Process, range: VirtRange, rights: PageTableFlags) -> Result<(), CutLeaf> {
    let _areas = process.areas.write();              // and say in the areas what faults may map from now on
    // SAFETY: the map lock is held until `flush` has returned.
    let mut gather = unsafe { MmuGather::new(kernel, &process.mm) };
    // SAFETY: the areas allow this, and no page is shared.
    unsafe { gather.change_protection(range, |_, _, _| rights) }?;
    gather.flush().free();                           // nobody can do any more what was forbidden
    Ok(())
}

fn fork(kernel: &Kernel, parent: &Process, child: &Process) -> Result<(), MapError> {
    let areas = parent.areas.write();
    // SAFETY: the map lock is held until `flush` has returned.
    let mut gather = unsafe { MmuGather::new(kernel, &parent.mm) };
    for vma in areas.iter() {
        // SAFETY: pages lose the right to be written to, and gain none.
        let cut = unsafe { gather.change_protection(vma.range, |_, _, old| old.flags() - PageTableFlags::WRITABLE) };
        debug_assert!(cut.is_ok(), "an area is whole: no large page reaches beyond it");
        let mut address = vma.range.start();
        while address < vma.range.end() {
            // SAFETY: the map lock is held.
            let found = unsafe { parent.mm.space().lookup(kernel, address) };
            if let Decoded::Leaf(_) = found.value.decode(found.level) {
                // Your kernel counts the second mapping of the page here.
                // SAFETY: nobody knows the child yet, and nobody may write to the page.
                unsafe { child.mm.space().map(kernel, address, found.level, found.value) }?; // the caller exits the child
            }
            address = VirtRange::of_entry(found.level, address).end();
        }
    }
    gather.flush().free();                           // before the child runs: nobody writes to what it shares
    Ok(())
}

fn exit(kernel: &Kernel, process: &Process) {        // no program runs in it; CPUs may be lazy in it still
    let areas = process.areas.write();
    // SAFETY: the map lock is held, these are all areas, and no program comes back.
    let flushed = unsafe { exit_mmap(kernel, &process.mm, &Limits::DEFAULT, areas.iter(), || ()) };
    drop(areas);
    flushed.free();
    // SAFETY: no CPU has the root in CR3 any more, the lazy ones neither.
    unsafe { kernel.free_tables(&[process.mm.space().root()]) };
}
