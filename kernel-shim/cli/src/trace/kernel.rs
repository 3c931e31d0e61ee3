//! The hosted kernel as the programs of a log use it: what their address spaces share, and how they
//! use memory.

use core::cell::Cell;
use core::time::Duration;
use std::sync::Arc;
use std::time::Instant;

use mmu_adapter::{HostedKernel, HostedMm, Touched, touch};
use mmu_gather::pagetable::VirtRange;
use mmu_hosted::{Checking, Choices};
use mmu_kernel_shim::{Error, FaultError, UserAccess};

use crate::input::layout::PAGE_BYTES;

/// Pages that are used of a range which a call has just mapped, or is about to take away or change.
pub(crate) const RANGE_TOUCHES: u64 = 64;

/// What all address spaces of one log share.
#[derive(Debug)]
pub(crate) struct TraceKernel {
    pub(crate) hosted: Arc<HostedKernel>,
    /// Files that were given a number.
    files: Cell<u32>,
    pub(crate) areas: Cell<u64>,
    pub(crate) assumed_areas: Cell<u64>,
    pub(crate) ignored_advice: Cell<u64>,
    /// Areas that a mapping of the log was put over, because the log has no munmap of them.
    pub(crate) replaced_areas: Cell<u64>,
    /// Spent in calls that give memory up.
    pub(crate) teardown: Cell<Duration>,
}

impl TraceKernel {
    pub(crate) const fn new(hosted: Arc<HostedKernel>) -> Self {
        Self {
            hosted,
            files: Cell::new(0),
            areas: Cell::new(0),
            assumed_areas: Cell::new(0),
            ignored_advice: Cell::new(0),
            replaced_areas: Cell::new(0),
            teardown: Cell::new(Duration::ZERO),
        }
    }

    pub(crate) fn choices(&self) -> &Choices {
        self.hosted.machine().choices()
    }

    /// Runs a call that gives memory up, and counts its time.
    pub(crate) fn timed<R>(&self, call: impl FnOnce() -> R) -> R {
        let start = Instant::now();
        let result = call();
        self.teardown.set(self.teardown.get() + start.elapsed());
        result
    }

    /// A file that no other area shows: a log does not say which one a mapping is of.
    pub(crate) fn new_file(&self) -> u32 {
        self.files.replace(self.files.get().wrapping_add(1))
    }

    /// The program on this CPU uses the first pages of `range`.
    pub(crate) fn touch_start_of(&self, mm: &HostedMm, range: VirtRange) -> Result<(), Error> {
        for page in 0..range.nr_pages().min(RANGE_TOUCHES) {
            self.touch(mm, range.start() + page * PAGE_BYTES)?;
        }
        Ok(())
    }

    /// The program on this CPU uses a page. If it may not, it gets its signal and goes on.
    pub(crate) fn touch(&self, mm: &HostedMm, address: u64) -> Result<(), Error> {
        let kernel = &self.hosted;
        let access = if self.choices().one_in(2) { UserAccess::Read } else { UserAccess::Write };
        let signal = match kernel.machine().options().checking {
            Checking::On => match touch(kernel, mm, address, access) {
                Touched::Reached => None,
                Touched::Signal(signal) => Some(signal),
            },
            // Nothing is cached there, so every use is as good as a fault.
            Checking::Off => kernel.handle_fault(mm, address, access).err(),
        };
        if signal == Some(FaultError::NoMemory) { Err(Error::NoMemory) } else { Ok(()) }
    }
}
