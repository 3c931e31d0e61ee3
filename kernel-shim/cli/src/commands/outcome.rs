//! How a command ends: with a verdict, or with one line that says why there is none, such as a file
//! that cannot be read or written.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;

use crate::input::layout::Layout;
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

/// The text of a file, or why it cannot be had.
pub(crate) fn read_text(path: &Path) -> Result<String, CommandError> {
    std::fs::read_to_string(path).map_err(|error| format!("cannot read {}: {error}", path.display()))
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

/// The layout in a file, or why there is none.
pub(crate) fn read_layout(path: &Path) -> Result<Layout, CommandError> {
    Layout::parse(&path.display().to_string(), &read_text(path)?).map_err(|error| error.to_string())
}

/// A place to write to, or why it is none.
pub(crate) fn output_file(path: &Path) -> Result<OutputFile, CommandError> {
    OutputFile::create(path).map_err(|error| cannot_write(path, &error))
}

pub(crate) fn cannot_write(path: &Path, error: &io::Error) -> CommandError {
    format!("cannot write {}: {error}", path.display())
}
