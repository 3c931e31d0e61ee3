//! The page-fault handler, as moss-kernel has one of its own: new pages, and copies of shared ones.

use libkernel::memory::address::VA;
use libkernel::memory::address_space::UserAddressSpace;
use libkernel::memory::paging::permissions::PtePermissions;
use mmu_hosted::UserAccess;

use crate::glue::{Process, Space, frame_of, page_of};

/// What a program gets instead of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segv;

/// What a fault came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    NewPage,
    /// A page that was shared is copied.
    Copied,
    /// A page is shared no longer, so the program may write to it.
    Reused,
    /// Another CPU was faster.
    Nothing,
}

impl<S: UserAddressSpace + AsMut<Space>> Process<S> {
    pub(crate) fn fault(&self, at: VA, access: UserAccess) -> Result<Answer, Segv> {
        let mut map = self.lock();
        let allowed = map.find_vma(at).ok_or(Segv)?.permissions();
        if !allowed.read || access == UserAccess::Write && !allowed.write {
            return Err(Segv);
        }
        let space = map.address_space_mut();
        let perms = PtePermissions::from(allowed);
        match space.translate(at) {
            None => {
                let page = self.kernel.new_page().ok_or(Segv)?;
                space.map_page(page_of(page), at, perms).map_err(|_| Segv)?;
                Ok(Answer::NewPage)
            }
            Some(old) if access == UserAccess::Write && !old.perms.is_write() => {
                if self.kernel.nr_mappings(frame_of(old.pfn)) == 1 {
                    space.protect_range(at.page_region(), perms).map_err(|_| Segv)?;
                    return Ok(Answer::Reused);
                }
                let page = self.kernel.new_page().ok_or(Segv)?;
                self.kernel.copy_page(frame_of(old.pfn), page);
                space.remap(at, page_of(page), perms).map_err(|_| Segv)?;
                Ok(Answer::Copied)
            }
            Some(_) => Ok(Answer::Nothing),
        }
    }
}
