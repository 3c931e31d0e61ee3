//! What the device does, and that it reaches nothing that was freed.

use core::ops::Range;

use mmu_gather::pagetable::PagingMode;
use mmu_gather::tlb::{CtxId, PageSpan};
use x86_64::registers::control::Cr4Flags;
use x86_64::structures::paging::PhysFrame;

use crate::checker::access::WatchedMemory;
use crate::checker::checked::{Caches, Checked};
use crate::checker::kind::ViolationKind;
use crate::checker::ledger::{frame_numbered, frames_of, overlaps};
use crate::device::Shared;
use crate::machine::HostedMachine;
use crate::mmu::arch::LinearAddress;
use crate::mmu::features::{Features, InvlpgUppers};
use crate::mmu::watch::{FrameWatch, Held, Tag, Use};
use crate::mmu::{AccessKind, AccessMode, Mmu, PCID_ZERO};
use crate::mutex::lock;
use crate::vocabulary::{FrameRole, UserAccess};

impl HostedMachine {
    /// Lets the device use the address space of this context and root, until the root is freed.
    ///
    /// Does nothing on a machine that is not checked.
    pub fn attach_device(&self, ctx_id: CtxId, root: PhysFrame) {
        let Some(checked) = &self.checked else { return };
        let mut watch = checked.ledger.watch();
        // What INVLPG does to paths is the least that it may do: an invalidation of a span drops
        // what leads there.
        let features = Features { invlpg_uppers: InvlpgUppers::LeadingToAddress, ..self.options.features };
        // As many levels as the CPUs have, whose tables it walks.
        let mut cr4 = Cr4Flags::empty();
        cr4.set(Cr4Flags::L5_PAGING, self.options.paging == PagingMode::FiveLevel);
        let mmu = Mmu::new(features, cr4, root, &mut watch);
        lock(&self.shared.0).push(Shared { ctx_id, root, caches: Caches { mmu, watch } });
    }

    /// The device reads or writes at an address of this context. Returns the frame that it reaches,
    /// or `None` if the page tables do not let it.
    ///
    /// It raises no fault: what it cannot reach stays unreached.
    pub fn device_access(&self, ctx_id: CtxId, address: u64, access: UserAccess) -> Option<PhysFrame> {
        let checked = self.checked.as_ref()?;
        let memory = WatchedMemory::new(&self.memory, &checked.ledger);
        let kind = match access {
            // It has no code.
            UserAccess::Read | UserAccess::Fetch => AccessKind::Read,
            UserAccess::Write => AccessKind::Write,
        };
        let (root, result) = {
            let mut spaces = lock(&self.shared.0);
            let shared = spaces.iter_mut().find(|shared| shared.ctx_id == ctx_id)?;
            let Caches { mmu, watch } = &mut shared.caches;
            let result = mmu.access(LinearAddress::new(address), kind, AccessMode::User, &memory, watch);
            (shared.root, result)
        };
        let reached = result.ok().map(|reached| PhysFrame::containing_address(reached.address));
        if access == UserAccess::Write
            && let Some(frame) = reached
        {
            checked.ledger.note_written(frame);
        }
        if let Some(frame) = reached {
            self.check_content(checked, root, (address, frame), access);
        }
        let page = reached.filter(|frame| checked.ledger.when_freed(*frame).is_some());
        if let Some(frame) = memory.freed_table.get().or(page) {
            self.report(checked, ViolationKind::DeviceReachesAfterFree, self.current(), address, frame, None);
        }
        reached
    }

    /// The device uses an address near those at which something happens, in one of its address
    /// spaces, if it has any.
    pub(crate) fn device_turn(&self, choice: u64) {
        let ctx_id = {
            let spaces = lock(&self.shared.0);
            if spaces.is_empty() {
                return;
            }
            spaces[self.choices.pick(spaces.len())].ctx_id
        };
        let near = (choice & 0b111) << 12;
        let access = if choice >> 3 & 0b11 == 0 { UserAccess::Write } else { UserAccess::Read };
        self.device_access(ctx_id, self.hot_address().wrapping_add(near), access);
    }

    /// The hook: the device forgets `span` of the context, or all of it.
    pub(crate) fn device_forgets(&self, ctx_id: CtxId, span: Option<PageSpan>) {
        if lock(&self.shared.0).is_empty() {
            return;
        }
        // Other CPUs run here, at the last moment before the device forgets: a hook that is called
        // too late has been too late by now.
        self.cross_between_steps();
        let mut spaces = lock(&self.shared.0);
        let Some(shared) = spaces.iter_mut().find(|shared| shared.ctx_id == ctx_id) else { return };
        let Caches { mmu, watch } = &mut shared.caches;
        let Some(PageSpan { start, end, .. }) = span else {
            mmu.forget_everything(watch);
            return;
        };
        let inside: Vec<u64> = mmu
            .entries()
            .filter(|entry| entry.held.as_a != Use::Root)
            .filter_map(|entry| {
                let first = entry.address.as_u64();
                let is_inside = first < end && first + (1 << entry.span_shift) > start;
                is_inside.then(|| first.max(start))
            })
            .collect();
        for address in inside {
            mmu.invlpg(LinearAddress::new(address), watch);
        }
    }

    /// A root is free from now on: the device has lost what it belonged to.
    pub(crate) fn detach_device(&self, root: PhysFrame) {
        let mut spaces = lock(&self.shared.0);
        let Some(place) = spaces.iter().position(|shared| shared.root == root) else { return };
        let Shared { caches: Caches { mut mmu, mut watch }, .. } = spaces.swap_remove(place);
        mmu.forget_everything(&mut watch);
        watch.release(root, Held { as_a: Use::Root, tag: Tag::Pcid(PCID_ZERO) });
    }

    /// Frames are free from now on: the device must have forgotten them.
    pub(crate) fn check_device(&self, checked: &Checked, freed: &Range<usize>) {
        let found = lock(&self.shared.0)
            .iter()
            .find_map(|shared| shared.caches.mmu.entries().find(|entry| overlaps(entry, freed)));
        if let Some(entry) = found {
            let first = frames_of(entry.frame, FrameRole::Page).start;
            let address = entry.address.as_u64() + ((freed.start.saturating_sub(first) as u64) << 12);
            let frame = frame_numbered(first.max(freed.start));
            let kind = ViolationKind::DeviceReachesAfterFree;
            self.report(checked, kind, self.current(), address, frame, Some(entry));
        }
    }
}
