//! Programs on virtual CPUs: they touch memory, and take faults.

use crate::machine::HostedMachine;
use crate::mmu::Fault;
use crate::vocabulary::{Seam, UserAccess};

/// Why a program did not reach what it touched: it got a signal instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal<E> {
    /// There is no such address.
    NonCanonical,
    /// The kernel did not answer the fault.
    Refused(E),
}

impl HostedMachine {
    /// The program on this CPU reads or writes at `address`; faults are taken, and answered with
    /// `answer`, as they come.
    ///
    /// # Errors
    /// The signal that it got.
    pub fn touch<E>(
        &self,
        address: u64,
        access: UserAccess,
        mut answer: impl FnMut() -> Result<(), E>,
    ) -> Result<(), Signal<E>> {
        loop {
            self.enter_user_mode();
            self.seam(Seam::Lock);
            let result = self.user_access(address, access);
            self.leave_user_mode();
            match result {
                Ok(_) => return Ok(()),
                Err(Fault::NonCanonical(_)) => return Err(Signal::NonCanonical),
                Err(Fault::Page(_)) => answer().map_err(Signal::Refused)?,
            }
        }
    }
}
