//! The main job: a layout is built, used by all CPUs, and taken down munmap by munmap, then by exit.

use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use core::time::Duration;
use std::sync::Arc;
use std::time::Instant;

use bumpalo::Bump;
use mmu_gather::Limits;
use mmu_gather::pagetable::VirtRange;
use mmu_gather::tlb::CpuId;
use mmu_hosted::{
    Checking, Choices, HostedKernel, HostedMachine, MachineFault, Options, Schedule, give_way, touch,
};
use mmu_kernel_shim::{Area, Config, Kernel, Machine, Misbehaviour, Seam, Supply, UserAccess, Vma};

use crate::input::layout::Layout;
use crate::output::report::{LayoutReport, Lost, Report};
use crate::run::hosted_process::{BuildError, HostedMm, HostedProcess, frames_needed};

/// How layouts are run.
#[derive(Clone, Copy, Debug)]
pub struct RunOptions {
    /// CPUs of the machine, 1 to 64.
    pub nr_cpus: u32,
    /// Decides the order of the munmaps, what programs touch, and how CPUs interleave.
    pub seed: u64,
    /// Capacities of every gather.
    pub limits: Limits,
    /// Whether gathers get batch pages.
    pub batches: Supply,
    /// Whether the checked pass runs; the timed one always does.
    pub checking: Checking,
    /// What the kernel does wrong, on purpose.
    pub misbehaviour: Misbehaviour,
    /// What the machine does wrong, on purpose.
    pub fault: MachineFault,
}

impl Default for RunOptions {
    fn default() -> Self {
        Self {
            nr_cpus: 4,
            seed: 1,
            limits: Limits::DEFAULT,
            batches: Supply::Always,
            checking: Checking::On,
            misbehaviour: Misbehaviour::Absent,
            fault: MachineFault::Absent,
        }
    }
}

/// Touches by each CPU before the teardown begins.
const TOUCHES: u64 = 4000;
/// Of eight areas, this many go by munmap and the rest by exit.
const MUNMAPPED: u64 = 6;

/// Builds `layout` and takes it down, once checked and once timed, and adds what was found to `report`.
///
/// # Errors
/// [`BuildError`] if it cannot be built.
pub fn run_layout(layout: &Layout, options: &RunOptions, report: &mut Report) -> Result<(), BuildError> {
    let timed = Pass::new(layout, options, Checking::Off)?.run();
    let mut pass = match options.checking {
        Checking::On => {
            report.checked = true;
            let pass = Pass::new(layout, options, Checking::On)?;
            let kernel = Arc::clone(&pass.kernel);
            let outcome = pass.run();
            report.add_faults(&kernel);
            outcome
        }
        Checking::Off => timed.clone(),
    };
    let pages = pass.report.pages;
    if pages > 0 {
        pass.report.ns_per_page = timed.teardown.as_nanos() as f64 / pages as f64;
    }
    report.add(pass.report, &pass.found, pass.lost);
    Ok(())
}

/// What one pass came to.
#[derive(Clone, Debug)]
struct PassResult {
    report: LayoutReport,
    teardown: Duration,
    found: mmu_hosted::Found,
    lost: Lost,
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
        let machine = HostedMachine::new(Options {
            checking,
            fault: if checking == Checking::On { options.fault } else { MachineFault::Absent },
            ..Options::new(options.nr_cpus, frames_needed(layout), options.seed)
        })?;
        let config = Config {
            limits: options.limits,
            batches: options.batches,
            misbehaviour: if checking == Checking::On { options.misbehaviour } else { Misbehaviour::Absent },
            ..Config::default()
        };
        let error = |source| BuildError::Kernel { name: layout.name.clone(), start: 0, end: 0, source };
        let kernel = boot_hosted(machine, config).map_err(error)?;
        let bystander = kernel.new_mm().map_err(error)?;
        if let Ok(range) = VirtRange::new(BYSTANDER, BYSTANDER + BYSTANDER_PAGES * 4096) {
            kernel.mmap(&bystander, Vma { range, area: Area::anon() }).map_err(error)?;
        }
        let process = HostedProcess::build(&kernel, layout)?;
        Ok(Self {
            name: layout.name.clone(),
            nr_pages: layout.totals().nr_present(),
            kernel: Arc::new(kernel),
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
        let kernel = &self.kernel;
        // The bystander's own teardown is not part of the report.
        let _gone = kernel.exit(&self.bystander);
        kernel.drop_caches();
        let (frames, tables) = kernel.lost();
        let double_frees = kernel.counters().snapshot().double_frees;
        let report = LayoutReport::between(
            &self.name,
            self.process.areas.len() as u64,
            self.nr_pages,
            &before,
            &after,
        );
        let found = kernel.machine().violations();
        PassResult { report, teardown, found, lost: Lost { frames, tables, double_frees } }
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

/// Boots a kernel on a hosted machine and starts every CPU.
///
/// # Errors
/// If the machine has no frame for the kernel's root table.
pub fn boot_hosted(machine: HostedMachine, config: Config) -> Result<HostedKernel, mmu_kernel_shim::Error> {
    let machine = Arc::new(machine);
    let kernel = Kernel::boot(Arc::clone(&machine), config)?;
    for number in 0..machine.nr_cpus() {
        machine.on_cpu(CpuId::new(number), || kernel.start_cpu());
    }
    Ok(kernel)
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
    /// A program: touches memory, now and then gives its CPU to a kernel thread or to another process.
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

    /// Touches a page that was mapped when the process began. If it is gone by now, the program gets its signal.
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
