//! A kernel that does more than it has promised is named, by the call and what it did; the small
//! kernel does not.

use std::sync::Arc;

use mmu_adapter::ShimKernel;
use mmu_gather::Limits;
use mmu_hosted::{CostPromise, HostedMachine, Sequence, Trial, ViolationKind, execute};
use mmu_kernel_shim::Config;

const PROMISED: CostPromise =
    CostPromise { limits: Limits::DEFAULT, flush_ceiling: mmu_gather::tlb::SINGLE_PAGE_FLUSH_CEILING };

/// What is found of a sequence on the small kernel, booted so, which has promised so much.
fn found(lines: &str, config: Config, promise: CostPromise) -> Vec<(ViolationKind, String)> {
    let text = format!("mmu-gather sequence 1\ncpus 2\nseed 1\nmmu pcid intel keeper\n{lines}end\n");
    let sequence = Sequence::parse(&text).expect("a sequence");
    let boot =
        |machine: &Arc<HostedMachine>| Ok(ShimKernel::boot(machine, config)?.with_promised_cost(promise));
    let outcome = execute(&sequence, Trial::default(), boot).expect("memory");
    outcome.found.told.iter().map(|violation| (violation.kind, violation.to_string())).collect()
}

const THREE_PAGES: &str = "0 map m0 40000000+8 anon write\n0 switch m0\n0 touch 40000000+8 write\n0 sync\n\
                           0 unmap m0 40000000+3\n0 sync\n";

#[test]
fn a_kernel_that_keeps_its_promise_is_not_named() {
    assert_eq!(found(THREE_PAGES, Config::default(), PROMISED), []);
}

#[test]
fn a_munmap_of_three_pages_that_flushes_everything_is_named() {
    let config = Config { flush_ceiling: 0, ..Config::default() };
    let found = found(THREE_PAGES, config, PROMISED);
    let (kind, words) = found.first().expect("it is found");
    assert_eq!(*kind, ViolationKind::WholeFlushForPages);
    let sentence = "this munmap of 3 pages in address space";
    assert!(words.contains(sentence) && words.contains("flushed the whole address space"), "{words}");
    assert!(words.contains("the sequence, unmap m0 0x40000000..0x40003000, begins"), "its story: {words}");
}

#[test]
fn a_munmap_that_flushes_more_often_than_its_promised_queues_explain_is_named() {
    // It queues three pages, and has promised to queue all it is asked for.
    let limits = Limits::DEFAULT.with_bundle_slots(4).with_batch_pages(0);
    let lines = "0 map m0 40000000+32 anon write\n0 switch m0\n0 touch 40000000+32 write\n0 sync\n\
                 0 unmap m0 40000000+30\n0 sync\n";
    let found = found(lines, Config { limits, ..Config::default() }, PROMISED);
    let (kind, words) = found.first().expect("it is found");
    assert_eq!(*kind, ViolationKind::TooManyFlushes);
    assert!(words.contains("this munmap of 30 pages") && words.contains("has asked for"), "{words}");
}

#[test]
fn a_munmap_that_takes_more_batch_pages_than_its_promised_queues_need_is_named() {
    let limits = Limits::DEFAULT.with_bundle_slots(2).with_batch_slots(4);
    let lines = "0 map m0 40000000+32 anon write\n0 switch m0\n0 touch 40000000+32 write\n0 sync\n\
                 0 unmap m0 40000000+30\n0 sync\n";
    let found = found(lines, Config { limits, ..Config::default() }, PROMISED);
    let (kind, words) = found.first().expect("it is found");
    assert_eq!(*kind, ViolationKind::TooManyBatchPages);
    assert!(words.contains("this munmap of 30 pages"), "{words}");
}
