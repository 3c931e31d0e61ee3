//! The fixed piece of work: clean under the checker, and the same numbers whatever the machine
//! chooses.

use mmu_adapter::HostedStage;
use mmu_gather::tlb::PcidSupport;
use mmu_hosted::{HostedMachine, Options};
use mmu_kernel_shim::{Config, Snapshot, Stage, drill, plan};

fn stage(nr_cpus: u32, pcid: PcidSupport, seed: u64) -> HostedStage {
    let options = Options { pcid, ..Options::new(nr_cpus, 16384, seed) };
    let machine = HostedMachine::new(options).expect("a small machine");
    HostedStage::boot(machine, Config::default()).expect("it has frames")
}

fn count(nr_cpus: u32, pcid: PcidSupport, seed: u64) -> Snapshot {
    let stage = stage(nr_cpus, pcid, seed);
    let counted = drill(&stage).expect("there is memory enough");
    let found = stage.kernel().machine().violations();
    assert_eq!(found.count, 0, "{:?}", found.told.first());
    assert_eq!(stage.kernel().lost(), (0, 0), "everything was given back");
    counted
}

#[test]
fn the_drill_counts_the_same_whatever_the_seed() {
    for nr_cpus in [1, 2, 4, 8] {
        for pcid in [PcidSupport::Off, PcidSupport::On] {
            assert_eq!(count(nr_cpus, pcid, 1), count(nr_cpus, pcid, 2), "{nr_cpus} CPUs, PCIDs {pcid:?}");
        }
    }
}

#[test]
fn one_cpu_never_interrupts_and_more_do() {
    assert_eq!(count(1, PcidSupport::Off, 1).ipis_sent, 0);
    let counted = count(4, PcidSupport::Off, 1);
    assert!(counted.ipis_sent > 0 && counted.ipis_saved_lazy > 0 && counted.ipis_saved_elsewhere > 0);
    assert!(counted.lazy_left > 0 && counted.dirty_flushes > 0 && counted.splits > 0);
}

#[test]
fn a_plan_is_built_and_taken_down_without_a_trace() {
    let text = "area 10000000-10400000 w anon\nfill 10000000-10400000 anon\n\
                area 20000000-20010000 r private:1\nfill 20000000-20008000 file\nfill 20008000-20009000 zero\n\
                area 30000000-30008000 w shared:2\nfill 30000000-30004000 file-dirty\n\
                area 40000000-40800000 w anon grows\nfill 40000000-40400000 anon-block\nfill 40400000-40401000 swap\n\
                area 50000000-50001000 - pfn\nfill 50000000-50001000 pfn\n";
    let stage = stage(3, PcidSupport::Off, 1);
    let planned = plan::build(stage.kernel(), text).expect("a good plan");
    assert_eq!((planned.areas.len(), planned.nr_pages), (5, 1024 + 8 + 1 + 4 + 1024 + 1));
    let counted = plan::take_down(&stage, &planned).expect("there is memory enough");
    assert!(counted.ipis_sent > 0 && counted.pte_tables > 0);
    assert_eq!(stage.kernel().machine().violations().count, 0);
    assert_eq!((stage.kernel().lost(), stage.kernel().swap_slots()), ((0, 0), 0));
}

#[test]
fn a_plan_that_cannot_be_built_names_the_line() {
    let stage = stage(1, PcidSupport::Off, 1);
    let text = "area 10000000-10400000 w anon\nfill 10000000-10400000 wool\n";
    assert_eq!(plan::build(stage.kernel(), text).err(), Some(plan::PlanError::Line(2)));
    stage.kernel().drop_caches();
    assert_eq!(stage.kernel().lost(), (0, 0));
}
