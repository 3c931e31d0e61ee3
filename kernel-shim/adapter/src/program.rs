//! The small kernel on a hosted machine, and programs on its CPUs.

use std::sync::Arc;

use mmu_gather::tlb::CpuId;
use mmu_hosted::{HostedMachine, Signal};
use mmu_kernel_shim::{Config, Error, FaultError, Kernel, Mm, UserAccess};

use crate::machine::Hosted;
use crate::words;

/// The kernel on a hosted machine.
pub type HostedKernel = Kernel<Hosted>;

/// An address space of it.
pub type HostedMm = Mm<Hosted>;

/// Boots a kernel on `machine`, to which it is the handler of flush interrupts, and starts every
/// CPU.
///
/// # Errors
/// [`Error::NoMemory`] if the machine has no frame for the kernel's root table.
pub fn boot(machine: &Arc<HostedMachine>, config: Config) -> Result<Arc<HostedKernel>, Error> {
    let kernel = Arc::new(Kernel::boot(Hosted::from(Arc::clone(machine)), config)?);
    // The kernel owns the machine.
    let handler = Arc::downgrade(&kernel);
    machine.set_flush_handler(Box::new(move || {
        // An interrupt that comes after the kernel has no mail.
        if let Some(kernel) = handler.upgrade() {
            kernel.flush_interrupt();
        }
    }));
    for number in 0..machine.nr_cpus() {
        machine.on_cpu(CpuId::new(number), || kernel.start_cpu());
    }
    Ok(kernel)
}

/// What a touch came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touched {
    /// The program read or wrote.
    Reached,
    /// It got a signal instead.
    Signal(FaultError),
}

/// The program on this CPU, which runs in `mm`, reads or writes at `address`; faults are taken and
/// answered as they come.
pub fn touch(kernel: &HostedKernel, mm: &HostedMm, address: u64, access: UserAccess) -> Touched {
    let answer = || kernel.handle_fault(mm, address, access);
    match kernel.machine().touch(address, words::access(access), answer) {
        Ok(()) => Touched::Reached,
        Err(Signal::NonCanonical) => Touched::Signal(FaultError::NoArea),
        Err(Signal::Refused(error)) => Touched::Signal(error),
    }
}
