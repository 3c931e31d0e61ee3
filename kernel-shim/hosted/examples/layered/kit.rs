//! The kernel's calls as the kit makes them.

use std::sync::Arc;

use mmu_gather::pagetable::VirtRange;
use mmu_hosted::{Backing, HostedMachine, NotDone, Rights, UserAccess};
use x86_64::structures::paging::{PageTableFlags, PhysFrame};

use crate::kernel::{Kernel, Space};

type Machine = Arc<HostedMachine>;

fn flags(rights: Rights) -> PageTableFlags {
    let user = PageTableFlags::PRESENT | PageTableFlags::USER_ACCESSIBLE;
    match rights {
        Rights::Nothing => PageTableFlags::PRESENT,
        Rights::Read | Rights::Execute => user,
        Rights::Write => user | PageTableFlags::WRITABLE,
    }
}

impl mmu_hosted::Kernel for Kernel<Machine> {
    type Mm = Arc<Space<Machine>>;

    fn start_cpu(&self) {
        self.start();
    }

    fn flush_interrupt(&self) {
        self.on_flush_interrupt();
    }

    fn new_mm(&self) -> Result<Self::Mm, NotDone> {
        self.new_space().ok_or(NotDone::Refused)
    }

    fn root(&self, space: &Self::Mm) -> PhysFrame {
        space.engine.space().root()
    }

    fn map(&self, space: &Self::Mm, range: VirtRange, _: Backing, rights: Rights) -> Result<(), NotDone> {
        self.mmap(space, range, flags(rights)).then_some(()).ok_or(NotDone::Refused)
    }

    fn fault(&self, space: &Self::Mm, address: u64, access: UserAccess) -> Result<(), NotDone> {
        let needs = if access == UserAccess::Write { Rights::Write } else { Rights::Read };
        self.page_fault(space, address, flags(needs)).then_some(()).ok_or(NotDone::Refused)
    }

    fn unmap(&self, space: &Self::Mm, range: VirtRange) -> Result<(), NotDone> {
        self.munmap(space, range).map_err(|_| NotDone::Refused)
    }

    fn switch_to(&self, space: Option<&Self::Mm>) {
        self.run(space);
    }

    fn exit(&self, space: &Self::Mm) -> Result<(), NotDone> {
        Kernel::exit(self, space);
        Ok(())
    }
}
