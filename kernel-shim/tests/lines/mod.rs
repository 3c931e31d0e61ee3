//! Which lines of a file are counted, wherever a document says how long something is. The file is
//! as rustfmt leaves it.

/// The lines of `text` that count: not blank, not a comment, not of a test. An item that is only
/// for tests and ends in its first line is left out; a longer one ends what counts of its file.
pub(crate) fn code_lines(text: &str) -> impl Iterator<Item = &str> {
    let mut is_for_tests = false;
    let mut has_ended = false;
    text.lines().filter(move |line| {
        let counts = !has_ended && !is_for_tests && *line != "#[cfg(test)]";
        has_ended |= is_for_tests && !line.ends_with(';');
        is_for_tests = *line == "#[cfg(test)]";
        counts && !line.trim().is_empty() && !line.trim_start().starts_with("//")
    })
}
