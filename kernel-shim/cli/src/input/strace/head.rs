//! What stands before a call: the number of its thread, times, and what further options of `strace`
//! and the pasting of logs add.

use crate::input::strace::number::number32;

/// The largest number of a thread. Linux: PID_MAX_LIMIT. A larger number is a time in seconds.
const MOST_THREADS: u32 = 4 << 20;

/// A line without what stands before its call.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Head<'a> {
    /// The number of the thread, where the line carries one.
    pub(crate) thread: Option<u32>,
    /// The time of `-t`, `-tt` or `-ttt`, in microseconds.
    pub(crate) time_us: Option<u64>,
    /// Whether marks of quoting stood first, which are those of a stack, too.
    pub(crate) is_quoted: bool,
    pub(crate) rest: &'a str,
}

/// Takes off what stands before the call.
pub(crate) fn head(text: &str) -> Head<'_> {
    let unquoted = text.trim_start_matches([' ', '>', '|']);
    let is_quoted = text[..text.len() - unquoted.len()].contains('>');
    let mut head = Head { thread: None, time_us: None, is_quoted, rest: unquoted };
    loop {
        head.rest = head.rest.trim_ascii_start();
        if let Some((thread, rest)) = thread(head.rest).filter(|_| head.thread.is_none()) {
            head.thread = Some(thread);
            head.rest = rest;
        } else if let Some((time_us, rest)) = time(head.rest) {
            head.time_us = head.time_us.or(time_us);
            head.rest = rest;
        } else if let Some(rest) = bracket(head.rest) {
            head.rest = rest;
        } else {
            head.rest = head.rest.trim_ascii_end();
            return head;
        }
    }
}

/// `[pid N] ` or `N `, with the name of the program behind N (`-Y`).
fn thread(text: &str) -> Option<(u32, &str)> {
    let bracketed = text.strip_prefix("[pid").map(str::trim_ascii_start);
    let rest = bracketed.unwrap_or(text);
    let (digits, mut rest) = rest.split_at(rest.find(|char: char| !char.is_ascii_digit())?);
    if let Some(named) = rest.strip_prefix('<') {
        let closing = if bracketed.is_some() { ">]" } else { "> " };
        rest = &named[named.find(closing)? + 1..];
    }
    let rest = if bracketed.is_some() { rest.trim_ascii_start().strip_prefix(']')? } else { rest };
    let thread = number32(digits).filter(|&thread| thread > 0 && thread <= MOST_THREADS)?;
    rest.starts_with(' ').then_some((thread, rest))
}

/// A time of day, or seconds; `(+ 0.000123)` of `-r` says nothing new.
fn time(text: &str) -> Option<(Option<u64>, &str)> {
    if let Some(rest) = text.strip_prefix("(+") {
        let (seconds, rest) = rest.split_once(')')?;
        return number_of_seconds(seconds.trim_ascii()).map(|_| (None, rest));
    }
    let (word, rest) = text.split_once(' ')?;
    let mut parts = word.rsplit(':');
    let mut time_us = number_of_seconds(parts.next()?)?;
    for (part, seconds) in parts.zip([60, 3600]) {
        time_us = time_us.checked_add(u64::from(number32(part)?) * seconds * 1_000_000)?;
    }
    // `-r` alone prints small numbers, and times between lines.
    let is_absolute = word.contains(':') || time_us >= u64::from(MOST_THREADS) * 1_000_000;
    Some((is_absolute.then_some(time_us), rest))
}

/// Microseconds of `12`, `12.3` or `12.345678901`.
fn number_of_seconds(text: &str) -> Option<u64> {
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if seconds.is_empty() || seconds.len() > 12 || !digits(seconds) || !digits(fraction) {
        return None;
    }
    let micros = format!("{fraction:0<6}")[..6].parse::<u64>().ok()?;
    Some(seconds.parse::<u64>().ok()? * 1_000_000 + micros)
}

/// `[00007f8e1c2b3d4a] ` of `-i`, `[  59] ` of `-n`, `[user:role:type] ` of `--secontext`.
fn bracket(text: &str) -> Option<&str> {
    let (inside, rest) = text.strip_prefix('[')?.split_once(']')?;
    let inside = inside.trim_ascii();
    let all = |is: fn(&u8) -> bool| !inside.is_empty() && inside.bytes().all(|byte| is(&byte));
    let is_known = all(u8::is_ascii_hexdigit)
        || all(|&byte| byte == b'?')
        || (inside.contains(':') && all(|&byte| byte.is_ascii_graphic()));
    (is_known && rest.starts_with(' ')).then_some(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_column_that_an_option_adds_is_taken_off() {
        const AT_NOON: Option<u64> = Some(12 * 3600 * 1_000_000);
        for (text, thread, time_us) in [
            ("brk(NULL) = 0", None, None),
            ("17 brk(NULL) = 0", Some(17), None),
            ("17    brk(NULL) = 0", Some(17), None),
            ("[pid    17] brk(NULL) = 0", Some(17), None),
            ("[pid 17<a] b>] brk(NULL) = 0", Some(17), None),
            ("17<kworker/0:1 x> brk(NULL) = 0", Some(17), None),
            ("12:00:00 brk(NULL) = 0", None, AT_NOON),
            ("17 12:00:00.000000 brk(NULL) = 0", Some(17), AT_NOON),
            ("17 12:00:00.000000 (+     0.000021) brk(NULL) = 0", Some(17), AT_NOON),
            ("17 1700000000.123456 brk(NULL) = 0", Some(17), Some(1_700_000_000_123_456)),
            ("1700000000 brk(NULL) = 0", None, Some(1_700_000_000_000_000)),
            ("[pid 17]      0.000321 brk(NULL) = 0", Some(17), None),
            ("     0.000321 brk(NULL) = 0", None, None),
            ("[00007f8e1c2b3d4a] brk(NULL) = 0", None, None),
            ("17 [????????????????] brk(NULL) = 0", Some(17), None),
            ("17 12:00:00 [  12] [00007f8e1c2b3d4a] brk(NULL) = 0", Some(17), AT_NOON),
            ("17 [system_u:system_r:init_t:s0] brk(NULL) = 0", Some(17), None),
            ("  > > [pid 17] brk(NULL) = 0  ", Some(17), None),
            ("| 17 brk(NULL) = 0", Some(17), None),
        ] {
            let head = head(text);
            assert_eq!((head.thread, head.time_us, head.rest), (thread, time_us, "brk(NULL) = 0"), "{text}");
            assert_eq!(head.is_quoted, text.starts_with("  >"));
        }
    }
}
