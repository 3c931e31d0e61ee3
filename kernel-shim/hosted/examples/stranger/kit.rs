//! What a kernel writes to be run by the kit: each method is a call of the kernel.

use std::sync::Arc;

use mmu_gather::pagetable::VirtRange;
use mmu_hosted::{Backing, Kernel, NotDone, Rights, UserAccess};
use x86_64::structures::paging::{PageTableFlags, PhysFrame};

use crate::kernel::{Space, Stranger};

const USER: PageTableFlags = PageTableFlags::PRESENT.union(PageTableFlags::USER_ACCESSIBLE);

fn flags(rights: Rights) -> PageTableFlags {
    match rights {
        Rights::Nothing => PageTableFlags::PRESENT,
        Rights::Read | Rights::Execute => USER,
        Rights::Write => USER | PageTableFlags::WRITABLE,
    }
}

fn done<E>(result: Result<(), E>) -> Result<(), NotDone> {
    result.map_err(|_| NotDone::Refused)
}

impl Kernel for Stranger {
    type Mm = Arc<Space>;

    fn start_cpu(&self) {
        self.start();
    }

    fn flush_interrupt(&self) {
        self.handle_interrupt();
    }

    fn new_mm(&self) -> Result<Arc<Space>, NotDone> {
        self.new_space().ok_or(NotDone::Refused)
    }

    fn root(&self, space: &Arc<Space>) -> PhysFrame {
        space.root()
    }

    fn map(&self, space: &Arc<Space>, range: VirtRange, _: Backing, rights: Rights) -> Result<(), NotDone> {
        done(self.mmap(space, range, flags(rights)))
    }

    fn fault(&self, space: &Arc<Space>, address: u64, access: UserAccess) -> Result<(), NotDone> {
        let needs = if access == UserAccess::Write { Rights::Write } else { Rights::Read };
        done(self.page_fault(space, address, flags(needs)))
    }

    fn unmap(&self, space: &Arc<Space>, range: VirtRange) -> Result<(), NotDone> {
        done(self.munmap(space, range))
    }

    fn switch_to(&self, space: Option<&Arc<Space>>) {
        self.run(space);
    }

    fn exit(&self, space: &Arc<Space>) -> Result<(), NotDone> {
        Stranger::exit(self, space);
        Ok(())
    }

    // From here on what a kernel may leave out. This one has no fork, mremap, reclaim, guards, and
    // no 2 MiB pages.

    fn go_lazy(&self) -> Result<(), NotDone> {
        self.idle();
        Ok(())
    }

    fn stop_cpu(&self) -> Result<(), NotDone> {
        self.stop();
        Ok(())
    }

    fn discard(&self, space: &Arc<Space>, range: VirtRange) -> Result<(), NotDone> {
        done(self.drop_pages(space, range))
    }

    fn protect(&self, space: &Arc<Space>, range: VirtRange, rights: Rights) -> Result<(), NotDone> {
        self.mprotect(space, range, flags(rights));
        Ok(())
    }
}
