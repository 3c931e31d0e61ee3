//! Programs on virtual CPUs: they touch memory, take faults, go lazy and come back.

use std::sync::Arc;

use mmu_gather::tlb::CpuId;
use mmu_kernel_shim::{Config, Error, FaultError, Kernel, Machine, Mm, UserAccess};

use crate::machine::HostedMachine;
use crate::mmu::Fault;

/// The kernel on a hosted machine.
///
/// The machine is behind an `Arc` so that CPUs can run it while the kernel owns it.
pub type HostedKernel = Kernel<Arc<HostedMachine>>;

/// An address space of it.
pub(crate) type HostedMm = Mm<Arc<HostedMachine>>;

/// Boots a kernel on `machine`, to which it is the handler of flush interrupts, and starts every
/// CPU.
///
/// # Errors
/// [`Error::NoMemory`] if the machine has no frame for the kernel's root table.
pub fn boot(machine: &Arc<HostedMachine>, config: Config) -> Result<Arc<HostedKernel>, Error> {
    let kernel = Arc::new(Kernel::boot(Arc::clone(machine), config)?);
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
pub fn touch(
    kernel: &HostedKernel,
    mm: &Mm<Arc<HostedMachine>>,
    address: u64,
    access: UserAccess,
) -> Touched {
    let machine = kernel.machine();
    loop {
        machine.enter_user_mode();
        machine.seam(mmu_kernel_shim::Seam::Lock);
        let result = machine.user_access(address, access);
        machine.leave_user_mode();
        match result {
            Ok(_) => return Touched::Reached,
            Err(Fault::NonCanonical(_)) => return Touched::Signal(FaultError::NoArea),
            Err(Fault::Page(_)) => {
                if let Err(error) = kernel.handle_fault(mm, address, access) {
                    return Touched::Signal(error);
                }
            }
        }
    }
}
