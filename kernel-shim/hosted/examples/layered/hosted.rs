//! The hosted machine as the kernel's hardware: in the kernel's tests, and nowhere else.

use std::sync::Arc;

use mmu_gather::pagetable::TableLock;
use mmu_gather::tlb::{Answers, CachedTranslations, CpuId, CpuSet, PcidSupport};
use mmu_hosted::{FrameRole, GiveWay, HostedMachine};
use x86_64::instructions::tlb::Pcid;
use x86_64::structures::paging::{PageTable, PhysFrame};

use crate::hardware::{Bits, Hardware, Role};

const fn role(role: Role) -> FrameRole {
    match role {
        Role::Page => FrameRole::Page,
        Role::Table => FrameRole::Table,
    }
}

impl Hardware for Arc<HostedMachine> {
    type Relax = GiveWay;

    fn cpu(&self) -> CpuId {
        self.current()
    }

    fn nr_cpus(&self) -> u32 {
        HostedMachine::nr_cpus(self)
    }

    fn frames(&self) -> core::ops::Range<u64> {
        self.nr_reserved_frames()..self.nr_frames()
    }

    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        HostedMachine::frame_to_pointer(self, frame)
    }

    fn without_interrupts<R>(&self, f: impl FnOnce() -> R) -> R {
        HostedMachine::without_interrupts(self, f)
    }

    fn invlpg(&self, address: u64) {
        HostedMachine::invlpg(self, address);
    }

    unsafe fn load_cr3(&self, root: PhysFrame, pcid: Pcid, cached: CachedTranslations) {
        HostedMachine::load_cr3(self, root, pcid, cached);
    }

    fn cr3(&self) -> Option<PhysFrame> {
        HostedMachine::cr3(self)
    }

    fn pcid_support(&self) -> PcidSupport {
        HostedMachine::pcid_support(self)
    }

    fn send_flush_interrupt(&self, targets: &CpuSet<Bits>) {
        HostedMachine::send_flush_interrupt(self, targets);
    }

    fn wait_for_answers(&self, answers: Answers<'_, Bits>) {
        HostedMachine::wait_for_answers(self, answers);
    }

    fn answered(&self, initiator: CpuId) {
        HostedMachine::answered(self, initiator);
    }

    fn allocated(&self, frame: PhysFrame, used: Role) {
        HostedMachine::allocated(self, frame, role(used));
    }

    fn freed(&self, frame: PhysFrame, used: Role) {
        HostedMachine::freed(self, frame, role(used));
    }

    fn about_to_lock(&self, table: PhysFrame, lock: &TableLock<GiveWay>) {
        // SAFETY: the locks live as long as the kernel.
        unsafe { HostedMachine::about_to_lock(self, table, lock) };
    }
}
