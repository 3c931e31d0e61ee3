//! What it takes to be run by the conformance kit: each method is a call of the kernel.

use core::marker::PhantomData;
use std::io;
use std::sync::Arc;

use libkernel::error::Result as KernelResult;
use libkernel::memory::address::VA;
use libkernel::memory::address_space::UserAddressSpace;
use libkernel::memory::proc_vm::memory_map::{AddressRequest, RemapDestination};
use libkernel::memory::proc_vm::vmarea::{VMAPermissions, VMAreaKind};
use libkernel::memory::region::VirtMemoryRegion;
use mmu_gather::pagetable::VirtRange;
use mmu_gather::tlb::CtxId;
use mmu_hosted::{Backing, HostedMachine, Kernel, NotDone, Rights, Supply, UserAccess};
use mmu_tests::HostedPlatform;
use x86_64::structures::paging::PhysFrame;

use crate::glue::{Process, Space, boot};

/// The kernel that runs.
pub(crate) struct Layer<S> {
    pub(crate) platform: Arc<HostedPlatform>,
    space: PhantomData<fn() -> S>,
}

impl<S> Layer<S> {
    pub(crate) fn boot(machine: &Arc<HostedMachine>) -> io::Result<Self> {
        let platform = HostedPlatform::new(machine)?;
        boot(&platform);
        Ok(Self { platform, space: PhantomData })
    }
}

#[expect(clippy::cast_possible_truncation, reason = "x86_64 has 64-bit addresses")]
pub(crate) const fn va(address: u64) -> VA {
    VA::from_value(address as usize)
}

pub(crate) const fn region(range: VirtRange) -> VirtMemoryRegion {
    VirtMemoryRegion::from_start_end_address(va(range.start()), va(range.end()))
}

pub(crate) fn permissions(rights: Rights) -> VMAPermissions {
    VMAPermissions { read: rights != Rights::Nothing, write: rights == Rights::Write, execute: false }
}

fn done<T>(result: KernelResult<T>) -> Result<T, NotDone> {
    result.map_err(|_| NotDone::Refused)
}

impl<S: UserAddressSpace + AsMut<Space> + 'static> Kernel for Layer<S> {
    type Mm = Arc<Process<S>>;

    fn start_cpu(&self) {
        self.platform.start_cpu();
    }

    fn flush_interrupt(&self) {
        self.platform.handle_flush_interrupt();
    }

    fn new_mm(&self) -> Result<Self::Mm, NotDone> {
        done(Process::new().map(Arc::new))
    }

    fn root(&self, process: &Self::Mm) -> PhysFrame {
        process.mm.space().root()
    }

    fn map(&self, process: &Self::Mm, range: VirtRange, _: Backing, rights: Rights) -> Result<(), NotDone> {
        let at = AddressRequest::Fixed { address: va(range.start()), permit_overlap: false };
        let (len, kind) = (region(range).size(), VMAreaKind::Anon);
        done(process.lock().mmap(at, len, permissions(rights), kind, String::new()).map(|_| ()))
    }

    fn fault(&self, process: &Self::Mm, address: u64, access: UserAccess) -> Result<(), NotDone> {
        process.fault(va(address), access).map(|_| ()).map_err(|_| NotDone::Refused)
    }

    fn unmap(&self, process: &Self::Mm, range: VirtRange) -> Result<(), NotDone> {
        done(process.lock().munmap(region(range)).map(|_| ()))
    }

    fn switch_to(&self, process: Option<&Self::Mm>) {
        self.platform.switch_to(process.map(|process| &process.mm));
    }

    fn exit(&self, process: &Self::Mm) -> Result<(), NotDone> {
        process.exit();
        Ok(())
    }

    // From here on what may be left out. There is no DONTNEED, reclaim, and there are no guards and
    // no 2 MiB pages.

    fn ctx_id(&self, process: &Self::Mm) -> Option<CtxId> {
        Some(process.mm.context().ctx_id())
    }

    fn stop_cpu(&self) -> Result<(), NotDone> {
        self.platform.stop_cpu();
        Ok(())
    }

    fn go_lazy(&self) -> Result<(), NotDone> {
        self.platform.go_lazy();
        Ok(())
    }

    fn protect(&self, process: &Self::Mm, range: VirtRange, rights: Rights) -> Result<(), NotDone> {
        done(process.lock().mprotect(region(range), permissions(rights)))
    }

    fn remap(&self, process: &Self::Mm, from: VirtRange, to: VirtRange) -> Result<(), NotDone> {
        let (len, to) = (region(from).size(), RemapDestination::Fixed(va(to.start())));
        done(process.lock().mremap(va(from.start()), len, len, to).map(|_| ()))
    }

    fn fork(&self, process: &Self::Mm) -> Result<Self::Mm, NotDone> {
        done(process.fork().map(Arc::new))
    }

    fn set_batch_supply(&self, supply: Supply) -> Result<(), NotDone> {
        self.platform.supply_batches(supply);
        Ok(())
    }

    fn set_table_supply(&self, supply: Supply) -> Result<(), NotDone> {
        self.platform.supply_tables(supply);
        Ok(())
    }

    fn check_at_rest(&self, _: &HostedMachine, processes: &[Self::Mm]) {
        self.platform.compare_at_rest(processes.iter().map(|process| &process.mm));
    }
}
