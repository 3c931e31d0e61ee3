//! The moves, carried out.

use core::mem;
use core::panic::AssertUnwindSafe;
use std::collections::BTreeSet;
use std::panic::{catch_unwind, resume_unwind};

use mmu_gather::pagetable::{Bounds, Level, Lines, TableMemory};
use mmu_gather::tlb::{
    CpuId, CpuSet, Cpus, Flushed, FreedTables, Laziness, PageSpan, TlbEvent, UnmapBatch,
    flush_tlb_batched_pending, flush_tlb_mm, flush_tlb_mm_range,
};
use mmu_gather::{GatherEvent, Limits, Pages};
use mmu_tests::{Access, Backing, Bits, Event, GIB, PaperKernel, Supply};

use crate::ops::Op;
use crate::world::{Batch, NR_CPUS, NR_MMS, OWN, Open, PAGE, Taken, World, areas, level};

impl World<'_> {
    pub(crate) fn carry_out(&mut self, op: &Op) -> Result<(), String> {
        let kernel = self.kernel;
        match *op {
            Op::Map { mm, place } => {
                let ((number, mm), (address, level, backing)) = (self.mm(mm), self.place(place));
                // One page, or all pages of the same kind from there on.
                let like =
                    |(address, ..): &&(u64, Level, Backing)| *address >> 21 == self.place(place).0 >> 21;
                let more = if place % 4 == 0 { 12 } else { 1 };
                let first = self.places.iter().filter(like).skip_while(|(first, ..)| *first < address);
                let wanted: Vec<u64> = first.map(|(address, ..)| *address).take(more).collect();
                for address in wanted {
                    let found = kernel.lookup(mm, address);
                    if found.level >= level && found.value.is_empty() {
                        kernel.map(mm, address, level);
                        self.nr_devices += usize::from(backing == Backing::Device);
                        self.mapped(number, address);
                    }
                }
            }
            Op::Use { cpu, mm, place } => {
                self.carry_out(&Op::Run { cpu, mm })?;
                self.carry_out(&Op::Map { mm, place })?;
                self.carry_out(&Op::Touch { cpu, place, write: true })?;
            }
            Op::Touch { cpu, place, write } => {
                let cpu = u32::from(cpu) % NR_CPUS;
                if !self.offline.contains(&cpu)
                    && kernel.state(CpuId::new(cpu)).laziness() == Laziness::Active
                {
                    let access = if write { Access::Write } else { Access::Read };
                    let _ = kernel.touch(CpuId::new(cpu), self.place(place).0, access);
                }
            }
            Op::Speculate { cpu, place } => {
                let (number, (address, ..)) = (u32::from(cpu) % NR_CPUS, self.place(place));
                let cpu = CpuId::new(number);
                // The pages that a lazy CPU has cached may be stale: it does not use them before it
                // wakes.
                let is_lazy = kernel.state(cpu).laziness() == Laziness::Lazy;
                let is_old = is_lazy && kernel.cached(cpu, address).is_some();
                if !self.offline.contains(&number) && !is_old {
                    kernel.speculate(cpu, address);
                }
            }
            Op::Run { cpu, mm } => {
                let cpu = u32::from(cpu) % NR_CPUS;
                if self.offline.remove(&cpu) {
                    kernel.restart(CpuId::new(cpu));
                }
                kernel.run(CpuId::new(cpu), self.mm(mm).1);
            }
            Op::Leave { cpu, how } => {
                let number = u32::from(cpu) % NR_CPUS;
                let cpu = CpuId::new(number);
                if self.offline.contains(&number) {
                    return Ok(());
                }
                match how % 8 {
                    0..4 => kernel.go_lazy(cpu),
                    4 => kernel.leave_mm(cpu),
                    5 if cpu != self.here => {
                        kernel.take_offline(cpu);
                        self.offline.insert(number);
                    }
                    _ => kernel.stop(cpu),
                }
            }
            Op::PlayCpu { cpu } if !self.offline.contains(&(u32::from(cpu) % NR_CPUS)) => {
                self.here = CpuId::new(u32::from(cpu) % NR_CPUS);
            }
            Op::Reclaim { batch, mm, place } => {
                let ((number, mm), (address, level, backing)) = (self.mm(mm), self.place(place));
                let found = kernel.lookup(mm, address);
                if backing != Backing::Device && found.level == level && found.value.is_present() {
                    let batch = &mut self.batches[usize::from(batch) % 2];
                    let frame = kernel.reclaim_at(&mut batch.batch, mm, address, level);
                    batch.taken.push(Taken { mm: number, address, frame, still_gone: true });
                    self.promised[number].remove(&address);
                }
            }
            Op::Munmap { mm, area } => {
                let (number, mm) = self.mm(mm);
                let (vmas, index) = (areas(), usize::from(area) % 5);
                // Unmapping holds the map lock for writing.
                if !self.is_open(number) {
                    let below = index.checked_sub(1).map(|below| vmas[below].range.end());
                    let above = vmas.get(index + 1).map(|above| above.range.start());
                    kernel.unmap(mm, &Limits::DEFAULT, &[vmas[index]], Bounds::between(below, above));
                    let (gone, _) = self.in_range(number, &[vmas[index].range]);
                    self.promise(number, gone);
                }
            }
            Op::Zap { mm, area } => {
                let (number, mm) = self.mm(mm);
                let vma = areas()[usize::from(area) % 5];
                let flushed = kernel.zap(mm, &vma, vma.range);
                self.flushed.push(flushed);
                let (gone, _) = self.in_range(number, &[vma.range]);
                self.promise(number, gone);
            }
            Op::Supply { batches } => kernel.supply_batches(Supply::Pattern(batches)),
            _ => return self.with_gathers(op),
        }
        Ok(())
    }

    #[expect(clippy::too_many_lines, reason = "one arm a move")]
    fn with_gathers(&mut self, op: &Op) -> Result<(), String> {
        let kernel = self.kernel;
        match *op {
            Op::Open { mm, dying } if self.gathers.len() < 3 => {
                let (number, mm) = self.mm(mm);
                let gather = if dying { kernel.gather_fullmm(mm) } else { kernel.gather(mm) };
                let _ = (gather.mode(), format!("{gather:?}"));
                let (covered, cleared) = (BTreeSet::new(), BTreeSet::new());
                self.gathers.push(Open { gather, mm: number, covered, cleared });
            }
            Op::WithLimits {
                gather,
                limits: [bundle_slots, batch_slots, batch_pages, table_slots, free_chunk],
            } => {
                if let Some(mut open) = self.take(gather) {
                    let batch_pages = batch_pages % 4;
                    let limits = Limits::DEFAULT
                        .with_bundle_slots(bundle_slots)
                        .with_batch_slots(batch_slots)
                        .with_batch_pages(batch_pages)
                        .with_table_slots(table_slots)
                        .with_free_chunk(free_chunk);
                    open.gather = open.gather.with_limits(&limits);
                    self.gathers.push(open);
                }
            }
            Op::UnmapVmas { gather, ref vmas, within, iterator } => {
                let vmas: Vec<_> = vmas.iter().map(|vma| self.vma(*vma)).collect();
                let (within, Some(mm)) = (self.range(within), self.open(gather).map(|open| open.mm)) else {
                    return Ok(());
                };
                let ranges: Vec<_> = vmas.iter().filter_map(|vma| vma.range.intersect(within)).collect();
                let (covered, mapped) = self.in_range(mm, &ranges);
                let given = vmas.into_iter().enumerate().map(|(place, vma)| {
                    in_between(kernel, mm, place, iterator);
                    vma
                });
                let open = self.open(gather).expect("as before");
                let done = catch_unwind(AssertUnwindSafe(|| open.gather.unmap_vmas(given, within)));
                self.zapped(gather, covered, &mapped, done.is_ok());
                if let Err(panic) = done {
                    resume_unwind(panic);
                }
            }
            Op::ZapVmaRange { gather, vma, within } => {
                let (vma, within) = (self.vma(vma), self.range(within));
                let backing = vma.area;
                self.leaks |= self.places.iter().any(|(address, _, really)| {
                    within.contains(*address) && (*really == Backing::Device) != (backing == Backing::Device)
                });
                let Some(mm) = self.open(gather).map(|open| open.mm) else { return Ok(()) };
                let (covered, mapped) = self.in_range(mm, &[within]);
                let _ = self.open(gather).expect("as before").gather.zap_vma_range(&vma, within);
                self.zapped(gather, covered, &mapped, true);
            }
            Op::Changed { gather, range, level: number } => {
                let range = self.range(range);
                if let Some(open) = self.open(gather) {
                    open.gather.changed(range, level(number));
                }
            }
            Op::Unhook { mm, place } => {
                let (_, mm) = self.mm(mm);
                self.unhooked.extend(kernel.unhook_empty_table(mm, self.place(place).0));
            }
            Op::RemoveTable { gather, table, address } if !self.unhooked.is_empty() => {
                if self.gathers.is_empty() {
                    return Ok(());
                }
                let table = self.unhooked.swap_remove(usize::from(table) % self.unhooked.len());
                let address =
                    if address.bias.is_multiple_of(3) { self.address(address) } else { table.span().start() };
                if let Some(open) = self.open(gather) {
                    open.gather.remove_table(table, address);
                }
            }
            Op::LoseTable { table } if !self.unhooked.is_empty() => {
                drop(self.unhooked.swap_remove(usize::from(table) % self.unhooked.len()));
                self.leaks = true;
            }
            Op::FlushTlbOnly { gather } | Op::FlushMmu { gather } => {
                if let Some(open) = self.open(gather) {
                    if matches!(op, Op::FlushMmu { .. }) {
                        open.gather.flush_mmu();
                    } else {
                        open.gather.flush_tlb_only();
                    }
                    let (mm, gone) = (open.mm, mem::take(&mut open.cleared));
                    self.promise(mm, gone);
                }
            }
            Op::FlushPfnMaps { gather } => {
                self.open(gather).into_iter().for_each(|open| open.gather.flush_pfn_maps());
            }
            Op::NoteDeferred { gather } => {
                self.open(gather).into_iter().for_each(|open| open.gather.note_deferred_flushes());
            }
            Op::NoteDeferredOf { gather, mm, place, level } => {
                if let (Some(view), Some(open)) = (self.view(mm, place, level), self.open(gather)) {
                    open.gather.note_deferred_flushes_of(view);
                }
            }
            Op::FindLargeLeaf { gather, range } => {
                let range = self.range(range);
                let _ = self.open(gather).map(|open| open.gather.find_large_leaf(range));
            }
            Op::Flush { gather } => {
                if let Some(open) = self.take(gather) {
                    self.flushed.push(open.gather.flush());
                    self.promise(open.mm, open.covered);
                }
            }
            Op::DropGather { gather } => {
                if let Some(open) = self.take(gather) {
                    drop(open.gather);
                    self.promise(open.mm, open.covered);
                }
            }
            Op::ForgetGather { gather } => {
                if let Some(open) = self.take(gather) {
                    mem::forget(open.gather);
                    self.leaks = true;
                }
            }
            Op::Free { flushed, how } if !self.flushed.is_empty() => {
                let flushed = self.flushed.swap_remove(usize::from(flushed) % self.flushed.len());
                match how % 8 {
                    0 => {
                        mem::forget(flushed);
                        self.leaks = true;
                    }
                    1..4 => drop(flushed),
                    _ => flushed.free(),
                }
            }
            _ => return self.with_flushes(op),
        }
        Ok(())
    }

    fn with_flushes(&mut self, op: &Op) -> Result<(), String> {
        let kernel = self.kernel;
        match *op {
            Op::RaiseTlbGen { mm } => {
                self.mm(mm).1.context().raise_tlb_gen();
            }
            Op::OweFlush { mm } => self.mm(mm).1.context().owe_flush(),
            Op::AddMm { batch, mm } => {
                let context = self.mm(mm).1.context();
                self.batches[usize::from(batch) % 2].batch.add_mm(kernel, context);
            }
            Op::FlushBatch { batch } => {
                let batch = &mut self.batches[usize::from(batch) % 2];
                let (taken, receipt) = flush_batch(kernel, batch);
                self.receipts.extend(receipt);
                for taken in taken {
                    if taken.still_gone && self.is_empty(taken.mm, taken.address) {
                        self.promised[taken.mm].insert(taken.address);
                    }
                }
            }
            Op::DropBatch { batch } => {
                let batch = &mut self.batches[usize::from(batch) % 2];
                self.leaks |= !batch.taken.is_empty();
                *batch = Batch { batch: UnmapBatch::default(), taken: Vec::new() };
            }
            Op::FlushMm { mm } => self.receipts.push(flush_tlb_mm(kernel, self.mm(mm).1.context())),
            Op::FlushRange { mm, span: (start, end, stride_shift), tables } => {
                let span = PageSpan { start: self.address(start), end: self.address(end), stride_shift };
                let _ = format!("{span}");
                let tables = if tables { FreedTables::Yes } else { FreedTables::No };
                self.receipts.push(flush_tlb_mm_range(kernel, self.mm(mm).1.context(), span, tables));
            }
            Op::FlushPending { mm } => flush_tlb_batched_pending(kernel, self.mm(mm).1.context()),
            Op::LookAtMm { mm, cpu } => {
                let mm = self.mm(mm).1;
                let context = mm.context();
                let _ =
                    (mm.open_gathers(), context.has_deferred_flushes(), context.tlb_gen(), context.root());
                let _ = (context.is_loaded_somewhere(kernel), context.may_be_loaded_somewhere(kernel));
                let state = kernel.cpu_state(CpuId::new(cpu % NR_CPUS));
                let _ = (state.concern(Some(context)), state.is_offline(), state.slots().count());
                let _ = (context.cpumask().len(), context.cpumask().contains(CpuId::new(cpu)));
            }
            Op::MixReceipts { mm } => {
                let context = self.mm(mm).1.context();
                // The newest only; older ones are kept unused, or lost.
                self.receipts.retain(|receipt| !receipt.is_of(context) || receipt.scope().is_none());
                self.receipts.reverse();
            }
            Op::OwnCpuSet { ref cpus } => {
                let mut set = CpuSet::<Bits>::empty();
                set.insert_all(self.mm(0).1.context().cpumask());
                cpus.iter().for_each(|cpu| set.insert(CpuId::new(*cpu)));
                set.clear_all();
                let _ = (set.is_empty(), set.iter().count());
            }
            Op::LookAtTable { mm, place, level, range } => {
                let range = self.range(range);
                let Some(view) = self.view(mm, place, level) else { return Ok(()) };
                let _ =
                    (view.load(range.end()), view.used_lines(kernel), view.used_parts(kernel, range).count());
                let _ = view.used_parts(kernel, range).addresses().count();
                view.prefetch(kernel);
                view.prefetch_entries(kernel, range);
                let _ = (view.entries(range).len(), view.table().entry(usize::from(place) * 3).load());
            }
            Op::LockTable { mm, place, level, entries: (start, end), try_only } => {
                let Some(view) = self.view(mm, place, level) else { return Ok(()) };
                let locked = if try_only { view.try_lock(kernel) } else { Some(view.lock(kernel)) };
                let locked = locked.ok_or("nobody has the lock")?;
                locked.forget_empty_lines(&(start..end));
                let _ = (locked.used_lines(), locked.entry(start as u64).load());
                let _ = Lines::touched_by(&(start..end))
                    .intersect(Lines::inside(&(end..start)))
                    .first_run(&(start..end));
                drop(locked);
                let other = self.view(mm, place, level.wrapping_add(1)).unwrap_or(view);
                let both = view.lock_both(kernel, other);
                both.first().forget_empty_lines(&(start..end));
                both.second().forget_empty_lines(&(start..end));
            }
            Op::Platform { what, address } => self.ask_platform(what, self.address(address)),
            Op::Hook { at, mm, what } => {
                let number = usize::from(mm) % NR_MMS;
                let at = move |event: &Event| match at % 4 {
                    0 => matches!(event, Event::Ipi { .. }),
                    1 => matches!(event, Event::Tlb(TlbEvent::Raised { .. })),
                    2 => matches!(event, Event::Resched),
                    _ => matches!(event, Event::Gather(GatherEvent::Released { .. })),
                };
                kernel.once(at, move |kernel| in_the_middle(kernel, number, what));
            }
            _ => {}
        }
        Ok(())
    }

    /// What the engine asks of a platform, a safe client can ask, too.
    fn ask_platform(&mut self, what: u8, address: u64) {
        let kernel = self.kernel;
        match what % 6 {
            0 => {
                if let Some(page) = kernel.allocate_batch() {
                    kernel.free_batch(page);
                }
            }
            1 => {
                let _lost = kernel.allocate_table();
            }
            2 => kernel.invlpg(address),
            3 => {
                let look = |here| kernel.without_interrupts(|| kernel.cpu_state(here).laziness());
                let _ = kernel.pinned(look);
            }
            4 => kernel.cond_resched(),
            _ => kernel.invalidate_secondary(self.mm(0).1.context().ctx_id(), None),
        }
    }
}

/// What reclaim does when it does it right: it frees the pages after the flush has completed.
pub(crate) fn flush_batch(kernel: &PaperKernel, batch: &mut Batch) -> (Vec<Taken>, Option<Flushed>) {
    let receipt = batch.batch.flush(kernel);
    let taken = mem::take(&mut batch.taken);
    for page in &taken {
        kernel.release(page.frame, 1);
    }
    (taken, receipt)
}

/// What an iterator over areas does while the engine waits for the next one.
fn in_between(kernel: &PaperKernel, mm: usize, place: usize, what: u8) {
    let mm = kernel.mm(mm);
    match what % 16 {
        0 if place == 1 => panic!("{OWN}"),
        1 => {
            mm.context().raise_tlb_gen();
        }
        2 => mm.context().owe_flush(),
        3 => {
            let mut nested = kernel.gather(mm);
            let _ = nested.zap_vma_range(&areas()[0], areas()[0].range);
        }
        4 => drop(flush_tlb_mm(kernel, mm.context())),
        _ => {}
    }
}

/// What another CPU does while the engine is at work; a table lock may be held, for a flush of
/// dirty pages.
fn in_the_middle(kernel: &PaperKernel, mm: usize, what: u8) {
    let mm = kernel.mm(mm);
    match what % 6 {
        0 => {
            mm.context().raise_tlb_gen();
        }
        1 => mm.context().owe_flush(),
        2 => UnmapBatch::<PaperKernel>::new().add_mm(kernel, mm.context()),
        3 if !kernel.is_locked_now() => {
            let mut nested = kernel.gather(mm);
            let _ = nested.zap_vma_range(&areas()[1], areas()[1].range);
        }
        4 if !kernel.is_locked_now() => drop(flush_tlb_mm(kernel, mm.context())),
        5 if !kernel.is_locked_now() => {
            let span = PageSpan { start: GIB, end: GIB + PAGE, stride_shift: 12 };
            drop(flush_tlb_mm_range(kernel, mm.context(), span, FreedTables::No));
        }
        _ => {}
    }
}
