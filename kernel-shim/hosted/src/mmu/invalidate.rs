//! Invalidation: each instruction drops exactly what the architecture promises, and nothing more.
//!
//! | instruction | TLB | paging-structure caches |
//! |---|---|---|
//! | INVLPG | the page, current PCID, and global | all of the current PCID (EFER.TCE: its path) |
//! | INVPCID 0 | the page, that PCID | its path, that PCID |
//! | INVPCID 1 | all of that PCID, not global | all of that PCID |
//! | INVPCID 2 / 3 | all, with / without global | all |
//! | MOV CR3, bit 63 = 0 | all of the new PCID, not global | all of the new PCID |
//! | MOV CR3, bit 63 = 1 | nothing | nothing |
//! | MOV CR4: PGE changes, PCIDE 1 to 0 | all, with global | all |
//! | MOV CR4: SMEP 0 to 1 | all of the current PCID, not global | all of the current PCID |
//! | #PF | the page, current PCID, and global | its path, current PCID |
//!
//! Intel SDM vol. 3A 4.10.4.1. INVLPGB and TLBSYNC, as a CPU receives them, are at the end; what
//! they ask for is in `broadcast`.

use x86_64::instructions::tlb::Pcid;
use x86_64::registers::control::Cr4Flags;
use x86_64::structures::paging::PhysFrame;

use crate::mmu::access::GeneralProtection;
use crate::mmu::arch::LinearAddress;
use crate::mmu::broadcast::{Broadcast, Globals, Issuer, Uppers};
use crate::mmu::features::{InvlpgGlobals, InvlpgUppers};
use crate::mmu::spaces::SpaceIndex;
use crate::mmu::state::{Mmu, PCID_ZERO};
use crate::mmu::watch::{FrameWatch, Held, Tag, Use};

/// Bit 63 of the operand of MOV to CR3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cr3Load {
    /// Bit 63 = 0: drops what is cached under the new PCID.
    Flush,
    /// Bit 63 = 1: keeps it. Needs CR4.PCIDE = 1.
    Keep,
}

/// The types of INVPCID. Intel SDM vol. 2A, INVPCID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invpcid {
    /// Type 0: one address under one PCID.
    Address(Pcid, LinearAddress),
    /// Type 1: one PCID.
    Context(Pcid),
    /// Type 2: everything, global entries too.
    All,
    /// Type 3: everything but global entries.
    AllNonGlobal,
}

impl Mmu {
    /// INVLPG. A non-canonical operand does nothing.
    ///
    /// Entries of other PCIDs stay; so do, with [`InvlpgUppers::LeadingToAddress`], structure
    /// entries off the path: tables that were unhooked beside it stay reachable.
    ///
    /// # Source
    /// Intel SDM vol. 3A 4.10.4.1, vol. 2A INVLPG; AMD64 APM vol. 2 5.5.3.
    pub fn invlpg<W: FrameWatch>(&mut self, address: LinearAddress, watch: &mut W) {
        if !address.is_canonical(self.mode) {
            return;
        }
        self.serialize();
        let own = self.spaces.at_mut(self.current);
        own.drop_page(address, watch);
        match self.features.invlpg_uppers {
            InvlpgUppers::All => own.drop_structures(watch),
            InvlpgUppers::LeadingToAddress => own.drop_path(address, watch),
        }
        let missed = self.features.invlpg_globals == InvlpgGlobals::MissedWithPcid && self.has_pcids();
        if !missed {
            self.spaces.at_mut(SpaceIndex::GLOBAL).drop_page(address, watch);
        }
    }

    /// INVPCID.
    ///
    /// # Errors
    /// If a non-zero PCID is named while CR4.PCIDE is 0, or the address of type 0 is not canonical.
    ///
    /// # Source
    /// Intel SDM vol. 3A 4.10.4.1, vol. 2A INVPCID.
    pub fn invpcid<W: FrameWatch>(&mut self, what: Invpcid, watch: &mut W) -> Result<(), GeneralProtection> {
        match what {
            Invpcid::Address(pcid, address) => {
                self.check_pcid(pcid)?;
                if !address.is_canonical(self.mode) {
                    return Err(GeneralProtection);
                }
                if let Some(index) = self.spaces.find(pcid) {
                    let space = self.spaces.at_mut(index);
                    space.drop_page(address, watch);
                    space.drop_path(address, watch);
                }
            }
            Invpcid::Context(pcid) => {
                self.check_pcid(pcid)?;
                if let Some(index) = self.spaces.find(pcid) {
                    self.spaces.at_mut(index).drop_all(watch);
                }
            }
            Invpcid::All => self.forget_everything(watch),
            Invpcid::AllNonGlobal => {
                for space in self.spaces.iter_mut().filter(|space| space.tag() != Tag::Global) {
                    space.drop_all(watch);
                }
            }
        }
        self.serialize();
        Ok(())
    }

    /// MOV to CR3. With [`Cr3Load::Keep`] entries made under another root for the same PCID come
    /// into use.
    ///
    /// # Errors
    /// If CR4.PCIDE is 0 and `load` is [`Cr3Load::Keep`] or `pcid` is not 0 (hardware takes those
    /// bits for something else).
    ///
    /// # Source
    /// Intel SDM vol. 3A 4.10.4.1, vol. 2B MOV to control registers.
    pub fn load_cr3<W: FrameWatch>(
        &mut self,
        root: PhysFrame,
        pcid: Pcid,
        load: Cr3Load,
        watch: &mut W,
    ) -> Result<(), GeneralProtection> {
        self.check_pcid(pcid)?;
        if load == Cr3Load::Keep && !self.has_pcids() {
            return Err(GeneralProtection);
        }
        self.set_root(root, pcid, watch);
        if load == Cr3Load::Flush {
            self.spaces.at_mut(self.current).drop_all(watch);
        }
        self.serialize();
        Ok(())
    }

    /// MOV to CR4. Setting PCIDE drops nothing; what was cached so far belongs to PCID 0.
    ///
    /// # Errors
    /// If it would change LA57, which paging in 64-bit mode forbids.
    ///
    /// # Source
    /// Intel SDM vol. 3A 4.10.4.1, vol. 2B MOV to control registers.
    pub fn write_cr4<W: FrameWatch>(
        &mut self,
        value: Cr4Flags,
        watch: &mut W,
    ) -> Result<(), GeneralProtection> {
        let changed = self.cr4 ^ value;
        if changed.contains(Cr4Flags::L5_PAGING) {
            return Err(GeneralProtection);
        }
        self.cr4 = value;
        let pcids_end = changed.contains(Cr4Flags::PCID) && !value.contains(Cr4Flags::PCID);
        if changed.contains(Cr4Flags::PAGE_GLOBAL) || pcids_end {
            self.forget_everything(watch);
        }
        if pcids_end {
            self.set_root(self.root, PCID_ZERO, watch);
        }
        if (changed & value).contains(Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION) {
            self.spaces.at_mut(self.current).drop_all(watch);
        }
        self.serialize();
        Ok(())
    }

    /// What a page fault at `address` drops, so that it does not repeat unless memory is its cause.
    ///
    /// # Source
    /// Intel SDM vol. 3A 4.10.4.1; AMD64 APM vol. 2 5.5.3.
    pub(crate) fn drop_faulting<W: FrameWatch>(&mut self, address: LinearAddress, watch: &mut W) {
        let own = self.spaces.at_mut(self.current);
        own.drop_page(address, watch);
        own.drop_path(address, watch);
        self.spaces.at_mut(SpaceIndex::GLOBAL).drop_page(address, watch);
        self.serialize();
    }

    /// No walk that began earlier goes on with what it has read.
    pub(crate) fn serialize(&mut self) {
        self.epoch += 1;
    }

    fn set_root<W: FrameWatch>(&mut self, root: PhysFrame, pcid: Pcid, watch: &mut W) {
        watch.hold(root, Held { as_a: Use::Root, tag: Tag::Pcid(pcid) });
        watch.release(self.root, Held { as_a: Use::Root, tag: Tag::Pcid(self.pcid) });
        (self.root, self.pcid) = (root, pcid);
        self.current = self.spaces.open(pcid);
    }

    fn has_pcids(&self) -> bool {
        self.cr4.contains(Cr4Flags::PCID)
    }

    fn check_pcid(&self, pcid: Pcid) -> Result<(), GeneralProtection> {
        if self.has_pcids() || pcid == PCID_ZERO { Ok(()) } else { Err(GeneralProtection) }
    }
}

impl Mmu {
    /// Checks the operands of an INVLPGB that this CPU executes; the machine then posts it to every
    /// CPU.
    ///
    /// # Errors
    /// If it names more pages than
    /// [`Features::invlpgb_count_max`](crate::mmu::features::Features::invlpgb_count_max) after the
    /// first.
    pub fn invlpgb(&self, request: Broadcast) -> Result<Broadcast, GeneralProtection> {
        match request.pages {
            Some(pages) if pages.more > self.features.invlpgb_count_max => Err(GeneralProtection),
            _ => Ok(request),
        }
    }

    /// Receives a request, without acting on it yet.
    pub fn post_broadcast(&mut self, issuer: Issuer, request: Broadcast) {
        self.broadcasts.push((issuer, request));
    }

    /// Requests received and not acted on, oldest first.
    #[must_use]
    pub fn pending_broadcasts(&self) -> &[(Issuer, Broadcast)] {
        &self.broadcasts
    }

    /// Acts on the pending request at `place`, which may happen at any time before TLBSYNC, in any
    /// order.
    ///
    /// # Panics
    /// If there is none at `place`.
    pub fn deliver_broadcast<W: FrameWatch>(&mut self, place: usize, watch: &mut W) {
        let (_, request) = self.broadcasts.remove(place);
        self.obey(request, watch);
    }

    /// Acts on all that is pending from `issuer`, which executes TLBSYNC.
    ///
    /// # Source
    /// AMD64 APM vol. 3, TLBSYNC.
    pub fn complete_broadcasts<W: FrameWatch>(&mut self, issuer: Issuer, watch: &mut W) {
        while let Some(place) = self.broadcasts.iter().position(|(from, _)| *from == issuer) {
            self.deliver_broadcast(place, watch);
        }
    }

    fn obey<W: FrameWatch>(&mut self, request: Broadcast, watch: &mut W) {
        for space in self.spaces.iter_mut() {
            let is_meant = match space.tag() {
                Tag::Global => request.globals == Globals::Included,
                Tag::Pcid(pcid) => request.pcid.is_none_or(|named| named == pcid),
            };
            if !is_meant {
                continue;
            }
            match (request.pages, request.uppers) {
                (None, Uppers::Kept) => space.drop_pages(watch),
                (None, Uppers::Dropped) => space.drop_all(watch),
                (Some(pages), uppers) => {
                    for address in pages.addresses() {
                        space.drop_page(address, watch);
                        if uppers == Uppers::Dropped {
                            space.drop_path(address, watch);
                        }
                    }
                }
            }
        }
        self.serialize();
    }
}
