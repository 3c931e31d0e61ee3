//! The memory calls of a real program, read from a log that `strace -f` wrote.
//!
//! How to record one is in `tests/traces/README.md`. Only calls that change an address space, or who shares one, become
//! events; the rest of the log is checked for being an `strace` log and dropped, and so are calls that failed.
//!
//! A call that another thread's line interrupts is logged twice, when it enters the kernel and when it returns. It becomes
//! one event, at the line at which replaying it cannot collide with the other threads: what gives memory up, and
//! what starts a thread or ends one, when it enters; what takes memory, when it returns. So a range is free before the next
//! thread is given it, and a thread exists before its first call.

use core::ops::Range;
use std::collections::{BTreeMap, BTreeSet};

use crate::input::layout::text::shown;
use crate::input::layout::{PAGE_BYTES, Prot, Sharing, USER_END};
use crate::input::strace::lex::{self, Call, Line};
use crate::input::strace::names::{is_dropped_call, is_exit, is_memory_call};

/// What a log holds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Trace {
    /// The calls that succeeded, in the order they can be replayed in.
    ///
    /// The first is by the thread that starts the program; each other thread is the child of a [`MemoryCall::Clone`]
    /// above its first event.
    pub events: Vec<TraceEvent>,
    /// Memory calls that failed, and so changed nothing.
    pub nr_failed: u64,
    /// Memory calls of which the log does not hold the return: it ends first, or the thread was killed.
    pub nr_unfinished: u64,
    /// Events left out because the log does not hold the start of their thread.
    pub nr_orphaned: u64,
    /// Threads that those are of.
    pub nr_orphaned_threads: u64,
    /// Calls that change an address space and are not replayed, by name.
    pub dropped: BTreeMap<String, u64>,
    /// Other calls.
    pub nr_other: u64,
}

/// One memory call of one thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceEvent {
    /// Line of the log, counted from 1.
    pub line: usize,
    /// The thread that called; 0 in a log without numbers.
    pub thread: u32,
    /// What it did.
    pub call: MemoryCall,
}

/// A call that succeeded. Ranges are in bytes, on page boundaries, rounded up as the kernel does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemoryCall {
    /// `mmap`.
    Mmap {
        /// The range that was mapped.
        range: Range<u64>,
        /// What the program may do with it.
        prot: Prot,
        /// Whether writes reach what backs it.
        sharing: Sharing,
        /// What backs it.
        backing: Backing,
        /// Whether it replaced what was there.
        placement: Placement,
        /// Further `MAP_` words, as they stand in the log, such as `MAP_POPULATE`.
        other_flags: Vec<String>,
    },
    /// `munmap`.
    Munmap {
        /// The range that was unmapped.
        range: Range<u64>,
    },
    /// `mremap`.
    Mremap {
        /// The old range; empty where a shared mapping was mapped a second time.
        from: Range<u64>,
        /// The new range: the same start where it only grew or shrank.
        to: Range<u64>,
        /// Whether the old range stays mapped.
        old_range: OldRange,
    },
    /// `brk`.
    Brk {
        /// The break after the call, not rounded; the first one of a program says where its heap starts.
        end: u64,
    },
    /// `madvise`.
    Madvise {
        /// The range it is about.
        range: Range<u64>,
        /// What was advised.
        advice: Advice,
    },
    /// `mprotect`.
    Mprotect {
        /// The range.
        range: Range<u64>,
        /// What the program may do with it from now on.
        prot: Prot,
    },
    /// `clone`, `clone3`, `fork` or `vfork`.
    Clone {
        /// The new thread or process.
        child: u32,
        /// Which address space it runs in.
        memory: ChildMemory,
    },
    /// `execve`: the process leaves its address space for an empty one with a new program.
    Exec,
    /// The thread ended, by `exit` or from outside. Each thread ends once.
    Exit,
    /// The thread ended by `exit_group`; those that share its process end too, each with an [`MemoryCall::Exit`] of its own.
    ExitGroup,
}

/// What backs a new mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// `MAP_ANONYMOUS`.
    Anonymous,
    /// A file.
    File {
        /// Offset of the first byte.
        offset: u64,
    },
}

/// How the address of a new mapping was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// The kernel found a free range.
    Free,
    /// `MAP_FIXED`: whatever was there was unmapped first.
    Replace,
}

/// What `mremap` leaves behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OldRange {
    /// Nothing.
    Unmapped,
    /// `MREMAP_DONTUNMAP`: the area, without its pages.
    KeptEmpty,
}

/// The advice of `madvise`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Advice {
    /// `MADV_DONTNEED` or `MADV_DONTNEED_LOCKED`: the pages are zapped at once.
    DontNeed,
    /// `MADV_FREE`: the pages may be taken until they are written again.
    Free,
    /// `MADV_REMOVE`: a hole is punched in what backs them.
    Remove,
    /// `MADV_PAGEOUT`: the pages are reclaimed.
    PageOut,
    /// `MADV_POPULATE_READ`: the pages are made present.
    PopulateRead,
    /// `MADV_POPULATE_WRITE`: the pages are made present and writable.
    PopulateWrite,
    /// `MADV_HUGEPAGE`.
    HugePage,
    /// `MADV_NOHUGEPAGE`.
    NoHugePage,
    /// `MADV_DONTFORK`.
    DontFork,
    /// `MADV_DOFORK`.
    DoFork,
    /// `MADV_GUARD_INSTALL`: nobody may use the addresses from now on; what was there is dropped.
    GuardInstall,
    /// `MADV_GUARD_REMOVE`: that is over.
    GuardRemove,
    /// Anything else, as it stands in the log.
    Other(String),
}

/// The address space of a new thread or process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChildMemory {
    /// `CLONE_VM`: its parent's.
    Shared,
    /// `vfork`, `CLONE_VM | CLONE_VFORK`: its parent's, until it executes a program or ends; the parent waits.
    Borrowed,
    /// `fork`: a copy, whose private pages are shared until written.
    Copied,
}

/// Why a text is not a log, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{source_name}:{line}: {problem}")]
pub struct TraceError {
    /// The file, or whatever the caller called it.
    pub source_name: String,
    /// Line, counted from 1.
    pub line: usize,
    /// What is wrong there.
    pub problem: TraceProblem,
}

/// What is wrong with one line of a log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TraceProblem {
    /// Something else stands where a part of a line belongs.
    #[error("expected {expected}, found {}", shown(found))]
    Expected {
        /// What belongs there.
        expected: &'static str,
        /// What stands there.
        found: String,
    },
    /// A call returns that never began: the log lost its start, or another line.
    #[error("expected an unfinished {name} of thread {thread} above, found only its return")]
    NeverBegan {
        /// The call.
        name: String,
        /// The thread.
        thread: u32,
    },
    /// The log ends without one memory call.
    #[error("expected memory calls in the log, found none")]
    Nothing,
}

impl Trace {
    /// Reads a log; `source` is the name errors carry, usually the file's.
    ///
    /// A log may end anywhere between two lines. It must start where the program does.
    ///
    /// # Errors
    ///
    /// The first line that `strace` cannot have written, as one [`TraceError`] that names the source, the line and what
    /// was expected.
    pub fn parse(source: &str, text: &str) -> Result<Self, TraceError> {
        let mut reader = Reader::default();
        let at_line = |line, problem| TraceError { source_name: source.to_owned(), line, problem };
        for (index, line) in text.lines().enumerate() {
            reader.line = index + 1;
            reader.read(line).map_err(|problem| at_line(index + 1, problem))?;
        }
        let trace = reader.finish().map_err(|(line, problem)| at_line(line, problem))?;
        if trace.events.is_empty() {
            Err(at_line(text.lines().count().max(1), TraceProblem::Nothing))
        } else {
            Ok(trace)
        }
    }
}

/// Where the reading of a log stands.
#[derive(Default)]
struct Reader {
    trace: Trace,
    line: usize,
    /// Calls that entered the kernel and have not returned: at which line, and what was logged of them.
    entered: BTreeMap<u32, (usize, String)>,
    /// Threads that some other thread started.
    children: BTreeSet<u32>,
    /// Children that have not ended.
    live: BTreeSet<u32>,
    /// Threads that ended, and at which line.
    ended: BTreeMap<u32, usize>,
    /// The first thread, once a line has told its number.
    first: Option<u32>,
    /// The start of a line into which strace wrote a remark.
    cut_line: Option<String>,
}

/// The thread of lines that carry no number, until one tells it.
const UNNUMBERED: u32 = 0;

impl Reader {
    fn read(&mut self, text: &str) -> Result<(), TraceProblem> {
        let joined = self.cut_line.take().map(|start| start + text);
        let text = joined.as_deref().unwrap_or(text);
        let (number, line) = lex::line(text);
        let thread = self.thread(number);
        match line {
            Line::Call(call) => {
                // A number of a thread that ended is in use again.
                self.ended.remove(&thread);
                self.call(thread, self.line, call)
            }
            Line::Unfinished(call) => {
                self.ended.remove(&thread);
                if let Some((line, lost)) = self.entered.insert(thread, (self.line, call.to_owned())) {
                    self.never_returns(thread, line, &lost);
                }
                Ok(())
            }
            Line::Resumed { name, rest } => match self.entered.remove(&thread) {
                Some((entered_at, call))
                    if call.strip_prefix(name).is_some_and(|rest| rest.starts_with('(')) =>
                {
                    self.call(thread, entered_at, &(call + rest))
                }
                _ if is_memory_call(name) => Err(TraceProblem::NeverBegan { name: name.to_owned(), thread }),
                _ => Ok(()),
            },
            Line::Ended => {
                if let Some((line, lost)) = self.entered.remove(&thread) {
                    self.never_returns(thread, line, &lost);
                }
                self.ends(thread, self.line, MemoryCall::Exit);
                self.live.remove(&thread);
                Ok(())
            }
            Line::Superseded { by } => {
                if let Some(entered) = self.entered.remove(&by) {
                    self.entered.insert(thread, entered);
                }
                self.ends(by, self.line, MemoryCall::Exit);
                self.live.remove(&by);
                Ok(())
            }
            Line::Attached { thread, before } => {
                self.children.insert(thread);
                self.live.insert(thread);
                if !before.is_empty() {
                    // The whole start of the line, with its number and time.
                    self.cut_line = text.rfind("strace: ").map(|at| text[..at].to_owned());
                }
                Ok(())
            }
            Line::Remark => Ok(()),
            Line::Unknown => Err(expected("a line of `strace -f -o FILE`", text)),
        }
    }

    /// Who a line belongs to: strace leaves the number out while it follows one thread only.
    fn thread(&mut self, number: Option<u32>) -> u32 {
        let Some(number) = number else {
            let first = self.first.unwrap_or(UNNUMBERED);
            return match self.live.first() {
                Some(&only) if self.live.len() == 1 && self.ended.contains_key(&first) => only,
                _ => first,
            };
        };
        if self.first.is_none() && !self.children.contains(&number) {
            self.first = Some(number);
            if let Some(entered) = self.entered.remove(&UNNUMBERED) {
                self.entered.insert(number, entered);
            }
        }
        number
    }

    fn ends(&mut self, thread: u32, line: usize, call: MemoryCall) {
        if self.ended.insert(thread, line).is_none() {
            self.trace.events.push(TraceEvent { line, thread, call });
        }
    }

    /// Takes a call of which only the start was logged.
    fn never_returns(&mut self, thread: u32, line: usize, call: &str) {
        match call.split_once('(').map_or("", |(name, _)| name) {
            name if is_exit(name) => self.ends(thread, line, MemoryCall::Exit),
            "exit_group" => self.ends(thread, line, MemoryCall::ExitGroup),
            name if is_memory_call(name) => self.trace.nr_unfinished += 1,
            name => self.count_dropped(name),
        }
    }

    fn count_dropped(&mut self, name: &str) {
        if is_dropped_call(name) {
            *self.trace.dropped.entry(name.to_owned()).or_default() += 1;
        }
    }

    /// Takes a whole call, which entered the kernel at `entered_at` and returned at the current line.
    fn call(&mut self, thread: u32, entered_at: usize, text: &str) -> Result<(), TraceProblem> {
        let name = text.split_once('(').map_or("", |(name, _)| name);
        if !is_memory_call(name) {
            let has_failed = || lex::call(text).is_some_and(|call| call.result.starts_with("-1 "));
            if is_dropped_call(name) && !has_failed() {
                self.count_dropped(name);
            } else {
                self.trace.nr_other += 1;
            }
            return Ok(());
        }
        let call = lex::call(text).ok_or_else(|| expected("a whole call with its result", text))?;
        if is_exit(call.name) || call.name == "exit_group" {
            let how = if is_exit(call.name) { MemoryCall::Exit } else { MemoryCall::ExitGroup };
            self.ends(thread, entered_at, how);
            return Ok(());
        }
        if call.result.starts_with('?') {
            self.trace.nr_unfinished += 1;
            return Ok(());
        }
        if call.result.starts_with("-1 ") {
            self.trace.nr_failed += 1;
            return Ok(());
        }
        let call = memory_call(&call)?;
        let line = match &call {
            MemoryCall::Munmap { .. } | MemoryCall::Madvise { .. } | MemoryCall::Clone { .. } => entered_at,
            _ => self.line,
        };
        if let MemoryCall::Clone { child, .. } = call {
            self.children.insert(child);
            // The number may be that of a thread that ended before.
            if self.ended.get(&child).is_some_and(|&ended_at| ended_at < entered_at) {
                self.ended.remove(&child);
            }
        }
        self.trace.events.push(TraceEvent { line, thread, call });
        Ok(())
    }

    fn finish(mut self) -> Result<Trace, (usize, TraceProblem)> {
        for (thread, (line, call)) in core::mem::take(&mut self.entered) {
            self.never_returns(thread, line, &call);
        }
        let Self { mut trace, first, .. } = self;
        for event in trace.events.iter_mut().filter(|event| event.thread == UNNUMBERED) {
            event.thread = first.unwrap_or(UNNUMBERED);
        }
        trace.events.sort_by_key(|event| event.line);

        // Threads that the log starts, and of those the ones that have not ended.
        let first: BTreeSet<_> = trace.events.first().map(|event| event.thread).into_iter().collect();
        let (mut started, mut alive, mut orphans) = (first.clone(), first, BTreeSet::new());
        let mut problem = None;
        trace.events.retain(|event| {
            let known = started.contains(&event.thread);
            match &event.call {
                MemoryCall::Clone { child, .. } if known => {
                    started.insert(*child);
                    if !alive.insert(*child) && problem.is_none() {
                        let found = format!("{child}, which has not ended");
                        problem = Some((event.line, expected("the number of a new thread", &found)));
                    }
                }
                MemoryCall::Exit | MemoryCall::ExitGroup => drop(alive.remove(&event.thread)),
                _ => {}
            }
            if !known {
                orphans.insert(event.thread);
            }
            trace.nr_orphaned += u64::from(!known);
            known
        });
        trace.nr_orphaned_threads = orphans.len() as u64;
        problem.map_or(Ok(trace), Err)
    }
}

/// Reads the arguments of a call that succeeded.
fn memory_call(call: &Call<'_>) -> Result<MemoryCall, TraceProblem> {
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
        (_, arguments) => Err(expected("the arguments of this call", &arguments.join(", "))),
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
        sharing: sharing.ok_or_else(|| expected("`MAP_PRIVATE` or `MAP_SHARED`", flags))?,
        backing,
        placement,
        other_flags,
    })
}

fn clone(call: &Call<'_>, memory: ChildMemory) -> Result<MemoryCall, TraceProblem> {
    let child = call.result.split(' ').next().and_then(lex::number32).filter(|&child| child > 0);
    Ok(MemoryCall::Clone {
        child: child.ok_or_else(|| expected("the number of the new thread", call.result))?,
        memory,
    })
}

/// From `flags=` among the arguments of `clone`, or in the structure that is the first argument of `clone3`.
fn child_memory(arguments: &[&str]) -> Result<ChildMemory, TraceProblem> {
    let structure = arguments.first().and_then(|first| first.strip_prefix('{'));
    let fields = structure.and_then(|inside| lex::list(inside, '}')).map(|(fields, _)| fields);
    let flags = fields.as_deref().unwrap_or(arguments).iter().find_map(|field| field.strip_prefix("flags="));
    let flags = flags.ok_or_else(|| expected("`flags=` among the arguments", &arguments.join(", ")))?;
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
            _ => return Err(expected("`PROT_` words", text)),
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
    let not_a_range = || expected(RANGE, &format!("{start}, {len}"));
    let start_bytes = lex::number(start).filter(|start| start.is_multiple_of(PAGE_BYTES));
    let len_bytes = lex::number(len).and_then(|len| len.checked_next_multiple_of(PAGE_BYTES));
    let (start, len) = start_bytes.zip(len_bytes).ok_or_else(not_a_range)?;
    let end = start.checked_add(len).filter(|&end| end <= USER_END).ok_or_else(not_a_range)?;
    Ok(start..end)
}

fn user_address(text: &str) -> Result<u64, TraceProblem> {
    address(text).and_then(|address| {
        if address <= USER_END { Ok(address) } else { Err(expected("an address in the user half", text)) }
    })
}

fn address(text: &str) -> Result<u64, TraceProblem> {
    lex::number(text).ok_or_else(|| expected("a number below 2^64", text))
}

fn expected(expected: &'static str, found: &str) -> TraceProblem {
    TraceProblem::Expected { expected, found: found.to_owned() }
}
