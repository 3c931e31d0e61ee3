//! Text of an input as it is shown to a person: on one line, without characters that a terminal
//! would obey.

use std::io::{self, Write};

use serde::Serialize;

/// Characters of a name that a table has room for.
const LABEL_CHARS: usize = 48;

/// The text with every control character escaped, line ends among them, and every one that turns
/// the direction of what follows.
#[must_use]
pub(crate) fn escaped(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for char in text.chars() {
        if is_obeyed(char) { shown.extend(char.escape_unicode()) } else { shown.push(char) }
    }
    shown
}

/// As [`escaped`], and short enough for a column.
#[must_use]
pub(crate) fn label(name: &str) -> String {
    let cut = name.char_indices().nth(LABEL_CHARS).map(|(at, _)| at);
    let shown = escaped(&name[..cut.unwrap_or(name.len())]);
    if cut.is_some() { shown + "..." } else { shown }
}

/// As [`escaped`], but line ends stay: for texts that have several lines.
#[must_use]
pub(crate) fn escaped_lines(text: &str) -> String {
    text.lines().map(escaped).collect::<Vec<_>>().join("\n")
}

/// The rest of a line as an error shows it: cut short, and in words where it is empty.
pub(crate) fn excerpt(rest: &str) -> String {
    const SHOWN_CHARS: usize = 60;
    match rest.char_indices().nth(SHOWN_CHARS) {
        _ if rest.is_empty() => "the end of the line".to_owned(),
        None => format!("`{}`", escaped(rest)),
        Some((cut, _)) => format!("`{}...`", escaped(&rest[..cut])),
    }
}

/// Writes a value as one line of JSON. Control characters that JSON allows as they are, are escaped
/// as well.
///
/// # Errors
/// What `out` returns.
pub(crate) fn write_json(out: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_string(value)?;
    // In JSON, such characters stand in strings only.
    for part in text.split_inclusive(is_obeyed) {
        let plain = part.trim_end_matches(is_obeyed);
        out.write_all(plain.as_bytes())?;
        for char in part[plain.len()..].chars() {
            write!(out, "\\u{:04x}", u32::from(char))?;
        }
    }
    writeln!(out)?;
    out.flush()
}

fn is_obeyed(char: char) -> bool {
    let turns = matches!(char, '\u{061c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    char.is_control() || turns || matches!(char, '\u{2028}' | '\u{2029}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_terminal_obeys_is_left() {
        let bad = "a\nclean: \r\t\u{1b}[2K\u{7f}\u{9b}1A\u{202e}\u{2028}é";
        let shown = escaped(bad);
        assert_eq!(shown, "a\\u{a}clean: \\u{d}\\u{9}\\u{1b}[2K\\u{7f}\\u{9b}1A\\u{202e}\\u{2028}é");
        let mut json = Vec::new();
        write_json(&mut json, &bad).expect("memory takes it");
        let json = String::from_utf8(json).expect("UTF-8");
        assert!(!json.trim_end().contains(is_obeyed), "{json:?}");
        assert_eq!(serde_json::from_str::<String>(&json).expect("JSON"), bad);
    }

    #[test]
    fn a_label_is_short_whatever_the_name() {
        assert_eq!(label("redis-server"), "redis-server");
        assert_eq!(label(&"é".repeat(70_000)).chars().count(), LABEL_CHARS + 3);
        assert_eq!(escaped_lines("a\u{7}\nb"), "a\\u{7}\nb");
    }
}
