//! The main job: a layout is built, used by all CPUs, and taken down munmap by munmap, then by
//! exit.

use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use core::time::Duration;
use std::sync::Arc;
use std::time::Instant;

use bumpalo::Bump;
use mmu_adapter::{HostedKernel, HostedMm, boot, touch};
use mmu_gather::pagetable::VirtRange;
use mmu_gather::tlb::CpuId;
use mmu_hosted::{Checking, Choices, HostedMachine, Schedule, give_way};
use mmu_kernel_shim::{Area, Machine, Seam, UserAccess, Vma};

use crate::input::layout::Layout;
use crate::output::report::{LayoutReport, Report};
use crate::run::hosted_process::{BuildError, HostedProcess, frames_needed};
use crate::run::pass::{PassResult, RunOptions, run_passes};

/// Touches by each CPU before the teardown begins.
const TOUCHES: u64 = 4000;
/// Of eight areas, this many go by munmap and the rest by exit.
const MUNMAPPED: u64 = 6;

/// Builds `layout` and takes it down, once timed and once checked, and adds what was found to
/// `report`.
///
/// # Errors
/// [`BuildError`] if it cannot be built.
pub fn run_layout(layout: &Layout, options: &RunOptions, report: &mut Report) -> Result<(), BuildError> {
    run_passes(options, report, |checking| Ok(Pass::new(layout, options, checking)?.run()))
}

/// One machine, one process, one teardown.
struct Pass {
    name: String,
    nr_pages: u64,
    kernel: Arc<HostedKernel>,
    process: Arc<HostedProcess>,
    /// Another process, which CPUs switch to now and then.
    bystander: Arc<HostedMm>,
    seed: u64,
}

/// Where the bystander has its memory.
const BYSTANDER: u64 = 0x1000_0000;
const BYSTANDER_PAGES: u64 = 64;

impl Pass {
    fn new(layout: &Layout, options: &RunOptions, checking: Checking) -> Result<Self, BuildError> {
        let machine = HostedMachine::new(options.machine(checking, frames_needed(layout)))?;
        let error = |source| BuildError::Kernel { name: layout.name.clone(), start: 0, end: 0, source };
        let kernel = boot(&Arc::new(machine), options.config(checking)).map_err(error)?;
        let bystander = kernel.new_mm().map_err(error)?;
        if let Ok(range) = VirtRange::new(BYSTANDER, BYSTANDER + BYSTANDER_PAGES * 4096) {
            kernel.mmap(&bystander, Vma { range, area: Area::anon() }).map_err(error)?;
        }
        let process = HostedProcess::build(&kernel, layout)?;
        Ok(Self {
            name: layout.name.clone(),
            nr_pages: layout.totals().nr_present(),
            kernel,
            process: Arc::new(process),
            bystander,
            seed: options.seed,
        })
    }

    fn run(self) -> PassResult {
        let before = self.kernel.counters().snapshot();
        let teardown = match self.kernel.machine().options().checking {
            Checking::On => self.run_checked(),
            Checking::Off => self.run_timed(),
        };
        let after = self.kernel.counters().snapshot();
        // The bystander's own teardown is not part of the report.
        let _gone = self.kernel.exit(&self.bystander);
        let report = LayoutReport::between(
            &self.name,
            self.process.areas.len() as u64,
            self.nr_pages,
            &before,
            &after,
        );
        PassResult::from_kernel(&self.kernel, report, teardown)
    }

    /// CPU 0 takes the process down while programs on the other CPUs use it.
    fn run_checked(&self) -> Duration {
        let machine = Arc::clone(self.kernel.machine());
        let nr_cpus = machine.nr_cpus();
        let shared = Arc::new(Programs {
            kernel: Arc::clone(&self.kernel),
            process: Arc::clone(&self.process),
            bystander: Arc::clone(&self.bystander),
            stop: AtomicBool::new(false),
            parked: AtomicU32::new(0),
        });
        let mut schedule = Schedule::new();
        for number in 1..nr_cpus {
            let shared = Arc::clone(&shared);
            schedule.spawn(CpuId::new(number), move || shared.program());
        }
        let seed = self.seed;
        schedule.spawn(CpuId::new(0), move || {
            let kernel = &shared.kernel;
            kernel.switch_to(Some(&shared.process.mm));
            for _ in 0..TOUCHES {
                shared.touch_something();
            }
            let mut time = Duration::ZERO;
            Teardown::plan(&shared.process, seed, &Bump::new()).run(
                kernel,
                &shared.process,
                &mut time,
                || {
                    shared.touch_something();
                },
            );
            shared.stop.store(true, Ordering::Relaxed);
            while shared.parked.load(Ordering::Relaxed) < nr_cpus - 1 {
                give_way();
            }
            kernel.go_lazy();
            let exited = kernel.exit(&shared.process.mm);
            assert!(exited.is_ok(), "all programs are parked: {exited:?}");
            kernel.switch_to(None);
        });
        machine.run(schedule);
        Duration::ZERO
    }

    /// CPU 0 takes the process down; the others have it loaded and answer at once.
    fn run_timed(&self) -> Duration {
        let (kernel, machine) = (&self.kernel, self.kernel.machine());
        for number in 0..machine.nr_cpus() {
            machine.on_cpu(CpuId::new(number), || {
                kernel.switch_to(Some(&self.process.mm));
                // As in the checked pass one CPU is lazy.
                if number == 3 {
                    kernel.go_lazy();
                }
            });
        }
        let arena = Bump::new();
        let teardown = Teardown::plan(&self.process, self.seed, &arena);
        let mut time = Duration::ZERO;
        teardown.run(kernel, &self.process, &mut time, || {});
        for number in 0..machine.nr_cpus() {
            machine.on_cpu(CpuId::new(number), || kernel.go_lazy());
        }
        let start = Instant::now();
        let exited = kernel.exit(&self.process.mm);
        time += start.elapsed();
        assert!(exited.is_ok(), "every CPU is lazy: {exited:?}");
        for number in 0..machine.nr_cpus() {
            machine.on_cpu(CpuId::new(number), || kernel.switch_to(None));
        }
        time
    }
}

/// What the programs on all CPUs share.
struct Programs {
    kernel: Arc<HostedKernel>,
    process: Arc<HostedProcess>,
    bystander: Arc<HostedMm>,
    stop: AtomicBool,
    parked: AtomicU32,
}

impl Programs {
    /// A program: touches memory, now and then gives its CPU to a kernel thread or to another
    /// process.
    fn program(&self) {
        let (kernel, machine) = (&self.kernel, self.kernel.machine());
        let choices = machine.choices();
        kernel.switch_to(Some(&self.process.mm));
        while !self.stop.load(Ordering::Relaxed) {
            match choices.below(48) {
                0 => {
                    kernel.go_lazy();
                    for _ in 0..choices.below(256) {
                        machine.seam(Seam::Lock);
                    }
                    kernel.switch_to(Some(&self.process.mm));
                }
                1 => {
                    kernel.switch_to(Some(&self.bystander));
                    let page = BYSTANDER + (choices.below(BYSTANDER_PAGES) << 12);
                    touch(kernel, &self.bystander, page, UserAccess::Write);
                    kernel.switch_to(Some(&self.process.mm));
                }
                _ => self.touch_something(),
            }
            machine.seam(Seam::Lock);
        }
        // Half of them leave, the others stay lazily.
        if choices.one_in(2) {
            kernel.switch_to(None);
        } else {
            kernel.go_lazy();
        }
        self.parked.fetch_add(1, Ordering::Relaxed);
    }

    /// Touches a page that was mapped when the process began. If it is gone by now, the program
    /// gets its signal.
    fn touch_something(&self) {
        let choices = self.kernel.machine().choices();
        let mapped = &self.process.mapped;
        if mapped.is_empty() {
            return;
        }
        let run = mapped[choices.pick(mapped.len())];
        let page = run.start() + (choices.below(run.nr_pages()) << 12);
        let access = if choices.one_in(2) { UserAccess::Read } else { UserAccess::Write };
        touch(&self.kernel, &self.process.mm, page, access);
    }
}

/// Which areas go by munmap, in which order and in how many pieces.
struct Teardown<'a> {
    munmaps: bumpalo::collections::Vec<'a, VirtRange>,
}

impl<'a> Teardown<'a> {
    fn plan(process: &HostedProcess, seed: u64, arena: &'a Bump) -> Self {
        let choices = Choices::new(seed);
        let mut munmaps = bumpalo::collections::Vec::new_in(arena);
        for area in &process.areas {
            if choices.below(8) >= MUNMAPPED {
                continue;
            }
            // One area in eight goes in two pieces, cut anywhere: inside a large page, perhaps.
            let cut = area.start() + (choices.below(area.nr_pages()) << 12);
            let halves = (VirtRange::new(area.start(), cut), VirtRange::new(cut, area.end()));
            match halves {
                (Ok(low), Ok(high)) if choices.one_in(8) => munmaps.extend([high, low]),
                _ => munmaps.push(*area),
            }
        }
        for last in (1..munmaps.len()).rev() {
            munmaps.swap(last, choices.pick(last + 1));
        }
        Self { munmaps }
    }

    fn run(&self, kernel: &HostedKernel, process: &HostedProcess, time: &mut Duration, between: impl Fn()) {
        for range in &self.munmaps {
            kernel.machine().point_at(range.start());
            let start = Instant::now();
            let unmapped = kernel.munmap(&process.mm, *range);
            *time += start.elapsed();
            assert!(unmapped.is_ok(), "the machine has memory to spare: {unmapped:?}");
            between();
        }
    }
}
