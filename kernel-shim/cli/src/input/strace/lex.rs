//! One line of an `strace` log, taken apart: who, and what kind of line.

/// What a line says, before anybody looks at the arguments.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Line<'a> {
    /// `NAME(ARGUMENTS) = RESULT`, where the text starts at NAME.
    Call(&'a str),
    /// `NAME(ARGUMENTS <unfinished ...>`, the text without the mark.
    Unfinished(&'a str),
    /// `<... NAME resumed>REST`.
    Resumed { name: &'a str, rest: &'a str },
    /// `+++ exited with N +++` or `+++ killed by SIGNAL +++`.
    Ended,
    /// `+++ superseded by execve in pid N +++`: thread N goes on under this thread's number.
    Superseded { by: u32 },
    /// `strace: Process N attached`; the text before it, where it was written into another line.
    Attached { thread: u32, before: &'a str },
    /// A signal, a stop, or a remark of strace.
    Remark,
    /// Nothing strace writes.
    Unknown,
}

/// Splits a line into the number of its thread, where it carries one, and the rest without time
/// stamps.
pub(crate) fn line(text: &str) -> (Option<u32>, Line<'_>) {
    let (thread, rest) = prefix(text);
    (thread, classify(without_time(rest).trim_ascii()))
}

/// `[pid N] ` or `N `.
fn prefix(text: &str) -> (Option<u32>, &str) {
    let bracketed = text.strip_prefix("[pid").and_then(|rest| rest.trim_ascii_start().split_once(']'));
    let plain = text.split_once(' ');
    for (digits, rest) in [bracketed, plain].into_iter().flatten() {
        if let Some(thread) = number32(digits) {
            return (Some(thread), rest.trim_ascii_start());
        }
    }
    (None, text)
}

/// Drops the columns of `-t`, `-tt`, `-ttt` and `-r`.
fn without_time(text: &str) -> &str {
    let mut rest = text;
    while let Some((word, after)) = rest.trim_ascii_start().split_once(' ') {
        let is_time = word.contains([':', '.'])
            && word.starts_with(|first: char| first.is_ascii_digit())
            && word.bytes().all(|byte| byte.is_ascii_digit() || byte == b':' || byte == b'.');
        if !is_time {
            break;
        }
        rest = after;
    }
    rest
}

fn classify(text: &str) -> Line<'_> {
    if let Some((before, thread)) = attached(text) {
        return Line::Attached { thread, before };
    }
    if text.is_empty() || text.starts_with("--- ") || text.starts_with("strace: ") {
        return Line::Remark;
    }
    if let Some(rest) = text.strip_prefix("+++ ") {
        if let Some(rest) = rest.strip_prefix("superseded by execve in pid ") {
            return rest
                .strip_suffix(" +++")
                .and_then(number32)
                .map_or(Line::Unknown, |by| Line::Superseded { by });
        }
        let known =
            rest.ends_with(" +++") && (rest.starts_with("exited with ") || rest.starts_with("killed by "));
        return if known { Line::Ended } else { Line::Unknown };
    }
    if let Some((name, rest)) = text.strip_prefix("<... ").and_then(|rest| rest.split_once(" resumed>")) {
        return Line::Resumed { name, rest };
    }
    if !text.split_once('(').is_some_and(|(name, _)| is_name(name)) {
        return Line::Unknown;
    }
    match text.strip_suffix("<unfinished ...>") {
        Some(call) => Line::Unfinished(call),
        None => Line::Call(text),
    }
}

fn attached(text: &str) -> Option<(&str, u32)> {
    let (before, rest) = text.rsplit_once("strace: Process ")?;
    Some((before, number32(rest.strip_suffix(" attached")?)?))
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'?')
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

/// `NULL`, `0x...` or decimal digits, with nothing else but a remark behind a space.
pub(crate) fn number(text: &str) -> Option<u64> {
    let word = text.split_once(' ').map_or(text, |(word, _)| word);
    if word == "NULL" {
        return Some(0);
    }
    let (digits, radix) = word.strip_prefix("0x").map_or((word, 10), |digits| (digits, 16));
    // `from_str_radix` alone would take a sign.
    let digits_only = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    digits_only.then(|| u64::from_str_radix(digits, radix).ok())?
}

/// A thread's number: decimal digits.
pub(crate) fn number32(text: &str) -> Option<u32> {
    number(text)
        .filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()))
        .and_then(|number| u32::try_from(number).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_prefix_strace_can_write_is_removed() {
        let call = Line::Call("brk(NULL) = 0");
        for (text, thread) in [
            ("brk(NULL) = 0", None),
            ("17 brk(NULL) = 0", Some(17)),
            ("17    brk(NULL) = 0", Some(17)),
            ("[pid    17] brk(NULL) = 0", Some(17)),
            ("12:34:56 brk(NULL) = 0", None),
            ("17 12:34:56.123456 brk(NULL) = 0", Some(17)),
            ("17 1700000000.123456 brk(NULL) = 0", Some(17)),
            ("[pid 17]      0.000321 brk(NULL) = 0", Some(17)),
        ] {
            assert_eq!(line(text), (thread, Line::Call("brk(NULL) = 0")), "{text}");
        }
        assert_eq!(line("17 brk(NULL) = 0").1, call);
    }

    #[test]
    fn each_kind_of_line_is_told_apart() {
        assert_eq!(line("7 mmap(NULL, 1 <unfinished ...>").1, Line::Unfinished("mmap(NULL, 1 "));
        assert_eq!(
            line("7 <... mmap resumed>) = 0x1000").1,
            Line::Resumed { name: "mmap", rest: ") = 0x1000" }
        );
        assert_eq!(line("7 +++ exited with 0 +++").1, Line::Ended);
        assert_eq!(line("7 +++ killed by SIGKILL +++").1, Line::Ended);
        assert_eq!(line("7 +++ superseded by execve in pid 8 +++").1, Line::Superseded { by: 8 });
        assert_eq!(line("7 --- SIGCHLD {si_signo=SIGCHLD} ---").1, Line::Remark);
        assert_eq!(line("strace: Process 9 attached").1, Line::Attached { thread: 9, before: "" });
        assert_eq!(
            line("vfork(strace: Process 9 attached").1,
            Line::Attached { thread: 9, before: "vfork(" }
        );
        assert_eq!(line("hello, world").1, Line::Unknown);
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

    #[test]
    fn numbers_have_no_sign_and_do_not_wrap() {
        assert_eq!(number("NULL"), Some(0));
        assert_eq!(number("0x10 /* sixteen */"), Some(16));
        for text in ["", "0x", "-1", "+1", "18446744073709551616", "ff"] {
            assert_eq!(number(text), None, "{text}");
        }
    }
}
