//! Reading a log line by line: which thread each line is of, and where a call in two parts becomes
//! one event.
//!
//! How to record one is in `tests/traces/README.md`. Only calls that change an address space, or
//! who shares one, become events; the rest of the log is dropped, and so are calls that failed.
//! What strace has not written is counted, and so is what strace has written and somebody has
//! broken.
//!
//! A call that another thread's line interrupts is logged twice, when it enters the kernel and when
//! it returns. It becomes one event, at the line at which making it again cannot collide with the
//! other threads: what gives memory up, and what starts a thread or ends one, when it enters; what
//! takes memory, when it returns. So a range is free before the next thread is given it, and a
//! thread exists before its first call.

use std::collections::{BTreeMap, BTreeSet};
use std::io::BufRead;

use crate::input::lines::{BoundedLines, plain};
use crate::input::strace::arguments::{memory_call, shared_mapping};
use crate::input::strace::events::{MemoryCall, Trace, TraceError, TraceEvent, TraceProblem};
use crate::input::strace::history::{Queries, settle};
use crate::input::strace::lex::{self, Call, Line, Parsed};
use crate::input::strace::names::{is_dropped_call, is_exit, is_memory_call};
use crate::input::strace::number::number;

/// Memory calls of one log: each takes about 200 bytes.
const MOST_EVENTS: usize = 8 << 20;

/// Lines after which a text must have shown that it is a log: one in a hundred is a call. Without
/// this, random bytes are read for ever.
const JUDGED_LINES: usize = 20_000;

impl Trace {
    /// Reads a log; `source` is the name errors carry, usually the file's.
    ///
    /// # Errors
    /// As for [`Trace::read`].
    pub fn parse(source: &str, text: &str) -> Result<Self, TraceError> {
        Self::read(source, text.as_bytes())
    }

    /// Reads a log from a file, line by line; `source` is the name errors carry, usually the
    /// file's.
    ///
    /// A log may start and end anywhere. What its start does not tell is assumed, and counted.
    ///
    /// # Errors
    ///
    /// The first memory call that cannot have succeeded on x86_64 as it stands there, or the last
    /// line of a log without a memory call, as one [`TraceError`] that names the source, the line
    /// and what was expected.
    pub fn read(source: &str, input: impl BufRead) -> Result<Self, TraceError> {
        let mut reader = Reader::default();
        let mut lines = BoundedLines::new(input);
        let at_line =
            |line: usize, problem| TraceError { source_name: source.to_owned(), line: line.max(1), problem };
        loop {
            let line = lines
                .next_line()
                .map_err(|error| at_line(lines.number.max(1), TraceProblem::Input(error.to_string())))?;
            let Some(line) = line else { break };
            reader.line = lines.number;
            reader.read(&line).map_err(|problem| at_line(lines.number, problem))?;
            if lines.number == JUDGED_LINES && !reader.is_log() {
                return Err(at_line(1, TraceProblem::expected("a log of strace", &line)));
            }
        }
        let trace = reader.finish().map_err(|(line, problem)| at_line(line, problem))?;
        if trace.events.is_empty() { Err(at_line(lines.number, TraceProblem::Nothing)) } else { Ok(trace) }
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
    /// A call whose line has stopped before its end.
    open: Option<OpenCall>,
    /// Segments of shared memory whose size is known, and where they were attached.
    segments: BTreeMap<u64, u64>,
    attached: BTreeMap<u64, u64>,
    queries: Queries,
}

/// A call whose line has stopped before its end: a remark of strace or output of the program stands
/// there, and the rest comes in a later line.
struct OpenCall {
    thread: u32,
    line: usize,
    text: String,
    cut_by: CutBy,
}

/// What stands where the rest of a call should.
#[derive(Clone, Copy, PartialEq, Eq)]
enum CutBy {
    /// A remark of strace: the next line is the rest.
    Remark,
    /// Output of the program, perhaps of many lines.
    Output,
}

/// The thread of lines that carry no number, until one tells it.
const UNNUMBERED: u32 = 0;

impl Reader {
    /// Whether some of the lines so far were calls.
    fn is_log(&self) -> bool {
        let Trace { nr_other, nr_failed, nr_unfinished, .. } = self.trace;
        let nr_calls = self.trace.events.len() as u64 + nr_other + nr_failed + nr_unfinished;
        nr_calls >= self.line as u64 / 100
    }

    fn read(&mut self, text: &str) -> Result<(), TraceProblem> {
        let text = plain(text);
        let Parsed { thread: number, line, is_behind_output, .. } = lex::line(&text);
        if is_behind_output {
            self.trace.output.note(self.line);
        }
        match line {
            Line::Remark => return Ok(()),
            Line::Unknown(text) => return self.unknown(text),
            // A thread that was attached is there; it has not called yet.
            Line::Attached { thread, before } => {
                self.children.insert(thread);
                self.live.insert(thread);
                self.cut(number, before);
                return Ok(());
            }
            Line::Cut { before } => {
                self.cut(number, before);
                return Ok(());
            }
            _ => {}
        }
        self.close();
        let thread = self.thread(number, &line);
        match line {
            Line::Call(call) => {
                // A number of a thread that ended is in use again.
                self.ended.remove(&thread);
                self.call_or_start(thread, call)
            }
            Line::Unfinished(call) => {
                self.enters(thread, self.line, call);
                Ok(())
            }
            Line::Resumed { name, rest } => self.returns(thread, name, rest),
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
            Line::Attached { .. } | Line::Cut { .. } | Line::Remark | Line::Unknown(_) => Ok(()),
        }
    }

    /// Who a line belongs to: strace leaves the number out while it follows one thread only.
    fn thread(&mut self, number: Option<u32>, line: &Line<'_>) -> u32 {
        let Some(number) = number else {
            let first = self.first.unwrap_or(UNNUMBERED);
            return match self.live.first() {
                Some(&only) if self.live.len() == 1 && self.ended.contains_key(&first) => only,
                _ => first,
            };
        };
        // The first thread cannot call while a call of its own has not returned.
        let is_another = self.first.is_none()
            && self.entered.get(&UNNUMBERED).is_some_and(|(_, call)| match line {
                Line::Resumed { name, .. } => name_of(call) != *name,
                Line::Ended | Line::Superseded { .. } => false,
                _ => true,
            });
        if is_another {
            self.children.insert(number);
            self.live.insert(number);
        } else if self.first.is_none() && !self.children.contains(&number) {
            self.first = Some(number);
            if let Some(entered) = self.entered.remove(&UNNUMBERED) {
                self.entered.insert(number, entered);
            }
        }
        number
    }

    /// A remark of strace stands where the rest of a line should.
    fn cut(&mut self, number: Option<u32>, before: &str) {
        if before.contains('(') {
            self.close();
            let thread = self.thread(number, &Line::Call(before));
            let (line, text) = (self.line, before.to_owned());
            self.open = Some(OpenCall { thread, line, text, cut_by: CutBy::Remark });
        } else if !before.is_empty() {
            self.trace.output.note(self.line);
        }
    }

    /// Takes a line that is not strace's, or the rest of a call that a line above has begun.
    fn unknown(&mut self, text: &str) -> Result<(), TraceProblem> {
        let Some(open) = self.open.take() else {
            self.trace.output.note(self.line);
            return Ok(());
        };
        let OpenCall { thread, line, text: start, cut_by } = open;
        if cut_by == CutBy::Remark {
            let whole = start + text;
            match lex::without_end_mark(&whole) {
                Some(call) => self.enters(thread, line, call),
                None if lex::call(&whole).is_some() => return self.call(thread, line, &whole),
                None => {
                    self.open = Some(OpenCall { thread, line, text: whole, cut_by: CutBy::Output });
                }
            }
            return Ok(());
        }
        if let Some(before) = lex::without_end_mark(text) {
            self.note_output(line, before);
            self.enters(thread, line, &without_output(&start));
        } else if let Some((before, end)) = lex::end_of_call(text) {
            self.note_output(line, before);
            let whole = without_output(&start) + end;
            // With output in it, nobody knows whether it says what strace has written.
            if self.call(thread, line, &whole).is_err() {
                self.trace.broken.note(line);
            }
        } else {
            self.trace.output.note(self.line);
            self.open = Some(OpenCall { thread, line, text: start, cut_by });
        }
        Ok(())
    }

    /// Output stands behind the start of a call, and before its end.
    fn note_output(&mut self, line: usize, before_end: &str) {
        self.trace.output.note(line);
        if !before_end.is_empty() {
            self.trace.output.note(self.line);
        }
    }

    /// The end of the open call, if there is one, does not come.
    fn close(&mut self) {
        let Some(OpenCall { thread, line, text, .. }) = self.open.take() else { return };
        match name_of(&text) {
            name if is_exit(name) || name == "exit_group" => self.never_returns(thread, line, &text),
            name if is_memory_call(name) => self.trace.broken.note(line),
            name => self.count_dropped(name, &text),
        }
    }

    fn enters(&mut self, thread: u32, line: usize, call: &str) {
        self.ended.remove(&thread);
        if let Some((line, lost)) = self.entered.insert(thread, (line, call.to_owned())) {
            self.never_returns(thread, line, &lost);
        }
    }

    fn returns(&mut self, thread: u32, name: &str, rest: &str) -> Result<(), TraceProblem> {
        self.ended.remove(&thread);
        match self.entered.remove(&thread) {
            Some((entered_at, call)) if name_of(&call) == name => {
                self.call(thread, entered_at, &(call + rest))
            }
            lost => {
                if let Some((line, lost)) = lost {
                    self.never_returns(thread, line, &lost);
                }
                self.return_alone(thread, name, rest)
            }
        }
    }

    /// Takes a call of which only the return was logged. What execve and vfork do is known without
    /// their arguments.
    fn return_alone(&mut self, thread: u32, name: &str, rest: &str) -> Result<(), TraceProblem> {
        let call = format!("{name}({rest}");
        let has_failed = lex::call(&call).is_some_and(|call| has_failed(&call));
        if is_memory_call(name) && !has_failed && self.call(thread, self.line, &call).is_err() {
            self.trace.lost_starts.note(self.line);
        }
        Ok(())
    }

    fn ends(&mut self, thread: u32, line: usize, call: MemoryCall) {
        if self.ended.insert(thread, line).is_none() {
            self.trace.events.push(TraceEvent { line, thread, call });
        }
    }

    /// Takes a call of which only the start was logged.
    fn never_returns(&mut self, thread: u32, line: usize, call: &str) {
        match name_of(call) {
            name if is_exit(name) => self.ends(thread, line, MemoryCall::Exit),
            "exit_group" => self.ends(thread, line, MemoryCall::ExitGroup),
            name if is_memory_call(name) => self.trace.nr_unfinished += 1,
            name => self.count_dropped(name, call),
        }
    }

    fn count_dropped(&mut self, name: &str, call: &str) {
        if is_dropped_call(name) && (name != "mbind" || call.contains("MPOL_MF_MOVE")) {
            *self.trace.dropped.entry(name.to_owned()).or_default() += 1;
        }
    }

    /// Takes a call whose line starts here; its end may be missing.
    fn call_or_start(&mut self, thread: u32, text: &str) -> Result<(), TraceProblem> {
        if lex::call(text).is_some() {
            return self.call(thread, self.line, text);
        }
        let (line, text) = (self.line, text.to_owned());
        self.open = Some(OpenCall { thread, line, text, cut_by: CutBy::Output });
        Ok(())
    }

    /// Takes a whole call, which entered the kernel at `entered_at` and returned at the current
    /// line.
    fn call(&mut self, thread: u32, entered_at: usize, text: &str) -> Result<(), TraceProblem> {
        let name = name_of(text);
        let call = lex::call(text);
        if !is_memory_call(name) {
            if call.as_ref().is_some_and(has_failed) || !self.shared_memory(thread, call.as_ref()) {
                self.trace.nr_other += 1;
            }
            return Ok(());
        }
        // Of a call in two parts.
        let Some(call) = call else {
            self.trace.broken.note(self.line);
            return Ok(());
        };
        if is_exit(call.name) || call.name == "exit_group" {
            let how = if is_exit(call.name) { MemoryCall::Exit } else { MemoryCall::ExitGroup };
            self.ends(thread, entered_at, how);
            return Ok(());
        }
        if call.result.starts_with('?') {
            self.trace.nr_unfinished += 1;
            return Ok(());
        }
        if has_failed(&call) {
            self.trace.nr_failed += 1;
            return Ok(());
        }
        let is_query =
            call.name == "brk" && call.arguments.first().and_then(|asked| number(asked)) == Some(0);
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
        if is_query {
            self.queries.insert((line, thread));
        }
        self.push(line, thread, call)
    }

    fn push(&mut self, line: usize, thread: u32, call: MemoryCall) -> Result<(), TraceProblem> {
        if self.trace.events.len() >= MOST_EVENTS {
            return Err(TraceProblem::TooMany { most: MOST_EVENTS });
        }
        self.trace.events.push(TraceEvent { line, thread, call });
        Ok(())
    }

    /// Takes a call that is none of the memory calls; whether it was made or counted by name.
    /// Segments of System V shared memory are attached where the log tells their size.
    fn shared_memory(&mut self, thread: u32, call: Option<&Call<'_>>) -> bool {
        let Some(call) = call else { return false };
        let result = number(call.result);
        match (call.name, call.arguments.as_slice(), result) {
            ("shmget", &[_, size, _], Some(id)) => {
                self.segments.extend(number(size).map(|size| (id, size)));
                return false;
            }
            ("shmat", &[id, _, flags], Some(_)) => {
                let size = number(id).and_then(|id| self.segments.get(&id).copied());
                let attached = size.and_then(|size| shared_mapping(call.result, size, flags));
                if let Some((range, call)) = attached {
                    self.attached.insert(range.start, range.end);
                    return self.push(self.line, thread, call).is_ok();
                }
            }
            ("shmdt", &[start], Some(_)) => {
                let start = number(start);
                let end = start.and_then(|start| self.attached.get(&start).copied());
                if let Some((start, end)) = start.zip(end) {
                    let call = MemoryCall::Munmap { range: start..end };
                    return self.push(self.line, thread, call).is_ok();
                }
            }
            _ => {}
        }
        if !is_dropped_call(call.name) {
            return false;
        }
        let arguments = call.arguments.join(", ");
        self.count_dropped(call.name, &arguments);
        true
    }

    fn finish(mut self) -> Result<Trace, (usize, TraceProblem)> {
        // The log may end within a line.
        if let Some(OpenCall { thread, line, text, .. }) = self.open.take() {
            self.never_returns(thread, line, &text);
        }
        for (thread, (line, call)) in core::mem::take(&mut self.entered) {
            self.never_returns(thread, line, &call);
        }
        let Self { mut trace, first, mut queries, .. } = self;
        let first = first.unwrap_or(UNNUMBERED);
        for event in trace.events.iter_mut().filter(|event| event.thread == UNNUMBERED) {
            event.thread = first;
        }
        queries = queries
            .into_iter()
            .map(|(line, thread)| (line, if thread == UNNUMBERED { first } else { thread }))
            .collect();
        trace.events.sort_by_key(|event| event.line);
        settle(&mut trace, &queries).map(|()| trace)
    }
}

fn name_of(call: &str) -> &str {
    call.split_once('(').map_or("", |(name, _)| name)
}

/// Failed, and so changed nothing: `-1 ENOMEM (Cannot allocate memory)`.
fn has_failed(call: &Call<'_>) -> bool {
    call.result == "-1" || call.result.starts_with("-1 ")
}

/// The start of a call without the output that stands behind its last argument: a number, or words
/// in capital letters.
fn without_output(start: &str) -> String {
    let last = start.rfind(", ").map(|at| at + 2).or_else(|| start.find('(').map(|at| at + 1));
    let (before, argument) = start.split_at(last.unwrap_or(start.len()));
    let key = argument.find('=').map_or(0, |at| at + 1);
    let (key, value) = argument.split_at(key);
    let is_part: fn(char) -> bool = match value {
        value if value.starts_with("0x") => |char| char.is_ascii_hexdigit() || char == 'x',
        value if value.starts_with(|char: char| char.is_ascii_digit() || char == '-') => {
            |char| char.is_ascii_digit() || char == '-'
        }
        _ => |char| char.is_ascii_uppercase() || char.is_ascii_digit() || char == '_' || char == '|',
    };
    let end = value.find(|char| !is_part(char)).unwrap_or(value.len());
    format!("{before}{key}{}", &value[..end])
}
