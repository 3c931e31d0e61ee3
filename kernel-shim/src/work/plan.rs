//! An address space written down in a few words a line, so that any machine can be handed one.
//!
//! ```text
//! area 7f2f60000000-7f2f60400000 w anon
//! fill 7f2f60000000-7f2f60002000 anon
//! area 7f2f5aa76000-7f2f5aacd000 r private:3 grows
//! fill 7f2f5aa76000-7f2f5aa86000 file
//! ```
//!
//! `area` has what programs may do (`w` write, `r` read, `-` nothing) and what backs it (`anon`,
//! `pfn`, `private:FILE`, `shared:FILE`); a `fill` lies in the area before it and says what is
//! there, in the words of [`PageContent::word`].

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use mmu_gather::pagetable::VirtRange;

use crate::counters::Snapshot;
use crate::fault::UserAccess;
use crate::kernel::{Error, Kernel};
use crate::machine::Machine;
use crate::mm::Mm;
use crate::populate::PageContent;
use crate::vma::{Area, AreaKind, Growth, Protection, Vma};
use crate::work::drill::{Failure, on_each};
use crate::work::stage::{Stage, program_area};

/// Why a plan could not be built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PlanError {
    /// The line, counted from 1, is none of the two kinds.
    Line(usize),
    /// The kernel refused what the line asks for.
    Kernel(usize, Error),
}

impl fmt::Display for PlanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line(line) => write!(f, "line {line}: expected an area, or what fills a part of one"),
            Self::Kernel(line, error) => write!(f, "line {line}: {error}"),
        }
    }
}

impl core::error::Error for PlanError {}

/// An address space made from a plan.
#[derive(Debug)]
pub struct Planned<M: Machine> {
    /// The address space; it holds the program area too.
    pub mm: Arc<Mm<M>>,
    /// The areas of the plan, in order.
    pub areas: Vec<VirtRange>,
    /// What a program may read without a fault, in order.
    pub readable: Vec<VirtRange>,
    /// Pages that are present.
    pub nr_pages: u64,
}

/// Builds what `text` says.
///
/// # Errors
/// [`PlanError`]; nothing is left of what was built so far.
pub fn build<M: Machine>(kernel: &Kernel<M>, text: &str) -> Result<Planned<M>, PlanError> {
    let mm = kernel.new_mm().map_err(|error| PlanError::Kernel(0, error))?;
    let mut planned = Planned { mm, areas: Vec::new(), readable: Vec::new(), nr_pages: 0 };
    let result = planned.carry_out(kernel, text);
    if let Err(error) = result {
        // It was never loaded, so no CPU is in the way.
        let _gone = kernel.exit(&planned.mm);
        return Err(error);
    }
    Ok(planned)
}

/// Lets every CPU use the address space, takes every second area down by munmap while all run it,
/// and the rest by exit while all are lazy. Returns what was counted meanwhile.
///
/// # Errors
/// [`Failure`].
pub fn take_down<S: Stage>(stage: &S, planned: &Planned<S::Machine>) -> Result<Snapshot, Failure> {
    let kernel = stage.kernel();
    let nr_cpus = kernel.machine().nr_cpus();
    let before = kernel.counters().snapshot();
    on_each(stage, 0..nr_cpus, &|_| {
        kernel.switch_to(Some(&planned.mm));
        for range in &planned.readable {
            // One page of each is enough for a translation of each.
            let first = VirtRange::of_entry(mmu_gather::pagetable::Level::Pte, range.start());
            let touched = stage.touch(&planned.mm, first, UserAccess::Read);
            touched.map_err(|(address, error)| Failure::Signal(address, error))?;
        }
        Ok(())
    })?;
    for area in planned.areas.iter().step_by(2) {
        kernel.munmap(&planned.mm, *area)?;
    }
    let lazily = |_| {
        kernel.go_lazy();
        Ok(())
    };
    on_each(stage, 0..nr_cpus, &lazily)?;
    kernel.exit(&planned.mm)?;
    on_each(stage, 0..nr_cpus, &|_| {
        kernel.switch_to(None);
        Ok(())
    })?;
    kernel.drop_caches();
    Ok(kernel.counters().snapshot().since(&before))
}

impl<M: Machine> Planned<M> {
    fn carry_out(&mut self, kernel: &Kernel<M>, text: &str) -> Result<(), PlanError> {
        let program = program_area();
        let refused = |error| PlanError::Kernel(0, error);
        kernel.mmap(&self.mm, program).map_err(refused)?;
        kernel.populate(&self.mm, program.range, PageContent::File).map_err(refused)?;
        let mut readable = false;
        for (number, line) in (1..).zip(text.lines()) {
            let refused = |error| PlanError::Kernel(number, error);
            match Line::parse(line).ok_or(PlanError::Line(number))? {
                Line::Area(vma) => {
                    kernel.mmap(&self.mm, vma).map_err(refused)?;
                    self.areas.push(vma.range);
                    readable = vma.area.protection != Protection::Nothing;
                }
                Line::Fill(range, content) => {
                    kernel.populate(&self.mm, range, content).map_err(refused)?;
                    if content == PageContent::Swap {
                        continue;
                    }
                    self.nr_pages += range.nr_pages();
                    if readable {
                        self.readable.push(range);
                    }
                }
            }
        }
        Ok(())
    }
}

/// One line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    Area(Vma),
    Fill(VirtRange, PageContent),
}

impl Line {
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        let kind = words.next()?;
        let range = parse_range(words.next()?)?;
        let parsed = match kind {
            "area" => {
                let protection = match words.next()? {
                    "w" => Protection::Write,
                    "r" => Protection::Read,
                    "x" => Protection::Execute,
                    "-" => Protection::Nothing,
                    _ => return None,
                };
                let kind = parse_kind(words.next()?)?;
                let growth = match words.next() {
                    None => Growth::Fixed,
                    Some("grows") => Growth::Down,
                    Some(_) => return None,
                };
                Self::Area(Vma { range, area: Area { kind, protection, growth, ..Area::anon() } })
            }
            "fill" => Self::Fill(range, PageContent::from_word(words.next()?)?),
            _ => return None,
        };
        words.next().is_none().then_some(parsed)
    }
}

fn parse_range(word: &str) -> Option<VirtRange> {
    let (start, end) = word.split_once('-')?;
    let address = |digits| u64::from_str_radix(digits, 16).ok();
    VirtRange::new(address(start)?, address(end)?).ok()
}

fn parse_kind(word: &str) -> Option<AreaKind> {
    match word.split_once(':') {
        None if word == "anon" => Some(AreaKind::Anon),
        None if word == "pfn" => Some(AreaKind::Pfn),
        Some(("private", file)) => Some(AreaKind::FilePrivate(file.parse().ok()?)),
        Some(("shared", file)) => Some(AreaKind::FileShared(file.parse().ok()?)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_is_mapped_or_what_is_there() {
        let range = VirtRange::new(0x1000, 0x3000).expect("a good range");
        let area = Area {
            kind: AreaKind::FilePrivate(3),
            protection: Protection::Read,
            growth: Growth::Down,
            ..Area::anon()
        };
        assert_eq!(Line::parse("area 1000-3000 r private:3 grows"), Some(Line::Area(Vma { range, area })));
        assert_eq!(
            Line::parse(" fill 1000-3000 file-dirty "),
            Some(Line::Fill(range, PageContent::FileDirty))
        );
    }

    #[test]
    fn a_line_that_says_more_or_less_is_refused() {
        for line in
            ["", "area", "fill 1000-3000", "fill 1000-3000 anon twice", "area 1000-3000 w shared", "x"]
        {
            assert_eq!(Line::parse(line), None, "{line:?}");
        }
    }
}
