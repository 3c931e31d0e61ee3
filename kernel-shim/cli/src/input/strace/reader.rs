//! Reading a log line by line: which thread each line is of, and where a call in two parts becomes
//! one event.
//!
//! How to record one is in `tests/traces/README.md`. Only calls that change an address space, or
//! who shares one, become events; the rest of the log is checked for being an `strace` log and
//! dropped, and so are calls that failed.
//!
//! A call that another thread's line interrupts is logged twice, when it enters the kernel and when
//! it returns. It becomes one event, at the line at which making it again cannot collide with the
//! other threads: what gives memory up, and what starts a thread or ends one, when it enters; what
//! takes memory, when it returns. So a range is free before the next thread is given it, and a
//! thread exists before its first call.

use std::collections::{BTreeMap, BTreeSet};

use crate::input::strace::arguments::memory_call;
use crate::input::strace::events::{MemoryCall, Trace, TraceError, TraceEvent, TraceProblem};
use crate::input::strace::lex::{self, Line};
use crate::input::strace::names::{is_dropped_call, is_exit, is_memory_call};

impl Trace {
    /// Reads a log; `source` is the name errors carry, usually the file's.
    ///
    /// A log may end anywhere between two lines. It must start where the program does.
    ///
    /// # Errors
    ///
    /// The first line that `strace` cannot have written, as one [`TraceError`] that names the
    /// source, the line and what was expected.
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
    /// Calls that entered the kernel and have not returned: at which line, and what was logged of
    /// them.
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
            Line::Unknown => Err(TraceProblem::expected("a line of `strace -f -o FILE`", text)),
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

    /// Takes a whole call, which entered the kernel at `entered_at` and returned at the current
    /// line.
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
        let call =
            lex::call(text).ok_or_else(|| TraceProblem::expected("a whole call with its result", text))?;
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
                        problem =
                            Some((event.line, TraceProblem::expected("the number of a new thread", &found)));
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
