//! Teardown where interrupting another CPU costs something, the same for every row.
//!
//! `x86_64` hands out a flush with each page, and a page may not be used again before its flush, so
//! it pays for each page. `page_table_multiarch` flushes when its cursor goes, after the pages were
//! freed: there is nothing to compare.
#![expect(unsafe_code, reason = "loads address spaces into CPUs that are only played")]

use mmu_gather::Limits;

use crate::engine;
use crate::entry::Meter;
use crate::peers::{Tables, Told, x86_64_flushing};
use mmu_measured::machine::{Batched, Machine};
use mmu_measured::shape::Shape;
use mmu_measured::space::Space;

/// What tears the space down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flusher {
    /// `x86_64`.
    X86_64,
    /// The engine, with this many batch pages of this many slots.
    Engine {
        /// Batch pages; with 0 there are only the eight slots on the stack.
        batch_pages: u16,
        /// Slots of each batch page.
        batch_slots: u16,
    },
}

impl Flusher {
    /// The rows of the table.
    pub const ALL: [Self; 5] = [
        Self::X86_64,
        Self::Engine { batch_pages: 0, batch_slots: 510 },
        Self::Engine { batch_pages: 1, batch_slots: 64 },
        Self::Engine { batch_pages: 1, batch_slots: 510 },
        Self::Engine { batch_pages: 19, batch_slots: 510 },
    ];

    /// The row's name.
    #[must_use]
    pub fn name(self) -> String {
        match self {
            Self::X86_64 => "x86_64 0.15.5, a flush a page".into(),
            Self::Engine { batch_pages: 0, .. } => "mmu-gather: munmap, 8 slots".into(),
            Self::Engine { batch_pages, batch_slots } => {
                format!("mmu-gather: munmap, 8 + {batch_pages} x {batch_slots} slots")
            }
        }
    }
}

/// One sample; returns how many interrupts were sent.
///
/// # Panics
/// If something was not freed.
pub fn flushing_sample(
    machine: &Machine<'_, Batched>,
    shape: &Shape,
    flusher: Flusher,
    meter: &mut impl Meter,
) -> u64 {
    let space = Space::new(machine, shape);
    // SAFETY: the space is boxed, and left below before it goes.
    unsafe { machine.load(&space.mm) };
    let before = machine.counts.ipis.get();
    meter.measure(|| match flusher {
        Flusher::X86_64 => x86_64_flushing(machine, &space, Told::Areas, Tables::Freed, 1),
        Flusher::Engine { batch_pages, batch_slots } => {
            engine::munmap(
                machine,
                &space,
                &Limits::DEFAULT.with_batch_pages(batch_pages).with_batch_slots(batch_slots),
            );
        }
    });
    let interrupts = machine.counts.ipis.get() - before;
    space.check(machine, shape.nr_leaves(), space.nr_tables());
    machine.leave();
    interrupts
}
