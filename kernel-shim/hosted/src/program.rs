//! Programs on virtual CPUs: they touch memory, take faults, go lazy and come back.

use std::sync::Arc;

use mmu_kernel_shim::{FaultError, Kernel, Machine, Mm, UserAccess};

use crate::machine::HostedMachine;
use crate::mmu::Fault;

/// The kernel on a hosted machine.
///
/// The machine is behind an `Arc` so that CPUs can run it while the kernel owns it.
pub type HostedKernel = Kernel<Arc<HostedMachine>>;

/// An address space of it.
pub(crate) type HostedMm = Mm<Arc<HostedMachine>>;

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
