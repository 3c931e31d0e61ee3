//! The hardware's walk: from CR3, or from a cached paging structure, to the page, setting A and D
//! by compare-and-swap.

use core::sync::atomic::{AtomicU64, Ordering};

use mmu_kernel_shim::UserAccess;

use crate::cpu::Cpu;
use crate::memory::{Memory, PAGE, is_poison};
use crate::tlb::{CACHED, PAGES_A_TABLE, TABLE_RIGHTS, Tlb, WRITABLE};
use crate::violation::ViolationKind;

const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER: u64 = 4;
const ACCESSED: u64 = 0x20;
const DIRTY: u64 = 0x40;
const LARGE: u64 = 0x80;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const LARGE_ADDRESS: u64 = 0x000f_ffff_ffe0_0000;

/// Why a walk found nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoPage {
    /// Not present, or not allowed: a page fault.
    Fault,
    /// It went where it must not: the violation, and the entry.
    Astray(ViolationKind, u64),
}

/// Walks for an access to page number `page`, and says what the TLB may cache.
pub(crate) fn walk(memory: &Memory, cpu: &Cpu, page: usize, access: UserAccess) -> Result<u64, NoPage> {
    let tlb = cpu.tlb();
    let below = page / PAGES_A_TABLE;
    let cached = tlb.table(below);
    let (table, rights) = if cached == 0 {
        match find_table(memory, cpu, tlb, page)? {
            Found::Table(entry) => {
                tlb.cache_table(below, entry);
                (entry & ADDRESS, entry & TABLE_RIGHTS)
            }
            Found::Large { entry, value, rights } => return large(entry, value, rights, page, access),
        }
    } else {
        (cached & ADDRESS, cached & TABLE_RIGHTS)
    };
    let entry = entry_of(memory, table, page % PAGES_A_TABLE)?;
    let value = mark(memory, entry, rights, access, ADDRESS)?;
    Ok(cacheable(value & ADDRESS, value, rights))
}

enum Found<'m> {
    /// A last-level table, with the rights of the way there.
    Table(u64),
    /// A 2 MiB page: its entry, what it holds, the rights of the way there.
    Large { entry: &'m AtomicU64, value: u64, rights: u64 },
}

/// The last-level table for `page`, by the entries above it.
fn find_table<'m>(memory: &'m Memory, cpu: &Cpu, tlb: &Tlb, page: usize) -> Result<Found<'m>, NoPage> {
    let mut upper = tlb.upper();
    if upper == 0 {
        upper = cpu.root.load(Ordering::Relaxed) | TABLE_RIGHTS;
        // Programs use the first GiB: entry 0 of the root, and of the table below it.
        for _ in 0..2 {
            let entry = entry_of(memory, upper & ADDRESS, 0)?;
            let value = mark(memory, entry, upper & TABLE_RIGHTS, UserAccess::Read, ADDRESS)?;
            upper = value & ADDRESS | value & upper & TABLE_RIGHTS;
        }
        tlb.cache_upper(upper);
    }
    let rights = upper & TABLE_RIGHTS;
    let entry = entry_of(memory, upper & ADDRESS, page / PAGES_A_TABLE)?;
    let value = entry.load(Ordering::Acquire);
    if value & (PRESENT | LARGE) == PRESENT | LARGE {
        return Ok(Found::Large { entry, value, rights });
    }
    let value = mark(memory, entry, rights, UserAccess::Read, ADDRESS)?;
    if value & LARGE != 0 {
        return Ok(Found::Large { entry, value, rights });
    }
    Ok(Found::Table(value & ADDRESS | value & rights & TABLE_RIGHTS))
}

/// A page of a 2 MiB page.
fn large(entry: &AtomicU64, value: u64, rights: u64, page: usize, access: UserAccess) -> Result<u64, NoPage> {
    let marked = exchange(entry, value, |value| {
        if value & (PRESENT | LARGE) == PRESENT | LARGE {
            wanted(value, rights, access)
        } else {
            Err(NoPage::Fault)
        }
    })?;
    let offset = (page % PAGES_A_TABLE) as u64 * PAGE;
    Ok(cacheable(marked & LARGE_ADDRESS | offset, marked, rights))
}

/// The entry with this index of the table at `table`.
fn entry_of(memory: &Memory, table: u64, index: usize) -> Result<&AtomicU64, NoPage> {
    let words = memory.words(table).ok_or(NoPage::Astray(ViolationKind::WalkedAstray, table))?;
    Ok(&words[index])
}

/// Sets A, and D for a write, in an entry that allows the access; what it holds then.
fn mark(
    memory: &Memory,
    entry: &AtomicU64,
    rights: u64,
    access: UserAccess,
    address: u64,
) -> Result<u64, NoPage> {
    exchange(entry, entry.load(Ordering::Acquire), |value| {
        if value & PRESENT != 0 && value & address >= memory.nr_frames() * PAGE {
            // Before anything is written there: what was taken for an entry is none.
            return Err(NoPage::Astray(ViolationKind::WalkedAstray, value));
        }
        wanted(value, rights, access)
    })
}

/// What an entry becomes by an access, if it allows that.
fn wanted(value: u64, rights: u64, access: UserAccess) -> Result<u64, NoPage> {
    if is_poison(value) {
        return Err(NoPage::Astray(ViolationKind::FreedTableWalked, value));
    }
    let needed = match access {
        UserAccess::Read | UserAccess::Fetch => USER,
        UserAccess::Write => USER | WRITE,
    };
    if value & PRESENT == 0 || value & rights & needed != needed {
        return Err(NoPage::Fault);
    }
    Ok(value | ACCESSED | if access == UserAccess::Write { DIRTY } else { 0 })
}

/// Changes an entry as `change` says, if it does not change meanwhile.
fn exchange(
    entry: &AtomicU64,
    mut value: u64,
    change: impl Fn(u64) -> Result<u64, NoPage>,
) -> Result<u64, NoPage> {
    loop {
        let wanted = change(value)?;
        if wanted == value {
            return Ok(value);
        }
        // ORDERING: as a locked instruction of the walker: the tables below, and the page, are seen
        // as they were when they were linked.
        match entry.compare_exchange(value, wanted, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return Ok(wanted),
            Err(now) => value = now,
        }
    }
}

/// What the TLB keeps. The right to write without D would let a write pass that sets none.
fn cacheable(frame: u64, value: u64, rights: u64) -> u64 {
    let may_write = value & rights & WRITE != 0 && value & DIRTY != 0;
    frame | CACHED | if may_write { WRITABLE } else { 0 }
}
