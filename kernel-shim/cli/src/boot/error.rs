//! Why nothing was booted, or nothing can be said of what was.

use std::io;
use std::path::PathBuf;

use crate::input::layout::LayoutError;

/// Why nothing was run, or nothing can be said of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// There is no such emulator.
    #[error(
        "cannot find {}: install QEMU (Debian, Ubuntu: apt-get install --no-install-recommends qemu-system-x86; \
         Fedora: dnf install qemu-system-x86-core), or name it with --qemu PATH",
        .0.display()
    )]
    NoQemu(PathBuf),
    /// The emulator refused to run.
    #[error("the emulator: {0}")]
    Qemu(String),
    /// The source tree is gone.
    #[error(
        "the sources this command was built from are not at {}: build the image as kernel-shim/boot/README.md says, \
         and name it with --image PATH",
        .0.display()
    )]
    NoSources(PathBuf),
    /// The image could not be built.
    #[error("cannot build the image: {0}")]
    Cargo(String),
    /// What was named as the image is none.
    #[error("{}: expected the file of an image, as kernel-shim/boot/README.md says how to build", .0.display())]
    NoImage(PathBuf),
    /// The time was over, and nobody knows what would have come.
    #[error("the emulator did not end within {seconds} s (--timeout); {last}")]
    TimedOut {
        /// The time.
        seconds: u64,
        /// What it said last, in words.
        last: String,
    },
    /// It ended as if all were well, and did not do or say what was asked for.
    #[error("{0}: nothing can be said of the engine")]
    Incomplete(String),
    /// The image says what it cannot do.
    #[error("the image: {0}")]
    Image(String),
    /// The options do not go together.
    #[error("{0}")]
    Usage(&'static str),
    /// A file could not be read or written.
    #[error("{}: {error}", path.display())]
    File {
        /// Its name.
        path: PathBuf,
        /// What the host said.
        error: io::Error,
    },
    /// The layout is none.
    #[error("{0}")]
    Layout(#[from] LayoutError),
    /// The hosted machine, asked for the same counts, could not give them.
    #[error("the hosted machine: {0}")]
    Hosted(String),
    /// The report could not be written.
    #[error("cannot write the report: {0}")]
    Output(io::Error),
}
