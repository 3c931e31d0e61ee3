//! Logs as people record and paste them: each has the same calls as a plain one.

use crate::input::layout::{Prot, Sharing};
use crate::input::strace::{
    Advice, Assumed, Backing, ChildMemory, MemoryCall, Placement, Remarked, Trace, TraceEvent,
};

fn parse(text: &str) -> Trace {
    Trace::parse("log", text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

fn calls(trace: &Trace) -> Vec<(u32, MemoryCall)> {
    trace.events.iter().map(|TraceEvent { thread, call, .. }| (*thread, call.clone())).collect()
}

/// A small program: the calls of each test below.
const PLAIN: &str = "\
17 execve(\"/bin/x\", [\"x\"], 0x7ffe12345678 /* 20 vars */) = 0
17 brk(NULL) = 0x555500001000
17 mmap(NULL, 8192, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x7f0000000000
17 mprotect(0x7f0000000000, 4096, PROT_READ) = 0
17 munmap(0x7f0000000000, 8192) = 0
17 exit_group(0) = ?
17 +++ exited with 0 +++
";

/// `PLAIN` with each line changed.
fn each_line(change: impl Fn(&str, usize) -> String) -> String {
    PLAIN.lines().enumerate().map(|(index, line)| change(line, index) + "\n").collect()
}

fn without_number(line: &str) -> &str {
    line.strip_prefix("17 ").expect("each line has a number")
}

#[test]
fn columns_colours_and_quoting_change_nothing() {
    let plain = calls(&parse(PLAIN));
    assert_eq!(plain.len(), 6);
    for text in [
        each_line(|line, at| format!("17 12:00:0{at}.000123 {}", without_number(line))),
        each_line(|line, at| format!("17 12:00:0{at}.1 (+     0.0{at}) {}", without_number(line))),
        each_line(|line, at| format!("17 [{at:16x}] {}", without_number(line))),
        each_line(|line, at| format!("17 [{at:4}] {}", without_number(line))),
        each_line(|line, _| format!("17<x y> {}", without_number(line))),
        each_line(|line, _| format!("[pid 17<x>] {}", without_number(line))),
        each_line(|line, _| format!("    {line}")),
        each_line(|line, _| format!("> > {line}\r")),
        each_line(|line, _| format!("\u{1b}[32m{line}\u{1b}[0m")),
        each_line(|line, _| line.replace(' ', "\u{a0}")),
        each_line(|line, _| line.replace(" = ", "         = ")),
        each_line(
            |line, _| if line.ends_with("= 0") { format!("{line} <0.000012>") } else { line.to_owned() },
        ),
        each_line(|line, _| {
            format!("{line}\n > /usr/lib/libc.so.6(__f+0x32) [0xf8ee2]\n > /bin/x(main+0x1) [0x12]")
        }),
        each_line(|line, _| format!("\n{line}\n")),
        each_line(|line, _| line.replace("PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS", "0x3, 0x22")),
        each_line(|line, _| line.replace("4096, PROT_READ", "4096, 0x1 /* PROT_READ */")),
        format!("strace: Process 17 attached\n{PLAIN}strace: Process 17 detached\n"),
        format!("Process 17 attached - interrupt to quit\n{PLAIN}Process 17 detached\n"),
        format!("...\n{PLAIN}[...]\n"),
        format!(
            "{PLAIN}% time     seconds  usecs/call     calls    errors syscall\n------ ----------- ----------- --------- --------- ----------------\n 50.00    0.1          10         7           mmap\n100.00    0.000290                    55         1 total\n"
        ),
    ] {
        let trace = parse(&text);
        assert_eq!(calls(&trace), plain, "{text}");
        assert_eq!((trace.output, trace.assumed), (Remarked::default(), Assumed::default()), "{text}");
    }
    let bytes = [b"17 write(1, \"\xff\xfe\", 2) = 2\n".as_slice(), PLAIN.as_bytes()].concat();
    assert_eq!(calls(&Trace::read("log", bytes.as_slice()).expect("a log")), plain);
}

#[test]
fn output_of_the_program_is_skipped_and_counted_wherever_it_stands() {
    let plain = calls(&parse(PLAIN));
    for (text, count, first_line) in [
        (format!("$ strace -f -o /dev/stderr x\n{PLAIN}$\n"), 2, 1),
        (each_line(|line, at| if at == 3 { format!("12 monkeys\n{line}") } else { line.to_owned() }), 1, 4),
        // Behind a call that has not returned, in one line or more.
        (PLAIN.replace("17 munmap", "17 write(1, \"a\\nb\\n\", 4a\nb\n) = 4\n17 munmap"), 2, 5),
        (PLAIN.replace("17 munmap", "17 write(1, \"a\\nb\", 3a\nb)      = 3\n17 munmap"), 2, 5),
        // Of another process, in a memory call.
        (PLAIN.replace("8192) = 0\n", "8192one\n) = 0\n"), 1, 5),
        (PLAIN.replace("PROT_READ) = 0", "PROT_READtwo\nthree\n) = 0"), 2, 4),
        // In front of a line, without an end of line.
        (PLAIN.replace("17 munmap", "50%..17 munmap").replace("50%..17 ", "50%..[pid 17] "), 1, 5),
        (PLAIN.replace("17 exit_group", "done[pid 17] exit_group"), 1, 6),
    ] {
        let trace = parse(&text);
        assert_eq!(calls(&trace), plain, "{text}");
        assert_eq!(trace.output, Remarked { count, first_line }, "{text}");
        assert_eq!(trace.broken.count, 0, "{text}");
    }
    let unnumbered = each_line(|line, _| without_number(line).to_owned()).replace("munmap(", "onemunmap(");
    let trace = parse(&unnumbered);
    assert_eq!((trace.events.len(), trace.output.count), (plain.len(), 1));
}

#[test]
fn a_call_that_output_has_made_unreadable_is_counted() {
    let text = PLAIN.replace("MAP_ANONYMOUS, -1, 0)", "MAP_ANONYMOUS, what\nelse\n)");
    let trace = parse(&text);
    assert_eq!(trace.broken, Remarked { count: 1, first_line: 3 });
    assert_eq!(trace.events.len(), 5);
    // Its line is followed by another line of strace.
    let trace = parse(&PLAIN.replace("4096, PROT_READ) = 0", "4096"));
    assert_eq!(trace.broken, Remarked { count: 1, first_line: 4 });
}

#[test]
fn a_first_thread_without_a_number_is_told_from_its_children() {
    for start in ["vfork( <unfinished ...>", "fork( <unfinished ...>", "wait4(-1,  <unfinished ...>"] {
        let trace = parse(&format!(
            "execve(\"/bin/x\", [\"x\"], 0x7ffe /* 1 var */) = 0\n{start}\n\
             [pid 30] munmap(0x7f0000000000, 4096) = 0\n[pid 20] <... {} resumed> ) = 30\n\
             [pid 20] brk(NULL) = 0x5000\n[pid 30] exit(0) = ?\n",
            start.split_once('(').expect("a call").0
        ));
        let brk =
            trace.events.iter().find(|event| matches!(event.call, MemoryCall::Brk { .. })).expect("made");
        assert_eq!(trace.events[0].thread, brk.thread, "{trace:?}");
        let munmap = trace.events.iter().find(|event| matches!(event.call, MemoryCall::Munmap { .. }));
        assert_eq!(munmap.map(|event| event.thread), Some(30));
    }
}

#[test]
fn remarks_that_cut_a_line_leave_its_rest() {
    for remark in [
        "strace: Process 18 attached",
        "Process 18 attached",
        "Process 18 attached (waiting for parent)",
        "Process 18 suspended",
        "[ Process PID=17 runs in 32 bit mode. ]",
        "strace: [ Process PID=17 runs in 32 bit mode. ]",
    ] {
        for text in [
            PLAIN.replace("8192) = 0\n", &format!("8192{remark}\n) = 0\n")),
            PLAIN.replace(
                "17 munmap(0x7f0000000000, 8192) = 0",
                &format!(
                    "17 munmap(0x7f0000000000, 8192{remark}\n <unfinished ...>\n17 <... munmap resumed>) = 0"
                ),
            ),
        ] {
            assert_eq!(calls(&parse(&text)), calls(&parse(PLAIN)), "{text}");
        }
    }
    let text = PLAIN.replace(
        "17 exit_group(0) = ?\n17 +++ exited with 0 +++\n",
        "17 munmap(0x1000, ^Cstrace: Process 17 detached\n <detached ...>\n",
    );
    let trace = parse(&text);
    assert_eq!((trace.events.len(), trace.nr_unfinished), (5, 1));
}

#[test]
fn results_of_32_bit_programs_lose_their_sign() {
    let trace = parse(
        "mmap2(NULL, 8192, PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0xfffffffff7fa3000\n\
         brk(0xffffffff80001000) = 0xffffffff80001000\nmunmap(0xf7fa3000, 8192) = 0\n",
    );
    let range = 0xf7fa_3000..0xf7fa_5000;
    assert!(matches!(&trace.events[0].call, MemoryCall::Mmap { range: mapped, .. } if *mapped == range));
    assert_eq!(trace.events[1].call, MemoryCall::Brk { end: 0x8000_1000 });
    assert_eq!(trace.events[2].call, MemoryCall::Munmap { range });
}

#[test]
fn returns_without_a_start_are_counted_unless_they_say_all() {
    let trace = parse(
        "17 <... mmap resumed>) = 0x7f0000000000\n17 brk(NULL) = 0x5000\n17 <... munmap resumed>) = 0\n\
         17 <... mprotect resumed>) = -1 EINVAL (Invalid argument)\n17 <... vfork resumed>) = 18\n\
         18 <... execve resumed>) = 0\n",
    );
    assert_eq!(trace.lost_starts, Remarked { count: 2, first_line: 1 });
    let child = MemoryCall::Clone { child: 18, memory: ChildMemory::Borrowed };
    assert_eq!(calls(&trace)[1..], [(17, child), (18, MemoryCall::Exec)]);
}

const BRK: &str = "7 brk(NULL) = 0x5000\n7 mmap(NULL, 4096, PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x7f0000000000\n";

fn assumed(text: &str) -> (Assumed, u64) {
    let trace = parse(text);
    (trace.assumed, trace.nr_orphaned)
}

#[test]
fn a_thread_that_appears_is_of_the_only_process_that_it_can_be_of() {
    let call = "munmap(0x7f0000000000, 4096) = 0\n";
    // One process: its threads.
    let none = Assumed::default();
    assert_eq!(assumed(&format!("{BRK}8 {call}9 {call}8 {call}")), (Assumed { threads: 2, ..none }, 0));
    // It does nothing but end.
    assert_eq!(assumed(&format!("{BRK}8 exit(0) = ?\n8 +++ exited with 0 +++\n")), (none, 0));
    // Two processes, and what it calls about is mapped in one.
    let two = format!("{BRK}7 fork() = 8\n8 munmap(0x7f0000000000, 4096) = 0\n");
    assert_eq!(assumed(&format!("{two}9 {call}")), (Assumed { threads: 1, ..none }, 0));
    // Both have mapped it, or none has.
    assert_eq!(assumed(&format!("{BRK}7 fork() = 8\n8 brk(0x6000) = 0x6000\n9 {call}")), (none, 1));
    assert_eq!(assumed(&format!("{two}9 munmap(0x7f0000090000, 4096) = 0\n")), (none, 1));
    // All processes have ended.
    let ended = format!("{BRK}7 exit_group(0) = ?\n9 {call}");
    assert_eq!(assumed(&ended), (Assumed { processes: 1, ..none }, 0));
    // A program begins by asking for its break, or by execve where the log has such calls.
    assert_eq!(assumed(&format!("{BRK}8 brk(NULL) = 0x9000\n")), (Assumed { processes: 1, ..none }, 0));
    assert_eq!(assumed(&format!("{BRK}7 brk(NULL) = 0x9000\n")), (Assumed { programs: 1, ..none }, 0));
    assert_eq!(assumed(&format!("{BRK}7 brk(NULL) = 0x5000\n")), (none, 0));
    let exec = "execve(\"x\", [\"x\"], 0x7f /* 1 var */) = 0\n";
    let started = format!("7 {exec}{BRK}8 brk(NULL) = 0x9000\n");
    assert_eq!(assumed(&started), (Assumed { threads: 1, ..none }, 0));
    assert_eq!(assumed(&format!("{BRK}8 {exec}")), (Assumed { processes: 1, ..none }, 0));
}

#[test]
fn numbers_of_a_container_are_those_outside() {
    let clone = "7 clone(child_stack=NULL, flags=CLONE_VM|CLONE_THREAD) = 2";
    let call = "8 munmap(0x7f0000000000, 4096) = 0\n";
    let said = format!("{BRK}{clone} /* 8 in strace's PID NS */\n{call}");
    let unsaid = format!("{BRK}{clone}\n{call}");
    assert_eq!(calls(&parse(&said)), calls(&parse(&unsaid)));
    assert_eq!(assumed(&said), (Assumed::default(), 0));
    assert_eq!(assumed(&unsaid), (Assumed { renamed: 1, ..Assumed::default() }, 0));
}

#[test]
fn numbers_say_what_names_say() {
    let text = |advice: &str| format!("{BRK}7 madvise(0x7f0000000000, 4096, {advice}) = 0\n");
    for (advice, expected) in [
        ("0x4", Advice::DontNeed),
        ("0x4 /* MADV_DONTNEED */", Advice::DontNeed),
        ("0x18", Advice::DontNeed),
        ("0x8", Advice::Free),
        ("0x66", Advice::GuardInstall),
        ("0x77", Advice::Other("0x77".to_owned())),
    ] {
        let trace = parse(&text(advice));
        let Some(MemoryCall::Madvise { advice, .. }) = trace.events.last().map(|event| &event.call) else {
            panic!("{trace:?}")
        };
        assert_eq!(*advice, expected);
    }
    for (clone, memory) in [
        ("clone(0x1200011, 0, 0, 0x7f0000000a10, 0)", ChildMemory::Copied),
        ("clone(0x3d0f00, 0x7f00, 0x7f00, 0x7f00, 0x7f00)", ChildMemory::Shared),
        ("clone(child_stack=0x7f00, flags=0x4111)", ChildMemory::Borrowed),
        ("clone3({flags=0x3d0f00, exit_signal=0}, 88)", ChildMemory::Shared),
    ] {
        let trace = parse(&format!("{BRK}7 {clone} = 8<x>\n"));
        assert_eq!(trace.events[2].call, MemoryCall::Clone { child: 8, memory }, "{clone}");
    }
}

#[test]
fn shared_memory_is_attached_where_its_size_is_known_and_counted_where_not() {
    let trace = parse(
        "shmget(IPC_PRIVATE, 10000, IPC_CREAT|0600) = 5\nshmat(5, NULL, SHM_RDONLY) = 0x7f0000000000\n\
         shmat(6, NULL, 0) = 0x7f0000010000\nshmdt(0x7f0000000000) = 0\nshmdt(0x7f0000010000) = 0\n\
         shmat(5, NULL, 0) = -1 ENOMEM (Cannot allocate memory)\nmlock(0x7f0000000000, 4096) = 0\n\
         mbind(0x7f0000000000, 4096, MPOL_BIND, [0x1], 64, 0) = 0\n\
         mbind(0x7f0000000000, 4096, MPOL_BIND, [0x1], 64, MPOL_MF_MOVE) = 0\n\
         userfaultfd(O_CLOEXEC) = 3\n",
    );
    let range = 0x7f00_0000_0000..0x7f00_0000_3000;
    let attach = MemoryCall::Mmap {
        range: range.clone(),
        prot: Prot { read: true, write: false, exec: false },
        sharing: Sharing::Shared,
        backing: Backing::Anonymous,
        placement: Placement::Free,
        other_flags: vec![],
    };
    assert_eq!(calls(&trace), [(0, attach), (0, MemoryCall::Munmap { range })]);
    let dropped = trace.dropped.iter().map(|(name, count)| (name.as_str(), *count)).collect::<Vec<_>>();
    assert_eq!(dropped, [("mbind", 1), ("mlock", 1), ("shmat", 1), ("shmdt", 1), ("userfaultfd", 1)]);
}
