//! One access: the look into the TLB, and the walk that it needs if nothing is there.

use x86_64::structures::idt::PageFaultErrorCode;

use crate::mmu::access::{Access, AccessKind, AccessMode, Fault, PageFault, Source, access_code};
use crate::mmu::arch::LinearAddress;
use crate::mmu::features::Faults;
use crate::mmu::physical::PhysicalMemory;
use crate::mmu::state::Mmu;
use crate::mmu::walk::{Step, Walk};
use crate::mmu::watch::FrameWatch;

/// How an access begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begun {
    /// The TLB served it: done, no memory was read.
    Hit(Access),
    /// It needs a walk, to be driven by [`Mmu::step`].
    Walk(Walk),
}

impl Mmu {
    /// Translates one access and does to memory what hardware does: the accessed flags, and the
    /// dirty flag for a store.
    ///
    /// A TLB entry serves without a look at memory, except a store whose entry is not dirty yet:
    /// that one walks again, and so sees an entry that has meanwhile gone, and, as the
    /// [features](crate::mmu::features::SettingDirty) say, one that may no longer be written.
    /// Otherwise the walk starts below the deepest cached structure entry.
    ///
    /// # Errors
    /// [`Fault::Page`] if the translation is missing, malformed or does not allow the access.
    /// [`Fault::NonCanonical`] before any look at the caches.
    ///
    /// # Source
    /// Intel SDM vol. 3A 4.6, 4.7, 4.8, 4.10.2.2, 4.10.3.2.
    #[inline]
    pub fn access<M: PhysicalMemory, W: FrameWatch>(
        &mut self,
        address: LinearAddress,
        kind: AccessKind,
        mode: AccessMode,
        memory: &M,
        watch: &mut W,
    ) -> Result<Access, Fault> {
        let mut walk = match self.begin_access(address, kind, mode, watch)? {
            Begun::Hit(access) => return Ok(access),
            Begun::Walk(walk) => walk,
        };
        loop {
            match self.step(&mut walk, memory, watch) {
                Step::Continue => {}
                Step::Translated(access) => return Ok(access),
                Step::Fault(fault) => return Err(Fault::Page(fault)),
                Step::Speculated(_) => {
                    unreachable!("the walk of an access does not end as a speculative one")
                }
            }
        }
    }

    /// The first half of [`access`](Self::access): the look into the TLB. Between the steps of the
    /// walk it may return, other CPUs may store.
    ///
    /// # Errors
    /// As [`access`](Self::access), if the TLB or the form of the address decides.
    #[inline]
    pub fn begin_access<W: FrameWatch>(
        &mut self,
        address: LinearAddress,
        kind: AccessKind,
        mode: AccessMode,
        watch: &mut W,
    ) -> Result<Begun, Fault> {
        if !address.is_canonical(self.mode) {
            return Err(Fault::NonCanonical(address));
        }
        if let Some((tag, entry)) = self.lookup_for(address, kind) {
            if !self.permits(entry.rights(), kind, mode) {
                let code = PageFaultErrorCode::PROTECTION_VIOLATION | access_code(kind, mode);
                self.drop_faulting(address, watch);
                if self.features.faults == Faults::FromCache {
                    return Err(Fault::Page(PageFault { address, code, source: Source::Tlb(tag) }));
                }
            } else if kind != AccessKind::Write || entry.dirty() {
                let address = entry.translate(address);
                return Ok(Begun::Hit(Access { address, entry, source: Source::Tlb(tag) }));
            }
        }
        Ok(Begun::Walk(self.begin_access_walk(address, kind, mode)))
    }
}
