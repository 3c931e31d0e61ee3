//! The work that any machine can do (`Stage`), done on real page tables and counted.

use alloc::string::{String, ToString};
use core::str;

use mmu_gather::pagetable::VirtRange;
use mmu_gather::tlb::CpuId;
use mmu_kernel_shim::{FaultError, Kernel, Mm, Snapshot, Stage, UserAccess, drill, plan};

use crate::arch::phys_map::FRAME_BYTES;
use crate::cpu::agent::{Program, Task};
use crate::cpu::index::{CpuIndex, CpuMask};
use crate::cpu::percpu::online;
use crate::cpu::{smp, watchdog};
use crate::machine::BareMachine;
use crate::println;
use crate::workloads::program::{self, BareKernel, TaskEnd};

/// The kernel, with CPUs that work one at a time.
pub(crate) struct BareStage<'a>(pub(crate) &'a BareKernel);

impl Stage for BareStage<'_> {
    type Machine = BareMachine;

    fn kernel(&self) -> &Kernel<BareMachine> {
        self.0
    }

    fn on_cpu(&self, cpu: CpuId, work: &(dyn Fn() + Sync)) {
        smp::on_cpus(CpuMask::only(CpuIndex::new(cpu.number())), &|_| work());
    }

    fn touch(
        &self,
        mm: &Mm<BareMachine>,
        range: VirtRange,
        access: UserAccess,
    ) -> Result<(), (u64, FaultError)> {
        let task = Task {
            program: if access == UserAccess::Write { Program::Write } else { Program::Read },
            first: range.start(),
            stride_bytes: FRAME_BYTES,
            nr_words: range.nr_pages(),
            value: 1,
            step: 0,
        };
        match program::run_task(self.0, mm, task) {
            TaskEnd::Done(_) => Ok(()),
            TaskEnd::Signal(address, error) => Err((address, error)),
        }
    }
}

/// Does the fixed piece of work and prints what it counted.
///
/// # Errors
///
/// Why it could not be done.
pub(crate) fn run_drill(kernel: &BareKernel) -> Result<u64, String> {
    watchdog::note(&"the drill");
    let counted = drill(&BareStage(kernel)).map_err(|failure| failure.to_string())?;
    print_counts("drill", &counted);
    program::load_code(kernel).map_err(|error| error.to_string())?;
    // The drill has two processes.
    Ok(2)
}

/// Builds the address space that `text` describes, takes it down, and prints what was counted.
///
/// # Errors
///
/// Why it could not be done.
pub(crate) fn run_layout(kernel: &BareKernel, text: &[u8]) -> Result<u64, String> {
    watchdog::note(&"the layout");
    let text = str::from_utf8(text).map_err(|error| error.to_string())?;
    let planned = plan::build(kernel, text).map_err(|error| error.to_string())?;
    println!("layout: areas={} pages={}", planned.areas.len(), planned.nr_pages);
    let done = plan::take_down(&BareStage(kernel), &planned);
    let counted = done.map_err(|failure| failure.to_string())?;
    print_counts("layout", &counted);
    program::load_code(kernel).map_err(|error| error.to_string())?;
    Ok(1)
}

/// Prints every counter on one line.
fn print_counts(what: &str, counted: &Snapshot) {
    struct Pairs<'a>(&'a Snapshot);
    impl core::fmt::Display for Pairs<'_> {
        fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
            for (name, value) in self.0.fields() {
                write!(f, " {name}={value}")?;
            }
            Ok(())
        }
    }
    println!("count: of={what} cpus={}{}", online().count(), Pairs(counted));
}
