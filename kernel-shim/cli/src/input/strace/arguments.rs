//! The arguments of one call that succeeded, as a [`MemoryCall`].

use core::ops::Range;

use crate::input::layout::snapshot::{PAGE_BYTES, Prot, Sharing, USER_END};
use crate::input::strace::events::{
    Advice, Backing, ChildMemory, MemoryCall, OldRange, Placement, TraceProblem,
};
use crate::input::strace::flags::{self, flags};
use crate::input::strace::lex::{self, Call};
use crate::input::strace::number::{number, number32};

/// Reads the arguments of a call that succeeded.
pub(super) fn memory_call(call: &Call<'_>) -> Result<MemoryCall, TraceProblem> {
    match (call.name, call.arguments.as_slice()) {
        ("mmap" | "mmap2" | "old_mmap", &[_, len, prot, flags, _, offset]) => {
            mmap(call, len, prot, flags, offset)
        }
        ("munmap", &[start, len]) => Ok(MemoryCall::Munmap { range: range(start, len)? }),
        ("mremap", &[old, old_len, new_len, named, ..]) => Ok(MemoryCall::Mremap {
            from: range(old, old_len)?,
            to: range(call.result, new_len)?,
            old_range: match flags(named, flags::MREMAP).has(flags::MREMAP_DONTUNMAP) {
                true => OldRange::KeptEmpty,
                false => OldRange::Unmapped,
            },
        }),
        ("brk", &[_]) => Ok(MemoryCall::Brk { end: user_address(call.result)? }),
        ("madvise", &[start, len, named]) => {
            Ok(MemoryCall::Madvise { range: range(start, len)?, advice: advice(named) })
        }
        ("mprotect", &[start, len, named]) | ("pkey_mprotect", &[start, len, named, _]) => {
            Ok(MemoryCall::Mprotect { range: range(start, len)?, prot: prot(named)? })
        }
        ("vfork", _) => clone(call, ChildMemory::Borrowed),
        ("fork", _) => clone(call, ChildMemory::Copied),
        ("clone" | "clone3", arguments) => clone(call, child_memory(arguments)?),
        ("execve" | "execveat", _) => Ok(MemoryCall::Exec),
        (_, arguments) => Err(TraceProblem::expected("the arguments of this call", &arguments.join(", "))),
    }
}

fn mmap(
    call: &Call<'_>,
    len: &str,
    named: &str,
    words: &str,
    offset: &str,
) -> Result<MemoryCall, TraceProblem> {
    let flags = flags(words, flags::MAP);
    let sharing = match flags.bits & flags::MAP_TYPE {
        flags::MAP_PRIVATE => Sharing::Private,
        0 => return Err(TraceProblem::expected("`MAP_PRIVATE` or `MAP_SHARED`", words)),
        _ => Sharing::Shared,
    };
    let backing = match flags.has(flags::MAP_ANONYMOUS) {
        true => Backing::Anonymous,
        false => Backing::File { offset: address(offset)? },
    };
    let mut other_flags: Vec<_> = flags.unknown.iter().map(|word| (*word).to_owned()).collect();
    if flags.has(flags::MAP_GROWSDOWN) {
        other_flags.push("MAP_GROWSDOWN".to_owned());
    }
    Ok(MemoryCall::Mmap {
        range: range(call.result, len)?,
        prot: prot(named)?,
        sharing,
        backing,
        placement: if flags.has(flags::MAP_FIXED) { Placement::Replace } else { Placement::Free },
        other_flags,
    })
}

/// A segment of System V shared memory as `shmat` attaches it, and where.
pub(super) fn shared_mapping(start: &str, size: u64, words: &str) -> Option<(Range<u64>, MemoryCall)> {
    let range = range(start, &size.to_string()).ok().filter(|range| !range.is_empty())?;
    let flags = flags(words, flags::SHM);
    let prot = Prot { read: true, write: !flags.has(flags::SHM_RDONLY), exec: flags.has(flags::SHM_EXEC) };
    let placement = if flags.has(flags::SHM_REMAP) { Placement::Replace } else { Placement::Free };
    let (sharing, backing) = (Sharing::Shared, Backing::Anonymous);
    let other_flags = Vec::new();
    Some((range.clone(), MemoryCall::Mmap { range, prot, sharing, backing, placement, other_flags }))
}

fn clone(call: &Call<'_>, memory: ChildMemory) -> Result<MemoryCall, TraceProblem> {
    Ok(MemoryCall::Clone {
        child: child(call.result)
            .ok_or_else(|| TraceProblem::expected("the number of the new thread", call.result))?,
        memory,
    })
}

/// The number of a new thread: `102`, `102<a.out>`, or that outside a container in `2 /* 102 in
/// strace's PID NS */`.
fn child(result: &str) -> Option<u32> {
    let outside = result.split_once("/* ").and_then(|(_, rest)| rest.split_once(" in strace's PID NS"));
    let word = outside.map_or_else(|| result.split([' ', '<']).next(), |(digits, _)| Some(digits));
    word.and_then(number32).filter(|&child| child > 0)
}

/// From `flags=` among the arguments of `clone`, or in the structure that is the first argument of
/// `clone3`.
fn child_memory(arguments: &[&str]) -> Result<ChildMemory, TraceProblem> {
    let structure = arguments.first().and_then(|first| first.strip_prefix('{'));
    let fields = structure.and_then(|inside| lex::list(inside, '}')).map(|(fields, _)| fields);
    let named = fields.as_deref().unwrap_or(arguments).iter().find_map(|field| field.strip_prefix("flags="));
    // `-e raw=clone` prints no names; the flags come first.
    let raw = || arguments.first().copied().filter(|first| arguments.len() >= 4 && number(first).is_some());
    let words = named
        .or_else(raw)
        .ok_or_else(|| TraceProblem::expected("`flags=` among the arguments", &arguments.join(", ")))?;
    let flags = flags(words, flags::CLONE);
    Ok(match (flags.has(flags::CLONE_VM), flags.has(flags::CLONE_VFORK)) {
        (true, true) => ChildMemory::Borrowed,
        (true, false) => ChildMemory::Shared,
        (false, _) => ChildMemory::Copied,
    })
}

fn prot(text: &str) -> Result<Prot, TraceProblem> {
    let flags = flags(text, flags::PROT);
    // Other words of that name say nothing about access.
    if flags.unknown.iter().any(|word| !word.starts_with("PROT_")) {
        return Err(TraceProblem::expected("`PROT_` words", text));
    }
    Ok(Prot { read: flags.has(1), write: flags.has(2), exec: flags.has(4) })
}

fn advice(text: &str) -> Advice {
    // What strace has no name for is a number and a comment, and so is everything for `-X raw`.
    let word = text.split(' ').next().unwrap_or(text);
    match (word, number(word)) {
        ("MADV_DONTNEED" | "MADV_DONTNEED_LOCKED", _) | (_, Some(4 | 24)) => Advice::DontNeed,
        ("MADV_FREE", _) | (_, Some(8)) => Advice::Free,
        ("MADV_REMOVE", _) | (_, Some(9)) => Advice::Remove,
        ("MADV_PAGEOUT", _) | (_, Some(21)) => Advice::PageOut,
        ("MADV_POPULATE_READ", _) | (_, Some(22)) => Advice::PopulateRead,
        ("MADV_POPULATE_WRITE", _) | (_, Some(23)) => Advice::PopulateWrite,
        ("MADV_HUGEPAGE", _) | (_, Some(14)) => Advice::HugePage,
        ("MADV_NOHUGEPAGE", _) | (_, Some(15)) => Advice::NoHugePage,
        ("MADV_DONTFORK", _) | (_, Some(10)) => Advice::DontFork,
        ("MADV_DOFORK", _) | (_, Some(11)) => Advice::DoFork,
        ("MADV_GUARD_INSTALL", _) | (_, Some(102)) => Advice::GuardInstall,
        ("MADV_GUARD_REMOVE", _) | (_, Some(103)) => Advice::GuardRemove,
        _ => Advice::Other(text.to_owned()),
    }
}

/// A page-aligned start and a length that is rounded up to whole pages, inside the user half.
fn range(start: &str, len: &str) -> Result<Range<u64>, TraceProblem> {
    const RANGE: &str = "a range of whole pages in the user half";
    let not_a_range = || TraceProblem::expected(RANGE, &format!("{start}, {len}"));
    let start_bytes = number(start).map(of_32_bits).filter(|start| start.is_multiple_of(PAGE_BYTES));
    let len_bytes = number(len).and_then(|len| len.checked_next_multiple_of(PAGE_BYTES));
    let (first, len) = start_bytes.zip(len_bytes).ok_or_else(not_a_range)?;
    check_architecture(first, start)?;
    let end = first.checked_add(len).filter(|&end| end <= USER_END).ok_or_else(not_a_range)?;
    Ok(first..end)
}

fn user_address(text: &str) -> Result<u64, TraceProblem> {
    let address = address(text).map(of_32_bits)?;
    check_architecture(address, text)?;
    if address <= USER_END {
        Ok(address)
    } else {
        Err(TraceProblem::expected("an address in the user half", text))
    }
}

/// strace prints addresses of 32-bit programs with their sign extended in some versions. A 64-bit
/// program has nothing in the last 2 GiB that a call could be about.
const fn of_32_bits(address: u64) -> u64 {
    if address >= 0xffff_ffff_8000_0000 { address & 0xffff_ffff } else { address }
}

/// Programs of other architectures have addresses where x86_64 has none, or the kernel's.
fn check_architecture(address: u64, found: &str) -> Result<(), TraceProblem> {
    let which = match address >> 47 {
        1 => "AArch64 has addresses of 48 bits",
        2..32 => "AArch64 has addresses of up to 52 bits",
        32..0x200 => "x86_64 with page tables of five levels has addresses of up to 56 bits",
        0x1_fff0..=0x1_ffff if address >> 44 == 0xf_ff80 => "sparc64 has programs on both sides of its hole",
        _ => return Ok(()),
    };
    Err(TraceProblem::OtherArchitecture { found: found.to_owned(), which })
}

fn address(text: &str) -> Result<u64, TraceProblem> {
    number(text).ok_or_else(|| TraceProblem::expected("a number below 2^64", text))
}
