//! Limits that fit what is about to be torn down: as few flushes as with the default, and less
//! memory waiting.

use mmu_gather::{GatherEvent, Limits};
use mmu_tests::{Event, Options, PaperKernel};

/// Forced flushes of a teardown of `nr_pages`, and whether any flush released more than
/// `most_waiting` pages.
fn tear_down(nr_pages: u64, limits: &Limits, most_waiting: u64) -> (usize, bool) {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    kernel.remove_single_pages(mm, limits, nr_pages);
    assert_eq!(kernel.ledger().nr_held(), 0, "{nr_pages} pages, {limits:?}");
    let forced = kernel.count(|event| *event == Event::Gather(GatherEvent::ForcedFlush));
    let beyond = kernel.count(
        |event| matches!(event, Event::Gather(GatherEvent::Released { slots, .. }) if *slots > most_waiting),
    );
    (forced, beyond > 0)
}

#[test]
fn limits_for_a_number_of_pages_force_as_few_flushes_as_the_default_and_hold_an_equal_share() {
    for nr_pages in
        (0..20).chain([515, 516, 517, 1025, 9677, 9678, 9679, 10_000, 19_355, 19_356, 32_768, 100_000])
    {
        let limits = Limits::for_pages(nr_pages);
        let (default, _) = tear_down(nr_pages, &Limits::DEFAULT, u64::MAX);
        let share = nr_pages / (default as u64 + 1) + 1;
        // All batches have the same length, which is rounded up, by less than a slot for each of at
        // most 19 batches.
        let (forced, beyond) = tear_down(nr_pages, &limits, share + 18);
        assert_eq!(forced, default, "{nr_pages} pages, {limits:?}");
        assert!(!beyond, "{nr_pages} pages: a flush held more than {share} pages and 18, {limits:?}");
    }
}

#[test]
fn limits_for_a_number_of_pages_are_legal_and_never_exceed_the_default() {
    for nr_pages in (0..30_000).chain([1 << 18, 1 << 40, u64::MAX]) {
        let limits = Limits::for_pages(nr_pages);
        assert_eq!(limits, limits.clamped(), "{nr_pages} pages");
        assert!(limits.batch_pages <= Limits::DEFAULT.batch_pages, "{nr_pages} pages: {limits:?}");
    }
}
