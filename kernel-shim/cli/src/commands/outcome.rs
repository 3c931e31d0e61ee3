//! How a command ends: with a verdict, or with one line that says why there is none, such as a file
//! that cannot be read or written.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read as _, Write as _};
use std::path::Path;

use crate::input::layout::Layout;
use crate::input::maps::{is_maps, parse_maps};
use crate::output::escape::escaped;
use crate::output::file::OutputFile;

/// What the process says when it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CommandVerdict {
    /// Everything held; exit code 0.
    Good,
    /// Something did not; exit code 1.
    Violation,
}

/// One line for the person, exit code 2.
pub(crate) type CommandError = String;

/// Bytes of a file that is read whole.
const MOST_BYTES: u64 = 256 << 20;

/// The text of a file, or why it cannot be had; `-` is standard input. Bytes that are no text are
/// replaced.
pub(crate) fn read_text(path: &Path) -> Result<String, CommandError> {
    let name = path.display();
    let mut input = open_input(path)?;
    let cannot_read = |error| format!("cannot read {name}: {error}");
    // An endless device is told by its first bytes.
    if input.fill_buf().map_err(cannot_read)?.contains(&0) {
        return Err(format!("{name}:1: expected text, found a byte of value 0"));
    }
    let mut bytes = Vec::new();
    input.take(MOST_BYTES + 1).read_to_end(&mut bytes).map_err(cannot_read)?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(format!("cannot read {name}: expected at most {} MiB", MOST_BYTES >> 20));
    }
    Ok(String::from_utf8(bytes)
        .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
}

/// A file to read line by line, or why it cannot be had; `-` is standard input.
pub(crate) fn open_input(path: &Path) -> Result<Box<dyn BufRead>, CommandError> {
    if path.as_os_str() == "-" {
        return Ok(Box::new(io::stdin().lock()));
    }
    let cannot_read = |error| format!("cannot read {}: {error}", path.display());
    let file = File::open(path).map_err(cannot_read)?;
    // Linux opens folders, and refuses to read them.
    if file.metadata().map_err(cannot_read)?.is_dir() {
        return Err(format!("cannot read {}: it is a folder", path.display()));
    }
    Ok(Box::new(BufReader::new(file)))
}

/// The layout in a file, or why there is none; `-` is standard input. What was assumed is said on
/// stderr.
pub(crate) fn read_layout(path: &Path) -> Result<Layout, CommandError> {
    let source = path.display().to_string();
    let text = read_text(path)?;
    let is_of_proc = !is_layout(&text) && is_maps(&text);
    if !is_of_proc {
        const OTHERS: &str =
            "/proc/PID/maps and smaps are taken, too, and `teardown trace` takes logs of strace";
        return Layout::parse(&source, &text).map_err(|error| match is_layout(&text) {
            true => error.to_string(),
            false => format!("{error}; {OTHERS}"),
        });
    }
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let read = parse_maps(&source, &stem, &text).map_err(|error| error.to_string())?;
    for remark in read.remarks {
        let _ = writeln!(io::stderr(), "teardown: {}", escaped(&remark));
    }
    Ok(read.layout)
}

fn is_layout(text: &str) -> bool {
    let first = text.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with('#'));
    first.is_some_and(|line| line.starts_with("mmu-gather layout"))
}

/// A place to write to, or why it is none.
pub(crate) fn output_file(path: &Path) -> Result<OutputFile, CommandError> {
    OutputFile::create(path).map_err(|error| cannot_write(path, &error))
}

pub(crate) fn cannot_write(path: &Path, error: &io::Error) -> CommandError {
    format!("cannot write {}: {error}", path.display())
}

/// Writes a layout to the file that was made for it, or to standard output.
pub(crate) fn write_layout(layout: &Layout, file: Option<(&Path, OutputFile)>) -> Result<(), CommandError> {
    match file {
        None => {
            let mut out = BufWriter::new(io::stdout().lock());
            let written = layout.write_to(&mut out).and_then(|()| out.flush());
            written.map_err(|error| format!("cannot write the layout: {error}"))?;
        }
        Some((path, file)) => {
            file.write(|out| layout.write_to(out)).map_err(|error| cannot_write(path, &error))?;
        }
    }
    Ok(())
}
