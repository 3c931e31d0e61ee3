//! The hosted machine as the small kernel wants it.
#![expect(unsafe_code, reason = "implements the machine's contract")]

use core::ops::Deref;
use std::sync::Arc;

use mmu_gather::pagetable::{PagingMode, TableLock};
use mmu_gather::tlb::{
    Answers, CachedTranslations, CpuId, CpuSet, CtxId, EarlyAnswer, OnlineCpus, PageSpan, PcidSupport,
};
use mmu_hosted::mmu::Fault;
use mmu_hosted::{Bits, GiveWay, HostedMachine};
use mmu_kernel_shim::{Machine, Moment, Note, Place, Seam, UserAccess};
use x86_64::instructions::tlb::Pcid;
use x86_64::structures::paging::{PageTable, PhysFrame};

use crate::words;

/// The hosted machine below the small kernel.
///
/// It is behind an `Arc` so that CPUs can run it while the kernel owns it.
#[derive(Clone, Debug)]
pub struct Hosted(Arc<HostedMachine>);

impl Hosted {
    /// The program on this CPU uses an address, as [`HostedMachine::user_access`].
    ///
    /// # Errors
    /// The fault.
    pub fn user_access(&self, address: u64, access: UserAccess) -> Result<Option<PhysFrame>, Fault> {
        self.0.user_access(address, words::access(access))
    }

    /// The device uses an address, as [`HostedMachine::device_access`].
    #[must_use]
    pub fn device_access(&self, ctx_id: CtxId, address: u64, access: UserAccess) -> Option<PhysFrame> {
        self.0.device_access(ctx_id, address, words::access(access))
    }
}

impl From<Arc<HostedMachine>> for Hosted {
    fn from(machine: Arc<HostedMachine>) -> Self {
        Self(machine)
    }
}

impl Deref for Hosted {
    type Target = Arc<HostedMachine>;

    fn deref(&self) -> &Arc<HostedMachine> {
        &self.0
    }
}

// SAFETY: frames are parts of one reservation that lives as long as the machine. Code runs as one
// CPU until it gives way, and comes back as the same one. A CPU that is interrupted runs the
// handler when its interrupts are on. INVLPG and CR3 loads do to the software MMU what the SDM
// says, unless a fault was planted.
unsafe impl Machine for Hosted {
    type Relax = GiveWay;
    type Bits = Bits;

    fn nr_cpus(&self) -> u32 {
        self.0.nr_cpus()
    }

    fn nr_frames(&self) -> u64 {
        self.0.nr_frames()
    }

    fn nr_reserved_frames(&self) -> u64 {
        self.0.nr_reserved_frames()
    }

    #[inline]
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        self.0.frame_to_pointer(frame)
    }

    fn pointer_to_frame(&self, pointer: *const PageTable) -> PhysFrame {
        self.0.pointer_to_frame(pointer)
    }

    fn pinned<R>(&self, f: impl FnOnce(CpuId) -> R) -> R {
        self.0.pinned(f)
    }

    fn without_interrupts<R>(&self, f: impl FnOnce() -> R) -> R {
        self.0.without_interrupts(f)
    }

    fn send_flush_interrupt(&self, targets: &CpuSet<Bits>) {
        self.0.send_flush_interrupt(targets);
    }

    fn wait_for_answers(&self, answers: Answers<'_, Bits>) {
        self.0.wait_for_answers(answers);
    }

    fn answered(&self, initiator: CpuId) {
        self.0.answered(initiator);
    }

    fn answered_early(&self, early: &EarlyAnswer) {
        self.0.answered_early(early);
    }

    fn cr3(&self) -> Option<PhysFrame> {
        self.0.cr3()
    }

    fn invlpg(&self, address: u64) {
        self.0.invlpg(address);
    }

    unsafe fn load_cr3(&self, root: PhysFrame, pcid: Pcid, cached: CachedTranslations) {
        self.0.load_cr3(root, pcid, cached);
    }

    fn invalidate_secondary(&self, ctx_id: CtxId, span: Option<PageSpan>) {
        self.0.invalidate_secondary(ctx_id, span);
    }

    fn online_cpus(&self) -> OnlineCpus {
        self.0.online_cpus()
    }

    fn pcid_support(&self) -> PcidSupport {
        self.0.pcid_support()
    }

    fn paging_mode(&self) -> PagingMode {
        self.0.paging_mode()
    }

    fn cond_resched(&self) {
        self.0.cond_resched();
    }

    #[inline]
    fn notes_used_lines(&self) -> bool {
        !self.0.options().variants[0]
    }

    #[inline]
    fn forbids_execution(&self) -> bool {
        true
    }

    #[inline]
    fn seam(&self, seam: Seam) {
        self.0.seam(words::seam(seam));
    }

    #[inline]
    fn note(&self, note: Note) {
        self.0.note(words::note(note));
    }

    #[inline]
    fn unlocked() {
        mmu_hosted::unlocked();
    }

    fn moment(&self) -> Moment {
        Moment(self.0.moment().0)
    }

    fn zero_frames(&self, first: PhysFrame, count: u64) {
        self.0.zero_frames(first, count);
    }

    fn copy_frame(&self, from: PhysFrame, to: PhysFrame) {
        self.0.copy_frame(from, to);
    }

    fn write_to_disk(&self, frame: PhysFrame, place: Place) {
        self.0.write_to_disk(frame, words::place(place));
    }

    fn read_from_disk(&self, place: Place, frame: PhysFrame) {
        self.0.read_from_disk(words::place(place), frame);
    }

    fn about_to_lock(&self, frame: PhysFrame, lock: &TableLock<GiveWay>) {
        // SAFETY: the locks are in the kernel's metadata of frames, which lives as long as it does.
        unsafe { self.0.about_to_lock(frame, lock) };
    }
}
