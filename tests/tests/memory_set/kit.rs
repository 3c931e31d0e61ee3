//! What it takes to be run by the conformance kit: each method is a call of the kernel.

use core::marker::PhantomData;
use std::io;
use std::sync::Arc;

use mmu_gather::pagetable::VirtRange;
use mmu_gather::tlb::CtxId;
use mmu_hosted::{Backing, HostedMachine, Kernel, NotDone, Rights, Supply, UserAccess};
use mmu_tests::HostedPlatform;
use x86_64::structures::paging::{PageTableFlags, PhysFrame};

use crate::glue::{AddressSpace, Backend, Populate, USER};

/// The kernel that runs.
pub(crate) struct Layer<B> {
    pub(crate) platform: Arc<HostedPlatform>,
    backend: PhantomData<fn() -> B>,
}

impl<B> Layer<B> {
    pub(crate) fn boot(machine: &Arc<HostedMachine>) -> io::Result<Self> {
        Ok(Self { platform: HostedPlatform::new(machine)?, backend: PhantomData })
    }
}

pub(crate) fn flags(rights: Rights) -> PageTableFlags {
    match rights {
        Rights::Nothing => PageTableFlags::PRESENT,
        Rights::Read | Rights::Execute => USER,
        Rights::Write => USER | PageTableFlags::WRITABLE,
    }
}

fn done<E>(result: Result<(), E>) -> Result<(), NotDone> {
    result.map_err(|_| NotDone::Refused)
}

impl<B: Backend> Kernel for Layer<B> {
    type Mm = Arc<AddressSpace<B>>;

    fn start_cpu(&self) {
        self.platform.start_cpu();
    }

    fn flush_interrupt(&self) {
        self.platform.handle_flush_interrupt();
    }

    fn new_mm(&self) -> Result<Self::Mm, NotDone> {
        AddressSpace::new(&self.platform).map(Arc::new).ok_or(NotDone::Refused)
    }

    fn root(&self, space: &Self::Mm) -> PhysFrame {
        space.mm.space().root()
    }

    fn map(
        &self,
        space: &Self::Mm,
        range: VirtRange,
        backing: Backing,
        rights: Rights,
    ) -> Result<(), NotDone> {
        let populate = match backing {
            Backing::Private | Backing::Shared | Backing::Pfn => Populate::AtOnce,
            _ => Populate::WhenUsed,
        };
        done(space.map(range, flags(rights), populate))
    }

    fn fault(&self, space: &Self::Mm, address: u64, access: UserAccess) -> Result<(), NotDone> {
        let needs = if access == UserAccess::Write { Rights::Write } else { Rights::Read };
        done(space.fault(address, flags(needs)))
    }

    fn unmap(&self, space: &Self::Mm, range: VirtRange) -> Result<(), NotDone> {
        done(space.unmap(range))
    }

    fn switch_to(&self, space: Option<&Self::Mm>) {
        self.platform.switch_to(space.map(|space| &space.mm));
    }

    fn exit(&self, space: &Self::Mm) -> Result<(), NotDone> {
        space.exit();
        Ok(())
    }

    // From here on what may be left out. There is no fork, mremap, DONTNEED, reclaim, and there are
    // no guards and no 2 MiB pages.

    fn ctx_id(&self, space: &Self::Mm) -> Option<CtxId> {
        Some(space.mm.context().ctx_id())
    }

    fn stop_cpu(&self) -> Result<(), NotDone> {
        self.platform.stop_cpu();
        Ok(())
    }

    fn go_lazy(&self) -> Result<(), NotDone> {
        self.platform.go_lazy();
        Ok(())
    }

    fn protect(&self, space: &Self::Mm, range: VirtRange, rights: Rights) -> Result<(), NotDone> {
        done(space.protect(range, flags(rights)))
    }

    fn set_batch_supply(&self, supply: Supply) -> Result<(), NotDone> {
        self.platform.supply_batches(supply);
        Ok(())
    }

    fn set_table_supply(&self, supply: Supply) -> Result<(), NotDone> {
        self.platform.supply_tables(supply);
        Ok(())
    }

    fn check_at_rest(&self, _: &HostedMachine, spaces: &[Self::Mm]) {
        self.platform.compare_at_rest(spaces.iter().map(|space| &space.mm));
    }
}
