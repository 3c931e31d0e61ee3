//! One line of an `strace` log, taken apart: who, and what kind of line.

use crate::input::strace::head::{Head, head};
use crate::input::strace::names::{MEMORY_CALLS, is_dropped_call, is_memory_call};
use crate::input::strace::number::number32;

/// What a line says, before anybody looks at the arguments.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Line<'a> {
    /// `NAME(ARGUMENTS) = RESULT`, where the text starts at NAME; the end may be missing.
    Call(&'a str),
    /// `NAME(ARGUMENTS <unfinished ...>` or `<detached ...>`, the text without the mark.
    Unfinished(&'a str),
    /// `<... NAME resumed>REST`.
    Resumed { name: &'a str, rest: &'a str },
    /// `+++ exited with N +++` or `+++ killed by SIGNAL +++`.
    Ended,
    /// `+++ superseded by execve in pid N +++`: thread N goes on under this thread's number.
    Superseded { by: u32 },
    /// `strace: Process N attached`; the text before it, where it was written into another line.
    Attached { thread: u32, before: &'a str },
    /// Another remark of strace that was written into a line; the text before it.
    Cut { before: &'a str },
    /// A signal, a stop, a frame of a stack, a row of `-C`, a remark of strace, or nothing.
    Remark,
    /// Nothing strace writes: what the program has printed, or who pasted the log.
    Unknown(&'a str),
}

/// A line with what stands before its call taken off.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Parsed<'a> {
    pub(crate) thread: Option<u32>,
    pub(crate) time_us: Option<u64>,
    pub(crate) line: Line<'a>,
    /// Whether the line starts with something that is not strace's: output without an end of line.
    pub(crate) is_behind_output: bool,
}

/// Takes a line apart that holds no characters a terminal obeys.
pub(crate) fn line(text: &str) -> Parsed<'_> {
    let Head { thread, time_us, is_quoted, rest } = head(text);
    let is_remark = (is_quoted && is_frame(rest)) || is_summary(text);
    let line = if is_remark { Line::Remark } else { classify(rest) };
    let parsed = Parsed { thread, time_us, line, is_behind_output: false };
    match parsed.line {
        Line::Unknown(_) => behind_output(text).unwrap_or(parsed),
        // Either its end is missing, or it is output that looks like a call.
        Line::Call(text_of_call) if !is_known(text_of_call) && call(text_of_call).is_none() => {
            behind_output(text).unwrap_or(parsed)
        }
        Line::Call(call) | Line::Unfinished(call) if !is_name_of_call(call) => {
            behind_output(text).unwrap_or(parsed)
        }
        _ => parsed,
    }
}

/// ` > FILE(FUNCTION+0x32) [0xf8ee2]`, as `-k` prints it below a call.
fn is_frame(text: &str) -> bool {
    let file = text.split(" [0x").next().unwrap_or(text);
    file.len() < text.len() && !file.contains(") = ")
}

fn classify(text: &str) -> Line<'_> {
    if text.is_empty() || text.starts_with("--- ") || is_ellipsis(text) {
        return Line::Remark;
    }
    if let Some((before, thread)) = attached(text) {
        return Line::Attached { thread, before };
    }
    if let Some(before) = before_remark(text) {
        return if before.is_empty() { Line::Remark } else { Line::Cut { before } };
    }
    if let Some(rest) = text.strip_prefix("+++ ") {
        if let Some(rest) = rest.strip_prefix("superseded by execve in pid ") {
            let by = rest.strip_suffix(" +++").and_then(number32);
            return by.map_or(Line::Unknown(text), |by| Line::Superseded { by });
        }
        let known =
            rest.ends_with(" +++") && (rest.starts_with("exited with ") || rest.starts_with("killed by "));
        return if known { Line::Ended } else { Line::Unknown(text) };
    }
    if let Some((name, rest)) = text.strip_prefix("<... ").and_then(|rest| rest.split_once(" resumed>")) {
        return Line::Resumed { name, rest };
    }
    if !text.split_once('(').is_some_and(|(name, _)| is_name(name)) {
        return Line::Unknown(text);
    }
    match without_end_mark(text) {
        Some(call) => Line::Unfinished(call),
        None => Line::Call(text),
    }
}

/// The text before a mark that says that the call has not returned.
pub(crate) fn without_end_mark(text: &str) -> Option<&str> {
    ["<unfinished ...>", "<detached ...>"].into_iter().find_map(|mark| text.strip_suffix(mark))
}

fn is_ellipsis(text: &str) -> bool {
    let inside = text.trim_start_matches(['[', '(']).trim_end_matches([']', ')']);
    inside.len() >= 2 && inside.bytes().all(|byte| byte == b'.') || inside == "snip"
}

/// A row of the table that `-C` prints at the end, or its frame.
fn is_summary(text: &str) -> bool {
    let text = text.trim_ascii();
    if text.starts_with("% time ") || text.starts_with("System call usage summary") {
        return true;
    }
    let mut words = text.split_ascii_whitespace().rev();
    let name = words.next().unwrap_or_default();
    let is_number = |word: &str| {
        word.len() > 3 && word.bytes().all(|byte| byte == b'-')
            || word.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.')
    };
    let numbers = words.clone().count();
    (3..=5).contains(&numbers)
        && !text.starts_with(|char: char| char.is_ascii_digit() && !text.contains('.'))
        && words.all(is_number)
        && (is_name(name) || is_number(name))
}

/// `strace: Process N attached`, and what older versions said.
fn attached(text: &str) -> Option<(&str, u32)> {
    let (before, rest) = text.rsplit_once("Process ")?;
    let (digits, rest) = rest.split_once(" attached")?;
    let is_end = ["", " (waiting for parent)", " - interrupt to quit"].contains(&rest)
        || (rest.starts_with(" with ") && rest.ends_with("threads"))
        || rest.starts_with(" in ");
    let thread = number32(digits).filter(|_| is_end)?;
    Some((before.strip_suffix("strace: ").unwrap_or(before), thread))
}

/// What stands before a remark of strace that goes to the end of the line.
fn before_remark(text: &str) -> Option<&str> {
    if text.starts_with("strace: ") {
        return Some("");
    }
    let at = [text.rfind("strace: "), text.rfind("[ Process PID="), text.rfind("Process ")];
    at.into_iter().flatten().find_map(|at| {
        let (before, remark) = text.split_at(at);
        let remark = remark.strip_prefix("strace: ").unwrap_or(remark);
        let remark = remark.strip_prefix("Process ").or_else(|| remark.strip_prefix("[ Process PID="))?;
        let (digits, rest) = remark.split_at(remark.find(|char: char| !char.is_ascii_digit())?);
        let known = [" detached", " suspended", " resumed (", " runs in "];
        let is_known = !digits.is_empty() && known.iter().any(|start| rest.starts_with(start));
        // As in `write(1, "Process 7 detached"...`.
        let is_text = rest.contains('"');
        let before = before.strip_suffix("strace: ").unwrap_or(before);
        (is_known && !is_text).then(|| before.trim_ascii_end().trim_end_matches("^C"))
    })
}

/// A line of strace behind output of the program that did not end its line.
fn behind_output(text: &str) -> Option<Parsed<'_>> {
    let starts = [text.find("[pid "), text.find("+++ exited with "), text.find("+++ killed by ")];
    let glued = starts.into_iter().flatten().filter(|&at| at > 0).find_map(|at| {
        let Head { thread, time_us, rest, .. } = head(&text[at..]);
        let line = classify(rest);
        (!matches!(line, Line::Unknown(_) | Line::Remark)).then_some((thread, time_us, line))
    });
    let (thread, time_us, line) = glued.or_else(|| Some((None, None, glued_call(text)?)))?;
    Some(Parsed { thread, time_us, line, is_behind_output: true })
}

/// The first whole memory call that some text ends with.
fn glued_call(text: &str) -> Option<Line<'_>> {
    const SEARCHED: usize = 8;
    text.match_indices('(').take(SEARCHED).find_map(|(open, _)| {
        let before = &text[..open];
        let name =
            MEMORY_CALLS.iter().filter(|name| before.ends_with(*name)).max_by_key(|name| name.len())?;
        let start = &text[open - name.len()..];
        match without_end_mark(start) {
            Some(call) => Some(Line::Unfinished(call)),
            None => call(start).map(|_| Line::Call(start)),
        }
    })
}

/// Whether the name is that of a call, as far as this can be told: a name that ends with that of a
/// memory call, and is none, has output in front of it.
fn is_name_of_call(text: &str) -> bool {
    let name = text.split_once('(').map_or("", |(name, _)| name);
    is_known(text) || !MEMORY_CALLS.iter().any(|known| name.ends_with(known))
}

fn is_known(text: &str) -> bool {
    let name = text.split_once('(').map_or("", |(name, _)| name);
    is_memory_call(name) || is_dropped_call(name)
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'?')
}

/// The end of a call whose start stands above: what follows the last `)` that a result follows.
pub(crate) fn end_of_call(text: &str) -> Option<(&str, &str)> {
    let (at, _) = text.rmatch_indices(')').find(|(at, _)| {
        let result = text[at + 1..].trim_ascii_start().strip_prefix("= ");
        result.is_some_and(|result| {
            result.starts_with(|char: char| char == '?' || char == '-' || char.is_ascii_digit())
        })
    })?;
    Some(text.split_at(at))
}

/// A call with its arguments apart.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Call<'a> {
    pub(crate) name: &'a str,
    pub(crate) arguments: Vec<&'a str>,
    pub(crate) result: &'a str,
}

/// Splits `NAME(ARGUMENT, ARGUMENT) = RESULT`; none where quotes or brackets do not match, or the
/// result is missing.
pub(crate) fn call(text: &str) -> Option<Call<'_>> {
    let (name, rest) = text.split_once('(')?;
    let (arguments, rest) = list(rest, ')')?;
    let result = rest.trim_ascii_start().strip_prefix('=')?.trim_ascii();
    (!result.is_empty()).then_some(Call { name, arguments, result })
}

/// Splits what stands before the closing bracket at commas, and returns what follows the bracket.
pub(crate) fn list(text: &str, closing: char) -> Option<(Vec<&str>, &str)> {
    let mut items = Vec::new();
    let mut open = vec![closing];
    let mut item_start = 0;
    let mut chars = text.char_indices();
    while let Some((at, char)) = chars.next() {
        match char {
            '"' => skip_string(&mut chars)?,
            '(' => open.push(')'),
            '[' => open.push(']'),
            '{' => open.push('}'),
            ')' | ']' | '}' => {
                if open.pop() != Some(char) {
                    return None;
                }
                if open.is_empty() {
                    let last = text[item_start..at].trim_ascii();
                    if !(items.is_empty() && last.is_empty()) {
                        items.push(last);
                    }
                    return Some((items, &text[at + char.len_utf8()..]));
                }
            }
            ',' if open.len() == 1 => {
                items.push(text[item_start..at].trim_ascii());
                item_start = at + 1;
            }
            // As in `21<<MAP_HUGE_SHIFT`.
            '<' if text[at..].starts_with("<<") => skip_to(&mut chars, |_, _| true)?,
            // What `-y` prints after a file descriptor.
            '<' => skip_to(&mut chars, |_, char| char == '>')?,
            // strace explains numbers it has no name for.
            '/' if text[at..].starts_with("/*") => {
                let length = text[at..].find("*/")?;
                skip_to(&mut chars, |inner, _| inner > at + length)?;
            }
            _ => {}
        }
    }
    None
}

/// To the first character that `is_last` accepts, and over it.
fn skip_to(chars: &mut core::str::CharIndices<'_>, is_last: impl Fn(usize, char) -> bool) -> Option<()> {
    chars.find(|&(at, char)| is_last(at, char)).map(|_| ())
}

/// To the closing quote, over escaped ones.
fn skip_string(chars: &mut core::str::CharIndices<'_>) -> Option<()> {
    loop {
        match chars.next()?.1 {
            '"' => return Some(()),
            '\\' => skip_to(chars, |_, _| true)?,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_line_is_told_apart() {
        let line = |text| line(text).line;
        assert_eq!(line("7 mmap(NULL, 1 <unfinished ...>"), Line::Unfinished("mmap(NULL, 1 "));
        assert_eq!(line("7 poll([{fd=3}], 1, -1 <detached ...>"), Line::Unfinished("poll([{fd=3}], 1, -1 "));
        let rest = ") = 0x1000";
        assert_eq!(line("7 <... mmap resumed>) = 0x1000"), Line::Resumed { name: "mmap", rest });
        assert_eq!(line("7 +++ exited with 0 +++"), Line::Ended);
        assert_eq!(line("7 +++ killed by SIGSEGV (core dumped) +++"), Line::Ended);
        assert_eq!(line("7 +++ superseded by execve in pid 8 +++"), Line::Superseded { by: 8 });
        for text in [
            "",
            "  ",
            "...",
            "[...]",
            "7 --- SIGCHLD {si_signo=SIGCHLD} ---",
            "strace: Process 9 detached",
            "Process 9 detached",
            "Process 9 suspended",
            "Process 9 resumed (parent 8 ready)",
            "[ Process PID=9 runs in 32 bit mode. ]",
            "strace: [ Process PID=9 runs in x32 mode. ]",
            "strace: Can't stat 'x': No such file or directory",
            " > /usr/lib/libc.so.6(__mmap+0x32) [0xf8ee2]",
            " > python3.12(PyObject_Malloc+0x1) [0x12]",
            "> > unexpected_backtracing_error [0x0]",
            "% time     seconds  usecs/call     calls    errors syscall",
            "------ ----------- ----------- --------- --------- ----------------",
            " 24.14    0.000070          10         7           mmap",
            " 12.00    0.000030          10         3         1 openat",
            "100.00    0.000290                    55         1 total",
        ] {
            assert_eq!(line(text), Line::Remark, "{text}");
        }
        for (text, thread, before) in [
            ("strace: Process 9 attached", 9, ""),
            ("Process 9 attached", 9, ""),
            ("Process 9 attached - interrupt to quit", 9, ""),
            ("Process 9 attached (waiting for parent)", 9, ""),
            ("strace: Process 9 attached with 4 threads", 9, ""),
            ("vfork(strace: Process 9 attached", 9, "vfork("),
            ("wait4(-1, Process 9 attached", 9, "wait4(-1, "),
        ] {
            assert_eq!(line(text), Line::Attached { thread, before }, "{text}");
        }
        assert_eq!(
            line("nanosleep({}, ^Cstrace: Process 9 detached"),
            Line::Cut { before: "nanosleep({}, " }
        );
        assert_eq!(
            line("execve(\"a\"[ Process PID=9 runs in 64 bit mode. ]"),
            Line::Cut { before: "execve(\"a\"" }
        );
        for text in ["hello, world", "$ strace -f ./a", "12 monkeys", "7 +++ what +++", "two)"] {
            assert!(matches!(line(text), Line::Unknown(_)), "{text}");
        }
        let text = "write(1, \"Process 9 attached\", 18) = 18";
        assert_eq!(line(text), Line::Call(text));
    }

    #[test]
    fn a_call_behind_output_is_found() {
        for (text, thread, expected) in [
            ("onemunmap(0x1000, 4096) = 0", None, Line::Call("munmap(0x1000, 4096) = 0")),
            ("50% ..munmap(0x1000, 4096) = 0", None, Line::Call("munmap(0x1000, 4096) = 0")),
            ("one[pid 7] brk(NULL) = 0", Some(7), Line::Call("brk(NULL) = 0")),
            ("one+++ exited with 0 +++", None, Line::Ended),
            ("a(b) exit_group(0) = ?", None, Line::Call("exit_group(0) = ?")),
            ("xmmap(NULL, 1 <unfinished ...>", None, Line::Unfinished("mmap(NULL, 1 ")),
        ] {
            let parsed = line(text);
            assert!(parsed.is_behind_output, "{text}");
            assert_eq!((parsed.thread, parsed.line), (thread, expected), "{text}");
        }
        for text in ["vfork() = 7", "pkey_mprotect(0x1000, 4096, 0, 1) = 0", "process_madvise(3) = 0"] {
            let parsed = line(text);
            assert_eq!((parsed.is_behind_output, parsed.line), (false, Line::Call(text)));
        }
        assert_eq!(end_of_call("two)            = 7"), Some(("two", ")            = 7")));
        assert_eq!(end_of_call("two) = x"), None);
    }

    #[test]
    fn commas_and_brackets_inside_strings_structures_and_file_names_do_not_split() {
        let text = r#"execve("/bin/a, b)", ["a", "\"(,"], 0x7f /* 3 vars, ) */) = -1 ENOENT (No such file)"#;
        let call = call(text).expect("a whole call");
        assert_eq!(call.name, "execve");
        assert_eq!(call.arguments, [r#""/bin/a, b)""#, r#"["a", "\"(,"]"#, "0x7f /* 3 vars, ) */"]);
        assert_eq!(call.result, "-1 ENOENT (No such file)");
        let call = super::call("mmap(NULL, 1, 3</lib/a,(b>, 0) = 0x1").expect("a whole call");
        assert_eq!(call.arguments, ["NULL", "1", "3</lib/a,(b>", "0"]);
        let call =
            super::call("mmap(NULL, 1, MAP_HUGETLB|21<<MAP_HUGE_SHIFT, 0) = 0x1").expect("a whole call");
        assert_eq!(call.arguments, ["NULL", "1", "MAP_HUGETLB|21<<MAP_HUGE_SHIFT", "0"]);
        assert_eq!(super::call("vfork() = 5").map(|call| call.arguments), Some(vec![]));
    }

    #[test]
    fn a_call_that_lost_its_end_is_no_call() {
        for text in [
            "mmap(NULL, 1",
            "mmap(NULL, 1)",
            "mmap(NULL, 1) =",
            "mmap(\"a) = 1",
            "mmap(NULL]) = 1",
            "f(3</a) = 1",
        ] {
            assert_eq!(call(text), None, "{text}");
        }
    }
}
