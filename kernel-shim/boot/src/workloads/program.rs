//! Programs in ring 3, as the workloads use them: the memory of a process, the stamps on it, and
//! what to do when a program reads something else.

use alloc::boxed::Box;
use alloc::sync::Arc;

use mmu_gather::pagetable::VirtRange;
use mmu_kernel_shim::{
    Area, Config, Error, FaultError, Kernel, Mm, PROGRAM_START, PageContent, UserAccess, Vma, program_area,
};
use x86_64::VirtAddr;
use x86_64::structures::idt::PageFaultErrorCode;

use crate::arch::phys_map::FRAME_BYTES;
use crate::checks::ledger::frame_words;
use crate::checks::stamp::Stamp;
use crate::checks::violation::{self, Misread};
use crate::cpu::agent::{self, Outcome, Program, Stop, Task};
use crate::cpu::index::CpuIndex;
use crate::cpu::percpu::this_index;
use crate::cpu::ring3::{self, UserExit};
use crate::cpu::{ipi, smp, watchdog};
use crate::machine::BareMachine;

/// The kernel of this image.
pub(crate) type BareKernel = Kernel<BareMachine>;

/// Boots the small kernel on all CPUs. It stays to the end of the run, because interrupt handlers
/// use it.
///
/// # Errors
///
/// [`Error::NoMemory`].
pub(crate) fn boot(machine: BareMachine, config: Config) -> Result<&'static BareKernel, Error> {
    let kernel: &BareKernel = Box::leak(Box::new(Kernel::boot(machine, config)?));
    ipi::handle_mail_with(Box::leak(Box::new(|| kernel.machine().told(|| kernel.flush_interrupt()))));
    smp::on_every_cpu(&|_| kernel.start_cpu());
    load_code(kernel)?;
    Ok(kernel)
}

/// Writes the code of the programs into its page of the page cache; has to be called again after
/// the cache was dropped.
///
/// # Errors
///
/// [`Error::NoMemory`].
pub(crate) fn load_code(kernel: &BareKernel) -> Result<(), Error> {
    let mm = kernel.new_mm()?;
    let area = program_area();
    kernel.mmap(&mm, area)?;
    kernel.populate(&mm, area.range, PageContent::File)?;
    let frame = kernel.machine().frame_at(mm.root(), PROGRAM_START).ok_or(Error::NoArea(PROGRAM_START))?;
    for (word, bytes) in frame_words(frame).iter().zip(agent::code().chunks(8)) {
        let mut whole = [0; 8];
        whole[..bytes.len()].copy_from_slice(bytes);
        word.store(u64::from_le_bytes(whole), core::sync::atomic::Ordering::Relaxed);
    }
    kernel.exit(&mm)
}

/// What became of a run in ring 3.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TaskEnd {
    /// The program came to its end.
    Done(Outcome),
    /// The kernel refused a fault: its address, and why.
    Signal(u64, FaultError),
}

/// Runs `task` on this CPU, which has `mm` loaded, to its end; the kernel answers its faults.
pub(crate) fn run_task(kernel: &BareKernel, mm: &Mm<BareMachine>, task: Task) -> TaskEnd {
    let mut context = task.context(VirtAddr::new(PROGRAM_START));
    loop {
        match ring3::run_user(&mut context) {
            UserExit::Syscall => {
                watchdog::progress();
                return TaskEnd::Done(Outcome::from_context(&context));
            }
            UserExit::PageFault { address, error } => {
                if error.contains(PageFaultErrorCode::MALFORMED_TABLE) {
                    violation::walked_freed_table(address.as_u64());
                }
                let is_write = error.contains(PageFaultErrorCode::CAUSED_BY_WRITE);
                let access = if is_write { UserAccess::Write } else { UserAccess::Read };
                if let Err(error) = kernel.handle_fault(mm, address.as_u64(), access) {
                    return TaskEnd::Signal(address.as_u64(), error);
                }
            }
            UserExit::Exception { vector, .. } => violation::program_broke(vector, context.frame.rip),
            UserExit::Interrupted => {}
        }
    }
}

/// A process whose memory is stamped.
#[derive(Clone)]
pub(crate) struct StampedProcess<'a> {
    pub(crate) kernel: &'a BareKernel,
    pub(crate) mm: Arc<Mm<BareMachine>>,
    number: u32,
}

/// What a program of the process found. There is no variant for data of another owner, because that
/// ends the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    /// What it expected.
    AsExpected,
    /// Zero: the page was dropped meanwhile.
    Fresh,
    /// The address was not usable.
    Signal,
}

impl Found {
    /// Ends the run unless this is what was expected; `when` says what was being done.
    pub(crate) fn must_be(self, expected: Self, when: &str) {
        if self != expected {
            violation::found_by_workload(format_args!("{when}: found {self:?}, not {expected:?}"));
        }
    }
}

impl<'a> StampedProcess<'a> {
    /// A process that has no memory but its code.
    ///
    /// # Errors
    ///
    /// [`Error::NoMemory`].
    pub(crate) fn new(kernel: &'a BareKernel, number: u32) -> Result<Self, Error> {
        let mm = kernel.new_mm()?;
        kernel.mmap(&mm, program_area())?;
        Ok(Self { kernel, mm, number })
    }

    /// Maps memory of its own at `range`.
    ///
    /// # Errors
    ///
    /// Whatever the kernel says.
    pub(crate) fn map(&self, range: VirtRange) -> Result<(), Error> {
        self.kernel.mmap(&self.mm, Vma { range, area: Area::anon() })
    }

    /// Switches this CPU to the process.
    pub(crate) fn enter(&self) {
        self.kernel.switch_to(Some(&self.mm));
    }

    /// Writes this CPU's stamp into each page of `range`.
    pub(crate) fn write(&self, range: VirtRange) -> Found {
        self.run_and_judge(self.task(Program::Write, range, self.stamp(range), 1))
    }

    /// Reads this CPU's stamps in `range` back.
    pub(crate) fn check(&self, range: VirtRange) -> Found {
        self.run_and_judge(self.task(Program::Check, range, self.stamp(range), 1))
    }

    /// Reads this CPU's words in `range`, all of which must be zero: nobody but this thread writes
    /// there, and this thread has not done so yet.
    pub(crate) fn check_fresh(&self, range: VirtRange) -> Found {
        self.run_and_judge(self.task(Program::Check, range, 0, 0))
    }

    /// Reads this CPU's word in the first page of `range` again and again, until it changes.
    pub(crate) fn watch(&self, range: VirtRange, nr_reads: u64) -> Found {
        let task = self.task(Program::Watch, range, self.stamp(range), 0);
        self.run_and_judge(Task { nr_words: nr_reads, ..task })
    }

    /// Each thread has a word of its own in every page.
    fn task(&self, program: Program, range: VirtRange, value: u64, step: u64) -> Task {
        Task {
            program,
            first: range.start() + 8 * thread_number(this_index()),
            stride_bytes: FRAME_BYTES,
            nr_words: range.nr_pages(),
            value,
            step,
        }
    }

    fn stamp(&self, range: VirtRange) -> u64 {
        // The number of a page wraps after 256 MiB.
        let [page_low, page_high, ..] = (range.start() / FRAME_BYTES).to_le_bytes();
        let page = u16::from_le_bytes([page_low, page_high]);
        let thread = u8::try_from(thread_number(this_index())).unwrap_or(u8::MAX);
        Stamp { process: self.number, thread, page }.word()
    }

    fn run_and_judge(&self, task: Task) -> Found {
        let Stop { address, seen } = match run_task(self.kernel, &self.mm, task) {
            TaskEnd::Done(Outcome { stopped: None, .. }) => return Found::AsExpected,
            TaskEnd::Done(Outcome { stopped: Some(stop), .. }) => stop,
            TaskEnd::Signal(..) => return Found::Signal,
        };
        if seen == 0 {
            return Found::Fresh;
        }
        let step = if task.program == Program::Watch { 0 } else { (address - task.first) / FRAME_BYTES };
        let machine = self.kernel.machine();
        let misread = Misread {
            root: self.mm.root(),
            address,
            seen,
            expected: task.value + step * task.step,
            mapped: machine.frame_at(self.mm.root(), address),
        };
        violation::misread(&machine.ledger, &misread)
    }
}

fn thread_number(cpu: CpuIndex) -> u64 {
    cpu.get() as u64
}

/// The pages `first..first + nr_pages` of address space.
pub(crate) fn page_range(start: u64, nr_pages: u64) -> VirtRange {
    VirtRange::new(start, start + nr_pages * FRAME_BYTES).expect("workloads use good ranges")
}

/// Reads one word in each of `nr_pages` frames of RAM, beginning with one that `seed` chooses. Each
/// read needs a translation, and so a walk from the root in CR3.
pub(crate) fn read_all_over(machine: &BareMachine, seed: u64, nr_pages: u64) {
    let frames = machine.usable_frames();
    let count = frames.end - frames.start;
    let first = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
    for page in 0..nr_pages {
        let number = frames.start + (first + page * 97) % count;
        let frame =
            x86_64::structures::paging::PhysFrame::containing_address(x86_64::PhysAddr::new(number << 12));
        core::hint::black_box(frame_words(frame)[0].load(core::sync::atomic::Ordering::Relaxed));
    }
}

/// The words of all threads fit into one page.
const _: () = assert!(crate::cpu::index::MAX_CPUS * 8 <= 4096);
