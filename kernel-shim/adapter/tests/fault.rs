//! What the small kernel's faults promise to threads that fault at the same time.

use core::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use mmu_adapter::{HostedStage, Touched, touch};
use mmu_gather::pagetable::VirtRange;
use mmu_gather::tlb::CpuId;
use mmu_hosted::{HostedMachine, Options, Schedule};
use mmu_kernel_shim::{Area, Config, Stage, UserAccess, Vma};
use x86_64::structures::paging::PhysFrame;

const PAGE: u64 = 0x7000_0000_0000;
const CPUS: u32 = 3;

/// The frames that the threads' writes reached, and then the one that is mapped in the end.
fn frames_written(seed: u64) -> (Vec<PhysFrame>, PhysFrame) {
    let machine = HostedMachine::new(Options::new(CPUS, 4096, seed)).expect("a small machine");
    let stage = Rc::new(HostedStage::boot(machine, Config::default()).expect("it has frames"));
    let kernel = stage.kernel();
    let mm = kernel.new_mm().expect("it has frames");
    let range = VirtRange::new(PAGE, PAGE + 4096).expect("a good range");
    kernel.mmap(&mm, Vma { range, area: Area::anon() }).expect("nothing is there");
    for number in 0..CPUS {
        stage.on_cpu(CpuId::new(number), &|| kernel.switch_to(Some(&mm)));
    }
    // All have the page of zeroes.
    assert_eq!(touch(kernel, &mm, PAGE, UserAccess::Read), Touched::Reached);
    let frames = Rc::new(RefCell::new(Vec::new()));
    let mut schedule = Schedule::new();
    for number in 0..CPUS {
        let (stage, mm, frames) = (Rc::clone(&stage), Arc::clone(&mm), Rc::clone(&frames));
        schedule.spawn(CpuId::new(number), move || {
            let machine = stage.kernel().machine();
            loop {
                if let Ok(Some(frame)) = machine.user_access(PAGE, UserAccess::Write) {
                    frames.borrow_mut().push(frame);
                    return;
                }
                stage.kernel().handle_fault(&mm, PAGE, UserAccess::Write).expect("the area may be written");
            }
        });
    }
    kernel.machine().run(schedule);
    let last = kernel.machine().user_access(PAGE, UserAccess::Read).expect("it is mapped");
    let written = frames.borrow().clone();
    (written, last.expect("the machine is checked"))
}

/// Once, a thread that had seen the page of zeroes removed whatever was there by the time it got to
/// it: the new page of a faster thread, with what that one had written.
#[test]
fn a_fault_never_removes_what_another_thread_has_written() {
    for seed in 0..300 {
        let (written, last) = frames_written(seed);
        assert!(
            written.iter().all(|frame| *frame == last),
            "seed {seed}: wrote to {written:?}, left {last:?}"
        );
    }
}
