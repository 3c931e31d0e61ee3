//! A small address space for the self-test: one lower half, pages mapped by hand or by a fault.

use alloc::boxed::Box;
use core::sync::atomic::{AtomicU64, Ordering};

use spin::Mutex;
use x86_64::VirtAddr;
use x86_64::structures::idt::PageFaultErrorCode;
use x86_64::structures::paging::mapper::MapperFlush;
use x86_64::structures::paging::{Mapper, Page, PageTableFlags, PhysFrame, Size4KiB};

use crate::arch::context::UserContext;
use crate::arch::frames::{self, TableFrames};
use crate::arch::mmu;
use crate::arch::paging;
use crate::arch::phys_map::{ADDRESS_BITS, FRAME_BYTES, FRAME_WORDS, phys_to_ptr};
use crate::checks::test_kernel::{self, Context};
use crate::cpu::agent::{self, Outcome};
use crate::cpu::ring3::{self, UserExit};

/// Where the agent's code is mapped.
pub(crate) const TEXT: VirtAddr = VirtAddr::new(0x40_0000_0000);
/// Where test data is mapped.
pub(crate) const DATA: VirtAddr = VirtAddr::new(0x50_0000_0000);
/// Where programs count.
pub(crate) const COUNTS: VirtAddr = VirtAddr::new(0x60_0000_0000);
/// What fills the frame that an entry pointed to first,
pub(crate) const OLD: u64 = 0x01d0_1d01_d01d_01d0;
/// and the one it points to afterwards.
pub(crate) const NEW: u64 = 0x4e3e_4e3e_4e3e_4e3e;

/// An address space. It is not given back, nor are its frames, because the run is short.
#[derive(Debug)]
pub(crate) struct TestSpace {
    root: PhysFrame,
    context: Context,
    /// Held while the tables change.
    tables: Mutex<()>,
}

impl TestSpace {
    /// Readable and writable in ring 0.
    pub(crate) const KERNEL_DATA: PageTableFlags =
        PageTableFlags::PRESENT.union(PageTableFlags::WRITABLE).union(PageTableFlags::NO_EXECUTE);
    /// Readable and writable in ring 3.
    pub(crate) const USER_DATA: PageTableFlags = Self::KERNEL_DATA.union(PageTableFlags::USER_ACCESSIBLE);
    const USER_TEXT: PageTableFlags = PageTableFlags::PRESENT.union(PageTableFlags::USER_ACCESSIBLE);

    pub(crate) fn new() -> &'static Self {
        let root = paging::zeroed_frame().expect("the self-test needs little memory");
        // SAFETY: the frame is new, and nobody has loaded it.
        unsafe { paging::share_kernel_half(root) };
        // SAFETY: just prepared, for this space alone, and never freed.
        let context = unsafe { test_kernel::new_context(root) };
        Box::leak(Box::new(Self { root, context, tables: Mutex::new(()) }))
    }

    /// Makes this the address space of the running CPU.
    pub(crate) fn load(&'static self) {
        test_kernel::switch_to(Some(&self.context));
    }

    /// Puts the running CPU back into the kernel's own address space.
    pub(crate) fn load_kernel_root() {
        test_kernel::switch_to(None);
    }

    /// Makes every CPU forget the page at `address`, and returns when all have.
    pub(crate) fn flush(&'static self, address: VirtAddr) {
        test_kernel::flush_page(&self.context, address);
    }

    pub(crate) fn frame_filled_with(&self, value: u64) -> PhysFrame {
        let frame = frames::allocate().expect("the self-test needs little memory");
        let words: *mut u64 = phys_to_ptr(frame.start_address());
        for index in 0..FRAME_WORDS {
            // SAFETY: the frame is new, ours alone, and mapped (B3).
            unsafe { words.wrapping_add(index).write(value) };
        }
        frame
    }

    /// Reads a word of a frame, wherever it is mapped.
    pub(crate) fn word(frame: PhysFrame, index: usize) -> u64 {
        assert!(index < FRAME_WORDS);
        let words: *const u64 = phys_to_ptr(frame.start_address());
        // SAFETY: inside the frame, which belongs to the self-test and is mapped (B3); volatile,
        // since ring 3 writes there.
        unsafe { words.wrapping_add(index).read_volatile() }
    }

    /// Writes a word of a frame that belongs to the self-test.
    pub(crate) fn set_word(frame: PhysFrame, index: usize, value: u64) {
        assert!(index < FRAME_WORDS);
        let words: *mut u64 = phys_to_ptr(frame.start_address());
        // SAFETY: inside the frame, which belongs to the self-test and is mapped (B3); volatile,
        // since ring 3 may read there.
        unsafe { words.wrapping_add(index).write_volatile(value) };
    }

    /// Maps a page that was not mapped before.
    pub(crate) fn map(&self, address: VirtAddr, frame: PhysFrame, flags: PageTableFlags) {
        let _tables = self.tables.lock();
        // SAFETY: the lock keeps others from changing the tables meanwhile.
        let mut mapper = unsafe { paging::mapper(self.root) };
        let page = Page::<Size4KiB>::containing_address(address);
        // SAFETY: a page of the lower half, which only the self-test uses; the frame is one of its
        // own.
        let result = unsafe { mapper.map_to(page, frame, flags, &mut TableFrames) };
        // The entry was not present, so nothing is cached.
        MapperFlush::ignore(result.expect("the self-test maps a page once"));
    }

    /// Maps the agent's code at [`TEXT`].
    pub(crate) fn map_agent(&self) {
        let frame = paging::zeroed_frame().expect("the self-test needs little memory");
        let text = agent::code();
        assert!(text.len() as u64 <= FRAME_BYTES, "the agent fits one page");
        // SAFETY: the frame is new, mapped (B3), and large enough.
        unsafe {
            phys_to_ptr::<u8>(frame.start_address()).copy_from_nonoverlapping(text.as_ptr(), text.len())
        };
        self.map(TEXT, frame, Self::USER_TEXT);
    }

    /// Points the entry of a mapped page at another frame, and tells nobody.
    pub(crate) fn remap(&self, address: VirtAddr, frame: PhysFrame) {
        let _tables = self.tables.lock();
        let mut table = self.root;
        for index in [address.p4_index(), address.p3_index(), address.p2_index()] {
            let entry = entry(table, usize::from(index)).load(Ordering::Relaxed);
            table = PhysFrame::containing_address(x86_64::PhysAddr::new(entry & ADDRESS_BITS));
        }
        let leaf = entry(table, usize::from(address.p1_index()));
        let flags = leaf.load(Ordering::Relaxed) & !ADDRESS_BITS;
        leaf.store(frame.start_address().as_u64() | flags, Ordering::SeqCst);
    }

    /// Reads a word of the address space in ring 0; the space must be loaded.
    pub(crate) fn read(&self, address: VirtAddr) -> u64 {
        assert!(mmu::current_root() == self.root, "the address space is loaded");
        // SAFETY: the self-test reads only what it has mapped; volatile, since the page may change
        // under its address.
        unsafe { address.as_ptr::<u64>().read_volatile() }
    }

    /// Runs an agent to its end, mapping a zeroed page wherever it faults on one that is missing.
    ///
    /// # Errors
    ///
    /// Whatever else stopped it.
    pub(crate) fn run_agent(
        &self,
        context: &mut UserContext,
        faults: &AtomicU64,
    ) -> Result<Outcome, UserExit> {
        loop {
            match ring3::run_user(context) {
                UserExit::Syscall => return Ok(Outcome::from_context(context)),
                UserExit::PageFault { address, error }
                    if !error.contains(PageFaultErrorCode::PROTECTION_VIOLATION) =>
                {
                    faults.fetch_add(1, Ordering::Relaxed);
                    let frame = paging::zeroed_frame().expect("the self-test needs little memory");
                    self.map(address.align_down(FRAME_BYTES), frame, Self::USER_DATA);
                }
                other => return Err(other),
            }
        }
    }
}

/// Returns an entry of a page table.
fn entry(table: PhysFrame, index: usize) -> &'static AtomicU64 {
    let entries: *const AtomicU64 = phys_to_ptr(table.start_address());
    // SAFETY: tables of a test space are never freed, and all RAM is mapped (B3). Entries are
    // changed atomically, or by the mapper under the same lock.
    unsafe { &*entries.wrapping_add(index) }
}
