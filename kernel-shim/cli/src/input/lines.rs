//! A text line by line, with bounded memory: whatever bytes it has, and wherever it ends.

use std::borrow::Cow;
use std::io::{self, BufRead, Read as _};

/// Bytes of a line that are kept. `strace -s` prints strings of any length; what is read from a
/// line stands in far fewer.
const KEPT_BYTES: usize = 1 << 20;
/// Bytes after which a line is none: the input is a device, or an image of something.
const MOST_LINE_BYTES: u64 = 64 << 20;
/// Lines of one input. More cannot be told from an input that never ends.
const MOST_LINES: usize = 50_000_000;

/// Why there is no next line.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LineError {
    /// The file cannot be read on.
    #[error("cannot be read: {0}")]
    Read(#[from] io::Error),
    /// No end of the line is near.
    #[error("expected a line of text, found more than {} MiB without an end of line", MOST_LINE_BYTES >> 20)]
    Endless,
    /// No end of the file is near.
    #[error("expected at most {MOST_LINES} lines")]
    TooMany,
}

/// The lines of an input.
#[derive(Debug)]
pub(crate) struct BoundedLines<R> {
    input: R,
    bytes: Vec<u8>,
    /// The number of the line that was read last, from 1.
    pub(crate) number: usize,
}

impl<R: BufRead> BoundedLines<R> {
    pub(crate) const fn new(input: R) -> Self {
        Self { input, bytes: Vec::new(), number: 0 }
    }

    /// The next line without its end, as text: bytes that are none are replaced, and a line longer
    /// than [`KEPT_BYTES`] loses its end.
    pub(crate) fn next_line(&mut self) -> Result<Option<String>, LineError> {
        self.bytes.clear();
        let mut limited = (&mut self.input).take(KEPT_BYTES as u64);
        if limited.read_until(b'\n', &mut self.bytes)? == 0 {
            return Ok(None);
        }
        self.number += 1;
        if self.number > MOST_LINES {
            return Err(LineError::TooMany);
        }
        if self.bytes.len() == KEPT_BYTES && self.bytes.last() != Some(&b'\n') {
            self.skip_line()?;
        }
        while self.bytes.last().is_some_and(|byte| matches!(byte, b'\n' | b'\r')) {
            self.bytes.pop();
        }
        Ok(Some(String::from_utf8_lossy(&self.bytes).into_owned()))
    }

    fn skip_line(&mut self) -> Result<(), LineError> {
        let mut left = MOST_LINE_BYTES;
        loop {
            let buffer = self.input.fill_buf()?;
            if buffer.is_empty() {
                return Ok(());
            }
            let end = buffer.iter().position(|&byte| byte == b'\n');
            let taken = end.map_or(buffer.len(), |end| end + 1);
            self.input.consume(taken);
            if end.is_some() {
                return Ok(());
            }
            left = left.checked_sub(taken as u64).ok_or(LineError::Endless)?;
        }
    }
}

/// The line without colours and other characters that a terminal obeys, and with the plain forms of
/// what a web page makes of quotes, spaces and dots.
pub(crate) fn plain(line: &str) -> Cow<'_, str> {
    let is_plain = |char: char| char == ' ' || char.is_ascii_graphic();
    if line.chars().all(is_plain) {
        return Cow::Borrowed(line);
    }
    let mut plain = String::with_capacity(line.len());
    let mut chars = line.chars().peekable();
    while let Some(char) = chars.next() {
        match char {
            '\u{1b}' => {
                if chars.next_if_eq(&'[').is_some() {
                    // The parameters of the sequence, and its last letter.
                    while chars.next_if(|char| !('\u{40}'..='\u{7e}').contains(char)).is_some() {}
                    chars.next();
                } else {
                    chars.next();
                }
            }
            '\t' | '\u{a0}' => plain.push(' '),
            '\u{201c}' | '\u{201d}' => plain.push('"'),
            '\u{2026}' => plain.push_str("..."),
            '\u{feff}' => {}
            char if char.is_control() => {}
            char => plain.push(char),
        }
    }
    Cow::Owned(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(bytes: &[u8]) -> Vec<String> {
        let mut lines = BoundedLines::new(bytes);
        core::iter::from_fn(|| lines.next_line().expect("memory can be read")).collect()
    }

    #[test]
    fn any_bytes_are_lines() {
        assert_eq!(lines(b"a\r\nb\xff\n\nc"), ["a", "b\u{fffd}", "", "c"]);
        assert_eq!(lines(b""), Vec::<String>::new());
    }

    #[test]
    fn a_long_line_is_cut_and_the_next_one_is_whole() {
        let mut text = vec![b'x'; 3 * KEPT_BYTES];
        text.extend(b"\nnext\n");
        let lines = lines(&text);
        assert_eq!((lines.len(), lines[0].len(), lines[1].as_str()), (2, KEPT_BYTES, "next"));
    }

    #[test]
    fn a_line_without_an_end_is_an_error() {
        let mut lines = BoundedLines::new(io::BufReader::new(io::repeat(0)));
        assert!(matches!(lines.next_line(), Err(LineError::Endless)));
    }

    #[test]
    fn colours_and_what_web_pages_make_of_a_log_are_undone() {
        let line = "\u{1b}[1;31m17\u{1b}[0m\tbrk(\u{201c}x\u{201d})\u{a0}\u{2026}\u{7}\r\u{1b}c";
        assert_eq!(plain(line), "17 brk(\"x\") ...");
        assert!(matches!(plain("17 brk(NULL) = 0"), Cow::Borrowed(_)));
        assert_eq!(plain("\u{1b}"), "");
    }
}
