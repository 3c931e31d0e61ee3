//! Which process each thread of a log belongs to, also where the log does not hold its start: it
//! was recorded without `clone` and `execve` (`-e trace=%memory`), from a process that ran already
//! (`-p`), or from inside a container.
//!
//! A thread that appears is, in this order:
//!
//! 1. the child of a call whose child never calls: the two number threads differently;
//! 2. the first of a new process, if it begins as a program does: by `execve`, or, in a log without
//!    one, by asking for its break;
//! 3. a thread of the one process there is, or of the one that has mapped what it calls about;
//! 4. the first of a process that was there, if none is left.
//!
//! Otherwise its calls are left out, and counted.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::input::strace::events::{ChildMemory, MemoryCall, Trace, TraceEvent, TraceProblem};

/// Calls of brk that only ask: their line, and their thread.
pub(super) type Queries = BTreeSet<(usize, u32)>;

/// Settles whose the events of `trace` are, which are in order.
///
/// # Errors
/// A call that starts a thread which runs already, and its line.
pub(super) fn settle(trace: &mut Trace, queries: &Queries) -> Result<(), (usize, TraceProblem)> {
    let events = core::mem::take(&mut trace.events);
    let callers = events.iter().map(|event| event.thread).collect();
    let has_exec = events.iter().any(|event| event.call == MemoryCall::Exec);
    let mut history = History {
        trace,
        callers,
        has_exec,
        processes: Vec::new(),
        alive: BTreeMap::new(),
        silent: VecDeque::new(),
        living: BTreeSet::new(),
        orphans: BTreeSet::new(),
    };
    for event in events {
        let is_query = queries.contains(&(event.line, event.thread));
        history.event(event, is_query)?;
    }
    let nr_orphans = history.orphans.len() as u64;
    trace.nr_orphaned_threads = nr_orphans;
    Ok(())
}

struct History<'a> {
    trace: &'a mut Trace,
    /// Threads with an event of their own.
    callers: BTreeSet<u32>,
    /// Whether the log tells which programs were executed.
    has_exec: bool,
    processes: Vec<Process>,
    /// The process of each thread that has not ended.
    alive: BTreeMap<u32, Member>,
    /// Events that start children which never call: their places.
    silent: VecDeque<usize>,
    /// Processes with a thread.
    living: BTreeSet<usize>,
    orphans: BTreeSet<u32>,
}

#[derive(Clone, Copy)]
struct Member {
    process: usize,
    /// Whether the log does not hold its start.
    is_assumed: bool,
}

/// One address space.
#[derive(Clone, Default)]
struct Process {
    nr_threads: u32,
    break_end: Option<u64>,
    /// What calls of the log have mapped: starts and ends; some of it may be gone.
    mapped: BTreeMap<u64, u64>,
}

impl History<'_> {
    fn event(&mut self, event: TraceEvent, is_query: bool) -> Result<(), (usize, TraceProblem)> {
        let TraceEvent { line, thread, .. } = event;
        if self.trace.events.is_empty() {
            // The first is there.
            self.new_process(thread, false);
        } else if !self.alive.contains_key(&thread) {
            match event.call {
                // It did nothing that the log tells.
                MemoryCall::Exit | MemoryCall::ExitGroup => return Ok(()),
                _ if self.find(&event, is_query) => {}
                _ => {
                    self.trace.nr_orphaned += 1;
                    self.orphans.insert(thread);
                    return Ok(());
                }
            }
        }
        let Some(&Member { process, .. }) = self.alive.get(&thread) else { return Ok(()) };
        match &event.call {
            MemoryCall::Clone { child, memory } => self.starts(line, process, *child, *memory)?,
            MemoryCall::Exec => self.executes(thread),
            MemoryCall::Exit | MemoryCall::ExitGroup => self.ends(thread),
            MemoryCall::Brk { end } => {
                let other_break = self.processes[process].break_end.is_some_and(|known| known != *end);
                if is_query && other_break && !self.has_exec {
                    self.executes(thread);
                    self.trace.assumed.programs += 1;
                    self.trace.events.push(TraceEvent { line, thread, call: MemoryCall::Exec });
                }
                if let Some(&Member { process, .. }) = self.alive.get(&thread) {
                    self.processes[process].break_end = Some(*end);
                }
            }
            MemoryCall::Mmap { range, .. } | MemoryCall::Mremap { to: range, .. } => {
                self.processes[process].mapped.insert(range.start, range.end);
            }
            MemoryCall::Munmap { range } => {
                self.processes[process].mapped.remove(&range.start);
            }
            MemoryCall::Madvise { .. } | MemoryCall::Mprotect { .. } | MemoryCall::Appears => {}
        }
        self.trace.events.push(event);
        Ok(())
    }

    /// Finds the process of a thread that the log does not start.
    fn find(&mut self, event: &TraceEvent, is_query: bool) -> bool {
        let TraceEvent { line, thread, ref call } = *event;
        if self.take_silent_child(thread) {
            return true;
        }
        let begins = *call == MemoryCall::Exec || (is_query && !self.has_exec);
        if begins || self.living.is_empty() {
            self.new_process(thread, true);
            self.trace.assumed.processes += 1;
            self.trace.events.push(TraceEvent { line, thread, call: MemoryCall::Appears });
            return true;
        }
        let start = start_of(call).filter(|_| self.living.len() > 1);
        let can_be = |process: &usize| start.is_none_or(|start| self.processes[*process].has_mapped(start));
        let mut candidates = self.living.iter().copied().filter(can_be);
        let (Some(process), None) = (candidates.next(), candidates.next()) else { return false };
        let of_process = self.alive.iter().find(|(_, member)| member.process == process);
        let Some((&parent, _)) = of_process else { return false };
        self.processes[process].nr_threads += 1;
        self.alive.insert(thread, Member { process, is_assumed: true });
        self.trace.assumed.threads += 1;
        let call = MemoryCall::Clone { child: thread, memory: ChildMemory::Shared };
        self.trace.events.push(TraceEvent { line, thread: parent, call });
        true
    }

    /// Gives `thread` the place of the first child that never calls.
    fn take_silent_child(&mut self, thread: u32) -> bool {
        while let Some(place) = self.silent.pop_front() {
            let Some(TraceEvent { call: MemoryCall::Clone { child, .. }, .. }) =
                self.trace.events.get_mut(place)
            else {
                continue;
            };
            let Some(member) = self.alive.remove(child) else { continue };
            *child = thread;
            self.alive.insert(thread, member);
            self.trace.assumed.renamed += 1;
            return true;
        }
        false
    }

    fn starts(
        &mut self,
        line: usize,
        parent: usize,
        child: u32,
        memory: ChildMemory,
    ) -> Result<(), (usize, TraceProblem)> {
        match self.alive.get(&child) {
            Some(Member { is_assumed: false, .. }) => {
                let found = format!("{child}, which has not ended");
                return Err((line, TraceProblem::expected("the number of a new thread", &found)));
            }
            // Its start comes late.
            Some(_) => self.ends(child),
            None => {}
        }
        let process = match memory {
            ChildMemory::Copied => {
                let copy = Process { nr_threads: 0, ..self.processes[parent].clone() };
                self.processes.push(copy);
                self.processes.len() - 1
            }
            ChildMemory::Shared | ChildMemory::Borrowed => parent,
        };
        self.processes[process].nr_threads += 1;
        self.living.insert(process);
        self.alive.insert(child, Member { process, is_assumed: false });
        if !self.callers.contains(&child) {
            self.silent.push_back(self.trace.events.len());
        }
        Ok(())
    }

    /// The thread leaves its process for one of its own.
    fn executes(&mut self, thread: u32) {
        self.ends(thread);
        self.new_process(thread, false);
    }

    fn new_process(&mut self, thread: u32, is_assumed: bool) {
        let process = self.processes.len();
        self.processes.push(Process { nr_threads: 1, ..Process::default() });
        self.living.insert(process);
        self.alive.insert(thread, Member { process, is_assumed });
    }

    fn ends(&mut self, thread: u32) {
        let Some(Member { process, .. }) = self.alive.remove(&thread) else { return };
        let left = &mut self.processes[process];
        left.nr_threads -= 1;
        if left.nr_threads == 0 {
            left.mapped = BTreeMap::new();
            self.living.remove(&process);
        }
    }
}

impl Process {
    fn has_mapped(&self, address: u64) -> bool {
        self.mapped.range(..=address).next_back().is_some_and(|(_, &end)| address < end)
    }
}

/// Where the memory starts that a call is about.
const fn start_of(call: &MemoryCall) -> Option<u64> {
    match call {
        MemoryCall::Munmap { range }
        | MemoryCall::Madvise { range, .. }
        | MemoryCall::Mprotect { range, .. } => Some(range.start),
        MemoryCall::Mremap { from, .. } => Some(from.start),
        _ => None,
    }
}
