//! Writes the first inputs of the fuzzers: what real programs did with memory, as far as a sequence
//! can express it.
//!
//! ```text
//! seeds DIRECTORY     writes DIRECTORY/sequence/* and DIRECTORY/text/*
//! ```
//!
//! A layout becomes areas at their real addresses, touched, partly given up, forked, torn down. A
//! log becomes its calls, threads as CPUs, processes as address spaces. Both are cut to what one
//! input may hold.

use std::collections::HashMap;
use std::path::Path;
use std::process::ExitCode;

use mmu_cli::input::bundled::{LAYOUTS, TRACES};
use mmu_cli::input::layout::{Layout, LayoutVma, PageState, Prot, Sharing, VmaKind};
use mmu_cli::input::strace::{Advice, Backing as TraceBacking, ChildMemory, MemoryCall, Trace};
use mmu_gather::pagetable::VirtRange;
use mmu_hosted::{Backing, Guarding, MmId, NR_MMS, Op, Rights, Sequence, Step, UserAccess, generate};

const CPUS: u8 = 4;
/// Areas of one layout.
const MOST_AREAS: usize = 32;
/// Steps of one input.
const MOST_STEPS: usize = 240;

fn main() -> ExitCode {
    let Some(directory) = std::env::args_os().nth(1) else {
        eprintln!("usage: seeds DIRECTORY");
        return ExitCode::from(2);
    };
    match write_all(Path::new(&directory)) {
        Ok(written) => {
            println!("{written} files");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn write_all(directory: &Path) -> Result<usize, Box<dyn std::error::Error>> {
    let (sequences, texts) = (directory.join("sequence"), directory.join("text"));
    std::fs::create_dir_all(&sequences)?;
    std::fs::create_dir_all(&texts)?;
    let mut written = 0;
    let mut write = |name: &str, steps: Vec<Step>| {
        let mut sequence = Sequence { nr_cpus: u32::from(CPUS), ..generate(1, u32::from(CPUS), 0) };
        sequence.steps = steps;
        sequence.steps.truncate(MOST_STEPS);
        written += 2;
        std::fs::write(sequences.join(name), sequence.to_bytes())
            .and_then(|()| std::fs::write(texts.join(name), sequence.to_string()))
    };
    for bundled in LAYOUTS {
        write(bundled.name, of_layout(&Layout::parse(bundled.name, bundled.text)?))?;
    }
    for bundled in TRACES {
        write(&format!("{}.log", bundled.name), of_trace(&Trace::parse(bundled.name, bundled.text)?))?;
    }
    Ok(written)
}

fn range(start: u64, bytes: u64, most_pages: u64) -> Option<VirtRange> {
    let end = start.checked_add(bytes.min(most_pages << 12))?.min(1 << 47);
    VirtRange::new(start & !0xfff, end & !0xfff).ok()
}

const fn rights(prot: Prot) -> Rights {
    match prot {
        Prot { write: true, .. } => Rights::Write,
        Prot { write: false, read: false, exec: false } => Rights::Nothing,
        Prot { .. } => Rights::Read,
    }
}

fn backing(vma: &LayoutVma) -> Backing {
    let is_huge = vma.runs.iter().any(|run| run.state == PageState::AnonHuge);
    match (&vma.kind, vma.sharing) {
        (VmaKind::Stack, _) => Backing::Stack,
        (VmaKind::Pfn(_), _) => Backing::Pfn,
        (VmaKind::File(_) | VmaKind::Shared(_), Sharing::Shared) => Backing::Shared,
        (VmaKind::File(_), Sharing::Private) => Backing::Private,
        _ if is_huge => Backing::Huge,
        _ => Backing::Anon,
    }
}

/// Areas are mapped and used by four CPUs, some lose pages or rights, a child is forked, and
/// everything goes.
fn of_layout(layout: &Layout) -> Vec<Step> {
    let mm = MmId(0);
    let used: Vec<&LayoutVma> = layout.vmas.iter().filter(|vma| !vma.runs.is_empty()).collect();
    let stride = used.len().div_ceil(MOST_AREAS).max(1);
    let areas: Vec<_> = used.into_iter().step_by(stride).collect();
    let mut ops = Vec::new();
    for vma in &areas {
        if let Some(range) = range(vma.start, vma.end - vma.start, 2048) {
            ops.push(Op::Map(mm, range, backing(vma), rights(vma.prot)));
        }
    }
    ops.extend([Op::Sync, Op::Switch(mm), Op::Switch(mm), Op::Switch(mm), Op::Switch(mm)]);
    for (number, vma) in areas.iter().enumerate() {
        let access = if vma.prot.write { UserAccess::Write } else { UserAccess::Read };
        let run = &vma.runs[0];
        let Some(pages) = range(vma.start + (run.first_page << 12), run.nr_pages << 12, 48) else { continue };
        // Twice: on two CPUs.
        ops.extend([Op::Touch(pages, access), Op::Touch(pages, UserAccess::Read)]);
        match (number % 6, run.state) {
            (_, PageState::Swap) => ops.push(Op::Reclaim(mm, mm, pages)),
            (1, _) => ops.push(Op::Discard(mm, pages)),
            (3, _) => ops.push(Op::Protect(mm, pages, Rights::Read)),
            (4, _) => ops.push(Op::Lazy),
            (5, _) => ops.push(Op::Guard(mm, pages, Guarding::Install)),
            _ => {}
        }
    }
    ops.push(Op::Fork(mm, MmId(1)));
    ops.extend(
        areas.iter().filter_map(|vma| Some(Op::Unmap(mm, range(vma.start, vma.end - vma.start, 2048)?))),
    );
    ops.extend([Op::Exit(mm), Op::Exit(MmId(1))]);
    (0..).zip(ops).map(|(number, op): (usize, Op)| Step { cpu: cpu_of(number), op }).collect()
}

fn cpu_of(number: usize) -> u16 {
    u16::try_from(number % usize::from(CPUS)).unwrap_or(0)
}

/// The calls of a log, each by the CPU of its thread, on the address space of its process.
fn of_trace(trace: &Trace) -> Vec<Step> {
    let mut steps = Vec::new();
    // By thread: its CPU and its address space.
    let mut threads: HashMap<u32, (u16, MmId)> = HashMap::new();
    for event in &trace.events {
        let known = threads.len();
        let (cpu, mm) = *threads.entry(event.thread).or_insert((cpu_of(known), MmId(0)));
        let mut push = |op| steps.push(Step { cpu, op });
        match &event.call {
            MemoryCall::Mmap { range: bytes, prot, sharing, backing, .. } => {
                let Some(range) = range(bytes.start, bytes.end - bytes.start, 2048) else { continue };
                let backing = match (backing, sharing) {
                    (TraceBacking::Anonymous, Sharing::Private) => Backing::Anon,
                    (TraceBacking::File { .. }, Sharing::Private) => Backing::Private,
                    (_, Sharing::Shared) => Backing::Shared,
                };
                push(Op::Map(mm, range, backing, rights(*prot)));
                push(Op::Switch(mm));
                if let Some(pages) = self::range(range.start(), range.len_bytes(), 16) {
                    let access = if prot.write { UserAccess::Write } else { UserAccess::Read };
                    push(Op::Touch(pages, access));
                }
            }
            MemoryCall::Munmap { range: bytes } => {
                push_some(
                    &mut push,
                    range(bytes.start, bytes.end - bytes.start, 2048).map(|range| Op::Unmap(mm, range)),
                );
            }
            MemoryCall::Mremap { from, to, .. } => {
                let old = range(from.start, from.end - from.start, 2048);
                push_some(&mut push, old.map(|old| Op::Remap(mm, old, to.start)));
            }
            MemoryCall::Madvise { range: bytes, advice } => {
                let pages = range(bytes.start, bytes.end - bytes.start, 2048);
                push_some(
                    &mut push,
                    pages.and_then(|pages| match advice {
                        Advice::DontNeed | Advice::Free | Advice::Remove => Some(Op::Discard(mm, pages)),
                        Advice::GuardInstall => Some(Op::Guard(mm, pages, Guarding::Install)),
                        Advice::GuardRemove => Some(Op::Guard(mm, pages, Guarding::Remove)),
                        Advice::PageOut => Some(Op::Reclaim(mm, mm, pages)),
                        _ => None,
                    }),
                );
            }
            MemoryCall::Mprotect { range: bytes, prot } => {
                let pages = range(bytes.start, bytes.end - bytes.start, 2048);
                push_some(&mut push, pages.map(|pages| Op::Protect(mm, pages, rights(*prot))));
            }
            MemoryCall::Clone { child, memory } => {
                let child_mm = match memory {
                    ChildMemory::Copied => MmId((mm.0 + 1) % NR_MMS),
                    ChildMemory::Shared | ChildMemory::Borrowed => mm,
                };
                if child_mm != mm {
                    push(Op::Fork(mm, child_mm));
                }
                threads.insert(*child, (cpu_of(known + 1), child_mm));
            }
            MemoryCall::Exec | MemoryCall::ExitGroup => push(Op::Exit(mm)),
            MemoryCall::Exit => push(Op::Lazy),
            MemoryCall::Brk { .. } => {}
        }
    }
    steps
}

fn push_some(push: &mut impl FnMut(Op), op: Option<Op>) {
    if let Some(op) = op {
        push(op);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mmu_adapter::execute;

    #[test]
    fn every_seed_is_many_operations_and_clean() {
        let layouts = LAYOUTS.iter().map(|bundled| {
            (bundled.name, of_layout(&Layout::parse(bundled.name, bundled.text).expect("bundled")))
        });
        let traces = TRACES.iter().map(|bundled| {
            (bundled.name, of_trace(&Trace::parse(bundled.name, bundled.text).expect("bundled")))
        });
        for (name, mut steps) in layouts.chain(traces) {
            steps.truncate(MOST_STEPS);
            assert!(steps.len() > 30, "{name}: {} steps", steps.len());
            let sequence = Sequence { steps, ..generate(1, u32::from(CPUS), 0) };
            let read = Sequence::from_bytes(&sequence.to_bytes());
            assert_eq!(read.steps, sequence.steps, "{name}: the bytes cannot say it");
            let outcome = execute(&read).expect("memory");
            assert!(outcome.is_clean(), "{name}: {outcome:?}\n{read}");
        }
    }
}
