//! `memory_set`, the areas of ArceOS as published, on the engine: under the conformance kit, with
//! three mistakes that it must find, and against a model that knows pages and nothing else.

mod glue;
mod kit;
mod model;
#[path = "../kit_runs/mod.rs"]
mod runs;
mod wrong;

use mmu_hosted::ViolationKind;

use glue::Backed;
use kit::Layer;
use runs::{Finding, Saved};
use wrong::{FreedBeforeFlush, NeighboursForgotten, NeverFlushed, Wrong};

#[test]
fn the_kit_finds_nothing_wrong_and_every_call_comes_up() {
    let report = runs::clean(Layer::<Backed>::boot);
    for word in ["map", "unmap", "protect", "exit", "touch", "switch", "lazy", "offline", "batches", "tables"]
    {
        let tally = report.calls.of(word);
        assert!(tally.done > 50 && tally.skipped == 0, "{word}: {tally:?}");
    }
    for word in ["fork", "remap", "movestack", "reclaim", "guard", "populate", "discard"] {
        let tally = report.calls.of(word);
        assert!(tally.done == 0 && tally.skipped > 5, "{word}: {tally:?}");
    }
}

const FREED_BEFORE_FLUSH: Saved = Saved {
    file: "memory_set/freed-before-flush.sequence",
    finding: Finding::Violation(ViolationKind::PageReachableAfterFree),
};
const NEVER_FLUSHED: Saved = Saved {
    file: "memory_set/never-flushed.sequence",
    finding: Finding::Violation(ViolationKind::PageReachableAfterFree),
};
const NEIGHBOURS_FORGOTTEN: Saved =
    Saved { file: "memory_set/neighbours-forgotten.sequence", finding: Finding::TableFreedWithEntries };

#[test]
fn a_backend_that_frees_before_it_flushes_is_found() {
    FREED_BEFORE_FLUSH.is_found_in(Layer::<Wrong<FreedBeforeFlush>>::boot);
}

#[test]
fn a_backend_that_never_flushes_is_found() {
    NEVER_FLUSHED.is_found_in(Layer::<Wrong<NeverFlushed>>::boot);
}

#[test]
fn a_backend_that_forgets_the_neighbours_is_found() {
    NEIGHBOURS_FORGOTTEN.is_found_in(Layer::<Wrong<NeighboursForgotten>>::boot);
}

#[test]
fn what_was_found_in_the_mistakes_is_clean_without_them() {
    for saved in [FREED_BEFORE_FLUSH, NEVER_FLUSHED, NEIGHBOURS_FORGOTTEN] {
        runs::replayed_clean(saved.file, Layer::<Backed>::boot);
    }
}
