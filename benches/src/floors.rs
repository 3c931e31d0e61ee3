//! Hand-written lower bounds: what the work costs if nothing has to be looked up.
//!
//! Each floor is told beforehand which tables have entries and which are freed; it takes no lock,
//! raises no generation and flushes nothing. It works on a table at a time, and on a cache line (8
//! entries) at a time where that helps.
#![expect(unsafe_code, reason = "clears entries by pointer")]

use core::hint::black_box;
use core::sync::atomic::{AtomicU64, Ordering};

use mmu_measured::machine::{Batched, Counting, Machine};
use mmu_measured::memory::{Memory, pointer};
use mmu_measured::space::{Space, Stretch};

const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const PRESENT: u64 = 1;
const LINE: usize = 8;
/// How far ahead metadata is fetched; 16 to 32 are best where it misses.
const PREFETCH: usize = 16;

/// How entries are cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clear {
    /// Loads and stores: nobody else can touch the tables.
    Plain,
    /// A locked exchange each, as hardware may set A and D until that instant.
    Exchange,
}

/// Clears entries and appends their frames to a buffer that is used again for each table; nothing
/// else.
#[inline(never)]
pub fn clear_only(space: &Space<'_>) {
    let mut frames = Vec::with_capacity(512);
    for stretch in &space.stretches {
        frames.clear();
        take(*stretch, Clear::Plain, &mut frames);
        black_box(&frames);
    }
}

/// Clears entries, drops both counts of each frame and puts it on the free list, then unhooks and
/// frees the tables.
///
/// A batch is what one table held. For 2 MiB leaves it is an eighth of that, and metadata is not
/// fetched ahead: that of neighbours lies 16 KiB apart, in one set of the first-level cache.
#[inline(never)]
pub fn tear_down<C: Counting>(machine: &Machine<'_, C>, space: &Space<'_>, clear: Clear) {
    let huge = space.shape.level > mmu_gather::pagetable::Level::Pte;
    let batch = if huge { 64 } else { 512 };
    let mut frames = Vec::with_capacity(512);
    for stretch in &space.stretches {
        let mut first = stretch.first;
        while first < stretch.end {
            let end = stretch.end.min(first + batch);
            frames.clear();
            take(Stretch { first, end, ..*stretch }, clear, &mut frames);
            release(machine.memory(), &frames, huge);
            first = end;
        }
    }
    for link in &space.links {
        let entry = entry(link.parent, link.index);
        // SAFETY: inside the parent's page, which no one else uses while a floor runs.
        unsafe { entry.write(0) };
        machine.memory().free_table(link.table);
    }
}

/// What all CPUs share of an address space, each on a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Shared(AtomicU64);

/// One call at a time, with everything that the protocol asks of a CPU that is not alone: it counts
/// itself in, goes down from the root, locks the table, clears the entries, raises the generation,
/// looks who has the space loaded, invalidates the pages here, frees them, counts itself out.
/// Written out for this one case: four levels, areas inside one table, pages that programs have
/// written to. The frames wait in `frames` meanwhile. Where the table goes, it is unhooked under
/// the lock of the one above, counted, and freed last; otherwise it stays.
#[inline(never)]
pub fn unmap_one_by_one<C: Counting>(machine: &Machine<'_, C>, space: &Space<'_>) {
    let mut frames = Vec::with_capacity(512);
    let [gathers, generation, loaded, tables] = [const { Shared(AtomicU64::new(0)) }; 4];
    let [gathers, generation, loaded, tables] = black_box([&gathers.0, &generation.0, &loaded.0, &tables.0]);
    let tables_go = space.shape.tables_go_one_by_one();
    let memory = machine.memory();
    let root = space.mm.space().root().start_address().as_u64();
    for area in &space.shape.areas {
        gathers.fetch_add(1, Ordering::Relaxed);
        let (mut above, mut table) = (root, root);
        for shift in [39, 30, 21] {
            let link = entry(table, index_of(area.start(), shift));
            // SAFETY: an entry of a table that no one else uses while a floor runs.
            (above, table) = (table, unsafe { link.read() } & ADDRESS);
        }
        let first = index_of(area.start(), 12);
        let end = first + index_of(area.end() - area.start(), 12);
        let locked = memory.frame(table).lock().lock();
        frames.clear();
        take(Stretch { table, first, end }, Clear::Plain, &mut frames);
        drop(locked);
        if tables_go {
            let locked = memory.frame(above).lock().lock();
            // SAFETY: as above.
            unsafe { entry(above, index_of(area.start(), 21)).write(0) };
            drop(locked);
            tables.fetch_sub(1, Ordering::Relaxed);
        }
        black_box(generation.fetch_add(1, Ordering::SeqCst));
        if loaded.load(Ordering::SeqCst) != 0 {
            return;
        }
        machine.counts.invlpgs.set(machine.counts.invlpgs.get() + (end - first) as u64);
        let mut chain = memory.chain_start();
        for frame in &frames {
            chain = release_one(memory, *frame, chain);
        }
        memory.free_chain(chain);
        if tables_go {
            memory.free_table(table);
        }
        gathers.fetch_sub(1, Ordering::Release);
    }
}

#[inline(always)]
const fn index_of(address: u64, shift: u32) -> usize {
    (address >> shift & 511) as usize
}

fn release(memory: &Memory, frames: &[u64], huge: bool) {
    let mut chain = memory.chain_start();
    if huge {
        for frame in frames {
            chain = release_one(memory, *frame, chain);
        }
        memory.free_chain(chain);
        return;
    }
    for frame in frames.iter().take(PREFETCH) {
        memory.prefetch(*frame);
    }
    let ahead = frames.get(PREFETCH..).unwrap_or_default();
    let (now, last) = frames.split_at(ahead.len());
    for (frame, later) in now.iter().zip(ahead) {
        memory.prefetch(*later);
        chain = release_one(memory, *frame, chain);
    }
    for frame in last {
        chain = release_one(memory, *frame, chain);
    }
    memory.free_chain(chain);
}

/// Drops both counts of a page. A page without references is put in front of `chain`. Returns the
/// first page of the chain.
#[inline(always)]
fn release_one(memory: &Memory, physical: u64, chain: u64) -> u64 {
    if Batched::released(memory.frame(physical)) { memory.chain(physical, chain) } else { chain }
}

/// Takes the frames out of the entries of `stretch`.
#[inline(always)]
fn take(stretch: Stretch, clear: Clear, frames: &mut Vec<u64>) {
    let mut index = stretch.first;
    while index < stretch.end {
        if index.is_multiple_of(LINE) && index + LINE <= stretch.end {
            take_line(entry(stretch.table, index), clear, frames);
            index += LINE;
        } else {
            take_one(entry(stretch.table, index), clear, frames);
            index += 1;
        }
    }
}

#[inline(always)]
fn take_line(entry: *mut u64, clear: Clear, frames: &mut Vec<u64>) {
    let line = entry.cast::<[u64; LINE]>();
    // SAFETY: eight entries of a table that no one else uses while a floor runs.
    let mut values = unsafe { line.read() };
    if values.iter().fold(PRESENT, |all, value| all & value) == 0 {
        if values.iter().fold(0, |any, value| any | value) != 0 {
            for offset in 0..LINE {
                take_one(entry.wrapping_add(offset), clear, frames);
            }
        }
        return;
    }
    match clear {
        // SAFETY: as above.
        Clear::Plain => unsafe { line.write([0; LINE]) },
        Clear::Exchange => values = core::array::from_fn(|offset| exchange(entry.wrapping_add(offset))),
    }
    frames.extend_from_slice(&values.map(|value| value & ADDRESS));
}

#[inline(always)]
fn take_one(entry: *mut u64, clear: Clear, frames: &mut Vec<u64>) {
    // SAFETY: an entry of a table that no one else uses while a floor runs.
    let value = unsafe { entry.read() };
    if value & PRESENT == 0 {
        return;
    }
    let value = match clear {
        Clear::Plain => {
            // SAFETY: as above.
            unsafe { entry.write(0) };
            value
        }
        Clear::Exchange => exchange(entry),
    };
    frames.push(value & ADDRESS);
}

#[inline(always)]
fn exchange(entry: *mut u64) -> u64 {
    // SAFETY: an entry of a table that no one else uses while a floor runs; aligned to 8.
    let shared = unsafe { AtomicU64::from_ptr(entry) };
    shared.swap(0, Ordering::AcqRel)
}

#[inline(always)]
fn entry(table: u64, index: usize) -> *mut u64 {
    pointer(table).cast::<u64>().wrapping_add(index)
}
