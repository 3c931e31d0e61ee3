//! The program for ring 3: loops that read, write, check or watch memory (`agent.s`).
//!
//! It needs one executable page for its code and no stack: its task and its results are in
//! registers.

use x86_64::VirtAddr;

use crate::arch::context::UserContext;
use crate::arch::symbols::{agent_entries, agent_text};

/// What the agent does with its words, from the first to the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// Reads and sums.
    Read,
    /// Writes `value`, `value + step`, ...
    Write,
    /// Compares with `value`, `value + step`, ..., and stops at the first word that differs.
    Check,
    /// Reads the first word again and again, at most `nr_words` times, and stops when it no longer
    /// holds `value`.
    Watch,
    /// Writes 1, 2, 3, ... to the first word, until the CPU is kicked.
    Count,
}

/// One run of the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Task {
    /// What to do.
    pub program: Program,
    /// Address of the first word.
    pub first: u64,
    /// Distance of the words, in bytes.
    pub stride_bytes: u64,
    /// How many words.
    pub nr_words: u64,
    /// The value for the first word.
    pub value: u64,
    /// What the value grows by from word to word.
    pub step: u64,
}

/// What a finished run reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// Where it stopped early, and what it read there; `None` if it went to the end.
    pub stopped: Option<Stop>,
    /// Words not visited.
    pub nr_left: u64,
    /// Sum of all that was read.
    pub sum: u64,
}

/// A word that did not hold what it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stop {
    /// Its address.
    pub address: u64,
    /// What was read.
    pub seen: u64,
}

/// Returns the agent's code, to be copied to a page that ring 3 may execute; it works at any
/// address.
#[must_use]
pub fn code() -> &'static [u8] {
    agent_text()
}

impl Task {
    /// Returns the registers with which the task starts, where the agent's code is at `text`.
    #[must_use]
    pub fn context(&self, text: VirtAddr) -> UserContext {
        let entries = agent_entries();
        let entry = match self.program {
            Program::Read => entries.read,
            Program::Write => entries.write,
            Program::Check => entries.check,
            Program::Watch => entries.watch,
            Program::Count => entries.count,
        };
        let mut context = UserContext::new(text + entry);
        let frame = &mut context.frame;
        frame.rdi = self.first;
        frame.rsi = self.stride_bytes;
        frame.rdx = self.nr_words;
        frame.r8 = self.value;
        frame.r9 = self.step;
        context
    }
}

impl Outcome {
    /// Reads the report of an agent that has ended with its system call.
    #[must_use]
    pub fn from_context(context: &UserContext) -> Self {
        let frame = &context.frame;
        let stopped = (frame.rax != 0).then_some(Stop { address: frame.rdi, seen: frame.rcx });
        Self { stopped, nr_left: frame.rdx, sum: frame.rbx }
    }
}
