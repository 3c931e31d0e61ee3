//! What a kernel asks of the machine that it runs on. Everything else of the kernel is generic over
//! this, and so runs on bare metal and in a test.

use core::arch::asm;
use core::sync::atomic::AtomicU64;

use mmu_gather::pagetable::TableLock;
use mmu_gather::tlb::{Answers, CachedTranslations, CpuId, CpuSet, PcidSupport};
use spin::{RelaxStrategy, Spin};
use x86_64::PhysAddr;
use x86_64::instructions::interrupts;
use x86_64::instructions::tlb::Pcid;
use x86_64::registers::control::{Cr3, Cr4, Cr4Flags};
use x86_64::registers::model_specific::Msr;
use x86_64::structures::paging::{PageTable, PhysFrame};

/// Room for 64 CPUs.
pub(crate) type Bits = [AtomicU64; 1];

/// A machine.
pub(crate) trait Hardware: Send + Sync + 'static {
    /// What a CPU does while it waits for a lock.
    type Relax: RelaxStrategy + Send + Sync;

    /// The number of the CPU that this runs on.
    fn cpu(&self) -> CpuId;
    /// How many CPUs there are.
    fn nr_cpus(&self) -> u32;
    /// The frames that the kernel may use.
    fn frames(&self) -> core::ops::Range<u64>;
    /// Where the kernel sees the bytes of a frame.
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable;
    /// Runs `f` with interrupts off.
    fn without_interrupts<R>(&self, f: impl FnOnce() -> R) -> R;
    /// INVLPG.
    fn invlpg(&self, address: u64);
    /// MOV to CR3.
    ///
    /// # Safety
    /// That of `Cpus::load_cr3`.
    unsafe fn load_cr3(&self, root: PhysFrame, pcid: Pcid, cached: CachedTranslations);
    /// What CR3 points to, if that is known.
    fn cr3(&self) -> Option<PhysFrame>;
    /// Whether CR4.PCIDE is set.
    fn pcid_support(&self) -> PcidSupport;
    /// Sends the flush interrupt.
    fn send_flush_interrupt(&self, targets: &CpuSet<Bits>);
    /// Called in a loop while this CPU waits for answers.
    fn wait_for_answers(&self, answers: Answers<'_, Bits>);

    // What a test is told, and bare metal ignores.

    /// This CPU has answered.
    fn answered(&self, _initiator: CpuId) {}
    /// The frame is in use from now on.
    fn allocated(&self, _frame: PhysFrame, _role: Role) {}
    /// The frame is free from now on.
    fn freed(&self, _frame: PhysFrame, _role: Role) {}
    /// The lock is about to be taken.
    fn about_to_lock(&self, _table: PhysFrame, _lock: &TableLock<Self::Relax>) {}
}

/// What a frame is used for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Role {
    /// A page.
    Page,
    /// A page table.
    Table,
}

/// The machine that the image runs on: each method is an instruction, or a word of memory. Here it
/// is compiled and never run.
#[allow(dead_code, reason = "a test is no kernel")]
pub(crate) struct BareMetal {
    /// Where all of physical memory is mapped.
    pub(crate) offset: u64,
    /// The number that each APIC has.
    pub(crate) apics: &'static [u32],
    /// The frames that the boot loader has left free.
    pub(crate) free: core::ops::Range<u64>,
}

impl Hardware for BareMetal {
    type Relax = Spin;

    fn cpu(&self) -> CpuId {
        // SAFETY: the kernel has written the number into this MSR (IA32_TSC_AUX).
        let number = unsafe { Msr::new(0xc000_0103).read() };
        CpuId::new(u32::try_from(number).unwrap_or(0))
    }

    fn nr_cpus(&self) -> u32 {
        u32::try_from(self.apics.len()).unwrap_or(1)
    }

    fn frames(&self) -> core::ops::Range<u64> {
        self.free.clone()
    }

    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        core::ptr::with_exposed_provenance_mut(
            usize::try_from(self.offset + frame.start_address().as_u64()).unwrap_or(0),
        )
    }

    fn without_interrupts<R>(&self, f: impl FnOnce() -> R) -> R {
        interrupts::without_interrupts(f)
    }

    fn invlpg(&self, address: u64) {
        // SAFETY: to forget a translation is always legal.
        unsafe { asm!("invlpg [{}]", in(reg) address, options(nostack, preserves_flags)) };
    }

    unsafe fn load_cr3(&self, root: PhysFrame, pcid: Pcid, cached: CachedTranslations) {
        match cached {
            // SAFETY: the caller's promise.
            CachedTranslations::Flush => unsafe { Cr3::write_pcid(root, pcid) },
            // SAFETY: the caller's promise.
            CachedTranslations::Keep => unsafe { Cr3::write_pcid_no_flush(root, pcid) },
        }
    }

    fn cr3(&self) -> Option<PhysFrame> {
        Some(PhysFrame::containing_address(PhysAddr::new(Cr3::read_raw().0.start_address().as_u64())))
    }

    fn pcid_support(&self) -> PcidSupport {
        if Cr4::read().contains(Cr4Flags::PCID) { PcidSupport::On } else { PcidSupport::Off }
    }

    fn send_flush_interrupt(&self, targets: &CpuSet<Bits>) {
        for target in targets.iter() {
            let apic = u64::from(self.apics[target.index()]);
            // SAFETY: the mail is written before the interrupt is sent: writes to the ICR of an
            // x2APIC order nothing.
            unsafe { asm!("mfence", "lfence", options(nostack, preserves_flags)) };
            // SAFETY: vector 0xf0 is the flush interrupt of this kernel.
            unsafe { Msr::new(0x830).write(apic << 32 | 0xf0) };
        }
    }

    fn wait_for_answers(&self, _: Answers<'_, Bits>) {
        core::hint::spin_loop();
    }
}
