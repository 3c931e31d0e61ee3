//! The hosted machine as a stage: work that any machine can do, done here.

use std::sync::Arc;

use mmu_gather::pagetable::VirtRange;
use mmu_gather::tlb::CpuId;
use mmu_hosted::HostedMachine;
use mmu_kernel_shim::{Config, Error, FaultError, Stage, UserAccess};

use crate::machine::Hosted;
use crate::program::{HostedKernel, HostedMm, Touched, boot, touch};

/// A kernel on a hosted machine whose CPUs work one at a time.
#[derive(Debug)]
pub struct HostedStage(Arc<HostedKernel>);

impl HostedStage {
    /// Boots a kernel on `machine` and starts every CPU.
    ///
    /// # Errors
    /// [`Error::NoMemory`] if the machine has no frame for the kernel's root table.
    pub fn boot(machine: HostedMachine, config: Config) -> Result<Self, Error> {
        Ok(Self(boot(&Arc::new(machine), config)?))
    }
}

impl Stage for HostedStage {
    type Machine = Hosted;

    fn kernel(&self) -> &HostedKernel {
        &self.0
    }

    fn on_cpu(&self, cpu: CpuId, work: &(dyn Fn() + Sync)) {
        self.0.machine().on_cpu(cpu, work);
    }

    fn touch(&self, mm: &HostedMm, range: VirtRange, access: UserAccess) -> Result<(), (u64, FaultError)> {
        for address in (range.start()..range.end()).step_by(4096) {
            if let Touched::Signal(error) = touch(&self.0, mm, address, access) {
                return Err((address, error));
            }
        }
        Ok(())
    }
}
