//! The reader of strace logs against every bundled log, against damaged ones, and against logs of a
//! few lines.

use core::ops::Range;
use std::collections::BTreeMap;

use proptest::prelude::*;

use crate::input::bundled::TRACES;
use crate::input::layout::{Prot, Sharing};
use crate::input::strace::{Advice, Backing, ChildMemory, MemoryCall, OldRange, Placement, Trace};

/// File name and text of each bundled log.
fn bundled() -> Vec<(String, &'static str)> {
    TRACES.iter().map(|bundled| (format!("{}.strace", bundled.name), bundled.text)).collect()
}

fn parse(text: &str) -> Trace {
    Trace::parse("log", text).unwrap_or_else(|error| panic!("{error}"))
}

fn calls(text: &str) -> Vec<(usize, u32, MemoryCall)> {
    parse(text).events.into_iter().map(|event| (event.line, event.thread, event.call)).collect()
}

#[test]
fn every_bundled_log_is_read_whole() {
    let files = bundled();
    assert!(files.len() >= 4, "only {} bundled logs", files.len());
    for (name, text) in files {
        let trace = Trace::parse(&name, text).unwrap_or_else(|error| panic!("{error}"));
        assert!(trace.events.len() > 30, "{name}: {trace:?}");
        assert_eq!((trace.nr_orphaned, trace.nr_other), (0, 0), "{name}");
    }
}

/// Takes `gone` out of `ranges`.
fn unmap(ranges: &mut Vec<Range<u64>>, gone: &Range<u64>) {
    *ranges = core::mem::take(ranges)
        .into_iter()
        .flat_map(|range| [range.start..range.end.min(gone.start), range.start.max(gone.end)..range.end])
        .filter(|range| !range.is_empty())
        .collect();
}

#[test]
fn no_range_is_handed_out_while_it_is_still_mapped() {
    for (name, text) in bundled() {
        let mut spaces = vec![Vec::<Range<u64>>::new()];
        let mut space_of_thread = BTreeMap::new();
        for event in parse(text).events {
            let space = *space_of_thread.entry(event.thread).or_insert(0);
            match event.call {
                MemoryCall::Mmap { range, placement, .. } => {
                    let in_use =
                        spaces[space].iter().any(|used| used.start < range.end && range.start < used.end);
                    assert!(placement == Placement::Replace || !in_use, "{name}:{}: {range:x?}", event.line);
                    unmap(&mut spaces[space], &range);
                    spaces[space].push(range);
                }
                MemoryCall::Munmap { range } => unmap(&mut spaces[space], &range),
                MemoryCall::Mremap { from, to, old_range: OldRange::Unmapped } => {
                    unmap(&mut spaces[space], &from);
                    unmap(&mut spaces[space], &to);
                    spaces[space].push(to);
                }
                MemoryCall::Clone { child, memory: ChildMemory::Copied } => {
                    space_of_thread.insert(child, spaces.len());
                    spaces.push(spaces[space].clone());
                }
                MemoryCall::Clone { child, .. } => drop(space_of_thread.insert(child, space)),
                MemoryCall::Exec => {
                    space_of_thread.insert(event.thread, spaces.len());
                    spaces.push(Vec::new());
                }
                _ => {}
            }
        }
    }
}

#[test]
fn every_thread_ends_at_most_once_and_does_nothing_afterwards() {
    for (name, text) in bundled() {
        let mut ended = BTreeMap::new();
        for event in parse(text).events {
            assert_eq!(
                ended.get(&event.thread),
                None,
                "{name}:{}: thread {} ended",
                event.line,
                event.thread
            );
            match event.call {
                MemoryCall::Exit | MemoryCall::ExitGroup => drop(ended.insert(event.thread, event.line)),
                MemoryCall::Clone { child, .. } => drop(ended.remove(&child)),
                _ => {}
            }
        }
    }
}

const READ_WRITE: Prot = Prot { read: true, write: true, exec: false };

#[test]
fn each_call_is_read_with_its_arguments() {
    let text = "\
1 execve(\"/bin/x\", [\"x\"], 0x7ffe /* 20 vars */) = 0
1 brk(NULL) = 0x555500001230
1 mmap(NULL, 5000, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS|MAP_POPULATE, -1, 0) = 0x7f0000000000
1 mmap(0x7f0000010000, 4096, PROT_NONE, MAP_SHARED|MAP_FIXED, 3</lib/a, b>, 0x2000) = 0x7f0000010000
1 mprotect(0x7f0000000000, 4096, PROT_READ|PROT_WRITE|PROT_GROWSDOWN) = 0 <0.000012>
1 madvise(0x7f0000000000, 8192, MADV_DONTNEED) = 0
1 madvise(0x7f0000000000, 8192, 0x63 /* MADV_??? */) = -1 EINVAL (Invalid argument)
1 madvise(0x7f0000000000, 8192, MADV_MERGEABLE) = 0
1 mremap(0x7f0000000000, 8192, 16384, MREMAP_MAYMOVE) = 0x7f0000100000
1 munmap(0x7f0000100000, 16384) = 0
1 write(1, \"hello\\n\", 6) = 6
1 exit_group(0) = ?
1 +++ exited with 0 +++
";
    let range = 0x7f00_0000_0000..0x7f00_0000_2000;
    let expected = [
        (1, MemoryCall::Exec),
        (2, MemoryCall::Brk { end: 0x5555_0000_1230 }),
        (
            3,
            MemoryCall::Mmap {
                range: range.clone(),
                prot: READ_WRITE,
                sharing: Sharing::Private,
                backing: Backing::Anonymous,
                placement: Placement::Free,
                other_flags: vec!["MAP_POPULATE".to_owned()],
            },
        ),
        (
            4,
            MemoryCall::Mmap {
                range: 0x7f00_0001_0000..0x7f00_0001_1000,
                prot: Prot::default(),
                sharing: Sharing::Shared,
                backing: Backing::File { offset: 0x2000 },
                placement: Placement::Replace,
                other_flags: vec![],
            },
        ),
        (5, MemoryCall::Mprotect { range: 0x7f00_0000_0000..0x7f00_0000_1000, prot: READ_WRITE }),
        (6, MemoryCall::Madvise { range: range.clone(), advice: Advice::DontNeed }),
        (8, MemoryCall::Madvise { range: range.clone(), advice: Advice::Other("MADV_MERGEABLE".to_owned()) }),
        (
            9,
            MemoryCall::Mremap {
                from: range,
                to: 0x7f00_0010_0000..0x7f00_0010_4000,
                old_range: OldRange::Unmapped,
            },
        ),
        (10, MemoryCall::Munmap { range: 0x7f00_0010_0000..0x7f00_0010_4000 }),
        (12, MemoryCall::ExitGroup),
    ];
    let trace = parse(text);
    assert_eq!((trace.nr_failed, trace.nr_other, trace.nr_unfinished, trace.nr_orphaned), (1, 1, 0, 0));
    assert_eq!(calls(text), expected.map(|(line, call)| (line, 1, call)));
}

#[test]
fn guard_pages_are_known_by_name_and_by_number() {
    let text = "\
1 madvise(0x7f0000000000, 8192, MADV_GUARD_INSTALL) = 0
1 madvise(0x7f0000000000, 8192, 0x66 /* MADV_??? */) = 0
1 madvise(0x7f0000000000, 8192, MADV_GUARD_REMOVE) = 0
1 madvise(0x7f0000000000, 8192, 0x67 /* MADV_??? */) = 0
1 madvise(0x7f0000000000, 8192, 0x68 /* MADV_??? */) = 0
";
    let range = 0x7f00_0000_0000..0x7f00_0000_2000;
    let unknown = Advice::Other("0x68 /* MADV_??? */".to_owned());
    let (install, remove) = (Advice::GuardInstall, Advice::GuardRemove);
    let expected = [install.clone(), install, remove.clone(), remove, unknown];
    let expected = (1..)
        .zip(expected)
        .map(|(line, advice)| (line, 1, MemoryCall::Madvise { range: range.clone(), advice }));
    assert_eq!(calls(text), expected.collect::<Vec<_>>());
}

#[test]
fn an_interrupted_call_is_placed_where_it_cannot_collide() {
    let text = "\
1 brk(NULL) = 0x5000
1 clone3({flags=CLONE_VM|CLONE_THREAD, exit_signal=0} <unfinished ...>
2 munmap(0x10000, 4096 <unfinished ...>
1 <... clone3 resumed> => {parent_tid=[2]}, 88) = 2
1 mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0 <unfinished ...>
2 <... munmap resumed>) = 0
1 <... mmap resumed>) = 0x10000
2 exit(0 <unfinished ...>
1 exit_group(0 <unfinished ...>
2 <... exit resumed>) = ?
2 +++ exited with 0 +++
1 <... exit_group resumed>) = ?
1 +++ exited with 0 +++
";
    let placed = calls(text);
    assert_eq!(placed[1], (2, 1, MemoryCall::Clone { child: 2, memory: ChildMemory::Shared }));
    assert_eq!(placed[2], (3, 2, MemoryCall::Munmap { range: 0x10000..0x11000 }));
    assert!(matches!(placed[3], (7, 1, MemoryCall::Mmap { .. })));
    assert_eq!(placed[4..], [(8, 2, MemoryCall::Exit), (9, 1, MemoryCall::ExitGroup)]);
}

#[test]
fn the_ways_to_start_a_process_are_told_apart() {
    let text = "\
1 clone(child_stack=NULL, flags=CLONE_CHILD_SETTID|SIGCHLD, child_tidptr=0x7f) = 2
1 clone(child_stack=0x7f00, flags=CLONE_VM|CLONE_VFORK|SIGCHLD) = 3
1 vfork() = 4
1 fork() = 5
1 clone(child_stack=0x7f00, flags=CLONE_VM|CLONE_THREAD, parent_tid=[6], tls=0x7f) = 6
";
    let memory = parse(text).events.into_iter().map(|event| match event.call {
        MemoryCall::Clone { child, memory } => (child, memory),
        other => panic!("{other:?}"),
    });
    let expected = [
        (2, ChildMemory::Copied),
        (3, ChildMemory::Borrowed),
        (4, ChildMemory::Borrowed),
        (5, ChildMemory::Copied),
        (6, ChildMemory::Shared),
    ];
    assert_eq!(memory.collect::<Vec<_>>(), expected);
}

#[test]
fn a_log_without_numbers_gives_its_lines_to_the_right_thread() {
    let text = "\
brk(NULL) = 0x5000
vfork(strace: Process 8 attached
 <unfinished ...>
[pid     8] brk(NULL) = 0x5000
[pid     7] <... vfork resumed>) = 8
[pid     7] brk(0x9000) = 0x9000
[pid     7] exit_group(0) = ?
[pid     7] +++ exited with 0 +++
brk(0x7000) = 0x7000
+++ exited with 0 +++
";
    let expected = [
        (1, 7, MemoryCall::Brk { end: 0x5000 }),
        (2, 7, MemoryCall::Clone { child: 8, memory: ChildMemory::Borrowed }),
        (4, 8, MemoryCall::Brk { end: 0x5000 }),
        (6, 7, MemoryCall::Brk { end: 0x9000 }),
        (7, 7, MemoryCall::ExitGroup),
        (9, 8, MemoryCall::Brk { end: 0x7000 }),
        (10, 8, MemoryCall::Exit),
    ];
    assert_eq!(calls(text), expected);
}

#[test]
fn a_number_that_is_used_again_is_a_new_thread() {
    let text =
        "1 vfork() = 2\n2 exit(0) = ?\n2 +++ exited with 0 +++\n1 vfork() = 2\n2 +++ killed by SIGKILL +++\n";
    let ends = calls(text).into_iter().filter(|(_, _, call)| *call == MemoryCall::Exit);
    assert_eq!(ends.map(|(line, ..)| line).collect::<Vec<_>>(), [2, 5]);
}

#[test]
fn a_thread_that_executes_a_program_goes_on_as_its_leader() {
    let text = "\
1 clone(child_stack=0x7f00, flags=CLONE_VM|CLONE_THREAD) = 2
2 execve(\"/bin/x\", [\"x\"], 0x7f /* 1 var */ <unfinished ...>
1 +++ superseded by execve in pid 2 +++
1 <... execve resumed>) = 0
1 brk(NULL) = 0x5000
";
    let calls = calls(text);
    assert_eq!(calls[1..3], [(3, 2, MemoryCall::Exit), (4, 1, MemoryCall::Exec)]);
}

#[test]
fn a_log_that_stops_between_two_lines_keeps_what_returned() {
    let text = "1 brk(NULL) = 0x5000\n1 vfork( <unfinished ...>\n2 brk(NULL) = 0x6000\n2 mmap(NULL <unfinished ...>\n";
    let trace = parse(text);
    assert_eq!(trace.events.len(), 3);
    assert_eq!(trace.events[1].call, MemoryCall::Appears);
    assert_eq!((trace.nr_unfinished, trace.nr_orphaned, trace.assumed.processes), (2, 0, 1));
}

#[test]
fn each_mistake_is_named_with_its_line() {
    for (line, message) in [
        ("1 mmap(NULL, 4096) = 0x1000", "expected the arguments of this call, found `NULL, 4096`"),
        (
            "1 munmap(0x1000, 0xfffffffffffffff0) = 0",
            "expected a range of whole pages in the user half, found `0x1000, 0xfffffffffffffff0`",
        ),
        (
            "1 munmap(0x1001, 4096) = 0",
            "expected a range of whole pages in the user half, found `0x1001, 4096`",
        ),
        (
            "1 munmap(0xffff800000000000, 4096) = 0",
            "expected a range of whole pages in the user half, found `0xffff800000000000, 4096`",
        ),
        (
            "1 brk(NULL) = 0xffffffff7f600000",
            "expected an address in the user half, found `0xffffffff7f600000`",
        ),
        (
            "1 brk(NULL) = 0xaaaaf1e30000",
            "expected an address in the user half of x86_64, found `0xaaaaf1e30000`: this log is of another architecture \
             (AArch64 has addresses of 48 bits)",
        ),
        (
            "1 munmap(0xfff8000100000000, 8192) = 0",
            "expected an address in the user half of x86_64, found `0xfff8000100000000`: this log is of another architecture \
             (sparc64 has programs on both sides of its hole)",
        ),
        ("1 brk(NULL) = -5", "expected a number below 2^64, found `-5`"),
        ("1 mprotect(0x1000, 4096, READ) = 0", "expected `PROT_` words, found `READ`"),
        (
            "1 mmap(NULL, 4096, PROT_READ, MAP_ANONYMOUS, -1, 0) = 0x1000",
            "expected `MAP_PRIVATE` or `MAP_SHARED`, found `MAP_ANONYMOUS`",
        ),
        ("1 clone(child_stack=NULL) = 2", "expected `flags=` among the arguments, found `child_stack=NULL`"),
        ("1 vfork() = 0", "expected the number of the new thread, found `0`"),
    ] {
        let error = Trace::parse("log", &format!("1 brk(NULL) = 0x5000\n{line}\n")).expect_err(line);
        assert_eq!(error.to_string(), format!("log:2: {message}"));
    }
    let error = Trace::parse("log", "1 read(0, \"\", 1) = 0\n").expect_err("no memory calls");
    assert_eq!(error.to_string(), "log:1: expected memory calls in the log, found none");
}

/// Changes one line of a log, or its place.
fn damage(lines: &mut Vec<String>, at: usize, kind: u8, text: &str) {
    let line = &mut lines[at];
    match kind % 5 {
        0 => drop(lines.remove(at)),
        1 => lines.insert(at, text.to_owned()),
        2 => line.insert_str(line.floor_char_boundary(text.len()), text),
        3 => line.truncate(line.floor_char_boundary(text.len())),
        _ => lines.swap(at, 0),
    }
}

proptest! {
    #[test]
    fn damaged_logs_never_panic_and_accepted_ones_keep_every_promise(
        which in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), ".{0,40}"), 1..4),
    ) {
        let files = bundled();
        let mut lines = files[which.index(files.len())].1.lines().map(str::to_owned).collect::<Vec<_>>();
        for (at, kind, text) in changes {
            let at = at.index(lines.len());
            damage(&mut lines, at, kind, &text);
        }
        if let Ok(trace) = Trace::parse("damaged", &lines.join("\n")) {
            prop_assert!(trace.events.is_sorted_by_key(|event| event.line));
            prop_assert!(trace.events.iter().all(|event| event.line >= 1 && event.line <= lines.len()));
        }
    }

    #[test]
    fn a_log_may_end_after_any_line(which in any::<prop::sample::Index>(), nr_lines in any::<prop::sample::Index>()) {
        let files = bundled();
        let text = &files[which.index(files.len())].1;
        let nr_lines = 1 + nr_lines.index(text.lines().count());
        let start = text.lines().take(nr_lines).collect::<Vec<_>>().join("\n");
        prop_assert!(Trace::parse("start", &start).is_ok());
    }

    #[test]
    fn any_text_is_answered(text in any::<String>(), line in "[0-9]{1,3} (mmap|brk|clone3|<\\.\\.\\.)[ -~]{0,60}") {
        let _answered = Trace::parse("text", &text);
        let _answered = Trace::parse("line", &line);
    }
}
