//! The arguments of one call that succeeded, as a [`MemoryCall`].

use core::ops::Range;

use crate::input::layout::snapshot::{PAGE_BYTES, Prot, Sharing, USER_END};
use crate::input::strace::events::{
    Advice, Backing, ChildMemory, MemoryCall, OldRange, Placement, TraceProblem,
};
use crate::input::strace::lex::{self, Call};

/// Reads the arguments of a call that succeeded.
pub(super) fn memory_call(call: &Call<'_>) -> Result<MemoryCall, TraceProblem> {
    match (call.name, call.arguments.as_slice()) {
        ("mmap" | "mmap2" | "old_mmap", &[_, len, prot, flags, _, offset]) => {
            mmap(call, len, prot, flags, offset)
        }
        ("munmap", &[start, len]) => Ok(MemoryCall::Munmap { range: range(start, len)? }),
        ("mremap", &[old, old_len, new_len, flags, ..]) => Ok(MemoryCall::Mremap {
            from: range(old, old_len)?,
            to: range(call.result, new_len)?,
            old_range: match words(flags).any(|flag| flag == "MREMAP_DONTUNMAP") {
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
    flags: &str,
    offset: &str,
) -> Result<MemoryCall, TraceProblem> {
    let mut sharing = None;
    let mut backing = Backing::File { offset: address(offset)? };
    let mut placement = Placement::Free;
    let mut other_flags = Vec::new();
    for flag in words(flags) {
        match flag {
            "MAP_PRIVATE" => sharing = Some(Sharing::Private),
            "MAP_SHARED" | "MAP_SHARED_VALIDATE" => sharing = Some(Sharing::Shared),
            "MAP_ANONYMOUS" => backing = Backing::Anonymous,
            "MAP_FIXED" => placement = Placement::Replace,
            other => other_flags.push(other.to_owned()),
        }
    }
    Ok(MemoryCall::Mmap {
        range: range(call.result, len)?,
        prot: prot(named)?,
        sharing: sharing.ok_or_else(|| TraceProblem::expected("`MAP_PRIVATE` or `MAP_SHARED`", flags))?,
        backing,
        placement,
        other_flags,
    })
}

fn clone(call: &Call<'_>, memory: ChildMemory) -> Result<MemoryCall, TraceProblem> {
    let child = call.result.split(' ').next().and_then(lex::number32).filter(|&child| child > 0);
    Ok(MemoryCall::Clone {
        child: child.ok_or_else(|| TraceProblem::expected("the number of the new thread", call.result))?,
        memory,
    })
}

/// From `flags=` among the arguments of `clone`, or in the structure that is the first argument of
/// `clone3`.
fn child_memory(arguments: &[&str]) -> Result<ChildMemory, TraceProblem> {
    let structure = arguments.first().and_then(|first| first.strip_prefix('{'));
    let fields = structure.and_then(|inside| lex::list(inside, '}')).map(|(fields, _)| fields);
    let flags = fields.as_deref().unwrap_or(arguments).iter().find_map(|field| field.strip_prefix("flags="));
    let flags =
        flags.ok_or_else(|| TraceProblem::expected("`flags=` among the arguments", &arguments.join(", ")))?;
    let has = |flag| words(flags).any(|word| word == flag);
    Ok(match (has("CLONE_VM"), has("CLONE_VFORK")) {
        (true, true) => ChildMemory::Borrowed,
        (true, false) => ChildMemory::Shared,
        (false, _) => ChildMemory::Copied,
    })
}

fn prot(text: &str) -> Result<Prot, TraceProblem> {
    let mut prot = Prot::default();
    for word in words(text) {
        match word {
            "PROT_READ" => prot.read = true,
            "PROT_WRITE" => prot.write = true,
            "PROT_EXEC" => prot.exec = true,
            // PROT_NONE, and words that say nothing about access.
            other if other.starts_with("PROT_") => {}
            _ => return Err(TraceProblem::expected("`PROT_` words", text)),
        }
    }
    Ok(prot)
}

fn advice(text: &str) -> Advice {
    // What strace has no name for is a number and a comment.
    match text.split(' ').next().unwrap_or(text) {
        "MADV_DONTNEED" | "MADV_DONTNEED_LOCKED" => Advice::DontNeed,
        "MADV_FREE" => Advice::Free,
        "MADV_REMOVE" => Advice::Remove,
        "MADV_PAGEOUT" => Advice::PageOut,
        "MADV_POPULATE_READ" => Advice::PopulateRead,
        "MADV_POPULATE_WRITE" => Advice::PopulateWrite,
        "MADV_HUGEPAGE" => Advice::HugePage,
        "MADV_NOHUGEPAGE" => Advice::NoHugePage,
        "MADV_DONTFORK" => Advice::DontFork,
        "MADV_DOFORK" => Advice::DoFork,
        "MADV_GUARD_INSTALL" | "0x66" => Advice::GuardInstall,
        "MADV_GUARD_REMOVE" | "0x67" => Advice::GuardRemove,
        _ => Advice::Other(text.to_owned()),
    }
}

/// The words of `A|B|0x8 /* C */`.
fn words(flags: &str) -> impl Iterator<Item = &str> {
    flags.split('|').map(|word| word.split(' ').next().unwrap_or(word))
}

/// A page-aligned start and a length that is rounded up to whole pages, inside the user half.
fn range(start: &str, len: &str) -> Result<Range<u64>, TraceProblem> {
    const RANGE: &str = "a range of whole pages in the user half";
    let not_a_range = || TraceProblem::expected(RANGE, &format!("{start}, {len}"));
    let start_bytes = lex::number(start).filter(|start| start.is_multiple_of(PAGE_BYTES));
    let len_bytes = lex::number(len).and_then(|len| len.checked_next_multiple_of(PAGE_BYTES));
    let (start, len) = start_bytes.zip(len_bytes).ok_or_else(not_a_range)?;
    let end = start.checked_add(len).filter(|&end| end <= USER_END).ok_or_else(not_a_range)?;
    Ok(start..end)
}

fn user_address(text: &str) -> Result<u64, TraceProblem> {
    address(text).and_then(|address| {
        if address <= USER_END {
            Ok(address)
        } else {
            Err(TraceProblem::expected("an address in the user half", text))
        }
    })
}

fn address(text: &str) -> Result<u64, TraceProblem> {
    lex::number(text).ok_or_else(|| TraceProblem::expected("a number below 2^64", text))
}
