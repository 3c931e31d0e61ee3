//! Look-up in the TLB, and the access itself, in a few instructions that can be begun again.
//!
//! On a processor no interrupt comes between the two. Here a signal may, and its handler may drop
//! the very entry that was looked up; the access would then use what the CPU has just answered for.
//! So the handler sends a program that it finds between the two back to the look-up
//! ([`restarted`]). That needs addresses of instructions, which only assembly has. Where interrupts
//! are polled no signal comes, and plain Rust does the same (`Cpu::access`).
//!
//! The one file with assembly in it.
#![expect(unsafe_code, reason = "a look-up and an access that a signal handler can begin again")]

use core::arch::global_asm;
use core::sync::atomic::AtomicU64;

use crate::memory::{Frame, Memory};
use crate::tlb::{Tlb, WINDOW_END};

/// What came of an access: the value, and whether it was made.
#[repr(C)]
struct Answer {
    value: u64,
    /// 0: made; 1: the entry is not there, or does not allow it.
    missed: u64,
}

// Arguments as in the System V ABI: rdi the entries, rsi the address, rdx the start of memory, rcx
// the value. Nothing of that changes before the access, and nothing is on the stack: whatever
// instruction up to the access itself was next, the first one can be next instead.
global_asm!(
    ".globl mmu_free_running_load",
    ".globl mmu_free_running_load_end",
    ".globl mmu_free_running_store",
    ".globl mmu_free_running_store_end",
    "mmu_free_running_load:",
    "mov rax, rsi",
    "shr rax, 12",
    "mov rax, [rdi + rax * 8]",
    "test al, 1",
    "jz 2f",
    "and rax, -4096",
    "mov r8d, esi",
    "and r8d, 4095",
    "add r8, rdx",
    "mmu_free_running_load_end:",
    "mov rax, [rax + r8]",
    "xor edx, edx",
    "ret",
    "2:",
    "mov edx, 1",
    "ret",
    "mmu_free_running_store:",
    "mov rax, rsi",
    "shr rax, 12",
    "mov rax, [rdi + rax * 8]",
    "test al, 2",
    "jz 2f",
    "and rax, -4096",
    "mov r8d, esi",
    "and r8d, 4095",
    "add r8, rdx",
    "mmu_free_running_store_end:",
    "mov [rax + r8], rcx",
    "xor edx, edx",
    "ret",
    "2:",
    "mov edx, 1",
    "ret",
);

unsafe extern "C" {
    fn mmu_free_running_load(entries: *const AtomicU64, address: u64, memory: *const Frame) -> Answer;
    fn mmu_free_running_load_end();
    fn mmu_free_running_store(
        entries: *const AtomicU64,
        address: u64,
        memory: *const Frame,
        value: u64,
    ) -> Answer;
    fn mmu_free_running_store_end();
}

/// Loads the word at `address`, as `tlb` has it cached; `None` if it has not.
///
/// # Panics
/// If `address` is no multiple of 8, or none of those that programs use.
pub(crate) fn load(tlb: &Tlb, memory: &Memory, address: u64) -> Option<u64> {
    check(address);
    // SAFETY: the entry of every address below `WINDOW_END` is in the array. A cached entry names a
    // frame of the memory (the walk sees to it), so the word, aligned, is in a frame; whoever else
    // uses it does so atomically (F1), and an aligned load of 8 bytes is atomic on x86.
    let answer = unsafe { mmu_free_running_load(tlb.entries().as_ptr(), address, memory.start()) };
    (answer.missed == 0).then_some(answer.value)
}

/// Stores a word; `None` if `tlb` does not have the page cached, or not as writable.
///
/// # Panics
/// As [`load`].
pub(crate) fn store(tlb: &Tlb, memory: &Memory, address: u64, value: u64) -> Option<()> {
    check(address);
    // SAFETY: as in `load`; frames are made of atomics, so they may be written through a pointer
    // that came from a shared reference.
    let answer = unsafe { mmu_free_running_store(tlb.entries().as_ptr(), address, memory.start(), value) };
    (answer.missed == 0).then_some(())
}

fn check(address: u64) {
    assert!(address < WINDOW_END && address.is_multiple_of(8), "programs use aligned words of their window");
}

/// Where a program goes on that was interrupted at `instruction`: at the look-up, if it was between
/// that and the access.
pub(crate) fn restarted(instruction: usize) -> usize {
    let loads = (mmu_free_running_load as *const ()).addr()..=(mmu_free_running_load_end as *const ()).addr();
    let stores =
        (mmu_free_running_store as *const ()).addr()..=(mmu_free_running_store_end as *const ()).addr();
    let within = [loads, stores].into_iter().find(|range| range.contains(&instruction));
    within.map_or(instruction, |range| *range.start())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_between_look_up_and_access_looks_up_again_and_no_other_does() {
        let start = (mmu_free_running_load as *const ()).addr();
        let access = (mmu_free_running_load_end as *const ()).addr();
        assert!(access > start);
        assert_eq!(restarted(start + 3), start);
        assert_eq!(restarted(access), start);
        assert_eq!(restarted(access + 1), access + 1, "the load is done");
        assert_eq!(restarted(start - 1), start - 1);
        let start = (mmu_free_running_store as *const ()).addr();
        assert_eq!(restarted((mmu_free_running_store_end as *const ()).addr()), start);
    }

    #[test]
    fn an_access_goes_where_the_entry_says_and_needs_the_right_to() {
        use crate::tlb::{CACHED, WRITABLE};
        use core::sync::atomic::Ordering;
        let (tlb, memory) = (Tlb::new(), Memory::new(4));
        assert_eq!(load(&tlb, &memory, 0x5008), None);
        memory.words(0x2000).expect("there are four")[1].store(7, Ordering::Relaxed);
        tlb.fill(5, 0x2000 | CACHED);
        assert_eq!(load(&tlb, &memory, 0x5008), Some(7));
        assert_eq!(store(&tlb, &memory, 0x5008, 9), None);
        tlb.fill(5, 0x2000 | CACHED | WRITABLE);
        assert_eq!(store(&tlb, &memory, 0x5008, 9), Some(()));
        assert_eq!(memory.words(0x2000).expect("there are four")[1].load(Ordering::Relaxed), 9);
    }
}
